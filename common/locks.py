"""Locks between processes, which a process that is killed gives up.

They are `flock` locks on a file that names the holder. Where the system has no `flock` (Windows), nothing is
locked.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from coursepack.parsing import parse_json

if TYPE_CHECKING:
    from pathlib import Path
    from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment, unused-ignore]  # a module elsewhere

MOST_BYTES = 1 << 16
_open: set[IO[str]] = set()
"""Files of the locks that this process holds."""


class Held(Exception):
    """Another process holds a lock; `holder` is what it wrote about itself."""

    def __init__(self, holder: dict[str, Any]) -> None:
        self.holder = holder
        host, pid = holder.get("host", "an unknown host"), holder.get("pid", "unknown")
        super().__init__(f"process {pid} on {host}, since {holder.get('started', 'an unknown time')}")


class FileLock:
    """A lock that is held from its making until `release`, or until the process ends."""

    def __init__(self, path: Path) -> None:
        """Take the lock, or fail at once.

        Args:
            path: the lock's file, in a folder that exists; it is removed with the lock.

        Raises:
            Held: another holder has it.
        """
        self.path = path
        self._file = _locked(path)
        _open.add(self._file)
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        try:
            self._file.truncate(0)
            self._file.write(json.dumps(holder))
            self._file.flush()
        except BaseException:  # a full disk
            self.release()
            raise

    def release(self) -> None:
        """Give up the lock and remove its file."""
        if self._file in _open:
            _open.discard(self._file)
            self.path.unlink(missing_ok=True)  # before others can take it
            with suppress(OSError):  # what a full disk could not take
                self._file.close()


def _locked(path: Path) -> IO[str]:
    """The lock's file, open and locked."""
    while True:
        file = path.open("a+", encoding="utf-8")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise Held(_holder(file)) from None
        # The last holder may have removed the file between the two calls.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()


def _holder(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        found = parse_json(file.read(MOST_BYTES))
    except ValueError:  # not written yet
        found = None
    return found if isinstance(found, dict) else {}


def _forget() -> None:
    """Close the locks' files in a forked child, so that a killed parent's locks do not live on in it."""
    for file in _open:
        file.close()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
