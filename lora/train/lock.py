"""One writer to a directory: `.lock` in it, locked by the system for as long as its process lives.

The system lets go of the lock when the process ends, however it ends, so a lock never outlives its holder and needs no
guess about who is alive. What the file says (process, host, since when) is for the message. Where the file system has
no locks, what it says decides: a process of this host that is gone is taken over from, any other one is respected.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from lora.errors import LoRAError
from lora.train.durable import reporting

NAME = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # from file systems without locks
HELD = (errno.EWOULDBLOCK, errno.EACCES)


class OutputLock:
    """The right to write to a directory: from `take` until `release`, or the end of the process."""

    def __init__(self, output: Path) -> None:
        self.path = output / NAME
        self._file: TextIO | None = None

    @property
    def held(self) -> bool:
        return self._file is not None

    def take(self) -> str | None:
        """Takes the lock; says from which dead process, if one left its lock behind.

        Raises: LoRAError where another process, or another run of this one, holds it; or nothing can be written.
        """
        with reporting(f"output: {self.path.parent} cannot be written to"):
            file = self._locked()
            left = _read(file)
            record = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            try:
                file.seek(0)
                file.truncate()
                file.write(json.dumps(record) + "\n")
                file.flush()
            except OSError:
                with suppress(OSError):
                    file.close()
                raise
        self._file = file
        return f"{_named(left)} ended without a word: going on in its place" if left else None

    def release(self) -> None:
        """Gives the lock back; nothing where it is not held."""
        if self._file is not None:
            with suppress(OSError):
                self.path.unlink()
            self._file.close()
            self._file = None

    def _locked(self) -> TextIO:
        """The open lock file, locked, and still the one of that name."""
        while True:
            file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 - open for as long as it is locked
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = _read(file)
                file.close()
                if error.errno not in (*NO_LOCKS, *HELD):
                    raise
                if error.errno in HELD or _may_be_alive(holder):
                    raise self._refusal(holder, sure=error.errno in HELD) from None
                return open(self.path, "a+", encoding="utf-8")
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return file
            file.close()  # its holder has just removed it

    def _refusal(self, holder: dict[str, Any], sure: bool) -> LoRAError:
        unsure = "" if sure else f", or delete {self.path} if you know that it has ended"
        return LoRAError(
            f"output: {self.path.parent} is being written to by {_named(holder)}. Wait for it to end{unsure}, or give "
            "another --output."
        )


def _read(file: TextIO) -> dict[str, Any]:
    """What a lock file says; nothing where its writer was killed before it could say it."""
    file.seek(0)
    try:
        found = json.loads(file.read() or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('process')} on {holder.get('host')}, since {holder.get('since')}"


def _may_be_alive(holder: dict[str, Any]) -> bool:
    """Whether the process a lock names may still run; one of another host always may."""
    if not holder:
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(holder["process"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, KeyError, ValueError):
        return True
    return True
