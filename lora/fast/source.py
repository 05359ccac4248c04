"""What an operation keeps of its input: the input, or what it can be made from again without a product.

A norm's result y is read by the projections after it, and autograd would keep it for them. But the norm keeps its own
input s and a number for each row, and y is one pass over s: so it notes how y is made (`made_from`), and an operation
that would keep y keeps s instead, which is kept anyway, and makes y again in its backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Source(NamedTuple):
    """rows = make(*tensors), [tokens, features]."""

    make: Callable[..., Tensor | None]
    tensors: tuple[Tensor | None, ...]
    version: int = 0  # of the result, when it was made: afterwards it may have been changed in place


# Beside the tensors, not on them: what is written on a tensor goes into its pickles. A note goes with its tensor.
_sources = WeakTensorKeyDictionary()


def made_from(y: Tensor, make: Callable[..., Tensor], *tensors: Tensor | None) -> None:
    """Notes that the rows of y are make(*tensors), bit for bit; the tensors are kept by autograd in any case."""
    if not torch.compiler.is_compiling():  # a graph plans for itself what it keeps
        _sources[y] = Source(make, tensors, y._version)


def source_of(x: Tensor, rows: Tensor) -> Source:
    """What to keep of x, whose rows are `rows`."""
    source: Source | None = None if torch.compiler.is_compiling() else _sources.get(x)
    return Source(itself, (rows,)) if source is None or source.version != x._version else source


NOTHING = Source(lambda: None, ())


def itself(rows: Tensor) -> Tensor:
    """Rows that are kept as they are."""
    return rows
