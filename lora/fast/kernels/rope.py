"""Rotary position embedding of q and k in one launch: `lora.reference.rope`, forward and (inverse) backward.

    a' = a cos_a - b sin_a        b' = b cos_b + a sin_b        sin negated for the inverse

cos and sin have a value for every feature; the pairs (a, b) are (i, i + rot/2), or (2i, 2i + 1) where interleaved.
Features from rot on pass through. Types are promoted as PyTorch would: with 16-bit tables beside a 16-bit q, both
products and their sum are rounded; with float32 tables only the result is.

Moved: each feature of q and k read once and written once, and cos and sin read once a token. One program rotates all
heads of one token, of q and then of k, so that a token's angles are loaded (and its position looked up) once and
serve all heads. A tile is some heads by half a head: 128-bit loads of neighbouring features, whatever the strides of
batch, heads and positions are. Interleaved pairs are loaded as they lie and taken apart in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora.errors import LoRAError
from lora.fast.kernels.common import wide_type
from lora.fast.kernels.compile_check import KernelSpec, spec_of

TILE = 2048  # pairs at a time: heads by half their features
FP_FUSION = False  # either product could be fused with the sum: both layouts, and back, are to be the same bits
TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def rope_forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    inverse: bool = False,
    out_q: Tensor | None = None,
    out_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x ⊙ cos + R(x) ⊙ sin of q and of k; with `inverse` the rotation back, which is the backward.

    Args:
        q: [batch, heads, seq, head_dim]; k: [batch, kv_heads, seq, head_dim]; any strides but in the last dimension.
        cos, sin: [seq, rot] or [batch or 1, seq, rot], of one dtype; with position_ids tables [positions, rot].
        position_ids: [batch or 1, seq], integers. A position outside the table gives NaN: to look would be to wait for
            the GPU.
        interleaved: pairs are neighbours (2i, 2i + 1) rather than (i, i + rot/2).
        out_q, out_k: where to write; any strides but in the last dimension. They may be q and k themselves, whose
            features from rot on are then not even read.

    Returns: q and k, rotated, in their own dtypes: `out_q` and `out_k`, or new tensors laid out in memory as q and k.
    Raises: LoRAError where shapes do not fit, as the kernel would read beyond the end of a tensor.
    """
    check_shapes(q, k, cos, sin, position_ids)
    q, k, cos, sin = (unit_stride(tensor) for tensor in (q, k, cos, sin))
    out_q, out_k = result_like(q, out_q, "out_q"), result_like(k, out_k, "out_k")
    batch, _, seq, _ = q.shape
    if not batch * seq:
        return out_q, out_k
    constants, num_warps = launch_rule(q.shape[1], k.shape[1], q.shape[-1], cos.shape[-1], interleaved)
    with torch.cuda.device(q.get_device()):
        rope_kernel[(batch * seq,)](
            q, k, cos, sin, position_ids, out_q, out_k, seq, cos.shape[0],
            *q.stride()[:3], *k.stride()[:3], *out_q.stride()[:3], *out_k.stride()[:3],
            *token_strides(cos), *token_strides(sin),
            *((0, 0) if position_ids is None else token_strides(position_ids[..., None])),
            COMPUTE_Q=compute_type(q, cos), COMPUTE_K=compute_type(k, cos), WIDE=wide_type(q, k, cos),
            PASS_Q=passes_through(q, out_q, cos), PASS_K=passes_through(k, out_k, cos),
            INTERLEAVED=interleaved, INVERSE=inverse, **constants, num_warps=num_warps, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return out_q, out_k


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, ids_ptr, out_q_ptr, out_k_ptr, seq, positions,
    q_batch, q_head, q_seq, k_batch, k_head, k_seq,
    out_q_batch, out_q_head, out_q_seq, out_k_batch, out_k_head, out_k_seq,
    cos_batch, cos_seq, sin_batch, sin_seq, ids_batch, ids_seq,
    COMPUTE_Q: tl.constexpr, COMPUTE_K: tl.constexpr, WIDE: tl.constexpr, PASS_Q: tl.constexpr, PASS_K: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One program rotates all heads of q and of k at one position of one sequence."""
    batch = (tl.program_id(0) // seq).to(tl.int64)
    at = (tl.program_id(0) % seq).to(tl.int64)
    o_cos, o_sin, known = batch * cos_batch + at * cos_seq, batch * sin_batch + at * sin_seq, at >= 0
    if ids_ptr is not None:
        position = tl.load(ids_ptr + batch * ids_batch + at * ids_seq).to(tl.int64)
        o_cos, o_sin, known = position * cos_seq, position * sin_seq, (position >= 0) & (position < positions)
    b_cos_a, b_cos_b = load_pairs(cos_ptr + o_cos, known, WIDE, ROT, HALF, INTERLEAVED)
    b_sin_a, b_sin_b = load_pairs(sin_ptr + o_sin, known, WIDE, ROT, HALF, INTERLEAVED)
    if INVERSE:
        b_sin_a, b_sin_b = -b_sin_a, -b_sin_b
    rotate_heads(
        q_ptr + batch * q_batch + at * q_seq, q_head, out_q_ptr + batch * out_q_batch + at * out_q_seq, out_q_head,
        b_cos_a, b_cos_b, b_sin_a, b_sin_b,
        COMPUTE_Q, WIDE, PASS_Q, INTERLEAVED, HEADS_Q, HEAD_DIM, ROT, BLOCK_Q, HALF, REST,
    )  # fmt: skip
    rotate_heads(
        k_ptr + batch * k_batch + at * k_seq, k_head, out_k_ptr + batch * out_k_batch + at * out_k_seq, out_k_head,
        b_cos_a, b_cos_b, b_sin_a, b_sin_b,
        COMPUTE_K, WIDE, PASS_K, INTERLEAVED, HEADS_K, HEAD_DIM, ROT, BLOCK_K, HALF, REST,
    )  # fmt: skip


@triton.jit
def rotate_heads(
    x_ptr, stride_x, out_ptr, stride_out, b_cos_a, b_cos_b, b_sin_a, b_sin_b,
    COMPUTE: tl.constexpr, WIDE: tl.constexpr, PASS: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROT: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """All heads of one token, BLOCK_H at a time; with PASS the features from ROT on are copied."""
    for first in range(0, HEADS, BLOCK_H):
        o_h = first + tl.arange(0, BLOCK_H)[:, None]
        m_h = o_h < HEADS
        p_x = x_ptr + o_h.to(tl.int64) * stride_x
        p_out = out_ptr + o_h.to(tl.int64) * stride_out
        b_a, b_b = load_pairs(p_x, m_h, WIDE, ROT, HALF, INTERLEAVED)
        b_turned_a = rounded(b_a * b_cos_a, COMPUTE) - rounded(b_b * b_sin_a, COMPUTE)
        b_turned_b = rounded(b_b * b_cos_b, COMPUTE) + rounded(b_a * b_sin_b, COMPUTE)
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        b_turned_a, b_turned_b = b_turned_a.to(COMPUTE).to(dtype), b_turned_b.to(COMPUTE).to(dtype)
        store_pairs(p_out, b_turned_a, b_turned_b, m_h, ROT, HALF, INTERLEAVED)
        if PASS:
            o_rest = ROT + tl.arange(0, REST)[None, :]
            m_rest = m_h & (o_rest < HEAD_DIM)
            tl.store(p_out + o_rest, tl.load(p_x + o_rest, mask=m_rest, other=0.0).to(dtype), mask=m_rest)


@triton.jit
def load_pairs(p_rows, m_rows, WIDE: tl.constexpr, ROT: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second of every pair of features, [rows, HALF] each; NaN in rows that are masked."""
    if INTERLEAVED:
        o_n = tl.arange(0, 2 * HALF)[None, :]
        b_x = tl.load(p_rows + o_n, mask=m_rows & (o_n < ROT), other=float("nan"))
        b_a, b_b = tl.split(tl.reshape(b_x, (b_x.shape[0], HALF, 2)))
    else:
        o_n = tl.arange(0, HALF)[None, :]
        m_n = m_rows & (o_n < ROT // 2)
        b_a = tl.load(p_rows + o_n, mask=m_n, other=float("nan"))
        b_b = tl.load(p_rows + ROT // 2 + o_n, mask=m_n, other=float("nan"))
    return b_a.to(WIDE), b_b.to(WIDE)


@triton.jit
def store_pairs(p_rows, b_a, b_b, m_rows, ROT: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The pairs back to where `load_pairs` finds them."""
    if INTERLEAVED:
        o_n = tl.arange(0, 2 * HALF)[None, :]
        b_x = tl.reshape(tl.join(b_a, b_b), (b_a.shape[0], 2 * HALF))
        tl.store(p_rows + o_n, b_x, mask=m_rows & (o_n < ROT))
    else:
        o_n = tl.arange(0, HALF)[None, :]
        m_n = m_rows & (o_n < ROT // 2)
        tl.store(p_rows + o_n, b_a, mask=m_n)
        tl.store(p_rows + ROT // 2 + o_n, b_b, mask=m_n)


@triton.jit
def rounded(b_x, COMPUTE: tl.constexpr):
    """What arithmetic in COMPUTE would have kept of x."""
    return b_x.to(COMPUTE).to(b_x.dtype)


def launch_rule(heads_q: int, heads_k: int, head_dim: int, rot: int, interleaved: bool) -> tuple[dict[str, int], int]:
    """The compile-time sizes, and the warps: 16 pairs a thread of a tile of q, up to 4 warps."""
    half = triton.next_power_of_2(rot // 2)
    most = max(1, TILE // half // (1 + interleaved))  # heads; pairs taken apart in registers spill in a larger tile
    block_q, block_k = (min(triton.next_power_of_2(max(heads, 1)), most) for heads in (heads_q, heads_k))
    sizes = {"HEADS_Q": heads_q, "HEADS_K": heads_k, "HEAD_DIM": head_dim, "ROT": rot, "HALF": half}
    sizes |= {"BLOCK_Q": block_q, "BLOCK_K": block_k, "REST": triton.next_power_of_2(max(head_dim - rot, 1))}
    return sizes, min(4, max(1, block_q * half // 512))


def check_shapes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> None:
    """q, k and the tables fit each other; otherwise LoRAError."""
    fits = q.dim() == 4 and k.dim() == 4 and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
    if fits and position_ids is None:
        fits = cos.dim() in (2, 3) and cos.shape[-2] == q.shape[2] and cos.shape[:-2] in ((), (1,), q.shape[:1])
    elif fits and position_ids is not None:
        fits = cos.dim() == 2 and position_ids.shape in ((1, q.shape[2]), (q.shape[0], q.shape[2]))
    fits = fits and sin.shape == cos.shape and sin.dtype == cos.dtype
    if not fits or cos.shape[-1] % 2 or not 2 <= cos.shape[-1] <= q.shape[-1]:
        ids = "" if position_ids is None else f" and position_ids {list(position_ids.shape)}"
        raise LoRAError(
            f"rope was given q {list(q.shape)}, k {list(k.shape)}, cos {list(cos.shape)} {cos.dtype}, sin "
            f"{list(sin.shape)} {sin.dtype}{ids}, expected q and k [batch, heads, seq, head_dim], and cos and sin of "
            "one dtype [seq, rot] or [batch, seq, rot] (with position_ids [batch, seq]: [positions, rot]), rot even "
            "and from 2 to head_dim."
        )


def result_like(x: Tensor, out: Tensor | None, name: str) -> Tensor:
    """`out`, if each of its elements is its own and neighbouring features are side by side; or memory laid out as x."""
    if out is None:
        return torch.empty_like(x)
    distinct = all(stride or size == 1 for size, stride in zip(out.shape, out.stride(), strict=True))
    if out.shape != x.shape or out.stride(-1) != 1 or not distinct:
        raise LoRAError(
            f"{name} is {list(out.shape)} with strides {list(out.stride())}, expected {list(x.shape)} with "
            "neighbouring features side by side and every element its own."
        )
    return out


def unit_stride(x: Tensor) -> Tensor:
    """The same numbers with neighbouring features side by side; copied only if they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def token_strides(table: Tensor) -> tuple[int, int]:
    """From one sequence to the next and from one token to the next, of [seq, rot] or [batch or 1, seq, rot]."""
    return (table.stride(0) if table.dim() == 3 and table.shape[0] > 1 else 0), table.stride(-2)


def compute_type(x: Tensor, table: Tensor) -> Any:
    """Triton's type for the wider of two dtypes."""
    return TYPES[torch.promote_types(x.dtype, table.dtype)]


def passes_through(x: Tensor, out: Tensor, cos: Tensor) -> bool:
    """Whether features from rot on must be copied; to `compile_specs` every result is a new one."""
    return cos.shape[-1] < x.shape[-1] and (out.is_meta or out.data_ptr() != x.data_ptr())


def compile_specs() -> list[KernelSpec]:
    """Llama-3.1-8B's 32 query and 8 key heads of 128 features at 8192 tokens, as views of one fused q/k/v buffer."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    return [
        _spec("llama", bfloat16, bfloat16),
        _spec("llama", torch.float16, torch.float16),
        _spec("llama", float32, float32),
        _spec("llama backward", bfloat16, bfloat16, inverse=True),
        _spec("float32 tables", bfloat16, float32, inverse=True),
        _spec("positions", bfloat16, bfloat16, positions=True),
        _spec("interleaved", bfloat16, bfloat16, interleaved=True),
        _spec("interleaved", float32, float32, interleaved=True),
        _spec("partial", bfloat16, bfloat16, rot=64),
    ]


def _spec(
    name: str, dtype: torch.dtype, table: torch.dtype, *, rot: int = 128, positions: bool = False,
    interleaved: bool = False, inverse: bool = False,
) -> KernelSpec:  # fmt: skip
    heads_q, heads_k, head_dim, tokens = 32, 8, 128, 8192
    q, k, _ = (
        columns.view(1, tokens, -1, head_dim).transpose(1, 2)
        for columns in torch.empty(tokens, (heads_q + 2 * heads_k) * head_dim, dtype=dtype, device="meta").split(
            [heads_q * head_dim, heads_k * head_dim, heads_k * head_dim], dim=1
        )
    )
    shape = (tokens, rot) if positions else (1, tokens, rot)  # a table to look up, or what every sequence has
    cos, sin = (torch.empty(shape, dtype=table, device="meta") for _ in range(2))
    ids = torch.empty(1, tokens, dtype=torch.int64, device="meta") if positions else None
    least = 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes + (0 if ids is None else ids.nbytes)
    return spec_of(
        f"rope {name} {str(dtype).removeprefix('torch.')}",
        lambda: rope_forward(q, k, cos, sin, position_ids=ids, interleaved=interleaved, inverse=inverse),
        rope_kernel,
        bytes_minimum=least,
        shape=f"tokens {tokens}, {heads_q} and {heads_k} heads of {head_dim}",
    )
