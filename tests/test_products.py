"""Matrix products, by whichever library makes them."""

import pytest
import torch
from tiny import tiny_llama

import lora
from lora.fast import products

ONEDNN = products.onednn_is_there()
SHAPES = [(1, 1, 1), (1, 70, 40), (33, 1, 40), (33, 70, 1), (129, 65, 47)]


def within(y: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether a float32 product is within the bound of one sum in any order: k · u · |left| |right|."""
    exact, room = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    return bool(((y.double() - exact).abs() <= (left.shape[1] + 1) * 2.0**-24 * room).all())


def views(m: int, n: int) -> dict[str, torch.Tensor]:
    """[m, n] matrices that lie in memory in every way that an operand does."""
    g = torch.Generator().manual_seed(m * n)
    numbers = torch.randn(2 * m * n + 7, generator=g)
    return {
        "rows": numbers[: m * n].view(m, n),
        "columns": numbers[: m * n].view(n, m).T,
        "an odd address": numbers[3 : m * n + 3].view(m, n),
        "half of wider rows": numbers[: 2 * m * n].view(m, 2 * n)[:, :n],
        "every second": numbers[: 2 * m * n].view(m, 2 * n)[:, ::2],
        "one row, again and again": numbers[:n].expand(m, n),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", ["product", "tall_product"])
def test_products_are_right_wherever_operands_lie(shape, function):
    m, k, n = shape
    for left_name, left in views(m, k).items():
        for right_name, right in views(k, n).items():
            before = left.clone(), right.clone()
            y = getattr(products, function)(left, right)
            assert y.shape == (m, n) and within(y, left, right), (left_name, right_name)
            assert torch.equal(left, before[0]) and torch.equal(right, before[1])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_nothing_times_something(shape):
    m, k, n = shape
    assert torch.equal(products.product(torch.ones(m, k), torch.ones(k, n)), torch.zeros(m, n))


def counted(monkeypatch) -> list[int]:
    """One number for each product that oneDNN makes; none ever where this build of PyTorch has no oneDNN."""
    calls: list[int] = []
    if not ONEDNN:
        return calls
    plain = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: (calls.append(1), plain(*a))[1])
    return calls


def test_a_model_is_multiplied_by_onednn_unless_it_is_turned_off(monkeypatch):
    calls = counted(monkeypatch)
    ids = torch.arange(3, 12)[None]
    with lora.use_backend("fast"):
        model = lora.for_training(lora.inject(tiny_llama(), lora.LoRAConfig(r=4, init_lora_weights=False)))
        model(ids, labels=ids).loss.backward()
        assert bool(calls) == ONEDNN
        del calls[:]
        with torch.backends.mkldnn.flags(enabled=False):
            model(ids, labels=ids).loss.backward()
        assert not calls


@pytest.mark.parametrize(
    ("k", "n", "forward", "lopsided"),
    [
        (64, 64, True, False), (65, 64, True, True), (64, 65, True, False),
        (65, 64, False, False), (4096, 64, False, False), (4097, 64, False, True),
        (4096, 5000, True, False), (4097, 5000, True, True),
    ],
)  # fmt: skip
def test_what_meets_few_large_numbers_is_mms(monkeypatch, k, n, forward, lopsided):
    """x Wᵀ of a layer that makes rows narrower, and any sum of more than 4,096 terms."""
    calls = counted(monkeypatch)
    x, w = torch.randn(3, k), torch.randn(n, k).T if forward else torch.randn(k, n)
    y = products.product(x, w)
    assert bool(calls) == (ONEDNN and not lopsided)
    assert not lopsided or torch.equal(y, torch.mm(x, w))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_are_mms(monkeypatch, dtype):
    calls = counted(monkeypatch)
    x, w = torch.randn(5, 7).to(dtype), torch.randn(7, 3).to(dtype)
    assert torch.equal(products.product(x, w), torch.mm(x, w))
    assert not calls
