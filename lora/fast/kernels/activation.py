"""The gated activations h = act(g) ⊙ z of an MLP, forward and backward, each in one pass.

The formulas are those of `lora.reference.mlp`. GELU's tanh form is computed through the logistic function, because
(1 + tanh v) / 2 = σ(2v), which loses nothing where tanh v is near -1:

    gelu_tanh(g) = g σ(2v)        gelu_tanh'(g) = σ(2v) + g σ(2v) (1 - σ(2v)) 2v'

Everything between the loads and the stores is float32 (float64 for float64), and a result is rounded once.

Moved: forward two numbers read and one written an element, backward three read and two written (three with h). There
is no reuse, so a tile is only as large as it takes for each of 128 threads to issue 128-bit loads of every operand;
its rows are part of a row of the matrix, or several rows where they are short.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora.errors import LoRAError
from lora.fast.kernels.compile_check import POINTER, KernelSpec
from lora.reference.mlp import check_activation

TILE = 1024  # elements a program: 8 a thread, one 128-bit load of a 16-bit operand
NUM_WARPS = 4


def gated_forward(g: Tensor, z: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """h = act(g) ⊙ z.

    Args:
        g, z: [..., hidden], of one shape; rows may be strided (two halves of one buffer, say).
        activation: "silu", "gelu" or "gelu_tanh".
        out: [..., hidden], where to write h; rows may be strided. It may be g or z itself.

    Returns: `out`, or a new tensor in the wider dtype of g and z.
    Raises: LoRAError for another activation, or an `out` that cannot be written in place.
    """
    check_activation(activation)
    h = torch.empty(g.shape, dtype=torch.promote_types(g.dtype, z.dtype), device=g.device) if out is None else out
    if not h.numel():
        return h
    g_rows, z_rows, h_rows = as_rows(g), as_rows(z), output_rows(h, g.shape, "out")
    M, N = g_rows.shape
    tile = tile_of(N)
    with torch.cuda.device(g.get_device()):
        gated_forward_kernel[tiles(M, N, tile)](
            g_rows, z_rows, h_rows, M, N, g_rows.stride(0), z_rows.stride(0), h_rows.stride(0),
            ACTIVATION=activation, WIDE=wide_type(g, z), **tile, num_warps=NUM_WARPS, enable_fp_fusion=True,
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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dg = dh ⊙ z ⊙ act'(g), dz = dh ⊙ act(g), and h = act(g) ⊙ z again where it is wanted, from one read of each.

    Args:
        dh, g, z: [..., hidden], of one shape; rows may be strided.
        activation: as it was given to `gated_forward`.
        dg, dz, h: where to write the results; rows may be strided. Each may be dh, g or z itself: a program reads all
            of its elements before it writes any. Buffers that overlap in any other way give nonsense.
        with_h: whether to compute h without a buffer for it.

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
    tile = tile_of(N)
    with torch.cuda.device(g.get_device()):
        gated_backward_kernel[tiles(M, N, tile)](
            dh_rows, g_rows, z_rows, dg_rows, dz_rows, h_rows, M, N,
            dh_rows.stride(0), g_rows.stride(0), z_rows.stride(0), dg_rows.stride(0), dz_rows.stride(0),
            0 if h_rows is None else h_rows.stride(0),
            ACTIVATION=activation, WIDE=wide_type(dh, g, z), **tile, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return dg, dz, h


@triton.jit
def gated_forward_kernel(
    g_ptr, z_ptr, h_ptr, M, N, stride_g, stride_z, stride_h,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes one tile of h [M, N]."""
    o_m, o_n = tile_offsets(N, BLOCK_M, BLOCK_N)
    m_mn = (o_m < M) & (o_n < N)
    b_g = tl.load(g_ptr + o_m * stride_g + o_n, mask=m_mn, other=0.0).to(WIDE)
    b_z = tl.load(z_ptr + o_m * stride_z + o_n, mask=m_mn, other=0.0).to(WIDE)
    b_a, _ = activation_and_slope(b_g, ACTIVATION)
    tl.store(h_ptr + o_m * stride_h + o_n, (b_a * b_z).to(h_ptr.dtype.element_ty), mask=m_mn)


@triton.jit
def gated_backward_kernel(
    dh_ptr, g_ptr, z_ptr, dg_ptr, dz_ptr, h_ptr, M, N,
    stride_dh, stride_g, stride_z, stride_dg, stride_dz, stride_h,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes one tile of dg and dz [M, N], and of h unless its pointer is None."""
    o_m, o_n = tile_offsets(N, BLOCK_M, BLOCK_N)
    m_mn = (o_m < M) & (o_n < N)
    b_dh = tl.load(dh_ptr + o_m * stride_dh + o_n, mask=m_mn, other=0.0).to(WIDE)
    b_g = tl.load(g_ptr + o_m * stride_g + o_n, mask=m_mn, other=0.0).to(WIDE)
    b_z = tl.load(z_ptr + o_m * stride_z + o_n, mask=m_mn, other=0.0).to(WIDE)
    b_a, b_slope = activation_and_slope(b_g, ACTIVATION)
    tl.store(dg_ptr + o_m * stride_dg + o_n, (b_dh * b_z * b_slope).to(dg_ptr.dtype.element_ty), mask=m_mn)
    tl.store(dz_ptr + o_m * stride_dz + o_n, (b_dh * b_a).to(dz_ptr.dtype.element_ty), mask=m_mn)
    if h_ptr is not None:
        tl.store(h_ptr + o_m * stride_h + o_n, (b_a * b_z).to(h_ptr.dtype.element_ty), mask=m_mn)


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


def tiles(M: int, N: int, tile: Mapping[str, int]) -> tuple[int]:
    """The grid: one program a tile."""
    return (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]),)


def wide_type(*tensors: Tensor) -> Any:
    """Triton's type for the arithmetic: float64 where any tensor is, otherwise float32."""
    return tl.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else tl.float32


def as_rows(x: Tensor) -> Tensor:
    """[..., features] as [tokens, features] with neighbouring features side by side; copied only if it must be."""
    rows = x.reshape(-1, x.shape[-1])
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


def compile_specs() -> list[KernelSpec]:
    """The configurations of Llama-3.1-8B's MLP: 8192 tokens, 14336 hidden features, g and z halves of one buffer."""
    specs = []
    choices = [("silu", torch.bfloat16), ("silu", torch.float16), ("silu", torch.float32),
               ("gelu", torch.bfloat16), ("gelu_tanh", torch.bfloat16)]  # fmt: skip
    for activation, dtype in choices:
        for kernel, reads, writes in (
            (gated_forward_kernel, ("g", "z"), ("h",)),
            (gated_backward_kernel, ("dh", "g", "z"), ("dg", "dz", "h")),
        ):
            specs.append(_spec(kernel, reads + writes, activation, dtype))
    return specs


def _spec(kernel: Any, operands: tuple[str, ...], activation: str, dtype: torch.dtype) -> KernelSpec:
    tokens, hidden = 8192, 14336
    signature = {f"{name}_ptr": POINTER[dtype] for name in operands}
    signature |= {"M": "i32", "N": "i32"} | {f"stride_{name}": "i32" for name in operands}
    moved = len(operands) * tokens * hidden * dtype.itemsize
    return KernelSpec(
        name=f"{kernel.fn.__name__.removesuffix('_kernel')} {activation} {str(dtype).removeprefix('torch.')}",
        fn=kernel,
        signature=signature,
        constexprs={"ACTIVATION": activation, "WIDE": tl.float32, **tile_of(hidden)},
        num_warps=NUM_WARPS,
        divisible=tuple(name for name in signature),
        bytes_moved=moved,
        bytes_minimum=moved,
        shape=f"tokens {tokens}, hidden {hidden}",
    )
