"""Sums that stay in float32 where their terms are narrower, proven on sums long enough to tell.

Within the bounds of the operations a sum of a few terms may be kept in any type. In bfloat16 a sum of ones stops at
256, and with it an embedding's gradient for an id that comes often: that is not allowed, and this is where it shows.
"""

from __future__ import annotations

import pytest
import torch

from lora.projection import Projection
from lora.testing.proof import BACKENDS

TOKENS = 3000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_id_that_comes_often_is_summed_in_float32(device, dtype):
    """dA[:, id] = Σ s·dy B over its tokens: each term rounded twice, the sum once; all terms of one sign."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5, 4, generator=generator).to(dtype).to(device)
    A = torch.randn(3, 5, generator=generator).to(dtype).to(device).requires_grad_()
    B = (torch.rand(4, 3, generator=generator) + 0.5).to(dtype).to(device).requires_grad_()
    dy = (torch.rand(TOKENS, 4, generator=generator) + 0.5).to(dtype).to(device)
    ids = torch.full((TOKENS,), 2, device=device)
    h = BACKENDS["fast"].lora_embedding(ids, Projection(table, None, A, B, 0.5))
    (dA,) = torch.autograd.grad(h, A, dy)
    exact = 0.5 * (dy.double() @ B.detach().double()).sum(0)
    u, u_sum = torch.finfo(dtype).eps / 2, TOKENS * torch.finfo(torch.float32).eps / 2
    assert float(((dA[:, 2].double() - exact).abs() / exact).max()) <= 3 * u * (1 + 3 * u) + u_sum
