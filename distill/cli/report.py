"""Command `distill report`."""

from __future__ import annotations

from pathlib import Path

import click

from coursepack.commands import Command
from coursepack.console import JSON, TRUST_CODE, byte_size, print_json, printable, warn
from coursepack.errors import RunError


@click.command(
    "report", cls=Command, epilog="\b\nExample:\n  distill report runs/alone-* runs/kd-* --out report.html"
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True,
              help="HTML file to write; an existing one is replaced.")  # fmt: skip
@click.option("--evaluate/--no-evaluate", default=True, show_default=True,
              help="Evaluate the students, for classes, confusions, calibration and agreement.")  # fmt: skip
@TRUST_CODE
@JSON
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:NUMBER or auto.")
def report_command(
    runs: tuple[Path, ...], out: Path, evaluate: bool, trust_code: bool, as_json: bool, device: str
) -> None:
    """Show runs on one HTML page: results, curves, classes, teachers, cost and provenance.

    The page needs no network. Unfinished runs and damaged metrics are shown as far as they can be read.
    """
    from coursepack.device import pick_device
    from coursepack.distill.report.build import build_report
    from coursepack.files import write_whole

    if out.is_dir() or not out.parent.is_dir():
        problem = (
            "is a folder" if out.is_dir() else f"cannot be made, since there is no folder {str(out.parent)!r}"
        )
        raise RunError(f"{str(out)!r} {problem}: choose another --out")
    page, problems = build_report(runs, pick_device(device), evaluate=evaluate, trust_code=trust_code)
    for problem in problems:
        warn(f"warning: {problem}")
    content = page.encode(errors="backslashreplace")  # a path may hold bytes that are not text
    write_whole(out, content)
    if as_json:
        print_json({"page": str(out), "bytes": len(content), "problems": list(problems)})
    else:
        click.echo(printable(f"{out}: {byte_size(len(content))}"))
