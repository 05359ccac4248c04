"""The harness is honest: it kills what is wrong, spares what is right, and says how."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import lora
from lora.errors import LoRAError
from lora.testing.mutants import Mutant, mutate, run, unchanged
from lora.testing.mutants.generate import changes_of

ROPE = "lora.fast.rope"
SIGN, WRONG_SIGN = "sin_a if inverse else -sin_a", "-sin_a if inverse else sin_a"
TURN = "    first, second = halves(turned, interleaved)\n"


def plain_rope(old: str, new: str) -> Mutant:
    return mutate(ROPE, old, new, interpret=False)


def test_the_source_as_it_is_survives() -> None:
    assert run(replace(unchanged(ROPE), modes=(False,))).status == "survived"
    assert run(replace(unchanged("lora.fast.kernels.rope"), proofs=("tests/proof/test_rope.py",))).status == "survived"


def test_a_mutant_that_changes_nothing_is_a_survivor() -> None:
    outcome = run(plain_rope(SIGN, "-sin_a if not inverse else sin_a"))
    assert outcome.status == "survived" and not outcome.killed and not outcome.by


def test_a_wrong_result_is_killed_by_an_assertion_that_names_the_proof() -> None:
    outcome = run(plain_rope(SIGN, WRONG_SIGN))
    assert outcome.killed and outcome.how == "assertion"
    assert outcome.by == "tests/proof/test_rope.py::test_both_backends_are_within_the_bound"
    assert "times its bound" in outcome.message


def test_a_mutant_of_a_kernel_is_killed_in_the_interpreter() -> None:
    sign = "rounded(b_a * b_cos_a, COMPUTE) - rounded(b_b * b_sin_a, COMPUTE)"
    mutant = mutate("lora.fast.kernels.rope", sign, sign.replace(" - ", " + "))
    assert mutant.modes == (True,) and mutant.function == "rotate_heads"
    assert run(mutant).how == "assertion"


@pytest.mark.parametrize(
    ("mistake", "how", "message"),
    [
        ("    raise ValueError('no')\n", "error", "ValueError: no"),
        ("    import os\n    os.kill(os.getpid(), 11)\n", "crash", "SIGSEGV"),
        ("    import os\n    os._exit(0)\n", "crash", "status 0"),
    ],
)
def test_an_exception_and_a_crash_are_told_apart(mistake: str, how: str, message: str) -> None:
    outcome = run(plain_rope(TURN, mistake + TURN))
    assert (outcome.status, outcome.how) == ("killed", how)
    assert outcome.message == message


def test_a_mutant_that_hangs_is_killed_by_the_time_limit_and_says_so() -> None:
    outcome = run(plain_rope(TURN, "    while True:\n        pass\n" + TURN), seconds=3)
    assert (outcome.status, outcome.how, outcome.message) == ("killed", "time limit", "3 s")


def test_a_mutant_that_cannot_be_imported_does_not_count() -> None:
    for broken in ("def turn(x:", "import nothing_of_this_name\n\n\ndef turn("):
        outcome = run(plain_rope("def turn(", broken))
        assert outcome.status == "invalid" and not outcome.killed


def test_text_that_is_not_there_once_is_an_error() -> None:
    with pytest.raises(LoRAError, match="there 0 times"):
        mutate(ROPE, "no such text", "")
    with pytest.raises(LoRAError, match="there 2 times"):
        mutate(ROPE, "interleaved, inverse=", "")
    with pytest.raises(LoRAError, match="by itself"):
        mutate(ROPE, SIGN, SIGN)
    with pytest.raises(LoRAError, match=r"no module .lora\.fast\.rpoe"):
        mutate("lora.fast.rpoe", "a", "b")


def test_proofs_that_are_not_there_are_an_error() -> None:
    with pytest.raises(LoRAError, match="no such file"):
        run(mutate(ROPE, SIGN, WRONG_SIGN, proofs=("tests/proof/test_rpoe.py",)))
    with pytest.raises(LoRAError, match="do not run"):
        run(mutate(ROPE, SIGN, WRONG_SIGN, proofs=("tests/proof/test_rope.py::test_no_such",)))
    with pytest.raises(LoRAError, match=r"nothing is known to prove .lora\.fast\.library"):
        mutate("lora.fast.library", "import math\n", "")


def test_the_working_tree_is_not_written_to() -> None:
    source = Path(lora.__file__).parent / "fast" / "rope.py"
    before = (source.read_bytes(), sorted(source.parents[2].glob("*")))
    run(plain_rope("-sin_b if inverse else sin_b", "sin_b"))
    assert (source.read_bytes(), sorted(source.parents[2].glob("*"))) == before


SMALL = '''
def sum_of(x, n, scale=1.0):
    """Docstrings, annotations and errors are left alone: 1 + 2."""
    total: int = -x
    if n < 3 and scale:
        raise ValueError(f"{n + 1}")
    for i in range(0, n, 2):
        total += mul(x, n, alpha=scale)
    return total
'''


def test_the_generator_makes_the_usual_mistakes() -> None:
    made = {change.mistake for change in changes_of(SMALL, lambda name: True)}
    assert made == {
        "-x → (x)", "n < 3 and scale → ((n < 3) or (scale))", "n < 3 → (n <= 3)", "3 → 4",
        "range(0, n, 2) → range(0, (n) - (2), 2)", "0 → 1", "2 → 3",
        "total += mul(x, n, alpha=scale) → pass", "total += mul(x, n, alpha=scale) → total = mul(x, n, alpha=scale)",
        "mul(x, n, alpha=scale) → mul(x, n)", "mul(x, n, alpha=scale) → mul(n, x, alpha=scale)",
    }  # fmt: skip


def test_generated_sources_differ_in_one_place_and_keep_their_lines() -> None:
    for change in changes_of(SMALL, lambda name: True):
        compile(change.source, "mutant", "exec")
        lines = zip(SMALL.splitlines(), change.source.splitlines(), strict=True)
        assert sum(old != new for old, new in lines) == 1, change
