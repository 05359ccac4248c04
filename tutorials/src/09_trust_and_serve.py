# %% [markdown]
# # 9. Trusting it, serving it
#
# **The question.** A kernel returns numbers. How do you know that they are right, when *no* floating-point result is
# exact? And once a hundred fine-tunings are right: how do you serve them all from one machine?

# %% tags=["setup"]
import torch
from torch.utils.flop_counter import FlopCounterMode

import lora
from lora import Projection
from lora.reference.linear import lora_linear_backward
from lora.testing import (
    LinearCase,
    LinearInput,
    assert_equivalent,
    assert_within,
    in_float64,
    linear_bounds,
    unit_roundoff,
)
from workshop import COLOURS, assert_close, axes, checks, finish

# %% [markdown]
# ## Predict
#
# 1. A test says `torch.allclose(found, expected, atol=1e-2)`. A gradient's entries are about 0.003. Which wrong
#    gradient passes for sure?
# 2. A sum of 4096 products, in which each step is rounded by a relative $u$ at most. How far off can it be at most,
#    and how far is it usually?
# 3. 100 adapters of rank 16 on a model of 8 billion weights: how much memory, against 100 merged models?
#
# ## The derivation: how wrong may a right answer be?
#
# Rounding gives $\mathrm{fl}(a \circ b) = (a \circ b)(1 + \delta)$, for $\circ$ a sum or a product, with $|\delta|
# \le u$, half the distance from 1 to the next number of the type ($2^{-24}$ in float32, $2^{-8}$ in bfloat16). A
# product $y = \sum_{k=1}^K x_k w_k$, summed in any order, passes each term through at most $K$ roundings, so to first
# order
#
# $$|\hat y - y| \;\le\; K\,u \sum_k |x_k||w_k| \qquad\text{(certain)},$$
#
# and if the roundings are independent and equally often up as down, their sum is a random walk, whose size we can
# derive. Step $k$ of the sum rounds a partial sum $s_k$:
#
# **One rounding.** Take its error to be anywhere between $-u|s_k|$ and $u|s_k|$, each as likely. The mean of $t^2$ over
# $[-1, 1]$ is $\frac13$, so the mean square of the error is $u^2 s_k^2/3$. Hence the 3 below.
#
# **All of them.** Mean squares of independent errors add up: $\frac{u^2}3 \sum_k s_k^2$. With the products in random
# order, and $q = \sum_k (x_kw_k)^2$, one finds
#
# $$\mathrm E \sum_{k=1}^K s_k^2 \;\approx\; \frac K6\, q + \frac K3\, y^2 .$$
#
# The second part is what the partial sums are on average: $s_k \approx \frac kK y$, and $\sum_k (k/K)^2 \approx \frac
# K3$. In random order $s_k$ scatters around that with a variance of about $\frac{k(K-k)}{K^2}q$, and $\sum_k
# k(K-k)/K^2 \approx \frac K6$: the first part. So $y^2$ is there because a sum that grows is rounded at its own size;
# where all terms have one sign it is the larger part.
#
# **Room.** Real orders are not random, and the products are rounded too. The project takes $K(q + y^2)$ instead, at
# most six times that expectation.
#
# With $c$ standard deviations allowed, the bound is
#
# $$|\hat y - y| \;\lesssim\; c\,u\,\sqrt{K\Bigl(\sum_k (x_kw_k)^2 + y^2\Bigr)/3}, \qquad c = 6 .$$
#
# The project takes the smaller of the two for every *element* of every output and gradient, and carries it through all
# operations: [`lora/testing/bounded.py`](../lora/testing/bounded.py), derived in
# [`docs/numerics.md`](../docs/numerics.md).
# The $6$ is chosen, once, for all operations and types: a normal error is larger once in 500 million. No tolerance is
# fitted to what a test happens to give. The truth is the same formula in float64 **on the same rounded inputs**.
#
# First the two steps of the derivation, on 400 sums of 1,024 products:

# %%
u = unit_roundoff(torch.float32)


def check_walk(K: int, positive: bool) -> tuple[float, float]:
    """Of 400 sums: the mean square of one rounding in units of u|s|, and Σ s² over its expectation."""
    x, w = torch.randn(2, 400, K, generator=torch.Generator().manual_seed(K))
    terms = (x * w).abs() if positive else x * w
    running, squares, errors = torch.zeros(400), torch.zeros(400, dtype=torch.float64), []
    for term in terms.T.contiguous():
        exact = running.double() + term.double()
        running = running + term
        errors.append((running.double() - exact) / (u * exact.abs()))
        squares += running.double().square()
    q, y = terms.double().square().sum(1), terms.double().sum(1)
    expected = K / 6 * q + K / 3 * y.square()
    return float(torch.stack(errors).square().mean()), float(squares.mean() / expected.mean())


for positive, label in ((True, "one sign"), (False, "both signs")):
    rounding, ratio = check_walk(1024, positive)
    print(f"terms of {label:<10}: one rounding {rounding:.2f} (derivation: 0.33), "
          f"partial sums {ratio:.2f} of the expectation")  # fmt: skip
    assert 1 / 12 < rounding < 1 / 3 and abs(ratio - 1) < 0.05
once_in = 1 / torch.special.erfc(torch.tensor(6 / 2**0.5, dtype=torch.float64))
assert 5e8 < once_in < 5.1e8

# %% [markdown]
# One rounding is smaller than the derivation's $\frac13$: the numbers of a type lie equally far apart between two
# powers of two, so $u|s|$ is the largest error just above a power, and twice the largest just below the next. The bound
# is on the safe side there. Now the sums themselves, from 4 products to 65,536:

# %%
lengths = [2**k for k in range(2, 17, 2)]


def sums(K: int, positive: bool) -> tuple[float, float, float]:
    """Of 400 sums of K products: the largest and the mean error, and the walk's size, in units of u Σ|x||w|."""
    x, w = torch.randn(2, 400, K, generator=torch.Generator().manual_seed(K))
    terms = (x * w).abs() if positive else x * w  # the products are taken as exact: only the sum is looked at
    running = torch.zeros(400)
    for term in terms.T.contiguous():
        running = running + term  # one after the other, rounded each time
    exact, scale = terms.double().sum(1), u * terms.double().abs().sum(1)
    error = (running - exact).abs() / scale
    walk = u * (K * (terms.double().square().sum(1) + exact.square()) / 3).sqrt() / scale
    return float(error.max()), float(error.mean()), float(walk.mean())


ax = axes(width=5.4)
ax.loglog(lengths, lengths, "--", color="black", label="certain: K")
found = {}
for positive, colour, label in ((True, COLOURS[0], "one sign"), (False, COLOURS[1], "both signs")):
    found[positive] = torch.tensor([sums(K, positive) for K in lengths])  # [lengths, 3]
    largest, mean, walk = found[positive].T
    ax.loglog(lengths, 6 * walk, ":", color=colour, label=f"6 deviations, {label}")
    ax.loglog(lengths, largest, "o-", color=colour, label=f"largest of 400, {label}")
finish(ax, "error of a float32 sum of K products", "K", r"error, in units of $u\sum|x||w|$", legend=True)

for largest, mean, walk in (curves.T for curves in found.values()):
    assert (largest <= torch.tensor(lengths)).all() and (largest <= 6 * walk).all()
    assert (mean > walk / 5).all()  # the walk's size is less than five times the mean error
    assert largest[-1] < lengths[-1] / 100  # the certain bound alone would let much pass

print(f"4,096 products, in units of Σ|x||w|: at most {4096 * u:.1e}, certainly")  # prediction 2
for positive, label in ((True, "one sign"), (False, "both signs")):
    largest, mean, walk = found[positive][lengths.index(4096)].tolist()
    print(f"   terms of {label:<10}: {mean * u:.1e} on average, {largest * u:.1e} the largest of 400; "
          f"six deviations {6 * walk * u:.1e}")  # fmt: skip
    assert mean < 4096 / 200

# %% [markdown]
# Prediction 2: 4,096 products can be off by $4096\,u\sum|x||w|$; on average they are off by about 300 times less if
# all have one sign, and by 12,000 times less if they have both. There six deviations lie between: above every error
# that we saw, and far below what is certain. For very few products the certain bound is the smaller one, and the
# project takes that.
#
# ## A bound at work, and a tolerance that is none
#
# One layer in bfloat16, forward and backward, from both backends; each element's error in units of its own bound.
# Then three wrong gradients: all zeros, one that forgot the scaling, one that lost the last token. `LinearCase` draws
# the inputs, `linear_bounds` derives the bounds of all four results, and `assert_within` fails if any element is
# outside its own.


# %% tags=["setup"]
def everything(x, projection, dy) -> dict:
    """h, dx, dA and dB by the backend in force and autograd."""
    leaves = {"dx": x, "dlora_A": projection.lora_A, "dlora_B": projection.lora_B}
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    active = projection._replace(lora_A=leaves["dlora_A"], lora_B=leaves["dlora_B"])
    h = lora.ops.lora_linear(leaves["dx"], active)
    return {"h": h.detach()} | dict(zip(leaves, torch.autograd.grad(h, list(leaves.values()), dy), strict=True))


# %%
x, p, dy = LinearCase(tokens=48, in_features=256, out_features=96, rank=8, dtype=torch.bfloat16).build()
truth = everything(x.double(), in_float64(p), dy.double())
bounds = linear_bounds(x, p, dy)

shares = {}
for backend in ("reference", "fast"):
    with lora.use_backend(backend):
        found = everything(x, p, dy)
    for name in truth:
        assert_within(found[name], truth[name], bounds[name], f"{backend}'s {name}")
        shares[backend, name] = ((found[name].double() - truth[name]).abs() / bounds[name]).flatten()
    print(f"{backend:<9} uses at most", {name: f"{float(shares[backend, name].max()):.0%}" for name in truth})

wrongs = {
    "all zeros": torch.zeros_like(found["dlora_A"]),
    "no scaling": found["dlora_A"] / p.scaling,
    "last token lost": lora_linear_backward(dy[:-1], x[:-1], p).dlora_A,
}
rejected = {}
for name, wrong in wrongs.items():
    share = ((wrong.double() - truth["dlora_A"]).abs() / bounds["dlora_A"]).flatten()
    shares["wrong dA", name] = share
    rejected[name] = float((share > 1).double().mean())

ax = axes(width=6.0, height=3.2)
edges = torch.logspace(-4, 3, 60)
colours = iter([*COLOURS[:2], *COLOURS[:2], *COLOURS[2:5]])  # a result has one colour, whichever backend made it
for (kind, name), share in shares.items():
    if kind == "wrong dA" or name in ("h", "dlora_A"):
        style = {"reference": "-", "fast": "--", "wrong dA": ":"}[kind]
        colour = next(colours)
        heights = torch.histc(share.clamp(min=1e-4).log10().float(), 59, -4, 3) / len(share)
        ax.step(
            edges[:-1], heights, style, where="post", color=colour, label=f"{kind}: {name}".replace("dlora_A", "dA")
        )
ax.axvline(1, color="black", lw=1)
ax.set_xscale("log")
finish(ax, "error in units of its bound; right of 1 is rejected", "|error| / bound", "share of elements", legend=True)

for name, share in rejected.items():
    print(f"dA with {name}: {share:.0%} of its elements are outside their bounds")
    assert share > 0.3

small = truth["dlora_A"] * (0.003 / truth["dlora_A"].abs().max())  # the same gradient, of a smaller loss
assert torch.allclose(torch.zeros_like(small), small, atol=1e-2)  # prediction 1: zero passes for it
print(f"allclose, atol=1e-2: a gradient of zeros passes for one with entries up to {float(small.abs().max()):.3f}")

# %% [markdown]
# Prediction 1: zeros pass, since no entry is further than 0.01 from them. The bounds reject all three, in most of
# their elements, and the right results use up to half of theirs. Of the right results the picture shows $h$ and $dA$;
# $dx$ and $dB$ are in the printed lines only. The curve of `fast: dA` lies on that of `reference: dA`, and the two of
# $h$ are nearly one.
#
# ## One input is no proof: properties, and mutants
#
# `assert_equivalent` does the above for any operation. That both backends are within the bound is a *property*: it
# must hold for every input, not for one that somebody chose. [Hypothesis](https://hypothesis.readthedocs.io) is a
# Python package for tests of properties: it draws many inputs, and where one fails it looks for a simpler one that
# fails too. The project's tests of properties, in `tests/proof`, are called its *proofs*, though what they prove is
# only that no drawn input failed. They draw odd sizes, tensors whose elements are not side by side, and numbers that
# arithmetic treats apart (zeros, the smallest there are). Here is one case drawn by hand:

# %%
assert_equivalent(LinearInput(seed=1, shape=(3, 5), in_features=33, dtype=torch.bfloat16))
print("lora_linear: both backends are within the bound on a case of 15 tokens and 33 features")

# %% [markdown]
# But who tests the tests? A **mutant** is the real source with one mistake. If a proof fails on it, the mutant is
# *killed*; if all pass, they say nothing about that line. `mutate` makes a mutant in memory, `run` runs the proofs on
# it in a process of its own. We take two lines of the fast backend. One computes $du = s\,dy\,B$ ([notebook
# 3](03_backward.ipynb); `dh` is $dy$), the other adds the update to $h$. `C.addmm_(X, Y)` adds $XY$ to $C$ in place,
# with `alpha` times $XY$ and `beta` times the old $C$; both are 1 unless given.

# %%
from lora.testing.mutants import mutate, run

mistakes = {
    "the scaling is missing in du": ("du_i.addmm_(dh, B, beta=0, alpha=part.scaling)", "du_i.addmm_(dh, B, beta=0)"),
    "h is overwritten by the update": ("h_i.addmm_(u_i, B.T)", "h_i.addmm_(u_i, B.T, beta=0)"),
}
for mistake, (old, new) in mistakes.items():
    mutant = mutate("lora.fast.linear", old, new, mistake=mistake, interpret=False)
    outcome = run(mutant)
    print(f"{mistake}: {outcome.status} by an {outcome.how} of\n    {outcome.by}")
    assert outcome.killed and outcome.how == "assertion"

# %% [markdown]
# More than five hundred such mutants are part of the project's own tests; [`docs/mutants.md`](../docs/mutants.md)
# lists each with what killed it, and the mistakes that no input can tell from the source.
#
# ## Serving: many adapters in one batch
#
# A hundred users, a hundred fine-tunings. Merging makes a hundred models. But the frozen product is the same for all:
# row $i$ of a batch, with adapter $j_i$, is
#
# $$h_i = W x_i + s_{j}\,B_{j} A_{j}\, x_i, \qquad j = j_i ,$$
#
# and only the thin products differ (Punica, S-LoRA, 2023). `multi_lora_linear` takes stacked adapters and an index,
# $-1$ for the base alone. Ranks may differ: pad with zero rows of $A$ and zero columns of $B$, whose products are zero.

# %%
torch.manual_seed(0)
adapters, r, fan_in, fan_out, length = 5, 8, 96, 64, 7
base = Projection(torch.randn(fan_out, fan_in) / 10)
A, B = torch.randn(adapters, r, fan_in) / 10, torch.randn(adapters, fan_out, r)
A[3, 4:], B[3, :, 4:] = 0, 0  # adapter 3 has rank 4
scaling = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.5])
index = torch.tensor([4, 0, -1, 3, 0, 2])  # six requests
x = torch.randn(len(index), length, fan_in)

together = lora.ops.multi_lora_linear(x, base, A, B, scaling, index)
with lora.use_backend("fast"):
    assert_close(lora.ops.multi_lora_linear(x, base, A, B, scaling, index), together, "fast", atol=1e-5)
for row, j in enumerate(index.tolist()):
    own = base if j < 0 else base._replace(lora_A=A[j], lora_B=B[j], scaling=float(scaling[j]))
    assert_close(together[row], lora.ops.lora_linear(x[row], own), f"row {row}", atol=1e-5)

narrow = base._replace(lora_A=A[3, :4], lora_B=B[3, :, :4], scaling=float(scaling[3]))  # adapter 3 without its padding
assert_close(together[3], lora.ops.lora_linear(x[3], narrow), "the padded adapter", atol=1e-5)

# another user's adapter must not matter: change adapter 2, and only the row that asked for it moves
changed = lora.ops.multi_lora_linear(x, base, A, B + (torch.arange(adapters) == 2)[:, None, None], scaling, index)
moved = (changed != together).flatten(1).any(1)
assert moved.tolist() == [False, False, False, False, False, True]

# %% [markdown]
# ### What it saves
#
# The shapes of Llama-3.1-8B's linear layers, rank 16, 2 bytes a number, counted by shape alone; the frozen parts that
# are not adapted (embedding and head) are left out on both sides. The line at 80 GB is one H100's memory. The
# arithmetic is counted on the small layer above: the frozen product once, and $2r(\text{in} + \text{out})$ operations
# for each token with an adapter.

# %%
layers = 32
shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
weights = 2 * layers * sum(out * in_ for out, in_ in shapes)
adapter = 2 * layers * sum(16 * (out + in_) for out, in_ in shapes)
tenants = [1, 2, 5, 10, 20, 50, 100, 200]
shared = [(weights + n * adapter) / 1e9 for n in tenants]
merged = [n * weights / 1e9 for n in tenants]


def flops_of(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


batched = flops_of(lambda: lora.reference.multi_lora_linear(x, base, A, B, scaling, index))
frozen = flops_of(lambda: x @ base.weight.T)
tuned_rows = int((index >= 0).sum())
assert batched == frozen + 2 * tuned_rows * length * r * (fan_in + fan_out)

ax = axes()
ax.loglog(tenants, merged, "s-", color=COLOURS[1], label="a merged model each")
ax.loglog(tenants, shared, "o-", color=COLOURS[0], label="one base, an adapter each")
ax.axhline(80, color=COLOURS[5], lw=1, ls="--")
ax.text(1, 90, "80 GB", fontsize=8)
finish(ax, "memory for weights, 8B model, r = 16", "fine-tunings", "GB", legend=True)
print(f"an adapter is {adapter / weights:.2%} of the weights; 100 of them and the base: {shared[6]:.0f} GB, "
      f"merged: {merged[6]:,.0f} GB")  # fmt: skip
assert adapter < 0.01 * weights
assert tenants[6] == 100 and shared[6] < 30 and merged[6] > 1000  # prediction 3
assert shared[0] > merged[0] and all(a < b for a, b in zip(shared[1:], merged[1:], strict=True))

thin, wide = (sum(2 * n for n in sizes) for sizes in zip(*((16 * (o + i), o * i) for o, i in shapes), strict=True))
print(f"the thin products are {thin / wide:.2%} of the frozen products' arithmetic, for each token")
assert thin / wide == adapter / weights < 0.0061

# %% [markdown]
# Prediction 3: 22 GB against 1,396. Merging is still right for *one* fine-tuning: it costs nothing at inference. From
# two on, sharing needs less memory. Its price in arithmetic is the thin products, 0.60% at these sizes. Its price in
# *time* is more than that: thin products wait for memory, and each is a launch, a kernel of its own ([notebook
# 7](07_triton.ipynb)). [Measured on an H100](../docs/benchmarks/h100.md), one layer of 4096 × 4096 with 8 adapters
# and 8,192 tokens, forward and backward as in training, takes about three times as long as the frozen product alone.
#
# **The answer.** Not by equality, and not by a tolerance that somebody found wide enough: by a bound for each
# element, derived from the roundings, against the same formula in float64, on drawn inputs, with tests that have been
# seen to fail on mistakes. It is no certainty: six deviations are a statement about probability, and inputs that
# nobody drew may hide a mistake. A hundred fine-tunings share one frozen model, and each brings its thin $A$ and $B$:
# 0.60% of the weights.
#
# ## Exercises
#
# **Exercise 1.** The certain bound of a matrix product: for `x` [T, K] and `w` [N, K], the bound of each element of
# $xw^\top$ summed in a type of roundoff `u`, in float64.


# %% tags=["exercise"]
def product_bound(x, w, u):
    """K · u · Σ|x||w| for each element: [T, N], float64."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(product_bound)
def check_product_bound(answer):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(20, 64, generator=generator), torch.randn(30, 64, generator=generator)
    u = unit_roundoff(torch.float32)
    found = answer(x, w, u)
    assert_close(found, 64 * u * (x.double().abs() @ w.double().abs().T), "the bound", atol=1e-12)
    assert found.dtype == torch.float64, f"it is {found.dtype}: a bound that is itself rounded is none."
    assert_within(x @ w.T, x.double() @ w.double().T, found, "a float32 product")


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def product_bound(x, w, u):
#     return x.shape[1] * u * (x.double().abs() @ w.double().abs().T)
# ```
# </details>
#
# **Exercise 2.** The test itself. `accepts(found, truth, bound)` returns whether every element is within its bound.
# The checker gives it a right result and wrong ones: zeros, a result twice as large, a wrong last row, a NaN, a wrong
# shape.


# %% tags=["exercise"]
def accepts(found, truth, bound):
    """True where found is right, to within the bound; False for everything else."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(accepts)
def check_accepts(answer):
    x, p, dy = LinearCase(tokens=6, in_features=16, out_features=8, rank=2).build()
    truth, bound = everything(x.double(), in_float64(p), dy.double())["dlora_A"], linear_bounds(x, p, dy)["dlora_A"]
    right = everything(x, p, dy)["dlora_A"]
    assert answer(right, truth, bound) is True, "a right result is rejected."
    last, nan = right.clone(), right.clone()
    last[-1], nan[0, 3] = last[-1].flip(0), torch.nan
    wrong = {"zeros": right * 0, "twice the result": 2 * right, "a wrong last row": last, "a NaN": nan}
    for name, other in (wrong | {"a row too few": right[:-1]}).items():
        assert answer(other, truth, bound) is False, f"a wrong result is accepted: {name}."


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def accepts(found, truth, bound):
#     if found.shape != truth.shape:
#         return False
#     return bool(((found.double() - truth).abs() <= bound).all())
# ```
#
# A comparison with NaN is False, so `(… <= bound).all()` rejects it. `not (… > bound).any()` would let it pass.
# </details>
#
# **Exercise 3.** Many adapters in one batch, by yourself: rows `x` [rows, in], one adapter number each, $-1$ for
# none. Use the frozen product once.


# %% tags=["exercise"]
def many(x, W, A, B, s, index):
    """h_i = W x_i + s_j B_j A_j x_i with j = index_i: [rows, out]."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(many)
def check_many(answer):
    generator = torch.Generator().manual_seed(5)
    shapes = ((6, 9), (4, 9), (3, 2, 9), (3, 4, 2))
    x, W, A, B = (torch.randn(*shape, generator=generator) for shape in shapes)
    s = torch.tensor([1.0, 0.5, 2.0])
    for index in (torch.tensor([0, 1, 2, -1, 0, 2]), torch.full((6,), -1), torch.full((6,), 1)):
        right = lora.reference.multi_lora_linear(x, Projection(W), A, B, s, index)
        assert_close(answer(x, W, A, B, s, index), right, f"h for the adapters {index.tolist()}", atol=1e-5)


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def many(x, W, A, B, s, index):
#     h = x @ W.T
#     for j in range(len(A)):
#         rows = index == j
#         h[rows] += s[j] * (x[rows] @ A[j].T) @ B[j].T
#     return h
# ```
#
# A GPU does not like the loop: [`lora/fast/kernels/multi_lora.py`](../lora/fast/kernels/multi_lora.py) sorts the rows
# by adapter, and then does the products with all $A_j$ in one launch and those with all $B_j$ in another.
# </details>
#
# ## Where this lives in the code
#
# - [`lora/testing/`](../lora/testing/__init__.py): bounds, cases, mutants; [`docs/numerics.md`](../docs/numerics.md)
#   and [`docs/proof.md`](../docs/proof.md): what was derived, and what was proven.
# - [`lora/reference/multi_lora.py`](../lora/reference/multi_lora.py),
#   [`lora/fast/multi_lora.py`](../lora/fast/multi_lora.py): many adapters.
# - You have come to the end. Take an operation, break it, and see who notices.
#
# ## References
#
# - N. Higham, *Accuracy and Stability of Numerical Algorithms*, 2002, chapters 2 to 4.
# - N. Higham and T. Mary, *A New Approach to Probabilistic Rounding Error Analysis*, 2019.
# - L. Chen et al., *Punica*, 2023; Y. Sheng et al., *S-LoRA*, 2023.
