"""Images in tar shards in the layout of WebDataset, in a local folder or in a bucket.

`tar:PATTERN` names the shards: `tar:train-{000..099}.tar`, `tar:s3://BUCKET/PATH/*.tar`. Images are read one
by one, by their positions in the shards, which an index has; shards are never read as a whole after that.
Samples are numbered in the order of the shards and, in each of them, of their first members.
"""

from __future__ import annotations

import functools
import io
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from coursepack.data.sources.base import fields_only
from coursepack.data.sources.files import decode, decoded_once, refuse_damaged, unreadable
from coursepack.data.sources.roots import Layout, summarize_names
from coursepack.data.sources.shards import expand_braces, is_absolute, locate
from coursepack.data.sources.tar_index import CLASSES, open_index
from coursepack.data.sources.tar_shard import HEADER, member_name
from coursepack.errors import RecipeError, SourceError, UnknownName
from coursepack.parsing import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples
    from coursepack.data.sources.base import Pixels, Source, Spec
    from coursepack.data.sources.shards import Shard, Shards
    from coursepack.data.sources.tar_index import Index

LAYOUT = Layout(
    "the shards of the pattern, tar files with the members NAME.jpg and NAME.cls of each sample", ""
)
JSON = "json"
"""Option with the key of the class in `.json` members."""
PIECE = 256
"""Number of images that are read at a time."""
READERS = 16
"""Number of shards in a bucket that are read at the same time."""


@dataclass(frozen=True)
class TarShards:
    """Images in the shards of one folder."""

    name: str
    shards: Shards
    index: Index

    @property
    def is_remote(self) -> bool:
        """True if the shards are in a bucket, whose client cannot be used after a fork."""
        return self.shards.is_remote

    @functools.cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class ids `(N,)`, mapped from the index."""
        return np.asarray(self.index.columns["label"])

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names, in the order of the class ids."""
        return self.index.class_names

    @property
    def channels(self) -> int:
        """Number of channels of the pixels: 3, as images are converted to RGB."""
        return 3

    @property
    def fingerprint(self) -> str:
        """sha256 over shards, keys, positions, labels, image sizes and the content of 64 images."""
        return self.index.fingerprint

    @functools.cached_property
    def in_memory(self) -> NDArray[np.uint8] | None:
        """All images if they have one size and fit, decoded at most once and then mapped from the cache."""
        index = self.index
        keys = index.tree_key, index.fingerprint, index.listing
        return (
            None if index.damaged else decoded_once(self.name, index.columns["size"], keys, self._decode_one)
        )

    def sizes(self, samples: Samples) -> NDArray[np.int32]:
        """Return the height and width `(n, 2)` in the images' headers."""
        return np.asarray(self.index.columns["size"][samples])

    def pixels(self, samples: Samples) -> Pixels:
        """Return an array if `in_memory` is available, else a list."""
        if self.in_memory is not None:
            return self.in_memory[samples]
        return [
            self._decode(sample, data)
            for sample, data in zip(samples.tolist(), self._contents(samples), strict=True)
        ]

    def contents(self, samples: Samples) -> NDArray[np.uint32]:
        """Return the crc32c `(n,)` of the bytes of each image's file."""
        return np.fromiter(map(google_crc32c.value, self._contents(samples)), dtype=np.uint32)

    def path(self, sample: int) -> None:
        """Return None: samples have no file of their own."""

    def check(self) -> None:
        """Raise SourceError if the index has images that are empty, truncated or too large."""
        damaged = [(self._member(sample, name), damage) for sample, name, damage in self.index.damaged]
        refuse_damaged(self.name, len(self.labels), damaged)

    def __getstate__(self) -> dict[str, Any]:
        return fields_only(self)

    def _decode_one(self, sample: int) -> NDArray[np.uint8]:
        (data,) = self._read(np.array([sample]))
        return self._decode(sample, data)

    def _decode(self, sample: int, data: bytes) -> NDArray[np.uint8]:
        try:
            return decode(io.BytesIO(data), self.index.columns["size"][sample])
        except Exception as error:
            problem = str(error) or type(error).__name__
            raise unreadable(self.name, sample, self._member(sample), problem) from error

    def _member(self, sample: int, name: str | None = None) -> str:
        """Return a description of an image's position, for error messages."""
        shard = self.index.shards[self._shards_of(np.array([sample]))[0]]
        name = name or member_name(self.shards, shard, int(self.index.columns["offset"][sample]))
        return f"{self.shards.where(shard)}, member {name}"

    def _shards_of(self, samples: Samples) -> NDArray[np.int64]:
        return np.searchsorted(self.index.first, samples, side="right") - 1

    def _contents(self, samples: Samples) -> Iterator[bytes]:
        """Yield the bytes of the images' files."""
        for start in range(0, len(samples), PIECE):
            yield from self._read(samples[start : start + PIECE])

    def _read(self, samples: Samples) -> list[bytes]:
        """Return the bytes of the images' files, read shard by shard."""
        shards = self._shards_of(samples)
        found = [b""] * len(samples)

        def read(shard: int) -> None:
            rows = np.flatnonzero(shards == shard)
            for row, data in zip(rows.tolist(), self._read_shard(shard, samples[rows]), strict=True):
                found[row] = data

        wanted = np.unique(shards).tolist()
        if self.is_remote and len(wanted) > 1:
            with ThreadPoolExecutor(min(READERS, len(wanted))) as pool:
                list(pool.map(read, wanted))
        else:
            for shard in wanted:
                read(shard)
        return found

    def _read_shard(self, shard: int, samples: Samples) -> list[bytes]:
        columns, where = self.index.columns, self.shards.where(self.index.shards[shard])
        starts = columns["offset"][samples]
        stops = starts + columns["length"][samples]
        try:
            pieces = self.shards.read(self.index.shards[shard], (starts - HEADER).tolist(), stops.tolist())
        except OSError as error:
            raise unreadable(self.name, int(samples[0]), where, error.strerror or str(error)) from error
        headers, lengths = columns["header"][samples].tolist(), (stops - starts + HEADER).tolist()
        for sample, piece, header, length in zip(samples.tolist(), pieces, headers, lengths, strict=True):
            # The header has name, size and time of the image, so that of another image differs.
            if len(piece) != length or google_crc32c.value(piece[:HEADER]) != header:
                raise SourceError(
                    f"sample {sample} of source {self.name!r} cannot be read: shard {where} has changed "
                    "since it was indexed. Start again, then it is indexed again"
                )
        return [piece[HEADER:] for piece in pieces]


def tar(spec: Spec, root: Path | None) -> Source:
    """Open the shards that the pattern `spec.split` names, below `root` unless it is absolute."""
    json_key = _json_key(spec)
    base = None if is_absolute(spec.split) else LAYOUT.root(spec, root)
    place, pattern = locate(spec.split, base)
    try:
        names = expand_braces(pattern)
    except ValueError as error:
        raise RecipeError(f"pattern of source '{spec}' {error}") from error
    try:
        shards, class_names = _find(spec, place, names), _class_names(spec, place)
        index = open_index(str(spec), place, shards, json_key=json_key, class_names=class_names)
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(f"source '{spec}' cannot be read: {place}: {error.strerror or error}") from error
    return TarShards(str(spec), place, index)


def _json_key(spec: Spec) -> str | None:
    key = None
    for option in filter(None, spec.options.split(",")):
        name, _, key = option.partition("=")
        if name != JSON:
            raise UnknownName(f"option of source {spec.name!r}", name, [JSON])
        if not key:
            raise RecipeError(
                f"option {JSON} of source {spec.name!r} is empty, expected the key of the class"
            )
    return key


def _find(spec: Spec, place: Shards, names: list[str]) -> list[Shard]:
    """Return the shards of a pattern, in the order of its braces and, for each of them, by name.

    Raises:
        SourceError: a name matches no shard, or two match the same one.
    """
    found = place.find(names)
    missing = [name for name, shards in zip(names, found, strict=True) if not shards]
    if missing:
        others = place.listed()
        problem = (
            f"there is no shard {missing[0]!r}"
            if len(names) == 1
            else (
                f"there are no shards for {len(missing):,} of the {len(names):,} names of the pattern: "
                f"{summarize_names(missing)}"
            )
        )
        there = f"found {summarize_names(others)}" if others else "the folder is empty"
        raise SourceError(f"source '{spec}' cannot be read from {str(place)!r}: {problem}; {there}")
    shards = list(itertools.chain.from_iterable(found))
    seen: set[str] = set()
    for shard in shards:
        if shard.name in seen:
            raise SourceError(
                f"source '{spec}' cannot be read: its pattern matches {place.where(shard.name)} twice"
            )
        seen.add(shard.name)
    return shards


def _class_names(spec: Spec, place: Shards) -> tuple[str, ...] | None:
    """Return the class names in the file beside the shards, if there is one."""
    try:
        text = place.text(CLASSES)
        if text is None:
            return None
        names = parse_json(text)
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError("is not a list of names")
    except ValueError as error:
        raise SourceError(f"source '{spec}' cannot be read: {place.where(CLASSES)} {error}") from error
    return tuple(names)
