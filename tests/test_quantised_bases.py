"""4-bit bases beside bitsandbytes': its checkpoints here, ours there, memory while loading, and QLoRA beside PEFT's.

Layer by layer the format is tested in test_nf4_linear.py, and loading a Llama in test_models.py; here are the families,
what bitsandbytes' options leave in a checkpoint, and training.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from test_families import FAMILIES, SIZES, TOKENS
from test_models import run_python, save
from test_their_loops import in_order
from tiny import stir, tiny_llama
from torch import Tensor, nn

import lora
from lora import LoRAConfig
from lora.cli import main
from lora.nf4_layer import NF4Linear
from lora.reference.nf4 import nf4_dequantize

IDS = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
# Widths that are multiples of 64: on a CPU bitsandbytes 0.50 decodes others (32, 96) with the next row's scales.
WIDE = SIZES | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
ROUNDING = 40 * 2.0**-24  # of two float32 computations of one formula
every_family = pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])


def bnb_config(double_quant: bool = True, compute: torch.dtype = torch.float32, **options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute,
        **options,
    )


def from_pretrained(path: Path, **options: Any) -> Any:
    """A model of transformers', its 4-bit layers bitsandbytes' own."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options)


def bnb_layers(model: nn.Module) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}


def nf4_layers(model: nn.Module) -> dict[str, NF4Linear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, NF4Linear)}


def bnb_decoded(layer: Any) -> Tensor:
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def assert_same_model(ours: nn.Module, theirs: nn.Module) -> None:
    """The same layers are 4 bits wide and decode to the same bits; every other parameter is the same, too."""
    found, expected = nf4_layers(ours), bnb_layers(theirs)
    assert found.keys() == expected.keys() and found
    for path, layer in expected.items():
        decoded = nf4_dequantize(found[path].quantised)
        assert decoded.dtype == bnb_decoded(layer).dtype, path
        assert torch.equal(decoded, bnb_decoded(layer)), path
    rest = {name: p for name, p in theirs.named_parameters() if not isinstance(p, bitsandbytes.nn.Params4bit)}
    assert rest
    for name, parameter in rest.items():
        other = ours.get_parameter(name)
        assert other.dtype == parameter.dtype and torch.equal(other, parameter), name


def dense(family: str, dtype: torch.dtype) -> Any:
    """A model in full precision whose weights, biases and norms are all random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    options = FAMILIES[family] | ({"moe_intermediate_size": 64} if family == "qwen3_moe" else {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(WIDE | TOKENS | options)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.to(dtype).eval()


def training_logits(model: Any) -> Tensor:
    """As training computes them: without a gradient to come, bitsandbytes multiplies in lower precision on a CPU."""
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    assert logits.requires_grad
    return logits.detach()


# ---- checkpoints, both ways


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@every_family
def test_what_bitsandbytes_saved_of_any_family_is_read(family, dtype, tmp_path):
    path = save(dense(family, dtype), tmp_path / "dense")
    theirs = from_pretrained(path, quantization_config=bnb_config(compute=dtype), dtype=dtype)
    ours, _ = lora.load(save(theirs, tmp_path / "bnb"))
    assert_same_model(ours, theirs)
    difference, expected = training_logits(ours) - training_logits(theirs), training_logits(theirs)
    if dtype == torch.float32:
        assert float(difference.abs().max()) <= ROUNDING * float(expected.abs().max())
    else:  # a bias is added before the rounding or after it: two layers of seven products, a rounding of 2**-8 in each
        assert float(difference.norm()) <= math.sqrt(14) * 2.0**-8 * float(expected.norm())


def test_what_bitsandbytes_saved_of_gpt2_is_refused_by_its_reason(tmp_path):
    """transformers quantises its Conv1D too, transposed; here only linear layers are."""
    path = save(dense("gpt2", torch.float32), tmp_path / "dense")
    theirs = from_pretrained(path, quantization_config=bnb_config(), dtype=torch.float32)
    with pytest.raises(lora.LoRAError, match=r"c_attn\.weight is 4-bit, of a Conv1D"):
        lora.load(save(theirs, tmp_path / "bnb"))


@pytest.mark.parametrize("double_quant", [True, False])
@every_family
def test_bitsandbytes_reads_what_we_save_of_any_family(family, double_quant, tmp_path):
    path = save(dense(family, torch.bfloat16), tmp_path / "dense")
    ours, _ = lora.load(path, quantization="nf4" if double_quant else None)
    if not double_quant:
        ours = lora.quantize(ours, "nf4", double_quant=False)
    save(ours, tmp_path / "nf4")
    theirs = from_pretrained(tmp_path / "nf4")
    assert_same_model(ours, theirs)
    assert {layer.weight.quant_state.nested for layer in bnb_layers(theirs).values()} == {double_quant}
    assert_same_model(lora.load(tmp_path / "nf4")[0], theirs)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_command_quantises_a_mixture_but_for_its_experts(family, dtype, double_quant, tmp_path, capfd):
    path = save(dense(family, dtype), tmp_path / "dense")
    flag = "--double-quant" if double_quant else "--no-double-quant"
    assert main(["quantize", "--model", str(path), "--output", str(tmp_path / "nf4"), flag]) == 0
    seen = capfd.readouterr()
    assert "mlp.experts and its like hold several matrices in one tensor and stay in full precision, " in seen.err
    assert "quantised 8 linear layers into" in seen.out and (" 4.5" in seen.out) == (not double_quant)
    theirs = from_pretrained(tmp_path / "nf4")
    assert len(bnb_layers(theirs)) == 8 and theirs.dtype == torch.bfloat16
    assert_same_model(lora.load(tmp_path / "nf4")[0], theirs)
    expected = lora.quantize(lora.load(path)[0], "nf4", double_quant=double_quant)  # from what was stored
    for name, layer in nf4_layers(expected).items():
        layer.dtype = torch.bfloat16
        assert torch.equal(nf4_dequantize(layer.quantised), bnb_decoded(theirs.get_submodule(name))), name
    for name, parameter in lora.load(path, dtype="bfloat16")[0].named_parameters():
        if "experts" in name or "norm" in name or "embed" in name or "lm_head" in name:
            assert torch.equal(parameter, theirs.get_parameter(name)), name
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert (tmp_path / "nf4" / "tokenizer.json").is_file()


def test_saving_leaves_no_mark_and_adapters_come_and_go(tmp_path):
    """A config that says "quantised" would have trainers look for bitsandbytes' layers."""
    path = save(tiny_llama(hidden_size=64, intermediate_size=128).bfloat16(), tmp_path / "dense")
    model, _ = lora.load(path, quantization="nf4")
    model.save_pretrained(tmp_path / "one")
    assert not hasattr(model.config, "quantization_config")
    lora.inject(model, LoRAConfig(r=2))
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    lora.eject(model).save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "two" / "config.json").read_text()
    dense = lora.inject(from_pretrained(path), LoRAConfig(r=2))
    assert "save_pretrained" not in vars(lora.eject(dense))  # its own again
    mixed = lora.quantize(from_pretrained(path), exclude_modules=["down_proj"])
    lora.quantize(mixed, block_size=128)
    with pytest.raises(lora.LoRAError, match="NF4 layers of 2 kinds"):
        mixed.save_pretrained(tmp_path / "three")


OPTIONS: dict[str, dict[str, Any]] = {
    "float16": {"compute": torch.float16},
    "single": {"double_quant": False},
    "stored as bfloat16": {"bnb_4bit_quant_storage": torch.bfloat16},  # FSDP wants one dtype for everything
    "stored as float32": {"bnb_4bit_quant_storage": torch.float32},
    "some left out": {"llm_int8_skip_modules": ["lm_head", "down_proj", "model.layers.1.self_attn.q_proj"]},
    "the head too": {"llm_int8_skip_modules": []},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bitsandbytes_options_are_read_as_they_were_meant(case, tmp_path):
    path = save(tiny_llama(hidden_size=64, intermediate_size=128, attention_bias=True).bfloat16(), tmp_path / "dense")
    theirs = from_pretrained(path, quantization_config=bnb_config(**OPTIONS[case]), dtype=torch.bfloat16)
    ours, _ = lora.load(save(theirs, tmp_path / "bnb"))
    assert_same_model(ours, theirs)
    skipped = OPTIONS[case].get("llm_int8_skip_modules")
    assert isinstance(ours.model.layers[0].mlp.down_proj, NF4Linear) == (case != "some left out")
    assert isinstance(ours.lm_head, NF4Linear) == (skipped == [])


def test_a_model_trained_here_goes_back_to_bitsandbytes(tmp_path):
    """Quantise, train, save the adapter and the base: transformers, bitsandbytes and PEFT read both."""
    path = save(tiny_llama(hidden_size=64, intermediate_size=128), tmp_path / "dense")
    model, _ = lora.load(path, quantization="nf4")
    save(model, tmp_path / "nf4")
    lora.inject(model, LoRAConfig(r=4))
    optimizer = torch.optim.AdamW(lora.trainable_parameters(lora.for_training(model)), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    lora.save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(from_pretrained(tmp_path / "nf4"), tmp_path / "adapter").eval()
    expected = training_logits(lora.for_inference(model))
    scale = float(expected.abs().max())
    assert float((training_logits(theirs) - expected).abs().max()) <= ROUNDING * scale
    assert float((training_logits(from_pretrained(tmp_path / "nf4")) - expected).abs().max()) > 1e-2 * scale


def test_merging_into_four_bits_is_peft_s(tmp_path):
    """Decoded, merged and quantised again: PEFT's weights, but for blocks whose scale bitsandbytes rounds another way.

    Its table look-up moves 0.2% of the scales' 8-bit codes to a neighbour, which is at most 0.9/64 of their largest
    away: of a layer's 64 or 128 blocks, one now and then.
    """
    theirs, ours = qlora_pair(tmp_path)
    before = {path: nf4_dequantize(layer.quantised) for path, layer in nf4_layers(ours).items()}
    errors = lora.merge(ours, requantize=True)
    layers = bnb_layers(theirs.merge_and_unload())
    assert errors.keys() == layers.keys()
    for path, layer in layers.items():
        found, expected = nf4_dequantize(ours.get_submodule(path).owner.quantised), bnb_decoded(layer)
        difference = (found - expected).abs()
        assert int(difference.view(-1, 64).any(1).sum()) <= 2, path
        assert float(difference.max()) <= 0.9 / 64 * float(expected.abs().max()), path
        assert float((found - before[f"{path}.base_layer"]).norm()) > 0.05 * float(found.norm()), path


# ---- memory


STORED = """
import sys, threading, time, torch, lora, lora.nf4_loader, transformers.models.llama.modeling_llama
from test_models import PEAK
exec(PEAK.split("nf4, (model, _)")[0])  # `peak`
found, (model, _) = peak(lambda: lora.load(sys.argv[1]))
print(found, sum(tensor.nbytes for tensor in model.state_dict().values()))
"""


def test_a_stored_four_bit_model_takes_its_own_size_to_load(tmp_path):
    """Neither the full-precision model nor a second copy of the quantised one is there at any time."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 11, "num_attention_heads": 8}
    model = lora.quantize(tiny_llama(**sizes, num_key_value_heads=8).bfloat16())
    save(model, tmp_path / "nf4")
    peak, held = map(int, run_python(STORED, tmp_path / "nf4", MALLOC_MMAP_THRESHOLD_="65536").split())
    # What stays on the file's pages does not count. Beside what is kept: the two tables that come with every layer, one
    # layer at a time, and 5 MB of interpreter.
    largest = max(layer.weight.nbytes + layer.absmax.nbytes for layer in nf4_layers(model).values())
    assert peak < held + largest + 5_000_000


# ---- QLoRA


def qlora_pair(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """PEFT's model on bitsandbytes and ours, of one 4-bit checkpoint, with the same adapter."""
    torch.manual_seed(0)
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4 if parameter.dim() == 2 else 1  # gradients that reach the first layer
    path = save(model.to(dtype), directory / "dense")
    theirs = from_pretrained(path, quantization_config=bnb_config(compute=dtype), dtype=dtype)
    save(theirs, directory / "bnb")
    ours, _ = lora.load(directory / "bnb")
    assert_same_model(ours, theirs)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    stir(theirs)
    theirs.save_pretrained(directory / "adapter")
    return theirs, lora.load_adapter(ours, directory / "adapter", check_base=False)  # the checkpoint's name is another


def trained(model: Any, parameters: list[nn.Parameter], steps: int = 20) -> tuple[Tensor, list[Tensor]]:
    """The losses of the steps and what the adapter came to, in float64."""
    optimizer, losses = torch.optim.SGD(parameters, lr=0.01, momentum=0.9), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses), [p.detach().double() for p in parameters]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    squares = [(float((a - b).square().sum()), float(b.square().sum())) for a, b in zip(one, other, strict=True)]
    return math.sqrt(sum(s for s, _ in squares) / sum(s for _, s in squares))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_qlora_is_peft_s_on_bitsandbytes_step_for_step(backend, dtype, tmp_path):
    """Twenty steps of both, and of ours in float64, which is the truth: ours is as near to it as PEFT's is.

    The two round the same sums in another order, so neither is the other's measure. A run of small steps carries an
    error on without making it larger, so that the distance of PEFT's run from the truth is what twenty steps of
    rounding come to; in float32 ours may be twice as far, and a few roundings. In bfloat16 a layer of PEFT's rounds
    twice, its adapter in float32; of ours, six times (docs/decisions, 3): three times as far at most.
    """
    theirs, ours = qlora_pair(tmp_path, dtype)
    start = [p.detach().double() for p in lora.trainable_parameters(ours)]
    exact = copy.deepcopy(ours).double()
    with lora.use_backend("reference"):
        truth, end = trained(lora.for_training(exact), list(lora.trainable_parameters(exact)))
    names = in_order(theirs, ours)
    their_losses, their_end = trained(theirs.train(), [dict(theirs.named_parameters())[name] for name in names])
    with lora.use_backend(backend):
        our_losses, our_end = trained(lora.for_training(ours), list(lora.trainable_parameters(ours)))

    unit = torch.finfo(dtype).eps / 2
    assert float(truth[-1]) < 0.8 * float(truth[0])
    moved, error, their_error = distance(start, end), distance(our_end, end), distance(their_end, end)
    times = 2 if dtype == torch.float32 else 3
    # The truth is of our code: PEFT's run must be near it, too. In float32 each step rounds the adapter once.
    assert their_error <= (20 * unit if dtype == torch.float32 else moved / 5)
    assert error <= times * their_error + 4 * unit * moved
    worst, their_worst = (float((found - truth).abs().max()) for found in (our_losses, their_losses))
    assert worst <= times * their_worst + 4 * unit * float(truth[0])
    assert moved > (10_000 if dtype == torch.float32 else 5) * error  # it did train, and to the same place


def test_qlora_starts_on_a_model_that_bitsandbytes_quantised(tmp_path):
    """PEFT's adapter of a bitsandbytes model, and ours of the same directory, before any step: the same loss."""
    theirs, ours = qlora_pair(tmp_path)
    expected = training_logits(theirs)
    assert float((training_logits(ours) - expected).abs().max()) <= ROUNDING * float(expected.abs().max())
    config = json.loads((tmp_path / "bnb" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
