"""Checkpointing on the fast backend: the same bits, and what it leaves out of the second run."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama

import lora
import lora.fast
from lora import LoRAConfig
from lora.projection import Projection

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _on_fast():
    with lora.use_backend("fast"):
        yield


def count_products(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the wide products x Wᵀ that are run, appended to as they happen."""
    import sys

    seen: list[tuple[int, ...]] = []
    linear = sys.modules["lora.fast.linear"]
    plain = linear.products
    monkeypatch.setattr(
        linear,
        "products",
        lambda rows, parts: (seen.append(tuple(p.out_features for p in parts)), plain(rows, parts))[1],
    )
    return seen


def losses(model, mode: str, seen: list) -> tuple[torch.Tensor, dict[str, torch.Tensor], list]:
    lora.for_training(model, checkpointing=mode)
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(IDS, labels=IDS).loss
    del seen[:]
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}, list(seen)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", ["recompute", "selective", "offload"])
def test_down_proj_is_never_run_again(monkeypatch, mode, fused):
    model = lora.inject(tiny_llama(), LoRAConfig(r=4, lora_dropout=0.3, init_lora_weights=False))
    seen = count_products(monkeypatch)
    loss, gradients, _ = losses(model, "none", seen)
    if not fused:
        monkeypatch.setattr("lora.fast.modes.fuse", lambda model: model)
        lora.fast.inject.__globals__["unfuse"](model)
    again, found, products = losses(model, mode, seen)
    assert torch.equal(loss, again) if fused else torch.allclose(loss, again, rtol=1e-5)
    for name, gradient in gradients.items():
        assert (
            torch.equal(found[name], gradient) if fused else torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5)
        )
    hidden, head = 32, 64
    per_block = [p for p in products if p != (head,)]
    outputs = [p for p in per_block if p == (hidden,)]  # o_proj gives this size (unfused, q_proj), and down_proj would
    assert len(outputs) == (2 if fused else 4), per_block  # in the two blocks, and none of a down_proj


def test_a_block_that_reads_its_last_product_runs_it_again():
    """Gemma normalises what down_proj gives, and keeps it for the backward."""
    x = torch.randn(5, 8, requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(8))
    p = Projection(
        torch.randn(8, 8), None, torch.randn(2, 8, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    )

    def block(x):
        return x + lora.ops.rms_norm(lora.ops.lora_linear(x, p), weight)

    grads = [torch.autograd.grad(run(x).square().sum(), (x, p.lora_A, p.lora_B, weight))
             for run in (block, lambda x: lora.ops.checkpoint(block, x))]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_an_exception_in_the_backward_leaves_nothing_behind():
    x = torch.randn(5, 8, requires_grad=True)
    p = Projection(
        torch.randn(8, 8), None, torch.randn(2, 8, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    )
    fail = [False, True, False, False]

    def block(x):
        if fail.pop(0):
            raise RuntimeError("out of memory, say")
        return lora.ops.lora_linear(lora.ops.lora_linear(x, p), p)

    with pytest.raises(RuntimeError, match="out of memory"):
        lora.ops.checkpoint(block, x).sum().backward()
    dx = torch.autograd.grad(lora.ops.checkpoint(block, x).sum(), x)
    expected = torch.autograd.grad(lora.ops.lora_linear(lora.ops.lora_linear(x, p), p).sum(), x)
    assert torch.equal(dx[0], expected[0])
