"""for_training and for_inference: what a model must switch between the two, in one verb each.

    for_training     dropout on, KV cache off, merged adapters unmerged, activation checkpointing as named
    for_inference    dropout off, KV cache as the model had it, checkpointing off, adapters merged if asked

Checkpointing goes through the model's own hook (transformers' GradientCheckpointingLayer), per instance: each
decoder block calls the function it is handed. Switching back and forth changes nothing else.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora.adapters import state_of
from lora.errors import LoRAError, did_you_mean
from lora.layers import adapter_layers
from lora.reference.checkpoint import Traffic, checkpoint
from lora.reference.merge import merge as merge_adapters
from lora.reference.merge import unmerge

CHECKPOINTING: dict[str, dict[str, Any]] = {
    "none": {},
    "recompute": {},  # keep each block's input, run the block again in the backward
    "selective": {"selective": True},  # also keep attention's outputs, and never run attention again
    "offload": {"offload": True},  # the block inputs wait in host memory
}


@dataclass
class Checkpointing:
    """What `for_training` set up, in `state_of(model).modes["checkpointing"]`: shown by `explain`."""

    modes: dict[str, str]  # by block path
    traffic: Traffic = field(default_factory=Traffic)  # of every block that offloads

    def __str__(self) -> str:
        counted = Counter(self.modes.values())
        text = ", ".join(f"{mode} in {counted[mode]} blocks" for mode in CHECKPOINTING if counted[mode])
        if not counted["offload"]:
            return text
        t = self.traffic
        moved = f"{t.out:,} bytes went to host memory ({t.pageable:,} of them not pinned), {t.back:,} came back"
        return f"{text}; {moved}, {t.waiting:,} wait there now, {t.peak:,} at most"


def for_training(model: nn.Module, checkpointing: str | Sequence[str] | Mapping[str, str] = "none") -> nn.Module:
    """Makes an injected model ready to train; see the top of this file.

    Args:
        checkpointing: "none", "recompute", "selective" or "offload" for all blocks; a sequence of these names, one for
            each block in the model's order; or a mapping from every block's path to its name, as
            `lora.plan_checkpointing` returns. What offloading moves is counted: see `Traffic`.

    Raises: LoRAError for another name, another number of names, a path that is no block's, or where the model has no
        blocks to checkpoint.
    """
    state_of(model)
    set_checkpointing(model, checkpointing)
    unmerge(model)
    _set_cache(model, False)
    return model.train()


def for_inference(model: nn.Module, merge: bool = False) -> nn.Module:
    """Makes an injected model ready to generate; see the top of this file.

    Args:
        merge: also merge the active adapters into the weights, so that they cost nothing; `for_training` (or
            `unmerge`) puts the original weights back, bit for bit. False leaves adapters that are merged merged.
    """
    state_of(model)
    set_checkpointing(model, "none")
    if merge and not any(layer.merged for _, layer in adapter_layers(model)):
        merge_adapters(model)
    _set_cache(model, True)
    return model.eval()


def set_checkpointing(
    model: nn.Module,
    checkpointing: str | Sequence[str] | Mapping[str, str],
    run: Callable[..., Any] = checkpoint,
) -> None:
    """Hands every checkpointable block of `model` the function it runs through, or takes it away ("none").

    Modules that contain blocks (the decoder itself has the flag too) follow them where all blocks agree.
    """
    setting = Checkpointing(modes_of(model, checkpointing))
    options = CHECKPOINTING | {"offload": {"offload": setting.traffic}}
    functions = {mode: functools.partial(run, **options[mode]) for mode in CHECKPOINTING}
    agreed = next(iter(setting.modes.values())) if len(set(setting.modes.values())) == 1 else "none"
    for path, module in hooked_modules(model).items():
        mode = setting.modes.get(path, agreed)
        module.gradient_checkpointing = mode != "none"  # type: ignore[assignment]
        if mode != "none":
            module._gradient_checkpointing_func = functions[mode]  # type: ignore[assignment]
        else:
            vars(module).pop("_gradient_checkpointing_func", None)
    state_of(model).modes.pop("checkpointing", None)
    if set(setting.modes.values()) - {"none"}:
        state_of(model).modes["checkpointing"] = setting


def modes_of(model: nn.Module, checkpointing: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """The mode of each block by its path. Raises: LoRAError, as `for_training` says."""
    paths, given, kind = list(checkpointable_blocks(model)), checkpointing, type(model).__name__
    if isinstance(given, str) or not isinstance(given, (Mapping, Sequence)):
        _checked_mode(given, "checkpointing")
    if not paths and given != "none":
        raise LoRAError(
            f"checkpointing={given!r} needs a model whose blocks can be checkpointed, but {kind} has no transformers "
            "GradientCheckpointingLayer: use checkpointing='none', or call lora.ops.checkpoint yourself."
        )
    if isinstance(given, str):
        return dict.fromkeys(paths, given)
    if not isinstance(given, Mapping):
        if len(given) != len(paths):
            raise LoRAError(
                f"checkpointing has {len(given)} modes, expected {len(paths)}: one for each block of this {kind}."
            )
        given = dict(zip(paths, given, strict=True))
    for path in dict.fromkeys([*given, *paths]):
        if path not in paths or path not in given:
            near = did_you_mean(str(path), {*paths} - {*given, path})
            raise LoRAError(
                f"checkpointing {'names' if path in given else 'leaves out'} {path!r}, expected a mode for each of the "
                f"{len(paths)} blocks of this {kind} and nothing else.{near} A plan is for the model it was made with."
            )
        _checked_mode(given[path], f"checkpointing of {path}")
    return {path: given[path] for path in paths}


def _checked_mode(mode: Any, name: str) -> None:
    if not isinstance(mode, str) or mode not in CHECKPOINTING:
        raise LoRAError(
            f"{name} is {mode!r}, expected one of {', '.join(map(repr, CHECKPOINTING))}."
            f"{did_you_mean(str(mode), CHECKPOINTING)}"
        )


def hooked_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with transformers' checkpointing flag, by path."""
    return {path: module for path, module in model.named_modules() if hasattr(module, "gradient_checkpointing")}


def checkpointable_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The innermost modules with the flag: what runs through the function it is handed, in the model's order."""
    hooked = hooked_modules(model)
    return {path: module for path, module in hooked.items() if len(hooked_modules(module)) == 1}


def _set_cache(model: nn.Module, inference: bool) -> None:
    """Turns the KV cache off for training, and back to what it was."""
    config, modes = getattr(model, "config", None), state_of(model).modes
    if config is None or not hasattr(config, "use_cache"):
        return
    if not inference:
        modes.setdefault("use_cache", config.use_cache)
        config.use_cache = False
    elif "use_cache" in modes:
        config.use_cache = modes.pop("use_cache")
