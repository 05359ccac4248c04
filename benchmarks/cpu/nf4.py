"""NF4 decoded to float32, beside bitsandbytes' CPU kernel: the very bits, then the time."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.card.cases import Case
from benchmarks.card.checks import differing_share
from benchmarks.card.peers import peer
from benchmarks.card.timing import Results, Variant
from benchmarks.cpu.session import Session, run_case
from lora import fast, reference
from lora.nf4_format import DYNAMIC_CODES, NF4_CODES
from lora.projection import NF4Weight
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
        state = their_state(functional, quantised)
        codes = quantised.codes.reshape(-1, 1)
        variants["bitsandbytes"] = Variant(lambda: (functional.dequantize_4bit(codes, state, quant_type="nf4"),))
    variants["floor"] = Variant(fill, compare=False, note="the result's memory filled, nothing read")
    moved = nf4_bytes(quantised) + weight.nbytes
    return Case(
        "nf4_dequantize", 0, f"{fan_out} x {fan_in}", variants, lambda: (reference.nf4_dequantize(quantised),), ("w'",),
        moved, 0, torch.float32, absent, error=differing_share, limit=0.0,
    )  # fmt: skip


def their_state(functional: Any, quantised: NF4Weight) -> Any:
    """Our codes as bitsandbytes describes them, so that both decode the same ones."""
    state = functional.QuantState(
        absmax=quantised.absmax, shape=torch.Size(quantised.shape), code=NF4_CODES, blocksize=quantised.block_size,
        quant_type="nf4", dtype=torch.float32,
    )  # fmt: skip
    state.offset, state.nested = quantised.nested_offset, True
    state.state2 = functional.QuantState(
        absmax=quantised.nested_absmax, code=DYNAMIC_CODES, blocksize=quantised.nested_block_size, dtype=torch.float32
    )
    return state
