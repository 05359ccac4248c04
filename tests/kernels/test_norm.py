"""The norm kernels against `lora.reference.norm` in float64, rows in registers and looped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from helpers import normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lora.fast as fast
from lora.errors import LoRAError
from lora.fast.kernels import norm as kernels
from lora.fast.kernels.norm import layer_norm_backward, layer_norm_forward, rms_norm_backward, rms_norm_forward
from lora.fast.runtime import runs_triton
from lora.reference.norm import layer_norm, rms_norm, standardise
from lora.reference.norm import layer_norm_backward as reference_layer_norm_backward
from lora.reference.norm import rms_norm_backward as reference_rms_norm_backward
from lora.testing import SPREAD, assert_within

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
Roundoff = Callable[[torch.dtype], float]


@contextmanager
def walking(looped: bool) -> Iterator[None]:
    """Rows of any length looped, in blocks of 16, or left in registers."""
    if not looped:
        yield
        return
    with mock.patch.object(kernels, "MAX_FEATURES", 0), mock.patch.object(kernels, "LOOP_BLOCK", 16):
        yield


def laid_out(x: Tensor, layout: str, device: str) -> Tensor:
    """The same numbers in memory in another way."""
    if layout == "slice":  # of a wider buffer, starting at an odd element
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), float("nan"), dtype=x.dtype, device=device)
        wide[..., 3:-2] = x
        return wide[..., 3:-2]
    if layout == "transposed":
        return x.to(device).transpose(0, -1).contiguous().transpose(0, -1)
    return x.to(device)


def arithmetic(dtype: torch.dtype, terms: int) -> float:
    """Relative error of sums of `terms` numbers and at most 20 more operations, in float32 (float64 for float64)."""
    return (SPREAD * math.sqrt(terms) + 20) * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def tiny(dtype: torch.dtype) -> float:
    """What a rounding below the normal range costs."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().cpu() for tensor in tensors]


def check_rms_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, options: dict[str, float], roundoff: Roundoff
) -> tuple[Tensor, Tensor]:
    """y, s and ρ are right; returns s and ρ."""
    u, dtype = roundoff(x.dtype), x.dtype
    y, s, rstd = rms_norm_forward(x, weight, residual=residual, **options)
    assert y.dtype == s.dtype == dtype and y.shape == s.shape == x.shape
    if residual is None:
        assert s is x
    else:
        total = sum(doubles(x, residual))
        assert_within(s.cpu(), total, u * total.abs() + tiny(dtype), "s")
    s64, w64 = doubles(s, weight)
    y64 = rms_norm(s64, w64, eps=options["eps"], offset=options["offset"])
    roundings = 3 if options["round_before_weight"] else 1  # offset + w, x̂ and y
    relative = (1 + u) ** roundings - 1 + arithmetic(dtype, x.shape[-1])
    below = 2 * tiny(dtype) * (1 + (options["offset"] + w64).abs())
    assert_within(y.cpu(), y64, relative * y64.abs() + below, "y")
    rho = (s64.square().mean(-1) + options["eps"]).rsqrt().flatten()
    assert rstd.dtype == torch.promote_types(dtype, torch.float32)
    assert_within(rstd.cpu(), rho, arithmetic(dtype, x.shape[-1]) * rho, "rstd")
    return s, rstd


def check_rms_backward(
    dy: Tensor, s: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None, options: dict[str, float], u: Roundoff
) -> None:
    dtype, features = s.dtype, s.shape[-1]
    dx, dweight = rms_norm_backward(dy, s, weight, rstd, offset=options["offset"], dsum=dsum)
    assert dweight is not None and dx.dtype == dtype and dweight.dtype == weight.dtype
    dy64, s64, w64 = doubles(dy, s, weight)
    dsum64 = None if dsum is None else doubles(dsum)[0]
    truth = reference_rms_norm_backward(
        dy64, s64, w64, eps=options["eps"], offset=options["offset"], residual=torch.zeros_like(s64), dsum=dsum64
    )
    rho = (s64.square().mean(-1, keepdim=True) + options["eps"]).rsqrt()
    normed, e = (s64 * rho).abs(), (dy64 * (options["offset"] + w64)).abs()
    size = rho * (e + normed * (e * normed).mean(-1, keepdim=True)) + (0 if dsum64 is None else dsum64.abs())
    bound = u(dtype) * truth.dx.abs() + arithmetic(dtype, features) * size + tiny(dtype)
    assert_within(dx.cpu(), truth.dx, bound, "dx")
    size = (dy64.abs() * normed).reshape(-1, features).sum(0)
    bound = u(weight.dtype) * truth.dweight.abs() + arithmetic(dtype, features + len(rstd)) * size + tiny(weight.dtype)
    assert_within(dweight.cpu(), truth.dweight, bound, "dweight")
    assert rms_norm_backward(dy, s, weight, rstd, offset=options["offset"], need_dweight=False)[1] is None


@given(
    leading=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    features=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    wide_weight=st.booleans(),
    layouts=st.lists(st.sampled_from(["plain", "slice", "transposed"]), min_size=4, max_size=4),
    with_residual=st.booleans(),
    looped=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
    rounds=st.booleans(),
    eps=st.sampled_from([1e-6, 0.1]),
    seed=st.integers(0, 2**31),
)
def test_rms_norm_is_the_reference(
    leading: list[int],
    features: int,
    dtype: torch.dtype,
    wide_weight: bool,
    layouts: list[str],
    with_residual: bool,
    looped: bool,
    offset: float,
    rounds: bool,
    eps: float,
    seed: int,
    device: str,
    roundoff: Roundoff,
) -> None:
    torch.manual_seed(seed)
    x, residual, dy, dsum = (laid_out(normal(*leading, features, dtype=dtype), layout, device) for layout in layouts)
    weight = normal(features, dtype=torch.promote_types(dtype, torch.float32) if wide_weight else dtype).to(device)
    options = {"eps": eps, "offset": offset, "round_before_weight": rounds}
    with walking(looped):
        s, rstd = check_rms_forward(x, residual if with_residual else None, weight, options, roundoff)
        check_rms_backward(dy, s, weight, rstd, dsum if with_residual else None, options, roundoff)


def check_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dy: Tensor,
    eps: float,
    u: Roundoff,
    sums: tuple[Tensor, Tensor] | None = None,
) -> None:
    """y, s and every gradient are right; `sums` are the residual and dsum."""
    dtype, features = x.dtype, x.shape[-1]
    residual, dsum = sums or (None, None)
    y, s, mean, rstd = layer_norm_forward(x, weight, bias, eps=eps, residual=residual)
    dx, dweight, dbias = layer_norm_backward(dy, s, weight, mean, rstd, bias=bias, dsum=dsum)
    assert y.dtype == s.dtype == dx.dtype == dtype and dweight is not None and (dbias is None) == (bias is None)
    if residual is None:
        assert s is x
    else:
        total = sum(doubles(x, residual))
        assert_within(s.cpu(), total, u(dtype) * total.abs() + tiny(dtype), "s")
    x64, w64, dy64 = doubles(s, weight, dy)
    dsum64 = torch.zeros_like(x64) if dsum is None else doubles(dsum)[0]
    b64 = None if bias is None else doubles(bias)[0]
    normed, rho = standardise(x64, eps)
    level = rho * x64.abs().mean(-1, keepdim=True)  # an error of the mean is relative to this, and moves x̂ and ρ
    size = rho * x64.abs() + normed.abs() * (1 + level) + level  # x̂ with every term positive
    small = arithmetic(dtype, features)

    y64 = layer_norm(x64, w64, b64, eps=eps)
    of_bias = 0 if b64 is None else b64.abs()
    assert_within(y.cpu(), y64, u(dtype) * y64.abs() + small * (size * w64.abs() + of_bias) + tiny(dtype), "y")
    truth = reference_layer_norm_backward(dy64, x64, w64, b64, eps=eps, residual=torch.zeros_like(x64), dsum=dsum64)
    e = (dy64 * w64).abs()
    of_dx = rho * (e + e.mean(-1, keepdim=True) + size * (e * size).mean(-1, keepdim=True)) * (1 + level) + dsum64.abs()
    assert_within(dx.cpu(), truth.dx, u(dtype) * truth.dx.abs() + small * of_dx + tiny(dtype), "dx")
    small = arithmetic(dtype, features + len(rstd))
    for name, found, exact, sizes in (
        ("dweight", dweight, truth.dweight, (dy64.abs() * size).reshape(-1, features).sum(0)),
        ("dbias", dbias, truth.dbias, dy64.abs().reshape(-1, features).sum(0)),
    ):
        if found is not None:
            assert exact is not None
            bound = u(found.dtype) * exact.abs() + small * sizes + tiny(found.dtype)
            assert_within(found.cpu(), exact, bound, name)


@given(
    leading=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    features=st.integers(2, 70),
    dtype=st.sampled_from(DTYPES),
    layouts=st.lists(st.sampled_from(["plain", "slice", "transposed"]), min_size=4, max_size=4),
    with_bias=st.booleans(),
    with_residual=st.booleans(),
    looped=st.booleans(),
    shift=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_layer_norm_is_the_reference(
    leading: list[int],
    features: int,
    dtype: torch.dtype,
    layouts: list[str],
    with_bias: bool,
    with_residual: bool,
    looped: bool,
    shift: float,
    seed: int,
    device: str,
    roundoff: Roundoff,
) -> None:
    torch.manual_seed(seed)
    x = laid_out((normal(*leading, features) + shift).to(dtype), layouts[0], device)
    dy, residual, dsum = (laid_out(normal(*leading, features, dtype=dtype), layout, device) for layout in layouts[1:])
    weight, bias = normal(features, dtype=dtype).to(device), normal(features, dtype=dtype).to(device)
    sums = (residual, dsum) if with_residual else None
    with walking(looped):
        check_layer_norm(x, weight, bias if with_bias else None, dy, 0.01, roundoff, sums)


@pytest.mark.parametrize(
    ("rows", "features"), [(700, 5), (5, 3000), (3, kernels.MAX_FEATURES // 2 + 5), (3, kernels.MAX_FEATURES + 37)]
)
def test_many_tiles_and_long_rows(rows: int, features: int, device: str, roundoff: Roundoff) -> None:
    """More tiles than programs in the sums over rows, and the sizes at which the kernels change."""
    x, residual, dy, dsum = (normal(rows, features, dtype=torch.float32).to(device) for _ in range(4))
    weight, bias = (normal(features, dtype=torch.float32).to(device) for _ in range(2))
    options = {"eps": 1e-6, "offset": 1.0, "round_before_weight": True}
    s, rstd = check_rms_forward(x, residual, weight, options, roundoff)
    check_rms_backward(dy, s, weight, rstd, dsum, options, roundoff)
    check_layer_norm(x, weight, bias, dy, 1e-5, roundoff)
    check_layer_norm(x, weight, bias, dy, 1e-5, roundoff, (residual, dsum))


def test_programs_share_the_tiles_of_a_sum() -> None:
    """On two multiprocessors: all that run at once, fewer where that would be many beside the tiles, never none."""
    cpu = torch.device("cpu")
    assert kernels.programs_for(1000, 8, cpu) == 4  # 16 warps on each, 8 to a program
    assert kernels.programs_for(24, 8, cpu) == 3
    assert kernels.programs_for(5, 8, cpu) == 2
    assert kernels.programs_for(1, 8, cpu) == 1
    assert kernels.programs_for(1000, 4, cpu, column_blocks=3) == 2
    assert kernels.programs_for(1000, 4, cpu, column_blocks=100) == 1


@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("looped", [True, False])
def test_rounds_where_the_reference_rounds(rounds: bool, offset: float, looped: bool, device: str) -> None:
    """The float32 before a rounding differs by a few ulps, 2**-21 at most.

    Beside float16's 2**-11 that moves one element in 500 over an edge, at either of two roundings; the other order of
    roundings moves about every fourth.
    """
    x, weight = normal(60, 48, dtype=torch.float16).to(device), normal(48, dtype=torch.float16).to(device)
    with walking(looped):
        y, _, _ = rms_norm_forward(x, weight, eps=1e-6, offset=offset, round_before_weight=rounds)
    same, other = (rms_norm(x, weight, eps=1e-6, offset=offset, round_before_weight=r) for r in (rounds, not rounds))
    assert (y != same).double().mean() < 0.01
    assert (y != other).double().mean() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("looped", [True, False])
def test_the_sum_is_torch_s(dtype: torch.dtype, looped: bool, device: str) -> None:
    x, residual, weight = (normal(*shape, dtype=dtype).to(device) for shape in ((9, 40), (9, 40), (40,)))
    with walking(looped):
        _, s, _ = rms_norm_forward(x, weight, eps=1e-6, offset=0, round_before_weight=True, residual=residual)
    assert torch.equal(s, x + residual)


@pytest.mark.parametrize("looped", [True, False])
def test_heads_in_a_fused_buffer_are_normalised_where_they_lie(looped: bool, device: str) -> None:
    batch, seq, heads, size = 2, 3, 4, 20
    buffer = normal(batch, seq, 3 * heads * size, dtype=torch.float32).to(device)
    q = buffer[..., 40 : 40 + heads * size].view(batch, seq, heads, size)
    into = torch.full_like(buffer, float("nan"))
    out = into[..., : heads * size].view(batch, seq, heads, size)
    weight = normal(size, dtype=torch.float32).to(device)
    assert kernels.inner_rows(q, out) == heads
    assert kernels.grouped(q, heads).data_ptr() == q.data_ptr()
    options = {"eps": 1e-6, "offset": 0.0}
    with walking(looped):
        y, s, rstd = rms_norm_forward(q, weight, round_before_weight=True, out=out, **options)
        assert y is out and s is q
        again, _, _ = rms_norm_forward(q.contiguous(), weight, round_before_weight=True, **options)
        assert torch.equal(out, again) and into[..., heads * size :].isnan().all()
        dx, dweight = rms_norm_backward(out, q, weight, rstd, offset=0)
        expected = rms_norm_backward(out.contiguous(), q.contiguous(), weight, rstd, offset=0)
    assert dweight is not None and expected[1] is not None
    assert torch.equal(dx, expected[0]) and torch.equal(dweight, expected[1])


@pytest.mark.parametrize("looped", [True, False])
def test_in_place(looped: bool, device: str) -> None:
    x, residual, dy, dsum = (normal(9, 40, dtype=torch.float32).to(device) for _ in range(4))
    weight = normal(40, dtype=torch.float32).to(device)
    options = {"eps": 1e-6, "offset": 1.0, "round_before_weight": True}
    with walking(looped):
        y, s, rstd = rms_norm_forward(x, weight, residual=residual, **options)
        dx, dweight = rms_norm_backward(dy, s, weight, rstd, offset=1.0, dsum=dsum)
        for place in (0, 1):
            copies = [x.clone(), residual.clone()]
            found = rms_norm_forward(copies[0], weight, residual=copies[1], out=copies[place], **options)
            assert found[0] is copies[place]
            assert all(torch.equal(*pair) for pair in zip(found, (y, s, rstd), strict=True))
        for place in (0, 1, 2):
            copies = [dy.clone(), s.clone(), dsum.clone()]
            into, again = rms_norm_backward(
                copies[0], copies[1], weight, rstd, offset=1.0, dsum=copies[2], out=copies[place]
            )
            assert into is copies[place] and torch.equal(into, dx)
            assert again is not None and dweight is not None and torch.equal(again, dweight)


@pytest.mark.parametrize("looped", [True, False])
def test_layer_norm_in_place(looped: bool, device: str) -> None:
    x, residual, dy, dsum = (normal(9, 40, dtype=torch.float32).to(device) for _ in range(4))
    weight, bias = (normal(40, dtype=torch.float32).to(device) for _ in range(2))
    with walking(looped):
        expected = layer_norm_forward(x, weight, bias, eps=0.1, residual=residual)
        _, s, mean, rstd = expected
        gradients = layer_norm_backward(dy, s, weight, mean, rstd, bias=bias, dsum=dsum)
        for place in (0, 1):
            copies = [x.clone(), residual.clone()]
            found = layer_norm_forward(copies[0], weight, bias, eps=0.1, residual=copies[1], out=copies[place])
            assert found[0] is copies[place]
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        for place in (0, 1, 2):
            copies = [dy.clone(), s.clone(), dsum.clone()]
            again = layer_norm_backward(*copies[:2], weight, mean, rstd, bias=bias, dsum=copies[2], out=copies[place])
            assert again[0] is copies[place]
            assert all(torch.equal(*pair) for pair in zip(again, gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("with_residual", [True, False])
def test_the_operation_runs_these_kernels(with_residual: bool, dtype: torch.dtype, device: str) -> None:
    """Bit for bit, whichever gradients are asked for."""
    x, residual, dy, dsum = (normal(2, 3, 20, dtype=dtype).to(device) for _ in range(4))
    weight, bias = (normal(20, dtype=dtype).to(device) for _ in range(2))
    assert runs_triton(x)
    added = residual if with_residual else None
    expected, s, mean, rstd = layer_norm_forward(x, weight, bias, eps=0.1, residual=added)
    dx, dweight, dbias = layer_norm_backward(dy, s, weight, mean, rstd, bias=bias, dsum=dsum if with_residual else None)
    named = {"x": (x, dx), "weight": (weight, dweight), "bias": (bias, dbias)}
    named |= {"residual": (residual, dx)} if with_residual else {}
    for wanted in (*([name] for name in named), list(named)):
        leaves = {name: x.clone().requires_grad_(name in wanted) for name, (x, _) in named.items()}
        found = fast.layer_norm(**leaves, eps=0.1)
        if with_residual:
            assert torch.equal(found[0], expected) and torch.equal(found[1], s)
            gradients = torch.autograd.grad(found, [leaves[name] for name in wanted], (dy, dsum))
        else:
            assert torch.equal(found, expected)
            gradients = torch.autograd.grad(found, [leaves[name] for name in wanted], dy)
        for name, gradient in zip(wanted, gradients, strict=True):
            truth = named[name][1]
            assert truth is not None and torch.equal(gradient, truth), name


@pytest.mark.parametrize("looped", [True, False])
def test_results_go_into_a_slice_and_nowhere_else(looped: bool, device: str) -> None:
    x, weight = normal(9, 40).to(device), normal(40).to(device)
    wide = torch.full((2, 9, 50), float("nan"), dtype=torch.float64, device=device)
    with walking(looped):
        y, _, mean, rstd = layer_norm_forward(x, weight, eps=0.1, out=wide[0, :, 4:44])
        dx, dweight, dbias = layer_norm_backward(x, x, weight, mean, rstd, out=wide[1, :, 4:44], need_dweight=False)
        expected = layer_norm_forward(x, weight, eps=0.1)[0], layer_norm_backward(x, x, weight, mean, rstd)[0]
    assert dweight is None and dbias is None
    assert torch.equal(wide[:, :, 4:44], torch.stack(expected)) and torch.equal(y, expected[0])
    assert torch.equal(dx, expected[1]) and wide[:, :, :4].isnan().all() and wide[:, :, 44:].isnan().all()


@pytest.mark.parametrize("shape", [(0, 6), (1, 6), (6,), (2, 0, 6), (2, 1, 3, 6)])
def test_any_rank_and_no_row(shape: tuple[int, ...], device: str) -> None:
    x, dy, weight, bias = (
        normal(*shape).to(device),
        normal(*shape).to(device),
        normal(6).to(device),
        normal(6).to(device),
    )
    y, s, rstd = rms_norm_forward(x, weight, eps=0.1, offset=0, round_before_weight=True)
    dx, dweight = rms_norm_backward(dy, s, weight, rstd, offset=0)
    truth = reference_rms_norm_backward(*doubles(dy, x, weight), eps=0.1)
    close = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of 6
    torch.testing.assert_close(y.cpu(), rms_norm(*doubles(x, weight), eps=0.1), **close)
    torch.testing.assert_close(dx.cpu(), truth.dx, **close)
    assert dweight is not None
    torch.testing.assert_close(dweight.cpu(), truth.dweight, **close)
    y, _, mean, rstd = layer_norm_forward(x, weight, bias, eps=0.1)
    of_layer_norm = layer_norm_backward(dy, x, weight, mean, rstd, bias=bias)
    torch.testing.assert_close(y.cpu(), layer_norm(*doubles(x, weight, bias), eps=0.1), **close)
    truth = reference_layer_norm_backward(*doubles(dy, x, weight, bias), eps=0.1)
    for found, exact in zip(of_layer_norm, truth, strict=True):
        assert found is not None and exact is not None
        torch.testing.assert_close(found.cpu(), exact, **close)


def test_expanded_inputs(device: str) -> None:
    weight = normal(5).to(device)
    x, dy = (
        normal(2, 1, 5).to(device).expand(2, 3, 5),
        torch.ones((), dtype=torch.float64, device=device).expand(2, 3, 5),
    )
    options = {"eps": 0.1, "offset": 0.0, "round_before_weight": True}
    y, s, rstd = rms_norm_forward(x, weight, residual=x, **options)
    expected = rms_norm_forward(x.contiguous(), weight, residual=x.contiguous(), **options)
    assert torch.equal(y, expected[0]) and torch.equal(s, expected[1])
    dx, _ = rms_norm_backward(dy, x, weight, rstd, offset=0)
    assert torch.equal(dx, rms_norm_backward(dy.contiguous(), x.contiguous(), weight, rstd, offset=0)[0])


@pytest.mark.parametrize("looped", [True, False])
def test_large_half_precision_rows_do_not_overflow(looped: bool, device: str) -> None:
    x = torch.full((2, 64), 60000.0, dtype=torch.float16, device=device)  # its square is far beyond float16
    weight = torch.ones(64, dtype=torch.float16, device=device)
    with walking(looped):
        y, s, rstd = rms_norm_forward(x, weight, eps=1e-6, offset=0, round_before_weight=True)
        dx, dweight = rms_norm_backward(torch.ones_like(x), s, weight, rstd, offset=0)
    assert torch.equal(y, torch.ones_like(x))
    assert dweight is not None and torch.equal(dweight, 2 * weight) and dx.abs().max() < 1e-4


def test_bad_outputs_are_refused(device: str) -> None:
    x, weight = normal(4, 6).to(device), normal(6).to(device)
    for out in (x.new_empty(4, 7), x.new_empty(6, 4).T, x.new_empty(1, 6).expand(4, 6)):
        with pytest.raises(LoRAError, match=r"out is .* expected \[4, 6\] with neighbouring"):
            rms_norm_forward(x, weight, eps=1e-6, offset=0, round_before_weight=True, out=out)
        with pytest.raises(LoRAError, match=r"out is .* expected \[4, 6\] with neighbouring"):
            rms_norm_backward(x, x, weight, x[:, 0], offset=0, out=out)
