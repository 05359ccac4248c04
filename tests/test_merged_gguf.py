"""A whole model as GGUF with its adapter merged: read back by gguf's own reader, by transformers and by us, and
compared with the merge into a directory. Metadata come from a GGUF file, or are made for a directory's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from tiny import stir, tiny_llama
from tiny_gguf import MODELS, TOKENS, Q, gguf_name, llama, permuted, qwen, write
from tiny_text import save_tiny_model
from torch import Tensor

import lora
from lora import LoRAConfig, LoRAError, gguf_metadata
from lora.cli import main
from lora.directories import merge_directory
from lora.gguf_export import merge_gguf

IDS = torch.tensor([[1, 4, 2, 8, 5, 7, 1, 3]])
TEXTS = ["12 3 123x <|start|>abc<think> 's  a\n\ncé", "  Don't 1234 a\u0301 日本", *gguf_metadata.SAMPLES]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))


def save_adapter(source: Path, directory: Path, **options: Any) -> Path:
    """An adapter of the model at `source` that is not at its start."""
    model = lora.inject(lora.load(source)[0], LoRAConfig(**({"r": 3, "lora_alpha": 5} | options)))
    stir(model)
    return lora.save_adapter(model, directory)


def merged_weights(source: Path, adapter: Path, scratch: Path) -> dict[str, Tensor]:
    """What the merge into a directory gives, in float32, by transformers' names."""
    merge_directory(str(source), str(adapter), scratch, dtype="float32")
    return load_file(scratch / "model.safetensors")


def tensors_of(path: Path) -> dict[str, tuple[Q, Tensor]]:
    return {
        tensor.name: (tensor.tensor_type, torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()))
        for tensor in gguf.GGUFReader(path).tensors
    }


def as_gguf(weights: dict[str, Tensor], config: Any, architecture: str) -> dict[str, Tensor]:
    """By llama.cpp's names, q and k in its order of rows: the tests' own converter."""
    found = {gguf_name(name): weight for name, weight in weights.items()}
    for name, weight in found.items():
        if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
            found[name] = permuted(weight, heads)
    return found


# ---- from a GGUF file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_merged_file_is_the_merged_directory_bit_for_bit(tmp_path: Path, name: str) -> None:
    architecture, build = MODELS[name]
    source = write(tmp_path / "base.gguf", build(), architecture)
    adapter = save_adapter(source, tmp_path / "adapter", rank_pattern={"q_proj": 2}, use_dora=True)
    expected = merged_weights(source, adapter, tmp_path / "merged")
    report = merge_gguf(str(source), str(adapter), tmp_path / "merged.gguf", dtype="float32")
    assert report.startswith(f"merged 14 adapted modules into {tmp_path / 'merged.gguf'} (")
    model, tokenizer = lora.load(tmp_path / "merged.gguf")
    found = {key: tensor for key, tensor in model.state_dict().items() if key in expected}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    written = tensors_of(tmp_path / "merged.gguf")
    by_their_names = as_gguf(expected, model.config, architecture)
    assert written.keys() == by_their_names.keys()
    assert all(torch.equal(written[key][1], tensor) for key, tensor in by_their_names.items())
    before, their_tokenizer = lora.load(source)
    assert model.config.to_dict() == before.config.to_dict() | {"_name_or_path": "merged"}
    assert tokenizer.backend_tokenizer.to_str() == their_tokenizer.backend_tokenizer.to_str()
    assert (model(IDS).logits - before(IDS).logits).abs().max() > 0.01


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0", None])
def test_matrices_are_rounded_once_and_vectors_not_at_all(tmp_path: Path, dtype: str | None) -> None:
    source = write(tmp_path / "base.gguf", llama())
    adapter = save_adapter(source, tmp_path / "adapter")
    expected = as_gguf(merged_weights(source, adapter, tmp_path / "merged"), llama().config, "llama")
    merge_gguf(str(source), str(adapter), tmp_path / "merged.gguf", dtype=dtype)
    kind = {"float16": Q.F16, "bfloat16": Q.BF16, "q8_0": Q.Q8_0, None: Q.BF16}[dtype]
    for name, (found_kind, found) in tensors_of(tmp_path / "merged.gguf").items():
        assert found_kind == (kind if found.dim() == 2 else Q.F32), name
        exact = expected[name]
        if found.dim() == 2 and kind == Q.Q8_0:
            exact = torch.from_numpy(dequantize(quantize(exact.contiguous().numpy(), kind), kind))
        elif found.dim() == 2:
            exact = exact.to(torch.float16 if kind == Q.F16 else torch.bfloat16).float()
        assert torch.equal(found, exact), name
    types = {Q.F16: gguf.LlamaFileType.MOSTLY_F16, Q.BF16: gguf.LlamaFileType.MOSTLY_BF16}
    types |= {Q.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0}
    assert gguf.GGUFReader(tmp_path / "merged.gguf").get_field("general.file_type").contents() == types[kind]


def test_transformers_reads_the_same_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = write(tmp_path / "base.gguf", llama())
    adapter = save_adapter(source, tmp_path / "adapter")
    merge_gguf(str(source), str(adapter), tmp_path / "merged.gguf", dtype="bfloat16")
    expected = merged_weights(source, adapter, tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="merged.gguf", dtype=torch.float32).state_dict()
    ours = lora.load(tmp_path / "merged.gguf")[0].state_dict()
    assert theirs.keys() == ours.keys()
    for key, tensor in expected.items():
        rounded = tensor if tensor.dim() == 1 else tensor.bfloat16().float()
        assert torch.equal(theirs[key], rounded) and torch.equal(ours[key], rounded), key


def test_rows_that_no_block_divides_stay_in_float16(tmp_path: Path) -> None:
    source = write(tmp_path / "base.gguf", tiny_llama(vocab_size=len(TOKENS), intermediate_size=48))
    adapter = save_adapter(source, tmp_path / "adapter")
    report = merge_gguf(str(source), str(adapter), tmp_path / "merged.gguf", dtype="q8_0")
    assert "14 Q8_0, 2 F16, 5 F32 tensors" in report
    kinds = {name: kind for name, (kind, _) in tensors_of(tmp_path / "merged.gguf").items()}
    assert {name for name, kind in kinds.items() if kind == Q.F16} == {f"blk.{i}.ffn_down.weight" for i in range(2)}


def test_metadata_is_carried_over_with_its_types(tmp_path: Path) -> None:
    def change(metadata: dict[str, Any], _: Any) -> None:
        metadata |= {"general.name": "A model", "general.license": "apache-2.0", "general.file_type": 2}
        metadata |= {"general.tags": ["text", "ünïcode"], "tokenizer.chat_template": "{{ messages }}"}
        metadata |= {
            "quantize.imatrix.file": "old.dat",
            "tokenizer.ggml.add_bos_token": True,
            "my.numbers": ([3, 65535], gguf.GGUFValueType.UINT16),
        }

    source = write(tmp_path / "base.gguf", llama(), change=change)
    adapter = save_adapter(source, tmp_path / "adapter", target_modules=["q_proj"])
    merge_gguf(str(source), str(adapter), tmp_path / "merged.gguf", dtype="q8_0")
    before, after = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("base", "merged"))
    changed = {"general.file_type", "general.quantization_version", "quantize.imatrix.file"}
    kept = {key for key in before.fields if not key.startswith("GGUF.")} - changed
    assert len(kept) > 20
    assert {key for key in after.fields if not key.startswith("GGUF.")} == kept | (changed - {"quantize.imatrix.file"})
    for key in kept:
        assert after.get_field(key).types == before.get_field(key).types, key
        assert after.get_field(key).contents() == before.get_field(key).contents(), key


def test_an_untied_head_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    source = write(tmp_path / "base.gguf", llama(tie_word_embeddings=True))
    adapter = save_adapter(source, tmp_path / "adapter", target_modules=["lm_head"])
    report = merge_gguf(str(source), str(adapter), tmp_path / "merged.gguf", dtype="float32")
    assert report.endswith("; the output head is no longer tied to the embedding")
    model, _ = lora.load(tmp_path / "merged.gguf")
    expected = merged_weights(source, adapter, tmp_path / "merged")
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_biases_trained_ones_too(tmp_path: Path) -> None:
    base = llama(attention_bias=True)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter += torch.randn_like(parameter)
    source = write(tmp_path / "base.gguf", base)
    adapter = save_adapter(source, tmp_path / "adapter", bias="all", modules_to_save=["lm_head"])
    merge_gguf(str(source), str(adapter), tmp_path / "merged.gguf", dtype="float32")
    model, expected = lora.load(tmp_path / "merged.gguf")[0], merged_weights(source, adapter, tmp_path / "merged")
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in expected.items())
    before = lora.load(source)[0].state_dict()
    for key in ("model.layers.0.self_attn.q_proj.bias", "lm_head.weight"):
        assert not torch.equal(before[key], expected[key]), key


def test_llama3_s_divisors_are_carried_over(tmp_path: Path) -> None:
    divisors = gguf_metadata._llama3_divisors(LLAMA3, 8)

    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        metadata["llama.rope.freq_base"], tensors["rope_freqs.weight"] = LLAMA3["rope_theta"], divisors

    source = write(tmp_path / "base.gguf", llama(), change=change)
    adapter = save_adapter(source, tmp_path / "adapter", target_modules=["q_proj"])
    merge_gguf(str(source), str(adapter), tmp_path / "merged.gguf", dtype="float16")
    kind, found = tensors_of(tmp_path / "merged.gguf")["rope_freqs.weight"]
    assert kind == Q.F32 and torch.equal(found, divisors)


# ---- from a directory ------------------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": LLAMA3,
}


def directory(path: Path, model: Any, pre: str = "gpt-2", **changes: Any) -> Path:
    """`model` and a byte-level tokenizer with this way of cutting text, as transformers saves them."""
    source = path.with_name(f"{path.name}-for-its-tokenizer.gguf")
    write(source, llama(), change=lambda metadata, _: metadata.update({"tokenizer.ggml.pre": pre, **changes}))
    _, tokenizer = lora.load(source)
    model.config.bos_token_id, model.config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def mistral(**options: Any) -> Any:
    import transformers

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MistralConfig(**sizes, num_key_value_heads=2, vocab_size=len(TOKENS), **options)
    return transformers.MistralForCausalLM(config).eval()


FROM_DIRECTORIES = {
    **{f"llama, {name} rope": lambda rope=rope: llama(rope_parameters=rope) for name, rope in ROPES.items()},
    "llama tied": lambda: llama(tie_word_embeddings=True, head_dim=16),
    "llama biased": lambda: llama(attention_bias=True, mlp_bias=True),
    "mistral": lambda: mistral(sliding_window=None),
    "qwen2": lambda: qwen("Qwen2"),
    "qwen3": lambda: qwen("Qwen3", head_dim=16, tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", FROM_DIRECTORIES)
def test_a_model_from_a_directory_comes_back(tmp_path: Path, name: str) -> None:
    source = directory(tmp_path / "base", FROM_DIRECTORIES[name]())
    adapter = save_adapter(source, tmp_path / "adapter")
    merge_gguf(str(source), str(adapter), tmp_path / "merged.gguf", dtype="float32")
    expected = merged_weights(source, adapter, tmp_path / "merged")
    merged, _ = lora.load(tmp_path / "merged")
    model, _ = lora.load(tmp_path / "merged.gguf")
    found = model.state_dict()
    assert {key for key in found if key in expected} == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert torch.equal(model(IDS).logits, merged(IDS).logits)  # the same config, rotary embedding included
    assert model.config.max_position_embeddings == merged.config.max_position_embeddings


@pytest.mark.parametrize("pre", gguf_metadata.CUTTINGS)
def test_a_tokenizer_from_a_directory_comes_back(tmp_path: Path, pre: str) -> None:
    changes = {"tokenizer.chat_template": "{{ messages }}", "tokenizer.ggml.add_bos_token": True}
    source = directory(tmp_path / "base", llama(), pre, **changes)
    adapter = save_adapter(source, tmp_path / "adapter", target_modules=["q_proj"])
    merge_gguf(str(source), str(adapter), tmp_path / "merged.gguf")
    written = gguf.GGUFReader(tmp_path / "merged.gguf")
    assert written.get_field("tokenizer.ggml.pre").contents() == pre
    _, before = lora.load(source)
    _, after = lora.load(tmp_path / "merged.gguf")
    assert after.get_vocab() == before.get_vocab()
    assert after.chat_template == before.chat_template == "{{ messages }}"
    for text in TEXTS:
        assert after(text)["input_ids"] == before(text)["input_ids"], text
    for role in ("bos", "eos", "pad"):
        assert getattr(after, f"{role}_token_id") == getattr(before, f"{role}_token_id")
    assert after("a")["input_ids"][0] == after.bos_token_id
    assert after.decode(after("<think>a<|mid|>")["input_ids"], skip_special_tokens=True) == before.decode(
        before("<think>a<|mid|>")["input_ids"], skip_special_tokens=True
    )


def test_rows_without_a_token_get_a_name(tmp_path: Path) -> None:
    source = directory(tmp_path / "base", tiny_llama(vocab_size=len(TOKENS) + 3, intermediate_size=64))
    adapter = save_adapter(source, tmp_path / "adapter", target_modules=["q_proj"])
    merge_gguf(str(source), str(adapter), tmp_path / "merged.gguf")
    written = gguf.GGUFReader(tmp_path / "merged.gguf")
    tokens, kinds = (written.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "token_type"))
    assert tokens == [*TOKENS, *(f"[PAD{len(TOKENS) + i}]" for i in range(3))]
    assert kinds == [1] * (len(TOKENS) - 4) + [3, 3, 3, 4] + [5] * 3


def other_cutting(path: Path) -> Path:
    """A byte-level tokenizer that cuts at every x."""
    source = directory(path, llama())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"String": "x"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    return source


def other_merging(path: Path) -> Path:
    """Llama 3's way of cutting without its rule that a piece in the vocabulary is taken whole."""
    source = directory(path, llama(), "llama-bpe")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    assert tokenizer["model"]["ignore_merges"] is True
    tokenizer["model"]["ignore_merges"] = False
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    return source


def no_merges(path: Path) -> Path:
    source = directory(path, llama())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    return source


def gpt2(path: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    return directory(path, GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=len(TOKENS))))


REFUSED = {
    "words": (lambda path: save_tiny_model(path), "its tokenizer is no byte-level BPE"),
    "no merges": (no_merges, "its tokenizer joins no bytes, and GGUF has no empty list"),
    "another cutting": (other_cutting, "cuts text in none of the ways known here"),
    "another merging": (other_merging, "cuts text in none of the ways known here"),
    "activation": (lambda path: directory(path, llama(hidden_act="gelu")), "its config has hidden_act that cannot"),
    "window": (lambda path: directory(path, mistral(sliding_window=4)), "its config has sliding_window that cannot"),
    "dynamic rope": (
        lambda path: directory(path, llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})),
        "its config has rope_parameters that cannot",
    ),
    "llama3 of another length": (
        lambda path: directory(path, llama(rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32})),
        "its config has rope_parameters that cannot",
    ),
    "another model": (gpt2, "GPT2LMHeadModel cannot be written as GGUF here; LlamaForCausalLM, "),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_faithfully_is_refused(tmp_path: Path, capsys: Any, case: str) -> None:
    build, said = REFUSED[case]
    source = build(tmp_path / "base")
    targets = ["c_attn"] if case == "another model" else ["q_proj"]
    adapter = save_adapter(source, tmp_path / "adapter", target_modules=targets)
    words = ["merge", "--model", source, "--adapter", adapter, "--format", "gguf", "--output", tmp_path / "out.gguf"]
    capsys.readouterr()  # transformers' bars
    assert main([str(word) for word in words]) == 2
    seen = capsys.readouterr().err
    assert said in seen and "convert_hf_to_gguf.py" in seen and seen.count("\n") == 1
    assert not list(tmp_path.rglob("*out.gguf"))


# ---- the command, and what goes wrong --------------------------------------------------------------------------


def test_the_command_writes_a_file_of_the_type_asked_for(tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path / "base.gguf", llama())
    adapter = save_adapter(source, tmp_path / "adapter")
    words = ["merge", "--model", source, "--adapter", adapter, "--dtype", "q8_0", "--output", tmp_path / "out.gguf"]
    assert main([str(word) for word in words]) == 2
    assert "--dtype q8_0 needs --format gguf" in capsys.readouterr().err
    assert main([str(word) for word in [*words, "--format", "gguf"]]) == 0
    assert "merged 14 adapted modules" in capsys.readouterr().out
    assert {kind for kind, _ in tensors_of(tmp_path / "out.gguf").values()} == {Q.Q8_0, Q.F32}
    assert main([str(word) for word in [*words, "--format", "gguf"]]) == 2
    assert "is there already: --overwrite" in capsys.readouterr().err
    words[-1] = source
    assert main([str(word) for word in [*words, "--format", "gguf", "--overwrite"]]) == 2
    assert "is what is read" in capsys.readouterr().err


def test_an_overflow_and_an_interruption_leave_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "base.gguf", llama())
    adapter = save_adapter(source, tmp_path / "adapter")
    model = lora.load_adapter(lora.load(source)[0], adapter)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora_A["default"][0, 0] = 1e6
    lora.save_adapter(model, tmp_path / "large")
    output = tmp_path / "out" / "merged.gguf"
    merge_gguf(str(source), str(adapter), output)
    before = output.read_bytes()
    with pytest.raises(LoRAError, match=r"blk\.1\.ffn_down\.weight has values that are not finite in F16: choose"):
        merge_gguf(str(source), str(tmp_path / "large"), output, dtype="float16", overwrite=True)

    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(KeyboardInterrupt):
        merge_gguf(str(source), str(adapter), output, overwrite=True)
    assert output.read_bytes() == before
    assert [path.name for path in output.parent.iterdir()] == ["merged.gguf"]


def test_one_weight_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    from lora import gguf_export

    source = write(tmp_path / "base.gguf", llama())
    adapter = save_adapter(source, tmp_path / "adapter")
    alive: list[Any] = []
    most: list[int] = []
    encoded = gguf_export._encoded

    def watched(name: str, tensor: Tensor, kind: Q) -> numpy.ndarray:
        most.append(sum(reference() is not None for reference in alive))
        raw = encoded(name, tensor, kind)
        alive.append(weakref.ref(raw))
        return raw

    monkeypatch.setattr(gguf_export, "_encoded", watched)
    merge_gguf(str(source), str(adapter), tmp_path / "merged.gguf", dtype="float16")
    assert len(most) == 21 and max(most) == 0
