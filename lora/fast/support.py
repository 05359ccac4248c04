"""What the fast backend can run, and every reason why not."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lora.fast.runtime import GPU_TYPES, triton_installed
from lora.projection import NF4Weight, Projection

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OLDEST = (8, 0)  # the first compute capability that the kernels are compiled and checked for
ROCM = ("gfx942",)  # the AMD GPUs that they are compiled and checked for


Kind = tuple[type, torch.device, torch.dtype]
_fine: set[Kind] = set()  # kinds of tensors that were looked at and can run


def reasons(arguments: Iterable[Any]) -> list[str]:
    """Why the fast backend cannot run an operation on these arguments; empty where it can."""
    found: dict[str, None] = {}  # a set that keeps its order
    in_graph = torch.compiler.is_compiling()  # which looks once anyway
    for tensor in tensors_in(arguments):
        kind = (type(tensor), tensor.device, tensor.dtype)
        if not in_graph and kind in _fine:
            continue
        before = len(found)
        if type(tensor).__name__ == "DTensor":
            found["a tensor is a DTensor: gather it, or shard with FSDP2, which hands operations local tensors"] = None
        device = tensor.device
        if device.type not in ("cpu", "meta", *GPU_TYPES):
            found[f"a tensor is on {device}: only the CPU and CUDA or ROCm devices are supported"] = None
        elif device.type in GPU_TYPES:
            found |= dict.fromkeys(device_reasons(device))
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            found[f"a tensor is {tensor.dtype}: only {names} are supported"] = None
        if not in_graph and len(found) == before:
            _fine.add(kind)
    return list(found)


@functools.cache
def device_reasons(device: torch.device) -> tuple[str, ...]:
    """Why kernels cannot run on a GPU: Triton is missing, or the GPU is none that they are checked for.

    An NVIDIA GPU newer than those is no reason: Triton compiles for the GPU it finds, no kernel names an instruction,
    and the products take their smallest tiles there (`lora.fast.kernels.gemm.architecture`). What still did not fit
    would be Triton's error, not another result. On AMD that does not hold: the threads of a warp differ (32 on gfx11,
    64 on gfx9), and so would every kernel's registers.
    """
    found = []
    if not triton_installed():
        found.append(f"{device} needs Triton, which is not installed: pip install triton")
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]  # "gfx942:sramecc+:xnack-"
        if name not in ROCM:
            found.append(f"{device} is a {name}: of ROCm devices the kernels are checked for {', '.join(ROCM)} only")
    elif (capability := torch.cuda.get_device_capability(device)) < OLDEST:
        found.append(f"{device} has compute capability {capability}: the kernels need {OLDEST} or newer")
    return tuple(found)


def tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments, those of projections included."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (Projection, NF4Weight)):
            yield from tensors_in(argument)
