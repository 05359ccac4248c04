"""What the fast operations launch is what is compiled here: types, strides of 1, alignment, and compile-time choices.

Every operation runs forward and backward at Llama-3.1-8B's sizes on tensors without memory, as it would on a GPU; its
launches are recorded, specialised as Triton would, and looked for among the kernels' `compile_specs`.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora.fast as fast
from lora.fast import library
from lora.fast.kernels import (
    activation,
    add_product,
    cross_entropy,
    dora,
    dropout,
    gemm,
    multi_lora,
    nf4,
    norm,
    norm_kernels,
    rope,
)
from lora.fast.kernels.compile_check import KernelSpec, _specialised, launches_of
from lora.fast.kernels.traffic import COUNTS
from lora.projection import Dropout, NF4Weight, Projection

MODULES = (activation, add_product, cross_entropy, dora, dropout, gemm, multi_lora, nf4, norm, rope)
KERNELS = {name: getattr(m, name) for name in COUNTS for m in (*MODULES, norm_kernels) if hasattr(m, name)}
TOKENS, FEATURES, HIDDEN, KEYS, VOCABULARY = 8192, 4096, 14336, 1024, 128256
BF16, FP32, NF4 = torch.bfloat16, torch.float32, torch.uint8


def kind_of(spec: KernelSpec) -> tuple[Any, ...]:
    """What Triton keys a compiled kernel by."""
    constants = sorted((name, str(value)) for name, value in spec.constexprs.items())
    schedule = (spec.num_warps, spec.num_stages, spec.fp_fusion)
    return spec.fn, *sorted(spec.signature.items()), *constants, spec.divisible, *schedule


COMPILED = {kind_of(spec): spec.name for module in MODULES for spec in module.compile_specs()}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for tensors on no device too."""
    for found in pkgutil.iter_modules(fast.__path__):
        module = importlib.import_module(f"lora.fast.{found.name}")
        if hasattr(module, "runs_triton"):
            monkeypatch.setattr(module, "runs_triton", lambda _: True)


def empty(*shape: int, dtype: torch.dtype = BF16, trains: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=trains)


def layer(
    out: int, fan_in: int, r: int = 16, *, dora: bool = False, weight: torch.dtype = BF16, adapters: torch.dtype = BF16
) -> Projection:
    """r = 0 is a projection without an adapter; a weight of uint8 is NF4."""
    matrix: Any = empty(out, fan_in) if weight == BF16 else nf4_weight(out, fan_in)
    if not r:
        return Projection(matrix)
    A, B = empty(r, fan_in, dtype=adapters, trains=True), empty(out, r, dtype=adapters, trains=True)
    return Projection(matrix, None, A, B, 2.0, empty(out, dtype=adapters, trains=True) if dora else None)


def nf4_weight(out: int, fan_in: int) -> NF4Weight:
    codes, absmax = empty(out * fan_in // 2, dtype=NF4), empty(out * fan_in // 64, dtype=NF4)
    nested = empty(len(absmax) // 256, dtype=FP32), empty(dtype=FP32)
    return NF4Weight(codes, absmax, (out, fan_in), BF16, 64, *nested, 256)


def mlp(gate: int = 16, up: int = 16, down: int = 16, drop: float = 0.0, **options: Any) -> Callable[[], Any]:
    layers = (layer(HIDDEN, FEATURES, gate, **options), layer(HIDDEN, FEATURES, up, **options))
    parts = (*layers, layer(FEATURES, HIDDEN, down, **options))
    mask = Dropout(drop, 7) if drop else None
    return lambda: fast.lora_mlp(empty(1, TOKENS, FEATURES, trains=True), *parts, activation="silu", dropout=mask)


def qkv(drop: float = 0.0, **options: Any) -> Callable[[], Any]:
    parts = [layer(out, FEATURES, **options) for out in (FEATURES, KEYS, KEYS)]
    mask = Dropout(drop, 7) if drop else None
    return lambda: fast.lora_qkv(empty(1, TOKENS, FEATURES, trains=True), *parts, dropout=mask)


def rms_norm(residual: bool = False, trains: bool = False, shape: tuple[int, ...] = (FEATURES,)) -> Callable[[], Any]:
    def call() -> Any:
        x, added = (empty(1, TOKENS, *shape, trains=True) for _ in range(2))
        return fast.rms_norm(x, empty(shape[-1], trains=trains), eps=1e-5, residual=added if residual else None)

    return call


def heads(fused: bool) -> tuple[Tensor, Tensor]:
    """q and k [1, heads, tokens, 128] as models make them, of one buffer or of one each."""
    if fused:
        q, k = empty(1, TOKENS, FEATURES + 2 * KEYS, trains=True)[..., : FEATURES + KEYS].split([FEATURES, KEYS], 2)
    else:
        q, k = empty(1, TOKENS, FEATURES, trains=True), empty(1, TOKENS, KEYS, trains=True)
    return q.unflatten(2, (-1, 128)).transpose(1, 2), k.unflatten(2, (-1, 128)).transpose(1, 2)


def rotation(fused: bool = False) -> Callable[[], Any]:
    return lambda: fast.rope(*heads(fused), empty(1, TOKENS, 128), empty(1, TOKENS, 128))


def losses(wants: bool) -> Callable[[], Any]:
    """A chunk of logits, as `linear_cross_entropy` makes them: it looks at labels, which are not there."""
    from lora.fast.loss import Settings, row_losses_

    settings = Settings("mean", -100, None, 1.0, 0.0)
    return lambda: row_losses_(empty(1024, VOCABULARY), empty(1024, dtype=torch.int64), settings, 0.5, wants)


def many_adapters() -> Any:
    """The launches of `multi_lora_linear` and its backward, which look at the adapters' numbers too."""
    groups = multi_lora.group_tokens(empty(TOKENS, dtype=torch.int64), 8)
    x, A, B = empty(TOKENS, FEATURES), empty(8, 16, FEATURES), empty(8, FEATURES, 16)
    u = multi_lora.multi_lora_shrink(x, A, empty(8, dtype=FP32), groups)
    multi_lora.multi_lora_expand_(x, u, B, groups)
    multi_lora.multi_lora_A_gradient(u, x, groups)
    return multi_lora.multi_lora_B_gradient(x, u, groups)


OPERATIONS: dict[str, Callable[[], Any]] = {
    "mlp": mlp(),
    "mlp of r 8": mlp(8, 8, 8),
    "mlp of r 64": mlp(64, 64, 64),
    "mlp, float32 adapters": mlp(adapters=FP32),
    "mlp, NF4": mlp(weight=NF4),
    "mlp with dropout": mlp(drop=0.1),
    "mlp, DoRA": mlp(dora=True),
    "mlp, gate and up": mlp(down=0),
    "mlp, down": mlp(0, 0),
    "mlp, frozen": mlp(0, 0, 0),
    "qkv with dropout": qkv(drop=0.1),
    "qkv, DoRA on NF4": qkv(dora=True, weight=NF4),
    "norm": rms_norm(),
    "norm and residual": rms_norm(residual=True),
    "norm, trained": rms_norm(trains=True),
    "norm and residual, trained": rms_norm(residual=True, trains=True),
    "q_norm": rms_norm(shape=(32, 128)),
    "q_norm, trained": rms_norm(shape=(32, 128), trains=True),
    "rope": rotation(),
    "rope of a fused buffer": rotation(fused=True),
    "loss": losses(wants=False),
    "loss and gradient": losses(wants=True),
    "many adapters": many_adapters,
    "mask": lambda: library.keep_mask((TOKENS, FEATURES), 0.1, 7, 0, torch.device("meta")),
}


def there_and_back(operation: Callable[[], Any]) -> None:
    made = operation()
    outputs = [y for y in (made if isinstance(made, tuple) else (made,)) if y.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


def launched(operation: Callable[[], Any]) -> Iterator[KernelSpec]:
    for launch in launches_of(lambda: there_and_back(operation), *KERNELS.values()):
        yield _specialised(launch.kernel, KERNELS[launch.kernel], dict(launch.arguments), {})


def test_every_kernel_of_the_package_is_compiled_and_none_is_autotuned() -> None:
    """A kernel is what the package decorates with `triton.jit` and launches: its name ends in "_kernel".

    Its tile follows from sizes and the GPU alone, so that two runs launch the same.
    """
    package = Path(activation.__file__).parent
    trees = [ast.parse(path.read_text()) for path in sorted(package.glob("*.py"))]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    decorated = {f.name: [ast.unparse(one) for one in f.decorator_list] for f in functions}
    jitted = {name for name, found in decorated.items() if any(one.startswith("triton.jit") for one in found)}
    assert {name for name in jitted if name.endswith("_kernel")} == {kind[0].fn.__name__ for kind in COMPILED}
    assert not [name for name, found in decorated.items() if any("tune" in one or "heuristics" in one for one in found)]


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_what_is_launched_is_compiled(name: str) -> None:
    specs = list(launched(OPERATIONS[name]))
    assert specs
    unknown = [(spec.name, spec.signature, spec.constexprs, spec.divisible) for spec in specs]
    unknown = [one for one, spec in zip(unknown, specs, strict=True) if kind_of(spec) not in COMPILED]
    assert not unknown, unknown


def test_a_stride_that_is_not_compiled_is_seen() -> None:
    """A's of another order, as if the adapter lay transposed: r is then side by side, and 1 is compiled in."""
    down = layer(FEATURES, HIDDEN)._replace(lora_A=empty(HIDDEN, 16, trains=True).T)
    parts = layer(HIDDEN, FEATURES), layer(HIDDEN, FEATURES), down
    x = empty(1, TOKENS, FEATURES, trains=True)
    specs = list(launched(lambda: fast.lora_mlp(x, *parts, activation="silu")))
    assert [kind_of(spec) in COMPILED for spec in specs] == [True, False]
