"""What a run tells while it goes: a progress bar on a terminal, plain lines elsewhere, and metrics.jsonl.

The three are callbacks of transformers' Trainer. This module imports transformers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback

from lora.errors import LoRAError
from lora.train.durable import flush_file, replace_file, reporting
from lora.train.world import World

PLAIN_LINES = 20  # lines in a whole run, where there is no terminal
GO_ON = "The checkpoints are whole: --resume goes on from the newest."
KEPT = {"loss": "loss", "eval_loss": "eval_loss", "learning_rate": "lr", "grad_norm": "grad_norm"}


class Rate:
    """Tokens a second and the time left, from what was done since `start`."""

    def __init__(self) -> None:
        self.started, self.first_step, self.first_tokens = time.monotonic(), 0, 0

    def start(self, step: int, tokens: int) -> None:
        self.started, self.first_step, self.first_tokens = time.monotonic(), step, tokens

    def tokens_per_second(self, tokens: int) -> float:
        return (tokens - self.first_tokens) / max(time.monotonic() - self.started, 1e-9)

    def left(self, step: int, steps: int) -> str:
        done = step - self.first_step
        if done <= 0:
            return "-:--"
        return clock((time.monotonic() - self.started) / done * (steps - step))


def clock(seconds: float) -> str:
    """Seconds as 1:05 or 2:01:05."""
    minutes, rest = divmod(max(0, math.ceil(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressDisplay(TrainerCallback):
    """Step, loss, tokens a second and time left: one bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console, self.rate = console, Rate()
        self.trainer: Any = None  # set once there is one
        self.progress: Progress | None = None
        self.loss = self.held_out = math.nan

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rate.start(state.global_step, self.trainer.tokens_read)
        if self.console.is_terminal:
            columns = ("[bold]{task.description}", "{task.fields[numbers]}")
            self.progress = Progress(
                TextColumn(columns[0]), BarColumn(), MofNCompleteColumn(), TextColumn(columns[1]), console=self.console
            )
            self.progress.start()
            self.progress.add_task("training", total=state.max_steps, completed=state.global_step, numbers="")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)
        self.held_out = (logs or {}).get("eval_loss", self.held_out)
        step, steps = state.global_step, max(state.max_steps, 1)
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=step, numbers=self.numbers(step, steps))
        elif "loss" in (logs or {}) and (step == steps or step % max(1, steps // PLAIN_LINES) == 0):
            self.console.print(f"step {step}/{steps}  {self.numbers(step, steps)}", highlight=False, soft_wrap=True)

    def numbers(self, step: int, steps: int) -> str:
        """loss 1.234  held-out 1.456  1,234 tokens/s  1:05 left."""
        held_out = "" if math.isnan(self.held_out) else f"  held-out {self.held_out:.3f}"
        rate = self.rate.tokens_per_second(self.trainer.tokens_read)
        return f"loss {self.loss:.3f}{held_out}  {rate:,.0f} tokens/s  {self.rate.left(step, steps)} left"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Leaves the terminal as it was; safe to call twice."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class Metrics(TrainerCallback):
    """metrics.jsonl: a line for each logged step, with what was measured and when; one process writes it for all."""

    def __init__(self, path: Path, world: World | None = None) -> None:
        self.path, self.world, self.started = path, world or World(), time.monotonic()
        self.trainer: Any = None
        self.records: list[dict[str, Any]] = []

    def start(self, step: int) -> None:
        """Keeps the lines of an earlier run up to `step`; what came after is done again."""
        self.records = self.world.first(lambda: self.kept(step))

    def kept(self, step: int) -> list[dict[str, Any]]:
        """The records up to `step`, alone in the file from now on."""
        records = [record for record in read_metrics(self.path) if record["step"] <= step] if step else []
        with reporting(f"{self.path} cannot be written"):
            replace_file(self.path, _lines(records))  # a kill here must not cost what it keeps
        return records

    def add(self, step: int, **values: float) -> None:
        seconds = round(time.monotonic() - self.started, 3)
        record = {"step": step, **values, "tokens": self.trainer.tokens_read, "seconds": seconds}
        self.records.append(record)
        if not self.world.main:
            return
        with reporting(f"{self.path} cannot be written", GO_ON), open(self.path, "ab") as file:
            file.write(_lines([record]))  # a line that is cut off is left out when it is read

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        values = {name: logs[key] for key, name in KEPT.items() if logs and math.isfinite(logs.get(key, math.nan))}
        if values:
            self.add(state.global_step, **values)

    def flush(self) -> None:
        """Has the lines so far on the disk: a checkpoint is no use without the lines before it."""
        with reporting(f"{self.path} cannot be written", GO_ON):
            flush_file(self.path)


def _lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that was cut off is left out."""
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class NothingLeftError(Exception):
    """The checkpoint is of the last step: transformers would train one more."""


class Control(TrainerCallback):
    """Starts the run where it is to start, and ends it when the user interrupts it or the loss is no number.

    Processes agree after each step whether any of them is to stop, so that all end after the same one.
    """

    def __init__(self, on_begin: Callable[[Any], None], world: World | None = None) -> None:
        self.on_begin, self.world, self.interrupted = on_begin, world or World(), False

    def interrupt(self) -> None:
        self.interrupted = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # how often to log, evaluate and save: as asked now, not as then
        self.on_begin(state)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise NothingLeftError

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise LoRAError(
                f"the loss is {loss} after step {state.global_step}: training has diverged. Lower lr "
                f"({args.learning_rate:g} now), or raise warmup."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        (self.interrupted,) = self.world.any(self.interrupted)
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        return control
