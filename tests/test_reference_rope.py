"""rope: pairs of features turned by the position's angle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import ROUNDING, check_backward, normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora.errors import LoRAError
from lora.reference.rope import rope, rope_backward


def tables(positions: Tensor, rot: int, interleaved: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """cos and sin of every feature at these positions, [..., rot], laid out for the pairing."""
    theta = 10000.0 ** (-torch.arange(0, rot, 2, dtype=torch.float64) / rot)
    angles = positions.double()[..., None] * theta  # [..., rot / 2]
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    widths=st.sampled_from([(2, 2), (6, 6), (6, 4), (5, 2)]),
    interleaved=st.booleans(),
    batched=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_backward(
    sizes: tuple[int, int, int, int], widths: tuple[int, int], interleaved: bool, batched: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    (batch, heads, kv_heads, seq), (head_dim, rot) = sizes, widths
    positions = torch.randint(50, (batch, seq) if batched else (seq,))
    cos, sin = tables(positions, rot, interleaved)
    cos, sin = 1.3 * cos, 1.3 * sin  # as YaRN scales them
    check_backward(
        lambda q, k: rope(q, k, cos, sin, interleaved=interleaved),
        lambda dq, dk, q, k: rope_backward(dq, dk, cos, sin, interleaved=interleaved),
        [normal(batch, heads, seq, head_dim), normal(batch, kv_heads, seq, head_dim)],
    )


def test_backward_with_position_ids() -> None:
    cos, sin = tables(torch.arange(20), 4, False)
    ids = torch.randint(20, (2, 3))
    check_backward(
        lambda q, k: rope(q, k, cos, sin, position_ids=ids),
        lambda dq, dk, q, k: rope_backward(dq, dk, cos, sin, position_ids=ids),
        [normal(2, 2, 3, 6), normal(2, 1, 3, 6)],
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_is_multiplication_by_a_complex_number(interleaved: bool) -> None:
    q, k, positions = normal(2, 3, 5, 8), normal(2, 1, 5, 8), torch.randint(50, (2, 5))
    cos, sin = tables(positions, 6, interleaved)
    first, second = (slice(0, 6, 2), slice(1, 6, 2)) if interleaved else (slice(0, 3), slice(3, 6))
    turn = torch.complex(cos, sin)[:, None, :, first]  # one number a pair
    for x, turned in zip((q, k), rope(q, k, cos, sin, interleaved=interleaved), strict=True):
        expected = torch.complex(x[..., first], x[..., second]) * turn
        torch.testing.assert_close(turned[..., first], expected.real, **ROUNDING)
        torch.testing.assert_close(turned[..., second], expected.imag, **ROUNDING)
        assert torch.equal(turned[..., 6:], x[..., 6:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_only(interleaved: bool) -> None:
    q, k = (normal(1, 2, 1, 8).expand(1, 2, 6, 8) for _ in range(2))
    scores = []
    for start in (0, 17):
        cos, sin = tables(torch.arange(start, start + 6), 8, interleaved)
        turned_q, turned_k = rope(q, k, cos, sin, interleaved=interleaved)
        scores.append(turned_q @ turned_k.mT)
    torch.testing.assert_close(scores[0], scores[1], **ROUNDING)
    assert (scores[0][..., 0, 0] - scores[0][..., 0, 5]).abs().min() > 1e-3


def transformers_rope(family: str) -> Any:
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as gpt_neox
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

    return {"llama": llama, "gpt_neox": gpt_neox, "cohere": cohere}[family]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "rot", "interleaved"), [("llama", 8, False), ("gpt_neox", 4, False), ("cohere", 8, True)]
)
def test_is_transformers_rope_bit_for_bit(family: str, rot: int, interleaved: bool, dtype: torch.dtype) -> None:
    q, k = normal(2, 4, 5, 8, dtype=dtype), normal(2, 2, 5, 8, dtype=dtype)
    cos, sin = tables(torch.randint(500, (2, 5)), rot, interleaved, dtype)
    expected = transformers_rope(family)(q, k, cos, sin)
    if family == "cohere":  # Cohere rotates in float32
        cos, sin = cos.float(), sin.float()
    for found, wanted in zip(rope(q, k, cos, sin, interleaved=interleaved), expected, strict=True):
        assert found.dtype == wanted.dtype == dtype
        assert torch.equal(found, wanted)


def test_agrees_with_gpt_j() -> None:
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    q, positions = normal(2, 4, 5, 8), torch.randint(50, (2, 5))
    cos, sin = tables(positions, 8, True)
    expected = apply_rotary_pos_emb(q.transpose(1, 2), sin[..., ::2], cos[..., ::2]).transpose(1, 2)
    torch.testing.assert_close(rope(q, q, cos, sin, interleaved=True)[0], expected, **ROUNDING)


def test_the_ways_to_pass_cos_and_sin_agree() -> None:
    q, k = normal(2, 4, 5, 8), normal(2, 2, 5, 8)
    cos, sin = tables(torch.arange(30), 8, False)
    rows = slice(3, 8)
    ids = torch.arange(3, 8).expand(2, 5)
    expected = rope(q, k, cos[rows], sin[rows])
    for found in (
        rope(q, k, cos[None, rows], sin[None, rows]),
        rope(q, k, cos[rows].expand(2, 5, 8), sin[rows].expand(2, 5, 8)),
        rope(q, k, cos, sin, position_ids=ids),
    ):
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_float32_tables_round_once() -> None:
    q = normal(2, 4, 5, 8, dtype=torch.bfloat16)
    cos, sin = tables(torch.randint(500, (5,)), 8, False, torch.float32)
    truth = rope(q.double(), q.double(), cos.double(), sin.double())[0]
    error = (rope(q, q, cos, sin)[0] - truth).abs()
    float32_sum = 3 * 2**-24 * 2 * q.double().abs().max()
    assert error.max() > 0
    assert (error <= 2**-8 * truth.abs() + float32_sum).all()


@pytest.mark.parametrize("shape", [(2, 3, 0, 8), (2, 3, 1, 8), (0, 3, 4, 8)])
def test_no_token_and_one(shape: tuple[int, ...]) -> None:
    cos, sin = tables(torch.arange(shape[2]), 8, False)
    q, k = rope(normal(*shape), normal(*shape), cos, sin)
    assert q.shape == k.shape == torch.Size(shape)


def test_layout_does_not_matter() -> None:
    q, k = normal(2, 5, 4, 8).transpose(1, 2), normal(2, 1, 5, 8).expand(2, 4, 5, 8)  # as an attention layer views them
    cos, sin = tables(torch.arange(5), 8, False)
    found, expected = rope(q, k, cos, sin), rope(q.contiguous(), k.contiguous(), cos, sin)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 8), r"\[4, 8\] for q of \[2, 3, 5, 8\], expected \[5, rot\] or \[2, 5, rot\]"),
        ((3, 5, 8), "expected"),
        ((2, 4, 8), "expected"),
        ((1, 1, 5, 8), r"are \[1, 1, 5, 8\]"),
        ((5, 10), "10 wide for heads of 8, expected an even width of at most 8"),
        ((5, 3), "3 wide"),
    ],
)
def test_tables_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    q, table = normal(2, 3, 5, 8), normal(*shape)
    with pytest.raises(LoRAError, match=message):
        rope(q, q, table, table)


def test_positions_outside_the_table_are_refused() -> None:
    q, (cos, sin) = normal(1, 1, 2, 8), tables(torch.arange(20), 8, False)
    for wrong in (20, -1):
        with pytest.raises(LoRAError, match=f"Position {wrong} is outside the rotary table, expected 0 to 19"):
            rope(q, q, cos, sin, position_ids=torch.tensor([[3, wrong]]))
    with pytest.raises(LoRAError, match="leave position_ids out"):
        rope(q, q, cos[None], sin[None], position_ids=torch.tensor([[3, 4]]))
