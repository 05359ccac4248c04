"""The goals of the first run on a GPU, each with the figure that was measured for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.card.model import BOTH
from benchmarks.card.rows import Row

GIB = 1 << 30
PEFT_RATIO, SLOWER, NF4_SHARE = 1.7, 0.01, 0.04


class Measured(NamedTuple):
    """A figure in words, and whether the goal is met; None where it was not measured."""

    text: str
    met: bool | None


NOT_MEASURED = Measured("not measured", None)


@dataclass(frozen=True)
class Goal:
    """One line of the list."""

    id: str  # what the causes are filed under
    text: str
    measure: Callable[[Rows], Measured]


class Rows:
    """Rows, found by what they measure."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.all = list(rows)

    def find(self, part: str, name: str, variant: str, tokens: int | None = None) -> list[Row]:
        """Those with a time."""
        wanted = (part, name, variant)
        return [
            row
            for row in self.all
            if (row.part, row.name, row.variant) == wanted and row.median_s and tokens in (None, row.tokens)
        ]

    def one(self, part: str, name: str, variant: str, tokens: int | None = None) -> Row | None:
        """The first of them."""
        return next(iter(self.find(part, name, variant, tokens)), None)

    def beside(self, row: Row, variant: str) -> Row | None:
        """Another way to compute the same."""
        return next(
            (each for each in self.find(row.part, row.name, variant, row.tokens) if each.shape == row.shape), None
        )

    def most_tokens(self, part: str, name: str) -> int:
        """The greatest number of tokens that something was measured at."""
        return max((row.tokens for row in self.all if (row.part, row.name) == (part, name)), default=0)

    @property
    def bandwidth(self) -> float:
        """Bytes a second of the copy; 0 if not measured."""
        return max((row.bytes / row.median_s for row in self.find("ceilings", "copy", "torch") if row.bytes and row.median_s), default=0.0)  # fmt: skip

    @property
    def rate(self) -> float:
        """FLOP/s of the best product; 0 if not measured."""
        return max((row.flops / row.median_s for row in self.find("ceilings", "gemm", "torch") if row.flops and row.median_s), default=0.0)  # fmt: skip

    def step(self, kind: str, variant: str, tokens: int | None = None) -> Row | None:
        """A training step; by default of the most tokens."""
        return self.one("steps", f"step {kind}", variant, tokens or self.most_tokens("steps", f"step {kind}"))


def seconds(row: Row | None) -> float:
    """A row's median; only for rows with one."""
    return row.median_s if row is not None and row.median_s else 0.0


def ratio(over: Row | None, under: Row | None) -> float | None:
    """over / under in time, or None where either is missing."""
    return seconds(over) / seconds(under) if seconds(over) and seconds(under) else None


def linear(rows: Rows) -> Measured:
    """Each shape at the most tokens, without dropout; the worst decides."""
    found = {}
    for row in rows.find("ops", "lora_linear p=0", "ours", rows.most_tokens("ops", "lora_linear p=0")):
        share = ratio(row, rows.beside(row, "frozen"))
        if share is not None:
            found[row.shape] = share
    if not found:
        return NOT_MEASURED
    return Measured(", ".join(f"{share:.3f} ({shape})" for shape, share in found.items()), max(found.values()) <= 1.05)


def dequantise(rows: Rows) -> Measured:
    """Each shape; the worst decides."""
    found = rows.find("ops", "nf4_dequantize", "ours")
    shares = {row.shape: (row.bytes or 0) / seconds(row) / rows.bandwidth for row in found if rows.bandwidth}
    if not shares:
        return NOT_MEASURED
    return Measured(
        ", ".join(f"{share:.0%} ({shape})" for shape, share in shares.items()), min(shares.values()) >= 0.85
    )


def loss(rows: Rows) -> Measured:
    """Time and memory above the inputs, at the most tokens."""
    row = rows.one("ops", "linear_cross_entropy", "ours", rows.most_tokens("ops", "linear_cross_entropy"))
    if row is None:
        return NOT_MEASURED
    memory = "memory not measured" if row.peak_bytes is None else f"{row.peak_bytes / GIB:.2f} GiB above the inputs"
    met = None if row.peak_bytes is None else seconds(row) <= 0.027 and row.peak_bytes <= GIB / 2
    return Measured(f"{1e3 * seconds(row):.1f} ms, {memory}", met)


def tokens_a_second(rows: Rows) -> Measured:
    """bf16, no checkpointing, 4 sequences."""
    row = rows.step("bf16", "ours, none")
    if row is None:
        return NOT_MEASURED
    return Measured(f"{row.tokens / seconds(row):,.0f} tokens/s", row.tokens / seconds(row) >= 17_500)


def nf4_beside_bf16(rows: Rows) -> Measured:
    """Both without checkpointing."""
    slower = ratio(rows.step("nf4", "ours, none"), rows.step("bf16", "ours, none"))
    return NOT_MEASURED if slower is None else Measured(f"{slower - 1:+.1%} time", slower <= 1 + NF4_SHARE)


def nf4_memory(rows: Rows) -> Measured:
    """All that is allocated, the model included."""
    row = rows.step("nf4", f"ours, {BOTH}")
    if row is None or row.peak_bytes is None or row.base_bytes is None:
        return NOT_MEASURED
    total = (row.peak_bytes + row.base_bytes) / GIB
    text = f"{total:.2f} GiB, of which the model {row.base_bytes / GIB:.2f}, at {row.shape} tokens"
    return Measured(text, total <= 7)


def offload(rows: Rows) -> Measured:
    """Against "recompute", which keeps the same tensors on the card; bf16."""
    slower = ratio(rows.step("bf16", "ours, offload"), rows.step("bf16", "ours, recompute"))
    return NOT_MEASURED if slower is None else Measured(f"{slower - 1:+.1%} time", slower <= 1 + SLOWER)


def peft_beside(rows: Rows, row: Row) -> float:
    """Seconds of PEFT's faster kind at the same tokens, checkpointed as `row` is or not; 0 where there is none."""
    mode = "none" if ", none" in row.variant else "recompute"
    theirs = [rows.beside(row, f"{kind}, {mode}") for kind in ("peft", "peft float32")]
    return min((seconds(each) for each in theirs if each is not None), default=0.0)


def beside_peft(rows: Rows) -> Measured:
    """Both without checkpointing, at the most tokens that PEFT has memory for; PEFT's faster kind of adapters."""
    without = ""
    for row in sorted(rows.find("steps", "step bf16", "ours, none"), key=lambda row: -row.tokens):
        theirs = peft_beside(rows, row)
        if theirs:
            faster = theirs / seconds(row)
            return Measured(f"{faster:.2f} times as fast, at {row.shape} tokens{without}", faster >= PEFT_RATIO)
        recomputing = rows.beside(row, "peft, recompute")
        if recomputing is not None:
            without += (
                f"; at {row.shape} PEFT without checkpointing has no figure, and with recomputation takes "
                f"{seconds(recomputing) / seconds(row):.2f} times ours without"
            )
    return NOT_MEASURED


GOALS: Sequence[Goal] = (
    Goal("linear", "LoRA linear, forward and backward: at most 1.05 of the frozen linear's time", linear),
    Goal("dequantise", "NF4 dequantise: at least 85% of the copy's bandwidth", dequantise),
    Goal("loss", "linear cross-entropy, 8,192 tokens, 128,256 vocabulary: at most 27 ms and 0.5 GiB", loss),
    Goal("tokens", "bf16 LoRA, 4 x 2,048 tokens, no checkpointing: at least 17,500 tokens/s", tokens_a_second),
    Goal("nf4_speed", "NF4 within 4% of bf16", nf4_beside_bf16),
    Goal("nf4_memory", "NF4 with selective recomputation and offloading: at most 7 GiB in all", nf4_memory),
    Goal("offload", "offloading at most 1% slower than checkpointing on the card", offload),
    Goal("peft", "a step at least 1.7 times as fast as PEFT's with FlashAttention (torch's SDPA)", beside_peft),
)
