"""DoRA, proven: rows rescaled to a trained length. The bound is `test_linear.py`'s; here are the laws of a norm.

W' = m ⊙ (W + s B A) / ‖W + s B A‖, the norm a constant for the gradient
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

import lora.fast.dora
import lora.reference.dora
from lora.projection import Dropout
from lora.reference.nf4 import nf4_dequantize
from lora.testing import bounds
from lora.testing.bounded import exact
from lora.testing.bounded import given as taken
from lora.testing.cases import Layer, LinearInput
from lora.testing.proof import assert_equivalent, changed
from lora.testing.report import LEDGER, Row, assert_within
from lora.testing.strategies import linear_inputs
from proof.laws import Run, assert_agree, assert_same_bits, both, examples, fresh, with_parts


def with_magnitude(case: LinearInput) -> LinearInput:
    layer = replace(case.layer, dora=True, rank=max(case.layer.rank, 1))
    return changed(case, layer=layer, x_size=1.0, dy_size=1.0, special=False, layout="contiguous",
                   dy_layout="contiguous")  # fmt: skip


dora = linear_inputs().map(with_magnitude)
undropped = dora.map(lambda case: changed(case, dropout=None))
plain32 = undropped.map(
    lambda case: changed(
        case, dtype=torch.float32, layer=replace(case.layer, nf4=False, bias=False, adapter_dtype=None)
    )
)


def norm_of(backend: str, case: LinearInput, device: str) -> tuple[torch.Tensor, tuple]:
    """The backend's row norm, and its arguments: a dense W, A, B and s."""
    p = Run(case, backend, device).arguments["projection"]
    W = p.weight.detach() if isinstance(p.weight, torch.Tensor) else nf4_dequantize(p.weight, case.dtype)
    A, B = (t.detach().to(case.dtype) for t in (p.lora_A, p.lora_B))
    return {"fast": lora.fast, "reference": lora.reference}[backend].dora.dora_norm(W, A, B, p.scaling), (
        W,
        A,
        B,
        p.scaling,
    )


@examples(40)
@given(dora)
def test_both_backends_are_within_the_bound(device, case):
    assert_equivalent(case, device)


@both
@examples(40)
@given(case=dora)
def test_the_norm_is_within_its_bound(device, backend, case):
    """1 / norm as the bound of every DoRA result has it; a row of zeros counts as 1 in the fast one."""
    norm, (W, A, B, s) = norm_of(backend, case, device)
    wide = torch.promote_types(case.dtype, torch.float32)
    W, A, B = (exact(t, wide) for t in (W, A, B))
    slope = bounds.dora_slope(W, A, B, s)
    found = torch.where(norm == 0, 1, norm).double().reciprocal().cpu()
    bound = 2 * slope.bound()
    used = assert_within(found, slope.value, bound, f"{backend}'s 1 / norm")
    LEDGER.note("dora_norm", backend, case.dtype, "1/norm", Row.of(used, slope.value, bound, found.dtype))


@both
@examples(20)
@given(case=plain32)
def test_the_length_of_a_row_does_not_matter(device, backend, case):
    """Twice W and twice B: the same direction, the same h and dx, every bit; dB halves, dm stays."""
    run = Run(case, backend, device)
    p = run.arguments["projection"]
    longer = with_parts(p, weight=p.weight * 2, lora_B=p.lora_B * 2)
    found = run.results(fresh(run.arguments, projection=longer))
    for name in {"h", "dx", "dlora_A", "dlora_B", "dmagnitude"} & run.found.keys():
        expected = run.found[name] * (0.5 if name == "dlora_B" else 1)
        if backend == "fast":
            assert_same_bits(found[name], expected, name)
        assert_agree(found[name], expected, run.bounds[name], name)


@both
@examples(20)
@given(case=plain32)
def test_twice_the_magnitude_is_twice_the_output(device, backend, case):
    run = Run(case, backend, device)
    p = run.arguments["projection"]
    found = run.results(fresh(run.arguments, projection=with_parts(p, magnitude=p.magnitude * 2)))
    for name in {"h", "dx", "dlora_A", "dlora_B"} & run.found.keys():
        assert_agree(found[name], run.found[name] * 2, run.bounds[name] * 2, name)
    if "dmagnitude" in run.found:
        assert_agree(found["dmagnitude"], run.found["dmagnitude"], run.bounds["dmagnitude"], "dmagnitude")


@both
@examples(20)
@given(case=plain32)
def test_magnitudes_share_out_the_output(device, backend, case):
    """Without a bias h_o = m_o dm_o for one token and dy = e_o: <dy, h> = <m, dm>."""
    run = Run(changed(case, frozen=frozenset()), backend, device)
    p = run.arguments["projection"]
    h, dm = run.found["h"].double().cpu(), run.found["dmagnitude"].double().cpu()
    dy, m = run.dys["h"].double().cpu(), p.magnitude.detach().double().cpu()
    by_output = (dy * h).flatten(0, -2).sum(0)
    room = (dy.abs() * run.bounds["h"]).flatten(0, -2).sum(0) + m * run.bounds["dmagnitude"]
    assert_agree(m * dm, by_output, room, "m ⊙ dm")


@both
@examples(20)
@given(case=undropped)
def test_dropout_of_nothing_is_no_dropout(device, backend, case):
    """The path for dropout makes a second product; with a rate of zero both paths agree, to the bound."""
    run = Run(case, backend, device)
    found = run.results(run.arguments | {"dropout": Dropout(0.0, 5)})
    for name, value in run.found.items():
        assert_agree(found[name], value, run.bounds[name], name)


@both
@examples(10)
@given(case=undropped, row=st.integers(0, 40))
def test_a_row_of_zeros_stays_zero(device, backend, case, row):
    """It has no direction, so its norm counts as 1, and nothing becomes NaN."""
    run = Run(changed(case, layer=replace(case.layer, nf4=False, bias=False)), backend, device)
    p = run.arguments["projection"]
    row %= case.layer.out_features
    W, B = p.weight.detach().clone(), p.lora_B.detach().clone()
    W[row], B[row] = 0, 0
    found = run.results(fresh(run.arguments, projection=with_parts(p, weight=W, lora_B=B)))
    assert not found["h"][..., row].any() and all(value.isfinite().all() for value in found.values())


@both
@examples(10)
@given(case=undropped)
def test_the_gain_of_a_zero_update_at_its_own_norm_is_one(device, backend, case):
    """Step 0: lora_B zero and m the norm of W's rows: h is the frozen layer's, to the bound."""
    run = Run(case, backend, device)
    p = run.arguments["projection"]
    B = torch.zeros_like(p.lora_B)
    norm = lora.reference.dora.dora_norm(p.weight, p.lora_A.detach().to(case.dtype), B.to(case.dtype), p.scaling)
    start = with_parts(p, lora_B=B, magnitude=norm.to(p.magnitude.dtype))
    found = run.results(fresh(run.arguments, projection=start))
    base = run.results(fresh(run.arguments, projection=p._replace(lora_A=None, lora_B=None, magnitude=None)))
    room = run.bounds["h"] + 4 * torch.finfo(case.dtype).eps * base["h"].double().abs().cpu()
    assert_agree(found["h"], base["h"], 2 * room, "h")


def test_the_bound_knows_the_gain():
    """A magnitude that is ignored would be far outside."""
    case = LinearInput(layer=Layer(8, 2, dora=True))
    run = Run(case, "fast", "cpu")
    p = run.arguments["projection"]
    without = run.results(fresh(run.arguments, projection=p._replace(magnitude=None)))
    assert ((without["h"] - run.found["h"]).abs().double() > 10 * run.bounds["h"]).any()
    assert taken(p.magnitude, torch.float32).value.min() > 0
