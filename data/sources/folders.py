"""Trees of image files: any ImageFolder, and the data sets that are distributed as one.

Classes are sorted by name and files by path, so indices are those of torchvision's ImageFolder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coursepack.data.sources.files import open_files
from coursepack.data.sources.roots import Layout, found_in, summarize_names

if TYPE_CHECKING:
    from pathlib import Path

    from coursepack.data.sources.base import Source, Spec

SPLIT_NAMES = frozenset({"train", "val", "valid", "validation", "test"})
"""Folder names that denote splits rather than classes."""
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@dataclass(frozen=True)
class _Tree:
    """Folder of one split, with one folder of images per class."""

    spec: Spec
    layout: Layout
    root: Path
    folder: str
    """Path relative to the root; empty for the root itself."""

    @property
    def path(self) -> Path:
        return self.root / self.folder

    def classes(self) -> list[str]:
        """Return the names of the class folders, sorted.

        Raises:
            SourceError: there are no class folders.
        """
        if not self.path.is_dir():
            raise self.error(f"there is no folder {self.folder!r}; {found_in(self.root)}")
        with os.scandir(self.path) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
        if not names:
            raise self.error(f"folder {str(self.path)!r} has no class folders; {found_in(self.path)}")
        return names

    def open(self, classes: list[str]) -> Source:
        """Open the images of the classes as a source.

        Raises:
            SourceError: a class has no images.
        """
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        ids = {name: label for label, name in enumerate(classes)}
        found = make_dataset(str(self.path), ids, extensions=IMG_EXTENSIONS, allow_empty=True)
        if len({label for _, label in found}) < len(classes):
            present = {label for _, label in found}
            empty = [name for name, label in ids.items() if label not in present]
            raise self.error(
                f"{len(empty)} of {len(classes)} class folders in {str(self.path)!r} hold no images: "
                f"{summarize_names(empty)}"
            )
        files = [path.removeprefix(f"{self.root}{os.sep}") for path, _ in found]
        return open_files(
            str(self.spec), str(self.root), files, [label for _, label in found], tuple(classes)
        )

    def error(self, problem: str) -> Exception:
        return self.layout.error(self.spec, self.root, problem)


FOLDER = Layout("SPLIT/CLASS/**, images in a folder per class, or CLASS/** for a single split 'train'", "")


def folder(spec: Spec, root: Path | None) -> Source:
    """Open an ImageFolder tree: `root/SPLIT/CLASS/**`, or `root/CLASS/**` if there are no split folders."""
    base = FOLDER.root(spec, root)
    tree = _Tree(spec, FOLDER, base, spec.split)
    if not tree.path.is_dir() and spec.split == "train":
        tree = _Tree(spec, FOLDER, base, "")
        classes = tree.classes()
        if SPLIT_NAMES & set(classes):
            raise tree.error(f"there is no folder 'train'; {found_in(base)}")
        return tree.open(classes)
    return tree.open(_checked_classes(tree))


IMAGENET = Layout(
    "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG",
    "Get ILSVRC2012 from its home page, image-net.org (it asks for a login): ILSVRC2012_img_train.tar and "
    "ILSVRC2012_img_val.tar, unpacked into a folder per class.",
)


def imagenet(spec: Spec, root: Path | None) -> Source:
    """Open ImageNet (ILSVRC 2012), or a subset of it in the same layout. Class names are wnids."""
    base = IMAGENET.root(spec, root)
    tree = _Tree(spec, IMAGENET, base, spec.split)
    if tree.path.is_dir() and any(path.suffix == ".JPEG" for path in tree.path.iterdir()):
        raise tree.error(
            f"folder {spec.split!r} holds images outside of class folders. Move each into a folder named "
            "after its wnid; torchvision.datasets.ImageNet does that from ILSVRC2012_devkit_t12.tar.gz"
        )
    return tree.open(_checked_classes(tree))


CINIC = Layout(
    "train, valid and test, in each the folders airplane to truck with .png files",
    "Get CINIC-10.tar.gz from its home page, datashare.ed.ac.uk/handle/10283/3192, and unpack it there.",
)


def cinic10(spec: Spec, root: Path | None) -> Source:
    """Open CINIC-10 (Darlow et al. 2018): CIFAR-10's classes, 90,000 images of 32 x 32 in each split."""
    base = CINIC.root(spec, root)
    tree = _Tree(spec, CINIC, base, spec.split)
    classes = tree.classes()
    if tuple(classes) != CIFAR_CLASSES:
        raise tree.error(
            f"folder {spec.split!r} has the classes {summarize_names(classes)}; expected those of CIFAR-10"
        )
    return tree.open(classes)


TINY = Layout(
    "wnids.txt, train/<wnid>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt",
    "Get tiny-imagenet-200.zip from its home page, cs231n.stanford.edu, and unpack it there.",
)
TINY_FOLDER = "tiny-imagenet-200"


def tiny_imagenet(spec: Spec, root: Path | None) -> Source:
    """Open Tiny ImageNet (CS231n): 200 classes, 64 x 64. Its test images have no labels and are left out.

    Classes are the sorted wnids, as in an ImageFolder of `train`, not in the order of wnids.txt.
    """
    base = TINY.root(spec, root)
    if (base / TINY_FOLDER).is_dir():
        base = base / TINY_FOLDER
    tree = _Tree(spec, TINY, base, spec.split)
    if not (base / "wnids.txt").is_file():
        raise tree.error(f"there is no file 'wnids.txt'; {found_in(base)}")
    classes = sorted((base / "wnids.txt").read_text().split())
    if spec.split == "train":
        found = tree.classes()
        if found != classes:
            raise tree.error(f"classes of wnids.txt and of 'train' differ: {_difference(classes, found)}")
        return tree.open(classes)
    annotations = base / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise tree.error("there is no file 'val/val_annotations.txt'")
    ids = {name: label for label, name in enumerate(classes)}
    files, labels = [], []
    for number, line in enumerate(annotations.read_text().splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in ids:
            raise tree.error(
                f"line {number} of 'val/val_annotations.txt' is {line!r}, expected a file's name, a tab and "
                "a wnid of wnids.txt"
            )
        files.append(f"val/images/{fields[0]}")
        labels.append(ids[fields[1]])
    if not files:
        raise tree.error("'val/val_annotations.txt' is empty")
    return open_files(str(spec), str(base), files, labels, tuple(classes))


def _checked_classes(tree: _Tree) -> list[str]:
    """Return the classes of a split.

    Raises:
        SourceError: `train` has other classes, so that class ids would differ between the splits.
    """
    classes = tree.classes()
    training = _Tree(tree.spec, tree.layout, tree.root, "train")
    if tree.folder != "train" and training.path.is_dir() and training.classes() != classes:
        raise tree.error(
            f"classes of 'train' and of {tree.folder!r} differ: {_difference(training.classes(), classes)}"
        )
    return classes


def _difference(expected: list[str], found: list[str]) -> str:
    missing = [name for name in expected if name not in set(found)]
    unexpected = [name for name in found if name not in set(expected)]
    texts = [f"missing: {summarize_names(missing)}"] if missing else []
    return "; ".join(texts + ([f"unexpected: {summarize_names(unexpected)}"] if unexpected else []))
