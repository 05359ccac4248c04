"""The one chooser: backends by name, operations by name, and what `explain` says."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny import toy

import lora
from lora import LoRAConfig, LoRAError, UnsupportedError
from lora.dispatch import BACKENDS, OPERATIONS


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    monkeypatch.delenv("LORA_BACKEND", raising=False)


def test_the_default_is_the_reference():
    assert lora.get_backend() == "reference"
    assert lora.ops.lora_linear is lora.reference.lora_linear


@pytest.mark.parametrize("name", BACKENDS)
def test_the_environment_sets_the_default(monkeypatch, name):
    monkeypatch.setenv("LORA_BACKEND", name)
    assert lora.get_backend() == name


def test_use_backend_sets_and_restores():
    with lora.use_backend("auto") as name:
        assert name == lora.get_backend() == "auto"
        with lora.use_backend("reference"):
            assert lora.get_backend() == "reference"
        assert lora.get_backend() == "auto"
    assert lora.get_backend() == "reference"


def test_fast_never_lies():
    with pytest.raises(UnsupportedError, match=r"not built yet.*LORA_BACKEND=reference"):
        lora.use_backend("fast")
    assert lora.get_backend() == "reference"


def test_the_environment_cannot_make_fast_lie(monkeypatch):
    monkeypatch.setenv("LORA_BACKEND", "fast")
    with pytest.raises(UnsupportedError, match="not built yet"):
        lora.inject(toy(), LoRAConfig(r=2))


@pytest.mark.parametrize("name", ["Fast", "triton", "auto ", ""])
def test_a_wrong_backend_lists_the_right_ones(monkeypatch, name):
    with pytest.raises(LoRAError, match=r"use_backend names the backend .*'reference', 'fast', 'auto'"):
        lora.use_backend(name)
    if name:
        monkeypatch.setenv("LORA_BACKEND", name)
        with pytest.raises(LoRAError, match="LORA_BACKEND names the backend"):
            lora.get_backend()


def test_every_operation_is_there_and_no_other():
    assert dir(lora.ops) == sorted(OPERATIONS)
    for name in OPERATIONS:
        assert callable(getattr(lora.ops, name))
    with pytest.raises(AttributeError, match=r"no operation 'lora_liner'\. Did you mean 'lora_linear'"):
        _ = lora.ops.lora_liner


def test_explain_names_every_adapted_module_and_the_reason():
    model = lora.inject(toy(layers=1), LoRAConfig(r=2))
    text = lora.explain(model)
    assert text.splitlines()[0] == "backend: reference"
    assert [line.split()[0] for line in text.splitlines()[1:]] == [f"layers.0.{n}_proj" for n in ("q", "v", "down")]
    with lora.use_backend("auto"):
        assert "not built yet" in lora.explain(model)


def test_import_is_light():
    """`import lora` brings in neither transformers nor triton, and torch is most of its time."""
    code = "import sys, torch; before = set(sys.modules); import lora; print(*sorted(set(sys.modules) - before))"
    added = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {name.split(".")[0] for name in added} & {
        "transformers", "triton", "trl", "datasets", "accelerate", "gguf", "peft", "matplotlib", "rich", "yaml", "hypothesis",
    }  # fmt: skip
    assert not heavy
    assert "lora" in added
