"""Small data sets in the formats that the real ones are published in."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import struct
import tarfile
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote in protocol 2: all text is byte strings, numpy has its old module names."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012 - as pickle itself has it

    def __init__(self, file):
        super().__init__(file, protocol=2)

    def save_text(self, value):
        data = value if isinstance(value, bytes) else value.encode("latin1")
        short = len(data) < 256
        head = pickle.SHORT_BINSTRING + bytes([len(data)]) if short else b"T" + struct.pack("<i", len(data))
        self.write(head + data)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_text

    def save_global(self, obj, name=None):
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(f"c{module}\n{name or obj.__name__}\n".encode())
        self.memoize(obj)

    dispatch[type] = save_global


def python2_pickle(values) -> bytes:
    """The bytes of such a pickle."""
    file = io.BytesIO()
    Python2Pickler(file).dump(values)
    return file.getvalue()


def random_image(*key: int, size=(32, 32), channels: int = 3) -> np.ndarray:
    """Pixels `(H, W, channels)`, or `(H, W)` for one channel."""
    shape = size if channels == 1 else (*size, channels)
    noise = hashlib.shake_256(repr(key).encode()).digest(math.prod(shape))
    return np.frombuffer(noise, dtype=np.uint8).reshape(shape)


def write_cifar(root: Path, classes: int, rows: int = 20, dump=python2_pickle) -> np.ndarray:
    """CIFAR-10 or CIFAR-100 with this many rows in a file; gives all images, train's first."""
    ten = classes == 10
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    batches = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    images = []
    for number, name in enumerate(batches if ten else ["train", "test"]):
        pixels = np.stack([random_image(number, row) for row in range(rows)])
        labels = [(row * 7 + number) % classes for row in range(rows)]
        values = {
            "data": pixels.transpose(0, 3, 1, 2).reshape(rows, -1),
            "filenames": [f"image_{row}.png" for row in range(rows)],
            "batch_label": f"batch {number}",
        }
        values |= {"labels": labels} if ten else {"fine_labels": labels, "coarse_labels": [0] * rows}
        (folder / name).write_bytes(dump(values))
        images.append(pixels)
    if ten:
        meta = {"num_cases_per_batch": 10000, "label_names": list(CIFAR10), "num_vis": 3072}
    else:
        names = [f"class {label:02d}" for label in range(100)]
        meta = {"fine_label_names": names, "coarse_label_names": ["things"] * 20}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(dump(meta))
    return np.concatenate(images)


def save_image(path: Path, pixels: np.ndarray, **options) -> Path:
    """Write an image in the format of the file's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG"}.get(path.suffix.lower())
    Image.fromarray(pixels).save(path, kind, **options)
    return path


def write_tree(root: Path, classes, files: int = 3, *, ending=".png", size=(8, 8), inside="") -> Path:
    """A folder per class with images in it."""
    for label, name in enumerate(classes):
        for number in range(files):
            # Names whose order as text is not that of their numbers.
            file = root / name / inside / f"{name}_{number * 5}{ending}"
            save_image(file, random_image(label, number, size=size))
    return root


WNIDS = ("n01443537", "n01629819", "n02124075")


def write_tiny_imagenet(root: Path) -> Path:
    """Three classes of Tiny ImageNet, listed in wnids.txt in another order than the sorted one."""
    write_tree(root / "train", WNIDS, ending=".JPEG", size=(64, 64), inside="images")
    for wnid in WNIDS:
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    lines = []
    for number in range(6):
        save_image(root / "val" / "images" / f"val_{number}.JPEG", random_image(9, number, size=(64, 64)))
        lines.append(f"val_{number}.JPEG\t{WNIDS[2 - number % 3]}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in reversed(WNIDS)))
    return root


def write_imagenet(root: Path) -> Path:
    """Three classes of ImageNet with images of several sizes."""
    for split in ("train", "val"):
        for label, wnid in enumerate(WNIDS):
            for number in range(3):
                size = (40 + 8 * number, 60 - 4 * label)
                save_image(root / split / wnid / f"{wnid}_{number}.JPEG", random_image(label, size=size))
    return root


def write_cinic10(root: Path) -> Path:
    """Two images of every class in every split."""
    for split in ("train", "valid", "test"):
        write_tree(root / split, CIFAR10, 2, size=(32, 32))
    return root


def write_arrays(
    folder: Path, rows: int = 30, *, channels=3, size=(6, 7), names=("a", "b", "c")
) -> np.ndarray:
    """images.npy, labels.npy and classes.json; gives the images."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.stack([random_image(row, size=size, channels=channels) for row in range(rows)])
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", np.arange(rows, dtype=np.int16) % 3)
    if names:
        (folder / "classes.json").write_text(json.dumps(names))
    return images


def write_tar(path: Path, members, **options) -> Path:
    """Write a tar file of pairs of a name and its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """Bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_shards(root: Path) -> Path:
    """Two shards of train and of val, with images of three sizes that are the same with every Pillow."""
    for split in ("train", "val"):
        for shard in range(2):
            members = []
            for number in range(6 * shard, 6 * shard + 6):
                image = random_image(len(split), number, size=(6 + number % 3, 8))
                members += [
                    (f"{number:03}.ppm", encoded(image, "PPM")),
                    (f"{number:03}.cls", b"%d" % (number % 3)),
                ]
            write_tar(root / f"{split}-{shard}.tar", members)
    return root


class Numbered:
    """A map-style data set of uint8 arrays without any of torchvision's attributes."""

    def __init__(self, root=None, split="train", rows=30):
        self.rows = rows if split == "train" else 6

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        if index >= self.rows:
            raise IndexError(index)
        return random_image(index, size=(5, 6 + index % 2)), index % 3


def touch_later(path: Path, seconds: int = 7) -> None:
    """Set a file's time of change to later, as a change of it does."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + seconds * 10**9))


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def assert_as_image_folder(source, folder):
    from torchvision.datasets import ImageFolder

    expected = ImageFolder(folder)
    assert source.class_names == tuple(expected.classes)
    assert source.labels.tolist() == expected.targets
    assert [source.path(i) for i in range(len(expected))] == [path for path, _ in expected.samples]
    for ours, (theirs, _) in zip(source.pixels(np.arange(len(expected))), expected, strict=True):
        assert np.array_equal(ours, np.array(theirs))
