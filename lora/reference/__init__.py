"""The reference: LoRA written to be read. Same names, signatures and meaning as `lora.fast`.

Start with `linear.py` (the equation and its backward), then `inject.py` (how it gets into a model) and `merge.py`
(how it gets into the weights). Every operation is a short file of its own.
"""

from lora.reference.checkpoint import checkpoint
from lora.reference.dropout import dropout_mask
from lora.reference.embedding import lora_embedding
from lora.reference.inject import add_adapter, eject, inject
from lora.reference.linear import lora_linear
from lora.reference.loss import linear_cross_entropy
from lora.reference.merge import merge, merge_and_eject, merge_weight, unmerge
from lora.reference.mlp import lora_mlp
from lora.reference.modes import for_inference, for_training
from lora.reference.multi_lora import multi_lora_linear
from lora.reference.nf4 import nf4_dequantize, nf4_quantize
from lora.reference.norm import layer_norm, rms_norm
from lora.reference.qkv import lora_qkv
from lora.reference.quantize import quantize
from lora.reference.rope import rope

__all__ = [
    "add_adapter",
    "checkpoint",
    "dropout_mask",
    "eject",
    "for_inference",
    "for_training",
    "inject",
    "layer_norm",
    "linear_cross_entropy",
    "lora_embedding",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "merge",
    "merge_and_eject",
    "merge_weight",
    "multi_lora_linear",
    "nf4_dequantize",
    "nf4_quantize",
    "quantize",
    "rms_norm",
    "rope",
    "unmerge",
]
