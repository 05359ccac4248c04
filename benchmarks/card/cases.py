"""What a case is, and how it is checked and timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks.card.checks import Poison, limit_of, relative_error
from benchmarks.card.rows import FAILED, NOT_RUN, NOT_THERE, WRONG, Recorder, Row
from benchmarks.card.timing import Results, Timing, Variant, attempt, free_memory, measure


@dataclass(frozen=True)
class Shapes:
    """The sizes that cases are built from."""

    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 128256
    layers: int = 32
    r: int = 16
    tokens: tuple[int, ...] = (8192, 2048)
    check_tokens: int = 333  # off every block size
    loss_rows: int = 2048  # of the loss kernel alone
    sequence: int = 2048
    adapters: int = 8
    copy_bytes: int = 1 << 31
    gemm: tuple[tuple[int, int, int], ...] = (
        (8192, 8192, 8192),
        (8192, 4096, 14336),
        (8192, 14336, 4096),
        (16384, 8192, 8192),
    )  # tokens, in, out


LLAMA_8B = Shapes()
TINY = Shapes(
    hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=160, layers=2, r=4, tokens=(64, 24), check_tokens=21,
    loss_rows=16, sequence=16, adapters=3, copy_bytes=1 << 16, gemm=((64, 32, 48),),
)  # fmt: skip


@dataclass
class Case:
    """One thing to be computed, in several ways."""

    name: str
    tokens: int
    shape: str
    variants: dict[str, Variant]
    truth: Callable[[], Results]  # in float64, what every variant with `compare` returns
    results: tuple[str, ...]  # their names
    bytes: int
    flops: int = 0
    dtype: torch.dtype = torch.bfloat16
    absent: dict[str, str] = field(default_factory=dict)  # variant -> why it is not there
    error: Callable[[Tensor, Tensor], float] = relative_error
    limit: float | None = None  # by default what roundings of `dtype` explain

    def row(self, part: str, variant: str, **figures: object) -> Row:
        """A row of this case."""
        dtype = str(self.dtype).removeprefix("torch.")
        return Row(part, self.name, variant, self.tokens, self.shape, dtype, **figures)  # type: ignore[arg-type]


Job = tuple[str, Callable[[], Case]]  # a name for the case, and what builds it


@dataclass
class Session:
    """What every part is given."""

    device: torch.device
    recorder: Recorder
    shapes: Shapes
    deadline: float  # time.monotonic()'s
    dry: bool
    case_seconds: float = 1.0  # of device time
    compile: bool = False  # time compiled layers too
    only: str = ""  # ops: those whose name has this in it
    lengths: tuple[int, ...] = ()  # context: whole steps of these lengths, and no search
    bandwidth: float | None = None  # bytes/s and FLOP/s, measured
    rate: float | None = None

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def read_ceilings(self) -> None:
        """The best that was measured, in this call or an earlier one into the same directory."""
        rows = [row for row in self.recorder.rows if row.part == "ceilings" and row.median_s]
        copies = [row.bytes / row.median_s for row in rows if row.name == "copy" and row.bytes and row.median_s]
        products = [row.flops / row.median_s for row in rows if row.name == "gemm" and row.flops and row.median_s]
        self.bandwidth, self.rate = max(copies, default=None), max(products, default=None)


def run_jobs(session: Session, part: str, jobs: list[Job], *, timed: bool) -> None:
    """Checks every case and, if `timed`, times it; says which were not run for lack of time."""
    for name, build in jobs:
        if session.seconds_left() < 0:
            session.recorder.add(Row(part, name, "all", note=f"{NOT_RUN}: the time was up"))
            continue
        reason = attempt(partial(build_and_run, session, part, build, timed))
        if isinstance(reason, str):
            session.recorder.add(Row(part, name, "all", note=reason))
        free_memory()


def build_and_run(session: Session, part: str, build: Callable[[], Case], timed: bool) -> None:
    """Building is part of what may fail."""
    run_case(session, part, build(), timed=timed)


def run_case(session: Session, part: str, case: Case, *, timed: bool) -> None:
    """One case: check, then figures of what agreed, then its floor."""
    outcomes = check(case)
    right = {name: variant for name, variant in case.variants.items() if not outcomes[name].startswith((WRONG, FAILED))}
    for name, reason in case.absent.items():
        session.recorder.add(case.row(part, name, note=f"{NOT_THERE}: {reason}"))
    for name, outcome in outcomes.items():
        if name not in right or (outcome and not timed):
            session.recorder.add(case.row(part, name, note=outcome))
    if not timed:
        return
    for name, timing in measure(right, session.device, session.case_seconds).items():
        if isinstance(timing, str):
            session.recorder.add(case.row(part, name, note=timing))
        else:
            note = "; ".join(text for text in (case.variants[name].note, outcomes[name], launching(timing)) if text)
            session.recorder.add(case.row(part, name, **figures(case, timing), note=note))
    add_floor(session, part, case)


def figures(case: Case, timing: Timing) -> dict[str, object]:
    """A timing as columns."""
    return {
        "median_s": timing.median, "low_s": timing.low, "high_s": timing.high, "bytes": case.bytes,
        "flops": case.flops, "peak_bytes": timing.peak, "base_bytes": timing.base,
    }  # fmt: skip


def launching(timing: Timing) -> str:
    """What the host needs to launch it, and how often it was run."""
    return f"host {1e6 * timing.host:.0f} us; {timing.rounds} rounds"


def add_floor(session: Session, part: str, case: Case) -> None:
    """max(bytes / bandwidth, FLOPs / rate), where both were measured."""
    if session.bandwidth is None or session.rate is None:
        return
    memory, arithmetic = case.bytes / session.bandwidth, case.flops / session.rate
    which = "memory" if memory >= arithmetic else "arithmetic"
    seconds = max(memory, arithmetic)
    columns = {"median_s": seconds, "bytes": case.bytes, "flops": case.flops, "note": which}
    session.recorder.add(case.row(part, "floor", **columns))


def check(case: Case) -> dict[str, str]:
    """For each variant its errors in words; beginning with WRONG or FAILED where it must not be timed."""
    truth: Results | None = None
    outcomes = {}
    limit = limit_of(case.dtype) if case.limit is None else case.limit
    for name, variant in case.variants.items():
        if not variant.compare:
            outcomes[name] = ""
            continue
        truth = case.truth() if truth is None else truth
        results = attempt(partial(poisoned, variant))
        outcomes[name] = results if isinstance(results, str) else compare(case, results, truth, limit)
    return outcomes


def poisoned(variant: Variant) -> Results:
    """One run whose fresh memory is NaN."""
    if variant.prepare is not None:
        variant.prepare()
    with Poison():  # type: ignore[no-untyped-call]
        return variant.run()


def compare(case: Case, results: Results, truth: Results, limit: float) -> str:
    """The errors in words."""
    if not len(results) == len(truth) == len(case.results):
        return f"{WRONG}: {len(results)} results, expected {len(truth)}"
    errors = [case.error(actual, expected) for actual, expected in zip(results, truth, strict=True)]
    text = ", ".join(f"{name} {error:.1e}" for name, error in zip(case.results, errors, strict=True))
    verdict = "errors" if all(error <= limit for error in errors) else f"{WRONG}, over {limit:.1e}"
    return f"{verdict}: {text}"
