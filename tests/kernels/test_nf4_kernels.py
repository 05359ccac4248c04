"""The NF4 kernels against `lora.reference.nf4`, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora import fast
from lora.errors import LoRAError
from lora.fast.kernels.nf4 import LARGEST_TILE, nf4_dequantize_into, nf4_quantize_blocks, tiling
from lora.nf4_format import BLOCK_SIZES, NF4_CODES, midpoints
from lora.projection import NF4Weight
from lora.reference.nf4 import nf4_dequantize, nf4_quantize

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator) + 0.01  # blocks of different sizes
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def to(quantised: NF4Weight, device: str) -> NF4Weight:
    moved = {name: v.to(device) for name, v in quantised._asdict().items() if isinstance(v, Tensor)}
    return quantised._replace(**moved)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Equal, and zeros of the same sign."""
    return torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())


def check_decoding(quantised: NF4Weight, out: Tensor, device: str) -> None:
    assert nf4_dequantize_into(to(quantised, device), out) is out
    assert same_bits(out.cpu(), nf4_dequantize(quantised, out.dtype))


@given(
    rows=st.integers(1, 9),
    columns=st.one_of(st.integers(1, 70), st.sampled_from([32, 64, 96, 128, 192])),
    border=st.integers(0, 5),
    block_size=st.sampled_from([32, 64, 128]),
    nested=st.booleans(),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    skipped=st.sampled_from([0, 1, 4, 16]),
    seed=st.integers(0, 2**31),
)
def test_decoding_is_the_reference(
    rows: int,
    columns: int,
    border: int,
    block_size: int,
    nested: bool,
    dtype: torch.dtype,
    skipped: int,
    seed: int,
    device: str,
) -> None:
    """Into whole buffers and columns of wider ones, which stay as they were; codes at any byte of a larger buffer."""
    weight = normal(rows, columns, seed=seed)
    quantised = nf4_quantize(weight, block_size=block_size, double_quant=nested, nested_block_size=32)
    buffer = torch.cat([torch.full((skipped,), 0xA5, dtype=torch.uint8), quantised.codes])
    wide = torch.full((rows, columns + border), math.nan, dtype=dtype, device=device)
    left = border // 2
    check_decoding(quantised._replace(codes=buffer[skipped:]), wide[:, left : left + columns], device)
    assert wide[:, :left].isnan().all() and wide[:, left + columns :].isnan().all()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(3, LARGEST_TILE + 40), (2, 2 * LARGEST_TILE), (1, LARGEST_TILE + 1)])
def test_rows_longer_than_a_tile(shape: tuple[int, int], nested: bool, device: str) -> None:
    """Alone, and as columns of a wider buffer: then each row has a last tile of its own."""
    quantised = nf4_quantize(normal(*shape), double_quant=nested, nested_block_size=32)
    check_decoding(quantised, torch.empty(shape, device=device), device)
    check_decoding(quantised, torch.empty(shape[0], shape[1] + 3, device=device)[:, 2:-1], device)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("columns", [4096 + 32, 1000])
def test_every_block_size_where_rows_cut_blocks(block_size: int, columns: int, device: str) -> None:
    quantised = nf4_quantize(normal(3, columns), block_size=block_size, nested_block_size=64)
    check_decoding(quantised, torch.empty(3, columns, device=device), device)
    check_decoding(quantised, torch.empty(3, columns + 1, device=device)[:, 1:], device)


def test_every_byte_in_every_place_of_a_word(device: str) -> None:
    """256 bytes, four times, each time one place further: every value of every nibble of a 32-bit word."""
    byte = torch.arange(256, dtype=torch.uint8)
    codes = torch.cat([byte.roll(shift) for shift in range(4)])
    absmax = torch.rand(2048 // 32) + 0.5
    check_decoding(NF4Weight(codes, absmax, (2, 1024), torch.float32, 32), torch.empty(2, 1024, device=device), device)


def test_every_code_of_the_second_level(device: str) -> None:
    """256 blocks, one of each second-level code, under four nested blocks and an offset that all round."""
    quantised = NF4Weight(
        torch.randint(0, 256, (256 * 16,), generator=torch.Generator().manual_seed(3), dtype=torch.uint8),
        torch.arange(256, dtype=torch.uint8), (64, 128), torch.float32, 32,
        torch.tensor([0.1, 0.013, 1.7, 3.3]), torch.tensor(0.7071), 64,
    )  # fmt: skip
    check_decoding(quantised, torch.empty(64, 128, device=device), device)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 64), (5, 1), (1, 1), (0, 64), (64, 0)])
def test_any_rank_and_size(shape: tuple[int, ...], device: str) -> None:
    quantised = NF4Weight(torch.empty(0, dtype=torch.uint8), torch.empty(0), shape, torch.float32)
    if math.prod(shape):
        quantised = nf4_quantize(normal(*shape))
    check_decoding(quantised, torch.empty(shape, device=device), device)


def test_a_destination_that_does_not_fit_is_refused(device: str) -> None:
    quantised = to(nf4_quantize(normal(4, 32)), device)
    for out in (torch.empty(4, 33, device=device), torch.empty(4, 32, dtype=torch.int32, device=device)):
        with pytest.raises(
            LoRAError, match=r"NF4 weight \[4, 32\] .* expected a floating tensor of the weight's shape"
        ):
            nf4_dequantize_into(quantised, out)
    with pytest.raises(LoRAError, match="expected a floating tensor of the weight's shape on its device"):
        nf4_dequantize_into(quantised, torch.empty(4, 32, device="meta"))
    for out in (torch.empty(32, 4, device=device).T, torch.empty(1, 32, device=device).expand(4, 32)):
        with pytest.raises(LoRAError, match=r"out is \[4, 32\] with strides"):
            nf4_dequantize_into(quantised, out)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("columns", [1, 8, 31, 64, 576, 4096, 14336])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_no_group_lies_in_two_blocks(rows: int, columns: int, block_size: int) -> None:
    """What the kernel takes for granted, from the definition: each group's first and last element share a block."""
    how = tiling(rows, columns, block_size)
    assert how.tile % how.group == 0 and how.row_tiles * how.tile >= columns > (how.row_tiles - 1) * how.tile
    for row in range(rows):
        first = torch.arange(0, columns, how.group)
        last = (first + how.group - 1).clamp(max=columns - 1)
        assert torch.equal((row * columns + first) // block_size, (row * columns + last) // block_size)


@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 300)),
        st.tuples(st.integers(1, 30), st.integers(1, 70)),
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 70)),
    ),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from([32, 64, 128, 4096]),
    nested=st.booleans(),
    magnitude=st.sampled_from([1.0, 1e-30, 1e-41, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_quantising_is_the_reference(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    block_size: int,
    nested: bool,
    magnitude: float,
    seed: int,
    device: str,
) -> None:
    """Subnormal numbers included; on a GPU the second level's offset, a mean, may be summed in another order."""
    weight = (magnitude * normal(*shape, seed=seed)).to(dtype)
    expected = nf4_quantize(weight, block_size=block_size, double_quant=nested)
    found = to(nf4_quantize_blocks(weight.to(device), block_size=block_size, double_quant=nested), "cpu")
    assert found.shape == expected.shape and found.dtype == dtype and found.block_size == block_size
    assert torch.equal(found.codes, expected.codes)
    if device == "cpu" or not nested:
        assert torch.equal(found.absmax, expected.absmax) and found.absmax.dtype == expected.absmax.dtype
        assert (found.nested_offset is None) == (not nested)
    if device == "cpu" and nested:
        assert found.nested_offset == expected.nested_offset
        assert found.nested_absmax is not None and torch.equal(found.nested_absmax, expected.nested_absmax)


def test_ties_zeros_and_their_neighbours(device: str) -> None:
    """Every midpoint goes to its lower code, the next number up to its upper one; a block of zeros has absmax 0."""
    middle = midpoints(NF4_CODES)  # 15
    weight = torch.cat([torch.tensor([1.0, -1.0]), middle, torch.nextafter(middle, torch.tensor(2.0)), torch.zeros(32)])
    found = to(nf4_quantize_blocks(weight.to(device), block_size=32, double_quant=False), "cpu")
    index = torch.stack([found.codes >> 4, found.codes & 15], dim=1).flatten().tolist()
    assert index == [15, 0, *range(15), *range(1, 16), *[7] * 32]
    assert found.absmax.tolist() == [1.0, 0.0]
    assert torch.equal(found.codes, nf4_quantize(weight, block_size=32).codes)


def test_quantising_more_than_a_tile_of_a_strided_weight(device: str) -> None:
    weight = normal(70, 130)
    found = nf4_quantize_blocks(weight.to(device)[:, 3:100], nested_block_size=32)
    expected = nf4_quantize(weight[:, 3:100], nested_block_size=32)
    assert torch.equal(found.codes.cpu(), expected.codes) and found.nested_block_size == 32


@pytest.mark.parametrize("nested", [True, False])
def test_the_fast_operation_quantises_as_the_reference_does(nested: bool, device: str) -> None:
    weight = normal(24, 40).bfloat16().to(device)
    options = {"block_size": 32, "double_quant": nested, "nested_block_size": 64}
    found, expected = fast.nf4_quantize(weight, **options), nf4_quantize(weight, **options)
    assert torch.equal(found.codes, expected.codes)
    assert found._replace(codes=0, absmax=0, nested_absmax=0, nested_offset=0) == expected._replace(
        codes=0, absmax=0, nested_absmax=0, nested_offset=0
    )
    assert same_bits(fast.nf4_dequantize(found).cpu(), nf4_dequantize(expected).cpu())


def test_the_fast_operation_refuses_what_the_reference_refuses(device: str) -> None:
    weight = normal(4, 32).to(device)
    weight[2, 5] = math.nan
    with pytest.raises(LoRAError, match=r"q_proj is nan at \[2, 5\]"):
        fast.nf4_quantize(weight, name="q_proj")
    with pytest.raises(LoRAError, match="block_size"):
        fast.nf4_quantize(weight, block_size=33)
