"""The notebooks: in step with their sources, complete, small, and their exercises reject stubs and accept solutions."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = ROOT / "tutorials"
SOURCES = sorted((TUTORIALS / "src").glob("*.py"))
NAMES = [source.stem for source in SOURCES]
every_notebook = pytest.mark.parametrize("name", NAMES)


def module(name: str) -> ModuleType:
    """One of the notebooks' own modules, which are scripts beside them and no package."""
    if str(TUTORIALS) not in sys.path:
        sys.path.insert(0, str(TUTORIALS))
    return importlib.import_module(name)


def stored(name: str):
    return nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)


def text_of(notebook, kind: str) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == kind)


def test_sources_and_notebooks_are_pairs_numbered_from_one():
    assert [int(name[:2]) for name in NAMES] == list(range(1, len(NAMES) + 1))
    assert sorted(path.stem for path in TUTORIALS.glob("*.ipynb")) == NAMES


@every_notebook
def test_a_notebook_is_its_source_executed_from_top_to_bottom(name):
    assert module("build").differences(TUTORIALS / "src" / f"{name}.py") == []
    notebook = stored(name)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    assert (TUTORIALS / f"{name}.ipynb").stat().st_size < 500_000


@every_notebook
def test_a_notebook_says_nothing_of_the_machine_that_ran_it(name):
    text = (TUTORIALS / f"{name}.ipynb").read_text()
    assert not re.search(r"/(home|root|work|tmp|usr)/|site-packages|0x[0-9a-f]{8}", text)
    assert set(stored(name).metadata) == {"kernelspec", "language_info"}


@every_notebook
def test_a_notebook_has_every_part(name):
    notebook = stored(name)
    first, text = notebook.cells[0].source, text_of(notebook, "markdown")
    assert re.match(rf"# {int(name[:2])}\. \S", first) and "**The question.**" in first and "?" in first
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    expected = ["Predict", "The derivation", "Exercises", "Where this lives in the code", "References"]
    for heading in expected:
        assert any(found.startswith(heading) for found in headings), f"no heading {heading!r} in {headings}"
    assert headings.index("Predict") == 0 and headings[-1] == "References"
    assert text.count("$$") >= 2
    checked = [cell for cell in notebook.cells if "assert" in cell.source and not cell.metadata.get("tags")]
    assert len(checked) >= 4, "claims are asserted where they are made"


@every_notebook
def test_links_lead_to_files(name):
    links = re.findall(r"\]\(([^)#]+)\)", text_of(stored(name), "markdown"))
    assert links
    for link in links:
        assert link.startswith("https://") or (TUTORIALS / link).exists(), link


@every_notebook
def test_exercises_reject_stubs_and_accept_their_solutions(name):
    source = TUTORIALS / "src" / f"{name}.py"
    if "TRITON_INTERPRET" in source.read_text():  # Triton reads it when it is imported: a process of its own
        command = [sys.executable, str(TUTORIALS / "exercises.py"), name]
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
        finished = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert finished.returncode == 0, finished.stderr
        exercises = module("exercises")
        found = [exercises.Verdict(**each) for each in json.loads(finished.stdout.splitlines()[-1])]
    else:
        found = module("exercises").verdicts(source)
    assert 2 <= len(found) <= 3
    for each in found:
        assert each.stub and each.printed.startswith(f"✗ {each.exercise}: not yet. ") and len(each.printed) > 40
        assert each.nothing, f"{each.exercise}: None is accepted"
        assert each.solution is None, f"{each.exercise}: its own solution is refused: {each.solution}"


def test_a_checker_that_takes_anything_is_found(tmp_path):
    source = tmp_path / "01_wrong.py"
    source.write_text(
        '# %% tags=["setup"]\nfrom workshop import checks\n\n'
        '# %% tags=["exercise"]\ndef mine():\n    raise NotImplementedError\n\n'
        '# %% tags=["checker"]\n@checks(mine)\ndef check(answer):\n    pass\n\n'
        "# %% [markdown]\n# <details><summary>Solution</summary>\n#\n# ```python\n# def mine():\n#     return 1\n"
        "# ```\n# </details>\n"
    )
    (found,) = module("exercises").verdicts(source)
    assert found.stub is None and found.nothing is None and found.printed == "✓ mine: accepted.\n"


def test_a_stale_notebook_is_found(tmp_path, monkeypatch):
    build = module("build")
    source = TUTORIALS / "src" / f"{NAMES[0]}.py"
    changed = tmp_path / source.name
    changed.write_text(source.read_text().replace("## Predict", "## Guess"))
    monkeypatch.setattr(build, "notebook_of", lambda _: TUTORIALS / f"{NAMES[0]}.ipynb")
    assert build.differences(source) == []
    assert build.differences(changed) == ["cell 2 differs from its source"]


def test_a_checker_tells_what_the_reader_did_wrong(capsys):
    workshop = module("workshop")

    def mine():
        return 1 / 0

    @workshop.checks(mine)
    def check(answer):
        assert answer() == 1, "it should be one."

    assert capsys.readouterr().out == "✗ mine: not yet. It raised ZeroDivisionError: division by zero\n"
    with pytest.raises(workshop.UnsolvedError, match=r"^it should be one\."):
        workshop.judge(check, lambda: 2)
    workshop.judge(check, lambda: 1)

    def stub():
        raise NotImplementedError

    with pytest.raises(workshop.UnsolvedError, match="Replace the line that raises"):
        workshop.judge(check, stub)


def test_what_belongs_to_a_run_or_a_machine_is_left_out_and_stderr_is_an_error():
    build = module("build")
    shown = nbformat.v4.new_output("stream", text=f"{ROOT}/lora: <object at 0x7f00aa>\n")
    assert build.tidy(shown).text == "./lora: <object>\n"
    picture = nbformat.v4.new_output("display_data", {"image/png": "…", "text/plain": "<Figure size 640x480>"})
    assert dict(build.tidy(picture).data) == {"image/png": "…"}
    with pytest.raises(RuntimeError, match="wrote to stderr"):
        build.tidy(nbformat.v4.new_output("stream", name="stderr", text="UserWarning"))
