"""The longest sequence that trains: NF4, block inputs in host memory, one sequence, twice as long each time."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

import lora
from benchmarks.card import model as models
from benchmarks.card.cases import Session
from benchmarks.card.rows import NOT_RUN, OUT_OF_MEMORY, Row
from benchmarks.card.steps import allocated, synchronize, token_ids
from benchmarks.card.timing import attempt, free_memory

FIRST = 8192
GROWTH = 4.2  # attention's work for twice the length, and a little


def run(session: Session) -> None:
    """A model of its own, so that the part can be run alone; then the search."""
    with lora.use_backend("fast"):
        model = models.build(session)
        lora.quantize(model, "nf4")
        free_memory()
        base = allocated(session)
        with models.ours(model, session.shapes.r):
            models.set_mode(model, "offload")
            search(session, model, base)


def search(session: Session, model: Any, base: int | None) -> None:
    """Doubles until memory or time is out; then once the middle between what fitted and what did not."""
    length, longest, took = (FIRST if not session.dry else 32), 0, 0.0
    last = 128 if session.dry else models.LONGEST
    while length <= last:
        if session.seconds_left() < GROWTH * took:
            note = f"{NOT_RUN}: about {GROWTH * took:.0f} s would be needed; the limit of memory was not reached"
            session.recorder.add(context_row(length, base, note=note))
            return
        outcome = attempt(partial(one_step, session, model, length, base))
        model.zero_grad(set_to_none=True)
        free_memory()
        free_host_memory()
        if isinstance(outcome, str):
            session.recorder.add(context_row(length, base, note=outcome))
            if not outcome.startswith(OUT_OF_MEMORY) or length != 2 * longest:
                return
            last, length = length - 1, longest + longest // 2
            continue
        took, peak, loss = outcome
        session.recorder.add(context_row(length, base, median_s=took, peak_bytes=peak, note=f"loss {loss:.3f}"))
        longest, length = length, 2 * length


def free_host_memory() -> None:
    """Gives pinned memory back, which torch would keep for the same sizes: every length has sizes of its own."""
    empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None and torch.cuda.is_available():
        empty()


def context_row(length: int, base: int | None, **figures: Any) -> Row:
    """One length."""
    return Row("context", "step nf4", "ours, offload", length, f"1 x {length}", "bfloat16", base_bytes=base, **figures)


def one_step(session: Session, model: Any, length: int, base: int | None) -> tuple[float, int | None, float]:
    """Forward and backward once: seconds, peak above the model, loss."""
    cuda = session.device.type == "cuda"
    ids = token_ids(session, 1, length)
    if cuda:
        torch.cuda.reset_peak_memory_stats(session.device)
    synchronize(session)
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    synchronize(session)
    seconds = time.perf_counter() - start
    return (
        seconds,
        torch.cuda.max_memory_allocated(session.device) - (base or 0) if cuda else None,
        float(loss.detach()),
    )
