"""NF4 against its definition, and byte for byte against bitsandbytes."""

from __future__ import annotations

import math
from statistics import NormalDist

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora.errors import LoRAError
from lora.nf4_format import BLOCK_SIZES, DYNAMIC_CODES, NF4_CODES, midpoints
from lora.projection import NF4Weight, Projection
from lora.reference.dora import dora_norm
from lora.reference.linear import frozen_linear, lora_linear, lora_linear_backward
from lora.reference.nf4 import (
    SMALLEST_ABSMAX,
    loftq,
    nf4_absmax,
    nf4_bits,
    nf4_bytes,
    nf4_dequantize,
    nf4_error,
    nf4_quantize,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def indices(quantised: NF4Weight) -> Tensor:
    """The code index of every element, [n]."""
    pairs = torch.stack([quantised.codes >> 4, quantised.codes & 15], dim=1)
    return pairs.flatten()[: math.prod(quantised.shape)].long()


# --- the two tables ---------------------------------------------------------------------------------------------


def test_codes_are_normal_quantiles() -> None:
    """The published constants are float32 numbers made from float32 probabilities.

    A probability near 0.97 is off by at most 2^-25; the quantile's slope there is 1/φ(1.85) = 13.8; the largest
    quantile, 1.85, divides both: (13.8 + 13.8) · 2^-25 / 1.85 < 5e-7.
    """
    p = (31 / 32 + 29 / 30) / 2
    half = [NormalDist().inv_cdf(0.5 + (p - 0.5) * i / 8) for i in range(1, 9)]
    other = [NormalDist().inv_cdf(0.5 + (p - 0.5) * i / 7) for i in range(1, 8)]
    codes = torch.tensor([*(-q for q in reversed(other)), 0.0, *half], dtype=torch.float64) / half[-1]
    assert (codes - NF4_CODES.double()).abs().max() < 5e-7


def test_tables_are_bitsandbytes_own() -> None:
    assert torch.equal(NF4_CODES, bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(DYNAMIC_CODES, bnb.create_dynamic_map())
    assert DYNAMIC_CODES.shape == (256,) and DYNAMIC_CODES.unique().numel() == 256


def test_known_bytes() -> None:
    """High nibble first; ties to the lower code; the byte of two zeros is 0x77."""
    tie = float(midpoints(NF4_CODES)[11])  # half way between codes 11 and 12, exactly
    above = float(torch.nextafter(torch.tensor(tie), torch.tensor(1.0)))
    quantised = nf4_quantize(torch.tensor([1.0, -1.0, 0.0, tie, above, -0.5] + 26 * [0.0]), block_size=32)
    assert quantised.codes.tolist() == [0xF0, 0x7B, 0xC2] + 13 * [0x77]


# --- quantisation, against bitsandbytes --------------------------------------------------------------------------


def bnb_quantize(weight: Tensor, block_size: int, double_quant: bool) -> tuple[Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(weight, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4")


def assert_same_codes(weight: Tensor, ours: NF4Weight, theirs: Tensor) -> None:
    """Every code alike, but for a last block that is not full: there bitsandbytes' CPU code divides by absmax
    where it multiplies by 1 / absmax elsewhere. Only elements for which the two disagree may differ, by one code.
    """
    found, expected = indices(ours), indices(ours._replace(codes=theirs.flatten()))
    full = found.numel() - found.numel() % ours.block_size
    assert torch.equal(found[:full], expected[:full])
    rest = weight.flatten()[full:].float()
    if rest.numel():
        absmax = rest.abs().max().clamp(min=SMALLEST_ABSMAX)
        bounds = midpoints(NF4_CODES)
        multiplied, divided = (torch.bucketize(v, bounds) for v in (rest * (1 / absmax), rest / absmax))
        assert torch.equal(found[full:], multiplied)
        assert torch.equal(expected[full:], divided)
    if found.numel() % 2:
        assert ours.codes[-1] & 15 == theirs.flatten()[-1] & 15 == 7


def assert_same_absmax(ours: Tensor, theirs: Tensor, elements: int, block_size: int) -> None:
    """Bit for bit, but for a last block that is not full and all zero: bitsandbytes' CPU code stores 1e-38 for it."""
    if elements % block_size and ours[-1] < SMALLEST_ABSMAX:
        assert theirs[-1] == torch.tensor(SMALLEST_ABSMAX)
        ours, theirs = ours[:-1], theirs[:-1]
    assert torch.equal(ours, theirs)


def assert_same_nested(plain: NF4Weight, ours: NF4Weight, theirs: bnb.QuantState) -> None:
    """offset and absmax2 bit for bit. The 8-bit codes too, except where bitsandbytes' CPU code, which rounds to one
    of 65,536 points of [-1, 1] first, lands on the other side of a boundary within half a step of the value.
    """
    assert ours.nested_absmax is not None and ours.nested_offset is not None
    assert torch.equal(ours.nested_offset, theirs.offset)
    assert torch.equal(ours.nested_absmax, theirs.state2.absmax)
    found, expected = ours.absmax.long(), theirs.absmax.long()
    scale = ours.nested_absmax.repeat_interleave(256)[: found.numel()]
    spread = scale > 0  # one block, or all alike: nothing is left, and bitsandbytes writes code 0 for it
    assert torch.equal(found[~spread], torch.full_like(found[~spread], 127)) and (expected[~spread] == 0).all()
    value = ((plain.absmax - ours.nested_offset) * (1 / scale))[spread].double()
    half_step = 1 / 65535 + 4 * 2.0**-24  # and the roundings of value + 1, times 32767.5, plus ½
    bounds = midpoints(DYNAMIC_CODES).double()
    lowest, highest = torch.bucketize(value - half_step, bounds), torch.bucketize(value + half_step, bounds)
    assert ((lowest <= expected[spread]) & (expected[spread] <= highest)).all()
    certain = lowest == highest
    assert torch.equal(found[spread][certain], expected[spread][certain])


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 90),
    block_size=st.sampled_from(BLOCK_SIZES[:5]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-12, 12),
    zero_blocks=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_bytes_equal_bitsandbytes(
    rows: int, columns: int, block_size: int, dtype: torch.dtype, exponent: int, zero_blocks: bool, seed: int
) -> None:
    weight = normal(rows, columns, seed=seed, dtype=dtype, scale=2.0**exponent)
    if zero_blocks:
        weight.view(-1)[:block_size] = 0
        weight.view(-1)[-(weight.numel() % block_size or block_size) :] = 0
    codes, state = bnb_quantize(weight, block_size, double_quant=False)
    plain = nf4_quantize(weight, block_size=block_size, double_quant=False)
    assert plain.shape == weight.shape and plain.dtype == dtype
    assert_same_codes(weight, plain, codes)
    assert_same_absmax(plain.absmax, state.absmax, weight.numel(), block_size)

    codes, state = bnb_quantize(weight, block_size, double_quant=True)
    nested = nf4_quantize(weight, block_size=block_size)
    assert torch.equal(nested.codes, plain.codes)
    if not (zero_blocks and weight.numel() % block_size):  # there the 1e-38 enters bitsandbytes' mean
        assert_same_nested(plain, nested, state)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_equal_bitsandbytes_on_a_layer(block_size: int, dtype: torch.dtype) -> None:
    """A whole layer: several hundred 8-bit codes, every element in a full block."""
    weight = normal(192, 1024, seed=block_size, dtype=dtype, scale=0.02)
    codes, state = bnb_quantize(weight, block_size, double_quant=True)
    plain = nf4_quantize(weight, block_size=block_size, double_quant=False)
    ours = nf4_quantize(weight, block_size=block_size)
    assert torch.equal(ours.codes, codes.flatten())
    assert_same_nested(plain, ours, state)


def test_the_boundaries_between_codes_are_bitsandbytes_own() -> None:
    """Values within two ulps of every boundary, for many absmax: where w · fl(1 / absmax) and w / absmax differ."""
    absmax = normal(400, seed=7).abs() + 0.1
    near = absmax[:, None] * midpoints(NF4_CODES)  # [400, 15]
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    steps = [near, near.nextafter(up), near.nextafter(down), near.nextafter(up).nextafter(up)]
    blocks = torch.cat([absmax[:, None], *steps, torch.zeros(400, 3)], dim=1)  # [400, 64], absmax first
    multiplied, divided = (
        torch.bucketize(v, midpoints(NF4_CODES)) for v in (blocks * (1 / blocks[:, :1]), blocks / blocks[:, :1])
    )
    assert (multiplied != divided).sum() > 1000  # so that the test can tell
    codes, _ = bnb_quantize(blocks, 64, double_quant=False)
    ours = nf4_quantize(blocks, double_quant=False)
    assert torch.equal(ours.codes, codes.flatten())
    for columns in range(1, 64, 7):  # and in a last block that is not full
        weight = blocks[:200, :columns].flatten()
        codes, _ = bnb_quantize(weight, 64, double_quant=False)
        assert_same_codes(weight, nf4_quantize(weight, double_quant=False), codes)


# --- dequantisation, against bitsandbytes ------------------------------------------------------------------------


def bnb_dequantize(quantised: NF4Weight, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' decoding of `quantised`, as one row.

    As a matrix whose rows are not whole blocks, its AVX-512 code gives elements another block's absmax; its GPU code,
    like ours, counts blocks through the whole matrix, which is what one long row does.
    """
    elements = math.prod(quantised.shape)
    state = bnb.QuantState(
        absmax=quantised.absmax,
        shape=torch.Size([1, elements]),
        code=NF4_CODES,
        blocksize=quantised.block_size,
        quant_type="nf4",
        dtype=dtype,
    )
    if quantised.nested_absmax is not None:
        state.offset, state.nested = quantised.nested_offset, True
        state.state2 = bnb.QuantState(
            absmax=quantised.nested_absmax,
            code=DYNAMIC_CODES,
            blocksize=quantised.nested_block_size,
            dtype=torch.float32,
        )
    with torch.compiler.set_stance("force_eager"):  # its path for odd sizes would compile
        decoded = bnb.dequantize_4bit(quantised.codes.reshape(-1, 1), state, quant_type="nf4")
    # a matrix of one or two elements has a single byte, which bitsandbytes takes for a transposed weight
    return decoded.reshape(quantised.shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, and zeros of equal sign."""
    whole = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 130),
    block_size=st.sampled_from(BLOCK_SIZES[:4]),
    nested_block_size=st.sampled_from((None, 32, 64, 256)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_decoding_equals_bitsandbytes_bit_for_bit(
    rows: int, columns: int, block_size: int, nested_block_size: int | None, dtype: torch.dtype, seed: int
) -> None:
    """Any bytes, not only those that quantisation makes: every code, every 8-bit absmax."""
    g = torch.Generator().manual_seed(seed)
    blocks = -(-rows * columns // block_size)
    codes = torch.randint(256, (-(-rows * columns // 2),), generator=g, dtype=torch.uint8)
    quantised = NF4Weight(codes, torch.rand(blocks, generator=g), (rows, columns), dtype, block_size)
    if nested_block_size is not None:
        quantised = quantised._replace(
            absmax=torch.randint(256, (blocks,), generator=g, dtype=torch.uint8),
            nested_absmax=torch.rand(-(-blocks // nested_block_size), generator=g),
            nested_offset=torch.rand((), generator=g),
            nested_block_size=nested_block_size,
        )
    assert same_bits(nf4_dequantize(quantised), bnb_dequantize(quantised, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_decoding_bitsandbytes_own_weight(block_size: int, double_quant: bool, dtype: torch.dtype) -> None:
    """Straight through bitsandbytes' public functions, on a matrix whose rows are whole blocks."""
    weight = normal(24, block_size, seed=3, dtype=dtype)
    codes, state = bnb_quantize(weight, block_size, double_quant)
    with torch.compiler.set_stance("force_eager"):
        expected = bnb.dequantize_4bit(codes, state)
    ours = NF4Weight(codes.flatten(), state.absmax, tuple(weight.shape), dtype, block_size)
    if double_quant:
        ours = ours._replace(nested_absmax=state.state2.absmax, nested_offset=state.offset)
    assert same_bits(nf4_dequantize(ours), expected)


def test_decoding_to_other_dtypes_rounds_once() -> None:
    quantised = nf4_quantize(normal(32, 32, dtype=torch.bfloat16))
    exact = nf4_dequantize(quantised, torch.float64)
    assert torch.equal(exact, nf4_dequantize(quantised, torch.float32).double())
    assert same_bits(nf4_dequantize(quantised), exact.to(torch.bfloat16))
    with pytest.raises(LoRAError, match=r"torch\.int8, expected a floating dtype"):
        nf4_dequantize(quantised, torch.int8)


# --- properties --------------------------------------------------------------------------------------------------


@given(
    elements=st.integers(1, 700),
    block_size=st.sampled_from(BLOCK_SIZES[:4]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-8, 8),
    seed=st.integers(0, 2**20),
)
def test_error_scale_and_requantisation(
    elements: int, block_size: int, dtype: torch.dtype, exponent: int, seed: int
) -> None:
    weight = normal(elements, seed=seed, dtype=dtype)
    quantised = nf4_quantize(weight, block_size=block_size, double_quant=False)
    decoded = nf4_dequantize(quantised, torch.float32)

    # No element moves further than half the widest gap between codes, times its block's absmax (and float32 rounding).
    absmax = quantised.absmax.repeat_interleave(block_size)[:elements]
    half_gap = float((NF4_CODES[1:] - NF4_CODES[:-1]).max()) / 2
    assert ((decoded - weight.float()).abs() <= absmax * (half_gap + 2.0**-22)).all()
    # The largest element of each block comes back exactly.
    largest = weight.float().abs() == absmax
    assert torch.equal(decoded[largest], weight.float()[largest])

    # So a decoded weight has the same absmax, and each code is nearest to itself, also after rounding to 8 bits of
    # mantissa: quantising again changes nothing.
    again = nf4_quantize(nf4_dequantize(quantised), block_size=block_size, double_quant=False)
    assert torch.equal(again.codes, quantised.codes) and torch.equal(again.absmax, quantised.absmax)

    # Powers of two pass through every step, both levels of it.
    for double_quant in (False, True):
        one = nf4_quantize(weight.float(), block_size=block_size, double_quant=double_quant)
        two = nf4_quantize(weight.float() * 2.0**exponent, block_size=block_size, double_quant=double_quant)
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(nf4_dequantize(one) * 2.0**exponent, nf4_dequantize(two))


@pytest.mark.parametrize("dtype", DTYPES)
def test_requantisation_keeps_the_codes_with_double_quantisation(dtype: torch.dtype) -> None:
    """absmax' is what the largest element of a block decodes to, so the first level repeats itself exactly. The
    second level may not: its mean has moved.
    """
    quantised = nf4_quantize(normal(64, 512, dtype=dtype))
    again = nf4_quantize(nf4_dequantize(quantised, torch.float32))
    assert torch.equal(again.codes, quantised.codes)
    plain = nf4_quantize(nf4_dequantize(quantised, torch.float32), double_quant=False)
    assert torch.equal(plain.absmax, nf4_absmax(quantised))


def test_a_transposed_weight_is_read_row_by_row() -> None:
    weight = normal(48, 80)
    assert torch.equal(nf4_quantize(weight.T).codes, nf4_quantize(weight.T.contiguous()).codes)
    assert not torch.equal(nf4_quantize(weight.T).codes, nf4_quantize(weight).codes)


@pytest.mark.parametrize("shape", [(), (1,), (7, 9), (3, 5, 7), (2, 3, 4, 5), (1, 4097)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_any_shape(shape: tuple[int, ...], double_quant: bool) -> None:
    weight = normal(*shape) if shape else torch.tensor(0.37)
    quantised = nf4_quantize(weight, double_quant=double_quant)
    assert quantised.codes.shape == (-(-weight.numel() // 2),)
    assert nf4_dequantize(quantised).shape == weight.shape
    assert nf4_error(weight, quantised) < 0.13


@pytest.mark.parametrize("double_quant", [False, True])
def test_zero_blocks(double_quant: bool) -> None:
    """A block of zeros stays zero, whatever its neighbours and whatever its absmax decodes to."""
    weight = normal(4, 64)
    weight[1] = 0
    decoded = nf4_dequantize(nf4_quantize(weight, double_quant=double_quant))
    assert torch.count_nonzero(decoded[1]) == 0 and torch.count_nonzero(decoded[0]) > 50
    nothing = nf4_quantize(torch.zeros(3, 50), double_quant=double_quant)
    assert torch.count_nonzero(nf4_dequantize(nothing)) == 0 and nf4_error(torch.zeros(3, 50), nothing) == 0
    assert torch.count_nonzero(nf4_absmax(nothing)) == 0


def test_tiny_and_huge_blocks_stay_finite() -> None:
    """1 / absmax overflows float32 below 2.9e-39, and is subnormal above 8.5e37."""
    for value in (1e-45, 1e-39, 1e-38, 1e30, 1e36):
        decoded = nf4_dequantize(nf4_quantize(torch.tensor([[value, -value, 0.0]])))
        assert torch.isfinite(decoded).all() and (decoded.abs() <= value).all() and decoded[0, 2] == 0


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block_size", "nested"), [(64, 256), (64, None), (32, 256), (128, 64), (4096, None)])
@pytest.mark.parametrize("shape", [(512, 1024), (100, 77)])
def test_bytes_equal_the_arithmetic(shape: tuple[int, int], block_size: int, nested: int | None) -> None:
    weight = normal(*shape)
    n = weight.numel()
    blocks = -(-n // block_size)
    quantised = nf4_quantize(
        weight, block_size=block_size, double_quant=nested is not None, nested_block_size=nested or 256
    )
    expected = n // 2 + 4 * blocks if nested is None else n // 2 + blocks + 4 * -(-blocks // nested) + 4
    assert nf4_bytes(quantised) == expected
    parts = [part for part in quantised if isinstance(part, Tensor)]
    assert sum(part.untyped_storage().nbytes() for part in parts) == expected  # nothing larger is kept alive


def test_bits_a_parameter() -> None:
    weight = normal(1024, 1024)
    offset = 32 / weight.numel()  # one number for the whole matrix
    assert nf4_bits(nf4_quantize(weight)) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + offset, rel=1e-12)
    assert round(nf4_bits(nf4_quantize(weight)), 3) == 4.127
    assert nf4_bits(nf4_quantize(weight, double_quant=False)) == 4.5


def test_error_is_the_relative_frobenius_norm() -> None:
    weight = normal(128, 128, dtype=torch.bfloat16)
    quantised = nf4_quantize(weight, double_quant=False)
    lost = (weight.double() - nf4_dequantize(quantised, torch.float64)).square().sum()
    assert nf4_error(weight, quantised) == pytest.approx(math.sqrt(lost / weight.double().square().sum()), rel=1e-12)
    assert 0.08 < nf4_error(weight, quantised) < 0.10  # bitsandbytes' own figure for a normal weight is 0.09


# --- bad input ---------------------------------------------------------------------------------------------------


def broken(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = normal(5, 70, dtype=dtype)
    weight[3, 41] = value
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(value: float, dtype: torch.dtype) -> None:
    with pytest.raises(LoRAError, match=rf"model\.layers\.3\.up_proj\.weight is {value} at \[3, 41\] \(1 such in all"):
        nf4_quantize(broken(value, dtype), name="model.layers.3.up_proj.weight")


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (normal(4, 4).double(), {}, "weight is torch.float64, but NF4 is made from float32, float16, bfloat16"),
        (torch.ones(4, dtype=torch.int8), {}, "weight is torch.int8"),
        (torch.empty(0, 8), {}, "weight is empty"),
        (torch.empty(8, 8, device="meta"), {}, "weight is on the meta device"),
        (torch.full((64,), 3e38), {}, r"weight reaches 3e\+38: averaging absmax would overflow"),
        (normal(4, 4), {"block_size": 48}, "block_size is 48, expected one of 32, 64"),
        (normal(4, 4), {"block_size": True}, "block_size is True"),
        (normal(4, 4), {"block_size": 8192}, "block_size is 8192"),
        (normal(4, 4), {"nested_block_size": 0}, "nested_block_size is 0"),
    ],
)
def test_bad_input_is_named(weight: Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(LoRAError, match=message):
        nf4_quantize(weight, **options)


# --- the frozen weight in a linear layer -------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_lora_linear_on_nf4_is_lora_linear_on_the_decoded_weight(dora: bool, double_quant: bool) -> None:
    """Forward, autograd and the hand-written backward: the very numbers of the dense layer that W' is."""
    out_features, in_features, r, tokens = 19, 37, 4, 11
    quantised = nf4_quantize(normal(out_features, in_features, seed=1), block_size=32, double_quant=double_quant)
    dense = nf4_dequantize(quantised, torch.float64)
    lora_A, lora_B = normal(r, in_features, seed=2).double(), normal(out_features, r, seed=3).double()
    magnitude = 1.5 * dora_norm(dense, lora_A, lora_B, 0.7) if dora else None
    bias, x, dy = (
        normal(*s, seed=4).double() for s in ((out_features,), (tokens, in_features), (tokens, out_features))
    )

    outcomes = []
    for weight in (quantised, dense):
        leaves = [t.detach().clone().requires_grad_() for t in (x, lora_A, lora_B, bias)]
        gain = None if magnitude is None else magnitude.detach().clone().requires_grad_()
        projection = Projection(weight, leaves[3], leaves[1], leaves[2], 0.7, gain)
        h = lora_linear(leaves[0], projection)
        h.backward(dy)
        by_hand = lora_linear_backward(dy, x, projection)
        gradients = [t.grad for t in (*leaves, *([gain] if gain is not None else []))]
        outcomes.append([h, *gradients, *(g for g in by_hand if g is not None)])
    assert len(outcomes[0]) == (11 if dora else 9)
    for nf4, plain in zip(*outcomes, strict=True):
        assert nf4 is not None and plain is not None and torch.count_nonzero(plain) > 0
        # The same float64 sums of at most 37 terms, perhaps in another order: far below 1e4 ulps.
        torch.testing.assert_close(nf4, plain, rtol=1e-12, atol=1e-12)


def test_frozen_nf4_linear_passes_gradcheck_and_keeps_no_dense_weight() -> None:
    quantised = nf4_quantize(normal(6, 9))
    x = normal(3, 9).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: frozen_linear(x, quantised), (x,))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen_linear(x, quantised).sum()
    assert not saved


# --- LoftQ -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0])
def test_loftq_recovers_the_best_rank_r_part_of_the_loss(
    scaling: float, double_quant: bool, dtype: torch.dtype
) -> None:
    """One iteration: Q is plain NF4, and what is left is exactly the smaller singular values of what it lost."""
    weight, r = normal(48, 96, dtype=dtype), 6
    quantised, lora_A, lora_B = loftq(weight, r, scaling, double_quant=double_quant)
    plain = nf4_quantize(weight, double_quant=double_quant)
    assert torch.equal(quantised.codes, plain.codes) and quantised.dtype == dtype
    assert lora_A.shape == (r, 96) and lora_B.shape == (48, r)
    lost = weight.double() - nf4_dequantize(plain).double()
    left = lost - scaling * lora_B.double() @ lora_A.double()
    tail = torch.linalg.svdvals(lost)[r:].square().sum().sqrt()
    # A float32 SVD is backward stable: it is off by a few ulps of the matrix, here under 1e-5 of the norm left.
    assert float(left.norm()) == pytest.approx(float(tail), rel=1e-5)
    assert left.norm() < 0.9 * lost.norm()


def test_loftq_iterations_lose_less() -> None:
    weight, r = normal(128, 128), 16
    errors = []
    for iterations in (1, 2, 5):
        quantised, lora_A, lora_B = loftq(weight, r, 0.5, iterations=iterations)
        errors.append(float((weight - nf4_dequantize(quantised) - 0.5 * lora_B @ lora_A).norm()))
    assert errors[2] < errors[1] < errors[0] < float((weight - nf4_dequantize(nf4_quantize(weight))).norm())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"r": 9}, "r=9: expected a matrix and 1 <= r <= its sides"),
        ({"scaling": 0.0}, "scaling=0.0"),
        ({"scaling": math.nan}, "scaling=nan"),
        ({"iterations": 0}, "iterations=0"),
        ({"block_size": 65}, "block_size is 65"),
    ],
)
def test_loftq_bad_input(options: dict[str, float], message: str) -> None:
    arguments = {"r": 2, "scaling": 1.0} | options
    with pytest.raises(LoRAError, match=message):
        loftq(normal(8, 16), **arguments)


def test_weights_of_odd_sizes_are_decoded_one_under_another():
    """The second begins at an odd number of the workspace, where pairs of numbers cannot be written as one."""
    from lora.fast.nf4 import decoded_together

    weights = [nf4_quantize(torch.randn(rows, 5)) for rows in (3, 4, 2)]
    together = decoded_together(weights, torch.float32)
    assert torch.equal(together, torch.cat([nf4_dequantize(weight) for weight in weights]))
