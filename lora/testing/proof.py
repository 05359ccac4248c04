"""The proof of one operation on one input: both backends against float64, by a derived bound and by each other.

A `Case` is an input that prints itself. It says how to build the arguments and what the bound is; everything else is
here. With err the largest error of a result against float64, every output and every gradient must satisfy

    |y - y64| ≤ bound                                   elementwise, the reference and the fast backend
    err(fast) ≤ 2 err(reference) + a few roundings      where the bound would let a much worse fast backend through
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

import lora.fast as fast
import lora.reference as reference
from lora.projection import NF4Weight, Projection
from lora.testing.bounded import SPREAD, Bounded
from lora.testing.bounds import Results
from lora.testing.report import LEDGER, Row, assert_within, without_bound

ROUNDINGS = 4  # that a fused operation may make in other places than the reference
BACKENDS = {"reference": reference, "fast": fast}
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One input of an operation; a subclass adds the fields that its arguments are a function of."""

    operation: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]]  # their names, in order; those at the end may be absent
    constants: ClassVar[tuple[str, ...]] = ()  # floating-point arguments that have no gradient by definition

    seed: int = 0
    dtype: torch.dtype = torch.float32
    frozen: frozenset[str] = frozenset()  # the leaves that take no gradient

    def arguments(self, make: Maker) -> Arguments:
        """The operation's arguments by name: tensors, projections, and plain values."""
        raise NotImplementedError

    def bounds(self, arguments: Arguments, dys: dict[str, Tensor]) -> Results:
        """The bound of each result, on the CPU; more results than are wanted do no harm."""
        raise NotImplementedError

    def call(self, backend: Any, arguments: Arguments) -> Any:
        """The operation."""
        return getattr(backend, self.operation)(**arguments)

    def gradient(self, shape: torch.Size, make: Maker) -> Tensor:
        """The gradient of an output: random, two-sided, never zero."""
        return make.normal(*shape)

    @property
    def repeats(self) -> bool:
        """Whether all tokens have one x or one dy: then their roundings are one, and only the worst case is a bound."""
        return False

    @property
    def boundless(self) -> bool:
        """Whether no element of some result may have a bound: what is divided by may be lost in rounding."""
        return False

    def bound_of(self, result: Bounded) -> Tensor:
        """The bound of one result, elementwise."""
        return result.worst.nan_to_num(nan=torch.inf, posinf=torch.inf) if self.repeats else result.bound()


class Maker:
    """Random tensors of one seed; in float64, then rounded, so that a case has about one value in every type."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str = "cpu") -> None:
        self.generator, self.dtype, self.device = torch.Generator().manual_seed(seed % 2**63), dtype, device

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Two-sided, of size `scale`, no element zero: what would be rounded to it is the smallest number there is."""
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale
        rounded = values.to(dtype or self.dtype)
        limits = torch.finfo(rounded.dtype)
        least = torch.full_like(rounded, limits.smallest_normal * limits.eps).copysign(values.to(rounded.dtype))
        return torch.where(rounded == 0, least, rounded).to(self.device)

    def positive(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform in [0.5, 1.5)."""
        values = torch.rand(*shape, generator=self.generator, dtype=torch.float64) + 0.5
        return values.to(dtype or self.dtype).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Uniform in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)


def leaves(arguments: Arguments) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors among the arguments by name; those of a `projection` by their own names."""
    for name, value in arguments.items():
        if isinstance(value, Projection):
            prefix = "" if name in ("projection", "head", "base") else f"{name}."
            for part, tensor in value._asdict().items():
                if isinstance(tensor, Tensor):
                    yield prefix + part, tensor
        elif isinstance(value, Tensor) and value.is_floating_point():
            yield name, value


def mapped(arguments: Arguments, change: Any) -> Arguments:
    """The arguments with every tensor, and every NF4 weight, put through `change`."""

    def one(value: Any) -> Any:
        if isinstance(value, Projection):
            return Projection(*(one(part) for part in value))
        return change(value) if isinstance(value, (Tensor, NF4Weight)) else value

    return {name: one(value) for name, value in arguments.items()}


def widened(value: Tensor | NF4Weight) -> Tensor:
    """The same numbers in float64; what trains, trains."""
    if isinstance(value, NF4Weight):
        return reference.nf4_dequantize(value, torch.float64)
    return value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value


def build(case: Case, device: str = "cpu") -> Arguments:
    """The case's arguments on a device, those that train requiring gradients."""
    arguments = case.arguments(Maker(case.seed, case.dtype, device))
    for name, leaf in leaves(arguments):
        leaf.requires_grad_(name not in (*case.frozen, *case.constants))
    return arguments


def named_outputs(case: Case, backend: Any, arguments: Arguments) -> dict[str, Tensor]:
    """The operation's outputs by name."""
    outputs = case.call(backend, arguments)
    return dict(zip(case.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=False))


def upstream(case: Case, outputs: dict[str, Tensor], device: str = "cpu") -> dict[str, Tensor]:
    """A gradient for each output."""
    make = Maker(case.seed + 1, case.dtype, device)
    return {name: case.gradient(output.shape, make) for name, output in outputs.items()}


def results(
    case: Case,
    backend: ModuleType,
    arguments: Arguments,
    dys: dict[str, Tensor] | None = None,
    absent: set[str] | None = None,
) -> dict[str, Tensor]:
    """The operation's outputs by name, and "d<leaf>" for every leaf that trains.

    absent: told the names of gradients that autograd does not give, which are zeros here.
    """
    named = named_outputs(case, backend, arguments)
    found = {name: output.detach() for name, output in named.items()}
    wanted = {name: leaf for name, leaf in leaves(arguments) if leaf.requires_grad}
    used = {name: output for name, output in named.items() if output.requires_grad}
    absent = set() if absent is None else absent
    if not used:  # an adapter that no row names, say, is no part of a reference's graph
        absent |= {f"d{name}" for name in wanted}
        return found | {f"d{name}": torch.zeros_like(leaf) for name, leaf in wanted.items()}
    if not wanted:
        return found
    if dys is None:
        dys = upstream(case, named, str(next(iter(used.values())).device))
    grads = torch.autograd.grad(
        list(used.values()),
        list(wanted.values()),
        [dys[n].to(o.dtype) for n, o in used.items()],
        allow_unused=True,
    )
    absent |= {f"d{name}" for name, grad in zip(wanted, grads, strict=True) if grad is None}
    each = zip(wanted.items(), grads, strict=True)
    return found | {f"d{name}": torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in each}


def assert_equivalent(case: Case, device: str = "cpu") -> None:
    """Both backends are right on this case.

    Raises: AssertionError that names the result, where it is wrong, by how much, and in units of its bound.
    """
    arguments = build(case, device)
    before = snapshot(arguments)
    truth_arguments = mapped(arguments, widened)
    with torch.no_grad():
        dys = upstream(case, named_outputs(case, reference, truth_arguments), device)
    truth = results(case, reference, truth_arguments, {name: dy.double() for name, dy in dys.items()})
    bounds = case.bounds(mapped(arguments, on_cpu), {name: dy.cpu() for name, dy in dys.items()})
    check_formulas(case, truth, bounds)
    without: dict[str, set[str]] = {"reference": set(), "fast": set()}
    plain = results(case, reference, arguments, dys, without["reference"])
    fused = results(case, fast, arguments, dys, without["fast"])
    assert_unchanged(arguments, before)
    if missing := without["fast"] - without["reference"]:  # an optimizer passes over what has none
        raise AssertionError(f"fast gives no {', '.join(sorted(missing))} where the reference gives zeros")
    for name, exact in truth.items():
        within(case, "reference", name, plain[name], exact, bounds)
        within(case, "fast", name, fused[name], exact, bounds)
        if fused[name].dtype != plain[name].dtype:
            raise AssertionError(f"{name} is {fused[name].dtype} from fast, {plain[name].dtype} from the reference")
        compared = assert_compared(case, name, bounds[name], exact)
        if not case.repeats:  # else one rounding more, the same for all tokens, may be all of the bound
            spread = bounds[name].variance.sqrt().reshape(exact.shape)
            assert_as_near(name, fused[name], plain[name], exact, spread, compared)


def within(case: Case, backend: str, name: str, found: Tensor, exact: Tensor, bounds: Results) -> None:
    """The first criterion, noted in the ledger; the truth has the bound's own error where both are in float64."""
    bound = case.bound_of(bounds[name]).reshape(exact.shape) * (2 if case.dtype == torch.float64 else 1)
    used = assert_within(found, exact, bound, f"{case.operation}: {backend}'s {name}")
    LEDGER.note(case.operation, backend, case.dtype, name, Row.of(used, exact, bound, found.dtype))


def assert_compared(case: Case, name: str, bounded: Bounded, exact: Tensor) -> Tensor:
    """Which elements have a bound; some of every result, or it was compared with nothing and must not pass for right.

    Raises: AssertionError where none has one, unless the case says that this may be.
    """
    open_ = without_bound(case.bound_of(bounded), bounded.dtype).reshape(exact.shape)
    if open_.numel() and bool(open_.all()) and not case.boundless:
        raise AssertionError(
            f"{case.operation}: all {open_.numel()} elements of {name} were compared with nothing, as their bounds are "
            f"infinite or beyond the numbers of {bounded.dtype}. Try another input, or let the case say that it is "
            "boundless."
        )
    return ~open_


def assert_as_near(name: str, found: Tensor, plain: Tensor, exact: Tensor, spread: Tensor, compared: Tensor) -> None:
    """The second criterion, for elements that have a bound.

    spread: a standard deviation of each; half of what the bound allows of it is allowed too, as the reference may be
    lucky on a few elements.
    """
    exact = exact.cpu()
    finite = (exact.abs() < torch.finfo(plain.dtype).max) & compared & spread.isfinite()
    if plain.dtype == torch.float64 or not finite.any():
        return
    errors = [torch.where(finite, (t.double().cpu() - exact).abs(), 0.0).nan_to_num(posinf=0.0) for t in (found, plain)]
    scale, deviation = float(exact[finite].abs().max()), SPREAD / 2 * float(spread[finite].max())
    allowed = 2 * float(errors[1].max()) + ROUNDINGS * torch.finfo(plain.dtype).eps * scale + deviation
    if float(errors[0].max()) > allowed:
        raise AssertionError(
            f"{name} from fast is wrong by {float(errors[0].max()):.3g}, from the reference by "
            f"{float(errors[1].max()):.3g}: more than twice as much and {ROUNDINGS} roundings of {scale:.3g}"
        )


def check_formulas(case: Case, truth: dict[str, Tensor], bounds: Results) -> None:
    """A bound belongs to the operation: its formula, in float64, is the reference's to a thousandth of itself."""
    for name, exact in truth.items():
        if name not in bounds:
            raise AssertionError(f"{type(case).__name__}.bounds says nothing about {name!r}; it has {sorted(bounds)}")
        b = bounds[name]
        room = (1e-3 if case.dtype != torch.float64 else 2.0) * case.bound_of(b)
        assert_within(b.value.reshape(exact.shape), exact, room.reshape(exact.shape), f"the bound's own {name}")


def on_cpu(value: Tensor | NF4Weight) -> Tensor | NF4Weight:
    """For the bound, which is computed on the CPU."""
    if isinstance(value, NF4Weight):
        return NF4Weight._make(part.cpu() if isinstance(part, Tensor) else part for part in value)
    return value.detach().cpu()


def snapshot(arguments: Arguments) -> list[Tensor]:
    """Copies of all tensors."""
    return [leaf.detach().clone() for _, leaf in leaves(arguments)]


def assert_unchanged(arguments: Arguments, before: list[Tensor]) -> None:
    """Callers' tensors are theirs: no operation wrote to one, bit for bit."""
    for (name, leaf), kept in zip(leaves(arguments), before, strict=True):
        if not torch.equal(bits(leaf), bits(kept)):
            raise AssertionError(f"the operation wrote to its caller's {name}")


def bits(tensor: Tensor) -> Tensor:
    """A floating-point tensor as integers: equal where all bits are, NaN included."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(whole[tensor.element_size()])


def changed(case: Any, **fields: Any) -> Any:
    """The case with other fields."""
    return dataclasses.replace(case, **fields)
