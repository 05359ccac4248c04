"""GGUF, llama.cpp's file format: the metadata and the tensors of a file, one tensor at a time.

A GGUF file is little-endian: magic, version, counts; the metadata as (key, type, value); a table of tensors as
(name, dims, type, offset); then the data, each tensor at an aligned offset, in blocks of some ggml type, which the
`gguf` package decodes to float32.

The reader is our own because it checks every length against the file's end, and because `gguf`'s own takes seconds
on a vocabulary (it makes several NumPy arrays for each token). This module imports gguf: import it where it is needed.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from lora.errors import LoRAError

STRING, ARRAY = 8, 9  # metadata types; the others are single numbers
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class GGUFTensor(NamedTuple):
    """Where one tensor lies, and as what."""

    shape: tuple[int, ...]  # in torch's order: the fastest dimension last
    ggml_type: int
    start: int  # byte offset in the file
    nbytes: int


class GGUFFile(NamedTuple):
    """A GGUF file's metadata and tensor table; `data` maps the file and reads nothing until asked."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    data: mmap.mmap | bytes

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata."""
        return self.metadata.get(key, default)

    def number(self, name: str, default: float | None = None) -> float:
        """The number at `<architecture>.<name>`, which must be there if there is no default."""
        return number_in(self.metadata, f"{self.architecture}.{name}", default, self.path)

    def whole(self, name: str, default: int | None = None) -> int:
        """`number`, as an integer."""
        return int(self.number(name, default))


def number_in(metadata: dict[str, Any], key: str, default: float | None, path: Path) -> float:
    """The finite number at `key`; raises LoRAError for anything else."""
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise LoRAError(
            f"{path}: its metadata has {key} = {value!r}, expected a number, without which the model cannot be built. "
            "Convert the model again with a current llama.cpp."
        )
    return value


def read_gguf(path: Path) -> GGUFFile:
    """The metadata and the tensor table of a GGUF file, every length checked against the file's end.

    Raises: LoRAError where the file is no GGUF, is torn, is one part of several, or holds a tensor type that the
    `gguf` package cannot decode.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise LoRAError(
                f"{path} is not a GGUF file: it does not start with the letters GGUF. Give a .gguf file, or the "
                "directory that holds config.json and the weights."
            )
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(path, data)
    version, tensor_count, key_count = cursor.numbers("IQQ")
    if version not in (2, 3):
        raise LoRAError(
            f"{path} is GGUF version {version}; little-endian versions 2 and 3 can be read. "
            "Convert the model again with a current llama.cpp."
        )
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(*cursor.numbers("I"))
    if (parts := number_in(metadata, "split.count", 1, path)) > 1:
        raise LoRAError(f"{path} is one of {parts} parts. Join them first: llama-gguf-split --merge FIRST OUT.")
    infos = [cursor.tensor_info() for _ in range(tensor_count)]
    alignment = max(1, int(number_in(metadata, "general.alignment", 32, path)))
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {
        name: _place(path, len(data), name, shape, ggml_type, data_start + offset)
        for name, shape, ggml_type, offset in infos
    }
    if len(tensors) < tensor_count:
        raise LoRAError(f"{path} is damaged: {tensor_count - len(tensors)} of its tensors have another one's name.")
    return GGUFFile(path, metadata, tensors, data)


def metadata_types(file: GGUFFile) -> dict[str, tuple[int, int | None]]:
    """The type of each value in the metadata, and of what is in it where it is an array."""
    cursor = _Cursor(file.path, file.data)
    _, _, key_count = cursor.numbers("IQQ")
    types: dict[str, tuple[int, int | None]] = {}
    for _ in range(key_count):
        key = cursor.string()
        (kind,) = cursor.numbers("I")
        items: int | None = struct.unpack_from("<I", file.data, cursor.position)[0] if kind == ARRAY else None
        types[key] = kind, items
        cursor.value(kind)
    return types


class _Cursor:
    """Reads little-endian values one after the other and never past the end."""

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self.path, self.data, self.position = path, data, 4

    def take(self, count: int) -> int:
        """The position before `count` more bytes, which must be there."""
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise LoRAError(
                f"{self.path} is torn: its header needs at least {self.position:,} bytes and the file has "
                f"{len(self.data):,}. Download or copy it again."
            )
        return start

    def numbers(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        return struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout)))

    def string(self) -> str:
        (length,) = self.numbers("Q")
        start = self.take(length)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise LoRAError(f"{self.path} is damaged: a string at byte {start:,} is not UTF-8.") from error

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.numbers("IQ")
            if kind in SCALARS:
                self.take(0 if count < len(self.data) else count)  # a damaged count: an error, not a huge layout
                return list(self.numbers(f"{count}{SCALARS[kind]}"))
            return [self.value(kind) for _ in range(count)]
        if kind not in SCALARS:
            raise LoRAError(f"{self.path} is damaged: there is no metadata type {kind} (byte {self.position:,}).")
        return self.numbers(SCALARS[kind])[0]

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, ggml type, offset from the start of the data)."""
        name = self.string()
        (rank,) = self.numbers("I")
        if rank > 4:
            raise LoRAError(f"{self.path} is damaged: tensor {name!r} has {rank} dimensions; ggml has at most 4.")
        dims = self.numbers(f"{rank}Q")
        return name, tuple(reversed(dims)), *self.numbers("IQ")


def _place(path: Path, size: int, name: str, shape: tuple[int, ...], ggml_type: int, start: int) -> GGUFTensor:
    """The tensor's place in the file, which must lie inside it and be of a type that can be decoded."""
    block, block_bytes = _block_of(path, name, ggml_type)
    if shape[-1:] and shape[-1] % block:
        raise LoRAError(f"{path} is damaged: tensor {name!r} has rows of {shape[-1]}, not a multiple of {block}.")
    nbytes = math.prod(shape) // block * block_bytes
    if start + nbytes > size:
        raise LoRAError(
            f"{path} is torn: tensor {name!r} ends at byte {start + nbytes:,} and the file has {size:,}. "
            "Download or copy it again."
        )
    return GGUFTensor(shape, ggml_type, start, nbytes)


def _block_of(path: Path, name: str, ggml_type: int) -> tuple[int, int]:
    """(elements, bytes) of one block of a ggml type, tried out on a block of zeros."""
    try:
        kind = GGMLQuantizationType(ggml_type)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        dequantize(numpy.zeros(block_bytes, numpy.uint8), kind)
    except (ValueError, NotImplementedError) as error:
        known = GGMLQuantizationType(ggml_type).name if ggml_type in list(GGMLQuantizationType) else "unknown to it"
        raise LoRAError(
            f"{path}: tensor {name!r} has ggml type {ggml_type} ({known}), which the gguf package cannot decode. "
            "Use a file quantised as Q8_0, Q4_1, Q4_K or F16, say, or a newer gguf package."
        ) from error
    return block, block_bytes


def decode(file: GGUFFile, name: str) -> torch.Tensor:
    """One tensor as the file has it, in float32."""
    tensor = file.tensors[name]
    raw = numpy.frombuffer(file.data, numpy.uint8, tensor.nbytes, tensor.start)
    rows = raw.reshape(*tensor.shape[:-1], -1)  # blocks run along the last dimension
    values = dequantize(rows, GGMLQuantizationType(tensor.ggml_type)).reshape(tensor.shape)
    return torch.from_numpy(values if values.flags.writeable else values.copy())  # float32 is a view of the file
