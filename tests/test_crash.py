"""Nothing is lost: crashes at every file operation, failing disks, signals, two writers, and exact resuming."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from faults.disk import State, contents, recording
from faults.kills import exact, kill_and_resume
from faults.scenarios import (
    SCENARIOS,
    anonymous,
    cut_off,
    cut_off_in_recovery,
    record,
    saving,
    tear,
    where,
    whole_checkpoints,
)
from faults.tiny_run import RUN, tiny_trainer, train_step
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_text import rows, save_tiny_model, write_jsonl

import lora
import lora.train.job
from lora.cli import main
from lora.errors import LoRAError
from lora.train import TrainConfig, checkpoint, durable, lock, manifest, run
from lora.train.config import from_sources
from lora.train.data import SeededOrder, order
from lora.train.job import Job, as_yaml, is_ours
from lora.train.lock import OutputLock
from lora.train.progress import Control, Metrics, read_metrics
from lora.train.quiet import quiet
from lora.train.stopping import InterruptedRunError, TerminatedRunError


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, where there is one: thousands of small files come and go."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


# ---- every operation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_crash_at_any_operation_loses_nothing(name: str, memory: Path) -> None:
    recorded = record(SCENARIOS[name], memory / "out")
    assert recorded.trace.same_as_disk(memory / "same")  # nothing went past the recorder
    counted = cut_off(name, recorded, memory / "place", draws=1)
    assert counted["killed"] == len(recorded.trace.operations) + 1
    assert counted["power lost"] >= 6 * counted["killed"]


def test_there_are_enough_crash_points(memory: Path) -> None:
    traces = [record(SCENARIOS[name], memory / str(i)).trace for i, name in enumerate(SCENARIOS)]
    kinds = [operation.kind for trace in traces for operation in trace.operations]
    assert len(kinds) >= 500
    assert {"create", "write", "fsync", "rename", "mkdir", "unlink", "rmdir"} <= set(kinds)


@pytest.mark.parametrize("name", ["a whole checkpoint is replaced", "results, once more"])
def test_a_crash_in_recovery_loses_nothing(name: str, memory: Path) -> None:
    recorded = record(SCENARIOS[name], memory / "out")
    assert cut_off_in_recovery(name, recorded, memory / "place") > 50


def test_the_model_of_a_kill_is_what_a_kill_leaves(memory: Path) -> None:
    def begin(output: Path) -> Callable[[], None]:
        first, second, third = saving(output, 3, keep=2)
        first()
        second()
        return third  # which rotates

    (memory / "model").mkdir()
    action = begin(memory / "model")
    with recording(memory / "model") as trace:
        action()
    for number in range(len(trace.operations)):
        output = memory / str(number)
        output.mkdir()
        action, drawn = begin(output), random.getstate()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            random.setstate(drawn)  # which Python draws anew in a child
            try:
                with recording(output, before=lambda at, kind, last=number: os._exit(9) if at == last else None):
                    action()
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        modelled = State(number, "killed", trace.tree(number), "all", "all").write(memory / f"modelled-{number}")
        assert anonymous(contents(output)) == anonymous(contents(modelled)), where(trace, number)


# ---- disks that fail -------------------------------------------------------------------------------------------

FAILURES = {
    "disk full": (errno.ENOSPC, "No space left on device: make room there"),
    "read only": (errno.EROFS, "Read-only file system: make it writable"),
    "failing": (errno.EIO, "Input/output error: the disk or its connection"),
}
SWALLOWED = ("link", "unlink", "rmdir")  # tidying up: what is left goes at the next start


@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("case", FAILURES)
def test_a_disk_that_fails_at_any_operation_loses_nothing(case: str, stays: bool, memory: Path) -> None:
    error, said = FAILURES[case]
    raised = 0
    for number in range(200):
        output = memory / str(number)
        output.mkdir()
        step = saving(output, 1, keep=1, trainer=(trainer := tiny_trainer()))[0]
        step()
        failed: list[str] = []

        def fail(at: int, kind: str, number: int = number, failed: list[str] = failed) -> None:
            if at == number or (stays and at > number and kind not in SWALLOWED):
                failed.append(kind)
                raise os_error(error)

        try:
            with recording(output, before=fail):
                step()
        except LoRAError as report:
            raised += 1
            failed_at = rf"(checkpoint-2 cannot be written to {output}|older checkpoints in {output} cannot be removed)"
            assert re.search(f"{failed_at}: {said}", str(report))
            assert re.search(r"checkpoint-[12] is whole: --resume goes on from it|The newest are whole", str(report))
        else:
            assert not failed or failed[0] in (*SWALLOWED, "fsync"), failed  # flushing names is asked for twice
        assert list(whole_checkpoints(output)) in (["checkpoint-1"], ["checkpoint-2"], ["checkpoint-2", "checkpoint-1"])
        assert set(failed) & set(SWALLOWED) or not list(output.glob(".unfinished*"))  # room is given back
        durable.recover(output, is_ours)
        trainer.state.global_step = 1
        step()  # once the disk is mended
        assert list(whole_checkpoints(output)) == ["checkpoint-2"]
        if not failed:
            break
    assert raised > 30


def test_metrics_that_cannot_be_written_end_the_run_with_advice(memory: Path) -> None:
    def full(at: int, kind: str) -> None:
        raise os_error(errno.ENOSPC)

    metrics = Metrics(memory / "metrics.jsonl")
    metrics.trainer = tiny_trainer()
    metrics.start(0)
    said = f"{memory}/metrics.jsonl cannot be written: No space left on device: make room there"
    for act in (lambda: metrics.add(1, loss=1.0), metrics.flush, lambda: metrics.start(1)):
        with pytest.raises(LoRAError, match=said), recording(memory, before=full):
            act()
    assert read_metrics(metrics.path) == []


def test_short_writes_are_completed(memory: Path) -> None:
    found = []
    for longest in (None, 7):
        output = memory / str(longest)
        output.mkdir()
        with recording(output, longest=longest) as trace:
            saving(output, 1, keep=1)[0]()
        found.append(contents(output))
        assert (sum(operation.kind == "write" for operation in trace.operations) > 1000) == (longest == 7)
    assert found[0] == found[1]


def test_a_disk_that_swallows_bytes_is_noticed_at_once(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:5]) and len(data))
    with pytest.raises(LoRAError, match=r"only \d+ of \d+ bytes were written") as error:
        saving(memory, 1, keep=1)[0]()
    assert "No checkpoint is there yet" in str(error.value)
    assert list(memory.iterdir()) == []


def test_what_is_no_failing_disk_is_not_called_one(memory: Path) -> None:
    trainer = tiny_trainer()
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(LoRAError, match="not finite"):
        checkpoint.save(trainer, memory)
    assert list(memory.iterdir()) == []


# ---- what is whole ---------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A whole checkpoint of a tiny run."""
    (tmp_path / "out").mkdir()
    saving(tmp_path / "out", 1, keep=1)[0]()
    return tmp_path / "out" / "checkpoint-1"


def test_any_byte_that_changes_is_noticed(saved: Path) -> None:
    assert checkpoint.why_torn(saved) is None
    for name, held in contents(saved).items():
        for at in range(0, len(held or b""), 1 if name == manifest.MANIFEST else 101):
            changed = bytearray(held or b"")
            changed[at] ^= 1 << (at % 8)
            (saved / name).write_bytes(changed)
            assert checkpoint.why_torn(saved) is not None, (name, at)
        if held is not None:
            (saved / name).write_bytes(held)
    assert checkpoint.why_torn(saved) is None


def rewritten(saved: Path, **changes: Any) -> None:
    """A manifest with other contents and the right hash."""
    found = {**manifest.read_manifest(saved), **changes}
    found.pop("sha256")
    (saved / manifest.MANIFEST).write_text(json.dumps({**found, "sha256": manifest._digest(found)}))


def test_a_manifest_says_what_the_checkpoint_is_of(saved: Path) -> None:
    found = manifest.read_manifest(saved)
    assert (found["format"], found["step"], found["world_size"]) == (2, 1, 1)
    assert {name: found[name] for name in RUN} == RUN
    files = {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()}
    assert set(found["files"]) == files - {manifest.MANIFEST}
    assert all(stated["size"] == (saved / name).stat().st_size for name, stated in found["files"].items())


def test_a_manifest_is_read_with_care(saved: Path) -> None:
    files = manifest.read_manifest(saved)["files"]
    rewritten(saved, files={**files, "../x": files["state.json"]})
    assert checkpoint.why_torn(saved) == "manifest.json names '../x'"
    rewritten(saved, files={name: stated for name, stated in files.items() if name != "state.json"})
    assert checkpoint.why_torn(saved) == "manifest.json does not name state.json"
    rewritten(saved, files=files, step=7)
    assert checkpoint.why_torn(saved) == "manifest.json is of step 7"
    rewritten(saved, step=1, format=1)
    assert checkpoint.why_torn(saved) == "manifest.json has format 1, expected 2"
    rewritten(saved, format=3)
    with pytest.raises(LoRAError, match="has format 3, expected at most 2: a newer version wrote it"):
        checkpoint.newest(saved.parent)
    (saved / manifest.MANIFEST).write_bytes(b"\xff")
    assert checkpoint.why_torn(saved) == "manifest.json is missing or damaged"


def test_what_may_not_be_read_is_not_called_torn(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(manifest, "hash_of", forbidden)
    with pytest.raises(LoRAError, match=rf"{saved}/.* cannot be read: Permission denied. Make it readable"):
        checkpoint.newest(saved.parent)
    monkeypatch.setattr(manifest, "read_manifest", forbidden)
    with pytest.raises(LoRAError, match=rf"{saved} cannot be read: Permission denied. Make it readable"):
        checkpoint.newest(saved.parent)


def test_a_torn_checkpoint_does_not_count_among_those_to_keep(tmp_path: Path) -> None:
    trainer = tiny_trainer()
    for step in saving(tmp_path, 3, keep=9, trainer=trainer):
        step()
    tear(tmp_path / "checkpoint-3")
    checkpoint.rotate(tmp_path, keep=1)
    assert list(whole_checkpoints(tmp_path)) == ["checkpoint-2"]
    assert checkpoint.newest(tmp_path).passed_over == [
        "checkpoint-3 is not whole (parameters.safetensors has 4 bytes instead of 280)"
    ]


BAD_OPTIMIZER: dict[str, tuple[Callable[[dict[str, Any], str], Any], str]] = {
    "shape": (
        lambda saved, key: saved.update({key: saved[key][:1].clone()}),
        r"is \[1, 6\] of float32, expected \[2, 6\]",
    ),
    "dtype": (lambda saved, key: saved.update({key: saved[key].double()}), "of float64, expected .* of float32"),
    "half of it": (lambda saved, key: saved.pop(key), "is absent, expected"),
    "one too many": (lambda saved, key: saved.update({f"other.{key}": saved[key].clone()}), "expected absent"),
}


@pytest.mark.parametrize("case", BAD_OPTIMIZER)
def test_the_optimizer_is_checked_before_any_tensor_changes(saved: Path, case: str) -> None:
    spoil, said = BAD_OPTIMIZER[case]
    path = saved / checkpoint.OPTIMIZER
    tensors = load_file(path)
    spoil(tensors, next(key for key in tensors if key.endswith("lora_A.default|exp_avg")))
    save_file(tensors, path)
    trainer = tiny_trainer(seed=5)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    for load in (
        lambda: checkpoint.load_parameters(trainer.model, saved),
        lambda: checkpoint.load_optimizer(trainer, saved),
    ):
        with pytest.raises(LoRAError, match=said):
            load()
        assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
        assert not trainer.optimizer.state_dict()["state"]


def test_a_parameter_without_a_gradient_has_no_moments_and_resumes(saved: Path) -> None:
    tensors = load_file(saved / checkpoint.OPTIMIZER)
    kept = {key: value for key, value in tensors.items() if "lora_A" not in key}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, saved / checkpoint.OPTIMIZER)
    trainer = tiny_trainer(seed=5)
    checkpoint.load_parameters(trainer.model, saved)
    checkpoint.load_optimizer(trainer, saved)
    assert len(trainer.optimizer.state_dict()["state"]) == 1


def test_a_fresh_trainer_goes_on_bit_for_bit_from_a_checkpoint(saved: Path, tmp_path: Path) -> None:
    straight = tiny_trainer()
    train_step(straight)
    resumed = tiny_trainer()
    with torch.no_grad():
        for parameter in lora.trainable_parameters(resumed.model):
            parameter.add_(1)
    checkpoint.load_parameters(resumed.model, saved)
    checkpoint.load_optimizer(resumed, saved)
    resumed.state.global_step = 1
    for trainer in (straight, resumed):
        checkpoint.load_random_state(saved)
        for _ in range(3):
            train_step(trainer)
        checkpoint.save(trainer, tmp_path)
        (tmp_path / "checkpoint-4").rename(tmp_path / ("a" if trainer is straight else "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_generators_of_every_kind_are_saved(saved: Path) -> None:
    trainer = tiny_trainer()
    train_step(trainer)
    random.gauss(0, 1)  # which keeps a second number for later
    numpy.random.randn()
    checkpoint.save(trainer, saved.parent)

    def drawn() -> list[Any]:
        ours = [random.random(), random.gauss(0, 1), float(numpy.random.rand()), float(numpy.random.randn())]
        return [*ours, torch.rand(3).tolist(), torch.randn(17).tolist()]

    expected = drawn()
    assert drawn() != expected
    checkpoint.load_random_state(saved)
    assert drawn() == expected


GPUS = torch.cuda.device_count()


@pytest.mark.skipif(not GPUS, reason="the generators of real GPUs: not run, needs a CUDA device, and none is here")
def test_the_generators_of_real_gpus_are_saved(saved: Path) -> None:
    devices = [torch.device("cuda", number) for number in range(GPUS)]

    def drawn() -> list[list[float]]:
        return [torch.rand(99, device=device).tolist() + torch.randn(99, device=device).tolist() for device in devices]

    drawn()  # so that none is at its seed
    checkpoint.save(tiny_trainer(), saved.parent)
    expected = drawn()
    assert all(one != other for one, other in zip(drawn(), expected, strict=True))
    torch.manual_seed(1)
    checkpoint.load_random_state(saved.parent / "checkpoint-0")
    assert drawn() == expected


@pytest.mark.parametrize("here", [3, 2, 4])
def test_the_generator_of_every_gpu_is_saved_and_put_back(
    saved: Path, here: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three GPUs that are not there, into as many, fewer or more: each into its own, and into no other."""
    gpus = [torch.Generator().manual_seed(number) for number in range(3)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: gpus[device].get_state())
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [gpu.get_state() for gpu in gpus])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: gpus[device].set_state(state))

    def drawn() -> list[list[float]]:
        return [torch.rand(5, generator=gpu).tolist() for gpu in gpus]

    drawn()
    checkpoint.save(tiny_trainer(), saved.parent)
    expected = drawn()
    assert len({tuple(numbers) for numbers in expected}) == 3
    gpus[:] = [torch.Generator().manual_seed(77 + number) for number in range(here)]
    fresh = torch.rand(5, generator=torch.Generator().manual_seed(77 + 3)).tolist()
    checkpoint.load_random_state(saved.parent / "checkpoint-0")
    assert drawn() == {2: expected[:2], 3: expected, 4: [*expected, fresh]}[here]


# ---- one writer ------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from lora.train.lock import OutputLock
mine = OutputLock(Path(sys.argv[1]))
print(mine.take(), flush=True)
time.sleep(60)
"""


def test_two_writers_are_told_apart_and_a_dead_one_is_taken_over_from(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "None\n"
        mine = OutputLock(tmp_path)
        with pytest.raises(
            LoRAError, match=rf"{tmp_path} is being written to by process {holder.pid} on .*another --out"
        ):
            mine.take()
        config = TrainConfig(model="no such model", data="none.jsonl", output=str(tmp_path), resume=True)
        with pytest.raises(LoRAError, match="is being written to by"):
            run(config, Console(file=io.StringIO()))
    finally:
        holder.kill()
        holder.wait()
    note = mine.take()
    assert note is not None and re.match(rf"process {holder.pid} on .* ended without a word", note)
    mine.release()
    assert list(tmp_path.iterdir()) == []
    assert mine.take() is None
    mine.release()


def test_a_run_that_came_in_between_is_not_replaced(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, load = settings(files, tmp_path / "out", resume=True), lora.train.job.load_model

    with monkeypatch.context() as patch:

        def slowly(config: TrainConfig) -> Any:
            patch.undo()
            trained(settings(files, tmp_path / "out", max_steps=1))
            return load(config)

        patch.setattr("lora.train.job.load_model", slowly)
        with pytest.raises(LoRAError, match=r"another run has come and gone in .* Start again with --resume"):
            trained(config)
    assert (tmp_path / "out" / "result.json").exists()


def test_runs_of_one_process_exclude_each_other_too(tmp_path: Path) -> None:
    first, second = OutputLock(tmp_path), OutputLock(tmp_path)
    first.take()
    with pytest.raises(LoRAError, match=f"process {os.getpid()} on"):
        second.take()
    second.release()  # holds nothing, and takes nothing away
    with pytest.raises(LoRAError, match=f"process {os.getpid()} on"):
        second.take()
    first.release()
    second.take()
    second.release()


def test_a_lock_whose_file_its_holder_removes_just_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = lock.fcntl.flock, []

    def flock(file: Any, how: int) -> None:
        if not calls:
            (tmp_path / lock.NAME).unlink()  # between opening and locking it
        calls.append(how)
        real(file, how)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    first, second = OutputLock(tmp_path), OutputLock(tmp_path)
    first.take()
    assert len(calls) == 2  # the file that was locked first was nobody's any more
    with pytest.raises(LoRAError, match="is being written to by"):
        second.take()
    first.release()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    first, second = OutputLock(tmp_path), OutputLock(tmp_path)
    first.take()
    with pytest.raises(LoRAError, match=r"Wait for it to end, or delete .*\.lock if you know that it has ended"):
        second.take()
    path = tmp_path / lock.NAME
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path.write_text(json.dumps({**json.loads(path.read_text()), "process": ended.pid}))
    assert f"process {ended.pid} on" in str(second.take())
    path.write_text(json.dumps({**json.loads(path.read_text()), "process": ended.pid, "host": "elsewhere"}))
    with pytest.raises(LoRAError, match="on elsewhere"):
        OutputLock(tmp_path).take()


def test_a_directory_that_cannot_be_written_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Path, *_: Any, **__: Any) -> None:
        raise os_error(errno.EROFS)

    monkeypatch.setattr(lock, "open", read_only, raising=False)
    config = TrainConfig(model="no such model", data="none.jsonl", output=str(tmp_path))
    said = f"output: {tmp_path} cannot be written to: Read-only file system: make it writable, or name a directory"
    with pytest.raises(LoRAError, match=said):
        run(config, Console(file=io.StringIO()))


# ---- real runs -------------------------------------------------------------------------------------------------

STEPS = 8  # three an epoch: the last one is in the middle of the third
SETTINGS: dict[str, Any] = {"lr": 1e-2, "r": 4, "max_steps": STEPS, "batch_size": 4, "grad_accumulation": 2}
SETTINGS |= {"eval_fraction": 0.1, "samples": 1, "sample_tokens": 4, "tensorboard": False, "lora_dropout": 0.2}
SETTINGS |= {"save_every": 1, "keep_checkpoints": 99, "eval_every": 4, "scheduler": "constant", "seed": 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model and data, made once."""
    root = tmp_path_factory.mktemp("crash")
    with quiet():
        model = save_tiny_model(root / "model")
    return {"model": model, "data": write_jsonl(root / "data.jsonl", rows(24))}


def settings(files: dict[str, Path], output: Path, **options: Any) -> TrainConfig:
    return TrainConfig(model=str(files["model"]), data=str(files["data"]), output=str(output), **(SETTINGS | options))


def trained(config: TrainConfig) -> str:
    """Runs; returns what was said."""
    console = Console(file=io.StringIO(), width=200)
    run(config, console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.fixture(scope="module", params=["reference", "fast"])
def straight(request: Any, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run that nothing interrupts, with a checkpoint of each step."""
    output = tmp_path_factory.mktemp("straight") / "out"
    trained(settings(files, output, backend=request.param))
    return request.param, output


def test_resuming_from_any_step_ends_the_same(straight: Any, files: dict[str, Path], tmp_path: Path) -> None:
    backend, whole = straight
    for step in range(1, STEPS + 1):
        output = tmp_path / str(step)
        shutil.copytree(whole / f"checkpoint-{step}", output / f"checkpoint-{step}")
        shutil.copy(whole / "metrics.jsonl", output)
        said = trained(settings(files, output, backend=backend, resume=True))
        assert f"from {output}/checkpoint-{step}" in said
        assert exact(output) == exact(whole), step
        assert not (output / f"checkpoint-{STEPS + 1}").exists()


def stop_in(steps: dict[int, signal.Signals], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends the process a signal in each of these steps."""
    original = Control.on_step_end

    def on_step_end(self: Control, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step in steps:
            os.kill(os.getpid(), steps.pop(state.global_step))
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(Control, "on_step_end", on_step_end)


def test_several_interruptions_in_a_row(
    straight: Any, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, whole = straight
    config = settings(files, tmp_path / "out", backend=backend, save_every=0)
    stop_in({2: signal.SIGTERM, 3: signal.SIGINT, 7: signal.SIGTERM}, monkeypatch)
    for step, kind in ((2, TerminatedRunError), (3, InterruptedRunError), (7, TerminatedRunError)):
        with pytest.raises(InterruptedRunError, match=f"after step {step} of 8; .*checkpoint-{step} is saved") as error:
            trained(config.replace(resume=step > 2))
        assert type(error.value) is kind
        assert not (tmp_path / "out" / lock.NAME).exists()
    trained(config.replace(resume=True, save_every=1))
    assert exact(tmp_path / "out") == exact(whole)


def flags(config: TrainConfig, **more: Any) -> list[str]:
    """The command line of a config."""
    path = Path(config.output).with_name(f"{Path(config.output).name}.yaml")
    path.write_text(as_yaml(config))
    return ["train", "--config", str(path), *(f"--{name}" for name in more)]


def test_sigterm_ends_with_143_and_says_where_to_go_on(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    config = settings(files, tmp_path / "out", save_every=0, backend="reference")
    before = signal.getsignal(signal.SIGTERM)
    stop_in({4: signal.SIGTERM}, monkeypatch)
    assert main(flags(config)) == 143
    said = capfd.readouterr().err
    assert f"terminated (SIGTERM) after step 4 of 8; {tmp_path}/out/checkpoint-4 is saved: --resume" in said
    assert signal.getsignal(signal.SIGTERM) is before
    assert main(flags(config, resume=True)) == 0


@pytest.mark.parametrize("stage", ["measure_before", "held_out_after"])
def test_sigterm_outside_of_training(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, stage: str
) -> None:
    config = settings(files, tmp_path / "out", backend="reference")
    with monkeypatch.context() as patch:
        patch.setattr(Job, stage, lambda self: os.kill(os.getpid(), signal.SIGTERM))
        assert main(flags(config)) == 143
    said = capfd.readouterr().err
    expected = {"measure_before": "before the first step", "held_out_after": "--resume completes them"}[stage]
    assert f"terminated (SIGTERM) {'' if stage == 'measure_before' else 'while'}" in said and expected in said
    assert not (tmp_path / "out" / "result.json").exists()
    assert main(flags(config, resume=True)) == 0
    assert (tmp_path / "out" / "result.json").exists()


def test_a_signal_after_the_last_step_still_saves(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(files, tmp_path / "out", save_every=0, backend="reference")
    with monkeypatch.context() as patch:
        patch.setattr(Control, "on_train_end", lambda self, *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(TerminatedRunError, match=r"after step 8 of 8; .*checkpoint-8 is saved"):
            trained(config)
    said = trained(config.replace(resume=True))
    assert "checkpoint-8" in said and (tmp_path / "out" / "result.json").exists()


def test_a_full_disk_ends_the_run_with_advice_and_it_goes_on(
    straight: Any, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    backend, whole = straight
    config = settings(files, tmp_path / "out", backend=backend)
    write = durable.NewFile.write

    def full(self: durable.NewFile, content: Any) -> int:
        if "checkpoint-4" in str(self.path):
            raise os_error(errno.ENOSPC)
        return write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(durable.NewFile, "write", full)
        assert main(flags(config)) == 2
    said = capfd.readouterr().err
    assert f"checkpoint-4 cannot be written to {tmp_path}/out: No space left on device: make room there." in said
    assert "checkpoint-3 is whole: --resume goes on from it." in said
    assert not list((tmp_path / "out").glob(".*"))
    trained(config.replace(resume=True))
    assert exact(tmp_path / "out") == exact(whole)


def test_a_run_killed_between_its_results_is_completed(
    straight: Any, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, whole = straight
    for name in ("write_adapter", "write_samples", "write_plot", "write_result"):
        output = tmp_path / name
        shutil.copytree(whole / f"checkpoint-{STEPS}", output / f"checkpoint-{STEPS}")
        shutil.copy(whole / "metrics.jsonl", output)
        config = settings(files, output, backend=backend, resume=True)
        with monkeypatch.context() as patch:
            patch.setattr(f"lora.train.job.{name}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                trained(config)
        assert not (output / "result.json").exists()
        trained(config)
        assert exact(output) == exact(whole), name


def test_killed_at_random_and_resumed(tmp_path: Path) -> None:
    report = kill_and_resume(tmp_path, kills=6, seed=1, fresh=False, steps=11)
    assert report.kills == 6 and report.completed >= 1
    assert report.different == []


def test_leftovers_are_tidied_up_and_said(straight: Any, files: dict[str, Path], tmp_path: Path) -> None:
    backend, whole = straight
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    (output / f"checkpoint-{STEPS}").rename(output / f".aside-checkpoint-{STEPS}")
    (output / f".unfinished-checkpoint-{STEPS}").mkdir()
    (output / ".unfinished-result.json").write_text("{")
    (output / ".removed-checkpoint-1").mkdir()
    for name in (".mine", ".unfinished-mine", ".aside-mine"):
        (output / name).write_text("kept")
    said = trained(settings(files, output, backend=backend, resume=True))
    assert f"checkpoint-{STEPS} was being replaced when an earlier run ended: the old one is back" in said
    assert sorted(path.name for path in output.glob(".*")) == [".aside-mine", ".mine", ".unfinished-mine"]
    assert exact(output) == exact(whole)


# ---- changed settings ------------------------------------------------------------------------------------------


def resumed_at(step: int, whole: Path, output: Path) -> Path:
    shutil.copytree(whole / f"checkpoint-{step}", output / f"checkpoint-{step}")
    shutil.copy(whole / "metrics.jsonl", output)
    return output


def test_changed_settings_are_refused_unless_allowed_by_name(
    straight: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    backend, whole = straight
    output = resumed_at(4, whole, tmp_path / "out")
    changed = settings(files, output, backend=backend, resume=True, lr=1e-3, weight_decay=0.1)
    before = contents(output)
    said = r"lr: 0.01 then, 0.001 now; weight_decay: 0.0 then, 0.1 now.*--allow-changed lr,weight_decay"
    with pytest.raises(LoRAError, match=said):
        trained(changed)
    with pytest.raises(
        LoRAError, match=r"differs: weight_decay: 0.0 then, 0.1 now\. .*--allow-changed lr,weight_decay"
    ):
        trained(changed.replace(allow_changed=("lr",)))
    assert contents(output) == before
    said = trained(changed.replace(allow_changed=("lr", "weight_decay", "seed")))
    assert "lr: 0.01 then, 0.001 now" in said and "weight_decay: 0.0 then, 0.1 now" in said
    rates = {r["step"]: r["lr"] for r in read_metrics(output / "metrics.jsonl") if "lr" in r}
    assert (rates[4], rates[5], rates[8]) == (1e-2, 1e-3, 1e-3)  # from the first step on
    result = json.loads((output / "result.json").read_text())
    assert result["changes"] == [
        "from step 4: lr: 0.01 then, 0.001 now",
        "from step 4: weight_decay: 0.0 then, 0.1 now",
    ]
    assert "allow_changed: []" in (output / "run.yaml").read_text()
    trained(changed)  # what was allowed is now the run's own; what it was is not forgotten
    assert json.loads((output / "result.json").read_text())["changes"] == result["changes"]


def test_other_data_needs_its_name_too(straight: Any, files: dict[str, Path], tmp_path: Path) -> None:
    backend, whole = straight
    output = resumed_at(4, whole, tmp_path / "out")
    changed = settings(files, output, backend=backend, resume=True, seed=9)  # which splits the data in another way
    with pytest.raises(LoRAError, match=r"the training data: other examples.*the held-out data: .*seed,data,eval_data"):
        trained(changed.replace(allow_changed=("seed",)))
    said = trained(changed.replace(allow_changed=("seed", "data", "eval_data")))
    assert "the held-out data: other examples" in said
    stored = checkpoint.read_state(output / "checkpoint-8")["run"]["before"]["loss"]
    assert stored != checkpoint.read_state(whole / "checkpoint-4")["run"]["before"]["loss"]  # measured again


def test_what_does_not_fit_is_refused_even_if_allowed(straight: Any, files: dict[str, Path], tmp_path: Path) -> None:
    backend, whole = straight
    output = resumed_at(4, whole, tmp_path / "out")
    with pytest.raises(LoRAError, match=r"parameters.safetensors: .*lora_A.default is \[4, .*expected \[8, "):
        trained(settings(files, output, backend=backend, resume=True, r=8, allow_changed=("r",)))


def test_how_often_to_save_and_log_is_asked_anew(straight: Any, files: dict[str, Path], tmp_path: Path) -> None:
    backend, whole = straight
    output = resumed_at(2, whole, tmp_path / "out")
    trained(settings(files, output, backend=backend, resume=True, save_every=4, log_every=3))
    assert [path.name for path in checkpoint.checkpoints(output)] == ["checkpoint-8", "checkpoint-4", "checkpoint-2"]
    assert [r["step"] for r in read_metrics(output / "metrics.jsonl") if "loss" in r] == [1, 2, 3, 6]


def test_more_steps_go_on_and_fewer_finish(straight: Any, files: dict[str, Path], tmp_path: Path) -> None:
    backend, whole = straight
    for steps, last in ((10, 10), (3, 4)):
        output = resumed_at(4, whole, tmp_path / str(steps))
        config = settings(files, output, backend=backend, resume=True, max_steps=steps, allow_changed=("max_steps",))
        trained(config)
        assert json.loads((output / "result.json").read_text())["steps"] == last
    records = [read_metrics(path / "metrics.jsonl") for path in (tmp_path / "10", whole)]
    longer, plain = ([(r["step"], r["loss"]) for r in part if "loss" in r] for part in records)
    assert longer[:STEPS] == plain  # with a constant rate, the same steps and two more


ALLOWED = {
    "misspelt": (
        ("lora_dropot",),
        "allow_changed names 'lora_dropot', which is no setting. Did you mean 'lora_dropout'",
    ),
    "another name": (("learning_rate",), "'learning_rate', which is no setting.* Expected some of model, .*lr, "),
    "not fixed": (("output",), "'output', which may change anyway"),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_names_to_allow_are_checked(case: str) -> None:
    names, said = ALLOWED[case]
    with pytest.raises(LoRAError, match=said):
        TrainConfig(model="m", data="d", resume=True, allow_changed=names)


def test_allowing_is_for_resuming(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(LoRAError, match="allow_changed is set without resume"):
        TrainConfig(model="m", data="d", allow_changed=("lr",))
    path = tmp_path / "c.yaml"
    path.write_text("model: m\ndata: d\nresume: true\nallow_changed: [lr, seed]\n")
    assert from_sources(path, {}).allow_changed == ("lr", "seed")
    assert main(["train", "--model", "m", "--data", "d", "--resume", "--allow-changed", "lr,sed"]) == 2
    assert "Did you mean 'seed'" in capsys.readouterr().err


# ---- the order of the data -------------------------------------------------------------------------------------


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    first = [order(7, epoch, 20) for epoch in range(3)]
    torch.rand(5)
    torch.manual_seed(1)
    assert [order(7, epoch, 20) for epoch in range(3)] == first
    assert all(sorted(indices) == list(range(20)) for indices in first)
    assert first[0] != first[1] != first[2] != first[0] != order(8, 0, 20)
    sampler = SeededOrder(range(20), seed=7)
    sampler.set_epoch(2)
    assert list(sampler) == list(sampler) == first[2]


def test_a_resumed_epoch_has_its_order_though_its_loader_does_not_pass_it_on(
    straight: Any, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's loader of the rest of an epoch reaches the sampler on one process, but not on several."""
    backend, whole = straight
    output = resumed_at(7, whole, tmp_path / "out")
    monkeypatch.setattr("accelerate.data_loader.DataLoaderShard.set_epoch", lambda self, epoch: None)
    trained(settings(files, output, backend=backend, resume=True))
    assert exact(output) == exact(whole)


def test_training_goes_through_the_data_in_that_order(files: dict[str, Path], tmp_path: Path) -> None:
    job = Job(settings(files, tmp_path / "out"), Console(file=io.StringIO()))
    with quiet():
        job.prepare()
    rows_seen = []
    loader = job.trainer.get_train_dataloader()
    for epoch in range(2):
        loader.set_epoch(epoch)
        torch.rand(epoch)
        rows_seen.append(
            [
                row[: int(mask.sum())].tolist()
                for b in loader
                for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
            ]
        )
    data = job.trainer.train_dataset["input_ids"]
    assert rows_seen == [[list(data[i]) for i in order(3, epoch, len(data))] for epoch in range(2)]
    job.lock.release()
