"""for_training and for_inference: what a model must switch between the two, in one verb each.

    for_training     dropout on, KV cache off, merged adapters unmerged, activation checkpointing as named
    for_inference    dropout off, KV cache as the model had it, checkpointing off, adapters merged if asked

Checkpointing goes through the model's own hook (transformers' GradientCheckpointingLayer), per instance: each
decoder block calls the function it is handed. Switching back and forth changes nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from lora.adapters import state_of
from lora.errors import LoRAError, did_you_mean
from lora.layers import adapter_layers
from lora.reference.checkpoint import checkpoint
from lora.reference.merge import merge as merge_adapters
from lora.reference.merge import unmerge

CHECKPOINTING: dict[str, dict[str, Any]] = {
    "none": {},
    "recompute": {},  # keep each block's input, run the block again in the backward
    "selective": {"selective": True},  # also keep attention's outputs, and never run attention again
    "offload": {"offload": True},  # the block inputs wait in host memory
}


def for_training(model: nn.Module, checkpointing: str = "none") -> nn.Module:
    """Makes an injected model ready to train; see the top of this file.

    Args:
        checkpointing: "none", "recompute", "selective" or "offload".

    Raises: LoRAError for another name, or where the model has no blocks to checkpoint.
    """
    if checkpointing not in CHECKPOINTING:
        raise LoRAError(
            f"checkpointing is {checkpointing!r}, expected one of {', '.join(map(repr, CHECKPOINTING))}."
            f"{did_you_mean(str(checkpointing), CHECKPOINTING)}"
        )
    state_of(model)
    set_checkpointing(model, checkpointing)
    unmerge(model)
    _set_cache(model, False)
    return model.train()


def for_inference(model: nn.Module, merge: bool = False) -> nn.Module:
    """Makes an injected model ready to generate; see the top of this file.

    Args:
        merge: also merge the active adapters into the weights, so that they cost nothing; `for_training` (or
            `unmerge`) puts the original weights back, bit for bit.
    """
    state_of(model)
    set_checkpointing(model, "none")
    if merge and not any(layer.merged for _, layer in adapter_layers(model)):
        merge_adapters(model)
    _set_cache(model, True)
    return model.eval()


def set_checkpointing(model: nn.Module, mode: str, run: Callable[..., Any] = checkpoint) -> None:
    """Hands every checkpointable block of `model` the function it runs through, or takes it away ("none")."""
    blocks = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if not blocks and mode != "none":
        raise LoRAError(
            f"checkpointing={mode!r} needs a model whose blocks can be checkpointed, but {type(model).__name__} has no "
            "transformers GradientCheckpointingLayer: use checkpointing='none', or call lora.ops.checkpoint yourself."
        )
    function: Callable[..., Any] = functools.partial(run, **CHECKPOINTING[mode])
    for block in blocks:
        block.gradient_checkpointing = mode != "none"  # type: ignore[assignment]
        if mode != "none":
            block._gradient_checkpointing_func = function  # type: ignore[assignment]
        elif "_gradient_checkpointing_func" in vars(block):
            del block._gradient_checkpointing_func


def _set_cache(model: nn.Module, inference: bool) -> None:
    """Turns the KV cache off for training, and back to what it was."""
    config, modes = getattr(model, "config", None), state_of(model).modes
    if config is None or not hasattr(config, "use_cache"):
        return
    if not inference:
        modes.setdefault("use_cache", config.use_cache)
        config.use_cache = False
    elif "use_cache" in modes:
        config.use_cache = modes.pop("use_cache")
