"""DoRA: train a row's length and its direction apart (Liu et al. 2024, eq. 5).

    W' = m ⊙ (W + s B A) / ‖W + s B A‖        the norm is one number a row (an output feature)

The norm is a constant for the gradient (section 4.3 of the paper), so that in `lora_linear` only the gain
g = m / ‖W + s B A‖ appears. m starts at ‖W + s B A‖, the gain at 1, and step 0 changes nothing.

With dropout the rows are rescaled on the dropped input, as PEFT does:

    h = x Wᵀ + b + (g - 1) ⊙ D(x) Wᵀ + g ⊙ s (D(x) Aᵀ) Bᵀ
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora.projection import NF4Weight
from lora.reference.nf4 import nf4_dequantize


def dora_norm(weight: Tensor | NF4Weight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W + s B A‖ of each row, without gradient: [out_features], float32 (float64 for float64)."""
    with torch.no_grad():
        if isinstance(weight, NF4Weight):
            weight = nf4_dequantize(weight, torch.promote_types(lora_A.dtype, torch.float32))
        wide = torch.promote_types(weight.dtype, torch.float32)
        adapted = weight.to(wide) + scaling * (lora_B.to(wide) @ lora_A.to(wide))  # [out, in]
        norm: Tensor = torch.linalg.vector_norm(adapted, dim=1)
        return norm


def dora_gain(weight: Tensor | NF4Weight, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor) -> Tensor:
    """g = m / ‖W + s B A‖, [out_features], in the norm's dtype: differentiable in m only.

    A row that is all zero has no direction: its norm counts as 1, so that it stays zero rather than become NaN.
    """
    norm = dora_norm(weight, lora_A, lora_B, scaling)  # [out]
    return magnitude / torch.where(norm == 0, 1, norm)
