"""The house rules that code can check: who may import whom, sizes, and names."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import lora
import lora.reference
from lora.dispatch import OPERATIONS

ROOT = Path(lora.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
VERBS = {"__init__", "inject", "merge", "modes", "quantize"}  # they act on models, and know of adapters
OP_FILES = [path for path in sorted((ROOT / "reference").glob("*.py")) if path.stem not in VERBS]
REPORTERS = {"nursery.py"}  # what a mutant raises when it is imported is its result
NEUTRAL = {"lora.errors", "lora.projection", "lora.nf4_format"}  # small tuples, errors, constants


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", OP_FILES, ids=lambda p: p.stem)
def test_reference_operations_import_torch_and_siblings_only(path):
    ours = {name for name in imports(path) if name.split(".")[0] == "lora"}
    assert {name for name in ours if not any(name.startswith(n) for n in (*NEUTRAL, "lora.reference"))} == set()
    assert not {"transformers", "triton", "peft"} & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_have_one_subject_and_functions_fit_on_a_screen(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node, clean=False) or ""
            assert node.end_lineno - node.lineno + 1 - docstring.count("\n") <= 60, node.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_pickled_and_no_exception_is_swallowed(path):
    tree = ast.parse(path.read_text())
    assert not {"pickle", "torch.load", "torch.save"} & imports(path)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ExceptHandler)
            and (
                node.type is None
                or (isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"})
            )
            and path.name not in REPORTERS
        ):
            assert any(isinstance(n, ast.Raise) for n in ast.walk(node)), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert ast.unparse(node.func) not in {"torch.load", "torch.save"}, f"{path.name}:{node.lineno}"


def test_the_public_api_is_small_documented_and_complete():
    assert len(lora.__all__) <= 30
    for name in lora.__all__:
        assert getattr(lora, name).__doc__, name


def test_the_reference_has_every_operation_with_a_documented_signature():
    assert set(OPERATIONS) <= set(lora.reference.__all__)
    for name in lora.reference.__all__:
        function = getattr(lora.reference, name)
        assert inspect.getdoc(function), name
        assert all(p.annotation is not p.empty for p in inspect.signature(function).parameters.values()), name
