"""Several processes that talk over gloo, forked from this one, which has imported what they need.

A launcher starts each process anew, and each imports torch and transformers: ten seconds of a core. Forked, it takes a
moment. What the launcher would set in the environment is set here.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 240.0  # seconds; after that the processes are hanging


@dataclass
class Ended:
    """How one process ended, and what it had said."""

    code: int  # minus the signal where one ended it
    said: str


class Processes:
    """`count` forks of this process, each of which runs `work(rank)` and ends with what that returns."""

    def __init__(self, count: int, work: Callable[[int], Any], **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.said = [Path(name) for name in (tempfile.mkstemp()[1] for _ in range(count))]
        self.numbers = []
        for rank in range(count):
            number = os.fork()
            if number == 0:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in names.items()} | environment
                os._exit(run_in_fork(rank, work, self.said[rank]))
            self.numbers.append(number)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.numbers[rank], number)

    def ended(self) -> list[Ended]:
        """Waits for all; what still runs when patience is over is killed, and counts as ended by SIGKILL."""
        codes: dict[int, int] = {}
        limit = time.monotonic() + PATIENCE
        while len(codes) < len(self.numbers):
            for rank, number in enumerate(self.numbers):
                if rank in codes:
                    continue
                done, status = os.waitpid(number, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > limit:
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.02)
        texts = [path.read_text(errors="replace") for path in self.said]
        for path in self.said:
            path.unlink()
        return [Ended(codes[rank], texts[rank]) for rank in range(len(codes))]


def run_in_fork(rank: int, work: Callable[[int], Any], said: Path) -> int:
    """The exit code; what is written to the two streams, by C++ too, goes to `said`."""
    with open(said, "w", buffering=1) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        with redirect_stdout(stream), redirect_stderr(stream):
            try:
                return int(work(rank) or 0)
            except BaseException:
                traceback.print_exc()
                return 1
            finally:
                sys.stdout.flush()


def lora_train(count: int, *words: str, **environment: str) -> Processes:
    """`torchrun --nproc-per-node count -m lora train words…`."""
    from lora.cli import main

    return Processes(count, lambda rank: main(["train", *words]), **environment)


def quietly(work: Callable[[], Any]) -> Any:
    """What `work` returns; what it prints goes nowhere."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return work()
