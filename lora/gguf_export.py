"""GGUF files for llama.cpp: an adapter beside a model's file, or a whole model with its adapter merged.

    adapter   general.type = "adapter", adapter.type = "lora", adapter.lora.alpha, and for each adapted tensor
              NAME.lora_a [r, in] and NAME.lora_b [out, r], applied as alpha / r · B A with r read off each lora_b
    model     the tensors under llama.cpp's names, vectors in float32, matrices in one type

Names and the order of q's and k's rows are those of `lora.gguf_loader`, the other way round. A model that came from a
GGUF file keeps that file's metadata, tokenizer included; for one from a directory they are made, and only where our
own loader reads the same model and tokenizer back from them (`lora.gguf_metadata`). One tensor at most is in memory.
This module imports gguf and transformers: import it where it is needed.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from torch import Tensor, nn

from lora import models
from lora.adapter_io import _bare, load_adapter
from lora.directories import _output_dtype, _unties, megabytes, merged_entries
from lora.errors import LoRAError
from lora.export import Term, common_alpha, plain_terms, scaled_to
from lora.gguf_file import decode, metadata_types, read_gguf
from lora.gguf_loader import ARCHITECTURES, LAYER_NAMES, TOP_NAMES
from lora.gguf_metadata import CONVERTER, Metadata, metadata_of
from lora.layers import adapter_layers
from lora.meter import meter

Q = GGMLQuantizationType
KINDS = {"float32": Q.F32, "float16": Q.F16, "bfloat16": Q.BF16, "q8_0": Q.Q8_0}
FILE_TYPES = {
    Q.F32: LlamaFileType.ALL_F32,
    Q.F16: LlamaFileType.MOSTLY_F16,
    Q.BF16: LlamaFileType.MOSTLY_BF16,
    Q.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
MODEL_CLASSES = {a.model_class: name for name, a in ARCHITECTURES.items()} | {"MistralForCausalLM": "llama"}
REWRITTEN = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")
NO_LONGER_TRUE = ("quantize.imatrix.", "split.")  # of metadata that describe the source's own tensors


class Part(NamedTuple):
    """A tensor to be written, made only when its turn comes."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    make: Callable[[], Tensor]  # in float32


# ---- an adapter ------------------------------------------------------------------------------------------------


def export_gguf(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    dtype: str = "float32",
    overwrite: bool = False,
) -> int:
    """Writes one adapter as a GGUF file for llama.cpp, beside a GGUF file of the same base model.

    llama.cpp applies alpha / r · B A with one alpha for all and r from each tensor, so ranks may differ; where that is
    not a module's scaling, B is multiplied by the rest. B's rows of q and k are in the order that the base's rows have
    in a GGUF file. An embedding's A lies the other way round, as [vocab, r], because it is looked up.

    Args:
        path: a new file that ends in .gguf. dtype: "float32" or "float16".
        overwrite: replace a GGUF file that is there.

    Returns: the number of adapted modules.
    Raises: LoRAError, with nothing written, for an architecture whose names are not known here; for what llama.cpp
    cannot apply (all reasons are named); for values that are not finite, or not in float16.
    """
    if dtype not in ("float32", "float16"):
        raise LoRAError(f"dtype is {dtype!r}, expected 'float32' or 'float16' for a GGUF adapter.")
    model, target = _bare(model), check_file(Path(path).expanduser(), overwrite)
    architecture = architecture_of(model)
    terms = plain_terms(model, adapter_name, "llama.cpp")
    alpha = float(numpy.float32(common_alpha([(term.scaling, len(term.lora_A)) for term in terms])))
    parts: dict[str, Part] = {}
    for term in terms:
        name = gguf_name(f"{term.path}.weight", architecture)
        for role, tensor in _oriented(model, scaled_to(term, alpha / len(term.lora_A)), architecture).items():
            parts[f"{name}.{role}"] = Part(tuple(tensor.shape), KINDS[dtype], partial(torch.Tensor.float, tensor))
    metadata: Metadata = {
        "general.type": ("adapter", GGUFValueType.STRING, None),
        "general.name": (adapter_name, GGUFValueType.STRING, None),
        "adapter.type": ("lora", GGUFValueType.STRING, None),
        "adapter.lora.alpha": (alpha, GGUFValueType.FLOAT32, None),
    }
    _write(target, architecture, metadata, KINDS[dtype], parts)
    return len(terms)


def _oriented(model: nn.Module, term: Term, architecture: str) -> dict[str, Tensor]:
    """A and B as llama.cpp has them."""
    lora_A, lora_B = term.lora_A.float().cpu(), term.lora_B.float().cpu()
    if term.table:
        return {"lora_a": lora_A.T, "lora_b": lora_B}  # [vocab, r] and [dim, r]
    heads = heads_of(model, f"{term.path}.weight", architecture)
    return {"lora_a": lora_A, "lora_b": lora_B if heads is None else permute(lora_B, heads)}


def architecture_of(model: nn.Module) -> str:
    """llama.cpp's name for the kind of model. Raises: LoRAError for one whose tensors have no known names."""
    found = MODEL_CLASSES.get(type(model).__name__)
    if found is None:
        raise LoRAError(
            f"{type(model).__name__} cannot be written as GGUF here; {', '.join(MODEL_CLASSES)} can. For another model "
            f"merge the adapter into a directory (lora merge), and convert that with {CONVERTER}."
        )
    return found


def gguf_name(name: str, architecture: str) -> str:
    """llama.cpp's name for a parameter: model.layers.3.mlp.up_proj.weight → blk.3.ffn_up.weight."""
    stem, _, suffix = name.rpartition(".")
    tops = {theirs: ours for ours, theirs in TOP_NAMES.items()}
    layers = {theirs: ours for ours, theirs in LAYER_NAMES.items()}
    if stem in tops:
        return f"{tops[stem]}.{suffix}"
    _, _, within = stem.partition("model.layers.")
    number, _, inner = within.partition(".")
    if inner not in layers:
        raise LoRAError(f"{name} has no name in a GGUF file of a plain {architecture} model.")
    return f"blk.{number}.{layers[inner]}.{suffix}"


def heads_of(model: Any, name: str, architecture: str) -> int | None:
    """The number of heads whose rows llama.cpp stores in another order in this parameter, or None."""
    if not ARCHITECTURES[architecture].permuted:
        return None
    counts = {
        "self_attn.q_proj": model.config.num_attention_heads,
        "self_attn.k_proj": model.config.num_key_value_heads,
    }
    return next((count for end, count in counts.items() if name.rpartition(".")[0].endswith(end)), None)


def permute(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from (0, 1, …, d - 1) to llama.cpp's (0, d/2, 1, d/2 + 1, …): `gguf_loader.unpermute`'s
    inverse."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])  # [heads, 2, d/2, ...]
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _permuted(make: Callable[[], Tensor], heads: int) -> Tensor:
    return permute(make(), heads)


# ---- a merged model --------------------------------------------------------------------------------------------


def merge_gguf(
    name: str, adapter: str, output: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> str:
    """Writes the model `name` with `adapter` merged into its weights, as one GGUF file.

    Args:
        name, adapter: as for `lora.load` and `lora.load_adapter`; a llama, mistral, qwen2 or qwen3 model.
        output: a file that ends in .gguf.
        dtype: of the matrices, "float32", "float16", "bfloat16" or "q8_0" (8.5 bits; rows that are no multiple of 32
            stay in float16). None keeps 16 bits where the base has them, else bfloat16. Vectors are float32.
        overwrite: replace a GGUF file that is there.

    Returns: a report, one line. Raises: LoRAError, with nothing written, for what cannot be written faithfully.
    """
    target = check_file(Path(output).expanduser(), overwrite, name)
    with meter("loading the model"):
        model, tokenizer = models.load(name)
    architecture = architecture_of(model)
    source = source_file(name)
    metadata, extra = _carried(source) if source else metadata_of(name, model, tokenizer, architecture)
    load_adapter(model, adapter)
    kind = KINDS[dtype or str(_output_dtype(model, None)).removeprefix("torch.")]
    count, untied = len(list(adapter_layers(model))), _unties(model)
    parts = {
        key: Part(tuple(tensor.shape), Q.F32, partial(torch.Tensor.float, tensor)) for key, tensor in extra.items()
    }
    for key, entry in merged_entries(model, torch.float32, untied):
        heads = heads_of(model, key, architecture)
        parts[gguf_name(key, architecture)] = Part(
            entry.shape,
            _kind_of(entry.shape, kind),
            entry.make if heads is None else partial(_permuted, entry.make, heads),
        )
    _write(target, architecture, metadata, kind, parts)
    kinds = Counter(part.kind.name for part in parts.values())
    also = "; the output head is no longer tied to the embedding" if untied else ""
    return (
        f"merged {count} adapted modules into {target} ({', '.join(f'{n} {name}' for name, n in kinds.items())} "
        f"tensors, {megabytes(target.stat().st_size)}){also}"
    )


def source_file(name: str) -> Path | None:
    """The GGUF file that a model is loaded from, or None."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    return models.packaged_model_path() if name.lower() == models.PACKAGED_MODEL and not path.exists() else None


def _carried(path: Path) -> tuple[Metadata, dict[str, Tensor]]:
    """What a GGUF file says of its model, with its types, and the tensor that belongs to its config."""
    file = read_gguf(path)
    metadata: Metadata = {}
    for key, (kind, items) in metadata_types(file).items():
        value = file.metadata[key]
        empty = value == []  # which the gguf package cannot write, and which says nothing
        if key not in REWRITTEN and not key.startswith(NO_LONGER_TRUE) and not empty:
            metadata[key] = (value, GGUFValueType(kind), None if items is None else GGUFValueType(items))
    return metadata, {key: decode(file, key) for key in file.tensors if key == "rope_freqs.weight"}


def _kind_of(shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """Vectors stay in float32, and rows that a block does not divide in float16, as llama.cpp has them."""
    if len(shape) == 1:
        return Q.F32
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else Q.F16


# ---- files -----------------------------------------------------------------------------------------------------


def check_file(target: Path, overwrite: bool, source: str = "") -> Path:
    """The file to write: it ends in .gguf, is not what is read, and is not there, or is a GGUF file to be replaced."""
    if target.suffix != ".gguf" or target.is_dir():
        raise LoRAError(f"--output {target} should be a file that ends in .gguf for --format gguf.")
    if target.exists():
        if Path(source).exists() and target.samefile(Path(source)):
            raise LoRAError(f"--output {target} is what is read: name another file.")
        if not overwrite:
            raise LoRAError(f"--output {target} is there already: --overwrite replaces it.")
        with open(target, "rb") as file:
            if file.read(4) != b"GGUF":
                raise LoRAError(f"--output {target} holds something that is no GGUF: it is not replaced. Name another.")
    return target


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """A file to write, which becomes `target` at the end of the block, and is gone after an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.parent / f".unfinished-{uuid.uuid4().hex}-{target.name}"
    try:
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _write(
    target: Path, architecture: str, metadata: Metadata, kind: GGMLQuantizationType, parts: Mapping[str, Part]
) -> None:
    """One GGUF file: what it says, where its tensors lie, and then each tensor in turn."""
    with _replaced(target) as path:
        writer = GGUFWriter(path, architecture)
        sizes: dict[str, int] = {}
        try:
            writer.add_file_type(FILE_TYPES[kind])
            writer.add_quantization_version(GGML_QUANT_VERSION)
            for key, (value, value_type, item_type) in metadata.items():
                writer.add_key_value(key, value, value_type, item_type)
            for name, part in parts.items():
                block, nbytes = GGML_QUANT_SIZES[part.kind]
                size = int(numpy.prod(part.shape)) // block * nbytes
                sizes[name] = size
                writer.add_tensor_info(name, part.shape, numpy.dtype(numpy.float32), size, raw_dtype=part.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with meter("writing", sum(sizes.values())) as written:
                for name, part in parts.items():
                    writer.write_tensor_data(_encoded(name, part.make(), part.kind))
                    written(sizes[name])
        finally:
            writer.close()


def _encoded(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> Any:
    """The bytes of a tensor in a ggml type, rounded once; raises LoRAError where that overflows."""
    dtypes = {Q.F32: torch.float32, Q.F16: torch.float16, Q.BF16: torch.bfloat16}
    if kind not in dtypes:
        return quantize(tensor.float().contiguous().numpy(), kind)
    rounded = tensor.to(dtypes[kind]).contiguous()
    if not bool(torch.isfinite(rounded).all()):
        raise LoRAError(f"{name} has values that are not finite in {kind.name}: choose --dtype bfloat16 or float32.")
    return rounded.view(torch.uint8).numpy()
