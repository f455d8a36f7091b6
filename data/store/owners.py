"""Who writes what: every writing process owns one part of a store's blocks for as long as it lives.

A process says which part it owns in a file under `runs/` and holds a lock on that file; the lock vanishes
with the process, however that ends. The file stays as a record of when and where the run was: the only place
for times, hosts and pids, and nothing compares it. Where the system has no flock(2), as Windows, nothing is
locked: stores can be read there, and written by one process at a time.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Annotated, Any

from pydantic import Field

from coursepack.config import Config, parse_config
from coursepack.errors import StoreBusy, StoreDamaged
from coursepack.files import naming, open_regular
from coursepack.parsing import parse_json

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]  # a module that Windows does not have

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RUNS = "runs"
LOCK = "lock"
MOST_RECORD_BYTES = 1 << 16


class _Run(Config):
    """What `_record` writes."""

    host: str
    pid: int
    part_index: Annotated[int, Field(ge=0)]
    part_count: Annotated[int, Field(ge=1)]
    started: str | None
    ended: str | None


@dataclass(frozen=True)
class Part:
    """A worker's share of the blocks: those whose number leaves `index` when divided by `count`."""

    index: int = 0
    count: int = 1

    def owns(self, block: int) -> bool:
        """Whether this part does that block."""
        return block % self.count == self.index

    def overlaps(self, other: Part) -> bool:
        """Whether some block belongs to both."""
        return (self.index - other.index) % math.gcd(self.count, other.count) == 0

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@contextmanager
def store_lock(root: Path) -> Iterator[None]:
    """Be the only process that changes the manifest or claims a part."""
    path = root / LOCK
    with os.fdopen(open_regular(path, os.O_WRONLY | os.O_CREAT), "wb") as file:
        with naming(path):
            _lock(file)
        yield


@contextmanager
def owning(root: Path, part: Part) -> Iterator[None]:
    """Own a part of the store's blocks.

    Raises:
        StoreBusy: a live process owns a part that shares blocks with this one.
    """
    started = time.time()
    folder = root / RUNS
    folder.mkdir(exist_ok=True)
    with store_lock(root):
        for other in live_runs(root):
            if part.overlaps(Part(other["part_index"], other["part_count"])):
                raise StoreBusy(
                    f"process {other['pid']} on {other['host']} is writing part {other['part_index']}/"
                    f"{other['part_count']} of store {str(root)!r} since {other['started']}. Wait for "
                    "it, stop it, or share the work: `--part I/COUNT` in both."
                )
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(started))
        name = f"{stamp}-{socket.gethostname()}-{os.getpid()}-{part.index}of{part.count}.json"
        path = folder / name
        file = path.open("wb", buffering=0)
        with naming(path):
            _lock(file)
            _record(file, part, started, ended=None)
    with file:
        try:
            yield
        finally:
            with naming(path):
                _record(file, part, started, ended=time.time())


def live_runs(root: Path) -> list[dict[str, Any]]:
    """Records of the processes that write to the store now; none where the system cannot tell."""
    live: list[dict[str, Any]] = []
    if fcntl is None:
        return live
    for path in sorted((root / RUNS).glob("*.json")):
        if not path.is_file():  # no writer's, and to open a FIFO would be to wait for one
            continue
        with path.open("rb") as file:
            try:
                # Shared, so that two who look do not take each other for writers.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if text := file.read(MOST_RECORD_BYTES):
                    live.append(_parsed(text, path))
    return live


def _lock(file: IO[bytes]) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX)


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    try:
        record = parse_json(text)
        return parse_config(_Run, record, str(path)).model_dump()
    except ValueError as error:
        raise StoreDamaged(f"the record of a live run, {str(path)!r}, cannot be read: {error}") from error


def _record(file: IO[bytes], part: Part, started: float, ended: float | None) -> None:
    def spelled(moment: float | None) -> str | None:
        return None if moment is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))

    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "part_index": part.index,
        "part_count": part.count,
        "started": spelled(started),
        "ended": spelled(ended),
    }
    # One write over the old text, which is never longer: whoever looks meanwhile finds one or the other.
    file.seek(0)
    file.write(json.dumps(record).encode())
