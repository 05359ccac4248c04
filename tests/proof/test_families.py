"""Whole models of every family that fast fuses, proven: reference, fast, and the untouched model with PEFT's adapters.

Small models of random shapes, all of them in float64, norms, softmax and loss too (`Wide`), so that nothing but its
roundings tells the three apart: logits, loss, every adapter's gradient, and twenty optimizer steps. And in float32,
which Triton's kernels run: as near to the float64 model as the reference is.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import peft
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

import lora
from lora.fast.runtime import interpreting
from lora.testing.proof import ROUNDINGS
from proof.laws import examples

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "granite", "olmo2"]
STEPS = 2 if interpreting() else 20
# A dozen layers of sums of some 100 terms: 12 · 100 · 2⁻⁵³ is 1e-13 of the largest number, and as much again backwards.
ROUNDING = 1e-12


class Wide(TorchFunctionMode):
    """What is float64 stays float64, where transformers asks for float32: in norms, softmax and loss."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float and args[0].dtype in (torch.float64, torch.int64):  # positions, too
            return args[0].double()
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def random_model(family: str, rng: random.Random, device: str, layers: int | None = None) -> Any:
    """A model of `layers`, or one to three, no size a multiple of any block, weights two-sided, norms off one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kv_heads, groups, dim = rng.choice([1, 2]), rng.choice([1, 2, 3]), rng.choice([4, 6, 8])
    # what has no head_dim of its own divides its width among the heads
    by_head = dim if family in ("phi3", "olmo2", "granite") else rng.choice([5, 7, 11])
    sizes = {
        "hidden_size": kv_heads * groups * by_head, "intermediate_size": rng.choice([17, 27, 40]),
        "num_hidden_layers": layers or rng.choice([1, 2, 3]),
        "num_attention_heads": kv_heads * groups, "num_key_value_heads": kv_heads, "head_dim": dim,
        "vocab_size": rng.choice([37, 50, 61]), "max_position_embeddings": 64, "sliding_window": rng.choice([4, 64]),
        "tie_word_embeddings": rng.random() < 0.5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(rng.randrange(2**32))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name and "gemma" not in family else 0.0
            parameter.copy_(0.2 * torch.randn(parameter.shape, dtype=torch.float64) + offset)
    return model.eval().to(device)


def adapter_options(model: Any, rng: random.Random) -> dict[str, Any]:
    """Which layers have adapters, and of what kind; often not all."""
    ends = {path.rsplit(".", 1)[-1] for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {
        "lm_head"
    }
    left_out = rng.sample(sorted(ends), k=rng.choice([0, 0, 1, 2]))
    return {
        "r": rng.choice([1, 3, 4]), "lora_alpha": rng.choice([2, 7]), "use_rslora": rng.random() < 0.5,
        "target_modules": sorted(ends - set(left_out)), "use_dora": rng.random() < 0.3,
    }  # fmt: skip


class Twin:
    """A model with adapters: its trainable parameters under names that PEFT's model and ours share."""

    def __init__(self, model: Any, parameters: dict[str, Tensor]) -> None:
        self.model, self.parameters = model, parameters
        self.width = Wide if model.dtype == torch.float64 else nullcontext

    def step(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and each adapter's gradient."""
        with self.width():
            loss = self.model(input_ids=ids, labels=labels).loss
            gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        return loss.detach(), dict(zip(self.parameters, gradients, strict=True))

    def logits(self, ids: Tensor) -> Tensor:
        with self.width(), torch.no_grad():
            return self.model(input_ids=ids).logits

    def train(self, ids: Tensor, labels: Tensor) -> list[float]:
        """The losses of STEPS steps of AdamW."""
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.01)
        losses = []
        for i in range(STEPS):
            loss, gradients = self.step(ids.roll(i, 1), labels.roll(i, 1))
            for name, p in self.parameters.items():
                p.grad = gradients[name]
            optimizer.step()
            losses.append(float(loss))
        return losses


def theirs(base: Any, options: dict[str, Any], seed: int) -> Twin:
    """PEFT's model, every adapter off its start."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.dtype == torch.float64
            with torch.no_grad():
                p += 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)
            parameters[plain_name(name)] = p
    return Twin(model, parameters)


def ours(base: Any, options: dict[str, Any], other: Twin) -> Twin:
    """Our model with the other's adapters."""
    model = lora.inject(copy.deepcopy(base), lora.LoRAConfig(**options))
    parameters = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == other.parameters.keys()
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(other.parameters[name])
    return Twin(model, parameters)


def plain_name(name: str) -> str:
    """A parameter's name without what PEFT wraps around it."""
    for wrapped in ("base_model.model.", ".default", ".weight"):
        name = name.replace(wrapped, "")
    return name.replace("lora_magnitude_vector", "lora_magnitude")


def assert_near(found: Tensor, expected: Tensor, room: float, name: str) -> None:
    scale, error = float(expected.abs().max()), float((found - expected).abs().max())
    assert error <= room * scale, f"{name} differs by {error:.3g} where the largest is {scale:.3g}"


def distance(one: Twin, other: Twin) -> float:
    """How far two models' adapters are from each other, all together."""
    return sum(float((p - other.parameters[n]).detach().square().sum()) for n, p in one.parameters.items()) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
@settings(examples(2), phases=[Phase.generate])  # a seed has nothing to shrink to
@given(seed=st.integers(0, 2**32))
def test_reference_fast_and_peft_train_one_model(device, family, seed):
    rng = random.Random(seed)
    base = random_model(family, rng, device)
    options = adapter_options(base, rng)
    ids = torch.randint(3, base.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(seed)).to(device)
    labels = ids.masked_fill(ids % 5 == 0, -100)
    labels[:, 1] = ids[:, 1]
    untouched, moved = theirs(base, options, seed), theirs(base, options, seed)
    expected_logits, (expected_loss, expected) = untouched.logits(ids), untouched.step(ids, labels)
    assert all(gradient.any() for gradient in expected.values())
    twins: dict[str, Twin] = {}
    for backend in ("reference", "fast"):
        with lora.use_backend(backend):
            twin = twins[backend] = ours(base, options, untouched)
            lora.for_inference(twin.model)
            assert_near(twin.logits(ids), expected_logits, ROUNDING, f"{backend}'s logits")
            lora.for_training(twin.model)
            loss, gradients = twin.step(ids, labels)
        assert_near(loss, expected_loss, ROUNDING, f"{backend}'s loss")
        for name, gradient in expected.items():
            assert_near(gradients[name], gradient, ROUNDING, f"{backend}'s gradient of {name}")

    # A step passes on what the steps before it left. How far the model carries a start that is 2⁻³⁴ off is how far it
    # may carry roundings: 2⁻⁵³ each, in fewer than 2¹⁹ places
    with torch.no_grad():
        for name, p in moved.parameters.items():
            p.copy_(untouched.parameters[name] * (1 + 2.0**-34))
    assert 0 < distance(untouched, moved) < 1e-8
    losses, others = untouched.train(ids, labels), moved.train(ids, labels)
    room = distance(untouched, moved)
    assert abs(losses[-1] - losses[0]) > 1e-4 * losses[0]  # the steps have moved it, down or, of a random model, up
    for backend, twin in twins.items():
        with lora.use_backend(backend):
            found = twin.train(ids, labels)
        assert distance(twin, untouched) <= room, f"{backend} after {STEPS} steps"
        differences = [abs(a - b) for a, b in zip(found, losses, strict=True)]
        allowed = max(abs(a - b) for a, b in zip(others, losses, strict=True)) + ROUNDING * max(losses)
        assert max(differences) <= allowed, f"{backend}'s losses"


# ---- in float32, which Triton's kernels run

DRAWS = 16
LAUNCHED = {
    "norm_forward_kernel", "norm_backward_kernel", "rope_kernel", "gated_forward_kernel", "gated_backward_kernel",
    "cross_entropy_kernel",
}  # fmt: skip


def everything(twin: Twin, backend: str, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Logits, loss, and every adapter's gradient."""
    with lora.use_backend(backend):
        lora.for_inference(twin.model)
        logits = twin.logits(ids)
        lora.for_training(twin.model)
        loss, gradients = twin.step(ids, labels)
    return {"logits": logits, "loss": loss, **gradients}


def adapted(base: Any, options: dict[str, Any], seed: int) -> Twin:
    """Our model, every adapter off its start."""
    model = lora.inject(base, lora.LoRAConfig(**options))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters.values():
            p += 0.2 * torch.randn(p.shape, generator=generator).to(p)
    return Twin(model, parameters)


def moved_by_a_rounding(twin: Twin, wide: Twin, generator: torch.Generator) -> None:
    """Each number of the float32 model a rounding up or down, or left; and the float64 model its equal."""
    with torch.no_grad():
        for p, same in zip(twin.model.parameters(), wide.model.parameters(), strict=True):
            step = torch.randint(-1, 2, p.shape, generator=generator).to(p)
            p *= 1 + torch.finfo(p.dtype).eps * step
            same.copy_(p)


def errors_of(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((found[name].double() - value).abs().max()) for name, value in truth.items()}


@contextmanager
def launches() -> Iterator[set[str]]:
    """The names of the Triton kernels that run meanwhile."""
    from lora.fast import kernels

    names: set[str] = set()

    def counted(name: str, run: Any) -> Any:
        return lambda *arguments, **options: (names.add(name), run(*arguments, **options))[1]

    with pytest.MonkeyPatch.context() as patch:
        for found in pkgutil.iter_modules(kernels.__path__):
            for name, kernel in vars(importlib.import_module(f"{kernels.__name__}.{found.name}")).items():
                if name.endswith("_kernel") and hasattr(kernel, "fn"):
                    patch.setattr(kernel, "run", counted(name, kernel.run), raising=False)
        yield names


def assert_as_near_as_the_reference(device: str, family: str, seed: int, spoil: Any = None) -> None:
    """Each result's largest error is at most twice the reference's, and a few roundings of the result.

    What one model makes of its roundings is one draw of a wide distribution: so the reference's error is the largest of
    several, of the model and of its neighbours, whose parameters are a few roundings off.

    spoil: done to the fast backend's model.
    """
    base = random_model(family, random.Random(seed), device, 1 if interpreting() else 2).float()
    ids = torch.randint(3, base.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(seed)).to(device)
    labels = ids.masked_fill(ids % 5 == 0, -100)
    options = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}
    twin = adapted(base, options, seed)
    wide_model = copy.deepcopy(twin.model).double()
    wide = Twin(wide_model, {n: p for n, p in wide_model.named_parameters() if p.requires_grad})
    fast_model = copy.deepcopy(twin.model)
    fast = Twin(fast_model, {n: p for n, p in fast_model.named_parameters() if p.requires_grad})
    if spoil is not None:
        spoil(fast)
    allowed: dict[str, float] = {}
    generator = torch.Generator().manual_seed(seed)
    for draw in range(DRAWS):
        truth = everything(wide, "reference", ids, labels)
        for name, error in errors_of(everything(twin, "reference", ids, labels), truth).items():
            allowed[name] = max(allowed.get(name, 0.0), 2 * error)
        if draw == 0:
            exact = truth
        moved_by_a_rounding(twin, wide, generator)
    with launches() if interpreting() or device == "cuda" else nullcontext(LAUNCHED) as launched:
        found = everything(fast, "fast", ids, labels)
    assert launched >= LAUNCHED
    assert all(value.dtype == torch.float32 for value in found.values())
    for name, error in errors_of(found, exact).items():
        rounding = torch.finfo(torch.float32).eps * float(exact[name].abs().max())
        assert exact[name].any()
        assert error <= allowed[name] + ROUNDINGS * rounding, f"{name} is wrong by {error:.3g}, not {allowed[name]:.3g}"


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_in_float32_is_as_near_to_float64_as_the_reference_is(device, family):
    assert_as_near_as_the_reference(device, family, seed=1 + FAMILIES.index(family))


def test_an_adapter_that_is_off_in_its_fourth_digit_is_noticed(device):
    """One B of one layer, by a factor of 1 + 2⁻¹³."""

    def spoil(twin: Twin) -> None:
        with torch.no_grad():
            twin.parameters["model.layers.0.mlp.up_proj.lora_B.default"] *= 1 + 2.0**-13

    with pytest.raises(AssertionError, match="is wrong by"):
        assert_as_near_as_the_reference(device, "llama", 1, spoil)
