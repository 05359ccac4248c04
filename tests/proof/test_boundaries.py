"""Sizes at which kernels have been wrong elsewhere: one token, thousands, odd vocabularies, offsets beyond 2³¹.

Offsets beyond 2³¹ need gigabytes on a GPU; `tests/compile/test_offsets.py` checks on any machine that the compiled
kernels count them in 64 bits.
"""

from __future__ import annotations

import pytest
import torch

import lora.fast as fast
from lora.fast.runtime import interpreting
from lora.projection import Dropout
from lora.reference.dropout import keep_scale, threshold
from lora.testing.block_cases import EmbeddingInput, LayerNormInput, LossInput, MultiLoRAInput, RMSNormInput, RopeInput
from lora.testing.cases import Layer, LinearInput, MLPInput, QKVInput
from lora.testing.proof import assert_equivalent
from proof.laws import assert_same_bits
from proof.test_dropout import lane

LONG = 257 if interpreting() else 8192  # the interpreter takes a second for a thousand rows
VOCAB = 4099 if interpreting() else 50_257  # GPT-2's, a prime number
TYPES = [torch.float32, torch.bfloat16]
by_type = pytest.mark.parametrize("dtype", TYPES)
by_length = pytest.mark.parametrize("tokens", [1, LONG])
WIDE = 2**31 + 2**12  # elements
LAYER = Layer(17, 5, bias=True)


def large_gpu(what: str) -> pytest.MarkDecorator:
    """Runs on a GPU that holds tensors of that many elements; elsewhere the summary names what was not run."""
    fits = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= 30 * 2**30
    reason = f"{what} beyond 2**31 elements: not run, needs a CUDA device with 30 GiB of memory"
    return pytest.mark.skipif(not fits, reason=reason)


def cases(tokens: int, dtype: torch.dtype) -> list:
    shape, three = (1, tokens), (LAYER, Layer(9, 2), Layer(7, 0))
    return [
        LinearInput(dtype=dtype, shape=shape, in_features=33, layer=LAYER, dropout=Dropout(0.3, 7)),
        QKVInput(dtype=dtype, shape=shape, in_features=33, layers=three),
        MLPInput(dtype=dtype, shape=shape, in_features=17, layers=(Layer(29, 3), Layer(29, 3), LAYER)),
        EmbeddingInput(dtype=dtype, shape=shape, vocab=101, layer=Layer(9, 3)),
        RMSNormInput(dtype=dtype, shape=shape, features=33, residual=True),
        LayerNormInput(dtype=dtype, shape=shape, features=33, residual=True),
        RopeInput(dtype=dtype, batch=1, seq=tokens, heads=2, kv_heads=1, head_dim=6, rot=4),
        LossInput(dtype=dtype, shape=shape, features=9, layer=Layer(33, 2)),
        MultiLoRAInput(dtype=dtype, index=(1, -1, 0), inner=(tokens,), in_features=9, out_features=11, rank=3),
    ]


@by_type
@by_length
@pytest.mark.parametrize("which", range(9), ids=[type(case).__name__ for case in cases(1, torch.float32)])
def test_sequences_of_one_and_of_thousands(device, tokens, which, dtype):
    assert_equivalent(cases(tokens, dtype)[which], device)


@by_type
@pytest.mark.parametrize("vocab", [1, 2, VOCAB])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vocabularies_off_every_block(device, vocab, reduction, dtype):
    case = LossInput(dtype=dtype, shape=(3,), features=5, layer=Layer(vocab, 2), reduction=reduction, ignored=(1,))
    assert_equivalent(case, device)
    assert_equivalent(EmbeddingInput(dtype=dtype, shape=(5,), vocab=vocab, layer=Layer(6, 2)), device)


@by_type
@pytest.mark.parametrize("features", [1, 2, 4097, *([] if interpreting() else [16_385, 40_001])])
def test_rows_of_one_feature_and_of_more_than_a_block(device, features, dtype):
    assert_equivalent(RMSNormInput(dtype=dtype, shape=(3,), features=features, residual=True), device)
    assert_equivalent(LayerNormInput(dtype=dtype, shape=(3,), features=features, residual=True), device)


# ---- more than 2**31 elements


def wide(columns: int) -> torch.Tensor:
    """[rows, columns] of a few more than 2**31 random bfloat16 numbers."""
    torch.manual_seed(0)
    return torch.randn(WIDE // columns + 1, columns, dtype=torch.bfloat16, device="cuda")


def signs(*shape: int) -> torch.Tensor:
    """Numbers of which any sum below 2**24 is exact, in any order: what is found can be asked for in every bit."""
    return torch.randint(0, 2, shape, dtype=torch.bfloat16, device="cuda").mul_(2).sub_(1)


def only_at_the_end(thin: torch.Tensor) -> torch.Tensor:
    """Zeros in all rows but the last three, so that a sum over rows is theirs alone."""
    thin[:-3] = 0
    return thin


@large_gpu("norms")
@pytest.mark.parametrize("norm", [fast.rms_norm, fast.layer_norm])
def test_norms_beyond_two_to_the_31(norm):
    x, weight = wide(4096), torch.randn(4096, dtype=torch.bfloat16, device="cuda")
    end = x[-3:].clone().requires_grad_()
    y = norm(end, weight)
    assert_same_bits(norm(x, weight)[-3:], y.detach(), "y")
    (dx,) = torch.autograd.grad(y, end, end.detach())
    (found,) = torch.autograd.grad(norm(x.requires_grad_(), weight), x, x.detach())
    assert_same_bits(found[-3:], dx, "dx")


@large_gpu("the gated activation")
def test_the_gated_activation_beyond_two_to_the_31():
    from lora.fast.mlp import gated_backward, gated_forward

    g = wide(4096)
    end = g[-3:].clone()
    assert_same_bits(gated_forward(g, g, "silu")[-3:], gated_forward(end, end, "silu"), "h")
    for found, expected in zip(
        gated_backward(g, g, g, "silu")[:2], gated_backward(end, end, end, "silu")[:2], strict=True
    ):
        assert_same_bits(found[-3:].contiguous(), expected.contiguous(), "dg, dz")


@large_gpu("rotary embedding")
def test_rotary_embedding_beyond_two_to_the_31():
    q = wide(4096)[None].unflatten(-1, (32, 128)).transpose(1, 2)
    seq = q.shape[2]
    angles = torch.randn(seq, 64, device="cuda").repeat(1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    turned, _ = fast.rope(q, q[:, :1], cos, sin)
    expected, _ = fast.rope(q[:, :, -3:].clone(), q[:, :1, -3:].clone(), cos[-3:], sin[-3:])
    assert_same_bits(turned[:, :, -3:].contiguous(), expected.contiguous(), "q")


@large_gpu("dropout")
def test_dropout_beyond_two_to_the_31():
    from lora.fast.dropout import apply_dropout

    x, dropout = wide(4096), Dropout(0.3, 2**40 + 3)
    last = x.numel() - 64
    keep = torch.tensor([lane(dropout.seed, 0, last + i) >= threshold(0.3) for i in range(64)], device="cuda")
    found = apply_dropout(x, dropout).view(-1)[-64:]
    expected = (x.view(-1)[-64:].float() * keep_scale(0.3)).bfloat16() * keep
    assert_same_bits(found, expected, "D(x)")


@large_gpu("products that make their masks")
def test_masked_products_beyond_two_to_the_31():
    from lora.fast.dropout import apply_dropout
    from lora.fast.kernels.add_product import dropout_add_product
    from lora.fast.kernels.gemm import lora_A_gradient, skinny_gemm

    tokens, dropout = WIDE // 4096 + 1, Dropout(0.5, 2**40 + 3)
    x, A, du = signs(tokens, 4096), signs(16, 4096), only_at_the_end(signs(tokens, 16))
    kept = apply_dropout(x, dropout)[-3:].double()  # which the test above holds against the definition
    assert_same_bits(skinny_gemm(x, A, dropout)[-3:], (kept @ A.T.double()).bfloat16(), "u")
    assert_same_bits(lora_A_gradient(du, x, dropout), (du[-3:].T.double() @ kept).float(), "dA")
    mask = kept * x[-3:].double()  # 0 or 2
    expected = x[-3:].double() + mask * (du[-3:].double() @ A.double())
    assert_same_bits(dropout_add_product(x, du, A, dropout.p, dropout.seed)[-3:], expected.bfloat16(), "dx")


@large_gpu("products")
def test_products_beyond_two_to_the_31():
    from lora.fast.kernels.gemm import lora_B_gradient, lora_gemm, lora_gemm_dx

    tokens = WIDE // 4096 + 1
    x, weight, B, u = signs(tokens, 4096), signs(64, 4096), signs(64, 16), only_at_the_end(signs(tokens, 16))
    expected = x[-3:].double() @ weight.T.double() + u[-3:].double() @ B.T.double()
    assert_same_bits(lora_gemm(x, weight, u, B)[-3:], expected.bfloat16(), "h")
    assert_same_bits(lora_B_gradient(x, u), (x[-3:].T.double() @ u[-3:].double()).float(), "dB")
    dy, A = signs(tokens, 64), signs(16, 4096)
    expected = dy[-3:].double() @ weight.double() + u[-3:].double() @ A.double()
    assert_same_bits(lora_gemm_dx(dy, weight, u, A)[-3:], expected.bfloat16(), "dx")


@large_gpu("products of many adapters")
def test_many_adapters_beyond_two_to_the_31():
    from lora.fast.kernels.multi_lora import (
        group_tokens,
        multi_lora_A_gradient,
        multi_lora_B_gradient,
        multi_lora_expand_,
        multi_lora_shrink,
    )

    tokens = WIDE // 4096 + 1
    x, A, B, u = signs(tokens, 4096), signs(2, 16, 4096), signs(2, 4096, 16), only_at_the_end(signs(tokens, 16))
    index = torch.zeros(tokens, dtype=torch.long, device="cuda")
    index[-2:] = 1  # of the last three tokens one is adapter 0's
    groups = group_tokens(index, 2)
    which, end, thin = index[-3:], x[-3:].double(), u[-3:].double()
    found = multi_lora_shrink(x, A, torch.ones(2, device="cuda"), groups)
    assert_same_bits(found[-3:], torch.einsum("ti,tri->tr", end, A.double()[which]).bfloat16(), "u")
    owned = torch.nn.functional.one_hot(which, 2).double()  # [3, adapters]
    dA = torch.einsum("tj,tr,ti->jri", owned, thin, end).float()
    assert_same_bits(multi_lora_A_gradient(u, x, groups), dA, "dA")
    assert_same_bits(multi_lora_B_gradient(x, u, groups), dA.transpose(1, 2).contiguous(), "dB")
    expected = end + torch.einsum("tr,tor->to", thin, B.double()[which])
    assert_same_bits(multi_lora_expand_(x, u, B, groups)[-3:], expected.bfloat16(), "h")


@large_gpu("DoRA's row norms")
def test_dora_norms_beyond_two_to_the_31():
    from lora.fast.kernels.dora import dora_norm

    weight, A, B = signs(WIDE // 4096 + 1, 4096), signs(16, 4096), signs(WIDE // 4096 + 1, 16)
    end = dora_norm(weight[-3:].clone(), A, B[-3:].clone(), 1.0)
    assert_same_bits(dora_norm(weight, A, B, 1.0)[-3:], end, "norms")


@large_gpu("NF4")
def test_nf4_beyond_two_to_the_31():
    part = torch.randn(8, 4096, device="cuda").bfloat16()
    quantised = fast.nf4_quantize(part, double_quant=False)
    many = fast.nf4_quantize(part.repeat(WIDE // part.numel() + 1, 1), double_quant=False)
    assert torch.equal(many.codes[-len(quantised.codes) :], quantised.codes), "codes"  # whole numbers
    assert_same_bits(many.absmax[-len(quantised.absmax) :], quantised.absmax, "absmax")
    assert_same_bits(fast.nf4_dequantize(many)[-8:], fast.nf4_dequantize(quantised), "the last rows")


@large_gpu("the loss")
def test_the_loss_beyond_two_to_the_31():
    from lora.fast.kernels.cross_entropy import cross_entropy_

    vocab = 128_256
    logits = wide(vocab)
    labels = torch.arange(len(logits), device="cuda") % vocab
    end = logits[-3:].clone()
    expected = cross_entropy_(end, labels[-3:].clone())
    assert_same_bits(cross_entropy_(logits, labels)[-3:], expected, "loss")
    assert_same_bits(logits[-3:], end, "the logits' gradient")
