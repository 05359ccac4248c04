"""A script as people write one: a loop around accelerate's `prepare`, then transformers' Trainer. It imports no test.

    python users_script.py MODEL OUT                                                    one process
    accelerate launch --multi_gpu --num_processes 2 users_script.py MODEL OUT           two, each with half of a batch

OUT/start, OUT/loop and OUT/trainer are the adapter before and after; OUT/processes says how many there were.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration

import lora
from lora.distributed import share_of

BATCH, STEPS, LR = 4, 4, 0.5
LENGTHS = [3, 12, 7, 5, 2, 9, 11, 4, 6, 12, 3, 8, 10, 5, 7, 12]


def examples() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 29, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": row, "labels": row} for row in rows]


def adapted(name: str) -> tuple[Any, Any]:
    model, tokenizer = lora.load(name)
    torch.manual_seed(0)
    lora.inject(model, lora.LoRAConfig(r=4, lora_alpha=8, init_lora_weights=False))
    lora.for_training(model, checkpointing="recompute")
    return model, transformers.DataCollatorForSeq2Seq(tokenizer, padding=True)


def bare_loop(name: str, out: Path) -> None:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    model, collate = adapted(name)
    if accelerator.is_main_process:
        lora.save_adapter(model, out / "start")
        (out / "processes").write_text(str(accelerator.num_processes))
    optimizer = torch.optim.SGD(lora.trainable_parameters(model), lr=LR)
    loader = torch.utils.data.DataLoader(examples(), batch_size=BATCH, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        count = (batch["labels"][:, 1:] != -100).sum()
        loss = model(**batch, num_items_in_batch=accelerator.reduce(count, "sum").item()).loss
        accelerator.backward(share_of(loss))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.is_main_process:
        lora.save_adapter(accelerator.unwrap_model(model), out / "loop")


def with_trainer(name: str, out: Path) -> None:
    model, collate = adapted(name)
    arguments = transformers.TrainingArguments(
        output_dir=str(out / "work"),
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", 1)),
        max_steps=STEPS,
        optim="sgd",
        learning_rate=LR,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, collate, examples())
    trainer.train()
    trainer.save_model(str(out / "trainer"))


def main(name: str, out: Path) -> None:
    bare_loop(name, out)
    with_trainer(name, out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
