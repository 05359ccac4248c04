"""Measures float32 products on a CPU by MKL and by oneDNN, in turn: what decision 10 rests on.

    python benchmarks/products.py [--rounds 40]

GFLOP/s are medians. Errors are root mean squares against float64 over that of the result, in roundings of 2⁻²⁴.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lora.fast.products import onednn_is_there, product

SHAPES = ((1024, 576, 3072), (1024, 1536, 576), (1024, 576, 960), (1024, 2048, 2048), (256, 576, 49152))
TERMS = (64, 576, 1536, 3072)  # of a dot product


def main() -> None:
    """Prints both tables as the page has them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    if not onednn_is_there():
        parser.error("this build of PyTorch has no oneDNN to compare with.")
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    print(
        "| tokens, in, out | MKL, h | oneDNN, h | oneDNN over MKL, time | MKL, dx | oneDNN, dx | time |\n|" + "---|" * 7
    )
    for tokens, fan_in, fan_out in SHAPES:
        x, W, dy = draw(tokens, fan_in), draw(fan_out, fan_in), draw(tokens, fan_out)
        cells = [f"{tokens}, {fan_in}, {fan_out}"]
        for left, right in ((x, W.T), (dy, W)):
            mkl, onednn = times({"mkl": torch.mm, "onednn": product}, left, right, rounds)
            rates = (2e-9 * tokens * fan_in * fan_out / seconds for seconds in (mkl, onednn))
            cells += [*(f"{rate:.0f}" for rate in rates), f"{onednn / mkl:.2f}"]
        print("| " + " | ".join(cells) + " |")
    print("\n| terms | MKL | oneDNN |\n|---|---|---|")
    for terms in TERMS:
        left, right = draw(512, terms), draw(700, terms).T
        print(f"| {terms} | {error(torch.mm, left, right):.1f} | {error(product, left, right):.1f} |")


def times(
    forms: dict[str, Callable[[Tensor, Tensor], Tensor]], left: Tensor, right: Tensor, rounds: int
) -> list[float]:
    """Median seconds of each, round after round; the first two rounds warm up."""
    samples: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 2):
        for name, form in forms.items():
            start = time.perf_counter()
            form(left, right)
            if number >= 2:
                samples[name].append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in samples.values()]


def error(form: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> float:
    """In roundings."""
    exact = left.double() @ right.double()
    return float((form(left, right).double() - exact).norm() / exact.norm()) * 2**24


if __name__ == "__main__":
    main()
