"""Scratch memory that is asked for again and again: fresh memory costs a page fault for every 4 KiB of it.

A workspace belongs to one purpose, device, dtype and stream: two functions on one stream run one after the other, so
the second may overwrite what the first has used. Nothing that autograd keeps may point into one.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_workspaces: dict[tuple[str, torch.device, torch.dtype, int], Tensor] = {}


def workspace(count: int, dtype: torch.dtype, device: torch.device, purpose: str) -> Tensor:
    """`count` numbers of scratch memory, the same ones for every call for this purpose on this device and stream."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else threading.get_ident()
    key = (purpose, device, dtype, stream)
    if key not in _workspaces or _workspaces[key].numel() < count:
        with torch.inference_mode(False):  # what is made under it cannot be written to outside
            _workspaces[key] = torch.empty(count, dtype=dtype, device=device)
    return _workspaces[key][:count]


def workspaces_on(device: torch.device) -> list[Tensor]:
    """The scratch memory that a device holds now."""
    return [x for x in _workspaces.values() if x.device == device]


def release_workspaces(kind: str | None = None) -> None:
    """Gives the scratch memory back, of one type of device or of all; who needs it next takes new."""
    for key in [key for key in _workspaces if kind in (None, key[1].type)]:
        del _workspaces[key]
