"""The strategies draw what they are said to draw, so that no later edit of them loses a kind of input in silence.

Each kind is a condition on a case; of a few hundred cases of a strategy, drawn as the proofs draw them, some meet it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis.errors import NoSuchExample

from lora.projection import NF4Weight, Projection
from lora.reference.nf4 import nf4_absmax
from lora.testing import strategies
from lora.testing.cases import LAYOUTS, Layer, LinearInput, MLPInput, QKVInput
from lora.testing.proof import BACKENDS, Case, build, leaves, named_outputs, upstream
from proof import test_nf4

CASES = 500
SETTINGS = settings(max_examples=CASES, phases=[Phase.generate], derandomize=True, database=None, deadline=None,
                    suppress_health_check=list(HealthCheck))  # fmt: skip
EVERY = {
    "linear": strategies.linear_inputs(), "qkv": strategies.qkv_inputs(), "mlp": strategies.mlp_inputs(),
    "embedding": strategies.embedding_inputs(), "multi_lora": strategies.multi_lora_inputs(),
    "rms_norm": strategies.rms_norm_inputs, "layer_norm": strategies.layer_norm_inputs,
    "rope": strategies.rope_inputs(), "loss": strategies.loss_inputs(), "merge": strategies.merge_inputs(),
}  # fmt: skip
PROJECTED, NORMS, TOKENS = ["linear", "qkv", "mlp"], ["rms_norm", "layer_norm"], ["embedding", "loss"]
LAYERED = [*PROJECTED, "embedding", "loss", "merge"]
SHAPED = [*PROJECTED, *NORMS, *TOKENS]
TRAINED = [name for name in EVERY if name != "merge"]
Kind = Callable[[Any], bool]


@cache
def drawn(name: str) -> list[Any]:
    """Cases of a strategy."""
    found: list[Any] = []

    @SETTINGS
    @given(EVERY[name])
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


def layers_of(case: Any) -> tuple[Layer, ...]:
    return case.layers if isinstance(case, (QKVInput, MLPInput)) else (case.layer,)


def tokens_of(case: Any) -> int:
    return torch.Size(case.shape).numel()


def numbers_of(case: LinearInput) -> int:
    """How many a weight has."""
    return case.in_features * case.layer.out_features


def any_layer(condition: Callable[[Layer], bool]) -> Kind:
    return lambda case: any(condition(layer) for layer in layers_of(case))


def off_blocks(size: int) -> bool:
    """No multiple of 16, the least that a matrix instruction takes, and more than it: no block ends there."""
    return size > 16 and size % 16 != 0


def kinds() -> Iterator[tuple[str, str, Kind]]:
    """(strategy, name, condition) of every kind that is promised."""
    for name in EVERY:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            yield name, f"{dtype}", lambda case, dtype=dtype: case.dtype == dtype
    for name in SHAPED:
        if name != "loss":  # which needs a label that counts
            yield name, "no token", lambda case: tokens_of(case) == 0
        yield name, "one token", lambda case: tokens_of(case) == 1
        yield name, "an odd number of tokens", lambda case: tokens_of(case) > 1 and tokens_of(case) % 2 == 1
        yield name, "tokens in several dimensions", lambda case: len(case.shape) > 1 and tokens_of(case) > 1
    yield "multi_lora", "no row", lambda case: not case.index
    yield "multi_lora", "one row", lambda case: len(case.index) == 1
    yield "rope", "one token", lambda case: case.seq == 1
    yield "rope", "an odd number of tokens", lambda case: case.seq > 1 and case.seq % 2 == 1
    yield "rope", "no sequence", lambda case: case.batch == 0
    yield from sizes()
    yield from layouts()
    yield from adapters()
    yield from gradients()


def sizes() -> Iterator[tuple[str, str, Kind]]:
    for name in [*PROJECTED, "multi_lora", "merge"]:
        yield name, "in_features off every block", lambda case: off_blocks(case.in_features)
        yield name, "one feature", lambda case: case.in_features == 1
    yield "multi_lora", "out_features off every block", lambda case: off_blocks(case.out_features)
    yield "multi_lora", "a rank off every block", lambda case: off_blocks(case.rank)
    for name in LAYERED:
        yield name, "out_features off every block", any_layer(lambda layer: off_blocks(layer.out_features))
        yield name, "a rank off every block", any_layer(lambda layer: off_blocks(layer.rank))
        yield name, "a rank of one", any_layer(lambda layer: layer.rank == 1)
    for name in NORMS:
        yield name, "features off every block", lambda case: off_blocks(case.features)
        yield name, "special numbers", lambda case: case.special and tokens_of(case) > 0
        for size in (1e-6, 3e3):
            yield name, f"x of size {size:g}", lambda case, size=size: case.x_size == size
    yield "loss", "a vocabulary off every block", lambda case: case.layer.out_features in (255, 257)
    yield "qkv", "grouped-query attention", lambda case: len({layer.out_features for layer in case.layers}) > 1
    yield "rope", "grouped-query attention", lambda case: case.heads > case.kv_heads > 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        smallest, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
        yield "linear", f"subnormal x, {dtype}", lambda c, d=dtype, s=smallest: c.dtype == d and c.x_size < s
        yield "linear", f"subnormal dy, {dtype}", lambda c, d=dtype, s=smallest: c.dtype == d and c.dy_size < s
        yield "linear", f"x near overflow, {dtype}", lambda c, d=dtype, m=largest: c.dtype == d and c.x_size > m / 4e3
    yield "qkv", "subnormal x", lambda case: case.x_size < torch.finfo(case.dtype).smallest_normal
    yield "qkv", "subnormal dy", lambda case: case.dy_size < torch.finfo(case.dtype).smallest_normal
    yield "qkv", "x near overflow", lambda case: case.x_size > torch.finfo(case.dtype).max / 4e3
    for name in PROJECTED:
        yield name, "special numbers", lambda case: case.special and tokens_of(case) > 0
    yield from magnitudes()


def magnitudes() -> Iterator[tuple[str, str, Kind]]:
    for name in [*PROJECTED, "loss"]:
        for times in strategies.OUTLIERS[1:]:
            yield name, f"features {times:g} times the others", lambda c, t=times: c.outliers == t and tokens_of(c) > 0
    for name in ("mlp", "multi_lora", "rope", "loss"):
        yield name, "subnormal x", lambda case: case.x_size < smallest(case)
    for name in ("mlp", "multi_lora", "rope", "loss", "embedding"):
        yield name, "subnormal dy", lambda case: case.dy_size < smallest(case)
    for name in ("multi_lora", "rope"):
        yield name, "x near overflow", lambda case: case.x_size > largest(case) / 4e3
    for name in ("mlp", "embedding", "loss"):
        yield name, "dy near overflow", lambda case: case.dy_size > largest(case) / 4e5
    yield "mlp", "hidden features of the square of x's size", lambda case: case.x_size >= 1e15
    yield "loss", "logits far beyond exp", lambda case: case.x_size >= 300
    for name in ("embedding", "merge"):
        yield name, "a subnormal weight", lambda case: case.layer.size < smallest(case)
        yield name, "a weight near overflow", lambda case: case.layer.size > largest(case) / 4e3


def smallest(case: Case) -> float:
    """The smallest normal number of the case's type."""
    return torch.finfo(case.dtype).smallest_normal


def largest(case: Case) -> float:
    return torch.finfo(case.dtype).max


def layouts() -> Iterator[tuple[str, str, Kind]]:
    for name in TRAINED:
        for layout in LAYOUTS:
            if name != "embedding":
                yield name, f"{layout} x", lambda case, layout=layout: case.layout == layout
            if name != "loss":  # whose gradient is a number, or one of each token
                yield name, f"{layout} dy", lambda case, layout=layout: case.dy_layout == layout
    for layout in LAYOUTS[:-1]:
        yield "embedding", f"{layout} table", lambda case, layout=layout: case.table_layout == layout
    for name in ("qkv", "mlp"):
        for stacked in (False, True):
            yield name, f"stacked {stacked}", lambda case, stacked=stacked: case.stacked == stacked


def adapters() -> Iterator[tuple[str, str, Kind]]:
    for name in LAYERED:
        if name != "merge":  # which needs one
            yield name, "no adapter", any_layer(lambda layer: layer.rank == 0)
        yield name, "DoRA", any_layer(lambda layer: layer.dora and layer.rank > 0)
        yield name, "rows of zeros", any_layer(lambda layer: layer.zeros)
        yield name, "adapters in float32 beside half precision", any_layer(lambda la: la.adapter_dtype == torch.float32)
        if name == "embedding":
            continue
        yield name, "a bias", any_layer(lambda layer: layer.bias)
        for nested in (False, True):
            yield name, f"NF4, nested {nested}", any_layer(lambda la, nested=nested: la.nf4 and la.nested == nested)
        yield name, "NF4, blocks of zeros", any_layer(lambda layer: layer.nf4 and layer.zeros)
    yield "linear", "NF4 of an odd size", lambda case: case.layer.nf4 and case.in_features * case.layer.out_features % 2
    yield (
        "linear",
        "NF4 off its blocks",
        lambda case: case.layer.nf4 and case.in_features * case.layer.out_features % 64,
    )
    yield "multi_lora", "NF4", lambda case: case.nf4
    yield "multi_lora", "a bias", lambda case: case.bias
    yield "multi_lora", "several adapters", lambda case: len(set(case.index) - {-1}) > 1
    yield "multi_lora", "rows of no adapter", lambda case: -1 in case.index
    for name in [*PROJECTED, "loss"]:
        yield name, "dropout", lambda case: case.dropout is not None and case.dropout.p > 0
        yield name, "a seed of more than 32 bits", lambda case: case.dropout is not None and case.dropout.seed >= 2**32
        yield name, "another stream", lambda case: case.dropout is not None and case.dropout.stream > 0
        yield name, "no dropout", lambda case: case.dropout is None


def gradients() -> Iterator[tuple[str, str, Kind]]:
    for name in TRAINED:
        yield name, "everything trains", lambda case: not case.frozen
        yield name, "nothing of some kind trains", lambda case: len(case.frozen) == 1
        yield name, "as in training", lambda case: case.frozen == frozenset(training(case))
        if len(next(iter(drawn(name))).leaves) < 8:
            for leaf in next(iter(drawn(name))).leaves:
                yield name, f"{leaf} frozen", lambda case, leaf=leaf: leaf in case.frozen
                yield name, f"{leaf} trained", lambda case, leaf=leaf: leaf not in case.frozen


def training(case: Any) -> list[str]:
    """What is frozen in training: weights and biases, of norms too; q and k of rope are never."""
    return [leaf for leaf in case.leaves if leaf.endswith(("weight", "bias"))]


KINDS = list(kinds())


@pytest.mark.parametrize("name", EVERY)
def test_every_kind_of_input_is_drawn(name):
    mine = [(kind, holds) for strategy, kind, holds in KINDS if strategy == name]
    missing = [kind for kind, holds in mine if not any(map(holds, drawn(name))) and not is_found(name, holds)]
    assert not missing


def is_found(name: str, holds: Kind) -> bool:
    """Whether a kind that is rare, or that this drawing happened to miss, comes when it is looked for."""
    looking = settings(SETTINGS, max_examples=10 * CASES)
    try:
        find(EVERY[name], lambda case: bool(holds(case)), settings=looking)
    except NoSuchExample:
        return False
    return True


def test_any_subset_of_a_linear_layers_leaves_is_drawn():
    """Of the 64, a quarter in a few hundred cases; and of any two leaves both, either and neither."""
    subsets = {case.frozen for case in drawn("linear")}
    assert len(subsets) >= 2 ** len(LinearInput.leaves) // 4
    for one in LinearInput.leaves:
        for other in set(LinearInput.leaves) - {one}:
            answers = {(one in frozen, other in frozen) for frozen in subsets}
            assert len(answers) == 4, (one, other)


@pytest.mark.parametrize("name", EVERY)
def test_lora_B_and_dy_are_never_zero(name):
    """Nor is any gradient of an output: a zero there would prove nothing."""
    for case in drawn(name)[:: CASES // 25]:
        arguments = build(case)
        with torch.no_grad():
            outputs = named_outputs(case, BACKENDS["reference"], arguments)
        factors = {n: leaf for n, leaf in leaves(arguments) if n.endswith("lora_B")}
        for found, tensor in (factors | (upstream(case, outputs) if name != "merge" else {})).items():
            assert not tensor.numel() or tensor.any(), (found, case)


def test_blocks_of_zeros_are_drawn_as_nf4_blocks():
    """A layer with rows of zeros has, quantised, blocks whose largest number is zero."""

    def has_block(weight: NF4Weight) -> bool:
        decoded = BACKENDS["reference"].nf4_dequantize(weight, torch.float32).flatten()
        whole = decoded[: len(decoded) // weight.block_size * weight.block_size].view(-1, weight.block_size)
        return bool((whole == 0).all(1).any()) and len(nf4_absmax(weight)) > 1

    quantised = [case for case in drawn("linear") if case.layer.nf4 and case.layer.zeros]
    projections: list[Projection] = [build(case)["projection"] for case in quantised]
    assert any(has_block(p.weight) for p in projections)


def test_nf4s_own_strategies_draw_sizes_on_and_off_every_block():
    seen: set[tuple[int, int]] = set()

    @SETTINGS
    @given(test_nf4.sides, test_nf4.widths)
    def collect(rows: int, columns: int) -> None:
        seen.add((rows, columns))

    collect()
    assert {63, 64, 65, 127, 128, 129, 255} <= {columns for _, columns in seen}
    assert any(rows * columns % 2 for rows, columns in seen) and (1, 1) in seen
