"""Optimizers people bring: fused, 8-bit, and LoRA+ with its two rates, beside PEFT's groups and training."""

from __future__ import annotations

import functools
import math
from typing import Any

import peft
import pytest
import torch
from test_their_loops import (
    CONFIG,
    _quiet,  # noqa: F401 - a fixture for every test here, too
    assert_same_training,
    bare_loop,
    base,
    both_backends,
    pair,
    start_of,
    tensors_of,
    with_trainer,
)
from tiny import tiny_llama

import lora
from lora import LoRAConfig, LoRAError


def eight_bit(parameters: Any, lr: float) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=lr, min_8bit_size=64)  # the default leaves tensors below 4096


def fused(parameters: Any, lr: float) -> Any:
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def plain(parameters: Any, lr: float) -> Any:
    return torch.optim.AdamW(parameters, lr=lr, foreach=False)


@both_backends
def test_fused_and_eight_bit_optimizers_do_what_adamw_does(backend, tmp_path):
    """fused AdamW to rounding; 8-bit states of bitsandbytes' to what 8 bits hold, and they are 8 bits wide."""
    ended, losses = {}, {}
    for optimizer in (plain, fused, eight_bit):
        _, ours = pair(tmp_path)
        start = start_of(ours)
        with lora.use_backend(backend):
            made = optimizer(lora.trainable_parameters(lora.for_training(ours)), lr=5e-3)
            losses[optimizer] = bare_loop(ours, made)
        ended[optimizer] = torch.cat([(v - start[name]).flatten() for name, v in tensors_of(ours).items()])
        if optimizer is eight_bit:
            assert {state["state1"].dtype for state in made.state.values()} == {torch.uint8}
    scale = float(ended[plain].norm())
    # Eight steps, each with a rounding or ten of its own: 80 · 2**-24.
    assert float((ended[fused] - ended[plain]).norm()) <= 80 * 2.0**-24 * scale
    assert float((ended[eight_bit] - ended[plain]).norm()) <= 0.1 * scale  # nine tenths of the way are the same
    assert all(values[-1] < values[0] for values in losses.values())


# ---- LoRA+


def groups_by_rate(groups: list[dict[str, Any]], names: dict[int, str]) -> dict[float, set[str]]:
    found: dict[float, set[str]] = {}
    for group in groups:
        found.setdefault(group["lr"], set()).update(names[id(p)] for p in group["params"])
    return {rate: members for rate, members in found.items() if members}


def plain_name(name: str) -> str:
    """One name for a parameter of PEFT's model and of ours."""
    name = (
        name.removeprefix("base_model.model.")
        .replace("lora_embedding_", "lora_")
        .replace("_magnitude_vector", "_magnitude")
    )
    name = name.replace(".modules_to_save.", ".copies.")
    return name.removesuffix(".weight") if "lora_" in name else name


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head", "model.norm"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj"], "bias": "lora_only"},
    ],
    ids=["plain", "embedding", "dora", "bias"],
)
def test_loraplus_groups_are_peft_s(options):
    from peft.optimizers import create_loraplus_optimizer

    biased = functools.partial(tiny_llama, attention_bias=True)
    theirs = peft.get_peft_model(biased(), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    ours = lora.inject(biased(), LoRAConfig(r=4, **options))
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=8.0, loraplus_lr_embedding=1e-5
    )
    names = {id(p): plain_name(name) for name, p in theirs.named_parameters()}
    expected = groups_by_rate(optimizer.param_groups, names)
    groups = lora.loraplus_groups(ours, lr=1e-4, ratio=8.0, embedding_lr=1e-5)
    found = groups_by_rate(groups, {id(p): plain_name(name) for name, p in ours.named_parameters()})
    assert {rate: {n.replace(".base_layer", "") for n in members} for rate, members in found.items()} == {
        rate: {n.replace(".base_layer", "") for n in members} for rate, members in expected.items()
    }
    assert sum(len(group["params"]) for group in groups) == len(lora.trainable_parameters(ours))


@both_backends
def test_loraplus_trains_as_with_peft(backend, tmp_path):
    """Through Trainer: SGD moves B by sixteen times the rate of A."""
    from peft.optimizers import create_loraplus_optimizer

    theirs, ours = pair(tmp_path)
    start = start_of(theirs)
    made = create_loraplus_optimizer(theirs, torch.optim.SGD, lr=0.05, loraplus_lr_ratio=16.0)
    with_trainer(theirs, tmp_path, optimizers=(made, None))
    with lora.use_backend(backend):
        lora.for_training(ours)
        with_trainer(ours, tmp_path, optimizers=(torch.optim.SGD(lora.loraplus_groups(ours, lr=0.05)), None))
    assert_same_training(ours, theirs, start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": math.nan}, "lr is nan, expected a finite number of at least 0"),
        ({"lr": 1e-4, "ratio": 0.5}, r"ratio is 0\.5, expected a finite number of at least 1"),
        ({"lr": 1e-4, "embedding_lr": -1.0}, r"embedding_lr is -1\.0"),
        ({"lr": "1e-4"}, "lr is '1e-4'"),
    ],
)
def test_loraplus_refuses_what_is_no_rate(options, message):
    model = lora.inject(base(), LoRAConfig(**CONFIG))
    with pytest.raises(LoRAError, match=message):
        lora.loraplus_groups(model, **options)


def test_loraplus_decays_matrices_only_and_needs_something_to_train():
    model = lora.inject(tiny_llama(attention_bias=True), LoRAConfig(r=2, target_modules=["q_proj"], bias="all"))
    groups = {group["name"]: group for group in lora.loraplus_groups(model, lr=1e-4, weight_decay=0.1)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {"A": 0.1, "B": 0.1, "vectors": 0.0}
    assert groups["B"]["lr"] == pytest.approx(16e-4)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(LoRAError, match="nothing trains in this LlamaForCausalLM"):
        lora.loraplus_groups(model, lr=1e-4)
