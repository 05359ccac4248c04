"""Activation checkpointing for the fast backend: `lora.reference.checkpoint`'s way, with three things it does not have.

**The last product is not run again.** A block ends in `x + down_proj(h)`. When the block is run a second time, only
what its operations save is wanted, and after `down_proj` nothing is saved: its product, a fifth of the block's
arithmetic, would be thrown away. Fused operations report themselves to the run they are part of (`Operations`); if the
last of them was followed by no saved tensor in the first run, it leaves its product out of the second. In Gemma 2,
Gemma 3 and OLMo 2 a norm saves what `down_proj` gives: there `selective` keeps it, as it keeps attention's, and the
other modes run it again. With DoRA, whose gain needs the product too, every mode does.

**Attention announces itself.** `selective` watches the calls of fused attentions alone, not every operation.

**Offloading overlaps.** On a GPU a block's input is copied to pinned host memory on a stream of its own while the block
computes, and fetched back while the block after it is still in its backward: two buffers' worth of inputs are on the
device at any time. Host memory that cannot be pinned is used as it is, with one warning.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lora.reference.checkpoint import Inputs, KeepAttention, ReplayAttention, Run, Traffic, run_checkpointed


def checkpoint(
    function: Callable[..., Any], /, *args: Any, offload: bool | Traffic = False, selective: bool = False, **kwargs: Any
) -> Any:
    """function(*args, **kwargs), keeping only its arguments until the backward; as `lora.reference.checkpoint`.

    FLOPs: one more forward, less the last product (but for what the top of this file says), and less attention with
    `selective`. Saved for backward: the tensor arguments, in pinned host memory with `offload`; with `selective`
    attention's outputs too, and the last product where something after it is saved.
    """
    return run_checkpointed(FastRun, function, args, kwargs, offload, selective)


class FastRun(Run):
    """A checkpointed call that knows which of its fused operations comes last."""

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        offload: bool | Traffic,
        selective: bool,
    ) -> None:
        super().__init__(function, args, kwargs, offload, selective)
        self.operations = Operations(self.saved, keeps=selective)
        self.announced = self.attention is not None and announces_attention(function, args)
        self.replay: ReplayAttention | None = None  # second run, where attention is announced

    def inputs_of(self, args: tuple[Any, ...], kwargs: dict[str, Any], offload: bool | Traffic) -> Inputs:
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in args)
        return HostInputs(args, kwargs, offload) if offload and on_gpu else Inputs(args, kwargs, offload)

    def keep_attention(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.announced else super().keep_attention()

    def replay_attention(self) -> AbstractContextManager[Any]:
        if not self.announced or self.attention is None:
            return super().replay_attention()
        self.replay = ReplayAttention(self.attention)
        return nullcontext()

    def around_attention(self) -> AbstractContextManager[Any]:
        """What an announced attention runs in."""
        if not self.announced or self.attention is None:
            return nullcontext()
        return KeepAttention(self.attention) if self.operations.position is None else self.replay or nullcontext()

    def surroundings(self) -> list[Any]:
        return [*super().surroundings(), reporting(self.operations, self, again=True)]

    def first_surroundings(self) -> list[Any]:
        return [*super().first_surroundings(), reporting(self.operations, self)]


Product = Sequence[Tensor]  # the outputs of a group, [..., out_i] each


class Operations:
    """What the fused operations of a block report: in a first run which is last and what it made, later their place.

    Args:
        saved: what the first run saves; it grows as that runs.
        keeps: whether to keep the last product, if it turns out that the block saves something after it.
    """

    def __init__(self, saved: Sized, keeps: bool) -> None:
        self.saved, self.keeps = saved, keeps
        self.count = 0  # first run: how many there are
        self.before = 0  # first run: tensors saved up to the end of the last one
        self.last: Product | None = None  # first run: what the last one made
        self.versions: list[int] = []  # of these when they were made
        self.position: int | None = None  # second run: how many have begun

    def begins(self) -> bool | Product:
        """Whether the product of the operation that begins now is wanted; or that product, a copy."""
        if self.position is None:
            self.count, self.last = self.count + 1, None
            return True
        self.position += 1
        if self.position < self.count:
            return True
        if not self.is_read():
            return False
        if self.last is None or [y._version for y in self.last] != self.versions:
            return True
        return [y.clone() for y in self.last]

    def ends(self, product: Product, keepable: bool) -> None:
        """An operation has made and saved what it makes and saves.

        Its product is kept without a copy, if it has a gradient; one that is changed in place afterwards is made again
        after all.
        """
        if self.position is None:
            self.before = len(self.saved)
            if self.keeps and keepable and all(y.requires_grad for y in product):
                self.last = [y.detach() for y in product]
                self.versions = [y._version for y in product]

    def is_read(self) -> bool:
        """Whether the first run saved anything after its last operation."""
        return self.before < len(self.saved)

    def close(self) -> None:
        """The first run is over: a product that nothing reads is let go."""
        if not self.is_read():
            self.last = None

    def bytes_kept(self) -> int:
        """What the last product takes, once the first run is over."""
        return 0 if self.last is None else sum(y.nbytes for y in self.last)


_running = threading.local()  # autograd runs a second time on threads of its own


def product_is_wanted() -> bool | Product:
    """Asked by a fused operation before its last product: False where only what it saves will be used.

    Returns: or that product, where it was kept.
    """
    operations: Operations | None = getattr(_running, "operations", None)
    return True if operations is None else operations.begins()


def product_was_made(product: Product, keepable: bool) -> None:
    """Told after a fused operation that asked: its outputs, and whether all that its product makes are these."""
    operations: Operations | None = getattr(_running, "operations", None)
    if operations is not None:
        operations.ends(product, keepable)


def attention_begins() -> AbstractContextManager[Any]:
    """Announces a fused attention: what it is to run in, now."""
    run: FastRun | None = getattr(_running, "run", None)
    return nullcontext() if run is None else run.around_attention()


def announces_attention(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a checkpointed block is one whose attention announces itself (`lora.fast.patch`).

    Then only that call is watched. Watching every operation of the block, as the reference does, costs the host more
    than the GPU saves.
    """
    called = getattr(function, "func", function)  # transformers hands over a partial of the block's forward
    owners = (getattr(called, "__self__", None), *getattr(function, "args", ()), *args)
    attentions = (getattr(owner, "self_attn", None) for owner in owners)
    return any("announces_attention" in getattr(attention, "fused_options", ()) for attention in attentions)


@contextmanager
def reporting(operations: Operations, run: FastRun | None = None, *, again: bool = False) -> Iterator[None]:
    """Fused operations report to `operations`, and attentions to the run, if there is one, while this is open."""
    before = getattr(_running, "operations", None), getattr(_running, "run", None)
    _running.operations, _running.run, operations.position = operations, run, 0 if again else None
    try:
        yield
    finally:
        _running.operations, _running.run = before
    if not again:
        operations.close()


# ---- offloading


class HostInputs(Inputs):
    """Arguments that wait in host memory, copied out and fetched back on a stream of their own.

    Fetches run ahead by one: when a block asks for its input, the input of the block before it (the next one the
    backward will want) starts on its way too.
    """

    latest: Callable[[], HostInputs | None] = staticmethod(lambda: None)  # the block whose forward came last, if alive

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], offload: bool | Traffic) -> None:
        self.previous, HostInputs.latest = HostInputs.latest, weakref.ref(self)
        self.fetched: dict[int, Tensor] = {}
        super().__init__(args, kwargs, offload)

    def away(self, x: Tensor) -> Tensor:
        """A copy in pinned host memory, under way."""
        if not x.is_cuda:
            return x
        host = pinned_like(x)
        stream = side_stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            host.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory must not be reused before the copy has read it
        return host

    def fetch(self) -> None:
        """Starts the way back of every tensor that is not under way yet."""
        for number, (x, home) in enumerate(zip(self.keeper.grad_fn.saved_tensors, self.homes, strict=True)):
            if number in self.fetched or x.device == home:
                continue
            stream = side_stream(home)
            self.traffic.returns(x)
            with torch.cuda.stream(stream):
                self.fetched[number] = x.to(home, non_blocking=True)

    def back(self, number: int, x: Tensor, home: torch.device) -> Tensor:
        """The tensor on its device, ready to be read by the current stream."""
        if x.device == home:
            return x
        self.fetch()
        stream, arrived = torch.cuda.current_stream(home), self.fetched.pop(number)
        stream.wait_stream(side_stream(home))
        arrived.record_stream(stream)
        before = self.previous()
        if before is not None and not before.fetched:
            before.fetch()
        return arrived


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that copies run on, one a device."""
    return torch.cuda.Stream(device)


def pinned_like(x: Tensor) -> Tensor:
    """Host memory for x: pinned, so that copies overlap with computation, or else pageable."""
    try:
        return torch.empty_like(x, device="cpu", pin_memory=True)
    except RuntimeError as error:
        _say_pageable(str(error).splitlines()[0])
        return torch.empty_like(x, device="cpu")


@functools.cache
def _say_pageable(reason: str) -> None:
    warnings.warn(f"host memory for offloading cannot be pinned ({reason}): copies will not overlap.", stacklevel=6)
