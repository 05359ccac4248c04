"""One step of training on two processes and on one, side by side: gradients, their norm, and the parameters after it.

Two processes have half the batches each; the one has them all, concatenated to a single batch. What must come out the
same is what the whole of training depends on: the gradient of the mean loss over all tokens that count.

Each process has a GPU of its own and they talk over NCCL where there are enough; else they are on the CPU, over gloo.

    python tests/several/cases.py FILE    runs every case, and writes what was found as JSON
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import DistributedType, PartialState
from several.processes import Processes
from tiny import stir, tiny_llama, toy
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lora
from lora.distributed import shard, share_of, whole
from lora.errors import LoRAError
from lora.train.loss import NextTokenLoss
from lora.train.parallel import replicated, sharded
from lora.train.world import World

SIZE, EXAMPLES, TOKENS, VOCAB = 2, 2, 12, 64  # processes; of a batch
MAX_NORM, LR = 0.2, 1.0
CONFIG = functools.partial(lora.LoRAConfig, r=4, lora_alpha=8)
LABELS = ("even", "uneven", "one masked")


def device() -> torch.device:
    """Where this process computes. (A process that has not parted yet must not ask a GPU for anything.)"""
    return torch.device("cuda" if torch.cuda.device_count() >= SIZE and "RANK" in os.environ else "cpu")


class Case(NamedTuple):
    """One way to train."""

    way: str  # "ddp", "fsdp2": as `lora train` does it; "own ddp", "own fsdp2", "own plugin": a loop of the user's
    base: str  # "plain", "nf4"
    backend: str
    checkpointing: str
    labels: str
    accumulation: int
    clipping: bool


def every_case() -> list[Case]:
    """Each way, base, backend and checkpointing with each other, twice or once; the rest in turn."""
    parts = (("ddp", "fsdp2"), ("plain", "nf4"), ("reference", "fast"), ("none", "recompute", "selective", "offload"))
    cases = []
    for i, chosen in enumerate(itertools.product(*parts)):
        for j in (i, i + 1) if chosen[-1] in ("none", "recompute") else (i,):
            cases.append(Case(*chosen, LABELS[j % 3], (1, 4)[(j // 2) % 2], j % 2 == 0))
    own = itertools.product(("own ddp", "own fsdp2"), ("plain", "nf4"), ("reference", "fast"))
    cases += [Case(*chosen, "selective", "uneven", 1, False) for chosen in own]
    plugin = itertools.product(("own plugin",), ("plain", "nf4"), ("reference", "fast"))
    modes = ("none", "recompute", "selective", "offload")
    return cases + [
        Case(*chosen, modes[i], LABELS[i % 3], (1, 4, 4, 1)[i], i % 2 == 0) for i, chosen in enumerate(plugin)
    ]


def model_of(case: Case) -> Any:
    """A small Llama with adapters that do something; where labels are uneven, its head is its embedding."""
    model = tiny_llama(tie_word_embeddings=case.labels == "uneven").to(device())
    if case.base == "nf4":
        lora.quantize(model, "nf4")
    lora.inject(model, lora.LoRAConfig(r=4, lora_alpha=8))
    stir(model)
    return lora.for_training(model, checkpointing=case.checkpointing)


def batches_of(case: Case) -> list[dict[str, Tensor]]:
    """The batches of a step in the order in which one process has them: batch i is process i % SIZE's."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for number in range(SIZE * case.accumulation):
        ids = torch.randint(0, VOCAB, (EXAMPLES, TOKENS), generator=generator)
        labels = ids.clone()
        if case.labels == "uneven":
            labels[:, : (2, 10, 7)[number % 3]] = -100
        elif case.labels == "one masked" and number % SIZE == 1:
            labels[:] = -100
        batches.append({"input_ids": ids.to(device()), "labels": labels.to(device())})
    return batches


def labels_in(batches: list[dict[str, Tensor]]) -> int:
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def on_one(case: Case) -> dict[str, Any]:
    """The step on one process, all batches in one."""
    model = model_of(case)
    batches = batches_of(case)
    whole_batch = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    NextTokenLoss(model)(whole_batch, labels_in(batches)).backward()
    return stepped(case, model)


def on_several(case: Case, world: World) -> dict[str, Any]:
    """The step on SIZE processes, batch after batch."""
    model = model_of(case)
    if world.rank and not (case.way == "own plugin" and case.base == "nf4"):  # what the first process has must win
        stir(model, seed=9)  # accelerate's plugin sees to that only where it loads the model anew
    mine = batches_of(case)[world.rank :: SIZE]
    num_items = int(world.add(labels_in(mine))[0])
    if case.way == "own plugin":
        accelerator = with_plugin(reload=case.base == "plain")
        optimizer = torch.optim.SGD(lora.trainable_parameters(model), lr=LR)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        accelerator.gradient_accumulation_steps = len(mine)
        for batch in mine:
            with accelerator.accumulate(wrapped):  # backward divides by their number, as num_items has done
                loss = share_of(wrapped(**batch, num_items_in_batch=num_items).loss)
                accelerator.backward(len(mine) * loss)
        return stepped(case, accelerator.unwrap_model(wrapped), optimizer)
    if case.way.startswith("own"):
        wrapped = shard(model) if case.way == "own fsdp2" else torch.nn.parallel.DistributedDataParallel(model)
        share_of(wrapped(**mine[0], num_items_in_batch=num_items).loss).backward()
        return stepped(case, model)
    step = (sharded if case.way == "fsdp2" else replicated)(NextTokenLoss(model))
    for batch in mine[:-1]:
        with step.no_sync():
            step(batch, num_items).backward()
    step(mine[-1], num_items).backward()
    return stepped(case, model)


def with_plugin(reload: bool) -> Accelerator:
    """accelerate with its own plugin for FSDP2, as `accelerate launch --use_fsdp --fsdp_version 2` sets it up.

    Args:
        reload: accelerate's cpu_ram_efficient_loading: all processes get the tensors that the first one has.
    """
    options = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", "reshard_after_forward": True}
    plugin = FullyShardedDataParallelPlugin(**options, cpu_ram_efficient_loading=reload)
    accelerator = Accelerator(cpu=device().type == "cpu", fsdp_plugin=plugin)
    if device().type == "cpu":  # where accelerate passes the plugin over and takes DDP, which is not what is tried here
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2
    return accelerator


def stepped(case: Case, model: Any, optimizer: Any = None) -> dict[str, Any]:
    """Gradients, their norm, and the parameters after clipping and a step against the gradient."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, Any] = {"gradients": {name: whole(p.grad).clone() for name, p in trained.items()}}
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), MAX_NORM if case.clipping else float("inf"))
    found["norm"] = whole(norm).item()
    (optimizer or torch.optim.SGD(trained.values(), lr=LR)).step()
    found["parameters"] = {name: whole(p.detach()) for name, p in trained.items()}
    return found


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm, all tensors as one vector."""
    one, other = (torch.cat([part[name].double().flatten() for name in expected]) for part in (found, expected))
    return float((one - other).norm() / other.norm())


# ---- what else one does with a model


def refused(action: Any) -> str:
    """The message of the error that `action` must raise."""
    try:
        action()
    except LoRAError as error:
        return str(error)
    return "nothing was refused"


def adapted(base: str = "plain", **options: Any) -> Any:
    model = tiny_llama().to(device())
    if base == "nf4":
        lora.quantize(model, "nf4")
    torch.manual_seed(3)
    lora.inject(model, CONFIG(**options))
    stir(model)
    return lora.for_training(model)


def verbs_of_sharded(world: World, root: Path) -> dict[str, Any]:
    """Saving, and everything that is refused."""
    found: dict[str, Any] = {"saved": {}}
    kinds: dict[str, dict[str, Any]] = {"plain": {}, "pissa": {"init_lora_weights": "pissa"}, "nf4": {"base": "nf4"}}
    kinds |= {"copy": {"modules_to_save": ["lm_head"]}, "dora": {"use_dora": True}}
    for name, options in kinds.items():
        straight, folder = root / f"{name}-whole-{world.rank}", root / f"{name}-{world.rank}"
        lora.save_adapter(adapted(**options), straight)
        lora.save_adapter(shard(adapted(**options)), folder)
        if world.main:
            one, other = (path / "adapter_model.safetensors" for path in (folder, straight))
            found["saved"][name] = "the same" if one.read_bytes() == other.read_bytes() else "different"
    for base in ("plain", "nf4"):
        model = adapted(base)
        accelerator, optimizer = with_plugin(reload=False), torch.optim.SGD(lora.trainable_parameters(model), lr=LR)
        wrapped, _ = accelerator.prepare(model, optimizer)
        folder = root / f"{base}-plugin-{world.rank}"
        lora.save_adapter(accelerator.unwrap_model(wrapped), folder)
        if world.main:
            one, other = (path / "adapter_model.safetensors" for path in (folder, root / f"{base}-whole-0"))
            found["saved"][f"{base} by the plugin"] = (
                "the same" if one.read_bytes() == other.read_bytes() else "different"
            )
    found["written by"] = {str(rank): has for rank, has in enumerate(world.gather(folder.exists()))}

    model = shard(adapted())
    found["merge"] = refused(lambda: lora.merge(model))
    found["add_adapter"] = refused(lambda: lora.add_adapter(model, CONFIG(), "other"))
    found["load_adapter"] = refused(lambda: lora.load_adapter(model, root / "plain-0", "other"))
    found["shard"] = refused(lambda: shard(model))
    layer = model.model.layers[0].mlp.up_proj
    with lora.use_backend("fast"):
        found["operation"] = refused(
            lambda: lora.ops.lora_linear(torch.ones(2, 32, device=device()), layer.projection_of(("default",)))
        )
    bare = tiny_llama().to(device())
    fully_shard(bare)
    found["inject"] = refused(lambda: lora.inject(bare, CONFIG()))
    found["plugin's reloading"] = refused(nf4_by_reloading_plugin)
    mixed = adapted()
    factor = mixed.model.layers[0].mlp.up_proj.lora_A["default"]
    factor.data = factor.data.double()
    found["dtypes"] = refused(lambda: shard(mixed))
    found["blocks"] = refused(lambda: shard(lora.inject(toy(), CONFIG(target_modules=["q_proj"]))))
    found["policy"] = under_a_policy()
    found["fused"] = fused_as_before()
    return found


def nf4_by_reloading_plugin() -> None:
    model = adapted("nf4")
    with_plugin(reload=True).prepare(model, torch.optim.SGD(lora.trainable_parameters(model), lr=LR))


def fused_as_before() -> list[str]:
    """Whether sharding a fused model, and fusing a sharded one, patches what is patched in a whole one."""
    with lora.use_backend("fast"):
        model = adapted()
        before = patched(model)
        after = [patched(shard(model)), patched(lora.for_training(model))]
    return ["the same" if paths == before else f"{before} -> {paths}" for paths in after]


def patched(model: Any) -> list[str]:
    """The modules with a forward of their own."""
    return [path for path, module in model.named_modules() if "forward" in vars(module)]


def under_a_policy() -> dict[str, Any]:
    """NF4 under MixedPrecisionPolicy(bfloat16): bytes as they were, adapters in bfloat16, and nearly the same loss."""
    batch = batches_of(Case("", "", "", "", "even", 1, False))[0]
    straight, model = adapted("nf4"), adapted("nf4")
    expected = straight(**batch).loss.item()
    shard(model, policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    loss = model(**batch).loss.item()
    names = ("weight", "absmax", "nested_absmax", "nested_offset")
    block, theirs = model.model.layers[1], straight.model.layers[1]
    block.unshard()
    base, other = block.mlp.down_proj.base_layer, theirs.mlp.down_proj.base_layer
    same = all(torch.equal(getattr(base, name), getattr(other, name)) for name in names)
    trained = block.mlp.down_proj.lora_A["default"].dtype
    block.reshard()
    return {"bytes": same, "trained": str(trained), "loss": loss / expected - 1}


def work(rank: int, out: Path) -> None:
    """One process: every case, and what the first one finds compared with one process."""
    torch.set_num_threads(1)
    world = World.join()
    results = []
    for case in every_case():
        with lora.use_backend(case.backend):
            found = on_several(case, world)
            if rank:
                continue
            expected = on_one(case)
        start = {name: p for name, p in model_of(case).named_parameters() if p.requires_grad}
        results.append(
            case._asdict()
            | {part: distance(found[part], expected[part]) for part in ("gradients", "parameters")}
            | {"norm": abs(found["norm"] - expected["norm"]) / expected["norm"], "size": expected["norm"]}
            | {"moved": distance(expected["parameters"], start)}
        )
    verbs = verbs_of_sharded(world, out.parent)
    if rank == 0:
        out.write_text(json.dumps({"cases": results, "verbs": verbs}))
    dist.barrier()
    world.leave()


if __name__ == "__main__":
    import transformers.models.llama.modeling_llama  # noqa: F401 - once, before the processes part

    lora.use_backend("fast")
    model_of(every_case()[0])
    ends = Processes(SIZE, lambda rank: work(rank, Path(sys.argv[1]))).ended()
    if any(end.code for end in ends):
        sys.exit("\n".join(end.said for end in ends))
