"""Dropout's comparison, proven where it turns over: an element is kept from its own lane on, and not one below."""

from __future__ import annotations

import pytest
import torch

from lora.fast.dropout import add_dropped_, apply_dropout
from lora.fast.kernels.dropout import launch_key
from lora.projection import Dropout
from lora.reference.dropout import LEVELS, key_of
from lora.testing.proof import BACKENDS
from proof.laws import both
from proof.test_dropout import lane

SHAPES = [(3, 5), (2, 8), (16,)]  # rows that begin in the middle of a word of the mask, rows that do not, one row
PLACES = [(seed, position) for seed in (0, 7, 2**63 + 5) for position in (0, 6, 13, 14)]


@both
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("seed", "position"), PLACES)
def test_an_element_is_dropped_from_the_first_p_that_passes_its_lane(device, backend, shape, seed, position):
    level = lane(seed, 1, position)
    for p, kept in ((level / LEVELS, True), (min(level + 1, LEVELS - 1) / LEVELS, level == LEVELS - 1)):
        mask = BACKENDS[backend].dropout_mask(shape, p, seed, stream=1, device=device)
        assert bool(mask.flatten()[position]) == kept


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) == 2])
@pytest.mark.parametrize(("seed", "position"), PLACES)
def test_so_it_is_where_the_mask_is_multiplied_in(device, shape, seed, position):
    """In the forward's product and in the backward's sum, which make the mask each in its own way."""
    level = lane(seed, 0, position)
    wide = torch.ones(shape[0], shape[1] + 3, device=device)
    for rows in (torch.ones(shape, device=device), wide[:, : shape[1]]):  # without gaps between the rows, and with
        for p, kept in ((level / LEVELS, True), ((level + 1) / LEVELS, False)):
            dropout = Dropout(p, seed)
            assert bool(apply_dropout(rows, dropout).flatten()[position]) == kept
            total = add_dropped_(torch.zeros_like(wide)[:, : shape[1]], rows, dropout)
            assert bool(total.flatten()[position]) == kept


def test_a_kernels_key_is_a_signed_number_of_the_same_64_bits():
    for seed in range(50):
        key = launch_key(seed, 1)
        assert -(2**63) <= key < 2**63 and (key - key_of(seed, 1)) % 2**64 == 0
