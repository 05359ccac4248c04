"""Many adapters in one batch: each kernel against a loop over adapters in float64, all against the reference.

The operands of each kernel are given, so its bound has two terms: float32 sums, and one rounding of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora.errors import LoRAError, UnsupportedError
from lora.fast.kernels.gemm import token_splits
from lora.fast.kernels.multi_lora import (
    group_tokens,
    multi_lora_A_gradient,
    multi_lora_B_gradient,
    multi_lora_expand_,
    multi_lora_shrink,
)
from lora.projection import Projection
from lora.reference.multi_lora import multi_lora_linear, multi_lora_linear_backward
from lora.testing import SPREAD, assert_within, unit_roundoff

RANKS = st.one_of(st.integers(1, 20), st.sampled_from([64, 65, 70]))  # kernels take 64 at a time
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Roundoff = Callable[[torch.dtype], float]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype).to(device)


def strided(x: Tensor) -> Tensor:
    """The same numbers, as columns of a wider buffer that is NaN elsewhere."""
    buffer = torch.full((len(x), x.shape[1] + 3), math.nan, dtype=x.dtype, device=x.device)
    buffer[:, 1:-2] = x
    return buffer[:, 1:-2]


def draw_index(tokens: int, adapters: int, seed: int, device: str, skewed: bool) -> Tensor:
    """Adapter numbers, -1 among them; skewed: most of one adapter, and some adapters without any."""
    index = torch.randint(-1, adapters, (tokens,), generator=generator(seed))
    if skewed:
        index[torch.rand(tokens, generator=generator(seed + 1)) < 0.8] = seed % adapters
    return index.to(device)


def wide(t: Tensor) -> Tensor:
    return t.double().cpu()


def bound(sizes: Tensor, terms: int, truth: Tensor, dtype: torch.dtype, rounding: float) -> Tensor:
    info = torch.finfo(dtype)
    sums = SPREAD * unit_roundoff(torch.float32) * math.sqrt(terms + 3) * sizes
    return sums + rounding * truth.abs() + info.smallest_normal * info.eps


batches = st.tuples(st.integers(1, 70), st.integers(1, 5), st.booleans(), st.integers(0, 2**32))


@given(
    batch=batches,
    rank=RANKS,
    fan_in=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
)
def test_shrink(
    device: str, roundoff: Roundoff, batch: tuple[int, int, bool, int], rank: int, fan_in: int, dtype: torch.dtype,
    transposed: bool,
) -> None:  # fmt: skip
    tokens, adapters, skewed, seed = batch
    index = draw_index(tokens, adapters, seed, device, skewed)
    x = strided(normal(tokens, fan_in, seed=seed, dtype=dtype, device=device))
    x[index == -1] = math.nan  # never read, or multiplied by a mask
    A = normal(adapters, rank, fan_in, seed=seed + 1, dtype=dtype, device=device)
    A = A.mT.contiguous().mT if transposed else A
    scaling = normal(adapters, seed=seed + 2, dtype=torch.float32, device=device)
    u = multi_lora_shrink(x, A, scaling, group_tokens(index, adapters))
    truth, sizes = torch.zeros(2, tokens, rank, dtype=torch.float64)
    for j in range(adapters):
        mine = (index == j).cpu()
        truth[mine] = wide(scaling)[j] * (wide(x)[mine] @ wide(A)[j].T)
        sizes[mine] = wide(scaling)[j].abs() * (wide(x)[mine].abs() @ wide(A)[j].abs().T)
    assert_within(u, truth.to(u.device), bound(sizes, fan_in, truth, dtype, roundoff(dtype)).to(u.device))


@given(
    batch=batches,
    rank=RANKS,
    fan_out=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
)
def test_expand(
    device: str, roundoff: Roundoff, batch: tuple[int, int, bool, int], rank: int, fan_out: int, dtype: torch.dtype,
    transposed: bool,
) -> None:  # fmt: skip
    tokens, adapters, skewed, seed = batch
    index = draw_index(tokens, adapters, seed, device, skewed)
    buffer = torch.full((tokens, fan_out + 3), math.nan, dtype=dtype, device=device)
    h = buffer[:, 1:-2]
    h.copy_(normal(tokens, fan_out, seed=seed, dtype=dtype, device=device))
    before = buffer.clone()
    u = strided(normal(tokens, rank, seed=seed + 1, dtype=dtype, device=device))
    B = normal(adapters, fan_out, rank, seed=seed + 2, dtype=dtype, device=device)
    B = B.mT.contiguous().mT if transposed else B
    assert multi_lora_expand_(h, u, B, group_tokens(index, adapters)) is h
    truth = wide(before[:, 1:-2])
    sizes = truth.abs()
    for j in range(adapters):
        mine = (index == j).cpu()
        truth[mine] += wide(u)[mine] @ wide(B)[j].T
        sizes[mine] += wide(u)[mine].abs() @ wide(B)[j].abs().T
    assert_within(h, truth.to(h.device), bound(sizes, rank, truth, dtype, roundoff(dtype)).to(h.device))
    assert torch.equal(h[index == -1], before[index == -1][:, 1:-2])
    assert buffer[:, 0].isnan().all() and buffer[:, -2:].isnan().all()


@given(
    tokens=st.sampled_from([1, 40, 70, 300]), adapters=st.integers(1, 4), skewed=st.booleans(),
    rank=RANKS, features=st.integers(1, 70), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_gradients_of_the_adapters(
    device: str, tokens: int, adapters: int, skewed: bool, rank: int, features: int, dtype: torch.dtype, seed: int
) -> None:
    check_gradients(device, draw_index(tokens, adapters, seed, device, skewed), adapters, rank, features, dtype, seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_shares_are_summed_in_parts(device: str, dtype: torch.dtype) -> None:
    assert token_splits(1100, 70, 3, dtype, 2)[0] == 2
    index = draw_index(1100, 2, 5, device, skewed=True)  # 80% are of one adapter: its parts are long, the other's short
    check_gradients(device, index, 2, 3, 70, dtype, 5)


def check_gradients(
    device: str, index: Tensor, adapters: int, rank: int, features: int, dtype: torch.dtype, seed: int
) -> None:
    tokens = len(index)
    x = strided(normal(tokens, features, seed=seed, dtype=dtype, device=device))
    du = strided(normal(tokens, rank, seed=seed + 1, dtype=dtype, device=device))
    x[index == -1], du[index == -1] = math.nan, math.nan
    groups = group_tokens(index, adapters)
    dA, dB = multi_lora_A_gradient(du, x, groups), multi_lora_B_gradient(x, du, groups)
    truth, sizes = torch.zeros(2, adapters, rank, features, dtype=torch.float64)
    for j in range(adapters):
        mine = (index == j).cpu()
        truth[j] = wide(du)[mine].T @ wide(x)[mine]
        sizes[j] = wide(du)[mine].abs().T @ wide(x)[mine].abs()
    limit = bound(sizes, tokens, truth, torch.float32, unit_roundoff(torch.float32))
    assert_within(dA.cpu(), truth, limit, "dA")
    assert_within(dB.cpu(), truth.mT, limit.mT, "dB")
    assert torch.equal(dA, multi_lora_A_gradient(du, x, groups))


def test_adapters_make_programs_enough() -> None:
    assert token_splits(1100, 70, 3, torch.bfloat16, 4)[0] == 1
    assert token_splits(8192, 4096, 16, torch.bfloat16, 8)[0] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_layer_is_the_reference(device: str, roundoff: Roundoff, dtype: torch.dtype) -> None:
    """Forward and backward of a batch of sequences; every intermediate rounding has its term in the bound."""
    rows, length, fan_in, fan_out, rank, adapters = 6, 5, 24, 19, 4, 3
    index = torch.tensor([2, 0, -1, 2, 0, 2])
    x, dy = (normal(rows, length, n, seed=n, dtype=dtype, device=device) for n in (fan_in, fan_out))
    A = normal(adapters, rank, fan_in, seed=1, dtype=dtype, device=device)
    B = normal(adapters, fan_out, rank, seed=2, dtype=dtype, device=device)
    weight, scaling = normal(fan_out, fan_in, seed=3, dtype=dtype, device=device), torch.tensor([0.5, 1.0, 2.0])
    groups = group_tokens(index.to(device), adapters, rows * length)
    h, dx = (x.double() @ weight.double().T).to(dtype), (dy.double() @ weight.double()).to(dtype)
    u = multi_lora_shrink(x, A, scaling.to(device), groups)
    du = multi_lora_shrink(dy, B.mT, scaling.to(device), groups)
    assert not u.view(rows, length, rank)[2].any()
    found = {
        "h": multi_lora_expand_(h, u, B, groups),
        "dx": multi_lora_expand_(dx, du, A.mT, groups),
        "dlora_A": multi_lora_A_gradient(du, x, groups),
        "dlora_B": multi_lora_B_gradient(dy, u, groups),
    }
    arguments = (wide(x), Projection(wide(weight)), wide(A), wide(B), scaling.double(), index)
    truth = {"h": multi_lora_linear(*arguments)} | multi_lora_linear_backward(wide(dy), *arguments)._asdict()
    sizes = {"h": multi_lora_linear(*(_absolute(a) for a in arguments))}
    sizes |= multi_lora_linear_backward(wide(dy).abs(), *(_absolute(a) for a in arguments))._asdict()
    for name, actual in found.items():
        # u, and the base's product that the update is added to, are rounded before the result is
        limit = (4 * roundoff(dtype) + SPREAD * unit_roundoff(torch.float32) * math.sqrt(99)) * sizes[name]
        assert_within(actual.cpu(), truth[name], limit, name)
    assert not found["dlora_A"][1].any() and not found["dlora_B"][1].any()  # nobody names adapter 1


def _absolute(argument: Tensor | Projection) -> Tensor | Projection:
    if isinstance(argument, Projection):
        return Projection(argument.weight.abs())  # type: ignore[union-attr]
    return argument.abs() if argument.is_floating_point() else argument


@given(batch=batches)
def test_every_token_of_an_adapter_is_in_one_block(batch: tuple[int, int, bool, int]) -> None:
    tokens, adapters, skewed, seed = batch
    index = draw_index(tokens, adapters, seed, "cpu", skewed)
    order, bounds, block_adapter, block_start, rows = group_tokens(index, adapters)
    assert sorted(order.tolist()) == list(range(tokens))
    seen = []
    for j, start in zip(block_adapter.tolist(), block_start.tolist(), strict=True):
        if j >= 0:
            mine = order[start : min(start + rows, int(bounds[j + 1]))].tolist()
            assert mine and all(index[token] == j for token in mine) and mine == sorted(mine)
            seen += mine
        else:
            assert start == tokens  # so that nothing is read from behind the list
    assert sorted(seen) == (index >= 0).nonzero().flatten().tolist()


def test_an_entry_stands_for_neighbouring_tokens() -> None:
    groups = group_tokens(torch.tensor([1, -1, 0]), 2, tokens=12)
    assert groups.order.tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3]
    assert groups.bounds.tolist() == [4, 8, 12]


def test_the_bound_notices_mutants(device: str) -> None:
    """The neighbour's adapter, a missing scale or a shifted token is far outside."""
    index = torch.tensor([0, 1] * 20, device=device)
    x, scaling = normal(40, 30, seed=0, dtype=torch.bfloat16, device=device), torch.tensor([1.0, 2.0], device=device)
    A = normal(2, 4, 30, seed=1, dtype=torch.bfloat16, device=device)
    u = wide(multi_lora_shrink(x, A, scaling, group_tokens(index, 2)))

    def truth(number: Tensor, s: Tensor) -> Tensor:
        return wide(s)[number.cpu()][:, None] * torch.einsum("tk,trk->tr", wide(x), wide(A)[number.cpu()])

    sizes = 2 * wide(x).abs() @ wide(A).abs().amax(0).T
    limit = bound(sizes, 30, truth(index, scaling), torch.bfloat16, torch.finfo(torch.bfloat16).eps)
    assert_within(u, truth(index, scaling), limit)
    for wrong in (truth(1 - index, scaling), truth(index, scaling**0), truth(index, scaling).roll(1, 0)):
        with pytest.raises(AssertionError):
            assert_within(u, wrong, limit)


def test_nothing_to_do(device: str) -> None:
    x, A, B = (torch.ones(s, device=device) for s in ((3, 8), (2, 4, 8), (2, 5, 4)))
    scaling, nobody = torch.ones(2, device=device), group_tokens(torch.full((3,), -1, device=device), 2)
    u = multi_lora_shrink(x, A, scaling, nobody)
    assert torch.equal(u, torch.zeros(3, 4, device=device))
    assert torch.equal(
        multi_lora_expand_(torch.ones(3, 5, device=device), u, B, nobody), torch.ones(3, 5, device=device)
    )
    assert not multi_lora_A_gradient(u, x, nobody).any()
    none = group_tokens(torch.zeros(0, dtype=torch.int64, device=device), 2)
    assert multi_lora_shrink(x[:0], A, scaling, none).shape == (0, 4)
    assert multi_lora_expand_(x[:0, :5], u[:0], B, none).shape == (0, 5)
    assert torch.equal(multi_lora_B_gradient(x[:0, :5], u[:0], none), torch.zeros(2, 5, 4, device=device))


def test_operands_that_do_not_fit_are_refused(device: str) -> None:
    x, A, B = (torch.zeros(s, device=device) for s in ((6, 8), (2, 4, 8), (2, 5, 4)))
    scaling, groups = torch.ones(2, device=device), group_tokens(torch.zeros(6, dtype=torch.int64, device=device), 2)
    u = multi_lora_shrink(x, A, scaling, groups)
    with pytest.raises(LoRAError, match=r"groups are of 6 tokens and 2 adapters, expected 5 and 2"):
        multi_lora_shrink(x[:5], A, scaling, groups)
    with pytest.raises(LoRAError, match=r"expected 6 and 1: call group_tokens"):
        multi_lora_expand_(x[:, :5].clone(), u, B[:1], groups)
    with pytest.raises(LoRAError, match=r"x is \[6, 7\], expected \[6, 8\]"):
        multi_lora_shrink(x[:, :7], A, scaling, groups)
    with pytest.raises(LoRAError, match=r"h is \[6, 8\], expected \[6, 5\]"):
        multi_lora_expand_(x, u, B, groups)
    with pytest.raises(LoRAError, match=r"h is \[6, 5\] with strides \[0, 1\]"):
        multi_lora_expand_(x[:1, :5].expand(6, 5), u, B, groups)
    with pytest.raises(LoRAError, match=r"lora_A is torch\.float16"):
        multi_lora_shrink(x, A.half(), scaling, groups)
    with pytest.raises(UnsupportedError, match="float64"):
        multi_lora_A_gradient(u.double(), x.double(), groups)
    with pytest.raises(LoRAError, match="7 tokens are not a multiple of the 6 entries"):
        group_tokens(torch.zeros(6, dtype=torch.int64), 2, tokens=7)
