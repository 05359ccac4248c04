"""What a finished run leaves beside its checkpoints: the adapter, the samples, the plot, and last result.json.

Each of them is there whole or not at all, and the old one until then (`lora.train.durable`). result.json is written
when all the others are on the disk: where it is, the run is finished. A run that ends in between is completed by
`--resume`, from the last checkpoint, with the same results.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from lora import adapter_io
from lora.adapter_io import Gathered
from lora.train.durable import replace_file, replaced_directory

ADAPTER, METRICS, PLOT, RESULT = "adapter", "metrics.jsonl", "loss.png", "result.json"
SAMPLES = ("samples.md", "samples.json")


@dataclass(frozen=True)
class Sample:
    """One prompt, answered twice; `expected` is what the data has, if anything."""

    prompt: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class TrainResult:
    """A finished run in numbers; losses in nats a token, None where nothing was held out."""

    output: Path
    adapter: Path
    steps: int
    loss_before: float | None
    loss_after: float | None
    held_out_examples: int
    held_out_tokens: int
    train_examples: int
    tokens: int  # read in training, prompts included, padding not
    tokens_learnt: int  # of them, those with a loss
    seconds: float  # in training steps and evaluations between them, this session
    tokens_per_second: float
    backend: str
    trainable: int
    parameters: int
    peak_memory: int  # bytes
    samples: tuple[Sample, ...]
    changes: tuple[str, ...] = ()  # of settings, where a resumed run was allowed some

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        values = asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def write_adapter(adapter: Gathered, output: Path) -> None:
    """The trained adapter, in PEFT's format: both files of it or none."""
    with replaced_directory(output / ADAPTER) as folder:
        adapter_io.write_adapter(adapter, folder)


def write_samples(samples: Sequence[Sample], output: Path) -> None:
    """samples.json, and samples.md to read."""
    parts = ["# The same prompts, before and after training\n"]
    for number, sample in enumerate(samples, start=1):
        expected = f"\n**In the data:** {sample.expected}\n" if sample.expected else ""
        answers = f"**Before:** {sample.before}\n\n**After:** {sample.after}\n{expected}"
        parts.append(f"## {number}\n\n```text\n{sample.prompt}\n```\n\n{answers}")
    replace_file(output / SAMPLES[0], "\n".join(parts).encode())
    replace_file(output / SAMPLES[1], json.dumps([asdict(s) for s in samples], indent=1).encode())


def write_plot(records: Sequence[dict[str, Any]], title: str, output: Path) -> None:
    """The records of metrics.jsonl, drawn."""
    from lora.train.plot import plot_loss

    drawn = BytesIO()
    plot_loss(records, drawn, title)
    replace_file(output / PLOT, drawn.getvalue())


def write_result(result: TrainResult, output: Path) -> None:
    """result.json: the run in numbers, and the sign that it is finished."""
    replace_file(output / RESULT, json.dumps(result.to_dict(), indent=1).encode())
