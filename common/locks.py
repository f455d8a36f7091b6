"""Locks between processes that are released when their process is killed.

They are `flock` locks on a file that contains a description of the holder. On systems without `flock`
(Windows) nothing is locked.
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

MAX_BYTES = 1 << 16
"""Maximum number of bytes read of a lock's file."""
_open: set[IO[str]] = set()
"""Open files of the locks that this process holds."""


class Held(Exception):
    """Another process holds the lock. `holder` is its description: host, pid and start time."""

    def __init__(self, holder: dict[str, Any]) -> None:
        self.holder = holder
        host, pid = holder.get("host", "an unknown host"), holder.get("pid", "unknown")
        super().__init__(f"process {pid} on {host}, since {holder.get('started', 'an unknown time')}")


class FileLock:
    """A lock that is acquired by the constructor and held until `release` or the end of the process."""

    def __init__(self, path: Path) -> None:
        """Acquire the lock without waiting.

        Args:
            path: file of the lock, in an existing folder. It is removed when the lock is released.

        Raises:
            Held: another process, or another lock of this process, holds it.
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
        """Release the lock and remove its file."""
        if self._file in _open:
            _open.discard(self._file)
            self.path.unlink(missing_ok=True)  # before another process can acquire it
            with suppress(OSError):  # buffered bytes that a full disk refused
                self._file.close()


def _locked(path: Path) -> IO[str]:
    """Open and lock the lock's file."""
    while True:
        file = path.open("a+", encoding="utf-8")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise Held(_holder(file)) from None
        # The previous holder may have removed the file between the two calls.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()


def _holder(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        found = parse_json(file.read(MAX_BYTES))
    except ValueError:  # not written yet
        found = None
    return found if isinstance(found, dict) else {}


def _close_in_child() -> None:
    """Close the locks' files in a forked child, so that it does not keep the locks of a killed parent."""
    for file in _open:
        file.close()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
