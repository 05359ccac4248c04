"""transformers' loading, with every linear layer turned into NF4Linear the moment its weight has been read.

transformers reads a checkpoint tensor by tensor, renames and merges what old or foreign checkpoints call otherwise, and
hands each finished parameter to a quantiser if one is registered: so the full-precision model is never whole in memory.
Its skeleton keeps nn.Linear on the meta device; a layer is replaced when its weight arrives.

This module imports transformers: import it where it is needed, not at the top of another module.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lora import dispatch
from lora.errors import LoRAError
from lora.file_pages import FilePages
from lora.layers import is_conv1d
from lora.meter import Meter
from lora.nf4_format import ABSMAX, MAP, NESTED_ABSMAX, NESTED_MAP, STATE, from_checkpoint
from lora.nf4_layer import NF4Linear
from lora.projection import NF4Weight
from lora.saving import attach

METHOD = "lora_nf4"  # the name transformers knows our quantiser by
STORED_KEYS = [STATE, NESTED_ABSMAX, NESTED_MAP, MAP, ABSMAX, "weight"]  # longest first: "weight" begins them all
BYTES_PER_WEIGHT = 4.127 / 8


class NF4Config(QuantizationConfigMixin):
    """What `from_pretrained` is given.

    Args:
        stored: whether the checkpoint holds NF4 weights in bitsandbytes' keys, rather than full-precision ones.
        dtype: what stored weights are to count as; None leaves what the checkpoint says.
    """

    def __init__(self, stored: bool, dtype: torch.dtype | None = None) -> None:
        self.quant_method: Any = METHOD
        self.stored, self.dtype = stored, dtype
        self.progress: Meter | None = None
        self.failure: LoRAError | None = None

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Keeps the block's first error to be raised later: transformers makes a table of what an operation raises."""
        try:
            yield
        except LoRAError as error:
            self.failure = self.failure or error
            raise


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):
    """transformers' extension point for quantisation while loading."""

    quantization_config: NF4Config

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = quantization_config.stored
        self.targets: set[str] = set()
        self.pages = FilePages(())

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        self.targets = target_weights(model)
        self.pages = FilePages(checkpoint_files or ())
        progress = self.quantization_config.progress
        if progress is not None and not self.pre_quantized:
            progress.doing = "quantising"
            progress.total = sum(model.get_parameter(name).nbytes for name in self.targets)
        if not self.targets and not self.pre_quantized:
            raise LoRAError(
                f"quantization='nf4' finds nothing to do in a {type(model).__name__}: it has no nn.Linear besides the "
                "output head. Load it without quantization."
            )
        experts = [name for name, module in model.named_modules() if has_stacked_weights(module)]
        if experts:
            warnings.warn(
                f"quantization='nf4' leaves {len(experts)} modules in full precision: {experts[0]} and its like hold "
                "several matrices in one tensor, and only nn.Linear is quantised",
                stacklevel=1,  # transformers calls this, and its warnings are silenced by the commands
            )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and param_name in self.targets

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        return BYTES_PER_WEIGHT if param_name in self.targets else param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return Quantise(self.quantization_config, self.targets, self.pages)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        return [WeightConverter(list(STORED_KEYS), "weight", [TakeStored(self.quantization_config, self)])]

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Leaves no mark: what comes back is a plain model in which some modules are NF4Linear."""
        self.pages.give_back()
        attach(model)  # its save_pretrained is to say what is 4 bits wide
        del model.hf_quantizer, model.config.quantization_config, model.quantization_method
        model.is_quantized = False
        model._weight_conversions = [
            rule
            for rule in getattr(model, "_weight_conversions", None) or []
            if not any(isinstance(operation, TakeStored) for operation in getattr(rule, "operations", ()))
        ]
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class Quantise(ConversionOps):
    """One full-precision weight as it arrives: quantised, and its nn.Linear replaced by NF4Linear."""

    def __init__(self, config: NF4Config, targets: set[str], pages: FilePages) -> None:
        self.config, self.targets, self.pages = config, targets, pages

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **context: Any
    ) -> dict[str, Any]:
        left = {}
        for name in list(input_dict):  # several where a fused weight was split
            weight = _single(input_dict.pop(name))
            if name not in self.targets:
                left[name] = weight
                continue
            with self.config.noting():
                _check_fits(context["model"], name, tuple(weight.shape))
                _replace(name, dispatch.ops.nf4_quantize(weight, name=name), context)
            self.pages.add(weight.nbytes)
            if self.config.progress is not None:
                self.config.progress(weight.nbytes)
        return left


class TakeStored(ConversionOps):
    """The tensors that a checkpoint stores for one quantised weight, put into an NF4Linear as they are."""

    def __init__(self, config: NF4Config, quantizer: NF4Quantizer) -> None:
        self.config = config
        self.hf_quantizer = quantizer  # its presence tells transformers not to cast what it hands over

    def __deepcopy__(self, memo: Any) -> TakeStored:
        return self  # transformers copies its rules for each weight, and failures are to be noted in one place

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **context: Any
    ) -> dict[str, Any]:
        model, name = context["model"], context["full_layer_name"]
        tensors = {key: _single(value) for key, value in input_dict.items()}
        if STATE not in tensors and len(tensors) == 1:  # a norm, an embedding, the head: kept in full precision
            expected = model.get_parameter_or_buffer(name)
            return {key: value.to(expected.dtype) for key, value in tensors.items()}
        prefix = name.removesuffix("weight")
        with self.config.noting():
            quantised = from_checkpoint({prefix + key: value for key, value in tensors.items()}, prefix)
            _check_fits(model, name, quantised.shape)
            _replace(name, quantised._replace(dtype=self.config.dtype or quantised.dtype), context)
        return {}


def target_weights(model: Any) -> set[str]:
    """The weights to quantise: of every nn.Linear but the output head, and none that is tied to another module's.

    The same rule as `lora.quantize`, by name: on the meta device tied weights are not yet one tensor.
    """
    head = model.get_output_embeddings()
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    tied = set(ties) | set(ties.values())
    owners = Counter(id(module.weight) for module in model.modules() if isinstance(module, nn.Linear))
    return {
        f"{path}.weight"
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and owners[id(module.weight)] == 1
        and f"{path}.weight" not in tied
    }


def has_stacked_weights(module: nn.Module) -> bool:
    """Whether a module holds several matrices as one parameter, as mixtures of experts do."""
    stacked = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    return stacked and not isinstance(module, nn.Conv1d)


def _replace(name: str, quantised: NF4Weight, context: dict[str, Any]) -> None:
    """Puts an NF4Linear where the nn.Linear of weight `name` is; a bias, loaded or still to be loaded, moves along.

    Args:
        context: what transformers tells an operation: the model, and the keys it still misses.
    """
    model: Any = context["model"]
    path = name.removesuffix(".weight")
    layer = NF4Linear.from_quantised(quantised, model.get_submodule(path).bias)
    marked: list[Any] = [layer, *(part for part in layer.parameters(recurse=False) if part is not layer.bias)]
    for part in marked:
        part._is_hf_initialized = True  # transformers would fill what is not marked with random numbers
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    if context.get("missing_keys") is not None:
        context["missing_keys"].discard(name)


def _check_fits(model: Any, name: str, shape: tuple[int, ...]) -> None:
    """Raises LoRAError unless the model has a linear layer of this weight shape at `name`."""
    layer = model.get_submodule(name.removesuffix(".weight"))
    expected = tuple(layer.weight.shape)
    if is_conv1d(layer) and shape == expected[::-1]:
        raise LoRAError(
            f"{name} is 4-bit, of a {type(layer).__name__}, which only linear layers may be here: load the checkpoint "
            "that is not quantised. QLoRA of this architecture is not supported."
        )
    if type(layer) is not nn.Linear or shape != expected:
        raise LoRAError(
            f"{name} is {shape}, expected {expected} of a {type(layer).__name__}. The files are not of one checkpoint: "
            "download or copy the model again."
        )


def _single(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor
