"""Which backend runs a call: the only place that chooses.

    reference   `lora.reference`: to be read
    fast        `lora.fast`: fused; raises, with every reason, on what it cannot do
    auto        fast where it can, else reference, said once and shown by `explain`

`LORA_BACKEND` sets the default, "reference" if unset. The choice belongs to the process, not to a thread: a
checkpoint recomputes on autograd's own threads, and must find the same backend there.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType, TracebackType
from typing import Any

from torch import nn

from lora.errors import LoRAError, UnsupportedError, did_you_mean

BACKENDS = ("reference", "fast", "auto")
OPERATIONS = (
    "lora_linear", "lora_embedding", "lora_qkv", "lora_mlp", "nf4_quantize", "nf4_dequantize", "rms_norm", "rope",
    "layer_norm", "linear_cross_entropy", "dropout_mask", "merge_weight", "multi_lora_linear", "checkpoint",
)  # fmt: skip
_chosen: str | None = None


def get_backend() -> str:
    """The backend in force: what `use_backend` set, else LORA_BACKEND, else "reference"."""
    if _chosen is not None:
        return _chosen
    return _checked(os.environ.get("LORA_BACKEND") or "reference", "LORA_BACKEND")


class use_backend:  # noqa: N801 - reads as a verb: `use_backend("fast")`, `with use_backend("fast"):`
    """Sets the backend for the process; as a context manager, until the end of the block.

    Args:
        name: "reference", "fast" or "auto".

    Raises: LoRAError for another name.
    """

    def __init__(self, name: str) -> None:
        global _chosen
        _checked(name, "use_backend")
        self.name, self._before = name, _chosen
        _chosen = name

    def __enter__(self) -> str:
        return self.name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._before


class Operations:
    """The table of operations: `ops.lora_linear` is the chosen backend's `lora_linear`, looked up at each use."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in OPERATIONS:
            raise AttributeError(
                f"there is no operation {name!r}.{did_you_mean(name, OPERATIONS)} Operations: {', '.join(OPERATIONS)}."
            )
        if get_backend() == "reference":
            implementation: Callable[..., Any] = getattr(_module("reference"), name)
            return implementation
        return functools.partial(_run, name)

    def __dir__(self) -> list[str]:
        return list(OPERATIONS)


ops = Operations()


def backend() -> ModuleType:
    """The module that implements the backend in force; for "auto" the fast one, whose operations may fall back."""
    return _module("reference" if get_backend() == "reference" else "fast")


def inject(model: nn.Module, config: Any, adapter_name: str = "default") -> nn.Module:
    """Freezes `model` and puts trainable adapters beside the modules `config` names, in place.

    Args:
        model: any nn.Module with nn.Linear, nn.Embedding, transformers' Conv1D or NF4Linear in it.
        config: a LoRAConfig.
        adapter_name: letters, digits, "_" and "-".

    Returns: the same model. Raises: LoRAError, before anything is changed, where the config does not fit the model.
    """
    return backend().inject(model, config, adapter_name)  # type: ignore[no-any-return]


def add_adapter(model: nn.Module, config: Any, adapter_name: str) -> nn.Module:
    """Adds one more adapter to an injected model, in place; `set_adapter` makes it the active one."""
    return backend().add_adapter(model, config, adapter_name)  # type: ignore[no-any-return]


def eject(model: nn.Module) -> nn.Module:
    """Takes every adapter out again: the very modules, parameters and requires_grad flags from before `inject`."""
    return backend().eject(model)  # type: ignore[no-any-return]


def merge(model: nn.Module, safe: bool = True, requantize: bool = False) -> dict[str, float]:
    """Adds the active adapters' updates to the base weights: W' = W + scaling · B A; the originals are kept.

    Args:
        safe: check that each merged weight is finite, and change nothing if one is not.
        requantize: allow NF4 weights, which are decoded, merged and quantised again (lossy).

    Returns: for each module's path the relative Frobenius error of W' against W + the update.
    """
    return backend().merge(model, safe=safe, requantize=requantize)  # type: ignore[no-any-return]


def unmerge(model: nn.Module) -> nn.Module:
    """Puts the original weights back, bit for bit."""
    return backend().unmerge(model)  # type: ignore[no-any-return]


def merge_and_eject(model: nn.Module, safe: bool = True, requantize: bool = False) -> nn.Module:
    """Merges the active adapters for good and takes the adapter layers out: a plain model, free at inference."""
    return backend().merge_and_eject(model, safe=safe, requantize=requantize)  # type: ignore[no-any-return]


def quantize(model: nn.Module, scheme: str = "nf4", double_quant: bool = True, **options: Any) -> nn.Module:
    """Replaces frozen nn.Linear layers by NF4Linear, in place, before `inject`. See `lora.reference.quantize`."""
    return backend().quantize(model, scheme, double_quant=double_quant, **options)  # type: ignore[no-any-return]


def for_training(model: nn.Module, checkpointing: str | Sequence[str] | Mapping[str, str] = "none") -> nn.Module:
    """Training mode: dropout on, KV cache off, merged adapters unmerged, activation checkpointing as named.

    Args:
        checkpointing: "none"; "recompute" (keep each block's input only); "selective" (also keep attention's
            outputs, and down_proj's where a norm reads it); "offload" (block inputs wait in host memory). Or one of
            these names for each block, in order; or a plan of `lora.plan_checkpointing`, made for a number of bytes.
    """
    return backend().for_training(model, checkpointing=checkpointing)  # type: ignore[no-any-return]


def for_inference(model: nn.Module, merge: bool = False) -> nn.Module:
    """Inference mode: dropout and checkpointing off, KV cache on; `merge=True` merges the active adapters too."""
    return backend().for_inference(model, merge=merge)  # type: ignore[no-any-return]


def explain(model: nn.Module) -> str:
    """A table: for each adapted module the implementation that runs it, and why not the other."""
    from lora.adapters import state_of
    from lora.layers import adapter_layers, saved_modules

    name = get_backend()
    rows = [(path, type(layer).__name__, *_implementation(name, layer)) for path, layer in adapter_layers(model)]
    if not rows:
        return "No adapters: call lora.inject(model, config) first."
    rows += [(path, "SavedModule", "its own", "trained in full") for path, _ in saved_modules(model)]
    fusion = state_of(model).modes.get("fusion")
    if fusion is not None:
        modules = ((path, model.get_submodule(path), note) for path, note in fusion.notes_now(model).items())
        rows += [(p or "(model)", type(module).__name__, *_runner(name, module, note)) for p, module, note in modules]
    elif name != "reference":
        rows.append(("(model)", type(model).__name__, "its own", "not fused: for_training and for_inference fuse it"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    checkpointing = state_of(model).modes.get("checkpointing")
    return "\n".join([f"backend: {name}", *lines, *([f"checkpointing: {checkpointing}"] if checkpointing else [])])


def _implementation(name: str, layer: Any) -> tuple[str, str]:
    """Which implementation runs an adapted layer, and why; what else there is to know about it."""
    from lora.layers import LoRAParameter

    state = ""
    if layer.merged is not None:
        state = f"; {', '.join(layer.merged.adapters)} merged: the base product alone"
    elif not layer.groups():
        state = "; no active adapter here: the base product alone"
    if isinstance(layer, LoRAParameter):
        return "its own", "its module runs with W + s B A in W's place" + state
    if name == "reference":
        return "reference", "chosen" + state
    reasons = _module("fast.support").reasons(layer.projection_of(group) for group in layer.groups() or [()])
    if reasons:
        return ("reference" if name == "auto" else "none"), "fast cannot: " + "; ".join(reasons)
    return "fast", ("chosen" if name == "fast" else "fast can") + state


def _runner(name: str, module: nn.Module, note: str) -> tuple[str, str]:
    """Which implementation runs a module that `fuse` looked at, and what was done to it."""
    if note.startswith(("left as it is", "its own")):
        return "its own", note
    if name == "reference":
        return "reference", note
    reasons = _module("fast.support").reasons((*module.parameters(), *module.buffers()))
    if reasons:
        return ("reference" if name == "auto" else "none"), f"{note}; fast cannot: {'; '.join(reasons)}"
    return "fast", note


def _run(name: str, /, *arguments: Any, **options: Any) -> Any:
    """An operation on "fast" or "auto": the fast one where it can run, else an error, or the reference."""
    reasons = _module("fast.support").reasons((*arguments, *options.values()))
    if not reasons:
        return getattr(_module("fast"), name)(*arguments, **options)
    if get_backend() == "fast":
        raise UnsupportedError(f"the fast backend cannot run {name}: {'; '.join(reasons)}. Or use LORA_BACKEND=auto.")
    _say_once(f"{name} runs on the reference backend: {'; '.join(reasons)}.")
    return getattr(_module("reference"), name)(*arguments, **options)


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _module(name: str) -> ModuleType:
    """A backend, imported when it is first asked for; statements, because torch.compile can follow those."""
    if name == "reference":
        from lora import reference

        return reference
    if name == "fast":
        from lora import fast

        return fast
    from lora.fast import support

    return support


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise LoRAError(
            f"{source} names the backend {name!r}, expected one of {', '.join(map(repr, BACKENDS))}."
            f"{did_you_mean(str(name), BACKENDS)}"
        )
    return name
