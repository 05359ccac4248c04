"""The GPU benchmark, dry: every part at tiny shapes on the CPU, and the page made from its rows."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.card import __main__ as card  # noqa: E402 - benchmarks/ is not installed
from benchmarks.card import cases, context, goals, linear_ops, model, report, steps  # noqa: E402 - benchmarks/ is not installed
from benchmarks.card.cases import TINY, Case, Session  # noqa: E402 - benchmarks/ is not installed
from benchmarks.card.checks import Poison, limit_of, relative_error  # noqa: E402 - benchmarks/ is not installed
from benchmarks.card.rows import Recorder, Row, latest, read_rows  # noqa: E402 - benchmarks/ is not installed
from benchmarks.card.timing import Variant, attempt, measure  # noqa: E402 - benchmarks/ is not installed

CPU = torch.device("cpu")
OPERATIONS = {
    "lora_linear p=0", "lora_linear p=0.1", "lora_qkv", "lora_mlp", "lora_qkv p=0.1", "lora_mlp p=0.1",
    "swiglu", "rms_norm", "add_rms_norm", "rope",
    "nf4_dequantize", "nf4_quantize", "linear_cross_entropy", "dora_norm", "multi_lora", "forms", "cross_entropy",
}  # fmt: skip


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> Path:
    """One dry run of everything, and its page in `page/`."""
    directory = tmp_path_factory.mktemp("card")
    assert card.main(["--out", str(directory), "--dry-run"]) == 0
    report.main([str(directory), "--output", str(directory / "page")])
    return directory


def session(directory: Path, **changes: float) -> Session:
    settings = {"deadline": time.monotonic() + 60, "dry": True} | changes
    return Session(CPU, Recorder(directory), TINY, **settings)


def test_every_part_leaves_figures(dry):
    rows = read_rows(dry / "rows.csv")
    assert not [row for row in rows if row.note.startswith(("failed", "wrong", "not run"))]
    timed = {(row.part, row.name) for row in rows if row.variant.startswith("ours") and row.median_s}
    assert {name for part, name in timed if part == "ops"} == OPERATIONS - {"forms", "cross_entropy"}  # a GPU's
    assert {("steps", "step bf16"), ("steps", "step nf4"), ("steps", "quantize"), ("context", "step nf4")} <= timed
    assert {row.name for row in rows if row.part == "ceilings" and row.median_s} == {"copy", "gemm"}
    assert {row.name for row in rows if row.part == "check"} == OPERATIONS | {"step against PEFT"}


def test_every_way_of_training_is_timed_in_both_kinds_of_weights(dry):
    rows = [row for row in read_rows(dry / "rows.csv") if row.part == "steps" and row.median_s]
    for kind in ("bf16", "nf4"):
        found = {row.variant for row in rows if row.name == f"step {kind}"}
        assert {f"ours, {mode}" for mode in model.MODES} <= found
    assert {"peft, none", "peft, recompute", "peft float32, none"} <= {row.variant for row in rows}
    assert all(row.flops and row.low_s <= row.median_s <= row.high_s for row in rows if row.tokens)


def test_what_is_not_there_says_so(dry):
    rows = read_rows(dry / "rows.csv")
    liger = {row.name for row in rows if "liger" in row.variant and row.note.startswith("not there: ")}
    assert liger == {"lora_mlp", "swiglu", "rms_norm", "add_rms_norm", "rope", "linear_cross_entropy"}
    assert all(row.median_s is not None or re.match("not there|errors: |loss", row.note) for row in rows)


def test_every_compared_variant_reports_its_errors(dry):
    rows = [row for row in read_rows(dry / "rows.csv") if row.part == "ops" and row.median_s]
    uncompared = {"frozen", "frozen alone", "copy", "floor"}
    for row in rows:
        assert "errors: " in row.note or row.variant in uncompared or "its own mask" in row.note, row


def test_the_page_has_every_goal_and_no_machine_in_it(dry):
    page = (dry / "page" / "cpu_dry_run.md").read_text()
    for goal in goals.GOALS:
        assert f"| {goal.text} |" in page
    assert "none of its figures means anything" in page
    for section in ("Goals", "Ceilings", "Training steps", "Longest context", "Operations", "Correctness"):
        assert f"\n## {section}\n" in page
    for name in ("cpu_dry_run_ops.png", "cpu_dry_run_steps.png"):
        assert (dry / "page" / name).stat().st_size > 10_000
        assert f"({name})" in page
    facts = (dry / "page" / "cpu_dry_run.json").read_text()
    for text in (page, facts, (dry / "page" / "cpu_dry_run.csv").read_text()):
        assert "/" + "work" not in text
        assert "/" + "home" not in text


def test_a_missed_goal_shows_its_cause_and_one_without_is_marked(tmp_path):
    recorder = Recorder(tmp_path)
    figures = {"tokens": 8192, "dtype": "bfloat16", "shape": "4 x 2048", "peak_bytes": 5 << 30, "base_bytes": 1 << 30}
    recorder.add(Row("steps", "step bf16", "ours, none", median_s=1.0, low_s=1.0, high_s=1.0, flops=1, **figures))
    recorder.add(Row("steps", "step nf4", "ours, none", median_s=1.2, low_s=1.0, high_s=1.3, flops=1, **figures))
    recorder.add(Row("steps", "step bf16", "peft, none", median_s=1.9, low_s=1.8, high_s=2.0, flops=1, **figures))
    recorder.close()
    (tmp_path / "environment.json").write_text(json.dumps({"card": "NVIDIA H100 80GB HBM3", "torch": "2"}))
    (tmp_path / "causes.toml").write_text('[h100]\ntokens = "the loss waits for the host"\n')
    report.main([str(tmp_path), "--output", str(tmp_path), "--causes", str(tmp_path / "causes.toml")])
    page = (tmp_path / "h100.md").read_text()
    assert "| 8,192 tokens/s | missed | the loss waits for the host |" in page
    assert "| +20.0% time | missed | **not named yet** |" in page
    assert "| 1.90 times as fast, at 4 x 2048 tokens | met |  |" in page
    assert page.count("| not measured | open |  |") == 5
    assert "| 5.00 | 6.00 | 1.90 |" in page
    assert (tmp_path / "h100_memory.png").stat().st_size > 10_000


def test_goals_read_the_figures_they_name():
    def op(name, variant, seconds, **figures):
        return Row("ops", name, variant, 8192, "s", median_s=seconds, low_s=seconds, high_s=seconds, **figures)

    rows = goals.Rows([
        Row("ceilings", "copy", "torch", median_s=1.0, bytes=1000),
        Row("ops", "nf4_dequantize", "ours", shape="s", median_s=1.0, bytes=840),
        op("lora_linear p=0", "ours", 1.06), op("lora_linear p=0", "frozen", 1.0),
        op("linear_cross_entropy", "ours", 0.026, peak_bytes=1 << 30),
    ])  # fmt: skip
    found = {goal.id: goal.measure(rows) for goal in goals.GOALS}
    assert found["dequantise"] == ("84% (s)", False)
    assert found["linear"] == ("1.060 (s)", False)
    assert found["loss"] == ("26.0 ms, 1.00 GiB above the inputs", False)
    assert {name for name, figure in found.items() if figure.met is None} == found.keys() - {
        "dequantise",
        "linear",
        "loss",
    }


def test_where_peft_runs_out_of_memory_the_goal_is_read_at_fewer_tokens():
    def step(variant, sequences, seconds, note=""):
        tokens, shape = 2048 * sequences, f"{sequences} x 2048"
        return Row("steps", "step bf16", variant, tokens, shape, median_s=seconds, note=note)

    rows = [
        step("ours, none", 4, 1.0), step("ours, none", 1, 0.25), step("peft, none", 4, None, "out of memory"),
        step("peft, recompute", 4, 2.5), step("peft, none", 1, 0.40), step("peft float32, none", 1, 0.50),
    ]  # fmt: skip
    figure = goals.beside_peft(goals.Rows(rows))
    assert figure.text.startswith("1.60 times as fast, at 1 x 2048 tokens; at 4 x 2048 PEFT without")
    assert figure.text.endswith("2.50 times ours without")
    assert figure.met is False
    line = report.step_line(goals.Rows(rows), step("ours, selective", 4, 1.25), "h100")
    assert line[-1] == "2.00"
    assert "- out of memory: step bf16 4 x 2048, 8,192 tokens [peft, none]" in report.missing(goals.Rows(rows))


def test_a_later_row_replaces_an_earlier_one_and_a_file_is_added_to(tmp_path):
    for seconds in (1.0, 2.0):
        recorder = Recorder(tmp_path)
        recorder.add(Row("ops", "a", "ours", 3, median_s=seconds, note='x, "y"\nz'))
        recorder.close()
    rows = read_rows(tmp_path / "rows.csv")
    assert [row.median_s for row in rows] == [1.0, 2.0]
    assert latest(rows) == [Row("ops", "a", "ours", 3, median_s=2.0, note='x, "y"\nz')]


# ---- a benchmark that cannot fail its checks measures nothing


def case(run, truth, **changes) -> Case:
    return Case("c", 1, "s", {"ours": Variant(run)}, lambda: (truth,), ("y",), 1, **changes)


def outcome(run, truth, **changes) -> str:
    return cases.check(case(run, truth, **changes))["ours"]


def test_a_wrong_result_has_no_time(tmp_path):
    y = torch.ones(64, dtype=torch.float64)
    limit = limit_of(torch.bfloat16)
    assert outcome(lambda: (y * (1 + 0.9 * limit),), y).startswith("errors: y 2.8e-02")
    for bad in (y * (1 + 1.1 * limit), y * 0, y[:32], torch.full_like(y, math.nan)):
        assert outcome(lambda bad=bad: (bad,), y).startswith("wrong")
    here = session(tmp_path)
    cases.run_case(here, "ops", case(lambda: (y * 2,), y), timed=True)
    assert [row.median_s for row in here.recorder.rows] == [None]
    assert here.recorder.failures == 1


def test_an_operation_without_its_scaling_has_no_time(tmp_path, monkeypatch):
    right = linear_ops.fast.lora_linear

    def unscaled(x, projection, dropout):
        return right(x, projection._replace(scaling=1.0), dropout=dropout)

    monkeypatch.setattr(linear_ops.fast, "lora_linear", unscaled)
    here = session(tmp_path)
    built = linear_ops.lora_linear(here, 16, 32, 32, 0.0)
    cases.run_case(here, "ops", built, timed=True)
    notes = {row.variant: (row.median_s, row.note) for row in here.recorder.rows}
    assert notes["ours"][0] is None
    assert notes["ours"][1].startswith("wrong, over 3.1e-02: h ")
    assert notes["torch"][0] > 0


def test_memory_that_nothing_wrote_is_nan():
    x = torch.ones(4)
    with Poison():
        made = [torch.empty(4), torch.empty_like(x), x.new_empty(4), torch.empty_strided((2, 2), (2, 1))]
        codes, mask = torch.empty(4, dtype=torch.uint8), torch.empty(4, dtype=torch.bool)
    assert all(tensor.isnan().all() for tensor in made)
    assert (codes == 255).all()
    assert mask.all()
    assert outcome(lambda: (torch.empty(4, dtype=torch.float64),), torch.zeros(4)).startswith("wrong")


def test_one_failure_costs_only_its_own_figure():
    def fail():
        raise RuntimeError("no /usr/lib/secret/file.so here\nmore")

    found = measure({"bad": Variant(fail), "good": Variant(lambda: ())}, CPU, 0.1)
    assert found["bad"] == "failed: RuntimeError: no file.so here"
    assert found["good"].median > 0
    assert attempt(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("x"))) == "out of memory"


def test_without_time_nothing_runs_and_everything_is_named(tmp_path):
    here = session(tmp_path, deadline=time.monotonic() - 1)
    cases.run_jobs(here, "ops", [("first", lambda: 1 / 0), ("second", lambda: 1 / 0)], timed=True)
    notes = [(row.name, row.note) for row in here.recorder.rows]
    assert notes == [("first", "not run: the time was up"), ("second", "not run: the time was up")]


def test_a_step_s_error_is_held_to_twice_peft_s():
    truth = {"loss": torch.tensor(5.0), "a": torch.ones(9)}
    theirs = {"loss": torch.tensor(5.0), "a": torch.full((9,), 1.05)}
    limit = 2 * relative_error(theirs["a"], truth["a"]) + limit_of(torch.bfloat16)
    right = {"loss": torch.tensor(5.0), "a": torch.full((9,), 1 + 0.99 * limit)}
    assert not steps.verdict(right, theirs, truth).startswith("wrong")
    assert steps.verdict({**right, "a": torch.full((9,), 1 + 1.01 * limit)}, theirs, truth).startswith("wrong")
    assert steps.verdict({"loss": torch.tensor(5.0)}, theirs, truth).startswith("wrong")
    for bad in (math.nan, math.inf):
        assert steps.verdict({**right, "a": torch.full((9,), bad)}, theirs, truth).startswith("wrong")


class Blocks:
    """As much of a model as the search for the longest context looks at."""

    def __init__(self, number: int) -> None:
        self.config = SimpleNamespace(num_hidden_layers=number)
        self.model = SimpleNamespace(layers=[None] * number)

    def zero_grad(self, set_to_none: bool) -> None:
        pass


@pytest.mark.parametrize(
    ("fits", "longest", "tried"),
    [(100, 100, [32, 64, 128, 96, 112, 104, 100]), (50, 50, [32, 64, 48, 56, 52, 50]), (500, 128, [32, 64, 128]),
     (9, 0, [32])],
)  # fmt: skip
def test_the_longest_context_is_searched_for(tmp_path, monkeypatch, fits, longest, tried):
    def step(_session, _model, length, _base):
        if length > fits:
            raise torch.OutOfMemoryError("full")
        return 0.001, 5, 1.0

    monkeypatch.setattr(context, "one_step", step)
    here, model = session(tmp_path), Blocks(5)
    with context.blocks(model, 3):
        assert context.search(here, model, 32, 128, None) == longest
    assert model.config.num_hidden_layers == 5
    rows = here.recorder.rows
    assert [row.tokens for row in rows] == tried
    assert [row.tokens for row in rows if row.median_s] == [length for length in tried if length <= fits]
    assert {row.variant for row in rows} == {context.PROBE_OPTIONS}


def test_a_whole_step_without_time_says_what_it_would_need(tmp_path, monkeypatch):
    monkeypatch.setattr(context, "one_step", lambda *_: (1.0, None, 1.0))
    here, model = session(tmp_path), Blocks(2)
    context.whole_step_of(here, model, 640, {32: 1.0, 64: None}, None)
    context.whole_step_of(here, model, 64, {32: 1.0}, None)
    notes = [(row.tokens, row.variant, row.note[:26]) for row in here.recorder.rows]
    assert notes == [
        (640, context.WHOLE_OPTIONS, "not run: about 400 s would"),
        (64, context.WHOLE_OPTIONS, "loss 1.000"),
    ]


def test_another_failure_than_memory_ends_the_part(tmp_path, monkeypatch):
    monkeypatch.setattr(context, "one_step", lambda *_: 1 / 0)
    here = session(tmp_path)
    with pytest.raises(RuntimeError, match="division by zero"):
        context.search(here, Blocks(5), 32, 128, None)
    assert here.recorder.rows[-1].note.startswith("failed")


def test_a_step_s_arithmetic_is_that_of_its_products():
    """Counted by hand for the tiny shapes: matrices, adapters, causal attention."""
    s = TINY
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    shapes = [
        (s.hidden, q),
        (s.hidden, kv),
        (s.hidden, kv),
        (q, s.hidden),
        (s.hidden, s.ffn),
        (s.hidden, s.ffn),
        (s.ffn, s.hidden),
    ]
    here = type("Here", (), {"shapes": s, "device": CPU})()
    built = model.build(here)
    N = s.layers * sum(a * b for a, b in shapes) + s.hidden * s.vocab
    assert model.matrix_parameters(built) == N
    adapters = s.layers * s.r * sum(a + b for a, b in shapes)
    assert model.adapter_parameters(s) == adapters
    with torch.no_grad(), model.ours(built, s.r) as parameters:
        assert sum(p.numel() for p in parameters) == adapters
        assert all(p.any() for p in parameters)  # lora_B too
        assert model.matrix_parameters(built) == N
    tokens = 3 * 8
    forward_scores = 2 * 3 * (8 * 8 / 2) * q * 2  # q·k and p·v, half of them
    assert model.step_flops(s, N, 3, 8) == 4 * N * tokens + 6 * adapters * tokens + 3 * forward_scores * s.layers
