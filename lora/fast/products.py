"""Matrix products, by the faster of the libraries that PyTorch brings.

On a CPU `torch.mm` of float32 is MKL's. oneDNN, in the same build, is faster at the shapes of this package: on a
two-core AMD EPYC with AVX-512 in 71 to 94% of the time (docs/decisions/0010-onednn.md). It returns a
new tensor and cannot write into a given one: products that add to something, `addmm_`, stay MKL's.
`torch.backends.mkldnn.flags(enabled=False)` turns oneDNN off, here as everywhere.

oneDNN adds the terms of a sum one after another. Where a few are far larger than the rest, all that follow are rounded
at their size, and MKL, which adds blocks, is nearer to the truth. Two products of a model are like that,
known by their shape: an MLP's hidden features, a few of them hundreds of times the others, through down_proj, and the
gradient of the logits, -1 at the label, through the head. Those are MKL's.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lora.fast.runtime import kind_of

LONGEST = 4096  # terms of a sum that oneDNN is given


def product(left: Tensor, right: Tensor) -> Tensor:
    """left · right, [m, k] by [k, n], a new tensor."""
    dense = right.is_contiguous() or right.T.is_contiguous()  # any other takes oneDNN hundreds of times as long
    if dense and by_onednn(left, right) and not left.is_meta and not is_lopsided(right):
        return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")  # type: ignore[no-any-return]
    return torch.mm(left, right)


def is_lopsided(right: Tensor) -> bool:
    """Whether the rows that meet `right`, [k, n], have a few far larger numbers: a down_proj's Wᵀ, or a head's W."""
    terms, width = right.shape
    return terms > LONGEST or (terms > width and not right.is_contiguous())


def by_onednn(*operands: Tensor) -> bool:
    """Whether oneDNN multiplies these: float32 on a CPU, nothing empty, and no graph, which chooses for itself.

    Tensors of a dry run count as what they stand for.
    """
    return (
        not torch.compiler.is_compiling()  # first: a graph may not ask whether oneDNN is there
        and all(x.dtype == torch.float32 and kind_of(x) == "cpu" and x.numel() for x in operands)
        and onednn_is_there()
    )


def onednn_is_there() -> bool:
    """Whether this build of PyTorch has it and nobody turned it off."""
    return _has_linear() and bool(torch.backends.mkldnn.enabled)


@functools.cache
def _has_linear() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product_in(dtype: torch.dtype, left: Tensor, right: Tensor) -> Tensor:
    """The matrix product as a tensor of `dtype`: an adapter's gradient, in the adapter's own type.

    On a GPU the float32 sums of a product of 16-bit numbers are the result, rounded no more.
    """
    if left.dtype == dtype:
        return tall_product(left, right)
    halves = left.dtype in (torch.float16, torch.bfloat16)
    if left.is_cuda and halves and dtype == torch.float32 and not torch.compiler.is_compiling():
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def tall_product(left: Tensor, right: Tensor) -> Tensor:
    """left · right; on a CPU a result that is taller than wide is made transposed, in half the time."""
    if len(left) > right.shape[1] and left.device.type == "cpu":
        return torch.mm(right.T, left.T).T
    return torch.mm(left, right)
