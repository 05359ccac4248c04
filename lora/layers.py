"""The modules `inject` puts in place of frozen ones: they hold parameters and hand them to an operation.

    LoRALinear      around nn.Linear, transformers' Conv1D, or NF4Linear
    LoRAEmbedding   around nn.Embedding
    SavedModule     around a module that is trained in full (modules_to_save)

The wrapped module stays untouched as `base_layer`: its parameters keep their identity, and `eject` puts it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lora import dispatch
from lora.nf4_layer import NF4Linear
from lora.projection import Dropout, Projection


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

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ParameterDict()  # name -> [r, in_features]
        self.lora_B = nn.ParameterDict()  # name -> [out_features, r]
        self.lora_magnitude = nn.ParameterDict()  # name -> [out_features], DoRA
        self.initial_A = nn.ParameterDict()  # what a PiSSA or OLoRA adapter started from, frozen: taken off again,
        self.initial_B = nn.ParameterDict()  # so that its update is s (B A - B0 A0) and W stays as it is
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged: Merged | None = None
        self.mask_seed, self.leads_mask, self.mask_stream = MaskSeed(), True, 0
        self.train(base_layer.training)

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

    def remove_adapter(self, name: str) -> None:
        for params in (self.lora_A, self.lora_B, self.lora_magnitude, self.initial_A, self.initial_B):
            if name in params:
                del params[name]
        self.scaling.pop(name, None)
        self.dropout.pop(name, None)

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
        return Projection(*base[:2], torch.cat(lora_A), torch.cat(lora_B, dim=1), 1.0, magnitude)

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
            if alone or self.dropout[name] != self.dropout[groups[-1][0]]:
                groups.append((name,))
            else:
                groups[-1] += (name,)
        return groups

    def updates(self) -> list[Update]:
        """The terms of the output, the first with the base; more than one only for mixed dropout or DoRA."""
        groups = self.groups()
        if not groups:
            return [Update(self.base_projection(), None)]
        rates = [self.dropout[group[0]] if self.training else 0.0 for group in groups]
        seed = (self.mask_seed.draw() if self.leads_mask else self.mask_seed.reuse()) if any(rates) else 0
        return [
            Update(self.projection_of(group), Dropout(p, seed, self.mask_stream) if p else None)
            for group, p in zip(groups, rates, strict=True)
        ]

    def extra_repr(self) -> str:
        state = f", merged={self.merged.adapters}" if self.merged else ""
        ranks = ", ".join(f"{name}: r={self.lora_A[name].shape[0]}" for name in self.adapter_names)
        return f"{ranks}, active={self.active}{state}"


class LoRALinear(AdapterLayer):
    """h = W x + b + Σ scaling · B A D(x) over the active adapters."""

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


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Every adapted layer with its path; a layer shared by two paths comes once."""
    for path, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            yield path, module


def saved_modules(model: nn.Module) -> Iterator[tuple[str, SavedModule]]:
    """Every module that is trained in full, with its path."""
    for path, module in model.named_modules():
        if isinstance(module, SavedModule):
            yield path, module
