"""The floor of a step: its matrix products alone, each the faster of two ways, and the bytes they must move.

A frozen [out, in] matrix takes part in the forward and in dx; an adapter in six thin products. The first block's q, k, v
need no dx: nothing before them trains. The head sees the rows that have a label. Attention is torch's fused kernel, forward
and backward. A product's bytes are its operands read and its result written, once.
"""

from __future__ import annotations

import functools
import timeit
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cpu.models import R, frozen_linears
from lora.fast.products import product

FLOAT = 4  # bytes
TRIALS = 4  # of each way to multiply


class Product(NamedTuple):
    """[m, k] · [k, n]; `transposed` names the operand that lies the other way in memory: "", "left" or "right"."""

    m: int
    k: int
    n: int
    transposed: str = ""


class Floor(NamedTuple):
    """What runs, and what it moves and computes."""

    run: Callable[[], tuple[()]]
    bytes: int
    flops: int


def frozen_products(tokens: int, fan_in: int, fan_out: int, dx: bool = True) -> Counter[Product]:
    """x Wᵀ and dy W."""
    forward = Counter({Product(tokens, fan_in, fan_out, "right"): 1})
    return forward + Counter({Product(tokens, fan_out, fan_in): int(dx)})


def adapter_products(tokens: int, fan_in: int, fan_out: int, r: int, dx: bool = True) -> Counter[Product]:
    """u = x Aᵀ, u Bᵀ, du = dy B, du A, dA = duᵀ x, dB = dyᵀ u."""
    found = [
        Product(tokens, fan_in, r, "right"), Product(tokens, r, fan_out, "right"), Product(tokens, fan_out, r),
        *([Product(tokens, r, fan_in)] if dx else []), Product(r, tokens, fan_in, "left"), Product(fan_out, tokens, r, "left"),
    ]  # fmt: skip
    return Counter(found)


def linear_floor(tokens: int, fan_in: int, fan_out: int, r: int) -> Floor:
    """One adapted layer, forward and backward."""
    return floor_of(frozen_products(tokens, fan_in, fan_out) + adapter_products(tokens, fan_in, fan_out, r))


def step_floor(model: Any, sequences: int, length: int, labelled: float = 1.0, r: int = R) -> Floor:
    """A whole training step of a plain model."""
    config, tokens = model.config, sequences * length
    products: Counter[Product] = Counter()
    for path, sizes in frozen_linears(model).items():
        dx = not path.startswith("model.layers.0.self_attn.") or path.endswith("o_proj")
        products += frozen_products(tokens, *sizes, dx) + adapter_products(tokens, *sizes, r, dx)
    products += frozen_products(int(tokens * labelled), config.hidden_size, config.vocab_size)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    floor, head_size = floor_of(products), config.hidden_size // heads
    q, k, v = (torch.randn(sequences, heads, length, head_size, requires_grad=True) for _ in range(3))

    def run() -> tuple[()]:
        floor.run()
        for _ in range(layers):
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(h, (q, k, v), h.detach())
        return ()

    attention = layers * 12 * q.numel() * FLOAT  # q, k, v, h, and again with their gradients
    return Floor(run, floor.bytes + attention, floor.flops + 6 * layers * sequences * length**2 * config.hidden_size)


def floor_of(products: Counter[Product]) -> Floor:
    """Each product as often as it is needed; what runs is prepared when it first runs."""

    @functools.cache
    def prepared() -> list[tuple[Callable[[], object], int]]:
        return [(fastest(*operands(each)), count) for each, count in products.items()]

    def run() -> tuple[()]:
        for multiply, count in prepared():
            for _ in range(count):
                multiply()
        return ()

    moved = sum(count * FLOAT * (p.m * p.k + p.k * p.n + p.m * p.n) for p, count in products.items())
    return Floor(run, moved, sum(count * 2 * p.m * p.k * p.n for p, count in products.items()))


def fastest(left: Tensor, right: Tensor, out: Tensor) -> Callable[[], object]:
    """The way to multiply that takes the least time of a few: PyTorch's, into a buffer that is there, or ours."""
    ways: list[Callable[[], object]] = [partial(torch.mm, left, right, out=out), partial(product, left, right)]
    return min(ways, key=lambda multiply: min(timeit.repeat(multiply, number=1, repeat=TRIALS)))


def operands(product: Product) -> tuple[Tensor, Tensor, Tensor]:
    """Random, as the step has them: a transposed one is a view."""
    m, k, n, transposed = product
    left = torch.randn(k, m).T if transposed == "left" else torch.randn(m, k)
    right = torch.randn(n, k).T if transposed == "right" else torch.randn(k, n)
    return left, right, torch.empty(m, n)
