"""What a group of projections multiplies by, laid out so that few products, launches and views do the work.

weights      W's that lie one after another in memory, or are decoded from NF4 into one workspace, are one matrix
outputs      the h's of a group are columns of one buffer, so that their gradients may be too
factors      A's one under another, and B's, in the type of x, cast once for forward and backward
gradients    dA's as the rows of one product, all in the adapters' own type
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora.fast.nf4 import decoded_together
from lora.fast.parts import Part
from lora.fast.products import by_onednn, product
from lora.fast.runtime import autocast_type
from lora.projection import Projection


def as_autocast(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, Sequence[Projection]]:
    """x, and the dense weights and biases it meets, in the type that autocast multiplies in; themselves without it."""
    dtype = autocast_type(x)
    if dtype is None:
        return x, projections
    return x.to(dtype), [
        p._replace(
            weight=p.weight.to(dtype) if isinstance(p.weight, Tensor) else p.weight,
            bias=None if p.bias is None else p.bias.to(dtype),
        )
        for p in projections
    ]


# ---- weights


def multiplied(rows: Tensor, parts: Sequence[Part], out: Tensor | None = None) -> Sequence[Tensor]:
    """x W_iᵀ of each part, [tokens, out_i]: one product where the weights lie together, else one each.

    They are the columns of one buffer, of `out` where it is given and the product can write there: except for oneDNN,
    which makes a tensor of its own for each product.
    """
    sizes = [part.out_features for part in parts]
    together = stacked_weight(parts, rows.dtype)
    if together is not None and by_onednn(rows, together):
        return columns_of(product(rows, together.T), sizes)
    if together is None and by_onednn(rows) and not rows.is_meta:  # a dry run's stand for ones that lie together
        return [product(rows, dense_of(part, rows.dtype).T) for part in parts]
    h = rows.new_empty(len(rows), sum(sizes)) if out is None else out
    if together is not None:
        torch.mm(rows, together.T, out=h)
        return columns_of(h, sizes)
    outputs = columns_of(h, sizes)
    for part, columns in zip(parts, outputs, strict=True):
        columns.addmm_(rows, dense_of(part, rows.dtype).T, beta=0)
    return outputs


def back_through(dys: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """Σ dy_i W_i, [tokens, in]: one product where both the gradients and the weights lie together."""
    dtype = dys[0].dtype
    side_by_side = columns_of_one(dys)
    together = stacked_weight(parts, dtype) if side_by_side is not None else None
    if side_by_side is not None and together is not None:
        return product(side_by_side, together)
    dx = product(dys[0], dense_of(parts[0], dtype))
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
        return decoded_together(quantised, dtype)
    weights = [part.weight for part in parts if part.weight is not None]
    if len(weights) < len(parts):
        return None
    return rows_of_one(weights)


def rows_of_one(weights: Sequence[Tensor]) -> Tensor | None:
    """Matrices that are consecutive rows of one matrix in memory, as that matrix; None where they are not."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if torch.compiler.is_compiling():  # a graph does not know addresses
        return None
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
    if torch.compiler.is_compiling():
        return None
    end, width = first.storage_offset(), sum(t.shape[1] for t in tensors)
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or tensor.stride() != first.stride() or tensor.storage_offset() != end:
            return None
        end += tensor.shape[1]
    if first.stride(1) != 1 or first.stride(0) < width:
        return None
    return torch.as_strided(first, (len(first), width), (first.stride(0), 1), first.storage_offset())


def as_rows(x: Tensor) -> Tensor:
    """[..., features] as [tokens, features] whose rows are contiguous."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def shaped(rows: Tensor, lead: Sequence[int]) -> Tensor:
    """A result [tokens, features] that nobody else keeps, as [*lead, features].

    Not a view in the eyes of autograd, which would forbid its owner to change it in place.
    """
    return torch.ops.aten._unsafe_view(rows, (*lead, rows.shape[1]))  # type: ignore[no-any-return]


BLOCK = 1 << 16  # numbers for each thread: three operands of that many stay in its cache


def row_blocks(x: Tensor) -> Sequence[slice]:
    """The rows of a matrix, some after others: what a step makes of them is in the cache for the next step.

    All rows at once on a GPU, and in a graph, which joins element-wise steps itself.
    """
    if x.is_cuda or torch.compiler.is_compiling():
        return [slice(None)]
    rows = max(1, BLOCK * torch.get_num_threads() // max(1, x.shape[1]))
    return [slice(first, first + rows) for first in range(0, len(x), rows)]


def columns_of(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """The pieces of a buffer [tokens, Σ sizes]; a single one is the buffer itself, without the cost of a view."""
    return (x,) if len(sizes) == 1 else x.split(sizes, dim=1)


# ---- factors and their gradients


class Factors(NamedTuple):
    """A group's adapters in the type of x."""

    A: Tensor  # [Σ r, in]: the A's one under another
    B: tuple[Tensor | None, ...]  # [out_i, r_i] each; None without an adapter
    cast: bool  # whether their own type is another: then the backward is given these, rather than to cast again


def factors_of(parts: Sequence[Part], dtype: torch.dtype) -> Factors | None:
    """The adapters of a group; None where there are none."""
    A = [part.lora_A for part in parts if part.lora_A is not None]
    if not A:
        return None
    B = tuple(part.lora_B for part in parts)
    cast = any(each is not None and each.dtype != dtype for each in (*A, *B))
    stacked = A[0] if len(A) == 1 else torch.cat(A)
    if not cast:
        return Factors(stacked, B, cast)
    return Factors(stacked.to(dtype), tuple(None if each is None else each.to(dtype) for each in B), cast)
