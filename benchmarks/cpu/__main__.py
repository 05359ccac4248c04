"""Measures this machine's CPU: lora bench [--rows step,linear] [--rounds N] [--dry-run] [--output DIR]

    step       training steps beside PEFT's          memory     bytes above the loaded model
    linear     one adapted layer                     nf4        decoding, beside bitsandbytes
    generate   merged, and an adapter a row          inject     beside PEFT's
    growth     with tokens and loaded adapters

Rows go into DIR/cpu.csv as soon as they are known; those of earlier runs stay, except of what is measured again. The page,
DIR/README.md, and its plots are made from that file. The status is 1 where outputs disagreed or something failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from csv import DictWriter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lora
from benchmarks.card.goals import Rows
from benchmarks.card.rows import NAMES, Recorder, Row, as_text, latest, read_rows
from benchmarks.card.timing import attempt
from benchmarks.cpu import environment, generate, growth, inject, linear, memory, nf4, plots, report, step
from benchmarks.cpu.session import Session
from lora.errors import LoRAError, did_you_mean

PARTS: dict[str, Callable[[Session], None]] = {
    "step": step.run, "memory": memory.run, "linear": linear.run, "nf4": nf4.run, "generate": generate.run,
    "inject": inject.run, "growth": growth.run,
}  # fmt: skip
ROOT = Path(__file__).parents[2]
OUTPUT, DRY_OUTPUT = ROOT / "docs" / "benchmarks", ROOT / "out" / "bench"
CSV, RUNS, PAGE = "cpu.csv", "cpu.json", "README.md"
ROUNDS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="of these, with commas: " + ", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, seconds")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(arguments)
    return bench(given.rows, given.rounds, given.dry_run, given.output)


def bench(rows: str | None = None, rounds: int = ROUNDS, dry: bool = False, output: Path | None = None) -> int:
    """Runs the subjects named and makes the page; returns the exit status."""
    names = chosen(rows)
    if rounds < 1:
        raise LoRAError(f"--rounds is {rounds}, expected an integer >= 1.")
    directory = output or (DRY_OUTPUT if dry else OUTPUT)
    directory.mkdir(parents=True, exist_ok=True)
    runs = forget(directory, names)
    runs.append(environment.describe(rounds, dry, names))
    recorder = Recorder(directory, CSV)
    session = Session(recorder, rounds, dry)
    with lora.use_backend("fast"):
        for name in names:
            reason = attempt(partial(PARTS[name], session))
            if isinstance(reason, str):
                recorder.add(Row(name, name, "ours", note=reason))
    recorder.close()
    runs[-1]["load_after"] = environment.load()
    (directory / RUNS).write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    found = Rows(latest(recorder.rows))
    report.write(found, runs, plots.draw_all(found, directory), directory / PAGE)
    print(f"{directory / PAGE}: {recorder.failures} wrong or failed")
    return int(recorder.failures > 0)


def chosen(rows: str | None) -> list[str]:
    """The subjects, in their own order."""
    wanted = rows.split(",") if rows else list(PARTS)
    for name in wanted:
        if name not in PARTS:
            raise LoRAError(f"--rows names {name!r}, expected {', '.join(PARTS)}.{did_you_mean(name, PARTS)}")
    return [name for name in PARTS if name in wanted]


def forget(directory: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Takes out the rows that will be measured again; returns the earlier runs that still have some."""
    path = directory / CSV
    if path.exists():
        kept = [row for row in read_rows(path) if row.part not in names]
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = DictWriter(file, NAMES)
            writer.writeheader()
            writer.writerows({name: as_text(value) for name, value in asdict(row).items()} for row in kept)
    if not (directory / RUNS).exists():
        return []
    runs = json.loads((directory / RUNS).read_text(encoding="utf-8"))
    for run in runs:
        run["parts"] = [part for part in run["parts"] if part not in names]
    return [run for run in runs if run["parts"]]


if __name__ == "__main__":
    sys.exit(main())
