"""An injected model over several processes: sharded by FSDP2, and put together again to be saved.

    replicated   every process holds the model; gradients are summed: DistributedDataParallel, which needs nothing here
    sharded      every process holds 1/N of each tensor; a block's are gathered while it runs: `shard`, FSDP2 below it

Either way the gradient of a batch that is spread over processes is the gradient of the batch, if each one's loss is
divided by the labels of all of them (Σ over processes of Σ loss / N_all). Means of means are wrong where the number of
labels differs. DDP and FSDP2 average over processes, so each loss is multiplied by their number first: `share_of`.

NF4 weights shard as they are: uint8 parameters, rows of bytes that a mixed-precision policy cannot cast.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora.adapters import state_of, walk
from lora.errors import LoRAError
from lora.layers import base_of


def shard(model: nn.Module, mesh: Any = None, *, blocks: Sequence[nn.Module] | None = None, policy: Any = None) -> Any:
    """Shards an injected model over the processes of `mesh`, in place, with FSDP2's `fully_shard`.

    Each block is gathered before it runs, forward and backward, and freed after; the rest (embedding, last norm, head)
    is one more such unit. Trainable tensors start as process 0 has them. Call `lora.inject`, `lora.for_training` and
    this first, and make the optimizer from the sharded parameters.

    Args:
        mesh: a DeviceMesh of all processes; with two dimensions, whole copies along the first. Unless given, one.
        blocks: what is gathered at a time; the model's decoder blocks, unless given.
        policy: a MixedPrecisionPolicy. Frozen 4-bit weights keep their bytes under any.

    Returns: the same model. Raises: LoRAError where there is no process group, the model is sharded already or without
    values, its blocks are not known, or trainable tensors differ in dtype within a unit.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from lora.fast.inject import fuse, unfuse
    from lora.reference.modes import checkpointable_blocks

    state_of(model)
    units = list(checkpointable_blocks(model).values()) if blocks is None else list(blocks)
    _check_shardable(model, units)
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        _check_bytes_shard(mesh)
    was_fused = unfuse(model)  # weights laid side by side would be kept alive, whole
    same_start(model)
    for module in (*units, model):
        options = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy(), "reshard_after_forward": True}
        fully_shard(module, **options)
    sharded = cast(Any, model)
    if hasattr(sharded, "set_reduce_scatter_unused_params"):  # an expert may get no token on one process
        sharded.set_reduce_scatter_unused_params(True)
    return fuse(model) if was_fused else model


def _check_shardable(model: nn.Module, units: Sequence[nn.Module]) -> None:
    kind = type(model).__name__
    if not dist.is_initialized():
        raise LoRAError(
            f"shard: there is no process group to share this {kind} out to. Start with torchrun, and call "
            "torch.distributed.init_process_group() first."
        )
    refuse_sharded(model, "shard")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise LoRAError(f"shard: this {kind} is on the meta device, without values: load its weights first.")
    if not units:
        raise LoRAError(
            f"shard: this {kind} has no transformers GradientCheckpointingLayer, so its blocks are not known: give "
            "them as blocks=[...]."
        )
    inside = {id(parameter) for unit in units for parameter in unit.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    for parameters in (*(unit.parameters() for unit in units), rest):
        dtypes = {parameter.dtype for parameter in parameters if parameter.requires_grad}
        if len(dtypes) > 1:
            raise LoRAError(
                f"shard: trainable tensors of {' and '.join(sorted(map(str, dtypes)))} are in one block, expected one "
                "dtype: FSDP2 sums a block's gradients together. Inject all adapters in one dtype."
            )


def _check_bytes_shard(mesh: Any) -> None:
    """Whether this PyTorch's FSDP2 shards parameters that are no floating numbers: tried, as no version says so."""
    from torch.distributed.fsdp import fully_shard

    probe = nn.Module()
    probe.bytes = nn.Parameter(torch.zeros(2, 4, dtype=torch.uint8), requires_grad=False)
    try:
        fully_shard(probe, mesh=mesh)
    except RuntimeError as error:
        if "floating point" not in str(error):
            raise
        raise LoRAError(
            f"shard: FSDP2 of PyTorch {torch.__version__} cannot shard uint8 parameters, as NF4 weights are ({error}). "
            "Install torch 2.13, or leave the model whole: DistributedDataParallel, `lora train --sharding none`."
        ) from error


@torch.no_grad()
def same_start(model: nn.Module) -> None:
    """Gives every process the trainable tensors that process 0 has, and what PiSSA and OLoRA started from."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or ".initial_" in name:
            value = parameter.detach().contiguous()
            dist.broadcast(value, src=0)
            parameter.copy_(value)


def share_of(loss: Tensor) -> Tensor:
    """A process's part Σ loss / N_all of the loss, times their number: DDP and FSDP2 average the gradients."""
    return loss * dist.get_world_size() if dist.is_initialized() else loss


# ---- putting together


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is one of which every process holds a part."""
    return type(getattr(tensor, "data", tensor)).__name__ == "DTensor"


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one every process must ask, in the same order."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_sharded(tensor) else tensor


def whole_module(module: nn.Module) -> nn.Module:
    """A module with all of its own parameters: itself, or where it is sharded a shallow copy. Asked as `whole`."""
    own = module._parameters
    if not any(is_sharded(parameter) for parameter in own.values()):
        return module
    gathered = copy.copy(module)
    gathered._parameters = {
        name: parameter if parameter is None else nn.Parameter(whole(parameter.detach()), requires_grad=False)
        for name, parameter in own.items()
    }
    return gathered


def part_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Of a whole tensor the part that this process holds of `parameter`, which may be sharded or not."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    like = cast(Any, parameter)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def class_of(module: nn.Module) -> type[nn.Module]:
    """A module's class; below the one that FSDP2 makes of it, where it is sharded."""
    kinds = type(module).__mro__
    return kinds[2] if kinds[1].__name__ == "FSDPModule" else kinds[0]


def refuse_sharded(model: nn.Module, verb: str, instead: str = "do that before sharding it") -> None:
    """Raises LoRAError where a model is sharded and `verb` needs it whole."""
    sharded = (  # the base model's tensors tell, however many adapters there are
        f"{path}.{key}".strip(".")
        for path, module in walk(model)
        for key, parameter in base_of(module)._parameters.items()
        if parameter is not None and is_sharded(parameter)
    )
    name = next(sharded, None)
    if name is not None:
        raise LoRAError(
            f"{verb}: this {class_of(model).__name__} is sharded over processes ({name} is a DTensor), expected whole "
            f"tensors: {instead}."
        )


def writes(model: nn.Module) -> bool:
    """Whether this process writes what all have of a model: of a sharded one the first, of any other each its own."""
    return not any(map(is_sharded, model.parameters())) or dist.get_rank() == 0
