"""Trees of image files: which samples they have, in which order, and trees that are refused."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from image_files import (
    CIFAR10,
    WNIDS,
    assert_as_image_folder,
    random_image,
    save_image,
    write_cinic10,
    write_imagenet,
    write_tiny_imagenet,
    write_tree,
)
from PIL import Image

from coursepack.data import open_source
from coursepack.errors import SourceError


def all_pixels(source):
    return source.pixels(np.arange(len(source.labels)))


def test_a_folder_is_numbered_as_by_torchvision(tmp_path):
    split = write_imagenet(tmp_path) / "train"
    save_image(split / WNIDS[1] / "a" / "later.PNG", random_image(1))
    save_image(split / WNIDS[1] / "B" / "first.jpg", random_image(2, size=(3, 5)))
    save_image(split / "Été" / "été 1.png", random_image(3))
    (split / "Été" / "notes.txt").write_text("no image")
    assert_as_image_folder(open_source("folder", tmp_path), split)


def test_a_folder_without_splits_is_its_own_train(tmp_path):
    write_tree(tmp_path, ("b", "a"))
    assert_as_image_folder(open_source("folder", tmp_path), tmp_path)
    with pytest.raises(SourceError, match=r"there is no folder 'val'; found a/, b/"):
        open_source("folder:val", tmp_path)


def test_any_folder_is_a_split(tree):
    shutil.copytree(tree / "train", tree / "my-split")
    source = open_source("folder:my-split", tree)
    assert source.name == "folder:my-split"
    assert_as_image_folder(source, tree / "my-split")


def test_split_folders_are_no_classes(tree):
    (tree / "train").rename(tree / "val")
    with pytest.raises(SourceError, match=r"there is no folder 'train'; found val/"):
        open_source("folder", tree)


def test_imagenet(tmp_path):
    write_imagenet(tmp_path)
    for split in ("train", "val"):
        source = open_source(f"imagenet:{split}", tmp_path)
        assert_as_image_folder(source, tmp_path / split)
        assert source.in_memory is None
        assert source.sizes(np.array([1, 3])).tolist() == [[48, 60], [40, 56]]


def test_flat_validation_images_of_imagenet_are_refused(tmp_path):
    write_imagenet(tmp_path)
    shutil.move(tmp_path / "val" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG", tmp_path / "val")
    with pytest.raises(SourceError, match=r"folder 'val' holds images outside of class folders\. Move"):
        open_source("imagenet:val", tmp_path)


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_another_list_of_classes_than_in_training_is_refused(tmp_path, name):
    write_imagenet(tmp_path)
    (tmp_path / "val" / WNIDS[0]).rename(tmp_path / "val" / "other")
    text = f"classes of 'train' and of 'val' differ: missing: {WNIDS[0]}; unexpected: other"
    with pytest.raises(SourceError, match=text):
        open_source(f"{name}:val", tmp_path)


def test_an_empty_class_is_refused(tree):
    (tree / "train" / "dog").mkdir()
    with pytest.raises(SourceError, match=r"1 of 4 class folders in '.*train' hold no images: dog"):
        open_source("folder", tree)


@pytest.mark.parametrize("inside", ["", "tiny-imagenet-200"])
def test_tiny_imagenet(tmp_path, inside):
    folder = write_tiny_imagenet(tmp_path / inside)
    train, val = (open_source(f"tiny-imagenet:{split}", tmp_path) for split in ("train", "val"))
    assert_as_image_folder(train, folder / "train")
    assert val.class_names == train.class_names == WNIDS
    assert val.labels.tolist() == [2, 1, 0, 2, 1, 0]
    assert val.path(4) == str(folder / "val" / "images" / "val_4.JPEG")
    assert val.in_memory.shape == (6, 64, 64, 3)
    assert np.array_equal(val.in_memory[4], np.array(Image.open(val.path(4)).convert("RGB")))


def _spoil_notes(folder):
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG n0\n")


@pytest.mark.parametrize(
    ("spec", "spoil", "text"),
    [
        (
            "val",
            _spoil_notes,
            "line 1 of 'val/val_annotations.txt' is 'val_0.JPEG n0', expected a file's name",
        ),
        (
            "val",
            lambda folder: (folder / "val" / "val_annotations.txt").unlink(),
            "no file 'val/val_annotations",
        ),
        (
            "train",
            lambda folder: (folder / "wnids.txt").unlink(),
            "there is no file 'wnids.txt'; found train/",
        ),
        (
            "train",
            lambda folder: (folder / "wnids.txt").write_text("n1\n"),
            "differ: missing: n1; unexpected: ",
        ),
        (
            "train",
            lambda folder: shutil.rmtree(folder / "train"),
            "there is no folder 'train'; found val/, wnids",
        ),
    ],
)
def test_damaged_tiny_imagenet(tmp_path, spec, spoil, text):
    spoil(write_tiny_imagenet(tmp_path))
    with pytest.raises(SourceError, match=text):
        open_source(f"tiny-imagenet:{spec}", tmp_path)


def test_cinic10(tmp_path):
    write_cinic10(tmp_path)
    for split in ("train", "valid", "test"):
        source = open_source(f"cinic10:{split}", tmp_path)
        assert_as_image_folder(source, tmp_path / split)
        assert source.class_names == CIFAR10
        assert source.in_memory.shape == (20, 32, 32, 3)
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "lion")
    text = (
        f"source 'cinic10:test' cannot be read from --root '{tmp_path}': folder 'test' has the classes "
        "airplane, automobile, bird, deer, dog, frog, horse, lion and 2 more; expected those of CIFAR-10. "
        "Expected there: train, valid and test, in each the folders airplane to truck with .png files. Get "
        "CINIC-10.tar.gz from its home page, datashare.ed.ac.uk/handle/10283/3192, and unpack it there."
    )
    with pytest.raises(SourceError, match=f"^{re.escape(text)}$"):
        open_source("cinic10:test", tmp_path)
