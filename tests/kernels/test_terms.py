"""The low-rank terms that the activation's kernels add as they read, from memory laid out in any way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lora.fast.kernels.activation import gated_backward, gated_forward
from lora.fast.parts import LowRank

LAYOUTS = {
    "side by side": lambda t: t,
    "every other column": lambda t: torch.stack([t, t + 9], 2).flatten(1)[:, ::2],
    "transposed": lambda t: t.T.contiguous().T,
    "columns of a wider buffer": lambda t: torch.cat([t + 9, t], 1)[:, t.shape[1] :],
}


@pytest.mark.parametrize("rank", [1, 3, 17])
@pytest.mark.parametrize("u_layout", LAYOUTS)
@pytest.mark.parametrize("factor_layout", LAYOUTS)
def test_a_term_may_lie_anyhow(device: str, rank: int, u_layout: str, factor_layout: str) -> None:
    generator = torch.Generator().manual_seed(rank)
    g, z, dh = (torch.randn(5, 19, generator=generator).to(device) for _ in range(3))
    u, factor = torch.randn(5, rank, generator=generator), torch.randn(19, rank, generator=generator)
    term = LowRank(LAYOUTS[u_layout](u.to(device)), LAYOUTS[factor_layout](factor.to(device)), 0.5)
    whole = (g.double().cpu() + 0.5 * u.double() @ factor.double().T).requires_grad_()
    other = z.double().cpu().requires_grad_()
    expected = F.silu(whole) * other
    dg, dz = torch.autograd.grad(expected, (whole, other), dh.double().cpu())
    room = {"rtol": 1e-5, "atol": (rank + 8) * 1e-6}  # float32 sums of `rank` products of ordinary numbers
    torch.testing.assert_close(gated_forward(g, z, "silu", plus_g=term).double().cpu(), expected.detach(), **room)
    found = gated_backward(dh, g, z, "silu", plus_g=term)
    torch.testing.assert_close(found[0].double().cpu(), dg, **room)
    torch.testing.assert_close(found[1].double().cpu(), dz, **room)
