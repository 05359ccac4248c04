"""`lora_qkv`, proven: three projections of one x, in one pass or in three.

q, k, v = lora_linear(x, ·)        dx = dx_q + dx_k + dx_v
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.fast.operands import rows_of_one
from lora.projection import Dropout, Projection
from lora.testing.cases import Layer, LinearInput, QKVInput
from lora.testing.proof import BACKENDS, assert_equivalent, changed, results
from lora.testing.strategies import qkv_inputs
from proof.laws import (
    Run,
    assert_agree,
    assert_same_bits,
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
    law_weights_that_lie_together_change_nothing,
    merged_projection,
    updating,
)

ordinary = qkv_inputs().map(lambda case: changed(case, x_size=1.0, dy_size=1.0, special=False))
tidy = ordinary.map(lambda case: changed(case, layout="contiguous", dy_layout="contiguous"))
rows_of_x = tidy.map(lambda case: changed(case, shape=(6,), dropout=None))


def with_adapters(case: QKVInput) -> QKVInput:
    """Each of the three with an adapter, none with DoRA."""
    return changed(case, layers=tuple(replace(layer, rank=max(layer.rank, 1), dora=False) for layer in case.layers))


def in_float32(case: QKVInput) -> QKVInput:
    return changed(case, dtype=torch.float32, layers=tuple(replace(la, adapter_dtype=None) for la in case.layers))


plain_lora = tidy.map(with_adapters)


@examples(60)
@given(qkv_inputs())
def test_both_backends_are_within_the_bound(device, case):
    assert_equivalent(case, device)


@both
@examples(8)
@given(case=ordinary)
def test_two_runs_are_the_same_bits(device, backend, case):
    law_two_runs_are_the_same_bits(Run(case, backend, device))


@both
@examples(6)
@given(case=ordinary)
def test_a_gradient_does_not_depend_on_who_else_wants_one(device, backend, case):
    law_a_gradient_does_not_depend_on_who_else_wants_one(Run(case, backend, device))


@both
@examples(8)
@given(case=tidy)
def test_gradients_are_linear_in_dy(device, backend, case):
    law_gradients_are_linear_in_dy(Run(case, backend, device))


@both
@examples(6)
@given(case=tidy)
def test_memory_layout_does_not_matter(device, backend, case):
    law_memory_layout_does_not_matter(Run(case, backend, device), {"x"})


@both
@examples(8)
@given(case=rows_of_x, seed=st.integers(0, 99))
def test_tokens_do_not_see_each_other(device, backend, case, seed):
    law_tokens_do_not_see_each_other(Run(case, backend, device), {"x"}, seed)


@both
@examples(8)
@given(case=rows_of_x, cut=st.integers(0, 6))
def test_a_batch_is_its_parts(device, backend, case, cut):
    law_a_batch_is_its_parts(Run(case, backend, device), {"x"}, cut)


@both
@examples(8)
@given(case=rows_of_x)
def test_silent_tokens_teach_nothing(device, backend, case):
    law_silent_tokens_teach_nothing(Run(case, backend, device), {"x"})


@both
@examples(20)
@given(case=tidy)
def test_it_is_three_linear_layers(device, backend, case):
    """Outputs, and gradients of each projection, are those that `lora_linear` gives it."""
    run = Run(case, backend, device)
    for name, layer in zip("qkv", case.layers, strict=True):
        alone = LinearInput(seed=case.seed, dtype=case.dtype, dropout=case.dropout, layer=layer)
        arguments = {"x": run.arguments["x"], "projection": run.arguments[name], "dropout": case.dropout}
        found = results(alone, BACKENDS[backend], fresh(arguments), {"h": run.dys[name]})
        assert_agree(run.found[name], found["h"], run.bounds[name], name)
        for part in ("weight", "bias", "lora_A", "lora_B", "magnitude"):
            key = f"d{name}.{part}"
            assert (key in run.found) == (f"d{part}" in found)
            if key in run.found:
                assert_agree(run.found[key], found[f"d{part}"], run.bounds[key], key)


@both
@examples(12)
@given(case=tidy, order=st.permutations("qkv"))
def test_the_three_are_alike(device, backend, case, order):
    """q, k and v handed over in another order come back in that order."""
    run = Run(case, backend, device)
    moved = fresh(run.arguments, **{name: run.arguments[other] for name, other in zip("qkv", order, strict=True)})
    found = run.results(moved, {name: run.dys[other] for name, other in zip("qkv", order, strict=True)})
    for name, other in zip("qkv", order, strict=True):
        assert_agree(found[name], run.found[other], run.bounds[other], name)
    if "dx" in run.found:
        assert_agree(found["dx"], run.found["dx"], run.bounds["dx"], "dx")


@both
@examples(12)
@given(case=tidy)
def test_weights_that_lie_together_change_nothing(device, backend, case):
    """Rows of one matrix, or three matrices: the same numbers, and one product in the first case."""
    case = changed(case, layers=tuple(replace(layer, nf4=False) for layer in case.layers))
    together, apart = (Run(changed(case, stacked=stacked), backend, device) for stacked in (True, False))
    weights = [together.arguments[name].weight for name in "qkv"]
    assert rows_of_one(weights).shape[0] == sum(layer.out_features for layer in case.layers)
    law_weights_that_lie_together_change_nothing(together, apart)


@both
@examples(8)
@given(case=plain_lora.map(in_float32))
def test_the_update_depends_on_s_B_A_alone(device, backend, case):
    law_the_update_depends_on_s_B_A_alone(Run(case, backend, device))


@both
@examples(8)
@given(case=plain_lora)
def test_the_update_is_linear_in_scaling_and_in_B(device, backend, case):
    """Of q, k and v at once."""
    case = changed(
        case, dtype=torch.float32, shape=(7,), dropout=None, layers=tuple(updating(layer) for layer in case.layers)
    )
    law_the_update_is_linear(Run(case, backend, device), *"qkv")


@both
@examples(8)
@given(case=plain_lora)
def test_ranks_can_be_padded(device, backend, case):
    law_ranks_can_be_padded(Run(case, backend, device))


@both
@examples(8)
@given(case=plain_lora, seed=st.integers(0, 99))
def test_the_basis_of_the_rank_does_not_matter(device, backend, case, seed):
    law_the_basis_of_the_rank_does_not_matter(Run(case, backend, device), seed)


@both
@examples(8)
@given(case=plain_lora, argument=st.sampled_from("qkv"), split=st.integers(1, 8))
def test_several_adapters_are_one(device, backend, case, argument, split):
    run = Run(changed(case, layers=tuple(replace(layer, rank=9) for layer in case.layers)), backend, device)
    law_several_adapters_are_one(run, argument, split)


@both
@examples(8)
@given(case=tidy.map(with_adapters))
def test_merged_is_adapted(device, backend, case):
    """q, k and v of the merged weights, and dx, within both bounds and the one rounding of each weight."""
    run = Run(changed(case, dropout=None), backend, device)
    merged = {name: merged_projection(run.arguments[name], case.dtype) for name in "qkv"}
    found = run.results(fresh(run.arguments, **{name: projection for name, (projection, _) in merged.items()}))
    x, dys = run.arguments["x"].detach().double().cpu().abs(), {n: dy.double().cpu().abs() for n, dy in run.dys.items()}
    room = {name: x @ error.T for name, (_, error) in merged.items()}
    room["dx"] = sum(dys[name] @ error for name, (_, error) in merged.items())
    for name in room.keys() & run.found.keys():
        assert_agree(found[name], run.found[name], run.bounds[name] + room[name], name)


@both
@examples(8)
@given(case=tidy)
def test_nf4_weights_are_the_dense_weights_they_decode_to(device, backend, case):
    case = changed(case, layers=tuple(replace(layer, nf4=True) for layer in case.layers))
    law_an_nf4_weight_is_the_dense_weight_it_decodes_to(Run(case, backend, device))


@both
@examples(8)
@given(case=tidy)
def test_leading_dimensions_do_not_matter(device, backend, case):
    law_leading_dimensions_do_not_matter(Run(changed(case, shape=(2, 3)), backend, device), {"x"})


@both
def test_gradients_are_those_of_finite_differences(device, backend):
    layers = (Layer(6, 2, bias=True), Layer(4, 2), Layer(3, 1))
    case = QKVInput(dtype=torch.float64, shape=(3,), in_features=5, layers=layers, dropout=Dropout(0.3, 7))
    law_gradients_are_those_of_finite_differences(Run(case, backend, device))


@both
@examples(12)
@given(case=tidy, silent=st.sampled_from("qkv"))
def test_an_output_that_nobody_uses_teaches_nothing(device, backend, case, silent):
    """Zero dy for one of the three: its parameters get exactly zero, and dx is the other two's."""
    run = Run(changed(case, dropout=None), backend, device)
    found = run.results(dys=run.dys | {silent: torch.zeros_like(run.dys[silent])})
    for name, value in found.items():
        if name.startswith(f"d{silent}."):
            assert not value.any(), name
        elif name.startswith("d") and name != "dx":
            assert_same_bits(value, run.found[name], name)


@both
@examples(12)
@given(case=tidy)
def test_a_projection_without_an_adapter_is_the_frozen_product(device, backend, case):
    run = Run(changed(case, layers=tuple(replace(layer, rank=0, dora=False) for layer in case.layers)), backend, device)
    for name in "qkv":
        p: Projection = run.arguments[name]
        assert p.lora_A is None
        found = BACKENDS["reference"].lora_linear(run.arguments["x"].detach(), p)
        assert_agree(run.found[name], found.detach(), run.bounds[name], name)


def test_the_default_case_has_every_output():
    assert set(Run(QKVInput(), "fast", "cpu").found) >= {"q", "k", "v", "dx", "dq.lora_A", "dk.lora_B"}
