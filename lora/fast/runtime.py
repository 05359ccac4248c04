"""Where the fast backend's kernels run: Triton on a GPU or in its interpreter, plain torch elsewhere.

The autograd functions are the same everywhere; only the element-wise parts have two forms. Triton is imported when a
kernel is first launched, never by `import lora`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora.errors import UnsupportedError

GPU_TYPES = ("cuda",)  # ROCm devices call themselves cuda too
AUTOCAST_TYPES = ("cpu", *GPU_TYPES)


_meant: list[str] = []  # of a dry run under way: what device its meta tensors stand for
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # read once, as Triton itself reads it once
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """TRITON_INTERPRET=1: the real kernels, run on the CPU."""
    return INTERPRETING


def triton_installed() -> bool:
    """Whether Triton can be imported."""
    return TRITON_INSTALLED


@contextmanager
def standing_for(device: str) -> Iterator[None]:
    """Meta tensors take the way that tensors on `device`, "cpu" or "cuda", would; operators give their fake results."""
    _meant.append(device)
    try:
        yield
    finally:
        _meant.pop()


def rehearsing() -> bool:
    """Whether a dry run is under way."""
    return bool(_meant)


def kind_of(x: Tensor) -> str:
    """The type of the device that x is on, or that it stands for."""
    return _meant[-1] if _meant and x.is_meta else x.device.type


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
    if x.is_meta:
        return kind_of(x) in GPU_TYPES
    return x.device.type in GPU_TYPES or (interpreting() and x.device.type == "cpu" and triton_installed())


class FusedFunction(torch.autograd.Function):
    """An autograd function that autocast leaves alone: its inputs have the types they should have already.

    Without this, autocast would cast some of the products inside and not those that write in place. Its backward is
    written for numbers, not for a graph, so that a gradient of a gradient raises.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.forward = staticmethod(without_autocast(cls.forward))  # type: ignore[method-assign]
        cls.backward = staticmethod(once_differentiable(without_autocast(cls.backward)))  # type: ignore[assignment, method-assign]


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with autocast off while it runs."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        on = [kind for kind in AUTOCAST_TYPES if torch.is_autocast_enabled(kind)]
        if not on:
            return function(*arguments)
        with ExitStack() as stack:
            for kind in on:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*arguments)

    return run


def autocast_type(x: Tensor) -> torch.dtype | None:
    """What autocast would multiply x in; None where it is off, or x is no number that it casts."""
    kind = x.device.type
    if kind not in AUTOCAST_TYPES or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind) if x.is_floating_point() and x.dtype != torch.float64 else None
