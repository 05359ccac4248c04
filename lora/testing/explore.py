"""`make explore`: the proofs again and again with fresh randomness, for as long as one likes, and a report of it.

    python -m lora.testing.explore --minutes 30 [--factor 4] [--write docs]

Each round is a process of its own, in turn: plain torch (on a GPU: the compiled kernels) and Triton's interpreter.
Hypothesis draws from a new seed each round and reads no database, so that no round repeats another. A failure ends the
run, with the case that failed as Hypothesis shrank it. Under `--write` the figures go to `proof-figures.json` and, as
tables, into `proof.md` between its two markers.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora.testing.report import EDGES, Ledger

MARKERS = ("<!-- figures: written by `make explore` -->", "<!-- end of figures -->")
ROOT = Path(__file__).parents[2]


@dataclass
class Exploration:
    """What the rounds have found so far."""

    ledger: Ledger = field(default_factory=Ledger)
    cases: Counter[str] = field(default_factory=Counter)  # Hypothesis examples, by test file
    rounds: Counter[str] = field(default_factory=Counter)  # by way of running
    seconds: float = 0.0
    failure: str = ""

    def round(self, way: str, factor: float) -> None:
        """One run of tests/proof: "plain" or "interpreted"."""
        started, seed = time.monotonic(), secrets.randbelow(2**32)
        with tempfile.TemporaryDirectory() as directory:
            environment = os.environ | {
                "HYPOTHESIS_PROFILE": "explore",
                "LORA_PROOF_FACTOR": str(factor),
                "LORA_PROOF_LEDGER": directory,
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            }
            environment |= {"TRITON_INTERPRET": "1"} if way == "interpreted" else {}
            command = [sys.executable, "-m", "pytest", "--maxfail=5", "-q", "tests/proof", f"--hypothesis-seed={seed}"]
            done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
            for path in Path(directory).glob("*.json"):
                self.ledger.load(path)
            for path in Path(directory).glob("*.cases"):
                self.cases.update(json.loads(path.read_text()))
        self.rounds[way] += 1
        self.seconds += time.monotonic() - started
        if done.returncode:
            self.failure = f"seed {seed}, {way}:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"

    def tables(self) -> str:
        """The report in Markdown."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        rounds = ", ".join(f"{count} {way}" for way, count in sorted(self.rounds.items()))
        checks = sum(row.cases for row in self.ledger.rows.values())
        elements = sum(row.elements for row in self.ledger.rows.values())
        lines = [
            f"{sum(self.cases.values()):,} cases in {self.seconds / 60:.0f} minutes ({rounds} rounds; {device}, torch "
            f"{torch.__version__}): {'a failure' if self.failure else 'no failure'}. {checks:,} results, "
            f"{elements:,} numbers, were compared with their bounds.",
            "",
            "| proofs of | cases |",
            "|---|---|",
            *(f"| {name} | {count:,} |" for name, count in sorted(self.cases.items())),
            "",
            f"How much of its bound the worst element of a result used: the share of results in each column, and the "
            f"largest ({int(EDGES[1] * 1e6)} ppm is 0.01%; a dot is under half a percent).",
            "",
            "```text",
            self.ledger.text(by_result=False),
            "```",
            "",
            *self.left_open(),
        ]
        return "\n".join(lines)

    def left_open(self) -> list[str]:
        """What no bound has said anything about, by operation and result."""
        rows = self.ledger.left_open()
        unbounded, blind = (sum(getattr(row, name) for row in rows.values()) for name in ("unbounded", "blind"))
        lines = [
            f"**Compared with nothing**: {unbounded:,} numbers, with a bound that is infinite or beyond their "
            f"type's. **Blind**: {blind:,} results that are not zero, but so small beside their bounds (next to the "
            "smallest number of the type, or nothing but rounding by definition) that zeros would have passed.",
        ]
        if not rows:
            return lines
        lines += [
            "",
            "| operation | result | numbers | compared with nothing | results | blind |",
            "|---|---|---|---|---|---|",
        ]
        for (operation, result), row in rows.items():
            lines.append(
                f"| `{operation}` | {result} | {row.elements:,} | {row.unbounded:,} | {row.cases:,} | {row.blind:,} |"
            )
        return lines


def explore(minutes: float, factor: float) -> Exploration:
    """Rounds until the time is up, at least one of each way; or until something fails."""
    found, ways, until = Exploration(), ("plain", "interpreted"), time.monotonic() + 60 * minutes
    for number in range(10**9):
        if number >= len(ways) and time.monotonic() > until:
            break
        found.round(ways[number % len(ways)], factor)
        print(f"round {number + 1}: {sum(found.cases.values())} cases in {found.seconds:.0f} s", flush=True)
        if found.failure:
            break
    return found


def write(found: Exploration, directory: Path) -> None:
    """The figures as JSON, and in the page between its markers."""
    found.ledger.save(directory / "proof-figures.json")
    page = directory / "proof.md"
    before, rest = page.read_text().split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    page.write_text(f"{before}{MARKERS[0]}\n\n{found.tables()}\n\n{MARKERS[1]}{after}")


def main() -> int:
    """The command line; 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m lora.testing.explore", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--factor", type=float, default=4, help="examples a round, over those of `make test`")
    parser.add_argument("--write", type=Path, help="the directory of proof.md, to write the figures there")
    arguments = parser.parse_args()
    found = explore(arguments.minutes, arguments.factor)
    print(found.tables())
    if found.failure:
        print(found.failure, file=sys.stderr)
    elif arguments.write:
        write(found, arguments.write)
    return 1 if found.failure else 0


if __name__ == "__main__":
    sys.exit(main())
