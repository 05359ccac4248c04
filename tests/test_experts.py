"""target_parameters: a mixture's stacked experts and its router, beside PEFT's own on the same models.

GPT-OSS stores its experts the other way round than Mixtral and Qwen3-MoE, and with biases.
"""

from __future__ import annotations

import copy
import functools
import json
import warnings
from typing import Any

import peft
import pytest
import torch
from test_adapter_io import adapter_tensors, assert_equal
from test_families import IDS, SIZES, TOKENS, assert_near
from test_models import save
from tiny import assert_same, snapshot, stir
from torch import Tensor, nn

import lora
from lora import LoRAConfig, LoRAError
from lora.layers import LoRAParameter, adapter_layers
from lora.peft_format import packed, unpacked, wrapper_paths

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": ROPE},
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "both": {"target_modules": [], "target_parameters": BOTH},
    "one": {"target_modules": [], "target_parameters": ["experts.down_proj"], "use_rslora": True},
    "one layer": {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.gate_up_proj"]},
    "with linear layers": {"target_modules": ["q_proj", "o_proj"], "target_parameters": BOTH},
    "patterns": {
        "target_modules": ["v_proj"],
        "target_parameters": BOTH,
        "rank_pattern": {r".*\.gate_up_proj": 5, "v_proj": 2},
        "alpha_pattern": {r"layers\.0\.mlp\.experts\.down_proj": 3},
    },
}
ROUTER = {"mixtral": "mlp.gate.weight", "qwen3_moe": "mlp.gate.weight", "gpt_oss": "mlp.router.weight"}

every_mixture = pytest.mark.parametrize("kind", MIXTURES)
both_backends = pytest.mark.parametrize("backend", ["reference", "fast"])


@functools.cache
def _template(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **TOKENS, **MIXTURES[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)  # biases are not zero, and experts differ
    return model.eval()


def base(kind: str) -> Any:
    """A fresh model with the same weights as every other of its kind."""
    return copy.deepcopy(_template(kind))


def peft_model(kind: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a pattern that it says has no match, and then uses
        config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options)
        model = peft.get_peft_model(base(kind), config)
    stir(model)
    return model.train()


def ours(kind: str, **options: Any) -> Any:
    model = lora.inject(base(kind), LoRAConfig(**{"r": 3, "lora_alpha": 6, "target_modules": []} | options))
    stir(model)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Ours, by the names and in the shapes that PEFT has them."""
    layers = dict(adapter_layers(model))
    files = wrapper_paths(model, [path for path, layer in layers.items() if isinstance(layer, LoRAParameter)])
    return {
        f"base_model.model.{files.get(path, path)}.{role}.default.weight": packed(role, parameter.grad)
        for path, layer in layers.items()
        for role, parameter in layer.adapter_params("default").items()
    }


@both_backends
@pytest.mark.parametrize("case", CASES)
@every_mixture
def test_logits_and_gradients_are_peft_s(kind, case, backend, tmp_path):
    theirs = peft_model(kind, **CASES[case])
    theirs.save_pretrained(tmp_path)
    with lora.use_backend(backend):
        model = lora.for_training(lora.load_adapter(base(kind), tmp_path))
        assert all(info.parameters > 0 for info in lora.adapters(model).values())
        found, expected = model(IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
        assert float((expected.logits - logits(base(kind))).detach().abs().max()) > 1e-2
        assert_near(found.logits, expected.logits)
        found.loss.backward()
    expected.loss.backward()
    theirs_by_name = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    found_by_name = gradients(model)
    assert found_by_name.keys() == theirs_by_name.keys()
    for name, gradient in theirs_by_name.items():
        assert_near(found_by_name[name], gradient, name)


@pytest.mark.parametrize("case", CASES)
@every_mixture
def test_peft_reads_what_we_save(kind, case, tmp_path):
    model = ours(kind, **CASES[case])
    lora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(kind), tmp_path).eval()
    assert_near(logits(theirs), logits(model))
    assert_equal(adapter_tensors(lora.load_adapter(base(kind), tmp_path)), adapter_tensors(model))


@every_mixture
def test_a_router_trains_too(kind, tmp_path):
    theirs = peft_model(kind, target_modules=[], target_parameters=[ROUTER[kind], *BOTH])
    theirs.save_pretrained(tmp_path)
    model = lora.load_adapter(base(kind), tmp_path)
    assert_near(logits(model), logits(theirs))
    assert model.model.layers[0].get_submodule(ROUTER[kind].removesuffix(".weight")).weight.shape == (4, 32)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_what_peft_calls_all_linear_in_a_mixture_loads(kind, tmp_path):
    """There it means the experts and the router, too, and gate_up_proj at twice the rank."""
    theirs = peft_model(kind, target_modules="all-linear")
    theirs.save_pretrained(tmp_path)
    model = lora.load_adapter(base(kind), tmp_path)
    assert_near(logits(model), logits(theirs))
    assert dict(adapter_layers(model))["model.layers.0.mlp.experts.gate_up_proj"].lora_A["default"].shape == (4, 6, 32)


@every_mixture
def test_merging_gives_peft_s_weights_and_unmerging_the_original(kind, tmp_path):
    theirs = peft_model(kind, **CASES["with linear layers"])
    theirs.save_pretrained(tmp_path)
    model = lora.load_adapter(base(kind), tmp_path).eval()
    expected, before = logits(model), snapshot(model)
    lora.merge(model)
    assert_near(logits(model), expected)
    merged = theirs.merge_and_unload()
    owner = model.model.layers[0].mlp.experts.owner
    for name in ("gate_up_proj", "down_proj"):
        weight = owner.get_parameter(name)
        assert_near(weight, merged.model.layers[0].mlp.experts.get_parameter(name), name)
        assert not torch.equal(weight, base(kind).model.layers[0].mlp.experts.get_parameter(name))
    with lora.disable_adapters(model):
        assert torch.equal(logits(model), logits(base(kind)))
    lora.unmerge(model)
    assert_same(model, before)
    plain = lora.merge_and_eject(model)
    assert not any(isinstance(module, LoRAParameter) for module in plain.modules())
    assert_near(logits(plain), expected)


@every_mixture
def test_adapters_of_different_parameters_come_and_go(kind, tmp_path):
    """In PEFT all adapters must have the same parameters. Here each has its own, and a file as if it were alone."""
    model = base(kind)
    before = snapshot(model)
    lora.inject(model, LoRAConfig(r=3, target_modules=[], target_parameters=["experts.down_proj"]), "a")
    lora.add_adapter(model, LoRAConfig(r=2, target_modules=["q_proj"], target_parameters=BOTH), "b")
    alone = {}
    for name in ("a", "b"):
        lora.set_adapter(model, name)
        stir(model)
        alone[name] = logits(model)
        lora.save_adapter(model, tmp_path, name)
        theirs = peft.PeftModel.from_pretrained(base(kind), tmp_path / name).eval()
        assert_near(logits(theirs), alone[name], name)
    lora.set_adapter(model, ["a", "b"])
    both = logits(model)
    assert not torch.allclose(both, alone["a"]) and not torch.allclose(both, alone["b"])
    lora.merge(model)
    assert_near(logits(model), both)
    lora.unmerge(model)
    with lora.disable_adapters(model):
        assert torch.equal(logits(model), logits(base(kind)))
    lora.set_adapter(model, "a")
    lora.delete_adapter(model, "b")
    assert {path for path, _ in adapter_layers(model)} == {f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)}
    assert torch.equal(logits(model), alone["a"])
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), alone["a"])
    lora.eject(model)
    assert_same(model, before)


def test_half_precision_experts_have_float32_adapters_and_train():
    model = lora.inject(base("mixtral").bfloat16(), LoRAConfig(r=2, target_modules=[], target_parameters=BOTH))
    parameters = lora.trainable_parameters(lora.for_training(model))
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


def test_autocast_computes_the_weight_in_its_own_precision():
    model = lora.for_training(ours("mixtral", **CASES["both"]))
    layer = dict(adapter_layers(model))["model.layers.0.mlp.experts.down_proj"]
    expected = layer.adapted()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.adapted(), expected)
        model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in lora.trainable_parameters(model))


def test_the_file_s_layout_and_back():
    """PEFT's: A has an expert's rows together, B has a rank's experts together."""
    A, B = torch.randn(4, 3, 5), torch.randn(4, 6, 3)  # experts, r
    assert torch.equal(unpacked("lora_A", packed("lora_A", A), 4), A)
    assert torch.equal(unpacked("lora_B", packed("lora_B", B), 4), B)
    assert torch.equal(packed("lora_A", A)[3 * 2 + 1], A[2, 1])
    assert torch.equal(packed("lora_B", B)[:, 4 * 1 + 2], B[2, :, 1])


def test_parameters_have_short_names_in_the_file_where_those_suffice(tmp_path):
    for case, names in (
        ({"target_parameters": BOTH}, ["down_proj", "gate_up_proj"]),
        ({"target_parameters": ["layers.1.mlp.experts.down_proj"]}, ["model.layers.1.mlp.experts.down_proj"]),
        ({"target_modules": ["q_proj"]}, None),
    ):
        lora.save_adapter(ours("mixtral", **case), tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["target_parameters"] == names
        assert config["target_modules"] == sorted(case.get("target_modules", []))


def test_quantised_attention_beside_adapted_experts_trains(tmp_path):
    """QLoRA of a mixture: its linear layers in 4 bits, its experts, which are none, in bfloat16 with adapters."""
    path = save(base("mixtral").bfloat16(), tmp_path / "model")
    with pytest.warns(UserWarning, match="leaves 2 modules in full precision"):
        model, _ = lora.load(path, quantization="nf4")
    config = LoRAConfig(r=2, target_parameters=BOTH)  # and all linear layers
    optimizer = torch.optim.AdamW(lora.trainable_parameters(lora.for_training(lora.inject(model, config))), lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    lora.save_adapter(model, tmp_path / "adapter")
    again = lora.load_adapter(lora.load(path)[0], tmp_path / "adapter")  # on the base in 16 bits
    assert_equal(adapter_tensors(again), adapter_tensors(model))


def test_all_linear_says_that_it_leaves_experts_out():
    with pytest.warns(UserWarning, match=r"leaves 4 parameters out .*target_parameters=\['experts.gate_up_proj'"):
        lora.inject(base("mixtral"), LoRAConfig(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.inject(base("mixtral"), LoRAConfig(r=2, target_parameters=BOTH))


def test_explain_tells_how_they_run():
    text = lora.explain(ours("mixtral", **CASES["both"]))
    assert "model.layers.1.mlp.experts.down_proj" in text and "runs with W + s B A in W's place" in text


def test_parameters_of_their_own_module_are_found():
    """A model of one's own: a module with a matrix that is no linear layer."""

    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixing = nn.Parameter(torch.randn(6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.mixing.T

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = Mix()
            self.twin = self.mix

        def forward(self, x: Tensor) -> Tensor:
            return self.twin(x) + self.mix(x)

    model = Model()
    x, W = torch.randn(3, 5), model.mix.mixing.detach().clone()
    lora.inject(model, LoRAConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=["mixing"]))
    assert model.twin is model.mix
    stir(model)
    A, B = model.mix.lora_A["default"], model.mix.lora_B["default"]
    torch.testing.assert_close(model(x), 2 * (x @ (W + 1.5 * B @ A).T))
    lora.eject(model)
    assert torch.equal(model.mix.mixing, W) and model.twin is model.mix


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a typing error": ({"target_parameters": ["experts.gate_proj"]}, r"no parameter\. Did you mean 'experts\.gate_u"),
    "a linear layer": ({"target_parameters": ["q_proj.weight"]}, r"q_proj\.weight is the weight of a Linear: name th"),
    "a vector": ({"target_parameters": ["norm.weight"]}, r"is torch\.float32 \[32\], expected floating-point num"),
    "dropout": ({"lora_dropout": 0.1, "target_parameters": BOTH}, r"lora_dropout is 0\.1, but model\.layers\.0\.mlp"),
    "dora": ({"use_dora": True, "target_parameters": BOTH}, r"use_dora is True, but .*no dropout, no DoRA"),
    "pissa": ({"init_lora_weights": "pissa", "target_parameters": BOTH}, r"init_lora_weights is 'pissa', but"),
    "rank": ({"r": 40, "target_modules": [], "target_parameters": BOTH}, r"would get r=40, but its matrices are 96"),
    "saved": ({"target_parameters": BOTH, "modules_to_save": ["experts"]}, r"is trained in full by modules_to_save"),
    "a pattern": ({"target_parameters": BOTH, "rank_pattern": {"up_proj": 2}}, r"rank_pattern has the key 'up_proj'"),
    "nothing": ({"target_modules": []}, r"target_modules is empty, expected at least one"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_and_nothing_changes(case):
    options, message = REFUSED[case]
    model = base("mixtral")
    before = snapshot(model)
    with pytest.raises(LoRAError, match=message):
        lora.inject(model, LoRAConfig(**{"target_modules": ["v_proj"]} | options))
    assert_same(model, before)


def test_a_merged_parameter_takes_no_other_adapter():
    model = ours("mixtral", target_parameters=BOTH)
    lora.merge(model)
    with pytest.raises(LoRAError, match=r"gate_up_proj has adapters merged: call lora\.unmerge"):
        lora.add_adapter(model, LoRAConfig(r=2, target_modules=["q_proj"], target_parameters=BOTH), "b")


def test_another_base_model_is_noticed(tmp_path):
    lora.save_adapter(ours("mixtral", target_parameters=BOTH), tmp_path)
    other = base("mixtral")
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj.normal_()
    with pytest.raises(LoRAError, match=r"the weights of model\.layers\.1\.mlp\.experts\.down_proj have a"):
        lora.load_adapter(other, tmp_path)


@every_mixture
def test_a_merged_directory_holds_the_merged_experts(kind, tmp_path):
    """`lora merge`: what transformers reads afterwards says what the adapter said."""
    from transformers import AutoModelForCausalLM

    from lora.directories import merge_directory

    save(base(kind), tmp_path / "base")
    model = ours(kind, **CASES["with linear layers"])
    lora.save_adapter(model, tmp_path / "adapter")
    merge_directory(str(tmp_path / "base"), str(tmp_path / "adapter"), tmp_path / "merged", dtype="float32")
    assert_near(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model))
