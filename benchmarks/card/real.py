"""A real small model trained on the card by both backends: the losses side by side, in float32 and in bfloat16.

The model is the file that CARD_MODEL names (GGUF, or a directory), else the demo's if its package is installed. The
text is the docstrings of the running Python's standard library. A third run is the control: the reference again, its
batch padded by one column that no label counts, so that its products are of other sizes and round differently.
"""

from __future__ import annotations

import ast
import csv
import os
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora
from benchmarks.card.cases import Session
from benchmarks.card.rows import NOT_RUN, NOT_THERE, Row
from benchmarks.card.steps import synchronize

LOSSES_NAME = "losses.csv"
MODEL = "smollm2-135m-instruct"
STEPS, SEQUENCES, LENGTH = 40, 8, 256
RUNS = {"reference": ("reference", 0), "fast": ("fast", 0), "control": ("reference", 1)}  # backend, columns of padding
NAMES = ("dtype", "step", *RUNS)


def run(session: Session) -> None:
    """Each dtype's three runs, from the same adapters over the same batches."""
    source = os.environ.get("CARD_MODEL", MODEL)
    try:
        model, tokenizer = lora.load(source, dtype="float32")
    except lora.LoRAError as error:
        session.recorder.add(Row("real", "training", "fast", note=f"{NOT_THERE}: {str(error).splitlines()[0][:160]}"))
        return
    sizes = (2, 2, 24) if session.dry else (STEPS, SEQUENCES, LENGTH)
    batches = batches_of(tokenizer, *sizes).to(session.device)
    lora.inject(model.to(session.device), lora.LoRAConfig(r=16, lora_alpha=32))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with open(session.recorder.path.parent / LOSSES_NAME, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(NAMES)
        file.flush()
        for dtype in (torch.float32, torch.bfloat16):
            if session.seconds_left() < 60:
                session.recorder.add(Row("real", "training", "fast", note=f"{NOT_RUN}: no time was left"))
                return
            freeze_as(model, dtype)
            curves = {name: curve(session, model, start, batches, *how) for name, how in RUNS.items()}
            lines = enumerate(zip(*curves.values(), strict=True), 1)
            table.writerows([name_of(dtype), number, *losses] for number, losses in lines)
            file.flush()
            record(session, dtype, curves)


def freeze_as(model: Any, dtype: torch.dtype) -> None:
    """The base in `dtype`, the adapters in float32."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def curve(
    session: Session, model: Any, start: dict[str, Tensor], batches: Tensor, backend: str, padding: int
) -> list[float]:
    """The losses of one run."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.copy_(start[name])
    losses, seconds = [], []
    with lora.use_backend(backend):
        lora.for_training(model)
        optimizer = torch.optim.AdamW(lora.trainable_parameters(model), lr=1e-3)
        for ids in batches:
            synchronize(session)
            begin = time.perf_counter()
            losses.append(step(model, optimizer, ids, padding))
            synchronize(session)
            seconds.append(time.perf_counter() - begin)
        lora.for_inference(model)
    if padding == 0:
        shape = "{} x {}".format(*batches.shape[1:])
        dtype = name_of(next(model.parameters()).dtype)
        median = statistics.median(seconds)
        session.recorder.add(Row(
            "real", f"step {dtype}", backend, batches[0].numel(), shape, dtype, median, min(seconds), max(seconds),
            note=f"{len(losses)} steps: loss {losses[0]:.4f} -> {losses[-1]:.4f}",
        ))  # fmt: skip
    return losses


def step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, padding: int) -> float:
    """One training step; the padding comes behind everything, is attended by nothing and counts for nothing."""
    labels = torch.nn.functional.pad(ids, (0, padding), value=-100)
    loss = model(input_ids=torch.nn.functional.pad(ids, (0, padding)), labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def record(session: Session, dtype: torch.dtype, curves: dict[str, list[float]]) -> None:
    """How far the curves are apart."""
    for name in ("fast", "control"):
        apart = [abs(one - other) for one, other in zip(curves[name], curves["reference"], strict=True)]
        note = f"loss apart from the reference's: first step {apart[0]:.1e}, median {statistics.median(apart):.1e}"
        row = Row("real", f"difference {name_of(dtype)}", name, note=f"{note}, largest {max(apart):.1e}")
        session.recorder.add(row)


def batches_of(tokenizer: Any, steps: int, sequences: int, length: int) -> Tensor:
    """Token ids [steps, sequences, length] of the standard library's docstrings, module by module."""
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text("utf-8", errors="replace"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        ids += tokenizer("\n\n".join(text for text in texts if text)).input_ids
        if len(ids) >= steps * sequences * length:
            break
    return torch.tensor(ids[: steps * sequences * length]).view(steps, sequences, length)


def name_of(dtype: torch.dtype) -> str:
    """ "float32"."""
    return str(dtype).removeprefix("torch.")
