"""NF4, proven: bit for bit, in both directions, for any size."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lora.fast.nf4 import decode_into
from lora.nf4_format import NF4_CODES, midpoints
from lora.projection import NF4Weight
from lora.reference.nf4 import nf4_absmax
from lora.testing.cases import LAYOUTS, laid
from lora.testing.proof import BACKENDS, bits
from proof.laws import both, examples

sides = st.integers(1, 9)
widths = st.integers(1, 70) | st.sampled_from([63, 64, 65, 127, 128, 129, 255])
blocks = st.sampled_from([32, 64, 128])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
seeds = st.integers(0, 2**32)
sizes = st.sampled_from([1.0, 1e-3, 1e-30, 1e30])


def weight(rows: int, columns: int, seed: int, size: float = 1.0, zero_rows: bool = True) -> Tensor:
    """Rows of different sizes, one of them zero where there are several."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * (torch.rand(rows, 1, generator=generator) + 0.01) * size
    if zero_rows and rows > 2:
        w[rows // 2] = 0
    return w


def quantise(backend: str, w: Tensor, block: int = 64, double: bool = True) -> NF4Weight:
    return BACKENDS[backend].nf4_quantize(w, block_size=block, double_quant=double)


def codes_of(quantised: NF4Weight) -> Tensor:
    """The code of each element, int64 [n]."""
    byte = quantised.codes.long().cpu()
    n = quantised.shape[0] * quantised.shape[1]
    return torch.stack([byte >> 4, byte & 15], 1).flatten()[:n]


def assert_same(one: NF4Weight, other: NF4Weight) -> None:
    for part, expected in zip(one, other, strict=True):
        assert torch.equal(part, expected) if isinstance(part, Tensor) else part == expected


@examples(40)
@given(rows=sides, columns=widths, block=blocks, double=st.booleans(), dtype=dtypes, seed=seeds, size=sizes)
def test_both_backends_quantise_to_the_same_bits(device, rows, columns, block, double, dtype, seed, size):
    if dtype == torch.float16:
        size = min(max(size, 1e-3), 1.0)
    w = weight(rows, columns, seed, size).to(device, dtype)
    assert_same(quantise("fast", w, block, double), quantise("reference", w, block, double))


@examples(60)
@given(rows=sides, columns=widths, block=blocks, double=st.booleans(), dtype=dtypes, seed=seeds, size=sizes)
def test_both_backends_decode_to_the_same_bits(device, rows, columns, block, double, dtype, seed, size):
    quantised = quantise("reference", weight(rows, columns, seed, size).to(device), block, double)
    one, other = (ops.nf4_dequantize(quantised, dtype) for ops in BACKENDS.values())
    assert torch.equal(bits(one), bits(other)) and one.shape == (rows, columns)


@both
@examples(30)
@given(rows=sides, columns=widths, seed=seeds)
def test_decoding_is_a_table_and_a_product(device, backend, rows, columns, seed):
    """w' = c_q · absmax in float32, element by element, high nibble first."""
    quantised = quantise("reference", weight(rows, columns, seed).to(device))
    absmax = nf4_absmax(quantised).cpu().repeat_interleave(64)[: rows * columns]
    expected = (NF4_CODES[codes_of(quantised)] * absmax).view(rows, columns)
    assert torch.equal(BACKENDS[backend].nf4_dequantize(quantised, torch.float32).cpu(), expected)


@both
@examples(30)
@given(rows=sides, columns=widths, seed=seeds, dtype=dtypes)
def test_each_element_gets_the_nearest_code(device, backend, rows, columns, seed, dtype):
    """A tie goes to the lower code; the largest of a block is kept exactly where it is positive or -absmax."""
    w = weight(rows, columns, seed).to(dtype)
    quantised = quantise(backend, w.to(device), double=False)
    absmax = quantised.absmax.cpu()
    values = torch.nn.functional.pad(w.flatten().float(), (0, -w.numel() % 64)).view(-1, 64)
    assert torch.equal(absmax, values.abs().amax(1))
    scaled = (values * (1 / absmax.clamp(min=1e-38))[:, None]).flatten()[: w.numel()]
    nearest = (scaled[:, None].double() > midpoints(NF4_CODES).double()).sum(1)
    assert torch.equal(codes_of(quantised), nearest)


@both
@examples(30)
@given(rows=sides, columns=widths, seed=seeds, block=blocks)
def test_an_error_is_at_most_half_the_widest_gap(device, backend, rows, columns, seed, block):
    w = weight(rows, columns, seed)
    quantised = quantise(backend, w.to(device), block, double=False)
    found = BACKENDS[backend].nf4_dequantize(quantised, torch.float32).cpu()
    absmax = quantised.absmax.cpu().repeat_interleave(block)[: w.numel()].view(rows, columns)
    gap = float(NF4_CODES.diff().max()) / 2 * (1 + 1e-6)  # the scaled value is rounded three times
    assert ((found - w).abs() <= gap * absmax).all()


@both
@examples(30)
@given(rows=sides, columns=widths, seed=seeds, block=blocks)
def test_quantising_again_changes_nothing(device, backend, rows, columns, seed, block):
    """Codes, absmax and decoded bits are those of the first time."""
    once = quantise(backend, weight(rows, columns, seed).to(device), block, double=False)
    again = quantise(backend, BACKENDS[backend].nf4_dequantize(once, torch.float32), block, double=False)
    assert_same(again, once)


@both
@examples(30)
@given(rows=sides, columns=widths, seed=seeds, double=st.booleans())
def test_twice_the_weight_is_twice_the_result(device, backend, rows, columns, seed, double):
    """Every bit, through both levels."""
    w = weight(rows, columns, seed).to(device)
    one, two = (quantise(backend, w * factor, double=double) for factor in (1, 2))
    assert torch.equal(one.codes, two.codes)
    found = [BACKENDS[backend].nf4_dequantize(q, torch.float32) for q in (one, two)]
    assert torch.equal(found[0] * 2, found[1])


@both
@examples(20)
@given(blocks_=st.integers(1, 5), seed=seeds, which=st.integers(0, 4))
def test_blocks_do_not_see_each_other(device, backend, blocks_, seed, which):
    """One level only: another number in one block leaves the others' bits alone."""
    w = weight(blocks_, 64, seed).to(device)
    other = w.clone()
    other[which % blocks_] += 3
    one, two = (quantise(backend, x, double=False) for x in (w, other))
    same = torch.arange(blocks_) != which % blocks_
    assert torch.equal(one.absmax.cpu()[same], two.absmax.cpu()[same])
    assert torch.equal(one.codes.view(blocks_, 32).cpu()[same], two.codes.view(blocks_, 32).cpu()[same])


@both
@example(rows=1, columns=70, seed=0, layout="strided")  # one row: a vector with gaps, which a reshape does not close
@examples(20)
@given(rows=sides, columns=widths, seed=seeds, layout=st.sampled_from(LAYOUTS[:-1]))
def test_memory_layout_does_not_matter(device, backend, rows, columns, seed, layout):
    """Rows of a wider matrix, every second column, columns side by side: the same bytes."""
    w = weight(rows, columns, seed).to(device)
    assert_same(quantise(backend, laid(w, layout)), quantise(backend, w))


@both
@examples(20)
@given(rows=st.integers(1, 6), seed=seeds)
def test_the_end_of_a_matrix_is_the_start_of_a_longer_one(device, backend, rows, seed):
    """Odd sizes: the first n elements are quantised and decoded as they are when more blocks follow."""
    long = weight(rows + 1, 64, seed).to(device)
    whole, start = quantise(backend, long, double=False), quantise(backend, long[:rows], double=False)
    decode = BACKENDS[backend].nf4_dequantize
    assert torch.equal(decode(whole, torch.float32)[:rows], decode(start, torch.float32))


@both
@examples(20)
@given(count=st.integers(1, 300), block=blocks, double=st.booleans(), dtype=dtypes)
def test_zeros_stay_zeros(device, backend, count, block, double, dtype):
    quantised = quantise(backend, torch.zeros(1, count, device=device), block, double)
    assert not BACKENDS[backend].nf4_dequantize(quantised, dtype).any()


@both
@examples(20)
@given(rows=sides, columns=widths, seed=seeds, dtype=dtypes)
def test_a_narrow_type_is_the_wide_one_rounded_once(device, backend, rows, columns, seed, dtype):
    quantised = quantise(backend, weight(rows, columns, seed).to(device))
    decode = BACKENDS[backend].nf4_dequantize
    assert torch.equal(decode(quantised, dtype), decode(quantised, torch.float32).to(dtype))


@examples(30)
@given(rows=sides, columns=widths, seed=seeds, dtype=dtypes, before=st.integers(0, 5), after=st.integers(0, 5))
def test_decoding_into_wider_rows_writes_nothing_else(device, rows, columns, seed, dtype, before, after):
    """The fast backend decodes straight into an operand: its neighbours keep their bits."""
    quantised = quantise("reference", weight(rows, columns, seed).to(device))
    wide = torch.full((rows, before + columns + after), 7.0, dtype=dtype, device=device)
    decode_into(quantised, wide[:, before : before + columns])
    assert torch.equal(wide[:, before : before + columns], BACKENDS["reference"].nf4_dequantize(quantised, dtype))
    assert (wide[:, :before] == 7).all() and (wide[:, before + columns :] == 7).all()
