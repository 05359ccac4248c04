"""Adapters for the servers that take them beside the model they belong to: vLLM's directory, llama.cpp's GGUF file.

    vLLM        PEFT's two files, with one rank and one scale for every module (its older releases ignore patterns)
    llama.cpp   a GGUF file of A and B, their rows in the order of the model's own GGUF file: `lora.gguf_export`

Both compute W x + s · B A x and nothing else. So whatever an adapter trains beside A and B (DoRA's magnitudes, biases,
modules in full) is refused here, with every reason; merged into the weights, it can be served (`lora merge`).
"""

from __future__ import annotations

import json
import os
import shlex
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora import models
from lora.adapter_io import _bare, _write, load_adapter
from lora.adapters import _require, state_of
from lora.config import LoRAConfig
from lora.errors import LoRAError
from lora.layers import AdapterLayer, LoRAEmbedding, LoRAParameter, adapter_layers, base_of
from lora.peft_format import CONFIG_FILE, tensor_key, to_peft
from lora.reference.inject import output_heads

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes
VLLM_PLAIN = ("GPT2LMHeadModel",)  # its class in vLLM was none that takes LoRA, in the releases that were read
FORMATS = ("vllm", "gguf")


class Term(NamedTuple):
    """One adapted module: W + scaling · lora_B lora_A, whatever the adapter started from."""

    path: str
    lora_A: Tensor  # [r, in_features]; of an embedding [r, vocab]
    lora_B: Tensor  # [out_features, r]
    scaling: float
    table: bool  # an embedding


def export_vllm(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> Path:
    """Writes one adapter as vLLM reads it: PEFT's files, one rank r and one scale alpha / r for all modules.

    r is the largest rank that any module has. Smaller ones get rows of zeros below A and columns of zeros beside B,
    which add nothing; the scale is the one that most modules have, and B is multiplied by what another has more:

        alpha / r · [B · s_i r / alpha, 0] [A; 0] = s_i · B A

    So an adapter of one rank and one scale is written bit for bit, also with rsLoRA, and others with one rounding of
    B. PiSSA and OLoRA are written as plain adapters of twice the rank, as `lora.save_adapter` does.

    Args:
        directory: made if need be; its two files are replaced, each in one step.

    Returns: the directory.
    Raises: LoRAError, with nothing written, for an unknown adapter; for one that trains more than A and B, or adapts
    what vLLM cannot (all reasons are named); for a rank above vLLM's largest, 512; for values that are not finite.
    """
    model = _bare(model)
    terms = plain_terms(model, adapter_name, "vLLM")
    rank = max(len(term.lora_A) for term in terms)
    if rank > VLLM_RANKS[-1]:
        raise LoRAError(
            f"the adapter has rank {rank}, and vLLM takes at most {VLLM_RANKS[-1]}. {_merge_instead('vLLM')}"
        )
    alpha = common_alpha([(term.scaling, rank) for term in terms])
    tensors: dict[str, Tensor] = {}
    for term in terms:
        lora_A, lora_B = _padded(scaled_to(term, alpha / rank), rank)
        tensors[tensor_key(term.path, "lora_A", term.table)] = lora_A.cpu().contiguous()
        tensors[tensor_key(term.path, "lora_B", term.table)] = lora_B.cpu().contiguous()
    _tell_of_ends(model, terms)
    config = state_of(model).configs[adapter_name]
    one_rank = {"r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    fields = to_peft(model, config, adapter_name, False) | one_rank
    folder = Path(directory).expanduser()
    _write(folder, tensors, {"format": "pt"}, json.dumps(fields, indent=2) + "\n")
    return folder


def plain_terms(model: nn.Module, adapter_name: str, server: str) -> list[Term]:
    """What one adapter adds, module by module. Raises: LoRAError, with every reason, where that is not all it does."""
    state = state_of(model)
    _require(state, adapter_name)
    layers = [(path, layer) for path, layer in adapter_layers(model) if adapter_name in layer.lora_A]
    reasons = list(_refusals(model, state.configs[adapter_name], layers))
    if reasons:
        raise LoRAError(
            f"the adapter {adapter_name!r} cannot be exported for {server}: {'; '.join(reasons)}. "
            f"{_merge_instead(server)}"
        )
    return [
        Term(path, *_finite(path, layer.plain_pair(adapter_name)), layer.scaling[adapter_name], _is_table(layer))
        for path, layer in layers
    ]


def _refusals(model: Any, config: LoRAConfig, layers: Sequence[tuple[str, AdapterLayer]]) -> Iterator[str]:
    """What of an adapter is more than A and B of a linear layer or an embedding."""
    if config.use_dora:
        yield "it is a DoRA adapter, whose magnitudes scale the whole weight"
    if config.modules_to_save:
        yield f"it trains {', '.join(config.modules_to_save)} in full (modules_to_save)"
    if config.bias != "none":
        yield f"it trains biases (bias={config.bias!r})"
    if config.init_lora_weights == "loftq":
        yield "it started from LoftQ, so that it fits the NF4 weights made with it and no others"
    if stacks := [path for path, layer in layers if isinstance(layer, LoRAParameter)]:
        yield f"it adapts parameters of modules that are no linear layers ({stacks[0]}, ...)"
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {name.rpartition(".")[0] for pair in ties.items() for name in pair}
    if parted := [path for path, _ in layers if path in tied]:
        yield f"it adapts {parted[0]}, one end of a tied embedding and output head, of which the server has one copy"


def _tell_of_ends(model: nn.Module, terms: Sequence[Term]) -> None:
    """Warns where the adapter reaches the embedding or the output head, which not every model class of vLLM lets it."""
    ends = [
        term.path
        for term in terms
        if term.table or any(base_of(head) is base_of(model.get_submodule(term.path)) for head in output_heads(model))
    ]
    if ends:
        warnings.warn(
            f"the adapter changes {', '.join(ends)}: vLLM loads that for the model classes that list these modules "
            "(embedding_modules), the head up to 258,048 tokens, and refuses the adapter for the others.",
            stacklevel=3,
        )


def _merge_instead(server: str) -> str:
    wanted = " --format gguf" if server == "llama.cpp" else ""
    return f"Merge it instead: lora merge --model MODEL --adapter DIR{wanted} --output OUT."


def _is_table(layer: AdapterLayer) -> bool:
    return isinstance(layer, LoRAEmbedding)


def _finite(path: str, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    for role, tensor in zip(("lora_A", "lora_B"), pair, strict=True):
        if tensor.is_meta or not bool(torch.isfinite(tensor).all()):
            raise LoRAError(f"{path}: {role} has values that are not finite, expected none: nothing was exported.")
    return pair


def common_alpha(scales: Sequence[tuple[float, int]]) -> float:
    """The alpha that gives most modules, each a (scaling, rank), their own scaling as alpha / rank."""
    alpha = Counter(scaling * rank for scaling, rank in scales).most_common(1)[0][0]
    return int(alpha) if alpha == int(alpha) else alpha


def scaled_to(term: Term, scaling: float) -> Term:
    """The same update with another scaling, by way of B; B itself where it is the same but for float64's rounding."""
    ratio = term.scaling / scaling
    if abs(ratio - 1) < 1e-12:
        return term._replace(scaling=scaling)
    return term._replace(lora_B=term.lora_B * ratio, scaling=scaling)


def _padded(term: Term, rank: int) -> tuple[Tensor, Tensor]:
    """[A; 0] and [B, 0] of this rank."""
    more = rank - len(term.lora_A)
    return nn.functional.pad(term.lora_A, (0, 0, 0, more)), nn.functional.pad(term.lora_B, (0, more))


# ---- the command -----------------------------------------------------------------------------------------------


def export_adapter(
    name: str, adapter: str, output: str | Path, *, format: str, dtype: str | None = None, overwrite: bool = False
) -> str:
    """`lora export`: the adapter directory `adapter` of the model `name`, for a server.

    Args:
        format: "vllm", `output` being a directory, or "gguf", a file.
        dtype: of a GGUF adapter, "float32" (None) or "float16".

    Returns: a report that ends with how to launch the server. Raises: LoRAError, with nothing written.
    """
    if format not in FORMATS:
        raise LoRAError(f"format is {format!r}, expected one of {', '.join(map(repr, FORMATS))}.")
    if format == "vllm" and dtype is not None:
        raise LoRAError(f"--dtype {dtype} is for --format gguf: vLLM casts an adapter to the model's own dtype.")
    target = Path(output).expanduser()
    if format == "vllm":
        _check_directory(target, overwrite, Path(adapter))
    else:
        from lora.gguf_export import check_file, export_gguf

        check_file(target, overwrite)
    model, _ = models.load(name)
    load_adapter(model, adapter)
    if format == "vllm":
        fields = json.loads((export_vllm(model, target) / CONFIG_FILE).read_text(encoding="utf-8"))
        largest = next(rank for rank in VLLM_RANKS if rank >= fields["r"])
        own = Path(name).is_file() or name.lower() == models.PACKAGED_MODEL  # nothing that vLLM can be given
        served = "MODEL" if own else shlex.quote(name)
        done = f"exported the adapter to {target}: rank {fields['r']}, alpha {fields['lora_alpha']:g}\n"
        if type(model).__name__ in VLLM_PLAIN:
            return (
                f"{done}vLLM's class {type(model).__name__} probably takes no adapters: "
                f"lora merge --model {served} --adapter {shlex.quote(adapter)} --output DIR, and vllm serve DIR"
            )
        return (
            f"{done}vllm serve {served} --enable-lora --max-lora-rank {largest} --lora-modules "
            f"{shlex.quote(f'{target.name}={target}')}"
        )
    count = export_gguf(model, target, dtype=dtype or "float32", overwrite=overwrite)
    path = shlex.quote(str(target))
    return f"exported {count} adapted modules to {target}\nllama-server --model MODEL.gguf --lora {path}"


def _check_directory(target: Path, overwrite: bool, adapter: Path) -> None:
    if target.exists() and not target.is_dir():
        raise LoRAError(f"--output {target} is a file, expected a directory to write.")
    if target.exists() and adapter.exists() and target.samefile(adapter):
        raise LoRAError(f"--output {target} is what is read: name another directory.")
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise LoRAError(f"--output {target} is not empty: --overwrite replaces the adapter in it.")
        if not (target / CONFIG_FILE).is_file():
            raise LoRAError(f"--output {target} holds something that is no adapter: it is not replaced. Name another.")
