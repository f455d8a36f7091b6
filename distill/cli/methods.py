"""Command `distill methods`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from coursepack.catalog import names_of
from coursepack.commands import Choice, Command, complete_folder, name_of
from coursepack.console import JSON, byte_size, print_json, print_table
from coursepack.errors import RecipeError, UnknownName

if TYPE_CHECKING:
    from coursepack.distill.methods.base import Method
    from coursepack.distill.setup.costs import ViewCost

EXAMPLES = """\b
Examples:
  distill methods --needs features
  distill methods amtml
  distill methods amtml-hints --store cnn.zarr --store mlp.zarr --student digits-cnn
  distill methods kd --store cnn.zarr --set objective.terms.hint.weight=0.01
  distill methods --json
"""
PAGE_TEACHER, PAGE_STUDENT, PAGE_CLASSES, PAGE_SAMPLES = "resnet32x4", "resnet8x4", 100, 50_000
"""Networks and size of CIFAR-100 in the page's table of bytes."""


@click.command("methods", cls=Command, epilog=EXAMPLES)
@click.argument("name", required=False, shell_complete=name_of("method"))
@click.option("--needs", "needed", multiple=True, type=Choice(names_of("need")),
              help="List only methods with this need. Repeatable.")  # fmt: skip
@click.option("--store", "stores", multiple=True, shell_complete=complete_folder,
              help="A store: also print the bytes that NAME reads of a view. Repeatable.")  # fmt: skip
@click.option(
    "--student", shell_complete=name_of("network"),
    help="Student for --store, which layers are paired with.  [default: the teacher's network]",
)  # fmt: skip
@click.option(
    "--set", "assignments", multiple=True,
    help="Field of NAME's objective to set, as objective.FIELD=VALUE. Repeatable.",
)  # fmt: skip
@JSON
@click.option("--markdown", is_flag=True, help="Print the tables of docs/methods.md.")
def methods_command(
    name: str | None,
    needed: tuple[str, ...],
    stores: tuple[str, ...],
    student: str | None,
    assignments: tuple[str, ...],
    as_json: bool,
    markdown: bool,
) -> None:
    """List the methods, or print formula, source, evidence, needs and defaults of one.

    Replace any default with `distill train --set objective.FIELD=VALUE`; here, the same option shows what
    the changed method needs and reads.
    """
    from coursepack.distill.methods import METHODS
    from coursepack.distill.methods.description import describe, needs_of
    from coursepack.distill.recipe import changed_method

    if name is not None and name not in METHODS:
        raise UnknownName("method", name, METHODS)
    if (stores or student or assignments) and name is None:
        raise RecipeError(
            "--store, --student and --set are for one method: name it, as in distill methods kd --store S"
        )
    if markdown:
        click.echo(page_tables())
        return
    names = [each for each in METHODS if name in (None, each) and set(needed) <= set(needs_of(each))]
    changed = None if name is None else changed_method(name, _changes(assignments), f"method {name!r}")
    methods = [describe(each, changed) for each in names]
    costs = {} if changed is None else dict(zip(stores, _costs(changed, stores, student), strict=True))
    if as_json:
        for method in methods if stores else []:
            method["bytes"] = {store: _as_values(cost) for store, cost in costs.items()}
        print_json(methods)
    elif name is None:
        for method in methods:
            needs = ", ".join(method["need_names"])
            click.echo(
                f"{method['name']:<16}{method['evidence'] or '-':<20}needs {needs}\n    {method['formula']}"
            )
    else:
        label = "values  " if assignments else "defaults"
        click.echo("\n".join(line for method in methods for line in _described(method, label)))
        if costs:
            _print_costs(costs)


def _described(method: dict[str, Any], label: str) -> list[str]:
    lines = [f"{method['name']}", f"  loss      {method['formula']}", f"  source    {method['source']}"]
    lines += [f"  evidence  {method['evidence']}"] if method["evidence"] else []
    if method["fusion"] is not None:
        fusion = method["fusion"]
        lines.append(f"  fusion    {fusion['name']}: {fusion['formula']}; combined as a {method['combine']}")
    lines.append(f"  needs     {', '.join(method['needs'])}")
    lines += [f"  note      {method['note']}"] if method["note"] else []
    lines.append(f"  {label}  " + json.dumps(method["defaults"]))
    return lines


def _changes(assignments: tuple[str, ...]) -> dict[str, Any]:
    """Return the changed fields of an objective as nested plain values."""
    from coursepack.distill.recipe_file import set_values
    from coursepack.distill.renamed import check_renamed

    values: dict[str, Any] = {}
    set_values(values, assignments)
    check_renamed(values, "--set")
    changes = values.pop("objective", {})
    if values or not isinstance(changes, dict):
        raise RecipeError(
            f"--set {' '.join(values) or 'objective'}: a method is changed by fields of its objective, as in "
            "--set objective.temperature=2"
        )
    return changes


def _costs(method: Method, stores: tuple[str, ...], student: str | None) -> list[ViewCost]:
    from coursepack.data.store import load_manifest
    from coursepack.distill.setup.costs import view_costs
    from coursepack.models import build_network

    if not stores:
        return []
    teachers = [load_manifest(store) for store in stores]
    network = None if student is None else build_network(student, len(teachers[0].class_names))
    return view_costs(method.objective, teachers, network)


def _as_values(cost: ViewCost) -> dict[str, Any]:
    whole = None if cost.whole is None else cost.samples * cost.whole
    return {
        "samples": cost.samples,
        "arrays_per_sample": cost.arrays,
        "per_view": cost.samples * cost.read,
        "unreduced_per_view": whole,
    }


def _print_costs(costs: dict[str, ViewCost]) -> None:
    header = ["store", "arrays that it reads", "bytes per sample", "per view", "unreduced, per view"]
    print_table("", header, [[store, *_cells(cost)] for store, cost in costs.items()])


def _cells(cost: ViewCost) -> list[str]:
    whole = "not known" if cost.whole is None else byte_size(cost.samples * cost.whole)
    return [", ".join(cost.arrays) or "none", f"{cost.read:,}", byte_size(cost.samples * cost.read), whole]


def page_tables() -> str:
    """Return the tables of docs/methods.md: all methods, and bytes of a view for a pair on CIFAR-100."""
    from coursepack.distill.methods import METHODS
    from coursepack.distill.methods.description import markdown_table, methods_table
    from coursepack.distill.setup.costs import planned_store, view_costs
    from coursepack.models import build_network

    teacher = planned_store(PAGE_TEACHER, PAGE_CLASSES, PAGE_SAMPLES)
    student = build_network(PAGE_STUDENT, PAGE_CLASSES)
    methods_by_cells: dict[tuple[str, ...], list[str]] = {}
    for name, method in METHODS.items():
        if method.objective.needs().teachers:
            (cost,) = view_costs(method.objective, [teacher], student)
            methods_by_cells.setdefault(tuple(_cells(cost)), []).append(f"`{name}`")
    header = ("methods", "arrays", "bytes per sample", "per view", "unreduced, per view")
    rows = [(", ".join(names), *cells) for cells, names in methods_by_cells.items()]
    return f"{methods_table()}\n\n{markdown_table(header, rows)}"
