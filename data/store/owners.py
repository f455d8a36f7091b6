"""Who writes what: every writing process owns one part of a store's blocks for as long as it lives.

A process says which part it owns in an object under `runs/` and holds it for as long as it lives, however
it ends. The object stays as a record of when and where the run was: the only place for times, hosts and pids,
and nothing compares it. Where the location cannot hold objects, as files cannot on Windows, stores can be
read, and written by one process at a time.
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
def owning(where: str | Path | Location, part: Part) -> Iterator[None]:
    """Own a part of the store's blocks.

    Raises:
        StoreBusy: a live process owns a part that shares blocks with this one.
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
    """Records of the processes that write to the store now; none where the location cannot tell."""
    location = open_location(where)
    # A record that is not written yet is empty.
    return [_parsed(text, location.where(key)) for key, text in location.held(RUNS) if text]


def _parsed(text: bytes, where: str) -> dict[str, Any]:
    try:
        return parse_config(_Run, parse_json(text), where).model_dump()
    except ValueError as error:
        raise StoreDamaged(f"the record of a live run, {where!r}, cannot be read: {error}") from error


def _record(part: Part, started: float, ended: float | None) -> bytes:
    """A record as JSON; that of a run that has ended is not shorter, as it is written over the first."""

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
