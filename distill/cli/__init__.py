"""Command `distill`: trains, evaluates, compares and exports students."""

from __future__ import annotations

import faulthandler
import sys

import click

from coursepack.commands import Commands, Subcommand

SUBCOMMANDS = {
    "train": Subcommand(
        "coursepack.distill.cli.train:train_command",
        "Train a student from stores, from teachers run live, or without teachers.",
    ),
    "chain": Subcommand(
        "coursepack.distill.cli.chain:chain_command",
        "Run the stages of a chain in order: students that become teachers of later ones.",
    ),
    "sweep": Subcommand(
        "coursepack.distill.cli.runs:sweep_command",
        "Train one student for every combination of the values in a grid file.",
    ),
    "eval": Subcommand(
        "coursepack.distill.cli.runs:eval_command",
        "Evaluate the student of a finished run, or every student of a group and their ensembles.",
    ),
    "compare": Subcommand(
        "coursepack.distill.cli.runs:compare_command",
        "Compare finished runs in a table; runs that differ only in their seed share a row.",
    ),
    "report": Subcommand(
        "coursepack.distill.cli.report:report_command",
        "Show runs on one HTML page: results, curves, classes, teachers, cost and provenance.",
    ),
    "export": Subcommand(
        "coursepack.distill.cli.export:export_command",
        "Write the student of a finished run in a format that other programs read.",
    ),
    "methods": Subcommand(
        "coursepack.distill.cli.methods:methods_command",
        "List the methods, or print formula, source, evidence, needs and defaults of one.",
    ),
}
"""Subcommands in the order of the help. To add one, write a module in this package and add a row here."""
FIRST_STEPS = """\b
First steps, with the digits that come with scikit-learn:
  distill train --student digits-cnn --source digits --view digits --epochs 30 --out teachers/cnn
  precompute run --teacher run:teachers/cnn --source digits --view digits --views 8 --store cnn.zarr
  distill train --student digits-small --store cnn.zarr --out runs/kd
  distill compare runs/kd
"""


@click.group(cls=Commands, subcommands=SUBCOMMANDS, epilog=FIRST_STEPS)
def main() -> None:
    """Train students from precomputed stores, evaluate them and compare their runs."""
    # Reading a mapped file that was truncated kills the process with SIGBUS: print a traceback then.
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)
