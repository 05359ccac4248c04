"""plan_checkpointing: what it predicts is what a step takes, and it chooses the best plan there is."""

from __future__ import annotations

import itertools
import random
import weakref

import pytest
import torch
from tiny import stir, tiny_llama, toy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora
from lora import LoRAConfig, LoRAError
from lora.fast.workspace import release_workspaces, workspaces_on
from lora.measure import Block, Ledger, Measured, Step, arithmetic_of, measure
from lora.planner import Problem, bytes_of, readable

TOKENS = (2, 32)
HIDDEN = 2 * 32 * 32 * 4  # bytes of one [2, 32, 32] hidden state in float32
IDS = torch.randint(3, 64, TOKENS, generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}


def tiny_gemma3():
    """Every second layer looks back 8 tokens only: blocks that are not alike."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "sliding_window": 8}
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, layer_types=["sliding_attention", "full_attention"] * 2))


FAMILIES = {"llama": lambda: tiny_llama(num_hidden_layers=4), "gemma3": tiny_gemma3}


def adapted(family: str = "llama", **options):
    model = lora.inject(FAMILIES[family](), LoRAConfig(r=4, **options))
    stir(model)
    return model


class Live(TorchDispatchMode):
    """What is in memory, by looking at every operation's results: the truth that predictions are held against."""

    def __init__(self, *owned: torch.Tensor) -> None:
        super().__init__()
        self.owned = [x.untyped_storage() for x in owned]
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if id(storage) not in self.sizes and not any(storage is each for each in self.owned):
                    self.sizes[id(storage)] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.gone, id(storage))
        return result

    def gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def step(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(**BATCH).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def bytes_of_a_step(model) -> tuple[int, int]:
    """Bytes between forward and backward, the loss left out, and at the peak, gradients included."""
    step(model)  # gradients are there, as in the second of accumulated batches
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    scratch = workspaces_on(torch.device("cpu"))  # there since the step before
    with Live(*model.parameters(), *model.buffers(), *BATCH.values(), *gradients, *scratch) as live:
        loss = model(**BATCH).loss
        kept = live.now - loss.nbytes
        loss.backward()
    return kept, live.peak + sum(x.nbytes for x in (*gradients, *scratch))


@pytest.mark.parametrize("backend", ["reference", "fast"])
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, {"use_dora": True}], ids=["dropout", "dora"])
def test_a_step_takes_what_is_predicted(backend, family, options):
    release_workspaces()
    with lora.use_backend(backend):
        model = adapted(family, **options)
        expected_loss, expected = step(lora.for_training(model))
        largest = lora.plan_checkpointing(model, BATCH, "1GiB")
        assert set(largest.values()) == {"none"} and largest.peak == largest.plain > largest.leanest
        seen = set()
        for part in range(4):
            budget = largest.leanest + (largest.plain - largest.leanest) * part // 3
            plan = lora.plan_checkpointing(model, BATCH, budget)
            lora.for_training(model, plan)
            loss, gradients = step(model)
            assert torch.equal(loss, expected_loss)
            assert all(torch.equal(gradients[name], expected[name]) for name in expected)
            kept, peak = bytes_of_a_step(model)
            assert plan.kept == kept
            # Counted too much at most: the embedding's output and the last block's, taken to stay; and a block's
            # gradients, which the measurement holds together while a step adds each up at once.
            slack = 2 * HIDDEN + sum(p.nbytes for p in model.model.layers[0].parameters() if p.requires_grad)
            assert peak <= plan.peak <= budget and plan.peak <= peak + slack
            seen.add(tuple(plan.values()))
        assert len(seen) == 4  # they are different plans, not one for all


def test_saved_tensors_hooks_count_the_same():
    """Another witness: autograd's own hooks, where no attention outputs are kept beside it."""
    model = adapted()
    largest = lora.plan_checkpointing(model, BATCH, "1GiB")
    owned = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers(), IDS)}
    for part in range(5):
        budget = largest.leanest + (largest.plain - largest.leanest) * part // 4
        plan = lora.plan_checkpointing(model, BATCH, budget, modes=["none", "recompute"])
        lora.for_training(model, plan)
        kept = {}

        def pack(x, kept=kept):
            if x.untyped_storage().data_ptr() not in owned:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(**BATCH).loss
        # A checkpoint also holds the block's keyword arguments: cos and sin [1, 32, 8], position ids [1, 32] of int64.
        bound = 2 * 32 * 8 * 4 + 32 * 8
        assert plan.kept - bound <= sum(kept.values()) <= plan.kept <= budget
        del loss


def test_what_waits_longest_keeps_least():
    model = adapted()
    largest = lora.plan_checkpointing(model, BATCH, "1GiB")
    for part in range(1, 5):
        budget = largest.leanest + (largest.plain - largest.leanest) * part // 5
        plan = lora.plan_checkpointing(model, BATCH, budget)
        kept = [block.kept[block.mode] for block in plan.blocks[1:]]  # the first one's input does not require grad
        assert kept == sorted(kept)


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_measuring_holds_one_block_at_a_time(backend):
    peaks = []
    with lora.use_backend(backend):
        for layers in (3, 9):
            model = lora.inject(tiny_llama(num_hidden_layers=layers), LoRAConfig(r=4))
            lora.for_training(model)  # fusing lays the weights anew
            with Live(*model.parameters(), *model.buffers(), *BATCH.values()) as live:
                plan = lora.plan_checkpointing(model, BATCH, "1GiB")
            peaks.append(live.peak)
            saved = plan.blocks[1].kept["none"]
    assert peaks[1] - peaks[0] < saved  # six blocks more, and not the activations of one


@pytest.mark.parametrize("backend", ["reference", "fast"])
@pytest.mark.parametrize("prepared", [False, True])
def test_the_model_is_left_as_it_was(backend, prepared):
    with lora.use_backend(backend):
        model = adapted(lora_dropout=0.3)
        model.config.use_cache = True
        if prepared:
            lora.for_training(model, "selective")
            step(model)
        model.model.layers[1].eval()
        forwards = {path: m.forward for path, m in model.named_modules() if "forward" in vars(m)}
        hooks = {path: dict(vars(m)) for path, m in model.named_modules() if hasattr(m, "gradient_checkpointing")}
        flags = {path: m.training for path, m in model.named_modules()}
        gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        state, modes, cache = torch.get_rng_state(), dict(model.lora_state.modes), model.config.use_cache
        lora.plan_checkpointing(model, BATCH, "1GiB")
        assert torch.equal(torch.get_rng_state(), state)
        assert flags == {path: m.training for path, m in model.named_modules()}
        assert forwards == {path: m.forward for path, m in model.named_modules() if "forward" in vars(m)}
        for path, values in hooks.items():
            now = vars(model.get_submodule(path))
            for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                assert now.get(name) is values.get(name), (path, name)
        for name, p in model.named_parameters():
            assert (p.grad is None) == (gradients[name] is None)
            assert p.grad is None or torch.equal(p.grad, gradients[name])
        assert (model.lora_state.modes, model.config.use_cache) == (modes, cache)


def test_an_error_while_measuring_leaves_the_model_as_it_was():
    model = adapted().eval()
    model.config.use_cache = True
    with pytest.raises(IndexError):
        lora.plan_checkpointing(model, {"input_ids": IDS + 64, "labels": IDS}, "1GiB")
    assert not model.training and model.config.use_cache is True and model.lora_state.modes == {}
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_the_plan_prints_as_a_table_and_is_a_mapping():
    model = adapted()
    plan = lora.plan_checkpointing(model, BATCH, lora.plan_checkpointing(model, BATCH, "1GiB").leanest)
    text = str(plan)
    assert text.count("model.layers.") == 4 and "recompute" in text and "after the blocks" in text
    assert f"budget of {readable(plan.budget)}" in text and "offload is not planned on a CPU" in text
    assert list(plan) == [f"model.layers.{i}" for i in range(4)] and len(plan) == 4
    assert plan["model.layers.0"] == "recompute" and max(len(line) for line in text.splitlines()) <= 150


# ---- the choice


def random_measured(rng: random.Random, blocks: int, device: str = "cuda") -> Measured:
    """Numbers that a step could have."""
    made = []
    for number in range(blocks):
        size = rng.randint(1, 9)
        working = rng.randint(5, 60)
        made.append(
            Block(
                str(number),
                selective=rng.choice([0, size, 2 * size]),
                arithmetic=rng.randint(10, 40),
                spared=rng.randint(1, 5),
                left_out=rng.randint(0, 4),
                working=working,
                working_again=working + size,
                calls=1,
                input=size,
                saved=rng.randint(0, 50),
                others=rng.randint(0, 5),
            )
        )
    return Measured(made, {}, rng.randint(0, 20), rng.randint(0, 40), rng.randint(0, 80), device)


def need_and_cost(problem: Problem, modes: tuple[str, ...]) -> tuple[int, tuple[int, int]]:
    """The formulas at the top of lora/planner.py, written down again."""
    measured, before, needs = problem.measured, 0, []
    for block, mode, choices in zip(measured.blocks, modes, problem.choices, strict=True):
        own = block.input + (block.selective if mode == "selective" else 0)
        working = block.working if mode == "none" else block.working_again
        needs.append(problem.constant + block.others + before + own + working)
        before += {"none": block.saved, "offload": 0}.get(mode, own)
        assert choices[mode].kept == {"none": block.saved, "offload": 0}.get(mode, own)
    needs += [problem.constant + before + measured.loss_working, measured.before_blocks]
    arithmetic = sum(
        block.arithmetic - block.left_out - (block.spared if mode == "selective" else 0)
        for block, mode in zip(measured.blocks, modes, strict=True)
        if mode != "none"
    )
    moved = sum(2 * block.input for block, mode in zip(measured.blocks, modes, strict=True) if mode == "offload")
    return max(needs), (arithmetic, moved)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("modes", [["none", "selective", "recompute"], ["none", "selective", "recompute", "offload"]])
def test_the_choice_is_the_best_of_all_plans(seed, modes):
    rng = random.Random(seed)
    problem = Problem(random_measured(rng, 5), modes)
    every = [need_and_cost(problem, plan) for plan in itertools.product(*(c.keys() for c in problem.choices))]
    smallest = min(need for need, _ in every)
    assert problem.leanest()[0] == smallest
    assert problem.solve(smallest - 1) is None
    before = None
    for budget in range(smallest, max(need for need, _ in every) + 2):
        found = problem.solve(budget)
        assert found is not None
        assert found.cost == min(cost for need, cost in every if need <= budget)
        assert need_and_cost(problem, found.modes) == (found.need, found.cost) and found.need <= budget
        assert before is None or found.cost <= before  # a larger budget never computes more again
        before = found.cost


def test_a_block_that_runs_twice_is_taken_to_hold_its_own_all_the_time():
    measured = random_measured(random.Random(0), 3)
    measured.blocks[0].calls = 2
    problem = Problem(measured, ["none", "recompute"])
    kept = sum(block.saved for block in measured.blocks)
    working = max(b.others + b.input + b.selective + b.working_again for b in measured.blocks)
    found = problem.solve(10**6)
    assert found is not None and set(found.modes) == {"none"}
    assert found.need == problem.constant + kept + max(working, measured.loss_working)


def test_what_every_checkpoint_holds_belongs_to_no_plan():
    """A hidden state that is handed on by keyword stays on the device in every mode; so does what two blocks share."""
    measured = Step(Ledger(torch.device("cpu"), []))
    measured.blocks = {
        "a": Block("a", inputs={3: 7}, bound={1: 100}, saves={1: 100, 2: 5, 4: 11}),
        "b": Block("b", inputs={5: 9}, saves={4: 11, 5: 9, 6: 2}),
    }
    sums = measured.sums(1000, 10, "cpu")
    assert sums.constant == 1000 + 10 + 100 + 11
    assert [(b.input, b.saved) for b in sums.blocks] == [(7, 5), (9, 11)]
    assert sums.kept_by(["recompute", "none"]) == 100 + 7 + 11 + 9 + 2
    assert sums.kept_by(["offload", "recompute"]) == 100 + 9


def test_selective_without_fused_attention_is_recompute():
    """Eager attention leaves it nothing to keep: the plans, and the bytes, of "recompute"."""
    with lora.use_backend("reference"):
        model = adapted()
        model.set_attn_implementation("eager")
        again = lora.plan_checkpointing(model, BATCH, "1GiB", modes=["recompute"])
        plan = lora.plan_checkpointing(model, BATCH, "1GiB", modes=["selective"])
        assert set(plan.values()) == {"selective"} and plan.peak == again.peak
        assert [block.kept["selective"] for block in plan.blocks] == [block.kept["recompute"] for block in again.blocks]
        for other in ("selective", "recompute"):
            least = lora.plan_checkpointing(model, BATCH, again.leanest, modes=["none", other])
            assert set(least.values()) == {other}
        both = lora.plan_checkpointing(model, BATCH, again.leanest)
        assert set(both.values()) == {"recompute"} and not any("selective" in block.kept for block in both.blocks)


def test_offload_is_for_gpus():
    model = adapted()
    plan = lora.plan_checkpointing(model, BATCH, "1GiB")
    assert plan.device == "cpu" and not any("offload" in block.kept for block in plan.blocks)
    with pytest.raises(LoRAError, match="'offload', which needs a GPU"):
        lora.plan_checkpointing(model, BATCH, "1GiB", modes=["offload"])
    lora.for_training(model)
    measured = measure(model, BATCH, None)
    measured.device = "cuda"
    with_offload = Problem(measured, ["none", "recompute", "offload"])
    assert with_offload.constant == measured.constant + 2 * HIDDEN


# ---- bad input


def test_a_budget_too_small_names_the_one_that_does():
    model = adapted()
    leanest = lora.plan_checkpointing(model, BATCH, "1GiB").leanest
    assert lora.plan_checkpointing(model, BATCH, leanest).peak == leanest
    with pytest.raises(LoRAError, match=rf"the leanest plan .*recompute in \d blocks.* at least {leanest:,} bytes"):
        lora.plan_checkpointing(model, BATCH, leanest - 1)


@pytest.mark.parametrize("budget", [0, -1, True, "6 gallons", "GiB", "", "-3MB", None, float("nan"), float("inf")])
def test_a_budget_is_a_number_of_bytes(budget):
    with pytest.raises(LoRAError, match=r"budget is .*, expected a number of bytes, or text like '6GiB'"):
        lora.plan_checkpointing(adapted(), BATCH, budget)


def test_budgets_in_words():
    words = {
        "6GiB": 6 << 30,
        "1.5 kib": 1536,
        "800MB": 800_000_000,
        "2g": 2 << 30,
        "1000": 1000,
        "7 B": 7,
        "1e6": 10**6,
    }
    assert {word: bytes_of(word) for word in words} == words
    assert bytes_of(1e9) == 10**9
    assert [readable(n) for n in (7, 1536, 3 << 20, 6 << 30)] == ["7 B", "1.50 KiB", "3.00 MiB", "6.00 GiB"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ["recompute", "selectiv"]}, "modes names 'selectiv', .*Did you mean 'selective'"),
        ({"modes": "recompute"}, "modes is 'recompute', expected a list"),
        ({"modes": []}, r"modes is \[\], expected a list"),
        ({"batch": {"input_ids": IDS}}, "LlamaForCausalLM with input_ids gives no loss: put labels"),
        ({"batch": IDS}, "batch is a Tensor, expected the keyword arguments"),
        ({"batch": {}}, "batch is a dict, expected the keyword arguments"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    arguments = {"batch": BATCH, "budget": "1GiB"} | options
    with pytest.raises(LoRAError, match=message):
        lora.plan_checkpointing(adapted(), **arguments)


def test_models_that_cannot_be_planned():
    with pytest.raises(LoRAError, match="Toy has no transformers GradientCheckpointingLayer"):
        lora.plan_checkpointing(lora.inject(toy(), LoRAConfig(r=2)), {"ids": IDS}, "1GiB")
    with pytest.raises(LoRAError, match="carries no adapters"):
        lora.plan_checkpointing(tiny_llama(), BATCH, "1GiB")
    model = adapted()
    lora.merge(model)
    with pytest.raises(LoRAError, match=r"merged adapters.*lora.unmerge"):
        lora.plan_checkpointing(model, BATCH, "1GiB")


def test_a_loss_of_ones_own():
    model = adapted()
    seen = []

    def loss(**batch):
        seen.append(sorted(batch))
        return model(**batch).logits.float().logsumexp(-1).sum()

    assert lora.plan_checkpointing(model, {"input_ids": IDS}, "1GiB", loss=loss).peak > 0
    assert seen[0] == ["input_ids"]


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the allocator's own count: not run, needs a CUDA device")
@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_the_allocator_agrees(backend):
    """What is predicted against what the allocator counts. cuBLAS takes a workspace of its own before."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 1000}
    ids = torch.randint(3, 1000, (4, 512), device="cuda")
    batch = {"input_ids": ids, "labels": ids}
    with lora.use_backend(backend):
        model = lora.inject(tiny_llama(**sizes, max_position_embeddings=512), LoRAConfig(r=8))
        stir(model)
        model.to("cuda", torch.bfloat16)
        lora.for_training(model)
        largest = lora.plan_checkpointing(model, batch, "16GiB")
        modes_seen = set()
        for part in range(5):
            budget = largest.leanest + (largest.plain - largest.leanest) * part // 5
            plan = lora.plan_checkpointing(model, batch, budget)
            lora.for_training(model, plan)
            modes_seen |= set(plan.values())
            model(**batch).loss.backward()
            gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = model(**batch).loss
            kept = torch.cuda.memory_allocated() - before
            loss.backward()
            peak = torch.cuda.max_memory_allocated() - before + gradients
            del loss
            # The allocator hands out multiples of 512 bytes: at most 511 more for each of some 100 tensors a block.
            assert 0 <= kept - plan.kept < 6 * 100 * 512
            assert peak <= plan.peak + 6 * 100 * 512
        assert "offload" in modes_seen and "none" in modes_seen


class Counter(TorchDispatchMode):
    """The arithmetic of everything that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.flops += arithmetic_of(func, args, kwargs or {}, made)
        return result


@pytest.mark.parametrize("mode", ["selective", "recompute"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["plain", "dora"])
@pytest.mark.parametrize(("name", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gemma3", "sdpa")])
@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_what_a_mode_is_charged_for_is_what_it_runs_again(backend, name, attention, options, mode):
    """To the FLOP: down_proj too, which the fast backend leaves out unless a norm, or DoRA's gain, reads it."""
    with lora.use_backend(backend):
        model = adapted(name, **options)
        model.config._attn_implementation = attention
        flops = {}
        for checkpointing in ("none", mode):
            lora.for_training(model, checkpointing)
            with Counter() as counted:
                model(**BATCH).loss.backward()
            flops[checkpointing] = counted.flops
        choices = Problem(measure(lora.for_training(model), BATCH, None), ["recompute", "selective"]).choices
    charged = [block.get(mode, block["recompute"]).cost for block in choices]  # eager may leave selective nothing
    assert flops[mode] - flops["none"] == sum(charged) > 0


def test_what_selective_keeps_of_gemma_it_does_not_do_again():
    """Gemma's norm reads what down_proj gives: kept, it is a product less; eager, its attention is computed again."""
    with lora.use_backend("fast"):
        model = adapted("gemma3")
        measured = measure(lora.for_training(model), BATCH, None)
    block, choices = measured.blocks[0], Problem(measured, ["recompute", "selective"]).choices[0]
    config = model.config
    output = IDS.numel() * config.hidden_size
    assert block.selective >= 4 * output and block.spared >= 2 * output * config.intermediate_size
    assert choices["selective"].cost < choices["recompute"].cost
