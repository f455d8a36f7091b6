"""Sections on files of stores: arrays, missing views and blocks, checksums, and identity."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING

from coursepack.config import write_yaml
from coursepack.console import byte_size, progress
from coursepack.data.store import verify
from coursepack.data.store.done import done_objects
from coursepack.data.store.locations import open_location
from coursepack.data.store.owners import live_runs
from coursepack.pages.blocks import Cell, Code, Row, Section, Table, Text, count, text
from coursepack.precompute.numerics import describe_numerics, views_by_numerics

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from coursepack.pages.blocks import Block
    from coursepack.pages.problems import Problems
    from coursepack.precompute.page.opened import OpenedStore

MAX_DAMAGED = 20
"""Maximum number of damaged files of a store that are listed."""


def gaps_section(opened: Sequence[OpenedStore]) -> Section:
    """Return the arrays of the stores with their missing views, unfinished views, and running writers."""
    arrays, unfinished, writers = [], [], []
    for store in opened:
        manifest = store.manifest
        for name, array in manifest.arrays.items():
            committed = manifest.committed.get(name, ())
            missing = sorted({*range(manifest.views)} - {*committed})
            cells = (
                text(store.label),
                text(name),
                text(array.encoding.name),
                text(" x ".join(map(str, array.row_shape))),
                count(array.row_bytes),
                Cell(f"{len(committed)} of {manifest.views}", float(len(committed))),
                text(spans(missing) or "none"),
            )
            arrays.append(Row(cells, store.index))
        blocks = -(-manifest.samples // manifest.block_rows)
        done = Counter(view for view, _ in done_objects(open_location(store.address)))
        unfinished += [
            Row((text(store.label), count(view), Cell(f"{number} of {blocks}", float(number))), store.index)
            for view, number in sorted(done.items())
        ]
        writers += [
            Text(f"{store.label} is being written by process {run['pid']} on {run['host']}.")
            for run in live_runs(store.address)
        ]
    header = ("store", "array", "encoding", "row", "bytes a row", "views", "missing views")
    tables: list[Block] = [Table("Arrays and their views", header, tuple(arrays)), *writers]
    if unfinished:
        columns = ("store", "view", "finished blocks")
        tables.append(Table("Views that are not committed yet", columns, tuple(unfinished)))
    return Section("gaps", "Arrays and gaps", tuple(tables))


def spans(numbers: Iterable[int]) -> str:
    """Return sorted numbers as text, with runs of neighbors as spans.

    >>> spans([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ends)


def checks_section(opened: Sequence[OpenedStore], problems: Problems) -> Section:
    """Check every file against the manifests; damaged files are problems of the page."""
    rows = []
    for store in opened:
        with (
            problems.instead_of(f"checksums of {store.label}"),
            progress(f"verify {store.label}", store.manifest.data_bytes, "bytes") as meter,
        ):
            report = verify(store.address, on_file=meter.advance)
            for problem in report.problems[:MAX_DAMAGED]:
                problems.add(f"{store.address}: {problem}")
            if len(report.problems) > MAX_DAMAGED:
                more = len(report.problems) - MAX_DAMAGED
                problems.add(f"{store.address}: {more} more, see `precompute verify`")
            cells = (
                text(store.label),
                count(report.files),
                Cell(byte_size(report.size), float(report.size)),
                count(len(report.problems), heat=1.0 if report.problems else None),
            )
            rows.append(Row(cells, store.index))
    header = ("store", "files", "size", "problems")
    note = Text("Every file compared with its checksum, as by `precompute verify`.")
    table = Table("Checksums", header, tuple(rows))
    return Section("checksums", "Checksums", (note, table) if rows else ())


def identity_section(opened: Sequence[OpenedStore]) -> Section:
    """Return what determines the content of the stores, and the machines that wrote them."""
    first = opened[0].manifest
    source = first.identity["source"]
    rows = (
        Row((text("source"), text(source["name"]))),
        Row((text("fingerprint of the source"), text(source["fingerprint"]))),
        Row((text("samples"), count(first.samples))),
        Row((text("classes"), count(len(first.class_names)))),
        Row((text("fingerprint of the views"), text(first.view_fingerprint))),
    )
    machines = tuple(
        Row((text(store.label), text(describe_numerics(group)), text(spans(group["views"]))), store.index)
        for store in opened
        for group in views_by_numerics(store.manifest)
    )
    blocks: list[Block] = [
        Table("Source and views", ("", ""), rows),
        Code("View recipe", write_yaml(first.identity["view"]["recipe"])),
        *(
            Code(
                f"Identity of {store.label}, fingerprint {store.manifest.fingerprint[:12]}",
                write_yaml(store.manifest.identity),
                store.index,
            )
            for store in opened
        ),
    ]
    if machines:
        blocks.insert(1, Table("Written by", ("store", "numerics", "views"), machines))
    return Section("identity", "Identity", tuple(blocks))
