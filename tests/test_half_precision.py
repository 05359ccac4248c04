"""Half precision, by autocast and in the weights, beside PEFT's and beside float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from test_their_loops import IDS, base, both_backends, in_order, pair
from torch import Tensor

import lora
from lora import LoRAConfig

BF16 = 2.0**-8  # one rounding


def gradient_of(model: Any, autocast: bool = False) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}


def error_of(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The relative Frobenius error of all gradients together."""
    difference = math.sqrt(sum(float((found[name] - exact[name]).square().sum()) for name in exact))
    return difference / math.sqrt(sum(float(gradient.square().sum()) for gradient in exact.values()))


@pytest.mark.parametrize("mode", ["autocast", "bfloat16"])
@both_backends
def test_half_precision_is_as_near_to_the_truth_as_peft_s(backend, mode, tmp_path):
    """Loss and gradients against float64, beside PEFT's on the same model.

    A layer of PEFT's rounds twice, its adapter in float32; of ours, six times (docs/decisions, 3). Roundings of either
    sign add up to their root: an error √3 times as large at most.
    """
    theirs, ours = pair(tmp_path, target_modules="all-linear")
    if mode == "bfloat16":
        for model in (theirs, ours):  # weights rounded, adapters in float32
            for parameter in model.parameters():
                parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
    exact = copy.deepcopy(ours).double()
    true_loss, truth = gradient_of(lora.for_training(exact))
    _, peft_gradient = gradient_of(theirs.train(), mode == "autocast")
    peft_gradient = dict(zip(truth, (peft_gradient[name] for name in in_order(theirs, ours)), strict=True))
    with lora.use_backend(backend):
        loss, gradient = gradient_of(lora.for_training(ours), mode == "autocast")
    assert all(p.grad.dtype == torch.float32 for p in lora.trainable_parameters(ours))
    assert 0 < error_of(gradient, truth) <= math.sqrt(3) * error_of(peft_gradient, truth)
    assert loss == pytest.approx(true_loss, rel=4 * BF16)


@pytest.mark.parametrize("mode", ["autocast", "bfloat16"])
@both_backends
def test_half_precision_training_learns(backend, mode):
    with lora.use_backend(backend):
        model = base().bfloat16() if mode == "bfloat16" else base()
        lora.inject(model, LoRAConfig(r=4, lora_dropout=0.1))
        optimizer = torch.optim.AdamW(lora.trainable_parameters(lora.for_training(model)), lr=1e-2)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.8 * losses[0], losses
        assert {p.dtype for p in lora.trainable_parameters(model)} == {torch.float32}
