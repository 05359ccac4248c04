"""Adapter files: a saved adapter comes back bit for bit, a save is all or nothing, and damage never passes."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tiny import IDS, assert_same, snapshot, stir, toy
from torch import Tensor, nn

import lora
from lora import LoRAConfig, LoRAError, adapter_io
from lora.adapter_check import SAMPLED_VALUES, sampled, similarity
from lora.config import matches
from lora.layers import adapter_layers, saved_modules
from lora.peft_format import CONFIG_FILE, WEIGHTS_FILE, compact

CONFIGS = {
    "plain": {"r": 4},
    "rslora": {"r": 4, "use_rslora": True, "lora_alpha": 3.5, "lora_dropout": 0.25},
    "dora": {"r": 3, "use_dora": True, "target_modules": ["q_proj", "embed"]},
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3}, "alpha_pattern": {"v_proj": 0.1}},
    "layers": {"r": 2, "layers_to_transform": [0, 2], "layers_pattern": "layers", "target_modules": ["v_proj"]},
    "one layer": {"r": 2, "layers_to_transform": 1},
    "excluded": {"r": 2, "exclude_modules": ["layers.1.q_proj", "v_proj"]},
    "expression": {"r": 2, "target_modules": r"layers\.[02]\..*_proj", "exclude_modules": r".*\.0\.v_proj"},
    "embedding and head": {"r": 4, "target_modules": ["embed", "head"]},
    "bias lora_only": {"r": 2, "bias": "lora_only", "target_modules": ["down_proj"]},
    "bias all": {"r": 2, "bias": "all", "modules_to_save": ["layers.1.norm"]},
    "modules_to_save": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["head", "norm"]},
    "block saved": {"r": 2, "modules_to_save": ["layers.1"]},
    "gaussian": {"r": 2, "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
    "not zero": {"r": 2, "init_lora_weights": False},
    "pissa": {"r": 3, "init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}},
    "pissa_niter": {"r": 3, "init_lora_weights": "pissa_niter_4", "use_rslora": True, "alpha_pattern": {"v_proj": 5}},
    "olora": {"r": 3, "init_lora_weights": "olora", "use_dora": True},
}


def trained(config: LoRAConfig | None = None, name: str = "default", **options: Any) -> nn.Module:
    """A toy model with an adapter that has been moved off its start."""
    model = lora.inject(toy(**options), config or LoRAConfig(r=2, target_modules=["q_proj"]), name)
    stir(model)
    return model


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Everything that belongs to an adapter, by role and path."""
    found: dict[str, Tensor] = {}
    for path, layer in adapter_layers(model):
        for role in ("lora_A", "lora_B", "lora_magnitude", "initial_A", "initial_B"):
            if name in getattr(layer, role):
                found[f"{path}.{role}"] = getattr(layer, role)[name].detach().clone()
    for path, module in saved_modules(model):
        if name in module.copies:
            found |= {f"{path}.{key}": value.clone() for key, value in module.copies[name].state_dict().items()}
    state = model.lora_state
    for path, bias in state.biases.items() if state.biases_trained == name else ():
        found[path] = (bias.parameter if state.trained_biases_in_use else bias.resting).detach().clone()
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# A round trip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path, options, tied):
    model = trained(LoRAConfig(**options), tied=tied)
    before = snapshot(model)
    assert lora.save_adapter(model, tmp_path) == tmp_path
    assert_same(model, before)

    again = toy(tied=tied)
    base = snapshot(again)
    assert lora.load_adapter(again, tmp_path) is again
    assert lora.adapters(again) == lora.adapters(model)  # the config, and that it is active
    assert_equal(adapter_tensors(again), adapter_tensors(model))
    for (path, one), (other_path, other) in zip(adapter_layers(again), adapter_layers(model), strict=True):
        assert (path, one.scaling) == (other_path, other.scaling)
        assert one.dropout_rate("default") == other.dropout_rate("default")
    assert torch.equal(again(IDS), model(IDS))
    flags = {name for name, p in again.named_parameters() if p.requires_grad}
    assert flags == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not torch.equal(again(IDS), toy(tied=tied)(IDS))
    assert_same(lora.eject(again), base)


def test_two_saves_write_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        lora.save_adapter(trained(LoRAConfig(**CONFIGS["patterns"])), tmp_path / name)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert set(files(tmp_path / "one")) == {CONFIG_FILE, WEIGHTS_FILE}


def test_loading_draws_no_number_and_computes_no_start(tmp_path, monkeypatch):
    model = trained(LoRAConfig(r=2, init_lora_weights="pissa", use_dora=True))
    lora.save_adapter(model, tmp_path)
    again = toy()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name in ("lora.initialise._from_weight", "lora.initialise._start_magnitude"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("loading computes a start"))
    lora.load_adapter(again, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(adapter_tensors(again), adapter_tensors(model))


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tensors_keep_their_dtype(tmp_path, base):
    model = lora.inject(toy().to(base), LoRAConfig(r=2, modules_to_save=["norm"]))
    stir(model)
    lora.save_adapter(model, tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        assert file.metadata()["format"] == "pt"
        wide = torch.promote_types(base, torch.float32)
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert kinds and all(kind == (base if "norm" in name else wide) for name, kind in kinds.items())
    assert_equal(adapter_tensors(lora.load_adapter(toy().to(base), tmp_path)), adapter_tensors(model))


class Compiled(nn.Module):
    """As torch.compile wraps a model, without importing the compiler."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "_orig_mod" else getattr(self._orig_mod, name)


def test_other_states_of_the_model_save_the_same_file(tmp_path):
    """Merged, disabled, resting, wrapped or with A as a view: the adapter is the same."""
    model = trained(LoRAConfig(r=2, bias="all", modules_to_save=["head"]))
    lora.add_adapter(model, LoRAConfig(r=2), "other")
    expected = files(lora.save_adapter(model, tmp_path / "plain"))
    lora.save_adapter(nn.DataParallel(model), tmp_path / "parallel")
    lora.save_adapter(Compiled(model), tmp_path / "compiled")
    with lora.disable_adapters(model):
        lora.save_adapter(model, tmp_path / "disabled")
    lora.set_adapter(model, "other")
    lora.save_adapter(model, tmp_path / "resting")
    lora.set_adapter(model, "default")
    lora.merge(model)
    lora.save_adapter(model, tmp_path / "merged")
    with lora.disable_adapters(model):
        lora.save_adapter(model, tmp_path / "merged, disabled")
    lora.unmerge(model)
    for _, layer in adapter_layers(model):
        A = layer.lora_A["default"]
        wide = torch.cat([A.detach(), torch.ones(2, A.shape[1])])
        layer.lora_A["default"] = nn.Parameter(torch.cat([wide, wide], dim=1)[:2, : A.shape[1]])
    lora.save_adapter(model, tmp_path / "views")
    for folder in tmp_path.iterdir():
        assert files(folder) == expected, folder.name
    assert len(list(tmp_path.iterdir())) == 8


def test_a_trained_bias_is_saved_and_the_base_keeps_its_own(tmp_path):
    model = trained(LoRAConfig(**CONFIGS["bias all"]))
    lora.save_adapter(model, tmp_path)
    again = toy()
    before = snapshot(again)
    lora.load_adapter(again, tmp_path)
    assert torch.equal(again.layers[0].norm.bias, model.layers[0].norm.bias)
    assert not torch.equal(again.layers[0].norm.bias, toy().layers[0].norm.bias)
    with lora.disable_adapters(again):
        assert torch.equal(again(IDS), toy()(IDS))
    assert_same(lora.eject(again), before)


# Several adapters


def test_adapters_live_in_subdirectories_and_are_found_from_above_and_inside(tmp_path):
    model = trained()
    lora.add_adapter(model, LoRAConfig(r=3, target_modules=["v_proj"]), "other")
    lora.set_adapter(model, "other")
    stir(model, seed=2)
    assert lora.save_adapter(model, tmp_path) == tmp_path
    assert lora.save_adapter(model, tmp_path, "other") == tmp_path / "other"

    again = lora.load_adapter(toy(), tmp_path)
    lora.load_adapter(again, tmp_path, "other")  # from above
    lora.load_adapter(again, tmp_path / "other", "third")  # the directory itself, under another name
    assert [name for name, info in lora.adapters(again).items() if info.active] == ["default"]
    assert_equal(adapter_tensors(again), adapter_tensors(model))
    for name in ("other", "third"):
        assert_equal(adapter_tensors(again, name), adapter_tensors(model, "other"))
        assert not any(p.requires_grad for n, p in again.named_parameters() if n.endswith(f".{name}"))
    y = model(IDS)
    assert torch.equal(lora.set_adapter(again, "third")(IDS), y)


def test_an_adapter_that_rests_brings_its_biases_and_modules(tmp_path):
    lora.save_adapter(trained(LoRAConfig(**CONFIGS["bias all"])), tmp_path)
    model = trained(LoRAConfig(r=2, target_modules=["head"]), "first")
    y = model(IDS)
    lora.load_adapter(model, tmp_path)
    assert torch.equal(model(IDS), y)
    lora.set_adapter(model, "default")
    expected = lora.load_adapter(toy(), tmp_path)
    assert torch.equal(model(IDS), expected(IDS))


def test_a_module_at_two_paths_is_saved_once(tmp_path):
    def shared() -> nn.Module:
        model = toy()
        model.layers[2].q_proj = model.layers[0].q_proj
        return model

    model = lora.inject(shared(), LoRAConfig(r=2, target_modules=["q_proj"]))
    stir(model)
    lora.save_adapter(model, tmp_path)
    assert_equal(adapter_tensors(lora.load_adapter(shared(), tmp_path)), adapter_tensors(model))
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        assert len(list(file.keys())) == 4  # A and B of two modules, at three paths


def test_a_bias_at_two_paths_is_saved_once_and_the_base_keeps_its_own(tmp_path):
    def shared() -> nn.Module:
        model = toy()
        model.layers[2].q_proj = model.layers[0].q_proj
        return model

    model = lora.inject(shared(), LoRAConfig(r=2, bias="all"))
    stir(model)
    lora.save_adapter(model, tmp_path)
    again = lora.load_adapter(shared(), tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    with lora.disable_adapters(again):
        assert torch.equal(again(IDS), shared()(IDS))
    assert torch.equal(lora.eject(again)(IDS), shared()(IDS))


def test_tensors_tied_inside_a_saved_module_are_written_apart(tmp_path):
    def tied() -> nn.Module:
        model = toy()
        model.layers[1].q_proj.bias = model.layers[1].down_proj.bias
        return model

    model = lora.inject(tied(), LoRAConfig(r=2, target_modules=["layers.0.q_proj"], modules_to_save=["layers.1"]))
    stir(model)
    lora.save_adapter(model, tmp_path)
    again = lora.load_adapter(tied(), tmp_path)
    assert_equal(adapter_tensors(again), adapter_tensors(model))


def test_whole_numbers_in_a_saved_module_stay_whole(tmp_path):
    def counting() -> nn.Module:
        model = toy()
        model.layers[1].norm.register_buffer("seen", torch.tensor(7))
        return model

    model = lora.inject(counting(), LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["layers.1.norm"]))
    model.layers[1].norm.current.seen += 5
    lora.save_adapter(model, tmp_path)
    again = lora.load_adapter(counting(), tmp_path)
    assert again.layers[1].norm.current.seen.item() == 12
    assert again.layers[1].norm.base_layer.seen.item() == 7


# The names in adapter_config.json


def test_names_are_short_where_short_names_suffice(tmp_path):
    def written(**options: Any) -> Any:
        lora.save_adapter(trained(LoRAConfig(r=2, **options)), tmp_path)
        return json.loads((tmp_path / CONFIG_FILE).read_text())["target_modules"]

    assert written() == ["down_proj", "q_proj", "v_proj"]
    assert written(target_modules=r".*q_proj|head") == ["head", "q_proj"]
    assert written(target_modules=["q_proj"], layers_to_transform=[0, 2]) == ["layers.0.q_proj", "layers.2.q_proj"]
    assert written(exclude_modules=["layers.1.q_proj"]) == [
        "down_proj",
        "layers.0.q_proj",
        "layers.2.q_proj",
        "v_proj",
    ]


def test_a_path_that_ends_another_needs_an_expression():
    everything = ["fc", "block", "block.fc"]
    assert compact(["fc", "block.fc"], everything) == ["fc"]
    assert compact(["block.fc"], everything) == ["block.fc"]
    assert compact(["fc"], everything) == "fc"  # as a list it would match block.fc too


PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join)


@given(st.sets(PATHS, min_size=1), st.data())
def test_the_names_match_exactly_what_was_adapted(everything, data):
    adapted = data.draw(st.lists(st.sampled_from(sorted(everything)), min_size=1, unique=True))
    names = compact(adapted, sorted(everything))
    names = names if isinstance(names, str) else tuple(names)
    assert {path for path in everything if matches(names, path)} == set(adapted)


# Which base model


def test_any_rounding_of_the_base_passes_and_another_base_does_not(tmp_path):
    lora.save_adapter(trained(width=32, layers=20), tmp_path)
    nearly = toy(width=32, layers=20)
    with torch.no_grad():
        for parameter in nearly.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    for same in (toy(width=32, layers=20).bfloat16(), lora.quantize(toy(width=32, layers=20)), nearly):
        lora.load_adapter(same, tmp_path)
    other = toy(seed=7, width=32, layers=20)
    before = snapshot(other)
    with pytest.raises(LoRAError, match=r"layers\.0\.q_proj have a similarity of .*check_base=False"):
        lora.load_adapter(other, tmp_path)
    assert_same(other, before)
    lora.load_adapter(other, tmp_path, check_base=False)


def test_an_adapter_of_a_quantised_base_loads_there_and_on_the_full_base(tmp_path):
    def base() -> nn.Module:
        return toy(width=32)

    model = lora.inject(lora.quantize(base()), LoRAConfig(r=2))
    stir(model)
    lora.save_adapter(model, tmp_path)
    assert torch.equal(lora.load_adapter(lora.quantize(base()), tmp_path)(IDS), model(IDS))
    assert_equal(adapter_tensors(lora.load_adapter(base(), tmp_path)), adapter_tensors(model))


def test_a_loftq_adapter_loads_only_on_the_base_that_nf4_left(tmp_path):
    def base() -> nn.Module:
        return toy(width=32)

    model = lora.inject(base(), LoRAConfig(r=2, init_lora_weights="loftq"))
    stir(model)
    lora.save_adapter(model, tmp_path)
    again = lora.load_adapter(lora.quantize(base()), tmp_path)
    assert_equal(adapter_tensors(again), adapter_tensors(model))
    for path, layer in adapter_layers(again):
        assert torch.equal(layer.base_layer.weight, model.get_submodule(path).base_layer.weight)  # the codes
    assert lora.adapters(again) == lora.adapters(model)
    with pytest.raises(LoRAError, match=r"LoftQ makes up for what NF4 loses: load the model with quantization='nf4'"):
        lora.load_adapter(base(), tmp_path)


def test_the_base_is_sampled_under_a_merged_adapter(tmp_path):
    model = trained()
    with torch.no_grad():
        for _, layer in adapter_layers(model):
            layer.lora_B["default"].mul_(100)  # merged, the weights have nothing of the base
    lora.merge(model)
    lora.save_adapter(model, tmp_path)
    lora.load_adapter(toy(), tmp_path)
    merged = lora.inject(toy(), LoRAConfig(r=2, target_modules=["v_proj"]), "other")
    stir(merged)
    with torch.no_grad():
        for _, layer in adapter_layers(merged):
            layer.lora_B["other"].mul_(100)
    lora.merge(merged)
    lora.load_adapter(merged, tmp_path)  # other modules than the merged ones


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (70, 33), (64, 64)])
def test_a_sample_of_nf4_is_the_sample_of_the_decoded_weight(shape):
    linear = nn.Linear(shape[1], shape[0], bias=False)
    for double_quant in (True, False):
        layer = lora.layers.NF4Linear.from_linear(linear, double_quant=double_quant)
        decoded = nn.Linear(shape[1], shape[0], bias=False)
        decoded.weight.data = lora.ops.nf4_dequantize(layer.quantised, torch.float32)
        assert sampled(layer).shape == (SAMPLED_VALUES,)
        assert torch.equal(sampled(layer), sampled(decoded))
        assert sampled(decoded)[0] == decoded.weight[0, 0] and sampled(decoded)[-1] == decoded.weight[-1, -1]


def test_similarity_is_a_cosine():
    one, zero = torch.randn(32), torch.zeros(32)
    assert similarity(one, 3 * one) == pytest.approx(1)
    assert similarity(one, -one) == pytest.approx(-1)
    assert similarity(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.6)
    assert similarity(one, zero) == 0
    assert similarity(zero, zero) == 1


# Atomic writes


class Interruption(BaseException):
    """What no `except Exception` catches, as Ctrl-C."""


def failing(monkeypatch, function: str, call: int, error: BaseException) -> None:
    """Makes the call-th call of `function` raise, and only that."""
    module, _, name = function.rpartition(".")
    holder: Any = {"os": os, "lora.adapter_io": adapter_io}[module]
    original, calls = getattr(holder, name), iter(range(10**6))

    def fail(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(holder, name, fail)


STEPS = [("lora.adapter_io.write_tensors", 0), ("os.fsync", 0), ("os.fsync", 1), ("os.replace", 0), ("os.replace", 1)]
ERRORS = [OSError(errno.ENOSPC, "No space left on device"), Interruption()]


@pytest.mark.parametrize("error", ERRORS, ids=["full disk", "interrupted"])
@pytest.mark.parametrize(("function", "call"), STEPS)
@pytest.mark.parametrize("first", [True, False])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, function, call, error, first):
    folder = tmp_path / "adapter"
    if not first:
        lora.save_adapter(trained(LoRAConfig(r=3)), folder)
    before = files(tmp_path)
    failing(monkeypatch, function, call, error)
    with pytest.raises((LoRAError, Interruption)) as caught:
        lora.save_adapter(trained(), folder)
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value) and str(folder) in str(caught.value)
        assert isinstance(caught.value, LoRAError)
    assert files(tmp_path) == before
    assert folder.exists() != first
    monkeypatch.undo()
    if not first:
        assert lora.adapters(lora.load_adapter(toy(), folder))["default"].config == LoRAConfig(r=3)


def test_a_file_system_without_links_or_directory_sync_is_enough(tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    model = trained()
    lora.save_adapter(model, tmp_path)
    monkeypatch.setattr(os, "link", refuse)
    failing(monkeypatch, "os.fsync", 2, OSError(errno.EINVAL, "Invalid argument"))  # the directory's
    stir(model, seed=9)
    lora.save_adapter(model, tmp_path)
    assert set(files(tmp_path)) == {CONFIG_FILE, WEIGHTS_FILE}
    assert_equal(adapter_tensors(lora.load_adapter(toy(), tmp_path)), adapter_tensors(model))


def test_a_disk_that_is_really_full(tmp_path):
    """The kernel's own refusal (EFBIG), not a mock's."""
    lora.save_adapter(trained(), tmp_path)
    before = files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = trained(LoRAConfig(r=11, target_modules=["q_proj", "v_proj"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(LoRAError, match="cannot write the adapter"):
            lora.save_adapter(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == before


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoRAError, match=r"cannot write the adapter to .*Not a directory"):
        lora.save_adapter(trained(), tmp_path / "file" / "adapter")


def test_what_a_crash_left_behind_is_ignored(tmp_path):
    model = trained()
    lora.save_adapter(model, tmp_path)
    (tmp_path / f".{WEIGHTS_FILE}.123.tmp").write_bytes(b"half")
    (tmp_path / f".{CONFIG_FILE}.123.tmp").write_bytes(b"{")
    assert_equal(adapter_tensors(lora.load_adapter(toy(), tmp_path)), adapter_tensors(model))


def test_a_crash_between_the_two_files_is_noticed(tmp_path):
    lora.save_adapter(trained(LoRAConfig(r=3)), tmp_path / "old")
    lora.save_adapter(trained(LoRAConfig(r=3, lora_alpha=99)), tmp_path / "new")
    for weights, config in (("new", "old"), ("old", "new")):
        torn = tmp_path / f"{weights} and {config}"
        torn.mkdir()
        shutil.copy(tmp_path / weights / WEIGHTS_FILE, torn)
        shutil.copy(tmp_path / config / CONFIG_FILE, torn)
        with pytest.raises(LoRAError, match=r"adapter_config\.json is not the one .* a save was interrupted"):
            lora.load_adapter(toy(), torn)


def test_a_save_over_an_open_file_does_not_change_what_was_read(tmp_path):
    """The old file is replaced, not written over: whoever has it open keeps it whole."""
    lora.save_adapter(trained(), tmp_path)
    old = (tmp_path / WEIGHTS_FILE).read_bytes()
    with (tmp_path / WEIGHTS_FILE).open("rb") as file:
        lora.save_adapter(trained(LoRAConfig(r=5)), tmp_path)
        assert file.read() == old != (tmp_path / WEIGHTS_FILE).read_bytes()


# Damage, and what is undone


def test_no_flipped_bit_and_no_cut_passes(tmp_path):
    lora.save_adapter(trained(LoRAConfig(r=2, target_modules=["layers.0.q_proj"])), tmp_path)
    model = toy()
    before, draw = snapshot(model), random.Random(0)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        path = tmp_path / name
        whole = path.read_bytes()
        places = {0, 7, 8, len(whole) - 1} | {draw.randrange(len(whole)) for _ in range(250)}
        for place in sorted(places):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << draw.randrange(8)
            for content in (damaged, whole[:place]):
                path.write_bytes(content)
                with pytest.raises(LoRAError):
                    lora.load_adapter(model, tmp_path)
        path.write_bytes(whole)
    assert_same(model, before)
    lora.load_adapter(model, tmp_path)


@pytest.mark.parametrize("error", [MemoryError(), Interruption()])
@pytest.mark.parametrize("injected", [False, True])
def test_a_load_that_fails_half_way_is_undone(tmp_path, monkeypatch, injected, error):
    lora.save_adapter(trained(LoRAConfig(r=2, bias="all", modules_to_save=["head"])), tmp_path)
    model = trained(LoRAConfig(r=2), "first") if injected else toy()
    before = snapshot(model)
    state = copy.deepcopy(model.lora_state.configs) if injected else None
    failing(monkeypatch, "lora.adapter_io._fill", 1, error)
    with pytest.raises(type(error)):
        lora.load_adapter(model, tmp_path)
    assert_same(model, before)
    assert getattr(getattr(model, "lora_state", None), "configs", None) == state
    monkeypatch.undo()
    lora.load_adapter(model, tmp_path)  # nothing of the first attempt is in the way


def test_a_model_without_values_is_refused(tmp_path):
    lora.save_adapter(trained(), tmp_path)
    with torch.device("meta"):
        model = toy()
    with pytest.raises(LoRAError, match="meta device"):
        lora.load_adapter(model, tmp_path)
    with pytest.raises(LoRAError, match="meta device"):
        lora.save_adapter(lora.inject(model, LoRAConfig(r=2)), tmp_path)
