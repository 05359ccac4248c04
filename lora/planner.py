"""A checkpointing plan: for each block what it keeps for the backward, so that a training step fits a number of bytes.

    measure     one step of the model, block by block (`lora.measure`): what a block saves, its input, its attention
                outputs, what it takes at most while it runs forward and backward
    choose      of all plans that fit, the one that computes least again

**The peak.** While block i runs backward, or forward the second time, blocks 1 … i-1 still hold what they keep, and
blocks i+1 … are free:

    need_i = constant + Σ_{j<i} kept_j + own_i + working_i      need_loss = constant + Σ_j kept_j + working_loss

    kept_j      by mode. none: what its operations save; recompute: its input; selective: its input, attention's
                outputs, and down_proj's where a norm reads it; offload: nothing
    own_i       what block i keeps beside the tensors that its second run makes: its input, what selective keeps
    working_i   what its operations have in memory at most at one time, forward or backward, its gradients included;
                when it runs again, the gradient of its output waits meanwhile
    constant    the gradients of all trainable parameters, and what belongs to no single block: masks, cos and sin,
                what the embedding saves; with "offload" also two buffers, the largest inputs

The need of a plan is the largest of these. A block is in need_i's sum for all i after it: the earlier a block, the
longer it waits. So, of two alike blocks, the one that keeps more should come later: exchanging them lowers the sums in
between and leaves all others. That is why plans save memory in the first blocks and keep everything in the last; where
the loss, after all blocks, needs most, only how many keep what counts, and the order is of no account.

**Choosing.** Blocks need not be alike, so the search does not rely on that. It goes through the blocks in order, with
the set of all (bytes kept so far, arithmetic so far) that no other pair beats in both; a mode whose need_i exceeds the
budget is dropped. Whatever follows depends on the past through the bytes alone, so a beaten pair cannot win: the
search is exact. Arithmetic is compared first, bytes to be moved second. The plans that fit a budget fit every larger
one, so a larger budget never computes more again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora.errors import LoRAError, did_you_mean
from lora.measure import Block, Measured, measure
from lora.reference.modes import CHECKPOINTING

UNITS = {"": 1, "b": 1} | {
    name + tail: base**power for base, tail in ((1000, "b"), (1024, "ib")) for power, name in enumerate("kmgt", start=1)
}


def plan_checkpointing(
    model: nn.Module,
    batch: Mapping[str, Any],
    budget: int | str,
    *,
    modes: Sequence[str] | None = None,
    loss: Callable[..., Tensor] | None = None,
) -> Plan:
    """Chooses each block's checkpointing so that a training step fits the budget: `for_training(model, plan)`.

    The peak is measured and added up as the top of `lora/planner.py` says, on the backend in force. The model is left
    as it was: random generators, training flags, checkpointing, gradients. Call it under the autocast of training.

    Args:
        model: an injected model; nothing merged.
        batch: the keyword arguments of one forward, [sequences, tokens] each: the largest batch of the training, as
            shorter ones need less.
        budget: bytes on the model's device above the weights and the optimizer's state: activations, gradients and
            working memory. A number, or text: "6GiB", "800 MB". What the allocator rounds up, libraries' workspaces
            (cuBLAS) and what the caller keeps of the model's outputs are not in it.
        modes: what it may choose of "none", "selective", "recompute" and "offload"; all, unless given. "offload" is
            never planned on a CPU, whose memory is the host's, and without it nothing goes to host memory.
        loss: gives the loss of a batch, called with it as the model would be; the output's `loss`, unless given.

    Returns: a Plan; prints as a table.
    Raises: LoRAError for a budget that is no number of bytes; for one too small for the leanest plan, naming the
        smallest that would do; for an unknown mode; for a model without adapters or blocks, or on several devices; for
        a batch that gives no loss.
    FLOPs: two forwards and backwards. Bytes: as training with "recompute" in every block.
    """
    limit = bytes_of(budget)
    chosen = _checked_modes(modes)
    return planned(measure(model, batch, loss), limit, chosen)


def planned(measured: Measured, limit: int, chosen: list[str]) -> Plan:
    """The plan for a step that has been measured; `plan_checkpointing` says what is raised."""
    if measured.device == "cpu":
        chosen = [mode for mode in chosen if mode != "offload"]
    if not chosen:
        raise LoRAError("modes leaves only 'offload', which needs a GPU: on a CPU, host memory is what is to be saved.")
    variants = [[mode for mode in chosen if mode != "offload"]] + [chosen] * ("offload" in chosen)
    problems = [Problem(measured, variant) for variant in variants if variant]
    leanest = min((problem.leanest() for problem in problems), key=lambda problem_modes: problem_modes[0])
    if limit < leanest[0]:
        raise LoRAError(
            f"budget is {readable(limit)} ({limit:,} bytes), but the leanest plan for this batch, "
            f"{_summary(leanest[1])}, needs {readable(leanest[0])}: give at least {leanest[0]:,} bytes, or a smaller "
            "batch."
        )
    found = [solution for problem in problems if (solution := problem.solve(limit)) is not None]
    best = min(found, key=lambda solution: solution.cost)  # the first variant, without offload, where they are equal
    return _plan(measured, best, limit, leanest[0])


# ---- the result


@dataclass(frozen=True)
class BlockPlan:
    """One block: the mode chosen for it, and what it was measured to keep in each mode, in bytes."""

    path: str
    mode: str
    kept: dict[str, int]  # by mode: on the device from its forward to its backward, what it shares left out
    working: int  # at most while it runs, forward and backward
    arithmetic: int  # FLOPs of its products and attention, forward
    again: int  # those of them that this mode runs again


@dataclass(frozen=True)
class Plan(Mapping[str, str]):
    """The mode of each block by its path, which is what `for_training` takes, and the bytes behind it.

    Attributes:
        blocks: in the order in which the model runs them.
        budget, peak: bytes allowed, and predicted for a step with this plan.
        kept: bytes in memory between the forward and the backward, saved outside of blocks included.
        constant: of the peak, what no choice changes: gradients, masks, cos and sin, what the embedding saves.
        loss: working memory of what comes after the blocks: head and loss.
        leanest, plain: the smallest budget that any plan fits, and the smallest for "none" in every block.
        device: the type of the device that is meant.
    """

    blocks: tuple[BlockPlan, ...]
    budget: int
    peak: int
    kept: int
    constant: int
    loss: int
    leanest: int
    plain: int
    device: str

    def __getitem__(self, path: str) -> str:
        return {block.path: block.mode for block in self.blocks}[path]

    def __iter__(self) -> Iterator[str]:
        return (block.path for block in self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __str__(self) -> str:
        shown = [mode for mode in CHECKPOINTING if any(mode in block.kept for block in self.blocks)]
        rows = [("block", "mode", *(f"kept: {mode}" for mode in shown), "working")]
        for block in self.blocks:
            sizes = (readable(block.kept[mode]) if mode in block.kept else "-" for mode in shown)
            rows.append((block.path, block.mode, *sizes, readable(block.working)))
        rows.append(("after the blocks", "", *[""] * len(shown), readable(self.loss)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(self.summary())
        lines.append(f"without checkpointing {readable(self.plain)}; leanest plan {readable(self.leanest)}")
        if self.device == "cpu":
            lines.append("offload is not planned on a CPU: host memory is the memory that is to be saved")
        return "\n".join(lines)

    def summary(self) -> str:
        """The plan in a line."""
        again, all_of = sum(block.again for block in self.blocks), sum(block.arithmetic for block in self.blocks)
        return (
            f"{_summary(list(self.values()))}: peak {readable(self.peak)} of a budget of {readable(self.budget)}, "
            f"{readable(self.constant)} of it whatever the plan; {again / max(all_of, 1):.0%} of the blocks' forward "
            "runs again"
        )


def _plan(measured: Measured, solution: Solution, limit: int, leanest: int) -> Plan:
    """The solution with what it was chosen from."""
    every = ["none", "selective", "recompute", *(["offload"] * (measured.device != "cpu"))]
    chosen = list(zip(measured.blocks, solution.modes, strict=True))
    choices = [_choices(block, every) | _choices(block, [mode]) for block, mode in chosen]
    blocks = tuple(
        BlockPlan(
            block.path,
            mode,
            {name: choice.kept for name, choice in there.items()},
            block.working,
            block.arithmetic,
            there[mode].cost,
        )
        for (block, mode), there in zip(chosen, choices, strict=True)
    )
    plain = Problem(measured, ["none"])
    return Plan(
        blocks,
        limit,
        solution.need,
        measured.kept_by(solution.modes),
        measured.constant,
        measured.loss_working,
        leanest,
        plain.leanest()[0],
        measured.device,
    )


# ---- the choice


class Choice(NamedTuple):
    """One mode of one block: bytes kept while others run, bytes while it runs, FLOPs again, bytes moved."""

    kept: int
    running: int  # own_i + working_i
    cost: int
    moved: int


class Solution(NamedTuple):
    """A plan that fits."""

    cost: tuple[int, int]  # FLOPs computed again, bytes moved
    need: int
    modes: tuple[str, ...]


class State(NamedTuple):
    """The best way to some number of bytes kept by the first blocks, as a linked list."""

    kept: int
    cost: tuple[int, int]
    need: int  # the largest need_i so far
    mode: str
    before: State | None


class Problem:
    """Which mode for each block, given the modes there are; see the top of this file."""

    def __init__(self, measured: Measured, modes: Sequence[str]) -> None:
        self.measured = measured
        buffers = 2 * max(block.input for block in measured.blocks) if "offload" in modes else 0
        self.constant = measured.constant + buffers
        self.choices = [_choices(block, modes) for block in measured.blocks]

    def need(self, number: int, before: int, choice: Choice) -> int:
        """need_i of block `number`, with `before` bytes kept by the blocks before it."""
        block = self.measured.blocks[number]
        return self.constant + block.others + before + choice.running

    def finish(self, state: State) -> Solution:
        """A state behind the last block as a solution: with the loss, and blocks that run more than once."""
        working = self.measured.loss_working
        if self.measured.interleaved:  # a block runs twice: then take all blocks to hold theirs all the time
            working = max(working, *(b.others + b.input + b.selective + b.working_again for b in self.measured.blocks))
        need = max(state.need, self.measured.before_blocks, self.constant + state.kept + working)
        modes: list[str] = []
        link: State | None = state
        while link is not None and link.mode:
            modes.append(link.mode)
            link = link.before
        return Solution(state.cost, need, tuple(reversed(modes)))

    def leanest(self) -> tuple[int, tuple[str, ...]]:
        """The smallest budget that a plan fits, and the plan; the same search, by need in place of cost."""
        states = [START]
        for number, choices in enumerate(self.choices):
            longer = [self.extended(state, number, mode) for state in states for mode in choices]
            states = unbeaten(longer, lambda state: state.need)
        solution = min((self.finish(state) for state in states), key=lambda s: (s.need, s.cost))
        return solution.need, solution.modes

    def extended(self, state: State, number: int, mode: str) -> State:
        """The state with one more block."""
        choice = self.choices[number][mode]
        need = 0 if self.measured.interleaved else max(state.need, self.need(number, state.kept, choice))
        cost = (state.cost[0] + choice.cost, state.cost[1] + choice.moved)
        return State(state.kept + choice.kept, cost, need, mode, state)

    def solve(self, budget: int) -> Solution | None:
        """The plan with the least cost that fits, or None."""
        states = [START]
        for number, choices in enumerate(self.choices):
            longer = (self.extended(state, number, mode) for state in states for mode in choices)
            states = unbeaten([state for state in longer if state.need <= budget], lambda state: state.cost)
        solutions = (self.finish(state) for state in states)
        return min((s for s in solutions if s.need <= budget), key=lambda s: (s.cost, s.need), default=None)


START = State(0, (0, 0), 0, "", None)


def unbeaten(states: list[State], other: Callable[[State], Any]) -> list[State]:
    """Those that no state beats both in bytes kept and in this other respect."""
    best: list[State] = []
    for state in sorted(states, key=lambda s: (s.kept, other(s), s.need)):
        if not best or other(state) < other(best[-1]):
            best.append(state)
    return best


class Moment(NamedTuple):
    """The largest moment of a step, in bytes."""

    need: int
    gradients: int  # of it
    kept: int  # of it, what waits for the backward, with masks, cos and sin


def largest_moment(
    measured: Measured, plan: Plan, gradients: Mapping[str, int], trainable: int, waiting: bool
) -> Moment:
    """When a step with this plan needs most.

    Args:
        gradients: bytes of each block's, by its path. trainable: of all of them.
        waiting: whether all are there from an earlier batch, which is what a plan is made for: its peak; else a
            block's are there only when it has run backward.
    """
    problem = Problem(measured, tuple(dict.fromkeys(plan.values())))
    shared, kept, unmade = measured.constant - trainable, 0, 0
    moments = [Moment(measured.before_blocks, 0, 0)]
    for number, (path, mode) in enumerate(plan.items()):
        choice = problem.choices[number][mode]
        unmade += gradients[path]  # its own are in what it takes while it runs
        moments.append(Moment(problem.need(number, kept, choice), trainable - unmade, shared + kept))
        kept += choice.kept
    moments.append(Moment(problem.constant + kept + measured.loss_working, 0, shared + kept))
    if measured.interleaved:  # there is no order in which gradients come
        return Moment(plan.peak, trainable, shared + kept)
    if waiting:
        return max(moment._replace(gradients=trainable) for moment in moments)
    return max(moment._replace(need=moment.need - trainable + moment.gradients) for moment in moments)


def _choices(block: Block, modes: Sequence[str]) -> dict[str, Choice]:
    """What each mode means for this block; where "selective" has nothing to keep, it is "recompute", and left out."""
    arithmetic = block.arithmetic - block.left_out
    thrifty = arithmetic - block.spared
    again, both = block.input + block.working_again, block.input + block.selective
    every = {
        "none": Choice(block.saved, block.input + block.working, 0, 0),
        "selective": Choice(both, block.selective + again, thrifty, 0),
        "recompute": Choice(block.input, again, arithmetic, 0),
        "offload": Choice(0, again, arithmetic, 2 * block.input),
    }
    twice = "recompute" in modes and not block.selective
    return {mode: every[mode] for mode in modes if mode != "selective" or not twice}


# ---- words and numbers


def bytes_of(budget: int | str) -> int:
    """A budget in bytes: 6442450944, "6GiB", "800 MB", "1.5g".

    Raises: LoRAError for anything else, and below 1 byte.
    """
    size: float | None = None
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)\s*", budget.lower())
        unit = match[2] if match else ""
        unit = unit + "ib" if unit in tuple("kmgt") else unit  # 6g, as other tools read it
        size = float(match[1]) * UNITS[unit] if match and unit in UNITS else None
    elif isinstance(budget, (int, float)) and not isinstance(budget, bool):
        size = budget
    if size is None or not math.isfinite(size) or size < 1:
        raise LoRAError(f"budget is {budget!r}, expected a number of bytes, or text like '6GiB' or '800MB'.")
    return int(size)


def readable(size: int) -> str:
    """Bytes as people say them."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"


def _checked_modes(modes: Sequence[str] | None) -> list[str]:
    order = ["none", "selective", "recompute", "offload"]  # of equals, the first is taken
    if modes is None:
        return order
    for mode in [modes] if isinstance(modes, str) else modes:
        if mode not in order:
            raise LoRAError(
                f"modes names {mode!r}, expected some of {', '.join(map(repr, order))}.{did_you_mean(str(mode), order)}"
            )
    if isinstance(modes, str) or not modes:
        raise LoRAError(f"modes is {modes!r}, expected a list of some of {', '.join(map(repr, order))}.")
    return [mode for mode in order if mode in modes]


def _summary(modes: Sequence[str]) -> str:
    counted = {mode: modes.count(mode) for mode in CHECKPOINTING if mode in modes}
    return ", ".join(f"{mode} in {count} blocks" for mode, count in counted.items())
