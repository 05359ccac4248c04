"""What every subject is given, and the order that all keep: agreement first, then times in turn, then rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.card.cases import Case, check
from benchmarks.card.checks import limit_of, relative_error
from benchmarks.card.rows import FAILED, NOT_THERE, WRONG, Recorder, Row
from benchmarks.card.timing import Variant, attempt, measure

CPU = torch.device("cpu")
SCATTER = 2  # of one output among hundreds, in the mean over a few batches
FORMULA = 0.01  # of an output: further off is no rounding of float32, however a model magnifies it
Results = Mapping[str, Tensor]


@dataclass
class Session:
    """One run of the benchmark."""

    recorder: Recorder
    rounds: int
    dry: bool


@dataclass
class Trial:
    """One line of the table: ways to do one thing, in turn, if `gate` finds their outputs to agree."""

    part: str
    name: str
    variants: dict[str, Variant]
    gate: Callable[[], str]  # the errors in words, beginning with WRONG or FAILED where nothing may be timed
    tokens: int = 0
    shape: str = ""
    floor_bytes: int | None = None
    floor_flops: int | None = None
    absent: dict[str, str] = field(default_factory=dict)  # variant -> why it is not there

    def row(self, variant: str, **figures: object) -> Row:
        return Row(self.part, self.name, variant, self.tokens, self.shape, **figures)  # type: ignore[arg-type]


def run_trial(session: Session, trial: Trial) -> None:
    """The gate, then the times; without agreement the one row says by how much what is off."""
    for name, reason in trial.absent.items():
        session.recorder.add(trial.row(name, note=f"{NOT_THERE}: {reason}"))
    outcome = attempt(trial.gate)
    if outcome.startswith((WRONG, FAILED)):
        session.recorder.add(trial.row("ours", note=outcome))
        return
    session.recorder.add(trial.row("gate", note=outcome))
    for name, timing in measure(trial.variants, CPU, seconds=0, rounds=session.rounds).items():
        if isinstance(timing, str):
            session.recorder.add(trial.row(name, note=timing))
            continue
        least = {"bytes": trial.floor_bytes, "flops": trial.floor_flops} if name == "floor" else {}
        note = "; ".join(text for text in (trial.variants[name].note, f"{timing.rounds} rounds") if text)
        times = {"median_s": timing.median, "low_s": timing.low, "high_s": timing.high}
        session.recorder.add(trial.row(name, note=note, **times, **least))


def run_case(session: Session, part: str, case: Case) -> None:
    """A trial whose gate is float64: see `benchmarks.card.cases.check`."""

    def gate() -> str:
        outcomes = check(case)
        bad = [f"{text} [{name}]" for name, text in outcomes.items() if text.startswith((WRONG, FAILED))]
        return bad[0] if bad else "; ".join(f"{name} {text}" for name, text in outcomes.items() if text)

    trial = Trial(part, case.name, case.variants, gate, case.tokens, case.shape, case.bytes, case.flops, case.absent)
    run_trial(session, trial)


def product_limit(terms: int) -> float:
    """What float32 explains in a chain of products of so many terms: eight roundings, and √terms of each sum's."""
    return limit_of(torch.float32) + terms**0.5 * torch.finfo(torch.float32).eps / 2


def verdict(found: Results, theirs: Results, truth: Results, whose: str) -> str:
    """Ours is at most twice as far from the truth as theirs, and eight roundings; beginning with WRONG where it is not.

    The output named is the one nearest to its limit, or furthest beyond it.
    """
    if not found.keys() == theirs.keys() == truth.keys():
        odd = sorted(found.keys() ^ truth.keys() | theirs.keys() ^ truth.keys())
        return f"{WRONG}: {len(found)} outputs, {len(theirs)} of {whose}; not in all: {', '.join(odd[:3])}"
    roundings = limit_of(torch.float32)
    errors = {name: (relative_error(found[name], y), relative_error(theirs[name], y)) for name, y in truth.items()}
    shares = {name: ours / (2 * other + roundings) for name, (ours, other) in errors.items()}
    worst = max(shares, key=shares.__getitem__)
    ours, other = errors[worst]
    text = (
        f"{len(truth)} outputs against float64; nearest to its limit is {worst}: off by {ours:.1e}, {whose} {other:.1e}, "
        f"limit 2 x {whose}'s + {roundings:.1e}"
    )
    return text if shares[worst] <= 1 else f"{WRONG}: {text}"


def verdict_of_batches(batches: Sequence[tuple[Results, Results, Results]], whose: str) -> str:
    """As `verdict`, of whole models: (ours, theirs, truth) for each batch.

    A deep model magnifies roundings by another factor for each batch and each gradient, so that two single errors may
    be ten times apart where neither computation is worse. So errors are geometric means over the batches. The median
    over the outputs may be twice theirs; any single output SCATTER times what that allows it; and in no batch may one
    be off by FORMULA: roundings are not, mistakes are.
    """
    for found, theirs, truth in batches:
        if not found.keys() == theirs.keys() == truth.keys():
            return verdict(found, theirs, truth, whose)  # which says what is missing
    names, roundings = list(batches[0][2]), limit_of(torch.float32)
    ours = {name: [error_of(found[name], truth[name]) for found, _, truth in batches] for name in names}
    other = {name: [error_of(theirs[name], truth[name]) for _, theirs, truth in batches] for name in names}
    mean, their_mean = ({name: geometric_mean(errors) for name, errors in each.items()} for each in (ours, other))
    median, their_median = statistics.median(mean.values()), statistics.median(their_mean.values())
    shares = {name: mean[name] / (2 * their_mean[name] + roundings) for name in names}
    odd = max(shares, key=shares.__getitem__)
    far = max(names, key=lambda name: max(ours[name]))
    text = (
        f"{len(names)} outputs of {len(batches)} batches against float64, geometric means: the median is off by {median:.1e}, "
        f"{whose} {their_median:.1e}, limit 2 x {whose}'s + {roundings:.1e}; {odd} is nearest to its limit, off by "
        f"{mean[odd]:.1e}, {whose} {their_mean[odd]:.1e}; furthest off in one batch is {far}, {max(ours[far]):.1e}"
    )
    agrees = median <= 2 * their_median + roundings and shares[odd] <= SCATTER and max(ours[far]) <= FORMULA
    return text if agrees else f"{WRONG}: {text}"


def error_of(y: Tensor, truth: Tensor) -> float:
    """The relative error, infinite where there is no number."""
    error = relative_error(y, truth)
    return math.inf if math.isnan(error) else error


def geometric_mean(errors: Sequence[float]) -> float:
    """Of errors that may be zero, which count as far less than a rounding, or infinite."""
    return math.exp(statistics.fmean(math.log(max(error, 2.0**-60)) for error in errors))


def combined(outcomes: Sequence[str]) -> str:
    """Several gates as one: the first that failed, or all of them."""
    return next((text for text in outcomes if text.startswith((WRONG, FAILED))), "; ".join(outcomes))
