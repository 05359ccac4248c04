"""DoRA's row norm against the reference in float64, and where the expanded square would fail."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora.errors import LoRAError, UnsupportedError
from lora.fast.kernels.dora import dora_norm
from lora.reference.dora import dora_norm as reference_norm
from lora.testing import SPREAD, assert_within, unit_roundoff

RANKS = st.one_of(st.integers(1, 20), st.sampled_from([64, 65, 70]))  # kernels take 64 at a time
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def normal(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(device)


def strided(x: Tensor) -> Tensor:
    buffer = torch.full((len(x), x.shape[1] + 3), math.nan, dtype=x.dtype, device=x.device)
    buffer[:, 1:-2] = x
    return buffer[:, 1:-2]


def check(norm: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> None:
    """Each element of W + s B A is rounded as a sum of r + 2 numbers; a norm moves by at most the norm of those errors.

    Then come the squares and their sum, positive numbers: a relative error of K roundings; then the root.
    """
    weight, A, B = (t.double().cpu() for t in (weight, A, B))
    truth = reference_norm(weight, A, B, scaling)
    u = unit_roundoff(norm.dtype)
    sizes = weight.abs() + abs(scaling) * (B.abs() @ A.abs())
    elements = SPREAD * u * math.sqrt(len(A) + 3) * torch.linalg.vector_norm(sizes, dim=1)
    assert_within(norm.cpu(), truth, elements + (SPREAD * math.sqrt(weight.shape[1] + 3) / 2 + 1) * u * truth)


@given(
    fan_out=st.integers(1, 70), fan_in=st.integers(1, 300), rank=RANKS, dtype=st.sampled_from(DTYPES),
    factors=st.sampled_from(DTYPES), scaling=st.sampled_from([1.0, 0.3, -2.0]), views=st.booleans(),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_norm(
    device: str, fan_out: int, fan_in: int, rank: int, dtype: torch.dtype, factors: torch.dtype, scaling: float,
    views: bool, seed: int,
) -> None:  # fmt: skip
    weight = normal(fan_out, fan_in, seed=seed, dtype=dtype, device=device)
    A, B = (normal(*s, seed=seed + s[0], dtype=factors, device=device) for s in ((rank, fan_in), (fan_out, rank)))
    if views:
        weight, A, B = strided(weight), A.T.contiguous().T, strided(B)
    norm = dora_norm(weight, A, B, scaling)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if factors == torch.float64 and dtype != torch.float64:  # rounded to float32 first, as the reference rounds them
        A, B = A.float(), B.float()
    check(norm, weight, A, B, scaling)


def test_an_update_that_nearly_cancels_the_weight(device: str) -> None:
    """The row is a ten-thousandth of its weight: the expanded square in float32 is off by more than the norm itself."""
    A, B = (normal(*s, seed=s[0], dtype=torch.float32, device=device) for s in ((8, 64), (33, 8)))
    noise = normal(33, 64, seed=1, dtype=torch.float32, device=device)
    weight = -(B @ A) + 1e-4 * noise
    norm = dora_norm(weight, A, B, 1.0)
    check(norm, weight, A, B, 1.0)
    truth = reference_norm(weight.double().cpu(), A.double().cpu(), B.double().cpu(), 1.0)
    expanded = (weight**2).sum(1) + 2 * ((weight @ A.T) * B).sum(1) + ((B @ (A @ A.T)) * B).sum(1)
    assert ((norm.cpu() - truth).abs() < 0.02 * truth).all()
    assert ((expanded.clamp(min=0).sqrt().cpu() - truth).abs() > 0.1 * truth).any()


def test_an_untrained_adapter_gives_the_weight_s_own_norm(device: str) -> None:
    weight = normal(20, 50, seed=0, dtype=torch.bfloat16, device=device)
    A = normal(4, 50, seed=1, dtype=torch.bfloat16, device=device)
    norm = dora_norm(weight, A, torch.zeros(20, 4, dtype=torch.bfloat16, device=device), 2.0)
    check(norm, weight, A, torch.zeros(20, 4), 2.0)
    weight[3] = 0
    assert dora_norm(weight, A, torch.zeros(20, 4, dtype=torch.bfloat16, device=device), 2.0)[3] == 0


def test_the_bound_notices_mutants(device: str) -> None:
    weight, A, B = (normal(*s, seed=s[0], dtype=torch.bfloat16, device=device) for s in ((33, 70), (5, 70), (33, 5)))
    norm = dora_norm(weight, A, B, 2.0)
    check(norm, weight, A, B, 2.0)
    mutants = [
        (weight, A, B, 1.0),
        (weight, A, B, -2.0),
        (weight[:, :64], A[:, :64], B, 2.0),
        (weight, A[:4], B[:, :4], 2.0),
        (weight.roll(1, 0), A, B, 2.0),
    ]
    for wrong in mutants:
        with pytest.raises(AssertionError):
            check(norm, *wrong)


def test_no_rows(device: str) -> None:
    assert dora_norm(torch.zeros(0, 8, device=device), torch.zeros(2, 8), torch.zeros(0, 2), 1.0).shape == (0,)


def test_operands_that_do_not_fit_are_refused(device: str) -> None:
    weight, A, B = (torch.zeros(s, device=device) for s in ((9, 12), (4, 12), (9, 4)))
    with pytest.raises(LoRAError, match=r"lora_A is \[4, 11\] and lora_B \[9, 4\], expected \[r, 12\]"):
        dora_norm(weight, A[:, :11], B, 1.0)
    with pytest.raises(LoRAError, match=r"lora_B \[8, 4\]"):
        dora_norm(weight, A, B[:8], 1.0)
    with pytest.raises(UnsupportedError, match=r"the weight is torch\.uint8"):
        dora_norm(weight.byte(), A, B, 1.0)
