"""What a run does to its output directory, as scenarios to cut off anywhere, and what must hold after each cut.

A scenario is a directory to begin with and a row of actions. Cut off within an action, recovery must find what was
complete before it or after it, byte for byte; cut off between two, the latter. `python tests/faults/scenarios.py`
counts the crash points and the states.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from faults.disk import State, Trace, contents, recording, states
from faults.tiny_run import tiny_result, tiny_trainer, train_step

from lora.adapter_io import gather_adapter
from lora.train import checkpoint, results
from lora.train.durable import recover, remove
from lora.train.job import is_ours
from lora.train.progress import Metrics, read_metrics

Action = Callable[[], None]
Contents = dict[str, bytes | None]
RESULTS = ("adapter", "samples.md", "samples.json", "loss.png", "result.json")


class Recorded(NamedTuple):
    """A scenario that was gone through: what it did, where each action ended, and what was good then."""

    trace: Trace
    ends: list[int]  # the first one is 0
    good: list[dict[str, Contents]]  # after each action: what there is, by name

    def around(self, operation: int) -> tuple[dict[str, Contents], dict[str, Contents]]:
        """What was good before and after the action that a crash falls into; twice the same between two."""
        if operation in self.ends:
            at = max(i for i, end in enumerate(self.ends) if end == operation)
            return self.good[at], self.good[at]
        at = next(i for i, end in enumerate(self.ends) if end > operation)
        return self.good[at - 1], self.good[at]


class Scenario(NamedTuple):
    """How it is set up in a directory, and what holds after recovery."""

    begin: Callable[[Path], list[Action]]
    found: Callable[[Path], dict[str, Contents]]  # what is whole in a directory
    check: Callable[[Path, dict[str, Contents], dict[str, Contents]], None]


def record(scenario: Scenario, output: Path) -> Recorded:
    """Goes through a scenario once."""
    output.mkdir()
    actions = scenario.begin(output)
    good, ends = [scenario.found(output)], [0]
    with recording(output) as trace:
        for action in actions:
            action()
            ends.append(len(trace.operations))
            good.append(scenario.found(output))
    return Recorded(trace, ends, good)


# ---- what must hold --------------------------------------------------------------------------------------------


def whole_checkpoints(output: Path) -> dict[str, Contents]:
    """The checkpoints that are whole, newest first."""
    return {p.name: contents(p) for p in checkpoint.checkpoints(output) if checkpoint.why_torn(p) is None}


def check_checkpoints(output: Path, before: dict[str, Contents], after: dict[str, Contents]) -> None:
    """The newest whole one is that of before or after, as it was written, and none is missing."""
    found = whole_checkpoints(output)
    newest = checkpoint.newest(output).path
    allowed = {next(iter(good), None) for good in (before, after)}
    assert (newest.name if newest else None) in allowed
    for name, held in found.items():
        assert held in (before.get(name), after.get(name)), f"{name} was never written like this"
    assert len(found) >= min(len(before), len(after))
    assert set(found) >= set(before) & set(after)


def results_in(output: Path) -> dict[str, Contents]:
    """The results that are there, by name."""
    there = [output / name for name in RESULTS if (output / name).exists()]
    return {p.name: contents(p) if p.is_dir() else {"": p.read_bytes()} for p in there}


def check_results(output: Path, before: dict[str, Contents], after: dict[str, Contents]) -> None:
    """Each result is the old one, the new one, or was and is not there; result.json comes last."""
    found = results_in(output)
    for name in RESULTS:
        assert found.get(name) in (before.get(name), after.get(name)), name


def metrics_in(output: Path) -> dict[str, Contents]:
    """The records of metrics.jsonl."""
    records = read_metrics(output / "metrics.jsonl")
    return {str(i): {json.dumps({k: v for k, v in r.items() if k != "seconds"}): None} for i, r in enumerate(records)}


def check_metrics(output: Path, before: dict[str, Contents], after: dict[str, Contents]) -> None:
    """No line that was there before is lost, and none is made up."""
    found = metrics_in(output)
    assert all(found[name] == after.get(name, before.get(name)) for name in found)
    assert set(found) >= set(before) & set(after)


# ---- the scenarios ---------------------------------------------------------------------------------------------


def saving(output: Path, steps: int, keep: int, trainer: Any = None) -> list[Action]:
    """Steps, each saved and rotated as the trainer does."""
    trainer = trainer or tiny_trainer()

    def step() -> None:
        train_step(trainer)
        checkpoint.rotate(output, keep, checkpoint.save(trainer, output))

    return [step] * steps


def done(actions: list[Action]) -> None:
    for action in actions:
        action()


def tear(path: Path) -> None:
    (path / checkpoint.PARAMETERS).write_bytes(b"torn")


def replacing_whole(output: Path) -> list[Action]:
    """A run that goes on from before a checkpoint which is there, and comes by it again."""
    done(saving(output, 2, keep=2))
    trainer = tiny_trainer(seed=1)
    trainer.state.global_step = 1
    return saving(output, 1, keep=2, trainer=trainer)


def replacing_torn(output: Path) -> list[Action]:
    done(saving(output, 2, keep=2))
    tear(output / "checkpoint-2")
    trainer = tiny_trainer(seed=1)
    trainer.state.global_step = 1
    return saving(output, 1, keep=2, trainer=trainer)


def beside_torn(output: Path) -> list[Action]:
    """The newest is torn, and only one is to be kept: the newest whole one."""
    trainer = tiny_trainer()
    done(saving(output, 2, keep=9, trainer=trainer))
    shutil.copytree(output / "checkpoint-2", output / "checkpoint-7")
    tear(output / "checkpoint-7")
    return saving(output, 2, keep=1, trainer=trainer)


def clearing(output: Path) -> list[Action]:
    """What --overwrite does."""
    done(saving(output, 2, keep=2))
    return [lambda path=path: remove(path) for path in checkpoint.checkpoints(output)]  # type: ignore[misc]


def finishing(output: Path, again: bool) -> list[Action]:
    """The results of a run; `again`: of one that had some."""

    def write(seed: int, note: str) -> list[Action]:
        model = tiny_trainer(seed).model
        result = tiny_result(output, note)
        records = [{"step": 1, "loss": 2.0 - seed}]
        return [
            lambda: results.write_adapter(gather_adapter(model), output),
            lambda: results.write_samples(result.samples, output),
            lambda: results.write_plot(records, note, output),
            lambda: results.write_result(result, output),
        ]

    if again:
        done(write(0, "old"))
    return write(1, "new")


def logging(output: Path) -> list[Action]:
    """metrics.jsonl of a run that is resumed at step 3: lines after it go, lines before it stay, new ones come."""
    earlier = Metrics(output / "metrics.jsonl")
    earlier.trainer = tiny_trainer()
    earlier.start(0)
    for step in range(1, 5):
        earlier.add(step, loss=float(step))
    earlier.flush()
    resumed = Metrics(output / "metrics.jsonl")
    resumed.trainer = earlier.trainer

    def lines() -> None:
        for step in range(4, 7):
            resumed.add(step, loss=float(-step))
        resumed.flush()

    return [lambda: resumed.start(3), lines]


SCENARIOS = {
    "saves and rotation": Scenario(lambda output: saving(output, 4, keep=2), whole_checkpoints, check_checkpoints),
    "a whole checkpoint is replaced": Scenario(replacing_whole, whole_checkpoints, check_checkpoints),
    "a torn checkpoint is replaced": Scenario(replacing_torn, whole_checkpoints, check_checkpoints),
    "rotation beside a torn one": Scenario(beside_torn, whole_checkpoints, check_checkpoints),
    "an earlier run is cleared": Scenario(clearing, whole_checkpoints, check_checkpoints),
    "results": Scenario(lambda output: finishing(output, False), results_in, check_results),
    "results, once more": Scenario(lambda output: finishing(output, True), results_in, check_results),
    "metrics": Scenario(logging, metrics_in, check_metrics),
}


# ---- cutting them off ------------------------------------------------------------------------------------------


def recovered(state: State, place: Path) -> Path:
    """A state of the disk, after what the next start of the run does to it."""
    shutil.rmtree(place, ignore_errors=True)
    state.write(place)
    with mock.patch("os.fsync"):  # the real disk has nothing to fear
        recover(place, is_ours)
    assert not [p.name for p in place.iterdir() if p.name.startswith(".")], "leftovers"
    return place


def cut_off(name: str, recorded: Recorded, place: Path, draws: int) -> Counter[str]:
    """Recovers from each state a crash may leave, checks what must hold, and counts the states by kind."""
    counted: Counter[str] = Counter()
    for state in states(recorded.trace, draws):
        try:
            SCENARIOS[name].check(recovered(state, place), *recorded.around(state.operation))
        except AssertionError as error:
            raise AssertionError(f"{where(recorded.trace, state.operation)}; {state.how}: {error}") from error
        counted[state.how.split(":")[0]] += 1
    return counted


def cut_off_in_recovery(name: str, recorded: Recorded, place: Path) -> int:
    """The same, where recovery itself is cut off and begun anew; returns in how many places."""
    points = 0
    for first in states(recorded.trace, draws=0):
        if first.how not in ("killed", "power lost: names none, contents none"):
            continue
        shutil.rmtree(place, ignore_errors=True)
        with recording(first.write(place)) as trace:
            recover(place, is_ours)
        points += len(trace.operations)
        for second in states(trace, draws=0):
            if second.how in (
                "killed",
                "power lost: names none, contents none",
                "power lost: names all, contents none",
            ):
                again = recovered(second, place.with_name("again"))
                SCENARIOS[name].check(again, *recorded.around(first.operation))
    return points


def where(trace: Trace, operation: int) -> str:
    """`before operation 7 (fsync state.json)`."""
    text = trace.operations[operation].text if operation < len(trace.operations) else "the end"
    return f"before operation {operation} ({text})"


def anonymous(found: Contents) -> Contents:
    """Contents with the process's number taken out of the names of temporary files."""
    return {re.sub(r"\.\d+\.tmp$", ".N.tmp", name): held for name, held in found.items()}
