"""Subcommand `precompute copy`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from coursepack.commands import Command
from coursepack.console import JSON, byte_size, print_json, printable
from coursepack.precompute.cli.options import SINGLE_WRITER, STORE_PATH
from coursepack.precompute.cli.stopping import stoppable

if TYPE_CHECKING:
    from pathlib import Path

_RANGE = re.compile(r"([0-9]{1,15})(?:-([0-9]{1,15}))?")


def _refuse_count(_ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """Refuse `--views`, which is a number of views in all other commands."""
    if value is not None:
        raise click.UsageError(
            "--views is a number of views in other commands: list those to copy with --view-indices, as in "
            "--view-indices 0-9 or 0-3,8"
        )


def _parse_indices(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[range] | None:
    """Parse ranges of views such as `0-3,8`, whose ends are included."""
    if value is None:
        return None
    ranges = []
    for text in value.split(","):
        match = _RANGE.fullmatch(text)
        views = range(0) if match is None else range(int(match[1]), int(match[2] or match[1]) + 1)
        if not views:
            raise click.BadParameter(f"{value!r} is not a list of views, as in 0-9 or 0-3,8")
        ranges.append(views)
    return ranges


def _parse_names(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else value.split(",")


EXAMPLES = """\b
Examples:
  precompute copy cnn.zarr copy.zarr
  precompute copy cnn.zarr part.zarr --view-indices 0-3,8 --arrays logits
"""


@click.command("copy", cls=Command, epilog=EXAMPLES)
@click.argument("source", type=STORE_PATH, metavar="SRC")
@click.argument("target", type=STORE_PATH, metavar="DST")
@click.option(
    "--view-indices",
    "views",
    callback=_parse_indices,
    metavar="LIST",
    help="Indices of the views to copy, such as 0-9 or 0-3,8.  [default: all finished ones]",
)
@click.option("--views", "_count", hidden=True, expose_value=False, callback=_refuse_count)
@click.option("--arrays", callback=_parse_names, metavar="NAMES",
              help="Arrays to copy, such as logits,features/layer3.  [default: all]")  # fmt: skip
@SINGLE_WRITER
@JSON
def copy(
    source: str | Path,
    target: str | Path,
    views: list[range] | None,
    arrays: list[str] | None,
    single_writer: bool,
    as_json: bool,
) -> None:
    """Copy a store, or a part of it, to another folder or bucket.

    Every file is compared with its checksum on the way. The copy can be read when it is complete; after an
    interruption, the same command continues it. A store that was copied before gets the views and arrays
    that it lacks.
    """
    from coursepack.data.store.copying import copy_store

    with stoppable([target], step="files"):
        copied = copy_store(source, target, views=views, arrays=arrays, single_writer=single_writer)
    manifest = copied.manifest
    if as_json:
        views_done = [int(view) for view in manifest.committed_views()]
        print_json({"store": str(target), "views": views_done, "arrays": list(manifest.arrays),
                    "copied_files": copied.files, "copied_bytes": copied.size})  # fmt: skip
        return
    finished = f"{len(manifest.committed_views())} of {manifest.views} views"
    click.echo(
        printable(
            f"{target}: {finished} of {', '.join(manifest.arrays)}, {byte_size(manifest.data_bytes)}; copied "
            f"{copied.files:,} files, {byte_size(copied.size)}"
        )
    )
