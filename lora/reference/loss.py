"""The output head and its loss: logits over the vocabulary, softmax, cross-entropy.

    ℓ = lora_linear(hidden, head)                   logits of one token, [vocab]
    z = cap · tanh(scale · ℓ / cap)                 Gemma 2's soft cap; without one, z = scale · ℓ
    p = softmax(z)        loss = -Σ_c t_c log p_c                 with t the target distribution
                               = log Σ_c exp z_c - Σ_c t_c z_c

Without label smoothing t is one at the label. With smoothing ε (Szegedy et al. 2016, section 7) each of the V classes
also gets ε / V, and the label 1 - ε + ε / V. As t sums to one, the gradient of softmax and logarithm together is

    dz = p - t        dℓ = dz · scale · (1 - (z / cap)²)

and what remains is the backward of `lora_linear`. A token whose label is `ignore_index` has no loss and no gradient.

This file forms all the logits, tokens × vocab numbers, several times over: 0.5 GB each in float32 for 1,024 tokens of a
128k vocabulary. It is meant to be read. The fast backend never forms them.
"""

from __future__ import annotations

import functools
import warnings
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.errors import LoRAError, did_you_mean
from lora.projection import Dropout, Gradients, NF4Weight, Projection
from lora.reference.linear import flat, lora_linear, lora_linear_backward

REDUCTIONS = ("mean", "sum", "none")
Reduction = Literal["mean", "sum", "none"]


class Targets(NamedTuple):
    """The labels, checked: what each token's loss counts for."""

    labels: Tensor  # [tokens], with 0 where the label is ignored
    counted: Tensor  # [tokens], bool: the label is not ignored
    weight: float  # what a counted token's loss is multiplied by: 1 / count, 1 / num_items or 1


def linear_cross_entropy(
    hidden: Tensor,
    head: Projection | Tensor,
    labels: Tensor,
    *,
    dropout: Dropout | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The cross-entropy of the output head against the labels, differentiable by autograd.

    Nothing is shifted: hidden[t] is scored against labels[t]. For next-token prediction pass hidden[:, :-1] and
    labels[:, 1:].

    Args:
        hidden: [..., features].
        head: the head's projection, or just its weight [vocab, features]; its own LoRA, bias and NF4 are supported.
        labels: [...], int64, in [0, vocab) or `ignore_index`.
        dropout: of the head's adapter, as in `lora_linear`.
        reduction: "mean" over the labels that count, "sum", or "none".
        num_items: with "mean", divide the sum by this instead: the labels that count in the whole accumulated batch,
            over all ranks, so that gradients add up to those of one large batch.
        softcap: Gemma 2's bound on the logits, > 0. logit_scale: multiplies the logits before it (Cohere, Granite).
        label_smoothing: ε in [0, 1].

    Returns: a scalar, or [...] for "none" (0 where ignored), in float32 (float64 for float64). Where every label is
        ignored the loss is 0, with zero gradients, and a warning is given once in a process.
    Raises: LoRAError for a label outside the vocabulary, naming it and its position; for an option out of its range.
    FLOPs: 2·tokens·features·vocab and a dozen a logit. Saved for backward by autograd: hidden and several logits.
    """
    head = as_projection(head)
    check_options(reduction, num_items, softcap, label_smoothing)
    targets = read_labels(labels, hidden, head.weight.shape[0], ignore_index, reduction, num_items)
    z = capped_logits(flat(lora_linear(hidden, head, dropout=dropout)), softcap, logit_scale)  # [tokens, vocab]
    losses = torch.logsumexp(z, dim=-1) - expected_logit(z, targets.labels, label_smoothing)  # [tokens]
    losses = losses.masked_fill(~targets.counted, 0) * targets.weight
    return losses.view(labels.shape) if reduction == "none" else losses.sum()


def linear_cross_entropy_backward(
    dloss: Tensor,
    hidden: Tensor,
    head: Projection | Tensor,
    labels: Tensor,
    *,
    dropout: Dropout | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
) -> Gradients:
    """The gradients of `linear_cross_entropy`, written out; dx is the gradient of hidden.

    Args:
        dloss: the gradient with respect to the loss: a scalar, or [...] for "none".
        the others: as they were given to `linear_cross_entropy`.
    """
    head = as_projection(head)
    check_options(reduction, num_items, softcap, label_smoothing)
    targets = read_labels(labels, hidden, head.weight.shape[0], ignore_index, reduction, num_items)
    logits = lora_linear(hidden, head, dropout=dropout)  # [..., vocab]
    z = capped_logits(flat(logits), softcap, logit_scale)  # [tokens, vocab]
    vocab = z.shape[-1]
    t = F.one_hot(targets.labels, vocab).to(z.dtype) * (1 - label_smoothing) + label_smoothing / vocab
    dz = (torch.softmax(z, dim=-1) - t).masked_fill(~targets.counted[:, None], 0)
    dz = dz * (dloss.reshape(-1, 1) * targets.weight)
    if softcap is not None:
        dz = dz * (1 - (z / softcap) ** 2)
    dlogits = (dz * logit_scale).view(logits.shape).to(logits.dtype)
    return lora_linear_backward(dlogits, hidden, head, dropout=dropout)


def expected_logit(z: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Σ_c t_c z_c = (1 - ε) z_label + ε mean(z), [tokens]."""
    z_label = z.gather(1, labels[:, None]).squeeze(1)
    if not label_smoothing:  # 0 · mean(z) would be NaN where a logit is -inf
        return z_label
    return (1 - label_smoothing) * z_label + label_smoothing * z.mean(dim=-1)


def capped_logits(logits: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """z = cap · tanh(scale · ℓ / cap) in float32 (float64 for float64)."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def read_labels(
    labels: Tensor,
    hidden: Tensor,
    vocab: int,
    ignore_index: int,
    reduction: Reduction,
    num_items: float | Tensor | None,
) -> Targets:
    """The labels as class numbers, which of them count, and for how much; LoRAError for one that is no class."""
    if labels.shape != hidden.shape[:-1]:
        raise LoRAError(
            f"labels is {list(labels.shape)} beside hidden {list(hidden.shape)}, expected {list(hidden.shape[:-1])}: "
            f"one label a token (shift both before the call)."
        )
    counted = labels != ignore_index
    wrong = (counted & ((labels < 0) | (labels >= vocab))).nonzero()
    if len(wrong):
        position = tuple(wrong[0].tolist())
        raise LoRAError(
            f"Label {labels[position].item()} at position {position} is not a class, expected 0 to {vocab - 1} "
            f"or {ignore_index} to ignore the token: check that the tokenizer belongs to the model."
        )
    count = int(counted.sum())
    if count == 0:
        warn_nothing_counts(ignore_index)
    weight = 1.0
    if reduction == "mean":
        weight = 1 / (max(count, 1) if num_items is None else float(num_items))
    return Targets(labels.flatten().masked_fill(~counted.flatten(), 0), counted.flatten(), weight)


def as_projection(head: Projection | Tensor | NF4Weight) -> Projection:
    """A bare weight is a projection with nothing else."""
    return head if isinstance(head, Projection) else Projection(head)


def check_options(
    reduction: str, num_items: float | Tensor | None, softcap: float | None, label_smoothing: float
) -> None:
    """Every option lies in its range; otherwise LoRAError."""
    if reduction not in REDUCTIONS:
        raise LoRAError(
            f"The loss's reduction is {reduction!r}, expected one of {', '.join(map(repr, REDUCTIONS))}."
            f"{did_you_mean(str(reduction), REDUCTIONS)}"
        )
    if num_items is not None and reduction != "mean":
        raise LoRAError(f"num_items is given with reduction={reduction!r}, expected 'mean': it replaces the count.")
    if num_items is not None and not num_items > 0:
        raise LoRAError(f"num_items is {float(num_items)}, expected > 0: count the labels that are not ignored.")
    if softcap is not None and not softcap > 0:
        raise LoRAError(f"softcap is {softcap}, expected a positive number, or None for no cap.")
    if not 0 <= label_smoothing <= 1:
        raise LoRAError(f"label_smoothing is {label_smoothing}, expected a number in [0, 1].")


@functools.cache
def warn_nothing_counts(ignore_index: int) -> None:
    """Once in a process: no label of a batch counts."""
    warnings.warn(
        f"Every label of a batch is {ignore_index} (ignored): its loss is 0 and it teaches nothing. Check how labels "
        f"are masked (a prompt longer than the maximum length leaves no answer). This is said once.",
        stacklevel=4,
    )
