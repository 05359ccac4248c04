"""Adapters for vLLM and llama.cpp: each file is read back by rules written down here from those programs' sources, not
by the code that wrote it, applied to the base weights, and compared with the adapted model."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import peft
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from tiny import stir, tiny_llama, toy
from tiny_gguf import MODELS, gguf_name, write
from tiny_text import save_tiny_model, tiny_tokenizer
from torch import Tensor

import lora
import lora.layers
from lora import LoRAConfig, LoRAError
from lora.cli import main
from lora.export import VLLM_RANKS, export_adapter, export_vllm
from lora.gguf_export import export_gguf

IDS = torch.tensor([[1, 4, 2, 8, 5, 7], [63, 1, 3, 0, 10, 33]])
# Two float32 computations of one formula through two layers, sums of at most 128 terms: u · √128 · a dozen operations
# is 1e-5 of the largest logit. Every test also sees the adapter move the logits by more than 1000 times that.
ROUNDING = 1e-5

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all-linear, an odd scale": {"r": 3, "lora_alpha": 7},
    "rslora": {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["o_proj", "k_proj"]},
    "ranks": {"r": 4, "rank_pattern": {"q_proj": 2, "1.mlp.down_proj": 7}},
    "ranks and scales": {"r": 4, "lora_alpha": 6, "rank_pattern": {"k_proj": 1}, "alpha_pattern": {"up_proj": 50}},
    "rslora, ranks": {"r": 4, "use_rslora": True, "rank_pattern": {"up_proj": 6, "0.self_attn.q_proj": 9}},
    "pissa": {"r": 3, "lora_alpha": 5, "init_lora_weights": "pissa", "rank_pattern": {"k_proj": 2}},
    "olora": {"r": 3, "init_lora_weights": "olora", "target_modules": ["q_proj", "down_proj"]},
    "some layers": {"r": 2, "target_modules": r".*\.1\.(self_attn\.k_proj|mlp\.(up|down)_proj)", "lora_dropout": 0.5},
}


def adapted(base: Any, **options: Any) -> Any:
    """A copy of `base` with an adapter that is not at its start."""
    model = lora.inject(copy.deepcopy(base), LoRAConfig(**options))
    stir(model)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS % model.config.vocab_size).logits


def assert_same_logits(one: Any, other: Any, base: Any) -> None:
    found, expected, before = logits(one), logits(other), logits(base)
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= ROUNDING * scale
    assert float((expected - before).abs().max()) >= 1000 * ROUNDING * scale


# ---- vLLM ------------------------------------------------------------------------------------------------------

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ENDS = {"embed_tokens", "lm_head"}  # of the model classes that list them
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
OTHER_KINDS = ("lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of its config/lora.py: what --max-lora-rank may be


def served_by_vllm(folder: Path, base: Any, most: int, modules: set[str] = LINEAR) -> Any:
    """`base` as vLLM would run it with the adapter in `folder`, by the rules of vLLM 0.33's lora/peft_helper.py (the
    fields), lora/utils.py (the names), lora/lora_model.py (the files) and config/lora.py (the ranks), narrowed to what
    releases since 0.6 share: patterns, which 0.33 reads, are ignored by older ones. `benchmarks/vllm_loader.py` runs
    those files themselves on the same directories."""
    assert most in MAX_LORA_RANKS
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys() and isinstance(config["r"], int)
    assert not config.get("modules_to_save") and not config.get("use_dora") and config.get("bias", "none") == "none"
    assert not any(config.get(key) for key in OTHER_KINDS) and config.get("init_lora_weights") in PLAIN_STARTS
    assert not config.get("rank_pattern") and not config.get("alpha_pattern") and 1 <= config["r"] <= most
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = name.split(".")
        assert parts[:2] == ["base_model", "model"]
        if parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
            module, role = ".".join(parts[2:-1]), parts[-1][-1]
        else:
            assert parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"), name
            module, role = ".".join(parts[2:-2]), parts[-2][-1]
        assert module.rpartition(".")[2] in modules, name
        pairs.setdefault(module, {})[role] = tensor
    model = copy.deepcopy(base)
    for module, pair in pairs.items():
        assert pair.keys() == {"A", "B"}, module
        assert pair["A"].shape[0] == pair["B"].shape[1] == config["r"]  # one size of buffer for every module
        delta = scaling * pair["B"] @ pair["A"]
        with torch.no_grad():
            model.get_submodule(module).weight += delta.T if module.endswith("embed_tokens") else delta
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_vllm_and_peft_run_what_we_run(tmp_path: Path, name: str) -> None:
    base = tiny_llama()
    model = adapted(base, **CONFIGS[name])
    assert export_vllm(model, tmp_path / "out") == tmp_path / "out"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert_same_logits(served_by_vllm(tmp_path / "out", base, most=16), model, base)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    assert_same_logits(theirs, model, base)
    assert_same_logits(lora.load_adapter(copy.deepcopy(base), tmp_path / "out"), model, base)


def respelt(**fields: Any) -> Callable[[Path], None]:
    """Changes fields of adapter_config.json; None takes one out."""

    def spoil(folder: Path) -> None:
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text()) | fields
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return spoil


def renamed(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    """Changes the tensors."""

    def spoil(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({name: x.contiguous() for name, x in change(load_file(file)).items()}, file, {"format": "pt"})

    return spoil


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.weights")


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
# What our export never writes, and whether vLLM 0.33 refuses it (None: it takes it, and would run something else or
# fail later, or older releases did).
SPOILED: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "no r": (respelt(r=None), "Missing required configuration fields"),
    "no alpha": (respelt(lora_alpha=None), "Missing required configuration fields"),
    "no targets": (respelt(target_modules=None), "Missing required configuration fields"),
    "rank 0": (respelt(r=0), "must be a positive integer"),
    "rank above the server's": (respelt(r=17), "greater than max_lora_rank"),
    "modules in full": (respelt(modules_to_save=["lm_head"]), "only supports modules_to_save"),
    "dora": (respelt(use_dora=True), "does not yet support DoRA"),
    "biases": (respelt(bias="lora_only"), "bias is not supported"),
    "bias of B": (respelt(lora_bias=True), "does not support LoRA bias"),
    "pissa": (respelt(init_lora_weights="pissa"), "does not support init_lora_weights"),
    "loftq": (respelt(init_lora_weights="loftq"), "does not support init_lora_weights"),
    "activated": (respelt(alora_invocation_tokens=[1]), "does not support Activated LoRA"),
    "replicated": (respelt(layer_replication=[[0, 1]]), "does not support layer_replication"),
    "ranks": (respelt(rank_pattern={"q_proj": 2}), None),
    "scales": (respelt(alpha_pattern={"q_proj": 2}), None),
    "another module": (
        renamed(lambda t: {name.replace("q_proj", "q_projection"): x for name, x in t.items()}),
        "expected target modules",
    ),
    "another role": (
        renamed(lambda t: t | {f"{FIRST}.lora_magnitude_vector": torch.ones(32)}),
        "unsupported LoRA weight",
    ),
    "a bias": (renamed(lambda t: t | {f"{FIRST}.lora_B.bias": torch.ones(32)}), "unsupported LoRA weight"),
    "A alone": (renamed(lambda t: {name: x for name, x in t.items() if name != f"{FIRST}.lora_B.weight"}), None),
    "another rank": (
        renamed(
            lambda t: t | {f"{FIRST}.lora_A.weight": torch.ones(2, 32), f"{FIRST}.lora_B.weight": torch.ones(32, 2)}
        ),
        None,
    ),
    "no prefix": (
        renamed(lambda t: {name.removeprefix("base_model.model."): x for name, x in t.items()}),
        None,
    ),
    "a pickle": (pickled, "doesn't contain tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_the_rules_that_stand_for_vllm_bite(tmp_path: Path, case: str) -> None:
    base = tiny_llama()
    export_vllm(adapted(base, r=4, target_modules=["q_proj", "v_proj"]), tmp_path)
    served_by_vllm(tmp_path, base, most=16)
    SPOILED[case][0](tmp_path)
    with pytest.raises((AssertionError, OSError)):
        served_by_vllm(tmp_path, base, most=16)


@pytest.mark.parametrize(("rank", "largest"), [(1, 1), (2, 8), (8, 8), (9, 16), (17, 32)])
def test_the_launch_line_names_a_rank_that_vllm_takes(tmp_path: Path, rank: int, largest: int) -> None:
    path = save_tiny_model(tmp_path / "model")
    model = lora.inject(lora.load(path)[0], LoRAConfig(r=rank, target_modules=["q_proj"]))
    stir(model)
    lora.save_adapter(model, tmp_path / "adapter")
    said = export_adapter(str(path), str(tmp_path / "adapter"), tmp_path / "out", format="vllm")
    assert f"--max-lora-rank {largest} " in said and largest in MAX_LORA_RANKS
    served_by_vllm(tmp_path / "out", lora.load(path)[0], most=largest)


def test_no_rank_between_is_left_out() -> None:
    assert VLLM_RANKS == MAX_LORA_RANKS


@pytest.mark.parametrize("options", [{"lora_alpha": 7}, {"lora_alpha": 3, "use_rslora": True}], ids=str)
def test_one_rank_and_one_scale_are_written_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    model = adapted(tiny_llama(), r=5, target_modules="all-linear", **options)
    export_vllm(model, tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert len(written) == 28
    for path, layer in lora.layers.adapter_layers(model):
        for role, params in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            assert torch.equal(written[f"base_model.model.{path}.{role}.weight"], params["default"]), path


def test_padding_is_zero_and_the_most_common_scale_stays(tmp_path: Path) -> None:
    model = adapted(tiny_llama(), r=4, lora_alpha=8, rank_pattern={"q_proj": 6})  # scalings 2, and 8/6 for q
    export_vllm(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (6, 12, False)
    assert isinstance(config["lora_alpha"], int)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layer = model.model.layers[1].mlp.up_proj
    A, B = (tensors[f"base_model.model.model.layers.1.mlp.up_proj.lora_{role}.weight"] for role in "AB")
    assert torch.equal(A[:4], layer.lora_A["default"]) and torch.equal(B[:, :4], layer.lora_B["default"])
    assert A[4:].shape == (2, 32) and not A[4:].any() and not B[:, 4:].any()


def test_the_ends_of_an_untied_model_are_exported_with_a_warning(tmp_path: Path) -> None:
    base = tiny_llama()
    model = adapted(base, r=4, target_modules=["embed_tokens", "lm_head", "q_proj"])
    with pytest.warns(UserWarning, match=r"changes model\.embed_tokens, lm_head: vLLM loads that for"):
        export_vllm(model, tmp_path)
    assert_same_logits(served_by_vllm(tmp_path, base, 16, LINEAR | ENDS), model, base)


def test_a_named_adapter_goes_where_it_is_told(tmp_path: Path) -> None:
    base = tiny_llama()
    model = adapted(base, r=2, target_modules=["q_proj"])
    lora.add_adapter(model, LoRAConfig(r=3, target_modules=["v_proj"], init_lora_weights=False), "other")
    export_vllm(model, tmp_path / "it", "other")
    assert json.loads((tmp_path / "it" / "adapter_config.json").read_text())["target_modules"] == ["v_proj"]
    lora.set_adapter(model, "other")
    assert_same_logits(served_by_vllm(tmp_path / "it", base, 16), model, base)


def test_an_adapter_of_nf4_weights_in_half_precision(tmp_path: Path) -> None:
    model = lora.quantize(tiny_llama().bfloat16(), "nf4")
    model = adapted(model, r=2, target_modules=["v_proj"])
    export_vllm(model, tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    key = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    assert torch.equal(written[key], model.model.layers[0].self_attn.v_proj.lora_B["default"])


# ---- what neither server can apply -----------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "dora": ({}, {"use_dora": True}, ["DoRA adapter"]),
    "saved": ({}, {"modules_to_save": ["lm_head"]}, [r"trains lm_head in full \(modules_to_save\)"]),
    "bias": ({"attention_bias": True}, {"bias": "lora_only"}, [r"trains biases \(bias='lora_only'\)"]),
    "loftq": ({"intermediate_size": 64}, {"init_lora_weights": "loftq"}, ["started from LoftQ"]),
    "tied": ({"tie_word_embeddings": True}, {"target_modules": ["embed_tokens"]}, ["one end of a tied embedding"]),
    "tied head": ({"tie_word_embeddings": True}, {"target_modules": ["lm_head"]}, ["adapts lm_head, one end"]),
    "every reason": (
        {"attention_bias": True},
        {"use_dora": True, "bias": "all", "modules_to_save": ["embed_tokens"]},
        ["DoRA adapter", "trains embed_tokens in full", "trains biases"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("server", ["vLLM", "llama.cpp"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_more_than_a_and_b_is_refused(tmp_path: Path, name: str, server: str) -> None:
    overrides, options, words = REFUSED[name]
    model = adapted(tiny_llama(**overrides), r=2, **({"target_modules": ["q_proj"]} | options))
    export, target = (export_vllm, tmp_path / "out") if server == "vLLM" else (export_gguf, tmp_path / "out.gguf")
    with pytest.raises(LoRAError, match=f"cannot be exported for {server}: .*lora merge --model MODEL") as caught:
        export(model, target)
    for word in words:
        with pytest.raises(LoRAError, match=word):
            raise caught.value
    assert not list(tmp_path.iterdir())


def test_experts_are_refused(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=16, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config)
    model = adapted(model, r=2, target_modules=[], target_parameters=["experts.down_proj"])
    with pytest.raises(LoRAError, match=r"no linear layers \(model.layers.0.mlp.experts.down_proj, \.\.\.\)"):
        export_vllm(model, tmp_path / "out")
    with pytest.raises(LoRAError, match=r"MixtralForCausalLM cannot be written as GGUF here.*convert_hf_to_gguf\.py"):
        export_gguf(model, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_ranks_above_vllm_s_and_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    wide = adapted(toy(width=520, layers=1), r=513, target_modules=["q_proj"])
    with pytest.raises(LoRAError, match="rank 513, and vLLM takes at most 512"):
        export_vllm(wide, tmp_path / "out")
    model = adapted(tiny_llama(), r=2, target_modules=["q_proj"])
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.lora_B["default"][3, 1] = torch.nan
    for export, name in ((export_vllm, "out"), (export_gguf, "out.gguf")):
        with pytest.raises(LoRAError, match=r"layers\.1\.self_attn\.q_proj: lora_B has values that are not finite"):
            export(model, tmp_path / name)
        with pytest.raises(LoRAError, match=r"no adapter 'defautl'\. Did you mean 'default'"):
            export(model, tmp_path / name, "defautl")
    assert not list(tmp_path.iterdir())


# ---- llama.cpp -------------------------------------------------------------------------------------------------


def values(tensor: Any) -> Tensor:
    """A tensor of GGUFReader in float32, in torch's order of dimensions."""
    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())


def served_by_llama_cpp(base: Path, adapter: Path) -> dict[str, Tensor]:
    """The weights that llama.cpp multiplies by with this adapter, by the rules of its src/llama-adapter.cpp: every
    check that it makes, and scale = alpha / rank, rank being the first dimension (ne[0]) of lora_b."""
    model, lora_file = gguf.GGUFReader(base), gguf.GGUFReader(adapter)

    def said(reader: Any, key: str) -> Any:
        return reader.get_field(key).contents()

    assert (said(lora_file, "general.type"), said(lora_file, "adapter.type")) == ("adapter", "lora")
    assert said(lora_file, "general.architecture") == said(model, "general.architecture")
    assert lora_file.get_field("adapter.lora.alpha").types == [gguf.GGUFValueType.FLOAT32]
    alpha = said(lora_file, "adapter.lora.alpha")
    weights = {tensor.name: values(tensor) for tensor in model.tensors}
    halves: dict[str, dict[str, Any]] = {}
    for tensor in lora_file.tensors:
        name, _, half = tensor.name.rpartition(".")
        assert half in ("lora_a", "lora_b") and name in weights, tensor.name
        assert tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        halves.setdefault(name, {})[half] = tensor
    for name, pair in halves.items():
        a, b = values(pair["lora_a"]), values(pair["lora_b"])
        w, ne_a, ne_b = weights[name], a.shape[::-1], b.shape[::-1]
        scale = alpha / ne_b[0]
        if name == "token_embd.weight":  # looked up: one row of a for a token
            assert w.shape[::-1][0] == ne_b[1] and w.shape[::-1][1] == ne_a[1] and ne_a[0] == ne_b[0]
            weights[name] = w + scale * a @ b.T
        else:
            assert w.shape[::-1][0] == ne_a[0] and w.shape[::-1][1] == ne_b[1] and ne_a[1] == ne_b[0]
            weights[name] = w + scale * b @ a
    return weights


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """Equal but for the rounding of sums of at most a dozen terms, and different from the base."""
    assert found.keys() == expected.keys() == before.keys()
    changed = 0
    for name, weight in expected.items():
        scale = float(weight.abs().max())
        assert float((found[name] - weight).abs().max()) <= 16 * 2.0**-24 * scale, name
        changed += float((weight - before[name]).abs().max()) > 0.01 * scale
    assert changed


def weights_of(path: Path) -> dict[str, Tensor]:
    return {tensor.name: values(tensor) for tensor in gguf.GGUFReader(path).tensors}


def check_gguf(tmp_path: Path, base: Any, model: Any, architecture: str) -> None:
    """The exported file, applied to the base's GGUF file, is the GGUF file of the merged model."""
    before = write(tmp_path / "base.gguf", base, architecture)
    found = served_by_llama_cpp(before, tmp_path / "adapter.gguf")
    merged = lora.merge_and_eject(copy.deepcopy(model))
    expected = weights_of(write(tmp_path / "merged.gguf", merged, architecture))
    assert_same_weights(found, expected, weights_of(before))


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_multiplies_by_what_we_multiply_by(tmp_path: Path, name: str) -> None:
    architecture, build = MODELS[name]
    base = build()
    model = adapted(base, r=3, lora_alpha=5, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 9})
    assert export_gguf(model, tmp_path / "adapter.gguf") == 14
    check_gguf(tmp_path, base, model, architecture)


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_takes_every_kind_of_plain_adapter(tmp_path: Path, name: str) -> None:
    _, build = MODELS["llama"]
    base = build()
    model = adapted(base, **CONFIGS[name])
    export_gguf(model, tmp_path / "adapter.gguf")
    check_gguf(tmp_path, base, model, "llama")


def test_an_embedding_lies_the_other_way_round(tmp_path: Path) -> None:
    _, build = MODELS["llama"]
    base = build()
    model = adapted(base, r=4, lora_alpha=2, target_modules=["embed_tokens", "lm_head", "v_proj"])
    export_gguf(model, tmp_path / "adapter.gguf")
    check_gguf(tmp_path, base, model, "llama")


def test_q_is_in_llama_cpp_s_order_and_v_in_ours(tmp_path: Path) -> None:
    """By an index instead of a reshape: llama.cpp's row 2i of a head is our i, its row 2i + 1 our i + d/2."""
    _, build = MODELS["llama"]
    model = adapted(build(), r=2, lora_alpha=2, target_modules=["q_proj", "k_proj", "v_proj"])
    export_gguf(model, tmp_path / "adapter.gguf")
    written = weights_of(tmp_path / "adapter.gguf")
    attention = model.model.layers[0].self_attn
    order = torch.arange(8).view(2, 4).T.flatten()  # 0, 4, 1, 5, ...
    for end, heads in (("q", 4), ("k", 2)):
        rows = (order + 8 * torch.arange(heads)[:, None]).flatten()
        expected = attention.get_submodule(f"{end}_proj").lora_B["default"][rows]
        assert torch.equal(written[f"blk.0.attn_{end}.weight.lora_b"], expected)
    assert torch.equal(written["blk.0.attn_v.weight.lora_b"], attention.v_proj.lora_B["default"])
    assert torch.equal(written["blk.0.attn_q.weight.lora_a"], attention.q_proj.lora_A["default"])


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    _, build = MODELS["qwen2"]
    model = adapted(build(), r=2, lora_alpha=2, target_modules=["k_proj"])
    export_gguf(model, tmp_path / "adapter.gguf", dtype="float16")
    (name,) = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    assert name == "F16"
    expected = model.model.layers[1].self_attn.k_proj.lora_B["default"].half().float()
    assert torch.equal(weights_of(tmp_path / "adapter.gguf")["blk.1.attn_k.weight.lora_b"], expected)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.lora_B["default"][0, 0] = 1e5
    with pytest.raises(LoRAError, match=r"blk\.1\.attn_k\.weight\.lora_b has values that are not finite in F16"):
        export_gguf(model, tmp_path / "other.gguf", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.gguf"]


def test_every_parameter_has_the_name_that_the_tests_converter_gives_it() -> None:
    from lora import gguf_export

    for architecture, build in MODELS.values():
        for name, _ in build().named_parameters():
            assert gguf_export.gguf_name(name, architecture) == gguf_name(name)
    with pytest.raises(LoRAError, match=r"model\.layers\.0\.mlp\.router\.weight has no name in a GGUF file"):
        gguf_export.gguf_name("model.layers.0.mlp.router.weight", "llama")


# ---- the command -----------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """A GGUF model and an adapter of it."""
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    _, build = MODELS["llama"]
    found = {"model": write(tmp_path / "base.gguf", build()), "out": tmp_path / "out", "file": tmp_path / "a.gguf"}
    model = adapted(lora.load(found["model"])[0], r=4, target_modules=["q_proj", "down_proj"])
    found["adapter"] = lora.save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield found


def command(*words: Any) -> int:
    return main(["export", *(str(word) for word in words)])


def test_the_command_writes_both_formats_and_says_how_to_serve(files: dict[str, Path], capsys: Any) -> None:
    common = ("--model", files["model"], "--adapter", files["adapter"])
    assert command(*common, "--format", "vllm", "--output", files["out"]) == 0
    said = capsys.readouterr().out
    assert (
        "rank 4, alpha 8" in said
        and f"vllm serve MODEL --enable-lora --max-lora-rank 8 --lora-modules out={files['out']}" in said
    )
    base, model = (lora.load(files["model"])[0] for _ in range(2))
    assert_same_logits(served_by_vllm(files["out"], base, 8), lora.load_adapter(model, files["adapter"]), base)
    assert command(*common, "--format", "gguf", "--output", files["file"]) == 0
    assert f"exported 4 adapted modules to {files['file']}\nllama-server" in capsys.readouterr().out
    merged = lora.merge_and_eject(model)
    expected = weights_of(write(files["out"] / "merged.gguf", merged))
    assert_same_weights(served_by_llama_cpp(files["model"], files["file"]), expected, weights_of(files["model"]))
    for read in (lora.load, lora.models.outline_of):
        with pytest.raises(LoRAError, match=r"\.gguf is an adapter for llama\.cpp, not a model: name its base"):
            read(files["file"])


def test_gpt2_is_not_said_to_be_served_with_an_adapter(tmp_path: Path, capsys: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=len(tiny_tokenizer())))
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = lora.inject(lora.load(tmp_path / "base")[0], LoRAConfig(r=2, init_lora_weights=False))
    lora.save_adapter(model, tmp_path / "adapter")
    words = ("--model", tmp_path / "base", "--adapter", tmp_path / "adapter", "--format", "vllm")
    assert command(*words, "--output", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "class GPT2LMHeadModel probably takes no adapters" in said and "--enable-lora" not in said
    assert f"lora merge --model {tmp_path / 'base'} --adapter {tmp_path / 'adapter'}" in said


ERRORS: dict[str, tuple[list[str], str]] = {
    "directory in use": (["--format", "vllm", "--output", "ADAPTER"], "is what is read"),
    "not empty": (["--format", "vllm", "--output", "ROOT"], "is not empty"),
    "no adapter there": (["--format", "vllm", "--output", "ROOT", "--overwrite"], "holds something that is no adapter"),
    "a file for vllm": (["--format", "vllm", "--output", "MODEL"], "is a file, expected a directory"),
    "dtype for vllm": (["--format", "vllm", "--output", "OUT", "--dtype", "float16"], "is for --format gguf"),
    "no suffix": (["--format", "gguf", "--output", "OUT"], "should be a file that ends in .gguf"),
    "there already": (["--format", "gguf", "--output", "MODEL"], "is there already: --overwrite"),
    "no gguf there": (["--format", "gguf", "--output", "TEXT", "--overwrite"], "holds something that is no GGUF"),
    "no format": (["--output", "OUT"], "required: --format"),
    "another format": (["--format", "onnx", "--output", "OUT"], "invalid choice"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_users_error_is_one_line(files: dict[str, Path], tmp_path: Path, capsys: Any, case: str) -> None:
    words, said = ERRORS[case]
    (tmp_path / "text.gguf").write_text("my notes")
    names = {"MODEL": files["model"], "ADAPTER": files["adapter"], "ROOT": tmp_path, "OUT": files["out"]}
    names["TEXT"] = tmp_path / "text.gguf"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert command("--model", files["model"], "--adapter", files["adapter"], *(names.get(w, w) for w in words)) == 2
    seen = capsys.readouterr()
    assert seen.err.startswith("lora: error: ") and seen.err.count("\n") == 1
    assert said in seen.err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_overwriting_replaces_an_adapter(files: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    common = ("--model", files["model"], "--adapter", files["adapter"], "--overwrite")
    for options in (("--format", "vllm", "--output", files["out"]), ("--format", "gguf", "--output", files["file"])):
        assert command(*common, *options) == 0
        before = {path: path.read_bytes() for path in [*files["out"].rglob("*"), files["file"]] if path.is_file()}
        assert command(*common, *options) == 0
        assert before == {path: path.read_bytes() for path in before}
    assert not list(tmp_path.rglob(".unfinished*"))
