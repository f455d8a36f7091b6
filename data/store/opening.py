"""Reading a store's manifest, which somebody else may have written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coursepack.canonical import canonical_json, fingerprint
from coursepack.data.encodings import encoding_from_dict
from coursepack.data.store.layout import layout_from_dict, whole
from coursepack.data.store.locations import open_location
from coursepack.data.store.manifest import CHECKSUM, FORMAT, MANIFEST, Manifest, StoredArray, Table
from coursepack.data.store.validation import check_structure, listed, mapping
from coursepack.data.store.versions import VERSIONS
from coursepack.data.store.zarr_metadata import METADATA, group_attributes, group_metadata
from coursepack.errors import StoreDamaged, StoreIncomplete, StoreMismatch, StoreNotFound
from coursepack.parsing import parse_json

if TYPE_CHECKING:
    from pathlib import Path

    from coursepack.data.store.locations.base import Location

MOST_BYTES = 32 << 20
"""A longer manifest is refused unread: one takes about six times its length to read. Manifests of 100,000
files have a tenth of that."""
ADVICE = (
    "Put a copy of it back; without one, remove it and run the same `precompute run` again, which writes "
    "every row again."
)
"""What to do about a damaged manifest."""


def parse_manifest(text: str | bytes, where: str, location: Location | None = None) -> Manifest:
    """The manifest in canonical text.

    Args:
        text: as `Manifest.to_json` gives it.
        where: the store's address, for errors.
        location: what the lists of its views are read from, if it has such lists.

    Raises:
        StoreDamaged: the text is not a manifest.
        StoreMismatch: it is one of a format version that this release cannot read.
    """
    try:
        values = parse_json(text)
        if values.get("format") != FORMAT:
            raise StoreDamaged(f"{where!r} is not the manifest of a coursepack store")
        if values["format_version"] not in VERSIONS:
            raise StoreMismatch(
                f"store {where!r} has format version {values['format_version']!r:.40}, this release reads "
                f"{' and '.join(map(str, VERSIONS))}. Install a newer coursepack."
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
            format_version=values["format_version"],
        )
        check_structure(manifest)
        return VERSIONS[manifest.format_version].parse(manifest, values, location)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, StoreMismatch):
            raise
        fault = f"{error!r:.300}"
        raise StoreDamaged(f"the manifest of {where!r} cannot be understood: {fault}. {ADVICE}") from error


def load_manifest(where: str | Path | Location) -> Manifest:
    """Read a store's manifest.

    Raises:
        StoreNotFound: there is no store there.
        StoreIncomplete: a writer stopped before the manifest existed.
        StoreDamaged, StoreMismatch: as `parse_manifest`.
    """
    return load_tagged(open_location(where))[0]


def load_tagged(location: Location) -> tuple[Manifest, str]:
    """A store's manifest and the tag of its object.

    Raises:
        As `load_manifest`.
    """
    try:
        text, tag = location.get_tagged(MANIFEST, MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        if has_object(location, METADATA):
            raise StoreIncomplete(
                f"{str(location)!r} has no {MANIFEST}: it is not a coursepack store, or writing it stopped "
                "at once. Run the same `precompute run` again."
            ) from error
        raise StoreNotFound(
            f"there is no store at {str(location)!r}. Make one with `precompute run ... --store {location}`."
        ) from error
    except ValueError as error:
        raise StoreDamaged(f"the manifest of {str(location)!r} {error}. {ADVICE}") from error
    except OSError as error:
        fault = error.strerror or str(error)
        raise StoreDamaged(f"the manifest of {str(location)!r} cannot be read: {fault}") from error
    return parse_manifest(text, str(location), location), tag


def has_object(location: Location, key: str) -> bool:
    """Whether there is an object of this key."""
    try:
        location.size(key)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_not_foreign(location: Location) -> None:
    """Refuse a place that coursepack did not begin.

    Raises:
        StoreMismatch: it is a file, or holds somebody else's Zarr group or array.
    """
    try:
        found = location.get(METADATA, MOST_BYTES)
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise StoreMismatch(
            f"{str(location)!r} is a file, expected a folder for the store: use another --store"
        ) from error
    except ValueError:
        found = b""
    if found not in (_begun(version) for version in VERSIONS):
        raise StoreMismatch(
            f"{str(location)!r} holds Zarr data that is no coursepack store: use another --store"
        )


def _begun(version: int) -> bytes:
    """The metadata that a writer leaves first."""
    return canonical_json(group_metadata(group_attributes("", version)), indent=1).encode()


def _stored_array(values: dict[str, Any]) -> StoredArray:
    encoding = encoding_from_dict(values["encoding"])
    if encoding.to_dict() != values["encoding"]:
        raise ValueError(f"{values['encoding']!r:.80} is no encoding")
    return StoredArray(
        encoding=encoding,
        row_shape=tuple(whole(side, 1) for side in values["row_shape"]),
        components={name: layout_from_dict(layout) for name, layout in values["components"].items()},
    )
