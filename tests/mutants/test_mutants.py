"""The proofs notice mistakes: the mutants that `make test` has time for. `make mutants` runs them all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lora.testing.mutants import Outcome, run
from lora.testing.mutants.catalogue import all_mutants, proofs_of, quick_names, sampled, written, written_mutants
from lora.testing.mutants.equivalent import EQUIVALENT
from lora.testing.mutants.report import code, row

QUICK = quick_names()
OPERATIONS = {
    "attention", "checkpoint", "dora", "dropout", "embedding", "gemm", "linear", "loss", "merge", "mlp", "multi_lora",
    "nf4", "norm", "qkv", "rope", "source",
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


KINDS = {  # mistakes that are known from elsewhere, each by the text of one that is written here
    "a dropped tail": ("kernels.cross_entropy", "the last block of the vocabulary is dropped from the sum"),
    "A and B swapped": ("operands", "A and B exchanged where a layer is square"),
    "no scaling": ("linear", "scaling is missing in the forward"),
    "a stale buffer": ("nf4", "a stale workspace: weights of a group in one place"),
    "a wrong mask": ("kernels.activation", "the tail of a row is not masked"),
    "dropout shifted": ("kernels.dropout", "the mask shifted by one"),
    "no dy B term": ("linear", "dx without the update's part, dy B A"),
    "rotary embedding's sign": ("kernels.rope", "the sign of the first turned over"),
    "the order of nibbles": ("kernels.nf4", "nibbles in the wrong order, by words"),
    "the absmax of another block": ("kernels.nf4", "the absmax of the block after"),
    "offsets of 32 bits": ("kernels.cross_entropy", "a row's number in 32 bits"),
    "the type of a sum": ("embedding", "dA is summed in the gradient's own type"),
}


def test_every_kind_of_mistake_is_among_them() -> None:
    there = {(mutant.module, mutant.mistake) for mutant in written_mutants()}
    assert {("lora.fast." + module, mistake) for module, mistake in KINDS.values()} <= there


def test_every_mutant_has_a_name_of_its_own() -> None:
    names = Counter(mutant.key for mutant in all_mutants())
    assert [name for name, count in names.items() if count > 1] == []


def test_the_page_is_of_these_mutants_and_none_survived() -> None:
    """What `make test` has no time to run was run: `make mutants` has written a line for each, and each was killed."""
    page = (Path(__file__).parents[2] / "docs" / "mutants.md").read_text()
    assert "**0 survived**" in page
    lines = {line.rsplit(" | ", 3)[0] for line in page.splitlines() if line.startswith("| ")}
    killed = [row(mutant, Outcome("killed")).rsplit(" | ", 3)[0] for mutant in all_mutants()]
    assert [line for line in killed if line not in lines] == [], "run `make mutants`"
    argued = page.split("## Equivalent")[1]
    assert [key for key in EQUIVALENT if code(key) not in argued] == [], "run `make mutants`"


def test_what_is_argued_equivalent_is_a_mutant_of_the_present_source() -> None:
    """An argument about text that is gone is no argument."""
    assert sorted(EQUIVALENT.keys() - {mutant.key for mutant in sampled()}) == []
    assert all(len(reason) > 30 for reason in EQUIVALENT.values())
