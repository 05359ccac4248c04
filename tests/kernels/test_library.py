"""The operators of torch.ops.lora: what torch.compile is told about them is what they do, and it sees one graph."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import lora
import lora.fast
from lora.fast import library
from lora.projection import Dropout, NF4Weight
from lora.testing.block_cases import LayerNormInput, LossInput, MultiLoRAInput, RMSNormInput, RopeInput
from lora.testing.cases import Layer, LinearInput, MLPInput, QKVInput
from lora.testing.proof import Case, build, changed, mapped, named_outputs, on_cpu, results, upstream
from lora.testing.report import assert_within

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lru_cache.*", "ignore:.*script_method.*", "ignore:.*deterministic.*", "ignore:Every label"
)
SHAPE = (5, 12)  # tokens, features


def normal(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device)


def nf4(device: str) -> NF4Weight:
    return lora.ops.nf4_quantize(normal(device, 16, 12))


def samples(device: str) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every operator, with what is optional there and not there."""
    x, y, z, weight = *(normal(device, *SHAPE) for _ in range(3)), normal(device, 12)
    rho, heads, angles = torch.rand(5, device=device), normal(device, 1, 2, 5, 8), normal(device, 1, 5, 8)
    positions = torch.arange(5, device=device).flip(0)[None]
    A, B, quantised, place = normal(device, 3, 12), normal(device, 16, 3), nf4(device), torch.device(device)
    q = quantised
    decode = (q.codes, q.absmax, q.nested_absmax, q.nested_offset, [16, 12], q.block_size, q.nested_block_size)
    labels = torch.tensor([3, -100, 15, 0, 2], device=device)
    dense: tuple[Any, ...] = ([normal(device, 16, 12), normal(device, 16), A, B, None], [], torch.float32, 2.0)
    packed = ([None, None, None, None, None, *decode[:4]], [16, 12, *decode[5:]], torch.float32, 1.0)
    none, mean = ("none", -100, None, 1.0, 0.0, 0.0, 0, 0), ("mean", -100, 9.0, 0.5, 0.1, 0.2, 7, 0)
    index, adapters = (
        torch.tensor([1, -1, 0, 1, 1], device=device),
        (normal(device, 2, 3, 12), normal(device, 2, 16, 3)),
    )
    many = (index, *adapters, torch.tensor([1.0, 2.0], device=device), [normal(device, 16, 12), None, None, None, None])
    many_nf4 = (*many[:4], packed[0])
    term, no_term = (normal(device, 5, 3), normal(device, 12, 3), 2.0), (None, None, 0.0)
    dh, su = normal(device, 5, 16), normal(device, 5, 3)
    attended = (normal("cpu", 2, 4, 5, 8), normal("cpu", 2, 2, 5, 8), normal("cpu", 2, 5, 2, 8).transpose(1, 2))
    attention = (normal("cpu", 2, 5, 4, 8), *attended, *library.causal_attention(*attended, 0.5), 0.5)  # CPUs' alone
    return {
        "gated_forward": [(x, y, "silu", *no_term, *no_term), (x, y, "gelu_tanh", *term, *no_term)],
        "gated_backward": [
            (x, y, z, "gelu", *no_term, *no_term, *no_term, False), (x, y, z, "silu", *term, *no_term, *term, True),
        ],
        "rms_norm_forward": [(x, weight, None, 1e-6, 0.0, True), (x, weight, y, 1e-6, 1.0, False)],
        "rms_norm_backward": [
            (x, y, weight, rho, None, 0.0, True, True), (x, y, weight, rho, z, 1.0, True, False),
            (x, y, weight, rho, None, 0.0, False, True),
        ],
        "layer_norm_forward": [(x, weight, None, None, 1e-6), (x, weight, weight + 1, y, 1e-6)],
        "layer_norm_backward": [
            (x, y, weight, None, rho, rho + 1, None, True, False),
            (x, y, weight, weight + 1, rho, rho + 1, z, True, True),
            (x, y, weight, weight + 1, rho, rho + 1, None, False, False),
            (x.bfloat16(), y.bfloat16(), weight, None, rho, rho + 1, None, False, True),
        ],
        "rope_rotate": [
            (heads, heads[:, :1] + 1, angles.cos(), angles.sin(), None, False, False),
            (heads.transpose(1, 2).contiguous().transpose(1, 2), heads + 1, angles[0].cos(), angles[0].sin(), positions,
             True, True),
        ],
        "causal_attention": [(*attended, 0.5)],
        "causal_attention_backward": [attention],
        "keep_mask": [([5, 12], 0.3, 7, 1, place)],
        "drop": [(x, 0.3, 7, 1)],
        "add_dropped": [(x, y, 0.3, 7, 1)],
        "dropped_product": [(x, A, 2.0, 0.3, 7, 1)],
        "dropped_sum": [(su, x, torch.float32, 0.3, 7, 1), (su, x, x.dtype, 0.3, 7, 1)],
        "add_dropped_product": [(x, su, A, 0.3, 7, 1)],
        "dora_norm": [(normal(device, 16, 12), A, B, 2.0)],
        "nf4_decode": [(*decode, torch.float32), (*decode, torch.bfloat16)],
        "linear_cross_entropy": [
            (x, labels, None, None, *dense, *none, [False] * 6),
            (x, labels, None, rho, *dense, *none, [True, False, True, True, True, False]),
            (x, labels, torch.tensor(7.0), None, *packed, *mean, [True, False, False, False, False, False]),
            (x, labels.clone().fill_(-100), None, None, *dense, *mean, [True, True, True, True, True, False]),
        ],
        "multi_lora_forward": [(x, *many, [], torch.float32, 1.0), (x, *many_nf4, *packed[1:])],
        "multi_lora_backward": [
            (dh, x, su, *many, [], torch.float32, 1.0, [True, True, True, True, False]),
            (dh, x, su, *many_nf4, *packed[1:], [True, False, True, False, False]),
        ],
    }  # fmt: skip


def registered() -> set[str]:
    return {
        name.removeprefix("lora::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("lora::")
    }


def test_every_operator_has_samples():
    assert registered() == set(samples("cpu"))


@pytest.mark.parametrize("name", sorted(samples("cpu")))
def test_an_operator_keeps_what_its_fake_form_says(name, device):
    torch.manual_seed(0)
    for arguments in samples(device)[name]:
        torch.library.opcheck(getattr(torch.ops.lora, name).default, arguments)


@pytest.mark.parametrize("name", sorted(samples("cpu")))
def test_an_operator_is_the_function_that_is_called_outside_of_graphs(name, device):
    torch.manual_seed(0)
    for arguments in samples(device)[name]:
        copies = [[a.clone() if isinstance(a, Tensor) else a for a in arguments] for _ in range(2)]
        direct, through = getattr(library, name)(*copies[0]), getattr(torch.ops.lora, name)(*copies[1])
        each = [(r if isinstance(r, tuple) else (r,)) for r in (direct, through)]
        each = [
            [*results, *(a for a in given if isinstance(a, Tensor))]
            for results, given in zip(each, copies, strict=True)
        ]
        for one, other in zip(*each, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


def test_an_operator_has_no_silent_gradient(device):
    x = normal(device, *SHAPE).requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.ops.lora.gated_forward(x, x, "silu", None, None, 0.0, None, None, 0.0).sum().backward()


LAYERS = (Layer(20, 3), Layer(20, 3), Layer(12, 3, bias=True))
CASES: dict[str, Case] = {
    "lora_linear with dropout": LinearInput(dropout=Dropout(0.3, 7), layer=Layer(16, 3, bias=True)),
    "lora_linear with DoRA": LinearInput(layer=Layer(16, 3, bias=True, dora=True)),
    "lora_linear in NF4": LinearInput(layer=Layer(16, 3, bias=True, nf4=True)),
    "lora_qkv": QKVInput(layers=(Layer(16, 3, bias=True), Layer(8, 3), Layer(8, 3))),
    "lora_mlp": MLPInput(in_features=12, layers=LAYERS, dropout=Dropout(0.3, 7)),
    "rms_norm": RMSNormInput(features=12),
    "rms_norm with residual": RMSNormInput(features=12, residual=True),
    "layer_norm": LayerNormInput(features=12, residual=True),
    "rope": RopeInput(head_dim=12, rot=12),
    "linear_cross_entropy": LossInput(layer=Layer(16, 3, bias=True), dropout=Dropout(0.3, 7), ignored=(1,)),
    "multi_lora_linear": MultiLoRAInput(bias=True, rank=3),
}


@pytest.mark.parametrize("name", list(CASES))
def test_an_operation_on_kernels_is_one_graph(name, device):
    """Compiled, each result is within its bound, as it is without a graph: no further from it than both bounds."""
    torch._dynamo.reset()
    case = changed(CASES[name], frozen=frozenset(n for n in CASES[name].leaves if n.endswith(("weight", "bias"))))
    with lora.use_backend("fast"):
        operation = getattr(lora.ops, case.operation)
        compiled = torch.compile(operation, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
        arguments = build(case, device)
        with torch.no_grad():
            dys = upstream(case, named_outputs(case, lora.fast, arguments), device)
        eager = results(case, SimpleNamespace(**{case.operation: operation}), arguments, dys)
        found = results(case, SimpleNamespace(**{case.operation: compiled}), arguments, dys)
    bounds = case.bounds(mapped(arguments, on_cpu), {n: dy.cpu() for n, dy in dys.items()})
    assert found.keys() == eager.keys() and any(n.startswith("d") for n in found)
    for n, value in eager.items():
        assert_within(found[n], value, 2 * case.bound_of(bounds[n]).reshape(value.shape), n)
