"""A model without its weights: built on the meta device from its config, quantised, with adapters.

Every module, shape and dtype is what `lora.load` and `lora.inject` would make, so that what they take can be added up,
and a step can be run for its shapes (`lora.dry_run`), on a machine that could not hold the model.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora import dispatch, models
from lora.config import LoRAConfig
from lora.experts import rebuilt_bytes, stacked_bytes
from lora.nf4_layer import NF4Linear


def skeleton(outline: models.Outline, name: str, config: LoRAConfig, quantization: str, dtype: torch.dtype) -> Any:
    """The injected model on the meta device.

    Args:
        outline: of `models.outline_of`. name: what errors call the model.
        quantization: "none" or "nf4"; a checkpoint in NF4 stays so.
        dtype: of the weights that are not quantised.

    Raises: LoRAError as `lora.inject` does.
    """
    transformers: Any = import_module("transformers")
    with models.building(name), torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(outline.config, dtype=dtype)
    if quantization == "nf4":
        _quantise(model, dtype, double_quant=outline.double_quant or outline.quantization is None)
    dispatch.inject(model, config)
    return model.to("meta")  # what is made while injecting, DoRA's magnitudes say


def _quantise(model: Any, dtype: torch.dtype, double_quant: bool) -> None:
    """NF4Linear in place of what `lora.load` quantises."""
    from lora.nf4_loader import target_weights  # it imports transformers

    for name in target_weights(model):
        path = name.removesuffix(".weight")
        parent, _, child = path.rpartition(".")
        linear = model.get_submodule(path)
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        packed = NF4Linear(*sizes, dtype=dtype, device="meta", double_quant=double_quant)
        setattr(model.get_submodule(parent), child, packed)


class Held(NamedTuple):
    """Bytes of what is in memory all the time, each tensor once."""

    frozen: int  # embeddings, head, norms, buffers, and linear layers where they are not quantised
    nf4: int  # codes and scales
    trained: int  # adapters, and what else has gradients
    parameters: int  # numbers that the frozen weights stand for
    trainable: int  # numbers that train
    experts: int  # of `frozen`: parameters of several matrices each, which NF4 leaves as they are
    rebuilt: int  # of `frozen`: what target_parameters adapts, and each forward makes anew


def held_by(model: nn.Module) -> Held:
    """Adds the model's tensors up."""
    packed = {id(m): m for m in model.modules() if isinstance(m, NF4Linear)}
    nf4 = {id(p): p for m in packed.values() for key, p in m.named_parameters(recurse=False) if key != "bias"}
    every: dict[int, Tensor] = {id(x): x for x in (*model.parameters(), *model.buffers())}
    frozen = [x for key, x in every.items() if key not in nf4 and not x.requires_grad]
    trained = [x for x in every.values() if x.requires_grad]
    numbers = sum(m.in_features * m.out_features for m in packed.values())
    return Held(
        sum(x.nbytes for x in frozen),
        sum(x.nbytes for x in nf4.values()),
        sum(x.nbytes for x in trained),
        numbers + sum(x.numel() for x in frozen if isinstance(x, nn.Parameter)),
        sum(x.numel() for x in trained),
        stacked_bytes(model),
        rebuilt_bytes(model),
    )
