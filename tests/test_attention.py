"""Causal attention in blocks, on a CPU, beside attention written out in float64 and beside PyTorch's own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_llama
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from lora.fast import attention
from lora.fast.attention import causal_attention, takes_attention
from lora.fast.patch import Announcing
from lora.fast.runtime import standing_for

HEADS = [(1, 1), (3, 3), (4, 2), (6, 2), (3, 1)]  # of queries, of keys


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 tokens, and sequences of 14 whole."""
    monkeypatch.setattr(attention, "BLOCK", 4)
    monkeypatch.setattr(attention, "WHOLE", 14)


def written_out(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Equation by equation, in float64, [batch, tokens, heads, head_dim]."""
    group, tokens = q.shape[1] // k.shape[1], q.shape[2]
    hidden = torch.full((tokens, tokens), -math.inf, dtype=torch.float64).triu(1)
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    return ((scale * q.double() @ k.mT + hidden).softmax(-1) @ v).transpose(1, 2)


def by_pytorch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def drawn(heads, key_heads, tokens, features, dtype, *, batch=2, seed=0, size=1.0, heads_first=False) -> list[Tensor]:
    """q, k, v and dout, q to v in either order of memory."""
    g = torch.Generator().manual_seed(seed)
    tensors = []
    for count in (heads, key_heads, key_heads):
        x = torch.randn(batch, tokens, count, features, generator=g, dtype=dtype).mul_(size).transpose(1, 2)
        tensors.append(x.contiguous() if heads_first else x)
    return [*tensors, torch.randn(batch, tokens, heads, features, generator=g, dtype=dtype)]


def results(function, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float) -> list[Tensor]:
    """The output, dq, dk and dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


@pytest.mark.parametrize("heads, key_heads", HEADS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9, 13, 14, 17])
def test_it_is_causal_attention(small_blocks, heads, key_heads, tokens):
    *inputs, dout = drawn(heads, key_heads, tokens, 5, torch.float64, seed=tokens)
    for found, exact in zip(
        results(causal_attention, *inputs, dout, 0.7), results(written_out, *inputs, dout, 0.7), strict=True
    ):
        assert found.shape == exact.shape
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13)


@given(
    heads=st.sampled_from(HEADS), tokens=st.integers(1, 17), features=st.integers(1, 9), batch=st.integers(1, 3),
    seed=st.integers(0, 2**20), size=st.sampled_from([1e-20, 1.0, 30.0]), heads_first=st.booleans(),
)  # fmt: skip
def test_it_errs_no_more_than_pytorch_s_own(heads, tokens, features, batch, seed, size, heads_first):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", 4)
        patch.setattr(attention, "WHOLE", 14)
        *inputs, dout = drawn(
            *heads, tokens, features, torch.float32, batch=batch, seed=seed, size=size, heads_first=heads_first
        )
        found = results(causal_attention, *inputs, dout, 0.6)
    exact, theirs = results(written_out, *inputs, dout, 0.6), results(by_pytorch, *inputs, dout, 0.6)
    for ours, right, other in zip(found, exact, theirs, strict=True):
        largest = right.abs().max()
        allowed = 2 * (other - right).abs().max() + 2.0**-21 * largest * max(1.0, size * size)
        assert (ours - right).abs().max() <= allowed


@pytest.mark.parametrize("tokens", [127, 128, 300, 700, 1600])
def test_the_blocks_of_real_sizes(tokens):
    *inputs, dout = drawn(4, 2, tokens, 16, torch.float32, batch=1, seed=tokens)
    exact = results(written_out, *inputs, dout, 0.25)
    theirs = results(by_pytorch, *inputs, dout, 0.25)
    for ours, right, other in zip(results(causal_attention, *inputs, dout, 0.25), exact, theirs, strict=True):
        assert (ours - right).abs().max() <= 2 * (other - right).abs().max() + 2.0**-22 * right.abs().max()


def test_a_token_does_not_see_the_ones_after_it(small_blocks):
    *inputs, _ = drawn(4, 2, 13, 5, torch.float32)
    before = causal_attention(*inputs)
    for x in inputs[1:]:
        x[:, :, 6:] = 1e4  # not NaN: what is hidden has the weight 0, and 0 · NaN is NaN
    assert torch.equal(causal_attention(*inputs)[:, :6], before[:, :6])


def test_the_scale_is_that_of_the_head_dimension_if_nothing_else_is_said():
    *inputs, _ = drawn(2, 1, 5, 9, torch.float64)
    assert torch.equal(causal_attention(*inputs), causal_attention(*inputs, 1 / 3))


def test_shared_keys_are_not_saved_for_each_query_head():
    q, k, v, _ = drawn(6, 2, 9, 5, torch.float32)
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        causal_attention(*(x.requires_grad_() for x in (q, k, v)))
    numbers = 2 * 9 * 5
    assert sorted(x.numel() for x in saved) == sorted([6 * numbers, 2 * numbers, 2 * numbers, 6 * numbers, 2 * 9 * 6])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("rotated", ["", "q", "qk"])
def test_v_holds_the_product_for_q_k_and_v_only_where_q_and_k_do(rotated, device):
    product = torch.randn(2, 6, 4 * 4 + 2 * 4 + 2 * 4, device=device).requires_grad_()
    q, k, v = (x.unflatten(-1, (-1, 4)).transpose(1, 2) for x in product.split([16, 8, 8], dim=-1))
    q, k = q * 1 if "q" in rotated else q, k * 1 if "k" in rotated else k
    saved: list[Tensor] = []
    with standing_for("cpu"), saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        causal_attention(q, k, v)
    memory = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() // 4 for x in saved}
    tokens, out, lse = 2 * 6, 16, 4
    assert (product.untyped_storage()._cdata in memory) == (rotated != "qk")
    assert sum(memory.values()) == tokens * (32 + (16 if rotated == "q" else 0) + out + lse)


@pytest.mark.parametrize("subset", [s for n in (1, 2) for s in itertools.combinations(range(3), n)], ids=str)
def test_gradients_of_some(small_blocks, subset):
    *inputs, dout = drawn(4, 2, 9, 5, torch.float64)
    every = results(causal_attention, *inputs, dout, 0.5)[1:]
    leaves = [x.detach().requires_grad_(i in subset) for i, x in enumerate(inputs)]
    found = torch.autograd.grad(causal_attention(*leaves, 0.5), [leaves[i] for i in subset], dout)
    assert all(torch.equal(a, every[i]) for a, i in zip(found, subset, strict=True))


def test_what_it_takes():
    q, k, v, _ = drawn(4, 2, 6, 5, torch.float32)
    assert takes_attention(q, k, v) and takes_attention(q.double(), k.double(), v.double())
    refused = {
        "16 bits": (q.bfloat16(), k.bfloat16(), v.bfloat16()),
        "keys of another length": (q[:, :, :3], k, v),
        "values of another width": (q, k, v[..., :3]),
        "heads that are not shared evenly": (q[:, :3], k, v),
        "no tokens": (q[:, :, :0], k[:, :, :0], v[:, :, :0]),
        "no keys": (q, k[:, :0], v[:, :0]),
        "another device": tuple(x.to("meta") for x in (q, k, v)),
        "three dimensions": (q[0], k[0], v[0]),
    }
    assert [what for what, tensors in refused.items() if takes_attention(*tensors)] == []


class Counted(TorchDispatchMode):
    """How often attention ran, by its operator."""

    def __init__(self) -> None:
        super().__init__()
        self.ours = self.theirs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ours += func.name() == "lora::causal_attention"
        self.theirs += "_scaled_dot_product" in func.name() and "backward" not in func.name()
        return func(*args, **(kwargs or {}))


def fused_model():
    model = lora.inject(tiny_llama(), lora.LoRAConfig(r=2, target_modules=["q_proj", "down_proj"]))
    return lora.for_training(model)


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_a_model_s_attention(backend):
    ids = torch.arange(12).view(2, 6) + 3
    with lora.use_backend("fast"):
        model = fused_model()
    layers = model.config.num_hidden_layers
    with lora.use_backend(backend):
        with Counted() as plain:
            model(input_ids=ids, labels=ids)
        with Counted() as padded:
            mask = torch.ones_like(ids)
            mask[0, :2] = 0
            model(input_ids=ids, attention_mask=mask, labels=ids)
        with Counted() as dropping:
            for block in model.model.layers:
                block.self_attn.attention_dropout = 0.5
            model(input_ids=ids, labels=ids)
    assert (plain.ours, plain.theirs) == ((layers, 0) if backend == "fast" else (0, layers))
    assert padded.ours == dropping.ours == 0


def test_a_cached_token_and_another_kind_of_attention_are_left_alone():
    with lora.use_backend("fast"), torch.no_grad():
        model = fused_model()
        ids = torch.arange(6).view(1, 6) + 3
        past = model(input_ids=ids[:, :5], use_cache=True)
        with Counted() as one:
            last = model(input_ids=ids[:, 5:], past_key_values=past.past_key_values, use_cache=True).logits
        with Counted() as whole:
            every = model(input_ids=ids).logits
        torch.testing.assert_close(last[:, 0], every[:, 5], rtol=1e-5, atol=1e-6)
        model.set_attn_implementation("eager")
        with Counted() as eager:
            model(input_ids=ids)
    assert (one.ours, whole.ours, eager.ours + eager.theirs) == (0, model.config.num_hidden_layers, 0)


def test_arguments_that_are_not_named_are_the_attention_function_s_to_read():
    """transformers' own takes its scaling there, where nothing of ours looks for it."""
    q, k, v, _ = drawn(4, 2, 6, 5, torch.float32)
    with lora.use_backend("fast"):
        module = fused_model().model.layers[0].self_attn
        function = type(module).forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
        announced = Announcing(function).get_interface("sdpa", None)
        with Counted() as counted:
            found, _ = announced(module, q, k, v, None, 0.0, 0.3)
        torch.testing.assert_close(found, announced(module, q, k, v, None, scaling=0.3)[0], rtol=1e-5, atol=1e-6)
    assert (counted.ours, counted.theirs) == (0, 1)
