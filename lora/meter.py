"""How far long work has come, on a terminal; nothing anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PAUSE = 0.1  # seconds between two changes of the line: a terminal must not slow the work down


@contextmanager
def meter(doing: str, total: int = 0) -> Iterator[Callable[[int], None]]:
    """While the block works, a line on stderr says what it does and, of `total` bytes, how much is done.

    Yields: what to call with the bytes of each part that is finished.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done: None
        return
    finished, said_at = 0, time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"\r\x1b[K{text}")  # from the line's start, over what is there
        sys.stderr.flush()

    def add(done: int) -> None:
        nonlocal finished, said_at
        finished += done
        now = time.monotonic()
        if now - said_at >= PAUSE:
            said_at = now
            say(f"{doing} {finished / max(total, 1):.0%} of {total / 1e6:,.0f} MB")

    say(f"{doing} ...")
    try:
        yield add
    finally:
        say("")
