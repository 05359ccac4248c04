"""lora_mlp: y = down(act(gate(x)) ⊙ up(x))."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    ROUNDING,
    check_backward,
    deal,
    doubled,
    gradients_of,
    linear_magnitude,
    normal,
    random_projection,
    roundings,
    trainable,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora.errors import LoRAError
from lora.projection import Dropout, Projection
from lora.reference.dropout import apply_dropout
from lora.reference.linear import lora_linear
from lora.reference.mlp import ACTIVATIONS, activate, activation_slope, lora_mlp, lora_mlp_backward
from lora.reference.nf4 import nf4_quantize

RANKS = st.none() | st.integers(1, 3)
TRANSFORMERS_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def check_mlp(
    x: Tensor, parts: list[Projection], activation: str, dropout: Dropout | None, numerical: bool = True
) -> None:
    def forward(x: Tensor, *tensors: Tensor) -> Tensor:
        return lora_mlp(x, *deal(parts, tensors), activation=activation, dropout=dropout)

    def backward(dy: Tensor, x: Tensor, *tensors: Tensor) -> list[Tensor]:
        gradients = lora_mlp_backward(dy, x, *deal(parts, tensors), activation=activation, dropout=dropout)
        assert all(of.dx is None for of in gradients[1:])
        own = zip(parts, gradients[1:], strict=True)
        return [gradients.dx, *(tensor for part, of in own for tensor in gradients_of(part, of))]

    check_backward(forward, backward, [x, *(t for part in parts for t in trainable(part))], numerical=numerical)


def random_mlp(
    features: int = 3, hidden: int = 5, ranks: tuple[int | None, ...] = (2, 2, 2), bias: bool = False, **options: object
) -> list[Projection]:
    sizes = ((hidden, features), (hidden, features), (features, hidden))
    return [random_projection(*size, rank, bias=bias, **options) for size, rank in zip(sizes, ranks, strict=True)]


@given(
    activation=st.sampled_from(ACTIVATIONS),
    ranks=st.tuples(RANKS, RANKS, RANKS),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**31),
)
def test_backward(activation: str, ranks: tuple[int | None, ...], bias: bool, p: float, seed: int) -> None:
    torch.manual_seed(seed)
    check_mlp(normal(2, 2, 3), random_mlp(ranks=ranks, bias=bias, scaling=0.6), activation, Dropout(p, seed))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_slope(activation: str) -> None:
    g = torch.linspace(-12, 12, 401, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(activate(g, activation).sum(), g)
    torch.testing.assert_close(activation_slope(g.detach(), activation), expected, **ROUNDING)
    assert activation_slope(g.detach().bfloat16(), activation).dtype == torch.float32


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_is_transformers_mlp_when_merged(activation: str) -> None:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    sizes = {"hidden_size": 6, "intermediate_size": 10, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, mlp_bias=True, hidden_act=TRANSFORMERS_NAMES[activation])
    module, parts = LlamaMLP(config).double(), random_mlp(6, 10, bias=True)
    with torch.no_grad():
        for linear, part in zip((module.gate_proj, module.up_proj, module.down_proj), parts, strict=True):
            linear.weight.copy_(part.weight + part.scaling * part.lora_B @ part.lora_A)
            linear.bias.copy_(part.bias)
    x = normal(2, 3, 6)
    torch.testing.assert_close(lora_mlp(x, *parts, activation=activation), module(x), **ROUNDING)


def test_dropout_masks_x_once_and_the_hidden_with_the_next_stream() -> None:
    gate, up, down = random_mlp(16, 24)
    x, dropout = normal(5, 16), Dropout(0.5, 3)
    g, z = lora_linear(x, gate, dropout=dropout), lora_linear(x, up, dropout=dropout)
    expected = lora_linear(nn.functional.silu(g) * z, down, dropout=Dropout(0.5, 3, stream=1))
    assert torch.equal(lora_mlp(x, gate, up, down, activation="silu", dropout=dropout), expected)
    h = torch.ones(5, 24)
    assert not torch.equal(apply_dropout(h, dropout), apply_dropout(h, Dropout(0.5, 3, stream=1)))


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (3,), (2, 0, 3)])
def test_no_token_and_one(shape: tuple[int, ...]) -> None:
    parts = random_mlp(bias=True)
    assert lora_mlp(normal(*shape), *parts, activation="gelu").shape == shape
    check_mlp(normal(*shape), parts, "gelu", Dropout(0.3, 1), numerical=False)


def test_backward_on_nf4_weights() -> None:
    parts = [part._replace(weight=nf4_quantize(part.weight.float())) for part in random_mlp(8, 12)]
    check_mlp(normal(4, 8), parts, "silu", Dropout(0.3, 1))


def test_layout_does_not_matter() -> None:
    parts = random_mlp()
    for x in (normal(3, 7).T, normal(1, 3).expand(4, 3), normal(4, 6)[:, ::2]):
        found = lora_mlp(x, *parts, activation="gelu_tanh")
        torch.testing.assert_close(found, lora_mlp(x.contiguous(), *parts, activation="gelu_tanh"), **ROUNDING)
        check_mlp(x, parts, "gelu_tanh", None, numerical=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16_is_within_its_roundings(activation: str) -> None:
    """The error of each step, carried through the next: |act'| < 1.13 everywhere, and |act(g)| <= |g|."""
    gate, up, down = parts = random_mlp(33, 65, bias=True, dtype=torch.bfloat16)
    x = normal(40, 33, dtype=torch.bfloat16)
    y64 = lora_mlp(x.double(), *map(doubled, parts), activation=activation)
    g, z = (lora_linear(x.double(), doubled(part)) for part in (gate, up))
    error_g, error_z = (roundings(5) * linear_magnitude(x, part) for part in (gate, up))
    a = activate(g, activation).abs()
    error_a = 1.13 * error_g + roundings(2) * (g.abs() + error_g)
    error_h = error_a * (z.abs() + error_z) + a * error_z + roundings(1) * (a + error_a) * (z.abs() + error_z)
    h = a * z.abs()
    no_bias = down._replace(bias=None)
    bound = linear_magnitude(error_h, no_bias) + roundings(5) * linear_magnitude(h + error_h, down)
    error = (lora_mlp(x, *parts, activation=activation) - y64).abs()
    assert error.max() > 0
    assert (error <= bound).all()


@pytest.mark.parametrize("wrong", ["relu", "gelu_new", "", None])
@pytest.mark.parametrize("backward", [False, True])
def test_another_activation_is_refused(wrong: str, backward: bool) -> None:
    with pytest.raises(LoRAError, match="expected one of 'silu', 'gelu', 'gelu_tanh'"):
        if backward:
            lora_mlp_backward(normal(2, 3), normal(2, 3), *random_mlp(), activation=wrong)
        else:
            lora_mlp(normal(2, 3), *random_mlp(), activation=wrong)
