"""lora_linear: h = x Wᵀ + b + s (D(x) Aᵀ) Bᵀ."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ROUNDING,
    check_backward,
    constant_dora_norm,
    doubled,
    gradients_of,
    linear_magnitude,
    normal,
    random_projection,
    roundings,
    trainable,
    with_trainable,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora.projection import Dropout, Gradients, Projection
from lora.reference.dora import dora_norm
from lora.reference.dropout import apply_dropout
from lora.reference.linear import lora_linear, lora_linear_backward
from lora.reference.nf4 import nf4_dequantize, nf4_quantize

SIZES = st.integers(1, 6)


def check_linear(x: Tensor, projection: Projection, dropout: Dropout | None = None, numerical: bool = True) -> None:
    def forward(x: Tensor, *tensors: Tensor) -> Tensor:
        return lora_linear(x, with_trainable(projection, tensors), dropout=dropout)

    def backward(dy: Tensor, x: Tensor, *tensors: Tensor) -> list[Tensor]:
        gradients = lora_linear_backward(dy, x, with_trainable(projection, tensors), dropout=dropout)
        return [gradients.dx, *gradients_of(projection, gradients)]

    check_backward(forward, backward, [x, *trainable(projection)], numerical=numerical)


@given(
    leading=st.lists(st.integers(1, 3), max_size=2),
    sizes=st.tuples(SIZES, SIZES, st.none() | SIZES),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_backward(leading: list[int], sizes: tuple[int, int, int | None], bias: bool, p: float, seed: int) -> None:
    torch.manual_seed(seed)
    out_features, in_features, rank = sizes
    projection = random_projection(out_features, in_features, rank, bias=bias, scaling=-1.3)
    check_linear(normal(*leading, in_features), projection, Dropout(p, seed))


@given(bias=st.booleans(), p=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 2**31))
def test_backward_of_dora(bias: bool, p: float, seed: int) -> None:
    torch.manual_seed(seed)
    projection = random_projection(4, 3, 2, bias=bias, dora=True)
    norm = dora_norm(projection.weight, projection.lora_A, projection.lora_B, projection.scaling)
    with constant_dora_norm(norm):
        check_linear(normal(5, 3), projection, Dropout(p, seed))


@pytest.mark.parametrize("double_quant", [False, True])
def test_backward_on_an_nf4_weight(double_quant: bool) -> None:
    dense = random_projection(8, 12, 2, bias=True)
    projection = dense._replace(weight=nf4_quantize(dense.weight.float(), double_quant=double_quant))
    check_linear(normal(5, 12), projection, Dropout(0.25, 3))


def test_an_nf4_weight_is_its_dequantised_matrix() -> None:
    dense = random_projection(8, 12, 2, bias=True, dora=True)
    quantised = nf4_quantize(dense.weight.float())
    x = normal(5, 12)
    decoded = dense._replace(weight=nf4_dequantize(quantised, torch.float64))
    found = lora_linear(x, dense._replace(weight=quantised), dropout=Dropout(0.25, 3))
    torch.testing.assert_close(found, lora_linear(x, decoded, dropout=Dropout(0.25, 3)), rtol=1e-6, atol=1e-6)


def test_an_nf4_weight_is_not_kept_decoded_for_the_backward() -> None:
    saved: list[Tensor] = []
    projection = random_projection(64, 64, 2, dtype=torch.float32)
    projection = projection._replace(weight=nf4_quantize(projection.weight))
    x = normal(3, 64, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, projection)
    assert saved  # lora_A's and lora_B's products
    assert all(tensor.shape != (64, 64) for tensor in saved)


@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_equation_token_by_token(bias: bool) -> None:
    projection = random_projection(5, 4, 2, bias=bias, scaling=1.7)
    x, dropout = normal(2, 3, 4), Dropout(0.4, 9)
    dropped = apply_dropout(x, dropout)
    h = lora_linear(x, projection, dropout=dropout)
    for i, j in ((i, j) for i in range(2) for j in range(3)):
        expected = projection.weight @ x[i, j] + (projection.bias if bias else 0)
        expected = expected + 1.7 * (projection.lora_B @ (projection.lora_A @ dropped[i, j]))
        torch.testing.assert_close(h[i, j], expected, **ROUNDING)


def test_a_zero_lora_b_changes_nothing_bit_for_bit() -> None:
    projection = random_projection(5, 4, 2, bias=True, dtype=torch.bfloat16)
    projection = projection._replace(lora_B=torch.zeros_like(projection.lora_B))
    x = normal(7, 4, dtype=torch.bfloat16)
    assert torch.equal(lora_linear(x, projection), F.linear(x, projection.weight, projection.bias))


def test_stacked_adapters_are_one_projection() -> None:
    one, two = random_projection(5, 4, 2, scaling=0.5), random_projection(5, 4, 3, scaling=2.0)
    two = two._replace(weight=one.weight)
    both = one._replace(
        lora_A=torch.cat([one.lora_A, two.lora_A]),
        lora_B=torch.cat([0.5 * one.lora_B, 2.0 * two.lora_B], 1),
        scaling=1.0,
    )
    x = normal(6, 4)
    expected = lora_linear(x, one) + lora_linear(x, two) - x @ one.weight.T
    torch.testing.assert_close(lora_linear(x, both), expected, **ROUNDING)


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (4,), (2, 0, 4)])
@pytest.mark.parametrize("dora", [False, True])
def test_no_token_and_one(shape: tuple[int, ...], dora: bool) -> None:
    projection = random_projection(5, 4, 2, bias=True, dora=dora)
    assert lora_linear(normal(*shape), projection).shape == (*shape[:-1], 5)
    check_linear(normal(*shape), projection, Dropout(0.5, 1), numerical=False)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layout_does_not_matter(layout: str) -> None:
    x = {
        "transposed": normal(4, 6, 3).transpose(0, 2),
        "strided": normal(6, 6, 8)[::2, :, ::2],
        "expanded": normal(1, 6, 4).expand(3, 6, 4),
    }[layout]
    projection = random_projection(5, 4, 2, bias=True)
    projection = projection._replace(lora_A=normal(4, 2).T, weight=normal(4, 5).T)
    dropout, dy = Dropout(0.5, 2), normal(5).expand(3, 6, 5)
    plain = projection._replace(lora_A=projection.lora_A.contiguous(), weight=projection.weight.contiguous())
    expected = lora_linear(x.contiguous(), plain, dropout=dropout)
    torch.testing.assert_close(lora_linear(x, projection, dropout=dropout), expected, **ROUNDING)
    found = lora_linear_backward(dy, x, projection, dropout=dropout)
    expected = lora_linear_backward(dy.contiguous(), x.contiguous(), plain, dropout=dropout)
    for one, other in zip(found[:4], expected[:4], strict=True):
        torch.testing.assert_close(one, other, **ROUNDING)


def test_callers_tensors_are_left_alone() -> None:
    projection, x, dy = random_projection(5, 4, 2, bias=True, dora=True), normal(6, 4), normal(6, 5)
    tensors = [x, dy, projection.weight, *trainable(projection)]
    before = [(tensor.clone(), tensor._version) for tensor in tensors]
    lora_linear(x, projection, dropout=Dropout(0.5, 1))
    lora_linear_backward(dy, x, projection, dropout=Dropout(0.5, 1))
    assert all(
        torch.equal(t, copy) and t._version == version for t, (copy, version) in zip(tensors, before, strict=True)
    )


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_bfloat16_is_within_its_roundings(p: float) -> None:
    """Four roundings on the longest path (x Aᵀ, · s, · Bᵀ, the sum), two for dropout; one more for float32 sums."""
    projection = random_projection(33, 65, 4, bias=True, dtype=torch.bfloat16)
    x, dropout = normal(40, 65, dtype=torch.bfloat16), Dropout(p, 5)
    error = (
        lora_linear(x, projection, dropout=dropout) - lora_linear(x.double(), doubled(projection), dropout=dropout)
    ).abs()
    bound = roundings(7) * linear_magnitude(x, projection) * (2 if p else 1)  # a kept element is doubled
    assert error.max() > 0
    assert (error <= bound).all()


def test_adapters_in_float32_under_a_bfloat16_model() -> None:
    narrow = random_projection(5, 4, 2, bias=True, dora=True, dtype=torch.bfloat16)
    mixed = with_trainable(narrow, [tensor.float() for tensor in trainable(narrow)])
    x, dy = normal(6, 4, dtype=torch.bfloat16), normal(6, 5, dtype=torch.bfloat16)
    h = lora_linear(x, mixed)
    assert h.dtype == torch.bfloat16 and torch.equal(h, lora_linear(x, narrow))
    gradients = lora_linear_backward(dy, x, mixed)
    assert gradients.dx.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in gradients[1:])


def peft_layer(projection: Projection, *, dora: bool, dropout: Dropout | None) -> nn.Module:
    """PEFT's own layer with this projection's numbers, and our mask in place of its random one."""
    import peft

    out_features, in_features = projection.weight.shape
    rank = projection.lora_A.shape[0]
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=projection.bias is not None)).double()
    config = peft.LoraConfig(r=rank, lora_alpha=projection.scaling * rank, target_modules=["0"], use_dora=dora)
    layer = peft.inject_adapter_in_model(config, model)[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(projection.weight)
        if projection.bias is not None:
            layer.base_layer.bias.copy_(projection.bias)
        layer.lora_A["default"].weight.copy_(projection.lora_A)
        layer.lora_B["default"].weight.copy_(projection.lora_B)
        if dora:
            layer.lora_magnitude_vector["default"].weight.copy_(projection.magnitude)
    if dropout is not None:
        layer.lora_dropout["default"] = Masked(dropout)
    return layer


class Masked(nn.Module):
    def __init__(self, dropout: Dropout) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return apply_dropout(x, self.dropout)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [None, Dropout(0.3, 7)])
def test_agrees_with_peft(dora: bool, bias: bool, dropout: Dropout | None) -> None:
    projection = random_projection(6, 5, 2, bias=bias, dora=dora, scaling=1.5)
    layer = peft_layer(projection, dora=dora, dropout=dropout)
    x, dy = normal(3, 4, 5).requires_grad_(), normal(3, 4, 6)
    h = layer(x)
    torch.testing.assert_close(lora_linear(x, projection, dropout=dropout), h, **ROUNDING)
    h.backward(dy)
    found: Gradients = lora_linear_backward(dy, x.detach(), projection, dropout=dropout)
    torch.testing.assert_close(found.dx, x.grad, **ROUNDING)
    torch.testing.assert_close(found.dlora_A, layer.lora_A["default"].weight.grad, **ROUNDING)
    torch.testing.assert_close(found.dlora_B, layer.lora_B["default"].weight.grad, **ROUNDING)
    if dora:
        torch.testing.assert_close(found.dmagnitude, layer.lora_magnitude_vector["default"].weight.grad, **ROUNDING)
