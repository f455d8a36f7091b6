"""Images and labels in memory-mapped .npy files, for data sets of a user's own."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from coursepack.canonical import fingerprint
from coursepack.data.sources.base import checksums, fields_only, same_sizes, sampled, sha256_of
from coursepack.data.sources.roots import Layout, found_in
from coursepack.parsing import MAX_JSON_BYTES, parse_json, read_bounded

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples
    from coursepack.data.sources.base import Source, Spec

IMAGES, LABELS, CLASSES = "images.npy", "labels.npy", "classes.json"
LAYOUT = Layout(
    f"SPLIT/{IMAGES} (N, H, W, channels) or (N, H, W) uint8, SPLIT/{LABELS} (N,) integers and, if you like, "
    f"SPLIT/{CLASSES} (a list of names); or these files themselves for a single split 'train'",
    "",
)


@dataclass(frozen=True)
class MappedImages:
    """Source whose pixels are one memory-mapped .npy file."""

    name: str
    file: Path
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    @functools.cached_property
    def in_memory(self) -> NDArray[np.uint8]:
        """All images `(N, H, W, channels)`, memory-mapped read-only."""
        images = np.lib.format.open_memmap(self.file, mode="r")
        return images[..., None] if images.ndim == 3 else images

    @property
    def channels(self) -> int:
        """Number of channels of the pixels."""
        return int(self.in_memory.shape[3])

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over name, classes, labels, shape and the content of 64 images."""
        return fingerprint(
            {
                "name": self.name,
                "classes": self.class_names,
                "labels": sha256_of(self.labels),
                "shape": self.in_memory.shape,
                "content": self.contents(sampled(len(self.labels))).tolist(),
            }
        )

    def sizes(self, samples: Samples) -> NDArray[np.int32]:
        """Return height and width `(n, 2)`, the same for all images."""
        return same_sizes(self.in_memory, samples)

    def pixels(self, samples: Samples) -> NDArray[np.uint8]:
        """Return the images `(n, H, W, channels)`, read from the file."""
        return np.asarray(self.in_memory[samples])

    def contents(self, samples: Samples) -> NDArray[np.uint32]:
        """Return the crc32c `(n,)` of each image's pixels."""
        return checksums(self.in_memory[sample] for sample in samples)

    def path(self, sample: int) -> None:
        """Return None: samples have no file of their own."""

    def check(self) -> None:
        """Do nothing: opening the source has made all checks, as a truncated file cannot be mapped."""

    def __getstate__(self) -> dict[str, Any]:
        return fields_only(self)


def arrays(spec: Spec, root: Path | None) -> Source:
    """Open `root/SPLIT/images.npy` and `labels.npy`, or those in `root` itself as its only split `train`."""
    base = LAYOUT.root(spec, root)
    folder = base / spec.split
    if not folder.is_dir():
        if spec.split != "train" or not (base / IMAGES).is_file():
            raise LAYOUT.error(spec, base, f"there is no folder {spec.split!r}; {found_in(base)}")
        folder = base
    images, labels = (_load(spec, base, folder / name) for name in (IMAGES, LABELS))
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
        raise LAYOUT.error(
            spec,
            base,
            f"{IMAGES} holds {images.dtype} of shape {images.shape}, expected uint8 (N, H, W) or "
            "(N, H, W, channels) with 1 or 3 channels",
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or not len(labels):
        raise LAYOUT.error(
            spec,
            base,
            f"{LABELS} holds {labels.dtype} of shape {labels.shape} for {len(images)} images, expected one "
            "integer for each of at least one image",
        )
    labels = np.array(labels, dtype=np.int64)
    highest = int(labels.max())
    names = _class_names(spec, base, folder / CLASSES, highest + 1)
    if labels.min() < 0 or highest >= len(names):
        wrong = int(labels.min()) if labels.min() < 0 else highest
        raise LAYOUT.error(
            spec, base, f"{LABELS} holds the label {wrong}, expected 0 to {max(len(names), 1) - 1}"
        )
    return MappedImages(str(spec), folder / IMAGES, labels, names)


def _load(spec: Spec, base: Path, path: Path) -> NDArray[Any]:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        problem = f"there is no file {path.name!r} in {str(path.parent)!r}; {found_in(path.parent)}"
        raise LAYOUT.error(spec, base, problem) from error
    except (OSError, ValueError, EOFError) as error:
        raise LAYOUT.error(spec, base, f"{str(path)!r} is damaged or no .npy file: {error}") from error


def _class_names(spec: Spec, base: Path, path: Path, classes: int) -> tuple[str, ...]:
    if not path.is_file():
        return tuple(str(label) for label in range(classes))
    try:
        names = parse_json(read_bounded(path, MAX_JSON_BYTES))
    except ValueError as error:
        raise LAYOUT.error(spec, base, f"{CLASSES} {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LAYOUT.error(spec, base, f"{CLASSES} is not a list of names")
    return tuple(names)
