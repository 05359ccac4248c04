"""What a group of projections multiplies by, proven: pieces of memory are one matrix only where they lie like one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora.fast.operands import as_rows, columns_of_one, factors_of, multiplied, rows_of_one
from lora.fast.parts import Part
from lora.testing.bounded import exact
from lora.testing.report import assert_within
from proof.laws import assert_same_bits, examples

three = {"min_size": 3, "max_size": 3}
sizes = st.lists(st.integers(1, 4), min_size=2, max_size=3)
gaps = st.sampled_from([-1, 0, 0, 0, 1, 3])
MEMORY = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OTHER = MEMORY.clone()
others = st.lists(st.sampled_from([False, False, False, True]), **three)


def view(other: bool, size: tuple[int, int], stride: tuple[int, int], offset: int) -> Tensor:
    return (OTHER if other else MEMORY).as_strided(size, stride, offset)


@examples(200)
@given(data=st.data(), rows=sizes, columns=st.integers(1, 5), skips=st.lists(gaps, **three), other=others)
def test_rows_are_of_one_matrix_or_are_not_said_to_be(data, rows, columns, skips, other):
    """Matrices anywhere in one or two memories, in any order, with gaps and strides: None, or what `cat` gives."""
    stride = (columns + data.draw(st.sampled_from([0, 0, 2])), data.draw(st.sampled_from([1, 1, 1, 2])))
    weights, place = [], 7
    for count, skip, elsewhere in zip(rows, skips, other, strict=False):
        weights.append(view(elsewhere, (count, columns), stride, place + skip))
        place += skip + count * columns
    backwards = data.draw(st.booleans())
    together = rows_of_one(weights[::-1] if backwards else weights)
    if together is not None:
        assert_same_bits(together, torch.cat(weights[::-1] if backwards else weights), "the stacked weight")
    elif stride == (columns, 1):
        assert backwards or any(skips[1 : len(rows)]) or any(other[: len(rows)])


@examples(200)
@given(data=st.data(), widths=sizes, tokens=st.integers(1, 4), skips=st.lists(gaps, **three), other=others)
def test_columns_are_of_one_buffer_or_are_not_said_to_be(data, widths, tokens, skips, other):
    """Gradients anywhere in one or two memories, interleaved ones too: None, or what `cat` gives."""
    stride = (data.draw(st.sampled_from([40, 40, 1, 0])), data.draw(st.sampled_from([1, 1, 2])))
    gradients, place = [], 7
    for width, skip, elsewhere in zip(widths, skips, other, strict=False):
        gradients.append(view(elsewhere, (tokens, width), stride, place + skip))
        place += skip + width
    side_by_side = columns_of_one(gradients)
    if side_by_side is not None:
        assert_same_bits(side_by_side, torch.cat(gradients, 1), "the gradients side by side")
    elif stride == (40, 1):
        assert any(skips[1 : len(widths)]) or any(other[: len(widths)])


@examples(100)
@given(data=st.data(), sizes=sizes, fan_in=st.integers(1, 5), tokens=st.integers(0, 4))
def test_products_are_those_of_each_weight(data, sizes, fan_in, tokens):
    """Weights that are rows of one matrix in the wrong order, or with a gap between them."""
    first = data.draw(st.integers(0, 3))
    order = data.draw(st.permutations(range(len(sizes))))
    matrix = MEMORY[: 20 * fan_in].view(20, fan_in)
    starts = [first + sum(sizes[:i]) + i * data.draw(st.integers(0, 1)) for i in range(len(sizes))]
    weights = [matrix[starts[i] : starts[i] + sizes[i]] for i in order]
    parts = [Part(weight, None, None, None, None, None, 1.0) for weight in weights]
    x = MEMORY[500 : 500 + tokens * fan_in].view(tokens, fan_in)
    h = torch.cat([*multiplied(x, parts)], 1)
    expected = exact(x) @ exact(torch.cat(weights)).T
    assert_within(h, expected.value, 2 * expected.bound())  # each of the two was summed in float64


@examples(50)
@given(
    adapted=st.lists(st.booleans(), min_size=1, max_size=3),
    ranks=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16]), min_size=3, max_size=3),
    wanted=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_factors_are_each_parts_own(adapted, ranks, dtypes, wanted):
    """The A's one under another, and each part's own B or none, cast to what is wanted, whatever type each has."""
    parts = []
    for i, (has, r, dtype) in enumerate(zip(adapted, ranks, dtypes, strict=False)):
        A = MEMORY[i * 50 : i * 50 + r * 4].view(r, 4).to(dtype) if has else None
        B = MEMORY[i * 70 : i * 70 + 5 * r].view(5, r).to(dtype) if has else None
        parts.append(Part(MEMORY[:20].view(5, 4), None, A, B, None, None, 1.0))
    factors = factors_of(parts, wanted)
    if not any(adapted):
        assert factors is None
        return
    assert_same_bits(factors.A, torch.cat([p.lora_A.to(wanted) for p in parts if p.lora_A is not None]), "A")
    for part, B in zip(parts, factors.B, strict=True):
        assert (B is None) == (part.lora_B is None)
        if B is not None:
            assert_same_bits(B, part.lora_B.to(wanted), "B")


@examples(30)
@given(lead=st.lists(st.integers(0, 3), max_size=2), features=st.integers(1, 4), transposed=st.booleans())
def test_rows_are_the_tokens_side_by_side(lead, features, transposed):
    count = torch.Size(lead).numel() * features
    x = MEMORY[:count].view(features, *lead).movedim(0, -1) if transposed else MEMORY[:count].view(*lead, features)
    rows = as_rows(x)
    assert rows.stride(-1) == 1 or rows.shape[1] <= 1 or not rows.numel()
    assert_same_bits(rows, x.contiguous().view(-1, features) if count else x.reshape(rows.shape), "rows")
