"""The loops people have: TRL's trainers, transformers' Trainer, accelerate, plain PyTorch. Beside PEFT in the same.

PEFT's adapter and ours start from the same numbers, see the same batches and must end at the same numbers. Plain SGD,
because Adam divides by the size of a gradient and so makes roundings of small ones as large as the large ones.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import warnings
from pathlib import Path
from typing import Any

import accelerate
import datasets
import peft
import pytest
import torch
import transformers
import trl
from test_adapter_io import adapter_tensors, assert_equal
from test_families import FAMILIES, adapted, assert_near, step
from tiny import stir, tiny_llama
from tiny_text import rows, tiny_tokenizer
from torch import Tensor, nn

import lora
import lora.train
from lora import LoRAConfig, LoRAError

BACKENDS = ("reference", "fast")
TOKENIZER = tiny_tokenizer()
IDS = torch.randint(4, 29, (4, 12), generator=torch.Generator().manual_seed(0))
STEPS = 6
# Float32 gradients of one formula by different code: relative errors of a few dozen roundings of 6e-8, which some steps
# carry on to the adapters. Each test sees the training move them by more than a hundred times that.
ROUNDING = 2e-5

both_backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """No bars, no telemetry; warnings of tiny models and of PEFT on tied weights are not what is tested."""
    monkeypatch.setenv("TRL_TELEMETRY", "0")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # a process has one, with one precision


@functools.cache
def _template() -> Any:
    model = tiny_llama(vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=None, eos_token_id=2)
    with torch.no_grad():  # transformers' start is so small that next to nothing reaches the first layers
        for parameter in model.parameters():
            parameter *= 8 if parameter.dim() == 2 else 1
    return model


def base() -> Any:
    """A fresh model with the same weights every time."""
    return copy.deepcopy(_template())


CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def pair(directory: Path, **options: Any) -> tuple[Any, Any]:
    """PEFT's model and ours with the same adapter every time, which is not at its zero start."""
    model = base()  # before the seed: the first one draws numbers
    torch.manual_seed(1)
    theirs = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **(CONFIG | options)))
    stir(theirs)
    theirs.save_pretrained(directory / "start")
    ours = lora.load_adapter(base(), directory / "start")
    return theirs, ours


def tensors_of(model: Any) -> dict[str, Tensor]:
    """The adapter by PEFT's names, whoever's it is."""
    if isinstance(model, peft.PeftModel):
        return {name: value.detach() for name, value in peft.get_peft_model_state_dict(model).items()}
    names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    return {
        f"base_model.model.{path}.{names[role]}": value.detach()
        for path, layer in lora.layers.adapter_layers(model)
        for role, value in layer.adapter_params("default").items()
    }


def in_order(theirs: Any, ours: Any) -> list[str]:
    """PEFT's parameter names in the order of ours."""
    names = {name.removeprefix("base_model.model."): name for name, p in theirs.named_parameters() if p.requires_grad}
    return [names[f"{name}.weight"] for name, p in ours.named_parameters() if p.requires_grad]


def assert_same_training(ours: Any, theirs: Any, start: dict[str, Tensor]) -> None:
    """Both moved away from the start, to the same place."""
    found, expected = tensors_of(ours), tensors_of(theirs)
    assert found.keys() == expected.keys() == start.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().max())
        assert float((tensor - start[name]).abs().max()) > 100 * ROUNDING * scale, name
        assert float((found[name] - tensor).abs().max()) <= ROUNDING * scale, name


def start_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors_of(model).items()}


def arguments(kind: Any, directory: Path, **options: Any) -> Any:
    """Settings of one of their trainers: quiet, on the CPU, plain SGD."""
    fixed = {"output_dir": str(directory / "out"), "max_steps": STEPS, "per_device_train_batch_size": 4, "optim": "sgd"}
    fixed |= {"learning_rate": 0.5, "lr_scheduler_type": "constant", "report_to": "none", "save_strategy": "no"}
    fixed |= {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "max_grad_norm": 1.0, "bf16": False}
    return kind(**(fixed | options))


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def held_out_of(trainer: Any) -> list[float]:
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


# ---- TRL: supervised fine-tuning


def sft(model: Any, directory: Path, callbacks: Any = (), **options: Any) -> Any:
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments(trl.SFTConfig, directory, max_length=64, **options),
        train_dataset=datasets.Dataset.from_list(rows(24)),
        eval_dataset=datasets.Dataset.from_list(rows(24)) if "eval_strategy" in options else None,
        processing_class=TOKENIZER,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("checkpointing", [True, False])
@both_backends
def test_sft_trainer_trains_as_with_peft(backend, checkpointing, tmp_path):
    theirs, ours = pair(tmp_path)
    start = start_of(theirs)
    expected = sft(theirs, tmp_path, gradient_checkpointing=checkpointing)
    with lora.use_backend(backend):
        found = sft(lora.for_training(ours), tmp_path, gradient_checkpointing=checkpointing)
        assert_same_training(ours, theirs, start)
        assert losses_of(found) == pytest.approx(losses_of(expected), rel=ROUNDING)
        assert losses_of(found)[-1] < 0.8 * losses_of(found)[0]

        found.save_model(str(tmp_path / "saved"))  # the adapter, as with PEFT, and not the base
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "saved")
    assert_equal(tensors_of(again), tensors_of(ours))
    assert not (tmp_path / "saved" / "model.safetensors").exists()


@both_backends
def test_trl_s_packing_trains_as_rows_of_their_own(backend, tmp_path):
    """All examples in one step: padded beside each other, and several in a row, told apart by position ids alone."""
    ended = []
    for packing in (False, True):
        _, ours = pair(tmp_path)
        start = start_of(ours)
        options = {"per_device_train_batch_size": 24, "max_steps": 1, "max_grad_norm": 0.0, "packing": packing}
        with lora.use_backend(backend):
            trainer = sft(lora.for_training(ours), tmp_path, gradient_checkpointing=False, **options)
        assert (len(trainer.train_dataset) < 24 / 3) == packing
        ended.append(tensors_of(ours))
    for name, tensor in ended[0].items():
        scale = float(tensor.abs().max())
        assert float((ended[1][name] - tensor).abs().max()) <= ROUNDING * scale, name
        assert float((tensor - start[name]).abs().max()) > 100 * ROUNDING * scale, name


@both_backends
def test_their_checkpointing_repeats_our_dropout(backend, tmp_path):
    """TRL turns torch's own checkpointing on by default: the masks of the second run are those of the first."""
    ended = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = lora.inject(base(), LoRAConfig(**CONFIG, lora_dropout=0.3))
        with lora.use_backend(backend):
            sft(lora.for_training(model), tmp_path, gradient_checkpointing=checkpointing)
        ended.append(tensors_of(model))
    assert_equal(*ended)


def test_trl_reads_a_head_past_its_adapter_and_we_say_so(tmp_path):
    """PEFT's models are refused there. A head trained in full is what TRL multiplies by: that one trains."""
    model = lora.for_training(lora.inject(base(), LoRAConfig(**(CONFIG | {"target_modules": ["q_proj", "lm_head"]}))))
    with pytest.warns(UserWarning, match=r"output head is read past its adapter default: .*name it in modules_to_save"):
        sft(model, tmp_path, max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the weight of the output head")
        lora.for_inference(model)(IDS)
        assert model.lm_head.weight is model.lm_head.base_layer.weight
        model = lora.for_training(lora.inject(base(), LoRAConfig(**CONFIG, modules_to_save=["lm_head"])))
        sft(model, tmp_path)
    assert float((model.lm_head.current.weight - base().lm_head.weight).abs().max()) > 1e-3


class Sampling(transformers.TrainerCallback):
    """What a callback that shows samples does."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        lora.for_inference(model, merge=True).generate(IDS[:1], max_new_tokens=3, do_sample=False)
        lora.for_training(model)


@both_backends
def test_switching_modes_in_a_callback_leaves_trl_s_patches_alone(backend, tmp_path):
    """TRL puts a forward of its own on the model, around ours."""
    ended = []
    for callbacks in ((), [Sampling()]):
        _, ours = pair(tmp_path)
        with lora.use_backend(backend):
            sft(lora.for_training(ours), tmp_path, callbacks, gradient_checkpointing=False)
        ended.append(tensors_of(ours))
    assert_equal(*ended)


# ---- TRL: preferences


def preferences() -> Any:
    return datasets.Dataset.from_list(
        [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "the number is"} for row in rows(24)]
    )


def dpo(model: Any, directory: Path, ref_model: Any = None, **options: Any) -> Any:
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=ref_model,
        args=arguments(trl.DPOConfig, directory, max_length=64, gradient_checkpointing=False, **options),
        train_dataset=preferences(),
        processing_class=TOKENIZER,
    )
    trainer.train()
    return trainer


@both_backends
def test_dpo_trainer_s_reference_is_the_model_without_its_adapter(backend, tmp_path):
    theirs, ours = pair(tmp_path)
    start = start_of(theirs)
    expected = dpo(theirs, tmp_path, base())  # a second model: left to itself, TRL takes a copy of the adapter's start
    with lora.use_backend(backend):
        lora.for_training(ours)
        weights = {name: p.data_ptr() for name, p in ours.named_parameters()}
        found = dpo(ours, tmp_path, lora.without_adapters(ours))
    assert_same_training(ours, theirs, start)
    for key in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected"):
        history = [[entry[key] for entry in t.state.log_history if key in entry] for t in (found, expected)]
        assert len(history[0]) == STEPS
        assert history[0] == pytest.approx(history[1], rel=1e-3, abs=1e-5), key  # rewards are differences
    assert list(found.ref_model.parameters()) == []  # no copy of the base
    assert {name: p.data_ptr() for name, p in ours.named_parameters()} == weights


@both_backends
def test_dpo_with_the_adapter_s_start_as_reference(backend, tmp_path):
    """Log-probabilities before the first step: what PEFT's model has when its adapter was trained before."""
    theirs, ours = pair(tmp_path)
    start = start_of(theirs)
    dpo(theirs, tmp_path)
    theirs.delete_adapter("ref")  # TRL's copy
    with lora.use_backend(backend):
        dpo(lora.for_training(ours), tmp_path, precompute_ref_log_probs=True)
    assert_same_training(ours, theirs, start)


def test_trl_turns_our_dropout_off_where_it_says_so(tmp_path):
    """DPO's `disable_dropout`, True by default, reaches the adapters' dropout, as it does PEFT's."""
    model = lora.for_training(lora.inject(base(), LoRAConfig(**CONFIG, lora_dropout=0.4)))
    assert {layer.dropout_rate("default") for _, layer in lora.layers.adapter_layers(model)} == {0.4}
    dpo(model, tmp_path, lora.without_adapters(model), max_steps=1)
    assert {layer.dropout_rate("default") for _, layer in lora.layers.adapter_layers(model)} == {0.0}


# ---- the reference policy by itself


def test_without_adapters_is_the_base_model_and_leaves_the_model_as_it_was():
    model = tiny_llama(attention_bias=True, attention_dropout=0.5)
    expected = model(IDS).logits.detach()
    states = model.model(IDS).last_hidden_state.detach()
    config = LoRAConfig(r=2, bias="all", modules_to_save=["lm_head"], target_modules=["q_proj"], lora_dropout=0.5)
    stir(lora.inject(model, config))
    lora.for_training(model)
    model.model.layers[1].eval()  # a mode of its own
    modes = {name: module.training for name, module in model.named_modules()}
    view = lora.without_adapters(model)
    for _ in range(2):
        assert torch.equal(view(IDS).logits, expected)
        assert torch.equal(view.base_model(IDS).last_hidden_state, states)
        assert view.base_model.base_model.part == "model"
        assert view.get_output_embeddings() is model.lm_head.base_layer
    with pytest.raises(TypeError):
        view(IDS, no_such_argument=1, input_ids=2)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not torch.equal(model.eval()(IDS).logits, expected)
    assert view.config is model.config and list(view.parameters()) == []
    view.train()
    assert not model.training
    lora.merge(model)
    torch.testing.assert_close(view(IDS).logits, expected, rtol=0, atol=0)
    assert all(info.merged for info in lora.adapters(model).values())


def test_a_reference_policy_between_forward_and_backward_disturbs_nothing():
    for backend in BACKENDS:
        with lora.use_backend(backend):
            model = lora.inject(base(), LoRAConfig(**CONFIG, lora_dropout=0.3, init_lora_weights=False))
            lora.for_training(model, checkpointing="recompute")
            gradients = []
            for between in (False, True):
                torch.manual_seed(0)
                model.zero_grad()
                loss = model(IDS, labels=IDS).loss
                if between:
                    with torch.no_grad():
                        lora.without_adapters(model)(IDS)
                loss.backward()
                gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
            assert_equal(*gradients)


def test_an_adapter_on_the_head_has_no_reference_policy():
    """Trainers multiply by the head's weight themselves: the adapter would not be trained, and nobody would say so."""
    model = lora.inject(base(), LoRAConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(LoRAError, match=r"lm_head, the output head, carries adapters \(default\).*modules_to_save"):
        lora.without_adapters(model)
    with pytest.raises(LoRAError, match=r"carries no adapters: call lora\.inject"):
        lora.without_adapters(base())


# ---- transformers' Trainer


def tokens(lengths: list[int], seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randint(4, 29, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row, "note": "a column no model takes"} for row in numbers]


UNEVEN = [3, 12, 7, 5, 2, 9, 11, 4, 6, 12, 3, 8, 10, 5, 7, 12]


def with_trainer(
    model: Any,
    directory: Path,
    callbacks: Any = (),
    optimizers: Any = (None, None),
    resume: str | None = None,
    **options: Any,
) -> Any:
    data = datasets.Dataset.from_list(tokens(UNEVEN))
    trainer = transformers.Trainer(
        model=model,
        args=arguments(transformers.TrainingArguments, directory, **options),
        train_dataset=data,
        eval_dataset=data if "eval_strategy" in options else None,
        data_collator=transformers.DataCollatorForSeq2Seq(TOKENIZER, padding=True),
        optimizers=optimizers,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@both_backends
def test_trainer_trains_as_with_peft(backend, tmp_path):
    theirs, ours = pair(tmp_path)
    start = start_of(theirs)
    expected = with_trainer(theirs, tmp_path)
    with lora.use_backend(backend):
        found = with_trainer(lora.for_training(ours), tmp_path)
    assert_same_training(ours, theirs, start)
    assert losses_of(found) == pytest.approx(losses_of(expected), rel=ROUNDING)


@pytest.mark.parametrize("loop", [with_trainer, sft], ids=["trainer", "sft"])
@both_backends
def test_dropout_is_on_in_training_and_off_in_evaluation(backend, loop, tmp_path):
    """Every step has all examples and changes nothing (lr 0): only masks make one loss differ from the next."""
    every = {"per_device_train_batch_size": 24, "learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 2}
    _, plain = pair(tmp_path)
    theirs, ours = pair(tmp_path, lora_dropout=0.5)
    by_peft = loop(theirs, tmp_path, **every)
    with lora.use_backend(backend):
        without = loop(lora.for_training(plain), tmp_path, **every)
        found = loop(lora.for_training(ours), tmp_path, **every)
    steady, held_out = losses_of(without)[0], held_out_of(by_peft)
    assert losses_of(without) == pytest.approx([steady] * STEPS, rel=ROUNDING)
    for trainer in (by_peft, found):
        assert all(abs(loss / steady - 1) > 20 * ROUNDING for loss in losses_of(trainer))
        assert len(set(losses_of(trainer))) == STEPS
    assert held_out == pytest.approx(held_out[:1] * (STEPS // 2), rel=ROUNDING)
    for trainer in (without, found):
        assert held_out_of(trainer) == pytest.approx(held_out, rel=ROUNDING)


class Precisions(transformers.TrainerCallback):
    """Notes the dtypes of gradients, and whether autocast is on where the model runs."""

    def __init__(self, model):
        self.gradients, self.autocast = set(), set()
        model.get_input_embeddings().register_forward_pre_hook(
            lambda *_: self.autocast.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        )

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients |= {p.grad.dtype for p in model.parameters() if p.requires_grad}


@both_backends
def test_trainer_in_bf16_trains_as_with_peft(backend, tmp_path):
    """Losses and adapters are as near to float32's as PEFT's are: √3 times, as in test_half_precision.py."""
    exact, ours = pair(tmp_path)
    start = start_of(exact)
    in_full = losses_of(with_trainer(exact, tmp_path))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # which holds one precision
    theirs, _ = pair(tmp_path)
    by_peft = losses_of(with_trainer(theirs, tmp_path, bf16=True))
    seen = Precisions(ours)
    with lora.use_backend(backend):
        found = losses_of(with_trainer(lora.for_training(ours), tmp_path, [seen], bf16=True))
    assert seen.autocast == {(True, torch.bfloat16)} and seen.gradients == {torch.float32}
    vectors = [torch.cat([tensors_of(model)[name].flatten() for name in start]) for model in (ours, theirs, exact)]
    for one, other, truth in ((found, by_peft, in_full), vectors):
        error, allowed = (float((torch.as_tensor(x) - torch.as_tensor(truth)).norm()) for x in (one, other))
        assert 0 < error <= 3**0.5 * allowed
    moved = [float((value - start[name]).norm() / value.norm()) for name, value in tensors_of(exact).items()]
    assert min(moved) > 1e-2, moved  # far above what is compared


@both_backends
def test_accumulation_changes_nothing(backend, tmp_path):
    """Sixteen sequences of different lengths in one step, as 1 batch, 4 or 16: one step's adapters, by tokens."""
    ended = {}
    for steps in (1, 4, 16):
        _, ours = pair(tmp_path)
        start = start_of(ours)
        with lora.use_backend(backend):
            options = {"per_device_train_batch_size": 16 // steps, "gradient_accumulation_steps": steps, "max_steps": 1}
            with_trainer(lora.for_training(ours), tmp_path, max_grad_norm=0.0, learning_rate=1.0, **options)
        ended[steps] = {name: value - start[name] for name, value in tensors_of(ours).items()}  # - the gradient
    for steps in (4, 16):
        for name, gradient in ended[1].items():
            scale = float(gradient.abs().max())
            assert scale > 0
            # The difference of two parameters of size 1, one rounding of 6e-8 each, beside the gradient's own.
            assert float((ended[steps][name] - gradient).abs().max()) <= ROUNDING * scale + 3e-7, (steps, name)


@both_backends
def test_accumulation_in_a_loop_of_one_s_own(backend, tmp_path):
    """The model takes the tokens of the whole accumulated batch as `num_items_in_batch`."""
    _, ours = pair(tmp_path)
    gradients = {}
    data = [torch.tensor(row["input_ids"]) for row in tokens(UNEVEN)]
    count = sum(len(row) - 1 for row in data)
    with lora.use_backend(backend):
        lora.for_training(ours)
        for steps in (1, 4, 16):
            ours.zero_grad()
            for i in range(0, 16, 16 // steps):
                rows_now = data[i : i + 16 // steps]
                ids = nn.utils.rnn.pad_sequence(rows_now, batch_first=True)
                labels = nn.utils.rnn.pad_sequence(rows_now, batch_first=True, padding_value=-100)
                ours(
                    ids, attention_mask=(labels != -100).long(), labels=labels, num_items_in_batch=count
                ).loss.backward()
            gradients[steps] = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    for steps in (4, 16):
        for name, gradient in gradients[1].items():
            scale = float(gradient.abs().max())
            assert float((gradients[steps][name] - gradient).abs().max()) <= ROUNDING * scale, (steps, name)


@both_backends
def test_a_fused_model_says_what_its_forward_takes(backend):
    """Trainer drops every column of a data set that is not an argument of the model's forward."""
    with lora.use_backend(backend):
        model = lora.for_training(lora.inject(base(), LoRAConfig(**CONFIG)))
    assert inspect.signature(model.forward) == inspect.signature(base().forward)
    assert copy.deepcopy(model).forward.__self__ is not model


@both_backends
def test_a_checkpoint_of_trainer_s_holds_the_adapter(backend, tmp_path):
    """Every adapter, in the places where PEFT has them."""
    _, ours = pair(tmp_path)
    lora.add_adapter(ours, LoRAConfig(r=2, target_modules=["q_proj"]), "other")
    with lora.use_backend(backend):
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "save_only_model": True}
        with_trainer(lora.for_training(ours), tmp_path, **options)
    folder = tmp_path / "out" / "checkpoint-2"
    again = lora.load_adapter(base(), folder)
    assert_equal(adapter_tensors(again), adapter_tensors(ours))
    lora.load_adapter(again, folder, "other")
    assert_equal(adapter_tensors(again, "other"), adapter_tensors(ours, "other"))
    assert not list(folder.glob("model*.safetensors"))
    with pytest.raises(ValueError, match="checkpoint index"):  # without `lora.train.AdapterCheckpoints`
        with_trainer(ours, tmp_path, resume=str(folder), max_steps=4)
    with pytest.raises(LoRAError, match=r"save_pretrained of a model with adapters takes no push_to_hub"):
        ours.save_pretrained(tmp_path / "no", push_to_hub=True)
    lora.eject(ours).save_pretrained(tmp_path / "whole")  # the model's own again
    assert (tmp_path / "whole" / "model.safetensors").exists()


class Resuming(lora.train.AdapterCheckpoints, transformers.Trainer):
    """What docs/howto/train.md tells people to write."""


class Sharding(Resuming):
    """What its settings make of a trainer under FSDP."""

    def train(self, *args: Any, **options: Any) -> Any:
        self.is_fsdp_enabled = True
        return super().train(*args, **options)


class ResumingSFT(lora.train.AdapterCheckpoints, trl.SFTTrainer):
    """The same on TRL's."""


class ResumingDPO(lora.train.AdapterCheckpoints, trl.DPOTrainer):
    """The same with a reference policy."""


def resuming(kind: Any, model: Any, directory: Path, resume: Any = None, **options: Any) -> Any:
    """One run, or what is left of one, that saves every other step."""
    own: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    if issubclass(kind, Resuming):
        data, settings = datasets.Dataset.from_list(tokens(UNEVEN)), transformers.TrainingArguments
        more: dict[str, Any] = {"data_collator": transformers.DataCollatorForSeq2Seq(TOKENIZER, padding=True)}
    elif kind is ResumingSFT:
        data, settings, more = datasets.Dataset.from_list(rows(24)), trl.SFTConfig, {}
        own |= {"max_length": 64}
    else:
        data, settings, more = preferences(), trl.DPOConfig, {"ref_model": lora.without_adapters(model)}
        own |= {"max_length": 64, "gradient_checkpointing": False, "disable_dropout": False}
    trainer = kind(
        model=model,
        args=arguments(settings, directory, **(own | options)),
        train_dataset=data,
        eval_dataset=data if "eval_strategy" in options else None,
        processing_class=TOKENIZER,
        **more,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def started(kind: str = "plain") -> Any:
    """A model with its adapters, the same every time, and ready to train."""
    torch.manual_seed(3)
    model = base()
    if kind == "bias":
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias = nn.Parameter(torch.ones(layer.self_attn.q_proj.out_features))
    if kind == "nf4":
        lora.quantize(model)
    options: dict[str, Any] = {"lora_dropout": 0.25, "r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    options |= {
        "dora": {"use_dora": True},
        "head": {"modules_to_save": ["lm_head"]},
        "pissa": {"init_lora_weights": "pissa"},
        "bias": {"bias": "lora_only"},
    }.get(kind, {})
    lora.inject(model, LoRAConfig(**options))
    if kind in ("several", "second"):
        lora.add_adapter(model, LoRAConfig(r=2, target_modules=["k_proj", "up_proj"], lora_dropout=0.25), "other")
        lora.set_adapter(model, ["default", "other"] if kind == "several" else "other")
    return lora.for_training(model, "recompute" if kind == "recompute" else "none")


def bytes_of(model: Any, directory: Path) -> dict[str, bytes]:
    """What `save_adapter` writes of every adapter."""
    folders = [lora.save_adapter(model, directory, name) for name in lora.adapters(model)]
    return {
        f"{f.name}/{file.name}": file.read_bytes() for f in folders for file in sorted(f.iterdir()) if file.is_file()
    }


KINDS = ["plain", "recompute", "dora", "head", "nf4", "pissa", "several", "second", "bias"]
TRAINERS = [
    *((kind, Resuming) for kind in KINDS),
    ("plain", ResumingSFT),
    ("plain", ResumingDPO),
]


@pytest.mark.parametrize(("kind", "trainer"), TRAINERS, ids=[f"{kind}-{t.__name__}" for kind, t in TRAINERS])
@both_backends
def test_their_trainers_resume_bit_for_bit(backend, kind, trainer, tmp_path):
    """Stopped within an epoch and at the end of one, with dropout, and shuffled: the adapter's files are the same."""
    with lora.use_backend(backend):
        whole = started(kind)
        resuming(trainer, whole, tmp_path)
        expected = bytes_of(whole, tmp_path / "expected" / "adapter")
        (tmp_path / "out" / "checkpoint-6").rename(tmp_path / "last")
        for step in (4, 2):
            again = started(kind)
            resuming(trainer, again, tmp_path, resume=str(tmp_path / "out" / f"checkpoint-{step}"))
            assert bytes_of(again, tmp_path / f"from_{step}" / "adapter") == expected
    assert not list((tmp_path / "out").rglob("model*.safetensors"))  # the base model is in none of them
    if kind not in ("several", "second", "nf4", "bias"):  # which PEFT knows nothing of, or needs another base for
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "last")
        lora.for_inference(whole)
        with torch.no_grad():
            torch.testing.assert_close(theirs.eval()(IDS).logits, whole(IDS).logits, rtol=1e-4, atol=1e-4)


@both_backends
def test_a_torn_checkpoint_of_trainer_s_is_passed_over(backend, tmp_path):
    with lora.use_backend(backend):
        whole = started()
        resuming(Resuming, whole, tmp_path)
        expected = bytes_of(whole, tmp_path / "expected" / "adapter")
        (tmp_path / "out" / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 1.')
        (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").unlink()
        again = started()
        with pytest.warns(UserWarning, match=r"checkpoint-6 is not whole .*cut off.*checkpoint-4.*from checkpoint-2"):
            resuming(Resuming, again, tmp_path, resume=True)
        assert bytes_of(again, tmp_path / "again" / "adapter") == expected
        for path in (tmp_path / "out").glob("*/trainer_state.json"):
            path.unlink()
        with pytest.raises(LoRAError, match=r"no checkpoint in .* is whole"):
            resuming(Resuming, started(), tmp_path, resume=True)
        with pytest.raises(LoRAError, match=r"checkpoint-4 is not whole \(no trainer_state\.json"):
            resuming(Resuming, started(), tmp_path, resume=str(tmp_path / "out" / "checkpoint-4"))


def test_what_their_trainers_cannot_resume_is_refused(tmp_path):
    resuming(Resuming, started(), tmp_path, max_steps=2)
    folder = tmp_path / "out" / "checkpoint-2"
    with pytest.raises(LoRAError, match=r"has the adapters 'default', expected those of the model, 'default', 'other'"):
        resuming(Resuming, started("several"), tmp_path, resume=str(folder))
    other = lora.for_training(lora.inject(base(), LoRAConfig(r=4, target_modules=["q_proj", "v_proj"])))
    start = start_of(other)
    with pytest.raises(
        LoRAError, match=r"target_modules was .*down_proj.* and is .*lora_dropout was 0\.25 and is 0\.0"
    ):
        resuming(Resuming, other, tmp_path, resume=str(folder))
    assert_equal(start_of(other), start)
    (folder / "rng_state.pth").unlink()
    with pytest.warns(UserWarning, match=r"has no rng_state\.pth.*other dropout masks"):
        resuming(Resuming, started(), tmp_path, resume=str(folder), max_steps=2)
    (folder / "optimizer.pt").unlink()
    with pytest.raises(LoRAError, match=r"has no optimizer\.pt, as save_only_model leaves it"):
        resuming(Resuming, started(), tmp_path, resume=str(folder))
    with pytest.raises(LoRAError, match=r"carries no adapters"):
        resuming(Resuming, base(), tmp_path)
    with pytest.raises(LoRAError, match=r"runs under FSDP, which writes checkpoints of its own"):
        resuming(Sharding, started(), tmp_path)
    with pytest.raises(LoRAError, match=r"write class Backwards\(AdapterCheckpoints, Trainer\)"):
        type("Backwards", (transformers.Trainer, lora.train.AdapterCheckpoints), {})


@pytest.mark.parametrize("kind", ["plain", "head", "several"])
@both_backends
def test_their_trainers_load_the_best_checkpoint(backend, kind, tmp_path):
    every = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    every |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # the first one, that is
    with lora.use_backend(backend):
        ours = started(kind)
        parameters = list(map(id, ours.parameters()))
        trainer = resuming(Resuming, ours, tmp_path, **every)
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
        assert list(map(id, ours.parameters())) == parameters  # in place
        found, out = bytes_of(ours, tmp_path / "found" / "adapter"), tmp_path / "out"
    for name, content in found.items():
        folder, _, file = name.partition("/")
        path = file if folder == "adapter" else name
        assert (out / "checkpoint-2" / path).read_bytes() == content
        if file.endswith(".safetensors"):
            assert (out / "checkpoint-6" / path).read_bytes() != content


# ---- accelerate and plain PyTorch


def batches() -> list[dict[str, Tensor]]:
    data = tokens(UNEVEN)
    collate = transformers.DataCollatorForSeq2Seq(TOKENIZER, padding=True)
    plain = [{key: row[key] for key in ("input_ids", "labels")} for row in data]
    return [dict(collate(plain[i : i + 4])) for i in range(0, 16, 4)]


def bare_loop(model: Any, optimizer: Any, steps: int = 2) -> list[float]:
    losses = []
    for _ in range(steps):
        for batch in batches():
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


@both_backends
def test_a_bare_loop_trains_as_with_peft(backend, tmp_path):
    theirs, ours = pair(tmp_path)
    start = start_of(theirs)
    expected = bare_loop(theirs.train(), torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5))
    with lora.use_backend(backend):
        found = bare_loop(lora.for_training(ours), torch.optim.SGD(lora.trainable_parameters(ours), lr=0.5))
    assert_same_training(ours, theirs, start)
    assert found == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@both_backends
def test_accelerate_trains_as_a_bare_loop_does(backend, precision, tmp_path):
    """Bit for bit; and the model that comes out of its wrappers generates, saves and merges."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with lora.use_backend(backend):
        _, alone = pair(tmp_path)
        optimizer = torch.optim.SGD(lora.trainable_parameters(lora.for_training(alone)), lr=0.1)
        for batch in batches():
            optimizer.zero_grad()
            with autocast:
                loss = alone(**batch).loss
            loss.float().backward()
            optimizer.step()

        _, ours = pair(tmp_path)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        lora.for_training(ours)
        optimizer = torch.optim.SGD(lora.trainable_parameters(ours), lr=0.1)
        model, optimizer, loader = accelerator.prepare(ours, optimizer, torch.utils.data.DataLoader(batches(), None))
        for batch in loader:
            optimizer.zero_grad()
            accelerator.backward(model(**batch).loss)
            optimizer.step()
        assert_equal(tensors_of(ours), tensors_of(alone))

        unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        assert unwrapped is ours
        lora.save_adapter(unwrapped, tmp_path / "saved")
        again = lora.load_adapter(base(), tmp_path / "saved")
        with torch.no_grad():
            expected = lora.for_inference(again)(IDS).logits
            assert torch.equal(lora.for_inference(ours)(IDS).logits, expected)
            merged = lora.merge_and_eject(ours)(IDS).logits
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@both_backends
def test_accelerate_accumulates_by_tokens(backend, tmp_path):
    """Its `backward` divides by the number of batches, which the tokens of all of them have done already."""
    with lora.use_backend(backend):
        _, ours = pair(tmp_path)
        lora.for_training(ours)
        data = batches()
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in data)
        for batch in data:
            ours(**batch, num_items_in_batch=count).loss.backward()
        expected = {name: p.grad.clone() for name, p in ours.named_parameters() if p.requires_grad}

        ours.zero_grad()
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=len(data))
        optimizer = torch.optim.SGD(lora.trainable_parameters(ours), lr=0.0)
        model, optimizer, loader = accelerator.prepare(ours, optimizer, torch.utils.data.DataLoader(data, None))
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch, num_items_in_batch=count).loss
                accelerator.backward(loss * accelerator.gradient_accumulation_steps)
                optimizer.step()
    for name, gradient in expected.items():
        found = ours.get_parameter(name).grad
        assert float((found - gradient).abs().max()) <= ROUNDING * float(gradient.abs().max()), name


@both_backends
def test_accelerate_saves_its_state_and_goes_on_from_it(backend, tmp_path):
    with lora.use_backend(backend):
        _, ours = pair(tmp_path)
        lora.for_training(ours)
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.AdamW(lora.trainable_parameters(ours), lr=1e-2)
        model, optimizer = accelerator.prepare(ours, optimizer)

        def a_step() -> dict[str, Tensor]:
            optimizer.zero_grad()
            accelerator.backward(model(IDS, labels=IDS).loss)
            optimizer.step()
            return start_of(ours)

        first = a_step()
        accelerator.save_state(str(tmp_path / "state"))
        expected = a_step()
        accelerator.load_state(str(tmp_path / "state"))
        assert_equal(start_of(ours), first)
        assert_equal(a_step(), expected)


# ---- packing


def packed_rows() -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Documents of different lengths; in one row, with positions and labels, as transformers' collator makes it."""
    documents = [IDS[0], IDS[1, :5], IDS[2, :9], IDS[3, :3]]
    row = transformers.DataCollatorWithFlattening()([{"input_ids": each.tolist()} for each in documents])
    assert torch.equal(row["labels"] == -100, row["position_ids"] == 0)  # no first token is predicted
    return documents, row["input_ids"], row["position_ids"], row["labels"]


# transformers has no torch attention for Gemma 2.
ATTENTIONS = [(family, "sdpa") for family in FAMILIES if family != "gemma2"] + [
    (family, "eager") for family in ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3")
]


@pytest.mark.parametrize("checkpointing", ["none", "recompute", "selective", "offload"])
@pytest.mark.parametrize(("family", "attention"), ATTENTIONS)
@both_backends
def test_packed_documents_are_what_they_are_alone(backend, family, attention, checkpointing):
    """Position ids alone tell where a document begins, also where a window ends inside one and in the second run."""
    with lora.use_backend(backend):
        model = adapted(family)
        model.set_attn_implementation(attention)
        for module in lora.for_training(model, checkpointing=checkpointing).modules():
            if isinstance(module, nn.Dropout):  # GPT-2's own, which draws other numbers for other shapes
                module.p = 0.0
        documents, ids, positions, labels = packed_rows()
        loss, gradients = step(model, input_ids=ids, position_ids=positions, labels=labels)
        count = sum(len(each) - 1 for each in documents)
        alone = [step(model, input_ids=d[None], labels=d[None], num_items_in_batch=count) for d in documents]
        together = step(model, input_ids=ids, labels=labels)[0]
    assert_near(loss, sum(each[0] for each in alone))
    for name, gradient in gradients.items():
        assert_near(gradient, sum(each[1][name] for each in alone), name)
    assert abs(float(together - loss)) > 1e-3 * float(loss)  # a leak would show
