"""rms_norm and layer_norm: rows of one length, statistics in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ROUNDING, check_backward, normal, roundings
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora.reference.norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward

LEADING = st.lists(st.integers(1, 3), max_size=2)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check_rms_norm(tensors: list[Tensor], numerical: bool = True, **options: Any) -> None:
    """`tensors`: x, weight and perhaps the residual."""

    def forward(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        return rms_norm(x, weight, residual=residual, **options)

    def backward(*tensors: Tensor) -> list[Tensor]:
        if len(tensors) == 3:
            dx, dweight, dbias = rms_norm_backward(*tensors, **options)
            assert dbias is None
            return [dx, dweight]
        dy, dsum, x, weight, residual = tensors
        dx, dweight, _ = rms_norm_backward(dy, x, weight, residual=residual, dsum=dsum, **options)
        return [dx, dweight, dx]

    check_backward(forward, backward, tensors, numerical=numerical)


@given(
    leading=LEADING,
    features=st.integers(1, 7),
    with_residual=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
    eps=st.sampled_from([1e-6, 0.1]),
    seed=st.integers(0, 2**31),
)
def test_backward_of_rms_norm(
    leading: list[int], features: int, with_residual: bool, offset: float, eps: float, seed: int
) -> None:
    torch.manual_seed(seed)
    residual = [normal(*leading, features)] if with_residual else []
    check_rms_norm([normal(*leading, features), normal(features), *residual], offset=offset, eps=eps)


def check_layer_norm(tensors: list[Tensor], bias: bool, with_residual: bool, numerical: bool = True) -> None:
    """`tensors`: x, weight, and perhaps the bias and the residual."""

    def split(tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        return (tensors[:-1], tensors[-1]) if with_residual else (tensors, None)

    def forward(*tensors: Tensor) -> Any:
        arguments, residual = split(tensors)
        return layer_norm(*arguments, residual=residual, eps=0.01)

    def backward(dy: Tensor, *tensors: Tensor) -> list[Tensor]:
        dsum = tensors[0] if with_residual else None
        arguments, residual = split(tensors[with_residual:])
        dx, dweight, dbias = layer_norm_backward(dy, *arguments, residual=residual, dsum=dsum, eps=0.01)
        assert (dbias is not None) == bias
        return [dx, dweight, *([] if dbias is None else [dbias]), *([dx] if with_residual else [])]

    check_backward(forward, backward, tensors, numerical=numerical)


@given(
    leading=LEADING,
    features=st.integers(2, 7),
    bias=st.booleans(),
    with_residual=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_backward_of_layer_norm(leading: list[int], features: int, bias: bool, with_residual: bool, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = [normal(*leading, features), normal(features)]
    tensors += [normal(features)] if bias else []
    tensors += [normal(*leading, features)] if with_residual else []
    check_layer_norm(tensors, bias, with_residual)


def transformers_norm(family: str) -> type[torch.nn.Module]:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    return {"llama": LlamaRMSNorm, "gemma2": Gemma2RMSNorm, "olmo2": Olmo2RMSNorm, "gpt_oss": GptOssRMSNorm}[family]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gemma2", {"offset": 1.0, "round_before_weight": False}),
        ("olmo2", {"round_before_weight": False}),
        ("gpt_oss", {"round_before_weight": False}),
    ],
)
def test_is_transformers_norm_bit_for_bit(family: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    module = transformers_norm(family)(48, eps=1e-5).to(dtype)
    with torch.no_grad():
        module.weight.copy_(normal(48))
    x = normal(5, 7, 48, dtype=dtype)
    assert torch.equal(rms_norm(x, module.weight, eps=1e-5, **options), module(x))


def test_the_two_roundings_differ() -> None:
    """Otherwise the test above could not tell them apart."""
    x, weight = normal(50, 48, dtype=torch.bfloat16), normal(48, dtype=torch.bfloat16)
    assert not torch.equal(rms_norm(x, weight), rms_norm(x, weight, round_before_weight=False))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_residual_is_added_first_and_returned(dtype: torch.dtype) -> None:
    x, residual, weight = normal(5, 12, dtype=dtype), normal(5, 12, dtype=dtype), normal(12, dtype=dtype)
    y, total = rms_norm(x, weight, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(x + residual, weight))
    bias = normal(12, dtype=dtype)
    y, total = layer_norm(x, weight, bias, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, layer_norm(x + residual, weight, bias))


def test_agrees_with_torch() -> None:
    x, weight, bias = normal(5, 12), normal(12), normal(12)
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-5), F.rms_norm(x, (12,), weight, 1e-5), **ROUNDING)
    torch.testing.assert_close(layer_norm(x, weight, bias), F.layer_norm(x, (12,), weight, bias), **ROUNDING)
    torch.testing.assert_close(layer_norm(x, weight), F.layer_norm(x, (12,), weight), **ROUNDING)


def test_large_half_precision_rows_do_not_overflow() -> None:
    x = torch.full((2, 64), 60000.0, dtype=torch.float16)  # its square is far beyond float16
    weight = torch.ones(64, dtype=torch.float16)
    assert torch.equal(rms_norm(x, weight), torch.ones_like(x))
    gradients = rms_norm_backward(torch.ones_like(x), x, weight)
    assert gradients.dx.isfinite().all() and gradients.dweight.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 6), (1, 6), (6,), (2, 0, 6)])
def test_no_row_and_one(shape: tuple[int, ...]) -> None:
    check_rms_norm([normal(*shape), normal(6), normal(*shape)], numerical=False)
    tensors = [normal(*shape), normal(6), normal(6), normal(*shape)]
    check_layer_norm(tensors, bias=True, with_residual=True, numerical=False)


def test_layout_does_not_matter() -> None:
    weight = normal(12)[::2]
    for x in (normal(6, 5).T, normal(1, 6).expand(5, 6), normal(5, 12)[:, ::2]):
        torch.testing.assert_close(rms_norm(x, weight), rms_norm(x.contiguous(), weight.contiguous()), **ROUNDING)
        check_rms_norm([x, weight], numerical=False)


@pytest.mark.parametrize("round_before_weight", [True, False])
def test_bfloat16_is_within_its_roundings(round_before_weight: bool) -> None:
    """One rounding or two, and one more for the float32 statistics; the gradients round once, after float32 sums."""
    x, weight, dy = (normal(*shape, dtype=torch.bfloat16) for shape in ((40, 65), (65,), (40, 65)))
    y64 = rms_norm(x.double(), weight.double())
    error = (rms_norm(x, weight, round_before_weight=round_before_weight) - y64).abs()
    assert error.max() > 0
    assert (error <= roundings(2 + round_before_weight) * y64.abs()).all()

    found = rms_norm_backward(dy, x, weight)
    truth = rms_norm_backward(dy.double(), x.double(), weight.double())
    float32_sum = 75 * 2**-24  # at most 65 terms, and fewer than ten operations on each
    normed = rms_norm(x.double(), torch.ones(65, dtype=torch.float64))
    e = (dy.double() * weight.double()).abs()
    rho = x.double().square().mean(-1, keepdim=True).rsqrt()
    size = rho * (e + normed.abs() * (e * normed.abs()).mean(-1, keepdim=True))  # dx with every term positive
    assert ((found.dx - truth.dx).abs() <= roundings(1) * truth.dx.abs() + float32_sum * size).all()
    size = (dy.double() * normed).abs().sum(0)
    assert ((found.dweight - truth.dweight).abs() <= roundings(1) * truth.dweight.abs() + float32_sum * size).all()


def test_layer_norm_in_bfloat16_rounds_once() -> None:
    x, weight, bias, dy = (normal(*shape).bfloat16() for shape in ((40, 65), (65,), (65,), (40, 65)))
    y, y64 = layer_norm(x, weight, bias), layer_norm(x.double(), weight.double(), bias.double())
    float32_sum = 75 * 2**-24 * (layer_norm(x.double(), weight.double()).abs() + bias.double().abs())
    assert y.dtype == torch.bfloat16
    assert ((y - y64).abs() <= roundings(1) * y64.abs() + float32_sum).all()
    assert all(gradient.dtype == torch.bfloat16 for gradient in layer_norm_backward(dy, x, weight, bias))


def test_a_float32_weight_beside_bfloat16_rows() -> None:
    x, weight, dy = normal(5, 12, dtype=torch.bfloat16), normal(12, dtype=torch.float32), normal(5, 12).bfloat16()
    assert rms_norm(x, weight).dtype == torch.bfloat16
    gradients = rms_norm_backward(dy, x, weight)
    assert gradients.dx.dtype == torch.bfloat16 and gradients.dweight.dtype == torch.float32
