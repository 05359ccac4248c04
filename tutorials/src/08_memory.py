# %% [markdown]
# # 8. Memory
#
# **The question.** [Notebook 4](04_fine_tune.ipynb) ended with a bar that LoRA does not shrink: activations, in
# proportion to the number of tokens. What is in that bar, what can be left out, and what does leaving it out cost?

# %% tags=["setup"]
import itertools

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora
import workshop
from lora.measure import measure
from lora.planner import Problem
from lora.reference.checkpoint import Traffic, is_attention
from workshop import COLOURS, assert_close, axes, checks, finish

# %% [markdown]
# ## Predict
#
# 1. 1,024 tokens, a vocabulary of 128k, float32. How many bytes are the logits? How many numbers does the loss give
#    back?
# 2. A chain of 16 equal blocks, each saving $a$ bytes with an input of $a/4$. Peak memory with checkpointing in every
#    block, against none?
# 3. Of a block's forward, attention is the most expensive operation per byte it returns. Is it wise to compute it
#    again?
#
# ## The derivation, first part: a loss without logits
#
# One token's loss is $L = \log\sum_c e^{z_c} - z_y$ with $z = W h$. Its gradient is
#
# $$\frac{\partial L}{\partial z} = \mathrm{softmax}(z) - e_y, \qquad \frac{\partial L}{\partial h} =
# W^\top\bigl(\mathrm{softmax}(z) - e_y\bigr) .$$
#
# Everything about a token follows from its *own* logits. So take a few hundred tokens at a time: form their logits,
# read off loss and $\partial L/\partial h$ at once, in the *forward*, and drop the logits. What remains is one number a
# token and $\partial L/\partial h$, as large as $h$. The scalar that arrives in the backward only multiplies it.

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
print(f"2,048 tokens: {with_all} with all logits, {without} without")
logits = 4 * counts[-1] * VOCAB
assert at_most["reference"][-1] > 2 * logits and at_most["fast"][-1] < logits / 3  # several copies; a fraction
assert at_most["reference"][-1] / at_most["reference"][-2] > 1.9  # grows with the tokens
assert at_most["fast"][-1] / at_most["fast"][-2] < 1.1  # does not: a chunk is a chunk

# %% [markdown]
# ## Second part: checkpointing
#
# $n$ equal blocks, each with an input of $i$ bytes and saving $a$ for its backward. Kept until the backward:
#
# $$\text{none}: n a \qquad \text{every block}: n i + a \qquad \text{segments of } k:\ \tfrac nk\, i + k a .$$
#
# "Every block" keeps the inputs; when the backward comes to a block, it runs that block's forward again, and for a
# moment its $a$ is there. The price is one more forward, whatever the form: a third more
# arithmetic in full training, half as much again where frozen weights have no gradient. With
# segments, the least is at $k = \sqrt{n i / a}$ (Chen et al. 2016: memory like $\sqrt n$). In a transformer $a$ is
# many times $i$, so $k = 1$ is best.


# %%
class Block(nn.Module):
    """Saves four times its input, for the nonlinearity; its linear layers are frozen, and save nothing."""

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


def chain_peak(n: int, segment: int | None) -> tuple[int, torch.Tensor]:
    """(peak bytes, gradient of the first weight) of forward and backward."""
    torch.manual_seed(0)
    blocks = [Block() for _ in range(n)]
    for parameter in (p for block in blocks for p in block.parameters()):
        parameter.requires_grad_(False)
    x = torch.randn(512, 64, requires_grad=True)
    parameters = [p for block in blocks for p in block.parameters()]
    peak = workshop.peak_bytes(lambda: chain(blocks, x, segment).sum().backward(), [x, *parameters])
    return peak, x.grad


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

# %% [markdown]
# ## Selective: not everything again
#
# A block's forward saves many things; some are cheap to compute again and large (norms, activations), some are small
# and expensive. Attention's output is as small as the input, and costs a pass over all pairs of tokens. `selective`
# keeps it, and the second run gets it handed. We count how often attention really runs.


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
# ## What each mode keeps, measured
#
# `lora.measure` runs one step block by block and notes each tensor's memory from its birth to its end.

# %%
lora.for_training(top)
arguments = {"inputs_embeds": batch.hidden, "attention_mask": batch.mask}
found = measure(top, arguments, lambda **_: workshop.loss_of(top, batch))
modes = ("none", "selective", "recompute", "offload")
outside = sum(found.outside.values())  # the loss's: logits of the answers' tokens, as this is the reference
kept = {mode: (found.kept_by([mode] * BLOCKS) - outside) / 2**20 for mode in modes}
again = {"none": 0.0, "recompute": 1.0, "offload": 1.0}
first = found.blocks[0]
again["selective"] = 1 - first.attention_arithmetic / first.arithmetic

ax = axes(height=2.3, width=5.4)
ax.barh(list(kept), list(kept.values()), color=COLOURS)
ax.invert_yaxis()
finish(ax, f"kept between forward and backward, {BLOCKS} blocks, {batch.ids.numel()} tokens", "MiB")
for mode in modes:
    print(f"{mode:<10} keeps {kept[mode]:6.2f} MiB, and runs {again[mode]:.1%} of the blocks' products again")
assert kept["none"] > 5 * kept["selective"]
assert kept["selective"] > 1.5 * kept["recompute"] > 3 * kept["offload"]
assert again["selective"] < 1

# %% [markdown]
# (`offload` here is what a GPU would keep; on a CPU nothing moves, as we are about to see.) On so few tokens
# attention is a small part of the arithmetic: its share grows with the length of the sequence. Keep that in mind
# before you believe a table.
#
# **Offload** goes one step further: the inputs themselves wait in the host's memory. Here, on a CPU, they are there
# already, and a `Traffic` that counts copied bytes says so. On a GPU a block's input goes out while the next block
# computes, and comes back while the one after it runs backward.

# %%
traffic = Traffic()
x = torch.randn(64, 64, requires_grad=True)
lora.ops.checkpoint(Block(), x, offload=traffic).sum().backward()
assert (traffic.out, traffic.back, traffic.peak) == (0, 0, 0)

# %% [markdown]
# ## A budget, and a plan
#
# Blocks need not all do the same. A block near the *end* keeps its activations only briefly: its backward comes first.
# So, given a number of bytes, save memory in the first blocks and keep everything in the last.
# `lora.plan_checkpointing` finds the plan with the least arithmetic for a budget, exactly. We ask for every budget
# from the leanest to the most.

# %%
problem = Problem(found, ["none", "selective", "recompute"])
least, _ = problem.leanest()
most, _ = Problem(found, ["none"]).leanest()
budgets = [least + (most - least) * step // 24 for step in range(25)]
solutions = [problem.solve(budget) for budget in budgets]
forward = sum(block.arithmetic for block in found.blocks)
extra = [solution.cost[0] / forward for solution in solutions]

left, right = axes(2)
left.step([b / 2**20 for b in budgets], extra, where="post")
finish(left, "what a budget costs", "budget, MiB", "of the forward again")
numbers = {"recompute": 0, "selective": 1, "none": 2}
right.imshow([[numbers[mode] for mode in s.modes] for s in solutions], aspect="auto", cmap="Blues", origin="lower")
right.grid(False)
right.set_yticks([0, 12, 24], [f"{budgets[i] / 2**20:.0f}" for i in (0, 12, 24)])
finish(right, "its plan: recompute, selective, none (darkest)", "block", "budget, MiB")

print(f"budgets {least / 2**20:.1f} to {most / 2**20:.1f} MiB; "
      f"{found.loss_working / 2**20:.1f} MiB of each are the reference's loss, with all its logits")  # fmt: skip
assert all(a >= b for a, b in itertools.pairwise(extra))  # a larger budget never costs more
assert extra[-1] == 0 and extra[0] > 0.5
middle = solutions[12].modes
assert list(middle[1:]) == sorted(middle[1:], key=numbers.get)  # of equal blocks, it saves first and keeps last

plan = lora.plan_checkpointing(top, arguments, budgets[12], loss=lambda **_: workshop.loss_of(top, batch))
assert tuple(plan.values()) == middle
lora.for_training(top, plan)  # and this is how it is used
print(plan.summary())

# %% [markdown]
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
# `min` takes the first of equals. The optimum is near $\sqrt{n i / a}$: below 1 for a transformer, so $k = 1$.
# </details>
#
# **Exercise 3.** When is offloading free? A block's input of `tokens` × `features` in 2 bytes crosses a bus of `bus`
# bytes a second, while a block does about $24\,\text{tokens}\cdot\text{features}^2$ operations at `speed` a second.
# Return whether the copy takes no longer than the computing. (Does the number of tokens matter?)


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
# The tokens cancel. At 50 GB/s and 500 TFLOP/s the limit is some 830 features: any large model is above it.
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
