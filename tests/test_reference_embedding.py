"""lora_embedding: h = W[ids] + s (Aᵀ[ids]) Bᵀ."""

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
    normal,
    random_projection,
    roundings,
    trainable,
    with_trainable,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora.errors import LoRAError, UnsupportedError
from lora.projection import Projection
from lora.reference.dora import dora_norm
from lora.reference.embedding import lora_embedding, lora_embedding_backward
from lora.reference.linear import lora_linear, lora_linear_backward
from lora.reference.nf4 import nf4_quantize


def random_table(vocab: int, dim: int, rank: int | None = 2, *, dora: bool = False, **options: object) -> Projection:
    """A projection of one-hot vectors, its weight stored as a table."""
    projection = random_projection(dim, vocab, rank, dora=dora, **options)
    return projection._replace(weight=projection.weight.T.contiguous())


def check_embedding(ids: Tensor, table: Projection, padding_idx: int | None = None, numerical: bool = True) -> None:
    def forward(*tensors: Tensor) -> Tensor:
        return lora_embedding(ids, with_trainable(table, tensors), padding_idx=padding_idx)

    def backward(dy: Tensor, *tensors: Tensor) -> list[Tensor]:
        gradients = lora_embedding_backward(dy, ids, with_trainable(table, tensors), padding_idx=padding_idx)
        assert gradients.dx is None
        return gradients_of(table, gradients)

    check_backward(forward, backward, trainable(table), numerical=numerical)


@given(
    leading=st.lists(st.integers(1, 4), max_size=2),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3)),
    dtype=st.sampled_from([torch.int64, torch.int32]),
    dora=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_backward(leading: list[int], sizes: tuple[int, int, int], dtype: torch.dtype, dora: bool, seed: int) -> None:
    torch.manual_seed(seed)
    table = random_table(*sizes, dora=dora)
    ids = torch.randint(sizes[0], leading, dtype=dtype)  # ids repeat: their gradients add
    norm = dora_norm(table.weight.T, table.lora_A, table.lora_B, table.scaling)
    with constant_dora_norm(norm):
        check_embedding(ids, table)


def test_forward_is_the_linear_layer_of_one_hot_rows() -> None:
    table = random_table(7, 4, 3, dora=True, scaling=1.7)
    ids = torch.randint(7, (3, 5))
    one_hot, linear = F.one_hot(ids, 7).double(), table._replace(weight=table.weight.T)
    torch.testing.assert_close(lora_embedding(ids, table), lora_linear(one_hot, linear), **ROUNDING)
    dy = normal(3, 5, 4)
    found, expected = lora_embedding_backward(dy, ids, table), lora_linear_backward(dy, one_hot, linear)
    torch.testing.assert_close(found.dlora_A, expected.dlora_A, **ROUNDING)
    torch.testing.assert_close(found.dlora_B, expected.dlora_B, **ROUNDING)
    torch.testing.assert_close(found.dmagnitude, expected.dmagnitude, **ROUNDING)


def test_without_an_adapter_it_is_an_embedding() -> None:
    table, ids = random_table(7, 4, None), torch.randint(7, (3, 5))
    assert torch.equal(lora_embedding(ids, table), F.embedding(ids, table.weight))
    assert lora_embedding_backward(normal(3, 5, 4), ids, table) == (None,) * 5


def test_the_padding_id_is_looked_up_but_not_learned() -> None:
    table, ids = random_table(6, 4, 2), torch.tensor([[0, 5, 1], [5, 5, 2]])
    assert torch.equal(lora_embedding(ids, table, padding_idx=5), lora_embedding(ids, table))
    dy = normal(2, 3, 4)
    for padding_idx in (5, -1):
        check_embedding(ids, table, padding_idx=padding_idx, numerical=False)
        found = lora_embedding_backward(dy, ids, table, padding_idx=padding_idx)
        full = lora_embedding_backward(dy, ids, table)
        assert (found.dlora_A[:, 5] == 0).all() and (full.dlora_A[:, 5] != 0).all()
        assert torch.equal(found.dlora_A[:, :5], full.dlora_A[:, :5])
        assert torch.equal(found.dlora_B, full.dlora_B)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_agrees_with_peft(dora: bool, padding_idx: int | None) -> None:
    import peft

    table, ids = random_table(7, 4, 2, dora=dora, scaling=1.5), torch.randint(7, (3, 5))
    ids[0, 0] = 2
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=padding_idx)).double()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=dora)
    layer = peft.inject_adapter_in_model(config, model)[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(table.weight)
        layer.lora_embedding_A["default"].copy_(table.lora_A)
        layer.lora_embedding_B["default"].copy_(table.lora_B)
        if dora:
            layer.lora_magnitude_vector["default"].weight.copy_(table.magnitude)
    h, dy = layer(ids), normal(3, 5, 4)
    torch.testing.assert_close(lora_embedding(ids, table, padding_idx=padding_idx), h, **ROUNDING)
    h.backward(dy)
    found = lora_embedding_backward(dy, ids, table, padding_idx=padding_idx)
    torch.testing.assert_close(found.dlora_A, layer.lora_embedding_A["default"].grad, **ROUNDING)
    torch.testing.assert_close(found.dlora_B, layer.lora_embedding_B["default"].grad, **ROUNDING)
    if dora:
        torch.testing.assert_close(found.dmagnitude, layer.lora_magnitude_vector["default"].weight.grad, **ROUNDING)


@pytest.mark.parametrize("shape", [(0,), (1,), (), (2, 0)])
@pytest.mark.parametrize("dora", [False, True])
def test_no_token_and_one(shape: tuple[int, ...], dora: bool) -> None:
    table, ids = random_table(7, 4, 2, dora=dora), torch.randint(7, shape)
    assert lora_embedding(ids, table).shape == (*shape, 4)
    check_embedding(ids, table, numerical=False)


def test_layout_does_not_matter() -> None:
    table, ids = random_table(7, 4, 2), torch.randint(7, (5, 6))
    strided, dy = ids.T[::2], normal(4).expand(3, 5, 4)
    assert not strided.is_contiguous()
    assert torch.equal(lora_embedding(strided, table), lora_embedding(strided.contiguous(), table))
    found = lora_embedding_backward(dy, strided, table)
    expected = lora_embedding_backward(dy.contiguous(), strided.contiguous(), table)
    torch.testing.assert_close(found.dlora_A, expected.dlora_A, **ROUNDING)
    torch.testing.assert_close(found.dlora_B, expected.dlora_B, **ROUNDING)


def test_bfloat16_is_within_its_roundings() -> None:
    """Three roundings on the longest path (s · Aᵀ, · Bᵀ, the sum); one more for float32 sums."""
    table, ids = random_table(50, 33, 4, dtype=torch.bfloat16), torch.randint(50, (200,))
    error = (lora_embedding(ids, table) - lora_embedding(ids, doubled(table))).abs()
    absolute = table._replace(weight=table.weight.abs(), lora_A=table.lora_A.abs(), lora_B=table.lora_B.abs())
    assert error.max() > 0
    assert (error <= roundings(4) * lora_embedding(ids, doubled(absolute))).all()


def test_adapters_in_float32_under_a_bfloat16_table() -> None:
    narrow, ids = random_table(7, 4, 2, dora=True, dtype=torch.bfloat16), torch.randint(7, (3, 5))
    mixed = with_trainable(narrow, [tensor.float() for tensor in trainable(narrow)])
    h = lora_embedding(ids, mixed)
    assert h.dtype == torch.bfloat16 and torch.equal(h, lora_embedding(ids, narrow))
    gradients = lora_embedding_backward(normal(3, 5, 4).bfloat16(), ids, mixed)
    assert all(gradient.dtype == torch.float32 for gradient in gradients_of(mixed, gradients))


def test_a_frequent_id_sums_its_gradient_in_float32() -> None:
    """512 equal terms: summed in bfloat16 they stop growing at 256, for 256 + 1 rounds back to 256."""
    table = Projection(
        torch.ones(3, 1, dtype=torch.bfloat16),
        lora_A=torch.ones(1, 3, dtype=torch.bfloat16),
        lora_B=torch.ones(1, 1, dtype=torch.bfloat16),
    )
    ids, dy = torch.full((512,), 1), torch.ones(512, 1, dtype=torch.bfloat16)
    assert lora_embedding_backward(dy, ids, table).dlora_A.tolist() == [[0.0, 512.0, 0.0]]


@pytest.mark.parametrize(("wrong", "position"), [(7, r"\(1, 2\)"), (-1, r"\(1, 2\)")])
def test_an_id_outside_the_table_is_named(wrong: int, position: str) -> None:
    ids = torch.randint(7, (2, 3))
    ids[1, 2] = wrong
    with pytest.raises(LoRAError, match=f"Token id {wrong} at position {position} .* 0 to 6"):
        lora_embedding(ids, random_table(7, 4, 2))


def test_ids_of_another_kind_are_refused() -> None:
    with pytest.raises(LoRAError, match=r"torch\.float32, expected int64 or int32"):
        lora_embedding(torch.zeros(2), random_table(7, 4, 2))


def test_a_table_that_is_none_is_refused() -> None:
    table, ids = random_table(8, 8, 2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UnsupportedError, match="quantise only linear layers"):
        lora_embedding(ids, table._replace(weight=nf4_quantize(table.weight.float())))
    with pytest.raises(LoRAError, match="has a bias, expected none"):
        lora_embedding(ids, table._replace(bias=normal(8)))
