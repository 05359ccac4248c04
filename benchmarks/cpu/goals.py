"""The goals of the two-core CPU, each a ratio of two figures or a figure alone."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.card.goals import NOT_MEASURED, Measured, Rows
from benchmarks.card.rows import FAILED, WRONG, Row
from benchmarks.cpu.growth import ADAPTERS_NAME, TOKENS_NAME, line_through

NOISE = 0.05  # two figures that should be equal may differ by so much
LINEAR, FLAT = 0.10, 0.05  # distance from the line; growth from the fewest adapters to the most


@dataclass(frozen=True)
class Goal:
    """`column` of `top` over that of `bottom`, or `top` alone in seconds, against `limit`."""

    text: str
    part: str
    name: str
    top: str
    bottom: str
    limit: float
    at_least: bool = False
    shape: str = ""  # of the row, where a name has several
    column: str = "median_s"

    def measure(self, rows: Rows) -> Measured:
        """The ratio; not measured where a row is missing or wrong."""
        found = {row.variant: row for row in rows.all if self.means(row)}
        wrong = next((row for row in found.values() if row.note.startswith((WRONG, FAILED))), None)
        if wrong is not None:
            return Measured(f"no figure: {wrong.note}", False)
        top = value_of(found.get(self.top), self.column)
        bottom = value_of(found.get(self.bottom), self.column) if self.bottom else 1.0
        if not top or not bottom:
            return NOT_MEASURED
        figure = top / bottom
        return Measured(
            f"{figure:.2f}{'' if self.bottom else ' s'}",
            figure >= self.limit if self.at_least else figure <= self.limit,
        )

    def means(self, row: Row) -> bool:
        return (row.part, row.name) == (self.part, self.name) and self.shape in ("", row.shape)


def value_of(row: Row | None, column: str) -> float | None:
    """A cell of a row that may not be there."""
    return None if row is None else getattr(row, column)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Growth:
    """Linear in the tokens, or flat in the adapters."""

    text: str
    name: str
    column: str

    def measure(self, rows: Rows) -> Measured:
        """The line through the figures, or the most over the least."""
        found = [row for row in rows.all if row.name == self.name and row.variant == "ours"]
        pairs = [(row.tokens, value) for row in found if (value := value_of(row, self.column))]
        if len(pairs) < 2:
            return NOT_MEASURED
        sizes, figures = zip(*pairs, strict=True)
        if self.name == TOKENS_NAME:
            off = line_through(sizes, figures)[2]
            return Measured(f"at most {off:.1%} off a line", off <= LINEAR)
        grown = figures[-1] / figures[0] - 1
        return Measured(f"{grown:+.1%} from {sizes[0]} to {sizes[-1]}", grown <= FLAT)


@dataclass(frozen=True)
class Saved:
    """What the operations save is what their docstrings say."""

    text: str = "bytes saved a token, against the docstrings' arithmetic (exactly)"

    def measure(self, rows: Rows) -> Measured:
        """How many agree."""
        found = [row for row in rows.all if row.name.startswith("saved by ")]
        right = [row for row in found if not row.note.startswith(WRONG)]
        return Measured(f"{len(right)} of {len(found)} agree", len(right) == len(found)) if found else NOT_MEASURED


GOALS: tuple[Goal | Growth | Saved, ...] = (
    Goal("step of 2 × 512 tokens, PEFT's time over ours (≥ 1.30)", "step", "step", "peft", "ours", 1.30, True),
    Goal("the same with dropout 0.1 (≥ 1.80)", "step", "step, dropout 0.1", "peft", "ours", 1.80, True),
    Goal("the same with 75% of the labels −100 (≥ 1.5)", "step", "step, 75% ignored", "peft", "ours", 1.5, True),
    Goal("memory above the loaded model, no checkpointing, over PEFT's (≤ 0.35)", "memory", "memory, none", "ours", "peft", 0.35, column="peak_bytes"),
    Goal("the same with recomputation, 2 × 2048 tokens (≤ 0.35)", "memory", "memory, recompute", "ours", "peft", 0.35, column="peak_bytes"),
    Goal("`lora_linear` 576 → 1536 over the frozen layer (≤ 1.20)", "linear", "lora_linear", "ours", "frozen", 1.20, shape="576 -> 1536"),
    Goal("`lora_linear` 2048 → 2048 over the frozen layer (≤ 1.20)", "linear", "lora_linear", "ours", "frozen", 1.20, shape="2048 -> 2048"),
    Goal("step on an NF4 base over our own on float32 (≤ 1.15)", "step", "step, NF4", "ours", "ours, float32 base", 1.15),
    Goal("NF4 decoding 1536 × 576 over bitsandbytes' (≤ 1.5)", "nf4", "nf4_dequantize", "ours", "bitsandbytes", 1.5, shape="1536 x 576"),
    Goal("NF4 decoding 2048 × 2048 over bitsandbytes' (≤ 1.5)", "nf4", "nf4_dequantize", "ours", "bitsandbytes", 1.5, shape="2048 x 2048"),
    Goal(f"generation, merged over base (equal, ≤ {1 + NOISE:.2f})", "generate", "generate, merged", "ours", "base", 1 + NOISE),
    Goal("generation, 8 rows with 8 adapters over base (≤ 1.25)", "generate", "generate, an adapter a row", "ours", "base", 1.25),
    Goal("`inject`, 8B on the meta device (≤ 2 s)", "inject", "inject, 8B, meta", "ours", "", 2.0),
    Goal("`inject`, SmolLM2-135M (≤ 0.3 s)", "inject", "inject", "ours", "", 0.3),
    Growth(f"time linear in tokens (≤ {LINEAR:.0%} off)", TOKENS_NAME, "median_s"),
    Growth(f"memory linear in tokens (≤ {LINEAR:.0%} off)", TOKENS_NAME, "peak_bytes"),
    Growth(f"time flat in loaded adapters (≤ {FLAT:.0%} more)", ADAPTERS_NAME, "median_s"),
    Growth(f"memory flat in loaded adapters (≤ {FLAT:.0%} more)", ADAPTERS_NAME, "peak_bytes"),
    Saved(),
)  # fmt: skip
