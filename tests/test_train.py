"""Training on TRL's SFTTrainer: the loss, the labels, checkpoints, resuming, and what a run leaves behind."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from tiny_text import rows, save_tiny_model, tiny_tokenizer, write_jsonl

import lora
from lora.errors import LoRAError
from lora.train import TrainConfig, checkpoint, run
from lora.train.config import from_sources, parse_flag
from lora.train.data import Data
from lora.train.job import InterruptedRunError, Job, as_yaml
from lora.train.loss import NextTokenLoss
from lora.train.plot import running_mean
from lora.train.progress import Control, clock, read_metrics
from lora.train.quiet import quiet
from lora.train.sampling import answer, render

EXAMPLES = 48
STEPS = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model and data, made once."""
    root = tmp_path_factory.mktemp("train")
    with quiet():
        model = save_tiny_model(root / "model")
    return {"model": model, "data": write_jsonl(root / "data.jsonl", rows(EXAMPLES)), "root": root}


def settings(files: dict[str, Path], output: Path, **options: Any) -> TrainConfig:
    fixed: dict[str, Any] = {"lr": 1e-2, "r": 4, "max_steps": STEPS, "batch_size": 4, "grad_accumulation": 2}
    fixed |= {"eval_fraction": 0.1, "samples": 1, "sample_tokens": 4, "tensorboard": False, "epochs": 3.0}
    fixed |= {"dtype": "float32"}  # on a GPU too: what is compared here is less than a rounding of bfloat16
    return TrainConfig(model=str(files["model"]), data=str(files["data"]), output=str(output), **(fixed | options))


def silent(width: int = 120) -> Console:
    return Console(file=io.StringIO(), width=width)


def trained(config: TrainConfig) -> Any:
    return run(config, silent())


def stages(config: TrainConfig) -> Job:
    """A run up to the point where it would train."""
    job = Job(config, silent())
    with quiet():
        job.prepare()
    return job


# ---- a whole run -----------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_its_files(files: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    output = tmp_path / "out"
    kept: list[Any] = []
    console = silent()
    config = settings(files, output, eval_every=6, save_every=5, tensorboard=True, sample_prompts=("hello",))
    result = run(config, console, on_finished=lambda model, _: kept.append(model))
    assert result.loss_before is not None and result.loss_after is not None
    assert result.loss_after < result.loss_before - 0.1
    names = {path.name for path in output.iterdir()}
    assert names >= {"run.yaml", "adapter", "metrics.jsonl", "loss.png", "result.json", "samples.md", "samples.json"}
    assert names >= {"tensorboard", "checkpoint-10", "checkpoint-12"}
    assert "checkpoint-5" not in names  # two are kept
    assert not any(path.suffix in (".pt", ".pth", ".bin", ".pkl") for path in output.rglob("*"))

    records = read_metrics(output / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 6, 12]
    assert records[0]["eval_loss"] == result.loss_before
    assert (output / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((output / "result.json").read_text())["loss_after"] == result.loss_after
    assert [sample.prompt for sample in result.samples][1:] == ["hello"]
    assert result.samples[0].expected
    assert from_sources(output / "run.yaml", {}) == config

    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        ours = kept[0](ids.to(kept[0].device)).logits.cpu()
        base = AutoModelForCausalLM.from_pretrained(files["model"])
        theirs = PeftModel.from_pretrained(base, str(result.adapter)).eval()(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # sums of 48 products below 1, twice a layer
    with lora.disable_adapters(kept[0]), torch.no_grad():
        assert (kept[0](ids.to(kept[0].device)).logits.cpu() - ours).abs().max() > 1e-2  # the adapter does something
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "held-out loss" in text and "tokens/s" in text and "left" in text
    assert not set("\x1b\r\x07\b") & set(text)


def test_nothing_but_the_run_speaks(files: dict[str, Path], tmp_path: Path, capfd: Any, recwarn: Any) -> None:
    trained(settings(files, tmp_path / "out", max_steps=2, samples=1))
    seen = capfd.readouterr()
    assert (seen.out, seen.err) == ("", "")
    assert [str(w.message) for w in recwarn] == []


def test_a_run_that_diverges_stops_and_says_so(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        LoRAError, match=r"the loss is (nan|inf) after step \d+: training has diverged. Lower lr \(1e\+20"
    ):
        trained(settings(files, tmp_path / "out", lr=1e20, warmup=0.0))
    assert not (tmp_path / "out" / "adapter").exists()
    records = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert "NaN" not in records and "Infinity" not in records


def test_text_without_a_chat_template(files: dict[str, Path], tmp_path: Path) -> None:
    with quiet():
        model = save_tiny_model(tmp_path / "plain", chat=False)
    (tmp_path / "d.txt").write_text("one two three four . " * 60)
    console = silent()
    config = settings(
        {**files, "model": model, "data": tmp_path / "d.txt"}, tmp_path / "out", max_length=16, max_steps=2
    )
    result = run(config, console)
    assert result.train_examples == 17  # 270 tokens and the end token, 16 each
    assert result.samples[0].prompt.split()[:2] == ["one", "two"]
    assert "were cut" not in console.file.getvalue()  # type: ignore[attr-defined]
    chat = write_jsonl(tmp_path / "c.jsonl", [{"messages": [{"role": "assistant", "content": "hello"}]}] * 9)
    with pytest.raises(LoRAError, match="conversations, but the tokenizer has no chat template"):
        trained(settings({**files, "model": model, "data": chat}, tmp_path / "out2"))


def test_nf4_and_checkpointing_train(files: dict[str, Path], tmp_path: Path) -> None:
    plain = trained(settings(files, tmp_path / "a", max_steps=3))
    assert (
        trained(settings(files, tmp_path / "b", max_steps=3, checkpointing="recompute")).loss_after == plain.loss_after
    )
    quantised = trained(settings(files, tmp_path / "c", max_steps=3, quantization="nf4"))
    assert quantised.loss_after is not None and quantised.loss_before is not None
    assert quantised.loss_after < quantised.loss_before
    assert quantised.loss_before != plain.loss_before  # its weights are others
    assert quantised.parameters == plain.parameters


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_checkpointing_for_a_memory_budget(files: dict[str, Path], tmp_path: Path, backend: str) -> None:
    short = {"max_steps": 3, "backend": backend, "lora_dropout": 0.1, "samples": 0}
    plain = trained(settings(files, tmp_path / "a", **short))
    console = silent(200)
    planned = settings(files, tmp_path / "b", checkpointing="auto", memory_budget="1KiB", **short)
    with pytest.raises(LoRAError, match=r"give at least [0-9,]+ bytes, or a smaller batch") as error:
        run(planned, console)
    (tmp_path / "b" / "run.yaml").write_text("an earlier run")
    with pytest.raises(LoRAError, match="give at least"):
        run(planned.replace(overwrite=True), console)
    assert (tmp_path / "b" / "run.yaml").read_text() == "an earlier run"  # what is refused replaces nothing
    least = re.search(r"give at least ([0-9,]+) bytes", str(error.value))
    assert least is not None
    enough = planned.replace(memory_budget=int(least[1].replace(",", "")), overwrite=True, tensorboard=True)
    assert run(enough, console).loss_after == plain.loss_after
    assert any((tmp_path / "b" / "tensorboard").iterdir())
    assert re.search(r"memory +.*recompute in \d blocks.*: peak", console.file.getvalue())  # type: ignore[attr-defined]


def test_a_budget_is_a_flag_too() -> None:
    assert parse_flag("memory_budget", "6GiB") == "6GiB" and parse_flag("memory_budget", "4096") == 4096


def test_the_largest_batch_is_the_longest_examples(files: dict[str, Path], tmp_path: Path) -> None:
    job = stages(settings(files, tmp_path / "out"))
    lengths = sorted(len(row["input_ids"]) for row in job.trainer.train_dataset)
    batch = job.trainer.largest_batch()
    assert batch["input_ids"].shape == batch["labels"].shape == (4, lengths[-1])
    assert sorted(batch["attention_mask"].sum(1).tolist()) == lengths[-4:]
    assert (batch["labels"] == batch["input_ids"]).all()  # the loss takes the most where every token is learnt


# ---- labels, loss and normalisation ----------------------------------------------------------------------------


def test_only_completions_are_learnt(files: dict[str, Path], tmp_path: Path) -> None:
    job = stages(settings(files, tmp_path / "a"))
    tokenizer, example = job.tokenizer, job.trainer.train_dataset[0]
    learnt = [token for token in example["labels"] if token != -100]
    completion = job.data.train[0]["completion"]
    assert tokenizer.decode(learnt) == f"{completion}<|im_end|>".replace("<|im_end|>", " <|im_end|>")
    assert tokenizer.decode(example["input_ids"]).startswith("<|im_start|> user what is")
    whole = stages(settings(files, tmp_path / "b", completion_only=False))
    labels = whole.trainer.train_dataset[0]["labels"]
    assert labels == whole.trainer.train_dataset[0]["input_ids"]


def test_each_assistant_turn_is_learnt_once(files: dict[str, Path], tmp_path: Path) -> None:
    said = ["hello", "bye", "what is one ?", "the colour red ."]
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, said, strict=True)]
    data = write_jsonl(tmp_path / "d.jsonl", [{"messages": messages}] * 2)
    job = stages(settings({**files, "data": data}, tmp_path / "out", eval_fraction=0.5))
    learnt = [
        job.tokenizer.decode([token for token in row["labels"] if token != -100]) for row in job.trainer.train_dataset
    ]
    assert learnt == ["bye <|im_end|>", "the colour red . <|im_end|>"]


def test_cut_and_dropped_examples_are_counted(files: dict[str, Path], tmp_path: Path) -> None:
    longer = [{"prompt": "one " * 40, "completion": "two"}, {"prompt": "one", "completion": "two " * 40}]
    data = write_jsonl(tmp_path / "d.jsonl", [*rows(8), *longer])
    console = silent()
    job = Job(settings({**files, "data": data}, tmp_path / "out", max_length=24, eval_fraction=0), console)
    with quiet():
        job.prepare()
    assert job.trainer.prepared["train"][:3] == (9, 2, 1)
    assert "2 training examples were longer than 24 tokens and were cut" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "1 training examples have nothing to learn" in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(LoRAError, match="no example of the training data has a token to learn within max_length=5"):
        stages(settings({**files, "data": data}, tmp_path / "b", max_length=5, eval_fraction=0))


def token_mean(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


def batch_of(vocab: int = 64, sequences: int = 3, tokens: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, vocab, (sequences, tokens))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :4] = -100
    labels[0, 6:], mask[0, 6:] = -100, 0  # padding
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@pytest.mark.parametrize("case", ["llama", "pieces", "head adapted", "head saved", "gemma2", "granite", "odd"])
def test_next_token_loss_is_the_models_own(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    targets: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"]} if case == "head adapted" else {}
    if case == "gemma2":
        config = transformers.Gemma2Config(**sizes, final_logit_softcapping=0.05, pad_token_id=0)
        model: Any = transformers.Gemma2ForCausalLM(config).eval()
    elif case == "granite":
        model = transformers.GraniteForCausalLM(transformers.GraniteConfig(**sizes, logits_scaling=7.0)).eval()
    else:
        model = tiny_llama()
    if case == "odd":  # a head that does more than its config says
        model.lm_head.register_forward_hook(lambda module, args, output: 3 * output)
    if case == "pieces":
        monkeypatch.setattr("lora.train.loss.LOGITS_AT_ONCE", 5 * 64)
    if case == "head saved":
        targets = {"modules_to_save": ["lm_head"]}
    lora.inject(model, lora.LoRAConfig(r=3, init_lora_weights=False, **targets))
    loss, batch = NextTokenLoss(model), batch_of()
    assert loss.fused == (case != "odd")
    found = loss(batch, int((batch["labels"][:, 1:] != -100).sum()))
    expected = token_mean(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    parameters = list(lora.trainable_parameters(model))
    gradients, wanted = (torch.autograd.grad(value, parameters) for value in (found, expected))
    for one, other in zip(gradients, wanted, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.filterwarnings("ignore:Every label of a batch")
@pytest.mark.parametrize("fused", [True, False], ids=["through the head", "the model's logits"])
@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_a_batch_without_labels_teaches_nothing(backend: str, fused: bool) -> None:
    model = lora.inject(tiny_llama(), lora.LoRAConfig(r=3, init_lora_weights=False))
    batch = batch_of()
    batch["labels"][:] = -100
    with lora.use_backend(backend):
        loss = NextTokenLoss(lora.for_training(model), fused)(batch, 0)
        loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in lora.trainable_parameters(model))


def test_accumulation_normalises_by_tokens(files: dict[str, Path], tmp_path: Path) -> None:
    uneven = [{"prompt": "what ?", "completion": "one " * (1 + 9 * (i % 2))} for i in range(8)]
    data = write_jsonl(tmp_path / "d.jsonl", uneven)
    gradients = []
    for batch_size, steps in ((8, 1), (1, 8)):
        options = {"batch_size": batch_size, "grad_accumulation": steps, "max_steps": 1, "eval_fraction": 0}
        job = stages(settings({**files, "data": data}, tmp_path / str(steps), **options))
        trainer, batches = job.trainer, iter(job.trainer.get_train_dataloader())
        samples, count = trainer.get_batch_samples(batches, steps, torch.device("cpu"))
        assert int(count) == 4 * 2 + 4 * 11  # the words and the end token of each completion
        trainer.current_gradient_accumulation_steps = len(samples)
        with quiet():
            trainer.optimizer = None
            for sample in samples:
                trainer.training_step(job.model, sample, count)
        gradients.append(torch.cat([p.grad.flatten() for p in lora.trainable_parameters(job.model)]))
    whole, accumulated = gradients
    scale = float(whole.abs().max())
    torch.testing.assert_close(accumulated, whole, rtol=0, atol=1e-5 * scale)
    assert scale > 0


def test_packed_examples_do_not_see_each_other(files: dict[str, Path], tmp_path: Path) -> None:
    plain = stages(settings(files, tmp_path / "a", eval_fraction=0.3, batch_size=1))
    packed = stages(settings(files, tmp_path / "b", eval_fraction=0.3, batch_size=1, packing=True, max_length=64))
    assert len(packed.trainer.eval_dataset) < len(plain.trainer.eval_dataset) / 3
    one, other = plain.trainer.held_out_loss(), packed.trainer.held_out_loss()
    assert one.tokens == other.tokens
    assert other.loss == pytest.approx(one.loss, rel=1e-5)  # a leak of attention moves it by 1e-2


def test_held_out_loss_is_a_mean_over_tokens(files: dict[str, Path], tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "h.jsonl", [{"prompt": "one", "completion": "two " * n} for n in (1, 1, 1, 30)])
    losses = []
    for batch_size in (1, 4):
        job = stages(settings(files, tmp_path / str(batch_size), eval_data=str(held), batch_size=batch_size))
        state = torch.get_rng_state()
        losses.append(job.trainer.held_out_loss())
        assert torch.equal(torch.get_rng_state(), state)
        assert job.model.training
    assert losses[0].tokens == losses[1].tokens == 33 + 4
    assert losses[0].loss == pytest.approx(losses[1].loss, rel=1e-5)


# ---- checkpoints and resuming ----------------------------------------------------------------------------------


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends the process SIGINT, as Ctrl-C does, in the given step."""
    original = Control.on_step_end

    def on_step_end(self: Control, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(Control, "on_step_end", on_step_end)


def history(output: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_metrics(output / "metrics.jsonl")]


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.2},
        {"lora_dropout": 0.2, "log_every": 5, "eval_every": 4, "scheduler": "cosine", "backend": "auto"},
        {"init_lora_weights": "pissa", "use_dora": True, "packing": True, "max_length": 32},
    ],
    ids=["dropout", "sparse log, auto", "pissa, dora, packed"],
)
def test_an_interrupted_run_goes_on_bit_for_bit(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    straight = trained(settings(files, tmp_path / "a", **options))
    with monkeypatch.context() as patch:
        interrupt_after(7, patch)  # in the middle of an epoch, and of five logged steps
        with pytest.raises(InterruptedRunError, match="checkpoint-7 is saved: --resume"):
            trained(settings(files, tmp_path / "b", **options))
    assert not (tmp_path / "b" / "adapter").exists()
    resumed = trained(settings(files, tmp_path / "b", resume=True, **options))
    assert history(tmp_path / "b") == history(tmp_path / "a")
    one, other = (load_file(r.adapter / "adapter_model.safetensors") for r in (straight, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (resumed.loss_after, resumed.tokens) == (straight.loss_after, straight.tokens)
    assert resumed.samples == straight.samples


@pytest.fixture(scope="module")
def half_way(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that stopped after its sixth step, with checkpoints 3 and 6."""
    output = tmp_path_factory.mktemp("half") / "out"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(6, patch)
        with pytest.raises(InterruptedRunError):
            trained(settings(files, output, save_every=3))
    return output


TORN = {
    "cut short": ("parameters.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes instead of"),
    "a flipped bit": (
        "optimizer.safetensors",
        lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
        "other contents",
    ),
    "a missing file": ("state.json", lambda file: file.unlink(), "state.json is missing"),
    "no manifest": ("manifest.json", lambda file: file.unlink(), "manifest.json is missing or damaged"),
    "an empty manifest": ("manifest.json", lambda file: file.write_text("{}"), "manifest.json is missing or damaged"),
    "a path outside": (
        "manifest.json",
        lambda file: file.write_text(file.read_text().replace("state.json", "../x", 1)),
        "manifest.json has other contents than were written",
    ),
}


@pytest.mark.parametrize("case", TORN)
def test_a_torn_checkpoint_is_passed_over(half_way: Path, tmp_path: Path, case: str) -> None:
    output = tmp_path / "out"
    shutil.copytree(half_way, output)
    assert checkpoint.newest(output) == (output / "checkpoint-6", [])
    name, tear, reason = TORN[case]
    tear(output / "checkpoint-6" / name)
    path, passed_over = checkpoint.newest(output)
    assert path == output / "checkpoint-3"
    assert len(passed_over) == 1
    assert "checkpoint-6 is not whole" in passed_over[0]
    assert reason in passed_over[0]


def test_resuming_from_an_older_checkpoint_ends_the_same(
    files: dict[str, Path], half_way: Path, tmp_path: Path
) -> None:
    straight = trained(settings(files, tmp_path / "a", save_every=3))
    shutil.copytree(half_way, tmp_path / "b")
    (tmp_path / "b" / "checkpoint-6" / "random.safetensors").unlink()
    (tmp_path / "b" / ".unfinished-checkpoint").mkdir()  # what a crash while saving leaves
    console = silent()
    resumed = run(settings(files, tmp_path / "b", save_every=3, resume=True), console)
    assert "checkpoint-6 is not whole (random.safetensors is missing)" in console.file.getvalue()  # type: ignore[attr-defined]
    assert history(tmp_path / "b") == history(tmp_path / "a")
    assert resumed.loss_after == straight.loss_after


CHANGED = {
    "rate": ({"lr": 1e-3}, "lr: 0.01 then, 0.001 now"),
    "rank": ({"r": 8}, "r: 4 then, 8 now"),
    "targets": ({"target_modules": ("q_proj",)}, "target_modules: 'all-linear' then, \\['q_proj'\\] now"),
    "dropout": ({"lora_dropout": 0.5}, "lora_dropout: 0.0 then, 0.5 now"),
    "seed": ({"seed": 1}, "seed: 0 then, 1 now"),
    "batch": ({"batch_size": 2}, "batch_size: 4 then, 2 now"),
    "steps": ({"max_steps": 99}, "max_steps: 12 then, 99 now"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_changed_settings_are_refused_at_resume(
    files: dict[str, Path], half_way: Path, tmp_path: Path, case: str
) -> None:
    options, said = CHANGED[case]
    shutil.copytree(half_way, tmp_path / "out")
    with pytest.raises(LoRAError, match=said):
        trained(settings(files, tmp_path / "out", save_every=3, resume=True, **options))


def test_changed_data_or_base_weights_are_refused_at_resume(
    files: dict[str, Path], half_way: Path, tmp_path: Path
) -> None:
    shutil.copytree(half_way, tmp_path / "out")
    job = stages(settings(files, tmp_path / "out", resume=True))
    record, path = job.trainer.run, tmp_path / "out" / "checkpoint-6"
    checkpoint.check_same_run(path, record)
    with pytest.raises(LoRAError, match="the training data: other examples"):
        checkpoint.check_same_run(path, {**record, "data": "other"})
    with torch.no_grad():
        job.model.model.norm.weight[0] += 1e-3
    with pytest.raises(LoRAError, match="the base model's weights: others"):
        checkpoint.check_same_run(path, {**record, "base": checkpoint.base_fingerprint(job.model)})


def test_tensors_of_another_shape_are_refused_before_anything_is_loaded(
    files: dict[str, Path], half_way: Path, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint-6"
    shutil.copytree(half_way / "checkpoint-6", path)
    saved = load_file(path / "parameters.safetensors")
    first, *_, last = sorted(saved)
    saved[last] = saved[last][:-1].clone()
    save_file({name: tensor + 1 for name, tensor in saved.items()}, path / "parameters.safetensors")
    model = lora.inject(lora.load(files["model"])[0], lora.LoRAConfig(r=4))
    before = model.get_parameter(first).clone()
    with pytest.raises(LoRAError, match=f"{last} is .* expected"):
        checkpoint.load_parameters(model, path)
    assert torch.equal(model.get_parameter(first), before)


def test_an_earlier_run_is_not_replaced_unasked(files: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    trained(settings(files, output, max_steps=1))
    (output / "mine.txt").write_text("keep")
    with pytest.raises(LoRAError, match=r"holds an earlier run .*--resume .*--overwrite"):
        trained(settings(files, output, max_steps=1))
    kept = sorted(path.name for path in output.iterdir())
    none = output / "none"
    for there, options in (
        (files | {"data": none}, {}),
        (files | {"model": none}, {}),
        (files, {"target_modules": "none"}),
    ):
        with pytest.raises(LoRAError):  # a typing error must not cost the earlier run
            trained(settings(there, output, max_steps=1, overwrite=True, **options))
        assert sorted(path.name for path in output.iterdir()) == kept
    trained(settings(files, output, max_steps=1, overwrite=True))
    assert (output / "mine.txt").read_text() == "keep"
    (tmp_path / "file").write_text("")
    with pytest.raises(LoRAError, match="is a file, expected a directory"):
        trained(settings(files, tmp_path / "file", max_steps=1))


# ---- the config ------------------------------------------------------------------------------------------------

BAD = {
    "no model": ({"model": ""}, "model is missing"),
    "no data": ({"data": ""}, "data is missing"),
    "rank zero": ({"r": 0}, "r is 0, expected an integer >= 1"),
    "rank as text": ({"r": "eight"}, "r is 'eight', expected an integer"),
    "rank as a fraction": ({"r": 1.5}, "r is 1.5, expected an integer"),
    "rank true": ({"r": True}, "r is True, expected an integer"),
    "negative rate": ({"lr": -1.0}, "lr is -1.0, expected a number > 0"),
    "infinite rate": ({"lr": float("inf")}, "lr is inf, expected a finite number"),
    "rate in words": ({"lr": "fast"}, "lr is 'fast', expected a number"),
    "scheduler": ({"scheduler": "cosin"}, "Did you mean 'cosine'"),
    "dtype": ({"dtype": "float16"}, "expected one of 'auto', 'float32', 'bfloat16'"),
    "quantization": ({"quantization": "int8"}, "expected one of 'none', 'nf4'"),
    "checkpointing": ({"checkpointing": "recomput"}, "Did you mean 'recompute'"),
    "budget without auto": (
        {"memory_budget": "6GiB"},
        "checkpointing is 'none' and memory_budget is '6GiB': .*give both",
    ),
    "auto without budget": (
        {"checkpointing": "auto"},
        "checkpointing is 'auto' and memory_budget is None: .*give both",
    ),
    "budget in words": (
        {"checkpointing": "auto", "memory_budget": "much"},
        "budget is 'much', expected a number of bytes",
    ),
    "backend": ({"backend": "fst"}, "Did you mean 'fast'"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
    "init": ({"init_lora_weights": "pisa"}, "Did you mean 'pissa'"),
    "share": ({"eval_fraction": 1.0}, "eval_fraction is 1.0, expected a share"),
    "warm-up": ({"warmup": 5}, "warmup is 5, expected a share"),
    "batch": ({"batch_size": 0}, "batch_size is 0"),
    "steps": ({"max_steps": 0}, "max_steps is 0"),
    "length": ({"max_length": 1}, "max_length is 1, expected at least 2"),
    "flag in words": ({"packing": "sometimes"}, "packing is 'sometimes', expected true or false"),
    "seed": ({"seed": -1}, "seed is -1"),
    "large seed": ({"seed": 2**32}, "below 2"),
    "names with numbers": ({"target_modules": [1, 2]}, "expected a list of names"),
    "pattern": ({"rank_pattern": ["q_proj"]}, "rank_pattern is .* expected a mapping"),
    "resume and overwrite": ({"resume": True, "overwrite": True}, "exclude each other"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case: str) -> None:
    options, said = BAD[case]
    with pytest.raises(LoRAError, match=said):
        TrainConfig(**({"model": "m", "data": "d"} | options))


YAML = {
    "unknown field": ("learning_rate: 1\n", "'learning_rate', which is no field"),
    "misspelt field": ("epoch: 1\n", "Did you mean 'epochs'"),
    "no mapping": ("- lr\n", "holds a list"),
    "not YAML": ("lr: [1\n", "c.yaml:2 is not YAML"),
    "wrong type": ("batch_size: many\n", "batch_size is 'many', expected an integer"),
}


@pytest.mark.parametrize("case", YAML)
def test_bad_yaml(tmp_path: Path, case: str) -> None:
    text, said = YAML[case]
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(LoRAError, match=said):
        from_sources(tmp_path / "c.yaml", {"model": "m", "data": "d"})


def test_yaml_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: m\ndata: d\nlr: 1e-4\nr: 16\nlora_alpha: 32\ntarget_modules: [q_proj, v_proj]\n")
    config = from_sources(path, {"r": 4})
    assert (config.lr, config.r, config.lora_alpha, config.target_modules) == (1e-4, 4, 32, ("q_proj", "v_proj"))
    assert config.lora_config() == lora.LoRAConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    path.write_text(as_yaml(config))
    assert from_sources(path, {}) == config
    with pytest.raises(LoRAError, match="does not exist"):
        from_sources(tmp_path / "none.yaml", {})


def test_flags_are_read_by_type() -> None:
    assert parse_flag("lr", "1e-4") == 1e-4
    assert parse_flag("r", "8") == 8
    assert parse_flag("rank_pattern", "q_proj=16,v_proj=4") == {"q_proj": 16, "v_proj": 4}
    assert parse_flag("layers_to_transform", "0,2") == (0, 2)
    assert parse_flag("modules_to_save", "lm_head") == ("lm_head",)
    assert parse_flag("init_lora_weights", "false") is False
    assert parse_flag("init_lora_weights", "pissa") == "pissa"
    names = TrainConfig(model="m", data="d", target_modules="q_proj, v_proj").target_modules
    assert names == ("q_proj", "v_proj")
    assert TrainConfig(model="m", data="d", target_modules=".*q_proj").target_modules == ".*q_proj"
    with pytest.raises(LoRAError, match="name=number pairs"):
        parse_flag("alpha_pattern", "q_proj")


# ---- answers ---------------------------------------------------------------------------------------------------


def test_prompts_are_rendered_as_the_chat_template_does() -> None:
    tokenizer = tiny_tokenizer()
    said = "<|im_start|>user hello<|im_end|><|im_start|>assistant "
    assert render(tokenizer, "hello", chat=True) == said
    assert render(tokenizer, "hello", chat=False) == "hello"
    assert render(tokenizer, [{"role": "user", "content": "hello"}], chat=False) == said
    with pytest.raises(LoRAError, match="has no chat template"):
        render(tiny_tokenizer(chat=False), "hello", chat=True)


def test_greedy_answers_are_the_likeliest_tokens_and_leave_the_model_in_its_mode(files: dict[str, Path]) -> None:
    model, tokenizer = lora.load(files["model"])
    lora.inject(model, lora.LoRAConfig(r=4, lora_dropout=0.5, init_lora_weights=False))
    lora.for_training(model)
    with quiet():
        (text,) = answer(model, tokenizer, ["one two"], max_new_tokens=6, chat=False)
    assert model.training and model.model.layers[0].self_attn.q_proj.training
    ids, ended = tokenizer("one two", return_tensors="pt")["input_ids"], False
    model.eval()
    with torch.no_grad():
        for _ in range(6):
            following = model(ids).logits[:, -1:].argmax(-1)
            ended = ended or following.item() == tokenizer.eos_token_id
            ids = ids if ended else torch.cat([ids, following], dim=1)
    assert text == tokenizer.decode(ids[0, 2:], skip_special_tokens=True).strip()
    assert tokenizer.padding_side == "right"


# ---- small parts -----------------------------------------------------------------------------------------------


def test_clock_and_running_mean() -> None:
    assert [clock(s) for s in (0, 5, 65, 3661, -1)] == ["0:00", "0:05", "1:05", "1:01:01", "0:00"]
    assert running_mean([2.0] * 60) == pytest.approx([2.0] * 60)  # corrected for its start
    assert running_mean([1.0, 5.0]) == [1.0, 5.0]  # too few to smooth


def test_a_metrics_file_that_was_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_the_models_own_forward_is_left_alone(files: dict[str, Path], tmp_path: Path) -> None:
    job = stages(settings(files, tmp_path / "out"))
    assert "forward" not in vars(job.model)
    assert isinstance(job.data, Data)
    assert tiny_tokenizer().chat_template == job.tokenizer.chat_template
