"""dx += D(u A): a thin product, masked and added to what is there in one pass over dx.

    dx[i] += keep[i] / (1 - p) · Σ_r u a        keep[i] as in `lora.fast.kernels.dropout`: i counts dx row-major

Moved: dx read and written once, u a never. A tile of dx is read first and waits in registers while the tile of the
product is made, whose operands come from L2. Bound by memory, so tiles are small and many: there is no reuse to gain.
Sums are float32, and the result is rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora.errors import LoRAError
from lora.fast.kernels.common import as_rows, matrix_product, output_rows, precision_of, rank_block
from lora.fast.kernels.compile_check import KernelSpec, spec_of
from lora.fast.kernels.dropout import DTYPES, keep_tile, launch_key
from lora.fast.runtime import interpreting
from lora.reference.dropout import LANES, keep_scale, threshold

BLOCK_M, BLOCK_N, NUM_WARPS = 64, 64, 4  # 32 elements a thread, in 128-bit loads; the best of eight on an H100


def dropout_add_product(dx: Tensor, u: Tensor, factor: Tensor, p: float, seed: int, stream: int = 0) -> Tensor:
    """dx += (u factor) ⊙ keep / (1 - p), in place and rounded once; the product is never written.

    Args:
        dx: [..., features], the caller's own buffer; rows may be strided.
        u: [..., r], any r, in dx's dtype; rows may be strided.
        factor: [r, features] in dx's dtype, any strides.
        p, seed, stream: as they were given to `dropout_forward`.

    Returns: dx.
    Raises: LoRAError for p outside [0, 1), operands that do not fit, or a dx that cannot be written in place.
    FLOPs: 2·tokens·r·features. Moved: dx read and written, u once for each 64 features; the factor from L2.
    """
    drop, (r, features) = threshold(p), factor.shape
    found = [(list(t.shape), t.dtype, t.device) for t in (u, factor)]
    expected = [([*dx.shape[:-1], r], dx.dtype, dx.device), ([r, dx.shape[-1]], dx.dtype, dx.device)]
    if found != expected or dx.dtype not in DTYPES:
        raise LoRAError(
            f"u and factor are {found}, expected {expected} to fit dx, {list(dx.shape)}, of float32, float16 or "
            "bfloat16."
        )
    if not dx.numel() or not r:
        return dx
    dx_rows, u_rows = output_rows(dx, dx.shape, "dx"), as_rows(u)
    tokens = len(dx_rows)
    with torch.cuda.device_of(dx):
        dropout_add_product_kernel[(triton.cdiv(tokens, BLOCK_M) * triton.cdiv(features, BLOCK_N),)](
            dx_rows, u_rows, factor, tokens, features, r, dx_rows.stride(0), u_rows.stride(0), *factor.stride(),
            launch_key(seed, stream), drop, keep_scale(p), BY_WORD=features % LANES == 0,
            PRECISION=precision_of(dx.dtype), INTERPRET=interpreting(), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
            BLOCK_R=rank_block(r), num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return dx


@triton.jit(do_not_specialize=["key", "drop"])
def dropout_add_product_kernel(
    dx_ptr, u_ptr, factor_ptr, M, N, R, stride_dx, stride_um, stride_fr, stride_fn,
    key: tl.int64, drop: tl.int32, scale, BY_WORD: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program: a tile of dx [M, N] += scale · mask(u [M, R] factor [R, N]). Neighbours have the same rows of u."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    o_m = (tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    first = tl.program_id(0) % tiles_n * BLOCK_N
    o_n, o_r = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    m_m, m_n = o_m[:, None] < M, o_n[None, :] < N
    p_u = u_ptr + o_m[:, None] * stride_um + o_r[None, :]
    p_factor = factor_ptr + o_r[:, None].to(tl.int64) * stride_fr + o_n[None, :].to(tl.int64) * stride_fn
    p_dx = dx_ptr + o_m[:, None] * stride_dx + o_n[None, :]
    b_dx = tl.load(p_dx, mask=m_m & m_n, other=0.0).to(tl.float32)  # first: it is on its way while the product is made
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in tl.range(0, R, BLOCK_R, num_stages=1):  # nearly always once
        b_u = tl.load(p_u, mask=m_m & (o_r[None, :] < R - r), other=0.0)
        b_factor = tl.load(p_factor, mask=m_n & (o_r[:, None] < R - r), other=0.0)
        acc = matrix_product(b_u, b_factor, acc, PRECISION, INTERPRET)
        p_u += BLOCK_R
        p_factor += BLOCK_R * stride_fr
    keep = keep_tile(o_m, first, N, key, drop, BY_WORD, BLOCK_N)
    b_dx += acc * tl.where(keep, scale, 0.0)
    tl.store(p_dx, b_dx.to(dx_ptr.dtype.element_ty), mask=m_m & m_n)


KINDS = ((torch.bfloat16, 16), (torch.bfloat16, 32), (torch.bfloat16, 64), (torch.float32, 16))


def compile_specs() -> list[KernelSpec]:
    """8192 tokens of Llama-3.1-8B's 4096 features."""
    return [_spec(dtype, r) for dtype, r in KINDS]


def _spec(dtype: torch.dtype, r: int) -> KernelSpec:
    tokens, features = 8192, 4096
    dx, u, factor = (
        torch.empty(n, dtype=dtype, device="meta") for n in ((tokens, features), (tokens, r), (r, features))
    )
    return spec_of(
        f"dropout_add_product {str(dtype).removeprefix('torch.')} r {r}",
        lambda: dropout_add_product(dx, u, factor, 0.1, 7), dropout_add_product_kernel,
        bytes_minimum=(2 * dx.numel() + u.numel() + factor.numel()) * dx.itemsize, flops=2 * tokens * features * r,
        shape=f"tokens {tokens}, features {features}, r {r}",
    )  # fmt: skip
