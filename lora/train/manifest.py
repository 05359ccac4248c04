"""manifest.json: what a checkpoint says of itself. Its files, by size and SHA-256, and the run it belongs to.

    {"format": 2, "step": 20, "world_size": 2,                              how many processes wrote it
     "processes": 4,                                                         for how many grad_accumulation is meant
     "settings": {...}, "base": "...", "data": "...", "held_out": "...",     the run: TrainConfig.fixed(), fingerprints
     "files": {"state.json": {"size": 812, "sha256": "..."}, ...},
     "sha256": "..."}                                                        of all the above

The hashes are of what was meant to be written, taken before it reached the file system (but for the adapter, whose
files hold digests of their own), and the manifest is written last: a checkpoint that was cut off, changed or damaged
anywhere, in the manifest too, does not match.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora.errors import LoRAError
from lora.train.durable import Written, hash_of

MANIFEST = "manifest.json"
FORMAT = 2
RUN = ("settings", "processes", "base", "data", "held_out")
CONTENTS = {  # what a fingerprint is of, and the setting whose name allows it to differ
    "base": ("model", "the base model's weights: others than then"),
    "data": ("data", "the training data: other examples, or another tokenizer, than then"),
    "held_out": ("eval_data", "the held-out data: other examples, or another tokenizer, than then"),
}


def manifest_of(run: Mapping[str, Any], step: int, world_size: int, files: Mapping[str, Written]) -> bytes:
    """The manifest of a checkpoint at `step` that consists of `files`."""
    stated = {name: written._asdict() for name, written in sorted(files.items())}
    content: dict[str, Any] = {"format": FORMAT, "step": step, "world_size": world_size}
    content |= {name: run.get(name) for name in RUN} | {"files": stated}
    return json.dumps({**content, "sha256": _digest(content)}, indent=1).encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole."""
    found: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
    return found


def why_torn(path: Path, needed: Iterable[str] = ()) -> str | None:
    """What of a checkpoint differs from its manifest; None where it is whole.

    Args:
        needed: files that a checkpoint cannot be without.

    Raises: LoRAError where it may be whole, but a newer version of this package wrote it, or it may not be read.
    """
    try:
        return _first_difference(path, needed)
    except PermissionError as error:
        raise LoRAError(
            f"{error.filename or path} cannot be read: {error.strerror}. Make it readable for this user, or start anew "
            "with another --output."
        ) from None


def _first_difference(path: Path, needed: Iterable[str]) -> str | None:
    """See `why_torn`."""
    try:
        found = read_manifest(path)
        written = found["format"]
        if type(written) is int and written > FORMAT:
            raise LoRAError(
                f"{path} has format {written}, expected at most {FORMAT}: a newer version wrote it. Resume with that "
                "version, or start anew with another --output."
            )
        if written != FORMAT:
            return f"{MANIFEST} has format {written!r}, expected {FORMAT}"
        if _digest({name: value for name, value in found.items() if name != "sha256"}) != found["sha256"]:
            return f"{MANIFEST} has other contents than were written"
        files = dict(found["files"])
    except (LoRAError, PermissionError):
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or damaged"
    missing = sorted(set(needed) - set(files))
    reasons = (_why_torn(path, name, stated) for name, stated in files.items())
    return f"{MANIFEST} does not name {missing[0]}" if missing else next(filter(None, reasons), None)


def _why_torn(path: Path, name: str, stated: Mapping[str, Any]) -> str | None:
    """What of one file differs from what the manifest states."""
    if ".." in Path(name).parts or Path(name).is_absolute():
        return f"{MANIFEST} names {name!r}"
    try:
        size = (path / name).stat().st_size
        if size != stated["size"]:
            return f"{name} has {size:,} bytes instead of {stated['size']:,}"
        same = hash_of(path / name) == stated["sha256"]
    except FileNotFoundError:
        return f"{name} is missing"
    except PermissionError:
        raise
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None if same else f"{name} has other contents than were written"


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(setting, what is different about it) for two runs' settings, base models and data."""
    settings = json.loads(json.dumps(now["settings"]))  # tuples become lists, as in the file
    before = then["settings"]
    found = [
        (name, f"{name}: {before.get(name)!r} then, {settings.get(name)!r} now")
        for name in {**settings, **before}
        if before.get(name) != settings.get(name)
    ]
    processes = (processes_of(then), now["processes"])
    if processes[0] != processes[1]:
        products = (f"{s.get('grad_accumulation')} × {n}" for s, n in zip((before, settings), processes, strict=True))
        found.append(("grad_accumulation", "grad_accumulation × processes: {} then, {} now".format(*products)))
    return found + [(name, text) for key, (name, text) in CONTENTS.items() if then.get(key) != now.get(key)]


def processes_of(found: Mapping[str, Any]) -> int:
    """For how many processes a checkpoint's grad_accumulation is meant."""
    return int(found.get("processes") or found["world_size"])


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
