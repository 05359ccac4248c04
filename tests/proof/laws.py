"""What the proofs share: how many examples, one run of a case, and the laws that hold for more than one operation.

A law compares two runs that must agree: bit for bit where floating-point arithmetic makes it so (a factor of two is
exact, the same work on the same bits is the same), else to the two runs' bounds.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cached_property
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from lora.fast.runtime import interpreting
from lora.projection import NF4Weight, Projection
from lora.reference.dora import dora_gain
from lora.reference.merge import merge_weight
from lora.reference.nf4 import nf4_dequantize
from lora.testing.cases import Layer, laid
from lora.testing.proof import (
    BACKENDS,
    Arguments,
    Case,
    bits,
    build,
    leaves,
    mapped,
    named_outputs,
    on_cpu,
    results,
    upstream,
)
from lora.testing.report import assert_within

both = pytest.mark.parametrize("backend", list(BACKENDS))


def examples(count: int) -> settings:
    """`count` examples in plain torch; a few in the interpreter; LORA_PROOF_FACTOR times as many when exploring."""
    factor = float(os.environ.get("LORA_PROOF_FACTOR", "1")) * (0.15 if interpreting() else 1)
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=max(2, round(count * factor)), deadline=None, suppress_health_check=slow)


class Run:
    """A case on one backend: its arguments, the gradients of its outputs, its results and their bounds."""

    def __init__(self, case: Case, backend: str, device: str) -> None:
        self.case, self.backend, self.device = case, BACKENDS[backend], device
        self.arguments = build(case, device)
        with torch.no_grad():
            self.dys = upstream(case, named_outputs(case, BACKENDS["reference"], self.arguments), device)

    def results(self, arguments: Arguments | None = None, dys: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Outputs and gradients, of other arguments or for other dys where they are given."""
        arguments = self.arguments if arguments is None else arguments
        return results(self.case, self.backend, arguments, self.dys if dys is None else dys)

    @cached_property
    def found(self) -> dict[str, Tensor]:
        """The results of the case itself."""
        return self.results()

    @cached_property
    def bounds(self) -> dict[str, Tensor]:
        """The bound of each result."""
        return self.bounds_of(self.arguments)

    def bounds_of(self, arguments: Arguments) -> dict[str, Tensor]:
        """The bound of each result of other arguments."""
        dys = {name: dy.cpu() for name, dy in self.dys.items()}
        bounds = self.case.bounds(mapped(arguments, on_cpu), dys)
        return {name: self.case.bound_of(bounds[name]).reshape(value.shape) for name, value in self.found.items()}


def fresh(arguments: Arguments, **replaced: Any) -> Arguments:
    """The arguments with some of them replaced, every leaf its own again."""
    return mapped(arguments | replaced, leaf)


def leaf(value: Any) -> Any:
    """A tensor cut off from what it was made from; it trains if that did."""
    if isinstance(value, NF4Weight) or not value.is_floating_point():
        return value
    return value.detach().requires_grad_(value.requires_grad)


def with_parts(projection: Projection, **parts: Any) -> Projection:
    """The projection with some parts replaced, which train as those before did."""
    for name, part in parts.items():
        old = getattr(projection, name)
        if isinstance(part, Tensor):
            parts[name] = part.detach().requires_grad_(old is not None and old.requires_grad)
    return projection._replace(**parts)


def assert_same_bits(found: Tensor, expected: Tensor, name: str = "result") -> None:
    """Equal in every bit; zeros of either sign are equal."""
    assert found.shape == expected.shape and found.dtype == expected.dtype, name
    same = (bits(found) == bits(expected)) | (found == expected)
    assert bool(same.all()), f"{name} differs in {int((~same).sum())} of {same.numel()} elements"


def assert_all_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert_same_bits(value, expected[name], name)


def assert_scaled(found: Tensor, value: Tensor, factor: float, name: str = "result") -> None:
    """found = factor · value for a power of two: equal in every bit.

    But a number that is subnormal on the way to a result (the slope of a GELU far out) is rounded at the smallest
    number of its type, not at its own size: elements 38 orders of magnitude below the largest may differ by that much.
    """
    expected = value * factor
    assert found.shape == expected.shape and found.dtype == expected.dtype, name
    finite = expected[expected.isfinite()].double()
    room = finite.abs().max() * torch.finfo(found.dtype).tiny if finite.numel() else 0.0
    same = (bits(found) == bits(expected)) | ((found.double() - expected.double()).abs() <= room)
    assert bool(same.all()), f"{name} differs in {int((~same).sum())} of {same.numel()} elements"


def assert_agree(found: Tensor, expected: Tensor, bound: Tensor, name: str = "result") -> None:
    """Two computations of one thing: no further apart than their two bounds."""
    assert_within(found, expected, 2 * bound.cpu(), name)


# ---- laws of every case


def law_two_runs_are_the_same_bits(run: Run) -> None:
    """Nothing is drawn, nothing is left over from the run before, no sum depends on the moment."""
    assert_all_same_bits(run.results(), run.results())


def law_a_gradient_does_not_depend_on_who_else_wants_one(run: Run) -> None:
    """Each leaf alone gets the gradient, to the bound, that it gets among all."""
    for name, value in run.found.items():
        if not name.startswith("d") or name[1:] not in dict(leaves(run.arguments)):
            continue
        alone = fresh(run.arguments)
        for other, tensor in leaves(alone):
            tensor.requires_grad_(other == name[1:])
        found = run.results(alone)
        assert [key for key in found if key not in run.case.outputs] == [name]
        assert_agree(found[name], value, run.bounds[name], name)


def law_gradients_are_linear_in_dy(run: Run) -> None:
    """Twice the dy is twice the gradient, and -dy its negative: in every bit. (float16 has subnormals on the way.)"""
    for factor in (2.0, -1.0):
        found = run.results(dys={name: dy * factor for name, dy in run.dys.items()})
        for name, value in run.found.items():
            expected = value if name in run.case.outputs else value * factor
            if run.case.dtype != torch.float16:
                assert_scaled(found[name], value, 1 if name in run.case.outputs else factor, name)
            assert_agree(found[name], expected, run.bounds[name] * abs(factor), name)


# ---- laws of operations whose tokens, or rows, do not see each other


def is_by_token(run: Run, name: str, tokens: frozenset[str] | set[str]) -> bool:
    """Whether a result has a row for each token: an output, or the gradient of an argument that has."""
    return name in run.case.outputs or (name.startswith("d") and name[1:] in tokens)


def rows_of(run: Run, tokens: set[str]) -> int:
    """How many rows the arguments named `tokens` have."""
    return next(len(run.arguments[name]) for name in sorted(tokens) if run.arguments.get(name) is not None)


def taken(run: Run, tokens: set[str], rows: Any) -> tuple[Arguments, dict[str, Tensor]]:
    """The case with some of its rows only: arguments, and the gradients of the outputs."""
    picked = {name: run.arguments[name] for name in tokens if run.arguments.get(name) is not None}
    chosen = {name: value.detach()[rows].requires_grad_(value.requires_grad) for name, value in picked.items()}
    return fresh(run.arguments, **chosen), {name: dy[rows] for name, dy in run.dys.items()}


def law_tokens_do_not_see_each_other(run: Run, tokens: set[str], seed: int, *, exact: bool = False) -> None:
    """Rows in another order: outputs and their own gradients in that order, all other gradients as they were."""
    count = rows_of(run, tokens)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    found = run.results(*taken(run, tokens, order.to(run.device)))
    for name, value in run.found.items():
        mine = is_by_token(run, name, tokens)
        expected, bound = (value[order.to(run.device)], run.bounds[name][order]) if mine else (value, run.bounds[name])
        if exact and mine:
            assert_same_bits(found[name], expected, name)
        assert_agree(found[name], expected, bound, name)


def law_a_batch_is_its_parts(run: Run, tokens: set[str], cut: int, *, exact: bool = False) -> None:
    """Outputs and their own gradients of two parts, side by side; other gradients added up: gradient accumulation."""
    count = rows_of(run, tokens)
    parts = [run.results(*taken(run, tokens, rows)) for rows in (slice(0, cut), slice(cut, count))]
    for name, value in run.found.items():
        first, second = (part[name] for part in parts)
        if is_by_token(run, name, tokens):
            joined = torch.cat([first, second])
            if exact:
                assert_same_bits(joined, value, name)
            assert_agree(joined, value, run.bounds[name], name)
        else:  # each part is rounded by itself: more than their sum is, where it cancels
            size = (first.double().abs() + second.double().abs()).cpu()
            room = run.bounds[name] + 2 * torch.finfo(value.dtype).eps * size
            assert_agree(first.double() + second.double(), value.double(), room, name)


def law_silent_tokens_teach_nothing(run: Run, tokens: set[str]) -> None:
    """Where dy is zero, the token's own gradient is exactly zero and the others' do not depend on it."""
    silent = {name: dy.clone() for name, dy in run.dys.items()}
    for dy in silent.values():
        dy[0] = 0
    found = run.results(dys=silent)
    without = run.results(*taken(run, tokens, slice(1, None)))
    for name, value in found.items():
        if name in run.case.outputs:
            continue
        if is_by_token(run, name, tokens):
            assert not value[0].any(), name
        else:
            size = without[name].double().abs().cpu()
            assert_agree(value, without[name], run.bounds[name] + torch.finfo(value.dtype).eps * size, name)


def law_memory_layout_does_not_matter(run: Run, names: set[str], *, exact: bool = False) -> None:
    """Arguments and dys from wider, strided or transposed memory."""
    for layout in ("offset", "strided", "transposed"):
        given = {name: run.arguments[name] for name in names if run.arguments.get(name) is not None}
        moved = {name: laid(t.detach(), layout).requires_grad_(t.requires_grad) for name, t in given.items()}
        dys = {name: laid(dy, layout) if dy.dim() else dy for name, dy in run.dys.items()}
        found = run.results(run.arguments | moved, dys)
        for name, value in run.found.items():
            if exact:
                assert_same_bits(found[name], value, f"{name} of {layout} arguments")
            assert_agree(found[name], value, run.bounds[name], f"{name} of {layout} arguments")


# ---- laws of operations on adapted projections


def part_of(name: str) -> str:
    """What a result is the gradient of, without the projection that has it: "dq.lora_A" is lora_A's."""
    return name.removeprefix("d").rsplit(".", 1)[-1]


def adapters_of(run: Run) -> dict[str, Projection]:
    """The arguments that are projections with an adapter."""
    return {n: p for n, p in run.arguments.items() if isinstance(p, Projection) and p.lora_A is not None}


def updating(layer: Layer) -> Layer:
    """The layer in float32, with an adapter that does something, without DoRA."""
    return replace(layer, rank=max(layer.rank, 1), scaling=layer.scaling or 1.5, dora=False, adapter_dtype=None)


def prefix_of(argument: str) -> str:
    """What the results of this projection's parts begin with."""
    return "d" if argument in ("projection", "head", "base") else f"d{argument}."


def law_the_update_depends_on_s_B_A_alone(run: Run) -> None:
    """Twice s and half of B is the same update, and so is twice A: every bit, of float32 numbers without DoRA.

    Only the product s B A matters. That the update is linear in it is `law_the_update_is_linear`'s to say.
    """
    assert run.case.dtype == torch.float32 and all(p.magnitude is None for p in adapters_of(run).values())
    halved = {
        n: with_parts(p, lora_B=p.lora_B / 2)._replace(scaling=2 * p.scaling) for n, p in adapters_of(run).items()
    }
    doubled = {n: with_parts(p, lora_A=p.lora_A * 2, lora_B=p.lora_B / 2) for n, p in adapters_of(run).items()}
    for changes, factors in ((halved, {"lora_B": 2}), (doubled, {"lora_A": 0.5, "lora_B": 2})):
        found = run.results(fresh(run.arguments, **changes))
        for name, value in run.found.items():
            factor = 1 if name in run.case.outputs else factors.get(part_of(name), 1)
            assert_scaled(found[name], value, factor, name)


def law_the_update_is_linear(run: Run, *arguments: str) -> None:
    """h(2s) - h(0) = 2 (h(s) - h(0)), and the same of lora_B for s: to the bounds of three runs.

    So are all gradients, of which those of lora_A, and of lora_B for s, are zero at zero. Of no update at all this
    is true, too: so in the outputs and in dx there is one, beyond all roundings.

    arguments: the projections, without DoRA, in which all results are linear; "" where scaling and lora_B are arguments
        of their own.
    """

    def times(factor: float, part: str) -> Arguments:
        if arguments == ("",):
            old = run.arguments[part]
            return fresh(run.arguments, **{part: (old.detach() * factor).requires_grad_(old.requires_grad)})
        chosen = {n: p for n, p in adapters_of(run).items() if n in arguments}
        assert len(chosen) == len(arguments) and all(p.magnitude is None for p in chosen.values())
        if part == "scaling":
            return fresh(run.arguments, **{n: p._replace(scaling=p.scaling * factor) for n, p in chosen.items()})
        return fresh(run.arguments, **{n: with_parts(p, lora_B=p.lora_B * factor) for n, p in chosen.items()})

    prefixes = ["d" if name == "" else prefix_of(name) for name in arguments]
    for part in ("scaling", "lora_B"):
        zero = {prefix + name for prefix in prefixes for name in ("lora_A", "lora_B") if name != part}
        none, twice = times(0, part), times(2, part)
        without, doubled = run.results(none), run.results(twice)
        rooms = run.bounds_of(none), run.bounds_of(twice)
        for name, once in run.found.items():
            base = without[name].double()
            moved, further = once.double() - base, doubled[name].double() - base
            room = run.bounds[name] + rooms[0][name]
            assert_within(
                further, 2 * moved, rooms[1][name] + 2 * run.bounds[name] + rooms[0][name], f"{name} of 2 {part}"
            )
            assert name not in zero or not without[name].any(), f"{name} without {part}"
            if name in run.case.outputs or name == "dx":
                assert bool((moved.abs().cpu() > room).any()), f"{name} has no update"


def law_ranks_can_be_padded(run: Run) -> None:
    """Zero rows of A and zero columns of B change nothing, and get a gradient of exactly zero."""
    wide, ranks = {}, {}
    for name, p in adapters_of(run).items():
        A = torch.cat([p.lora_A.detach(), p.lora_A.detach().new_zeros(3, p.lora_A.shape[1])])
        B = torch.cat([p.lora_B.detach(), p.lora_B.detach().new_zeros(p.lora_B.shape[0], 3)], 1)
        wide[name], ranks[prefix_of(name)] = with_parts(p, lora_A=A, lora_B=B), len(p.lora_A)
    found = run.results(fresh(run.arguments, **wide))
    for prefix, r in ranks.items():
        for name, dim in ((f"{prefix}lora_A", 0), (f"{prefix}lora_B", 1)):
            if name in found:
                assert not found[name].narrow(dim, r, 3).any(), name
                found[name] = found[name].narrow(dim, 0, r)
    for name, value in run.found.items():
        assert_agree(found[name], value, run.bounds[name], name)


def signed_permutation(r: int, seed: int) -> Tensor:
    """An orthogonal matrix [r, r] with which every product is exact."""
    generator = torch.Generator().manual_seed(seed)
    order, sign = torch.randperm(r, generator=generator), torch.randint(0, 2, (r,), generator=generator) * 2 - 1
    Q = torch.zeros(r, r, dtype=torch.float64)
    Q[torch.arange(r), order] = sign.double()
    return Q


def law_the_basis_of_the_rank_does_not_matter(run: Run, seed: int) -> None:
    """A → QA, B → BQᵀ with a signed permutation Q: dA → Q dA, dB → dB Qᵀ, and everything else stays."""
    turns: dict[str, Any] = {}
    turned = {}
    for name, p in adapters_of(run).items():
        Q = signed_permutation(len(p.lora_A), seed)
        turns[f"{prefix_of(name)}lora_A"] = lambda t, Q=Q: Q.to(t.device, t.dtype) @ t
        turns[f"{prefix_of(name)}lora_B"] = lambda t, Q=Q: t @ Q.to(t.device, t.dtype).T
        A, B = (turns[f"{prefix_of(name)}{part}"](getattr(p, part).detach()) for part in ("lora_A", "lora_B"))
        turned[name] = with_parts(p, lora_A=A, lora_B=B)
    found = run.results(fresh(run.arguments, **turned))
    for name, value in run.found.items():
        turn = turns.get(name, lambda t: t)
        assert_agree(found[name], turn(value), turn(run.bounds[name]).abs(), name)


def law_several_adapters_are_one(run: Run, argument: str, split: int) -> None:
    """A's stacked and B's side by side: what is linear in this projection adds up, and each gets its own gradients.

    Adapter 1 and adapter 2 less none is both; the gradients of A and B are those that each adapter gets alone.
    """
    p = run.arguments[argument]
    parts = (slice(0, split), slice(split, len(p.lora_A)))
    pieces = [with_parts(p, lora_A=p.lora_A.detach()[r], lora_B=p.lora_B.detach()[:, r]) for r in parts]
    alone = [run.results(fresh(run.arguments, **{argument: piece})) for piece in pieces]
    base = run.results(fresh(run.arguments, **{argument: p._replace(lora_A=None, lora_B=None, magnitude=None)}))
    for name, value in run.found.items():
        if name == f"{prefix_of(argument)}lora_A":
            together = torch.cat([part[name] for part in alone]).double()
        elif name == f"{prefix_of(argument)}lora_B":
            together = torch.cat([part[name] for part in alone], 1).double()
        else:
            together = alone[0][name].double() + alone[1][name].double() - base[name].double()
        assert_agree(together, value.double(), run.bounds[name] * 2, name)  # four runs, each within one


def merged_projection(p: Projection, dtype: torch.dtype) -> tuple[Projection, Tensor]:
    """The projection with its adapter merged into its weight, and how far one rounding of that may be: [out, in]."""
    merged = merge_weight(Projection(*(part.detach() if isinstance(part, Tensor) else part for part in p)))
    u = torch.finfo(p.weight.dtype).eps  # of NF4: of the type it decodes to
    sizes = Projection(*(part.detach().double().abs() if isinstance(part, Tensor) else part for part in p))
    if isinstance(p.weight, NF4Weight):
        sizes = sizes._replace(weight=nf4_dequantize(p.weight, torch.float64).abs())
    W = merge_weight(sizes._replace(magnitude=None, scaling=abs(p.scaling))).cpu()  # |W| + s |B||A|
    gain = torch.ones(1) if p.magnitude is None else dora_gain(*p[0:1], *p[2:])
    largest = gain.detach().double().cpu().clamp(min=1)[:, None]
    error = 2 * u * W * largest + torch.finfo(p.weight.dtype).smallest_normal
    return Projection(merged.to(dtype), p.bias), error


def law_an_nf4_weight_is_the_dense_weight_it_decodes_to(run: Run, *, exact: bool = False) -> None:
    """exact: in every bit, where both weights are multiplied in one way."""
    quantised = {
        n: p for n, p in run.arguments.items() if isinstance(p, Projection) and isinstance(p.weight, NF4Weight)
    }
    assert quantised
    dense = {n: p._replace(weight=nf4_dequantize(p.weight, run.case.dtype)) for n, p in quantised.items()}
    found = run.results(fresh(run.arguments, **dense))
    for name, value in run.found.items():
        if exact:
            assert_same_bits(found[name], value, name)
        assert_agree(found[name], value, run.bounds[name], name)


def law_weights_that_lie_together_change_nothing(run: Run, apart: Run) -> None:
    """Rows of one matrix, or several matrices: the same numbers; `run` has them together."""
    for name, value in run.found.items():
        assert_agree(value, apart.found[name], apart.bounds[name], name)


def law_leading_dimensions_do_not_matter(run: Run, tokens: set[str]) -> None:
    """[2, 3, ...] is six tokens: the same bits."""
    given = {name: run.arguments[name] for name in tokens if run.arguments.get(name) is not None}
    flat = {name: t.detach().flatten(0, 1).requires_grad_(t.requires_grad) for name, t in given.items()}
    dys = {name: dy.flatten(0, 1) if dy.dim() > 1 else dy for name, dy in run.dys.items()}
    found = run.results(fresh(run.arguments, **flat), dys)
    for name, value in run.found.items():
        assert_same_bits(found[name].reshape(value.shape), value, name)


def law_gradients_are_those_of_finite_differences(run: Run) -> None:
    """Of every leaf that trains, in float64. DoRA's norm is a constant for the gradient, so its cases are others."""
    wanted = {name: tensor for name, tensor in leaves(run.arguments) if tensor.requires_grad}
    assert wanted and run.case.dtype == torch.float64

    def function(*tensors: Tensor) -> Any:
        return run.case.call(run.backend, with_leaves(run.arguments, dict(zip(wanted, tensors, strict=True))))

    assert torch.autograd.gradcheck(function, tuple(wanted.values()))


def with_leaves(arguments: Arguments, tensors: dict[str, Tensor]) -> Arguments:
    """The arguments with other tensors in the places of these leaves."""
    made: Arguments = {}
    for name, value in arguments.items():
        if isinstance(value, Projection):
            prefix = prefix_of(name).removeprefix("d")
            parts = {key: part for key, part in value._asdict().items() if isinstance(part, Tensor)}
            made[name] = value._replace(**{key: tensors.get(prefix + key, part) for key, part in parts.items()})
        else:
            made[name] = tensors.get(name, value)
    return made
