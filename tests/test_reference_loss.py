"""linear_cross_entropy: the output head, the softmax and the loss in one operation."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ROUNDING,
    check_backward,
    constant_dora_norm,
    doubled,
    gradients_of,
    linear_magnitude,
    normal,
    random_projection,
    roundings,
    trainable,
    with_trainable,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lora.errors import LoRAError
from lora.projection import Dropout, Projection
from lora.reference.linear import lora_linear
from lora.reference.loss import linear_cross_entropy, linear_cross_entropy_backward, warn_nothing_counts
from lora.reference.nf4 import nf4_quantize

REDUCTIONS = ["mean", "sum", "none"]


def check_loss(hidden: Tensor, head: Projection, labels: Tensor, numerical: bool = True, **options: Any) -> None:
    def forward(hidden: Tensor, *tensors: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, with_trainable(head, tensors), labels, **options)

    def backward(dloss: Tensor, hidden: Tensor, *tensors: Tensor) -> list[Tensor]:
        gradients = linear_cross_entropy_backward(dloss, hidden, with_trainable(head, tensors), labels, **options)
        return [gradients.dx, *gradients_of(head, gradients)]

    check_backward(forward, backward, [hidden, *trainable(head)], numerical=numerical)


def random_labels(shape: tuple[int, ...], vocab: int, ignored: float = 0.3, ignore_index: int = -100) -> Tensor:
    labels = torch.randint(vocab, shape)
    return labels.masked_fill(torch.rand(shape) < ignored, ignore_index)


@given(
    shape=st.lists(st.integers(1, 3), max_size=2),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 4), st.none() | st.integers(1, 2)),
    bias=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    softcap=st.sampled_from([None, 0.8, 5.0]),
    logit_scale=st.sampled_from([1.0, -0.4]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    num_items=st.sampled_from([None, 2.5]),
    p=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**31),
)
def test_backward(
    shape: list[int], sizes: tuple[int, int, int | None], bias: bool, p: float, seed: int, **options: Any
) -> None:
    assume(options["num_items"] is None or options["reduction"] == "mean")
    torch.manual_seed(seed)
    vocab, features, rank = sizes
    head = random_projection(vocab, features, rank, bias=bias)
    labels = random_labels(tuple(shape), vocab)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every label of a small batch may be ignored
        check_loss(normal(*shape, features), head, labels, dropout=Dropout(p, seed), **options)


def test_backward_of_a_dora_head_and_of_an_nf4_one() -> None:
    labels = random_labels((5,), 6)
    with constant_dora_norm(1 + normal(6).abs()):
        check_loss(normal(5, 4), random_projection(6, 4, 2, dora=True), labels)
    head = random_projection(8, 4, 2)
    check_loss(normal(5, 4), head._replace(weight=nf4_quantize(head.weight.float())), labels, softcap=3.0)


def plain_loss(
    hidden: Tensor, head: Projection, labels: Tensor, softcap: float | None, logit_scale: float, **options: Any
) -> Tensor:
    logits = lora_linear(hidden, head) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_agrees_with_torch(reduction: str, softcap: float | None, label_smoothing: float, ignore_index: int) -> None:
    head, hidden = random_projection(11, 5, 2, bias=True), normal(3, 4, 5).requires_grad_()
    labels = random_labels((3, 4), 11, ignore_index=ignore_index)
    options = {"softcap": softcap, "logit_scale": 0.6, "label_smoothing": label_smoothing}
    options |= {"ignore_index": ignore_index, "reduction": reduction}
    found, expected = linear_cross_entropy(hidden, head, labels, **options), plain_loss(hidden, head, labels, **options)
    assert found.shape == (labels.shape if reduction == "none" else ())
    torch.testing.assert_close(found.flatten(), expected.flatten(), **ROUNDING)
    dloss = normal(*found.shape)
    (dhidden,) = torch.autograd.grad(expected, hidden, dloss.view(expected.shape))
    gradients = linear_cross_entropy_backward(dloss, hidden.detach(), head, labels, **options)
    torch.testing.assert_close(gradients.dx, dhidden, **ROUNDING)
    ignored = labels == ignore_index
    assert ignored.any() and (gradients.dx[ignored] == 0).all()


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
def test_agrees_with_transformers(num_items: int | Tensor | None) -> None:
    """Its function shifts the labels itself; ours is given what is shifted."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    head, hidden = random_projection(11, 5, 2, dtype=torch.float32), normal(3, 6, 5, dtype=torch.float32)
    labels = random_labels((3, 6), 11)
    expected = ForCausalLMLoss(lora_linear(hidden, head), labels, 11, num_items_in_batch=num_items)
    found = linear_cross_entropy(hidden[:, :-1], head, labels[:, 1:], num_items=num_items)
    torch.testing.assert_close(found, expected, rtol=30 * 2**-24, atol=0)  # a sum of 15 positive terms


def test_gradients_of_micro_batches_add_up() -> None:
    """With the count of the whole batch, uneven parts give the gradient of the whole; with their own they do not."""
    head, hidden, labels = random_projection(11, 5, 2), normal(6, 4, 5), random_labels((6, 4), 11, 0.0)
    labels[0, 1:] = labels[1, 2:] = -100
    count = int((labels != -100).sum())
    one = torch.tensor(1.0, dtype=torch.float64)
    whole = linear_cross_entropy_backward(one, hidden, head, labels)
    parts = [
        linear_cross_entropy_backward(one, hidden[rows], head, labels[rows], num_items=count)
        for rows in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(parts[0].dlora_A + parts[1].dlora_A, whole.dlora_A, **ROUNDING)
    torch.testing.assert_close(parts[0].dlora_B + parts[1].dlora_B, whole.dlora_B, **ROUNDING)
    means = [
        linear_cross_entropy_backward(one / 2, hidden[rows], head, labels[rows]).dlora_B
        for rows in (slice(0, 2), slice(2, 6))
    ]
    assert (means[0] + means[1] - whole.dlora_B).abs().max() > 1e-3


def test_a_bare_weight_is_a_head() -> None:
    head, hidden, labels = random_projection(11, 5, None), normal(6, 5), random_labels((6,), 11)
    expected = linear_cross_entropy(hidden, head, labels)
    assert torch.equal(linear_cross_entropy(hidden, head.weight, labels), expected)
    one = torch.ones((), dtype=torch.float64)
    gradients = linear_cross_entropy_backward(one, hidden, head.weight, labels)
    assert gradients.dlora_A is None and gradients.dx.abs().max() > 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, 3), (0,), (2, 0)])
def test_without_a_label_that_counts_the_loss_is_zero(reduction: str, shape: tuple[int, ...]) -> None:
    head, hidden = random_projection(6, 4, 2), normal(*shape, 4).requires_grad_()
    A = head.lora_A.requires_grad_()
    labels = torch.full(shape, -100)
    warn_nothing_counts.cache_clear()
    with pytest.warns(UserWarning, match="Every label of a batch is -100"):
        loss = linear_cross_entropy(hidden, head, labels, reduction=reduction)
    assert torch.equal(loss, torch.zeros_like(loss))
    loss.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden)) and torch.equal(A.grad, torch.zeros_like(A))
    check_loss(normal(*shape, 4), random_projection(6, 4, 2), labels, reduction=reduction, numerical=False)


def test_the_warning_is_given_once_and_points_at_the_caller() -> None:
    warn_nothing_counts.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            linear_cross_entropy(normal(2, 4), random_projection(6, 4), torch.full((2,), -100))
    assert [warning.filename for warning in caught] == [__file__]


def test_one_token() -> None:
    check_loss(normal(4), random_projection(6, 4, 2), torch.tensor(3), numerical=False)
    check_loss(normal(1, 4), random_projection(6, 4, 2), torch.tensor([3]), numerical=False)


def test_layout_does_not_matter() -> None:
    head, labels = random_projection(6, 4, 2), random_labels((4, 6), 6).T[::2]
    for hidden in (normal(4, 4, 3).transpose(0, 2), normal(1, 4, 4).expand(3, 4, 4)):
        found = linear_cross_entropy(hidden, head, labels)
        torch.testing.assert_close(
            found, linear_cross_entropy(hidden.contiguous(), head, labels.contiguous()), **ROUNDING
        )
        check_loss(hidden, head, labels, numerical=False)


def test_shifted_logits_do_not_overflow() -> None:
    head = random_projection(6, 4, 2)
    loss = linear_cross_entropy(normal(5, 4) * 1e5, head, random_labels((5,), 6, 0.0), reduction="none")
    assert loss.isfinite().all() and loss.max() > 1e4


def test_bfloat16_is_within_its_roundings() -> None:
    """The loss changes by at most twice the largest change of a logit: log-sum-exp and the label's own each by one."""
    head = random_projection(33, 65, 4, bias=True, dtype=torch.bfloat16)
    hidden, labels = normal(40, 65, dtype=torch.bfloat16), random_labels((40,), 33, 0.0)
    options = {"softcap": 30.0, "logit_scale": 0.25, "reduction": "none"}
    loss = linear_cross_entropy(hidden, head, labels, **options)
    assert loss.dtype == torch.float32
    error = (loss - linear_cross_entropy(hidden.double(), doubled(head), labels, **options)).abs()
    bound = 2 * 0.25 * roundings(5) * linear_magnitude(hidden, head).amax(-1)  # tanh only shrinks a change
    assert error.max() > 0
    assert (error <= bound).all()
    gradients = linear_cross_entropy_backward(torch.ones(40), hidden, head, labels, **options)
    assert gradients.dx.dtype == gradients.dlora_A.dtype == torch.bfloat16


@pytest.mark.parametrize(("wrong", "position"), [(6, r"\(1, 2\)"), (-1, r"\(1, 2\)"), (-99, r"\(1, 2\)")])
@pytest.mark.parametrize("backward", [False, True])
def test_a_label_outside_the_vocabulary_is_named(wrong: int, position: str, backward: bool) -> None:
    hidden, head, labels = normal(2, 3, 4), random_projection(6, 4), random_labels((2, 3), 6)
    labels[1, 2] = wrong
    with pytest.raises(
        LoRAError, match=f"Label {wrong} at position {position} is not a class, expected 0 to 5 or -100"
    ):
        if backward:
            linear_cross_entropy_backward(torch.ones((), dtype=torch.float64), hidden, head, labels)
        else:
            linear_cross_entropy(hidden, head, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "avg"}, "reduction is 'avg', expected one of 'mean', 'sum', 'none'"),
        ({"reduction": "sums"}, "Did you mean 'sum'"),
        ({"reduction": "sum", "num_items": 3}, "num_items is given with reduction='sum'"),
        ({"num_items": 0}, "num_items is 0.0, expected > 0"),
        ({"num_items": torch.tensor(-2)}, "num_items is -2.0"),
        ({"num_items": math.nan}, "num_items is nan"),
        ({"softcap": 0.0}, "softcap is 0.0, expected a positive number"),
        ({"softcap": math.nan}, "softcap is nan"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoRAError, match=message):
        linear_cross_entropy(normal(2, 4), random_projection(6, 4), torch.tensor([0, 1]), **options)


def test_one_label_a_token() -> None:
    with pytest.raises(LoRAError, match=r"labels is \[2, 2\] beside hidden \[2, 3, 4\], expected \[2, 3\]"):
        linear_cross_entropy(normal(2, 3, 4), random_projection(6, 4), torch.zeros(2, 2, dtype=torch.int64))
