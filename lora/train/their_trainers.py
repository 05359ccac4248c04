"""transformers' `Trainer` and TRL's trainers with an injected model: checkpoints that they can go on from.

    class MyTrainer(lora.train.AdapterCheckpoints, trl.SFTTrainer): ...

    trainer = MyTrainer(model=lora.for_training(model), args=..., ...)
    trainer.train(resume_from_checkpoint=True)

Their loops read an adapter back into PEFT's own class only: without this, `resume_from_checkpoint` ends in a ValueError
and `load_best_model_at_end` fails after the last step. What they keep beside it (optimizer, schedule, generators) is
theirs to write and to read; the seeds of our dropout masks come from torch's generator, so that they are among it.

    checkpoint-20/
      adapter_config.json, adapter_model.safetensors     the adapter as `lora.save_adapter` writes it, for PEFT too;
                                                         others than "default" in subdirectories of their names
      optimizer.pt, scheduler.pt, rng_state.pth, ...     theirs
      trainer_state.json                                 theirs, and written last: without it a checkpoint is torn

For checkpoints without pickles, which are hashed and survive a loss of power, see `lora train`.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

from lora.adapter_io import restore_adapter
from lora.adapters import state_of
from lora.errors import LoRAError

NAME = re.compile(r"checkpoint-(\d+)")
STATE = "trainer_state.json"
NEEDED = ("optimizer.pt", "scheduler.pt")


class AdapterCheckpoints:
    """To be named before a trainer of transformers or TRL among a class's bases; see the top of this file.

    `train(resume_from_checkpoint=True)` goes on from the newest checkpoint in output_dir that is whole, and warns of
    those that are not; a path names one. What a model has beside its adapters is not touched: quantise, inject and
    `for_training` it as for the first start, with the same configs. Every adapter of the model is read.

    Raises: LoRAError for a checkpoint that lacks something, of other adapters or configs, or of another base model; for
    FSDP and DeepSpeed, whose own checkpoints these are not (`lora train --sharding full` has them).
    """

    model: Any
    args: Any
    state: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        before = cls.__mro__[1 : cls.__mro__.index(AdapterCheckpoints)]
        known = next((base for base in before if base.__module__.startswith(("transformers.", "trl."))), None)
        if known is not None:
            raise LoRAError(
                f"{cls.__name__} names {known.__name__} before AdapterCheckpoints, which then changes nothing: write "
                f"class {cls.__name__}(AdapterCheckpoints, {known.__name__})."
            )

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """As the trainer's own; `resume_from_checkpoint` is a checkpoint's path, or True for the newest whole one."""
        this: Any = self
        for kind, enabled in (("FSDP", this.is_fsdp_enabled), ("DeepSpeed", this.is_deepspeed_enabled)):
            if enabled:
                raise LoRAError(
                    f"{type(self).__name__} runs under {kind}, which writes checkpoints of its own: AdapterCheckpoints "
                    "is for one process, or DDP. `lora train --sharding full` shards over processes, and resumes."
                )
        state_of(self.model)
        if not hasattr(self.model, "save_pretrained"):
            raise LoRAError(
                f"the model is a {type(self.model).__name__} without save_pretrained, expected a transformers model."
            )
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest(Path(self.args.output_dir)) or True
        if isinstance(resume_from_checkpoint, Path):
            resume_from_checkpoint = str(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **options)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The trainer's own, which calls the model's `save_pretrained`; an older one of this step is none meanwhile."""
        this: Any = self
        folder = Path(this._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / STATE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Reads the adapters, once everything that going on needs is there."""
        folder = Path(resume_from_checkpoint)
        reason = why_torn(folder)
        if reason is not None:
            raise LoRAError(f"{folder} is not whole ({reason}): name another one, or None to start anew.")
        missing = [name for name in NEEDED if not (folder / name).is_file()]
        if missing:
            raise LoRAError(
                f"{folder} has no {' and no '.join(missing)}, as save_only_model leaves it: a run cannot go on from it "
                "as it was. lora.load_adapter reads its adapter, for a new run."
            )
        ranks = self.args.world_size
        random = "rng_state.pth" if ranks == 1 else f"rng_state_{self.args.process_index}.pth"
        if not (folder / random).is_file():
            warnings.warn(
                f"{folder} has no {random}: it was written by another number of processes than {ranks}, or this one "
                "had been killed. The run goes on with other dropout masks than one that was not interrupted.",
                stacklevel=2,
            )
        restore_adapters(self.model, folder)

    def _load_best_model(self) -> None:
        """Reads the adapters of the best checkpoint, in place."""
        restore_adapters(self.model, Path(self.state.best_model_checkpoint))


def restore_adapters(model: Any, folder: Path) -> None:
    """Gives every adapter of `model` the values that a checkpoint has; LoRAError unless it has these and no others."""
    names = set(state_of(model).configs)
    found = {path.parent.name for path in folder.glob("*/adapter_config.json")}
    found |= {"default"} if (folder / "adapter_config.json").is_file() else set()
    if names != found:
        listed = [", ".join(map(repr, sorted(some))) or "none" for some in (found, names)]
        raise LoRAError(
            f"{folder} has the adapters {listed[0]}, expected those of the model, {listed[1]}: give the model the same."
        )
    for name in sorted(names):
        restore_adapter(model, folder, name)


def newest(output: Path) -> Path | None:
    """The newest checkpoint in `output` that is whole, with a warning of each newer one; None where there is none.

    Raises: LoRAError where there are some, but none is whole.
    """
    found = [(int(match[1]), path) for path in output.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    torn: list[str] = []
    for _, path in sorted(found, reverse=True):
        reason = why_torn(path)
        if reason is None:
            if torn:
                warnings.warn(f"passed over: {'; '.join(torn)}. Going on from {path.name}.", stacklevel=3)
            return path
        torn.append(f"{path.name} is not whole ({reason})")
    if torn:
        raise LoRAError(f"no checkpoint in {output} is whole: {'; '.join(torn)}. Start anew, in another output_dir.")
    return None


def why_torn(path: Path) -> str | None:
    """Why a checkpoint is not one that was written to its end; None where it was."""
    try:
        json.loads((path / STATE).read_text())
    except FileNotFoundError:
        return f"no {STATE}, which is written last"
    except ValueError:
        return f"{STATE} is cut off"
    return None
