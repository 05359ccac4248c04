"""Pages of checkpoint files that this process has read and does not need again: given back while a model is loading.

safetensors maps a file into memory, and every page that is read then counts as this process' own until the file is
closed: a model that is quantised on the way in would seem to take its full-precision size beside the quantised one. The
system may drop such pages when it runs short; telling it at once keeps a process within a limit, and a look at its size
honest. What was read from a file can be read from it again, so that nothing is lost. On systems other than Linux this
does nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

EVERY = 16 << 20  # bytes read between two looks at the process' memory


class FilePages:
    """The mapped pages of some files."""

    def __init__(self, files: Iterable[str | os.PathLike[str]]) -> None:
        self.files = {os.path.realpath(file) for file in files}
        self.read = 0

    def add(self, count: int) -> None:
        """Notes that `count` bytes have been read and are done with; gives pages back when it is worth it."""
        self.read += count
        if self.read >= EVERY:
            self.give_back()

    def give_back(self) -> None:
        """Takes every page of the files out of this process' memory, but for mappings that it has written to."""
        self.read = 0
        if sys.platform != "linux" or not self.files:
            return
        libc = ctypes.CDLL(None)
        for start, end in self.clean_mappings():
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)

    def clean_mappings(self) -> Iterator[tuple[int, int]]:
        """Address ranges of the files' mappings in which no page differs from its file."""
        try:
            lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # a container may hide it
            return
        found = None
        for line in lines:
            words = line.split(maxsplit=5)
            if not words[0].endswith(":"):  # address range, permissions, offset, device, inode, path
                found = words[0] if len(words) > 5 and words[5] in self.files else None
            elif found is not None and words[0] == "Anonymous:":  # pages written to: they are no longer the file's
                if int(words[1]) == 0:
                    start, end = found.split("-")
                    yield int(start, 16), int(end, 16)
                found = None
