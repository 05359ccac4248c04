"""The LoRA linear layer, fused: the equation and signature of `lora.reference.linear`, fewer passes over memory.

    h = x Wᵀ + b, then in place h += u Bᵀ with u = s · D(x) Aᵀ        one product writes h, a thin one adds to it
    dx = dy W, then in place dx += du A with du = s · dy B             nothing is added up in a tensor of its own
    dA = duᵀ D(x)        dB = dyᵀ u

The update is never a separate [tokens, out] tensor, dy B serves dA and dx, and u (tokens × r) is kept instead of made
again. s is a factor of the thin products, never a pass of its own. W has no gradient unless somebody unfroze it; what
autograd does not ask for is not computed.

Projections of one x (q, k, v; gate, up) are a *group*: their A's are stacked, D(x) is made once for all, and where
their weights lie one after another in memory (`lora.fast.inject.fuse` sees to that) or are decoded from NF4 into one
workspace, x goes through one product. `lora_linear` is a group of one, `lora_qkv` of three, `lora_mlp` of two and one.

An NF4 weight is decoded into a reused workspace (`lora.fast.nf4`), once in the forward and once in the backward (DoRA,
which needs the matrix itself, once more).
Dropout's mask is counted again in the backward (`lora.fast.dropout`); D(x) is never kept, and on a GPU never written:
the thin products make the mask in registers (DoRA, which takes D(x) through W too, excepted).

DoRA without dropout rescales the one product, h = g ⊙ (x Wᵀ + s u Bᵀ) + b; with dropout the frozen path needs the
undropped x, and so a second product (`lora.reference.dora` has the equation).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora.fast import library
from lora.fast.checkpoint import Product, product_is_wanted, product_was_made
from lora.fast.dora import dora_norm
from lora.fast.dropout import KeepRows, add_dropped_, apply_dropout, masks_in_products
from lora.fast.operands import (
    Factors,
    as_autocast,
    as_rows,
    back_through,
    columns_of,
    dense_of,
    factors_of,
    multiplied,
    shaped,
)
from lora.fast.parts import TENSORS, Part, packed, unpacked
from lora.fast.products import product, product_in
from lora.fast.runtime import FusedFunction
from lora.fast.source import NOTHING, source_of
from lora.projection import Dropout, Projection


def lora_linear(x: Tensor, projection: Projection, *, dropout: Dropout | None = None) -> Tensor:
    """h = x Wᵀ + b + s · (D(x) Aᵀ) Bᵀ; arguments and result as in `lora.reference.linear.lora_linear`.

    FLOPs: 2·tokens·(in·out + r·(in + out)). Saved for backward, in numbers of x's type: x and s·D(x)Aᵀ,
    tokens·(in + r); the projection's tensors by reference; nothing at all without an adapter. Besides these

    - where A or B is of another type than x: both in x's type, r·(in + out), so that they are cast once;
    - DoRA: g in x's type and its norm in float32 (float64 of float64), out numbers each; while m trains, also what g
      multiplies, tokens·out;
    - autocast: x, W and b are copies in its type, made for this call, of which W's in·out and b's out numbers are
      additional (NF4's codes are not copied), and A and B are of another type, as above;
    - dropout: nothing. The mask is counted again, and D(x) made again from x.

    Where x is a norm's result, what the norm keeps in any case is kept instead of x, and x is made again from that
    (`lora.fast.source`).
    """
    return project_group(x, [projection], dropout)[0]


def project_group(x: Tensor, projections: Sequence[Projection], dropout: Dropout | None) -> tuple[Tensor, ...]:
    """The outputs of several projections of one x, [..., out_i] each."""
    x, projections = as_autocast(x, projections)
    static, tensors = unpacked(projections)
    outputs: tuple[Tensor, ...] = LoRAGroup.apply(x, static, dropout, *tensors)  # type: ignore[no-untyped-call]
    product_was_made(outputs, keepable=all(p.magnitude is None for p in projections))
    return outputs


@dataclass
class Kept:
    """What a group's forward leaves for its backward, besides x: small tensors, and z for DoRA's dm."""

    u: Tensor | None = None  # [tokens, Σ r]: s · D(x) Aᵀ of each, side by side
    gains: tuple[Tensor | None, ...] = ()  # DoRA's g, [out] each
    norms: tuple[Tensor | None, ...] = ()
    adapted: tuple[Tensor | None, ...] = ()  # what g multiplies, [tokens, out], where m trains
    factors: Factors | None = None

    @staticmethod
    def count(parts: int) -> int:
        """How many tensors `flat` has."""
        return 2 + 4 * parts

    def flat(self) -> list[Tensor | None]:
        """As autograd saves it; factors that are the adapters themselves are left out."""
        cast = self.factors if self.factors is not None and self.factors.cast else None
        A, B = (None, (None,) * len(self.gains)) if cast is None else (cast.A, cast.B)
        return [self.u, A, *self.gains, *self.norms, *self.adapted, *B]

    @classmethod
    def of(cls, flat: Sequence[Tensor | None], parts: Sequence[Part], dtype: torch.dtype) -> Kept:
        """The inverse of `flat`, for gradients of `dtype`."""
        u, A, *each = flat
        gains, norms, adapted, B = (tuple(each[i * len(parts) : (i + 1) * len(parts)]) for i in range(4))
        return cls(u, gains, norms, adapted, factors_of(parts, dtype) if A is None else Factors(A, B, True))


def split(saved: Sequence[Tensor], *counts: int) -> list[Sequence[Tensor]]:
    """Saved tensors in pieces of these sizes, and what is left."""
    ends = [0, *itertools.accumulate(counts), len(saved)]
    return [saved[first:end] for first, end in itertools.pairwise(ends)]


class LoRAGroup(FusedFunction):
    """The forward and backward of a group of projections of one x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, static: Any, dropout: Dropout | None, *tensors: Tensor | None) -> Any:
        parts = packed(static, tensors)
        rows = as_rows(x)  # [tokens, in]
        wants_m = [ctx.needs_input_grad[3 + TENSORS * i + 4] for i in range(len(parts))]
        trains = any(ctx.needs_input_grad[3:])
        factors = factors_of(parts, rows.dtype)
        wanted = product_is_wanted()
        outputs, kept = forward_group(rows, parts, dropout, wants_m, wanted, factors=factors)
        ctx.make_rows, source, _ = source_of(x, rows) if trains else NOTHING
        ctx.save_for_backward(*tensors, *kept.flat(), *source)
        ctx.static, ctx.dropout, ctx.shape = static, dropout, x.shape
        return tuple(shaped(h, x.shape[:-1]) for h in outputs)

    @staticmethod
    def backward(ctx: Any, *dhs: Tensor) -> tuple[Any, ...]:
        count = len(ctx.static)
        tensors, small, source = split(ctx.saved_tensors, TENSORS * count, Kept.count(count))
        parts = packed(ctx.static, tensors)
        kept = Kept.of(small, parts, dhs[0].dtype)
        rows = ctx.make_rows(*source)
        dys = [as_rows(dh) for dh in dhs]
        needs = [ctx.needs_input_grad[3 + TENSORS * i : 3 + TENSORS * (i + 1)] for i in range(count)]
        dx, gradients = backward_group(dys, rows, parts, kept, ctx.dropout, ctx.needs_input_grad[0], needs)
        return None if dx is None else dx.view(ctx.shape), None, None, *itertools.chain.from_iterable(gradients)


def forward_group(
    rows: Tensor,
    parts: Sequence[Part],
    dropout: Dropout | KeepRows | None,
    keeps_adapted: Sequence[bool],
    wanted: bool | Product = True,
    out: Tensor | None = None,
    *,
    factors: Factors | None,
    adds: bool = True,
) -> tuple[Sequence[Tensor], Kept]:
    """h_i = x W_iᵀ + b_i + s_i · (D(x) A_iᵀ) B_iᵀ of each part, as `operands.multiplied` lays them out.

    Args:
        wanted: False where only what is kept matters; the outputs are then left as they are in memory. Or the outputs,
            made before.
        out: a buffer, [tokens, Σ out], that may be used for them.
        factors: `factors_of(parts, x's type)`.
        adds: False where the caller adds the updates itself: the outputs are then x W_iᵀ + b_i.
    """
    dtype, none = rows.dtype, (None,) * len(parts)
    dropped, u = rows, None
    if factors is not None:
        if any(part.magnitude is not None for part in parts) or not masks_in_products(dropout, rows):
            dropped, dropout = apply_dropout(rows, dropout), None
        u = through_A(dropped, parts, factors, dropout)
    if wanted is not True and all(part.magnitude is None for part in parts):
        if wanted is False:
            sizes = [part.out_features for part in parts]
            wanted = columns_of(rows.new_empty(len(rows), sum(sizes)) if out is None else out, sizes)
        return [as_rows(h) for h in wanted], Kept(u, none, none, none, factors)
    outputs = multiplied(rows, parts, out)
    gains: list[Tensor | None] = list(none)
    norms: list[Tensor | None] = list(none)
    adapted: list[Tensor | None] = list(none)
    if factors is not None and u is not None and adds:
        thin = columns_of(u, [part.rank for part in parts])
        for i, (part, h_i, u_i, B) in enumerate(zip(parts, outputs, thin, factors.B, strict=True)):
            if B is not None and part.magnitude is None:
                h_i.addmm_(u_i, B.T)
            elif B is not None:
                gains[i], norms[i], z = rescale_(h_i, rows, dropped, part, factors, i, u_i)
                adapted[i] = z if keeps_adapted[i] else None
    for part, h_i in zip(parts, outputs, strict=True):
        if part.bias is not None:
            h_i.add_(part.bias.to(dtype))
    return outputs, Kept(u, tuple(gains), tuple(norms), tuple(adapted), factors)


def through_A(rows: Tensor, parts: Sequence[Part], factors: Factors, dropout: Dropout | KeepRows | None) -> Tensor:
    """u = s_i · D(x) A_iᵀ of each part, side by side, [tokens, Σ r]: one product where the scalings are one.

    Args:
        dropout: what `masks_in_products` says yes to, or None where `rows` are D(x) already.
    """
    scalings = {part.scaling for part in parts if part.rank}
    if len(scalings) == 1:
        return thin_product(rows, factors.A, scalings.pop(), dropout)
    each = zip(parts, factors.A.split([part.rank for part in parts]), strict=True)
    return torch.cat([thin_product(rows, A, part.scaling, dropout) for part, A in each], dim=1)


def thin_product(rows: Tensor, A: Tensor, scaling: float, dropout: Dropout | KeepRows | None) -> Tensor:
    """s · D(x) Aᵀ, [tokens, r]; arguments as in `through_A`."""
    if masks_in_products(dropout, rows):
        return library.dropped_product(rows, A, scaling, dropout.p, dropout.seed, dropout.stream)
    return rows.new_empty(len(rows), len(A)).addmm_(rows, A.T, beta=0, alpha=scaling)


def rescale_(
    h: Tensor, rows: Tensor, dropped: Tensor, part: Part, factors: Factors, i: int, u: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """DoRA, where h = x Wᵀ becomes x Wᵀ + (g - 1) ⊙ D(x) Wᵀ + g ⊙ u Bᵀ.

    Returns: g and the norm it comes from, [out] each, and z = D(x) Wᵀ + u Bᵀ, [tokens, out].
    """
    dense, A, B = dense_of(part, rows.dtype), A_of(factors, i), factors.B[i]
    if B is None or part.magnitude is None:
        raise TypeError("a projection without a magnitude is not rescaled")
    norm = dora_norm(dense, A, B, part.scaling)
    gain = (part.magnitude / norm).to(rows.dtype)
    if dropped is rows:  # D is the identity, so h = g ⊙ z, and one wide product is enough
        z = torch.addmm(h, u, B.T)
        h.copy_(z * gain)
        return gain, norm, z
    z = product(dropped, dense.T)
    h.sub_(z)
    h.addcmul_(z.addmm_(u, B.T), gain)
    return gain, norm, z


def A_of(factors: Factors, i: int) -> Tensor:
    """One part's A, [r, in], among the stacked ones."""
    ranks = [0 if B is None else B.shape[1] for B in factors.B]
    return factors.A.narrow(0, sum(ranks[:i]), ranks[i])


class Upstream(NamedTuple):
    """What reaches a group from behind, taken back through the B's."""

    dys: Sequence[Tensor]  # [tokens, out_i] each
    dhs: Sequence[Tensor]  # [tokens, out_i] each: what reaches the update, g ⊙ dy with DoRA
    du: Tensor | None  # [tokens, Σ r]
    factors: Factors | None


def backward_group(
    dys: Sequence[Tensor],
    rows: Tensor | None,
    parts: Sequence[Part],
    kept: Kept,
    dropout: Dropout | KeepRows | None,
    wants_x: bool,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, list[tuple[Tensor | None, ...]]]:
    """dx of the group, and each part's (dweight, dbias, dlora_A, dlora_B, dmagnitude); None where not needed.

    Args:
        dys: [tokens, out_i] each. needs: for each part, which of its five tensors want a gradient.
    """
    upstream = upstream_of(dys, parts, kept, wants_x, needs)
    gradients = part_gradients(upstream, rows, parts, kept, dropout, needs)
    return input_gradient(upstream, parts, kept, dropout) if wants_x else None, gradients


def upstream_of(
    dys: Sequence[Tensor],
    parts: Sequence[Part],
    kept: Kept,
    wants_x: bool,
    needs: Sequence[Sequence[bool]],
) -> Upstream:
    """du = s_i · dh_i B_i and what it is made of."""
    if kept.factors is None:
        return Upstream(dys, dys, None, None)
    dhs = [dy if gain is None else dy * gain for dy, gain in zip(dys, kept.gains, strict=True)]
    wanted = wants_x or any(need[2] for need in needs)
    return Upstream(dys, dhs, through_B(dhs, parts, kept.factors) if wanted else None, kept.factors)


def part_gradients(
    upstream: Upstream,
    rows: Tensor | None,
    parts: Sequence[Part],
    kept: Kept,
    dropout: Dropout | KeepRows | None,
    needs: Sequence[Sequence[bool]],
) -> list[tuple[Tensor | None, ...]]:
    """Each part's (dweight, dbias, dlora_A, dlora_B, dmagnitude); None where not needed."""
    gradients: list[list[Tensor | None]] = []
    for dy, gain, norm, z, need in zip(upstream.dys, kept.gains, kept.norms, kept.adapted, needs, strict=True):
        dweight = weight_gradient(dy, rows, gain, dropout) if need[0] and rows is not None else None
        dbias = dy.sum(0) if need[1] else None
        # dg/dm = 1 / norm
        dmagnitude = (dy * z).sum(0).to(norm.dtype) / norm if norm is not None and z is not None and need[4] else None
        gradients.append([dweight, dbias, None, None, dmagnitude])
    if upstream.factors is not None:
        adapter_gradients(gradients, upstream.dhs, upstream.du, rows, parts, kept, dropout, needs)
    return [tuple(row) for row in gradients]


def through_B(dhs: Sequence[Tensor], parts: Sequence[Part], factors: Factors) -> Tensor:
    """du = s_i · dh_i B_i of each part, side by side, [tokens, Σ r]: serves dA and dx."""
    du = dhs[0].new_empty(len(dhs[0]), len(factors.A))
    for part, dh, B, du_i in zip(parts, dhs, factors.B, columns_of(du, [p.rank for p in parts]), strict=True):
        if B is not None:
            du_i.addmm_(dh, B, beta=0, alpha=part.scaling)
    return du


def adapter_gradients(
    gradients: Sequence[list[Tensor | None]],
    dhs: Sequence[Tensor],
    du: Tensor | None,
    rows: Tensor | None,
    parts: Sequence[Part],
    kept: Kept,
    dropout: Dropout | KeepRows | None,
    needs: Sequence[Sequence[bool]],
) -> None:
    """dA = duᵀ D(x) and dB_i = dh_iᵀ u_i into `gradients`; the dA's are rows of one product."""
    ranks = [part.rank for part in parts]
    if kept.u is not None:
        for i, (part, dh, u) in enumerate(zip(parts, dhs, columns_of(kept.u, ranks), strict=True)):
            if needs[i][3] and part.lora_B is not None:
                gradients[i][3] = product_in(part.lora_B.dtype, dh.T, u)
    wanted = [part.lora_A.dtype for part, need in zip(parts, needs, strict=True) if part.lora_A is not None and need[2]]
    if not wanted or du is None or rows is None:
        return
    widest = functools.reduce(torch.promote_types, wanted)
    if masks_in_products(dropout, rows):
        stacked = library.dropped_sum(du, rows, widest, dropout.p, dropout.seed, dropout.stream)  # [Σ r, in]
    else:
        stacked = product_in(widest, du.T, apply_dropout(rows, dropout))
    for i, (part, dA) in enumerate(zip(parts, stacked.split(ranks) if len(parts) > 1 else (stacked,), strict=True)):
        if needs[i][2] and part.lora_A is not None:
            gradients[i][2] = dA.to(part.lora_A.dtype)


def weight_gradient(dy: Tensor, rows: Tensor, gain: Tensor | None, dropout: Dropout | KeepRows | None) -> Tensor:
    """dW = dyᵀ x, for a base weight that somebody unfroze; DoRA's gain included, [out, in]."""
    dweight = dy.T @ rows
    if gain is None:
        return dweight
    return dweight.addmm_((dy * (gain - 1)).T, apply_dropout(rows, dropout))


def input_gradient(upstream: Upstream, parts: Sequence[Part], kept: Kept, dropout: Dropout | KeepRows | None) -> Tensor:
    """dx = Σ dy_i W_i + D(Σ du_i A_i), and DoRA's part of it, [tokens, in]."""
    dys, _, du, factors = upstream
    if du is None or factors is None:
        return back_through(dys, parts)
    if dropout is None:
        rescaled = [dy if gain is None else dy * gain for dy, gain in zip(dys, kept.gains, strict=True)]
        return back_through(rescaled, parts).addmm_(du, factors.A)
    if masks_in_products(dropout, du) and all(gain is None for gain in kept.gains):
        dx = back_through(dys, parts)
        library.add_dropped_product(dx, du, factors.A, dropout.p, dropout.seed, dropout.stream)
        return dx
    through_dropout = product(du, factors.A)
    for dy, gain, part in zip(dys, kept.gains, parts, strict=True):
        if gain is not None:
            through_dropout.addmm_(dy * (gain - 1), dense_of(part, dy.dtype))
    return add_dropped_(back_through(dys, parts), through_dropout, dropout)
