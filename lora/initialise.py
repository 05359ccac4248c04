"""How an adapter starts: the values of A and B before the first step.

    True         A ~ Kaiming uniform, B = 0                            (Hu et al. 2021)
    "gaussian"   A ~ N(0, 1/r²), B = 0
    "orthogonal" A and B non-zero with B A = 0: they read and write orthogonal halves of the rank
    "pissa"      s B A = the r largest singular directions of W        (Meng et al. 2024, eq. 2-4)
    "olora"      B = Q[:, :r], A = R[:r] of W = Q R                     (Büyükakyüz 2024)
    "loftq"      s B A = what NF4 loses of W; the base becomes NF4      (Li et al. 2023, algorithm 1)
    False        A ~ Kaiming uniform, B ~ uniform: changes the output at once, for tests

PiSSA and OLoRA start with an update that is not zero, and take it off the base weight. Here W stays as it is and
the update is s (B A - B0 A0): the same function and the same gradients, and `eject` has nothing to undo.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.errors import LoRAError
from lora.layers import AdapterLayer, LoRAEmbedding, LoRALinear
from lora.nf4_layer import NF4Linear
from lora.projection import Projection
from lora.reference.dora import dora_norm
from lora.reference.linear import dense_weight
from lora.reference.nf4 import loftq

ORTHOGONAL_SCALE = 0.1  # PEFT's: small enough that the first steps are not dominated by the random halves


def add_parameters(layer: AdapterLayer, path: str, config: LoRAConfig, name: str) -> None:
    """Gives `layer` an adapter called `name`, initialised as `config` says."""
    base = layer.base_projection()
    table = isinstance(layer, LoRAEmbedding)
    *experts, out_features, in_features = base.weight.shape[::-1] if table else base.weight.shape
    rank, scaling = config.rank_of(path), config.scaling_of(path)
    device = base.weight.codes.device if not isinstance(base.weight, Tensor) else base.weight.device
    lora_A, lora_B = torch.empty(*experts, rank, in_features), torch.empty(*experts, out_features, rank)

    if device.type != "meta":
        init = config.init_lora_weights
        if init in ("pissa", "olora", "loftq") or str(init).startswith("pissa_"):
            lora_A, lora_B = _from_weight(layer, path, str(init), rank, scaling)
        else:
            for A, B in zip(lora_A, lora_B, strict=True) if experts else ((lora_A, lora_B),):
                _fill_at_random(A, B, init, path, table)

    base = layer.base_projection()  # loftq has replaced it
    dtype = adapter_dtype(base)
    layer.lora_A[name] = nn.Parameter(lora_A.to(device, dtype).contiguous())
    layer.lora_B[name] = nn.Parameter(lora_B.to(device, dtype).contiguous())
    if config.init_lora_weights == "olora" or str(config.init_lora_weights).startswith("pissa"):
        layer.initial_A[name] = nn.Parameter(layer.lora_A[name].detach().clone(), requires_grad=False)
        layer.initial_B[name] = nn.Parameter(layer.lora_B[name].detach().clone(), requires_grad=False)
    layer.scaling[name] = scaling
    layer.dropout[name] = nn.Dropout(0.0 if table else config.lora_dropout)
    if config.use_dora:
        layer.lora_magnitude[name] = nn.Parameter(_start_magnitude(layer, name).to(device, dtype))


def adapter_dtype(base: Projection) -> torch.dtype:
    """float32 beside a half-precision or quantised base (Adam's small steps vanish in bf16), else the base's own."""
    if not isinstance(base.weight, Tensor):
        return torch.float32
    return torch.promote_types(base.weight.dtype, torch.float32)


def _fill_at_random(lora_A: Tensor, lora_B: Tensor, init: bool | str, path: str, table: bool) -> None:
    rank = lora_A.shape[0]
    if init == "orthogonal":
        if rank % 2:
            raise LoRAError(f"init_lora_weights='orthogonal' halves the rank, but {path} has r={rank}: use an even r.")
        rows = torch.linalg.qr(torch.randn(rank, rank)).Q  # [r, r], orthonormal rows
        half = rank // 2
        lora_A.copy_(ORTHOGONAL_SCALE * rows[0::2].T @ torch.randn(half, lora_A.shape[1]))
        lora_B.copy_(ORTHOGONAL_SCALE * torch.randn(lora_B.shape[0], half) @ rows[1::2])
        return
    if table:  # a token reads one column of A: zero A and random B start from nothing just as well
        nn.init.normal_(lora_B)
        nn.init.zeros_(lora_A) if init is not False else nn.init.normal_(lora_A)
        return
    if init == "gaussian":
        nn.init.normal_(lora_A, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    nn.init.zeros_(lora_B) if init is not False else nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))


def _from_weight(layer: AdapterLayer, path: str, init: str, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B read off the base weight; "loftq" also replaces the base by its NF4 version."""
    if not isinstance(layer, LoRALinear):
        raise LoRAError(f"init_lora_weights={init!r} is defined for linear layers, but {path} is an embedding.")
    if init == "loftq":
        return _loftq(layer, path, rank, scaling)
    weight = dense_weight(layer.base_projection().weight, torch.float32).detach().float()  # [out, in]
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, q=rank, niter=int(init.rsplit("_", 1)[1]))
        vh = v.T
    root = (s[:rank] / scaling).sqrt()  # so that s · B A is the rank-r part of W
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _loftq(layer: LoRALinear, path: str, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    linear = layer.base_layer
    if not isinstance(linear, nn.Linear):
        raise LoRAError(
            f"init_lora_weights='loftq' needs the full-precision weight, but {path} is a {type(linear).__name__}: "
            "load the model without quantization, and let 'loftq' quantise it."
        )
    quantised, lora_A, lora_B = loftq(linear.weight.detach(), rank, scaling)
    layer.base_layer = NF4Linear.from_quantised(quantised, linear.bias)
    return lora_A, lora_B


def _start_magnitude(layer: AdapterLayer, name: str) -> Tensor:
    """m = ‖W + the update it starts with‖ of each row: a gain of one."""
    projection = layer.projection_of((name,))
    if projection.lora_A is None or projection.lora_B is None:
        raise TypeError("an adapter without A and B has no magnitude")
    weight = projection.weight
    if isinstance(layer, LoRAEmbedding) and isinstance(weight, Tensor):
        weight = weight.T
    return dora_norm(weight, projection.lora_A, projection.lora_B, projection.scaling)
