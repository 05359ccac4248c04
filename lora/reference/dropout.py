"""Dropout from counted bits: the mask is a function of (seed, position), so it is never stored.

Bernoulli dropout (Srivastava et al. 2014) keeps an element with probability 1 - p and divides it by 1 - p.
Drawing the mask from a generator means storing it for the backward pass. Counting means it can be made
again from its seed: element i reads lane i mod 4 (16 bits) of the (i div 4)-th output of SplitMix64
(Steele, Lea and Flood 2014), whose i-th output is a mixing function of key + i * gamma and needs no state:

    keep[i] = lane(splitmix64(key, i div 4), i mod 4) >= round(65536 p)        key = mix(seed, stream)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora.errors import LoRAError
from lora.projection import Dropout

GAMMA = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: SplitMix64's increment
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
LANES = 4  # 16-bit lanes in a 64-bit word
LEVELS = 1 << 16  # p is rounded to a multiple of 1 / LEVELS


def threshold(p: float) -> int:
    """How many of the 65,536 values of a lane drop their element: p rounded, but never all of them."""
    if not 0.0 <= p < 1.0:
        raise LoRAError(f"The dropout probability is {p}, expected a number in [0, 1). Use 0 for no dropout.")
    return min(round(p * LEVELS), LEVELS - 1)


def keep_scale(p: float) -> float:
    """1 / (1 - p) for the p that the 16-bit lanes really drop with, so that the mean is exact."""
    return LEVELS / (LEVELS - threshold(p))


def mix(word: int) -> int:
    """SplitMix64's output function on one Python integer, modulo 2**64."""
    word = (word ^ (word >> 30)) * MIX_1 % 2**64
    word = (word ^ (word >> 27)) * MIX_2 % 2**64
    return word ^ (word >> 31)


def key_of(seed: int, stream: int = 0) -> int:
    """The 64-bit key of one mask, far from the keys of neighbouring seeds and streams."""
    return mix((mix(seed % 2**64) + (stream + 1) * GAMMA) % 2**64)


def dropout_mask(
    shape: Sequence[int], p: float, seed: int, *, stream: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """True where an element is kept.

    Args:
        shape: of the mask; positions count its elements row-major.
        p: probability of dropping, in [0, 1), rounded to a multiple of 1/65536.
        seed: any integer, taken modulo 2**64.
        stream: a small integer that separates masks drawn from one seed.

    Returns: bool tensor of `shape`.
    Raises: LoRAError when p is not in [0, 1).
    """
    count = math.prod(shape)
    word = torch.arange(-(-count // LANES), dtype=torch.int64, device=device)
    word = word * _signed(GAMMA) + _signed(key_of(seed, stream))  # int64 wraps modulo 2**64, as it should
    word = (word ^ _shift_right(word, 30)) * _signed(MIX_1)
    word = (word ^ _shift_right(word, 27)) * _signed(MIX_2)
    word = word ^ _shift_right(word, 31)
    lanes = torch.stack([_shift_right(word, 16 * lane) & 0xFFFF for lane in range(LANES)], dim=1)
    return (lanes >= threshold(p)).flatten()[:count].view(tuple(shape))


def apply_dropout(x: Tensor, dropout: Dropout | None) -> Tensor:
    """x ⊙ keep / (1 - p); x itself when there is no dropout. Linear in x, so it is its own backward."""
    if dropout is None or threshold(dropout.p) == 0:
        return x
    keep = dropout_mask(x.shape, dropout.p, dropout.seed, stream=dropout.stream, device=x.device)
    return x * keep * keep_scale(dropout.p)


def _signed(word: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit word: torch has no uint64 arithmetic."""
    return word - 2**64 if word >= 2**63 else word


def _shift_right(word: Tensor, bits: int) -> Tensor:
    """A logical right shift; torch's `>>` on int64 copies the sign bit."""
    return word if bits == 0 else (word >> bits) & ((1 << (64 - bits)) - 1)
