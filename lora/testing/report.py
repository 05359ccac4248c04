"""How an error is reported, and how much of its bound was used: a failure says where, a success says how close."""

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
    largest: float = 0.0
    bins: Counter[int] = field(default_factory=Counter)  # of the worst element of each case

    def add(self, used: float, elements: int) -> None:
        self.cases += 1
        self.elements += elements
        self.largest = max(self.largest, used)
        self.bins[sum(used > edge for edge in EDGES)] += 1


class Ledger:
    """Collects the shares of every check in a process; `text` prints them, `save` lets processes be added up."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str, str], Row] = defaultdict(Row)

    def note(self, operation: str, backend: str, dtype: torch.dtype, result: str, used: float, elements: int) -> None:
        """One result of one case that was checked."""
        key = (operation, backend, str(dtype).removeprefix("torch."), result)
        self.rows[key].add(used, elements)

    def save(self, path: Path) -> None:
        """Everything noted, as JSON."""
        rows = [
            {"key": key, "cases": r.cases, "elements": r.elements, "largest": r.largest, "bins": dict(r.bins)}
            for key, r in sorted(self.rows.items())
        ]
        path.write_text(json.dumps(rows, indent=0) + "\n")

    def load(self, path: Path) -> None:
        """Adds what another process has saved."""
        for saved in json.loads(path.read_text()):
            row = self.rows[tuple(saved["key"])]
            row.cases += saved["cases"]
            row.elements += saved["elements"]
            row.largest = max(row.largest, saved["largest"])
            row.bins.update({int(number): count for number, count in saved["bins"].items()})

    def text(self, by_result: bool = True) -> str:
        """A table: for each operation, backend, type and result how often the worst element used how much."""
        merged: dict[tuple[str, ...], Row] = defaultdict(Row)
        for key, row in self.rows.items():
            into = merged[key if by_result else (*key[:3], "all")]
            into.cases += row.cases
            into.elements += row.elements
            into.largest = max(into.largest, row.largest)
            into.bins.update(row.bins)
        heads = ["0", *(f"<{edge:.3g}" for edge in EDGES[1:])]
        lines = [" ".join([f"{'operation':22}{'backend':10}{'type':9}{'result':18}{'checked':>9}{'elements':>11}"
                           f"{'largest':>9} "] + [f"{head:>6}" for head in heads])]  # fmt: skip
        for (operation, backend, dtype, result), row in sorted(merged.items()):
            cells = [f"{row.bins.get(number, 0) / row.cases:6.0%}" for number in range(len(EDGES))]
            lines.append(
                f"{operation:22}{backend:10}{dtype:9}{result:18}{row.cases:>9}{row.elements:>11}{row.largest:>9.1%}  "
                + " ".join(cell.replace("    0%", "     ·") for cell in cells)
            )
        return "\n".join(lines)


LEDGER = Ledger()  # of this process
