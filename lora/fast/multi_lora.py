"""Many adapters in one batch, grouped: equations and signature as in `lora.reference.multi_lora`.

The tokens are sorted by adapter once, so that each adapter's are one slice: two thin products an adapter that is there,
and none for the others. (`lora.fast.kernels.multi_lora` does all adapters in one launch; it is not wired in yet.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora.fast.linear import as_rows, dense_of, packed, unpacked
from lora.projection import Projection
from lora.reference.multi_lora import check_adapters


def multi_lora_linear(
    x: Tensor, base: Projection, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, index: Tensor
) -> Tensor:
    """h_i = W x_i + b + s_j · B_j A_j x_i with j = index_i; as `lora.reference.multi_lora.multi_lora_linear`.

    FLOPs: 2·tokens·(in·out + r·(in + out)). Saved for backward: x and s·xAᵀ, tokens·(in + r) numbers.
    """
    check_adapters(x, base, lora_A, lora_B, scaling, index)
    static, tensors = unpacked([base._replace(lora_A=None, lora_B=None)])
    return MultiLoRA.apply(x, static, lora_A, lora_B, scaling, index, *tensors)  # type: ignore[no-untyped-call, no-any-return]


class MultiLoRA(torch.autograd.Function):
    """Forward and backward on tokens sorted by adapter; those of the base alone come first."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, static: Any, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, index: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        (part,) = packed(static, tensors)
        rows = as_rows(x)  # [tokens, in]
        h = torch.mm(rows, dense_of(part, x.dtype).T)
        if part.bias is not None:
            h.add_(part.bias)
        order, bounds = by_adapter(index, len(rows), len(lora_A))
        factors = [float(s) for s in scaling]
        su = rows.new_zeros(len(rows), lora_A.shape[1])
        for j, (start, end) in bounds.items():
            mine = order[start:end]
            su[start:end] = torch.mm(rows.index_select(0, mine), lora_A[j].to(x.dtype).T).mul_(factors[j])
            h.index_add_(0, mine, torch.mm(su[start:end], lora_B[j].to(x.dtype).T))
        ctx.save_for_backward(rows, su, order, lora_A, lora_B, *tensors)
        ctx.static, ctx.bounds, ctx.factors, ctx.shape = static, bounds, factors, x.shape
        return h.view(*x.shape[:-1], h.shape[1])

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        rows, su, order, lora_A, lora_B, *tensors = ctx.saved_tensors
        (part,) = packed(ctx.static, tensors)
        dy = as_rows(dh)
        wants_x, _, wants_A, wants_B = ctx.needs_input_grad[:4]
        wants_W, wants_b = ctx.needs_input_grad[6:8]
        dx = torch.mm(dy, dense_of(part, dy.dtype)) if wants_x else None
        dA = torch.zeros_like(lora_A) if wants_A else None
        dB = torch.zeros_like(lora_B) if wants_B else None
        for j, (start, end) in ctx.bounds.items():
            mine = order[start:end]
            dy_j = dy.index_select(0, mine)
            du = torch.mm(dy_j, lora_B[j].to(dy.dtype)).mul_(ctx.factors[j])  # [its tokens, r]
            if dB is not None:
                dB[j] = dy_j.T @ su[start:end]
            if dA is not None:
                dA[j] = du.T @ rows.index_select(0, mine)
            if dx is not None:
                dx.index_add_(0, mine, torch.mm(du, lora_A[j].to(dy.dtype)))
        dweight, dbias = dy.T @ rows if wants_W else None, dy.sum(0) if wants_b else None
        dx = None if dx is None else dx.view(ctx.shape)
        return dx, None, dA, dB, None, None, dweight, dbias, None, None, None


def by_adapter(index: Tensor, tokens: int, adapters: int) -> tuple[Tensor, dict[int, tuple[int, int]]]:
    """The tokens in the order of their adapters, int64 [tokens], and where each adapter's begin and end."""
    of_token = index.repeat_interleave(tokens // len(index)) if len(index) else index
    order = torch.argsort(of_token, stable=True)
    counts = torch.bincount(of_token + 1, minlength=adapters + 1).tolist()
    bounds, start = {}, counts[0]
    for adapter, count in enumerate(counts[1:]):
        if count:
            bounds[adapter] = (start, start + count)
        start += count
    return order, bounds
