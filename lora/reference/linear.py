"""The LoRA linear layer: one frozen matrix, one trainable update of rank r.

    h = x Wᵀ + b + s · (D(x) Aᵀ) Bᵀ                              (Hu et al. 2021, eq. 3)

x is [tokens, in_features], one token a row; s is the scaling; D is dropout, the identity at inference.
With u = D(x) Aᵀ (tokens × r, tiny), and dy the gradient of the loss with respect to h:

    dB = s · dyᵀ u            du = s · dy B            dA = duᵀ D(x)
    dx = dy W + D(du A)       db = Σ_tokens dy         W is frozen: there is no dW

D is linear with a diagonal matrix, so its backward is D again. B·A is never formed: two thin products cost
2·tokens·r·(in + out) operations, a product with a dense B·A would cost 2·tokens·in·out.

DoRA (a magnitude vector is present) rescales the rows of W + s B A: see `lora.reference.dora`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.projection import Dropout, Gradients, NF4Weight, Projection
from lora.reference.dora import dora_gain
from lora.reference.dropout import apply_dropout
from lora.reference.nf4 import nf4_dequantize


def lora_linear(x: Tensor, projection: Projection, *, dropout: Dropout | None = None) -> Tensor:
    """h = x Wᵀ + b + s · (D(x) Aᵀ) Bᵀ, differentiable by autograd.

    Args:
        x: [..., in_features], the weight's dtype (adapters of another dtype are cast to x's).
        projection: W [out, in] or NF4; any of bias, lora_A, lora_B, magnitude may be absent.
        dropout: applied to the adapter's input only, never to the frozen path.

    Returns: [..., out_features].
    FLOPs: 2·tokens·(in·out + r·(in + out)). Saved for backward by autograd: x, D(x) and u (and B, A).
    """
    weight, bias, lora_A, lora_B, scaling, magnitude = projection
    h = frozen_linear(x, weight, bias)  # [..., out]
    if lora_A is None or lora_B is None:
        return h
    lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    dropped = apply_dropout(x, dropout)  # [..., in]
    u = scaling * F.linear(dropped, lora_A)  # [..., r]: never form B·A
    update = F.linear(u, lora_B)  # [..., out]
    if magnitude is None:
        return h + update
    gain = dora_gain(weight, lora_A, lora_B, scaling, magnitude)  # [out], float32: g - 1 would vanish in bfloat16
    return (h + (gain - 1) * frozen_linear(dropped, weight) + gain * update).to(h.dtype)


def lora_linear_backward(dy: Tensor, x: Tensor, projection: Projection, *, dropout: Dropout | None = None) -> Gradients:
    """The gradients of `lora_linear`, written out; the derivation is at the top of this file.

    Args:
        dy: [..., out_features], the gradient with respect to h.
        x, projection, dropout: as they were given to `lora_linear`.
    """
    weight, bias, lora_A, lora_B, scaling, magnitude = projection
    dense = dense_weight(weight, x.dtype)  # [out, in]
    dbias = None if bias is None else flat(dy).sum(0).to(bias.dtype)
    dx = dy @ dense  # [..., in]
    if lora_A is None or lora_B is None:
        return Gradients(dx, dbias=dbias)

    A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    dropped = apply_dropout(x, dropout)  # [..., in]
    u = dropped @ A.T  # [..., r]
    dh, dmagnitude = dy, None  # dh: what reaches the update's output
    through_dropout = torch.zeros_like(x)
    if magnitude is not None:  # h = x Wᵀ + b + (g - 1) ⊙ D(x) Wᵀ + g ⊙ s u Bᵀ,  g = m / ‖W + s B A‖ per row
        slope = dora_gain(weight, A, B, scaling, torch.ones_like(magnitude))  # [out]: dg/dm = 1 / norm
        gain = magnitude * slope
        adapted = dropped @ dense.T + (scaling * u) @ B.T  # [..., out]
        dmagnitude = (flat(dy * adapted).sum(0) * slope).to(magnitude.dtype)
        dh = (dy * gain).to(dy.dtype)
        through_dropout = (dy * (gain - 1)).to(dy.dtype) @ dense
    du = scaling * (dh @ B)  # [..., r]: serves dA and dx
    dB = scaling * (flat(dh).T @ flat(u))  # [out, r]
    dA = flat(du).T @ flat(dropped)  # [r, in]
    dx = dx + apply_dropout(through_dropout + du @ A, dropout)
    return Gradients(dx, dA.to(lora_A.dtype), dB.to(lora_B.dtype), dbias, dmagnitude)


def frozen_linear(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b. An NF4 weight is dequantised again in the backward rather than kept: see `FrozenNF4Linear`."""
    if not isinstance(weight, NF4Weight):
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    h: Tensor = FrozenNF4Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return h if bias is None else h + bias.to(h.dtype)


class FrozenNF4Linear(torch.autograd.Function):
    """y = x Wᵀ for a W stored in 4 bits: dy W needs W once more, so it is decoded twice and stored never.

    autograd would keep the decoded W of every layer until its backward: the whole model in 16 bits, which is
    what NF4 was meant to avoid. Saved for backward: nothing but the quantised weight itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight) -> Tensor:
        """Y = x Wᵀ."""
        ctx.weight = weight
        return x @ dense_weight(weight, x.dtype).T  # [..., out]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:
        """dx = dy W; W is frozen."""
        return (dy @ dense_weight(ctx.weight, dy.dtype) if ctx.needs_input_grad[0] else None), None


def dense_weight(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    """The matrix itself, [out, in]: an NF4 weight decoded to `dtype`, any other as it is."""
    return nf4_dequantize(weight, dtype) if isinstance(weight, NF4Weight) else weight


def flat(x: Tensor) -> Tensor:
    """[..., features] as [tokens, features]."""
    return x.reshape(-1, x.shape[-1])
