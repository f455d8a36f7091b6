"""Any map-style data set: `python:module:factory` calls `factory(root=..., split=...)`.

Data sets of torchvision whose constructors take these two arguments are factories:
`python:torchvision.datasets:SVHN`. The data set is not pickled for worker processes; each of them calls the
factory itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from coursepack.canonical import fingerprint
from coursepack.data.sources.base import checksums, fields_only, sampled, sha256_of
from coursepack.errors import CoursepackError, RecipeError, SourceError
from coursepack.imports import import_object

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples
    from coursepack.data.sources.base import Source, Spec

LOADED_TWICE = 4
"""Number of images that are loaded twice to detect random transforms."""


@dataclass(frozen=True)
class MapStyle:
    """Source backed by a map-style data set that a factory returns."""

    spec: Spec
    root: Path | None
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    channels: int
    fingerprint: str
    """sha256 over name, classes, labels, channels and the content of 64 images."""

    @property
    def name(self) -> str:
        """Module, factory and split."""
        return str(self.spec)

    @property
    def in_memory(self) -> None:
        """None: images are loaded one by one."""
        return

    @functools.cached_property
    def _data(self) -> Any:
        return _make(self.spec, self.root)

    def sizes(self, samples: Samples) -> NDArray[np.int32]:
        """Return height and width `(n, 2)`. The images have to be loaded for this."""
        shapes = [image.shape[:2] for image in self.pixels(samples)]
        return np.array(shapes, dtype=np.int32).reshape(-1, 2)

    def pixels(self, samples: Samples) -> list[NDArray[np.uint8]]:
        """Return the images `(H, W, channels)` of the samples."""
        return [_load(self.name, self._data, int(sample), self.channels) for sample in samples]

    def contents(self, samples: Samples) -> NDArray[np.uint32]:
        """Return the crc32c `(n,)` of each image's pixels."""
        return checksums(self.pixels(samples))

    def path(self, sample: int) -> None:
        """Return None: samples have no file of their own."""

    def check(self) -> None:
        """Do nothing: opening the source has made all checks."""

    def __getstate__(self) -> dict[str, Any]:
        return fields_only(self)


def python(spec: Spec, root: Path | None) -> Source:
    """Open the data set that `factory(root=..., split=...)` returns."""
    data, name = _make(spec, root), str(spec)
    count = len(data)
    if not count:
        raise SourceError(f"source {name!r} has no samples")
    labels = _labels(name, data)
    names = _class_names(name, data, labels)
    channels = _array(name, 0, _pair(name, data, 0)[0]).shape[2]
    chosen = sampled(count)
    images = [_load(name, data, int(sample), channels) for sample in chosen]
    for sample, image in zip(chosen[:LOADED_TWICE], images, strict=False):
        if not np.array_equal(image, _load(name, data, int(sample), channels)):
            raise SourceError(
                f"source {name!r} returns different pixels each time sample {sample} is loaded: remove "
                "random transforms from the data set, augmentation is set by --view"
            )
    identity = fingerprint(
        {
            "name": name,
            "classes": names,
            "labels": sha256_of(labels),
            "channels": channels,
            "content": checksums(images).tolist(),
        }
    )
    source = MapStyle(spec, root, labels, names, channels, identity)
    vars(source)["_data"] = data  # so that the factory is not called again in this process
    return source


def _make(spec: Spec, root: Path | None) -> Any:
    module_name, _, path = spec.options.removeprefix(":").partition(":")
    factory = import_object(module_name, path, f"source '{spec}'")
    try:
        data = factory(root=root, split=spec.split)
    except CoursepackError:
        raise
    except Exception as error:
        raise SourceError(
            f"source '{spec}': {path}(root={None if root is None else str(root)!r}, split={spec.split!r}) "
            f"failed: {type(error).__name__}: {error}"
        ) from error
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise RecipeError(
            f"source '{spec}': {path} returned a {type(data).__name__}, expected a map-style data set with "
            "__len__ and __getitem__"
        )
    return data


def _labels(name: str, data: Any) -> NDArray[np.int64]:
    """Return the data set's own list of labels, else the labels of its items."""
    for attribute in ("targets", "labels"):
        values = getattr(data, attribute, None)
        if values is not None:
            break
    else:
        attribute, values = "its samples", [_pair(name, data, index)[1] for index in range(len(data))]
    try:
        labels = np.array([int(label) for label in values], dtype=np.int64)
        integral = all(label == number for label, number in zip(values, labels, strict=True))
    except (TypeError, ValueError):
        labels, integral = np.empty(0, np.int64), False
    if not integral:
        raise SourceError(f"source {name!r}: the labels of {attribute} are not integers")
    if len(labels) != len(data):
        raise SourceError(f"source {name!r} has {len(labels)} {attribute} for {len(data)} samples")
    return labels


def _class_names(name: str, data: Any, labels: NDArray[np.int64]) -> tuple[str, ...]:
    values = getattr(data, "classes", None)
    count = int(labels.max()) + 1
    names = tuple(str(label) for label in (range(count) if values is None else values))
    if labels.min() < 0 or count > len(names):
        wrong = int(labels.min()) if labels.min() < 0 else count - 1
        raise SourceError(f"source {name!r} has the label {wrong}, expected 0 to {len(names) - 1}")
    return names


def _pair(name: str, data: Any, index: int) -> tuple[Any, Any]:
    try:
        item = data[index]
    except CoursepackError:
        raise
    except Exception as error:
        problem = f"cannot be read: {type(error).__name__}: {error}"
        raise SourceError(f"sample {index} of source {name!r} {problem}") from error
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        actual = f"{len(item)} values" if isinstance(item, (tuple, list)) else f"a {type(item).__name__}"
        raise SourceError(f"source {name!r}: sample {index} is {actual}, expected a pair (image, label)")
    return item[0], item[1]


def _load(name: str, data: Any, index: int, channels: int) -> NDArray[np.uint8]:
    pixels = _array(name, index, _pair(name, data, index)[0], channels)
    if pixels.shape[2] != channels:
        raise SourceError(
            f"source {name!r}: sample {index} has {pixels.shape[2]} channels, but sample 0 has {channels}"
        )
    return pixels


def _array(name: str, index: int, image: Any, channels: int | None = None) -> NDArray[np.uint8]:
    """Convert an image of any accepted type to `(H, W, channels)` uint8.

    PIL images are converted to the given number of channels.
    """
    import torch
    from PIL import Image

    actual = type(image).__name__
    if isinstance(image, Image.Image):
        gray = image.mode in ("L", "1") if channels is None else channels == 1
        image = np.array(image.convert("L" if gray else "RGB"))
    elif isinstance(image, torch.Tensor):
        actual = f"{str(image.dtype).removeprefix('torch.')} tensor of shape {tuple(image.shape)}"
        image = (image.permute(1, 2, 0) if image.ndim == 3 else image).numpy(force=True)
    elif isinstance(image, np.ndarray):
        actual = f"{image.dtype} array of shape {image.shape}"
    if isinstance(image, np.ndarray) and image.ndim == 2:
        image = image[..., None]
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] not in ((1,), (3,)):
        raise SourceError(
            f"source {name!r}: the image of sample {index} is a {actual}, expected a PIL image, a uint8 "
            "array (H, W, channels) or (H, W), or a uint8 tensor (channels, H, W). Remove the data set's "
            "transforms"
        )
    return np.ascontiguousarray(image)
