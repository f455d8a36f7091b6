"""Index of a source's shards: position, size and class of every sample's image.

The index is kept in the cache folder, per shard and for the whole source. That of the source is mapped into
memory, so millions of samples cost nothing to open.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from coursepack.canonical import fingerprint
from coursepack.console import inform, progress
from coursepack.data.sources.base import fields_only, sampled, sha256_of
from coursepack.data.sources.cache import (
    cache_folder,
    key_of,
    load_arrays,
    load_mapped,
    save_arrays,
    save_mapped,
)
from coursepack.data.sources.roots import summarize_names
from coursepack.data.sources.tar_shard import index_shard, member_name
from coursepack.errors import SourceError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from coursepack.data.sources.shards import Shard, Shards
    from coursepack.data.sources.tar_shard import Arrays

VERSION = "1"
"""Version of the index; changing it invalidates cached ones."""
CLASSES = "classes.json"
"""File beside the shards with a list of the class names."""
COLUMNS: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
    "label": (np.int64, ()),
    "offset": (np.int64, ()),
    "length": (np.uint32, ()),
    "size": (np.int32, (2,)),
    "header": (np.uint32, ()),
}
"""Dtype and shape per sample: class id, position and number of the image's bytes in its shard, height and
width, crc32c of the header before the image."""
KINDS = {"cls": ".cls members", "json": ".json members", "folder": "a folder for each class"}
"""Descriptions of where the classes of samples are."""
MAX_CLASSES = 1 << 20
MANY_BYTES = 1 << 30
"""Size of the shards from which on the progress of indexing is shown."""
THREADS = 4
"""Number of shards that are indexed at a time; those of a bucket are on the local disk meanwhile."""
_INTEGER = re.compile(r"[+-]?\d{1,18}", re.ASCII)


@dataclass(frozen=True)
class Index:
    """Index of a source's shards. Pickled without the columns if they are mapped from the cache."""

    shards: tuple[str, ...]
    """Names of the shards, relative to their folder."""
    first: NDArray[np.int64]
    """First sample of each shard, and the number of samples `(shards + 1,)`."""
    columns: Arrays
    """An array per row of `COLUMNS`."""
    class_names: tuple[str, ...]
    damaged: tuple[tuple[int, str, str], ...]
    """Samples whose images are damaged: sample, name of the member, description of the damage."""
    fingerprint: str
    tree_key: str
    """Key of the source in the cache folder."""
    listing: str
    """Digest of the shards' names, sizes and tags."""

    def __reduce__(self) -> tuple[Callable[[dict[str, Any]], Index], tuple[dict[str, Any]]]:
        columns = {
            name: str(column.filename) if isinstance(column, np.memmap) else column
            for name, column in self.columns.items()
        }
        return _unpickled, (fields_only(self) | {"columns": columns},)


def _unpickled(fields: dict[str, Any]) -> Index:
    columns = {
        name: np.load(column, mmap_mode="r") if isinstance(column, str) else column
        for name, column in fields["columns"].items()
    }
    return Index(**fields | {"columns": columns})


def open_index(
    name: str,
    place: Shards,
    shards: Sequence[Shard],
    *,
    json_key: str | None,
    class_names: tuple[str, ...] | None,
) -> Index:
    """Return the index of shards from the cache, or index those that are new or have changed.

    Args:
        name: name of the source.
        place: folder of the shards.
        shards: the shards, in the order of their samples.
        json_key: member of each sample's `.json` that is its class. None takes the class from `.cls`, or from
            the folder of the image if no sample has that.
        class_names: class names in the order of class ids, if they are known.

    Raises:
        SourceError: a shard cannot be indexed. The message names shard and sample.
    """
    tree_key = key_of("tar", name, str(place))
    listing = fingerprint(
        {
            "version": VERSION,
            "json": json_key,
            "classes": class_names,
            "shards": [[shard.name, shard.size, shard.tag] for shard in shards],
        }
    )
    found = _load(tree_key, listing)
    if found is not None:
        return found
    with _alone():
        # Another process may have indexed the shards in the meantime.
        return _load(tree_key, listing) or _Indexing(name, place, shards, json_key).index(
            tree_key, listing, class_names
        )


@contextmanager
def _alone() -> Iterator[None]:
    """Wait until no other process of this machine indexes; do not, if the cache cannot be written."""
    from coursepack.data.store.locations.local import LocalLocation

    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(LocalLocation(cache_folder() / "tar").lock())
        yield


def _load(tree_key: str, listing: str) -> Index | None:
    arrays = load_arrays(tree_key)
    if arrays is None or str(arrays.get("listing")) != listing:
        return None
    count, columns = int(arrays["first"][-1]), {}
    for name, (dtype, shape) in COLUMNS.items():
        column = load_mapped(key_of(tree_key, name), listing[:16], (count, *shape), dtype)
        if column is None:
            return None
        columns[name] = column
    return _index(tree_key, arrays, columns)


def _index(tree_key: str, arrays: Arrays, columns: Arrays) -> Index:
    damage = (arrays[key].tolist() for key in ("damaged", "damaged_names", "damage"))
    return Index(
        tuple(arrays["shards"].tolist()),
        arrays["first"],
        columns,
        tuple(arrays["classes"].tolist()),
        tuple(zip(*damage, strict=True)),
        str(arrays["fingerprint"]),
        tree_key,
        str(arrays["listing"]),
    )


@dataclass(frozen=True)
class _Indexing:
    """Indexing of the shards of one source."""

    name: str
    place: Shards
    shards: Sequence[Shard]
    json_key: str | None

    def index(self, tree_key: str, listing: str, class_names: tuple[str, ...] | None) -> Index:
        """Index the shards, write the index to the cache and return it."""
        self._report_changes(load_arrays(tree_key))
        found = self._index_all()
        first = np.cumsum([0, *(len(arrays["offset"]) for arrays in found)], dtype=np.int64)
        if not first[-1]:
            raise self._error("no shard has samples")
        self._refuse_duplicates(found, first)
        columns = {
            name: np.concatenate([arrays[name] for arrays in found]) for name in COLUMNS if name != "label"
        }
        columns["label"], class_names = self._labels(found, class_names)
        damaged = [arrays["damaged"] + start for arrays, start in zip(found, first[:-1], strict=True)]
        arrays = {
            "listing": np.array(listing),
            "shards": np.array([shard.name for shard in self.shards]),
            "bytes": np.array([shard.size for shard in self.shards], dtype=np.int64),
            "tags": np.array([shard.tag for shard in self.shards]),
            "first": first,
            "classes": np.array(class_names, dtype=np.str_),
            "damaged": np.concatenate(damaged),
            "damaged_names": np.concatenate([each["damaged_names"] for each in found]),
            "damage": np.concatenate([each["damage"] for each in found]),
        }
        arrays["fingerprint"] = np.array(self._fingerprint(arrays, columns, found))
        for name, column in columns.items():
            save_mapped(key_of(tree_key, name), listing[:16], column)
        save_arrays(tree_key, arrays)
        return _load(tree_key, listing) or _index(tree_key, arrays, columns)

    def _report_changes(self, old: Arrays | None) -> None:
        if old is None or not {"shards", "bytes", "tags"} <= old.keys():
            return
        before = dict(
            zip(
                old["shards"].tolist(),
                zip(old["bytes"].tolist(), old["tags"].tolist(), strict=True),
                strict=True,
            )
        )
        changed = [
            self.place.where(shard.name)
            for shard in self.shards
            if before.get(shard.name, (shard.size, shard.tag)) != (shard.size, shard.tag)
        ]
        if changed:
            inform(
                f"source {self.name!r}: {len(changed)} shards have changed since they were indexed, and are "
                f"indexed again: {summarize_names(changed)}"
            )

    def _index_all(self) -> list[Arrays]:
        total = sum(shard.size for shard in self.shards)
        meters = progress(f"index {self.name}", len(self.shards), "shards", shown=total >= MANY_BYTES)
        found = []
        with meters as meter, ThreadPoolExecutor(THREADS) as pool:
            for arrays in pool.map(self._shard, self.shards):
                found.append(arrays)
                meter.advance(1)
        return found

    def _shard(self, shard: Shard) -> Arrays:
        where = self.place.where(shard.name)
        key = key_of("shard", where, self.json_key or "")
        state = key_of(VERSION, str(shard.size), shard.tag)
        arrays = load_arrays(key)
        if arrays is None or str(arrays.get("state")) != state:
            try:
                with self.place.open(shard.name) as file:
                    arrays = index_shard(file, self.json_key)
            except (OSError, ValueError) as error:
                problem = error.strerror if isinstance(error, OSError) else None
                raise self._error(f"shard {where} {problem or error}") from error
            arrays["state"] = np.array(state)
            save_arrays(key, arrays)
        return arrays

    def _refuse_duplicates(self, found: list[Arrays], first: NDArray[np.int64]) -> None:
        keys = np.concatenate([arrays["key"] for arrays in found])
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(np.diff(keys[order]) == 0)
        if not len(same):
            return
        samples = order[same[0] : same[0] + 2]
        shards = np.searchsorted(first, samples, side="right") - 1
        offset = found[shards[0]]["offset"][samples[0] - first[shards[0]]]
        member = member_name(self.place, self.shards[shards[0]].name, int(offset))
        left, right = (self.place.where(self.shards[shard].name) for shard in shards)
        raise self._error(
            f"{left} and {right} both have the sample of {member!r}, and {len(same):,} samples are in more "
            "than one shard: every sample needs a key of its own"
        )

    def _labels(
        self, found: list[Arrays], class_names: tuple[str, ...] | None
    ) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Return class ids `(N,)` and class names."""
        filled = [index for index, arrays in enumerate(found) if len(arrays["offset"])]
        kinds = {str(found[index]["kind"]): self.shards[index].name for index in filled}
        if len(kinds) > 1:
            texts = [f"{shard} has {KINDS[kind]}" for kind, shard in kinds.items()]
            raise self._error(f"classes are given in different ways: {', but '.join(texts)}")
        (kind,) = kinds
        if class_names is None and kind == "folder":
            class_names = tuple(sorted({text for arrays in found for text in arrays["classes"].tolist()}))
        known = None if class_names is None else {name: label for label, name in enumerate(class_names)}
        labels = []
        for shard, arrays in zip(self.shards, found, strict=True):
            ids = []
            for index, text in enumerate(arrays["classes"].tolist()):
                try:
                    ids.append(_class_id(text, kind, known))
                except ValueError as error:
                    offset = int(arrays["offset"][np.flatnonzero(arrays["class"] == index)[0]])
                    member = member_name(self.place, shard.name, offset)
                    where = self.place.where(shard.name)
                    raise self._error(f"shard {where} has the class of {member!r} as {error}") from error
            labels.append(np.array(ids, dtype=np.int64)[arrays["class"]])
        every = np.concatenate(labels)
        return every, class_names or tuple(str(label) for label in range(int(every.max()) + 1))

    def _fingerprint(self, arrays: Arrays, columns: Arrays, found: list[Arrays]) -> str:
        """Return the sha256 over shards, index and the content of 64 images, but no path and no time."""
        content = []
        for sample in sampled(len(columns["offset"])).tolist():
            shard = int(np.searchsorted(arrays["first"], sample, side="right")) - 1
            start = int(columns["offset"][sample])
            stop = start + int(columns["length"][sample])
            (piece,) = self.place.read(self.shards[shard].name, [start], [stop])
            content.append(int(google_crc32c.value(piece)))
        return fingerprint(
            {
                "shards": arrays["shards"].tolist(),
                "bytes": arrays["bytes"].tolist(),
                "samples": arrays["first"].tolist(),
                "names": [str(each["names"]) for each in found],
                "classes": arrays["classes"].tolist(),
                "content": content,
                **{name: sha256_of(columns[name]) for name in ("label", "offset", "length", "size")},
            }
        )

    def _error(self, problem: str) -> SourceError:
        return SourceError(f"source {self.name!r} cannot be read: {problem}")


def _class_id(text: str, kind: str, known: dict[str, int] | None) -> int:
    """Return the id of a class that is given as an integer or, if names are known, by its name."""
    if kind != "folder" and _INTEGER.fullmatch(text):
        label, most = int(text), MAX_CLASSES if known is None else len(known)
        if not 0 <= label < most:
            raise ValueError(f"{label}, expected 0 to {most - 1}")
        return label
    if known is None:
        raise ValueError(
            f"{text!r}, expected an integer. Names are known from a file {CLASSES} beside the shards, a list "
            "of all names in the order of their ids"
        )
    if text not in known:
        near = nearest(text, known)
        hint = f" Did you mean {near!r}?" if near else ""
        raise ValueError(f"{text!r}, which is not among the {len(known):,} names in {CLASSES}.{hint}")
    return known[text]
