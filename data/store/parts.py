"""Parts of a store: some of its views and arrays, as a manifest, and what another store has of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from coursepack.canonical import difference_table
from coursepack.data.store.contents import ViewEntry
from coursepack.data.store.layout import table_key
from coursepack.data.store.manifest import FEATURES, LOGITS, STATIC
from coursepack.errors import RecipeError, StoreIncomplete, StoreMismatch, UnknownName

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.data.store.manifest import Manifest


def part_of(
    stored: Manifest, views: Sequence[range] | None, arrays: Sequence[str] | None, where: str
) -> Manifest:
    """Return a store's manifest with some of its views and arrays; its entries are those of the whole store.

    Raises:
        UnknownName, RecipeError, StoreIncomplete: as `copy_store`.
    """
    names = list(stored.arrays) if arrays is None else list(dict.fromkeys(arrays))
    for name in names:
        if name not in stored.arrays:
            raise UnknownName(f"array of store {where!r}", name, stored.arrays)
    if LOGITS not in names:
        raise RecipeError(f"arrays are {', '.join(names)}, but every store has {LOGITS}: add it")
    chosen = _chosen_views(stored, names, views, where)
    dropped = {f"{STATIC}/{name.removeprefix(FEATURES)}" for name in stored.arrays if name not in names}
    tables = {name: table for name, table in stored.tables.items() if name not in dropped}
    keys = {table_key(name, table.layout) for name, table in tables.items()}
    committed = {name: tuple(v for v in stored.committed.get(name, ()) if v in chosen) for name in names}
    return replace(
        stored,
        arrays={name: stored.arrays[name] for name in names},
        tables=tables,
        table_files={key: file for key, file in stored.table_files.items() if key in keys},
        committed={name: held for name, held in committed.items() if held},
        views=stored.views if views is None else max(chosen) + 1,
    )


def _chosen_views(
    stored: Manifest, names: Sequence[str], views: Sequence[range] | None, where: str
) -> frozenset[int]:
    finished = stored.committed.get(LOGITS, ())
    if not finished:
        raise StoreIncomplete(
            f"store {where!r} has finished none of its {stored.views} views, so there is nothing to copy: "
            "finish it with `precompute run`"
        )
    if views is None:
        return frozenset(finished)
    for asked in views:
        if asked.stop > stored.views:
            raise RecipeError(
                f"view {asked.stop - 1} is out of range: the views of store {where!r} are 0 to "
                f"{stored.views - 1}"
            )
    chosen = frozenset(view for asked in views for view in asked)
    for name in names:
        if missing := sorted(chosen - set(stored.committed.get(name, ()))):
            raise StoreIncomplete(
                f"view {missing[0]} of {name!r} is not finished in store {where!r} (and {len(missing) - 1} "
                "more of those asked for): finish them with `precompute run`, or leave them out"
            )
    return chosen


def with_part(start: Manifest, part: Manifest) -> Manifest:
    """Return a manifest with the views and arrays of a part added."""
    for view in views_of(part):
        names = [name for name, views in part.committed.items() if view in views]
        if any(view not in start.committed.get(name, ()) for name in names):
            entry = entry_of(part, view)
            start = start.with_view(view, names, entry.files, entry.record or {})
    return start


def check_fits(part: Manifest, before: Manifest, origin: str, goal: str) -> None:
    """Check that a store at the target has the same rows as the part, where it has any of them.

    Raises:
        StoreMismatch: it does not.
    """
    if before.fingerprint != part.fingerprint:
        table = difference_table(before.identity, part.identity, "target", "source")
        raise StoreMismatch(f"{goal!r} is another store than {origin!r}.\n{table}\nGive another target.")
    names = before.arrays.keys() & part.arrays.keys()
    keys = before.table_files.keys() & part.table_files.keys()
    held, wanted = (
        {
            "block_rows": manifest.block_rows,
            "arrays": {name: manifest.arrays[name].to_dict() for name in names},
            "files": {key: list(manifest.table_files[key]) for key in keys},
        }
        for manifest in (before, part)
    )
    if held != wanted:
        table = difference_table(held, wanted, "target", "source")
        raise StoreMismatch(f"{goal!r} and {origin!r} have different forms.\n{table}\nGive another target.")
    for view in views_of(part):
        if view in before.entries:
            files = before.entries[view].files
            for key, file in entry_of(part, view).files.items():
                if files.get(key, file) != file:
                    raise StoreMismatch(
                        f"{goal!r} has other rows than {origin!r} in view {view}, file {key!r}, as from "
                        "another kind of machine: give another target"
                    )


def views_of(part: Manifest) -> list[int]:
    """Return the views of a part."""
    return sorted({view for views in part.committed.values() for view in views})


def entry_of(part: Manifest, view: int) -> ViewEntry:
    """Return the part of a view's entry that belongs to the part's arrays."""
    entry = part.entries[view]
    folders = {
        f"{name}/{component}"
        for name, views in part.committed.items()
        if view in views
        for component in part.arrays[name].components
    }
    files = {key: file for key, file in entry.files.items() if key.rpartition("/")[0] in folders}
    return ViewEntry(files, entry.record)
