"""Mistakes made by rule: every place of a function's syntax tree where a usual mistake is possible.

A mutant differs from the source in one piece of text, in the same lines, so that a failing proof points at it.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

Edit = tuple[ast.expr | ast.stmt, str]  # what to replace, and by what

SWAPPED: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "%"), ast.Mod: ("%", "//"), ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.BitXor: ("^", "|"),
}  # fmt: skip
COMPARED: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
}  # fmt: skip
DROPPED = {"alpha", "beta", "value", "inverse"}  # keywords whose default is a usual mistake
CHECKS = {"strict", "enable_fp_fusion", "num_warps", "num_stages"}  # keywords whose value no result depends on
COMMUTE = {"isinstance", "getattr", "torch.promote_types", "tl.maximum", "tl.minimum", "max", "min"}  # or cannot work
CASTS = {"to", "float", "double", "detach"}
WIDE_CASTS_OF_OFFSETS = (
    "tl.int64",
    "tl.int32",
    "tl.uint64",
)  # what they matter for is too large for a test: boundaries


class Function(NamedTuple):
    """A function of a module and its name, classes included."""

    name: str
    node: ast.FunctionDef


class Change(NamedTuple):
    """One generated mistake."""

    function: str
    mistake: str  # "old → new", numbered where a function has it more than once
    source: str
    on_kernels: bool  # in a branch that only runs where kernels do

    @property
    def order(self) -> str:
        """A fixed shuffling, in which a sample of the mistakes is taken."""
        return hashlib.sha256(f"{self.function}: {self.mistake}".encode()).hexdigest()


def functions_of(source: str) -> list[Function]:
    """The functions and methods of a module, outer ones before inner ones."""
    found: list[Function] = []

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                found.append(Function(prefix + child.name, child))
                walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                walk(child, f"{prefix}{child.name}.")

    walk(ast.parse(source), "")
    return found


def changes_of(source: str, wanted: Callable[[str], bool]) -> list[Change]:
    """Every mistake that the rules make in the wanted functions, in the order of the source."""
    text = source.encode()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.expr | ast.stmt) -> tuple[int, int]:
        end_line, end_column = node.end_lineno, node.end_col_offset
        assert end_line is not None and end_column is not None
        return starts[node.lineno - 1] + node.col_offset, starts[end_line - 1] + end_column

    def text_of(node: ast.expr | ast.stmt) -> str:
        begin, end = span(node)
        return text[begin:end].decode()

    found: list[Change] = []
    seen: dict[tuple[str, str], int] = {}
    for function in functions_of(source):
        if not wanted(function.name):
            continue
        for (node, new), on_kernels in edits_of(function.node, text_of):
            begin, end = span(node)
            old = text[begin:end].decode()
            if old == new:
                continue
            mistake = described(old, new)
            number = seen[function.name, mistake] = seen.get((function.name, mistake), 0) + 1
            mutated = (text[:begin] + new.encode() + text[end:]).decode()
            found.append(Change(function.name, mistake + (f" ({number})" if number > 1 else ""), mutated, on_kernels))
    return found


def described(old: str, new: str) -> str:
    """Both on one line."""
    return " → ".join(" ".join(piece.split()) for piece in (old, new or "(nothing)"))


TextOf = Callable[[ast.expr | ast.stmt], str]


def edits_of(function: ast.FunctionDef, text_of: TextOf) -> Iterator[tuple[Edit, bool]]:
    """All edits in a function's own body, and whether each is in a branch that only kernels take.

    Not in functions inside, docstrings, annotations, errors, or what only a compiled graph runs.
    """
    stack: list[tuple[ast.AST, bool]] = [(node, False) for node in reversed(function.body)]
    while stack:
        node, on_kernels = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Raise, ast.Import, ast.ImportFrom, ast.Assert)):
            continue
        if isinstance(node, ast.Expr) and (isinstance(node.value, ast.Constant) or is_check(node.value)):
            continue  # a docstring, or a call that only raises errors
        if isinstance(node, ast.If) and "is_compiling()" in text_of(node.test):
            stack.extend((child, on_kernels) for child in reversed(node.orelse))
            continue
        if isinstance(node, ast.If) and text_of(node.test).startswith("runs_triton("):
            stack.extend((child, on_kernels) for child in reversed(node.orelse))
            stack.extend((child, True) for child in reversed(node.body))
            continue
        found: Iterator[Edit] = iter(())
        if isinstance(node, ast.stmt):
            found = statement_edits(node, text_of)
        elif isinstance(node, ast.expr):
            found = expression_edits(node, text_of)
        for edit in found:
            yield edit, on_kernels
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.AnnAssign):
            children.remove(node.annotation)
        if isinstance(node, ast.Call):
            children = [child for child in children if not (isinstance(child, ast.keyword) and child.arg in CHECKS)]
        stack.extend((child, on_kernels) for child in reversed(children))


def statement_edits(node: ast.stmt, text_of: TextOf) -> Iterator[Edit]:
    """Updates in place that are forgotten, loops that stop early, gradients of zero."""
    if isinstance(node, ast.AugAssign):
        yield node, "pass"
        yield node, f"{text_of(node.target)} = {text_of(node.value)}"
    elif (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)) or (
        isinstance(node, ast.Assign) and any(isinstance(target, ast.Subscript) for target in node.targets)
    ):
        yield node, "pass"
    elif isinstance(node, ast.For) and is_range(node.iter):
        yield node.iter, one_less(node.iter, text_of)
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
        yield node.value, f"({text_of(node.value)}) * 0"


def expression_edits(node: ast.expr, text_of: TextOf) -> Iterator[Edit]:
    """Wrong operators, lost terms, neighbours of constants, exchanged arguments, lost casts and keywords."""
    if isinstance(node, ast.BinOp):
        yield from binary_edits(node, text_of)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield node, f"({text_of(node.operand)})"
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        new = COMPARED.get(type(node.ops[0]))
        if new is not None:
            yield node, f"({text_of(node.left)} {new[1]} {text_of(node.comparators[0])})"
    elif isinstance(node, ast.BoolOp):
        word = "or" if isinstance(node.op, ast.And) else "and"
        yield node, "(" + f" {word} ".join(f"({text_of(value)})" for value in node.values) + ")"
    elif isinstance(node, ast.IfExp):
        yield node, f"({text_of(node.body)})"
        yield node, f"({text_of(node.orelse)})"
    elif isinstance(node, ast.Constant):
        yield from constant_edits(node)
    elif isinstance(node, ast.Call):
        yield from call_edits(node, text_of)


def binary_edits(node: ast.BinOp, text_of: TextOf) -> Iterator[Edit]:
    """Another operator; for a sum also one term only, for a difference the other sign of it."""
    swap = SWAPPED.get(type(node.op))
    left, right = text_of(node.left), text_of(node.right)
    if swap is not None:
        yield node, f"(({left}) {swap[1]} ({right}))"
    if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
        yield node, f"({left})"
    if isinstance(node.op, (ast.Add, ast.Mult)):
        yield node, f"({right})"


def constant_edits(node: ast.Constant) -> Iterator[Edit]:
    """The neighbour of a number, the opposite of a truth value."""
    value = node.value
    if isinstance(value, bool):
        yield node, str(not value)
    elif isinstance(value, int):
        yield node, str(value + 1)
    elif isinstance(value, float):
        yield node, repr(value * 1.01 if value else 0.01)


def call_edits(node: ast.Call, text_of: TextOf) -> Iterator[Edit]:
    """A keyword, a cast or a factor that is forgotten; two arguments of one kind exchanged."""
    callee, arguments = text_of(node.func), [text_of(argument) for argument in node.args]
    keywords = [(k.arg, text_of(k.value)) for k in node.keywords]
    for dropped, _ in keywords:
        if dropped in DROPPED:
            yield node, called(callee, arguments, [k for k in keywords if k[0] != dropped])
    kept = any(argument in WIDE_CASTS_OF_OFFSETS or "device" in argument for argument in arguments)
    if isinstance(node.func, ast.Attribute) and node.func.attr in CASTS and not kept:
        yield node, f"({text_of(node.func.value)})"
    for i, (first, second) in enumerate(zip(node.args, node.args[1:], strict=False)):
        if callee not in COMMUTE and exchangeable(first, second):
            swapped = [*arguments[:i], arguments[i + 1], arguments[i], *arguments[i + 2 :]]
            yield node, called(callee, swapped, keywords)
    if isinstance(node.func, ast.Name) and node.func.id in ("any", "all"):
        yield node, called("all" if node.func.id == "any" else "any", arguments, keywords)
    if callee in ("tl.maximum", "tl.minimum"):
        yield node, called("tl.minimum" if callee == "tl.maximum" else "tl.maximum", arguments, keywords)
    if callee == "tl.arange" and len(arguments) == 2:
        yield node, f"({text_of(node)} + 1)"


def called(callee: str, arguments: list[str], keywords: list[tuple[str | None, str]]) -> str:
    """The text of a call."""
    named = [f"**{value}" if name is None else f"{name}={value}" for name, value in keywords]
    return f"{callee}({', '.join([*arguments, *named])})"


def exchangeable(first: ast.expr, second: ast.expr) -> bool:
    """Whether two arguments look alike: two names, or two things made in the same way."""
    plain = (ast.Name, ast.Attribute, ast.Subscript)
    return isinstance(first, plain) and isinstance(second, plain) and ast.dump(first) != ast.dump(second)


def is_check(node: ast.expr) -> bool:
    """A call that only raises errors: they have tests of their own."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith("check_")


def is_range(node: ast.expr) -> bool:
    """range(…) or tl.range(…)."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    return name in ("range", "static_range") and bool(node.args)


def one_less(node: ast.expr, text_of: TextOf) -> str:
    """A range that ends before its last step."""
    assert isinstance(node, ast.Call)
    arguments = [text_of(argument) for argument in node.args]
    last = min(1, len(arguments) - 1)
    step = arguments[2] if len(arguments) > 2 else "1"
    arguments[last] = f"({arguments[last]}) - ({step})"
    return called(text_of(node.func), arguments, [(k.arg, text_of(k.value)) for k in node.keywords])
