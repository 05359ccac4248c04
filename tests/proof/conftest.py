"""The proofs run the same way everywhere: on a GPU where there is one, else in plain torch, or with TRITON_INTERPRET=1
in Triton's interpreter (a process of its own: Triton reads the variable once).

Each worker's ledger (how much of the bounds right results used, and how many examples each file tried) goes to
LORA_PROOF_LEDGER, a directory, if that is set.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.fast.workspace import release_workspaces
from lora.testing import LEDGER

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products on a GPU ask for
# PyTorch lets cuBLAS add parts of a product up in 16 bits; the bounds are those of sums in float32 (docs/numerics.md).
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """An element that nobody writes is NaN, and fails every comparison."""
    release_workspaces()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


TRIED: Counter[str] = Counter()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Counts the examples of each test that Hypothesis runs, and one for every other."""
    inner = getattr(getattr(item.obj, "hypothesis", None), "inner_test", None)
    topic = item.path.stem.removeprefix("test_")
    if inner is None:
        TRIED[topic] += 1
        yield
        return

    @functools.wraps(inner)
    def counted(*arguments: Any, **options: Any) -> Any:
        TRIED[topic] += 1
        return inner(*arguments, **options)

    item.obj.hypothesis.inner_test = counted
    yield
    item.obj.hypothesis.inner_test = inner


def pytest_sessionfinish() -> None:
    directory = os.environ.get("LORA_PROOF_LEDGER")
    if directory and (LEDGER.rows or TRIED):
        LEDGER.save(Path(directory) / f"{os.getpid()}.json")
        (Path(directory) / f"{os.getpid()}.cases").write_text(json.dumps(TRIED))
