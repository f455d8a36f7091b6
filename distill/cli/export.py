"""Command `distill export`."""

from __future__ import annotations

from pathlib import Path

import click

from coursepack.commands import Choice, Command
from coursepack.console import JSON, TRUST_CODE, print_json, printable

EXPORT_FORMATS = ("safetensors", "onnx", "hf")
"""Names in `coursepack.models.export.FORMATS`, whose modules import torch."""


@click.command(
    "export", cls=Command, epilog="\b\nExample:\n  distill export runs/kd --format onnx --out student.onnx"
)
@click.argument("run")
@click.option("--format", "kind", type=Choice(EXPORT_FORMATS), required=True,
              help="Weights in safetensors, an ONNX file, or a folder for transformers.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path),
              help="File, or for hf a folder.  [default: the run's name, in the current folder]")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@TRUST_CODE
@JSON
def export_command(
    run: str, kind: str, out: Path | None, overwrite: bool, trust_code: bool, as_json: bool
) -> None:
    """Write the student of a finished run in a format that other programs read.

    RUN is the folder of a run: FOLDER for the weights after the last epoch, FOLDER@best for those with the
    best accuracy, FOLDER@EPOCH for a checkpoint that was kept, and FOLDER/0 for the first student of a group.

    The file holds the size and normalization of the images and the names of the classes. It is compared with
    the run on random images before it gets its name.
    """
    from coursepack.distill.runs.export import export_run

    exported = export_run(run, kind, out, overwrite=overwrite, trust_code=trust_code)
    if as_json:
        values = {"path": str(exported.path), "difference": exported.difference, **exported.card.values()}
        print_json(values)
        return
    pixels = exported.card.preprocessing
    click.echo(
        printable(
            f"{exported.path}: {len(exported.card.class_names):,} classes, images of {pixels.size} x "
            f"{pixels.size} pixels and {pixels.channels} channel{'s' if pixels.channels > 1 else ''}; logits "
            f"within {exported.difference:.1e} of the run's largest"
        )
    )
