"""Several processes: gradients beside one process, whole runs beside one process, and how they end together.

Each of the three long tests forks its processes from one that has imported everything (`several.processes`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from several.cases import LABELS, MAX_NORM, every_case
from several.runs import STEPS, Runs
from tiny_text import save_tiny_model

import lora
from lora.errors import LoRAError
from lora.train.config import TrainConfig
from lora.train.data import IGNORED, NOTHING, RankBatches, SeededOrder, WithNothing
from lora.train.manifest import changes
from lora.train.progress import read_metrics
from lora.train.quiet import quiet
from lora.train.world import World

HERE = Path(__file__).parent
# Sums of a few hundred products in float32 in another order: √300 roundings of 6e-8 each, where they go either way.
GRADIENTS = 1e-6
# The norm is one number out of them, and a step adds a rounding of 6e-8 to each parameter.
LOSSES = 1e-6


def forked(script: str, argument: Path) -> None:
    """Runs a script of `several/` that forks processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LORA_BACKEND": "reference"}
    command = [sys.executable, str(HERE / "several" / script), str(argument)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# ---- a step ----------------------------------------------------------------------------------------------------


def test_a_step_of_two_processes_is_the_step_of_one(tmp_path: Path) -> None:
    forked("cases.py", tmp_path / "cases.json")
    written = json.loads((tmp_path / "cases.json").read_text())
    check_verbs(written["verbs"])
    found = written["cases"]
    assert [tuple(one[name] for name in ("way", "base", "backend")) for one in found] == [c[:3] for c in every_case()]
    for one in found:
        told = json.dumps(one)
        assert one["gradients"] <= GRADIENTS, told
        assert one["norm"] <= GRADIENTS, told
        assert one["parameters"] <= GRADIENTS, told
        assert one["size"] > MAX_NORM, told  # clipping clips
        assert one["moved"] > 1e-3, told  # three orders above what is compared


def check_verbs(found: dict[str, Any]) -> None:
    """What else a sharded model does: it is saved as the whole one is, once; and what it cannot do, it says."""
    kinds = ("plain", "pissa", "dora", "copy", "nf4", "plain by the plugin", "nf4 by the plugin")
    assert found["saved"] == dict.fromkeys(kinds, "the same")
    assert found["written by"] == {"0": True, "1": False}
    for verb in ("merge", "add_adapter", "load_adapter", "shard", "inject"):
        wrong = (
            rf"{verb}: this LlamaForCausalLM is sharded over processes \(.* is a DTensor\), expected whole tensors: \w"
        )
        assert re.match(wrong, found[verb]), found[verb]
    assert "lora merge --model" in found["merge"]
    assert "a tensor is a DTensor: gather it" in found["operation"]
    assert "torch.float64 and torch.float32" in found["dtypes"] or "torch.float32 and torch.float64" in found["dtypes"]
    assert "give them as blocks=" in found["blocks"]
    assert re.search(r"weight is sharded .* cpu_ram_efficient_loading .*set it to False", found["plugin's reloading"])
    assert found["fused"] == ["the same", "the same"]
    assert found["policy"] == {"bytes": True, "trained": "torch.bfloat16", "loss": pytest.approx(0, abs=2**-6)}


def test_the_cases_cover_what_can_be_combined() -> None:
    cases = [case for case in every_case() if not case.way.startswith("own")]
    assert len(cases) >= 40 and len(set(cases)) == len(cases)
    assert len({case[:4] for case in cases}) == 2 * 2 * 2 * 4
    for kinds in (LABELS, (1, 4), (True, False)):
        for way in ("ddp", "fsdp2"):
            for base in ("plain", "nf4"):
                for backend in ("reference", "fast"):
                    seen = {part for case in cases if case[:3] == (way, base, backend) for part in case[4:]}
                    assert set(kinds) <= seen, (way, base, backend)


def test_other_people_s_loops_on_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """transformers' Trainer, TRL's, and a loop around accelerate's `prepare`, which put DDP around our model."""
    forked("loops.py", tmp_path / "loops.json")
    found = json.loads((tmp_path / "loops.json").read_text())
    assert {tuple(one["case"][:2]) for one in found} >= {("trainer", "reference"), ("sft", "fast"), ("dpo", "fast")}
    assert {one["case"][1] for one in found if one["case"][0] == "accelerate"} == {"reference", "fast"}
    for one in found:
        assert one["from one"] <= LOSSES and one["from each other"] == 0, one
        assert one["moved"] > 1e-2, one


def test_accelerate_launch_runs_a_user_s_script(tmp_path: Path) -> None:
    """The command itself, and a script that knows no test, beside the script in this process alone."""
    import accelerate
    from several import users_script

    with quiet():
        model = str(save_tiny_model(tmp_path / "model"))
    with lora.use_backend("fast"):
        users_script.main(model, tmp_path / "one")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    launcher = Path(sysconfig.get_path("scripts")) / "accelerate"
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    words = [launcher, "launch", *options.split(), "--main_process_port", "0"]
    words += [HERE / "several" / "users_script.py", model, tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "LORA_BACKEND": "fast"}
    environment["HF_HOME"] = str(tmp_path)  # where nobody has configured accelerate
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [(tmp_path / name / "processes").read_text() for name in ("one", "two")] == ["1", "2"]
    start = adapter_in(tmp_path / "one" / "start")
    for part in ("start", "loop", "trainer"):
        one, other = (adapter_in(tmp_path / name / part) for name in ("one", "two"))
        assert float((one - other).norm() / one.norm()) <= LOSSES
        assert part == "start" or float((one - start).norm() / start.norm()) > 1e-2


def adapter_in(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


# ---- whole runs ------------------------------------------------------------------------------------------------


def test_whole_runs_are_the_run_of_one_process_and_end_together(tmp_path: Path) -> None:
    forked("runs.py", tmp_path)
    ends = json.loads((tmp_path / "ends.json").read_text())
    for name in ("two", "two, then one", "two, then four", "one, then four sharded", "terminated, then one"):
        same_run(tmp_path / name, tmp_path / "one", ends[name])
    for name in ("two sharded", "two sharded, then one", "two in nf4", "killed in nf4, then one"):
        same_run(tmp_path / name, tmp_path / "one in nf4", ends[name])
    for name in ("two", "two sharded"):
        very_same_run(tmp_path / f"{name}, then two", tmp_path / name, ends[f"{name}, then two"])
    killed = [code for code, _ in ends["killed in nf4"]]
    assert -9 in killed and 0 not in killed  # the slower one may have noticed that the other is gone
    very_same_run(tmp_path / "killed in nf4, then two", tmp_path / "two in nf4", ends["killed in nf4, then two"])
    one_says(ends["terminated"], 143, r"terminated \(SIGTERM\) after step \d of 8; .*checkpoint-\d is saved")
    one_says(ends["two, then three"], 2, "4 batches of 3, which 3 processes cannot share alike")
    one_says(ends["two, then four of more"], 2, "2 × 2 then, 3 × 4 now")
    one_says(ends["one on fire"], 2, "the machine is on fire")
    one_says(ends["one killed"][:1], 2, "process 0 has lost another process of this run")
    one_says(ends["disk full"], 2, "checkpoint-3 cannot be written to .*: No space left on device: make room")
    one_says(ends["no model"], 2, "no model here")
    one_says(ends["other weights"], 2, "process 1 has another base model than process 0")
    one_says(ends["accelerate's FSDP"], 2, "remove fsdp_config .* give --sharding full")
    one_says(ends["a typo"], 2, "there is no option '--shard'")
    assert "2, each with a part of each tensor; 2 × 6 = 12 examples a step" in ends["two sharded"][0][1]
    assert "4 batches a step, as before: 4 on each process" in ends["two, then one"][0][1]


def same_run(run: Path, straight: Path, ends: list[Any]) -> None:
    """Same losses, norms, tokens, parameters and moments at every step as on one process; nothing from the others."""
    assert [code for code, _ in ends] == [0] * len(ends), ends
    assert all(said == "" for _, said in ends[1:]), ends
    found, expected = (read_metrics(path / "metrics.jsonl") for path in (run, straight))
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    assert [record["tokens"] for record in found] == [record["tokens"] for record in expected]
    for one, other in zip(found, expected, strict=True):
        for name in {"loss", "eval_loss", "grad_norm"} & other.keys():
            assert one[name] == pytest.approx(other[name], rel=LOSSES), (name, one, other)
    assert any(record["grad_norm"] > 0.5 for record in expected if "grad_norm" in record)  # clipping clips
    losses = [record["loss"] for record in expected if "loss" in record]
    assert all(abs(a - b) > 1e-3 for a, b in pairwise(losses))  # far above what is compared
    for name in ("parameters", "optimizer"):
        one, other = (load_file(path / f"checkpoint-{STEPS}" / f"{name}.safetensors") for path in (run, straight))
        assert one.keys() == other.keys()
        vectors = [torch.cat([part[key].double().flatten() for key in sorted(other)]) for part in (one, other)]
        assert float((vectors[0] - vectors[1]).norm() / vectors[1].norm()) <= LOSSES
    assert (run / "result.json").exists() and (run / "adapter" / "adapter_model.safetensors").exists()


def very_same_run(run: Path, straight: Path, ends: list[Any]) -> None:
    """Every byte of the last checkpoint, and every number of the log, as in the run that was not interrupted."""
    assert [code for code, _ in ends] == [0] * len(ends), ends
    folder, other = (path / f"checkpoint-{STEPS}" for path in (run, straight))
    names = {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
    assert names == {file.relative_to(other) for file in other.rglob("*") if file.is_file()} and len(names) >= 7
    assert [name for name in names if (folder / name).read_bytes() != (other / name).read_bytes()] == []
    logs = [[record | {"seconds": 0} for record in read_metrics(path / "metrics.jsonl")] for path in (run, straight)]
    assert logs[0] == logs[1]
    assert "resume" in ends[0][1] and f"from {run / 'checkpoint-3'}" in ends[0][1]


def one_says(ends: list[Any], code: int, message: str) -> None:
    """All processes end with `code`; one of them says why, in one line."""
    assert [end for end, _ in ends] == [code] * len(ends), ends
    said = [line for _, text in ends for line in text.splitlines() if line.startswith("lora: ")]
    assert len(said) == 1 and re.search(message, said[0]), ends
    assert not any("Traceback" in text or "frame #" in text for _, text in ends), ends


# ---- on two GPUs ----------------------------------------------------------------------------------------------

ON_GPUS = "--dtype float32 --no-chat-template"
TORCHRUN = "-m torch.distributed.run --nproc-per-node 2 -m -- lora"
GPUS = torch.cuda.device_count()


@pytest.mark.skipif(GPUS < 2, reason=f"a run over NCCL: not run, needs two CUDA devices, and {GPUS} are here")
def test_whole_runs_over_nccl_are_the_run_of_one_gpu(tmp_path: Path) -> None:
    runs = Runs(tmp_path)

    def train(launcher: str, name: str, accumulation: int, *more: str) -> subprocess.Popen[str]:
        words = [*launcher.split(), "train", *runs.words(name, accumulation, *ON_GPUS.split(), *more)]
        environment = os.environ | {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True, env=environment)

    def done(process: subprocess.Popen[str]) -> None:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]

    def trained(*arguments: Any) -> None:
        done(train(*arguments))
        print(arguments)  # long work shows progress

    one, nf4 = "-m lora", ("--quantization", "nf4")
    trained(one, "one", 4)
    trained(one, "one nf4", 4, *nf4)
    trained(TORCHRUN, "two", 2)
    trained(TORCHRUN, "two nf4", 2, *nf4)
    trained(TORCHRUN, "two sharded", 2, "--sharding", "full", "--checkpointing", "recompute")
    stopped = train(TORCHRUN, "stopped", 2)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while stopped.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.001)
    stopped.terminate()
    stopped.communicate(timeout=300)
    assert not (tmp_path / "stopped" / "result.json").exists(), "it was over before it was stopped"
    for name, launcher, accumulation in (("stopped, then two", TORCHRUN, 2), ("stopped, then one", one, 4)):
        shutil.copytree(tmp_path / "stopped", tmp_path / name)
        trained(launcher, name, accumulation, "--resume")
    for name in ("two", "two nf4", "two sharded", "stopped, then two", "stopped, then one"):
        straight = "one nf4" if name.endswith("nf4") else "one"
        same_run(tmp_path / name, tmp_path / straight, [[0, ""]])


# ---- parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5, 6, 24, 25])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_processes_share_the_batches_of_one(count: int, size: int) -> None:
    def batches(rank: int, size: int) -> list[list[int]]:
        mine = RankBatches(SeededOrder(range(count), seed=3), 2, rank, size)
        mine.set_epoch(1)
        assert len(list(mine)) == len(mine)
        return list(mine)

    straight = batches(0, 1)
    shares = [batches(rank, size) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1  # or some would wait for the others for ever
    together = [batch for row in zip(*shares, strict=True) for batch in row]
    assert together[: len(straight)] == straight
    assert together[len(straight) :] == [[NOTHING]] * (len(together) - len(straight))
    assert len(together) - len(straight) < size


def test_a_batch_of_nothing_has_no_label() -> None:
    rows = [{"input_ids": [4, 5, 6], "labels": [IGNORED, 5, 6]}]
    found = WithNothing(rows)
    assert found[NOTHING] == {"input_ids": [4, 5, 6], "labels": [IGNORED] * 3}
    assert found[0] is rows[0] and len(found) == 1
    assert rows[0]["labels"] == [IGNORED, 5, 6]


def test_another_number_of_processes_is_another_batch_unless_it_is_shared_out() -> None:
    then = {"settings": {"grad_accumulation": 2}, "processes": 2, "base": 1, "data": 1, "held_out": 1}
    assert changes(then, then) == []
    assert changes({**then, "world_size": 9}, then) == []
    (found,) = changes(then, {**then, "processes": 4})
    assert found == ("grad_accumulation", "grad_accumulation × processes: 2 × 2 then, 2 × 4 now")
    old = {name: value for name, value in then.items() if name != "processes"} | {"world_size": 1}
    assert changes(old, {**then, "processes": 1}) == []  # of before there were several


def test_one_process_agrees_with_itself() -> None:
    world = World()
    assert world.main and world.add(1, 2.5) == [1, 2.5] and world.any(False, True) == [False, True]
    assert world.first(lambda: 3) == 3 and world.gather("x") == ["x"]
    world.check_alike(1, "number")
    with pytest.raises(ValueError, match="mine"), world.together(), world.one_voice():
        raise ValueError("mine")


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"])
def test_a_launcher_that_wants_another_way_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "true" if name.endswith("SPEED") else "bf16")
    with pytest.raises(LoRAError, match=r"--sharding full|--dtype"):
        World.join()


@pytest.mark.parametrize("count", [1, 2])
def test_one_process_where_several_were_asked_for_is_refused(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    words = ["--cpu", "--num_processes", str(count), "-m", "lora", "train"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    for name, value in prepare_simple_launcher_cmd_env(arguments)[1].items():
        monkeypatch.setenv(name, value)
    if count == 1:
        assert World.join().size == 1
        monkeypatch.setenv("MASTER_ADDR", "a.cluster.s")  # as a cluster may have it, for one process too
        monkeypatch.setenv("MASTER_PORT", "29500")
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert World.join().size == 1
        return
    with pytest.raises(LoRAError, match=r"asked for several processes and has started one.*torchrun.*--multi_gpu"):
        World.join()


def test_a_plan_is_for_a_whole_model() -> None:
    with pytest.raises(LoRAError, match="a plan is measured on a whole model"):
        TrainConfig(model="m", data="d", checkpointing="auto", memory_budget="1GiB", sharding="full")


# ---- an FSDP2 that takes no bytes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "expected", "match"),
    [
        ("only Tensors of floating point dtype can require gradients", LoRAError, r"cannot shard uint8 .* none"),
        ("the machine is on fire", RuntimeError, "^the machine is on fire$"),
    ],
)  # fmt: skip
def test_an_fsdp2_that_takes_no_bytes_is_named(monkeypatch, said, expected, match) -> None:
    """As that of torch 2.11 fails; any other failure is not taken for it."""
    import torch.distributed.fsdp as fsdp

    from lora.distributed import _check_bytes_shard

    def refuses(module: Any, **_: Any) -> None:
        assert [p.dtype for p in module.parameters()] == [torch.uint8]
        raise RuntimeError(said)

    monkeypatch.setattr(fsdp, "fully_shard", refuses)
    with pytest.raises(expected, match=match):
        _check_bytes_shard(None)
