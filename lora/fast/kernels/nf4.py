"""NF4 decoded straight into a matrix product's operand, and encoded: `lora.reference.nf4`, bit for bit.

    w' = c_q · absmax        absmax = d_q2 · absmax2 + offset with double quantisation, both in float32

Decoding reads 4.127 bits a parameter (4.5 without double quantisation) and writes one number of the destination's
dtype: what it costs is the writing. One program decodes a run of `TILE` elements of one row:

- its codes come in 128-bit loads, eight to a 32-bit word, and are unpacked with two instructions each;
- the code's value is gathered from a table of 16 that each program puts into shared memory: 16 neighbouring words lie
  in 16 banks, so that no two lanes that want different codes ever wait for each other;
- a block's absmax is decoded once and handed to the lanes of its block. For that the tile holds 64 elements a thread:
  with half as many the compiler finds it cheaper to decode absmax again in every lane, 10.8 instructions an element
  against 7.1.

A destination whose rows are part of wider ones is decoded row by row. Where a row's length is no multiple of eight,
or the codes do not start at a multiple of four bytes, each element reads its own byte instead.

Both kernels are compiled without contraction: a product and a sum fused into one rounding would change bits.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora.errors import LoRAError
from lora.fast.kernels.common import output_rows
from lora.fast.kernels.compile_check import KernelSpec, spec_of
from lora.fast.runtime import interpreting
from lora.nf4_format import DYNAMIC_CODES, NF4_CODES, midpoints
from lora.projection import NF4Weight
from lora.reference.nf4 import SMALLEST_ABSMAX, doubly_quantised, nf4_bytes

CODES_IN_WORD = 8
LARGEST_TILE = 8192
PER_THREAD = 64  # elements
QUANTIZE_TILE = 1024  # elements: 8 a thread of 4 warps
FP_FUSION = False  # d · absmax2 + offset is rounded twice in the reference, and so here


@triton.jit
def block_absmax(
    absmax_ptr, nested_absmax_ptr, nested_offset_ptr, dynamic_ptr, o_block, m_block, NESTED_SIZE: tl.constexpr
):
    """The scale of each block of `o_block`, float32: as stored, or from its 8 bits where NESTED_SIZE is not 0."""
    b_absmax = tl.load(absmax_ptr + o_block, mask=m_block, other=0)
    if NESTED_SIZE:
        b_spread = tl.load(dynamic_ptr + b_absmax)
        b_nested = tl.load(nested_absmax_ptr + o_block // NESTED_SIZE, mask=m_block, other=0)
        b_absmax = b_spread * b_nested + tl.load(nested_offset_ptr)
    return b_absmax


@triton.jit
def rounded(b_value, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """Float32 in `dtype`, to nearest, ties to even; the interpreter would cut bfloat16 off, and bits are promised."""
    if INTERPRET and dtype == tl.bfloat16:
        b_bits = b_value.to(tl.uint32, bitcast=True)
        b_bits += 0x7FFF + ((b_bits >> 16) & 1)
        return (b_bits >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return b_value.to(dtype)


@triton.jit
def nf4_dequantize_kernel(
    codes_ptr,  # int32 [n / 8] where IN_WORDS, else uint8 [ceil(n / 2)]
    absmax_ptr,  # uint8 [blocks], or float32 where NESTED_SIZE is 0
    nested_absmax_ptr,  # float32, or None
    nested_offset_ptr,  # float32 [], or None
    values_ptr,  # float32 [16]: the value of each code
    dynamic_ptr,  # float32 [256]: the values of the second level
    out_ptr,  # [rows, columns], rows `out_stride` apart
    columns,
    row_words,  # columns / 8
    row_groups,  # columns / GROUP, rounded up
    out_stride,
    row_tiles,  # programs that share a row
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,  # elements of a row that surely share a block: BLOCK_SIZE, or less if rows cut blocks
    NESTED_SIZE: tl.constexpr,
    IN_WORDS: tl.constexpr,
    INTERPRET: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: TILE neighbouring elements of one row."""
    row = (tl.program_id(0) // row_tiles).to(tl.int64)
    tile = (tl.program_id(0) % row_tiles).to(tl.int64)
    o_element = tl.arange(0, TILE)
    m_element = o_element < tl.minimum(columns - tile * TILE, TILE).to(tl.int32)
    if IN_WORDS:
        o_word = tl.arange(0, TILE // 8)
        p_word = codes_ptr + row * row_words + tile * (TILE // 8)
        m_word = o_word < tl.minimum(row_words - tile * (TILE // 8), TILE).to(tl.int32)
        b_word = tl.load(p_word + o_word, mask=m_word, other=0)
        o_nibble = tl.arange(0, 8) ^ 1  # in memory's order, but the high half of each byte comes first
        b_code = tl.reshape((b_word[:, None] >> (4 * o_nibble[None, :])) & 15, (TILE,))
    else:
        o_flat = row * columns + tile * TILE + o_element
        b_byte = tl.load(codes_ptr + o_flat // 2, mask=m_element, other=0).to(tl.int32)
        b_code = (b_byte >> tl.where(o_flat % 2 == 0, 4, 0)) & 15

    o_group = tl.arange(0, TILE // GROUP)
    m_group = o_group < row_groups - tile * (TILE // GROUP)
    o_block = (row * row_groups + tile * (TILE // GROUP) + o_group) // (BLOCK_SIZE // GROUP)
    b_absmax = block_absmax(
        absmax_ptr, nested_absmax_ptr, nested_offset_ptr, dynamic_ptr, o_block, m_group, NESTED_SIZE
    )
    b_absmax = tl.reshape(tl.broadcast_to(b_absmax[:, None], (TILE // GROUP, GROUP)), (TILE,))
    b_value = tl.gather(tl.load(values_ptr + tl.arange(0, 16)), b_code, 0)
    p_out = out_ptr + row * out_stride + tile * TILE
    tl.store(p_out + o_element, rounded(b_value * b_absmax, out_ptr.dtype.element_ty, INTERPRET), mask=m_element)


@triton.jit
def nf4_quantize_kernel(
    weight_ptr,  # [n]
    codes_ptr,  # uint8 [ceil(n / 2)]
    absmax_ptr,  # float32 [blocks]
    midpoints_ptr,  # float32 [15]: half way between neighbouring codes
    count,  # n
    packed,  # ceil(n / 2)
    smallest,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program: BLOCKS neighbouring blocks."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    left = tl.minimum(count - first * BLOCK_SIZE, BLOCKS * BLOCK_SIZE).to(tl.int32)  # elements of this program
    o_block = tl.arange(0, BLOCKS)
    o_element = o_block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]  # [BLOCKS, BLOCK_SIZE]
    p_weight = weight_ptr + first * BLOCK_SIZE + o_element
    b_weight = tl.load(p_weight, mask=o_element < left, other=0).to(tl.float32)
    b_absmax = tl.max(tl.abs(b_weight), 1)  # [BLOCKS]
    b_divisor = tl.maximum(b_absmax, tl.full((BLOCKS,), smallest, tl.float32))
    b_reciprocal = tl.div_rn(1.0, b_divisor)  # `/` would not round as torch does
    b_scaled = b_weight * b_reciprocal[:, None]
    b_code = tl.zeros((BLOCKS, BLOCK_SIZE), tl.int32)
    for j in tl.static_range(15):
        b_code += (b_scaled > tl.load(midpoints_ptr + j)).to(tl.int32)  # a tie: the lower code
    b_high, b_low = tl.split(tl.reshape(b_code, (BLOCKS * BLOCK_SIZE // 2, 2)))
    first_byte = first * (BLOCK_SIZE // 2)
    o_byte = tl.arange(0, BLOCKS * BLOCK_SIZE // 2)
    m_byte = o_byte < tl.minimum(packed - first_byte, BLOCKS * BLOCK_SIZE // 2).to(tl.int32)
    tl.store(codes_ptr + first_byte + o_byte, (b_high << 4 | b_low).to(tl.uint8), mask=m_byte)
    tl.store(absmax_ptr + first + o_block, b_absmax, mask=o_block < tl.cdiv(left, BLOCK_SIZE))


class Tiling(NamedTuple):
    """How a matrix is walked through."""

    group: int  # elements of a row that surely share a block
    tile: int  # elements a program
    row_tiles: int  # programs a row
    num_warps: int


def nf4_dequantize_into(quantised: NF4Weight, out: Tensor) -> Tensor:
    """w' = c_q · absmax in float32, rounded once into `out`: the bits of `lora.reference.nf4.nf4_dequantize`.

    Args:
        quantised: nested or plain, of any size and block size.
        out: of the weight's shape and any floating dtype; its rows may be part of wider ones (one layer's columns of a
            stacked or bordered operand).

    Returns: `out`.
    Raises: LoRAError for an `out` of another shape or one that cannot be written in rows.
    """
    if out.shape != quantised.shape or not out.dtype.is_floating_point or out.device != quantised.codes.device:
        raise LoRAError(
            f"an NF4 weight {list(quantised.shape)} on {quantised.codes.device} was to be decoded into {out.dtype} "
            f"{list(out.shape)} on {out.device}, expected a floating tensor of the weight's shape on its device."
        )
    if not out.numel():
        return out
    rows = out.view(1, -1) if out.is_contiguous() else output_rows(out, out.shape, "out")
    columns = rows.shape[1]
    how = tiling(rows.shape[0], columns, quantised.block_size)
    codes = quantised.codes
    in_words = columns % CODES_IN_WORD == 0 and codes.data_ptr() % 4 == 0 and codes.storage_offset() % 4 == 0
    nested = quantised.nested_absmax is not None
    values, dynamic, _ = tables(str(out.device))
    with torch.cuda.device_of(out):
        nf4_dequantize_kernel[(rows.shape[0] * how.row_tiles,)](
            codes.view(torch.int32) if in_words else codes, quantised.absmax, quantised.nested_absmax,
            quantised.nested_offset, values, dynamic, rows, columns, columns // CODES_IN_WORD,
            triton.cdiv(columns, how.group), rows.stride(0), how.row_tiles,
            BLOCK_SIZE=quantised.block_size, GROUP=how.group,
            NESTED_SIZE=quantised.nested_block_size if nested else 0, IN_WORDS=in_words,
            INTERPRET=interpreting(), TILE=how.tile, num_warps=how.num_warps, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return out


def tiling(rows: int, columns: int, block_size: int) -> Tiling:
    """Tiles of LARGEST_TILE elements, or as short as the rows; never less than a group of a row's elements.

    A matrix without gaps is one long row, of which blocks are whole parts. Shorter rows may cut blocks: what their
    length shares with the block size is then the group, so that no group lies in two blocks.
    """
    group = block_size if rows == 1 else math.gcd(block_size, columns)
    tile = max(group, min(LARGEST_TILE, max(256, triton.next_power_of_2(columns))))
    return Tiling(group, tile, triton.cdiv(columns, tile), max(1, tile // (32 * PER_THREAD)))


def nf4_quantize_blocks(
    weight: Tensor, *, block_size: int = 64, double_quant: bool = True, nested_block_size: int = 256
) -> NF4Weight:
    """q = argmin_j |w / absmax - c_j|, block by block: the codes and absmax of `lora.reference.nf4.nf4_quantize`.

    One pass: dtype.itemsize read and 4.5 bits written a parameter. The second level, 1/64 of the numbers, is the
    reference's own.

    Args:
        weight: any shape, float32, float16 or bfloat16, already found fit for NF4 (`check_quantisable`).
        block_size, nested_block_size, double_quant: as in the reference, already checked.
    """
    values = weight.detach().contiguous().view(-1)  # [n]; reshape keeps strides where one will do
    count = values.numel()
    codes = torch.empty(triton.cdiv(count, 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(triton.cdiv(count, block_size), dtype=torch.float32, device=weight.device)
    blocks = max(1, QUANTIZE_TILE // block_size)
    with torch.cuda.device_of(weight):
        nf4_quantize_kernel[(triton.cdiv(len(absmax), blocks),)](
            values, codes, absmax, tables(str(weight.device)).midpoints, count, len(codes), SMALLEST_ABSMAX,
            BLOCK_SIZE=block_size, BLOCKS=blocks, num_warps=4, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    quantised = NF4Weight(codes, absmax, tuple(weight.shape), weight.dtype, block_size)
    return doubly_quantised(quantised, nested_block_size) if double_quant else quantised


class Tables(NamedTuple):
    """What the kernels look up, float32."""

    values: Tensor  # [16]
    dynamic: Tensor  # [256]
    midpoints: Tensor  # [15]


@functools.cache
def tables(device: str) -> Tables:
    """The code tables on one device."""
    return Tables(NF4_CODES.to(device), DYNAMIC_CODES.to(device), midpoints(NF4_CODES).to(device))


def compile_specs() -> list[KernelSpec]:
    """Llama-3.1-8B's widest matrix, alone and as columns of a bordered operand (r = 16)."""
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    specs = [_decode_spec(dtype, nested, 0) for dtype in (bfloat16, float16, float32) for nested in (True, False)]
    specs += [_decode_spec(bfloat16, True, 16), _decode_spec(bfloat16, True, 0, block_size=256)]
    return [*specs, *(_encode_spec(dtype) for dtype in (bfloat16, float32))]


def _decode_spec(dtype: torch.dtype, nested: bool, border: int, block_size: int = 64) -> KernelSpec:
    rows, columns = 14336, 4096
    count, blocks = rows * columns, rows * columns // block_size

    def empty(size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    weight = NF4Weight(
        empty(count // 2, torch.uint8), empty(blocks, torch.uint8 if nested else torch.float32), (rows, columns), dtype,
        block_size, *((empty(blocks // 256, torch.float32), empty(1, torch.float32)) if nested else ()),
    )  # fmt: skip
    out = torch.empty(rows, columns + border, dtype=dtype, device="meta")[:, :columns]
    kind = f"{'nested' if nested else 'plain'}{', bordered' if border else ''}, blocks of {block_size}"
    return spec_of(
        f"nf4_dequantize {str(dtype).removeprefix('torch.')} {kind}",
        lambda: nf4_dequantize_into(weight, out),
        nf4_dequantize_kernel,
        bytes_minimum=nf4_bytes(weight) + count * dtype.itemsize,
        shape=f"{columns} -> {rows}",
    )


def _encode_spec(dtype: torch.dtype) -> KernelSpec:
    weight = torch.empty(14336, 4096, dtype=dtype, device="meta")
    return spec_of(
        f"nf4_quantize {str(dtype).removeprefix('torch.')}",
        lambda: nf4_quantize_blocks(weight, double_quant=False),
        nf4_quantize_kernel,
        bytes_minimum=weight.nbytes + weight.numel() // 2 + weight.numel() // 16,
        shape="4096 -> 14336",
    )
