"""A mutant: one module of the fast backend with one mistake in it, in memory and never in the working tree."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType

from lora.errors import LoRAError


@dataclass(frozen=True)
class Mutant:
    """A module's source with one mistake, and the proofs that must notice it."""

    operation: str
    module: str  # "lora.fast.linear"
    function: str  # "backward_group"; "" where a written mutant does not say
    mistake: str  # in words, or "old → new"
    source: str = field(repr=False)
    proofs: tuple[str, ...]  # test files, from the checkout's root, in the order in which they are tried
    modes: tuple[bool, ...]  # False: the proofs run in plain torch, True: in Triton's interpreter; until one fails
    written: bool = True  # by hand, or by the generator

    @property
    def key(self) -> str:
        """What names it in tables and on the command line."""
        return f"{self.module.removeprefix('lora.fast.')}:{self.function}: {self.mistake}"


def mutate(
    module: str | ModuleType,
    old: str,
    new: str,
    *,
    mistake: str = "",
    operation: str = "",
    proofs: tuple[str, ...] = (),
    interpret: bool | None = None,
) -> Mutant:
    """The module with `old`, which must be there exactly once, replaced by `new`.

        mutant = mutate("lora.fast.linear", "du_i.addmm_(dh, B, beta=0, alpha=part.scaling)",
                        "du_i.addmm_(dh, B, beta=0)")
        print(run(mutant))  # killed by tests/proof/test_linear.py::test_both_backends_are_within_the_bound

    Args:
        module: a module or its name.
        mistake: what is wrong, in words; "old → new" by default.
        operation, proofs: which operation it is part of and which test files prove it; by default what the catalogue
            says of the module.
        interpret: whether to run the proofs in Triton's interpreter; by default modules of kernels are run there, and
            others in plain torch first and then there.

    Raises: LoRAError where `old` is not there, or more than once, or `new` is the same, or nothing proves the module.
    """
    from lora.testing.mutants.catalogue import proofs_of

    name = module if isinstance(module, str) else module.__name__
    source = source_of(name)
    count = source.count(old)
    if count != 1:
        raise LoRAError(
            f"a mutant of {name} replaces text that is there {count} times, expected once: {old!r}. Name a longer or "
            "another piece of the present source."
        )
    if old == new:
        raise LoRAError(f"a mutant of {name} replaces {old!r} by itself: that is no mistake.")
    known = proofs_of(name)
    return Mutant(
        operation=operation or known.operation,
        module=name,
        function=function_at(name, source[: source.index(old)].count("\n") + 1),
        mistake=mistake or f"{shortened(old)} → {shortened(new)}",
        source=source.replace(old, new),
        proofs=proofs or known.proofs,
        modes=known.modes if interpret is None else (interpret,),
    )


def unchanged(module: str) -> Mutant:
    """The module as it is: the proofs must pass on it, or else nothing they reject means anything."""
    from lora.testing.mutants.catalogue import proofs_of

    known = proofs_of(module)
    return Mutant(known.operation, module, "", "nothing", source_of(module), known.proofs, known.modes)


@cache
def snapshot() -> Path:
    """A copy of the checkout's lora/ and tests/, made once a process: mutants are made of it and run in it.

    So the working tree is never written to, and may change while mutants run.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / "tests" / "proof").is_dir():
        raise LoRAError(f"mutants are run against tests/proof, and {root} has none: run them in a checkout.")
    copy = Path(_directory().name)
    for folder in ("lora", "tests"):
        shutil.copytree(root / folder, copy / folder, dirs_exist_ok=True)  # with bytecode: it knows its source's date
    shutil.copy2(root / "pyproject.toml", copy)
    return copy


@cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lora-mutants-")  # removed when the process ends


@cache
def source_of(module: str) -> str:
    """A module's source."""
    path = snapshot().joinpath(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        raise LoRAError(f"there is no module {module!r} in this checkout to make a mutant of.")
    return path.read_text()


def function_at(module: str, line: int) -> str:
    """The function, or the method, that a line of a module is in."""
    from lora.testing.mutants.generate import functions_of

    inside = [f for f in functions_of(source_of(module)) if f.node.lineno <= line <= (f.node.end_lineno or 0)]
    return inside[-1].name if inside else ""


def shortened(text: str, most: int = 60) -> str:
    """A piece of source on one short line."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
