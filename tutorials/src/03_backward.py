# %% [markdown]
# # 3. The backward by hand
#
# **The question.** `loss.backward()` works without us. Why would anybody write LoRA's backward by hand? And once it is
# written: how do you know that it is right?

# %% tags=["setup"]
import inspect

import torch
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import lora
import workshop
from lora import Projection
from lora.reference.linear import lora_linear_backward
from workshop import COLOURS, assert_close, axes, checks, finish

# %% [markdown]
# ## Predict
#
# 1. A layer 4096 → 4096 with $r = 16$, on 2048 tokens: by which factor is $(xA^\top)B^\top$ cheaper than $x(BA)^\top$,
#    in operations?
# 2. Of $W$, $x$, $xA^\top$, $A$, $B$ and the output $h$: which does the backward use?
# 3. Autograd saves what *each operation* needs. For a gated MLP (three matrices and an element-wise product; its
#    equation is below) with LoRA on all three, how many times as many bytes does it save as a backward written for
#    the whole?
#
# ## The derivation
#
# The forward, with $u = xA^\top$ (tokens × $r$, tiny):
#
# $$h = xW^\top + b + s\,uB^\top .$$
#
# Let $dy = \partial L/\partial h$. The rule of matrix calculus that does all the work: if $\delta L = \langle P,
# Q\,\delta X\,R\rangle$ then $\partial L/\partial X = Q^\top P R^\top$. Here $\delta L = \langle dy, \delta
# h\rangle$, and also $\langle du, \delta u\rangle$, so that $P$ is $dy$ or $du$; where $\delta B^\top$ stands, the
# rule gives $dB^\top$, and we transpose. Take the terms one by one:
#
# $$
# \begin{aligned}
# \delta h &= s\,u\,\delta B^\top && \Rightarrow & dB &= s\,dy^\top u \\
# \delta h &= s\,\delta u\,B^\top && \Rightarrow & du &= s\,dy\,B \\
# \delta u &= x\,\delta A^\top && \Rightarrow & dA &= du^\top x \\
# \delta h &= \delta x\,W^\top,\ \delta u = \delta x\,A^\top && \Rightarrow & dx &= dy\,W + du\,A
# \end{aligned}
# $$
#
# $W$ is frozen, so there is no $dW = dy^\top x$: of the three large products of a training step ($xW^\top$, $dy\,W$,
# $dy^\top x$) one is gone. Two things to see: $du$ serves both $dA$ and $dx$, and $h$ appears nowhere, so the output
# need not be kept.

# %% [markdown]
# The project's reference has the same lines, and some names more, since it also does dropout, DoRA ([notebook
# 5](05_rank_alpha_init.ipynb)) and weights in 4 bits ([notebook 6](06_nf4_qlora.ipynb)). Without these three:
#
# | in the code | what it is here |
# |---|---|
# | `dense` | $W$ (decoded first, where it is stored in 4 bits) |
# | `dropped` | $x$ (what dropout left of it) |
# | `dh` | $dy$ (rescaled, with DoRA) |
# | `u` | $xA^\top$, without $s$ (the forward of [notebook 2](02_twenty_lines.ipynb) had $s$ in it) |
# | `du` | $s\,dy\,B$ |
# | `flat(y)` | `y` with one token a row: [batch, tokens, features] becomes [batch · tokens, features] |
# | `through_dropout` | 0 (DoRA's) |
# | `apply_dropout(y, None)` | `y` |

# %%
source = inspect.getsource(lora_linear_backward).splitlines()
wanted = ("dx = dy @ dense", "u = dropped @", "du = scaling", "dB = scaling", "dA = flat", "dx = dx +")
found = [line for line in source if line.strip().startswith(wanted)]
print("\n".join(found))
assert len(found) == len(wanted)

# %% [markdown]
# ## Is it right? Two independent judges
#
# **Autograd** differentiates the forward without us. **Finite differences** know nothing of derivatives: change one
# number by $\varepsilon$, look at the loss. torch's `gradcheck` does that for every entry, in float64. Its own
# tolerance is a relative $10^{-3}$, which is wide: we ask for $10^{-7}$.
#
# The project has each operation twice, and `lora.use_backend` chooses: the `reference`, to be read, whose forward is
# left to autograd unless one calls its `lora_linear_backward`; and `fast`, whose autograd functions have their
# backward written by hand.


# %% tags=["setup"]
def example(tokens=6, fan_in=7, fan_out=5, r=3, s=0.7, seed=0, dtype=torch.float64):
    """(x, dy, projection): random, two-sided, nothing zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, fan_in), (tokens, fan_out), (fan_out, fan_in), (fan_out,), (r, fan_in), (fan_out, r))
    x, dy, W, b, A, B = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes)
    return x, dy, Projection(W, b, A, B, s)


# %%
x, dy, p = example()
leaves = [t.requires_grad_() for t in (x, p.lora_A, p.lora_B)]


def forward(x, A, B):
    return lora.reference.lora_linear(x, p._replace(lora_A=A, lora_B=B))


by_autograd = torch.autograd.grad(forward(*leaves), leaves, dy)
by_hand = lora_linear_backward(dy, x, p)
for name, ours, theirs in zip(
    ("dx", "dA", "dB"), (by_hand.dx, by_hand.dlora_A, by_hand.dlora_B), by_autograd, strict=True
):
    assert_close(ours, theirs, name, rtol=1e-12, atol=1e-12)
print("by hand and by autograd: dx, dA and dB agree to 1e-12")

strict = {"eps": 1e-6, "rtol": 1e-7, "atol": 1e-7}
assert gradcheck(forward, leaves, **strict)  # autograd against finite differences
with lora.use_backend("fast"):  # the fast backend, whose backward is written by hand: the same judge
    assert gradcheck(lambda x, A, B: lora.ops.lora_linear(x, p._replace(lora_A=A, lora_B=B)), leaves, **strict)
print("autograd, and fast's backward by hand, agree with finite differences to 1e-7")

# %% [markdown]
# A test can only find what its inputs show. Here are four wrong backwards, and which inputs give them away:


# %%
def wrong_backwards(dy, x, p):
    """A right (dx, dA, dB), and by name what a mistake makes of it."""
    right = lora_linear_backward(dy, x, p)
    dx, dA, dB = right.dx, right.dlora_A, right.dlora_B
    return (dx, dA, dB), {
        "dx without du A": (dy @ p.weight, dA, dB),
        "dA without s": (dx, dA / p.scaling, dB),
        "dA with the wrong sign": (dx, -dA, dB),
        "dB without s": (dx, dA, dB / p.scaling),
    }


seen = {}
for name, scale_B, scale_dy in (("all random", 1, 1), ("B = 0", 0, 1), ("dy = 0", 1, 0)):
    x, dy, p = example()
    right, mistakes = wrong_backwards(scale_dy * dy, x, p._replace(lora_B=scale_B * p.lora_B))
    seen[name] = [mistake for mistake, wrong in mistakes.items() if not all(map(torch.allclose, wrong, right))]
    print(f"{name}: {len(seen[name])} of {len(mistakes)} mistakes found: {', '.join(seen[name]) or 'none'}")
assert len(seen["all random"]) == 4 and seen["B = 0"] == ["dB without s"] and seen["dy = 0"] == []

# %% [markdown]
# $B = 0$ is how LoRA starts, so a test on a fresh adapter hides three of the four. Draw $B$ and $dy$ at random.
#
# Prediction 2: what is used? Autograd has a hook that sees each tensor an operation saves. We give every tensor a shape
# of its own and look at what the fast backend's `lora_linear` saves.

# %%
x, dy, p = example()
leaves = [t.requires_grad_() for t in (x, p.lora_A, p.lora_B)]
names = {(6, 7): "x", (5, 7): "W", (5,): "b", (6, 3): "s x Aᵀ", (3, 7): "A", (5, 3): "B", (6, 5): "h"}
kept = []
with lora.use_backend("fast"), saved_tensors_hooks(lambda t: kept.append(names.get(tuple(t.shape))) or t, lambda t: t):
    h = lora.ops.lora_linear(x, p)
print("saved:", ", ".join(sorted(kept)))
assert sorted(kept) == sorted(name for name in names.values() if name != "h")  # all but the output
assert h.shape == (6, 5)

# %% [markdown]
# **Answer 2.** Of your six only the output is missing. ($b$ is handed over with the others, and not used.) $W$, $b$,
# $A$ and $B$ are in memory anyway: what is saved *for the backward* is $x$ and the thin $s\,xA^\top$, which could be
# computed again from $x$ and $A$.
#
# How small should $\varepsilon$ be? The difference quotient is wrong by a term in proportion to $\varepsilon^2$ (we
# take the central one) and, because it subtracts two nearly equal numbers, by roundings in proportion to
# $1/\varepsilon$. The product $h$ is linear in each factor and would not show the first, so we look at it through a
# cubic loss, $L = \sum h^3$, with $dy = 3h^2$.


# %%
def loss(A):
    return forward(x, A, p.lora_B).pow(3).sum()


direction = torch.randn(p.lora_A.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
with torch.no_grad():
    dA = lora_linear_backward(3 * forward(x, p.lora_A, p.lora_B) ** 2, x, p).dlora_A  # by hand: no autograd here
slope = float((dA * direction).sum())
steps = torch.logspace(-12, -0.5, 47, dtype=torch.float64)
with torch.no_grad():
    quotients = [float((loss(p.lora_A + e * direction) - loss(p.lora_A - e * direction)) / (2 * e)) for e in steps]
errors = torch.tensor([abs(q / slope - 1) for q in quotients], dtype=torch.float64).clamp(min=1e-16)

ax = axes()
ax.loglog(steps, errors, ".-", label="central difference against dA by hand")
ax.loglog(steps, errors[-1] * (steps / steps[-1]) ** 2, "--", label=r"$\propto \varepsilon^2$, through the last point")
ax.loglog(steps, 1e-16 / steps, ":", color=COLOURS[5], label=r"$10^{-16}/\varepsilon$, not fitted")
ax.set_ylim(1e-14, 1e3)
finish(ax, "finite differences as a judge", "ε", "relative error", legend=True)

at_default = float(errors[(steps.log10() + 6).abs().argmin()])
print(f"at ε near 1e-6 the relative error is {at_default:.0e}; the smallest, {errors.min():.0e}, is at ε near "
      f"{float(steps[errors.argmin()]):.0e}")  # fmt: skip
assert at_default < 1e-8  # eight digits
assert 1e-8 < float(steps[errors.argmin()]) < 1e-2
assert errors[0] > 1e3 * errors.min() and errors[-1] > 1e3 * errors.min()  # far worse at both ends

# %% [markdown]
# The two errors meet where $\varepsilon^2 \approx 10^{-16}/\varepsilon$, near $5\cdot10^{-6}$: that is how small, and
# gradcheck's $10^{-6}$ is near it.
#
# ## The order of the products
#
# Matrix products are associative, their costs are not. A product of $[m, k]$ and $[k, n]$ takes $2mkn$ operations. For
# $T$ tokens:
#
# | order | operations |
# |---|---|
# | $(xA^\top)B^\top$ | $2\,T\,r\,(\text{in} + \text{out})$ |
# | $x(BA)^\top$ | $2\,r\,\text{in}\,\text{out} + 2\,T\,\text{in}\,\text{out}$ |
#
# We count them by running both under torch's `FlopCounterMode`, on tensors of the `meta` device, which have shapes and
# no numbers.


# %%
def flops(call) -> int:
    """The operations of all matrix products that call() runs."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


T, n = 2048, 4096
ranks = [1, 4, 16, 64, 256, 1024, 4096]
x_meta = torch.empty(T, n, device="meta")
thin, thick = [], []
for r in ranks:
    A, B = torch.empty(r, n, device="meta"), torch.empty(n, r, device="meta")
    thin.append(flops(lambda A=A, B=B: x_meta @ A.T @ B.T))
    thick.append(flops(lambda A=A, B=B: x_meta @ (B @ A).T))
    assert thin[-1] == 2 * T * r * (n + n) and thick[-1] == 2 * r * n * n + 2 * T * n * n

frozen = flops(lambda: x_meta @ torch.empty(n, n, device="meta").T)
ax = axes()
ax.loglog(ranks, [f / frozen for f in thin], "o-", label=r"$(xA^\top)B^\top$")
ax.loglog(ranks, [f / frozen for f in thick], "s-", label=r"$x(BA)^\top$")
ax.axhline(1, color=COLOURS[5], lw=1, ls="--", label=r"the frozen $xW^\top$")
finish(ax, f"operations, {n} → {n}, {T} tokens", "r", "times the frozen product", legend=True)

at_16 = ranks.index(16)
print(f"r = 16: the update costs {thin[at_16] / frozen:.2%} of the frozen product in one order, "
      f"{thick[at_16] / frozen:.0%} in the other: {thick[at_16] / thin[at_16]:.0f} times as much")  # fmt: skip
assert thin[at_16] < 0.01 * frozen < frozen < thick[at_16]
assert thick[at_16] / thin[at_16] == n / (2 * 16) + n / (2 * T)  # 128 for many tokens, and n / (2 T) more for few

# %% [markdown]
# **Answer 1**: 129 times, 128 of them for any number of tokens. In operations LoRA's update costs next to nothing
# here, under 1% of the frozen product. What it can cost is **memory**: what is saved for the backward.
#
# ## Bytes saved
#
# `workshop.saved_bytes` adds up what the hook sees, each piece of memory once, without the parameters. One SwiGLU
# MLP, $y = \mathrm{down}(\mathrm{silu}(\mathrm{gate}(x)) \odot \mathrm{up}(x))$ with $\mathrm{silu}(g) = g / (1 +
# e^{-g})$ and $\odot$ for the product entry by entry, has four wide intermediates: $g = \mathrm{gate}(x)$,
# $\mathrm{silu}(g)$, $z = \mathrm{up}(x)$, and the product. From $x$, $g$ and $z$ the others can be computed again in
# one element-wise pass. One could keep less ($x$ alone, say), but must then repeat large matrix products: that is
# checkpointing, and [notebook 8](08_memory.ipynb)'s subject.


# %%
def projection(fan_in: int, fan_out: int, r: int = 8) -> Projection:
    W = torch.randn(fan_out, fan_in) / fan_in**0.5
    A, B = torch.randn(r, fan_in) / fan_in**0.5, torch.randn(fan_out, r)
    return Projection(W, None, A.requires_grad_(), B.requires_grad_(), 0.1)


torch.manual_seed(0)
tokens, features, hidden = 256, 576, 1536  # one block of SmolLM2
gate, up, down = projection(features, hidden), projection(features, hidden), projection(hidden, features)
x = torch.randn(tokens, features, requires_grad=True)
parameters = [t for each in (gate, up, down) for t in each if isinstance(t, torch.Tensor)]

saved = {}
for backend in ("reference", "fast"):
    with lora.use_backend(backend):
        run = lambda: lora.ops.lora_mlp(x, gate, up, down, activation="silu")  # noqa: E731
        saved[backend] = workshop.saved_bytes(run, parameters)
wide, narrow = 4 * tokens * hidden, 4 * tokens * features
three = narrow + 2 * wide  # x, g and z

ax = axes(height=2.2)
labels = ["autograd on the\nreference", "the fast backend's\nautograd function", "x, g and z"]
sizes = [saved["reference"], saved["fast"], three]
ax.barh(labels, [size / 2**20 for size in sizes], color=COLOURS[:3])
ax.invert_yaxis()
finish(ax, f"saved for the backward of one MLP, {tokens} tokens", "MiB")

ratio = saved["reference"] / saved["fast"]
print(f"reference {workshop.mib(saved['reference'])}, fast {workshop.mib(saved['fast'])}: {ratio:.2f} times as much")
print(f"x, g and z {workshop.mib(three)}, the three u's {3 * 4 * tokens * 8 / 2**10:.0f} KiB")
assert saved["fast"] == three + 3 * 4 * tokens * 8  # x, g, z and u of rank 8 for each matrix: nothing else
assert ratio > 1.5

# %% [markdown]
# **Answer 3**: 1.84 times as many. And that is **the answer** to why anybody writes it by hand:
# `torch.autograd.Function` lets *us* say what to save, and the derivation says what can be left out. Here that is
# nearly half of the bytes. How you know that it is right: two judges that do not share its code, in float64, on
# inputs that hide nothing.
#
# ## Exercises
#
# **Exercise 1.** The whole backward: return `(dx, dA, dB)`. Use no autograd, and compute `dy @ B` once.


# %% tags=["exercise"]
def backward(dy, x, W, A, B, s):
    """The gradients of h = x Wᵀ + s (x Aᵀ) Bᵀ with respect to x, A and B."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(backward)
def check_backward(answer):
    for seed in range(3):
        x, dy, p = example(seed=seed, s=0.5 + seed)
        found = answer(dy, x, p.weight, p.lora_A, p.lora_B, p.scaling)
        assert isinstance(found, tuple) and len(found) == 3, "expected the three of (dx, dA, dB)."
        truth = lora_linear_backward(dy, x, p)
        for name, mine, right in zip(("dx", "dA", "dB"), found, (truth.dx, truth.dlora_A, truth.dlora_B), strict=True):
            assert_close(mine, right, name)


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def backward(dy, x, W, A, B, s):
#     u = x @ A.T
#     du = s * (dy @ B)
#     return dy @ W + du @ A, du.T @ x, s * dy.T @ u
# ```
# </details>
#
# **Exercise 2.** The judge itself: the derivative of a function `f` (of a tensor, to a number) in one entry, by a
# central difference.


# %% tags=["exercise"]
def numeric(f, X, index, eps=1e-6):
    """The derivative of f(X) with respect to X[index]; X must not be changed."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(numeric)
def check_numeric(answer):
    X = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    kept = X.clone()
    for index in ((0, 1), (1, 1)):
        found = answer(lambda t: float((t**3).sum()), X, index)
        right = 3 * float(X[index]) ** 2
        assert found is not None and abs(float(found) - right) < 1e-6 * right, (
            f"d(x³)/dx at {float(X[index])} is {found}, expected {right:.6f} to six digits: is the difference central?"
        )
    assert torch.equal(X, kept), "X was changed: work on a copy."


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def numeric(f, X, index, eps=1e-6):
#     above, below = X.clone(), X.clone()
#     above[index] += eps
#     below[index] -= eps
#     return (f(above) - f(below)) / (2 * eps)
# ```
# </details>
#
# **Exercise 3.** $h = x(W + sBA)^\top$ could also be computed by merging first. For $T$ tokens, when does a *forward*
# with a merged weight (formed anew each time) take fewer operations than $xW^\top + s(xA^\top)B^\top$? Return the
# smallest whole $T$. (Count the matrix products: $BA$ and $xW'^\top$ on one side; $xW^\top$, $xA^\top$ and $uB^\top$ on
# the other. Adding is free.)


# %% tags=["exercise"]
def merge_pays_from(fan_in, fan_out, r):
    """The smallest T from which merging first takes fewer operations."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(merge_pays_from)
def check_merge_pays_from(answer):
    for fan_in, fan_out, r in ((576, 576, 8), (4096, 14336, 16), (10, 15, 1)):
        T = answer(fan_in, fan_out, r)
        assert int(T) == T, f"it is {T!r}, expected a whole number of tokens."

        def merged(T, i=fan_in, o=fan_out, r=r):
            return 2 * r * i * o + 2 * T * i * o

        def apart(T, i=fan_in, o=fan_out, r=r):
            return 2 * T * i * o + 2 * T * r * (i + o)

        assert merged(T) < apart(T), f"at T = {T} merging a {fan_out} × {fan_in} weight does not pay yet."
        assert merged(T - 1) >= apart(T - 1), f"T = {T - 1} would do for {fan_out} × {fan_in}."


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def merge_pays_from(fan_in, fan_out, r):
#     return fan_in * fan_out // (fan_in + fan_out) + 1
# ```
#
# The rank cancels. For 576 × 576 it is 289 tokens: but the merged weight must be written to memory, and training needs
# $A$ and $B$ apart. In operations alone the matter cannot be decided.
# </details>
#
# ## Where this lives in the code
#
# - [`lora/reference/linear.py`](../lora/reference/linear.py): `lora_linear_backward`, with this derivation on top.
# - [`lora/fast/linear.py`](../lora/fast/linear.py), [`lora/fast/mlp.py`](../lora/fast/mlp.py): the autograd functions
#   that save the least.
# - Next: [fine-tune a real model](04_fine_tune.ipynb).
#
# ## References
#
# - E. Hu et al., *LoRA*, 2021; N. Shazeer, *GLU Variants Improve Transformer*, 2020.
# - M. Giles, *Collected matrix derivative results for forward and reverse mode algorithmic differentiation*, 2008.
