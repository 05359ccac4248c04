"""RMSNorm and LayerNorm, forward and backward, with the residual sum before them and the weight's gradient.

    s = x + residual        ρ = 1 / √(mean((s - μ)²) + ε)        x̂ = ρ (s - μ)        y = (offset + w) ⊙ x̂ + b
    e = (offset + w) ⊙ dy   dx = ρ (e - mean(e) - x̂ mean(e ⊙ x̂)) + dsum
    dw = Σ_rows dy ⊙ x̂      db = Σ_rows dy

RMSNorm has no μ, mean(e) or b; LayerNorm (CENTRED) no offset. `lora.reference.norm` derives both.
Statistics and arithmetic are float32 (float64 for float64), and roundings fall where the reference's do: s before it is
normalised, x̂ before it is multiplied where `round_before_weight` says so.

Two ways of walking through a row:

- in registers, up to MAX_FEATURES (half as far in a LayerNorm's backward with dsum, dw and db): each operand is read
  once and each result written once. An element moves forward one number in and one out (two and two with a residual),
  backward two in and one out (three and one with dsum).
- looped, beyond: one pass for each statistic and one for the result; what was read before comes from the cache.

A tile is one row, or several where rows are short (a head's q_norm), with 16 elements a thread. The weight's gradient
is a sum over rows without atomics: a program walks over many tiles and keeps their sum in registers, writes it as its
row of a buffer of partial sums, and a second kernel adds these rows. Where rows are looped the sum has a kernel of its
own, which walks down a block of columns.

Rows are counted [outer, inner] with a stride each, so that heads that are slices of a fused q/k/v buffer,
[batch, seq, heads, head_dim], are normalised where they lie.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lora.fast.kernels.common import output_rows, wide_type
from lora.fast.kernels.compile_check import KernelSpec, spec_of
from lora.fast.kernels.norm_kernels import (
    norm_backward_kernel,
    norm_backward_looped_kernel,
    norm_forward_kernel,
    norm_forward_looped_kernel,
    norm_weight_gradient_kernel,
    sum_partial_kernel,
)

MAX_FEATURES = 8192  # of a row in registers: 16 warps with 16 elements a thread; twice as many spill in the backward
LOOP_BLOCK = 4096  # of a longer row at a time: 8 warps
TILE = 2048  # elements of a tile of short rows: 4 warps
COLUMNS = 128  # of the weight's gradient a program: 256 bytes of each row
WARPS_AT_ONCE = 16  # a multiprocessor: what the backward's 100 to 128 registers a thread leave room for
H100 = 132  # multiprocessors, for `compile_specs`


def rms_norm_forward(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float,
    round_before_weight: bool,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = (offset + w) ⊙ s / √(mean(s²) + ε) with s = x + residual; roundings as in `lora.reference.norm.rms_norm`.

    Args:
        x, residual: [..., features]; rows may be strided.
        weight: [features].
        out: [..., features], where to write y; rows may be strided. It may be the residual itself, or x: without a
            residual s is then lost.

    Returns: y in x's dtype; s in x's dtype (x itself without a residual); ρ, float32 [rows] (float64 for float64).
    Raises: LoRAError for an `out` that cannot be written in place.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    s = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _, rstd = _forward(x, residual, weight, None, y, s, _Norm(False, float(offset), round_before_weight, float(eps)))
    return y, x if s is None else s, rstd


def rms_norm_backward(
    dy: Tensor,
    s: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    offset: float,
    dsum: Tensor | None = None,
    need_dx: bool = True,
    need_dweight: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = ρ (e - x̂ mean(e ⊙ x̂)) + dsum, with e = (offset + w) ⊙ dy, and dw = Σ_rows dy ⊙ x̂.

    Args:
        dy: [..., features], the gradient with respect to y; rows may be strided, as those of s and dsum.
        s, rstd: as `rms_norm_forward` returned them.
        dsum: [..., features], the gradient with respect to s, added to dx.
        out: [..., features], where to write dx; rows may be strided. It may be dy, s or dsum itself.

    Returns: dx in s's dtype and dw in the weight's, None where they are not needed.
    """
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device) if out is None and need_dx else out
    dweight, _ = _backward(dy, s, weight, None, None, rstd, dsum, dx, need_dweight, _Norm(False, float(offset)))
    return dx, dweight


def layer_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = w ⊙ (s - μ) / √(var(s) + ε) + b with s = x + residual; y is rounded once, and so is s.

    Args:
        x, residual: [..., features]; rows may be strided.
        weight, bias: [features]; the bias may be absent.
        out: [..., features], where to write y; rows may be strided. It may be the residual itself, or x: without a
            residual s is then lost.

    Returns: y in x's dtype; s in x's dtype (x itself without a residual); μ and ρ, float32 [rows] (float64 for
        float64).
    Raises: LoRAError for an `out` that cannot be written in place.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    s = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = _forward(x, residual, weight, bias, y, s, _Norm(True, eps=float(eps)))
    assert mean is not None  # centred
    return y, x if s is None else s, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    s: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    bias: Tensor | None = None,
    dsum: Tensor | None = None,
    need_dx: bool = True,
    need_dweight: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx = ρ (e - mean(e) - x̂ mean(e ⊙ x̂)) + dsum, with e = w ⊙ dy; dw = Σ_rows dy ⊙ x̂; db = Σ_rows dy.

    Args:
        dy: [..., features], the gradient with respect to y; rows may be strided, as those of s and dsum.
        s, mean, rstd: as `layer_norm_forward` returned them.
        bias: [features], given where its gradient is wanted.
        dsum: [..., features], the gradient with respect to s, added to dx.
        out: [..., features], where to write dx; rows may be strided. It may be dy, s or dsum itself.

    Returns: dx in s's dtype, dw in the weight's, db in the bias's, None where they are not needed.
    """
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device) if out is None and need_dx else out
    dweight, dbias = _backward(dy, s, weight, bias, mean, rstd, dsum, dx, need_dweight, _Norm(True))
    return dx, dweight, dbias


class _Norm(NamedTuple):
    """Which norm: what the kernels are compiled for."""

    centred: bool
    offset: float = 0.0
    round_before_weight: bool = False
    eps: float = 0.0


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, y: Tensor, s: Tensor | None, norm: _Norm
) -> tuple[Tensor | None, Tensor]:
    """Fills y and s; returns μ (None unless centred) and ρ."""
    features = x.shape[-1]
    M = x.numel() // max(features, 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    rstd = torch.empty(M, dtype=wide, device=x.device)
    mean = torch.empty(M, dtype=wide, device=x.device) if norm.centred else None
    if not x.numel():
        return mean, rstd
    inner = inner_rows(x, residual, y)
    rows, y_rows = grouped(x, inner), output_rows(y, x.shape, "out", inner)
    residual_rows = None if residual is None else grouped(residual, inner)
    block, num_warps = block_of(features)
    kernel = norm_forward_kernel if features <= MAX_FEATURES else norm_forward_looped_kernel
    with torch.cuda.device(x.get_device()):
        kernel[(triton.cdiv(M, block["BLOCK_M"]),)](
            rows, residual_rows, weight.contiguous(), None if bias is None else bias.contiguous(),
            y_rows, s, mean, rstd, M, features, inner,
            *row_strides(rows), *row_strides(residual_rows), *row_strides(y_rows),
            CENTRED=norm.centred, OFFSET=norm.offset, ROUND=norm.round_before_weight, EPS=norm.eps,
            WIDE=wide_type(x), **block, num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return mean, rstd


def _backward(
    dy: Tensor,
    s: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dsum: Tensor | None,
    dx: Tensor | None,
    need_dweight: bool,
    norm: _Norm,
) -> tuple[Tensor | None, Tensor | None]:
    """Fills dx, if there is one; returns dw where it is needed, and db where there is a bias."""
    wanted = (weight if need_dweight else None, bias)
    if not s.numel():
        dweight, dbias = (None if like is None else torch.zeros_like(like) for like in wanted)
        return dweight, dbias
    features, inner = s.shape[-1], inner_rows(dy, s, dsum, dx)
    rows = _Rows(grouped(dy, inner), grouped(s, inner), mean, rstd, s.numel() // features, inner)
    dsum_rows = None if dsum is None else grouped(dsum, inner)
    dx_rows = None if dx is None else output_rows(dx, s.shape, "out", inner)
    everything = norm.centred and all(x is not None for x in (dsum, *wanted))  # spills beside a row of full length
    looped = features > (MAX_FEATURES // 2 if everything else MAX_FEATURES)
    with torch.cuda.device(s.get_device()):
        if not looped:
            partials = _partials(rows, wanted, *block_of(features))
            _input_gradient(rows, weight, dsum_rows, dx_rows, partials, norm)
        else:
            partials = _column_sums(rows, wanted, norm)  # first: dx may be written over dy or s
            if dx_rows is not None:
                _input_gradient(rows, weight, dsum_rows, dx_rows, None, norm)
        dweight, dbias = (_summed(partial, like) for partial, like in zip(partials, wanted, strict=True))
    return dweight, dbias


class _Rows(NamedTuple):
    """What every backward kernel reads: M rows, in groups of `inner`."""

    dy: Tensor  # [outer, inner, features]
    s: Tensor  # [outer, inner, features]
    mean: Tensor | None  # [M], LayerNorm
    rstd: Tensor  # [M]
    M: int
    inner: int


Partials = tuple[Tensor | None, Tensor | None]  # of dw and db, [programs, features] each, None where not wanted


def _input_gradient(
    rows: _Rows, weight: Tensor, dsum: Tensor | None, dx: Tensor | None, partials: Partials | None, norm: _Norm
) -> None:
    """Fills dx, if there is one, and each program's row of the partial sums; without them each tile has a program.

    `partials` is None where rows are looped: the sums have a kernel of their own.
    """
    dy, s, mean, rstd, M, inner = rows
    features = s.shape[-1]
    block, num_warps = block_of(features, looped=partials is None)
    present = [partial for partial in partials or () if partial is not None]
    programs = present[0].shape[0] if present else triton.cdiv(M, block["BLOCK_M"])
    kernel = norm_backward_looped_kernel if partials is None else norm_backward_kernel
    kernel[(programs,)](
        dy, s, weight.contiguous(), mean, rstd, dsum, dx, *(partials or ()), M, features, inner,
        *row_strides(dy), *row_strides(s), *row_strides(dsum), *row_strides(dx), CENTRED=norm.centred,
        OFFSET=norm.offset, WIDE=wide_type(s), **block, num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip


def _column_sums(rows: _Rows, wanted: Partials, norm: _Norm) -> Partials:
    """The partial sums of dw and db alone, by blocks of columns."""
    dy, s, mean, rstd, M, inner = rows
    if all(like is None for like in wanted):
        return None, None
    features = s.shape[-1]
    blocks = triton.cdiv(features, COLUMNS)
    block, num_warps = column_block()
    partials = _partials(rows, wanted, block, num_warps, blocks)
    programs = next(partial.shape[0] for partial in partials if partial is not None)
    norm_weight_gradient_kernel[(blocks, programs)](
        dy, s, mean, rstd, *partials, M, features, inner, *row_strides(dy), *row_strides(s),
        CENTRED=norm.centred, WIDE=wide_type(s), **block, num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return partials


def _partials(rows: _Rows, wanted: Partials, block: dict[str, int], num_warps: int, column_blocks: int = 1) -> Partials:
    """Uninitialised rows for the partial sums of dw and db, as many as there will be programs."""
    programs = programs_for(triton.cdiv(rows.M, block["BLOCK_M"]), num_warps, rows.s.device, column_blocks)
    shape = (programs, rows.s.shape[-1])
    dweight, dbias = (
        None if like is None else torch.empty(shape, dtype=rows.rstd.dtype, device=rows.s.device) for like in wanted
    )
    return dweight, dbias


def _summed(partial: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The rows of `partial` added up, in the shape and dtype of `like`."""
    if partial is None or like is None:
        return None
    total = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    P, N = partial.shape
    block = sum_block()
    sum_partial_kernel[(triton.cdiv(N, block["BLOCK_N"]),)](
        partial, total, P, N, WIDE=wide_type(partial), **block, num_warps=4, enable_fp_fusion=True
    )
    return total


def block_of(features: int, looped: bool = False) -> tuple[dict[str, int], int]:
    """The tile of rows, or the block of a longer row, and the warps: 16 elements a thread."""
    if looped or features > MAX_FEATURES:
        return {"BLOCK_M": 1, "BLOCK_N": LOOP_BLOCK}, 8
    block = triton.next_power_of_2(features)
    return {"BLOCK_M": max(1, TILE // block), "BLOCK_N": block}, min(16, max(4, block // 512))


def column_block() -> tuple[dict[str, int], int]:
    """The tile of `norm_weight_gradient_kernel`, and its warps."""
    return {"BLOCK_M": TILE // COLUMNS, "BLOCK_N": COLUMNS}, 4


def sum_block() -> dict[str, int]:
    """The tile of `sum_partial_kernel`: narrow, because a row of `partial` is all there is to share out."""
    return {"BLOCK_P": TILE // 32, "BLOCK_N": 32}


def programs_for(tiles: int, num_warps: int, device: torch.device, column_blocks: int = 1) -> int:
    """How many programs share the tiles of a sum over rows: each will write a row of float32 to be added later.

    As many as run at once; fewer where a program would have less than 8 tiles, so that its row stays small beside
    what it reads; but never so few that a multiprocessor has none.
    """
    units = multiprocessors(device)
    at_once = units * WARPS_AT_ONCE // num_warps
    programs = min(at_once, max(units, tiles * column_blocks // 8))
    return max(1, min(tiles, programs // column_blocks))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; the interpreter is given two, so that programs take several tiles there too, `compile_specs` H100."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return H100 if device.type == "meta" else 2


def inner_rows(*tensors: Tensor | None) -> int:
    """How many rows make a group, so that a tensor need not be copied for it: 1 where all rows are evenly spaced."""
    present = [tensor for tensor in tensors if tensor is not None]
    if all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for x in present for i in range(x.dim() - 2)):
        return 1
    return present[0].shape[-2]


def grouped(x: Tensor, inner: int) -> Tensor:
    """[..., features] as [outer, inner, features], neighbouring features side by side; copied only if it must be."""
    rows = x.reshape(-1, inner, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def row_strides(rows: Tensor | None) -> tuple[int, int]:
    """From one group of rows to the next, and from one row to the next."""
    return (0, 0) if rows is None else (rows.stride(0), rows.stride(1))


def compile_specs() -> list[KernelSpec]:
    """The norms of Llama-3.1-8B at 8192 tokens, a head's q_norm, LayerNorm, and rows of the greatest size each way."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    llama, gemma, layer = _Norm(False, 0.0, True, 1e-5), _Norm(False, 1.0, False, 1e-6), _Norm(True, eps=1e-5)
    longer = 4 * MAX_FEATURES
    everything, sums = ("dsum", "weight", "bias"), ("weight", "bias")
    return [
        _forward_spec("llama", 4096, bfloat16, llama, "residual"),
        _forward_spec("llama", 4096, bfloat16, llama),
        _forward_spec("llama", 4096, torch.float16, llama),
        _forward_spec("gemma", 4096, float32, gemma, "residual"),
        _forward_spec("q_norm", 128, bfloat16, llama),
        _forward_spec("q_norm in a q/k/v buffer", 128, bfloat16, llama, "fused"),
        _forward_spec("layer norm", MAX_FEATURES, float32, layer, "residual", "bias"),
        _forward_spec("llama", longer, bfloat16, llama, "residual"),
        _forward_spec("layer norm", longer, float32, layer, "residual", "bias"),
        _backward_spec("llama", 4096, bfloat16, llama, "dsum"),
        _backward_spec("llama", 4096, bfloat16, llama),
        _backward_spec("q_norm", 128, bfloat16, llama),
        _backward_spec("q_norm in a q/k/v buffer", 128, bfloat16, llama, "fused"),
        _backward_spec("llama trained", 4096, bfloat16, llama, "weight"),
        _backward_spec("llama trained", 4096, bfloat16, llama, "dsum", "weight"),
        _backward_spec("gemma trained", 4096, float32, gemma, "dsum", "weight"),
        _backward_spec("q_norm trained", 128, bfloat16, llama, "weight"),
        _backward_spec("layer norm trained", MAX_FEATURES, float32, layer, *sums),
        _backward_spec("layer norm trained", MAX_FEATURES // 2, float32, layer, *everything),
        _backward_spec("llama", longer, bfloat16, llama, "dsum"),
        _backward_spec("layer norm", longer, float32, layer, "dsum"),
        _weight_gradient_spec("layer norm", longer, bfloat16, layer),
        _sum_spec(4096, bfloat16),
        _sum_spec(128, bfloat16),
    ]


def _spec_tensors(features: int, dtype: torch.dtype, count: int, fused: bool = False) -> list[Tensor]:
    """`count` tensors of 8192 tokens, or of their 32 query heads, which are 32 of 48 in a `fused` q/k/v buffer."""
    shape = (8192, features) if features > 128 else (8192, 48, features) if fused else (8192 * 32, features)
    buffers = [torch.empty(shape, dtype=dtype, device="meta") for _ in range(count)]
    return [buffer[:, :32] for buffer in buffers] if fused else buffers


def _spec_name(kernel: Any, name: str, features: int, dtype: torch.dtype, present: tuple[str, ...]) -> str:
    kind = f"{kernel.fn.__name__.removesuffix('_kernel')} {name} {features} {str(dtype).removeprefix('torch.')}"
    return kind + "".join(f", {operand}" for operand in present if operand in ("residual", "dsum"))


def _forward_spec(name: str, features: int, dtype: torch.dtype, norm: _Norm, *present: str) -> KernelSpec:
    """A forward with these optional operands."""
    x, y, residual, s = _spec_tensors(features, dtype, 4, "fused" in present)
    weight, bias = (torch.empty(features, dtype=dtype, device="meta") for _ in range(2))
    with_sum, with_bias = "residual" in present, "bias" in present
    kernel = norm_forward_kernel if features <= MAX_FEATURES else norm_forward_looped_kernel
    rows = x.numel() // features
    passes = 4 if with_sum else 2  # x, y, and s and the residual
    return spec_of(
        _spec_name(kernel, name, features, dtype, present),
        lambda: _forward(
            x, residual if with_sum else None, weight, bias if with_bias else None, y, s if with_sum else None, norm
        ),
        kernel,
        bytes_minimum=passes * x.nbytes + (1 + with_bias) * weight.nbytes + 4 * rows * (1 + norm.centred),
        shape=f"rows {rows}, features {features}",
    )


def _backward_spec(name: str, features: int, dtype: torch.dtype, norm: _Norm, *present: str) -> KernelSpec:
    """A backward with dsum, and with the gradients of the weight and the bias, where they are present."""
    dy, s, dsum, dx = _spec_tensors(features, dtype, 4, "fused" in present)
    weight, bias = (torch.empty(features, dtype=dtype, device="meta") for _ in range(2))
    rows = s.numel() // features
    mean, rstd = (torch.empty(rows, device="meta") for _ in range(2))
    kernel = norm_backward_kernel if features <= MAX_FEATURES else norm_backward_looped_kernel
    sums = "weight" in present
    passes = 3 + ("dsum" in present)
    vectors = 1 + sums + ("bias" in present)  # the weight, dw, db
    return spec_of(
        _spec_name(kernel, name, features, dtype, present),
        lambda: _backward(
            dy, s, weight, bias if "bias" in present else None, mean if norm.centred else None, rstd,
            dsum if "dsum" in present else None, dx, sums, norm,
        ),
        kernel, *((sum_partial_kernel,) if sums else ()),
        bytes_minimum=passes * s.nbytes + vectors * weight.nbytes + 4 * rows * (1 + norm.centred),
        shape=f"rows {rows}, features {features}",
    )  # fmt: skip


def _weight_gradient_spec(name: str, features: int, dtype: torch.dtype, norm: _Norm) -> KernelSpec:
    """The sums of dw and db alone, where rows are looped."""
    dy, s = _spec_tensors(features, dtype, 2)
    weight = torch.empty(features, dtype=dtype, device="meta")
    mean, rstd = (torch.empty(len(s), device="meta") for _ in range(2))
    rows = _Rows(grouped(dy, 1), grouped(s, 1), mean, rstd, len(s), 1)

    def launch() -> None:
        for partial in _column_sums(rows, (weight, weight), norm):
            _summed(partial, weight)

    return spec_of(
        _spec_name(norm_weight_gradient_kernel, name, features, dtype, ()),
        launch,
        norm_weight_gradient_kernel,
        sum_partial_kernel,
        bytes_minimum=2 * s.nbytes + mean.nbytes + rstd.nbytes + 2 * weight.nbytes,
        shape=f"rows {len(s)}, features {features}",
    )


def _sum_spec(features: int, dtype: torch.dtype) -> KernelSpec:
    """The sums of one weight's gradient, from as many programs as run at once."""
    programs = H100 * WARPS_AT_ONCE // block_of(features)[1]
    partial, like = torch.empty(programs, features, device="meta"), torch.empty(features, dtype=dtype, device="meta")
    return spec_of(
        f"sum_partial {programs} {features}",
        lambda: _summed(partial, like),
        sum_partial_kernel,
        bytes_minimum=partial.nbytes + like.nbytes,
        shape=f"programs {programs}, features {features}",
    )
