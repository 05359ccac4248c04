"""`python -m lora.testing.mutants`: runs the mutants, says which survive, and writes the table."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import Empty, SimpleQueue

from lora.testing.mutants.catalogue import EVERY, all_mutants
from lora.testing.mutants.mutant import Mutant, unchanged
from lora.testing.mutants.report import markdown
from lora.testing.mutants.runner import SECONDS, Nurseries, Outcome

Results = list[tuple[Mutant, Outcome]]


def main(arguments: Sequence[str] | None = None) -> int:
    """1 if a mutant survives, or a proof fails on the source as it is."""
    options = parser().parse_args(arguments)
    mutants = [m for m in all_mutants(options.operation, options.every) if options.match in m.key]
    if not mutants:
        print("no mutant has that operation and that text in its name.", file=sys.stderr)
        return 1
    controls = {(m.proofs, m.modes): unchanged_like(m) for m in mutants}
    done = run_all(list(controls.values()), options.jobs, options.seconds)
    rejected = [(control, outcome) for control, outcome in done if outcome.status != "survived"]
    for control, outcome in rejected:
        print(f"the proofs {', '.join(control.proofs)} fail on the source as it is: {outcome}")
    if rejected:
        return 1
    results = run_all(mutants, options.jobs, options.seconds)
    survivors = [mutant for mutant, outcome in results if outcome.status == "survived"]
    invalid = [mutant for mutant, outcome in results if outcome.status == "invalid"]
    print(f"{len(results)} mutants: {len(results) - len(survivors) - len(invalid)} killed, {len(survivors)} survived, "
          f"{len(invalid)} not counted because they cannot be imported")  # fmt: skip
    for mutant in survivors:
        print(f"survived: {mutant.key}")
    if options.report:
        options.report.write_text(markdown(results))
    return 1 if survivors else 0


def unchanged_like(mutant: Mutant) -> Mutant:
    """The source as it is, under a mutant's proofs."""
    control = unchanged(mutant.module)
    fields = {**control.__dict__, "proofs": mutant.proofs, "modes": mutant.modes}
    return Mutant(**fields)


def run_all(mutants: list[Mutant], jobs: int, seconds: float) -> Results:
    """Outcomes in the order of the mutants; each job has processes of its own to fork from."""
    waiting: SimpleQueue[tuple[int, Mutant]] = SimpleQueue()
    for numbered in enumerate(mutants):
        waiting.put(numbered)
    outcomes: dict[int, Outcome] = {}

    def work() -> None:
        nurseries = Nurseries()
        try:
            while True:
                number, mutant = waiting.get_nowait()
                outcomes[number] = nurseries.run(mutant, seconds)
                print(f"{mutant.key}: {outcomes[number]}", flush=True)
        except Empty:
            pass
        finally:
            nurseries.close()

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(outcomes) < len(mutants):
        raise SystemExit("not every mutant was run: the error above says why.")
    return [(mutant, outcomes[number]) for number, mutant in enumerate(mutants)]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m lora.testing.mutants", description=__doc__)
    made.add_argument("--operation", help="only mutants of this operation: linear, mlp, norm, ...")
    made.add_argument("--match", default="", help="only mutants with this text in their name")
    made.add_argument("--every", type=int, default=EVERY, help="try one of so many generated mistakes of a function")
    made.add_argument("--jobs", type=int, default=1, help="how many at a time")
    made.add_argument("--seconds", type=float, default=SECONDS, help="that one mutant may take")
    made.add_argument("--report", type=Path, help="where to write the table, docs/mutants.md")
    return made


if __name__ == "__main__":
    sys.exit(main())
