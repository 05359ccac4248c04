"""lora plan: what it predicts is what a step takes, from a config alone; its constants are what was measured."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from test_planner import tiny_gemma3
from tiny import tiny_llama

import lora
from benchmarks import planning
from lora import LoRAConfig, LoRAError, cli, gpus, models
from lora.dry_run import WithoutNumbers, rehearse
from lora.fast.workspace import release_workspaces
from lora.forecast import forecast
from lora.gpus import card_named
from lora.measure import measure
from lora.planner import largest_moment, planned
from lora.skeleton import held_by, skeleton
from lora.train.loss import NextTokenLoss

CSV = Path(__file__).parents[1] / "docs" / "benchmarks" / "h100.csv"
MIDDLE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 2000}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 8000}
LONG = {"max_position_embeddings": 512}


def tiny_qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=16, vocab_size=512))


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # with one that pads, its forward looks for it
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=3, n_head=4, n_positions=256, vocab_size=512, **tokens))


MODELS = {
    "tiny": lambda: tiny_llama(**LONG),
    "middle": lambda: tiny_llama(**MIDDLE, **LONG),
    "wide": lambda: tiny_llama(**WIDE, **LONG, tie_word_embeddings=True),
    "gemma3": tiny_gemma3,
    "qwen3": tiny_qwen3,
    "gpt2": tiny_gpt2,
}


def directory_of(model, path: Path) -> str:
    """The model's config in a directory of its own: no weights."""
    model.config.save_pretrained(path)
    return str(path)


def live(model, quantization: str, rank: int):
    if quantization == "nf4":
        lora.quantize(model)
    return lora.inject(model, LoRAConfig(r=rank))


# ---- memory


@pytest.mark.parametrize(
    ("backend", "name", "quantization", "checkpointing", "batch", "seq", "rank"),
    [
        ("fast", "middle", "none", "none", 2, 128, 8),
        ("fast", "middle", "none", "recompute", 2, 128, 8),
        ("fast", "middle", "none", "selective", 4, 64, 32),
        ("fast", "middle", "nf4", "recompute", 1, 256, 64),
        ("fast", "wide", "none", "none", 3, 32, 4),
        ("fast", "gemma3", "none", "none", 4, 64, 4),
        ("auto", "qwen3", "none", "recompute", 2, 100, 4),
        ("auto", "gpt2", "none", "none", 2, 100, 4),
        ("reference", "gpt2", "none", "recompute", 2, 64, 4),
        ("reference", "gpt2", "none", "selective", 2, 64, 4),
        ("reference", "middle", "none", "none", 2, 128, 8),
        ("reference", "wide", "nf4", "recompute", 2, 64, 16),
    ],
)
def test_the_peak_is_within_a_tenth_of_the_allocators(
    tmp_path, backend, name, quantization, checkpointing, batch, seq, rank
):
    """The measure is PyTorch's profiler, told by the allocator of every block; the planner has no part in it."""
    settings = {"quantization": quantization, "checkpointing": checkpointing, "batch": batch, "seq": seq, "rank": rank}
    with lora.use_backend(backend):
        found = forecast(directory_of(MODELS[name](), tmp_path), gpu="cpu", dtype="float32", **settings)
        model = live(MODELS[name](), quantization, rank)
        lora.for_training(model, checkpointing)
        measured = planning.measured_peak(model, batch, seq)
    assert found.peak == pytest.approx(measured, rel=0.1)
    held = sum(found.memory[key] for key in ("frozen weights", "NF4 weights", "adapters"))
    assert held == planning.resting_bytes(model)
    assert found.peak - held == pytest.approx(measured - held, rel=0.1)  # without what is easily counted


@pytest.mark.parametrize(
    ("backend", "name", "quantization"),
    [
        ("reference", "gemma3", "none"),
        ("fast", "gemma3", "nf4"),
        ("fast", "qwen3", "none"),
        ("reference", "tiny", "nf4"),
    ],
)
def test_a_step_without_numbers_is_measured_as_a_live_one_is(backend, name, quantization):
    """Byte for byte, block by block. (The reference decodes NF4 otherwise without numbers.)"""
    release_workspaces()  # other tests'
    ids = torch.ones((2, 24), dtype=torch.long)
    with lora.use_backend(backend):
        model = live(MODELS[name](), quantization, 4)
        lora.for_training(model)
        loss = NextTokenLoss(model)
        expected = measure(model, {"input_ids": ids, "labels": ids}, lambda **x: loss(x, ids.numel()))
        outline = models.Outline(MODELS[name]().config, None, False)
        bare = skeleton(outline, name, LoRAConfig(r=4), quantization, torch.float32)
        lora.for_training(bare)
        found = rehearse(bare, 2, 24, "cpu").measured
        for one, other in zip(found.blocks, expected.blocks, strict=True):
            kept = ("path", "input", "saved", "selective", "arithmetic", "attention_arithmetic", "spared", "calls")
            assert [getattr(one, key) for key in kept] == [getattr(other, key) for key in kept]
            if quantization == "none" or backend == "fast":
                assert (one.working, one.working_again) == (other.working, other.working_again)
        if quantization == "none" or backend == "fast":
            assert found.constant == expected.constant
            assert found.loss_working == pytest.approx(expected.loss_working, abs=8)  # a count that was looked at
        assert held_by(bare) == held_by(model)
        everything = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
        assert sum(held_by(bare)[:3]) == everything


def test_waiting_gradients_are_those_that_a_plan_is_made_for(tmp_path):
    outline = models.Outline(MODELS["middle"]().config, None, False)
    bare = skeleton(outline, "middle", LoRAConfig(r=64), "none", torch.float32)
    lora.for_training(bare)
    measured, held = rehearse(bare, 2, 32, "cpu").measured, held_by(bare)
    gradients = {b.path: sum(p.nbytes for p in bare.get_submodule(b.path).parameters() if p.requires_grad)
                 for b in measured.blocks}  # fmt: skip
    for modes in (["none"], ["recompute"], ["none", "recompute"]):
        plan = planned(measured, 1 << 40, modes)
        plan = planned(measured, (plan.leanest + plan.peak) // 2 if plan.leanest < plan.peak else plan.peak, modes)
        assert largest_moment(measured, plan, gradients, held.trained, waiting=True).need == plan.peak
        sooner = largest_moment(measured, plan, gradients, held.trained, waiting=False)
        assert plan.peak - held.trained <= sooner.need < plan.peak
    model = live(MODELS["middle"](), "none", 64)
    with lora.use_backend("reference"):
        lora.for_training(model, "recompute")
        step = planning.train_step(model, 2, 32)
        loss = NextTokenLoss(model)
        ids = torch.ones((2, 32), dtype=torch.long)

        def accumulated() -> None:
            for _ in range(2):
                loss({"input_ids": ids, "labels": ids}, 64).backward()

        step()
        measured_peak = planning.resting_bytes(model) + 2 * held.trained + planning.allocated_peak(accumulated)
        found = forecast(directory_of(MODELS["middle"](), tmp_path), gpu="cpu", seq=32, batch=2, rank=64,
                         checkpointing="recompute", grad_accumulation=2)  # fmt: skip
    assert found.peak == pytest.approx(measured_peak, rel=0.1)


def test_gradients_come_block_by_block(tmp_path):
    """At a high rank and with recomputation the peak is in a block, when later ones have theirs only."""
    with lora.use_backend("fast"):
        found = forecast(directory_of(MODELS["qwen3"](), tmp_path), gpu="cpu", seq=64, batch=1, rank=32,
                         checkpointing="recompute")  # fmt: skip
        model = live(MODELS["qwen3"](), "none", 32)
        lora.for_training(model, "recompute")
        measured = planning.measured_peak(model, 1, 64)
    assert found.peak == pytest.approx(measured, rel=0.03)  # 5% over, were all of them there


def rows_of(part: str) -> list[dict[str, str]]:
    with open(CSV, newline="") as file:
        return [row for row in csv.DictReader(file) if row["part"] == part]


def page_rows(part: str) -> list[list[str]]:
    """The cells of a generated table of the page, without its head."""
    text = planning.PAGE.read_text(encoding="utf-8").split(f"<!-- {part}: generated by")[1].split("<!-- end of")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_s_measurements_are_within_a_tenth_of_what_is_predicted_today():
    """At least five configurations of a real model; of one what the page says was predicted is predicted today, too."""
    rows = page_rows("cpu")
    assert len(rows) == len(planning.CASES) >= 5
    for case, cells in zip(planning.CASES, rows, strict=True):
        base = "NF4" if case.quantization == "nf4" else "float32"
        assert cells[:5] == [case.backend, base, case.checkpointing, f"{case.batch} x {case.seq}", str(case.rank)]
        predicted, measured = (int(cell.replace(",", "")) for cell in cells[5:7])
        assert predicted == pytest.approx(measured, rel=0.1)
        if case == planning.CASES[4]:  # each takes seconds; threads, and libraries, may differ
            assert planning.predict(case).peak / 2**20 == pytest.approx(predicted, rel=0.01)


def test_the_page_s_times_on_an_h100_are_what_is_predicted_today():
    steps, rows = planning.measured_steps(), page_rows("h100")
    assert len(steps) == len(rows)
    found = planning.predicted_step(steps[6], planning.eight_billion())  # in NF4, with recomputation
    assert found.peak / 2**30 == pytest.approx(float(rows[6][3]), rel=0.01)
    assert 1e3 * found.time.seconds == pytest.approx(float(rows[6][6].replace(",", "")), rel=0.01)


def test_an_h100s_step_in_nf4_and_its_arithmetic():
    """The dearest to get right: the kernels' results, the decoding workspace, offloading's buffers are all in it."""
    row = next(r for r in planning.measured_steps() if r["name"] == "step nf4" and r["variant"] == "ours, recompute")
    found = planning.predicted_step(row, planning.eight_billion())
    assert found.peak == pytest.approx(int(row["peak_bytes"]) + int(row["base_bytes"]), rel=0.02)
    assert found.time.seconds == pytest.approx(float(row["median_s"]), rel=0.1) and found.time.bound == "arithmetic"
    again = sum(block.again for block in found.plan.blocks)
    assert found.time.flops - again == pytest.approx(float(row["flops"]), rel=0.03)  # counted by another formula
    assert found.held.parameters == pytest.approx(8.03e9, rel=0.001)


def test_the_shares_are_what_was_measured():
    sheet = gpus.SHEETS["h100"]
    copy = max(float(r["bytes"]) / float(r["median_s"]) for r in rows_of("ceilings") if r["name"] == "copy")
    product = max(float(r["flops"]) / float(r["median_s"]) for r in rows_of("ceilings") if r["name"] == "gemm")
    step, alone = (
        next(r for r in rows_of("steps") if (r["name"], r["variant"], r["shape"]) == ("step bf16", "ours, none", shape))
        for shape in ("4 x 2048", "1 x 2048")
    )
    rate = sheet.teraflops * 1e12
    assert pytest.approx(copy / sheet.gigabytes / 1e9, abs=5e-4) == gpus.COPY_SHARE
    assert pytest.approx(product / rate, abs=5e-4) == gpus.PRODUCT_SHARE
    assert pytest.approx(float(step["flops"]) / float(step["median_s"]) / rate, abs=5e-4) == gpus.STEP_SHARE
    assert pytest.approx(float(alone["median_s"]) / 32, abs=5e-6) == gpus.HOST_SECONDS


# ---- fitting


def test_a_budget_is_met_and_what_would_fit_does(tmp_path):
    source = directory_of(MODELS["qwen3"](), tmp_path)
    shape = {"seq": 256, "batch": 8, "reserve": 1 << 20}
    with lora.use_backend("fast"):
        roomy = forecast(source, gpu="4GiB", **shape)
        assert roomy.fits and set(roomy.plan.values()) == {"none"} and not roomy.would_fit
        tight = forecast(source, gpu=str(roomy.peak * 5 // 6), **shape)
        assert tight.fits and len(tight.modes()) > 1 and tight.peak <= roomy.peak * 5 // 6 - (1 << 20)
        assert "--checkpointing auto --memory-budget" in tight.train_options()
        never = forecast(source, gpu=str(tight.card.memory // 3), checkpointing="none", **shape)
        assert not never.fits and never.would_fit
        changes = [change for change, _ in never.would_fit]
        assert any(change.startswith("--batch") for change in changes)
        for change, peak in never.would_fit:
            words = change.replace("--", "").split()
            options = dict(zip(words[::2], words[1::2], strict=True))
            again = forecast(
                source, gpu=str(never.card.memory), reserve=1 << 20, checkpointing="auto",
                quantization=options.get("quantization", "none"), batch=int(options.get("batch", 8)),
                seq=int(options.get("seq", 256)),
            )  # fmt: skip
            assert again.fits and again.peak == peak
        text = str(never)
    assert "does not fit:" in text and f"would fit: {changes[0]}" in text


def test_longer_and_wider_takes_more(tmp_path):
    source = directory_of(MODELS["tiny"](), tmp_path)
    plain = forecast(source, gpu="h100", seq=32, batch=2)
    for more in ({"seq": 64}, {"rank": 16}):
        assert forecast(source, gpu="h100", **{"seq": 32, "batch": 2, **more}).peak > plain.peak
    assert plain.time.bound == "host" and forecast(source, gpu="h100", seq=32, dtype="float32").time is None
    fast, slow = (forecast(source, gpu=gpu, seq=512, batch=64).time for gpu in ("h100", "a100-40gb"))
    assert slow.arithmetic / fast.arithmetic == pytest.approx(989.4 / 312)
    assert slow.memory / fast.memory == pytest.approx(3350 / 1555)


# ---- sources


def test_the_packaged_models_config_is_read_from_its_gguf_file():
    outline = models.outline_of("smollm2-135m-instruct")
    bare = skeleton(outline, "smollm2", LoRAConfig(r=8), "none", torch.float32)
    assert held_by(bare).parameters == 134_515_008  # the head is the embedding, counted once
    assert not any(p.device.type != "meta" for p in bare.parameters())


def test_a_checkpoint_in_nf4_is_planned_in_nf4(tmp_path):
    config = MODELS["middle"]().config
    stated = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    sizes = {}
    for nested in (True, False):
        config.quantization_config = stated | {"bnb_4bit_use_double_quant": nested}
        config.save_pretrained(tmp_path)
        found = forecast(str(tmp_path), gpu="h100", seq=16, batch=1)
        assert found.settings["quantization"] == "nf4"
        sizes[nested] = found.memory["NF4 weights"]
    assert sizes[False] > sizes[True] > 0


# ---- the command


def test_the_command_prints_a_table_or_json(tmp_path, capsys):
    source = directory_of(MODELS["tiny"](), tmp_path)
    words = ["plan", source, "--seq", "64", "--batch", "2", "--rank", "4", "--gpu", "rtx4090"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    for part in ("frozen weights", "AdamW's moments", "working memory", "peak", "room", "checkpointing: none in 2"):
        assert part in text
    assert "bound by the host" in text and "fits. lora train" in text and "Ada architecture" in text
    assert max(len(line) for line in text.splitlines()) <= 250
    assert cli.main([*words, "--quantization", "nf4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["peak"] == sum(found["memory"].values()) and found["memory"]["NF4 weights"]
    assert found["time"]["step"] == max(found["time"][roof] for roof in ("arithmetic", "memory", "host"))
    assert found["settings"]["backend"] == "auto" and len(found["checkpointing"]) == 2


@pytest.mark.parametrize(("name", "positions"), [("tiny", None), ("gpt2", 256)])
def test_sequences_beyond_the_model_s_positions_are_said_to_be(tmp_path, capsys, name, positions):
    model = MODELS[name]()
    positions = positions or model.config.max_position_embeddings
    source = directory_of(model, tmp_path)
    for seq, told in ((positions, False), (positions + 1, True)):
        assert cli.main(["plan", source, "--seq", str(seq), "--batch", "1", "--gpu", "h100"]) == 0
        assert (f"note: the model is made for {positions:,} tokens" in capsys.readouterr().out) == told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h1000"], "gpu is 'h1000', which is not known. Did you mean 'h100' or 'h200'? Expected h100, h200,"),
        (["--gpu", "T4"], "compute capability 7.5: the kernels are for 8.0 and newer"),
        (["--gpu", "24 gallons"], "budget is '24 gallons', expected a number of bytes"),
        (["--gpu", "1GiB", "--reserve", "2GiB"], "reserve is 2,147,483,648 bytes, and 1GiB has 1,073,741,824"),
        (["--seq", "1"], "seq is 1, expected an integer >= 2"),
        (["--batch", "0"], "batch is 0, expected an integer >= 1"),
        (["--rank", "-3"], "rank is -3, expected an integer >= 1"),
        (["--grad-accumulation", "0"], "grad_accumulation is 0, expected an integer >= 1"),
        (["--gpu", "cpu", "--checkpointing", "offload"], "checkpointing is 'offload', which needs a GPU"),
        (["--quantisation", "nf4"], "there is no option '--quantisation'. Did you mean '--quantization'"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, capsys, words, message):
    assert cli.main(["plan", directory_of(MODELS["tiny"](), tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_models_that_cannot_be_counted(tmp_path, capsys):
    assert cli.main(["plan", str(tmp_path / "nowhere"), "--gpu", "h100"]) == 2
    assert "There is no file or directory" in capsys.readouterr().err


def test_a_step_that_looks_at_activations_is_refused():
    with WithoutNumbers("Router"):
        whole = torch.arange(6, device="meta").view(2, 3)
        assert int((whole[:, 1:] > 1).sum()) == 3 and [int(x) for x in whole[1]] == [3, 4, 5]
        whole[0].add_(10)  # in place, through a view
        assert int(whole.sum()) == 45 and len((whole > 11).nonzero()) == 1
        assert torch.zeros(2, 5, device="meta")[whole[:, 0] == 3].shape == (1, 5)
        activations = torch.rand(4, device="meta")
        for look in (lambda: bool(activations.sum() > 1), lambda: (activations > 0).nonzero()):
            with pytest.raises(LoRAError, match=r"Router looks at its activations .*lora.plan_checkpointing"):
                look()


def test_this_machines_memory_less_the_reserve():
    card = card_named("cpu")
    assert card.memory > card.reserve == 1 << 30 and card.flops is None
    assert card_named("NVIDIA H100").reserve == (1 << 30) + gpus.SHEETS["h100"].mib * (1 << 20) // 50
    assert card_named("24GiB", reserve="512MiB")[2:4] == (24 << 30, 512 << 20)
