"""The line that says how far long work has come: on a terminal, and nowhere else."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_text import save_tiny_model

import lora
from lora import LoRAConfig, meter
from lora.cli import main
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


def test_nothing_is_said_where_nobody_looks(capfd: pytest.CaptureFixture[str]) -> None:
    with meter.meter("writing", 10) as done:
        done(5)
    assert capfd.readouterr() == ("", "")


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
        assert ("quantising ..." in said) == (command == "quantize")
