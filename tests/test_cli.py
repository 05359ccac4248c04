"""The command line: each command end to end on a tiny local model, and each user's error in one line."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_experts import base as mixture
from tiny_text import rows, save_tiny_model, tiny_tokenizer, write_jsonl

import lora
from lora.cli import main
from lora.directories import merge_directory
from lora.nf4_layer import NF4Linear
from lora.train.config import HINTS
from lora.train.quiet import quiet

IDS = torch.arange(3, 20)[None]
HALF_ULP = 2.0**-9  # of bfloat16: the relative error of one rounding


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in four shards, a tied one, an adapter for each, and data."""
    root = tmp_path_factory.mktemp("cli")
    found = {"root": root, "data": write_jsonl(root / "data.jsonl", rows(20))}
    with quiet():
        found["model"] = save_tiny_model(root / "model", max_shard_size="20KB")
        found["tied"] = save_tiny_model(root / "tied", tie_word_embeddings=True, seed=1)
        for name, targets in (("model", "all-linear"), ("tied", ["embed_tokens", "q_proj"])):
            model, _ = lora.load(found[name])
            torch.manual_seed(5)
            config = lora.LoRAConfig(r=4, target_modules=targets, use_dora=name == "model", init_lora_weights=False)
            lora.inject(model, config)
            found[f"{name} adapter"] = lora.save_adapter(model, root / f"{name}-adapter")
    return found


def command(*words: Any) -> int:
    return main([str(word) for word in words])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def adapted(files: dict[str, Path], name: str, **options: Any) -> Any:
    model, _ = lora.load(files[name], **options)
    return lora.load_adapter(model, files[f"{name} adapter"])


# ---- help and version ------------------------------------------------------------------------------------------


def test_help(capsys: Any) -> None:
    assert command("--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("train", "generate", "merge", "quantize", "explain", "examples:"))
    assert command("train", "--help") == 0
    text = capsys.readouterr().out
    assert (
        "--lora-alpha X" in text and "[0.0002]" in text and "--no-packing" in text and "rank of the update [8]" in text
    )
    for name in ("generate", "merge", "quantize", "explain"):
        assert command(name, "--help") == 0
        assert "--model MODEL" in capsys.readouterr().out
    assert command() == 0
    assert "commands:" in capsys.readouterr().out


def test_version(capsys: Any) -> None:
    assert command("--version") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"lora {lora.__version__}"
    assert f"torch {torch.__version__}" in lines


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lora.cli import main; main(['train', '--help']);"
        "print([m for m in ('transformers', 'trl', 'datasets', 'matplotlib', 'rich', 'peft') if m in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "[]"


# ---- train and generate ----------------------------------------------------------------------------------------


def test_train_with_a_file_and_flags(files: dict[str, Path], tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "c.yaml").write_text(f"model: {files['model']}\ndata: {files['data']}\nr: 2\nlr: 1.0\n")
    output = tmp_path / "out"
    flags = ("--lr", "1e-2", "--max-steps", 2, "--no-tensorboard", "--samples", 1, "--sample-tokens", 3)
    assert command("train", "--config", tmp_path / "c.yaml", "--output", output, *flags) == 0
    seen = capfd.readouterr()
    assert seen.err == ""
    assert "step 2/2" in seen.out and "r=2" in seen.out and "backend auto" in seen.out
    assert not set("\x1b\r") & set(seen.out)
    again = output / "run.yaml"
    assert "lr: 0.01" in again.read_text()
    assert command("generate", "--model", files["model"], "--adapter", output / "adapter", "hello") == 0


def test_generate(files: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ("generate", "--model", files["model"], "--adapter", files["model adapter"], "--max-new-tokens", 12)
    assert command(*base, "what is one ?") == 0
    one = capsys.readouterr().out
    assert one.strip()
    monkeypatch.setattr("sys.stdin", io.StringIO("what is one ?\n"))
    assert command(*base) == 0
    assert capsys.readouterr().out == one
    (tmp_path / "prompts.txt").write_text("what is one ?\n\nhello\n")
    assert command(*base, "--file", tmp_path / "prompts.txt") == 0
    several = capsys.readouterr().out
    assert several.startswith(f"> what is one ?\n{one.strip()}\n\n> hello\n")  # padding changes nothing
    assert command("generate", "--model", files["model"], "--max-new-tokens", 12, "what is one ?") == 0
    assert capsys.readouterr().out != one
    drawn = []
    for seed in (1, 1, 2):
        assert command(*base, "--temperature", 5, "--seed", seed, "what is one ?") == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]


# ---- merge -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "tied"])
def test_merge_in_float32_is_the_adapted_model(files: dict[str, Path], tmp_path: Path, name: str, capsys: Any) -> None:
    words = ("merge", "--model", files[name], "--adapter", files[f"{name} adapter"], "--output", tmp_path / "out")
    assert command(*words, "--dtype", "float32") == 0
    report = capsys.readouterr().out
    assert ("no longer tied" in report) == (name == "tied")
    merged, tokenizer = lora.load(tmp_path / "out")
    assert merged.config.tie_word_embeddings is False
    assert tokenizer.chat_template
    expected = logits(adapted(files, name))
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5 * scale)
    assert (expected - logits(lora.load(files[name])[0])).abs().max() > 1e-2 * scale  # the adapter does something


def test_merged_weights_are_rounded_once(files: dict[str, Path], tmp_path: Path) -> None:
    words = ("merge", "--model", files["model"], "--adapter", files["model adapter"], "--output", tmp_path / "out")
    assert command(*words) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    exact = lora.merge_and_eject(adapted(files, "model")).state_dict()
    assert written.keys() == exact.keys()
    for key, tensor in written.items():
        assert torch.equal(tensor, exact[key].bfloat16()), key
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_merge_into_several_shards(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora.directories.SHARD_BYTES", 10_000)
    assert len(list(files["model"].glob("*.safetensors"))) > 3
    words = ("merge", "--model", files["model"], "--adapter", files["model adapter"], "--output", tmp_path / "out")
    assert command(*words, "--dtype", "float32") == 0
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in lora.load(files["model"])[0].parameters())
    torch.testing.assert_close(
        logits(lora.load(tmp_path / "out")[0]), logits(adapted(files, "model")), rtol=0, atol=1e-5
    )


def test_one_weight_at_a_time(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each merged weight is let go before the next is made."""
    import weakref

    import lora.directories as directories

    alive: list[Any] = []
    most: list[int] = []
    original = directories.merged_weight

    def merged_weight(*args: Any) -> torch.Tensor:
        most.append(sum(reference() is not None for reference in alive))
        weight = original(*args)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(directories, "merged_weight", merged_weight)
    merge_directory(str(files["model"]), str(files["model adapter"]), tmp_path / "out", dtype="float32")
    assert len(most) == 14
    assert max(most) == 0


def test_merge_of_a_model_whose_files_name_weights_otherwise(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=32, num_local_experts=2)
    with quiet():
        save_tiny_model(tmp_path / "model")  # for its tokenizer
        for old in (tmp_path / "model").glob("*.safetensors"):
            old.unlink()
        transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
        model = lora.inject(lora.load(tmp_path / "model")[0], lora.LoRAConfig(r=2, init_lora_weights=False))
        lora.save_adapter(model, tmp_path / "adapter")
    words = ("merge", "--model", tmp_path / "model", "--adapter", tmp_path / "adapter", "--output", tmp_path / "out")
    assert command(*words, "--dtype", "float32") == 0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in file.keys()  # noqa: SIM118
    torch.testing.assert_close(logits(lora.load(tmp_path / "out")[0]), logits(model), rtol=0, atol=1e-5)


def test_an_interrupted_merge_leaves_what_was_there(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    merge_directory(str(files["model"]), str(files["model adapter"]), output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora.directories.write_rest", fail)
    words = ("merge", "--model", files["model"], "--adapter", files["model adapter"], "--output", output, "--overwrite")
    assert command(*words) == 130
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- quantize and explain --------------------------------------------------------------------------------------


def test_quantize_is_read_back_by_us_and_by_bitsandbytes(files: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    from transformers import AutoModelForCausalLM

    assert command("quantize", "--model", files["model"], "--output", tmp_path / "out") == 0
    assert "14 linear layers" in capsys.readouterr().out
    ours, _ = lora.load(tmp_path / "out")
    expected = lora.load(files["model"], quantization="nf4")[0]
    layer, wanted = (model.model.layers[1].mlp.up_proj for model in (ours, expected))
    assert isinstance(layer, NF4Linear)
    for name, tensor in wanted.named_parameters():
        assert torch.equal(layer.get_parameter(name), tensor), name
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[1].mlp.up_proj.weight
    assert theirs.quant_state.quant_type == "nf4"
    assert torch.equal(theirs.data.flatten(), layer.weight.flatten())
    assert torch.equal(theirs.quant_state.absmax, layer.absmax)
    assert logits(ours).isfinite().all()


def test_bits_of_a_quantised_weight(files: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    for flag, bits in (("--double-quant", 8 / 64 + 4 + 32 / 480 / 64), ("--no-double-quant", 4.5)):
        words = ("quantize", "--model", files["model"], "--output", tmp_path / "out", "--overwrite", flag)
        assert command(*words) == 0
        said = float(capsys.readouterr().out.split(" bits each")[0].rsplit(" ", 1)[1])
        # a matrix of 32 x 48 has 24 blocks and one nested scale for all of them: more than for a large matrix
        assert bits <= said < bits + 0.05


def test_merge_into_a_quantised_model_decodes_it(files: dict[str, Path], tmp_path: Path) -> None:
    assert command("quantize", "--model", files["model"], "--output", tmp_path / "nf4", "--dtype", "float32") == 0
    words = ("merge", "--model", tmp_path / "nf4", "--adapter", files["model adapter"], "--output", tmp_path / "out")
    assert command(*words, "--dtype", "float32") == 0
    model = lora.load_adapter(lora.load(tmp_path / "nf4")[0], files["model adapter"])
    merged, _ = lora.load(tmp_path / "out")
    assert not any(isinstance(module, NF4Linear) for module in merged.modules())
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)


def test_explain(files: dict[str, Path], capsys: Any) -> None:
    words = ("explain", "--model", files["model"], "--adapter", files["model adapter"])
    for backend in ("reference", "auto"):
        assert command(*words, "--backend", backend) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"backend: {backend}\nmodel.layers.0.self_attn.q_proj")
    assert "parameters train" in text and "AdamW" in text
    assert command("explain", "--model", files["model"], "--quantization", "nf4") == 0
    text = capsys.readouterr().out
    assert "weights in NF4" in text and "15,360" in text and "adapter" not in text


# ---- errors ----------------------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[list[str], str]] = {
    "unknown command": (["trian"], "invalid choice: 'trian'"),
    "unknown flag": (["train", "--batchsize", "4"], "Did you mean '--batch-size'"),
    "flag of another command": (["merge", "--lr", "4"], "required: --model"),
    "no model": (["train", "--data", "DATA"], "model is missing: give --model"),
    "no data": (["train", "--model", "MODEL"], "data is missing: give --data"),
    "no such model": (["train", "--model", "/nowhere/model", "--data", "DATA"], "/nowhere/model"),
    "no such data": (["train", "--model", "MODEL", "--data", "none.jsonl"], "there is no file none.jsonl"),
    "no such config": (["train", "--config", "none.yaml"], "the config none.yaml does not exist"),
    "config is a directory": (["train", "--config", "ROOT"], "is a directory"),
    "rank in words": (
        ["train", "--model", "MODEL", "--data", "DATA", "--r", "high"],
        "r is 'high', expected an integer",
    ),
    "rank too high": (["train", "--model", "MODEL", "--data", "DATA", "--output", "OUT", "--r", "999"], "r=999"),
    "target": (
        ["train", "--model", "MODEL", "--data", "DATA", "--output", "OUT", "--target-modules", "q_prj"],
        "Did you mean 'q_proj'",
    ),
    "rate": (["train", "--model", "MODEL", "--data", "DATA", "--lr", "0"], "lr is 0, expected a number > 0"),
    "scheduler": (["train", "--model", "MODEL", "--data", "DATA", "--scheduler", "cos"], "scheduler is 'cos'"),
    "backend": (["train", "--model", "MODEL", "--data", "DATA", "--backend", "fastest"], "backend is 'fastest'"),
    "backend of explain": (["explain", "--model", "MODEL", "--backend", "fastest"], "--backend is 'fastest'"),
    "no prompt": (["generate", "--model", "MODEL", ""], "a prompt is empty"),
    "prompts twice": (["generate", "--model", "MODEL", "--file", "DATA", "hello"], "choose one"),
    "no such prompts": (["generate", "--model", "MODEL", "--file", "none.txt"], "none.txt: No such file"),
    "no tokens": (["generate", "--model", "MODEL", "--max-new-tokens", "0", "hello"], "expected an integer >= 1"),
    "tokens in words": (
        ["generate", "--model", "MODEL", "--max-new-tokens", "few", "hello"],
        "invalid int value: 'few'",
    ),
    "temperature": (["generate", "--model", "MODEL", "--temperature", "-1", "hello"], "expected a number in [0, 100]"),
    "system without chat": (
        ["generate", "--model", "MODEL", "--system", "a", "--no-chat-template", "hello"],
        "--system needs the chat template",
    ),
    "no such adapter": (["generate", "--model", "MODEL", "--adapter", "none", "hello"], "none"),
    "adapter of another model": (["generate", "--model", "MODEL", "--adapter", "TIED", "hello"], "another base model"),
    "a model as the adapter": (
        ["merge", "--model", "MODEL", "--adapter", "MODEL", "--output", "OUT"],
        "adapter_config",
    ),
    "an adapter as the model": (["explain", "--model", "ADAPTER"], "holds an adapter, not a model"),
    "merge onto itself": (
        ["merge", "--model", "MODEL", "--adapter", "ADAPTER", "--output", "MODEL"],
        "is what is read",
    ),
    "output not empty": (["merge", "--model", "MODEL", "--adapter", "ADAPTER", "--output", "ROOT"], "is not empty"),
    "output no model": (
        ["merge", "--model", "MODEL", "--adapter", "ADAPTER", "--output", "ROOT", "--overwrite"],
        "holds something that is no model",
    ),
    "output a file": (["quantize", "--model", "MODEL", "--output", "DATA"], "is a file, expected a directory"),
    "no output": (["merge", "--model", "MODEL", "--adapter", "ADAPTER"], "required: --output"),
    "dtype": (
        ["merge", "--model", "MODEL", "--adapter", "ADAPTER", "--output", "OUT", "--dtype", "int8"],
        "invalid choice",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_users_error_is_one_line(
    files: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words, said = ERRORS[case]
    names = {"MODEL": files["model"], "DATA": files["data"], "ROOT": files["root"], "OUT": tmp_path / "out"}
    names |= {"ADAPTER": files["model adapter"], "TIED": files["tied adapter"]}
    assert command(*(names.get(word, word) for word in words)) == 2
    seen = capsys.readouterr()
    assert seen.err.startswith("lora: error: ")
    assert seen.err.count("\n") == 1
    assert said in seen.err
    assert "Traceback" not in seen.out + seen.err


def test_a_wrong_lora_backend_is_one_line(files: dict[str, Path], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BACKEND", "quick")
    assert command("explain", "--model", files["model"]) == 2
    assert "LORA_BACKEND is 'quick', expected one of 'reference', 'fast', 'auto'" in capsys.readouterr().err


def test_debug_shows_where_an_error_comes_from(files: dict[str, Path]) -> None:
    with pytest.raises(lora.LoRAError, match="is what is read"):
        command("merge", "--debug", "--model", files["model"], "--adapter", "x", "--output", files["model"])


def test_a_fresh_process_ends_with_the_exit_code() -> None:
    words = [sys.executable, "-m", "lora", "explain", "--model", "/nowhere"]
    finished = subprocess.run(words, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr.startswith("lora: error: ")
    assert finished.stderr.count("\n") == 1


# ---- mixtures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_a_mixture_s_experts_train_and_what_nf4_leaves_out_is_said(
    files: dict[str, Path], tmp_path: Path, backend: str, capfd: Any
) -> None:
    """Interrupted and resumed, merged, and read by PEFT; `all-linear` and NF4 both leave experts out, and say so."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with quiet():
        mixture("mixtral").save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = ["train", "--model", tmp_path / "model", "--data", files["data"], "--max-steps", 3, "--lr", "1e-2"]
    words += ["--save-every", 1, "--samples", 0, "--no-tensorboard", "--backend", backend]
    experts = ["--target-parameters", "experts.gate_up_proj,experts.down_proj"]
    assert command(*words, *experts, "--output", tmp_path / "a") == 0
    assert "leaves" not in capfd.readouterr().err
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    assert command(*words, *experts, "--output", tmp_path / "b", "--resume") == 0
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert any(".experts." in key and "lora_B" in key and bool(one[key].abs().max() > 0) for key in one)

    adapter = tmp_path / "a" / "adapter"
    merged = ["merge", "--model", tmp_path / "model", "--adapter", adapter, "--output", tmp_path / "merged"]
    assert command(*merged, "--dtype", "float32") == 0
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), str(adapter))
    expected, plain = logits(theirs), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert float((expected - plain).abs().max()) > 1e-2

    capfd.readouterr()
    assert command(*words, "--quantization", "nf4", "--output", tmp_path / "c") == 0
    said = capfd.readouterr().err
    assert "leaves 4 parameters out" in said and "give target_parameters=" in said
    assert "quantization='nf4' leaves 2 modules in full precision: model.layers.0.mlp.experts" in said


def test_every_field_of_the_adapter_s_config_is_an_option() -> None:
    assert {f.name for f in dataclasses.fields(lora.LoRAConfig)} <= HINTS.keys()
    assert main(["train", "--model", "m", "--data", "d", "--target-parametrs", "x"]) == 2
