"""A whole decoder made of the operations, proven: loss and every gradient, by finite differences and by each other.

Embedding, two blocks (norm, q k v, rotary embedding, attention, residual and norm, gated MLP), norm, output head and
loss: all through one backend's operations, so that an error that hides in one operation's tolerance shows in the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora.fast.runtime import interpreting
from lora.projection import Dropout, Projection
from lora.testing.proof import BACKENDS, Maker
from proof.laws import both, examples

WIDTH, HEADS, KV_HEADS, DIM, HIDDEN, VOCAB, BLOCKS = 16, 4, 2, 4, 24, 29, 2


class Decoder:
    """Weights and adapters of one seed; `loss` runs them through a backend."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str, dora: bool = False) -> None:
        self.make, self.dora = Maker(seed, dtype, device), dora
        self.table = self.projection(WIDTH, VOCAB, dora=False)
        self.table = self.table._replace(weight=self.make.normal(VOCAB, WIDTH))
        self.blocks = [
            {
                "q": self.projection(HEADS * DIM, WIDTH), "k": self.projection(KV_HEADS * DIM, WIDTH),
                "v": self.projection(KV_HEADS * DIM, WIDTH), "o": self.projection(WIDTH, HEADS * DIM),
                "gate": self.projection(HIDDEN, WIDTH), "up": self.projection(HIDDEN, WIDTH),
                "down": self.projection(WIDTH, HIDDEN),
            }
            for _ in range(BLOCKS)
        ]  # fmt: skip
        self.norms = [(1 + 0.1 * self.make.normal(WIDTH)).requires_grad_() for _ in range(2 * BLOCKS + 1)]
        self.head = self.projection(VOCAB, WIDTH)
        self.ids = self.make.integers(0, VOCAB, 2, 7)
        angles = torch.arange(7)[:, None] / torch.tensor([1.0, 10.0])
        angles = torch.cat([angles, angles], 1)
        self.cos, self.sin = (f().to(device, dtype) for f in (angles.double().cos, angles.double().sin))

    def projection(self, out: int, fan_in: int, dora: bool | None = None) -> Projection:
        dora = self.dora if dora is None else dora
        return Projection(
            self.make.normal(out, fan_in, scale=fan_in**-0.5),
            None,
            self.make.normal(3, fan_in, scale=fan_in**-0.5).requires_grad_(),
            self.make.normal(out, 3, scale=0.5).requires_grad_(),
            1.5,
            self.make.positive(out).requires_grad_() if dora else None,
        )

    def leaves(self) -> Iterator[Tensor]:
        for p in (self.table, *(p for block in self.blocks for p in block.values()), self.head):
            yield from (t for t in p[2:] if isinstance(t, Tensor))
        yield from self.norms

    def loss(
        self, ops, dropout: Dropout | None = None, rows: slice = slice(None), num_items: float | None = None
    ) -> Tensor:
        ids = self.ids[rows]
        x = ops.lora_embedding(ids, self.table)
        y = ops.rms_norm(x, self.norms[0])
        for i, block in enumerate(self.blocks):
            q, k, v = ops.lora_qkv(y, block["q"], block["k"], block["v"], dropout=dropout)
            q, k, v = (t.unflatten(-1, (-1, DIM)).transpose(1, 2) for t in (q, k, v))
            q, k = ops.rope(q, k, self.cos, self.sin)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x_new = ops.lora_linear(attended.transpose(1, 2).flatten(2), block["o"], dropout=dropout)
            y, x = ops.rms_norm(x_new, self.norms[2 * i + 1], residual=x)
            mlp = ops.lora_mlp(y, block["gate"], block["up"], block["down"], activation="silu", dropout=dropout)
            y, x = ops.rms_norm(mlp, self.norms[2 * i + 2], residual=x)
        labels = ids.roll(-1, 1)
        return ops.linear_cross_entropy(y, self.head, labels, num_items=num_items)

    def gradients(self, ops, **options) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = self.loss(ops, **options)
        return loss.detach(), torch.autograd.grad(loss, list(self.leaves()))


dropouts = st.sampled_from([None, Dropout(0.2, 11)])


@both
@examples(8)
@given(seed=st.integers(0, 999), dropout=dropouts, dora=st.just(False))
def test_a_step_along_a_direction_changes_the_loss_by_the_gradient(device, backend, seed, dropout, dora):
    """(loss(θ + hv) - loss(θ - hv)) / 2h = <gradient, v> in float64, with v over all trainable numbers."""
    model, ops = Decoder(seed, torch.float64, device, dora), BACKENDS[backend]
    _, gradients = model.gradients(ops, dropout=dropout)
    direction = [model.make.normal(*leaf.shape) for leaf in model.leaves()]
    expected = sum(float((g * v).sum()) for g, v in zip(gradients, direction, strict=True))
    differences = []
    with torch.no_grad():
        for h in (2e-4, 1e-4):
            ends = []
            for sign in (h, -2 * h):
                for leaf, v in zip(model.leaves(), direction, strict=True):
                    leaf += sign * v
                ends.append(float(model.loss(ops, dropout=dropout)))
            for leaf, v in zip(model.leaves(), direction, strict=True):
                leaf += h * v
            differences.append((ends[0] - ends[1]) / (2 * h))
    better = (4 * differences[1] - differences[0]) / 3  # Richardson: the error in h² is gone
    truncation = abs(differences[1] - differences[0])
    assert abs(better - expected) <= 0.1 * truncation + 1e-9 * max(1.0, abs(expected))


@examples(8)
@given(seed=st.integers(0, 999), dropout=dropouts, dora=st.booleans())
def test_both_backends_agree_in_float64(device, seed, dropout, dora):
    model = Decoder(seed, torch.float64, device, dora)
    (loss, gradients), (other, others) = (model.gradients(ops, dropout=dropout) for ops in BACKENDS.values())
    torch.testing.assert_close(loss, other, rtol=1e-13, atol=0)
    for one, two in zip(gradients, others, strict=True):
        assert one.any()
        assert float((one - two).abs().max()) <= 1e-11 * float(one.abs().max())


# The interpreter cuts bfloat16 off, always towards zero: a chain's errors add up. float16 it rounds as a GPU does.
HALF = torch.float16 if interpreting() else torch.bfloat16
MODELS = 16


@examples(1)
@given(seed=st.integers(0, 999), dropout=dropouts, dora=st.booleans(), dtype=st.sampled_from([torch.float32, HALF]))
def test_fast_is_as_near_to_float64_as_the_reference_is(device, seed, dropout, dora, dtype):
    """Over all gradients and several models together: errors of a chain have no bound of their own worth the name,
    and those of one model are two draws of a wide distribution, whose ratio is anything from a fifth to five."""
    ratios = [ratio_of_errors(device, seed + n, dropout, dora, dtype) for n in range(MODELS)]
    assert math.prod(ratios) ** (1 / MODELS) <= 2, ratios


def ratio_of_errors(device: str, seed: int, dropout: Dropout | None, dora: bool, dtype: torch.dtype) -> float:
    """fast's error of all gradients over the reference's, after the loss was compared."""
    model, wide = Decoder(seed, dtype, device, dora), Decoder(seed, torch.float64, device, dora)
    for narrow, leaf in zip(all_tensors(model), all_tensors(wide), strict=True):
        leaf.data.copy_(narrow.data)
    truth, exact = wide.gradients(BACKENDS["reference"], dropout=dropout)
    (plain, plains), (fused, fuseds) = (model.gradients(ops, dropout=dropout) for ops in BACKENDS.values())
    assert abs(fused - truth) <= 2 * abs(plain - truth) + 8 * torch.finfo(dtype).eps * truth
    of_fast, of_reference = (
        float(torch.cat([(t.double() - g).flatten() for t, g in zip(ts, exact, strict=True)]).norm())
        for ts in (fuseds, plains)
    )
    return of_fast / of_reference


def all_tensors(model: Decoder) -> Iterator[Tensor]:
    """Every floating-point tensor of a model, frozen ones too, in one order."""
    for p in (model.table, *(p for block in model.blocks for p in block.values()), model.head):
        yield from (t for t in p if isinstance(t, Tensor))
    yield from (*model.norms, model.cos, model.sin)


@both
@examples(4)
@given(seed=st.integers(0, 999))
def test_accumulated_gradients_are_those_of_one_batch(device, backend, seed):
    """Two halves of a batch, each loss divided by the tokens of the whole: float64, to its rounding."""
    model, ops = Decoder(seed, torch.float64, device), BACKENDS[backend]
    loss, gradients = model.gradients(ops, num_items=14.0)
    halves = [model.gradients(ops, rows=slice(i, i + 1), num_items=14.0) for i in range(2)]
    torch.testing.assert_close(sum(half[0] for half in halves), loss, rtol=1e-13, atol=0)
    for whole, *parts in zip(gradients, *(half[1] for half in halves), strict=True):
        torch.testing.assert_close(sum(parts), whole, rtol=1e-10, atol=1e-13)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_the_same_bits(device, backend, dtype):
    model = Decoder(5, dtype, device, dora=True)
    one, two = (model.gradients(BACKENDS[backend], dropout=Dropout(0.3, 9)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and all(torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))
