"""`lora.fast.kernels.traffic` counts what kernels load and store: every access of the interpreted kernels is added up.

Sizes are no multiples of the tiles, and each of their axes has several.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lora.fast import kernels
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
    norm_kernels,
    rope,
    traffic,
)
from lora.fast.kernels.compile_check import launches_of
from lora.fast.parts import LowRank
from lora.projection import Dropout
from lora.reference.nf4 import nf4_quantize

MODULES = (activation, add_product, cross_entropy, dora, dropout, gemm, multi_lora, nf4, norm_kernels, rope)
KERNELS = {name: getattr(module, name) for name in traffic.COUNTS for module in MODULES if hasattr(module, name)}
NOT_ON_A_GPU = "needs a CPU, whose interpreter counts loads and stores: not run on a CUDA device"
LAYER, RMS = norm._Norm(True, eps=1e-5), norm._Norm(False, 0.0, True, 1e-5)


@contextmanager
def counting() -> Iterator[Counter[int]]:
    """Bytes loaded and stored while it is open, at each address."""
    from triton.runtime.interpreter import InterpreterBuilder

    found: Counter[int] = Counter()

    def add(pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses, present = np.broadcast_arrays(pointers.data, mask.data)
        found.update({address: size * n for address, n in Counter(addresses[present != 0].tolist()).items()})

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        add(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        add(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        yield found


def half(*shape: int) -> Tensor:
    return torch.randn(shape).half()


def term(tokens: int, hidden: int, r: int) -> LowRank:
    return LowRank(half(tokens, r), half(r, hidden).T, 2.0)


def groups() -> multi_lora.Groups:
    return multi_lora.group_tokens(torch.arange(2).repeat(20), 2)  # 40 tokens, 20 each: blocks of 32 rows


def weight_gradient(rows: int, features: int) -> object:
    dy, s, weight = half(rows, 1, features), half(rows, 1, features), half(features)
    given = norm._Rows(dy, s, torch.randn(rows), torch.randn(rows), rows, 1)
    return norm._column_sums(given, (weight, weight), LAYER)


def backward(features: int, sums: bool, rows: int = 5) -> object:
    dy, s, dsum, dx = (half(rows, features) for _ in range(4))
    weight, mean, rstd = half(features), torch.randn(rows), torch.rand(rows)
    return norm._backward(dy, s, weight, weight if sums else None, mean, rstd, dsum, dx, sums, LAYER)


def rotation(rot: int, **options: Any) -> object:
    q, k, cos, sin = half(1, 3, 5, 8), half(1, 2, 5, 8), half(5, rot), half(5, rot)
    return rope.rope_forward(q, k, cos, sin, **options)


def decode(weight: Tensor, padding: int = 0, **options: Any) -> object:
    out = torch.empty(len(weight), weight.shape[1] + padding, dtype=torch.float16)[:, : weight.shape[1]]
    return nf4.nf4_dequantize_into(nf4_quantize(weight, **options), out)


CALLS: dict[str, Callable[[], object]] = {
    "gated_forward": lambda: activation.gated_forward(half(9, 70), half(9, 70), "silu"),
    "gated_forward with terms": lambda: activation.gated_forward(
        half(40, 300), half(40, 300), "silu", plus_g=term(40, 300, 5), plus_z=term(40, 300, 16)
    ),
    "gated_backward with terms": lambda: activation.gated_backward(
        half(40, 300), half(40, 300), half(40, 300), "gelu", with_h=True, plus_dh=term(40, 300, 3),
        plus_z=term(40, 300, 20),
    ),
    "cross_entropy": lambda: cross_entropy.cross_entropy_(half(3, 9000), torch.tensor([1, 2, 3])),
    "cross_entropy, loss": lambda: cross_entropy.cross_entropy_(half(3, 9000), torch.tensor([1, 2, 3]), gradient=False),
    "dora": lambda: dora.dora_norm(half(70, 300), half(5, 300), half(70, 5), 2.0),
    "dora, several blocks of ranks": lambda: dora.dora_norm(half(40, 300), half(70, 300), half(40, 70), 2.0),
    "dropout": lambda: dropout.dropout_forward(half(5, 70), 0.3, 1),
    "dropout_add": lambda: dropout.dropout_add(half(5, 70), half(5, 70), 0.3, 1),
    "dropout_add_product": lambda: add_product.dropout_add_product(half(70, 150), half(70, 20), half(20, 150), 0.3, 1),
    "dropout_mask": lambda: dropout.dropout_mask((5, 700), 0.3, 1, 0, "cpu"),
    "lora_gemm": lambda: gemm.lora_gemm(
        half(70, 80), half(90, 80), half(70, 20), half(90, 20), half(90), tile=gemm.Tile(32, 32, 32, 4, 2)
    ),
    "lora_gemm_dx": lambda: gemm.lora_gemm_dx(
        half(70, 90), half(90, 80), half(70, 20), half(20, 80), Dropout(0.1, 0), tile=gemm.Tile(32, 32, 32, 4, 2)
    ),
    "skinny": lambda: gemm.skinny_gemm(half(40, 300), half(70, 300), Dropout(0.1, 0)),
    "A gradient": lambda: gemm.lora_A_gradient(half(600, 70), half(600, 150)),
    "B gradient": lambda: gemm.lora_B_gradient(half(600, 150), half(600, 3)),
    "shrink": lambda: multi_lora.multi_lora_shrink(half(40, 150), half(2, 70, 150), torch.ones(2), groups()),
    "expand": lambda: multi_lora.multi_lora_expand_(half(40, 150), half(40, 20), half(2, 150, 20), groups()),
    "sums": lambda: multi_lora.multi_lora_A_gradient(half(40, 70), half(40, 150), groups()),
    "decode": lambda: decode(torch.randn(70, 128)),
    "decode, plain": lambda: decode(torch.randn(70, 128), double_quant=False),
    "decode, bordered": lambda: decode(torch.randn(5, 320), 16),
    "decode, odd": lambda: decode(torch.randn(5, 77), 3),
    "encode": lambda: nf4.nf4_quantize_blocks(half(70, 77), double_quant=False),
    "norm": lambda: norm.rms_norm_forward(half(9, 300), half(300), eps=1e-6, offset=0.0, round_before_weight=True),
    "layer norm": lambda: norm.layer_norm_forward(half(9, 300), half(300), half(300), eps=1e-6, residual=half(9, 300)),
    "norm of long rows": lambda: norm._forward(
        half(2, 9000), half(2, 9000), half(9000), None, half(2, 9000), half(2, 9000), RMS
    ),
    "layer norm of long rows": lambda: norm.layer_norm_forward(half(2, 9000), half(9000), half(9000), eps=1e-6),
    "norm's backward": lambda: backward(300, False, rows=40),
    "norm's backward, trained": lambda: backward(300, True, rows=40),
    "norm's backward of long rows": lambda: backward(9000, False, rows=2),
    "weight's gradient": lambda: weight_gradient(40, 300),
    "rope": lambda: rotation(8),
    "rope, partial": lambda: rotation(4),
    "rope, interleaved": lambda: rotation(8, interleaved=True, inverse=True),
    "rope, positions": lambda: rotation(8, position_ids=torch.tensor([[0, 3, 3, 1, 2]])),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CALLS))
def test_every_load_and_store_is_counted(name: str, device: str) -> None:
    if device != "cpu":
        pytest.skip(NOT_ON_A_GPU)
    with counting() as found:
        launches = launches_of(CALLS[name], *KERNELS.values(), runs=True)
    assert launches
    assert traffic.traffic_of(launches).issued == found.total()


@pytest.mark.parametrize("name", list(CALLS))
def test_each_operand_is_counted_by_itself(name: str, device: str) -> None:
    """Of the last launch, where operands do not share memory."""
    if device != "cpu":
        pytest.skip(NOT_ON_A_GPU)
    launch = launches_of(CALLS[name], *KERNELS.values(), runs=True)[-1]
    operands = {n: v for n, v in launch.arguments.items() if isinstance(v, Tensor)}
    with counting() as found:
        KERNELS[launch.kernel][launch.grid](**launch.arguments)
    for operand, touched in traffic.touches(launch).items():
        storage = operands[operand].untyped_storage()
        inside = range(storage.data_ptr(), storage.data_ptr() + storage.nbytes())
        counted = sum(size for address, size in found.items() if address in inside)
        assert counted == touched.issued * operands[operand].itemsize, operand


def test_every_kernel_is_counted() -> None:
    """All that are launched, wherever in the package they are: helpers of kernels have other names."""
    named = [
        (name, function)
        for found in pkgutil.iter_modules(kernels.__path__)
        for name, function in vars(importlib.import_module(f"{kernels.__name__}.{found.name}")).items()
        if name.endswith("_kernel") and hasattr(function, "fn")
    ]
    assert {name for name, _ in named} == set(KERNELS) == set(traffic.COUNTS)
    if torch.cuda.is_available():
        pytest.skip(NOT_ON_A_GPU)
    called = {name for call in CALLS.values() for name, *_ in launches_of(call, *KERNELS.values(), runs=True)}
    assert called == set(KERNELS)
