"""Mutants: does a proof notice a wrong kernel? Each is real source with one mistake in it, and must be rejected.

    from lora.testing.mutants import mutate, run

    mutant = mutate("lora.fast.rope", "value=-sign", "value=sign")  # text that is there exactly once
    print(run(mutant))  # killed by tests/proof/test_rope.py::test_both_backends_are_within_the_bound (assertion) ...

    mutant.py            `Mutant`, and `mutate`, which makes one by hand
    generate.py          mistakes made by rule, from the syntax tree
    written.py, written_kernels.py    mistakes that are really made, each in words
    catalogue.py         which proofs stand for which module, and what is tried
    equivalent.py        what no input can tell from the source, and why
    runner.py, nursery.py    a process for each mutant, forked from one that has imported what is slow
    report.py            docs/mutants.md

`python -m lora.testing.mutants` runs them all; it needs a checkout, with tests/, and the development dependencies.
"""

from lora.testing.mutants.mutant import Mutant, mutate, unchanged
from lora.testing.mutants.runner import Outcome, run

__all__ = ["Mutant", "Outcome", "mutate", "run", "unchanged"]
