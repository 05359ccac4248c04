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
    source = "<the example of docs/proof.md>"  # no file's name: Hypothesis would read the page as Python
    exec(compile(IMPORTS + EXAMPLE, source, "exec", dont_inherit=True), names)
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


# what a law's tests are called
LAWS = {
    "linear in scaling": r"the_update_is_linear_in_scaling_and_in_lora_B",
    "tokens, or rows": r"(tokens|rows|sequences)_do_not_see_each_other",
    "a batch is its parts": r"a_batch_is_its_parts",
    "padded with zeros": r"(ranks_can_be_padded|the_basis_and_the_number_of_ranks)",
    "padded with tokens": r"silent_(tokens|rows|sequences)_teach_nothing",
    "A → QA": r"the_basis_(of|and)",
    "merged is adapted": r"(merged_is_adapted|merged_down_is_adapted|a_merged_model_is_the_adapted_one)",
    "several adapters": r"(several_adapters|each_row_is_lora_linear_with_its_adapter|two_adapters_merge)",
    "an NF4 weight": r"(an_)?nf4_",
    "twice dy": r"(gradients_are_linear_in_dy|twice_the_gradient_of_the_loss_is_twice_every_gradient)",
    "a gradient does not depend": r"a_gradient_does_not_depend_on_who_else_wants_one",
    "memory layout": r"memory_layout_does_not_matter",
    "leading dimensions": r"leading_dimensions",
    "two runs": r"two_runs_are_the_same_bits",
    "finite differences": r"gradients_are_those_of_finite_differences",
}


def test_every_operation_has_the_laws_that_the_page_says():
    """A tick is a test of both backends in the operation's file, a dash is none; at least ten laws where they apply."""
    lines = re.search(r"^\| law \|.*?\n\n", PAGE, re.DOTALL | re.MULTILINE).group(0).strip().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rows) == len(LAWS)
    sources = {name: (Path(__file__).parent / f"test_{name}.py").read_text() for name in head[1:]}
    for (law, pattern), (title, *cells) in zip(LAWS.items(), rows, strict=True):
        assert title.startswith(law)
        for name, cell in zip(head[1:], cells, strict=True):
            found = re.search(rf"@both\n(@.*\n)*(\s+.*\n)*def test_{pattern}", sources[name])
            assert bool(found) == (cell == "✓"), (title, name)
    ticks = {name: sum(row[1 + i] == "✓" for row in rows) for i, name in enumerate(head[1:])}
    assert all(count >= 10 for name, count in ticks.items() if name not in ("norm", "rope", "merge")), ticks


def test_the_figures_have_their_place():
    assert all(PAGE.count(marker) == 1 for marker in MARKERS)
