"""`lora bench`, dry: every row at tiny shapes, the page made from them, and gates that stay shut."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from lora import cli

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.card.goals import Rows  # noqa: E402 - benchmarks/ is not installed
from benchmarks.card.rows import Recorder, Row, read_rows  # noqa: E402 - benchmarks/ is not installed
from benchmarks.card.timing import Variant  # noqa: E402 - benchmarks/ is not installed
from benchmarks.cpu import __main__ as bench  # noqa: E402 - benchmarks/ is not installed
from benchmarks.cpu import floors, goals, growth, linear, memory, models, nf4, step  # noqa: E402 - benchmarks/ is not installed
from benchmarks.cpu.apart import processes  # noqa: E402 - benchmarks/ is not installed
from benchmarks.cpu.session import Session, Trial, run_trial, verdict, verdict_of_batches  # noqa: E402 - benchmarks/ is not installed

TRIALS = {
    "step", "step, dropout 0.1", "step, 75% ignored", "step, NF4", "lora_linear", "nf4_dequantize", "generate, merged",
    "generate, an adapter a row", "inject", "inject, 8B, meta",
}  # fmt: skip


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("bench")
    assert cli.main(["bench", "--dry-run", "--rounds", "1", "--output", str(directory)]) == 0
    return directory


def session(directory: Path) -> Session:
    return Session(Recorder(directory), 1, True)


def test_every_row_is_there_with_its_gate_its_floor_and_its_peers(dry):
    rows = read_rows(dry / "cpu.csv")
    assert not [row for row in rows if row.note.startswith(("wrong", "failed"))]
    for name in TRIALS:
        variants = [row.variant for row in rows if row.name == name and row.median_s]
        assert {"ours", "floor"} < set(variants), name
        gate = [row.note for row in rows if row.name == name and row.variant == "gate"]
        assert len(gate) == 1 and gate[0], name
    timed = {(row.name, row.variant) for row in rows if row.median_s}
    assert {
        ("step", "peft"),
        ("step", "reference"),
        ("step", "transformers, no adapters"),
        ("step, NF4", "ours, float32 base"),
    } < timed
    assert {row.variant for row in rows if row.note.startswith("not there")} >= {"unsloth", "lorafusion"}


def test_memory_is_the_sum_of_its_categories(dry):
    rows = [row for row in read_rows(dry / "cpu.csv") if row.part == "memory"]
    for name in ("memory, none", "memory, recompute"):
        for who in ("ours", "peft"):
            found = {row.variant: row.peak_bytes for row in rows if row.name == name}
            parts = [found[f"{who}: {category}"] for category in memory.CATEGORIES]
            assert sum(parts) == found[who] and min(parts) >= 0, (name, who)
            factors = sum(models.R * sum(sizes) for sizes in models.frozen_linears(models.base(True)).values())
            assert parts[0] == 4 * factors
            assert parts[1] >= 8 * factors  # two moments, and AdamW's count of its steps
        assert found["floor"]


def test_the_page_says_it_is_dry_and_shows_every_goal_and_picture(dry):
    page = (dry / "README.md").read_text(encoding="utf-8")
    assert "A dry run" in page
    assert all(goal.text in page for goal in goals.GOALS)
    for name in ("peers", "floors", "memory", "growth"):
        assert f"](cpu_{name}.png)" in page and (dry / f"cpu_{name}.png").stat().st_size > 5000
    run = json.loads((dry / "cpu.json").read_text(encoding="utf-8"))[0]
    assert f"{run['load_before']} before, {run['load_after']} after" in page


def test_rows_measured_again_replace_their_own_and_leave_others(dry, tmp_path):
    for name in (bench.CSV, bench.RUNS):
        (tmp_path / name).write_bytes((dry / name).read_bytes())
    assert bench.bench("nf4", 2, True, tmp_path) == 0
    rows = read_rows(tmp_path / bench.CSV)
    ours = [row for row in rows if (row.name, row.variant) == ("nf4_dequantize", "ours")]
    assert len(ours) == 1 and ours[0].note == "2 rounds"
    assert {row.name for row in rows} >= TRIALS
    parts = [run["parts"] for run in json.loads((tmp_path / bench.RUNS).read_text(encoding="utf-8"))]
    assert "nf4" not in parts[0] and parts[1:] == [["nf4"]]


def test_a_shut_gate_prints_no_time_names_the_output_and_ends_with_1(tmp_path, monkeypatch, capsys):
    right = nf4.fast.nf4_dequantize

    def broken(quantised):
        weight = right(quantised)
        weight[0, 0] += 1
        return weight

    monkeypatch.setattr(nf4.fast, "nf4_dequantize", broken)
    assert cli.main(["bench", "--dry-run", "--rows", "nf4", "--rounds", "1", "--output", str(tmp_path)]) == 1
    rows = read_rows(tmp_path / "cpu.csv")
    assert [row.note.split(" [")[0] for row in rows] == ["wrong, over 0.0e+00: w' 3.3e-04"]
    assert not [row for row in rows if row.median_s]
    assert "no figure: " in "".join(goal.measure(Rows(rows)).text for goal in [dry_goal()])
    assert "wrong" in capsys.readouterr().out


def dry_goal() -> goals.Goal:
    found = next(goal for goal in goals.GOALS if isinstance(goal, goals.Goal) and goal.part == "nf4")
    return dataclasses.replace(found, shape="")


@pytest.mark.parametrize("wrong", ["gradient", "missing"])
def test_a_step_with_a_wrong_gradient_is_not_timed(tmp_path, monkeypatch, wrong):
    right = models.ours_factors

    def broken(model):
        found = right(model)
        name = next(iter(found))
        if wrong == "missing":
            return {key: factor for key, factor in found.items() if key != name}
        found[name].grad.mul_(1.001)
        return found

    monkeypatch.setattr(models, "ours_factors", broken)
    here = session(tmp_path)
    with processes() as apart:
        run_trial(here, step.trial(here, step.KINDS[0], apart))
    note = next(row.note for row in here.recorder.rows if row.variant == "ours")
    assert note.startswith("wrong: ") and "layers.0.self_attn.q_proj.lora_A" in note
    assert not [row for row in here.recorder.rows if row.median_s] and here.recorder.failures == 1


def notes_its_process(path: Path) -> Variant:
    def run() -> tuple[()]:
        with open(path, "a", encoding="utf-8") as file:
            print(os.getpid(), file=file)
        return ()

    return Variant(run, note=str(os.getpid()))


def breaks(where: str) -> Variant:
    if where == "built":
        raise ValueError("no model")
    return Variant(lambda: [][0])


def test_a_variant_apart_runs_in_a_process_of_its_own_that_ends_with_the_block(tmp_path):
    with processes() as apart:
        first, second = (apart(notes_its_process, tmp_path / "pids") for _ in range(2))
        assert len({first.note, second.note, str(os.getpid())}) == 3
        first.run(), second.run(), first.run()
        os.kill(int(first.note), 0)  # it is there
    with pytest.raises(ProcessLookupError):
        os.kill(int(first.note), 0)
    assert (tmp_path / "pids").read_text(encoding="utf-8").split() == [first.note, second.note, first.note]


def test_what_breaks_apart_is_raised_here():
    with processes() as apart:
        with pytest.raises(ValueError, match="no model"):
            apart(breaks, "built")
        with pytest.raises(IndexError):
            apart(breaks, "run").run()


def test_a_gate_that_breaks_shuts(tmp_path):
    here = session(tmp_path)
    run_trial(here, Trial("step", "x", {"ours": Variant(tuple)}, lambda: str(1 / 0)))
    assert [row.note for row in here.recorder.rows] == ["failed: ZeroDivisionError: division by zero"]


def test_the_verdict_allows_twice_the_other_s_error_and_eight_roundings():
    truth = {"a": torch.ones(4, dtype=torch.float64)}
    theirs = {"a": truth["a"] * (1 + 1e-5)}
    limit = 2e-5 + 4 * torch.finfo(torch.float32).eps
    assert not verdict({"a": truth["a"] * (1 + 0.99 * limit)}, theirs, truth, "PEFT").startswith("wrong")
    assert verdict({"a": truth["a"] * (1 + 1.01 * limit)}, theirs, truth, "PEFT").startswith("wrong")
    assert verdict({"a": truth["a"] * torch.nan}, theirs, truth, "PEFT").startswith("wrong")


def test_the_verdict_of_batches_allows_scatter_and_no_mistake():
    truth = {name: torch.ones(4, dtype=torch.float64) for name in "abc"}

    def off(*errors: float) -> dict[str, torch.Tensor]:
        return {name: truth[name] * (1 + error) for name, error in zip("abc", errors, strict=True)}

    theirs = off(1e-5, 1e-5, 1e-5)
    scattered = [(off(4e-5, 4e-5, 5e-4), theirs, truth), (off(5e-6, 5e-6, 2e-6), theirs, truth)]  # √(4 · ½) of theirs
    alone = [(off(1e-5, 1e-5, 5e-5), theirs, truth)] * 2
    assert verdict_of_batches(alone, "PEFT").startswith("wrong")
    assert not verdict_of_batches(scattered, "PEFT").startswith("wrong")
    worse = [(off(4e-5, 4e-5, 1e-5), theirs, truth), (off(2e-5, 2e-5, 2e-6), theirs, truth)]
    assert verdict_of_batches(worse, "PEFT").startswith("wrong")
    for mistake in (0.011, math.nan):
        batches = [(off(1e-6, 1e-6, mistake), theirs, truth), (off(0.0, 0.0, 0.0), theirs, truth)]
        assert verdict_of_batches(batches, "PEFT").startswith("wrong")
        assert "furthest off in one batch is c" in verdict_of_batches(batches, "PEFT")
    assert verdict_of_batches([({"a": truth["a"]}, theirs, truth)], "PEFT").startswith("wrong")


def test_goals_take_ratios_the_right_way_round():
    rows = Rows([Row("step", "step", "ours", median_s=2.0), Row("step", "step", "peft", median_s=3.0)])
    assert goals.GOALS[0].measure(rows) == ("1.50", True)
    swapped = Rows([Row("step", "step", "ours", median_s=3.0), Row("step", "step", "peft", median_s=2.0)])
    assert goals.GOALS[0].measure(swapped) == ("0.67", False)
    assert goals.GOALS[0].measure(Rows([])).met is None


def test_lines_and_floors_are_right():
    start, slope, off = growth.line_through([1, 2, 4], [5, 7, 11])
    assert (start, slope, off) == pytest.approx((3, 2, 0))
    assert growth.line_through([1, 2, 3], [1, 1, 4])[2] == pytest.approx(1.0)
    tokens, fan_in, fan_out, r = 7, 5, 3, 2
    floor = floors.linear_floor(tokens, fan_in, fan_out, r)
    assert floor.flops == 4 * tokens * fan_in * fan_out + 6 * tokens * r * (fan_in + fan_out)
    assert linear.lora_linear(tokens, fan_in, fan_out).flops > floor.flops  # its r is 16


def test_what_is_saved_is_counted_and_a_wrong_formula_is_said():
    name, sizes, run, numbers = growth.saving_cases()[0]
    assert not growth.saved_row(name, sizes, run, numbers).note.startswith("wrong")
    assert growth.saved_row(name, sizes, run, numbers + 1).note.startswith("wrong")


def test_labels_are_ignored_at_the_front():
    labels = step.with_ignored(torch.arange(16).view(2, 8), 0.25)
    assert labels.tolist() == [[-100] * 6 + [6, 7], [-100] * 6 + [14, 15]]


@pytest.mark.parametrize(
    "words, said",
    [(["--rows", "stop"], "Did you mean 'step'"), (["--rounds", "0"], "--rounds is 0, expected an integer >= 1")],
)
def test_bad_options_are_named(words, said, capsys, tmp_path):
    assert cli.main(["bench", "--dry-run", "--output", str(tmp_path), *words]) == 2
    assert said in capsys.readouterr().err


def test_without_a_checkout_the_command_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "lora" / "cli.py"))
    assert cli.main(["bench", "--dry-run"]) == 2
    assert "needs a checkout" in capsys.readouterr().err
