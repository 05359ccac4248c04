# %% [markdown]
# # 5. Rank, alpha, initialisation
#
# **The question.** `r`, `lora_alpha`, a learning rate, `use_rslora`, LoRA+, PiSSA, OLoRA, DoRA: a page of knobs.
# Which of them change what can be learnt, which only how fast, and which are the learning rate in disguise?

# %% tags=["setup"]
import copy

import torch

import lora
import workshop
from lora import Projection
from workshop import COLOURS, assert_close, axes, checks, finish

# %% [markdown]
# ## Predict
#
# 1. With `scaling = alpha / r` and `alpha` fixed, you raise `r` from 4 to 256. Does the first step of gradient descent
#    lower the loss more, equally, or less?
# 2. PiSSA starts with $s\,BA$ equal to the largest singular part of $W$. Is the output at step 0 still the base
#    model's?
# 3. At the same learning rate, which of LoRA, LoRA+, PiSSA, OLoRA and DoRA is lowest after a dozen steps?
#
# ## The derivation: alpha over what?
#
# One step of gradient descent from $B = 0$ moves $B$ by $-\eta\,dB$ with $dB = s\,GA^\top$
# ([notebook 2](02_twenty_lines.ipynb)). To first order the loss falls by
#
# $$\eta\,\lVert dB\rVert^2 = \eta\, s^2\, \lVert G A^\top\rVert^2 .$$
#
# $A$'s entries are independent with variance $1/(3\,\text{in})$ (Kaiming's uniform start), so each of its $r$ rows adds
# the same amount on average: $\mathbb E\lVert GA^\top\rVert^2 = \frac{r}{3\,\text{in}}\lVert G\rVert^2$. Hence
#
# $$\text{decrease} \;\propto\; s^2 r = \begin{cases} \alpha^2 / r & s = \alpha / r \\ \alpha^2 & s = \alpha/\sqrt r
# \end{cases}$$
#
# With $\alpha/r$ a larger rank learns *more slowly*, though it can express more. That is the argument for rsLoRA
# (Kalajdzievski 2023). It is about plain gradient descent; Adam divides gradients by their size, which changes the
# exponent, so we measure both.

# %%
BLOCKS = 3
model, tokenizer = lora.load("smollm2-135m-instruct")
train_pairs, held_pairs = workshop.pairs(48, 16)
data = workshop.inputs_of(model, workshop.batches(tokenizer, train_pairs, 4), BLOCKS)
held = workshop.inputs_of(model, workshop.batches(tokenizer, held_pairs, 8), BLOCKS)
top = workshop.last_blocks(model, BLOCKS)
del model
base_loss = workshop.mean_loss(top, held)


def injected(seed: int = 0, **choices):
    """A copy of the model with adapters, ready to train."""
    torch.manual_seed(seed)
    return lora.for_training(lora.inject(copy.deepcopy(top), lora.LoRAConfig(**choices)))


def decrease(**choices) -> float:
    """‖dB‖² over all layers: what one small step of gradient descent gains, for a learning rate of 1."""
    tuned = injected(**choices)
    workshop.loss_of(tuned, data[0]).backward()
    return sum(float(p.grad.square().sum()) for n, p in tuned.named_parameters() if "lora_B" in n)


ranks = [1, 4, 16, 64, 256]
exclude = ["k_proj", "v_proj"]  # they have 192 rows: no rank of 256 there
plain = [decrease(r=r, lora_alpha=16, exclude_modules=exclude) for r in ranks]
rooted = [decrease(r=r, lora_alpha=16, exclude_modules=exclude, use_rslora=True) for r in ranks]

ax = axes()
ax.loglog(ranks, plain, "o-", label=r"$\alpha/r$")
ax.loglog(ranks, rooted, "s-", label=r"$\alpha/\sqrt{r}$ (rsLoRA)")
ax.loglog(ranks, [plain[2] * 16 / r for r in ranks], ":", color=COLOURS[5], label="slope −1")
finish(ax, "gradient descent's first step, real model", "r", r"$\Vert dB\Vert^2$", legend=True)

logs = torch.tensor([plain, rooted]).log()
slopes = (logs[:, -1] - logs[:, 1]) / torch.tensor(ranks[-1] / ranks[1]).log()
print(f"slope with alpha / r: {slopes[0]:.2f}, with alpha / √r: {slopes[1]:.2f}")
assert abs(slopes[0] + 1) < 0.25 and abs(slopes[1]) < 0.25

# %% [markdown]
# ## Under Adam
#
# Twelve steps of AdamW for each choice, all with the same learning rate and the same data in the same order.


# %%
def run(lr: float = 5e-4, ratio: float = 1.0, **choices) -> dict:
    """Twelve steps; the losses on the way, and on held-out text at the end."""
    tuned = injected(**choices)
    with torch.no_grad():
        start = float(workshop.loss_of(tuned.eval(), data[0]))
    groups = lora.loraplus_groups(tuned, lr=lr, ratio=ratio)
    losses = workshop.train(tuned.train(), torch.optim.AdamW(groups), data)
    return {"start": start, "losses": losses, "held": workshop.mean_loss(tuned, held)}


scaled = {(r, rooted): run(r=r, lora_alpha=16, use_rslora=rooted) for r in (4, 64) for rooted in (False, True)}
for (r, rooted), result in scaled.items():
    s = lora.LoRAConfig(r=r, lora_alpha=16, use_rslora=rooted).scaling_of("any")
    print(f"r = {r:2}, alpha / {'√r' if rooted else 'r '} = {s:5.2f}: held-out loss {result['held']:.3f}")
print(f"before: {base_loss:.3f}")

final = {key: result["held"] for key, result in scaled.items()}
assert all(result["held"] < base_loss for result in scaled.values())
assert abs(final[64, False] - final[4, False]) < 0.05  # with alpha / r, 16 times the rank bought nothing
assert final[64, True] < min(final[4, True], final[64, False])  # with alpha / √r it did

# %% [markdown]
# Under Adam the effect is milder than gradient descent's factor of $r$: with $\alpha/r$, rank 64 ends about where
# rank 4 does, with $\alpha/\sqrt r$ it goes further. But read this with care. $\alpha$, the learning rate and the
# kind of scaling are nearly *one* knob: they all say how far the first steps go. A comparison at a single learning
# rate tells you which choice goes furthest there, not which is best.
#
# ## Other starts, other steps
#
# | | what it changes | equation |
# |---|---|---|
# | LoRA+ | $B$'s learning rate | $\eta_B = \lambda\,\eta_A$, here $\lambda = 16$ |
# | PiSSA | the start | $s\,B_0A_0 = W_r$, the best rank-$r$ part of $W$ |
# | OLoRA | the start | $B_0 = Q_{:,:r},\ A_0 = R_{:r}$ of $W = QR$ |
# | DoRA | the function | $W' = m \odot (W + s\,BA)\,/\,\lVert W + s\,BA\rVert_{\text{row}}$ |
#
# PiSSA and OLoRA start from a non-zero product and take it off the base: the update is $s\,(BA - B_0A_0)$.

# %%
methods = {
    "LoRA": {},
    "LoRA+": {"ratio": 16.0},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "DoRA": {"use_dora": True},
}
results = {name: run(r=8, lora_alpha=8, **choices) for name, choices in methods.items()}

left, right = axes(2)
plain_losses = torch.tensor(results["LoRA"]["losses"])
for name, result in results.items():
    left.plot(torch.tensor(result["losses"]) - plain_losses, label=name)  # batches differ more than methods do
finish(left, "training loss less LoRA's on the same batch", "step", "nats a token", legend=True)
right.barh(list(results), [base_loss - result["held"] for result in results.values()], color=COLOURS)
right.invert_yaxis()
finish(right, "gain on held-out text after 12 steps", "nats a token")

for name, result in results.items():
    print(f"{name:<6} start {result['start']:.4f}, held-out {base_loss:.3f} -> {result['held']:.3f}")
starts = [result["start"] for result in results.values()]
assert max(starts) - min(starts) < 1e-4  # prediction 2: every one of them starts at the base model
assert all(result["held"] < base_loss for result in results.values())
assert results["LoRA+"]["held"] < results["LoRA"]["held"]
assert results["PiSSA"]["held"] < results["LoRA"]["held"]

# %% [markdown]
# LoRA is last here because its first steps are the shortest: $B$ is zero and reads a small $Ax$. LoRA+ makes $B$'s
# steps longer. PiSSA and OLoRA start with factors as large as $W$'s own directions, so that the same $\eta$ moves the
# product further. DoRA adds one number a row. How much of a lead is left at each method's *own* best learning rate?

# %%
tuned = {lr: run(lr=lr, r=8, lora_alpha=8)["held"] for lr in (2e-3, 5e-3)}
best = min(tuned, key=tuned.get)
print("LoRA, held-out loss by learning rate:", {5e-4: round(results["LoRA"]["held"], 3)} | {
    lr: round(value, 3) for lr, value in tuned.items()})  # fmt: skip
assert tuned[best] < results["LoRA"]["held"]
lead = results["LoRA"]["held"] - results["LoRA+"]["held"]
left_over = tuned[best] - results["LoRA+"]["held"]
assert left_over < 0.5 * lead  # LoRA+'s lead was the learning rate, or most of it

# %% [markdown]
# At four times the learning rate plain LoRA stands where LoRA+ and PiSSA stood: here, their lead *was* the learning
# rate. Papers that compare at one learning rate compare learning rates. Tune each method by itself before you believe
# a bar chart, this one included.
#
# ## Exercises
#
# **Exercise 1.** The scaling, as a function.


# %% tags=["exercise"]
def scaling(alpha, r, use_rslora):
    """What s is in s · B A."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(scaling)
def check_scaling(answer):
    for alpha, r in ((16, 4), (8, 64), (1, 1)):
        for rooted in (False, True):
            right = lora.LoRAConfig(r=r, lora_alpha=alpha, use_rslora=rooted).scaling_of("any")
            found = answer(alpha, r, rooted)
            assert found is not None and abs(found - right) < 1e-9, (
                f"scaling({alpha}, {r}, use_rslora={rooted}) is {found}, expected {right}."
            )


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def scaling(alpha, r, use_rslora):
#     return alpha / r**0.5 if use_rslora else alpha / r
# ```
# </details>
#
# **Exercise 2.** PiSSA's start: factors `A`, `B` with $s\,BA = W_r$, sharing the singular values equally between them.


# %% tags=["exercise"]
def pissa(W, r, s):
    """(A [r, in], B [out, r]) with s · B A the best rank-r part of W."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(pissa)
def check_pissa(answer):
    W = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    for r, s in ((2, 1.0), (3, 0.25)):
        found = answer(W, r, s)
        assert found is not None and len(found) == 2, "expected a pair (A, B)."
        A, B = found
        assert A.shape == (r, 7) and B.shape == (9, r), f"A is {list(A.shape)}, B {list(B.shape)}."
        assert_close(s * B @ A, U[:, :r] * S[:r] @ Vh[:r], f"s · B A at s = {s}", atol=1e-5)
        assert_close(B.T @ B, A @ A.T, "Bᵀ B against A Aᵀ (equal sharing)", atol=1e-4)


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def pissa(W, r, s):
#     U, S, Vh = torch.linalg.svd(W, full_matrices=False)
#     root = (S[:r] / s).sqrt()
#     return root[:, None] * Vh[:r], U[:, :r] * root
# ```
#
# The project's is in `lora/initialise.py`, the same two lines.
# </details>
#
# **Exercise 3.** DoRA's weight: every *row* of $W + s\,BA$ is scaled to the length that `m` says.


# %% tags=["exercise"]
def dora_weight(W, A, B, s, m):
    """m ⊙ (W + s B A) / ‖W + s B A‖, one norm for each row (output feature)."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(dora_weight)
def check_dora_weight(answer):
    generator = torch.Generator().manual_seed(2)
    W, A, B, m = (torch.randn(*shape, generator=generator) for shape in ((6, 5), (2, 5), (6, 2), (6,)))
    found = answer(W, A, B, 0.5, m.abs())
    assert_close(found, lora.reference.merge_weight(Projection(W, None, A, B, 0.5, m.abs())), "W'", atol=1e-5)


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def dora_weight(W, A, B, s, m):
#     V = W + s * B @ A
#     return m[:, None] * V / V.norm(dim=1, keepdim=True)
# ```
# </details>
#
# ## Where this lives in the code
#
# - [`lora/config.py`](../lora/config.py): every knob, its default and its check.
# - [`lora/initialise.py`](../lora/initialise.py), [`lora/reference/dora.py`](../lora/reference/dora.py),
#   [`lora/adapters.py`](../lora/adapters.py) (`loraplus_groups`).
# - Next: [NF4 and QLoRA](06_nf4_qlora.ipynb).
#
# ## References
#
# - D. Kalajdzievski, *A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA*, 2023.
# - S. Hayou et al., *LoRA+: Efficient Low Rank Adaptation of Large Models*, 2024.
# - F. Meng et al., *PiSSA*, 2024; K. Büyükakyüz, *OLoRA*, 2024; S. Liu et al., *DoRA*, 2024.
