"""The house's docstrings as Markdown: equations are code, and the sections that end a docstring are lists.

Args:                          **Args**
    x: [..., in_features].       - `x`: [..., in_features].
Returns: the same model.       **Returns**: the same model.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

LISTS = ("Args", "Fields")
SENTENCES = ("Returns", "Raises", "Yields", "FLOPs", "Bytes")
ITEM = re.compile(r"(?P<names>[\w*]+(?:, [\w*]+)*): (?P<text>.*)")


class HouseDocstrings(griffe.Extension):
    """Rewrites every docstring before it is shown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object whose source was read."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """A docstring as Markdown."""
    out: list[str] = []
    lines = docstring.splitlines()
    while lines:
        line = lines.pop(0)
        title = line.rstrip(":")
        if line.endswith(":") and title in LISTS:
            out += ["", f"**{title}**", "", *items(indented(lines)), ""]
        elif line.startswith(" ") and line.strip():
            block = [line, *indented(lines)]
            code = out == [] or out[-1] == ""  # else the line goes on with a sentence
            out += ["```text", *textwrap.dedent("\n".join(block)).rstrip().splitlines(), "```", ""] if code else block
        elif (word := line.split(":")[0]) in SENTENCES and ":" in line:
            out += ["", f"**{word}**:{escaped(line[len(word) + 1 :])}"]
        else:
            out.append(escaped(line))
    return "\n".join(out)


def indented(lines: list[str]) -> list[str]:
    """Takes the lines off that go on with an indented block, blank lines inside it too."""
    block = []
    while lines and (lines[0].startswith(" ") or (not lines[0] and len(lines) > 1 and lines[1].startswith(" "))):
        block.append(lines.pop(0))
    return block


def items(block: list[str]) -> list[str]:
    """The entries of an Args section as a list; a line that is further in belongs to the one before."""
    out: list[str] = []
    for line in textwrap.dedent("\n".join(block)).splitlines():
        found = ITEM.fullmatch(line)
        if found:
            names = ", ".join(f"`{name}`" for name in found["names"].split(", "))
            out.append(f"- {names}: {escaped(found['text'])}")
        elif line.startswith(" ") or not out:
            out.append(f"    {escaped(line.strip())}")
        else:
            out.append(f"- {escaped(line)}")
    return out


def escaped(text: str) -> str:
    """Brackets, asterisks and angle brackets are themselves outside code: shapes and products, no Markdown."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([\[\]*<_$|])", r"\\\1", p) for p in parts)
