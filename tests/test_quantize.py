"""`quantize`: which layers of a model become NF4, which stay, and what is refused before anything changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor, nn

import lora
from lora.errors import LoRAError
from lora.layers import LoRALinear
from lora.nf4_layer import NF4Linear
from lora.reference.nf4 import nf4_dequantize


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(in_features: int = 70, out_features: int = 24, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    layer.weight.data, layer.bias.data = (
        normal(out_features, in_features, seed=seed),
        normal(out_features, seed=seed + 1),
    )
    return layer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = linear(32, 32, seed=1), linear(32, 32, seed=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.o_proj(torch.tanh(self.q_proj(x)))
        return out


class Model(nn.Module):
    """An embedding, two blocks of which one is used twice, two layers with one weight, and a head tied or not."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        shared = Block()
        self.blocks = nn.ModuleList([Block(), shared, shared])
        self.left, self.right = nn.Linear(32, 32), nn.Linear(32, 32)
        self.right.weight = self.left.weight
        self.lm_head = nn.Linear(32, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.lm_head(self.right(self.left(x)))
        return out


IDS = torch.arange(12).view(2, 6)


def snapshot(model: nn.Module) -> dict[str, int]:
    return {path: id(module) for path, module in model.named_modules(remove_duplicate=False)}


@pytest.mark.parametrize("tied", [False, True])
def test_quantize_replaces_what_it_should(tied: bool) -> None:
    model = Model(tied)
    biases = {path: module.bias for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert lora.quantize(model, "nf4") is model
    kinds = {path: type(module) for path, module in model.named_modules(remove_duplicate=False)}
    quantised = {path for path, kind in kinds.items() if kind is NF4Linear}
    assert quantised == {f"blocks.{i}.{name}" for i in range(3) for name in ("q_proj", "o_proj")}
    assert {path for path, kind in kinds.items() if kind is nn.Linear} == {"left", "right", "lm_head"}
    assert model.blocks[1] is model.blocks[2] and model.left.weight is model.right.weight
    assert (model.lm_head.weight is model.embed.weight) is tied
    assert all(model.get_submodule(path).bias is bias for path, bias in biases.items())


def test_a_layer_shared_by_two_paths_stays_shared() -> None:
    shared = linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    lora.quantize(model)
    assert isinstance(model["a"], NF4Linear) and model["a"] is model["b"][0]  # type: ignore[index]


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_quantised_model_computes_with_the_decoded_weights(double_quant: bool) -> None:
    model, dense = Model(), Model()
    dense.load_state_dict(model.state_dict())
    lora.quantize(model, double_quant=double_quant)
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear):
            dense.get_submodule(path).weight.data = nf4_dequantize(module.quantised)
    torch.testing.assert_close(model(IDS), dense(IDS))
    assert {m.nested_absmax is not None for m in model.modules() if isinstance(m, NF4Linear)} == {double_quant}


def test_excluded_modules_stay() -> None:
    for exclude in (["o_proj"], r".*\.o_proj"):
        model = lora.quantize(Model(), exclude_modules=exclude, block_size=128)
        kinds = {path: type(m) for path, m in model.named_modules()}
        assert kinds["blocks.0.o_proj"] is nn.Linear and kinds["blocks.0.q_proj"] is NF4Linear
        assert model.get_submodule("blocks.0.q_proj").block_size == 128


def test_attention_of_torch_itself_still_runs() -> None:
    """nn.MultiheadAttention reads its out_proj's weight past its forward: that subclass is left alone."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    lora.quantize(model)
    assert isinstance(model.linear1, NF4Linear) and isinstance(model.self_attn.out_proj, nn.Linear)
    assert torch.isfinite(nn.ModuleList([model.self_attn])[0](*3 * [normal(1, 4, 16)])[0]).all()


def test_a_patched_layer_stays() -> None:
    """An offloading hook, say: the replacement would lose it."""
    model = nn.Sequential(linear(), linear())
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    lora.quantize(model)
    assert type(model[0]) is nn.Linear and type(model[1]) is NF4Linear


def nan_model() -> nn.Module:
    model = Model()
    model.blocks[1].o_proj.weight.data[3, 4] = math.nan  # type: ignore[union-attr, operator]
    return model


def injected(module: nn.Module) -> nn.Module:
    return nn.Sequential(LoRALinear(module))


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "scheme": (Model, {"scheme": "nf5"}, r"no scheme 'nf5', expected one of 'nf4'\. Did you mean 'nf4'"),
    "scheme type": (Model, {"scheme": None}, r"no scheme None, expected one of 'nf4'"),
    "block size": (Model, {"block_size": 60}, r"block_size is 60"),
    "adapters": (lambda: injected(linear()), {}, r"quantize comes before inject, but 0 carries an adapter"),
    "no linear": (lambda: nn.Sequential(nn.ReLU()), {}, r"nothing to replace in this Sequential"),
    "only itself": (linear, {}, r"nothing to replace in this Linear.*from_linear quantises a single layer"),
    "twice": (lambda: lora.quantize(nn.Sequential(linear())), {}, r"1 layers are NF4 already"),
    "excluded": (Model, {"exclude_modules": ["q_proj", "o_proj"]}, r"nothing to replace"),
    "no such exclusion": (Model, {"exclude_modules": ["o_prj"]}, r"'o_prj' matches no nn\.Linear\. Did you mean 'o_p"),
    "no such pattern": (Model, {"exclude_modules": r"layers\..*"}, r"matches no nn\.Linear"),
    "nan": (nan_model, {}, r"blocks\.1\.o_proj\.weight is nan at \[3, 4\]"),
    "float64": (lambda: nn.Sequential(linear(), linear().double()), {}, r"1\.weight is torch\.float64"),
    "meta": (lambda: nn.Sequential(linear(), nn.Linear(3, 3, device="meta")), {}, r"1\.weight is on the meta device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_quantised_is_refused_and_nothing_changes(case: str) -> None:
    make, options, message = REFUSED[case]
    model = make()
    before = snapshot(model)
    with pytest.raises(LoRAError, match=message):
        lora.quantize(model, **options)
    assert snapshot(model) == before


def test_a_transformers_model_keeps_its_tied_head_and_trains_adapters() -> None:
    """The public path: quantise, inject, one backward pass; only the adapters get gradients."""
    model = lora.quantize(tiny_llama(tie_word_embeddings=True))
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == 14
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    before = model(IDS).logits
    lora.inject(model, lora.LoRAConfig(r=4))
    assert torch.equal(model(IDS).logits, before)  # B = 0: step 0 changes nothing
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = normal(*parameter.shape)
    model(IDS).logits.square().sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(with_gradient) == 28
