"""The last step of the sums over tokens, on sizes at the edges of its blocks of 1024."""

from __future__ import annotations

import pytest
import torch

from lora.fast.kernels.gemm import sum_parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 2048, 2049])
def test_every_element_is_the_sum_of_its_parts_first_to_last(device: str, size: int, parts: int, dtype: torch.dtype):
    each = torch.randn(parts, size, generator=torch.Generator().manual_seed(size)).to(device)
    expected = each[0].clone()
    for part in each[1:]:
        expected += part
    found = sum_parts(each, dtype)
    assert found.shape == (size,) and found.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    room = torch.finfo(dtype).eps * expected.abs()  # the interpreter cuts off where a GPU rounds
    assert bool(((found.float() - expected).abs() <= room).all())
