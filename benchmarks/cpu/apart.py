"""A way to do something in a process of its own, as its user would: one model, and memory that nobody else has used.

What a step costs may depend on what its process did before: the C library keeps some freed memory, and gives other back,
to be faulted in again. A user trains one model, so each way to train one is measured in a process that has only that.

The processes wait on a pipe until it is their turn, so that only one of them computes. Their server imports everything
once and starts no threads; each process is forked from it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

import lora
from benchmarks.card.timing import Variant

PRELOADED = ["torch", "transformers", "peft", "lora"]
Build = Callable[..., Variant]
Apart = Callable[..., Variant]  # (build, *arguments): build(*arguments), whose runs happen in another process


@contextmanager
def processes() -> Iterator[Apart]:
    """Gives `apart(build, *arguments)`; every process ends with the block.

    `build` is a function of a module, and its arguments can be pickled. It is called at once, so that only runs are timed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ExitStack() as stack:

        def apart(build: Build, *arguments: Any) -> Variant:
            here, there = context.Pipe()
            given = (there, torch.get_num_threads(), build, arguments)
            process = context.Process(target=serve, args=given, daemon=True)
            process.start()
            there.close()
            stack.callback(process.join)
            stack.callback(here.close)  # before: the process ends when nobody is left to ask
            return Variant(lambda: turn(here), note=answer(here))

        yield apart


def serve(asked: Connection, threads: int, build: Build, arguments: tuple[Any, ...]) -> None:
    """In the process: builds, says what the variant's note is, and runs it each time that it is asked."""
    torch.set_num_threads(threads)
    with lora.use_backend("fast"):
        try:
            variant = build(*arguments)
            asked.send((None, variant.note))
            while asked.recv():
                variant.run()
                asked.send((None, ""))
        except EOFError:
            return
        except Exception as error:  # the figure's row says so
            asked.send((error, ""))


def turn(process: Connection) -> tuple[()]:
    """One run."""
    process.send(True)
    answer(process)
    return ()


def answer(process: Connection) -> str:
    """What the process says; raises what was raised there."""
    error, note = process.recv()
    if error is not None:
        raise error
    return str(note)
