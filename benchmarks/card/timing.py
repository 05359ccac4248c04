"""Time and memory of functions, on a GPU by its own clock, on a CPU (dry run) by the host's.

On a GPU each repetition overwrites the L2 cache, then lets the device sleep for two milliseconds while the host launches
everything: the events around the work see the device alone, not the host's time to launch. That time is measured too;
it is what a small operation costs where the host is not ahead. A function that waits for the device inside (`nonzero`)
has its later launches in the figure: that is its own doing.

Functions to be compared are run in turn, round after round, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from benchmarks.card.rows import FAILED, OUT_OF_MEMORY

Results = tuple[Tensor, ...]
T = TypeVar("T")
ROUNDS = (5, 30)  # at least and at most
SLEEP_CYCLES = 16_000_000  # some eight milliseconds: longer than a slow host takes to launch any operation here


class Variant(NamedTuple):
    """One way to compute something."""

    run: Callable[[], Results]
    prepare: Callable[[], object] | None = None  # before each run, not timed: inputs that the run overwrites
    compare: bool = True  # False where it computes something else on purpose, such as the frozen layer alone
    note: str = ""


class Timing(NamedTuple):
    """Seconds a run, and memory."""

    median: float
    low: float
    high: float
    host: float  # the host's seconds to launch it
    rounds: int
    peak: int | None  # bytes above `base`
    base: int | None


def measure(
    variants: Mapping[str, Variant], device: torch.device, seconds: float, rounds: int | None = None
) -> dict[str, Timing | str]:
    """Each variant's timing, or the reason why there is none; about `seconds` of device time in all, or `rounds`."""
    found: dict[str, Timing | str] = {}
    memory: dict[str, tuple[int | None, int | None]] = {}
    once = 0.0
    for name, variant in variants.items():
        outcome = attempt(partial(warm_up, variant, device))
        if isinstance(outcome, str):
            found[name] = outcome
            continue
        once += outcome[0]
        memory[name] = outcome[1:]
    if rounds is None:
        rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds / max(once, 1e-6)))) if device.type == "cuda" else 3
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in memory}
    flush = flush_buffer(device)
    for _ in range(rounds):
        for name in samples:
            samples[name].append(one_run(variants[name], device, flush))
    for name, pairs in samples.items():
        times = [device_time for device_time, _ in pairs]
        host = statistics.median(host_time for _, host_time in pairs)
        found[name] = Timing(statistics.median(times), min(times), max(times), host, rounds, *memory[name])
    return {name: found[name] for name in variants}


def warm_up(variant: Variant, device: torch.device) -> tuple[float, int | None, int | None]:
    """Compiles whatever is compiled; returns seconds of a warm run, its peak above what was allocated, and that."""
    flush = flush_buffer(device)
    one_run(variant, device, flush)
    if variant.prepare is not None:
        variant.prepare()
    peak = base = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
        variant.run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - base
    return one_run(variant, device, flush)[0], peak, base


def one_run(variant: Variant, device: torch.device, flush: Tensor | None) -> tuple[float, float]:
    """The device's seconds, and the host's."""
    if variant.prepare is not None:
        variant.prepare()
    if flush is None:
        start = time.perf_counter()
        variant.run()
        seconds = time.perf_counter() - start
        return seconds, seconds
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    flush.zero_()
    torch.cuda._sleep(SLEEP_CYCLES)
    start = time.perf_counter()
    begin.record()
    variant.run()
    end.record()
    host = time.perf_counter() - start
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3, host


def flush_buffer(device: torch.device) -> Tensor | None:
    """Twice the L2 cache; None on a CPU."""
    if device.type != "cuda":
        return None
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 1 << 26
    return torch.empty(2 * size, dtype=torch.int8, device=device)


def attempt(work: Callable[[], T]) -> T | str:
    """What `work` returns, or a reason in words: one failure must not cost the figures that come after it."""
    try:
        return work()
    except torch.OutOfMemoryError:
        reason = OUT_OF_MEMORY
    except Exception as error:
        reason = f"{FAILED}: {in_words(error)}"
    free_memory()  # here, where the traceback and what it holds are gone
    return reason


def in_words(error: Exception) -> str:
    """The error's kind and first line, without the folders of the machine it happened on."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {re.sub(r'(/[^/ ]+)+/', '', lines[0])[:200]}"


def free_memory() -> None:
    """Gives device memory back that nothing refers to."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def both_ways(
    function: Callable[..., Tensor | Results],
    leaves: Sequence[Tensor],
    frozen: Sequence[object],
    douts: Sequence[Tensor],
) -> Results:
    """function(*leaves, *frozen), and the gradient of Σ <dout, output> with respect to each leaf."""
    outputs = function(*leaves, *frozen)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    gradients = torch.autograd.grad(outputs, leaves, douts)
    return (*(output.detach() for output in outputs), *gradients)
