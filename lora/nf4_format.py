"""NF4 as data: its two code tables, its sizes, and the names its tensors have in a checkpoint.

The 16 codes are quantiles of a normal distribution (Dettmers et al. 2023, QLoRA, section 3): seven below zero, zero,
and eight above, from p = ½ (31/32 + 29/30) on either side, divided by the largest. Weights are nearly normal, so
each code is used about equally often.

The 256 codes of the second level are the signed dynamic map (Dettmers 2016; Dettmers et al. 2022, section 1.3): seven
decades, of which decade e holds 2**e fractions on either side of zero; and 0, and 1.

A checkpoint holds, for a module's `<prefix>weight`, what bitsandbytes writes:

    weight                              uint8 [ceil(n / 2), 1]: two codes a byte
    weight.absmax                       float32 [blocks], or uint8 [blocks] with double quantisation
    weight.quant_map                    float32 [16]: the codes
    weight.nested_absmax                float32 [ceil(blocks / nested_blocksize)]      } double quantisation only
    weight.nested_quant_map             float32 [256]: the codes of the second level   }
    weight.quant_state.bitsandbytes__nf4   uint8: the rest, as JSON
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora.errors import LoRAError
from lora.projection import NF4Weight

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those bitsandbytes accepts
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ABSMAX, MAP = "weight.absmax", "weight.quant_map"
NESTED_ABSMAX, NESTED_MAP = "weight.nested_absmax", "weight.nested_quant_map"
STATE = "weight.quant_state.bitsandbytes__nf4"


def midpoints(values: Tensor) -> Tensor:
    """Half way between neighbours: [n] -> [n - 1]."""
    return (values[:-1] + values[1:]) / 2


def dynamic_codes() -> Tensor:
    """The signed dynamic map: 256 sorted float32 values from -0.993 to 1."""
    decades = [10.0 ** (e - 6) * midpoints(torch.linspace(0.1, 1, 2**e + 1, dtype=torch.float32)) for e in range(7)]
    positive = torch.cat(decades)  # [127]
    return torch.cat([-positive, positive, torch.tensor([0.0, 1.0])]).sort().values


NF4_CODES = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
DYNAMIC_CODES = dynamic_codes()


def block_count(elements: int, block_size: int) -> int:
    """The blocks that `elements` fill, the last one perhaps in part."""
    return -(-elements // block_size)


def check_block_size(size: object, name: str = "block_size") -> None:
    """Raises LoRAError unless `size` is one of BLOCK_SIZES."""
    if isinstance(size, bool) or size not in BLOCK_SIZES:
        raise LoRAError(f"{name} is {size!r}, expected one of {', '.join(map(str, BLOCK_SIZES))}.")


def row_halves(weight: NF4Weight) -> tuple[NF4Weight, NF4Weight] | None:
    """The first and the second half of the rows, sharing the weight's memory; None where a block lies in both."""
    rows, *rest = weight.shape
    elements = rows // 2 * math.prod(rest)
    blocks = elements // weight.block_size
    nested = 1 if weight.nested_absmax is None else weight.nested_block_size
    if rows % 2 or elements % 2 or elements % weight.block_size or blocks % nested:
        return None
    codes, absmax = weight.codes.split(elements // 2), weight.absmax.split(blocks)
    second = (None, None) if weight.nested_absmax is None else weight.nested_absmax.split(blocks // nested)
    first, other = (
        weight._replace(codes=c, absmax=a, shape=(rows // 2, *rest), nested_absmax=n)
        for c, a, n in zip(codes, absmax, second, strict=True)
    )
    return first, other


def to_checkpoint(weight: NF4Weight) -> dict[str, Tensor]:
    """The tensors bitsandbytes would write for `weight`, in its order, keyed by what follows the module's prefix.

    A dtype bitsandbytes does not know (float64) is written as float32, which holds every decoded value exactly.
    """
    dtype = weight.dtype if weight.dtype in DTYPES.values() else torch.float32
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    device = weight.codes.device
    tensors = {"weight": weight.codes.reshape(-1, 1), ABSMAX: weight.absmax}
    tensors[MAP] = NF4_CODES.to(device, copy=True)  # a copy for each: safetensors refuses shared memory
    if weight.nested_absmax is not None and weight.nested_offset is not None:
        offset = 0.0 if weight.nested_offset.is_meta else weight.nested_offset.item()  # meta: names and shapes only
        state |= {
            "nested_blocksize": weight.nested_block_size,
            "nested_dtype": "float32",
            "nested_offset": offset,
        }
        tensors[NESTED_ABSMAX] = weight.nested_absmax
        tensors[NESTED_MAP] = DYNAMIC_CODES.to(device, copy=True)
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device=device)
    return tensors


def from_checkpoint(tensors: Mapping[str, Tensor], prefix: str = "") -> NF4Weight:
    """The weight that `<prefix>weight` and its companions describe, whoever of the two wrote them.

    Args:
        tensors: a state dict; what lies outside `prefix` is not looked at.
        prefix: of the module, with its dot: "model.layers.0.mlp.up_proj.".

    Raises: LoRAError naming the key, what it holds and what was expected, if a tensor is missing, of the wrong size
    or dtype, or not finite, or if the file uses another data type or other code tables.
    """
    state = _read_state(tensors, prefix)
    nested = "nested_offset" in state
    shape, block_size = tuple(state["shape"]), state["blocksize"]
    elements = math.prod(shape)
    blocks = block_count(elements, block_size)
    codes = _bytes(tensors, prefix, -(-elements // 2))
    _expect_codes(tensors, prefix, MAP, NF4_CODES)
    absmax = _expect(tensors, prefix, ABSMAX, torch.uint8 if nested else torch.float32, blocks)
    weight = NF4Weight(codes, absmax, shape, DTYPES[state["dtype"]], block_size)
    if not nested:
        return weight
    _expect_codes(tensors, prefix, NESTED_MAP, DYNAMIC_CODES)
    nested_size = state["nested_blocksize"]
    nested_absmax = _expect(tensors, prefix, NESTED_ABSMAX, torch.float32, block_count(blocks, nested_size))
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=codes.device)
    return weight._replace(nested_absmax=nested_absmax, nested_offset=offset, nested_block_size=nested_size)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size > 0 for size in value)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


Check = tuple[Callable[[Any], bool], str]  # whether a field's value will do, and what was expected
FIELDS: dict[str, Check] = {
    "quant_type": (lambda value: value == "nf4", "'nf4'"),
    "blocksize": (lambda value: value in BLOCK_SIZES, f"one of {BLOCK_SIZES}"),
    "dtype": (lambda value: value in tuple(DTYPES), f"one of {tuple(DTYPES)}"),
    "shape": (_is_shape, "a list of positive integers"),
}
NESTED_FIELDS: dict[str, Check] = {
    "nested_blocksize": (lambda value: value in BLOCK_SIZES, f"one of {BLOCK_SIZES}"),
    "nested_dtype": (lambda value: value == "float32", "'float32'"),
    "nested_offset": (_is_finite, "a finite number"),
}


def _read_state(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The JSON beside the tensors, each of its fields checked."""
    key = prefix + STATE
    if prefix + STATE.replace("nf4", "fp4") in tensors:
        raise LoRAError(f"{prefix}weight is stored in FP4, expected NF4: quantise the original again, as nf4.")
    if key not in tensors:
        raise LoRAError(
            f"{key} is missing, without which {prefix}weight cannot be decoded: "
            "load a checkpoint saved from an NF4 model, or quantise a full-precision one with lora.quantize."
        )
    try:
        state = json.loads(bytes(tensors[key].flatten().tolist()))
    except (ValueError, TypeError) as error:
        raise LoRAError(f"{key} does not hold JSON ({error}): the file is damaged, fetch it again.") from None
    if not isinstance(state, dict):
        raise LoRAError(f"{key} holds {state!r}, expected a JSON object.")
    for field, (holds, expected) in (FIELDS | (NESTED_FIELDS if "nested_offset" in state else {})).items():
        if not holds(state.get(field)):
            raise LoRAError(f"{key} says {field} = {state.get(field)!r}, expected {expected}.")
    return state


def _bytes(tensors: Mapping[str, Tensor], prefix: str, count: int) -> Tensor:
    """The packed codes, uint8 [count]; bitsandbytes may store the same bytes under a wider dtype (quant_storage)."""
    key = prefix + "weight"
    if key not in tensors:
        raise LoRAError(f"{key} is missing, expected {count} bytes of packed NF4 codes.")
    found = tensors[key]
    if found.nbytes != count:
        raise LoRAError(
            f"{key} is {_name(found)}, {found.nbytes} bytes, expected the {count} bytes of the shape in {STATE}."
        )
    return found.detach().contiguous().flatten().view(torch.uint8)


def _expect(tensors: Mapping[str, Tensor], prefix: str, key: str, dtype: torch.dtype, count: int) -> Tensor:
    """The tensor at `key`, flat, if it has this dtype and size and only finite values."""
    if prefix + key not in tensors:
        raise LoRAError(f"{prefix}{key} is missing, expected {dtype} [{count}].")
    found = tensors[prefix + key]
    if found.dtype != dtype or found.numel() != count:
        raise LoRAError(f"{prefix}{key} is {_name(found)}, expected {dtype} [{count}].")
    if not torch.isfinite(found).all():
        raise LoRAError(f"{prefix}{key} holds a NaN or an infinity: the file is damaged, fetch or make it again.")
    return found.detach().contiguous().flatten()


def _expect_codes(tensors: Mapping[str, Tensor], prefix: str, key: str, codes: Tensor) -> None:
    """Other tables mean other weights: only the very same values will do."""
    found = _expect(tensors, prefix, key, torch.float32, codes.numel()).cpu()
    if not torch.equal(found, codes):
        at = int((found != codes).nonzero()[0])
        raise LoRAError(
            f"{prefix}{key}[{at}] is {found[at].item()!r}, expected {codes[at].item()!r}: the file was made with "
            "another code table. Decode it with the program that wrote it, and quantise the result again."
        )


def _name(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
