"""GGUF files as ordinary Hugging Face directories, converted once and cached.

llama.cpp's converter renames the tensors and, for llama, reorders the rows of q and k; both are undone here, tensor by
tensor, so that one tensor at most is in memory. Config and tokenizer are built from the metadata. What is written is
float32, which loses nothing of a quantised file and takes four bytes a parameter on disk. This module imports
transformers and gguf: import it where needed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.tokenization_utils_base import generate_merges

from lora.errors import LoRAError
from lora.gguf_file import GGUFFile, decode, read_gguf
from lora.meter import meter

transformers: Any = import_module("transformers")  # Any: it is annotated in parts only

CONVERTER_VERSION = 1  # part of the cache's key: raise it when the converted files change
MANIFEST = "manifest.json"  # the sizes of a converted directory's files, written last
STALE_SECONDS = 24 * 3600  # unfinished conversions older than this were killed, and are removed
FINGERPRINT_BYTES = 1 << 20  # read at each end of the file for the cache's key
CONTROL, USER_DEFINED = 3, 4  # ggml's token types that are matched whole in a text


class Architecture(NamedTuple):
    """How one llama.cpp architecture maps to transformers."""

    model_type: str
    model_class: str
    permuted: bool  # whether llama.cpp's converter reorders the rows of q and k (its rotary pairs are neighbours)


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True),  # and Mistral, SmolLM: the same equations
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", permuted=False),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", permuted=False),
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


# ---- converting ------------------------------------------------------------------------------------------------


def convert(path: Path, directory: Path) -> None:
    """Writes the GGUF file at `path` as a Hugging Face directory: float32, which loses nothing of a quantised file."""
    file = read_gguf(path)
    check_architecture(file)
    tokenizer, config, generation_config = build_tokenizer(file), build_config(file), build_generation_config(file)
    names = tensor_names(file)
    check_tensors(file, config, names)
    for part in (tokenizer, config, generation_config):
        part.save_pretrained(directory)
    with open(directory / "model.safetensors", "wb") as output:
        shapes = {names[name]: file.tensors[name].shape for name in names}
        with meter("converting the GGUF file", sum(4 * math.prod(shape) for shape in shapes.values())) as done:
            write_safetensors(output, shapes, (decode_as_transformers(file, name) for name in names), done)


def check_architecture(file: GGUFFile) -> None:
    """Raises LoRAError unless it is a model whose architecture, and what that makes use of, is converted faithfully."""
    if file.get("general.type", "model") == "adapter":
        raise LoRAError(
            f"{file.path} is an adapter for llama.cpp, not a model: name its base model. lora.load_adapter and "
            "--adapter read the directory that it was exported from."
        )
    if file.architecture not in ARCHITECTURES:
        raise LoRAError(
            f"{file.path} has architecture {file.architecture!r}; GGUF loading supports {', '.join(ARCHITECTURES)}. "
            "Load the model's original Hugging Face directory instead."
        )
    for name, meaning in {"expert_count": "mixture of experts", "attention.sliding_window": "sliding window"}.items():
        if value := file.number(name, 0):
            raise LoRAError(
                f"{file.path}: {file.architecture}.{name} is {value}, and GGUF loading does not support "
                f"{meaning} models. Load the model's original Hugging Face directory instead."
            )


def tensor_names(file: GGUFFile) -> dict[str, str]:
    """transformers' name for each tensor, in the file's order. RoPE's frequencies belong to the config."""
    names = {}
    for name in file.tensors:
        stem, _, suffix = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if layer is not None and layer[2] in LAYER_NAMES:
            names[name] = f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{suffix}"
        elif stem in TOP_NAMES:
            names[name] = f"{TOP_NAMES[stem]}.{suffix}"
        elif name != "rope_freqs.weight":
            raise LoRAError(
                f"{file.path}: tensor {name!r} is not part of a plain {file.architecture} model, so the file cannot "
                "be loaded faithfully. Load the model's original Hugging Face directory instead."
            )
    return names


def check_tensors(file: GGUFFile, config: Any, names: dict[str, str]) -> None:
    """The file's tensors must be exactly the model's, by name and shape."""
    with torch.device("meta"):
        expected = {
            k: tuple(v.shape) for k, v in transformers.AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    found = {names[name]: tensor.shape for name, tensor in file.tensors.items() if name in names}
    wrong = [
        f"{name} is {found.get(name, 'absent')} and should be {expected.get(name, 'absent')}"
        for name in sorted(expected.keys() | found.keys())
        if found.get(name) != expected.get(name)
    ]
    if wrong:
        raise LoRAError(
            f"{file.path}: {len(wrong)} of the tensors do not fit the metadata ({'; '.join(wrong[:3])}). "
            "The file is damaged, or its architecture is not quite the one it names."
        )


def write_safetensors(
    output: BinaryIO,
    shapes: dict[str, tuple[int, ...]],
    tensors: Iterator[torch.Tensor],
    written: Callable[[int], None] = lambda size: None,
) -> None:
    """A safetensors file of float32 tensors, written one tensor at a time (the library's writer wants them all).

    The format: the header's length as uint64, the header in JSON (padded to 8 bytes), the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    output.write(struct.pack("<Q", len(encoded)) + encoded)
    for tensor in tensors:
        output.write(tensor.contiguous().numpy().data)
        written(tensor.nbytes)


def decode_as_transformers(file: GGUFFile, name: str) -> torch.Tensor:
    """One tensor in float32, its rows in transformers' order."""
    tensor, heads = decode(file, name), permuted_heads(file, name)
    return tensor if heads is None else unpermute(tensor, heads)


def permuted_heads(file: GGUFFile, name: str) -> int | None:
    """The number of heads whose rows llama.cpp's converter reordered in this tensor, or None."""
    found = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)
    if found is None or not ARCHITECTURES[file.architecture].permuted:
        return None
    heads = file.whole("attention.head_count")
    return heads if found[1] == "q" else file.whole("attention.head_count_kv", heads)


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from llama.cpp's order (0, d/2, 1, d/2 + 1, …) back to (0, 1, …, d - 1).

    Both rotate the same pairs (i, i + d/2); llama.cpp stores a pair as neighbours, transformers as two halves.
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])  # [heads, d/2, 2, ...]
    return pairs.swapaxes(1, 2).reshape(weight.shape)


# ---- config and tokenizer --------------------------------------------------------------------------------------


def build_config(file: GGUFFile) -> Any:
    """The transformers config that the metadata describes."""
    architecture = ARCHITECTURES[file.architecture]
    hidden, heads = file.whole("embedding_length"), max(1, file.whole("attention.head_count"))
    head_dim = file.whole("attention.key_length", hidden // heads)
    if (rotated := file.whole("rope.dimension_count", head_dim)) != head_dim:
        raise LoRAError(f"{file.path} rotates {rotated} of {head_dim} head dimensions, which is not supported.")
    if "token_embd.weight" not in file.tensors:
        raise LoRAError(f"{file.path} has no tensor 'token_embd.weight', so it holds no whole model.")
    fields: dict[str, Any] = {
        "architectures": [architecture.model_class],
        "dtype": "float32",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": file.whole("feed_forward_length"),
        "num_hidden_layers": file.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.whole("context_length"),
        "rms_norm_eps": _shortest(file.number("attention.layer_norm_rms_epsilon")),
        "rope_parameters": rope_parameters(file, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **special_ids(file),
    }
    return transformers.AutoConfig.for_model(architecture.model_type, **fields)


def rope_parameters(file: GGUFFile, head_dim: int) -> dict[str, Any]:
    """RoPE's base and scaling. Llama 3's scaling is no metadata in GGUF but a tensor of divisors, one a frequency."""
    theta = _shortest(file.number("rope.freq_base", 10000.0))
    factor = _shortest(file.number("rope.scaling.factor", old := file.number("rope.scale_linear", 1.0)))
    kind = file.get(f"{file.architecture}.rope.scaling.type", "none" if old == 1 else "linear")  # old: before 2023-10
    if "rope_freqs.weight" in file.tensors:
        return llama3_rope(file, theta, head_dim)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise LoRAError(f"{file.path} has RoPE scaling {kind!r}; none, linear and yarn are supported.")
    parameters = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = file.whole("rope.scaling.original_context_length")
    return parameters


def llama3_rope(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's published scaling with the factor the tensor shows; anything else in the tensor is refused."""
    divisors = decode(file, "rope_freqs.weight").double()  # [head_dim / 2]
    factor, low, high, original = round(float(divisors.max()), 3), 1.0, 4.0, 8192
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)  # 0: slowest, divided; 1: fastest, kept
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise LoRAError(
            f"{file.path}: rope_freqs.weight is not Llama 3's scaling with factor {factor:g}, low 1, high 4, original "
            "context 8192, so it cannot be expressed in a config. Load the model's original directory instead."
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _shortest(value: float) -> float:
    """A float32 as the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06."""
    return float(str(numpy.float32(value)))


SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' name: ggml's

# How a text is cut before byte-pair merging, by `tokenizer.ggml.pre`. The pattern is that of tiktoken's cl100k, with
# runs of up to three digits (Llama 3) or single digits (Qwen 2).
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": "gpt-2",
    "smollm": "smollm",
    "llama-bpe": "llama-bpe",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}


def build_tokenizer(file: GGUFFile) -> Any:
    """The tokenizer that the metadata describes: byte-level BPE, or SentencePiece's BPE."""
    kind = file.get("tokenizer.ggml.model")
    builders: dict[Any, Callable[[GGUFFile, list[str]], Any]] = {"gpt2": _byte_level, "llama": _sentencepiece}
    tokens = file.get("tokenizer.ggml.tokens")
    if kind not in builders or not tokens:
        raise LoRAError(
            f"{file.path} has a tokenizer of type {kind!r} with {len(tokens or ())} tokens; "
            f"{' and '.join(map(repr, builders))} are supported."
        )
    backend = builders[kind](file, tokens)
    _add_special(file, tokens, backend)
    return _wrap(file, tokens, backend)


def _byte_level(file: GGUFFile, tokens: list[str]) -> Any:
    """GPT-2's byte-level BPE, with the cutting that `tokenizer.ggml.pre` names."""
    stated = file.get("tokenizer.ggml.pre")
    pre = PRE_TOKENIZERS.get(str(stated))
    if pre is None:
        raise LoRAError(
            f"{file.path} names the pre-tokenizer {stated!r}; {', '.join(PRE_TOKENIZERS)} are supported. "
            "With another one the model would see other tokens than it was trained on."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges", ())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    whole, bytes_only = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=r) for r in (True, False))
    if pre == "gpt-2":
        backend.pre_tokenizer = whole
    elif pre == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    else:
        pattern = Regex(WORDS.replace("DIGITS", "{1,3}" if pre == "llama-bpe" else ""))
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), bytes_only])
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> Any:
    """Llama 2's SentencePiece BPE: no merges in the file, but scores, of which the highest merges first."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    scores = dict(zip(tokens, file.get("tokenizer.ggml.scores", ()), strict=False))
    prefix = bool(file.get("tokenizer.ggml.add_space_prefix", True))
    merges = generate_merges(vocabulary, scores)
    return transformers.LlamaTokenizer(vocab=vocabulary, merges=merges, add_prefix_space=prefix).backend_tokenizer


def _add_special(file: GGUFFile, tokens: list[str], backend: Any) -> None:
    """Control tokens (<|im_start|>) and user-defined ones (<think>) are matched whole; the first kind is special."""
    kinds = file.get("tokenizer.ggml.token_type", ())
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])


def _wrap(file: GGUFFile, tokens: list[str], backend: Any) -> Any:
    # Where the file is silent, llama.cpp starts with bos for SentencePiece and for Llama 3.
    pre = PRE_TOKENIZERS.get(str(file.get("tokenizer.ggml.pre")))
    starts = file.get("tokenizer.ggml.model") == "llama" or pre == "llama-bpe"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=bool(file.get("tokenizer.ggml.add_bos_token", starts)),
        add_eos_token=bool(file.get("tokenizer.ggml.add_eos_token", False)),
        chat_template=file.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=file.whole("context_length"),
        **{f"{role}_token": None if (i := special_id(file, role)) is None else tokens[i] for role in SPECIAL},
    )


def build_generation_config(file: GGUFFile) -> Any:
    """Where generation starts, ends and pads."""
    ids: dict[str, Any] = special_ids(file)
    turn_end = special_id(file, "eot")  # some chat models end a turn with another token
    if turn_end not in (None, ids["eos_token_id"]):
        ids["eos_token_id"] = [index for index in (ids["eos_token_id"], turn_end) if index is not None]
    return transformers.GenerationConfig(**ids)


def special_ids(file: GGUFFile) -> dict[str, int | None]:
    """bos_token_id, eos_token_id and pad_token_id."""
    return {f"{role}_token_id": special_id(file, role) for role in ("bos", "eos", "pad")}


def special_id(file: GGUFFile, role: str) -> int | None:
    """The id of the token in this role; None where the file names none, or, as some do, one that is not there."""
    index = file.get(f"tokenizer.ggml.{SPECIAL.get(role, role)}_token_id")
    return index if index in range(len(file.get("tokenizer.ggml.tokens"))) else None


# ---- the cache -------------------------------------------------------------------------------------------------


@contextmanager
def converted(path: Path) -> Iterator[Path]:
    """A Hugging Face directory with the contents of the GGUF file at `path`, from the cache where it is there.

    Without a writable cache the directory is a temporary one, gone after the block, and a warning says so.
    """
    root = cache_root() / "gguf"
    cached = root / fingerprint(path)
    if not is_whole(cached):
        try:
            _fill(path, cached)
        except OSError as error:
            warnings.warn(
                f"the converted model cannot be cached in {root} ({error.strerror or error}), so every load converts "
                "it again; set LORA_CACHE to a writable directory with room",
                stacklevel=5,
            )
            with tempfile.TemporaryDirectory(prefix="lora-gguf-") as directory:
                convert(path, Path(directory))
                yield Path(directory)
            return
    yield cached


def cache_root() -> Path:
    """LORA_CACHE, or lora-twin in the user's cache directory."""
    if chosen := os.environ.get("LORA_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-twin"


def fingerprint(path: Path) -> str:
    """Names the file's contents without reading all of it: size, time of change, both ends."""
    status = path.stat()
    digest = hashlib.sha256(f"{CONVERTER_VERSION} {status.st_size} {status.st_mtime_ns}".encode())
    with open(path, "rb") as file:
        digest.update(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, status.st_size - FINGERPRINT_BYTES))
        digest.update(file.read())
    return digest.hexdigest()[:32]


def is_whole(directory: Path) -> bool:
    """Whether a cached directory has every file its manifest names, at the size it was written with."""
    try:
        sizes = json.loads((directory / MANIFEST).read_text())["sizes"]
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _fill(path: Path, cached: Path) -> None:
    """Converts into a directory of our own beside `cached`, then renames it: others see all of it or nothing."""
    cached.parent.mkdir(parents=True, exist_ok=True)
    for left_over in cached.parent.glob(".unfinished-*"):
        with suppress(OSError):  # another process may be removing it too
            if time.time() - left_over.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left_over, ignore_errors=True)
    unfinished = cached.parent / f".unfinished-{uuid.uuid4().hex}"
    unfinished.mkdir()
    try:
        convert(path, unfinished)
        sizes = {file.name: file.stat().st_size for file in unfinished.iterdir()}
        (unfinished / MANIFEST).write_text(json.dumps({"source": path.name, "sizes": sizes}, indent=2))
        _publish(unfinished, cached)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _publish(unfinished: Path, cached: Path) -> None:
    """Renames our directory to the cached one's name, unless another process has put a whole one there."""
    if cached.exists() and not is_whole(cached):
        torn = cached.with_name(f".unfinished-{uuid.uuid4().hex}")
        with suppress(OSError):
            cached.rename(torn)
        shutil.rmtree(torn, ignore_errors=True)
    try:
        unfinished.rename(cached)
    except OSError:
        if not is_whole(cached):
            raise
