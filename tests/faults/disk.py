"""A disk that can stop at any operation: what code does to a directory is recorded, and cut off wherever a test likes.

`recording(root)` stands between Python and the system's file calls, and writes down every one that changes something
under `root`: mkdir, create, write, fsync, rename, link, unlink, rmdir. From that trace `states` builds what could be
found afterwards had the process been killed, or the machine lost power, at each of them:

- killed: every operation before took effect; the one in progress, if it is a write, maybe in part;
- power lost: names that were not flushed with their directory may be gone or back, in the order they changed; contents
  that were not flushed with their file may be gone, cut short, or zeros of the right length.

Two checks keep the model honest: a whole trace must give exactly what is on the real disk (`same_as_disk`: else
something went past the recorder), and tests/test_crash.py compares the killed states with processes that really end.
"""

from __future__ import annotations

import builtins
import io
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

Change = Callable[["Tree"], None]
OPEN = builtins.open
CALLS = ("open", "write", "fsync", "close", "rename", "replace", "link", "unlink", "rmdir", "mkdir")
REAL = {name: getattr(os, name) for name in CALLS}


# ---- what is on the disk ---------------------------------------------------------------------------------------


@dataclass
class File:
    """Contents as the system shows them, and as they were when last flushed."""

    data: bytearray
    flushed: bytes | None = None

    def remains(self, loss: str, rng: random.Random) -> bytes:
        """What a power loss leaves of the contents."""
        flushed = self.flushed or b""
        if flushed == self.data:
            return flushed
        safe = flushed if self.data.startswith(flushed) else b""  # what is appended to stays
        rest = bytes(self.data[len(safe) :])
        kept = {
            "all": safe + rest,
            "none": flushed,
            "half": safe + rest[: len(rest) // 2],
            "zeros": safe + b"\0" * len(rest),
        }
        return kept[rng.choice(sorted(kept)) if loss == "any" else loss]


@dataclass
class Directory:
    """Names as the system shows them, and each state they went through since they were last flushed."""

    entries: dict[str, File | Directory] = field(default_factory=dict)
    since: list[dict[str, File | Directory]] = field(default_factory=lambda: [{}])  # the first one is flushed

    def flush(self) -> None:
        self.since = [dict(self.entries)]

    def changed(self) -> None:
        self.since.append(dict(self.entries))

    def remains(self, names: str, rng: random.Random) -> dict[str, File | Directory]:
        """Which names a power loss leaves."""
        return {"all": self.entries, "none": self.since[0]}[names] if names != "any" else rng.choice(self.since)


class Tree:
    """A directory tree in memory."""

    def __init__(self, root: Directory) -> None:
        self.root = root

    def find(self, path: str) -> File | Directory:
        node: Any = self.root
        for part in Path(path).parts:
            node = node.entries[part]
        return node

    def parent(self, path: str) -> Directory:
        node = self.find(str(Path(path).parent))
        assert isinstance(node, Directory)
        return node


def _flushed(data: bytes) -> File:
    return File(bytearray(data), data)


def materialise(found: Directory, path: Path, names: str, contents: str, rng: random.Random) -> None:
    """Writes what survives to the real disk."""
    path.mkdir()
    for name, node in found.remains(names, rng).items():
        if isinstance(node, Directory):
            materialise(node, path / name, names, contents, rng)
        else:
            (path / name).write_bytes(node.remains(contents, rng))


def contents(path: Path) -> dict[str, bytes | None]:
    """Every name under a directory; None for a directory."""
    return {str(p.relative_to(path)): None if p.is_dir() else p.read_bytes() for p in sorted(path.rglob("*"))}


# ---- what was done to it ---------------------------------------------------------------------------------------


class Operation(NamedTuple):
    """One call that changed something."""

    kind: str
    text: str  # for messages
    change: Change
    part: Change | None = None  # of a write that is cut off


@dataclass
class Trace:
    """What was done under a directory since it was as `start` says."""

    root: Path
    start: Callable[[], Directory]
    operations: list[Operation] = field(default_factory=list)

    def tree(self, count: int, cut: bool = False) -> Directory:
        """After the first `count` operations, and with `cut` the first half of the next one."""
        tree = Tree(self.start())
        for operation in self.operations[:count]:
            operation.change(tree)
        if cut and (part := self.operations[count].part) is not None:
            part(tree)
        return tree.root

    def same_as_disk(self, scratch: Path) -> bool:
        """Whether the trace is complete: nothing went past the recorder."""
        materialise(self.tree(len(self.operations)), scratch, "all", "all", random.Random(0))
        return contents(scratch) == contents(self.root)


class State(NamedTuple):
    """What is found after a crash at an operation."""

    operation: int
    how: str
    found: Directory
    names: str
    contents: str
    seed: int = 0

    def write(self, path: Path) -> Path:
        materialise(self.found, path, self.names, self.contents, random.Random(self.seed))
        return path


LOSSES = (("none", "none"), ("all", "none"), ("all", "half"), ("all", "zeros"), ("none", "all"))


def states(trace: Trace, draws: int = 3) -> Iterator[State]:
    """Every state a crash at every operation may leave: two kills, five regular losses, and `draws` mixed ones."""
    for count in range(len(trace.operations) + 1):
        found = trace.tree(count)
        yield State(count, "killed", found, "all", "all")
        if count < len(trace.operations) and trace.operations[count].part is not None:
            cut = trace.tree(count, cut=True)
            yield State(count, "killed in a write", cut, "all", "all")
        for names, kept in LOSSES:
            yield State(count, f"power lost: names {names}, contents {kept}", found, names, kept)
        for draw in range(draws):
            seed = count * 1000 + draw
            yield State(count, f"power lost: mixed, seed {seed}", found, "any", "any", seed)


# ---- recording -------------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for `os`'s functions and `open`; see the top of this file.

    `before(number, kind)` is called ahead of each operation, and may raise or end the process; `longest` bounds what
    one write takes, as a nearly full pipe or disk does.
    """

    def __init__(self, root: Path, before: Callable[[int, str], None] | None, longest: int | None) -> None:
        begun = contents(root)
        self.root, self.before, self.longest = root.resolve(), before or (lambda number, kind: None), longest
        self.trace = Trace(self.root, lambda: _tree_of(begun))
        self.descriptors: set[int] = set()  # of files and directories below the root

    def relative(self, path: Any, dir_fd: int | None = None) -> str | None:
        """A path below the root; None for any other."""
        base = Path.cwd() if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink()
        whole = Path(os.path.normpath(base / path))
        return str(whole.relative_to(self.root)) if whole.is_relative_to(self.root) else None

    def record(self, kind: str, text: str, change: Change, part: Change | None = None) -> None:
        self.trace.operations.append(Operation(kind, text, change, part))

    def announce(self, kind: str) -> None:
        self.before(len(self.trace.operations), kind)

    # ---- descriptors

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        name = self.relative(path, dir_fd)
        writes = bool(flags & (os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_RDWR))
        if name is not None and writes:
            self.announce("create")
        descriptor: int = REAL["open"](path, flags, mode, dir_fd=dir_fd)
        if name is None:
            return descriptor
        self.descriptors.add(descriptor)

        def change(tree: Tree) -> None:
            parent, last = tree.parent(name), Path(name).name
            if last not in parent.entries:
                parent.entries[last] = File(bytearray())
                parent.changed()
            elif flags & os.O_TRUNC:
                del _file(tree, name).data[:]

        if writes:
            self.record("create", f"create {name}", change)
        return descriptor

    def write(self, descriptor: int, data: Any) -> int:
        if descriptor not in self.descriptors:
            return int(REAL["write"](descriptor, data))
        self.announce("write")
        name, taken = self.named(descriptor), bytes(memoryview(data)[: self.longest])
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        done: int = REAL["write"](descriptor, taken)

        def change(tree: Tree, length: int = done) -> None:
            _file(tree, name).data[at : at + length] = taken[:length]

        self.record("write", f"write {done} bytes to {name}", change, lambda tree: change(tree, done // 2))
        return done

    def fsync(self, descriptor: int) -> None:
        if descriptor not in self.descriptors:
            return
        self.announce("fsync")
        name = self.named(descriptor)

        def change(tree: Tree) -> None:
            node = tree.find(name)
            if isinstance(node, Directory):
                node.flush()
            else:
                node.flushed = bytes(node.data)

        self.record("fsync", f"fsync {name}", change)  # the real disk need not be bothered

    def named(self, descriptor: int) -> str:
        """Where an open file or directory is now, below the root."""
        return str(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(self.root))

    def close(self, descriptor: int) -> None:
        self.descriptors.discard(descriptor)
        REAL["close"](descriptor)

    # ---- names

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        name = self.relative(path, dir_fd)
        if name is not None:
            self.announce("mkdir")
        REAL["mkdir"](path, mode, dir_fd=dir_fd)
        if name is not None:
            self.record("mkdir", f"mkdir {name}", lambda tree: _enter(tree, name, Directory()))

    def rename(self, source: Any, target: Any, **at: Any) -> None:
        self._move("rename", source, target, at)

    def replace(self, source: Any, target: Any, **at: Any) -> None:
        self._move("replace", source, target, at)

    def _move(self, call: str, source: Any, target: Any, at: dict[str, Any]) -> None:
        old, new = self.relative(source), self.relative(target)
        if old is not None:
            self.announce("rename")
        REAL[call](source, target, **at)
        if old is None or new is None:
            return

        def change(tree: Tree) -> None:
            before, after, node = tree.parent(old), tree.parent(new), tree.find(old)
            del before.entries[Path(old).name]
            after.entries[Path(new).name] = node
            before.changed()
            if after is not before:
                after.changed()

        self.record("rename", f"rename {old} -> {new}", change)

    def link(self, source: Any, target: Any, **options: Any) -> None:
        old, new = self.relative(source), self.relative(target)
        if old is not None:
            self.announce("link")
        REAL["link"](source, target, **options)
        if old is not None and new is not None:
            self.record("link", f"link {old} -> {new}", lambda tree: _enter(tree, new, tree.find(old)))

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._drop("unlink", path, dir_fd)

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._drop("rmdir", path, dir_fd)

    def _drop(self, call: str, path: Any, dir_fd: int | None) -> None:
        name = self.relative(path, dir_fd)
        if name is not None and os.path.lexists(self.root / name):
            self.announce(call)
        REAL[call](path, dir_fd=dir_fd)
        if name is not None:

            def change(tree: Tree) -> None:
                parent = tree.parent(name)
                del parent.entries[Path(name).name]
                parent.changed()

            self.record(call, f"{call} {name}", change)

    # ---- Python's own files

    def python_open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
        """`open`: files below the root that are written to go through the functions above."""
        inside = not isinstance(file, int) and self.relative(os.fspath(file)) is not None
        if not inside or not set(mode) & set("wax+"):
            return OPEN(file, mode, buffering, *args, **options)
        assert "+" not in mode and "x" not in mode, f"mode {mode} is not modelled"
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if "a" in mode else os.O_TRUNC)
        raw = RawFile(self.open(file, flags, 0o666), self)
        if "a" in mode:
            os.lseek(raw.descriptor, 0, os.SEEK_END)
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, options.get("encoding"))


class RawFile(io.RawIOBase):
    """A file's lowest layer: each write is one operation."""

    def __init__(self, descriptor: int, recorder: Recorder) -> None:
        self.descriptor, self.recorder = descriptor, recorder

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def write(self, data: Any) -> int:
        return self.recorder.write(self.descriptor, data)

    def close(self) -> None:
        if not self.closed:
            self.recorder.close(self.descriptor)
        super().close()


def _file(tree: Tree, name: str) -> File:
    node = tree.find(name)
    assert isinstance(node, File)
    return node


def _enter(tree: Tree, name: str, node: File | Directory) -> None:
    parent = tree.parent(name)
    parent.entries[Path(name).name] = node
    parent.changed()


def _tree_of(found: dict[str, bytes | None]) -> Directory:
    """A tree of what `contents` gave, all of it flushed."""
    tree = Tree(Directory())
    for name, data in found.items():
        tree.parent(name).entries[Path(name).name] = Directory() if data is None else _flushed(data)
    _flush_all(tree.root)
    return tree.root


def _flush_all(found: Directory) -> None:
    found.flush()
    for node in found.entries.values():
        if isinstance(node, Directory):
            _flush_all(node)


@contextmanager
def recording(
    root: Path, before: Callable[[int, str], None] | None = None, longest: int | None = None
) -> Iterator[Trace]:
    """Records what the block does under `root`."""
    recorder = Recorder(root, before, longest)
    with (
        mock.patch.multiple(os, remove=recorder.unlink, **{name: getattr(recorder, name) for name in CALLS}),
        mock.patch.object(io, "open", recorder.python_open),
        mock.patch.object(builtins, "open", recorder.python_open),
    ):
        yield recorder.trace
