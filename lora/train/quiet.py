"""No noise from other packages: their advice, tables and bars say nothing about the user's run."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

PACKAGES = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "peft", "torch", "transformers", "trl")
OFF = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}  # read when the packages are imported


@contextmanager
def quiet(data: bool = False) -> Iterator[None]:
    """Within the block only errors of other packages are heard; warnings of our own stay. Settings are put back.

    Args:
        data: also silence the bars of `datasets`, which takes importing it.
    """
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
    bars: list[Any] = [import_module(name) for name in ("transformers.utils.logging", "datasets")[: 1 + data]]
    shown = [module for module in bars if module.is_progress_bar_enabled()]
    loggers = [logging.getLogger(name) for name in PACKAGES]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        for module in shown:
            module.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=rf"({'|'.join(PACKAGES)})(\..*)?$")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for module in shown:
            module.enable_progress_bar()
