"""PEFT's adapter directory as data: the fields of its config, the names of its tensors, the bytes of its file.

    adapter_config.json          what PEFT's LoraConfig holds, with the names that were really adapted
    adapter_model.safetensors    one tensor a role, `base_model.model.` + the module's path +

        .lora_A.weight [r, in]        .lora_embedding_A [r, vocab]     .lora_magnitude_vector [out]   (DoRA)
        .lora_B.weight [out, r]       .lora_embedding_B [dim, r]       .base_layer.bias, .bias        (trained biases)
        .weight, ...                  a module trained in full (modules_to_save)

A safetensors file is a length (8 bytes, little-endian), that many bytes of JSON, and the tensors' bytes without gaps.
The header says everything but the values, so a file is checked against the model before a tensor is read.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor, nn

from lora.adapters import walk
from lora.config import LoRAConfig, matches
from lora.errors import LoRAError, did_you_mean
from lora.layers import AdapterLayer, LoRAParameter, SavedModule, adapter_layers, base_of, is_conv1d, linear_shape
from lora.reference.inject import match, match_parameters

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
TABLE_NAMES = NAMES | {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}

OURS = tuple(LoRAConfig.__dataclass_fields__)
INFORMATIVE = (  # says nothing about what the adapter computes
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip
UNSUPPORTED = (  # changes what it computes, unless it is null, false or empty
    "alora_invocation_tokens", "arrow_config", "corda_config", "enable_lora", "ensure_weight_tying", "eva_config",
    "kasa_config", "layer_replication", "loftq_config", "lora_bias", "lora_ga_config", "megatron_config",
    "merge_weights", "monteclora_config", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
INERT_STARTS = (True, False, "gaussian", "orthogonal")  # leave the base weights alone, so the tensors say it all
REPEATED_STARTS = ("pissa", "olora")  # PEFT takes them off the base weights; they follow from those, so do it again
ADDED_BY_TASK = {  # names PEFT adds to modules_to_save, whichever of them the model has
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WHOLE = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES = FLOATING | WHOLE | {"BOOL": torch.bool}
OTHER_FILES = {  # what is found in a file's place, by its first bytes
    b"version ": "a Git LFS pointer, not the file it stands for: run `git lfs pull` where it came from",
    b"PK\x03\x04": "a zip archive, which torch.save makes: pickles are not read, save it as safetensors",
}


class Slot(NamedTuple):
    """A tensor that an adapter needs."""

    path: str  # of the module in the base model
    role: str  # "lora_A", "lora_B", "lora_magnitude", "bias", or "saved" for a module trained in full
    name: str  # "saved" only: of the parameter in the module
    shape: tuple[int, ...]
    floating: bool = True


class Stored(NamedTuple):
    """A tensor as a file's header describes it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # in the file
    end: int


def tensor_key(path: str, role: str, table: bool = False) -> str:
    """The name of an adapter's tensor in the file."""
    return f"{PREFIX}{path}.{(TABLE_NAMES if table else NAMES)[role]}"


def bias_key(path: str, adapted: bool) -> str:
    """The name of a trained bias: PEFT's own layer holds it where the module is adapted."""
    return f"{PREFIX}{path}.base_layer.bias" if adapted else f"{PREFIX}{path}.bias"


def packed(role: str, tensor: Any) -> Tensor:
    """An adapter's tensor as the file has it: experts' A one below the other, of their B the r first columns of all,
    then the second of all, and so on.

    [experts, r, in] -> [experts · r, in], [experts, out, r] -> [out, r · experts]; others as they are.
    """
    if tensor.dim() == 3:
        tensor = tensor.flatten(0, 1) if role == "lora_A" else tensor.permute(1, 2, 0).flatten(1)
    return cast(Tensor, tensor)


def unpacked(role: str, tensor: Tensor, experts: int) -> Tensor:
    """The inverse of `packed`."""
    if role == "lora_A":
        return tensor.reshape(experts, -1, tensor.shape[1])
    return tensor.reshape(len(tensor), -1, experts).permute(2, 0, 1).contiguous()


def wrapper_paths(model: nn.Module, parameters: Iterable[str]) -> dict[str, str]:
    """By which path the file calls each adapted parameter: PEFT puts wrappers around its module in the order in which
    the module has its parameters, and a wrapper inside another is its `base_layer`."""
    by_module: defaultdict[str, list[str]] = defaultdict(list)
    for path in parameters:
        by_module[path.rpartition(".")[0]].append(path)
    found: dict[str, str] = {}
    for path, adapted in by_module.items():
        order = list(base_of(model.get_submodule(path))._parameters)
        adapted.sort(key=lambda each: -order.index(each.rpartition(".")[2]))  # the last is the outermost
        found |= {each: path + ".base_layer" * depth for depth, each in enumerate(adapted)}
    return found


def slots(model: nn.Module, config: LoRAConfig, doubled: bool = False) -> dict[str, Slot]:
    """The tensors that an adapter with `config` has in `model`, by their name in the file.

    Args:
        doubled: the file holds each A and B beside what it started from (PiSSA, OLoRA): twice the rank.

    Raises: LoRAError where the config does not fit the model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `inject` matches again and says it
        targets, saved = match(model, config)
    parameters = match_parameters(model, config)
    found: dict[str, Slot] = {}
    for path, file_path in wrapper_paths(model, parameters).items():
        found |= _parameter_slots(path, file_path, base_of(parameters[path][1]), config.rank_of(path))
    for path, module in _once(targets):
        base = base_of(module)
        table = isinstance(base, nn.Embedding)
        fan_out, fan_in = (base.embedding_dim, base.num_embeddings) if table else linear_shape(base)
        rank = config.rank_of(path) * (1 + doubled)
        shapes: dict[str, tuple[int, ...]] = {"lora_A": (rank, fan_in), "lora_B": (fan_out, rank)}
        if config.use_dora:
            shapes["lora_magnitude"] = (fan_out,)
        found |= {tensor_key(path, role, table): Slot(path, role, "", shape) for role, shape in shapes.items()}
    for path, module in _once(saved):
        for name, value in base_of(module).state_dict().items():
            found[f"{PREFIX}{path}.{name}"] = Slot(path, "saved", name, tuple(value.shape), value.is_floating_point())
    for path, bias in trainable_biases(model, config, set(targets), set(saved)):
        found[bias_key(path, path in targets)] = Slot(path, "bias", "", tuple(bias.shape))
    return found


def _parameter_slots(path: str, file_path: str, owner: nn.Module, rank: int) -> dict[str, Slot]:
    """A and B of one adapted parameter: see `packed`."""
    weight = owner.get_parameter(path.rpartition(".")[2])
    *experts, fan_out, fan_in = weight.shape
    if experts and getattr(owner, "is_transposed", False):
        fan_out, fan_in = fan_in, fan_out
    total = rank * math.prod(experts)
    shapes = {"lora_A": (total, fan_in), "lora_B": (fan_out, total)}
    return {tensor_key(file_path, role): Slot(path, role, "", shape) for role, shape in shapes.items()}


def trainable_biases(
    model: nn.Module, config: LoRAConfig, targets: set[str], saved: set[str]
) -> Iterator[tuple[str, nn.Parameter]]:
    """The base biases that `config.bias` trains, with their module's path; a shared one comes once."""
    seen: set[int] = set()
    for path, module in walk(model):
        inside = any(path == name or path.startswith(name + ".") for name in saved)
        bias = base_of(module)._parameters.get("bias")
        if config.bias == "none" or bias is None or inside or isinstance(module, SavedModule) or id(bias) in seen:
            continue
        if config.bias == "all" or path in targets:
            seen.add(id(bias))
            yield path, bias


def to_peft(model: nn.Module, config: LoRAConfig, adapter_name: str, doubled: bool) -> dict[str, Any]:
    """adapter_config.json for an adapter of `model`: whoever reads it adapts exactly the same modules.

    The names are those that were adapted, so exclude_modules and layers_to_transform have done their part and are
    null. A doubled rank keeps alpha / r (rsLoRA: alpha / sqrt(r)) by a larger alpha.
    """
    wrappers = [(path, m) for path, m in walk(model) if isinstance(m, AdapterLayer)]
    adapted = [path for path, m in wrappers if adapter_name in m.lora_A and not isinstance(m, LoRAParameter)]
    stacks = [path for path, m in adapter_layers(model) if isinstance(m, LoRAParameter) and adapter_name in m.lora_A]
    saved = [path for path, m in walk(model) if isinstance(m, SavedModule) and adapter_name in m.copies]
    bases = [base_of(model.get_submodule(path)) for path in adapted]
    more, rank = (math.sqrt(2) if config.use_rslora else 2, 2) if doubled else (1, 1)
    return {
        "alpha_pattern": {key: alpha * more for key, alpha in config.alpha_pattern.items()},
        "auto_mapping": None,
        "base_model_name_or_path": base_name(model),
        "bias": config.bias,
        "exclude_modules": None,
        "fan_in_fan_out": any(is_conv1d(base) for base in bases),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": config.lora_alpha * more,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": config.r * rank,
        "rank_pattern": {key: r * rank for key, r in config.rank_pattern.items()},
        "revision": None,
        "target_modules": compact(adapted, list(_all_paths(model))),
        "target_parameters": _compact_parameters(stacks, model),
        "task_type": "CAUSAL_LM" if is_causal_lm(model) else None,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def compact(adapted: Sequence[str], everything: Sequence[str]) -> list[str] | str:
    """Few names that match exactly `adapted` out of `everything`, in target_modules' notation.

    The last part of a path where that is enough, else whole paths. One path can be the end of another: then only a
    regular expression tells them apart.
    """
    wanted, named = set(adapted), _by_end(everything)
    ends = {path: path.rpartition(".")[2] for path in adapted}
    names = {end if named[end] <= wanted else path for path, end in ends.items()}
    if set().union(*(named[name] for name in names)) == wanted:
        return sorted(names)
    return "|".join(re.escape(path) for path in adapted)


def _compact_parameters(adapted: Sequence[str], model: nn.Module) -> list[str] | None:
    """As `compact`, for target_parameters, which knows no regular expressions."""
    everything = [f"{path}.{name}" for path, module in walk(model) for name in base_of(module)._parameters]
    names = compact(adapted, everything)
    return (sorted(adapted) if isinstance(names, str) else names) or None


def from_peft(fields: Mapping[str, Any], model: nn.Module) -> LoRAConfig:
    """The LoRAConfig that means what PEFT's config means for `model`.

    Raises: LoRAError for what is no LoRA config, and for every field that asks for something not built here.
    """
    check_fields(fields)
    values = {name: fields[name] for name in OURS if fields.get(name) is not None}
    values.setdefault("target_modules", [])  # null, beside target_parameters
    for name in ("layers_to_transform", "layers_pattern", "modules_to_save", "exclude_modules", "target_parameters"):
        if name in values and values[name] in ([], ""):
            del values[name]  # to PEFT, empty is none
    if "modules_to_save" in values:
        values["modules_to_save"] = _saved_names(values["modules_to_save"], fields.get("task_type"), model)
    start = values.get("init_lora_weights", True)
    if start not in (*INERT_STARTS, *REPEATED_STARTS):
        raise LoRAError(
            f"init_lora_weights is {start!r}, and PEFT starts such an adapter from changed base weights that the file "
            f"does not hold. Expected one of {', '.join(map(repr, (*INERT_STARTS, *REPEATED_STARTS)))}: save it from "
            "PEFT as a plain adapter, with save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    return _without_excluded_names(LoRAConfig(**values), model)


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raises LoRAError unless every field of a PEFT config is known, and inert where it is not ours."""
    if fields.get("peft_type") != "LORA":
        raise LoRAError(
            f"peft_type is {fields.get('peft_type')!r}, expected 'LORA': this is another kind of adapter, which only "
            "PEFT can load."
        )
    known = (*OURS, *INFORMATIVE, *UNSUPPORTED)
    for name, value in fields.items():
        if name not in known:
            raise LoRAError(
                f"there is an unknown field {name!r} (= {value!r}).{did_you_mean(name, known)} A newer PEFT may have "
                "written it: remove it if you know that it changes nothing, or upgrade lora."
            )
        if name in UNSUPPORTED and value:
            raise LoRAError(
                f"{name} is {value!r}, a feature of PEFT that changes what the adapter computes and is not built "
                "here; expected it to be absent, null or false. Load this adapter with PEFT."
            )
    if not fields.get("target_modules") and not fields.get("target_parameters"):
        raise LoRAError(
            f"target_modules is {fields.get('target_modules')!r}, expected the names of the adapted modules: add them."
        )


def _saved_names(names: Any, task: Any, model: nn.Module) -> Any:
    """PEFT's modules_to_save, which any path ending in these letters matches: "norm" is input_layernorm too.

    Kept as they are where the dot makes no difference, else the whole paths.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return names  # LoRAConfig says what is wrong
    paths = [path for path, _ in walk(model) if path]
    matching = {name: [path for path in paths if path.endswith(name)] for name in names}
    names = [name for name in names if matching[name] or name not in ADDED_BY_TASK.get(str(task), ())]
    found = [path for path in paths if any(path in matching[name] for name in names)]
    if found == [path for path in paths if matches(tuple(names), path)]:
        return names or None
    return [name for name in names if not matching[name]] + found


def _without_excluded_names(config: LoRAConfig, model: nn.Module) -> LoRAConfig:
    """Drops the target_modules that name excluded modules only: PEFT writes "all-linear" out before it excludes."""
    if isinstance(config.target_modules, str) or not (config.exclude_modules or config.modules_to_save):
        return config
    paths = [path for path, _ in walk(model) if path]
    saved = [path for path in paths if matches(config.modules_to_save, path)]
    left = {path for path in paths if not matches(config.exclude_modules, path)}
    left -= {path for path in left for outer in saved if f"{path}.".startswith(f"{outer}.")}
    named = _by_end(paths)
    names = [name for name in config.target_modules if name not in named or named[name] & left]
    return config.replace(target_modules=names or config.target_modules)


def _by_end(paths: Iterable[str]) -> defaultdict[str, set[str]]:
    """The paths that a list entry of target_modules names: those that are it or end in a dot and it."""
    named = defaultdict(set)
    for path in paths:
        parts = path.split(".")
        for start in range(len(parts)):
            named[".".join(parts[start:])].add(path)
    return named


def base_name(model: nn.Module) -> str | None:
    """What the model was loaded from, where it knows."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def is_causal_lm(model: nn.Module) -> bool:
    """Whether transformers can generate text with this decoder."""
    can_generate = getattr(model, "can_generate", None)
    seq2seq = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return callable(can_generate) and bool(can_generate()) and not seq2seq


def read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file, in the order of their bytes, and its metadata; no value is read.

    Raises: LoRAError for a file that is truncated, too long, or not safetensors at all.
    """
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if size < 8 or 8 + length > size:
        other = next((what for magic, what in OTHER_FILES.items() if start.startswith(magic)), "")
        raise _damaged(path, f"is {other}" if other else f"ends after {size:,} bytes, inside its header")
    try:
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        tensors = {name: _stored(entry, 8 + length) for name, entry in header.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _damaged(path, "has a header that is not safetensors'") from None
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1].begin))
    position = 8 + length
    for name, tensor in tensors.items():
        if tensor.begin != position:
            raise _damaged(path, f"has {name} begin at byte {tensor.begin:,}, expected {position:,}")
        position = tensor.end
    if position != size:
        raise _damaged(path, f"is {size:,} bytes long, but its header says {position:,}")
    return tensors, metadata


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, tensor by tensor: the same tensors and metadata give the same bytes.

    The widest dtypes come first and the header's length is a multiple of 8, so that every tensor is aligned.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in ordered.items():
        end = position + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in ordered.values():
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _stored(entry: Any, start: int) -> Stored:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    counts = (*shape, begin, end)
    if not all(type(count) is int and count >= 0 for count in counts) or not isinstance(dtype, str):
        raise TypeError
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError
    return Stored(dtype, shape, start + begin, start + end)


def read_tensor(file: BinaryIO, tensor: Stored, path: Path) -> Tensor:
    """The values of one tensor."""
    raw = bytearray(tensor.end - tensor.begin)
    file.seek(tensor.begin)
    if file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
        raise _damaged(path, "became shorter while it was read")
    empty = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    return torch.frombuffer(raw, dtype=empty.dtype).view(tensor.shape) if raw else empty


def _damaged(path: Path, what: str) -> LoRAError:
    return LoRAError(
        f"{path} {what}; expected a whole safetensors file. Nothing was loaded: fetch or copy the file again, or save "
        "the adapter again."
    )


def _once(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Each module with the first of its paths."""
    seen: set[int] = set()
    for path, module in modules.items():
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module


def _all_paths(model: nn.Module) -> Iterator[str]:
    """Every module's path in the base model, also inside modules that an adapter trains in full."""
    for path, module in walk(model):
        yield path
        if isinstance(module, SavedModule):
            yield from (f"{path}.{name}" for name, _ in module.base_layer.named_modules() if name)
