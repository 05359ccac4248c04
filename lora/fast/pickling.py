"""Why a fused model is not pickled: out of a pickle a forward of ours would come as that of the module's class."""

from __future__ import annotations

from typing import Any

from lora.errors import LoRAError


class NotPickled:
    """An attribute of each patched module, which a pickler meets first. It may be deep-copied: patches survive that."""

    def __deepcopy__(self, memo: dict[int, Any]) -> NotPickled:
        return self

    def __reduce__(self) -> Any:
        raise LoRAError(
            "a fused model cannot be pickled, by torch.save or for another process: call lora.fast.unfuse(model) "
            "before, and lora.fast.fuse(model), lora.for_training or lora.for_inference after. To keep an adapter, "
            "lora.save_adapter needs neither."
        )
