"""The error bound: the reference keeps to it in every type, and a wrong implementation does not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.projection import Projection
from lora.reference.linear import lora_linear, lora_linear_backward
from lora.testing import LinearCase, assert_within, in_float64, linear_bounds

cases = st.builds(
    LinearCase,
    tokens=st.integers(1, 9),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 40),
    rank=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    scaling=st.sampled_from([0.25, 1.0, 2.0, -3.0]),
    magnitude=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**32),
)


def results(x, projection, dy) -> dict[str, torch.Tensor]:
    back = lora_linear_backward(dy, x, projection)
    h = lora_linear(x, projection)
    return {"h": h, "dx": back.dx, "dlora_A": back.dlora_A, "dlora_B": back.dlora_B}


@given(cases)
def test_the_reference_keeps_to_the_bound(case):
    x, projection, dy = case.build()
    truth = results(x.double(), in_float64(projection), dy.double())
    bounds = linear_bounds(x, projection, dy)
    for name, value in results(x, projection, dy).items():
        assert_within(value, truth[name], bounds[name], name)


def swapped_rows(x, p: Projection, dy):
    return results(x, p._replace(lora_A=p.lora_A.flip(0)), dy)


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
    "rows of A reversed": swapped_rows,
    "last token dropped": last_token_dropped,
    "bias twice": lambda x, p, dy: results(x, p._replace(bias=2 * p.bias), dy),
    **{f"zero {name}": without(name) for name in ("h", "dx", "dlora_A", "dlora_B")},
}


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bound_rejects_a_wrong_result(name, dtype):
    x, projection, dy = LinearCase(5, 33, 17, 4, dtype=dtype, bias=True).build()
    truth = results(x.double(), in_float64(projection), dy.double())
    bounds = linear_bounds(x, projection, dy)
    wrong = MUTANTS[name](x, projection, dy)
    rejected = []
    for result, value in wrong.items():
        try:
            assert value is not None
            assert_within(value, truth[result], bounds[result], result)
        except AssertionError:
            rejected.append(result)
    assert rejected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bound_is_not_loose(dtype):
    """The worst element uses a fair share; less in float32, whose sums of blocks stay under the random walk of K."""
    x, projection, dy = LinearCase(200, 300, 200, 8, dtype=dtype, bias=True).build()
    truth = results(x.double(), in_float64(projection), dy.double())
    bounds = linear_bounds(x, projection, dy)
    used = {n: assert_within(v, truth[n], bounds[n], n) for n, v in results(x, projection, dy).items()}
    assert min(used.values()) > (0.001 if dtype == torch.float32 else 0.01), used


def test_nan_never_passes():
    with pytest.raises(AssertionError, match=r"h\[1\] is nan"):
        assert_within(torch.tensor([0.0, torch.nan]), torch.zeros(2), torch.ones(2), "h")
