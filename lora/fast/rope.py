"""Rotary position embedding as one autograd function: equations as in `lora.reference.rope`.

The backward is the forward with the opposite angle, so only cos and sin are kept, which all layers share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora.fast import library
from lora.fast.runtime import FusedFunction, runs_triton
from lora.reference.rope import per_token, rotate


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, position_ids: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """q and k rotated; arguments, results and errors as in `lora.reference.rope.rope`.

    Tables that take a gradient themselves, which no model's do, go the reference's way.

    FLOPs: 3 an element. Saved for backward: cos and sin; with position_ids their rows of every token,
    batch·seq·rot numbers each.
    """
    cos, sin = per_token(cos, position_ids, q), per_token(sin, position_ids, q)  # [batch or 1, 1, seq, rot]
    trained = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    if trained or (torch.compiler.is_compiling() and not runs_triton(q)):  # torch 2.11 loses the gradient in a graph
        return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
    return Rope.apply(q, k, cos, sin, interleaved)  # type: ignore[no-untyped-call, no-any-return]


class Rope(FusedFunction):
    """Forward and backward for q and k together."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rotated(q, k, cos, sin, interleaved, inverse=False)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        wants_q, wants_k = ctx.needs_input_grad[:2]
        if not wants_q:
            dq = dq[:, :0]  # no heads: nothing to turn
        if not wants_k:
            dk = dk[:, :0]
        dq, dk = rotated(dq, dk, cos, sin, ctx.interleaved, inverse=True)
        return dq if wants_q else None, dk if wants_k else None, None, None, None


def rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k turned by the angles, or back by them: new tensors."""
    if runs_triton(q):
        return library.rope_rotate(q, k, cos[:, 0], sin[:, 0], None, interleaved, inverse)
    return turn(q, cos, sin, interleaved, inverse), turn(k, cos, sin, interleaved, inverse)


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """x ⊙ cos ± R(x) ⊙ sin on the first rot features; each pair's two results are written in place.

    The sign goes into the table: `addcmul_` rounds otherwise where its factor is -1, on a GPU, and the gradient is the
    rotation back in every bit.
    """
    rot = cos.shape[-1]
    turned = x[..., :rot] * cos
    first, second = halves(turned, interleaved)
    a, b = halves(x[..., :rot], interleaved)
    sin_a, sin_b = halves(sin.to(turned.dtype), interleaved)
    first.addcmul_(b.to(turned.dtype), sin_a if inverse else -sin_a)
    second.addcmul_(a.to(turned.dtype), -sin_b if inverse else sin_b)
    turned = turned.to(x.dtype)
    return turned if rot == x.shape[-1] else torch.cat([turned, x[..., rot:]], dim=-1)


def halves(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second feature of every pair, as views."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second
