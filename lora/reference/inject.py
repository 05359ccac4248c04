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
from lora.distributed import refuse_sharded
from lora.errors import LoRAError, did_you_mean
from lora.initialise import add_parameters
from lora.layers import (
    AdapterLayer,
    LoRAEmbedding,
    LoRALinear,
    LoRAParameter,
    SavedModule,
    base_of,
    is_conv1d,
    linear_shape,
)
from lora.meter import meter
from lora.nf4_layer import NF4Linear
from lora.saving import attach, detach

HEADS = ("score", "classifier")  # what transformers calls the head of a sequence classifier


def inject(model: nn.Module, config: LoRAConfig, adapter_name: str = "default") -> nn.Module:
    """Freezes `model` and puts an adapter beside each module `config` names, in place.

    Until `eject`, `model.save_pretrained(directory)`, which trainers call, writes the adapters: see `lora.saving`.

    Returns: the same model. Raises: LoRAError, leaving the model as it was, where the config does not fit.
    """
    if not isinstance(model, nn.Module):
        raise LoRAError(f"model is a {type(model).__name__}, expected an nn.Module.")
    if isinstance(getattr(model, "lora_state", None), AdapterState):
        raise LoRAError(
            f"this {type(model).__name__} already carries adapters ({', '.join(state_of(model).configs)}): "
            "lora.add_adapter adds another, lora.eject takes them out."
        )
    refuse_sharded(model, "inject")
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
    attach(model)
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
    detach(model)
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
    refuse_sharded(model, "add_adapter")
    if checked_name(adapter_name) in state.configs:
        raise LoRAError(f"there is already an adapter {adapter_name!r}: choose another name, or delete it first.")
    targets, saved = match(model, config)
    parameters = match_parameters(model, config)
    _check_fit(state, config, targets, saved)
    _check_parameters(config, parameters)
    wrapped: dict[nn.Module, AdapterLayer | SavedModule] = {}  # base module -> its wrapper, made here
    try:
        with meter("starting the adapter", len(targets), "modules") as done:  # "pissa" and "loftq" take their time
            for path, module in targets.items():
                layer = module if isinstance(module, AdapterLayer) else wrapped.get(module) or _wrapper(module)
                put(model, path, layer)
                if not isinstance(module, AdapterLayer):
                    wrapped[module] = layer
                if isinstance(layer, AdapterLayer) and adapter_name not in layer.lora_A:  # else shared by two paths
                    add_parameters(layer, path, config, adapter_name)
                done()
        for path, module in saved.items():
            keep = module if isinstance(module, SavedModule) else wrapped.get(module) or SavedModule(module)
            put(model, path, keep)
            if not isinstance(module, SavedModule):
                wrapped[module] = keep
            if isinstance(keep, SavedModule) and adapter_name not in keep.copies:
                keep.copies[adapter_name] = copy.deepcopy(keep.base_layer)
        _wrap_parameters(model, config, parameters, adapter_name)
        _remember_biases(model, config, targets, adapter_name)
    except BaseException:
        for module, wrapper in wrapped.items():
            wrapper.base_layer = module  # "loftq" may have replaced it
        withdraw(model, adapter_name)
        raise
    share_mask_seeds(model)
    for head in output_heads(model):
        if isinstance(head, LoRALinear):
            head.is_head = True
    state.configs[adapter_name] = config
    refresh(model, adapter_name)
    return model


def match(model: nn.Module, config: LoRAConfig) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The modules `config` adapts and those it trains in full, by path.

    Raises: LoRAError for a name that matches nothing, with the nearest names, or only what cannot be adapted.
    """
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
    if config.target_modules == "all-linear":
        targets = _linear_layers(model, pool)
        _tell_of_experts(model, config)
    else:
        targets = _named(config, pool, modules)
    if not targets and config.target_modules:
        raise LoRAError(f"target_modules={config.target_modules!r} matches no module.{_offer(modules)}")
    targets = _in_layers(config, targets)
    _check_patterns(config, [*targets, *match_parameters(model, config)])
    return targets, saved


def match_parameters(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[str, nn.Module]]:
    """The parameters that `target_parameters` names: the path of each -> its module's path, and that module.

    Raises: LoRAError for a name that matches nothing, with the nearest names, or what cannot be adapted in this way.
    """
    names = config.target_parameters or ()
    everything: dict[str, tuple[str, nn.Module]] = {}
    for path, module in walk(model) if names else ():
        owner = base_of(module)
        everything |= {
            f"{path}.{name}".strip("."): (path, module) for name, p in owner._parameters.items() if p is not None
        }
    for name in names:
        found = [key for key in everything if matches((name,), key)]
        for key in found:
            reason = _parameter_refusal(*everything[key], key.rpartition(".")[2], config)
            if reason:
                raise LoRAError(f"target_parameters names {name!r}, but {key} {reason}")
        if not found:
            stacked = [key for key, (_, m) in everything.items() if _is_stack(m, base_of(m)._parameters[_end(key)])]
            ends = sorted({".".join(key.split(".")[-2:]) for key in stacked})
            there = (
                f" Stacked parameters end in: {', '.join(ends)}." if ends else " The model has no stacked parameters."
            )
            hint = did_you_mean(name, [*ends, *everything])
            raise LoRAError(f"target_parameters names {name!r}, which matches no parameter.{hint}{there}")
    return {key: place for key, place in everything.items() if matches(names, key)}


def _end(path: str) -> str:
    return path.rpartition(".")[2]


def _parameter_refusal(path: str, module: nn.Module, name: str, config: LoRAConfig) -> str | None:
    """Why this parameter cannot be adapted as one; None where it can."""
    owner = base_of(module)
    shape = tuple(owner._parameters[name].shape)
    if not path:
        return "is a parameter of the model itself, which no wrapper can go around: put it into a module."
    if isinstance(module, SavedModule) or matches(config.modules_to_save, path):
        return "is trained in full by modules_to_save: choose one of the two."
    if name == "weight" and why_not(owner) is None:
        return f"is the weight of a {type(owner).__name__}: name the module in target_modules."
    if "forward" in vars(owner):
        return "belongs to a module with a forward of its own (an offloading hook, say), which an adapter would bypass."
    if len(shape) not in (2, 3) or not owner._parameters[name].is_floating_point():
        return (
            f"is {owner._parameters[name].dtype} {list(shape)}, expected floating-point numbers in 2 or 3 dimensions."
        )
    return None


def _check_patterns(config: LoRAConfig, adapted: Sequence[str]) -> None:
    """Raises LoRAError for a key of `rank_pattern` or `alpha_pattern` that matches nothing that is adapted."""
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            if not any(key_matches(key, path) for path in adapted):
                ends = {_end(path) for path in adapted}
                raise LoRAError(
                    f"{name} has the key {key!r}, which matches none of the {len(adapted)} adapted modules."
                    f"{did_you_mean(key, {*ends, *adapted})} They end in: {', '.join(sorted(ends))}."
                )


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


def _tell_of_experts(model: nn.Module, config: LoRAConfig) -> None:
    """Warns where "all-linear" finds matrices stacked in one parameter, which are no layers, and nothing names them."""
    if config.target_parameters:
        return
    stacked = [
        f"{path}.{name}"
        for path, module in walk(model)
        for name, parameter in base_of(module)._parameters.items()
        if parameter is not None and _is_stack(module, parameter)
    ]
    if stacked:
        ends = list(dict.fromkeys(".".join(path.split(".")[-2:]) for path in stacked))
        warnings.warn(
            f"target_modules='all-linear' leaves {len(stacked)} parameters out that hold several matrices each "
            f"({stacked[0]}, ...): to adapt them too, give target_parameters={ends}.",
            stacklevel=4,
        )


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


def _is_stack(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a parameter holds several matrices, as a mixture's experts do."""
    other = isinstance(module, (nn.Conv1d, nn.ConvTranspose1d, nn.Bilinear))
    return parameter.dim() == 3 and len(parameter) > 1 and not other


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
    if config.lora_dropout and targets and all(_is_embedding(module) for module in targets.values()):
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


def _check_parameters(config: LoRAConfig, parameters: dict[str, tuple[str, nn.Module]]) -> None:
    """Whatever of the config adapted parameters cannot honour: see `LoRAParameter`."""
    starts = (True, False, "gaussian")
    for path, (_, module) in parameters.items():
        *_, fan_out, fan_in = base_of(module)._parameters[_end(path)].shape
        if config.rank_of(path) > min(fan_out, fan_in):
            raise LoRAError(
                f"{path} would get r={config.rank_of(path)}, but its matrices are {fan_out} x {fan_in}: r must be at "
                f"most {min(fan_out, fan_in)} there. Lower r, or give the parameter a rank of its own in rank_pattern."
            )
        for field, value, wanted in (
            ("lora_dropout", config.lora_dropout, config.lora_dropout == 0),
            ("use_dora", config.use_dora, not config.use_dora),
            ("init_lora_weights", config.init_lora_weights, config.init_lora_weights in starts),
        ):
            if not wanted:
                raise LoRAError(
                    f"{field} is {value!r}, but {path} is adapted as a parameter (target_parameters), whose module "
                    f"multiplies by W + s B A itself: expected no dropout, no DoRA and a start of {starts}. Change it, "
                    "or adapt linear layers only."
                )
        if isinstance(module, LoRAParameter) and any(layer.merged for layer in module.chain):
            raise LoRAError(f"{path} has adapters merged: call lora.unmerge(model) before adding another.")


def _wrap_parameters(
    model: nn.Module, config: LoRAConfig, parameters: dict[str, tuple[str, nn.Module]], adapter_name: str
) -> None:
    """Puts a LoRAParameter around the module of each parameter, where there is none for it yet."""
    around: dict[nn.Module, nn.Module] = {}  # the module at a path, as it was -> what is there now
    for key, (path, module) in parameters.items():
        current, name = around.get(module, module), _end(key)
        chain = current.chain if isinstance(current, LoRAParameter) else []
        layer = next((each for each in chain if each.parameter == name), None)
        if layer is None:
            layer = current = LoRAParameter(current, name)
        if adapter_name not in layer.lora_A:  # else shared by two paths
            add_parameters(layer, key, config, adapter_name)
        around[module] = current
        put(model, path, current)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, LoRAEmbedding))


def _remember_biases(model: nn.Module, config: LoRAConfig, targets: dict[str, nn.Module], adapter_name: str) -> None:
    """Notes the base's values of every bias that will train, so that they can be put back."""
    if config.bias == "none":
        return
    biases: dict[str, Bias] = {}
    for path, module in walk(model):
        bias = base_of(module)._parameters.get("bias")
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
