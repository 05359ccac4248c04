"""TRL's SFTTrainer, told what an injected model is.

TRL tokenises, masks, packs, collates, schedules and steps. Here it learns five things: checkpoints hold the adapter and
not the model (`lora.train.checkpoint`); the loss goes through `lora.ops` (`lora.train.loss`); the held-out loss is a
mean over tokens, where transformers would average the means of batches; examples that are cut are counted; which
process has which batch, and which dropout masks it gets, follow from the seed and the batch's number alone.

This module imports trl: import it where it is needed, not at the top of another module.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lora.adapter_io import save_adapter
from lora.errors import LoRAError
from lora.reference.dropout import key_of
from lora.train import checkpoint
from lora.train.config import TrainConfig
from lora.train.data import IGNORED, Data, RankBatches, SeededOrder, WithNothing, to_columns
from lora.train.loss import NextTokenLoss
from lora.train.parallel import replicated, sharded
from lora.train.world import World

datasets: Any = import_module("datasets")  # Any: these packages are annotated in parts only
transformers: Any = import_module("transformers")
trl: Any = import_module("trl")


class HeldOut(NamedTuple):
    """A loss in nats a token, and over how many tokens it is the mean."""

    loss: float
    tokens: int


class Prepared(NamedTuple):
    """What became of the rows of one data set."""

    examples: int
    cut: int  # longer than max_length: their ends are gone
    dropped: int  # nothing of the answer was left within max_length
    tokens: int


class AdapterTrainer(trl.SFTTrainer):  # type: ignore[misc]
    """Trains the adapters of an injected model; see the top of this file."""

    loss_is_scaled_for_ga = True  # by num_items: the tokens of the whole accumulated batch

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: TrainConfig,
        data: Data,
        run: dict[str, Any],
        callbacks: list[Any],
        world: World | None = None,
    ) -> None:
        self.config, self.run, self.world = config, run, world or World()
        self.step_module: Any = None  # the model with its loss, as several processes run it
        self.micro_batch = 0  # in the step: how many this process has done
        self.documents = data.documents
        self.prepared: dict[str, Prepared] = {}
        self.tokens_read = self.tokens_learnt = 0
        self.before_saving: Callable[[], None] = lambda: None
        patched = vars(model).get("forward")
        chat = config.chat_template and bool(tokenizer.chat_template)
        columns = {"chat": chat, "completion_only": config.completion_only}
        train = datasets.Dataset.from_list(to_columns(data.train, **columns))
        held_out = datasets.Dataset.from_list(to_columns(data.held_out, **columns)) if data.held_out else None
        super().__init__(
            model=model,
            args=arguments(config),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.remove_callback(transformers.PrinterCallback)
        if patched is None:  # TRL's fused head, for which `NextTokenLoss` stands in
            del model.forward
        else:
            model.forward = patched
        if self.args.world_size != self.world.size:
            raise LoRAError(
                f"accelerate sees {self.args.world_size} processes, expected {self.world.size}, as WORLD_SIZE says: "
                "start them with torchrun, or accelerate launch."
            )
        self.next_token_loss = NextTokenLoss(model)

    def share_out(self) -> None:
        """Makes the model ready for several processes: sharded over them, or the same on each."""
        if self.world.size > 1:
            build = sharded if self.config.sharding == "full" else replicated
            self.step_module = build(self.next_token_loss)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """What transformers trains: our own step, in place of what accelerate would put around the model."""
        return self.step_module if training and self.step_module is not None else model

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""

    # ---- data

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any) -> Any:
        """TRL's preparation in two steps, so that what the second cuts off can be counted."""
        name, limit = rest[-1], args.max_length
        whole = super()._prepare_dataset(dataset, processing_class, replace(args, max_length=None), False, *rest)
        if name in self.documents:
            whole = whole.map(lambda batch: pieces(batch, limit), batched=True, remove_columns=whole.column_names)
        lengths = [len(ids) for ids in whole["input_ids"]]
        learnable = [any(label != IGNORED for label in labels[1:limit]) for labels in whole["labels"]]
        if not any(learnable):
            raise LoRAError(
                f"no example of the {'training' if name == 'train' else 'held-out'} data has a token to learn within "
                f"max_length={limit}: the prompts alone are longer. Raise max_length, or shorten the prompts."
            )
        whole = whole.select([i for i, keep in enumerate(learnable) if keep])
        self.prepared[name] = Prepared(
            len(whole), sum(n > limit for n in lengths), learnable.count(False), sum(min(n, limit) for n in lengths)
        )
        return super()._prepare_dataset(whole, processing_class, args, packing, *rest)

    def fingerprints(self) -> dict[str, str | None]:
        """Hashes of the token numbers and labels that training and evaluation see, for `lora.train.manifest`."""
        return {"data": fingerprint(self.train_dataset), "held_out": fingerprint(self.eval_dataset)}

    def get_train_dataloader(self) -> Loader:
        """This process's batches of the epoch, in an order that depends on nothing but the seed and the epoch."""
        self.order = SeededOrder(self.train_dataset, self.config.seed)
        return self.loader(self.train_dataset, self.order)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Loader:
        """This process's batches of the held-out data."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self.loader(dataset, range(len(dataset)))

    def loader(self, dataset: Any, order: SeededOrder | range) -> Loader:
        """The batches that this process has of a data set."""
        batches = RankBatches(order, self.args.per_device_train_batch_size, self.world.rank, self.world.size)
        rows = WithNothing(self._remove_unused_columns(dataset))
        pin = self.args.dataloader_pin_memory
        return Loader(rows, batch_sampler=batches, collate_fn=self.data_collator, pin_memory=pin)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], int]:
        """The batches of this process's part of a step, and how many labels count in the whole step."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        read = sum(tokens_in(batch) for batch in batches)
        read, learnt = map(int, self.world.add(read, sum(labels_in(batch) for batch in batches)))
        self.tokens_read += read
        self.tokens_learnt += learnt
        self.micro_batch = 0
        return batches, learnt

    def largest_batch(self) -> dict[str, Tensor]:
        """The longest training examples in one batch, every token of them learnt: no other batch takes more memory."""
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-self.args.per_device_train_batch_size :]
        batch = self._prepare_inputs(self.data_collator([self.train_dataset[i] for i in longest]))
        return {**batch, "labels": batch["input_ids"].clone()}

    # ---- loss

    def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """A batch forward and backward, with dropout masks that belong to the batch, whichever process has it."""
        whole = self.args.gradient_accumulation_steps * self.world.size  # batches in a step
        number = self.state.global_step * whole + self.micro_batch * self.world.size + self.world.rank
        torch.manual_seed(key_of(self.config.seed, number))
        self.micro_batch += 1
        return cast(Tensor, super().training_step(model, inputs, num_items_in_batch))

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The summed loss of a batch over the number of labels in the whole accumulated batch, of all processes."""
        num_items = labels_in(inputs) if num_items_in_batch is None else num_items_in_batch
        if self.step_module is not None:
            return cast(Tensor, self.step_module(inputs, num_items))
        return self.next_token_loss(inputs, num_items)

    @torch.no_grad()
    def held_out_loss(self, dataloader: Iterable[Any] | None = None) -> HeldOut:
        """The mean loss over all held-out tokens; leaves the training mode and the random generators as they were."""
        total, tokens, training = 0.0, 0.0, self.model.training
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            self.model.eval()
            try:
                for batch in self.get_eval_dataloader() if dataloader is None else dataloader:
                    inputs = self._prepare_inputs(batch)
                    total += self.next_token_loss(inputs, 1).item()
                    tokens += labels_in(inputs)
            finally:
                self.model.train(training)
        total, tokens = self.world.add(total, tokens)
        return HeldOut(total / max(tokens, 1), int(tokens))

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **options: Any
    ) -> Any:
        """What transformers calls every eval_steps."""
        loss, tokens = self.held_out_loss(dataloader)
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_tokens": tokens}
        return transformers.trainer_utils.EvalLoopOutput(None, None, metrics, len(dataloader.dataset))

    # ---- checkpoints: lora.train.checkpoint instead of pickles of the whole model

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output = Path(self.args.output_dir)
        self.world.first(self.before_saving)
        saved = checkpoint.save(self, output)
        self.world.first(lambda: checkpoint.rotate(output, self.config.keep_checkpoints, saved))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.load_parameters(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is not None:
            checkpoint.load_optimizer(self, Path(checkpoint_path))

    def _load_rng_state(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is not None:
            checkpoint.load_random_state(Path(checkpoint_path))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the adapter, in PEFT's format."""
        save_adapter(self.model, output_dir or self.args.output_dir)


class Loader(torch.utils.data.DataLoader[Any]):
    """A loader that tells its batches which epoch it is."""

    def set_epoch(self, epoch: int) -> None:
        cast(RankBatches, self.batch_sampler).set_epoch(epoch)


def labels_in(batch: dict[str, Tensor]) -> int:
    """The tokens of a batch that are learnt: token t predicts token t + 1."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def tokens_in(batch: dict[str, Tensor]) -> int:
    """The tokens of a batch that are read, padding not, nor what only keeps a process company."""
    if not labels_in(batch):
        return 0
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def arguments(config: TrainConfig) -> Any:
    """`config` in transformers' and TRL's terms."""
    cuda = torch.cuda.is_available()
    scheduler = "constant_with_warmup" if config.scheduler == "constant" else config.scheduler
    values = trl.SFTConfig(
        output_dir=config.output,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accumulation,
        learning_rate=config.lr,
        lr_scheduler_type=scheduler,
        warmup_steps=config.warmup,  # below 1 it is a share
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        bf16=False,  # the weights have the dtype they are to be used in: no autocast
        use_cpu=not cuda,  # accelerate counts processes without GPUs only if it is told so
        gradient_checkpointing=False,  # lora.for_training has set it up
        max_length=config.max_length,
        packing=config.packing,
        completion_only_loss=None if config.completion_only else False,
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=config.log_every,
        eval_strategy="steps" if config.eval_every and config.eval_fraction + bool(config.eval_data) else "no",
        eval_steps=config.eval_every or None,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or math.inf,
        logging_nan_inf_filter=False,  # it would log a mean of earlier losses instead
        report_to="none",  # our own callbacks
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=cuda,
    )
    values._n_gpu = min(values.n_gpu, 1)  # several would be used through DataParallel, which adapters do not survive
    return values


def fingerprint(dataset: Any) -> str | None:
    """A hash of a data set's token numbers and labels."""
    if dataset is None:
        return None
    digest = hashlib.sha256()
    for row in dataset.select_columns(["input_ids", "labels"]):
        digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return digest.hexdigest()


def pieces(batch: dict[str, list[list[int]]], length: int) -> dict[str, list[list[int]]]:
    """Long documents cut into consecutive pieces of `length` tokens."""
    return {
        name: [row[start : start + length] for row in batch[name] for start in range(0, len(row), length)]
        for name in ("input_ids", "labels")
    }
