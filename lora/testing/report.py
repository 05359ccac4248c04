"""How an error is reported, and how much of its bound was used: a failure says where, a success how close."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

EDGES = (0.0, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)  # of the histogram's columns; the first is: nothing used at all


def shares_of(actual: Tensor, truth: Tensor, bound: Tensor, limit: float = math.inf) -> tuple[Tensor, Tensor]:
    """Error, and error in units of its bound, elementwise in float64; what is not finite is infinitely far.

    limit: the largest number of the type. Where the truth may round beyond it, an infinity of its sign is right.
    """
    found, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    overflows = (truth.abs() + bound >= limit) & (found == truth.sign() * math.inf)
    error = torch.where((found == truth) | overflows, 0.0, (found - truth).abs())
    share = torch.where(error == 0, 0.0, error / bound)
    return error, torch.where(share.isfinite() & error.isfinite(), share, math.inf)


def without_bound(bound: Tensor, dtype: torch.dtype) -> Tensor:
    """Which elements are compared with nothing: their bound is infinite, or no finite number of the type is outside."""
    return bound.double().cpu().nan_to_num(nan=math.inf) >= torch.finfo(dtype).max


def assert_within(actual: Tensor, truth: Tensor, bound: Tensor, name: str = "result") -> float:
    """Checks every element against its bound; returns the largest share of the bound that was used.

    Raises: AssertionError that says where, by how much, and in units of the bound. NaN never passes.
    """
    if actual.shape != truth.shape:
        raise AssertionError(f"{name} has shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    if not truth.numel():
        return 0.0
    bound = bound.detach().double().cpu()
    error, share = shares_of(actual, truth, bound, torch.finfo(actual.dtype).max)
    worst = int(share.argmax())
    used = float(share.flatten()[worst])
    if used > 1:
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), share.shape))
        raise AssertionError(
            f"{name}{list(where)} is {float(actual.flatten()[worst])!r}, expected {float(truth.flatten()[worst])!r}: "
            f"the error {float(error.flatten()[worst]):.3g} is {used:.3g} times its bound; "
            f"{int((share > 1).sum())} of {share.numel()} elements are outside"
        )
    return used


@dataclass
class Row:
    """What one result of one operation, in one type and one backend, has used of its bound."""

    cases: int = 0
    elements: int = 0
    unbounded: int = 0  # of the elements: compared with nothing
    blind: int = 0  # of the cases: zeros would have passed, which are not the result
    largest: float = 0.0
    bins: Counter[int] = field(default_factory=Counter)  # of the worst element of each case

    @classmethod
    def of(cls, used: float, truth: Tensor, bound: Tensor, dtype: torch.dtype) -> Row:
        """One case: the largest share of the bound that was used, and what the bound leaves open."""
        truth, bound = truth.detach().double().cpu(), bound.detach().double().cpu()
        blind = bool(truth.any()) and bool((truth.abs() <= bound).all())
        column = sum(used > edge for edge in EDGES)
        return cls(1, truth.numel(), int(without_bound(bound, dtype).sum()), blind, used, Counter([column]))

    def merge(self, other: Row) -> None:
        """All that another row has seen."""
        self.cases += other.cases
        self.elements += other.elements
        self.unbounded += other.unbounded
        self.blind += other.blind
        self.largest = max(self.largest, other.largest)
        self.bins.update(other.bins)


class Ledger:
    """Collects the shares of every check in a process; `text` prints them, `save` lets processes be added up."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str, str], Row] = defaultdict(Row)

    def note(self, operation: str, backend: str, dtype: torch.dtype, result: str, row: Row) -> None:
        """One result of one case that was checked."""
        self.rows[operation, backend, str(dtype).removeprefix("torch."), result].merge(row)

    def save(self, path: Path) -> None:
        """Everything noted, as JSON."""
        rows = [{"key": key, **vars(row)} for key, row in sorted(self.rows.items())]
        path.write_text(json.dumps(rows, indent=0) + "\n")

    def load(self, path: Path) -> None:
        """Adds what another process has saved."""
        for saved in json.loads(path.read_text()):
            key = tuple(saved.pop("key"))
            bins = Counter({int(number): count for number, count in saved.pop("bins").items()})
            self.rows[key].merge(Row(**saved, bins=bins))

    def text(self, by_result: bool = True) -> str:
        """A table: for each operation, backend, type and result how often the worst element used how much."""
        merged: dict[tuple[str, ...], Row] = defaultdict(Row)
        for key, row in self.rows.items():
            merged[key if by_result else (*key[:3], "all")].merge(row)
        heads = ["0", *(f"<{edge:.3g}" for edge in EDGES[1:])]
        names = f"{'operation':22}{'backend':10}{'type':9}{'result':18}{'checked':>9}{'elements':>11}"
        names += f"{'unbound':>9}{'blind':>7}{'largest':>9}  "
        lines = [names + " ".join(f"{head:>6}" for head in heads)]
        for (operation, backend, dtype, result), row in sorted(merged.items()):
            cells = [f"{row.bins.get(number, 0) / row.cases:6.0%}" for number in range(len(EDGES))]
            lines.append(
                f"{operation:22}{backend:10}{dtype:9}{result:18}{row.cases:>9}{row.elements:>11}"
                f"{row.unbounded:>9}{row.blind:>7}{row.largest:>9.1%}  "
                + " ".join(cell.replace("    0%", "     ·") for cell in cells)
            )
        return "\n".join(lines)

    def left_open(self) -> dict[tuple[str, str], Row]:
        """By operation and result, what the bounds have left open; only where they have."""
        merged: dict[tuple[str, str], Row] = defaultdict(Row)
        for (operation, _, _, result), row in sorted(self.rows.items()):
            merged[operation, result].merge(row)
        return {key: row for key, row in merged.items() if row.unbounded or row.blind}


LEDGER = Ledger()  # of this process
