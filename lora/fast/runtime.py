"""Where the fast backend's kernels run: Triton on a GPU or in its interpreter, plain torch elsewhere.

The autograd functions are the same everywhere; only the element-wise parts have two forms. Triton is imported when a
kernel is first launched, never by `import lora`.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from lora.errors import UnsupportedError

GPU_TYPES = ("cuda",)  # ROCm devices call themselves cuda too


@functools.cache
def interpreting() -> bool:
    """TRITON_INTERPRET=1: the real kernels, run on the CPU. Read once, as Triton itself reads it once."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def runs_triton(x: Tensor) -> bool:
    """Whether kernels on `x` are Triton's; False for the plain-torch forms.

    Raises: UnsupportedError on a GPU without Triton: there the plain forms would be slow without a word.
    """
    if x.device.type in GPU_TYPES and not triton_installed():
        raise UnsupportedError(
            f"the fast backend needs Triton on {x.device}, and it is not installed: pip install triton, or choose "
            "LORA_BACKEND=reference."
        )
    if x.dtype == torch.float64:  # kernels compute in float32
        return False
    return x.device.type in GPU_TYPES or (interpreting() and x.device.type == "cpu" and triton_installed())
