"""`lora train`, killed at random and resumed until it ends, again and again: is the end the same in every bit?

    python tests/faults/kills.py --kills 100 --write docs/training/crash_safety.md

Each attempt is a process that runs the command line and gets SIGKILL after a random time. A run that reaches its end
is compared with one that nothing interrupted, and the next one begins in an empty directory, until all kills are
spent; the last run is left to end. `--fresh` starts a new interpreter for each attempt; without it, each is a fork of
one that has imported everything, which takes a second instead of ten.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEPS = 40  # three an epoch: the last one is in the middle of the fourteenth
SETTINGS: dict[str, Any] = {"lr": 1e-2, "r": 4, "batch_size": 4, "grad_accumulation": 2}
SETTINGS |= {"eval_fraction": 0.1, "samples": 1, "sample_tokens": 4, "tensorboard": False, "lora_dropout": 0.2}
SETTINGS |= {"save_every": 1, "eval_every": 3, "scheduler": "cosine", "seed": 3}
BACKENDS = ("reference", "fast")
TIMES = ("seconds", "tokens_per_second", "peak_memory", "output", "adapter")  # of a result: not the run's doing


def exact(output: Path) -> dict[str, Any]:
    """All that a run leaves, but for times: every file of its last checkpoint, its results, its metrics."""
    from lora.train import checkpoint
    from lora.train.progress import read_metrics

    last = checkpoint.checkpoints(output)[0]
    found: dict[str, Any] = {
        f"{last.name}/{p.relative_to(last)}": p.read_bytes() for p in last.rglob("*") if p.is_file()
    }
    found |= {f"adapter/{p.name}": p.read_bytes() for p in (output / "adapter").iterdir()}
    found |= {name: (output / name).read_bytes() for name in ("samples.md", "samples.json", "loss.png")}
    result = json.loads((output / "result.json").read_text())
    found |= {f"result.json: {name}": value for name, value in result.items() if name not in TIMES}
    records = read_metrics(output / "metrics.jsonl")
    return found | {"metrics": [{k: v for k, v in record.items() if k != "seconds"} for record in records]}


@dataclass
class Report:
    """What came of it."""

    kills: int = 0
    attempts: int = 0
    completed: int = 0
    landed: Counter[str] = field(default_factory=Counter)
    torn: int = 0  # checkpoints that were passed over
    different: list[str] = field(default_factory=list)
    seconds: float = 0.0


def kill_and_resume(
    root: Path, kills: int, seed: int, fresh: bool, steps: int = STEPS, say: Callable[[str], None] = lambda line: None
) -> Report:
    """See the top of this file."""
    started, rng, report = time.monotonic(), random.Random(seed), Report()
    words, expected, longest = {}, {}, {}
    for backend in BACKENDS:
        words[backend] = command_line(root, backend, steps)
        output, begun = root / f"straight-{backend}", time.monotonic()
        whole = Attempt(output)
        assert attempt(words[backend](output), root, fresh, whole)
        now = time.monotonic()
        longest[backend] = (now - begun, whole.done_at - whole.ready_at)
        expected[backend] = exact(output)
        say(f"{backend}, without interruption: {now - begun:.1f} s, {longest[backend][1]:.1f} s of them training")
    run = 0
    while report.kills < kills:
        backend, output = BACKENDS[run % 2], root / f"run-{run}"
        run += 1
        ended = False
        while not ended:
            spent = report.kills >= kills
            late = rng.random() > 0.1
            seconds = float("inf") if spent else rng.uniform(0, longest[backend][late])
            begun, anew, plan = time.monotonic(), not output.exists(), Attempt(output, late, seconds)
            ended = attempt(words[backend](output), root, fresh, plan)
            now = time.monotonic()
            if ended and anew:  # the machine has become faster: kills are to come earlier
                longest[backend] = min(longest[backend], (now - begun, plan.done_at - plan.ready_at))
            report.attempts += 1
            if not ended:
                report.kills += 1
                report.landed[landed(output)] += 1
                report.torn += torn(output)
                say(f"kill {report.kills} of {kills}: {landed(output)}")
        report.completed += 1
        found = exact(output)
        names = sorted(found.keys() | expected[backend].keys())
        different = [name for name in names if found.get(name) != expected[backend].get(name)]
        report.different += [f"{output.name} ({backend}): {name}" for name in different]
        say(f"{output.name} ended: {len(different)} of {len(names)} files and numbers differ")
    report.seconds = time.monotonic() - started
    return report


@dataclass
class Attempt:
    """When an attempt is to be killed: so long after its start, or `late`, after it is ready to train."""

    output: Path
    late: bool = True
    seconds: float = float("inf")
    ready_at: float = float("inf")
    done_at: float = float("inf")  # its last result was there; what follows is the interpreter's end


def command_line(root: Path, backend: str, steps: int) -> Callable[[Path], list[str]]:
    """`lora train --resume` into a directory."""
    import yaml
    from tiny_text import rows, save_tiny_model, write_jsonl

    from lora.train.quiet import quiet

    if not (root / "data.jsonl").exists():
        with quiet():
            save_tiny_model(root / "model")
        write_jsonl(root / "data.jsonl", rows(24))
    config = root / f"{backend}.yaml"
    values = {
        **SETTINGS,
        "max_steps": steps,
        "backend": backend,
        "model": str(root / "model"),
        "data": str(root / "data.jsonl"),
    }
    config.write_text(yaml.safe_dump(values))
    return lambda output: ["train", "--config", str(config), "--output", str(output), "--resume"]


def attempt(words: list[str], root: Path, fresh: bool, plan: Attempt) -> bool:
    """One process; whether it ended by itself, which it must do with exit code 0."""
    log = root / "log.txt"
    ready, before = plan.output / "run.yaml", changed_at(plan.output / "run.yaml")
    process, begun = begin(words, log, fresh), time.monotonic()
    while (code := process()) is None:
        now = time.monotonic()
        if plan.ready_at > now and changed_at(ready) != before:
            plan.ready_at = now
        if plan.done_at > now and (plan.output / "result.json").exists():
            plan.done_at = now
        if now >= plan.seconds + (plan.ready_at if plan.late else begun):
            process(signal.SIGKILL)
            return False
        time.sleep(0.001)
    plan.done_at = min(plan.done_at, time.monotonic())
    assert code == 0, log.read_text()
    return True


def changed_at(path: Path) -> int:
    """When a file was last written, in nanoseconds; 0 where it is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


def begin(words: list[str], log: Path, fresh: bool) -> Callable[..., int | None]:
    """Starts an attempt; the result tells its exit code, None while it runs, and takes a signal to send."""
    if fresh:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with open(log, "w") as out:
            process = subprocess.Popen([sys.executable, "-m", "lora", *words], stdout=out, stderr=out, env=environment)
        pid, ended = process.pid, process.poll
    else:
        pid = fork(words, log)
        ended = lambda: _exit_code(os.waitpid(pid, os.WNOHANG))  # noqa: E731

    def ask(kill: int | None = None) -> int | None:
        if kill is None:
            return ended()
        os.kill(pid, kill)
        while (code := ended()) is None:
            time.sleep(0.001)
        return code

    return ask


def _exit_code(waited: tuple[int, int]) -> int | None:
    return os.waitstatus_to_exitcode(waited[1]) if waited[0] else None


def fork(words: list[str], log: Path) -> int:
    """A child of this process that runs the command line; what it needs is imported already."""
    import lora.train.job
    import lora.train.progress
    import lora.train.trainer  # noqa: F401
    from lora.cli import main

    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(300)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            code = main(words)
            sys.stdout.flush()
        finally:
            os._exit(code)
    return pid


def landed(output: Path) -> str:
    """What a killed run was doing."""
    names = {p.name for p in output.iterdir()} if output.is_dir() else set()
    if ".lock" not in names:
        return "when its work was done" if "result.json" in names else "before it wrote anything"
    if any(name.startswith(".unfinished-checkpoint") for name in names):
        return "while a checkpoint was written"
    if any(name.startswith((".removed-", ".aside-")) for name in names):
        return "while an old checkpoint was removed or replaced"
    if "result.json" in names:
        return "after its last result was written"
    if names & {"adapter", "samples.md", "loss.png", ".unfinished-adapter"}:
        return "while the results were measured and written"
    if any(name.startswith(".unfinished-") for name in names):
        return "while run.yaml or metrics.jsonl was written"
    return (
        "in training, between two checkpoints"
        if any(n.startswith("checkpoint-") for n in names)
        else "before the first checkpoint"
    )


def torn(output: Path) -> int:
    """Checkpoints that are not whole; there must be none."""
    from lora.train import checkpoint

    return (
        sum(checkpoint.why_torn(path) is not None for path in checkpoint.checkpoints(output)) if output.is_dir() else 0
    )


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="a new interpreter for each attempt")
    parser.add_argument("--write", type=Path, help="the page whose figures are to be replaced")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        report = kill_and_resume(
            Path(directory), options.kills, options.seed, options.fresh, say=lambda line: print(line, flush=True)
        )
    print(report)
    if options.write is not None:
        from faults.page import write_kills

        write_kills(options.write, report, options.seed, options.fresh)
    return 1 if report.different or report.torn else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(ROOT))  # tests/: tiny_text, faults
    sys.exit(main())
