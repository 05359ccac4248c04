"""DoRA's row norm ‖W + s B A‖ in one pass over W, without B·A in memory (Liu et al. 2024; `lora.reference.dora`).

One program takes a few rows of W and goes along them: it makes a tile of B A with a matrix instruction, adds s times
it to the tile of W, squares, and sums in float32. W is read once and nothing is written but the norms, where B·A and
W + s B A as tensors of their own would be written and read too. Every program reads A, from L2.

Why not the expanded square, which needs no tile of B A at all?

    ‖w + s Aᵀb‖² = ‖w‖² + 2 s (A w)·b + s² bᵀ(A Aᵀ)b            w and b: one row of W and of B

It needs A w for every row, 2·in·out·r operations: as many as B A. And it cancels: each of its terms is rounded in
proportion to itself, so that the relative error of the sum grows by (‖w‖ + s‖Aᵀb‖)² / ‖w + s Aᵀb‖². A row that the
update shrinks to a thousandth of its length would have float32's 6e-8 times four million, 24%, or a negative square.
Squares cannot cancel in a sum of squares: its error is that of w + s Aᵀb itself, as in the reference.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora.errors import LoRAError, UnsupportedError
from lora.fast.kernels.common import as_rows, precision_of, rank_block
from lora.fast.kernels.compile_check import KernelSpec, spec_of
from lora.fast.kernels.gemm import DTYPES, PROGRAMS, is_even
from lora.fast.runtime import interpreting


def dora_norm(dense: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + s B A‖ of each row.

    Args:
        dense: W, [out, in]; rows may be strided. An NF4 weight is decoded by the caller.
        lora_A: [r, in]; lora_B: [out, r]; any r and any strides, of one dtype, not necessarily W's.
        scaling: s.

    Returns: [out], float32 (float64 for a float64 W).
    Raises: LoRAError where shapes do not fit; UnsupportedError for other types than these and the half precisions.
    FLOPs: 2·in·out·(r + 2). Moved: W once, A and B, the norms.
    """
    (N, K), R = dense.shape, lora_A.shape[0]
    check_factors(dense, lora_A, lora_B)
    wide = torch.promote_types(dense.dtype, torch.float32)
    if wide == torch.float64:  # a kernel's scalar argument is float32, so s is multiplied in here
        lora_A, lora_B, scaling = lora_A.double(), lora_B.double() * scaling, 1.0
    elif lora_A.dtype != lora_B.dtype or lora_A.dtype not in DTYPES:
        lora_A, lora_B = lora_A.float(), lora_B.float()
    norm = torch.empty(N, dtype=wide, device=dense.device)
    if not N:
        return norm
    rows, block_r = as_rows(dense) if K else dense, rank_block(R)
    block_n, block_k, num_warps = block_of(N, block_r, lora_A.dtype, is_even(rows) and is_even(lora_A))
    with torch.cuda.device_of(dense):
        dora_norm_kernel[(triton.cdiv(N, block_n),)](
            rows, lora_A, lora_B, norm, N, K, R, rows.stride(0), *lora_A.stride(), *lora_B.stride(), scaling,
            WIDE=tl.float64 if wide == torch.float64 else tl.float32,
            PRECISION=precision_of(torch.float32 if wide == torch.float64 else lora_A.dtype), INTERPRET=interpreting(),
            BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=block_r, ONE_BLOCK=block_r >= R,
            num_warps=num_warps, num_stages=4 if lora_A.dtype.itemsize == 2 else 3, enable_fp_fusion=True,
        )  # fmt: skip
    return norm


def check_factors(dense: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """The three matrices fit each other, and their types have a kernel."""
    (N, K), R = dense.shape, lora_A.shape[0]
    if list(lora_A.shape) != [R, K] or list(lora_B.shape) != [N, R]:
        raise LoRAError(
            f"lora_A is {list(lora_A.shape)} and lora_B {list(lora_B.shape)}, expected [r, {K}] and [{N}, r] to fit "
            f"a weight of {[N, K]}."
        )
    for name, tensor in (("the weight", dense), ("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor.dtype not in (*DTYPES, torch.float64):
            raise UnsupportedError(
                f"{name} is {tensor.dtype}; DoRA's norm takes float32, float16, bfloat16 and float64: dequantise or "
                "cast it."
            )


def block_of(N: int, block_r: int, dtype: torch.dtype, even: bool) -> tuple[int, int, int]:
    """Rows of W, columns at a time, and warps: 32 rows where that makes a program for each multiprocessor, else 16.

    Where rows are not `even`, elements are read one by one, and more than 32 columns of them would spill.
    """
    rows = 32 if N // 32 >= 0.9 * PROGRAMS else 16
    if not even:
        return rows, 32, 4
    if dtype.itemsize > 2:
        return rows, (64 if dtype == torch.float32 else 32), 4
    return rows, (128 if rows == 32 or block_r == 64 else 256), 4


@triton.jit
def add_update(
    acc, p_a, p_b, m_n, m_k, o_r, R, WIDE: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    """acc + b a for R columns of b and rows of a."""
    b_a = tl.load(p_a, mask=m_k & (o_r[:, None] < R), other=0.0)
    b_b = tl.load(p_b, mask=m_n & (o_r[None, :] < R), other=0.0)
    if INTERPRET:  # whose product of bfloat16 is garbage
        b_a, b_b = b_a.to(WIDE), b_b.to(WIDE)
    return tl.dot(b_b, b_a, acc, input_precision=PRECISION, out_dtype=WIDE)


@triton.jit
def dora_norm_kernel(
    w_ptr, a_ptr, b_ptr, norm_ptr, N, K, R, stride_wn, stride_ar, stride_ak, stride_bn, stride_br, scale,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program computes the norms of BLOCK_N rows."""
    o_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_k, o_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    m_n = o_n[:, None] < N
    p_w = w_ptr + o_n[:, None] * stride_wn + o_k[None, :]
    p_a = a_ptr + o_r[:, None].to(tl.int64) * stride_ar + o_k[None, :].to(tl.int64) * stride_ak
    p_b = b_ptr + o_n[:, None] * stride_bn + o_r[None, :].to(tl.int64) * stride_br
    total = tl.zeros((BLOCK_N, BLOCK_K), WIDE)
    for k in range(0, K, BLOCK_K):
        m_k = o_k[None, :] < K - k
        b_w = tl.load(p_w, mask=m_n & m_k, other=0.0)
        acc = tl.zeros((BLOCK_N, BLOCK_K), WIDE)
        if ONE_BLOCK:  # without a loop inside, the loop over K is pipelined
            acc = add_update(acc, p_a, p_b, m_n, m_k, o_r, R, WIDE, PRECISION, INTERPRET)
        else:
            for r in range(0, R, BLOCK_R):
                p_ar, p_br = p_a + r * stride_ar, p_b + r * stride_br
                acc = add_update(acc, p_ar, p_br, m_n, m_k, o_r, R - r, WIDE, PRECISION, INTERPRET)
        adapted = b_w.to(WIDE) + scale * acc
        total += adapted * adapted
        p_w += BLOCK_K
        p_a += BLOCK_K * stride_ak
    squares = tl.sum(total, 1)
    norm = tl.sqrt(squares) if tl.float64 == WIDE else tl.sqrt_rn(squares)  # float32's tl.sqrt is an approximation
    tl.store(norm_ptr + o_n, norm, mask=o_n < N)


def compile_specs() -> list[KernelSpec]:
    """Projections of Llama-3.1-8B: 4096 inputs to 1024 (k, v), 4096 (q, o) and 14336 (gate, up) rows."""
    specs = []
    for dtype, N, R in (
        (torch.bfloat16, 4096, 16), (torch.float32, 4096, 16), (torch.float64, 4096, 16),
        (torch.bfloat16, 1024, 16), (torch.bfloat16, 14336, 64), (torch.bfloat16, 4096, 128),
    ):  # fmt: skip
        weight, A, B = (torch.empty(s, dtype=dtype, device="meta") for s in ((N, 4096), (R, 4096), (N, R)))
        least = dtype.itemsize * (weight.numel() + A.numel() + B.numel()) + 4 * N
        specs.append(
            spec_of(
                f"dora_norm {dtype}, {N} rows, r {R}".replace("torch.", ""),
                functools.partial(dora_norm, weight, A, B, 2.0), dora_norm_kernel,
                shape=f"{N} x 4096, r {R}", bytes_minimum=least, flops=2 * N * 4096 * (R + 2),
            )
        )  # fmt: skip
    return specs
