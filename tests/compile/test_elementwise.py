"""What the streaming kernels compile to: activations, norms and rotary embedding, at the shapes of Llama-3.1-8B."""

from __future__ import annotations

import pytest

from lora.fast.kernels import activation, norm, rope
from lora.fast.kernels.compile_check import TARGETS, KernelSpec, Report, compile_for

SPECS = [*activation.compile_specs(), *norm.compile_specs(), *rope.compile_specs()]
ONE_OF_EACH = list(
    {(spec.fn, spec.constexprs.get("RANK_G")): spec for spec in SPECS}.values()
)  # the last of each kernel, which is its widest

# 64 registers leave room for half of a multiprocessor's warps, and every load of a tile is in flight at once: enough to
# fill the memory's pipe. A norm's backward also keeps the weight and the sums of its gradient.
CEILINGS = {
    "gated_forward": 40,
    "gated_backward": 48,
    "gated_forward with terms": 168,  # float32, whose products are made without a matrix instruction; 64 in 16 bits
    "gated_backward with terms": 200,  # likewise; 88 in 16 bits at r 16, 160 at r 64
    "norm_forward": 56,
    "norm_forward_looped": 64,  # LayerNorm with a residual, in float32; 48 without a mean
    "norm_backward": 128,
    "norm_backward_looped": 80,  # LayerNorm in float32; 64 without a mean
    "norm_weight_gradient": 64,
    "sum_partial": 48,
    "rope": 80,
}


def kernel_name(spec: KernelSpec) -> str:
    return spec.fn.fn.__name__.removesuffix("_kernel") + (" with terms" if spec.constexprs.get("RANK_G") else "")


def check(spec: KernelSpec, report: Report) -> None:
    assert report.spills == 0 and report.stack_bytes == 0
    assert report.registers <= CEILINGS[kernel_name(spec)]
    assert report.atomics == 0
    assert report.shared_bytes <= (24 if kernel_name(spec).endswith("terms") else 16) * 1024


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_on_hopper(spec: KernelSpec) -> None:
    report = compile_for(spec, "sm_90")
    check(spec, report)
    matrices = {"x_ptr", "s_ptr", "dy_ptr", "dsum_ptr", "g_ptr", "z_ptr", "dh_ptr", "q_ptr", "partial_ptr"}
    read = [name for name in spec.signature if name in matrices - ({"s_ptr"} if "x_ptr" in spec.signature else set())]
    assert report.count("LDG.E.128") >= len(read)
    if kernel_name(spec) in ("gated_forward", "gated_backward"):
        assert report.count("LDG.E.128") == report.count("LDG") and report.count("STG.E.128") == report.count("STG")
    if kernel_name(spec).endswith("terms") and spec.constexprs["PRECISION"] is None:
        assert report.count("HMMA") > 0 and (spec.constexprs["RANK_G"] > 16 or report.registers <= 88)
    if kernel_name(spec) not in ("norm_weight_gradient", "sum_partial"):  # these write one short row
        assert report.count("STG.E.128") >= 1


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "sm_90"])
@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=lambda spec: spec.name)
def test_on_other_targets(spec: KernelSpec, target: str) -> None:
    report = compile_for(spec, target)
    check(spec, report)
    if target == "gfx942":  # twice as many threads a warp: some tiles are 64 bits a thread there
        kinds = [f"{unit}_load_dwordx{width}" for unit in ("global", "buffer") for width in (2, 4)]
        assert sum(report.count(kind) for kind in kinds) > 0
    else:
        assert report.count("LDG.E.128") > 0


def test_names_are_unique_and_every_kernel_is_here() -> None:
    names = [spec.name for spec in SPECS]
    assert len(set(names)) == len(names)
    assert {kernel_name(spec) for spec in SPECS} == set(CEILINGS)


def test_bytes_are_within_a_tenth_of_the_minimum() -> None:
    stated = [spec for spec in SPECS if spec.bytes_minimum]
    assert len(stated) > 20
    for spec in stated:
        assert spec.bytes_minimum <= spec.bytes_moved <= 1.1 * spec.bytes_minimum, spec.name
