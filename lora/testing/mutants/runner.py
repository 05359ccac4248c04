"""Runs mutants: each in a process of its own, forked from one that has imported everything slow already.

A nursery is a Python process that has imported torch, Triton, Hypothesis and pytest. For each mutant it forks a child,
which imports `lora` afresh with the mutated module in its place, as a program would import it from a file, and runs the
proofs up to the first one that fails. Two kinds are needed, because Triton reads TRITON_INTERPRET once.

Everything happens in a copy of the checkout. A child has a limit on its time and its memory. Hypothesis keeps no
database there, does not shrink what it finds, and draws the same examples every time.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace

from lora.errors import LoRAError
from lora.testing.mutants.mutant import Mutant, snapshot

SECONDS = 90.0  # that a mutant may take


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    status: str  # "killed", "survived", or "invalid": the mutated module cannot be imported, and does not count
    how: str = ""  # killed by an "assertion" of a proof, an "error" or a "crash" while it ran, or its "time limit"
    by: str = ""  # the proof that failed
    message: str = ""  # the first line of what it said
    seconds: float = 0.0

    @property
    def killed(self) -> bool:
        """Whether a proof noticed the mistake."""
        return self.status == "killed"

    def __str__(self) -> str:
        by = f" by {self.by}" if self.by else ""
        how = f" ({self.how})" if self.how else ""
        return f"{self.status}{by}{how} in {self.seconds:.1f} s" + (f": {self.message}" if self.message else "")


def run(mutant: Mutant, seconds: float = SECONDS) -> Outcome:
    """Runs a mutant's proofs until one of them fails.

    Args:
        seconds: a limit; a mutant that reaches it is killed by it, and says so.

    Raises: LoRAError where this is no checkout with tests, or the proofs do not run at all.
    """
    return _here.run(mutant, seconds)


class Nurseries:
    """One of each kind, started when it is first needed."""

    def __init__(self) -> None:
        self.started: dict[bool, Nursery] = {}

    def run(self, mutant: Mutant, seconds: float = SECONDS) -> Outcome:
        """`run`, here."""
        outcome = Outcome("survived")
        for interpret in mutant.modes:
            if interpret not in self.started:
                self.started[interpret] = Nursery(interpret)
            before, outcome = outcome, self.started[interpret].run(mutant, seconds)
            outcome = replace(outcome, seconds=round(outcome.seconds + before.seconds, 2))
            if outcome.status != "survived":
                break
        return outcome

    def close(self) -> None:
        """Ends them."""
        for nursery in self.started.values():
            nursery.close()
        self.started.clear()


_here = Nurseries()
atexit.register(_here.close)


class Nursery:
    """The process that mutants are forked from."""

    def __init__(self, interpret: bool) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment |= {"OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "mutants"}
        environment |= {
            "TRITON_CACHE_DIR": str(snapshot() / "triton"),
            "CUDA_VISIBLE_DEVICES": "",
        }  # none, if there is one
        environment |= {"TRITON_INTERPRET": "1" if interpret else "0", "PYTHONPATH": str(snapshot())}
        command = [sys.executable, "-m", "lora.testing.mutants.nursery"]
        self.process = subprocess.Popen(
            command, cwd=snapshot(), env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, mutant: Mutant, seconds: float = SECONDS) -> Outcome:
        """What the proofs say of a mutant in this mode."""
        missing = [proof for proof in mutant.proofs if not (snapshot() / proof.split("::")[0]).exists()]
        if missing:
            raise LoRAError(f"the proofs of {mutant.module} are {missing}, and there is no such file.")
        request = {"module": mutant.module, "source": mutant.source, "proofs": mutant.proofs, "seconds": seconds}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise LoRAError("the process that mutants are forked from has ended: what it printed says why.")
        outcome = Outcome(**json.loads(answer))
        if outcome.status == "broken":
            raise LoRAError(f"the proofs of {mutant.module} do not run: {outcome.message}")
        return outcome

    def close(self) -> None:
        """Ends the process."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
        self.process.wait()
