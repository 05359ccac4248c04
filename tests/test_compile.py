"""torch.compile: the fast operations become one graph each, and give what they give without it, gradients included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lora
from lora.projection import Dropout, Projection

pytestmark = pytest.mark.filterwarnings("ignore:.*lru_cache.*", "ignore:.*script_method.*")
F64 = torch.float64


@pytest.fixture(autouse=True)
def _fast() -> Iterator[None]:
    torch._dynamo.reset()
    with lora.use_backend("fast"):
        yield
    torch._dynamo.reset()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def leaf(*shape: int) -> Tensor:
    return normal(*shape).requires_grad_()


def layer(out: int, fan_in: int, *, dora: bool = False, nf4: bool = False) -> Projection:
    weight: Any = normal(out, fan_in)
    return Projection(
        lora.ops.nf4_quantize(weight.float()) if nf4 else weight,
        normal(out),
        leaf(2, fan_in),
        leaf(out, 2),
        1.5,
        (torch.rand(out, dtype=F64) + 0.5).requires_grad_() if dora else None,
    )


def operations() -> dict[str, tuple[Callable[[Tensor], Any], list[Projection]]]:
    linear, dora, nf4 = layer(6, 8), layer(6, 8, dora=True), layer(16, 8, nf4=True)
    q, k, v = layer(8, 8), layer(4, 8), layer(4, 8)
    gate, up, down = layer(12, 8), layer(12, 8), layer(8, 12)
    weight, angles, drop = normal(8), normal(4, 4).repeat(1, 2), Dropout(0.3, 7)  # one angle a pair
    head, labels = layer(6, 8), torch.tensor([3, -100, 5, 0])
    table, ids = layer(9, 8)._replace(bias=None, lora_A=leaf(2, 9), lora_B=leaf(8, 2)), torch.tensor([8, 0, 3, 3])
    base, nf4_base = layer(6, 8)._replace(lora_A=None, lora_B=None), nf4._replace(lora_A=None, lora_B=None)
    many_A, many_B, scalings = leaf(2, 2, 8), leaf(2, 6, 2), torch.tensor([1.0, 2.0], dtype=F64)
    many, index = Projection(weight, lora_A=many_A, lora_B=many_B), torch.tensor([1, -1, 0, 1])
    ops = lora.ops
    return {
        "lora_linear": (lambda x: ops.lora_linear(x, linear), [linear]),
        "lora_linear with dropout": (lambda x: ops.lora_linear(x, linear, dropout=drop), [linear]),
        "lora_linear with DoRA": (lambda x: ops.lora_linear(x, dora), [dora]),
        "lora_linear in NF4": (lambda x: ops.lora_linear(x, nf4), [nf4]),
        "lora_qkv": (lambda x: ops.lora_qkv(x, q, k, v), [q, k, v]),
        "lora_mlp": (lambda x: ops.lora_mlp(x, gate, up, down, activation="silu"), [gate, up, down]),
        "lora_qkv with DoRA": (lambda x: ops.lora_qkv(x, dora, k, v), [dora, k, v]),
        "rms_norm": (lambda x: ops.rms_norm(x, weight), []),
        "rms_norm with residual": (lambda x: ops.rms_norm(x, weight, residual=2 * x), []),
        "layer_norm": (lambda x: ops.layer_norm(x, weight), []),
        "linear_cross_entropy": (lambda x: ops.linear_cross_entropy(x, head, labels), [head]),
        "linear_cross_entropy of each": (lambda x: ops.linear_cross_entropy(x, head, labels, reduction="none"), [head]),
        "linear_cross_entropy in NF4": (
            lambda x: ops.linear_cross_entropy(x, nf4, labels, dropout=drop, softcap=9.0, num_items=7),
            [nf4],
        ),
        "lora_embedding": (lambda x: x[:, :1] * ops.lora_embedding(ids, table), [table]),
        "multi_lora_linear": (lambda x: ops.multi_lora_linear(x, base, many_A, many_B, scalings, index), [many]),
        "multi_lora_linear in NF4": (
            lambda x: ops.multi_lora_linear(x, nf4_base, many_A, many_B[:, :1].expand(2, 16, 2), scalings, index),
            [many],
        ),
        "rope": (lambda x: ops.rope(x.view(1, 1, 4, 8), x.view(1, 1, 4, 8) * 2, angles.cos(), angles.sin()), []),
    }


def total(outputs: Any) -> Tensor:
    each = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.stack([(y * torch.arange(1.0, y.numel() + 1, dtype=F64).view(y.shape)).sum() for y in each]).sum()


@pytest.mark.parametrize("name", list(operations()))
def test_an_operation_is_one_graph(name):
    operation, projections = operations()[name]
    x = normal(4, 8).requires_grad_()
    wanted = [x, *(t for p in projections for t in (p.lora_A, p.lora_B, p.magnitude) if isinstance(t, Tensor))]

    def run(x: Tensor) -> Tensor:
        return total(operation(x))

    expected = [run(x), *torch.autograd.grad(run(x), wanted)]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    for found, exact in zip([compiled, *torch.autograd.grad(compiled, wanted)], expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)  # float64, sums of less than a hundred terms


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("quantised", [False, True])
def test_a_fused_model_is_one_graph(dropout, quantised):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    if quantised:
        lora.quantize(model, "nf4")
    lora.inject(model, lora.LoRAConfig(r=4, lora_dropout=dropout))
    for parameter in lora.trainable_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    lora.for_training(model)
    ids = torch.randint(50, (2, 9))

    def step(run: Any) -> list[Tensor]:
        torch.manual_seed(0)  # of the dropout masks
        loss = run(input_ids=ids, labels=ids).loss
        return [loss.detach(), *torch.autograd.grad(loss, lora.trainable_parameters(model))]

    with torch._dynamo.config.patch(capture_scalar_outputs=dropout > 0):  # each layer draws a seed
        compiled = step(torch.compile(model, backend="aot_eager", fullgraph=True))
    for found, expected in zip(compiled, step(model), strict=True):
        scale = float(expected.abs().max())
        assert float((found - expected).abs().max()) <= 64 * torch.finfo(torch.float32).eps * scale


@pytest.mark.parametrize("mode", ["recompute", "selective", "offload"])
@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_checkpointed_blocks_of_a_compiled_model_stay_outside_of_its_graphs(backend, mode):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    with lora.use_backend(backend):
        model = lora.inject(transformers.LlamaForCausalLM(config), lora.LoRAConfig(r=4, init_lora_weights=False))
        lora.for_training(model, checkpointing=mode)
        ids, trained = torch.randint(50, (2, 9)), lora.trainable_parameters(model)
        found, expected = (
            torch.autograd.grad(run(input_ids=ids, labels=ids).loss, trained)
            for run in (torch.compile(model, backend="aot_eager"), model)
        )
    for compiled, plain in zip(found, expected, strict=True):
        assert float((compiled - plain).abs().max()) <= 64 * torch.finfo(torch.float32).eps * float(plain.abs().max())


def test_fused_attentions_share_one_function():
    """What torch.compile keeps hangs on the code object and is found in the globals: each pair belongs together."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    model = transformers.LlamaForCausalLM(config)
    own = type(model.model.layers[0].self_attn).forward
    lora.for_training(lora.inject(model, lora.LoRAConfig(r=4)))
    first, second = (block.self_attn.forward.__func__ for block in model.model.layers)
    assert first is second
    assert first.__code__ is not own.__code__ and first.__globals__ is not own.__globals__
