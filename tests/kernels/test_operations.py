"""Every fast operation through its Triton kernels: as near to float64 as the reference is in the same type.

err(fast) ≤ 2 · err(reference) + a few roundings of the result's scale
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lora.fast as fast
import lora.reference as reference
from lora.fast.runtime import runs_triton
from lora.projection import Dropout, NF4Weight, Projection

ROUNDINGS = 4  # that a fused operation may make in other places than the reference
EXAMPLES = settings(max_examples=8)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
seeds = st.integers(0, 2**32)
drops = st.sampled_from([None, Dropout(0.3, 7), Dropout(0.5, 2**61 + 5, stream=3)])


class Maker:
    """Random tensors of one seed, type and device."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str) -> None:
        self.generator, self.dtype, self.device = torch.Generator().manual_seed(seed), dtype, device

    def normal(self, *shape: int, grad: bool = True) -> Tensor:
        x = torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)
        return x.requires_grad_(grad)

    def projection(
        self, out: int, fan_in: int, r: int, *, nf4: bool = False, dora: bool = False, bias: bool = False
    ) -> Projection:
        """Adapters are float32 whatever x is, as beside a half-precision base."""
        weight: Any = self.normal(out, fan_in, grad=False) / fan_in**0.5
        lora_A = (torch.randn(r, fan_in, generator=self.generator) / fan_in**0.5).to(self.device)
        lora_B = (torch.randn(out, r, generator=self.generator) / max(r, 1) ** 0.5).to(self.device)
        magnitude = (torch.rand(out, generator=self.generator) + 0.5).to(self.device).requires_grad_() if dora else None
        return Projection(
            reference.nf4_quantize(weight) if nf4 else weight,
            self.normal(out) if bias else None,
            *((lora_A.requires_grad_(), lora_B.requires_grad_()) if r else (None, None)),
            1.7,
            magnitude if r else None,
        )


def tensors_in(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for each in tree:
            yield from tensors_in(each)


def widened(tree: Any) -> Any:
    """The same arguments in float64, NF4 weights decoded exactly; leaves stay leaves."""
    if isinstance(tree, NF4Weight):
        return reference.nf4_dequantize(tree, torch.float64)
    if isinstance(tree, Tensor) and tree.is_floating_point():
        return tree.detach().double().requires_grad_(tree.requires_grad)
    if isinstance(tree, tuple):
        parts = [widened(each) for each in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def results(operation: Callable[..., Any], backend: Any, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Outputs, and gradients of every leaf, for dy's that depend on the shapes alone."""
    outputs = operation(backend, *arguments)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(99)
    dys = [torch.randn(y.shape, generator=generator).to(y.device, torch.float16).to(y.dtype) for y in outputs]
    leaves = [t for t in tensors_in(arguments) if t.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, leaves, dys)]


def assert_as_near(operation: Callable[..., Any], dtype: torch.dtype, *arguments: Any) -> None:
    """operation(backend, *arguments), for both backends, against the reference in float64."""
    assert all(runs_triton(t) for t in tensors_in(arguments) if t.is_floating_point())
    truth = results(operation, reference, widened(arguments))
    expected = results(operation, reference, arguments)
    found = results(operation, fast, arguments)
    for i, (y, r, exact) in enumerate(zip(found, expected, truth, strict=True)):
        assert y.shape == r.shape and y.dtype == r.dtype
        if not exact.numel():
            continue
        scale = float(exact.detach().abs().max())
        allowed = 2 * float((r - exact).detach().abs().max()) + ROUNDINGS * torch.finfo(dtype).eps * scale
        assert float((y - exact).detach().abs().max()) <= allowed, f"result {i}"


@EXAMPLES
@given(seeds, dtypes, drops, st.booleans(), st.booleans(), st.booleans(), st.integers(1, 9))
def test_lora_linear(device, seed, dtype, dropout, nf4, dora, bias, r):
    make = Maker(seed, dtype, device)
    layer = make.projection(20, 33, r, nf4=nf4, dora=dora, bias=bias)
    assert_as_near(lambda ops, x, p: ops.lora_linear(x, p, dropout=dropout), dtype, make.normal(2, 3, 33), layer)


@EXAMPLES
@given(seeds, dtypes, drops, st.booleans(), st.tuples(*[st.integers(0, 4)] * 3))
def test_lora_qkv(device, seed, dtype, dropout, nf4, ranks):
    make = Maker(seed, dtype, device)
    layers = [make.projection(out, 32, r, nf4=nf4) for out, r in zip((16, 8, 8), ranks, strict=True)]
    assert_as_near(lambda ops, *a: ops.lora_qkv(*a, dropout=dropout), dtype, make.normal(5, 32), *layers)


@EXAMPLES
@given(seeds, dtypes, drops, st.booleans(), st.sampled_from(["silu", "gelu", "gelu_tanh"]), st.integers(0, 4))
def test_lora_mlp(device, seed, dtype, dropout, nf4, activation, r):
    make = Maker(seed, dtype, device)
    layers = [make.projection(o, i, r, nf4=nf4) for o, i in ((36, 16), (36, 16), (16, 36))]
    options = {"activation": activation, "dropout": dropout}
    assert_as_near(lambda ops, *a: ops.lora_mlp(*a, **options), dtype, make.normal(5, 16), *layers)


@EXAMPLES
@given(seeds, dtypes, st.booleans())
def test_lora_embedding(device, seed, dtype, dora):
    make = Maker(seed, dtype, device)
    ids = torch.randint(11, (2, 4), generator=make.generator).to(device)
    lora_A, lora_B = make.normal(3, 11, grad=False).float(), make.normal(6, 3, grad=False).float()
    table = make.projection(11, 6, 0)._replace(
        lora_A=lora_A.requires_grad_(),
        lora_B=lora_B.requires_grad_(),
        magnitude=make.normal(6, grad=False).float().abs().add(0.5).requires_grad_() if dora else None,
    )
    assert_as_near(lambda ops, ids, p: ops.lora_embedding(ids, p), dtype, ids, table)


@EXAMPLES
@given(seeds, dtypes, st.lists(st.integers(-1, 2), min_size=4, max_size=4), st.booleans())
def test_multi_lora_linear(device, seed, dtype, index, nf4):
    make = Maker(seed, dtype, device)
    base, A, B = make.projection(20, 32, 0, nf4=nf4), make.normal(3, 4, 32), make.normal(3, 20, 4)
    scaling, of_row = torch.tensor([1.0, 2.0, 0.5], device=device), torch.tensor(index, device=device)
    assert_as_near(lambda ops, *a: ops.multi_lora_linear(*a), dtype, make.normal(4, 3, 32), base, A, B, scaling, of_row)


@EXAMPLES
@given(seeds, dtypes, st.sampled_from([0.0, 1.0]), st.booleans(), st.booleans())
def test_rms_norm(device, seed, dtype, offset, rounds, with_residual):
    make = Maker(seed, dtype, device)
    tensors = [make.normal(5, 40), make.normal(40), *([make.normal(5, 40)] if with_residual else [])]

    def operation(ops, x, weight, residual=None):
        return ops.rms_norm(x, weight, residual=residual, offset=offset, round_before_weight=rounds)

    assert_as_near(operation, dtype, *tensors)


@EXAMPLES
@given(seeds, dtypes, st.booleans(), st.booleans(), st.sampled_from([16, 8]))
def test_rope(device, seed, dtype, interleaved, by_position, rot):
    make = Maker(seed, dtype, device)
    angles = torch.randn(9, rot // 2, generator=make.generator)
    angles = angles.repeat_interleave(2, dim=1) if interleaved else torch.cat([angles, angles], dim=1)
    table = angles if by_position else angles[:5]
    cos, sin = (f().to(device, dtype) for f in (table.cos, table.sin))
    positions = torch.randint(9, (2, 5), generator=make.generator).to(device) if by_position else None

    def operation(ops, q, k, cos, sin):
        return ops.rope(q.transpose(1, 2), k, cos, sin, position_ids=positions, interleaved=interleaved)

    assert_as_near(operation, dtype, make.normal(2, 5, 4, 16), make.normal(2, 2, 5, 16), cos, sin)


@EXAMPLES
@given(
    seeds, dtypes, st.integers(0, 4), st.sampled_from([None, 3.0]), st.sampled_from([0.0, 0.1]),
    st.sampled_from(["mean", "sum", "none"]), st.sampled_from([None, Dropout(0.3, 7)]),
)  # fmt: skip
def test_linear_cross_entropy(device, seed, dtype, r, softcap, smoothing, reduction, dropout):
    make = Maker(seed, dtype, device)
    labels = torch.randint(50, (2, 6), generator=make.generator).to(device)
    labels[0, :2] = -100

    def operation(ops, hidden, head):
        return ops.linear_cross_entropy(
            hidden, head, labels, softcap=softcap, label_smoothing=smoothing, reduction=reduction, dropout=dropout
        )

    assert_as_near(operation, dtype, make.normal(2, 6, 32), make.projection(50, 32, r))
