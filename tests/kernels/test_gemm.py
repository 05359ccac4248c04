"""The products of a LoRA linear layer, kernel by kernel, against the same products in float64.

Every kernel gets its operands as given (u is not made by the kernel under test), so its bound has two terms: float32
sums of K products, and one rounding of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora.errors import LoRAError, UnsupportedError
from lora.fast.kernels import gemm
from lora.fast.kernels.gemm import (
    Tile,
    lora_A_gradient,
    lora_B_gradient,
    lora_gemm,
    lora_gemm_dx,
    skinny_gemm,
    tile_for,
    token_splits,
)
from lora.projection import Dropout, Projection
from lora.reference.dropout import apply_dropout
from lora.reference.linear import lora_linear, lora_linear_backward
from lora.testing import SPREAD, LinearCase, assert_within, in_float64, linear_bounds, unit_roundoff

SMALL = Tile(16, 16, 16, 4, 2)  # several tiles, groups and steps in the smallest matrices
RANKS = st.one_of(st.integers(1, 20), st.sampled_from([64, 65, 70]))  # kernels take 64 at a time
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Roundoff = Callable[[torch.dtype], float]


def normal(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(device)


def strided(x: Tensor, spare: int = 3) -> Tensor:
    """The same numbers, as columns of a wider buffer that is NaN elsewhere."""
    buffer = torch.full((len(x), x.shape[1] + spare), math.nan, dtype=x.dtype, device=x.device)
    buffer[:, 1 : 1 + x.shape[1]] = x
    return buffer[:, 1 : 1 + x.shape[1]]


def dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    return apply_dropout(x.double().cpu(), dropout)


def check(actual: Tensor, products: list[tuple[Any, ...]], rounding: float, plus: Tensor | float = 0.0) -> float:
    """Holds `actual` to Σ factor · (a @ b) + plus, for (a, b, factor) in products: float32 sums, rounded once."""
    wide = [(a.double().cpu(), b.double().cpu(), factor) for a, b, factor in products]
    truth = sum(factor * (a @ b) for a, b, factor in wide) + plus
    sizes = sum(abs(factor) * (a.abs() @ b.abs()) for a, b, factor in wide) + abs(plus)
    terms = sum(a.shape[1] for a, _, _ in wide) + 4  # the scale, the bias, and their own rounding
    u32, info = unit_roundoff(torch.float32), torch.finfo(actual.dtype)
    bound = SPREAD * u32 * math.sqrt(terms) * sizes + rounding * truth.abs() + info.smallest_normal * info.eps
    return assert_within(actual.cpu(), truth, bound)


@given(
    M=st.integers(1, 50), K=st.integers(1, 50), N=st.integers(1, 50), R=RANKS,
    dtype=st.sampled_from(DTYPES), views=st.booleans(), bias=st.booleans(), scale=st.sampled_from([1.0, 2.0, -0.3]),
    transposed=st.booleans(), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_forward(
    device: str, roundoff: Roundoff, M: int, K: int, N: int, R: int, dtype: torch.dtype, views: bool, bias: bool,
    scale: float, transposed: bool, seed: int,
) -> None:  # fmt: skip
    def make(*shape: int, number: int) -> Tensor:
        return normal(*shape, seed=seed + number, dtype=dtype, device=device)

    x, weight, u, B = make(M, K, number=0), make(N, K, number=1), make(M, R, number=2), make(N, R, number=3)
    b = make(N, number=4) if bias else None
    if views:
        x, weight, u, B = strided(x), strided(weight), strided(u), strided(B)
    if transposed:
        weight, B = weight.T.contiguous().T, B.T.contiguous().T
    buffer = torch.full((M, N + 2), math.nan, dtype=dtype, device=device)
    out = lora_gemm(x, weight, u, B, b, scale, buffer[:, 1 : N + 1], tile=SMALL)
    assert out.data_ptr() == buffer[:, 1:].data_ptr()
    assert buffer[:, 0].isnan().all() and buffer[:, N + 1].isnan().all()
    plus = 0.0 if b is None else b.double().cpu()
    check(out, [(x, weight.T, 1.0), (u, B.T, scale)], roundoff(dtype), plus)


def test_more_rows_of_tiles_than_go_together(device: str, roundoff: Roundoff) -> None:
    M = 16 * (gemm.GROUP_M + 3)  # one whole group, and one of three
    x, weight, u, B = (
        normal(*s, seed=i, dtype=torch.float16, device=device) for i, s in enumerate([(M, 9), (33, 9), (M, 2), (33, 2)])
    )
    check(lora_gemm(x, weight, u, B, tile=SMALL), [(x, weight.T, 1.0), (u, B.T, 1.0)], roundoff(torch.float16))


@given(
    M=st.integers(1, 40), K=st.integers(1, 40), N=st.integers(1, 40), R=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES), p=st.sampled_from([0.0, 0.25, 0.9]), stream=st.integers(0, 1),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_input_gradient(
    device: str, roundoff: Roundoff, M: int, K: int, N: int, R: int, dtype: torch.dtype, p: float, stream: int,
    seed: int,
) -> None:  # fmt: skip
    def make(*shape: int, number: int) -> Tensor:
        return normal(*shape, seed=seed + number, dtype=dtype, device=device)

    dy, weight, du, A = make(M, N, number=0), make(N, K, number=1), make(M, R, number=2), make(R, K, number=3)
    dropout = Dropout(p, seed, stream) if p else None
    dx = lora_gemm_dx(dy, weight, du, A, dropout, tile=SMALL)
    kept = dropped(torch.ones(M, K), dropout)  # 0 or 1 / (1 - p), an exact factor of the bound as of the truth
    wide_dy, wide_W, wide_du, wide_A = (t.double().cpu() for t in (dy, weight, du, A))
    truth, info = wide_dy @ wide_W + kept * (wide_du @ wide_A), torch.finfo(dtype)
    sizes = wide_dy.abs() @ wide_W.abs() + kept * (wide_du.abs() @ wide_A.abs())
    sums = SPREAD * unit_roundoff(torch.float32) * math.sqrt(N + R + 4) * sizes
    assert_within(dx.cpu(), truth, sums + roundoff(dtype) * truth.abs() + info.smallest_normal * info.eps)


@given(
    M=st.integers(1, 70), K=st.integers(1, 300), R=RANKS, dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.25, 0.9]), scale=st.sampled_from([1.0, 0.7]), columns=st.booleans(),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_skinny(
    device: str, roundoff: Roundoff, M: int, K: int, R: int, dtype: torch.dtype, p: float, scale: float, columns: bool,
    seed: int,
) -> None:  # fmt: skip
    x = strided(normal(M, K, seed=seed, dtype=dtype, device=device))
    A = normal(R, K, seed=seed + 1, dtype=dtype, device=device)
    A = A.T.contiguous().T if columns else A
    dropout = Dropout(p, seed, 1) if p else None
    buffer = torch.full((M, R + 2), math.nan, dtype=dtype, device=device)
    u = skinny_gemm(x, A, dropout, scale, buffer[:, 1 : R + 1])
    assert buffer[:, 0].isnan().all() and buffer[:, R + 1].isnan().all()
    check(u, [(dropped(x, dropout), A.T, scale)], roundoff(dtype))


@given(
    tokens=st.sampled_from([1, 33, 70, 256, 600, 801]), N=st.integers(1, 70), R=RANKS,
    dtype=st.sampled_from(DTYPES), p=st.sampled_from([0.0, 0.25]), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_gradients_of_A_and_B(
    device: str, tokens: int, N: int, R: int, dtype: torch.dtype, p: float, seed: int
) -> None:
    wide = strided(normal(tokens, N, seed=seed, dtype=dtype, device=device))
    thin = strided(normal(tokens, R, seed=seed + 1, dtype=dtype, device=device))
    dropout = Dropout(p, seed) if p else None
    dA, dB = lora_A_gradient(thin, wide, dropout), lora_B_gradient(wide, thin)
    rounding = unit_roundoff(torch.float32)
    check(dA, [(thin.T, dropped(wide, dropout), 1.0)], rounding)
    check(dB, [(wide.T, thin, 1.0)], rounding)
    assert torch.equal(dB, lora_B_gradient(wide, thin))


def test_the_tokens_of_a_sum_are_split() -> None:
    """The test above reaches both steps, parts of several blocks, and a last part that is short."""
    splits, span = token_splits(801, 70, 3, torch.float32)
    assert splits == 3 and span * 2 < 801 < span * 3 and span > 32
    assert token_splits(256, 70, 3, torch.float32)[0] == 1
    for tokens, N, r in ((8192, 4096, 16), (8192, 14336, 16), (8192, 1024, 16), (100_000, 4096, 64)):
        splits, span = token_splits(tokens, N, r, torch.bfloat16)
        assert splits * span >= tokens > (splits - 1) * span
        assert splits * r * N * 4 * 2 <= 0.1 * tokens * N * 2  # written and read


def test_gradients_in_the_dtype_of_the_adapter(device: str, roundoff: Roundoff) -> None:
    wide, thin = (normal(700, n, seed=n, dtype=torch.bfloat16, device=device) for n in (24, 3))
    dB = lora_B_gradient(wide, thin, torch.bfloat16)
    assert dB.dtype == torch.bfloat16 and token_splits(700, 24, 3, torch.bfloat16)[0] > 1
    check(dB, [(wide.T, thin, 1.0)], roundoff(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_layer_is_the_reference(device: str, dtype: torch.dtype) -> None:
    """Forward and backward from these kernels alone, in their own tiles, within the bound every backend is held to."""
    case = LinearCase(tokens=40, in_features=48, out_features=37, rank=5, dtype=dtype, bias=True, scaling=1.5)
    x, projection, dy = (t.to(device) if isinstance(t, Tensor) else t for t in case.build())
    projection = Projection(*(t.to(device) if isinstance(t, Tensor) else t for t in projection))
    weight, bias, A, B, s, _ = projection
    u = skinny_gemm(x, A, None, s)
    du = skinny_gemm(dy, B.T, None, s)
    found = {
        "h": lora_gemm(x, weight, u, B, bias),
        "dx": lora_gemm_dx(dy, weight, du, A),
        "dlora_A": lora_A_gradient(du, x, dtype=dtype),
        "dlora_B": lora_B_gradient(dy, u, dtype=dtype),
    }
    x, projection, dy = case.build()
    wide = in_float64(projection)
    backward = lora_linear_backward(dy.double(), x.double(), wide)._asdict()
    truth = {"h": lora_linear(x.double(), wide)} | backward
    for name, bound in linear_bounds(x, projection, dy).items():
        # twice, because the interpreter cuts off where a GPU rounds
        assert_within(found[name].cpu(), truth[name], bound * (2 if device == "cpu" else 1), name)


def test_the_bound_notices_mutants(device: str) -> None:
    """What a wrong kernel would give is far outside: else the tests above would show nothing."""
    x, weight, u, B = (
        normal(*shape, seed=i, dtype=torch.bfloat16, device=device)
        for i, shape in enumerate([(33, 50), (29, 50), (33, 5), (29, 5)])
    )
    out = lora_gemm(x, weight, u, B, None, 2.0, tile=SMALL)
    rounding = torch.finfo(torch.bfloat16).eps
    check(out, [(x, weight.T, 1.0), (u, B.T, 2.0)], rounding)
    mutants = {
        "no update": [(x, weight.T, 1.0)],
        "scale 1": [(x, weight.T, 1.0), (u, B.T, 1.0)],
        "last step of K dropped": [(x[:, :48], weight.T[:48], 1.0), (u, B.T, 2.0)],
        "neighbour's row": [(x, weight.T, 1.0), (u.roll(1, 0), B.T, 2.0)],
        "scale on the base": [(x, weight.T, 2.0), (u, B.T, 2.0)],
    }
    for products in mutants.values():
        with pytest.raises(AssertionError):
            check(out, products, rounding)
    A, dropout = normal(5, 50, seed=9, dtype=torch.bfloat16, device=device), Dropout(0.1, 3)
    u = skinny_gemm(x, A, dropout)
    check(u, [(dropped(x, dropout), A.T, 1.0)], rounding)
    for wrong in (Dropout(0.1, 4), Dropout(0.1, 3, 1), None):
        with pytest.raises(AssertionError):
            check(u, [(dropped(x, wrong), A.T, 1.0)], rounding)
    shifted = dropped(torch.ones(34, 50), dropout).flatten()[1:1651].view(33, 50) * x.double().cpu()
    with pytest.raises(AssertionError):
        check(u, [(shifted, A.T, 1.0)], rounding)


def test_leading_dimensions_and_expanded_rows(device: str) -> None:
    x = normal(1, 12, seed=0, dtype=torch.float32, device=device).expand(6, 12).view(2, 3, 12)
    weight, A = (normal(n, 12, seed=n, dtype=torch.float32, device=device) for n in (9, 4))
    B = normal(9, 4, seed=1, dtype=torch.float32, device=device)
    u = skinny_gemm(x, A)
    h = lora_gemm(x, weight, u, B)
    assert u.shape == (2, 3, 4) and h.shape == (2, 3, 9)
    check(u.view(6, 4), [(x.reshape(6, 12), A.T, 1.0)], unit_roundoff(torch.float32))
    check(h.view(6, 9), [(x.reshape(6, 12), weight.T, 1.0), (u.view(6, 4), B.T, 1.0)], unit_roundoff(torch.float32))
    assert lora_A_gradient(u, x).shape == (4, 12)


def test_no_tokens(device: str) -> None:
    x, weight, A, B, u = (torch.zeros(shape, device=device) for shape in ((0, 12), (9, 12), (4, 12), (9, 4), (0, 4)))
    assert skinny_gemm(x, A).shape == (0, 4)
    assert lora_gemm(x, weight, u, B).shape == (0, 9)
    assert lora_gemm_dx(x.new_empty(0, 9), weight, u, A).shape == (0, 12)
    assert torch.equal(lora_A_gradient(u, x), torch.zeros(4, 12, device=device))
    assert torch.equal(lora_B_gradient(x, u), torch.zeros(12, 4, device=device))


def test_neither_stride_of_the_weight_is_one(device: str) -> None:
    weight = normal(9, 24, seed=0, dtype=torch.float32, device=device)[:, ::2]
    x, u, B = (normal(*s, seed=1, dtype=torch.float32, device=device) for s in ((5, 12), (5, 4), (9, 4)))
    check(lora_gemm(x, weight, u, B), [(x, weight.T, 1.0), (u, B.T, 1.0)], unit_roundoff(torch.float32))


def test_operands_that_do_not_fit_are_refused(device: str) -> None:
    x, weight, u, B, A = (torch.zeros(shape, device=device) for shape in ((5, 12), (9, 12), (5, 4), (9, 4), (4, 12)))
    with pytest.raises(UnsupportedError, match=r"x is torch.float64; .* LORA_BACKEND=reference"):
        lora_gemm(x.double(), weight.double(), u.double(), B.double())
    with pytest.raises(LoRAError, match=r"weight is torch.bfloat16 on .*, expected torch.float32"):
        lora_gemm(x, weight.bfloat16(), u, B)
    with pytest.raises(LoRAError, match=r"x is \[5, 11\], expected \[5, 12\]"):
        lora_gemm(x[:, :11], weight, u, B)
    with pytest.raises(LoRAError, match=r"u is \[4, 4\], expected \[5, 4\]"):
        lora_gemm(x, weight, u[:4], B)
    with pytest.raises(LoRAError, match=r"factor is \[4, 8\], expected \[4, 9\]"):
        lora_gemm(x, weight, u, B[:8])
    with pytest.raises(LoRAError, match=r"bias is \[8\], expected \[9\]"):
        lora_gemm(x, weight, u, B, torch.zeros(8))
    with pytest.raises(LoRAError, match=r"out is \[5, 8\]"):
        lora_gemm(x, weight, u, B, out=x.new_empty(5, 8))
    with pytest.raises(LoRAError, match=r"x is \[5, 12\], expected \[5, 11\]"):
        skinny_gemm(x, A[:, :11])
    with pytest.raises(LoRAError, match=r"thin is \[5, 4\], expected \[4, 4\]"):
        lora_B_gradient(x[:4], u)
    with pytest.raises(LoRAError, match=r"probability is 1\.5"):
        skinny_gemm(x, A, Dropout(1.5, 0))


@pytest.mark.parametrize(
    ("rows", "columns", "offset", "even"), [(4, 64, 0, True), (4, 64, 4, False), (4, 72, 0, False)]
)
def test_rows_that_cannot_be_read_wide_get_a_smaller_tile(rows: int, columns: int, offset: int, even: bool) -> None:
    x = torch.empty(rows * columns + offset, dtype=torch.bfloat16)[offset:].view(rows, columns)
    assert gemm.is_even(x) == even == gemm.is_even(x.T)


def test_tiles_fit_the_shape() -> None:
    """Large products get the large tile; smaller ones a tile that still gives each multiprocessor work."""
    for arch, tiles in gemm.WIDE_TILES.items():
        assert tile_for(8192, 14336, torch.bfloat16, arch) == tiles[0]
        assert tile_for(1, 64, torch.bfloat16, arch) == tiles[-1]
    assert tile_for(256, 14336, torch.bfloat16, "sm_90").BLOCK_N == 128
    assert tile_for(64, 4096, torch.float16, "sm_90") == Tile(64, 32, 128, 4, 4)
    assert tile_for(8192, 4096, torch.float16, "sm_90", masked=True) == gemm.WIDE_TILES["sm_90"][1]
    assert tile_for(8192, 4096, torch.float32, "gfx942") == gemm.WIDE_TILES_FLOAT32[0]


@pytest.mark.parametrize("shape", [(5, 8, 0), (0, 8, 3), (5, 0, 3)])
def test_thin_products_of_nothing(shape, device):
    """No rank, no tokens, no features: what PyTorch gives, zeros or nothing, with a mask too."""
    tokens, features, r = shape
    x, A, du = (torch.randn(*size, device=device) for size in ((tokens, features), (r, features), (tokens, r)))
    for dropout in (None, Dropout(0.3, 7)):
        assert torch.equal(skinny_gemm(x, A, dropout), x @ A.T)
        assert torch.equal(lora_A_gradient(du, x, dropout), du.T @ x)
