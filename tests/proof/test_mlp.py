"""`lora_mlp`, proven: y = down(act(gate(x)) ⊙ up(x)), three projections and one activation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lora.projection import Dropout
from lora.reference.mlp import activate, hidden_dropout
from lora.testing.cases import Layer, MLPInput
from lora.testing.proof import BACKENDS, assert_equivalent, changed, mapped, on_cpu, widened
from lora.testing.strategies import mlp_inputs
from proof.laws import (
    Run,
    assert_agree,
    assert_scaled,
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
    with_parts,
)

tidy = mlp_inputs().map(
    lambda case: changed(
        case, layout="contiguous", dy_layout="contiguous", special=False, x_size=1.0, dy_size=1.0,
        outliers=case.outliers if case.dtype != torch.float16 else 1.0,
    )
)  # fmt: skip
rows_of_x = tidy.map(lambda case: changed(case, shape=(6,), dropout=None))


def plain_down(case: MLPInput) -> MLPInput:
    """down without bias and DoRA, in float32: y is linear in the hidden, bit for bit under factors of two."""
    gate, up, down = (replace(layer, bias=False, dora=False, adapter_dtype=None) for layer in case.layers)
    return changed(case, layers=(gate, up, down), dtype=torch.float32)


def with_adapters(case: MLPInput) -> MLPInput:
    """Each of the three with an adapter, none with DoRA."""
    return changed(case, layers=tuple(replace(layer, rank=max(layer.rank, 1), dora=False) for layer in case.layers))


plain_lora = tidy.map(with_adapters)
UP_OR_DOWN = Layer(63, 1, scaling=2.0)
SUBNORMAL_SLOPE = MLPInput(  # of a GELU, met on the way to a gradient of lora_B that is not
    shape=(1,), in_features=2, outliers=30.0, activation="gelu",
    layers=(UP_OR_DOWN, UP_OR_DOWN, Layer(1, 1, scaling=2.0)),
)  # fmt: skip


@examples(80)
@given(mlp_inputs())
def test_both_backends_are_within_the_bound(device, case):
    assert_equivalent(case, device)


@both
@examples(8)
@given(case=mlp_inputs())
def test_two_runs_are_the_same_bits(device, backend, case):
    law_two_runs_are_the_same_bits(Run(case, backend, device))


@both
@examples(5)
@given(case=mlp_inputs())
def test_a_gradient_does_not_depend_on_who_else_wants_one(device, backend, case):
    law_a_gradient_does_not_depend_on_who_else_wants_one(Run(case, backend, device))


@both
@examples(8)
@given(case=tidy)
def test_gradients_are_linear_in_dy(device, backend, case):
    law_gradients_are_linear_in_dy(Run(case, backend, device))


@both
@examples(5)
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
@examples(15)
@given(case=tidy)
def test_it_is_its_three_layers_and_an_activation(device, backend, case):
    """One call, or `lora_linear` three times with the mask of the hidden one stream on: to the bound."""
    run = Run(case, backend, device)
    a, ops = fresh(run.arguments), BACKENDS[backend]
    with torch.no_grad():
        g, z = (ops.lora_linear(a["x"], a[name], dropout=case.dropout) for name in ("gate", "up"))
        y = ops.lora_linear(activate(g, case.activation) * z, a["down"], dropout=hidden_dropout(case.dropout))
    assert_agree(run.found["y"], y, run.bounds["y"], "y")


@both
@examples(12)
@given(case=tidy.map(plain_down))
def test_up_and_down_share_a_factor_of_two(device, backend, case):
    """Twice up is twice y; half of down makes that up again: every bit."""
    layers = tuple(replace(layer, nf4=False) for layer in case.layers)
    run = Run(changed(case, layers=layers, stacked=False), backend, device)

    def times(name: str, factor: float) -> dict:
        p = run.arguments[name]
        B = None if p.lora_B is None else p.lora_B * factor
        return {name: with_parts(p, weight=p.weight * factor, **({} if B is None else {"lora_B": B}))}

    twice = run.results(fresh(run.arguments, **times("up", 2)))
    back = run.results(fresh(run.arguments, **times("up", 2), **times("down", 0.5)))
    assert_scaled(twice["y"], run.found["y"], 2, "y")
    assert_scaled(back["y"], run.found["y"], 1, "y")
    for name in {"dx", "dgate.lora_A", "dgate.lora_B", "dup.lora_A"} & run.found.keys():
        assert_scaled(twice[name], run.found[name], 2, name)
        assert_scaled(back[name], run.found[name], 1, name)


@both
@examples(8)
@given(case=tidy.map(plain_down))
def test_nothing_in_gives_nothing_out(device, backend, case):
    """Without biases x = 0 gives y = 0, and (act(0) = 0, z = 0) no gradient but up's and gate's dx: also zero."""
    run = Run(case, backend, device)
    found = run.results(fresh(run.arguments, x=torch.zeros_like(run.arguments["x"]).requires_grad_()))
    assert all(not value.any() for value in found.values())


@both
@examples(12)
@given(case=tidy)
def test_weights_that_lie_together_change_nothing(device, backend, case):
    together, apart = (Run(changed(case, stacked=stacked), backend, device) for stacked in (True, False))
    law_weights_that_lie_together_change_nothing(together, apart)


@both
@examples(8)
@example(case=SUBNORMAL_SLOPE)
@given(case=plain_lora.map(plain_down))
def test_the_update_depends_on_s_B_A_alone(device, backend, case):
    """Of gate, up and down at once: the same three products."""
    law_the_update_depends_on_s_B_A_alone(Run(case, backend, device))


@both
@examples(8)
@given(case=plain_lora)
def test_the_update_of_down_is_linear_in_scaling_and_in_B(device, backend, case):
    """y is linear in down's update, and so is all that comes back through down. The hidden is not zero."""
    gate, up, down = (replace(layer, adapter_dtype=None, zeros=False) for layer in case.layers)
    case = changed(case, dtype=torch.float32, shape=(7,), dropout=None, layers=(gate, up, updating(down)))
    law_the_update_is_linear(Run(case, backend, device), "down")


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
@given(case=plain_lora, split=st.integers(1, 8))
def test_several_adapters_of_down_are_one(device, backend, case, split):
    """Everything is linear in down: the output, and what comes back through it."""
    gate, up, down = case.layers
    run = Run(changed(case, layers=(gate, up, replace(down, rank=9))), backend, device)
    law_several_adapters_are_one(run, "down", split)


@both
@examples(8)
@given(case=plain_lora)
def test_merged_down_is_adapted_down(device, backend, case):
    """y of the merged weight, within both bounds and the one rounding of the weight."""
    run = Run(changed(case, dropout=None), backend, device)
    a = run.arguments
    merged, error = merged_projection(a["down"], case.dtype)
    with torch.no_grad():
        found = run.case.call(run.backend, a | {"down": merged})
        wide = mapped(mapped(a, widened), on_cpu)
        g, z = (BACKENDS["reference"].lora_linear(wide["x"], wide[name]) for name in ("gate", "up"))
        hidden = (activate(g, case.activation) * z).abs()
    assert_agree(found, run.found["y"], run.bounds["y"] + hidden @ error.T, "y")


@both
@examples(8)
@given(case=tidy)
def test_nf4_weights_are_the_dense_weights_they_decode_to(device, backend, case):
    case = changed(case, layers=tuple(replace(layer, nf4=True) for layer in case.layers))
    law_an_nf4_weight_is_the_dense_weight_it_decodes_to(Run(case, backend, device))


@both
@examples(12)
@given(case=tidy)
def test_leading_dimensions_do_not_matter(device, backend, case):
    law_leading_dimensions_do_not_matter(Run(changed(case, shape=(2, 3)), backend, device), {"x"})


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_at_their_ends(device, activation, dtype):
    """A gate from far below zero to far above: where exp, erf and tanh have reached their limits, and at zero."""
    end = 60.0 if dtype == torch.float16 else 200.0  # act(g) · z must stay finite
    gates = torch.tensor([-end, -end / 2, -20.0, -5.0, -1e-3, 0.0, 1e-3, 5.0, 20.0, end / 2, end])

    class Ends(MLPInput):
        def x(self, make) -> Tensor:
            return gates[:, None].to(dtype).to(make.device)

    case = Ends(
        seed=1, dtype=dtype, in_features=1, layers=(Layer(7, 0), Layer(7, 0), Layer(3, 2)), activation=activation
    )
    assert_equivalent(case, device)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dropout", [None, Dropout(0.3, 7)])
@both
def test_gradients_are_those_of_finite_differences(device, backend, activation, dropout):
    layers = (Layer(6, 2, bias=True), Layer(6, 2), Layer(4, 2))
    case = MLPInput(dtype=torch.float64, shape=(3,), in_features=5, layers=layers, activation=activation,
                    dropout=dropout)  # fmt: skip
    law_gradients_are_those_of_finite_differences(Run(case, backend, device))
