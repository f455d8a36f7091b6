"""Ownership of parts: every writing process owns one part of a store's blocks until it ends.

A process records its part in an object under `runs/` and holds that object until it ends, for any reason.
The object remains as a record of the run. Only these records contain times, hosts and pids, and they are
never compared. If the location cannot hold objects, such as local files on Windows, only one process at a
time may write to a store.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from coursepack.config import Config, parse_config
from coursepack.data.store.locations import open_location
from coursepack.errors import StoreBusy, StoreDamaged
from coursepack.parsing import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coursepack.data.store.locations.base import Location

RUNS = "runs"


class _Run(Config):
    """Schema of the output of `_record`."""

    host: str
    pid: int
    part_index: Annotated[int, Field(ge=0)]
    part_count: Annotated[int, Field(ge=1)]
    started: str | None
    ended: str | None


@dataclass(frozen=True)
class Part:
    """A worker's share of the blocks: those whose number modulo `count` is `index`."""

    index: int = 0
    count: int = 1

    def owns(self, block: int) -> bool:
        """Return True if this part contains the block."""
        return block % self.count == self.index

    def overlaps(self, other: Part) -> bool:
        """Return True if the parts have blocks in common."""
        return (self.index - other.index) % math.gcd(self.count, other.count) == 0

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@contextmanager
def owning(where: str | Path | Location, part: Part) -> Iterator[None]:
    """Own a part of the store's blocks within the context.

    Raises:
        StoreBusy: a live process owns a part that overlaps with this one.
    """
    location, started = open_location(where), time.time()
    with location.lock(), ExitStack() as opening:
        for other in live_runs(location):
            if part.overlaps(Part(other["part_index"], other["part_count"])):
                raise StoreBusy(
                    f"process {other['pid']} on {other['host']} is writing part {other['part_index']}/"
                    f"{other['part_count']} of store {str(location)!r} since {other['started']}. Wait for "
                    "it, stop it, or share the work: `--part I/COUNT` in both."
                )
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(started))
        name = f"{stamp}-{socket.gethostname()}-{os.getpid()}-{part.index}of{part.count}.json"
        record = opening.enter_context(location.hold(f"{RUNS}/{name}", _record(part, started, ended=None)))
        held = opening.pop_all()
    with held:
        try:
            yield
        finally:
            record(_record(part, started, ended=time.time()))


def live_runs(where: str | Path | Location) -> list[dict[str, Any]]:
    """Return the records of processes now writing to the store; empty if the location cannot hold objects."""
    location = open_location(where)
    # A record is empty until it is first written.
    return [_parsed(text, location.where(key)) for key, text in location.held(RUNS) if text]


def _parsed(text: bytes, where: str) -> dict[str, Any]:
    try:
        return parse_config(_Run, parse_json(text), where).model_dump()
    except ValueError as error:
        raise StoreDamaged(f"the record of a live run, {where!r}, cannot be read: {error}") from error


def _record(part: Part, started: float, ended: float | None) -> bytes:
    """Return a record as JSON. A final record is never shorter than the initial one that it overwrites."""

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
    return json.dumps(record).encode()
