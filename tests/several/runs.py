"""Whole runs of `lora train` on one, two and four processes: trained, stopped, resumed and broken.

    python tests/several/runs.py DIRECTORY    runs every scenario in DIRECTORY, and writes ends.json there

Each scenario's output is DIRECTORY/<name>; ends.json says how its processes ended and what they said.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from several.processes import PATIENCE, Processes, lora_train
from tiny_text import rows, save_tiny_model, write_jsonl

import lora.train.job
import lora.train.trainer
from lora.cli import main
from lora.errors import LoRAError
from lora.train.quiet import quiet

BASE = "lora.train.checkpoint.base_fingerprint"
EXAMPLES, STEPS = 40, 8  # 32 to train on and 8 held out: 11 and 3 batches of 3, which nobody shares evenly
WORDS = "--r 4 --lora-dropout 0.1 --batch-size 3 --epochs 3 --max-steps 8 --lr 1e-2 --samples 1 --sample-tokens 4"
WORDS += " --eval-fraction 0.2 --max-grad-norm 0.5 --keep-checkpoints 9 --save-every 3 --no-tensorboard --backend auto"


class Runs:
    """Scenarios in a directory, and how they ended."""

    def __init__(self, root: Path) -> None:
        self.root, self.ends = root, {}
        with quiet():
            save_tiny_model(root / "model")
        write_jsonl(root / "data.jsonl", rows(EXAMPLES))

    def words(self, name: str, accumulation: int, *more: str) -> list[str]:
        fixed = {"--model": "model", "--data": "data.jsonl", "--output": name}
        named = [word for flag, path in fixed.items() for word in (flag, str(self.root / path))]
        return [*named, *WORDS.split(), "--grad-accumulation", str(accumulation), *more]

    def train(self, name: str, count: int, accumulation: int, *more: str) -> None:
        """A run on `count` processes."""
        self.note(name, lora_train(count, *self.words(name, accumulation, *more)))

    def note(self, name: str, processes: Processes) -> None:
        self.ends[name] = [[end.code, end.said] for end in processes.ended()]

    def resume(self, name: str, source: str, step: int, count: int, accumulation: int, *more: str) -> None:
        """The rest of `source` after `step`, by other processes, in a directory of its own."""
        output = shutil.copytree(self.root / source, self.root / name)
        for path in output.glob("checkpoint-*"):
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
        (output / "result.json").unlink(missing_ok=True)
        self.train(name, count, accumulation, "--resume", *more)

    def broken(self, name: str, break_in: Callable[[int], Any], *more: str) -> None:
        """A run on two processes, each in the context that `break_in` gives it."""
        words = ["train", *self.words(name, 2, *more)]

        def work(rank: int) -> int:
            with break_in(rank):
                return main(words)

        self.note(name, Processes(2, work))

    def stopped(self, name: str, *ranks: int) -> None:
        """A run on two processes of which some get SIGTERM in the middle of training."""
        processes = lora_train(2, *self.words(name, 2))
        while not (self.root / name / "checkpoint-3").exists():
            time.sleep(0.02)
        processes.send(signal.SIGTERM, *ranks)
        self.note(name, processes)


def at_step(step: int, action: Callable[[], Any]) -> Any:
    """AdapterTrainer.training_step doing something else at one step."""
    proper = lora.train.trainer.AdapterTrainer.training_step

    def training_step(self: Any, *args: Any) -> Any:
        if self.state.global_step == step:
            action()
        return proper(self, *args)

    return mock.patch.object(lora.train.trainer.AdapterTrainer, "training_step", training_step)


def on_fire() -> None:
    raise LoRAError("the machine is on fire.")


def by_torchrun(runs: Runs, name: str) -> None:
    """Two processes by torchrun itself, each of which starts Python anew: the only run here that is not forked."""
    torchrun = Path(sysconfig.get_path("scripts")) / "torchrun"
    words = [torchrun, "--standalone", "--nproc-per-node", "2", "-m", "--", "lora", "train", *runs.words(name, 2)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=PATIENCE, check=False)
    assert done.stdout.count("processes 2, each with the whole model") == 1, done.stderr  # and one of them speaks
    runs.ends[name] = [[done.returncode, ""]] * 2


def run_all(runs: Runs) -> None:
    """Every scenario."""
    runs.train("one", 1, 4)
    by_torchrun(runs, "two")
    in_nf4 = ("--quantization", "nf4", "--checkpointing", "recompute", "--no-chat-template")
    runs.train("two sharded", 2, 2, "--sharding", "full", *in_nf4)
    runs.train("one in nf4", 1, 4, *in_nf4)
    runs.resume("two, then one", "two", 3, 1, 2)
    runs.resume("two, then four", "two", 3, 4, 1)
    runs.resume("one, then four sharded", "one", 3, 4, 1, "--sharding", "full")
    runs.resume("two, then two", "two", 3, 2, 2)
    runs.resume("two sharded, then two", "two sharded", 3, 2, 2, "--sharding", "full", *in_nf4)
    runs.resume("two sharded, then one", "two sharded", 3, 1, 2, *in_nf4)
    runs.train("two in nf4", 2, 2, *in_nf4)
    runs.broken("killed in nf4", lambda _: at_step(5, lambda: os.kill(os.getpid(), signal.SIGKILL)), *in_nf4)
    runs.resume("killed in nf4, then two", "killed in nf4", 99, 2, 2, *in_nf4)
    runs.resume("killed in nf4, then one", "killed in nf4", 99, 1, 2, *in_nf4)
    runs.resume("two, then three", "two", 3, 3, 2)
    runs.resume("two, then four of more", "two", 3, 4, 3)
    runs.stopped("terminated", 1)
    runs.resume("terminated, then one", "terminated", 99, 1, 2)
    runs.broken("one on fire", on_second(lambda: at_step(2, on_fire)))
    runs.broken("one killed", on_second(lambda: at_step(2, lambda: os.kill(os.getpid(), signal.SIGKILL))))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    runs.broken("disk full", lambda _: mock.patch("lora.train.checkpoint.write_random", side_effect=full))
    absent = LoRAError("no model here.")
    runs.broken("no model", on_second(lambda: mock.patch("lora.train.job.load_model", side_effect=absent)))
    runs.broken("other weights", lambda rank: mock.patch(BASE, return_value=str(rank)))
    runs.note("accelerate's FSDP", lora_train(2, *runs.words("refused", 2), ACCELERATE_USE_FSDP="true"))
    runs.note("a typo", lora_train(2, *runs.words("refused", 2, "--shard", "full")))


def on_second(context: Callable[[], Any]) -> Callable[[int], Any]:
    """A context for the second process; nothing for the first."""
    return lambda rank: context() if rank == 1 else nullcontext()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    made = Runs(place)
    run_all(made)
    (place / "ends.json").write_text(json.dumps(made.ends))
