"""Checkpoints of a training run: the adapter, and all else that going on exactly needs. safetensors and JSON only.

    checkpoint-20/
      adapter/                  the adapter in PEFT's format: what `lora generate --adapter` and PEFT read
      parameters.safetensors    every trained tensor, bit for bit (PEFT's format may rewrite some, PiSSA's say)
      optimizer.safetensors     AdamW's moments, by parameter name
      random.safetensors        the generators of torch, and of each GPU
      state.json                learning rates, schedule, Python's and NumPy's generators, running sums, and the run:
                                its settings, and hashes of its data and of its base model
      trainer_state.json        transformers' own record
      manifest.json             size and SHA-256 of each file above

A checkpoint is written under another name and renamed when it is whole. On resuming, each is checked against its
manifest, newest first, and one that does not match is passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora.adapter_io import save_adapter
from lora.errors import LoRAError

NAME = re.compile(r"checkpoint-(\d+)")
UNFINISHED = ".unfinished-checkpoint"
PARAMETERS, OPTIMIZER, RANDOM = "parameters.safetensors", "optimizer.safetensors", "random.safetensors"
STATE, TRAINER_STATE, MANIFEST = "state.json", "trainer_state.json", "manifest.json"
RATES = ("lr", "initial_lr")  # of a parameter group; the rest is in the run's settings
SAMPLED = 64  # numbers of each base tensor that go into its fingerprint


class Found(NamedTuple):
    """The newest whole checkpoint, and why each newer one was passed over."""

    path: Path | None
    passed_over: list[str]


# ---- writing ---------------------------------------------------------------------------------------------------


def save(trainer: Any, output: Path) -> Path:
    """Writes `output`/checkpoint-N for the step N the trainer is at; all of it or nothing."""
    target = output / f"checkpoint-{trainer.state.global_step}"
    unfinished = output / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_adapter(trainer.model, unfinished / "adapter")
    save_file(_copies(trained_tensors(trainer.model)), unfinished / PARAMETERS)
    save_file(_copies(optimizer_tensors(trainer)), unfinished / OPTIMIZER)
    save_file(random_tensors(), unfinished / RANDOM)
    (unfinished / STATE).write_text(json.dumps(state_of_run(trainer), indent=1))
    trainer.state.save_to_json(str(unfinished / TRAINER_STATE))
    files = sorted(file for file in unfinished.rglob("*") if file.is_file())
    manifest = {
        str(file.relative_to(unfinished)): {"size": file.stat().st_size, "sha256": _hash(file)} for file in files
    }
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*files, unfinished / MANIFEST, unfinished / "adapter", unfinished):
        _flush(path)
    shutil.rmtree(target, ignore_errors=True)  # of an earlier run that went on from before this step
    unfinished.rename(target)
    _flush(output)
    return target


def rotate(output: Path, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints."""
    for path in checkpoints(output)[keep:]:
        shutil.rmtree(path, ignore_errors=True)


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


def state_of_run(trainer: Any) -> dict[str, Any]:
    """What is no tensor."""
    kind, keys, *rest = cast(tuple[Any, ...], numpy.random.get_state(legacy=True))
    return {
        "run": trainer.run,
        "rates": [
            {key: float(group[key]) for key in RATES if key in group} for group in trainer.optimizer.param_groups
        ],
        "schedule": {k: v for k, v in trainer.lr_scheduler.state_dict().items() if _is_plain(v)},
        "sums": {
            "tr_loss": trainer._tr_loss.item(),
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
    """The newest checkpoint in `output` that is whole."""
    passed_over: list[str] = []
    for path in checkpoints(output):
        reason = why_torn(path)
        if reason is None:
            return Found(path, passed_over)
        passed_over.append(f"{path.name} is not whole ({reason})")
    return Found(None, passed_over)


def why_torn(path: Path) -> str | None:
    """What of a checkpoint differs from its manifest; None where it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, stated in manifest.items():
            file = path / name
            if ".." in Path(name).parts or Path(name).is_absolute():
                return f"{MANIFEST} names {name!r}"
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != stated["size"]:
                return f"{name} has {file.stat().st_size:,} bytes instead of {stated['size']:,}"
            if _hash(file) != stated["sha256"]:
                return f"{name} has other contents than were written"
        missing = {PARAMETERS, OPTIMIZER, RANDOM, STATE, TRAINER_STATE} - set(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or damaged"
    return f"{MANIFEST} does not name {sorted(missing)[0]}" if missing else None


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a whole checkpoint."""
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    return state


def check_same_run(path: Path, run: Mapping[str, Any]) -> None:
    """Raises LoRAError, listing what differs, unless the checkpoint belongs to a run with these settings and data."""
    saved = read_state(path)["run"]
    now = json.loads(json.dumps(run))  # tuples become lists, as in the file
    lines = [
        f"{name}: {saved['settings'].get(name)!r} then, {value!r} now"
        for name, value in now["settings"].items()
        if saved["settings"].get(name) != value
    ]
    if saved["base"] != now["base"]:
        lines.append("the base model's weights: others than then")
    if saved["data"] != now["data"] and not lines:
        lines.append("the training data: other examples, or another tokenizer, than then")
    if lines:
        raise LoRAError(
            f"{path} is of a run that differs: {'; '.join(lines)}. Resume with the settings of then, or start anew "
            "with another --output."
        )


# ---- loading ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_parameters(model: nn.Module, path: Path) -> None:
    """Sets every trained tensor to what it was; LoRAError, before any is changed, where names or shapes differ."""
    expected, saved = trained_tensors(model), load_file(path / PARAMETERS)
    _check_tensors(path / PARAMETERS, saved, expected)
    for name, parameter in expected.items():
        parameter.copy_(saved[name])


def load_optimizer(trainer: Any, path: Path) -> None:
    """Gives a fresh optimizer and schedule the state they had."""
    optimizer, named = trainer.optimizer, list(_optimised(trainer))
    with safe_open(path / OPTIMIZER, framework="pt") as file:
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    moments = {key: parameter for name, _, parameter in named for key in (f"{name}|exp_avg", f"{name}|exp_avg_sq")}
    _check_tensors(path / OPTIMIZER, {k: v for k, v in saved.items() if not k.endswith("|step")}, moments)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in saved.items():
        name, _, what = key.rpartition("|")
        number = next(number for other, number, _ in named if other == name)
        state.setdefault(number, {})[what] = value
    stored = read_state(path)
    groups = optimizer.state_dict()["param_groups"]
    for group, rates in zip(groups, stored["rates"], strict=True):
        group.update(rates)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    trainer.lr_scheduler.load_state_dict({**trainer.lr_scheduler.state_dict(), **stored["schedule"]})


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


def _check_tensors(file: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names and shapes: a fused optimizer would write past the end of a tensor that is too small."""
    for name in sorted(found.keys() | expected.keys()):
        have, want = (list(tensors[name].shape) if name in tensors else "absent" for tensors in (found, expected))
        if have != want:
            raise LoRAError(
                f"{file}: {name} is {have}, expected {want}: the checkpoint is of another model or adapter."
            )


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _is_plain(value: Any) -> bool:
    """Whether JSON gives it back as it was: numbers, and lists of numbers."""
    if isinstance(value, list):
        return all(isinstance(entry, (int, float)) for entry in value)
    return value is None or isinstance(value, (bool, int, float))


def _hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Makes sure that a file's or directory's contents are on the disk before the rename that makes them count."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
