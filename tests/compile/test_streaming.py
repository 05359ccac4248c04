"""What the NF4, dropout and cross-entropy kernels compile to, at the shapes of Llama-3.1-8B."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora.fast.kernels import cross_entropy, dropout, nf4
from lora.fast.kernels.compile_check import TARGETS, KernelSpec, Report, compile_for, distinct, spec_of

NF4, DROPOUT, LOSS = nf4.compile_specs(), dropout.compile_specs(), cross_entropy.compile_specs()
SPECS = [*NF4, *DROPOUT, *LOSS]
DECODING = [spec for spec in NF4 if spec.fn is nf4.nf4_dequantize_kernel]
WHOLE_WORDS = [spec for spec in DROPOUT if spec.constexprs.get("BY_WORD")]

# 64 registers leave room for half of a multiprocessor's warps, which is enough to keep its memory busy. Rows that begin
# in the middle of a word of dropout's mask hash each element, and keep more numbers at once.
CEILINGS = {
    "nf4_dequantize": 64,
    "nf4_quantize": 48,
    "dropout_forward": 40,
    "dropout_add": 40,
    "dropout_mask": 40,
    "cross_entropy": 56,
}
ODD_ROWS = 96
ON_AMD = 72  # of a thread's 512 there: seven waves of the eight that a SIMD unit holds


def kernel_name(spec: KernelSpec) -> str:
    return spec.fn.fn.__name__.removesuffix("_kernel")


def per_element(spec: KernelSpec, report: Report) -> float:
    """Instructions an element: there is no loop, so each is executed at most once a thread."""
    return report.instructions / (spec.constexprs["TILE"] / (32 * spec.num_warps))


def check(spec: KernelSpec, report: Report) -> None:
    assert report.spills == 0 and report.stack_bytes == 0
    ceiling = ODD_ROWS if spec.constexprs.get("BY_WORD") is False else CEILINGS[kernel_name(spec)]
    assert report.registers <= (max(ceiling, ON_AMD) if report.target == "gfx942" else ceiling)
    assert report.atomics == 0
    assert report.shared_bytes <= 8 * 1024


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_on_hopper(spec: KernelSpec) -> None:
    check(spec, compile_for(spec, "sm_90"))


OTHERS = [
    (target, spec)
    for target in TARGETS
    for spec in distinct([*NF4, *DROPOUT, *cross_entropy.compile_specs(target)])
    if target != "sm_90"
]


@pytest.mark.parametrize(("target", "spec"), OTHERS, ids=lambda one: one if isinstance(one, str) else one.name)
def test_on_other_targets(spec: KernelSpec, target: str) -> None:
    report = compile_for(spec, target)
    check(spec, report)
    if kernel_name(spec) == "dropout_mask" or spec.constexprs.get("BY_WORD") is False:
        return  # it reads nothing; rows that begin in mid-word are not aligned
    if target == "gfx942" and spec.fn is nf4.nf4_quantize_kernel:  # twice as many threads a warp: 64 bits a thread
        assert sum(report.count(f"{unit}_load_dwordx2") for unit in ("global", "buffer")) + report.wide_loads[0] > 0
    else:
        assert report.wide_loads[0] > 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("spec", DECODING, ids=lambda spec: spec.name)
def test_nf4_decode_takes_at_most_ten_instructions_an_element(spec: KernelSpec, target: str) -> None:
    """The codes come in 128 bits, 32 of them a load; the values leave in 128 bits, and nothing else is written."""
    report = compile_for(spec, target)
    assert per_element(spec, report) <= 10
    elements = spec.constexprs["TILE"] // (32 * spec.num_warps)  # a thread
    itemsize = 4 if spec.signature["out_ptr"] == "*fp32" else 2
    assert report.count("LDG.E.128") == elements // 32
    assert report.count("STG.E.128") == report.count("STG") == elements * itemsize // 16


def test_nf4_decode_needs_sixty_four_elements_a_thread() -> None:
    """With half as many, absmax is decoded again in every lane: what PER_THREAD is there for."""
    spec = DECODING[0]
    twice = replace(spec, num_warps=2 * spec.num_warps)
    assert per_element(twice, compile_for(twice, "sm_90")) > 10 > 8 > per_element(spec, compile_for(spec, "sm_90"))


def test_nf4_decode_rounds_a_product_and_a_sum_apart() -> None:
    """d · absmax2 + offset in one rounding has other bits; the launch says so, and the compiler obeys."""
    spec = DECODING[0]
    assert spec.constexprs["NESTED_SIZE"] == 256 and not spec.fp_fusion
    assert compile_for(spec, "sm_90").count("FFMA") == 0
    assert compile_for(replace(spec, name="fused", fp_fusion=True), "sm_90").count("FFMA") > 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("spec", WHOLE_WORDS, ids=lambda spec: spec.name)
def test_dropout_hashes_once_for_four_elements(spec: KernelSpec, target: str) -> None:
    """A hash takes some 40 instructions: with one for each element there would be more than 40 an element.

    Lanes are put in their places without a detour through shared memory, and every access is 128 bits wide.
    """
    report = compile_for(spec, target)
    assert per_element(spec, report) <= 20
    assert report.shared_bytes == 0
    assert report.count("LDG.E.128") == report.count("LDG") > 0
    assert report.count("STG.E.128") == report.count("STG") > 0


def test_dropout_mask_is_written_in_128_bits() -> None:
    (spec,) = (spec for spec in DROPOUT if spec.name == "dropout_mask")
    report = compile_for(spec, "sm_90")
    assert per_element(spec, report) <= 15
    assert report.count("STG.E.128") == report.count("STG") == 1 and report.count("LDG") == 0


def test_dropout_compiles_once_for_every_p_seed_and_stream() -> None:
    """Keys of 1, multiples of 16, negative, small and large; p from 0 to nearly 1: one specialisation."""
    x = torch.empty(8, 64, dtype=torch.bfloat16, device="meta")
    keys = {0, 1, 16, -16, 2**40, -(2**63)}

    def spec(p: float, key: int, monkeypatch: pytest.MonkeyPatch) -> KernelSpec:
        monkeypatch.setattr(dropout, "key_of", lambda seed, stream: key % 2**64)
        return spec_of("any", lambda: dropout.dropout_forward(x, p, 0), dropout.dropout_forward_kernel)

    with pytest.MonkeyPatch.context() as monkeypatch:
        found = [spec(p, key, monkeypatch) for key in keys for p in (0.0, 1 / 65536, 0.5, 0.99999)]
    assert len(found) == 24 and all(one == found[0] for one in found)


NVIDIA = [(target, spec) for target in ("sm_80", "sm_90", "sm_100") for spec in cross_entropy.compile_specs(target)]


@pytest.mark.parametrize(("target", "spec"), NVIDIA, ids=lambda one: one if isinstance(one, str) else one.name)
def test_cross_entropy_streams(spec: KernelSpec, target: str) -> None:
    """Each loop's logits in 128 bits: one thread's 8 of a block. Three scalars aside (two loads of the label, ℓ_y)."""
    report = compile_for(spec, target)
    loops = 2 if spec.constexprs["HAS_GRADIENT"] else 1
    loads = 2 if spec.signature["logits_ptr"] == "*fp32" else 1  # 8 numbers
    assert report.count("LDG.E.128") == loops * loads
    assert report.count("LDG") - report.count("LDG.E.128") <= 3
    assert (report.count("STG.E.128") > 0) == spec.constexprs["HAS_GRADIENT"]
    assert report.shared_bytes <= 1024  # the sums across eight warps
    assert report.occupancy >= 0.5


def test_names_are_unique_and_every_kernel_is_here() -> None:
    names = [spec.name for spec in SPECS]
    assert len(set(names)) == len(names)
    assert {kernel_name(spec) for spec in SPECS} == set(CEILINGS)


def test_bytes_are_the_minimum_except_where_a_row_is_read_twice() -> None:
    for spec in [*NF4, *DROPOUT]:  # a code table of a kilobyte aside
        assert 0 < spec.bytes_minimum <= spec.bytes_moved <= 1.0001 * spec.bytes_minimum, spec.name
        assert spec.bytes_moved <= spec.bytes_issued <= 1.1 * spec.bytes_minimum, spec.name
    for spec in LOSS:
        ratio = spec.bytes_moved / spec.bytes_minimum
        assert ratio == pytest.approx(1.5 if spec.constexprs["HAS_GRADIENT"] else 1, rel=1e-3), spec.name
