"""What the tests of the operations share: random projections, and what every hand-written backward must pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import gradcheck

from lora.projection import Gradients, Projection

TRAINABLE = ("bias", "lora_A", "lora_B", "magnitude")

# Two float64 computations of one formula, sums of at most 100 terms, values below 100: 100 · 100 · 2**-53 < 2e-12.
ROUNDING: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def random_projection(
    out_features: int,
    in_features: int,
    rank: int | None = 3,
    *,
    bias: bool = False,
    dora: bool = False,
    scaling: float = 0.7,
    dtype: torch.dtype = torch.float64,
) -> Projection:
    """Two-sided random tensors, lora_B too; `rank` None is a projection without an adapter."""
    projection = Projection(
        weight=normal(out_features, in_features, dtype=dtype),
        bias=normal(out_features, dtype=dtype) if bias else None,
    )
    if rank is None:
        return projection
    return projection._replace(
        lora_A=normal(rank, in_features, dtype=dtype),
        lora_B=normal(out_features, rank, dtype=dtype),
        scaling=scaling,
        magnitude=1 + normal(out_features, dtype=dtype).abs() if dora else None,
    )


def trainable(projection: Projection) -> list[Tensor]:
    """The tensors of a projection that have gradients, in the order of TRAINABLE."""
    return [tensor for name in TRAINABLE if (tensor := getattr(projection, name)) is not None]


def with_trainable(projection: Projection, tensors: Sequence[Tensor]) -> Projection:
    """The projection with these in place of its trainable tensors."""
    names = [name for name in TRAINABLE if getattr(projection, name) is not None]
    return projection._replace(**dict(zip(names, tensors, strict=True)))


def deal(projections: Sequence[Projection], tensors: Sequence[Tensor]) -> list[Projection]:
    """Several projections with one flat list of tensors in place of their trainable ones."""
    dealt, rest = [], list(tensors)
    for projection in projections:
        count = len(trainable(projection))
        dealt.append(with_trainable(projection, rest[:count]))
        rest = rest[count:]
    assert not rest
    return dealt


def gradients_of(projection: Projection, gradients: Gradients) -> list[Tensor]:
    """Gradients in the order of `trainable`; what is not there must have no gradient either."""
    for name in TRAINABLE:
        assert (getattr(projection, name) is None) == (getattr(gradients, f"d{name}") is None), name
    return [getattr(gradients, f"d{name}") for name in TRAINABLE if getattr(projection, name) is not None]


def as_function(forward: Callable[..., Any], backward: Callable[..., Sequence[Tensor]]) -> Callable[..., Any]:
    """The operation whose forward is `forward(*tensors)` and whose gradients are `backward(*douts, *tensors)`."""

    class Operation(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Any:
            ctx.save_for_backward(*tensors)
            return forward(*tensors)

        @staticmethod
        def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor, ...]:
            return tuple(backward(*douts, *ctx.saved_tensors))

    return Operation.apply


def check_backward(
    forward: Callable[..., Any],
    backward: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor],
    *,
    numerical: bool = True,
) -> None:
    """The hand-written gradients are autograd's, and (gradcheck) those of finite differences; all in float64."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = forward(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    douts = [normal(*output.shape) for output in outputs]
    expected = torch.autograd.grad(outputs, tensors, douts, materialize_grads=True)
    with torch.no_grad():
        found = backward(*douts, *tensors)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == tensors[number].dtype
        torch.testing.assert_close(one, other, **ROUNDING, msg=lambda text, n=number: f"gradient {n}: {text}")
    if numerical:
        assert gradcheck(as_function(forward, backward), tuple(tensors))


@contextmanager
def constant_dora_norm(norm: Tensor) -> Iterator[None]:
    """DoRA's norm is a constant for the gradient; finite differences see that only if it is one."""
    with mock.patch("lora.reference.dora.dora_norm", lambda *_: norm):
        yield


def roundings(count: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """(1 + u)**count - 1: how much `count` successive roundings to `dtype` can change a number, relative to it."""
    return (1 + torch.finfo(dtype).eps / 2) ** count - 1


def linear_magnitude(x: Tensor, projection: Projection) -> Tensor:
    """|x||W|ᵀ + |b| + s |x||A|ᵀ|B|ᵀ in float64: what the roundings of a LoRA linear are relative to."""
    x = x.double().abs()
    total = x @ projection.weight.double().abs().T
    if projection.bias is not None:
        total = total + projection.bias.double().abs()
    if projection.lora_A is not None:
        total = (
            total + projection.scaling * (x @ projection.lora_A.double().abs().T) @ projection.lora_B.double().abs().T
        )
    return total


def doubled(projection: Projection) -> Projection:
    """The same numbers in float64."""
    return Projection(*(field.double() if isinstance(field, Tensor) else field for field in projection))
