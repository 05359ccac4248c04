"""The bound itself: wrong results are outside, right ones use a fair share of it, its rules those of rounding."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.reference.linear import lora_linear, lora_linear_backward
from lora.testing import (
    Ledger,
    LinearCase,
    LinearInput,
    Row,
    assert_equivalent,
    assert_within,
    in_float64,
    linear_bounds,
)
from lora.testing.block_cases import LossInput
from lora.testing.bounded import Bounded, add_up, exact, unit_roundoff
from lora.testing.bounds import ACTIVATIONS, MOST_CURVED, STEEPEST, activated, shifted, slope_of, wider
from lora.testing.cases import Layer
from lora.testing.explore import Exploration
from lora.testing.proof import assert_as_near, changed
from lora.testing.report import without_bound
from proof.laws import examples

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def results(x, projection, dy) -> dict[str, torch.Tensor]:
    back = lora_linear_backward(dy, x, projection)
    h = lora_linear(x, projection)
    return {"h": h, "dx": back.dx, "dlora_A": back.dlora_A, "dlora_B": back.dlora_B}


def without(name: str):
    def mutant(x, p, dy):
        right = results(x, p, dy)
        return right | {name: torch.zeros_like(right[name])}

    return mutant


def last_token_dropped(x, p, dy):
    right = results(x, p, dy)
    right["h"][-1] = 0
    right["dx"][-1] = 0
    return right


MUTANTS = {
    "no LoRA term": lambda x, p, dy: results(x, p._replace(lora_A=None, lora_B=None), dy),
    "scaling 1": lambda x, p, dy: results(x, p._replace(scaling=1.0), dy),
    "rows of A reversed": lambda x, p, dy: results(x, p._replace(lora_A=p.lora_A.flip(0)), dy),
    "last token dropped": last_token_dropped,
    "bias twice": lambda x, p, dy: results(x, p._replace(bias=2 * p.bias), dy),
    **{f"zero {name}": without(name) for name in ("h", "dx", "dlora_A", "dlora_B")},
}


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("dtype", TYPES)
def test_the_bound_rejects_a_wrong_result(name, dtype):
    x, projection, dy = LinearCase(5, 33, 17, 4, dtype=dtype, bias=True).build()
    truth = results(x.double(), in_float64(projection), dy.double())
    bounds = linear_bounds(x, projection, dy)
    rejected = []
    for result, value in MUTANTS[name](x, projection, dy).items():
        try:
            assert value is not None
            assert_within(value, truth[result], bounds[result], result)
        except AssertionError:
            rejected.append(result)
    assert rejected


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [20, 2000])
def test_the_bound_is_not_loose(dtype, tokens):
    """The worst element uses at least 3% of it, in every type and for long sums too."""
    x, projection, dy = LinearCase(tokens, 300, 200, 8, dtype=dtype, bias=True).build()
    truth = results(x.double(), in_float64(projection), dy.double())
    bounds = linear_bounds(x, projection, dy)
    used = {n: assert_within(v, truth[n], bounds[n], n) for n, v in results(x, projection, dy).items()}
    assert min(used.values()) > 0.03, used


def test_a_formula_of_another_operation_is_refused():
    """A bound that leaves a term out is no bound of this operation, however wide it is."""

    class Wrong(LinearInput):
        def bounds(self, arguments, dys):
            return super().bounds(arguments | {"projection": arguments["projection"]._replace(scaling=1.0)}, dys)

    with pytest.raises(AssertionError, match="the bound's own h"):
        assert_equivalent(Wrong(layer=Layer(8, 2, scaling=2.0)))


def test_a_result_without_a_bound_is_refused():
    class Silent(LinearInput):
        def bounds(self, arguments, dys):
            return {"h": super().bounds(arguments, dys)["h"]}

    with pytest.raises(AssertionError, match="says nothing about 'dx'"):
        assert_equivalent(Silent())


def test_the_second_criterion_rejects_a_backend_that_is_much_worse(monkeypatch):
    """Half as many bits as the reference, inside the bound of a half-precision type, outside twice the reference's."""
    import lora.fast

    right = lora.fast.lora_linear

    def rough(x, projection, **options):
        h = right(x, projection, **options)
        return h + 40 * torch.finfo(torch.float32).eps * h.detach().abs().max()

    case = LinearInput(dtype=torch.float32, shape=(40,), in_features=100, layer=Layer(30, 4))
    assert_equivalent(case)
    monkeypatch.setattr(lora.fast, "lora_linear", rough)
    with pytest.raises(AssertionError):
        assert_equivalent(case)


def test_an_operation_that_writes_to_its_input_is_caught(monkeypatch):
    import lora.fast

    right = lora.fast.lora_linear

    def writes(x, projection, **options):
        h = right(x, projection, **options)
        x.data.mul_(2)
        return h

    monkeypatch.setattr(lora.fast, "lora_linear", writes)
    with pytest.raises(AssertionError, match="wrote to its caller's x"):
        assert_equivalent(changed(LinearInput(), frozen=frozenset({"weight"})))


@pytest.mark.filterwarnings("ignore:Every label")
def test_a_gradient_that_is_absent_where_the_reference_has_zeros_is_refused(monkeypatch):
    """Its number would be right: of a loss of which no label counts every gradient is zero."""
    import lora.fast

    right, case = lora.fast.linear_cross_entropy, LossInput(shape=(2,), ignored=(0, 1))

    def without_A(hidden, head, labels, **options):
        return right(hidden, head._replace(lora_A=head.lora_A.detach()), labels, **options)

    assert_equivalent(case)
    assert_equivalent(LossInput(shape=(0,)))
    monkeypatch.setattr(lora.fast, "linear_cross_entropy", without_A)
    with pytest.raises(AssertionError, match="fast gives no dlora_A where the reference gives zeros"):
        assert_equivalent(case)


def test_nan_never_passes_and_an_overflow_only_where_it_is_right():
    with pytest.raises(AssertionError, match=r"h\[1\] is nan"):
        assert_within(torch.tensor([0.0, torch.nan]), torch.zeros(2), torch.ones(2), "h")
    infinite = torch.tensor([torch.inf], dtype=torch.float16)
    assert assert_within(infinite, torch.tensor([70000.0]), torch.ones(1)) == 0
    for truth in (-70000.0, 60000.0, torch.nan):
        with pytest.raises(AssertionError):
            assert_within(infinite, torch.tensor([truth]), torch.ones(1))


# ---- the rules


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@examples(30)
@given(seed=st.integers(0, 2**30), terms=st.sampled_from([1, 2, 7, 100, 1000]))
def test_sums_one_after_another_are_within_the_rule_for_sums(dtype, seed, terms):
    """The slowest admissible order: each product rounded, each sum rounded, in the type itself."""
    a, b = (normal(16, terms, seed=seed + i, dtype=torch.float32) for i in (0, 1))
    total = torch.zeros(16)
    for k in range(terms):
        total = total + a[:, k] * b[:, k]
    rule = (exact(a) * exact(b)).sum(1)
    assert_within(total, rule.value, rule.bound())
    assert_within(total.to(dtype), rule.value, Bounded(rule.value, rule.worst, rule.variance, dtype).rounded().bound())


@examples(30)
@given(seed=st.integers(0, 2**30), count=st.integers(2, 5))
def test_terms_may_be_added_in_any_order(seed, count):
    parts = [normal(50, seed=seed + i, dtype=torch.bfloat16) for i in range(count)]
    rule = add_up([exact(part) for part in parts])
    for order in (parts, parts[::-1], parts[1:] + parts[:1]):
        total = order[0]
        for part in order[1:]:
            total = total + part
        assert_within(total, rule.value, rule.bound())


@pytest.mark.parametrize("function", [torch.exp, torch.tanh, torch.sigmoid, lambda t: t * torch.sigmoid(t)])
def test_a_function_passes_an_error_on_by_its_slope(function):
    x = normal(2000, seed=3)
    rough = x.bfloat16()
    rule = exact(x, torch.bfloat16).rounded().map(function)
    found = function(rough.double())
    assert assert_within(found, rule.value, rule.bound()) > 0.3


@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_passes_a_large_error_on_by_the_furthest_that_it_goes(activation, slope):
    """Errors of up to 10 beside numbers of up to 10: within the certain bound, and half of them use all of it."""
    function = slope_of(ACTIVATIONS[activation]) if slope else ACTIVATIONS[activation]
    g, size = 10 * (2 * normal(400, seed=1).sigmoid() - 1), normal(400, seed=2).abs() * 4
    rule = activated(wider(exact(g), size.double()), activation, slope)
    errors = torch.linspace(-1, 1, 2001, dtype=torch.float64)[:, None] * size
    reached = (function(g + errors).detach() - rule.value).abs().amax(0)
    assert bool((reached <= rule.worst * (1 + 1e-6)).all())
    assert float((reached / rule.worst)[size > 0.25].median()) > 0.99


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_activation_is_steeper_or_more_curved_than_the_rule_says(activation):
    g, turn = torch.linspace(-20, 20, 400_001, dtype=torch.float64), slope_of(ACTIVATIONS[activation])
    assert 0.95 * STEEPEST < float(turn(g).detach().abs().max()) <= STEEPEST
    assert 0.6 * MOST_CURVED < float(slope_of(turn)(g).detach().abs().max()) <= MOST_CURVED


def test_probabilities_of_logits_that_are_off_stay_within_the_rule():
    """Every logit of a row off by up to e, up or down: of rows of one class that is sure, and of rows that are not."""
    for scale, off in ((1.0, 0.5), (3.0, 2.0), (300.0, 1.0), (1e30, 1e20)):
        z = scale * normal(500, 5, seed=3).double()
        logs = torch.log_softmax(z, 1)
        room = shifted(logs, torch.full((500, 1), off, dtype=torch.float64))
        assert bool(room.isfinite().all()) and float(room.max()) <= 1
        for seed in range(20):
            error = off * normal(500, 5, seed=seed).sign().double()
            assert bool(((torch.softmax(z + error, 1) - logs.exp()).abs() <= room + 1e-14).all())


def test_the_smaller_of_worst_case_and_deviations_is_taken():
    one = exact(torch.ones(1)).rounded()
    assert float(one.bound()) == pytest.approx(unit_roundoff(torch.float32), rel=1e-6)  # certain: one rounding
    many = exact(torch.ones(1, 10_000)) @ torch.ones(10_000, 1).double()
    assert float(many.bound()) < float(many.worst) / 10
    assert float(many.bound()) == pytest.approx(6 * math.sqrt(float(many.variance)))


def one_case(used: float, bound: float = 1.0) -> Row:
    return Row.of(used, torch.full((10,), 3.0), torch.full((10,), bound), torch.float32)


def test_the_ledger_counts_and_adds_up(tmp_path):
    first, second = Ledger(), Ledger()
    first.note("lora_linear", "fast", torch.float32, "h", one_case(0.5))
    second.note("lora_linear", "fast", torch.float32, "h", one_case(0.02))
    second.save(tmp_path / "second.json")
    first.load(tmp_path / "second.json")
    (row,) = first.rows.values()
    assert (row.cases, row.elements, row.largest, row.unbounded, row.blind) == (2, 20, 0.5, 0, 0)
    assert "50.0%" in first.text() and "lora_linear" in first.text(by_result=False)
    assert not first.left_open()


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_compared_with_nothing_is_counted(tmp_path, dtype):
    """Infinite bounds, NaN, and those that no finite number of the type is outside of; through a file too."""
    largest = torch.finfo(dtype).max
    bound = torch.tensor([math.inf, math.nan, largest, largest * 0.99, 1.0], dtype=torch.float64)
    truth = torch.ones(5, dtype=torch.float64)
    assert without_bound(bound, dtype).tolist() == [True, True, True, False, False]
    ledger, again = Ledger(), Ledger()
    ledger.note("lora_linear", "fast", dtype, "h", Row.of(0.5, truth, bound, dtype))
    ledger.note("lora_linear", "fast", dtype, "dx", Row.of(0.5, truth, truth * 0.9, dtype))
    ledger.save(tmp_path / "ledger.json")
    again.load(tmp_path / "ledger.json")
    assert {key: row.unbounded for key, row in again.left_open().items()} == {("lora_linear", "h"): 3}
    page = Exploration(again).tables()
    assert "**Compared with nothing**: 3 numbers" in page and "| `lora_linear` | h | 5 | 3 | 1 |" in page


def test_results_that_zeros_would_have_passed_for_are_counted():
    small, bound = torch.tensor([0.5, -1.0]), torch.ones(2)
    assert Row.of(0.5, small, bound, torch.float32).blind == 1
    assert Row.of(0.5, torch.tensor([0.5, -1.5]), bound, torch.float32).blind == 0
    assert Row.of(0.0, torch.zeros(2), bound, torch.float32).blind == 0  # there zeros are the result


class Boundless(LinearInput):
    """A bound that has nothing to say of dx."""

    elements: ClassVar[slice] = slice(None)

    def bounds(self, arguments, dys):
        right = super().bounds(arguments, dys)
        dx = right["dx"]
        worst, variance = dx.worst.clone(), dx.variance.clone()
        worst.flatten()[self.elements], variance.flatten()[self.elements] = math.inf, math.inf
        return right | {"dx": Bounded(dx.value, worst, variance, dx.dtype)}


class AllButOne(Boundless):
    elements = slice(1, None)


class Admitted(Boundless):
    @property
    def boundless(self):
        return True


def test_a_result_of_which_nothing_is_compared_is_refused():
    with pytest.raises(AssertionError, match="all 80 elements of dx were compared with nothing"):
        assert_equivalent(Boundless())
    assert_equivalent(AllButOne())
    assert_equivalent(Admitted())


def test_elements_without_a_bound_do_not_hide_the_others_from_the_second_criterion():
    """One infinite deviation is not the allowance of a whole result."""
    exact, spread = torch.ones(3, dtype=torch.float64), torch.tensor([1e-8, math.inf, math.nan], dtype=torch.float64)
    compared = torch.tensor([True, False, False])
    assert_as_near("dx", torch.tensor([1.0, 7.0, 7.0]), torch.ones(3), exact, spread, compared)
    with pytest.raises(AssertionError, match="dx from fast is wrong by"):
        assert_as_near("dx", torch.tensor([1.01, 7.0, 7.0]), torch.ones(3), exact, spread, compared)
