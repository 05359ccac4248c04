"""NF4: a frozen matrix in 4.127 bits a parameter (Dettmers et al. 2023, QLoRA, sections 2 and 3).

Cut the matrix, row after row, into blocks of 64. In each block, with codes c_0 = -1 < ... < c_15 = 1,

    absmax = max |w|            q = argmin_j |w / absmax - c_j|            w' = c_q · absmax

A tie goes to the lower code. Two q's share a byte; absmax in float32 costs 32/64 of a bit a parameter: 4.5 in all.
Double quantisation stores absmax itself in 8 bits: the absmax are positive, so their mean is taken off, and what
remains is quantised by the same rule with 256 codes, in blocks of 256:

    offset = mean(absmax)       absmax' = d_q2 · absmax2 + offset          4 + 8/64 + 32/(64·256) = 4.127 bits

Each level is one function that encodes and one that decodes, used twice. The arithmetic is bitsandbytes', in float32
and in its order, so that decoding agrees with it bit for bit: a block is multiplied by fl(1 / absmax), not divided.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.errors import LoRAError
from lora.nf4_format import DTYPES, DYNAMIC_CODES, NF4_CODES, block_count, check_block_size, midpoints
from lora.projection import NF4Weight

PIECE = 1 << 18  # values encoded at a time, whole blocks of any size: what encoding makes is several times their size
SMALLEST_ABSMAX = 1e-38  # a block below this is scaled as if it were this: 1 / absmax must not overflow


def nf4_quantize(
    weight: Tensor,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    nested_block_size: int = 256,
    name: str = "weight",
) -> NF4Weight:
    """q = argmin_j |w / absmax - c_j|, block by block; the derivation is at the top of this file.

    Args:
        weight: any shape and any size, float32, float16 or bfloat16; without gradient.
        block_size, nested_block_size: 32, 64, 128, ... 4096.
        double_quant: store absmax in 8 bits too.
        name: what error messages call the weight.

    Returns: an NF4Weight on the weight's device. A block of zeros has absmax 0; an odd last byte ends in the code of 0.
    Raises: LoRAError for another dtype or block size, an empty tensor, a NaN, an infinity or a number so large that the
    mean absmax would overflow.
    """
    check_block_size(block_size)
    check_block_size(nested_block_size, "nested_block_size")
    check_quantisable(weight, name)
    values = weight.detach().flatten()  # [n]
    codes = torch.empty(-(-values.numel() // 2), dtype=torch.uint8, device=values.device)
    absmax = torch.empty(block_count(values.numel(), block_size), device=values.device)
    targets = zip(values.split(PIECE), codes.split(PIECE // 2), absmax.split(PIECE // block_size), strict=True)
    for piece, its_codes, its_absmax in targets:
        index, its_absmax[:] = encode(piece.float(), NF4_CODES, block_size)
        pairs = index[: piece.numel() + piece.numel() % 2].view(-1, 2)
        its_codes[:] = pairs[:, 0] << 4 | pairs[:, 1]
    quantised = NF4Weight(codes, absmax, tuple(weight.shape), weight.dtype, block_size)
    return doubly_quantised(quantised, nested_block_size) if double_quant else quantised


def doubly_quantised(quantised: NF4Weight, nested_block_size: int) -> NF4Weight:
    """The same weight with its absmax, float32 so far, in 8 bits: their mean taken off, block by block."""
    offset = quantised.absmax.mean()
    index, nested_absmax = encode(quantised.absmax - offset, DYNAMIC_CODES, nested_block_size)
    return quantised._replace(
        absmax=index[: quantised.absmax.numel()].clone(),  # without the padding of the last block
        nested_absmax=nested_absmax,
        nested_offset=offset,
        nested_block_size=nested_block_size,
    )


def nf4_dequantize(quantised: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """w' = c_q · absmax in float32, then rounded once to `dtype`: the weight's own, unless asked otherwise.

    Returns: a new tensor of the weight's shape, the same bits as bitsandbytes' `dequantize_4bit` on a GPU.
    Raises: LoRAError where `dtype` is not a floating one. Bytes: 0.52 read and dtype.itemsize written a parameter.
    """
    dtype = dtype or quantised.dtype
    if not dtype.is_floating_point:
        raise LoRAError(f"an NF4 weight was to be decoded to {dtype}, expected a floating dtype such as torch.float32.")
    high, low = quantised.codes >> 4, quantised.codes & 0x0F
    index = torch.stack([high, low], dim=1).flatten()[: math.prod(quantised.shape)]  # [n]
    return decode(index, NF4_CODES, nf4_absmax(quantised), quantised.block_size).to(dtype).view(quantised.shape)


def nf4_absmax(quantised: NF4Weight) -> Tensor:
    """The scale of each block, float32 [blocks]; decoded first where it is stored in 8 bits."""
    if quantised.nested_absmax is None or quantised.nested_offset is None:
        return quantised.absmax
    spread = decode(quantised.absmax, DYNAMIC_CODES, quantised.nested_absmax, quantised.nested_block_size)
    return spread + quantised.nested_offset


def encode(values: Tensor, codes: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """One level of block-wise quantisation.

    Args:
        values: float32 [n]. codes: sorted, at most 256.

    Returns: the index of each value's code, uint8 [n rounded up to whole blocks], and absmax, float32 [blocks].
    """
    blocks = in_blocks(values, block_size)  # [blocks, block_size]
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]  # in [-1, 1]
    nearest = torch.bucketize(scaled, midpoints(codes).to(values.device), out_int32=True)  # a tie: the lower code
    return nearest.to(torch.uint8).flatten(), absmax


def decode(index: Tensor, codes: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """The inverse of `encode`: index uint8 [n], absmax float32 [blocks] -> float32 [n]."""
    values = codes.to(index.device).index_select(0, index.int())
    return (in_blocks(values, block_size) * absmax[:, None]).flatten()[: index.numel()]


def in_blocks(values: Tensor, block_size: int) -> Tensor:
    """[n] -> [blocks, block_size], the last block filled up with zeros."""
    return F.pad(values, (0, -values.numel() % block_size)).view(-1, block_size)


def nf4_bytes(quantised: NF4Weight) -> int:
    """The bytes that `quantised` occupies: codes, absmax and, with double quantisation, the second level's."""
    parts = (quantised.codes, quantised.absmax, quantised.nested_absmax, quantised.nested_offset)
    return sum(part.nbytes for part in parts if part is not None)


def nf4_bits(quantised: NF4Weight) -> float:
    """Bits a parameter: 4 + 8/64 + 32/(64·256) = 4.127 for a large matrix, 4.5 without double quantisation."""
    return 8 * nf4_bytes(quantised) / math.prod(quantised.shape)


def nf4_error(weight: Tensor, quantised: NF4Weight) -> float:
    """‖W - W'‖ / ‖W‖ in the Frobenius norm; about 0.09 for a normal W, 0 for a W of zeros."""
    lost = torch.linalg.vector_norm(weight.double() - nf4_dequantize(quantised, torch.float64))
    return float(lost / torch.linalg.vector_norm(weight.double())) if lost > 0 else 0.0


def check_quantisable(weight: Tensor, name: str = "weight") -> None:
    """Raises LoRAError, naming the tensor and the element, where NF4 cannot hold `weight`: see `nf4_quantize`."""
    if weight.dtype not in DTYPES.values():
        raise LoRAError(f"{name} is {weight.dtype}, but NF4 is made from {', '.join(DTYPES)}: convert it first.")
    if weight.numel() == 0 or weight.is_meta:
        found = "is empty" if weight.numel() == 0 else "is on the meta device, without values"
        raise LoRAError(f"{name} {found}: there is nothing to quantise. Load the weights first.")
    low, high = (float(bound) for bound in torch.aminmax(weight.detach()))  # a NaN anywhere makes both NaN
    largest = max(-low, high)
    if not math.isfinite(low + high):
        bad = (~torch.isfinite(weight)).nonzero()
        raise LoRAError(
            f"{name} is {weight[tuple(bad[0])].item()} at {bad[0].tolist()} ({len(bad)} such in all): it would poison "
            "its block. Fetch the checkpoint again, or repair the weight before quantising it."
        )
    if largest > torch.finfo(torch.float32).max / weight.numel():
        raise LoRAError(f"{name} reaches {largest:.3g}: averaging absmax would overflow float32. Scale it down first.")


def loftq(
    weight: Tensor,
    r: int,
    scaling: float,
    *,
    iterations: int = 1,
    block_size: int = 64,
    double_quant: bool = True,
    name: str = "weight",
) -> tuple[NF4Weight, Tensor, Tensor]:
    """Start the adapter at what NF4 loses of W: Q' + s B A ≈ W (Li et al. 2023, LoftQ, algorithm 1).

    From B A = 0, each iteration quantises what the adapter leaves, then fits the adapter to what that loses:

        Q = nf4(W - s B A)        s B A = the r largest singular directions of W - Q'

    Every fit is the best of its rank (Eckart and Young 1936), so one iteration never loses more than plain NF4; further
    ones mostly gain a little, and need not.

    Args:
        weight: W, [out_features, in_features], float32, float16 or bfloat16.
        r: rank, at most the smaller side of W.
        scaling: s > 0; shared equally between A and B.

    Returns: Q, lora_A [r, in_features] and lora_B [out_features, r], both float32.
    Raises: LoRAError as `nf4_quantize`, and where r, scaling or iterations do not fit.
    """
    if weight.dim() != 2 or not 1 <= r <= min(weight.shape):
        raise LoRAError(f"loftq on {name} {list(weight.shape)} with r={r}: expected a matrix and 1 <= r <= its sides.")
    if not scaling > 0 or iterations < 1:
        raise LoRAError(f"loftq on {name}: scaling={scaling}, iterations={iterations}, expected > 0 and >= 1.")
    W = weight.detach().float()
    lora_A, lora_B = W.new_zeros(r, W.shape[1]), W.new_zeros(W.shape[0], r)
    for _ in range(iterations):
        remainder = (W - scaling * lora_B @ lora_A).to(weight.dtype)
        quantised = nf4_quantize(remainder, block_size=block_size, double_quant=double_quant, name=name)
        u, s, vh = torch.linalg.svd(W - nf4_dequantize(quantised).float(), full_matrices=False)
        root = (s[:r] / scaling).sqrt()
        lora_A, lora_B = root[:, None] * vh[:r], u[:, :r] * root
    return quantised, lora_A, lora_B
