"""What `lora.train.checkpoint` and `lora.train.results` need of a run, without training: made in a millisecond."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import nn

import lora
from lora.train.results import Sample, TrainResult
from lora.train.world import World

RUN: dict[str, Any] = {"settings": {"lr": 0.1, "seed": 0}, "processes": 1, "base": "b", "data": "d", "held_out": None}


@dataclass
class State:
    """As transformers' TrainerState: a dataclass of plain values."""

    global_step: int = 0
    max_steps: int = 9
    log_history: list[dict[str, float]] = field(default_factory=list)


class Tiny(nn.Module):
    """One layer to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def tiny_trainer(seed: int = 0) -> Any:
    """A stand-in for AdapterTrainer at step 0."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    model = lora.inject(Tiny(), lora.LoRAConfig(r=2, target_modules=["proj"], init_lora_weights=False))
    optimizer = torch.optim.AdamW(lora.trainable_parameters(model), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    sums = {"_tr_loss": torch.tensor(0.5), "_total_loss_scalar": 1.0, "_globalstep_last_logged": 0}
    return SimpleNamespace(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        state=State(),
        world=World(),
        run={**RUN, "before": {"loss": 2.0, "tokens": 3}, "changes": []},
        tokens_read=0,
        tokens_learnt=0,
        **sums,
    )


def train_step(trainer: Any) -> None:
    """One step on random numbers."""
    trainer.model(torch.randn(3, 6)).square().sum().backward()
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    trainer.optimizer.zero_grad()
    trainer.state.global_step += 1


def tiny_result(output: Path, note: str) -> TrainResult:
    """A result with one sample that says `note`."""
    numbers: dict[str, Any] = {"steps": 3, "loss_before": 2.0, "loss_after": 1.0, "held_out_examples": 1}
    numbers |= {"held_out_tokens": 3, "train_examples": 4, "tokens": 9, "tokens_learnt": 5, "seconds": 0.1}
    numbers |= {"tokens_per_second": 90.0, "backend": "reference", "trainable": 22, "parameters": 57, "peak_memory": 1}
    return TrainResult(output, output / "adapter", samples=(Sample("p", "e", "b", note),), **numbers)
