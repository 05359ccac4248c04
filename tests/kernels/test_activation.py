"""The gated activation kernels against `lora.reference.mlp` in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora.errors import LoRAError
from lora.fast.kernels.activation import TILE, gated_backward, gated_forward
from lora.reference.mlp import ACTIVATIONS, activate, activation_slope
from lora.testing import assert_within

# NumPy, inside the interpreter, remarks on the e^-g that may overflow; a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
Roundoff = Callable[[torch.dtype], float]


def laid_out(x: Tensor, layout: str, device: str) -> Tensor:
    """The same numbers, [tokens, hidden], in memory in another way."""
    tokens, hidden = x.shape
    if layout == "slice":  # of a wider buffer, starting at an odd element
        wide = torch.full((tokens, hidden + 5), float("nan"), dtype=x.dtype, device=device)
        wide[:, 3 : 3 + hidden] = x
        return wide[:, 3 : 3 + hidden]
    if layout == "transposed":
        return x.to(device).T.contiguous().T
    return x.to(device)


def truth(dh: Tensor, g: Tensor, z: Tensor, activation: str) -> dict[str, Tensor]:
    dh, g, z = dh.double().cpu(), g.double().cpu(), z.double().cpu()
    a = activate(g, activation)
    return {"h": a * z, "dg": dh * z * activation_slope(g, activation), "dz": dh * a}


def bounds(dh: Tensor, g: Tensor, z: Tensor, exact: dict[str, Tensor], u: float) -> dict[str, Tensor]:
    """One rounding of the result, and the arithmetic in float32 (float64 for float64) before it.

    act and act' take at most 20 operations of at most 2 ulps, GPU approximations included; the numbers they add are at
    most 1 + |g|, and an error in e^g's exponent grows by |g|.
    """
    dtype = g.dtype
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    underflow = torch.finfo(dtype).smallest_normal * u
    dh, g, z = (tensor.double().cpu().abs() for tensor in (dh, g, z))
    inner = 20 * wide * (1 + g)
    sizes = {"h": z * (1 + g), "dg": dh * z, "dz": dh * (1 + g)}
    return {name: u * exact[name].abs() + inner * sizes[name] + underflow for name in exact}


def check(dh: Tensor, g: Tensor, z: Tensor, activation: str, roundoff: Roundoff) -> None:
    exact = truth(dh, g, z, activation)
    bound = bounds(dh, g, z, exact, roundoff(g.dtype))
    dg, dz, h = gated_backward(dh, g, z, activation, with_h=True)
    assert h is not None
    forward = gated_forward(g, z, activation)
    for name, found in (("h", forward), ("h", h), ("dg", dg), ("dz", dz)):
        assert found.dtype == g.dtype
        assert_within(found.cpu(), exact[name], bound[name], name)


@given(
    tokens=st.integers(1, 40),
    hidden=st.integers(1, 70),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(DTYPES),
    layouts=st.lists(st.sampled_from(["plain", "slice", "transposed"]), min_size=3, max_size=3),
    magnitude=st.sampled_from([0.1, 1.0, 20.0]),
    seed=st.integers(0, 2**31),
)
def test_is_the_reference(
    tokens: int,
    hidden: int,
    activation: str,
    dtype: torch.dtype,
    layouts: list[str],
    magnitude: float,
    seed: int,
    device: str,
    roundoff: Roundoff,
) -> None:
    torch.manual_seed(seed)
    dh, g, z = ((size * normal(tokens, hidden)).to(dtype) for size in (1.0, magnitude, 1.0))
    dh, g, z = (laid_out(x, layout, device) for x, layout in zip((dh, g, z), layouts, strict=True))
    check(dh, g, z, activation, roundoff)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_longer_than_a_tile(activation: str, device: str, roundoff: Roundoff) -> None:
    dh, g, z = (normal(3, 2 * TILE + 37, dtype=torch.float32).to(device) for _ in range(3))
    check(dh, g, z, activation, roundoff)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_ends_of_the_range(activation: str, dtype: torch.dtype, device: str) -> None:
    """Where e^-g overflows or 1 - σ vanishes the activation is 0 or g, its slope 0 or 1, and nothing is NaN."""
    g = torch.tensor([[-60000.0, -1000.0, -120.0, 0.0, 120.0, 1000.0, 60000.0]], dtype=dtype, device=device)
    dg, dz, h = gated_backward(torch.ones_like(g), g, torch.ones_like(g), activation, with_h=True)
    assert h is not None
    assert torch.equal(h, g.clamp(min=0)) and torch.equal(dz, h)
    assert torch.equal(dg.cpu(), torch.tensor([[0, 0, 0, 0.5, 1, 1, 1]], dtype=dtype))


@pytest.mark.parametrize("halves", [True, False])
def test_results_go_into_slices_and_nowhere_else(halves: bool, device: str) -> None:
    """dg and dz side by side in one buffer, as the stacked gate and up want them; and each in a buffer of its width."""
    gz = normal(9, 2 * 12, dtype=torch.float32).to(device)
    g, z = gz[:, :12], gz[:, 12:]
    dh = normal(9, 12, dtype=torch.float32).to(device)
    buffers = [torch.full((9, width), float("nan"), device=device) for width in (40, 29, 16, 14)]
    starts = (4, 16 if halves else 3, 1, 2)
    if halves:
        buffers[1] = buffers[0]
    places = [buffer[:, start : start + 12] for buffer, start in zip(buffers, starts, strict=True)]
    found = gated_backward(dh, g, z, "silu", dg=places[0], dz=places[1], h=places[2])
    out = gated_forward(g, z, "silu", out=places[3])
    expected = gated_backward(dh, g.contiguous(), z.contiguous(), "silu", with_h=True)
    assert all(one is place for one, place in zip((*found, out), places, strict=True))
    for place, exact in zip(places, (*expected, expected[2]), strict=True):
        assert exact is not None and torch.equal(place, exact)
        place.fill_(float("nan"))  # and nothing else was written
    assert all(buffer.isnan().all() for buffer in buffers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place(dtype: torch.dtype, device: str) -> None:
    dh, g, z = (normal(20, 70, dtype=dtype).to(device) for _ in range(3))
    expected = gated_backward(dh, g, z, "gelu_tanh", with_h=True)
    assert torch.equal(gated_forward(g, z.clone(), "gelu_tanh", out=(copy := g.clone())), copy)
    assert torch.equal(copy, expected[2])
    found = gated_backward(dh, g, z, "gelu_tanh", dg=g, dz=z, h=dh)
    assert found[0] is g and found[1] is z and found[2] is dh
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_h_only_where_it_is_wanted(device: str) -> None:
    dh, g, z = (normal(5, 12, dtype=torch.float32).to(device) for _ in range(3))
    dg, dz, h = gated_backward(dh, g, z, "gelu")
    assert h is None
    with_h = gated_backward(dh, g, z, "gelu", with_h=True)
    assert torch.equal(dg, with_h[0]) and torch.equal(dz, with_h[1])


@pytest.mark.parametrize("shape", [(0, 6), (1, 6), (6,), (2, 3, 6), (2, 0, 6), (4, 0), (4, 1)])
def test_any_rank_and_no_element(shape: tuple[int, ...], device: str) -> None:
    dh, g, z = (normal(*shape).to(device) for _ in range(3))
    dg, dz, h = gated_backward(dh, g, z, "silu", with_h=True)
    exact = truth(dh, g, z, "silu")
    for name, found in (("h", h), ("dg", dg), ("dz", dz), ("h", gated_forward(g, z, "silu"))):
        assert found is not None and found.shape == shape
        torch.testing.assert_close(found.cpu(), exact[name], rtol=1e-13, atol=1e-13)  # 20 float64 operations


def test_expanded_inputs(device: str) -> None:
    g, z = normal(7, 5).to(device), normal(7, 5).to(device)
    for dh in (normal(1, 5).to(device).expand(7, 5), torch.ones((), dtype=torch.float64, device=device).expand(7, 5)):
        found = gated_backward(dh, g, z, "gelu")
        expected = gated_backward(dh.contiguous(), g, z, "gelu")
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_mixed_dtypes(device: str) -> None:
    g, z = normal(7, 5, dtype=torch.bfloat16).to(device), normal(7, 5, dtype=torch.float32).to(device)
    dg, dz, h = gated_backward(z, g, z, "silu", with_h=True)
    assert h is not None and (dg.dtype, dz.dtype, h.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    exact = truth(z, g, z, "silu")
    assert_within(dz.cpu(), exact["dz"], 40 * 2**-23 * (exact["dz"].abs() + 1), "dz")  # as in `bounds`, |g| < 5


def test_bad_input_is_refused(device: str) -> None:
    g = normal(4, 6).to(device)
    with pytest.raises(LoRAError, match=r"'relu', expected one of 'silu'"):
        gated_forward(g, g, "relu")
    for out in (g.new_empty(4, 7), g.new_empty(6, 4).T, g.new_empty(1, 6).expand(4, 6)):
        with pytest.raises(LoRAError, match=r"out is .* expected \[4, 6\] with neighbouring"):
            gated_forward(g, g, "silu", out=out)
    with pytest.raises(LoRAError, match="dz is"):
        gated_backward(g, g, g, "silu", dz=g.new_empty(5, 6))
