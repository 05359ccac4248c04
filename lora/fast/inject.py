"""Injection for the fast backend: the reference's, which gives the same model, and `fuse` on top.

An injected model is one model, whichever backend injected it. What the fast backend adds is `fuse`: it lays weights
that share an input one after another and patches known modules, instance by instance (`lora.fast.patch`);
`for_training` and `for_inference` call it, `unfuse` takes it back.
"""

from __future__ import annotations

from torch import nn

from lora.adapters import state_of
from lora.config import LoRAConfig
from lora.fast.patch import Fusion, patch_model
from lora.reference.inject import add_adapter as reference_add_adapter
from lora.reference.inject import eject as reference_eject
from lora.reference.inject import inject as reference_inject


def inject(model: nn.Module, config: LoRAConfig, adapter_name: str = "default") -> nn.Module:
    """Freezes `model` and puts adapters beside its modules; as `lora.reference.inject`."""
    return reference_inject(model, config, adapter_name)


def add_adapter(model: nn.Module, config: LoRAConfig, adapter_name: str) -> nn.Module:
    """Adds one more adapter to an injected model, fused where the model was; as `lora.reference.add_adapter`."""
    was_fused = unfuse(model)
    reference_add_adapter(model, config, adapter_name)
    return fuse(model) if was_fused else model


def eject(model: nn.Module) -> nn.Module:
    """Takes patches and adapters out: the base modules, bit for bit; as `lora.reference.eject`."""
    unfuse(model)
    return reference_eject(model)


def fuse(model: nn.Module) -> nn.Module:
    """Patches the model for speed, in place; fusing twice is fusing once."""
    state = state_of(model)
    unfuse(model)
    state.modes["fusion"] = patch_model(model)
    return model


def unfuse(model: nn.Module) -> bool:
    """Undoes `fuse`; returns whether there was anything to undo."""
    fusion = state_of(model).modes.pop("fusion", None)
    if isinstance(fusion, Fusion):
        fusion.undo()
        return True
    return False
