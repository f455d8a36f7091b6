"""The manifest: the one file that says what a store holds. Readers believe it and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coursepack.canonical import canonical_json, fingerprint
from coursepack.data.encodings import Encoding, encoding_from_dict
from coursepack.data.store.layout import ArrayLayout, layout_from_dict, whole
from coursepack.data.store.validation import check_manifest, listed, mapping
from coursepack.data.store.zarr_metadata import METADATA, array_metadata, group_metadata
from coursepack.errors import StoreDamaged, StoreIncomplete, StoreMismatch, StoreNotFound
from coursepack.parsing import parse_json

FORMAT = "coursepack store"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LABELS = "labels"
LOGITS = "logits"
STATIC = "static"
MOST_BYTES = 32 << 20
"""A longer manifest is refused unread: one takes about six times its length to read. Manifests of 100,000
files have a tenth of that."""
CHECKSUM = "checksum"
"""Member of the manifest: sha256 of the canonical JSON of all others."""
ADVICE = (
    "Put a copy of it back; without one, remove it and run the same `precompute run` again, which writes "
    "every row again."
)
"""What to do about a damaged manifest."""


@dataclass(frozen=True)
class StoredArray:
    """One quantity, `logits` or `features/<tap>`: its encoding and the arrays that it is made of."""

    encoding: Encoding
    row_shape: tuple[int, ...]
    components: dict[str, ArrayLayout]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "encoding": self.encoding.to_dict(),
            "row_shape": list(self.row_shape),
            "components": {name: layout.to_dict() for name, layout in self.components.items()},
        }

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all components."""
        return sum(layout.row_bytes for layout in self.components.values())


@dataclass(frozen=True)
class Table:
    """An array without views: `labels`, and what belongs to the teacher under `static/`."""

    rows: int
    layout: ArrayLayout

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array."""
        return (self.rows, *self.layout.row_shape)


@dataclass(frozen=True)
class Manifest:
    """Everything a reader or a resuming writer needs to know."""

    identity: dict[str, Any]
    """What determines the stored values: teacher, view recipe, source, precision."""
    origin: dict[str, Any]
    """Where the teacher's weights and the source's files were."""
    samples: int
    class_names: tuple[str, ...]
    views: int
    """Views planned so far; `committed` says which are there."""
    block_rows: int
    arrays: dict[str, StoredArray]
    tables: dict[str, Table]
    committed: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Views that are complete, per array."""
    view_records: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per view: statistics, digests of the drawn parameters per block, and library versions."""
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Size in bytes and `shard_checksum` of every data file that is vouched for."""

    @property
    def fingerprint(self) -> str:
        """sha256 of what determines the stored values."""
        return fingerprint(self.identity)

    @property
    def view_fingerprint(self) -> str:
        """sha256 of view recipe and source."""
        return str(self.identity["view"]["fingerprint"])

    @property
    def source_root(self) -> str | None:
        """Where the source's files were when the store was begun, for sources of files."""
        root = self.origin.get("root")
        return root if isinstance(root, str) and Path(root).is_absolute() else None

    def committed_views(self, arrays: list[str] | None = None) -> tuple[int, ...]:
        """Views for which all the given arrays (by default all there are) are committed."""
        names = list(self.arrays) if arrays is None else arrays
        common = set.intersection(*(set(self.committed.get(name, ())) for name in names))
        return tuple(sorted(common))

    def zarr_arrays(self) -> dict[str, tuple[ArrayLayout, tuple[int, ...]]]:
        """Layout and shape of every Zarr array of the store, by its path."""
        arrays = {name: (table.layout, table.shape) for name, table in self.tables.items()}
        for name, array in self.arrays.items():
            for component, layout in array.components.items():
                arrays[f"{name}/{component}"] = (layout, (self.views, self.samples, *layout.row_shape))
        return arrays

    def with_files(self, files: dict[str, tuple[int, int]]) -> Manifest:
        """A manifest that vouches for more files."""
        return replace(self, files={**self.files, **files})

    def to_json(self) -> str:
        """The canonical text that is stored."""
        values = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
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
            "committed": {name: list(views) for name, views in self.committed.items()},
            "view_records": self.view_records,
            "files": {key: list(value) for key, value in self.files.items()},
        }
        return canonical_json({**values, CHECKSUM: fingerprint(values)}, indent=1)


def parse_manifest(text: str | bytes, where: str) -> Manifest:
    """The manifest in canonical text.

    Raises:
        StoreDamaged: the text is not a manifest.
        StoreMismatch: it is one of a format version that this release cannot read.
    """
    try:
        values = parse_json(text)
        if values.get("format") != FORMAT:
            raise StoreDamaged(f"{where!r} is not the manifest of a coursepack store")
        if values["format_version"] != FORMAT_VERSION:
            raise StoreMismatch(
                f"store {where!r} has format version {values['format_version']!r:.40}, this release reads "
                f"{FORMAT_VERSION}. Install a newer coursepack."
            )
        if values.pop(CHECKSUM, None) != fingerprint(values):
            raise StoreDamaged(f"the manifest of {where!r} does not match its own checksum. {ADVICE}")
        manifest = Manifest(
            identity=mapping(values["identity"]),
            origin=mapping(values["origin"]),
            samples=whole(values["samples"], 1),
            class_names=tuple(listed(values["class_names"], str)),
            views=whole(values["views"], 1),
            block_rows=whole(values["block_rows"], 1),
            arrays={name: _stored_array(array) for name, array in values["arrays"].items()},
            tables={
                name: Table(whole(table["rows"], 1), layout_from_dict(table["layout"]))
                for name, table in values["tables"].items()
            },
            committed={name: tuple(map(whole, views)) for name, views in values["committed"].items()},
            view_records=mapping(values["view_records"]),
            files={key: (whole(size), whole(crc)) for key, (size, crc) in values["files"].items()},
        )
        check_manifest(manifest)
        return manifest
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, StoreMismatch):
            raise
        fault = f"{error!r:.300}"
        raise StoreDamaged(f"the manifest of {where!r} cannot be understood: {fault}. {ADVICE}") from error


def load_manifest(path: Path) -> Manifest:
    """Read a store's manifest.

    Raises:
        StoreNotFound: there is no store at `path`.
        StoreIncomplete: a writer stopped before the manifest existed.
        StoreDamaged, StoreMismatch: as `parse_manifest`.
    """
    if not (path / MANIFEST).is_file():
        if (path / "zarr.json").is_file():
            raise StoreIncomplete(
                f"{str(path)!r} has no {MANIFEST}: it is not a coursepack store, or writing it stopped at "
                "once. Run the same `precompute run` again."
            )
        raise StoreNotFound(
            f"there is no store at {str(path)!r}. Make one with `precompute run ... --store {path}`."
        )
    if (size := (path / MANIFEST).stat().st_size) > MOST_BYTES:
        raise StoreDamaged(
            f"the manifest of {str(path)!r} has {size:,} bytes, expected at most {MOST_BYTES:,}. {ADVICE}"
        )
    return parse_manifest((path / MANIFEST).read_bytes(), str(path))


def check_not_foreign(path: Path) -> None:
    """Refuse a place that coursepack did not begin.

    Raises:
        StoreMismatch: `path` is a file, or holds somebody else's Zarr group or array.
    """
    if path.exists() and not path.is_dir():
        raise StoreMismatch(f"{str(path)!r} is a file, expected a folder for the store: use another --store")
    metadata = path / "zarr.json"
    if metadata.is_file() and metadata.read_bytes() != canonical_json(_group_metadata(""), indent=1).encode():
        raise StoreMismatch(f"{str(path)!r} holds Zarr data that is no coursepack store: use another --store")


def zarr_metadata(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Every zarr.json of a store by its key, arrays first and the group's own last."""
    metadata = {
        f"{path}/{METADATA}": array_metadata(layout, shape)
        for path, (layout, shape) in manifest.zarr_arrays().items()
    }
    return metadata | {_metadata_key(group): _group_metadata(group) for group in _zarr_groups(manifest)}


def zarr_keys(manifest: Manifest) -> list[str]:
    """Keys of `zarr_metadata`."""
    arrays = [f"{path}/{METADATA}" for path in manifest.zarr_arrays()]
    return arrays + [_metadata_key(group) for group in _zarr_groups(manifest)]


def _zarr_groups(manifest: Manifest) -> list[str]:
    """Paths of the groups, inner ones first; the store's own is empty."""
    groups = {""}
    for path in manifest.zarr_arrays():
        parents = path.split("/")[:-1]
        groups |= {"/".join(parents[: depth + 1]) for depth in range(len(parents))}
    return sorted(groups, reverse=True)


def _metadata_key(group: str) -> str:
    return f"{group}/{METADATA}" if group else METADATA


def _group_metadata(group: str) -> dict[str, Any]:
    return group_metadata({} if group else {"coursepack": {"format_version": FORMAT_VERSION}})


def _stored_array(values: dict[str, Any]) -> StoredArray:
    encoding = encoding_from_dict(values["encoding"])
    if encoding.to_dict() != values["encoding"]:
        raise ValueError(f"{values['encoding']!r:.80} is no encoding")
    return StoredArray(
        encoding=encoding,
        row_shape=tuple(whole(side, 1) for side in values["row_shape"]),
        components={name: layout_from_dict(layout) for name, layout in values["components"].items()},
    )
