"""Memory above the loaded model: adapters, gradients, AdamW's moments, and what two steps have in use at most.

Each figure comes from a process of its own. Two witnesses, as in `benchmarks.planning`: the allocator's own account (the
figure), and the growth of resident memory (in the notes).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import lora
from benchmarks import planning
from benchmarks.card.rows import FAILED, WRONG, Row
from benchmarks.card.timing import attempt, free_memory
from benchmarks.cpu import models, step
from benchmarks.cpu.session import Session

ROOT = Path(__file__).parents[2]
FLOAT, MOMENTS = 4, 2
CATEGORIES = ("adapters", "optimizer", "activations", "rest")


@dataclass(frozen=True)
class Request:
    """What one process measures."""

    who: str  # "ours" or "peft"
    sequences: int
    length: int
    checkpointing: str = "none"
    layers: int | None = None
    adapters: int = 1
    dry: bool = False


@dataclass(frozen=True)
class Answer:
    """Bytes above the loaded model, by category; gradients, and what operations work in, are the rest of the peak.

    Gradients come as activations go, so that the peak has neither of them whole.
    """

    peak: int
    resident: int
    adapters: int
    optimizer: int
    activations: int
    rest: int


def run(session: Session) -> None:
    """Without checkpointing, and with recomputation on a longer batch."""
    sizes = (("none", *step.TINY_SIZE), ("recompute", *step.TINY_SIZE)) if session.dry else (("none", 2, 512), ("recompute", 2, 2048))  # fmt: skip
    for checkpointing, sequences, length in sizes:
        name, shape = f"memory, {checkpointing}", f"{sequences} x {length}"
        outcome = attempt(lambda c=checkpointing: gate(session.dry, c))  # type: ignore[misc]
        if outcome.startswith((WRONG, FAILED)):
            session.recorder.add(Row("memory", name, "ours", sequences * length, shape, note=outcome))
            continue
        session.recorder.add(Row("memory", name, "gate", sequences * length, shape, note=outcome))
        for who in ("ours", "peft"):
            request = Request(who, sequences, length, checkpointing, dry=session.dry)
            record(session, "memory", name, request)
        model = models.base(session.dry)
        least = floor_bytes(model, sequences, length, checkpointing)
        session.recorder.add(
            Row("memory", name, "floor", sequences * length, shape, peak_bytes=least, note="from shapes")
        )


def gate(dry: bool, checkpointing: str) -> str:
    """The loss and gradients under this mode are PEFT's."""
    plain = models.base(dry)
    mine, other = models.ours(models.base(dry), 0.0, checkpointing), models.theirs(plain)
    return step.peft_gate(mine, other)


def record(session: Session, part: str, name: str, request: Request) -> None:
    """The peak, and a row for each category."""
    tokens, shape = request.sequences * request.length, f"{request.sequences} x {request.length}"
    found = attempt(lambda: measured(request))
    if isinstance(found, str):
        session.recorder.add(Row(part, name, request.who, tokens, shape, note=found))
        return
    note = f"resident memory grew by {found.resident / 2**20:,.0f} MiB"
    session.recorder.add(Row(part, name, request.who, tokens, shape, peak_bytes=found.peak, note=note))
    for category in CATEGORIES:
        size = getattr(found, category)
        session.recorder.add(Row(part, name, f"{request.who}: {category}", tokens, shape, peak_bytes=size))


def measured(request: Request) -> Answer:
    """In a process of its own; a dry run, whose figures mean nothing, stays in this one."""
    if request.dry:
        return measure(request)
    command = [sys.executable, "-m", "benchmarks.cpu.memory", json.dumps(asdict(request))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise RuntimeError(f"the process that measures memory ended with {done.returncode}: {last}")
    return Answer(**json.loads(done.stdout.splitlines()[-1]))


def measure(request: Request) -> Answer:
    """In this process."""
    with lora.use_backend("fast"):
        model = models.base(request.dry, request.layers)
        with torch.no_grad():
            for x in (*model.parameters(), *model.buffers()):
                x.sum()  # weights are mapped from files: now they are in memory
        planning.forget_peak()
        before, resting = planning.resident("VmRSS"), planning.resting_bytes(model)
        wrapped, optimizers = prepared(model, request), list[torch.optim.Optimizer]()
        peak, _ = planning.allocated(lambda: optimizers.append(two_steps(wrapped, request)))
        peak += planning.resting_bytes(wrapped) - resting  # adapters, and what preparing the model added
        grown = planning.resident("VmHWM") - before
        activations = saved(wrapped, request)
        adapters = sum(p.nbytes for name, p in wrapped.named_parameters() if "lora_" in name)
        moments = sum(x.nbytes for state in optimizers[0].state.values() for x in state.values())
        rest = peak - adapters - moments - activations
        return Answer(peak, grown, adapters, moments, activations, rest)


def prepared(model: Any, request: Request) -> Any:
    """The model with its adapters, ready to train."""
    if request.who == "peft":
        return models.theirs(model, 0.0, request.checkpointing)
    names = ["default", *(f"a{number}" for number in range(1, request.adapters))]
    return lora.for_training(models.adapted(model, names), checkpointing=request.checkpointing)


def two_steps(model: Any, request: Request) -> torch.optim.Optimizer:
    """An optimizer, and two training steps."""
    ids = models.token_ids(model, request.sequences, request.length)
    optimizer = torch.optim.AdamW(models.trained(model), lr=1e-5)
    for _ in range(2):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def saved(model: Any, request: Request) -> int:
    """What a forward leaves in memory for its backward."""
    ids = models.token_ids(model, request.sequences, request.length)
    held: list[torch.Tensor] = []
    free_memory()
    return planning.allocated(lambda: held.append(model(input_ids=ids, labels=ids, use_cache=False).loss))[1]


def floor_bytes(model: Any, sequences: int, length: int, checkpointing: str) -> int:
    """From shapes: A and B four times (with gradients and moments), and the least that the backward must find.

    A block keeps, by the docstrings of its operations, both norms' inputs (their outputs are made again), q, k, v and
    attention's result, gate and up, and each adapter's u. With recomputation it keeps its input, and one block at a time
    the rest. The loss keeps dx of the head. Rows of single numbers are left out.
    """
    config, tokens = model.config, sequences * length
    sizes = models.frozen_linears(model)
    factors = sum(models.R * (fan_in + fan_out) for fan_in, fan_out in sizes.values())
    hidden, ffn = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    qkv = heads * hidden // config.num_attention_heads
    block = 3 * hidden + qkv + 2 * ffn + len(sizes) // config.num_hidden_layers * models.R
    blocks = config.num_hidden_layers * block
    if checkpointing == "recompute":
        blocks = (config.num_hidden_layers - 1) * hidden + block
    return FLOAT * ((2 + MOMENTS) * factors + tokens * (blocks + 2 * hidden))


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Request(**json.loads(sys.argv[1]))))))
