"""Four drawings: bars against peers, time over the floor, memory by category, growth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.card.goals import Rows, seconds
from benchmarks.card.plots import COLOURS, PALE, new_figure
from benchmarks.card.rows import Row
from benchmarks.cpu.growth import TOKENS_NAME, line_through
from benchmarks.cpu.memory import CATEGORIES

MIB = 1 << 20
SHADES = ("#2f5d9b", "#9bbce0", "#e2a13c", "#b8c4d6")


def draw_all(rows: Rows, directory: Path) -> list[str]:
    """Draws what there are rows for; returns the names of the files."""
    drawn = []
    for name, draw in (
        ("peers", draw_peers),
        ("floors", draw_floors),
        ("memory", draw_memory),
        ("growth", draw_growth),
    ):
        figure = draw(rows)
        if figure is not None:
            figure.savefig(directory / f"cpu_{name}.png")
            drawn.append(f"cpu_{name}.png")
    return drawn


def measured(rows: Rows) -> list[Row]:
    """Ours, timed, one row a trial."""
    return [row for row in rows.all if row.variant == "ours" and row.median_s and row.part != "growth"]


def label(row: Row) -> str:
    """A trial in a few words."""
    return f"{row.name}, {row.shape}" if row.shape else row.name


def bars(cases: list[Row], values: list[float], axes: Any, colours: list[str]) -> None:
    """One bar a trial, its value at its end."""
    axes.barh([label(row) for row in cases], values, color=colours)
    for place, value in enumerate(values):
        axes.annotate(f" {value:.2f}", (value, place), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color=PALE, linewidth=1)
    axes.margins(x=0.1)


def draw_peers(rows: Rows) -> Any:
    """How many times as long as ours every other way takes."""
    pairs = [(row, other) for row in measured(rows) for other in rows.all if is_peer(row, other)]
    if not pairs:
        return None
    figure, axes = new_figure(1 + 0.35 * len(pairs))
    values = [seconds(other) / seconds(row) for row, other in pairs]
    colours = [COLOURS["peft"] if other.variant == "peft" else COLOURS["torch"] for _, other in pairs]
    names = [f"{label(row)} [{other.variant}]" for row, other in pairs]
    axes.barh(names, values, color=colours)
    for place, value in enumerate(values):
        axes.annotate(f" {value:.2f}", (value, place), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color=PALE, linewidth=1)
    axes.margins(x=0.1)
    axes.set_xlabel("its time over ours: right of the line, ours is faster")
    return figure


def is_peer(row: Row, other: Row) -> bool:
    """Another way to do the same, with a time."""
    same = (row.part, row.name, row.shape, row.tokens) == (other.part, other.name, other.shape, other.tokens)
    return same and other.variant not in ("ours", "floor") and bool(other.median_s)


def draw_floors(rows: Rows) -> Any:
    """How many times its floor each takes."""
    cases = [row for row in measured(rows) if rows.beside(row, "floor")]
    if not cases:
        return None
    figure, axes = new_figure(1 + 0.4 * len(cases))
    values = [seconds(row) / seconds(floor) for row in cases if (floor := rows.beside(row, "floor"))]
    bars(cases, values, axes, [COLOURS["ours"]] * len(cases))
    axes.set_xscale("log")
    axes.set_xlabel("our time over the floor's, which was measured in the same run")
    return figure


def draw_memory(rows: Rows) -> Any:
    """Ours and PEFT's above the loaded model, by category."""
    cases = [row for row in rows.all if row.part == "memory" and row.variant in ("ours", "peft") and row.peak_bytes]
    if not cases:
        return None
    figure, axes = new_figure(1 + 0.5 * len(cases))
    names = [f"{label(row)} [{row.variant}]" for row in cases]
    left = [0.0] * len(cases)
    for category, colour in zip(CATEGORIES, SHADES, strict=True):
        sizes = [category_bytes(rows, row, category) / MIB for row in cases]
        axes.barh(names, sizes, left=left, color=colour, label=category)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for place, row in enumerate(cases):
        axes.annotate(f" {(row.peak_bytes or 0) / MIB:,.1f}", (max(left[place], 0), place), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("MiB above the loaded model")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(CATEGORIES))
    return figure


def category_bytes(rows: Rows, row: Row, category: str) -> int:
    """One part of a row's peak."""
    wanted = (row.name, row.shape, f"{row.variant}: {category}")
    return next((each.peak_bytes or 0 for each in rows.all if (each.name, each.shape, each.variant) == wanted), 0)


def draw_growth(rows: Rows) -> Any:
    """Time and memory by tokens, with the lines through them."""
    found = [row for row in rows.all if (row.name, row.variant) == (TOKENS_NAME, "ours") and row.median_s]
    if len(found) < 2:
        return None
    figure, axes = new_figure(4)
    other = axes.twinx()
    sizes = [row.tokens for row in found]
    for on, figures, colour, name in (
        (axes, [seconds(row) for row in found], COLOURS["ours"], "time, s"),
        (other, [(row.peak_bytes or 0) / MIB for row in found], COLOURS["peft"], "memory above the model, MiB"),
    ):
        start, slope, _ = line_through(sizes, figures)
        on.plot(sizes, figures, "o", color=colour)
        on.plot(sizes, [start + slope * size for size in sizes], color=colour, linewidth=1)
        on.set_ylabel(name, color=colour)
        on.set_ylim(bottom=0)
    axes.set_xlabel("tokens a step")
    return figure
