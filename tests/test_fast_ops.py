"""Both backends, operation by operation: outputs and every gradient agree in float64, over inputs Hypothesis draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lora.fast as fast
import lora.reference as reference
from lora.fast.loss import CHUNK_BYTES
from lora.fast.operands import rows_of_one
from lora.projection import Dropout, Projection
from lora.reference.loss import warn_nothing_counts
from lora.reference.norm import layer_norm_backward
from lora.testing import assert_within

F64 = torch.float64
TOLERANCE = 1e-11  # float64 rounds by 1e-16, and no sum here has more than a few hundred terms of order one


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def projection(
    out: int,
    fan_in: int,
    rank: int = 3,
    bias: bool = False,
    dora: bool = False,
    nf4: bool = False,
    scaling: float = 1.7,
) -> Projection:
    """rank 0 is a projection without an adapter."""
    weight: Any = normal(out, fan_in)
    if nf4:
        weight = reference.nf4_quantize(weight.float())
    return Projection(
        weight,
        normal(out).requires_grad_() if bias else None,
        normal(rank, fan_in).requires_grad_() if rank else None,
        normal(out, rank).requires_grad_() if rank else None,
        scaling,
        (torch.rand(out, dtype=F64) + 0.5).requires_grad_() if dora and rank else None,
    )


def leaves(*things: Any) -> list[Tensor]:
    flat = [t for thing in things for t in (thing if isinstance(thing, tuple) else (thing,))]
    return [t for t in flat if isinstance(t, Tensor) and t.requires_grad]


def assert_agree(operation: str, *arguments: Any, **options: Any) -> None:
    """The fast operation and the reference: same outputs, same gradients for the same random dy."""
    wanted = leaves(*arguments)
    results = []
    for backend in (reference, fast):
        outputs = getattr(backend, operation)(*arguments, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(99)
        dys = [torch.randn(output.shape, dtype=output.dtype) for output in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, wanted, dys)])
    for expected, found in zip(*results, strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
        assert torch.equal(torch.isfinite(found), torch.isfinite(expected))
        assert float((found - expected).detach().abs().max() if found.numel() else 0.0) <= TOLERANCE * max(scale, 1e-9)


rates = st.sampled_from([None, Dropout(0.3, 7), Dropout(0.5, 2**61 + 5, stream=3)])
kinds = st.fixed_dictionaries({"bias": st.booleans(), "dora": st.booleans()})
tokens = st.sampled_from([(0,), (1,), (5,), (2, 3)])


@given(tokens, st.integers(1, 30), st.integers(1, 20), st.integers(0, 5), kinds, rates, st.booleans())
def test_lora_linear(shape, fan_in, out, rank, kind, dropout, nf4):
    x = normal(*shape, fan_in).requires_grad_()
    assert_agree("lora_linear", x, projection(out, fan_in, rank, nf4=nf4, **kind), dropout=dropout)


@given(tokens, st.lists(st.integers(0, 4), min_size=3, max_size=3), kinds, rates, st.booleans(), st.booleans())
def test_lora_qkv(shape, ranks, kind, dropout, nf4, stacked):
    x = normal(*shape, 12).requires_grad_()
    q, k, v = (projection(o, 12, r, nf4=nf4, **kind) for o, r in zip((16, 8, 8), ranks, strict=True))
    if stacked and not nf4:
        rows = normal(32, 12)
        q, k, v = (p._replace(weight=w) for p, w in zip((q, k, v), rows.split([16, 8, 8]), strict=True))
        assert rows_of_one([q.weight, k.weight, v.weight]).shape == (32, 12)
    assert_agree("lora_qkv", x, q, k, v, dropout=dropout)


@given(
    tokens, st.lists(st.integers(0, 4), min_size=3, max_size=3), kinds, rates,
    st.sampled_from(["silu", "gelu", "gelu_tanh"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_lora_mlp(shape, ranks, kind, dropout, activation, nf4, stacked):
    x = normal(*shape, 12).requires_grad_()
    gate, up = (projection(20, 12, r, nf4=nf4, **kind) for r in ranks[:2])
    if stacked and not nf4:
        gate, up = (p._replace(weight=w) for p, w in zip((gate, up), normal(40, 12).chunk(2), strict=True))
    down = projection(12, 20, ranks[2], nf4=nf4, **kind)
    assert_agree("lora_mlp", x, gate, up, down, activation=activation, dropout=dropout)


@given(tokens, st.booleans(), st.sampled_from([None, 3, -1]), st.integers(1, 5))
def test_lora_embedding(shape, dora, padding_idx, rank):
    ids = torch.randint(11, shape)
    table = projection(11, 6)._replace(
        lora_A=normal(rank, 11).requires_grad_(),
        lora_B=normal(6, rank).requires_grad_(),
        magnitude=(torch.rand(6, dtype=F64) + 0.5).requires_grad_() if dora else None,
    )
    assert_agree("lora_embedding", ids, table, padding_idx=padding_idx)


@given(tokens, st.sampled_from([0.0, 1.0]), st.booleans(), st.booleans())
def test_rms_norm(shape, offset, rounds, with_residual):
    x, weight = normal(*shape, 9).requires_grad_(), normal(9).requires_grad_()
    residual = normal(*shape, 9).requires_grad_() if with_residual else None
    for name in ("x", "weight"):  # a frozen norm, and a first layer
        dx, dweight = name == "x", name == "weight"
        wanted = [t for t, use in ((x, dx), (weight, dweight)) if use]
        results = []
        for backend in (reference, fast):
            out = backend.rms_norm(x, weight, offset=offset, round_before_weight=rounds, residual=residual)
            ys = out if isinstance(out, tuple) else (out,)
            torch.manual_seed(5)
            results.append([*ys, *torch.autograd.grad(ys, wanted, [normal(*y.shape) for y in ys])])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    if residual is not None:
        y, s = fast.rms_norm(x, weight, residual=residual)
        (dresidual,) = torch.autograd.grad((y, s), residual, (torch.ones_like(y), torch.ones_like(s)))
        y, s = reference.rms_norm(x, weight, residual=residual)
        (expected,) = torch.autograd.grad((y, s), residual, (torch.ones_like(y), torch.ones_like(s)))
        torch.testing.assert_close(dresidual, expected, rtol=1e-11, atol=1e-11)


LAYER_NORM = ("x", "weight", "bias", "residual")


@given(tokens, st.booleans(), st.booleans(), st.sets(st.sampled_from(LAYER_NORM), min_size=1))
def test_layer_norm(shape, with_bias, with_residual, trained):
    x, weight, bias, residual = normal(*shape, 9), normal(9), normal(9), normal(*shape, 9)
    given = {"x": x, "weight": weight, "bias": bias if with_bias else None}
    given["residual"] = residual if with_residual else None
    wanted = [given[name].requires_grad_() for name in LAYER_NORM if name in trained and given[name] is not None]
    results = []
    for backend in (reference, fast):
        out = backend.layer_norm(**given, eps=0.01)
        assert isinstance(out, tuple) == with_residual
        ys = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(5)
        dys = [normal(*y.shape) for y in ys]
        used = [number for number, y in enumerate(ys) if y.requires_grad]  # s does not, from a weight alone
        gradients = torch.autograd.grad([ys[n] for n in used], wanted, [dys[n] for n in used]) if wanted else ()
        results.append([*ys, *gradients])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(3,), (2, 2), (0,)])
def test_the_norms_gradients_are_those_of_finite_differences(shape):
    x, residual = normal(*shape, 4).requires_grad_(), normal(*shape, 4).requires_grad_()
    weight, bias = normal(4).requires_grad_(), normal(4).requires_grad_()
    for r in ((residual,), ()):
        inputs = (x, weight, bias, *r)
        assert torch.autograd.gradcheck(lambda x, w, b, r=None: fast.layer_norm(x, w, b, residual=r, eps=0.1), inputs)
        inputs = (x, weight, *r)
        assert torch.autograd.gradcheck(lambda x, w, r=None: fast.rms_norm(x, w, residual=r, eps=0.1), inputs)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_layer_norm_in_bfloat16_rounds_its_results_once(weight_dtype):
    """The bound: one rounding of a result, and float32 sums of 65 features or 40 rows with ten operations on each."""
    x, dy = normal(40, 65).bfloat16().requires_grad_(), normal(40, 65).bfloat16()
    weight, bias = (normal(65).to(weight_dtype).requires_grad_() for _ in range(2))
    y = fast.layer_norm(x, weight, bias)
    found = [y, *torch.autograd.grad(y, (x, weight, bias), dy)]
    x64, w64, b64, dy64 = (t.detach().double() for t in (x, weight, bias, dy))
    truth = [reference.layer_norm(x64, w64, b64), *layer_norm_backward(dy64, x64, w64, b64)]
    normed = reference.layer_norm(x64, torch.ones_like(w64)).abs()
    e, rho = (dy64 * w64).abs(), x64.var(-1, correction=0, keepdim=True).rsqrt()
    sizes = [normed * w64.abs() + b64.abs() + 1, rho * (e + e.mean(-1, True) + normed * (e * normed).mean(-1, True))]
    sizes += [(dy64.abs() * (normed + 1)).sum(0), dy64.abs().sum(0)]  # 1: the mean's own error, beside x̂ of order one
    for one, exact, size, like in zip(found, truth, sizes, (x, x, weight, bias), strict=True):
        assert one.dtype == like.dtype
        u = torch.finfo(like.dtype).eps / 2
        assert_within(one, exact, u * exact.abs() + 75 * 2**-24 * size)


@given(st.sampled_from([8, 4]), st.booleans(), st.booleans(), st.integers(1, 5))
def test_rope(rot, interleaved, by_position, seq):
    q, k = normal(2, seq, 4, 8).requires_grad_(), normal(2, 2, seq, 8).requires_grad_()  # q is used transposed
    angles = normal(9, rot // 2)
    angles = angles.repeat_interleave(2, dim=1) if interleaved else torch.cat([angles, angles], dim=1)
    positions = torch.randint(9, (2, seq)) if by_position else None
    table = angles if by_position else angles[:seq]
    arguments = (q.transpose(1, 2), k, table.cos(), table.sin())
    results = []
    for backend in (reference, fast):
        out = backend.rope(*arguments, position_ids=positions, interleaved=interleaved)
        torch.manual_seed(5)
        results.append([*out, *torch.autograd.grad(out, (q, k), [normal(*o.shape) for o in out])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


LOSSES = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"num_items": 17},
    {"softcap": 3.0, "logit_scale": 0.5},
    {"label_smoothing": 0.2, "softcap": 2.0, "reduction": "none"},
    {"label_smoothing": 0.3},
]


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [None, Dropout(0.4, 3)])
@pytest.mark.parametrize("rank", [0, 4])
def test_linear_cross_entropy(monkeypatch, options, dora, dropout, rank):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 3 * 30 * 8)  # three tokens a chunk
    hidden = normal(2, 5, 12).requires_grad_()
    labels = torch.randint(30, (2, 5))
    labels[0, 1] = labels[1, 3] = -100
    head = projection(30, 12, rank, bias=True, dora=dora)
    head = head._replace(weight=head.weight.requires_grad_())
    assert_agree("linear_cross_entropy", hidden, head, labels, dropout=dropout, **options)


def test_linear_cross_entropy_with_nothing_to_learn():
    hidden, head = normal(3, 12).requires_grad_(), projection(30, 12)
    warn_nothing_counts.cache_clear()  # it is said once in a process
    with pytest.warns(UserWarning, match="its loss is 0"):
        loss = fast.linear_cross_entropy(hidden, head, torch.full((3,), -100))
    assert float(loss.detach()) == 0
    (dx,) = torch.autograd.grad(loss, hidden)
    assert not dx.any()


@given(st.lists(st.integers(-1, 2), min_size=1, max_size=6), st.sampled_from([(), (3,)]), st.booleans())
def test_multi_lora_linear(index, inner, nf4):
    x = normal(len(index), *inner, 12).requires_grad_()
    base = projection(16, 12, 0, bias=True, nf4=nf4)
    A, B = normal(3, 4, 12).requires_grad_(), normal(3, 16, 4).requires_grad_()
    assert_agree("multi_lora_linear", x, base, A, B, torch.tensor([1.0, 2.0, 0.5]), torch.tensor(index))


@given(st.integers(0, 40), st.integers(0, 2**63), st.integers(0, 5), st.sampled_from([0.1, 0.5, 0.999, 1e-4]))
def test_dropout_masks_are_the_same_bits(count, seed, stream, p):
    masks = [backend.dropout_mask((count, 3), p, seed, stream=stream) for backend in (reference, fast)]
    assert torch.equal(*masks)


@given(
    st.integers(1, 9), st.integers(1, 70), st.sampled_from([32, 64, 128]), st.booleans(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_nf4_decodes_to_the_same_bits(rows, columns, block_size, double_quant, dtype):
    weight = torch.randn(rows, columns)
    weight[rows // 2] = 0
    quantised = fast.nf4_quantize(weight, block_size=block_size, double_quant=double_quant)
    plain = reference.nf4_quantize(weight, block_size=block_size, double_quant=double_quant)
    for part, expected in zip(quantised, plain, strict=True):
        assert torch.equal(part, expected) if isinstance(part, Tensor) else part == expected
    assert torch.equal(fast.nf4_dequantize(quantised, dtype), reference.nf4_dequantize(quantised, dtype))


# ---- what is kept for the backward


def saved_numbers(function: Any) -> int:
    """How many numbers autograd keeps for the backward of a call, each storage counted once, parameters not at all."""
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter):
            seen[x.data_ptr()] = max(seen.get(x.data_ptr(), 0), x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(seen.values())


def frozen(p: Projection) -> Projection:
    """The projection's tensors as parameters, so that keeping them costs nothing."""
    return Projection(*(torch.nn.Parameter(t.detach(), t.requires_grad) if isinstance(t, Tensor) else t for t in p))


@pytest.mark.parametrize("dropout", [None, Dropout(0.3, 7)])
def test_saved_bytes_are_those_of_the_docstrings(dropout):
    T, fan_in, hidden, r = 7, 12, 20, 3
    x = normal(T, fan_in).requires_grad_()
    linear = frozen(projection(16, fan_in, r, bias=True))
    assert saved_numbers(lambda: fast.lora_linear(x, linear, dropout=dropout)) == T * (fan_in + r)
    assert saved_numbers(lambda: fast.lora_linear(x, frozen(projection(16, fan_in, 0)))) == 0
    q, k, v = (frozen(projection(8, fan_in, r)) for _ in range(3))
    assert saved_numbers(lambda: fast.lora_qkv(x, q, k, v, dropout=dropout)) == T * (fan_in + 3 * r)
    gate, up, down = (frozen(projection(o, i, r)) for o, i in ((hidden, fan_in), (hidden, fan_in), (fan_in, hidden)))
    mlp = saved_numbers(lambda: fast.lora_mlp(x, gate, up, down, activation="silu", dropout=dropout))
    assert mlp == T * (fan_in + 2 * hidden + 3 * r)
    weight = torch.nn.Parameter(normal(fan_in), requires_grad=False)
    assert saved_numbers(lambda: fast.rms_norm(x, weight)) == T * (fan_in + 1)
    assert saved_numbers(lambda: fast.rms_norm(x, weight, residual=normal(T, fan_in))) == T * (fan_in + 1)  # s, not x
    assert saved_numbers(lambda: fast.layer_norm(x, weight)) == T * (fan_in + 2)
    assert saved_numbers(lambda: fast.layer_norm(x, weight, weight, residual=normal(T, fan_in))) == T * (fan_in + 2)
    labels = torch.randint(16, (T,))
    head = frozen(projection(16, fan_in, 0))
    assert saved_numbers(lambda: fast.linear_cross_entropy(x, head, labels)) == T * fan_in  # dx


def test_only_what_is_needed_is_computed():
    """A frozen x and frozen adapters get no gradient, and nothing is computed for them."""
    x, p = normal(5, 12), projection(16, 12)
    h = fast.lora_linear(x, p)
    h.sum().backward()
    assert x.grad is None and p.lora_A.grad is not None
    p.lora_A.requires_grad_(False)
    x.requires_grad_()
    dB, dx = torch.autograd.grad(fast.lora_linear(x, p).sum(), (p.lora_B, x))
    assert dB.any() and dx.any()


def test_a_second_backward_gives_the_right_answer():
    x = normal(5, 12).requires_grad_()
    parts = [projection(o, i) for o, i in ((20, 12), (20, 12), (12, 20))]
    y = fast.lora_mlp(x, *parts, activation="silu").sum()
    first = torch.autograd.grad(y, leaves(x, *parts), retain_graph=True)
    second = torch.autograd.grad(y, leaves(x, *parts))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_callers_tensors_are_theirs():
    x, p = normal(5, 12).requires_grad_(), projection(16, 12, bias=True, dora=True)
    before = [t.detach().clone() for t in (x, *(t for t in p if isinstance(t, Tensor)))]
    dy = normal(5, 16)
    kept = dy.clone()
    fast.lora_linear(x, p, dropout=Dropout(0.3, 1)).backward(dy)
    after = [x, *(t for t in p if isinstance(t, Tensor))]
    assert torch.equal(dy, kept) and all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("operation", ["lora_linear", "lora_mlp", "lora_embedding", "linear_cross_entropy", "rms_norm"])
@pytest.mark.parametrize("inside", [True, False], ids=["backward under autocast", "backward outside"])
def test_autocast_casts_what_the_reference_casts(operation, inside):
    """A float32 model under autocast to bfloat16, as trainers run it: as near to float32 as the reference is."""
    narrow = torch.finfo(torch.bfloat16).eps

    def single(*shape: int) -> Tensor:
        return torch.randn(*shape)

    def layer(out: int, fan_in: int) -> Projection:
        factors = (single(4, fan_in) / 5).requires_grad_(), single(out, 4).requires_grad_()
        return Projection(single(out, fan_in) / 5, single(out), *factors, 1.7)

    x = single(7, 24).requires_grad_()
    mlp = (layer(40, 24), layer(40, 24), layer(24, 40))
    table = Projection(single(11, 24), None, single(3, 11).requires_grad_(), single(24, 3).requires_grad_(), 0.5)
    arguments: dict[str, tuple[Any, dict[str, Any]]] = {
        "lora_linear": ((x, layer(16, 24)), {}),
        "lora_mlp": ((x, *mlp), {"activation": "silu"}),
        "lora_embedding": ((torch.randint(11, (7,)), table), {}),
        "linear_cross_entropy": ((x, layer(30, 24), torch.randint(30, (7,))), {}),
        "rms_norm": ((x, single(24).requires_grad_()), {}),
    }
    positional, options = arguments[operation]
    wanted = leaves(*positional)

    def run(backend: Any, autocast: bool) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = getattr(backend, operation)(*positional, **options)
            if inside:
                return [y, *torch.autograd.grad(y.float().square().sum(), wanted)]
        return [y, *torch.autograd.grad(y.float().square().sum(), wanted)]

    for exact, expected, found in zip(run(reference, False), run(reference, True), run(fast, True), strict=True):
        assert found.dtype == expected.dtype or operation in ("rms_norm", "linear_cross_entropy")
        scale = float(exact.detach().abs().max())
        reference_error = float((expected - exact).detach().abs().max())
        assert float((found - exact).detach().abs().max()) <= 2 * reference_error + 4 * narrow * scale


def test_groups_of_tokens_follow_the_index():
    """They are kept from layer to layer: not past a change of the index, and not where changes are not counted."""
    base, A, B = projection(4, 3, 0), normal(2, 2, 3), normal(2, 4, 2)
    scaling, index, x = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([0, -1, 1]), normal(3, 3)

    def assert_same() -> None:
        arguments = (x, base, A, B, scaling, index)
        torch.testing.assert_close(
            fast.multi_lora_linear(*arguments), reference.multi_lora_linear(*arguments), rtol=0, atol=TOLERANCE
        )

    assert_same()
    index = index.flip(0)  # another tensor, as young as the first
    assert_same()
    index[0] = 0
    assert_same()
    with torch.inference_mode():
        index = torch.tensor([1, 1, -1])
        assert_same()
        index[2] = 0
        assert_same()
