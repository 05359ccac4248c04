"""RMSNorm and LayerNorm, each as one autograd function with the residual sum in front: equations as in
`lora.reference.norm`.

What is kept is s = x + residual, which the block needs anyway, and ρ, one float32 number a row (for LayerNorm μ too);
autograd would keep several float32 copies of x.
"""

from __future__ import annotations

from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from lora.fast import library
from lora.fast.operands import as_rows, shaped
from lora.fast.runtime import FusedFunction, runs_triton
from lora.fast.source import made_from


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
    """y = (offset + w) ⊙ x / √(mean(x²) + ε); arguments and results as in `lora.reference.norm.rms_norm`.

    FLOPs: about 4 an element. Saved for backward: s, and 4 bytes a row.
    """
    noted = keeps_input(x, residual)
    outputs = RMSNorm.apply(x, weight, residual, eps, offset, round_before_weight, noted)  # type: ignore[no-untyped-call]
    return outputs[0] if residual is None else outputs  # type: ignore[no-any-return]


def keeps_input(x: Tensor, residual: Tensor | None) -> bool:
    """Whether a norm's own backward keeps s, so that its result need not be kept (`lora.fast.source`)."""
    return torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad))


class RMSNorm(FusedFunction):
    """Forward and backward; returns (y, s), s = x + residual, or (y,)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        eps: float,
        offset: float,
        rounds: bool,
        noted: bool,
    ) -> tuple[Tensor, ...]:
        rows = as_rows(x)
        if runs_triton(rows):
            added = None if residual is None else as_rows(residual)
            y, s, rho = library.rms_norm_forward(rows, weight, added, eps, offset, rounds)
            s = rows if residual is None else s
        else:
            s = rows if residual is None else rows + as_rows(residual)
            wide = s.to(torch.promote_types(s.dtype, torch.float32))
            norm = torch.linalg.vector_norm(wide, dim=1)
            rho = norm.square_().div_(s.shape[1]).add_(eps).rsqrt_()  # [tokens]
            y = normed_rows(s, weight, rho, eps, offset, rounds)
        y = shaped(y, x.shape[:-1])
        ctx.save_for_backward(s, weight, rho)
        if noted:
            made_from(y, partial(normed_rows, eps=eps, offset=offset, rounds=rounds), s, weight, rho)
        ctx.offset, ctx.shape, ctx.sums = offset, x.shape, residual is not None
        return (y,) if residual is None else (y, s.view(x.shape))

    @staticmethod
    def backward(ctx: Any, dy: Tensor, ds: Tensor | None = None) -> tuple[Tensor | None, ...]:
        s, weight, rho = ctx.saved_tensors
        wants_x, wants_weight, wants_residual = ctx.needs_input_grad[:3]
        rows, dsum = as_rows(dy), as_rows(ds) if ctx.sums and ds is not None else None
        wants = (wants_x or wants_residual, wants_weight)
        gradients: tuple[Tensor | None, ...]
        if runs_triton(rows):
            gradients = library.rms_norm_backward(rows, s, weight, rho, dsum, ctx.offset, *wants)
        else:
            gradients = plain_rms_norm_backward(rows, s, weight, rho, ctx.offset, dsum, *wants)
        dx, dweight = (each if wanted else None for each, wanted in zip(gradients, wants, strict=True))
        dx = None if dx is None else dx.view(ctx.shape)
        return dx if wants_x else None, dweight, dx if wants_residual else None, None, None, None, None


def normed_rows(s: Tensor, weight: Tensor, rho: Tensor, eps: float, offset: float, rounds: bool) -> Tensor:
    """y = (offset + w) ⊙ ρ s, [tokens, features]; kernels count ρ anew, in the same way."""
    if runs_triton(s):
        return library.rms_norm_forward(s, weight, None, eps, offset, rounds)[0]
    wide = torch.promote_types(s.dtype, torch.float32)
    normed = s.to(wide) * rho[:, None]
    if rounds:
        return (normed.to(s.dtype) * (weight + offset)).to(s.dtype)
    return normed.mul_(weight.to(wide) + offset).to(s.dtype)


def plain_rms_norm_backward(
    dy: Tensor,
    s: Tensor,
    weight: Tensor,
    rho: Tensor,
    offset: float,
    dsum: Tensor | None,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = ρ (e - x̂ mean(e ⊙ x̂)) + ds with e = (offset + w) ⊙ dy, and dw, each where it is wanted: in plain torch."""
    wide = torch.promote_types(s.dtype, torch.float32)
    x, dx, dweight = s.to(wide), None, None
    if wants_x:
        e = dy * (weight.to(wide) + offset)  # [tokens, features]
        slope = torch.linalg.vecdot(e, x).mul_(rho.pow(3)).div_(s.shape[1])  # [tokens]: ρ³ mean(e ⊙ x)
        dx = e.mul_(rho[:, None]).addcmul_(x, slope[:, None], value=-1)
        if dsum is not None:
            dx.add_(dsum)
        dx = dx.to(s.dtype)
    if wants_weight:
        dweight = torch.linalg.vecdot(dy.to(wide) * rho[:, None], x, dim=0).to(weight.dtype)
    return dx, dweight


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
    """y = w ⊙ (x - μ) / √(var(x) + ε) + b; arguments and results as in `lora.reference.norm.layer_norm`.

    Without Triton the two halves are PyTorch's own LayerNorm, in float32 or float64.

    FLOPs: about 7 an element. Saved for backward: s, and 8 bytes a row.
    """
    noted = keeps_input(x, residual)
    outputs = LayerNorm.apply(x, weight, bias, residual, eps, noted)  # type: ignore[no-untyped-call]
    return outputs[0] if residual is None else outputs  # type: ignore[no-any-return]


class LayerNorm(FusedFunction):
    """Forward and backward; returns (y, s), s = x + residual, or (y,)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, noted: bool
    ) -> tuple[Tensor, ...]:
        rows, added = as_rows(x), None if residual is None else as_rows(residual)
        if runs_triton(rows):
            y, s, mean, rho = library.layer_norm_forward(rows, weight, bias, added, eps)
            s = rows if residual is None else s
        else:
            s = rows if added is None else rows + added
            y, mean, rho = plain_layer_norm(s, weight, bias, eps)
        y = shaped(y, x.shape[:-1])
        ctx.save_for_backward(s, weight, bias, mean, rho)
        if noted:
            made_from(y, partial(layer_normed_rows, eps=eps), s, weight, bias)
        ctx.shape, ctx.sums = x.shape, residual is not None
        return (y,) if residual is None else (y, s.view(x.shape))

    @staticmethod
    def backward(ctx: Any, dy: Tensor, ds: Tensor | None = None) -> tuple[Tensor | None, ...]:
        s, weight, bias, mean, rho = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
        rows, dsum = as_rows(dy), as_rows(ds) if ctx.sums and ds is not None else None
        bias, wants = bias if wants_bias else None, (wants_x or wants_residual, wants_weight, wants_bias)
        gradients: tuple[Tensor | None, ...]
        if runs_triton(rows):
            gradients = library.layer_norm_backward(rows, s, weight, bias, mean, rho, dsum, *wants[:2])
        else:
            gradients = plain_layer_norm_backward(rows, s, weight, bias, mean, rho, dsum, *wants[:2])
        dx, dweight, dbias = (each if wanted else None for each, wanted in zip(gradients, wants, strict=True))
        dx = None if dx is None else dx.view(ctx.shape)
        return dx if wants_x else None, dweight, dbias, dx if wants_residual else None, None, None


def layer_normed_rows(s: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """y = w ⊙ (s - μ) ρ + b, [tokens, features]."""
    if runs_triton(s):
        return library.layer_norm_forward(s, weight, bias, None, eps)[0]
    return plain_layer_norm(s, weight, bias, eps)[0]


def plain_layer_norm(s: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y [tokens, features], μ and ρ [tokens, 1]: PyTorch's own."""
    wide = torch.promote_types(s.dtype, torch.float32)
    b = None if bias is None else bias.to(wide)
    y, mean, rho = torch.native_layer_norm(s.to(wide), s.shape[1:], weight.to(wide), b, eps)
    return y.to(s.dtype), mean, rho


def plain_layer_norm_backward(
    dy: Tensor,
    s: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rho: Tensor,
    dsum: Tensor | None,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx = ρ (e - mean(e) - x̂ mean(e ⊙ x̂)) + ds with e = w ⊙ dy, and dw where they are wanted, and db where there is
    a bias: PyTorch's own."""
    wide = torch.promote_types(s.dtype, torch.float32)
    b, wants = None if bias is None else bias.to(wide), [wants_x, wants_weight, bias is not None]
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.to(wide), s.to(wide), s.shape[1:], mean, rho, weight.to(wide), b, wants
    )
    if wants_x and dsum is not None:
        dx.add_(dsum)
    return (
        dx.to(s.dtype) if wants_x else None,
        dweight.to(weight.dtype) if wants_weight else None,
        None if bias is None else dbias.to(bias.dtype),
    )
