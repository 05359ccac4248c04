"""The dropout kernels against `lora.reference.dropout`: the same mask for every element, the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora.errors import LoRAError
from lora.fast.kernels.add_product import dropout_add_product
from lora.fast.kernels.dropout import (
    TILE,
    dropout_add,
    dropout_forward,
    dropout_mask,
    keep_lanes,
    keep_mask,
    launch_key,
)
from lora.projection import Dropout
from lora.reference import dropout as reference
from lora.testing import assert_within

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEEDS = st.integers(-(2**70), 2**70)
RATES = st.one_of(st.sampled_from([0.0, 1 / 65536, 0.1, 0.5, 65535 / 65536]), st.floats(0, 0.999))
LAYOUTS = st.sampled_from(["plain", "slice", "transposed"])
Roundoff = Callable[[torch.dtype], float]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def laid_out(x: Tensor, layout: str, device: str) -> Tensor:
    """The same numbers, [tokens, features], in memory in another way."""
    tokens, features = x.shape
    if layout == "slice":  # of a wider buffer that is NaN elsewhere, from an odd element on
        wide = torch.full((tokens, features + 5), math.nan, dtype=x.dtype, device=device)
        wide[:, 3 : 3 + features] = x
        return wide[:, 3 : 3 + features]
    return x.to(device).T.contiguous().T if layout == "transposed" else x.to(device, copy=True)


def rounded(exact: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """Float32 numbers in `dtype` as the kernel's store rounds them: the interpreter cuts off to bfloat16."""
    if device == "cpu" and dtype == torch.bfloat16:
        exact = (exact.contiguous().view(torch.int32) & -(1 << 16)).view(torch.float32)
    return exact.to(dtype)


def expected_dropout(x: Tensor, dropout: Dropout, device: str) -> Tensor:
    """The reference in float32, where x ⊙ keep / (1 - p) is one rounding, and then one rounding more."""
    return rounded(reference.apply_dropout(x.float(), dropout), x.dtype, device)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Equal, and zeros of the same sign."""
    return torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())


@given(
    tokens=st.integers(1, 9),
    features=st.integers(1, 70),
    p=RATES,
    seed=SEEDS,
    stream=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    layout=LAYOUTS,
    into=st.sampled_from(["new", "slice", "itself"]),
)
def test_forward_is_the_reference(
    tokens: int,
    features: int,
    p: float,
    seed: int,
    stream: int,
    dtype: torch.dtype,
    layout: str,
    into: str,
    device: str,
) -> None:
    plain = normal(tokens, features, seed=seed % 1000, dtype=dtype)
    x = laid_out(plain, layout if into != "itself" or layout != "transposed" else "plain", device)
    wide = torch.full((tokens, features + 3), math.nan, dtype=dtype, device=device)
    out = {"new": None, "slice": wide[:, 1:-2], "itself": x}[into]
    found = dropout_forward(x, p, seed, stream, out=out)
    assert out is None or found is out
    assert same_bits(found.cpu(), expected_dropout(plain, Dropout(p, seed, stream), device))
    if into == "slice":
        assert wide[:, :1].isnan().all() and wide[:, -2:].isnan().all()


@given(
    tokens=st.integers(1, 9),
    features=st.integers(1, 70),
    p=RATES,
    seed=SEEDS,
    stream=st.integers(0, 3),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    layouts=st.tuples(st.sampled_from(["plain", "slice"]), LAYOUTS),
)
def test_add_is_the_reference(
    tokens: int,
    features: int,
    p: float,
    seed: int,
    stream: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    layouts: tuple[str, str],
    device: str,
    roundoff: Roundoff,
) -> None:
    """A product and a sum in float32, fused or not, and one rounding of the result."""
    before, y = (normal(tokens, features, seed=seed % 1000 + i, dtype=dtypes[i]) for i in (0, 1))
    dx = laid_out(before, layouts[0], device)
    assert dropout_add(dx, laid_out(y, layouts[1], device), p, seed, stream) is dx
    addend = reference.apply_dropout(y.double(), Dropout(p, seed, stream))
    truth, u = before.double() + addend, roundoff(dtypes[0])
    inner = 2**-24 * (3 * addend.abs() + before.double().abs() + addend.abs())  # scale, product, sum
    bound = u * truth.abs() + (1 + u) * inner + torch.finfo(dtypes[0]).smallest_normal * u
    if dtypes[0] == torch.float16:  # 1 / (1 - p) may be 65536
        truth = torch.where(truth.abs() > 65504, before.double(), truth)
        dx = torch.where(dx.isinf(), before.to(device), dx)
    assert_within(dx.cpu(), truth, bound, "dx")


@given(
    tokens=st.integers(1, 9) | st.sampled_from([65]),
    features=st.integers(1, 70) | st.sampled_from([129, 132]),
    r=st.integers(0, 9) | st.sampled_from([16, 33, 65]),
    p=RATES.filter(lambda p: p < 0.95),
    seed=SEEDS,
    stream=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(["plain", "slice"]), LAYOUTS, LAYOUTS),
)
def test_the_added_product_is_the_references(
    tokens: int,
    features: int,
    r: int,
    p: float,
    seed: int,
    stream: int,
    dtype: torch.dtype,
    layouts: tuple[str, str, str],
    device: str,
    roundoff: Roundoff,
) -> None:
    """A sum of r products in float32, in any order, times 1 / (1 - p), added and rounded once; the gaps stay NaN."""
    before, u, factor = (
        normal(*shape, seed=seed % 1000 + i, dtype=dtype)
        for i, shape in enumerate([(tokens, features), (tokens, r), (r, features)])
    )
    dx, *others = (laid_out(t, layout, device) for t, layout in zip((before, u, factor), layouts, strict=True))
    assert dropout_add_product(dx, *others, p, seed, stream) is dx
    share = reference.apply_dropout(torch.ones(tokens, features, dtype=torch.float64), Dropout(p, seed, stream))
    addend, sizes = u.double() @ factor.double() * share, u.double().abs() @ factor.double().abs() * share
    truth, unit = before.double() + addend, roundoff(dtype)
    inner = 2**-24 * ((r + 3) * sizes + before.double().abs())  # r sums of exact products, the scale, the sum
    bound = unit * truth.abs() + (1 + unit) * inner + torch.finfo(dtype).smallest_normal * unit
    assert_within(dx.cpu(), truth, bound, "dx")
    if layouts[0] == "slice":
        assert dx._base is not None and dx._base[:, :3].isnan().all() and dx._base[:, 3 + features :].isnan().all()


@pytest.mark.parametrize(
    "change",
    [
        lambda dx, u, factor: (dx, u[:, :2], factor),
        lambda dx, u, factor: (dx, u[:2], factor),
        lambda dx, u, factor: (dx, u, factor[:, 1:]),
        lambda dx, u, factor: (dx, u.half(), factor),
        lambda dx, u, factor: (dx.double(), u.double(), factor.double()),
    ],
)
def test_a_product_that_does_not_fit_says_so(change: Callable[..., tuple[Tensor, ...]], device: str) -> None:
    operands = (normal(4, 8).to(device), normal(4, 3).to(device), normal(3, 8).to(device))
    with pytest.raises(LoRAError, match="u and factor are"):
        dropout_add_product(*change(*operands), 0.1, 1)


@given(shape=st.lists(st.integers(0, 9), max_size=4), p=RATES, seed=SEEDS, stream=st.integers(0, 3))
def test_mask_is_the_reference(shape: list[int], p: float, seed: int, stream: int, device: str) -> None:
    found = dropout_mask(shape, p, seed, stream, device)
    assert torch.equal(found.cpu(), reference.dropout_mask(shape, p, seed, stream=stream))


@pytest.mark.parametrize("features", [TILE + 9, 2 * TILE + 8, TILE])
def test_rows_longer_than_a_tile(features: int, device: str) -> None:
    """Without gaps, and with gaps: rows that begin with a whole word of the mask and rows that do not."""
    x, dropout = normal(3, features), Dropout(0.3, 11, 2)
    expected = expected_dropout(x, dropout, device)
    for layout in ("plain", "slice"):
        y = laid_out(x, layout, device)
        assert same_bits(dropout_forward(y, *dropout).cpu(), expected)
        dx = laid_out(torch.zeros_like(x), layout, device)
        dropout_add(dx, y, *dropout)
        assert torch.equal(dx.cpu(), expected)
    mask = dropout_mask((3, features), *dropout, device)
    assert torch.equal(mask.cpu(), reference.dropout_mask((3, features), 0.3, 11, stream=2))


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 8), (2, 3, 5), (0, 8), (8, 0)])
def test_any_rank_and_no_element(shape: tuple[int, ...], device: str) -> None:
    x, dropout = normal(*shape), Dropout(0.4, 5)
    assert same_bits(dropout_forward(x.to(device), *dropout).cpu(), expected_dropout(x, dropout, device))
    assert torch.equal(dropout_add(x.to(device, copy=True), x.to(device), 0.0, 5).cpu(), x + x)
    assert dropout_mask(shape, *dropout, device).shape == shape


def test_expanded_input(device: str) -> None:
    x, dropout = normal(1, 12), Dropout(0.4, 5)
    found = dropout_forward(x.to(device).expand(7, 12), *dropout)
    assert same_bits(found.cpu(), expected_dropout(x.expand(7, 12), dropout, device))


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
def test_infinities_and_nan_are_not_hidden(device: str) -> None:
    """0 · ∞ is NaN, as in the reference: a mask is no cure for a broken activation."""
    x = torch.tensor([math.inf, -math.inf, math.nan, -1.0]).repeat(16)
    found = dropout_forward(x.to(device), 0.5, 3).cpu()
    expected = reference.apply_dropout(x, Dropout(0.5, 3))
    assert expected.isnan().sum() > 16  # some of the infinities were dropped
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@triton.jit
def keep_far_away(word_ptr, element_ptr, key: tl.int64, start: tl.int64, drop, WORDS: tl.constexpr):
    """The mask of 4 · WORDS elements from `start` on: by words, as a [2, ...] tile, and element by element."""
    start = tl.full((1, 1), start, tl.int64)  # the interpreter passes a small number in 32 bits
    o_word = tl.arange(0, 2)[:, None] * (WORDS // 2) + tl.arange(0, WORDS // 2)[None, :]
    o_element = tl.arange(0, 2)[:, None] * (2 * WORDS) + tl.arange(0, 2 * WORDS)[None, :]
    m_word = keep_lanes(key, start // 4 + o_word, drop)
    tl.store(word_ptr + o_element, m_word.to(tl.uint8))
    tl.store(element_ptr + o_element, keep_mask(key, start + o_element, drop).to(tl.uint8))


@pytest.mark.parametrize("start", [0, 2**31 - 64, 2**33 + 4, 2**40])
@pytest.mark.parametrize("seed", [0, -1, 12345])
def test_device_functions_count_in_64_bits(start: int, seed: int, device: str) -> None:
    by_word, by_element = (torch.full((128,), 7, dtype=torch.uint8, device=device) for _ in range(2))
    keep_far_away[(1,)](by_word, by_element, launch_key(seed, 1), start, 20000, WORDS=32)
    key = reference.key_of(seed, 1)
    words = [reference.mix((key + (start + i) // 4 * reference.GAMMA) % 2**64) for i in range(128)]
    expected = [int((words[i] >> 16 * (i % 4)) & 0xFFFF >= 20000) for i in range(128)]
    assert by_word.tolist() == expected and by_element.tolist() == expected


def test_bad_input_is_refused(device: str) -> None:
    x = normal(4, 6).to(device)
    for p in (1.0, -0.1, math.nan):
        for call in (
            lambda p=p: dropout_forward(x, p, 0),
            lambda p=p: dropout_add(x, x, p, 0),
            lambda p=p: dropout_mask((4,), p, 0, 0, device),
        ):
            with pytest.raises(LoRAError, match=r"expected a number in \[0, 1\)"):
                call()
    for out in (x.new_empty(4, 7), x.new_empty(6, 4).T, x.new_empty(1, 6).expand(4, 6)):
        with pytest.raises(LoRAError, match=r"out is .* expected \[4, 6\] with neighbouring"):
            dropout_forward(x, 0.5, 0, out=out)
        with pytest.raises(LoRAError, match=r"dx is .* expected \[4, 6\] with neighbouring"):
            dropout_add(out, x, 0.5, 0)
    with pytest.raises(LoRAError, match=r"dropout of torch.float64 into torch.float64"):
        dropout_forward(x.double(), 0.5, 0)
