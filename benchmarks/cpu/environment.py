"""What the figures were measured on: never a host's name or a path; and how busy the machine was."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

import lora
from benchmarks.card.peers import version_of

PACKAGES = ("transformers", "peft", "bitsandbytes", "liger_kernel", "unsloth", "lorafusion")
QUIET = 0.5  # a load below this before the run: nobody else was at work


def describe(rounds: int, dry: bool, parts: list[str]) -> dict[str, Any]:
    """Before the run; `load_after` is added when it ends."""
    return {
        "parts": parts, "rounds": rounds, "dry": dry, "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "vector_units": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version(),
        "lora": lora.__version__, "torch": torch.__version__, **{name: version_of(name) for name in PACKAGES},
        "load_before": load(),
    }  # fmt: skip


def processor() -> str:
    """As the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def load() -> float:
    """Processes that ran or wanted to, over the last minute."""
    return round(os.getloadavg()[0], 2)
