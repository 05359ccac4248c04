"""What a training step needs in memory, block by block: what `lora.planner` chooses from.

The model's forward runs, each block through the hook that checkpointing uses. A block runs forward and at once
backward, from a dy of ones, and is cut off from the next one, so that no more than one block is ever in memory: a model
that only fits with "recompute" can be measured. `Ledger` sees every tensor that an operation makes, and when its memory
is freed. All this happens twice, and the first time counts for nothing: kernels that try out their configurations take
memory that later steps do not, and scratch memory (`lora.fast.workspace`) is there from then on, a constant. Nothing of
the model is changed; no gradient is written.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lora import dispatch
from lora.adapters import state_of
from lora.errors import LoRAError
from lora.experts import GROUPED, grouped_arithmetic
from lora.fast.checkpoint import Operations, Product, reporting
from lora.fast.workspace import workspaces_on
from lora.layers import adapter_layers
from lora.reference import modes as reference_modes
from lora.reference.checkpoint import generator_states, generators_at, is_attention
from lora.reference.modes import checkpointable_blocks, hooked_modules

PRODUCTS = {  # which argument is the left factor
    "aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1, "mkldnn::_linear_pointwise": 0,
}  # fmt: skip
Sizes = dict[int, int]  # bytes of pieces of memory, each known by a number of its own


@dataclass
class Block:
    """What one block was measured to need, all its calls together; memory that others own too is not in the sums."""

    path: str
    inputs: Sizes = field(default_factory=dict)  # its positional arguments
    bound: Sizes = field(default_factory=dict)  # the keyword arguments, which every checkpoint holds
    saves: Sizes = field(default_factory=dict)
    present: Sizes = field(default_factory=dict)  # all there was when it began
    selective: int = 0  # what "selective" keeps beside the inputs: attention's outputs, and a last product that is read
    arithmetic: int = 0
    attention_arithmetic: int = 0
    spared: int = 0  # of its arithmetic, what "selective" does not do again and "recompute" does: that of what it keeps
    left_out: int = 0  # of its arithmetic, what no mode does again: the last product, where nothing reads it
    working: int = 0  # at most while it runs forward and then backward
    working_again: int = 0  # the same where the forward runs with the output's gradient waiting
    calls: int = 0
    input: int = 0  # the sums: filled in by `measure`
    saved: int = 0
    others: int = 0  # of `present`, what no plan decides about


@dataclass
class Measured:
    """A step in numbers, by the names at the top of `lora/planner.py`."""

    blocks: list[Block]
    outside: Sizes  # saved by what is not in a block
    constant: int
    before_blocks: int  # at most in memory before the first block runs
    loss_working: int
    device: str

    @property
    def interleaved(self) -> bool:
        """A block runs more than once, so that "the blocks before it" has no meaning."""
        return any(block.calls > 1 for block in self.blocks)

    def kept_by(self, modes: Sequence[str]) -> int:
        """Bytes between the forward and the backward of a plan, each piece of memory once."""
        kept, copies = dict(self.outside), 0
        for block, mode in zip(self.blocks, modes, strict=True):
            kept |= block.saves if mode == "none" else block.bound
            kept |= block.inputs if mode in ("recompute", "selective") else {}
            copies += block.selective if mode == "selective" else 0
        return sum(kept.values()) + copies


def measure(model: nn.Module, batch: Mapping[str, Any], loss: Callable[..., Tensor] | None) -> Measured:
    """One step of the model, block by block; see the top of this file."""
    device = _only_device(model)
    if not checkpointable_blocks(model):
        raise LoRAError(
            f"{type(model).__name__} has no transformers GradientCheckpointingLayer, so there is nothing to plan: call "
            "lora.ops.checkpoint yourself."
        )
    if not isinstance(batch, Mapping) or not any(isinstance(x, Tensor) for x in tree_leaves(dict(batch))):
        raise LoRAError(f"batch is a {type(batch).__name__}, expected the keyword arguments of a forward: input_ids, …")
    arguments = tree_map_only(Tensor, lambda x: x.to(device), dict(batch))
    with as_trained(model), generators_at(generator_states({device})), torch.enable_grad():
        owned = [*model.parameters(), *model.buffers(), *(x for x in tree_leaves(arguments) if isinstance(x, Tensor))]
        for _ in range(2):  # the first time, kernels try out their configurations and caches fill
            scratch = workspaces_on(device)  # which stay: the second time all of them are there
            step = Step(Ledger(device, [*owned, *scratch]))
            step.run(model, arguments, loss)
    if not step.blocks:
        raise LoRAError(f"the forward of {type(model).__name__} ran none of its blocks through the checkpointing hook.")
    trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return step.sums(trainable, sum(x.nbytes for x in scratch), device.type)


class CountedOperations(Operations):
    """A block's fused operations, and the arithmetic of the last one's product that a second run can leave out."""

    def __init__(self, saved: list[Tensor], ledger: Ledger) -> None:
        super().__init__(saved, keeps=True)
        self.ledger, self.product = ledger, 0

    def begins(self) -> bool | Product:
        self.ledger.products.clear()
        return super().begins()

    def ends(self, product: Product, keepable: bool) -> None:
        """x Wᵀ and what is added to it make results of the product's size; x Aᵀ is saved, and so is made again."""
        sizes = [y.numel() for y in product]
        made = sum(flops for size, flops in self.ledger.products if size in (*sizes, sum(sizes)))
        self.product = made if keepable else 0
        super().ends(product, keepable)


class Mark(NamedTuple):
    """What was in memory behind the block that ran last so far; it stays there, as a plan may keep it."""

    live: Sizes
    held: int
    outside: Sizes
    memory: list[Any]


class Ledger(TorchDispatchMode):
    """Notes the memory of every tensor that an operation makes until it is freed, and the arithmetic of products.

    Memory has a number: its address may serve another tensor later. The caller's own (parameters, the batch) is left
    out, as is what lies on another device.
    """

    def __init__(self, device: torch.device, owned: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.owned = {x.untyped_storage()._cdata for x in owned}
        self.known: dict[int, tuple[int, int, Any]] = {}  # address -> number, bytes, what waits for its end
        self.numbers = itertools.count()
        self.outside: Sizes = {}  # saved for the backward outside of blocks
        self.held = self.most = 0
        self.attention = self.arithmetic = self.attention_arithmetic = 0
        self.products: list[tuple[int, int]] = []  # the numbers of their results, and FLOPs, as they come
        self.block_has_ended = False
        self.mark = Mark({}, 0, {}, [])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.block_has_ended:  # only now have the block's callers let its arguments go
            self.block_has_ended, self.most = False, self.held
            self.mark.memory.clear()
            memory = [end.peek() for _, _, end in self.known.values()]
            self.mark = Mark(self.live(), self.held, dict(self.outside), memory)
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for x in made:
            self.note(x, {})
        flops = arithmetic_of(func, args, kwargs, made)
        self.arithmetic += flops
        if flops:
            self.products.append((made[0].numel(), flops))
        if is_attention(func, args, kwargs):
            self.attention_arithmetic += flops
            self.attention += sum(x.nbytes for x in made if x.device == self.device)
        return result

    def note(self, x: Tensor, where: Sizes) -> None:
        """Puts the tensor's memory, all of it where x is a view, into `where`."""
        if x.device != self.device or x.layout is not torch.strided:
            return
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.owned:
            return
        if key not in self.known:
            self.known[key] = (next(self.numbers), size, weakref.finalize(storage, self.freed, key))
            self.held += size
            self.most = max(self.most, self.held)
        number, size, _ = self.known[key]
        where[number] = size

    def freed(self, key: int) -> None:
        self.held -= self.known.pop(key)[1]

    def live(self) -> Sizes:
        """All there is now."""
        return {number: size for number, size, _ in self.known.values()}

    def close(self) -> None:
        """Forgets what is still in memory: caches, which live on."""
        self.mark.memory.clear()
        for _, _, end in list(self.known.values()):
            end.detach()


class Cut(torch.autograd.Function):
    """The same tensor with no past, so that a block's graph is freed when the block has returned."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        """X itself; `anchor` stands for all that came before it."""
        return x.data  # no view, so that the model may change it in place

    @staticmethod
    def backward(ctx: Any, *dx: Tensor) -> tuple[Tensor, None]:
        """Nothing to hand on."""
        return torch.zeros(0), None


def cut(x: Tensor, anchor: Tensor) -> Tensor:
    """The tensor without the graph behind it, still requiring grad if it did."""
    return Cut.apply(anchor, x.detach()) if x.requires_grad else x  # type: ignore[no-untyped-call]


class Step:
    """The measured step: the hook of every block, and what comes after the blocks."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.blocks: dict[str, Block] = {}
        self.anchor = torch.empty(0, requires_grad=True)
        self.before_blocks = 0

    def run(self, model: nn.Module, batch: dict[str, Any], loss: Callable[..., Tensor] | None) -> None:
        """Forward and backward, with the model's blocks measured one by one."""
        blocks = checkpointable_blocks(model)
        for path, block in blocks.items():
            vars(block)["gradient_checkpointing"] = True
            vars(block)["_gradient_checkpointing_func"] = functools.partial(self.block, path, block)
        inside = {p for block in blocks.values() for p in block.parameters()}
        outside = [p for p in model.parameters() if p.requires_grad and p not in inside]
        with saved_tensors_hooks(self.noting(self.ledger.outside), lambda x: x), self.ledger:
            value = loss(**batch) if loss is not None else _loss_of(model, batch)
            if value.requires_grad:
                torch.autograd.grad(value, [self.anchor, *outside], allow_unused=True)
        self.before_blocks += sum(p.nbytes for p in outside)  # the embedding's gradient, before it is added up
        self.ledger.close()

    def noting(self, where: Sizes) -> Callable[[Tensor], Tensor]:
        """A hook that notes what is saved for the backward."""

        def pack(x: Tensor) -> Tensor:
            self.ledger.note(x, where)
            return x

        return pack

    def block(self, path: str, module: nn.Module, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """What a block calls in place of a checkpoint."""
        ledger = self.ledger
        if not self.blocks:
            self.before_blocks = ledger.most
        block = self.blocks.setdefault(path, Block(path))
        block.calls += 1
        ledger.mark.memory.clear()
        block.present |= ledger.live()
        bound = [kwargs, getattr(function, "keywords", {})]  # transformers binds keyword arguments beforehand
        for tree, where in ((args, block.inputs), (bound, block.bound)):
            for x in tree_leaves(tree):
                if isinstance(x, Tensor):
                    ledger.note(x, where)
        wanted = [x for x in (*tree_leaves([args, bound]), *module.parameters()) if isinstance(x, Tensor)]
        result = self.forward_and_backward(block, functools.partial(function, *args, **kwargs), wanted)
        ledger.block_has_ended = True
        return result

    def forward_and_backward(self, block: Block, function: Callable[..., Any], wanted: Sequence[Any]) -> Any:
        """The block's result with no graph; its gradients are computed and let go."""
        ledger = self.ledger
        ledger.most = start = ledger.held
        ledger.attention = ledger.arithmetic = ledger.attention_arithmetic = 0
        saved: list[Tensor] = []
        operations, note = CountedOperations(saved, ledger), self.noting(block.saves)

        def pack(x: Tensor) -> Tensor:
            saved.append(note(x))
            return saved[-1]

        with saved_tensors_hooks(pack, lambda x: x), reporting(operations):
            result = function()
        block.left_out += 0 if operations.is_read() else operations.product
        saved.clear()
        forward = ledger.most - start
        block.selective += ledger.attention + operations.bytes_kept()
        block.spared += ledger.attention_arithmetic + (operations.product if operations.last is not None else 0)
        operations.last = None  # a plan may not keep it
        block.arithmetic += ledger.arithmetic
        block.attention_arithmetic += ledger.attention_arithmetic
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
        inputs = [x for x in wanted if x.requires_grad]
        if outputs and inputs:
            torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs], allow_unused=True)
        working = ledger.most - start
        block.working = max(block.working, working)
        block.working_again = max(block.working_again, working, forward + sum(x.nbytes for x in outputs))
        return tree_map_only(Tensor, lambda x: cut(x, self.anchor), result)

    def sums(self, trainable: int, scratch: int, device: str) -> Measured:
        """The sizes added up, each piece of memory with the one block that it belongs to, or with the constant."""
        blocks, mark = list(self.blocks.values()), self.ledger.mark
        uses = Counter(number for b in blocks for number in b.inputs | b.bound | b.saves)
        shared = {n: size for b in blocks for n, size in (b.inputs | b.saves).items() if uses[n] > 1 or n in mark.live}
        for block in blocks:
            shared |= block.bound
        shared |= mark.outside

        def alone(sizes: Sizes) -> int:
            return sum(size for number, size in sizes.items() if number not in shared)

        for block in blocks:
            block.input, block.saved = alone(block.inputs), alone(block.saves)
            block.others = alone({n: size for n, size in block.present.items() if n not in block.inputs})
        constant = trainable + scratch + sum(shared.values())
        loss_working = alone(mark.live) + self.ledger.most - mark.held
        before = trainable + scratch + self.before_blocks
        return Measured(blocks, self.ledger.outside, constant, before, loss_working, device)


def arithmetic_of(func: Any, args: Any, kwargs: Any, made: Sequence[Tensor]) -> int:
    """The FLOPs of a product or an attention; element-wise operations and Triton kernels count nothing."""
    name = func._schema.name.removesuffix("_")  # in place, or into a buffer, it is the same product
    if name in PRODUCTS:  # 2 · results · terms
        return int(2 * made[0].numel() * args[PRODUCTS[name]].shape[-1])
    if name == GROUPED:
        return grouped_arithmetic(*args[:2])
    if is_attention(func, args, kwargs):  # q·kᵀ and p·v: 4 · queries · keys · features
        query, key = args[:2]
        heads_first = "_scaled_dot_product" in func.name() or func.name() == "lora::causal_attention"
        keys = key.shape[-2 if heads_first else -3]
        return int(4 * query.numel() * keys)
    return 0


@contextmanager
def as_trained(model: nn.Module) -> Iterator[None]:
    """`for_training` inside; afterwards flags, fusion, cache and checkpointing are as they were."""
    state = state_of(model)
    if any(layer.merged for _, layer in adapter_layers(model)):
        raise LoRAError("the model has merged adapters, which do not train: call lora.unmerge(model) before planning.")
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    hooks = [(m, {n: vars(m)[n] for n in names if n in vars(m)}) for m in hooked_modules(model).values()]
    training = [(module, module.training) for module in model.modules()]
    config: Any = getattr(model, "config", None)
    before, fused = dict(state.modes), "fusion" in state.modes
    use_cache = getattr(config, "use_cache", None)
    try:  # a fused model stays so: fusing again would copy its weights
        (reference_modes if fused else dispatch).for_training(model)
        yield
    finally:
        if "fusion" in state.modes and not fused:
            importlib.import_module("lora.fast.inject").unfuse(model)
        for module, values in hooks:
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(values)
        for module, flag in training:
            module.training = flag
        if use_cache is not None:
            config.use_cache = use_cache
        state.modes.clear()
        state.modes.update(before)


def _loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    value = getattr(model(**batch), "loss", None)
    if not isinstance(value, Tensor):
        raise LoRAError(
            f"the forward of {type(model).__name__} with {', '.join(batch)} gives no loss: put labels into the batch, "
            "or give loss=, a function of the batch."
        )
    return value


def _only_device(model: nn.Module) -> torch.device:
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        raise LoRAError(f"the model is on {len(devices)} devices, expected one: a budget is for one device.")
    return devices.pop()
