"""The gated MLP of a transformer block: three projections around one gated activation.

    g = gate(x)        z = up(x)        h = act(g) ⊙ z        y = down(h)          (Shazeer 2020, eq. 6)

act is SiLU (SwiGLU), the exact GELU (GeGLU), or GELU's tanh approximation (Hendrycks and Gimpel 2016):

    silu(g) = g σ(g)                                    silu'(g) = σ(g) (1 + g (1 - σ(g)))
    gelu(g) = g Φ(g)                                    gelu'(g) = Φ(g) + g φ(g)
    gelu_tanh(g) = g (1 + t) / 2                        gelu_tanh'(g) = (1 + t) / 2 + g (1 - t²) v' / 2
      t = tanh(v), v = √(2/π) (g + 0.044715 g³)           v' = √(2/π) (1 + 3 · 0.044715 g²)

The backward walks back through the same four steps; gate and up read the same x, so their dx add:

    dh = dx of down        dz = dh ⊙ act(g)        dg = dh ⊙ z ⊙ act'(g)        dx = dx_gate + dx_up
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.errors import LoRAError, did_you_mean
from lora.projection import Dropout, Gradients, Projection
from lora.reference.linear import lora_linear, lora_linear_backward

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


class MLPGradients(NamedTuple):
    """What `lora_mlp_backward` returns: dx, and each projection's own gradients (their dx None)."""

    dx: Tensor  # [..., in_features]
    gate: Gradients
    up: Gradients
    down: Gradients


def lora_mlp(
    x: Tensor, gate: Projection, up: Projection, down: Projection, *, activation: str, dropout: Dropout | None = None
) -> Tensor:
    """y = down(act(gate(x)) ⊙ up(x)), differentiable by autograd.

    Args:
        x: [..., in_features].
        gate, up: projections of in_features to hidden_features; down: back again.
        activation: "silu" (SwiGLU), "gelu" (GeGLU, exact) or "gelu_tanh" (GeGLU, tanh approximation).
        dropout: its stream masks x for gate and up together; the next stream masks the hidden for down.

    Returns: [..., out_features of down].
    Raises: LoRAError for another activation.
    FLOPs: those of three `lora_linear`. Saved for backward by autograd: x, g, act(g), z, h and the thin u of each.
    """
    check_activation(activation)
    g = lora_linear(x, gate, dropout=dropout)  # [..., hidden]
    z = lora_linear(x, up, dropout=dropout)  # [..., hidden]
    return lora_linear(activate(g, activation) * z, down, dropout=hidden_dropout(dropout))


def lora_mlp_backward(
    dy: Tensor,
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    activation: str,
    dropout: Dropout | None = None,
) -> MLPGradients:
    """The gradients of `lora_mlp`, written out; only x is needed, g and z are computed again.

    Args:
        dy: [..., out_features], the gradient with respect to y.
        the others: as they were given to `lora_mlp`.
    """
    check_activation(activation)
    g = lora_linear(x, gate, dropout=dropout)  # [..., hidden]
    z = lora_linear(x, up, dropout=dropout)  # [..., hidden]
    a = activate(g, activation)
    of_down = lora_linear_backward(dy, a * z, down, dropout=hidden_dropout(dropout))
    assert of_down.dx is not None  # lora_linear always has one
    dh = of_down.dx
    dz = dh * a
    dg = (dh * z * activation_slope(g, activation)).to(g.dtype)
    of_gate = lora_linear_backward(dg, x, gate, dropout=dropout)
    of_up = lora_linear_backward(dz, x, up, dropout=dropout)
    assert of_gate.dx is not None and of_up.dx is not None
    dx = of_gate.dx + of_up.dx
    return MLPGradients(dx, of_gate._replace(dx=None), of_up._replace(dx=None), of_down._replace(dx=None))


def activate(g: Tensor, activation: str) -> Tensor:
    """act(g), elementwise."""
    if activation == "silu":
        return F.silu(g)
    return F.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none")


def activation_slope(g: Tensor, activation: str) -> Tensor:
    """act'(g), elementwise, in float32 (float64 for a float64 g)."""
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    if activation == "silu":
        sigma = torch.sigmoid(g)
        return sigma * (1 + g * (1 - sigma))
    if activation == "gelu":
        density = torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(g / math.sqrt(2))) + g * density
    t = torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))
    slope_of_v = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * g * g)
    return 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * slope_of_v


def hidden_dropout(dropout: Dropout | None) -> Dropout | None:
    """The dropout of the hidden activation: the same seed, the stream after x's."""
    return None if dropout is None else dropout._replace(stream=dropout.stream + 1)


def check_activation(activation: str) -> None:
    """One of ACTIVATIONS; otherwise LoRAError."""
    if activation not in ACTIVATIONS:
        raise LoRAError(
            f"The MLP's activation is {activation!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}."
            f"{did_you_mean(str(activation), ACTIVATIONS)}"
        )
