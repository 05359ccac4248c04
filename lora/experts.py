"""What planning knows of a mixture of experts: the grouped product, and how large its experts are.

transformers sorts a layer's tokens by the expert that each was sent to, and multiplies all of them in one grouped
product (`torch.nn.functional.grouped_mm`), top_k copies of each token:

    gate, up   [tokens · top_k, hidden] x [experts, hidden, 2 · ffn]
    down       [tokens · top_k, ffn] x [experts, ffn, hidden]

The shapes are the same whichever token goes where, and so are memory and arithmetic: nothing has to be assumed of the
routing. Of the time one thing has: that every expert gets a token, so that the weights of all are read.

A family that goes through its experts one by one makes pieces as large as the tokens that each of them got. Such a step
looks at its activations, and `lora.dry_run` refuses it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lora.layers import LoRAParameter

GROUPED = "aten::_grouped_mm"
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # in configs


def experts_of(config: Any) -> int:
    """How many experts a layer of a model with this config has; 0 where it is no mixture."""
    count = next((int(n) for key in COUNTS if (n := getattr(config.get_text_config(), key, None))), 0)
    return count if count > 1 else 0


def stacked_bytes(model: nn.Module) -> int:
    """Bytes of the frozen parameters that hold several matrices: the experts."""
    found = {
        id(parameter): parameter.nbytes
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3 and len(parameter) > 1 and not parameter.requires_grad
        if not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d, nn.Bilinear))
    }
    return sum(found.values())


def rebuilt_bytes(model: nn.Module) -> int:
    """Bytes of what `target_parameters` adapts, which each forward makes anew as W + scaling · B A."""
    layers = [module for module in model.modules() if isinstance(module, LoRAParameter)]
    return sum(layer.owner.get_parameter(layer.parameter).nbytes for layer in layers)


def grouped_arithmetic(left: Tensor, right: Tensor) -> int:
    """FLOPs of a grouped product: each token is multiplied once, whatever its group.

    Args:
        left, right: tokens and the experts' weights; or, for the gradient of the weights, tokens of both sizes.
    """
    return int(2 * left.shape[-2] * left.shape[-1] * right.shape[-1])


def grouped_result(left: Tensor, right: Tensor, groups: Tensor) -> Tensor:
    """An empty result of a grouped product as the kernels lay it out: each row begins at a multiple of 16 bytes.

    PyTorch's own rule for tensors without numbers takes no float32, which its kernels take.
    """
    rows, width = left.shape[-2], right.shape[-1]
    pad = 16 // left.itemsize
    padded = math.ceil(width / pad) * pad
    if right.dim() == 2:  # tokens of both sizes: a gradient for each expert
        shape, strides = (len(groups), rows, width), (rows * padded, padded, 1)
        return torch.empty_strided(shape, strides, dtype=left.dtype, device=left.device)
    return torch.empty_strided((rows, width), (padded, 1), dtype=left.dtype, device=left.device)
