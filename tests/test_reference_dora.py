"""DoRA: W' = m ⊙ (W + s B A) / ‖W + s B A‖, row by row. Its gradients are tested with the operations that use it."""

from __future__ import annotations

import pytest
import torch
from helpers import ROUNDING, normal, random_projection

from lora.projection import Projection
from lora.reference.dora import dora_gain, dora_norm
from lora.reference.linear import lora_linear, lora_linear_backward
from lora.reference.nf4 import nf4_dequantize, nf4_quantize


def adapted(projection: Projection) -> torch.Tensor:
    return projection.weight + projection.scaling * projection.lora_B @ projection.lora_A


def test_rows_get_the_length_of_the_magnitude() -> None:
    projection = random_projection(5, 4, 2, dora=True)
    merged = lora_linear(torch.eye(4, dtype=torch.float64), projection).T  # [out, in]: the matrix that is applied
    torch.testing.assert_close(merged.norm(dim=1), projection.magnitude, **ROUNDING)
    directions = torch.nn.functional.normalize(adapted(projection), dim=1)
    torch.testing.assert_close(merged, projection.magnitude[:, None] * directions, **ROUNDING)


def test_starting_at_the_norm_changes_nothing() -> None:
    projection = random_projection(5, 4, 2)
    norm = dora_norm(projection.weight, projection.lora_A, projection.lora_B, projection.scaling)
    x = normal(6, 4)
    torch.testing.assert_close(
        lora_linear(x, projection._replace(magnitude=norm)), lora_linear(x, projection), **ROUNDING
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_norm_of_a_narrow_weight_is_taken_in_float32(dtype: torch.dtype) -> None:
    projection = random_projection(5, 40, 2, dtype=dtype)
    arguments = projection.weight, projection.lora_A, projection.lora_B
    norm = dora_norm(*arguments, projection.scaling)
    truth = dora_norm(*(tensor.double() for tensor in arguments), projection.scaling)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), truth, rtol=50 * 2**-24, atol=0)  # sums of 40 squares


def test_the_norm_of_an_nf4_weight_is_of_its_dequantised_matrix() -> None:
    projection = random_projection(8, 16, 2, dtype=torch.float32)
    quantised = nf4_quantize(projection.weight)
    rest = projection.lora_A, projection.lora_B, projection.scaling
    assert torch.equal(dora_norm(quantised, *rest), dora_norm(nf4_dequantize(quantised, torch.float32), *rest))


def test_only_the_magnitude_has_a_gradient_through_the_gain() -> None:
    projection = random_projection(5, 4, 2, dora=True)
    A, B, m = (t.requires_grad_() for t in (projection.lora_A, projection.lora_B, projection.magnitude))
    gain = dora_gain(projection.weight, A, B, projection.scaling, m)
    dA, dB, dm = torch.autograd.grad(gain.sum(), (A, B, m), allow_unused=True)
    assert dA is None and dB is None
    torch.testing.assert_close(dm, 1 / adapted(projection).norm(dim=1), **ROUNDING)


def test_a_zero_magnitude_has_a_finite_gradient() -> None:
    projection = random_projection(5, 4, 2, dora=True)
    projection = projection._replace(magnitude=torch.zeros_like(projection.magnitude))
    x, dy = normal(6, 4), normal(6, 5)
    gradients = lora_linear_backward(dy, x, projection)
    expected = (dy * (x @ adapted(projection).T)).sum(0) / adapted(projection).norm(dim=1)
    torch.testing.assert_close(gradients.dmagnitude, expected, **ROUNDING)


def test_a_row_of_zeros_stays_finite() -> None:
    projection = random_projection(5, 4, 2)
    for tensor in (projection.weight, projection.lora_B):
        tensor[2] = 0
    norm = dora_norm(projection.weight, projection.lora_A, projection.lora_B, projection.scaling)
    projection = projection._replace(magnitude=norm)
    assert norm[2] == 0
    h = lora_linear(normal(6, 4), projection)
    assert h.isfinite().all() and (h[:, 2] == 0).all() and (h[:, 0] != 0).all()
    gradients = lora_linear_backward(normal(6, 5), normal(6, 4), projection)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


def test_a_small_change_of_magnitude_survives_bfloat16() -> None:
    """A gain of 1.002 is 1 in bfloat16: applied as a narrow number it would do nothing at all."""
    projection = random_projection(64, 64, 2, dtype=torch.bfloat16)
    norm = dora_norm(projection.weight, projection.lora_A, projection.lora_B, projection.scaling)
    x = normal(64, 64, dtype=torch.bfloat16)
    at_rest = lora_linear(x, projection._replace(magnitude=norm)).double()
    grown = lora_linear(x, projection._replace(magnitude=1.002 * norm)).double()
    slope = ((grown - at_rest) * at_rest).sum() / at_rest.square().sum()  # roundings cancel over 4096 elements
    assert 0.001 < slope < 0.003
