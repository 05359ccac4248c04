"""Adapter files, both ways: what `save_adapter` writes PEFT reads, what PEFT writes `load_adapter` reads.

The format is PEFT's (`lora.peft_format`), with a record of our own in its metadata (`lora.adapter_check`).

A PiSSA or OLoRA adapter is s (B A - B0 A0) (see `lora.initialise`), which is a plain adapter of twice the rank,
[A; A0] and [B, -B0]: so it is written, and taken apart again.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from lora import dispatch
from lora.adapter_check import (
    RECORD,
    RECORD_DIGEST,
    VERSION,
    Source,
    check_base_model,
    check_copies,
    digest_of,
    open_source,
    read_value,
    sampled,
    tensor_digest,
)
from lora.adapters import (
    AdapterState,
    _refuse_merged,
    _require,
    checked_name,
    disable_adapters,
    refresh,
    state_of,
    withdraw,
)
from lora.distributed import refuse_sharded, whole, writes
from lora.errors import LoRAError
from lora.layers import AdapterLayer, LoRAEmbedding, LoRAParameter, adapter_layers, saved_modules
from lora.meter import meter
from lora.peft_format import (
    CONFIG_FILE,
    PICKLE_FILE,
    PREFIX,
    REPEATED_STARTS,
    WEIGHTS_FILE,
    base_name,
    bias_key,
    packed,
    tensor_key,
    to_peft,
    unpacked,
    wrapper_paths,
    write_tensors,
)

SAMPLED_MODULES = 16


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> Path:
    """Writes one adapter as PEFT does: adapter_config.json and adapter_model.safetensors.

    The tensors keep their dtype. A merged or disabled adapter is saved as it is; so are trained biases and
    modules_to_save. Each file replaces its predecessor in one step, when both are on the disk: an interrupted save
    leaves what was there. Of a sharded model (`lora.distributed.shard`) every process calls this, and the first writes.

    Args:
        directory: made if need be; an adapter not called "default" goes to a subdirectory of its name.

    Returns: the directory that holds the two files.
    Raises: LoRAError, with nothing written, for an unknown adapter or a tensor that is not finite; and, with the
    previous files in place, where the disk is full or cannot be written.
    """
    adapter = gather_adapter(model, adapter_name)
    return write_adapter(adapter, directory) if writes(model) else folder_of(adapter_name, directory)


class Gathered(NamedTuple):
    """An adapter ready to be written: whole tensors on the CPU, the file's metadata, the config's text."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: str


def gather_adapter(model: nn.Module, adapter_name: str = "default") -> Gathered:
    """What `save_adapter` writes. Of a sharded model all processes ask for it, and all have it."""
    checked_name(adapter_name)
    model = _bare(model)
    state = state_of(model)
    _require(state, adapter_name)
    config = state.configs[adapter_name]
    doubled = any(adapter_name in layer.initial_A for _, layer in adapter_layers(model))
    tensors = _gathered(model, adapter_name)
    text = json.dumps(to_peft(model, config, adapter_name, doubled), indent=2) + "\n"  # patterns: the first key wins
    record = {
        "version": VERSION,
        "config": config.to_dict(),
        "doubled": doubled,
        "config_digest": digest_of(text.encode()),
        "digests": [tensor_digest(tensors[key]) for key in sorted(tensors)],
        "base": base_name(model),
        "samples": _samples(model, adapter_name),
    }
    document = json.dumps(record)
    metadata = {"format": "pt", RECORD: document, RECORD_DIGEST: digest_of(document.encode())}
    return Gathered(adapter_name, tensors, metadata, text)


def write_adapter(adapter: Gathered, directory: str | os.PathLike[str]) -> Path:
    """Writes what `gather_adapter` gave; the directory and errors are `save_adapter`'s."""
    folder = folder_of(adapter.name, directory)
    _write(folder, adapter.tensors, adapter.metadata, adapter.config)
    return folder


def folder_of(adapter_name: str, directory: str | os.PathLike[str]) -> Path:
    """Where an adapter is saved: subdirectories tell those apart that are not called "default"."""
    folder = Path(directory).expanduser()
    return folder if adapter_name == "default" else folder / adapter_name


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default", *, check_base: bool = True
) -> nn.Module:
    """Reads an adapter that `save_adapter` or PEFT wrote, in place.

    A model without adapters is injected, and the adapter active and trainable; beside other adapters it is added,
    and `set_adapter` makes it active. Everything is checked before the model is touched. No initialisation is run and
    no random number drawn; only for a PiSSA or OLoRA adapter of PEFT's own the start is computed again.

    Args:
        directory: the one with the two files, or its parent where that has a subdirectory called `adapter_name`.
        check_base: refuse an adapter of another base model. Our files are compared by samples of the base weights:
            any quantisation of the same model passes, and so does one fine-tuned from it. PEFT's are compared by the
            last part of base_model_name_or_path, and by the base weights they may hold. False loads all the same.

    Returns: the same model.
    Raises: LoRAError, with the model as it was, for a name that is taken; a config that asks for what is not built
    here; a file that is missing, damaged, a pickle, or not of this config; tensors of other shapes or dtypes than the
    model needs, or not finite; another base model.
    """
    checked_name(adapter_name)
    bare = _bare(model)
    refuse_sharded(bare, "load_adapter")
    injected = isinstance(getattr(bare, "lora_state", None), AdapterState)
    if injected and adapter_name in state_of(bare).configs:
        raise LoRAError(
            f"there is already an adapter {adapter_name!r}: load it under another adapter_name, or call "
            "lora.delete_adapter first."
        )
    if any(parameter.is_meta for parameter in bare.parameters()):
        raise LoRAError(f"this {type(bare).__name__} is on the meta device, without values: load its weights first.")
    source, values = _read(bare, _folder(Path(directory).expanduser(), adapter_name), check_base)
    with meter("loading the adapter"):
        _install(bare, adapter_name, source, values)
    return model


def restore_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> nn.Module:
    """Gives an adapter that the model has the values it had when `save_adapter` wrote it: in place, bit for bit.

    The parameters stay the objects they are, which an optimizer and a fused model hold. Which adapters are active, and
    what trains, stays as well. For going on with a run from one of its checkpoints, so the configs must agree.

    Args:
        directory: as `load_adapter`'s.

    Returns: the same model.
    Raises: LoRAError, with the model as it was, for an adapter that the model lacks or has merged; a file that
    `save_adapter` did not write; another config, with what differs; and whatever `load_adapter` refuses.
    """
    checked_name(adapter_name)
    bare = _bare(model)
    refuse_sharded(bare, "restore_adapter")
    state = state_of(bare)
    _require(state, adapter_name)
    _refuse_merged(bare, "restore_adapter")
    source, values = _read(bare, _folder(Path(directory).expanduser(), adapter_name), check_base=True)
    if source.record is None:
        raise LoRAError(
            f"{source.path} was not written by save_adapter, so its values cannot be told to be those of the adapter "
            f"{adapter_name!r} as it is here: lora.load_adapter reads it, as a new adapter."
        )
    then, now = source.config.to_dict(), state.configs[adapter_name].to_dict()
    differ = [f"{name} was {then[name]!r} and is {now[name]!r}" for name in now if then[name] != now[name]]
    if differ:
        raise LoRAError(
            f"{source.path.parent} is of an adapter with another config than {adapter_name!r} of this model: "
            f"{'; '.join(differ)}. Inject with the config of then, or read it with lora.load_adapter."
        )
    _put(bare, adapter_name, source, values)
    return model


def _read(model: nn.Module, folder: Path, check_base: bool) -> tuple[Source, dict[str, Tensor]]:
    """The adapter in a folder, checked in every way, and its values by the names the model gives them."""
    injected = isinstance(getattr(model, "lora_state", None), AdapterState)
    try:
        text = (folder / CONFIG_FILE).read_bytes()
        with (folder / WEIGHTS_FILE).open("rb") as file:
            source = open_source(model, folder, text, file)
            # the base weights are what is compared
            with meter("loading the adapter"), disable_adapters(model) if injected else nullcontext():
                if check_base:
                    check_base_model(source)
                values = {key: read_value(source, name) for key, name in source.names.items()}
                if check_base:
                    check_copies(source, values)
    except OSError as error:
        raise LoRAError(f"cannot read the adapter in {folder}: {error.strerror or error}.") from None
    return source, values


def _gathered(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """One adapter's tensors as the file holds them: finite, on the CPU, contiguous."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in _tensors_of(model, adapter_name):
        if tensor.is_meta:
            raise LoRAError(f"{key} is on the meta device, without values: there is nothing to save.")
        if not bool(torch.isfinite(tensor).all()):
            raise LoRAError(
                f"{key} has {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values that are not finite, "
                "expected none: nothing was saved. Training has diverged: go back to an earlier checkpoint."
            )
        tensors[key] = tensor.detach().cpu().contiguous()
    return tensors


def _tensors_of(model: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one adapter, by their name in the file."""
    adapted = set()
    layers = [(path, layer) for path, layer in adapter_layers(model) if name in layer.lora_A]
    files = wrapper_paths(model, [path for path, layer in layers if isinstance(layer, LoRAParameter)])
    for path, layer in layers:
        params: dict[str, Tensor] = {role: whole(value.detach()) for role, value in layer.adapter_params(name).items()}
        if name in layer.initial_A:
            params["lora_A"], params["lora_B"] = layer.plain_pair(name, whole)
        for role, value in params.items():
            adapted.add(path)
            yield tensor_key(files.get(path, path), role, isinstance(layer, LoRAEmbedding)), packed(role, value)
    for path, module in saved_modules(model):
        if name in module.copies:
            values = module.copies[name].state_dict()
            yield from ((f"{PREFIX}{path}.{key}", whole(value)) for key, value in values.items())
    state, seen = state_of(model), set()
    for path, bias in state.biases.items() if state.biases_trained == name else ():
        if id(bias.parameter) not in seen:  # else shared by two paths
            seen.add(id(bias.parameter))
            module_path = path.removesuffix(".bias")
            value = bias.parameter if state.trained_biases_in_use else bias.resting
            yield bias_key(module_path, module_path in adapted), whole(value)


def _samples(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Samples of the base weights of up to SAMPLED_MODULES adapted modules, evenly spread, in hexadecimal."""
    layers = [(path, layer) for path, layer in adapter_layers(model) if adapter_name in layer.lora_A]
    chosen = torch.linspace(0, len(layers) - 1, min(SAMPLED_MODULES, len(layers))).round().int().tolist()
    with disable_adapters(model):  # a merged layer's original weight
        return {layers[i][0]: sampled(layers[i][1]).numpy().tobytes().hex() for i in chosen}


def _write(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str], text: str) -> None:
    """Writes both files beside their places and moves them there; after any failure the old ones are back."""
    new_weights, new_config, old_weights = (
        folder / f".{name}.{os.getpid()}.tmp" for name in (WEIGHTS_FILE, CONFIG_FILE, "old")
    )
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with new_weights.open("wb") as file:
            write_tensors(file, tensors, metadata)
            _sync(file)
        with new_config.open("wb") as file:
            file.write(text.encode())
            _sync(file)
        _replace(folder, new_weights, new_config, old_weights)
        made = False
    except OSError as error:
        raise LoRAError(
            f"cannot write the adapter to {folder}: {error.strerror or error}. What was there before is as it was: "
            "make room or name another directory, and save again."
        ) from None
    finally:
        for path in (new_weights, new_config, old_weights):
            with suppress(OSError):
                path.unlink()
        if made:
            with suppress(OSError):
                folder.rmdir()


def _replace(folder: Path, new_weights: Path, new_config: Path, old_weights: Path) -> None:
    """Moves the two files to their places; only a crash between the two moves leaves one of each, and digests tell."""
    weights, config = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    replaced = weights.exists()
    old_weights.unlink(missing_ok=True)  # a crash may have left one
    with suppress(OSError):  # not every file system has links: then a failure is like a crash
        old_weights.hardlink_to(weights)
    new_weights.replace(weights)
    try:
        new_config.replace(config)
    except BaseException:
        if old_weights.exists():
            old_weights.replace(weights)
        elif not replaced:
            weights.unlink()
        raise
    with suppress(OSError):  # nor can every file system do this; the files themselves are on the disk
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync(file: BinaryIO) -> None:
    """Has the operating system write what was written to the disk now."""
    file.flush()
    os.fsync(file.fileno())


def _folder(directory: Path, name: str) -> Path:
    """Where an adapter's two files are: the directory itself, or its subdirectory of the adapter's name."""
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "does not exist"
        raise LoRAError(f"{directory} {found}, expected a directory with {CONFIG_FILE} and {WEIGHTS_FILE}.")
    inside = [path.parent for path in sorted(directory.glob(f"*/{CONFIG_FILE}"))]
    own = [folder for folder in inside if folder.name == name != "default"]
    folder = own[0] if own else directory
    if not (folder / CONFIG_FILE).is_file():
        there = f" It has adapters in {', '.join(repr(path.name) for path in inside)}: name one." if inside else ""
        raise LoRAError(f"{directory} has no {CONFIG_FILE}, expected it beside {WEIGHTS_FILE}.{there}")
    if (folder / WEIGHTS_FILE).is_file():
        return folder
    if (folder / PICKLE_FILE).is_file():
        raise LoRAError(
            f"{folder / PICKLE_FILE} is a pickle, which can run any code when it is opened, so it is not read; "
            f"expected {WEIGHTS_FILE}. Where you trust it, load it with PEFT and save it again as safetensors."
        )
    raise LoRAError(f"{folder} has no {WEIGHTS_FILE}, expected it beside {CONFIG_FILE}: fetch the weights, too.")


def _install(model: nn.Module, adapter_name: str, source: Source, values: Mapping[str, Tensor]) -> None:
    """Gives the model the adapter. What fails from here on (memory, say) is undone."""
    fresh = not isinstance(getattr(model, "lora_state", None), AdapterState)
    config, repeat = source.config, source.record is None and source.config.init_lora_weights in REPEATED_STARTS
    start = config if repeat else config.replace(init_lora_weights=True, use_dora=False)  # cheap, and replaced below
    with torch.random.fork_rng(devices=[]):  # initial values are drawn on the CPU
        if fresh:
            dispatch.inject(model, start, adapter_name)
        else:
            dispatch.add_adapter(model, start, adapter_name)
    try:
        _put(model, adapter_name, source, values)
        state_of(model).configs[adapter_name] = config
        refresh(model, adapter_name)
    except BaseException:
        if fresh:
            dispatch.eject(model)
        else:
            _take_out(model, adapter_name)
        raise


@torch.no_grad()
def _put(model: nn.Module, adapter_name: str, source: Source, values: Mapping[str, Tensor]) -> None:
    """Puts the file's values in the places that injection made."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, slot in source.wanted.items():
        parts[slot.path][slot.name or slot.role] = values[key]
    for path, layer in adapter_layers(model):
        if adapter_name in layer.lora_A:
            _fill(layer, adapter_name, parts[path], bool(source.record and source.record.doubled))
    for path, module in saved_modules(model):
        if adapter_name in module.copies:
            module.copies[adapter_name].load_state_dict(parts[path])
    state = state_of(model)
    for path, bias in state.biases.items() if state.biases_trained == adapter_name else ():
        trained = bias.parameter.data if state.trained_biases_in_use else bias.resting
        trained.copy_(parts[path.removesuffix(".bias")]["bias"])


def _fill(layer: AdapterLayer, name: str, parts: Mapping[str, Tensor], doubled: bool) -> None:
    """Gives one layer its A, B and magnitude, on the device and in the dtype of those it has."""
    place: dict[str, Any] = {"device": layer.lora_A[name].device, "dtype": layer.lora_A[name].dtype}
    lora_A, lora_B = parts["lora_A"].to(**place), parts["lora_B"].to(**place)
    if layer.lora_A[name].dim() == 3:
        experts = len(layer.lora_A[name])
        lora_A, lora_B = unpacked("lora_A", lora_A, experts), unpacked("lora_B", lora_B, experts)
    found = {"lora_A": lora_A, "lora_B": lora_B}
    if doubled:
        (lora_A, initial_A), (lora_B, initial_B) = lora_A.chunk(2), lora_B.chunk(2, dim=1)
        found = {"lora_A": lora_A, "lora_B": lora_B, "initial_A": initial_A, "initial_B": -initial_B}
    if "lora_magnitude" in parts:
        found["lora_magnitude"] = parts["lora_magnitude"].to(**place)
    for role, value in found.items():
        params = getattr(layer, role)
        if name in params:
            params[name].copy_(value)
        else:
            trains = not role.startswith("initial")
            params[name] = nn.Parameter(value.clone(memory_format=torch.contiguous_format), requires_grad=trains)


def _take_out(model: nn.Module, adapter_name: str) -> None:
    """Undoes `add_adapter` for an adapter that is not active."""
    state = state_of(model)
    state.configs.pop(adapter_name, None)
    if state.biases_trained == adapter_name:
        state.biases, state.biases_trained = {}, None
    withdraw(model, adapter_name)
    refresh(model)


def _bare(model: nn.Module) -> nn.Module:
    """The model inside what DistributedDataParallel or torch.compile put around it."""
    for inner in (getattr(model, "_orig_mod", None), getattr(model, "module", None)):
        if isinstance(inner, nn.Module) and isinstance(getattr(inner, "lora_state", None), AdapterState):
            return inner
    return model
