"""The rotary kernel against `lora.reference.rope`: bit for bit, where the arithmetic allows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora.errors import LoRAError
from lora.fast.kernels.rope import rope_forward
from lora.reference.rope import rope, rope_backward
from lora.testing import assert_within

Roundoff = Callable[[torch.dtype], float]


def laid_out(x: Tensor, layout: str, device: str) -> Tensor:
    """The same numbers, [batch, heads, seq, head_dim], in memory in another way."""
    batch, heads, seq, size = x.shape
    if layout == "transposed":  # what transformers hands over
        return x.to(device).transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "fused":  # some heads of a wider q/k/v buffer
        wide = torch.full((batch, seq, (heads + 2) * size), float("nan"), dtype=x.dtype, device=device)
        view = wide[..., size : (heads + 1) * size].view(batch, seq, heads, size).transpose(1, 2)
        return view.copy_(x)
    if layout == "by feature":
        return x.to(device).transpose(2, 3).contiguous().transpose(2, 3)
    return x.to(device)


def bound(x: Tensor, table: Tensor, exact: Tensor, u: Roundoff) -> Tensor:
    """Two roundings of each product and of their sum in the wider dtype, and one to x's; `size`: their most."""
    compute = torch.promote_types(x.dtype, table.dtype)
    size = 2 * x.double().abs().max() * table.double().abs().max()
    underflow = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    return 2 * u(compute) * size + u(x.dtype) * exact.abs() + 3 * underflow


def check(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, roundoff: Roundoff, inverse: bool = False, **options: Any
) -> None:
    reference = rope_backward if inverse else rope
    found = rope_forward(q, k, cos, sin, inverse=inverse, **options)
    exact = reference(*(tensor.double() for tensor in (q, k, cos, sin)), **options)
    same = reference(q, k, cos, sin, **options)
    for name, one, truth, other, x in zip("qk", found, exact, same, (q, k), strict=True):
        assert one.dtype == x.dtype
        assert_within(one.cpu(), truth.cpu(), bound(x, cos, truth, roundoff).cpu(), name)
        # A GPU fuses products and sums (one rounding fewer); the interpreter does not, but it cuts bfloat16 off.
        if one.device.type == "cpu" and roundoff(x.dtype) < torch.finfo(x.dtype).eps:
            assert torch.equal(one, other), name


@given(
    batch=st.integers(1, 2),
    heads=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    seq=st.integers(1, 4),
    pairs=st.integers(1, 17),
    rest=st.sampled_from([0, 0, 1, 6]),
    dtypes=st.sampled_from(
        [
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
            (torch.float16, torch.float16),
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float16),
        ]
    ),
    layouts=st.lists(st.sampled_from(["plain", "transposed", "fused", "by feature"]), min_size=2, max_size=2),
    tables=st.sampled_from(["seq", "one", "batch", "ids", "one row of ids", "int32 ids"]),
    interleaved=st.booleans(),
    inverse=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_is_the_reference(
    batch: int,
    heads: tuple[int, int],
    seq: int,
    pairs: int,
    rest: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    layouts: list[str],
    tables: str,
    interleaved: bool,
    inverse: bool,
    seed: int,
    device: str,
    roundoff: Roundoff,
) -> None:
    torch.manual_seed(seed)
    q, k = (
        laid_out(normal(batch, count, seq, 2 * pairs + rest, dtype=dtypes[0]), layout, device)
        for count, layout in zip(heads, layouts, strict=True)
    )
    shape = {"seq": (seq,), "one": (1, seq), "batch": (batch, seq)}.get(tables, (7,))
    cos, sin = (normal(*shape, 2 * pairs, dtype=dtypes[1]).to(device) for _ in range(2))
    ids = None
    if "ids" in tables:
        ids = torch.randint(7, (1 if "one row" in tables else batch, seq), device=device)
        ids = ids.int() if "int32" in tables else ids
    check(q, k, cos, sin, roundoff, inverse, position_ids=ids, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_more_heads_than_a_tile(interleaved: bool, device: str, roundoff: Roundoff) -> None:
    q, k = normal(1, 70, 2, 128, dtype=torch.float32).to(device), normal(1, 33, 2, 128, dtype=torch.float32).to(device)
    cos, sin = (normal(2, 128, dtype=torch.float32).to(device) for _ in range(2))
    check(q, k, cos, sin, roundoff, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_there_and_back(interleaved: bool, device: str) -> None:
    """With true angles, and both features of a pair turned by the same."""
    q, k = normal(2, 3, 4, 10).to(device), normal(2, 1, 4, 10).to(device)
    angle = normal(4, 4)
    angle = angle.repeat_interleave(2, dim=1) if interleaved else torch.cat([angle, angle], dim=1)
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    turned = rope_forward(q, k, cos, sin, interleaved=interleaved)
    back = rope_forward(*turned, cos, sin, interleaved=interleaved, inverse=True)
    for x, y, z in zip((q, k), turned, back, strict=True):
        assert (y - x).abs().max() > 0.1
        torch.testing.assert_close(z, x, rtol=1e-14, atol=1e-14)  # six float64 operations
        assert torch.equal(y[..., 8:], x[..., 8:])  # rot is 8 of 10


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rot", [6, 10])
def test_in_place_in_a_fused_buffer(interleaved: bool, rot: int, device: str) -> None:
    batch, seq, heads, kv_heads, size = 2, 3, 4, 2, 10
    buffer = normal(batch, seq, (heads + 2 * kv_heads) * size, dtype=torch.float32).to(device)
    before = buffer.clone()
    views = buffer.view(batch, seq, heads + 2 * kv_heads, size).transpose(1, 2)
    q, k = views[:, :heads], views[:, heads : heads + kv_heads]
    cos, sin = (normal(seq, rot, dtype=torch.float32).to(device) for _ in range(2))
    expected = rope_forward(q, k, cos, sin, interleaved=interleaved)
    assert torch.equal(buffer, before)
    found = rope_forward(q, k, cos, sin, interleaved=interleaved, out_q=q, out_k=k)
    assert found[0] is q and found[1] is k
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])
    assert torch.equal(buffer[..., -kv_heads * size :], before[..., -kv_heads * size :])  # v


def test_one_in_place_and_one_elsewhere(device: str) -> None:
    q, k, cos, sin = (normal(*shape).to(device) for shape in ((2, 3, 4, 9), (2, 1, 4, 9), (4, 6), (4, 6)))
    expected = rope_forward(q, k, cos, sin)
    wide = torch.full((2, 4, 5, 9), float("nan"), dtype=torch.float64, device=device)
    out_q = wide.transpose(1, 2)[:, 1:4]
    rope_forward(q, k, cos, sin, out_q=out_q, out_k=k)
    assert torch.equal(out_q, expected[0]) and torch.equal(k, expected[1])
    assert wide[:, :, 0].isnan().all() and wide[:, :, 4].isnan().all()


def test_new_tensors_lie_in_memory_as_q_and_k_do(device: str) -> None:
    """So that a backward through the transposed view of [batch, seq, heads · head_dim] copies nothing."""
    q, k = (laid_out(normal(2, heads, 4, 8), "transposed", device) for heads in (3, 2))
    cos, sin = normal(4, 8).to(device), normal(4, 8).to(device)
    for x, y in zip((q, k), rope_forward(q, k, cos, sin), strict=True):
        assert y.stride() == x.stride() and y.data_ptr() != x.data_ptr()


def test_a_position_outside_the_table_is_nan(device: str) -> None:
    q, k, cos, sin = (normal(*shape).to(device) for shape in ((1, 2, 4, 8), (1, 1, 4, 8), (5, 6), (5, 6)))
    ids = torch.tensor([[0, 5, -1, 4]], device=device)
    for x, y in zip((q, k), rope_forward(q, k, cos, sin, position_ids=ids), strict=True):
        assert y[:, :, 1:3, :6].isnan().all() and y[:, :, [0, 3]].isfinite().all()
        assert torch.equal(y[..., 6:], x[..., 6:])


@pytest.mark.parametrize(("batch", "seq"), [(0, 4), (2, 0), (1, 1)])
def test_no_token_and_one(batch: int, seq: int, device: str, roundoff: Roundoff) -> None:
    q, k = normal(batch, 3, seq, 8).to(device), normal(batch, 2, seq, 8).to(device)
    cos, sin = normal(seq, 6).to(device), normal(seq, 6).to(device)
    if batch * seq:
        check(q, k, cos, sin, roundoff)
    else:
        assert [x.shape for x in rope_forward(q, k, cos, sin)] == [q.shape, k.shape]


def test_expanded_inputs(device: str) -> None:
    q, k = normal(1, 3, 4, 6).to(device).expand(2, 3, 4, 6), normal(2, 1, 4, 6).to(device).expand(2, 5, 4, 6)
    cos, sin = normal(1, 4, 6).to(device).expand(2, 4, 6), normal(1, 6).to(device).expand(4, 6)[None]
    found = rope_forward(q, k, cos, sin.expand(2, 4, 6))
    expected = rope(q, k, cos, sin)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


def test_bad_input_is_refused(device: str) -> None:
    q, k, cos = normal(2, 3, 4, 8).to(device), normal(2, 1, 4, 8).to(device), normal(4, 6).to(device)
    ids = torch.zeros(2, 4, dtype=torch.int64, device=device)
    wrong: list[tuple[Any, ...]] = [
        (q[0], k, cos, cos, None),
        (q, k[:, :, :3], cos, cos, None),
        (q, k[:1], cos, cos, None),
        (q, k, cos[:3], cos[:3], None),
        (q, k, cos[0], cos[0], None),
        (q, k, cos, cos[:, :4], None),
        (q, k, cos, cos.float(), None),
        (q, k, cos[:, :5], cos[:, :5], None),
        (q, k, cos[:, :0], cos[:, :0], None),
        (q, k, cos.repeat(1, 2), cos.repeat(1, 2), None),
        (q, k, cos.expand(3, 4, 6), cos.expand(3, 4, 6), None),
        (q, k, cos.expand(2, 4, 6), cos.expand(2, 4, 6), ids),
        (q, k, cos, cos, ids[:, :3]),
        (q, k, cos, cos, ids.repeat(2, 1)),
    ]
    for *tensors, positions in wrong:
        with pytest.raises(LoRAError, match=r"rope was given q \[.*expected q and k \[batch, heads, seq"):
            rope_forward(*tensors, position_ids=positions)
    for out in (q[:, :2], q.transpose(2, 3).contiguous().transpose(2, 3), q[:, :1].expand(2, 3, 4, 8)):
        with pytest.raises(LoRAError, match=r"out_q is .* expected \[2, 3, 4, 8\]"):
            rope_forward(q, k, cos, cos, out_q=out)
