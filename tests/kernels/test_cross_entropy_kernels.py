"""The cross-entropy kernel against `lora.reference.loss` in float64, losses and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora.errors import LoRAError
from lora.fast.kernels.cross_entropy import BLOCK, cross_entropy_, tanh
from lora.reference.loss import capped_logits
from lora.testing import assert_within

# NumPy, inside the interpreter, remarks on infinities in the branch of a `where` that is not taken; a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
U = 2**-24
Roundoff = Callable[[torch.dtype], float]


class Options(NamedTuple):
    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0


class Truth(NamedTuple):
    loss: Tensor  # [rows]
    lse: Tensor  # [rows]
    gradient: Tensor  # [rows, vocab]


def truth(logits: Tensor, labels: Tensor, options: Options, weight: Tensor) -> Truth:
    """The reference's formulas in float64, and autograd's gradient of the weighted sum."""
    leaf = logits.double().cpu().requires_grad_()
    z = capped_logits(leaf, options.softcap, options.logit_scale)
    loss = F.cross_entropy(z, labels, reduction="none", label_smoothing=options.label_smoothing)
    (gradient,) = torch.autograd.grad((loss * weight.double()).sum(), leaf)
    lse = torch.logsumexp(z, 1).masked_fill(labels == -100, 0)
    return Truth((loss * weight.double()).detach(), lse.detach(), gradient)


def bounds(logits: Tensor, labels: Tensor, options: Options, weight: Tensor, exact: Truth, u: float) -> Truth:
    """What float32 may lose, worst case to first order, and one rounding of the gradient to the logits' type.

    z: one rounding, or sixteen through the cap (three products, 1 / cap, and tanh, which has eight). lse: an error in
    every z moves it by at most the largest; e^(z - max) has a relative error of 4 roundings and 4 |z - max|, over all
    rescalings of a running sum together; sums of n blocks and 2048 lanes take n + 11 additions. exp(z - lse) likewise.
    """
    softcap, scale, smoothing = options
    z = capped_logits(logits.double().cpu(), softcap, scale)
    vocab, blocks = z.shape[1], -(-z.shape[1] // BLOCK)
    e_z = (1 if softcap is None else 16) * U * z.abs()  # [rows, vocab]
    spread, size = z.amax(1) - z.amin(1), z.abs().amax(1)  # [rows]
    e_lse = e_z.amax(1) + U * (4 * spread + 10 * blocks + 30 + 3 * (size + math.log(vocab)))
    weight = weight.double().abs()
    e_loss = weight * (e_lse + 2 * e_z.amax(1) + U * (6 * (size + math.log(vocab)) + smoothing * (blocks + 15) * size))
    p = torch.exp(z - torch.logsumexp(z, 1, keepdim=True))
    t = F.one_hot(labels.clamp(min=0), vocab) * (1 - smoothing) + smoothing / vocab
    e_p = p * (e_z + e_lse[:, None] + U * (4 + 2 * (z - torch.logsumexp(z, 1, keepdim=True)).abs()))
    bend = 0.0 if softcap is None else 40 * U  # of 1 - (z / cap)², which is at most 1
    e_gradient = (weight * scale)[:, None] * (e_p + (4 * U + bend) * (p + t)) + 4 * U * exact.gradient.abs()
    tiny = torch.finfo(logits.dtype).smallest_normal * u * 2 + torch.finfo(torch.float32).smallest_normal
    return Truth(e_loss, e_lse, (1 + u) * e_gradient + u * exact.gradient.abs() + tiny)


def check(
    logits: Tensor, labels: Tensor, options: Options, weight: float | Tensor, device: str, roundoff: Roundoff
) -> None:
    """Loss only, leaving the logits alone; then loss and gradient, in place."""
    rows = torch.as_tensor(weight, dtype=torch.float32).expand(len(labels)).cpu()
    exact = truth(logits, labels, options, rows)
    bound = bounds(logits, labels, options, rows, exact, roundoff(logits.dtype))
    before, lse = logits.clone(), torch.empty(len(labels), device=device)
    loss = cross_entropy_(logits, labels.to(device), *options, weight, False, lse=lse)
    assert torch.equal(logits, before) and loss.dtype == torch.float32
    assert_within(loss.cpu(), exact.loss, bound.loss, "loss")
    assert_within(lse.cpu(), exact.lse, bound.lse, "lse")
    assert torch.equal(cross_entropy_(logits, labels.to(device), *options, weight, True), loss)
    assert_within(logits.cpu(), exact.gradient, bound.gradient, "gradient")
    ignored = labels == -100
    assert (loss.cpu()[ignored] == 0).all() and (logits.cpu()[ignored] == 0).all()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(rows: int, vocab: int, spare: int, dtype: torch.dtype, magnitude: float, device: str, seed: int = 0) -> Any:
    """Logits in rows of a wider buffer, and labels of which about a fifth are ignored."""
    wide = torch.full((rows, vocab + spare), math.nan, dtype=dtype, device=device)
    wide[:, :vocab] = magnitude * normal(rows, vocab, seed=seed).to(device)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.2] = -100
    return wide[:, :vocab], labels, wide[:, vocab:]


OPTIONS = st.builds(
    Options,
    softcap=st.sampled_from([None, 0.7, 5.0, 30.0]),
    logit_scale=st.sampled_from([1.0, 0.0625, -1.3]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
)


@given(
    rows=st.integers(1, 6),
    vocab=st.integers(1, 70),
    spare=st.sampled_from([0, 1, 7]),
    options=OPTIONS,
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([0.1, 3.0, 100.0]),
    each=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_is_the_reference(
    rows: int,
    vocab: int,
    spare: int,
    options: Options,
    dtype: torch.dtype,
    magnitude: float,
    each: bool,
    seed: int,
    device: str,
    roundoff: Roundoff,
) -> None:
    logits, labels, beside = case(rows, vocab, spare, dtype, magnitude, device, seed)
    weight = normal(rows, seed=seed + 1).to(device) if each else 0.37
    check(logits, labels, options, weight, device, roundoff)
    assert beside.isnan().all()


@pytest.mark.parametrize("vocab", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77])
@pytest.mark.parametrize("options", [Options(), Options(30.0, 0.5, 0.1)])
@pytest.mark.parametrize("order", ["rising", "falling", "random"])
def test_vocabularies_of_several_blocks(
    vocab: int, options: Options, order: str, device: str, roundoff: Roundoff
) -> None:
    """The running maximum rises in every block, or never, or at times; labels lie in the first and the last block."""
    logits, _, beside = case(3, vocab, 3, torch.float32, 4.0, device)
    if order != "random":
        logits.copy_(logits.sort(1, descending=order == "falling").values)
    labels = torch.tensor([0, vocab - 1, vocab // 2])
    check(logits, labels, options, 0.25, device, roundoff)
    assert beside.isnan().all()


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_very_unlikely_and_very_likely_labels(softcap: float | None, device: str, roundoff: Roundoff) -> None:
    logits = torch.zeros(2, 50, device=device)
    logits[:, 7] = 400.0
    check(logits, torch.tensor([7, 8]), Options(softcap), 1.0, device, roundoff)


def test_classes_that_are_ruled_out(device: str) -> None:
    """A logit of -inf has no probability and no gradient, in every lane and block; the rest is as if it were absent."""
    vocab = BLOCK + 300
    logits, labels = normal(2, vocab).to(device), torch.tensor([5, vocab - 1], device=device)
    out = torch.arange(vocab, device=device) % 3 == 0
    ruled = logits.masked_fill(out, -math.inf)
    short = logits[:, ~out].contiguous()
    place = (~out).cumsum(0) - 1
    loss = cross_entropy_(ruled, labels)
    assert (ruled[:, out] == 0).all()
    expected = truth(short, place[labels].cpu(), Options(), torch.ones(2))
    # 40 roundings of numbers up to 10, as in `bounds`
    torch.testing.assert_close(loss.cpu().double(), expected.loss, rtol=0, atol=40 * 10 * U)
    torch.testing.assert_close(ruled[:, ~out].cpu().double(), expected.gradient, rtol=0, atol=40 * 10 * U)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_ignored_row_is_not_read(dtype: torch.dtype, device: str) -> None:
    """Its loss, log-sum-exp and gradient are 0 even where the logits are not numbers; another index can be chosen."""
    logits = torch.full((3, 2 * BLOCK + 5), math.nan, dtype=dtype, device=device)
    logits[1] = normal(2 * BLOCK + 5).to(device)
    lse = torch.empty(3, device=device)
    loss = cross_entropy_(logits, torch.tensor([-1, 3, -1], device=device), ignore_index=-1, lse=lse)
    assert loss[0] == loss[2] == lse[0] == lse[2] == 0 and loss[1] > 0
    assert (logits[[0, 2]] == 0).all() and logits[1].isfinite().all() and logits[1, 3] < 0


@pytest.mark.parametrize("label", [-1, 50, 2**40])
def test_a_label_outside_the_vocabulary_is_nan_and_no_fault(label: int, device: str) -> None:
    loss = cross_entropy_(normal(2, 50).to(device), torch.tensor([label, 4], device=device))
    assert loss[0].isnan() and loss[1].isfinite()


def test_nan_logits_are_not_hidden(device: str) -> None:
    logits = normal(2, 50).to(device)
    logits[0, 30] = math.nan
    loss = cross_entropy_(logits, torch.tensor([1, 2], device=device))
    assert loss[0].isnan() and logits[0].isnan().all() and loss[1].isfinite() and logits[1].isfinite().all()


def test_one_class_and_no_rows(device: str) -> None:
    logits = normal(4, 1).to(device)
    assert (cross_entropy_(logits, torch.zeros(4, dtype=torch.int64, device=device)) == 0).all()
    assert (logits == 0).all()
    nothing = cross_entropy_(torch.empty(0, 9, device=device), torch.empty(0, dtype=torch.int64, device=device))
    assert nothing.shape == (0,)


def test_expanded_weights_and_strided_labels(device: str) -> None:
    logits, (labels, weight) = normal(4, 9).to(device), (torch.tensor([1, 0, 2, 8]), torch.tensor([0.5, 9, 2.0, 9]))
    pairs = torch.stack([labels, labels], dim=1).to(device)
    one = cross_entropy_(logits.clone(), pairs[:, 0], weight=weight.to(device)[::2].repeat_interleave(2)[:1].expand(4))
    other = cross_entropy_(logits.clone(), labels.to(device), weight=0.5)
    assert torch.equal(one, other)


@triton.jit
def tanh_of(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), tanh(tl.load(x_ptr + tl.arange(0, BLOCK))))


def test_tanh_is_within_eight_roundings(device: str) -> None:
    x = torch.cat([torch.linspace(-1, 1, 4096), torch.linspace(-12, 12, 2048), torch.logspace(-30, 38, 2048)])
    y = torch.empty_like(x, device=device)
    tanh_of[(1,)](x.to(device), y, BLOCK=8192)
    exact = torch.tanh(x.double())
    assert_within(y.cpu(), exact, 8 * U * exact.abs() + torch.finfo(torch.float32).smallest_normal, "tanh")


def test_bad_input_is_refused(device: str) -> None:
    logits, labels = normal(4, 6).to(device), torch.zeros(4, dtype=torch.int64, device=device)
    for bad in (logits.double(), logits[0], logits.new_empty(4, 0)):
        with pytest.raises(LoRAError, match=r"logits is .*, expected \[rows, vocab\] in float32"):
            cross_entropy_(bad, labels)
    for bad in (logits.new_empty(6, 4).T, logits[:1].expand(4, 6), logits.new_empty(4, 12)[:, ::2]):
        with pytest.raises(
            LoRAError, match=r"expected the 6 logits of a row side by side and rows that do not overlap"
        ):
            cross_entropy_(bad, labels)
    for bad in ({"labels": labels[:3]}, {"labels": labels.int()}, {"weight": logits[:, 0].half()}, {"lse": logits}):
        with pytest.raises(LoRAError, match=rf"{next(iter(bad))} is .*, expected torch.\w+ \[4\]: one a row"):
            cross_entropy_(**{"logits": logits, "labels": labels, **bad})
    with pytest.raises(LoRAError, match="lse has stride 2, expected a contiguous tensor"):
        cross_entropy_(logits, labels, lse=logits.new_empty(8)[::2])
