"""Small models for tests: every kind of module an adapter can meet, in a few hundred parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IDS = torch.tensor([[1, 4, 2, 8, 5], [7, 1, 3, 0, 10]])


class Block(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.down_proj = nn.Linear(2 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.tanh(self.v_proj(self.norm(self.q_proj(x)))))


class Toy(nn.Module):
    """embedding -> blocks -> head; `tied` gives the head the embedding's own weight."""

    def __init__(
        self, width: int = 16, layers: int = 3, vocab: int = 11, bias: bool = True, tied: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList([Block(width, bias) for _ in range(layers)])
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def toy(seed: int = 0, **options: Any) -> Toy:
    torch.manual_seed(seed)
    return Toy(**options).eval()


def stir(model: nn.Module, seed: int = 1) -> None:
    """Moves every trainable parameter, so that no adapter is at its zero start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)


def tiny_llama(seed: int = 0, **overrides: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**(sizes | overrides))).eval()


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, int], dict[str, bool]]:
    """Values, identities and flags: what eject must give back exactly."""
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    return values, modules, flags


def assert_same(model: nn.Module, before: tuple[dict[str, Tensor], dict[str, int], dict[str, bool]]) -> None:
    values, modules, flags = snapshot(model)
    assert modules == before[1]
    assert flags == before[2]
    assert values.keys() == before[0].keys()
    for name, tensor in values.items():
        assert torch.equal(tensor, before[0][name]), name
