"""LoRAConfig: every choice of an adapter, its default and its check, with PEFT's field names and meanings."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lora.errors import LoRAError, did_you_mean

INITIALISATIONS = ("gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "loftq")
Number = TypeVar("Number", int, float)
BIASES = ("none", "all", "lora_only")
SMALLEST_DROPOUT = 1 / 65536  # dropout probabilities are multiples of this: see lora.reference.dropout


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt, how, and how to start.

    Fields:
        r: rank of the update, >= 1.
        lora_alpha: the update is scaled by alpha / r (`use_rslora`: alpha / sqrt(r), Kalajdzievski 2023).
        target_modules: which modules: "all-linear" (every linear layer but the output head); any other string is
            a regular expression that must match a module's whole path; a list entry is a whole path or its end.
        lora_dropout: probability in [0, 1) of dropping an element of the adapter's input while training.
        bias: which biases train: "none", "lora_only" (the adapted modules') or "all" (the model's).
        use_dora: train each row's magnitude apart from its direction (Liu et al. 2024).
        init_lora_weights: True (Kaiming A, zero B), "gaussian" (normal A of deviation 1/r, zero B),
            "orthogonal" (A and B non-zero with B A = 0), "pissa" or "pissa_niter_N" (Meng et al. 2024; exact SVD or
            N power iterations), "olora" (Büyükakyüz 2024), "loftq" (Li et al. 2023; quantises the base to NF4).
            False starts from a random B, so that an untrained adapter changes something: for tests.
        rank_pattern, alpha_pattern: a rank or alpha of their own for modules whose path ends in the key, a regular
            expression; the first that matches wins.
        exclude_modules: modules left out, in `target_modules`' notation.
        layers_to_transform: only these layer numbers; `layers_pattern` names the list they are counted in.
        modules_to_save: modules trained in full, beside the adapters, and saved with them.
        target_parameters: parameters, by a whole path or its end, of modules that are no linear layers: a mixture's
            stacked experts ("experts.gate_up_proj"), a router ("gate.weight"). `exclude_modules` and
            `layers_to_transform` speak of modules only, as in PEFT; `target_modules` may then be empty.

    Raises: LoRAError that names the field, what was found, and what is expected.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] = "all-linear"
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        _check_number("lora_alpha", self.lora_alpha)
        self._check_choices()
        self._check_dropout()
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters"):
            object.__setattr__(self, name, _checked_names(name, getattr(self, name)))
        if not self.target_modules and not self.target_parameters:
            raise LoRAError("target_modules is empty, expected at least one module name or 'all-linear'.")
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_number)):
            object.__setattr__(self, name, _checked_pattern(name, getattr(self, name), check))
        self._check_layers()

    def _check_choices(self) -> None:
        if self.bias not in BIASES:
            raise LoRAError(f"bias is {self.bias!r}, expected one of {', '.join(map(repr, BIASES))}.")
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise LoRAError(f"{name} is {getattr(self, name)!r}, expected True or False.")
        init = self.init_lora_weights
        known = isinstance(init, bool) or (init in INITIALISATIONS and init != "pissa_niter_N")
        if not known and not (isinstance(init, str) and re.fullmatch(r"pissa_niter_[1-9]\d*", init)):
            raise LoRAError(
                f"init_lora_weights is {init!r}, expected True, False or one of "
                f"{', '.join(map(repr, INITIALISATIONS))}.{did_you_mean(str(init), INITIALISATIONS)}"
            )

    def _check_dropout(self) -> None:
        p = self.lora_dropout
        if not _is_number(p) or not 0 <= p < 1:
            raise LoRAError(f"lora_dropout is {p!r}, expected a number in [0, 1): 1 would drop the adapter itself.")
        if 0 < p < SMALLEST_DROPOUT or round(p / SMALLEST_DROPOUT) * SMALLEST_DROPOUT >= 1:
            raise LoRAError(f"lora_dropout is {p!r}, too near 0 or 1 for masks counted in steps of 1/65536.")

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None:
            if self.layers_pattern:
                raise LoRAError(
                    f"layers_pattern is {self.layers_pattern!r} but layers_to_transform is None: "
                    "give the layer numbers too, or drop the pattern."
                )
            return
        numbers = (layers,) if isinstance(layers, int) else layers
        if not isinstance(numbers, (list, tuple, range)):
            raise LoRAError(f"layers_to_transform is {layers!r}, expected an int or a list of ints.")
        if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
            raise LoRAError(f"layers_to_transform is {layers!r}, expected one or more layer numbers >= 0.")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise LoRAError(
                f"layers_to_transform={layers!r} cannot narrow target_modules={self.target_modules!r}, a regular "
                "expression: write the layer numbers into the expression, or list the module names."
            )
        object.__setattr__(self, "layers_to_transform", tuple(numbers))

    def rank_of(self, path: str) -> int:
        """The rank of the module at `path`: the first `rank_pattern` key that matches its end, else r."""
        return _first_match(self.rank_pattern, path, self.r)

    def alpha_of(self, path: str) -> float:
        """The alpha of the module at `path`: the first `alpha_pattern` key that matches its end, else lora_alpha."""
        return _first_match(self.alpha_pattern, path, self.lora_alpha)

    def scaling_of(self, path: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA, of the module at `path`."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def replace(self, **changes: Any) -> LoRAConfig:
        """A copy with some fields changed, checked like a new one."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple):
                value = list(value)
            out[f.name] = dict(value) if isinstance(value, Mapping) else value
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoRAConfig:
        """The inverse of `to_dict`; an unknown field is an error that suggests the nearest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise LoRAError(
                    f"LoRAConfig has no field {name!r}.{did_you_mean(name, known)} The fields are: {', '.join(known)}."
                )
        return cls(**values)


def matches(names: str | Sequence[str] | None, path: str) -> bool:
    """Whether `path` is named: by a regular expression as a whole, or by a list entry exactly or as its end."""
    if names is None:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith("." + name) for name in names)


def layer_number(path: str, patterns: str | Sequence[str] | None) -> int | None:
    """The number of the layer `path` lies in: `model.layers.3.mlp.up_proj` -> 3; None outside any layer list."""
    names = (patterns,) if isinstance(patterns, str) else tuple(patterns or ())
    for name in names or (r"[^.]+",):
        found = re.match(rf"(?:.*?\.)?(?:{name})\.(\d+)\.", path)
        if found:
            return int(found.group(1))
    return None


def key_matches(key: str, path: str) -> bool:
    """Whether a `rank_pattern` or `alpha_pattern` key, a regular expression, matches the end of `path`."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def _first_match(pattern: Mapping[str, Number], path: str, default: Number) -> Number:
    return next((value for key, value in pattern.items() if key_matches(key, path)), default)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_rank(name: str, rank: object) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise LoRAError(f"{name} is {rank!r}, expected an integer >= 1.")


def _check_number(name: str, value: object) -> None:
    if not _is_number(value) or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise LoRAError(f"{name} is {value!r}, expected a finite number > 0.")


def _checked_names(field_name: str, names: object) -> str | tuple[str, ...] | None:
    """A regular expression that compiles, or a tuple of names."""
    if names is None and field_name != "target_modules":
        return None
    if isinstance(names, str):
        if field_name in ("modules_to_save", "target_parameters"):
            raise LoRAError(f"{field_name} is the string {names!r}, expected a list of names: [{names!r}].")
        _check_expression(field_name, names)
        return names
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(n, str) and n for n in names):
        raise LoRAError(f"{field_name} is {names!r}, expected a string or a list of module names.")
    return tuple(sorted(names)) if isinstance(names, (set, frozenset)) else tuple(names)


def _checked_pattern(field_name: str, pattern: object, check: Any) -> dict[str, Any]:
    if not isinstance(pattern, Mapping):
        raise LoRAError(f"{field_name} is {pattern!r}, expected a mapping from a regular expression to a value.")
    for key, value in pattern.items():
        if not isinstance(key, str):
            raise LoRAError(f"{field_name} has the key {key!r}, expected a module name or a regular expression.")
        _check_expression(field_name, key)
        check(f"{field_name}[{key!r}]", value)
    return dict(pattern)


def _check_expression(field_name: str, expression: str) -> None:
    if not expression:
        raise LoRAError(f"{field_name} is an empty string, expected a module name or a regular expression.")
    try:
        re.compile(expression)
    except re.error as error:
        raise LoRAError(f"{field_name} {expression!r} is not a regular expression: {error}.") from None
