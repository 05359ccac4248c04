"""How a step grows: time and memory with the tokens and with the adapters that are loaded, and the bytes saved a token.

Tokens come as sequences of one length, so that attention's square stays out; a line through the figures is least squares,
and the note of its row has the largest distance of a figure from it. The model is cut to its first blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.card.rows import WRONG, Row
from benchmarks.card.timing import Timing, measure
from benchmarks.cpu import memory, models, step
from benchmarks.cpu.session import CPU, Session
from lora import Projection, fast

LAYERS, LENGTH = 4, 256
TOKENS, ADAPTERS = (256, 512, 1024, 2048, 4096, 8192), (1, 8, 32)
TINY_LENGTH, TINY_TOKENS, TINY_ADAPTERS = 8, (8, 16), (1, 3)
TOKENS_NAME, ADAPTERS_NAME = "growth, tokens", "growth, loaded adapters"


def run(session: Session) -> None:
    """Tokens, adapters, and what the operations save."""
    layers = None if session.dry else LAYERS
    length, tokens, adapters = (TINY_LENGTH, TINY_TOKENS, TINY_ADAPTERS) if session.dry else (LENGTH, TOKENS, ADAPTERS)
    plain = models.base(session.dry, layers)
    outcome = step.peft_gate(models.ours(models.base(session.dry, layers)), models.theirs(plain))
    session.recorder.add(Row("growth", TOKENS_NAME, "gate", note=outcome))
    if not outcome.startswith(WRONG):
        by_tokens(session, tokens, length, layers)
        by_adapters(session, adapters, length, layers)
    for name, features, run_, formula in saving_cases():
        session.recorder.add(saved_row(name, features, run_, formula))


def by_tokens(session: Session, counts: Sequence[int], length: int, layers: int | None) -> None:
    """One model, batches of more and more sequences."""
    model = models.ours(models.base(session.dry, layers))
    batches = {count: models.token_ids(model, count // length, length) for count in counts}
    timings = measure({str(n): step.stepper(model, ids, ids) for n, ids in batches.items()}, CPU, 0, session.rounds)
    record(session, TOKENS_NAME, {n: timings[str(n)] for n in counts}, lambda n: memory.Request("ours", n // length, length, layers=layers, dry=session.dry))  # fmt: skip


def by_adapters(session: Session, counts: Sequence[int], length: int, layers: int | None) -> None:
    """One batch, models with more and more adapters, of which one is active."""
    import lora

    variants = {}
    for count in counts:
        names = [f"a{number}" for number in range(count)]
        model = lora.for_training(models.adapted(models.base(session.dry, layers), names))
        ids = models.token_ids(model, 4, length)
        variants[str(count)] = step.stepper(model, ids, ids)
    timings = measure(variants, CPU, 0, session.rounds)
    record(session, ADAPTERS_NAME, {n: timings[str(n)] for n in counts}, lambda n: memory.Request("ours", 4, length, layers=layers, adapters=n, dry=session.dry))  # fmt: skip


def record(
    session: Session, name: str, timings: dict[int, Timing | str], request: Callable[[int], memory.Request]
) -> None:
    """Time and memory of each size; the adapters' own numbers are not counted: they are what was asked for."""
    for count, timing in timings.items():
        if isinstance(timing, str):
            session.recorder.add(Row("growth", name, "ours", count, note=timing))
            continue
        found = memory.measured(request(count))
        times = {"median_s": timing.median, "low_s": timing.low, "high_s": timing.high}
        peak = found.peak - found.adapters
        session.recorder.add(Row("growth", name, "ours", count, peak_bytes=peak, **times))


def line_through(sizes: Sequence[float], figures: Sequence[float]) -> tuple[float, float, float]:
    """Least squares: intercept, slope, and the largest relative distance of a figure from the line."""
    mean_x, mean_y = sum(sizes) / len(sizes), sum(figures) / len(figures)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(sizes, figures, strict=True)) / sum(
        (x - mean_x) ** 2 for x in sizes
    )
    start = mean_y - slope * mean_x
    off = max(abs(y - start - slope * x) / y for x, y in zip(sizes, figures, strict=True))
    return start, slope, off


# ---- what the docstrings say is saved

Saver = Callable[[int], Any]


def saving_cases() -> list[tuple[str, str, Saver, int]]:
    """Operations at small sizes: name, sizes, what runs on so many tokens, and the numbers a token by the docstring."""
    fan_in, out, ffn, r = 24, 40, 56, 4

    def projection(features: int, rows: int) -> Projection:
        W, A, B = torch.randn(rows, features), torch.randn(r, features), torch.randn(rows, r)
        return Projection(W, None, A.requires_grad_(), B.requires_grad_(), 0.5)

    one, three = projection(fan_in, out), [projection(fan_in, rows) for rows in (out, 16, 16)]
    gate, up, down = projection(fan_in, ffn), projection(fan_in, ffn), projection(ffn, fan_in)

    def x(tokens: int) -> Tensor:
        return torch.randn(tokens, fan_in, requires_grad=True)

    norm = torch.ones(fan_in)
    return [
        ("lora_linear", f"{fan_in} -> {out}", lambda n: fast.lora_linear(x(n), one), fan_in + r),
        ("lora_qkv", f"{fan_in} -> {out}, 16, 16", lambda n: fast.lora_qkv(x(n), *three), fan_in + 3 * r),
        ("lora_mlp", f"{fan_in} -> {ffn}", lambda n: fast.lora_mlp(x(n), gate, up, down, activation="silu"), fan_in + 2 * ffn + 3 * r),
        ("rms_norm", f"{fan_in}", lambda n: fast.rms_norm(x(n), norm, eps=1e-5), fan_in + 1),
    ]  # fmt: skip


def saved_row(name: str, features: str, run_: Saver, numbers: int) -> Row:
    """Bytes saved a token, from two sizes, beside the docstring's."""
    few, many = saved_bytes(run_, 32), saved_bytes(run_, 64)
    found, said = (many - few) / 32, memory.FLOAT * numbers
    agree = "" if found == said else f"{WRONG}: "
    note = f"{agree}{found:g} bytes saved a token, the docstring's arithmetic says {said}"
    return Row("growth", f"saved by {name}", "ours", shape=features, note=note)


def saved_bytes(run_: Saver, tokens: int) -> int:
    """The memory of all that is saved for the backward, each piece once."""
    pieces: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        pieces[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        held = run_(tokens)  # noqa: F841 - what was saved stays in memory, so that no address is used twice
    return sum(pieces.values())
