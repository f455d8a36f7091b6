"""Planned contents of a store, and the resulting manifest of a new or extended store."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from coursepack.canonical import difference_table, fingerprint
from coursepack.data.encodings import drops_classes
from coursepack.data.store.contents import Entries
from coursepack.data.store.layout import plan_array, plan_block_rows, plan_table
from coursepack.data.store.manifest import (
    FORMAT_VERSION,
    LABELS,
    LOGITS,
    STATIC,
    Manifest,
    StoredArray,
    Table,
)
from coursepack.data.store.versions import ListReader
from coursepack.errors import RecipeError, StoreMismatch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from coursepack.data.encodings import Encoding


@dataclass(frozen=True)
class StorePlan:
    """Planned contents of a store."""

    identity: dict[str, Any]
    """Everything that determines the stored values; see `Manifest.identity`."""
    origin: dict[str, Any]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    views: int
    arrays: dict[str, tuple[Encoding, tuple[int, ...]]]
    """Encoding and row shape of each quantity."""
    static: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Constants of the teacher by name; each has at least one dimension."""
    block_rows: int | None = None
    """Rows per block; None keeps those of an existing store, or derives them from the row widths."""
    format_version: int = FORMAT_VERSION
    """Format version of a new store; an existing store keeps its own."""

    def tables(self) -> dict[str, NDArray[Any]]:
        """Return the arrays without views, by path in the store."""
        return {LABELS: self.labels, **{f"{STATIC}/{name}": value for name, value in self.static.items()}}


def fresh_manifest(plan: StorePlan) -> Manifest:
    """Return the manifest of a new store, without committed files."""
    rows = len(plan.labels)
    components = {name: encoding.components(shape) for name, (encoding, shape) in plan.arrays.items()}
    widths = [part.row_bytes for parts in components.values() for part in parts.values()]
    block_rows = plan_block_rows(rows, widths) if plan.block_rows is None else min(plan.block_rows, rows)
    manifest = Manifest(
        identity=plan.identity,
        origin=plan.origin,
        samples=rows,
        class_names=plan.class_names,
        views=plan.views,
        block_rows=block_rows,
        arrays=_planned_arrays(plan, block_rows),
        tables=_planned_tables(plan),
        format_version=plan.format_version,
    )
    _check_known(manifest)
    if plan.format_version == 1:
        return manifest
    return replace(manifest, entries=Entries({}, ListReader(manifest, None)))


def _check_known(manifest: Manifest) -> None:
    """Check that the encoding can hold the logits of a teacher that does not know all classes."""
    if manifest.knows_all:
        return
    encoding = manifest.arrays[LOGITS].encoding
    if drops_classes(encoding):
        raise RecipeError(
            f"encoding {encoding.name} keeps the logit of the label, which a teacher that knows "
            f"{len(manifest.known_classes)} of {len(manifest.class_names)} classes may not have: give "
            "--encoding float16 or int8"
        )


def extended_manifest(plan: StorePlan, stored: Manifest, where: str) -> Manifest:
    """Return a store's manifest with the views and arrays of the plan added; committed files are unchanged.

    Raises:
        StoreMismatch: the store was written by another recipe, or has an array in another encoding or shape.
        RecipeError: the plan's block rows differ from the store's.
    """
    if fingerprint(plan.identity) != stored.fingerprint:
        table = difference_table(stored.identity, plan.identity, "store", "recipe")
        raise StoreMismatch(
            f"store {where!r} was written by another recipe.\n{table}\n"
            "Use another --store, or the recipe that wrote this one."
        )
    if plan.block_rows is not None and min(plan.block_rows, stored.samples) != stored.block_rows:
        raise RecipeError(
            f"block rows are {plan.block_rows}, but store {where!r} was made with {stored.block_rows} "
            "and keeps them: leave --block-rows out"
        )
    planned = _planned_arrays(plan, stored.block_rows)
    for name in sorted(planned.keys() & stored.arrays.keys()):
        held, wanted = (
            {"encoding": array.encoding.to_dict(), "row_shape": list(array.row_shape)}
            for array in (stored.arrays[name], planned[name])
        )
        if held != wanted:
            flag = "--encoding" if name == LOGITS else "--feature-encoding"
            same_shape = held["row_shape"] == wanted["row_shape"]
            hint = f", or {flag} {stored.arrays[name].encoding.name}" if same_shape else ""
            raise StoreMismatch(
                f"store {where!r} holds {name!r} in another form.\n"
                f"{difference_table(held, wanted, 'store', 'recipe')}\nUse another --store{hint}."
            )
    return replace(
        stored,
        arrays={**planned, **stored.arrays},
        tables={**_planned_tables(plan), **stored.tables},
        views=max(plan.views, stored.views),
    )


def _planned_arrays(plan: StorePlan, block_rows: int) -> dict[str, StoredArray]:
    return {
        name: StoredArray(
            encoding,
            shape,
            {part: plan_array(spec, block_rows) for part, spec in encoding.components(shape).items()},
        )
        for name, (encoding, shape) in plan.arrays.items()
    }


def _planned_tables(plan: StorePlan) -> dict[str, Table]:
    return {
        name: Table(len(values), plan_table(len(values), str(values.dtype), values.shape[1:]))
        for name, values in plan.tables().items()
    }
