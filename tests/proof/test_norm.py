"""`rms_norm` and `layer_norm`, proven, with and without the residual sum in front."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.fast.runtime import interpreting
from lora.testing.block_cases import LayerNormInput, RMSNormInput
from lora.testing.proof import assert_equivalent, changed
from lora.testing.strategies import layer_norm_inputs, rms_norm_inputs
from proof.laws import (
    Run,
    assert_agree,
    assert_all_same_bits,
    assert_same_bits,
    both,
    examples,
    fresh,
    law_a_batch_is_its_parts,
    law_a_gradient_does_not_depend_on_who_else_wants_one,
    law_gradients_are_linear_in_dy,
    law_gradients_are_those_of_finite_differences,
    law_leading_dimensions_do_not_matter,
    law_memory_layout_does_not_matter,
    law_silent_tokens_teach_nothing,
    law_tokens_do_not_see_each_other,
    law_two_runs_are_the_same_bits,
)

ROWS = {"x", "residual"}
norms = rms_norm_inputs | layer_norm_inputs
tidy = norms.map(lambda case: changed(case, layout="contiguous", dy_layout="contiguous"))
rows_of_x = tidy.map(lambda case: changed(case, shape=(7,)))
all_train = tidy.map(lambda case: changed(case, frozen=frozenset(), shape=(5,), x_size=1.0, special=False))


@examples(100)
@given(rms_norm_inputs)
def test_both_backends_rms_norm_is_within_the_bound(device, case):
    assert_equivalent(case, device)


@examples(100)
@given(layer_norm_inputs)
def test_both_backends_layer_norm_is_within_the_bound(device, case):
    assert_equivalent(case, device)


@both
@examples(12)
@given(case=norms)
def test_two_runs_are_the_same_bits(device, backend, case):
    law_two_runs_are_the_same_bits(Run(case, backend, device))


@both
@examples(10)
@given(case=tidy)
def test_a_gradient_does_not_depend_on_who_else_wants_one(device, backend, case):
    law_a_gradient_does_not_depend_on_who_else_wants_one(Run(case, backend, device))


@both
@examples(12)
@given(case=tidy)
def test_gradients_are_linear_in_dy(device, backend, case):
    law_gradients_are_linear_in_dy(Run(case, backend, device))


@both
@examples(10)
@given(case=tidy)
def test_memory_layout_does_not_matter(device, backend, case):
    law_memory_layout_does_not_matter(Run(case, backend, device), ROWS)


@both
@examples(15)
@given(case=rows_of_x, seed=st.integers(0, 99))
def test_rows_do_not_see_each_other(device, backend, case, seed):
    """In every bit: a row's statistics are its own."""
    law_tokens_do_not_see_each_other(Run(case, backend, device), ROWS, seed, exact=by_rows_alone(device, backend, case))


@both
@examples(15)
@given(case=rows_of_x, cut=st.integers(0, 7))
def test_a_batch_is_its_parts(device, backend, case, cut):
    law_a_batch_is_its_parts(Run(case, backend, device), ROWS, cut, exact=by_rows_alone(device, backend, case))


def by_rows_alone(device, backend, case):
    """Whether a row's bits are its own: PyTorch's sums on a GPU depend on the number of rows, our kernels' do not."""
    return device == "cpu" or (backend == "fast" and case.dtype != torch.float64)


@both
@examples(10)
@given(case=rows_of_x)
def test_silent_rows_teach_nothing(device, backend, case):
    law_silent_tokens_teach_nothing(Run(case, backend, device), ROWS)


@both
@examples(15)
@given(case=all_train)
def test_the_scale_of_a_row_does_not_matter(device, backend, case):
    """y(2x, 4ε) = y(x, ε) and dx halves: every bit. That is what a norm is for."""
    if case.dtype == torch.float16:
        case = changed(case, dtype=torch.float32, weight_dtype=None)  # halves of small float16 numbers are subnormal
    run = Run(changed(case, residual=False), backend, device)
    double = fresh(run.arguments, x=run.arguments["x"] * 2) | {"eps": 4 * case.eps}
    for name, value in run.results(double).items():
        assert_same_bits(value, run.found[name] * (0.5 if name == "dx" else 1), name)


@both
@examples(15)
@given(case=all_train)
def test_a_row_turned_over_is_the_result_turned_over(device, backend, case):
    """y(-x) = -y(x) without offsets and biases; dx stays, dw turns over: every bit."""
    case = changed(case, residual=False, **({"bias": False} if isinstance(case, LayerNormInput) else {}))
    run = Run(case, backend, device)
    found = run.results(fresh(run.arguments, x=-run.arguments["x"]))
    for name, value in found.items():
        assert_same_bits(value, run.found[name] * (1 if name == "dx" else -1), name)


@both
@examples(15)
@given(case=all_train)
def test_twice_the_weight_is_twice_the_output(device, backend, case):
    """With no offset, y and dx double and dw stays: every bit."""
    case = changed(case, residual=False, **({"bias": False} if isinstance(case, LayerNormInput) else {"offset": 0.0}))
    if case.dtype == torch.float16:
        case = changed(case, dtype=torch.bfloat16)
    run = Run(case, backend, device)
    found = run.results(fresh(run.arguments, weight=run.arguments["weight"] * 2))
    for name, value in found.items():
        assert_same_bits(value, run.found[name] * (1 if name == "dweight" else 2), name)


@both
@examples(15)
@given(case=all_train)
def test_the_residual_sum_is_a_sum(device, backend, case):
    """Norm of (x, residual) is the norm of x + residual, in either order, and both terms get one gradient: all bits."""
    if interpreting() and case.dtype == torch.bfloat16:  # there a kernel's sum is cut off, not rounded
        case = changed(case, dtype=torch.float32, weight_dtype=None)
    run = Run(changed(case, residual=True), backend, device)
    a = run.arguments
    swapped = run.results(fresh(a, x=a["residual"], residual=a["x"]))
    assert_all_same_bits(swapped, run.found)
    assert_same_bits(run.found["s"], (a["x"] + a["residual"]).detach(), "s")
    assert_same_bits(run.found["dx"], run.found["dresidual"], "dx")
    plain = Run(changed(case, residual=False), backend, device)
    alone = plain.results(
        {name: v for name, v in fresh(a, x=a["x"] + a["residual"]).items() if name != "residual"}, run.dys
    )
    assert_same_bits(run.found["y"], alone["y"], "y")


@both
@examples(15)
@given(case=all_train)
def test_nothing_in_gives_nothing_out(device, backend, case):
    """x = 0 gives y = 0, or the bias, and finite gradients; a row of one feature is its sign, or nothing."""
    run = Run(changed(case, residual=False, weight_dtype=None), backend, device)
    found = run.results(fresh(run.arguments, x=torch.zeros_like(run.arguments["x"])))
    bias = run.arguments.get("bias")
    expected = torch.zeros_like(found["y"]) if bias is None else bias.detach().to(case.dtype).expand_as(found["y"])
    assert_same_bits(found["y"], expected.contiguous(), "y")
    assert all(value.isfinite().all() for value in found.values()) and not found["dweight"].any()


@both
@examples(15)
@given(case=all_train, seed=st.integers(0, 99))
def test_features_are_alike(device, backend, case, seed):
    """Features in another order, weights with them: the same numbers in that order, to the bound."""
    run = Run(case, backend, device)
    order = torch.randperm(case.features, generator=torch.Generator().manual_seed(seed)).to(device)
    names = ("x", "residual", "weight", "bias")
    moved = {name: run.arguments[name].detach()[..., order] for name in names if run.arguments.get(name) is not None}
    moved = {name: t.requires_grad_(run.arguments[name].requires_grad) for name, t in moved.items()}
    found = run.results(fresh(run.arguments, **moved), {name: dy[..., order] for name, dy in run.dys.items()})
    for name, value in run.found.items():
        assert_agree(found[name], value[..., order], run.bounds[name][..., order.cpu()], name)


@both
@examples(15)
@given(case=all_train)
def test_the_gradient_is_at_right_angles_to_the_row(device, backend, case):
    """A longer row is the same y, so x·dx = 0 but for ε: x·dx = ρ (e·x) ε ρ². In float64, to its rounding."""
    run = Run(changed(case, dtype=torch.float64, weight_dtype=None, residual=False), backend, device)
    a = run.arguments
    x, dx = a["x"].detach(), run.found["dx"]
    e = run.dys["y"] * (a["weight"].detach() + a.get("offset", 0.0))
    centred = x if isinstance(case, RMSNormInput) else x - x.mean(-1, keepdim=True)
    rho = (centred.square().mean(-1) + case.eps).rsqrt()
    expected = rho**3 * case.eps * (e * centred).sum(-1)
    scale = (x.abs() * (dx.abs() + rho[:, None] * e.abs())).sum(-1) * (1 + rho**2)
    assert ((x * dx).sum(-1) - expected).abs().le(1e-12 * scale.clamp(min=1)).all()
    if not isinstance(case, RMSNormInput):
        assert dx.sum(-1).abs().le(1e-12 * (rho[:, None] * e.abs()).sum(-1) * case.features).all()


@both
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", [RMSNormInput, LayerNormInput])
def test_gradients_are_those_of_finite_differences(device, backend, kind, residual):
    case = kind(dtype=torch.float64, shape=(3,), features=4, residual=residual, eps=0.1)
    law_gradients_are_those_of_finite_differences(Run(case, backend, device))


@both
@examples(10)
@given(case=tidy)
def test_leading_dimensions_do_not_matter(device, backend, case):
    law_leading_dimensions_do_not_matter(Run(changed(case, shape=(2, 3)), backend, device), ROWS)
