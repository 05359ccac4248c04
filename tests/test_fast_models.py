"""Whole models of every fused family: the fused model trains and generates as the reference does, and comes apart."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import assert_same, snapshot, tiny_llama
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora
import lora.fast
from lora import LoRAConfig
from lora.fast.inject import fuse, unfuse
from lora.fast.patch import norm_of_sum
from lora.reference.checkpoint import ATTENTION

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "head_dim": 8}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "granite", "olmo2"]
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
FLOAT32 = 2e-5  # a dozen layers' roundings of float32, which transformers' norms use even in a float64 model


def build(family: str, **overrides: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **TOKENS, **overrides})
    model = AutoModelForCausalLM.from_config(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name and "gemma" not in family else 0.0
            parameter.copy_(0.2 * torch.randn(parameter.shape) + offset)
    return model.eval()


@pytest.fixture(autouse=True)
def _on_fast():
    """Patched forwards go through `lora.ops`: on the fast backend, unless a test says otherwise."""
    with lora.use_backend("fast"):
        yield


def step(model: Any, labels: Tensor = IDS) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)
    model.zero_grad()
    output = model(IDS, labels=labels)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def reference_step(model: Any, labels: Tensor = IDS) -> tuple[Tensor, dict[str, Tensor]]:
    """A step of the unfused model on the reference alone."""
    with lora.use_backend("reference"):
        return step(lora.for_training(model), labels)


def assert_close(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert abs(float(found[0] - expected[0])) <= FLOAT32 * abs(float(expected[0]))
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.any(), name
        assert float((found[1][name] - gradient).abs().max()) <= FLOAT32 * float(gradient.abs().max()), name


VARIANTS = [
    {},
    {"lora_dropout": 0.3},
    {"use_dora": True, "use_rslora": True, "lora_dropout": 0.2},
    {"target_modules": ["q_proj", "down_proj", "qkv_proj"], "lora_dropout": 0.3},
    {"target_modules": ["v_proj", "up_proj", "gate_up_proj", "lm_head"], "rank_pattern": {"lm_head": 2}},
]


def present(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The variant without the names that this family does not have."""
    if "target_modules" not in options:
        return options
    ends = {path.rsplit(".", 1)[-1] for path, _ in model.named_modules()}
    return options | {"target_modules": [name for name in options["target_modules"] if name in ends]}


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_trains_as_the_reference_does(family, options):
    model = build(family)
    before = snapshot(model)
    torch.manual_seed(1)
    lora.inject(model, LoRAConfig(r=4, lora_alpha=8, init_lora_weights=False, **present(model, options)))
    labels = IDS.clone()
    labels[0, :4] = -100
    expected = reference_step(model, labels)
    fused = lora.fast.for_training(model)
    assert_close(step(fused, labels), expected)
    assert model(IDS, labels=labels).logits is None  # never formed
    with lora.use_backend("reference"):
        assert_close(step(fused, labels), expected)  # one injected model runs on either backend
    lora.fast.eject(model)
    assert_same(model, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_and_evaluation_are_unchanged(family):
    model = build(family)
    lora.inject(model, LoRAConfig(r=4, init_lora_weights=False))
    with lora.use_backend("reference"):
        lora.for_inference(model)
        logits, loss = model(IDS).logits, model(IDS, labels=IDS).loss
        text = model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    lora.fast.for_inference(model)
    found = model(IDS, labels=IDS)
    assert float((found.logits - logits).detach().abs().max()) <= FLOAT32 * float(logits.detach().abs().max())
    assert abs(float((found.loss - loss).detach())) <= FLOAT32 * float(loss.detach())
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=4, do_sample=False), text)
    assert isinstance(model.generate(IDS[:1], max_new_tokens=4, do_sample=False, use_cache=False), Tensor)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_fused_and_says_how(family):
    model = lora.inject(build(family), LoRAConfig(r=2))
    fuse(model)
    notes = model.lora_state.modes["fusion"].notes
    text = " ".join(notes.values())
    assert "left as it is" not in text
    for part in ("RoPE in one pass", "RMSNorm in one pass", "gate, up and down", "loss without logits"):
        assert part in text
    assert ("q, k, v in one product" in text) == (family != "phi3")  # one matrix already
    norm = "pre_feedforward_layernorm" if "gemma" in family else "post_attention_layernorm"
    expected = f"attention's residual sum and {norm} in one pass"
    if family == "olmo2":
        expected = "its own: the norms come before the sums, so there is nothing to fuse"
    assert notes["model.layers.1"] == expected
    assert expected in lora.explain(model)
    with lora.use_backend("auto"):  # names the backend that runs each patched module, never "auto"
        rows = {line.split()[0]: line for line in lora.explain(model).splitlines()[1:]}
    for path, note in notes.items():
        assert ("  its own  " if note.startswith("its own") else "  fast  ") in rows[path or "(model)"]
    assert unfuse(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_explain_says_what_runs_one_by_one_as_the_adapters_stand():
    model = lora.inject(tiny_llama(), LoRAConfig(r=2, lora_dropout=0.1), "a")
    lora.add_adapter(model, LoRAConfig(r=2, lora_dropout=0.5), "b")
    lora.for_training(model)
    with lora.use_backend("fast"):
        fuse(model)
        assert "one by one" not in lora.explain(model)
        lora.set_adapter(model, ["a", "b"])
        rows = [line.split()[0] for line in lora.explain(model).splitlines() if "now one by one" in line]
    assert rows == [f"model.layers.{i}.{part}" for i in range(len(model.model.layers)) for part in ("self_attn", "mlp")]


def test_state_dict_and_tied_weights_survive_fusing(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    lora.inject(model, LoRAConfig(r=2))
    before, pointers = snapshot(model), dict(model.named_parameters())
    fuse(model)
    assert_same(model, before)
    assert all(p is pointers[n] for n, p in model.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    q, k = model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj
    assert q.weight.untyped_storage().data_ptr() == k.weight.untyped_storage().data_ptr()
    lora.fast.merge_and_eject(model)
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in model.named_parameters())


def test_a_fused_model_s_state_dict_is_no_part_of_anything(tmp_path):
    """Weights that lie one after another are tensors of their own to who writes files, and take no more memory."""
    model = lora.inject(tiny_llama(), LoRAConfig(r=2))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    lora.fast.for_training(model)
    for each in (model, copy.deepcopy(model)):
        state = each.state_dict()
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())
        assert all(value.data_ptr() == each.get_parameter(name).data_ptr() for name, value in state.items())
        save_file(state, tmp_path / "state.safetensors")
        found = load_file(tmp_path / "state.safetensors")
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert any(module._state_dict_hooks for module in model.modules())
    lora.fast.eject(each)
    unfuse(model)
    assert not any(module._state_dict_hooks for both in (model, each) for module in both.modules())


def test_fusing_twice_is_fusing_once_and_unfusing_gives_memory_back():
    model = lora.inject(tiny_llama(), LoRAConfig(r=2))
    before = snapshot(model)
    fuse(fuse(model))
    unfuse(model)
    assert not unfuse(model)
    assert_same(model, before)
    q, k = model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj
    assert q.weight.untyped_storage().data_ptr() != k.weight.untyped_storage().data_ptr()


def test_a_deep_copy_of_a_fused_model_is_its_own():
    model = lora.inject(build("llama"), LoRAConfig(r=2, init_lora_weights=False))
    lora.fast.for_training(model)
    twin = copy.deepcopy(model)
    expected = step(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_close(step(twin), expected)
    lora.fast.eject(twin)
    assert not any("forward" in vars(module) for module in twin.modules())


@pytest.mark.parametrize("mode", ["none", "recompute", "selective"])
def test_a_model_that_adds_to_a_result_in_place(mode):
    """Llama 4 adds what its experts give to what the shared expert's down_proj gave."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "pad_token_id": 0}
    config = AutoConfig.for_model("llama4_text", **sizes, num_local_experts=4, moe_layers=[1])
    options = LoRAConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj", "down_proj"])
    found = {}
    for backend in ("reference", "fast"):
        torch.manual_seed(0)
        with lora.use_backend(backend):
            model = lora.inject(AutoModelForCausalLM.from_config(config).double(), options)
            lora.for_training(model, checkpointing=mode)
            ids = torch.arange(1, 25).view(2, 12)
            loss = model(input_ids=ids, labels=ids).loss
            found[backend] = [loss.detach(), *torch.autograd.grad(loss, lora.trainable_parameters(model))]
    for one, other in zip(found["fast"], found["reference"], strict=True):
        assert other.any() and (one - other).abs().max() <= 1000 * 2.0**-53 * other.abs().max()  # float64's roundings


@pytest.mark.parametrize("mode", ["recompute", "selective", "offload"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_a_fused_model_is_bit_identical(family, mode):
    model = lora.inject(build(family), LoRAConfig(r=4, lora_dropout=0.3, init_lora_weights=False))
    loss, gradients = step(lora.fast.for_training(model))
    runs = count_calls(model.model.layers[0].mlp)
    again, found = step(lora.fast.for_training(model, checkpointing=mode))
    assert len(runs) == 2  # the block did run a second time
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.equal(found[name], gradient), name


class CountAttention(TorchDispatchMode):
    """How often a fused attention operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.name() in ATTENTION
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])  # which has no fused one
@pytest.mark.parametrize(("mode", "again"), [("recompute", 2), ("selective", 0)])
def test_selective_runs_attention_once_and_watches_nothing_else(family, mode, again):
    model = lora.inject(build(family, attn_implementation="sdpa"), LoRAConfig(r=4, init_lora_weights=False))
    lora.fast.for_training(model, checkpointing=mode)
    model.zero_grad()
    watched = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: watched.append(torch._C._len_torch_dispatch_stack()))
    loss = model(IDS, labels=IDS).loss
    with CountAttention() as count:
        loss.backward()
    assert count.calls == again  # of two blocks
    assert watched == [0, 0, 1, 1]  # forward, and again in the backward, where this test watches


def count_calls(module: nn.Module) -> list[Tensor]:
    """What the module is called with from now on, added to as it happens."""
    inputs: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    return inputs


def additions(output: Tensor) -> int:
    """How many sums of two tensors that need a gradient are in the graph of an output."""
    nodes, seen, count = [output.grad_fn], set(), 0
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            count += node.name() == "AddBackward0"
            nodes += [following for following, _ in node.next_functions]
    return count


def take_layers_back(model: Any) -> Any:
    """The layers' own forwards, everything else fused."""
    for layer in model.model.layers:
        assert "forward" in vars(layer)
        del vars(layer)["forward"]
    return model


WITH_SUMS = [family for family in FAMILIES if family != "olmo2"]


@pytest.mark.parametrize("family", WITH_SUMS)
def test_the_sum_before_a_norm_is_in_the_norm(family):
    model = lora.inject(build(family), LoRAConfig(r=4, init_lora_weights=False))
    fused = additions(lora.fast.for_training(model).model(IDS).last_hidden_state)
    own = additions(take_layers_back(model).model(IDS).last_hidden_state)
    assert own - fused == 2  # one of two sums in each of two layers
    assert fused == 2 or family == "gemma2"  # whose softcapped attention may add the mask to the scores


def train_norms(model: Any) -> Any:
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.requires_grad_()
    return model


SPECIAL = {"granite": {"residual_multiplier": 0.3}, "phi3": {"resid_pdrop": 0.4}}


@pytest.mark.parametrize("family", WITH_SUMS)
def test_a_layer_s_gradients_are_those_of_its_own_forward(family):
    """Every norm's weight too, and Phi-3's dropout, which draws the same random numbers in the same places."""
    model = lora.inject(build(family, **SPECIAL.get(family, {})), LoRAConfig(r=4, init_lora_weights=False))
    expected = reference_step(train_norms(model))
    assert any("norm" in name for name in expected[1])
    assert_close(step(lora.fast.for_training(model)), expected)
    assert_close(step(take_layers_back(model)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_the_reference(family):
    model = lora.inject(build(family), LoRAConfig(r=4, init_lora_weights=False))
    with lora.use_backend("reference"), torch.no_grad():
        expected = lora.for_inference(model)(IDS, output_hidden_states=True)
    with torch.no_grad():
        found = lora.fast.for_inference(model)(IDS, output_hidden_states=True)
    assert len(found.hidden_states) == 3
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert float((one - other).abs().max()) <= FLOAT32 * float(other.abs().max())


@pytest.mark.parametrize("family", ["llama", "mistral"])  # Mistral's attention asks for a mask, its layer does not
def test_a_layer_takes_what_its_own_forward_takes(family):
    """Arguments by position and by name, and defaults for those left out."""
    model = lora.fast.for_inference(lora.inject(build(family), LoRAConfig(r=4, init_lora_weights=False)))
    layer, x = model.model.layers[0], torch.randn(2, 5, 32, dtype=torch.float64)
    cos_sin = model.model.rotary_emb(x, torch.arange(5)[None])
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.float64).masked_fill(~torch.ones(5, 5).tril().bool(), float("-inf"))
    own = type(layer).forward
    for args, kwargs in (
        ((), {"hidden_states": x, "position_embeddings": cos_sin}),
        ((x, mask), {"position_embeddings": cos_sin}),
        ((x, mask, None, None, False, cos_sin), {"an_argument_of_some_kernel": 1}),
    ):
        torch.testing.assert_close(layer(*args, **kwargs), own(layer, *args, **kwargs), rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="hidden_states"):
        layer(position_embeddings=cos_sin)


@pytest.mark.parametrize("kind", ["pre", "post", "backward", "everywhere"])
def test_a_norm_with_hooks_is_called(kind):
    model = lora.inject(build("llama"), LoRAConfig(r=4, init_lora_weights=False))
    expected = step(lora.fast.for_training(model))
    norm, calls = model.model.layers[0].post_attention_layernorm, []
    register = {
        "pre": norm.register_forward_pre_hook,
        "post": norm.register_forward_hook,
        "backward": norm.register_full_backward_hook,
        "everywhere": nn.modules.module.register_module_forward_hook,
    }[kind]
    handle = register(lambda module, *_: calls.append(module) if module is norm else None)
    assert_close(step(model), expected)
    assert calls == [norm]
    handle.remove()
    assert_close(step(model), expected)
    assert calls == [norm]


def test_a_layer_whose_norm_is_another_keeps_its_forward():
    model = build("llama")
    model.model.layers[0].post_attention_layernorm = nn.RMSNorm(32, eps=1e-6).double()
    config = LoRAConfig(r=4, init_lora_weights=False, modules_to_save=["layers.1.post_attention_layernorm"])
    lora.inject(model, config)
    expected = reference_step(model)
    assert "model.layers.1.post_attention_layernorm.copies.default.weight" in expected[1]
    assert_close(step(lora.fast.for_training(model)), expected)
    notes = model.lora_state.modes["fusion"].notes
    assert notes["model.layers.0"] == "left as it is: its post_attention_layernorm is a RMSNorm"
    assert notes["model.layers.1"] == "left as it is: its post_attention_layernorm is a SavedModule"


def test_a_norm_replaced_after_fusing_is_called():
    model = lora.fast.for_training(lora.inject(build("llama"), LoRAConfig(r=4, init_lora_weights=False)))
    layer, calls = model.model.layers[0], []

    class Other(nn.RMSNorm):
        def forward(self, x):
            calls.append(x)
            return super().forward(x)

    other = Other(32, eps=1e-6).double().requires_grad_(False)
    other.weight.data = layer.post_attention_layernorm.weight.data
    expected = step(model)
    layer.post_attention_layernorm = other
    assert_close(step(model), expected)
    assert len(calls) == 1


def test_a_layer_of_another_shape_keeps_its_forward(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(hidden_states)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    model = fuse(lora.inject(build("llama"), LoRAConfig(r=4)))
    assert "forward" not in vars(model.model.layers[0])
    assert model.lora_state.modes["fusion"].notes["model.layers.0"].startswith("left as it is: a decoder layer of")


def test_dtypes_that_autocast_mixes_are_added_as_the_layer_adds_them(monkeypatch):
    """The operation adds in x's dtype, which is not what the layer does."""
    residuals, plain = [], lora.fast.rms_norm
    monkeypatch.setattr(
        lora.fast,
        "rms_norm",
        lambda *a, **options: (residuals.append(options.get("residual")), plain(*a, **options))[1],
    )
    model = lora.fast.for_training(lora.inject(tiny_llama(), LoRAConfig(r=2)))
    norm = model.model.layers[0].post_attention_layernorm
    x, residual = torch.randn(5, 32).bfloat16(), torch.randn(5, 32)
    y, total = norm_of_sum(norm, x, residual)
    assert torch.equal(total, residual + x) and total.dtype == torch.float32
    assert torch.equal(y, norm(residual + x))
    assert residuals == [None, None]
    norm_of_sum(norm, x.float(), residual)
    assert residuals[-1] is residual


def test_a_layer_whose_class_changes_is_still_checkpointed():
    """FSDP2 gives a module a subclass of its own class; transformers wraps a subclass's forward once more."""
    model = lora.inject(build("llama"), LoRAConfig(r=4, lora_dropout=0.3, init_lora_weights=False))
    expected = step(lora.fast.for_training(model))
    lora.fast.for_training(model, checkpointing="recompute")
    for layer in model.model.layers:
        layer.__class__ = type(f"Sharded{type(layer).__name__}", (type(layer),), {})
    runs = count_calls(model.model.layers[1].mlp)
    loss, gradients = step(model)
    assert len(runs) == 2
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected[1].items())
    assert additions(model.model(IDS).last_hidden_state) == 2


def test_nf4_models_train_as_on_the_reference():
    model = lora.quantize(build("llama").float())
    lora.inject(model, LoRAConfig(r=4, lora_dropout=0.3, init_lora_weights=False))
    expected = reference_step(model)
    assert_close(step(lora.fast.for_training(model)), expected)


def test_several_adapters_and_mixed_dropout_stay_right():
    model = lora.inject(build("llama"), LoRAConfig(r=4, init_lora_weights=False, lora_dropout=0.2), "a")
    lora.add_adapter(model, LoRAConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "up_proj"]), "b")
    for names in (["a", "b"], "b"):
        lora.set_adapter(model, names)
        expected = reference_step(model)
        assert_close(step(lora.fast.for_training(model)), expected)


def test_token_normalisation_over_an_accumulated_batch():
    model = lora.inject(build("llama"), LoRAConfig(r=4, init_lora_weights=False))
    whole = step(lora.fast.for_training(model))
    model.zero_grad()
    for row in IDS:
        model(row[None], labels=row[None], num_items_in_batch=torch.tensor(16)).loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert float((p.grad - whole[1][name]).abs().max()) <= FLOAT32 * float(whole[1][name].abs().max()), name


def test_a_family_nobody_knows_keeps_its_forward():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)).double().eval()
    lora.inject(model, LoRAConfig(r=4, init_lora_weights=False, lora_dropout=0.2))
    torch.manual_seed(0)
    expected = reference_step(model)
    with_fast = lora.fast.for_training(model)
    assert model.lora_state.modes["fusion"].forwards == []
    assert_close(step(with_fast), expected)


@pytest.mark.parametrize("path", ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "lm_head"])
def test_a_hook_on_a_layer_that_fusing_would_not_call_fires(path):
    config = LoRAConfig(r=4, init_lora_weights=False)
    model = lora.for_training(lora.inject(build("llama"), config))
    expected = step(model)
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    assert_close(step(model), expected)
    assert len(seen) == 1
    handle.remove()
    step(model)
    assert len(seen) == 1


def test_a_tuple_is_returned_where_one_is_asked_for():
    model = lora.for_training(lora.inject(build("llama"), LoRAConfig(r=4, init_lora_weights=False)))
    expected = model(IDS, labels=IDS).loss
    assert torch.equal(model(IDS, labels=IDS, return_dict=False)[0], expected)
    model.config.return_dict = False
    assert torch.equal(model(IDS, labels=IDS)[0], expected)


NF4_PHI3 = [  # config, double quantisation, whether gate's and up's blocks come apart
    ({}, False, True),
    ({}, True, False),  # half of its blocks are no whole number of nested ones
    ({"hidden_size": 64, "intermediate_size": 256, "head_dim": 16}, True, True),
]


@pytest.mark.parametrize(("sizes", "double_quant", "fused"), NF4_PHI3, ids=str)
def test_phi3_s_gate_and_up_come_apart_in_nf4(sizes, double_quant, fused):
    """They are one NF4 matrix: fused where no block lies in both, and else said not to be."""
    model = lora.quantize(build("phi3", **sizes).float(), "nf4", double_quant=double_quant).double()
    lora.inject(model, LoRAConfig(r=4, lora_alpha=8, init_lora_weights=False))
    expected = reference_step(model)
    found = step(lora.fast.for_training(model))
    notes = [note for path, note in model.lora_state.modes["fusion"].notes.items() if path.endswith("mlp")]
    assert {note == "gate, up and down in one function" for note in notes} == {fused}
    assert fused or all("a block that holds both" in note for note in notes)
    assert_close(found, expected)


def test_shifted_labels_are_taken_as_they_are():
    """Where a sequence is split over ranks, its labels come shifted: the loss still forms no logits."""
    model = lora.inject(build("llama"), LoRAConfig(r=4, init_lora_weights=False))
    shifted = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], dim=1)
    with lora.use_backend("reference"):
        expected = lora.for_training(model)(IDS, labels=IDS, shift_labels=shifted).loss
    output = lora.fast.for_training(model)(IDS, labels=IDS, shift_labels=shifted)
    assert output.logits is None
    assert abs(float((output.loss - expected).detach())) <= FLOAT32 * float(expected.detach())
    other = model(IDS, labels=IDS, shift_labels=shifted.flip(0)).loss  # it is these that count
    assert abs(float((other - expected).detach())) > 1e-3


def test_logits_that_were_asked_for_are_there():
    """`logits_to_keep` with labels of that many tokens is transformers' own business."""
    model = lora.fast.for_training(lora.inject(build("llama"), LoRAConfig(r=4, init_lora_weights=False)))
    output = model(IDS, labels=IDS[:, -3:], logits_to_keep=3)
    assert output.logits.shape == (2, 3, 64)
    expected = type(model).forward(model, IDS, labels=IDS[:, -3:], logits_to_keep=3).loss
    assert torch.equal(output.loss, expected)


@pytest.mark.parametrize("family", ["llama", "olmo2"])
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_a_fused_model_says_why_it_is_not_pickled_and_an_unfused_one_is(family, checkpointing):
    model = lora.inject(build(family), LoRAConfig(r=4))
    expected, _ = step(lora.for_training(model, checkpointing))
    with pytest.raises(lora.LoRAError, match=r"fused model cannot be pickled.*call lora\.fast\.unfuse\(model\)"):
        torch.save(model, io.BytesIO())
    torch.testing.assert_close(step(copy.deepcopy(model))[0], expected)  # its weights may lie apart
    unfuse(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(step(lora.for_training(again, checkpointing))[0], expected)
