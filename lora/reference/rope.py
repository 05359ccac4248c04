"""Rotary position embedding: q and k are rotated by angles that grow with the position.

Features come in pairs, each pair (a, b) of a head is a point in the plane, and at position p pair i is turned by the
angle p θ_i (Su et al. 2021, eq. 34), so that q·k depends on the distance of two positions only:

    a' = a cos - b sin        b' = b cos + a sin

Two layouts of the pairs are in use: feature i with i + rot/2 (Llama, NeoX: "half-split"), or 2i with 2i + 1 (GPT-J,
Cohere: interleaved). In both, with R(x) the vector of partners, (a, b) -> (-b, a),

    rope(x) = x ⊙ cos + R(x) ⊙ sin

A rotation's transpose turns by the opposite angle, and so does the backward: dx = dy ⊙ cos - R(dy) ⊙ sin. (This needs
the two features of a pair to share their cos and their sin. A common factor, YaRN's attention scale, is no obstacle.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora.errors import LoRAError


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, position_ids: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """q and k rotated, differentiable by autograd in q and k.

    Args:
        q: [batch, heads, seq, head_dim]; k: [batch, kv_heads, seq, head_dim].
        cos, sin: of every feature, not of every pair: [seq, rot] or [batch, seq, rot] (batch may be 1), as
            transformers passes them, equal for the two of a pair. rot may be less than head_dim: the features after it
            pass through unchanged.
        position_ids: [batch, seq], int64; cos and sin are then tables [positions, rot] to look up in.
        interleaved: pairs are neighbours (2i, 2i + 1) rather than (i, i + rot/2).

    Returns: q and k, rotated, in their own dtypes; computed in the wider of theirs and cos's (bfloat16 tables round as
        Llama does, float32 tables round once).
    Raises: LoRAError where the shapes do not fit.
    FLOPs: 3 an element. Saved for backward: cos and sin, which every layer shares.
    """
    cos, sin = per_token(cos, position_ids, q), per_token(sin, position_ids, q)  # [batch, 1, seq, rot]
    return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)


def rope_backward(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, *, position_ids: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """The gradients of q and k: the rotation by the opposite angle.

    Args:
        dq, dk: the gradients with respect to the rotated q and k, in their shapes.
        the others: as they were given to `rope`.
    """
    return rope(dq, dk, cos, -sin, position_ids=position_ids, interleaved=interleaved)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x ⊙ cos + R(x) ⊙ sin on the first rot features of each head; the others as they are."""
    rot = cos.shape[-1]
    turned, rest = x[..., :rot], x[..., rot:]
    turned = turned * cos + partners(turned, interleaved) * sin
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def partners(x: Tensor, interleaved: bool) -> Tensor:
    """R(x): each pair (a, b) becomes (-b, a)."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def per_token(table: Tensor, position_ids: Tensor | None, q: Tensor) -> Tensor:
    """cos or sin as [batch or 1, 1, seq, rot], checked against q."""
    batch, seq, head_dim, found = q.shape[0], q.shape[-2], q.shape[-1], list(table.shape)
    if position_ids is not None:
        table = look_up(table, position_ids)
    elif table.dim() == 2:
        table = table[None]  # [1, seq, rot]
    rot = table.shape[-1]
    if table.dim() != 3 or table.shape[0] not in (1, batch) or table.shape[1] != seq:
        raise LoRAError(
            f"cos and sin are {found} for q of {list(q.shape)}, expected [{seq}, rot] or [{batch}, {seq}, "
            f"rot]: slice the table to these positions, or pass position_ids to look them up."
        )
    if rot > head_dim or rot % 2:
        raise LoRAError(
            f"cos and sin are {rot} wide for heads of {head_dim}, expected an even width of at most {head_dim}."
        )
    return table[:, None]


def look_up(table: Tensor, position_ids: Tensor) -> Tensor:
    """Rows of a [positions, rot] table at each position id: [batch, seq, rot]."""
    if table.dim() != 2:
        raise LoRAError(
            f"cos and sin are {list(table.shape)} beside position_ids, expected a table [positions, rot]: leave "
            f"position_ids out where cos and sin are already one row a token."
        )
    wrong = position_ids[(position_ids < 0) | (position_ids >= table.shape[0])]
    if len(wrong):
        raise LoRAError(
            f"Position {wrong[0].item()} is outside the rotary table, expected 0 to {table.shape[0] - 1}: make a "
            f"longer table."
        )
    return table[position_ids]
