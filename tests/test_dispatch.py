"""The one chooser: backends by name, operations by name, and what `explain` says."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import toy

import lora
import lora.fast
from lora import LoRAConfig, LoRAError, UnsupportedError
from lora.dispatch import BACKENDS, OPERATIONS
from lora.fast import support
from lora.fast.support import reasons
from lora.projection import Projection


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


def strange() -> tuple[torch.Tensor, Projection]:
    """A projection that only the reference can run: its x is of a type the kernels do not know."""
    x = torch.randn(3, 4, dtype=torch.complex64).real.to(torch.float8_e4m3fn)
    return x, Projection(torch.randn(2, 4))


def test_fast_never_lies(monkeypatch):
    monkeypatch.setattr(lora.reference, "lora_linear", lambda *_, **__: "the reference ran")
    with (
        lora.use_backend("fast"),
        pytest.raises(UnsupportedError, match=r"cannot run lora_linear: a tensor is torch\.float8"),
    ):
        lora.ops.lora_linear(*strange())
    with (
        lora.use_backend("auto"),
        pytest.warns(UserWarning, match=r"lora_linear runs on the reference backend: .*float8"),
    ):
        assert lora.ops.lora_linear(*strange()) == "the reference ran"
    with lora.use_backend("auto"), warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert lora.ops.lora_linear(*strange()) == "the reference ran"


def test_every_reason_is_named():
    x, projection = strange()
    found = reasons([x, projection._replace(bias=torch.empty(2, dtype=torch.float8_e5m2))])
    assert len(found) == 2 and "e4m3fn" in found[0] and "e5m2" in found[1]


class DTensor(torch.Tensor):
    """What `torch.distributed.tensor.DTensor` looks like from outside: a tensor class of that name."""


def test_a_sharded_tensor_is_refused_by_name():
    x, projection = torch.randn(3, 4), Projection(torch.randn(2, 4).as_subclass(DTensor))
    with lora.use_backend("fast"), pytest.raises(UnsupportedError, match="a tensor is a DTensor: gather it"):
        lora.ops.lora_linear(x, projection)


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on a GPU: only its device is looked at."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("installed", "capability", "expected"),
    [
        (True, (9, 0), []),
        (False, (9, 0), ["cuda:0 needs Triton, which is not installed: pip install triton"]),
        (True, (7, 5), ["cuda:0 has compute capability (7, 5): the kernels need (8, 0) or newer"]),
        (False, (7, 5), ["needs Triton", "compute capability"]),
        (True, (12, 0), []),  # newer than any that kernels are compiled for in the tests: Triton compiles for it
        (True, "gfx942:sramecc+:xnack-", []),
        (True, "gfx1100", ["cuda:0 is a gfx1100: of ROCm devices the kernels are checked for gfx942 only"]),
        (True, "gfx90a:sramecc+", ["cuda:0 is a gfx90a: of ROCm"]),
        (False, "gfx1100", ["needs Triton", "gfx1100"]),
    ],
)
def test_what_a_gpu_lacks_is_named(monkeypatch, installed, capability, expected):
    pretend(monkeypatch, capability)
    monkeypatch.setattr(support, "_fine", set())
    monkeypatch.setattr(support, "triton_installed", lambda: installed)
    found = reasons([torch.randn(3).as_subclass(OnGPU)])
    assert len(found) == len(expected) and all(part in reason for part, reason in zip(expected, found, strict=True))
    support.device_reasons.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, gpu: tuple[int, int] | str) -> None:
    """A GPU of NVIDIA with this compute capability, or of AMD with this name."""
    support.device_reasons.cache_clear()
    is_rocm = isinstance(gpu, str)
    properties = SimpleNamespace(gcnArchName=gpu)
    monkeypatch.setattr(torch.version, "hip", "6.4" if is_rocm else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (11, 0) if is_rocm else gpu)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)


@pytest.mark.parametrize(
    ("gpu", "tiles"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),  # 99 KiB of shared memory a block
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_80"),  # 99 KiB again, and no tiles of its own: those that fit everywhere
        ("gfx942:sramecc+:xnack-", "gfx942"),
        ((7, 5), r"cuda:0 has compute capability \(7, 5\)"),
        ("gfx1100", "cuda:0 is a gfx1100: .* for gfx942 only. Use LORA_BACKEND=reference"),
    ],
)
def test_tiles_are_chosen_for_known_gpus_only(monkeypatch, gpu, tiles):
    from lora.fast.kernels import gemm

    pretend(monkeypatch, gpu)
    device = torch.device("cuda", 0)
    if tiles in gemm.WIDE_TILES:
        assert gemm.architecture.__wrapped__(device) == tiles
    else:
        with pytest.raises(UnsupportedError, match=tiles):
            gemm.architecture.__wrapped__(device)
    support.device_reasons.cache_clear()


def test_auto_runs_the_fast_operation_where_it_can(monkeypatch):
    monkeypatch.setattr(lora.fast, "lora_linear", lambda *_, **__: "fast ran")
    for name in ("auto", "fast"):
        with lora.use_backend(name):
            assert lora.ops.lora_linear(torch.randn(3, 4), Projection(torch.randn(2, 4))) == "fast ran"


@pytest.mark.parametrize("backend", ["fast", "auto"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kernel_that_does_not_compile_is_an_error_and_no_fallback(monkeypatch, backend, operation):
    """What was not refused beforehand runs, or raises what it raised: nothing else is tried."""

    class CompilationError(Exception):
        pass

    def fails(*_, **__):
        raise CompilationError("ptxas fatal: (C7907) Internal compiler error")

    monkeypatch.setattr(lora.fast, operation, fails)
    monkeypatch.setattr(lora.reference, operation, lambda *_, **__: pytest.fail("the reference ran"))
    with lora.use_backend(backend), warnings.catch_warnings(), pytest.raises(CompilationError, match="ptxas"):
        warnings.simplefilter("error")
        getattr(lora.ops, operation)(torch.randn(3, 4), Projection(torch.randn(2, 4)))


def test_the_backends_are_twins():
    """Same names, same signatures, and a file of the same name for each topic."""
    assert lora.fast.__all__ == lora.reference.__all__
    for name in lora.reference.__all__:
        twins = [inspect.signature(getattr(backend, name)) for backend in (lora.reference, lora.fast)]
        assert str(twins[0]) == str(twins[1]), name
    files = [{p.name for p in Path(b.__file__).parent.glob("*.py")} for b in (lora.reference, lora.fast)]
    assert files[0] <= files[1]


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
        rows = [line.split(maxsplit=3) for line in lora.explain(model).splitlines()[1:]]
        assert all(row[1:3] == ["LoRALinear", "fast"] and "fast can" in row[3] for row in rows[:-1])
        assert "not fused" in rows[-1][-1]
        lora.for_training(model)
        assert "not fused" not in lora.explain(model)


def test_explain_tells_merged_and_resting_layers_and_saved_modules():
    model = lora.inject(toy(layers=1), LoRAConfig(r=2, modules_to_save=["head"], target_modules=["q_proj"]), "a")
    lora.add_adapter(model, LoRAConfig(r=2, target_modules=["v_proj"]), "b")
    text = lora.explain(model)
    assert "layers.0.v_proj  LoRALinear   reference  chosen; no active adapter here" in text
    assert "head             SavedModule  its own    trained in full" in text
    lora.merge(model)
    assert "chosen; a merged: the base product alone" in lora.explain(model)


def test_import_is_light():
    """`import lora` brings in neither transformers nor triton, and torch is most of its time."""
    code = "import sys, torch; before = set(sys.modules); import lora; print(*sorted(set(sys.modules) - before))"
    added = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {name.split(".")[0] for name in added} & {
        "transformers", "triton", "trl", "datasets", "accelerate", "gguf", "peft", "matplotlib", "rich", "yaml",
    }  # fmt: skip
    assert not heavy
    assert "lora" in added
