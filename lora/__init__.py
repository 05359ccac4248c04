"""LoRA and QLoRA fine-tuning, written twice: `lora.reference` to be read, `lora.fast` to be fast, proven equal.

h = W x + (alpha / r) · B A x        A random, B zero, so that step 0 changes nothing (Hu et al. 2021, eq. 3)

model, tokenizer = lora.load("some/model")
lora.inject(model, lora.LoRAConfig(r=16, lora_alpha=32))
optimizer = torch.optim.AdamW(lora.trainable_parameters(lora.for_training(model)), lr=2e-4)
...
lora.save_adapter(model, "my-adapter")
"""

from lora.adapter_io import load_adapter, save_adapter
from lora.adapters import (
    adapters,
    delete_adapter,
    disable_adapters,
    loraplus_groups,
    set_adapter,
    trainable_parameters,
    without_adapters,
)
from lora.config import LoRAConfig
from lora.dispatch import (
    add_adapter,
    eject,
    explain,
    for_inference,
    for_training,
    get_backend,
    inject,
    merge,
    merge_and_eject,
    ops,
    quantize,
    unmerge,
    use_backend,
)
from lora.errors import LoRAError, UnsupportedError
from lora.models import load
from lora.planner import plan_checkpointing
from lora.projection import Projection

__version__ = "0.1.0"

__all__ = [
    "LoRAConfig",
    "LoRAError",
    "Projection",
    "UnsupportedError",
    "adapters",
    "add_adapter",
    "delete_adapter",
    "disable_adapters",
    "eject",
    "explain",
    "for_inference",
    "for_training",
    "get_backend",
    "inject",
    "load",
    "load_adapter",
    "loraplus_groups",
    "merge",
    "merge_and_eject",
    "ops",
    "plan_checkpointing",
    "quantize",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
    "unmerge",
    "use_backend",
    "without_adapters",
]
