# %% [markdown]
# # 8. Memory
#
# **The question.** [Notebook 4](04_fine_tune.ipynb) ended with a bar that LoRA does not shrink: activations, in
# proportion to the number of tokens. What is in that bar, what can be left out, and what does leaving it out cost?

# %% tags=["setup"]
import itertools
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Patch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lora
import workshop
from lora.measure import Ledger, measure
from lora.planner import Problem
from lora.reference.checkpoint import Traffic, is_attention
from workshop import COLOURS, assert_close, axes, checks, finish

# %% [markdown]
# ## Predict
#
# 1. 1,024 tokens, a vocabulary of 128k (131,072), float32. How many bytes are the logits? A token's loss is one number;
#    what else has to stay for the backward, if not they?
# 2. *Checkpointing* a block keeps its input alone, and runs its forward again when the backward comes to it. A chain
#    of 16 equal blocks, each saving $a$ bytes with an input of $a/4$: peak memory with checkpointing in every block,
#    against none?
# 3. Attention's output is as large as a block's input. Is it worth keeping, so that attention does not run again? Does
#    the answer depend on the length of the sequence?
# 4. A budget lets three of six equal blocks keep everything; the others run again. Which three should keep?
#
# ## The derivation, first part: a loss without logits
#
# One token's loss is $L = \log\sum_c e^{z_c} - z_y$, where the logits are $z = W h$, $W$ is the model's head
# [vocabulary, features], $h$ the token's last hidden state, and $y$ the number of the token that should come next.
# With $e_y$ for the vector that is 1 at $y$ and 0 elsewhere, its gradient is
#
# $$\frac{\partial L}{\partial z} = \mathrm{softmax}(z) - e_y, \qquad \frac{\partial L}{\partial h} =
# W^\top\bigl(\mathrm{softmax}(z) - e_y\bigr) .$$
#
# Everything about a token follows from its *own* logits. So take a few hundred tokens at a time: form their logits,
# read off loss and $\partial L/\partial h$ at once, in the *forward*, and drop the logits. What remains of a token is
# its loss, one number, and $\partial L/\partial h$, as large as $h$. The scalar that arrives in the backward only
# multiplies it.
#
# The reference forms all logits, because that is easy to read; the fast backend goes chunk by chunk. We measure both on
# random numbers, with a vocabulary of 16,384.

# %%
torch.manual_seed(0)
VOCAB, FEATURES = 16384, 64
head = torch.randn(VOCAB, FEATURES) / 8


def loss_and_gradient(hidden, labels):
    """The gradient of the loss with respect to hidden, through the backend in force."""
    lora.ops.linear_cross_entropy(hidden, head, labels).backward()
    return hidden.grad


def measured(backend: str, tokens: int) -> tuple[int, torch.Tensor]:
    """(peak bytes, gradient) of one loss, forward and backward."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, FEATURES, generator=generator, requires_grad=True)
    labels = torch.randint(VOCAB, (tokens,), generator=generator)
    with lora.use_backend(backend):
        peak = workshop.peak_bytes(lambda: loss_and_gradient(hidden, labels), [hidden, labels, head])
    return peak, hidden.grad


counts = [128, 256, 512, 1024, 2048]
peaks = {backend: [measured(backend, tokens) for tokens in counts] for backend in ("reference", "fast")}
for (_, plain), (_, chunked) in zip(peaks["reference"], peaks["fast"], strict=True):
    assert_close(chunked, plain, "the gradient without logits", atol=1e-7)

ax = axes()
for backend, marker in (("reference", "o-"), ("fast", "s-")):
    label = "all logits" if backend == "reference" else "a chunk of tokens at a time"
    ax.plot(counts, [peak / 2**20 for peak, _ in peaks[backend]], marker, label=label)
ax.plot(counts, [4 * tokens * VOCAB / 2**20 for tokens in counts], ":", color=COLOURS[5], label="logits, once")
finish(ax, f"peak of loss and gradient, vocabulary {VOCAB:,}", "tokens", "MiB", legend=True)

at_most = {backend: [peak for peak, _ in values] for backend, values in peaks.items()}
with_all, without = (workshop.mib(at_most[backend][-1]) for backend in ("reference", "fast"))
logits = 4 * counts[-1] * VOCAB
print(f"2,048 tokens: {with_all} with all logits, {without} without; the logits alone, once: {workshop.mib(logits)}")
predicted, kept = 4 * 1024 * 131072, 4 * 1024 * FEATURES  # prediction 1
print(
    f"1,024 tokens, 131,072 entries: {workshop.mib(predicted)} of logits. What has to stay: the tokens' losses, "
    f"4 KiB, and gradients: {workshop.mib(kept)} with {FEATURES} features, {workshop.mib(64 * kept)} with 4,096"
)
assert predicted == 2**29
assert at_most["reference"][-1] > 2 * logits and at_most["fast"][-1] < logits / 3  # several copies; a fraction
assert at_most["reference"][-1] / at_most["reference"][-2] > 1.9  # grows with the tokens
assert at_most["fast"][-1] / at_most["fast"][-2] < 1.1  # does not: a chunk's size is fixed

# %% [markdown]
# Prediction 1: 512 MiB. With all logits the peak here is five times the logits: the forward's and the backward's
# tensors of that size are in memory together. By chunks it stops growing, and the arithmetic is the same: nothing
# runs twice.
#
# ## Second part: checkpointing
#
# $n$ equal blocks, each with an input of $i$ bytes and saving $a$ for its backward. Kept until the backward:
#
# $$\text{none}: n a \qquad \text{every block}: n i + a \qquad \text{segments of } k:\ \tfrac nk\, i + k a .$$
#
# A *segment* is $k$ blocks in a row of which only the first one's input is kept; when the backward comes to it, all
# $k$ run again, and their $ka$ is there. "Every block" keeps all inputs; when the backward comes to a block, it runs
# that block's forward again, and for a moment its $a$ is there. The price is one more forward of the blocks, in
# either form. A product's forward is one matrix product, its $dx$ another, its $dW$ a third: so a third more
# arithmetic in full training, and half as much again where the weights are frozen and have no $dW$. With segments,
# the least is at $k = \sqrt{n i / a}$ (Chen et al. 2016: memory like $\sqrt n$). In a transformer $a$ is many times
# $i$ (we shall measure 18.9), and $k = 1$ keeps less than $k = 2$ as long as $n < 2a/i$, here up to 37 blocks;
# SmolLM2 has 30.
#
# What really is in memory at most is a little more: the working memory of the one block that runs, and the gradient
# that goes back.


# %%
class Block(nn.Module):
    """Saves four times its input, for the nonlinearity; its linear layers, frozen, save nothing."""

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def chain(blocks, x, segment: int | None):
    """All blocks in order, `segment` of them in one checkpoint; None: no checkpoint."""
    if segment is None:
        for block in blocks:
            x = block(x)
        return x
    for start in range(0, len(blocks), segment):
        part = nn.Sequential(*blocks[start : start + segment])
        x = lora.ops.checkpoint(part, x)
    return x


def chain_of(n: int, frozen: bool = True) -> tuple[list[Block], torch.Tensor]:
    """That many blocks, n, and an input for them."""
    torch.manual_seed(0)
    blocks = [Block().requires_grad_(not frozen) for _ in range(n)]
    return blocks, torch.randn(512, 64, requires_grad=True)


def chain_peak(n: int, segment: int | None) -> tuple[int, torch.Tensor]:
    """(peak bytes, gradient of the input) of forward and backward."""
    blocks, x = chain_of(n)
    parameters = [p for block in blocks for p in block.parameters()]
    peak = workshop.peak_bytes(lambda: chain(blocks, x, segment).sum().backward(), [x, *parameters])
    return peak, x.grad


def chain_flops(segment: int | None, frozen: bool) -> int:
    """Operations of all matrix products, forward and backward, of 8 blocks."""
    blocks, x = chain_of(8, frozen)
    with FlopCounterMode(display=False) as counter:
        chain(blocks, x, segment).sum().backward()
    return counter.get_total_flops()


depths = [2, 4, 8, 16, 32]
curves = {None: [], 1: [], 4: []}
for n in depths:
    gradients = []
    for segment in curves:
        peak, gradient = chain_peak(n, segment)
        curves[segment].append(peak / 2**20)
        gradients.append(gradient)
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])  # bit for bit the same gradient

ax = axes()
for segment, label in ((None, "none"), (4, "segments of 4 blocks"), (1, "every block")):
    ax.plot(depths, curves[segment], "o-", label=label)
finish(ax, "peak of a chain of blocks", "blocks", "MiB", legend=True)

slope = {segment: (values[-1] - values[-2]) / 16 for segment, values in curves.items()}  # MiB a block
input_mib = 512 * 64 * 4 / 2**20
print("MiB a block:", {str(segment): round(value, 3) for segment, value in slope.items()}, f"input {input_mib:.3f}")
assert abs(slope[1] - input_mib) < 0.02 * input_mib  # every block: its input, and nothing else
assert abs(slope[None] - 4 * input_mib) < 0.02 * input_mib  # none: all that is saved, a = 4 i
assert abs(slope[4] - input_mib / 4) < 0.02 * input_mib  # segments: an input for every fourth

n, a = 16, 4 * input_mib  # prediction 2, and the same for segments
formula = {None: n * a, 1: n * a / 4 + a, 4: n / 4 * a / 4 + 4 * a}
for segment, label in ((None, "none"), (1, "every block"), (4, "segments of 4")):
    at_most = curves[segment][depths.index(n)]
    print(f"{n} blocks, {label:<13}: {formula[segment] / a:4.1f} a = {formula[segment]:.2f} MiB kept by the formula, "
          f"{at_most:.2f} MiB at most")  # fmt: skip
    assert 0 <= at_most - formula[segment] < 2.01 * a  # the formula, and what the running block works with

price = {frozen: chain_flops(1, frozen) / chain_flops(None, frozen) for frozen in (False, True)}
print(f"arithmetic with checkpointing: x {price[False]:.3f} in full training, x {price[True]:.3f} with frozen weights")
assert abs(price[False] - 4 / 3) < 1e-9 and abs(price[True] - 3 / 2) < 1e-9
assert all(chain_flops(4, frozen) == chain_flops(1, frozen) for frozen in price)  # segments cost the same

# %% [markdown]
# Prediction 2: $5a$ kept instead of $16a$, and at most 3.38 MiB instead of 9.00. The rest, in both, is what the
# running block works with.
#
# ## Selective: not everything again
#
# A block's forward saves many things. Most are large and cheap to compute again (norms, activations). Attention's
# output is only as large as the input, and costs a pass over all pairs of tokens: arithmetic that grows with the
# square of the length. `lora.for_training(model, checkpointing=…)` has four modes:
#
# | mode | kept of a block until its backward | run again |
# |---|---|---|
# | `none` | all that it saves | nothing |
# | `recompute` | its input | its forward |
# | `selective` | its input and attention's output | its forward without attention |
# | `offload` | nothing: its input waits in the host's memory, the CPU's | its forward |
#
# We take the last six blocks of SmolLM2 and four short examples, give $B$ random values, as $B = 0$ would make $dA$
# zero, and count how often attention runs.


# %%
class CountAttention(TorchDispatchMode):
    """Counts fused attention operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += is_attention(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


BLOCKS = 6
model, tokenizer = lora.load("smollm2-135m-instruct")
pairs, _ = workshop.pairs(4)
(batch,) = workshop.inputs_of(model, workshop.batches(tokenizer, pairs, 4), BLOCKS)
top = workshop.last_blocks(model, BLOCKS)
del model
lora.inject(top, lora.LoRAConfig(r=8, lora_alpha=8))
with torch.no_grad():
    for name, parameter in top.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.02)

runs, gradients = {}, {}
for mode in ("none", "recompute", "selective", "offload"):
    lora.for_training(top, checkpointing=mode)
    top.zero_grad()
    loss = workshop.loss_of(top, batch)
    with CountAttention() as counter:
        loss.backward()
    runs[mode] = counter.count
    gradients[mode] = torch.cat([p.grad.flatten() for p in lora.trainable_parameters(top)])
print("attention runs in the backward:", runs)
assert runs == {"none": 0, "recompute": BLOCKS, "selective": 0, "offload": BLOCKS}
assert all(torch.equal(gradients["none"], other) for other in gradients.values())  # the same bits in every mode

# %% [markdown]
# ## What each mode keeps: measured, and predicted
#
# A `Ledger` (from `lora.measure`) notes the memory of each tensor from its birth to its end, and the operations of
# all matrix products and attention. We run one forward and backward in each mode under it, and read it between the
# two.
#
# `lora.measure.measure` *predicts* all modes without a run in each: it runs the model block by block and notes what
# each block would save, its input, and attention's outputs. That is the *trace*. `kept_by` adds these up for any
# choice of modes. If the trace is right, its sums are what we measured.
#
# What counts is what the step adds: parameters and the batch are in memory anyway. Block 0's input is a part of the
# batch (what the frozen blocks below made of it), so it is not counted, and `recompute` keeps five inputs, not six.

# %%
MODES = ("none", "selective", "recompute")
arguments = {"inputs_embeds": batch.hidden, "attention_mask": batch.mask}
owned = [*top.parameters(), *top.buffers(), *vars(batch).values()]  # in memory anyway
measured, backward = {}, {}
for mode in MODES:
    lora.for_training(top, checkpointing=mode)
    top.zero_grad()
    ledger = Ledger(torch.device("cpu"), owned)
    with ledger:
        loss = workshop.loss_of(top, batch)
        measured[mode], before = ledger.held, ledger.arithmetic
        loss.backward()
        backward[mode] = ledger.arithmetic - before
    ledger.close()

lora.for_training(top)
found = measure(top, arguments, lambda **_: workshop.loss_of(top, batch))  # the trace: one step
for mode in MODES:
    # To the byte, the loss's 4 apart, and with any version of torch: both sides count what this one saves.
    assert measured[mode] == found.kept_by([mode] * BLOCKS) + loss.nbytes

inner = found.blocks[1]  # like all but block 0, whose input does not count
forward = sum(block.arithmetic for block in found.blocks)
outside = sum(found.outside.values())  # saved after the blocks: logits of the answers' tokens, as this is the reference
kept = {mode: (measured[mode] - outside) / 2**20 for mode in MODES}
kept["offload, predicted"] = (found.kept_by(["offload"] * BLOCKS) - outside) / 2**20
again = {mode: (backward[mode] - backward["none"]) / forward for mode in MODES}

ax = axes(height=2.3, width=5.6)
ax.bar_label(ax.barh(list(kept), list(kept.values()), color=COLOURS), fmt="%.2f", padding=3)
ax.margins(x=0.12)
ax.invert_yaxis()
finish(ax, f"kept between forward and backward, {BLOCKS} blocks, {batch.ids.numel()} tokens", "MiB")
for mode in MODES:
    print(f"{mode:<10} keeps {kept[mode]:6.2f} MiB, and runs {again[mode]:.1%} of the blocks' arithmetic again")
print(f"offload on a GPU would keep {kept['offload, predicted']:.2f} MiB, by the trace: what all blocks share")
print(f"a block saves {inner.saved / inner.input:.1f} times its input, attention's output is "
      f"{inner.selective / inner.input:.2f} inputs")  # fmt: skip
assert kept["none"] > 5 * kept["selective"]
assert kept["selective"] > 1.5 * kept["recompute"] > 3 * kept["offload, predicted"]
assert again["none"] == 0 and again["recompute"] == 1
assert abs(again["selective"] - (1 - inner.attention_arithmetic / inner.arithmetic)) < 1e-9
assert inner.saved > 10 * inner.input and inner.selective < 1.1 * inner.input
assert found.blocks[0].input == 0
shared = inner.bound  # by piece of memory: its bytes
assert (
    all(block.bound == shared for block in found.blocks) and kept["offload, predicted"] == sum(shared.values()) / 2**20
)

# %% [markdown]
# What `offload` keeps here is what every block reads and none owns: the attention mask (4 × 66 × 66 bytes), and the
# cosines and sines by which attention knows a token's position. Every mode has them in memory, once for all blocks.
#
# On so few tokens attention is a small part of the arithmetic, and `selective` spares little. Products cost the same
# for each token; attention's cost for a token is in proportion to the length. So one trace says what its share would be
# in longer sequences (counted here as if each token looked at all others; the *causal mask*, by which it may look only
# at itself and at those before it, can spare up to half of that):

# %%
length = batch.ids.shape[1]
products = (inner.arithmetic - inner.attention_arithmetic) / batch.ids.numel()  # operations a token
pairs_of = inner.attention_arithmetic / batch.ids.numel() / length  # a token, and each token that it looks at
share = {n: pairs_of * n / (products + pairs_of * n) for n in (length, 1024, 8192)}
print("attention's share of a block:", {f"{n} tokens": f"{value:.0%}" for n, value in share.items()})
assert share[length] < 0.05 and share[1024] > 0.2 and share[8192] > 0.6  # prediction 3

# %% [markdown]
# Prediction 3: it depends on the length: keeping it spares 2% of the second run's arithmetic at 66 tokens, a quarter
# at 1,024 and most at 8,192, for one more input's worth of memory a block.
#
# **Offload** goes one step further than `recompute`: the inputs themselves wait in the host's memory. On a GPU a
# block's input goes out while the next block computes, and comes back while the one after it runs backward. What it
# would keep and move is a prediction of the trace here, since on a CPU the inputs are in the host's memory already:
# nothing moves, and a `Traffic`, which counts copied bytes, says so. Measured on a GPU it is in
# [`docs/benchmarks/h100.md`](../docs/benchmarks/h100.md).

# %%
problem = Problem(found, ["offload"])  # each block's choices, introduced below
moved = [choices["offload"].moved for choices in problem.choices]
print(f"offload on a GPU, predicted: {sum(moved) / 2**20:.2f} MiB moved, out and back")
for block, choices in zip(found.blocks, problem.choices, strict=True):
    assert choices["offload"].kept == 0 and choices["offload"].moved == 2 * block.input

traffic = Traffic()
blocks, x = chain_of(1)
(plain,) = torch.autograd.grad(blocks[0](x).sum(), x)
lora.ops.checkpoint(blocks[0], x, offload=traffic).sum().backward()
assert torch.equal(x.grad, plain)
assert (traffic.out, traffic.back, traffic.peak) == (0, 0, 0)  # on a CPU

# %% [markdown]
# ## A budget, and a plan
#
# Blocks need not all have the same mode. While block $i$ runs backward, the blocks before it still hold what they
# keep, and those after it are done. While the loss is computed, *all* hold what they keep. So a step needs the
# largest of
#
# $$\text{need}_i = \text{constant} + \sum_{j<i} \text{kept}_j + \text{running}_i, \qquad
# \text{need}_\text{loss} = \text{constant} + \sum_j \text{kept}_j + \text{working}_\text{loss} .$$
#
# By its mode a block has $\text{kept}$, what it keeps for its backward, and $\text{running}$, what it has in memory
# at most while it runs (its input and gradients included). $\text{constant}$ is what no mode changes: the gradients
# of $A$ and $B$, the attention mask and the like. $\text{working}_\text{loss}$ is what the head and the loss have in
# memory at most.
#
# A `Problem` (from `lora.planner`) holds these numbers: `choices[i][mode]` has `kept`, `running`, and the `cost`,
# operations that run again. `leanest()` is the smallest budget that any plan fits, with this plan; `solve(budget)` is
# the plan with the least cost that fits. Six blocks with three modes have 729 plans, so we can hold the answer against
# all of them, for 25 budgets from the leanest to what no checkpointing needs.

# %%
problem = Problem(found, MODES)


def need_of(modes) -> int:
    """The formula above, in bytes; what is in memory before the first block is part of it."""
    kept, needs = 0, [found.before_blocks]
    for mode, choices in zip(modes, problem.choices, strict=True):
        needs.append(problem.constant + kept + choices[mode].running)
        kept += choices[mode].kept
    return max(*needs, problem.constant + kept + found.loss_working)


def cost_of(modes) -> int:
    """Operations that run again."""
    return sum(choices[mode].cost for mode, choices in zip(modes, problem.choices, strict=True))


plans = {modes: (need_of(modes), cost_of(modes)) for modes in itertools.product(MODES, repeat=BLOCKS)}
least, _ = problem.leanest()
most, _ = Problem(found, ["none"]).leanest()
assert least == min(need for need, _ in plans.values()) and most == need_of(["none"] * BLOCKS)

budgets = [least + (most - least) * step // 24 for step in range(25)]
solutions = [problem.solve(budget) for budget in budgets]
for budget, solution in zip(budgets, solutions, strict=True):
    assert plans[solution.modes] == (solution.need, solution.cost[0]) and solution.need <= budget
    assert solution.cost[0] == min(cost for need, cost in plans.values() if need <= budget)  # none of 729 is better
extra = [solution.cost[0] / forward for solution in solutions]

left, right = axes(2)
left.step([b / 2**20 for b in budgets], extra, where="post")
finish(left, "what a budget costs", "budget, MiB", "share of the forward run again")
numbers = {"recompute": 0, "selective": 1, "none": 2}
shades = dict(zip(numbers, plt.get_cmap("Blues")([0.0, 0.5, 1.0]), strict=True))
right.imshow([[shades[mode] for mode in s.modes] for s in solutions], aspect="auto", origin="lower")
right.legend(
    handles=[Patch(facecolor=shade, edgecolor=COLOURS[5], label=mode) for mode, shade in shades.items()],
    frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2),
)  # fmt: skip
right.grid(False)
right.set_yticks([0, 12, 24], [f"{budgets[i] / 2**20:.0f}" for i in (0, 12, 24)])
finish(right, "its plan: what each block does", "block", "budget, MiB")

print(f"budgets {least / 2**20:.1f} to {most / 2**20:.1f} MiB; "
      f"{found.loss_working / 2**20:.1f} MiB of each are the reference's loss, with all its logits")  # fmt: skip
assert all(a >= b for a, b in itertools.pairwise(extra))  # a larger budget never costs more
assert extra[-1] == 0 and extra[0] == 1

# %% [markdown]
# Read the right picture from the bottom: each row is the plan of one budget. Of blocks 1 to 5, none keeps less than
# the one before it, in any row. About half of the picture is `selective`: what a budget has left, too little for
# one more block to keep everything, goes to attention's outputs. Block 0 keeps everything before any other does,
# against that order. Why either?
#
# The peak of all 729 plans is at the loss, where all blocks hold what they keep. There a block's place does not matter,
# only how much all keep together: prediction 4, any three equal blocks do. The cell below tries all ten choices
# of three among blocks 1 to 5, which are equal: each needs the same bytes. (Were the loss to take no memory, the
# leanest plan's peak would be in the last block's backward, with all that the others keep still there.) Of plans with
# the same cost and the same bytes, the search takes the one that has less in memory on the way, and that is the one
# that keeps late.
#
# Block 0 is not quite equal to the others. Its input is the batch's and requires no gradient, so its first norm does
# not save its *statistic*, the one number for each token by which it divided the token's features, 4 bytes: to keep
# everything is cheaper there than anywhere else, by so little. At
# some of these budgets just that decides: there no plan that runs block 0 again is as cheap. At the leanest budgets
# no block can keep everything; at the others below the largest, block 0 only wins a tie.

# %%
for modes, (need, _) in plans.items():
    kept_by_all = sum(choices[mode].kept for mode, choices in zip(modes, problem.choices, strict=True))
    assert need == problem.constant + kept_by_all + found.loss_working  # the peak is at the loss
lossless = Problem(replace(found, loss_working=0), MODES)
before_last = sum(choices["recompute"].kept for choices in problem.choices[:-1])
assert lossless.leanest()[0] == problem.constant + before_last + problem.choices[-1]["recompute"].running
three = {
    keeping: need_of(["none" if i in keeping else "recompute" for i in range(BLOCKS)])
    for keeping in itertools.combinations(range(1, BLOCKS), 3)
}
for keeping in ((1, 2, 3), (1, 3, 5), (3, 4, 5)):
    print(f"blocks {keeping} keep everything, the others run again: {three[keeping]:,} bytes")
print(f"all {len(three)} choices of three: {sorted(set(three.values()))} bytes")
assert len(set(three.values())) == 1  # prediction 4
assert all(problem.choices[i] == problem.choices[1] for i in range(2, BLOCKS))
assert all(list(s.modes[1:]) == sorted(s.modes[1:], key=numbers.get) for s in solutions)

gain = [choices["none"].kept - choices["recompute"].kept for choices in problem.choices]  # what running again spares
only_first, only_last = (("none", *["recompute"] * 5), (*["recompute"] * 5, "none"))
difference = need_of(only_last) - need_of(only_first)
print(f"only block 0 keeps: {need_of(only_first):,} bytes; only block 5: {need_of(only_last):,}, {difference} more, "
      f"{difference / batch.ids.numel():.0f} a token")  # fmt: skip
assert not batch.hidden.requires_grad and difference == gain[1] - gain[0]
assert (
    0 < difference < 0.01 * gain[1]
)  # how little is up to the norm, which is transformers': other versions may differ
without_0 = {modes: plan for modes, plan in plans.items() if modes[0] != "none"}
decided = []
for budget, solution in zip(budgets[:-1], solutions, strict=False):
    assert ("none" in solution.modes) == (solution.modes[0] == "none")  # where any block keeps everything, block 0 does
    cheapest = min(cost for need, cost in without_0.values() if need <= budget)
    decided += [budget] * (cheapest > solution.cost[0])
print(f"at {len(decided)} of {len(budgets)} budgets every plan that runs block 0 again costs more")
assert 0 < len(decided) < len(budgets) - 1  # how many depends on the batch's length

# %% [markdown]
# `lora.plan_checkpointing` does both steps, the trace and the search, and `for_training` takes its plan. Does a step
# with this plan keep what it says?

# %%
middle = solutions[12].modes
plan = lora.plan_checkpointing(top, arguments, budgets[12], loss=lambda **_: workshop.loss_of(top, batch))
assert tuple(plan.values()) == middle
lora.for_training(top, plan)
print(plan.summary())

top.zero_grad()
ledger = Ledger(torch.device("cpu"), owned)
with ledger:
    loss = workshop.loss_of(top, batch)
    between = ledger.held
    loss.backward()
ledger.close()
print(f"between forward and backward: {between:,} bytes measured, {plan.kept:,} planned; "
      f"at most {workshop.mib(ledger.most)} of {workshop.mib(plan.peak)}")  # fmt: skip
assert between == plan.kept + loss.nbytes and ledger.most <= plan.peak

# %% [markdown]
# It does, to the byte (and the loss's 4), and stays below the peak that was promised.
#
# **The answer.** The bar is what the blocks save, here about 19 times a block's input each, and the logits. The
# logits can be left out at no cost in arithmetic. Of the blocks one can keep the inputs alone, here 2.95 MiB instead
# of 65.22, and the price is one more forward of the blocks. Between the two, attention's outputs are worth keeping
# where sequences are long, and a plan says which blocks may keep everything.
#
# ## Exercises
#
# **Exercise 1.** The loss without logits, by hand: the summed cross-entropy and its gradient with respect to `hidden`,
# forming the logits of at most `chunk` tokens at a time. No autograd.


# %% tags=["exercise"]
def chunked_loss(hidden, W, labels, chunk):
    """(Σ loss, gradient [tokens, features]); logits exist for `chunk` tokens at a time."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(chunked_loss)
def check_chunked_loss(answer):
    generator = torch.Generator().manual_seed(0)
    hidden, W = torch.randn(100, 8, generator=generator), torch.randn(512, 8, generator=generator)
    labels = torch.randint(512, (100,), generator=generator)
    leaf = hidden.clone().requires_grad_()
    loss = lora.reference.linear_cross_entropy(leaf, W, labels, reduction="sum")
    loss.backward()
    found = answer(hidden, W, labels, 16)
    assert found is not None and len(found) == 2, "expected a pair (loss, gradient)."
    assert_close(torch.as_tensor(found[0]), loss.detach(), "the loss", rtol=1e-5)
    assert_close(found[1], leaf.grad, "the gradient", atol=1e-5)
    peak = workshop.peak_bytes(lambda: answer(hidden, W, labels, 16), [hidden, W, labels])
    whole = 4 * 100 * 512
    assert peak < whole, f"it has {peak:,} bytes in memory at once; all logits are {whole:,}: drop each chunk's."


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def chunked_loss(hidden, W, labels, chunk):
#     total, gradient = 0.0, torch.empty_like(hidden)
#     for start in range(0, len(hidden), chunk):
#         rows = slice(start, start + chunk)
#         z = hidden[rows] @ W.T
#         each = torch.arange(len(z))
#         total += (z.logsumexp(1) - z[each, labels[rows]]).sum()
#         dz = z.softmax(1)
#         dz[each, labels[rows]] -= 1
#         gradient[rows] = dz @ W
#     return total, gradient
# ```
# </details>
#
# **Exercise 2.** For `n` blocks with input `i` and saved `a`, which whole segment length `k` (a divisor of `n`) keeps
# the least, $\frac nk i + k a$? The smaller one, where two are equal.


# %% tags=["exercise"]
def best_segment(n, i, a):
    """The divisor k of n with the least n / k · i + k · a."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(best_segment)
def check_best_segment(answer):
    for n, i, a in ((32, 1, 9), (64, 1, 1), (36, 4, 1), (16, 1, 4)):
        found = answer(n, i, a)
        assert isinstance(found, int) and n % found == 0, f"{found!r} is not a divisor of {n}."
        costs = {k: n // k * i + k * a for k in range(1, n + 1) if n % k == 0}
        best = min(costs, key=lambda k: (costs[k], k))
        assert found == best, f"n = {n}, i = {i}, a = {a}: k = {found} keeps {costs[found]}, there is {costs[best]}."


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def best_segment(n, i, a):
#     return min((k for k in range(1, n + 1) if n % k == 0), key=lambda k: n // k * i + k * a)
# ```
#
# `min` takes the first of equals. The optimum is near $\sqrt{n i / a}$: for SmolLM2's 30 blocks and $a = 19\,i$ it is
# 1.3, and of whole numbers $k = 1$ keeps least.
# </details>
#
# **Exercise 3.** When is offloading free? A block's input of `tokens` × `features` in 2 bytes crosses a bus of `bus`
# bytes a second, while a block does about $24\,\text{tokens}\cdot\text{features}^2$ operations at `speed` a second
# (some $12\,\text{features}^2$ weights, two operations each). Return whether the copy takes no longer than the
# computing. (Does the number of tokens matter?)


# %% tags=["exercise"]
def offload_is_free(tokens, features, bus, speed):
    """Whether the copy of a block's input hides behind the block's arithmetic."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(offload_is_free)
def check_offload_is_free(answer):
    for tokens, features, bus, speed in (
        (8192, 4096, 50e9, 500e12),
        (8192, 512, 50e9, 500e12),
        (1, 1024, 50e9, 500e12),
    ):
        right = 2 * tokens * features / bus <= 24 * tokens * features**2 / speed
        found = answer(tokens, features, bus, speed)
        assert found is not None, "expected True or False."
        assert bool(found) == right, f"{tokens} tokens of {features} features: it says {found}."


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def offload_is_free(tokens, features, bus, speed):
#     return 2 / bus <= 24 * features / speed
# ```
#
# The tokens cancel. At 50 GB/s and 500 TFLOP/s the limit is some 830 features; models of billions of weights have
# thousands.
# </details>
#
# ## Where this lives in the code
#
# - [`lora/fast/loss.py`](../lora/fast/loss.py), [`lora/reference/loss.py`](../lora/reference/loss.py): the loss, twice.
# - [`lora/reference/checkpoint.py`](../lora/reference/checkpoint.py): checkpointing by two hooks of autograd.
# - [`lora/planner.py`](../lora/planner.py), [`lora/measure.py`](../lora/measure.py): plans, and what they are made
#   from.
# - Next: [trusting it, serving it](09_trust_and_serve.ipynb).
#
# ## References
#
# - T. Chen et al., *Training Deep Nets with Sublinear Memory Cost*, 2016.
# - V. Korthikanti et al., *Reducing Activation Recomputation in Large Transformer Models*, 2022: selective recompute.
# - E. Wijmans et al., *Cut Your Losses in Large-Vocabulary Language Models*, 2024.
