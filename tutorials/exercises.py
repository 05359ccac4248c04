"""The notebooks' exercises without the notebooks: does each checker reject the stub and accept the folded solution?

    python tutorials/exercises.py 03_backward        verdicts as JSON

Only cells tagged `setup`, `exercise` and `checker` are run, so that no model is trained for it.
"""

from __future__ import annotations

import ast
import json
import linecache
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # where a notebook finds `workshop`
    sys.path.insert(0, str(HERE))

from build import unexecuted
from workshop import UnsolvedError, judge

SOLUTION = re.compile(r"<details><summary>Solution</summary>\s*```python\n(.*?)```.*?</details>", re.DOTALL)


@dataclass
class Verdict:
    """What a checker says: None is acceptance, text a refusal."""

    exercise: str
    printed: str  # by the checker's cell, with the stub
    stub: str | None
    nothing: str | None  # for an answer that returns None
    solution: str | None


def verdicts(source: Path) -> list[Verdict]:
    """One for each exercise of a notebook. Raises: ValueError where an exercise lacks its checker or its solution."""
    cells = unexecuted(source).cells
    space: dict[str, Any] = {"__name__": f"exercises_{source.stem}"}
    found: list[Verdict] = []
    printed, waiting = "", ""  # of the checker before its solution is found
    for number, cell in enumerate(cells):
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown":
            for solution in SOLUTION.findall(cell.source):
                if not waiting:
                    raise ValueError(f"{source.name}: a solution without a checker before it, in cell {number}")
                found.append(verdict(waiting, printed, solution, space, f"{source.stem}[{number}]"))
                waiting = ""
        elif {"setup", "exercise", "checker"} & {*tags}:
            output = StringIO()
            with redirect_stdout(output):
                run(cell.source, space, f"{source.stem}[{number}]")
            if "checker" in tags:
                if waiting:
                    raise ValueError(f"{source.name}: the exercise {decorated(waiting)[1]} has no folded solution")
                waiting, printed = cell.source, output.getvalue()
    if waiting:
        raise ValueError(f"{source.name}: the exercise {decorated(waiting)[1]} has no folded solution")
    return found


def run(code: str, space: dict[str, Any], name: str) -> None:
    """Runs code as a file of this name, whose lines can be looked up: a Triton kernel needs its own source."""
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    exec(compile(code, name, "exec"), space)


def verdict(cell: str, printed: str, solution: str, space: dict[str, Any], name: str) -> Verdict:
    """What the checker of one cell says of the stub, of an answer that returns nothing, and of the solution."""
    checker, exercise = decorated(cell)
    check, stub = space[checker], space[exercise]

    def nothing(*_: Any, **__: Any) -> None:
        return None

    of_stub, of_nothing = refusal(check, stub), refusal(check, nothing)
    run(solution, space, f"{name} solution")
    return Verdict(exercise, printed, of_stub, of_nothing, refusal(check, space[exercise]))


def refusal(check: Any, answer: Any) -> str | None:
    """What the checker objects to."""
    try:
        judge(check, answer)
    except UnsolvedError as objection:
        return str(objection)
    return None


def decorated(cell: str) -> tuple[str, str]:
    """(the checker's name, the exercise's) of a cell with `@checks(exercise)`."""
    for node in ast.parse(cell).body:
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "checks":
                    return node.name, ast.unparse(decorator.args[0])
    raise ValueError(f"a cell tagged checker has no @checks(...):\n{cell}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the verdicts of the notebooks named."""
    names = sys.argv[1:] if arguments is None else arguments
    print(json.dumps([asdict(v) for name in names for v in verdicts(HERE / "src" / f"{name}.py")]))


if __name__ == "__main__":
    main()
