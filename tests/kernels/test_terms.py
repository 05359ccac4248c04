"""The low-rank terms that the activation's kernels add to g, z and dh as they read them, from memory laid out anyhow.

Each operand is x + s u factorᵀ; the bound is that formula's own, in the numbers of `lora.testing.bounded`.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lora.errors import LoRAError
from lora.fast.kernels.activation import gated_backward, gated_forward
from lora.fast.parts import LowRank
from lora.reference.mlp import activate, activation_slope
from lora.testing.bounded import Bounded, exact
from lora.testing.bounds import ACTIVATIONS, activated
from lora.testing.proof import Maker
from lora.testing.report import assert_within

# NumPy, inside the interpreter, remarks on the e^-g that may overflow; a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

LAYOUTS = {
    "side by side": lambda t: t,
    "every other column": lambda t: torch.stack([t, t + 9], 2).flatten(1)[:, ::2],
    "transposed": lambda t: t.T.contiguous().T,
    "columns of a wider buffer": lambda t: torch.cat([t + 9, t], 1)[:, t.shape[1] :],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 5, (1, 2, 3)), (17, 130, (16, 0, 5)), (33, 128, (0, 64, 17))]  # tokens, hidden, ranks of dh, g and z


class Operand(NamedTuple):
    """What a kernel reads: x [tokens, hidden], and a term that it adds, or none."""

    x: Tensor
    term: LowRank | None

    @property
    def bounded(self) -> Bounded:
        """X + s u factorᵀ as the kernels may compute it: in float32, and kept there."""
        if self.term is None:
            return exact(self.x)
        return exact(self.x) + (exact(self.term.u) @ exact(self.term.factor).T) * self.term.scale


def operand(make: Maker, tokens: int, hidden: int, r: int, layouts: tuple[str, str]) -> Operand:
    """Random numbers; layouts of u and of factor."""
    x = make.normal(tokens, hidden)
    if not r:
        return Operand(x, None)
    u, factor = make.normal(tokens, r), make.normal(hidden, r)
    return Operand(x, LowRank(LAYOUTS[layouts[0]](u), LAYOUTS[layouts[1]](factor), -1.5))


def check(dh: Operand, g: Operand, z: Operand, activation: str) -> None:
    """Both kernels' results are within their bounds of the reference in float64."""
    terms = {"plus_g": g.term, "plus_z": z.term}
    forward = gated_forward(g.x, z.x, activation, **terms)
    dg, dz, h = gated_backward(dh.x, g.x, z.x, activation, with_h=True, plus_dh=dh.term, **terms)
    b_dh, b_g, b_z = dh.bounded, g.bounded, z.bounded
    slope = activation_slope(b_g.value, activation)
    act, act_value = activated(b_g, activation), activate(b_g.value, activation)
    of_h = (act_value * b_z.value, act * b_z)
    for name, found, (truth, bound) in (
        ("h", forward, of_h),
        ("h again", h, of_h),
        ("dg", dg, (b_dh.value * b_z.value * slope, b_dh * b_z * activated(b_g, activation, slope=True))),
        ("dz", dz, (b_dh.value * act_value, b_dh * act)),
    ):
        assert_within(found, truth, bound.rounded().bound(), name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden", "ranks"), SIZES)
def test_low_rank_terms_are_added_on_the_way_in(activation, dtype, tokens, hidden, ranks, device):
    make = Maker(tokens, dtype, device)
    check(*(operand(make, tokens, hidden, r, ("side by side", "transposed")) for r in ranks), activation)


@pytest.mark.parametrize("u_layout", LAYOUTS)
@pytest.mark.parametrize("factor_layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [(1, 3, 17), (17, 1, 3)])
def test_a_term_may_lie_anyhow(device, ranks, u_layout, factor_layout):
    make = Maker(7, torch.float32, device)
    check(*(operand(make, 5, 19, r, (u_layout, factor_layout)) for r in ranks), "silu")


def test_a_term_of_too_high_a_rank_is_refused(device):
    x, term = operand(Maker(0, torch.float32, device), 3, 5, 65, ("side by side", "side by side"))
    with pytest.raises(LoRAError, match=r"rank 65 .* at most 64"):
        gated_forward(x, x, "silu", plus_z=term)
