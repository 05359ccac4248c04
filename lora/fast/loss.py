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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora.fast import library
from lora.fast.dropout import KeepRows, dropout_mask
from lora.fast.linear import backward_group, forward_group
from lora.fast.operands import as_autocast, as_rows, factors_of
from lora.fast.parts import Part, flat_part, packed, unpacked
from lora.fast.products import by_onednn
from lora.fast.runtime import FusedFunction, kind_of, rehearsing, runs_triton
from lora.projection import Dropout, Projection
from lora.reference.dropout import keep_scale
from lora.reference.loss import Reduction, as_projection, check_options, read_labels

CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 28}  # of logits at a time: 128 tokens of a 49k vocabulary, 1024 of 128k
TILE_ROWS = 128  # of a product's tile on a GPU


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
    tokens·features numbers, and those of the head's trainable tensors. With reduction="none" hidden and labels
    instead, and the head's tensors by reference.
    """
    hidden, heads = as_autocast(hidden, [as_projection(head)])
    static, tensors = unpacked(heads)
    count = None if num_items is None else torch.as_tensor(num_items, dtype=torch.float64)
    settings = Settings(reduction, ignore_index, softcap, logit_scale, label_smoothing)
    return LinearCrossEntropy.apply(  # type: ignore[no-untyped-call, no-any-return]
        hidden, labels, count, settings, static, dropout, *tensors
    )


class Settings(NamedTuple):
    """What the loss depends on, besides tensors."""

    reduction: Reduction
    ignore_index: int
    softcap: float | None
    logit_scale: float
    label_smoothing: float


class Results(NamedTuple):
    """What the chunks leave: the losses, and the gradients that were wanted."""

    losses: Tensor  # [counted]; from `loss_and_gradients` a scalar, or [...] for reduction="none"
    dx: Tensor | None  # [counted, features]; from `loss_and_gradients` that of hidden, [..., features]
    tensors: list[Tensor | None]  # of weight, bias, lora_A, lora_B, magnitude


class LinearCrossEntropy(FusedFunction):
    """The loss, with its gradients made in the forward unless each token's own is known only in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        num_items: Tensor | None,
        settings: Settings,
        static: Any,
        dropout: Dropout | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]]
        ctx.settings, ctx.static, ctx.dropout, ctx.needs = settings, static, dropout, needs
        if settings.reduction == "none":
            done = in_one_step(hidden, labels, num_items, None, settings, static, dropout, [False] * 6, tensors)
            ctx.save_for_backward(hidden, labels, num_items, *tensors)
        else:
            done = in_one_step(hidden, labels, num_items, None, settings, static, dropout, needs, tensors)
            ctx.save_for_backward(done.dx, *done.tensors)
        return done.losses

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        if ctx.settings.reduction == "none":
            hidden, labels, num_items, *tensors = ctx.saved_tensors
            _, dx, gradients = in_one_step(
                hidden, labels, num_items, dloss, ctx.settings, ctx.static, ctx.dropout, ctx.needs, tensors
            )
        else:
            dx, *gradients = (None if g is None else g * dloss.to(g.dtype) for g in ctx.saved_tensors)
        return dx, None, None, None, None, None, *gradients


def in_one_step(
    hidden: Tensor,
    labels: Tensor,
    num_items: Tensor | None,
    dlosses: Tensor | None,
    settings: Settings,
    static: Any,
    dropout: Dropout | None,
    needs: Sequence[bool],
    tensors: Sequence[Tensor | None],
) -> Results:
    """`loss_and_gradients`; in a graph it is one node, because labels are checked and counted there."""
    if not torch.compiler.is_compiling():
        (part,) = packed(static, tensors)
        return loss_and_gradients(hidden, part, labels, num_items, dlosses, settings, dropout, needs)
    drop = Dropout(0.0, 0) if dropout is None else dropout
    losses, *gradients = library.linear_cross_entropy(
        hidden, labels, num_items, dlosses, *flat_part(static[0], tensors), settings.reduction, settings.ignore_index,
        settings.softcap, settings.logit_scale, settings.label_smoothing, *drop, list(needs),
    )  # fmt: skip
    dx, *each = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return Results(losses, dx, each)


def loss_and_gradients(
    hidden: Tensor,
    part: Part,
    labels: Tensor,
    num_items: Tensor | None,
    dlosses: Tensor | None,
    settings: Settings,
    dropout: Dropout | None,
    needs: Sequence[bool],
) -> Results:
    """The loss of a batch, and those gradients of (hidden, weight, bias, lora_A, lora_B, magnitude) that `needs` names.

    Args:
        dlosses: [...], the gradient with respect to each token's loss; None where that is the reduction's.
    """
    reduction, ignore_index, softcap, _, smoothing = settings
    check_options(reduction, num_items, softcap, smoothing)
    targets = read_labels(labels, hidden, part.out_features, ignore_index, reduction, num_items)
    rows = as_rows(hidden)
    counted = targets.counted.nonzero().flatten()
    everything = len(counted) == len(rows)
    chosen = rows if everything else rows.index_select(0, counted)  # [counted, features]
    weight = targets.weight if dlosses is None else dlosses.flatten()[counted]
    mask = kept_rows(hidden.shape, dropout, counted)
    losses, dx, tensors = run_chunks(chosen, part, targets.labels[counted], settings, mask, needs, weight)
    if dx is not None:
        dx = dx if everything else torch.zeros_like(rows).index_copy_(0, counted, dx)
        dx = dx.view(hidden.shape)
    if reduction == "none":
        return Results(losses.new_zeros(len(rows)).index_copy_(0, counted, losses).view(labels.shape), dx, tensors)
    return Results(losses.sum(), dx, tensors)


def run_chunks(
    rows: Tensor,
    part: Part,
    labels: Tensor,
    settings: Settings,
    mask: KeepRows | None,
    needs: Sequence[bool],
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
    step = chunk_rows(part.out_features * rows.itemsize, kind_of(rows))
    factors = factors_of([part], rows.dtype)
    # every chunk's logits, then their gradients; oneDNN makes each chunk's anew
    space = None if by_onednn(rows) else rows.new_empty(min(step, len(rows)), part.out_features)
    for start in range(0, max(len(rows), 1), step):  # one chunk of no rows: gradients are zero then, not absent
        chunk = slice(start, start + step)
        x = rows[chunk]
        kept_chunk = None if mask is None else mask._replace(keep=mask.keep[chunk])
        out = None if space is None else space[: len(x)]
        (logits,), kept = forward_group(x, [part], kept_chunk, [needs[5]], out=out, factors=factors)
        scale = weight[chunk] if isinstance(weight, Tensor) else weight
        losses[chunk] = row_losses_(logits, labels[chunk], settings, scale, wants)
        if not wants:
            del logits  # before the next chunk's are made
            continue
        dx_chunk, (gradients,) = backward_group([logits], x, [part], kept, kept_chunk, needs[0], [needs[1:]])
        if dx is not None and dx_chunk is not None:
            dx[chunk] = dx_chunk
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                totals[i] = gradient if totals[i] is None else totals[i].add_(gradient)  # type: ignore[union-attr]
        del logits, kept, dx_chunk, gradients
    return Results(losses, dx, totals)


def chunk_rows(row_bytes: int, kind: str) -> int:
    """How many tokens' logits are made at a time: whole tiles of a matrix product, where there are several."""
    rows = max(1, CHUNK_BYTES.get(kind, CHUNK_BYTES["cuda"]) // row_bytes)
    return rows // TILE_ROWS * TILE_ROWS or rows


def kept_rows(shape: torch.Size, dropout: Dropout | None, counted: Tensor) -> KeepRows | None:
    """The rows of the mask that belong to the tokens that count: bits are counted over the whole batch."""
    if dropout is None or dropout.p == 0:
        return None
    keep = dropout_mask(shape, dropout.p, dropout.seed, stream=dropout.stream, device=counted.device)
    return KeepRows(keep.view(-1, shape[-1]).index_select(0, counted), keep_scale(dropout.p))


def row_losses_(logits: Tensor, labels: Tensor, settings: Settings, weight: float | Tensor, wants: bool) -> Tensor:
    """The loss of each row, times `weight` where that is a number; `logits` become their own gradients if wanted."""
    if runs_triton(logits):
        if rehearsing():  # what the kernel makes
            return logits.new_empty(len(logits), dtype=torch.float32)
        from lora.fast.kernels import cross_entropy as kernels

        return kernels.cross_entropy_(
            logits, labels, settings.softcap, settings.logit_scale, settings.label_smoothing, weight, wants
        )
    _, _, softcap, logit_scale, smoothing = settings
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
