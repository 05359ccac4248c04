"""Training steps: forward, loss, backward and AdamW, without a trainer, beside PEFT's and our reference's.

The gate compares the first loss and the gradient of every A and B. With dropout there is no comparing with PEFT, whose
masks are other ones: ours is held against our reference, whose masks are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lora
from benchmarks.card.peers import peer, rms_norm_formula
from benchmarks.card.timing import Variant
from benchmarks.cpu import floors, models
from benchmarks.cpu.apart import Apart, processes
from benchmarks.cpu.session import Results, Session, Trial, run_trial, verdict_of_batches

IGNORED = -100
GPU_PEERS = {"liger": "liger_kernel", "unsloth": "unsloth", "lorafusion": "lorafusion"}
NEEDS_GPU = "its kernels need a GPU"


@dataclass(frozen=True)
class Kind:
    """One kind of step."""

    name: str
    p: float = 0.0
    labelled: float = 1.0  # the share of labels that are not -100
    nf4: bool = False


KINDS = (Kind("step"), Kind("step, dropout 0.1", p=0.1), Kind("step, 75% ignored", labelled=0.25), Kind("step, NF4", nf4=True))  # fmt: skip
SIZE, TINY_SIZE = (2, 512), (2, 16)
COMPARED = (5, 2, 32)  # batches, sequences and tokens of the gate


def run(session: Session) -> None:
    """Every kind."""
    for kind in KINDS:
        with processes() as apart:
            run_trial(session, trial(session, kind, apart))


def trial(session: Session, kind: Kind, apart: Apart) -> Trial:
    """One kind of step, in every way that there is, each in a process of its own."""
    sequences, length = TINY_SIZE if session.dry else SIZE
    floor = floors.step_floor(models.base(session.dry), sequences, length, kind.labelled)
    variants = {"ours": apart(our_step, session.dry, kind), "peft": apart(peft_step, session.dry, kind)}
    if kind.nf4:
        variants["ours, float32 base"] = apart(our_step, session.dry, replace(kind, nf4=False))
    elif kind.labelled == 1:
        variants["reference"] = apart(reference_step, session.dry, kind)
    if kind == KINDS[0]:
        variants["transformers, no adapters"] = apart(frozen_step, session.dry, kind)
    variants["floor"] = apart(products_alone, session.dry, kind)
    absent = {name: why_absent(module) for name, module in GPU_PEERS.items()} if kind == KINDS[0] else {}
    shape = f"{sequences} x {length}"
    gate = partial(dropout_gate if kind.p else peft_gate_of, session.dry, kind)
    return Trial("step", kind.name, variants, gate, sequences * length, shape, floor.bytes, floor.flops, absent)


def our_step(dry: bool, kind: Kind) -> Variant:
    """Ours, on a base of its own."""
    base = models.quantised_pair(dry)[0] if kind.nf4 else models.base(dry)
    return stepper(models.ours(base, kind.p), *batch(dry, kind, base))


def reference_step(dry: bool, kind: Kind) -> Variant:
    """Our reference's."""
    with lora.use_backend("reference"):
        base = models.base(dry)
        step = stepper(models.ours(base, kind.p), *batch(dry, kind, base))

    def run() -> tuple[Tensor, ...]:
        with lora.use_backend("reference"):
            return step.run()

    return Variant(run)


def peft_step(dry: bool, kind: Kind) -> Variant:
    """PEFT's; on the numbers that NF4 decodes to, in float32, where ours is on NF4."""
    base = models.quantised_pair(dry)[1] if kind.nf4 else models.base(dry)
    return stepper(models.theirs(base, kind.p), *batch(dry, kind, base))


def products_alone(dry: bool, kind: Kind) -> Variant:
    """The floor."""
    sequences, length = TINY_SIZE if dry else SIZE
    return Variant(floors.step_floor(models.base(dry), sequences, length, kind.labelled).run, note="products alone")


def batch(dry: bool, kind: Kind, model: Any) -> tuple[Tensor, Tensor]:
    """Token ids and labels."""
    ids = models.token_ids(model, *(TINY_SIZE if dry else SIZE))
    return ids, with_ignored(ids, kind.labelled)


def why_absent(module: str) -> str:
    """A peer that does not run on a CPU, or is not installed."""
    found = peer(module)
    return found if isinstance(found, str) else NEEDS_GPU


def with_ignored(ids: Tensor, labelled: float) -> Tensor:
    """The labels of the last part of each sequence; the others, a prompt's, are -100."""
    labels = ids.clone()
    labels[:, : round(ids.shape[1] * (1 - labelled))] = IGNORED
    return labels


def stepper(model: Any, ids: Tensor, labels: Tensor) -> Variant:
    """Forward, loss, backward, AdamW."""
    optimizer = torch.optim.AdamW(models.trained(model), lr=1e-5)

    def step() -> tuple[Tensor]:
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return (loss.detach(),)

    return Variant(step)


def frozen_step(dry: bool, kind: Kind) -> Variant:
    """The plain model's forward, loss and backward to its embeddings: no adapters and no optimizer."""
    model = models.base(dry).train()
    ids, labels = batch(dry, kind, model)

    def step() -> tuple[Tensor]:
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=x, labels=labels, use_cache=False).loss
        return torch.autograd.grad(loss, x)  # type: ignore[no-any-return]

    return Variant(step, note="computes less: nothing is trained")


def outputs(model: Any, factors: Callable[[Any], dict[str, Tensor]], ids: Tensor, labels: Tensor) -> Results:
    """The loss, and the gradient of each A and B by its path."""
    if next(model.parameters()).dtype == torch.float64:  # transformers' loss would round the logits to float32
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    else:
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    found = {name: factor.grad for name, factor in factors(model).items() if factor.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **found}


def in_float64(model: Any) -> Any:
    """The model in float64, its norms too, which transformers would compute in float32."""
    for module in model.double().modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = partial(rms_norm_formula, weight=module.weight, eps=module.variance_epsilon)
    return model


def of_batches(model: Any, factors: Callable[[Any], dict[str, Tensor]], labelled: float) -> list[Results]:
    """The outputs for each batch of the gate; dropout's seeds are the same for every model."""
    number, sequences, length = COMPARED
    torch.manual_seed(5)
    found = []
    for seed in range(number):
        ids = models.token_ids(model, sequences, length, seed)
        found.append(outputs(model, factors, ids, with_ignored(ids, labelled)))
    return found


def peft_gate_of(dry: bool, kind: Kind) -> str:
    """Ours and PEFT's, both against PEFT's in float64."""
    quantised, plain = models.quantised_pair(dry) if kind.nf4 else (models.base(dry), models.base(dry))
    return peft_gate(models.ours(quantised), models.theirs(plain), kind.labelled)


def peft_gate(mine: Any, other: Any, labelled: float = 1.0) -> str:
    """The verdict on two models."""
    found = of_batches(mine, models.ours_factors, labelled)
    theirs = of_batches(other, models.peft_factors, labelled)
    truth = of_batches(in_float64(copy.deepcopy(other)), models.peft_factors, labelled)
    return verdict_of_batches(list(zip(found, theirs, truth, strict=True)), "PEFT")


def dropout_gate(dry: bool, kind: Kind) -> str:
    """Ours and our reference, both against the reference in float64, with the same masks."""
    found = of_batches(models.ours(models.base(dry), kind.p), models.ours_factors, kind.labelled)
    with lora.use_backend("reference"):
        model = models.ours(models.base(dry), kind.p)
        theirs = of_batches(model, models.ours_factors, kind.labelled)
        truth = of_batches(in_float64(model), models.ours_factors, kind.labelled)
    return verdict_of_batches(list(zip(found, theirs, truth, strict=True)), "the reference")
