"""Merging: the update becomes part of the weight, and inference costs what the base model costs.

    W' = W + s · B A                               LoRA (Hu et al. 2021, section 4.1)
    W' = m ⊙ (W + s · B A) / ‖W + s · B A‖         DoRA (Liu et al. 2024, eq. 5)

W' is computed in float32 (float64 for float64) and rounded once. Subtracting the update again would not give W
back: in bfloat16 most weights would change. So the original parameter is kept, and `unmerge` puts it back.

The base layer gets a new parameter object. A weight that is tied to another module's (an output head to the
embedding, say) stays as it was there: merging unties, it never changes a module that was not adapted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora.adapters import exchange_weights, restore_weights, state_of
from lora.distributed import refuse_sharded
from lora.errors import LoRAError
from lora.layers import AdapterLayer, LoRAEmbedding, LoRAParameter, Merged, SavedModule, adapter_layers, is_conv1d
from lora.meter import meter
from lora.nf4_layer import NF4Linear
from lora.projection import Projection
from lora.reference.dora import dora_gain
from lora.reference.inject import eject
from lora.reference.linear import dense_weight
from lora.reference.nf4 import nf4_quantize


def merge_weight(projection: Projection) -> Tensor:
    """W' of one projection, in the weight's own dtype: [out_features, in_features].

    FLOPs: 2·out·in·r. Raises nothing: `merge` checks that the result is finite.
    """
    weight = projection.weight
    return merged_in_float(projection).to(weight.dtype)


def merged_in_float(projection: Projection) -> Tensor:
    """W' before its rounding, in float32, or float64 for a float64 weight."""
    weight, _, lora_A, lora_B, scaling, magnitude = projection
    wide = torch.promote_types(weight.dtype, torch.float32)
    dense = dense_weight(weight, wide).to(wide)  # [out, in]
    if lora_A is None or lora_B is None:
        return dense
    lora_A, lora_B = lora_A.detach().to(wide), lora_B.detach().to(wide)
    adapted = dense + scaling * (lora_B @ lora_A)
    if magnitude is None:
        return adapted
    return dora_gain(dense, lora_A, lora_B, scaling, magnitude.detach().to(wide))[:, None] * adapted


def merge(model: nn.Module, safe: bool = True, requantize: bool = False) -> dict[str, float]:
    """Merges the active adapters into the base weights; all layers, or on an error none.

    Args:
        safe: refuse a merged weight that is not finite.
        requantize: allow NF4 weights to be decoded, merged and quantised again, which loses precision.

    Returns: the relative Frobenius error of each merged weight against W + the update, by module path.
    Raises: LoRAError where something is merged already, nothing is active, NF4 is not allowed, or a weight overflows.
    """
    refuse_sharded(
        model, "merge", "save the adapter, and merge it into a model that is not: `lora merge --model … --adapter …`"
    )
    layers = [(path, layer) for path, layer in adapter_layers(model) if layer.merged or layer.groups()]
    for path, layer in layers:
        if layer.merged:
            raise LoRAError(f"{path} has {list(layer.merged.adapters)} merged already: call lora.unmerge(model) first.")
        if isinstance(layer.base_layer, NF4Linear) and not requantize:
            raise LoRAError(
                f"{path} is quantised to NF4, and merging would round the update to 4 bits: pass requantize=True to "
                "accept that (the error is returned), or merge into the 16-bit model the base was quantised from."
            )
    if not layers:
        raise LoRAError(f"no adapter is active in this {type(model).__name__}: call lora.set_adapter first.")
    state_of(model)
    try:
        errors = {}
        with meter("merging", len(layers), "modules") as done:
            for path, layer in layers:
                errors[path] = merge_layer(layer, path, safe)
                done()
        return errors
    except BaseException:
        unmerge(model)
        raise


@torch.no_grad()
def merge_layer(layer: AdapterLayer, path: str, safe: bool = True) -> float:
    """Merges one layer's active adapters; returns the relative error of the rounded weight."""
    table, base = isinstance(layer, LoRAEmbedding), layer.owner
    transposed = table or is_conv1d(base) or (isinstance(layer, LoRAParameter) and layer.transposed)
    groups = layer.groups()
    projections = [_as_matrix(layer.projection_of(group), table) for group in groups]
    exact = merged_in_float(projections[0])  # [out, in]
    for projection in projections[1:]:
        exact = exact + (merged_in_float(projection) - merged_in_float(Projection(projection.weight)))

    if isinstance(base, NF4Linear):
        old = base.quantised
        new = nf4_quantize(
            exact.to(old.dtype),
            block_size=old.block_size,
            double_quant=old.nested_absmax is not None,
            nested_block_size=old.nested_block_size,
            name=path,
        )
        stored = dense_weight(new, exact.dtype)
        replacement = dict(NF4Linear.from_quantised(new, None).named_parameters())
    else:
        stored = exact.to(base.get_parameter(layer.parameter).dtype)
        weight = stored.mT.contiguous() if transposed else stored  # some are stored [in_features, out_features]
        replacement = {layer.parameter: nn.Parameter(weight, requires_grad=False)}
    if safe and not bool(torch.isfinite(stored).all()):
        raise LoRAError(
            f"merging {list(layer.active)} into {path} gives {int((~torch.isfinite(stored)).sum())} weights that are "
            f"not finite in {stored.dtype}: nothing was merged. Check the adapter for NaN, or merge in float32."
        )
    layer.merged = Merged(sum(groups, ()), replacement, _relative(stored.to(exact.dtype) - exact, exact))
    exchange_weights(layer)  # the layer takes the replacement, `merged` keeps the original
    return layer.merged.error


def unmerge(model: nn.Module) -> nn.Module:
    """Puts the original weights back, bit for bit; a model that is not merged is left as it is."""
    restore_weights(model)
    return model


def merge_and_eject(model: nn.Module, safe: bool = True, requantize: bool = False) -> nn.Module:
    """Merges the active adapters for good and takes every adapter layer out.

    Modules trained in full (modules_to_save) and trained biases of the active adapters stay in; other adapters are
    dropped. Where merging untied the output head from the embedding, the model's config says so from then on.
    """
    state = state_of(model)
    if any(layer.groups() for _, layer in adapter_layers(model)):
        merge(model, safe=safe, requantize=requantize)
    for module in model.modules():
        if isinstance(module, AdapterLayer):
            module.merged = None  # nothing for eject to put back
        elif isinstance(module, SavedModule):
            module.base_layer = module.current
    if state.trained_biases_in_use:
        state.biases, state.trained_biases_in_use = {}, False
    eject(model)
    _note_untied(model)
    return model


def _as_matrix(projection: Projection, table: bool) -> Projection:
    """An embedding's table [vocab, dim] as the matrix [dim, vocab] that B A is added to."""
    if not table or not isinstance(projection.weight, Tensor):
        return projection
    return projection._replace(weight=projection.weight.T)


def _relative(difference: Tensor, exact: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(exact))
    return float(torch.linalg.vector_norm(difference)) / norm if norm else 0.0


def _note_untied(model: nn.Module) -> None:
    """Keeps a saved model from tying again, on load, what merging has made different."""
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return
    ends = [getattr(model, getter)() for getter in ("get_input_embeddings", "get_output_embeddings")]
    weights = [getattr(end, "weight", None) for end in ends]
    if weights[0] is not None and weights[1] is not None and weights[0] is not weights[1]:
        config.tie_word_embeddings = False
