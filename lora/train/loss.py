"""Next-token cross-entropy of a causal language model, through `lora.ops.linear_cross_entropy`.

    loss = -Σ log p(label) / num_items        over the tokens whose label is not -100

The head is applied to those tokens only: prompts and padding cost nothing there, and logits of them are never formed.
TRL's own shortcut for this multiplies by `lm_head.weight`, which would leave out an adapter on the head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import dispatch
from lora.layers import AdapterLayer, SavedModule
from lora.nf4_layer import NF4Linear
from lora.projection import Dropout, Projection
from lora.train.data import IGNORED

LOGITS_AT_ONCE = 1 << 26  # 256 MB in float32: more are computed in pieces, and again in the backward
PROBE_TOKENS = 8
AGREEMENT = 1e-3  # relative; a head with another scale or soft cap is off by far more


class Head(NamedTuple):
    """What turns hidden states into logits."""

    projection: Projection
    dropout: Dropout | None
    softcap: float | None
    logit_scale: float


class NextTokenLoss:
    """The loss of a model's forward pass on a batch.

    `fused` tells whether the head's logits can be had from its weights. That is tried out once, on a few tokens,
    because some models do more between the hidden states and the logits than their config says; for those the
    model's own logits are used.
    """

    def __init__(self, model: Any, fused: bool | None = None) -> None:
        self.model = model
        self.through: Callable[[dict[str, Tensor], float], Tensor] = self.of_batch  # a sharded model has one of its own
        self.fused = self._agrees() if fused is None else fused  # given where there are no numbers to try it out with

    def __call__(self, inputs: dict[str, Tensor], num_items: float) -> Tensor:
        """As `of_batch`, also where the model is sharded."""
        return self.through(inputs, num_items)

    def of_batch(self, inputs: dict[str, Tensor], num_items: float) -> Tensor:
        """The summed loss of the batch divided by `num_items`; 0 with zero gradients where no label counts.

        Args:
            inputs: input_ids and labels, [sequences, tokens], and what else the model's forward takes.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]  # token t predicts token t + 1
        counted = labels != IGNORED
        divisor = max(float(num_items), 1.0)
        if not self.fused:
            logits = self.model(**inputs, use_cache=False).logits[:, :-1][counted]  # [counted, vocab]
            return F.cross_entropy(logits.float(), labels[counted], reduction="sum") / divisor
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        head = head_of(self.model)
        if head is None:
            raise TypeError("the head cannot be written as one projection")
        rows, targets = hidden[counted], labels[counted]  # [counted, features], [counted]
        at_once = max(1, LOGITS_AT_ONCE // head.projection.weight.shape[0])
        loss = functools.partial(_piece, head=head, divisor=divisor)
        if len(rows) <= at_once or dispatch.get_backend() != "reference":  # the fast loss forms no logits anyway
            return loss(rows, targets)
        pieces = zip(torch.split(rows, at_once), torch.split(targets, at_once), strict=True)
        losses = [dispatch.ops.checkpoint(loss, *piece) for piece in pieces]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether `head_of` gives the model's own logits."""
        head = head_of(self.model)
        if head is None or not isinstance(getattr(self.model, "base_model", None), nn.Module):
            return False
        training, vocab = self.model.training, head.projection.weight.shape[0]
        self.model.eval()
        ids = torch.arange(1, PROBE_TOKENS + 1, device=self.model.device)[None] % vocab
        try:
            expected = self.model(input_ids=ids, use_cache=False).logits.float()
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            self.model.train(training)
        logits = dispatch.ops.lora_linear(hidden, head.projection).float() * head.logit_scale
        found = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
        tolerance = max(AGREEMENT, 8 * torch.finfo(hidden.dtype).eps)
        return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def _piece(rows: Tensor, targets: Tensor, head: Head, divisor: float) -> Tensor:
    loss: Callable[..., Tensor] = dispatch.ops.linear_cross_entropy
    return loss(
        rows,
        head.projection,
        targets,
        dropout=head.dropout,
        num_items=divisor,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    )


def head_of(model: Any) -> Head | None:
    """The output head as a projection; None where it is no linear layer, or several terms make its output."""
    getter = getattr(model, "get_output_embeddings", None)
    module = getter() if callable(getter) else None
    if isinstance(module, SavedModule):
        module = module.current
    dropout = None
    if isinstance(module, AdapterLayer):
        updates = module.updates()
        if len(updates) > 1:
            return None
        projection, dropout = updates[0]
    elif isinstance(module, NF4Linear):
        projection = module.projection()
    elif isinstance(module, nn.Linear):
        projection = Projection(module.weight, module.bias)
    else:
        return None
    config = model.config.get_text_config()
    return Head(projection, dropout, getattr(config, "final_logit_softcapping", None), _logit_scale(config))


def _logit_scale(config: Any) -> float:
    """What a family multiplies its logits by: Cohere's logit_scale, or Granite's logits_scaling, which divides."""
    scale = getattr(config, "logit_scale", None)
    if scale is not None:
        return float(scale)
    divisor = getattr(config, "logits_scaling", None)
    return 1.0 if divisor is None else 1 / float(divisor)
