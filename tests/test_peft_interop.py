"""The same adapter in PEFT and here: what one saves the other loads, with the same logits."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from test_adapter_io import adapter_tensors, assert_equal
from tiny import stir, tiny_llama
from torch import Tensor, nn

import lora
from lora import LoRAConfig, LoRAError
from lora.peft_format import CONFIG_FILE, WEIGHTS_FILE

TOKENS = torch.tensor([[1, 4, 2, 8, 5, 7], [63, 1, 3, 0, 10, 33]])
# Two float32 computations of one formula through two layers, sums of at most 128 terms: u · √128 · a dozen operations
# is 1e-5 of the largest logit. Every test also sees the adapter move the logits by more than 1000 times that.
ROUNDING = 1e-5

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "dropout": ("llama", {"r": 4, "lora_dropout": 0.25, "target_modules": ["q_proj", "v_proj"]}),
    "all-linear": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["o_proj", "down_proj"]}),
    "dora": ("llama", {"r": 4, "use_dora": True, "target_modules": "all-linear"}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, r"model\.layers\.1\.mlp\..*": 3},
            "alpha_pattern": {r"layers\.0\.mlp\.down_proj": 1, "k_proj": 16},
        },
    ),
    "rslora with patterns": (
        "llama",
        {"r": 4, "use_rslora": True, "rank_pattern": {"up_proj": 5}, "target_modules": ["up_proj", "q_proj"]},
    ),
    "embedding and head": ("llama", {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "dora embedding": ("llama", {"r": 4, "use_dora": True, "target_modules": ["embed_tokens", "gate_proj"]}),
    "tied embedding": ("tied", {"r": 4, "target_modules": ["embed_tokens", "v_proj"]}),
    "tied, all-linear": ("tied", {"r": 4, "target_modules": "all-linear"}),
    "tied, head saved": ("tied", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "head saved": ("llama", {"r": 4, "target_modules": "all-linear", "modules_to_save": ["lm_head", "model.norm"]}),
    "block saved": ("llama", {"r": 4, "target_modules": "all-linear", "modules_to_save": ["layers.1.mlp"]}),
    "embedding saved": ("llama", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "layers": ("llama", {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "layers by pattern": (
        "llama",
        {"r": 4, "target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "excluded": ("llama", {"r": 4, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]}),
    "excluded by expression": ("llama", {"r": 4, "target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"}),
    "expression": ("llama", {"r": 4, "target_modules": r".*\.1\..*(gate|up)_proj"}),
    "bias lora_only": ("biased", {"r": 4, "target_modules": ["q_proj", "k_proj"], "bias": "lora_only"}),
    "bias all": ("biased", {"r": 4, "target_modules": ["q_proj"], "bias": "all"}),
    "gpt2": ("gpt2", {"r": 4, "target_modules": ["c_attn"]}),
    "gpt2, all-linear": ("gpt2", {"r": 4, "lora_alpha": 2, "target_modules": "all-linear"}),
    "gpt2, head and Conv1D": ("gpt2", {"r": 4, "target_modules": ["c_fc", "lm_head"]}),
    "gpt2, dora": ("gpt2", {"r": 4, "use_dora": True, "target_modules": ["c_attn", "mlp.c_proj"]}),
    "gpt2, embeddings": ("gpt2", {"r": 4, "target_modules": ["wte", "wpe"]}),
    "gpt2, bias all": ("gpt2", {"r": 4, "target_modules": ["c_fc"], "bias": "all"}),
    "gpt2, bias and saved": ("gpt2", {"r": 4, "target_modules": ["c_fc"], "bias": "all", "modules_to_save": ["ln_f"]}),
    "gpt2, lora_only": ("gpt2", {"r": 4, "target_modules": "all-linear", "bias": "lora_only"}),
}  # fmt: skip


@functools.cache
def _template(kind: str) -> nn.Module:
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    else:
        options = {"tied": {"tie_word_embeddings": True}, "biased": {"attention_bias": True}}.get(kind, {})
        model = tiny_llama(**options)
    with torch.no_grad():  # transformers starts biases at 0 and norms at 1: a test must tell them apart
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape) * (1 if name.endswith("bias") else 0.3)
    return model


def base(kind: str) -> Any:
    """A fresh model with the same weights as every other of its kind."""
    return copy.deepcopy(_template(kind))


@pytest.fixture(autouse=True)
def _quiet():
    """PEFT warns of tied weights and of saving embeddings; of keys it does not find, it must have nothing to say."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert not [str(w.message) for w in caught if "key" in str(w.message)]


def peft_model(kind: str, **options: Any) -> Any:
    model = peft.get_peft_model(base(kind), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    stir(model)
    return model


def our_model(kind: str, **options: Any) -> Any:
    model = lora.inject(base(kind), LoRAConfig(**options))
    stir(model)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def assert_same_logits(one: Any, other: Any, kind: str) -> None:
    found, expected, before = logits(one), logits(other), logits(base(kind))
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= ROUNDING * scale
    assert float((expected - before).abs().max()) >= 1000 * ROUNDING * scale


@pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES)
def test_peft_loads_what_we_save(tmp_path, kind, options):
    model = our_model(kind, **options)
    lora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(kind), tmp_path).eval()
    assert_same_logits(theirs, model, kind)
    keys = set(peft.get_peft_model_state_dict(theirs, save_embedding_layers=False))
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        assert set(file.keys()) == {
            key for key in keys if "original_module" not in key and "modules_to_save" not in key
        }


@pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES)
def test_we_load_what_peft_saves(tmp_path, kind, options):
    theirs = peft_model(kind, **options)
    theirs.save_pretrained(tmp_path)
    model = lora.load_adapter(base(kind), tmp_path)
    assert_same_logits(model, theirs, kind)
    adapted = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert {path for path, _ in lora.layers.adapter_layers(model)} == adapted


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_and_back(tmp_path, kind):
    """Ours, through PEFT's loader and writer, and ours again: not a bit is lost, not even by another name."""
    model = our_model(kind, r=4, target_modules="all-linear", use_dora=True, rank_pattern={"down_proj|c_fc": 3})
    lora.save_adapter(model, tmp_path / "ours")
    peft.PeftModel.from_pretrained(base(kind), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = lora.load_adapter(base(kind), tmp_path / "theirs", "again")
    assert_equal(adapter_tensors(again, "again"), adapter_tensors(model))


def test_of_two_patterns_that_match_the_first_wins_in_the_file_too(tmp_path):
    """PEFT sorts the keys as it writes them, and cannot always read its own file; the order must be kept."""
    patterns = {"q_proj": 2, r"model\.layers\.1\..*_proj": 3, "k_proj": 5}
    model = our_model("llama", r=4, target_modules=["q_proj", "k_proj"], rank_pattern=patterns, alpha_pattern=patterns)
    lora.save_adapter(model, tmp_path)
    assert_same_logits(peft.PeftModel.from_pretrained(base("llama"), tmp_path).eval(), model, "llama")


# Starts that are taken off the base weights


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 6},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 5}},
        {"use_dora": True},
    ],
    ids=["plain", "rslora with patterns", "dora"],
)
def test_peft_loads_our_pissa_and_olora_on_the_untouched_base(tmp_path, init, options):
    model = our_model("llama", r=3, init_lora_weights=init, target_modules=["q_proj", "o_proj"], **options)
    lora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base("llama"), tmp_path).eval()
    assert_same_logits(theirs, model, "llama")
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (config["r"], config["init_lora_weights"]) == (6, True)
    weight = theirs.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(weight, base("llama").model.layers[0].self_attn.q_proj.weight)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "use_dora": True}], ids=["plain", "rslora, dora"])
def test_we_load_peft_s_pissa_and_olora_and_leave_the_base_alone(tmp_path, init, options):
    theirs = peft_model("llama", r=3, init_lora_weights=init, target_modules=["q_proj", "down_proj"], **options)
    theirs.save_pretrained(tmp_path)
    model = lora.load_adapter(base("llama"), tmp_path)
    assert_same_logits(model, theirs, "llama")
    weight = model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(weight, base("llama").model.layers[0].mlp.down_proj.weight)
    lora.save_adapter(model, tmp_path / "ours")
    assert torch.equal(logits(lora.load_adapter(base("llama"), tmp_path / "ours")), logits(model))


def test_an_adapter_converted_from_pissa_by_peft_loads_as_a_plain_one(tmp_path):
    options = {"r": 3, "init_lora_weights": "pissa_niter_8", "target_modules": ["q_proj"]}
    theirs = peft.get_peft_model(base("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    theirs.peft_config["default"].init_lora_weights = True  # what is saved as the start must load without one
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa_niter_8"
    stir(theirs)
    theirs.save_pretrained(tmp_path / "raw")
    with pytest.raises(
        LoRAError, match=r"init_lora_weights is 'pissa_niter_8'.*path_initial_model_for_weight_conversion"
    ):
        lora.load_adapter(base("llama"), tmp_path / "raw")
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    found = logits(lora.load_adapter(base("llama"), tmp_path / "plain"))
    assert float((found - expected).abs().max()) <= ROUNDING * float(expected.abs().max())


# Several adapters


def test_several_adapters_of_ours_in_peft(tmp_path):
    model = our_model("llama", r=4, target_modules=["q_proj"])
    lora.add_adapter(model, LoRAConfig(r=2, target_modules=["q_proj", "up_proj"], use_rslora=True), "other")
    for name in ("default", "other"):
        lora.set_adapter(model, name)
        stir(model)
        lora.save_adapter(model, tmp_path, name)
    theirs = peft.PeftModel.from_pretrained(base("llama"), tmp_path).eval()
    theirs.load_adapter(tmp_path / "other", "other")
    for name in ("other", "default"):
        lora.set_adapter(model, name)
        theirs.set_adapter(name)
        assert_same_logits(theirs, model, "llama")


def test_several_adapters_of_peft_s_here(tmp_path):
    theirs = peft_model("llama", r=4, target_modules=["q_proj"])
    theirs.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up_proj"], bias="none", use_dora=True))
    theirs.set_adapter("other")
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    model = lora.load_adapter(base("llama"), tmp_path)
    lora.load_adapter(model, tmp_path, "other")
    for name in ("default", "other"):
        lora.set_adapter(model, name)
        theirs.set_adapter(name)
        assert_same_logits(model, theirs, "llama")


# What PEFT does in its own way


def test_modules_to_save_match_letters_in_peft(tmp_path):
    """PEFT trains input_layernorm where modules_to_save says "norm"."""
    theirs = peft_model("llama", r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    theirs.save_pretrained(tmp_path)
    model = lora.load_adapter(base("llama"), tmp_path)
    assert_same_logits(model, theirs, "llama")
    assert len(lora.adapters(model)["default"].config.modules_to_save) == 5

    ours = our_model("llama", r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    lora.save_adapter(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())["modules_to_save"] == ["model.norm"]
    assert_same_logits(peft.PeftModel.from_pretrained(base("llama"), tmp_path / "ours").eval(), ours, "llama")


def test_a_classifier_s_head_goes_by_either_name(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    def classifier() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, pad_token_id=0)
        return LlamaForSequenceClassification(config).eval()

    theirs = peft.get_peft_model(classifier(), peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear"))
    stir(theirs.eval())
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["modules_to_save"] == ["classifier", "score"]
    model = lora.load_adapter(classifier(), tmp_path)
    assert lora.adapters(model)["default"].config.modules_to_save == ("score",)
    expected = logits(theirs)
    assert float((logits(model) - expected).abs().max()) <= ROUNDING * float(expected.abs().max())


def test_an_embedding_table_in_the_file_must_be_the_model_s(tmp_path):
    theirs = peft_model("llama", r=4, target_modules=["embed_tokens", "lm_head"])
    theirs.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        assert "base_model.model.model.embed_tokens.base_layer.weight" in file.keys()  # noqa: SIM118 - not a mapping
    lora.load_adapter(base("llama").bfloat16(), tmp_path)  # the same table, as far as bfloat16 can tell
    model = base("llama")
    model.model.embed_tokens.weight.data[5, 3] += 0.01
    with pytest.raises(LoRAError, match=r"embed_tokens\.base_layer\.weight \[64, 32\] is a copy of a base weight that"):
        lora.load_adapter(model, tmp_path)
    lora.load_adapter(model, tmp_path, check_base=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_trained_in_float32(tmp_path, dtype):
    theirs = peft_model("llama", r=4, target_modules=["q_proj"])
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    theirs.save_pretrained(tmp_path)
    model = lora.load_adapter(base("llama"), tmp_path)
    expected = {
        key.split("base_model.model.")[1]: value for key, value in peft.get_peft_model_state_dict(theirs).items()
    }
    for path, layer in lora.layers.adapter_layers(model):
        assert layer.lora_A["default"].dtype == torch.float32
        assert torch.equal(layer.lora_A["default"], expected[f"{path}.lora_A.weight"].float())


def test_base_models_are_compared_by_name(tmp_path):
    def named(name: str) -> Any:
        model = base("llama")
        model.config._name_or_path = model.name_or_path = name
        return model

    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    peft.get_peft_model(named("org/Tiny-Llama"), config).save_pretrained(tmp_path)
    for same in ("org/Tiny-Llama", "/models/tiny-llama/", "other/Tiny-Llama", ""):
        lora.load_adapter(named(same), tmp_path)
    with pytest.raises(
        LoRAError, match=r"'org/Tiny-Llama' in the file and 'org/Big-Llama' in this model.*check_base=False"
    ):
        lora.load_adapter(named("org/Big-Llama"), tmp_path)
    lora.load_adapter(named("org/Big-Llama"), tmp_path, check_base=False)

    ours = lora.inject(named("org/Tiny-Llama"), LoRAConfig(r=2))
    lora.save_adapter(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())["base_model_name_or_path"] == "org/Tiny-Llama"
    lora.load_adapter(named("org/Big-Llama"), tmp_path / "ours")  # the weights are the same: the name may differ


def test_an_old_config_lacks_fields_and_that_is_fine(tmp_path):
    """As PEFT 0.3 wrote it."""
    theirs = peft_model("llama", r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    theirs.save_pretrained(tmp_path)
    old = {
        "base_model_name_or_path": "somewhere/llama",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (tmp_path / CONFIG_FILE).write_text(json.dumps(old))
    assert_same_logits(lora.load_adapter(base("llama"), tmp_path), theirs, "llama")


@pytest.mark.parametrize(("kind", "transposed"), [("llama", False), ("gpt2", True)])
def test_the_file_says_whether_weights_lie_transposed(tmp_path, kind, transposed):
    """PEFT notices a wrong fan_in_fan_out and warns; a reader that does not notice would multiply by Wᵀ."""
    lora.save_adapter(our_model(kind, r=4), tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["fan_in_fan_out"] is transposed


def test_what_vllm_and_peft_s_auto_classes_look_at_is_there(tmp_path):
    lora.save_adapter(our_model("llama", r=4), tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "CAUSAL_LM", True)
    assert (config["r"], config["lora_alpha"], config["modules_to_save"], config["use_dora"]) == (4, 8, None, False)
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    known = {f.name for f in peft.LoraConfig.__dataclass_fields__.values()}
    assert set(config) <= known
    assert Path(tmp_path / WEIGHTS_FILE).stat().st_size < 100_000
