"""The products of one LoRA linear layer as Triton kernels: the wide one with the update inside it, and the thin ones.

`lora_gemm`, `lora_gemm_dx`: one matrix product whose accumulator does not start at zero but at the update,

    h  = s u Bᵀ + x Wᵀ + b                u  = D(x) Aᵀ  [tokens, r]            (forward)
    dx = D(du A) + dy W                   du = s dy B   [tokens, r]            (input gradient)

so that the update costs r / in of the product's arithmetic and not one byte of [tokens, out]: it is never written,
read or added, and is rounded together with the result. Both are one kernel that takes strides; D's mask is made in
registers. A tile of BLOCK_M × BLOCK_N is summed in float32 registers; operands are copied to shared memory
`num_stages` ahead. Programs go down GROUP_M tiles before the next column of tiles, so that the programs of one moment
share their operands in L2. Bound by arithmetic from a few hundred tokens on.

`skinny_gemm`: u = s D(x) Aᵀ, the same for du = s dy B. Reads x once and does 2r operations with each number: bound by
memory, so a tile is long in K, to have enough loads in flight, and has few rows, to have enough programs.

`lora_A_gradient`, `lora_B_gradient`: dA = duᵀ D(x), dB = dyᵀ u, sums over tokens. The wide operand is read once; the
tokens are split, summed apart, and the sums summed in a fixed order: no atomics, the same bits every time.

Dropout multiplies an operand by its mask only, which is exact; 1 / (1 - p) goes into the float32 result.
Operands are float32, float16 or bfloat16, all of one type; float32 is multiplied as float32, never as TF32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora.errors import LoRAError, UnsupportedError
from lora.fast.kernels.common import as_rows, matrix_product, output_rows, precision_of, rank_block
from lora.fast.kernels.compile_check import KernelSpec, spec_of
from lora.fast.kernels.dropout import keep_tile, launch_key
from lora.fast.runtime import interpreting
from lora.fast.support import device_reasons
from lora.projection import Dropout
from lora.reference.dropout import LANES, keep_scale, threshold

PROGRAMS = 132  # an H100's multiprocessors: a choice of tile should give each of them one. Fixed, as sums depend on it
GROUP_M = 16  # row tiles that go through the columns together: then 132 programs cover about a square of the output
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tile(NamedTuple):
    """What one program of a product computes at a time, and how many steps of K it copies ahead."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    def blocks(self) -> dict[str, int]:
        """The compile-time arguments."""
        return {"BLOCK_M": self.BLOCK_M, "BLOCK_N": self.BLOCK_N, "BLOCK_K": self.BLOCK_K}


WIDE_TILES = {  # 16 bits, the largest first; no spills, and within each architecture's shared memory
    "sm_90": (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4), Tile(64, 32, 128, 4, 4)),
    "sm_100": (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4), Tile(64, 32, 128, 4, 4)),
    "sm_80": (Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 4), Tile(64, 32, 64, 4, 4)),
    "gfx942": (Tile(128, 128, 64, 8, 2), Tile(64, 128, 64, 4, 2), Tile(64, 32, 64, 4, 2)),
}
WIDE_TILES_FLOAT32 = (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 2), Tile(32, 32, 32, 4, 2))
ODD_TILE = Tile(128, 64, 32, 8, 3)  # for rows that cannot be read 128 bits at a time: a larger one would spill


def lora_gemm(
    x: Tensor, weight: Tensor, u: Tensor, lora_B: Tensor, bias: Tensor | None = None, scale: float = 1.0,
    out: Tensor | None = None, *, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """h = x Wᵀ + s u Bᵀ + b, rounded once (Hu et al. 2021, eq. 3, with u = D(x) Aᵀ given).

    Args:
        x: [..., in]; rows may be strided.
        weight: [out, in], any strides of which one is 1 (another is copied).
        u: [..., r], any r; lora_B: [out, r].
        bias: [out] or None, added in float32, of any floating type.
        scale: s, a run-time value: changing it compiles nothing.
        out: [..., out], where to write h; rows may be strided.
        tile: pins the tile; by default `tile_for` chooses it from the shape.

    Returns: `out`, or a new tensor of x's dtype.
    Raises: LoRAError where shapes or dtypes do not fit each other; UnsupportedError for another dtype.
    FLOPs: 2·tokens·out·(in + r). Moved at least: x, W, u, B read once and h written once.
    """
    return _wide(x, weight.T, u, lora_B.T, bias, scale, out, None, tile)


def lora_gemm_dx(
    dy: Tensor, weight: Tensor, du: Tensor, lora_A: Tensor, dropout: Dropout | None = None,
    out: Tensor | None = None, *, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """dx = dy W + D(du A), rounded once: the input gradient of `lora_gemm`, du = s dy B given.

    Args:
        dy: [..., out]; weight: [out, in]; du: [..., r]; lora_A: [r, in]; strides as in `lora_gemm`.
        dropout: the mask counts dx [tokens, in] row-major, as the forward counted x.
        out, tile: as in `lora_gemm`; out is [..., in].

    Returns, raises, FLOPs: as `lora_gemm`.
    """
    return _wide(dy, weight, du, lora_A, None, 1.0, out, dropout, tile)


def skinny_gemm(
    x: Tensor, lora_A: Tensor, dropout: Dropout | None = None, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """u = s D(x) Aᵀ, rounded once; du = s dy B is `skinny_gemm(dy, lora_B.T, None, s)`.

    Args:
        x: [..., in]; rows may be strided.
        lora_A: [r, in], any strides and any r; A's of several projections of x may be stacked.
        dropout: the mask counts x [tokens, in] row-major.
        out: [..., r], where to write u; rows may be strided.

    Returns: `out`, or a new tensor of x's dtype.
    Raises: as `lora_gemm`.
    FLOPs: 2·tokens·in·r. Moved: x once for each 64 of r, u once; A from L2.
    """
    (r, fan_in), shape = lora_A.shape, torch.Size([*x.shape[:-1], lora_A.shape[0]])
    check_operands({"x": x, "lora_A": lora_A}, {"x": [*x.shape[:-1], fan_in]})
    u = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    if not u.numel():
        return u
    rows, u_rows = as_rows(x), output_rows(u, shape, "out")
    tile, block_r = thin_tile_for(len(rows), r, x.dtype)
    mask = mask_arguments(dropout, fan_in)
    with torch.cuda.device_of(x):
        skinny_kernel[(triton.cdiv(r, block_r) * triton.cdiv(len(rows), tile.BLOCK_M),)](
            rows, lora_A, u_rows, len(rows), fan_in, r, rows.stride(0), *lora_A.stride(), u_rows.stride(0),
            scale * mask.scale, mask.key, mask.drop, DROPOUT=mask.present, BY_WORD=mask.by_word,
            EVEN_K=fan_in % tile.BLOCK_K == 0, PRECISION=precision_of(x.dtype), INTERPRET=interpreting(),
            BLOCK_M=tile.BLOCK_M, BLOCK_K=tile.BLOCK_K, BLOCK_R=block_r,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return u


def lora_A_gradient(
    du: Tensor, x: Tensor, dropout: Dropout | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """dA = duᵀ D(x), [r, in], a sum over tokens in float32, in a fixed order.

    Args:
        du: [..., r]; x: [..., in]; rows may be strided.
        dropout: as it was given to `skinny_gemm`.
        dtype: of the result.

    Raises: as `lora_gemm`.
    FLOPs: 2·tokens·in·r. Moved: x and du once, the partial sums (`token_splits` of them) written and read.
    """
    return _sum_over_tokens(x, du, dropout, dtype, transposed=True)


def lora_B_gradient(dy: Tensor, u: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """dB = dyᵀ u, [out, r], for u as `lora_gemm` multiplied it (with the scale): a sum over tokens in a fixed order.

    Args, raises, FLOPs, moved: as `lora_A_gradient`, with dy [..., out] for x.
    """
    return _sum_over_tokens(dy, u, None, dtype, transposed=False)


def _wide(
    x: Tensor, w: Tensor, u: Tensor, b: Tensor, bias: Tensor | None, scale: float, out: Tensor | None,
    dropout: Dropout | None, tile: Tile | None,
) -> Tensor:  # fmt: skip
    """D(scale · u b) + x w + bias, with w [K, N] and b [R, N]."""
    (K, N), R, lead = w.shape, b.shape[0], x.shape[:-1]
    check_operands({"x": x, "weight": w, "u": u, "factor": b}, {"x": [*lead, K], "u": [*lead, R], "factor": [R, N]})
    if bias is not None and list(bias.shape) != [N]:
        raise LoRAError(f"bias is {list(bias.shape)}, expected [{N}]: one number for each output feature.")
    h = torch.empty((*lead, N), dtype=x.dtype, device=x.device) if out is None else out
    if not h.numel():
        return h
    x_rows, u_rows, h_rows = as_rows(x), as_rows(u), output_rows(h, torch.Size([*lead, N]), "out")
    w = w if 1 in w.stride() else w.contiguous()
    M = len(x_rows)
    if tile is None:
        even = is_even(x_rows) and is_even(w)
        tile = tile_for(M, N, x.dtype, architecture(x.device), dropout is not None) if even else ODD_TILE
    mask = mask_arguments(dropout, N)
    with torch.cuda.device_of(x):
        lora_gemm_kernel[(triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(N, tile.BLOCK_N),)](
            x_rows, w, u_rows, b, None if bias is None else bias.contiguous(), h_rows, M, N, K, R,
            x_rows.stride(0), *w.stride(), u_rows.stride(0), *b.stride(), h_rows.stride(0),
            scale * mask.scale, mask.key, mask.drop, DROPOUT=mask.present, BY_WORD=mask.by_word,
            EVEN_K=K % tile.BLOCK_K == 0, PRECISION=precision_of(x.dtype), INTERPRET=interpreting(),
            **tile.blocks(), BLOCK_R=rank_block(R), GROUP_M=GROUP_M,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return h


def _sum_over_tokens(
    wide: Tensor, thin: Tensor, dropout: Dropout | None, dtype: torch.dtype, *, transposed: bool
) -> Tensor:
    """D(wide)ᵀ thin, [N, r], or its transpose [r, N]; over tokens split in parts, the parts summed after."""
    check_operands({"wide": wide, "thin": thin}, {"thin": [*wide.shape[:-1], thin.shape[-1]]})
    N, r = wide.shape[-1], thin.shape[-1]
    shape = (r, N) if transposed else (N, r)
    wide_rows, thin_rows = as_rows(wide), as_rows(thin)
    tokens = len(wide_rows)
    if not tokens or not N or not r:
        return torch.zeros(shape, dtype=dtype, device=wide.device)
    tile, block_r = sum_tile_for(N, r, wide.dtype)
    splits, span = token_splits(tokens, N, r, wide.dtype)
    parts = torch.empty((splits, *shape), dtype=dtype if splits == 1 else torch.float32, device=wide.device)
    mask = mask_arguments(dropout, N)
    with torch.cuda.device_of(wide):
        token_sum_kernel[(triton.cdiv(N, tile.BLOCK_N), triton.cdiv(r, block_r), splits)](
            wide_rows, thin_rows, parts, tokens, N, r, wide_rows.stride(0), thin_rows.stride(0),
            *parts.stride()[::-1] if transposed else (*parts.stride()[1:], parts.stride(0)), span,
            mask.scale, mask.key, mask.drop, DROPOUT=mask.present, BY_WORD=mask.by_word,
            PRECISION=precision_of(wide.dtype), INTERPRET=interpreting(),
            BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_R=block_r,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return sum_parts(parts, dtype)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ over the first dimension of a contiguous tensor, first to last, in float32; a single part as it is."""
    if len(parts) == 1:
        return parts[0].to(dtype)
    total = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    with torch.cuda.device_of(parts):
        sum_parts_kernel[(triton.cdiv(total.numel(), 1024),)](parts, total, total.numel(), len(parts), BLOCK=1024)
    return total


def check_operands(tensors: dict[str, Tensor], shapes: dict[str, list[int]]) -> None:
    """The tensors are of one supported dtype and on one device; those in `shapes` have the shape given there.

    Raises: UnsupportedError for a dtype without a kernel, LoRAError for anything that does not fit.
    """
    first, *others = tensors.items()
    if first[1].dtype not in DTYPES:
        raise UnsupportedError(
            f"{first[0]} is {first[1].dtype}; the Triton products take float32, float16 and bfloat16: cast it, or use "
            "LORA_BACKEND=reference."
        )
    for name, tensor in others:
        if (tensor.dtype, tensor.device) != (first[1].dtype, first[1].device):
            raise LoRAError(
                f"{name} is {tensor.dtype} on {tensor.device}, expected {first[1].dtype} on {first[1].device} as "
                f"{first[0]} is: cast or move it."
            )
    for name, shape in shapes.items():
        if list(tensors[name].shape) != shape:
            raise LoRAError(f"{name} is {list(tensors[name].shape)}, expected {shape}, to fit the other operands.")


class Mask(NamedTuple):
    """Dropout as the kernels take it."""

    present: bool
    by_word: bool  # whether every row begins with a whole word of the mask
    key: int
    drop: int
    scale: float  # 1 / (1 - p)


def mask_arguments(dropout: Dropout | None, features: int) -> Mask:
    """What the kernels need to count the mask of a tensor [tokens, features]."""
    if dropout is None or threshold(dropout.p) == 0:
        return Mask(False, True, 0, 0, 1.0)
    key = launch_key(dropout.seed, dropout.stream)
    return Mask(True, features % LANES == 0, key, threshold(dropout.p), keep_scale(dropout.p))


@functools.cache
def architecture(device: torch.device) -> str:
    """The family of tiles for a device, one of WIDE_TILES; the interpreter takes Hopper's.

    A compute capability that none is named after (8.9, 12.0) takes sm_80's: at most 99 KiB of shared memory a block,
    which every GPU from 8.0 on has.

    Raises: UnsupportedError, naming every reason, for a GPU that the kernels are not checked for.
    """
    if device.type != "cuda":
        return "sm_90"
    if found := device_reasons(device):
        raise UnsupportedError("; ".join(found) + ". Use LORA_BACKEND=reference there.")
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def is_even(matrix: Tensor) -> bool:
    """Whether Triton reads a matrix 128 bits at a time: it begins at 16 bytes, its strides are 1 or multiples of 16."""
    begins = matrix.storage_offset() * matrix.itemsize % 16 == 0  # storage itself is aligned
    return begins and all(stride == 1 or stride % 16 == 0 for stride in matrix.stride())


def tile_for(M: int, N: int, dtype: torch.dtype, arch: str, masked: bool = False) -> Tile:
    """The largest tile that still makes a program for each multiprocessor, else the smallest.

    Beside a dropout mask in registers, an accumulator of 128 x 256 leaves too few: it spills.
    """
    tiles = WIDE_TILES_FLOAT32 if dtype == torch.float32 else WIDE_TILES[arch]
    tiles = tuple(t for t in tiles if not (masked and t.BLOCK_M * t.BLOCK_N > 128 * 128))
    enough = (t for t in tiles if triton.cdiv(M, t.BLOCK_M) * triton.cdiv(N, t.BLOCK_N) >= PROGRAMS)
    return next(enough, tiles[-1])


def thin_tile_for(M: int, r: int, dtype: torch.dtype) -> tuple[Tile, int]:
    """The tile and the block of ranks of `skinny_gemm`: rows for about a program a multiprocessor, and a long K."""
    block_r = rank_block(r)
    rows = next((rows for rows in (64, 32) if M // rows >= 0.9 * PROGRAMS), 16)
    if dtype == torch.float32:
        return Tile(rows, block_r, 64 if block_r <= 32 else 32, 4, 3), block_r
    return Tile(rows, block_r, 128 if block_r <= 32 else 64, 8 if rows == 64 else 4, 4), block_r


def sum_tile_for(N: int, r: int, dtype: torch.dtype) -> tuple[Tile, int]:
    """The tile (BLOCK_M tokens at a time) and the block of ranks of the sums over tokens; narrow for narrow outputs."""
    width = 128 if N >= 2048 else 64
    if dtype == torch.float32:
        return Tile(32, 64, 0, 4, 3), rank_block(r)
    return Tile(64, width, 0, 8 if width == 128 else 4, 4 if r <= 32 else 3), rank_block(r)


def token_splits(tokens: int, N: int, r: int, dtype: torch.dtype, sums: int = 1) -> tuple[int, int]:
    """How many parts the tokens of a sum are split into, and the tokens of each: a function of the shape alone.

    Enough for two programs a multiprocessor, but each part at least 256 tokens and all parts, [N, r] float32 each,
    at most 1/32 of the bytes of the wide operand: they are written once and read once. With several `sums`, each over
    its share of the tokens, for the average share.
    """
    tile, block_r = sum_tile_for(N, r, dtype)
    wanted = 2 * PROGRAMS // (triton.cdiv(N, tile.BLOCK_N) * triton.cdiv(r, block_r) * sums)
    affordable = tokens * dtype.itemsize // (32 * 4 * r * sums)
    splits = max(1, min(wanted, affordable, tokens // (256 * sums)))
    span = triton.cdiv(triton.cdiv(tokens, splits), tile.BLOCK_M) * tile.BLOCK_M
    return triton.cdiv(tokens, span), span


@triton.jit
def tile_in_group(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """This program's tile (row of tiles, column of tiles): down GROUP_M rows of tiles, then on to the next column."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group, place = tl.program_id(0) // (GROUP_M * tiles_n), tl.program_id(0) % (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)  # the last group may have fewer rows
    return group * GROUP_M + place % height, place // height


@triton.jit(do_not_specialize=["key", "drop"])
def lora_gemm_kernel(
    x_ptr, w_ptr, u_ptr, b_ptr, bias_ptr, out_ptr, M, N, K, R,
    stride_xm, stride_wk, stride_wn, stride_um, stride_br, stride_bn, stride_om, scale, key: tl.int64, drop: tl.int32,
    DROPOUT: tl.constexpr, BY_WORD: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program computes one tile of out [M, N] = D(scale · u [M, R] b [R, N]) + x [M, K] w [K, N] + bias [N]."""
    tile_m, tile_n = tile_in_group(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m[:, None] < M, o_n[None, :] < N
    o_r = tl.arange(0, BLOCK_R)
    p_u = u_ptr + o_m[:, None] * stride_um + o_r[None, :]
    p_b = b_ptr + o_r[:, None].to(tl.int64) * stride_br + o_n[None, :].to(tl.int64) * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in tl.range(0, R, BLOCK_R, num_stages=1):  # nearly always once: buffers for a pipeline would be K's
        b_u = tl.load(p_u, mask=m_m & (o_r[None, :] < R - r), other=0.0)
        b_b = tl.load(p_b, mask=m_n & (o_r[:, None] < R - r), other=0.0)
        acc = matrix_product(b_u, b_b, acc, PRECISION, INTERPRET)
        p_u += BLOCK_R
        p_b += BLOCK_R * stride_br
    acc *= scale
    if DROPOUT:
        acc = tl.where(keep_tile(o_m, tile_n * BLOCK_N, N, key, drop, BY_WORD, BLOCK_N), acc, 0.0)
    o_k = tl.arange(0, BLOCK_K)
    p_x = x_ptr + o_m[:, None] * stride_xm + o_k[None, :]
    p_w = w_ptr + o_k[:, None].to(tl.int64) * stride_wk + o_n[None, :].to(tl.int64) * stride_wn
    for k in range(0, K, BLOCK_K):
        b_x = tl.load(p_x, mask=m_m if EVEN_K else m_m & (o_k[None, :] < K - k), other=0.0)
        b_w = tl.load(p_w, mask=m_n if EVEN_K else m_n & (o_k[:, None] < K - k), other=0.0)
        acc = matrix_product(b_x, b_w, acc, PRECISION, INTERPRET)
        p_x += BLOCK_K
        p_w += BLOCK_K * stride_wk
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    p_out = out_ptr + o_m[:, None] * stride_om + o_n[None, :]
    tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_m & m_n)


@triton.jit
def thin_product(
    x_ptr, a_ptr, o_m, m_m, o_r, m_r, K, stride_xm, stride_ar, stride_ak, key, drop,
    DROPOUT: tl.constexpr, BY_WORD: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Rows o_m of mask(x) aᵀ, [BLOCK_M, BLOCK_R] in float32: all of K, in steps."""
    o_k = tl.arange(0, BLOCK_K)
    p_x = x_ptr + o_m[:, None] * stride_xm + o_k[None, :]
    p_a = a_ptr + o_k[:, None].to(tl.int64) * stride_ak + o_r[None, :].to(tl.int64) * stride_ar
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        b_x = tl.load(p_x, mask=m_m if EVEN_K else m_m & (o_k[None, :] < K - k), other=0.0)
        b_a = tl.load(p_a, mask=m_r if EVEN_K else m_r & (o_k[:, None] < K - k), other=0.0)
        if DROPOUT:
            b_x = tl.where(keep_tile(o_m, k, K, key, drop, BY_WORD, BLOCK_K), b_x, 0.0)
        acc = matrix_product(b_x, b_a, acc, PRECISION, INTERPRET)
        p_x += BLOCK_K
        p_a += BLOCK_K * stride_ak
    return acc


@triton.jit(do_not_specialize=["key", "drop"])
def skinny_kernel(
    x_ptr, a_ptr, u_ptr, M, K, R, stride_xm, stride_ar, stride_ak, stride_um, scale, key: tl.int64, drop: tl.int32,
    DROPOUT: tl.constexpr, BY_WORD: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows of BLOCK_R columns of u [M, R] = scale · mask(x) [M, K] a [R, K]ᵀ.

    Programs beside each other have the same rows of x.
    """
    blocks_r = tl.cdiv(R, BLOCK_R)
    o_r = tl.program_id(0) % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_m = (tl.program_id(0) // blocks_r * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    m_m, m_r = o_m[:, None] < M, o_r[None, :] < R
    acc = thin_product(
        x_ptr, a_ptr, o_m, m_m, o_r, m_r, K, stride_xm, stride_ar, stride_ak, key, drop,
        DROPOUT, BY_WORD, EVEN_K, PRECISION, INTERPRET, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    p_u = u_ptr + o_m[:, None] * stride_um + o_r[None, :]
    tl.store(p_u, (scale * acc).to(u_ptr.dtype.element_ty), mask=m_m & m_r)


@triton.jit
def token_sum(
    wide_ptr, thin_ptr, order_ptr, start, stop, o_n, m_n, o_r, m_r, N, stride_wide, stride_thin, key, drop,
    DROPOUT: tl.constexpr, BY_WORD: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """mask(wide)ᵀ thin, [BLOCK_N, BLOCK_R] in float32, over the tokens from start to stop, or order[start:stop]."""
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for first in range(start, stop, BLOCK_M):
        o_place = first + tl.arange(0, BLOCK_M)
        m_m = o_place < stop
        if order_ptr is None:
            o_m = o_place.to(tl.int64)
        else:
            o_m = tl.load(order_ptr + o_place, mask=m_m, other=0).to(tl.int64)
        p_wide = wide_ptr + o_m[:, None] * stride_wide + o_n[None, :]
        p_thin = thin_ptr + o_m[:, None] * stride_thin + o_r[None, :]
        b_wide = tl.load(p_wide, mask=m_m[:, None] & m_n, other=0.0)
        b_thin = tl.load(p_thin, mask=m_m[:, None] & m_r, other=0.0)
        if DROPOUT:
            keep = keep_tile(o_m, tl.program_id(0) * BLOCK_N, N, key, drop, BY_WORD, BLOCK_N)
            b_wide = tl.where(keep, b_wide, 0.0)
        acc = matrix_product(tl.trans(b_wide), b_thin, acc, PRECISION, INTERPRET)
    return acc


@triton.jit(do_not_specialize=["key", "drop"])
def token_sum_kernel(
    wide_ptr, thin_ptr, part_ptr, M, N, R, stride_wide, stride_thin, stride_pn, stride_pr, stride_ps, span,
    scale, key: tl.int64, drop: tl.int32,
    DROPOUT: tl.constexpr, BY_WORD: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program computes a tile [BLOCK_N, BLOCK_R] of one part: scale · mask(wide)ᵀ thin over `span` tokens."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_n, m_r = o_n[None, :] < N, o_r[None, :] < R
    start = tl.program_id(2) * span
    acc = token_sum(
        wide_ptr, thin_ptr, None, start, tl.minimum(start + span, M), o_n, m_n, o_r, m_r, N, stride_wide, stride_thin,
        key, drop, DROPOUT, BY_WORD, PRECISION, INTERPRET, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    p_part = part_ptr + tl.program_id(2).to(tl.int64) * stride_ps
    p_part += o_n[:, None].to(tl.int64) * stride_pn + o_r[None, :].to(tl.int64) * stride_pr
    tl.store(p_part, (scale * acc).to(part_ptr.dtype.element_ty), mask=(o_n[:, None] < N) & m_r)


@triton.jit
def sum_parts_kernel(part_ptr, total_ptr, count, parts, BLOCK: tl.constexpr):
    """One program computes BLOCK elements of the sum of `parts` arrays of `count` elements, first to last."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    p_part = part_ptr + o_n
    for _ in range(parts):
        acc += tl.load(p_part, mask=o_n < count, other=0.0)
        p_part += count
    tl.store(total_ptr + o_n, acc.to(total_ptr.dtype.element_ty), mask=o_n < count)


SMALL = (("forward", 256), ("backward", 512), ("forward", 64), ("backward", 64))  # batches for the smaller tiles


def compile_specs(target: str = "sm_90") -> list[KernelSpec]:
    """What the launchers compile for Llama-3.1-8B with r = 16 on 8192 tokens, with `target`'s tiles."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    forms = [("forward", bf16), ("backward", bf16), ("forward bias", bf16), ("backward dropout", bf16)]
    specs = [_gemm_spec(dtype, target, form) for form, dtype in (*forms, ("forward", fp16), ("forward", fp32))]
    specs += [_gemm_spec(bf16, target, form, tokens) for form, tokens in SMALL]
    specs += [_gemm_spec(fp32, target, "backward", tokens) for tokens in (256, 64)]
    specs += [_skinny_spec(dtype, 8192, 16, p) for dtype, p in ((bf16, 0.0), (bf16, 0.1), (fp32, 0.0))]
    specs += [_skinny_spec(bf16, *size, 0.1) for size in ((8192, 32), (8192, 48), (512, 16))]
    specs += [_sum_spec(dtype, 4096, 16, p) for dtype, p in ((bf16, 0.0), (bf16, 0.1), (fp32, 0.0))]
    specs += [_sum_spec(bf16, 4096, r, 0.1) for r in (32, 48)]
    specs += [_sum_spec(bf16, 1024, 16, None), _sum_spec(bf16, 4096, 64, 0.0)]
    return [*specs, _parts_spec(fp32), _parts_spec(bf16)]


def _meta(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


def _gemm_spec(dtype: torch.dtype, target: str, form: str, tokens: int = 8192) -> KernelSpec:
    """x [tokens, 4096] to 14336 features (forward), or back."""
    M, N, K, R = (tokens, 14336, 4096, 16) if "forward" in form else (tokens, 4096, 14336, 16)
    tile = tile_for(M, N, dtype, target, "dropout" in form)
    x, w, u, b, bias = _meta(dtype, (M, K), (K, N), (M, R), (R, N), (N,))
    if "forward" in form:
        weight, factor = torch.empty_like(w.T, memory_format=torch.contiguous_format), b.T.contiguous()
        call = lambda: lora_gemm(x, weight, u, factor, bias if "bias" in form else None, 2.0, tile=tile)  # noqa: E731
    else:
        dropout = Dropout(0.1, 0) if "dropout" in form else None
        call = lambda: lora_gemm_dx(x, w, u, b, dropout, tile=tile)  # noqa: E731
    return spec_of(
        f"lora_gemm {form} {_short(dtype)}, {M} tokens, tile {tile.BLOCK_M}x{tile.BLOCK_N}", call, lora_gemm_kernel,
        shape=f"{M} tokens, {K} -> {N}, r {R}", flops=2 * M * N * (K + R),
        bytes_minimum=dtype.itemsize * (M * K + K * N + M * N + R * (M + N) + N * ("bias" in form)),
    )  # fmt: skip


def _skinny_spec(dtype: torch.dtype, tokens: int, r: int, p: float) -> KernelSpec:
    x, A = _meta(dtype, (tokens, 4096), (r, 4096))
    return spec_of(
        f"skinny_gemm {_short(dtype)}, {tokens} tokens, r {r}{' dropout' * (p > 0)}",
        lambda: skinny_gemm(x, A, Dropout(p, 0)), skinny_kernel, shape=f"{tokens} tokens, 4096 -> r {r}",
        bytes_minimum=dtype.itemsize * (x.numel() + A.numel() + tokens * r),
        flops=2 * tokens * 4096 * r,
    )  # fmt: skip


def _sum_spec(dtype: torch.dtype, N: int, r: int, p: float | None) -> KernelSpec:
    """dA with dropout p, or dB where p is None; the partial sums are written, and read by `sum_parts`."""
    tokens = 8192
    wide, thin = _meta(dtype, (tokens, N), (tokens, r))
    splits = token_splits(tokens, N, r, dtype)[0]
    call = (lambda: lora_B_gradient(wide, thin)) if p is None else (lambda: lora_A_gradient(thin, wide, Dropout(p, 0)))
    return spec_of(
        f"lora_{'B' if p is None else 'A'}_gradient {_short(dtype)}, {N}, r {r}{' dropout' if p else ''}",
        call, token_sum_kernel, sum_parts_kernel, shape=f"{tokens} tokens, {N} x r {r}, {splits} parts",
        bytes_minimum=dtype.itemsize * (wide.numel() + thin.numel()) + 4 * N * r, flops=2 * tokens * N * r,
    )  # fmt: skip


def _parts_spec(dtype: torch.dtype) -> KernelSpec:
    parts = torch.empty(8, 16, 4096, device="meta")
    return spec_of(
        f"sum_parts {_short(dtype)}", lambda: sum_parts(parts, dtype), sum_parts_kernel, shape="8 parts of 16 x 4096",
        bytes_minimum=4 * parts.numel() + dtype.itemsize * parts[0].numel(),
    )  # fmt: skip


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
