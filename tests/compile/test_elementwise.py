"""What the streaming kernels compile to: activations, norms and rotary embedding, at the shapes of Llama-3.1-8B."""

from __future__ import annotations

import pytest

from lora.fast.kernels import activation, norm, rope
from lora.fast.kernels.compile_check import TARGETS, KernelSpec, Report, compile_for, distinct
from lora.fast.parts import MAX_RANK

SPECS = [*activation.compile_specs(), *norm.compile_specs(), *rope.compile_specs()]

# 64 registers leave room for half of a multiprocessor's warps, and every load of a tile is in flight at once: enough to
# fill the memory's pipe. A norm's backward also keeps the weight and the sums of its gradient.
CEILINGS = {
    "gated_forward": 40,
    "gated_backward": 48,
    "gated_forward with terms": 200,  # float32, whose products are made without a matrix instruction
    "gated_backward with terms": 240,  # likewise
    "norm_forward": 56,
    "norm_forward_looped": 64,  # LayerNorm with a residual, in float32; 48 without a mean
    "norm_backward": 128,
    "norm_backward_looped": 80,  # LayerNorm in float32; 64 without a mean
    "norm_weight_gradient": 64,
    "sum_partial": 48,
    "rope": 80,
}


IN_16_BITS = {  # to r 32; to r 64; ranks above 16 that are no multiple of it, in a loop
    "gated_forward with terms": (80, 112, 128),
    "gated_backward with terms": (124, 160, 168),
}


def rank_of(spec: KernelSpec) -> int:
    """The most ranks of a term at a time; 0 without terms."""
    return max(spec.constexprs.get(f"RANK_{term}") or 0 for term in ("DH", "G", "Z"))


def kernel_name(spec: KernelSpec) -> str:
    return spec.fn.fn.__name__.removesuffix("_kernel") + (" with terms" if rank_of(spec) else "")


def ceiling(spec: KernelSpec) -> int:
    name = kernel_name(spec)
    if name in IN_16_BITS and "*fp32" not in spec.signature.values():
        return IN_16_BITS[name][2 if not spec.constexprs["WHOLE"] else rank_of(spec) > 32]
    return CEILINGS[name]


def check(spec: KernelSpec, report: Report) -> None:
    assert report.spills == 0 and report.stack_bytes == 0
    assert report.registers <= ceiling(spec)
    assert report.atomics == 0
    assert report.shared_bytes <= (24 if kernel_name(spec).endswith("terms") else 16) * 1024


def check_wide(spec: KernelSpec, report: Report) -> None:
    """On NVIDIA every matrix is read in 128 bits, and what is as wide as it is written so."""
    assert report.wide_loads[0] == report.wide_loads[1] or kernel_name(spec) not in ("gated_forward", "gated_backward")
    matrices = {"x_ptr", "s_ptr", "dy_ptr", "dsum_ptr", "g_ptr", "z_ptr", "dh_ptr", "q_ptr", "partial_ptr"}
    read = [name for name in spec.signature if name in matrices - ({"s_ptr"} if "x_ptr" in spec.signature else set())]
    assert report.count("LDG.E.128") >= len(read)
    if kernel_name(spec) in ("gated_forward", "gated_backward"):
        assert report.count("STG.E.128") == report.count("STG")
    if kernel_name(spec) not in ("norm_weight_gradient", "sum_partial"):  # these write one short row
        assert report.count("STG.E.128") >= 1


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_on_hopper(spec: KernelSpec) -> None:
    report = compile_for(spec, "sm_90")
    check(spec, report)
    check_wide(spec, report)


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "sm_90"])
@pytest.mark.parametrize("spec", distinct(SPECS), ids=lambda spec: spec.name)
def test_on_other_targets(spec: KernelSpec, target: str) -> None:
    report = compile_for(spec, target)
    check(spec, report)
    if target == "gfx942":  # twice as many threads a warp: some tiles are 64 bits a thread there
        narrower = sum(report.count(f"{unit}_load_dwordx2") for unit in ("global", "buffer"))
        assert report.wide_loads[0] + narrower > 0
    else:
        check_wide(spec, report)


MATRIX = {"sm_80": "HMMA", "sm_90": "HMMA", "sm_100": "HMMA", "gfx942": "v_mfma"}  # tiles of 16 rows


@pytest.mark.parametrize("target", TARGETS)
def test_terms_are_products_of_a_matrix_instruction(target: str) -> None:
    """In 16 bits; NVIDIA's tensor cores know no float32, and TF32 would be another result."""
    terms = [spec for spec in distinct(SPECS) if rank_of(spec)]
    assert MAX_RANK in [rank_of(spec) for spec in terms]
    for spec in terms:
        exact = "*fp32" in spec.signature.values() and target != "gfx942"
        assert compile_for(spec, target).matrix_instruction == ("" if exact else MATRIX[target]), spec.name


def test_names_are_unique_and_every_kernel_is_here() -> None:
    names = [spec.name for spec in SPECS]
    assert len(set(names)) == len(names)
    assert {kernel_name(spec) for spec in SPECS} == set(CEILINGS)


READ_AGAIN = {  # bytes from memory against the least, where rows are longer than registers and L2 hold
    "norm_forward_looped llama 32768 bfloat16, residual": 6 / 4,
    "norm_forward_looped layer norm 32768 float32, residual": 8 / 4,  # a pass for the mean
    "norm_backward_looped llama 32768 bfloat16, dsum": 6 / 4,
    "norm_backward_looped layer norm 32768 float32, dsum": 6 / 4,
}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_bytes_are_within_a_tenth_of_the_minimum(spec: KernelSpec) -> None:
    """But for rows that are read again: those are a pass more for each statistic."""
    assert 0 < spec.bytes_minimum <= min(spec.bytes_moved, 1.01 * spec.bytes_issued)
    ratio = spec.bytes_moved / spec.bytes_minimum
    if spec.name in READ_AGAIN:
        assert ratio == pytest.approx(READ_AGAIN[spec.name], rel=1e-3)
    else:
        assert ratio <= 1.1


def test_terms_are_loaded_again_by_every_tile() -> None:
    """Each program loads its rows of u and its columns of B anew, as its tile of g and z: 16 by 128, and R of each."""
    (spec,) = (spec for spec in SPECS if spec.name == "gated_forward silu bfloat16, plus r 64")
    tile, R = spec.constexprs["BLOCK_M"] * spec.constexprs["BLOCK_N"], 64
    again = 2 * R * (spec.constexprs["BLOCK_M"] + spec.constexprs["BLOCK_N"])
    wide = 3 * 8192 * 14336 * 2
    assert spec.bytes_issued == wide * (3 * tile + again) / (3 * tile)
    assert spec.bytes_moved == spec.bytes_minimum == wide + 2 * 2 * R * (8192 + 14336)
