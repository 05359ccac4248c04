"""Bad adapter files: each is refused with what, found, expected and what to do, and nothing has changed."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapter_io import files, trained
from tiny import Toy, assert_same, snapshot, stir, toy
from torch import Tensor, nn

import lora
from lora import LoRAConfig, LoRAError
from lora.adapter_check import RECORD, RECORD_DIGEST, digest_of
from lora.peft_format import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE

OPTIONS = {"r": 4, "target_modules": ["q_proj", "v_proj"], "bias": "lora_only", "modules_to_save": ["head"]}
KEY = "base_model.model.layers.0.q_proj.lora_A.weight"
BIAS = "base_model.model.layers.0.q_proj.base_layer.bias"


def write_foreign(folder: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> None:
    """Makes an adapter of ours one of PEFT's: another writer, no record; with other fields or tensors."""
    tensors = load_file(folder / WEIGHTS_FILE) if tensors is None else tensors
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    fields = json.loads((folder / CONFIG_FILE).read_text()) | changes
    (folder / CONFIG_FILE).write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


def with_tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        edit(tensors)
        write_foreign(folder, tensors)

    return write


def fields(**changes: Any) -> Callable[[Path], None]:
    """`...` removes a field."""
    return lambda folder: write_foreign(folder, **changes)


def config_text(text: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_foreign(folder)
        (folder / CONFIG_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / WEIGHTS_FILE
        path.write_bytes(change(path.read_bytes()))

    return write


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Another header before the same bytes."""

    def edit(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        parsed = json.loads(content[8 : 8 + length])
        change(parsed)
        text = json.dumps(parsed).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return weights(edit)


def foreign_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_foreign(folder)
        header(change)(folder)

    return write


def record(**changes: Any) -> Callable[[Path], None]:
    """Another record with a digest that fits: what no accident makes."""

    def change(parsed: dict[str, Any]) -> None:
        document = json.dumps(json.loads(parsed["__metadata__"][RECORD]) | changes)
        parsed["__metadata__"] |= {RECORD: document, RECORD_DIGEST: digest_of(document.encode())}

    return header(change)


def as_pickle(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / PICKLE_FILE).write_bytes(pickle.dumps({KEY: 1}))


def set_value(key: str, value: float) -> Callable[[Path], None]:
    return with_tensors(lambda tensors: tensors[key].view(-1).__setitem__(3, value))


def replace(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return with_tensors(lambda tensors: tensors.update({key: change(tensors[key]).contiguous()}))


# name: (what is done to the directory, what the message must say)
BAD_FILES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    # the directory
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), ("has no adapter_config.json", "expected it beside")),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), ("has no adapter_model.safetensors", "fetch the weights")),
    "a pickle": (as_pickle, ("adapter_model.bin is a pickle", "expected adapter_model.safetensors", "save it again")),
    "config is a directory": (
        lambda f: ((f / CONFIG_FILE).unlink(), (f / CONFIG_FILE).mkdir()),
        ("has no adapter_config.json",),
    ),
    # the config
    "not JSON": (config_text("{r: 4}"), (CONFIG_FILE, "is not JSON", "fetch it again")),
    "empty config": (config_text(""), (CONFIG_FILE, "is not JSON")),
    "not UTF-8": (config_text(b'{"r": "\xff\xfe"}'), (CONFIG_FILE, "is not JSON", "fetch it again")),
    "a list": (config_text("[1, 2]"), (CONFIG_FILE, "holds a list", "expected an object")),
    "nested too deep": (config_text("[" * 100_000), (CONFIG_FILE, "is not JSON")),
    "another method": (fields(peft_type="IA3"), ("peft_type is 'IA3'", "expected 'LORA'", "only PEFT can load")),
    "no method": (fields(peft_type=...), ("peft_type is None", "expected 'LORA'")),
    "unknown field": (fields(lora_alhpa=3), ("unknown field 'lora_alhpa' (= 3)", "Did you mean 'lora_alpha'")),
    "a later feature": (fields(use_warp=True), ("unknown field 'use_warp' (= True)", "newer PEFT", "remove it")),
    "qalora": (fields(use_qalora=True), ("use_qalora is True", "expected it to be absent", "Load this adapter")),
    "eva": (fields(eva_config={"rho": 2.0}), ("eva_config is {'rho': 2.0}", "not built here", "with PEFT")),
    "corda": (fields(corda_config={"sample_count": 1}), ("corda_config is", "not built here", "absent, null")),
    "lora_bias": (fields(lora_bias=True), ("lora_bias is True", "not built here", "absent, null or false")),
    "layer replication": (fields(layer_replication=[[0, 2]]), ("layer_replication is [[0, 2]]", "not built here")),
    "alora": (fields(alora_invocation_tokens=[1]), ("alora_invocation_tokens is [1]", "not built here")),
    "tokens": (fields(trainable_token_indices=[3]), ("trainable_token_indices is [3]", "not built here")),
    "parameters": (fields(target_parameters=["w"]), ("target_parameters names 'w'", "matches no parameter")),
    "megatron": (fields(megatron_config={"tp": 2}), ("megatron_config is {'tp': 2}", "not built here")),
    "velora": (fields(velora_config={"a": 1}), ("velora_config is", "not built here")),
    "eva start": (fields(init_lora_weights="eva"), ("init_lora_weights is 'eva'", "Expected one of True", "from PEFT")),
    "loftq start": (fields(init_lora_weights="loftq"), ("init_lora_weights is 'loftq'", "save_pretrained")),
    "no targets": (fields(target_modules=None), ("target_modules is None", "expected the names", "add them")),
    "rank zero": (fields(r=0), (CONFIG_FILE, "r is 0", "expected an integer >= 1")),
    "rank text": (fields(r="8"), (CONFIG_FILE, "r is '8'", "expected an integer >= 1")),
    "alpha NaN": (fields(lora_alpha=float("nan")), (CONFIG_FILE, "lora_alpha is nan", "expected a finite number > 0")),
    "dropout 1": (fields(lora_dropout=1.0), (CONFIG_FILE, "lora_dropout is 1.0", "expected a number in [0, 1)")),
    "dropout -0.1": (fields(lora_dropout=-0.1), ("lora_dropout is -0.1", "expected a number in [0, 1)")),
    "bias": (fields(bias="some"), ("bias is 'some'", "expected one of 'none', 'all', 'lora_only'")),
    "expression": (fields(target_modules="(q"), (CONFIG_FILE, "target_modules '(q' is not a regular expression")),
    "saved names": (fields(modules_to_save="head"), ("modules_to_save is the string 'head'", "expected a list")),
    "target unmatched": (
        fields(target_modules=["q_proj", "v_porj"]),
        ("target_modules names 'v_porj', which matches no module", "Did you mean 'v_proj'"),
    ),
    "saved unmatched": (
        fields(modules_to_save=["haed"]),
        ("modules_to_save names 'haed', which matches no module", "Did you mean 'head'"),
    ),
    "layers out of range": (
        fields(layers_to_transform=[0, 9]),
        ("layers_to_transform has 9", "lie in layers 0 to 2"),
    ),
    "pattern unmatched": (
        fields(rank_pattern={"q_porj": 2}),
        ("rank_pattern has the key 'q_porj'", "none of the 6 adapted modules", "Did you mean 'q_proj'"),
    ),
    "rank above the layer": (fields(r=99, rank_pattern={}), ("[4, 16], expected [99, 16]", "r=99", "another config")),
    "fewer targets": (
        fields(target_modules=["v_proj"]),
        ("has 'base_model.model.layers.0.q_proj", "does not ask for", "expected exactly", "do not belong together"),
    ),
    "more targets": (
        fields(target_modules=["q_proj", "v_proj", "down_proj"]),
        ("lacks 'base_model.model.layers.0.down_proj.lora_A.weight'", "and 4 more", "which the config asks for"),
    ),
    "dora without magnitudes": (fields(use_dora=True), ("lacks", "lora_magnitude_vector'", "and 1 more")),
    "bias without biases": (fields(bias="all"), ("lacks", "layers.0.norm.bias'", "which the config asks for")),
    "another rank": (fields(r=2), ("layers.0.q_proj.lora_A.weight is [4, 16], expected [2, 16]", "r=2")),
    # the weights: the file
    "empty file": (weights(lambda b: b""), ("ends after 0 bytes", "expected a whole safetensors file")),
    "half a header": (weights(lambda b: b[:200]), ("ends after 200 bytes, inside its header", "fetch or copy")),
    "truncated": (weights(lambda b: b[:-7]), ("bytes long, but its header says", "expected a whole safetensors file")),
    "too long": (weights(lambda b: b + b"more"), ("bytes long, but its header says", "save the adapter again")),
    "huge header": (weights(lambda b: b"\xff" * 8 + b[8:]), ("inside its header", "whole safetensors file")),
    "a Git LFS pointer": (
        weights(lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"),
        ("is a Git LFS pointer", "run `git lfs pull`"),
    ),
    "a renamed pickle": (
        weights(lambda b: b"PK\x03\x04" + bytes(500)),
        ("is a zip archive, which torch.save makes", "pickles are not read"),
    ),
    "header is not JSON": (weights(lambda b: b[:8] + b"x" + b[9:]), ("has a header that is not safetensors'",)),
    "header is a list": (
        weights(lambda b: struct.pack("<Q", 2) + b"[]"),
        ("has a header that is not safetensors'", "fetch or copy the file again"),
    ),
    "negative offset": (
        foreign_header(lambda h: h[KEY].update(data_offsets=[-4, 252])),
        ("has a header that is not safetensors'",),
    ),
    "offsets of another size": (
        foreign_header(lambda h: h[KEY].update(shape=[4, 17])),
        ("has a header that is not safetensors'", "expected a whole safetensors file"),
    ),
    "overlapping tensors": (
        foreign_header(lambda h: h.update({k: v | {"data_offsets": [0, 256]} for k, v in h.items() if k == KEY})),
        ("begin at byte", "expected"),
    ),
    # the weights: tensors
    "missing tensor": (
        with_tensors(lambda t: t.pop(KEY)),
        (f"lacks '{KEY}', which the config asks for", "expected exactly 16 tensors"),
    ),
    "extra tensor": (
        with_tensors(lambda t: t.update(surplus=torch.ones(2))),
        ("has 'surplus', which the config does not ask for", "do not belong together"),
    ),
    "misspelt tensor": (
        with_tensors(lambda t: t.update({KEY.replace("lora_A", "lora_a"): t.pop(KEY)})),
        (f"lacks '{KEY}'", "has 'base_model.model.layers.0.q_proj.lora_a.weight'", f"Did you mean '{KEY}'"),
    ),
    "many extra tensors": (
        with_tensors(lambda t: t.update({f"surplus.{i}": torch.ones(2) for i in range(9)})),
        ("'surplus.0', 'surplus.1', 'surplus.2', 'surplus.3', 'surplus.4' and 4 more",),
    ),
    "a path as a name": (
        with_tensors(lambda t: t.update({"../../x": t.pop(KEY)})),
        ("has '../../x', which the config does not ask for",),
    ),
    "an absolute path": (
        with_tensors(lambda t: t.update({"/tmp/x": torch.ones(1)})),
        ("has '/tmp/x', which the config does not ask for",),
    ),
    "the adapter's name in the names": (
        with_tensors(lambda t: t.update({KEY.replace(".weight", ".default.weight"): t.pop(KEY)})),
        ("lora_A.default.weight', which the config does not ask for", f"Did you mean '{KEY}'"),
    ),
    "transposed": (replace(KEY, lambda a: a.T), (f"{KEY} is [16, 4], expected [4, 16]", "r=4", "another model")),
    "another width": (replace(KEY, lambda a: a[:, :8]), (f"{KEY} is [4, 8], expected [4, 16]", "another model")),
    "a vector": (replace(KEY, lambda a: a.flatten()), (f"{KEY} is [64], expected [4, 16]",)),
    "short bias": (replace(BIAS, lambda b: b[:5]), (f"{BIAS} is [5], expected [16]", "another config")),
    "head of another vocabulary": (
        replace("base_model.model.head.weight", lambda w: w[:9]),
        ("base_model.model.head.weight is [9, 16], expected [11, 16]",),
    ),
    "int64": (replace(KEY, lambda a: a.long()), (f"{KEY} is I64, expected one of BF16, F16, F32, F64", "convert it")),
    "bool": (replace(KEY, lambda a: a > 0), (f"{KEY} is BOOL, expected one of BF16, F16, F32, F64",)),
    "8-bit float": (
        replace(KEY, lambda a: a.to(torch.float8_e4m3fn)),
        (f"{KEY} is F8_E4M3, expected one of BF16, F16, F32, F64",),
    ),
    "NaN": (set_value(KEY, float("nan")), (f"{KEY} has 1 of 64 values that are not finite", "earlier checkpoint")),
    "infinity": (set_value(BIAS, float("-inf")), (f"{BIAS} has 1 of 16 values that are not finite", "expected none")),
    "NaN in a saved module": (
        set_value("base_model.model.head.weight", float("nan")),
        ("base_model.model.head.weight has 1 of 176 values that are not finite",),
    ),
    "a base weight that differs": (
        with_tensors(lambda t: t.update({"base_model.model.embed.weight": torch.ones(11, 16)})),
        ("base_model.model.embed.weight [11, 16] is a copy of a base weight", "expected the same", "check_base=False"),
    ),
    # our own record
    "config of another save": (
        lambda f: (f / CONFIG_FILE).write_text((f / CONFIG_FILE).read_text().replace("8", "9")),
        ("adapter_config.json is not the one", "interrupted, or one of the two was edited", "Save the adapter again"),
    ),
    "one changed bit": (
        weights(lambda b: b[:-1] + bytes([b[-1] ^ 1])),
        ("has changed since it was saved", "expected", "the file is damaged"),
    ),
    "record changed": (
        header(lambda h: h["__metadata__"].update({RECORD: h["__metadata__"][RECORD].replace("lora_only", "all")})),
        ("has a damaged record in its header", "expected it as it was saved"),
    ),
    "record without its digest": (
        header(lambda h: h["__metadata__"].pop(RECORD_DIGEST)),
        ("has a damaged record in its header", "fetch the file again"),
    ),
    "a later version": (record(version=2), ("a record of version 2, expected 1", "upgrade lora")),
    "record without a config": (record(config=None), ("has a damaged record in its header",)),
    "record of fewer tensors": (record(digests=["0" * 16]), ("has a damaged record in its header",)),
    "sample of a module that is not there": (
        record(samples={"../x": "00" * 128}),
        ("made for another base model", "the weights of ../x have a similarity of 0.0000", "expected 0.9"),
    ),
    "sample too short": (record(samples={"layers.0.q_proj": "00"}), ("has a damaged record in its header",)),
    "record asks for more": (
        record(config=LoRAConfig(r=4, use_dora=True).to_dict()),
        ("lacks", "lora_magnitude_vector'", "do not belong together"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    lora.save_adapter(trained(LoRAConfig(**OPTIONS)), folder)
    return folder


def copied(saved: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def with_another_adapter() -> nn.Module:
    model = lora.inject(toy(), LoRAConfig(r=2, target_modules=["down_proj", "v_proj"]), "first")
    stir(model)
    return model


@pytest.mark.parametrize("model", [toy, with_another_adapter], ids=["plain", "injected"])
@pytest.mark.parametrize(("damage", "says"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_and_nothing_changes(tmp_path, saved, damage, says, model):
    folder = copied(saved, tmp_path / "adapter")
    damage(folder)
    model = model()
    before, there, generator = snapshot(model), files(tmp_path), torch.get_rng_state()
    with pytest.raises(LoRAError) as caught:
        lora.load_adapter(model, folder)
    message = str(caught.value)
    for part in (str(folder), *says):
        assert part in message
    assert "\n" not in message
    assert_same(model, before)
    assert files(tmp_path) == there
    assert torch.equal(torch.get_rng_state(), generator)
    assert hasattr(model, "lora_state") == any(".first" in name for name in before[0])


def test_the_files_are_good_before_they_are_made_bad(tmp_path, saved):
    """Else every case above could fail for another reason; as ours, and rewritten as PEFT's."""
    expected = trained(LoRAConfig(**OPTIONS))
    folder = copied(saved, tmp_path / "adapter")
    for write in (lambda _: None, write_foreign, fields(use_qalora=False, eva_config=None, loftq_config={})):
        write(folder)
        ids = torch.tensor([[1, 2, 3]])
        assert torch.equal(lora.load_adapter(toy(), folder)(ids), expected(ids))


def wider(seed: int = 0) -> Toy:
    return toy(seed, width=24)


# name: (model, adapter_name, what the message must say)
BAD_CALLS: dict[str, tuple[Callable[[], nn.Module], Any, tuple[str, ...]]] = {
    "path as a name": (toy, "../x", ("adapter_name is '../x'", "expected letters, digits")),
    "absolute path as a name": (toy, "/tmp/x", ("adapter_name is '/tmp/x'", "expected letters, digits")),
    "dots": (toy, "..", ("adapter_name is '..'", "expected letters")),
    "empty name": (toy, "", ("adapter_name is ''", "expected letters")),
    "null in the name": (toy, "a\0b", ("adapter_name is 'a\\x00b'", "expected letters")),
    "not a name": (toy, 3, ("adapter_name is 3", "expected letters")),
    "torch's own name": (toy, "keys", ("adapter_name is 'keys'", "ParameterDict", "choose another")),
    "taken": (trained, "default", ("already an adapter 'default'", "another adapter_name", "delete_adapter")),
    "other weights": (lambda: toy(seed=5), "a", ("another base model", "expected 0.9", "check_base=False")),
    "other widths": (wider, "a", ("lora_A.weight is [4, 16], expected [4, 24]", "for another model")),
    "other depth": (lambda: toy(layers=2), "a", ("has 'base_model.model.layers.2", "does not ask for")),
    "no such modules": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        "a",
        ("adapter_config.json: ", "matches no module"),
    ),
    "biases trained already": (
        lambda: lora.inject(toy(), LoRAConfig(r=2, bias="all"), "first"),
        "a",
        ("bias='lora_only'", "'first' already trains biases", "one adapter can"),
    ),
    "merged": (
        lambda: (model := with_another_adapter(), lora.merge(model))[0],
        "a",
        ("adapters merged", "call lora.unmerge(model)"),
    ),
    "a saved module that is adapted": (
        lambda: lora.inject(toy(), LoRAConfig(r=2, target_modules=["head"]), "first"),
        "a",
        ("modules_to_save names head, which another adapter adapts", "choose one of the two"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "name", "says"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_model_or_name_that_does_not_fit_is_refused_and_nothing_changes(tmp_path, saved, model, name, says):
    folder = copied(saved, tmp_path / "adapter")
    model = model()
    before, there = snapshot(model), files(tmp_path)
    with pytest.raises(LoRAError) as caught:
        lora.load_adapter(model, folder, name)
    for part in says:
        assert part in str(caught.value)
    assert_same(model, before)
    assert files(tmp_path) == there


def test_names_of_the_base_models_help_where_they_differ(tmp_path):
    def named(name: str, **options: Any) -> nn.Module:
        model = toy(**options)
        model.config = type("Config", (), {"_name_or_path": name})()
        return model

    lora.save_adapter(lora.inject(named("org/small"), LoRAConfig(r=2)), tmp_path)
    with pytest.raises(LoRAError, match=r"The adapter was made for 'org/small', this model is '/models/wide'\."):
        lora.load_adapter(named("/models/wide", width=24), tmp_path)


@pytest.mark.parametrize("found", ["nothing", "a file", "an empty directory", "others"])
def test_a_directory_without_an_adapter(tmp_path, saved, found):
    path = tmp_path / "there"
    if found == "a file":
        path.write_text("x")
    elif found != "nothing":
        path.mkdir()
    if found == "others":
        copied(saved, path / "math")
        copied(saved, path / "code")
    says = {
        "nothing": "does not exist, expected a directory with adapter_config.json",
        "a file": "is a file, expected a directory with adapter_config.json",
        "an empty directory": "has no adapter_config.json, expected it beside adapter_model.safetensors.",
        "others": "It has adapters in 'code', 'math': name one.",
    }[found]
    with pytest.raises(LoRAError) as caught:
        lora.load_adapter(toy(), path)
    assert str(path) in str(caught.value) and says in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path, saved, monkeypatch):
    folder = copied(saved, tmp_path / "adapter")

    def refuse(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(LoRAError, match=r"cannot read the adapter in .*Permission denied"):
        lora.load_adapter(toy(), folder)


# Saving


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("defualt", ("there is no adapter 'defualt'", "Did you mean 'default'", "The model has: 'default'")),
        ("../default", ("adapter_name is '../default'", "expected letters")),
        ("/tmp/default", ("adapter_name is '/tmp/default'", "expected letters")),
    ],
)
def test_an_adapter_that_is_not_there_is_not_saved(tmp_path, name, says):
    with pytest.raises(LoRAError) as caught:
        lora.save_adapter(trained(), tmp_path / "adapter", name)
    assert all(part in str(caught.value) for part in says)
    assert not list(tmp_path.iterdir())


def test_a_model_without_adapters_has_nothing_to_save(tmp_path):
    with pytest.raises(LoRAError, match=r"carries no adapters: call lora\.inject"):
        lora.save_adapter(toy(), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("where", "key"),
    [
        (lambda m: m.layers[1].q_proj.lora_B["default"], "base_model.model.layers.1.q_proj.lora_B.weight"),
        (lambda m: m.layers[1].q_proj.lora_magnitude["default"], "layers.1.q_proj.lora_magnitude_vector"),
        (lambda m: m.head.current.weight, "base_model.model.head.weight"),
        (lambda m: m.layers[1].down_proj.bias, "base_model.model.layers.1.down_proj.bias"),
    ],
)
def test_an_adapter_that_diverged_is_not_saved(tmp_path, where, key, value):
    options = {"r": 2, "target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["head"], "use_dora": True}
    model = trained(LoRAConfig(**options))
    lora.save_adapter(model, tmp_path)
    before = files(tmp_path)
    with torch.no_grad():
        where(model).view(-1)[1] = value
    with pytest.raises(LoRAError) as caught:
        lora.save_adapter(model, tmp_path)
    for part in (key, "has 1 of", "not finite", "expected none", "nothing was saved", "earlier checkpoint"):
        assert part in str(caught.value)
    assert files(tmp_path) == before
