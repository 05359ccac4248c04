"""What tests, exercises and benchmarks share: inputs, the error bound, and how an error is reported.

The truth is the same formula in float64 on the same rounded inputs. An implementation in a narrower type passes when
every element of every output and gradient is within a bound derived from its own arithmetic, never tuned:

    |y - y64| ≤ c · u_acc · √K · (|x||W|ᵀ + s · |x||A|ᵀ|B|ᵀ)      rounding while summing K products
              + u · s · |x Aᵀ||B|ᵀ                                 u = D(x) Aᵀ is stored in the input's type
              + u · |y64|                                          and so is the result

u is the unit roundoff of the tensors' type, u_acc of the type sums are kept in (float32 for half precision). √K is
the growth of a sum of K independent roundings (Higham and Mary 2019); c covers its spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora.errors import LoRAError
from lora.projection import NF4Weight, Projection

SPREAD = 6.0  # c: six deviations of a random walk, so that a right result fails once in some 10**8 elements


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: half the distance from 1 to the next number of `dtype`."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class LinearCase:
    """One input of `lora_linear`: everything is a function of the fields, so a failing case prints itself."""

    tokens: int
    in_features: int
    out_features: int
    rank: int
    dtype: torch.dtype = torch.float32
    bias: bool = False
    scaling: float = 2.0
    magnitude: float = 1.0  # typical size of x
    seed: int = 0

    def build(self) -> tuple[Tensor, Projection, Tensor]:
        """x [tokens, in], the projection, dy [tokens, out]; two-sided, random, lora_B and dy never zero."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        x = (self.magnitude * normal(self.tokens, self.in_features)).to(self.dtype)
        weight = (normal(self.out_features, self.in_features) / math.sqrt(self.in_features)).to(self.dtype)
        lora_A = (normal(self.rank, self.in_features) / math.sqrt(self.in_features)).to(self.dtype)
        lora_B = (normal(self.out_features, self.rank) / math.sqrt(self.rank)).to(self.dtype)
        bias = normal(self.out_features).to(self.dtype) if self.bias else None
        dy = normal(self.tokens, self.out_features).to(self.dtype)
        return x, Projection(weight, bias, lora_A, lora_B, self.scaling), dy


def in_float64(projection: Projection) -> Projection:
    """The same projection, every tensor widened: what the truth is computed from."""
    if isinstance(projection.weight, NF4Weight):
        raise LoRAError("in_float64 takes a dense weight: dequantise an NF4 weight to float64 first.")
    wide: dict[str, Any] = {
        name: value.detach().double() for name, value in projection._asdict().items() if isinstance(value, Tensor)
    }
    return projection._replace(**wide)


def linear_bounds(x: Tensor, projection: Projection, dy: Tensor) -> dict[str, Tensor]:
    """The error bound of each result of `lora_linear` without dropout: "h", "dx", "dlora_A", "dlora_B".

    Args: x [tokens, in], dy [tokens, out], and a projection with A and B, all of one dtype.
    """
    dtype = x.dtype
    u, u_acc = unit_roundoff(dtype), unit_roundoff(torch.promote_types(dtype, torch.float32))
    wide = in_float64(projection)
    weight, A, B, s = wide.weight, wide.lora_A, wide.lora_B, abs(wide.scaling)
    if not isinstance(weight, Tensor) or A is None or B is None:
        raise LoRAError("linear_bounds needs a projection with a dense weight, lora_A and lora_B.")
    x, dy = x.double(), dy.double()
    (tokens, fan_in), fan_out, rank = x.shape, weight.shape[0], A.shape[0]

    def bound(terms: int, sizes: Tensor, through_rank: Tensor, exact: Tensor) -> Tensor:
        sums = SPREAD * u_acc * math.sqrt(max(terms, 1)) * sizes
        return sums + 2 * u * through_rank + u * (exact.abs() + sizes) + underflow

    ax, aW, aA, aB, ady = x.abs(), weight.abs(), A.abs(), B.abs(), dy.abs()
    underflow = torch.finfo(dtype).smallest_normal * u  # half a subnormal: what rounding costs below the normal range
    xA, dyB = x @ A.T, dy @ B  # [tokens, r] each
    axA, adyB = xA.abs() + underflow / u, dyB.abs() + underflow / u  # as stored
    bias = torch.zeros(fan_out, dtype=torch.float64) if wide.bias is None else wide.bias
    return {
        "h": bound(fan_in + rank, ax @ aW.T + s * (ax @ aA.T) @ aB.T + bias.abs(), s * axA @ aB.T,
                   x @ weight.T + bias + s * xA @ B.T),
        "dx": bound(fan_out + rank, ady @ aW + s * (ady @ aB) @ aA, s * adyB @ aA, dy @ weight + s * dyB @ A),
        "dlora_A": bound(tokens + fan_out, s * (ady @ aB).T @ ax, s * adyB.T @ ax, s * dyB.T @ x),
        "dlora_B": bound(tokens + fan_in, s * ady.T @ (ax @ aA.T), s * ady.T @ axA, s * dy.T @ xA),
    }  # fmt: skip


def assert_within(actual: Tensor, truth: Tensor, bound: Tensor, name: str = "result") -> float:
    """Checks every element against its bound; returns the largest share of the bound that was used.

    Raises: AssertionError that says where, by how much, and in units of the bound. NaN never passes.
    """
    if actual.shape != truth.shape:
        raise AssertionError(f"{name} has shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    if not truth.numel():
        return 0.0
    error = (actual.detach().double() - truth.double()).abs()
    share = torch.where(error == 0, 0.0, error / bound)
    share = torch.where(torch.isfinite(share), share, math.inf)
    worst = int(share.argmax())
    used = float(share.flatten()[worst])
    if used > 1:
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), share.shape))
        raise AssertionError(
            f"{name}{list(where)} is {float(actual.flatten()[worst])!r}, expected {float(truth.flatten()[worst])!r}: "
            f"the error {float(error.flatten()[worst]):.3g} is {used:.3g} times its bound; "
            f"{int((share > 1).sum())} of {share.numel()} elements are outside"
        )
    return used


def gradients(function: Callable[..., Tensor], dy: Tensor, *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The output of `function(*inputs)` and the gradient of <dy, output> with respect to each input, by autograd."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves, **options)
    return output.detach(), *torch.autograd.grad(output, leaves, dy)
