"""Inputs of the other operations of a transformer block: embedding, several adapters, norms, rotary embedding, loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora.projection import Dropout, Projection
from lora.testing import bounds
from lora.testing.bounds import Results
from lora.testing.cases import Layer, laid, norm_may_be_lost, two_dimensional, with_outliers, with_specials
from lora.testing.proof import Arguments, Case, Maker


@dataclass(frozen=True)
class EmbeddingInput(Case):
    """One input of `lora_embedding`; `dim` is the layer's out_features."""

    operation: ClassVar[str] = "lora_embedding"
    outputs: ClassVar[tuple[str, ...]] = ("h",)
    leaves: ClassVar[tuple[str, ...]] = ("weight", "lora_A", "lora_B", "magnitude")

    shape: tuple[int, ...] = (5,)
    vocab: int = 11
    layer: Layer = field(default_factory=lambda: Layer(6))
    padding_idx: int | None = None
    table_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    dy_size: float = 1.0

    def arguments(self, make: Maker) -> Arguments:
        made = self.layer.make(make, self.vocab)  # weight [dim, vocab], of which the table is the transpose
        assert isinstance(made.weight, Tensor)
        table = laid((made.weight.T * self.vocab**0.5).contiguous(), self.table_layout)
        ids = make.integers(0, self.vocab, *self.shape)
        return {"ids": ids, "projection": made._replace(weight=table, bias=None), "padding_idx": self.padding_idx}

    def gradient(self, shape: torch.Size, make: Maker) -> Tensor:
        return laid(make.normal(*shape, scale=self.dy_size), self.dy_layout)

    @property
    def repeats(self) -> bool:
        return self.dy_layout == "expanded"  # an id that comes twice adds up the same number

    @property
    def boundless(self) -> bool:
        return norm_may_be_lost(self.layer, self.vocab)

    def bounds(self, arguments: Arguments, dys: dict[str, Tensor]) -> Results:
        dy = two_dimensional(dys["h"])
        return bounds.embedding(arguments["ids"].flatten(), arguments["projection"], dy, self.padding_idx)


@dataclass(frozen=True)
class MultiLoRAInput(Case):
    """One input of `multi_lora_linear`; each row of x is `inner` tokens of one adapter, or of none (-1)."""

    operation: ClassVar[str] = "multi_lora_linear"
    outputs: ClassVar[tuple[str, ...]] = ("h",)
    constants: ClassVar[tuple[str, ...]] = ("scaling",)
    leaves: ClassVar[tuple[str, ...]] = ("x", "weight", "bias", "lora_A", "lora_B")

    index: tuple[int, ...] = (0, 1, -1)
    inner: tuple[int, ...] = ()
    in_features: int = 12
    out_features: int = 16
    rank: int = 4
    scalings: tuple[float, ...] = (1.0, 2.0, 0.5)
    bias: bool = False
    nf4: bool = False
    adapter_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    dy_layout: str = "contiguous"
    x_size: float = 1.0
    dy_size: float = 1.0

    def arguments(self, make: Maker) -> Arguments:
        count, r, dtype = len(self.scalings), self.rank, self.adapter_dtype
        x = laid(make.normal(len(self.index), *self.inner, self.in_features, scale=self.x_size), self.layout)
        return {
            "x": x,
            "base": Layer(self.out_features, 0, self.bias, nf4=self.nf4).make(make, self.in_features),
            "lora_A": make.normal(count, r, self.in_features, scale=self.in_features**-0.5, dtype=dtype),
            "lora_B": make.normal(count, self.out_features, r, scale=r**-0.5, dtype=dtype),
            "scaling": torch.tensor(self.scalings, device=make.device),
            "index": torch.tensor(self.index, dtype=torch.int64, device=make.device),
        }

    def gradient(self, shape: torch.Size, make: Maker) -> Tensor:
        return laid(make.normal(*shape, scale=self.dy_size), self.dy_layout)

    @property
    def repeats(self) -> bool:
        return "expanded" in (self.layout, self.dy_layout)

    def bounds(self, arguments: Arguments, dys: dict[str, Tensor]) -> Results:
        given = dict(arguments)
        given["x"], dy = two_dimensional(arguments["x"]), two_dimensional(dys["h"])
        given["index"] = arguments["index"].repeat_interleave(math.prod(self.inner))
        return bounds.multi_lora(**given, dy=dy)


@dataclass(frozen=True)
class Normed(Case):
    """What the two norms have in common."""

    outputs: ClassVar[tuple[str, ...]] = ("y", "s")

    shape: tuple[int, ...] = (5,)
    features: int = 9
    eps: float = 1e-6
    residual: bool = False
    weight_dtype: torch.dtype | None = None
    x_size: float = 1.0
    special: bool = False  # numbers in x that arithmetic treats apart
    layout: str = "contiguous"
    dy_layout: str = "contiguous"

    def gradient(self, shape: torch.Size, make: Maker) -> Tensor:
        return laid(make.normal(*shape), self.dy_layout)

    @property
    def repeats(self) -> bool:
        return "expanded" in (self.layout, self.dy_layout)

    def rows(self, make: Maker) -> dict[str, Tensor]:
        """X, and the residual where there is one."""
        names = ("x", "residual") if self.residual else ("x",)
        shape = (*self.shape, self.features)
        made = {name: make.normal(*shape, scale=self.x_size) for name in names}
        return {name: laid(with_specials(t) if self.special else t, self.layout) for name, t in made.items()}


@dataclass(frozen=True)
class RMSNormInput(Normed):
    """One input of `rms_norm`."""

    operation: ClassVar[str] = "rms_norm"
    leaves: ClassVar[tuple[str, ...]] = ("x", "weight", "residual")

    offset: float = 0.0
    round_before_weight: bool = True

    def arguments(self, make: Maker) -> Arguments:
        tensors = self.rows(make) | {"weight": make.normal(self.features, dtype=self.weight_dtype)}
        return {**tensors, "eps": self.eps, "offset": self.offset, "round_before_weight": self.round_before_weight}

    def bounds(self, arguments: Arguments, dys: dict[str, Tensor]) -> Results:
        x, residual, dy, ds = flattened(arguments, dys)
        return bounds.rms_norm(
            x, arguments["weight"], residual, dy, ds, self.eps, self.offset, self.round_before_weight
        )


@dataclass(frozen=True)
class LayerNormInput(Normed):
    """One input of `layer_norm`."""

    operation: ClassVar[str] = "layer_norm"
    leaves: ClassVar[tuple[str, ...]] = ("x", "weight", "bias", "residual")

    bias: bool = True

    @property
    def boundless(self) -> bool:
        return self.features == 1  # its variance is nothing but rounding

    def arguments(self, make: Maker) -> Arguments:
        tensors = self.rows(make) | {"weight": make.normal(self.features, dtype=self.weight_dtype)}
        if self.bias:
            tensors["bias"] = make.normal(self.features, dtype=self.weight_dtype)
        return {**tensors, "eps": self.eps}

    def bounds(self, arguments: Arguments, dys: dict[str, Tensor]) -> Results:
        x, residual, dy, ds = flattened(arguments, dys)
        return bounds.layer_norm(x, arguments["weight"], arguments.get("bias"), residual, dy, ds, self.eps)


def flattened(arguments: Arguments, dys: dict[str, Tensor]) -> list[Any]:
    """x, residual, dy and ds as [tokens, features]; None where there is none."""
    tensors = (arguments["x"], arguments.get("residual"), dys["y"], dys.get("s"))
    return [None if t is None else two_dimensional(t) for t in tensors]


@dataclass(frozen=True)
class RopeInput(Case):
    """One input of `rope`. layout "heads": [batch, seq, heads, dim] in memory, as projections leave it."""

    operation: ClassVar[str] = "rope"
    outputs: ClassVar[tuple[str, ...]] = ("q", "k")
    constants: ClassVar[tuple[str, ...]] = ("cos", "sin")
    leaves: ClassVar[tuple[str, ...]] = ("q", "k")

    batch: int = 2
    seq: int = 5
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    rot: int = 8
    interleaved: bool = False
    by_position: bool = False
    per_batch: bool = False
    table_dtype: torch.dtype | None = None
    layout: str = "heads"
    dy_layout: str = "contiguous"
    x_size: float = 1.0  # of q and k
    dy_size: float = 1.0

    def laid(self, x: Tensor, layout: str) -> Tensor:
        """[batch, heads, seq, dim] in memory as `layout` says."""
        if layout == "heads":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return laid(x, layout)

    def arguments(self, make: Maker) -> Arguments:
        q, k = (
            self.laid(make.normal(self.batch, heads, self.seq, self.head_dim, scale=self.x_size), self.layout)
            for heads in (self.heads, self.kv_heads)
        )
        rows = (self.seq + 4,) if self.by_position else (self.batch, self.seq) if self.per_batch else (self.seq,)
        angles = make.normal(*rows, self.rot // 2, scale=3.0, dtype=torch.float64)
        angles = angles.repeat_interleave(2, dim=-1) if self.interleaved else torch.cat([angles, angles], dim=-1)
        cos, sin = (f.to(self.table_dtype or self.dtype) for f in (angles.cos(), angles.sin()))
        positions = make.integers(0, self.seq + 4, self.batch, self.seq) if self.by_position else None
        return {"q": q, "k": k, "cos": cos, "sin": sin, "position_ids": positions, "interleaved": self.interleaved}

    def gradient(self, shape: torch.Size, make: Maker) -> Tensor:
        return self.laid(make.normal(*shape, scale=self.dy_size), self.dy_layout)

    def bounds(self, arguments: Arguments, dys: dict[str, Tensor]) -> Results:
        positions = arguments["position_ids"]
        tables = [arguments[name] if positions is None else arguments[name][positions] for name in ("cos", "sin")]
        cos, sin = (table[:, None] if table.dim() == 3 else table for table in tables)
        results = {name: bounds.rope(arguments[name], cos, sin, self.interleaved) for name in ("q", "k")}
        return results | {f"d{n}": bounds.rope(dys[n], cos, sin, self.interleaved, inverse=True) for n in ("q", "k")}


@dataclass(frozen=True)
class LossInput(Case):
    """One input of `linear_cross_entropy`; the vocabulary is the layer's out_features."""

    operation: ClassVar[str] = "linear_cross_entropy"
    outputs: ClassVar[tuple[str, ...]] = ("loss",)
    leaves: ClassVar[tuple[str, ...]] = ("hidden", "weight", "bias", "lora_A", "lora_B", "magnitude")

    shape: tuple[int, ...] = (5,)
    features: int = 12
    layer: Layer = field(default_factory=lambda: Layer(30))
    ignored: tuple[int, ...] = ()  # the tokens whose label is ignored
    dropout: Dropout | None = None
    reduction: str = "mean"
    num_items: float | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    layout: str = "contiguous"
    x_size: float = 1.0  # of the hidden states
    dy_size: float = 1.0
    outliers: float = 1.0  # how many times the others a few of their features are, in every token

    def gradient(self, shape: torch.Size, make: Maker) -> Tensor:
        return make.normal(*shape, 1, scale=self.dy_size)[..., 0]  # a scalar's too

    @property
    def repeats(self) -> bool:
        return self.layout == "expanded"

    @property
    def boundless(self) -> bool:
        return norm_may_be_lost(self.layer, self.features)

    def labels(self, make: Maker) -> Tensor:
        """[...], the first and the last class among them."""
        tokens = math.prod(self.shape)
        labels = make.integers(0, self.layer.out_features, tokens)
        labels[:1], labels[1:2] = 0, self.layer.out_features - 1
        for token in self.ignored:
            labels[token : token + 1] = self.ignore_index
        return labels.view(self.shape)

    def arguments(self, make: Maker) -> Arguments:
        hidden = with_outliers(make.normal(*self.shape, self.features, scale=self.x_size), self.outliers, make)
        return {
            "hidden": laid(hidden, self.layout),
            "head": self.layer.make(make, self.features),
            "labels": self.labels(make),
            "dropout": self.dropout,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "num_items": self.num_items,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "label_smoothing": self.label_smoothing,
        }

    def bounds(self, arguments: Arguments, dys: dict[str, Tensor]) -> Results:
        labels = arguments["labels"].flatten()
        count = max(int((labels != self.ignore_index).sum()), 1)
        weight = 1 / (self.num_items or count) if self.reduction == "mean" else 1.0
        return bounds.cross_entropy(
            two_dimensional(arguments["hidden"]), arguments["head"], labels, dys["loss"].flatten(), self.dropout,
            weight=weight, each=self.reduction == "none", softcap=self.softcap, logit_scale=self.logit_scale,
            smoothing=self.label_smoothing, ignored=self.ignore_index,
        )  # fmt: skip


@dataclass(frozen=True)
class MergeInput(Case):
    """One input of `merge_weight`, which has no gradient."""

    operation: ClassVar[str] = "merge_weight"
    outputs: ClassVar[tuple[str, ...]] = ("weight",)
    constants: ClassVar[tuple[str, ...]] = Projection._fields
    in_features: int = 16
    layer: Layer = field(default_factory=lambda: Layer(16))

    @property
    def boundless(self) -> bool:
        return norm_may_be_lost(self.layer, self.in_features)

    def arguments(self, make: Maker) -> Arguments:
        return {"projection": self.layer.make(make, self.in_features)}

    def bounds(self, arguments: Arguments, dys: dict[str, Tensor]) -> Results:
        return {"weight": bounds.merged(arguments["projection"])}
