"""A training step run for its shapes: on the meta device, where tensors have sizes and no numbers.

`lora.measure` counts what a step makes, keeps and frees. It does not care whether there are numbers in it, so that a
model that this machine could not hold is measured as a live one is. Four things need numbers, or a device:

    whole numbers   labels are checked and counted, positions are looked at: tensors of integers and truth values that
                    come from nothing but such tensors are computed as well, beside their shapes
    attention       on the meta device PyTorch would write it out, scores and all; here it is the fused operator that a
                    device runs
    kernels         the fast backend's operators give their fake results where a GPU is meant (`lora.fast.runtime`)
    experts         their grouped product has shapes that do not depend on the routing (`lora.experts`)

A step that looks at any other number (a mixture that goes through its experts one by one, say) cannot be run so.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from lora.errors import LoRAError
from lora.experts import GROUPED, grouped_result
from lora.fast.runtime import standing_for
from lora.fast.workspace import release_workspaces
from lora.measure import Measured, arithmetic_of, measure
from lora.reference.checkpoint import is_attention
from lora.train.loss import NextTokenLoss, head_of

COMPUTED = 1 << 23  # elements: larger integer tensors (a dropout mask's) are never looked at
UNFILLED = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided")
PADDING_WARNING = "warn_if_padding_and_no_attention_mask"
MASKED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class Rehearsal(NamedTuple):
    """What a step needs, by blocks, and the FLOPs of all its products and attentions, nothing run again."""

    measured: Measured
    products: int  # forward and backward, adapters and head included
    attention: int  # forward and backward; what lies behind a causal mask is left out


def rehearse(model: Any, batch: int, length: int, device: str) -> Rehearsal:
    """One training step of an injected model on the meta device, with the loss of `lora train`.

    Args:
        batch, length: sequences and their tokens, every one of which is learnt.
        device: "cpu" or "cuda", which is meant.

    Raises: LoRAError for a model whose step looks at its activations.
    """
    ids = torch.ones((batch, length), dtype=torch.long)
    next_token_loss = NextTokenLoss(model, fused=head_of(model) is not None)

    def loss(**inputs: Any) -> Tensor:
        return next_token_loss(inputs, inputs["labels"].numel())

    counted = WithoutNumbers(type(model).__name__)
    with standing_for(device), FusedAttention(), padding_unasked(model), counted:
        try:
            measured = measure(model, {"input_ids": ids, "labels": ids}, loss)
        finally:
            release_workspaces("meta")
    measured.device = device
    return Rehearsal(measured, counted.products // 2, counted.attention // 2)  # `measure` runs the step twice


@contextmanager
def padding_unasked(model: Any) -> Iterator[None]:
    """Without transformers' warning of padding that has no mask, which looks at tokens by an index that has no numbers.

    There is no padding in the step. Each module that asks is given a method of its own, and loses it again.
    """
    asking = [module for module in model.modules() if hasattr(type(module), PADDING_WARNING)]
    for module in asking:
        vars(module)[PADDING_WARNING] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for module in asking:
            vars(module).pop(PADDING_WARNING, None)


class FusedAttention(TorchFunctionMode):
    """scaled_dot_product_attention as one operator, where a device would run it so.

    The operator is the CPU's. It saves what FlashAttention saves on a GPU: q, k, v, the output, a float32 for each row.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        given = dict(zip(names, args, strict=False)) | kwargs
        query, key, value = (given[name] for name in names[:3])
        alike = query.dim() == 4 and query.shape[-1] == key.shape[-1] == value.shape[-1]
        if not query.is_meta or not alike or given.get("dropout_p"):
            return func(*args, **kwargs)
        mask = given.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, torch.full((), -torch.inf, dtype=query.dtype, device="meta"))
        causal, scale = bool(given.get("is_causal")), given.get("scale")
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)[0]


class WithoutNumbers(TorchDispatchMode):
    """Computes integers and truth values beside their shapes, and counts the arithmetic of everything else."""

    def __init__(self, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name = name  # the model's, for errors
        self.numbers: dict[int, Tensor] = {}  # address of a meta tensor's memory -> what it holds, one-dimensional
        self.products = self.attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name == "aten::_local_scalar_dense" and args[0].is_meta:
            return self.looked_at(args[0]).item()
        if name == "aten::_to_copy" and args[0].is_meta and (kwargs.get("device") or args[0].device).type != "meta":
            return func(self.looked_at(args[0]), **kwargs)  # tolist, say
        if name == "aten::nonzero" and args[0].is_meta:
            found = self.looked_at(args[0]).nonzero()
            result = found.to("meta")
            self.remember(result, found)
            return result
        if name in MASKED:
            args = (args[0], [at for index in args[1] for at in self.rows_of(index)], *args[2:])
        grouped = name == GROUPED and args[0].is_meta
        result = grouped_result(*args[:3]) if grouped else func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.count(func, args, kwargs, made)
        if name not in UNFILLED:
            self.follow(func, args, kwargs, made)
        return result

    def count(self, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
        """The operation's FLOPs; an attention's backward has twice its forward's."""
        flops = arithmetic_of(func, args, kwargs, made)
        if not is_attention(func, args, kwargs):
            self.products += flops
            return
        name = func._schema.name
        causal = name == "lora::causal_attention" or ("flash_attention" in name and len(args) > 4 and args[4])
        self.attention += 3 * (flops // 2 if causal else flops)

    def rows_of(self, index: Tensor | None) -> list[Tensor | None]:
        """A mask among the indices as the numbers of its rows: how many there are is a number."""
        if index is None or not index.is_meta or index.dtype != torch.bool:
            return [index]
        made: list[Tensor | None] = []
        for column in self.looked_at(index).nonzero().unbind(1):
            rows = column.to("meta")
            self.remember(rows, column)
            made.append(rows)
        return made

    def follow(self, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
        """Computes what an operation on whole numbers makes, if all that it was given is known."""
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        whole = all(not x.is_floating_point() and not x.is_complex() and x.numel() <= COMPUTED for x in made)
        if not made or not whole or not all(x.is_meta for x in made):
            return
        if all(x.untyped_storage()._cdata in self.numbers for x in made) and not func._schema.is_mutable:
            return  # a view: the numbers are there
        known = [self.known(x) if x.is_meta else x for x in given]
        if any(x is None or x.is_floating_point() for x in known):
            for x in made if func._schema.is_mutable else ():
                self.numbers.pop(x.untyped_storage()._cdata, None)
            return
        real = tree_map_only(Tensor, lambda x: self.known(x) if x.is_meta else x, (args, kwargs))
        real = tree_map(lambda x: torch.device("cpu") if x == torch.device("meta") else x, real)
        results = [x for x in tree_leaves(func(*real[0], **real[1])) if isinstance(x, Tensor)]
        for x, numbers in zip(made, results, strict=True):
            if x.untyped_storage()._cdata not in self.numbers:
                self.remember(x, numbers)

    def remember(self, x: Tensor, numbers: Tensor) -> None:
        """Notes what a meta tensor's memory holds, for it and its views, until that memory is freed."""
        storage = x.untyped_storage()
        key = storage._cdata
        memory = torch.zeros(storage.nbytes() // x.itemsize, dtype=x.dtype)
        memory.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(numbers)
        self.numbers[key] = memory
        weakref.finalize(storage, self.numbers.pop, key, None)

    def known(self, x: Tensor) -> Tensor | None:
        """What a meta tensor holds, or None."""
        memory = self.numbers.get(x.untyped_storage()._cdata)
        if memory is None or memory.dtype != x.dtype:
            return None
        return memory.as_strided(x.shape, x.stride(), x.storage_offset())

    def looked_at(self, x: Tensor) -> Tensor:
        """What a meta tensor holds, which the step looks at."""
        numbers = self.known(x)
        if numbers is None:
            raise LoRAError(
                f"a step of {self.name} looks at its activations and goes on by what it finds, so that it cannot be "
                "predicted without weights. Plan with the model itself: lora.plan_checkpointing(model, batch, budget)."
            )
        return numbers
