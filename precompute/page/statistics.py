"""Sections with statistics of stores: what they are, accuracy by view, fidelity, agreement."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

from coursepack.data.store.records import FIDELITY_TEMPERATURES, fidelity_summary, merge_fidelity
from coursepack.pages.blocks import (
    Cell,
    Plot,
    Row,
    Section,
    Series,
    Table,
    Text,
    count,
    number,
    percent,
    text,
)
from coursepack.precompute.inspect import agreement
from coursepack.precompute.precision import describe_precision

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coursepack.pages.blocks import Block
    from coursepack.precompute.page.opened import OpenedStore

TEMPERATURES = tuple(f"T={temperature:g}" for temperature in FIDELITY_TEMPERATURES)
"""Names of temperatures in records of fidelity."""
COLUMNS = tuple((name, what) for name in TEMPERATURES for what in ("mean", "p99", "largest"))
"""Temperature and statistic of each column of a table of errors."""


def stores_section(opened: Sequence[OpenedStore], described: Mapping[int, dict[str, Any]]) -> Section:
    """Return a table of the stores and their teachers."""
    header = ("store", "teacher", "weights", "views", "accuracy", "precision", "fingerprint")
    rows = tuple(
        Row(
            (
                text(store.label),
                text(store.manifest.identity["teacher"]["network"]),
                text(store.manifest.identity["teacher"]["weights"][:12]),
                Cell(
                    f"{len(store.manifest.committed_views())} of {store.manifest.views}",
                    float(len(store.manifest.committed_views())),
                ),
                percent(_accuracy(described.get(store.index))),
                text(describe_precision(described[store.index]["precision"]))
                if store.index in described
                else Cell("-"),
                text(store.manifest.fingerprint[:12]),
            ),
            store.index,
        )
        for store in opened
    )
    return Section("stores", "Stores", (Table("Stores", header, rows),))


def _accuracy(description: dict[str, Any] | None) -> float | None:
    if description is None:
        return None
    values: list[float] = [view["accuracy"] for view in description["views"].values()]
    return sum(values) / len(values)


def views_section(opened: Sequence[OpenedStore], described: Mapping[int, dict[str, Any]]) -> Section:
    """Return accuracy, entropy and calibration of every teacher by view."""
    rows, series = [], []
    for store in opened:
        views = described.get(store.index, {"views": {}})["views"]
        for view, values in views.items():
            cells = (
                text(store.label),
                count(int(view)),
                percent(values["accuracy"]),
                *(number(values[name], 4) for name in ("cross_entropy", "entropy", "calibration_error")),
            )
            rows.append(Row(cells, store.index))
        if len(views) > 1:
            accuracy = tuple(100 * values["accuracy"] for values in views.values())
            x = tuple(float(view) for view in views)
            series.append(Series(store.label, x, accuracy, style=store.index, group=store.index))
    if not rows:
        return Section("views", "Accuracy by view", ())
    plots = [Plot("Accuracy of the teachers by view", "view", "accuracy, %", tuple(series))] if series else []
    header = ("store", "view", "accuracy", "cross-entropy", "entropy", "calibration error")
    note = Text(
        "Share of samples whose top class is the label, for mixed images the label with the larger share; "
        "cross-entropy to the labels and entropy in nats."
    )
    table = Table("Every view", header, tuple(rows), folded=True)
    return Section("views", "Accuracy by view", (note, *plots, table))


def fidelity_section(opened: Sequence[OpenedStore]) -> Section:
    """Return the error of the stored logits against the teachers' own, over all views and by view."""
    whole, by_view = [], []
    for store in opened:
        if store.reader is None:
            continue
        records = store.manifest.view_records
        found = [(int(view), records[view]["fidelity"]) for view in records if records[view].get("fidelity")]
        encoding = store.manifest.arrays["logits"].encoding.name
        if not found:
            nothing = Cell("exact", 0.0) if encoding == "float32" else Cell("-")
            whole.append(Row((text(store.label), text(encoding), *[nothing] * len(COLUMNS)), store.index))
            continue
        merged = reduce(merge_fidelity, (record for _, record in found))
        whole.append(Row((text(store.label), text(encoding), *_errors(merged)), store.index))
        by_view += [
            Row((text(store.label), count(view), *_errors(record)), store.index) for view, record in found
        ]
    if not whole:
        return Section("fidelity", "Fidelity of the encoding", ())
    note = Text(
        "KL(logits of the teacher in float32 || stored logits) in nats, recorded when the store was written. "
        "Stores in float32 are exact. The 99th percentile is the upper edge of its bin, up to 16 % too high."
    )
    columns = tuple(f"{what}, {name}" for name, what in COLUMNS)
    table = Table("Error of the stored logits", ("store", "encoding", *columns), tuple(whole))
    blocks: list[Block] = [note, table]
    if by_view:
        blocks.append(Table("Error by view", ("store", "view", *columns), tuple(by_view), folded=True))
    return Section("fidelity", "Fidelity of the encoding", tuple(blocks))


def _errors(record: dict[str, Any]) -> tuple[Cell, ...]:
    summary = fidelity_summary(record)
    values = [summary.get(name, {}).get(what) for name, what in COLUMNS]
    return tuple(Cell("-") if value is None else Cell(f"{value:.2g}", value) for value in values)


def agreement_section(opened: Sequence[OpenedStore], views: Sequence[int]) -> Section:
    """Return the share of samples for which each pair of teachers has the same top class."""
    stores = [store for store in opened if store.reader is not None]
    readers = [store.reader for store in stores if store.reader is not None]
    if len(readers) < 2 or not views:
        return Section("agreement", "Agreement of the teachers", ())
    shares = agreement(readers, views[0])
    rows = tuple(
        Row((text(store.label), *(percent(share, heat=share) for share in row)), store.index)
        for store, row in zip(stores, shares, strict=True)
    )
    caption = f"Share of samples with the same top class in view {views[0]}"
    table = Table(caption, ("store", *(store.label for store in stores)), rows)
    return Section("agreement", "Agreement of the teachers", (table,))
