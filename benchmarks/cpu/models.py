"""The model: ours, PEFT's and the plain one, with the same adapters; and its sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lora
from benchmarks.card.model import TARGETS, fill_factors, recompute_blocks
from benchmarks.card.steps import ours_factors, peft_factors
from lora.layers import adapter_layers
from lora.nf4_layer import NF4Linear

MODEL = "smollm2-135m-instruct"
R, ALPHA = 16, 16
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 160, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
__all__ = ["ours_factors", "peft_factors"]


def base(dry: bool, layers: int | None = None) -> Any:
    """The frozen model in float32; a small one with random weights in a dry run."""
    if dry:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config: Any = LlamaConfig(**TINY)
        model: Any = LlamaForCausalLM(config)
    else:
        model, _ = lora.load(MODEL, dtype="float32")
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = min(layers, model.config.num_hidden_layers)
    return model.requires_grad_(False)


def quantised_pair(dry: bool) -> tuple[Any, Any]:
    """The model in NF4, and a plain one of the very numbers that NF4 decodes to."""
    quantised, plain = lora.quantize(base(dry), "nf4"), base(dry)
    with torch.no_grad():
        for path, module in quantised.named_modules():
            if isinstance(module, NF4Linear):
                decoded: Any = lora.ops.nf4_dequantize(module.quantised, torch.float32)
                plain.get_submodule(path).weight.copy_(decoded)
    return quantised, plain


def ours(model: Any, p: float = 0.0, checkpointing: str = "none") -> Any:
    """With our adapter, ready to train by the backend in force."""
    return lora.for_training(adapted(model, ["default"], p), checkpointing=checkpointing)


def adapted(model: Any, names: Sequence[str], p: float = 0.0) -> Any:
    """With these adapters of ours, filled with other numbers each; the first is active."""
    config = lora.LoRAConfig(r=R, lora_alpha=ALPHA, lora_dropout=p, target_modules=list(TARGETS))
    for number, name in enumerate(names):
        (lora.add_adapter if number else lora.inject)(model, config, name)
        for path, layer in adapter_layers(model):
            fill_factors(f"{number}{path}" if number else path, layer.lora_A[name], layer.lora_B[name])
    return model


def theirs(model: Any, p: float = 0.0, checkpointing: str = "none") -> Any:
    """With the same adapters in PEFT."""
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=p, target_modules=list(TARGETS))
    wrapped: Any = peft.get_peft_model(model, config)
    for path, layer in wrapped.named_modules():
        if len(getattr(layer, "lora_A", ())):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            fill_factors(path.removeprefix("base_model.model."), A, B)
    model.config.use_cache = False
    recompute_blocks(model, checkpointing == "recompute")
    return wrapped.train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What requires a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def token_ids(model: Any, sequences: int, length: int, seed: int = 1) -> Tensor:
    """Random tokens, the same at every call."""
    return torch.randint(model.config.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(seed))


def frozen_linears(model: Any) -> dict[str, tuple[int, int]]:
    """(in, out) of every adapted matrix, by path."""
    return {
        path: (module.in_features, module.out_features)
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in TARGETS
    }
