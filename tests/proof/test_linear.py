"""`lora_linear`, proven: both backends against float64 within the bound, and the laws of a low-rank update.

h = x Wᵀ + b + s · (D(x) Aᵀ) Bᵀ
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.projection import Dropout, Projection
from lora.reference.dora import dora_norm
from lora.reference.dropout import apply_dropout
from lora.testing.cases import Layer, LinearInput
from lora.testing.proof import assert_equivalent, changed
from lora.testing.strategies import linear_inputs
from proof.laws import (
    Run,
    assert_agree,
    both,
    examples,
    fresh,
    law_a_batch_is_its_parts,
    law_a_gradient_does_not_depend_on_who_else_wants_one,
    law_an_nf4_weight_is_the_dense_weight_it_decodes_to,
    law_gradients_are_linear_in_dy,
    law_gradients_are_those_of_finite_differences,
    law_leading_dimensions_do_not_matter,
    law_memory_layout_does_not_matter,
    law_ranks_can_be_padded,
    law_several_adapters_are_one,
    law_silent_tokens_teach_nothing,
    law_the_basis_of_the_rank_does_not_matter,
    law_the_update_depends_on_s_B_A_alone,
    law_the_update_is_linear,
    law_tokens_do_not_see_each_other,
    law_two_runs_are_the_same_bits,
    merged_projection,
    updating,
    with_parts,
)

ordinary = linear_inputs().map(lambda case: changed(case, x_size=1.0, dy_size=1.0, special=False))
adapted = ordinary.map(lambda case: changed(case, layer=replace(case.layer, rank=max(case.layer.rank, 1))))
plain_lora = adapted.map(lambda case: changed(case, layer=replace(case.layer, dora=False)))


@examples(150)
@given(linear_inputs())
def test_both_backends_are_within_the_bound(device, case):
    assert_equivalent(case, device)


# ---- exact laws


@both
@examples(20)
@given(case=ordinary)
def test_two_runs_are_the_same_bits(device, backend, case):
    law_two_runs_are_the_same_bits(Run(case, backend, device))


@both
@examples(15)
@given(case=ordinary)
def test_a_gradient_does_not_depend_on_who_else_wants_one(device, backend, case):
    law_a_gradient_does_not_depend_on_who_else_wants_one(Run(case, backend, device))


@both
@examples(20)
@given(case=ordinary)
def test_gradients_are_linear_in_dy(device, backend, case):
    case = changed(case, layout="contiguous", dy_layout="contiguous")  # twice a strided dy is no longer strided
    law_gradients_are_linear_in_dy(Run(case, backend, device))


@both
@examples(20)
@given(case=plain_lora)
def test_the_update_depends_on_s_B_A_alone(device, backend, case):
    case = changed(case, dtype=torch.float32, layer=replace(case.layer, adapter_dtype=None))
    law_the_update_depends_on_s_B_A_alone(Run(case, backend, device))


@both
@examples(20)
@given(case=plain_lora)
def test_the_update_is_linear_in_scaling_and_in_B(device, backend, case):
    case = changed(case, dtype=torch.float32, shape=(7,), dropout=None, layer=updating(case.layer))
    law_the_update_is_linear(Run(case, backend, device), "projection")


@both
@examples(15)
@given(case=plain_lora)
def test_no_scaling_is_no_adapter(device, backend, case):
    """With s = 0 outputs and dx are the frozen layer's, and the adapter has zero gradients, not small ones."""
    run = Run(changed(case, layer=replace(case.layer, scaling=0.0)), backend, device)
    p = run.arguments["projection"]
    alone = run.results(fresh(run.arguments, projection=Projection(p.weight, p.bias)))
    for name, value in alone.items():
        assert_agree(run.found[name], value, run.bounds[name], name)
    for name in ("dlora_A", "dlora_B"):
        assert name not in run.found or not run.found[name].any()


@both
@examples(15)
@given(case=ordinary)
def test_memory_layout_does_not_matter(device, backend, case):
    """To the bound: sums may take another order."""
    run = Run(changed(case, layout="contiguous", dy_layout="contiguous"), backend, device)
    law_memory_layout_does_not_matter(run, {"x"})


@both
@examples(15)
@given(case=ordinary)
def test_leading_dimensions_do_not_matter(device, backend, case):
    case = changed(case, shape=(2, 3), layout="contiguous", dy_layout="contiguous")
    law_leading_dimensions_do_not_matter(Run(case, backend, device), {"x"})


@both
@examples(15)
@given(case=plain_lora)
def test_an_nf4_weight_is_the_dense_weight_it_decodes_to(device, backend, case):
    """In every bit for fast, which multiplies both alike; autograd multiplies a dense weight in another order."""
    layer = replace(case.layer, nf4=True, bias=False)
    run = Run(changed(case, layout="contiguous", dy_layout="contiguous", layer=layer), backend, device)
    law_an_nf4_weight_is_the_dense_weight_it_decodes_to(run, exact=backend == "fast")


@both
@examples(15)
@given(case=ordinary)
def test_dropout_of_probability_zero_is_none(device, backend, case):
    without, run = (Run(changed(case, dropout=dropout), backend, device) for dropout in (None, Dropout(0.0, 7)))
    for name, value in run.found.items():
        assert_agree(value, without.found[name], run.bounds[name], name)


# ---- laws to the bound: two runs in another order of work


rows_of_x = ordinary.map(
    lambda case: changed(case, shape=(7,), dropout=None, layout="contiguous", dy_layout="contiguous")
)


@both
@examples(20)
@given(case=rows_of_x, seed=st.integers(0, 99))
def test_tokens_do_not_see_each_other(device, backend, case, seed):
    law_tokens_do_not_see_each_other(Run(case, backend, device), {"x"}, seed)


@both
@examples(20)
@given(case=rows_of_x, cut=st.integers(0, 7))
def test_a_batch_is_its_parts(device, backend, case, cut):
    law_a_batch_is_its_parts(Run(case, backend, device), {"x"}, cut)


@both
@examples(15)
@given(case=rows_of_x)
def test_silent_tokens_teach_nothing(device, backend, case):
    law_silent_tokens_teach_nothing(Run(case, backend, device), {"x"})


@both
@examples(20)
@given(case=plain_lora)
def test_ranks_can_be_padded(device, backend, case):
    law_ranks_can_be_padded(Run(case, backend, device))


@both
@examples(20)
@given(case=plain_lora, seed=st.integers(0, 99))
def test_the_basis_of_the_rank_does_not_matter(device, backend, case, seed):
    law_the_basis_of_the_rank_does_not_matter(Run(case, backend, device), seed)


@both
@examples(20)
@given(case=plain_lora, split=st.integers(1, 8))
def test_several_adapters_are_one(device, backend, case, split):
    run = Run(changed(case, layer=replace(case.layer, rank=9)), backend, device)
    law_several_adapters_are_one(run, "projection", split)


@both
@examples(20)
@given(case=adapted)
def test_merged_is_adapted(device, backend, case):
    """x W'ᵀ + b with W' = merge_weight, within both bounds and the one rounding of W'."""
    run = Run(changed(case, dropout=None), backend, device)
    merged, error = merged_projection(run.arguments["projection"], case.dtype)
    found = run.results(fresh(run.arguments, projection=merged))
    x, dy = (t.detach().double().cpu().abs() for t in (run.arguments["x"], run.dys["h"]))
    sizes = {"h": x @ error.T, "dx": dy @ error}
    for name in {"h", "dx"} & run.found.keys():
        assert_agree(found[name], run.found[name], run.bounds[name] + sizes[name], name)


@both
@examples(15)
@given(case=plain_lora)
def test_dropout_is_the_adapter_on_the_dropped_input(device, backend, case):
    """h(x, D) - x Wᵀ = h(D(x)) - D(x) Wᵀ: the mask touches the adapter's input alone."""
    run = Run(changed(case, dropout=Dropout(0.4, case.seed), layer=replace(case.layer, bias=False)), backend, device)
    p, x = run.arguments["projection"], run.arguments["x"].detach()
    dropped = apply_dropout(x, run.case.dropout)
    without = Run(changed(run.case, dropout=None), backend, device)
    base, on_dropped = ({"projection": Projection(p.weight), "x": t, "dropout": None} for t in (x, dropped))
    update = without.results(on_dropped | {"projection": p})["h"].double() - without.results(on_dropped)["h"].double()
    expected = without.results(base)["h"].double() + update
    assert_agree(
        run.found["h"].double(),
        expected,
        4 * run.bounds["h"] + 2 * torch.finfo(case.dtype).eps * update.abs().cpu(),
        "h",
    )


@both
@examples(15)
@given(case=adapted)
def test_dora_with_the_norm_for_magnitude_is_lora(device, backend, case):
    """g = 1: the row's own length changes nothing."""
    run = Run(changed(case, layer=replace(case.layer, dora=True, zeros=False)), backend, device)
    p = run.arguments["projection"]
    norm = dora_norm(p.weight, p.lora_A.to(case.dtype), p.lora_B.to(case.dtype), p.scaling)
    lora = run.results(fresh(run.arguments, projection=p._replace(magnitude=None)))
    own = with_parts(p, magnitude=norm.double().to(torch.float32 if case.dtype != torch.float64 else torch.float64))
    dora = run.results(fresh(run.arguments, projection=own))
    for name in lora:
        room = 2 * run.bounds[name] + 4 * torch.finfo(case.dtype).eps * lora[name].double().abs().cpu()
        assert_agree(dora[name].double(), lora[name].double(), room, name)


@pytest.mark.parametrize("dropout", [None, Dropout(0.3, 7)])
@pytest.mark.parametrize("nf4", [False, True])
@both
def test_gradients_are_those_of_finite_differences(device, backend, dropout, nf4):
    layer = Layer(6, 3, bias=True, nf4=nf4, scaling=1.5)
    case = LinearInput(dtype=torch.float64, shape=(4,), in_features=5, dropout=dropout, layer=layer)
    law_gradients_are_those_of_finite_differences(Run(case, backend, device))
