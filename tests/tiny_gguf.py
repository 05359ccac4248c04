"""Small GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from tiny import tiny_llama

Q = gguf.GGMLQuantizationType
Change = Callable[[dict[str, Any], dict[str, Any]], None]  # edits the metadata and the tensors before they are written

BYTES = sorted(
    {chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))} | {chr(256 + i) for i in range(68)}
)
MERGES = ["1 2", "12 3", "123 4", "Ġ 1", "Ġ Ġ", "a b", "ab c", "' s", "Ġ a", "Ċ Ċ", "c Ċ", "Ã ©"]
SPECIAL = ["<|start|>", "<|end|>", "<|mid|>", "<think>"]
UNREACHABLE = "xyz"  # a piece that no merge makes
TOKENS = [*BYTES, *(merge.replace(" ", "") for merge in MERGES), UNREACHABLE, *SPECIAL]
TOKENIZER = {
    "model": "gpt2", "pre": "gpt-2", "tokens": TOKENS, "merges": MERGES,
    "token_type": [1] * (len(TOKENS) - 4) + [3, 3, 3, 4],
    "bos_token_id": len(TOKENS) - 4, "eos_token_id": len(TOKENS) - 3, "padding_token_id": len(TOKENS) - 3,
}  # fmt: skip
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    path, _, suffix = name.rpartition(".")
    if path.startswith("model.layers."):
        _, _, layer, rest = path.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{suffix}"
    return f"{NAMES[path]}.{suffix}"


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to q and k: the two halves of each head, row by row in turn."""
    halves = weight.view(heads, 2, -1, *weight.shape[1:])
    return torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(weight.shape)


def write(
    path: Path,
    model: Any,
    architecture: str = "llama",
    kind: Q = Q.F32,
    change: Change | None = None,
) -> Path:
    """Writes `model` as a GGUF file.

    Args:
        kind: of the matrices; vectors are always F32.
        change: may edit the metadata and the tensors before they are written.
    """
    config = model.config
    metadata: dict[str, Any] = {
        f"{architecture}.{name}": value
        for name, value in {
            "context_length": 128,
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "attention.key_length": model.model.layers[0].self_attn.head_dim,
            "attention.value_length": model.model.layers[0].self_attn.head_dim,
            "rope.freq_base": 10000.0,
        }.items()
    }
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in TOKENIZER.items()}
    tensors = {gguf_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    if architecture == "llama":
        for name, tensor in tensors.items():
            if ".attn_q." in name or ".attn_k." in name:
                heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
                tensors[name] = permuted(tensor, heads)
    if change is not None:
        change(metadata, tensors)
    write_raw(path, architecture, metadata, tensors, kind)
    return path


def write_raw(path: Path, architecture: str, metadata: dict[str, Any], tensors: dict[str, Any], kind: Q) -> None:
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", architecture))
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if isinstance(value, tuple):  # (list, the type of its items)
            writer.add_key_value(key, value[0], gguf.GGUFValueType.ARRAY, value[1])
        else:
            writer.add_array(key, value) if isinstance(value, list) else adders[type(value)](key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):  # (raw bytes, type)
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        elif tensor.dim() == 1 or kind == Q.F32:
            writer.add_tensor(name, tensor.float().numpy())
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama(**options: Any) -> Any:
    return tiny_llama(vocab_size=len(TOKENS), intermediate_size=64, **options)


def qwen(family: str, **options: Any) -> Any:
    import transformers

    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{family}Config")(
        **sizes, num_key_value_heads=2, vocab_size=len(TOKENS),
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}, **options,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases: not the ones and zeros they start as
                parameter += torch.randn_like(parameter)
    return model


MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("llama", llama),
    "llama tied": ("llama", lambda: llama(tie_word_embeddings=True)),
    "llama with one kv head": ("llama", lambda: llama(num_key_value_heads=1)),
    "llama with wide heads": ("llama", lambda: llama(head_dim=16)),
    "qwen2": ("qwen2", lambda: qwen("Qwen2", tie_word_embeddings=True)),
    "qwen3": ("qwen3", lambda: qwen("Qwen3", head_dim=16)),
}
