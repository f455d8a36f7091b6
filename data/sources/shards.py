"""Shards that a pattern names, in a local folder or in a bucket, and reads of byte ranges of them."""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
import stat
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from coursepack.files import open_regular
from coursepack.parsing import MAX_JSON_BYTES, read_bounded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import IO

    from coursepack.data.store.locations.s3 import BucketLocation

SEPARATOR = "://"
MAX_SHARDS = 1_000_000
"""Maximum number of names that a pattern's braces may stand for."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})", re.ASCII)
_GLOB = re.compile(r"[*?\[]")
_MAGIC = re.compile(r"[*?\[{]")


@dataclass(frozen=True)
class Shard:
    """One shard of a source."""

    name: str
    """Path relative to the folder of the shards."""
    size: int
    """Size in bytes."""
    tag: str
    """Modification time of a file, or entity tag of an object. Differs after every change."""


class Shards(Protocol):
    """Folder of shards. Its address is `str(shards)`. Can be pickled."""

    @property
    def is_remote(self) -> bool:
        """True if shards are read over a network."""

    def where(self, name: str) -> str:
        """Return the path or address of a shard."""

    def find(self, names: Sequence[str]) -> list[list[Shard]]:
        """Return the shards that each name or glob matches, sorted by name."""

    def listed(self) -> list[str]:
        """Return the names of the folder's files, for error messages."""

    def read(self, name: str, starts: Sequence[int], stops: Sequence[int]) -> list[bytes]:
        """Return several ranges of a shard's bytes; they are shorter if it ends before."""

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open all of a shard as a file that can be searched. One in a bucket is downloaded."""

    def text(self, name: str) -> bytes | None:
        """Return the content of a small file beside the shards, or None if there is none."""


@dataclass(frozen=True)
class LocalShards:
    """Shards in a local folder. See `Shards` for the methods."""

    folder: str
    is_remote = False

    def __str__(self) -> str:
        return self.folder

    def where(self, name: str) -> str:
        """Return the path of a shard."""
        return str(Path(self.folder, name))

    def find(self, names: Sequence[str]) -> list[list[Shard]]:
        """Return the regular files that each name or glob matches."""
        return [
            [shard for match in self._matches(name) if (shard := self._shard(match)) is not None]
            for name in names
        ]

    def listed(self) -> list[str]:
        """Return the names in the folder."""
        return sorted(path.name for path in Path(self.folder).iterdir()) if Path(self.folder).is_dir() else []

    def read(self, name: str, starts: Sequence[int], stops: Sequence[int]) -> list[bytes]:
        """Return several ranges of a file's bytes."""
        pieces = []
        # Opened each time: the shards of a source may be more than a process may have open.
        with open(self.where(name), "rb", buffering=0, opener=open_regular) as file:
            for start, stop in zip(starts, stops, strict=True):
                file.seek(start)
                pieces.append(file.read(stop - start))
        return pieces

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file."""
        with open(self.where(name), "rb", opener=open_regular) as file:
            yield file

    def text(self, name: str) -> bytes | None:
        """Return the content of a small file, or None if there is none."""
        path = Path(self.where(name))
        return read_bounded(path, MAX_JSON_BYTES) if path.exists() else None

    def _matches(self, name: str) -> list[str]:
        if not _GLOB.search(name):
            return [name]
        return sorted(glob.glob(name, root_dir=self.folder))  # noqa: PTH207 - Path.glob matches hidden files

    def _shard(self, name: str) -> Shard | None:
        try:
            found = Path(self.folder, name).stat()
        except (OSError, ValueError):
            return None
        return Shard(name, found.st_size, str(found.st_mtime_ns)) if stat.S_ISREG(found.st_mode) else None


@dataclass(frozen=True)
class BucketShards:
    """Shards in a folder of a bucket. See `Shards` for the methods."""

    location: BucketLocation
    is_remote = True

    def __str__(self) -> str:
        return str(self.location)

    def where(self, name: str) -> str:
        """Return the address of a shard."""
        return self.location.where(name)

    def find(self, names: Sequence[str]) -> list[list[Shard]]:
        """Return the objects that each name or glob matches."""
        shards = {key: Shard(key, size, tag) for key, (size, tag) in sorted(self.location.entries().items())}
        found = []
        for name in names:
            if _GLOB.search(name):
                found.append([shard for key, shard in shards.items() if _is_match(key, name)])
            else:
                found.append([shards[name]] if name in shards else [])
        return found

    def listed(self) -> list[str]:
        """Return the keys below the folder."""
        return sorted(self.location.entries())

    def read(self, name: str, starts: Sequence[int], stops: Sequence[int]) -> list[bytes]:
        """Return several ranges of an object's bytes."""
        return self.location.get_ranges(name, starts, stops)

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Download an object to a temporary file."""
        with tempfile.TemporaryFile() as file:
            self.location.download(name, file)
            file.seek(0)
            yield file

    def text(self, name: str) -> bytes | None:
        """Return the content of a small object, or None if there is none."""
        try:
            return self.location.get(name, MAX_JSON_BYTES)
        except FileNotFoundError:
            return None


def locate(pattern: str, root: Path | None) -> tuple[Shards, str]:
    """Return the folder that a pattern begins with, and the rest of the pattern.

    Args:
        pattern: `s3://BUCKET/...`, an absolute path, or a path relative to `root`.
        root: folder of relative patterns.

    Raises:
        RecipeError: the address has no bucket.
        UnknownName: there is no such scheme.
    """
    scheme, separator, rest = pattern.rpartition(SEPARATOR)
    segments = rest.split("/")
    fixed = list(itertools.takewhile(lambda segment: not _MAGIC.search(segment), segments[:-1]))
    name = "/".join(segments[len(fixed) :])
    if separator:
        from coursepack.data.store.locations import open_bucket

        return BucketShards(open_bucket(scheme, "/".join(fixed))), name
    folder = Path("/".join(fixed) or ("/" if fixed else ""))
    return LocalShards(str(folder if root is None else root / folder)), name


def is_absolute(pattern: str) -> bool:
    """Return True if a pattern needs no root."""
    return SEPARATOR in pattern or os.path.isabs(pattern)  # noqa: PTH117 - a pattern is not a path


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern's braces stand for, in order.

    Raises:
        ValueError: braces contain anything else than a range `000..099` or a list `a,b`, or stand for more
            than `MAX_SHARDS` names.

    >>> expand_braces("{b,a}-{08..10}.tar")
    ['b-08.tar', 'b-09.tar', 'b-10.tar', 'a-08.tar', 'a-09.tar', 'a-10.tar']
    """
    texts = _BRACES.split(pattern)
    choices = [_choices(text) if index % 2 else [text] for index, text in enumerate(texts)]
    if math.prod(len(each) for each in choices) > MAX_SHARDS:
        raise ValueError(f"stands for more than {MAX_SHARDS:,} shards")
    return ["".join(each) for each in itertools.product(*choices)]


def _choices(text: str) -> list[str]:
    found = _RANGE.fullmatch(text)
    if found is None:
        if "," not in text:
            raise ValueError(f"has braces {{{text}}} that hold neither a range 000..099 nor a list a,b")
        return text.split(",")
    low, high = map(int, found.groups())
    if not 0 <= high - low < MAX_SHARDS:
        expected = "a first number that is not above the last" if high < low else f"at most {MAX_SHARDS:,}"
        raise ValueError(f"has the range {{{text}}}, expected {expected}")
    is_padded = any(len(number) > 1 and number.startswith("0") for number in found.groups())
    width = max(map(len, found.groups())) if is_padded else 1
    return [f"{number:0{width}}" for number in range(low, high + 1)]


def _is_match(key: str, pattern: str) -> bool:
    """Return True if a key matches a glob; as in folders, a star stands for no slash."""
    parts, patterns = key.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
