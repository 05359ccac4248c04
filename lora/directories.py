"""Model directories written tensor by tensor: a model with its adapter merged, or quantised to NF4.

`lora.load` maps a directory's files into memory and reads a tensor when it is used. So one weight at a time is read,
changed, written and let go, and a model larger than the memory can be merged. The output is written beside its place
and renamed when it is whole.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora import dispatch, models
from lora.adapter_io import load_adapter
from lora.adapters import trainable_parameters, walk
from lora.errors import LoRAError
from lora.layers import AdapterLayer, LoRAParameter, SavedModule, adapter_layers
from lora.meter import meter
from lora.nf4_layer import NF4Linear
from lora.reference.linear import dense_weight
from lora.reference.merge import merge_layer

SHARD_BYTES = 5 << 30
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf", "*.pt", "*.pth")


class Entry(NamedTuple):
    """A tensor to be written, made only when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# ---- merging ---------------------------------------------------------------------------------------------------


def merge_directory(
    name: str, adapter: str, output: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> str:
    """Writes the model `name` with `adapter` merged into its weights, as safetensors that any program loads.

    Args:
        name, adapter: as for `lora.load` and `lora.load_adapter`. An NF4 model is decoded.
        dtype: of what is written; None keeps 16 bits where the base has them, else bfloat16.
        overwrite: replace `output` if it is there.

    Returns: a report, one line. Raises: LoRAError, with nothing written.
    Memory: the adapter and two copies of one weight, beside pages of the files that can be dropped.
    """
    target = checked_output(output, overwrite, Path(name), Path(adapter))
    with meter("loading the model"):
        model, tokenizer = models.load(name)
        load_adapter(model, adapter)
    wanted = _output_dtype(model, dtype)
    count = len(list(adapter_layers(model)))
    untied = _unties(model)
    with replaced(target) as directory:
        parameters = any(isinstance(layer, LoRAParameter) for _, layer in adapter_layers(model))
        if parameters or getattr(model, "_weight_conversions", None):  # files with other names: transformers knows how
            with meter("merging and writing"):
                whole: Any = dispatch.merge_and_eject(model.to(torch.float32))
                whole.to(wanted).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        else:
            write_weights(dict(merged_entries(model, wanted, untied)), directory)
            changes = {"dtype": str(wanted).removeprefix("torch."), "quantization_config": None}
            write_rest(model, tokenizer, directory, name, changes | ({"tie_word_embeddings": False} if untied else {}))
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    also = "; the output head is no longer tied to the embedding" if untied else ""
    return (
        f"merged {count} adapted modules into {target} ({str(wanted).removeprefix('torch.')}, {megabytes(size)}){also}"
    )


def merged_entries(model: Any, dtype: torch.dtype, untied: bool) -> Iterator[tuple[str, Entry]]:
    """Every tensor of the merged model, by its name in a plain model."""
    tied = set() if untied else set(getattr(model, "all_tied_weights_keys", None) or {})
    for path, module in walk(model):
        prefix = f"{path}." if path else ""
        if isinstance(module, AdapterLayer):
            yield from ((prefix + key, entry) for key, entry in _layer_entries(path, module, dtype))
            continue
        if isinstance(module, SavedModule):
            tensors = dict(module.current.state_dict())
        else:
            persistent = [b for b in module._buffers if b not in module._non_persistent_buffers_set]
            tensors = {**module._parameters, **{key: module._buffers[key] for key in persistent}}
            if isinstance(module, NF4Linear):
                yield f"{prefix}weight", _decoded(module, dtype)
                tensors = {"bias": module.bias}
        for key, tensor in tensors.items():
            if tensor is not None and prefix + key not in tied:
                yield prefix + key, _plain(tensor, dtype)


def _layer_entries(path: str, layer: AdapterLayer, dtype: torch.dtype) -> Iterator[tuple[str, Entry]]:
    """The merged weight of an adapted layer, and its bias."""
    base = layer.base_layer
    shape = base.quantised.shape if isinstance(base, NF4Linear) else tuple(base.weight.shape)
    yield "weight", Entry(shape, dtype, lambda: merged_weight(layer, path, dtype))
    bias = getattr(base, "bias", None)
    if bias is not None:
        yield "bias", _plain(bias, dtype)


def merged_weight(layer: AdapterLayer, path: str, dtype: torch.dtype) -> Tensor:
    """One layer's merged weight, computed in float32 and rounded once; the layer gives its own weight up for it."""
    base: Any = layer.base_layer
    if isinstance(base, NF4Linear):
        plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(dense_weight(base.quantised, torch.float32), requires_grad=False)
        layer.base_layer = plain
    else:
        base.weight = nn.Parameter(base.weight.detach().float(), requires_grad=False)
    merge_layer(layer, path)
    merged: Tensor = layer.base_layer.weight.detach().to(dtype)
    if not bool(torch.isfinite(merged).all()):
        raise LoRAError(f"{path}: the merged weight overflows {dtype}: choose --dtype bfloat16 or float32.")
    layer.merged = None
    layer.base_layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    return merged


def _unties(model: Any) -> bool:
    """Whether the adapter changes one end of a tied embedding and head, so that each must be written."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    paths = {name.rpartition(".")[0] for pair in ties.items() for name in pair}
    return any(isinstance(module, (AdapterLayer, SavedModule)) for path, module in walk(model) if path in paths)


def _output_dtype(model: nn.Module, named: str | None) -> torch.dtype:
    if named is not None:
        return models.DTYPES[named]
    held = {p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad}
    return next((d for d in (torch.bfloat16, torch.float16) if d in held), torch.bfloat16)


# ---- quantising ------------------------------------------------------------------------------------------------


def quantize_directory(
    name: str, output: str | Path, *, dtype: str | None = None, double_quant: bool = True, overwrite: bool = False
) -> str:
    """Writes the model `name` with its linear layers in NF4, in the layout that bitsandbytes calls pre-quantised.

    `lora.load` reads it back as NF4, and so does transformers where bitsandbytes is installed. The embedding, the
    norms and the head stay in `dtype` (None: 16 bits as the model has them, else bfloat16).

    Returns: a report with the bits a quantised weight takes. Raises: LoRAError, with nothing written.
    """
    target = checked_output(output, overwrite, Path(name))
    with meter("loading the model"):
        model, tokenizer = models.load(name)
    if any(isinstance(module, NF4Linear) for module in model.modules()):
        raise LoRAError(f"{name} is quantised already: give the model it was made from.")
    wanted = _output_dtype(model, dtype)
    before = sum(p.numel() for p in model.parameters())
    dispatch.quantize(model, "nf4", double_quant=double_quant)
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    for layer in layers:
        layer.dtype = wanted
    _tell_of_stacks(model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    entries = {key: _plain(tensor, wanted, key) for key, tensor in model.state_dict().items() if key not in tied}
    with replaced(target) as directory:
        if getattr(model, "_weight_conversions", None):  # files with other names: transformers knows how
            with meter("writing"):
                _in_dtype(model, wanted)
                model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        else:
            write_weights(entries, directory)
            changes = {
                "dtype": str(wanted).removeprefix("torch."),
                "quantization_config": stated(model, wanted, double_quant),
            }
            write_rest(model, tokenizer, directory, name, changes)
    quantised = sum(layer.in_features * layer.out_features for layer in layers)
    held = sum(entry.nbytes for key, entry in entries.items() if _is_nf4_part(key, entry))
    size = sum(entry.nbytes for entry in entries.values())
    return (
        f"quantised {len(layers)} linear layers into {target}: {quantised:,} of {before:,} weights in "
        f"{8 * held / quantised:.3f} bits each, {megabytes(size)} in all"
    )


def _tell_of_stacks(model: nn.Module) -> None:
    """A note where experts stay as they are, which may be most of a model."""
    from lora.nf4_loader import has_stacked_weights  # it imports transformers

    stacks = [(path, module) for path, module in model.named_modules() if has_stacked_weights(module)]
    if stacks:
        left = sum(p.numel() for _, module in stacks for p in module.parameters(recurse=False))
        warnings.warn(
            f"{stacks[0][0]} and its like hold several matrices in one tensor and stay in full precision, "
            f"{left / trainable_parameters(model).total:.0%} of the model's numbers: only nn.Linear is quantised",
            stacklevel=3,
        )


def _in_dtype(model: Any, dtype: torch.dtype) -> None:
    """Every floating parameter in `dtype`, one after another, but for the scales of NF4 layers."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.is_floating_point() and (name == "bias" or not isinstance(module, NF4Linear)):
                p.data = p.data.to(dtype)
    model.config.dtype = dtype


def stated(model: nn.Module, dtype: torch.dtype, double_quant: bool) -> dict[str, Any]:
    """What config.json says for bitsandbytes."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(path for path, m in model.named_modules() if type(m) is nn.Linear),
    }


def _is_nf4_part(key: str, entry: Entry) -> bool:
    """Codes and scales, but neither the tables of codes nor the JSON, which are the same few bytes for any layer."""
    return key.endswith((".absmax", ".nested_absmax")) or (key.endswith(".weight") and entry.dtype == torch.uint8)


# ---- files -----------------------------------------------------------------------------------------------------


def checked_output(output: str | Path, overwrite: bool, *inputs: Path) -> Path:
    """The directory to write: not one of the inputs, and not there, or to be replaced."""
    target = Path(output).expanduser()
    for path in inputs:
        if target.exists() and path.exists() and target.samefile(path):
            raise LoRAError(f"--output {target} is what is read: name another directory.")
    if target.exists() and not target.is_dir():
        raise LoRAError(f"--output {target} is a file, expected a directory to write.")
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise LoRAError(f"--output {target} is not empty: --overwrite replaces it.")
        if not (target / "config.json").is_file():
            raise LoRAError(f"--output {target} holds something that is no model: it is not replaced. Name another.")
    return target


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A directory to write in, which becomes `target` at the end of the block, and is gone after an error."""
    unfinished = target.parent / f".unfinished-{target.name}-{uuid.uuid4().hex}"
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        old = target.parent / f".old-{target.name}-{uuid.uuid4().hex}"
        if target.exists():
            target.rename(old)
        unfinished.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_weights(entries: dict[str, Entry], directory: Path, shard_bytes: int | None = None) -> None:
    """safetensors files of at most `shard_bytes` (SHARD_BYTES), with an index where there are several."""
    shards: list[dict[str, Entry]] = [{}]
    limit, filled = shard_bytes or SHARD_BYTES, 0
    for name, entry in entries.items():
        if shards[-1] and filled + entry.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += entry.nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    with meter("writing", sum(entry.nbytes for entry in entries.values())) as written:
        for name, shard in zip(names, shards, strict=True):
            write_safetensors(directory / name, shard, written)


def write_safetensors(path: Path, entries: dict[str, Entry], written: Callable[[int], None]) -> None:
    """One file, one tensor in memory at a time: the header's length, the header in JSON, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.nbytes
        header[name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for entry in entries.values():
            file.write(entry.make().contiguous().flatten().view(torch.uint8).numpy().data)
            written(entry.nbytes)
        file.flush()
        os.fsync(file.fileno())


def write_rest(model: Any, tokenizer: Any, directory: Path, name: str, changes: dict[str, Any]) -> None:
    """Everything but the weights: a directory's own files as they are, with `changes` to its config.json."""
    source = Path(name).expanduser()
    if (source / "config.json").is_file():
        skipped = {file.name for pattern in WEIGHT_FILES for file in source.glob(pattern)}
        for file in source.iterdir():
            if file.is_file() and file.name not in skipped:
                shutil.copyfile(file, directory / file.name)
    else:
        model.config.save_pretrained(directory)
        model.generation_config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the older name of dtype
    config |= changes
    config = {key: value for key, value in config.items() if key != "quantization_config" or value is not None}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _plain(tensor: Tensor, dtype: torch.dtype, key: str = "") -> Entry:
    """A tensor written as it is, floating ones in `dtype`; NF4's own float32 scales stay float32."""
    keeps = not tensor.is_floating_point() or key.endswith(("absmax", "quant_map"))
    wanted = tensor.dtype if keeps else dtype
    return Entry(tuple(tensor.shape), wanted, lambda: tensor.detach().to(wanted))


def _decoded(layer: NF4Linear, dtype: torch.dtype) -> Entry:
    quantised = layer.quantised
    return Entry(quantised.shape, dtype, lambda: dense_weight(quantised, dtype))


# ---- memory ----------------------------------------------------------------------------------------------------


def memory_table(model: nn.Module) -> str:
    """What a model's parameters take by category, and what training the adapter would add to it."""
    injected = hasattr(model, "lora_state")
    summary = trainable_parameters(model)
    trained = list(summary) if injected else []
    nf4 = [p for m in model.modules() if isinstance(m, NF4Linear) for name, p in m.named_parameters() if name != "bias"]
    others = {id(p) for p in (*trained, *nf4)}
    frozen = [p for p in model.parameters() if id(p) not in others]
    count = sum(p.numel() for p in trained)
    size = sum(p.nbytes for p in trained)
    in_nf4 = summary.total - count - sum(p.numel() for p in frozen)
    rows = [
        ("frozen weights" if injected else "weights", sum(p.numel() for p in frozen), sum(p.nbytes for p in frozen)),
        ("weights in NF4", in_nf4, sum(p.nbytes for p in nf4)),
        ("adapter", count, size),
        ("in training: gradients", count, size),
        ("in training: AdamW", 2 * count, 2 * size),
    ]
    lines = [f"{name:<24}{number:>16,} numbers  {megabytes(held):>12}" for name, number, held in rows if number]
    return "\n".join([*lines, str(summary)] if injected else lines)


def megabytes(size: int) -> str:
    """Bytes as 12.3 MB."""
    return f"{size / 1e6:,.1f} MB"
