"""Networks that `torch.export.save` wrote: `exported:FILE.pt2`, only with `trust_code`.

Reading such a file can run code that it contains, so it is not opened before the user trusts it. TorchScript
files are refused even then: torch no longer maintains their format.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coursepack.errors import RecipeError, TeacherMismatch, UntrustedCode, first_line
from coursepack.models.hubs.base import HubNetwork

INSTEAD = "export the network to ONNX, which is read without running code: --teacher onnx:FILE"


class ExportedNetwork(nn.Module):
    """Program of `torch.export`, which has no training mode and no layers."""

    opaque = "torch.export"

    def __init__(self, program: Any, files_fingerprint: str) -> None:
        super().__init__()
        self.files_fingerprint = files_fingerprint
        self.program = program

    def train(self, mode: bool = True) -> ExportedNetwork:
        """Set the flag only: the mode of a program is fixed when it is exported."""
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, C)` for images `(N, channels, H, W)`."""
        out: Tensor = self.program(images)
        return out


def load_trained(name: str, _size: int | None, trust_code: bool) -> HubNetwork:
    """Load a program of `torch.export`.

    Raises:
        UntrustedCode: `trust_code` is false. The file was not opened.
        RecipeError: there is no such file, or it is TorchScript.
        TeacherMismatch: the file is damaged, or the program has other inputs or outputs.
    """
    spec, path = f"exported:{name}", Path(name).expanduser()
    if not path.is_file():
        raise RecipeError(f"network {spec!r}: there is no file {name!r}")
    if _is_torchscript(path):
        raise RecipeError(f"network {spec!r} is TorchScript, which is not read: {INSTEAD}")
    if not trust_code:
        raise UntrustedCode(
            f"network {spec!r} was written by torch.export, and reading it can run code that the file "
            f"contains. It was not opened. Better {INSTEAD}. If you trust the file, give --trust-code "
            "(trust_code=True in Python)"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise TeacherMismatch(f"network {spec!r} cannot be read: {first_line(error)}") from error
    size, classes = _check(program, spec)
    module = ExportedNetwork(program.module(), digest)
    return HubNetwork(
        module,
        None,
        classes,
        spec="exported",
        origin=f"exported:{path.resolve()}",
        library=f"torch {torch.__version__}",
        size=size,
    )


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False
    return any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names)


def _check(program: Any, spec: str) -> tuple[int | None, int]:
    """Return the side of the images, None if it is free, and the number of classes.

    Raises:
        TeacherMismatch: the program has other inputs or outputs than images and logits, or a fixed batch.
    """
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    inputs, outputs = program.graph_signature.user_inputs, program.graph_signature.user_outputs
    if len(inputs) != 1 or len(outputs) != 1:
        raise TeacherMismatch(
            f"network {spec!r} has {len(inputs)} inputs and {len(outputs)} outputs, expected images "
            "and logits"
        )
    images, logits = (list(values[names[0]].shape) for names in (inputs, outputs))
    if len(images) != 4 or len(logits) != 2 or not isinstance(logits[1], int):
        raise TeacherMismatch(
            f"network {spec!r} maps {images} to {logits}, expected images (N, C, H, W) and logits (N, C)"
        )
    if isinstance(images[0], int):
        raise TeacherMismatch(
            f"network {spec!r} fixes the batch at {images[0]} images; expected a free number: export it "
            "again with dynamic_shapes=({0: torch.export.Dim('batch')},)"
        )
    sides = {side for side in images[2:] if isinstance(side, int)}
    if len(sides) > 1:
        raise TeacherMismatch(f"network {spec!r} takes images {images}, but views are square")
    return (sides.pop() if sides else None), logits[1]
