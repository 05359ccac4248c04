"""Counted dropout, fused: the bits of `lora.reference.dropout`, with fewer passes.

On a GPU the mask is made where it multiplies, inside the products with the adapters, and D(x) is never written
(`masks_in_products`; decision 11). Elsewhere the 64-bit words of a block are made in place, read as four 16-bit lanes
without a shift (they lie in memory in the order of the lanes), compared straight into ones and zeros of x's type, and
multiplied into x once: no bool is converted, and no memory is fresh but the result's.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from lora.fast import library
from lora.fast.runtime import runs_triton
from lora.fast.workspace import workspace
from lora.projection import Dropout
from lora.reference.dropout import GAMMA, LANES, MIX_1, MIX_2, keep_scale, key_of, threshold


class KeepRows(NamedTuple):
    """A mask that was made already: for rows picked out of a larger [tokens, features], which a seed cannot count."""

    keep: Tensor  # bool [rows, features]
    scale: float


SIGN = 1 << 15  # 16-bit lanes are compared as signed numbers, after turning this bit over
BLOCK = 1 << 18  # elements whose mask is made at a time, whole words: what that takes stays in a core's cache


def dropout_mask(
    shape: Sequence[int], p: float, seed: int, *, stream: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """True where an element is kept; arguments, result and bits as in `lora.reference.dropout.dropout_mask`."""
    return library.keep_mask(tuple(shape), p, seed, stream, torch.device(device or torch.get_default_device()))


def plain_mask(shape: Sequence[int], p: float, seed: int, stream: int, device: torch.device) -> Tensor:
    """`dropout_mask` in plain torch."""
    keep = torch.empty(math.prod(shape), dtype=torch.uint8, device=device)  # written to twice as fast as bool
    for start in range(0, len(keep), BLOCK):
        block = keep[start : start + BLOCK]
        keep_into(block, start, p, key_of(seed, stream))
    return keep.view(torch.bool).view(tuple(shape))


def masks_in_products(dropout: Dropout | KeepRows | None, rows: Tensor) -> TypeGuard[Dropout]:
    """Whether products with D(x) make its mask themselves (`lora.fast.kernels`), and nobody needs D(x) in memory."""
    return isinstance(dropout, Dropout) and threshold(dropout.p) > 0 and runs_triton(rows)


def apply_dropout(rows: Tensor, dropout: Dropout | KeepRows | None) -> Tensor:
    """x ⊙ keep / (1 - p), [tokens, features]; x itself without dropout."""
    if isinstance(dropout, KeepRows):
        return (rows * dropout.keep).mul_(dropout.scale)
    if dropout is None or threshold(dropout.p) == 0:
        return rows
    if runs_triton(rows):
        return library.drop(rows, dropout.p, dropout.seed, dropout.stream)
    if torch.compiler.is_compiling():
        keep = dropout_mask(rows.shape, dropout.p, dropout.seed, stream=dropout.stream, device=rows.device)
        return (rows * keep).mul_(keep_scale(dropout.p))
    dropped = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for block, keep in keep_blocks(rows, dropout):
        torch.mul(rows[block], keep, out=dropped[block]).mul_(keep_scale(dropout.p))
    return dropped


def add_dropped_(total: Tensor, rows: Tensor, dropout: Dropout | KeepRows) -> Tensor:
    """total += rows ⊙ keep / (1 - p), in place: `total` is the caller's own buffer, [tokens, features]."""
    if isinstance(dropout, KeepRows):
        return total.addcmul_(rows, dropout.keep.to(rows.dtype), value=dropout.scale)
    if threshold(dropout.p) == 0:
        return total.add_(rows)
    if runs_triton(total):
        library.add_dropped(total, rows, dropout.p, dropout.seed, dropout.stream)
        return total
    if torch.compiler.is_compiling():
        keep = dropout_mask(rows.shape, dropout.p, dropout.seed, stream=dropout.stream, device=rows.device)
        return total.addcmul_(rows, keep.to(rows.dtype), value=keep_scale(dropout.p))
    for block, keep in keep_blocks(rows, dropout):
        total[block].addcmul_(rows[block], keep, value=keep_scale(dropout.p))
    return total


def keep_blocks(rows: Tensor, dropout: Dropout) -> Iterator[tuple[slice, Tensor]]:
    """Some rows after others: which, and 1 where an element of theirs is kept and else 0, [rows, features].

    The ones and zeros are of the type of `rows`, in a workspace: they are there until the next are.
    """
    tokens, features = rows.shape
    step = max(LANES, BLOCK // max(features, 1) // LANES * LANES)  # rows, so that each block begins with a word
    key = key_of(dropout.seed, dropout.stream)
    for first in range(0, tokens, step):
        block = slice(first, min(first + step, tokens))
        keep = workspace((block.stop - first) * features, rows.dtype, rows.device, "mask")
        keep_into(keep, first * features, dropout.p, key)
        yield block, keep.view(-1, features)


def keep_into(keep: Tensor, start: int, p: float, key: int) -> None:
    """Writes 1 where an element is kept and 0 elsewhere, for the elements from `start`, a multiple of LANES."""
    torch.ge(lanes(start, len(keep), key, keep.device), threshold(p) - SIGN, out=keep)


def lanes(start: int, count: int, key: int, device: torch.device) -> Tensor:
    """`count` 16-bit lanes of SplitMix64(key) from the one numbered `start`, a multiple of LANES: int16 [count].

    Each has its top bit turned over. They are in a workspace, until the next are made.
    """
    words = -(-count // LANES)
    scratch = workspace(2 * words, torch.int64, device, "hash")
    word, spare = scratch[:words], scratch[words:]
    torch.add(counters(words, device), _signed((key + start // LANES * GAMMA) % 2**64), out=word)
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
    """i · gamma for the words of a block: the same for every block of its size, so a few sizes are kept."""
    return torch.arange(words, dtype=torch.int64, device=device) * _signed(GAMMA)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
