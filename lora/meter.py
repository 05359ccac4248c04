"""How far long work has come: on a terminal a line that changes, anywhere else a line now and then.

Work inside of other work has the line while it lasts: the innermost says what it does. Off a terminal nothing is said
in the first seconds, so that short work is silent; a thread says the rest, since the work itself may not come up for
long. It goes to stderr, unless `shown_by` sends it elsewhere. LORA_PROGRESS=off: nothing is said. Of several processes
that a launcher has started, the first one speaks.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

PAUSE = 0.1  # seconds between two changes of the line: a terminal must not slow the work down
FIRST, EVERY = 5.0, 15.0  # seconds: off a terminal, when work is said to go on, and how often from then on


class Port(NamedTuple):
    """Where it is said."""

    show: Callable[[str], None]  # given "", the line goes
    live: bool  # a line that changes


class Meter:
    """One piece of work; calling it with the bytes, or the number of things, that are finished moves it on."""

    def __init__(self, doing: str, total: int = 0, things: str = "") -> None:
        self.doing, self.total, self.things = doing, total, things
        self.finished, self.said_at = 0, time.monotonic()
        self.inner: Meter | None = None
        self.port: Port | None = None

    def __call__(self, done: int = 1) -> None:
        self.finished += done
        now = time.monotonic()
        if self.port is not None and self.port.live and now - self.said_at >= PAUSE:
            self.said_at = now
            self.port.show(self.text())

    def __deepcopy__(self, memo: Any) -> Meter:
        return self  # transformers copies the config that carries one while it loads, and there is one line to show

    def text(self) -> str:
        """What the innermost work says."""
        if self.inner is not None:
            return self.inner.text()
        if not self.total:
            return f"{self.doing} ..."
        if self.things:
            return f"{self.doing} {self.finished:,} of {self.total:,} {self.things}"
        return f"{self.doing} {self.finished / self.total:.0%} of {self.total / 1e6:,.0f} MB"


_current: ContextVar[Meter | None] = ContextVar("current", default=None)
_elsewhere: ContextVar[Port | None] = ContextVar("elsewhere", default=None)


@contextmanager
def meter(doing: str, total: int = 0, things: str = "") -> Iterator[Meter]:
    """While the block works, says what it does and, of `total` bytes or things, how much is done.

    Yields: what to call with the bytes, or the number of things, of each part that is finished. Its `total` may be set
    when it is known.
    """
    outer, found = _current.get(), Meter(doing, total, things)
    found.port = outer.port if outer is not None else _elsewhere.get() or _standard_port()
    if found.port is None:
        yield found
        return
    token, over, thread = _current.set(found), threading.Event(), None
    if outer is not None:
        outer.inner = found
    elif not found.port.live:
        thread = threading.Thread(target=_now_and_then, args=(found, found.port, over), daemon=True)
        thread.start()
    if found.port.live:
        found.port.show(f"{doing} ...")
    try:
        yield found
    finally:
        over.set()
        if thread is not None:  # or a process that ends now may abort: the thread could hold the last tensors
            thread.join()
        _current.reset(token)
        if outer is not None:
            outer.inner = None
        if found.port.live:
            found.port.show("" if outer is None else outer.text())


def _now_and_then(outermost: Meter, port: Port, over: threading.Event) -> None:
    pause = FIRST
    while not over.wait(pause):
        port.show(outermost.text())
        pause = EVERY


@contextmanager
def shown_by(show: Callable[[str], None], live: bool) -> Iterator[None]:
    """Sends what is said in the block to `show`; `live`: a line of it can be changed."""
    token = _elsewhere.set(Port(show, live))
    try:
        yield
    finally:
        _elsewhere.reset(token)


def _standard_port() -> Port | None:
    if sys.stderr is None or os.environ.get("LORA_PROGRESS") == "off" or os.environ.get("RANK", "0") != "0":
        return None
    return Port(_change_line, True) if sys.stderr.isatty() else Port(_print_line, False)


def _change_line(text: str) -> None:
    sys.stderr.write(f"\r\x1b[K{text}")  # from the line's start, over what is there
    sys.stderr.flush()


def _print_line(text: str) -> None:
    if sys.stderr is not None:
        print(f"lora: {text}", file=sys.stderr, flush=True)
