"""Cards that a plan can be made for: memory, bandwidth and arithmetic, and how much of those a step was seen to reach.

Rates and bandwidths are the vendor's, for dense bfloat16 products with float32 sums; memory is what the driver reports,
which is less than the name says where error correction takes some. Only H100s were measured
(`docs/benchmarks/h100.csv`); for every other card the shares that one reached are taken over.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import torch

from lora.errors import LoRAError, did_you_mean
from lora.planner import bytes_of

MIB = 1 << 20
# What `docs/benchmarks/h100.csv` says; tests/test_plan.py computes them from it again.
STEP_SHARE = 0.536  # of the data sheet's rate: a bf16 step of 4 x 2048 tokens without checkpointing, its MFU
PRODUCT_SHARE = 0.842  # of it: the best product alone
COPY_SHARE = 0.901  # of the data sheet's bandwidth: a copy
HOST_SECONDS = 0.00809  # a block of a step of 1 x 2048 tokens, where the host could not launch any faster
COMPUTE_CAPABILITY = (8, 0)  # the oldest that the kernels are compiled and tested for


class Card(NamedTuple):
    """A device to plan for. Without rates, step times are not predicted."""

    name: str
    kind: str  # "cuda" or "cpu"
    memory: int  # bytes
    reserve: int  # bytes of them that no plan may use
    flops: float | None  # a second, dense bfloat16, as the vendor says
    bandwidth: float | None  # bytes a second, as the vendor says
    source: str = ""


class Sheet(NamedTuple):
    """A line of the table."""

    mib: int  # as nvidia-smi shows
    teraflops: float
    gigabytes: float  # a second
    source: str


SHEETS = {
    "h100": Sheet(81559, 989.4, 3350, "NVIDIA H100 data sheet, SXM: 1,979 with sparsity"),
    "h200": Sheet(143771, 989.4, 4800, "NVIDIA H200 data sheet, SXM: 1,979 with sparsity"),
    "a100-80gb": Sheet(81920, 312, 2039, "NVIDIA A100 data sheet, 80GB SXM"),
    "a100-40gb": Sheet(40960, 312, 1555, "NVIDIA A100 data sheet, 40GB"),
    "l40s": Sheet(46068, 362, 864, "NVIDIA L40S data sheet: 733 with sparsity"),
    "l4": Sheet(23034, 121, 300, "NVIDIA L4 data sheet: 242 with sparsity"),
    "a10": Sheet(23028, 125, 600, "NVIDIA A10 data sheet"),
    "rtxa6000": Sheet(49140, 154.8, 768, "NVIDIA RTX A6000 data sheet: 309.7 with sparsity"),
    "rtx4090": Sheet(24564, 165.2, 1008, "NVIDIA Ada architecture white paper, float32 sums"),
    "rtx3090": Sheet(24576, 71, 936, "NVIDIA GA102 architecture white paper, float32 sums"),
}
TOO_OLD = {"t4": "7.5", "v100": "7.0", "p100": "6.0", "rtx2080ti": "7.5", "gtx1080ti": "6.1"}


def card_named(name: str | None, reserve: int | str | None = None) -> Card:
    """What `--gpu` names: a card of the table, "cpu" (this machine's memory), or a number of bytes on some GPU.

    Args:
        name: None is this machine's GPU, or its CPU where it has none.
        reserve: bytes that no plan may use; None for `default_reserve`.

    Raises: LoRAError for an unknown card, listing those there are, and for one the kernels do not support.
    """
    card = _local() if name is None else _named(name)
    held = default_reserve(card) if reserve is None else bytes_of(reserve)
    if held >= card.memory:
        raise LoRAError(f"reserve is {held:,} bytes, and {card.name} has {card.memory:,}: reserve less.")
    return card._replace(reserve=held)


def default_reserve(card: Card) -> int:
    """What the process takes besides tensors, and what the allocator cannot use: stated, and not part of a prediction.

    On a GPU the CUDA context with its kernels, cuBLAS's workspaces, and blocks of memory that fit no tensor; on a CPU
    the interpreter and its libraries.
    """
    return 1024 * MIB + (card.memory // 50 if card.kind == "cuda" else 0)


def _named(name: str) -> Card:
    key = re.sub(r"[\s_]", "", name.lower()).removeprefix("nvidia")
    if key == "cpu":
        return Card("cpu", "cpu", _host_memory(), 0, None, None)
    if key in TOO_OLD:
        raise LoRAError(
            f"gpu is {name!r}, of compute capability {TOO_OLD[key]}: the kernels are for "
            f"{'.'.join(map(str, COMPUTE_CAPABILITY))} and newer, which have bfloat16. Expected one of {_names()}."
        )
    if key in SHEETS:
        return _of_sheet(key)
    if re.match(r"\d", key):
        return Card(name, "cuda", bytes_of(name), 0, None, None)
    raise LoRAError(f"gpu is {name!r}, which is not known.{did_you_mean(key, [*SHEETS, 'cpu'])} Expected {_names()}.")


def _names() -> str:
    return f"{', '.join(SHEETS)}, cpu, or its memory, like 24GiB"


def _of_sheet(key: str) -> Card:
    sheet = SHEETS[key]
    return Card(key, "cuda", sheet.mib * MIB, 0, sheet.teraflops * 1e12, sheet.gigabytes * 1e9, sheet.source)


def _local() -> Card:
    if not torch.cuda.is_available():
        return _named("cpu")
    properties = torch.cuda.get_device_properties(0)
    words = re.sub(r"\s", "", properties.name.lower())
    key = next((key for key in SHEETS if key.split("-")[0] in words), None)
    card = _of_sheet(key) if key else Card("", "cuda", 0, 0, None, None)
    return card._replace(name=properties.name, memory=properties.total_memory)


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
