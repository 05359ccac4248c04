"""One adapted linear layer: h, dx, dA and dB, over the frozen layer's h and dx."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.card.cases import Case
from benchmarks.card.linear_ops import widened
from benchmarks.card.peers import lora_formula, peft_leaves, peft_linears
from benchmarks.card.timing import Results, Variant, both_ways
from benchmarks.cpu import floors
from benchmarks.cpu.session import Session, product_limit, run_case
from lora import Projection, fast

SIZES, TOKENS, R = ((576, 1536), (2048, 2048)), 1024, 16
TINY_SIZES, TINY_TOKENS = ((32, 48),), 24
SCALING = 2.0


def run(session: Session) -> None:
    """Every size."""
    tokens, sizes = (TINY_TOKENS, TINY_SIZES) if session.dry else (TOKENS, SIZES)
    for fan_in, fan_out in sizes:
        run_case(session, "linear", lora_linear(tokens, fan_in, fan_out))


def lora_linear(tokens: int, fan_in: int, fan_out: int, r: int = R) -> Case:
    """Random numbers, the update about as large as the frozen product."""
    torch.manual_seed(0)
    x, dy = torch.randn(tokens, fan_in, requires_grad=True), torch.randn(tokens, fan_out)
    W = torch.randn(fan_out, fan_in) * fan_in**-0.5
    A = (torch.randn(r, fan_in) * fan_in**-0.5).requires_grad_()
    B = (torch.randn(fan_out, r) * r**-0.5 / SCALING).requires_grad_()

    def formula(*leaves: torch.Tensor) -> Results:
        return both_ways(
            lambda x, A, B: lora_formula(x, A, B, W.to(x.dtype), SCALING), leaves, (), [dy.to(leaves[0].dtype)]
        )

    variants = {
        "ours": Variant(lambda: both_ways(lambda x, A, B: fast.lora_linear(x, Projection(W, None, A, B, SCALING)), [x, A, B], (), [dy])),
        "frozen": Variant(lambda: both_ways(F.linear, [x], [W], [dy]), compare=False),
    }  # fmt: skip
    absent = {}
    holder = peft_linears({"proj": W}, {"proj": (A, B)}, SCALING, 0.0, torch.float32)
    if isinstance(holder, str):
        absent["peft"] = holder
    else:
        leaves = [x, *peft_leaves(holder, ("proj",))]
        variants["peft"] = Variant(lambda: both_ways(lambda x, *_: holder.proj(x), leaves, (), [dy]))
    floor = floors.linear_floor(tokens, fan_in, fan_out, r)
    variants["floor"] = Variant(floor.run, compare=False, note="products alone")
    truth = lambda: formula(*widened([x, A, B]))  # noqa: E731
    return Case(
        "lora_linear", tokens, f"{fan_in} -> {fan_out}", variants, truth, ("h", "dx", "dA", "dB"), floor.bytes, floor.flops,
        torch.float32, absent, limit=product_limit(max(tokens, fan_in, fan_out)),
    )  # fmt: skip
