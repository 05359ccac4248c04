"""for_training, for_inference and checkpointing through a transformers model."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny import IDS, assert_same, snapshot, stir, tiny_llama, toy

import lora
import lora.layers
from lora import LoRAConfig, LoRAError
from lora.reference.modes import CHECKPOINTING


def adapted(**options):
    model = lora.inject(tiny_llama(), LoRAConfig(r=4, **options))
    stir(model)
    return model


def step(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(7)
    model.zero_grad()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("mode", [m for m in CHECKPOINTING if m != "none"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_is_bit_identical_to_none(mode, dropout):
    model = adapted(lora_dropout=dropout)
    plain_loss, plain = step(lora.for_training(model))
    loss, gradients = step(lora.for_training(model, checkpointing=mode))
    assert torch.equal(loss, plain_loss)
    assert gradients.keys() == plain.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, plain[name]), name
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("mode", ["recompute", "selective", "offload"])
def test_checkpointing_saves_less(mode):
    model = adapted()
    sizes = {}
    for name in ("none", mode):
        saved = []
        lora.for_training(model, checkpointing=name)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(t.nbytes), t)[1], lambda t: t
        ):
            model(IDS, labels=IDS)
        sizes[name] = sum(saved)
    assert sizes[mode] < 0.5 * sizes["none"]


def test_evaluating_between_forward_and_backward_does_not_disturb_the_recomputation():
    model = lora.for_training(adapted(lora_dropout=0.5), checkpointing="recompute")
    _, expected = step(model)
    torch.manual_seed(7)
    model.zero_grad()
    loss = model(IDS, labels=IDS).loss
    with torch.no_grad(), lora.disable_adapters(model):
        model(IDS)
    model(IDS)
    loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, expected[name]), name


def test_switching_back_and_forth_changes_nothing_else():
    model = adapted(lora_dropout=0.5)
    model.config.use_cache = True
    lora.for_training(model, checkpointing="offload")
    before, config = snapshot(model), model.config.to_dict()
    y = lora.for_inference(model)(IDS).logits
    assert model.config.use_cache is True
    for _ in range(2):
        merged = lora.for_inference(model, merge=True)(IDS).logits
        torch.testing.assert_close(merged, y, rtol=0, atol=1e-4 * float(y.detach().abs().max()))
        lora.for_training(model, checkpointing="offload")
        assert model.training and model.config.use_cache is False
    assert_same(model, before)
    assert model.config.to_dict() == config
    assert torch.equal(lora.for_inference(model)(IDS).logits, y)


def test_inference_turns_checkpointing_off():
    model = lora.for_training(adapted(), checkpointing="recompute")
    blocks = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    assert blocks and all(block.gradient_checkpointing for block in blocks)
    lora.for_inference(model)
    assert not any(block.gradient_checkpointing for block in blocks)
    assert not any("_gradient_checkpointing_func" in vars(block) for block in blocks)


@pytest.mark.parametrize("backend", ["reference", "fast"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}])
def test_training_merged_adapters_is_warned_of(backend, options):
    """Torch says "does not require grad", or nothing at all where a module trains in full and the adapters do not."""
    with lora.use_backend(backend):
        model = lora.for_training(adapted(**options))
        lora.merge(model)
        with pytest.warns(UserWarning, match=r"adapters \(default\) are merged: .*lora\.for_training or lora\.unmerge"):
            loss = model(IDS, labels=IDS).loss
        assert loss.requires_grad == bool(options.get("modules_to_save"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with torch.no_grad():
                model(IDS)
            with lora.disable_adapters(model):
                model(IDS)
            lora.for_inference(model)(IDS)
            step(lora.for_training(model))


@pytest.mark.filterwarnings("ignore:Every label of a batch")
@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_a_loss_over_no_label_is_what_the_how_to_says(backend):
    nothing = torch.full_like(IDS, -100)
    with lora.use_backend(backend):
        model = lora.for_training(adapted())
        loss = model(IDS, labels=nothing).loss
        assert loss.isnan() if backend == "reference" else loss == 0
        assert model(IDS, labels=nothing, num_items_in_batch=3).loss == 0


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_generating_between_steps_takes_eval_mode(backend):
    """In training mode with checkpointing transformers gives its blocks no cache, but one token at a time."""
    with lora.use_backend(backend):
        model = adapted()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 8 if parameter.dim() == 2 else 1  # else every text is the same token again and again
        options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS), "pad_token_id": 0}
        expected = lora.for_inference(model).generate(IDS, **options)
        lora.for_training(model, "recompute")
        assert not torch.equal(model.generate(IDS, **options), expected)
        assert torch.equal(model.eval().generate(IDS, **options), expected)
        assert torch.equal(lora.for_inference(model, merge=True).generate(IDS, **options), expected)
        assert all(layer.merged for _, layer in lora.layers.adapter_layers(lora.for_inference(model)))


def test_merged_inference_calls_no_adapter(monkeypatch):
    model = lora.for_inference(adapted(), merge=True)
    seen = []
    operation = lora.reference.lora_linear
    monkeypatch.setattr(
        lora.reference, "lora_linear", lambda x, p, **o: (seen.append(p.lora_A), operation(x, p, **o))[1]
    )
    model(IDS)
    assert seen and all(lora_A is None for lora_A in seen)


def test_unknown_checkpointing_is_named():
    with pytest.raises(
        LoRAError, match=r"checkpointing is 'recomputed', expected one of 'none'.*Did you mean 'recompute'"
    ):
        lora.for_training(adapted(), checkpointing="recomputed")


def modes_in_force(model) -> list[str]:
    """What each decoder layer is handed, by the arguments that it will call the checkpoint with."""
    found = []
    for layer in model.model.layers:
        function = vars(layer).get("_gradient_checkpointing_func")
        options = {} if function is None else function.keywords
        found.append(next(iter(options), "recompute") if layer.gradient_checkpointing else "none")
    return found


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_each_block_can_have_its_own_mode(backend):
    with lora.use_backend(backend):
        model = lora.inject(tiny_llama(num_hidden_layers=4), LoRAConfig(r=4, lora_dropout=0.5))
        stir(model)
        plain_loss, plain = step(lora.for_training(model))
        names = ["offload", "recompute", "selective", "none"]
        by_path = {f"model.layers.{i}": name for i, name in enumerate(names)}
        for checkpointing in (names, tuple(names), by_path, dict(reversed(by_path.items()))):
            lora.for_training(model)
            assert modes_in_force(model) == ["none"] * 4
            loss, gradients = step(lora.for_training(model, checkpointing))
            assert modes_in_force(model) == names
            assert torch.equal(loss, plain_loss)
            assert all(torch.equal(gradients[name], plain[name]) for name in plain)
        assert "in 1 blocks, recompute in 1 blocks, selective in 1 blocks" in lora.explain(model)
        lora.for_inference(model)
        assert modes_in_force(model) == ["none"] * 4


@pytest.mark.parametrize(
    ("checkpointing", "message"),
    [
        (["none"], "checkpointing has 1 modes, expected 2: one for each block of this LlamaForCausalLM"),
        (["none", "selectiv"], "checkpointing of model.layers.1 is 'selectiv', .*Did you mean 'selective'"),
        (["none", None], "checkpointing of model.layers.1 is None, expected one of 'none'"),
        ({"model.layers.0": "none"}, "checkpointing leaves out 'model.layers.1', expected a mode for each of the 2"),
        (
            {"model.layers.0": "none", "model.layer.1": "none"},
            "names 'model.layer.1', .*Did you mean 'model.layers.1'\\? A plan is for the model it was made with",
        ),
        (3, "checkpointing is 3, expected one of 'none'"),
        (None, "checkpointing is None, expected one of 'none'"),
    ],
)
def test_wrong_modes_are_named_before_anything_changes(checkpointing, message):
    model = lora.for_inference(adapted())
    with pytest.raises(LoRAError, match=message):
        lora.for_training(model, checkpointing)
    assert not model.training and modes_in_force(model) == ["none", "none"]


def test_a_model_without_blocks_cannot_checkpoint():
    model = lora.inject(toy(), LoRAConfig(r=2))
    with pytest.raises(LoRAError, match=r"Toy has no transformers GradientCheckpointingLayer.*checkpointing='none'"):
        lora.for_training(model, checkpointing="recompute")
    with pytest.raises(LoRAError, match="Toy has no transformers GradientCheckpointingLayer"):
        lora.for_training(model, checkpointing=["recompute"])
    assert not model.training
    assert lora.for_training(model).training
