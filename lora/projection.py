"""What an operation is given: the tensors of one projection, and how its input is dropped out.

Both backends and the layers speak in these small tuples; none of them holds any maths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class NF4Weight(NamedTuple):
    """A matrix in 4-bit NormalFloat (Dettmers et al. 2023, QLoRA), stored as bitsandbytes stores it.

    The matrix is flattened row-major and cut into blocks; each block keeps its largest magnitude (absmax),
    each element the index of the nearest of 16 codes. With double quantisation the absmax are themselves
    stored in 8 bits, in blocks of their own.
    """

    codes: Tensor  # uint8 [ceil(n / 2)]: element 2i in the high nibble, element 2i + 1 in the low one
    absmax: Tensor  # float32 [blocks], or uint8 [blocks] with double quantisation
    shape: tuple[int, ...]  # of the matrix: (out_features, in_features)
    dtype: torch.dtype  # what the matrix was, and what it is dequantised to unless asked otherwise
    block_size: int = 64
    nested_absmax: Tensor | None = None  # float32 [ceil(blocks / nested_block_size)]
    nested_offset: Tensor | None = None  # float32 []: the mean absmax, taken off before the second level
    nested_block_size: int = 256


class Projection(NamedTuple):
    """One linear map with its adapter: h = W x + b + scaling · B A x (Hu et al. 2021, eq. 3).

    Several active adapters are one projection: their A's stacked, their scaled B's side by side.
    The last four are absent where the projection is not adapted.
    """

    weight: Tensor | NF4Weight  # [out_features, in_features], frozen
    bias: Tensor | None = None  # [out_features]
    lora_A: Tensor | None = None  # [r, in_features]
    lora_B: Tensor | None = None  # [out_features, r]
    scaling: float = 1.0  # alpha / r, or alpha / sqrt(r) for rsLoRA
    magnitude: Tensor | None = None  # [out_features], DoRA only


class Dropout(NamedTuple):
    """Dropout whose mask is a function of (seed, stream, position): see `lora.reference.dropout`.

    Nothing is stored and nothing is drawn: both backends, a recomputation and a resumed run get the same bits.
    """

    p: float  # the probability of dropping an element, in [0, 1)
    seed: int  # one call's seed
    stream: int = 0  # tells apart the masks one seed is used for (lora_mlp: 0 for x, 1 for the hidden)


class Gradients(NamedTuple):
    """What the hand-written backward of a projection returns; None where there is nothing to differentiate."""

    dx: Tensor | None
    dlora_A: Tensor | None = None
    dlora_B: Tensor | None = None
    dbias: Tensor | None = None
    dmagnitude: Tensor | None = None
