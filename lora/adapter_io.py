"""Adapter files in PEFT's directory format, both ways."""

from __future__ import annotations

from pathlib import Path

from torch import nn


def save_adapter(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> Path:
    """Writes one adapter of `model` as PEFT does."""
    raise NotImplementedError


def load_adapter(
    model: nn.Module, directory: str | Path, adapter_name: str = "default", *, check_base: bool = True
) -> nn.Module:
    """Reads an adapter that `save_adapter` or PEFT wrote into `model`."""
    raise NotImplementedError
