"""The errors a user of `lora` can cause, each naming what, found, expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoRAError(ValueError):
    """Bad input: a field, a name, a file or a model that cannot be used as asked.

    The message is one readable sentence or two; the command line prints it without a traceback.
    """


class UnsupportedError(LoRAError):
    """The chosen backend cannot do what was asked; the message lists every reason."""


def did_you_mean(name: str, options: Iterable[str], most: int = 3) -> str:
    """`" Did you mean 'q_proj'?"`, or an empty string when nothing in `options` is near `name`."""
    near = difflib.get_close_matches(name, list(options), n=most, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
