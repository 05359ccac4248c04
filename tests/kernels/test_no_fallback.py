"""A kernel that does not compile is an error of the operation that launches it: no plain form of it is tried."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest

import lora
from lora.fast import kernels
from lora.fast.support import reasons
from lora.projection import Dropout
from lora.testing.block_cases import LayerNormInput, LossInput, MultiLoRAInput, RMSNormInput, RopeInput
from lora.testing.cases import Layer, LinearInput, MLPInput
from lora.testing.proof import Case, build

CASES: dict[str, Case] = {
    "gated_forward_kernel": MLPInput(),
    "norm_forward_kernel": RMSNormInput(),
    "layer norm": LayerNormInput(),
    "rope_kernel": RopeInput(),
    "cross_entropy_kernel": LossInput(),
    "skinny_kernel": LinearInput(dropout=Dropout(0.3, 7)),
    "dropout_forward_kernel": LinearInput(layer=Layer(16, 3, dora=True), dropout=Dropout(0.3, 7)),
    "dora_norm_kernel": LinearInput(layer=Layer(16, 3, dora=True)),
    "nf4_dequantize_kernel": LinearInput(layer=Layer(16, 3, nf4=True)),
    "shrink_kernel": MultiLoRAInput(),
}


class CompilationError(Exception):
    """As Triton's, when ptxas gives up."""


@pytest.fixture
def _nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise CompilationError("ptxas fatal")

    for found in pkgutil.iter_modules(kernels.__path__):
        for name, function in vars(importlib.import_module(f"{kernels.__name__}.{found.name}")).items():
            if name.endswith("_kernel") and hasattr(function, "fn"):
                monkeypatch.setattr(function, "run", fails, raising=False)


@pytest.mark.usefixtures("_nothing_compiles")
@pytest.mark.parametrize("backend", ["fast", "auto"])
@pytest.mark.parametrize("name", list(CASES))
def test_an_operation_without_its_kernel_raises(monkeypatch, device, backend, name):
    case = CASES[name]
    arguments = build(case, device)
    assert not reasons(arguments.values())
    monkeypatch.setattr(lora.reference, case.operation, lambda *_, **__: pytest.fail("the reference ran"))
    with lora.use_backend(backend), pytest.raises(CompilationError, match="ptxas"):
        getattr(lora.ops, case.operation)(**arguments)
