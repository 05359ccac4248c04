"""`multi_lora_linear`, proven: each row of a batch through the adapter it names, or through none."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.projection import Projection
from lora.testing.block_cases import MultiLoRAInput
from lora.testing.cases import LinearInput
from lora.testing.proof import BACKENDS, assert_equivalent, changed, named_outputs, results
from lora.testing.strategies import multi_lora_inputs
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
    law_memory_layout_does_not_matter,
    law_silent_tokens_teach_nothing,
    law_the_update_is_linear,
    law_tokens_do_not_see_each_other,
    law_two_runs_are_the_same_bits,
    merged_projection,
    signed_permutation,
)

tidy = multi_lora_inputs().map(
    lambda case: changed(case, layout="contiguous", dy_layout="contiguous", x_size=1.0, dy_size=1.0)
)


def spread(case: MultiLoRAInput) -> MultiLoRAInput:
    """Seven rows, every adapter and none of them among them."""
    count = len(case.scalings)
    return changed(case, index=tuple(i % (count + 1) - 1 for i in range(7)), frozen=frozenset({"weight", "bias"}))


spread_out = tidy.map(spread)
ROWS = {"x", "index"}


@examples(80)
@given(multi_lora_inputs())
def test_both_backends_are_within_the_bound(device, case):
    assert_equivalent(case, device)


@both
@examples(8)
@given(case=multi_lora_inputs())
def test_two_runs_are_the_same_bits(device, backend, case):
    law_two_runs_are_the_same_bits(Run(case, backend, device))


@examples(12)
@given(case=multi_lora_inputs())
def test_what_nobody_records_is_the_same_bits(device, case):
    """Under no_grad, and in inference mode, where there is no autograd function around it.

    The reference is PyTorch's own operations, which may take another way where nothing is recorded.
    """
    run = Run(case, "fast", device)
    for unrecorded in (torch.no_grad, torch.inference_mode):
        with unrecorded():
            found = named_outputs(case, run.backend, fresh(run.arguments))
        for name, value in found.items():
            assert_same_bits(value, run.found[name], name)


@both
@examples(8)
@given(case=tidy)
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
@examples(10)
@given(case=spread_out, seed=st.integers(0, 99))
def test_rows_do_not_see_each_other(device, backend, case, seed):
    law_tokens_do_not_see_each_other(Run(case, backend, device), ROWS, seed)


@both
@examples(10)
@given(case=spread_out, cut=st.integers(0, 7))
def test_a_batch_is_its_parts(device, backend, case, cut):
    law_a_batch_is_its_parts(Run(case, backend, device), ROWS, cut)


@both
@examples(10)
@given(case=spread_out)
def test_silent_rows_teach_nothing(device, backend, case):
    law_silent_tokens_teach_nothing(Run(case, backend, device), ROWS)


@both
@examples(15)
@given(case=spread_out)
def test_each_row_is_lora_linear_with_its_adapter(device, backend, case):
    """Outputs, dx, and each adapter's gradients, over its own rows only."""
    run = Run(case, backend, device)
    a = run.arguments
    for j in range(-1, len(case.scalings)):
        mine = (a["index"] == j).nonzero().flatten()
        own = (
            a["base"]
            if j < 0
            else a["base"]._replace(lora_A=a["lora_A"][j], lora_B=a["lora_B"][j], scaling=case.scalings[j])
        )
        alone = fresh({"x": a["x"].detach()[mine].requires_grad_(), "projection": own})
        found = results(LinearInput(dtype=case.dtype), BACKENDS[backend], alone, {"h": run.dys["h"][mine]})
        cpu = mine.cpu()
        assert_agree(run.found["h"][mine], found["h"], run.bounds["h"][cpu], "h")
        assert_agree(run.found["dx"][mine], found["dx"], run.bounds["dx"][cpu], "dx")
        for name in ("dlora_A", "dlora_B") if j >= 0 else ():
            assert_agree(run.found[name][j], found[name], run.bounds[name][j], name)


@both
@examples(15)
@given(case=spread_out)
def test_an_adapter_that_no_row_names_learns_nothing(device, backend, case):
    """Exactly zero for it, and the others do not notice it."""
    run = Run(changed(case, index=tuple(min(i, len(case.scalings) - 2) for i in case.index)), backend, device)
    for name in ("dlora_A", "dlora_B"):
        assert not run.found[name][-1].any()


@both
@examples(15)
@given(case=spread_out, seed=st.integers(0, 99))
def test_adapters_are_alike(device, backend, case, seed):
    """Adapters stored in another order, rows naming them there: the same results, to the bound."""
    run = Run(case, backend, device)
    order = torch.randperm(len(case.scalings), generator=torch.Generator().manual_seed(seed)).to(device)
    a, place = run.arguments, order.argsort()
    stored = {name: a[name].detach()[order] for name in ("lora_A", "lora_B", "scaling")}
    stored = {name: t.requires_grad_(a[name].requires_grad) for name, t in stored.items()}
    index = torch.where(a["index"] < 0, a["index"], place[a["index"].clamp(min=0)])
    found = run.results(fresh(a, **stored, index=index))
    for name, value in run.found.items():
        by_adapter = name in ("dlora_A", "dlora_B")
        expected, bound = (value[order], run.bounds[name][order.cpu()]) if by_adapter else (value, run.bounds[name])
        assert_agree(found[name], expected, bound, name)


@both
@examples(15)
@given(case=spread_out)
def test_the_update_depends_on_s_B_A_alone(device, backend, case):
    run = Run(changed(case, dtype=torch.float32, adapter_dtype=None), backend, device)
    a = run.arguments
    halved = (a["lora_B"].detach() / 2).requires_grad_()
    found = run.results(fresh(a, lora_B=halved, scaling=a["scaling"] * 2))
    for name, value in run.found.items():
        assert_same_bits(found[name], value * (2 if name == "dlora_B" else 1), name)


@both
@examples(15)
@given(case=spread_out)
def test_the_update_is_linear_in_scaling_and_in_B(device, backend, case):
    scalings = tuple(s or 1.5 for s in case.scalings)
    case = changed(case, dtype=torch.float32, adapter_dtype=None, scalings=scalings)
    law_the_update_is_linear(Run(case, backend, device), "")


@both
@examples(10)
@given(case=spread_out)
def test_no_adapter_is_the_frozen_product(device, backend, case):
    run = Run(changed(case, index=(-1,) * 5), backend, device)
    with torch.no_grad():
        base: Projection = run.arguments["base"]
        h = BACKENDS["reference"].lora_linear(run.arguments["x"], base)
    assert_agree(run.found["h"], h, run.bounds["h"], "h")
    assert not run.found["dlora_A"].any() and not run.found["dlora_B"].any()


@both
@examples(10)
@given(case=spread_out)
def test_ranks_can_be_padded(device, backend, case):
    """Adapters of different ranks are padded with zeros: no change, and a gradient of exactly zero."""
    run = Run(case, backend, device)
    A, B = (run.arguments[name].detach() for name in ("lora_A", "lora_B"))
    wide_A = torch.cat([A, A.new_zeros(len(A), 3, A.shape[2])], 1).requires_grad_()
    wide_B = torch.cat([B, B.new_zeros(len(B), B.shape[1], 3)], 2).requires_grad_()
    found = run.results(fresh(run.arguments, lora_A=wide_A, lora_B=wide_B))
    kept = {"dlora_A": found["dlora_A"][:, : A.shape[1]], "dlora_B": found["dlora_B"][:, :, : A.shape[1]]}
    for name, value in run.found.items():
        assert_agree((found | kept)[name], value, run.bounds[name], name)
    assert not found["dlora_A"][:, A.shape[1] :].any() and not found["dlora_B"][:, :, A.shape[1] :].any()


@both
@examples(10)
@given(case=spread_out, seed=st.integers(0, 99))
def test_the_basis_of_each_rank_does_not_matter(device, backend, case, seed):
    """A_j → QA_j, B_j → B_jQᵀ with a signed permutation Q."""
    run = Run(case, backend, device)
    Q = signed_permutation(case.rank, seed)
    turns = {"lora_A": lambda t: Q.to(t.device, t.dtype) @ t, "lora_B": lambda t: t @ Q.to(t.device, t.dtype).T}
    turned = {n: turn(run.arguments[n].detach()).requires_grad_(run.arguments[n].requires_grad)
              for n, turn in turns.items()}  # fmt: skip
    found = run.results(fresh(run.arguments, **turned))
    for name, value in run.found.items():
        turn = turns.get(name.removeprefix("d"), lambda t: t)
        assert_agree(found[name], turn(value), turn(run.bounds[name]).abs(), name)


@both
@examples(8)
@given(case=spread_out)
def test_merged_is_adapted(device, backend, case):
    """Each row through its own merged weight, within both bounds and the one rounding of that weight."""
    run = Run(case, backend, device)
    a = run.arguments
    for j in range(len(case.scalings)):
        mine = (a["index"] == j).nonzero().flatten()
        own = a["base"]._replace(lora_A=a["lora_A"][j], lora_B=a["lora_B"][j], scaling=case.scalings[j])
        merged, error = merged_projection(own, case.dtype)
        x = a["x"].detach()[mine]
        with torch.no_grad():
            found = BACKENDS[backend].lora_linear(x, merged)
        room = run.bounds["h"][mine.cpu()] + x.double().abs().cpu() @ error.T
        assert_agree(found, run.found["h"][mine], room, "h")


@both
@examples(8)
@given(case=spread_out)
def test_an_nf4_base_is_the_dense_weight_it_decodes_to(device, backend, case):
    law_an_nf4_weight_is_the_dense_weight_it_decodes_to(Run(changed(case, nf4=True), backend, device))


@both
@examples(8)
@given(case=spread_out)
def test_leading_dimensions_do_not_matter(device, backend, case):
    """[rows, 2, 2, in] is [rows, 4, in]: the same bits."""
    run = Run(changed(case, inner=(2, 2)), backend, device)
    x = run.arguments["x"]
    flat = x.detach().flatten(1, 2).requires_grad_(x.requires_grad)
    found = run.results(fresh(run.arguments, x=flat), {"h": run.dys["h"].flatten(1, 2)})
    for name, value in run.found.items():
        assert_same_bits(found[name].reshape(value.shape), value, name)


@both
def test_gradients_are_those_of_finite_differences(device, backend):
    case = MultiLoRAInput(dtype=torch.float64, index=(0, 2, -1, 0), in_features=4, out_features=5, rank=2, bias=True)
    law_gradients_are_those_of_finite_differences(Run(case, backend, device))
