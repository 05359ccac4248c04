"""`rope`, proven: x ⊙ cos + R(x) ⊙ sin, a rotation of pairs of features."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lora
from lora.testing.block_cases import RopeInput
from lora.testing.proof import assert_equivalent, changed
from lora.testing.strategies import rope_inputs
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
    law_memory_layout_does_not_matter,
    law_silent_tokens_teach_nothing,
    law_tokens_do_not_see_each_other,
    law_two_runs_are_the_same_bits,
)

tidy = rope_inputs().map(
    lambda case: changed(case, layout="heads", dy_layout="contiguous", frozen=frozenset(), x_size=1.0, dy_size=1.0)
)
one_table = tidy.map(lambda case: changed(case, batch=4, by_position=False, per_batch=False))


@examples(150)
@given(rope_inputs())
def test_both_backends_are_within_the_bound(device, case):
    assert_equivalent(case, device)


@both
@examples(10)
@given(case=rope_inputs())
def test_two_runs_are_the_same_bits(device, backend, case):
    law_two_runs_are_the_same_bits(Run(case, backend, device))


@both
@examples(10)
@given(case=rope_inputs())
def test_a_gradient_does_not_depend_on_who_else_wants_one(device, backend, case):
    law_a_gradient_does_not_depend_on_who_else_wants_one(Run(case, backend, device))


@both
@examples(10)
@given(case=tidy)
def test_gradients_are_linear_in_dy(device, backend, case):
    law_gradients_are_linear_in_dy(Run(case, backend, device))


@both
@examples(10)
@given(case=tidy)
def test_memory_layout_does_not_matter(device, backend, case):
    """In every bit: each result is a function of two features."""
    law_memory_layout_does_not_matter(Run(case, backend, device), {"q", "k"}, exact=True)


@both
@examples(10)
@given(case=one_table, seed=st.integers(0, 99))
def test_sequences_do_not_see_each_other(device, backend, case, seed):
    law_tokens_do_not_see_each_other(Run(case, backend, device), {"q", "k"}, seed, exact=True)


@both
@examples(10)
@given(case=one_table, cut=st.integers(0, 4))
def test_a_batch_is_its_parts(device, backend, case, cut):
    law_a_batch_is_its_parts(Run(case, backend, device), {"q", "k"}, cut, exact=True)


@both
@examples(10)
@given(case=one_table)
def test_silent_sequences_teach_nothing(device, backend, case):
    law_silent_tokens_teach_nothing(Run(case, backend, device), {"q", "k"})


@both
@examples(15)
@given(case=tidy)
def test_twice_the_input_is_twice_the_output(device, backend, case):
    run = Run(changed(case, dtype=torch.float32), backend, device)
    found = run.results(fresh(run.arguments, q=run.arguments["q"] * 2, k=-run.arguments["k"]))
    assert_same_bits(found["q"], run.found["q"] * 2, "q")
    assert_same_bits(found["k"], -run.found["k"], "k")


@both
@examples(15)
@given(case=tidy)
def test_no_angle_is_no_rotation(device, backend, case):
    """cos 1, sin 0: every bit of q and k, and of their gradients."""
    run = Run(case, backend, device)
    cos, sin = torch.ones_like(run.arguments["cos"]), torch.zeros_like(run.arguments["sin"])
    found = run.results(run.arguments | {"cos": cos, "sin": sin})
    for name in ("q", "k"):
        assert_same_bits(found[name], run.arguments[name].detach(), name)
        assert_same_bits(found[f"d{name}"], run.dys[name], f"d{name}")


@both
@examples(15)
@given(case=tidy)
def test_features_beyond_rot_pass_through(device, backend, case):
    run = Run(case, backend, device)
    for name in ("q", "k"):
        assert_same_bits(run.found[name][..., case.rot :], run.arguments[name].detach()[..., case.rot :], name)
        assert_same_bits(run.found[f"d{name}"][..., case.rot :], run.dys[name][..., case.rot :], f"d{name}")


@both
@examples(15)
@given(case=tidy)
def test_the_gradient_is_the_rotation_back(device, backend, case):
    """dq is `rope` of dy by the opposite angle, to the bound; fast: every bit."""
    run = Run(case, backend, device)
    back = {"q": run.dys["q"], "k": run.dys["k"], "sin": -run.arguments["sin"]}
    with torch.no_grad():
        turned = dict(zip("qk", run.case.call(run.backend, run.arguments | back), strict=True))
    for name in ("q", "k"):
        if backend == "fast":
            assert_same_bits(run.found[f"d{name}"], turned[name], name)
        assert_agree(run.found[f"d{name}"], turned[name], run.bounds[f"d{name}"], name)


@both
@examples(15)
@given(case=tidy)
def test_turned_and_turned_back_is_what_it_was(device, backend, case):
    """A rotation keeps lengths and can be undone: in float64, to its rounding."""
    run = Run(changed(case, dtype=torch.float64, table_dtype=None), backend, device)
    with torch.no_grad():
        opposite = {"q": run.found["q"], "k": run.found["k"], "sin": -run.arguments["sin"]}
        q, _ = run.case.call(run.backend, run.arguments | opposite)
    torch.testing.assert_close(q, run.arguments["q"].detach(), rtol=0, atol=1e-14)
    before, after = (t.detach().square().sum(-1) for t in (run.arguments["q"], run.found["q"]))
    torch.testing.assert_close(before, after, rtol=1e-13, atol=1e-13)


@both
@examples(15)
@given(case=tidy, distance=st.integers(0, 3))
def test_scores_depend_on_the_distance_of_positions_only(device, backend, case, distance):
    """What rotary embedding is for (Su et al. 2021, eq. 11): q_m · k_n = q_(m+d) · k_(n+d) for equal q's and k's."""
    case = changed(case, dtype=torch.float64, table_dtype=None, batch=1, seq=6, heads=1, kv_heads=1, by_position=False,
                   per_batch=False)  # fmt: skip
    run = Run(case, backend, device)
    theta = torch.rand(case.rot // 2, generator=torch.Generator().manual_seed(case.seed), dtype=torch.float64)
    angles = torch.arange(6, dtype=torch.float64)[:, None] * theta
    angles = angles.repeat_interleave(2, -1) if case.interleaved else torch.cat([angles, angles], -1)
    q, k = (run.arguments[name].detach()[:, :, :1].expand(1, 1, 6, -1) for name in ("q", "k"))
    with torch.no_grad():
        turned = run.case.call(
            run.backend,
            run.arguments | {"q": q, "k": k, "cos": angles.cos().to(device), "sin": angles.sin().to(device)},
        )
    scores = turned[0][0, 0] @ turned[1][0, 0].T
    diagonal = scores.diagonal(distance)
    torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-12, atol=1e-12)


@both
@examples(15)
@given(case=tidy)
def test_positions_are_rows_of_the_table(device, backend, case):
    """position_ids 0, 1, 2, … of a longer table is the table's start: every bit."""
    run = Run(changed(case, by_position=True, per_batch=False), backend, device)
    first = torch.arange(case.seq, device=device).expand(case.batch, -1)
    looked_up = run.results(run.arguments | {"position_ids": first})
    start = {name: run.arguments[name][: case.seq] for name in ("cos", "sin")}
    given_rows = run.results(run.arguments | start | {"position_ids": None})
    for name, value in looked_up.items():
        assert_same_bits(value, given_rows[name], name)


@both
@examples(15)
@given(case=tidy)
def test_the_two_layouts_of_pairs_are_one_rotation(device, backend, case):
    """Features (i, i + rot/2) moved to (2i, 2i + 1): the interleaved result is the half-split one, moved: every bit."""
    run = Run(changed(case, interleaved=False), backend, device)
    half = case.rot // 2
    order = torch.stack([torch.arange(half), torch.arange(half) + half], 1).flatten().to(device)

    def move(t):
        return torch.cat([t[..., : case.rot][..., order], t[..., case.rot :]], -1)

    moved = {name: move(run.arguments[name].detach()).requires_grad_() for name in ("q", "k")}
    tables = {name: run.arguments[name][..., order] for name in ("cos", "sin")}
    found = run.results(
        run.arguments | moved | tables | {"interleaved": True}, {n: move(dy) for n, dy in run.dys.items()}
    )
    for name, value in run.found.items():
        assert_same_bits(found[name], move(value), name)


@both
def test_gradients_are_those_of_finite_differences(device, backend):
    case = RopeInput(dtype=torch.float64, batch=1, seq=2, heads=2, kv_heads=1, head_dim=6, rot=4)
    law_gradients_are_those_of_finite_differences(Run(case, backend, device))


@pytest.mark.parametrize("which", ["cos", "sin"])
def test_a_table_that_trains_has_its_gradient(device, which):
    """The function keeps no q and k for it, so it goes the reference's way; a gradient of zero would be a lie."""
    q, k = torch.randn(1, 2, 3, 4, device=device), torch.randn(1, 1, 3, 4, device=device)
    found = {}
    for backend in ("reference", "fast"):
        tables = {name: torch.linspace(-1, 1, 12, device=device).view(3, 4).clone() for name in ("cos", "sin")}
        tables[which].requires_grad_()
        with lora.use_backend(backend):
            rotated_q, rotated_k = lora.ops.rope(q, k, **tables)
        (rotated_q.square().sum() + rotated_k.square().sum()).backward()
        found[backend] = tables[which].grad
    assert found["fast"] is not None and found["fast"].any() and torch.equal(found["fast"], found["reference"])
