"""Merging: the merged model is the adapted one within one rounding, and the originals come back bit for bit."""

from __future__ import annotations

import pytest
import torch
from tiny import IDS, assert_same, snapshot, stir, tiny_llama, toy
from torch import nn

import lora
from lora import LoRAConfig, LoRAError
from lora.layers import LoRALinear, adapter_layers
from lora.reference.merge import merge_weight, merged_in_float
from lora.testing import unit_roundoff

CONFIGS = [
    LoRAConfig(r=4),
    LoRAConfig(r=4, use_dora=True),
    LoRAConfig(r=4, init_lora_weights="pissa"),
    LoRAConfig(r=4, use_rslora=True, target_modules=["q_proj", "embed", "head"]),
    LoRAConfig(r=4, use_dora=True, target_modules=["embed", "v_proj"]),
]


def adapted(config: LoRAConfig, dtype: torch.dtype = torch.float32, **options: bool) -> nn.Module:
    model = lora.inject(toy(**options).to(dtype), config)
    stir(model)
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_merged_equals_adapted_in_float64(config):
    model = adapted(config, torch.float64)
    y = model(IDS)
    errors = lora.merge(model)
    assert errors.keys() == {path for path, _ in adapter_layers(model)}
    torch.testing.assert_close(model(IDS), y, rtol=0, atol=1e3 * unit_roundoff(torch.float64))
    assert not torch.equal(y, toy().double()(IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_merged_weight_is_rounded_once_and_the_original_comes_back(config, dtype):
    model = adapted(config, dtype)
    before = snapshot(model)
    with torch.no_grad():
        layers = {path: layer for path, layer in adapter_layers(model) if isinstance(layer, LoRALinear)}
        wide = {path: merged_in_float(layer.projection_of(("default",))) for path, layer in layers.items()}
    errors = lora.merge(model)
    for path, weight in wide.items():
        assert torch.equal(model.get_submodule(path).weight, weight.to(dtype))
        assert errors[path] <= unit_roundoff(dtype) or dtype == torch.float16  # subnormals round by more
    for _ in range(10):
        lora.unmerge(model)
        lora.merge(model)
    lora.unmerge(model)
    assert_same(model, before)


def test_the_report_is_the_rounding_of_one_merge():
    model = adapted(LoRAConfig(r=4), torch.bfloat16)
    errors = lora.merge(model)
    assert all(0 < error <= unit_roundoff(torch.bfloat16) for error in errors.values())


def test_several_adapters_merge_together():
    model = lora.inject(toy().double(), CONFIGS[0], "a")
    for name, config in (("b", CONFIGS[1]), ("c", CONFIGS[2])):
        lora.add_adapter(model, config, name)
    lora.set_adapter(model, ["a", "b", "c"])
    stir(model)
    y = model(IDS)
    lora.merge(model)
    assert lora.adapters(model)["b"].merged
    torch.testing.assert_close(model(IDS), y, rtol=0, atol=1e4 * unit_roundoff(torch.float64))


def test_merge_and_eject_leaves_a_plain_model():
    model = adapted(LoRAConfig(r=4, bias="all", modules_to_save=["head"]), torch.float64)
    names = set(toy().state_dict())
    y = model(IDS)
    assert lora.merge_and_eject(model) is model
    assert set(model.state_dict()) == names
    assert not list(adapter_layers(model)) and not hasattr(model, "lora_state")
    torch.testing.assert_close(model(IDS), y, rtol=0, atol=1e3 * unit_roundoff(torch.float64))


def test_merge_and_eject_takes_up_a_merge():
    model = adapted(LoRAConfig(r=4))
    lora.merge(model)
    y = model(IDS)
    lora.merge_and_eject(model)
    assert torch.equal(model(IDS), y)


def test_conv1d_keeps_its_layout():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 4), nn.Linear(6, 3)).double()
    lora.inject(model, LoRAConfig(r=2))
    stir(model)
    x = torch.randn(5, 4, dtype=torch.float64)
    y = model(x)
    lora.merge_and_eject(model)
    assert model[0].weight.shape == (4, 6) and model[0].weight.is_contiguous()
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e3 * unit_roundoff(torch.float64))


def test_merging_a_tied_head_unties_it_and_leaves_the_embedding_alone(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama(tie_word_embeddings=True)
    table = model.model.embed_tokens.weight
    values = table.detach().clone()
    lora.inject(model, LoRAConfig(r=2, target_modules=["lm_head"]))
    stir(model)
    y = model(IDS).logits
    lora.merge(model)
    assert model.model.embed_tokens.weight is table and torch.equal(table, values)
    assert not torch.equal(model.lm_head.weight, values)
    lora.unmerge(model)
    assert model.lm_head.weight is table
    lora.merge_and_eject(model)
    assert model.config.tie_word_embeddings is False
    merged = model(IDS).logits
    torch.testing.assert_close(merged, y, rtol=0, atol=1e3 * unit_roundoff(torch.float32))
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, merged)


def test_a_tie_survives_where_nothing_parted_it():
    model = tiny_llama(tie_word_embeddings=True)
    lora.inject(model, LoRAConfig(r=2))
    stir(model)
    lora.merge_and_eject(model)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_nf4_is_merged_only_when_asked_and_reports_its_error():
    model = lora.quantize(toy(width=32).eval(), "nf4")
    lora.inject(model, LoRAConfig(r=4))
    stir(model)
    before = snapshot(model)
    y = model(IDS)
    with pytest.raises(LoRAError, match=r"layers\.0\.q_proj is quantised to NF4.*requantize=True"):
        lora.merge(model)
    assert_same(model, before)
    errors = lora.merge(model, requantize=True)
    assert all(0.02 < error < 0.2 for error in errors.values())  # 4 bits: about 0.09 of a normal weight
    merged = model(IDS)
    assert not torch.equal(merged, y)
    with lora.disable_adapters(model):
        base = model(IDS)
    lora.unmerge(model)
    assert_same(model, before)
    with lora.disable_adapters(model):
        assert torch.equal(model(IDS), base)
    lora.merge_and_eject(model, requantize=True)
    assert torch.equal(model(IDS), merged)


def test_an_overflowing_merge_changes_nothing():
    model = adapted(LoRAConfig(r=4), torch.float16)
    with torch.no_grad():
        model.layers[2].v_proj.lora_B["default"].fill_(60000.0)
    before = snapshot(model)
    with pytest.raises(
        LoRAError, match=r"merging \['default'\] into layers\.2\.v_proj gives \d+ weights .* not finite"
    ):
        lora.merge(model)
    assert_same(model, before)
    assert not any(layer.merged for _, layer in adapter_layers(model))
    lora.merge(model, safe=False)
    assert not torch.isfinite(model.layers[2].v_proj.weight).all()


def test_merging_twice_is_refused():
    model = adapted(LoRAConfig(r=4))
    lora.merge(model)
    with pytest.raises(LoRAError, match=r"has \['default'\] merged already: call lora\.unmerge"):
        lora.merge(model)


def test_merge_weight_is_an_operation():
    layer = adapted(LoRAConfig(r=4)).layers[0].q_proj
    projection = layer.projection_of(("default",))
    expected = projection.weight + 2.0 * projection.lora_B @ projection.lora_A
    torch.testing.assert_close(lora.ops.merge_weight(projection), expected)
    assert merge_weight(projection._replace(lora_A=None)) is not None
