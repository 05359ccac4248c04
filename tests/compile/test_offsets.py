"""No compiled kernel counts a memory offset in 32 bits: an offset that grows with the tensor is a 64-bit number.

Read off Triton's own intermediate code, before any optimisation. A product of a row number and a stride, or of a
program's number and a block, overflows 32 bits in a tensor of more than 2³¹ elements; `tests/proof/test_boundaries.py`
runs such tensors on a GPU, here every kernel is checked on any machine.
"""

from __future__ import annotations

import re

import pytest

from lora.fast.kernels import (
    activation,
    add_product,
    cross_entropy,
    dora,
    dropout,
    gemm,
    multi_lora,
    nf4,
    norm,
    rope,
)
from lora.fast.kernels.compile_check import KernelSpec, _compile

MODULES = (activation, add_product, cross_entropy, dora, dropout, gemm, multi_lora, nf4, norm, rope)
SPECS = [spec for module in MODULES for spec in module.compile_specs()]
KERNELS = {spec.fn.fn.__name__: spec.fn for spec in SPECS}
# Products in 32 bits that are numbers of rows or columns, not of elements; the offset made of them is 64 bits wide.
COUNTS = {
    "dora_norm_kernel": ("o_n", "6"),  # a block of W's rows; r times the row length of A, which has few rows
    "token_sum_kernel": ("o_n", "o_r", "start"),  # blocks of columns, of the rank, of tokens
    "sums_kernel": ("start",),  # a split of an adapter's tokens
    "norm_weight_gradient_kernel": ("o_n",),  # a block of columns
    "sum_partial_kernel": ("o_n",),
    "lora_gemm_kernel": ("p_b", "p_w"),  # a step of at most 64 rows of a factor or of W, added to a 64-bit pointer
    "dropout_add_product_kernel": ("p_factor",),  # likewise
    "gated_forward_kernel": ("p_factor",),  # 16 rows of Bᵀ
    "gated_backward_kernel": ("p_factor",),
    "norm_forward_kernel": ("o_m",),  # a block of rows
}
ROWS = {"inner"}  # rows of a group: times the group's number that is a row's number

VALUE = r"%[\w.#-]+"
LINE = re.compile(rf"({VALUE})(?::\d+)? = ([\w.]+) (.*)")
KEEPS = ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.addi", "tt.reshape", "arith.trunci")


def overflows(ttir: str, sources: set[str]) -> list[str]:
    """The lines that multiply a 32-bit number made of one of the `sources`: arguments by name, or operations."""
    tainted: set[str] = set(re.findall(rf"({VALUE}): i32", ttir)) & {f"%{name}" for name in sources}
    found = []
    for line in ttir.splitlines():
        match = LINE.search(line)
        if match is None:
            continue
        result, operation, rest = match.groups()
        narrow = re.search(r"(?<!-> )(?:tensor<[\dx]*x)?i32>?[^:]*(?:loc\(|$)", rest) is not None
        uses = set(re.findall(VALUE, rest)) & tainted
        if operation in sources and narrow:
            tainted.add(result)
        elif uses and operation == "arith.muli" and narrow:
            found.append(line.strip())
        elif uses and operation in KEEPS and narrow:
            tainted.add(result)
    return found


def ttir_of(spec: KernelSpec) -> str:
    return str(_compile(spec, "sm_90").asm["ttir"])


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_no_offset_is_multiplied_in_32_bits(kernel: str) -> None:
    """Neither a program's number nor any argument (a stride, a size) is multiplied before it is widened.

    In each form of a kernel: a stride of 1 is compiled in, and its product is gone; a term that is absent has none.
    """
    forms = {frozenset(spec.signature): spec for spec in SPECS if spec.fn is KERNELS[kernel]}
    for spec in forms.values():
        sources = {name for name, kind in spec.signature.items() if kind == "i32"} - ROWS | {"tt.get_program_id"}
        names = [re.sub(r"_\d+$", "", line.split(" = ")[0].lstrip("%")) for line in overflows(ttir_of(spec), sources)]
        assert set(names) <= set(COUNTS.get(kernel, ())), (spec.name, names)


WRONG = """
tt.func public @k(%x_ptr: !tt.ptr<f32> loc("x_ptr"), %row_stride: i32 {tt.divisibility = 16 : i32} loc("s")) {
  %pid = tt.get_program_id x : i32 loc(#1)
  %wide = arith.extsi %pid : i32 to i64 loc(#1)
  %stride = arith.extsi %row_stride : i32 to i64 loc(#1)
  %right = arith.muli %wide, %stride : i64 loc(#1)
  %splat = tt.splat %row_stride : i32 -> tensor<16xi32> loc(#1)
  %wrong = arith.muli %rows, %splat : tensor<16xi32> loc(#1)
"""


def test_the_check_sees_a_product_in_32_bits() -> None:
    assert [line.split(" = ")[0] for line in overflows(WRONG, {"row_stride"})] == ["%wrong"]
