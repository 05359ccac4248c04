"""What a training run would take, before there is a model: peak memory by category, checkpointing, a step's time.

Memory comes from a step run for its shapes alone (`lora.dry_run`), which the planner of live models reads in the same
way. The largest moment of a step, by category:

    frozen weights   embeddings, head, norms, and linear layers that are not quantised
    experts' weights of a mixture: stacked in one tensor for each layer, all in memory, never quantised
    NF4 weights      codes and scales, 4.127 bits a weight with double quantisation
    adapters, gradients, AdamW's two moments
    kept activations what the forward leaves for the backward, under the checkpointing that was chosen
    working memory   what comes and goes: one block's second run and its gradients, the loss's chunk, the workspace
                     that NF4 weights are decoded into

A block's gradients are there once it has run backward; with accumulation those of the batch before are there all along.
The plan itself is made for the latter. The CUDA context and what the allocator cannot use are in no category: they are
the reserve, which is taken off the card's memory first.

Time is the largest of three, a roofline with the host as a third roof:

    arithmetic   FLOPs of the step, what checkpointing runs again included / (the card's rate · STEP_SHARE)
    memory       (weights once a pass + kept activations written and read + AdamW) / (bandwidth · COPY_SHARE)
    host         blocks · HOST_SECONDS

Of a mixture, the arithmetic is that of the experts that each token is sent to, and the weights are those of all: with
thousands of tokens every expert gets some. Experts that are adapted are made anew (W' = W + scaling · B A): a forward
reads W and writes W' beside what the product reads, a backward writes the gradient of W' and reads it twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from lora import dispatch, models
from lora.config import LoRAConfig
from lora.dry_run import Rehearsal, rehearse
from lora.errors import LoRAError, did_you_mean
from lora.experts import experts_of
from lora.gpus import COPY_SHARE, HOST_SECONDS, STEP_SHARE, Card, card_named
from lora.meter import meter
from lora.planner import Plan, largest_moment, planned, readable
from lora.reference.modes import CHECKPOINTING
from lora.skeleton import Held, held_by, skeleton

QUANTIZATIONS = ("none", "nf4")
WHATEVER = 1 << 62  # a budget that every plan fits
OPTIMIZER_PASSES = 7  # AdamW reads p, g, m, v and writes p, m, v


@dataclass(frozen=True)
class Time:
    """Seconds of one step, by roof; the largest is what is expected."""

    arithmetic: float
    memory: float
    host: float
    flops: float  # of the step, what runs again included
    rate: float  # FLOPs a second that are expected of the card
    tokens: int

    @property
    def bound(self) -> str:
        """Which roof is the lowest."""
        return max(("arithmetic", "memory", "host"), key=lambda name: getattr(self, name))

    @property
    def seconds(self) -> float:
        """What is expected."""
        return float(getattr(self, self.bound))


@dataclass(frozen=True)
class Forecast:
    """A predicted training run; prints as a table.

    Attributes:
        memory: bytes at the peak, by category. peak: their sum.
        budget: what `plan` may use for gradients, activations and working memory: the card less reserve and model.
        plan: each block's checkpointing; the leanest one where nothing fits.
        fits: whether the peak is within the card's memory less the reserve.
        time: None where the card's rates are not known, or the step is not in bfloat16.
        would_fit: what to change, where it does not fit, each with its peak.
        experts: of a layer of a mixture; else 0.
        positions: how many tokens of a sequence the model is made for; 0 where its config does not say.
    """

    model: str
    settings: dict[str, Any]
    card: Card
    held: Held
    memory: dict[str, int]
    budget: int
    plan: Plan
    time: Time | None
    would_fit: list[tuple[str, int]] = field(default_factory=list)
    experts: int = 0
    positions: int = 0

    @property
    def peak(self) -> int:
        """Bytes of tensors at the largest moment of a step."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the step fits the card."""
        return self.peak <= self.card.memory - self.card.reserve

    def modes(self) -> dict[str, int]:
        """How many blocks have each kind of checkpointing."""
        chosen = list(self.plan.values())
        return {mode: chosen.count(mode) for mode in CHECKPOINTING if mode in chosen}

    def train_options(self) -> str:
        """The options of `lora train` that this is a forecast of."""
        s = self.settings
        words = [f"--max-length {s['seq']} --batch-size {s['batch']} --r {s['rank']} --dtype {s['dtype']}"]
        words += [f"--grad-accumulation {s['grad_accumulation']}"] * (s["grad_accumulation"] > 1)
        words += ["--quantization nf4"] * (s["quantization"] == "nf4")
        words += [f"--target-parameters {','.join(names)}" for names in [s.get("target_parameters")] if names]
        alike = list(self.modes())
        if len(alike) > 1:
            words.append(f"--checkpointing auto --memory-budget {max(self.budget, self.plan.peak)}")
        else:
            words.append(f"--checkpointing {alike[0]}")
        return " ".join(words)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON holds it: bytes and seconds."""
        time = None if self.time is None else asdict(self.time) | {"bound": self.time.bound, "step": self.time.seconds}
        return {
            "model": self.model,
            "settings": self.settings,
            "card": self.card._asdict(),
            "parameters": self.held.parameters,
            "trainable": self.held.trainable,
            "experts": self.experts,
            "positions": self.positions,
            "memory": self.memory,
            "peak": self.peak,
            "fits": self.fits,
            "budget": self.budget,
            "checkpointing": dict(self.plan),
            "time": time,
            "would_fit": [{"change": change, "peak": peak} for change, peak in self.would_fit],
            "train_options": self.train_options(),
        }

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._memory(), "", *self._time(), *self._advice()])

    def _head(self) -> list[str]:
        s, held = self.settings, self.held
        return [
            f"{self.model}: {held.parameters:,} frozen numbers, {held.trainable:,} trained (rank {s['rank']})",
            f"{s['batch']} sequences of {s['seq']:,} tokens, {s['dtype']}, quantization {s['quantization']}, "
            f"backend {s['backend']}",
            *self._mixture(),
            *self._too_long(),
        ]

    def _too_long(self) -> list[str]:
        """Where sequences are longer than the model is made for, that they are."""
        if not 0 < self.positions < self.settings["seq"]:
            return []
        return [
            f"note: the model is made for {self.positions:,} tokens (max_position_embeddings). Learned positions end "
            "there; rotary ones go on, untrained"
        ]

    def _mixture(self) -> list[str]:
        """Of a mixture of experts, what was taken of where its tokens go."""
        if not self.experts:
            return []
        kept = f", which stay in {self.settings['dtype']}" if self.settings["quantization"] == "nf4" else ""
        lines = [f"mixture of {self.experts} experts{kept}: memory and arithmetic are the same wherever tokens go"]
        if self.time is not None:
            lines.append("  time takes every expert to get some, and was measured of no mixture")
        return lines

    def _memory(self) -> list[str]:
        card, room = self.card, self.card.memory - self.card.reserve
        rows = [(name, readable(size)) for name, size in self.memory.items() if size]
        rows += [("peak", readable(self.peak))]
        lines = [f"{name:<28}{size:>12}" for name, size in rows]
        lines.insert(-1, "-" * 40)
        modes = ", ".join(f"{mode} in {count} blocks" for mode, count in self.modes().items())
        return [
            *lines,
            f"{'room':<28}{readable(room):>12}   {card.name}: {readable(card.memory)} less a reserve of "
            f"{readable(card.reserve)}",
            "",
            f"checkpointing: {modes}",
        ]

    def _time(self) -> list[str]:
        time, card = self.time, self.card
        if time is None:
            why = "its rates are not known" if card.flops is None else "they are known for bfloat16 only"
            return [f"time: not predicted for {self.settings['dtype']} on {card.name}, as {why}"]
        return [
            f"time: {time.seconds:.3g} s a step, {time.tokens / time.seconds:,.0f} tokens/s; bound by the {time.bound}",
            f"  arithmetic  {time.arithmetic:.3g} s: {time.flops / 1e12:,.1f} TFLOP at {time.rate / 1e12:,.0f} TFLOP/s,"
            f" {STEP_SHARE:.1%} of the data sheet's: what a step reached on an H100",
            f"  memory      {time.memory:.3g} s, at {COPY_SHARE:.0%} of the data sheet's bandwidth, as a copy reached "
            "there",
            f"  host        {time.host:.3g} s to launch everything, as on the host of that H100",
            f"  data sheet: {card.source}",
        ]

    def _advice(self) -> list[str]:
        if self.fits:
            return ["", f"fits. lora train --model {self.model} --data DATA {self.train_options()}"]
        missing = self.peak - (self.card.memory - self.card.reserve)
        lines = ["", f"does not fit: {readable(missing)} too much, with the leanest checkpointing that was allowed"]
        if not self.would_fit:
            return [*lines, "neither do shorter sequences, fewer at a time, or nf4: take a smaller model"]
        return [*lines, *(f"  would fit: {change} (peak {readable(peak)})" for change, peak in self.would_fit)]


# ---- predicting


def forecast(
    model: str,
    *,
    seq: int = 1024,
    batch: int = 8,
    rank: int = 8,
    quantization: str = "none",
    gpu: str | None = None,
    checkpointing: str = "auto",
    grad_accumulation: int = 1,
    dtype: str = "auto",
    target_modules: str | list[str] = "all-linear",
    target_parameters: Sequence[str] | None = None,
    reserve: int | str | None = None,
) -> Forecast:
    """Predicts one training step of `lora train`: memory by category, checkpointing, and time.

    No weight is read. The backend in force is the one that is predicted, with `auto` the fast one.

    Args:
        model: what `lora.load` takes: a hub id, a directory, a GGUF file, a packaged model's name.
        seq, batch: tokens of a sequence, and sequences in one forward; all are full, and every token is learnt.
        rank, target_modules, target_parameters: of the adapter.
        quantization: "none" or "nf4".
        gpu: a card's name, "cpu", or a size like "24GiB"; None is this machine's.
        grad_accumulation: forward passes in one optimizer step: beyond one, gradients wait while the next is computed.
        checkpointing: "auto" chooses for each block what fits the card and runs least again; or one mode for all.
        dtype: of the frozen weights: "float32" or "bfloat16"; "auto" as `lora train`, float32 on a CPU.
        reserve: bytes of the card that tensors cannot have; see `lora.gpus.default_reserve`.

    Returns: a Forecast, which may say that nothing fits. Raises: LoRAError for a wrong argument, and for a model whose
    memory depends on its data (a mixture that goes through its experts one by one).
    """
    counts = {"seq": seq, "batch": batch, "rank": rank, "grad_accumulation": grad_accumulation}
    for name, value in counts.items():
        least = 2 if name == "seq" else 1  # a token to read and one to predict
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise LoRAError(f"{name} is {value!r}, expected an integer >= {least}.")
    _require("quantization", quantization, QUANTIZATIONS)
    _require("checkpointing", checkpointing, ("auto", *CHECKPOINTING))
    _require("dtype", dtype, ("auto", "float32", "bfloat16"))
    card = card_named(gpu, reserve)
    if checkpointing == "offload" and card.kind == "cpu":
        raise LoRAError("checkpointing is 'offload', which needs a GPU: on a CPU, host memory is what is to be saved.")
    outline = models.outline_of(model)
    settings = {
        "seq": seq,
        "batch": batch,
        "grad_accumulation": grad_accumulation,
        "rank": rank,
        "quantization": outline.quantization or quantization,
        "checkpointing": checkpointing,
        "dtype": {"auto": "float32" if card.kind == "cpu" else "bfloat16"}.get(dtype, dtype),
        "backend": dispatch.get_backend(),
        "target_modules": target_modules,
        "target_parameters": target_parameters,
    }
    with meter("planning"):
        return Forecaster(model, outline, card).tried(settings)


def _require(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise LoRAError(
            f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}.{did_you_mean(str(value), choices)}"
        )


class Forecaster:
    """Forecasts of one model on one card."""

    def __init__(self, name: str, outline: models.Outline, card: Card) -> None:
        self.name, self.outline, self.card = name, outline, card

    def tried(self, settings: Mapping[str, Any]) -> Forecast:
        """The forecast, with what would fit if this does not."""
        found = self.predicted(settings)
        if not found.fits:
            found.would_fit.extend(self.alternatives(settings))
        return found

    def predicted(self, settings: Mapping[str, Any]) -> Forecast:
        """The forecast of a step with these settings."""
        modules, parameters = settings["target_modules"], settings.get("target_parameters")
        config = LoRAConfig(r=settings["rank"], target_modules=modules, target_parameters=parameters)
        dtype = models.DTYPES[settings["dtype"]]
        model = skeleton(self.outline, self.name, config, settings["quantization"], dtype)
        dispatch.for_training(model)
        held = held_by(model)
        rehearsal = rehearse(model, settings["batch"], settings["seq"], self.card.kind)
        budget = self.card.memory - self.card.reserve - held.frozen - held.nf4 - 3 * held.trained
        mode = settings["checkpointing"]
        modes = ["none", "selective", "recompute", "offload"] if mode == "auto" else [mode]
        plan = planned(rehearsal.measured, WHATEVER, modes)
        if plan.peak > budget:
            plan = planned(rehearsal.measured, max(budget, plan.leanest), modes)
        gradients = {path: trained_bytes(model.get_submodule(path)) for path in plan}
        waiting = settings["grad_accumulation"] > 1
        moment = largest_moment(rehearsal.measured, plan, gradients, held.trained, waiting)
        memory = {
            "frozen weights": held.frozen - held.experts,
            "experts' weights": held.experts,
            "NF4 weights": held.nf4,
            "adapters": held.trained,
            "gradients": moment.gradients,
            "AdamW's moments": 2 * held.trained,
            "kept activations": moment.kept,
            "working memory": moment.need - moment.gradients - moment.kept,
        }
        time = None
        if self.card.flops and self.card.bandwidth and dtype == torch.bfloat16:
            time = step_time(self.card.flops, self.card.bandwidth, rehearsal, plan, held, settings)
        experts = experts_of(self.outline.config)
        positions = getattr(self.outline.config.get_text_config(), "max_position_embeddings", None) or 0
        return Forecast(
            self.name, dict(settings), self.card, held, memory, budget, plan, time, experts=experts, positions=positions
        )

    def alternatives(self, settings: Mapping[str, Any]) -> list[tuple[str, int]]:
        """Changes that make it fit, each the smallest of its kind, with their peaks."""
        found: list[tuple[str, int]] = []
        starts: list[tuple[str, dict[str, Any]]] = [("", {**settings, "checkpointing": "auto"})]
        if settings["checkpointing"] != "auto":
            self._add(found, "--checkpointing auto", starts[0][1])
        if settings["quantization"] == "none":
            nf4 = ("--quantization nf4", {**starts[0][1], "quantization": "nf4"})
            self._add(found, *nf4)
            starts.append(nf4)
        for words, start in starts:
            if words and any(change == words for change, _ in found):
                continue  # fits without being any smaller
            self._smaller(found, words, start)
        return found

    def _smaller(self, found: list[tuple[str, int]], words: str, start: dict[str, Any]) -> None:
        """Half the sequences, and half again; then half the tokens of a single one."""
        batch, seq = start["batch"], start["seq"]
        while batch > 1 or seq > 128:
            batch, seq = (batch // 2, seq) if batch > 1 else (1, seq // 2)
            change = f"--batch {batch}" + (f" --seq {seq}" if seq < start["seq"] else "")
            if self._add(found, f"{words} {change}".strip(), {**start, "batch": batch, "seq": seq}):
                return

    def _add(self, found: list[tuple[str, int]], words: str, settings: dict[str, Any]) -> bool:
        """Whether it fits; then it is noted."""
        result = self.predicted(settings)
        if result.fits:
            found.append((words, result.peak))
        return result.fits


def trained_bytes(module: nn.Module) -> int:
    """What the gradients of a module take."""
    return sum(p.nbytes for p in module.parameters() if p.requires_grad)


def step_time(
    flops: float, bandwidth: float, rehearsal: Rehearsal, plan: Plan, held: Held, settings: Mapping[str, Any]
) -> Time:
    """The three roofs of a step, by the formulas at the top of this file.

    Args:
        flops, bandwidth: a second, as the vendor says.
    """
    blocks = rehearsal.measured.blocks
    causal = rehearsal.attention / max(3 * sum(block.attention_arithmetic for block in blocks), 1)  # 1/2 or 1
    again = 0.0
    for block, mode in zip(blocks, plan.values(), strict=True):
        if mode != "none":
            again += block.arithmetic - block.left_out - block.attention_arithmetic
            kept = block.spared - block.attention_arithmetic  # a last product that a norm reads
            again += -kept if mode == "selective" else causal * block.attention_arithmetic
    work = rehearsal.products + rehearsal.attention + again
    passes = 2 + again / max(sum(block.arithmetic for block in blocks), 1)
    weights = held.frozen + held.nf4
    if held.nf4:  # decoded: written once and read once more, in the type of the products
        weights += 2 * 2 * (held.parameters - held.frozen // 2)
    moved = passes * weights + 2 * plan.kept + OPTIMIZER_PASSES * held.trained
    moved += held.rebuilt * (2 * (passes - 1) + 3)  # by each forward, and by the backward
    return Time(
        arithmetic=work / (flops * STEP_SHARE),
        memory=moved / (bandwidth * COPY_SHARE),
        host=len(blocks) * HOST_SECONDS,
        flops=work,
        rate=flops * STEP_SHARE,
        tokens=settings["batch"] * settings["seq"],
    )
