"""The docs: every block of Python runs or says why not, every command line parses, every link and every name is there.

Blocks of one page run in order, in one namespace, in a directory of their own. Where a page loads a model from the
hub, a tiny random one takes its place: what is tested is that the code works, not what a model says.

A block that is not run has a comment on the line before it: <!-- not run: the reason -->
"""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import stir
from tiny_text import rows, save_tiny_model, write_jsonl

import lora
from lora.cli import parser
from lora.train.config import HINTS, from_sources, parse_flag

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
TEXTS |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
FENCE = re.compile(r"(?P<before>[^\n]*)\n(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```", re.M | re.S)
REASON = re.compile(r"\s*<!-- not run: (?P<reason>.{10,}) -->")
COMMAND = re.compile(r"^(?:(?:\S*/)?|.* -m -- )lora (?P<words>[a-z].*)")
RUN_ELSEWHERE = {"README.md": "tests/test_readme.py"}


def fences(text: str, language: str) -> list[tuple[str, str | None]]:
    """The blocks of one language, and why each is not run."""
    found = [match for match in FENCE.finditer("\n" + text) if match["language"] == language]
    reasons = [REASON.fullmatch(match["before"]) for match in found]
    return [
        (textwrap.dedent(match["code"]), reason["reason"] if reason else None)
        for match, reason in zip(found, reasons, strict=True)
    ]


def pages_that_run() -> list[str]:
    """The pages with Python in them that runs here."""
    return [
        name
        for name, text in TEXTS.items()
        if name not in RUN_ELSEWHERE and any(reason is None for _, reason in fences(text, "python"))
    ]


# ---- what the pages find


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("docs") / "tiny")


@pytest.fixture
def hub(tiny_model, tmp_path, monkeypatch) -> None:
    """Every model that is no directory is the tiny one; the working directory is empty but for examples.jsonl."""
    import transformers

    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "examples.jsonl", rows(24))
    monkeypatch.setenv("TRL_TELEMETRY", "0")
    monkeypatch.setattr(lora, "load", instead(lora.load, tiny_model))
    monkeypatch.setattr("lora.models.load", lora.load)
    causal = transformers.AutoModelForCausalLM
    monkeypatch.setattr(causal, "from_pretrained", instead(causal.from_pretrained, tiny_model))
    with lora.use_backend("reference"):
        yield


def instead(load: Any, directory: Path) -> Any:
    """`load`, of `directory` wherever it is given a name that is none."""

    def loaded(name: Any, *args: Any, **options: Any) -> Any:
        return load(name if Path(str(name)).exists() else directory, *args, **options)

    return loaded


def adapters_to_serve(names: dict[str, Any]) -> None:
    """docs/training/serving.md: three adapters that were trained, and a batch for one layer."""
    names |= {"lora": lora}
    for name in ("support", "legal", "code"):
        model, _ = lora.load("any")
        stir(lora.inject(model, lora.LoRAConfig(r=2)))
        lora.save_adapter(model, f"out/{name}/adapter")
    names |= {"x": torch.randn(3, 5, 16), "weight": torch.randn(8, 16), "bias": None}
    names |= {"lora_A": torch.randn(2, 4, 16), "lora_B": torch.randn(2, 8, 4), "scaling": torch.ones(2)}
    names |= {"index": torch.tensor([0, -1, 1])}


GIVEN = {"docs/training/serving.md": adapters_to_serve}


# ---- blocks


@pytest.mark.parametrize("page", pages_that_run())
def test_the_python_of_a_page_runs(page, hub):
    names: dict[str, Any] = {"__name__": page}
    GIVEN.get(page, lambda _: None)(names)
    before = lora.dispatch._chosen
    try:
        for number, (code, reason) in enumerate(fences(TEXTS[page], "python"), start=1):
            if reason is None:
                exec(compile(code, f"{page}, block {number}", "exec"), names)
    finally:
        lora.dispatch._chosen = before  # a page may call use_backend for good


def test_the_fences_are_all_seen():
    """As many as a plain count of the lines that open one: none hides in a list or a tab."""
    for page, text in TEXTS.items():
        opened = re.findall(r"^\s*```+\s*\{?\.?(?:python|py|python3|pycon)\b", text, re.M)
        assert len(opened) == len(fences(text, "python")), page


def test_what_is_shown_as_printed_is_what_is_printed(hub, capsys):
    """The text below a block that prints an error is that error."""
    for page in ("docs/api/errors.md", "docs/howto/fallback.md"):
        code = [code for code, _ in fences(TEXTS[page], "python") if "print(error)" in code]
        names: dict[str, Any] = {"lora": lora, "torch": torch}
        exec(code[0], names)
        assert capsys.readouterr().out.strip() in [code.strip() for code, _ in fences(TEXTS[page], "text")]


# ---- command lines


def code_of(text: str) -> list[str]:
    """The lines of shell blocks and of indented code, those that end in a backslash put together."""
    blocks = [code for language in ("sh", "bash", "") for code, _ in fences(text, language)]
    outside = FENCE.sub("\n", "\n" + text)
    blocks += [match[0] for match in re.finditer(r"(?:^(?: {4}|\t).*\n)+", outside, re.M)]
    return [line.strip() for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]


def command_lines() -> list[tuple[str, str]]:
    found = [(page, line) for page, text in TEXTS.items() for line in code_of(text)]
    return [(page, line) for page, line in found if COMMAND.match(line) and "…" not in line]


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_a_command_line_is_one_that_the_command_takes(page, line):
    (words,) = COMMAND.match(line).groups()
    words = shlex.split(words.rstrip("'"), comments=True)  # the quote of a bash -c '...'
    options, unknown = parser().parse_known_args(words)
    assert unknown == [], page
    if options.command.__name__ == "train":
        given = {name: value for name, value in vars(options).items() if name in HINTS}
        flags = {name: parse_flag(name, value) if isinstance(value, str) else value for name, value in given.items()}
        from_sources(None, ({"model": "m", "data": "d"} if options.config else {}) | flags)


def test_there_are_command_lines():
    assert len(command_lines()) >= 20


# ---- the site


def navigation(entries: Any) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    values = entries.values() if isinstance(entries, dict) else entries
    return [page for value in values for page in navigation(value)]


def test_every_page_has_its_place():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = navigation(site["nav"])
    made = {"api/cli.md", "contributing.md", "changelog.md"}  # docs/site/hooks.py
    filled = ("decisions/", "benchmarks/")  # too
    there = {path.relative_to(DOCS).as_posix() for path in PAGES}
    assert len(listed) == len(set(listed))
    assert set(listed) - made <= there
    assert {page for page in there - set(listed) if not page.startswith(filled)} == set()


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files_of_the_repository(page):
    outside = re.sub(r"`[^`\n]*`(?!\])", "", FENCE.sub("\n", "\n" + TEXTS[page]))
    outside = re.sub(r"(?<=\n\n)(?:(?: {4}|\t)[^\n]*\n)+", "", outside)
    for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", outside):
        if ":" not in target and target != "api/cli.md" and not target.endswith("/api/cli.md"):
            assert ((ROOT / page).parent / target).exists(), target


def test_every_public_name_is_described():
    described = set(re.findall(r"^::: ([\w.]+)", "\n".join(TEXTS.values()), re.M))
    assert {f"lora.{name}" for name in lora.__all__ if name != "ops"} <= without_twins(described)
    assert {f"lora.reference.{name}" for name in lora.dispatch.OPERATIONS} <= without_twins(described)
    for name in described:
        assert exists(name), name


def without_twins(names: set[str]) -> set[str]:
    """`lora.adapters.adapters` is `lora.adapters`: a function that has the name of its module is named in full."""
    return {re.sub(r"\.(\w+)\.\1$", r".\1", name) for name in names}


def exists(name: str) -> bool:
    import importlib

    path, _, last = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(path), last) or bool(importlib.import_module(name))
    except ImportError:
        return False
