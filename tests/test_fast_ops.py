"""What the fast operations keep for the backward, what they leave alone, and autocast; their results: tests/proof."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lora
import lora.fast as fast
import lora.reference as reference
from lora.fast.workspace import release_workspaces
from lora.projection import Dropout, Projection
from lora.reference.loss import warn_nothing_counts

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


def test_linear_cross_entropy_with_nothing_to_learn():
    hidden, head = normal(3, 12).requires_grad_(), projection(30, 12)
    warn_nothing_counts.cache_clear()  # it is said once in a process
    with pytest.warns(UserWarning, match="its loss is 0"):
        loss = fast.linear_cross_entropy(hidden, head, torch.full((3,), -100))
    assert float(loss.detach()) == 0
    (dx,) = torch.autograd.grad(loss, hidden)
    assert not dx.any()


@pytest.mark.parametrize("name", ["linear", "mlp", "rms_norm", "layer_norm", "embedding", "multi_lora"])
def test_a_result_may_be_changed_in_place(name):
    """As Llama 4 does: it adds its experts' result to the shared expert's."""
    x, weight = normal(3, 12).requires_grad_(), normal(12).requires_grad_()
    gate, up, down = projection(20, 12), projection(20, 12), projection(12, 20)
    A, B, scaling = normal(2, 3, 12).requires_grad_(), normal(2, 9, 3).requires_grad_(), torch.ones(2, dtype=F64)
    ids, index = torch.tensor([1, 0, 4]), torch.tensor([1, 0, 1])
    table = projection(12, 20)._replace(weight=normal(20, 12))
    run, tensors = {
        "linear": (lambda: fast.lora_linear(x, gate), leaves(x, gate)),
        "mlp": (lambda: fast.lora_mlp(x, gate, up, down, activation="silu"), leaves(x, gate, up, down)),
        "rms_norm": (lambda: fast.rms_norm(x, weight), [x, weight]),
        "layer_norm": (lambda: fast.layer_norm(x, weight), [x, weight]),
        "embedding": (lambda: fast.lora_embedding(ids, table), leaves(table)),
        "multi_lora": (
            lambda: fast.multi_lora_linear(x, Projection(normal(9, 12)), A, B, scaling, index), [x, A, B],
        ),
    }[name]  # fmt: skip
    torch.manual_seed(0)
    expected = torch.autograd.grad((run() * 2).sin().sum(), tensors)
    torch.manual_seed(0)
    for one, other in zip(torch.autograd.grad(run().mul_(2).sin().sum(), tensors), expected, strict=True):
        assert torch.equal(one, other)


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


@pytest.mark.parametrize("positions", [None, torch.tensor([[6, 0, 0, 2], [1, 2, 3, 4]])], ids=["rows", "positions"])
def test_rope_saves_what_its_docstring_says(positions):
    rot, cos, sin = 6, normal(7, 6), normal(7, 6)
    q, k = normal(2, 3, 4, 8).requires_grad_(), normal(2, 1, 4, 8).requires_grad_()
    given = (cos[:4], sin[:4]) if positions is None else (cos, sin)
    angles = 4 if positions is None else 2 * 4  # the tables' own rows, or those of every token
    assert saved_numbers(lambda: fast.rope(q, k, *given, position_ids=positions)) == 2 * angles * rot


def test_a_loss_saves_what_its_docstring_says():
    T, fan_in, vocab, r = 7, 12, 16, 3
    x, labels = normal(T, fan_in).requires_grad_(), torch.randint(vocab, (T,))
    head = frozen(projection(vocab, fan_in, r, bias=True))
    gradients = T * fan_in + r * (fan_in + vocab) + vocab
    assert saved_numbers(lambda: fast.linear_cross_entropy(x, head, labels)) == gradients
    assert saved_numbers(lambda: fast.linear_cross_entropy(x, head, labels, reduction="none")) == T * fan_in + T
    assert (
        saved_numbers(lambda: fast.linear_cross_entropy(x.detach(), frozen(projection(vocab, fan_in, 0)), labels)) == 0
    )


def saved_bytes(function: Any) -> int:
    """The bytes that autograd keeps for the backward of a call: of every storage once, of parameters not."""
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(storage.nbytes() for storage in seen.values())


BF16, F32 = torch.bfloat16, torch.float32
T, IN, OUT, HIDDEN, R = 7, 12, 16, 20, 3


def typed(
    out: int, fan_in: int, weight: torch.dtype, adapters: torch.dtype, *, dora: bool = False, trains_m: bool = True
) -> Projection:
    """A projection of parameters: a frozen weight and bias of one type, adapters of another."""

    def parameter(*shape: int, dtype: torch.dtype, trains: bool = True) -> Tensor:
        return torch.nn.Parameter((torch.rand(*shape) + 0.1).to(dtype), trains)

    base = parameter(out, fan_in, dtype=weight, trains=False), parameter(out, dtype=weight, trains=False)
    factors = parameter(R, fan_in, dtype=adapters), parameter(out, R, dtype=adapters)
    return Projection(*base, *factors, 1.7, parameter(out, dtype=adapters, trains=trains_m) if dora else None)


def calls(x: Tensor, dropout: Dropout | None, *types: torch.dtype, **options: Any) -> dict[str, Any]:
    """The three operations on projections of these types."""
    linear = typed(OUT, IN, *types, **options)
    qkv = [typed(out, IN, *types, **options) for out in (OUT, 8, 8)]
    mlp = [typed(o, i, *types, **options) for o, i in ((HIDDEN, IN), (HIDDEN, IN), (OUT, HIDDEN))]
    return {
        "lora_linear": lambda: fast.lora_linear(x, linear, dropout=dropout),
        "lora_qkv": lambda: fast.lora_qkv(x, *qkv, dropout=dropout),
        "lora_mlp": lambda: fast.lora_mlp(x, *mlp, activation="silu", dropout=dropout),
    }


# What each operation saves, in numbers: always, of adapters, of DoRA's vectors, while the magnitudes train, and of
# weights and biases under autocast.
KEPT = {
    "lora_linear": (T * (IN + R), R * (IN + OUT), OUT, T * OUT, IN * OUT + OUT),
    "lora_qkv": (T * (IN + 3 * R), R * (3 * IN + OUT + 16), OUT + 16, T * (OUT + 16), (IN + 1) * (OUT + 16)),
    "lora_mlp": (
        T * (IN + 2 * HIDDEN + 3 * R),
        R * (2 * (IN + HIDDEN) + HIDDEN + OUT),
        2 * HIDDEN + OUT,
        T * (2 * HIDDEN + OUT),
        HIDDEN * (2 * IN + OUT) + 2 * HIDDEN + OUT,
    ),
}


@pytest.mark.parametrize("dropout", [None, Dropout(0.3, 7)], ids=["plain", "dropout"])
@pytest.mark.parametrize("operation", list(KEPT))
def test_every_case_saves_what_the_docstrings_say(operation, dropout):
    always, adapters, vectors, while_m_trains, weights = KEPT[operation]
    single, half = torch.rand(T, IN, requires_grad=True), torch.rand(T, IN).to(BF16).requires_grad_()

    def saved(x: Tensor, *types: torch.dtype, **options: Any) -> int:
        return saved_bytes(calls(x, dropout, *types, **options)[operation])

    assert saved(single, F32, F32) == 4 * always
    assert saved(half, BF16, F32) == 2 * (always + adapters)  # copies of A and B
    assert saved(single, F32, F32, dora=True, trains_m=False) == 4 * (always + 2 * vectors)
    assert saved(single, F32, F32, dora=True) == 4 * (always + 2 * vectors + while_m_trains)
    assert saved(half, BF16, F32, dora=True) == 2 * (always + adapters + vectors + while_m_trains) + 4 * vectors
    with torch.autocast("cpu", dtype=BF16):
        assert saved(single, F32, F32) == 2 * (always + adapters + weights)
        assert saved(half, BF16, BF16) == 2 * always  # of autocast's type already


def test_autocast_copies_no_codes():
    x, p = torch.rand(T, IN, requires_grad=True), typed(OUT, IN, F32, F32)._replace(bias=None)
    p = p._replace(weight=reference.nf4_quantize(torch.randn(OUT, IN)))
    with torch.autocast("cpu", dtype=BF16):
        assert saved_bytes(lambda: fast.lora_linear(x, p)) == 2 * (T * (IN + R) + R * (IN + OUT))


def test_autocast_takes_stacked_weights_apart():
    """As the docstring of `lora_qkv` says: three products where there was one."""
    stacked = torch.rand(3 * OUT, IN)
    parts = [Projection(torch.nn.Parameter(block, False)) for block in stacked.split(OUT)]
    x, counted = torch.rand(T, IN), []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    def products() -> int:
        counted.clear()
        with Count():
            fast.lora_qkv(x, *parts)
        return sum(name in ("aten::mm", "aten::addmm_", "mkldnn::_linear_pointwise") for name in counted)

    for onednn in (True, False):
        with torch.backends.mkldnn.flags(enabled=onednn):
            assert products() == 1
            with torch.autocast("cpu", dtype=BF16):
                assert products() == 3


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(("table", "size"), [(F32, 4), (BF16, 2)], ids=["float32", "bfloat16"])
def test_an_embedding_saves_what_its_docstring_says(table, size, autocast):
    ids = torch.randint(30, (T,))

    def saved(**options: Any) -> int:
        wide = typed(IN, 30, F32, F32, **options)
        p = wide._replace(weight=torch.nn.Parameter(torch.rand(30, IN).to(table), False), bias=None)
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            return saved_bytes(lambda: fast.lora_embedding(ids, p))

    plain = T * 8 + T * R * size
    assert saved() == plain
    assert saved(dora=True, trains_m=False) == plain + 2 * IN * 4
    assert saved(dora=True) == plain + 2 * IN * 4 + T * IN * size


class CountProducts(TorchDispatchMode):
    """How many matrix products run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name.removeprefix("aten::") in ("mm", "addmm", "addmm_", "bmm", "matmul", "linear")
        return func(*args, **(kwargs or {}))


def products_of(call: Any, wanted: list[Tensor], sizes: list[int]) -> tuple[int, int]:
    """Products of the forward, and of the backward for what is wanted; the outputs' gradients lie in one buffer."""
    with CountProducts() as forward:
        made = call()
    outputs = made if isinstance(made, tuple) else (made,)
    dys = normal(len(outputs[0]), sum(sizes)).split(sizes, dim=1)
    with CountProducts() as backward:
        gradients = torch.autograd.grad(outputs, wanted, dys)
    assert all(gradient.any() for gradient in gradients)
    return forward.count, backward.count


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "DoRA"])
@pytest.mark.parametrize("trains", ["x", "A", "B", "xA", "xB", "AB", "xAB"])
def test_each_product_is_computed_once_and_only_where_it_is_needed(trains, dora):
    """dy B serves dA and dx; what takes no gradient costs no product."""
    x, p = normal(5, 12), projection(16, 12, dora=dora)
    if dora:
        p.magnitude.requires_grad_(False)
    named = {"x": x, "A": p.lora_A, "B": p.lora_B}
    for name, tensor in named.items():
        tensor.requires_grad_(name in trains)
    wanted = [tensor for name, tensor in named.items() if name in trains]
    forward, backward = products_of(lambda: fast.lora_linear(x, p), wanted, [16])
    assert forward == 3 + dora  # x Wᵀ, x Aᵀ, u Bᵀ; for DoRA's norm B A
    du, dA, dB, dx = bool({*trains} & {"x", "A"}), "A" in trains, "B" in trains, 2 * ("x" in trains)  # dy W, du A
    assert backward == du + dA + dB + dx


def stacked(*parts: Projection) -> list[Projection]:
    """The projections with their weights one after another in memory."""
    weights = torch.cat([p.weight for p in parts]).split([len(p.weight) for p in parts])
    return [p._replace(weight=w) for p, w in zip(parts, weights, strict=True)]


def test_projections_of_one_x_share_their_products():
    """q, k, v, and gate and up: one product through W's and one through A's, and so on the way back."""
    x = normal(5, 12).requires_grad_()
    qkv = stacked(projection(16, 12), projection(8, 12, 2), projection(8, 12, 5))
    forward, backward = products_of(lambda: fast.lora_qkv(x, *qkv), leaves(x, *qkv), [16, 8, 8])
    assert (forward, backward) == (1 + 1 + 3, 3 + 1 + 3 + 2)  # W, A, each B; each du, dA's, each dB, dx
    gate, up = stacked(projection(20, 12), projection(20, 12))
    down = projection(12, 20)
    parts = (gate, up, down)
    forward, backward = products_of(lambda: fast.lora_mlp(x, *parts, activation="silu"), leaves(x, *parts), [12])
    assert forward == (1 + 1 + 2) + 3
    assert backward == (1 + 1 + 1 + 2) + (2 + 1 + 2 + 2)  # down's du, dA, dB, dh; above: each du, dA's, each dB, dx


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


def test_an_nf4_layer_trains_after_inference_mode():
    release_workspaces()
    layer = projection(16, 12, 3)._replace(weight=lora.ops.nf4_quantize(normal(16, 12).float()))
    x = normal(5, 12).requires_grad_()
    with torch.inference_mode():
        expected = fast.lora_linear(x.detach(), layer)
    h = fast.lora_linear(x, layer)
    assert torch.equal(h, expected)
    h.sum().backward()
    assert x.grad is not None and x.grad.any()


@pytest.mark.parametrize("name", ["lora_linear", "lora_mlp", "rms_norm", "layer_norm", "linear_cross_entropy"])
def test_a_gradient_of_a_gradient_raises(name):
    """The backwards are written for numbers: a second derivative would lose terms without a word."""
    x, weight = normal(4, 8).requires_grad_(), normal(8)
    square, labels = projection(8, 8, 2), torch.tensor([1, 0, 3, 2])
    function = {
        "lora_linear": lambda: fast.lora_linear(x, square),
        "lora_mlp": lambda: fast.lora_mlp(x, square, square, square, activation="silu"),
        "rms_norm": lambda: fast.rms_norm(x, weight),
        "layer_norm": lambda: fast.layer_norm(x, weight),
        "linear_cross_entropy": lambda: fast.linear_cross_entropy(x, square, labels),
    }[name]
    (gradient,) = torch.autograd.grad(function().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()
