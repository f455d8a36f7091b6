"""CIFAR-10 and CIFAR-100 from pickles as Python 2 wrote them, and pickles that are not read."""

from __future__ import annotations

import functools
import os
import pickle
import re
import warnings

import numpy as np
import pytest
import torchvision
from image_files import CIFAR10, python2_pickle, write_cifar

from coursepack.data import open_source
from coursepack.data.sources.cifar import read_plain_pickle
from coursepack.errors import SourceError

FOLDERS = {10: "cifar-10-batches-py", 100: "cifar-100-python"}
python3_pickle = functools.partial(pickle.dumps, protocol=2)


def all_pixels(source):
    return source.pixels(np.arange(len(source.labels)))


@pytest.mark.parametrize("dump", [python2_pickle, python3_pickle, pickle.dumps])
@pytest.mark.parametrize("classes", [10, 100])
def test_both_data_sets(tmp_path, classes, dump):
    images = write_cifar(tmp_path, classes, dump=dump)
    train, test = (open_source(f"cifar{classes}:{split}", tmp_path) for split in ("train", "test"))
    assert np.array_equal(np.concatenate([all_pixels(train), all_pixels(test)]), images)
    assert len(test.labels) == 20
    batches = 6 if classes == 10 else 2
    expected = [(row * 7 + number) % classes for number in range(batches) for row in range(20)]
    assert [*train.labels, *test.labels] == expected
    assert train.class_names == (CIFAR10 if classes == 10 else tuple(f"class {i:02d}" for i in range(100)))


def test_the_folder_itself_is_a_root_too(tmp_path):
    write_cifar(tmp_path, 100)
    inside = open_source("cifar100", tmp_path / FOLDERS[100])
    assert inside.fingerprint == open_source("cifar100", tmp_path).fingerprint


@pytest.mark.parametrize("classes", [10, 100])
def test_pixels_and_labels_are_torchvisions(tmp_path, monkeypatch, classes):
    write_cifar(tmp_path, classes)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    for split in ("train", "test"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # numpy.core, which the real files name
            theirs = getattr(torchvision.datasets, f"CIFAR{classes}")(tmp_path, train=split == "train")
        ours = open_source(f"cifar{classes}:{split}", tmp_path)
        assert np.array_equal(all_pixels(ours), theirs.data)
        assert ours.labels.tolist() == theirs.targets
        assert list(ours.class_names) == theirs.classes


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["train", "meta"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, name, protocol):
    write_cifar(tmp_path, 100)
    file = tmp_path / FOLDERS[100] / name
    attack = Attack(tmp_path / "made")
    file.write_bytes(pickle.dumps({"data": attack}, protocol))
    with pytest.raises(
        SourceError, match=f"file '{name}' refers to .*mkdir, which no original CIFAR file does"
    ):
        open_source("cifar100", tmp_path)
    assert not (tmp_path / "made").exists()
    pickle.loads(file.read_bytes())
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\nndarray\n((I4\ntR.",  # the class as a function
        b"cnumpy\nndarray.__new__\n(tR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cbuiltins\ngetattr\n(tR.",
        b"c_codecs\ndecode\n(S'x'\ntR.",
    ],
)
def test_pickles_that_reach_for_functions(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(Exception, match=r"refers to|is damaged"):
        read_plain_pickle(tmp_path / "file")


def change(values, **changes):
    return python2_pickle(values | changes)


GOOD = {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 1]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "file 'train' is damaged: Ran out of input"),
        (b"not a pickle", "file 'train' is damaged: "),
        (python2_pickle(GOOD)[:3000], "file 'train' is damaged: "),
        (python2_pickle([1]), "file 'train' holds a list, expected a dict"),
        (python2_pickle({}), r"file 'train' has data of shape NoneType, expected \(N, 3072\)"),
        (change(GOOD, data=np.zeros((2, 12), np.uint8)), r"has data of shape \(2, 12\), expected \(N, "),
        (change(GOOD, data=np.zeros((2, 3072))), r"holds an array of f8, expected bytes \(u1\)"),
        (change(GOOD, data=np.array([None])), r"holds an array of O8, expected bytes \(u1\)"),
        (change(GOOD, fine_labels=[0]), "has 1 fine_labels for 2 images"),
        (change(GOOD, fine_labels=None), "has no fine_labels for 2 images"),
        (change(GOOD, fine_labels=[0, 100]), "has the label 100, expected 0 to 99"),
        (change(GOOD, fine_labels=[0, "1"]), "has the label b'1', expected 0 to 99"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path, content, text):
    write_cifar(tmp_path, 100)
    (tmp_path / FOLDERS[100] / "train").write_bytes(content)
    with pytest.raises(SourceError, match=text):
        open_source("cifar100", tmp_path)
    open_source("cifar100:test", tmp_path)


def test_class_names_that_are_missing(tmp_path):
    write_cifar(tmp_path, 10)
    (tmp_path / FOLDERS[10] / "batches.meta").write_bytes(python2_pickle({"label_names": []}))
    with pytest.raises(SourceError, match=r"file 'batches.meta' has no 'label_names'"):
        open_source("cifar10", tmp_path)


def test_what_is_missing_and_where_to_get_it(tmp_path):
    (tmp_path / "photos").mkdir()
    text = (
        f"source 'cifar100:train' cannot be read from --root '{tmp_path}': there is no folder "
        "'cifar-100-python'; found photos/. Expected there: cifar-100-python with train, test and meta. Get "
        "'CIFAR-100 python version' (cifar-100-python.tar.gz) from its home page, "
        "www.cs.toronto.edu/~kriz/cifar.html, and unpack it there."
    )
    with pytest.raises(SourceError, match=f"^{re.escape(text)}$"):
        open_source("cifar100", tmp_path)
    write_cifar(tmp_path, 10)
    (tmp_path / FOLDERS[10] / "data_batch_3").unlink()
    with pytest.raises(
        SourceError, match=r"there is no file 'data_batch_3'; found batches\.meta, data_batch_1"
    ):
        open_source("cifar10", tmp_path)


def test_fingerprint_tells_a_change_of_any_pixel_or_label(tmp_path):
    write_cifar(tmp_path, 100)
    prints = {
        open_source("cifar100", tmp_path).fingerprint,
        open_source("cifar100:test", tmp_path).fingerprint,
    }
    path = tmp_path / FOLDERS[100] / "train"
    values = {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 1]}
    brighter = np.zeros((2, 3072), np.uint8)
    brighter[1, 3071] = 1
    for changed in (values, values | {"fine_labels": [0, 2]}, values | {"data": brighter}):
        path.write_bytes(python2_pickle(changed))
        prints.add(open_source("cifar100", tmp_path).fingerprint)
    assert len(prints) == 5
