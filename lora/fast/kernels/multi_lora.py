"""Many adapters in one batch, grouped: the products of `lora.reference.multi_lora` without a loop over adapters.

    u_i = s_j · A_j x_i        h_i += B_j u_i        j = index_i, and neither where index_i = -1

Tokens are put in the order of their adapters (`group_tokens`, on the device, without waiting for it): `order` lists
them, `bounds` says where each adapter's begin. A program takes a block of that list, so that all its rows have one
adapter, and reads its rows of x where they are: x is not copied. An adapter's last block is cut off at its last token.
There are as many programs as there could be blocks, and the few too many end at once: the sizes of a launch do not
depend on what is in `index`, so that a CUDA graph can hold it.

Three kernels serve both directions, with the factors' strides exchanged:

    shrink    u = s A x        du = s Bᵀ dy            reads x (or dy) once
    expand    h += B u         dx += Aᵀ du             reads and writes h (or dx) once; a row belongs to one program
    sums      dA = Σ du xᵀ     dB = Σ dy uᵀ            reads x (or dy) once; every adapter's own tokens, in `order`

None uses atomics, and the order of every sum is a function of `index` and the shapes. Tiles are those of `gemm`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora.errors import LoRAError
from lora.fast.kernels.common import as_rows, matrix_product, output_rows, precision_of, rank_block
from lora.fast.kernels.compile_check import KernelSpec, spec_of
from lora.fast.kernels.gemm import (
    check_operands,
    is_even,
    sum_parts,
    sum_parts_kernel,
    sum_tile_for,
    thin_product,
    token_splits,
    token_sum,
)
from lora.fast.runtime import interpreting


class Groups(NamedTuple):
    """Tokens by adapter, and the blocks of rows that programs take: made once a batch, for every layer."""

    order: Tensor  # int64 [tokens]: token numbers, adapter after adapter, those without one first; stable
    bounds: Tensor  # int32 [adapters + 1]: adapter j has order[bounds[j]:bounds[j + 1]]
    block_adapter: Tensor  # int32 [blocks]: each block's adapter; -1: nothing to do
    block_start: Tensor  # int32 [blocks]: its first place in order; behind the last token where there is nothing to do
    rows: int  # of a block


def group_tokens(index: Tensor, adapters: int, tokens: int | None = None) -> Groups:
    """Sorts tokens by adapter.

    Args:
        index: [n], integer, each entry's adapter or -1; entries are checked by the caller (`check_adapters`).
        adapters: how many there are.
        tokens: a multiple of n, where each entry stands for tokens / n neighbouring ones; n by default.

    Raises: LoRAError where tokens is no multiple of n.
    """
    tokens = len(index) if tokens is None else tokens
    if tokens and (not len(index) or tokens % len(index)):
        raise LoRAError(f"{tokens} tokens are not a multiple of the {len(index)} entries of the adapter index.")
    of_token = index.repeat_interleave(tokens // max(len(index), 1))
    sorted_index, order = torch.sort(of_token, stable=True)
    numbers = torch.arange(adapters + 1, device=index.device, dtype=sorted_index.dtype)
    bounds = torch.searchsorted(sorted_index, numbers)  # [adapters + 1]
    rows = min(64, max(16, triton.next_power_of_2(triton.cdiv(tokens, max(adapters, 1)))))
    blocks = (bounds.diff() + rows - 1) // rows  # [adapters]
    ends = blocks.cumsum(0)
    place = torch.arange(min(tokens, triton.cdiv(tokens, rows) + adapters), device=index.device)
    adapter = torch.searchsorted(ends, place, right=True)  # adapters, one too many, where no block is left
    used = adapter < adapters
    safe = adapter.clamp(max=adapters - 1) if adapters else adapter
    start = bounds[safe] + (place - ends[safe] + blocks[safe]) * rows if adapters else place
    return Groups(
        order, bounds.int(), torch.where(used, adapter, -1).int(), torch.where(used, start, tokens).int(), rows
    )


def multi_lora_shrink(x: Tensor, lora_A: Tensor, scaling: Tensor, groups: Groups) -> Tensor:
    """u_i = s_j A_j x_i, zero where j = -1; the backward's du_i = s_j B_jᵀ dy_i with lora_B.transpose(1, 2).

    Args:
        x: [..., in]; rows may be strided.
        lora_A: [adapters, r, in], x's dtype, any strides.
        scaling: [adapters], any floating type.
        groups: of x's tokens.

    Returns: [..., r], x's dtype.
    Raises: LoRAError, UnsupportedError where operands do not fit, as `gemm.skinny_gemm`.
    FLOPs: 2·tokens·in·r. Moved: x once for each 64 of r, u once, an adapter's A from L2.
    """
    adapters, r, fan_in = lora_A.shape
    check_operands({"x": x, "lora_A": lora_A}, {"x": [*x.shape[:-1], fan_in]})
    rows = as_rows(x)
    check_groups(groups, len(rows), adapters)
    u = torch.zeros(*x.shape[:-1], r, dtype=x.dtype, device=x.device)
    if not u.numel() or not adapters:
        return u
    block_r, u_rows = rank_block(r), as_rows(u)
    block_k, num_warps = thin_block(groups.rows, block_r, x.dtype)
    with torch.cuda.device_of(x):
        shrink_kernel[(triton.cdiv(r, block_r) * len(groups.block_adapter),)](
            rows, lora_A, u_rows, scaling.contiguous(), *groups[:4], fan_in, r,
            rows.stride(0), *lora_A.stride(), u_rows.stride(0),
            EVEN_K=fan_in % block_k == 0, PRECISION=precision_of(x.dtype), INTERPRET=interpreting(),
            BLOCK_M=groups.rows, BLOCK_K=block_k, BLOCK_R=block_r,
            num_warps=num_warps, num_stages=4 if x.dtype.itemsize == 2 else 3, enable_fp_fusion=True,
        )  # fmt: skip
    return u


def multi_lora_expand_(h: Tensor, u: Tensor, lora_B: Tensor, groups: Groups) -> Tensor:
    """h_i += B_j u_i in place, rounded once, nothing where j = -1; dx_i += A_jᵀ du_i with lora_A.transpose(1, 2).

    Args:
        h: [..., out], the caller's own buffer (the base's output); rows may be strided.
        u: [..., r], h's dtype, with the scaling in it, as `multi_lora_shrink` gives it.
        lora_B: [adapters, out, r], h's dtype, any strides.
        groups: of h's tokens.

    Returns: h.
    Raises: as `multi_lora_shrink`, and LoRAError for an h that cannot be written in place.
    FLOPs: 2·tokens·out·r. Moved: h read and written once.
    """
    adapters, fan_out, r = lora_B.shape
    lead = h.shape[:-1]
    check_operands({"h": h, "u": u, "lora_B": lora_B}, {"h": [*lead, fan_out], "u": [*lead, r]})
    if not h.numel() or not adapters:
        return h
    h_rows, u_rows = output_rows(h, h.shape, "h"), as_rows(u)
    check_groups(groups, len(h_rows), adapters)
    even = is_even(h_rows) and is_even(lora_B)
    columns = (
        128 if h.dtype.itemsize == 2 and even else 64
    )  # of a tile: more of float32, or read one by one, would spill
    with torch.cuda.device_of(h):
        expand_kernel[(triton.cdiv(fan_out, columns) * len(groups.block_adapter),)](
            h_rows, u_rows, lora_B, *groups[:4], fan_out, r, h_rows.stride(0), u_rows.stride(0), *lora_B.stride(),
            PRECISION=precision_of(h.dtype), INTERPRET=interpreting(),
            BLOCK_M=groups.rows, BLOCK_N=columns, BLOCK_R=rank_block(r),
            num_warps=4 if groups.rows < 64 else 8, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    return h


def multi_lora_A_gradient(du: Tensor, x: Tensor, groups: Groups, dtype: torch.dtype = torch.float32) -> Tensor:
    """dA_j = Σ du_i x_iᵀ over the tokens of adapter j, [adapters, r, in]; zero for an adapter without tokens.

    Args:
        du: [..., r], as `multi_lora_shrink` gives it for dy; x: [..., in]; rows may be strided.
        groups: of their tokens; dtype: of the result.

    Raises: as `multi_lora_shrink`.
    FLOPs: 2·tokens·in·r. Moved: x and du once, the partial sums written and read where there are several.
    """
    return _sums(x, du, groups, dtype, transposed=True)


def multi_lora_B_gradient(dy: Tensor, u: Tensor, groups: Groups, dtype: torch.dtype = torch.float32) -> Tensor:
    """dB_j = Σ dy_i u_iᵀ over the tokens of adapter j, [adapters, out, r], for u with the scaling in it.

    Args, raises, FLOPs, moved: as `multi_lora_A_gradient`, with dy [..., out] for x.
    """
    return _sums(dy, u, groups, dtype, transposed=False)


def _sums(wide: Tensor, thin: Tensor, groups: Groups, dtype: torch.dtype, *, transposed: bool) -> Tensor:
    """Each adapter's sum of wide_i thin_iᵀ, [adapters, N, r], or its transpose [adapters, r, N]."""
    check_operands({"wide": wide, "thin": thin}, {"thin": [*wide.shape[:-1], thin.shape[-1]]})
    N, r, adapters = wide.shape[-1], thin.shape[-1], len(groups.bounds) - 1
    shape = (adapters, r, N) if transposed else (adapters, N, r)
    wide_rows, thin_rows = as_rows(wide), as_rows(thin)
    check_groups(groups, len(wide_rows), adapters)
    if not wide.numel() or not thin.numel() or not adapters:
        return torch.zeros(shape, dtype=dtype, device=wide.device)
    tile, block_r = sum_tile_for(N, r, wide.dtype)
    splits = token_splits(len(wide_rows), N, r, wide.dtype, adapters)[0]
    parts = torch.empty((splits, *shape), dtype=dtype if splits == 1 else torch.float32, device=wide.device)
    stride_s, stride_j, *inner = parts.stride()
    with torch.cuda.device_of(wide):
        sums_kernel[(triton.cdiv(N, tile.BLOCK_N) * triton.cdiv(r, block_r), adapters, splits)](
            wide_rows, thin_rows, parts, groups.order, groups.bounds, N, r, wide_rows.stride(0), thin_rows.stride(0),
            *(inner[::-1] if transposed else inner), stride_j, stride_s,
            PRECISION=precision_of(wide.dtype), INTERPRET=interpreting(),
            BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_R=block_r,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return sum_parts(parts, dtype)


def check_groups(groups: Groups, tokens: int, adapters: int) -> None:
    """The groups are of these tokens and adapters: else a kernel would read out of bounds.

    Raises: LoRAError.
    """
    if (len(groups.order), len(groups.bounds) - 1) != (tokens, adapters):
        raise LoRAError(
            f"The groups are of {len(groups.order)} tokens and {len(groups.bounds) - 1} adapters, expected {tokens} "
            f"and {adapters}: call group_tokens for this batch."
        )


def thin_block(rows: int, block_r: int, dtype: torch.dtype) -> tuple[int, int]:
    """BLOCK_K and the warps of the shrink kernel for blocks of `rows`: the tiles of `gemm.thin_tile_for`."""
    if dtype == torch.float32:
        return (64 if block_r <= 32 else 32), 4
    return (128 if block_r <= 32 else 64), (8 if rows == 64 else 4)


@triton.jit
def block_of_rows(place, order_ptr, bounds_ptr, block_adapter_ptr, block_start_ptr, BLOCK_M: tl.constexpr):
    """The adapter of a block (-1: nothing to do), the tokens in it, and which of its rows are tokens."""
    j = tl.load(block_adapter_ptr + place)
    o_place = tl.load(block_start_ptr + place) + tl.arange(0, BLOCK_M)
    m_m = o_place < tl.load(bounds_ptr + tl.maximum(j, 0) + 1)
    return j.to(tl.int64), tl.load(order_ptr + o_place, mask=m_m, other=0), m_m


@triton.jit
def shrink_kernel(
    x_ptr, a_ptr, u_ptr, scaling_ptr, order_ptr, bounds_ptr, block_adapter_ptr, block_start_ptr, K, R,
    stride_xm, stride_aj, stride_ar, stride_ak, stride_um,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_R columns of u for one block of rows: s_j · A_j x."""
    blocks_r = tl.cdiv(R, BLOCK_R)
    j, o_m, m_m = block_of_rows(
        tl.program_id(0) // blocks_r, order_ptr, bounds_ptr, block_adapter_ptr, block_start_ptr, BLOCK_M
    )
    if j < 0:
        return
    o_r = tl.program_id(0) % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_m, m_r = m_m[:, None], o_r[None, :] < R
    acc = thin_product(
        x_ptr, a_ptr + j * stride_aj, o_m, m_m, o_r, m_r, K, stride_xm, stride_ar, stride_ak, 0, 0,
        False, True, EVEN_K, PRECISION, INTERPRET, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    acc *= tl.load(scaling_ptr + j).to(tl.float32)
    tl.store(u_ptr + o_m[:, None] * stride_um + o_r[None, :], acc.to(u_ptr.dtype.element_ty), mask=m_m & m_r)


@triton.jit
def expand_kernel(
    h_ptr, u_ptr, b_ptr, order_ptr, bounds_ptr, block_adapter_ptr, block_start_ptr, N, R,
    stride_hm, stride_um, stride_bj, stride_bn, stride_br,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program adds B_j u to BLOCK_N columns of h for one block of rows."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    j, o_m, m_m = block_of_rows(
        tl.program_id(0) // tiles_n, order_ptr, bounds_ptr, block_adapter_ptr, block_start_ptr, BLOCK_M
    )
    if j < 0:
        return
    o_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.arange(0, BLOCK_R)
    m_m, m_n = m_m[:, None], o_n[None, :] < N
    p_h = h_ptr + o_m[:, None] * stride_hm + o_n[None, :]
    p_u = u_ptr + o_m[:, None] * stride_um + o_r[None, :]
    p_b = b_ptr + j * stride_bj + o_r[:, None].to(tl.int64) * stride_br + o_n[None, :].to(tl.int64) * stride_bn
    b_h = tl.load(p_h, mask=m_m & m_n, other=0.0)  # first: it takes the longest
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(0, R, BLOCK_R):
        b_u = tl.load(p_u, mask=m_m & (o_r[None, :] < R - r), other=0.0)
        b_b = tl.load(p_b, mask=m_n & (o_r[:, None] < R - r), other=0.0)
        acc = matrix_product(b_u, b_b, acc, PRECISION, INTERPRET)
        p_u += BLOCK_R
        p_b += BLOCK_R * stride_br
    tl.store(p_h, (b_h.to(tl.float32) + acc).to(h_ptr.dtype.element_ty), mask=m_m & m_n)


@triton.jit
def sums_kernel(
    wide_ptr, thin_ptr, part_ptr, order_ptr, bounds_ptr, N, R,
    stride_wide, stride_thin, stride_pn, stride_pr, stride_pj, stride_ps,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program computes a tile [BLOCK_N, BLOCK_R] of one adapter's sum over one part of its tokens."""
    blocks_r, j, part, parts = tl.cdiv(R, BLOCK_R), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    o_n = tl.program_id(0) // blocks_r * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.program_id(0) % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_n, m_r = o_n[None, :] < N, o_r[None, :] < R
    first, last = tl.load(bounds_ptr + j), tl.load(bounds_ptr + j + 1)
    span = tl.cdiv(tl.cdiv(last - first, parts), BLOCK_M) * BLOCK_M
    start = first + part * span
    acc = token_sum(
        wide_ptr, thin_ptr, order_ptr, start, tl.minimum(start + span, last), o_n, m_n, o_r, m_r, N,
        stride_wide, stride_thin, 0, 0, False, True, PRECISION, INTERPRET, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    p_part = part_ptr + part.to(tl.int64) * stride_ps + j.to(tl.int64) * stride_pj
    p_part += o_n[:, None].to(tl.int64) * stride_pn + o_r[None, :].to(tl.int64) * stride_pr
    tl.store(p_part, acc.to(part_ptr.dtype.element_ty), mask=(o_n[:, None] < N) & m_r)


def compile_specs() -> list[KernelSpec]:
    """A projection of Llama-3.1-8B, 8192 tokens, 8 adapters of r = 16, or 512 of them, whose blocks are smaller."""
    bf16, fp32 = torch.bfloat16, torch.float32
    specs = []
    for dtype, adapters in ((bf16, 8), (fp32, 8), (bf16, 512)):
        specs += [_shrink_spec(dtype, adapters), _expand_spec(dtype, adapters)]
    sums = ((bf16, 16, True), (bf16, 16, False), (bf16, 64, True), (fp32, 16, True))
    return specs + [_sums_spec(dtype, r, transposed) for dtype, r, transposed in sums]


TOKENS, FEATURES = 8192, 4096  # of the compiled shapes


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _meta_groups(adapters: int) -> Groups:
    rows = 64 if adapters == 8 else 16
    blocks = TOKENS // rows + adapters
    order, bounds = _meta(torch.int64, TOKENS), _meta(torch.int32, adapters + 1)
    return Groups(order, bounds, _meta(torch.int32, blocks), _meta(torch.int32, blocks), rows)


def _shrink_spec(dtype: torch.dtype, adapters: int) -> KernelSpec:
    x, A, groups = _meta(dtype, TOKENS, FEATURES), _meta(dtype, adapters, 16, FEATURES), _meta_groups(adapters)
    return spec_of(
        f"multi_lora_shrink {dtype}, {adapters} adapters".replace("torch.", ""),
        lambda: multi_lora_shrink(x, A, _meta(torch.float32, adapters), groups), shrink_kernel,
        shape=f"{TOKENS} tokens, {FEATURES} -> r 16",
        bytes_minimum=dtype.itemsize * (x.numel() + A.numel() + TOKENS * 16), flops=2 * x.numel() * 16,
    )  # fmt: skip


def _expand_spec(dtype: torch.dtype, adapters: int) -> KernelSpec:
    h, u = _meta(dtype, TOKENS, FEATURES), _meta(dtype, TOKENS, 16)
    B, groups = _meta(dtype, adapters, FEATURES, 16), _meta_groups(adapters)
    return spec_of(
        f"multi_lora_expand {dtype}, {adapters} adapters".replace("torch.", ""),
        lambda: multi_lora_expand_(h, u, B, groups), expand_kernel,
        shape=f"{TOKENS} tokens, r 16 -> {FEATURES}",
        bytes_minimum=dtype.itemsize * (2 * h.numel() + u.numel() + B.numel()), flops=2 * h.numel() * 16,
    )  # fmt: skip


def _sums_spec(dtype: torch.dtype, r: int, transposed: bool) -> KernelSpec:
    wide, thin, adapters = _meta(dtype, TOKENS, FEATURES), _meta(dtype, TOKENS, r), 8
    return spec_of(
        f"multi_lora_{'A' if transposed else 'B'}_gradient {dtype}, r {r}".replace("torch.", ""),
        lambda: _sums(wide, thin, _meta_groups(adapters), torch.float32, transposed=transposed),
        sums_kernel, sum_parts_kernel, shape=f"{TOKENS} tokens, {adapters} x {FEATURES} x r {r}",
        bytes_minimum=dtype.itemsize * (wide.numel() + thin.numel()) + 4 * adapters * FEATURES * r,
        flops=2 * wide.numel() * r,
    )  # fmt: skip
