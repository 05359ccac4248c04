"""Checkpointing, proven: what is recomputed or fetched back is what was there, in every bit, dropout included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import stir, tiny_llama

import lora
from proof.laws import assert_same_bits, both, examples

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
MODES = ["recompute", "selective", "offload", ["none", "selective"], ["recompute", "none"]]


def step(model, mode, device, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    lora.for_training(model, checkpointing=mode)
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(IDS.to(device), labels=IDS.to(device)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def adapted(device: str, **options):
    model = tiny_llama(num_hidden_layers=2).to(device)
    lora.inject(model, lora.LoRAConfig(r=3, init_lora_weights=False, **options))
    stir(model)
    return model


@both
@examples(12)
@given(mode=st.sampled_from(MODES), dropout=st.sampled_from([0.3, 0.0]), dora=st.booleans(), seed=st.integers(0, 99))
def test_every_mode_is_bit_identical_to_none(device, backend, mode, dropout, dora, seed):
    with lora.use_backend(backend):
        model = adapted(device, lora_dropout=dropout, use_dora=dora)
        loss, gradients = step(model, "none", device, seed)
        assert all(gradient.any() for gradient in gradients.values())
        again, found = step(model, mode, device, seed)
    assert_same_bits(again, loss, "loss")
    for name, gradient in gradients.items():
        assert_same_bits(found[name], gradient, name)


@both
@pytest.mark.parametrize("mode", ["recompute", "selective", "offload"])
def test_accumulation_and_an_evaluation_in_between_change_no_bit(device, backend, mode):
    """Two batches into one gradient, the model evaluated between the first one's forward and its backward."""
    ids = IDS.to(device)

    def gradients(mode: str) -> dict[str, torch.Tensor]:
        lora.for_training(model, checkpointing=mode)
        model.zero_grad()
        torch.manual_seed(7)
        loss = model(ids, labels=ids).loss
        model.eval()
        with torch.no_grad():
            model(ids.flip(1), labels=ids)
        model.train()
        loss.backward()
        model(ids.flip(0), labels=ids.flip(0)).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    with lora.use_backend(backend):
        model = adapted(device, lora_dropout=0.3)
        expected, found = gradients("none"), gradients(mode)
    assert all(gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        assert_same_bits(found[name], gradient, name)


@both
@pytest.mark.parametrize("mode", ["recompute", "selective", "offload"])
def test_another_mask_is_another_gradient(device, backend, mode):
    """The law above means something: with dropout, another seed gives other bits in the same mode."""
    with lora.use_backend(backend):
        model = adapted(device, lora_dropout=0.3)
        one, two = (step(model, mode, device, seed)[1] for seed in (1, 2))
    assert any(not torch.equal(one[name], two[name]) for name in one)
