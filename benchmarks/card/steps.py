"""Training steps of the 8B model: ours and PEFT's in turn on the same weights, then ours in NF4."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import lora
from benchmarks.card import model as models
from benchmarks.card.cases import Session
from benchmarks.card.checks import limit_of, relative_error
from benchmarks.card.peers import peer
from benchmarks.card.rows import NOT_RUN, NOT_THERE, WRONG, Row
from benchmarks.card.timing import attempt, free_memory
from lora.layers import adapter_layers

SEQUENCES = 4
ROUNDS, WARM, TIMED = 2, 1, 3  # rounds of ours and PEFT in turn; steps in each
Results = dict[str, Tensor]  # of one step: the loss, and gradients by path


@dataclass
class Steps:
    """The model and what was measured on it so far."""

    session: Session
    model: Any
    base_bytes: int | None
    N: int
    kind: str  # "bf16" or "nf4"
    samples: dict[tuple[str, int], list[float]] = field(default_factory=dict)  # (variant, sequences) -> seconds
    peaks: dict[tuple[str, int], int] = field(default_factory=dict)
    stopped: set[tuple[str, int]] = field(default_factory=set)  # out of memory, or failed

    def row(self, variant: str, sequences: int, **figures: Any) -> Row:
        """A row of this model; flops are those of the step, recomputation not counted."""
        s = self.session.shapes
        flops = models.step_flops(s, self.N, sequences, s.sequence)
        shape, tokens = f"{sequences} x {s.sequence}", sequences * s.sequence
        base = self.base_bytes
        return Row(
            "steps", f"step {self.kind}", variant, tokens, shape, "bfloat16", flops=flops, base_bytes=base, **figures
        )


def run(session: Session) -> None:
    """Agreement with PEFT, bf16 in rounds, NF4."""
    with lora.use_backend("fast"):
        model = models.build(session)
        steps = Steps(session, model, allocated(session), models.matrix_parameters(model), "bf16")
        check_agreement(steps)
        rounds = 1 if session.dry else ROUNDS
        for _ in range(rounds):
            ours_round(steps, models.MODES)
            peft_round(steps)
        if session.compile:
            compiled(steps)
        quantised = quantise(steps)
        for _ in range(rounds):
            ours_round(quantised, models.MODES)
        reason = peer("bitsandbytes")
        reason = reason if isinstance(reason, str) else "its NF4 layers are not timed here"
        session.recorder.add(
            quantised.row("peft", SEQUENCES, note=f"{NOT_THERE}: PEFT's NF4 is bitsandbytes': {reason}")
        )


def quantise(steps: Steps) -> Steps:
    """The same model in NF4, and how long that took."""
    session, start = steps.session, time.perf_counter()
    lora.quantize(steps.model, "nf4")
    synchronize(session)
    seconds = time.perf_counter() - start
    free_memory()
    base = allocated(session)
    session.recorder.add(Row("steps", "quantize", "ours", median_s=seconds, base_bytes=base, note="the whole model"))
    return Steps(session, steps.model, base, steps.N, "nf4")


# ---- one round


def ours_round(steps: Steps, modes: tuple[str, ...]) -> None:
    """Every mode at 4 sequences, and without checkpointing at 1."""
    with models.ours(steps.model, steps.session.shapes.r) as parameters:
        for mode in modes:
            models.set_mode(steps.model, mode)
            timed(steps, f"ours, {mode}", SEQUENCES, steps.model, parameters)
        models.set_mode(steps.model, "none")
        timed(steps, "ours, none", 1, steps.model, parameters)
    free_memory()


def peft_round(steps: Steps) -> None:
    """PEFT with adapters in bfloat16 (its fastest), and as its defaults have it: float32, under autocast."""
    if isinstance(peer("peft"), str):
        steps.session.recorder.add(steps.row("peft, none", SEQUENCES, note=f"{NOT_THERE}: {peer('peft')}"))
        return
    model, autocast = steps.model, torch.autocast(steps.session.device.type, dtype=torch.bfloat16)
    for label, dtype, context in (("peft", torch.bfloat16, nullcontext()), ("peft float32", torch.float32, autocast)):
        with models.peft(model, steps.session.shapes.r, dtype) as (wrapped, parameters), context:
            timed(steps, f"{label}, none", 1, wrapped, parameters)
            timed(steps, f"{label}, none", SEQUENCES, wrapped, parameters)
            if label == "peft":
                models.recompute_blocks(model, True)
                timed(steps, f"{label}, recompute", SEQUENCES, wrapped, parameters)
        free_memory()


def timed(steps: Steps, variant: str, sequences: int, model: Any, parameters: list[Tensor]) -> None:
    """Some steps; the row holds all rounds so far."""
    session, key = steps.session, (variant, sequences)
    if key in steps.stopped:
        return
    if session.seconds_left() < 0:
        if key not in steps.samples:
            session.recorder.add(steps.row(variant, sequences, note=f"{NOT_RUN}: the time was up"))
        return
    outcome = attempt(lambda: train(steps, model, parameters, sequences))
    model.zero_grad(set_to_none=True)
    free_memory()
    if isinstance(outcome, str):
        steps.stopped.add(key)
        session.recorder.add(steps.row(variant, sequences, note=outcome))
        return
    times, peak, loss = outcome
    samples = steps.samples.setdefault(key, [])
    samples += times
    if peak is not None:
        steps.peaks[key] = max(peak, steps.peaks.get(key, 0))
    session.recorder.add(
        steps.row(
            variant, sequences, median_s=statistics.median(samples), low_s=min(samples), high_s=max(samples),
            peak_bytes=steps.peaks.get(key), note=f"{len(samples)} steps; loss {loss:.3f}",
        )
    )  # fmt: skip


def train(steps: Steps, model: Any, parameters: list[Tensor], sequences: int) -> tuple[list[float], int | None, float]:
    """Seconds of each timed step, the peak above the model's own bytes, and the last loss."""
    session = steps.session
    cuda = session.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=cuda)
    ids = token_ids(session, sequences, session.shapes.sequence)
    times, loss = [], math.nan
    for number in range(WARM + TIMED):
        if number == WARM and cuda:
            torch.cuda.reset_peak_memory_stats(session.device)
        synchronize(session)
        start = time.perf_counter()
        result = model(input_ids=ids, labels=ids).loss
        result.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(session)
        if number >= WARM:
            times.append(time.perf_counter() - start)
        loss = float(result.detach())
        del result
    if not math.isfinite(loss):
        raise ArithmeticError(f"the loss became {loss}")
    peak = torch.cuda.max_memory_allocated(session.device) - (steps.base_bytes or 0) if cuda else None
    return times, peak, loss


def token_ids(session: Session, sequences: int, length: int) -> Tensor:
    """Random tokens."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(session.shapes.vocab, (sequences, length), generator=generator).to(session.device)


def synchronize(session: Session) -> None:
    """Waits for the device."""
    if session.device.type == "cuda":
        torch.cuda.synchronize(session.device)


def allocated(session: Session) -> int | None:
    """Bytes in use on the device."""
    return torch.cuda.memory_allocated(session.device) if session.device.type == "cuda" else None


def compiled(steps: Steps) -> None:
    """Ours without checkpointing, each layer compiled by torch.compile."""
    layers = steps.model.model.layers
    with models.ours(steps.model, steps.session.shapes.r) as parameters:
        for layer in layers:
            layer.compile()
        timed(steps, "ours, none, torch.compile", SEQUENCES, steps.model, parameters)
        for layer in layers:
            layer._compiled_call_impl = None
    free_memory()


# ---- agreement with PEFT


def check_agreement(steps: Steps) -> None:
    """One step of ours and of PEFT's from the same A and B, both against PEFT's in float32 throughout.

    The loss and every adapter's gradients: our error is at most twice PEFT's, and a few roundings of the result.
    """
    session, model, r = steps.session, steps.model, steps.session.shapes.r
    if isinstance(peer("peft"), str):
        session.recorder.add(Row("check", "step against PEFT", "ours", note=f"{NOT_THERE}: {peer('peft')}"))
        return
    with models.ours(model, r):
        found = one_step(session, model, ours_factors)
    with models.peft(model, r, torch.bfloat16) as (wrapped, _):
        theirs = one_step(session, wrapped, peft_factors)
    with models.in_float32(model, session.device), models.peft(model, r, torch.float32) as (wrapped, _):
        models.recompute_blocks(model, True)
        truth = one_step(session, wrapped, peft_factors)
    free_memory()
    session.recorder.add(
        Row("check", "step against PEFT", "ours", session.shapes.sequence, note=verdict(found, theirs, truth))
    )


def verdict(found: Results, theirs: Results, truth: Results) -> str:
    """The errors in words, beginning with WRONG if one is too large."""
    if not found.keys() == theirs.keys() == truth.keys():
        return f"{WRONG}: {len(found)} results, {len(theirs)} and {len(truth)} of PEFT"
    errors = {name: (relative_error(found[name], y), relative_error(theirs[name], y)) for name, y in truth.items()}
    roundings = limit_of(torch.bfloat16)
    shares = {name: ours / (2 * peft + roundings) for name, (ours, peft) in errors.items()}
    worst = max(shares, key=shares.__getitem__)
    largest = [max(pair[i] for pair in errors.values()) for i in range(2)]
    text = (
        f"loss {float(found['loss']):.5f}, PEFT {float(theirs['loss']):.5f}, float32 {float(truth['loss']):.5f}; "
        f"largest error of {len(errors) - 1} gradients {largest[0]:.1e}, PEFT {largest[1]:.1e}; "
        f"at most {shares[worst]:.2f} of the limit, 2 x PEFT's + {roundings:.1e} ({worst})"
    )
    return text if shares[worst] <= 1 else f"{WRONG}: {text}"


def one_step(session: Session, model: Any, factors: Callable[[Any], dict[str, Tensor]]) -> Results:
    """The loss of one sequence, and the gradient of each A and B by its path."""
    ids = token_ids(session, 1, session.shapes.sequence)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    results = {name: factor.grad for name, factor in factors(model).items() if factor.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **results}


def ours_factors(model: Any) -> dict[str, Tensor]:
    """A and B by path."""
    layers = adapter_layers(model)
    return {
        f"{path}.{side}": getattr(layer, side)["default"] for path, layer in layers for side in ("lora_A", "lora_B")
    }


def peft_factors(wrapped: Any) -> dict[str, Tensor]:
    """A and B by the path in the base model."""
    layers = [(path, layer) for path, layer in wrapped.named_modules() if len(getattr(layer, "lora_A", ()))]
    return {
        f"{path.removeprefix('base_model.model.')}.{side}": getattr(layer, side)["default"].weight
        for path, layer in layers
        for side in ("lora_A", "lora_B")
    }
