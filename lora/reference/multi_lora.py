"""Many adapters in one batch: each row of x goes through the adapter it names.

    h_i = W x_i + b + s_j · B_j A_j x_i        j = index_i, and no update where index_i = -1

The frozen product is shared, as in serving many fine-tunings of one model (Chen et al. 2023, Punica; Sheng et al. 2023,
S-LoRA). An adapter sees only its own rows; with X_j, dY_j the rows of adapter j, each backward is `lora_linear`'s:

    dB_j = s_j · dY_jᵀ (X_j A_jᵀ)        dA_j = (s_j · dY_j B_j)ᵀ X_j        dX_j = dY_j W + s_j · (dY_j B_j) A_j

Adapters of different ranks are padded with zero rows of A and zero columns of B, which add nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.errors import LoRAError
from lora.projection import Gradients, Projection
from lora.reference.linear import dense_weight, flat, frozen_linear


def multi_lora_linear(
    x: Tensor, base: Projection, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, index: Tensor
) -> Tensor:
    """h_i = W x_i + b + s_j · B_j A_j x_i with j = index_i, differentiable by autograd.

    Args:
        x: [rows, ..., in_features]; a row is one entry of the first dimension (a sequence, say).
        base: weight [out, in] or NF4, and bias; no adapter of its own.
        lora_A: [adapters, r, in_features].
        lora_B: [adapters, out_features, r].
        scaling: [adapters], a constant for the gradient.
        index: [rows], int64: each row's adapter, or -1 for the base alone.

    Returns: [rows, ..., out_features].
    Raises: LoRAError for an index outside the adapters, naming the row; where shapes do not fit.
    FLOPs: 2·tokens·(in·out + r·(in + out)). Saved for backward by autograd: x, each adapter's rows of x and its u.
    """
    check_base(base)
    check_adapters(x, base.weight.shape, lora_A, lora_B, scaling, index)
    h = frozen_linear(x, base.weight, base.bias)  # [rows, ..., out]
    for adapter, rows in rows_by_adapter(index, len(lora_A)):
        u = float(scaling[adapter]) * F.linear(x[rows], lora_A[adapter].to(x.dtype))  # [its rows, ..., r]
        h = h.index_add(0, rows, F.linear(u, lora_B[adapter].to(x.dtype)).to(h.dtype))
    return h


def multi_lora_linear_backward(
    dy: Tensor, x: Tensor, base: Projection, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, index: Tensor
) -> Gradients:
    """The gradients of `multi_lora_linear`, written out; an adapter that no row names has zero gradients.

    Args:
        dy: [rows, ..., out_features], the gradient with respect to h.
        the others: as they were given to `multi_lora_linear`.
    """
    check_base(base)
    check_adapters(x, base.weight.shape, lora_A, lora_B, scaling, index)
    dx = dy @ dense_weight(base.weight, x.dtype)  # [rows, ..., in]
    dA, dB = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    for adapter, rows in rows_by_adapter(index, len(lora_A)):
        A, B, s = lora_A[adapter].to(x.dtype), lora_B[adapter].to(x.dtype), float(scaling[adapter])
        du = s * (dy[rows] @ B)  # [its rows, ..., r]
        u = s * (x[rows] @ A.T)  # [its rows, ..., r]
        dB[adapter] = flat(dy[rows]).T @ flat(u)
        dA[adapter] = flat(du).T @ flat(x[rows])
        dx.index_add_(0, rows, du @ A)
    dbias = None if base.bias is None else flat(dy).sum(0).to(base.bias.dtype)
    return Gradients(dx, dA, dB, dbias)


def rows_by_adapter(index: Tensor, adapters: int) -> Iterator[tuple[int, Tensor]]:
    """Each adapter that some row names, with those rows' numbers."""
    for adapter in range(adapters):
        rows = (index == adapter).nonzero().flatten()  # [its rows]
        if len(rows):
            yield adapter, rows


def check_base(base: Projection) -> None:
    """The base has no adapter of its own."""
    if base.lora_A is not None or base.lora_B is not None or base.magnitude is not None:
        raise LoRAError("The base projection has an adapter of its own, expected weight and bias only: stack it too.")


def check_adapters(
    x: Tensor, shape: Sequence[int], lora_A: Tensor, lora_B: Tensor, scaling: Tensor, index: Tensor
) -> None:
    """The stacked adapters fit each other and the base, and every row names one of them, or -1."""
    check_stacked(x, shape, lora_A, lora_B, scaling, index)
    check_named(index, len(lora_A))


def check_stacked(
    x: Tensor, shape: Sequence[int], lora_A: Tensor, lora_B: Tensor, scaling: Tensor, index: Tensor
) -> None:
    """The shapes and types of the stacked adapters and the index fit each other and the base."""
    out_features, in_features = shape
    adapters, r = lora_A.shape[0], lora_A.shape[1]
    found = (list(lora_A.shape), list(lora_B.shape), list(scaling.shape), list(index.shape))
    expected = ([adapters, r, in_features], [adapters, out_features, r], [adapters], [x.shape[0]])
    for name, shape, wanted in zip(("lora_A", "lora_B", "scaling", "index"), found, expected, strict=True):
        if shape != wanted:
            raise LoRAError(f"{name} is {shape}, expected {wanted} (adapters, r and features of lora_A, x and base).")
    if index.dtype not in (torch.int64, torch.int32):
        raise LoRAError(f"The adapter index is {index.dtype}, expected int64 or int32: one adapter number a row.")


def check_named(index: Tensor, adapters: int) -> None:
    """Every row names one of the adapters, or -1."""
    wrong = ((index < -1) | (index >= adapters)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise LoRAError(
            f"Row {row} names adapter {int(index[row])}, expected 0 to {adapters - 1}, or -1 for the base alone."
        )
