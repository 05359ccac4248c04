"""The laws themselves: what they say of a right operation is no longer so of a wrong one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lora.fast
from lora.projection import Projection
from lora.testing.cases import Layer, LinearInput
from proof.laws import Run, assert_scaled, law_the_update_is_linear

CASE = LinearInput(shape=(7,), in_features=33, layer=Layer(17, 4, scaling=1.5))


def with_update(update: Callable[[Tensor, Projection], Tensor]) -> Callable[..., Tensor]:
    """`lora_linear` without dropout, with another update than s (x Aᵀ) Bᵀ."""

    def lora_linear(x: Tensor, projection: Projection, dropout: None = None) -> Tensor:
        return x @ projection.weight.T + update(x, projection)

    return lora_linear


def right(x: Tensor, p: Projection) -> Tensor:
    return x @ p.lora_A.T @ p.lora_B.T * p.scaling


WRONG = {
    "none": lambda x, p: 0 * right(x, p),
    "cubic": lambda x, p: right(x, p) ** 3,
    "nearly linear": lambda x, p: right(x, p) + 1e-3 * right(x, p) ** 3,
    "its size": lambda x, p: right(x, p).abs(),
    "with an end": lambda x, p: right(x, p).clamp(-3, 3),
    "s twice": lambda x, p: right(x, p) * p.scaling,
    "s left out": lambda x, p: x @ p.lora_A.T @ p.lora_B.T,
    "B's direction": lambda x, p: right(x, p) / p.lora_B.detach().norm().clamp(min=1),
    "B squared": lambda x, p: right(x, p._replace(lora_B=p.lora_B * p.lora_B.abs())),
    "part of it beside B": lambda x, p: right(x, p._replace(lora_B=p.lora_B + 1e-3 * p.lora_B.sign())),
    "dB of another B": lambda x, p: right(x, p._replace(lora_B=Doubly.apply(p.lora_B))),
    "dA that does not know of B": lambda x, p: right(x, p._replace(lora_A=p.lora_A.detach()))
    + (p.lora_A - p.lora_A.detach()).sum(),
}  # fmt: skip


class Doubly(torch.autograd.Function):
    """B, with a gradient that grows with it."""

    @staticmethod
    def forward(ctx, B):
        ctx.save_for_backward(B)
        return B.clone()

    @staticmethod
    def backward(ctx, dB):
        return dB * ctx.saved_tensors[0].square()


def holds(device: str) -> bool:
    try:
        law_the_update_is_linear(Run(CASE, "fast", device), "projection")
    except AssertionError:
        return False
    return True


def test_a_linear_update_is_linear(device, monkeypatch):
    assert holds(device)
    monkeypatch.setattr(lora.fast, "lora_linear", with_update(right))
    assert holds(device)


@pytest.mark.parametrize("wrong", WRONG)
def test_an_update_that_is_not_linear_or_not_there_is_rejected(device, monkeypatch, wrong):
    monkeypatch.setattr(lora.fast, "lora_linear", with_update(WRONG[wrong]))
    assert not holds(device)


def test_a_factor_of_two_is_exact_but_for_what_is_subnormal():
    value = torch.tensor([3.0, 1e-30, 1e-40])
    assert_scaled(value * 2, value, 2)
    assert_scaled(value * 2 + torch.tensor([0.0, 0.0, 1e-43]), value, 2)
    for wrong in (value * 2.0000002, value * 2 + torch.tensor([0.0, 1e-37, 0.0]), value * torch.tensor([2.0, 2, 1e6])):
        with pytest.raises(AssertionError, match="differs in"):
            assert_scaled(wrong, value, 2)
    with pytest.raises(AssertionError, match="differs in"):  # an infinite element leaves no room to the others
        assert_scaled(torch.tensor([torch.inf, 2.1]), torch.tensor([torch.inf, 1.0]), 2)
