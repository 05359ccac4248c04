"""The gated MLP as one autograd function: equations and signature as in `lora.reference.mlp`.

Between gate/up and down only g and z are kept: the hidden h = act(g) ⊙ z is made again in the backward, in the pass
over memory that computes dg and dz anyway. dg and dz are written side by side, so that they go back through gate and
up in one product where the weights lie together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.fast import library
from lora.fast.checkpoint import product_is_wanted, product_was_made
from lora.fast.linear import (
    Kept,
    Upstream,
    backward_group,
    forward_group,
    input_gradient,
    part_gradients,
    split,
    upstream_of,
)
from lora.fast.operands import as_autocast, as_rows, back_through, factors_of, row_blocks, shaped
from lora.fast.parts import MAX_RANK, TENSORS, LowRank, Part, flat_term, packed, unpacked
from lora.fast.runtime import FusedFunction, runs_triton
from lora.fast.source import NOTHING, source_of
from lora.projection import Dropout, Projection
from lora.reference.mlp import check_activation, hidden_dropout


def lora_mlp(
    x: Tensor, gate: Projection, up: Projection, down: Projection, *, activation: str, dropout: Dropout | None = None
) -> Tensor:
    """y = down(act(gate(x)) ⊙ up(x)); arguments, result and errors as in `lora.reference.mlp.lora_mlp`.

    FLOPs: those of three `lora_linear`. Saved for backward: x, g, z and s·D(·)Aᵀ of each, tokens·(in + 2·hidden + Σ r)
    numbers. Besides these what `lora_linear` saves: copies of adapters of another type than x, Σ r·(in_i + out_i);
    DoRA's g and norm, 2·(2·hidden + out), and tokens·(2·hidden + out) while the magnitudes train; with autocast copies
    of the weights, hidden·(2·in + out), so that gate and up no longer lie together. Dropout saves nothing: neither
    mask, nor D(x), nor D(h). A norm's result x is not kept either, but made again (`lora.fast.source`).
    """
    check_activation(activation)
    x, projections = as_autocast(x, [gate, up, down])
    static, tensors = unpacked(projections)
    y: Tensor = LoRAMLP.apply(x, static, activation, dropout, *tensors)  # type: ignore[no-untyped-call]
    product_was_made((y,), keepable=down.magnitude is None)
    return y


class LoRAMLP(FusedFunction):
    """Forward and backward of the MLP; tensors 0 to 9 belong to gate and up, 10 to 14 to down."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, static: Any, activation: str, dropout: Dropout | None, *tensors: Tensor | None
    ) -> Tensor:
        parts = packed(static, tensors)
        rows = as_rows(x)
        wants_m = [ctx.needs_input_grad[4 + TENSORS * i + 4] for i in range(3)]
        factors, of_down = factors_of(parts[:2], rows.dtype), factors_of(parts[2:], rows.dtype)
        adds = not takes_updates(parts[:2], rows)
        (g, z), above = forward_group(rows, parts[:2], dropout, wants_m[:2], factors=factors, adds=adds)
        updates = NO_UPDATES if adds else updates_of(parts[:2], above)
        h = gated_forward(g, z, activation, updates)  # [tokens, hidden]
        wanted = product_is_wanted()
        (y,), below = forward_group(h, parts[2:], hidden_dropout(dropout), wants_m[2:], wanted, factors=of_down)
        trains = any(ctx.needs_input_grad[4 : 4 + 2 * TENSORS])
        ctx.make_rows, source, _ = source_of(x, rows) if trains else NOTHING
        ctx.save_for_backward(g, z, *tensors, *above.flat(), *below.flat(), *source)
        ctx.static, ctx.activation, ctx.dropout, ctx.shape, ctx.adds = static, activation, dropout, x.shape, adds
        return shaped(y, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        counts = 2, 3 * TENSORS, Kept.count(2), Kept.count(1)
        (g, z), tensors, of_two, of_one, source = split(ctx.saved_tensors, *counts)
        parts = packed(ctx.static, tensors)
        above, below = Kept.of(of_two, parts[:2], g.dtype), Kept.of(of_one, parts[2:], g.dtype)
        needs = [ctx.needs_input_grad[4 + TENSORS * i : 4 + TENSORS * (i + 1)] for i in range(3)]
        wants_x, dropout = ctx.needs_input_grad[0], hidden_dropout(ctx.dropout)
        needs_above = wants_x or any(any(need) for need in needs[:2])
        needs_h = needs[2][0] or needs[2][2]  # only a down projection that trains reads h again

        updates = NO_UPDATES if ctx.adds else updates_of(parts[:2], above)
        behind = upstream_of([as_rows(dy)], parts[2:], below, needs_above, needs[2:])
        h: Tensor | None = None
        dx: Tensor | None = None
        of_above: list[tuple[Tensor | None, ...]] = [(None,) * TENSORS] * 2
        if needs_above:
            dh, plus_dh = hidden_gradient(behind, parts[2:], below, dropout)
            dg, dz, h = gated_backward(dh, g, z, ctx.activation, (plus_dh, *updates), needs_h)
            del dh
        elif needs_h:
            h = gated_forward(g, z, ctx.activation, updates)
        of_down = part_gradients(behind, h, parts[2:], below, dropout, needs[2:])
        del h  # dh and h are gone before dx is made
        if needs_above:
            rows = ctx.make_rows(*source)
            dx, of_above = backward_group([dg, dz], rows, parts[:2], above, ctx.dropout, wants_x, needs[:2])
        gradients = itertools.chain.from_iterable([*of_above, *of_down])
        return None if dx is None else dx.view(ctx.shape), None, None, None, *gradients


Updates = tuple[LowRank | None, ...]
NO_UPDATES: Updates = (None, None)


def takes_updates(parts: Sequence[Part], rows: Tensor) -> bool:
    """Whether the activation kernels can add these parts' updates to what they read."""
    return runs_triton(rows) and all(part.magnitude is None and part.rank <= MAX_RANK for part in parts)


def updates_of(parts: Sequence[Part], kept: Kept) -> Updates:
    """u_i B_iᵀ of each part, for a kernel; None where there is no adapter."""
    if kept.u is None or kept.factors is None:
        return NO_UPDATES
    thin = kept.u.split([part.rank for part in parts], dim=1)
    return tuple(None if B is None else LowRank(u, B, 1.0) for u, B in zip(thin, kept.factors.B, strict=True))


def hidden_gradient(
    behind: Upstream, parts: Sequence[Part], kept: Kept, dropout: Dropout | None
) -> tuple[Tensor, LowRank | None]:
    """dh = dy W + du A, [tokens, hidden]; the second term apart, if the activation's kernel can add it."""
    if behind.du is None or behind.factors is None or dropout is not None or not takes_updates(parts, behind.du):
        return input_gradient(behind, parts, kept, dropout), None
    return back_through(behind.dys, parts), LowRank(behind.du, behind.factors.A.T, 1.0)


def gated_forward(g: Tensor, z: Tensor, activation: str, updates: Updates = NO_UPDATES) -> Tensor:
    """h = act(g) ⊙ z, [tokens, hidden]; on kernels g and z may have an update to be added first."""
    if runs_triton(g):
        return library.gated_forward(g, z, activation, *flat_term(updates[0]), *flat_term(updates[1]))
    return activated(g, activation).mul_(z)


def gated_backward(
    dh: Tensor, g: Tensor, z: Tensor, activation: str, updates: Updates = (None, *NO_UPDATES), with_h: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dg = dh ⊙ z ⊙ act'(g) and dz = dh ⊙ act(g), the two halves of one buffer [tokens, 2·hidden]; h where wanted.

    On kernels dh, g and z may have an update to be added first; elsewhere h takes the memory of dh, the caller's own.
    """
    if runs_triton(g):
        plus_dh, plus_g, plus_z = (flat_term(update) for update in updates)
        both, made = library.gated_backward(dh, g, z, activation, *plus_dh, *plus_g, *plus_z, with_h)
        dg, dz = both.chunk(2, dim=1)
        return dg, dz, made if with_h else None
    both = dh.new_empty(len(dh), 2 * dh.shape[1])
    dg, dz = both.chunk(2, dim=1)
    wide = torch.promote_types(g.dtype, torch.float32)
    for rows in row_blocks(g):
        act = activated(g[rows], activation)
        write_product(through_activation(dh[rows].to(wide), g[rows].to(wide), activation), z[rows], dg[rows])
        write_product(act, dh[rows], dz[rows])
        if with_h:
            write_product(act, z[rows], dh[rows])
    return dg, dz, dh if with_h else None


def activated(g: Tensor, activation: str) -> Tensor:
    """act(g), a new tensor."""
    return F.silu(g) if activation == "silu" else F.gelu(g, approximate=GELU[activation])


def through_activation(dact: Tensor, g: Tensor, activation: str) -> Tensor:
    """dact ⊙ act'(g), in one pass of PyTorch's own."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(dact, g)  # type: ignore[no-any-return]
    return torch.ops.aten.gelu_backward(dact, g, approximate=GELU[activation])  # type: ignore[no-any-return]


GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # PyTorch's names


def write_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left ⊙ right, rounded once, without a tensor in between; a graph joins the two steps itself."""
    if torch.compiler.is_compiling():
        out.copy_(left * right)
    else:
        torch.mul(left, right, out=out)
