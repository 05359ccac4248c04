"""Query, key and value: three projections of one x.

    q = lora_linear(x, q_proj)        k = lora_linear(x, k_proj)        v = lora_linear(x, v_proj)

Each has its own matrix, bias and adapter, any of the three may have none, and grouped-query attention (Ainslie et al.
2023) gives k and v fewer rows. They read the same x through the same dropout mask, so x reaches the loss by three
paths, and its gradient is their sum:

    dx = dx_q + dx_k + dx_v
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lora.projection import Dropout, Gradients, Projection
from lora.reference.linear import lora_linear, lora_linear_backward


class QKVGradients(NamedTuple):
    """What `lora_qkv_backward` returns: the sum of the input gradients, and each projection's own (their dx None)."""

    dx: Tensor  # [..., in_features]
    q: Gradients
    k: Gradients
    v: Gradients


def lora_qkv(
    x: Tensor, q: Projection, k: Projection, v: Projection, *, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections of x, differentiable by autograd.

    Args:
        x: [..., in_features].
        q, k, v: projections of in_features; their out_features may differ.
        dropout: one mask on x for the three adapters.

    Returns: q [..., q_features], k [..., k_features], v [..., v_features].
    FLOPs and bytes saved: those of three `lora_linear`; x is the same tensor and is saved once.
    """
    return lora_linear(x, q, dropout=dropout), lora_linear(x, k, dropout=dropout), lora_linear(x, v, dropout=dropout)


def lora_qkv_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    x: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    *,
    dropout: Dropout | None = None,
) -> QKVGradients:
    """The gradients of `lora_qkv`, written out.

    Args:
        dq, dk, dv: the gradients with respect to its three outputs.
        x, q, k, v, dropout: as they were given to `lora_qkv`.
    """
    of_q = lora_linear_backward(dq, x, q, dropout=dropout)
    of_k = lora_linear_backward(dk, x, k, dropout=dropout)
    of_v = lora_linear_backward(dv, x, v, dropout=dropout)
    assert of_q.dx is not None and of_k.dx is not None and of_v.dx is not None  # lora_linear always has one
    dx = of_q.dx + of_k.dx + of_v.dx
    return QKVGradients(dx, of_q._replace(dx=None), of_k._replace(dx=None), of_v._replace(dx=None))
