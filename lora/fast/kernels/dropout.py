"""Dropout from counted bits, fused where it is used: the masks of `lora.reference.dropout`, never stored.

    keep[i] = lane(splitmix64(key, i div 4), i mod 4) >= round(65536 p)        i counts [tokens, features] row-major
    y = x ⊙ keep / (1 - p)                                                     key = mix(seed, stream)

Moved: `dropout_forward` one number read and one written an element, `dropout_add` two read and one written,
`dropout_mask` one byte written. There is no reuse, so a tile is part of a row, 16 elements a thread in
128-bit loads, and the hash of four elements (some 40 instructions) is made once for the four. A tensor without gaps is
one long row. Rows whose length is no multiple of four begin in the middle of a word; there each element makes its own.

Other kernels import `keep_tile`, `keep_mask` and `keep_lanes`, and pass `launch_key(seed, stream)` and `threshold(p)`:
both are run-time arguments, so neither a new seed nor a new p compiles anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora.errors import LoRAError
from lora.fast.kernels.common import as_rows, output_rows
from lora.fast.kernels.compile_check import KernelSpec, spec_of
from lora.reference import dropout as counted
from lora.reference.dropout import LANES, keep_scale, key_of, threshold

GAMMA, MIX_1, MIX_2 = tl.constexpr(counted.GAMMA), tl.constexpr(counted.MIX_1), tl.constexpr(counted.MIX_2)
TILE = 2048  # elements a program: 4 warps, 16 a thread
PER_WARP = 512  # elements
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dropout_forward(x: Tensor, p: float, seed: int, stream: int = 0, out: Tensor | None = None) -> Tensor:
    """y = x ⊙ keep / (1 - p): the numbers of `lora.reference.dropout.apply_dropout`, -0 and NaN included.

    Args:
        x: [..., features]; rows may be strided. Positions count its elements row-major, whatever its strides.
        p: in [0, 1); with 0 this is a copy.
        seed, stream: as in `lora.reference.dropout.dropout_mask`.
        out: [..., features], where to write y; rows may be strided. It may be x itself.

    Returns: `out`, or a new tensor of x's dtype (float32, float16 or bfloat16).
    Raises: LoRAError for p outside [0, 1), or an `out` that cannot be written in place.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    drop = threshold(p)
    if not y.numel():
        return y
    x_rows, y_rows, how = in_rows(x, y, "out")
    with torch.cuda.device_of(x):
        dropout_forward_kernel[how.grid](
            x_rows, y_rows, how.features, how.strides[0], how.strides[1], how.row_tiles, launch_key(seed, stream), drop,
            keep_scale(p), BY_WORD=how.by_word, TILE=how.tile, num_warps=how.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def dropout_add(dx: Tensor, y: Tensor, p: float, seed: int, stream: int = 0) -> Tensor:
    """dx += y ⊙ keep / (1 - p), in place and rounded once.

    Args:
        dx: [..., features], the caller's own buffer; rows may be strided.
        y: of dx's shape; rows may be strided.
        p, seed, stream: as they were given to `dropout_forward`.

    Returns: dx.
    Raises: LoRAError for p outside [0, 1), or a dx that cannot be written in place.
    """
    drop = threshold(p)
    if not dx.numel():
        return dx
    y_rows, dx_rows, how = in_rows(y, dx, "dx")
    with torch.cuda.device_of(dx):
        dropout_add_kernel[how.grid](
            dx_rows, y_rows, how.features, how.strides[1], how.strides[0], how.row_tiles, launch_key(seed, stream),
            drop, keep_scale(p), BY_WORD=how.by_word, TILE=how.tile, num_warps=how.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return dx


def dropout_mask(shape: Sequence[int], p: float, seed: int, stream: int, device: torch.device | str) -> Tensor:
    """True where an element is kept, bool of `shape`: the bits of `lora.reference.dropout.dropout_mask`.

    Raises: LoRAError for p outside [0, 1).
    """
    drop = threshold(p)
    keep = torch.empty(tuple(shape), dtype=torch.bool, device=device)
    count = keep.numel()
    if not count:
        return keep
    with torch.cuda.device_of(keep):
        dropout_mask_kernel[(triton.cdiv(count, TILE),)](
            keep.view(torch.uint8), count, launch_key(seed, stream), drop, TILE=TILE, num_warps=TILE // PER_WARP
        )
    return keep


class Tiling(NamedTuple):
    """How two tensors of one shape are walked through together."""

    grid: tuple[int]
    features: int  # elements of a row
    strides: tuple[int, int]  # from row to row: of the source, of the destination
    row_tiles: int  # programs a row
    by_word: bool  # whether every row begins with a whole word of the mask
    tile: int
    num_warps: int


def in_rows(source: Tensor, out: Tensor, name: str) -> tuple[Tensor, Tensor, Tiling]:
    """Both as rows, or as one row each where neither has gaps, and how to walk through them.

    Raises: LoRAError for a dtype that float32 does not hold, or where `out`, called `name`, cannot be written in place.
    """
    if not {source.dtype, out.dtype} <= set(DTYPES):
        raise LoRAError(f"dropout of {source.dtype} into {out.dtype}: expected float32, float16 or bfloat16.")
    if source.shape == out.shape and source.is_contiguous() and out.is_contiguous():
        source_rows, out_rows, strides = source.view(1, -1), out.view(1, -1), (0, 0)
    else:
        source_rows, out_rows = as_rows(source), output_rows(out, source.shape, name)
        strides = (source_rows.stride(0), out_rows.stride(0))
    rows, features = out_rows.shape
    tile = tile_size(features)
    row_tiles = triton.cdiv(features, tile)
    by_word = rows == 1 or features % LANES == 0
    how = Tiling((rows * row_tiles,), features, strides, row_tiles, by_word, tile, max(1, tile // PER_WARP))
    return source_rows, out_rows, how


def tile_size(features: int) -> int:
    """TILE elements, or as short as a row, but at least 8 for each thread of one warp."""
    size: int = min(TILE, max(256, triton.next_power_of_2(features)))
    return size


def launch_key(seed: int, stream: int = 0) -> int:
    """The mask's 64-bit key as the signed number that a kernel takes."""
    key = key_of(seed, stream)
    return key - 2**64 if key >= 2**63 else key


@triton.jit
def splitmix64(key, o_word):
    """The o_word-th output of SplitMix64(key), uint64 (arithmetic modulo 2⁶⁴)."""
    word = key.to(tl.uint64) + o_word.to(tl.uint64) * GAMMA
    word = (word ^ (word >> 30)) * MIX_1
    word = (word ^ (word >> 27)) * MIX_2
    return word ^ (word >> 31)


@triton.jit
def keep_mask(key, position, drop):
    """Whether the elements at `position` (int64, row-major) are kept; a hash for each of them."""
    word = splitmix64(key, position >> 2)
    lane = (word >> ((position & 3) * 16).to(tl.uint64)).to(tl.int32) & 0xFFFF
    return lane >= drop


@triton.jit
def keep_lanes(key, o_word, drop):
    """[..., words] -> [..., 4 words]: whether four neighbours are kept, for each word; a hash for four.

    `o_word` is position // 4 of elements that begin at a multiple of four, in 64 bits.
    """
    word = splitmix64(key, o_word)
    low, high = word.to(tl.uint32), (word >> 32).to(tl.uint32)
    even = tl.interleave(low & 0xFFFF, high & 0xFFFF)  # lanes 0, 2
    odd = tl.interleave(low >> 16, high >> 16)  # lanes 1, 3
    return tl.interleave(even, odd).to(tl.int32) >= drop


@triton.jit
def keep_tile(o_m, first, N, key, drop, BY_WORD: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether each element of rows o_m (int64) and BLOCK_N columns from `first` on of a [., N] tensor is kept."""
    o_row = (o_m * N)[:, None] + first
    if BY_WORD:
        return keep_lanes(key, (o_row >> 2) + tl.arange(0, BLOCK_N // 4)[None, :], drop)
    return keep_mask(key, o_row + tl.arange(0, BLOCK_N)[None, :], drop)


@triton.jit
def kept_share(row, first, features, key, drop, scale, BY_WORD: tl.constexpr, TILE: tl.constexpr):
    """keep / (1 - p) of TILE neighbours, from element `first` of a row on; `scale` is 1 / (1 - p)."""
    position = row * features + first  # int64
    if BY_WORD:
        m_keep = keep_lanes(key, (position >> 2) + tl.arange(0, TILE // 4), drop)
    else:
        m_keep = keep_mask(key, position + tl.arange(0, TILE), drop)
    return tl.where(m_keep, scale, 0.0)


@triton.jit
def tile_of(features, row_tiles, TILE: tl.constexpr):
    """This program's row and first element, in 64 bits, its offsets and their mask."""
    row = (tl.program_id(0) // row_tiles).to(tl.int64)
    first = (tl.program_id(0) % row_tiles).to(tl.int64) * TILE
    o_tile = tl.arange(0, TILE)
    return row, first, o_tile, o_tile < tl.minimum(features - first, TILE).to(tl.int32)


@triton.jit(do_not_specialize=["key", "drop"])
def dropout_forward_kernel(
    x_ptr, y_ptr, features, stride_x, stride_y, row_tiles, key: tl.int64, drop: tl.int32, scale,
    BY_WORD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: TILE elements of one row of y."""
    row, first, o_tile, m_tile = tile_of(features, row_tiles, TILE)
    b_x = tl.load(x_ptr + row * stride_x + first + o_tile, mask=m_tile, other=0).to(tl.float32)
    b_y = b_x * kept_share(row, first, features, key, drop, scale, BY_WORD, TILE)
    tl.store(y_ptr + row * stride_y + first + o_tile, b_y.to(y_ptr.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["key", "drop"])
def dropout_add_kernel(
    dx_ptr, y_ptr, features, stride_dx, stride_y, row_tiles, key: tl.int64, drop: tl.int32, scale,
    BY_WORD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: TILE elements of one row of dx."""
    row, first, o_tile, m_tile = tile_of(features, row_tiles, TILE)
    p_dx = dx_ptr + row * stride_dx + first + o_tile
    b_y = tl.load(y_ptr + row * stride_y + first + o_tile, mask=m_tile, other=0).to(tl.float32)
    b_dx = tl.load(p_dx, mask=m_tile, other=0).to(tl.float32)
    b_dx += b_y * kept_share(row, first, features, key, drop, scale, BY_WORD, TILE)
    tl.store(p_dx, b_dx.to(dx_ptr.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["key", "drop"])
def dropout_mask_kernel(keep_ptr, count, key: tl.int64, drop: tl.int32, TILE: tl.constexpr):
    """One program: TILE elements of the mask, flattened."""
    _, first, o_tile, m_tile = tile_of(count, tl.num_programs(0), TILE)
    m_keep = keep_lanes(key, (first >> 2) + tl.arange(0, TILE // 4), drop)
    tl.store(keep_ptr + first + o_tile, m_keep.to(tl.uint8), mask=m_tile)


def compile_specs() -> list[KernelSpec]:
    """8192 tokens of Llama-3.1-8B's 4096 features, without gaps; and rows that begin in the middle of a word."""
    specs = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        specs += _specs(dtype, 4096)
    x = torch.empty(8192, 4096, device="meta")
    mask = spec_of(
        "dropout_mask", lambda: dropout_mask(x.shape, 0.1, 7, 0, "meta"), dropout_mask_kernel,
        bytes_minimum=x.numel(), shape="tokens 8192, features 4096",
    )  # fmt: skip
    return [*specs, *_specs(torch.bfloat16, 4095), mask]


def _specs(dtype: torch.dtype, features: int) -> list[KernelSpec]:
    tokens = 8192
    x = torch.empty(tokens, 4096, dtype=dtype, device="meta")[:, :features]
    kind = f"{str(dtype).removeprefix('torch.')} {features}"
    sizes = {"shape": f"tokens {tokens}, features {features}"}
    passes = {dropout_forward_kernel: 2, dropout_add_kernel: 3}  # over x: read and written, dx as well
    calls = (lambda: dropout_forward(x, 0.1, 7, out=x), lambda: dropout_add(x, x, 0.1, 7))
    return [
        spec_of(
            f"{kernel.fn.__name__.removesuffix('_kernel')} {kind}", call, kernel,
            bytes_minimum=n * x.numel() * x.itemsize, **sizes,
        )
        for call, (kernel, n) in zip(calls, passes.items(), strict=True)
    ]  # fmt: skip
