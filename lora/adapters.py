"""The adapters of a model: which there are, which are active, what trains. Bookkeeping shared by both backends."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.errors import LoRAError, did_you_mean
from lora.layers import (
    AdapterLayer,
    LoRAEmbedding,
    LoRALinear,
    LoRAParameter,
    SavedModule,
    adapter_layers,
    base_of,
    wrappers,
)
from lora.nf4_layer import NF4Linear

SHARED_INPUTS = (  # one mask seed each
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj", "gate_up_proj", "down_proj"),  # down_proj with a mask of its own: MASK_STREAMS
)
MASK_STREAMS = {"down_proj": 1}  # it reads another x than gate_proj and up_proj: another mask of the same seed


@dataclass
class Bias:
    """A base bias that trains: the parameter, and the values it does not hold now (the base's or the trained ones)."""

    parameter: nn.Parameter
    resting: Tensor


@dataclass
class AdapterState:
    """What `inject` leaves on the model beside its layers, as `model.lora_state`."""

    requires_grad: dict[str, bool]  # before injection, by parameter path
    configs: dict[str, LoRAConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    biases: dict[str, Bias] = field(default_factory=dict)  # by path in the base model
    biases_trained: str | None = None  # the adapter whose config trains biases
    trained_biases_in_use: bool = False
    uneven: list[list[LoRALinear]] = field(default_factory=list)  # projections of one x, not of the same adapters
    modes: dict[str, Any] = field(default_factory=dict)  # what for_training and for_inference have to put back


@dataclass(frozen=True)
class AdapterInfo:
    """One line of `adapters(model)`."""

    config: LoRAConfig
    active: bool
    merged: bool
    parameters: int


class TrainableParameters(list[nn.Parameter]):
    """The parameters to hand to an optimizer; prints as a summary."""

    def __init__(self, parameters: Sequence[nn.Parameter], total: int) -> None:
        super().__init__(parameters)
        self.trainable, self.total = sum(p.numel() for p in parameters), total

    def __str__(self) -> str:
        share = self.trainable / self.total if self.total else 0.0
        return f"{self.trainable:,} of {self.total:,} parameters train ({share:.2%}), in {len(self)} tensors"


def state_of(model: nn.Module) -> AdapterState:
    """The model's adapter state, also where DistributedDataParallel or torch.compile has wrapped it."""
    for candidate in (model, getattr(model, "module", None), getattr(model, "_orig_mod", None)):
        state = getattr(candidate, "lora_state", None)
        if isinstance(state, AdapterState):
            return state
    raise LoRAError(f"this {type(model).__name__} carries no adapters: call lora.inject(model, config) first.")


def adapters(model: nn.Module) -> dict[str, AdapterInfo]:
    """The adapters of `model` by name, in the order they were added."""
    state = state_of(model)
    parts = wrappers(model)
    merged = {name for part in parts if isinstance(part, AdapterLayer) and part.merged for name in part.merged.adapters}
    return {
        name: AdapterInfo(config, name in state.active, name in merged, _count(state, parts, name))
        for name, config in state.configs.items()
    }


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> nn.Module:
    """Makes one adapter active and trainable, or several, whose updates add; the others rest.

    Nothing is allocated or copied, and the cost does not grow with the number of adapters that rest.
    """
    state = state_of(model)
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
    for name in names:
        _require(state, name)
    if len(set(names)) != len(names) or not names:
        raise LoRAError(f"adapter_name is {adapter_name!r}, expected one name or several different ones.")
    parts = wrappers(model)
    if any(part.merged for part in parts if isinstance(part, AdapterLayer)):
        _refuse_merged(model, "set_adapter")
    copies = [name for name in names if state.configs[name].modules_to_save]
    if len(copies) > 1:
        raise LoRAError(f"adapters {copies} each bring their own modules_to_save: only one of them can be active.")
    state.active = names
    for part in parts:
        part.activate(names)
    _choose_leaders(state)
    use_trained_biases(model, state.biases_trained in names)
    return model


def delete_adapter(model: nn.Module, adapter_name: str) -> nn.Module:
    """Removes one adapter and its parameters; layers it alone adapted become the base layers again."""
    state = state_of(model)
    _require(state, adapter_name)
    if len(state.configs) == 1:
        raise LoRAError(f"{adapter_name!r} is the model's only adapter: lora.eject(model) takes it out.")
    _refuse_merged(model, "delete_adapter")
    if state.biases_trained == adapter_name:
        use_trained_biases(model, False)
        state.biases, state.biases_trained = {}, None
    withdraw(model, adapter_name)
    del state.configs[adapter_name]
    state.active = tuple(n for n in state.active if n != adapter_name) or (next(iter(state.configs)),)
    refresh(model, adapter_name)
    return model


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is the base model: adapters, saved modules and trained biases step aside.

    Merged adapters too: the original weights are put back for the time of the block. Nests.
    """
    state = state_of(model)
    parts = wrappers(model)
    before = [(part, part.enabled) for part in parts]
    swapped = [part for part in parts if isinstance(part, AdapterLayer) and part.merged is not None and part.enabled]
    trained = state.trained_biases_in_use
    try:
        for layer in swapped:
            exchange_weights(layer)
        for module, _ in before:
            module.enabled = False
        use_trained_biases(model, False)
        yield model
    finally:
        for module, enabled in before:
            module.enabled = enabled
        for layer in swapped:
            exchange_weights(layer)
        use_trained_biases(model, trained)


class WithoutAdapters(nn.Module):
    """What `without_adapters` returns. It owns no parameter: whoever moves, trains or saves it changes nothing."""

    whole: Any  # the model
    part: str  # the path in it of what a call runs

    def __init__(self, model: nn.Module, part: str = "") -> None:
        super().__init__()
        vars(self).update(whole=model, part=part)  # not as a child, which would have its parameters and its mode
        self.eval()

    @property
    def config(self) -> Any:
        return self.whole.config

    @property
    def base_model(self) -> WithoutAdapters:
        """The model without its output head, adapters off, too."""
        name = self.whole.base_model_prefix
        return self if self.part == name else WithoutAdapters(self.whole, name)

    def get_output_embeddings(self) -> Any:
        """The output head of the base model, not what an adapter made of it."""
        return base_of(self.whole.get_output_embeddings())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        training = [module for module in self.whole.modules() if module.training]
        try:
            for module in training:
                module.training = False  # no dropout of the model's own either
            with disable_adapters(self.whole):
                return self.whole.get_submodule(self.part)(*args, **kwargs)
        finally:
            for module in training:
                module.training = True


def without_adapters(model: nn.Module) -> WithoutAdapters:
    """The base model as a module of its own, in eval mode and without a second copy of any weight.

    For what wants a reference policy beside the model in training: `trl.DPOTrainer(model,
    ref_model=lora.without_adapters(model), ...)`. A call runs `model` itself with its adapters, trained modules and
    trained biases off, as `disable_adapters` does, in eval mode, and puts everything back. Not for `generate`: use
    `with lora.disable_adapters(model)` there.

    Raises: LoRAError where the model carries no adapters, or one on its output head: a trainer that takes the head's
    weight for itself would leave that adapter out, and never train it.
    """
    state_of(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, AdapterLayer):
        path = next(path for path, module in model.named_modules() if module is head)
        raise LoRAError(
            f"{path}, the output head, carries adapters ({', '.join(head.adapter_names)}), which trainers with a "
            "reference model never call: they multiply by its weight. Leave it out of target_modules, or name it in "
            "modules_to_save."
        )
    return WithoutAdapters(model)


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """The parameters that require grad, for an optimizer: `AdamW(lora.trainable_parameters(model))`.

    Printing the result tells how many train out of how many; a quantised weight counts its elements, not its bytes.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    quantised = [m for m in model.modules() if isinstance(m, NF4Linear)]
    stored = {id(p): p.numel() for p in model.parameters()}
    for module in quantised:
        for parameter in module.parameters():
            if parameter is not module.bias:
                stored.pop(id(parameter), None)
    return TrainableParameters(trainable, sum(stored.values()) + sum(m.in_features * m.out_features for m in quantised))


def loraplus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, *, embedding_lr: float = 1e-6, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The trainable parameters in groups for LoRA+, for an optimizer: `AdamW(lora.loraplus_groups(model, lr=1e-4))`.

    B starts at zero and reads A's small output, so it should move faster: lr_B = ratio · lr_A (Hayou et al. 2024,
    eq. 8). In PEFT's groups: adapted embeddings have a rate of their own, in which A and B change places; what is no
    matrix (DoRA's magnitude, trained biases) moves with B; modules trained in full move with A.

    Args:
        lr: of A. ratio: of the two rates, 1 or more; the paper found 16 good for hard tasks.
        weight_decay: of matrices; vectors have none.

    Returns: dicts with "name", "params", "lr" and "weight_decay", without those that would be empty.
    Raises: LoRAError for a rate, ratio or decay out of range, or where nothing trains.
    """
    for name, value, least in (("lr", lr, 0), ("ratio", ratio, 1), ("embedding_lr", embedding_lr, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
            raise LoRAError(f"{name} is {value!r}, expected a finite number of at least {least}.")
    tables = {
        id(p) for _, layer in adapter_layers(model) if isinstance(layer, LoRAEmbedding) for p in layer.parameters()
    }
    fast = {id(p) for _, layer in adapter_layers(model) for p in layer.lora_B.parameters()}
    rates = {"A": lr, "embedding": embedding_lr, "B": lr * ratio, "vectors": lr * ratio}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for parameter in trainable_parameters(model):
        name = "B" if id(parameter) in fast else "vectors" if parameter.dim() == 1 else "A"
        members["embedding" if id(parameter) in tables else name].append(parameter)
    if not any(members.values()):
        raise LoRAError(f"nothing trains in this {type(model).__name__}: call lora.inject or lora.set_adapter first.")
    return [
        {"name": name, "params": group, "lr": rates[name], "weight_decay": 0.0 if name == "vectors" else weight_decay}
        for name, group in members.items()
        if group
    ]


def refresh(model: nn.Module, *names: str) -> None:
    """Brings every layer, and the requires_grad flags of these adapters (of all, if none is named), in line with the
    state."""
    state = state_of(model)
    for part in wrappers(model):
        part.activate(state.active)
        for name in names or part.adapter_names:
            if name not in state.active:
                part.rest(name)
    _choose_leaders(state)
    use_trained_biases(model, state.biases_trained in state.active)


def use_trained_biases(model: nn.Module, trained: bool) -> None:
    """Exchanges the base's bias values with the trained ones (`bias="all"` or "lora_only"), or back."""
    state = state_of(model)
    for bias in state.biases.values():
        bias.parameter.requires_grad_(trained)
        if trained != state.trained_biases_in_use:
            resting = bias.resting.to(bias.parameter.device, bias.parameter.dtype)
            bias.resting, bias.parameter.data = bias.parameter.data, resting
    state.trained_biases_in_use = trained and bool(state.biases)


def exchange_weights(layer: AdapterLayer) -> None:
    """Exchanges a merged layer's weights with the originals it keeps."""
    if layer.merged is None:
        raise TypeError("the layer is not merged")
    for name, original in layer.merged.original.items():
        current = layer.owner.get_parameter(name)
        original.data = original.data.to(current.device)
        setattr(layer.owner, name, original)
        layer.merged.original[name] = current


def restore_weights(model: nn.Module) -> None:
    """Takes the original weights of every merged layer back."""
    for _, layer in adapter_layers(model):
        if layer.merged:
            exchange_weights(layer)
            layer.merged = None


def walk(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path, each path of a shared one, stopping at adapted and saved modules."""
    yield path, model
    if not isinstance(model, (AdapterLayer, SavedModule)):
        for name, child in model._modules.items():
            if child is not None:
                yield from walk(child, f"{path}.{name}" if path else name)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Sets the module at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def unwrap(model: nn.Module, which: Callable[[AdapterLayer | SavedModule], bool]) -> None:
    """Puts the base module back in place of each wrapper that `which` is true of."""
    for path, module in list(walk(model)):
        if isinstance(module, (AdapterLayer, SavedModule)):
            left = _unwrapped(module, which)
            if left is not module:
                put(model, path, left)


def _unwrapped(module: Any, which: Callable[[AdapterLayer | SavedModule], bool]) -> Any:
    """What is left of a wrapper, and of those inside it, without the ones that `which` is true of."""
    if isinstance(module, LoRAParameter):
        module.base_layer = _unwrapped(module.base_layer, which)
    elif not isinstance(module, (AdapterLayer, SavedModule)):
        return module
    return module.base_layer if which(module) else module


def withdraw(model: nn.Module, adapter_name: str) -> None:
    """Takes one adapter's parameters out, and every wrapper that is left with none."""
    for _, module in walk(model):
        if isinstance(module, AdapterLayer):
            for layer in module.chain if isinstance(module, LoRAParameter) else (module,):
                layer.remove_adapter(adapter_name)
        elif isinstance(module, SavedModule) and adapter_name in module.copies:
            del module.copies[adapter_name]
    unwrap(model, lambda module: not module.adapter_names)
    share_mask_seeds(model)


def share_mask_seeds(model: nn.Module) -> None:
    """Lets the projections of one x share a mask seed; the first of a group that drops out draws it."""
    state = state_of(model)
    state.uneven = []
    for _, parent in walk(model):
        for group in SHARED_INPUTS:
            members = [child for name in group if isinstance(child := getattr(parent, name, None), LoRALinear)]
            for child in members:
                child.mask_seed, child.leads_mask = members[0].mask_seed, child is members[0]
            if len({child.adapter_names for child in members}) > 1:
                state.uneven.append(members)
        for name, stream in MASK_STREAMS.items():
            if isinstance(child := getattr(parent, name, None), LoRALinear):
                child.mask_stream = stream
    _choose_leaders(state)


def _choose_leaders(state: AdapterState) -> None:
    """Who draws a group's seed, where that depends on the active adapters: a leader without one would never draw."""
    for members in state.uneven:
        leader = next((child for child in members if _drops_out(child)), members[0])
        for child in members:
            child.leads_mask = child is leader


def _drops_out(layer: LoRALinear) -> bool:
    return any(name in layer.lora_A and layer.dropout_rate(name) for name in layer.active)


def checked_name(name: str) -> str:
    """An adapter name that can be a key and a directory: letters, digits, "_" and "-"."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
        raise LoRAError(f"adapter_name is {name!r}, expected letters, digits, '_' and '-' only.")
    if hasattr(nn.ParameterDict, name) or hasattr(nn.ModuleDict(), name):
        raise LoRAError(f"adapter_name is {name!r}, which torch's ParameterDict needs for itself: choose another.")
    return name


def _require(state: AdapterState, name: str) -> None:
    if name not in state.configs:
        raise LoRAError(
            f"there is no adapter {name!r}.{did_you_mean(str(name), state.configs)} "
            f"The model has: {', '.join(map(repr, state.configs))}."
        )


def _refuse_merged(model: nn.Module, verb: str) -> None:
    merged = next(((path, layer) for path, layer in adapter_layers(model) if layer.merged), None)
    if merged is not None and merged[1].merged is not None:
        raise LoRAError(
            f"{verb} needs unmerged weights, but {merged[0]} has {list(merged[1].merged.adapters)} merged: "
            "call lora.unmerge(model) first."
        )


def _count(state: AdapterState, parts: Sequence[AdapterLayer | SavedModule], name: str) -> int:
    """The parameters one adapter trains: its own, its saved modules' and its biases."""
    trained: list[nn.Parameter] = []
    for part in parts:
        if isinstance(part, AdapterLayer):
            trained += part.adapter_params(name).values()
        elif name in part.copies:
            trained += part.copies[name].parameters()
    trained += [bias.parameter for bias in state.biases.values()] if state.biases_trained == name else []
    return sum(p.numel() for p in trained)
