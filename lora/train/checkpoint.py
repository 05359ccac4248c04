"""Checkpoints of a training run: the adapter, and all else that going on exactly needs. safetensors and JSON only.

    checkpoint-20/
      adapter/                  the adapter in PEFT's format: what `lora generate --adapter` and PEFT read
      parameters.safetensors    every trained tensor, bit for bit (PEFT's format may rewrite some, PiSSA's say)
      optimizer.safetensors     AdamW's moments, by parameter name
      random.safetensors        the generators of torch, and of each GPU
      state.json                the schedule, Python's and NumPy's generators, running sums, what was measured before
      trainer_state.json        transformers' own record
      manifest.json             size and SHA-256 of each file above, and the run it belongs to (`lora.train.manifest`)

A checkpoint is written under another name, flushed, and renamed when it is whole (`lora.train.durable`): a process
killed, or a machine that loses power, at any moment leaves the checkpoints there were, and once `save` is done the new
one. On resuming, each is checked against its manifest, newest first, and one that does not match is passed over.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lora import adapter_io
from lora.adapter_io import Gathered, gather_adapter
from lora.distributed import part_like, whole
from lora.errors import LoRAError
from lora.peft_format import DTYPES, write_tensors
from lora.train import manifest
from lora.train.durable import NewFile, Written, hash_of, remove, replaced_directory, reporting, write_file

NAME = re.compile(r"checkpoint-(\d+)")
ADAPTER = "adapter"
PARAMETERS, OPTIMIZER, RANDOM = "parameters.safetensors", "optimizer.safetensors", "random.safetensors"
STATE, TRAINER_STATE = "state.json", "trainer_state.json"
NEEDED = (PARAMETERS, OPTIMIZER, RANDOM, STATE, TRAINER_STATE)
TIMES = ("_runtime", "_per_second")  # ends of names in transformers' log
MOMENTS = ("exp_avg", "exp_avg_sq")
SAMPLED = 64  # numbers of each base tensor that go into its fingerprint


class Found(NamedTuple):
    """The newest whole checkpoint, and why each newer one was passed over."""

    path: Path | None
    passed_over: list[str]


# ---- writing ---------------------------------------------------------------------------------------------------


class Snapshot(NamedTuple):
    """What the processes of a run have of its state, put together."""

    adapter: Gathered
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    tr_loss: float


def snapshot(trainer: Any) -> Snapshot:
    """The state of a run at a step. All processes ask for it at the same step, and all have it."""
    losses = trainer.world.add(trainer._tr_loss.item())[0]
    return Snapshot(
        gather_adapter(trainer.model),
        {name: whole(tensor.detach()).cpu() for name, tensor in trained_tensors(trainer.model).items()},
        {name: whole(tensor).cpu() for name, tensor in optimizer_tensors(trainer).items()},
        losses / trainer.world.size,
    )


def save(trainer: Any, output: Path) -> Path:
    """Writes `output`/checkpoint-N for the step N the trainer is at; all of it or nothing.

    Against kills and power loss: until it is whole and on the disk, what was there stays, an older checkpoint-N too.
    Of several processes all call it, the first writes, and all go on when it has.

    Raises: LoRAError where it cannot be written, which checkpoint is still there, and what to do.
    """
    taken = snapshot(trainer)
    return trainer.world.first(lambda: write(taken, trainer, output))  # type: ignore[no-any-return]


def write(taken: Snapshot, trainer: Any, output: Path) -> Path:
    """See `save`."""
    target = output / f"checkpoint-{trainer.state.global_step}"
    try:
        with replaced_directory(target) as folder:
            files = write_adapter(taken.adapter, folder)
            files[PARAMETERS] = _write_tensors(folder / PARAMETERS, taken.parameters)
            files[OPTIMIZER] = _write_tensors(folder / OPTIMIZER, taken.optimizer)
            files[RANDOM] = write_random(folder)
            files[STATE] = write_state(trainer, taken.tr_loss, folder)
            files[TRAINER_STATE] = write_trainer_state(trainer, folder)
            content = manifest.manifest_of(trainer.run, trainer.state.global_step, trainer.world.size, files)
            write_file(folder / manifest.MANIFEST, content)
    except OSError as error:
        with reporting(f"{target.name} cannot be written to {output}", _still_there(output)):
            raise error
    return target


def rotate(output: Path, keep: int, saved: Path | None = None) -> None:
    """Removes what is older than the `keep` newest whole checkpoints; those that are torn do not count.

    Args:
        saved: one that was written just now, and is not read again to see whether it is whole.
    """
    whole = 0
    with reporting(f"older checkpoints in {output} cannot be removed", "The newest are whole."):
        for path in checkpoints(output):
            if whole >= keep:
                remove(path)
            elif path == saved or why_torn(path) is None:
                whole += 1


def write_adapter(adapter: Gathered, folder: Path) -> dict[str, Written]:
    """The adapter in PEFT's format."""
    try:
        written = adapter_io.write_adapter(adapter, folder / ADAPTER)
    except LoRAError as error:
        if isinstance(error.__context__, OSError):  # the adapter's own advice is for those who save only that
            raise error.__context__ from None
        raise
    files = sorted(file for file in written.iterdir())
    return {str(file.relative_to(folder)): Written(file.stat().st_size, hash_of(file)) for file in files}


def write_random(folder: Path) -> Written:
    """The states of torch's generators."""
    return _write_tensors(folder / RANDOM, random_tensors())


def write_state(trainer: Any, tr_loss: float, folder: Path) -> Written:
    """What is no tensor, and transformers does not keep."""
    return write_file(folder / STATE, json.dumps(state_of_run(trainer, tr_loss), indent=1).encode())


def write_trainer_state(trainer: Any, folder: Path) -> Written:
    """What transformers keeps, as it writes it, but for times: the same run makes the same bytes."""
    state = dataclasses.asdict(trainer.state)
    state["log_history"] = [
        {name: value for name, value in record.items() if not name.endswith(TIMES)} for record in state["log_history"]
    ]
    text = json.dumps(state, indent=2, sort_keys=True) + "\n"
    return write_file(folder / TRAINER_STATE, text.encode())


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, and what PiSSA and OLoRA started from, by parameter name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or ".initial_A." in name or ".initial_B." in name
    }


def optimizer_tensors(trainer: Any) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter name>|<what>`: AdamW's exp_avg, exp_avg_sq and step."""
    return {
        f"{name}|{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, _, parameter in _optimised(trainer)
        for key, value in trainer.optimizer.state[parameter].items()
    }


def random_tensors() -> dict[str, Tensor]:
    """The states of torch's generators."""
    states = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def state_of_run(trainer: Any, tr_loss: float) -> dict[str, Any]:
    """What is no tensor."""
    kind, keys, *rest = cast(tuple[Any, ...], numpy.random.get_state(legacy=True))
    return {
        "run": {name: value for name, value in trainer.run.items() if name not in manifest.RUN},
        "schedule": {k: v for k, v in trainer.lr_scheduler.state_dict().items() if _is_plain(v)},
        "sums": {
            "tr_loss": tr_loss,
            "total_loss": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
            "tokens_read": trainer.tokens_read,
            "tokens_learnt": trainer.tokens_learnt,
        },
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
    }


# ---- finding ---------------------------------------------------------------------------------------------------


def checkpoints(output: Path) -> list[Path]:
    """The checkpoint directories in `output`, newest step first."""
    found = [(int(match[1]), path) for path in output.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest(output: Path) -> Found:
    """The newest checkpoint in `output` that is whole. Raises LoRAError for one that a newer version has written."""
    passed_over: list[str] = []
    for path in checkpoints(output):
        reason = why_torn(path)
        if reason is None:
            return Found(path, passed_over)
        passed_over.append(f"{path.name} is not whole ({reason})")
    return Found(None, passed_over)


def why_torn(path: Path) -> str | None:
    """What of a checkpoint differs from its manifest; None where it is whole."""
    reason = manifest.why_torn(path, NEEDED)
    if reason is None and f"checkpoint-{manifest.read_manifest(path)['step']}" != path.name:
        return f"{manifest.MANIFEST} is of step {manifest.read_manifest(path)['step']}"
    return reason


def step_of(path: Path) -> int:
    """The step that a checkpoint was saved after."""
    return int(path.name.removeprefix("checkpoint-"))


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a whole checkpoint."""
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    return state


def check_same_run(path: Path, run: Mapping[str, Any], allowed: Collection[str] = ()) -> list[str]:
    """Raises LoRAError, listing what differs, unless the checkpoint belongs to a run with these settings and data.

    Args:
        allowed: settings that may differ; `model` allows other base weights, `data` and `eval_data` other examples.

    Returns: what differs and is allowed to.
    """
    found = manifest.changes(manifest.read_manifest(path), run)
    refused = [(name, text) for name, text in found if name not in allowed]
    if refused:
        names = ",".join(dict.fromkeys(name for name, _ in found))
        raise LoRAError(
            f"{path} is of a run that differs: {'; '.join(text for _, text in refused)}. Resume with the settings of "
            f"then, allow it with --allow-changed {names}, or start anew with another --output."
        )
    return [text for _, text in found]


# ---- loading ---------------------------------------------------------------------------------------------------


def check_tensors(model: nn.Module, path: Path) -> None:
    """Raises LoRAError unless each trained tensor and its moments have the name, shape and dtype that `model` has.

    Reads headers only, and changes nothing. A fused optimizer would write past the end of a tensor that is too small.
    """
    expected = trained_tensors(model)
    _check_tensors(path / PARAMETERS, _header(path / PARAMETERS), expected)
    stepped = {name: parameter for name, parameter in expected.items() if parameter.requires_grad}
    found = _header(path / OPTIMIZER)
    names = {key.rpartition("|")[0] for key in found}  # a parameter that had no gradient yet has no moments
    moments = {f"{name}|{what}": stepped[name] for name in names & stepped.keys() for what in MOMENTS}
    _check_tensors(path / OPTIMIZER, {k: v for k, v in found.items() if not k.endswith("|step")}, moments)


@torch.no_grad()
def load_parameters(model: nn.Module, path: Path) -> None:
    """Sets every trained tensor to what it was; LoRAError, before any is changed, where `check_tensors` objects."""
    check_tensors(model, path)
    saved = load_file(path / PARAMETERS)
    for name, parameter in trained_tensors(model).items():
        parameter.copy_(part_like(saved[name], parameter))


def load_optimizer(trainer: Any, path: Path) -> None:
    """Gives a fresh optimizer its moments, and a fresh schedule its step, from which the learning rates follow."""
    check_tensors(trainer.model, path)
    optimizer, schedule = trainer.optimizer, trainer.lr_scheduler
    numbers = {name: (number, parameter) for name, number, parameter in _optimised(trainer)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(path / OPTIMIZER).items():
        name, _, what = key.rpartition("|")
        number, parameter = numbers[name]
        state.setdefault(number, {})[what] = part_like(value, parameter) if what in MOMENTS else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    schedule.load_state_dict({**schedule.state_dict(), **read_state(path)["schedule"]})
    schedule = getattr(schedule, "scheduler", schedule)  # inside what accelerate put around it
    rates = [
        base * rate(schedule.last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def load_random_state(path: Path) -> None:
    """Sets the generators of Python, NumPy, torch and the GPUs."""
    stored, states = read_state(path), load_file(path / RANDOM)
    version, numbers, gauss = stored["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = stored["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.random.set_rng_state(states["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{i}"], i)


def load_sums(trainer: Any, path: Path) -> None:
    """Sets the running sums behind the next line of the log to what they were."""
    sums = read_state(path)["sums"]
    trainer._tr_loss = torch.tensor(sums["tr_loss"], device=trainer._tr_loss.device)
    trainer._total_loss_scalar = sums["total_loss"]
    trainer._globalstep_last_logged = sums["last_logged"]
    trainer.tokens_read, trainer.tokens_learnt = sums["tokens_read"], sums["tokens_learnt"]


def base_fingerprint(model: nn.Module) -> str:
    """A hash of the frozen tensors' names, shapes and first numbers: tells one base model from another."""
    trained, digest = trained_tensors(model), hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name not in trained:
            start = parameter.detach().flatten()[:SAMPLED].float().cpu()
            digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode() + start.numpy().tobytes())
    return digest.hexdigest()


# ---- details ---------------------------------------------------------------------------------------------------


def _optimised(trainer: Any) -> Iterator[tuple[str, int, Tensor]]:
    """(name, number in the optimizer's state_dict, parameter) of everything the optimizer steps."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    number = 0
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)], number, parameter
            number += 1


def _header(file: Path) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of each tensor in a safetensors file."""
    with safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - safe_open is no mapping
        return {name: (part.get_shape(), DTYPES[part.get_dtype()]) for name, part in slices.items()}


def _check_tensors(
    file: Path, found: Mapping[str, tuple[list[int], torch.dtype]], expected: Mapping[str, Tensor]
) -> None:
    """The same names, shapes and dtypes."""
    wanted = {name: (list(tensor.shape), tensor.dtype) for name, tensor in expected.items()}
    for name in sorted(found.keys() | wanted.keys()):
        have, want = (_described(tensors.get(name)) for tensors in (found, wanted))
        if have != want:
            raise LoRAError(
                f"{file}: {name} is {have}, expected {want}: the checkpoint is of another model or adapter."
            )


def _described(tensor: tuple[list[int], torch.dtype] | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} of {str(tensor[1]).removeprefix('torch.')}"


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """A safetensors file, hashed on its way to the disk."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with NewFile(path) as file:
        write_tensors(cast(BinaryIO, file), held, {"format": "pt"})
    return file.written


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float))


def _still_there(output: Path) -> str:
    """The end of an error message: what there is to go on from."""
    found = newest(output).path
    return f"{found.name} is whole: --resume goes on from it." if found else "No checkpoint is there yet."
