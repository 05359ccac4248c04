"""An 8B Llama-shaped model with random weights, ours and PEFT's way of training it, and what a step computes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import lora
from benchmarks.card.cases import Session, Shapes
from benchmarks.card.peers import peer
from lora import fast
from lora.layers import adapter_layers
from lora.nf4_layer import NF4Linear
from lora.reference.modes import CHECKPOINTING, set_checkpointing

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BOTH = "selective + offload"  # attention's outputs kept, block inputs in host memory
MODES = (*CHECKPOINTING, *(() if BOTH in CHECKPOINTING else (BOTH,)))
LONGEST = 1 << 20  # positions


def build(session: Session) -> Any:
    """The model on its device in bfloat16: made without memory, then filled there, which takes seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    s = session.shapes
    config: Any = LlamaConfig(  # type: ignore[call-arg]
        hidden_size=s.hidden, intermediate_size=s.ffn, num_hidden_layers=s.layers, num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads, head_dim=s.head_dim, vocab_size=s.vocab, max_position_embeddings=LONGEST,
        rms_norm_eps=1e-5, attn_implementation="sdpa", tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=session.device)
    generator = torch.Generator(session.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02, generator=generator)
    renew_rotary(model, session.device)
    return model


@contextmanager
def ours(model: Any, r: int) -> Iterator[list[Tensor]]:
    """The model with our adapters, fused by `for_training`; afterwards as it was. Yields what trains."""
    lora.inject(model, lora.LoRAConfig(r=r, lora_alpha=r, target_modules=list(TARGETS)))
    try:
        for path, layer in adapter_layers(model):
            fill_factors(path, layer.lora_A["default"], layer.lora_B["default"])
        lora.for_training(model)
        yield list(lora.trainable_parameters(model))
    finally:
        set_mode(model, "none")  # what checkpointing put into the blocks does not go with the adapters
        lora.eject(model)


@contextmanager
def peft(model: Any, r: int, dtype: torch.dtype) -> Iterator[tuple[Any, list[Tensor]]]:
    """The model in PEFT's hands, with the same adapters in `dtype`; afterwards as it was."""
    package = peer("peft")
    config = package.LoraConfig(r=r, lora_alpha=r, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    wrapped = package.get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)
    try:
        for path, layer in wrapped.named_modules():
            if hasattr(layer, "lora_A") and len(layer.lora_A):
                A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                fill_factors(path.removeprefix("base_model.model."), A, B)
        wrapped.train()
        yield wrapped, [p for p in wrapped.parameters() if p.requires_grad]
    finally:
        recompute_blocks(model, False)
        wrapped.unload()


def recompute_blocks(model: Any, on: bool) -> None:
    """transformers' own activation checkpointing, not re-entrant, under the name that this version gives it."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    elif model.is_gradient_checkpointing if kind == "gradient" else model.is_activation_checkpointing:
        getattr(model, f"{kind}_checkpointing_disable")()


@contextmanager
def in_float32(model: Any, device: torch.device) -> Iterator[None]:
    """The bfloat16 model in float32, and back without loss."""
    model.float()
    try:
        yield
    finally:
        model.bfloat16()
        renew_rotary(model, device)


def renew_rotary(model: Any, device: torch.device) -> None:
    """RoPE's frequencies made anew: they are a buffer, which casts round and which no file holds."""
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


@torch.no_grad()
def fill_factors(path: str, A: Tensor, B: Tensor) -> None:
    """The same random A and B for a path, whoever holds them: numbers that bfloat16 holds, B not zero."""
    generator = torch.Generator().manual_seed(sum(ord(letter) * 31**i for i, letter in enumerate(path)) % 2**31)
    for factor, scale in ((A, A.shape[1] ** -0.5), (B, 0.2)):
        numbers = torch.randn(factor.shape, generator=generator) * scale
        factor.copy_(numbers.to(torch.bfloat16))


def set_mode(model: Any, mode: str) -> None:
    """One of MODES for a model in our hands."""
    if mode in CHECKPOINTING:
        lora.for_training(model, checkpointing=mode)
        return
    lora.for_training(model)
    set_checkpointing(model, "offload", functools.partial(fast.checkpoint, selective=True))


# ---- what a step computes


def matrix_parameters(model: nn.Module) -> int:
    """N: the elements of every matrix that a token is multiplied by, the head included, the embedding not."""
    return sum(
        m.in_features * m.out_features
        for path, m in model.named_modules()
        if isinstance(m, (nn.Linear, NF4Linear)) and "lora_" not in path
    )


def adapter_parameters(s: Shapes) -> int:
    """A's and B's of all layers."""
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    pairs = (s.hidden + q, 2 * (s.hidden + kv), q + s.hidden, 3 * (s.hidden + s.ffn))
    return s.layers * s.r * sum(pairs)


def step_flops(s: Shapes, N: int, batch: int, length: int) -> int:
    """4·N·tokens + 6·N_lora·tokens + 6·length²·(heads·head_dim)·layers·batch.

    The frozen matrices take part in the forward and in dx (2 + 2 a parameter and token), the adapters in dA and dB too.
    Causal attention is half of 4·length² a feature in the forward, twice that in the backward. What checkpointing runs
    again is not counted: MFU is for the step's own arithmetic.
    """
    tokens = batch * length
    attention = 6 * length * length * s.heads * s.head_dim * s.layers * batch
    return 4 * N * tokens + 6 * adapter_parameters(s) * tokens + attention
