"""Being asked to stop: Ctrl-C (SIGINT) and SIGTERM, which schedulers and `kill` send.

While steps are trained, either one lets the step finish and a checkpoint be written; a second Ctrl-C ends at once, a
second SIGTERM changes nothing (schedulers repeat it, and follow with SIGKILL when they lose patience). Outside of
training, where there is nothing to save, either one ends the run at once. The exit code is 128 + the signal, as a
shell reports it: 130 or 143.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class InterruptedRunError(KeyboardInterrupt):
    """The run was stopped by Ctrl-C; says what is saved."""

    exit_code = 128 + signal.SIGINT


class TerminatedRunError(InterruptedRunError):
    """The run was stopped by SIGTERM; says what is saved."""

    exit_code = 128 + signal.SIGTERM


class Stopping:
    """Listens for the two signals, and remembers which one came.

    `advice` is what the message says after a SIGTERM outside of training.
    """

    def __init__(self) -> None:
        self.terminated, self.advice = False, ""
        self._in_step: Callable[[], None] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block, SIGTERM raises TerminatedRunError, or is remembered while steps are trained."""
        with _handling(signal.SIGTERM, self._on_sigterm):
            yield

    @contextmanager
    def after_the_step(self, handle: Callable[[], None]) -> Iterator[None]:
        """Within the block, the first Ctrl-C and any SIGTERM only call `handle`; the second Ctrl-C interrupts."""
        before = signal.getsignal(signal.SIGINT)

        def on_sigint(number: int, frame: Any) -> None:
            signal.signal(signal.SIGINT, before)
            handle()

        self._in_step = handle
        try:
            with _handling(signal.SIGINT, on_sigint):
                yield
        finally:
            self._in_step = None

    def _on_sigterm(self, number: int, frame: Any) -> None:
        self.terminated = True
        if self._in_step is None:
            raise TerminatedRunError(f"terminated (SIGTERM) {self.advice}")
        self._in_step()


@contextmanager
def _handling(number: signal.Signals, handler: Callable[[int, Any], None]) -> Iterator[None]:
    """`handler` for a signal within the block; nothing outside the main thread, which alone may set one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
