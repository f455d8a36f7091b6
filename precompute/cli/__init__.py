"""Command `precompute`: writes and checks stores of teachers' outputs."""

from __future__ import annotations

import click

from coursepack.commands import Commands, Subcommand

SUBCOMMANDS = {
    "plan": Subcommand(
        "coursepack.precompute.cli.jobs:plan",
        "Estimate the size, duration and break-even of `precompute run` with the same options.",
    ),
    "run": Subcommand(
        "coursepack.precompute.cli.jobs:run",
        "Run one teacher over all views and write its store, or all teachers of a file.",
    ),
    "status": Subcommand(
        "coursepack.precompute.cli.stores:status",
        "Show the content of a store, its missing views and the processes that write to it.",
    ),
    "verify": Subcommand(
        "coursepack.precompute.cli.stores:verify_command", "Check every file of a store against its manifest."
    ),
    "export": Subcommand(
        "coursepack.precompute.cli.caches:export", "Write the decoded rows of a store to one file."
    ),
    "import": Subcommand(
        "coursepack.precompute.cli.caches:import_command",
        "Write a store of answers that another program cached.",
    ),
    "inspect": Subcommand(
        "coursepack.precompute.cli.stores:inspect",
        "Show statistics of stores: accuracy per view, fidelity of encodings, agreement of teachers.",
    ),
}
"""Subcommands in the order of the help. To add one, write a module in this package and add a row here."""
FIRST_STEPS = """\b
First steps, with a teacher on the digits that come with scikit-learn:
  distill train --student digits-cnn --source digits --view digits --epochs 30 --out teachers/cnn
  precompute plan --teacher run:teachers/cnn --source digits --view digits --views 8 --store cnn.zarr
  precompute run --teacher run:teachers/cnn --source digits --view digits --views 8 --store cnn.zarr
  distill train --student digits-small --store cnn.zarr --out runs/kd
"""


@click.group(cls=Commands, subcommands=SUBCOMMANDS, epilog=FIRST_STEPS)
def main() -> None:
    """Run frozen teachers once over augmented views and write their outputs to Zarr stores."""
