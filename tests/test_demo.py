"""The demo: its data, its quality figure, and all of it in miniature."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tiny_text import save_tiny_model

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import docstrings as demo

PACKAGES = ["heapq", "json", "random", "shutil", "string", "textwrap"]


@pytest.fixture(scope="module")
def pairs() -> list[demo.Pair]:
    """Of the whole standard library."""
    return demo.collect()


def test_there_are_thousands_of_pairs_and_none_twice(pairs: list[demo.Pair], capfd: Any) -> None:
    assert len(pairs) > 2000
    assert len({pair.sentence for pair in pairs}) == len(pairs)
    low, high = demo.SENTENCE_WORDS
    for pair in pairs:
        kind, name = pair.signature.partition("(")[0].split()
        assert kind in ("def", "class")
        assert not any(part.startswith("_") for part in name.split("."))
        assert not re.search(r" at 0x[0-9a-f]{6}", pair.signature)
        assert low <= len(pair.sentence.split()) <= high
        assert len(pair.signature) <= demo.LONGEST_SIGNATURE
    assert {"json", "os", "random"} <= {pair.package for pair in pairs}
    assert not {"this", "antigravity", "test", "tkinter", "posix"} & {pair.package for pair in pairs}


def test_collecting_is_silent_and_the_same_in_every_process() -> None:
    code = (
        "import sys; sys.path.insert(0, 'examples'); import docstrings as demo, hashlib;"
        f"pairs = demo.collect({PACKAGES!r}); print(hashlib.sha256(repr(pairs).encode()).hexdigest())"
    )
    root = Path(__file__).parent.parent
    finished = [
        subprocess.run(
            [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, cwd=root, check=True
        )
        for _ in range(2)
    ]
    assert finished[0].stdout == finished[1].stdout
    assert [run.stderr for run in finished] == ["", ""]
    assert len(finished[0].stdout.split()) == 1


def test_what_the_caller_has_imported_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.path.insert(0, 'examples'); import docstrings as demo; print(demo.collect())"
    root = Path(__file__).parent.parent
    before, after = (
        subprocess.run([sys.executable, "-c", first + code], capture_output=True, text=True, cwd=root, check=True)
        for first in ("", "import torch, transformers; ")  # both put functions into the standard library's modules
    )
    assert before.stdout == after.stdout and "def inspect.getfile(object)" in before.stdout

    def indent(text: str) -> str:
        """Return what a library's own function returns."""
        return text

    expected = demo.collect(["textwrap"])
    monkeypatch.setattr(textwrap, "indent", indent)
    assert demo.collect_here(["textwrap"]) != expected  # what such a library does to the process it is in
    assert demo.collect(["textwrap"]) == expected


def test_a_module_of_the_same_name_elsewhere_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sndhdr_of_mine.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert not demo.imported("sndhdr_of_mine")
    assert demo.is_standard(json.__file__) and demo.is_standard(None)
    assert not demo.is_standard(str(tmp_path / "json.py"))
    assert not demo.is_standard(pytest.__file__)


def test_no_package_is_on_both_sides(pairs: list[demo.Pair]) -> None:
    train, held_out = demo.split(pairs)
    assert not {pair.package for pair in train} & {pair.package for pair in held_out}
    assert sorted([*train, *held_out], key=lambda pair: pair.signature) == sorted(pairs, key=lambda p: p.signature)
    assert demo.HELD_OUT_SHARE <= len(held_out) / len(pairs) < 3 * demo.HELD_OUT_SHARE
    assert demo.split(pairs) == (train, held_out)
    assert demo.split(pairs, seed=1)[1] != held_out


def test_first_sentences() -> None:
    assert demo.first_sentence("Return the name.\n\n    More.") == "Return the name."
    assert demo.first_sentence("Return the name\n    of it. Then more.") == "Return the name of it."
    assert demo.first_sentence("Return the file name e.g. 'a' of it") == "Return the file name e.g."
    assert demo.first_sentence("Return a name") is not None
    for noise in (
        None,
        3,
        "",
        "Short.",
        "return a name.",
        ">>> run(this) for me.",
        "f(x) -> the value of it",
        "Naïve one of it.",
    ):
        assert demo.first_sentence(noise) is None, noise
    assert demo.first_sentence("Deprecated: use the other one.") is None
    assert demo.first_sentence("word " * 40) is None


def test_signatures_hold_no_addresses() -> None:
    def function(path: str, *, key: Any = object(), mode: int = 3) -> None:  # noqa: B008
        """Return the value of it."""

    (pair,) = [demo.pair_of("json.function", function)]
    assert pair == demo.Pair(
        "json", "def json.function(path: 'str', *, key: 'Any' = ..., mode: 'int' = 3)", "Return the value of it."
    )
    assert demo.pair_of("json.f", 3) is None


QUALITY = {
    "Return the name of the file.": True,
    "  Close the socket and, if need be, wait.  ": True,
    "Returns the name of the file.": False,
    "This function returns the name of the file.": False,
    "The `f` function is used to return a name.": False,
    "Return the name": False,
    "Return the name of the": False,
    "Return the name. It is a string.": False,
    "Return the name! Now.": False,
    "Return the name.\nIt is a string.": False,
    "Return the name of\nthe file.": False,
    "return the name.": False,
    "": False,
    "```python": False,
}


@pytest.mark.parametrize("answer", QUALITY)
def test_quality(answer: str) -> None:
    assert demo.is_one_imperative_sentence(answer) == QUALITY[answer]


def test_verbs_are_base_forms() -> None:
    verbs = demo.VERBS.split()
    assert len(verbs) == len(set(verbs)) > 200
    assert verbs == sorted(verbs)
    assert not {verb for verb in verbs if verb + "s" in verbs}


def test_in_miniature(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora.train.quiet import quiet

    monkeypatch.setenv("LORA_BACKEND", "auto")
    with quiet():
        model = save_tiny_model(tmp_path / "model")
    capfd.readouterr()
    output = tmp_path / "out"
    words = ["--model", str(model), "--output", str(output), "--packages", *PACKAGES]
    words += ["--steps", "2", "--measured", "6", "--answers", "3"]
    assert demo.main(words) == 0
    seen = capfd.readouterr()
    assert seen.err == ""
    assert not set("\x1b\r") & set(seen.out)
    figures = json.loads((output / "report.json").read_text())
    assert figures["checks"]["adapter"] == 0.0  # bit for bit: the same operations on the same numbers
    assert figures["checks"]["peft"] < 1e-5
    assert figures["merged_difference"] < 1e-5
    assert figures["checks"]["base"] > 1e-3  # the adapter does something
    assert 0 < figures["checks"]["merged"] < 0.05 * figures["logits_largest"] + 0.05  # rounded to bfloat16
    assert figures["backend"] == "auto"
    assert (figures["answers"], figures["pairs_measured"], figures["pairs_seen"]) == (3, 6, 16)
    assert figures["loss_after"] < figures["loss_before"]
    report = (output / "report.md").read_text()
    assert f"{figures['loss_before']:.3f} -> {figures['loss_after']:.3f}" in report and "loss.png" in report
    names = {path.name for path in output.iterdir()}
    assert names >= {"train.jsonl", "held_out.jsonl", "adapter", "merged", "loss.png", "report.md", "samples.md"}
    assert "logits.safetensors" not in names
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == []

    monkeypatch.setattr(demo, "check_in_fresh_process", lambda *_: figures["checks"])  # it has been seen to work
    assert demo.main(words) == 0  # safe to repeat, and the same
    again = json.loads((output / "report.json").read_text())
    assert (again["loss_after"], again["quality_after"]) == (figures["loss_after"], figures["quality_after"])


def test_a_wrong_model_is_one_line(tmp_path: Path, capsys: Any) -> None:
    words = ["--model", "/nowhere/model", "--output", str(tmp_path / "out"), "--packages", *PACKAGES]
    assert demo.main(words) == 2
    assert capsys.readouterr().err.startswith("error: There is no file or directory")
