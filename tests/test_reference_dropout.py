"""Counted dropout: the mask is a function of (seed, stream, position), and it is a good mask."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import normal
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import LoRAError
from lora.projection import Dropout
from lora.reference.dropout import GAMMA, apply_dropout, dropout_mask, keep_scale, key_of, mix, threshold

SEEDS = st.integers(-(2**70), 2**70)
RATES = st.floats(0, 0.999)


def test_mix_is_splitmix64() -> None:
    """The first outputs for the seed 1234567, as published with the algorithm's reference implementations."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [mix((1234567 + (i + 1) * GAMMA) % 2**64) for i in range(5)] == published


def keep_in_plain_python(position: int, p: float, seed: int, stream: int) -> bool:
    key = mix((mix(seed % 2**64) + (stream + 1) * GAMMA) % 2**64)
    word = mix((key + position // 4 * GAMMA) % 2**64)
    return (word >> 16 * (position % 4)) & 0xFFFF >= round(65536 * p)


@given(shape=st.lists(st.integers(0, 5), max_size=4), p=RATES, seed=SEEDS, stream=st.integers(0, 3))
def test_bits_are_those_of_plain_python(shape: list[int], p: float, seed: int, stream: int) -> None:
    mask = dropout_mask(shape, p, seed, stream=stream)
    assert mask.shape == torch.Size(shape) and mask.dtype == torch.bool
    expected = [keep_in_plain_python(i, p, seed, stream) for i in range(math.prod(shape))]
    assert mask.flatten().tolist() == expected


def test_bits_known_answer() -> None:
    """Pinned: a change of these bits would change every resumed run."""
    bits = dropout_mask((32,), 0.5, 42, stream=1)
    assert "".join("01"[bit] for bit in bits.tolist()) == "10001000111101011011000010000110"


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), p=RATES, seed=SEEDS)
def test_a_longer_mask_starts_with_the_shorter(rows: int, columns: int, p: float, seed: int) -> None:
    whole = dropout_mask((rows + 3, columns), p, seed)
    assert torch.equal(whole[:rows], dropout_mask((rows, columns), p, seed))
    assert torch.equal(whole.flatten(), dropout_mask(((rows + 3) * columns,), p, seed))


@pytest.mark.parametrize("p", [0.0, 1 / 65536, 0.05, 0.1, 0.5, 0.9, 65535 / 65536])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63])
def test_the_share_that_is_kept(p: float, seed: int) -> None:
    """Within five standard deviations of the binomial distribution (one honest mask in a million lies outside)."""
    count = 200_000
    kept = int(dropout_mask((count,), p, seed).sum())
    assert abs(kept - count * (1 - p)) <= 5 * math.sqrt(count * p * (1 - p)) + 1e-9


@pytest.mark.parametrize("other", [{"stream": 1}, {"seed": 8}, {"shift": 1}, {"shift": 4}, {"shift": 256}])
def test_masks_of_other_seeds_streams_and_positions_are_independent(other: dict[str, int]) -> None:
    """Two independent fair masks agree in half the places, within five standard deviations."""
    count, shift = 200_000, other.get("shift", 0)
    one = dropout_mask((count,), 0.5, 7)
    two = dropout_mask((count + shift,), 0.5, other.get("seed", 7), stream=other.get("stream", 0))[shift:]
    agree = int((one == two).sum())
    assert abs(agree - count / 2) <= 5 * math.sqrt(count / 4)


def test_keys_of_near_seeds_and_streams_differ() -> None:
    keys = {key_of(seed, stream) for seed in range(-50, 50) for stream in range(20)}
    assert len(keys) == 2000


def test_seeds_count_modulo_two_to_the_64() -> None:
    assert torch.equal(dropout_mask((64,), 0.5, -3), dropout_mask((64,), 0.5, 2**64 - 3))


@pytest.mark.parametrize(
    ("p", "dropped"), [(0.0, 0), (1 / 131073, 0), (1 / 65536, 1), (0.1, 6554), (0.5, 32768), (1 - 1e-9, 65535)]
)
def test_p_is_rounded_to_sixteen_bits_but_never_drops_everything(p: float, dropped: int) -> None:
    assert threshold(p) == dropped
    assert keep_scale(p) == 65536 / (65536 - dropped)


@pytest.mark.parametrize("p", [1.0, -0.1, 2, math.nan, math.inf])
def test_p_outside_its_range_is_refused(p: float) -> None:
    with pytest.raises(LoRAError, match=r"expected a number in \[0, 1\)"):
        dropout_mask((4,), p, 0)


def test_apply_dropout_is_mask_times_scale() -> None:
    x, dropout = normal(3, 50), Dropout(0.3, 11, stream=2)
    mask = dropout_mask((3, 50), 0.3, 11, stream=2)
    assert torch.equal(apply_dropout(x, dropout), torch.where(mask, x * keep_scale(0.3), 0.0))
    assert 0 < int(mask.sum()) < 150


def test_apply_dropout_keeps_the_mean_exactly() -> None:
    """The scale belongs to the rounded p: averaged over every value of a lane, 1 stays 1."""
    for p in (0.1, 0.33333, 0.7):
        assert (65536 - threshold(p)) * keep_scale(p) == 65536


@pytest.mark.parametrize("dropout", [None, Dropout(0.0, 5)])
def test_no_dropout_is_no_operation(dropout: Dropout | None) -> None:
    x = normal(3, 4)
    assert apply_dropout(x, dropout) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_apply_dropout_keeps_dtype_and_does_not_see_the_layout(dtype: torch.dtype) -> None:
    x, dropout = normal(7, 6, dtype=dtype).T, Dropout(0.5, 3)
    found = apply_dropout(x, dropout)
    assert found.dtype == dtype
    assert torch.equal(found, apply_dropout(x.contiguous(), dropout))
