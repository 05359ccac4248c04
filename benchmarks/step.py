"""One training step of the demo's model on this machine: PEFT, the reference and the fast backend in turn.

    python benchmarks/step.py [--sequences 2] [--length 512] [--dropout 0.1] [--rounds 5]

Forward, loss, backward and AdamW, r = 16 on all seven projections, float32, random tokens. Without dropout the three first
losses must agree before anything is timed. Medians of the rounds; what counts is the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn

import lora

MODEL = "smollm2-135m-instruct"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
AGREEMENT = 1e-4  # of the first losses, relative: thirty layers of float32


def main() -> None:
    """Prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    ids = torch.randint(0, 49152, (given.sequences, given.length), generator=torch.Generator().manual_seed(1))
    steps = {name: stepper(name, ids, given.dropout) for name in ("peft", "reference", "fast")}
    losses = {name: step() for name, step in steps.items()}
    if not given.dropout and max(losses.values()) - min(losses.values()) > AGREEMENT * min(losses.values()):
        raise SystemExit(f"the first losses disagree, so nothing is timed: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(given.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        print(
            f"{name:10} {median:6.2f} s ({low:.2f} to {high:.2f})  fast is {median / medians['fast']:.2f} times as fast"
        )


def stepper(name: str, ids: Tensor, dropout: float) -> Callable[[], float]:
    """A training step of a model of its own."""
    torch.manual_seed(0)
    model, _ = lora.load(MODEL)
    if name == "peft":
        options = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules=PROJECTIONS)
        model = peft.get_peft_model(model, options).train()
        return step_of(model, [p for p in model.parameters() if p.requires_grad], ids)
    with lora.use_backend(name):
        lora.for_training(lora.inject(model, lora.LoRAConfig(r=16, lora_alpha=32, lora_dropout=dropout)))
    inner = step_of(model, lora.trainable_parameters(model), ids)

    def step() -> float:
        with lora.use_backend(name):
            return inner()

    return step


def step_of(model: nn.Module, parameters: list[nn.Parameter], ids: Tensor) -> Callable[[], float]:
    """Forward, loss, backward, AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


if __name__ == "__main__":
    main()
