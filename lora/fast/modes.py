"""for_training and for_inference for the fast backend: the reference's, on a fused model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lora.fast.checkpoint import checkpoint
from lora.fast.inject import fuse
from lora.reference import modes


def for_training(model: nn.Module, checkpointing: str | Sequence[str] | Mapping[str, str] = "none") -> nn.Module:
    """Makes an injected model ready to train, fused; arguments and errors as in `lora.reference.for_training`."""
    modes.for_training(model, checkpointing)
    modes.set_checkpointing(model, checkpointing, checkpoint)
    return fuse(model)


def for_inference(model: nn.Module, merge: bool = False) -> nn.Module:
    """Makes an injected model ready to generate, fused; as `lora.reference.for_inference`."""
    return fuse(modes.for_inference(model, merge))
