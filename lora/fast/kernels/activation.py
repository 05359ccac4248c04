"""The gated activations h = act(g) ⊙ z of an MLP, forward and backward, each in one pass.

The formulas are those of `lora.reference.mlp`. GELU's tanh form is computed through the logistic function, because
(1 + tanh v) / 2 = σ(2v), which loses nothing where tanh v is near -1:

    gelu_tanh(g) = g σ(2v)        gelu_tanh'(g) = σ(2v) + g σ(2v) (1 - σ(2v)) 2v'

Everything between the loads and the stores is float32 (float64 for float64), and a result is rounded once.

Moved: forward two numbers read and one written an element, backward three read and two written (three with h). There
is no reuse, so a tile is only as large as it takes for each of 128 threads to issue 128-bit loads of every operand;
its rows are part of a row of the matrix, or several rows where they are short.

An adapter's update may be added on the way in: g + s u Bᵀ (z, dh alike) instead of g, made of tiles of u and B by a
matrix instruction where g is read. So g and z leave the frozen product as they are, and the pass over memory that
would add the updates to them, as wide as the hidden layer, is saved. Its tiles are taller, to use a tile of B for more
than one row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora.errors import LoRAError
from lora.fast.kernels.common import as_rows, matrix_product, output_rows, precision_of, rank_block, wide_type
from lora.fast.kernels.compile_check import KernelSpec, spec_of
from lora.fast.parts import MAX_RANK, LowRank
from lora.fast.runtime import interpreting
from lora.reference.mlp import check_activation

TILE = 1024  # elements a program: 8 a thread, one 128-bit load of a 16-bit operand
NUM_WARPS = 4
UPDATED_TILE = {"BLOCK_M": 16, "BLOCK_N": 128}  # where one is


def gated_forward(
    g: Tensor,
    z: Tensor,
    activation: str,
    out: Tensor | None = None,
    plus_g: LowRank | None = None,
    plus_z: LowRank | None = None,
) -> Tensor:
    """h = act(g) ⊙ z, where g and z are taken plus a low-rank term each, if there is one.

    Args:
        g, z: [..., hidden], of one shape; rows may be strided (two halves of one buffer, say).
        activation: "silu", "gelu" or "gelu_tanh".
        out: [..., hidden], where to write h; rows may be strided. It may be g or z itself.
        plus_g, plus_z: u [tokens, r], r at most MAX_RANK, features side by side, and factor [hidden, r], any strides.

    Returns: `out`, or a new tensor in the wider dtype of g and z.
    Raises: LoRAError for another activation, or an `out` that cannot be written in place.
    """
    check_activation(activation)
    h = torch.empty(g.shape, dtype=torch.promote_types(g.dtype, z.dtype), device=g.device) if out is None else out
    if not h.numel():
        return h
    g_rows, z_rows, h_rows = as_rows(g), as_rows(z), output_rows(h, g.shape, "out")
    M, N = g_rows.shape
    terms = (plus_g, plus_z)
    tile, whole = UPDATED_TILE if any(terms) else tile_of(N), all(map(fits, terms))
    with torch.cuda.device(g.get_device()):
        gated_forward_kernel[tiles(M, N, tile)](
            g_rows, z_rows, h_rows, *of_term(plus_g), *of_term(plus_z), M, N,
            g_rows.stride(0), z_rows.stride(0), h_rows.stride(0),
            ACTIVATION=activation, WIDE=wide_type(g, z), RANK_G=block_rank(plus_g, whole),
            RANK_Z=block_rank(plus_z, whole), WHOLE=whole, PRECISION=precision_of(g.dtype), INTERPRET=interpreting(),
            **tile, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return h


def gated_backward(
    dh: Tensor,
    g: Tensor,
    z: Tensor,
    activation: str,
    *,
    dg: Tensor | None = None,
    dz: Tensor | None = None,
    h: Tensor | None = None,
    with_h: bool = False,
    plus_dh: LowRank | None = None,
    plus_g: LowRank | None = None,
    plus_z: LowRank | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dg = dh ⊙ z ⊙ act'(g), dz = dh ⊙ act(g), and h = act(g) ⊙ z again where it is wanted, from one read of each.

    dh, g and z are taken plus a low-rank term each, if there is one, as in `gated_forward`.

    Args:
        dh, g, z: [..., hidden], of one shape; rows may be strided.
        activation: as it was given to `gated_forward`.
        dg, dz, h: where to write the results; rows may be strided. Each may be dh, g or z itself: a program reads all
            of its elements before it writes any. Buffers that overlap in any other way give nonsense.
        with_h: whether to compute h without a buffer for it.
        plus_dh, plus_g, plus_z: as in `gated_forward`.

    Returns: (dg, dz, h); new tensors where no buffer was given, h None where it was not wanted.
    Raises: LoRAError as `gated_forward` does.
    """
    check_activation(activation)
    dg = torch.empty(g.shape, dtype=g.dtype, device=g.device) if dg is None else dg
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device) if dz is None else dz
    if h is None and with_h:
        h = torch.empty(g.shape, dtype=torch.promote_types(g.dtype, z.dtype), device=g.device)
    if not dg.numel():
        return dg, dz, h
    dh_rows, g_rows, z_rows = as_rows(dh), as_rows(g), as_rows(z)
    dg_rows, dz_rows = output_rows(dg, g.shape, "dg"), output_rows(dz, g.shape, "dz")
    h_rows = None if h is None else output_rows(h, g.shape, "h")
    M, N = g_rows.shape
    terms = (plus_dh, plus_g, plus_z)
    tile, whole = UPDATED_TILE if any(terms) else tile_of(N), all(map(fits, terms))
    with torch.cuda.device(g.get_device()):
        gated_backward_kernel[tiles(M, N, tile)](
            dh_rows, g_rows, z_rows, dg_rows, dz_rows, h_rows,
            *of_term(plus_dh), *of_term(plus_g), *of_term(plus_z), M, N,
            dh_rows.stride(0), g_rows.stride(0), z_rows.stride(0), dg_rows.stride(0), dz_rows.stride(0),
            0 if h_rows is None else h_rows.stride(0),
            ACTIVATION=activation, WIDE=wide_type(dh, g, z), RANK_DH=block_rank(plus_dh, whole),
            RANK_G=block_rank(plus_g, whole), RANK_Z=block_rank(plus_z, whole), WHOLE=whole,
            PRECISION=precision_of(g.dtype), INTERPRET=interpreting(), **tile, num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return dg, dz, h


@triton.jit
def gated_forward_kernel(
    g_ptr, z_ptr, h_ptr,
    g_u, g_factor, g_scale, g_r, g_stride_u, g_stride_n, g_stride_r,
    z_u, z_factor, z_scale, z_r, z_stride_u, z_stride_n, z_stride_r,
    M, N, stride_g, stride_z, stride_h, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    RANK_G: tl.constexpr, RANK_Z: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes one tile of h [M, N]."""
    o_m, o_n = tile_offsets(N, BLOCK_M, BLOCK_N)
    m_mn = (o_m < M) & (o_n < N)
    b_g = tl.load(g_ptr + o_m * stride_g + o_n, mask=m_mn, other=0.0).to(WIDE)
    b_z = tl.load(z_ptr + o_m * stride_z + o_n, mask=m_mn, other=0.0).to(WIDE)
    if RANK_G:
        b_g = plus_low_rank(b_g, g_u, g_factor, g_scale, g_r, g_stride_u, g_stride_n, g_stride_r, o_m, o_n, M, N,
                            RANK_G, WHOLE, PRECISION, INTERPRET)  # fmt: skip
    if RANK_Z:
        b_z = plus_low_rank(b_z, z_u, z_factor, z_scale, z_r, z_stride_u, z_stride_n, z_stride_r, o_m, o_n, M, N,
                            RANK_Z, WHOLE, PRECISION, INTERPRET)  # fmt: skip
    b_a, _ = activation_and_slope(b_g, ACTIVATION)
    tl.store(h_ptr + o_m * stride_h + o_n, (b_a * b_z).to(h_ptr.dtype.element_ty), mask=m_mn)


@triton.jit
def gated_backward_kernel(
    dh_ptr, g_ptr, z_ptr, dg_ptr, dz_ptr, h_ptr,
    dh_u, dh_factor, dh_scale, dh_r, dh_stride_u, dh_stride_n, dh_stride_r,
    g_u, g_factor, g_scale, g_r, g_stride_u, g_stride_n, g_stride_r,
    z_u, z_factor, z_scale, z_r, z_stride_u, z_stride_n, z_stride_r,
    M, N, stride_dh, stride_g, stride_z, stride_dg, stride_dz, stride_h, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    RANK_DH: tl.constexpr, RANK_G: tl.constexpr, RANK_Z: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes one tile of dg and dz [M, N], and of h unless its pointer is None."""
    o_m, o_n = tile_offsets(N, BLOCK_M, BLOCK_N)
    m_mn = (o_m < M) & (o_n < N)
    b_dh = tl.load(dh_ptr + o_m * stride_dh + o_n, mask=m_mn, other=0.0).to(WIDE)
    b_g = tl.load(g_ptr + o_m * stride_g + o_n, mask=m_mn, other=0.0).to(WIDE)
    b_z = tl.load(z_ptr + o_m * stride_z + o_n, mask=m_mn, other=0.0).to(WIDE)
    if RANK_DH:
        b_dh = plus_low_rank(b_dh, dh_u, dh_factor, dh_scale, dh_r, dh_stride_u, dh_stride_n, dh_stride_r, o_m, o_n,
                             M, N, RANK_DH, WHOLE, PRECISION, INTERPRET)  # fmt: skip
    if RANK_G:
        b_g = plus_low_rank(b_g, g_u, g_factor, g_scale, g_r, g_stride_u, g_stride_n, g_stride_r, o_m, o_n, M, N,
                            RANK_G, WHOLE, PRECISION, INTERPRET)  # fmt: skip
    if RANK_Z:
        b_z = plus_low_rank(b_z, z_u, z_factor, z_scale, z_r, z_stride_u, z_stride_n, z_stride_r, o_m, o_n, M, N,
                            RANK_Z, WHOLE, PRECISION, INTERPRET)  # fmt: skip
    b_a, b_slope = activation_and_slope(b_g, ACTIVATION)
    tl.store(dg_ptr + o_m * stride_dg + o_n, (b_dh * b_z * b_slope).to(dg_ptr.dtype.element_ty), mask=m_mn)
    tl.store(dz_ptr + o_m * stride_dz + o_n, (b_dh * b_a).to(dz_ptr.dtype.element_ty), mask=m_mn)
    if h_ptr is not None:
        tl.store(h_ptr + o_m * stride_h + o_n, (b_a * b_z).to(h_ptr.dtype.element_ty), mask=m_mn)


@triton.jit
def plus_low_rank(
    b_x, u_ptr, factor_ptr, scale, R, stride_u, stride_n, stride_r, o_m, o_n, M, N,
    RANK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """x + scale · u factorᵀ for one tile: u [M, R] with neighbours side by side, factor [N, R].

    RANK at a time; WHOLE says that those are all R, and that no loop is made.
    """
    o_r = tl.arange(0, RANK)
    p_u = u_ptr + o_m * stride_u + o_r[None, :]
    p_factor = factor_ptr + o_n.to(tl.int64) * stride_n + o_r[:, None].to(tl.int64) * stride_r  # [RANK, BLOCK_N]
    b_update = tl.zeros((b_x.shape[0], b_x.shape[1]), tl.float32)
    if WHOLE:
        b_u = tl.load(p_u, mask=(o_m < M) & (o_r[None, :] < R), other=0.0)
        b_factor = tl.load(p_factor, mask=(o_n < N) & (o_r[:, None] < R), other=0.0)
        b_update = matrix_product(b_u, b_factor, b_update, PRECISION, INTERPRET)
    else:
        for r in tl.range(0, R, RANK, num_stages=1):
            b_u = tl.load(p_u, mask=(o_m < M) & (o_r[None, :] < R - r), other=0.0)
            b_factor = tl.load(p_factor, mask=(o_n < N) & (o_r[:, None] < R - r), other=0.0)
            b_update = matrix_product(b_u, b_factor, b_update, PRECISION, INTERPRET)
            p_u += RANK
            p_factor += RANK * stride_r
    return b_x + scale * b_update


@triton.jit
def tile_offsets(N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows [BLOCK_M, 1], in 64 bits, and columns [1, BLOCK_N] of this program's tile of a matrix with N columns."""
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    o_m = (pid // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return o_m, o_n


@triton.jit
def activation_and_slope(b_g, ACTIVATION: tl.constexpr):
    """act(g) and act'(g), elementwise; what the caller does not use, the compiler does not compute."""
    if ACTIVATION == "silu":
        b_sigma = logistic(b_g)
        b_a = b_g * b_sigma
        b_slope = b_sigma * (1 + b_g * (1 - b_sigma))
    elif ACTIVATION == "gelu":
        b_phi = 0.5 * (1 + tl.erf(b_g * 0.7071067811865476))  # Φ(g): erf(g / √2)
        b_a = b_g * b_phi
        b_slope = b_phi + b_g * tl.exp(-0.5 * b_g * b_g) * 0.3989422804014327  # 1 / √(2π)
    else:
        b_square = b_g * b_g
        b_sigma = logistic(1.5957691216057308 * b_g * (1 + 0.044715 * b_square))  # σ(2v); 2 √(2/π)
        b_a = b_g * b_sigma
        b_slope = b_sigma + b_a * (1 - b_sigma) * 1.5957691216057308 * (1 + 0.134145 * b_square)  # 3 · 0.044715
    return b_a, b_slope


@triton.jit
def logistic(b_x):
    """σ(x) = 1 / (1 + e⁻ˣ); e⁻ˣ may overflow, and σ is then 0, as it should be."""
    return 1 / (1 + tl.exp(-b_x))


def tile_of(N: int) -> dict[str, int]:
    """TILE elements: of one row, or of several where a row (padded to a power of two) is shorter."""
    block = min(triton.next_power_of_2(N), TILE)
    return {"BLOCK_M": TILE // block, "BLOCK_N": block}


def of_term(term: LowRank | None) -> tuple[Tensor | None, Tensor | None, float, int, int, int, int]:
    """What a kernel is given of a low-rank term, or of none."""
    if term is None:
        return None, None, 0.0, 0, 0, 0, 0
    u = term.u if term.u.stride(1) == 1 or term.u.shape[1] == 1 else term.u.contiguous()
    stride_n, stride_r = term.factor.stride()
    return u, term.factor, float(term.scale), u.shape[1], u.stride(0), stride_n, stride_r


def fits(term: LowRank | None) -> bool:
    """Whether tiles of all of a term's ranks fit into registers: up to 16, or more that are read 128 bits at a time.

    float32, which each thread multiplies itself, and other ranks would spill.
    """
    return term is None or term.u.shape[1] <= 16 or (term.u.dtype != torch.float32 and term.u.shape[1] % 16 == 0)


def block_rank(term: LowRank | None, whole: bool) -> int:
    """How many ranks `plus_low_rank` takes at a time, at least the 16 of a matrix instruction; 0 without a term."""
    if term is None:
        return 0
    if term.u.shape[1] > MAX_RANK:
        raise LoRAError(f"a term of rank {term.u.shape[1]} is to be added on the way in, expected at most {MAX_RANK}.")
    return rank_block(term.u.shape[1]) if whole else 16


def tiles(M: int, N: int, tile: Mapping[str, int]) -> tuple[int]:
    """The grid: one program a tile."""
    return (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]),)


def compile_specs() -> list[KernelSpec]:
    """Llama-3.1-8B's MLP: 8192 tokens, 14336 hidden features, with terms on the way in and without.

    Terms come as `lora.fast.mlp` gives them: to g and z for adapters on gate and up, to dh for one on down (not with
    dropout); down without an adapter needs no h again.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    kinds = [("silu", bf16), ("silu", fp16), ("silu", fp32), ("gelu", bf16), ("gelu_tanh", bf16)]
    specs = [_spec(activation, dtype, backward) for activation, dtype in kinds for backward in (False, True)]
    largest = [("silu", fp32, 16), ("silu", fp32, MAX_RANK), ("gelu", bf16, MAX_RANK), ("gelu_tanh", bf16, MAX_RANK)]
    for activation, dtype, rank in (("silu", bf16, 16), ("silu", bf16, MAX_RANK), ("silu", fp16, MAX_RANK), *largest):
        specs += [_spec(activation, dtype, backward, rank) for backward in (False, True)]
    for rank in (8, 32, 40):  # with a mask; two blocks of a matrix instruction; three, in a loop
        specs += [_spec("silu", bf16, backward, rank) for backward in (False, True)]
    specs += [_spec("silu", bf16, True, 16, terms) for terms in ("g and z", "dh", "g and z, no h")]
    return [*specs, _spec("silu", bf16, True, 0, "nothing, no h")]


def _spec(activation: str, dtype: torch.dtype, backward: bool, rank: int = 0, terms: str = "all") -> KernelSpec:
    tokens, hidden = 8192, 14336

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    dh, h = None if not backward else empty(tokens, hidden), None if "no h" in terms else empty(tokens, hidden)
    (g, z), (dg, dz) = (empty(tokens, 2 * hidden).chunk(2, dim=1) for _ in range(2))  # gate and up lie side by side
    of_g = of_z = of_dh = None
    if rank and terms != "dh":
        of_g, of_z = (LowRank(u, empty(hidden, rank), 1.0) for u in empty(tokens, 2 * rank).chunk(2, dim=1))
    if rank and terms in ("all", "dh"):
        of_dh = LowRank(empty(tokens, rank), empty(rank, hidden).T, 1.0)  # down's A

    def launch() -> object:
        if dh is not None:
            return gated_backward(dh, g, z, activation, dg=dg, dz=dz, h=h, plus_dh=of_dh, plus_g=of_g, plus_z=of_z)
        return gated_forward(g, z, activation, out=h, plus_g=of_g, plus_z=of_z)

    wide = (dh, g, z, dg, dz, h) if backward else (g, z, h)
    present = [term for term in ((of_dh, of_g, of_z) if backward else (of_g, of_z)) if term is not None]
    numbers = sum(x.numel() for x in (*wide, *(x for u, factor, _ in present for x in (u, factor))) if x is not None)
    kind = f"gated_{'backward' if backward else 'forward'} {activation} {str(dtype).removeprefix('torch.')}"
    return spec_of(
        kind + f", plus r {rank}" * (rank > 0) + f" to {terms}" * (terms != "all"),
        launch,
        gated_backward_kernel if backward else gated_forward_kernel,
        bytes_minimum=numbers * dtype.itemsize,
        shape=f"tokens {tokens}, hidden {hidden}",
    )
