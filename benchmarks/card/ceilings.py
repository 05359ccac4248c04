"""The two ceilings of a card: bytes copied a second, and bf16 products of random numbers."""

from __future__ import annotations

import torch

from benchmarks.card.cases import Case, Job, Session, run_jobs
from benchmarks.card.checks import differing_share
from benchmarks.card.timing import Results, Variant

SLICE = 64  # rows of a product that are compared


def run(session: Session) -> None:
    """Measures both; floors of later cases rest on them."""
    run_jobs(session, "ceilings", jobs(session), timed=True)
    session.read_ceilings()


def jobs(session: Session) -> list[Job]:
    """The copy, and the products."""
    sizes = session.shapes.gemm
    products: list[Job] = [(f"gemm {size}", lambda size=size: gemm(session, *size)) for size in sizes]  # type: ignore[misc]
    return [("copy", lambda: copy(session)), *products]


def copy(session: Session) -> Case:
    """out = x; bytes read and written."""
    x = torch.randn(session.shapes.copy_bytes // 2, device=session.device, dtype=torch.bfloat16)
    out = torch.empty_like(x)

    def run() -> Results:
        out.copy_(x)
        return (out,)

    shape = f"{x.nbytes:,} bytes"
    return Case("copy", 0, shape, {"torch": Variant(run)}, lambda: (x,), ("out",), 2 * x.nbytes, error=differing_share)


def gemm(session: Session, tokens: int, fan_in: int, fan_out: int) -> Case:
    """x Wᵀ of normal random numbers: zeros would be faster, because they take less power."""
    x = torch.randn(tokens, fan_in, device=session.device, dtype=torch.bfloat16)
    W = torch.randn(fan_out, fan_in, device=session.device, dtype=torch.bfloat16)
    out = x.new_empty(tokens, fan_out)

    def run() -> Results:
        torch.mm(x, W.T, out=out)
        return (out[-SLICE:],)

    moved = 2 * (x.numel() + W.numel() + out.numel())
    flops = 2 * tokens * fan_in * fan_out
    truth = lambda: (x[-SLICE:].double() @ W.double().T,)  # noqa: E731
    return Case("gemm", tokens, f"{fan_in} -> {fan_out}", {"torch": Variant(run)}, truth, ("out",), moved, flops)
