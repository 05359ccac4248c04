"""RMSNorm and LayerNorm, optionally with the residual sum that precedes them.

RMSNorm (Zhang and Sennrich 2019, eq. 4) divides a row by its root mean square; n is the number of features:

    ρ = 1 / √(mean(x²) + ε)        x̂ = ρ x        y = (offset + w) ⊙ x̂

Gemma stores w - 1, so its offset is 1. With e = (offset + w) ⊙ dy, the gradient of x̂, and ∂ρ/∂x = -ρ³ x / n,

    dw = Σ_rows dy ⊙ x̂        dx = ρ e + x (e·x) (-ρ³ / n) = ρ (e - x̂ mean(e ⊙ x̂))

LayerNorm (Ba, Kiros and Hinton 2016) also takes the mean off, x̂ = ρ (x - μ), y = w ⊙ x̂ + b, and so does its gradient:

    dx = ρ (e - mean(e) - x̂ mean(e ⊙ x̂))        db = Σ_rows dy

A pre-norm block adds before it normalises: with `residual`, s = x + residual is normalised and returned too, and its
own gradient ds joins in: the gradient of x, and of the residual, is dx(s) + ds.

Statistics are in float32 whatever x is (float64 for float64). A backward needs s and ρ, one number a row.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

from lora.reference.linear import flat


class NormGradients(NamedTuple):
    """What the hand-written backward of a norm returns."""

    dx: Tensor  # [..., features]; the gradient of the residual, if there was one, is the same tensor
    dweight: Tensor  # [features]
    dbias: Tensor | None = None  # [features], LayerNorm with a bias


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = ...,
    residual: None = None,
    offset: float = ...,
    round_before_weight: bool = ...,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = ...,
    residual: Tensor,
    offset: float = ...,
    round_before_weight: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    offset: float = 0.0,
    round_before_weight: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (offset + w) ⊙ x / √(mean(x²) + ε), differentiable by autograd.

    Args:
        x: [..., features].
        weight: [features].
        eps: added to the mean square.
        residual: [..., features], added to x first, in x's dtype.
        offset: added to the weight; 1.0 for Gemma.
        round_before_weight: where a 16-bit x is rounded. True: x̂ is rounded to x's dtype, then multiplied (Llama,
            Mistral, Qwen, Phi). False: multiplied in float32, then rounded once (Gemma, OLMo 2, gpt-oss).

    Returns: y [..., features] in x's dtype; with `residual`, (y, x + residual).
    FLOPs: about 4 an element. Saved for backward by autograd: a few float32 copies of x; by a fused one: s and ρ.
    """
    s = x if residual is None else x + residual
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    normed = wide * inverse_rms(wide, eps)  # [..., features]
    if round_before_weight:
        y = ((offset + weight) * normed.to(s.dtype)).to(s.dtype)
    else:
        y = (normed * (offset + weight.to(wide.dtype))).to(s.dtype)
    return y if residual is None else (y, s)


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    dsum: Tensor | None = None,
    offset: float = 0.0,
) -> NormGradients:
    """The gradients of `rms_norm`, written out; rounding has no gradient, so `round_before_weight` does not matter.

    Args:
        dy: [..., features], the gradient with respect to y.
        dsum: [..., features], the gradient with respect to x + residual; None without a residual.
        the others: as they were given to `rms_norm`.
    """
    s = x if residual is None else x + residual
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    rho = inverse_rms(wide, eps)  # [..., 1]
    normed = wide * rho
    e = dy * (offset + weight.to(wide.dtype))  # [..., features]
    dx = rho * (e - normed * (e * normed).mean(-1, keepdim=True))
    if dsum is not None:
        dx = dx + dsum
    return NormGradients(dx.to(x.dtype), flat(dy * normed).sum(0).to(weight.dtype))


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = ..., residual: None = None
) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = ..., residual: Tensor
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """y = w ⊙ (x - μ) / √(var(x) + ε) + b, differentiable by autograd.

    Args:
        x: [..., features].
        weight, bias: [features]; the bias may be absent.
        eps: added to the variance (the mean square of x - μ).
        residual: [..., features], added to x first, in x's dtype.

    Returns: y [..., features] in x's dtype, computed in float32 (float64 for float64) and rounded once; with
        `residual`, (y, x + residual).
    FLOPs: about 7 an element. Saved for backward by autograd: a few float32 copies of x; by a fused one: s, μ and ρ.
    """
    s = x if residual is None else x + residual
    normed, _ = standardise(s, eps)  # [..., features]
    y = normed * weight.to(normed.dtype)
    y = (y if bias is None else y + bias.to(normed.dtype)).to(s.dtype)
    return y if residual is None else (y, s)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dsum: Tensor | None = None,
) -> NormGradients:
    """The gradients of `layer_norm`, written out.

    Args:
        dy: [..., features], the gradient with respect to y.
        dsum: [..., features], the gradient with respect to x + residual; None without a residual.
        the others: as they were given to `layer_norm`.
    """
    normed, rho = standardise(x if residual is None else x + residual, eps)
    e = dy * weight.to(normed.dtype)
    dx = rho * (e - e.mean(-1, keepdim=True) - normed * (e * normed).mean(-1, keepdim=True))
    if dsum is not None:
        dx = dx + dsum
    dbias = None if bias is None else flat(dy).to(normed.dtype).sum(0).to(bias.dtype)
    return NormGradients(dx.to(x.dtype), flat(dy * normed).sum(0).to(weight.dtype), dbias)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """ρ = 1 / √(mean(x²) + ε) of each row: [..., 1]."""
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def standardise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x̂ = ρ (x - μ) [..., features] and ρ [..., 1], in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    rho = inverse_rms(centred, eps)
    return centred * rho, rho
