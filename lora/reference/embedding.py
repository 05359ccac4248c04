"""The LoRA embedding: one frozen table, one trainable update of rank r.

An embedding is a linear layer whose input is one-hot: with x = e_id, the column of B A that belongs to the id is
B (A e_id), and A e_id is a column of A. So nothing is multiplied by A, its columns are looked up:

    h = W[ids] + s · (Aᵀ[ids]) Bᵀ                                (Hu et al. 2021, eq. 3, on one-hot inputs)

W is [vocab, dim], A is [r, vocab], B is [dim, r]. With u = Aᵀ[ids] (tokens × r), and dy the gradient of h:

    dB = s · dyᵀ u            du = s · dy B            dA[:, id] = Σ du over the tokens that have this id

DoRA rescales each output feature over the whole vocabulary: g = m / ‖Wᵀ + s B A‖ per row, as PEFT does, and

    h = g ⊙ (W[ids] + s u Bᵀ)        dm = Σ_tokens dy ⊙ (W[ids] + s u Bᵀ) / ‖Wᵀ + s B A‖        (see `dora`)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.errors import LoRAError, UnsupportedError
from lora.projection import Gradients, NF4Weight, Projection
from lora.reference.dora import dora_gain
from lora.reference.linear import flat


def lora_embedding(ids: Tensor, projection: Projection, *, padding_idx: int | None = None) -> Tensor:
    """h = W[ids] + s · (Aᵀ[ids]) Bᵀ, differentiable by autograd.

    Args:
        ids: [...], int64 or int32, in [0, vocab).
        projection: weight is the table [vocab, dim] (not NF4), lora_A [r, vocab], lora_B [dim, r], magnitude [dim];
            no bias.
        padding_idx: this id's column of lora_A gets no gradient, as in PEFT. The forward does not depend on it: what
            the column holds is added (in torch's default initialisation of an embedding's lora_A, zeros).

    Returns: [..., dim], the table's dtype.
    Raises: LoRAError for an id outside the table, naming it; UnsupportedError for an NF4 table.
    FLOPs: 2·tokens·r·dim. Saved for backward: ids, u and B.
    """
    table = table_of(projection)
    _, _, lora_A, lora_B, scaling, magnitude = projection
    check_ids(ids, table.shape[0])
    h = F.embedding(ids, table)  # [..., dim]
    if lora_A is None or lora_B is None:
        return h
    lora_A, lora_B = lora_A.to(table.dtype), lora_B.to(table.dtype)
    u = scaling * F.embedding(ids, lora_A.T, padding_idx=padding_idx)  # [..., r]: a row of Aᵀ for each id
    h = h + F.linear(u, lora_B)
    if magnitude is None:
        return h
    return (dora_gain(table.T, lora_A, lora_B, scaling, magnitude) * h).to(table.dtype)


def lora_embedding_backward(
    dy: Tensor, ids: Tensor, projection: Projection, *, padding_idx: int | None = None
) -> Gradients:
    """The gradients of `lora_embedding`, written out; ids have none, so dx is None.

    Args:
        dy: [..., dim], the gradient with respect to h.
        ids, projection, padding_idx: as they were given to `lora_embedding`.
    """
    table = table_of(projection)
    _, _, lora_A, lora_B, scaling, magnitude = projection
    if lora_A is None or lora_B is None:
        return Gradients(None)
    A, B = lora_A.to(table.dtype), lora_B.to(table.dtype)
    rows = ids.flatten()  # [tokens]
    u = A.T[rows]  # [tokens, r]
    dh, dmagnitude = flat(dy), None
    if magnitude is not None:
        slope = dora_gain(table.T, A, B, scaling, torch.ones_like(magnitude))  # [dim]: dg/dm = 1 / norm
        adapted = table[rows] + (scaling * u) @ B.T  # [tokens, dim]
        dmagnitude = ((dh * adapted).sum(0) * slope).to(magnitude.dtype)
        dh = (dh * (magnitude * slope)).to(dy.dtype)
    du = scaling * (dh @ B)  # [tokens, r]
    if padding_idx is not None:
        du = du.masked_fill((rows == padding_idx % table.shape[0])[:, None], 0)
    dB = scaling * (dh.T @ u)  # [dim, r]
    wide = torch.promote_types(du.dtype, torch.float32)  # a frequent id sums many small terms
    dA = torch.zeros(A.T.shape, dtype=wide, device=dy.device).index_add_(0, rows, du.to(wide)).T  # [r, vocab]
    return Gradients(None, dA.to(lora_A.dtype), dB.to(lora_B.dtype), dmagnitude=dmagnitude)


def table_of(projection: Projection) -> Tensor:
    """The table [vocab, dim]; LoRAError where the projection cannot be an embedding's."""
    if isinstance(projection.weight, NF4Weight):
        raise UnsupportedError("The embedding table is NF4, expected a dense tensor: quantise only linear layers.")
    if projection.bias is not None:
        raise LoRAError("The embedding's projection has a bias, expected none: an embedding is a plain table.")
    return projection.weight


def check_ids(ids: Tensor, vocab: int) -> None:
    """Every id lies in [0, vocab); otherwise LoRAError with the first that does not."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise LoRAError(f"The ids are {ids.dtype}, expected int64 or int32: pass token numbers.")
    wrong = ((ids < 0) | (ids >= vocab)).nonzero()
    if len(wrong):
        position = tuple(wrong[0].tolist())
        raise LoRAError(
            f"Token id {ids[position].item()} at position {position} is outside the embedding table, expected 0 to "
            f"{vocab - 1}: check that the tokenizer belongs to the model."
        )
