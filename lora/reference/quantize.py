"""`quantize`: every frozen nn.Linear of a model becomes an NF4Linear, before `inject`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from lora.config import matches
from lora.errors import LoRAError, did_you_mean
from lora.layers import AdapterLayer
from lora.meter import meter
from lora.nf4_format import check_block_size
from lora.nf4_layer import NF4Linear
from lora.reference.inject import output_heads
from lora.reference.nf4 import check_quantisable
from lora.saving import attach

SCHEMES = ("nf4",)


def quantize(
    model: nn.Module,
    scheme: str = "nf4",
    double_quant: bool = True,
    *,
    block_size: int = 64,
    exclude_modules: str | Sequence[str] | None = None,
) -> nn.Module:
    """Replaces the linear layers of `model` by NF4Linear, in place (Dettmers et al. 2023).

    Left as they are: the output head, as for LoRAConfig's "all-linear"; modules whose weight belongs to another module
    too (tied: quantising one would part them); and subclasses of nn.Linear or patched ones, whose code may read the
    weight. A module shared by two paths stays shared, and every bias keeps its identity.

    Args:
        scheme: "nf4".
        double_quant, block_size: see `nf4_quantize`.
        exclude_modules: further modules to leave, in LoRAConfig's notation: a regular expression for the whole path,
            or a list of paths or their ends.

    Returns: the same model. Raises: LoRAError, before anything is changed, for an unknown scheme, a model that carries
    adapters, a weight that NF4 cannot hold (named), and a model or an exclusion that leaves nothing to do.
    """
    if scheme not in SCHEMES:
        raise LoRAError(
            f"quantize: there is no scheme {scheme!r}, expected one of {', '.join(map(repr, SCHEMES))}."
            f"{did_you_mean(str(scheme), SCHEMES)}"
        )
    check_block_size(block_size)
    _refuse_adapters(model)
    targets = _targets(model, exclude_modules)
    for linear, paths in targets.items():
        check_quantisable(linear.weight, f"{paths[0]}.weight")
    with meter("quantising", sum(linear.weight.nbytes for linear in targets)) as done:
        for linear, paths in targets.items():
            size = linear.weight.nbytes
            quantised = NF4Linear.from_linear(
                linear, double_quant=double_quant, block_size=block_size, name=f"{paths[0]}.weight"
            )
            for path in paths:
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, quantised)
            done(size)
    attach(model)  # its save_pretrained is to say what is 4 bits wide
    return model


def _targets(model: nn.Module, exclude_modules: str | Sequence[str] | None) -> dict[nn.Linear, list[str]]:
    """The layers to replace, each with all its paths."""
    linears: dict[nn.Linear, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            linears.setdefault(module, []).append(path)
    _check_exclusion(exclude_modules, [path for paths in linears.values() for path in paths])
    heads = output_heads(model)
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    targets = {
        linear: paths
        for linear, paths in linears.items()
        if not any(linear is head for head in heads)
        and "" not in paths  # the model itself: it has no parent to hold a replacement
        and "forward" not in vars(linear)
        and owners[id(linear.weight)] == 1
        and not any(matches(exclude_modules, path) for path in paths)
    }
    if not targets:
        done = sum(isinstance(module, NF4Linear) for module in model.modules())
        raise LoRAError(
            f"quantize found nothing to replace in this {type(model).__name__}: {done} layers are NF4 already; each "
            f"of its {len(linears)} nn.Linear is the output head, tied, excluded, patched or the model itself. "
            "NF4Linear.from_linear quantises a single layer."
        )
    return targets


def _check_exclusion(exclude_modules: str | Sequence[str] | None, paths: list[str]) -> None:
    """Raises LoRAError for an entry that matches no linear layer: a typing error would quantise what was to stay."""
    entries = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
    for entry in entries:
        names = entry if isinstance(exclude_modules, str) else [entry]
        if not any(matches(names, path) for path in paths):
            ends = {path.rpartition(".")[2] for path in paths}
            raise LoRAError(f"exclude_modules: {entry!r} matches no nn.Linear.{did_you_mean(str(entry), ends)}")


def _refuse_adapters(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            raise LoRAError(
                f"quantize comes before inject, but {path} carries an adapter: call lora.eject(model) first, then "
                "lora.quantize, then lora.inject."
            )
