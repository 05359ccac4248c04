"""How adapters start: what each initialisation promises about A, B and the model's output."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import IDS, stir, toy
from torch import nn

import lora
from lora import LoRAConfig, LoRAError
from lora.layers import adapter_layers
from lora.nf4_layer import NF4Linear
from lora.reference.merge import merged_in_float
from lora.reference.nf4 import nf4_dequantize, nf4_error, nf4_quantize
from lora.testing import unit_roundoff

KINDS = [True, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"]
TINY = 1e3 * unit_roundoff(torch.float32)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("init", KINDS)
def test_step_zero_changes_nothing(init, use_dora):
    model = toy()
    y = model(IDS)
    lora.inject(model, LoRAConfig(r=4, init_lora_weights=init, use_dora=use_dora))
    torch.testing.assert_close(model(IDS), y, rtol=0, atol=TINY)


def test_false_changes_the_output_at_once():
    model = toy()
    y = model(IDS)
    lora.inject(model, LoRAConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "embed"]))
    assert (model(IDS) - y).abs().max() > 0.01


def layer_of(init: str | bool, r: int = 4, **options):
    model = toy(width=64)
    lora.inject(model, LoRAConfig(r=r, lora_alpha=8, init_lora_weights=init, **options))
    layer = model.layers[0].v_proj
    return layer, layer.lora_A["default"].detach(), layer.lora_B["default"].detach()


def test_kaiming_a_zero_b():
    _, A, B = layer_of(True)
    assert not B.any()
    limit = math.sqrt(1 / 64)  # Kaiming uniform with a = sqrt(5): bound = sqrt(6 / (6 · fan_in))
    assert A.abs().max() <= limit
    assert A.abs().max() > 0.9 * limit


def test_gaussian_a():
    _, A, B = layer_of("gaussian", r=16)
    assert not B.any()
    deviation = (1 / 16) / math.sqrt(2 * A.numel())  # of a sample's standard deviation
    assert abs(A.std().item() - 1 / 16) < 6 * deviation


def test_orthogonal_halves_cancel():
    _, A, B = layer_of("orthogonal")
    assert A.abs().min() > 0 and B.abs().min() > 0
    assert (B @ A).abs().max() < TINY


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_update_starts_at_the_base_weights_own_directions(init):
    layer, A, B = layer_of(init)
    start = layer.scaling["default"] * B @ A
    weight = layer.weight.detach()
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        expected = u[:, :4] * s[:4] @ vh[:4]
    else:
        q, r = torch.linalg.qr(weight)
        expected = layer.scaling["default"] * q[:, :4] @ r[:4]
    torch.testing.assert_close(start, expected, rtol=0, atol=TINY)
    assert torch.equal(layer.initial_A["default"], A)
    assert not layer.initial_A["default"].requires_grad


def test_randomised_pissa_finds_nearly_the_same_subspace():
    exact, A, B = layer_of("pissa")
    _, A16, B16 = layer_of("pissa_niter_16")
    best = (exact.weight - 2 * B @ A).norm()
    assert best <= (exact.weight - 2 * B16 @ A16).norm() * (1 + TINY) <= best * 1.05 * (1 + TINY)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_gradients_are_those_of_the_residual_form(init):
    """s (B A - B0 A0) on W has the gradients of s B A on W - s B0 A0, which is how the papers put it."""
    model = toy(width=32).double()
    lora.inject(model, LoRAConfig(r=4, init_lora_weights=init, target_modules=["layers.0.v_proj"]))
    layer = model.layers[0].v_proj
    layer.double()
    stir(model)
    x, s = torch.randn(5, 32, dtype=torch.float64), layer.scaling["default"]
    A, B = (p["default"].detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    residual = layer.weight.detach() - s * layer.initial_B["default"] @ layer.initial_A["default"]
    expected = x @ (residual + s * B @ A).T
    dy = torch.randn_like(expected)
    expected.backward(dy)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y.backward(dy)
    torch.testing.assert_close(layer.lora_A["default"].grad, A.grad)
    torch.testing.assert_close(layer.lora_B["default"].grad, B.grad)
    assert layer.initial_A["default"].grad is None


def test_loftq_quantises_the_base_and_makes_up_for_it():
    weights = {path: m.weight.detach().clone() for path, m in toy(width=64).named_modules() if isinstance(m, nn.Linear)}
    model = lora.inject(toy(width=64), LoRAConfig(r=16, lora_alpha=32, init_lora_weights="loftq"))
    for path, layer in adapter_layers(model):
        assert isinstance(layer.base_layer, NF4Linear)
        weight = weights[path]
        adapted = merged_in_float(layer.projection_of(("default",)))
        plain = nf4_error(weight, nf4_quantize(weight))
        assert (adapted - weight).norm() / weight.norm() < 0.9 * plain
        assert torch.equal(layer.base_layer.quantised.codes, nf4_quantize(weight).codes)  # one iteration from B A = 0
    lora.eject(model)
    assert isinstance(model.layers[0].q_proj, NF4Linear)
    assert torch.isfinite(model(IDS)).all()


def test_loftq_needs_the_full_precision_weight():
    model = lora.quantize(toy(width=32))
    with pytest.raises(
        LoRAError, match=r"'loftq' needs the full-precision weight, but layers\.0\.q_proj is a NF4Linear"
    ):
        lora.inject(model, LoRAConfig(r=2, init_lora_weights="loftq"))


def test_a_loftq_that_fails_half_way_leaves_the_full_precision_base():
    model = toy(width=32)
    with torch.no_grad():
        model.layers[2].q_proj.weight[3, 4] = math.nan
    first = model.layers[0].q_proj
    with pytest.raises(LoRAError, match="nan"):
        lora.inject(model, LoRAConfig(r=2, init_lora_weights="loftq"))
    assert model.layers[0].q_proj is first and isinstance(first, nn.Linear)


@pytest.mark.parametrize("init", ["pissa", "olora", True])
def test_an_nf4_base_starts_from_what_it_decodes_to(init):
    model = lora.quantize(toy(width=32))
    y = model(IDS)
    lora.inject(model, LoRAConfig(r=4, init_lora_weights=init, use_dora=True))
    torch.testing.assert_close(model(IDS), y, rtol=0, atol=TINY)
    layer = model.layers[0].q_proj
    norm = torch.linalg.vector_norm(nf4_dequantize(layer.base_layer.quantised), dim=1)
    torch.testing.assert_close(layer.lora_magnitude["default"].detach(), norm, rtol=TINY, atol=0)


def test_the_same_seed_gives_the_same_adapter():
    runs = []
    for seed in (3, 3, 4):
        model = toy()
        torch.manual_seed(seed)
        lora.inject(model, LoRAConfig(r=4))
        runs.append(model.layers[0].q_proj.lora_A["default"].detach())
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
