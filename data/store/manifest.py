"""The manifest of a store. It and the lists it references are the only source of truth for readers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coursepack.canonical import fingerprint
from coursepack.data.store.contents import Entries, Files, Records, ViewEntry, view_of
from coursepack.data.store.layout import ArrayLayout, table_key
from coursepack.data.store.records import TOTALS, add_totals, merge_environments
from coursepack.data.store.shards import rows_size, shard_size
from coursepack.data.store.versions import VERSIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coursepack.data.encodings import Encoding
    from coursepack.data.store.contents import FileEntry

FORMAT = "coursepack store"
FORMAT_VERSION = 2
"""Format version of new stores."""
MANIFEST = "manifest.json"
LABELS = "labels"
LOGITS = "logits"
FEATURES = "features/"
"""Prefix of the names of arrays that hold tapped features."""
STATIC = "static"
CHECKSUM = "checksum"
"""Manifest member with the sha256 of the canonical JSON of all other members."""


@dataclass(frozen=True)
class StoredArray:
    """One quantity, `logits` or `features/<tap>`: its encoding and component arrays."""

    encoding: Encoding
    row_shape: tuple[int, ...]
    components: dict[str, ArrayLayout]

    def to_dict(self) -> dict[str, Any]:
        """Return the array as plain values for the manifest."""
        return {
            "encoding": self.encoding.to_dict(),
            "row_shape": list(self.row_shape),
            "components": {name: layout.to_dict() for name, layout in self.components.items()},
        }

    @property
    def row_bytes(self) -> int:
        """Size of one row in bytes, summed over all components."""
        return sum(layout.row_bytes for layout in self.components.values())


@dataclass(frozen=True)
class Table:
    """An array without views: `labels`, or a constant of the teacher under `static/`."""

    rows: int
    layout: ArrayLayout

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array."""
        return (self.rows, *self.layout.row_shape)


@dataclass(frozen=True)
class Manifest:
    """Complete description of a store for readers and resuming writers."""

    identity: dict[str, Any]
    """Everything that determines the stored values: teacher, view recipe, source and precision."""
    origin: dict[str, Any]
    """Original paths of the teacher's weights and the source's files."""
    samples: int
    class_names: tuple[str, ...]
    views: int
    """Number of planned views; `committed` lists the completed ones."""
    block_rows: int
    arrays: dict[str, StoredArray]
    tables: dict[str, Table]
    committed: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Completed views of each array."""
    entries: Mapping[int, ViewEntry] = field(default_factory=dict)
    """Files and records of views; loaded lazily in format version 2."""
    table_files: dict[str, FileEntry] = field(default_factory=dict)
    environments: tuple[dict[str, Any], ...] = ()
    """Distinct environments in which committed views were written, sorted by canonical text."""
    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TOTALS, 0.0))
    """Sums of `rows` and `correct` over all committed views; integral values."""
    format_version: int = FORMAT_VERSION

    @property
    def files(self) -> Mapping[str, FileEntry]:
        """Size in bytes and `shard_checksum` of every committed data file, by key."""
        return Files(self.table_files, self.entries)

    @property
    def view_records(self) -> Mapping[str, dict[str, Any]]:
        """Statistics, digests of the drawn parameters per block, and environments of each view."""
        return Records(self.entries)

    @property
    def fingerprint(self) -> str:
        """sha256 of `identity`, which determines the stored values."""
        return fingerprint(self.identity)

    @property
    def view_fingerprint(self) -> str:
        """sha256 of the view recipe and the source."""
        return str(self.identity["view"]["fingerprint"])

    @property
    def known_classes(self) -> tuple[int, ...]:
        """Classes of the source that the teacher knows, in ascending order: the columns of its logits."""
        columns = self.identity.get("teacher", {}).get("columns") or [0] * len(self.class_names)
        return tuple(label for label, column in enumerate(columns) if column is not None)

    @property
    def knows_all(self) -> bool:
        """True if the teacher knows all classes of the source."""
        return len(self.known_classes) == len(self.class_names)

    @property
    def source_root(self) -> str | None:
        """Root folder of the source's files when the store was created; None for sources without files."""
        root = self.origin.get("root")
        return root if isinstance(root, str) and Path(root).is_absolute() else None

    @property
    def list_digests(self) -> dict[int, str]:
        """sha256 of the list of each view; empty for format version 1."""
        return self.entries.digests if isinstance(self.entries, Entries) else {}

    def committed_views(self, arrays: list[str] | None = None) -> tuple[int, ...]:
        """Return the views for which all given arrays (by default, all of the store's) are committed."""
        names = list(self.arrays) if arrays is None else arrays
        common = set.intersection(*(set(self.committed.get(name, ())) for name in names))
        return tuple(sorted(common))

    @property
    def data_bytes(self) -> int:
        """Total size in bytes of the files of tables and committed views, computed from their layouts."""
        total = sum(shard_size(table.rows, table.layout) for table in self.tables.values())
        for name, views in self.committed.items():
            layouts = self.arrays[name].components.values()
            total += len(views) * sum(rows_size(self.samples, layout) for layout in layouts)
        return total

    def zarr_arrays(self) -> dict[str, tuple[ArrayLayout, tuple[int, ...]]]:
        """Return layout and shape of every Zarr array of the store, by path."""
        arrays = {name: (table.layout, table.shape) for name, table in self.tables.items()}
        for name, array in self.arrays.items():
            for component, layout in array.components.items():
                arrays[f"{name}/{component}"] = (layout, (self.views, self.samples, *layout.row_shape))
        return arrays

    def with_view(
        self, view: int, arrays: Iterable[str], files: Mapping[str, FileEntry], record: dict[str, Any]
    ) -> Manifest:
        """Return a manifest with additional committed arrays of a view; an existing record is kept."""
        before = self.entries.get(view, ViewEntry())
        entry = ViewEntry({**before.files, **files}, record if before.record is None else before.record)
        committed = {name: tuple(sorted({*self.committed.get(name, ()), view})) for name in arrays}
        more = [record] if before.record is None else []
        return replace(
            self,
            committed={**self.committed, **committed},
            entries=self._changed({view: entry}),
            environments=merge_environments(self.environments, more),
            totals=add_totals(self.totals, more),
        )

    def with_files(self, files: Mapping[str, FileEntry]) -> Manifest:
        """Return a manifest with files of its tables and committed views added or replaced."""
        tables = {table_key(name, table.layout) for name, table in self.tables.items()}
        views: dict[int, dict[str, FileEntry]] = {}
        for key in files.keys() - tables:
            views.setdefault(view_of(key), {})[key] = files[key]
        changed = {
            view: replace(self.entries[view], files={**self.entries[view].files, **more})
            for view, more in views.items()
        }
        table_files = {**self.table_files, **{key: files[key] for key in files.keys() & tables}}
        return replace(self, table_files=table_files, entries=self._changed(changed))

    def only_views(self, views: Iterable[int]) -> Manifest:
        """Return a manifest in which only the given views are committed."""
        kept = set(views)
        if kept == set(self.entries):
            return self
        if isinstance(self.entries, Entries):
            entries: Mapping[int, ViewEntry] = self.entries.only(kept)
        else:
            entries = {view: entry for view, entry in self.entries.items() if view in kept}
        records = list(Records(entries).values())
        return replace(
            self,
            committed={name: tuple(v for v in held if v in kept) for name, held in self.committed.items()},
            entries=entries,
            environments=merge_environments((), records),
            totals=add_totals({}, records),
        )

    def _changed(self, entries: Mapping[int, ViewEntry]) -> Mapping[int, ViewEntry]:
        if isinstance(self.entries, Entries):
            return self.entries.changed(entries)
        return {**self.entries, **entries}

    def to_json(self) -> str:
        """Return the canonical JSON text that is stored, including its checksum."""
        values = {
            "format": FORMAT,
            "format_version": self.format_version,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "origin": self.origin,
            "samples": self.samples,
            "class_names": list(self.class_names),
            "views": self.views,
            "block_rows": self.block_rows,
            "arrays": {name: array.to_dict() for name, array in self.arrays.items()},
            "tables": {
                name: {"rows": table.rows, "layout": table.layout.to_dict()}
                for name, table in self.tables.items()
            },
            **VERSIONS[self.format_version].describe(self),
        }
        return VERSIONS[self.format_version].spell(values, CHECKSUM)
