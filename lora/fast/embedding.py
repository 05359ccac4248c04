"""The LoRA embedding as one autograd function: equations and signature as in `lora.reference.embedding`.

The update is added in place to the rows that were looked up, and the u = Aᵀ[ids] of the tokens (tokens × r) is kept.
dA is dense, [r, vocab], because an optimizer wants it so; it is summed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora.fast.dora import dora_norm
from lora.fast.operands import shaped
from lora.fast.runtime import FusedFunction
from lora.projection import Projection
from lora.reference.embedding import check_ids, table_of


def lora_embedding(ids: Tensor, projection: Projection, *, padding_idx: int | None = None) -> Tensor:
    """h = W[ids] + s · (Aᵀ[ids]) Bᵀ; arguments, result and errors as in `lora.reference.embedding.lora_embedding`.

    FLOPs: 2·tokens·r·dim. Saved for backward: ids, tokens numbers of int64, and s·Aᵀ[ids], tokens·r numbers of the
    table's type. A and B only by reference, of whatever type; the table not at all, and so not with autocast, which
    casts no look-up. With DoRA also g and its norm, dim numbers each of float32 (float64 of float64), and while m
    trains what g multiplies, tokens·dim numbers of the table's type. There is no dropout.
    """
    table = table_of(projection)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU's or a graph's own look-up raises
        check_ids(ids, table.shape[0])
    _, _, lora_A, lora_B, scaling, magnitude = projection
    if lora_A is None or lora_B is None:
        lora_A = lora_B = magnitude = None
    return LoRAEmbeddingFunction.apply(  # type: ignore[no-untyped-call, no-any-return]
        ids, table, lora_A, lora_B, magnitude, float(scaling), padding_idx
    )


class LoRAEmbeddingFunction(FusedFunction):
    """Forward and backward on ids flattened to [tokens]."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        table: Tensor,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        magnitude: Tensor | None,
        scaling: float,
        padding_idx: int | None,
    ) -> Tensor:
        rows = ids.flatten()
        h = table.index_select(0, rows)  # [tokens, dim]
        su = gain = norm = adapted = None
        if lora_A is not None and lora_B is not None:
            su = lora_A.index_select(1, rows).T.to(table.dtype) * scaling  # [tokens, r]
            B = lora_B.to(table.dtype)
            h.addmm_(su, B.T)
            if magnitude is not None:
                norm = dora_norm(table.T, lora_A.to(table.dtype), B, scaling)  # [dim]
                gain = magnitude / norm
                adapted, h = h, (h * gain).to(table.dtype)
        ctx.save_for_backward(rows, lora_A, lora_B, su, gain, norm, adapted if ctx.needs_input_grad[4] else None)
        ctx.vocab, ctx.scaling, ctx.padding_idx = table.shape[0], scaling, padding_idx
        return shaped(h, ids.shape)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        rows, lora_A, lora_B, su, gain, norm, adapted = ctx.saved_tensors
        dy = dh.reshape(-1, dh.shape[-1])  # [tokens, dim]
        _, wants_table, wants_A, wants_B, wants_m = ctx.needs_input_grad[:5]
        dmagnitude = (dy * adapted).sum(0).to(norm.dtype) / norm if wants_m else None
        dy = dy if gain is None else (dy * gain).to(dy.dtype)
        dtable = summed_by_id(dy, rows, ctx.vocab) if wants_table else None
        if lora_A is None:
            return None, dtable, None, None, None, None, None
        dB = (dy.T @ su).to(lora_B.dtype) if wants_B else None  # [dim, r]
        dA = None
        if wants_A:
            du = torch.mm(dy, lora_B.to(dy.dtype)).mul_(ctx.scaling)  # [tokens, r]
            if ctx.padding_idx is not None:
                du.masked_fill_((rows == ctx.padding_idx % ctx.vocab)[:, None], 0)
            wide = torch.promote_types(du.dtype, torch.float32)
            dA = summed_by_id(du.to(wide), rows, ctx.vocab).T.to(lora_A.dtype)  # [r, vocab]
        return None, dtable, dA, dB, dmagnitude, None, None


def summed_by_id(rows: Tensor, ids: Tensor, vocab: int) -> Tensor:
    """For each id the sum of its rows, [vocab, features]; on a GPU sorted by id, not by atomic additions, whose order
    and so whose last bits change from run to run."""
    return torch.ops.aten.embedding_dense_backward(rows, ids, vocab, -1, False)  # type: ignore[no-any-return]
