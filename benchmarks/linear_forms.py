"""Measures the ways to compute one LoRA linear layer's products, side by side: what decision 5 rests on.

    python benchmarks/linear_forms.py [--device cuda] [--dtype bfloat16] [--tokens 8192] [--r 16] [--rounds 40]
                                      [--dropout 0.1]

Each form is first compared with the float64 result, then all are timed in turn, round after round, so that what else
the machine does falls on all of them alike. A cell is the median time over that of the frozen product alone; for the
thin products (which have no frozen counterpart) over torch's form. With --dropout the products that dropout goes into,
on a GPU: D(x) written and then multiplied, beside the kernel that makes the mask where it multiplies.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lora.fast.dropout import add_dropped_, apply_dropout
from lora.projection import Dropout

SHAPES = {  # in -> out: Llama-3.1-8B's on a GPU, small models' on a CPU
    "cuda": ((4096, 4096), (4096, 6144), (4096, 14336), (4096, 28672), (14336, 4096)),
    "cpu": ((576, 576), (576, 1536), (1536, 576), (2048, 2048)),
}
SLEEP_CYCLES = 2_000_000  # about a millisecond
Forms = dict[str, Callable[[], Tensor]]
Case = tuple[Callable[[], Tensor], Forms]  # the float64 result, and the forms


def main() -> None:
    """Prints one table for each product."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--dropout", type=float, default=0.0)
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype or ("bfloat16" if given.device == "cuda" else "float32"))
    for tokens in given.tokens:
        for fan_in, fan_out in SHAPES[given.device]:
            print(f"\n{tokens} tokens, {fan_in} -> {fan_out}, r {given.r}, {dtype}")
            operands = Operands.draw(tokens, fan_in, fan_out, given.r, dtype, given.device)
            made = dropped_cases(operands, Dropout(given.dropout, 1)) if given.dropout else cases(operands)
            for title, (truth, forms) in made.items():
                errors, times = check(truth(), forms), measure(forms, given.rounds, given.device)
                base = next(iter(times.values()))
                cells = (f"{name} {times[name] / base:.3f} (error {errors[name]:.0e})" for name in times)
                print(f"  {title:9} {base * 1e6:8.1f} us: {'  '.join(cells)}")


class Operands(NamedTuple):
    """One layer's tensors."""

    x: Tensor  # [tokens, in]
    dy: Tensor  # [tokens, out]
    W: Tensor  # [out, in]
    A: Tensor  # [r, in]
    B: Tensor  # [out, r]

    @classmethod
    def draw(cls, tokens: int, fan_in: int, fan_out: int, r: int, dtype: torch.dtype, device: str) -> Operands:
        """Random ones; rows of W and of A have about norm 1."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(dtype)

        x, dy = normal(tokens, fan_in), normal(tokens, fan_out)
        return cls(x, dy, normal(fan_out, fan_in, scale=fan_in**-0.5), normal(r, fan_in, scale=fan_in**-0.5),
                   normal(fan_out, r))  # fmt: skip


def dropped_cases(operands: Operands, dropout: Dropout) -> dict[str, Case]:
    """The products that dropout goes into, on a GPU: in two passes, and in one."""
    from lora.fast.kernels import gemm
    from lora.fast.kernels.add_product import dropout_add_product

    x, dy, W, A, B = operands
    du = dy @ B
    D64 = lambda t: apply_dropout(torch.ones_like(t, dtype=torch.float32), dropout).double() * t  # noqa: E731
    x64, dy64, du64 = x.double(), dy.double(), du.double()
    u: Forms = {
        "two passes": lambda: apply_dropout(x, dropout) @ A.T,
        "kernel": lambda: gemm.skinny_gemm(x, A, dropout),
    }
    dA: Forms = {
        "two passes": lambda: du.T @ apply_dropout(x, dropout),
        "kernel": lambda: gemm.lora_A_gradient(du, x, dropout, dtype=x.dtype),
    }
    dx: Forms = {
        "frozen alone": lambda: dy @ W,
        "three passes": lambda: add_dropped_(dy @ W, du @ A, dropout),
        "two passes": lambda: dropout_add_product(dy @ W, du, A, *dropout),
        "one kernel": lambda: gemm.lora_gemm_dx(dy, W, du, A, dropout),
    }
    return {
        "u": (lambda: D64(x64) @ A.double().T, u),
        "dA": (lambda: du64.T @ D64(x64), dA),
        "dx": (lambda: dy64 @ W.double() + D64(du64 @ A.double()), dx),
    }


def cases(operands: Operands) -> dict[str, Case]:
    """The products of one layer, each in its forms; the first form of each is what the others are divided by."""
    x, dy, W, A, B = operands
    u, du, device, dtype = x @ A.T, dy @ B, x.device.type, x.dtype
    wide_W, wide_x = torch.cat([W, B], dim=1), torch.cat([x, u], dim=1)  # bordered, its operand given
    room = torch.empty_like(wide_x)
    tall_W, wide_dy = torch.cat([W, A]), torch.cat([dy, du], dim=1)
    forward: Forms = {
        "frozen alone": lambda: x @ W.T,
        "add_": lambda: (x @ W.T).add_(u @ B.T),
        "addmm_": lambda: (x @ W.T).addmm_(u, B.T),
        "bordered": lambda: wide_x @ wide_W.T,
        "bordered, x copied": lambda: copied(room, x, u) @ wide_W.T,
    }
    backward: Forms = {
        "frozen alone": lambda: dy @ W,
        "add_": lambda: (dy @ W).add_(du @ A),
        "addmm_": lambda: (dy @ W).addmm_(du, A),
        "bordered": lambda: wide_dy @ tall_W,
    }
    thin: Forms = {"torch": lambda: x @ A.T}
    back: Forms = {"torch": lambda: dy @ B}
    dA: Forms = {"torch": lambda: du.T @ x}
    dB: Forms = {"torch": lambda: dy.T @ u}
    if device == "cuda":
        from lora.fast.kernels import gemm

        forward["kernel"] = lambda: gemm.lora_gemm(x, W, u, B)
        backward["kernel"] = lambda: gemm.lora_gemm_dx(dy, W, du, A)
        thin["kernel"] = lambda: gemm.skinny_gemm(x, A)
        back["kernel"] = lambda: gemm.skinny_gemm(dy, B.T)
        dA["kernel"] = lambda: gemm.lora_A_gradient(du, x, dtype=dtype)
        dB["kernel"] = lambda: gemm.lora_B_gradient(dy, u, dtype=dtype)
    x64, dy64, u64, du64 = x.double(), dy.double(), u.double(), du.double()
    return {
        "h": (lambda: (x64 @ W.double().T).addmm_(u64, B.double().T), forward),
        "dx": (lambda: (dy64 @ W.double()).addmm_(du64, A.double()), backward),
        "u": (lambda: x64 @ A.double().T, thin),
        "du": (lambda: dy64 @ B.double(), back),
        "dA": (lambda: du64.T @ x64, dA),
        "dB": (lambda: dy64.T @ u64, dB),
    }


def copied(room: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """The wide operand, written for this product."""
    room[:, : x.shape[1]].copy_(x)
    room[:, x.shape[1] :].copy_(u)
    return room


def check(truth: Tensor, forms: Forms) -> dict[str, float]:
    """How far each form is from the float64 result, relative to its size; "frozen alone" lacks the update."""
    return {name: float((form().double() - truth).norm() / truth.norm()) for name, form in forms.items()}


def measure(forms: Forms, rounds: int, device: str) -> dict[str, float]:
    """The median seconds of each form; on a GPU its own clock's, with the L2 cache overwritten before each run."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    flush = torch.empty(1 << 26, dtype=torch.int8, device=device)
    for warm in (True, *[False] * rounds):
        for name, form in forms.items():
            if device == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                flush.zero_()
                torch.cuda._sleep(SLEEP_CYCLES)  # while the host launches: its time is not the product's
                begin.record()
                form()
                end.record()
                torch.cuda.synchronize()
                seconds = begin.elapsed_time(end) / 1e3
            else:
                start = time.perf_counter()
                form()
                seconds = time.perf_counter() - start
            if not warm:
                times[name].append(seconds)
    return {name: statistics.median(each) for name, each in times.items()}


if __name__ == "__main__":
    main()
