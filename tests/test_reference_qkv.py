"""lora_qkv: three projections of one x, under one dropout mask."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    check_backward,
    constant_dora_norm,
    deal,
    gradients_of,
    normal,
    random_projection,
    trainable,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora.projection import Dropout, Projection
from lora.reference.linear import lora_linear
from lora.reference.nf4 import nf4_quantize
from lora.reference.qkv import lora_qkv, lora_qkv_backward

RANKS = st.none() | st.integers(1, 3)


def check_qkv(x: Tensor, projections: list[Projection], dropout: Dropout | None, numerical: bool = True) -> None:
    def forward(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return lora_qkv(x, *deal(projections, tensors), dropout=dropout)

    def backward(dq: Tensor, dk: Tensor, dv: Tensor, x: Tensor, *tensors: Tensor) -> list[Tensor]:
        dealt = deal(projections, tensors)
        gradients = lora_qkv_backward(dq, dk, dv, x, *dealt, dropout=dropout)
        assert all(of.dx is None for of in gradients[1:])
        own = zip(projections, gradients[1:], strict=True)
        return [gradients.dx, *(tensor for each, of in own for tensor in gradients_of(each, of))]

    tensors = [tensor for projection in projections for tensor in trainable(projection)]
    check_backward(forward, backward, [x, *tensors], numerical=numerical)


@given(
    ranks=st.tuples(RANKS, RANKS, RANKS),
    biases=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    features=st.sampled_from([(4, 4, 4), (6, 2, 2), (4, 2, 1)]),
    p=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**31),
)
def test_backward(
    ranks: tuple[int | None, ...],
    biases: tuple[bool, ...],
    features: tuple[int, ...],
    p: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    parts = zip(features, ranks, biases, (0.7, -1.1, 1.9), strict=True)
    projections = [random_projection(out, 3, rank, bias=bias, scaling=s) for out, rank, bias, s in parts]
    check_qkv(normal(2, 2, 3), projections, Dropout(p, seed))


def test_backward_of_dora_on_one_of_three() -> None:
    projections = [random_projection(4, 3, 2, dora=True), random_projection(2, 3, None), random_projection(2, 3, 1)]
    with constant_dora_norm(torch.full((4,), 1.5, dtype=torch.float64)):
        check_qkv(normal(4, 3), projections, Dropout(0.3, 1))


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (8,), (2, 3, 8)])
@pytest.mark.parametrize("quantised", [False, True])
def test_is_three_linears_with_one_dropout(shape: tuple[int, ...], quantised: bool) -> None:
    q, k, v = (random_projection(out, 8, rank, bias=rank != 2) for out, rank in ((8, 3), (4, 2), (4, None)))
    if quantised:
        q = q._replace(weight=nf4_quantize(q.weight.float()))
    x, dropout = normal(*shape), Dropout(0.5, 3, stream=2)
    for found, projection in zip(lora_qkv(x, q, k, v, dropout=dropout), (q, k, v), strict=True):
        assert torch.equal(found, lora_linear(x, projection, dropout=dropout))
    check_qkv(x, [q, k, v], dropout, numerical=False)


def test_the_three_share_their_mask() -> None:
    """The same adapter three times over, on a frozen part of zero: with one mask the outputs are equal."""
    projection = random_projection(4, 16, 2)._replace(weight=torch.zeros(4, 16, dtype=torch.float64))
    q, k, v = lora_qkv(normal(5, 16), projection, projection, projection, dropout=Dropout(0.5, 3))
    assert torch.equal(q, k) and torch.equal(k, v) and q.abs().max() > 0


def test_layout_does_not_matter() -> None:
    projections = [random_projection(out, 4, 2) for out in (4, 2, 2)]
    x = normal(4, 6).T
    for found, expected in zip(lora_qkv(x, *projections), lora_qkv(x.contiguous(), *projections), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    check_qkv(normal(1, 3, 4).expand(2, 3, 4), projections, Dropout(0.5, 1), numerical=False)
