"""Numbers that know how wrong they may be: an operation's formula, written with these, derives its own error bound.

A `Bounded` is a tensor in float64 with two statements about any computation of the same thing in a narrower type:

    worst       |computed - value| is never more than this: every rounding at its largest, all in one direction
    variance    the expected square of computed - value: roundings as independent errors, random within their interval

and the bound is the smaller of what is certain and SPREAD standard deviations. The first is the tighter one where a
number was rounded once or twice, the second where many products were summed. `docs/numerics.md` derives the rules:

    rounding to a type   worst + u |y|                         variance + u² y² / 3         (uniform within ± u |y|)
    Σ of K products p    worst + K u Σ|p|                      variance + K u² (Σp² + s²) / 3        s = Σ p
    f(y)                 |f'| worst + |f''| worst² / 2         f'² variance

The third column is first order in u; the second keeps the products of two errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora.fast.runtime import interpreting

SPREAD = 6.0  # c: six deviations of a random walk, so that a right result fails once in some 10**8 elements


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: half the distance from 1 to the next number of `dtype`."""
    return torch.finfo(dtype).eps / 2


def rounding_of(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to `dtype` here: Triton's interpreter cuts bfloat16 off: 2u."""
    return unit_roundoff(dtype) * (2 if interpreting() and dtype == torch.bfloat16 else 1)


def floor_of(dtype: torch.dtype) -> float:
    """What rounding costs near zero: half a subnormal of float16; elsewhere subnormals may be flushed to zero."""
    if dtype == torch.float16:
        return torch.finfo(dtype).smallest_normal * unit_roundoff(dtype)
    return torch.finfo(dtype).smallest_normal


@dataclass(frozen=True)
class Bounded:
    """A value, and how far a computation of it in `dtype`, with sums in float32 or wider, may be from it."""

    value: Tensor  # float64, as the other two, and of one shape
    worst: Tensor
    variance: Tensor
    dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        """The type of sums and of arithmetic on single elements."""
        return torch.promote_types(self.dtype, torch.float32)

    def bound(self) -> Tensor:
        """The largest error that a right computation may make, elementwise.

        Where it has no limit (a DoRA row whose norm is lost in rounding) it is infinite, and so is what it is part of,
        even times zero, which is NaN until here.
        """
        return torch.minimum(self.worst, SPREAD * self.variance.sqrt()).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def _with(self, value: Tensor, worst: Tensor, variance: Tensor, error: Tensor | float) -> Bounded:
        """These, and one more rounding of at most `error`."""
        return Bounded(value, worst + error, variance + torch.as_tensor(error).square() / 3, self.dtype)

    def rounded(self, dtype: torch.dtype | None = None, over: Tensor | None = None) -> Bounded:
        """Stored in `dtype`, by default that of the tensors. over: sizes, where parts of it are rounded apart."""
        dtype = dtype or self.dtype
        size = self.value.abs() if over is None else over
        error = rounding_of(dtype) * (size + self.worst) + floor_of(dtype)
        return self._with(self.value, self.worst, self.variance, error)

    # ---- shapes: an error goes where its element goes

    def reshaped(self, change: Callable[[Tensor], Tensor]) -> Bounded:
        """`change`, a view or a choice of elements, of value and errors."""
        return Bounded(change(self.value), change(self.worst), change(self.variance), self.dtype)

    @property
    def T(self) -> Bounded:
        """Transposed."""
        return self.reshaped(lambda t: t.T)

    def __getitem__(self, index: Any) -> Bounded:
        return self.reshaped(lambda t: t[index])

    # ---- arithmetic, in `wide`

    def _other(self, other: Bounded | Tensor | float) -> Bounded:
        if isinstance(other, Bounded):
            return other
        return exact(torch.as_tensor(other, dtype=torch.float64), self.dtype)

    def __add__(self, other: Bounded | Tensor | float) -> Bounded:
        b = self._other(other)
        value = self.value + b.value
        return self._with(value, self.worst + b.worst, self.variance + b.variance, self._rounds(value))

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, self.worst, self.variance, self.dtype)

    def __sub__(self, other: Bounded | Tensor | float) -> Bounded:
        return self + (-self._other(other))

    def __mul__(self, other: Bounded | Tensor | float) -> Bounded:
        b = self._other(other)
        value = self.value * b.value
        worst = _product(torch.mul, self.value.abs(), self.worst, b.value.abs(), b.worst)
        variance = _product(torch.mul, self.value.square(), self.variance, b.value.square(), b.variance)
        smallest = torch.minimum(self.value.abs(), b.value.abs())
        lost = torch.where(smallest < floor_of(self.wide), value.abs(), 0.0)  # it may be taken for zero
        return self._with(value, worst, variance, self._rounds(value) + lost)

    def __matmul__(self, other: Bounded | Tensor) -> Bounded:
        """A matrix product whose sums are kept in `wide`, in any order, with or without fused multiply-add."""
        b, terms = self._other(other), self.value.shape[-1]
        a_size, b_size, u = self.value.abs(), b.value.abs(), unit_roundoff(self.wide)
        value, sizes = self.value @ b.value, a_size @ b_size
        squares = self.value.square() @ b.value.square()
        # operands and products below the normal range may be taken for zero
        flushed = floor_of(self.wide) * (a_size.sum(-1)[..., None] + b_size.sum(-2)[..., None, :] + 2 * terms)
        worst = _product(torch.matmul, a_size, self.worst, b_size, b.worst) + terms * u * sizes + flushed
        variance = _product(torch.matmul, self.value.square(), self.variance, b.value.square(), b.variance)
        variance = variance + terms * u * u * (squares + value.square()) / 3 + flushed.square()
        return Bounded(value, worst, variance, self.dtype)

    def sum(self, dim: int, keepdim: bool = False) -> Bounded:
        """Summed over one dimension, in any order."""
        terms, u = self.value.shape[dim], unit_roundoff(self.wide)
        value, sizes = self.value.sum(dim, keepdim), self.value.abs().sum(dim, keepdim)
        squares = self.value.square().sum(dim, keepdim)
        worst = self.worst.sum(dim, keepdim) + terms * u * sizes + floor_of(self.wide)
        variance = self.variance.sum(dim, keepdim) + terms * u * u * (squares + value.square()) / 3
        return Bounded(value, worst, variance + floor_of(self.wide) ** 2, self.dtype)

    def mean(self, dim: int, keepdim: bool = False) -> Bounded:
        """The sum, divided by the number of terms."""
        return self.sum(dim, keepdim) * (1 / max(self.value.shape[dim], 1))

    def map(self, function: Callable[[Tensor], Tensor], ulps: Tensor | float = 4) -> Bounded:
        """A smooth function of each element, computed within `ulps` units of roundoff of its result.

        First and second derivative are autograd's: `function` is made of operations that it can differentiate twice.
        """
        x = self.value.detach().requires_grad_()
        y = function(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        if slope.requires_grad:
            (curve,) = torch.autograd.grad(slope.sum(), x)
        else:
            curve = torch.zeros_like(x)
        value, slope = y.detach(), slope.detach()
        worst = slope.abs() * self.worst + curve.abs() * self.worst.square()  # twice the second order, for the third
        variance = slope.square() * self.variance + curve.square() * self.variance.square()
        return self._with(value, worst, variance, ulps * unit_roundoff(self.wide) * value.abs() + floor_of(self.wide))

    def _rounds(self, value: Tensor) -> Tensor:
        return unit_roundoff(self.wide) * value.abs() + floor_of(self.wide)


def exact(tensor: Tensor, dtype: torch.dtype | None = None) -> Bounded:
    """An input: what is given has no error. dtype: that of the tensors it meets, by default its own."""
    value = tensor.detach().cpu().double()
    return Bounded(value, torch.zeros_like(value), torch.zeros_like(value), dtype or tensor.dtype)


def given(tensor: Tensor, dtype: torch.dtype) -> Bounded:
    """An input that is cast to `dtype` first, if it is of another type."""
    taken = exact(tensor, dtype)
    wider = torch.promote_types(tensor.dtype, dtype) != dtype
    return taken.rounded() if wider else taken


def add_up(terms: Sequence[Bounded]) -> Bounded:
    """Terms added in any order, each sum stored in their type."""
    value, size = sum(t.value for t in terms), sum(t.value.abs() + t.worst for t in terms)
    assert isinstance(value, Tensor) and isinstance(size, Tensor)
    error = rounding_of(terms[0].dtype) * size + floor_of(terms[0].dtype)
    worst = torch.stack([t.worst for t in terms]).sum(0)
    variance = torch.stack([t.variance for t in terms]).sum(0)
    steps = len(terms) - 1
    return Bounded(value, worst + steps * error, variance + steps * error.square() / 3, terms[0].dtype)


def _product(multiply: Any, a: Tensor, a_error: Tensor, b: Tensor, b_error: Tensor) -> Tensor:
    """a b_error + a_error b + a_error b_error, for sizes and worst errors, or for squares and variances."""
    result: Tensor = multiply(a + a_error, b_error) + multiply(a_error, b)
    return result
