"""Counted dropout, fused: the bits of `lora.reference.dropout`, with fewer passes.

On a GPU the hash, the comparison and the product are one kernel. Elsewhere the 64-bit words are made in place, read as
four 16-bit lanes without a shift (they lie in memory in the order of the lanes), and multiplied into x once.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora.fast import library
from lora.fast.runtime import runs_triton
from lora.projection import Dropout
from lora.reference.dropout import GAMMA, LANES, MIX_1, MIX_2, keep_scale, key_of, threshold


class KeepRows(NamedTuple):
    """A mask that was made already: for rows picked out of a larger [tokens, features], which a seed cannot count."""

    keep: Tensor  # bool [rows, features]
    scale: float


SIGN = 1 << 15  # 16-bit lanes are compared as signed numbers, after turning this bit over


def dropout_mask(
    shape: Sequence[int], p: float, seed: int, *, stream: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """True where an element is kept; arguments, result and bits as in `lora.reference.dropout.dropout_mask`."""
    return library.keep_mask(tuple(shape), p, seed, stream, torch.device(device or torch.get_default_device()))


def plain_mask(shape: Sequence[int], p: float, seed: int, stream: int, device: torch.device) -> Tensor:
    """`dropout_mask` in plain torch."""
    return (lanes(math.prod(shape), seed, stream, device) >= threshold(p) - SIGN).view(tuple(shape))


def apply_dropout(rows: Tensor, dropout: Dropout | KeepRows | None) -> Tensor:
    """x ⊙ keep / (1 - p), [tokens, features]; x itself without dropout."""
    if isinstance(dropout, KeepRows):
        return (rows * dropout.keep).mul_(dropout.scale)
    if dropout is None or threshold(dropout.p) == 0:
        return rows
    if runs_triton(rows):
        return library.drop(rows, dropout.p, dropout.seed, dropout.stream)
    keep = dropout_mask(rows.shape, dropout.p, dropout.seed, stream=dropout.stream, device=rows.device)
    return (rows * keep).mul_(keep_scale(dropout.p))


def add_dropped_(total: Tensor, rows: Tensor, dropout: Dropout | KeepRows) -> Tensor:
    """total += rows ⊙ keep / (1 - p), in place: `total` is the caller's own buffer, [tokens, features]."""
    if isinstance(dropout, KeepRows):
        return total.addcmul_(rows, dropout.keep.to(rows.dtype), value=dropout.scale)
    if threshold(dropout.p) == 0:
        return total.add_(rows)
    if runs_triton(total):
        library.add_dropped(total, rows, dropout.p, dropout.seed, dropout.stream)
        return total
    keep = dropout_mask(rows.shape, dropout.p, dropout.seed, stream=dropout.stream, device=rows.device)
    return total.addcmul_(rows, keep.to(rows.dtype), value=keep_scale(dropout.p))


def lanes(count: int, seed: int, stream: int, device: torch.device) -> Tensor:
    """The first `count` 16-bit lanes of SplitMix64(key), each with its top bit turned over, int16 [count]."""
    word = counters(-(-count // LANES), device) + _signed(key_of(seed, stream))
    spare = torch.empty_like(word)
    for shift, factor in ((30, MIX_1), (27, MIX_2), (31, None)):
        torch.bitwise_right_shift(word, shift, out=spare)
        word.bitwise_xor_(spare.bitwise_and_((1 << (64 - shift)) - 1))  # `>>` copies the sign: take the copies off
        if factor is not None:
            word.mul_(_signed(factor))
    word.bitwise_xor_(_signed(0x8000_8000_8000_8000))
    if sys.byteorder == "big":
        word = torch.stack([word >> 16 * lane for lane in range(LANES)], dim=1)
    return word.view(torch.int16)[:count] if sys.byteorder == "little" else word.to(torch.int16).flatten()[:count]


@functools.lru_cache(maxsize=8)
def counters(words: int, device: torch.device) -> Tensor:
    """i · gamma for the words of a mask: the same for every mask of its size, so a few sizes are kept."""
    return torch.arange(words, dtype=torch.int64, device=device) * _signed(GAMMA)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
