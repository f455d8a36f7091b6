"""Sections on how runs were made: their cost, the differences of their recipes, and their provenance."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from coursepack.canonical import cut, differences
from coursepack.config import write_yaml
from coursepack.pages.blocks import Code, Row, Section, Table, Text, count, number, text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.distill.report.reading import RunGroup, RunLog
    from coursepack.pages.blocks import Block, Cell

MAX_DIFFERENCES = 100
"""Maximum number of fields in the table of differences."""


def cost_section(groups: Sequence[RunGroup]) -> Section:
    """Return the seconds of every group, per epoch and per run."""
    rows = []
    for group in groups:
        seconds = [[line.seconds for line in run.epochs] for run in group.runs if run.epochs]
        if not seconds:
            continue
        cells = (
            text(group.label),
            count(len(group.runs)),
            number(statistics.fmean(map(len, seconds)), 1),
            number(statistics.median(each for run in seconds for each in run), 4),
            number(statistics.fmean(map(sum, seconds)), 1),
            text(", ".join(sorted({run.provenance.device or "unknown" for run in group.runs}))),
        )
        rows.append(Row(cells, group.index))
    header = ("recipe", "runs", "epochs", "seconds per epoch", "seconds per run", "device")
    note = Text(
        "Seconds of training, without evaluation; the median over epochs and the mean over runs. Those of "
        "students that trained at the same time are their share of the group's."
    )
    return Section("cost", "Cost", (note, Table("Cost", header, tuple(rows))) if rows else ())


def recipes_section(groups: Sequence[RunGroup]) -> Section:
    """Return the fields in which recipes differ from the first, and all recipes."""
    recipes = [group.recipe.model_dump(mode="json", exclude={"seed"}) for group in groups]
    changed = [
        {path: (mine, theirs) for path, mine, theirs in differences(recipes[0], recipe)} for recipe in recipes
    ]
    paths = list(dict.fromkeys(path for each in changed for path in each))
    blocks: list[Block] = []
    if paths:
        rows = tuple(Row((text(path), *_values(path, changed)), None) for path in paths[:MAX_DIFFERENCES])
        header = ("field", *(group.label for group in groups))
        blocks.append(Table("Fields in which recipes differ from the first", header, rows))
        if len(paths) > MAX_DIFFERENCES:
            blocks.append(Text(f"And {len(paths) - MAX_DIFFERENCES:,} more fields."))
    else:
        blocks.append(Text("All recipes are the same, except for the seed."))
    blocks += [
        Code(f"Recipe of {group.label}", write_yaml(group.recipe.model_dump(mode="json")), group.index)
        for group in groups
    ]
    return Section("recipes", "Recipes", tuple(blocks))


def _values(path: str, changed: list[dict[str, tuple[str, str]]]) -> list[Cell]:
    """Return a field's value in every recipe."""
    first = next(each[path][0] for each in changed if path in each)
    return [text(cut(each[path][1] if path in each else first)) for each in changed]


def provenance_section(groups: Sequence[RunGroup]) -> Section:
    """Return the folder, machine and versions of every run, and the fingerprints of the data."""
    logs = [(group, log) for group in groups for log in group.runs]
    libraries = list(dict.fromkeys(name for _, log in logs for name in log.provenance.versions))
    rows = tuple(
        Row(
            (
                text(f"{log.run.path}{f' ({log.run.ensemble})' if log.run.ensemble else ''}"),
                text(group.label),
                count(log.run.recipe.seed),
                text(log.provenance.device or "-"),
                count(log.provenance.ranks),
                *(text(log.provenance.versions.get(name, "-")) for name in libraries),
            ),
            group.index,
        )
        for group, log in logs
    )
    header = ("run", "recipe", "seed", "device", "ranks", *libraries)
    tables: list[Block] = [Table("Runs", header, rows)]
    if found := _fingerprints([log for _, log in logs]):
        header = ("what", "name", "fingerprint (sha256)", "runs")
        tables.append(Table("Fingerprints", header, found))
    drift = sorted({each for _, log in logs for each in log.provenance.drift})
    notes = [Text(f"Drift that was accepted with --allow-drift: {each}", is_problem=True) for each in drift]
    return Section("provenance", "Provenance", (*tables, *notes))


def _fingerprints(logs: Sequence[RunLog]) -> tuple[Row, ...]:
    """Return one row for each source, view and store, with the number of runs that used it."""
    used: dict[tuple[str, str, str], int] = {}
    for log in logs:
        provenance, recipe = log.provenance, log.run.recipe
        keys = [
            ("source", recipe.source, provenance.source_fingerprint),
            ("view", ", ".join(op.op for op in recipe.view.ops) or "none", provenance.view_fingerprint),
            *(("store", store.path, store.fingerprint) for store in provenance.stores),
        ]
        for key in keys:
            if key[2]:
                used[key] = used.get(key, 0) + 1
    return tuple(Row((*map(text, key), count(runs))) for key, runs in sorted(used.items()))
