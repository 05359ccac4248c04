"""`inject`: an 8B model on the meta device, and the real small one; beside PEFT's `get_peft_model`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import lora
from benchmarks.card.cases import LLAMA_8B, TINY, Shapes
from benchmarks.card.model import TARGETS
from benchmarks.card.rows import WRONG
from benchmarks.card.timing import Variant
from benchmarks.cpu import models
from benchmarks.cpu.session import Session, Trial, run_trial

FLOAT = 4  # bytes


def run(session: Session) -> None:
    """Both models."""
    shapes = TINY if session.dry else LLAMA_8B
    for name, build in (("inject, 8B, meta", lambda: on_meta(shapes)), ("inject", lambda: models.base(session.dry))):
        run_trial(session, trial(name, build))


def on_meta(s: Shapes) -> Any:
    """A Llama of these sizes without memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(  # type: ignore[call-arg]
        hidden_size=s.hidden, intermediate_size=s.ffn, num_hidden_layers=s.layers, num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads, head_dim=s.head_dim, vocab_size=s.vocab, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def trial(name: str, build: Callable[[], Any]) -> Trial:
    """Each run begins with a model without adapters."""
    import peft

    mine, other = build(), build()
    ours = lora.LoRAConfig(r=models.R, target_modules=list(TARGETS))
    theirs = peft.LoraConfig(r=models.R, target_modules=list(TARGETS))
    injected: list[Any] = []
    held: list[Any] = []

    def inject() -> tuple[()]:
        injected.append(lora.inject(mine, ours))
        return ()

    def eject() -> None:
        while injected:
            lora.eject(injected.pop())

    def inject_peft() -> tuple[()]:
        held.append(peft.get_peft_model(other, theirs))
        return ()

    def eject_peft() -> None:
        while held:
            held.pop().unload()

    def gate() -> str:
        inject()
        inject_peft()
        outcome = same_factors(models.ours_factors(mine), models.peft_factors(held[0]))
        eject_peft()
        eject()
        return outcome

    sizes = list(models.frozen_linears(mine).values())
    device = next(mine.parameters()).device
    variants = {
        "ours": Variant(inject, eject),
        "peft": Variant(inject_peft, eject_peft),
        "floor": Variant(lambda: draw(sizes, device), note="A drawn, B zeroed, nothing else"),
    }
    written = FLOAT * models.R * sum(fan_in + fan_out for fan_in, fan_out in sizes)
    return Trial("inject", name, variants, gate, shape=f"{len(sizes)} layers", floor_bytes=written)


def draw(sizes: list[tuple[int, int]], device: torch.device) -> tuple[()]:
    """The numbers that injection must make."""
    for fan_in, fan_out in sizes:
        nn.init.kaiming_uniform_(torch.empty(models.R, fan_in, device=device), a=5**0.5)
        torch.zeros(fan_out, models.R, device=device)
    return ()


def same_factors(mine: dict[str, Any], other: dict[str, Any]) -> str:
    """The same paths with the same shapes, all of which train."""
    shapes = [{path: tuple(factor.shape) for path, factor in each.items()} for each in (mine, other)]
    odd = sorted(path for path in shapes[0].keys() | shapes[1].keys() if shapes[0].get(path) != shapes[1].get(path))
    if odd:
        return f"{WRONG}: {len(odd)} factors differ from PEFT's in shape, the first {odd[0]}: {shapes[0].get(odd[0])}, {shapes[1].get(odd[0])}"
    frozen = [path for path, factor in mine.items() if not factor.requires_grad]
    return f"{WRONG}: {frozen[0]} does not train" if frozen else f"{len(mine)} factors, paths and shapes as PEFT's"
