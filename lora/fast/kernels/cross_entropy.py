"""Cross-entropy of rows of logits, their gradient written over them: one chunk of `linear_cross_entropy`.

With ℓ a row of logits, y its label, V the vocabulary, ε the smoothing and w the row's weight:

    z = cap · tanh(scale · ℓ / cap)                                 without a cap, z = scale · ℓ
    lse = log Σ_c exp z_c
    loss = w · (lse - (1 - ε) z_y - ε / V · Σ_c z_c)                0 where the label is ignored
    dℓ_c = w · (exp(z_c - lse) - (1 - ε) [c = y] - ε / V) · scale · (1 - (z_c / cap)²)

which is `lora.reference.loss` written row by row. dℓ is made in the forward and takes the place of ℓ, so that the
caller's chunk is at once the operand of the gradient's matrix products and no other buffer of its size exists.

Memory, for rows whose label counts: V · itemsize bytes read for the loss alone; with the gradient read twice and
written once, as a row (256 KB of a 128k vocabulary in 16 bits) does not fit a multiprocessor. The second pass runs
backwards: the end of the row was read last and is the likeliest to be in the cache. An ignored row is not read.

One program takes one row in blocks. Each lane of a block keeps its own running maximum and sum (Milakov and
Gimelshein 2018), joined once at the end, so that no reduction across threads stands between two loads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora.errors import LoRAError
from lora.fast.kernels.compile_check import POINTER, KernelSpec

LOWEST = tl.constexpr(-3.4e38)  # where a maximum starts: finite, as the difference of two infinities is NaN
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def tanh(x):
    """Within 4 units of roundoff, relative: an odd polynomial near 0, where (1 - e) / (1 + e) cancels."""
    square = x * x
    fit = 0.020639085856799057 + square * -0.005704985412024486  # minimax for (tanh(x) - x) / x³ on |x| < 0.625
    fit = -0.33333281941829856 + square * (0.13331442193226592 + square * (-0.053739714667659505 + square * fit))
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(square < 0.625 * 0.625, x + x * square * fit, tl.where(x < 0, -far, far))


@triton.jit
def scaled_logits(logits, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """z = cap · tanh(scale · ℓ / cap), or scale · ℓ, in float32."""
    z = logits.to(tl.float32) * logit_scale
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def row_statistics(p_row, vocab, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """Lse and Σ z of one row, in one pass over it."""
    b_max = tl.full((BLOCK,), LOWEST, tl.float32)  # of each lane: the largest z so far
    b_sum = tl.zeros((BLOCK,), tl.float32)  # Σ exp(z - b_max)
    b_total = tl.zeros((BLOCK,), tl.float32)  # Σ z
    for start in range(0, vocab, BLOCK):
        o_column = start + tl.arange(0, BLOCK)
        m_column = o_column < vocab
        b_logits = tl.load(p_row + o_column, mask=m_column, other=0)
        b_z = scaled_logits(b_logits, logit_scale, softcap, HAS_SOFTCAP)
        b_total += tl.where(m_column, b_z, 0)
        b_z = tl.where(m_column, b_z, float("-inf"))
        e = tl.exp(-tl.abs(b_z - b_max))  # of the two exponentials, of z and of the old maximum, one is exp(0)
        b_sum = tl.where(b_z > b_max, b_sum * e + 1, b_sum + e)
        b_max = tl.maximum(b_max, b_z)
    row_max = tl.max(b_max, 0)
    return row_max + tl.log(tl.sum(b_sum * tl.exp(b_max - row_max), 0)), tl.sum(b_total, 0)


@triton.jit
def write_gradient(
    p_row, vocab, label, lse, weight, logit_scale, softcap, smoothing, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):
    """Overwrites one row of logits with dℓ, from its end to its start."""
    for step in range(0, tl.cdiv(vocab, BLOCK)):
        o_column = (tl.cdiv(vocab, BLOCK) - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        m_column = o_column < vocab
        b_logits = tl.load(p_row + o_column, mask=m_column, other=0)
        b_z = scaled_logits(b_logits, logit_scale, softcap, HAS_SOFTCAP)
        b_gradient = tl.exp(b_z - lse) - smoothing / vocab - tl.where(o_column == label, 1 - smoothing, 0.0)
        if HAS_SOFTCAP:
            b_bent = b_z / softcap
            b_gradient *= (1 - b_bent) * (1 + b_bent)
        b_gradient *= weight * logit_scale
        tl.store(p_row + o_column, b_gradient.to(p_row.dtype.element_ty), mask=m_column)


@triton.jit
def write_zeros(p_row, vocab, BLOCK: tl.constexpr):
    """An ignored row's gradient."""
    for start in range(0, vocab, BLOCK):
        o_column = start + tl.arange(0, BLOCK)
        tl.store(p_row + o_column, tl.zeros((BLOCK,), p_row.dtype.element_ty), mask=o_column < vocab)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(
    logits_ptr,  # [rows, vocab], rows `row_stride` apart; overwritten with dℓ where HAS_GRADIENT
    labels_ptr,  # int64 [rows]
    loss_ptr,  # float32 [rows]
    lse_ptr,  # float32 [rows], or None
    row_weight_ptr,  # float32 [rows], `row_weight_stride` apart, or None
    vocab,
    row_stride,
    row_weight_stride,
    ignore_index: tl.int64,
    logit_scale: tl.float32,
    softcap: tl.float32,
    smoothing: tl.float32,
    weight: tl.float32,
    HAS_GRADIENT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the loss of one row, and its gradient."""
    row = tl.program_id(0).to(tl.int64)
    p_row = logits_ptr + row * row_stride
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if lse_ptr is not None:
            tl.store(lse_ptr + row, 0.0)
        if HAS_GRADIENT:
            write_zeros(p_row, vocab, BLOCK)
    else:
        is_class = (label >= 0) & (label < vocab)
        at_label = tl.load(p_row + label, mask=is_class, other=float("nan"))
        z_label = scaled_logits(at_label, logit_scale, softcap, HAS_SOFTCAP)
        lse, total = row_statistics(p_row, vocab, logit_scale, softcap, HAS_SOFTCAP, BLOCK)
        if row_weight_ptr is not None:
            weight *= tl.load(row_weight_ptr + row * row_weight_stride)
        tl.store(loss_ptr + row, weight * (lse - (1 - smoothing) * z_label - smoothing / vocab * total))
        if lse_ptr is not None:
            tl.store(lse_ptr + row, lse)
        if HAS_GRADIENT:
            write_gradient(p_row, vocab, label, lse, weight, logit_scale, softcap, smoothing, HAS_SOFTCAP, BLOCK)
