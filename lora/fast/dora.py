"""DoRA's row norm, fused: see `lora.reference.dora` for the equations.

A kernel sums (W + s B A)² tile by tile, so that B·A is never in memory. Without one, a block of rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora.fast import library
from lora.fast.runtime import runs_triton

BLOCK_BYTES = 1 << 22  # of W + s B A held at a time


@torch.no_grad()
def dora_norm(dense: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + s B A‖ of each row, [out_features], float32 (float64 for a float64 weight); 1 for a row of zeros."""
    norm = row_norms(dense, lora_A, lora_B, scaling)
    return norm.masked_fill_(norm == 0, 1)


def row_norms(dense: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + s B A‖ of each row, as it is."""
    if runs_triton(dense):
        return library.dora_norm(dense, lora_A, lora_B, scaling)
    wide = torch.promote_types(dense.dtype, torch.float32)
    A, B = lora_A.to(wide), lora_B.to(wide)
    norm = torch.empty(dense.shape[0], dtype=wide, device=dense.device)
    step = max(1, BLOCK_BYTES // (dense.shape[1] * wide.itemsize))
    for start in range(0, len(norm), step):
        block = slice(start, start + step)
        adapted = torch.addmm(dense[block].to(wide), B[block], A, alpha=scaling)  # [step, in]
        torch.linalg.vector_norm(adapted, dim=1, out=norm[block])
    return norm
