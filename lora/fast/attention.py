"""Causal attention with shared keys, on a CPU: PyTorch's own kernel, called on blocks of what a query may see.

    out = softmax(s q kᵀ + mask) v        token i sees tokens 0 .. i

Up to some 1,500 tokens PyTorch's kernel takes as long under a causal mask as without one, and it wants a key for every
query head: grouped ones are copied for it, and autograd keeps the copies. Here tokens come in blocks. The queries
of one block, of all heads that share a key one under another, meet the keys before the block without a mask and their
own block's under one. Two results for one query, out_a with lse_a = log Σ exp(scores) and out_b with lse_b, become

    lse = log(exp(lse_a) + exp(lse_b))        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

which is how FlashAttention adds up its blocks (Dao et al. 2022, section 3.1). Backward, the kernel is given the joined
out and lse: p = exp(s q kᵀ - lse) and the gradients' Σ dout ⊙ out are then right in every block, and gradients add up.
Longer sequences, where the kernel leaves out most of what is hidden, go through it whole; k and v are kept as they
came there too. Why: docs/decisions/0012-attention-in-blocks.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lora.fast.runtime import FusedFunction, kind_of

BLOCK = 128  # tokens; the best of 64, 128 and 256 for sequences of 256 to 1,024
WHOLE = 1536  # tokens from which the kernel itself is as fast


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(s q kᵀ, of tokens not after the query's) v, [batch, tokens, heads, head_dim].

    Args:
        q: [batch, heads, tokens, head_dim], float32 or float64, on a CPU (`takes_attention`); any strides.
        k, v: [batch, key_heads, tokens, head_dim]; head h meets key head h // (heads / key_heads).
        scale: s; 1 / √head_dim by default.

    Returns: tokens before heads, contiguous, as an output projection reads them.
    FLOPs: 4·batch·heads·head_dim·tokens²/2, and half of a block's square more for each block. Saved for backward: q,
    k, v, the output, and a number for each head and token; v as a copy where it would hold a larger buffer.
    """
    out: Tensor = CausalAttention.apply(q, k, v, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)  # type: ignore[no-untyped-call]
    return out


def takes_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `causal_attention` is for these: not in a graph, which plans for itself."""
    shapes = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[2:] == k.shape[2:] and k.shape[1] > 0
    return (
        not torch.compiler.is_compiling()
        and shapes
        and q.shape[1] % k.shape[1] == 0
        and all(x.dtype in (torch.float32, torch.float64) and kind_of(x) == "cpu" and x.numel() for x in (q, k, v))
        and kernel_is_there()
    )


@functools.cache
def kernel_is_there() -> bool:
    """Whether this PyTorch has the kernel for CPUs under the name it has had since 2.2."""
    return hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


class CausalAttention(FusedFunction):
    """Forward and backward, each one operator: `selective` and a dry run see an attention, not its blocks."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        v = on_its_own(v, q, k)
        out, lse = torch.ops.lora.causal_attention(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch.ops.lora.causal_attention_backward(dout, *ctx.saved_tensors, ctx.scale)
        return *(dx.transpose(1, 2) for dx in gradients), None


def on_its_own(v: Tensor, *others: Tensor) -> Tensor:
    """v, copied where it alone of the kept tensors would hold a larger buffer: the product for q, k and v, a group's.

    q and k are new tensors where they were rotated; where they are not, they hold that buffer anyway.
    """
    memory = v.untyped_storage()
    held = any(x.untyped_storage()._cdata == memory._cdata for x in others)
    if held or memory.nbytes() <= v.numel() * v.element_size():
        return v
    return v.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def forward_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out [batch, tokens, heads, head_dim] and lse [batch, heads, tokens]; arguments as in `causal_attention`."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    batch, heads, tokens, features = q.shape
    group = heads // k.shape[1]
    if tokens >= WHOLE:
        out, lse = kernel(q, repeated(k, group), repeated(v, group), 0.0, True, scale=scale)
        return out.transpose(1, 2).contiguous(), lse.contiguous()
    out, lse = q.new_empty(batch, tokens, heads, features), q.new_empty(batch, heads, tokens)
    for rows, mask in blocks(tokens, group, q):
        q_rows = stacked(q[:, :, rows], group)
        joined, joined_lse = kernel(q_rows, k[:, :, rows], v[:, :, rows], 0.0, False, attn_mask=mask, scale=scale)
        if rows.start:
            before = slice(0, rows.start)
            other, other_lse = kernel(q_rows, k[:, :, before], v[:, :, before], 0.0, False, scale=scale)
            share = torch.sigmoid(other_lse - joined_lse)  # exp(other - lse)
            joined, joined_lse = joined.lerp(other, share[..., None]), torch.logaddexp(joined_lse, other_lse)
        out[:, rows] = unstacked(joined, group).transpose(1, 2)
        lse[:, :, rows] = joined_lse.reshape(batch, heads, -1)
    return out, lse


def backward_blocks(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, [batch, tokens, heads or key heads, head_dim], of `forward_blocks`' out [..., heads, head_dim]."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    group, tokens = q.shape[1] // k.shape[1], q.shape[2]
    dout, out = dout.transpose(1, 2), out.transpose(1, 2)  # [batch, heads, tokens, head_dim]
    if tokens >= WHOLE:
        whole = kernel(dout, q, repeated(k, group), repeated(v, group), out, lse, 0.0, True, scale=scale)
        dq, dk, dv = (dx.transpose(1, 2).contiguous() for dx in whole)
        return dq, dk.unflatten(2, (-1, group)).sum(3), dv.unflatten(2, (-1, group)).sum(3)
    dq, dk, dv = (torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows, mask in blocks(tokens, group, q):
        dout_rows, q_rows, out_rows = (stacked(x[:, :, rows], group) for x in (dout, q, out))
        lse_rows = stacked(lse[:, :, rows, None], group).squeeze(-1)
        of_rows = dq[:, rows].transpose(1, 2)
        # its own block is the first that a query meets, and that a key is met by: the others add to it
        for seen, hidden, put in ((rows, mask, Tensor.copy_), (slice(0, rows.start), None, Tensor.add_)):
            if seen.stop:
                dq_rows, dk_seen, dv_seen = kernel(
                    dout_rows, q_rows, k[:, :, seen], v[:, :, seen], out_rows, lse_rows, 0.0, False, attn_mask=hidden,
                    scale=scale,
                )  # fmt: skip
                put(of_rows, unstacked(dq_rows, group))
                put(dk[:, seen], dk_seen.transpose(1, 2))
                put(dv[:, seen], dv_seen.transpose(1, 2))
    return dq, dk, dv


def blocks(tokens: int, group: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some tokens after others: which, and the mask of their stacked queries among them, [group · rows, rows]."""
    for first in range(0, tokens, BLOCK):
        rows = min(BLOCK, tokens - first)
        mask = like.new_full((rows, rows), -math.inf).triu_(1)
        yield slice(first, first + rows), mask.repeat(group, 1)


def stacked(x: Tensor, group: int) -> Tensor:
    """[batch, heads, rows, features] as [batch, key_heads, group · rows, features]: one key's heads in a column."""
    batch, heads, rows, features = x.shape
    return x.reshape(batch, heads // group, group * rows, features)


def unstacked(x: Tensor, group: int) -> Tensor:
    """The inverse of `stacked`."""
    batch, key_heads, rows, features = x.shape
    return x.reshape(batch, key_heads * group, rows // group, features)


def repeated(x: Tensor, group: int) -> Tensor:
    """Each key head once for every query head that meets it."""
    return x if group == 1 else x.repeat_interleave(group, dim=1)
