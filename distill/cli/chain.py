"""Command `distill chain`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coursepack.commands import Command
from coursepack.console import JSON, TRUST_CODE, print_json, print_table
from coursepack.distill.cli.executing import executor_options, take_executor
from coursepack.distill.cli.options import CACHE_BYTES, CHECKPOINTS, THREADS, WORKERS

EXAMPLES = """\b
Examples:
  distill chain chain.yaml --out runs/chain
  distill chain chain.yaml --out runs/chain --redo student
"""


@click.command("chain", cls=Command, epilog=EXAMPLES)
@click.argument("chain_file", type=click.Path(path_type=Path), metavar="CHAIN.yaml")
@click.option("--out", type=click.Path(path_type=Path),
              help="Folder of the chain.  [default: runs/ and the file's name]")  # fmt: skip
@click.option("--redo", multiple=True, metavar="STAGE",
              help="Stage to run again, with stages that read it if it changes. Repeatable.")  # fmt: skip
@CACHE_BYTES
@WORKERS
@THREADS
@CHECKPOINTS
@TRUST_CODE
@JSON
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:NUMBER or auto.")
@executor_options
def chain_command(
    chain_file: Path,
    out: Path | None,
    redo: tuple[str, ...],
    workers: int | None,
    threads: int | None,
    checkpoint_seconds: float,
    trust_code: bool,
    as_json: bool,
    device: str,
    **executing: Any,
) -> None:
    """Run the stages of a chain in order: students that become teachers of later ones.

    A stage trains a student, precomputes one into a store, or evaluates several together. All stages are
    checked before the first one runs. The same command continues an interrupted chain and skips the stages
    that are finished and unchanged.

    \b
    base: {source: digits:train, view: digits, epochs: 30}
    stages:
      - {name: teacher, train: {student: digits-resnet}}
      - {name: targets, precompute: {teacher: stage:teacher, views: 30}}
      - {name: student, train: {student: digits-small, stores: [stage:targets]}}
    """
    from coursepack.device import pick_device
    from coursepack.distill.runs.chain.plan import plan_chain
    from coursepack.distill.runs.chain.run import run_chain, table_of
    from coursepack.distill.runs.chain.stages import How

    executor = take_executor(executing)
    out = out or Path("runs", chain_file.stem)
    # The nodes of a cluster may have GPUs where this machine has none.
    how = How(
        device=pick_device("auto" if executor is not None and device == "cuda" else device),
        device_name=device,
        workers=workers,
        threads=threads,
        checkpoint_seconds=checkpoint_seconds,
        trust_code=trust_code,
        executor=executor,
    )
    stages = plan_chain(chain_file, out, device=how.device, trust_code=trust_code)
    rows = run_chain(stages, out, how, redo=redo)
    if as_json:
        print_json([row.to_dict() for row in rows])
    else:
        print_table("", *table_of(rows))
