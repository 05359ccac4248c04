"""NF4 for the fast backend: decoded straight into the operand of a matrix product, in a reused workspace.

The formats and the bits are those of `lora.reference.nf4`. Decoding costs 0.5 bytes read and 2 or 4 written a
parameter, so what counts is to do it once a layer and pass, and not to allocate for it (`lora.fast.workspace`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora.errors import LoRAError
from lora.fast import library
from lora.fast.runtime import rehearsing, runs_triton
from lora.fast.workspace import workspace
from lora.nf4_format import NF4_CODES, check_block_size
from lora.projection import NF4Weight
from lora.reference.nf4 import check_quantisable, nf4_absmax
from lora.reference.nf4 import nf4_quantize as reference_quantize


def nf4_quantize(
    weight: Tensor,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    nested_block_size: int = 256,
    name: str = "weight",
) -> NF4Weight:
    """The quantised weight; arguments, result and errors as in `lora.reference.nf4.nf4_quantize`."""
    if not runs_triton(weight):
        return reference_quantize(
            weight, block_size=block_size, double_quant=double_quant, nested_block_size=nested_block_size, name=name
        )
    from lora.fast.kernels import nf4 as kernels

    check_block_size(block_size)
    check_block_size(nested_block_size, "nested_block_size")
    check_quantisable(weight, name)
    return kernels.nf4_quantize_blocks(
        weight, block_size=block_size, double_quant=double_quant, nested_block_size=nested_block_size
    )


def nf4_dequantize(quantised: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """w' = c_q · absmax, a new tensor; arguments, result and bits as in `lora.reference.nf4.nf4_dequantize`."""
    dtype = dtype or quantised.dtype
    if not dtype.is_floating_point:
        raise LoRAError(f"an NF4 weight was to be decoded to {dtype}, expected a floating dtype such as torch.float32.")
    q = quantised
    if torch.compiler.is_compiling():
        return library.nf4_decode(
            q.codes, q.absmax, q.nested_absmax, q.nested_offset, q.shape, q.block_size, q.nested_block_size, dtype
        )
    out = torch.empty(q.shape, dtype=dtype, device=q.codes.device)
    decode_into(q, out)
    return out


def decoded_together(weights: Sequence[NF4Weight], dtype: torch.dtype) -> Tensor:
    """Weights of one x decoded one under another, [Σ out, in], in the workspace until the next call."""
    if torch.compiler.is_compiling():  # a graph plans its memory itself
        each = [nf4_dequantize(weight, dtype) for weight in weights]
        return each[0] if len(each) == 1 else torch.cat(each)
    sizes, fan_in = [weight.shape[0] for weight in weights], weights[0].shape[1]
    device = weights[0].codes.device
    space = workspace(sum(sizes) * fan_in, dtype, device, "weights").view(sum(sizes), fan_in)
    for weight, block in zip(weights, space.split(sizes), strict=True):
        decode_into(weight, block)
    return space


def decode_into(quantised: NF4Weight, out: Tensor) -> None:
    """Writes w' into `out`, [out, in], whose rows may be part of wider ones."""
    if runs_triton(out):
        if rehearsing():
            return
        from lora.fast.kernels import nf4 as kernels

        kernels.nf4_dequantize_into(quantised, out)
        return
    count, block = math.prod(quantised.shape), quantised.block_size
    pairs = count == 2 * len(quantised.codes) and out.storage_offset() % 2 == 0
    in_place = pairs and out.dtype == torch.float32 and out.is_contiguous()
    values = out.view(-1) if in_place else torch.empty(2 * len(quantised.codes), device=out.device)
    table = pair_table(str(out.device))
    torch.index_select(table, 0, quantised.codes.int(), out=values.view(torch.int64))
    absmax = nf4_absmax(quantised)
    whole = count // block * block
    values[:whole].view(-1, block).mul_(absmax[: whole // block, None])
    if whole < count:
        values[whole:count].mul_(absmax[-1])
    if not in_place:
        out.copy_(values[:count].view(quantised.shape))


def pair_table(device: str) -> Tensor:
    """The two float32 values that each byte holds, as one number of 64 bits, [256]: one look-up, not two."""
    byte = torch.arange(256, device=device)
    pairs = torch.stack([NF4_CODES.to(device)[byte >> 4], NF4_CODES.to(device)[byte & 15]], dim=1)  # [256, 2]
    return pairs.contiguous().view(torch.int64).flatten()
