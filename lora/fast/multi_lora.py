"""Many adapters in one batch, grouped: equations and signature as in `lora.reference.multi_lora`.

The tokens are put in the order of their adapters, once a batch however many layers it goes through. Kernels then serve
all adapters in one launch (`lora.fast.kernels.multi_lora`); without them adapters that have as many tokens each go
through one batched product, others through products of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora.fast import library
from lora.fast.operands import as_autocast, as_rows, dense_of, shaped
from lora.fast.parts import Part, Static, flat_part, packed, unpacked
from lora.fast.products import product
from lora.fast.runtime import FusedFunction, runs_triton
from lora.projection import Projection
from lora.reference.multi_lora import check_base, check_named, check_stacked


def multi_lora_linear(
    x: Tensor, base: Projection, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, index: Tensor
) -> Tensor:
    """h_i = W x_i + b + s_j · B_j A_j x_i with j = index_i; as `lora.reference.multi_lora.multi_lora_linear`.

    FLOPs: 2·tokens·(in·out + r·(in + out)). Saved for backward: x and s·xAᵀ, tokens·(in + r) numbers.
    """
    check_base(base)
    x, bases = as_autocast(x, [base])
    static, tensors = unpacked(bases)
    if nothing_to_record(x):
        (part,) = packed(static, tensors)
        return grouped(x, part, lora_A, lora_B, scaling, index)[0]
    h: Tensor = MultiLoRA.apply(x, static[0], index, lora_A, lora_B, scaling, *tensors[:2])  # type: ignore[no-untyped-call]
    return h


def nothing_to_record(x: Tensor) -> bool:
    """Whether the operation can do without its autograd function, which costs as much as some products of one token."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type))


class MultiLoRA(FusedFunction):
    """Forward and backward; in a graph each is one node, because it looks at the adapters' numbers."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, static: Static, index: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor,
        weight: Tensor | None, bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        tensors = [weight, bias, None, None, None]
        if torch.compiler.is_compiling():
            h, su = library.multi_lora_forward(x, index, lora_A, lora_B, scaling, *flat_part(static, tensors))
        else:
            (part,) = packed([static], tensors)
            h, su, ctx.groups = grouped(x, part, lora_A, lora_B, scaling, index)
        ctx.save_for_backward(x, su, index, lora_A, lora_B, scaling, weight, bias)
        ctx.static = static
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, su, index, lora_A, lora_B, scaling, weight, bias = ctx.saved_tensors
        tensors, needs = [weight, bias, None, None, None], [ctx.needs_input_grad[i] for i in (0, 3, 4, 6, 7)]
        if torch.compiler.is_compiling():
            made = library.multi_lora_backward(
                dh, x, su, index, lora_A, lora_B, scaling, *flat_part(ctx.static, tensors), needs
            )
            dx, dA, dB, dweight, dbias = (each if need else None for each, need in zip(made, needs, strict=True))
        else:
            (part,) = packed([ctx.static], tensors)
            dx, dA, dB, dweight, dbias = backward_tokens(dh, x, su, part, lora_A, lora_B, scaling, ctx.groups, needs)
        return dx, None, None, dA, dB, None, dweight, dbias


def grouped(
    x: Tensor, part: Part, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Any]:
    """`forward_tokens`, of checked adapters, and the groups that the backward goes by."""
    check_stacked(x, part.shape, lora_A, lora_B, scaling, index)
    groups = groups_for(x, lora_A, index)
    return *forward_tokens(x, part, lora_A, lora_B, scaling, groups), groups


def forward_tokens(
    x: Tensor, part: Part, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, groups: Any
) -> tuple[Tensor, Tensor]:
    """h, [rows, ..., out], and s·xAᵀ of each token, [tokens, r]."""
    rows = as_rows(x)  # [tokens, in]
    h = product(rows, dense_of(part, x.dtype).T)
    if part.bias is not None:
        h.add_(part.bias.to(h.dtype))
    su = groups.shrink(rows, lora_A.to(x.dtype), scaling)  # [tokens, r]
    groups.expand_(h, su, lora_B.to(x.dtype))
    return shaped(h, x.shape[:-1]), su


def backward_tokens(
    dh: Tensor,
    x: Tensor,
    su: Tensor,
    part: Part,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    groups: Any,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, lora_A, lora_B, weight and bias; None where `needs` says so."""
    dy, rows = as_rows(dh), as_rows(x)
    wants_x, wants_A, wants_B, wants_weight, wants_bias = needs
    dx = dA = dB = None
    if wants_x or wants_A:
        du = groups.shrink(dy, lora_B.to(dy.dtype).transpose(1, 2), scaling)  # [tokens, r]
        dA = groups.sums(du, rows).to(lora_A.dtype) if wants_A else None
        if wants_x:
            dx = product(dy, dense_of(part, dy.dtype))
            groups.expand_(dx, du, lora_A.to(dy.dtype).transpose(1, 2))
            dx = dx.view(x.shape)
    if wants_B:
        dB = groups.sums(dy, su).to(lora_B.dtype)
    return dx, dA, dB, dy.T @ rows if wants_weight else None, dy.sum(0) if wants_bias else None


def groups_for(x: Tensor, lora_A: Tensor, index: Tensor) -> Any:
    """Which tokens are whose, for the implementation that serves x."""
    tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return groups_of(KernelGroups if runs_triton(x) else plain_groups, index, len(lora_A), tokens)


_latest: dict[Callable[..., Any], tuple[weakref.ref[Tensor], tuple[int, ...], Any]] = {}


def groups_of(kind: Callable[..., Any], index: Tensor, adapters: int, tokens: int) -> Any:
    """The groups of an index: those of the layer before where it is the same tensor, unchanged.

    Raises: LoRAError where a row names no adapter; looked up once too, since a GPU has to be waited for to see it.
    """
    if index.is_inference():  # these do not count their changes
        check_named(index, adapters)
        return kind(index, adapters, tokens)
    known, made_from, groups = _latest.get(kind, (lambda: None, (), None))
    facts = (index._version, adapters, tokens)
    if known() is not index or made_from != facts:
        check_named(index, adapters)
        groups = kind(index, adapters, tokens)
        _latest[kind] = (weakref.ref(index), facts, groups)
    return groups


class KernelGroups:
    """One launch for all adapters."""

    def __init__(self, index: Tensor, adapters: int, tokens: int) -> None:
        from lora.fast.kernels import multi_lora as kernels

        self.kernels, self.groups = kernels, kernels.group_tokens(index, adapters, tokens)

    def shrink(self, rows: Tensor, factors: Tensor, scaling: Tensor) -> Tensor:
        """u_i = s_j F_j x_i, zero for the base alone: [tokens, in], [adapters, r, in] → [tokens, r]."""
        return self.kernels.multi_lora_shrink(rows, factors, scaling, self.groups)

    def expand_(self, h: Tensor, u: Tensor, factors: Tensor) -> None:
        """h_i += F_j u_i in place: [tokens, out], [tokens, r], [adapters, out, r]."""
        self.kernels.multi_lora_expand_(h, u, factors, self.groups)

    def sums(self, left: Tensor, right: Tensor) -> Tensor:
        """Σ left_i right_iᵀ over each adapter's tokens, [adapters, m, n]; float32."""
        if left.shape[1] < right.shape[1]:
            return self.kernels.multi_lora_A_gradient(left, right, self.groups)
        return self.kernels.multi_lora_B_gradient(left, right, self.groups)


class SlicedGroups:
    """Each adapter's tokens are a slice of `order`, and go through products of their own."""

    def __init__(self, mine: dict[int, Tensor], adapters: int, tokens: int) -> None:
        self.adapters, self.mine = adapters, mine

    def shrink(self, rows: Tensor, factors: Tensor, scaling: Tensor) -> Tensor:
        """As `KernelGroups.shrink`."""
        u = rows.new_zeros(len(rows), factors.shape[1])
        for j, mine in self.mine.items():
            u[mine] = torch.mm(rows.index_select(0, mine), factors[j].T).mul_(scaling[j])
        return u

    def expand_(self, h: Tensor, u: Tensor, factors: Tensor) -> None:
        """As `KernelGroups.expand_`."""
        for j, mine in self.mine.items():
            h.index_add_(0, mine, torch.mm(u.index_select(0, mine), factors[j].T))

    def sums(self, left: Tensor, right: Tensor) -> Tensor:
        """As `KernelGroups.sums`, in the type of `left`."""
        total = left.new_zeros(self.adapters, left.shape[1], right.shape[1])
        for j, mine in self.mine.items():
            torch.mm(left.index_select(0, mine).T, right.index_select(0, mine), out=total[j])
        return total


class EqualGroups:
    """Adapters with as many tokens each, as when each row of a batch has its own: one batched product for all."""

    def __init__(self, mine: dict[int, Tensor], adapters: int, tokens: int) -> None:
        order = torch.cat([*mine.values()])
        in_order = torch.equal(order, torch.arange(tokens, device=order.device))
        self.adapters, self.count = adapters, len(mine)
        self.order = None if in_order else order  # None where nothing has to be copied
        self.present = None if len(mine) == adapters else torch.tensor([*mine], device=order.device)

    def shrink(self, rows: Tensor, factors: Tensor, scaling: Tensor) -> Tensor:
        """As `KernelGroups.shrink`."""
        x, F = self.by_adapter(rows), self.of_present(factors)  # [adapters, tokens, in], [adapters, r, in]
        su = torch.bmm(x, F.transpose(1, 2)).mul_(self.of_present(scaling).view(-1, 1, 1)).flatten(0, 1)
        return su if self.order is None else su.new_zeros(len(rows), su.shape[1]).index_copy_(0, self.order, su)

    def expand_(self, h: Tensor, u: Tensor, factors: Tensor) -> None:
        """As `KernelGroups.expand_`."""
        F = self.of_present(factors).transpose(1, 2)  # [adapters, r, out]
        if self.order is None:
            self.by_adapter(h).baddbmm_(self.by_adapter(u), F)
        else:
            h.index_add_(0, self.order, torch.bmm(self.by_adapter(u), F).flatten(0, 1))

    def sums(self, left: Tensor, right: Tensor) -> Tensor:
        """As `KernelGroups.sums`, in the type of `left`."""
        found = torch.bmm(self.by_adapter(left).transpose(1, 2), self.by_adapter(right))
        if self.present is None:
            return found
        return found.new_zeros(self.adapters, *found.shape[1:]).index_copy_(0, self.present, found)

    def by_adapter(self, rows: Tensor) -> Tensor:
        """[tokens, features] as [adapters that are there, tokens of each, features]."""
        sorted_rows = rows if self.order is None else rows.index_select(0, self.order)
        return sorted_rows.view(self.count, -1, rows.shape[1])

    def of_present(self, each: Tensor) -> Tensor:
        """What the adapters that are there have, of what all have."""
        return each if self.present is None else each.index_select(0, self.present)


def plain_groups(index: Tensor, adapters: int, tokens: int) -> SlicedGroups | EqualGroups:
    """The groups, for plain torch."""
    mine = slices_of(index, tokens)
    equal = len({len(tokens_of_one) for tokens_of_one in mine.values()}) == 1
    return (EqualGroups if equal else SlicedGroups)(mine, adapters, tokens)


def slices_of(index: Tensor, tokens: int) -> dict[int, Tensor]:
    """The tokens of each adapter that has any; -1, the base alone, is none."""
    of_token = index.repeat_interleave(tokens // len(index)) if len(index) else index
    order, counts = torch.argsort(of_token, stable=True), torch.bincount(of_token + 1).tolist()
    pieces = enumerate(order.split(counts), start=-1)
    return {adapter: piece for adapter, piece in pieces if adapter >= 0 and len(piece)}
