"""Fine-tuning jobs on TRL's SFTTrainer: `run(TrainConfig(model=..., data=...))` is what `lora train` does.

In place of that job, `AdapterCheckpoints` lets transformers' and TRL's own trainers go on from their checkpoints
(their_trainers.py).

config.py says what can be chosen, data.py reads the examples, job.py goes through the stages, trainer.py tells TRL what
an injected model is, checkpoint.py is what `--resume` goes on from.
"""

from __future__ import annotations

from typing import Any

from lora.train.config import TrainConfig
from lora.train.their_trainers import AdapterCheckpoints

__all__ = ["AdapterCheckpoints", "TrainConfig", "TrainResult", "run"]


def __getattr__(name: str) -> Any:
    """`run` and `TrainResult`, imported when first asked for: they need matplotlib, rich and more."""
    if name in ("TrainResult", "run"):
        from lora.train import job

        return getattr(job, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
