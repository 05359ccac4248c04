"""What an adapter's file must pass before a model takes it: whole, of this config, of this model, finite.

In the safetensors metadata `save_adapter` leaves a record, which PEFT ignores:

    the LoRAConfig as it was given    PEFT's config holds what it came to: the names that were adapted, a plain start
    digests                           of every tensor, of adapter_config.json, and of the record itself
    samples of the base weights       32 numbers of up to 16 adapted modules: was the adapter trained on this model?

So a damaged file, a config of another save and another base model are noticed. A file of PEFT's has no record: there
the names of the base models are compared, and the base weights that PEFT adds for an adapted embedding.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from lora.adapters import walk
from lora.config import LoRAConfig
from lora.distributed import whole_module
from lora.errors import LoRAError, did_you_mean
from lora.layers import AdapterLayer, base_of, is_conv1d
from lora.nf4_format import NF4_CODES
from lora.nf4_layer import NF4Linear
from lora.peft_format import (
    CONFIG_FILE,
    DTYPES,
    FLOATING,
    PREFIX,
    WEIGHTS_FILE,
    Slot,
    Stored,
    base_name,
    bias_key,
    from_peft,
    read_header,
    read_tensor,
    slots,
)
from lora.reference.nf4 import nf4_absmax

VERSION = 1
RECORD, RECORD_DIGEST = "lora", "lora_digest"
SAMPLED_VALUES = 32
COPIES = re.compile(r"\.(base_layer|original_module|modules_to_save)\.")  # what PEFT's names of copies have inside

# The cosine between two samples of one base weight, of which one is off by a relative error e, is 1 / sqrt(1 + e²):
# 0.996 for NF4 (e = 0.09), 0.97 for a 2-bit GGUF (e = 0.25). Independent weights reach 0.9 in 32 numbers with a
# probability of (1 - 0.9²)^15.5 < 1e-11. A model fine-tuned from the base is as near to it as the base itself.
SAME_BASE = 0.9
# A LoftQ adapter makes up for what NF4 lost, so its base must be that NF4: nearer than another rounding of W (e = 0.09
# again: 0.996), but not nearer than the decoded weight in 16 bits (e = 2**-9: 0.999998).
SAME_CODES = 0.9999


class Record(NamedTuple):
    """What `save_adapter` notes in the file beside what PEFT needs."""

    config: LoRAConfig
    doubled: bool  # A and B hold what they started from, too
    config_digest: str
    digests: dict[str, str]  # of the tensors
    base: str | None  # what the base model was loaded from
    samples: dict[str, Tensor]  # of the base weights, by module


class Source(NamedTuple):
    """An adapter's file, its names and shapes checked, and the model it is to be read into."""

    model: nn.Module
    file: BinaryIO
    path: Path
    header: dict[str, Stored]
    record: Record | None  # None in a file of PEFT's
    config: LoRAConfig
    wanted: dict[str, Slot]
    names: dict[str, str]  # what the file calls each wanted tensor
    copies: dict[str, str]  # the file's other tensors -> the base weight or the wanted tensor they are a copy of
    base: str | None


def open_source(model: nn.Module, folder: Path, text: bytes, file: BinaryIO) -> Source:
    """Reads everything but the values, and checks that it fits together and fits the model.

    Args:
        text: adapter_config.json. file: adapter_model.safetensors, open.
    """
    path = folder / WEIGHTS_FILE
    header, metadata = read_header(file, path)
    record = _record(metadata, header, path)
    if record and record.config_digest != digest_of(text):
        raise LoRAError(
            f"{folder / CONFIG_FILE} is not the one that {WEIGHTS_FILE} beside it was saved with: a save was "
            "interrupted, or one of the two was edited or replaced. Save the adapter again, or take both from one save."
        )
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoRAError(f"{folder / CONFIG_FILE} is not JSON ({error}): fetch it again.") from None
    if not isinstance(fields, dict):
        raise LoRAError(f"{folder / CONFIG_FILE} holds a {type(fields).__name__}, expected an object: fetch it again.")
    base = record.base if record else fields.get("base_model_name_or_path")
    base = base if isinstance(base, str) and base else None
    with _about(folder / CONFIG_FILE, base, model):
        config = record.config if record else from_peft(fields, model)
        wanted = slots(model, config, bool(record and record.doubled))
    with _about(path, base, model):
        names, copies = _names(header, wanted, model, foreign=record is None)
        _check_shapes(header, wanted, names, config)
    return Source(model, file, path, header, record, config, wanted, names, copies, base)


def _record(metadata: Mapping[str, str], header: Mapping[str, Stored], path: Path) -> Record | None:
    """What `save_adapter` noted; None in a file that it did not write."""
    if not any(key.startswith(RECORD) for key in metadata):
        return None
    damaged = LoRAError(
        f"{path} has a damaged record in its header, expected it as it was saved: fetch the file again."
    )
    document = metadata.get(RECORD, "")
    if dict(metadata) != {"format": "pt", RECORD: document, RECORD_DIGEST: digest_of(document.encode())}:
        raise damaged
    try:
        content = json.loads(document)
        if content["version"] != VERSION:
            raise LoRAError(
                f"{path} has a record of version {content['version']}, expected {VERSION}: a newer lora wrote it, so "
                "upgrade lora."
            )
        samples = {name: bytearray.fromhex(text) for name, text in content["samples"].items()}
        if any(len(raw) != 4 * SAMPLED_VALUES for raw in samples.values()):
            raise damaged
        return Record(
            LoRAConfig.from_dict(content["config"]),
            bool(content["doubled"]),
            content["config_digest"],
            dict(zip(sorted(header), content["digests"], strict=True)),
            content["base"],
            {name: torch.frombuffer(raw, dtype=torch.float32) for name, raw in samples.items()},
        )
    except LoRAError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError):
        raise damaged from None


@contextmanager
def _about(path: Path, base: str | None, model: nn.Module) -> Iterator[None]:
    """Says of an error which file it is in, and where the base models differ by name, that they do."""
    try:
        yield
    except LoRAError as error:
        here = base_name(model)
        other = base and here and last_part(base) != last_part(here)
        hint = f" The adapter was made for {base!r}, this model is {here!r}." if other else ""
        raise LoRAError(f"{path}: {error}{hint}") from None


def _names(
    header: Mapping[str, Stored], wanted: Mapping[str, Slot], model: nn.Module, foreign: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """What the file calls each wanted tensor; and which of its other tensors are copies, of what.

    In a foreign file, PEFT's, a bias is named by whether any adapter was around its module, and there can be base
    weights: the table of an adapted embedding, the original of a module trained in full.
    """
    names = {}
    for key, slot in wanted.items():
        other = bias_key(slot.path, ".base_layer.bias" not in key) if slot.role == "bias" else key
        names[key] = other if foreign and key not in header and other in header else key
    found = set(names.values())
    extra = [name for name in header if name not in found]
    copies = {name: COPIES.sub(".", name, count=1) for name in extra} if foreign else {}
    base = base_tensors(model) if copies else {}
    copies = {n: plain for n, plain in copies.items() if plain in (wanted if ".modules_to_save." in n else base)}
    missing, extra = [name for name in names.values() if name not in header], [n for n in extra if n not in copies]
    if missing or extra:
        lacks = [f"lacks {_listed(missing)}, which the config asks for"] if missing else []
        has = [f"has {_listed(extra)}, which the config does not ask for"] if extra else []
        hint = did_you_mean(extra[0], missing or wanted, most=1) if extra else ""
        raise LoRAError(
            f"the file {' and '.join(lacks + has)}; expected exactly {len(wanted)} tensors.{hint} The two files, or "
            "the adapter and the model, do not belong together."
        )
    return names, copies


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _check_shapes(
    header: Mapping[str, Stored], wanted: Mapping[str, Slot], names: Mapping[str, str], config: LoRAConfig
) -> None:
    for key, slot in wanted.items():
        stored = header[names[key]]
        if stored.shape != slot.shape:
            rank = f" with r={config.rank_of(slot.path)}" if slot.role in ("lora_A", "lora_B") else ""
            raise LoRAError(
                f"{names[key]} is {list(stored.shape)}, expected {list(slot.shape)} in this model{rank}: the adapter "
                "was made with another config or for another model."
            )
        allowed = FLOATING if slot.floating else DTYPES.keys() - FLOATING.keys()
        if stored.dtype not in allowed:
            raise LoRAError(
                f"{names[key]} is {stored.dtype}, expected one of {', '.join(sorted(allowed))}: convert it, or save "
                "the adapter again."
            )


def read_value(source: Source, name: str) -> Tensor:
    """One tensor of the file; LoRAError where it was damaged since it was saved, or is not finite."""
    tensor = read_tensor(source.file, source.header[name], source.path)
    saved_as = source.record.digests[name] if source.record else None
    if saved_as and tensor_digest(tensor) != saved_as:
        raise LoRAError(
            f"{source.path}: {name} has changed since it was saved (its digest is {tensor_digest(tensor)}, expected "
            f"{saved_as}): the file is damaged, fetch or copy it again."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise LoRAError(
            f"{source.path}: {name} has {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values that are not "
            "finite, expected none: the training that made it diverged. Take an earlier checkpoint."
        )
    return tensor


def check_base_model(source: Source) -> None:
    """Raises LoRAError where the adapter was trained on another base model than this one."""
    here = base_name(source.model)
    names = f"base_model_name_or_path is {source.base!r} in the file and {here!r} in this model"
    if source.record is None:
        if source.base and here and last_part(source.base) != last_part(here):
            raise LoRAError(
                f"{source.path.parent} was made for another base model: {names}, expected the same. Load the model it "
                "was made for; if that is what this is, check_base=False loads it all the same."
            )
        return
    loftq = source.config.init_lora_weights == "loftq"
    enough = SAME_CODES if loftq else SAME_BASE
    modules = dict(walk(source.model))
    for path, sample in source.record.samples.items():
        owner, _, parameter = path.rpartition(".")  # of an adapted parameter
        there = sampled(modules[path]) if path in modules else None
        if there is None and owner in modules and parameter in base_of(modules[owner])._parameters:
            there = sampled(modules[owner], parameter)
        alike = 0.0 if there is None else similarity(sample, there)
        if not alike >= enough:
            also = " LoftQ makes up for what NF4 loses: load the model with quantization='nf4'." if loftq else ""
            raise LoRAError(
                f"{source.path.parent} was made for another base model: the weights of {path} have a similarity of "
                f"{alike:.4f} to those it was trained on, expected {enough} or more; {names}.{also} Load the model it "
                "was made for; check_base=False loads it all the same."
            )


def check_copies(source: Source, values: Mapping[str, Tensor]) -> None:
    """Raises LoRAError where PEFT's copy of a base weight differs from the model's: it would be lost."""
    base = base_tensors(source.model) if source.copies else {}
    for name, plain in source.copies.items():
        stored, theirs = source.header[name], values[plain] if ".modules_to_save." in name else base[plain]
        same = stored.dtype in FLOATING and theirs.is_floating_point() and stored.shape == tuple(theirs.shape)
        if same:
            copy = read_tensor(source.file, stored, source.path)
            coarse = max(copy.dtype, theirs.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            same = torch.equal(copy.to(coarse), theirs.detach().cpu().to(coarse))
        if not same:
            raise LoRAError(
                f"{source.path}: {name} {list(stored.shape)} is a copy of a base weight that differs from the model's "
                f"{list(theirs.shape)}, expected the same: the adapter was made for another model, or its vocabulary "
                "was resized or trained. Give the model those weights; check_base=False loads the adapter without them."
            )


def sampled(module: nn.Module, parameter: str | None = None) -> Tensor:
    """SAMPLED_VALUES evenly spaced numbers of a module's base weight, or of `parameter`, row-major, as float32.

    Of an NF4 weight only these are decoded.
    """
    base: Any = whole_module(base_of(module))
    name = parameter or (module.parameter if isinstance(module, AdapterLayer) else "weight")
    shape = base.quantised.shape if isinstance(base, NF4Linear) else getattr(base, name).shape
    index = torch.linspace(0, math.prod(shape) - 1, SAMPLED_VALUES, dtype=torch.float64).long()
    if isinstance(base, NF4Linear):
        quantised = base.quantised
        index = index.to(quantised.codes.device)
        pair = quantised.codes[index // 2]
        code = torch.where(index % 2 == 0, pair >> 4, pair & 0x0F)
        return NF4_CODES[code.int().cpu()] * nf4_absmax(quantised)[index // quantised.block_size].cpu()
    weight: Tensor = base.weight.detach().T if is_conv1d(base) else getattr(base, name).detach()
    return weight[torch.unravel_index(index.to(weight.device), weight.shape)].float().cpu()


def similarity(one: Tensor, other: Tensor) -> float:
    """The cosine of the angle between two samples; 1 for two that are zero."""
    norms = float(one.double().norm() * other.double().norm())
    return float(one.double() @ other.double()) / norms if norms else float(torch.equal(one, other))


def last_part(name: str) -> str:
    """The name of a model without where it lies: `org/Name`, `/data/name/` -> `name`."""
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1].lower()


def tensor_digest(tensor: Tensor) -> str:
    """The digest of a tensor's dtype, shape and bytes."""
    return digest_of(f"{tensor.dtype}{list(tensor.shape)}".encode(), tensor.reshape(-1).view(torch.uint8).numpy())


def digest_of(*parts: Any) -> str:
    """64 bits of SHA-256: against damage, not against an attacker, who would write a new one."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The base model's own parameters and buffers, by the name PEFT gives them."""
    modules = [(path, base_of(module)) for path, module in walk(model)]
    return {
        f"{PREFIX}{path}.{name}": tensor
        for path, base in modules
        for name, tensor in (*base._parameters.items(), *base._buffers.items())
        if tensor is not None
    }
