"""The programs of `lora.fast.kernels.norm`: what each reads, keeps and writes. That file has the equations.

M rows of N features; row i lies at (i div inner) · outer_stride + (i mod inner) · inner_stride. A pointer that is None
leaves its part out. WIDE is the type of the arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, s_ptr, mean_ptr, rstd_ptr, M, N, inner,
    outer_x, inner_x, outer_residual, inner_residual, outer_y, inner_y,
    CENTRED: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr, EPS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalises BLOCK_M whole rows: y, s where there is a residual, ρ, and μ where it is CENTRED."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)[None, :]
    m_m = o_m < M
    m_mn = m_m[:, None] & (o_n < N)
    p_x = x_ptr + row_offsets(o_m, inner, outer_x, inner_x) + o_n
    b_s = tl.load(p_x, mask=m_mn, other=0.0).to(WIDE)
    if residual_ptr is not None:
        p_residual = residual_ptr + row_offsets(o_m, inner, outer_residual, inner_residual) + o_n
        b_s = rounded_sum(b_s, tl.load(p_residual, mask=m_mn, other=0.0), x_ptr)
        tl.store(s_ptr + row_offsets(o_m, 1, N, 0) + o_n, b_s.to(s_ptr.dtype.element_ty), mask=m_mn)
    if CENTRED:
        b_mean = tl.sum(b_s, 1) / N
        tl.store(mean_ptr + o_m, b_mean, mask=m_m)
        b_s = tl.where(m_mn, b_s - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_s * b_s, 1) / N + EPS)
    tl.store(rstd_ptr + o_m, b_rstd, mask=m_m)
    b_y = weighted(b_s * b_rstd[:, None], weight_ptr, bias_ptr, x_ptr, o_n, N, OFFSET, ROUND)
    p_y = y_ptr + row_offsets(o_m, inner, outer_y, inner_y) + o_n
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_mn)


@triton.jit
def norm_forward_looped_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, s_ptr, mean_ptr, rstd_ptr, M, N, inner,
    outer_x, inner_x, outer_residual, inner_residual, outer_y, inner_y,
    CENTRED: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr, EPS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalises BLOCK_M rows, BLOCK_N features at a time.

    s is made again in each pass rather than read back: another thread may have written it.
    """
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    p_x = x_ptr + row_offsets(o_m, inner, outer_x, inner_x)
    p_residual = None
    if residual_ptr is not None:
        p_residual = residual_ptr + row_offsets(o_m, inner, outer_residual, inner_residual)
    b_mean = tl.zeros([BLOCK_M], WIDE)
    if CENTRED:
        b_total = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
        for first in range(0, N, BLOCK_N):
            o_n = first + tl.arange(0, BLOCK_N)[None, :]
            b_total += load_sum(p_x, p_residual, o_n, m_m[:, None] & (o_n < N), x_ptr, WIDE)
        b_mean = tl.sum(b_total, 1) / N
        tl.store(mean_ptr + o_m, b_mean, mask=m_m)
    b_squares = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
    for first in range(0, N, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)[None, :]
        m_mn = m_m[:, None] & (o_n < N)
        b_s = load_sum(p_x, p_residual, o_n, m_mn, x_ptr, WIDE)
        b_s = tl.where(m_mn, b_s - b_mean[:, None], 0.0)
        b_squares += b_s * b_s
    b_rstd = tl.rsqrt(tl.sum(b_squares, 1) / N + EPS)
    tl.store(rstd_ptr + o_m, b_rstd, mask=m_m)
    p_y = y_ptr + row_offsets(o_m, inner, outer_y, inner_y)
    for first in range(0, N, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)[None, :]
        m_mn = m_m[:, None] & (o_n < N)
        b_s = load_sum(p_x, p_residual, o_n, m_mn, x_ptr, WIDE)
        if residual_ptr is not None:
            tl.store(s_ptr + row_offsets(o_m, 1, N, 0) + o_n, b_s.to(s_ptr.dtype.element_ty), mask=m_mn)
        b_normed = (b_s - b_mean[:, None]) * b_rstd[:, None]
        b_y = weighted(b_normed, weight_ptr, bias_ptr, x_ptr, o_n, N, OFFSET, ROUND)
        tl.store(p_y + o_n, b_y.to(y_ptr.dtype.element_ty), mask=m_mn)


@triton.jit
def norm_backward_kernel(
    dy_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, dsum_ptr, dx_ptr, dweight_ptr, dbias_ptr, M, N, inner,
    outer_dy, inner_dy, outer_s, inner_s, outer_dsum, inner_dsum, outer_dx, inner_dx,
    CENTRED: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes dx of every programs-th tile of BLOCK_M rows, and its part of dw and db."""
    o_n = tl.arange(0, BLOCK_N)[None, :]
    b_w = tl.load(weight_ptr + o_n, mask=o_n < N, other=0.0).to(WIDE) + OFFSET
    b_dweight = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
    b_dbias = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        m_mn = m_m[:, None] & (o_n < N)
        b_dy = tl.load(dy_ptr + row_offsets(o_m, inner, outer_dy, inner_dy) + o_n, mask=m_mn, other=0.0).to(WIDE)
        p_s = s_ptr + row_offsets(o_m, inner, outer_s, inner_s) + o_n
        b_normed, b_rstd = load_normed(p_s, mean_ptr, rstd_ptr, o_m, m_m, m_mn, CENTRED, WIDE)
        if dx_ptr is not None:
            b_e = b_dy * b_w
            b_dx = b_e - b_normed * (tl.sum(b_e * b_normed, 1) / N)[:, None]
            if CENTRED:
                b_dx -= (tl.sum(b_e, 1) / N)[:, None]
            b_dx *= b_rstd[:, None]
            if dsum_ptr is not None:
                p_dsum = dsum_ptr + row_offsets(o_m, inner, outer_dsum, inner_dsum) + o_n
                b_dx += tl.load(p_dsum, mask=m_mn, other=0.0).to(WIDE)
            p_dx = dx_ptr + row_offsets(o_m, inner, outer_dx, inner_dx) + o_n
            tl.store(p_dx, b_dx.to(dx_ptr.dtype.element_ty), mask=m_mn)
        if dweight_ptr is not None:
            b_dweight += b_dy * b_normed
        if dbias_ptr is not None:
            b_dbias += b_dy
    o_partial = tl.program_id(0).to(tl.int64) * N + o_n
    if dweight_ptr is not None:
        tl.store(dweight_ptr + o_partial, tl.sum(b_dweight, 0)[None, :], mask=o_n < N)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + o_partial, tl.sum(b_dbias, 0)[None, :], mask=o_n < N)


@triton.jit
def norm_backward_looped_kernel(
    dy_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, dsum_ptr, dx_ptr, M, N, inner,
    outer_dy, inner_dy, outer_s, inner_s, outer_dsum, inner_dsum, outer_dx, inner_dx,
    CENTRED: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes dx of BLOCK_M rows, BLOCK_N features at a time."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    p_dy = dy_ptr + row_offsets(o_m, inner, outer_dy, inner_dy)
    p_s = s_ptr + row_offsets(o_m, inner, outer_s, inner_s)
    p_dx = dx_ptr + row_offsets(o_m, inner, outer_dx, inner_dx)
    b_products = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
    b_total = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
    for first in range(0, N, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)[None, :]
        m_mn = m_m[:, None] & (o_n < N)
        b_e = tl.load(p_dy + o_n, mask=m_mn, other=0.0).to(WIDE)
        b_e *= tl.load(weight_ptr + o_n, mask=o_n < N, other=0.0).to(WIDE) + OFFSET
        b_normed, _ = load_normed(p_s + o_n, mean_ptr, rstd_ptr, o_m, m_m, m_mn, CENTRED, WIDE)
        b_products += b_e * b_normed
        if CENTRED:
            b_total += b_e
    b_along = (tl.sum(b_products, 1) / N)[:, None]
    b_shift = (tl.sum(b_total, 1) / N)[:, None]
    for first in range(0, N, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)[None, :]
        m_mn = m_m[:, None] & (o_n < N)
        b_e = tl.load(p_dy + o_n, mask=m_mn, other=0.0).to(WIDE)
        b_e *= tl.load(weight_ptr + o_n, mask=o_n < N, other=0.0).to(WIDE) + OFFSET
        b_normed, b_rstd = load_normed(p_s + o_n, mean_ptr, rstd_ptr, o_m, m_m, m_mn, CENTRED, WIDE)
        b_dx = (b_e - b_shift - b_normed * b_along) * b_rstd[:, None]
        if dsum_ptr is not None:
            p_dsum = dsum_ptr + row_offsets(o_m, inner, outer_dsum, inner_dsum) + o_n
            b_dx += tl.load(p_dsum, mask=m_mn, other=0.0).to(WIDE)
        tl.store(p_dx + o_n, b_dx.to(dx_ptr.dtype.element_ty), mask=m_mn)


@triton.jit
def norm_weight_gradient_kernel(
    dy_ptr, s_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr, M, N, inner, outer_dy, inner_dy, outer_s, inner_s,
    CENTRED: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program adds dy ⊙ x̂ and dy of a block of columns over every programs-th tile of rows."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    b_dweight = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
    b_dbias = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
    for tile in range(tl.program_id(1), tl.cdiv(M, BLOCK_M), tl.num_programs(1)):
        o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        m_mn = m_m[:, None] & (o_n < N)
        b_dy = tl.load(dy_ptr + row_offsets(o_m, inner, outer_dy, inner_dy) + o_n, mask=m_mn, other=0.0).to(WIDE)
        if dweight_ptr is not None:
            p_s = s_ptr + row_offsets(o_m, inner, outer_s, inner_s) + o_n
            b_normed, _ = load_normed(p_s, mean_ptr, rstd_ptr, o_m, m_m, m_mn, CENTRED, WIDE)
            b_dweight += b_dy * b_normed
        if dbias_ptr is not None:
            b_dbias += b_dy
    o_partial = tl.program_id(1).to(tl.int64) * N + o_n
    if dweight_ptr is not None:
        tl.store(dweight_ptr + o_partial, tl.sum(b_dweight, 0)[None, :], mask=o_n < N)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + o_partial, tl.sum(b_dbias, 0)[None, :], mask=o_n < N)


@triton.jit
def sum_partial_kernel(partial_ptr, out_ptr, P, N, WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program adds a block of columns over all P rows of `partial`, and rounds once."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_sum = tl.zeros([BLOCK_P, BLOCK_N], WIDE)
    for first in range(0, P, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)[:, None]
        m_pn = (o_p < P) & (o_n[None, :] < N)
        b_sum += tl.load(partial_ptr + o_p.to(tl.int64) * N + o_n[None, :], mask=m_pn, other=0.0)
    tl.store(out_ptr + o_n, tl.sum(b_sum, 0).to(out_ptr.dtype.element_ty), mask=o_n < N)


@triton.jit
def row_offsets(o_m, inner, stride_outer, stride_inner):
    """Where rows o_m of [outer, inner] rows begin: [BLOCK_M, 1], 64 bits."""
    outer = o_m // inner
    return (outer.to(tl.int64) * stride_outer + (o_m - outer * inner).to(tl.int64) * stride_inner)[:, None]


@triton.jit
def rounded_sum(b_x, b_residual, x_ptr):
    """x + residual, rounded to x's type."""
    return (b_x + b_residual.to(b_x.dtype)).to(x_ptr.dtype.element_ty).to(b_x.dtype)


@triton.jit
def load_sum(p_x, p_residual, o_n, m_mn, x_ptr, WIDE: tl.constexpr):
    """A block of s: x, or x + residual rounded to x's type."""
    b_s = tl.load(p_x + o_n, mask=m_mn, other=0.0).to(WIDE)
    if p_residual is not None:
        b_s = rounded_sum(b_s, tl.load(p_residual + o_n, mask=m_mn, other=0.0), x_ptr)
    return b_s


@triton.jit
def load_normed(p_s, mean_ptr, rstd_ptr, o_m, m_m, m_mn, CENTRED: tl.constexpr, WIDE: tl.constexpr):
    """A block of x̂ [BLOCK_M, BLOCK_N] and its rows' ρ; outside the matrix dy is 0, and x̂ does not matter."""
    b_s = tl.load(p_s, mask=m_mn, other=0.0).to(WIDE)
    b_rstd = tl.load(rstd_ptr + o_m, mask=m_m, other=0.0)
    if CENTRED:
        b_s -= tl.load(mean_ptr + o_m, mask=m_m, other=0.0)[:, None]
    return b_s * b_rstd[:, None], b_rstd


@triton.jit
def weighted(b_normed, weight_ptr, bias_ptr, x_ptr, o_n, N, OFFSET: tl.constexpr, ROUND: tl.constexpr):
    """(offset + w) ⊙ x̂ + b. With ROUND, offset + w and x̂ are rounded to their own types first, as PyTorch would."""
    b_w = tl.load(weight_ptr + o_n, mask=o_n < N, other=0.0).to(b_normed.dtype) + OFFSET
    if ROUND:
        b_w = b_w.to(weight_ptr.dtype.element_ty).to(b_normed.dtype)
        b_normed = b_normed.to(x_ptr.dtype.element_ty).to(b_normed.dtype)
    b_y = b_w * b_normed
    if bias_ptr is not None:
        b_y += tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(b_normed.dtype)
    return b_y
