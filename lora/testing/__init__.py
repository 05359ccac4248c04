"""What tests, exercises and benchmarks share: inputs, the error bound, and how an error is reported.

The truth is the same formula in float64 on the same rounded inputs. An implementation in a narrower type passes when
every element of every output and gradient is within a bound derived from its own arithmetic, never tuned.

    bounded.py      numbers that know how wrong they may be: the rules every bound is made of
    bounds.py       each operation's formula in those numbers
    proof.py        `assert_equivalent(case)`: both backends against float64, output by output, gradient by gradient
    cases.py        inputs that print themselves and build themselves from a seed
    strategies.py   Hypothesis draws the inputs (the only file that needs Hypothesis)
    report.py       where, by how much, in units of the bound; and how much of the bound right results use

`docs/numerics.md` derives the bounds, `docs/proof.md` says what they have proven, and how to add an operation.
"""

from lora.testing.bounded import SPREAD, Bounded, exact, unit_roundoff
from lora.testing.cases import Layer, LinearCase, LinearInput, MLPInput, QKVInput, in_float64, linear_bounds
from lora.testing.proof import Case, Maker, assert_equivalent, build, results
from lora.testing.report import LEDGER, Ledger, Row, assert_within

__all__ = [
    "LEDGER",
    "SPREAD",
    "Bounded",
    "Case",
    "Layer",
    "Ledger",
    "LinearCase",
    "LinearInput",
    "MLPInput",
    "Maker",
    "QKVInput",
    "Row",
    "assert_equivalent",
    "assert_within",
    "build",
    "exact",
    "in_float64",
    "linear_bounds",
    "results",
    "unit_roundoff",
]
