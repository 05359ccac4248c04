"""The output head and its loss without the logits: equations and signature as in `lora.reference.loss`.

A chunk of tokens at a time: its logits are made, turned in place into their own gradient, multiplied back, and
overwritten by the next chunk's. So [tokens, vocab] never exists, the gradients are ready when the forward ends, and
the backward only multiplies them by the loss's own gradient. Tokens whose label is ignored take no part in any
product.

    for each chunk    ℓ = x_c Wᵀ (+ adapter)    loss_c, dℓ in place    dx_c = dℓ W (+ adapter)    dA, dB, dW, db +=

What is computed depends on what autograd will ask for: without gradients only the losses. `reduction="none"` has a
gradient of its own for each token, known only in the backward, so there the chunks run a second time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora.fast.dropout import KeepRows, dropout_mask
from lora.fast.linear import backward_group, forward_group
from lora.fast.operands import Part, as_autocast, as_rows, packed, unpacked
from lora.fast.runtime import FusedFunction, runs_triton
from lora.projection import Dropout, Projection
from lora.reference.dropout import keep_scale
from lora.reference.loss import Reduction, Targets, as_projection, check_options, read_labels

CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 28}  # of logits at a time: 170 tokens of a 49k vocabulary, or 523 of 128k


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
    """The head's cross-entropy; arguments, result and errors as in `lora.reference.loss.linear_cross_entropy`.

    FLOPs: 2·counted·features·vocab, and twice that again for gradients. Saved for backward: the gradient of hidden,
    tokens·features numbers, and those of the head's trainable tensors.
    """
    head = as_projection(head)
    check_options(reduction, num_items, softcap, label_smoothing)
    targets = read_labels(labels, hidden, head, ignore_index, reduction, num_items)
    hidden, heads = as_autocast(hidden, [head])
    static, tensors = unpacked(heads)
    options = Options(softcap, logit_scale, label_smoothing, reduction == "none")
    losses: Tensor = LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, targets, options, static, dropout, *tensors
    )
    return losses.view(labels.shape) if reduction == "none" else losses


class Options(NamedTuple):
    """What the row loss depends on, besides logits and labels."""

    softcap: float | None
    logit_scale: float
    label_smoothing: float
    each: bool  # reduction="none"


class Results(NamedTuple):
    """What the chunks leave: the losses, and the gradients that were wanted."""

    losses: Tensor  # [counted]
    dx: Tensor | None  # [counted, features]
    tensors: list[Tensor | None]  # of weight, bias, lora_A, lora_B, magnitude


class LinearCrossEntropy(FusedFunction):
    """Losses and gradients chunk by chunk; returns a scalar, or [tokens] for reduction="none"."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Targets,
        options: Options,
        static: Any,
        dropout: Dropout | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        rows, (part,) = as_rows(hidden), packed(static, tensors)
        counted = targets.counted.nonzero().flatten()
        chosen = rows if len(counted) == len(rows) else rows.index_select(0, counted)  # [counted, features]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
        now = needs if not options.each else [False] * len(needs)
        labels = targets.labels[counted]
        done = run_chunks(chosen, part, labels, options, kept_rows(hidden.shape, dropout, counted), now, targets.weight)
        ctx.static, ctx.options, ctx.dropout, ctx.shape, ctx.needs = static, options, dropout, hidden.shape, needs
        if options.each:
            ctx.save_for_backward(chosen, labels, counted, *tensors)
            return done.losses.new_zeros(len(rows)).index_copy_(0, counted, done.losses)
        ctx.save_for_backward(done.dx, *done.tensors, counted)
        return done.losses.sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        if ctx.options.each:
            chosen, labels, counted, *tensors = ctx.saved_tensors
            (part,) = packed(ctx.static, tensors)
            mask = kept_rows(ctx.shape, ctx.dropout, counted)
            _, dx, gradients = run_chunks(chosen, part, labels, ctx.options, mask, ctx.needs, dloss.flatten()[counted])
        else:
            dx, *gradients, counted = ctx.saved_tensors
            dx = None if dx is None else dx * dloss.to(dx.dtype)
            gradients = [None if g is None else g * dloss.to(g.dtype) for g in gradients]
        if dx is not None:
            tokens = ctx.shape.numel() // ctx.shape[-1] if ctx.shape[-1] else 0
            if len(counted) < tokens:
                dx = dx.new_zeros(tokens, dx.shape[1]).index_copy_(0, counted, dx)
            dx = dx.view(ctx.shape)
        return dx, None, None, None, None, *gradients


def run_chunks(
    rows: Tensor,
    part: Part,
    labels: Tensor,
    options: Options,
    mask: KeepRows | None,
    needs: list[bool],
    weight: float | Tensor,
) -> Results:
    """Losses [counted] and the wanted gradients, a chunk of rows at a time.

    Args:
        rows: [counted, features]. weight: of every token's loss, or [counted]: of each one's gradient.
    """
    wants = any(needs)
    losses = rows.new_empty(len(rows), dtype=torch.promote_types(rows.dtype, torch.float32))
    dx = torch.empty_like(rows) if needs[0] else None
    totals: list[Tensor | None] = [None] * 5
    step = max(1, CHUNK_BYTES.get(rows.device.type, 1 << 28) // (part.out_features * rows.itemsize))
    space = rows.new_empty(min(step, len(rows)), part.out_features)  # every chunk's logits, then their gradients
    for start in range(0, len(rows), step):
        chunk = slice(start, start + step)
        x = rows[chunk]
        kept_chunk = None if mask is None else mask._replace(keep=mask.keep[chunk])
        (logits,), kept = forward_group(x, [part], kept_chunk, [needs[5]], out=space[: len(x)])
        scale = weight[chunk] if isinstance(weight, Tensor) else weight
        losses[chunk] = row_losses_(logits, labels[chunk], options, scale, wants)
        if not wants:
            continue
        dx_chunk, (gradients,) = backward_group([logits], x, [part], kept, kept_chunk, needs[0], [needs[1:]])
        if dx is not None and dx_chunk is not None:
            dx[chunk] = dx_chunk
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                totals[i] = gradient if totals[i] is None else totals[i].add_(gradient)  # type: ignore[union-attr]
    return Results(losses, dx, totals)


def kept_rows(shape: torch.Size, dropout: Dropout | None, counted: Tensor) -> KeepRows | None:
    """The rows of the mask that belong to the tokens that count: bits are counted over the whole batch."""
    if dropout is None or dropout.p == 0:
        return None
    keep = dropout_mask(shape, dropout.p, dropout.seed, stream=dropout.stream, device=counted.device)
    return KeepRows(keep.view(-1, shape[-1]).index_select(0, counted), keep_scale(dropout.p))


def row_losses_(logits: Tensor, labels: Tensor, options: Options, weight: float | Tensor, wants: bool) -> Tensor:
    """The loss of each row, times `weight` where that is a number; `logits` become their own gradients if wanted."""
    if runs_triton(logits):
        from lora.fast.kernels import cross_entropy as kernels

        return kernels.cross_entropy_(
            logits, labels, options.softcap, options.logit_scale, options.label_smoothing, weight, wants
        )
    softcap, logit_scale, smoothing, _ = options
    z = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    if logit_scale != 1:
        z.mul_(logit_scale)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    vocab, row = z.shape[1], torch.arange(len(z), device=z.device)
    at_label = z[row, labels]  # [rows]
    mean = z.mean(1) if smoothing else 0.0
    top = z.amax(1)
    capped = z.clone() if wants and softcap is not None else None
    p = z.sub_(top[:, None]).exp_()
    total = p.sum(1)
    losses = total.log() + top - (1 - smoothing) * at_label - smoothing * mean
    if isinstance(weight, float):
        losses = losses * weight
    if wants:
        scale = torch.as_tensor(weight, dtype=z.dtype, device=z.device).expand(len(z))
        p.mul_((scale / total)[:, None])
        if smoothing:
            p.sub_((scale * (smoothing / vocab))[:, None])
        p[row, labels] -= scale * (1 - smoothing)
        if capped is not None and softcap is not None:
            p.mul_(1 - capped.div_(softcap).square_())
        if logit_scale != 1:
            p.mul_(logit_scale)
        if p is not logits:
            logits.copy_(p)
    return losses
