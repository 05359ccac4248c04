"""What the products compile to: tensor-core instructions of each generation, no spills, wide and early loads."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora.fast.kernels import add_product, dora, gemm, multi_lora
from lora.fast.kernels.compile_check import KernelSpec, Report, compile_for, distinct, spec_of
from lora.projection import Dropout

SPECS = [spec for module in (gemm, multi_lora, dora, add_product) for spec in module.compile_specs()]

CEILINGS = {  # registers a thread; 65,536 are shared by the threads of a multiprocessor
    "lora_gemm": 216,  # 128 of them sum; 256 threads, one program a multiprocessor
    "skinny": 128,
    "token_sum": 128,  # on Ampere, which sums in registers; 80 elsewhere
    "sum_parts": 40,
    "shrink": 104,
    "expand": 120,
    "sums": 104,
    "dora_norm": 192,
    "dropout_add_product": 176,  # float32, of 128 threads; 16 bits take 128
}
ON_AMD = {"skinny": 168}  # of a thread's 512 there: three waves of the eight that a SIMD unit holds
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB a block; sm_80's family has consumer GPUs too
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
H100_BYTES, H100_FLOPS = 3.35e12, {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}  # a second


def kernel_name(spec: KernelSpec) -> str:
    return str(spec.fn.fn.__name__).removesuffix("_kernel")


def check(spec: KernelSpec, report: Report) -> None:
    assert report.spills == 0 and report.stack_bytes == 0
    assert report.atomics == 0
    assert report.shared_bytes <= SHARED[report.target] * 1024


def specs_for(target: str) -> list[KernelSpec]:
    """The wide product's tiles depend on the target."""
    others = (multi_lora, dora, add_product)
    return distinct([*gemm.compile_specs(target), *(spec for module in others for spec in module.compile_specs())])


OTHERS = [(target, spec) for target in SHARED if target != "sm_90" for spec in specs_for(target)]


def matrix_instruction(spec: KernelSpec, target: str) -> str:
    """What a kernel's products are to be made of: Hopper and later want 64 rows, or 128, for their own."""
    if kernel_name(spec) == "sum_parts" or (is_wide(spec) and target != "gfx942"):
        return ""  # NVIDIA's tensor cores multiply no float32
    if target in ("sm_90", "sm_100") and (kernel_name(spec) == "dora_norm" or spec.constexprs["BLOCK_M"] < 64):
        return "HMMA"
    return MATRIX[target]


def is_wide(spec: KernelSpec) -> bool:
    """Whether the operands are of 32 bits or more: multiplied without tensor cores on NVIDIA, never as TF32."""
    pointers = [
        kind for name, kind in spec.signature.items() if name in ("x_ptr", "wide_ptr", "h_ptr", "w_ptr", "dx_ptr")
    ]
    return bool(pointers) and pointers[0] in ("*fp32", "*fp64")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_on_hopper(spec: KernelSpec) -> None:
    report = compile_for(spec, "sm_90")
    check(spec, report)
    assert report.registers <= CEILINGS[kernel_name(spec)]
    assert report.matrix_instruction == matrix_instruction(spec, "sm_90")
    copied = report.count("LDGSTS.E.128")  # global to shared memory, past the registers
    assert copied + report.count("LDG.E.128") >= 1
    if kernel_name(spec) in ("lora_gemm", "skinny", "shrink"):
        early = spec.num_stages > 2  # small float32 tiles wait for each copy: two stages are all that pays for them
        assert copied == report.count("LDGSTS") >= (16 if early else 8)
        waits = [int(n) for n in re.findall(r"cp\.async\.wait_group\s+(?:0x)?(\d+)", report.assembly)]
        assert max(waits) >= 2 or not early, "no copy is under way while a product is made"


@pytest.mark.parametrize(("target", "spec"), OTHERS, ids=lambda one: one if isinstance(one, str) else one.name)
def test_on_other_targets(spec: KernelSpec, target: str) -> None:
    report = compile_for(spec, target)
    check(spec, report)
    ceilings = CEILINGS | ON_AMD if target == "gfx942" else CEILINGS
    assert report.registers <= ceilings[kernel_name(spec)]
    assert report.matrix_instruction == matrix_instruction(spec, target)
    assert report.wide_loads[0] > 0


def test_every_tile_is_compiled() -> None:
    for target, tiles in gemm.WIDE_TILES.items():
        specs = [spec for spec in gemm.compile_specs(target) if kernel_name(spec) == "lora_gemm"]
        for wide, expected in ((False, tiles), (True, gemm.WIDE_TILES_FLOAT32)):
            found = [spec.constexprs for spec in specs if is_wide(spec) == wide]
            assert all(any(tile.blocks().items() <= one.items() for one in found) for tile in expected), target


def meta(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]


def launches(tokens: int, fan_in: int, fan_out: int, r: int) -> dict[str, tuple[Callable[[], object], Any, Any]]:
    """Each kernel launched at a size, without a choice of tile."""
    x, weight, u, A, B, dy = meta(
        (tokens, fan_in), (fan_out, fan_in), (tokens, r), (r, fan_in), (fan_out, r), (tokens, fan_out)
    )
    As, (scaling,) = A[None], meta((1,))
    order, bounds, blocks = (torch.empty(n, dtype=torch.int32, device="meta") for n in (tokens, 2, 2))
    groups = multi_lora.Groups(order.long(), bounds, blocks, blocks, 16)
    dropout = Dropout(0.1, 0)
    return {
        "lora_gemm": (lambda: gemm.lora_gemm(x, weight, u, B, B[:, 0]), gemm.lora_gemm_kernel, ()),
        "lora_gemm_dx": (lambda: gemm.lora_gemm_dx(dy, weight, u, A, dropout), gemm.lora_gemm_kernel, ()),
        "skinny": (lambda: gemm.skinny_gemm(x, A, dropout), gemm.skinny_kernel, ()),
        "gradient": (lambda: gemm.lora_A_gradient(u, x, dropout), gemm.token_sum_kernel, (gemm.sum_parts_kernel,)),
        "shrink": (lambda: multi_lora.multi_lora_shrink(x, As, scaling, groups), multi_lora.shrink_kernel, ()),
        "expand": (lambda: multi_lora.multi_lora_expand_(x, u, As.mT, groups), multi_lora.expand_kernel, ()),
        "sums": (lambda: multi_lora.multi_lora_B_gradient(x, u, groups), multi_lora.sums_kernel, ()),
        "dora": (lambda: dora.dora_norm(weight, A, B, 2.0), dora.dora_norm_kernel, ()),
    }


@pytest.mark.parametrize("name", list(launches(1, 1, 1, 1)))
def test_sizes_of_one_compile(name: str) -> None:
    """A size or stride of 1 is compiled in, as a constant without a tensor's methods."""
    call, kernel, others = launches(1, 1, 1, 1)[name]
    spec = spec_of(f"{name} of ones", call, kernel, *others)
    assert 1 in spec.constexprs.values()
    check(spec, compile_for(spec, "gfx942"))  # the front end is the same for all; this compiler is the fastest


@pytest.mark.parametrize("name", ["lora_gemm", "lora_gemm_dx"])
@pytest.mark.parametrize("r", [12, 128])
def test_other_ranks_do_not_spill(name: str, r: int) -> None:
    """u and B of rank 12 cannot be read wide; those of rank 128 are several blocks."""
    call, kernel, _ = launches(8192, 4096, 4096, r)[name]
    spec = spec_of(f"{name} of rank {r}", call, kernel)
    check(spec, compile_for(spec, "sm_90"))


@pytest.mark.parametrize("name", list(launches(1, 1, 1, 1)))
def test_odd_sizes_compile(name: str) -> None:
    """Nothing is a multiple of 16, no load can be wide, r takes several blocks: still no spills."""
    call, kernel, others = launches(1001, 4099, 4097, 71)[name]
    spec = spec_of(f"{name} of odd sizes", call, kernel, *others)
    assert not {"M", "N", "K", "R"} & set(spec.divisible)
    check(spec, compile_for(spec, "sm_90"))


def test_memory_bound_kernels_move_what_they_must() -> None:
    for spec in SPECS:
        assert 0 < spec.bytes_minimum <= spec.bytes_moved, spec.name
        if kernel_name(spec) != "lora_gemm":
            assert spec.bytes_moved <= 1.1 * spec.bytes_minimum, spec.name


def test_large_products_are_bound_by_arithmetic() -> None:
    """Even if L2 kept nothing from one wave of programs to the next."""
    large = [spec for spec in SPECS if kernel_name(spec) == "lora_gemm" and "8192 tokens" in spec.name]
    assert len(large) >= 5
    for spec in large:
        dtype = next(name for name in H100_FLOPS if name in spec.name)
        assert spec.flops / H100_FLOPS[dtype] > 2 * spec.bytes_moved / H100_BYTES, spec.name


def test_names_are_unique_and_every_kernel_is_here() -> None:
    names = [spec.name for spec in SPECS]
    assert len(set(names)) == len(names)
    assert {kernel_name(spec) for spec in SPECS} == set(CEILINGS)
