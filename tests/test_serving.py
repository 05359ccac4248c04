"""Many adapters beside one model: mixed batches equal each row alone, switching is cheap and leaks nothing, and a
merged directory is what transformers (and vLLM, which reads the same files) expects."""

from __future__ import annotations

import copy
import gc
import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROUNDING, normal, random_projection
from safetensors import safe_open
from tiny import stir, tiny_llama, toy
from tiny_gguf import llama, write
from tiny_text import save_tiny_model
from torch import Tensor, nn

import lora
import lora.layers
from lora import LoRAConfig
from lora.directories import merge_directory
from lora.layers import LoRALinear, adapter_layers, wrappers

IDS = torch.tensor([[1, 4, 2, 8, 5], [7, 1, 3, 0, 10]])


@pytest.fixture(params=["reference", "fast"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with lora.use_backend(request.param):
        yield request.param


def stacked(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A's and B's of several ranks as `multi_lora_linear` takes them: padded with zeros to the largest."""
    rank = max(len(A) for A, _ in pairs)
    padded_A = [nn.functional.pad(A, (0, 0, 0, rank - len(A))) for A, _ in pairs]
    padded_B = [nn.functional.pad(B, (0, rank - len(A))) for A, B in pairs]
    return torch.stack(padded_A), torch.stack(padded_B)


# ---- mixed batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_eight_adapters_in_one_batch_equal_each_alone(backend: str, bias: bool) -> None:
    base = random_projection(7, 12, None, bias=bias)
    pairs = [(normal(rank, 12), normal(7, rank)) for rank in (1, 2, 3, 4, 5, 6, 7, 5)]
    scaling = torch.tensor([0.5, 2.0, -1.0, 0.25, 4.0, 1.0, 8.0, 3.0], dtype=torch.float64)
    index = torch.tensor([3, -1, 0, 7, 3, 1, 6, -1, 2, 5, 4, 0])
    x = normal(12, 3, 12)
    h = lora.ops.multi_lora_linear(x, base, *stacked(pairs), scaling, index)
    for row, adapter in enumerate(index.tolist()):
        own = base
        if adapter >= 0:
            A, B = pairs[adapter]
            own = base._replace(lora_A=A, lora_B=B, scaling=float(scaling[adapter]))
        torch.testing.assert_close(h[row], lora.ops.lora_linear(x[row], own), **ROUNDING)


def test_a_whole_model_with_another_adapter_for_each_row(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every adapted layer of a llama as one `multi_lora_linear`; alone, the same adapters go through `set_adapter`."""
    model = tiny_llama().double()
    names = [f"customer-{number}" for number in range(8)]
    for number, name in enumerate(names):
        config = LoRAConfig(
            r=1 + number % 4, lora_alpha=3 + number, init_lora_weights=False, use_rslora=number % 2 == 1
        )
        (lora.add_adapter if number else lora.inject)(model, config, name)
    rows: list[str | None] = [
        names[5],
        None,
        names[0],
        names[7],
        names[5],
        names[2],
        None,
        names[1],
        names[3],
        names[6],
    ]
    rows.append(names[4])
    ids = torch.randint(64, (len(rows), 6))
    alone = []
    for row, name in enumerate(rows):
        lora.set_adapter(model, name or names[0])
        with torch.no_grad():
            if name is None:
                with lora.disable_adapters(model):
                    alone.append(model(ids[row : row + 1]).logits[0])
            else:
                alone.append(model(ids[row : row + 1]).logits[0])
    index = torch.tensor([-1 if name is None else names.index(name) for name in rows])

    def mixed(layer: LoRALinear, x: Tensor) -> Tensor:
        pairs = stacked([layer.plain_pair(name) for name in names])
        scaling = torch.tensor([layer.scaling[name] for name in names], dtype=torch.float64)
        return lora.ops.multi_lora_linear(x, layer.base_projection(), *pairs, scaling, index)

    monkeypatch.setattr(LoRALinear, "forward", mixed)
    with torch.no_grad():
        together = model(ids).logits
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-9, atol=1e-9)
    spread = torch.stack([together[0], together[1]]) - torch.stack([alone[2], alone[2]])
    assert (spread.abs().amax(dim=(1, 2)) > 1e-3).all()  # the adapters differ, and from the base


def test_thousands_of_adapters_in_one_stack(backend: str) -> None:
    count = 3000
    base, scaling = random_projection(5, 6, None), torch.rand(count, dtype=torch.float64) + 0.5
    lora_A, lora_B = normal(count, 2, 6), normal(count, 5, 2)
    index = torch.randint(-1, count, (64,))
    index[:3] = torch.tensor([0, count - 1, -1])
    x = normal(64, 2, 6)
    h = lora.ops.multi_lora_linear(x, base, lora_A, lora_B, scaling, index)
    delta = torch.einsum("b,bor,bri,bti->bto", scaling[index], lora_B[index], lora_A[index], x)  # -1 is the last one
    expected = x @ base.weight.T + torch.where(index[:, None, None] >= 0, delta, 0)
    torch.testing.assert_close(h, expected, **ROUNDING)


# ---- switching -------------------------------------------------------------------------------------------------


def with_adapters(model: Any, count: int, **options: Any) -> list[str]:
    names = [f"a{number}" for number in range(count)]
    for number, name in enumerate(names):
        config = LoRAConfig(**({"r": 2, "init_lora_weights": False} | options))
        (lora.add_adapter if number else lora.inject)(model, config, name)
    return names


def test_thousands_of_adapters_in_one_model() -> None:
    model = toy(layers=1).double()
    names = with_adapters(model, 2000, r=1, target_modules=["q_proj", "v_proj"])
    layer = model.layers[0].q_proj
    for name in ("a0", "a1999", "a777", "a778"):
        lora.set_adapter(model, name)
        alone = toy(layers=1).double()
        with torch.no_grad():
            for path in ("q_proj", "v_proj"):
                part = model.layers[0].get_submodule(path)
                alone.layers[0].get_submodule(path).weight += part.lora_B[name] @ part.lora_A[name] * part.scaling[name]
        torch.testing.assert_close(model(IDS), alone(IDS), **ROUNDING)
        training = {key for key in names if layer.lora_A[key].requires_grad or layer.lora_B[key].requires_grad}
        assert training == {name}
        assert len([p for p in model.parameters() if p.requires_grad]) == 4
    assert list(lora.adapters(model)) == names
    for name in names[1:-1:400]:
        lora.delete_adapter(model, name)
        assert name not in layer.lora_A


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def fused(model: Any) -> Any:
    return lora.for_inference(model)


@pytest.mark.parametrize("prepare", [lambda model: model, fused], ids=["as it is", "for inference"])
def test_a_thousand_switches_leak_nothing(backend: str, prepare: Callable[[Any], Any]) -> None:
    model = tiny_llama()
    names = with_adapters(model, 5, modules_to_save=None)
    prepare(model)

    def run() -> None:
        with torch.no_grad():
            model(IDS)

    def switch(times: int, between: Callable[[], None] = lambda: None) -> None:
        for number in range(times):
            name = names[number % len(names)]
            lora.set_adapter(model, name if number % 7 else [name, names[(number + 1) % len(names)]])
            if number % 20 == 0:
                between()

    def answers() -> list[Tensor]:
        with torch.no_grad():
            return [lora.set_adapter(model, name)(IDS).logits for name in names]

    switch(100, run)  # whatever is made once
    said = answers()
    before = {name: (id(p), p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    modules, tensors = [id(module) for module in model.modules()], live_tensors()
    switch(1000, run)
    lora.set_adapter(model, names[3])
    tracemalloc.start()  # without the runs, in which torch and transformers keep some bytes of their own
    try:
        switch(10)
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        switch(1000)
        gc.collect()
        now, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert live_tensors() == tensors
    assert now - held < 4096  # bytes: a thousand switches that kept one pointer each would hold 8,000
    assert [id(module) for module in model.modules()] == modules
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (identity, place, value) in before.items():
        assert (id(after[name]), after[name].data_ptr()) == (identity, place)
        assert torch.equal(after[name], value), name
    for one, other, following in zip(answers(), said, [*said[1:], said[0]], strict=True):
        assert torch.equal(one, other) and not torch.equal(one, following)


def calls(act: Callable[[], Any]) -> int:
    """How many functions run in `act`: a cost that is the same on every machine."""
    count = 0

    def seen(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


def test_a_switch_costs_the_same_beside_any_number_of_adapters() -> None:
    costs = {}
    for count in (2, 40):
        model = tiny_llama()
        with_adapters(model, count)
        lora.set_adapter(model, "a0")
        costs[count] = calls(lambda model=model: lora.set_adapter(model, "a1"))
        layers = len(list(adapter_layers(model)))
    assert costs[2] == costs[40]
    assert costs[2] < 40 * layers  # no walk through what is inside each layer: named_modules alone is 70 calls a layer


def test_a_new_adapter_costs_the_same_beside_any_number_of_others() -> None:
    costs = {}
    for count in (2, 40):
        model = tiny_llama()
        with_adapters(model, count)
        costs[count] = calls(lambda model=model: lora.add_adapter(model, LoRAConfig(r=2), "new"))
    assert costs[40] < 1.2 * costs[2]


def test_a_switch_leaves_the_flags_of_every_kind_of_part_right() -> None:
    model = toy()
    lora.inject(model, LoRAConfig(r=2, target_modules=["q_proj"], use_dora=True, modules_to_save=["head"]), "dora")
    lora.add_adapter(model, LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]), "plain")
    lora.add_adapter(model, LoRAConfig(r=2, target_modules=["down_proj"], bias="lora_only"), "third")
    for active in (["plain"], ["dora"], ["third"], ["dora", "plain"], ["plain", "third"], ["dora"], ["plain"]):
        lora.set_adapter(model, active)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        expected = set()
        for name, _ in model.named_parameters():
            part = next((part for part in ("dora", "plain", "third") if part in name.split(".")), None)
            if part is None and name.endswith("down_proj.base_layer.bias"):
                part = "third"
            expected |= {name} if part in active else set()
        assert trained == expected and trained


def test_wrappers_are_all_that_named_modules_finds() -> None:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=16, num_local_experts=2)
    experts = transformers.MixtralForCausalLM(config)
    options = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "modules_to_save": ["lm_head"]}
    lora.inject(experts, LoRAConfig(r=2, target_modules=["q_proj", "embed_tokens"], **options))
    plain = tiny_llama()
    lora.inject(plain, LoRAConfig(r=2, target_modules="all-linear", modules_to_save=["model.norm", "lm_head"]))
    for model, count in ((experts, 1 + 2 + 4 + 1), (plain, 14 + 2)):
        expected = [m for m in model.modules() if isinstance(m, (lora.layers.AdapterLayer, lora.layers.SavedModule))]
        assert len(expected) == count
        assert sorted(map(id, wrappers(model))) == sorted(map(id, expected))
    copied = copy.deepcopy(plain)  # no list is kept that a copy, or a layer put in by hand, would not be in
    copied.model.layers.append(copy.deepcopy(copied.model.layers[0]))
    assert len(wrappers(copied)) == 14 + 2 + 7


# ---- a merged directory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["directory", "gguf"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merged_directory_is_what_transformers_and_vllm_expect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, dtype: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lora.directories.SHARD_BYTES", 20_000)
    build = {
        "directory": lambda: save_tiny_model(tmp_path / "base"),
        "gguf": lambda: write(tmp_path / "b.gguf", llama()),
    }
    path = build[source]()
    if source == "directory":  # as older versions of transformers write it
        config = json.loads((path / "config.json").read_text())
        config["torch_dtype"] = config.pop("dtype")
        (path / "config.json").write_text(json.dumps(config))
    model = lora.inject(lora.load(path)[0], LoRAConfig(r=3))
    stir(model)
    lora.save_adapter(model, tmp_path / "adapter")
    merge_directory(str(path), str(tmp_path / "adapter"), tmp_path / "merged", dtype=dtype)
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    own = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names - {"chat_template.jinja", "special_tokens_map.json"} == own | shards | {"model.safetensors.index.json"}
    assert len(shards) > 1
    for shard in shards:
        with safe_open(tmp_path / "merged" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == {key for key, place in index["weight_map"].items() if place == shard}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["architectures"], config["model_type"], config["dtype"]) == (["LlamaForCausalLM"], "llama", dtype)
    assert "quantization_config" not in config and "torch_dtype" not in config
    exact = lora.merge_and_eject(model).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert theirs.dtype == getattr(torch, dtype)
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, exact[key].to(theirs.dtype)), key
    assert index["weight_map"].keys() == exact.keys()
    GenerationConfig.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("12 red")["input_ids"] == lora.load(path)[1]("12 red")["input_ids"]
