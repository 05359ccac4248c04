"""Counted dropout, proven: the same bits from both backends, and a mask is a function of its seed alone."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lora.fast.dropout
import lora.reference.dropout
from lora.projection import Dropout, Projection
from lora.reference.dropout import keep_scale, key_of, mix, threshold
from lora.testing.cases import Layer, LinearInput, MLPInput
from lora.testing.proof import BACKENDS, changed
from proof.laws import Run, assert_agree, both, examples

counts = st.integers(0, 300)
rates = st.sampled_from([0.1, 0.5, 0.25, 0.999, 1e-4, 0.0])
streams = st.integers(0, 5)
seeds = st.integers(-(2**63), 2**64 - 1)
APPLY = {"reference": lora.reference.dropout.apply_dropout, "fast": lora.fast.dropout.apply_dropout}


def mask(backend, device, count, p, seed, stream=0):
    shape = (count,) if isinstance(count, int) else count
    return BACKENDS[backend].dropout_mask(shape, p, seed, stream=stream, device=device).cpu()


def lane(seed: int, stream: int, position: int) -> int:
    """One element's 16 bits by the definition, in Python integers (Steele, Lea and Flood 2014)."""
    word = mix((key_of(seed, stream) + position // 4 * 0x9E3779B97F4A7C15) % 2**64)
    return word >> 16 * (position % 4) & 0xFFFF


@both
@examples(40)
@given(count=counts, p=rates, seed=seeds, stream=streams)
def test_a_mask_is_its_definition(device, backend, count, p, seed, stream):
    expected = [lane(seed, stream, i) >= threshold(p) for i in range(count)]
    assert mask(backend, device, count, p, seed, stream).tolist() == expected


@both
@examples(20)
@given(count=counts, p=rates, seed=seeds, more=st.integers(0, 50))
def test_a_longer_mask_begins_with_the_shorter(device, backend, count, p, seed, more):
    assert torch.equal(mask(backend, device, count + more, p, seed)[:count], mask(backend, device, count, p, seed))


def assert_blocks_agree(shape, dropout, device):
    """Fast's mask, and what it makes of it, against the reference's."""
    x, total = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(device) for i in (0, 1))
    p, seed, stream = dropout
    keep, dropped = mask("reference", device, shape, p, seed, stream), APPLY["reference"](x, dropout)
    assert torch.equal(mask("fast", device, shape, p, seed, stream), keep)
    assert torch.equal(APPLY["fast"](x, dropout), dropped)
    added = lora.fast.dropout.add_dropped_(total.clone(), x, dropout)
    # Each side rounds its sum once, and one of them the product before it: three half-units of what is added.
    rounding = torch.finfo(total.dtype).eps / 2 * (total.abs() + dropped.abs())
    assert ((added - (total + dropped)).abs() <= 3 * rounding).all()


@examples(40)
@given(rows=st.integers(0, 30), columns=st.integers(1, 20), p=rates, seed=seeds, block=st.sampled_from([4, 16, 64]))
def test_blocks_of_a_mask_go_on_where_the_last_ended(device, rows, columns, p, seed, block):
    with mock.patch.object(lora.fast.dropout, "BLOCK", block):
        assert_blocks_agree((rows, columns), Dropout(p, seed, 2), device)


@pytest.mark.parametrize("shape", [(600, 577), (2, 400_001), (9, 1 << 15)])
def test_masks_of_several_blocks(device, shape):
    assert math.prod(shape) > lora.fast.dropout.BLOCK
    assert_blocks_agree(shape, Dropout(0.1, 3, 2), device)


@both
@examples(20)
@given(rows=st.integers(0, 12), columns=st.integers(1, 20), p=rates, seed=seeds)
def test_a_mask_counts_its_elements_row_by_row(device, backend, rows, columns, p, seed):
    flat = mask(backend, device, rows * columns, p, seed)
    assert torch.equal(mask(backend, device, (rows, columns), p, seed), flat.view(rows, columns))
    assert torch.equal(mask(backend, device, (rows, 1, columns), p, seed), flat.view(rows, 1, columns))


@both
@examples(20)
@given(p=st.sampled_from([(0.1, 0.2), (0.5, 0.500001), (0.0, 0.999)]), seed=seeds)
def test_what_a_higher_rate_keeps_a_lower_one_keeps(device, backend, p, seed):
    lower, higher = (mask(backend, device, 200, rate, seed) for rate in p)
    assert not (higher & ~lower).any()


@both
@examples(20)
@given(seed=seeds, stream=streams)
def test_seeds_and_streams_have_masks_of_their_own(device, backend, seed, stream):
    """And a seed counts modulo 2**64."""
    one = mask(backend, device, 256, 0.5, seed, stream)
    for other in (mask(backend, device, 256, 0.5, seed + 1, stream), mask(backend, device, 256, 0.5, seed, stream + 1)):
        assert 64 < int((one != other).sum()) < 192  # 8 deviations of 256 fair coins
    assert torch.equal(one, mask(backend, device, 256, 0.5, seed + 2**64, stream))


@both
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_as_many_are_kept_as_should_be(device, backend, p):
    """Within six deviations, in all and in each of the four lanes of a word."""
    kept = mask(backend, device, 40_000, p, 1234).double()
    for part in (kept, *kept.view(-1, 4).T):
        deviation = math.sqrt(p * (1 - p) / len(part))
        assert abs(float(part.mean()) - 1 / keep_scale(p)) < 6 * deviation


@both
@pytest.mark.parametrize("p", [0.0, 1e-9])
def test_a_rate_that_rounds_to_zero_keeps_everything(device, backend, p):
    assert mask(backend, device, 100, p, 3).all()


@both
@examples(20)
@given(
    shape=st.sampled_from([(5, 9), (1, 1), (0, 4), (3, 70)]),
    p=rates,
    seed=seeds,
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_dropping_multiplies_by_the_mask(device, backend, shape, p, seed, dtype):
    """Kept elements times 1 / (1 - p), within the rounding of factor and result; dropped ones exactly zero."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed % 2**60)).to(device, dtype)
    keep = mask("reference", "cpu", shape, p, seed)
    dropped = APPLY[backend](x, Dropout(p, seed)).cpu()
    assert not dropped[~keep].any()
    truth = x.cpu().double() * keep * keep_scale(p)
    assert_agree(dropped, truth, (2 * torch.finfo(dtype).eps * truth.abs()).cpu(), "D(x)")


@both
@examples(20)
@given(p=st.sampled_from([0.1, 0.5, 0.9]), seed=seeds, features=st.integers(1, 40), rank=st.integers(1, 5))
def test_the_backward_drops_what_the_forward_dropped(device, backend, p, seed, features, rank):
    """Without a frozen weight dx = D(du A): zero exactly where x was dropped, and nowhere else."""
    case = LinearInput(seed=seed % 1000, dtype=torch.float64, shape=(7,), in_features=features,
                       layer=Layer(6, rank), dropout=Dropout(p, seed))  # fmt: skip
    run = Run(case, backend, device)
    p_ = run.arguments["projection"]
    nothing: Projection = p_._replace(weight=torch.zeros_like(p_.weight))
    found = run.results(run.arguments | {"projection": nothing})
    assert torch.equal(found["dx"].cpu() != 0, mask(backend, device, (7, features), p, seed))


@both
@examples(10)
@given(seed=st.integers(0, 2**40), stream=streams)
def test_the_hidden_of_an_mlp_has_the_next_stream(device, backend, seed, stream):
    """Only down has an adapter: the dx that reaches gate shows which hidden features were dropped."""
    layers = (Layer(13, 0), Layer(13, 0), Layer(5, 2, scaling=1.0))
    case = MLPInput(seed=seed, dtype=torch.float64, shape=(6,), in_features=13, layers=layers, activation="silu",
                    dropout=Dropout(0.4, seed, stream))  # fmt: skip
    run = Run(case, backend, device)
    down = run.arguments["down"]
    without = run.results(run.arguments | {"down": down._replace(weight=torch.zeros_like(down.weight))})
    # dup.weight [hidden, in] sums over tokens; one token at a time shows its own mask
    for token in range(3):
        one = {name: torch.zeros_like(dy) for name, dy in run.dys.items()}
        one["y"][token] = run.dys["y"][token]
        found = run.results(run.arguments | {"down": down._replace(weight=torch.zeros_like(down.weight))}, one)
        reached = found["dup.weight"].abs().sum(1) != 0
        expected = mask(backend, device, (6, 13), 0.4, seed, stream + 1)[token]
        assert torch.equal(reached.cpu(), expected)
    assert without["dx"].any()


@both
@examples(10)
@given(seed=st.integers(0, 2**40))
def test_the_mean_over_seeds_is_no_dropout(device, backend, seed):
    """E[D(x)] = x: the mean of 100 masks, within six deviations."""
    x = torch.ones(1, 32, device=device)
    mean = sum(APPLY[backend](x, Dropout(0.5, seed + i)).double() for i in range(100)) / 100
    assert (mean - 1).abs().max() < 6 * math.sqrt(1 / 100)


def test_a_changed_seed_changes_the_result(device):
    """Else the laws above could hold for a mask that is ignored."""
    case = LinearInput(dropout=Dropout(0.5, 1))
    one, other = (Run(changed(case, dropout=Dropout(0.5, seed)), "fast", device).found["h"] for seed in (1, 2))
    assert not torch.equal(one, other)
