"""docs/proof.md keeps its word: the example of a new operation's proof runs, is short, and rejects a wrong backend."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lora.fast
import lora.reference
from lora.testing.explore import MARKERS

PAGE = (Path(__file__).parents[2] / "docs" / "proof.md").read_text()
EXAMPLE = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL).group(1)
IMPORTS = """
from dataclasses import dataclass
from hypothesis import given, strategies as st
from lora.testing import Case, assert_equivalent, exact
from lora.testing.strategies import dtypes, seeds
from proof.laws import Run, both, examples, law_gradients_are_linear_in_dy
"""


def scale_rows(x, gain):
    return x * gain[:, None]


def rough(x, gain):
    return (x.to(torch.bfloat16) * gain[:, None]).to(x.dtype)


def proof() -> dict:
    names: dict = {"__name__": "example"}
    exec(compile(IMPORTS + EXAMPLE, "docs/proof.md", "exec", dont_inherit=True), names)
    return names


def run(device: str) -> None:
    names = proof()
    names["test_both_backends_are_within_the_bound"](device=device)
    for backend in ("reference", "fast"):
        names["test_gradients_are_linear_in_dy"](device=device, backend=backend)


@pytest.fixture
def _with_the_operation(monkeypatch):
    for backend in (lora.reference, lora.fast):
        monkeypatch.setattr(backend, "scale_rows", scale_rows, raising=False)


@pytest.mark.usefixtures("_with_the_operation")
def test_the_example_proves_a_right_operation(device):
    run(device)


@pytest.mark.usefixtures("_with_the_operation")
@pytest.mark.parametrize(
    "wrong", [rough, lambda x, gain: x * gain[:, None].detach(), lambda x, gain: x + 0 * gain[:, None]]
)
def test_the_example_rejects_a_wrong_one(device, monkeypatch, wrong):
    monkeypatch.setattr(lora.fast, "scale_rows", wrong)
    with pytest.raises((AssertionError, ExceptionGroup)):  # Hypothesis groups failures that differ
        run(device)


def test_an_operations_proof_is_under_thirty_lines():
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) < 30


def test_the_figures_have_their_place():
    assert all(PAGE.count(marker) == 1 for marker in MARKERS)
