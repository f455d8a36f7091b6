"""Command `distill`: trains, evaluates and compares students."""

from __future__ import annotations

import faulthandler
import sys

import click

from coursepack.console import Commands
from coursepack.distill.cli.chain import chain_command
from coursepack.distill.cli.methods import methods_command
from coursepack.distill.cli.report import report_command
from coursepack.distill.cli.runs import compare_command, eval_command, sweep_command
from coursepack.distill.cli.train import train_command


@click.group(cls=Commands)
def main() -> None:
    """Train students from precomputed stores, evaluate them and compare their runs."""
    # Reading a mapped file that was truncated kills the process with SIGBUS: print a traceback then.
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)


for command in (
    train_command,
    chain_command,
    sweep_command,
    eval_command,
    compare_command,
    report_command,
    methods_command,
):
    main.add_command(command)
