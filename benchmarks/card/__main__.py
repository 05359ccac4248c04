"""Measures one GPU: python -m benchmarks.card --out DIR [--parts check ceilings ops steps profile real context] [--seconds 550]

    check      every operation's outputs and gradients against float64
    ceilings   copy bandwidth, bf16 products
    ops        every operation, forward and backward, beside its floor, torch, PEFT and Liger
    steps      training steps of an 8B model with random weights, beside PEFT's
    profile    where the time of such a step goes, and its products and its attention alone
    real       a real small model trained by both backends, loss by loss
    context    the longest sequence that trains in NF4 with offloading

Rows are on disk as soon as they are known: a call that is killed leaves what it had. Calls into one DIR add up, and
`python -m benchmarks.card.report DIR` makes the page. --dry-run runs everything at tiny shapes on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.card import ceilings, context, environment, ops, profile, real, steps
from benchmarks.card.cases import LLAMA_8B, TINY, Session
from benchmarks.card.rows import Recorder, Row
from benchmarks.card.timing import attempt

PARTS: dict[str, Callable[[Session], None]] = {
    "check": ops.check, "ceilings": ceilings.run, "ops": ops.run, "steps": steps.run,
    "profile": profile.run, "real": real.run, "context": context.run,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts in their order; the exit status is 1 where anything was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="the directory that rows.csv and environment.json go to"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=550, help="after these, what is left is not run, and says so")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--compile", action="store_true", help="steps: time torch.compile of each layer too")
    parser.add_argument("--lengths", nargs="+", type=int, default=(), help="context: whole steps of these, no search")
    parser.add_argument("--only", default="", help="ops: those with this in their name")
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no GPU: --dry-run runs the same code at tiny shapes on the CPU.")
    torch.manual_seed(0)
    device = torch.device("cpu" if given.dry_run else "cuda")
    environment.write(given.out, environment.describe(device))
    recorder = Recorder(given.out)
    before = recorder.failures
    session = Session(
        device, recorder, TINY if given.dry_run else LLAMA_8B, time.monotonic() + given.seconds, given.dry_run,
        compile=given.compile, lengths=tuple(given.lengths), only=given.only,
    )  # fmt: skip
    for name in [part for part in PARTS if part in given.parts]:
        start = time.monotonic()
        reason = attempt(partial(PARTS[name], session))
        if isinstance(reason, str):
            recorder.add(Row(name, "the whole part", "all", note=reason))
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    recorder.close()
    return int(recorder.failures > before)


if __name__ == "__main__":
    sys.exit(main())
