"""Several adapters: adding, switching, disabling, deleting, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tiny import IDS, assert_same, snapshot, stir, tiny_llama, toy

import lora
from lora import LoRAConfig, LoRAError

A = LoRAConfig(r=4, lora_alpha=8)
B = LoRAConfig(r=2, lora_alpha=1, target_modules=["q_proj", "embed"])


def two_adapters(**options):
    """A model with adapters "a" and "b", both moved off their start."""
    model = lora.inject(toy(), A.replace(**options), "a")
    lora.add_adapter(model, B, "b")
    for name in ("b", "a"):
        lora.set_adapter(model, name)
        stir(model, seed=ord(name))
    return model


def test_an_added_adapter_rests_until_it_is_set():
    model = lora.inject(toy(), A, "a")
    stir(model)
    y = model(IDS)
    lora.add_adapter(model, B.replace(init_lora_weights=False), "b")
    assert torch.equal(model(IDS), y)
    assert [(name, info.active) for name, info in lora.adapters(model).items()] == [("a", True), ("b", False)]
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    lora.set_adapter(model, "b")
    assert not torch.equal(model(IDS), y)
    switched = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and switched and not trainable & switched
    lora.set_adapter(model, "a")
    assert torch.equal(model(IDS), y)


def test_the_updates_of_several_adapters_add():
    model = two_adapters()
    x = torch.randn(3, 16)
    layer = model.layers[0].q_proj
    outputs = {}
    for names in ("a", "b", ("a", "b"), ("b", "a")):
        lora.set_adapter(model, names)
        outputs[names] = layer(x)
    with lora.disable_adapters(model):
        base = layer(x)
    torch.testing.assert_close(outputs["a", "b"] - base, (outputs["a"] - base) + (outputs["b"] - base))
    torch.testing.assert_close(outputs["a", "b"], outputs["b", "a"])
    assert lora.trainable_parameters(model).trainable == sum(i.parameters for i in lora.adapters(model).values())


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_dropout": 0.25}])
def test_mixed_kinds_add_too(options):
    model = two_adapters(**options)
    x = torch.randn(3, 16)
    layer = model.layers[0].q_proj
    outputs = {}
    for names in ("a", "b", ("a", "b")):
        lora.set_adapter(model, names)
        outputs[names] = layer(x)
    with lora.disable_adapters(model):
        base = layer(x)
    torch.testing.assert_close(outputs["a", "b"] - base, (outputs["a"] - base) + (outputs["b"] - base))
    outputs["a", "b"].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters() if p.requires_grad)


def test_disabling_gives_the_base_model_and_nests():
    model, y = two_adapters(), toy()(IDS)
    changed = model(IDS)
    with lora.disable_adapters(model) as inner:
        assert inner is model and torch.equal(model(IDS), y)
        with lora.disable_adapters(model):
            assert torch.equal(model(IDS), y)
        assert torch.equal(model(IDS), y)
    assert torch.equal(model(IDS), changed)
    with pytest.raises(RuntimeError, match="inside"), lora.disable_adapters(model):
        raise RuntimeError("inside")
    assert torch.equal(model(IDS), changed)


def test_disabling_puts_merged_weights_aside():
    model, y = two_adapters(), toy()(IDS)
    lora.merge(model)
    merged = model(IDS)
    with lora.disable_adapters(model), lora.disable_adapters(model):
        assert torch.equal(model(IDS), y)
    assert torch.equal(model(IDS), merged)


def test_deleting_unwraps_what_the_adapter_alone_adapted():
    model = two_adapters()
    lora.set_adapter(model, ["a", "b"])
    lora.delete_adapter(model, "b")
    assert isinstance(model.embed, torch.nn.Embedding)
    assert list(lora.adapters(model)) == ["a"]
    assert model.layers[0].q_proj.adapter_names == ("a",)
    assert not any(name.endswith(".b") for name, _ in model.named_parameters())
    assert lora.adapters(model)["a"].active


def test_eject_after_many_changes_is_still_exact():
    model = toy()
    before = snapshot(model)
    lora.inject(model, A.replace(bias="all", modules_to_save=["head"]), "a")
    stir(model)
    lora.add_adapter(model, B, "b")
    lora.set_adapter(model, "b")
    stir(model)
    lora.merge(model)
    lora.unmerge(model)
    lora.delete_adapter(model, "a")
    lora.add_adapter(model, A.replace(bias="lora_only"), "c")
    lora.set_adapter(model, ["b", "c"])
    stir(model)
    lora.eject(model)
    assert_same(model, before)


def test_the_group_redraws_its_mask_when_its_leader_is_deleted():
    model = lora.inject(toy(), A.replace(target_modules=["q_proj"], lora_dropout=0.5), "a")
    lora.add_adapter(model, A.replace(target_modules=["v_proj"], lora_dropout=0.5), "b")
    block = model.layers[0]
    assert block.v_proj.mask_seed is block.q_proj.mask_seed and not block.v_proj.leads_mask
    lora.delete_adapter(model, "a")
    assert block.v_proj.leads_mask


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_masks_change_from_step_to_step_whichever_adapters_are_active(backend):
    """The group's first projection has none of the active one's: it drew no seed, and the others kept an old one."""
    model = lora.inject(tiny_llama(), A.replace(target_modules=["q_proj", "gate_proj"]), "a")
    lora.add_adapter(model, A.replace(target_modules=["v_proj", "up_proj"], lora_dropout=0.5), "b")
    stir(lora.set_adapter(model, ["a", "b"]))
    with lora.use_backend(backend):
        for names in ("b", ["a", "b"], "b"):  # a does not drop out
            lora.for_training(lora.set_adapter(model, names))
            first, second = model(IDS).logits, model(IDS).logits
            assert not torch.equal(first, second), names
            torch.manual_seed(0)
            one = model(IDS).logits
            torch.manual_seed(0)
            assert torch.equal(model(IDS).logits, one), names  # the generator has all of the state


def merged_model():
    model = two_adapters()
    lora.merge(model)
    return model


def with_biases():
    return lora.inject(toy(), A.replace(bias="all"), "a")


def with_saved():
    model = lora.inject(toy(), A.replace(modules_to_save=["head"]), "a")
    return lora.add_adapter(model, A.replace(modules_to_save=["head"]), "b")


REFUSED = [
    (two_adapters, lambda m: lora.set_adapter(m, "c"), ["no adapter 'c'", "'a', 'b'"]),
    (two_adapters, lambda m: lora.set_adapter(m, []), ["expected one name or several"]),
    (two_adapters, lambda m: lora.set_adapter(m, ["a", "a"]), ["different"]),
    (two_adapters, lambda m: lora.delete_adapter(m, "aa"), ["no adapter 'aa'", "'a', 'b'"]),
    (with_biases, lambda m: lora.delete_adapter(m, "a"), ["'a' is the model's only adapter", "lora.eject"]),
    (two_adapters, lambda m: lora.add_adapter(m, A, "a"), ["already an adapter 'a'"]),
    (merged_model, lambda m: lora.set_adapter(m, "b"), ["set_adapter needs unmerged", "['a'] merged", "lora.unmerge"]),
    (merged_model, lambda m: lora.delete_adapter(m, "b"), ["delete_adapter needs unmerged", "lora.unmerge"]),
    (merged_model, lambda m: lora.add_adapter(m, A, "c"), ["adapters merged", "lora.unmerge"]),
    (with_biases, lambda m: lora.add_adapter(m, A.replace(bias="all"), "b"), ["bias='all'", "'a' already trains"]),
    (with_saved, lambda m: lora.set_adapter(m, ["a", "b"]), ["['a', 'b']", "modules_to_save", "only one"]),
    (with_saved, lambda m: lora.add_adapter(m, A.replace(target_modules=["head"]), "c"), ["head", "trained in full"]),
    (two_adapters, lambda m: lora.add_adapter(m, A.replace(target_modules=["head"], modules_to_save=["q_proj"]), "c"),
     ["modules_to_save names layers.0.q_proj", "another adapter adapts"]),
]  # fmt: skip


@pytest.mark.parametrize(("build", "act", "words"), REFUSED, ids=[w[0] for *_, w in REFUSED])
def test_a_refused_verb_changes_nothing(build, act, words):
    model = build()
    before, infos = snapshot(model), lora.adapters(model)
    with pytest.raises(LoRAError) as error:
        act(model)
    for word in words:
        assert word in str(error.value)
    assert_same(model, before)
    assert lora.adapters(model) == infos


def test_adapters_are_found_through_a_wrapper():
    model = torch.nn.Module()
    model.module = two_adapters()
    assert list(lora.adapters(model)) == ["a", "b"]
