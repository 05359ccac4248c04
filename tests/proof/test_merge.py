"""Merging, proven: W' = W + s B A in float32, rounded once, and undone bit for bit."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import IDS, stir, toy

import lora
from lora.reference.nf4 import nf4_dequantize
from lora.testing.proof import BACKENDS, assert_equivalent, build, changed
from lora.testing.strategies import merge_inputs
from proof.laws import (
    assert_agree,
    assert_same_bits,
    both,
    examples,
    signed_permutation,
    with_parts,
)

cases = merge_inputs()
plain = cases.map(lambda case: changed(case, layer=replace(case.layer, dora=False, nf4=False)))


def merged(backend, case, device, projection=None):
    arguments = build(case, device)
    return case.call(BACKENDS[backend], {"projection": projection or arguments["projection"]})


def bound_of(case):
    (b,) = case.bounds(build(case), {}).values()
    return b


@examples(100)
@given(cases)
def test_both_backends_are_within_the_bound(device, case):
    assert_equivalent(case, device)


@both
@examples(20)
@given(case=cases)
def test_two_runs_are_the_same_bits(device, backend, case):
    assert_same_bits(merged(backend, case, device), merged(backend, case, device))


@both
@examples(20)
@given(case=plain)
def test_no_scaling_is_the_weight_itself(device, backend, case):
    p = build(case, device)["projection"]._replace(scaling=0.0)
    assert_same_bits(merged(backend, case, device, p), p.weight.detach())


@both
@examples(20)
@given(case=cases.map(lambda case: changed(case, layer=replace(case.layer, dora=False, nf4=True, size=1.0))))
def test_nf4_merges_as_what_it_decodes_to(device, backend, case):
    p = build(case, device)["projection"]
    dense = p._replace(weight=nf4_dequantize(p.weight, torch.promote_types(p.weight.dtype, torch.float32)))
    found = merged(backend, case, device)
    assert_same_bits(found, merged(backend, case, device, dense).to(found.dtype))


@both
@examples(20)
@given(case=plain)
def test_twice_weight_and_update_is_twice_the_result(device, backend, case):
    case = changed(case, dtype=torch.float32, layer=replace(case.layer, adapter_dtype=None))
    p = build(case, device)["projection"]
    double = with_parts(p, weight=p.weight * 2, lora_B=p.lora_B * 2)
    assert_same_bits(merged(backend, case, device, double), merged(backend, case, device, p) * 2)


@both
@examples(20)
@given(case=plain, seed=st.integers(0, 99))
def test_rows_do_not_see_each_other(device, backend, case, seed):
    p = build(case, device)["projection"]
    order = torch.randperm(case.layer.out_features, generator=torch.Generator().manual_seed(seed)).to(device)
    moved = with_parts(p, weight=p.weight.detach()[order], lora_B=p.lora_B.detach()[order])
    bound = bound_of(case).bound()[order.cpu()]
    assert_agree(merged(backend, case, device, moved), merged(backend, case, device)[order], bound, "W'")


@both
@examples(20)
@given(case=plain)
def test_two_adapters_merge_as_their_concatenation(device, backend, case):
    case = changed(case, dtype=torch.float32, layer=replace(case.layer, rank=6, adapter_dtype=None))
    p = build(case, device)["projection"]
    half = [
        with_parts(p, lora_A=p.lora_A.detach()[r], lora_B=p.lora_B.detach()[:, r]) for r in (slice(0, 2), slice(2, 6))
    ]
    one = merged(backend, case, device, half[0])
    both_ = merged(backend, case, device, half[1]._replace(weight=one))
    b = bound_of(case)
    sizes = (
        p.weight.detach().double().abs()
        + abs(p.scaling) * p.lora_B.detach().double().abs() @ p.lora_A.detach().double().abs()
    )
    assert_agree(both_, merged(backend, case, device), b.bound() + torch.finfo(torch.float32).eps * sizes.cpu(), "W'")


@both
@examples(20)
@given(case=cases)
def test_the_update_depends_on_s_B_A_alone(device, backend, case):
    """Twice s and half of B, or twice A, is the same update: every bit, DoRA and NF4 included."""
    p = build(changed(case, dtype=torch.float32), device)["projection"]
    p = with_parts(p, lora_A=p.lora_A.float(), lora_B=p.lora_B.float())
    halved = with_parts(p, lora_B=p.lora_B / 2)
    expected = merged(backend, case, device, p)
    assert_same_bits(merged(backend, case, device, halved._replace(scaling=2 * p.scaling)), expected)
    assert_same_bits(merged(backend, case, device, with_parts(halved, lora_A=p.lora_A * 2)), expected)


@both
@examples(20)
@given(case=cases, seed=st.integers(0, 99))
def test_the_basis_and_the_number_of_ranks_do_not_matter(device, backend, case, seed):
    """A → QA, B → BQᵀ with a signed permutation Q, and three ranks of zeros more: the same weight, to the bound."""
    p = build(case, device)["projection"]
    Q = signed_permutation(len(p.lora_A), seed).to(device)
    A, B = Q.to(p.lora_A.dtype) @ p.lora_A.detach(), p.lora_B.detach() @ Q.T.to(p.lora_B.dtype)
    wide_A, wide_B = torch.cat([A, A.new_zeros(3, A.shape[1])]), torch.cat([B, B.new_zeros(len(B), 3)], 1)
    bound = bound_of(case).bound()
    for parts in ({"lora_A": A, "lora_B": B}, {"lora_A": wide_A, "lora_B": wide_B}):
        assert_agree(merged(backend, case, device, with_parts(p, **parts)), merged(backend, case, device), bound, "W'")


@both
@examples(6)
@given(seed=st.integers(0, 999), half=st.booleans())
def test_a_merged_model_is_the_adapted_one_and_comes_back_bit_for_bit(backend, seed, half):
    """Every weight of a merged and unmerged model; between, the outputs of the adapted one to the type's rounding."""
    model = toy(seed)
    model = model.to(torch.bfloat16) if half else model
    with lora.use_backend(backend):
        lora.inject(
            model, lora.LoRAConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj", "embed"])
        )
        stir(model, seed)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        adapted = model(IDS)
        errors = lora.merge(model)
        together = model(IDS)
        lora.unmerge(model)
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name], name)
    u = torch.finfo(adapted.dtype).eps / 2
    assert errors and all(error <= u for error in errors.values())
    # each of ten products passes its relative rounding on; 64 leaves room for the network's own amplification
    assert (together - adapted).abs().max() <= 64 * u * adapted.abs().max()
