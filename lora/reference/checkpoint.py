"""Activation checkpointing: keep a block's inputs, throw away what it saves, run it again when the backward asks.

A block's forward saves tensors for its backward, far more than its inputs and outputs. Checkpointing (Chen et al. 2016)
trades them for a second forward: of n equal blocks, n inputs and the activations of one block are in memory at a time.

Autograd offers two hooks for it: `pack` sees every tensor an operation wants to save and may return anything in its
place, `unpack` is given that back when the backward needs the tensor. So, for one call of one function:

    forward     pack(x)         count it, note its shape, return its number: x itself is dropped
    backward    unpack(number)  the first time, run the function again and collect what *that* run saves, in order;
                                then hand out number after number

Nothing is re-entrant: the second run's graph is never used, only the tensors it saved. The second run must be the first
one over again, so it gets the same inputs, random generator states and autocast state.

selective   the outputs of fused attention operations are kept (they are small beside what attention costs) and given
            out in the second run, which then does everything but attention again.
offload     the positional arguments wait in host memory in between; a `Traffic` counts the bytes.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from lora.errors import LoRAError

Function = TypeVar("Function", bound=Callable[..., Any])
ATTENTION = frozenset(
    f"aten::{name}"
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_flash_attention_forward",
        "_efficient_attention_forward",
    )
) | {"flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward", "lora::causal_attention"}


@dataclass
class Traffic:
    """What offloading has moved, in bytes; hand one to any number of checkpoints as their `offload`.

    Attributes:
        out: copied from the device to host memory, all in all. A tensor that is on the CPU already does not move.
        back: copied from host memory to the device; more than `out` where a graph has several backwards.
        waiting: in host memory now. A copy leaves this count when its memory is freed: after the backward that
            used it, or with its graph, whether that was dropped or an error ended its backward.
        peak: the most that ever waited.
        pageable: of `out`, what went to memory that is not pinned, from where copies do not overlap.
    """

    out: int = 0
    back: int = 0
    waiting: int = 0
    peak: int = 0
    pageable: int = 0

    def leaves(self, host: Tensor) -> None:
        """Counts a copy in host memory, from now until its memory is freed."""
        storage = host.untyped_storage()
        size = storage.nbytes()
        with _counting:
            self.out += size
            self.pageable += 0 if host.is_pinned() else size
            self.waiting += size
            self.peak = max(self.peak, self.waiting)
        weakref.finalize(storage, self.freed, size).atexit = False

    def returns(self, host: Tensor) -> None:
        """Counts a copy on its way back to the device."""
        with _counting:
            self.back += host.untyped_storage().nbytes()

    def freed(self, size: int) -> None:
        """Counts host memory that was given back."""
        with _counting:
            self.waiting -= size


_counting = threading.RLock()  # backwards of other devices run on other threads; of the module, as a lock has no copy


def checkpoint(
    function: Callable[..., Any], /, *args: Any, offload: bool | Traffic = False, selective: bool = False, **kwargs: Any
) -> Any:
    """function(*args, **kwargs), keeping only its arguments until the backward runs it again.

    Args:
        function: called once now and once for each backward; it must do the same both times. It may use parameters,
            autocast, torch's generators and other checkpoints. It must not run a backward of its own, and not be
            compiled by itself: in a compiled model checkpointed blocks stay outside of the graphs.
        args, kwargs: tensors, or tuples, lists and dicts of them, or anything else; they need not require grad.
        offload: tensors among `args` (not parameters, not in `kwargs`) wait in host memory and return to their device
            for the backward. On the CPU they are there already, and nothing is saved. A `Traffic` is a True that
            counts.
        selective: what `scaled_dot_product_attention`'s fused kernels (flash, memory-efficient, cuDNN, CPU) and
            flash-attn return is kept and not computed again. Attention spelled out as matrix products (eager, or
            SDPA's "math" fallback) has no such operation: all of it is computed again. So is attention with dropout,
            whose place in the random stream must be kept.

    Returns: what the function returns. Values and gradients are bit for bit those without a checkpoint.
    Raises: LoRAError in the backward when the second run does not save the same tensors as the first, or when a
        parameter or a saved tensor was changed in place in between.
    FLOPs: one more forward (less attention with `selective`). Saved for backward: the tensor arguments, 5 kB of
        generator state, with `selective` attention's outputs; all the function saves while its backward runs.
    """
    return run_checkpointed(Run, function, args, kwargs, offload, selective)


def outside_of_graphs(function: Function) -> Function:
    """The function, which torch.compile is not to make part of a graph, nor what it calls.

    As torch's own checkpoint does it; `torch.compiler.disable` would load the whole compiler when this file is read.
    """
    return torch._disable_dynamo(function)  # type: ignore[attr-defined, return-value]


@outside_of_graphs
def run_checkpointed(
    kind: type[Run],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    offload: bool | Traffic,
    selective: bool,
) -> Any:
    """The first run, under hooks that note what it saves.

    Never part of a graph, nor what it calls: a graph saves what it likes, and its second run need not save the same.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    run = kind(function, args, kwargs, offload, selective)
    with ExitStack() as stack:
        for each in run.first_surroundings():
            stack.enter_context(each)
        result = function(*args, **kwargs)
    run.finished = True
    return result


class Saved(NamedTuple):
    """What is noted of a tensor that the first run saved, to know it again in the second."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    parameter_version: int | None  # how often the parameter it belongs to was changed in place; None for others


class Run:
    """One checkpointed call: how to run it again, what its first run saved, and what the second run gave."""

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        offload: bool | Traffic,
        selective: bool,
    ) -> None:
        self.function = function
        self.inputs = self.inputs_of(args, kwargs, offload)
        self.generators = generator_states(self.inputs.devices)
        self.autocast = autocast_states(self.inputs.devices)
        self.attention: list[tuple[str, Any]] | None = [] if selective else None
        self.saved: list[Saved] = []  # in order: a tensor's number is its place here
        self.recomputed: dict[int, tuple[Tensor, int]] = {}  # number -> tensor, its version when it was saved
        self.finished = False

    def inputs_of(self, args: tuple[Any, ...], kwargs: dict[str, Any], offload: bool | Traffic) -> Inputs:
        """How the arguments are kept."""
        return Inputs(args, kwargs, offload)

    def first_surroundings(self) -> list[AbstractContextManager[Any]]:
        """What the first run runs in."""
        return [saved_tensors_hooks(self.pack, self.unpack), self.keep_attention()]

    def surroundings(self) -> list[AbstractContextManager[Any]]:
        """What the second run runs in: the first one's surroundings again."""
        states = (generators_at(self.generators), self.autocast_again())
        return [*states, torch.enable_grad(), self.replay_attention()]

    def pack(self, x: Tensor) -> int:
        """First run: note the tensor, and let it go."""
        self.saved.append(describe(x))
        return len(self.saved) - 1

    def unpack(self, number: int) -> Tensor:
        """Backward: the tensor with this number, from a second run if need be. A second backward causes another run."""
        if number not in self.recomputed:
            self.run_again()
        x, version = self.recomputed.pop(number)
        if x._version != version:
            raise LoRAError(
                f"A tensor {list(x.shape)} that a checkpointed function saved for the backward was changed in place by "
                f"the same function afterwards: use the out-of-place operation."
            )
        return x

    def run_again(self) -> None:
        """The second run, in the first one's surroundings; fills `recomputed` or raises."""
        if not self.finished:
            raise LoRAError(
                "A checkpointed function ran a backward of its own, which is not supported: take the gradient outside, "
                "or leave this function out of checkpointing."
            )
        self.recomputed.clear()
        numbers = itertools.count()

        def keep(x: Tensor) -> Tensor:
            number = next(numbers)
            self.check_same(number, x)
            self.recomputed[number] = (x.detach(), x._version)  # a detached tensor shares memory and version
            return x.detach()

        args, kwargs = self.inputs.restore()
        try:
            with ExitStack() as stack:
                for each in self.surroundings():
                    stack.enter_context(each)
                with saved_tensors_hooks(keep, lambda x: x):
                    self.function(*args, **kwargs)
            self.check_complete(next(numbers))
        except BaseException:
            self.recomputed.clear()
            raise

    def check_same(self, number: int, x: Tensor) -> None:
        """The second run saves, at this place, what the first one saved."""
        if number >= len(self.saved):
            raise LoRAError(f"Checkpoint: the second run saves more tensors than the first ({len(self.saved)}). {SAME}")
        first, second = self.saved[number], describe(x)
        if first[:3] != second[:3]:
            raise LoRAError(
                f"Checkpoint: tensor {number} saved for the backward is {list(first.shape)} {first.dtype} on "
                f"{first.device} in the first run, {list(second.shape)} {second.dtype} on {second.device} in the "
                f"second. {SAME}"
            )
        versions = (first.parameter_version, second.parameter_version)
        if None not in versions and versions[0] != versions[1]:
            raise LoRAError(
                f"Checkpoint: a parameter ({list(x.shape)} as used) was changed in place between the forward and the "
                f"backward. Step the optimizer after the last backward through a graph."
            )

    def check_complete(self, count: int) -> None:
        """The second run saves no fewer tensors than the first."""
        if count != len(self.saved):
            raise LoRAError(f"Checkpoint: the first run saved {len(self.saved)} tensors, the second {count}. {SAME}")

    def keep_attention(self) -> AbstractContextManager[Any]:
        """With `selective`, what the first run runs in."""
        return nullcontext() if self.attention is None else KeepAttention(self.attention)

    def replay_attention(self) -> AbstractContextManager[Any]:
        """With `selective`, what the second run runs in."""
        return nullcontext() if self.attention is None else ReplayAttention(self.attention)

    @contextmanager
    def autocast_again(self) -> Iterator[None]:
        """Autocast as it was in the first run."""
        with ExitStack() as stack:
            for device, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            yield


SAME = "The function must do the same when it is called again: no state of its own that changes, no unseeded choice."


class Inputs:
    """The arguments of a checkpointed call, its tensors in autograd's keeping.

    A tensor held here directly would escape a surrounding checkpoint's hooks and stay in memory. Saved by a node that
    autograd never runs, it is packed by them, and a change in place is noticed. Parameters stay in memory anyway.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], offload: bool | Traffic) -> None:
        self.leaves, self.structure = tree_flatten((args, kwargs))
        positional = len(tree_flatten(args)[0])
        self.devices = {leaf.device for leaf in self.leaves if isinstance(leaf, Tensor)}
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor) and not is_parameter(leaf)]
        self.requires_grad = [self.leaves[i].requires_grad for i in self.places]
        self.homes = [self.leaves[i].device for i in self.places]
        self.traffic = offload if isinstance(offload, Traffic) else Traffic()
        self.moved: set[int] = set()  # the numbers of those that really left
        kept = []
        for number, place in enumerate(self.places):
            x, self.leaves[place] = self.leaves[place].detach(), None
            kept.append(self.away(x) if offload and place < positional else x)
            if kept[number] is not x:
                self.moved.add(number)
                self.traffic.leaves(kept[number])
        anchor = torch.empty(0, requires_grad=True)
        self.keeper: Any = Keep.apply(anchor, *kept)  # type: ignore[no-untyped-call]

    def restore(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as they were, on their devices, cut from the graph."""
        leaves = list(self.leaves)
        kept = zip(self.places, self.keeper.grad_fn.saved_tensors, self.homes, self.requires_grad, strict=True)
        for number, (place, x, home, requires_grad) in enumerate(kept):
            leaves[place] = self.back(number, x, home).detach().requires_grad_(requires_grad)
        args, kwargs = tree_unflatten(leaves, self.structure)
        return args, kwargs

    def away(self, x: Tensor) -> Tensor:
        """The tensor in host memory: itself if it is there."""
        return x.to("cpu")

    def back(self, number: int, x: Tensor, home: torch.device) -> Tensor:
        """The tensor that was kept as number `number`, on the device it came from."""
        if number in self.moved:
            self.traffic.returns(x)
        return x.to(home)


class Keep(torch.autograd.Function):
    """Saves tensors for as long as its output, an empty tensor, lives. Its backward never runs."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        """Nothing, but with a node in the graph."""
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)


class KeepAttention(TorchDispatchMode):
    """First run with `selective`: copies of what attention operations return go to the list."""

    def __init__(self, kept: list[tuple[str, Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_attention(func, args, kwargs or {}):
            self.kept.append((func.name(), copied(result)))
        return result


class ReplayAttention(TorchDispatchMode):
    """Second run with `selective`: attention operations return what the first run's returned, in order."""

    def __init__(self, kept: list[tuple[str, Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = iter(kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_attention(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        name, result = next(self.kept, (None, None))
        if name != func.name():
            raise LoRAError(f"Checkpoint: the second run calls {func.name()} where the first called {name}. {SAME}")
        return copied(result)


def is_attention(func: Any, args: Any, kwargs: Any) -> bool:
    """A fused attention operation without dropout."""
    if func.name() not in ATTENTION:
        return False
    names = (argument.name for argument in func._schema.arguments)
    given = dict(zip(names, args, strict=False)) | kwargs
    return not given.get("dropout_p")


def copied(tree: Any) -> Any:
    """Copies: neither the function nor autograd may reach what is kept through what it was given."""
    return tree_map_only(Tensor, lambda x: x.detach().clone(), tree)


def is_parameter(x: Tensor) -> bool:
    """A module's own tensor, trainable or frozen."""
    return isinstance(x, nn.Parameter)


def describe(x: Tensor) -> Saved:
    """What to know a saved tensor by."""
    root = x if x._base is None else x._base  # a linear layer saves a transposed view of its weight
    return Saved(x.shape, x.dtype, x.device, root._version if is_parameter(root) else None)


def generator_states(devices: set[torch.device]) -> dict[torch.device, Tensor]:
    """The state of torch's CPU generator, and of those of the accelerators among `devices`."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    for device in devices:
        if device.type in ("cuda", "xpu"):
            states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


@contextmanager
def generators_at(states: dict[torch.device, Tensor]) -> Iterator[None]:
    """torch's generators at these states inside, at their own again afterwards."""
    before = generator_states(set(states))
    set_generators(states)
    try:
        yield
    finally:
        set_generators(before)


def set_generators(states: dict[torch.device, Tensor]) -> None:
    """Puts torch's generators at these states."""
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


def autocast_states(devices: set[torch.device]) -> list[tuple[str, torch.dtype, bool]]:
    """For the CPU and each device type: the autocast dtype, and whether autocast is on."""
    types = {"cpu"} | {device.type for device in devices if torch.amp.is_autocast_available(device.type)}
    return [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in sorted(types)]
