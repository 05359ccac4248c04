"""TrainConfig: every choice of a training run, its default, its help text and its check.

The same fields are the keys of `--config file.yaml`, the flags of `lora train` (`grad_accumulation` is
`--grad-accumulation`), and the `run.yaml` written beside each adapter. A flag overrides the file.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora.config import LoRAConfig
from lora.errors import LoRAError, did_you_mean
from lora.planner import bytes_of

GROUPS = {
    "model": "what is fine-tuned",
    "data": "what it learns from",
    "adapter": "what trains (LoRAConfig's fields, with PEFT's names)",
    "optimisation": "how it trains",
    "run": "where results go, and how often",
}
QUANTIZATIONS = ("none", "nf4")
SHARDING = ("none", "full")
DTYPES = ("auto", "float32", "bfloat16", "float64")  # float16 overflows without loss scaling
SCHEDULERS = ("linear", "cosine", "constant")
CHECKPOINTING = ("none", "recompute", "selective", "offload", "auto")
BACKENDS = ("reference", "fast", "auto")
PLAIN_NAMES = re.compile(r"[\w.]+(\s*,\s*[\w.]+)*")  # q_proj,v_proj: names, no regular expression
ADAPTER_DEFAULTS = LoRAConfig()


def option(default: Any, group: str, text: str, **more: Any) -> Any:
    """A field with its help text; `more`: choices, and fixed=False where a resumed run may change it."""
    metadata = {"group": group, "help": text, "choices": None, "fixed": True, **more}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def adapter_option(name: str, text: str, **more: Any) -> Any:
    """A field of LoRAConfig, with LoRAConfig's own default."""
    default = getattr(ADAPTER_DEFAULTS, name)
    return option(dict(default) if isinstance(default, Mapping) else default, "adapter", text, **more)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Raises LoRAError, naming the field, what was found and what is expected."""

    model: str = option("", "model", "hub id, directory, GGUF file, or the name of a packaged model (required)")
    quantization: str = option("none", "model", "keep the frozen weights in 4 bits", choices=QUANTIZATIONS)
    dtype: str = option(
        "auto", "model", "of the frozen weights; auto: float32 on a CPU, bfloat16 on a GPU", choices=DTYPES
    )
    sharding: str = option(
        "none",
        "model",
        "several processes: each holds the whole model, or full: its part of each tensor (FSDP2)",
        choices=SHARDING,
        fixed=False,
    )
    backend: str = option(
        "", "model", "which implementation runs; unset: LORA_BACKEND, else auto", choices=BACKENDS, fixed=False
    )

    data: str = option("", "data", "JSONL or text file, datasets directory, or hub id (required)")
    data_split: str = option("train", "data", "which split of a datasets directory or hub id")
    eval_data: str | None = option(None, "data", "held-out data; unset: part of --data is held out")
    eval_split: str = option("test", "data", "which split of --eval-data, where that is a datasets directory or hub id")
    eval_fraction: float = option(0.05, "data", "share of --data held out where there is no --eval-data; 0: none")
    max_length: int = option(1024, "data", "tokens an example is cut to")
    packing: bool = option(False, "data", "fill each sequence with several examples, kept apart by the attention mask")
    completion_only: bool = option(True, "data", "no loss on prompts, only on completions and assistant turns")
    chat_template: bool = option(True, "data", "write prompts and completions as the model's chat template does")

    r: int = adapter_option("r", "rank of the update")
    lora_alpha: float = adapter_option("lora_alpha", "the update is scaled by lora_alpha / r")
    target_modules: str | tuple[str, ...] = adapter_option(
        "target_modules", "names separated by commas, one regular expression, or all-linear (all but the head)"
    )
    lora_dropout: float = adapter_option("lora_dropout", "probability of dropping an element of the adapter's input")
    use_dora: bool = adapter_option("use_dora", "train each row's magnitude apart from its direction")
    use_rslora: bool = adapter_option("use_rslora", "scale by lora_alpha / sqrt(r)")
    init_lora_weights: bool | str = adapter_option(
        "init_lora_weights", "true, gaussian, orthogonal, pissa, pissa_niter_N, olora or loftq"
    )
    bias: str = adapter_option("bias", "which biases train", choices=("none", "all", "lora_only"))
    rank_pattern: dict[str, int] = adapter_option("rank_pattern", "ranks of their own: q_proj=16,v_proj=4")  # noqa: RUF009
    alpha_pattern: dict[str, float] = adapter_option("alpha_pattern", "alphas of their own: q_proj=32")  # noqa: RUF009
    exclude_modules: str | tuple[str, ...] | None = adapter_option("exclude_modules", "modules left out")
    layers_to_transform: int | tuple[int, ...] | None = adapter_option(
        "layers_to_transform", "only these layers: 0,1,2"
    )
    layers_pattern: str | tuple[str, ...] | None = adapter_option(
        "layers_pattern", "the list those layers are counted in"
    )
    modules_to_save: tuple[str, ...] | None = adapter_option("modules_to_save", "modules trained in full")
    target_parameters: tuple[str, ...] | None = adapter_option(
        "target_parameters", "parameters of a mixture: experts.gate_up_proj,experts.down_proj; without dropout"
    )

    lr: float = option(2e-4, "optimisation", "peak learning rate of AdamW")
    scheduler: str = option("linear", "optimisation", "how the rate goes after the warm-up", choices=SCHEDULERS)
    warmup: float = option(0.03, "optimisation", "share of the steps in which the rate rises from 0")
    weight_decay: float = option(0.0, "optimisation", "AdamW's decoupled decay of the adapter")
    max_grad_norm: float = option(1.0, "optimisation", "gradients are scaled down to this norm; 0: never")
    epochs: float = option(1.0, "optimisation", "passes over the training data")
    max_steps: int | None = option(None, "optimisation", "optimizer steps, instead of --epochs")
    batch_size: int = option(8, "optimisation", "examples in one forward pass")
    grad_accumulation: int = option(1, "optimisation", "forward passes of a process in one optimizer step")
    checkpointing: str = option(
        "none",
        "optimisation",
        "compute activations again to save memory; auto: per block, as --memory-budget asks",
        choices=CHECKPOINTING,
    )
    memory_budget: int | str | None = option(
        None, "optimisation", "for --checkpointing auto: memory above model and optimizer, like 6GiB", fixed=False
    )
    seed: int = option(0, "optimisation", "of the adapter's start, the order of the data, dropout and the split")

    output: str = option("out/train", "run", "directory for everything that is written", fixed=False)
    overwrite: bool = option(False, "run", "replace an earlier run in --output", fixed=False)
    resume: bool = option(False, "run", "go on from the newest whole checkpoint in --output", fixed=False)
    allow_changed: tuple[str, ...] = option(
        (),
        "run",
        "settings that --resume may change, by name: lr,seed; `data` and `model` stand for contents too",
        fixed=False,
    )
    log_every: int = option(1, "run", "steps between two lines of metrics.jsonl", fixed=False)
    eval_every: int = option(0, "run", "steps between two held-out losses; 0: before and after only", fixed=False)
    save_every: int = option(100, "run", "steps between two checkpoints; 0: only when interrupted", fixed=False)
    keep_checkpoints: int = option(2, "run", "how many of the newest checkpoints stay", fixed=False)
    samples: int = option(4, "run", "held-out prompts answered before and after training", fixed=False)
    sample_prompts: tuple[str, ...] = option((), "run", "prompts to answer too", fixed=False)
    sample_tokens: int = option(64, "run", "longest answer, in tokens", fixed=False)
    tensorboard: bool = option(True, "run", "also log for TensorBoard, where that is installed", fixed=False)

    def __post_init__(self) -> None:
        for name, hint in HINTS.items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), hint))
        for name in ("model", "data"):
            if not getattr(self, name):
                raise LoRAError(f"{name} is missing: give --{name}, or `{name}:` in the --config file.")
        self._check_choices()
        self._check_numbers()
        self.lora_config()  # LoRAConfig checks its own fields

    def _check_choices(self) -> None:
        for f in dataclasses.fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            if choices and value not in choices and not (f.name == "backend" and value == ""):
                raise LoRAError(
                    f"{f.name} is {value!r}, expected one of {', '.join(map(repr, choices))}."
                    f"{did_you_mean(str(value), choices)}"
                )
        if (self.checkpointing == "auto") != (self.memory_budget is not None):
            raise LoRAError(
                f"checkpointing is {self.checkpointing!r} and memory_budget is {self.memory_budget!r}: "
                "--checkpointing auto plans for a --memory-budget, like 6GiB; give both or neither."
            )
        if self.memory_budget is not None:
            bytes_of(self.memory_budget)
            if self.sharding != "none":
                raise LoRAError(
                    f"memory_budget is {self.memory_budget!r} and sharding is {self.sharding!r}: a plan is measured on "
                    "a whole model. Name a mode, --checkpointing recompute, say."
                )
        self._check_allowed()
        if self.resume and self.overwrite:
            raise LoRAError(
                "resume and overwrite are both set: going on from a run and replacing it exclude each other."
            )

    def _check_allowed(self) -> None:
        """allow_changed names settings that a resumed run would otherwise have to share, and there is one."""
        names = list(self.fixed())
        for name in self.allow_changed:
            if name in HINTS and name not in names:
                raise LoRAError(f"allow_changed names {name!r}, which may change anyway: leave it out.")
            if name not in names:
                raise LoRAError(
                    f"allow_changed names {name!r}, which is no setting.{did_you_mean(name, names)} Expected some of "
                    f"{', '.join(names)}."
                )
        if self.allow_changed and not self.resume:
            raise LoRAError("allow_changed is set without resume: it is about how a run goes on; give --resume, too.")

    def _check_numbers(self) -> None:
        at_least_one = (
            "max_length",
            "batch_size",
            "grad_accumulation",
            "log_every",
            "keep_checkpoints",
            "sample_tokens",
        )
        for name in at_least_one:
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        for name in ("eval_every", "save_every", "samples", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "an integer >= 0")
        for name in ("lr", "epochs"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a number > 0")
        for name in ("weight_decay", "max_grad_norm"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "a number >= 0")
        for name in ("eval_fraction", "warmup"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a share in [0, 1)")
        _require(self.max_length >= 2, "max_length", self.max_length, "at least 2: a token to read and one to predict")
        _require(self.seed < 2**32, "seed", self.seed, "an integer below 2**32")
        if self.max_steps is not None:
            _require(self.max_steps >= 1, "max_steps", self.max_steps, "an integer >= 1, or nothing to go by --epochs")

    def lora_config(self) -> LoRAConfig:
        """The adapter's own config."""
        names = [f.name for f in dataclasses.fields(LoRAConfig) if f.name in HINTS]
        return LoRAConfig(**{name: getattr(self, name) for name in names})

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some fields changed, checked like a new one."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as YAML and JSON hold them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def fixed(self) -> dict[str, Any]:
        """The fields that a resumed run must share with the run it goes on from."""
        kept = [f.name for f in dataclasses.fields(self) if f.metadata["fixed"]]
        return {name: value for name, value in self.to_dict().items() if name in kept}


def hints() -> dict[str, Any]:
    """The type of each field."""
    return typing.get_type_hints(TrainConfig)


HINTS = hints()


def from_sources(file: str | Path | None, flags: Mapping[str, Any]) -> TrainConfig:
    """The config of a YAML file (or none), with `flags` on top.

    Raises: LoRAError for a file that is missing, is not YAML, or names a field that does not exist.
    """
    values = read_yaml(Path(file)) if file is not None else {}
    return TrainConfig(**{**values, **flags})


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields that a YAML file sets; a relative path in it is relative to the working directory, as a flag's is."""
    import yaml

    if not path.is_file():
        raise LoRAError(
            f"the config {path} {'is a directory' if path.is_dir() else 'does not exist'}: give a YAML file."
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f":{where.line + 1}" if where is not None else ""
        raise LoRAError(f"{path}{line} is not YAML: {getattr(error, 'problem', None) or error}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise LoRAError(f"{path} holds a {type(values).__name__}, expected `field: value` lines.")
    for name in values:
        if name not in HINTS:
            raise LoRAError(
                f"{path} sets {name!r}, which is no field.{did_you_mean(str(name), HINTS)} "
                "`lora train --help` lists the fields."
            )
    return values


def parse_flag(name: str, text: str) -> Any:
    """What a flag's text means, by its field's type; the config checks it further."""
    kinds = _kinds(HINTS[name])
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if dict in kinds:
        pairs = [pair.partition("=") for pair in text.split(",")]
        if any(not key or not value for key, _, value in pairs):
            raise LoRAError(f"{name} is {text!r}, expected name=number pairs separated by commas: q_proj=16,v_proj=4.")
        return {key.strip(): _number(value) for key, _, value in pairs}
    if tuple in kinds and str not in kinds:
        entries = [entry.strip() for entry in text.split(",")]
        return tuple(_number(entry) for entry in entries) if name == "layers_to_transform" else tuple(entries)
    return _number(text) if int in kinds or float in kinds else text


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` if it is of the field's type; lists become tuples, and names separated by commas a tuple of names."""
    kinds = _kinds(hint)
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, str) and {str, tuple} <= kinds and value != "all-linear" and PLAIN_NAMES.fullmatch(value):
        return tuple(entry.strip() for entry in value.split(","))
    if isinstance(value, str) and float in kinds and not isinstance(_number(value), str):
        value = _number(value)  # YAML 1.1 reads 1e-4, without a point, as text
    if isinstance(value, (list, tuple)) and tuple in kinds:
        wanted: type = int if name == "layers_to_transform" else str
        _require(all(type(entry) is wanted for entry in value), name, value, f"a list of {_plural(wanted)}")
        return tuple(value)
    if type(value) is int and float in kinds:
        return value  # lora_alpha: 16 stays 16 in files
    _require(type(value) in kinds, name, value, " or ".join(sorted(_describe(kind) for kind in kinds)))
    if isinstance(value, float):
        _require(math.isfinite(value), name, value, "a finite number")
    return value


def _kinds(hint: Any) -> set[Any]:
    """The plain types of a hint: `str | tuple[str, ...] | None` -> {str, tuple, NoneType}."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return {typing.get_origin(part) or part for part in parts}


def _number(text: str) -> Any:
    """The int or float that `text` spells, or the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _describe(kind: type) -> str:
    names = {str: "text", int: "an integer", float: "a number", bool: "true or false", tuple: "a list"}
    return names.get(kind, "a mapping" if kind is dict else "nothing")


def _plural(kind: type) -> str:
    return "integers" if kind is int else "names"


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise LoRAError(f"{name} is {value!r}, expected {expected}.")
