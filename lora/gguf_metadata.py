"""What a GGUF file says of a model that did not come from one: sizes, rotary embedding, tokenizer.

Nothing is taken on trust. What is written is read back by our own loader's rules (`lora.gguf_loader`) and compared with
the model's config and tokenizer; where they differ, in a way of cutting text that has no name here, say, the model is
refused, and llama.cpp's own converter is named. Byte-level BPE only: SentencePiece's scores are not in tokenizer.json.
This module imports gguf and transformers: import it where it is needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFValueType
from torch import Tensor

from lora.errors import LoRAError
from lora.gguf_file import GGUFFile, GGUFTensor
from lora.gguf_loader import CONTROL, USER_DEFINED, _byte_level, build_config

Metadata = dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]]  # key → value, its type, the type of its items
T = GGUFValueType
CONVERTER = "llama.cpp's convert_hf_to_gguf.py"
NORMAL, UNUSED = 1, 5  # ggml's token types beside those of the loader
CUTTINGS = ("gpt-2", "smollm", "llama-bpe", "qwen2")  # the values of tokenizer.ggml.pre that can be recognised
COMPARED = (  # of a config: what the arithmetic depends on
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "attention_bias", "mlp_bias",
    "tie_word_embeddings", "hidden_act",
)  # fmt: skip
SAMPLES = (  # texts that the known ways of cutting cut differently, and others
    "Hello world, it's a test! Don't panic: WE'LL see.",
    "naïve café, 日本語のテキスト, Ελληνικά, 😀😀 tab\there\r\n\n\nnew  lines   \n  ",
    "def f(x_1, y2):\n    return x_1+y2*3.14159 # 1234567 ٣٤٥",
    "  12  345 6789a\u0301e\u0301 ... !!?\n\n \t x",
)


def metadata_of(name: str, model: Any, tokenizer: Any, architecture: str) -> tuple[Metadata, dict[str, Tensor]]:
    """The metadata of a model from a directory, and the tensor of Llama 3's rotary scaling where it has that.

    Raises: LoRAError where our loader would not read the same config and tokenizer back from them.
    """
    sizes, extra = _sizes(name, model.config, architecture)
    _check_config(name, model, sizes, extra, architecture)
    return sizes | _tokenizer(name, model.config, tokenizer), extra


# ---- the model -------------------------------------------------------------------------------------------------


def _sizes(name: str, config: Any, architecture: str) -> tuple[Metadata, dict[str, Tensor]]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    whole = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "rope.dimension_count": head_dim,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }
    real = {"attention.layer_norm_rms_epsilon": config.rms_norm_eps}
    text, extra = {}, {}
    rope = dict(config.rope_parameters)
    kind = rope["rope_type"]
    real["rope.freq_base"] = rope["rope_theta"]
    if kind in ("linear", "yarn"):
        text["rope.scaling.type"], real["rope.scaling.factor"] = kind, rope["factor"]
    if kind == "yarn":
        whole["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if kind == "llama3":
        extra["rope_freqs.weight"] = _llama3_divisors(rope, head_dim)
    found: Metadata = {"general.type": ("model", T.STRING, None), "general.name": (Path(name).name, T.STRING, None)}
    found |= {f"{architecture}.{key}": (value, T.UINT32, None) for key, value in whole.items()}
    found |= {f"{architecture}.{key}": (value, T.FLOAT32, None) for key, value in real.items()}
    return found | {f"{architecture}.{key}": (value, T.STRING, None) for key, value in text.items()}, extra


def _llama3_divisors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """What llama.cpp divides each frequency by: 1 for the fast ones, `factor` for the slow, between them in between."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * torch.pi)  # over the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    divisors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)  # [head_dim / 2]
    return divisors.float()


def _check_config(name: str, model: Any, sizes: Metadata, extra: dict[str, Tensor], architecture: str) -> None:
    """The config that our loader builds from the metadata must be the model's in whatever the arithmetic depends on."""
    config = model.config
    wrong = []
    try:
        again = build_config(_file(name, architecture, sizes, model, extra))
        wrong = [
            key for key in COMPARED if getattr(again, key, None) != getattr(config, key, getattr(again, key, None))
        ]
        if _rope(again) != _rope(config):
            wrong.append("rope_parameters")
    except LoRAError:  # the only thing in a config of our making that it can refuse
        wrong = ["rope_parameters"]
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        wrong.append("sliding_window")
    if wrong:
        raise LoRAError(
            f"{name}: its config has {', '.join(wrong)} that cannot be said in GGUF here. {_convert_instead()}"
        )


def _rope(config: Any) -> dict[str, Any]:
    """The rotary parameters that are set; 4 and 4.0 are one number."""
    return {key: value for key, value in dict(config.rope_parameters).items() if value is not None}


def _file(name: str, architecture: str, sizes: Metadata, model: Any, extra: dict[str, Tensor]) -> GGUFFile:
    """A GGUF file in memory, as far as `build_config` looks at it."""
    metadata = {key: value for key, (value, _, _) in sizes.items()} | {"general.architecture": architecture}
    metadata["tokenizer.ggml.tokens"] = []
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (model.config.vocab_size, model.config.hidden_size)}
    parameters = dict(model.named_parameters())
    if "model.layers.0.self_attn.q_proj.bias" in parameters:
        shapes["blk.0.attn_q.bias"] = (model.config.hidden_size,)
    if "model.layers.0.mlp.up_proj.bias" in parameters:
        shapes["blk.0.ffn_up.bias"] = (model.config.intermediate_size,)
    if not model.config.tie_word_embeddings:
        shapes["output.weight"] = shapes["token_embd.weight"]
    tensors = {key: GGUFTensor(shape, 0, 0, 0) for key, shape in shapes.items()}
    data = b"".join(tensor.numpy().tobytes() for tensor in extra.values())
    tensors |= {key: GGUFTensor(tuple(tensor.shape), 0, 0, tensor.nbytes) for key, tensor in extra.items()}
    return GGUFFile(Path(name), metadata, tensors, data)


# ---- the tokenizer ---------------------------------------------------------------------------------------------


def _tokenizer(name: str, config: Any, tokenizer: Any) -> Metadata:
    """The tokenizer in llama.cpp's terms."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    if backend is None or model.get("type") != "BPE" or type(backend.decoder).__name__ != "ByteLevel":
        raise LoRAError(f"{name}: its tokenizer is no byte-level BPE, the only kind written here. {_convert_instead()}")
    if not model["merges"]:
        raise LoRAError(f"{name}: its tokenizer joins no bytes, and GGUF has no empty list. {_convert_instead()}")
    tokens, kinds = _tokens(config.vocab_size, tokenizer)
    found: Metadata = {
        "tokenizer.ggml.model": ("gpt2", T.STRING, None),
        "tokenizer.ggml.tokens": (tokens, T.ARRAY, T.STRING),
        "tokenizer.ggml.token_type": (kinds, T.ARRAY, T.INT32),
        "tokenizer.ggml.merges": (
            [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
            T.ARRAY,
            T.STRING,
        ),
    }
    found["tokenizer.ggml.pre"] = (_cutting(name, found, backend, model), T.STRING, None)
    for role, token in {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}.items():
        index = getattr(tokenizer, f"{token}_token_id")
        if index is not None:
            found[f"tokenizer.ggml.{role}_token_id"] = (index, T.UINT32, None)
    ids, (bos, eos) = tokenizer("a")["input_ids"], (tokenizer.bos_token_id, tokenizer.eos_token_id)
    found["tokenizer.ggml.add_bos_token"] = (bos is not None and ids[:1] == [bos], T.BOOL, None)
    found["tokenizer.ggml.add_eos_token"] = (eos is not None and ids[-1:] == [eos], T.BOOL, None)
    if isinstance(tokenizer.chat_template, str):
        found["tokenizer.chat_template"] = (tokenizer.chat_template, T.STRING, None)
    return found


def _tokens(vocab_size: int, tokenizer: Any) -> tuple[list[str], list[int]]:
    """Every row of the embedding by its token, and the kind of each; rows without one are called [PAD0], ..."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    kinds = [NORMAL if index in by_id else UNUSED for index in range(vocab_size)]
    for index, added in tokenizer.added_tokens_decoder.items():
        kinds[index] = CONTROL if added.special else USER_DEFINED
    return tokens, kinds


def _cutting(name: str, metadata: Metadata, backend: Any, model: dict[str, Any]) -> str:
    """Which of llama.cpp's ways of cutting text is this tokenizer's: the one that our loader reads back as the same."""
    values = {key: value for key, (value, _, _) in metadata.items()}
    for pre in CUTTINGS:
        file = GGUFFile(Path(name), values | {"tokenizer.ggml.pre": pre}, {}, None)  # type: ignore[arg-type]
        again = _byte_level(file, values["tokenizer.ggml.tokens"])
        same_rule = json.loads(again.to_str())["model"].get("ignore_merges") == model.get("ignore_merges", False)
        if same_rule and all(_pieces(again, text) == _pieces(backend, text) for text in SAMPLES):
            return pre
    raise LoRAError(
        f"{name}: its tokenizer cuts text in none of the ways known here ({', '.join(CUTTINGS)}), and with another one "
        f"the model would see other tokens than it was trained on. {_convert_instead()}"
    )


def _pieces(backend: Any, text: str) -> list[Any]:
    """A text as it is cut before any merge."""
    normal = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(normal)] if backend.pre_tokenizer else [normal]


def _convert_instead() -> str:
    return f"Merge into a directory instead (without --format gguf), and convert that with {CONVERTER}."
