"""The fast backend: the names, signatures and meaning of `lora.reference`, with fewer passes over memory.

On a GPU the element-wise parts are Triton kernels (`lora.fast.kernels`); on a machine without one the same autograd
functions run in plain torch; with TRITON_INTERPRET=1 the kernels themselves run on the CPU.
"""

from lora.fast.checkpoint import checkpoint
from lora.fast.dropout import dropout_mask
from lora.fast.embedding import lora_embedding
from lora.fast.inject import add_adapter, eject, inject
from lora.fast.linear import lora_linear
from lora.fast.loss import linear_cross_entropy
from lora.fast.merge import merge, merge_and_eject, merge_weight, unmerge
from lora.fast.mlp import lora_mlp
from lora.fast.modes import for_inference, for_training
from lora.fast.multi_lora import multi_lora_linear
from lora.fast.nf4 import nf4_dequantize, nf4_quantize
from lora.fast.norm import layer_norm, rms_norm
from lora.fast.qkv import lora_qkv
from lora.fast.quantize import quantize
from lora.fast.rope import rope

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
