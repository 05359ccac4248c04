"""Agreement before any figure: every output and gradient against float64 on the same inputs.

The measure is ‖y - y64‖ / ‖y64‖. A result that was rounded to its type k times on its way, each time by at most u
relative to its size, is within k·u; no operation here rounds more than ROUNDINGS times in a row (the MLP's dA: u, du,
dh, dg, g, h, and dA itself). Inputs are random and two-sided, lora_B and the incoming gradients are never zero, and
scales are such that the update is about as large as the frozen product: leaving it out is an error of a half.

During a check every tensor that Python code allocates is filled with NaN first, so that what a kernel does not write
cannot pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDINGS = 8
ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


def limit_of(dtype: torch.dtype) -> float:
    """The largest relative error that roundings explain."""
    return ROUNDINGS * torch.finfo(dtype).eps / 2


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """‖y - y64‖ / ‖y64‖; infinite for another shape or where anything is not finite."""
    if actual.shape != truth.shape:
        return math.inf
    wide = truth.double()
    error = float(torch.linalg.vector_norm(actual.double() - wide) / torch.linalg.vector_norm(wide))
    return error if math.isfinite(error) else math.inf


def differing_share(actual: Tensor, truth: Tensor) -> float:
    """The share of elements that are not equal, for results whose bits are promised."""
    return math.inf if actual.shape != truth.shape else float((actual != truth).double().mean())


class Poison(TorchDispatchMode):
    """Fills what `torch.empty` and its kin return: NaN, or the greatest integer."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ALLOCATIONS and isinstance(result, Tensor) and not result.is_meta:
            if result.is_floating_point():
                result.fill_(math.nan)
            else:
                result.fill_(True if result.dtype == torch.bool else torch.iinfo(result.dtype).max)
        return result
