"""Nothing is left over from a call before: what fast keeps between calls is never taken for something else."""

from __future__ import annotations

import pytest
import torch

import lora.fast as fast
import lora.reference as reference
from lora.projection import Projection
from lora.testing import bounds
from lora.testing.cases import two_dimensional
from lora.testing.proof import Maker, mapped, on_cpu, widened
from lora.testing.report import assert_within
from proof.laws import assert_same_bits


def batch(
    device: str, seed: int, adapters: int = 3
) -> tuple[torch.Tensor, Projection, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [4, 5, 7], a base [6, 7], and adapters of rank 2."""
    make = Maker(seed, torch.float32, device)
    A, B, scaling = make.normal(adapters, 2, 7), make.normal(adapters, 6, 2), make.positive(adapters)
    return make.normal(4, 5, 7), Projection(make.normal(6, 7)), A, B, scaling


def assert_right(
    found: torch.Tensor, result: str, x: torch.Tensor, base: Projection, A, B, scaling, index: torch.Tensor
) -> None:
    """`multi_lora_linear`'s "h", or its "dlora_A" for a dy of ones, is within its bound of the reference in float64."""
    tensors = {"x": x, "base": base, "lora_A": A, "lora_B": B, "scaling": scaling}
    exact = mapped(mapped(tensors, widened), on_cpu)
    A64 = exact["lora_A"].requires_grad_()
    h = reference.multi_lora_linear(**exact, index=index.cpu())
    truth = h.detach() if result == "h" else torch.autograd.grad(h, A64, torch.ones_like(h))[0]
    given = mapped(tensors, on_cpu) | {"x": two_dimensional(x.detach().cpu())}
    by_token, dy = index.cpu().repeat_interleave(x.shape[1]), torch.ones(h.numel() // h.shape[-1], h.shape[-1])
    bound = bounds.multi_lora(**given, index=by_token, dy=dy)[result].bound()
    assert_within(found, truth, bound.reshape(truth.shape), result)


def test_an_adapter_index_that_was_changed_in_place_is_read_again(device):
    """The groups of a batch are kept for its next layer; the same tensor with other numbers is another batch."""
    x, base, A, B, scaling = batch(device, 0)
    index = torch.tensor([0, 2, -1, 1], device=device)
    first = fast.multi_lora_linear(x, base, A, B, scaling, index)
    assert_same_bits(fast.multi_lora_linear(x, base, A, B, scaling, index), first)
    index[:2] = torch.tensor([1, 1], device=device)
    found = fast.multi_lora_linear(x, base, A, B, scaling, index)
    assert not torch.equal(found, first)
    assert_right(found, "h", x, base, A, B, scaling, index)


def test_one_index_serves_batches_of_other_lengths_and_other_adapters(device):
    """The same index tensor with more tokens an entry, then with more adapters than before."""
    index = torch.tensor([0, 2, -1, 1], device=device)
    for seed, (tokens, adapters) in enumerate([(5, 3), (2, 3), (5, 4), (5, 3)]):
        x, base, A, B, scaling = batch(device, seed, adapters)
        arguments = (x[:, :tokens].contiguous(), base, A, B, scaling)
        assert_right(fast.multi_lora_linear(*arguments, index), "h", *arguments, index)


def test_a_backward_uses_the_groups_of_its_own_forward(device):
    """Another batch goes through between a forward and its backward."""
    x, base, A, B, scaling = batch(device, 0)
    A.requires_grad_()
    first, second = torch.tensor([0, 2, -1, 1], device=device), torch.tensor([1, 0, 0, -1], device=device)
    h = fast.multi_lora_linear(x, base, A, B, scaling, first)
    fast.multi_lora_linear(x, base, A, B, scaling, second)
    (dA,) = torch.autograd.grad(h, A, torch.ones_like(h))
    assert_right(dA, "dlora_A", x, base, A, B, scaling, first)


@pytest.mark.parametrize("sizes", [((9, 16), (5, 7)), ((5, 7), (9, 16)), ((5, 7), (5, 7))])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2])
def test_one_layers_decoded_weight_is_not_anothers(device, sizes, dtypes):
    """NF4 weights of several sizes and types take turns in the workspace; each is what it decodes to, in every bit."""
    layers, dense = [], []
    for i, ((out, fan_in), dtype) in enumerate(zip(sizes, dtypes, strict=True)):
        make = Maker(i, dtype, device)
        projection = Projection(reference.nf4_quantize(make.normal(out, fan_in)), None, None, None, 1.0)
        layers.append((make.normal(3, fan_in).requires_grad_(), projection))
        dense.append(projection._replace(weight=reference.nf4_dequantize(projection.weight, dtype)))
    outputs = [fast.lora_linear(x, projection) for x, projection in (*layers, *layers)]
    expected = [fast.lora_linear(x, projection) for (x, _), projection in zip(layers, dense, strict=True)]
    for h, again, right in zip(outputs, outputs[2:], expected, strict=False):
        assert_same_bits(again.detach(), h.detach())
        assert_same_bits(h.detach(), right.detach())
    for (x, _), h, right in zip(layers, outputs, expected, strict=False):
        dy = torch.ones_like(h)
        assert_same_bits(torch.autograd.grad(h, x, dy)[0], torch.autograd.grad(right, x, dy)[0])
