"""The figures of docs/training/crash_safety.md.

    python tests/faults/page.py --write docs/training/crash_safety.md     the crash points, counted and cut off at
    python tests/faults/kills.py --kills 100 --write ...                   the kills (kills.py)

Each writes the part of the page between its two comments, and nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from faults.kills import Report

DRAWS = 8  # mixed power losses at each operation; `make test` draws one


def replace(page: Path, name: str, lines: list[str]) -> None:
    """Puts lines between `<!-- NAME: ... -->` and `<!-- end of NAME -->`."""
    parts = re.split(rf"(<!-- {name}:.*?-->\n)(?:.*?)(<!-- end of {name} -->)", page.read_text(), flags=re.DOTALL)
    if len(parts) != 4:
        raise SystemExit(f"{page} has no place for {name}")
    page.write_text("".join([*parts[:2], "\n", *(f"{line}\n" for line in lines), "\n", *parts[2:]]))


def machine() -> str:
    """When and on what: date, processor kind, versions."""
    import torch

    today = datetime.datetime.now(datetime.UTC).date()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{today}, {platform.machine()}, {os.cpu_count()} cores, {versions}"


def write_kills(page: Path, report: Report, seed: int, fresh: bool) -> None:
    """What a run of kills.py found."""
    how = "each attempt a new interpreter" if fresh else "each attempt a fork of one that had imported its packages"
    lines = [
        f"{machine()}; seed {seed}; {how}; {report.seconds / 60:.0f} minutes.",
        "",
        f"- {report.kills} kills in {report.attempts} attempts; {report.completed} runs reached their end",
        f"- files and numbers that differ from an uninterrupted run: {len(report.different)}",
        f"- torn checkpoints found: {report.torn}",
        "",
        "| the process was killed | times |",
        "|---|---:|",
        *(f"| {where} | {count} |" for where, count in report.landed.most_common()),
    ]
    replace(page, "kills", lines + [f"- {line}" for line in report.different])


def main(arguments: list[str] | None = None) -> int:
    """Cuts every scenario off at every operation, and writes how many there were."""
    from faults.scenarios import SCENARIOS, cut_off, cut_off_in_recovery, record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, required=True, help="the page whose figures are to be replaced")
    options = parser.parse_args(arguments)
    kinds: Counter[str] = Counter()
    rows, total, inner = [], [0, 0, 0, 0], 0
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        for number, (name, scenario) in enumerate(SCENARIOS.items()):
            recorded = record(scenario, Path(directory) / str(number))
            counted = cut_off(name, recorded, Path(directory) / "place", DRAWS)
            inner += cut_off_in_recovery(name, recorded, Path(directory) / "inner")
            kinds += Counter(operation.kind for operation in recorded.trace.operations)
            numbers = [
                len(recorded.trace.operations),
                *(counted[h] for h in ("killed", "killed in a write", "power lost")),
            ]
            total = [a + b for a, b in zip(total, numbers, strict=True)]
            rows.append(f"| {name} | " + " | ".join(f"{n:,}" for n in numbers) + " |")
            print(rows[-1], flush=True)
    lines = [f"{machine()}.", ""]
    lines += [
        "| scenario | crash points | killed | killed in a write | power lost |",
        "|---|---:|---:|---:|---:|",
        *rows,
    ]
    lines += ["| all | " + " | ".join(f"**{n:,}**" for n in total) + " |", ""]
    lines += [
        f"By operation: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}. Within the recoveries"
    ]
    lines += [
        f"that followed, {inner:,} operations more were cut off, and recovered from. States that lost something: 0."
    ]
    replace(options.write, "points", lines)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests/: faults
    sys.exit(main())
