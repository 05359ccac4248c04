"""Sums of which a few terms are far larger than the rest, proven at the sizes of a real model's.

A hidden feature of a real MLP may be hundreds of times the others, and enters down_proj's sum of thousands; so does the
label's -1 among the probabilities that a head's dx sums. The strategies draw both at small sizes: here they are large.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lora.fast
from lora.fast.runtime import interpreting
from lora.projection import Projection
from lora.testing.block_cases import LossInput
from lora.testing.cases import Layer, LinearInput, MLPInput, with_outliers
from lora.testing.proof import Arguments, Case, Maker, assert_equivalent, build, changed

FROZEN = frozenset({"weight"})
DOWN = LinearInput(shape=(33,), in_features=4096, layer=Layer(256, 8), outliers=700.0, frozen=FROZEN)
HEAD = LossInput(shape=(17,), features=64, layer=Layer(5003, 4), outliers=30.0, frozen=FROZEN)


class LargeHidden(MLPInput):
    """An MLP that makes such hidden features: a few of up's rows are far larger than the rest."""

    def arguments(self, make: Maker) -> Arguments:
        made = super().arguments(make)
        weight = with_outliers(made["up"].weight.T, 300.0, make).T.contiguous()
        return made | {"up": made["up"]._replace(weight=weight)}


MLP = LargeHidden(
    shape=(9,), in_features=64, layers=(Layer(1024, 4), Layer(1024, 4), Layer(64, 4)), outliers=10.0,
    frozen=frozenset({"gate.weight", "up.weight", "down.weight"}),
)  # fmt: skip
# float16 holds no such numbers beside such sums
CASES = [
    *(changed(case, dtype=dtype) for case in (DOWN, HEAD, MLP) for dtype in (torch.float32, torch.bfloat16)),
    changed(DOWN, dtype=torch.float16, outliers=30.0), changed(HEAD, dtype=torch.float16),
]  # fmt: skip


def named(case: Any) -> str:
    return f"{case.operation} {case.dtype}"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_sums_with_a_few_large_terms_are_within_the_bound(device, case):
    assert_equivalent(case, device)


def test_the_largest_features_are_the_same_in_every_token_and_as_large_as_a_models():
    """Of 4,096 features forty, some hundred times the root of the mean square of all tokens' others."""
    x = build(DOWN)["x"].detach()
    sizes = x.square().mean(0).sqrt()
    assert int((sizes > 100 * sizes.median()).sum()) == 40
    assert float(x.abs().max() / sizes.median()) > 26


# ---- a sum that is kept too narrow is rejected, one that is made in the slowest order is not


def narrowly(left: Tensor, right: Tensor, kind: torch.dtype, block: int = 1) -> Tensor:
    """left · right, [m, k] by [k, n], added up a term, or a block of them, at a time, the sum stored in `kind`."""
    total = left.new_zeros(len(left), right.shape[1], dtype=kind)
    for a, b in zip(left.float().split(block, 1), right.float().split(block), strict=True):
        total = (total.float() + a @ b).to(kind)
    return total.to(left.dtype)


class Narrow(torch.autograd.Function):
    """x Wᵀ of a frozen W: sums in a narrow type, of the forward or of dx."""

    @staticmethod
    def forward(ctx, x, weight, kind, backward):
        ctx.save_for_backward(weight)
        ctx.kind = kind if backward else torch.float32
        return narrowly(x, weight.T, torch.float32 if backward else kind)

    @staticmethod
    def backward(ctx, dy):
        return narrowly(dy, ctx.saved_tensors[0], ctx.kind), None, None, None


def narrow_linear(kind: torch.dtype, backward: bool):
    def lora_linear(x: Tensor, projection: Projection, dropout: None = None) -> Tensor:
        p = projection
        update = x @ p.lora_A.T * p.scaling @ p.lora_B.T
        return Narrow.apply(x, p.weight.detach(), kind, backward) + update

    return lora_linear


def narrow_loss(kind: torch.dtype, backward: bool):
    def linear_cross_entropy(hidden: Tensor, head: Projection, labels: Tensor, **_: Any) -> Tensor:
        return F.cross_entropy(narrow_linear(kind, backward)(hidden, head).float(), labels)

    return linear_cross_entropy


# Logits of hundreds are off by 1 in bfloat16, and so may probabilities be: these are of a head without outliers.
# In the interpreter bfloat16 is cut off, which doubles all of its bounds, and what a head's sum loses is within them.
HALF = [torch.float16, torch.bfloat16]
WAYS: list[tuple[Case, Any, bool, torch.dtype, torch.dtype]] = [
    *((DOWN, narrow_linear, False, torch.float32, kind) for kind in HALF),
    (DOWN, narrow_linear, False, torch.bfloat16, torch.bfloat16),
    *((changed(HEAD, outliers=1.0), narrow_loss, True, torch.float32, kind) for kind in HALF),
    *(() if interpreting() else [(changed(HEAD, outliers=1.0), narrow_loss, True, torch.bfloat16, torch.bfloat16)]),
]


@pytest.mark.parametrize(
    ("case", "narrow", "backward", "dtype", "kind"), WAYS, ids=lambda v: getattr(v, "operation", None)
)
def test_a_sum_in_half_precision_is_rejected(device, monkeypatch, case, narrow, backward, dtype, kind):
    """Of float32 products as of bfloat16 ones; the same terms one after another in float32 are an admissible order."""
    case = changed(case, dtype=dtype)
    monkeypatch.setattr(lora.fast, case.operation, narrow(torch.float32, backward))
    assert_equivalent(case, device)
    monkeypatch.setattr(lora.fast, case.operation, narrow(kind, backward))
    with pytest.raises(AssertionError, match=r"times its bound|from fast is wrong by"):
        assert_equivalent(case, device)


def test_terms_one_after_another_are_further_off_than_blocks_of_them(device):
    """And still within both criteria: no order of work is wrong."""
    x, projection = (build(DOWN, device)[name] for name in ("x", "projection"))
    x, weight = x.detach(), projection.weight.detach().T
    truth = x.double() @ weight.double()
    one_by_one, blocks = (float((narrowly(x, weight, torch.float32, n) - truth).abs().max()) for n in (1, 64))
    assert one_by_one > 2 * blocks
