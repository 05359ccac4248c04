"""`lora_embedding`, proven: h = W[ids] + s · (Aᵀ[ids]) Bᵀ, a linear layer on one-hot inputs."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lora.testing.block_cases import EmbeddingInput
from lora.testing.cases import Layer, LinearInput
from lora.testing.proof import BACKENDS, assert_equivalent, changed, results
from lora.testing.strategies import embedding_inputs
from proof.laws import (
    Run,
    assert_agree,
    assert_same_bits,
    both,
    examples,
    fresh,
    law_a_batch_is_its_parts,
    law_a_gradient_does_not_depend_on_who_else_wants_one,
    law_gradients_are_linear_in_dy,
    law_gradients_are_those_of_finite_differences,
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
)

tidy = embedding_inputs().map(
    lambda case: changed(
        case, table_layout="contiguous", dy_layout="contiguous", dy_size=1.0, layer=replace(case.layer, size=1.0)
    )
)
adapted = tidy.map(lambda case: changed(case, layer=replace(case.layer, rank=max(case.layer.rank, 1))))
plain_lora = adapted.map(lambda case: changed(case, layer=replace(case.layer, dora=False)))
rows_of_ids = tidy.map(lambda case: changed(case, shape=(7,)))


@examples(80)
@given(embedding_inputs())
def test_both_backends_are_within_the_bound(device, case):
    assert_equivalent(case, device)


@both
@examples(10)
@given(case=embedding_inputs())
def test_two_runs_are_the_same_bits(device, backend, case):
    law_two_runs_are_the_same_bits(Run(case, backend, device))


@both
@examples(10)
@given(case=tidy)
def test_a_gradient_does_not_depend_on_who_else_wants_one(device, backend, case):
    law_a_gradient_does_not_depend_on_who_else_wants_one(Run(case, backend, device))


@both
@examples(10)
@given(case=tidy)
def test_gradients_are_linear_in_dy(device, backend, case):
    law_gradients_are_linear_in_dy(Run(case, backend, device))


@both
@examples(10)
@given(case=rows_of_ids, seed=st.integers(0, 99))
def test_tokens_do_not_see_each_other(device, backend, case, seed):
    law_tokens_do_not_see_each_other(Run(case, backend, device), {"ids"}, seed)


@both
@examples(10)
@given(case=rows_of_ids)
def test_silent_tokens_teach_nothing(device, backend, case):
    run = Run(case, backend, device)
    law_silent_tokens_teach_nothing(run, {"ids"})


@both
@examples(10)
@given(case=rows_of_ids, cut=st.integers(0, 7))
def test_a_batch_is_its_parts(device, backend, case, cut):
    law_a_batch_is_its_parts(Run(case, backend, device), {"ids"}, cut)


@both
@examples(15)
@given(case=adapted)
def test_it_is_a_linear_layer_on_one_hot_inputs(device, backend, case):
    """h, dlora_A and dlora_B are `lora_linear`'s for x = e_id and the transposed table."""
    run = Run(changed(case, padding_idx=None, layer=replace(case.layer, dora=False)), backend, device)
    p, ids = run.arguments["projection"], run.arguments["ids"]
    x = F.one_hot(ids, case.vocab).to(case.dtype)
    linear = LinearInput(dtype=case.dtype)
    arguments = fresh({"x": x, "projection": p._replace(weight=p.weight.detach().T)})
    found = results(linear, BACKENDS[backend], arguments, run.dys)
    for name in {"h", "dlora_A", "dlora_B"} & run.found.keys():
        # a linear layer's sums over tokens stay in float32, so its own bound is below this one
        assert_agree(run.found[name], found[name], run.bounds[name], name)


@both
@examples(15)
@given(case=adapted)
def test_ids_that_do_not_come_get_no_gradient(device, backend, case):
    """Exactly zero, for the table and for their columns of A; so does the padding's column."""
    run = Run(case, backend, device)
    absent = torch.ones(case.vocab, dtype=torch.bool)
    absent[run.arguments["ids"].flatten().cpu()] = False
    if "dweight" in run.found:
        assert not run.found["dweight"].cpu()[absent].any()
    if "dlora_A" in run.found:
        if case.padding_idx is not None:
            absent[case.padding_idx] = True
        assert not run.found["dlora_A"].cpu()[:, absent].any()


@both
@examples(15)
@given(case=adapted)
def test_the_padding_id_only_loses_its_gradient(device, backend, case):
    """Outputs and all other gradients are what they are without it: every bit."""
    run, without = (Run(changed(case, padding_idx=i), backend, device) for i in (case.padding_idx or 0, None))
    for name, value in run.found.items():
        expected = without.found[name].clone()
        if name == "dlora_A":
            expected[:, case.padding_idx or 0] = 0
        assert_same_bits(value, expected, name)


@both
@examples(15)
@given(case=adapted)
def test_the_update_depends_on_s_B_A_alone(device, backend, case):
    layer = replace(case.layer, dora=False, adapter_dtype=None)
    run = Run(changed(case, dtype=torch.float32, layer=layer), backend, device)
    law_the_update_depends_on_s_B_A_alone(run)


@both
@examples(15)
@given(case=plain_lora)
def test_the_update_is_linear_in_scaling_and_in_B(device, backend, case):
    run = Run(changed(case, dtype=torch.float32, shape=(7,), layer=updating(case.layer)), backend, device)
    law_the_update_is_linear(run, "projection")


@both
@examples(10)
@given(case=plain_lora)
def test_ranks_can_be_padded(device, backend, case):
    law_ranks_can_be_padded(Run(case, backend, device))


@both
@examples(10)
@given(case=plain_lora, seed=st.integers(0, 99))
def test_the_basis_of_the_rank_does_not_matter(device, backend, case, seed):
    law_the_basis_of_the_rank_does_not_matter(Run(case, backend, device), seed)


@both
@examples(10)
@given(case=plain_lora, split=st.integers(1, 8))
def test_several_adapters_are_one(device, backend, case, split):
    run = Run(changed(case, layer=replace(case.layer, rank=9)), backend, device)
    law_several_adapters_are_one(run, "projection", split)


@both
@examples(10)
@given(case=adapted)
def test_merged_is_adapted(device, backend, case):
    """Rows of the merged table, within the bound and the one rounding of the table."""
    run = Run(case, backend, device)
    p = run.arguments["projection"]
    merged, error = merged_projection(p._replace(weight=p.weight.T), case.dtype)
    ids = run.arguments["ids"]
    assert_agree(merged.weight.T[ids], run.found["h"], run.bounds["h"] + error.T[ids.cpu()], "h")


@both
@examples(15)
@given(case=adapted)
def test_the_same_id_gives_the_same_row(device, backend, case):
    """An embedding looks ids up: tokens of one id have one output, to the bound."""
    run = Run(changed(case, shape=(9,), vocab=2, padding_idx=None), backend, device)
    ids = run.arguments["ids"].cpu()
    for token in (ids == ids[0]).nonzero().flatten().tolist():
        assert_agree(run.found["h"][token], run.found["h"][0], run.bounds["h"][0], "h")


@both
@examples(10)
@given(case=tidy)
def test_leading_dimensions_and_int32_ids_do_not_matter(device, backend, case):
    run = Run(changed(case, shape=(2, 3)), backend, device)
    for ids in (run.arguments["ids"].flatten(), run.arguments["ids"].int().flatten()):
        found = run.results(fresh(run.arguments, ids=ids), {"h": run.dys["h"].reshape(6, -1)})
        for name, value in run.found.items():
            if ids.dtype == torch.int64:
                assert_same_bits(found[name].reshape(value.shape), value, name)
            assert_agree(found[name].reshape(value.shape), value, run.bounds[name], name)


@both
@examples(10)
@given(case=tidy)
def test_without_an_adapter_rows_are_the_tables_own_bits(device, backend, case):
    run = Run(changed(case, layer=replace(case.layer, rank=0, dora=False)), backend, device)
    table = run.arguments["projection"].weight
    assert_same_bits(run.found["h"], table.detach()[run.arguments["ids"]], "h")


@both
def test_gradients_are_those_of_finite_differences(device, backend):
    case = EmbeddingInput(dtype=torch.float64, layer=Layer(4, 2), vocab=5)
    law_gradients_are_those_of_finite_differences(Run(case, backend, device))
