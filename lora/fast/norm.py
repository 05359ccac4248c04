"""RMSNorm as one autograd function, with the residual sum in front: equations as in `lora.reference.norm`.

What is kept is s = x + residual, which the block needs anyway, and ρ, one float32 number a row; autograd would keep
several float32 copies of x.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from lora.fast.linear import as_rows
from lora.fast.runtime import runs_triton


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
    y, s = RMSNorm.apply(x, weight, residual, eps, offset, round_before_weight)  # type: ignore[no-untyped-call]
    return y if residual is None else (y, s)


class RMSNorm(torch.autograd.Function):
    """Forward and backward; returns (y, s), s = x + residual, or (y, None)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float, rounds: bool
    ) -> tuple[Tensor, Tensor | None]:
        rows = as_rows(x)
        if runs_triton(rows):
            from lora.fast.kernels import norm as kernels

            added = None if residual is None else as_rows(residual)
            y, s, rho = kernels.rms_norm_forward(
                rows, weight, eps=eps, offset=offset, round_before_weight=rounds, residual=added
            )
        else:
            s = rows if residual is None else rows + as_rows(residual)
            wide = s.to(torch.promote_types(s.dtype, torch.float32))
            norm = torch.linalg.vector_norm(wide, dim=1)
            rho = norm.square_().div_(s.shape[1]).add_(eps).rsqrt_()  # [tokens]
            normed = wide * rho[:, None]
            if rounds:
                y = (normed.to(s.dtype) * (weight + offset)).to(s.dtype)
            else:
                y = normed.mul_(weight.to(wide.dtype) + offset).to(s.dtype)
        ctx.save_for_backward(s, weight, rho)
        ctx.offset, ctx.shape, ctx.sums = offset, x.shape, residual is not None
        return y.view(x.shape), s.view(x.shape) if residual is not None else None

    @staticmethod
    def backward(ctx: Any, dy: Tensor, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        s, weight, rho = ctx.saved_tensors
        wants_x, wants_weight, wants_residual = ctx.needs_input_grad[:3]
        rows, dsum = as_rows(dy), as_rows(ds) if ctx.sums and ds is not None else None
        if runs_triton(rows):
            from lora.fast.kernels import norm as kernels

            dx, dweight = kernels.rms_norm_backward(
                rows, s, weight, rho, offset=ctx.offset, dsum=dsum, need_dweight=wants_weight
            )
        else:
            dx, dweight = self_backward(rows, s, weight, rho, ctx.offset, dsum, wants_weight)
        dx = dx.view(ctx.shape)
        return dx if wants_x else None, dweight, dx if wants_residual else None, None, None, None


def self_backward(
    dy: Tensor, s: Tensor, weight: Tensor, rho: Tensor, offset: float, dsum: Tensor | None, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """dx = ρ (e - x̂ mean(e ⊙ x̂)) + ds with e = (offset + w) ⊙ dy, and dw: in plain torch."""
    wide = torch.promote_types(s.dtype, torch.float32)
    x = s.to(wide)
    e = dy * (weight.to(wide) + offset)  # [tokens, features]
    slope = torch.linalg.vecdot(e, x).mul_(rho.pow(3)).div_(s.shape[1])  # [tokens]: ρ³ mean(e ⊙ x)
    dx = e.mul_(rho[:, None]).addcmul_(x, slope[:, None], value=-1)
    if dsum is not None:
        dx.add_(dsum)
    dweight = None
    if wants_weight:
        dweight = torch.linalg.vecdot(dy.to(wide) * rho[:, None], x, dim=0).to(weight.dtype)
    return dx.to(s.dtype), dweight
