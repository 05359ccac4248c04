"""`linear_cross_entropy`, proven: logits that are never formed, their softmax, and every gradient, chunk by chunk."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.fast.loss import CHUNK_BYTES
from lora.projection import Projection
from lora.testing.block_cases import LossInput
from lora.testing.cases import Layer
from lora.testing.proof import BACKENDS, assert_equivalent, build, changed, leaves
from lora.testing.strategies import loss_inputs
from proof.laws import (
    Run,
    assert_agree,
    assert_all_same_bits,
    assert_same_bits,
    both,
    examples,
    fresh,
    law_a_gradient_does_not_depend_on_who_else_wants_one,
    law_an_nf4_weight_is_the_dense_weight_it_decodes_to,
    law_gradients_are_those_of_finite_differences,
    law_leading_dimensions_do_not_matter,
    law_memory_layout_does_not_matter,
    law_ranks_can_be_padded,
    law_silent_tokens_teach_nothing,
    law_the_basis_of_the_rank_does_not_matter,
    law_the_update_depends_on_s_B_A_alone,
    law_tokens_do_not_see_each_other,
    law_two_runs_are_the_same_bits,
    merged_projection,
    with_parts,
)

tidy = loss_inputs().map(
    lambda case: changed(case, layout="contiguous", dropout=None, x_size=1.0, dy_size=1.0, outliers=1.0)
)
plain_head = tidy.map(lambda case: changed(case, layer=replace(case.layer, nf4=False), num_items=None))
plain_lora = plain_head.map(
    lambda case: changed(case, layer=replace(case.layer, dora=False, rank=max(case.layer.rank, 1)))
)
each_token = tidy.map(lambda case: changed(case, shape=(6,), reduction="none", num_items=None, ignored=(2,)))
TOKENS = {"hidden", "labels"}


@pytest.fixture(autouse=True, params=[3, 1000], ids=["chunks of 3 tokens", "one chunk"])
def _chunks(request, monkeypatch):
    """The fast loss goes through the tokens in chunks: three of a vocabulary of 50 float32 numbers, or all."""
    for kind in CHUNK_BYTES:
        monkeypatch.setitem(CHUNK_BYTES, kind, request.param * 50 * 4)


@examples(60)
@given(loss_inputs())
def test_both_backends_are_within_the_bound(device, case):
    assert_equivalent(case, device)


@both
@examples(6)
@given(case=loss_inputs())
def test_two_runs_are_the_same_bits(device, backend, case):
    law_two_runs_are_the_same_bits(Run(case, backend, device))


@both
@examples(4)
@given(case=tidy)
def test_a_gradient_does_not_depend_on_who_else_wants_one(device, backend, case):
    law_a_gradient_does_not_depend_on_who_else_wants_one(Run(case, backend, device))


@both
@examples(10)
@given(case=tidy)
def test_the_sum_and_the_mean_are_those_of_each(device, backend, case):
    """ "sum" is the sum of "none", "mean" that over the labels that count; 0 where the label is ignored."""
    runs = {
        kind: Run(changed(case, reduction=kind, num_items=None), backend, device) for kind in ("none", "sum", "mean")
    }
    each, total, mean = (runs[kind].found["loss"].double().cpu() for kind in ("none", "sum", "mean"))
    labels = runs["none"].arguments["labels"].cpu()
    assert not each[labels == case.ignore_index].any()
    room = runs["sum"].bounds["loss"] + runs["none"].bounds["loss"].sum()
    assert (each.sum() - total).abs() <= room
    count = int((labels != case.ignore_index).sum())
    assert (total / count - mean).abs() <= room / count + runs["mean"].bounds["loss"]


@both
@examples(10)
@given(case=tidy)
def test_ignored_tokens_take_no_part(device, backend, case):
    """Whatever their hidden state is, NaN included for fast: the others stay as they are, and they get exactly zero."""
    run = Run(changed(case, ignored=(*case.ignored, 0), shape=(6,), dropout=None), backend, device)
    silent = run.arguments["labels"] == case.ignore_index
    hidden = run.arguments["hidden"].detach().clone()
    hidden[silent] = float("nan") if backend == "fast" else 7.0
    found = run.results(fresh(run.arguments, hidden=hidden.requires_grad_(run.arguments["hidden"].requires_grad)))
    for name, value in found.items():
        assert_agree(value, run.found[name], run.bounds[name], name)
    if "dhidden" in found:
        assert not found["dhidden"][silent].any()


@both
@examples(10)
@given(case=tidy, part=st.integers(0, 6))
def test_a_batch_is_its_parts(device, backend, case, part):
    """With num_items for the whole batch, losses and gradients of two parts add up: gradient accumulation."""
    run = Run(changed(case, shape=(6,), ignored=(1,), reduction="mean", num_items=5.0), backend, device)
    pieces = []
    for rows in (slice(0, part), slice(part, 6)):
        picked = run.arguments["hidden"].detach()[rows].requires_grad_(run.arguments["hidden"].requires_grad)
        if (run.arguments["labels"][rows] != case.ignore_index).any():
            pieces.append(run.results(fresh(run.arguments, hidden=picked, labels=run.arguments["labels"][rows])))
    for name, value in run.found.items():
        if name == "dhidden":
            continue
        total = sum(piece[name].double() for piece in pieces)
        size = sum(piece[name].double().abs() for piece in pieces).cpu()
        assert_agree(total, value.double(), run.bounds[name] + 2 * torch.finfo(value.dtype).eps * size, name)


@both
@examples(10)
@given(case=plain_head, seed=st.integers(0, 99))
def test_classes_are_alike(device, backend, case, seed):
    """The vocabulary in another order, labels with it: one loss, one dhidden, and the head's gradients in its order."""
    run = Run(case, backend, device)
    order = torch.randperm(case.layer.out_features, generator=torch.Generator().manual_seed(seed)).to(device)
    labels, p = run.arguments["labels"], run.arguments["head"]
    moved = torch.where(labels == case.ignore_index, labels, order.argsort()[labels.clamp(min=0)])
    parts = {name: getattr(p, name) for name in ("weight", "bias", "lora_B", "magnitude")}
    head = with_parts(p, **{name: part.detach()[order] for name, part in parts.items() if part is not None})
    found = run.results(fresh(run.arguments, labels=moved, head=head))
    for name, value in run.found.items():
        rows = order if name in ("dweight", "dbias", "dlora_B", "dmagnitude") else slice(None)
        bound = run.bounds[name][rows.cpu()] if isinstance(rows, torch.Tensor) else run.bounds[name]
        assert_agree(found[name], value[rows] if value.dim() else value, bound, name)


@both
@examples(10)
@given(case=plain_head)
def test_the_same_number_on_every_logit_changes_nothing(device, backend, case):
    """A softmax sees differences only; so the gradient of the bias adds up to zero."""
    layer = replace(case.layer, bias=True)
    run = Run(changed(case, softcap=None, layer=layer, frozen=frozenset()), backend, device)
    p = run.arguments["head"]
    higher = run.results(fresh(run.arguments, head=with_parts(p, bias=torch.full_like(p.bias, 3.0))))
    level = run.results(fresh(run.arguments, head=with_parts(p, bias=torch.zeros_like(p.bias))))
    # logits of about 3 are rounded more coarsely: by 3 u each, beside what the bound of the case allows
    u = torch.finfo(case.dtype).eps
    weight = 8 * u * 3 * case.logit_scale
    tokens = math.prod(case.shape)
    room = run.bounds["loss"] + weight * (tokens if case.reduction == "sum" else 2 / (case.num_items or 1))
    assert_agree(higher["loss"], level["loss"], room + 8 * u * level["loss"].double().abs().cpu(), "loss")
    dbias = run.found["dbias"].double().cpu()
    assert dbias.sum().abs() <= run.bounds["dbias"].sum() + u * dbias.abs().sum()


@both
@examples(8)
@given(case=tidy)
def test_equal_logits_cost_the_logarithm_of_the_vocabulary(device, backend, case):
    """hidden = 0 and no bias: every class has probability 1 / V."""
    layer = replace(case.layer, bias=False)
    run = Run(changed(case, layer=layer, reduction="none", num_items=None, ignored=()), backend, device)
    found = run.results(fresh(run.arguments, hidden=torch.zeros_like(run.arguments["hidden"])))
    log_v = torch.full_like(found["loss"], math.log(case.layer.out_features)).double()
    # the sum of V equal powers, a logarithm and two sums of float32 numbers as large as log V
    room = torch.full_like(log_v, (case.layer.out_features**0.5 + 8) * torch.finfo(found["loss"].dtype).eps) * log_v
    assert_agree(found["loss"].double(), log_v, room.cpu(), "loss")


@both
@examples(8)
@given(case=tidy)
def test_losses_are_never_negative_and_chunks_do_not_matter(device, backend, case):
    run = Run(changed(case, reduction="none", num_items=None), backend, device)
    assert (run.found["loss"].cpu().double() >= -run.bounds["loss"]).all()
    before = dict(CHUNK_BYTES)
    try:
        for kind in CHUNK_BYTES:
            CHUNK_BYTES[kind] = 1  # a token at a time
        for name, value in run.results().items():
            assert_agree(value, run.found[name], run.bounds[name], name)
    finally:
        CHUNK_BYTES.update(before)


@both
@examples(8)
@given(case=plain_head)
def test_twice_the_gradient_of_the_loss_is_twice_every_gradient(device, backend, case):
    run = Run(changed(case, dtype=torch.float32, layer=replace(case.layer, adapter_dtype=None)), backend, device)
    found = run.results(dys={"loss": run.dys["loss"] * 2})
    for name, value in run.found.items():
        assert_same_bits(found[name], value if name == "loss" else value * 2, name)


@both
@examples(8)
@given(case=tidy)
def test_a_bare_weight_is_a_head_without_an_adapter(device, backend, case):
    run = Run(changed(case, layer=replace(case.layer, rank=0, bias=False, nf4=False)), backend, device)
    weight = run.arguments["head"].weight
    bare = run.case.call(run.backend, run.arguments | {"head": weight.detach()})
    head = run.case.call(run.backend, run.arguments | {"head": Projection(weight.detach())})
    assert_all_same_bits({"loss": bare.detach()}, {"loss": head.detach()})


FOUND = [  # by `make explore`
    LossInput(dtype=torch.float64, features=1, layer=Layer(5003, 2), reduction="sum", label_smoothing=0.1),
    LossInput(dtype=torch.bfloat16, features=1, layer=Layer(2049, 1, scaling=-1.5), reduction="none",
              label_smoothing=1.0),
    LossInput(dtype=torch.bfloat16, features=1, layer=Layer(257, 2, bias=True, dora=True), reduction="sum",
              label_smoothing=1.0, shape=(2, 4), seed=109),
    LossInput(dtype=torch.float16, features=1, layer=Layer(2049, 16), reduction="sum", shape=(2, 4), seed=2319405),
    LossInput(dtype=torch.float16, features=35, layer=Layer(5003, 6, bias=True, nf4=True), shape=(2, 4), num_items=17,
              logit_scale=0.5, layout="strided", seed=2232),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", FOUND, ids=["equal numbers", "a row's own error", "a lost norm", "near zero", "all rounded to zero"]
)
def test_few_features_and_many_classes(device, case):
    """The errors of a row's logits are one error, or nearly, or no small ones: the bound knows."""
    assert_equivalent(changed(case, frozen=frozenset({"weight", "bias"})), device)


@both
@examples(6)
@given(case=plain_lora)
def test_the_update_depends_on_s_B_A_alone(device, backend, case):
    case = changed(case, dtype=torch.float32, layer=replace(case.layer, adapter_dtype=None))
    law_the_update_depends_on_s_B_A_alone(Run(case, backend, device))


@both
@examples(6)
@given(case=plain_lora)
def test_ranks_can_be_padded(device, backend, case):
    law_ranks_can_be_padded(Run(case, backend, device))


@both
@examples(6)
@given(case=plain_lora, seed=st.integers(0, 99))
def test_the_basis_of_the_rank_does_not_matter(device, backend, case, seed):
    law_the_basis_of_the_rank_does_not_matter(Run(case, backend, device), seed)


@both
@examples(6)
@given(case=each_token, seed=st.integers(0, 99))
def test_tokens_do_not_see_each_other(device, backend, case, seed):
    law_tokens_do_not_see_each_other(Run(case, backend, device), TOKENS, seed)


@both
@examples(6)
@given(case=each_token)
def test_silent_tokens_teach_nothing(device, backend, case):
    law_silent_tokens_teach_nothing(Run(case, backend, device), TOKENS)


@both
@examples(6)
@given(case=tidy)
def test_leading_dimensions_do_not_matter(device, backend, case):
    law_leading_dimensions_do_not_matter(Run(changed(case, shape=(2, 3), ignored=(1,)), backend, device), TOKENS)


@both
@examples(6)
@given(case=tidy)
def test_memory_layout_does_not_matter(device, backend, case):
    law_memory_layout_does_not_matter(Run(case, backend, device), {"hidden"})


@both
@examples(6)
@given(case=tidy)
def test_an_nf4_head_is_the_dense_weight_it_decodes_to(device, backend, case):
    run = Run(changed(case, layer=replace(case.layer, nf4=True)), backend, device)
    law_an_nf4_weight_is_the_dense_weight_it_decodes_to(run)


@both
@examples(6)
@given(case=each_token.map(lambda case: changed(case, layer=replace(case.layer, rank=max(case.layer.rank, 1)))))
def test_merged_is_adapted(device, backend, case):
    """Logits that move by at most e move a loss by at most 2e: log-sum-exp by e, the targets' mean by e."""
    run = Run(case, backend, device)
    merged, error = merged_projection(run.arguments["head"], case.dtype)
    with torch.no_grad():
        found = run.case.call(run.backend, run.arguments | {"head": merged})
    moved = (run.arguments["hidden"].detach().double().cpu().abs() @ error.T).amax(-1) * case.logit_scale
    assert_agree(found, run.found["loss"], run.bounds["loss"] + 2 * moved, "loss")


@both
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 0.5}, {"label_smoothing": 0.3},
                                     {"reduction": "none"}], ids=str)  # fmt: skip
def test_gradients_are_those_of_finite_differences(device, backend, options):
    case = LossInput(dtype=torch.float64, features=4, layer=Layer(6, 2, bias=True), ignored=(1,), **options)
    law_gradients_are_those_of_finite_differences(Run(case, backend, device))


@both
@pytest.mark.filterwarnings("ignore:Every label")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3)])
@pytest.mark.parametrize("layer", [Layer(50, 3, bias=True), Layer(50, 3, dora=True), Layer(50, 3, nf4=True)])
def test_where_no_label_counts_every_gradient_is_zero(device, backend, layer, shape, reduction):
    """Zero and there: an optimizer passes a parameter over that has none, and the two backends would part."""
    case = LossInput(shape=shape, layer=layer, ignored=tuple(range(6)), reduction=reduction)
    arguments = build(case, device)
    wanted = [leaf for _, leaf in leaves(arguments)]
    loss = BACKENDS[backend].linear_cross_entropy(**arguments)
    assert loss.shape == (shape if reduction == "none" else ()) and not loss.any()
    for leaf, gradient in zip(wanted, torch.autograd.grad(loss.sum(), wanted), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()
