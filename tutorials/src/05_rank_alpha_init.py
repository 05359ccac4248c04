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
# 2. PiSSA starts with $s\,BA$ equal to the best rank-$r$ part of $W$. Is the output at step 0 still the base model's?
# 3. At the same learning rate, which of LoRA, LoRA+, PiSSA, OLoRA and DoRA is lowest after a dozen steps? And if each
#    gets the best of several learning rates?
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
# With $\alpha/r$ a larger rank learns *more slowly*, though it can express more. That is the argument for
# $\alpha/\sqrt r$, `use_rslora` (rsLoRA, Kalajdzievski 2023). It is about plain gradient descent; Adam divides
# gradients by their size, which changes the exponent. For Adam we look only at where twelve steps end, at two ranks,
# on the last three blocks of SmolLM2. All below is one model, one seed, 48 pairs in one order, and 16 held-out pairs.

# %%
BLOCKS = 3
model, tokenizer = lora.load("smollm2-135m-instruct")
train_pairs, held_pairs = workshop.pairs(48, 16)
data = workshop.inputs_of(model, workshop.batches(tokenizer, train_pairs, 4), BLOCKS)
held = workshop.inputs_of(model, workshop.batches(tokenizer, held_pairs, 8), BLOCKS)
top = workshop.last_blocks(model, BLOCKS)
del model
lora.use_backend("fast")  # the same equations (notebook 3), in less time
base_loss = workshop.mean_loss(top, held)


def injected(seed: int = 0, **choices):
    """A copy of the model with adapters."""
    torch.manual_seed(seed)
    return lora.inject(copy.deepcopy(top), lora.LoRAConfig(**choices))


def decrease(**choices) -> float:
    """‖dB‖² over all layers: what one step of gradient descent would gain, to first order, divided by its rate."""
    tuned = lora.for_training(injected(**choices))
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
print(f"from r = {ranks[1]} to {ranks[-1]}: slope with alpha / r {slopes[0]:.2f}, with alpha / √r {slopes[1]:.2f}")
print(
    f"with alpha / r the first step at r = {ranks[-1]} would gain, to first order, {plain[-1] / plain[1]:.3f} of what "
    f"it would at {ranks[1]}"
)
assert abs(slopes[0] + 1) < 0.25 and abs(slopes[1]) < 0.25
assert plain == sorted(plain, reverse=True)  # prediction 1: less, at each rank

# %% [markdown]
# **Answer 1**: less, to first order. From $r = 4$ to $256$ the rank grows 64 times, and $\lVert dB\rVert^2$, which a
# small step's decrease is in proportion to, falls to 0.017 of what it was, about 1/64. No step was taken here.
#
# At $r = 1$ both curves lie below the derived lines, by about half. The derivation speaks of the mean over many $A$,
# and each point here is one draw. With one row a draw may meet the gradient well or badly, as the scatter in
# [notebook 2](02_twenty_lines.ipynb)'s last picture shows; with many rows it averages out.
#
# ## Under Adam
#
# Twelve steps of AdamW for each choice, all with the same learning rate and the same data in the same order.


# %%
def run(start, lr: float = 5e-4, ratio: float = 1.0) -> dict:
    """Twelve steps of a copy; each batch's loss before its step, and the loss on held-out text at the end."""
    tuned = lora.for_training(copy.deepcopy(start))
    groups = lora.loraplus_groups(tuned, lr=lr, ratio=ratio)  # B's rate is ratio times A's
    losses = workshop.train(tuned, torch.optim.AdamW(groups), data)
    projections = [m.projection_of(m.active) for m in tuned.modules() if type(m).__name__ == "LoRALinear"]
    with torch.no_grad():  # ‖W' - W‖, all layers as one
        moved = sum(float((lora.ops.merge_weight(p) - p.weight).square().sum()) for p in projections) ** 0.5
    return {"losses": losses, "held": workshop.mean_loss(tuned, held), "moved": moved}


scaled = {
    (r, rooted): run(injected(r=r, lora_alpha=16, use_rslora=rooted)) for r in (4, 64) for rooted in (False, True)
}
for (r, rooted), result in scaled.items():
    s = lora.LoRAConfig(r=r, lora_alpha=16, use_rslora=rooted).scaling_of("any")
    print(f"r = {r:2}, alpha / {'√r' if rooted else 'r '} = {s:5.2f}: held-out loss {result['held']:.3f}")
print(f"before: {base_loss:.3f}")

final = {key: result["held"] for key, result in scaled.items()}
assert all(result["held"] < base_loss for result in scaled.values())
assert abs(final[64, False] - final[4, False]) < 0.05  # with alpha / r, 16 times the rank bought next to nothing here
assert final[64, True] < min(final[4, True], final[64, False])  # with alpha / √r it did
renamed = lora.LoRAConfig(r=64, lora_alpha=16 * 64**0.5).scaling_of("any")
assert renamed == lora.LoRAConfig(r=64, lora_alpha=16, use_rslora=True).scaling_of("any")  # another alpha, the same s

# %% [markdown]
# Here, under Adam, rank 64 ends about where rank 4 does with $\alpha/r$, and goes further with $\alpha/\sqrt r$. But
# read this with care. At a fixed rank `use_rslora` is another $\alpha$ and nothing else (the last `assert`), and
# $\alpha$ and the learning rate both say how far the first steps go. A comparison at a single learning rate tells you
# which choice goes furthest there, not which is best.
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
# Here $W_r$ is [notebook 1](01_why_low_rank.ipynb)'s truncated SVD, of the weight instead of the change; in $W = QR$
# the columns of $Q$ are orthonormal and $R$ is upper triangular. DoRA's norm is one number for each row of a matrix,
# and so is $m$: it is trained too, and starts at the row norms of $W$. PiSSA and OLoRA start from a non-zero product
# and take it off the base: the update is $s\,(BA - B_0A_0)$.

# %%
methods = {
    "LoRA": {},
    "LoRA+": {},  # another optimizer
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "DoRA": {"use_dora": True},
}
starts = {name: injected(r=8, lora_alpha=8, **choices) for name, choices in methods.items()}
ratios = {name: 16.0 if name == "LoRA+" else 1.0 for name in methods}

W = top.model.layers[0].mlp.down_proj.weight.detach()  # [576, 1536]
U, S, Vh = torch.linalg.svd(W, full_matrices=False)
Q, R = torch.linalg.qr(W)
expected = {"PiSSA": U[:, :8] * S[:8] @ Vh[:8], "OLoRA": Q[:, :8] @ R[:8]}
for name, product in expected.items():
    layer = starts[name].model.layers[0].mlp.down_proj
    B0A0 = (layer.lora_B["default"] @ layer.lora_A["default"]).detach()  # s = 8 / 8 = 1
    assert_close(B0A0, product, f"the start of {name}", atol=1e-4)
    print(f"{name}: ‖B₀A₀‖ is {float(B0A0.norm() / W.norm()):.2f} of ‖W‖")
    assert B0A0.norm() > 0.05 * W.norm()

# %%
results = {name: run(start, ratio=ratios[name]) for name, start in starts.items()}

left, right = axes(2)
plain_losses = torch.tensor(results["LoRA"]["losses"])
for name, result in results.items():
    beside = torch.tensor(result["losses"]) - plain_losses  # batches differ more than methods do
    if name == "LoRA":  # wide, so that DoRA, which lies on it, does not hide it
        left.plot(beside, lw=5, alpha=0.35, label="LoRA, 0 here")
    else:
        left.plot(beside, label=name)
finish(left, "training loss less LoRA's on the same batch", "step", "nats a token", legend=True)
right.barh(list(results), [base_loss - result["held"] for result in results.values()], color=COLOURS)
right.invert_yaxis()
finish(right, "gain on held-out text after 12 steps", "nats a token")

for name, result in results.items():
    print(f"{name:<6} start {result['losses'][0]:.4f}, held-out {base_loss:.3f} -> {result['held']:.3f}, "
          f"weights moved by {result['moved']:.2f}")  # fmt: skip
first = [result["losses"][0] for result in results.values()]
base = workshop.mean_loss(top, data[:1])
assert max(abs(loss - base) for loss in first) < 1e-4  # prediction 2: every one of them starts at the base model
assert all(result["held"] < base_loss for result in results.values())
moved = {name: result["moved"] for name, result in results.items()}
for ahead in ("LoRA+", "PiSSA", "OLoRA"):
    for behind in ("LoRA", "DoRA"):
        assert results[ahead]["held"] < results[behind]["held"] - 0.1 and moved[ahead] > 2 * moved[behind]
assert abs(results["DoRA"]["held"] - results["LoRA"]["held"]) < 0.05

# %% [markdown]
# **Answer 2**: yes. All five start at the base model, PiSSA and OLoRA too, since $s\,B_0A_0$ is taken off the base.
# At this learning rate LoRA and DoRA gain least, and they are also the two that moved the weights least: $B$ starts
# at zero and reads a small $Ax$. LoRA+ makes $B$'s steps longer; PiSSA and OLoRA start from a product that is not
# zero, so that the same $\eta$ moves the product further. Is their lead more than longer steps? Give each method
# three learning rates, a factor of 4 apart, and take its best. (DoRA gets the first two, to save time: so far it did
# what LoRA did.)

# %%
rates = (5e-4, 2e-3, 8e-3)
tuned = {
    name: {5e-4: results[name]["held"]}
    | {lr: run(start, lr, ratios[name])["held"] for lr in (rates[1:2] if name == "DoRA" else rates[1:])}
    for name, start in starts.items()
}
best = {name: min(found, key=found.get) for name, found in tuned.items()}
at_best = {name: tuned[name][best[name]] for name in methods}

top_of_frame = base_loss + 0.08
ax = axes(width=5.4)
for (name, found), marker in zip(tuned.items(), "osv^D", strict=True):
    (line,) = ax.semilogx(list(found), list(found.values()), f"{marker}-", ms=5, alpha=0.8, label=name)
    if found.get(rates[-1], 0) > base_loss:  # it leaves the frame at the top: say where to
        (low, start), (high, end) = ((torch.tensor(lr).log(), found[lr]) for lr in rates[1:])
        leaves = torch.exp(low + (top_of_frame - start) / (end - start) * (high - low))
        ax.annotate(
            f"{name}: {end:.2f}", (leaves, top_of_frame), (3, -10), textcoords="offset points", color=line.get_color()
        )
ax.set_ylim(min(at_best.values()) - 0.05, top_of_frame)
ax.axhline(base_loss, color=COLOURS[5], lw=1, ls="--")
ax.text(rates[0], base_loss + 0.006, "no training; what is above is worse", fontsize=8)
ax.set_xticks(rates, [f"{lr:g}" for lr in rates])
ax.minorticks_off()
finish(ax, "held-out loss after 12 steps", "learning rate (of A)", "nats a token")
ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

print(f"{'learning rate':<14}" + "".join(f"{lr:>9.4f}" for lr in rates) + "     best")
for name, found in tuned.items():
    print(
        f"{name:<14}"
        + "".join(f"{found[lr]:9.3f}" if lr in found else f"{'–':>9}" for lr in rates)
        + f"{best[name]:9.4f}"
    )
at_one = [result["held"] for result in results.values()]
apart_at_one, apart_at_best = max(at_one) - min(at_one), max(at_best.values()) - min(at_best.values())
print(f"best and worst method are {apart_at_one:.3f} apart at 5e-4, {apart_at_best:.3f} each at its best rate")
gained = {name: results[name]["held"] - at_best[name] for name in methods}  # by another rate than 5e-4
assert all(gained[name] > 0.1 for name in ("LoRA", "DoRA"))
assert all(0 <= gained[name] < 0.05 for name in ("LoRA+", "PiSSA", "OLoRA"))
assert apart_at_best < 0.35 * apart_at_one

# %% [markdown]
# **Answer 3.** At 5e-4 LoRA+ is lowest, PiSSA and OLoRA follow within 0.07, and LoRA is last, 0.29 behind. Each at the
# best of its rates, all five lie within 0.09 of each other, and LoRA is 0.03 behind LoRA+. LoRA and DoRA gained from a
# larger rate, the other three hardly. (The label at the top of the picture, LoRA+: 4.09, is its loss at the rate 0.008,
# a point far above the frame.) So here most of the difference *was* the learning rate. Which method is ahead by
# what is left, this experiment cannot say: twelve steps, one order of the data, three rates or two, chosen on the same
# 16 held-out pairs that the losses are reported on. And for two of the five methods the best rate is the smallest or
# the largest tried, so their own best may lie outside. Tune each method by itself before you believe a bar chart, the
# one above included.
#
# **The answer**, as far as this notebook goes. The rank bounds what can be learnt, and DoRA changes the function.
# $\alpha$ and `use_rslora` set the scaling: how far a step goes, which is the learning rate's work too. What LoRA+,
# PiSSA and OLoRA gained over LoRA at one learning rate, plain LoRA gained from a larger one, most of it at least.
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
