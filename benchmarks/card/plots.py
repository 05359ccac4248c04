"""Three drawings: operations over their floors, tokens a second, memory."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from benchmarks.card.goals import GIB, Rows, seconds
from benchmarks.card.rows import Row

COLOURS = {"ours": "#2f5d9b", "torch": "#b8c4d6", "peft": "#d1495b", "liger": "#e2a13c"}
PALE, GRID = "#8a8f98", "#e6e6e6"


def draw_all(rows: Rows, directory: Path, card: str) -> list[str]:
    """Draws what there are rows for; returns the names of the files."""
    drawn = []
    for name, draw in (("ops", draw_ops), ("steps", draw_steps), ("memory", draw_memory)):
        figure = draw(rows)
        if figure is not None:
            figure.savefig(directory / f"{card}_{name}.png")
            drawn.append(f"{card}_{name}.png")
    return drawn


def draw_losses(path: Path, directory: Path, card: str) -> str:
    """The losses of both backends, and how far they are apart; returns the file's name."""
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    figure, axes = new_figure(5)
    apart = axes.twinx()
    for dtype, colour in (("float32", COLOURS["ours"]), ("bfloat16", COLOURS["peft"])):
        chosen = [line for line in lines if line["dtype"] == dtype]
        steps = [int(line["step"]) for line in chosen]
        curves = {name: [float(line[name]) for line in chosen] for name in ("reference", "fast", "control")}
        axes.plot(steps, curves["reference"], color=colour, alpha=0.35, linewidth=5, label=f"{dtype}, reference")
        axes.plot(steps, curves["fast"], color=colour, linewidth=1.3, label=f"{dtype}, fast")
        for name, style in (("fast", "-"), ("control", ":")):
            distance = [abs(a - b) for a, b in zip(curves[name], curves["reference"], strict=True)]
            apart.semilogy(steps, distance, style, color=colour, linewidth=0.9, alpha=0.7)
    axes.set(xlabel="step", ylabel="loss")
    apart.set_ylabel("apart from the reference: fast solid, control dotted")
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(directory / f"{card}_losses.png")
    return f"{card}_losses.png"


def new_figure(height: float) -> tuple[Any, Any]:
    """A figure without a display, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_ops(rows: Rows) -> Any:
    """How many times its floor each operation takes, in each way, at the most tokens; forms of one product left out."""
    floors = [row for row in rows.all if (row.part, row.variant) == ("ops", "floor") and row.name != "forms"]
    cases = [row for row in floors if row.median_s and row.tokens == rows.most_tokens("ops", row.name)]
    if not cases:
        return None
    figure, axes = new_figure(1.5 + 0.55 * len(cases))
    width = 0.8 / len(COLOURS)
    for number, (variant, colour) in enumerate(COLOURS.items()):
        found = [(place, rows.beside(floor, variant), floor) for place, floor in enumerate(cases)]
        bars = [(place + number * width, seconds(row) / seconds(floor)) for place, row, floor in found if row]
        if bars:
            axes.barh(*zip(*bars, strict=True), height=width, color=colour, label=variant)
    axes.set_yticks([place + 0.3 for place in range(len(cases))], [label(row) for row in cases], fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xscale("log")
    axes.axvline(1, color=PALE, linewidth=1)
    axes.set_xlabel(
        "time over the floor (the larger of bytes / bandwidth and FLOPs / rate, as measured); 1 is the limit"
    )
    axes.legend(frameon=False, loc="lower right")
    return figure


def label(row: Row) -> str:
    """A case in a few words."""
    return f"{row.name}, {row.shape}" + (f", {row.tokens:,} tokens" if row.tokens else "")


def steps_of(rows: Rows) -> list[Row]:
    """The measured steps of the most tokens."""
    return [
        row
        for row in rows.all
        if row.part == "steps" and row.median_s and row.tokens and row.tokens == rows.most_tokens("steps", row.name)
    ]


def step_label(row: Row) -> str:
    """bf16 or nf4, and how."""
    return f"{row.name.removeprefix('step ')}: {row.variant}"


def draw_steps(rows: Rows) -> Any:
    """Tokens a second of every kind of step."""
    found = steps_of(rows)
    if not found:
        return None
    figure, axes = new_figure(1 + 0.4 * len(found))
    speeds = [row.tokens / seconds(row) for row in found]
    colours = [COLOURS["peft"] if row.variant.startswith("peft") else COLOURS["ours"] for row in found]
    axes.barh([step_label(row) for row in found], speeds, color=colours)
    for place, speed in enumerate(speeds):
        axes.annotate(f" {speed:,.0f}", (speed, place), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"tokens a second, {found[0].shape} tokens a step")
    return figure


def draw_memory(rows: Rows) -> Any:
    """The model, and what a step takes on top of it."""
    found = [row for row in steps_of(rows) if row.peak_bytes is not None and row.base_bytes is not None]
    if not found:
        return None
    figure, axes = new_figure(1 + 0.4 * len(found))
    labels = [step_label(row) for row in found]
    base = [(row.base_bytes or 0) / GIB for row in found]
    above = [(row.peak_bytes or 0) / GIB for row in found]
    axes.barh(labels, base, color=COLOURS["torch"], label="the model")
    axes.barh(labels, above, left=base, color=COLOURS["ours"], label="a step, at most")
    for place, (low, high) in enumerate(zip(base, above, strict=True)):
        axes.annotate(f" {low + high:.1f}", (low + high, place), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GiB allocated")
    axes.legend(frameon=False)
    return figure
