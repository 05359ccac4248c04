# %% [markdown]
# # 4. Fine-tune a real model
#
# **The question.** Everybody says that LoRA "needs less memory". Less of *what*? Weights, gradients, optimizer state,
# activations: which of the four shrinks, by how much, and what does QLoRA add?

# %% tags=["setup"]
import copy

import torch

import lora
import workshop
from lora.train.sampling import answer
from workshop import assert_close, axes, checks, docstrings, finish

# %% [markdown]
# ## Predict
#
# SmolLM2-135M in float32 is 538 MB of weights. For one training step with AdamW on about 200 tokens, fill in this table
# before you go on (MB; r = 16 on all linear layers makes 4.9 million trainable numbers):
#
# | | weights | gradients | optimizer | saved activations |
# |---|---|---|---|---|
# | full fine-tuning | 538 | ? | ? | ? |
# | LoRA | ? | ? | ? | ? |
# | QLoRA | ? | ? | ? | ? |
#
# ## The derivation
#
# Let $P$ be the number of weights and $p$ that of trainable numbers, 4 bytes each. Adam keeps two moving averages for
# every *trainable* number:
#
# $$\underbrace{4P}_{\text{weights}} + \underbrace{4p}_{\text{gradients}} + \underbrace{8p}_{\text{Adam}} +
# \text{activations}(\text{tokens}) .$$
#
# Full fine-tuning has $p = P$. With LoRA, $p = \sum r\,(\text{in} + \text{out})$ over the adapted layers. QLoRA
# stores the frozen weights in 4.127 bits instead of 32. Nothing in the formula says that *activations* shrink: a
# frozen layer still needs its weight to hand on $dx$, but no longer its input $x$ for $dW$; yet $dA$ needs that same
# $x$.

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
assert table["full"]["gradients"] == table["full"]["weights"] == 4 * P
assert table["full"]["optimizer"] == 8 * P

# %% [markdown]
# Now QLoRA, on a copy: first `quantize`, then `inject`. And LoRA on the model itself.

# %%
config = lora.LoRAConfig(r=16, lora_alpha=32)
small = lora.inject(lora.quantize(copy.deepcopy(model)), config)
table["QLoRA"] = ledger(lora.for_training(small), data[0])
del small

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
assert table["LoRA"]["gradients"] == 4 * p and table["LoRA"]["optimizer"] == 8 * p
assert p < 0.04 * P
assert table["QLoRA"]["gradients"] == table["LoRA"]["gradients"]
assert table["QLoRA"]["weights"] < 0.4 * table["LoRA"]["weights"]
assert table["LoRA"]["activations"] > 0.5 * table["full"]["activations"]  # activations do not shrink much

# %% [markdown]
# So: gradients and optimizer state all but vanish, by $p/P$. The weights stay until you quantise them; in this small
# model the embedding, a fifth of all numbers, stays in float32. **Activations hardly change**, and they grow with the
# tokens while everything else stays: [notebook 8](08_memory.ipynb) is about them.
#
# ## Train it

# %%
torch.manual_seed(0)
optimizer = torch.optim.AdamW(trainable, lr=1e-3)
losses = workshop.train(model, optimizer, data)
lora.for_inference(model)
loss_after = workshop.mean_loss(model, held)
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
# $W' = W + sBA$ is a plain weight: inference then costs what the base model costs. `merge` keeps the originals, so that
# `unmerge` gives them back *bit for bit*. (Subtracting $sBA$ again would not: try it in exercise 2.)

# %%
batch = held[0].arguments()
with torch.no_grad():
    adapted = model(**batch).logits
    originals = {n: w.clone() for n, w in model.named_parameters() if n.endswith("base_layer.weight")}
    errors = lora.merge(model)  # each layer's relative rounding error
    merged = model(**batch).logits
    lora.unmerge(model)
    again = model(**batch).logits

print(f"merging moved a logit by at most {float((merged - adapted).abs().max()):.1e}; they reach {adapted.max():.0f}")
print(f"rounding of the merged weights: {max(errors.values()):.1e} of their norm, at most")
assert len(errors) == 210 and max(errors.values()) < 1e-7
assert (merged - adapted).abs().max() < 1e-2
assert torch.equal(again, adapted)
assert all(torch.equal(w, originals[n]) for n, w in model.named_parameters() if n in originals)

# %% [markdown]
# ## Two adapters, one base
#
# A second adapter learns another task on the same frozen weights: the same sentences, IN CAPITALS. Then each adapter is
# measured on both tasks. `set_adapter` chooses; nothing is loaded or copied.


# %%
def shouted(pairs):
    """The same pairs, answered in capitals."""
    return [docstrings.Pair(pair.package, pair.signature, pair.sentence.upper()) for pair in pairs]


loud = workshop.batches(tokenizer, shouted(train_pairs[:24]), 4)
loud_held = workshop.batches(tokenizer, shouted(held_pairs[:8]), 8)

lora.add_adapter(model, config, "capitals")
lora.set_adapter(model, "capitals")
lora.for_training(model)
workshop.train(model, torch.optim.AdamW(lora.trainable_parameters(model), lr=1e-3), loud)
lora.for_inference(model)

grid = {}
for name in ("default", "capitals"):
    lora.set_adapter(model, name)
    grid[name] = [workshop.mean_loss(model, held[:1]), workshop.mean_loss(model, loud_held)]
    print(f"adapter {name:<9} loss on sentences {grid[name][0]:.2f}, on capitals {grid[name][1]:.2f}")

lora.set_adapter(model, "default")
with torch.no_grad():
    assert torch.equal(model(**batch).logits, adapted)  # back to the first adapter: bit for bit
with lora.disable_adapters(model), torch.no_grad():
    assert abs(workshop.mean_loss(model, held) - loss_before) < 1e-6  # and the base is what it was
assert grid["default"][0] < grid["capitals"][0] and grid["capitals"][1] < grid["default"][1]

# %% [markdown]
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
# A third or more of the weights are other numbers afterwards. `lora.unmerge` puts the very parameter back instead.
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
