"""Inputs of the operations on projections, as small frozen dataclasses: a failing case prints itself.

Every tensor is a function of the fields. Sizes are one letter's worth of code away from the operation's arguments; how
a tensor lies in memory (`Layout`) is a field like any other, because kernels have been wrong there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lora.errors import LoRAError
from lora.projection import Dropout, NF4Weight, Projection
from lora.reference.mlp import hidden_dropout
from lora.reference.nf4 import nf4_quantize
from lora.testing import bounds
from lora.testing.bounded import exact
from lora.testing.bounds import Results
from lora.testing.proof import Arguments, Case, Maker

LAYOUTS = ("contiguous", "offset", "strided", "transposed", "expanded")


def laid(tensor: Tensor, layout: str) -> Tensor:
    """The tensor laid out differently in memory, with NaN around and between its elements.

    Args:
        layout: "offset": rows of a wider matrix, from an odd address; "strided": every second column; "transposed":
            columns side by side; "expanded": the first row for every row (the one layout that changes the values).
    """
    if layout == "contiguous" or not tensor.numel():
        return tensor
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    width = tensor.shape[-1]
    wide = torch.full((*tensor.shape[:-1], 2 * width + 3), torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = wide[..., 3 : 3 + width] if layout == "offset" else wide[..., 1 : 1 + 2 * width : 2]
    view.copy_(tensor)
    return view


def with_specials(x: Tensor) -> Tensor:
    """Numbers that arithmetic treats apart, among the first: zeros of both signs, a subnormal, the smallest normal.

    Of float64 the zeros only: a bound's variance, itself in float64, cannot hold the square of its subnormals.
    """
    limits = torch.finfo(x.dtype)
    special = [0.0, -0.0]
    if x.dtype != torch.float64:
        special += [limits.smallest_normal * limits.eps, -limits.smallest_normal]
    numbers = torch.tensor(special, dtype=x.dtype, device=x.device)[: x.numel()]
    return torch.cat([numbers, x.flatten()[len(numbers) :]]).view(x.shape)


def with_outliers(x: Tensor, times: float, make: Maker) -> Tensor:
    """One feature in a hundred, and at least one, `times` as large as the others: the same ones in every token."""
    if times == 1 or not x.numel():
        return x
    features = x.shape[-1]
    few = torch.randperm(features, generator=make.generator)[: max(features // 100, 1)].to(x.device)
    return x.index_copy(-1, few, x[..., few] * times)


def two_dimensional(x: Tensor) -> Tensor:
    """[..., features] as [tokens, features]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@dataclass(frozen=True)
class Layer:
    """How to make one projection. rank 0: no adapter."""

    out_features: int
    rank: int = 4
    bias: bool = False
    dora: bool = False
    nf4: bool = False
    nested: bool = True  # of NF4: the absmax quantised too
    zeros: bool = False  # the first half of W's rows: blocks of zeros, to NF4
    scaling: float = 2.0
    adapter_dtype: torch.dtype | None = None  # by default that of the weight
    size: float = 1.0  # of a row of W

    def make(self, make: Maker, in_features: int) -> Projection:
        """Two-sided random tensors, lora_B too; rows of A have about norm 1, and so have those of W, times `size`."""
        n, r, small = self.out_features, self.rank, self.adapter_dtype
        dense = make.normal(n, in_features, scale=self.size * in_features**-0.5)
        if self.zeros:
            dense[: (n + 1) // 2] = 0
        weight: Tensor | NF4Weight = dense
        if self.nf4:
            wide = dense if dense.dtype != torch.float64 else dense.float()
            weight = nf4_quantize(wide, double_quant=self.nested)
        bias = make.normal(n) if self.bias else None
        if not r:
            return Projection(weight, bias)
        lora_A = make.normal(r, in_features, scale=in_features**-0.5, dtype=small)
        lora_B = make.normal(n, r, scale=r**-0.5, dtype=small)
        return Projection(
            weight, bias, lora_A, lora_B, self.scaling, make.positive(n, dtype=small) if self.dora else None
        )


def norm_may_be_lost(layer: Layer, in_features: int) -> bool:
    """Whether w + s b a of a DoRA row may be as small as its rounding; of more features, one will be larger."""
    return layer.dora and in_features <= 4


@dataclass(frozen=True)
class Projected(Case):
    """What the operations on projections of one x have in common."""

    shape: tuple[int, ...] = (5,)  # of the tokens
    in_features: int = 16
    dropout: Dropout | None = None
    layout: str = "contiguous"  # of x
    dy_layout: str = "contiguous"
    x_size: float = 1.0
    dy_size: float = 1.0
    outliers: float = 1.0  # how many times the others a few features of x are, in every token
    special: bool = False  # numbers in x that arithmetic treats apart

    def x(self, make: Maker) -> Tensor:
        """[..., in]."""
        x = with_outliers(make.normal(*self.shape, self.in_features, scale=self.x_size), self.outliers, make)
        return laid(with_specials(x) if self.special else x, self.layout)

    @property
    def repeats(self) -> bool:
        return "expanded" in (self.layout, self.dy_layout)

    def gradient(self, shape: torch.Size, make: Maker) -> Tensor:
        return laid(make.normal(*shape, scale=self.dy_size), self.dy_layout)

    @property
    def projections(self) -> tuple[Layer, ...]:
        """How to make each of its projections."""
        raise NotImplementedError

    @property
    def boundless(self) -> bool:
        return any(norm_may_be_lost(layer, self.in_features) for layer in self.projections)


@dataclass(frozen=True)
class LinearInput(Projected):
    """One input of `lora_linear`."""

    operation: ClassVar[str] = "lora_linear"
    outputs: ClassVar[tuple[str, ...]] = ("h",)
    leaves: ClassVar[tuple[str, ...]] = ("x", "weight", "bias", "lora_A", "lora_B", "magnitude")

    layer: Layer = field(default_factory=lambda: Layer(16))

    @property
    def projections(self) -> tuple[Layer, ...]:
        return (self.layer,)

    def arguments(self, make: Maker) -> Arguments:
        x = self.x(make)
        return {"x": x, "projection": self.layer.make(make, self.in_features), "dropout": self.dropout}

    def bounds(self, arguments: Arguments, dys: dict[str, Tensor]) -> Results:
        x, dy = two_dimensional(arguments["x"]), two_dimensional(dys["h"])
        return bounds.linear(x, arguments["projection"], dy, self.dropout)


@dataclass(frozen=True)
class QKVInput(Projected):
    """One input of `lora_qkv`; stacked: the three weights are rows of one matrix, as `fuse` lays them."""

    operation: ClassVar[str] = "lora_qkv"
    outputs: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    leaves: ClassVar[tuple[str, ...]] = (
        "x",
        *(f"{p}.{t}" for p in "qkv" for t in Projection._fields if t != "scaling"),
    )

    layers: tuple[Layer, Layer, Layer] = (Layer(16), Layer(8), Layer(8))
    stacked: bool = False

    @property
    def projections(self) -> tuple[Layer, ...]:
        return self.layers

    def arguments(self, make: Maker) -> Arguments:
        x = self.x(make)
        made = [layer.make(make, self.in_features) for layer in self.layers]
        if self.stacked:
            made = stack(made)
        return {"x": x, **dict(zip("qkv", made, strict=True)), "dropout": self.dropout}

    def bounds(self, arguments: Arguments, dys: dict[str, Tensor]) -> Results:
        x = two_dimensional(arguments["x"])
        of_each = [two_dimensional(dys[name]) for name in self.outputs]
        return bounds.qkv(x, {name: arguments[name] for name in "qkv"}, of_each, self.dropout)


@dataclass(frozen=True)
class MLPInput(Projected):
    """One input of `lora_mlp`; stacked: gate's and up's weights are rows of one matrix."""

    operation: ClassVar[str] = "lora_mlp"
    outputs: ClassVar[tuple[str, ...]] = ("y",)
    parts: ClassVar[tuple[str, ...]] = ("gate", "up", "down")
    leaves: ClassVar[tuple[str, ...]] = (
        "x", *(f"{p}.{t}" for p in ("gate", "up", "down") for t in Projection._fields if t != "scaling")
    )  # fmt: skip

    layers: tuple[Layer, Layer, Layer] = (Layer(24), Layer(24), Layer(16))
    activation: str = "silu"
    stacked: bool = False

    @property
    def projections(self) -> tuple[Layer, ...]:
        return self.layers

    @property
    def boundless(self) -> bool:
        return super().boundless or norm_may_be_lost(self.layers[2], self.layers[0].out_features)

    def arguments(self, make: Maker) -> Arguments:
        x, hidden = self.x(make), self.layers[0].out_features
        sizes = (self.in_features, self.in_features, hidden)
        made = [layer.make(make, size) for layer, size in zip(self.layers, sizes, strict=True)]
        if self.stacked:
            made[:2] = stack(made[:2])
        named = dict(zip(self.parts, made, strict=True))
        return {"x": x, **named, "activation": self.activation, "dropout": self.dropout}

    def bounds(self, arguments: Arguments, dys: dict[str, Tensor]) -> Results:
        x, dy = two_dimensional(arguments["x"]), two_dimensional(dys["y"])
        gate, up, down = (arguments[name] for name in self.parts)
        below = hidden_dropout(self.dropout)
        return bounds.mlp(x, gate, up, down, dy, self.activation, self.dropout, below)


def stack(projections: list[Projection]) -> list[Projection]:
    """The same projections, dense weights of one type laid one after another in memory."""
    weights = [p.weight for p in projections if isinstance(p.weight, Tensor)]
    if len(weights) < len(projections):
        return projections
    rows = torch.cat(weights).split([len(weight) for weight in weights])
    return [p._replace(weight=w.detach()) for p, w in zip(projections, rows, strict=True)]


# ---- the plain linear case of the kernels' own tests


def in_float64(projection: Projection) -> Projection:
    """The same projection, every tensor widened: what the truth is computed from."""
    if isinstance(projection.weight, NF4Weight):
        raise LoRAError("in_float64 takes a dense weight: dequantise an NF4 weight to float64 first.")
    return Projection._make(part.detach().double() if isinstance(part, Tensor) else part for part in projection)


def linear_bounds(x: Tensor, projection: Projection, dy: Tensor) -> dict[str, Tensor]:
    """The error bound of "h", "dx", "dlora_A" and "dlora_B" of `lora_linear` without dropout.

    Args: x [tokens, in], dy [tokens, out], and a projection with A and B.
    """
    done = bounds.Linear(exact(x), projection)
    results = {"h": done.h, **done.backward(exact(dy))}
    return {name: results[name].bound() for name in ("h", "dx", "dlora_A", "dlora_B")}


@dataclass(frozen=True)
class LinearCase:
    """A plain input of `lora_linear`, for tests of the kernels it is made of."""

    tokens: int
    in_features: int
    out_features: int
    rank: int
    dtype: torch.dtype = torch.float32
    bias: bool = False
    scaling: float = 2.0
    seed: int = 0

    def build(self) -> tuple[Tensor, Projection, Tensor]:
        """x [tokens, in], the projection, dy [tokens, out]; two-sided, random, lora_B and dy never zero."""
        make = Maker(self.seed, self.dtype)
        layer = Layer(self.out_features, self.rank, bias=self.bias, scaling=self.scaling)
        x, projection = make.normal(self.tokens, self.in_features), layer.make(make, self.in_features)
        return x, projection, make.normal(self.tokens, self.out_features)
