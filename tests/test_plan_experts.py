"""lora plan of mixtures of experts: what it predicts is what a step takes, wherever the tokens go."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from test_plan import page_rows

import lora
from benchmarks import planning
from lora import LoRAConfig, LoRAError, cli, models
from lora.dry_run import rehearse
from lora.experts import GROUPED, grouped_arithmetic, grouped_result, stacked_bytes
from lora.forecast import forecast
from lora.measure import measure
from lora.skeleton import held_by, skeleton
from lora.train.loss import NextTokenLoss

pytestmark = pytest.mark.filterwarnings("ignore:target_modules='all-linear' leaves")
BOTH = ("experts.gate_up_proj", "experts.down_proj")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 96},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "intermediate_size": 96},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96},
}


def config_of(kind: str, **more: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **SIZES, vocab_size=512, **MIXTURES[kind], **more)


def live(kind: str, quantization: str, parameters: tuple[str, ...] | None) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind))
    if quantization == "nf4":
        lora.quantize(model)
    return lora.inject(model, LoRAConfig(r=4, target_parameters=parameters))


def send_all_to_the_first(model: Any) -> None:
    """Every token to the same experts; how much of each it takes is still the router's."""

    def same(_: Any, __: Any, result: Any) -> Any:
        logits, weights, chosen = result
        return logits, weights, torch.arange(chosen.shape[-1]).expand_as(chosen).contiguous()

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(same)


@pytest.mark.parametrize(
    ("backend", "kind", "quantization", "checkpointing", "parameters", "batch", "seq"),
    [
        ("fast", "mixtral", "none", "none", None, 2, 128),
        ("fast", "mixtral", "nf4", "recompute", BOTH, 2, 128),
        ("fast", "qwen3_moe", "nf4", "none", None, 2, 100),
        ("fast", "qwen3_moe", "none", "none", BOTH, 1, 256),
        ("reference", "gpt_oss", "nf4", "selective", BOTH, 2, 64),  # its attention has nothing to keep
    ],
)
def test_the_peak_is_within_a_tenth_of_the_allocators(
    tmp_path, backend, kind, quantization, checkpointing, parameters, batch, seq
):
    settings = {"quantization": quantization, "checkpointing": checkpointing, "target_parameters": parameters}
    with lora.use_backend(backend):
        config_of(kind).save_pretrained(tmp_path)
        found = forecast(str(tmp_path), gpu="cpu", dtype="float32", batch=batch, seq=seq, rank=4, **settings)
        model = live(kind, quantization, parameters)
        lora.for_training(model, checkpointing)
        measured = planning.measured_peak(model, batch, seq)
    held = sum(found.memory[key] for key in ("frozen weights", "experts' weights", "NF4 weights", "adapters"))
    assert held == planning.resting_bytes(model)
    assert found.memory["experts' weights"] == stacked_bytes(model) > 0
    assert found.peak == pytest.approx(measured, rel=0.1)
    assert found.peak - held == pytest.approx(measured - held, rel=0.1)  # without what is easily counted


def test_wherever_tokens_go_a_step_takes_the_same():
    """Nothing is assumed of the routing, so the worst one is measured, too: every token to the same three experts."""
    model = live("qwen3_moe", "none", BOTH)
    lora.for_training(model)
    measured = planning.measured_peak(model, 2, 128)
    send_all_to_the_first(model)
    assert planning.measured_peak(model, 2, 128) == pytest.approx(measured, rel=0.005)
    ids = torch.arange(32)[None]
    model(ids, labels=ids).loss.backward()
    used = [layer.mlp.experts.lora_A["default"].grad.any(-1).any(-1).tolist() for layer in model.model.layers]
    assert used == [[True] * 3 + [False] * 5] * len(used)


def test_the_page_s_measurements_are_within_a_tenth_of_what_is_predicted_today():
    rows = page_rows("mixtures")
    assert len(rows) == len(planning.MIXTURE_CASES)
    for case, cells in zip(planning.MIXTURE_CASES, rows, strict=True):
        assert cells[0] == case.kind and cells[2] == case.checkpointing
        assert cells[1] == ("NF4" if case.quantization == "nf4" else "float32")
        predicted, measured = (int(cell.replace(",", "")) for cell in cells[6:8])
        assert predicted == pytest.approx(measured, rel=0.1)
    for number in (1, 5):  # each takes a second
        found = planning.predict_mixture(planning.MIXTURE_CASES[number])
        assert found.peak / 2**20 == pytest.approx(int(rows[number][6].replace(",", "")), rel=0.01)


@pytest.mark.parametrize(("kind", "parameters"), [("mixtral", None), ("qwen3_moe", BOTH)])
def test_a_step_without_numbers_is_measured_as_a_live_one_is(kind, parameters):
    ids = torch.ones((2, 24), dtype=torch.long)
    with lora.use_backend("fast"):
        model = lora.for_training(live(kind, "none", parameters))
        loss = NextTokenLoss(model)
        expected = measure(model, {"input_ids": ids, "labels": ids}, lambda **x: loss(x, ids.numel()))
        outline = models.Outline(config_of(kind), None, False)
        bare = skeleton(outline, kind, LoRAConfig(r=4, target_parameters=parameters), "none", torch.float32)
        found = rehearse(lora.for_training(bare), 2, 24, "cpu").measured
    assert held_by(bare) == held_by(model)
    for one, other in zip(found.blocks, expected.blocks, strict=True):
        for key in ("path", "input", "saved", "selective", "arithmetic", "attention_arithmetic", "spared"):
            assert getattr(one, key) == getattr(other, key), key
        assert one.working == pytest.approx(other.working, rel=0.01)


def test_adapted_experts_are_made_anew_and_kept_for_the_backward(tmp_path):
    """W' is as large as W: without checkpointing that of every layer waits for the backward."""
    config_of("mixtral").save_pretrained(tmp_path)
    plain, adapted = (
        forecast(str(tmp_path), gpu="h200", batch=1, seq=16, rank=4, checkpointing="none", target_parameters=names)
        for names in (None, BOTH)
    )
    experts = plain.memory["experts' weights"]
    more = adapted.memory["kept activations"] - plain.memory["kept activations"]
    assert experts < more < 1.2 * experts  # and what the experts' gradients need: tokens, and A and B in bfloat16
    assert adapted.held.rebuilt == experts and plain.held.rebuilt == 0
    assert adapted.time.memory > plain.time.memory and adapted.time.flops > plain.time.flops


def test_arithmetic_is_that_of_the_experts_a_token_is_sent_to(tmp_path):
    """6 FLOPs for each trained number and token, 4 for each frozen one: of the experts only top_k."""
    found = []
    for experts in (8, 16):
        config_of("qwen3_moe").__class__(
            **SIZES, vocab_size=512, num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=512
        ).save_pretrained(tmp_path)
        found.append(forecast(str(tmp_path), gpu="h100", batch=4, seq=256, rank=4, checkpointing="none"))
    few, many = found
    router = 2 * 8 * 64 * 4 * 1024  # of eight experts more, forward and dx
    assert many.time.flops - few.time.flops == router
    assert many.memory["experts' weights"] == 2 * few.memory["experts' weights"]
    gate_up_down = 2 * 3 * 64 * 512 * 2 * 1024 * 4
    assert few.time.flops > gate_up_down > 0.5 * few.time.flops
    assert many.time.memory > few.time.memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grouped_product_s_result_lies_as_the_kernel_lays_it(dtype):
    tokens, weights = torch.randn(12, 32, dtype=dtype), torch.randn(4, 56, 32, dtype=dtype)
    ends = torch.tensor([3, 6, 6, 12], dtype=torch.int32)
    for width in (56, 54):
        pairs = [(tokens, weights[:, :width].mT), (torch.randn(12, 56, dtype=dtype).mT, tokens)]
        for left, right in pairs:
            expected = torch.nn.functional.grouped_mm(left, right, offs=ends)
            found = grouped_result(left, right, ends)
            assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), dtype)
    assert grouped_arithmetic(*pairs[0]) == 2 * 12 * 32 * 54 and grouped_arithmetic(*pairs[1]) == 2 * 12 * 56 * 32
    assert torch.ops.aten._grouped_mm.default._schema.name == GROUPED


def test_the_command_says_what_was_taken_of_the_routing(tmp_path, capsys):
    config_of("mixtral").save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--seq", "64", "--batch", "2", "--rank", "4", "--gpu", "h100"]
    assert cli.main([*words, "--quantization", "nf4"]) == 0
    text = capsys.readouterr().out
    for part in (
        "experts' weights",
        "mixture of 4 experts, which stay in bfloat16",
        "the same wherever tokens go",
        "measured of no mixture",
    ):
        assert part in text
    assert cli.main([*words, "--target-parameters", ",".join(BOTH), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["experts"] == 4 and found["peak"] == sum(found["memory"].values())
    assert f"--target-parameters {','.join(BOTH)}" in found["train_options"]
    assert cli.main([*words, "--target-parameters", "experts.up"]) == 2
    assert "target_parameters names 'experts.up', which matches no parameter" in capsys.readouterr().err


def test_a_mixture_that_goes_through_its_experts_one_by_one_is_refused(tmp_path):
    from transformers import JetMoeConfig

    JetMoeConfig(
        hidden_size=64, num_hidden_layers=1, num_key_value_heads=2, kv_channels=16, intermediate_size=96,
        num_local_experts=4, vocab_size=512,
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(LoRAError, match=r"looks at its activations .*lora\.plan_checkpointing"):
        forecast(str(tmp_path), gpu="cpu", seq=16, batch=1, rank=2)
