"""Optimizers people bring: fused, 8-bit, and LoRA+ with its two rates, beside PEFT's groups and training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from test_their_loops import (
    CONFIG,
    IDS,
    TOKENIZER,
    _quiet,  # noqa: F401 - a fixture for every test here, too
    assert_same_training,
    bare_loop,
    base,
    both_backends,
    losses_of,
    pair,
    start_of,
    tensors_of,
    with_trainer,
)
from tiny import stir, tiny_llama
from torch import Tensor

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


# ---- step for step with PEFT
#
# Adam divides by the size of a gradient, and an 8-bit state is one of 256 codes: a rounding moves small entries far,
# or a state to the next code. So what is as near as it can be is measured: a run of PEFT's that starts one rounding
# beside PEFT's own ends somewhere, and ours, whose products round in another order, may be three times as far.

STEPS = 8
RATE = 5e-3
# Every A and B has 4096 entries: the fewest of which bitsandbytes keeps 8-bit states where nobody asks for more, as
# transformers' Trainer does not.
WIDE = {"r": 32, "lora_alpha": 32, "target_modules": ["q_proj", "o_proj", "down_proj"]}


def wide_base() -> Any:
    vocabulary = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    model = tiny_llama(hidden_size=128, intermediate_size=128, **vocabulary)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4 if parameter.dim() == 2 else 1  # so that gradients reach the first layer
    return model


def wide_peft(beside: bool = False) -> Any:
    """PEFT's model with an adapter that is not at its start; `beside`: its numbers a rounding off, two in three."""
    model = peft.get_peft_model(wide_base(), peft.LoraConfig(task_type="CAUSAL_LM", **WIDE))
    stir(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and beside:
                parameter *= 1 + 2.0**-23 * torch.randint(-1, 2, parameter.shape, generator=generator)
    return model


def wide_ours(directory: Path) -> Any:
    wide_peft().save_pretrained(directory)
    return lora.load_adapter(wide_base(), directory)


def whole(model: Any) -> Tensor:
    return torch.cat([value.flatten().double() for _, value in sorted(tensors_of(model).items())])


class AfterEachStep(transformers.TrainerCallback):
    """Keeps the adapter as it is after each step."""

    def __init__(self) -> None:
        self.adapters: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.adapters.append(whole(model))


Run = tuple[list[float], list[Tensor], Any]  # losses and adapters after each step, the optimizer


def loop_of_ours(make: Callable[..., Any], model: Any, directory: Path) -> Run:
    """A loop of one's own."""
    optimizer, losses, adapters = make([p for p in model.parameters() if p.requires_grad], lr=RATE), [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        adapters.append(whole(model))
    return losses, adapters, optimizer


def loop_of_trainer(optim: str, model: Any, directory: Path) -> Run:
    """transformers' Trainer, which makes the optimizer by its name."""
    kept = AfterEachStep()
    options = {"optim": optim, "learning_rate": RATE, "max_steps": STEPS}
    trainer = with_trainer(model, directory, callbacks=[kept], **options)
    return losses_of(trainer), kept.adapters, trainer.optimizer


def states_of(optimizer: Any) -> set[torch.dtype]:
    """The types of Adam's first moments."""
    return {state.get("state1", state.get("exp_avg")).dtype for state in optimizer.state.values()}


@pytest.mark.parametrize(
    ("loop", "dtype"),
    [
        (functools.partial(loop_of_ours, fused), torch.float32),
        (functools.partial(loop_of_ours, eight_bit), torch.uint8),
        (functools.partial(loop_of_trainer, "adamw_torch_fused"), torch.float32),
        (functools.partial(loop_of_trainer, "adamw_bnb_8bit"), torch.uint8),
    ],
    ids=["fused", "AdamW8bit", "Trainer, adamw_torch_fused", "Trainer, adamw_bnb_8bit"],
)
@both_backends
def test_fused_and_eight_bit_adam_go_step_for_step_with_peft(backend, loop, dtype, tmp_path):
    start = whole(wide_peft())
    losses, expected, optimizer = loop(wide_peft().train(), tmp_path)
    near_losses, near, _ = loop(wide_peft(beside=True).train(), tmp_path)
    with lora.use_backend(backend):
        ours = lora.for_training(wide_ours(tmp_path / "start"))
        assert torch.equal(whole(ours), start)
        found_losses, found, ours_made = loop(ours, tmp_path)
    assert states_of(optimizer) == states_of(ours_made) == {dtype}
    assert len(ours_made.state) == 12 and len(found) == len(expected) == STEPS
    for step, (one, other, third) in enumerate(zip(found, expected, near, strict=True)):
        moved, error, beside = (float((a - b).norm()) for a, b in ((other, start), (one, other), (third, other)))
        assert error <= 3 * beside, step
        assert moved > 100 * 3 * beside, step  # so an optimizer that is 1% another is found
    apart = max(abs(a - b) for a, b in zip(near_losses, losses, strict=True))
    assert found_losses == pytest.approx(losses, rel=4 * 2.0**-24, abs=3 * apart)
    assert losses[-1] < 0.8 * losses[0]


def test_eight_bit_states_are_told_from_wide_ones(tmp_path):
    """The test above would find a run with the other kind of state."""
    _, eight, _ = loop_of_ours(eight_bit, wide_peft().train(), tmp_path)
    _, near, _ = loop_of_ours(eight_bit, wide_peft(beside=True).train(), tmp_path)
    _, wide, _ = loop_of_ours(fused, wide_peft().train(), tmp_path)
    assert float((wide[-1] - eight[-1]).norm()) > 3 * float((near[-1] - eight[-1]).norm())


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
