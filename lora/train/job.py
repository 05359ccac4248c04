"""`run`: one training run from its config to its results. What `lora train` does, and the demo.

<output>/
  run.yaml            the whole config: `lora train --config run.yaml` does it again
  adapter/            the adapter, in PEFT's format
  metrics.jsonl       losses, learning rate and tokens, step by step
  loss.png            the same, drawn
  samples.md, .json   the same prompts answered before and after
  result.json         the run in numbers
  tensorboard/        for `tensorboard --logdir`
  checkpoint-N/       what `--resume` goes on from
  .lock               which process is writing here; gone when it has ended

Where a launcher has started several processes, each goes through all of this, and the first one writes and speaks
(`lora.train.world`). One run writes to an output directory at a time. Killed at any moment, it leaves what a resumed
run goes on from: docs/training/crash_safety.md says what is guaranteed, against what, and how it was tested.
"""

from __future__ import annotations

import io
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lora import dispatch, meter, models
from lora.adapter_io import gather_adapter
from lora.adapters import disable_adapters, trainable_parameters
from lora.errors import LoRAError
from lora.planner import plan_checkpointing
from lora.train import checkpoint
from lora.train.config import TrainConfig
from lora.train.data import Data, Prompt, load_data, prompts_of
from lora.train.durable import make_directory, recover, remove, replace_file, reporting
from lora.train.lock import NAME as LOCK
from lora.train.lock import OutputLock
from lora.train.manifest import processes_of, read_manifest
from lora.train.quiet import quiet
from lora.train.results import (
    ADAPTER,
    METRICS,
    PLOT,
    RESULT,
    SAMPLES,
    Sample,
    TrainResult,
    write_adapter,
    write_plot,
    write_result,
    write_samples,
)
from lora.train.sampling import answer
from lora.train.stopping import InterruptedRunError, Stopping, TerminatedRunError
from lora.train.world import World

COMPLETE = "The checkpoints are whole: --resume completes the run from the newest."
RUN, TENSORBOARD = "run.yaml", "tensorboard"
WRITTEN = (RUN, ADAPTER, METRICS, PLOT, RESULT, *SAMPLES, TENSORBOARD)  # and checkpoints
NEEDED = ("datasets", "matplotlib", "rich", "transformers", "trl", "yaml")


def run(
    config: TrainConfig, console: Console | None = None, on_finished: Callable[[Any, Any], None] | None = None
) -> TrainResult:
    """Trains an adapter as `config` says.

    Args:
        console: where to report; the terminal, unless given.
        on_finished: is given the trained model, ready to generate, and its tokenizer, once all else is done.

    Raises: LoRAError for whatever the user can mend; InterruptedRunError (a KeyboardInterrupt) after Ctrl-C, and
        TerminatedRunError, which is one, after SIGTERM.
    """
    for package in NEEDED:
        if find_spec(package) is None:
            raise LoRAError(f"training needs the package {package}. Run: pip install 'lora-twin[train]'")
    backend = dispatch.use_backend(config.backend) if config.backend else nullcontext()
    world = World.join()
    job = Job(config, console or Console(), world)
    with quiet(data=True), backend, world.one_voice(), job.stopping.listening():
        if not world.main:
            warnings.simplefilter("ignore")  # the first process says it; a batch of nothing is none of the user's
        try:
            job.prepare()
            job.measure_before()
            job.train()
            result = job.finish()
            if on_finished is not None:
                on_finished(job.model, job.tokenizer)
        finally:
            job.lock.release()
        world.leave()
        return result


class Job:
    """The stages of a run, in order, and what they hand on."""

    def __init__(self, config: TrainConfig, console: Console, world: World | None = None) -> None:
        self.config, self.world, self.output = config, world or World(), Path(config.output)
        self.console = console if self.world.main else Console(file=io.StringIO())
        self.lock, self.stopping = OutputLock(self.output), Stopping()
        self.stopping.advice = "before the first step: nothing new is saved, and the same command starts again"
        self.seconds = 0.0

    def say(self, label: str, text: str) -> None:
        self.console.print(f"[bold]{label:<10}[/bold]", end="", soft_wrap=True)
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """A sign of life for what takes a while: it moves on a terminal, and is a line now and then elsewhere."""
        with self.console.status(text) if self.console.is_terminal else nullcontext() as status:
            show = partial(self.say, "working") if status is None else status.update
            with meter.shown_by(show, live=status is not None), meter.meter(text):
                yield

    # ---- before

    def prepare(self) -> None:
        """Everything that can be refused, cheapest first: the directory, the data, the model, the adapter."""
        config = self.config
        self.resumed = self.world.first(self.look_into_output)
        with self.world.together():
            self.share_batch()
            with self.working("reading the data"):
                self.data = load_data(config)
            with self.working("loading the model"):
                self.model, self.tokenizer = load_model(config)
            self.chat = config.chat_template and bool(self.tokenizer.chat_template)
            check_chat(self.data, self.chat)
            torch.manual_seed(config.seed)
            with self.working("starting the adapter"):
                dispatch.inject(self.model, config.lora_config())
            dispatch.for_training(self.model, "none" if config.memory_budget else config.checkpointing)
        self.world.first(self.claim_output)
        with self.world.together():
            self.see_output()
        self.build_trainer()
        with self.world.together():
            self.plan()
        self.trainer.share_out()
        self.world.first(lambda: clear_output(config))  # an earlier run may be replaced: nothing above has refused
        if config.tensorboard and self.world.main and find_spec("tensorboard") is not None:
            self.trainer.add_callback(tensorboard(self.output / TENSORBOARD))
        self.describe()

    def share_batch(self) -> None:
        """How many batches of a step each process has: a resumed run's steps stay as large as they were.

        `grad_accumulation` is meant for as many processes as the run was begun with; another number shares out the
        same batches.
        """
        size, named = self.world.size, self.config.grad_accumulation
        self.settings, self.processes, self.accumulation = self.config.fixed(), size, named
        if self.resumed is None:
            return
        found = read_manifest(self.resumed)
        then, processes = found["settings"]["grad_accumulation"], processes_of(found)
        if named not in (then, then * processes / size) or found["settings"]["batch_size"] != self.config.batch_size:
            return  # another batch: refused, or allowed, with the other settings
        if then * processes % size:
            raise LoRAError(
                f"{self.resumed} is of a run whose steps are {then * processes} batches of {self.config.batch_size}, "
                f"which {size} processes cannot share alike: resume with a number of processes that divides "
                f"{then * processes}, or start anew with another --output."
            )
        self.accumulation, self.processes = then * processes // size, processes
        self.settings["grad_accumulation"] = then
        if self.accumulation != named:
            self.say("resume", f"{then * processes} batches a step, as before: {self.accumulation} on each process")

    def see_output(self) -> None:
        """Every process reads checkpoints, so each must see the directory that the first one writes to."""
        if not (self.output / LOCK).exists():
            raise LoRAError(
                f"output: process {self.world.rank} does not see what process 0 writes to {self.output}: name a "
                "directory on a file system that all machines share."
            )

    def look_into_output(self) -> Path | None:
        """Takes the lock of an output directory that is there, tidies up after a dead run, finds what to go on from."""
        if self.output.is_dir():
            self.take_lock()
            with reporting(f"output: what an earlier run left half-done in {self.output} cannot be tidied up"):
                for note in recover(self.output, is_ours):
                    self.say("recovered", note)
        found = check_output(self.config)
        for line in found.passed_over:
            self.say("resume", line)
        if self.config.resume:
            self.say("resume", f"from {found.path}" if found.path else "no checkpoint yet: starting from the beginning")
        return found.path

    def claim_output(self) -> None:
        """Makes the output directory, where it is not there and locked yet."""
        if not self.lock.held:
            with reporting(f"output: {self.output} cannot be made"):
                make_directory(self.output)
            self.take_lock()
            if earlier_run(self.output):
                raise LoRAError(
                    f"output: another run has come and gone in {self.output} in the meantime. Start again with "
                    "--resume to go on with it, or give another --output."
                )

    def take_lock(self) -> None:
        note = self.lock.take()
        if note is not None:
            self.say("recovered", note)

    def build_trainer(self) -> None:
        from lora.train.progress import Control, Metrics, ProgressDisplay
        from lora.train.trainer import AdapterTrainer

        config = self.config
        self.control = Control(self.begin, self.world)
        self.metrics, self.display = Metrics(self.output / METRICS, self.world), ProgressDisplay(self.console)
        callbacks = [self.control, self.metrics, self.display]
        with self.working("reading the base model's weights"):
            base = checkpoint.base_fingerprint(self.model)
        record: dict[str, Any] = {"settings": self.settings, "processes": self.processes, "base": base}
        config = config.replace(grad_accumulation=self.accumulation)
        with self.working("preparing the data"):
            self.trainer = AdapterTrainer(self.model, self.tokenizer, config, self.data, record, callbacks, self.world)
        self.metrics.trainer = self.display.trainer = self.trainer
        self.trainer.before_saving = self.metrics.flush
        record |= self.trainer.fingerprints() | {"changes": []}
        self.world.check_alike(base, "base model")
        self.world.check_alike(self.trainer.fingerprints(), "training or held-out data")
        with self.world.together():
            if self.resumed is not None:
                self.take_up(self.resumed, record)

    def take_up(self, path: Path, record: dict[str, Any]) -> None:
        """Checks everything about a checkpoint before anything of it is used; carries over what was measured."""
        allowed = checkpoint.check_same_run(path, record, self.config.allow_changed)
        checkpoint.check_tensors(self.model, path)
        for text in allowed:
            self.say("changed", text)
        stored, saved = checkpoint.read_state(path)["run"], read_manifest(path)
        record["changes"] = stored["changes"] + [f"from step {checkpoint.step_of(path)}: {text}" for text in allowed]
        if all(saved[name] == record[name] for name in ("base", "held_out")):  # else it is measured again
            record["before"] = stored["before"]

    def plan(self) -> None:
        """With a memory budget, chooses each block's checkpointing for the largest batch."""
        budget = self.config.memory_budget
        if budget is None:
            return

        def loss(**batch: Any) -> torch.Tensor:
            return self.trainer.next_token_loss(batch, batch["labels"].numel())

        with self.working("measuring a training step"):
            plan = plan_checkpointing(self.model, self.trainer.largest_batch(), budget, loss=loss)
        dispatch.for_training(self.model, plan)
        self.say("memory", plan.summary())

    def describe(self) -> None:
        config, prepared = self.config, self.trainer.prepared
        parameters = trainable_parameters(self.model)
        dtype = str(next(p.dtype for p in self.model.parameters() if p.is_floating_point())).removeprefix("torch.")
        quantised = " with NF4 weights" if config.quantization == "nf4" else ""
        self.say("model", f"{config.model}, {dtype}{quantised}, backend {dispatch.get_backend()}")
        self.say("adapter", f"r={config.r}, alpha={config.lora_alpha:g}: {parameters}")
        train, held_out = prepared["train"], prepared.get("eval")
        held = "none held out" if held_out is None else f"{held_out.examples:,} held out ({held_out.tokens:,} tokens)"
        self.say("data", f"{train.examples:,} examples to train on ({train.tokens:,} tokens), {held}")
        for name, part in prepared.items():
            what = "training" if name == "train" else "held-out"
            if part.cut:
                self.say("", f"{part.cut:,} {what} examples were longer than {config.max_length} tokens and were cut")
            if part.dropped:
                self.say("", f"{part.dropped:,} {what} examples have nothing to learn within them and were dropped")
        for note in self.data.notes:
            self.say("", note)
        if self.world.size > 1:
            each = self.accumulation * config.batch_size
            how = "a part of each tensor" if config.sharding == "full" else "the whole model"
            steps = f"{self.world.size} × {each} = {self.world.size * each} examples a step"
            self.say("processes", f"{self.world.size}, each with {how}; {steps}")
        elif config.sharding != "none":
            self.say("sharding", "one process: there is nobody to share the model with")
        again = config.replace(resume=False, overwrite=False, allow_changed=())
        self.world.first(lambda: write_run(again))

    def measure_before(self) -> None:
        """Held-out loss and answers of the model without its adapter."""
        record, prompts = self.trainer.run, self.prompts()
        stored = record.get("before", {})
        with disable_adapters(self.model), self.working("measuring the model before training"):
            if "loss" not in stored:
                loss, tokens = self.trainer.held_out_loss() if self.data.held_out else (None, 0)
                stored = {"loss": loss, "tokens": tokens}
            if stored.get("prompts") != [prompt.text for prompt in prompts]:
                stored |= {"prompts": [prompt.text for prompt in prompts], "answers": self.answers(prompts)}
        record["before"] = stored
        if stored["loss"] is not None:
            self.say("before", f"held-out loss {stored['loss']:.4f}")

    def prompts(self) -> list[Prompt]:
        asked = [Prompt([{"role": "user", "content": text}], text) for text in self.config.sample_prompts]
        return prompts_of(self.data.held_out, self.config.samples) + asked

    def answers(self, prompts: list[Prompt]) -> list[str]:
        texts = [prompt.messages if self.chat and prompt.messages else prompt.text for prompt in prompts]
        return answer(self.model, self.tokenizer, texts, max_new_tokens=self.config.sample_tokens, chat=False)

    # ---- training

    def begin(self, state: Any) -> None:
        """Called by the trainer when its own state is set up."""
        self.metrics.start(state.global_step)
        self.trainer.order.set_epoch(int(state.epoch or 0))  # accelerate's loader of a resumed epoch may not pass it on
        if self.resumed is not None:
            checkpoint.load_sums(self.trainer, self.resumed)
        elif self.trainer.run["before"]["loss"] is not None:
            self.trainer.log({"eval_loss": self.trainer.run["before"]["loss"]})

    def train(self) -> None:
        """Trains to the end, or to the step in which the user interrupts."""
        from lora.train.progress import NothingLeftError

        started = time.monotonic()
        try:
            with self.stopping.after_the_step(self.control.interrupt), suppress(NothingLeftError):
                self.trainer.train(resume_from_checkpoint=str(self.resumed) if self.resumed else None)
        finally:
            self.display.stop()
            self.seconds = time.monotonic() - started
        self.stopping.advice = "while the results were being written: --resume completes them from the last checkpoint"
        state = self.trainer.state
        terminated, interrupted = self.world.any(self.stopping.terminated, self.control.interrupted)
        if terminated or (interrupted and state.global_step < state.max_steps):
            path = self.output / f"checkpoint-{state.global_step}"
            if not self.world.first(path.exists):  # the signal came after the last step's end
                self.world.first(self.metrics.flush)
                checkpoint.save(self.trainer, self.output)
            kind, word = (
                (TerminatedRunError, "terminated (SIGTERM)") if terminated else (InterruptedRunError, "interrupted")
            )
            raise kind(
                f"{word} after step {state.global_step} of {state.max_steps}; {path} is saved: --resume goes on from "
                "there"
            )

    # ---- after

    def finish(self) -> TrainResult:
        """Measures again and writes the results."""
        before, prompts = self.trainer.run["before"], self.prompts()
        adapter = gather_adapter(self.model)
        with self.world.together(), reporting(f"the adapter cannot be written to {self.output}", COMPLETE):
            if self.world.main:
                write_adapter(adapter, self.output)
        with self.working("measuring the trained model"):
            loss_after = self.held_out_after()
            dispatch.for_inference(self.model)
            answers = self.answers(prompts)
        samples = tuple(
            Sample(prompt.text, prompt.expected, *pair)
            for prompt, *pair in zip(prompts, before["answers"], answers, strict=True)
        )
        result = self.result(samples, loss_after)
        with self.world.together(), reporting(f"the results cannot be written to {self.output}", COMPLETE):
            if self.world.main:
                self.metrics.flush()
                write_samples(samples, self.output)
                write_plot(self.metrics.records, title(self.config, before["loss"], loss_after), self.output)
                write_result(result, self.output)
        if loss_after is not None:
            self.say("after", f"held-out loss {loss_after:.4f} (before: {before['loss']:.4f})")
        self.say("saved", f"{result.adapter} ({', '.join(name for name in (METRICS, PLOT, *SAMPLES))} beside it)")
        return result

    def held_out_after(self) -> float | None:
        """The held-out loss of the last step; measured now, unless that step has just done so."""
        if not self.data.held_out:
            return None
        last, step = self.metrics.records[-1:], self.trainer.state.global_step
        if last and last[0]["step"] == step and "eval_loss" in last[0]:
            return float(last[0]["eval_loss"])
        loss = self.trainer.held_out_loss().loss
        self.metrics.add(step, eval_loss=loss)
        return float(loss)

    def result(self, samples: tuple[Sample, ...], loss_after: float | None) -> TrainResult:
        parameters, before = trainable_parameters(self.model), self.trainer.run["before"]
        prepared, read = self.trainer.prepared, self.trainer.tokens_read
        return TrainResult(
            output=self.output,
            adapter=self.output / ADAPTER,
            steps=self.trainer.state.global_step,
            loss_before=before["loss"],
            loss_after=loss_after,
            held_out_examples=prepared["eval"].examples if "eval" in prepared else 0,
            held_out_tokens=before["tokens"],
            train_examples=prepared["train"].examples,
            tokens=read,
            tokens_learnt=self.trainer.tokens_learnt,
            seconds=round(self.seconds, 2),
            tokens_per_second=round((read - self.display.rate.first_tokens) / max(self.seconds, 1e-9), 1),
            backend=dispatch.get_backend(),
            trainable=parameters.trainable,
            parameters=parameters.total,
            peak_memory=peak_memory(),
            samples=samples,
            changes=tuple(self.trainer.run["changes"]),
        )


def write_run(config: TrainConfig) -> None:
    """run.yaml: the config as a file that does the run again."""
    path = Path(config.output) / RUN
    with reporting(f"{path} cannot be written"):
        replace_file(path, as_yaml(config).encode())


def earlier_run(output: Path) -> list[Path]:
    """What an earlier run has left in the output directory."""
    return [path for path in (output / name for name in WRITTEN) if path.exists()] + checkpoint.checkpoints(output)


def is_ours(name: str) -> bool:
    """Whether a run writes a file or directory of this name."""
    return name in WRITTEN or checkpoint.NAME.fullmatch(name) is not None


def check_output(config: TrainConfig) -> checkpoint.Found:
    """Refuses an output directory that holds something else; finds the checkpoint in it to go on from."""
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise LoRAError(f"output: {output} is a file, expected a directory to write to.")
    earlier = earlier_run(output)
    if earlier and not (config.resume or config.overwrite):
        raise LoRAError(
            f"output: {output} holds an earlier run ({earlier[0].name}): --resume goes on with it, --overwrite "
            "replaces it, another --output leaves it alone."
        )
    return checkpoint.newest(output) if config.resume else checkpoint.Found(None, [])


def clear_output(config: TrainConfig) -> None:
    """With `overwrite`, clears an earlier run out of the output directory."""
    output = Path(config.output)
    with reporting(f"output: the earlier run in {output} cannot be removed"):
        for path in earlier_run(output) if config.overwrite else ():
            remove(path)


def load_model(config: TrainConfig) -> tuple[Any, Any]:
    """The base model, on the GPU if there is one, and its tokenizer."""
    cuda = torch.cuda.is_available()
    names = {"auto": torch.bfloat16 if cuda else torch.float32, **models.DTYPES}
    quantization = None if config.quantization == "none" else config.quantization
    device = f"cuda:{torch.cuda.current_device()}" if cuda else None
    model, tokenizer = models.load(config.model, quantization=quantization, dtype=names[config.dtype], device=device)
    if tokenizer.eos_token is None:
        raise LoRAError(f"{config.model}: its tokenizer has no end-of-text token, so no answer could ever end.")
    return model, tokenizer


def check_chat(data: Data, chat: bool) -> None:
    """Conversations need a chat template."""
    row = data.train[0]
    if not chat and (row.get("messages") or isinstance(row.get("prompt"), list)):
        raise LoRAError(
            "data: the examples are conversations, but the tokenizer has no chat template, or --no-chat-template is "
            "set: give 'prompt' and 'completion' as text."
        )


def tensorboard(directory: Path) -> Any:
    """transformers' own TensorBoard callback, writing to `directory`."""
    from torch.utils.tensorboard import SummaryWriter

    integrations: Any = import_module("transformers.integrations")
    return integrations.TensorBoardCallback(SummaryWriter(log_dir=str(directory)))


def title(config: TrainConfig, before: float | None, after: float | None) -> str:
    """What stands above the plot."""
    name = Path(config.model).name
    return name if before is None or after is None else f"{name}: held-out loss {before:.2f} → {after:.2f}"


def as_yaml(config: TrainConfig) -> str:
    """The config as a file that `--config` reads."""
    import yaml

    text: str = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    return text


def peak_memory() -> int:
    """Bytes: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
