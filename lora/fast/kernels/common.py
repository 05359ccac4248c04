"""What several kernels share: how tensors are walked through in rows, types, and small matrix products."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora.errors import LoRAError


def as_rows(x: Tensor) -> Tensor:
    """[..., features] as [tokens, features] with neighbouring features side by side; copied only if it must be."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def output_rows(out: Tensor, shape: torch.Size, name: str, inner: int | None = None) -> Tensor:
    """A caller's buffer as [tokens, features] (or [outer, inner, features]), itself and not a copy.

    Raises: LoRAError where its shape is another, or its elements cannot be walked through in rows.
    """
    if out.shape == shape:
        rows = out.reshape(-1, shape[-1]) if inner is None else out.reshape(-1, inner, shape[-1])
        side_by_side = out.stride(-1) == 1 or shape[-1] == 1
        distinct = all(stride or size == 1 for size, stride in zip(out.shape, out.stride(), strict=True))
        if side_by_side and distinct and rows.data_ptr() == out.data_ptr():  # else reshape has copied
            return rows
    raise LoRAError(
        f"{name} is {list(out.shape)} with strides {list(out.stride())}, expected {list(shape)} with neighbouring "
        "features side by side and every element its own: pass a contiguous buffer or a slice of its columns."
    )


def wide_type(*tensors: Tensor) -> Any:
    """Triton's type for the arithmetic: float64 where any tensor is, otherwise float32."""
    return tl.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else tl.float32


def precision_of(dtype: torch.dtype) -> str | None:
    """float32 operands are multiplied as they are; for 16-bit ones there is no choice."""
    return "ieee" if dtype == torch.float32 else None


def rank_block(r: int) -> int:
    """Ranks at a time: a power of two from 16 (the least that a matrix instruction takes) to 64."""
    return int(min(64, max(16, triton.next_power_of_2(r))))


@triton.jit
def matrix_product(b_a, b_b, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a b. The interpreter's product of bfloat16 is garbage, so it gets the same numbers as float32."""
    if INTERPRET:
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    return tl.dot(b_a, b_b, acc, input_precision=PRECISION)
