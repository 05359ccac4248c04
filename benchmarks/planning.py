"""Predictions of `lora plan` beside what was measured: `docs/training/planning.md`'s tables.

    python -m benchmarks.planning              # on the CPU, and against docs/benchmarks/h100.csv; writes the page
    python -m benchmarks.planning --dry-run    # prints the tables

On the CPU each configuration trains two steps in a process of its own, with the loss and the optimizer of `lora train`.
Two witnesses, neither of which knows the planner:

    allocator   PyTorch's profiler is told of every block that the allocator hands out and takes back, whoever asked for
                it: operators' results, and what they need inside. The largest running sum, and the bytes of the
                parameters before, are what is held against the prediction.
    resident    the process' resident memory (VmHWM), its growth over two steps without the profiler. Pages that the C
                library keeps for later, and caches of matrix products, are in it.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import lora
from benchmarks.card.cases import Shapes
from lora import dispatch, models
from lora.forecast import Forecast, Forecaster, forecast
from lora.gpus import SHEETS, card_named
from lora.train.loss import NextTokenLoss

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "training" / "planning.md"
MEASURED = ROOT / "docs" / "benchmarks" / "h100.csv"
MODEL = "smollm2-135m-instruct"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODES = ("none", "recompute", "selective", "offload")


@dataclass(frozen=True)
class Case:
    """One configuration on the CPU."""

    backend: str
    quantization: str
    checkpointing: str
    batch: int
    seq: int
    rank: int


CASES = (
    Case("fast", "none", "none", 2, 256, 16),
    Case("fast", "none", "recompute", 2, 256, 16),
    Case("fast", "none", "selective", 2, 256, 16),
    Case("fast", "nf4", "none", 2, 256, 16),
    Case("fast", "nf4", "recompute", 2, 256, 16),
    Case("reference", "none", "none", 2, 256, 16),
)


@dataclass(frozen=True)
class MixtureCase:
    """One configuration of a random mixture of experts on the CPU, on the fast backend."""

    kind: str
    quantization: str
    checkpointing: str
    batch: int
    seq: int
    rank: int
    experts: bool  # whether adapters are on the experts, too


MIXTURES: dict[str, dict[str, Any]] = {  # a 1/8 and a 1/4 of the published models' widths, with all their experts
    "mixtral": {"hidden_size": 512, "intermediate_size": 1792, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "hidden_size": 512, "moe_intermediate_size": 192, "num_experts": 128, "num_experts_per_tok": 8,
        "intermediate_size": 1536,
    },
}  # fmt: skip
ALIKE = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 8000}
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
MIXTURE_CASES = (
    MixtureCase("mixtral", "none", "none", 2, 256, 16, False),
    MixtureCase("mixtral", "nf4", "recompute", 2, 256, 16, False),
    MixtureCase("mixtral", "nf4", "none", 2, 256, 16, True),
    MixtureCase("qwen3_moe", "none", "none", 2, 256, 16, False),
    MixtureCase("qwen3_moe", "nf4", "none", 2, 256, 16, False),
    MixtureCase("qwen3_moe", "nf4", "recompute", 2, 256, 16, True),
)


# ---- measuring


def train_step(model: Any, batch: int, seq: int) -> Callable[[], None]:
    """A step of `lora train`, without its printing: loss, backward, clipping, AdamW. Every call is one step."""
    ids = torch.randint(3, model.config.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(0))
    parameters = list(lora.trainable_parameters(model))
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=False)
    next_token_loss = NextTokenLoss(model)

    def step() -> None:
        loss = next_token_loss({"input_ids": ids, "labels": ids}, ids.numel())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def resting_bytes(model: torch.nn.Module) -> int:
    """What parameters and buffers lie in, each piece of memory once."""
    pieces = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in (*model.parameters(), *model.buffers())}
    return sum(pieces.values())


def allocated_peak(run: Callable[[], None]) -> int:
    """The most bytes that PyTorch's allocator had handed out at once while `run` ran, above what there was before."""
    return allocated(run)[0]


def allocated(run: Callable[[], object]) -> tuple[int, int]:
    """The most bytes handed out at once while `run` ran, and those handed out at its end, above what there was before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    kineto: Any = profiler.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    if not events:
        raise RuntimeError("the profiler saw no allocation: this build of PyTorch does not report them.")
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most, total


def measured_peak(model: Any, batch: int, seq: int, steps: int = 2) -> int:
    """Bytes of tensors at the largest moment of training the injected model: what a forecast's `peak` predicts."""
    gc.collect()  # what others left behind would be freed meanwhile, and count as less
    resting = resting_bytes(model)

    def run() -> None:
        step = train_step(model, batch, seq)
        for _ in range(steps):
            step()

    return resting + allocated_peak(run)


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    """VmHWM begins anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(case: Case) -> dict[str, int]:
    """Both witnesses, in this process."""
    with dispatch.use_backend(case.backend):
        nf4 = None if case.quantization == "none" else case.quantization
        model, _ = lora.load(MODEL, quantization=nf4, dtype="float32")
        lora.inject(model, lora.LoRAConfig(r=case.rank))
        lora.for_training(model, case.checkpointing)
        with torch.no_grad():
            for x in (*model.parameters(), *model.buffers()):
                x.sum()  # weights are mapped from files: now they are in memory
        forget_peak()
        before = resident("VmRSS")
        step = train_step(model, case.batch, case.seq)
        for _ in range(2):
            step()
        grown = resident("VmHWM") - before
        del step
        model.zero_grad(set_to_none=True)
        return {"allocated": measured_peak(model, case.batch, case.seq), "resident": grown}


def predict(case: Case) -> Forecast:
    """The forecast of a case."""
    with dispatch.use_backend(case.backend):
        settings = {key: value for key, value in asdict(case).items() if key != "backend"}
        return forecast(MODEL, gpu="cpu", **settings)


def cpu_table() -> list[str]:
    """A row for each case: predicted, measured, and what resident memory says."""
    lines = [
        "| backend | base | checkpointing | batch | rank | predicted, MiB | measured, MiB | off by | predicted growth "
        "| resident growth |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number, case in enumerate(CASES):
        found = predict(case)
        command = [sys.executable, "-m", "benchmarks.planning", "--measure", str(number)]
        output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        measured = json.loads(output.splitlines()[-1])
        held = found.held
        growth = found.peak - held.frozen - held.nf4 - held.trained
        base = "NF4" if case.quantization == "nf4" else "float32"
        lines.append(
            f"| {case.backend} | {base} | {case.checkpointing} | {case.batch} x {case.seq} | {case.rank} "
            f"| {mib(found.peak)} | {mib(measured['allocated'])} | {found.peak / measured['allocated'] - 1:+.1%} "
            f"| {mib(growth)} | {mib(measured['resident'])} |"
        )
        print(lines[-1], flush=True)
    return lines


def mixture(case: MixtureCase) -> models.Outline:
    """What there is to know of the model without its weights."""
    from transformers import AutoConfig

    return models.Outline(AutoConfig.for_model(case.kind, **ALIKE, **MIXTURES[case.kind]), None, False)


def measure_mixture(case: MixtureCase) -> int:
    """The allocator's peak, in this process."""
    from transformers import AutoModelForCausalLM

    with dispatch.use_backend("fast"):
        model = AutoModelForCausalLM.from_config(mixture(case).config)
        if case.quantization == "nf4":
            lora.quantize(model)
        lora.inject(model, lora.LoRAConfig(r=case.rank, target_parameters=EXPERTS if case.experts else None))
        lora.for_training(model, case.checkpointing)
        return measured_peak(model, case.batch, case.seq)


def predict_mixture(case: MixtureCase) -> Forecast:
    """The forecast of a case."""
    settings = {name: getattr(case, name) for name in ("quantization", "checkpointing", "batch", "seq", "rank")}
    settings |= {"grad_accumulation": 1, "dtype": "float32", "backend": "fast", "target_modules": "all-linear"}
    settings["target_parameters"] = EXPERTS if case.experts else None
    with dispatch.use_backend("fast"):
        return Forecaster(f"the {case.kind}", mixture(case), card_named("cpu")).predicted(settings)


def mixtures_table() -> list[str]:
    """A row for each case: predicted and measured."""
    lines = [
        "| model | base | checkpointing | adapters | batch | experts' weights, MiB | predicted, MiB | measured, MiB "
        "| off by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in MIXTURE_CASES:
        found, measured = predict_mixture(case), measure_mixture(case)
        base = "NF4" if case.quantization == "nf4" else "float32"
        adapted = "experts, too" if case.experts else "linear layers"
        lines.append(
            f"| {case.kind} | {base} | {case.checkpointing} | {adapted} | {case.batch} x {case.seq} "
            f"| {mib(found.held.experts)} | {mib(found.peak)} | {mib(measured)} | {found.peak / measured - 1:+.1%} |"
        )
        print(lines[-1], flush=True)
    return lines


def mib(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:,.0f}"


# ---- against the H100


def measured_steps() -> list[dict[str, str]]:
    """The training steps of ours in the CSV whose checkpointing is one mode."""
    wanted = {f"ours, {mode}" for mode in MODES}
    with open(MEASURED, newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["part"] == "steps" and row["variant"] in wanted and row["median_s"]]


def eight_billion() -> models.Outline:
    """The model of `benchmarks.card.model`, as a config."""
    from transformers import LlamaConfig

    s = Shapes()
    config: Any = LlamaConfig(  # type: ignore[call-arg]
        hidden_size=s.hidden, intermediate_size=s.ffn, num_hidden_layers=s.layers, num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads, head_dim=s.head_dim, vocab_size=s.vocab, max_position_embeddings=1 << 20,
        tie_word_embeddings=False,
    )  # fmt: skip
    return models.Outline(config, None, False)


def predicted_step(row: dict[str, str], outline: models.Outline) -> Forecast:
    """The forecast of a row of the CSV."""
    batch, seq = (int(number) for number in row["shape"].split(" x "))
    settings = {
        "seq": seq,
        "batch": batch,
        "rank": Shapes().r,
        "quantization": "nf4" if row["name"] == "step nf4" else "none",
        "grad_accumulation": 1,
        "checkpointing": row["variant"].removeprefix("ours, "),
        "dtype": "bfloat16",
        "backend": "fast",
        "target_modules": SEVEN,
    }
    with dispatch.use_backend("fast"):
        return Forecaster("the 8B model", outline, card_named("h100")).predicted(settings)


def h100_table() -> list[str]:
    """A row for each step that was measured: memory and time, predicted and measured."""
    lines = [
        "| base | checkpointing | tokens | predicted, GiB | measured, GiB | off by | predicted, ms | bound by "
        "| measured, ms | off by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    outline = eight_billion()
    for row in measured_steps():
        found = predicted_step(row, outline)
        if found.time is None:
            raise RuntimeError("no time was predicted for the H100.")
        peak, seconds = int(row["peak_bytes"]) + int(row["base_bytes"]), float(row["median_s"])
        lines.append(
            f"| {row['name'].removeprefix('step ')} | {row['variant'].removeprefix('ours, ')} | {row['shape']} "
            f"| {found.peak / 2**30:.2f} | {peak / 2**30:.2f} | {found.peak / peak - 1:+.1%} "
            f"| {1e3 * found.time.seconds:.0f} | {found.time.bound} | {1e3 * seconds:.0f} "
            f"| {found.time.seconds / seconds - 1:+.1%} |"
        )
        print(lines[-1], flush=True)
    return lines


def cards_table() -> list[str]:
    """The cards there are."""
    lines = ["| `--gpu` | memory, GiB | dense bfloat16, TFLOP/s | GB/s | from |", "| --- | --- | --- | --- | --- |"]
    for name, sheet in SHEETS.items():
        lines.append(
            f"| {name} | {sheet.mib / 1024:.2f} | {sheet.teraflops:g} | {sheet.gigabytes:,g} | {sheet.source} |"
        )
    return lines


# ---- the page


def write(part: str, lines: list[str]) -> None:
    """Puts lines between the page's markers of this name."""
    begin, end = f"<!-- {part}: generated by python -m benchmarks.planning; do not edit -->", f"<!-- end of {part} -->"
    text = PAGE.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise RuntimeError(f"{PAGE} has no markers for {part}.")
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    PAGE.write_text("\n".join([head + begin, *lines, end + tail]), encoding="utf-8")


def main() -> None:
    """Measures, predicts, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the tables, write nothing")
    parser.add_argument("--measure", type=int, metavar="NUMBER", help="measure one case in this process")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of the page [all]")
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(CASES[options.measure])))
        return
    about = (
        f"Run on {datetime.date.today()}: torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} of {os.cpu_count()} cores; "
    )
    models_of = {"cpu": MODEL, "mixtures": "random weights, three layers"}
    for part in options.parts:
        lines = PARTS[part]()
        if part in models_of:
            lines = [f"{about}{models_of[part]}.", "", *lines]
        if not options.dry_run:
            write(part, lines)


PARTS: dict[str, Callable[[], list[str]]] = {
    "cpu": cpu_table, "mixtures": mixtures_table, "h100": h100_table, "cards": cards_table,
}  # fmt: skip


if __name__ == "__main__":
    main()
