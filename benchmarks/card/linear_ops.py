"""The cases made of projections: one linear layer, q/k/v, the MLP, the forms of the product, DoRA, multi-LoRA."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import linear_forms
from benchmarks.card.cases import Case, Session
from benchmarks.card.peers import liger, lora_formula, peft_leaves, peft_linears, swiglu_formula
from benchmarks.card.timing import Results, Variant, both_ways
from lora import Projection, fast, reference
from lora.fast.dora import dora_norm
from lora.projection import Dropout
from lora.reference.dropout import keep_scale
from lora.reference.mlp import hidden_dropout

BF16 = torch.bfloat16
SCALING = 2.0
DRAWN = "draws its own mask: its formula is compared at p = 0"


@dataclass
class Layer:
    """A projection's tensors. A and B are float32, as injected adapters are, of numbers that bfloat16 holds."""

    W: Tensor
    A: Tensor
    B: Tensor

    @property
    def projection(self) -> Projection:
        return Projection(self.W, None, self.A, self.B, SCALING)


def normal(session: Session, *shape: int, scale: float = 1.0) -> Tensor:
    """bfloat16 on the session's device."""
    return (torch.randn(shape, device=session.device) * scale).to(BF16)


def layer(session: Session, W: Tensor, r: int) -> Layer:
    """Random adapters whose update is about as large as W x."""
    out_features, in_features = W.shape
    A = normal(session, r, in_features, scale=in_features**-0.5).float().requires_grad_()
    B = normal(session, out_features, r, scale=(r**-0.5) / SCALING).float().requires_grad_()
    return Layer(W, A, B)


def random_weight(session: Session, out_features: int, in_features: int) -> Tensor:
    """W such that W x is as large as x."""
    return normal(session, out_features, in_features, scale=in_features**-0.5)


def widened(tensors: list[Tensor]) -> list[Tensor]:
    """Float64 copies, as leaves."""
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def adapter_flops(tokens: int, r: int, sizes: list[tuple[int, int]]) -> int:
    """Of the thin products, forward and backward: u, h +=, dB, du, dA, dx +=."""
    return sum(6 * tokens * r * (fan_in + fan_out) for fan_in, fan_out in sizes)


def pairs(factors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(A, B) of each layer."""
    return list(zip(factors[::2], factors[1::2], strict=True))


# ---- one linear layer


def lora_linear(session: Session, tokens: int, fan_in: int, fan_out: int, p: float) -> Case:
    """Forward and backward of one adapted layer, against the frozen one's forward and dx."""
    x = normal(session, tokens, fan_in).requires_grad_()
    one = layer(session, random_weight(session, fan_out, fan_in), session.shapes.r)
    dy = normal(session, tokens, fan_out)
    dropout = Dropout(p, seed=5) if p else None
    leaves = [x, one.A, one.B]
    drop = torch_drop(p)

    def ours(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return fast.lora_linear(x, Projection(one.W, None, A, B, SCALING), dropout=dropout)

    def formula(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_formula(x, A, B, one.W, SCALING, drop)

    def truth() -> Results:
        masked = counted_drop(x, p)
        plain: Callable[..., Tensor] = lambda x, A, B: lora_formula(x, A, B, one.W.double(), SCALING, masked)  # noqa: E731
        return both_ways(plain, widened(leaves), (), [dy.double()])

    variants = {
        "frozen": Variant(lambda: both_ways(F.linear, [x], [one.W], [dy]), compare=False),
        "ours": Variant(lambda: both_ways(ours, leaves, (), [dy])),
        "torch": Variant(lambda: both_ways(formula, leaves, (), [dy]), compare=not p, note=DRAWN if p else ""),
    }
    absent = add_peft(variants, {"proj": one}, x, p, lambda holder, x: holder.proj(x), [dy])
    flops = 4 * tokens * fan_in * fan_out + adapter_flops(tokens, session.shapes.r, [(fan_in, fan_out)])
    moved = 2 * (3 * tokens * fan_in + 2 * tokens * fan_out + 2 * fan_in * fan_out)  # x twice, dx; h, dy; W twice
    names = ("h", "dx", "dA", "dB")
    shape = f"{fan_in} -> {fan_out}"
    return Case(f"lora_linear p={p:g}", tokens, shape, variants, truth, names, moved, flops, absent=absent)


def torch_drop(p: float) -> Callable[[Tensor], Tensor] | None:
    """torch's own dropout."""
    return functools.partial(F.dropout, p=p, training=True) if p else None


def counted_drop(x: Tensor, p: float, dropout: Dropout | None = None) -> Callable[[Tensor], Tensor] | None:
    """Dropout with the mask of seed 5, or of `dropout`, for the truth."""
    if not p:
        return None
    _, seed, stream = dropout or Dropout(p, 5)
    kept = reference.dropout_mask(x.shape, p, seed, stream=stream, device=x.device).double() * keep_scale(p)
    return lambda x: x * kept


def add_peft(
    variants: dict[str, Variant], layers: dict[str, Layer], x: Tensor, p: float,
    call: Callable[[Any, Tensor], Tensor | Results], douts: list[Tensor],
) -> dict[str, str]:  # fmt: skip
    """PEFT with adapters in the type of x (its fastest) and in float32 (what `get_peft_model` makes of them)."""
    names, absent = tuple(layers), {}
    for label, dtype in (("peft", x.dtype), ("peft float32", torch.float32)):
        weights = {name: each.W for name, each in layers.items()}
        factors = {name: (each.A, each.B) for name, each in layers.items()}
        holder = peft_linears(weights, factors, SCALING, p, dtype)
        if isinstance(holder, str):
            absent[label] = holder
            continue
        leaves = [x, *peft_leaves(holder, names)]
        run = peft_run(holder, call, leaves, douts)
        variants[label] = Variant(run, compare=not p, note=DRAWN if p else "")
    return absent


def peft_run(holder: Any, call: Callable[..., Tensor | Results], leaves: list[Tensor], douts: list[Tensor]) -> Any:
    """A run of PEFT's layers; their parameters are leaves without being arguments."""
    return lambda: both_ways(lambda x, *_: call(holder, x), leaves, (), douts)


# ---- groups


def lora_qkv(session: Session, tokens: int, p: float = 0.0) -> Case:
    """q, k and v of one x, whose weights lie one after another as in a fused model."""
    drop, dropout = torch_drop(p), Dropout(p, seed=5) if p else None
    s = session.shapes
    outs = {"q_proj": s.heads * s.head_dim, "k_proj": s.kv_heads * s.head_dim, "v_proj": s.kv_heads * s.head_dim}
    stacked = random_weight(session, sum(outs.values()), s.hidden)
    parts = stacked.split(list(outs.values()))
    layers = {name: layer(session, W, s.r) for name, W in zip(outs, parts, strict=True)}
    x = normal(session, tokens, s.hidden).requires_grad_()
    douts = [normal(session, tokens, out) for out in outs.values()]
    leaves = [x, *(tensor for each in layers.values() for tensor in (each.A, each.B))]

    def ours(x: Tensor, *factors: Tensor) -> Results:
        projections = (Projection(W, None, *pair, SCALING) for W, pair in zip(parts, pairs(factors), strict=True))
        return fast.lora_qkv(x, *projections, dropout=dropout)

    def formula(x: Tensor, *factors: Tensor, drop: Callable[[Tensor], Tensor] | None = drop) -> Results:
        return tuple(
            lora_formula(x, *pair, W.to(x.dtype), SCALING, drop) for W, pair in zip(parts, pairs(factors), strict=True)
        )

    dy = torch.cat(douts, dim=1)
    variants = {
        "frozen": Variant(lambda: both_ways(F.linear, [x], [stacked], [dy]), compare=False),
        "ours": Variant(lambda: both_ways(ours, leaves, (), douts)),
        "torch": Variant(lambda: both_ways(formula, leaves, (), douts), compare=not p, note=DRAWN if p else ""),
    }
    call = lambda holder, x: tuple(getattr(holder, name)(x) for name in outs)  # noqa: E731
    absent = add_peft(variants, layers, x, p, call, douts)
    masked = functools.partial(formula, drop=counted_drop(x, p))
    truth = lambda: both_ways(masked, widened(leaves), (), [each.double() for each in douts])  # noqa: E731
    total = sum(outs.values())
    flops = 4 * tokens * s.hidden * total + adapter_flops(tokens, s.r, [(s.hidden, out) for out in outs.values()])
    moved = 2 * (3 * tokens * s.hidden + 2 * tokens * total + 2 * s.hidden * total)
    names = ("q", "k", "v", "dx", "dA q", "dB q", "dA k", "dB k", "dA v", "dB v")
    return Case(
        f"lora_qkv{named(p)}", tokens, f"{s.hidden} -> {total}", variants, truth, names, moved, flops, absent=absent
    )


def named(p: float) -> str:
    """What dropout adds to a name."""
    return f" p={p:g}" if p else ""


def lora_mlp(session: Session, tokens: int, p: float = 0.0) -> Case:
    """down(silu(gate x) ⊙ up x), all three adapted."""
    drop, dropout = torch_drop(p), Dropout(p, seed=5) if p else None
    s = session.shapes
    stacked = random_weight(session, 2 * s.ffn, s.hidden)
    weights = dict(zip(("gate_proj", "up_proj"), stacked.chunk(2), strict=True))
    weights["down_proj"] = random_weight(session, s.hidden, s.ffn)
    layers = {name: layer(session, W, s.r) for name, W in weights.items()}
    x, dy = normal(session, tokens, s.hidden).requires_grad_(), normal(session, tokens, s.hidden)
    leaves = [x, *(tensor for each in layers.values() for tensor in (each.A, each.B))]
    Ws = list(weights.values())

    def ours(x: Tensor, *factors: Tensor) -> Tensor:
        projections = (Projection(W, None, *pair, SCALING) for W, pair in zip(Ws, pairs(factors), strict=True))
        return fast.lora_mlp(x, *projections, activation="silu", dropout=dropout)

    def formula(
        x: Tensor, *factors: Tensor, drops: Sequence[Callable[[Tensor], Tensor] | None] = (drop, drop)
    ) -> Tensor:
        W = [each.to(x.dtype) for each in Ws]
        gate, up, down = pairs(factors)
        h = swiglu_formula(
            lora_formula(x, *gate, W[0], SCALING, drops[0]), lora_formula(x, *up, W[1], SCALING, drops[0])
        )
        return lora_formula(h, *down, W[2], SCALING, drops[1])

    def frozen(x: Tensor) -> Tensor:
        return F.linear(swiglu_formula(F.linear(x, Ws[0]), F.linear(x, Ws[1])), Ws[2])

    variants = {
        "frozen": Variant(lambda: both_ways(frozen, [x], (), [dy]), compare=False),
        "ours": Variant(lambda: both_ways(ours, leaves, (), [dy])),
        "torch": Variant(lambda: both_ways(formula, leaves, (), [dy]), compare=not p, note=DRAWN if p else ""),
    }
    absent = add_peft(variants, layers, x, p, peft_mlp(swiglu_formula), [dy])
    if not p:
        add_peft_with_liger(session, variants, absent, layers, x, dy)
    hidden = torch.empty(tokens, s.ffn, device=x.device)
    masked = functools.partial(formula, drops=(counted_drop(x, p), counted_drop(hidden, p, hidden_dropout(dropout))))
    truth = lambda: both_ways(masked, widened(leaves), (), [dy.double()])  # noqa: E731
    sizes = [(s.hidden, s.ffn), (s.hidden, s.ffn), (s.ffn, s.hidden)]
    flops = 12 * tokens * s.hidden * s.ffn + adapter_flops(tokens, s.r, sizes)
    # x twice, dx, y, dy; g, z, h written and read, g, z read again, dh, dg, dz written and read; every W twice
    moved = 2 * (5 * tokens * s.hidden + 14 * tokens * s.ffn + 6 * s.hidden * s.ffn)
    names = ("y", "dx", *(f"{kind} {name.removesuffix('_proj')}" for name in weights for kind in ("dA", "dB")))
    shape = f"{s.hidden} -> {s.ffn} -> {s.hidden}"
    return Case(f"lora_mlp{named(p)}", tokens, shape, variants, truth, names, moved, flops, absent=absent)


def peft_mlp(activation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """The MLP as a model would write it."""
    return lambda holder, x: holder.down_proj(activation(holder.gate_proj(x), holder.up_proj(x)))


def add_peft_with_liger(
    session: Session, variants: dict[str, Variant], absent: dict[str, str], layers: dict[str, Layer], x: Tensor, dy: Tensor
) -> None:  # fmt: skip
    """PEFT's three layers around Liger's SwiGLU."""
    swiglu = liger(session.device, "liger_swiglu")
    if isinstance(swiglu, str):
        absent["peft + liger"] = swiglu
        return
    both: dict[str, Variant] = {}
    absent |= {f"{name} + liger": why for name, why in add_peft(both, layers, x, 0.0, peft_mlp(swiglu), [dy]).items()}
    if "peft" in both:
        variants["peft + liger"] = both["peft"]


# ---- the forms of the product, DoRA's norm, several adapters in one batch


def forms(session: Session, tokens: int, fan_in: int, fan_out: int) -> Case:
    """The forward of decision 5 in its forms, each given the thin product u."""
    built = linear_forms.cases(
        linear_forms.Operands.draw(tokens, fan_in, fan_out, session.shapes.r, BF16, session.device.type)
    )
    truth, ways = built["h"]
    variants = {
        name: Variant(lambda way=way: (way(),), compare=name != "frozen alone")  # type: ignore[misc]
        for name, way in ways.items()
    }
    absent = {} if "kernel" in ways else {"kernel": "the Triton product needs a GPU"}
    r = session.shapes.r
    flops = 2 * tokens * (fan_in * fan_out + r * fan_out)
    moved = 2 * (tokens * (fan_in + fan_out + r) + fan_out * (fan_in + r))
    shape = f"{fan_in} -> {fan_out}"
    return Case("forms", tokens, shape, variants, lambda: (truth(),), ("h",), moved, flops, absent=absent)


def dora(session: Session) -> Case:
    """‖W + s B A‖ of each row."""
    s = session.shapes
    one = layer(session, random_weight(session, s.ffn, s.hidden), s.r)

    def formula(W: Tensor) -> Results:
        A, B = one.A.detach().to(W.dtype), one.B.detach().to(W.dtype)
        return (torch.linalg.vector_norm(W + SCALING * (B @ A), dim=1),)

    def ours() -> Results:
        return (dora_norm(one.W, one.A.detach(), one.B.detach(), SCALING),)

    variants = {"ours": Variant(ours), "torch": Variant(lambda: formula(one.W))}
    moved, flops = one.W.nbytes + 4 * (one.A.numel() + one.B.numel() + s.ffn), 2 * s.r * s.hidden * s.ffn
    shape = f"{s.ffn} x {s.hidden}"
    return Case("dora_norm", 0, shape, variants, lambda: formula(one.W.double()), ("norm",), moved, flops)


def multi_lora(session: Session, tokens: int) -> Case:
    """One linear layer whose sequences use different adapters, some none."""
    s = session.shapes
    count = max(1, tokens // 128)  # sequences of about 128 tokens
    length = tokens // count
    W = random_weight(session, s.hidden, s.hidden)
    each = [layer(session, W, s.r) for _ in range(s.adapters)]
    A = torch.stack([one.A.detach() for one in each]).requires_grad_()
    B = torch.stack([one.B.detach() for one in each]).requires_grad_()
    index = torch.arange(count, device=session.device) % (s.adapters + 1)
    index[index == s.adapters] = -1  # the base alone
    scaling = torch.full((s.adapters,), SCALING, device=session.device)
    x = normal(session, count, length, s.hidden).requires_grad_()
    dy = normal(session, count, length, s.hidden)
    leaves = [x, A, B]

    def with_backend(backend: Any, W: Tensor) -> Callable[..., Tensor]:
        return lambda x, A, B: backend.multi_lora_linear(x, Projection(W), A, B, scaling, index)

    variants = {
        "frozen": Variant(lambda: both_ways(F.linear, [x], [W], [dy]), compare=False),
        "ours": Variant(lambda: both_ways(with_backend(fast, W), leaves, (), [dy])),
        "torch": Variant(lambda: both_ways(with_backend(reference, W), leaves, (), [dy]), note="a loop over adapters"),
    }
    truth = lambda: both_ways(with_backend(reference, W.double()), widened(leaves), (), [dy.double()])  # noqa: E731
    rows = count * length
    flops = 4 * rows * s.hidden**2 + adapter_flops(rows, s.r, [(s.hidden, s.hidden)])
    moved = 2 * (5 * rows * s.hidden + 2 * s.hidden**2) + 8 * (A.numel() + B.numel())
    names, shape = ("h", "dx", "dA", "dB"), f"{s.hidden} -> {s.hidden}, {s.adapters} adapters"
    return Case("multi_lora", rows, shape, variants, truth, names, moved, flops)
