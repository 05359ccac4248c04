"""The other implementations: the plain formulas in torch, PEFT's layers, Liger's kernels.

CARD_PEERS may name a folder of packages to import from, for a machine that lacks them. A peer that is not there is
recorded as such, with the reason.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.card.timing import in_words


@functools.cache
def peer(module: str) -> Any:
    """The module, or a string that says why it cannot be imported."""
    folder = os.environ.get("CARD_PEERS")
    if folder and folder not in sys.path:
        sys.path.append(folder)  # after what is installed
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package broken in any way is not there
        return in_words(error)


def liger(device: torch.device, name: str) -> Any:
    """One of Liger's functions, or why there is none."""
    if device.type != "cuda":
        return "Liger's kernels need a GPU"
    module = peer("liger_kernel.transformers.functional")
    if isinstance(module, str):
        return module
    return getattr(module, name, f"this version has no {name}")


def version_of(module: str) -> str:
    """For the environment's record."""
    found = peer(module)
    if isinstance(found, str):
        return f"not there: {found}"
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return str(getattr(found, "__version__", "unknown"))


def peft_linears(
    weights: dict[str, Tensor], factors: dict[str, tuple[Tensor, Tensor]], scaling: float, p: float, dtype: torch.dtype
) -> nn.Module | str:
    """A module of PEFT's Linear layers around these weights, with adapters of `dtype`; or why PEFT is not there."""
    peft = peer("peft")
    if isinstance(peft, str):
        return peft
    holder = nn.Module()
    for name, weight in weights.items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        setattr(holder, name, linear)
    r = len(next(iter(factors.values()))[0])
    config = peft.LoraConfig(r=r, lora_alpha=scaling * r, target_modules=list(weights), lora_dropout=p)
    peft.inject_adapter_in_model(config, holder)
    for name, (A, B) in factors.items():
        layer: Any = getattr(holder, name)
        layer.lora_A["default"].weight = nn.Parameter(A.detach().to(dtype))
        layer.lora_B["default"].weight = nn.Parameter(B.detach().to(dtype))
    return holder.train()


def peft_leaves(holder: nn.Module, names: tuple[str, ...]) -> list[Tensor]:
    """A and B of each layer, in the order of `names`."""
    layers: list[Any] = [getattr(holder, name) for name in names]
    return [side["default"].weight for layer in layers for side in (layer.lora_A, layer.lora_B)]


# ---- the formulas, in any dtype: float64 is the truth, the input's own is what a reader of the paper would write


def lora_formula(
    x: Tensor, A: Tensor, B: Tensor, W: Tensor, scaling: float, drop: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """W x + s · B A D(x)."""
    dropped = x if drop is None else drop(x)
    return F.linear(x, W) + scaling * F.linear(F.linear(dropped, A.to(x.dtype)), B.to(x.dtype))


def swiglu_formula(g: Tensor, z: Tensor) -> Tensor:
    """silu(g) ⊙ z."""
    return F.silu(g) * z


def rms_norm_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As transformers writes it: the mean in float32 at least, rounded before the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rope_formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers writes it: x ⊙ cos + (-x₂, x₁) ⊙ sin."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
