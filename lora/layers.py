"""The modules `inject` puts in place of frozen ones: they hold parameters and hand them to an operation.

    LoRALinear      around nn.Linear, transformers' Conv1D, or NF4Linear
    LoRAEmbedding   around nn.Embedding
    LoRAParameter   around any module, for one of its parameters (target_parameters): a mixture's experts
    SavedModule     around a module that is trained in full (modules_to_save)

The wrapped module stays untouched as `base_layer`: its parameters keep their identity, and `eject` puts it back.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora import dispatch
from lora.nf4_layer import NF4Linear
from lora.projection import Dropout, Projection

OUTER = re.compile(r"(\.base_layer)+$")  # the path from the outermost wrapper of a module to one inside it


class Update(NamedTuple):
    """One term of a layer's output: a projection, and the dropout on its adapter's input."""

    projection: Projection
    dropout: Dropout | None


class MaskSeed:
    """The seed of one dropout mask, shared by projections that read the same x (q, k, v; gate, up, down).

    The group's first member draws from torch's CPU generator, the others reuse what it drew. So a checkpoint that
    restores the generator, or a resumed run, makes the same masks again, and one fused operation can serve the group.
    """

    def __init__(self) -> None:
        self.seed: int | None = None

    def draw(self) -> int:
        self.seed = int(torch.randint(2**62, ()).item())
        return self.seed

    def reuse(self) -> int:
        return self.draw() if self.seed is None else self.seed


@dataclass
class Merged:
    """What `merge` took out of a layer, for `unmerge` to put back."""

    adapters: tuple[str, ...]
    original: dict[str, nn.Parameter]  # the base layer's own parameter objects, by name
    error: float  # relative Frobenius error of the merged weight against W + the update


class AdapterLayer(nn.Module):
    """A frozen base layer with named adapters, of which `active` ones add their updates."""

    base_layer: Any  # a module; its attributes are its own class's
    parameter = "weight"  # what the adapters change, by its name in `owner`

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ParameterDict()  # name -> [r, in_features]
        self.lora_B = nn.ParameterDict()  # name -> [out_features, r]
        self.lora_magnitude = nn.ParameterDict()  # name -> [out_features], DoRA
        self.initial_A = nn.ParameterDict()  # what a PiSSA or OLoRA adapter started from, frozen: taken off again,
        self.initial_B = nn.ParameterDict()  # so that its update is s (B A - B0 A0) and W stays as it is
        self.scaling: dict[str, float] = {}
        self.dropout = nn.ModuleDict()  # name -> nn.Dropout, which only says p: to turn all dropout off turns this off
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged: Merged | None = None
        self.mask_seed, self.leads_mask, self.mask_stream = MaskSeed(), True, 0
        self.train(base_layer.training)

    @property
    def owner(self) -> Any:
        """The module of the base model that holds the adapted weight."""
        return self.base_layer

    @property
    def weight(self) -> Any:
        """The base layer's weight, where model code reads it directly."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return getattr(self.base_layer, "bias", None)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return tuple(self.lora_A.keys())

    def adapter_params(self, name: str) -> dict[str, nn.Parameter]:
        """The trainable tensors of one adapter, by role; empty where this layer lacks the adapter."""
        roles = {"lora_A": self.lora_A, "lora_B": self.lora_B, "lora_magnitude": self.lora_magnitude}
        return {role: params[name] for role, params in roles.items() if name in params}

    def activate(self, names: tuple[str, ...]) -> None:
        """Makes these adapters the active ones, which train; those that were active, and are not among them, rest.

        The cost does not depend on how many others there are: what rests before and after is not looked at.
        """
        children: Any = self._modules  # nn.Module's own ways to its attributes take a microsecond each
        resting = [name for name in self.active if name not in names]
        for role in ("lora_A", "lora_B", "lora_magnitude"):
            params = children[role]._parameters
            for name in resting:
                if name in params:
                    params[name].requires_grad = False
            for name in names:
                if name in params:
                    params[name].requires_grad = True
        vars(self)["active"] = names

    def rest(self, name: str) -> None:
        """Stops the training of one adapter that is not active."""
        for parameter in self.adapter_params(name).values():
            parameter.requires_grad_(False)

    def dropout_rate(self, name: str) -> float:
        """The probability with which an adapter's input is dropped in training."""
        return float(self.dropout[name].p)  # type: ignore[arg-type]

    def remove_adapter(self, name: str) -> None:
        for params in (self.lora_A, self.lora_B, self.lora_magnitude, self.initial_A, self.initial_B):
            if name in params:
                del params[name]
        self.scaling.pop(name, None)
        if name in self.dropout:
            del self.dropout[name]

    def base_projection(self) -> Projection:
        raise TypeError(f"{type(self).__name__} does not say how its base layer projects")

    def projection_of(self, names: tuple[str, ...]) -> Projection:
        """The base with these adapters as one projection: A's stacked, scaled B's side by side."""
        base = self.base_projection()
        if not names:
            return base
        if len(names) == 1 and names[0] not in self.initial_A:
            (name,) = names
            magnitude = self.lora_magnitude.get(name)
            return Projection(*base[:2], self.lora_A[name], self.lora_B[name], self.scaling[name], magnitude)
        lora_A, lora_B = zip(*(pair for name in names for pair in self._scaled_pairs(name)), strict=True)
        magnitude = self.lora_magnitude.get(names[0])
        return Projection(*base[:2], torch.cat(lora_A, dim=-2), torch.cat(lora_B, dim=-1), 1.0, magnitude)

    def plain_pair(self, name: str, whole: Callable[[Tensor], Tensor] = lambda t: t) -> tuple[Tensor, Tensor]:
        """A and B of a plain adapter with the same update; PiSSA's and OLoRA's have twice the rank, [A; A0], [B, -B0].

        Detached, of the layer's own dtype: [r, in_features] and [out_features, r].

        Args:
            whole: what makes a whole tensor of a sharded one.
        """
        lora_A, lora_B = whole(self.lora_A[name].detach()), whole(self.lora_B[name].detach())
        if name in self.initial_A:
            lora_A = torch.cat([lora_A, whole(self.initial_A[name].detach())])
            lora_B = torch.cat([lora_B, -whole(self.initial_B[name].detach())], dim=1)
        return lora_A, lora_B

    def _scaled_pairs(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.lora_A[name], self.scaling[name] * self.lora_B[name]
        if name in self.initial_A:
            yield self.initial_A[name], -self.scaling[name] * self.initial_B[name]

    def groups(self) -> list[tuple[str, ...]]:
        """The active adapters, those together that one projection can carry: same dropout and no DoRA."""
        groups: list[tuple[str, ...]] = []
        for name in self.active if self.enabled and self.merged is None else ():
            if name not in self.lora_A:
                continue
            alone = name in self.lora_magnitude or not groups or groups[-1][0] in self.lora_magnitude
            if alone or self.dropout_rate(name) != self.dropout_rate(groups[-1][0]):
                groups.append((name,))
            else:
                groups[-1] += (name,)
        return groups

    def updates(self) -> list[Update]:
        """The terms of the output, the first with the base; more than one only for mixed dropout or DoRA."""
        groups = self.groups()
        if not groups:
            self.tell_if_merged()
            return [Update(self.base_projection(), None)]
        rates = [self.dropout_rate(group[0]) if self.training else 0.0 for group in groups]
        seed = (self.mask_seed.draw() if self.leads_mask else self.mask_seed.reuse()) if any(rates) else 0
        return [
            Update(self.projection_of(group), Dropout(p, seed, self.mask_stream) if p else None)
            for group, p in zip(groups, rates, strict=True)
        ]

    def tell_if_merged(self) -> None:
        """Warns where a training step is under way that cannot reach the adapters: they are in the frozen weight."""
        training = self.training and self.enabled and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if training and self.merged is not None:
            warnings.warn(
                f"the model is in training mode, but its adapters ({', '.join(self.merged.adapters)}) are merged: they "
                "get no gradient and do not train. Call lora.for_training or lora.unmerge to train them, "
                "lora.for_inference to use the model as it is.",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        state = f", merged={self.merged.adapters}" if self.merged else ""
        ranks = ", ".join(f"{name}: r={self.lora_A[name].shape[-2]}" for name in self.adapter_names)
        return f"{ranks}, active={self.active}{state}"


class LoRALinear(AdapterLayer):
    """h = W x + b + Σ scaling · B A D(x) over the active adapters."""

    is_head = False  # set by `inject` on a model's output head

    @property
    def weight(self) -> Any:
        """The base layer's weight; of an output head in training with a warning, as whoever takes it for a loss of
        their own (TRL's trainers) leaves the adapter out."""
        if self.is_head and self.training and torch.is_grad_enabled() and self.groups():
            warnings.warn(
                f"the weight of the output head is read past its adapter {', '.join(self.active)}: a loss that "
                "multiplies by it, as TRL's trainers do, neither uses nor trains that adapter. Leave the head out of "
                "target_modules, name it in modules_to_save, or train with `lora train`.",
                stacklevel=2,
            )
        return self.base_layer.weight

    @property
    def in_features(self) -> int:
        return linear_shape(self.base_layer)[1]

    @property
    def out_features(self) -> int:
        return linear_shape(self.base_layer)[0]

    def base_projection(self) -> Projection:
        base = self.base_layer
        if isinstance(base, NF4Linear):
            return base.projection()
        return Projection(base.weight.T if is_conv1d(base) else base.weight, base.bias)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.updates()
        h: Tensor = dispatch.ops.lora_linear(x, first.projection, dropout=first.dropout)
        for projection, dropout in others:  # each adds what it changes: its output less the base's
            adapted = dispatch.ops.lora_linear(x, projection, dropout=dropout)
            h = h + (adapted - dispatch.ops.lora_linear(x, self.base_projection()))
        return h


class LoRAEmbedding(AdapterLayer):
    """h = W[ids] + Σ scaling · (Aᵀ[ids]) Bᵀ over the active adapters; no dropout, as in PEFT."""

    @property
    def num_embeddings(self) -> int:
        return int(self.base_layer.num_embeddings)

    @property
    def embedding_dim(self) -> int:
        return int(self.base_layer.embedding_dim)

    @property
    def padding_idx(self) -> Any:
        return self.base_layer.padding_idx

    def base_projection(self) -> Projection:
        return Projection(self.base_layer.weight)

    def forward(self, ids: Tensor) -> Tensor:
        first, *others = self.updates()
        h: Tensor = self._look_up(ids, first.projection)
        for projection, _ in others:
            h = h + (self._look_up(ids, projection) - self._look_up(ids, self.base_projection()))
        scale = getattr(self.base_layer, "embed_scale", None)  # Gemma multiplies its embeddings by a constant
        return h if scale is None else h * torch.as_tensor(scale).to(h.dtype)

    def _look_up(self, ids: Tensor, projection: Projection) -> Tensor:
        return cast(Tensor, dispatch.ops.lora_embedding(ids, projection, padding_idx=self.padding_idx))


class LoRAParameter(AdapterLayer):
    """W' = W + Σ scaling · B A for one parameter of a module that is no linear layer: experts, a router.

    W is [experts, out_features, in_features] (its last two the other way round where the module says `is_transposed`),
    or [out_features, in_features]. Each expert has factors of its own: A [experts, r, in_features], B [experts,
    out_features, r]. The module multiplies by W itself, so it is called with W' in W's place, as PEFT does it: there
    is no dropout and no DoRA, and in training W' and its gradient are there while the module runs, each as large as W.
    FLOPs: 2·experts·out·in·r more for W', twice that in the backward.

    Wrappers for several parameters of one module lie around each other.
    """

    def __init__(self, base_layer: nn.Module, parameter: str) -> None:
        super().__init__(base_layer)
        self.parameter = parameter

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not there yet
                raise
            return getattr(self.base_layer, name)  # model code may read what the module says of itself

    @property
    def chain(self) -> list[LoRAParameter]:
        """This wrapper and those inside it, from the outside in."""
        inner = self.base_layer
        return [self, *(inner.chain if isinstance(inner, LoRAParameter) else ())]

    @property
    def owner(self) -> Any:
        return self.chain[-1].base_layer

    @property
    def transposed(self) -> bool:
        """Whether W is stored as [experts, in_features, out_features]."""
        weight = self.owner.get_parameter(self.parameter)
        return weight.dim() == 3 and bool(getattr(self.owner, "is_transposed", False))

    def base_projection(self) -> Projection:
        weight = self.owner.get_parameter(self.parameter)
        return Projection(weight.mT if self.transposed else weight)

    def adapted(self) -> Tensor:
        """W' as the module stores W, and in W's dtype, autocast or not: the factors are cast to it."""
        (group,) = self.groups()
        weight, _, lora_A, lora_B, scaling, _ = self.projection_of(group)
        if lora_A is None or lora_B is None or not isinstance(weight, Tensor):
            raise TypeError("an active adapter has A and B, and NF4 holds matrices only")
        add = torch.addmm if weight.dim() == 2 else torch.baddbmm
        kind = weight.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            adapted = add(weight, lora_B.to(weight.dtype), lora_A.to(weight.dtype), alpha=scaling)
        return adapted.mT if self.transposed else adapted

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapted = {layer.parameter: layer.adapted() for layer in self.chain if layer.groups()}
        if not adapted:
            self.tell_if_merged()
        return functional_call(self.owner, adapted, args, kwargs) if adapted else self.owner(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"parameter={self.parameter}, {super().extra_repr()}"


class SavedModule(nn.Module):
    """A module trained in full beside the adapters: a copy for each adapter that asks for one."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.copies = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.train(base_layer.training)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return tuple(self.copies.keys())

    def activate(self, names: tuple[str, ...]) -> None:
        """As `AdapterLayer.activate`."""
        for name in {*self.active, *names} & self.copies.keys():
            self.copies[name].requires_grad_(name in names)
        self.active = names

    def rest(self, name: str) -> None:
        """As `AdapterLayer.rest`."""
        if name in self.copies:
            self.copies[name].requires_grad_(False)

    @property
    def current(self) -> nn.Module:
        """The active adapter's copy, or the base module."""
        names = [name for name in self.active if name in self.copies] if self.enabled else []
        return self.copies[names[0]] if names else self.base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.current, name)  # model code may read `.weight` of an output head

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current(*args, **kwargs)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer that stores its weight as [in_features, out_features]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_shape(module: Any) -> tuple[int, int]:
    """(out_features, in_features) of any linear base layer."""
    if is_conv1d(module):
        nx, nf = module.weight.shape
        return int(nf), int(nx)
    return int(module.out_features), int(module.in_features)


def base_of(module: nn.Module) -> Any:
    """The base module, whether it is wrapped or not."""
    if isinstance(module, AdapterLayer):
        return module.owner
    return module.base_layer if isinstance(module, SavedModule) else module


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Every adapted layer with its path, or that of the parameter it adapts; a layer shared by two paths comes once."""
    for path, module in model.named_modules():
        if isinstance(module, LoRAParameter):
            yield f"{OUTER.sub('', path)}.{module.parameter}", module
        elif isinstance(module, AdapterLayer):
            yield path, module


def wrappers(model: nn.Module) -> list[AdapterLayer | SavedModule]:
    """Every adapted layer and saved module once, in no order and without paths: a quick way to reach all of them.

    `named_modules` takes milliseconds, this some 50 µs, because it does not visit what is in each layer: for every
    adapter that there is, a module that holds its dropout.
    """
    found: dict[AdapterLayer | SavedModule, None] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, AdapterLayer):
            found[module] = None
            if isinstance(module, LoRAParameter):  # the others are around modules without children
                waiting.append(module.base_layer)
        elif module is not None and module._modules:
            if isinstance(module, SavedModule):
                found[module] = None
            waiting += module._modules.values()
    return list(found)


def saved_modules(model: nn.Module) -> Iterator[tuple[str, SavedModule]]:
    """Every module that is trained in full, with its path."""
    for path, module in model.named_modules():
        if isinstance(module, SavedModule):
            yield path, module
