"""The error bound of every operation: its formula in `Bounded` numbers, rounded wherever an implementation may round.

A formula here takes the most roundings of any admissible order of work: a frozen product that is stored before the
update is added, u = D(x) Aᵀ stored, then scaled and stored again, and so on. An implementation that fuses rounds less,
and stays within. What a formula may not hide is a wrong term: its own float64 value is checked against the reference.

Results have the names that `lora.testing.proof` gives to outputs and gradients: "h", "dx", "dlora_A", ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora.projection import Dropout, NF4Weight, Projection
from lora.reference.dropout import dropout_mask, keep_scale
from lora.reference.nf4 import nf4_dequantize
from lora.testing.bounded import SPREAD, Bounded, add_up, exact, floor_of, given, rounding_of, unit_roundoff

Results = dict[str, Bounded]
FIRST_ORDER = 0.25  # the largest error of an exponent for which exp is a straight line, to a hundredth of the error
UNKNOWN = 1e80  # a variance of which only a certain bound is left


def frozen(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Bounded:
    """A matrix as it is multiplied: NF4 is decoded in float32, which is exact by definition, and cast."""
    if isinstance(weight, NF4Weight):
        return given(nf4_dequantize(weight, torch.promote_types(dtype, torch.float32)), dtype)
    return given(weight, dtype)


def masked(x: Bounded, dropout: Dropout | None) -> Bounded:
    """D(x): the mask is exact, the factor of what is kept is rounded."""
    if dropout is None or dropout.p == 0:
        return x
    keep = dropout_mask(tuple(x.value.shape), dropout.p, dropout.seed, stream=dropout.stream)
    return (x * (keep.double() * keep_scale(dropout.p))).rounded()


def as_first_term(term: Bounded, terms: int) -> Bounded:
    """A bias, or another sum, that a product of `terms` terms may start from: its roundings are relative to it too."""
    size = unit_roundoff(term.wide) * term.value.abs()
    return Bounded(term.value, term.worst + terms * size, term.variance + terms * size.square() / 3, term.dtype)


class Linear:
    """One projection of x [tokens, in]: its output `h`, and what `backward` needs again."""

    def __init__(self, x: Bounded, projection: Projection, dropout: Dropout | None = None) -> None:
        p = projection
        self.x, self.projection, self.dropout = x, p, dropout
        self.weight = frozen(p.weight, x.dtype)  # [out, in]
        self.gain: Bounded | None = None
        terms = [(x @ self.weight.T).rounded()]
        if p.lora_A is not None and p.lora_B is not None:
            self.A, self.B = given(p.lora_A, x.dtype), given(p.lora_B, x.dtype)
            self.dropped = masked(x, dropout)
            self.u = (self.dropped @ self.A.T).rounded()  # [tokens, r]
            self.su = (self.u * p.scaling).rounded()
            update = (self.su @ self.B.T).rounded()  # [tokens, out]
            terms = [as_first_term(terms[0], len(p.lora_A))]
            if p.magnitude is None:
                terms.append(update)
            else:  # h = x Wᵀ - D(x) Wᵀ + g ⊙ (D(x) Wᵀ + s u Bᵀ)
                self.slope = dora_slope(self.weight, self.A, self.B, p.scaling)  # [out]: 1 / norm
                self.gain = (self.slope * p.magnitude.detach().cpu().double()).rounded()
                through = (self.dropped @ self.weight.T).rounded()
                self.adapted = add_up([through, update])
                terms = [(terms[0] - through).rounded(), (self.adapted * self.gain).rounded()]
        if p.bias is not None:
            terms.append(as_first_term(given(p.bias, x.dtype) + torch.zeros_like(terms[0].value), x.value.shape[1]))
        self.h = add_up(terms)

    def backward(self, dy: Bounded, apart: bool = False) -> Results:
        """Every gradient of this projection, its own part of dx included, for dy [tokens, out].

        apart: sums over tokens are stored a chunk at a time, so that each chunk is rounded.
        """

        def over_tokens(left: Bounded, right: Bounded) -> Bounded:
            if not apart:
                return (left.T @ right).rounded()
            return near_zero((left.T @ right).rounded(over=left.value.T.abs() @ right.value.abs()), 2 * len(left.value))

        p, x = self.projection, self.x
        dbias = dy.sum(0).rounded(over=dy.value.abs().sum(0) if apart else None)
        results = {"dx": (dy @ self.weight).rounded(), "dweight": over_tokens(dy, x), "dbias": dbias}
        if p.lora_A is None or p.lora_B is None:
            return results
        dh, through = dy, None
        if self.gain is not None:
            dh = (dy * self.gain).rounded()
            through = (dh - dy).rounded()  # (g - 1) ⊙ dy, where g was rounded
            results["dmagnitude"] = (dy * self.adapted).rounded().sum(0).rounded() * self.slope
            results["dmagnitude"] = results["dmagnitude"].rounded()
            results["dweight"] = add_up([results["dweight"], over_tokens(through, self.dropped)])
        du = ((dh @ self.B).rounded() * p.scaling).rounded()  # [tokens, r]
        update = (du @ self.A).rounded()
        parts = [
            as_first_term(results["dx"], len(p.lora_A)),
            masked(as_first_term(update, len(p.lora_B)), self.dropout),
        ]
        if through is not None:
            parts.append(masked((through @ self.weight).rounded(), self.dropout))
        results["dx"] = add_up(parts)
        results["dlora_A"] = over_tokens(du, self.dropped)
        results["dlora_B"] = over_tokens(dh, self.su).rounded()  # s before the product, or after it
        return results

    def in_step(self, factor: Tensor) -> Bounded:
        """Σ_o of factor [tokens, out] times what errors a token's outputs have in common, those of s u: [tokens, 1].

        Each passes through all of a token's outputs at once, so that in a sum over them they do not average out.
        """
        if self.projection.lora_A is None or self.projection.lora_B is None:
            nothing = torch.zeros_like(factor[:, :1])
            return Bounded(nothing, nothing, nothing, self.x.dtype)
        by_rank = (factor if self.gain is None else factor * self.gain.value) @ self.B.value  # [tokens, r]
        worst, variance = by_rank.abs() * self.su.worst, by_rank.square() * self.su.variance
        parts = worst.sum(1, keepdim=True), variance.sum(1, keepdim=True)
        return Bounded(torch.zeros_like(parts[0]), *parts, self.x.dtype)

    def carried(self, dy: Tensor) -> dict[str, Tensor]:
        """How far an error dy of each token, one number times a row, goes through the sums over its elements."""
        p = self.projection
        carried = dy @ self.weight.value
        if p.lora_A is None or p.lora_B is None:
            return {"dx": carried.abs()}
        dh = dy if self.gain is None else dy * self.gain.value
        du = dh @ self.B.value * p.scaling  # [tokens, r]
        into_x = masked(exact(du @ self.A.value + (dh - dy) @ self.weight.value), self.dropout).value
        return {"dx": (carried + into_x).abs(), "dlora_A": du.abs().T @ self.dropped.value.abs()}


def near_zero(result: Bounded, roundings: int) -> Bounded:
    """The result after as many roundings more, of parts of it that may be near zero."""
    floor = floor_of(result.dtype)
    worst, variance = result.worst + roundings * floor, result.variance + roundings * floor**2 / 3
    return Bounded(result.value, worst, variance, result.dtype)


def certain(result: Bounded, where: Tensor, worst: Tensor) -> Bounded:
    """The result with this certain bound, and no other, where errors are too large for the rules of small ones."""
    chosen = torch.where(where, worst, result.worst), torch.where(where, UNKNOWN, result.variance)
    return Bounded(result.value, *chosen, result.dtype)


def wider(result: Bounded, error: Tensor) -> Bounded:
    """The result with one more error, of at most this size."""
    return result._with(result.value, result.worst, result.variance, error)


def dora_slope(weight: Bounded, A: Bounded, B: Bounded, scaling: float) -> Bounded:
    """1 / ‖W + s B A‖ of each row, [out]: summed in float32. A row of zeros counts as one of norm 1."""
    adapted = weight + (B @ A) * scaling  # [out, in]
    squares = (adapted * adapted).sum(1)
    nothing = (squares.value == 0).double()
    squares = squares + nothing
    slope = squares.map(lambda t: t.rsqrt())
    left = squares.value - squares.bound()  # the least that the sum may be
    furthest = torch.where(left > 0, left.rsqrt() - squares.value.rsqrt(), torch.inf)
    return certain(slope, squares.bound() > FIRST_ORDER * squares.value, furthest)


def linear(x: Tensor, projection: Projection, dy: Tensor, dropout: Dropout | None = None) -> Results:
    """`lora_linear`, x [tokens, in], dy [tokens, out]."""
    done = Linear(exact(x), projection, dropout)
    return {"h": done.h, **done.backward(exact(dy))}


def qkv(x: Tensor, projections: dict[str, Projection], dys: Sequence[Tensor], dropout: Dropout | None) -> Results:
    """`lora_qkv`: three projections whose dx are added; names as "q", "dq.lora_A"."""
    results: Results = {}
    into_x = []
    for (name, projection), dy in zip(projections.items(), dys, strict=True):
        done = Linear(exact(x), projection, dropout)
        gradients = done.backward(exact(dy))
        into_x.append(as_first_term(gradients.pop("dx"), max(y.shape[1] for y in dys)))
        results[name] = done.h
        results |= {f"d{name}.{key[1:]}": value for key, value in gradients.items()}
    return results | {"dx": add_up(into_x)}


# ---- the gated MLP

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda g: g * torch.sigmoid(g),
    "gelu": lambda g: 0.5 * g * (1 + torch.erf(g * math.sqrt(0.5))),
    "gelu_tanh": lambda g: 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
}


def slope_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """f' as a function of its own, by autograd."""

    def slope(g: Tensor) -> Tensor:
        g = g if g.requires_grad else g.requires_grad_()
        return torch.autograd.grad(function(g).sum(), g, create_graph=True)[0]

    return slope


# where an activation turns, and where its slope does: SiLU, and both GELUs (to a thousandth)
TURNS = {"silu": (-1.27846,), "gelu": (-0.75179,), "gelu_tanh": (-0.75246,)}
SLOPES_TURN = {"silu": (-2.39936, 2.39936), "gelu": (-1.41421, 1.41421), "gelu_tanh": (-1.41946, 1.41946)}
STEEPEST, MOST_CURVED = 1.13, 0.8  # the largest |f'| and |f''| of the three


def bent(g: Bounded, function: Callable[[Tensor], Tensor], turns: Sequence[float], steepest: float) -> Bounded:
    """f(g): by its slope where g's error is small, else by the furthest that f goes within that error of g.

    turns: where f has its extremes; steepest: its largest slope, by which the variance of a large error grows.
    """
    result = g.map(function)

    def furthest(error: Tensor) -> Tensor:
        low, high = g.value - error, g.value + error
        ends = [low, high, *(torch.full_like(low, at).clamp(low, high) for at in turns)]
        return torch.stack([(function(end).detach() - result.value).abs() for end in ends]).amax(0)

    spread = SPREAD * g.variance.sqrt()
    own = result._rounds(4 * result.value)
    far = torch.minimum(steepest**2 * g.variance, furthest(spread).square())
    worst = torch.where(g.worst > FIRST_ORDER, furthest(g.worst) + own, result.worst)
    variance = torch.where(spread > FIRST_ORDER, far + own.square() / 3, result.variance)
    return Bounded(result.value, worst, variance, g.dtype)


def activated(g: Bounded, activation: str, slope: bool = False) -> Bounded:
    """f(g) for an activation or its slope, computed through terms as large as max(1, |g|): 1 + erf(g) cancels."""
    function = ACTIVATIONS[activation]
    if slope:
        result = bent(g, slope_of(function), SLOPES_TURN[activation], MOST_CURVED)
    else:
        result = bent(g, function, TURNS[activation], STEEPEST)
    limits = torch.finfo(g.wide)
    end = -math.log(limits.smallest_normal * limits.eps)  # beyond it exp is zero, and nothing is left to cancel
    lost = 4 * limits.eps * g.value.abs().clamp(min=1, max=end)
    return Bounded(result.value, result.worst + lost, result.variance + lost.square() / 3, g.dtype)


def mlp(
    x: Tensor, gate: Projection, up: Projection, down: Projection, dy: Tensor, activation: str,
    dropout: Dropout | None, below: Dropout | None,
) -> Results:  # fmt: skip
    """`lora_mlp`; dropout of x, `below` of the hidden."""
    of_gate, of_up = Linear(exact(x), gate, dropout), Linear(exact(x), up, dropout)
    g, z = of_gate.h, of_up.h
    act = activated(g, activation).rounded()
    of_down = Linear((act * z).rounded(), down, below)
    results: Results = {"y": of_down.h}
    gradients = {"down": of_down.backward(exact(dy))}
    dh = gradients["down"].pop("dx")
    dz = (dh * act).rounded()
    dg = ((dh * z).rounded() * activated(g, activation, slope=True)).rounded()
    gradients |= {"gate": of_gate.backward(dg), "up": of_up.backward(dz)}
    hidden = g.value.shape[1]
    results["dx"] = add_up([as_first_term(gradients[part].pop("dx"), hidden) for part in ("gate", "up")])
    for part, of_part in gradients.items():
        results |= {f"d{part}.{name[1:]}": value for name, value in of_part.items()}
    return results


# ---- embedding, several adapters, merging


def embedding(ids: Tensor, projection: Projection, dy: Tensor, padding_idx: int | None) -> Results:
    """`lora_embedding`, ids [tokens], dy [tokens, dim]."""
    table, _, lora_A, lora_B, s, magnitude = projection
    assert isinstance(table, Tensor)
    rows, dh = ids.long(), exact(dy)
    h = exact(table)[rows]
    results = {"dweight": scattered(dh, rows, len(table))}
    if lora_A is None or lora_B is None:
        return results | {"h": h}
    A, B = given(lora_A, table.dtype), given(lora_B, table.dtype)
    u = A.T[rows]  # [tokens, r]
    su = (u * s).rounded()
    h = add_up([as_first_term(h, len(lora_A)), (su @ B.T).rounded()])
    if magnitude is not None:
        slope = dora_slope(exact(table).T, A, B, s)
        gain = slope * magnitude.double()
        results["dmagnitude"] = ((dh * h).rounded().sum(0).rounded() * slope).rounded()
        h, dh = (h * gain).rounded(), (dh * gain).rounded()
        results["dweight"] = scattered(dh, rows, len(table))
    du = ((dh @ B).rounded() * s).rounded()
    if padding_idx is not None:
        du = du * (rows != padding_idx % len(table)).double()[:, None]
    results["dlora_A"] = scattered(du, rows, len(table)).T
    results["dlora_B"] = (dh.T @ su).rounded()  # s before the product, or after it
    return results | {"h": h}


def scattered(values: Bounded, rows: Tensor, count: int) -> Bounded:
    """Σ of the values of each row number, [count, ...]; every sum of two may be stored in the tensors' type."""
    chosen = torch.nn.functional.one_hot(rows, count).double().T  # [count, tokens]
    terms = chosen.sum(1, keepdim=True)
    total, sizes, squares = (chosen @ t for t in (values.value, values.value.abs(), values.value.square()))
    error = rounding_of(values.dtype) * (squares + total.square()).sqrt() + floor_of(values.dtype)
    worst = chosen @ values.worst + terms * (rounding_of(values.dtype) * sizes + floor_of(values.dtype))
    return Bounded(total, worst, chosen @ values.variance + terms * error.square() / 3, values.dtype)


def multi_lora(
    x: Tensor, base: Projection, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, index: Tensor, dy: Tensor
) -> Results:
    """`multi_lora_linear`, x [tokens, in], index [tokens], dy [tokens, out]."""
    results = Linear(exact(x), base).backward(exact(dy))
    parts: list[tuple[Tensor, Bounded, Bounded]] = []
    dA, dB = [], []
    for j in range(-1, len(lora_A)):
        mine = (index == j).nonzero().flatten()
        own = base if j < 0 else base._replace(lora_A=lora_A[j], lora_B=lora_B[j], scaling=float(scaling[j]))
        done = Linear(exact(x[mine]), own)
        gradients = done.backward(exact(dy[mine]))
        parts.append((mine, done.h, gradients["dx"]))
        if j >= 0:
            dA.append(gradients["dlora_A"])
            dB.append(gradients["dlora_B"])
    order = torch.cat([mine for mine, _, _ in parts]).argsort()
    h, dx = (joined([part[i] for part in parts])[order] for i in (1, 2))  # type: ignore[misc]
    return results | {"h": h, "dx": dx, "dlora_A": stacked(dA), "dlora_B": stacked(dB)}


def joined(parts: Sequence[Bounded]) -> Bounded:
    """Rows one after another."""
    pieces = ([p.value for p in parts], [p.worst for p in parts], [p.variance for p in parts])
    value, worst, variance = (torch.cat(piece) for piece in pieces)
    return Bounded(value, worst, variance, parts[0].dtype)


def stacked(parts: Sequence[Bounded]) -> Bounded:
    """Along a new first dimension."""
    return joined([part.reshaped(lambda t: t[None]) for part in parts])


def merged(projection: Projection) -> Bounded:
    """`merge_weight`: W + s B A, or its rows rescaled, in float32 and rounded once."""
    weight, _, lora_A, lora_B, s, magnitude = projection
    wide = torch.promote_types(weight.dtype, torch.float32)
    W = Bounded(*_parts(frozen(weight, wide)), wide)
    assert lora_A is not None and lora_B is not None
    A, B = exact(lora_A, wide), exact(lora_B, wide)
    total = W + (B @ A) * s
    if magnitude is not None:
        total = total * (dora_slope(W, A, B, s) * magnitude.double()).reshaped(lambda t: t[:, None])
    return total.rounded(weight.dtype)


def shifted(logs: Tensor, error: Tensor) -> Tensor:
    """How far the probabilities exp(logs) of a row may move where each of its logits is off by up to `error`.

    One becomes at most exp(2 error) as large, and not more than 1; what it loses, the others of its row gain.
    """
    p = logs.exp()
    up = ((logs + 2 * error).clamp(max=0).exp() - p).clamp(min=0)
    down = torch.minimum(-p * torch.expm1(-2 * error), up.sum(1, keepdim=True) - up)
    return torch.maximum(up, down)


def _parts(b: Bounded) -> tuple[Tensor, Tensor, Tensor]:
    return b.value, b.worst, b.variance


# ---- norms, rotary embedding, loss


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, dy: Tensor, ds: Tensor | None,
    eps: float, offset: float, rounds: bool,
) -> Results:  # fmt: skip
    """`rms_norm`, x and dy [tokens, features]."""
    s = exact(x) if residual is None else add_up([exact(x), exact(residual)])
    rho = ((s * s).mean(1, keepdim=True) + eps).map(torch.rsqrt)
    normed, w, e = s * rho, exact(weight, x.dtype) + offset, exact(dy)
    if rounds:
        normed, w = normed.rounded(), w.rounded(weight.dtype)
    results = {"y": (normed * w).rounded(), "s": s}
    products = e * normed
    results["dweight"] = (products.rounded() if rounds else products).sum(0).rounded(weight.dtype)
    e = (e * w).rounded() if rounds else e * w
    # mean(e ⊙ x̂) as ρ mean(e ⊙ s): ρ's error is one number for the whole row, not an error of each x̂
    shift = s * rho * rho * (e * s).mean(1, keepdim=True)
    return results | both_terms(e * rho, shift * rho, ds)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, dy: Tensor, ds: Tensor | None, eps: float
) -> Results:
    """`layer_norm`, x and dy [tokens, features]."""
    s = exact(x) if residual is None else add_up([exact(x), exact(residual)])
    centred = s - s.mean(1, keepdim=True)
    rho = ((centred * centred).mean(1, keepdim=True) + eps).map(torch.rsqrt)
    normed, e = centred * rho, exact(dy) * weight.double()
    y = normed * weight.double() if bias is None else normed * weight.double() + bias.double()
    results = {"y": y.rounded(), "s": s, "dbias": exact(dy).sum(0).rounded(None if bias is None else bias.dtype)}
    results["dweight"] = (exact(dy) * normed).sum(0).rounded(weight.dtype)
    shift = e.mean(1, keepdim=True) + centred * rho * rho * (e * centred).mean(1, keepdim=True)
    return results | both_terms(e * rho, shift * rho, ds)


def both_terms(term: Bounded, shift: Bounded, ds: Tensor | None) -> Results:
    """dx = term - shift, with ds, the residual sum's own gradient: added in any order, and stored."""
    size = term.value.abs() + shift.value.abs() + (0 if ds is None else ds.double().abs())
    dx = (term - shift).rounded(term.wide, over=size).rounded()
    dx = dx if ds is None else add_up([dx, exact(ds)])
    return {"dx": dx, "dresidual": dx}


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool = False) -> Bounded:
    """One tensor [..., head_dim] turned by cos and sin [..., rot], which broadcast; or back."""
    rot, wide = cos.shape[-1], torch.promote_types(x.dtype, cos.dtype)
    turned, rest = exact(x[..., :rot], wide), exact(x[..., rot:])
    other = turned.reshaped(lambda t: partners(t, interleaved))
    sine = sin.double() * partners_sign(rot, interleaved) * (-1 if inverse else 1)
    products = turned * cos.double(), other * sine
    # autograd returns each product's gradient in the type of x
    turned = add_up([each.rounded(x.dtype if inverse else wide) for each in products]).rounded(x.dtype)
    pieces = zip(_parts(turned), _parts(rest), strict=True)
    value, worst, variance = (torch.cat(piece, dim=-1) for piece in pieces)
    return Bounded(value, worst, variance, x.dtype)


def partners(x: Tensor, interleaved: bool) -> Tensor:
    """Each feature's partner in its pair."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else x.roll(x.shape[-1] // 2, -1)


def partners_sign(rot: int, interleaved: bool) -> Tensor:
    """-1 where the feature is the first of its pair, whose partner is subtracted; [rot]."""
    feature = torch.arange(rot)
    first = feature % 2 == 0 if interleaved else feature < rot // 2
    return torch.where(first, -1.0, 1.0).double()


def cross_entropy(
    hidden: Tensor, head: Projection, labels: Tensor, dloss: Tensor, dropout: Dropout | None, *,
    weight: float, each: bool, softcap: float | None, logit_scale: float, smoothing: float, ignored: int,
) -> Results:  # fmt: skip
    """`linear_cross_entropy`, hidden [tokens, features], labels [tokens]; weight of each loss, each: not summed."""
    layer = Linear(exact(hidden), head, dropout)
    counted = (labels != ignored).double()[:, None]
    z = layer.h * logit_scale
    bend: Bounded | None = None
    if softcap is not None:
        t = bent(z * (1 / softcap), torch.tanh, (), 1.0)
        z, bend = t * softcap, t * t * -1 + 1
    vocab = z.value.shape[1]
    label = torch.nn.functional.one_hot(labels.clamp(min=0), vocab).double()
    target = label * (1 - smoothing) + smoothing / vocab
    top = z.value.amax(1, keepdim=True)  # any shift will do, so it has no error
    below = z - top
    powers = below.map(torch.exp, ulps=4 + 2 * below.value.abs())
    total = powers.sum(1, keepdim=True)
    losses = (total.map(torch.log) + top) - (z * target).sum(1, keepdim=True)
    of_logits = powers.value / total.value - target
    losses = losses + layer.in_step(of_logits * logit_scale * (1 if bend is None else bend.value))
    off = z.worst.amax(1, keepdim=True)  # [tokens, 1]
    rough = z.bound().amax(1, keepdim=True) > FIRST_ORDER
    losses = certain(losses, rough, 2 * off)
    losses = losses * (counted * weight)
    loss = losses.reshaped(lambda t: t[:, 0]) if each else losses.sum(0).reshaped(lambda t: t[0])
    p = powers * total.map(torch.reciprocal)
    p = certain(p, rough, shifted(below.value - total.value.log(), off) + p._rounds(8 * p.value))
    dz = (p - target) * (counted * weight) * logit_scale
    if bend is not None:
        dz = dz * bend
    scale = given(dloss, hidden.dtype).reshaped(lambda t: t.reshape(-1, 1))
    dlogits = (dz.rounded() * scale).rounded()
    # what all logits of a token have in common changes Σ exp, and with it every probability of the row in step
    probability = powers.value / total.value
    by_logit = logit_scale * (1 if bend is None else bend.value)
    moved = layer.in_step(probability * by_logit).bound()  # [tokens, 1]
    of_row = probability * by_logit * counted * weight * scale.value * moved
    of_row = torch.where(rough, 0.0, of_row)  # where the certain bound of p has it already
    gradients = layer.backward(wider(dlogits, of_row.abs()), apart=True)
    # and what is nearest to zero is rounded to it, in one direction
    lost = torch.where(dlogits.value.abs() <= floor_of(hidden.dtype), dlogits.value, 0.0)
    for in_step in (layer.carried(of_row), layer.carried(lost)):
        gradients |= {name: wider(gradients[name], size) for name, size in in_step.items()}
    # a gradient made in the forward is multiplied by the loss's own, each rounded once more
    one = exact(torch.ones(()), hidden.dtype).rounded()
    gradients = {name: (value * one).rounded() for name, value in gradients.items()}
    if not each:  # and what its first rounding costs near zero is multiplied too
        floor = torch.tensor(floor_of(hidden.dtype) * float(dloss.abs()), dtype=torch.float64)
        gradients = {name: wider(value, floor) for name, value in gradients.items()}
    gradients["dhidden"] = gradients.pop("dx")
    return gradients | {"loss": loss}
