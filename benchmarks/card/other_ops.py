"""The cases without projections: SwiGLU, RMSNorm, RoPE, NF4, the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.card.cases import Case, Session
from benchmarks.card.checks import differing_share
from benchmarks.card.linear_ops import BF16, normal, random_weight, widened
from benchmarks.card.peers import liger, peer, rms_norm_formula, rope_formula, swiglu_formula
from benchmarks.card.timing import Results, Variant, both_ways
from lora import fast, reference
from lora.fast.mlp import gated_backward, gated_forward
from lora.fast.nf4 import decode_into
from lora.fast.runtime import runs_triton
from lora.reference.nf4 import nf4_bytes

EPS = 1e-5
TIES = 1e-4  # of the codes may be a neighbour: a quotient on a midpoint, rounded the other way


def add_liger(
    session: Session, case: Case, name: str, leaves: list[Tensor], douts: list[Tensor], rest: tuple[Any, ...],
    call: Callable[[Any], Callable[..., Tensor | Results]] | None = None,
) -> None:  # fmt: skip
    """Liger's function with inputs and gradients of its own, restored before each run: some are overwritten in place."""
    function = liger(session.device, name)
    if isinstance(function, str):
        case.absent["liger"] = function
        return
    given = [*leaves, *douts]
    own = [tensor.detach().clone() for tensor in given]

    def prepare() -> None:
        for mine, tensor in zip(own, given, strict=True):
            mine.copy_(tensor.detach())

    def run() -> Results:
        fresh = [tensor.detach().requires_grad_() for tensor in own[: len(leaves)]]  # views of the same memory
        return both_ways(call(function) if call else function, fresh, rest, own[len(leaves) :])

    case.variants["liger"] = Variant(run, prepare)


def swiglu(session: Session, tokens: int) -> Case:
    """h = silu(g) ⊙ z, then dg and dz: the kernels between the MLP's products."""
    ffn = session.shapes.ffn
    g, z = (normal(session, tokens, ffn).requires_grad_() for _ in range(2))
    dh = normal(session, tokens, ffn)
    leaves = [g, z]

    def ours() -> Results:
        a, b = g.detach(), z.detach()
        return (gated_forward(a, b, "silu"), *gated_backward(dh, a, b, "silu")[:2])

    variants = {
        "ours": Variant(ours),
        "torch": Variant(lambda: both_ways(swiglu_formula, leaves, (), [dh])),
    }
    truth = lambda: both_ways(swiglu_formula, widened(leaves), (), [dh.double()])  # noqa: E731
    case = Case("swiglu", tokens, f"{ffn}", variants, truth, ("h", "dg", "dz"), 2 * 8 * g.numel())
    add_liger(session, case, "liger_swiglu", leaves, [dh], ())
    return case


def rms_norm(session: Session, tokens: int) -> Case:
    """The norm and its dx; the weight is frozen."""
    x = normal(session, tokens, session.shapes.hidden).requires_grad_()
    dy = normal(session, tokens, session.shapes.hidden)
    weight = 1 + normal(session, session.shapes.hidden, scale=0.2)
    formula = lambda x, w: rms_norm_formula(x, w, EPS)  # noqa: E731
    fused = lambda x, w: F.rms_norm(x, w.shape, w, EPS)  # noqa: E731
    variants = {
        "ours": Variant(lambda: both_ways(lambda x, w: fast.rms_norm(x, w, eps=EPS), [x], [weight], [dy])),
        "torch": Variant(lambda: both_ways(formula, [x], [weight], [dy])),
        "torch fused": Variant(lambda: both_ways(fused, [x], [weight], [dy]), note="F.rms_norm"),
    }
    truth = lambda: both_ways(formula, widened([x]), [weight.double()], [dy.double()])  # noqa: E731
    case = Case("rms_norm", tokens, f"{x.shape[1]}", variants, truth, ("y", "dx"), 2 * 5 * x.numel())
    add_liger(session, case, "liger_rms_norm", [x], [dy], (weight, EPS))
    return case


def add_rms_norm(session: Session, tokens: int) -> Case:
    """s = x + residual and the norm of s, with the gradients of both."""
    x, residual, dy, ds = (normal(session, tokens, session.shapes.hidden) for _ in range(4))
    leaves, douts = [x.requires_grad_(), residual.requires_grad_()], [dy, ds]
    weight = 1 + normal(session, session.shapes.hidden, scale=0.2)

    def ours(x: Tensor, residual: Tensor, w: Tensor) -> Results:
        return fast.rms_norm(x, w, eps=EPS, residual=residual)

    def formula(x: Tensor, residual: Tensor, w: Tensor) -> Results:
        total = x + residual
        return rms_norm_formula(total, w, EPS), total

    variants = {
        "ours": Variant(lambda: both_ways(ours, leaves, [weight], douts)),
        "torch": Variant(lambda: both_ways(formula, leaves, [weight], douts)),
    }
    truth = lambda: both_ways(formula, widened(leaves), [weight.double()], [each.double() for each in douts])  # noqa: E731
    names = ("y", "s", "dx", "dresidual")  # bytes: x, residual, y, s; dy, ds, s, and one dx for both
    case = Case("add_rms_norm", tokens, f"{x.shape[1]}", variants, truth, names, 2 * 8 * x.numel())
    add_liger(session, case, "liger_fused_add_rms_norm", leaves, douts, (weight, EPS))
    return case


def rope(session: Session, tokens: int) -> Case:
    """q and k rotated, and their gradients rotated back; laid out as an attention's projections leave them."""
    s = session.shapes
    length = min(tokens, s.sequence)
    batch = tokens // length

    def heads(count: int) -> Tensor:
        return normal(session, batch, length, count, s.head_dim).transpose(1, 2)

    q, k, dq, dk = heads(s.heads), heads(s.kv_heads), heads(s.heads), heads(s.kv_heads)
    leaves, douts = [q.requires_grad_(), k.requires_grad_()], [dq, dk]
    angles = torch.outer(
        torch.arange(length, device=session.device).float(),
        500000.0 ** -(torch.arange(0, s.head_dim, 2, device=session.device) / s.head_dim),
    )
    angles = torch.cat([angles, angles], dim=1)[None]  # [1, seq, head_dim]
    cos, sin = angles.cos().to(BF16), angles.sin().to(BF16)

    def formula(q: Tensor, k: Tensor) -> Results:
        c, s = cos[:, None].to(q.dtype), sin[:, None].to(q.dtype)
        return rope_formula(q, c, s), rope_formula(k, c, s)

    variants = {
        "ours": Variant(lambda: both_ways(fast.rope, leaves, [cos, sin], douts)),
        "torch": Variant(lambda: both_ways(formula, leaves, (), douts)),
    }
    truth = lambda: both_ways(formula, widened(leaves), (), [each.double() for each in douts])  # noqa: E731
    moved = 2 * 4 * (q.numel() + k.numel())
    shape = f"{s.heads} and {s.kv_heads} heads of {s.head_dim}"
    case = Case("rope", batch * length, shape, variants, truth, ("q", "k", "dq", "dk"), moved)
    add_liger(session, case, "liger_rope", leaves, douts, (cos, sin))
    return case


# ---- NF4


def nf4_dequantize(session: Session, out_features: int, in_features: int) -> Case:
    """Both levels decoded into a bfloat16 operand; bit for bit."""
    quantised = reference.nf4_quantize(random_weight(session, out_features, in_features))
    out = torch.empty(quantised.shape, dtype=BF16, device=session.device)

    def ours() -> Results:
        decode_into(quantised, out)
        return (out,)

    def plain() -> Results:
        return (reference.nf4_dequantize(quantised),)

    def prepare() -> Tensor:
        return out.fill_(torch.nan)

    variants = {"ours": Variant(ours, prepare), "torch": Variant(plain, note="the reference's formula")}
    moved, shape = nf4_bytes(quantised) + out.nbytes, f"{out_features} x {in_features}"
    case = Case("nf4_dequantize", 0, shape, variants, plain, ("w",), moved, error=differing_share, limit=0.0)
    bitsandbytes = peer("bitsandbytes")
    case.absent["bitsandbytes"] = bitsandbytes if isinstance(bitsandbytes, str) else "not compared here"
    return case


def nf4_quantize(session: Session) -> Case:
    """Codes and absmax of one weight, double quantisation included."""
    s = session.shapes
    W = random_weight(session, s.ffn, s.hidden)

    def with_backend(backend: Any) -> Callable[[], Results]:
        def run() -> Results:
            quantised = backend.nf4_quantize(W)
            return quantised.codes, quantised.absmax

        return run

    variants = {"ours": Variant(with_backend(fast)), "torch": Variant(with_backend(reference))}
    moved = W.nbytes + nf4_bytes(reference.nf4_quantize(W))
    shape, truth = f"{s.ffn} x {s.hidden}", with_backend(reference)
    return Case(
        "nf4_quantize", 0, shape, variants, truth, ("codes", "absmax"), moved, error=differing_share, limit=TIES
    )


# ---- the loss


def linear_cross_entropy(session: Session, tokens: int) -> Case:
    """The head's loss and the gradient of its input, the head frozen: time, and memory above the inputs."""
    s = session.shapes
    hidden = normal(session, tokens, s.hidden).requires_grad_()
    W = random_weight(session, s.vocab, s.hidden)
    labels = torch.randint(s.vocab, (tokens,), device=session.device)
    dloss = torch.ones((), device=session.device)

    def formula(hidden: Tensor, W: Tensor) -> Tensor:
        logits = F.linear(hidden, W)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)

    def ours(hidden: Tensor, W: Tensor) -> Tensor:
        return fast.linear_cross_entropy(hidden, W, labels)

    variants = {
        "ours": Variant(lambda: both_ways(ours, [hidden], [W], [dloss])),
        "torch": Variant(lambda: both_ways(formula, [hidden], [W], [dloss])),
    }
    flops = 4 * tokens * s.hidden * s.vocab
    moved = 2 * (2 * hidden.numel() + 2 * W.numel())
    truth = lambda: chunked_loss(hidden, W, labels)  # noqa: E731
    shape = f"{s.hidden} -> {s.vocab}"
    case = Case("linear_cross_entropy", tokens, shape, variants, truth, ("loss", "dhidden"), moved, flops)
    add_liger(
        session, case, "liger_fused_linear_cross_entropy", [hidden], [dloss], (W, labels),
        lambda function: lambda hidden, W, labels: loss_alone(function(hidden, W, labels)),
    )  # fmt: skip
    return case


def loss_alone(result: Any) -> Tensor:
    """Liger may return further values beside the loss."""
    loss: Tensor = result[0] if isinstance(result, tuple) else result
    return loss


def chunked_loss(hidden: Tensor, W: Tensor, labels: Tensor, chunk: int = 512) -> Results:
    """The loss and dhidden in float64, some rows at a time: all logits would not fit."""
    wide, total, gradients = W.double(), torch.zeros((), dtype=torch.float64, device=W.device), []
    for start in range(0, len(labels), chunk):
        x = hidden.detach()[start : start + chunk].double()
        here = labels[start : start + chunk]
        logits = x @ wide.T
        total += F.cross_entropy(logits, here, reduction="sum") / len(labels)
        p = torch.softmax(logits, dim=1)
        p[torch.arange(len(here), device=p.device), here] -= 1
        gradients.append(p @ wide / len(labels))
    return total, torch.cat(gradients)


def cross_entropy_kernel(session: Session) -> Case:
    """The loss of given logits, which become their own gradient: one read and one write where L2 serves the second.

    The copy beside it moves the same bytes; its time over the kernel's is the share of the bandwidth that is reached.
    """
    rows, vocab = session.shapes.loss_rows, session.shapes.vocab
    logits = normal(session, rows, vocab)
    labels = torch.randint(vocab, (rows,), device=session.device)
    own, other = torch.empty_like(logits), torch.empty_like(logits)

    def ours() -> Results:
        from lora.fast.kernels.cross_entropy import cross_entropy_

        return cross_entropy_(own, labels), own

    def copy() -> Results:
        other.copy_(logits)
        return (other,)

    def formula(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")

    ones = torch.ones(rows, device=session.device)
    leaf = logits.detach().requires_grad_()
    variants = {
        "ours": Variant(ours, lambda: own.copy_(logits)),
        "torch": Variant(lambda: both_ways(formula, [leaf], (), [ones])),
        "copy": Variant(copy, compare=False, note="of the same bytes"),
    }
    absent = {}
    if not runs_triton(logits):
        del variants["ours"]
        absent["ours"] = "the kernel needs a GPU"
    truth = lambda: both_ways(formula, widened([logits]), (), [ones.double()])  # noqa: E731
    names, moved = ("losses", "dlogits"), 2 * logits.nbytes
    return Case("cross_entropy", rows, f"{vocab}", variants, truth, names, moved, absent=absent)
