"""The compile harness reads what it says it reads: each figure is provoked by a kernel written to have it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from lora.errors import LoRAError
from lora.fast.kernels import compile_check
from lora.fast.kernels.compile_check import MATRIX_KINDS, POINTER, TARGETS, KernelSpec, compile_for, spec_of


@triton.jit
def double(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, 2 * tl.load(x_ptr + offsets, mask=offsets < count), mask=offsets < count)


@triton.jit
def add_up(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))


@triton.jit
def center(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, x - tl.sum(x))


@triton.jit
def square_product(x_ptr, y_ptr, COLUMNS, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)[:, None] * COLUMNS + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, tl.dot(x, x))


def doubling(block: int = 2048, divisible: tuple[str, ...] = ("x_ptr", "y_ptr", "count")) -> KernelSpec:
    signature = {"x_ptr": POINTER[torch.bfloat16], "y_ptr": POINTER[torch.bfloat16], "count": "i32"}
    return KernelSpec("double", double, signature, {"BLOCK": block}, divisible=divisible)


def product() -> KernelSpec:
    signature = {"x_ptr": "*bf16", "y_ptr": "*fp32", "COLUMNS": "i32"}
    return KernelSpec("product", square_product, signature, {"BLOCK": 128}, divisible=tuple(signature))


def centring(block: int) -> KernelSpec:
    """Holds block / 32 numbers a thread, of which a thread has 255 on NVIDIA."""
    return KernelSpec("center", center, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"BLOCK": block}, num_warps=1)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_streaming_kernel(target: str) -> None:
    report = compile_for(doubling(), target)
    assert report.sass is not None and ".version" in report.assembly
    assert report.count("LDG.E.128") == report.count("STG.E.128") == 2  # 2048 elements / 128 threads / 8 in 128 bits
    assert 8 <= report.registers <= 40
    assert (report.spills, report.stack_bytes, report.shared_bytes, report.atomics) == (0, 0, 0, 0)
    assert report.matrix_instruction == ""
    assert 20 < report.instructions < 200


def test_without_divisibility_loads_are_narrow() -> None:
    report = compile_for(doubling(divisible=()), "sm_90")
    assert report.count("LDG.E.128") == 0
    assert report.count("LDG") > 2


@pytest.mark.parametrize(("target", "kind"), [("sm_80", 0), ("sm_90", 1), ("sm_100", 2), ("gfx942", 3)])
def test_matrix_instructions_of_each_generation(target: str, kind: int) -> None:
    report = compile_for(product(), target)
    assert report.matrix_instruction == MATRIX_KINDS[kind]
    assert report.shared_bytes > 0
    assert report.atomics == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_spills_are_seen(target: str) -> None:
    spilling, fitting = compile_for(centring(16384), target), compile_for(centring(2048), target)
    assert spilling.spills > 0 and spilling.stack_bytes > 0
    assert fitting.spills == 0 and fitting.registers >= 2048 // 64


def test_spills_are_seen_on_amd() -> None:  # a kernel that spills there compiles for a minute: read a report instead
    kernel = compile_check._compile(centring(2048), "gfx942")
    text = kernel.asm["amdgcn"].replace(".vgpr_spill_count: 0", ".vgpr_spill_count: 7")
    stand_in = SimpleNamespace(asm={"amdgcn": text}, metadata=kernel.metadata)
    assert compile_check._read(centring(2048), "gfx942", stand_in).spills == 7
    assert compile_for(centring(2048), "gfx942").spills == 0


@pytest.mark.parametrize("target", TARGETS)
def test_atomics_are_seen(target: str) -> None:
    spec = KernelSpec("add", add_up, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"BLOCK": 256})
    assert compile_for(spec, target).atomics >= 1


def test_amd_report() -> None:
    report = compile_for(doubling(), "gfx942")
    assert report.sass is None and "amdgcn" in report.assembly
    assert report.count("global_load_dwordx4") + report.count("buffer_load_dwordx4") > 0
    assert 4 <= report.registers <= 64 and report.spills == 0


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (32, 0, 4, 1.0),
        (33, 0, 4, 0.75),  # 40 registers a thread: 12 warps a quarter
        (255, 0, 4, 0.125),  # 256: 2 warps a quarter, 8 in all
        (16, 100 * 1024, 8, 0.25),  # two blocks by shared memory
        (16, 0, 1, 0.5),  # 32 blocks of one warp
        (168, 226 * 1024, 8, 0.125),
    ],
)
def test_occupancy(registers: int, shared: int, warps: int, expected: float) -> None:
    report = compile_for(doubling(), "sm_90")
    assert replace(report, registers=registers, shared_bytes=shared, num_warps=warps).occupancy == expected


def test_count_matches_whole_parts() -> None:
    report = compile_for(doubling(), "sm_90")
    known = replace(report, opcodes=report.opcodes.__class__({"LDG.E.128.CONSTANT": 3, "LDGSTS.E.128": 5, "LDG.E": 7}))
    assert (known.count("LDG"), known.count("LDG.128"), known.count("LDGSTS"), known.count("LD")) == (10, 3, 5, 0)


def test_a_report_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_for(doubling(1024), "sm_90")
    monkeypatch.setattr(compile_check, "_compile", lambda *_: pytest.fail("compiled again"))
    assert compile_for(doubling(1024), "sm_90") is first


def test_specs_that_do_not_fit_are_refused() -> None:
    spec = doubling()
    with pytest.raises(LoRAError, match="'sm_75', expected one of sm_80"):
        compile_for(spec, "sm_75")
    with pytest.raises(LoRAError, match=r"missing \['BLOCK'\]"):
        compile_for(replace(spec, constexprs={}), "sm_90")
    with pytest.raises(LoRAError, match=r"unknown or given twice \['block'\]"):
        compile_for(replace(spec, constexprs={"BLOCK": 64, "block": 64}), "sm_90")
    with pytest.raises(LoRAError, match="32 warps, 2048 threads on gfx942, expected at most 1024"):
        compile_for(replace(spec, num_warps=32), "gfx942")
    assert compile_for(replace(spec, num_warps=32), "sm_90").num_warps == 32
    with pytest.raises(LoRAError, match=r"unknown or given twice \['z_ptr'\]"):
        compile_for(replace(spec, divisible=("z_ptr",)), "sm_90")


@triton.jit(do_not_specialize=["seed"])
def every_kind(x_ptr, y_ptr, bias_ptr, rows, columns, one, far, seed: tl.int64, scale, BLOCK: tl.constexpr):
    tl.store(y_ptr + seed, tl.load(x_ptr + rows + columns + one + far) * scale)


def test_a_spec_is_what_the_launch_says() -> None:
    x = torch.empty(100, dtype=torch.bfloat16, device="meta")[3:]
    y = torch.empty(100, device="meta")

    def launch(rows: int) -> None:
        every_kind[(rows,)](x, y, None, rows, 48, 1, 2**33, 16, 1.0, BLOCK=64, num_warps=8, num_stages=2)

    spec = spec_of("kinds", lambda: launch(7), every_kind, shape="7 rows", bytes_moved=5)
    assert spec.signature == {
        "x_ptr": "*bf16", "y_ptr": "*fp32", "rows": "i32", "columns": "i32", "far": "i64", "seed": "i64",
        "scale": "fp32",
    }  # fmt: skip
    assert spec.constexprs == {"bias_ptr": None, "one": 1, "BLOCK": 64}
    assert spec.divisible == ("y_ptr", "columns", "far")  # x begins 6 bytes in
    assert (spec.num_warps, spec.num_stages, spec.shape, spec.bytes_moved) == (8, 2, "7 rows", 5)
    assert "run" not in vars(every_kind)
    assert compile_for(spec, "sm_90").registers > 0
    with pytest.raises(ZeroDivisionError):
        spec_of("fails", lambda: launch(7 // 0), every_kind)
    assert "run" not in vars(every_kind)


def test_refused_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_check, "interpreting", lambda: True)
    with pytest.raises(LoRAError, match="TRITON_INTERPRET"):
        compile_for(doubling(), "sm_90")
