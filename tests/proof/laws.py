"""What the proofs share: how many examples, one run of a case, and the laws that hold for every operation on tokens.

A law compares two runs that must agree: bit for bit where floating-point arithmetic makes it so (a factor of two is
exact, the same work on the same bits is the same), else to the two runs' bounds.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from lora.fast.runtime import interpreting
from lora.projection import NF4Weight, Projection
from lora.testing.cases import laid
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
        dys = {name: dy.cpu() for name, dy in self.dys.items()}
        bounds = self.case.bounds(mapped(self.arguments, on_cpu), dys)
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
                assert_same_bits(found[name], expected, name)
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
