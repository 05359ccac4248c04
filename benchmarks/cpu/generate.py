"""Greedy generation: the base, an adapter merged into it, and a batch whose rows all have another adapter.

The gate compares the logits of the prompts: merged against PEFT's merged, and each row of the mixed batch against its
adapter alone, both against float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lora
from benchmarks.card.timing import Variant
from benchmarks.cpu import models
from benchmarks.cpu.session import Results, Session, Trial, run_trial, verdict
from benchmarks.cpu.step import in_float64
from lora.layers import adapter_layers

ROWS, PROMPT, NEW = 8, 64, 32
TINY_ROWS, TINY_PROMPT, TINY_NEW = 3, 8, 3


def run(session: Session) -> None:
    """One prompt merged, then many adapters."""
    rows, prompt, new = (TINY_ROWS, TINY_PROMPT, TINY_NEW) if session.dry else (ROWS, PROMPT, NEW)
    run_trial(session, merged_trial(session.dry, prompt, new))
    run_trial(session, mixed_trial(session.dry, rows, prompt, new))


def merged_trial(dry: bool, prompt: int, new: int) -> Trial:
    """Merged, the model has the base's shapes, so it should take the base's time."""
    base = models.base(dry).eval()
    ids = models.token_ids(base, 1, prompt)
    mine = lora.merge_and_eject(models.adapted(models.base(dry), ["default"])).eval()
    other = models.theirs(models.base(dry)).eval()

    def gate() -> str:
        wide = in_float64(copy.deepcopy(other))
        found, truth = logits(mine, ids), logits(wide, ids)
        return verdict(found, logits(other.merge_and_unload(), ids), truth, "PEFT merged")

    variants = {"ours": generating(mine, ids, new), "base": generating(base, ids, new)}
    return finished("generate, merged", variants, gate, base, ids, new)


def mixed_trial(dry: bool, rows: int, prompt: int, new: int) -> Trial:
    """Every row its own adapter, through `multi_lora_linear`."""
    base = models.base(dry).eval()
    ids = models.token_ids(base, rows, prompt)
    mine = models.adapted(models.base(dry), [f"a{row}" for row in range(rows)]).eval()

    def gate() -> str:
        wide = in_float64(copy.deepcopy(mine))
        alone = [each_alone(model, ids) for model in (mine, wide)]
        serve_mixed(mine, rows)
        return verdict(logits(mine, ids), alone[0], alone[1], "alone")

    variants = {"ours": generating(mine, ids, new), "base": generating(base, ids, new)}
    return finished("generate, an adapter a row", variants, gate, base, ids, new)


def finished(
    name: str, variants: dict[str, Variant], gate: Callable[[], str], base: Any, ids: Tensor, new: int
) -> Trial:
    """With the floor: every matrix of the base once a token, its memory read each time."""
    rows, prompt = ids.shape
    weights = [base.get_submodule(path).weight for path in models.frozen_linears(base)] + [base.lm_head.weight]
    variants["floor"] = Variant(lambda: products(weights, rows, prompt, new), note="products alone")
    moved = new * sum(weight.nbytes for weight in weights)
    return Trial("generate", name, variants, gate, rows * new, f"{rows} x ({prompt} + {new})", moved)


@torch.no_grad()
def products(weights: Sequence[Tensor], rows: int, prompt: int, new: int) -> tuple[()]:
    """The prompt's products (the head sees its last token only), then each further token's."""
    for step in range(new):
        for weight in weights:
            tokens = rows * (prompt if step == 0 and weight is not weights[-1] else 1)
            F.linear(torch.ones(tokens, weight.shape[1]), weight)
    return ()


def generating(model: Any, ids: Tensor, new: int) -> Variant:
    """Exactly `new` tokens, the likeliest each time."""

    def run() -> tuple[Tensor]:
        with torch.no_grad():
            return (model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0),)  # fmt: skip

    return Variant(run)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Results:
    """Each row's, under its number."""
    return dict(zip(map("row {}".format, range(len(ids))), model(ids).logits, strict=True))


@torch.no_grad()
def each_alone(model: Any, ids: Tensor) -> Results:
    """Each row through its own adapter, the only active one."""
    found = {}
    for row in range(len(ids)):
        lora.set_adapter(model, f"a{row}")
        found[f"row {row}"] = model(ids[row : row + 1]).logits[0]
    return found


def serve_mixed(model: Any, count: int) -> None:
    """From now on row i of a batch goes through adapter i: each layer's forward is one `multi_lora_linear`."""
    index = torch.arange(count)
    for _, layer in adapter_layers(model):
        pairs = [layer.plain_pair(f"a{number}") for number in range(count)]
        A, B = (torch.stack([pair[side].detach() for pair in pairs]) for side in (0, 1))
        scaling = torch.tensor([layer.scaling[f"a{number}"] for number in range(count)])
        base = layer.base_projection()
        layer.forward = partial(lora.ops.multi_lora_linear, base=base, lora_A=A, lora_B=B, scaling=scaling, index=index)
