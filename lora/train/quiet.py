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
def quiet() -> Iterator[None]:
    """Within the block only errors of other packages are heard; warnings of our own stay. Settings are put back."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
    import datasets

    transformers_logging: Any = import_module("transformers.utils.logging")
    loggers = [logging.getLogger(name) for name in PACKAGES]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled(), datasets.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=rf"({'|'.join(PACKAGES)})(\..*)?$")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars[0]:
            transformers_logging.enable_progress_bar()
        if bars[1]:
            datasets.enable_progress_bars()
