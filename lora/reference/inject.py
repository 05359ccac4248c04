"""Injection: match names, replace modules, freeze; and `eject`, its exact inverse.

    inject   every base parameter stops training; a matched module m becomes LoRALinear(m) or LoRAEmbedding(m)
    add      one more adapter: its parameters, in the layers there are and in new ones where it matches more
    eject    every wrapper steps aside for the module it wraps, and the requires_grad flags come back

Nothing is changed until the whole config is known to fit the model.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable, Sequence

from torch import nn

from lora.adapters import (
    AdapterState,
    Bias,
    checked_name,
    put,
    refresh,
    restore_weights,
    share_mask_seeds,
    state_of,
    unwrap,
    use_trained_biases,
    walk,
    withdraw,
)
from lora.config import LoRAConfig, key_matches, layer_number, matches
from lora.errors import LoRAError, did_you_mean
from lora.initialise import add_parameters
from lora.layers import AdapterLayer, LoRAEmbedding, LoRALinear, SavedModule, is_conv1d, linear_shape
from lora.nf4_layer import NF4Linear

HEADS = ("score", "classifier")  # what transformers calls the head of a sequence classifier


def inject(model: nn.Module, config: LoRAConfig, adapter_name: str = "default") -> nn.Module:
    """Freezes `model` and puts an adapter beside each module `config` names, in place.

    Returns: the same model. Raises: LoRAError, leaving the model as it was, where the config does not fit.
    """
    if not isinstance(model, nn.Module):
        raise LoRAError(f"model is a {type(model).__name__}, expected an nn.Module.")
    if isinstance(getattr(model, "lora_state", None), AdapterState):
        raise LoRAError(
            f"this {type(model).__name__} already carries adapters ({', '.join(state_of(model).configs)}): "
            "lora.add_adapter adds another, lora.eject takes them out."
        )
    flags = {path: p.requires_grad for path, p in model.named_parameters(remove_duplicate=False)}
    model.lora_state = AdapterState(flags)  # type: ignore[assignment]
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        add_adapter(model, config, adapter_name)
    except BaseException:
        eject(model)
        raise
    state_of(model).active = (adapter_name,)
    refresh(model)
    return model


def eject(model: nn.Module) -> nn.Module:
    """Puts the base modules back: the very objects, bit for bit, with the requires_grad flags from before.

    A base that `init_lora_weights="loftq"` quantised stays quantised: its full precision was not kept.
    """
    state = state_of(model)
    restore_weights(model)
    use_trained_biases(model, False)
    unwrap(model, lambda _: True)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if path in state.requires_grad and parameter.is_floating_point():  # not what "loftq" has quantised
            parameter.requires_grad_(state.requires_grad[path])
    del model.lora_state
    return model


def add_adapter(model: nn.Module, config: LoRAConfig, adapter_name: str) -> nn.Module:
    """Adds one more adapter to an injected model; `set_adapter` makes it the active one.

    Raises: LoRAError, leaving the model as it was, where the name is taken or the config does not fit the model.
    """
    if not isinstance(config, LoRAConfig):
        raise LoRAError(
            f"config is a {type(config).__name__}, expected a LoRAConfig: LoRAConfig.from_dict takes a dict."
        )
    state = state_of(model)
    if checked_name(adapter_name) in state.configs:
        raise LoRAError(f"there is already an adapter {adapter_name!r}: choose another name, or delete it first.")
    targets, saved = match(model, config)
    _check_fit(state, config, targets, saved)
    wrapped: dict[nn.Module, AdapterLayer | SavedModule] = {}  # base module -> its wrapper, made here
    try:
        for path, module in targets.items():
            layer = module if isinstance(module, AdapterLayer) else wrapped.get(module) or _wrapper(module)
            put(model, path, layer)
            if not isinstance(module, AdapterLayer):
                wrapped[module] = layer
            if isinstance(layer, AdapterLayer) and adapter_name not in layer.lora_A:  # else shared by two paths
                add_parameters(layer, path, config, adapter_name)
        for path, module in saved.items():
            keep = module if isinstance(module, SavedModule) else wrapped.get(module) or SavedModule(module)
            put(model, path, keep)
            if not isinstance(module, SavedModule):
                wrapped[module] = keep
            if isinstance(keep, SavedModule) and adapter_name not in keep.copies:
                keep.copies[adapter_name] = copy.deepcopy(keep.base_layer)
        _remember_biases(model, config, targets, adapter_name)
    except BaseException:
        for module, wrapper in wrapped.items():
            wrapper.base_layer = module  # "loftq" may have replaced it
        withdraw(model, adapter_name)
        raise
    share_mask_seeds(model)
    state.configs[adapter_name] = config
    refresh(model)
    return model


def match(model: nn.Module, config: LoRAConfig) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The modules `config` adapts and those it trains in full, by path.

    Raises: LoRAError for a name that matches nothing, with the nearest names, or only what cannot be adapted.
    """
    if config.target_parameters:
        raise LoRAError(f"target_parameters={list(config.target_parameters)}: only modules can be adapted so far.")
    modules = {path: module for path, module in walk(model) if path}
    for name in ("modules_to_save", "exclude_modules"):
        _check_used(name, getattr(config, name), modules)
    named = [path for path in modules if matches(config.modules_to_save, path)]
    saved = {path: modules[path] for path in named if not _inside(path, [other for other in named if other != path])}
    pool = {
        path: module
        for path, module in modules.items()
        if not _inside(path, saved) and not matches(config.exclude_modules, path)
    }
    targets = _linear_layers(model, pool) if config.target_modules == "all-linear" else _named(config, pool, modules)
    if not targets:
        raise LoRAError(f"target_modules={config.target_modules!r} matches no module.{_offer(modules)}")
    targets = _in_layers(config, targets)
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            if not any(key_matches(key, path) for path in targets):
                ends = {path.rsplit(".", 1)[-1] for path in targets}
                raise LoRAError(
                    f"{name} has the key {key!r}, which matches none of the {len(targets)} adapted modules."
                    f"{did_you_mean(key, {*ends, *targets})} They end in: {', '.join(sorted(ends))}."
                )
    return targets, saved


def _inside(path: str, outer: Iterable[str]) -> bool:
    """Whether `path` is one of the modules `outer`, or lies in one."""
    return any(f"{path}.".startswith(f"{other}.") for other in outer)


def why_not(module: nn.Module) -> str | None:
    """Why `module` cannot be adapted; None where it can."""
    kind = type(module)
    if isinstance(module, (LoRALinear, LoRAEmbedding, NF4Linear)) or is_conv1d(module):
        return None
    if isinstance(module, SavedModule):
        return "is trained in full by another adapter's modules_to_save"
    if "forward" in vars(module):
        return "has a forward of its own (an offloading hook, say), which an adapter would bypass"
    if isinstance(module, nn.Linear):
        if kind.forward is nn.Linear.forward:
            return None
        return f"is a {kind.__module__}.{kind.__name__}, a linear layer with its own arithmetic"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.scale_grad_by_freq:
            return "is an embedding with max_norm or scale_grad_by_freq, which a frozen table cannot honour"
        if kind.forward is nn.Embedding.forward or hasattr(module, "embed_scale"):
            return None
    return f"is a {kind.__name__}, not a linear layer or an embedding"


def _linear_layers(model: nn.Module, pool: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """What "all-linear" means: every linear layer but the output head."""
    heads = output_heads(model)
    bypassed = {f"{path}.out_proj" for path, module in pool.items() if isinstance(module, nn.MultiheadAttention)}
    targets = {}
    for path, module in pool.items():
        linear = isinstance(module, (nn.Linear, LoRALinear, NF4Linear)) or is_conv1d(module)
        if not linear or any(module is head for head in heads):
            continue
        reason = "is read past its forward by nn.MultiheadAttention" if path in bypassed else why_not(module)
        if reason:
            warnings.warn(f"target_modules='all-linear' leaves {path} out: it {reason}.", stacklevel=4)
        else:
            targets[path] = module
    return targets


def _named(config: LoRAConfig, pool: dict[str, nn.Module], modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that a regular expression or a list names; each list entry must name something."""
    names = config.target_modules
    targets: dict[str, nn.Module] = {}
    for entry in (names,) if isinstance(names, str) else names:
        rule: str | Sequence[str] = names if isinstance(names, str) else (entry,)
        found = {path: module for path, module in pool.items() if matches(rule, path)}
        reasons = {path: _refusal(path, module, modules) for path, module in found.items()}
        fitting = {path: module for path, module in found.items() if reasons[path] is None}
        leaves = [path for path, reason in reasons.items() if reason and not list(modules[path].children())]
        if leaves or not fitting:
            raise LoRAError(_misses(entry, (leaves or list(found))[:1], reasons, modules))
        targets.update(fitting)
    return {path: module for path, module in pool.items() if path in targets}


def _refusal(path: str, module: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    parent = modules.get(path.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "is read past its forward by nn.MultiheadAttention, so an adapter there would have no effect"
    return why_not(module)


def _misses(entry: str, worst: list[str], reasons: dict[str, str | None], modules: dict[str, nn.Module]) -> str:
    if worst:
        inside = {name for name, child in modules[worst[0]].named_modules() if name and why_not(child) is None}
        hint = f" It contains {', '.join(sorted(inside)[:8])}: name those." if inside else ""
        return f"target_modules names {entry!r}, but {worst[0]} {reasons[worst[0]]}.{hint}"
    excluded = [path for path in modules if matches((entry,), path)]
    if excluded:
        return (
            f"target_modules names {entry!r}, but every match ({excluded[0]}, ...) is in exclude_modules or "
            "modules_to_save: take it out of one of the two."
        )
    return f"target_modules names {entry!r}, which matches no module.{_offer(modules, entry)}"


def _offer(modules: dict[str, nn.Module], entry: str = "") -> str:
    """The nearest names to `entry`, and what there is to adapt."""
    ends = sorted({path.rsplit(".", 1)[-1] for path, module in modules.items() if why_not(module) is None})
    hint = did_you_mean(entry, ends) or did_you_mean(entry, modules)
    listed = f"Adaptable modules end in: {', '.join(ends[:12])}." if ends else "It has no linear layer or embedding."
    return f"{hint} {listed}"


def _in_layers(config: LoRAConfig, targets: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The targets in the layers to transform; a target listed by its whole path stays, as in PEFT."""
    wanted = config.layers_to_transform
    if wanted is None:
        return targets
    wanted = (wanted,) if isinstance(wanted, int) else wanted
    numbers = {path: layer_number(path, config.layers_pattern) for path in targets}
    there = sorted({n for n in numbers.values() if n is not None})
    for layer in wanted:
        if layer not in there:
            span = f"{there[0]} to {there[-1]}" if there else "no numbered layers"
            raise LoRAError(f"layers_to_transform has {layer}, but the matched modules lie in layers {span}.")
    whole = () if isinstance(config.target_modules, str) else config.target_modules
    return {path: module for path, module in targets.items() if numbers[path] in wanted or path in whole}


def _check_used(name: str, entries: str | Sequence[str] | None, modules: dict[str, nn.Module]) -> None:
    for entry in (entries,) if isinstance(entries, str) else entries or ():
        rule: str | Sequence[str] = entries if isinstance(entries, str) else (entry,)
        if not any(matches(rule, path) for path in modules):
            ends = {path.rsplit(".", 1)[-1] for path in modules}
            raise LoRAError(
                f"{name} names {entry!r}, which matches no module.{did_you_mean(entry, ends | set(modules))}"
            )


def _check_fit(
    state: AdapterState, config: LoRAConfig, targets: dict[str, nn.Module], saved: dict[str, nn.Module]
) -> None:
    """Whatever about the config only the model can tell: ranks, merged layers, biases, quantised modules to save."""
    for path, module in targets.items():
        base = module.base_layer if isinstance(module, AdapterLayer) else module
        shape = (base.num_embeddings, base.embedding_dim) if isinstance(base, nn.Embedding) else linear_shape(base)
        if config.rank_of(path) > min(shape):
            raise LoRAError(
                f"{path} would get r={config.rank_of(path)}, but it is {shape[0]} x {shape[1]}: r must be at most "
                f"{min(shape)} there. Lower r, or give the module a rank of its own in rank_pattern."
            )
        if isinstance(module, AdapterLayer) and module.merged:
            raise LoRAError(f"{path} has adapters merged: call lora.unmerge(model) before adding another.")
    if config.lora_dropout and all(_is_embedding(module) for module in targets.values()):
        raise LoRAError(f"lora_dropout is {config.lora_dropout}, but only embeddings are adapted, and they have none.")
    if config.bias != "none" and state.biases_trained:
        raise LoRAError(
            f"bias={config.bias!r}, but the adapter {state.biases_trained!r} already trains biases: one adapter can."
        )
    for path, module in saved.items():
        if isinstance(module, AdapterLayer):
            raise LoRAError(f"modules_to_save names {path}, which another adapter adapts: choose one of the two.")
        if any(isinstance(part, NF4Linear) for part in module.modules()):
            raise LoRAError(f"modules_to_save names {path}, which is quantised and cannot train: leave it in 16 bits.")


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, LoRAEmbedding))


def _remember_biases(model: nn.Module, config: LoRAConfig, targets: dict[str, nn.Module], adapter_name: str) -> None:
    """Notes the base's values of every bias that will train, so that they can be put back."""
    if config.bias == "none":
        return
    biases: dict[str, Bias] = {}
    for path, module in walk(model):
        base = module.base_layer if isinstance(module, (AdapterLayer, SavedModule)) else module
        bias = base._parameters.get("bias")
        if any(bias is known.parameter for known in biases.values()):
            continue  # shared by two paths
        if bias is not None and not isinstance(module, SavedModule) and (config.bias == "all" or path in targets):
            biases[f"{path}.bias"] = Bias(bias, bias.detach().clone())
    if not biases:
        raise LoRAError(f"bias={config.bias!r}, but no {'adapted ' * (config.bias == 'lora_only')}module has a bias.")
    state = state_of(model)
    state.biases, state.biases_trained, state.trained_biases_in_use = biases, adapter_name, False


def _wrapper(module: nn.Module) -> AdapterLayer:
    return LoRAEmbedding(module) if isinstance(module, nn.Embedding) else LoRALinear(module)


def output_heads(model: nn.Module) -> list[nn.Module]:
    """What "all-linear" and `quantize` leave alone: a language model's output head, a classifier's head."""
    heads = [getattr(model, name, None) for name in HEADS]
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter):
        with contextlib.suppress(NotImplementedError, AttributeError):  # how transformers says that a model has none
            heads.append(getter())
    return [head for head in heads if isinstance(head, nn.Module)]
