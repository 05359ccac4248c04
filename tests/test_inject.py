"""Injection: what is matched, what is refused, and that eject is its exact inverse."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tiny import IDS, Toy, assert_same, snapshot, stir, tiny_llama, toy
from torch import nn

import lora
from lora import LoRAConfig, LoRAError
from lora.layers import LoRAEmbedding, LoRALinear, adapter_layers


def paths(model: nn.Module) -> list[str]:
    return [path for path, _ in adapter_layers(model)]


def test_all_linear_leaves_the_output_head_out_and_step_zero_changes_nothing():
    model = toy()
    y = model(IDS)
    lora.inject(model, LoRAConfig(r=4))
    assert paths(model) == [f"layers.{i}.{name}" for i in range(3) for name in ("q_proj", "v_proj", "down_proj")]
    assert torch.equal(model(IDS), y)


def test_only_the_adapters_train():
    model = lora.inject(toy(), LoRAConfig(r=2))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if ".lora_A." in n or ".lora_B." in n}
    summary = lora.trainable_parameters(model)
    assert summary.trainable == sum(p.numel() for p in summary) == 3 * 2 * ((16 + 16) + (16 + 32) + (32 + 16))
    assert f"{summary.trainable:,} of {summary.total:,}" in str(summary)


def test_the_layers_compute_the_equation():
    model = toy()
    linear = model.layers[1].v_proj
    weight = linear.weight.detach().clone()
    lora.inject(model, LoRAConfig(r=4, lora_alpha=12, target_modules=["layers.1.v_proj"]))
    stir(model)
    layer = model.layers[1].v_proj
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(layer(x), x @ (weight + 3.0 * B @ A).T)


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"bias": False}])
@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(r=4),
        LoRAConfig(r=4, use_dora=True, lora_dropout=0.5),
        LoRAConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"]),
        LoRAConfig(r=3, init_lora_weights="olora"),
        LoRAConfig(r=4, target_modules=["embed", "head"], modules_to_save=["layers.2"]),
        LoRAConfig(r=4, bias="all", modules_to_save=["head"]),
    ],
    ids=str,
)
def test_eject_is_the_exact_inverse(options, config):
    model = toy(**options)
    model.layers[0].norm.weight.requires_grad_(False)
    before = snapshot(model)
    y = model(IDS)
    lora.inject(model, config)
    stir(model)
    assert not torch.equal(model(IDS), y)
    lora.merge(model)
    assert lora.eject(model) is model
    assert_same(model, before)
    assert not hasattr(model, "lora_state")
    assert torch.equal(model(IDS), y)


def test_shared_modules_stay_shared():
    model = toy()
    model.layers[2] = model.layers[0]
    model.layers[1].q_proj = model.layers[0].q_proj
    before = snapshot(model)
    lora.inject(model, LoRAConfig(r=2))
    assert model.layers[1].q_proj is model.layers[0].q_proj is model.layers[2].q_proj
    assert isinstance(model.layers[1].q_proj, LoRALinear)
    stir(model)
    lora.eject(model)
    assert_same(model, before)


def test_an_embedding_and_its_tied_head_get_adapters_of_their_own():
    model = toy(tied=True)
    lora.inject(model, LoRAConfig(r=2, target_modules=["embed", "head"]))
    assert isinstance(model.embed, LoRAEmbedding)
    assert model.embed.weight is model.head.weight
    stir(model)
    table, head = model.embed, model.head
    one_hot = nn.functional.one_hot(IDS, 11).float()
    expected = one_hot @ (table.weight + 4 * (table.lora_B["default"] @ table.lora_A["default"]).T)
    torch.testing.assert_close(table(IDS), expected)
    x = torch.randn(4, 16)
    torch.testing.assert_close(head(x), x @ (head.weight + 4 * head.lora_B["default"] @ head.lora_A["default"]).T)


def test_conv1d_is_a_linear_layer_stored_the_other_way():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 4), nn.Linear(6, 3))
    x = torch.randn(5, 4)
    lora.inject(model, LoRAConfig(r=2))
    assert torch.equal(model(x), model[1].base_layer(model[0].base_layer(x)))
    stir(model)
    weight = model[0].base_layer.weight.T + 4 * model[0].lora_B["default"] @ model[0].lora_A["default"]
    torch.testing.assert_close(model[0](x), x @ weight.T + model[0].base_layer.bias)


def test_gemmas_scaled_embedding():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    model = nn.Sequential(Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=3.0), nn.Linear(6, 2))
    y = model(IDS)
    lora.inject(model, LoRAConfig(r=2, target_modules=["0"]))
    assert torch.equal(model(IDS), y)
    plain = model[0](IDS)
    stir(model)
    table = model[0]
    change = 3.0 * 4 * (table.lora_A["default"].T[IDS] @ table.lora_B["default"].T)
    torch.testing.assert_close(table(IDS), plain + change)


def test_layers_to_transform():
    model = lora.inject(toy(), LoRAConfig(r=2, layers_to_transform=[0, 2], target_modules=["q_proj"]))
    assert paths(model) == ["layers.0.q_proj", "layers.2.q_proj"]
    model = lora.inject(toy(), LoRAConfig(r=2, layers_to_transform=1, layers_pattern="layers"))
    assert paths(model) == ["layers.1.q_proj", "layers.1.v_proj", "layers.1.down_proj"]


def test_exclusions_and_regular_expressions():
    model = lora.inject(toy(), LoRAConfig(r=2, exclude_modules=["layers.0.q_proj", "v_proj"]))
    assert paths(model) == ["layers.0.down_proj", "layers.1.q_proj", "layers.1.down_proj", "layers.2.q_proj",
                            "layers.2.down_proj"]  # fmt: skip
    model = lora.inject(toy(), LoRAConfig(r=2, target_modules=r"layers\.[01](\.\w+_proj)?"))  # matches the blocks too
    assert paths(model) == [f"layers.{i}.{name}" for i in (0, 1) for name in ("q_proj", "v_proj", "down_proj")]


def test_rank_and_alpha_patterns():
    config = LoRAConfig(r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.q_proj": 3})
    model = lora.inject(toy(), config)
    assert model.layers[0].q_proj.lora_A["default"].shape == (2, 16)
    assert model.layers[0].v_proj.lora_A["default"].shape == (4, 16)
    assert [layer.q_proj.scaling["default"] for layer in model.layers] == [4.0, 1.5, 4.0]


def test_biases_train_and_step_aside():
    model = toy()
    y = model(IDS)
    lora.inject(model, LoRAConfig(r=2, bias="lora_only", target_modules=["q_proj"]))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "bias" in name}
    assert trainable == {f"layers.{i}.q_proj.base_layer.bias" for i in range(3)}
    stir(model)
    changed = model(IDS)
    with lora.disable_adapters(model):
        assert torch.equal(model(IDS), y)
    assert torch.equal(model(IDS), changed)


def test_modules_to_save_are_copies_that_train():
    model = toy(tied=True)
    head = model.head
    y = model(IDS)
    lora.inject(model, LoRAConfig(r=2, modules_to_save=["head"]))
    assert model.head.copies["default"].weight is not head.weight
    assert model.head.weight is model.head.copies["default"].weight
    stir(model)
    with lora.disable_adapters(model):
        assert torch.equal(model(IDS), y)
        assert model.head.weight is head.weight
    assert not torch.equal(model(IDS), y)


def test_a_saved_module_inside_a_saved_module_is_saved_once():
    model = toy()
    before = snapshot(model)
    lora.inject(model, LoRAConfig(r=2, modules_to_save=["layers.1", "norm"]))
    assert [path for path, _ in lora.layers.saved_modules(model)] == ["layers.0.norm", "layers.1", "layers.2.norm"]
    stir(model)
    lora.eject(model)
    assert_same(model, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_adapters_of_a_half_precision_base_are_float32(dtype):
    model = lora.inject(toy().to(dtype), LoRAConfig(r=2, use_dora=True))
    wide = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in lora.trainable_parameters(model)} == {wide}
    assert model(IDS).dtype == dtype


def test_meta_models_are_injected_without_values():
    with torch.device("meta"):
        model = Toy()
    lora.inject(model, LoRAConfig(r=2, init_lora_weights="pissa"))
    assert all(p.is_meta for p in lora.trainable_parameters(model))


def test_deepcopy_gives_an_independent_model():
    model = lora.inject(toy(), LoRAConfig(r=2, bias="all", lora_dropout=0.5, modules_to_save=["head"]))
    twin = copy.deepcopy(model)
    stir(twin)
    assert not torch.equal(twin(IDS), model(IDS))
    assert twin.layers[0].q_proj.mask_seed is not model.layers[0].q_proj.mask_seed
    lora.eject(twin)
    with lora.disable_adapters(model):
        assert torch.equal(twin(IDS), model(IDS))


def test_projections_of_one_input_share_a_mask_and_others_do_not():
    model = lora.inject(tiny_llama(), LoRAConfig(r=2, lora_dropout=0.5)).train()
    block = model.model.layers[0]
    q, k, v, o = (getattr(block.self_attn, f"{name}_proj") for name in "qkvo")
    gate, up, down = block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj
    model(IDS)
    assert q.mask_seed is k.mask_seed is v.mask_seed is not o.mask_seed
    assert gate.mask_seed is up.mask_seed is down.mask_seed is not q.mask_seed
    drawn = [layer.updates()[0].dropout for layer in (q, k, v, gate, up, down)]
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3] == drawn[4]
    assert (drawn[5].seed, drawn[5].stream, drawn[4].stream) == (drawn[4].seed, 1, 0)


def test_dropout_is_a_function_of_the_generator():
    model = lora.inject(toy(), LoRAConfig(r=2, lora_dropout=0.5))
    stir(model)
    model.train()
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(model(IDS))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    model.eval()
    assert torch.equal(model(IDS), model(IDS))


def linear_with_its_own_forward() -> nn.Module:
    class Odd(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    return nn.Sequential(Odd(4, 4), nn.Linear(4, 4))


def offloaded() -> nn.Module:
    model = toy()
    q = model.layers[0].q_proj
    q.forward = lambda x: nn.Linear.forward(q, x)
    return model


REFUSED = [
    (toy, {"target_modules": ["q_porj"]}, ["'q_porj'", "matches no module", "Did you mean 'q_proj'", "v_proj"]),
    (toy, {"target_modules": ["q_proj", "k_proj"]}, ["'k_proj'", "matches no module", "Did you mean"]),
    (toy, {"target_modules": r".*\.k_proj"}, ["k_proj", "matches no module", "Adaptable modules end in"]),
    (toy, {"target_modules": ["norm"]}, ["'norm'", "layers.0.norm", "LayerNorm", "not a linear layer"]),
    (toy, {"target_modules": ["layers.0"]}, ["'layers.0'", "Block", "It contains", "q_proj"]),
    (toy, {"target_modules": r"layers\.0\..*"}, ["layers.0.norm", "LayerNorm"]),
    (toy, {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, ["'q_proj'", "every match", "exclude_mod"]),
    (toy, {"exclude_modules": ["q_prj"]}, ["exclude_modules names 'q_prj'", "Did you mean 'q_proj'"]),
    (toy, {"modules_to_save": ["heat"]}, ["modules_to_save names 'heat'", "Did you mean 'head'"]),
    (toy, {"layers_to_transform": [0, 3]}, ["layers_to_transform has 3", "0 to 2"]),
    (toy, {"layers_to_transform": 0, "layers_pattern": "blocks"}, ["layers_to_transform has 0", "no numbered layers"]),
    (toy, {"r": 17}, ["layers.0.q_proj would get r=17", "16 x 16", "at most 16", "rank_pattern"]),
    (toy, {"r": 12, "target_modules": ["embed"]}, ["embed would get r=12", "11 x 16", "at most 11"]),
    (toy, {"rank_pattern": {"o_proj": 2}}, ["rank_pattern has the key 'o_proj'", "Did you mean", "q_proj"]),
    (toy, {"alpha_pattern": {"k_proj": 2.0}}, ["alpha_pattern has the key 'k_proj'", "matches none of the 9"]),
    (toy, {"init_lora_weights": "orthogonal", "r": 3}, ["orthogonal", "layers.0.q_proj has r=3", "even r"]),
    (toy, {"init_lora_weights": "pissa", "target_modules": ["embed"]}, ["'pissa'", "linear layers", "embed"]),
    (toy, {"lora_dropout": 0.1, "target_modules": ["embed"]}, ["lora_dropout is 0.1", "only embeddings"]),
    (lambda: toy(bias=False), {"bias": "lora_only"}, ["bias='lora_only'", "no adapted module has a bias"]),
    (toy, {"target_parameters": ["experts.weight"]}, ["target_parameters names 'experts.weight'", "no parameter"]),
    (lambda: nn.Linear(4, 4), {}, ["matches no module"]),
    (lambda: nn.Sequential(nn.ReLU()), {}, ["matches no module", "no linear layer"]),
    (linear_with_its_own_forward, {"target_modules": ["0"]}, ["0 is a", "Odd", "own arithmetic"]),
    (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), {"target_modules": ["out_proj"]},
     ["'out_proj'", "nn.MultiheadAttention", "no effect"]),
    (lambda: nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), {"target_modules": ["0"]}, ["max_norm"]),
    (offloaded, {"target_modules": ["q_proj"]}, ["layers.0.q_proj", "a forward of its own"]),
]  # fmt: skip


@pytest.mark.parametrize(("build", "fields", "words"), REFUSED, ids=[str(f) for _, f, _ in REFUSED])
def test_what_does_not_fit_is_refused_and_nothing_changes(build, fields, words):
    model = build()
    before = snapshot(model)
    with pytest.raises(LoRAError) as error:
        lora.inject(model, LoRAConfig(**({"r": 2} | fields)))
    for word in words:
        assert word in str(error.value)
    assert_same(model, before)
    assert not hasattr(model, "lora_state")


@pytest.mark.parametrize("name", ["", "a.b", "../x", "/tmp/x", "a/b", "a b", "-x", "keys", "training", None, 3])
def test_adapter_names_cannot_be_paths_or_shadow_torch(name):
    model = toy()
    with pytest.raises(LoRAError, match="adapter_name is"):
        lora.inject(model, LoRAConfig(r=2), adapter_name=name)
    assert not hasattr(model, "lora_state")


def test_all_linear_says_what_it_leaves_out():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match=r"leaves attention\.out_proj out: it is read past its forward"):
        lora.inject(model, LoRAConfig(r=2))
    assert paths(model) == ["mlp"]


@pytest.mark.parametrize("config", [None, {"r": 2}, "all-linear"])
def test_a_config_of_another_type_is_named(config):
    with pytest.raises(LoRAError, match=f"config is a {type(config).__name__}, expected a LoRAConfig"):
        lora.inject(toy(), config)


def test_a_model_of_another_type_is_named():
    with pytest.raises(LoRAError, match=r"model is a NoneType, expected an nn\.Module"):
        lora.inject(None, LoRAConfig())


def test_a_second_inject_points_to_add_adapter():
    model = lora.inject(toy(), LoRAConfig(r=2))
    with pytest.raises(LoRAError, match=r"already carries adapters \(default\).*add_adapter.*eject"):
        lora.inject(model, LoRAConfig(r=2), "other")


def test_verbs_on_a_plain_model_say_so():
    for verb in (lora.eject, lora.adapters, lora.merge, lora.for_training, lora.merge_and_eject):
        with pytest.raises(LoRAError, match=r"Toy carries no adapters: call lora\.inject|no adapter is active"):
            verb(toy())


def test_inject_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.eject(lora.inject(tiny_llama(), LoRAConfig(r=2)))
