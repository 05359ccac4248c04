"""GGUF's cache, which is never torn, and damaged or unsupported files, which are never half loaded."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gguf import Change, llama, write

import lora
from lora import gguf_file, gguf_loader

IDS = torch.tensor([[1, 4, 2, 8, 5, 7, 1, 3]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.gguf", llama())


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories converted into, while the test runs."""
    done: list[Path] = []
    convert = gguf_loader.convert

    def counted(path: Path, directory: Path) -> None:
        done.append(directory)
        convert(path, directory)

    monkeypatch.setattr(gguf_loader, "convert", counted)
    return done


def test_a_file_is_converted_once(path, cache, conversions):
    first, _ = lora.load(path)
    second, _ = lora.load(path)
    lora.load(shutil.copy2(path, path.with_name("copy.gguf")))  # the same contents and time under another name
    assert len(conversions) == 1
    assert torch.equal(first(IDS).logits, second(IDS).logits)
    (entry,) = cache.iterdir()
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert expected <= {file.name for file in entry.iterdir()}
    assert torch.equal(lora.load(entry)[0](IDS).logits, first(IDS).logits)  # an ordinary directory


def test_another_content_is_another_entry(path, cache, conversions, monkeypatch):
    monkeypatch.setattr(gguf_loader, "FINGERPRINT_BYTES", 64)  # of a file of a million, far less
    before, _ = lora.load(path)
    data = bytearray(path.read_bytes())
    data[-8:] = b"\0" * 8
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the same size and time
    after, _ = lora.load(path)
    assert len(conversions) == len(list(cache.iterdir())) == 2
    assert any(not torch.equal(one, other) for one, other in zip(before.parameters(), after.parameters(), strict=True))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    lora.load(path)
    assert len(conversions) == 3


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


TORN = {
    "weights cut": lambda entry: cut(entry / "model.safetensors"),
    "config empty": lambda entry: (entry / "config.json").write_text(""),
    "tokenizer gone": lambda entry: (entry / "tokenizer.json").unlink(),
    "manifest gone": lambda entry: (entry / gguf_loader.MANIFEST).unlink(),
    "manifest cut": lambda entry: cut(entry / gguf_loader.MANIFEST),
    "manifest of another kind": lambda entry: (entry / gguf_loader.MANIFEST).write_text("[]"),
    "all gone": lambda entry: [file.unlink() for file in entry.iterdir()],
}


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_entry_is_made_again(path, cache, conversions, torn):
    expected, _ = lora.load(path)
    expected_logits = expected(IDS).logits
    (entry,) = cache.iterdir()
    TORN[torn](entry)
    model, _ = lora.load(path)
    assert len(conversions) == 2
    assert torch.equal(model(IDS).logits, expected_logits)
    assert list(cache.iterdir()) == [entry] and gguf_loader.is_whole(entry)
    lora.load(path)
    assert len(conversions) == 2


def test_a_failed_conversion_leaves_nothing(path, cache, monkeypatch):
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_loader, "write_safetensors", fail)
        with pytest.raises(KeyboardInterrupt):
            lora.load(path)
    assert list(cache.iterdir()) == []
    lora.load(path)


def test_what_a_killed_process_left_is_never_taken_and_is_removed_after_a_day(path, cache):
    for name, age in ((".unfinished-old", 2 * gguf_loader.STALE_SECONDS), (".unfinished-young", 60)):
        (cache / name).mkdir(parents=True)
        (cache / name / "config.json").write_text("{}")
        os.utime(cache / name, (time.time() - age,) * 2)
    lora.load(path)
    assert sorted(entry.name for entry in cache.iterdir())[0] == ".unfinished-young"
    assert len(list(cache.iterdir())) == 2


def test_two_processes_at_once_are_fine(path, cache, monkeypatch):
    """The second comes while the first converts, finishes before it, and is not disturbed by it."""
    convert, entries = gguf_loader.convert, []

    def interrupted(source: Path, directory: Path) -> None:
        convert(source, directory)
        monkeypatch.setattr(gguf_loader, "convert", convert)
        with gguf_loader.converted(source) as theirs:
            entries.append((theirs, (theirs / "model.safetensors").stat().st_ino))

    monkeypatch.setattr(gguf_loader, "convert", interrupted)
    with gguf_loader.converted(path) as ours:
        assert entries == [(ours, (ours / "model.safetensors").stat().st_ino)]
    assert list(cache.iterdir()) == [ours]


@pytest.mark.parametrize("fault", ["not a directory", "disk full"])
def test_without_a_cache_a_file_loads_with_one_warning(path, cache, monkeypatch, fault):
    expected, _ = lora.load(path)
    shutil.rmtree(cache.parent)
    if fault == "not a directory":
        cache.parent.write_text("a file")
    else:
        write_safetensors = gguf_loader.write_safetensors

        def full(output: Any, *rest: Any) -> None:
            if "unfinished" in output.name:
                raise OSError(28, "No space left on device")
            write_safetensors(output, *rest)

        monkeypatch.setattr(gguf_loader, "write_safetensors", full)
    with pytest.warns(UserWarning, match="set LORA_CACHE to a writable directory") as seen:
        model, tokenizer = lora.load(path)
    assert len(seen) == 1 and seen[0].filename == __file__
    assert torch.equal(model(IDS).logits, expected(IDS).logits) and tokenizer("ab")["input_ids"]
    assert not cache.is_dir() or list(cache.iterdir()) == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "a"))
    assert gguf_loader.cache_root() == tmp_path / "a"
    monkeypatch.delenv("LORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert gguf_loader.cache_root() == tmp_path / "b" / "lora-twin"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert gguf_loader.cache_root() == tmp_path / "c" / ".cache" / "lora-twin"


# ---- damaged and unsupported files -----------------------------------------------------------------------------


def without(*keys: str) -> Change:
    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        for key in keys:
            metadata.pop(key, None)
            tensors.pop(key, None)

    return change


def with_values(**values: Any) -> Change:
    """Metadata by key, dots written as two underscores; a tensor replaces the one of that name."""

    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        for key, value in values.items():
            where = tensors if isinstance(value, torch.Tensor) else metadata
            where[key.replace("__", ".")] = value

    return change


UNSUPPORTED = {
    "architecture": (with_values(general__architecture="mamba"), "architecture 'mamba'.*supports llama, qwen2, qwen3"),
    "experts": (with_values(llama__expert_count=8), "llama.expert_count is 8.*mixture of experts"),
    "sliding window": (with_values(llama__attention__sliding_window=64), "sliding window"),
    "parts": (with_values(split__count=3), "one of 3 parts. Join them first"),
    "no head count": (without("llama.attention.head_count"), "llama.attention.head_count = None, expected a number"),
    "head count is text": (with_values(llama__attention__head_count="4"), "head_count = '4', expected a number"),
    "no epsilon": (without("llama.attention.layer_norm_rms_epsilon"), "layer_norm_rms_epsilon = None"),
    "epsilon is infinite": (
        with_values(llama__attention__layer_norm_rms_epsilon=float("inf")), "= inf, expected a number"),
    "partial rotation": (with_values(llama__rope__dimension_count=4), "rotates 4 of 8 head dimensions"),
    "rope kind": (with_values(llama__rope__scaling__type="longrope"), "RoPE scaling 'longrope'; none, linear and yarn"),
    "rope divisors": (with_values(rope_freqs__weight=torch.tensor([1.0, 2.0, 3.0, 4.0])), "is not Llama 3's scaling"),
    "rope divisors' number": (with_values(rope_freqs__weight=torch.ones(9)), "is not Llama 3's scaling"),
    "tokenizer kind": (with_values(tokenizer__ggml__model="bert"), "tokenizer of type 'bert'.*'gpt2' and 'llama'"),
    "no tokens": (without("tokenizer.ggml.tokens"), "with 0 tokens"),
    "pre-tokenizer": (with_values(tokenizer__ggml__pre="tekken"), "pre-tokenizer 'tekken'; gpt-2, smollm, llama-bpe"),
    "no pre-tokenizer": (without("tokenizer.ggml.pre"), "pre-tokenizer None"),
    "a tensor more": (
        with_values(blk__0__ffn_gate_inp__weight=torch.ones(2, 32)), "'blk.0.ffn_gate_inp.weight' is not part"),
    "a tensor less": (
        without("blk.1.ffn_up.weight"), "1 of the tensors do not fit .*layers.1.mlp.up_proj.weight is absent"),
    "no embedding": (without("token_embd.weight"), "has no tensor 'token_embd.weight'"),
    "another shape": (
        with_values(blk__1__ffn_up__weight=torch.ones(63, 32)),
        r"up_proj.weight is \(63, 32\) and should be \(64, 32\)"),
    "more layers said": (with_values(llama__block_count=3), "9 of the tensors do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_cannot_be_loaded_faithfully_is_refused(tmp_path, cache, case):
    change, message = UNSUPPORTED[case]
    path = write(tmp_path / "m.gguf", llama(), change=change)
    with pytest.raises(lora.LoRAError, match=message) as error:
        lora.load(path)
    assert "\n" not in str(error.value) and "m.gguf" in str(error.value)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("number", "name"), [(24, "I8"), (4, "unknown to it"), (999, "unknown to it")])
def test_a_tensor_type_that_cannot_be_decoded_is_named(path, number, name):
    data = path.read_bytes()
    at = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 2 * 8
    assert int.from_bytes(data[at : at + 4], "little") == 0
    path.write_bytes(data[:at] + number.to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(lora.LoRAError, match=rf"'blk\.0\.ffn_up\.weight' has ggml type {number} \({name}\)"):
        lora.load(path)


def test_a_name_given_twice_is_damage(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"))
    with pytest.raises(lora.LoRAError, match="1 of its tensors have another one's name"):
        lora.load(path)


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_another_version_is_refused(path, version):
    data = path.read_bytes()
    path.write_bytes(data[:4] + version.to_bytes(4, "little") + data[8:])
    with pytest.raises(lora.LoRAError, match=f"GGUF version {version}; little-endian versions 2 and 3"):
        lora.load(path)


def test_a_file_cut_anywhere_is_torn(path, tmp_path):
    data = path.read_bytes()
    header = data.index(b"rope.freq_base")
    lengths = [4, 10, 23, 30, header, len(data) // 3, len(data) // 2, len(data) - 2000, len(data) - 1]
    for length in sorted({*lengths, *range(0, len(data), len(data) // 40)}):
        part = tmp_path / "part.gguf"
        part.write_bytes(data[:length])
        with pytest.raises(lora.LoRAError, match=r"is torn|is not a GGUF file"):
            gguf_file.read_gguf(part)
    with pytest.raises(lora.LoRAError, match=r"part\.gguf is torn: .* Download or copy it again"):
        lora.load(part)


def test_flipped_bytes_are_refused_or_read_never_a_crash(path, tmp_path):
    """Random damage to the header: what still reads as GGUF may load, everything else is a LoRAError."""
    data = path.read_bytes()
    header = data.index(b"output_norm.weight")
    dice = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(dice.choice([1, 1, 4])):
            damaged[dice.randrange(4, header)] = dice.randrange(256)
        file = tmp_path / "damaged.gguf"
        file.write_bytes(damaged)
        try:
            gguf_loader.check_architecture(gguf_file.read_gguf(file))
        except lora.LoRAError as error:
            refused += 1
            assert "damaged.gguf" in str(error)
    assert refused > 30


def test_an_odd_value_anywhere_is_one_line(path, tmp_path):
    """Every metadata value in turn replaced by one of another kind, through the whole of `load`."""
    values = [-1, "text", [1, 2], 0, 2**31]
    keys = list(gguf_file.read_gguf(path).metadata)
    for number, key in enumerate(keys):
        value = values[number % len(values)]
        if key == "general.architecture":
            continue

        def change(metadata: dict[str, Any], _: dict[str, Any], key: str = key, value: Any = value) -> None:
            metadata[key] = abs(value) if isinstance(value, int) else value

        file = write(tmp_path / "odd.gguf", llama(), change=change)
        try:
            lora.load(file)
        except lora.LoRAError as error:
            assert "\n" not in str(error)


def test_manifest_names_the_source(path, cache):
    lora.load(path)
    (entry,) = cache.iterdir()
    assert json.loads((entry / gguf_loader.MANIFEST).read_text())["source"] == "tiny.gguf"
