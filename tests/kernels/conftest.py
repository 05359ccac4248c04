"""The kernel tests run the real Triton kernels: compiled where there is a GPU, else in the interpreter, and everywhere
in the interpreter with TRITON_INTERPRET=1.

Triton reads that variable when a kernel's module is imported, so these tests need a process of their own:
`pytest tests/kernels`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
if not ON_GPU:
    if "triton.language" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "Triton was imported before the kernel tests could ask for its interpreter: run `pytest tests/kernels` on "
            "its own, or set TRITON_INTERPRET=1 yourself."
        )
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products on a GPU ask for
# PyTorch lets cuBLAS add parts of a product up in 16 bits; the bounds are those of sums in float32 (docs/numerics.md).
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(scope="session")
def roundoff(device: str) -> Callable[[torch.dtype], float]:
    """The largest relative error of one rounding to a dtype.

    The interpreter cuts float32 off to bfloat16 where a GPU rounds to nearest, which doubles it.
    """

    def of(dtype: torch.dtype) -> float:
        cut_off = device == "cpu" and dtype == torch.bfloat16
        return torch.finfo(dtype).eps * (1 if cut_off else 0.5)

    return of


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """An element that no program writes is NaN, and fails every comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
