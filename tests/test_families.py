"""Whole models of every family, on both backends: they train, come back from their files, merge, generate and switch.

The families of the fast backend's patch list, GPT-2 (Conv1D), and the mixtures Mixtral and Qwen3-MoE, whose experts are
adapted as parameters. Windows are shorter than the texts, so that a cache that forgets does so here, too.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import peft
import pytest
import torch
from test_adapter_io import adapter_tensors, assert_equal
from tiny import stir
from torch import Tensor, nn

import lora
from lora import LoRAConfig

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "head_dim": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = {"sliding_window": 5}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": WINDOW, "qwen2": {}, "qwen3": {}, "gemma2": WINDOW, "gemma3_text": WINDOW, "phi3": WINDOW,
    "smollm3": {"no_rope_layer_interval": 2}, "granite": {}, "olmo2": {}, "gpt2": {},
    "mixtral": {"num_local_experts": 4, **WINDOW},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}  # fmt: skip
MIXTURES = ("mixtral", "qwen3_moe")
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]}
BACKENDS = ("reference", "fast")
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
# Two computations of one formula in float64 models, of which transformers computes norms, and some softmax, in float32:
# a dozen roundings, which later layers can make larger by a small factor. Every adapter here moves the logits by 1e-2.
ROUNDING = 40 * 2.0**-24


@functools.cache
def _template(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64} if family == "gpt2" else SIZES
    )
    config = AutoConfig.for_model(family, **(sizes | TOKENS | FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.2 if parameter.dim() > 1 or "norm" not in name else 0.1
            offset = 1.0 if ("norm" in name or ".ln_" in name) and "gemma" not in family and "weight" in name else 0.0
            parameter.copy_(scale * torch.randn(parameter.shape) + offset)
    return model.eval()


def build(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A fresh model with the same weights as every other of its family."""
    model = copy.deepcopy(_template(family)).to(dtype)
    if family in MIXTURES and dtype == torch.float64:
        model.set_experts_implementation("eager")  # torch's grouped product, the default, has no float64
    return model


def config_of(family: str, **options: Any) -> LoRAConfig:
    """Every linear layer, and in a mixture the experts and the router, which cannot have dropout."""
    if family in MIXTURES:
        options = {**EXPERTS, **options, "lora_dropout": 0.0}
    return LoRAConfig(**{"r": 4, "lora_alpha": 8, **options})


def adapted(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A model with an adapter that changes what it says."""
    model = lora.inject(build(family, dtype), config_of(family, **options))
    stir(model)
    return model


def step(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of one step, whatever the model drops out."""
    torch.manual_seed(3)
    model.zero_grad()
    loss = model(**({"input_ids": IDS, "labels": IDS} | inputs)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_near(found: Tensor, expected: Tensor, what: str = "") -> None:
    scale = float(expected.detach().abs().max())
    assert scale > 0, what
    assert float((found - expected).detach().abs().max()) <= ROUNDING * scale, what


every_family = pytest.mark.parametrize("family", FAMILIES)
both_backends = pytest.mark.parametrize("backend", BACKENDS)


# ---- a life


@both_backends
@every_family
def test_a_model_trains_comes_back_merges_and_generates(family, backend, tmp_path):
    with lora.use_backend(backend):
        model = lora.inject(build(family, torch.float32), config_of(family, lora_dropout=0.1))
        optimizer = torch.optim.AdamW(lora.trainable_parameters(lora.for_training(model)), lr=2e-2)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.75 * losses[0], losses

        lora.save_adapter(model, tmp_path / "adapter")
        again = lora.load_adapter(build(family, torch.float32), tmp_path / "adapter")
        assert_equal(adapter_tensors(again), adapter_tensors(model))
        with torch.no_grad():
            logits = lora.for_inference(model)(IDS).logits
            assert torch.equal(lora.for_inference(again)(IDS).logits, logits)
            base = build(family, torch.float32)(IDS).logits
        assert float((logits - base).abs().max()) > 0.1 * float(base.abs().max())
        text = model.generate(IDS, max_new_tokens=6, do_sample=False)
        assert text.shape == (2, 15) or bool((text[:, 9:] == 2).any())

        lora.merge_and_eject(model).save_pretrained(tmp_path / "merged")
    from transformers import AutoModelForCausalLM

    with torch.no_grad():  # a plain model now, for anybody who reads transformers' files
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert all(torch.equal(p, merged.get_parameter(name)) for name, p in model.named_parameters())
        assert torch.equal(merged.generate(IDS, max_new_tokens=6, do_sample=False), text)


@both_backends
@every_family
def test_merging_changes_nothing_but_roundings(family, backend):
    with lora.use_backend(backend), torch.no_grad():
        model = lora.for_inference(adapted(family))
        expected = model(IDS).logits
        assert float((expected - build(family)(IDS).logits).abs().max()) > 1e-2 * float(expected.abs().max())
        errors = lora.merge(model)
        assert_near(model(IDS).logits, expected)
        assert len(errors) == len(list(lora.layers.adapter_layers(model)))
        lora.unmerge(model)
        assert torch.equal(model(IDS).logits, expected)


@both_backends
@pytest.mark.parametrize("family", ["gpt2", *MIXTURES])
def test_loss_and_gradients_are_peft_s(family, backend, tmp_path):
    """The same adapter on the same model. Other families: tests/proof/test_families.py, experts: test_experts.py."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if family in MIXTURES else "all-linear"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # GPT-2's, which PEFT sets right
        theirs = peft.get_peft_model(build(family), config)
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    with lora.use_backend(backend):
        ours = lora.for_training(lora.load_adapter(build(family), tmp_path))
        for model in (ours, theirs.train()):
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0  # GPT-2's own
        loss, gradients = step(ours)
        expected, by_peft = step(theirs)
    assert_near(loss, expected)
    by_peft = {name.removeprefix("base_model.model.").removesuffix(".weight"): g for name, g in by_peft.items()}
    assert gradients.keys() == by_peft.keys() and len(gradients) >= 2 * 2 * 4
    for name, gradient in by_peft.items():
        assert_near(gradients[name], gradient, name)


# ---- generation


@both_backends
@every_family
def test_a_cache_changes_nothing(family, backend):
    """Token by token with a cache, and all tokens at once: the same logits, past the window's end too."""
    with lora.use_backend(backend), torch.no_grad():
        model = lora.for_inference(adapted(family))
        assert model.config.use_cache
        ids = torch.cat([IDS, IDS.flip(1)], dim=1)  # 18 tokens
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :7])
        logits, cache = [first.logits], first.past_key_values
        for position in range(7, ids.shape[1]):
            out = model(ids[:, position : position + 1], past_key_values=cache)
            logits.append(out.logits)
            cache = out.past_key_values
        assert_near(torch.cat(logits, dim=1), whole)
        options = {"max_new_tokens": 8, "do_sample": False}
        text = model.generate(IDS, **options)
        assert torch.equal(model.generate(IDS, use_cache=False, **options), text)


@both_backends
@every_family
def test_left_padded_rows_are_what_they_are_alone(family, backend):
    """In generation, and in training: the loss and every gradient."""
    rows = [IDS[0], IDS[1, :6], IDS[1, 3:7]]
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = ids.masked_fill(positions == 0, -100)  # nor is a row's first token predicted from padding
    # Gemma 2's attention masks with float64's lowest number, and takes its softmax in float32: a row of padding is NaN.
    dtype = torch.float32 if family == "gemma2" else torch.float64
    with lora.use_backend(backend):
        model = lora.for_inference(adapted(family, dtype))
        options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        batch = model.generate(ids, attention_mask=mask, eos_token_id=[], **options)
        for i, row in enumerate(rows):
            alone = model.generate(row[None], eos_token_id=[], **options)
            assert torch.equal(batch.sequences[i, width:], alone.sequences[0, len(row) :])
            for found, expected in zip(batch.logits, alone.logits, strict=True):
                assert_near(found[i], expected[0])

        for module in lora.for_training(model).modules():
            if isinstance(module, nn.Dropout):  # GPT-2's own, which draws other numbers for other shapes
                module.p = 0.0
        loss, gradients = step(model, input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels)
        count = sum(len(row) - 1 for row in rows)
        alone = [step(model, input_ids=row[None], labels=row[None], num_items_in_batch=count) for row in rows]
    assert_near(loss, sum(each[0] for each in alone))
    for name, gradient in gradients.items():
        assert_near(gradient, sum(each[1][name] for each in alone), name)


# ---- training and inference


@both_backends
@every_family
def test_switching_back_and_forth_changes_nothing_else(family, backend):
    with lora.use_backend(backend):
        model = adapted(family, lora_dropout=0.3)
        model.config.use_cache = True
        plain = step(lora.for_training(model))
        state = {name: value.clone() for name, value in model.state_dict().items()}
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        settings = model.config.to_dict()
        with torch.no_grad():
            answer = lora.for_inference(model)(IDS).logits
        assert model.config.use_cache and not model.training
        for mode in ("recompute", "selective", "offload", "none"):
            lora.for_training(model, checkpointing=mode)
            assert model.training and not model.config.use_cache
            blocks = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
            assert blocks and all(block.gradient_checkpointing is (mode != "none") for block in blocks)
            loss, gradients = step(model)
            assert torch.equal(loss, plain[0])
            assert all(torch.equal(gradients[name], gradient) for name, gradient in plain[1].items())
            with torch.no_grad():
                lora.for_inference(model, merge=True)
                assert all(info.merged for info in lora.adapters(model).values())
                assert not any(block.gradient_checkpointing for block in blocks)
                assert_near(model(IDS).logits, answer)
        lora.for_training(model)
        assert not any(info.merged for info in lora.adapters(model).values())
        assert model.config.to_dict() == settings
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        with torch.no_grad():
            assert torch.equal(lora.for_inference(model)(IDS).logits, answer)


def test_a_real_model_s_left_padded_batch_speaks_as_each_row_alone():
    """SmolLM2-135M, on either backend: the same words."""
    model, tokenizer = lora.load("smollm2-135m-instruct")
    lora.inject(model, LoRAConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights="olora"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # an adapter that changes what is said, and leaves it language
        for p in lora.trainable_parameters(model):
            p += 0.02 * p.abs().mean() * torch.randn(p.shape, generator=generator)
    prompts = ["The capital of France is", "Once upon a time there was a little", "2 + 2 ="]
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": []}
    said = []
    for backend in BACKENDS:
        with lora.use_backend(backend):
            lora.for_inference(model)
            together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
            for i, prompt in enumerate(prompts):
                row = tokenizer(prompt, return_tensors="pt")
                alone = model.generate(**row, **options)[0, row["input_ids"].shape[1] :]
                assert torch.equal(together[i], alone), prompt
            said.append(together)
    assert torch.equal(*said)


def test_every_family_that_is_patched_is_here():
    """A family that is added to the patch list is added to these tests."""
    from lora.fast.patch import CAUSAL_LMS

    assert {type(_template(family)).__name__ for family in FAMILIES} >= CAUSAL_LMS
