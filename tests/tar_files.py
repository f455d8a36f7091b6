"""Images in shards, and the same images in a folder."""

from __future__ import annotations

import tarfile

import numpy as np
from image_files import encoded, random_image, save_image, touch_later, write_tar

CLASSES = ("ant", "bee", "cat")
PNG = encoded(random_image(1, size=(8, 8)))


def pixels_of(source):
    return list(source.pixels(np.arange(len(source.labels))))


def write_images(root, classes=CLASSES, files=4):
    """An ImageFolder tree of JPEG and PNG files of two sizes."""
    for label, name in enumerate(classes):
        for number in range(files):
            image = random_image(label, number, size=(9, 8 + number % 2))
            save_image(root / "train" / name / f"{number}.{'jpg' if number % 2 else 'png'}", image)
    return root


def members_of(tree):
    """Members with the images of a tree, in the order of their indices in an ImageFolder."""
    return [(path.relative_to(tree).as_posix(), path.read_bytes()) for path in sorted(tree.rglob("*.*g"))]


def write_in_shards(folder, members, count=3):
    """The members in shards `s-0.tar` and so on; shards share the members of no sample."""
    share = -(-len(members) // count)
    for shard in range(count):
        write_tar(folder / f"s-{shard}.tar", members[shard * share : shard * share + share])
    return folder


def assert_same_samples(source, other):
    assert source.labels.tolist() == other.labels.tolist()
    samples = np.arange(len(other.labels))
    assert np.array_equal(source.sizes(samples), other.sizes(samples))
    assert np.array_equal(source.contents(samples), other.contents(samples))
    for ours, theirs in zip(pixels_of(source), pixels_of(other), strict=True):
        assert np.array_equal(ours, theirs)


def rewritten(path, change):
    """Write a shard again with other members, or at another time."""
    with tarfile.open(path) as archive:
        members = [(each.name, archive.extractfile(each).read()) for each in archive]
    write_tar(path, change(members))
    touch_later(path)
