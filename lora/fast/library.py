"""The fast backend's leaves as operators of PyTorch's library: `torch.ops.lora.*`.

torch.compile follows the autograd functions of this backend and their matrix products, but sees into no kernel launch,
and no branch on a tensor's values. Each such step is one function here, with a fake form that says what shapes and
types it returns; in a graph it is one node. Outside of a graph the function is called as it is, because the way
through PyTorch's dispatcher costs more than many of these kernels run.

An operator returns tensors of its own, never an argument or a view of one, and an empty tensor where there is nothing
to return. It has no derivative: the autograd functions beside it are written out in both directions
(`docs/decisions/0007-operators.md`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora.fast.parts import TENSORS, part_of, term_of
from lora.fast.runtime import rehearsing, runs_triton
from lora.projection import Dropout, NF4Weight
from lora.reference.multi_lora import check_stacked

Function = TypeVar("Function", bound=Callable[..., Any])


def operator(fake: Callable[..., Any], writes: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Registers a function as `torch.ops.lora.<its name>`, and calls that only in a graph or a dry run.

    Args:
        fake: the same signature; returns empty tensors of the right shape, dtype, device and strides.
        writes: the arguments that are written in place.
    """

    def register(function: Function) -> Function:
        name = function.__name__
        torch.library.custom_op(f"lora::{name}", function, mutates_args=writes).register_fake(fake)
        in_graph = getattr(torch.ops.lora, name).default

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return in_graph(*arguments) if torch.compiler.is_compiling() or rehearsing() else function(*arguments)

        return call  # type: ignore[return-value]

    return register


# ---- activation


def _fake_gated_forward(
    g: Tensor, z: Tensor, activation: str,
    g_u: Tensor | None, g_factor: Tensor | None, g_scale: float,
    z_u: Tensor | None, z_factor: Tensor | None, z_scale: float,
) -> Tensor:  # fmt: skip
    return g.new_empty(g.shape, dtype=torch.promote_types(g.dtype, z.dtype))


@operator(_fake_gated_forward)
def gated_forward(
    g: Tensor, z: Tensor, activation: str,
    g_u: Tensor | None, g_factor: Tensor | None, g_scale: float,
    z_u: Tensor | None, z_factor: Tensor | None, z_scale: float,
) -> Tensor:  # fmt: skip
    """h = act(g) ⊙ z, [tokens, hidden], with g and z plus a low-rank term each."""
    from lora.fast.kernels import activation as kernels

    plus_g, plus_z = term_of(g_u, g_factor, g_scale), term_of(z_u, z_factor, z_scale)
    return kernels.gated_forward(g, z, activation, plus_g=plus_g, plus_z=plus_z)


def _fake_gated_backward(
    dh: Tensor, g: Tensor, z: Tensor, activation: str,
    dh_u: Tensor | None, dh_factor: Tensor | None, dh_scale: float,
    g_u: Tensor | None, g_factor: Tensor | None, g_scale: float,
    z_u: Tensor | None, z_factor: Tensor | None, z_scale: float, with_h: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return dh.new_empty(dh.shape[0], 2 * dh.shape[1]), dh.new_empty(dh.shape if with_h else 0)


@operator(_fake_gated_backward)
def gated_backward(
    dh: Tensor, g: Tensor, z: Tensor, activation: str,
    dh_u: Tensor | None, dh_factor: Tensor | None, dh_scale: float,
    g_u: Tensor | None, g_factor: Tensor | None, g_scale: float,
    z_u: Tensor | None, z_factor: Tensor | None, z_scale: float, with_h: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dg and dz side by side, [tokens, 2·hidden], and h (empty where it is not wanted), with dh, g and z plus terms."""
    from lora.fast.kernels import activation as kernels

    both, h = dh.new_empty(dh.shape[0], 2 * dh.shape[1]), dh.new_empty(dh.shape if with_h else 0)
    dg, dz = both.chunk(2, dim=1)
    kernels.gated_backward(
        dh, g, z, activation, dg=dg, dz=dz, h=h if with_h else None, plus_dh=term_of(dh_u, dh_factor, dh_scale),
        plus_g=term_of(g_u, g_factor, g_scale), plus_z=term_of(z_u, z_factor, z_scale),
    )  # fmt: skip
    return both, h


# ---- norm


def wide_of(x: Tensor) -> torch.dtype:
    """What statistics are kept in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _fake_rms_norm_forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float, rounds: bool
) -> tuple[Tensor, Tensor, Tensor]:
    s = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), s, x.new_empty(x.shape[0], dtype=wide_of(x))


@operator(_fake_rms_norm_forward)
def rms_norm_forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float, rounds: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y [tokens, features], s = x + residual (empty without one), ρ [tokens]."""
    from lora.fast.kernels import norm as kernels

    y, s, rho = kernels.rms_norm_forward(
        x, weight, eps=eps, offset=offset, round_before_weight=rounds, residual=residual
    )
    return y, x.new_empty(0) if residual is None else s, rho


def _fake_rms_norm_backward(
    dy: Tensor, s: Tensor, weight: Tensor, rho: Tensor, dsum: Tensor | None, offset: float, wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return s.new_empty(s.shape if wants_x else 0), weight.new_empty(weight.shape if wants_weight else 0)


@operator(_fake_rms_norm_backward)
def rms_norm_backward(
    dy: Tensor, s: Tensor, weight: Tensor, rho: Tensor, dsum: Tensor | None, offset: float, wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx [tokens, features] and dw [features], empty where they are not wanted."""
    from lora.fast.kernels import norm as kernels

    dx, dweight = kernels.rms_norm_backward(
        dy, s, weight, rho, offset=offset, dsum=dsum, need_dx=wants_x, need_dweight=wants_weight
    )
    return s.new_empty(0) if dx is None else dx, weight.new_empty(0) if dweight is None else dweight


def _fake_layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, s, rho = _fake_rms_norm_forward(x, weight, residual, eps, 0.0, True)
    return y, s, torch.empty_like(rho), rho


@operator(_fake_layer_norm_forward)
def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [tokens, features], s = x + residual (empty without one), μ and ρ [tokens]."""
    from lora.fast.kernels import norm as kernels

    y, s, mean, rho = kernels.layer_norm_forward(x, weight, bias, eps=eps, residual=residual)
    return y, x.new_empty(0) if residual is None else s, mean, rho


def _fake_layer_norm_backward(
    dy: Tensor, s: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rho: Tensor, dsum: Tensor | None,
    wants_x: bool, wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return *_fake_rms_norm_backward(dy, s, weight, rho, dsum, 0.0, wants_x, wants_weight), dbias


@operator(_fake_layer_norm_backward)
def layer_norm_backward(
    dy: Tensor, s: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rho: Tensor, dsum: Tensor | None,
    wants_x: bool, wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx [tokens, features]; dw and db [features]; empty where they are not wanted (db: without a bias)."""
    from lora.fast.kernels import norm as kernels

    gradients = kernels.layer_norm_backward(
        dy, s, weight, mean, rho, bias=bias, dsum=dsum, need_dx=wants_x, need_dweight=wants_weight
    )
    likes = (s, weight, weight)  # where one is not wanted, empty
    dx, dweight, dbias = (like.new_empty(0) if x is None else x for x, like in zip(gradients, likes, strict=True))
    return dx, dweight, dbias


# ---- rotary position embedding


def _fake_rope_rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


@operator(_fake_rope_rotate)
def rope_rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k [batch, heads, seq, head_dim] turned by the angles, or back by them."""
    from lora.fast.kernels import rope as kernels

    return kernels.rope_forward(q, k, cos, sin, position_ids=position_ids, interleaved=interleaved, inverse=inverse)


# ---- attention


def _fake_causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, features = q.shape
    return q.new_empty(batch, tokens, heads, features), q.new_empty(batch, heads, tokens)


@operator(_fake_causal_attention)
def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out [batch, tokens, heads, head_dim] and lse [batch, heads, tokens]."""
    from lora.fast import attention

    return attention.forward_blocks(q, k, v, scale)


def _fake_causal_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape) for x in (q, k, v))
    return dq, dk, dv


@operator(_fake_causal_attention_backward)
def causal_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, tokens before heads."""
    from lora.fast import attention

    return attention.backward_blocks(dout, q, k, v, out, lse, scale)


# ---- dropout


def _fake_keep_mask(shape: Sequence[int], p: float, seed: int, stream: int, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.bool, device=device)


@operator(_fake_keep_mask)
def keep_mask(shape: Sequence[int], p: float, seed: int, stream: int, device: torch.device) -> Tensor:
    """True where an element is kept, bool of `shape`; an operator on every device, for it computes with the seed."""
    if runs_triton(torch.empty(0, device=device)):
        from lora.fast.kernels import dropout as kernels

        return kernels.dropout_mask(shape, p, seed, stream, device)
    from lora.fast import dropout

    return dropout.plain_mask(shape, p, seed, stream, device)


def _fake_drop(x: Tensor, p: float, seed: int, stream: int) -> Tensor:
    return x.new_empty(x.shape)


@operator(_fake_drop)
def drop(x: Tensor, p: float, seed: int, stream: int) -> Tensor:
    """x ⊙ keep / (1 - p), [tokens, features]."""
    from lora.fast.kernels import dropout as kernels

    return kernels.dropout_forward(x, p, seed, stream)


def _fake_add_dropped(total: Tensor, x: Tensor, p: float, seed: int, stream: int) -> None:
    return None


@operator(_fake_add_dropped, writes=("total",))
def add_dropped(total: Tensor, x: Tensor, p: float, seed: int, stream: int) -> None:
    """total += x ⊙ keep / (1 - p), in place."""
    from lora.fast.kernels import dropout as kernels

    kernels.dropout_add(total, x, p, seed, stream)


def _fake_dropped_product(x: Tensor, lora_A: Tensor, scaling: float, p: float, seed: int, stream: int) -> Tensor:
    return x.new_empty(x.shape[0], lora_A.shape[0])


@operator(_fake_dropped_product)
def dropped_product(x: Tensor, lora_A: Tensor, scaling: float, p: float, seed: int, stream: int) -> Tensor:
    """s D(x) Aᵀ, [tokens, r]; D(x) is never written."""
    from lora.fast.kernels import gemm

    return gemm.skinny_gemm(x, lora_A, Dropout(p, seed, stream), scaling)


def _fake_dropped_sum(du: Tensor, x: Tensor, dtype: torch.dtype, p: float, seed: int, stream: int) -> Tensor:
    return x.new_empty(du.shape[1], x.shape[1], dtype=dtype)


@operator(_fake_dropped_sum)
def dropped_sum(du: Tensor, x: Tensor, dtype: torch.dtype, p: float, seed: int, stream: int) -> Tensor:
    """duᵀ D(x), [r, features], summed in float32; D(x) is never written."""
    from lora.fast.kernels import gemm

    return gemm.lora_A_gradient(du, x, Dropout(p, seed, stream), dtype)


def _fake_add_dropped_product(total: Tensor, u: Tensor, factor: Tensor, p: float, seed: int, stream: int) -> None:
    return None


@operator(_fake_add_dropped_product, writes=("total",))
def add_dropped_product(total: Tensor, u: Tensor, factor: Tensor, p: float, seed: int, stream: int) -> None:
    """total += D(u factor), in place; the product is never written."""
    from lora.fast.kernels import add_product as kernels

    kernels.dropout_add_product(total, u, factor, p, seed, stream)


# ---- weights


def _fake_dora_norm(dense: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return dense.new_empty(dense.shape[0], dtype=wide_of(dense))


@operator(_fake_dora_norm)
def dora_norm(dense: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + s B A‖ of each row, [out]."""
    from lora.fast.kernels import dora as kernels

    return kernels.dora_norm(dense, lora_A, lora_B, scaling)


def _fake_nf4_decode(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None, shape: Sequence[int],
    block_size: int, nested_block_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return codes.new_empty(shape, dtype=dtype)


@operator(_fake_nf4_decode)
def nf4_decode(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None, shape: Sequence[int],
    block_size: int, nested_block_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """An NF4 weight as a dense one, [out, in]."""
    from lora.fast import nf4

    out = torch.empty(tuple(shape), dtype=dtype, device=codes.device)
    quantised = NF4Weight(
        codes, absmax, tuple(shape), dtype, block_size, nested_absmax, nested_offset, nested_block_size
    )
    nf4.decode_into(quantised, out)
    return out


# ---- whole operations that look at values: labels, adapter numbers

Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _fake_linear_cross_entropy(
    hidden: Tensor, labels: Tensor, num_items: Tensor | None, dlosses: Tensor | None,
    tensors: Sequence[Tensor | None], sizes: Sequence[int], dtype: torch.dtype, scaling: float,
    reduction: str, ignore_index: int, softcap: float | None, logit_scale: float, label_smoothing: float,
    p: float, seed: int, stream: int, needs: Sequence[bool],
) -> Seven:  # fmt: skip
    like = [
        x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0)
        for x, need in zip((hidden, *tensors[:TENSORS]), needs, strict=True)
    ]
    loss = hidden.new_empty(labels.shape if reduction == "none" else (), dtype=wide_of(hidden))
    return loss, *like  # type: ignore[return-value]


@operator(_fake_linear_cross_entropy)
def linear_cross_entropy(
    hidden: Tensor, labels: Tensor, num_items: Tensor | None, dlosses: Tensor | None,
    tensors: Sequence[Tensor | None], sizes: Sequence[int], dtype: torch.dtype, scaling: float,
    reduction: str, ignore_index: int, softcap: float | None, logit_scale: float, label_smoothing: float,
    p: float, seed: int, stream: int, needs: Sequence[bool],
) -> Seven:  # fmt: skip
    """The loss, and those gradients of (hidden, weight, bias, lora_A, lora_B, magnitude) that are needed."""
    from lora.fast.loss import Settings, loss_and_gradients

    settings = Settings(reduction, ignore_index, softcap, logit_scale, label_smoothing)  # type: ignore[arg-type]
    part, dropout = part_of(tensors, sizes, dtype, scaling), Dropout(p, seed, stream) if p else None
    losses, dx, gradients = loss_and_gradients(hidden, part, labels, num_items, dlosses, settings, dropout, needs)
    each = [hidden.new_empty(0) if g is None else g for g in gradients]
    # dA and dB come in one buffer, and dB may be a transposed view; an operator's results are what its fake form says
    each[2:4] = [g.clone(memory_format=torch.contiguous_format) for g in each[2:4]]
    return losses, hidden.new_empty(0) if dx is None else dx, *each  # type: ignore[return-value]


def _fake_multi_lora_forward(
    x: Tensor, index: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor,
    tensors: Sequence[Tensor | None], sizes: Sequence[int], dtype: torch.dtype, base_scaling: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens = math.prod(x.shape[:-1])
    return x.new_empty((*x.shape[:-1], lora_B.shape[1])), x.new_empty(tokens, lora_A.shape[1])


@operator(_fake_multi_lora_forward)
def multi_lora_forward(
    x: Tensor, index: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor,
    tensors: Sequence[Tensor | None], sizes: Sequence[int], dtype: torch.dtype, base_scaling: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h, [rows, ..., out], and s·xAᵀ, [tokens, r]."""
    from lora.fast import multi_lora

    part = part_of(tensors, sizes, dtype, base_scaling)
    check_stacked(x, part.shape, lora_A, lora_B, scaling, index)
    return multi_lora.forward_tokens(x, part, lora_A, lora_B, scaling, multi_lora.groups_for(x, lora_A, index))


Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _fake_multi_lora_backward(
    dh: Tensor, x: Tensor, su: Tensor, index: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor,
    tensors: Sequence[Tensor | None], sizes: Sequence[int], dtype: torch.dtype, base_scaling: float,
    needs: Sequence[bool],
) -> Five:  # fmt: skip
    each = (x, lora_A, lora_B, tensors[0], tensors[1])
    return tuple(  # type: ignore[return-value]
        like.new_empty(like.shape) if need and like is not None else x.new_empty(0)
        for like, need in zip(each, needs, strict=True)
    )


@operator(_fake_multi_lora_backward)
def multi_lora_backward(
    dh: Tensor, x: Tensor, su: Tensor, index: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor,
    tensors: Sequence[Tensor | None], sizes: Sequence[int], dtype: torch.dtype, base_scaling: float,
    needs: Sequence[bool],
) -> Five:  # fmt: skip
    """The gradients of x, lora_A, lora_B, weight and bias, empty where they are not needed."""
    from lora.fast import multi_lora

    part, groups = part_of(tensors, sizes, dtype, base_scaling), multi_lora.groups_for(x, lora_A, index)
    made = multi_lora.backward_tokens(dh, x, su, part, lora_A, lora_B, scaling, groups, needs)
    return tuple(x.new_empty(0) if each is None else each for each in made)  # type: ignore[return-value]
