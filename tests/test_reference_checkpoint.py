"""checkpoint: a second forward in place of what the first one saved, with the same bits."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora.errors import LoRAError
from lora.projection import Dropout, Projection
from lora.reference.checkpoint import checkpoint, is_attention
from lora.reference.linear import lora_linear

MODES: list[dict[str, bool]] = [{}, {"selective": True}, {"offload": True}, {"selective": True, "offload": True}]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(), reason="checkpoints on a GPU: not run, needs a CUDA device"
        ),
    ),
]


def directly(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """What `checkpoint` must be indistinguishable from."""
    return function(*args, **kwargs)


class Block(nn.Module):
    """Attention and a LoRA projection, with both kinds of dropout: everything a recomputation can get wrong."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.lora_A, self.lora_B = (nn.Parameter(torch.randn(*shape)) for shape in ((2, width), (width, 2)))
        self.frozen = nn.Parameter(torch.randn(width, width), requires_grad=False)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        attended = F.dropout(attended, 0.3)
        seed = int(torch.randint(2**62, ()))  # counted dropout: the seed is drawn from the CPU generator
        projection = Projection(self.frozen, lora_A=self.lora_A, lora_B=self.lora_B)
        return x + scale * lora_linear(attended, projection, dropout=Dropout(0.3, seed)).sigmoid()


def run_blocks(blocks: list[Block], x: Tensor, call: Callable[..., Any]) -> tuple[Tensor, list[Tensor], Tensor]:
    """The output, the gradients and the generator's state afterwards."""
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    h = x
    for block in blocks:
        h = call(block, h, scale=0.5)
    output = h.detach().clone()
    parameters = [p for block in blocks for p in block.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(h.square().sum(), [x, *parameters])
    return output, list(gradients), torch.get_rng_state()


def same(one: Any, other: Any) -> bool:
    """Bit for bit, through tuples and lists."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return len(one) == len(other) and all(map(same, one, other))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_without_a_checkpoint(device: str, options: dict[str, bool], dtype: torch.dtype) -> None:
    blocks = [Block().to(device, dtype) for _ in range(3)]
    x = torch.randn(2, 5, 16, device=device, dtype=dtype)
    expected = run_blocks(blocks, x, directly)
    found = run_blocks(blocks, x, functools.partial(checkpoint, **options))
    assert same(found, expected)
    assert not same(run_blocks(blocks, x + 1, functools.partial(checkpoint, **options))[0], expected[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("outer", MODES)
@pytest.mark.parametrize("inner", MODES)
def test_a_checkpoint_in_a_checkpoint(device: str, outer: dict[str, bool], inner: dict[str, bool]) -> None:
    blocks = [Block().to(device) for _ in range(3)]
    x = torch.randn(2, 5, 16, device=device)

    def whole(h: Tensor, call: Callable[..., Any]) -> Tensor:
        for block in blocks:
            h = call(block, F.dropout(h, 0.1), scale=0.5)
        return h

    def grads(h: Tensor, x: Tensor) -> list[Tensor]:
        parameters = [p for block in blocks for p in block.parameters() if p.requires_grad]
        return list(torch.autograd.grad(h.square().sum(), [x, *parameters]))

    x.requires_grad_()
    torch.manual_seed(3)
    expected = whole(x, directly)
    expected_grads = grads(expected, x)
    torch.manual_seed(3)
    found = checkpoint(whole, x, functools.partial(checkpoint, **inner), **outer)
    assert same([found, grads(found, x)], [expected, expected_grads])


def three_steps(x: Tensor, made: list[weakref.ref[Tensor]]) -> Tensor:
    """Its first two results are saved for the backward."""
    a = x.exp()
    b = a.sin()
    made.extend([weakref.ref(a), weakref.ref(b)])
    return b * b


def test_what_the_function_saves_is_let_go() -> None:
    x, made, kept = torch.randn(4, requires_grad=True), [], []
    y, z = checkpoint(three_steps, x, made), three_steps(x, kept)
    assert [ref() for ref in made] == [None, None]
    assert all(ref() is not None for ref in kept)  # without a checkpoint they live
    assert same(torch.autograd.grad(y.sum(), x), torch.autograd.grad(z.sum(), x))


def test_what_the_second_run_saves_is_let_go_as_the_backward_uses_it() -> None:
    storages: list[weakref.ref[Any]] = []

    def function(x: Tensor) -> Tensor:
        a = x.exp()
        storages.append(weakref.ref(a.untyped_storage()))
        return a.sin()

    x = torch.randn(4, requires_grad=True)
    y = checkpoint(function, x).sum()
    y.backward(retain_graph=True)  # the graph stays, and so does what it needs to run once more
    assert [ref() for ref in storages] == [None, None]


def test_the_input_of_an_inner_checkpoint_is_let_go() -> None:
    inputs: list[weakref.ref[Tensor]] = []

    def outer(x: Tensor) -> Tensor:
        h = x.exp()
        inputs.append(weakref.ref(h.untyped_storage()))
        return checkpoint(three_steps, h, [])

    x = torch.randn(4, requires_grad=True)
    y = checkpoint(outer, x)
    assert inputs[0]() is None
    expected = torch.autograd.grad(three_steps(x.exp(), []).sum(), x)
    assert same(torch.autograd.grad(y.sum(), x), expected)


@pytest.mark.parametrize("options", MODES)
def test_nothing_is_left_after_the_backward(options: dict[str, bool]) -> None:
    """Freed by counting references alone: a cycle through autograd's graph would never be collected."""
    block, x = Block(), torch.randn(2, 5, 16, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return block(x)

    alive = weakref.ref(function)
    y = checkpoint(function, x, **options)
    del function
    assert alive() is not None
    y.sum().backward()
    assert alive() is None


def test_a_graph_without_a_backward_is_freed_too() -> None:
    def function(x: Tensor) -> Tensor:
        return x.exp()

    alive = weakref.ref(function)
    y = checkpoint(function, torch.randn(4, requires_grad=True))
    del function, y
    assert alive() is None


def test_arguments_and_results_of_every_kind() -> None:
    def function(x: Tensor, pair: tuple[Tensor, dict[str, Tensor]], n: int, *, mask: Tensor, note: None, f: str) -> Any:
        assert (n, note, f, mask.dtype) == (3, None, "f", torch.bool)
        a, b = pair[0], pair[1]["b"]
        return {"sum": (x * a).sin(), "rest": [b.exp() * mask, n]}, None

    x, a, b = (torch.randn(4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([True, False, True, True])
    arguments = {"mask": mask, "note": None, "f": "f"}
    grads = []
    for call in (checkpoint, directly):
        result, nothing = call(function, x, (a, {"b": b}), 3, **arguments)
        assert nothing is None and result["rest"][1] == 3
        grads.append(torch.autograd.grad(result["sum"].sum() + result["rest"][0].sum(), (x, a, b)))
    assert same(*grads)


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("transposed", [False, True])
def test_parameters_as_arguments(options: dict[str, bool], transposed: bool) -> None:
    weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)
    with torch.no_grad():
        weight.mul_(2)  # its version is no longer zero
    A, B = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))
    x = torch.randn(3, 4, requires_grad=True)
    projection = Projection(weight.T if transposed else weight, lora_A=A, lora_B=B)
    y, z = checkpoint(lora_linear, x.sin(), projection, **options), lora_linear(x.sin(), projection)
    assert same(torch.autograd.grad(y.sum(), (x, A, B)), torch.autograd.grad(z.sum(), (x, A, B)))


def test_inputs_need_not_require_grad() -> None:
    block, x = Block(), torch.randn(2, 5, 16)
    grads = []
    for call in (checkpoint, directly):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(call(block, x).sum(), block.lora_A))
    assert same(*grads)


def test_without_gradients_the_function_is_simply_called() -> None:
    x, made = torch.randn(4, requires_grad=True), []
    with torch.no_grad():
        y = checkpoint(three_steps, x, made)
    assert not y.requires_grad and len(made) == 2


def test_without_gradients_no_attention_is_kept() -> None:
    def function(x: Tensor) -> Tensor:
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
        return x.exp()

    with torch.no_grad():
        checkpoint(function, torch.randn(4), selective=True)


def test_the_backward_leaves_the_generator_alone() -> None:
    x = torch.randn(100, requires_grad=True)
    torch.manual_seed(1)
    y = checkpoint(lambda x: F.dropout(x, 0.5), x).sum()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    y.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_is_as_it_was() -> None:
    linear, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    seen = []

    def function(x: Tensor) -> Tensor:
        h = linear(x)
        seen.append((h.dtype, torch.is_autocast_enabled("cpu")))
        return h.sigmoid()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = checkpoint(function, x), function(x)
    found = torch.autograd.grad(y.float().sum(), [x, linear.weight])
    assert same(found, torch.autograd.grad(z.float().sum(), [x, linear.weight]))
    assert seen == [(torch.bfloat16, True)] * 3
    y = checkpoint(function, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.sum().backward()
    assert seen[3:] == [(torch.float32, False)] * 2


@pytest.mark.parametrize("options", MODES)
def test_a_second_backward_runs_it_again(options: dict[str, bool]) -> None:
    block, x = Block(), torch.randn(2, 5, 16, requires_grad=True)
    y = checkpoint(block, x, **options).sum()
    first = torch.autograd.grad(y, [x, block.lora_A], retain_graph=True)
    assert same(torch.autograd.grad(y, [block.lora_B, block.lora_A], retain_graph=True)[1:], first[1:])
    assert same(torch.autograd.grad(y, [x, block.lora_A]), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, x)


def test_a_gradient_of_a_gradient() -> None:
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    results = []
    for call in (checkpoint, directly):
        (dx,) = torch.autograd.grad(call(three_steps, x, []).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), x))
    assert same(*results)


class Changing:
    """A function that does something else when it is called again."""

    def __init__(self, *steps: Callable[[Tensor], Tensor]) -> None:
        self.steps = list(steps)

    def __call__(self, x: Tensor) -> Tensor:
        return self.steps.pop(0)(x)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda x: x * 2, "first run saved 2 tensors, the second 0"),
        (lambda x: x.exp(), "first run saved 2 tensors, the second 1"),
        (lambda x: x.exp().sin().cos(), r"second run saves more tensors than the first \(2\)"),
        (lambda x: torch.cat([x, x]).exp().sin(), r"tensor 0 .* \[4\] torch.float32 .* \[8\] torch.float32"),
        (lambda x: x.double().exp().sin(), r"tensor 0 .* \[4\] torch.float32 .* \[4\] torch.float64"),
    ],
)
@pytest.mark.parametrize("options", MODES)
def test_a_function_that_changes_is_refused(second: Any, message: str, options: dict[str, bool]) -> None:
    x = torch.randn(4, requires_grad=True)
    y = checkpoint(Changing(lambda x: x.exp().sin(), second), x, **options)
    with pytest.raises(LoRAError, match=message):
        y.sum().backward()


def test_a_refused_second_run_stays_refused() -> None:
    def more(x: Tensor) -> Tensor:
        return x.exp().sin().cos()

    x = torch.randn(4, requires_grad=True)
    y = checkpoint(Changing(lambda x: x.exp().sin(), more, more), x).sum()
    for _ in range(2):
        with pytest.raises(LoRAError, match="second run saves more tensors"):
            torch.autograd.grad(y, x, retain_graph=True)


def test_an_error_in_the_second_run_leaves_everything_as_it_was() -> None:
    def broken(x: Tensor) -> Tensor:
        torch.randn(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x.exp()
            raise OSError("disk full")

    x = torch.randn(2, 2, requires_grad=True)
    y = checkpoint(Changing(lambda x: x.exp().sin(), broken, lambda x: x.exp().sin()), x, selective=True).sum()
    before = torch.get_rng_state()
    with pytest.raises(OSError, match="disk full"):
        torch.autograd.grad(y, x, retain_graph=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert same(torch.autograd.grad(y, x), torch.autograd.grad(x.exp().sin().sum(), x))  # no hook is left


def test_an_error_in_the_first_run_leaves_everything_as_it_was() -> None:
    def broken(x: Tensor) -> Tensor:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint(broken, torch.randn(2, requires_grad=True), selective=True)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    x = torch.randn(4, requires_grad=True)
    assert same(torch.autograd.grad(x.exp().sum(), x), [x.exp()])


def test_a_backward_inside_is_refused() -> None:
    def function(x: Tensor) -> Tensor:
        return x * torch.autograd.grad(x.exp().sum(), x)[0]

    with pytest.raises(LoRAError, match="ran a backward of its own"):
        checkpoint(function, torch.randn(4, requires_grad=True))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_parameter_that_changed_in_between_is_refused(requires_grad: bool) -> None:
    linear, x = nn.Linear(4, 4).requires_grad_(requires_grad), torch.randn(3, 4, requires_grad=True)
    y = checkpoint(lambda x: linear(x).exp(), x)
    with torch.no_grad():
        linear.weight += 1
    with pytest.raises(LoRAError, match=r"parameter \(\[4, 4\] as used\) was changed in place"):
        y.sum().backward()


def test_an_argument_that_changed_in_between_is_refused() -> None:
    h = torch.randn(4, requires_grad=True).exp()
    y = checkpoint(lambda x: x.sin(), h)
    with torch.no_grad():
        h += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_saved_tensor_that_the_function_changed_is_refused() -> None:
    def function(x: Tensor) -> Tensor:
        a = x.sin()
        b = a.exp() * a
        a.add_(1)
        return b

    with pytest.raises(LoRAError, match=r"\[4\] that a checkpointed function saved .* changed in place"):
        checkpoint(function, torch.randn(4, requires_grad=True)).sum().backward()


class Counting(TorchDispatchMode):
    """Counts the attention operations that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.attentions += is_attention(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def attentions_in_backward(function: Callable[..., Tensor], *args: Tensor, **options: bool) -> int:
    y = checkpoint(function, *args, **options)
    with Counting() as counting:
        y.sum().backward()
    return counting.attentions


@pytest.mark.parametrize("device", DEVICES)
def test_selective_does_not_run_attention_again(device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    block, x = Block().to(device, dtype), torch.randn(2, 5, 16, requires_grad=True, device=device, dtype=dtype)
    assert attentions_in_backward(block, x) == 1
    assert attentions_in_backward(block, x, selective=True) == 0


def test_selective_lets_the_attention_outputs_go_after_the_backward() -> None:
    storages: list[weakref.ref[Any]] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.clone.default and args[0].shape == (2, 2, 5, 8):
                storages.append(weakref.ref(result.untyped_storage()))
            return result

    block, x = Block(), torch.randn(2, 5, 16, requires_grad=True)
    with Watching():
        y = checkpoint(block, x, selective=True)
    assert [ref() is not None for ref in storages] == [True]
    y.sum().backward()
    assert storages[0]() is None


def test_selective_computes_spelled_out_attention_again() -> None:
    calls = []

    def eager(q: Tensor) -> Tensor:
        calls.append(None)
        return torch.softmax(q @ q.mT, dim=-1) @ q

    q = torch.randn(2, 5, 4, requires_grad=True)
    y, z = checkpoint(eager, q, selective=True), eager(q)
    assert same(torch.autograd.grad(y.sum(), q), torch.autograd.grad(z.sum(), q))
    assert len(calls) == 3


@pytest.mark.parametrize("masked", [False, True])
def test_selective_with_a_mask(masked: bool) -> None:
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    mask = torch.rand(5, 5) < 0.7 if masked else None

    def function(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q.sin(), q, attn_mask=mask) * q

    y, z = checkpoint(function, q, selective=True), function(q)
    assert same(torch.autograd.grad(y.sum(), q), torch.autograd.grad(z.sum(), q))
    assert attentions_in_backward(function, q, selective=True) == 0


def test_selective_keeps_copies_that_the_function_cannot_change() -> None:
    def function(q: Tensor) -> Tensor:
        with torch.no_grad():
            sdpa = F.scaled_dot_product_attention(q, q, q)
            sdpa.mul_(2)
        return q * sdpa

    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    y, z = checkpoint(function, q, selective=True), function(q)
    expected = torch.autograd.grad(z.sum(), q)
    assert same(torch.autograd.grad(y.sum(), q, retain_graph=True), expected)
    assert same(torch.autograd.grad(y.sum(), q), expected)


def test_selective_notices_another_attention() -> None:
    def attention(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    y = checkpoint(Changing(lambda x: x * x * x.sin(), attention), x, selective=True)
    with pytest.raises(LoRAError, match=r"second run calls aten::_scaled_dot_product.* where the first called None"):
        y.sum().backward()


def test_attention_with_dropout_is_not_kept() -> None:
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
    assert is_attention(flash, ("q", "k", "v"), {}) and is_attention(efficient, ("q", "k", "v", None, True), {})
    assert is_attention(flash, ("q", "k", "v", 0.0, True), {})
    assert not is_attention(flash, ("q", "k", "v", 0.1, True), {})
    assert not is_attention(efficient, ("q", "k", "v", None, True, 0.1), {})
    assert not is_attention(flash, ("q", "k", "v"), {"dropout_p": 0.1})
    assert not is_attention(torch.ops.aten.mm.default, ("a", "b"), {})
    assert not is_attention(torch.ops.aten._scaled_dot_product_flash_attention_backward.default, (), {})


@pytest.mark.parametrize("device", DEVICES[1:])
def test_attention_with_dropout_keeps_its_place_in_the_random_stream(device: str) -> None:
    def function(x: Tensor) -> Tensor:
        return F.dropout(F.scaled_dot_product_attention(x, x, x, dropout_p=0.2), 0.5)

    x = torch.randn(2, 2, 64, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    grads = []
    for call in (functools.partial(checkpoint, selective=True), directly):
        torch.manual_seed(4)
        grads.append(torch.autograd.grad(call(function, x).sum(), x))
    assert same(*grads)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_offload_frees_device_memory(device: str) -> None:
    def peak_after_forward(**options: bool) -> int:
        h = torch.randn(1 << 20, device=device, requires_grad=True)
        before = torch.cuda.memory_allocated()
        for _ in range(8):
            h = checkpoint(lambda x: x.sin().cos(), h, **options)
        return torch.cuda.memory_allocated() - before

    size = 4 << 20
    assert peak_after_forward(offload=True) == size  # the output only
    assert peak_after_forward() == 8 * size


def test_offload_leaves_parameters_and_keyword_arguments_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Any] = []
    to = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda x, *args: moved.append((tuple(x.shape), args)) or to(x, *args))
    h, weight, other = torch.randn(2, requires_grad=True).exp(), nn.Parameter(torch.randn(3)), torch.randn(4)
    checkpoint(lambda x, w, y: x.sum() * w.sum() * y.sum(), h, weight, y=other, offload=True)
    assert moved == [((2,), ("cpu",))]


@pytest.mark.parametrize("options", MODES)
def test_a_transformers_model_trains_with_it(options: dict[str, bool]) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.randint(40, (2, 7))
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, parameters)
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, **options)
    with Counting() as counting:
        loss = model(input_ids=ids, labels=ids).loss
        in_forward = counting.attentions
        found = torch.autograd.grad(loss, parameters)
    assert same(found, expected)
    assert (in_forward, counting.attentions) == (3, 3 if options.get("selective") else 6)
