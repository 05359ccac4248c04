# %% [markdown]
# # 7. From PyTorch to Triton
#
# **The question.** A *kernel* is a function that runs on a GPU, and PyTorch's are fast. Why does the fast backend
# bring its own, and can you learn to read and write them without a GPU?

# %% [markdown]
# Triton compiles Python functions, written in a small part of Python, to kernels. Its *interpreter* runs the same
# source on CPU tensors. It must be chosen before Triton is imported. What it computes is what the kernel says; it
# tells nothing of a GPU's speed.

# %% tags=["setup"]
import os

os.environ["TRITON_INTERPRET"] = "1"

import itertools
import json
import re
import subprocess
import sys

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from lora import Projection
from lora.fast.kernels import activation, gemm
from workshop import COLOURS, ROOT, assert_close, axes, checks, finish

# %% [markdown]
# ## Predict
#
# 1. SwiGLU, $h = \mathrm{silu}(g) \odot z$, is two operations in PyTorch. How many tensors do they read from memory
#    and write to it, and how many must be?
# 2. A kernel works on blocks of 128 elements, and there are 300. If nothing tells it where to stop: what does it
#    read, and what does it *write*?
# 3. An H100, the GPU of this notebook, moves 3.35 TB/s to and from its memory and does 989 TFLOP/s ($10^{12}$
#    operations a second) on 16-bit numbers. Which of the two limits SwiGLU? And a LoRA linear layer 4096 → 14336 on
#    64 tokens, on 8192?
#
# ## The derivation: the roofline
#
# A kernel that moves $Q$ bytes and does $F$ operations takes at least
#
# $$t \ge \max\left(\frac{Q}{\beta}, \frac{F}{\pi}\right),$$
#
# with $\beta$ bytes and $\pi$ operations a second. The second term is the larger one, the kernel is *bound by
# arithmetic*, if its *intensity* $F/Q$ exceeds $\pi/\beta$: on an H100 about 295 operations a byte, the *ridge* of
# the roof. Else it is *bound by memory*. SwiGLU reads $g$ and $z$, writes $h$, 2 bytes a number, and does some ten
# operations, if the exponential and the division count as several: intensity $10/6$. (The count need not be exact.
# The 989 TFLOP/s are those of matrix products; other arithmetic reaches 67 in float32, and even so 20 operations a
# byte would be hidden behind memory, 120 for these six bytes.) So SwiGLU is bound by memory, and only moving fewer
# bytes makes it faster. Two PyTorch operations read three tensors and write two ($\mathrm{silu}(g)$ goes out to
# memory and comes back): five crossings. A *fused* kernel, both operations in one, has three. We let PyTorch tell us
# what its operations read and write:


# %%
class Crossings(TorchDispatchMode):
    """Counts the tensors that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += sum(isinstance(x, torch.Tensor) for x in (*args, result))
        return result


g, z = (torch.randn(300, requires_grad=True) for _ in range(2))
dh = torch.randn(300)
with Crossings() as forward:
    h = torch.nn.functional.silu(g) * z
with Crossings() as backward:
    torch.autograd.grad(h, (g, z), dh)
needed = 3 + 5  # forward g, z, h; backward dh, g, z, dg, dz
both = forward.count + backward.count
print(f"PyTorch: {forward.count} crossings forward and {backward.count} backward; needed: 3 and 5, "
      f"so {both / needed:.2f} times the bytes")  # fmt: skip
assert forward.count == 5 and backward.count == 9  # prediction 1

# %% [markdown]
# Prediction 1: five crossings, of which three are needed. By bytes alone, PyTorch's operations should take 1.75 times
# as long as fused kernels, forward and backward together. [Measured on an H100](../docs/benchmarks/h100.md), for
# 8,192 tokens of 14,336 features in bfloat16, they take 1.74 times as long as the project's.

# %% [markdown]
# ## A kernel in ten lines
#
# A Triton kernel is written for one *program*, which handles one block. To *launch* a kernel is to start it, from the
# CPU (the *host*), with a number of programs: `kernel[(3,)]` has three. A GPU runs many of them at the same time, in
# no promised order. `program_id` says which one this is, `arange` makes the offsets of a whole block, a *mask* says
# which of them exist. A tensor arrives as a pointer to its first number, `g_ptr`; `tl.load` and `tl.store` take the
# pointer plus offsets. `tl.constexpr` marks what is known when the kernel is compiled.


# %% tags=["setup"]
@triton.jit
def swiglu_kernel(g_ptr, z_ptr, h_ptr, n, BLOCK: tl.constexpr):
    """One program computes BLOCK elements of h = silu(g) ⊙ z."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_g = tl.load(g_ptr + o, mask=m, other=0.0)
    b_z = tl.load(z_ptr + o, mask=m, other=0.0)
    tl.store(h_ptr + o, b_g / (1 + tl.exp(-b_g)) * b_z, mask=m)


# %%
torch.manual_seed(0)
g, z = torch.randn(300), torch.randn(300)
h = torch.full_like(g, torch.nan)  # what no program writes stays NaN
swiglu_kernel[(triton.cdiv(300, 128),)](g, z, h, 300, BLOCK=128)  # 3 programs, the last one masked after 44
assert_close(h, torch.nn.functional.silu(g) * z, "h")

# %% [markdown]
# **Without the mask** (prediction 2) the last program reads and writes 84 numbers that are not its own. We give it a
# larger buffer, so that we can look at the damage:


# %%
@triton.jit
def careless_kernel(g_ptr, z_ptr, h_ptr, n, BLOCK: tl.constexpr):
    """The same with no mask: wrong."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_g = tl.load(g_ptr + o)
    tl.store(h_ptr + o, b_g / (1 + tl.exp(-b_g)) * tl.load(z_ptr + o))


roomy_g, roomy_z = torch.ones(384), torch.ones(384)
neighbour = torch.full((384,), 7.0)  # h is the first 300; what follows belongs to somebody else
careless_kernel[(3,)](roomy_g, roomy_z, neighbour, 300, BLOCK=128)
print(f"overwritten behind the end: {int((neighbour[300:] != 7).sum())} numbers, and as many of g and of z were read")
assert int((neighbour[300:] != 7).sum()) == 84 == 3 * 128 - 300
swiglu_kernel[(3,)](roomy_g, roomy_z, fine := torch.full((384,), 7.0), 300, BLOCK=128)
assert (fine[300:] == 7).all() and (fine[:300] != 7).all()

# %% [markdown]
# ## Two dimensions, and who does what
#
# The project's [`gated_forward_kernel`](../lora/fast/kernels/activation.py), SwiGLU again, works on *tiles*,
# rectangular blocks of a matrix. Its offsets come from `tile_offsets`. Kernels for matrix products, $xW^\top$, each
# program making one tile of the result, walk over the tiles in groups (`tile_in_group`). Programs with neighbouring
# numbers run at about the same time, and the fewer row blocks of $x$ and column blocks of $W^\top$ they read
# together, the more of them are found in the cache, a small and fast memory for what was read last. We let each
# program write its number into its tile, and count what the first 16 programs read. (A matrix product is called a
# *GEMM* in the code: general matrix multiplication.)


# %%
@triton.jit
def who_kernel(out_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Each element gets the number of the program that owns it: rows of tiles."""
    o_m, o_n = activation.tile_offsets(N, BLOCK_M, BLOCK_N)
    tl.store(out_ptr + o_m * N + o_n, tl.program_id(0), mask=(o_m < M) & (o_n < N))


@triton.jit
def who_grouped_kernel(out_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The same in the order of the LoRA GEMM."""
    tile_m, tile_n = gemm.tile_in_group(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    o_m, o_n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None], tile_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out_ptr + o_m * N + o_n, tl.program_id(0), mask=(o_m < M) & (o_n < N))


M, N, BM, BN = 62, 122, 8, 16
tiles = triton.cdiv(M, BM) * triton.cdiv(N, BN)
plain, grouped = (torch.full((M, N), -1, dtype=torch.int32) for _ in range(2))
who_kernel[(tiles,)](plain, M, N, BLOCK_M=BM, BLOCK_N=BN)
who_grouped_kernel[(tiles,)](grouped, M, N, BLOCK_M=BM, BLOCK_N=BN, GROUP_M=4)

for ax, image, title in zip(
    axes(2, height=2.6), (plain, grouped), ("row after row", "in groups of 4 rows"), strict=True
):
    ax.imshow(torch.where(image < 16, 20 + image, 5), cmap="Blues", vmin=0, vmax=40, aspect="auto")
    ax.grid(False)
    for pid in range(tiles):
        rows, columns = (image == pid).nonzero(as_tuple=True)
        place, colour = (columns.float().mean(), rows.float().mean()), "white" if pid < 16 else COLOURS[5]
        ax.text(*place, pid, ha="center", va="center", color=colour, fontsize=7)
    finish(ax, f"{title}; programs 0 to 15 stand out", "column of the matrix", "row of the matrix")


def operand_tiles(image) -> int:
    """Row blocks of x and column blocks of w that programs 0 to 15 read together."""
    rows, columns = (image < 16).nonzero(as_tuple=True)
    return len(set((rows // BM).tolist())) + len(set((columns // BN).tolist()))


print(f"operand tiles that 16 programs read: {operand_tiles(plain)} row after row, {operand_tiles(grouped)} in groups")
for image in (plain, grouped):
    assert image.min() == 0 and image.max() == tiles - 1  # every element was written, by a program that exists
    assert len(image.unique()) == tiles
assert operand_tiles(plain) == 2 + 8 and operand_tiles(grouped) == 4 + 4

# %% [markdown]
# ## The real thing, in the interpreter
#
# `gated_forward` launches `gated_forward_kernel` with its masks, strides and types. A *stride* is how many numbers lie
# between the starts of two rows in memory: for a matrix of 50 columns that lies there by itself it is 50. Rows need not
# follow each other without a gap, so we give it the two halves of one buffer, as the fast backend does: each has 50
# columns and a stride of 100.
#
# `gated_backward` has three results: $dg$, $dz$, and $h$ once more, for a layer that did not keep it. It has $g$ and
# $z$ at hand, so it only takes one more write. Without `with_h=True` the third is `None`.

# %%
both = torch.randn(13, 2 * 50)
g, z = both.chunk(2, dim=1)  # not contiguous
assert g.stride() == z.stride() == (100, 1)
out = activation.gated_forward(g, z, "silu")
assert_close(out, torch.nn.functional.silu(g) * z, "SwiGLU forward")

dh = torch.randn(13, 50)
dg, dz, none = activation.gated_backward(dh, g, z, "silu")
assert none is None
_, _, again = activation.gated_backward(dh, g, z, "silu", with_h=True)
assert_close(again, out, "h once more", atol=1e-6)
leaves = [g.clone().requires_grad_(), z.clone().requires_grad_()]
truth = torch.autograd.grad(torch.nn.functional.silu(leaves[0]) * leaves[1], leaves, dh)
assert_close(dg, truth[0], "dg", atol=1e-5)
assert_close(dz, truth[1], "dz", atol=1e-5)

# %% [markdown]
# ## The LoRA GEMM, step by step
#
# One tile of $h = xW^\top + s\,uB^\top$ in one program, with $u = xA^\top$ given (without $s$, as in [notebook
# 3](03_backward.ipynb)). A program adds up its tile in an *accumulator*, which it holds in registers, the memory next
# to the arithmetic. The trick is in the first line: **the accumulator does not start at zero, it starts at the
# update**. So the update never goes to memory, and no addition of its own is needed. In plain Python, one tile, and
# below it the tile of rows 0 to 15 and columns 16 to 31 of an $h$ with 24 rows and 40 columns:


# %% tags=["setup"]
def lora_tile(x, W, u, B, s, rows, columns, block_k=16):
    """h[rows, columns] as one program computes it, and the accumulator after each step."""
    acc = s * (u[rows] @ B[columns].T)  # [BLOCK_M, BLOCK_N], float32, in registers
    states = [acc.clone()]
    for k in range(0, x.shape[1], block_k):
        acc += x[rows, k : k + block_k] @ W[columns, k : k + block_k].T
        states.append(acc.clone())
    return acc, states


# %%
torch.manual_seed(0)
tokens, fan_in, fan_out, r, s = 24, 64, 40, 4, 0.5
x, W = torch.randn(tokens, fan_in), torch.randn(fan_out, fan_in) / 8
A, B = torch.randn(r, fan_in) / 8, torch.randn(fan_out, r)
u = gemm.skinny_gemm(x, A)  # x Aᵀ, the thin product, a kernel of its own
assert_close(u, x @ A.T, "u", atol=1e-5)
full = gemm.lora_gemm(x, W, u, B, None, s)  # the real kernel, interpreted

tile, states = lora_tile(x, W, u, B, s, slice(0, 16), slice(16, 32))
assert_close(tile, full[:16, 16:32], "the tile", atol=1e-5)
assert_close(full, lora.reference.lora_linear(x, Projection(W, None, A, B, s)), "the kernel", atol=1e-5)
assert_close(states[0], s * (u @ B.T)[:16, 16:32], "what the accumulator starts from", atol=1e-5)

figures = axes(len(states), width=2.0, height=2.1)
for number, (ax, state) in enumerate(zip(figures, states, strict=True)):
    shown = ax.imshow(state, cmap="RdBu", vmin=-4, vmax=4)
    ax.set_xticks([])
    ax.set_yticks([])
    title, rows = ("s·u Bᵀ", "row 0 to 15") if number == 0 else (f"+ x Wᵀ, k < {16 * number}", "")
    finish(ax, title, "column 16 to 31", rows)
_ = figures[0].figure.colorbar(shown, ax=figures, label="the accumulator", extend="both")

# %% [markdown]
# ## What it compiles to, without a GPU
#
# Triton's compiler needs no GPU: it compiles for an H100 on a laptop, and `lora.fast.kernels.compile_check` reads
# what came out. (In a process of its own: under the interpreter, kernels are Python functions.) On the GPU, a program
# runs on one of its many *multiprocessors*, as a group of *threads*, often 128 or 256, which share the elements of a
# tile among them. A multiprocessor can hold several programs at a time, and has *tensor cores*, units for small
# matrix products. How to read the report:
#
# - **Registers** hold a thread's numbers. A thread has 255 at most, a multiprocessor 65,536 for all its threads: the
#   more each takes, the fewer threads are there to work while others wait for memory.
# - **Spills** are instructions that put into memory what found no register, or fetch it back. In a loop over tiles they
#   are paid at each step; the aim is 0.
# - **Shared memory** is the multiprocessor's own, 227 KiB for one program at most. Tiles of $x$ and $W$ arrive there
#   ahead of time, for all threads of the program.
# - **Matrix instruction**: which generation of the tensor cores' instructions is used. HGMMA is that of Hopper, the
#   H100's generation of GPUs. The 989 TFLOP/s are those of the tensor cores, so a product without one is far below
#   the roof; an element-wise kernel has none.
# - **128-bit loads** fetch eight 16-bit numbers a thread with one instruction. Narrower ones need more instructions for
#   the same bytes.
# - **Atomics** add to memory from several programs in whatever order they come: results could differ from run to run.
#   There should be none.
#
# `compile_specs` lists kernels with sizes to compile them for. The list also says how many bytes a call must move and
# how many operations it does, which is all the roofline needs. (`sm_90` is the compiler's name for Hopper.)

# %%
PROGRAM = """
import json
from lora.fast.kernels import activation, gemm
from lora.fast.kernels.compile_check import compile_for
specs = [*gemm.compile_specs(), *activation.compile_specs()]
rows = [(s.name, s.flops, s.bytes_minimum, "fp32" in s.name) for s in specs]
chosen = [s for s in specs if s.name in (specs[0].name, "gated_forward silu bfloat16")]
fields = ("registers", "spills", "shared_bytes", "matrix_instruction", "wide_loads", "atomics")
reports = {s.name: {f: getattr(compile_for(s, "sm_90"), f) for f in fields} for s in chosen}
print(json.dumps([rows, reports]))
"""
environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
environment["PYTHONPATH"] = str(ROOT)
finished = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
rows, reports = json.loads(finished.stdout)

for name, report in reports.items():
    wide, loads = report["wide_loads"]
    print(f"{name}\n   {report['registers']} registers a thread, {report['spills']} spills, "
          f"{report['shared_bytes'] // 1024} KiB shared, matrix instruction {report['matrix_instruction'] or 'none'}, "
          f"{wide} of {loads} loads are of 128 bits, {report['atomics']} atomics")  # fmt: skip
    assert report["spills"] == 0 and report["atomics"] == 0 and wide == loads
product, elementwise = reports.values()
assert product["matrix_instruction"] == "HGMMA" and elementwise["matrix_instruction"] == ""

# %%
BANDWIDTH, PEAK = 3.35e12, 989e12  # H100, 16-bit operands
ridge = PEAK / BANDWIDTH
kinds = {"lora_gemm": "o", "skinny_gemm": "s", "lora_A_gradient": "^", "gated_forward silu bfloat16": "D"}
ax = axes(width=5.6, height=3.4)
intensities = torch.logspace(-1, 4, 50)
ax.loglog(intensities, (intensities * BANDWIDTH).clamp(max=PEAK) / 1e12, color=COLOURS[5])
points = {}
places = {  # of the points' labels, each set once
    "64 tokens": (-7, 3, "right"),
    "256 tokens": (-7, 1, "right"),
    "512 tokens": (4, -12, "left"),
    "8192 tokens": (0, 6, "center"),
    "r 16": (8, -9, "left"),
    "r 48": (9, -13, "left"),
    "r 64": (9, -4, "left"),
}
for colour, (kind, marker) in zip(COLOURS, kinds.items(), strict=False):
    found = [row for row in rows if row[0].startswith(kind) and ", plus" not in row[0] and not row[3]]
    found = [(name, f or 10 * q / 6, q) for name, f, q, _ in found]  # SwiGLU: about ten operations for six bytes
    for name, f, q in found:
        points[name] = f / q
    xs = torch.tensor([f / q for _, f, q in found])
    label = kind.split(" ")[0].replace("gated_forward", "SwiGLU")
    size = 9 if kind == "skinny_gemm" else 6  # it lies under others of the same intensity
    ax.loglog(xs, (xs * BANDWIDTH).clamp(max=PEAK) / 1e12, marker, color=colour, label=label, markersize=size)
    for name, f, q in found:  # what the intensity depends on: the tokens, or the rank
        words = re.search(r"\d+ tokens" if kind == "lora_gemm" else r"r \d+", name)
        if words and words[0] in places:
            ax.annotate(words[0], (f / q, min(f / q * BANDWIDTH, PEAK) / 1e12), places[words[0]][:2],
                        textcoords="offset points", fontsize=8, ha=places.pop(words[0])[2])  # fmt: skip
ax.axvline(ridge, color=COLOURS[5], lw=1, ls=":")
ax.text(ridge * 1.15, 0.4, f"ridge: {ridge:.0f}", fontsize=8)
ax.text(0.15, 0.2, "bound by memory", fontsize=8)
ax.text(ridge * 1.15, 0.2, "bound by arithmetic", fontsize=8)
ax.set_ylim(0.12, 4e3)
finish(ax, "roofline of an H100 (bounds, not measured times)", "operations a byte", "TFLOP/s at most", legend=True)

large = next(v for k, v in points.items() if k.startswith("lora_gemm forward bf16, 8192"))
small = next(v for k, v in points.items() if k.startswith("lora_gemm forward bf16, 64"))
swiglu = points["gated_forward silu bfloat16"]
print(f"ridge {ridge:.0f} operations a byte; SwiGLU {swiglu:.1f}, "
      f"LoRA GEMM 4096 → 14336 on 64 tokens {small:.0f}, on 8192 {large:.0f}")  # fmt: skip
assert swiglu < small < ridge < large  # prediction 3

weight_share = 4096 * 14336 / (64 * 4096 + 4096 * 14336 + 64 * 14336 + 16 * (64 + 14336))
print(f"on 64 tokens W is {weight_share:.0%} of all bytes")
assert weight_share > 0.97
for name, value in points.items():  # the thin products: x Aᵀ, and dA
    if name.startswith(("skinny_gemm", "lora_A_gradient")):
        r = int(name.split(" r ")[1].split()[0])
        assert 0.9 * r < value < r, name

# %% [markdown]
# The picture's points are the list's 16-bit kernels, with Llama-3.1-8B's sizes. The blue ones are this GEMM at rank 16
# on 64 to 8192 tokens: $h$ (4096 → 14336) on 64, 256 and 8192, $dx$ (14336 → 4096) on 64, 512 and 8192. The thin
# products have 4096 features and stand at their rank: 16 is one adapter, 48 the adapters of $q$, $k$ and $v$ stacked,
# which read the same $x$, and 64 a larger one. (32, between them, is gate and up; it has no label.) The green point of
# r 64 lies on the blue one of 64 tokens.
#
# Prediction 3: SwiGLU is bound by memory (1.7 operations a byte, the ridge is at 295), and so is the layer on 64
# tokens (63), where nearly all it waits for is $W$, as in generation, where 64 sequences get one more token each. On
# 8192 tokens (2299) it is bound by arithmetic, as in training. The thin products of LoRA (`skinny_gemm`, $xA^\top$,
# and `lora_A_gradient`, $dA$) have an intensity just below $r$, and wait for memory at any rank below the ridge.
# Hence the idea of this kernel: put the update into the wide product: it adds under 1% of the operations, only the
# small $u$ and $B$ are read for it, and $h$ is not touched twice.
#
# **A roof is not a measurement.** On an H100, in bfloat16, for 8,192 tokens, 4096 → 4096 and $r = 16$, with $u$
# given, this kernel's forward takes 1.30 times the time of the frozen product alone (medians of 25 runs). PyTorch's
# product (from cuBLAS, NVIDIA's library), with the update added in place afterwards (`addmm_`), takes 1.17: one more
# pass over $h$, but a better product. For $dx$, with $du$ given, the kernel wins, 1.07 against 1.18, but saves less
# time on the GPU than its launches take more on the host. So the linear layers of the fast backend use `addmm_`,
# parts of this kernel serve many adapters in one batch ([notebook 9](09_trust_and_serve.ipynb)), and the MLP's
# updates are added by the activation kernel, which reads $g$ and $z$ anyway. [Decision
# 5](../docs/decisions/0005-addmm.md) has all figures.
#
# **The answer.** For the wide products of its linear layers the fast backend uses PyTorch's: its own lost forward,
# and backward won too little. It brings its own for what is bound by memory, where one kernel in place of several
# operations moves fewer bytes: 8 crossings instead of 14 for SwiGLU. And yes: the interpreter runs the source, the
# compiler's output shows registers and spills, bytes and operations can be counted. Only how long a kernel takes
# needs the GPU.
#
# ## Exercises
#
# **Exercise 1.** The grid: how many programs cover an $M \times N$ matrix in tiles of `bm` × `bn`, and how many
# elements of all those tiles are masked off? Return both.


# %% tags=["exercise"]
def grid(M, N, bm, bn):
    """(programs, elements of their tiles that lie outside the matrix)."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(grid)
def check_grid(answer):
    for M, N, bm, bn in ((58, 122, 8, 16), (64, 64, 16, 16), (1, 300, 1, 128)):
        found = answer(M, N, bm, bn)
        assert found is not None and len(found) == 2, "expected a pair."
        programs = len(range(0, M, bm)) * len(range(0, N, bn))
        assert found[0] == programs, f"{M} × {N} in {bm} × {bn} tiles: {found[0]} programs, expected {programs}."
        assert found[1] == programs * bm * bn - M * N, (
            f"{found[1]} elements masked off, which is not what is left over."
        )


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def grid(M, N, bm, bn):
#     programs = triton.cdiv(M, bm) * triton.cdiv(N, bn)
#     return programs, programs * bm * bn - M * N
# ```
# </details>
#
# **Exercise 2.** Write a kernel: $h = \alpha x + y$ for `n` elements, any `n`. The checker decorates it with
# `triton.jit`, runs it, and looks at what it wrote where it should not have.


# %% tags=["exercise"]
def axpy_kernel(x_ptr, y_ptr, h_ptr, alpha, n, BLOCK: tl.constexpr):
    """One program computes BLOCK elements of h = alpha · x + y."""
    # your code here


# %% tags=["checker"]
@checks(axpy_kernel)
def check_axpy_kernel(answer):
    kernel = triton.jit(answer)
    for n in (1, 64, 100):
        generator = torch.Generator().manual_seed(n)
        x, y = torch.randn(256, generator=generator), torch.randn(256, generator=generator)
        h = torch.full((256,), 7.0)
        kernel[(triton.cdiv(n, 64),)](x, y, h, 0.5, n, BLOCK=64)
        assert not (h[:n] == 7).all(), f"n = {n}: no program wrote anything."
        assert_close(h[:n], 0.5 * x[:n] + y[:n], f"h for n = {n}")
        assert (h[n:] == 7).all(), f"n = {n}: {int((h[n:] != 7).sum())} numbers behind the end were overwritten."


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def axpy_kernel(x_ptr, y_ptr, h_ptr, alpha, n, BLOCK: tl.constexpr):
#     o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
#     m = o < n
#     b_x = tl.load(x_ptr + o, mask=m, other=0.0)
#     b_y = tl.load(y_ptr + o, mask=m, other=0.0)
#     tl.store(h_ptr + o, alpha * b_x + b_y, mask=m)
# ```
# </details>
#
# **Exercise 3.** From how many tokens on is $h = xW^\top + s\,uB^\top$ bound by arithmetic? Count 2 bytes a number,
# each of $x$, $W$, $u$, $B$ read and $h$ written once, and $2T\,\text{out}\,(\text{in} + r)$ operations, as
# `intensity` does. Return the smallest $T$ whose intensity exceeds `ridge`, or `None` if there is none. (What does the
# intensity tend to, as $T$ grows?)


# %% tags=["setup"]
def intensity(T, fan_in, fan_out, r):
    """Operations a byte of the layer on T tokens."""
    numbers = T * fan_in + fan_in * fan_out + T * r + fan_out * r + T * fan_out  # x, W, u, B and h
    return 2 * T * fan_out * (fan_in + r) / (2 * numbers)


# %% tags=["exercise"]
def arithmetic_from(fan_in, fan_out, r, ridge):
    """The smallest number of tokens with more than `ridge` operations a byte; None if no number will do."""
    raise NotImplementedError


# %% tags=["checker"]
@checks(arithmetic_from)
def check_arithmetic_from(answer):
    for i, o, ridge in ((4096, 14336, 295), (4096, 4096, 295), (1024, 1024, 100), (576, 1536, 295), (1536, 576, 295)):
        T = answer(i, o, 16, ridge)
        assert isinstance(T, int), f"for {i} → {o} it is {T!r}, expected a whole number of tokens."
        assert intensity(T, i, o, 16) > ridge, (
            f"{T} tokens, {i} → {o}: {intensity(T, i, o, 16):.1f} is not above {ridge}."
        )
        assert intensity(T - 1, i, o, 16) <= ridge, f"{T - 1} tokens would do for {i} → {o}."
    for i, o in ((576, 576), (576, 192)):
        assert answer(i, o, 16, 295) is None, f"{i} → {o} never gets there: its intensity has a limit below 295."


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def arithmetic_from(fan_in, fan_out, r, ridge):
#     each = fan_out * (fan_in + r) - ridge * (fan_in + fan_out + r)  # 2 T (..) > 2 ridge (..), terms in T
#     rest = ridge * fan_out * (fan_in + r)  # and terms without: W and B
#     return None if each <= 0 else rest // each + 1
# ```
#
# As $T$ grows, $W$ and $B$ no longer count, and the intensity tends to
# $\text{out}(\text{in} + r)/(\text{in} + \text{out} + r)$. If that is not above the ridge, no $T$ is enough.
# </details>
#
# What the formula says of two models, found by trying one number of tokens after the other:

# %%
RIDGE, RANK = 295, 16
layers = {
    "SmolLM2-135M, q and o": (576, 576),
    "SmolLM2-135M, k and v": (576, 192),
    "SmolLM2-135M, gate and up": (576, 1536),
    "SmolLM2-135M, down": (1536, 576),
    "Llama-3.1-8B, q and o": (4096, 4096),
    "Llama-3.1-8B, gate and up": (4096, 14336),
}
tokens = {}
for name, (i, o) in layers.items():
    limit = o * (i + RANK) / (i + o + RANK)
    assert intensity(10**6, i, o, RANK) < limit < 1.01 * intensity(10**6, i, o, RANK)
    enough = (T for T in itertools.count(1) if intensity(T, i, o, RANK) > RIDGE)
    tokens[name] = next(enough) if limit > RIDGE else None
    verdict = f"from {tokens[name]} tokens on" if tokens[name] else "never"
    print(f"{name:<26} limit {limit:5.0f} operations a byte: bound by arithmetic {verdict}")
assert list(tokens.values()) == [None, None, 953, 991, 345, 326]

# %% [markdown]
# SmolLM2's MLP is bound by arithmetic from about a thousand tokens on, its attention's projections never: $q$ and $o$
# stay just below the ridge (292 of 295), $k$ and $v$ far below. All this is of an ideal kernel, which reads each
# operand once.
#
# ## Where this lives in the code
#
# - [`lora/fast/kernels/activation.py`](../lora/fast/kernels/activation.py),
#   [`gemm.py`](../lora/fast/kernels/gemm.py): the kernels of this notebook, and
#   [decision 5](../docs/decisions/0005-addmm.md): which of them run where;
#   [`compile_check.py`](../lora/fast/kernels/compile_check.py): reading what they compile to.
# - [`docs/benchmarks/h100.md`](../docs/benchmarks/h100.md): measured times, beside these bounds.
# - Next: [memory](08_memory.ipynb).
#
# ## References
#
# - P. Tillet et al., *Triton: An Intermediate Language and Compiler for Tiled Neural Network Computations*, 2019.
# - S. Williams et al., *Roofline: An Insightful Visual Performance Model*, 2009.
# - S. Rush, *Triton Puzzles*, 2024: more exercises in the interpreter.
