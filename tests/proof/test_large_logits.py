"""Losses of logits far beyond what exp can take, proven: e³⁰⁰ is no float32, and no float32 sum may need it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lora.fast as fast
from lora.testing.report import assert_within

VOCAB, TOKENS = 300, 4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_loss_of_logits_of_hundreds(device, sign, smoothing):
    """The logits are whole numbers up to 300 in size, exact in float32: only exp, log and sums are rounded.

    A relative error u of the log-sum-exp is an error |lse| u of its exponential: 300 u for every probability.
    """
    logits = (torch.arange(VOCAB) * 37 % 601 - 300).double() * sign  # from -300 to 300, all different
    x = torch.full((TOKENS, 1), 1.0, device=device).requires_grad_()
    weight = logits[:, None].float().to(device)
    labels = torch.tensor([0, 5, 17, VOCAB - 1], device=device)
    loss = fast.linear_cross_entropy(x, weight, labels, reduction="none", label_smoothing=smoothing)
    (dx,) = torch.autograd.grad(loss, x, torch.ones_like(loss))

    wide = logits[None].expand(TOKENS, -1)
    truth = F.cross_entropy(wide, labels.cpu(), reduction="none", label_smoothing=smoothing)
    p = torch.softmax(wide, 1) - smoothing / VOCAB
    p[torch.arange(TOKENS), labels.cpu()] -= 1 - smoothing
    u = torch.finfo(torch.float32).eps / 2
    assert_within(loss.detach(), truth, torch.full((TOKENS,), 16 * 300 * u, dtype=torch.float64), "loss")
    size = (torch.softmax(wide, 1) + smoothing / VOCAB) @ logits.abs() + logits[labels.cpu()].abs()
    assert_within(dx.flatten(), p @ logits, (2 * 300 + VOCAB) * u * size, "dx")
