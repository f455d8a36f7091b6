"""Done-objects: records of finished blocks, kept until their view is committed to the manifest."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from coursepack.config import Config
from coursepack.data.store.layout import shard_key
from coursepack.data.store.shards import shard_size
from coursepack.errors import StoreDamaged
from coursepack.parsing import MAX_JSON_BYTES, parse_json
from coursepack.problems import lines_of

if TYPE_CHECKING:
    from typing import Self

    from coursepack.data.store.locations.base import Location
    from coursepack.data.store.manifest import Manifest

BLOCKS = "blocks"
_NAME = re.compile(r"(0|[1-9][0-9]{0,14})\.(0|[1-9][0-9]{0,14})\.json")
Count = Annotated[int, Field(ge=0, lt=1 << 48)]
Sample = Annotated[str, Field(pattern=r"^[0-9]{1,15}$")]


class _Fidelity(Config):
    rows: Count
    sum: float
    largest: float
    histogram: dict[Annotated[str, Field(pattern=r"^-?[0-9]{1,9}$")], Count]


class _Precision(Config):
    rows: Annotated[float, Field(ge=1)]
    kl: float


class _Record(Config):
    draws: str
    environment: dict[str, Any]
    sums: dict[str, float]
    fidelity: dict[Literal["T=1", "T=4"], _Fidelity]
    content: str | None = None
    precision: _Precision | None = None
    probes: dict[Sample, str] = Field(default={})

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if len(self.fidelity) == 1:
            raise ValueError(f"fidelity is given at {', '.join(self.fidelity)} only, expected T=1 and T=4")
        return self


class _Done(Config):
    arrays: list[str]
    files: dict[str, Annotated[list[Count], Field(min_length=2, max_length=2)]]
    """Size and checksum of every file, by key."""
    record: _Record


def done_key(view: int, index: int) -> str:
    """Return the key of the done-object of a block."""
    return f"{BLOCKS}/{view}.{index}.json"


def done_objects(location: Location) -> list[tuple[int, int]]:
    """Return view and index of every block that has a done-object, sorted."""
    matches = (_NAME.fullmatch(name) for name in location.names(BLOCKS))
    return sorted((int(match[1]), int(match[2])) for match in matches if match is not None)


def read_done(location: Location, view: int, index: int) -> dict[str, Any] | None:
    """Read a block's done-object as plain values; returns None if there is none.

    Raises:
        StoreDamaged: the object cannot be read or is not in the form that `BlockFiles.finish` writes.
    """
    key = done_key(view, index)
    try:
        entry: dict[str, Any] = parse_json(location.get(key, MAX_JSON_BYTES))
        _Done.model_validate(entry, strict=True)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise _damaged(location, key, lines_of(_Done, error)[0]) from error
    except ValueError as error:
        raise _damaged(location, key, f"it {error}") from error
    except OSError as error:
        raise _damaged(location, key, error.strerror or str(error)) from error
    return entry


def check_done(location: Location, manifest: Manifest, view: int, index: int, entry: dict[str, Any]) -> None:
    """Check that the files of a done-object are those of its block.

    Raises:
        StoreDamaged: a file is missing, unexpected or of the wrong size; names the first such file.
    """
    start = index * manifest.block_rows
    stop = min(start + manifest.block_rows, manifest.samples)
    expected: dict[str, int] = {}
    for name in entry["arrays"]:
        for component, layout in manifest.arrays[name].components.items() if name in manifest.arrays else ():
            for first in range(start, stop, layout.shard_rows):
                key = shard_key(f"{name}/{component}", view, first // layout.shard_rows, layout)
                expected[key] = shard_size(min(layout.shard_rows, stop - first), layout)
    found = {key: size for key, (size, crc) in entry["files"].items() if crc < 1 << 32}
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        key = wrong[0]
        raise _damaged(
            location,
            done_key(view, index),
            f"it gives {key!r:.80} {found.get(key)} bytes, not {expected.get(key)}",
        )
    if any(int(sample) >= manifest.samples for sample in entry["record"].get("probes", {})):
        raise _damaged(
            location, done_key(view, index), "it has a probe of a sample that is not in the source"
        )


def _damaged(location: Location, key: str, fault: str) -> StoreDamaged:
    return StoreDamaged(
        f"done-object {location.where(key)!r} is damaged: {fault}. Remove it and run the same "
        "`precompute run` again, which writes that block again."
    )
