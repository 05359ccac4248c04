"""multi_lora_linear: each row of x goes through the adapter it names."""

from __future__ import annotations

import pytest
import torch
from helpers import ROUNDING, check_backward, doubled, linear_magnitude, normal, random_projection, roundings
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora.errors import LoRAError
from lora.projection import Gradients, Projection
from lora.reference.linear import lora_linear
from lora.reference.multi_lora import multi_lora_linear, multi_lora_linear_backward
from lora.reference.nf4 import nf4_quantize


def random_adapters(
    adapters: int, out_features: int, in_features: int, rank: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    scaling = torch.tensor([0.5, -1.5, 2.0, 0.25])[:adapters]  # exact in every dtype
    return normal(adapters, rank, in_features, dtype=dtype), normal(adapters, out_features, rank, dtype=dtype), scaling


def check_multi(
    x: Tensor, base: Projection, adapters: tuple[Tensor, Tensor, Tensor], index: Tensor, numerical: bool = True
) -> None:
    lora_A, lora_B, scaling = adapters
    bias = [] if base.bias is None else [base.bias]

    def forward(x: Tensor, A: Tensor, B: Tensor, *bias: Tensor) -> Tensor:
        return multi_lora_linear(x, Projection(base.weight, *bias), A, B, scaling, index)

    def backward(dy: Tensor, x: Tensor, A: Tensor, B: Tensor, *bias: Tensor) -> list[Tensor]:
        gradients = multi_lora_linear_backward(dy, x, Projection(base.weight, *bias), A, B, scaling, index)
        assert (gradients.dbias is None) == (not bias)
        return [g for g in (gradients.dx, gradients.dlora_A, gradients.dlora_B, gradients.dbias) if g is not None]

    check_backward(forward, backward, [x, lora_A, lora_B, *bias], numerical=numerical)


@given(
    index=st.lists(st.integers(-1, 2), min_size=1, max_size=5),
    leading=st.lists(st.integers(1, 3), max_size=1),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.int64, torch.int32]),
    seed=st.integers(0, 2**31),
)
def test_backward(
    index: list[int], leading: list[int], sizes: tuple[int, int, int], bias: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    out_features, in_features, _ = sizes
    base = random_projection(out_features, in_features, None, bias=bias)
    x = normal(len(index), *leading, in_features)
    check_multi(x, base, random_adapters(3, *sizes), torch.tensor(index, dtype=dtype))


def test_backward_on_an_nf4_base() -> None:
    base = random_projection(8, 12, None, bias=True)
    base = base._replace(weight=nf4_quantize(base.weight.float()))
    check_multi(normal(4, 12), base, random_adapters(2, 8, 12, 2), torch.tensor([1, -1, 0, 1]))


def test_each_row_is_a_lora_linear_of_its_own() -> None:
    base, (lora_A, lora_B, scaling) = random_projection(5, 4, None, bias=True), random_adapters(3, 5, 4, 2)
    x, index = normal(6, 3, 4), torch.tensor([2, -1, 0, 2, -1, 0])  # adapter 1 has no row
    h = multi_lora_linear(x, base, lora_A, lora_B, scaling, index)
    for row, adapter in enumerate(index.tolist()):
        own = base
        if adapter >= 0:
            own = base._replace(lora_A=lora_A[adapter], lora_B=lora_B[adapter], scaling=float(scaling[adapter]))
        torch.testing.assert_close(h[row], lora_linear(x[row], own), **ROUNDING)


def test_an_adapter_without_rows_has_a_zero_gradient() -> None:
    base, adapters = random_projection(5, 4, None), random_adapters(3, 5, 4, 2)
    gradients: Gradients = multi_lora_linear_backward(
        normal(3, 5), normal(3, 4), base, *adapters, torch.tensor([2, -1, 0])
    )
    assert (gradients.dlora_A[1] == 0).all() and (gradients.dlora_B[1] == 0).all()
    assert (gradients.dlora_A[[0, 2]] != 0).all() and (gradients.dlora_B[[0, 2]] != 0).all()


def test_base_rows_are_the_base_bit_for_bit() -> None:
    base = random_projection(5, 4, None, bias=True, dtype=torch.bfloat16)
    adapters, x = random_adapters(2, 5, 4, 2, torch.bfloat16), normal(6, 4, dtype=torch.bfloat16)
    index = torch.tensor([-1, 0, -1, 1, -1, -1])
    h = multi_lora_linear(x, base, *adapters, index)
    assert torch.equal(h[index < 0], lora_linear(x, base)[index < 0])
    assert not torch.equal(h[index >= 0], lora_linear(x, base)[index >= 0])


def test_padded_ranks_add_nothing() -> None:
    base, (lora_A, lora_B, scaling) = random_projection(5, 4, None), random_adapters(2, 5, 4, 2)
    wide_A = torch.cat([lora_A, torch.zeros(2, 3, 4, dtype=torch.float64)], dim=1)
    wide_B = torch.cat([lora_B, torch.zeros(2, 5, 3, dtype=torch.float64)], dim=2)
    x, index = normal(4, 4), torch.tensor([0, 1, 1, -1])
    expected = multi_lora_linear(x, base, lora_A, lora_B, scaling, index)
    torch.testing.assert_close(multi_lora_linear(x, base, wide_A, wide_B, scaling, index), expected, **ROUNDING)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_agrees_with_pefts_mixed_batches() -> None:
    import peft

    base, (lora_A, lora_B, scaling) = random_projection(5, 4, None, bias=True), random_adapters(2, 5, 4, 2)
    model = nn.Sequential(nn.Linear(4, 5)).double()
    for number, name in enumerate(("zero", "one")):
        config = peft.LoraConfig(r=2, lora_alpha=2 * float(scaling[number]), target_modules=["0"])
        model = peft.inject_adapter_in_model(config, model, adapter_name=name)
    layer = model[0].eval()
    with torch.no_grad():
        layer.base_layer.weight.copy_(base.weight)
        layer.base_layer.bias.copy_(base.bias)
        for number, name in enumerate(("zero", "one")):
            layer.lora_A[name].weight.copy_(lora_A[number])
            layer.lora_B[name].weight.copy_(lora_B[number])
    x, index = normal(4, 3, 4), torch.tensor([1, -1, 0, 1])
    expected = layer(x, adapter_names=["one", "__base__", "zero", "one"])
    torch.testing.assert_close(multi_lora_linear(x, base, lora_A, lora_B, scaling, index), expected, **ROUNDING)


@pytest.mark.parametrize(("rows", "tokens"), [(0, 3), (3, 0), (1, 1)])
def test_no_row_no_token_and_one(rows: int, tokens: int) -> None:
    base, adapters = random_projection(5, 4, None, bias=True), random_adapters(2, 5, 4, 2)
    index = torch.arange(rows) % 3 - 1
    assert multi_lora_linear(normal(rows, tokens, 4), base, *adapters, index).shape == (rows, tokens, 5)
    check_multi(normal(rows, tokens, 4), base, adapters, index, numerical=False)


def test_layout_does_not_matter() -> None:
    base, (lora_A, lora_B, scaling) = random_projection(5, 4, None), random_adapters(2, 5, 4, 2)
    adapters, index = (lora_A.mT.contiguous().mT, lora_B[:, :, :1].expand(2, 5, 2), scaling), torch.tensor([1, -1, 0])
    for x in (normal(4, 3).T, normal(1, 4).expand(3, 4), normal(3, 8)[:, ::2]):
        found = multi_lora_linear(x, base, *adapters, index)
        plain = (adapter.contiguous() for adapter in adapters)
        torch.testing.assert_close(found, multi_lora_linear(x.contiguous(), base, *plain, index), **ROUNDING)
        check_multi(x, base, adapters, index, numerical=False)


def test_callers_tensors_are_left_alone() -> None:
    base, adapters = random_projection(5, 4, None, bias=True), random_adapters(2, 5, 4, 2)
    x, dy, index = normal(3, 4), normal(3, 5), torch.tensor([1, -1, 0])
    tensors = [x, dy, base.weight, base.bias, *adapters, index]
    versions = [tensor._version for tensor in tensors]
    multi_lora_linear(x, base, *adapters, index)
    multi_lora_linear_backward(dy, x, base, *adapters, index)
    assert [tensor._version for tensor in tensors] == versions


def test_bfloat16_is_within_its_roundings() -> None:
    """As for lora_linear: four roundings on the longest path, one more for float32 sums."""
    base = random_projection(33, 65, None, bias=True, dtype=torch.bfloat16)
    lora_A, lora_B, scaling = random_adapters(2, 33, 65, 4, torch.bfloat16)
    x, index = normal(30, 65, dtype=torch.bfloat16), torch.arange(30) % 3 - 1
    h = multi_lora_linear(x, base, lora_A, lora_B, scaling, index)
    truth = multi_lora_linear(x.double(), doubled(base), lora_A.double(), lora_B.double(), scaling, index)
    for adapter in range(2):
        own = base._replace(lora_A=lora_A[adapter], lora_B=lora_B[adapter], scaling=abs(float(scaling[adapter])))
        rows = index == adapter
        assert ((h - truth).abs()[rows] <= roundings(5) * linear_magnitude(x[rows], own)).all()
        assert (h - truth).abs()[rows].max() > 0


@pytest.mark.parametrize("wrong", [2, -2])
@pytest.mark.parametrize("backward", [False, True])
def test_an_adapter_that_is_not_there_is_named(wrong: int, backward: bool) -> None:
    base, adapters = random_projection(5, 4, None), random_adapters(2, 5, 4, 2)
    index = torch.tensor([0, 1, wrong])
    with pytest.raises(LoRAError, match=f"Row 2 names adapter {wrong}, expected 0 to 1, or -1 for the base alone"):
        if backward:
            multi_lora_linear_backward(normal(3, 5), normal(3, 4), base, *adapters, index)
        else:
            multi_lora_linear(normal(3, 4), base, *adapters, index)


def test_adapters_that_do_not_fit_are_refused() -> None:
    base, (A, B, s) = random_projection(5, 4, None), random_adapters(2, 5, 4, 2)
    x, index = normal(3, 4), torch.tensor([0, 1, -1])
    for arguments, message in (
        ((A[:, :, :3], B, s, index), r"lora_A is \[2, 2, 3\], expected \[2, 2, 4\]"),
        ((A, B.mT, s, index), r"lora_B is \[2, 2, 5\], expected \[2, 5, 2\]"),
        ((A, B, s[:1], index), r"scaling is \[1\], expected \[2\]"),
        ((A, B, s, index[:2]), r"index is \[2\], expected \[3\]"),
        ((A, B, s, index.float()), r"torch\.float32, expected int64"),
    ):
        with pytest.raises(LoRAError, match=message):
            multi_lora_linear(x, base, *arguments)
    with pytest.raises(LoRAError, match="adapter of its own"):
        multi_lora_linear(x, random_projection(5, 4, 2), A, B, s, index)
