"""Command `distill methods`."""

from __future__ import annotations

import json
from typing import Any

import click

from coursepack.console import print_table
from coursepack.distill.methods import METHODS
from coursepack.distill.methods.description import describe
from coursepack.errors import UnknownName


@click.command("methods", epilog="\b\nExamples:\n  distill methods amtml\n  distill methods --json")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def methods_command(name: str | None, as_json: bool) -> None:
    """List the methods, or print formula, source, needs and defaults of one.

    Replace any default with `distill train --set objective.FIELD=VALUE`.
    """
    if name is not None and name not in METHODS:
        raise UnknownName("method", name, METHODS)
    methods = [describe(each) for each in METHODS if name in (None, each)]
    if as_json:
        click.echo(json.dumps(methods, indent=1))
    elif name is None:
        print_table("", ["method", "loss"], [[each["name"], each["formula"]] for each in methods])
    else:
        click.echo("\n".join(_described(methods[0])))


def _described(method: dict[str, Any]) -> list[str]:
    lines = [f"{method['name']}", f"  loss      {method['formula']}", f"  source    {method['source']}"]
    lines += [f"  evidence  {method['evidence']}"] if method["evidence"] else []
    if method["fusion"] is not None:
        fusion = method["fusion"]
        lines.append(f"  fusion    {fusion['name']}: {fusion['formula']}; combined as a {method['combine']}")
    lines.append(f"  needs     {', '.join(method['needs'])}")
    lines += [f"  note      {method['note']}"] if method["note"] else []
    lines.append("  defaults  " + json.dumps(method["defaults"]))
    return lines
