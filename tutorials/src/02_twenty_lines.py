# %% [markdown]
# # 2. LoRA in twenty lines
#
# **The question.** LoRA starts $A$ at random and $B$ at zero. Why one of each? And if the product $BA$ is zero at the
# start, what moves at the first step, and what does not?

# %% tags=["setup"]
import copy
import inspect

import torch
from torch import nn

import lora
import workshop
from lora import Projection
from workshop import COLOURS, assert_close, axes, checks, finish

# %% [markdown]
# ## Predict
#
# With $h = Wx + s\,BAx$, where $s = \alpha/r$ is a fixed number that you choose ($r$ is the rank, $\alpha$ is
# `lora_alpha`), $A$ random and $B = 0$:
#
# 1. Is the layer's output at step 0 *close* to the frozen layer's, or *bit for bit* equal?
# 2. After the first backward, which of `lora_A.grad` and `lora_B.grad` is zero? Which becomes non-zero when?
# 3. If both started at zero, what would happen? If both started at random?
#
# ## The derivation
#
# Write tokens as rows: $x$ is $[T, \text{in}]$, $A$ is $[r, \text{in}]$, $B$ is $[\text{out}, r]$, and $h = xW^\top +
# s\,(xA^\top)B^\top$. Let $dy = \partial L / \partial h$, where $L$ is the loss. Changing $B$ by $\delta B$ changes
# $h$ by $s\,(xA^\top)\,\delta B^\top$, and $L$ by the inner product of that with $dy$; the same for $A$. So
#
# $$dB = s\, dy^\top (xA^\top), \qquad dA = s\,(dy\,B)^\top x .$$
#
# Put $B = 0$: $dB = s\,dy^\top x A^\top = s\,G A^\top$, where $G = dy^\top x$ is the gradient that $W$ itself would
# get, and $dA = 0$ *exactly*. One step of gradient descent, with learning rate $\eta$, moves $B$ only, and the weight
# by
#
# $$\Delta W = s B A = -\eta\, s^2\, G\, A^\top A .$$
#
# It is full fine-tuning's step $-\eta G$, seen through $A^\top A$: the random $r$-dimensional row space of $A$.

# %% [markdown]
# ## The twenty lines
#
# A layer that holds a frozen linear layer and two small matrices. $A$ starts as torch starts its own linear layers,
# uniform within $\pm 1/\sqrt{\text{in}}$. The layer has no maths of its own: it packs what it holds into a
# `lora.Projection` and hands that to `lora.ops.lora_linear`, as the project's own [`LoRALinear`](../lora/layers.py)
# does. A `Projection` is a named tuple, one linear map with its adapter: `Projection(weight, bias, lora_A, lora_B,
# scaling, magnitude)`. The last belongs to DoRA, a variant of LoRA, and stays away until [notebook
# 5](05_rank_alpha_init.ipynb).


# %% tags=["setup"]
class TinyLoRA(nn.Module):
    """h = x Wᵀ + b + (alpha / r) · (x Aᵀ) Bᵀ"""

    def __init__(self, linear: nn.Linear, r: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self.scaling = alpha / r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linear = self.linear
        projection = Projection(linear.weight, linear.bias, self.lora_A, self.lora_B, self.scaling)
        return lora.ops.lora_linear(x, projection)


# %% [markdown]
# And this is `lora_linear` itself, in the project's reference. We leave out its docstring and its last lines, which are
# DoRA's. Names in it that you have not met:
#
# | in the code | what it is here |
# |---|---|
# | `frozen_linear(x, weight, bias)` | $xW^\top + b$ (a weight in 4 bits too: [notebook 6](06_nf4_qlora.ipynb)) |
# | `F.linear(x, A)` | torch's $xA^\top$ |
# | `apply_dropout(x, dropout)` | `x` itself, for without dropout `dropout` is `None` |
# | `u` | $s\,xA^\top$, with the scaling in it |
# | `magnitude` | `None`: DoRA's, not ours |

# %%
methods = (TinyLoRA.__init__, TinyLoRA.forward)
assert 2 + sum(len(inspect.getsource(method).splitlines()) for method in methods) <= 20  # as promised

body = inspect.getsource(lora.reference.lora_linear).split('"""')[2]
ours, doras = body.split("        return h + update\n")
print("def lora_linear(x, projection, *, dropout=None):" + ours + "        return h + update")
assert "magnitude" in doras  # what is left out is DoRA's

# %% [markdown]
# Now the predictions, on a layer of 48 inputs and 32 outputs. `dy` stands for the gradient that a loss would send.

# %%
torch.manual_seed(0)
linear = nn.Linear(48, 32)
layer = TinyLoRA(linear, r=4, alpha=8)
x, dy = torch.randn(10, 48), torch.randn(10, 32)

by_hand = x @ linear.weight.T + linear.bias + layer.scaling * (x @ layer.lora_A.T) @ layer.lora_B.T
assert_close(layer(x), by_hand, "h")
assert torch.equal(layer(x), linear(x))  # prediction 1: h + 0 is h, so bit for bit

print(f"step 0: {int((layer(x) != linear(x)).sum())} of {dy.numel()} outputs differ from the frozen layer's")


def backward(name: str) -> None:
    """One backward; says how many entries of each gradient are not zero."""
    layer.zero_grad()
    layer(x).backward(dy)
    counts = (f"{int(p.grad.count_nonzero())} of {p.numel()}" for p in (layer.lora_A, layer.lora_B))
    print("{} backward: not zero are {} entries of dA and {} of dB".format(name, *counts))


backward("first")
G = dy.T @ x  # [32, 48]: the gradient that W would have
assert torch.count_nonzero(layer.lora_A.grad) == 0  # prediction 2: exactly zero
assert_close(layer.lora_B.grad, layer.scaling * G @ layer.lora_A.T, "dB")

lr = 0.1
with torch.no_grad():
    layer.lora_B -= lr * layer.lora_B.grad
    moved = layer.scaling * layer.lora_B @ layer.lora_A
assert_close(moved, -lr * layer.scaling**2 * G @ layer.lora_A.T @ layer.lora_A, "ΔW after one step")

backward("second")
assert torch.count_nonzero(layer.lora_A.grad) == layer.lora_A.numel()  # from the second step on, A moves too

# %% [markdown]
# **Answers 1 and 2.** The output at step 0 is the frozen layer's bit for bit. Of the first gradients `lora_A.grad` is
# zero, all of it; one step of $B$ later none of it is.
#
# Prediction 3, in numbers: four starts, what each does to the output at step 0, and what its first backward gives.

# %%
starts = {}
for name, (scale_A, scale_B) in {
    "A random, B zero": (1, 0),
    "A zero, B random": (0, 1),
    "both zero": (0, 0),
    "both random": (1, 1),
}.items():
    torch.manual_seed(1)
    probe = TinyLoRA(linear, r=4, alpha=8)
    with torch.no_grad():
        probe.lora_B.normal_(std=0.1)
        probe.lora_A *= scale_A
        probe.lora_B *= scale_B
    probe(x).backward(dy)
    changed = float((probe(x) - linear(x)).detach().abs().max())
    starts[name] = changed, float(probe.lora_A.grad.norm()), float(probe.lora_B.grad.norm())
    print(f"{name}: output moved by {changed:.2f}, ‖dA‖ = {starts[name][1]:6.2f}, ‖dB‖ = {starts[name][2]:6.2f}")

assert [name for name, (changed, _, _) in starts.items() if changed > 0] == ["both random"]  # not the frozen model
assert starts["both zero"][1:] == (0, 0)  # no gradient: nothing ever moves
assert starts["A random, B zero"][1] == 0 < starts["A random, B zero"][2]
assert starts["A zero, B random"][2] == 0 < starts["A zero, B random"][1]

# %% [markdown]
# **Answer 3.** Two zeros get no gradient, so nothing would ever move. Two random factors change the output at once,
# here by up to 0.49. One zero is enough, on either side.
#
# ## The same on a real model
#
# `lora.inject` puts such a layer around every linear layer of a model but its output head, and `lora.for_training`
# puts the model into training mode; here it is the last four blocks of SmolLM2. Twelve steps of plain gradient
# descent on eight docstrings, always the same batch, one seed; before each step we record the loss and how far $A$
# and $B$ have moved, so the last values are those after eleven. Then the same once more with $A$ frozen where it
# started.

# %%
BLOCKS = 4
model, tokenizer = lora.load("smollm2-135m-instruct")
pairs, _ = workshop.pairs(8)
data = workshop.inputs_of(model, workshop.batches(tokenizer, pairs, 8), BLOCKS)
top = workshop.last_blocks(model, BLOCKS)
with torch.no_grad():
    frozen = workshop.loss_of(top, data[0])

lora.inject(top, lora.LoRAConfig(r=8, lora_alpha=16))
lora.for_training(top)
print(lora.trainable_parameters(top))
assert workshop.loss_of(top, data[0]).item() == frozen.item()

# %%
fixed = copy.deepcopy(top)  # the same start, for the run with A frozen
A = [p for n, p in top.named_parameters() if "lora_A" in n]
B = [p for n, p in top.named_parameters() if "lora_B" in n]
A0 = [p.detach().clone() for p in A]
assert len(A) == len(B) == 7 * BLOCKS


def norm(tensors):
    """The Frobenius norm of many tensors taken as one."""
    return float(torch.sqrt(sum(t.detach().square().sum() for t in tensors)))


optimizer = torch.optim.SGD([*A, *B], lr=0.05)
moved_A, moved_B, grad_A, grad_B, losses = [], [], [], [], []
for _ in range(12):
    moved_A.append(norm([a - a0 for a, a0 in zip(A, A0, strict=True)]))
    moved_B.append(norm(B))
    losses += workshop.train(top, optimizer, data)
    grad_A.append(norm([p.grad for p in A]))
    grad_B.append(norm([p.grad for p in B]))

only_B = torch.optim.SGD([p for n, p in fixed.named_parameters() if "lora_B" in n], lr=0.05)
losses_fixed = workshop.train(fixed, only_B, data * 12)

left, right = axes(2)
left.plot(grad_A, "o-", color=COLOURS[0], label="‖dA‖")
left.plot(grad_B, "s-", color=COLOURS[1], label="‖dB‖")
finish(left, "gradients", "step", "Frobenius norm, all layers", legend=True)
right.plot(moved_A, "o-", color=COLOURS[0], label="‖A − A₀‖")
right.plot(moved_B, "s-", color=COLOURS[1], label="‖B‖")
finish(right, "how far the factors have moved", "step", "Frobenius norm, all layers", legend=True)

by_B = (losses[0] - losses_fixed[-1]) / (losses[0] - losses[-1])
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, with A frozen {losses_fixed[-1]:.3f}: {by_B:.0%} of the decrease")
print(f"A moved {moved_A[-1]:.3f}, {moved_A[-1] / norm(A0):.2%} of its norm; B moved {moved_B[-1]:.3f}, from zero")
assert grad_A[0] == 0 and grad_A[1] > 0 and grad_B[0] > 0
assert moved_A[1] == 0 and moved_B[1] > 0  # the first step moved B alone
assert all(b > a for a, b in zip(moved_A[1:], moved_B[1:], strict=True))  # and B stays ahead, in these twelve
assert moved_A[-1] < 0.05 * norm(A0)  # a small part of what A was from the start
assert losses[-1] < losses[0]
assert 0.3 < by_B < 0.95  # B alone gets a good part of it, not all

# %% [markdown]
# $dA = s\,(dy\,B)^\top x$ is in proportion to $B$, which starts at zero, while $A$ starts large. So in these first
# steps $A$ changes by a small part of itself, 1% here. With $A$ frozen each layer's update is *linear* in what is
# trained: fixed random features $Ax$, weights $B$. In the last run all layers are like that: it gets 62% of the
# decrease. So even a small move of $A$ counts. [Notebook 5](05_rank_alpha_init.ipynb) asks what the start means for
# learning rates.
#
# ## How much of the gradient does a random $A$ let through?
#
# The first step is $-\eta s^2 G A^\top A$. If the rows of $A$ were orthonormal (a common length is a factor that the
# cosine does not see; for $r$ much smaller than `in` random rows nearly are orthogonal), $A^\top A$ would be a
# projection onto $r$ of `in` dimensions, and with a random row space
#
# $$\cos(\Delta W, -G) = \frac{\langle GA^\top A, G\rangle}{\lVert GA^\top A\rVert\,\lVert G\rVert} =
# \frac{\lVert G A^\top\rVert}{\lVert G\rVert} \approx \sqrt{r / \text{in}} :$$
#
# $r/\text{in}$ is the mean of the squared cosine, whatever $G$ is. How far single draws are from it does depend on $G$:
# one with few directions of its own meets a random $A$ well or badly. So we take two of them for 576 inputs. One is
# random, with many directions; the other is the gradient of the batch above with respect to a real weight.

# %%
torch.manual_seed(0)
in_features, draws = 576, 40
frozen_top = workshop.last_blocks(model, BLOCKS)
weight = frozen_top.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)  # [576, 576]
(real,) = torch.autograd.grad(workshop.loss_of(frozen_top, data[0]), weight)
gradients = {"random G": torch.randn(64, in_features), "real G": real}
ranks = [1, 2, 4, 8, 16, 32, 64, 128, 256, 576]


def cosine(G: torch.Tensor, r: int) -> float:
    """Between LoRA's first step with a random A of rank r and the step of full fine-tuning."""
    probe = TinyLoRA(nn.Linear(in_features, 1), r, alpha=r)
    step = G @ probe.lora_A.T @ probe.lora_A
    return float((step * G).sum() / (step.norm() * G.norm()))


with torch.no_grad():
    measured = {n: torch.tensor([[cosine(G, r) for _ in range(draws)] for r in ranks]) for n, G in gradients.items()}
root_mean_square = {n: cosines.square().mean(1).sqrt() for n, cosines in measured.items()}  # [ranks]
orthogonal = (torch.tensor(ranks) / in_features).sqrt()
random = 1 / (1 + in_features / torch.tensor(ranks)).sqrt()  # rows that are random, not orthogonal: see below

ax = axes(width=5.6, height=3.6)
for (n, cosines), colour, shift in zip(measured.items(), COLOURS[2:], (0.93, 1.07), strict=False):
    across = torch.tensor(ranks) * shift
    ax.plot(across, cosines, ".", color=colour, alpha=0.3, ms=3)
    ax.plot(across, root_mean_square[n], "o", color=colour, ms=4, label=f"{n}: root mean square of {draws} draws")
ax.loglog(ranks, orthogonal, "-", label=r"$\sqrt{r/\mathrm{in}}$, orthogonal rows")
ax.loglog(ranks, random, "--", label=r"$\sqrt{r/(r+\mathrm{in})}$, random rows")
finish(ax, "the first step against full fine-tuning's", "r", "cosine", legend=True)

spread = {n: float(cosines[3].std() / cosines[3].mean()) for n, cosines in measured.items()}
print(f"r = {ranks[3]}, standard deviation over the mean: " + ", ".join(f"{n} {v:.0%}" for n, v in spread.items()))
assert_close(root_mean_square["random G"], random, "the cosine", rtol=0.1)
assert_close(root_mean_square["real G"], random, "the cosine", rtol=0.3)
assert spread["real G"] > spread["random G"]
assert (orthogonal / random)[:5].max() < 1.03 and (orthogonal / random)[-1] > 1.4  # alike up to r = 16, not at 576

# %% [markdown]
# Each small point is one draw. All are drawn at the ten ranks; the points of the random $G$ are set a little to the
# left of theirs and those of the real $G$ a little to the right, so that they do not lie on each other.
#
# For small ranks the two curves agree. For large ones the rows of a random $A$ overlap: $A^\top A$ stretches some
# directions more than others. Its eigenvalues have mean $r$ and variance $r\cdot\text{in}$ over the `in` directions
# (in units of one entry's variance, Marchenko and Pastur), and mean² / (mean² + variance) is the $r/(r + \text{in})$
# under the root.
#
# **The answer.** One factor is zero so that step 0 is the frozen model; the other is not, so that something has a
# gradient. With $B = 0$ the first step moves $B$ alone, and moves the weight by the gradient's part that a random $A$
# lets through: while $r$ is small beside `in`, a cosine of about $\sqrt{r/\text{in}}$ with the step of full
# fine-tuning. At $r = \text{in}$ it is $1/\sqrt2$ and not 1, because the rows of $A$ are random and not orthogonal.
#
# ## Exercises
#
# **Exercise 1.** The forward, by yourself: no `lora`, never forming $BA$.


# %% tags=["exercise"]
def lora_forward(x, W, A, B, s):
    """x Wᵀ + s (x Aᵀ) Bᵀ: [tokens, out]."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(lora_forward)
def check_lora_forward(answer):
    generator = torch.Generator().manual_seed(0)
    x, W, A, B = (torch.randn(*shape, generator=generator) for shape in ((5, 7), (4, 7), (2, 7), (4, 2)))
    for s in (1.0, 2.5):
        assert_close(
            answer(x, W, A, B, s), lora.reference.lora_linear(x, Projection(W, None, A, B, s)), f"h at s = {s}"
        )


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def lora_forward(x, W, A, B, s):
#     return x @ W.T + s * ((x @ A.T) @ B.T)
# ```
# </details>
#
# **Exercise 2.** Both gradients from $W$'s own: given $G = dy^\top x$ and neither $x$ nor $dy$, return `(dA, dB)`. Then
# read off why nothing moves from $A = B = 0$.


# %% tags=["exercise"]
def factor_gradients(G, A, B, s):
    """(dA, dB) of h = x Wᵀ + s (x Aᵀ) Bᵀ, where W's own gradient would be G [out, in]."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(factor_gradients)
def check_factor_gradients(answer):
    generator = torch.Generator().manual_seed(2)
    shapes = ((9, 6), (9, 5), (2, 6), (5, 2))
    for scale_A, scale_B in ((1, 1), (1, 0), (0, 1), (0, 0)):
        x, dy, A, B = (torch.randn(*shape, generator=generator) for shape in shapes)
        A, B = scale_A * A, scale_B * B
        truth = lora.reference.linear.lora_linear_backward(dy, x, Projection(torch.zeros(5, 6), None, A, B, 1.5))
        found = answer(dy.T @ x, A, B, 1.5)
        assert isinstance(found, tuple) and len(found) == 2, "expected the pair (dA, dB)."
        assert_close(found[0], truth.dlora_A, "dA", atol=1e-5)
        assert_close(found[1], truth.dlora_B, "dB", atol=1e-5)


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def factor_gradients(G, A, B, s):
#     return s * B.T @ G, s * G @ A.T
# ```
#
# Each gradient has the *other* factor in it. At $A = B = 0$ both are zero whatever $G$ is, and nothing ever moves.
# </details>
#
# **Exercise 3.** The mirror image: $A = 0$, $B$ random, also starts at the frozen model. Write the weight change
# $\Delta W$ of its first step of gradient descent, from $G$, $B$, $s$ and the learning rate.


# %% tags=["exercise"]
def mirrored_first_step(G, B, s, lr):
    """ΔW = s B A after one step from A = 0, where W's own gradient would be G."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(mirrored_first_step)
def check_mirrored_first_step(answer):
    generator = torch.Generator().manual_seed(3)
    x, dy, B = (torch.randn(*shape, generator=generator) for shape in ((9, 6), (9, 5), (5, 2)))
    A, s, lr = torch.zeros(2, 6), 1.5, 0.2
    dA = lora.reference.linear.lora_linear_backward(dy, x, Projection(torch.zeros(5, 6), None, A, B, s)).dlora_A
    assert_close(answer(dy.T @ x, B, s, lr), s * B @ (A - lr * dA), "ΔW", atol=1e-5)


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def mirrored_first_step(G, B, s, lr):
#     return -lr * s**2 * B @ (B.T @ G)
# ```
#
# Now the *output* side of the gradient is projected. Both starts are possible; the usual one keeps the large, random
# factor where it reads the input.
# </details>
#
# ## Where this lives in the code
#
# - [`lora/reference/linear.py`](../lora/reference/linear.py): the equation and its backward.
# - [`lora/layers.py`](../lora/layers.py): `LoRALinear`; [`lora/initialise.py`](../lora/initialise.py): every start.
# - Next: [the backward by hand](03_backward.ipynb).
#
# ## References
#
# - E. Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021, section 4.1.
# - S. Hayou et al., *The Impact of Initialization on LoRA Finetuning Dynamics*, 2024: which
#   of the two to start at zero.
# - V. Marchenko and L. Pastur, *Distribution of eigenvalues for some sets of random matrices*, 1967.
