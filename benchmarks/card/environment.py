"""What the figures were measured on; never a host's name or a path."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.card.peers import version_of
from benchmarks.card.rows import ENVIRONMENT_NAME

QUERIED = (
    "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit",
    "temperature.gpu",
)  # fmt: skip


def describe(device: torch.device) -> dict[str, Any]:
    """The card as found, and the versions of what runs on it."""
    facts: dict[str, Any] = {"card": "CPU (dry run)", "python": platform.python_version(), "torch": torch.__version__}
    facts |= {name: version_of(name) for name in ("triton", "transformers", "peft", "liger_kernel", "bitsandbytes")}
    facts["cuda"] = torch.version.cuda
    facts["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    facts["allocator"] = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "default"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"card": properties.name, "memory_bytes": properties.total_memory}
        facts |= {"multiprocessors": properties.multi_processor_count}
        facts |= {"L2_bytes": getattr(properties, "L2_cache_size", None), "as_found": clocks()}
    return facts


def clocks() -> dict[str, str] | str:
    """The card's state by nvidia-smi, which is asked and never told anything."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi did not answer: {type(error).__name__}"
    return dict(zip(QUERIED, (cell.strip() for cell in answer.splitlines()[0].split(",")), strict=False))


def write(directory: Path, facts: dict[str, Any]) -> None:
    """Beside the rows."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ENVIRONMENT_NAME).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
