"""What DistributedDataParallel and FSDP2 need of a training step: one module whose forward is the loss.

Both act when a module is called: DDP prepares its sums of gradients, FSDP2 gathers weights. The loss goes past the
model's own forward (`lora.train.loss` takes the head from the weights), so it becomes a module's forward here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from lora.distributed import same_start, shard, share_of
from lora.experts import experts_of
from lora.train.loss import NextTokenLoss


class Step(nn.Module):
    """A process's part of the loss of a batch that is spread over processes; what is averaged is their gradient."""

    def __init__(self, loss: NextTokenLoss) -> None:
        super().__init__()
        self.model: nn.Module = loss.model
        self.loss = loss

    def forward(self, inputs: dict[str, Tensor], num_items: float) -> Tensor:
        """Σ loss / num_items, times the number of processes.

        Args:
            num_items: the labels that count, of all processes.
        """
        return share_of(self.loss(inputs, num_items))


class ShardedStep(Step):
    """The same of a model that `shard` has sharded; gradients are summed when the last batch of a step is done."""

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within the block, as DDP's, gradients are not summed over processes yet."""
        model = cast(Any, self.model)
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)


def replicated(loss: NextTokenLoss) -> nn.Module:
    """A step whose gradients DDP sums."""
    from torch.nn.parallel import DistributedDataParallel

    same_start(loss.model)
    some_unused = experts_of(loss.model.config) > 0  # an expert may get no token of this process
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.13
    options: dict[str, Any] = {"init_sync": False, buffers: False, "find_unused_parameters": some_unused}
    return DistributedDataParallel(Step(loss), **options)


def sharded(loss: NextTokenLoss) -> nn.Module:
    """A step of a model that is sharded here; its loss is computed between what FSDP2 does before and after a call."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    shard(loss.model)
    vars(loss.model)["next_token_loss"] = loss.of_batch
    register_fsdp_forward_method(loss.model, "next_token_loss")
    loss.through = loss.model.next_token_loss
    return ShardedStep(loss)
