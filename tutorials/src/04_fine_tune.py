# %% [markdown]
# # 4. Fine-tune a real model
#
# **The question.** Everybody says that LoRA "needs less memory". Less of *what*? Weights, gradients, optimizer state,
# activations: which of the four shrinks, by how much, and what does QLoRA add?

# %% tags=["setup"]
import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

import lora
import workshop
from lora.train.sampling import answer
from workshop import COLOURS, assert_close, axes, checks, docstrings, finish

# %% [markdown]
# ## Predict
#
# SmolLM2-135M in float32 is 538 MB of weights. For one training step with AdamW on 264 tokens, fill in this table
# before you go on (MB; r = 16 on the seven linear layers of every block makes 4.9 million trainable numbers). *Saved
# activations* are what the forward keeps for the backward.
#
# | | weights | gradients | optimizer | saved activations |
# |---|---|---|---|---|
# | full fine-tuning | 538 | ? | ? | ? |
# | LoRA | ? | ? | ? | ? |
# | QLoRA | ? | ? | ? | ? |
#
# Two more guesses. Does *merging* an adapter into the weights change the outputs? And what does an adapter trained on
# one task do to another?
#
# ## The derivation
#
# Let $P$ be the number of the model's weights and $p$ that of trainable numbers, 4 bytes each. Adam keeps two moving
# averages for every *trainable* number. Full fine-tuning trains the $P$ weights themselves, $p = P$. LoRA freezes
# them and adds $p = \sum r\,(\text{in} + \text{out})$ numbers, over the adapted layers:
#
# $$\underbrace{4P \text{, with LoRA } 4(P + p)}_{\text{weights}} + \underbrace{4p}_{\text{gradients}} +
# \underbrace{8p}_{\text{Adam}} + \text{activations}(\text{tokens}) .$$
#
# QLoRA stores the frozen weights of the adapted layers in a 4-bit format, NF4 (4.127 bits a number with its scales,
# instead of 32), and decodes each when it is used; [notebook 6](06_nf4_qlora.ipynb) takes it apart. Nothing in the
# formula says that *activations* shrink: a frozen layer no longer needs its input $x$ for $dW$; yet $dA$ needs that
# same $x$. What lives only inside one operation (a decoded weight, say) is not in the formula.
#
# Everything below is one model, one seed and one short run.

# %%
model, tokenizer = lora.load("smollm2-135m-instruct")
train_pairs, held_pairs = workshop.pairs(48, 16)
data = workshop.batches(tokenizer, train_pairs, 4)
held = workshop.batches(tokenizer, held_pairs, 8)
prompts = [docstrings.question(pair.signature) for pair in held_pairs[:3]]
before = answer(model, tokenizer, prompts, max_new_tokens=20)
loss_before = workshop.mean_loss(model, held)


def ledger(model, batch) -> dict[str, int]:
    """One real training step with a learning rate of zero: what is in memory for it, by kind."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    owned = [*model.parameters(), *model.buffers()]
    model.train()
    activations = workshop.saved_bytes(lambda: workshop.loss_of(model, batch), owned)
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0)
    workshop.train(model, optimizer, [batch])
    state = [t for s in optimizer.state.values() for t in s.values() if t.dim()]  # not the step counters
    found = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in trainable),
        "optimizer": sum(t.nbytes for t in state),
        "activations": activations,
    }
    optimizer.zero_grad()
    return found


model.requires_grad_(True)
table = {"full": ledger(model, data[0])}
P = sum(p.numel() for p in model.parameters())
assert data[0].ids.numel() == 264
assert table["full"]["gradients"] == table["full"]["weights"] == 4 * P
assert table["full"]["optimizer"] == 8 * P

for name, parameter in model.named_parameters():  # for later: what is saved if only the seven linear layers train
    parameter.requires_grad_("_proj" in name)
of_linears = workshop.saved_bytes(lambda: workshop.loss_of(model, data[0]), [*model.parameters(), *model.buffers()])

# %% [markdown]
# Now QLoRA, on a copy: first `quantize`, then `inject`. And LoRA on the model itself.

# %%
config = lora.LoRAConfig(r=16, lora_alpha=32)
small = lora.quantize(copy.deepcopy(model))
quantised = [m for m in small.modules() if type(m).__name__ == "NF4Linear"]
bits = (
    8
    * sum(p.nbytes for m in quantised for p in m.parameters())
    / sum(m.in_features * m.out_features for m in quantised)
)
print(f"{len(quantised)} weights in {bits:.3f} bits a number")
assert len(quantised) == 210 and abs(bits - 4.127) < 2e-3
table["QLoRA"] = ledger(lora.for_training(lora.inject(small, config)), data[0])
del small, quantised

lora.inject(model, config)
lora.for_training(model)
trainable = lora.trainable_parameters(model)
print(trainable)
table["LoRA"] = ledger(model, data[0])

# %%
kinds = list(table["full"])
print(f"{'MB':<8}" + "".join(f"{kind:>13}" for kind in kinds) + f"{'together':>13}")
for name in ("full", "LoRA", "QLoRA"):
    row = table[name]
    print(f"{name:<8}" + "".join(f"{row[kind] / 1e6:13.1f}" for kind in kinds) + f"{sum(row.values()) / 1e6:13.1f}")

ax = axes(width=6.2, height=2.4)
left = [0.0] * 3
for kind in kinds:
    sizes = [table[name][kind] / 1e6 for name in ("full", "LoRA", "QLoRA")]
    ax.barh(["full", "LoRA", "QLoRA"], sizes, left=left, label=kind)
    left = [a + b for a, b in zip(left, sizes, strict=True)]
ax.invert_yaxis()
finish(ax, f"one training step on {data[0].ids.numel()} tokens", "MB", legend=True)

p = trainable.trainable
embedding = model.get_input_embeddings().weight.nbytes
half = workshop.batch(tokenizer, train_pairs[:2])
of_half = workshop.saved_bytes(lambda: workshop.loss_of(model, half), [*model.parameters(), *model.buffers()])
print(f"p / (P + p) = {p / (P + p):.2%}; the embedding, {embedding / (4 * P):.0%} of the weights, stays in float32")
print(f"activations of LoRA: {table['LoRA']['activations'] / table['full']['activations']:.0%} of full fine-tuning's; "
      f"for {half.ids.numel()} tokens {of_half / 1e6:.1f} MB")  # fmt: skip
assert table["LoRA"]["weights"] == 4 * (P + p)
assert table["LoRA"]["gradients"] == 4 * p and table["LoRA"]["optimizer"] == 8 * p and p < 0.04 * P
assert all(table["QLoRA"][kind] == table["LoRA"][kind] for kind in ("gradients", "optimizer"))
assert table["QLoRA"]["weights"] < 0.4 * table["LoRA"]["weights"] and 0.2 < embedding / (4 * P) < 0.22
assert table["LoRA"]["activations"] > 0.8 * table["full"]["activations"]  # activations hardly shrink
others, thin = table["full"]["activations"] - of_linears, 4 * data[0].ids.numel() * 210 * config.r
print(f"{others / 1e6:.1f} MB less for norms and embedding, {thin / 1e6:.1f} MB more for the 210 thin s x Aᵀ")
assert table["LoRA"]["activations"] == table["full"]["activations"] - others + thin
assert abs(table["QLoRA"]["activations"] / table["LoRA"]["activations"] - 1) < 0.01
assert half.ids.numel() < data[0].ids.numel() and of_half < 0.8 * table["LoRA"]["activations"]  # they grow with tokens

# %% [markdown]
# **The answer.** Gradients and optimizer state all but vanish, from 1,614 MB to 59 MB: they go from $P$ to $p$. The
# model's weights stay, with 20 MB of $A$ and $B$ beside them, until you quantise them, which leaves 188 MB of 558; in
# this small model the embedding, a fifth of all numbers, stays in float32. **Activations hardly change**, from 391 MB
# to 357 MB. The frozen linear layers save what they saved before, their $x$, now for $dA$. What is spared, 38 MB, is
# what the norms and the embedding (which is the head too) kept for gradients of their own; what is added, 3.5 MB, are
# the $s\,xA^\top$ for $dB$. And activations grow with the tokens while everything else stays: [notebook
# 8](08_memory.ipynb) is about them.
#
# ## Train it
#
# Twelve steps of four examples each, and each example once. One batch's loss often differs more from the next
# one's than a step changes it, so the plot shows each step's loss beside the base model's on the same batch.
# Below it are three held-out signatures with the model's answers before and after. Answers are cut at 20 tokens, so
# the long ones end in the middle of a sentence.

# %%
with lora.disable_adapters(model):
    losses_before = [workshop.mean_loss(model, [each]) for each in data]
torch.manual_seed(0)
optimizer = torch.optim.AdamW(trainable, lr=1e-3)
losses = workshop.train(model, optimizer, data)
lora.for_inference(model)
loss_after = workshop.mean_loss(model, held)

ax = axes(width=5.4)
ax.plot(losses_before, "s--", color=COLOURS[5], label="base model")
ax.plot(losses, "o-", color=COLOURS[0], label="LoRA, before its step on the batch")
ax.fill_between(range(len(data)), losses, losses_before, color=COLOURS[0], alpha=0.1)
ax.set_ylim(top=max(losses_before) + 0.6)  # room for the legend
finish(ax, "loss of each batch of the run", "step", "nats a token", legend=True)
gaps = [old - new for old, new in zip(losses_before, losses, strict=True)]
assert abs(gaps[0]) < 1e-4  # B is zero: the first batch meets the base model
assert min(gaps[6:]) > 0.1  # in the second half every batch, not seen before, is easier than it was

after = answer(model, tokenizer, prompts, max_new_tokens=20)

print(f"held-out loss {loss_before:.2f} -> {loss_after:.2f} nats a token, after {len(data)} steps\n")
for pair, old, new in zip(held_pairs, before, after, strict=False):
    print(f"{pair.signature}\n   before: {' '.join(old.split())} …\n   after:  {' '.join(new.split())}")
    print(f"   real:   {pair.sentence}\n")
assert loss_after < loss_before - 0.3
assert after != before

# %% [markdown]
# ## Merge
#
# $W' = W + sBA$ is a plain weight: inference then takes the base model's operations, no more. `merge` keeps the
# originals, so that `unmerge` gives them back *bit for bit*. (Subtracting $sBA$ again would not: try it in exercise 2.)
#
# `merge` makes the sum in float32 and rounds it once, to the type of the weight. It returns what that last rounding
# costs for each layer. For float32 weights it is *exactly* zero: there is nothing left to round. Two roundings remain
# that it does not count, both of float32: the sum itself, which we compare with float64 below, and the forward, which
# sums in another order, $xW'^\top$ instead of $xW^\top + s(xA^\top)B^\top$. They are why the logits, the model's
# scores of the next token, move at all. With bfloat16 weights (16 bits; rounding to it changes a number by up to
# 1/256 of itself) the last rounding is no longer zero: the last line does it to one layer.

# %%
batch = held[0].arguments()


@torch.no_grad()
def forward() -> tuple[torch.Tensor, int]:
    """(logits, operations of all matrix products)."""
    with FlopCounterMode(display=False) as counter:
        logits = model(**batch).logits
    return logits, counter.get_total_flops()


def error_of(weight: torch.Tensor, exact: torch.Tensor) -> float:
    """The difference's norm over the exact weight's."""
    return float((weight.double() - exact).norm() / exact.norm())


with lora.disable_adapters(model):
    base, of_base = forward()
adapted, of_adapted = forward()
layer = model.model.layers[0].mlp.down_proj
A, B = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
W = layer.base_layer.weight.clone()
originals = {n: w.clone() for n, w in model.named_parameters() if n.endswith("base_layer.weight")}

errors = lora.merge(model)  # by layer
of_sum = error_of(layer.base_layer.weight, W.double() + config.lora_alpha / config.r * B.double() @ A.double())
merged, of_merged = forward()
lora.unmerge(model)
again, _ = forward()

W_half = W.bfloat16()
stored = lora.ops.merge_weight(lora.Projection(W_half, None, A, B, config.lora_alpha / config.r))  # what merge calls
of_bfloat16 = error_of(stored, W_half.double() + config.lora_alpha / config.r * B.double() @ A.double())

moved, by_adapter = (float((each - adapted).abs().max()) for each in (merged, base))
print(f"operations, the base model's being 1: adapter {of_adapted / of_base:.3f}, merged {of_merged / of_base:.3f}")
print(f"logits reach {adapted.max():.0f}; the adapter moves one by {by_adapter:.0f} at most, merging by {moved:.0e}")
print("error of the merged weights, relative to their norm:")
print(f"   as merge counts it, float32 stored as float32: {'exactly 0' if not any(errors.values()) else errors}")
print(f"   the float32 sum against float64's, one layer:  {of_sum:.0e}")
print(f"   stored as bfloat16, the same layer:            {of_bfloat16:.0e}")
assert len(errors) == 210 and not any(errors.values()) and 0 < of_sum < 1e-7
assert stored.dtype == torch.bfloat16 and 1e-4 < of_bfloat16 < 4e-3
assert of_merged == of_base < of_adapted
assert 0 < moved < 1e-2 < by_adapter
assert torch.equal(again, adapted)
assert all(torch.equal(w, originals[n]) for n, w in model.named_parameters() if n in originals)

# %% [markdown]
# **Merging** does change the outputs: by 8e-5 at most, where the adapter itself changes them by up to 18. In float32
# that is rounding and nothing else.
#
# ## Two adapters, one base
#
# A second adapter learns another task on the same frozen weights: the same sentences, IN CAPITALS, in six steps. (The
# first has the name `default`.) Then the base model and each adapter are measured on both tasks, on the same 16
# held-out pairs. `set_adapter` chooses; no weight is loaded or copied.
#
# **Compare within a task, never across**: capitals are cut into other and more tokens, and nats a token of one text say
# nothing beside nats a token of another.


# %%
def shouted(pairs):
    """The same pairs, answered in capitals."""
    return [docstrings.Pair(pair.package, pair.signature, pair.sentence.upper()) for pair in pairs]


loud = workshop.batches(tokenizer, shouted(train_pairs[:24]), 4)
loud_held = workshop.batches(tokenizer, shouted(held_pairs), 8)
places = {n: w.data_ptr() for n, w in model.named_parameters()}

lora.add_adapter(model, config, "capitals")
lora.set_adapter(model, "capitals")
lora.for_training(model)
workshop.train(model, torch.optim.AdamW(lora.trainable_parameters(model), lr=1e-3), loud)
lora.for_inference(model)

grid = {"none": [loss_before], "default": [loss_after], "capitals": [workshop.mean_loss(model, held)]}  # two from above
with lora.disable_adapters(model):
    grid["none"].append(workshop.mean_loss(model, loud_held))
    assert torch.equal(forward()[0], base)  # the base is what it was: bit for bit
for name in ("capitals", "default"):
    lora.set_adapter(model, name)
    grid[name].append(workshop.mean_loss(model, loud_held))
assert torch.equal(forward()[0], adapted)  # and so is the first adapter
assert all(w.data_ptr() == places[n] for n, w in model.named_parameters() if n in places)

counts = [sum(int((each.labels[:, 1:] != workshop.IGNORED).sum()) for each in task) for task in (held, loud_held)]
print(f"{'adapter':<10}{'sentences':>11}{'CAPITALS':>11}   nats a token, of {counts[0]} and {counts[1]} tokens")
for name, row in grid.items():
    print(f"{name:<10}{row[0]:>11.2f}{row[1]:>11.2f}")
for number, (ax, task) in enumerate(zip(axes(2, width=3.4, height=2.4), ("sentences", "CAPITALS"), strict=True)):
    ax.bar(list(grid), [row[number] for row in grid.values()], color=[COLOURS[5], *COLOURS[:2]])
    ax.set_ylim(0, 4)
    finish(ax, f"held-out loss on {task}", "adapter", "nats a token")

assert grid["default"][0] < grid["capitals"][0] and grid["capitals"][1] < grid["default"][1]  # each is best at its own
assert grid["default"][1] < grid["none"][1] and grid["capitals"][0] < grid["none"][0]  # and both help at the other's
assert counts[1] > counts[0]

# %% [markdown]
# Read each column by itself. Each adapter is the best at its own task. In this run, and that answers the last guess,
# each also helps at the other's: 3.60 falls to 3.36, and 3.38 to 3.15. The two tasks share their sentences' words,
# and two tasks that share nothing may end otherwise.
#
# ## Exercises
#
# **Exercise 1.** Predict the ledger without running anything: bytes of (gradients, Adam's state) for LoRA of rank `r`
# on linear layers of the given shapes `[(out, in), ...]`, in float32.


# %% tags=["exercise"]
def ledger_of(shapes, r):
    """(bytes of gradients, bytes of Adam's two averages)."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(ledger_of)
def check_ledger_of(answer):
    linears = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(4, 9, bias=False))
    lora.inject(linears, lora.LoRAConfig(r=3, target_modules=["0", "1"]))
    optimizer = torch.optim.AdamW(lora.trainable_parameters(linears))
    linears(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    gradients = sum(p.grad.nbytes for p in linears.parameters() if p.grad is not None)
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim())
    found = answer([(4, 6), (9, 4)], 3)
    assert found is not None and len(found) == 2, "expected a pair."
    assert tuple(found) == (gradients, state), f"it is {tuple(found)}, measured were {(gradients, state)}."


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def ledger_of(shapes, r):
#     numbers = sum(r * (out + in_) for out, in_ in shapes)
#     return 4 * numbers, 8 * numbers
# ```
# </details>
#
# **Exercise 2.** Why keep the originals? Write a merge and an unmerge by arithmetic for a bfloat16 weight `W`: add the
# float32 update `D` (in float32, rounded once to bfloat16), then subtract it again the same way. Return the share of
# weights that do *not* come back.


# %% tags=["exercise"]
def share_changed(W, D):
    """The share of entries of W (bfloat16) that adding D and subtracting it again changes."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(share_changed)
def check_share_changed(answer):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(400, 400, generator=generator).bfloat16()
    assert float(answer(W, torch.zeros(400, 400))) == 0, "with no update nothing changes."
    found = float(answer(W, 0.3 * torch.randn(400, 400, generator=generator)))
    assert 0.1 < found < 0.9, f"the share is {found:.3f}: was the sum rounded to bfloat16 both times?"
    tiny = float(answer(W, torch.full((400, 400), 1e-9)))
    assert tiny < 0.01, f"an update far below a rounding changed {tiny:.1%}: it should be lost without a trace."


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def share_changed(W, D):
#     merged = (W.float() + D).bfloat16()
#     back = (merged.float() - D).bfloat16()
#     return float((back != W).float().mean())
# ```
#
# Some of the weights are other numbers afterwards: the larger the update, the more. `lora.unmerge` puts the very
# parameter back instead.
# </details>
#
# **Exercise 3.** Several adapters may be active at once: their updates add. Given two adapters as `(A, B, s)`, return
# one pair `(A, B)` of stacked factors with scaling 1 that does the same as both together.


# %% tags=["exercise"]
def stacked(first, second):
    """(A, B) with B A = s₁ B₁ A₁ + s₂ B₂ A₂."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(stacked)
def check_stacked(answer):
    generator = torch.Generator().manual_seed(0)
    A1, A2, B1, B2 = (torch.randn(*shape, generator=generator) for shape in ((2, 6), (3, 6), (5, 2), (5, 3)))
    found = answer((A1, B1, 0.5), (A2, B2, 2.0))
    assert found is not None and len(found) == 2, "expected a pair (A, B)."
    A, B = found
    assert A.shape == (5, 6) and B.shape == (5, 5), f"A is {list(A.shape)} and B {list(B.shape)}, expected rank 5."
    assert_close(B @ A, 0.5 * B1 @ A1 + 2.0 * B2 @ A2, "B A", atol=1e-5)


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def stacked(first, second):
#     (A1, B1, s1), (A2, B2, s2) = first, second
#     return torch.cat([A1, A2]), torch.cat([s1 * B1, s2 * B2], dim=1)
# ```
# </details>
#
# ## Where this lives in the code
#
# - [`lora/reference/inject.py`](../lora/reference/inject.py), [`lora/reference/merge.py`](../lora/reference/merge.py),
#   [`lora/adapters.py`](../lora/adapters.py): what this notebook called.
# - [`lora/train/`](../lora/train/job.py): the same as a job that survives a crash: `lora train --help`.
# - Next: [rank, alpha, initialisation](05_rank_alpha_init.ipynb).
#
# ## References
#
# - E. Hu et al., *LoRA*, 2021; T. Dettmers et al., *QLoRA*, 2023.
# - D. Kingma and J. Ba, *Adam*, 2014; I. Loshchilov and F. Hutter, *Decoupled Weight Decay Regularization*, 2017.
