"""Loading and parsing of manifests, which are treated as untrusted input."""

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
from coursepack.errors import RecipeError, StoreDamaged, StoreIncomplete, StoreMismatch, StoreNotFound
from coursepack.parsing import parse_json

if TYPE_CHECKING:
    from pathlib import Path

    from coursepack.data.store.locations.base import Location

MAX_BYTES = 32 << 20
"""Maximum size of a manifest, checked before it is read: parsing needs about six times its size in memory. A
manifest of 100,000 files has a tenth of this size."""
COPY_MARK = "copy.json"
"""Object in the target of a copy from its first file until its manifest is written; see `copying`."""
ADVICE = (
    "Put a copy of it back; without one, remove it and run the same `precompute run` again, which writes "
    "every row again."
)
"""Advice in errors about a damaged manifest."""


def parse_manifest(text: str | bytes, where: str, location: Location | None = None) -> Manifest:
    """Parse a manifest.

    Args:
        text: output of `Manifest.to_json`.
        where: address of the store, for error messages.
        location: location from which lists of views are read, required only if the manifest has such lists.

    Raises:
        StoreDamaged: the text is not a valid manifest.
        StoreMismatch: this release does not support the format version.
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
        StoreNotFound: there is no store at this address.
        StoreIncomplete: a writer was interrupted before it wrote the manifest.
        StoreDamaged, StoreMismatch: as `parse_manifest`.
    """
    return load_tagged(open_location(where))[0]


def load_tagged(location: Location) -> tuple[Manifest, str]:
    """Read a store's manifest and the tag of its object.

    Raises:
        StoreNotFound, StoreIncomplete, StoreDamaged, StoreMismatch: as `load_manifest`.
    """
    try:
        text, tag = location.get_tagged(MANIFEST, MAX_BYTES)
    except RecipeError:  # the location cannot be used at all
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        check_not_copied(location)
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
    """Return True if the location has an object with this key."""
    try:
        location.size(key)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_not_copied(location: Location) -> None:
    """Check that a location is not the target of a copy that has not finished.

    Raises:
        StoreIncomplete: it is.
    """
    if has_object(location, COPY_MARK):
        raise StoreIncomplete(
            f"{str(location)!r} is a copy that has not finished. Run the same `precompute copy` again, which "
            f"goes on where it stopped. To give up that copy, remove {location.where(COPY_MARK)!r}."
        )


def check_not_foreign(location: Location, option: str = "--store") -> None:
    """Check that a location does not contain foreign data.

    Args:
        location: location of a store that is to be created.
        option: option or argument that gives the location, for the error.

    Raises:
        StoreMismatch: the location is a file, or contains a Zarr group or array not written by coursepack.
    """
    try:
        found = location.get(METADATA, MAX_BYTES)
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise StoreMismatch(
            f"{str(location)!r} is a file, expected a folder for the store: use another {option}"
        ) from error
    except ValueError:
        found = b""
    if found not in (_begun(version) for version in VERSIONS):
        raise StoreMismatch(
            f"{str(location)!r} holds Zarr data that is no coursepack store: use another {option}"
        )


def _begun(version: int) -> bytes:
    """Return the root group metadata as a writer of this format version writes it."""
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
