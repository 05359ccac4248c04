"""What `model.save_pretrained` does on a transformers model that we changed: files that somebody can read.

    with adapters      they alone, in PEFT's files, as PEFT's own models do it
    with NF4 layers    the model's own, and config.json says for bitsandbytes and `lora.load` what is 4 bits wide
    else               the model's own

transformers' own would write an adapted model's weights under names that no `from_pretrained` finds again, and 4-bit
ones without a word about it. Trainers call it at the end of a run. `attach` gives it to one instance.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lora.adapters import AdapterState, state_of
from lora.errors import LoRAError
from lora.nf4_layer import NF4Linear


def attach(model: nn.Module) -> None:
    """Gives `model` the `save_pretrained` below in place of its own, where it has one."""
    if hasattr(model, "save_pretrained"):
        vars(model)["save_pretrained"] = types.MethodType(save_pretrained, model)


def detach(model: nn.Module) -> None:
    """Gives `model` its own `save_pretrained` back, once there is nothing of ours left in it."""
    if not any(isinstance(module, NF4Linear) for module in model.modules()):
        vars(model).pop("save_pretrained", None)


def save_pretrained(self: Any, save_directory: str | Path, **options: Any) -> None:
    """See the top of this file; arguments as transformers'.

    Raises: LoRAError for an option that asks for more than the adapters of a model that has some.
    """
    if isinstance(getattr(self, "lora_state", None), AdapterState):
        save_adapters(self, save_directory, **options)
        return
    with _quantisation_stated(self):
        type(self).save_pretrained(self, save_directory, **options)


def save_adapters(
    model: nn.Module,
    directory: str | Path,
    *,
    is_main_process: bool = True,
    state_dict: Any = None,
    safe_serialization: bool = True,
    **options: Any,
) -> None:
    """Every adapter of `model` by `lora.save_adapter`, "default" in the directory and others in subdirectories.

    Args:
        is_main_process: whether to write anything. state_dict: what a trainer has gathered; not needed.
    """
    from lora.adapter_io import save_adapter

    asked = [name for name, value in options.items() if value] + ["safe_serialization=False"] * (not safe_serialization)
    if asked:
        raise LoRAError(
            f"save_pretrained of a model with adapters takes no {', '.join(asked)}: it writes the adapters only, as "
            "safetensors. Call lora.merge_and_eject(model) first to save a whole model."
        )
    for name in state_of(model).configs if is_main_process else ():
        save_adapter(model, directory, name)


def checkpoint_config(model: nn.Module) -> dict[str, Any]:
    """What `config.quantization_config` must say beside a saved NF4 model, for bitsandbytes and for `lora.load`.

    bitsandbytes reads blocks of 64 with double quantisation or without; all layers must agree, as `lora.quantize` makes
    them.
    """
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    kinds = {(layer.block_size, layer.nested_absmax is not None, layer.dtype) for layer in layers}
    if len(kinds) != 1:
        raise LoRAError(
            f"The model has NF4 layers of {len(kinds)} kinds (block size, double quantisation, dtype), and a config "
            f"describes exactly one: {', '.join(sorted(map(str, kinds))) or 'none'}."
        )
    ((_, double, dtype),) = kinds
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [path for path, module in model.named_modules() if type(module) is nn.Linear],
    }


@contextmanager
def _quantisation_stated(model: Any) -> Iterator[None]:
    """The config of a model with NF4 layers says so within the block; after it trainers must not take it for theirs."""
    config = model.config
    if hasattr(config, "quantization_config") or not any(isinstance(m, NF4Linear) for m in model.modules()):
        yield
        return
    config.quantization_config = checkpoint_config(model)
    try:
        yield
    finally:
        del config.quantization_config
