"""The proofs notice mistakes: the mutants that `make test` has time for. `make mutants` runs them all."""

from __future__ import annotations

from collections import Counter

import pytest

from lora.testing.mutants import run
from lora.testing.mutants.catalogue import all_mutants, proofs_of, quick_names, sampled, written, written_mutants
from lora.testing.mutants.equivalent import EQUIVALENT

QUICK = quick_names()
OPERATIONS = {
    "checkpoint", "dora", "dropout", "embedding", "gemm", "linear", "loss", "merge", "mlp", "multi_lora", "nf4", "norm",
    "qkv", "rope",
}  # fmt: skip


@pytest.mark.parametrize(("module", "mistake"), QUICK)
def test_the_proofs_notice(module: str, mistake: str) -> None:
    outcome = run(written(module, mistake))
    assert outcome.killed and outcome.how != "time limit", str(outcome)


def test_compiled_kernels_are_checked_for_offsets_of_32_bits() -> None:
    (mutant, *_) = (mutant for mutant in written_mutants() if "test_offsets" in mutant.proofs[0])
    assert run(mutant).how == "assertion"


def test_every_operation_has_mutants() -> None:
    assert {proofs_of(module).operation for module, _ in QUICK} == OPERATIONS
    counts = Counter(mutant.operation for mutant in all_mutants())
    assert counts.keys() == OPERATIONS and sum(counts.values()) >= 150


def test_every_mutant_has_a_name_of_its_own() -> None:
    names = Counter(mutant.key for mutant in all_mutants())
    assert [name for name, count in names.items() if count > 1] == []


def test_what_is_argued_equivalent_is_a_mutant_of_the_present_source() -> None:
    """An argument about text that is gone is no argument."""
    assert sorted(EQUIVALENT.keys() - {mutant.key for mutant in sampled()}) == []
    assert all(len(reason) > 30 for reason in EQUIVALENT.values())
