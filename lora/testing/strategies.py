"""Hypothesis draws the inputs: sizes off every block, layouts, types, magnitudes, and who takes a gradient.

The only file here that needs Hypothesis, a development dependency. A strategy draws fields, never numbers of a tensor:
those come from the drawn seed (`lora.testing.proof.Maker`), so that a failing example prints itself in one line and
shrinks to the smallest sizes that fail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from lora.fast.runtime import interpreting
from lora.projection import Dropout
from lora.testing.block_cases import (
    EmbeddingInput,
    LayerNormInput,
    LossInput,
    MergeInput,
    MultiLoRAInput,
    RMSNormInput,
    RopeInput,
)
from lora.testing.cases import LAYOUTS, Layer, LinearInput, MLPInput, QKVInput, norm_may_be_lost

seeds = st.integers(0, 2**32)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
layouts = st.sampled_from(LAYOUTS)
dropouts = st.none() | st.builds(
    Dropout, st.sampled_from([0.0, 0.1, 0.5, 0.9]), st.integers(0, 2**64 - 1), st.integers(0, 3)
)
scalings = st.sampled_from([2.0, 1.0, 0.25, 16.0, -1.5, 0.0])

# the interpreter takes 30 to 300 ms a launch of a few blocks: there sizes stay small
LARGE = [] if interpreting() else [63, 64, 65, 127, 129, 255, 257, 300]
dims = st.integers(1, 40) | st.sampled_from([*LARGE, 31, 32, 33, 48, 65])
ranks = st.integers(0, 9) | st.sampled_from([16, 17, 33])
shapes = st.sampled_from(
    [(5,), (1,), (0,), (2, 3), (7,), (33,), (1, 1, 4), (2, 0, 3), *([] if interpreting() else [(129,)])]
)

# (size of x, size of dy): products with them stay finite, single numbers go from subnormal to near overflow
SIZES = {
    torch.float16: [(1.0, 1.0), (1e-6, 1.0), (1.0, 1e-6), (2e3, 1e-3), (1e-3, 1e3)],
    torch.float32: [(1.0, 1.0), (1e-40, 1.0), (1.0, 1e-40), (1e35, 1e-3), (1e-3, 1e35), (1e-20, 1e-20)],
    torch.float64: [(1.0, 1.0), (1e-3, 1e3)],
}
SIZES[torch.bfloat16] = SIZES[torch.float32]
# those of an MLP, whose hidden features are a product of two that x is in: x² · dy
MLP_SIZES = {
    torch.float16: [(1.0, 1.0), (1e-6, 1.0), (1.0, 1e-6), (1e-2, 1e3)],
    torch.float32: [(1.0, 1.0), (1e-40, 1.0), (1.0, 1e-40), (1e15, 1e-3), (1e15, 1.0), (1e-3, 1e33), (30.0, 1.0)],
    torch.float64: [(1.0, 1.0), (1e-3, 1e3), (1e3, 1.0)],
}
MLP_SIZES[torch.bfloat16] = MLP_SIZES[torch.float32]
# those of a rotation, in which nothing grows
ROPE_SIZES = {
    torch.float16: [1.0, 1e-6, 1e4],
    torch.float32: [1.0, 1e-40, 3e37],
    torch.bfloat16: [1.0, 1e-40, 3e37],
    torch.float64: [1.0, 1e-3, 1e3],
}
# those of a head's x and of its loss's gradient: a float16 logit is no larger than 65,504, and of logits beyond 1e12
# float64, the truth, no longer knows which of two alike is the larger
LOSS_SIZES = {
    torch.float16: [(1.0, 1.0), (1e-6, 1.0), (30.0, 1e-3), (1.0, 1e-6), (1.0, 1e3)],
    torch.float32: [(1.0, 1.0), (1e-40, 1.0), (300.0, 1.0), (1e10, 1.0), (1.0, 1e-40), (1.0, 1e35)],
    torch.float64: [(1.0, 1.0), (1.0, 1e3)],  # the squares of smaller probabilities are no numbers
}
LOSS_SIZES[torch.bfloat16] = LOSS_SIZES[torch.float32]
# those of a weight beside an update of about 1
WEIGHT_SIZES = {
    torch.float16: [1.0, 1e-6, 1e4],
    torch.float32: [1.0, 1e-40, 1e37],
    torch.bfloat16: [1.0, 1e-40, 1e37],
    torch.float64: [1.0, 1e-3, 1e3],
}
LARGEST_HIDDEN = {torch.float16: 300.0, torch.float32: 1e10, torch.bfloat16: 1e10, torch.float64: 1.0}
OUTLIERS = [1.0, 30.0, 700.0]  # the largest hidden features of a real model are 26 to 770 times the rest
LARGEST_X = {torch.float16: 2e3, torch.float32: 1e35, torch.bfloat16: 1e35, torch.float64: 1e6}


def sizes(dtype: torch.dtype, dropout: Dropout | None, *layers: Layer) -> st.SearchStrategy[tuple[float, float]]:
    """Sizes of x and dy; plain ones where dropout or scaling would take what is in between over the type's limits."""
    return st.sampled_from(SIZES[dtype] if is_plain(dropout, *layers) else SIZES[dtype][:1])


def outliers(
    dtype: torch.dtype, x_size: float, dy_size: float, plain: bool = True, largest: float | None = None
) -> st.SearchStrategy[float]:
    """How many times the others a few features of x are, where that leaves x and its products finite.

    plain: without dropout, and no large scaling; largest: what x may be, by default `LARGEST_X`.
    """
    largest = LARGEST_X[dtype] if largest is None else largest
    if dtype == torch.float16:  # sums over tokens too
        largest = min(largest, 30 / dy_size) if plain else 0.0
    return st.sampled_from([times for times in OUTLIERS if times == 1 or times * x_size <= largest])


def is_plain(dropout: Dropout | None, *layers: Layer) -> bool:
    """Whether nothing between x and a result is much larger than both."""
    return dropout is None and all(abs(layer.scaling) <= 2 for layer in layers)


extremes = st.sampled_from([False, False, True])  # whether a case makes room for extreme sizes


def calm(layer: Layer) -> Layer:
    """The layer without what makes numbers larger."""
    return replace(layer, dora=False, scaling=min(layer.scaling, 2.0))


def subsets(names: Sequence[str], usually: Sequence[str] = ()) -> st.SearchStrategy[frozenset[str]]:
    """Any subset; half of the time the `usually` frozen leaves, which is what training has."""
    return st.just(frozenset(usually)) | st.frozensets(st.sampled_from(list(names)))


@st.composite
def layers(draw: st.DrawFn, dtype: torch.dtype, out: st.SearchStrategy[int] = dims, dora: bool = True) -> Layer:
    """A projection with or without adapter, bias, DoRA and NF4; its adapters in the weight's type or in float32."""
    half, dora = dtype in (torch.bfloat16, torch.float16), dora and draw(st.booleans())
    return Layer(
        out_features=draw(out),
        rank=draw(ranks),
        bias=draw(st.booleans()),
        dora=dora,
        nf4=draw(st.booleans()),
        nested=draw(st.booleans()),
        zeros=draw(st.sampled_from([False, False, False, True])) and not (dora and dtype == torch.float16),
        scaling=draw(scalings),
        adapter_dtype=draw(st.sampled_from([None, torch.float32])) if half else None,
    )


def at_least(size: int, dtype: torch.dtype, *layers: Layer) -> int:
    """How many in_features: four for DoRA in half precision.

    Of many rows w + s b a of fewer numbers some are nearly lost in the rounding of a and b: then the gain that makes up
    for it may be anything, and beyond float16.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return max(size, 4) if half and any(layer.dora for layer in layers) else size


def weights_of(names: Sequence[str]) -> list[str]:
    """The leaves that are base weights: frozen in training."""
    return [name for name in names if name.endswith(("weight", "bias"))]


@st.composite
def linear_inputs(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = dtypes) -> LinearInput:
    """Any input of `lora_linear`."""
    dtype, dropout = draw(dtypes), draw(dropouts)
    layer = draw(layers(dtype))
    frozen = draw(subsets(LinearInput.leaves, weights_of(LinearInput.leaves)))
    return LinearInput(frozen=frozen, layer=layer, **sized(draw, dtype, dropout, layer))


def sized(draw: st.DrawFn, dtype: torch.dtype, dropout: Dropout | None, *layers: Layer) -> dict[str, Any]:
    """The fields that all operations on projections of one x share."""
    in_features = at_least(draw(dims), dtype, *layers)
    lost = any(norm_may_be_lost(layer, in_features) for layer in layers)  # a gain may be as large as anything else
    x_size, dy_size = (1.0, 1.0) if lost else draw(sizes(dtype, dropout, *layers))
    few = outliers(dtype, x_size, dy_size, is_plain(dropout, *layers))
    return {
        "seed": draw(seeds),
        "dtype": dtype,
        "shape": draw(shapes),
        "in_features": in_features,
        "dropout": dropout,
        "layout": draw(layouts),
        "dy_layout": draw(layouts),
        "x_size": x_size,
        "dy_size": dy_size,
        "outliers": 1.0 if lost else draw(few),
        "special": draw(st.booleans()),
    }


@st.composite
def qkv_inputs(draw: st.DrawFn) -> QKVInput:
    """Any input of `lora_qkv`; grouped-query attention is the rule, not the exception: the three sizes differ."""
    dtype, dropout = draw(dtypes), draw(dropouts)
    three = (draw(layers(dtype)), draw(layers(dtype)), draw(layers(dtype)))
    frozen = draw(subsets(QKVInput.leaves, weights_of(QKVInput.leaves)))
    return QKVInput(frozen=frozen, layers=three, stacked=draw(st.booleans()), **sized(draw, dtype, dropout, *three))


@st.composite
def mlp_inputs(draw: st.DrawFn) -> MLPInput:
    """Any input of `lora_mlp`; plain sizes under dropout, DoRA and scalings of more than 2."""
    dtype, dropout = draw(dtypes), draw(dropouts)
    if dtype == torch.float16 and dropout is not None:  # 1 / (1 - p) comes in twice
        dropout = dropout._replace(p=min(dropout.p, 0.5))
    mild = layers(dtype).map(lambda layer: replace(layer, scaling=min(layer.scaling, 2.0)))
    three = [draw(mild) for _ in range(3)]
    size = at_least(draw(dims), dtype, three[2])
    three[:2] = [replace(layer, out_features=size) for layer in three[:2]]
    if draw(extremes):
        dropout, three = None, [calm(layer) for layer in three]
    plain = is_plain(dropout, *three) and not any(layer.dora for layer in three)
    x_size, dy_size = draw(st.sampled_from(MLP_SIZES[dtype] if plain else MLP_SIZES[dtype][:1]))
    few = outliers(dtype, x_size, dy_size, plain, 1.0 if dtype == torch.float16 else 1e15)
    fields = sized(draw, dtype, dropout, *three) | {"x_size": x_size, "dy_size": dy_size, "outliers": draw(few)}
    return MLPInput(
        frozen=draw(subsets(MLPInput.leaves, weights_of(MLPInput.leaves))),
        layers=(three[0], three[1], three[2]),
        activation=draw(st.sampled_from(["silu", "gelu", "gelu_tanh"])),
        stacked=draw(st.booleans()),
        **fields,
    )


@st.composite
def embedding_inputs(draw: st.DrawFn) -> EmbeddingInput:
    """Any input of `lora_embedding`; a small vocabulary, so that ids repeat, or a large one, so that most do not."""
    dtype = draw(dtypes)
    layer = replace(draw(layers(dtype)), nf4=False, bias=False)
    vocab = at_least(draw(st.sampled_from([1, 3, 11, 100])), dtype, layer)
    layer = calm(layer) if draw(extremes) else layer
    plain = is_plain(None, layer) and not layer.dora
    table, dy_size = draw(st.sampled_from(SIZES[dtype] if plain else SIZES[dtype][:1]))
    return EmbeddingInput(
        seed=draw(seeds),
        dtype=dtype,
        frozen=draw(subsets(EmbeddingInput.leaves, ["weight"])),
        shape=draw(shapes),
        vocab=vocab,
        layer=replace(layer, size=table),
        dy_size=dy_size,
        padding_idx=draw(st.none() | st.integers(-vocab, vocab - 1)),
        table_layout=draw(st.sampled_from(LAYOUTS[:-1])),
        dy_layout=draw(layouts),
    )


@st.composite
def multi_lora_inputs(draw: st.DrawFn) -> MultiLoRAInput:
    """Any input of `multi_lora_linear`: adapters that no row names, rows of none, all of one."""
    dtype = draw(dtypes)
    scalings = draw(st.lists(st.sampled_from([1.0, 2.0, 0.5, -1.0, 0.0]), min_size=1, max_size=4))
    x_size, dy_size = draw(st.sampled_from(SIZES[dtype]))
    half = dtype in (torch.bfloat16, torch.float16)
    return MultiLoRAInput(
        seed=draw(seeds),
        dtype=dtype,
        frozen=draw(subsets(MultiLoRAInput.leaves, ["weight", "bias"])),
        index=tuple(draw(st.lists(st.integers(-1, len(scalings) - 1), max_size=9))),
        inner=draw(st.sampled_from([(), (3,), (2, 2)])),
        in_features=draw(dims),
        out_features=draw(dims),
        rank=draw(st.integers(1, 9) | st.sampled_from([16, 17])),
        scalings=tuple(scalings),
        bias=draw(st.booleans()),
        nf4=draw(st.booleans()),
        adapter_dtype=draw(st.sampled_from([None, torch.float32])) if half else None,
        layout=draw(layouts),
        dy_layout=draw(layouts),
        x_size=x_size,
        dy_size=dy_size,
    )


@st.composite
def norm_fields(draw: st.DrawFn, leaves: Sequence[str]) -> dict[str, Any]:
    """The fields that both norms share."""
    dtype = draw(dtypes)
    half = dtype in (torch.bfloat16, torch.float16)
    return {
        "seed": draw(seeds),
        "dtype": dtype,
        "frozen": draw(subsets(leaves, ["weight", "bias"])),
        "shape": draw(shapes),
        "features": draw(dims),
        "eps": draw(st.sampled_from([1e-6, 1e-5, 0.1])),
        "residual": draw(st.booleans()),
        "weight_dtype": draw(st.sampled_from([None, torch.float32])) if half else None,
        "x_size": draw(st.sampled_from([1.0, 1e-3, 30.0, 1e-6, 3e3])),
        "special": draw(st.booleans()),
        "layout": draw(layouts),
        "dy_layout": draw(layouts),
    }


rms_norm_inputs = st.builds(
    lambda fields, offset, rounds: RMSNormInput(offset=offset, round_before_weight=rounds, **fields),
    norm_fields(RMSNormInput.leaves), st.sampled_from([0.0, 1.0]), st.booleans(),
)  # fmt: skip
layer_norm_inputs = st.builds(
    lambda fields, bias: LayerNormInput(bias=bias, **fields), norm_fields(LayerNormInput.leaves), st.booleans()
)


@st.composite
def rope_inputs(draw: st.DrawFn) -> RopeInput:
    """Any input of `rope`."""
    dtype, dim = draw(dtypes), draw(st.sampled_from([2, 4, 6, 8, 10, 16, 34, 64]))
    return RopeInput(
        seed=draw(seeds),
        dtype=dtype,
        frozen=draw(subsets(RopeInput.leaves)),
        batch=draw(st.integers(0, 3)),
        seq=draw(st.sampled_from([1, 2, 5, 7, 17])),
        heads=draw(st.integers(1, 5)),
        kv_heads=draw(st.integers(1, 3)),
        head_dim=dim,
        rot=draw(st.integers(1, dim // 2)) * 2,
        interleaved=draw(st.booleans()),
        by_position=draw(st.booleans()),
        per_batch=draw(st.booleans()),
        table_dtype=draw(st.sampled_from([None, torch.float32])) if dtype != torch.float64 else None,
        layout=draw(st.sampled_from(["heads", *LAYOUTS])),
        dy_layout=draw(st.sampled_from(["heads", *LAYOUTS])),
        x_size=draw(st.sampled_from(ROPE_SIZES[dtype])),
        dy_size=draw(st.sampled_from(ROPE_SIZES[dtype])),
    )


@st.composite
def loss_inputs(draw: st.DrawFn) -> LossInput:
    """Any input of `linear_cross_entropy`; vocabularies off every block, at least one label that counts."""
    dtype, shape = draw(dtypes), draw(st.sampled_from([(5,), (1,), (2, 4), (17,)]))
    tokens = math.prod(shape)
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    layer = draw(layers(dtype, st.sampled_from([2, 3, 50, 255, 257, *([] if interpreting() else [2049, 5003])])))
    features, dropout = at_least(draw(st.integers(1, 40)), dtype, layer), draw(dropouts)
    if draw(extremes):
        dropout, layer = None, calm(layer)
    plain = is_plain(dropout, layer) and not layer.dora
    x_size, dy_size = draw(st.sampled_from(LOSS_SIZES[dtype] if plain else LOSS_SIZES[dtype][:1]))
    few = outliers(dtype, x_size, dy_size, plain, LARGEST_HIDDEN[dtype])
    return LossInput(
        seed=draw(seeds),
        dtype=dtype,
        frozen=draw(subsets(LossInput.leaves, ["weight", "bias"])),
        shape=shape,
        features=features,
        layer=replace(layer, scaling=min(layer.scaling, 2.0)),
        ignored=tuple(draw(st.sets(st.integers(0, tokens - 1), max_size=tokens - 1))),
        dropout=dropout,
        reduction=reduction,
        num_items=draw(st.sampled_from([None, 17, 0.5])) if reduction == "mean" else None,
        softcap=draw(st.sampled_from([None, 3.0, 30.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.5, 2.0])),
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])),
        ignore_index=draw(st.sampled_from([-100, -1])),
        layout=draw(layouts),
        x_size=x_size,
        dy_size=dy_size,
        outliers=draw(few),
    )


@st.composite
def merge_inputs(draw: st.DrawFn) -> MergeInput:
    """Any input of `merge_weight` that has an adapter."""
    dtype = draw(dtypes)
    layer = draw(layers(dtype))
    size = 1.0 if layer.dora else draw(st.sampled_from(WEIGHT_SIZES[dtype]))
    size = min(size, 1e33) if layer.nf4 else size  # whose largest numbers are added up
    layer = replace(layer, rank=max(layer.rank, 1), size=size)
    return MergeInput(seed=draw(seeds), dtype=dtype, in_features=draw(dims), layer=layer)
