"""NF4 decoded to float32, beside bitsandbytes' CPU kernel: the very bits, then the time."""

from __future__ import annotations

import torch

from benchmarks.card.cases import Case
from benchmarks.card.checks import differing_share
from benchmarks.card.peers import peer
from benchmarks.card.timing import Results, Variant
from benchmarks.cpu.session import Session, run_case
from lora import fast, reference
from lora.reference.nf4 import nf4_bytes

SIZES, TINY_SIZES = ((1536, 576), (2048, 2048)), ((48, 64),)  # [out, in]


def run(session: Session) -> None:
    """Every size."""
    for shape in TINY_SIZES if session.dry else SIZES:
        run_case(session, "nf4", dequantise(*shape))


def dequantise(fan_out: int, fan_in: int) -> Case:
    """Blocks of 64, absmax quantised too. The truth is the reference's decoding, and not one bit may differ."""
    torch.manual_seed(0)
    weight = torch.randn(fan_out, fan_in) * fan_in**-0.5
    quantised = reference.nf4_quantize(weight)
    room = torch.empty_like(weight)
    absent = {}

    def fill() -> Results:
        room.fill_(1.0)
        return ()

    variants = {"ours": Variant(lambda: (fast.nf4_dequantize(quantised),))}
    functional = peer("bitsandbytes.functional")
    if isinstance(functional, str):
        absent["bitsandbytes"] = functional
    else:
        codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        variants["bitsandbytes"] = Variant(lambda: (functional.dequantize_4bit(codes, state, quant_type="nf4"),))
    variants["floor"] = Variant(fill, compare=False, note="the result's memory filled, nothing read")
    moved = nf4_bytes(quantised) + weight.nbytes
    return Case(
        "nf4_dequantize", 0, f"{fan_out} x {fan_in}", variants, lambda: (reference.nf4_dequantize(quantised),), ("w'",),
        moved, 0, torch.float32, absent, error=differing_share, limit=0.0,
    )  # fmt: skip
