"""The loops people have, on two processes beside one: transformers' Trainer, TRL's trainers, accelerate.

They put DistributedDataParallel around our model themselves. Batch i of a step is process i % 2's.

    python tests/several/loops.py FILE    runs them all, and writes how far the adapters are apart as JSON
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import accelerate
import datasets
import test_their_loops as loops
import torch
import transformers
from several.processes import Processes
from tiny import stir
from torch import Tensor

import lora
from lora.distributed import share_of

SIZE, STEPS = 2, 4
# (name, backend, gradient accumulation): TRL's trainers are slow to set up, so that not all meet all.
CASES = [("trainer", "reference", 1), ("trainer", "fast", 2), ("sft", "fast", 1), ("dpo", "fast", 2)]
CASES += [("accelerate", "reference", 1), ("accelerate", "fast", 1)]


def alone() -> bool:
    return "RANK" not in os.environ


def model_of() -> Any:
    model = loops.base()
    torch.manual_seed(1)
    lora.inject(model, lora.LoRAConfig(**loops.CONFIG))
    stir(model)
    return lora.for_training(model)


def options(accumulation: int) -> dict[str, Any]:
    """A step has eight examples, or four; each of two processes half of them."""
    batch = 4 if alone() else 4 // SIZE
    found: dict[str, Any] = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return found | {"max_steps": STEPS} | ({} if alone() else {"ddp_backend": "gloo"})


def trainer(model: Any, place: Path, accumulation: int) -> None:
    loops.with_trainer(model, place, **options(accumulation))


def sft(model: Any, place: Path, accumulation: int) -> None:
    loops.sft(model, place, **options(accumulation))


def dpo(model: Any, place: Path, accumulation: int) -> None:
    loops.dpo(model, place, lora.without_adapters(model), **options(accumulation))


def with_accelerate(model: Any, place: Path, accumulation: int) -> None:
    """A loop around `accelerator.prepare`: the loss is a mean over the tokens of both processes' batches."""
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in loops.tokens(loops.UNEVEN)]
    collate = transformers.DataCollatorForSeq2Seq(loops.TOKENIZER, padding=True)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=collate)
    counts = [sum(len(row["labels"]) - 1 for row in rows[i : i + 2]) for i in range(0, len(rows), 2)]
    optimizer = torch.optim.SGD(lora.trainable_parameters(model), lr=0.5)
    together = SIZE if alone() else 1  # batches of a step
    if not alone():
        model, optimizer, loader = accelerate.Accelerator(cpu=True).prepare(model, optimizer, loader)
    for number, batch in enumerate(loader):
        step = number // together
        loss = model(**batch, num_items_in_batch=sum(counts[step * SIZE : (step + 1) * SIZE])).loss
        share_of(loss).backward()
        if (number + 1) % together == 0:
            optimizer.step()
            optimizer.zero_grad()


LOOPS: dict[str, Callable[[Any, Path, int], None]] = {
    "trainer": trainer,
    "sft": sft,
    "dpo": dpo,
    "accelerate": with_accelerate,
}


def trained(case: tuple[str, str, int], place: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapter before and after."""
    name, backend, accumulation = case
    with lora.use_backend(backend):
        model = model_of()
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        LOOPS[name](model, place, accumulation)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return before, {n: model.get_parameter(n).detach().clone() for n in before}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    one, other = (torch.cat([part[name].double().flatten() for name in expected]) for part in (found, expected))
    return float((one - other).norm() / other.norm())


def work(rank: int, case: tuple[str, str, int], place: Path) -> None:
    torch.save(trained(case, place / str(rank))[1], place / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def main(out: Path) -> None:
    """Every case."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    results = []
    for number, case in enumerate(CASES):
        place = out.parent / str(number)
        place.mkdir()
        before, expected = trained(case, place / "alone")
        ends = Processes(SIZE, lambda rank, c=case, p=place: work(rank, c, p), ACCELERATE_USE_CPU="true").ended()
        if any(end.code for end in ends):
            sys.exit("\n".join(end.said for end in ends))
        first, second = (torch.load(place / f"{rank}.pt") for rank in range(SIZE))
        apart = {"from one": distance(first, expected), "from each other": distance(second, first)}
        results.append({"case": case, "moved": distance(expected, before)} | apart)
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    os.environ["TRL_TELEMETRY"] = "0"
    main(Path(sys.argv[1]))
