"""The LoRA linear layer, fused: the equation and signature of `lora.reference.linear`, fewer passes over memory.

    h = x Wᵀ + b, then in place h += (s · D(x) Aᵀ) Bᵀ        one product writes h, a thin one adds to it
    dx = dy W, then in place dx += (s · dy B) A               nothing is added up in a tensor of its own

The update is never a separate [tokens, out] tensor, dy B serves dA and dx, and s · D(x) Aᵀ (tokens × r) is kept
instead of made again. W has no gradient unless somebody unfroze it; what autograd does not ask for is not computed.

Projections of one x (q, k, v; gate, up) are a *group*: their A's are stacked, D(x) is made once for all, and where
their weights lie one after another in memory (`lora.fast.inject.fuse` sees to that) or are decoded from NF4 into one
workspace, x goes through one product. `lora_linear` is a group of one, `lora_qkv` of three, `lora_mlp` of two and one.

An NF4 weight is decoded into a reused workspace (`lora.fast.nf4`), once in the forward and once in the backward.
Dropout's mask is counted again in the backward (`lora.fast.dropout`); D(x) is never kept.

DoRA without dropout rescales the one product, h = g ⊙ (x Wᵀ + s u Bᵀ) + b; with dropout the frozen path needs the
undropped x, and so a second product (`lora.reference.dora` has the equation).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora.fast.checkpoint import product_is_wanted
from lora.fast.dora import dora_norm
from lora.fast.dropout import KeepRows, add_dropped_, apply_dropout
from lora.fast.nf4 import decode_into, workspace
from lora.projection import Dropout, NF4Weight, Projection

TENSORS = 5  # of a projection that autograd sees: weight, bias, lora_A, lora_B, magnitude


def lora_linear(x: Tensor, projection: Projection, *, dropout: Dropout | None = None) -> Tensor:
    """h = x Wᵀ + b + s · (D(x) Aᵀ) Bᵀ; arguments and result as in `lora.reference.linear.lora_linear`.

    FLOPs: 2·tokens·(in·out + r·(in + out)). Saved for backward: x and s·D(x)Aᵀ, tokens·(in + r) numbers (with a
    trainable DoRA magnitude also tokens·out); W, A, B by reference. Nothing at all without an adapter.
    """
    return project_group(x, [projection], dropout)[0]


def project_group(x: Tensor, projections: Sequence[Projection], dropout: Dropout | None) -> tuple[Tensor, ...]:
    """The outputs of several projections of one x, [..., out_i] each."""
    static, tensors = unpacked(projections)
    return LoRAGroup.apply(x, static, dropout, *tensors)  # type: ignore[no-untyped-call, no-any-return]


class Part(NamedTuple):
    """A projection inside an autograd function."""

    weight: Tensor | None  # dense, or None where it is quantised
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    magnitude: Tensor | None
    quantised: NF4Weight | None
    scaling: float

    @property
    def out_features(self) -> int:
        weight = self.quantised if self.weight is None else self.weight
        return int(weight.shape[0])  # type: ignore[union-attr]

    @property
    def rank(self) -> int:
        return 0 if self.lora_A is None else self.lora_A.shape[0]


@dataclass
class Kept:
    """What a group's forward leaves for its backward, besides x: small tensors, and z for DoRA's dm."""

    su: Tensor | None = None  # [tokens, Σ r]: s · D(x) Aᵀ of each, side by side
    gains: tuple[Tensor | None, ...] = ()  # DoRA's g, [out] each
    norms: tuple[Tensor | None, ...] = ()
    adapted: tuple[Tensor | None, ...] = ()  # what g multiplies, [tokens, out], where m trains


class LoRAGroup(torch.autograd.Function):
    """The forward and backward of a group of projections of one x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, static: Any, dropout: Dropout | None, *tensors: Tensor | None) -> Any:
        parts = packed(static, tensors)
        rows = as_rows(x)  # [tokens, in]
        wants_m = [ctx.needs_input_grad[3 + TENSORS * i + 4] for i in range(len(parts))]
        trains = any(ctx.needs_input_grad[3:])
        wanted = product_is_wanted(saved_by(parts, wants_m) + trains)
        outputs, kept = forward_group(rows, parts, dropout, wants_m, wanted)
        ctx.save_for_backward(rows if trains else None, *tensors, kept.su, *kept.gains, *kept.norms, *kept.adapted)
        ctx.static, ctx.dropout, ctx.shape = static, dropout, x.shape
        return tuple(h.view(*x.shape[:-1], h.shape[1]) for h in outputs)

    @staticmethod
    def backward(ctx: Any, *dhs: Tensor) -> tuple[Any, ...]:
        count = len(ctx.static)
        rows, *saved = ctx.saved_tensors
        parts = packed(ctx.static, saved[: TENSORS * count])
        su, *rest = saved[TENSORS * count :]
        kept = Kept(su, *(tuple(rest[count * i : count * (i + 1)]) for i in range(3)))
        dys = [as_rows(dh) for dh in dhs]
        needs = [ctx.needs_input_grad[3 + TENSORS * i : 3 + TENSORS * (i + 1)] for i in range(count)]
        dx, gradients = backward_group(dys, rows, parts, kept, ctx.dropout, ctx.needs_input_grad[0], needs)
        return None if dx is None else dx.view(ctx.shape), None, None, *itertools.chain.from_iterable(gradients)


def forward_group(
    rows: Tensor,
    parts: Sequence[Part],
    dropout: Dropout | KeepRows | None,
    keeps_adapted: Sequence[bool],
    wanted: bool = True,
) -> tuple[list[Tensor], Kept]:
    """h_i = x W_iᵀ + b_i + s_i · (D(x) A_iᵀ) B_iᵀ of each part; outputs may be column slices of one buffer.

    Args:
        wanted: False where only what is kept matters; the outputs are then left as they are in memory.
    """
    dtype = rows.dtype
    adapted_input, su = rows, None
    if any(part.rank for part in parts):
        adapted_input = apply_dropout(rows, dropout)
        su = torch.mm(adapted_input, stacked_A(parts, dtype, scaled=True).T)  # [tokens, Σ r]
    if not wanted and all(part.magnitude is None for part in parts):
        none = (None,) * len(parts)
        return [rows.new_empty(len(rows), part.out_features) for part in parts], Kept(su, none, none, none)
    outputs = products(rows, parts)
    thin = [None] * len(parts) if su is None else su.split([part.rank for part in parts], dim=1)
    gains, norms, adapted = [], [], []
    for i, (part, h, su_i) in enumerate(zip(parts, outputs, thin, strict=True)):
        gain = norm = z = None
        if part.lora_A is None or part.lora_B is None or su_i is None:
            pass
        elif part.magnitude is None:
            h.addmm_(su_i, part.lora_B.to(dtype).T)
        else:
            dense = dense_of(part, dtype)
            norm = dora_norm(dense, part.lora_A.to(dtype), part.lora_B.to(dtype), part.scaling)  # [out]
            gain = (part.magnitude / norm).to(dtype)
            z = rescale_(h, rows, adapted_input, dense, su_i, part.lora_B.to(dtype), gain)
        if part.bias is not None:
            h.add_(part.bias.to(dtype))
        gains.append(gain)
        norms.append(norm)
        adapted.append(z if keeps_adapted[i] else None)
    return outputs, Kept(su, tuple(gains), tuple(norms), tuple(adapted))


def saved_by(parts: Sequence[Part], keeps_adapted: Sequence[bool]) -> int:
    """How many tensors a group keeps besides x: those of its projections, su, and DoRA's."""
    given = sum(tensor is not None for part in parts for tensor in part[:TENSORS])
    return (
        given + any(part.rank for part in parts) + 2 * sum(p.magnitude is not None for p in parts) + sum(keeps_adapted)
    )


def rescale_(h: Tensor, rows: Tensor, dropped: Tensor, dense: Tensor, su: Tensor, B: Tensor, gain: Tensor) -> Tensor:
    """DoRA: h = x Wᵀ becomes x Wᵀ + (g - 1) ⊙ D(x) Wᵀ + g ⊙ su Bᵀ; returns z = D(x) Wᵀ + su Bᵀ, [tokens, out]."""
    if dropped is rows:  # D is the identity, so h = g ⊙ z, and one wide product is enough
        z = torch.addmm(h, su, B.T)
        torch.mul(z, gain, out=h)
        return z
    z = torch.mm(dropped, dense.T)
    h.sub_(z)
    h.addcmul_(z.addmm_(su, B.T), gain)
    return z


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
    dtype = dys[0].dtype
    ranks = [part.rank for part in parts]
    thin: list[Any] = [None] * len(parts) if kept.su is None else list(kept.su.split(ranks, dim=1))
    du = None
    if sum(ranks) and (wants_x or any(need[2] for need in needs)):
        du = dys[0].new_empty(len(dys[0]), sum(ranks))  # [tokens, Σ r]: s · dh B of each serves dA and dx
    dus = [None] * len(parts) if du is None else du.split(ranks, dim=1)
    gradients: list[list[Tensor | None]] = []
    for part, dy, su, du_i, gain, norm, z, need in zip(
        parts, dys, thin, dus, kept.gains, kept.norms, kept.adapted, needs, strict=True
    ):
        dweight = weight_gradient(dy, rows, gain, dropout) if need[0] and rows is not None else None
        dbias = dy.sum(0) if need[1] else None
        dB = dmagnitude = None
        if part.lora_B is not None:
            if need[4] and norm is not None:
                dmagnitude = (dy * z).sum(0).to(norm.dtype) / norm  # dg/dm = 1 / norm
            dh = dy if gain is None else dy * gain  # [tokens, out]: what reaches the update
            dB = (dh.T @ su).to(part.lora_B.dtype) if need[3] else None
            if du_i is not None:
                torch.mm(dh, part.lora_B.to(dtype) * part.scaling, out=du_i)
        gradients.append([dweight, dbias, None, dB, dmagnitude])
    if du is not None and rows is not None and any(need[2] for need in needs):
        dA = du.T @ apply_dropout(rows, dropout)  # [Σ r, in]
        for part, need, row, dA_i in zip(parts, needs, gradients, dA.split(ranks), strict=True):
            row[2] = dA_i.to(part.lora_A.dtype) if need[2] and part.lora_A is not None else None
    dx = input_gradient(dys, du, parts, kept, dropout) if wants_x else None
    return dx, [tuple(row) for row in gradients]


def weight_gradient(dy: Tensor, rows: Tensor, gain: Tensor | None, dropout: Dropout | KeepRows | None) -> Tensor:
    """dW = dyᵀ x, for a base weight that somebody unfroze; DoRA's gain included, [out, in]."""
    dweight = dy.T @ rows
    if gain is None:
        return dweight
    return dweight.addmm_((dy * (gain - 1)).T, apply_dropout(rows, dropout))


def input_gradient(
    dys: Sequence[Tensor], du: Tensor | None, parts: Sequence[Part], kept: Kept, dropout: Dropout | KeepRows | None
) -> Tensor:
    """dx = Σ dy_i W_i + D(Σ du_i A_i), and DoRA's part of it, [tokens, in]."""
    dtype = dys[0].dtype
    if du is None:
        return back_through(dys, parts)
    A = stacked_A(parts, dtype, scaled=False)  # [Σ r, in]
    if dropout is None:
        rescaled = [dy if gain is None else dy * gain for dy, gain in zip(dys, kept.gains, strict=True)]
        return back_through(rescaled, parts).addmm_(du, A)
    through_dropout = torch.mm(du, A)
    for dy, gain, part in zip(dys, kept.gains, parts, strict=True):
        if gain is not None:
            through_dropout.addmm_(dy * (gain - 1), dense_of(part, dtype))
    return add_dropped_(back_through(dys, parts), through_dropout, dropout)


def products(rows: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """x W_iᵀ of each part: one product where the weights lie together, else one each."""
    sizes = [part.out_features for part in parts]
    together = stacked_weight(parts, rows.dtype)
    if together is not None:
        return list(torch.mm(rows, together.T).split(sizes, dim=1))
    return [torch.mm(rows, dense_of(part, rows.dtype).T) for part in parts]


def back_through(dys: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """Σ dy_i W_i, [tokens, in]: one product where both the gradients and the weights lie together."""
    dtype = dys[0].dtype
    side_by_side = columns_of_one(dys)
    together = stacked_weight(parts, dtype) if side_by_side is not None else None
    if side_by_side is not None and together is not None:
        return torch.mm(side_by_side, together)
    dx = torch.mm(dys[0], dense_of(parts[0], dtype))
    for dy, part in zip(dys[1:], parts[1:], strict=True):
        dx.addmm_(dy, dense_of(part, dtype))
    return dx


def dense_of(part: Part, dtype: torch.dtype) -> Tensor:
    """The part's matrix, [out, in]: dense, or decoded into the workspace until the next product."""
    if part.weight is not None:
        return part.weight
    together = stacked_weight([part], dtype)
    if together is None:
        raise TypeError("a projection has a dense or a quantised weight")
    return together


def stacked_weight(parts: Sequence[Part], dtype: torch.dtype) -> Tensor | None:
    """All weights as one matrix [Σ out, in]: NF4 ones decoded together, dense ones if they lie one after another."""
    quantised = [part.quantised for part in parts if part.quantised is not None]
    if len(quantised) == len(parts):
        sizes, fan_in = [part.out_features for part in parts], quantised[0].shape[1]
        space = workspace(sum(sizes) * fan_in, dtype, quantised[0].codes.device).view(sum(sizes), fan_in)
        for weight, block in zip(quantised, space.split(sizes), strict=True):
            decode_into(weight, block)
        return space
    weights = [part.weight for part in parts if part.weight is not None]
    if len(weights) < len(parts):
        return None
    return rows_of_one(weights)


def rows_of_one(weights: Sequence[Tensor]) -> Tensor | None:
    """Matrices that are consecutive rows of one matrix in memory, as that matrix; None where they are not."""
    first = weights[0]
    if len(weights) == 1:
        return first
    end = first.storage_offset()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or not weight.is_contiguous() or weight.storage_offset() != end or weight.dtype != first.dtype:
            return None
        end += weight.numel()
    size = (sum(len(weight) for weight in weights), first.shape[1])
    return torch.as_strided(first, size, (first.shape[1], 1), first.storage_offset())


def columns_of_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """[tokens, n_i] tensors that are consecutive columns of one buffer, as that buffer; None where they are not."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    end, width = first.storage_offset(), sum(t.shape[1] for t in tensors)
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or tensor.stride() != first.stride() or tensor.storage_offset() != end:
            return None
        end += tensor.shape[1]
    if first.stride(1) != 1 or first.stride(0) < width:
        return None
    return torch.as_strided(first, (len(first), width), (first.stride(0), 1), first.storage_offset())


def stacked_A(parts: Sequence[Part], dtype: torch.dtype, *, scaled: bool) -> Tensor:
    """The A's one under another, [Σ r, in]; each times its s if `scaled`."""
    rows = [(p.lora_A.to(dtype) * p.scaling if scaled else p.lora_A.to(dtype)) for p in parts if p.lora_A is not None]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def unpacked(projections: Sequence[Projection]) -> tuple[list[tuple[NF4Weight | None, float]], list[Tensor | None]]:
    """What autograd does not see of each projection, and the five tensors of each that it does."""
    static: list[tuple[NF4Weight | None, float]] = []
    tensors: list[Tensor | None] = []
    for weight, bias, lora_A, lora_B, scaling, magnitude in projections:
        quantised = weight if isinstance(weight, NF4Weight) else None
        dense = None if isinstance(weight, NF4Weight) else weight
        absent = lora_A is None or lora_B is None
        tensors += [dense, bias, *((None, None, None) if absent else (lora_A, lora_B, magnitude))]
        static.append((quantised, float(scaling)))
    return static, tensors


def packed(static: Sequence[tuple[NF4Weight | None, float]], tensors: Sequence[Tensor | None]) -> list[Part]:
    """The inverse of `unpacked`."""
    return [
        Part(*tensors[TENSORS * i : TENSORS * (i + 1)], *rest)  # type: ignore[arg-type, call-arg]
        for i, rest in enumerate(static)
    ]


def as_rows(x: Tensor) -> Tensor:
    """[..., features] as [tokens, features] whose rows are contiguous."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
