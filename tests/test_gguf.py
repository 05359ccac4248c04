"""GGUF: the packaged model against a plain decoding of its file, small files against transformers' own loader, RoPE's
scalings, and tokenizers. The cache and damaged files are in test_gguf_cache.py."""

from __future__ import annotations

import unicodedata
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from gguf.quants import dequantize
from tiny import tiny_llama
from tiny_gguf import MERGES, MODELS, SPECIAL, TOKENS, Change, Q, llama, permuted, write, write_raw

import lora
from lora import gguf_file, gguf_loader, models

IDS = torch.tensor([[1, 4, 2, 8, 5, 7, 1, 3]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


# ---- the packaged model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setenv("LORA_CACHE", str(tmp_path_factory.mktemp("packaged")))
        return lora.load("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def reader() -> gguf.GGUFReader:
    return gguf.GGUFReader(models.packaged_model_path())


def test_the_packaged_model_is_its_file_decoded(packaged, reader):
    """By gguf's own reader, with the rows of q and k put in order by an index instead of a reshape."""
    model, _ = packaged
    state = model.state_dict()
    checked = {"lm_head.weight"}
    order = torch.arange(64).view(2, 32).T.flatten()  # llama.cpp's row 2i is our i, its row 2i + 1 our i + 32
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            by_head = weight.view(-1, 64, 576)  # [heads, head_dim, hidden]
            weight = torch.empty_like(by_head).index_copy_(1, order, by_head).flatten(0, 1)
        name = gguf_loader.tensor_names(named(tensor.name))[tensor.name]
        assert torch.equal(state[name], weight), name
        checked.add(name)
    assert checked == state.keys()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def named(*names: str) -> gguf_file.GGUFFile:
    """A file with these tensors, of which only the names matter."""
    return gguf_file.GGUFFile(Path("x"), {"general.architecture": "llama"}, dict.fromkeys(names), None)


def test_the_packaged_model_speaks_english(packaged):
    model, tokenizer = packaged
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(generated) == "The capital of France is Paris.<|im_end|>"


def test_the_packaged_models_settings(packaged):
    model, tokenizer = packaged
    config = model.config
    assert config._name_or_path == model.name_or_path == tokenizer.name_or_path == "SmolLM2-135M-Instruct"
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 100000.0)
    assert config.tie_word_embeddings and config.vocab_size == 49152 and config.max_position_embeddings == 8192
    assert model.dtype == torch.float32 and not model.training
    for owner in (config, model.generation_config, tokenizer):
        assert (owner.bos_token_id, owner.eos_token_id, owner.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 8192 and len(tokenizer) == 49152


TEXTS = [
    "Hello world, it's a test! Don't panic.",
    "naïve café, 日本語, 😀, tab\there\r\n\n\nnew  lines   ",
    "def f(x_1, y2):\n    return x_1+y2*3.14159",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "In 2024 there were 365 days.",
]


def test_the_packaged_tokenizer_is_transformers_where_that_is_right(packaged):
    """transformers' converter does not know the pre-tokenizer "smollm": it takes a space before a digit to the digit.

    The model was trained with digits cut off first, one by one, so that two spaces before one are one token.
    """
    from transformers import AutoTokenizer

    _, tokenizer = packaged
    path = models.packaged_model_path()
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat.append({"role": "assistant", "content": "Hello!"})
    assert tokenizer.chat_template == theirs.chat_template
    assert tokenizer.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"], text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.get_vocab() == theirs.get_vocab()
    assert tokenizer.tokenize("x = 1  23") == ["x", "Ġ=", "Ġ", "1", "ĠĠ", "2", "3"]
    assert theirs.tokenize("x = 1  23") == ["x", "Ġ=", "Ġ", "1", "Ġ", "Ġ", "2", "3"]


# ---- files written here, as llama.cpp's converter writes them --------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_written_model_comes_back_bit_for_bit(tmp_path, name):
    architecture, build = MODELS[name]
    original = build()
    model, tokenizer = lora.load(write(tmp_path / "tiny.Q8_0.gguf", original, architecture))
    assert type(model) is type(original)
    found, expected = model.state_dict(), original.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    assert torch.equal(model(IDS).logits, original(IDS).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == original.config.tie_word_embeddings
    assert model.config._name_or_path == tokenizer.name_or_path == "tiny"


@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2", "qwen3"])
def test_transformers_own_loader_agrees(tmp_path, name):
    from transformers import AutoModelForCausalLM

    architecture, build = MODELS[name]

    def named(metadata: dict[str, Any], _: dict[str, Any]) -> None:
        metadata["general.name"] = "tiny"
        metadata[f"{architecture}.rope.dimension_count"] = metadata[f"{architecture}.attention.key_length"]

    path = write(tmp_path / "m.gguf", build(), architecture, Q.Q8_0, named)
    model, _ = lora.load(path)
    head_dim = {"head_dim": 16} if name == "qwen3" else {}  # which their loader does not read for qwen3
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32, **head_dim)
    assert torch.equal(model(IDS).logits, theirs(IDS).logits)


def test_biases_are_loaded_and_those_of_q_and_k_put_in_order(tmp_path):
    original = llama(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for key, parameter in original.named_parameters():
            if key.endswith("bias"):
                parameter.normal_()
    model, _ = lora.load(write(tmp_path / "m.gguf", original))
    assert torch.equal(model(IDS).logits, original(IDS).logits)


KINDS = [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_simple_type_is_decoded_to_float32(tmp_path, kind):
    original = llama()
    model, _ = lora.load(write(tmp_path / "m.gguf", original, kind=kind))
    for name, parameter in model.named_parameters():
        weight = original.get_parameter(name)
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2], 0)
        rows = permuted(weight, heads) if heads else weight  # quantised in llama.cpp's order
        if weight.dim() == 2:
            rows = torch.from_numpy(dequantize(gguf.quants.quantize(rows.detach().numpy(), kind), kind).copy())
        if heads:
            rows = gguf_loader.unpermute(rows, heads)
        assert parameter.dtype == torch.float32 and torch.equal(parameter, rows), name


@pytest.mark.parametrize(
    "kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ4_NL, Q.IQ4_XS], ids=lambda kind: kind.name
)
def test_block_types_are_placed_and_decoded_as_by_the_gguf_package(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = numpy.random.default_rng(0).integers(0, 60, (3, 2 * size), dtype=numpy.uint8)  # small: no NaN scales
    tensors = {"a": (raw, kind), "b": torch.ones(5), "c": (raw[::-1].copy(), kind)}
    write_raw(tmp_path / "m.gguf", "llama", {}, tensors, Q.F32)
    file = gguf_file.read_gguf(tmp_path / "m.gguf")
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert list(file.tensors) == ["a", "b", "c"]
    for name in ("a", "c"):
        expected = torch.from_numpy(dequantize(reader[name].data, kind).copy())
        assert file.tensors[name].shape == (3, 2 * block)
        assert expected.isfinite().all() and torch.equal(gguf_file.decode(file, name), expected)


def test_metadata_is_read_as_by_the_gguf_package(reader):
    ours = gguf_file.read_gguf(models.packaged_model_path()).metadata
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert ours.keys() == fields.keys()
    for name, field in fields.items():
        assert ours[name] == field.contents(), name


def test_nf4_and_dtype_apply_to_a_gguf_file(tmp_path):
    path = write(tmp_path / "m.gguf", llama(), kind=Q.F16)
    model, _ = lora.load(path, quantization="nf4", dtype="bfloat16")
    expected = lora.quantize(lora.load(path, dtype="bfloat16")[0])
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


# ---- RoPE ------------------------------------------------------------------------------------------------------


def frequencies(model: Any) -> torch.Tensor:
    return model.model.rotary_emb.inv_freq.double()


def base_frequencies(head_dim: int = 8, theta: float = 10000.0) -> torch.Tensor:
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def divisors_of_llama3(factor: float, theta: float = 10000.0, head_dim: int = 8) -> list[float]:
    """As llama.cpp's converter computes the tensor, frequency by frequency."""
    low, high, old = 1.0, 4.0, 8192
    found = []
    for frequency in base_frequencies(head_dim, theta).tolist():
        wavelength = 2 * torch.pi / frequency
        smooth = (old / wavelength - low) / (high - low)
        if wavelength < old / high:
            found.append(1.0)
        elif wavelength > old / low:
            found.append(factor)
        else:
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found


FLOAT32 = {"rtol": 1e-6, "atol": 0.0}  # inv_freq is computed in float32: a few roundings of 6e-8


def scaled(**values: Any) -> Change:
    return lambda metadata, _: metadata.update(
        {f"llama.rope.{name.replace('__', '.')}": v for name, v in values.items()}
    )


def test_rope_base_and_linear_scaling(tmp_path):
    path = write(tmp_path / "a.gguf", llama(), change=scaled(freq_base=5e5))
    torch.testing.assert_close(frequencies(lora.load(path)[0]), base_frequencies(theta=5e5), **FLOAT32)
    path = write(tmp_path / "b.gguf", llama(), change=scaled(scaling__type="linear", scaling__factor=4.0))
    torch.testing.assert_close(frequencies(lora.load(path)[0]), base_frequencies() / 4, **FLOAT32)
    path = write(tmp_path / "c.gguf", llama(), change=scaled(scale_linear=2.0))  # as files of 2023 say it
    torch.testing.assert_close(frequencies(lora.load(path)[0]), base_frequencies() / 2, **FLOAT32)


def test_rope_yarn(tmp_path):
    change = scaled(scaling__type="yarn", scaling__factor=4.0, scaling__original_context_length=32)
    config = lora.load(write(tmp_path / "m.gguf", llama(), change=change))[0].config
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    assert config.rope_parameters.items() >= expected.items() and config.max_position_embeddings == 128


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_in_its_tensor(tmp_path, factor):
    divisors = divisors_of_llama3(factor, theta=5e5)
    assert len({round(d, 4) for d in divisors}) > 2  # one kept, one divided, one between

    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        metadata["llama.rope.freq_base"] = 5e5
        tensors["rope_freqs.weight"] = torch.tensor(divisors)

    model, _ = lora.load(write(tmp_path / "m.gguf", llama(), change=change))
    assert model.config.rope_parameters["factor"] == factor
    expected = base_frequencies(theta=5e5) / torch.tensor(divisors, dtype=torch.float64)
    torch.testing.assert_close(frequencies(model), expected, **FLOAT32)


# ---- tokenizers ------------------------------------------------------------------------------------------------

HARD = ["12345 1 12  123\n\nabc's  a\r\n x1", "<|start|>abc<|end|><think>", "  \n \n\n  ab", "é é 1½²", "\t\tab\n\nc\n"]


def tokenizer_of(tmp_path: Path, **changes: Any) -> Any:
    def change(metadata: dict[str, Any], _: dict[str, Any]) -> None:
        metadata.update({f"tokenizer.ggml.{name}": value for name, value in changes.items()})
        metadata["general.name"] = "tiny"

    return lora.load(write(tmp_path / "m.gguf", llama(), change=change))[1]


@pytest.mark.parametrize(("pre", "family"), [("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")])
def test_byte_level_splits_are_those_of_the_family(tmp_path, pre, family):
    import transformers

    ours = tokenizer_of(tmp_path, pre=pre)
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    theirs = getattr(transformers, family)(vocab={token: i for i, token in enumerate(TOKENS)}, merges=merges)
    theirs.add_tokens(SPECIAL)
    for text in HARD:
        assert ours.tokenize(text) == theirs.tokenize(text), text
        assert ours.decode(ours(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_each_split_is_another_one(tmp_path):
    text = "1234  1"
    found = {
        pre: tokenizer_of(tmp_path, pre=pre, add_bos_token=False).tokenize(text)
        for pre in ("gpt-2", "llama-bpe", "qwen2", "smollm")
    }
    assert found == {
        "gpt-2": ["1234", "Ġ", "Ġ1"],
        "llama-bpe": ["123", "4", "Ġ", "Ġ", "1"],  # digits in threes from the left, and no space before them
        "qwen2": ["1", "2", "3", "4", "Ġ", "Ġ", "1"],
        "smollm": ["1", "2", "3", "4", "ĠĠ", "1"],
    }


def test_llama3_takes_a_whole_piece_before_any_merge(tmp_path):
    assert tokenizer_of(tmp_path, pre="llama-bpe").tokenize("xyz") == ["xyz"]
    assert tokenizer_of(tmp_path, pre="gpt-2").tokenize("xyz") == ["x", "y", "z"]


def test_qwen_composes_characters(tmp_path):
    tokenizer = tokenizer_of(tmp_path, pre="qwen2")
    assert tokenizer.tokenize("e\u0301") == tokenizer.tokenize("\u00e9") == ["Ã©"]
    assert tokenizer_of(tmp_path, pre="gpt-2").tokenize("e\u0301") == ["e", "Ì", "ģ"]


def test_special_and_user_defined_tokens_stay_whole(tmp_path):
    tokenizer = tokenizer_of(tmp_path)
    assert tokenizer.tokenize("ab<|mid|><think>c") == ["ab", "<|mid|>", "<think>", "c"]
    ids = tokenizer("<|start|><think>a<|mid|><|end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a"
    assert len(tokenizer) == len(TOKENS)


@pytest.mark.parametrize(
    ("changes", "starts", "ends"),
    [
        ({"add_bos_token": True}, True, False),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
        ({"add_bos_token": False}, False, False),
        ({}, False, False),
        ({"pre": "llama-bpe"}, True, False),  # llama.cpp's default for Llama 3
        ({"pre": "llama-bpe", "add_bos_token": False}, False, False),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(tmp_path, changes, starts, ends):
    tokenizer = tokenizer_of(tmp_path, **changes)
    ids = tokenizer("ab")["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id, ids[-1] == tokenizer.eos_token_id) == (starts, ends)
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == ids[starts : len(ids) - ends]


def test_sentencepiece_merges_by_score(tmp_path):
    """Each word's best-scored pair of neighbours is merged first; what is no piece falls back to its bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        "a",
        "b",
        "c",
        "▁a",
        "ab",
        "▁ab",
        "abc",
        "1",
    ]
    scores = [0.0] * 259 + [-9.0, -10.0, -11.0, -12.0, -1.0, -2.0, -3.0, -4.0, -13.0]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 9

    def change(metadata: dict[str, Any], _: dict[str, Any]) -> None:
        for key in [key for key in metadata if key.startswith("tokenizer")]:
            del metadata[key]
        values = {"model": "llama", "tokens": pieces, "scores": scores, "token_type": kinds, "bos_token_id": 1}
        values |= {"eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True, "add_eos_token": False}
        metadata.update({f"tokenizer.ggml.{name}": value for name, value in values.items()})
        metadata["general.name"] = "tiny"

    _, ours = lora.load(write(tmp_path / "m.gguf", tiny_llama(vocab_size=len(pieces)), change=change))
    expected = {
        "abc ab a": ["▁ab", "c", "▁ab", "▁a"],
        "cab": ["▁", "c", "ab"],
        "a  b": ["▁a", "▁", "▁", "b"],
        "é1": ["▁", "<0xC3>", "<0xA9>", "1"],
        "ab</s>c": ["▁ab", "</s>", "c"],
    }
    for text, tokens in expected.items():
        assert ours.tokenize(text) == tokens
        assert ours(text)["input_ids"] == [1, *ours.convert_tokens_to_ids(tokens)]
        assert ours.decode(ours(text)["input_ids"], skip_special_tokens=True) == text.replace("</s>", "")


def test_the_end_of_a_turn_also_ends_generation(tmp_path):
    change = lambda metadata, _: metadata.update({"tokenizer.ggml.eot_token_id": 7})  # noqa: E731
    model, _ = lora.load(write(tmp_path / "m.gguf", llama(), change=change))
    assert model.generation_config.eos_token_id == [len(TOKENS) - 3, 7]
