"""The table that everything measured goes into: one CSV line a figure, on disk as soon as it is known."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

CSV_NAME, ENVIRONMENT_NAME = "rows.csv", "environment.json"
NOT_RUN, NOT_THERE, OUT_OF_MEMORY, FAILED, WRONG = "not run", "not there", "out of memory", "failed", "wrong"


@dataclass(frozen=True)
class Row:
    """One figure. An empty number was not measured; then `note` begins with one of the words above."""

    part: str  # check, ceilings, ops, steps, context
    name: str
    variant: str  # ours, floor, frozen, torch, peft, liger, ...
    tokens: int = 0
    shape: str = ""
    dtype: str = ""
    median_s: float | None = None
    low_s: float | None = None  # the fastest and the slowest repetition
    high_s: float | None = None
    bytes: int | None = None  # the least that must be read and written
    flops: int | None = None
    peak_bytes: int | None = None  # allocated at most, above base_bytes
    base_bytes: int | None = None  # allocated before: the inputs, or the model
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """What names a figure: a later row with the same key replaces an earlier one."""
        return self.part, self.name, self.variant, self.tokens, self.shape


NAMES = tuple(field.name for field in fields(Row))
INTEGERS = {"tokens", "bytes", "flops", "peak_bytes", "base_bytes"}
SECONDS = {"median_s", "low_s", "high_s"}


class Recorder:
    """Appends rows to a file and keeps them; what the file held before is kept too."""

    def __init__(self, directory: Path, name: str = CSV_NAME) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / name
        self.rows = read_rows(self.path) if self.path.exists() else []
        self.failures = 0
        self._file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115 - open until close()
        self._writer = csv.DictWriter(self._file, NAMES)
        if not self.rows and self.path.stat().st_size == 0:
            self._writer.writeheader()

    def add(self, row: Row) -> None:
        """Writes the row, and shows it."""
        self.rows.append(row)
        self.failures += row.note.startswith((FAILED, WRONG))
        self._writer.writerow({name: as_text(value) for name, value in asdict(row).items()})
        self._file.flush()
        os.fsync(self._file.fileno())
        shown = "-" if row.median_s is None else f"{1e3 * row.median_s:.3f} ms"
        tokens = f" {row.tokens}" if row.tokens else ""
        print(f"{row.part:8} {row.name} {row.shape}{tokens} [{row.variant}] {shown} {row.note}", flush=True)

    def close(self) -> None:
        self._file.close()


def as_text(value: object) -> str:
    """A CSV cell; seconds keep nanoseconds."""
    if value is None:
        return ""
    return f"{value:.9f}" if isinstance(value, float) else str(value)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, in its order."""
    with open(path, newline="", encoding="utf-8") as file:
        return [Row(**{name: from_text(name, cell) for name, cell in line.items()}) for line in csv.DictReader(file)]  # type: ignore[arg-type]


def from_text(name: str, cell: str) -> str | int | float | None:
    """The inverse of `as_text`."""
    if name in INTEGERS:
        return int(cell) if cell else None
    if name in SECONDS:
        return float(cell) if cell else None
    return cell


def latest(rows: Iterable[Row]) -> list[Row]:
    """Each figure once: the last row of every key, in the order in which the keys first came."""
    return list({row.key: row for row in rows}.values())
