"""The longest sequence that trains: NF4, block inputs in host memory, one sequence.

A whole step of a long sequence takes minutes, and memory's peak is that of one block and the loss. The search
therefore runs PROBED blocks (the whole model's weights stay where they are), and whole steps are run for some lengths
and for the longest one found, as far as the time reaches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

import lora
from benchmarks.card import model as models
from benchmarks.card.cases import Session
from benchmarks.card.rows import NOT_RUN, OUT_OF_MEMORY, Row
from benchmarks.card.steps import allocated, synchronize, token_ids
from benchmarks.card.timing import attempt, free_memory

PROBED = 3  # blocks: the last input, its neighbour on the way back, and one that waits in host memory
WHOLE = (8192, 32768, 131072)  # lengths of whole steps
FIRST, LAST = 131072, models.LONGEST  # the search doubles from here, at most to there
HALVINGS = 4  # between the last length that fitted and the first that did not
WHOLE_OPTIONS, PROBE_OPTIONS = "ours, offload", f"ours, offload, {PROBED} blocks"


def run(session: Session) -> None:
    """A model of its own, so that the part can be run alone; whole steps, the search, and what it found."""
    whole, first, last = ((32, 64), 64, 128) if session.dry else (WHOLE, FIRST, LAST)
    with lora.use_backend("fast"):
        model = models.build(session)
        lora.quantize(model, "nf4")
        free_memory()
        base = allocated(session)
        with models.ours(model, session.shapes.r):
            models.set_mode(model, "offload")
            attempt(partial(one_step, session, model, whole[0], base))  # compiles kernels: no figure
            model.zero_grad(set_to_none=True)
            took = {length: measured(session, model, length, base) for length in session.lengths or whole}
            if session.lengths:
                return
            with blocks(model, PROBED):
                longest = search(session, model, first, last, base)
            whole_step_of(session, model, longest, took, base)


def search(session: Session, model: Any, first: int, last: int, base: int | None) -> int:
    """The longest length that fits: doubled until one does not, then halved in between; 0 where none does."""
    fits, length = 0, first
    while length <= last and measured(session, model, length, base) is not None:
        fits, length = length, 2 * length
    if not fits or length > last:
        return fits
    step = fits // 2
    for _ in range(HALVINGS):
        if measured(session, model, fits + step, base) is not None:
            fits += step
        step //= 2
    return fits


def whole_step_of(session: Session, model: Any, longest: int, took: dict[int, float | None], base: int | None) -> None:
    """The whole model at the longest length, where the time is enough: attention's work grows with the square."""
    length, seconds = max(((n, s) for n, s in took.items() if s is not None), default=(0, 0.0))
    if not longest or not length or longest in took:
        return
    needed = seconds * (longest / length) ** 2
    if session.seconds_left() < needed:
        note = f"{NOT_RUN}: about {needed:.0f} s would be needed; {PROBED} blocks of it fitted"
        session.recorder.add(context_row(model, longest, base, note=note))
    else:
        measured(session, model, longest, base)


def measured(session: Session, model: Any, length: int, base: int | None) -> float | None:
    """One row; seconds, or None where the length does not fit. Another failure ends the part."""
    outcome = attempt(partial(one_step, session, model, length, base))
    model.zero_grad(set_to_none=True)
    free_memory()
    free_host_memory()
    if not isinstance(outcome, str):
        took, peak, loss = outcome
        figures: dict[str, Any] = {"median_s": took, "peak_bytes": peak, "note": f"loss {loss:.3f}"}
        session.recorder.add(context_row(model, length, base, **figures))
        return took
    session.recorder.add(context_row(model, length, base, note=outcome))
    if not outcome.startswith(OUT_OF_MEMORY):
        raise RuntimeError(outcome)
    return None


@contextmanager
def blocks(model: Any, number: int) -> Iterator[None]:
    """Runs the first `number` blocks alone; transformers reads how many from the configuration."""
    before, model.config.num_hidden_layers = model.config.num_hidden_layers, number
    try:
        yield
    finally:
        model.config.num_hidden_layers = before


def free_host_memory() -> None:
    """Gives pinned memory back, which torch would keep for the same sizes: every length has sizes of its own."""
    empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None and torch.cuda.is_available():
        empty()


def context_row(model: Any, length: int, base: int | None, **figures: Any) -> Row:
    """One length, of the whole model or of its first blocks."""
    whole = model.config.num_hidden_layers == len(model.model.layers)
    variant = WHOLE_OPTIONS if whole else PROBE_OPTIONS
    return Row("context", "step nf4", variant, length, f"1 x {length}", "bfloat16", base_bytes=base, **figures)


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
