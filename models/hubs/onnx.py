"""Networks in ONNX files, run by onnxruntime: `onnx:FILE`.

The file has to have one input of float images `(N, 1 or 3, H, W)` or `(N, H, W, 1 or 3)` with a free number
of images N, and logits `(N, C)` as the output `logits` or the only one. Size, mean and standard deviation of
the images are the caller's, unless `distill export` wrote the file with them. Libraries of custom operators
are never loaded. The network has no layers to tap.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from coursepack.errors import RecipeError, TeacherMismatch, first_line
from coursepack.models.card import read_card
from coursepack.models.hubs.base import HubNetwork
from coursepack.models.hubs.files import missing_library

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coursepack.models.preprocessing import Preprocessing

SPEC = "onnx"
"""Spec in fingerprints: the file's content says the rest."""
LOGITS = "logits"
PROBABILITIES = ("Softmax", "Sigmoid")
"""Operators whose outputs are probabilities."""
CHANNELS = (1, 3)
HINT = 'torch.onnx.export(model, (images,), "model.onnx", dynamo=True, dynamic_shapes=({0: "batch"},))'


class Pixels(NamedTuple):
    """The form of the images that a file's input takes."""

    channels_last: bool
    channels: int
    size: int | None
    """Side in pixels; None if it is free."""


class OnnxNetwork(nn.Module):
    """Network that onnxruntime runs, on the device of its images."""

    opaque = "onnxruntime"

    def __init__(self, path: Path, spec: str, files_fingerprint: str) -> None:
        """Open a file and check its inputs and outputs.

        Raises:
            TeacherMismatch: the file cannot be read, or has other inputs or outputs.
        """
        super().__init__()
        self.path, self.spec, self.files_fingerprint = path, spec, files_fingerprint
        self._sessions: dict[torch.device, Any] = {}
        session = self._session(torch.device("cpu"))
        self.pixels = _pixels(session.get_inputs(), spec)
        self.input = session.get_inputs()[0].name
        self.output, self.classes = _logits(session.get_outputs(), spec)

    def _session(self, device: torch.device) -> Any:
        if device not in self._sessions:
            self._sessions[device] = _open_session(self.path, self.spec, device)
        return self._sessions[device]

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, C)` float32 for images `(N, channels, H, W)`."""
        given = images.detach().float().cpu()
        if self.pixels.channels_last:
            given = given.permute(0, 2, 3, 1)
        try:
            [logits] = self._session(images.device).run(
                [self.output], {self.input: given.contiguous().numpy()}
            )
        except Exception as error:  # onnxruntime's errors have no class in common
            raise RuntimeError(" ".join(str(error).split())) from error
        return torch.from_numpy(np.ascontiguousarray(logits)).to(images.device)


def load_trained(name: str, _size: int | None, _trust_code: bool) -> HubNetwork:
    """Open an ONNX file.

    Args:
        name: path of the file. Its external data has to be in the same folder or below.

    Raises:
        RecipeError: onnxruntime or onnx is not installed, or there is no such file.
        TeacherMismatch: the file is damaged, has other inputs or outputs, or refers to files elsewhere.
    """
    spec, path = f"onnx:{name}", Path(name).expanduser().resolve()
    model = _read(name, path)
    import onnxruntime

    _check_last(model, spec)
    module = OnnxNetwork(path, spec, _fingerprint(path, _external_files(model, path, spec)))
    preprocessing, class_names = _card(model, spec) or (None, None)
    if preprocessing is not None and class_names is not None:
        _check_card(preprocessing, class_names, module)
    return HubNetwork(
        module,
        preprocessing,
        module.classes,
        class_names=class_names,
        spec=SPEC,
        origin=f"onnx:{path}",
        library=f"onnxruntime {onnxruntime.__version__}",
        size=module.pixels.size,
    )


def class_names(name: str, _weights: str | None = None) -> tuple[str, ...] | None:
    """Return the names of the classes in a file that `distill export` wrote; None for other files."""
    card = _card(_read(name, Path(name).expanduser().resolve()), f"onnx:{name}")
    return None if card is None else card[1]


def _read(name: str, path: Path) -> Any:
    """Return the protocol buffer of a file, without external data."""
    spec = f"onnx:{name}"
    try:
        import onnx
        import onnxruntime  # noqa: F401 - runs what is read here
    except ImportError as error:
        raise missing_library(spec, "onnxruntime and onnx", error) from error
    if not path.is_file():
        raise RecipeError(f"network {spec!r}: there is no file {name!r}")
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise TeacherMismatch(f"network {spec!r} cannot be read as ONNX: {first_line(error)}") from error


def _card(model: Any, spec: str) -> tuple[Preprocessing, tuple[str, ...]] | None:
    """Return preprocessing and class names that `distill export` wrote into a file."""
    return read_card({entry.key: entry.value for entry in model.metadata_props}, f"network {spec!r}")


def _check_card(preprocessing: Preprocessing, class_names: tuple[str, ...], module: OnnxNetwork) -> None:
    """Check that a file's card describes the inputs and outputs that the file has."""
    pixels = module.pixels
    said = (preprocessing.channels, preprocessing.size, len(class_names))
    found = (pixels.channels, pixels.size or preprocessing.size, module.classes)
    if said != found:
        names = ("channels", "pixels", "classes")
        texts = [
            ", ".join(f"{n} {name}" for n, name in zip(each, names, strict=True)) for each in (said, found)
        ]
        raise TeacherMismatch(
            f"the metadata of network {module.spec!r} say {texts[0]}, but it has {texts[1]}: export it again"
        )


def _check_last(model: Any, spec: str) -> None:
    """Check that no output is the result of a softmax or sigmoid, whose input would be the logits."""
    outputs = {output.name for output in model.graph.output}
    for node in model.graph.node:
        if node.op_type in PROBABILITIES and not outputs.isdisjoint(node.output):
            raise TeacherMismatch(
                f"network {spec!r} ends in {node.op_type}, so {node.output[0]!r} holds probabilities, "
                "expected logits: export it again without its last step"
            )


def _external_files(model: Any, path: Path, spec: str) -> list[tuple[str, Path]]:
    """Return the files that hold tensors of a model, with their names in it, sorted.

    Raises:
        TeacherMismatch: a file is missing or outside of the model's folder.
    """
    found = {}
    for location in sorted(set(_locations(model))):
        file = (path.parent / location).resolve()
        if not file.is_relative_to(path.parent):
            raise TeacherMismatch(
                f"network {spec!r} refers to external data {location!r:.200} outside of its folder "
                f"{str(path.parent)!r}, which is not read: get the model with its data in one folder"
            )
        if not file.is_file():
            raise TeacherMismatch(
                f"network {spec!r} needs its external data {location!r:.200}, but {str(path.parent)!r} has "
                "no such file: copy it there"
            )
        found[location] = file
    return list(found.items())


def _locations(message: Any) -> Iterator[str]:
    """Yield the locations of external data of all tensors in a protocol buffer."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield from (entry.value for entry in message.external_data if entry.key == "location")
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from _locations(inner)


def _fingerprint(path: Path, external: list[tuple[str, Path]]) -> str:
    """Return the sha256 of a file and of its external data."""
    digest = hashlib.sha256(_sha256(path).encode())
    for location, file in external:
        digest.update(f"\n{location}\n{_sha256(file)}".encode())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_session(path: Path, spec: str, device: torch.device) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.use_deterministic_compute = True
    options.log_severity_level = 4
    if device.type == "cpu":
        options.intra_op_num_threads = torch.get_num_threads()
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers = [("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0}), *providers]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        raise TeacherMismatch(
            f"network {spec!r} cannot be run by onnxruntime: {first_line(error)}"
        ) from error


def _pixels(inputs: list[Any], spec: str) -> Pixels:
    if len(inputs) != 1:
        names = ", ".join(repr(each.name) for each in inputs)
        raise TeacherMismatch(
            f"network {spec!r} has {len(inputs)} inputs ({names}), expected one of images: export a network "
            "that takes images alone"
        )
    shape, kind = list(inputs[0].shape), inputs[0].type
    where = f"network {spec!r}: input {inputs[0].name!r}"
    if kind != "tensor(float)" or len(shape) != 4:
        raise TeacherMismatch(f"{where} is a {kind} of shape {shape}, expected tensor(float) (N, C, H, W)")
    if isinstance(shape[0], int):
        raise TeacherMismatch(
            f"{where} has shape {shape}, which fixes the batch at {shape[0]}; expected a free number of "
            f"images: export it again with a dynamic first dimension, such as {HINT}"
        )
    channels_last = shape[1] not in CHANNELS and shape[3] in CHANNELS
    channels, *sides = [shape[3], *shape[1:3]] if channels_last else shape[1:]
    if channels not in CHANNELS:
        raise TeacherMismatch(
            f"{where} has shape {shape}, expected 1 or 3 channels in (N, C, H, W) or (N, H, W, C)"
        )
    fixed = {side for side in sides if isinstance(side, int)}
    if len(fixed) > 1:
        raise TeacherMismatch(f"{where} has shape {shape}, but views are square: export it for square images")
    return Pixels(channels_last, channels, fixed.pop() if fixed else None)


def _logits(outputs: list[Any], spec: str) -> tuple[str, int]:
    """Return the name of the output that holds logits, and their number of classes."""
    named = [each for each in outputs if each.name == LOGITS] or outputs
    if len(named) != 1:
        names = ", ".join(repr(each.name) for each in outputs)
        raise TeacherMismatch(
            f"network {spec!r} has {len(outputs)} outputs ({names}), expected one, or one called {LOGITS!r}"
        )
    shape, kind = list(named[0].shape), named[0].type
    if kind != "tensor(float)" or len(shape) != 2 or not isinstance(shape[1], int):
        raise TeacherMismatch(
            f"network {spec!r}: output {named[0].name!r} is a {kind} of shape {shape}, expected "
            "tensor(float) (N, C) with a fixed number of classes C"
        )
    return named[0].name, shape[1]
