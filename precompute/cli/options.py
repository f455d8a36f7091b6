"""Options that several subcommands have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import os


class StorePath(click.Path):
    """Type of an option for a store: the path of a folder, or an address `SCHEME://...`."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Return an address as text, and the path of a folder as a `Path`."""
        from coursepack.data.store.locations import path_or_address

        where = path_or_address(str(value))
        return where if isinstance(where, str) else super().convert(value, param, ctx)


STORE_PATH = StorePath(path_type=Path)
SINGLE_WRITER = click.option(
    "--single-writer",
    is_flag=True,
    help="Write to a bucket without conditional writes; no other process may write to the store.",
)
