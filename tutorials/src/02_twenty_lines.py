# %% [markdown]
# # 2. LoRA in twenty lines
#
# **The question.** LoRA starts $A$ at random and $B$ at zero. Why one of each? And if the product $BA$ is zero at the
# start, what moves at the first step, and what does not?

# %% tags=["setup"]
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
# With $h = Wx + s\,BAx$, $A$ random and $B = 0$:
#
# 1. Is the model's output at step 0 *close* to the frozen model's, or *bit for bit* equal?
# 2. After the first backward, which of `lora_A.grad` and `lora_B.grad` is zero? Which becomes non-zero when?
# 3. If both started at zero, what would happen? If both started at random?
#
# ## The derivation
#
# Write tokens as rows: $x$ is $[T, \text{in}]$, $A$ is $[r, \text{in}]$, $B$ is $[\text{out}, r]$, and
# $h = xW^\top + s\,(xA^\top)B^\top$. Let $dy = \partial L / \partial h$. Changing $B$ by $\delta B$ changes $h$ by
# $s\,(xA^\top)\,\delta B^\top$, and $L$ by the inner product of that with $dy$; the same for $A$. So
#
# $$dB = s\, dy^\top (xA^\top), \qquad dA = s\,(dy\,B)^\top x .$$
#
# Put $B = 0$: $dB = s\,dy^\top x A^\top = s\,G A^\top$, where $G = dy^\top x$ is the gradient that $W$ itself would
# get, and $dA = 0$ *exactly*. One step of gradient descent moves $B$ only, and the weight by
#
# $$\Delta W = s B A = -\eta\, s^2\, G\, A^\top A .$$
#
# It is full fine-tuning's step $-\eta G$, seen through $A^\top A$: the random $r$-dimensional row space of $A$.

# %% [markdown]
# ## The twenty lines
#
# A layer that holds a frozen linear layer and two small matrices. It has no maths of its own: it hands everything to
# `lora.ops.lora_linear`, as the project's own [`LoRALinear`](../lora/layers.py) does.


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
# And this is what `lora_linear` does without dropout, DoRA and NF4. Read the real one:

# %%
methods = (TinyLoRA.__init__, TinyLoRA.forward)
assert 2 + sum(len(inspect.getsource(method).splitlines()) for method in methods) <= 20  # as promised

source = inspect.getsource(lora.reference.lora_linear)
print("def lora_linear(x, projection, *, dropout=None):" + source.split('"""')[2])

# %%
torch.manual_seed(0)
linear = nn.Linear(48, 32)
layer = TinyLoRA(linear, r=4, alpha=8)
x, dy = torch.randn(10, 48), torch.randn(10, 32)

assert torch.equal(layer(x), linear(x))  # prediction 1: x + 0 is x, so bit for bit

layer(x).backward(dy)
G = dy.T @ x  # [32, 48]: the gradient that W would have
assert torch.count_nonzero(layer.lora_A.grad) == 0  # prediction 2: exactly zero
assert_close(layer.lora_B.grad, layer.scaling * G @ layer.lora_A.T, "dB")

lr = 0.1
with torch.no_grad():
    layer.lora_B -= lr * layer.lora_B.grad
    moved = layer.scaling * layer.lora_B @ layer.lora_A
assert_close(moved, -lr * layer.scaling**2 * G @ layer.lora_A.T @ layer.lora_A, "ΔW after one step")

layer.zero_grad()
layer(x).backward(dy)
assert torch.count_nonzero(layer.lora_A.grad) == layer.lora_A.numel()  # from the second step on, A moves too

torch.nn.init.normal_(layer.lora_B)
assert not torch.allclose(layer(x), linear(x), atol=0.1)  # prediction 3: both random, and step 0 is another model

# %% [markdown]
# ## The same on a real model
#
# `lora.inject` puts such a layer around every linear layer of a model; here it is the last four blocks of SmolLM2.
# Twelve steps of plain gradient descent on eight docstrings; we record how far $A$ and $B$ have moved.

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

left, right = axes(2)
left.plot(grad_A, "o-", color=COLOURS[0], label="‖dA‖")
left.plot(grad_B, "s-", color=COLOURS[1], label="‖dB‖")
finish(left, "gradients", "step", legend=True)
right.plot(moved_A, "o-", color=COLOURS[0], label="‖A − A₀‖")
right.plot(moved_B, "s-", color=COLOURS[1], label="‖B‖")
finish(right, "how far the factors have moved", "step", legend=True)

print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; A moved {moved_A[-1]:.3f}, B moved {moved_B[-1]:.3f}")
assert grad_A[0] == 0 and grad_A[1] > 0 and grad_B[0] > 0
assert moved_A[1] == 0 and moved_B[1] > 0  # the first step moved B alone
assert moved_B[-1] > 2 * moved_A[-1]  # and B stays ahead: A's gradient is in proportion to B
assert moved_A[-1] < 0.05 * norm(A0)  # a small part of what A was from the start
assert losses[-1] < losses[0]

# %% [markdown]
# $dA = s\,(dy\,B)^\top x$ is in proportion to $B$, which starts at zero, while $A$ starts large: for many steps LoRA is
# nearly a *linear* model, with fixed random features $Ax$ and trained weights $B$. [Notebook
# 5](05_rank_alpha_init.ipynb) asks what follows for learning rates.
#
# ## How much of the gradient does a random $A$ let through?
#
# The first step is $-\eta s^2 G A^\top A$. If the rows of $A$ were exactly orthogonal, $A^\top A$ would be a projection
# onto $r$ of `in` dimensions, and for a $G$ without preference among them
#
# $$\cos(\Delta W, -G) = \frac{\langle GA^\top A, G\rangle}{\lVert GA^\top A\rVert\,\lVert G\rVert} =
# \frac{\lVert G A^\top\rVert}{\lVert G\rVert} \approx \sqrt{r / \text{in}} .$$
#
# A real $G$, from few tokens, has few directions of its own; then the cosine varies more from one draw of $A$ to the
# next, but its average size is the same.

# %%
torch.manual_seed(0)
in_features, tokens = 256, 512
G = torch.randn(64, tokens) @ torch.randn(tokens, in_features)
ranks = [1, 2, 4, 8, 16, 32, 64, 128, 256]


def cosine(r: int) -> float:
    """Between LoRA's first step with a random A of rank r and the step of full fine-tuning."""
    probe = TinyLoRA(nn.Linear(in_features, 64), r, alpha=r)
    step = G @ probe.lora_A.T @ probe.lora_A
    return float((step * G).sum() / (step.norm() * G.norm()))


with torch.no_grad():
    measured = torch.tensor([[cosine(r) for _ in range(10)] for r in ranks])  # [ranks, draws]
orthogonal = (torch.tensor(ranks) / in_features).sqrt()
random = 1 / (1 + in_features / torch.tensor(ranks)).sqrt()  # rows that are random, not orthogonal: see below

ax = axes()
ax.loglog(ranks, measured.mean(1), "o", label="measured, mean of 10 draws")
ax.loglog(ranks, orthogonal, "-", label=r"$\sqrt{r/\mathrm{in}}$, orthogonal rows")
ax.loglog(ranks, random, "--", label=r"$\sqrt{r/(r+\mathrm{in})}$, random rows")
finish(ax, "the first step against full fine-tuning's", "r", "cosine", legend=True)

assert_close(measured.mean(1), random, "the mean cosine", rtol=0.1)

# %% [markdown]
# For small ranks the two curves agree. For large ones the rows of a random $A$ overlap: $A^\top A$ stretches some
# directions more than others. Its eigenvalues have mean $r$ and variance $r\cdot\text{in}$ over the `in` directions (in
# units of one entry's variance, Marchenko and Pastur), which gives the $r/(r + \text{in})$ under the root.
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
# **Exercise 2.** Start both factors at zero. Return the pair (is `dA` zero?, is `dB` zero?) for *every* $x$ and $dy$.


# %% tags=["exercise"]
def both_zero():
    """(whether dA is always zero, whether dB is always zero), where A = 0 and B = 0."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(both_zero)
def check_both_zero(answer):
    probe = TinyLoRA(nn.Linear(6, 3), r=2, alpha=2)
    nn.init.zeros_(probe.lora_A)
    probe(torch.ones(4, 6)).sum().backward()
    truth = tuple(not p.grad.any() for p in (probe.lora_A, probe.lora_B))
    found = answer()
    assert isinstance(found, tuple) and len(found) == 2, f"it is {found!r}, expected a pair of booleans."
    assert found == truth, f"{found} is not what a backward gives: look at dB = s dyᵀ (x Aᵀ) with A = 0."


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def both_zero():
#     return (True, True)
# ```
#
# $A = B = 0$ is a saddle: each gradient has the other factor in it, and nothing ever moves.
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
