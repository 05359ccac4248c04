"""A projection taken apart: the tensors that autograd sees, and what it does not see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora.projection import NF4Weight, Projection

TENSORS = 5  # of a projection that autograd sees: weight, bias, lora_A, lora_B, magnitude
Static = tuple[NF4Weight | None, float]  # what it does not see: a quantised weight, and the scaling


class Part(NamedTuple):
    """A projection inside an autograd function."""

    weight: Tensor | None  # dense, or None where it is quantised
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    magnitude: Tensor | None
    quantised: NF4Weight | None
    scaling: float

    @property
    def shape(self) -> Sequence[int]:
        """(out_features, in_features)."""
        return self.quantised.shape if self.weight is None else self.weight.shape  # type: ignore[union-attr]

    @property
    def out_features(self) -> int:
        return int(self.shape[0])

    @property
    def rank(self) -> int:
        return 0 if self.lora_A is None else self.lora_A.shape[0]


class LowRank(NamedTuple):
    """A low-rank term that a kernel adds to an operand as it reads it: scale · u factorᵀ."""

    u: Tensor  # [tokens, r]
    factor: Tensor  # [features, r]
    scale: float


MAX_RANK = 64  # of such a term


def flat_term(term: LowRank | None) -> tuple[Tensor | None, Tensor | None, float]:
    """A term, or none, as an operator takes it."""
    return (None, None, 0.0) if term is None else term


def term_of(u: Tensor | None, factor: Tensor | None, scale: float) -> LowRank | None:
    """The inverse of `flat_term`."""
    return None if u is None or factor is None else LowRank(u, factor, scale)


def unpacked(projections: Sequence[Projection]) -> tuple[list[Static], list[Tensor | None]]:
    """What autograd does not see of each projection, and the five tensors of each that it does."""
    static: list[Static] = []
    tensors: list[Tensor | None] = []
    for weight, bias, lora_A, lora_B, scaling, magnitude in projections:
        quantised = weight if isinstance(weight, NF4Weight) else None
        dense = None if isinstance(weight, NF4Weight) else weight
        absent = lora_A is None or lora_B is None
        tensors += [dense, bias, *((None, None, None) if absent else (lora_A, lora_B, magnitude))]
        static.append((quantised, float(scaling)))
    return static, tensors


def packed(static: Sequence[Static], tensors: Sequence[Tensor | None]) -> list[Part]:
    """The inverse of `unpacked`."""
    return [
        Part(*tensors[TENSORS * i : TENSORS * (i + 1)], *rest)  # type: ignore[arg-type, call-arg]
        for i, rest in enumerate(static)
    ]


FlatPart = tuple[list[Tensor | None], list[int], torch.dtype, float]


def flat_part(static: tuple[NF4Weight | None, float], tensors: Sequence[Tensor | None]) -> FlatPart:
    """A part (`unpacked`) as an operator takes it: tensors, NF4's sizes and dtype, the scaling."""
    quantised, scaling = static
    if quantised is None:
        return [*tensors], [], torch.float32, scaling
    q = quantised
    nf4 = [q.codes, q.absmax, q.nested_absmax, q.nested_offset]
    return [*tensors, *nf4], [*q.shape, q.block_size, q.nested_block_size], q.dtype, scaling


def part_of(tensors: Sequence[Tensor | None], sizes: Sequence[int], dtype: torch.dtype, scaling: float) -> Part:
    """The inverse of `flat_part`."""
    quantised = None
    if sizes:
        codes, absmax, nested_absmax, nested_offset = tensors[TENSORS:]
        if codes is None or absmax is None:
            raise TypeError("an NF4 weight has codes and absmax")
        out, fan_in, block, nested_block = sizes
        quantised = NF4Weight(codes, absmax, (out, fan_in), dtype, block, nested_absmax, nested_offset, nested_block)
    return packed([(quantised, scaling)], tensors)[0]
