"""Files and directories that are there whole or not at all, whatever happens while they are written.

Guaranteed, on a file system that keeps POSIX's promises about fsync and rename:

- against a kill of the process at any moment: under its own name there is the old file or directory, or the new one,
  never a part of one. In between, an old directory may be called `.aside-NAME`; `recover` gives it its name back.
- against power loss at any moment: the same, and once `replace_file` or `replaced_directory` is done, the new one.
  Contents are flushed before names, names before what replaces them is removed. (macOS's fsync does not empty the
  drive's own cache: there, power loss may take the newest.)

Each step is one call of the operating system, so that tests can stop before each of them (tests/faults).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from lora.errors import LoRAError

UNFINISHED = ".unfinished-"  # being written: of no use
ASIDE = ".aside-"  # the old one, whole, while a new one takes its place
REMOVED = ".removed-"  # on its way out: of no use
NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # from file systems that cannot flush a directory
ADVICE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room within the quota",
    errno.EROFS: "make it writable, or name a directory on another file system",
    errno.EACCES: "make it writable for this user, or name another directory",
    errno.EPERM: "make it writable for this user, or name another directory",
    errno.EIO: "the disk or its connection is failing: check it, or name a directory on another one",
    errno.ESTALE: "the file server has lost it: mount it again",
}


class Written(NamedTuple):
    """What was meant to be written: compared with what is there when it is read again."""

    size: int
    sha256: str


class NewFile:
    """A file under construction: `write` pieces; at the end of the block they are on the disk, all of them.

    Raises: OSError, also where the file system reports fewer bytes than were written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size, self._digest = path, 0, hashlib.sha256()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def write(self, content: Any) -> int:
        """All of `content`, in as many calls as the system needs."""
        view = memoryview(content)
        view = view.cast("B") if view.nbytes else memoryview(b"")  # a view of nothing cannot be cast
        self._digest.update(view)
        self.size += len(view)
        rest = view
        while rest:
            done = os.write(self._descriptor, rest)
            if done <= 0:
                raise OSError(errno.EIO, "nothing more could be written", str(self.path))
            rest = rest[done:]
        return len(view)

    @property
    def written(self) -> Written:
        return Written(self.size, self._digest.hexdigest())

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
                found = os.fstat(self._descriptor).st_size
                if found != self.size:
                    message = f"only {found:,} of {self.size:,} bytes were written"
                    raise OSError(errno.EIO, message, str(self.path))
        finally:
            os.close(self._descriptor)


def write_file(path: Path, content: bytes) -> Written:
    """A new file, its contents on the disk; its name is only once its directory is flushed."""
    with NewFile(path) as file:
        file.write(content)
    return file.written


def replace_file(path: Path, content: bytes) -> None:
    """A file that has its old contents until it has the new ones, and has these once this returns."""
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        write_file(unfinished, content)
        unfinished.replace(path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()  # it may be what fills the disk
        raise
    flush_directory(path.parent)


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """A directory to fill within the block, flushed by whoever fills it; afterwards it is `target`, on the disk.

    Until then the old `target` is what it was, though for a moment under another name: see `recover`.
    """
    unfinished = target.with_name(UNFINISHED + target.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        yield unfinished
        for directory in sorted((p for p in unfinished.rglob("*") if p.is_dir()), reverse=True):  # the deepest first
            flush_directory(directory)
        flush_directory(unfinished)
        _swap(unfinished, target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _swap(new: Path, target: Path) -> None:
    """Puts `new` in `target`'s place. Whichever of the two renames reach the disk, one of the two is there, whole."""
    aside = target.with_name(ASIDE + target.name)
    if not target.exists():
        new.rename(target)
        flush_directory(target.parent)
        return
    shutil.rmtree(aside, ignore_errors=True)  # of no use while there is a `target`
    target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        aside.rename(target)
        raise
    flush_directory(target.parent)
    shutil.rmtree(aside, ignore_errors=True)  # what is left of it goes at the next start


def make_directory(path: Path) -> None:
    """A directory and its parents, their names on the disk."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        flush_directory(path.parent)


def remove(path: Path) -> None:
    """Removes a file, or a directory in such a way that a half-removed one does not go by its name."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    removed = path.with_name(REMOVED + path.name)
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    flush_directory(path.parent)
    shutil.rmtree(removed, ignore_errors=True)  # what is left of it goes at the next start


def recover(directory: Path, ours: Callable[[str], bool]) -> list[str]:
    """Finishes or undoes what a dead process left half-done in `directory`; says what it put back.

    It may itself be killed at any moment, and run again.

    Args:
        ours: whether a name is one of those written here; what others leave beside them stays.
    """
    notes = []
    for aside in _leftovers(directory, ASIDE, ours):
        target = aside.with_name(aside.name.removeprefix(ASIDE))
        if not target.exists():
            aside.rename(target)
            flush_directory(directory)
            notes.append(f"{target.name} was being replaced when an earlier run ended: the old one is back")
    for prefix in (UNFINISHED, ASIDE, REMOVED):
        for leftover in _leftovers(directory, prefix, ours):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                with suppress(OSError):
                    leftover.unlink()
    return notes


def _leftovers(directory: Path, prefix: str, ours: Callable[[str], bool]) -> list[Path]:
    return sorted(path for path in directory.glob(f"{prefix}*") if ours(path.name.removeprefix(prefix)))


def flush_directory(path: Path) -> None:
    """Has the names in a directory written to the disk now, where its file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise
    finally:
        os.close(descriptor)


def flush_file(path: Path) -> None:
    """Has what other code wrote to a file written to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def reporting(failed: str, then: str = "") -> Iterator[None]:
    """An OSError within the block becomes a LoRAError: what has failed, why, and what to do.

    Args:
        failed: `run.yaml cannot be written to out/run`, say.
        then: a sentence on what is still there, and how to go on.
    """
    try:
        yield
    except OSError as error:
        raise LoRAError(f"{failed}: {reason(error)}.{' ' * bool(then)}{then}") from None


def reason(error: OSError) -> str:
    """`No space left on device: make room there`."""
    advice = ADVICE.get(error.errno or 0)
    return f"{error.strerror or error}{f': {advice}' if advice else ''}"


def hash_of(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
