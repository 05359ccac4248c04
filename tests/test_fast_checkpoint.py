"""Checkpointing on the fast backend: the same bits, and what it leaves out of the second run."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tiny import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

import lora
import lora.fast
from lora import LoRAConfig
from lora.fast.checkpoint import Operations, reporting
from lora.projection import Projection
from lora.reference.checkpoint import ATTENTION, Inputs, Traffic
from lora.reference.checkpoint import checkpoint as reference_checkpoint

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
    plain = linear.multiplied
    monkeypatch.setattr(
        linear,
        "multiplied",
        lambda rows, parts, out=None: (seen.append(tuple(p.out_features for p in parts)), plain(rows, parts, out))[1],
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


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("mode", ["recompute", "selective"])
def test_where_a_norm_reads_down_proj_selective_keeps_it(monkeypatch, family, mode):
    """Gemma and OLMo 2 normalise what down_proj gives, and save it for the backward."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(family, **sizes, num_key_value_heads=1, head_dim=8, vocab_size=64, pad_token_id=0)
    torch.manual_seed(0)
    model = lora.inject(
        AutoModelForCausalLM.from_config(config), LoRAConfig(r=4, lora_dropout=0.3, init_lora_weights=False)
    )
    seen = count_products(monkeypatch)
    loss, gradients, _ = losses(model, "none", seen)
    again, found, products = losses(model, mode, seen)
    assert torch.equal(loss, again)
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())
    assert products.count((32,)) == (4 if mode == "recompute" else 2)  # o_proj of two blocks, and down_proj or not


def block_of(*operations: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Operations, Callable[..., torch.Tensor]]:
    """What is reported by operations one after another, the outermost first run of a selective checkpoint."""
    kept = []

    def block(x):
        for operation in operations:
            x = operation(x)
        return x

    operations_seen = Operations(kept, keeps=True)

    def run(x):
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t)
        with hooks, reporting(operations_seen):
            return block(x)

    return operations_seen, run


def test_of_the_last_product_only_what_is_read_is_kept():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.nn.Parameter(torch.ones(8))
    A, B = torch.randn(2, 8, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    plain = Projection(torch.randn(8, 8), None, A, B)
    linear = lambda x: lora.ops.lora_linear(x, plain)  # noqa: E731
    dora = lambda x: lora.ops.lora_linear(x, plain._replace(magnitude=torch.ones(8)))  # noqa: E731
    norm = lambda x: lora.ops.rms_norm(x, weight)  # noqa: E731
    expected = {
        (linear,): 0, (norm, linear): 0, (linear, dora, norm): 0,
        (linear, norm): 5 * 8 * 4, (linear, linear, norm): 5 * 8 * 4,
    }  # fmt: skip
    for operations, size in expected.items():
        seen, run = block_of(*operations)
        output = run(x)
        assert seen.bytes_kept() == size
        if operations == (linear, norm):
            with reporting(seen, again=True):
                assert torch.equal(linear(x), seen.last[0]) and torch.equal(norm(linear(x)), output)


@pytest.mark.parametrize("mode", [{}, {"selective": True}, {"offload": True}], ids=str)
def test_a_product_that_saves_nothing_itself_may_still_be_read(mode):
    """Under no_grad, or where nothing behind it trains, an operation saves nothing; what comes after it does."""
    w, A, B = torch.randn(8, 8), torch.randn(3, 8, requires_grad=True), torch.randn(8, 3, requires_grad=True)
    x, gain = torch.randn(5, 8, requires_grad=True), torch.randn(8, requires_grad=True)

    def gated(x, gain):
        with torch.no_grad():
            gate = lora.ops.lora_linear(x, Projection(w, None, A, B, 2.0))
        return x * gate * gain

    def normed(x, gain):
        y = lora.ops.lora_linear(x.detach(), Projection(w, None, A.detach(), B.detach(), 2.0))
        return lora.ops.rms_norm(y.add_(1), gain) + x  # in place: nobody needs what it was

    def added_to(x, gain):
        y = lora.ops.lora_linear(x, Projection(w, None, A, B, 2.0))
        return lora.ops.rms_norm(y.add_(x), gain)  # what `selective` keeps is then not what the product was

    for block in (gated, normed, added_to):
        expected = torch.autograd.grad(block(x, gain).square().sum(), (x, gain))
        found = torch.autograd.grad(lora.ops.checkpoint(block, x, gain, **mode).square().sum(), (x, gain))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), block.__name__


def test_a_norm_that_trains_behind_a_frozen_block_of_gemma():
    """Only the second layer has adapters: nothing that the first one's norm normalises has a gradient."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma2", **sizes, num_key_value_heads=1, head_dim=8, vocab_size=64, pad_token_id=0)
    torch.manual_seed(0)
    model = lora.inject(
        AutoModelForCausalLM.from_config(config), LoRAConfig(r=4, layers_to_transform=[1], init_lora_weights=False)
    )
    model.model.layers[0].post_feedforward_layernorm.weight.requires_grad_(True)
    _, expected, _ = losses(model, "none", [])
    for mode in ("recompute", "selective", "offload"):
        _, found, _ = losses(model, mode, [])
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items()), mode


def test_a_block_that_reads_its_last_product_runs_it_again():
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


# ---- the bytes that offloading moves

CHECKPOINTS = {"reference": reference_checkpoint, "fast": lora.fast.checkpoint}
SIZE = 5 * 8 * 4  # of x below
CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="bytes to host memory and back: not run, needs a CUDA device"
)


@pytest.fixture
def as_if_away(monkeypatch):
    """Without a device to leave, a copy stands for the tensor in host memory."""
    monkeypatch.setattr(Inputs, "away", lambda self, x: x.clone())


def chain(call: Callable, traffic: Traffic, function: Callable, blocks: int, **where) -> torch.Tensor:
    h = torch.randn(5, 8, requires_grad=True, **where)
    for _ in range(blocks):
        h = call(function, h, offload=traffic)
    return h.sum()


@pytest.mark.parametrize("call", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_nothing_leaves_a_cpu(call):
    traffic = Traffic()
    chain(call, traffic, torch.sin, 3).backward()
    assert traffic == Traffic()


@pytest.mark.usefixtures("as_if_away")
@pytest.mark.parametrize("call", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_traffic_is_counted(call):
    traffic = Traffic()
    loss = chain(call, traffic, torch.sin, 3)
    assert traffic == Traffic(out=3 * SIZE, waiting=3 * SIZE, peak=3 * SIZE, pageable=3 * SIZE)
    loss.backward(retain_graph=True)
    assert (traffic.back, traffic.waiting) == (3 * SIZE, 3 * SIZE)  # a second backward will want them again
    loss.backward()
    assert traffic == Traffic(out=3 * SIZE, back=6 * SIZE, waiting=0, peak=3 * SIZE, pageable=3 * SIZE)
    chain(call, traffic, torch.sin, 2).backward()
    assert traffic == Traffic(out=5 * SIZE, back=8 * SIZE, waiting=0, peak=3 * SIZE, pageable=5 * SIZE)


@pytest.mark.usefixtures("as_if_away")
@pytest.mark.parametrize("call", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_traffic_of_a_graph_without_a_backward_does_not_wait_for_ever(call):
    traffic = Traffic()
    loss = chain(call, traffic, torch.sin, 3)
    del loss
    assert traffic == Traffic(out=3 * SIZE, waiting=0, peak=3 * SIZE, pageable=3 * SIZE)


@pytest.mark.usefixtures("as_if_away")
@pytest.mark.parametrize("call", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_traffic_after_an_error_in_the_backward(call):
    traffic, runs = Traffic(), []

    def block(x: torch.Tensor) -> torch.Tensor:
        runs.append(None)
        if len(runs) == 3 + 2:  # the second block that runs again
            raise OSError("out of memory, say")
        return x.sin()

    loss = chain(call, traffic, block, 3)
    with pytest.raises(OSError, match="out of memory"):
        loss.backward()
    assert (traffic.out, traffic.back, traffic.waiting) == (3 * SIZE, 2 * SIZE, 2 * SIZE)  # the last one's is freed
    del loss
    assert (traffic.waiting, traffic.peak) == (0, 3 * SIZE)


@pytest.mark.usefixtures("as_if_away")
@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_each_model_counts_its_own(backend):
    with lora.use_backend(backend):
        model = lora.inject(tiny_llama(), LoRAConfig(r=4))
        lora.for_training(model, ["offload", "recompute"])
        twin = copy.deepcopy(model)
        model(IDS, labels=IDS).loss.backward()
        size = IDS.numel() * 32 * 4
        expected = Traffic(out=size, back=size, waiting=0, peak=size, pageable=size)
        assert model.lora_state.modes["checkpointing"].traffic == expected
        assert twin.lora_state.modes["checkpointing"].traffic == Traffic()
        twin(IDS, labels=IDS)
        assert twin.lora_state.modes["checkpointing"].traffic.out == size
        text = lora.explain(model)
        assert "checkpointing: recompute in 1 blocks, offload in 1 blocks" in text
        assert f"{size:,} bytes went to host memory ({size:,} of them not pinned), {size:,} came back" in text
        lora.for_inference(model)
        assert "checkpointing" not in lora.explain(model)


@CUDA
@pytest.mark.parametrize("call", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_traffic_of_a_gpu(call):
    traffic = Traffic()
    loss = chain(call, traffic, lambda x: x.sin().cos(), 4, device="cuda")
    pageable = 0 if call is lora.fast.checkpoint else 4 * SIZE
    assert traffic == Traffic(out=4 * SIZE, waiting=4 * SIZE, peak=4 * SIZE, pageable=pageable)
    loss.backward()
    assert traffic == Traffic(out=4 * SIZE, back=4 * SIZE, waiting=0, peak=4 * SIZE, pageable=pageable)


@CUDA
def test_memory_that_cannot_be_pinned_is_counted(monkeypatch):
    empty_like = torch.empty_like

    def unpinnable(x, *args, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("no page-locked memory left")
        return empty_like(x, *args, **options)

    monkeypatch.setattr(torch, "empty_like", unpinnable)
    traffic = Traffic()
    with pytest.warns(UserWarning, match="cannot be pinned"):
        chain(lora.fast.checkpoint, traffic, torch.sin, 2, device="cuda").backward()
    assert traffic == Traffic(out=2 * SIZE, back=2 * SIZE, waiting=0, peak=2 * SIZE, pageable=2 * SIZE)


class CountAttention(TorchDispatchMode):
    """How often a fused attention operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.name() in ATTENTION
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "again"), [("recompute", 2), ("selective", 0)])
def test_attention_announces_itself_and_nothing_else_is_watched(mode, again):
    model = lora.inject(tiny_llama(), LoRAConfig(r=4, init_lora_weights=False))
    lora.for_training(model, checkpointing=mode)
    watched = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: watched.append(torch._C._len_torch_dispatch_stack()))
    loss = model(IDS, labels=IDS).loss
    with CountAttention() as count:
        loss.backward()
    assert count.calls == again  # of two blocks
    assert watched == [0, 0, 1, 1]  # forward, and again in the backward, where this test watches
