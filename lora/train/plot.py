"""loss.png: the loss of each step, its running mean, and the held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

TRAIN, MEAN, HELD_OUT, GRID = "#b8c4d6", "#2f5d9b", "#d1495b", "#e6e6e6"
SMOOTHED = 15  # the running mean looks back over this fraction of the run


def running_mean(values: Sequence[float]) -> list[float]:
    """An exponential mean over about a fifteenth of the run, corrected for its start as Adam's is."""
    means, total, weight = [], 0.0, 0.0
    memory = 1 - 1 / max(1.0, len(values) / SMOOTHED)
    for value in values:
        total = memory * total + (1 - memory) * value
        weight = memory * weight + (1 - memory)
        means.append(total / weight)
    return means


def plot_loss(records: Sequence[dict[str, Any]], path: Path | BinaryIO, title: str) -> None:
    """Draws the records of metrics.jsonl as PNG; without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    train = [(record["step"], record["loss"]) for record in records if "loss" in record]
    held_out = [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=TRAIN, linewidth=1, label="training, each step")
        axes.plot(steps, running_mean(losses), color=MEAN, linewidth=2, label="training, running mean")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, color=HELD_OUT, linewidth=2, marker="o", markersize=5, label="held out")
        for step, loss in {held_out[0], held_out[-1]}:
            axes.annotate(
                f"{loss:.2f}", (step, loss), textcoords="offset points", xytext=(0, 9), ha="center", color=HELD_OUT
            )
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token")
    axes.set_title(title, loc="left", fontsize=11)
    axes.margins(x=0.04, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format="png")
