"""How far long work has come: a line on a terminal, plain lines elsewhere; and that all long work says it."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from test_models import save, tiny_mixtral
from tiny import stir, tiny_llama
from tiny_gguf import llama, write
from tiny_text import save_tiny_model

import lora
from lora import LoRAConfig, meter
from lora.cli import main
from lora.train.config import TrainConfig
from lora.train.job import Job
from lora.train.quiet import quiet


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    found = Terminal()
    monkeypatch.setattr(meter, "sys", SimpleNamespace(stderr=found))
    monkeypatch.setattr(meter, "PAUSE", 0.0)
    return found


def shown(terminal: Terminal) -> list[str]:
    """What the line has said, in turn."""
    return terminal.getvalue().split("\r\x1b[K")[1:]


def test_a_part_is_said_and_the_line_is_gone_at_the_end(terminal: Terminal) -> None:
    with meter.meter("writing", 4_000_000) as done:
        done(1_000_000)
        done(3_000_000)
    assert shown(terminal) == ["writing ...", "writing 25% of 4 MB", "writing 100% of 4 MB", ""]
    with pytest.raises(ValueError), meter.meter("writing"):
        raise ValueError
    assert shown(terminal)[-2:] == ["writing ...", ""]


def test_the_line_changes_no_more_often_than_it_is_read(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "PAUSE", 60.0)
    with meter.meter("writing", 1000) as done:
        for _ in range(1000):
            done(1)
    assert shown(terminal) == ["writing ...", ""]


def test_work_inside_of_other_work_has_the_line(terminal: Terminal) -> None:
    with meter.meter("loading"):
        with meter.meter("quantising", 10, "modules") as done:
            done()
            done(2)
        with pytest.raises(ValueError), meter.meter("reading"):
            raise ValueError
    inner = ["quantising ...", "quantising 1 of 10 modules", "quantising 3 of 10 modules", "loading ..."]
    assert shown(terminal) == ["loading ...", *inner, "reading ...", "loading ...", ""]


# ---- where there is no terminal


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """stderr that is no terminal, and little patience."""
    found = io.StringIO()
    monkeypatch.setattr(meter, "sys", SimpleNamespace(stderr=found))
    monkeypatch.setattr(meter, "FIRST", 0.02)
    monkeypatch.setattr(meter, "EVERY", 0.02)
    return found


def wait_for(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_short_work_is_silent_where_nobody_looks(capfd: pytest.CaptureFixture[str]) -> None:
    with meter.meter("writing", 10) as done:
        done(5)
    assert capfd.readouterr() == ("", "")


def test_long_work_is_said_in_plain_lines(pipe: io.StringIO) -> None:
    """Also where the work itself never comes up, and with the innermost part's progress."""
    threads = threading.active_count()
    with meter.meter("loading"):
        wait_for(lambda: "lora: loading ...\n" in pipe.getvalue())
        with meter.meter("quantising", 4, "modules") as done:
            done()
            wait_for(lambda: "lora: quantising 1 of 4 modules\n" in pipe.getvalue())
    wait_for(lambda: threading.active_count() == threads)
    said = pipe.getvalue()
    time.sleep(0.1)
    assert pipe.getvalue() == said and "\r" not in said and "\x1b" not in said


def test_lines_come_now_and_then(pipe: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "EVERY", 60.0)
    with meter.meter("writing", 1000) as done:
        wait_for(lambda: pipe.getvalue() != "")
        for _ in range(100):
            done(1)
            time.sleep(0.002)
    assert pipe.getvalue().count("\n") == 1


def test_its_thread_is_over_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run says holds its model. A thread that is the last to let it go, as the process ends, aborts that."""
    monkeypatch.setattr(meter, "FIRST", 0.0)
    saying, before = threading.Event(), threading.active_count()

    def slowly(text: str) -> None:
        saying.set()
        time.sleep(0.2)

    with meter.shown_by(slowly, live=False), meter.meter("loading the model"):
        assert saying.wait(10)
    assert threading.active_count() == before


@pytest.mark.parametrize(("name", "value"), [("LORA_PROGRESS", "off"), ("RANK", "1")])
def test_nothing_is_said_where_it_is_not_wanted(
    pipe: io.StringIO, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with meter.meter("writing", 10) as done:
        done(5)
        time.sleep(0.1)
    assert pipe.getvalue() == ""


@pytest.mark.parametrize("terminal_or_not", [True, False])
def test_a_training_run_says_it_on_its_console(tmp_path: Path, pipe: io.StringIO, terminal_or_not: bool) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal_or_not, width=100)
    job = Job(TrainConfig(model="m", data="d", output=str(tmp_path / "out")), console)
    with job.working("loading the model"), meter.meter("quantising", 8, "modules") as done:
        done(3)
        wait_for(lambda: "quantising" in output.getvalue())
        if not terminal_or_not:
            wait_for(lambda: "working   quantising 3 of 8 modules\n" in output.getvalue())
    assert pipe.getvalue() == "" and ("\x1b" in output.getvalue()) == terminal_or_not


# ---- all long work


def counts(said: list[str], doing: str) -> list[int]:
    """The numbers that a kind of work has counted, or its percentages."""
    return [
        int(line[len(doing) :].split()[0].rstrip("%"))
        for line in said
        if line.startswith(doing + " ") and " of " in line
    ]


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "loftq", True])
@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_starting_an_adapter_counts_modules(terminal: Terminal, start: Any, backend: str) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=64)
    with lora.use_backend(backend):
        lora.inject(model, LoRAConfig(r=2, init_lora_weights=start))
        assert counts(shown(terminal), "starting the adapter") == list(range(1, 15))
        terminal.seek(0)
        terminal.truncate()
        lora.add_adapter(model, LoRAConfig(r=2, target_modules=["q_proj"]), "second")
        assert counts(shown(terminal), "starting the adapter") == [1, 2]


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_merging_and_quantising_count(terminal: Terminal, backend: str) -> None:
    with lora.use_backend(backend):
        model = lora.inject(tiny_llama(), LoRAConfig(r=2, init_lora_weights=False))
        lora.merge(model)
        assert counts(shown(terminal), "merging") == list(range(1, 15))
        lora.quantize(tiny_llama())
        percent = counts(shown(terminal), "quantising")
    assert len(percent) == 14 and percent == sorted(percent) and percent[-1] == 100


def test_loading_says_it(tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    path = save(tiny_llama(), tmp_path / "model")
    model, _ = lora.load(path, quantization="nf4", dtype="bfloat16")
    percent = counts(shown(terminal), "quantising")
    assert len(percent) == 14 and percent == sorted(percent) and percent[-1] == 100
    lora.save_adapter(lora.inject(model, LoRAConfig(r=2)), tmp_path / "adapter")
    lora.load(path)
    lora.load_adapter(lora.load(path)[0], tmp_path / "adapter", check_base=False)
    lora.load(write(tmp_path / "b.gguf", llama()))
    said = shown(terminal)
    assert "loading the model ..." in said and "loading the adapter ..." in said
    converted = counts(said, "converting the GGUF file")
    assert len(converted) > 5 and converted == sorted(converted) and converted[-1] == 100


def test_merging_a_mixture_counts_modules(tmp_path: Path, terminal: Terminal) -> None:
    """Its files have other names than its weights: transformers writes them, all at once."""
    path = save(tiny_mixtral(), tmp_path / "model")
    options = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
    model = lora.inject(lora.load(path)[0], LoRAConfig(r=2, **options))
    stir(model)
    lora.save_adapter(model, tmp_path / "adapter")
    words = ["merge", "--model", str(path), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]
    terminal.seek(0)
    terminal.truncate()
    assert main(words) == 0
    said = shown(terminal)
    assert "merging and writing ..." in said and counts(said, "merging") == list(range(1, 7))


def test_a_slow_command_is_not_silent_in_a_pipe(
    tmp_path: Path, pipe: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lora merge of a mixture, and a start by singular values, each module of which is made to take a moment."""
    for path, name in (("lora.reference.merge", "merge_layer"), ("lora.reference.inject", "add_parameters")):
        module = import_module(path)
        monkeypatch.setattr(module, name, slowly(getattr(module, name)))
    model_path = save(tiny_mixtral(), tmp_path / "model")
    with quiet():
        config = LoRAConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights="pissa")
        model = lora.inject(lora.load(model_path)[0], config)
        lora.save_adapter(model, tmp_path / "adapter")
        assert "lora: starting the adapter 2 of 4 modules\n" in pipe.getvalue()
    words = [
        "merge",
        "--model",
        str(model_path),
        "--adapter",
        str(tmp_path / "adapter"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(words) == 0
    assert "lora: merging 2 of 4 modules\n" in pipe.getvalue() and "\r" not in pipe.getvalue()


def slowly(work: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(0.2)
        return work(*args, **options)

    return slow


def test_long_commands_say_how_far_they_are(tmp_path: Path, terminal: Terminal) -> None:
    with quiet():
        source = save_tiny_model(tmp_path / "model")
        model = lora.inject(lora.load(source)[0], LoRAConfig(r=2))
        lora.save_adapter(model, tmp_path / "adapter")
    words = {"merge": ["--adapter", str(tmp_path / "adapter")], "quantize": []}
    for command, more in words.items():
        terminal.seek(0)
        terminal.truncate()
        assert main([command, "--model", str(source), *more, "--output", str(tmp_path / command)]) == 0
        said = shown(terminal)
        assert said[0] == "loading the model ..." and said[-1] == ""
        parts = [int(line.split()[1].rstrip("%")) for line in said if line.startswith("writing ") and "%" in line]
        assert len(parts) > 5 and parts == sorted(parts) and parts[-1] == 100
        assert bool(counts(said, "quantising")) == (command == "quantize")
