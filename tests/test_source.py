"""A norm's result is made again in the backward of what reads it, not kept: bit for bit, and never when it changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import lora.fast as fast
from lora.fast import norm, source
from lora.projection import Dropout, Projection

TOKENS, WIDTH, HIDDEN, RANK = 6, 16, 24, 3
NORMS = {
    "rms": lambda x, w, **options: fast.rms_norm(x, w, **options),
    "rms, rounded last": lambda x, w, **options: fast.rms_norm(x, w, round_before_weight=False, offset=1.0, **options),
    "layer": lambda x, w, **options: fast.layer_norm(x, w, w + 0.1, **options),
    "layer, no bias": lambda x, w, **options: fast.layer_norm(x, w, **options),
}
READERS = ["linear", "qkv", "mlp"]


def projection(out: int, fan_in: int, dtype: torch.dtype, rank: int = RANK) -> Projection:
    A, B = (nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((rank, fan_in), (out, rank)))
    weight = nn.Parameter(torch.randn(out, fan_in, dtype=dtype) / fan_in**0.5, requires_grad=False)
    return Projection(weight, lora_A=A, lora_B=B, scaling=0.7) if rank else Projection(weight)


def reader(name: str, dtype: torch.dtype, dropout: Dropout | None = None, rank: int = RANK):
    """An operation that reads a norm's result, and its adapters."""
    if name == "mlp":
        parts = [projection(o, i, dtype, rank) for o, i in ((HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))]
        run = lambda y: fast.lora_mlp(y, *parts, activation="silu", dropout=dropout)  # noqa: E731
    elif name == "qkv":
        parts = [projection(8, WIDTH, dtype, rank) for _ in range(3)]
        run = lambda y: torch.cat(fast.lora_qkv(y, *parts, dropout=dropout), -1)  # noqa: E731
    else:
        parts = [projection(8, WIDTH, dtype, rank)]
        run = lambda y: fast.lora_linear(y, *parts, dropout=dropout)  # noqa: E731
    return run, [t for p in parts for t in (p.lora_A, p.lora_B) if t is not None]


def inputs(dtype: torch.dtype, residual: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x, w = torch.randn(2, TOKENS // 2, WIDTH, dtype=dtype, requires_grad=True), torch.rand(WIDTH, dtype=dtype) + 0.5
    return x, w, {"residual": torch.randn(x.shape, dtype=dtype).requires_grad_()} if residual else {}


def kept(function) -> set[int]:
    """The memory that autograd keeps for the backward of a call."""
    seen: set[int] = set()
    with saved_tensors_hooks(lambda x: seen.add(x.untyped_storage().data_ptr()) or x, lambda x: x):
        function()
    return seen


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("which", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_is_made_again_bit_for_bit(which, residual, name, dtype, monkeypatch):
    (x, w, more), (run, adapters) = inputs(dtype, residual), reader(name, dtype, Dropout(0.25, 5))
    wanted = [x, *more.values(), *adapters]

    def gradients() -> tuple[bool, tuple[Tensor, ...]]:
        made: list[Tensor] = []

        def forward() -> Tensor:
            y = NORMS[which](x, w, **more)
            made.append(y[0] if residual else y)
            return run(made[0])

        held = kept(forward)
        out = run(NORMS[which](x, w, **more)[0] if residual else NORMS[which](x, w, **more))
        dout = torch.ones_like(out).cumsum(0)
        return made[0].untyped_storage().data_ptr() in held, torch.autograd.grad(out, wanted, dout)

    held, found = gradients()
    assert not held
    monkeypatch.setattr(norm, "made_from", lambda *arguments: None)
    held, expected = gradients()
    assert held  # so that the bits below are compared with those of a kept y
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", READERS)
def test_one_that_was_changed_in_place_is_kept_as_it_is(name):
    (x, w, _), (run, adapters) = inputs(torch.float64, False), reader(name, torch.float64)
    y = fast.rms_norm(x, w)
    with torch.no_grad():
        y.mul_(3.0)
    out = run(y)
    found = torch.autograd.grad(out, adapters, torch.ones_like(out))
    changed = (fast.rms_norm(x, w).detach() * 3.0).requires_grad_()
    expected = torch.autograd.grad(run(changed), adapters, torch.ones_like(out))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", READERS)
def test_what_it_is_made_from_may_not_be_changed_before_the_backward(name):
    (x, w, _), (run, adapters) = inputs(torch.float64, False), reader(name, torch.float64)
    out = run(fast.rms_norm(x, w))
    with torch.no_grad():
        w.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, adapters, torch.ones_like(out))


@pytest.mark.parametrize("name", READERS)
def test_nothing_is_made_for_adapters_that_are_not_there(name, monkeypatch):
    (x, w, _), (run, _) = inputs(torch.float64, False), reader(name, torch.float64, rank=0)
    made: list[Tensor] = []
    rows = norm.normed_rows
    monkeypatch.setattr(norm, "normed_rows", lambda *a, **o: made.append(a[0]) or rows(*a, **o))
    out = run(fast.rms_norm(x, w))
    torch.autograd.grad(out, x, torch.ones_like(out))
    assert len(made) == 1  # by the norm itself


def test_a_note_is_as_old_as_its_tensor_and_in_no_file(tmp_path):
    (x, w, _), before = inputs(torch.float32, False), len(source._sources)
    y = fast.rms_norm(x, w)
    assert len(source._sources) == before + 1
    torch.save(y, tmp_path / "y.pt")
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), y)
    del y
    assert len(source._sources) == before


def test_a_norm_that_keeps_nothing_says_nothing():
    x, w, _ = inputs(torch.float32, False)
    with torch.no_grad():
        y = fast.rms_norm(x, w)
        assert source.source_of(y, y).make is source.itself
    y = fast.rms_norm(x.detach(), w)  # its input is not kept, so y may be
    assert source.source_of(y, y).make is source.itself
    with torch.inference_mode():
        fast.layer_norm(x, w)
