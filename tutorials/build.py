"""Notebooks from their sources: tutorials/src/NN_name.py, run from top to bottom, is tutorials/NN_name.ipynb.

    python tutorials/build.py                 run all, and store what they print and draw
    python tutorials/build.py 03 07 --check   run these, store nothing: does every cell still run?

A source is a percent script (`jupytext`): `# %%` begins a cell of code, `# %% [markdown]` one of text. What is stored
depends on the source and on what the code prints, not on the machine: no times, no paths, numbered cells.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jupytext
import nbformat

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SECONDS = 600  # that one cell may take on a busy machine
LARGEST = 500_000  # bytes of a stored notebook
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def sources() -> list[Path]:
    """Every percent script, in order."""
    return sorted((HERE / "src").glob("[0-9][0-9]_*.py"))


def notebook_of(source: Path) -> Path:
    """Where a source's notebook is stored."""
    return HERE / f"{source.stem}.ipynb"


def unexecuted(source: Path) -> Any:
    """The notebook of a source, not run."""
    notebook = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict(KERNEL)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"
        cell.metadata = nbformat.from_dict({"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {})
    return notebook


def executed(source: Path) -> Any:
    """The notebook of a source with its outputs. Raises: RuntimeError, with the traceback, where a cell fails."""
    from nbclient import NotebookClient

    notebook = unexecuted(source)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "LORA_PROGRESS": "off"}
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(HERE)}},
    )
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        try:
            client.execute(env=environment, stderr=said)
        except Exception as error:
            said.seek(0)
            raise RuntimeError(f"{error}\nThe kernel's own messages:\n{said.read()}") from error
    notebook.metadata = nbformat.from_dict(KERNEL)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [tidy(output) for output in cell.outputs]
    return notebook


def tidy(output: Any) -> Any:
    """An output without what belongs to this machine or to this run."""
    if output.output_type == "stream":
        if output.name == "stderr":
            raise RuntimeError(f"a cell wrote to stderr, which a reader would see: {output.text}")
        output.text = cleaned(output.text)
    for kind, data in output.get("data", {}).items():
        if kind.startswith("text/"):
            output["data"][kind] = cleaned(data)
        if kind == "image/png":
            output["data"].pop("text/plain", None)
            output["metadata"] = {}
            break
    return output


def cleaned(text: str) -> str:
    """Text without paths of this machine."""
    return re.sub(r" at 0x[0-9a-f]+", "", text.replace(str(ROOT), "."))


def differences(source: Path) -> list[str]:
    """Where the stored notebook is not the source's: nothing, if they are in step and every cell was run."""
    stored = notebook_of(source)
    if not stored.is_file():
        return [f"{stored.name} is missing"]
    wanted, found = unexecuted(source), nbformat.read(stored, as_version=4)
    if len(wanted.cells) != len(found.cells):
        return [f"{stored.name} has {len(found.cells)} cells, its source {len(wanted.cells)}"]
    wrong = [
        f"cell {number} differs from its source"
        for number, (a, b) in enumerate(zip(wanted.cells, found.cells, strict=True))
        if (a.cell_type, a.source, a.metadata, a.id) != (b.cell_type, b.source, b.metadata, b.id)
    ]
    counts = [cell.execution_count for cell in found.cells if cell.cell_type == "code"]
    if counts != list(range(1, len(counts) + 1)):
        wrong.append(f"cells were run in the order {counts}")
    if found.metadata != wanted.metadata:
        wrong.append("the metadata is not the house's")
    return wrong


def build(source: Path, check: bool) -> str:
    """Runs one source; stores its notebook unless `check`. Returns a line for the terminal."""
    started = time.monotonic()
    notebook = executed(source)
    text = nbformat.writes(notebook) + "\n"
    if len(text.encode()) > LARGEST:
        raise RuntimeError(
            f"{source.stem} is {len(text.encode()):,} bytes with its outputs, expected {LARGEST:,} at most"
        )
    if not check:
        notebook_of(source).write_text(text, encoding="utf-8")
    return f"{source.stem:<24}{time.monotonic() - started:5.0f} s {len(text.encode()) / 1000:6.0f} kB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the chosen notebooks, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("numbers", nargs="*", help="which: 03, or 03_backward; all by default")
    parser.add_argument("--check", action="store_true", help="store nothing")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time [%(default)s]")
    options = parser.parse_args(arguments)
    chosen = [s for s in sources() if not options.numbers or any(s.stem.startswith(n) for n in options.numbers)]
    if not chosen:
        parser.error(f"no source begins with {options.numbers}; there are {[s.stem for s in sources()]}")
    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [(source, pool.submit(build, source, options.check)) for source in chosen]
        for source, future in futures:
            error = future.exception()
            print(future.result() if error is None else f"{source.stem} failed:\n{error}", flush=True)
            failed += error is not None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
