"""Cross-entropy of rows of logits, their gradient written over them: one chunk of `linear_cross_entropy`.

With ℓ a row of logits, y its label, V the vocabulary, ε the smoothing and w the row's weight:

    z = cap · tanh(scale · ℓ / cap)                                 without a cap, z = scale · ℓ
    lse = log Σ_c exp z_c
    loss = w · (lse - (1 - ε) z_y - ε / V · Σ_c z_c)                0 where the label is ignored
    dℓ_c = w · (exp(z_c - lse) - (1 - ε) [c = y] - ε / V) · scale · (1 - (z_c / cap)²)

which is `lora.reference.loss` written row by row. dℓ is made in the forward and takes the place of ℓ, so that the
caller's chunk is at once the operand of the gradient's matrix products and no other buffer of its size exists.

Memory, for rows whose label counts: V · itemsize bytes read for the loss alone; with the gradient read twice and
written once, as a row (256 KB of a 128k vocabulary in 16 bits) does not fit a multiprocessor. The second pass runs
backwards: the end of the row was read last and is the likeliest to be in the cache. An ignored row is not read.

One program takes one row in blocks. Each lane of LANE neighbours keeps its own running maximum and sum (Milakov and
Gimelshein 2018), joined once at the end, so that no reduction across threads stands between two loads.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora.errors import LoRAError
from lora.fast.kernels.compile_check import KernelSpec, spec_of

LOWEST = tl.constexpr(-3.4e38)  # where a maximum starts: finite, as the difference of two infinities is NaN
BLOCK = 8192  # logits at a time: 32 warps, 8 a thread, one 128-bit load of 16-bit logits
PER_WARP = 256  # of 32 threads
LANE = 8  # neighbouring logits whose maximum is found first: one running maximum and one rescaling for all of them
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    weight: float | Tensor = 1.0,
    gradient: bool = True,
    *,
    ignore_index: int = -100,
    lse: Tensor | None = None,
) -> Tensor:
    """The loss of each row times its weight; with `gradient` the logits become their own gradients, in place.

    Args:
        logits: [rows, vocab], float32, float16 or bfloat16, one row's logits side by side; rows may be strided.
        labels: int64 [rows], each a class or `ignore_index`. They must have been checked: the loss of a row with any
            other label is NaN.
        softcap, logit_scale, label_smoothing: as in `lora.reference.loss.linear_cross_entropy`.
        weight: what losses and gradients are multiplied by: one number, or float32 [rows] (any stride).
        lse: float32 [rows], where to write each row's log-sum-exp; 0 where the label is ignored.

    Returns: float32 [rows]; 0 where the label is ignored, and there the gradient is 0 too, whatever the logits.
    Raises: LoRAError where logits are of another dtype or layout, or the other tensors do not fit them.
    """
    check_rows(logits, labels, weight, lse)
    rows, vocab = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if not rows:
        return loss
    row_weight = weight if isinstance(weight, Tensor) else None
    block = block_size(vocab)
    with torch.cuda.device_of(logits):
        cross_entropy_kernel[(rows,)](
            logits, labels.contiguous(), loss, lse, row_weight, vocab, logits.stride(0),
            0 if row_weight is None else row_weight.stride(0), ignore_index, float(logit_scale), float(softcap or 1),
            float(label_smoothing), 1.0 if isinstance(weight, Tensor) else float(weight),
            HAS_GRADIENT=gradient, HAS_SOFTCAP=softcap is not None, SMOOTHS=label_smoothing > 0,
            BLOCK=block, LANE=LANE, num_warps=warps_of(block, torch.version.hip is not None), enable_fp_fusion=True,
        )  # fmt: skip
    return loss


def check_rows(logits: Tensor, labels: Tensor, weight: float | Tensor, lse: Tensor | None) -> None:
    """The tensors fit each other and the kernel; otherwise LoRAError."""
    if logits.dim() != 2 or logits.dtype not in DTYPES or not logits.shape[1]:
        raise LoRAError(
            f"logits is {logits.dtype} {list(logits.shape)}, expected [rows, vocab] in float32, float16 or bfloat16."
        )
    rows, vocab = logits.shape
    if (logits.stride(1) != 1 and vocab > 1) or (logits.stride(0) < vocab and rows > 1):
        raise LoRAError(
            f"logits has strides {list(logits.stride())}, expected the {vocab} logits of a row side by side and rows "
            "that do not overlap: pass a contiguous chunk, it is overwritten."
        )
    per_row = {"labels": (labels, torch.int64), "weight": (weight, torch.float32), "lse": (lse, torch.float32)}
    for name, (tensor, dtype) in per_row.items():
        if isinstance(tensor, Tensor) and (tensor.shape != (rows,) or tensor.dtype != dtype):
            raise LoRAError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} [{rows}]: one a row.")
    if lse is not None and not lse.is_contiguous():
        raise LoRAError(f"lse has stride {lse.stride(0)}, expected a contiguous tensor: it is written in place.")


def block_size(vocab: int) -> int:
    """BLOCK, or as short as the vocabulary, but at least 8 logits for each thread of one warp."""
    size: int = min(BLOCK, max(PER_WARP, triton.next_power_of_2(vocab)))
    return size


def warps_of(block: int, rocm: bool) -> int:
    """8 logits a thread: of the 1024 that a program may have, in warps of 32, or of 64 on AMD."""
    return max(1, block // (2 * PER_WARP if rocm else PER_WARP))


@triton.jit
def tanh(x):
    """Within 4 units of roundoff, relative: an odd polynomial near 0, where (1 - e) / (1 + e) cancels."""
    square = x * x
    fit = 0.020639085856799057 + square * -0.005704985412024486  # minimax for (tanh(x) - x) / x³ on |x| < 0.625
    fit = -0.33333281941829856 + square * (0.13331442193226592 + square * (-0.053739714667659505 + square * fit))
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(square < 0.625 * 0.625, x + x * square * fit, tl.where(x < 0, -far, far))


@triton.jit
def scaled_logits(logits, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """z = cap · tanh(scale · ℓ / cap), or scale · ℓ, in float32."""
    z = logits.to(tl.float32) * logit_scale
    if HAS_SOFTCAP:
        z = softcap * tanh(z * (1 / softcap))
    return z


@triton.jit
def row_statistics(
    p_row, vocab, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr, SMOOTHS: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """Lse of one row, and Σ z where SMOOTHS, in one pass over it."""
    b_max = tl.full((BLOCK // LANE,), LOWEST, tl.float32)  # of each lane: the largest z so far
    b_sum = tl.zeros((BLOCK // LANE,), tl.float32)  # Σ exp(z - b_max)
    b_total = tl.zeros((BLOCK // LANE,), tl.float32)  # Σ z
    o_lane = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    for start in range(0, vocab, BLOCK):
        m_column = start + o_lane < vocab
        b_logits = tl.load(p_row + start + o_lane, mask=m_column, other=0)
        b_z = scaled_logits(b_logits, logit_scale, softcap, HAS_SOFTCAP)
        if SMOOTHS:
            b_total += tl.sum(tl.where(m_column, b_z, 0), 1)
        b_z = tl.where(m_column, b_z, float("-inf"))
        b_larger = tl.maximum(b_max, tl.max(b_z, 1))
        b_sum = b_sum * tl.exp(b_max - b_larger) + tl.sum(tl.exp(b_z - b_larger[:, None]), 1)
        b_max = b_larger
    row_max = tl.max(b_max, 0)
    return row_max + tl.log(tl.sum(b_sum * tl.exp(b_max - row_max), 0)), tl.sum(b_total, 0)


@triton.jit
def write_gradient(
    p_row, vocab, label, lse, weight, logit_scale, softcap, smoothing,
    HAS_SOFTCAP: tl.constexpr, SMOOTHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrites one row of logits with dℓ, from its end to its start."""
    for step in range(tl.cdiv(vocab, BLOCK)):
        o_column = (tl.cdiv(vocab, BLOCK) - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        m_column = o_column < vocab
        b_logits = tl.load(p_row + o_column, mask=m_column, other=0)
        b_z = scaled_logits(b_logits, logit_scale, softcap, HAS_SOFTCAP)
        b_gradient = tl.exp(b_z - lse)
        if SMOOTHS:
            b_gradient -= smoothing / vocab
        b_gradient = tl.where(o_column == label, b_gradient - (1 - smoothing), b_gradient)
        if HAS_SOFTCAP:
            b_bent = b_z * (1 / softcap)
            b_gradient *= (1 - b_bent) * (1 + b_bent)
        b_gradient *= weight * logit_scale
        tl.store(p_row + o_column, b_gradient.to(p_row.dtype.element_ty), mask=m_column)


@triton.jit
def write_zeros(p_row, vocab, BLOCK: tl.constexpr):
    """An ignored row's gradient."""
    for start in range(0, vocab, BLOCK):
        o_column = start + tl.arange(0, BLOCK)
        tl.store(p_row + o_column, tl.zeros((BLOCK,), p_row.dtype.element_ty), mask=o_column < vocab)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(
    logits_ptr,  # [rows, vocab], rows `row_stride` apart; overwritten with dℓ where HAS_GRADIENT
    labels_ptr,  # int64 [rows]
    loss_ptr,  # float32 [rows]
    lse_ptr,  # float32 [rows], or None
    row_weight_ptr,  # float32 [rows], `row_weight_stride` apart, or None
    vocab,
    row_stride,
    row_weight_stride,
    ignore_index: tl.int64,
    logit_scale,
    softcap,  # 1 where there is none
    smoothing,
    weight,
    HAS_GRADIENT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SMOOTHS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
    """One program: the loss of one row, and its gradient."""
    row = tl.program_id(0).to(tl.int64)
    p_row = logits_ptr + row * row_stride
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if lse_ptr is not None:
            tl.store(lse_ptr + row, 0.0)
        if HAS_GRADIENT:
            write_zeros(p_row, vocab, BLOCK)
    else:
        is_class = (label >= 0) & (label < vocab)
        at_label = tl.load(p_row + label, mask=is_class, other=float("nan"))
        z_label = scaled_logits(at_label, logit_scale, softcap, HAS_SOFTCAP)
        lse, total = row_statistics(p_row, vocab, logit_scale, softcap, HAS_SOFTCAP, SMOOTHS, BLOCK, LANE)
        if row_weight_ptr is not None:
            weight *= tl.load(row_weight_ptr + row * row_weight_stride)
        spread = smoothing / vocab * total if SMOOTHS else 0.0  # a logit may be -inf, and 0 · inf is NaN
        tl.store(loss_ptr + row, weight * (lse - (1 - smoothing) * z_label - spread))
        if lse_ptr is not None:
            tl.store(lse_ptr + row, lse)
        if HAS_GRADIENT:
            write_gradient(
                p_row, vocab, label, lse, weight, logit_scale, softcap, smoothing, HAS_SOFTCAP, SMOOTHS, BLOCK
            )


def compile_specs(target: str = "sm_90") -> list[KernelSpec]:
    """Llama-3.1-8B's vocabulary, a chunk of 1024 tokens; with a cap Gemma 2's; with `target`'s warps."""
    specs = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for gradient in (True, False):
            specs.append(_spec(dtype, gradient, 128256))
    specs += [_spec(torch.bfloat16, True, 256000, 30.0), _spec(torch.float32, True, 256000, 30.0)]
    return [replace(spec, num_warps=warps_of(spec.constexprs["BLOCK"], target.startswith("gfx"))) for spec in specs]


def _spec(dtype: torch.dtype, gradient: bool, vocab: int, softcap: float | None = None) -> KernelSpec:
    rows = 1024
    logits = torch.empty(rows, vocab, dtype=dtype, device="meta")
    labels = torch.empty(rows, dtype=torch.int64, device="meta")
    kind = "with gradient" if gradient else "loss only"
    small = rows * (labels.itemsize + 4)
    return spec_of(
        f"cross_entropy {kind}{', capped' if softcap else ''} {str(dtype).removeprefix('torch.')}",
        lambda: cross_entropy_(logits, labels, softcap, gradient=gradient),
        cross_entropy_kernel,
        bytes_minimum=(2 if gradient else 1) * logits.nbytes + small,
        shape=f"rows {rows}, vocabulary {vocab}",
    )
