"""What every test shares: no network, one voice of randomness, and Hypothesis profiles."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported anywhere

import pytest
import torch
from hypothesis import settings

settings.register_profile("quick", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
