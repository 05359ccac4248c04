"""q, k and v of one x as a group: one dropped x, one stacked A, one product where the weights lie together.

The equations are those of `lora.reference.qkv`, the work is `lora.fast.linear.project_group`'s.
"""

from __future__ import annotations

from torch import Tensor

from lora.fast.linear import project_group
from lora.projection import Dropout, Projection


def lora_qkv(
    x: Tensor, q: Projection, k: Projection, v: Projection, *, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q(x), k(x), v(x); arguments and results as in `lora.reference.qkv.lora_qkv`.

    FLOPs: those of three `lora_linear`. Saved for backward: x once, and s·D(x)Aᵀ of each, tokens·(in + Σ r) numbers.
    Besides these what `lora_linear` saves, three times: copies of adapters of another type than x, Σ r·(in + out), of
    all A's where only one is of another; DoRA's g and norm, 2·Σ out, and tokens·Σ out while the magnitudes train; with
    autocast copies of the weights, in·Σ out, which no longer lie together: x then goes through three products. Dropout
    saves nothing. A norm's result x is not kept either, but made again (`lora.fast.source`).
    """
    hq, hk, hv = project_group(x, [q, k, v], dropout)
    return hq, hk, hv
