"""The process that mutants are forked from: `python -m lora.testing.mutants.nursery`, one request a line."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import json
import linecache
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import hypothesis.strategies  # slow, as torch and pytest are: imported once, here
import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir

MEMORY = 16 << 30  # bytes of address space a child may have; torch alone maps four
POLL = 0.005  # seconds
SLOW = {"tests/proof/test_checkpoint.py": "transformers.models.llama.modeling_llama"}  # what a proof's imports wait for


def main() -> None:
    """Answers requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints is no answer
    with tempfile.TemporaryDirectory(prefix="lora-mutants-") as home:
        prepare(home)
        for line in sys.stdin:
            answers.write(json.dumps(in_child(**json.loads(line))) + "\n")
            answers.flush()


def prepare(home: str) -> None:
    """Imports what is slow, and makes Hypothesis repeat itself and keep nothing but in `home`."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # imports much the first time
    torch.use_deterministic_algorithms(False)
    if importlib.util.find_spec("triton"):
        importlib.import_module("triton.language")
    set_hypothesis_home_dir(home)
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile(
        "mutants", derandomize=True, database=None, deadline=None, phases=phases, report_multiple_bugs=False,
        max_examples=25,
    )  # fmt: skip


def in_child(module: str, source: str, proofs: Sequence[str], seconds: float) -> dict[str, Any]:
    """One mutant's outcome."""
    for name in SLOW.keys() & set(proofs):
        importlib.import_module(SLOW[name])
    began = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            os.setsid()
            answer = outcome_of(module, source, proofs)
            os.write(writer, json.dumps(answer).encode())
        finally:
            os._exit(0)  # none of this process's own endings
    os.close(writer)
    status = wait(child, began + seconds)
    with os.fdopen(reader) as answers:
        text = answers.read()
    spent = round(time.monotonic() - began, 2)
    if status is None:
        return {"status": "killed", "how": "time limit", "message": f"{seconds:g} s", "seconds": spent}
    if text:
        return {**json.loads(text), "seconds": spent}
    name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status}"
    return {"status": "killed", "how": "crash", "message": name, "seconds": spent}


def wait(child: int, until: float) -> int | None:
    """A child's exit status; None if it had to be ended."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(POLL)


def outcome_of(module: str, source: str, proofs: Sequence[str]) -> dict[str, Any]:
    """Imports everything with the mutated module and runs the proofs; in the child."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    kept = forget()
    sys.meta_path.insert(0, MutantFinder(module, source))
    try:
        importlib.import_module(module)
    except BaseException as error:  # a mistake at import may be of any kind
        return {"status": "invalid", "message": one_line(error)}
    witness = Witness()
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    code = pytest.main([*options, *proofs], plugins=[witness])
    del kept
    if witness.first is not None:
        return witness.first
    if code == pytest.ExitCode.OK and witness.passed:
        return {"status": "survived"}
    return {"status": "broken", "message": f"pytest ended with {code!r} after {witness.passed} tests"}


def forget() -> list[ModuleType]:
    """Takes every module of `lora` and of the tests out of `sys.modules`; they are kept alive, but not found."""
    names = [name for name in sys.modules if name == "lora" or name.startswith("lora.")]
    return [sys.modules.pop(name) for name in names]


class MutantFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from the mutant's source; Triton's interpreter finds that source too, to rewrite it."""

    def __init__(self, module: str, source: str) -> None:
        self.module, self.source, self.filename = module, source, f"<mutant of {module}>"

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self.module:
            return None
        return importlib.util.spec_from_loader(name, self, origin=self.filename)

    def exec_module(self, module: ModuleType) -> None:
        lines = self.source.splitlines(keepends=True)
        linecache.cache[self.filename] = (len(self.source), None, lines, self.filename)
        module.__file__ = self.filename
        exec(compile(self.source, self.filename, "exec", dont_inherit=True), module.__dict__)


class Witness:
    """A pytest plugin that remembers the first failure, and how many tests passed."""

    def __init__(self) -> None:
        self.first: dict[str, Any] | None = None
        self.passed = 0

    def pytest_exception_interact(self, node: Any, call: Any, report: Any) -> None:
        if self.first is not None:
            return
        error = call.excinfo.value
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions):
            error = error.exceptions[0]
        if report.when == "collect":  # a proof that cannot be imported says nothing
            self.first = {"status": "invalid", "by": node.nodeid, "message": one_line(error)}
            return
        how = "assertion" if isinstance(error, AssertionError) else "error"
        self.first = {"status": "killed", "how": how, "by": node.nodeid, "message": one_line(error)}

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.when == "call" and report.passed


def one_line(error: BaseException) -> str:
    """An exception on one line; an assertion without its name."""
    lines = str(error).strip().splitlines()
    text = (lines[0] if lines else "")[:200]
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd() / "tests"))
    main()
