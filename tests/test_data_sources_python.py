"""Map-style data sets from Python: images and labels of every kind, and data sets that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from image_files import Numbered, random_image
from PIL import Image

from coursepack.data import open_source
from coursepack.errors import CoursepackError, RecipeError, SourceError


def all_pixels(source):
    return source.pixels(np.arange(len(source.labels)))


class Listed(Numbered):
    """With torchvision's attributes, and images of a kind of choice."""

    make = staticmethod(lambda pixels: pixels)
    classes = ("x", "y", "z")

    @property
    def targets(self):
        return [index % 3 for index in range(self.rows)]

    def __getitem__(self, index):
        pixels, label = super().__getitem__(index)
        return self.make(pixels), label


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module `own_data` with a class `Own`, to be changed."""
    (tmp_path / "own_data.py").write_text("Own = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    import own_data

    own_data.Own = type("Own", (Listed,), {})
    yield own_data
    __import__("sys").modules.pop("own_data")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda pixels: pixels, lambda pixels: pixels),
        (lambda pixels: pixels[..., 0], lambda pixels: pixels[..., :1]),
        (Image.fromarray, lambda pixels: pixels),
        (lambda pixels: Image.fromarray(pixels[..., 1].copy()), lambda pixels: pixels[..., 1:2]),
        (lambda pixels: torch.tensor(pixels).permute(2, 0, 1), lambda pixels: pixels),
        (lambda pixels: torch.tensor(pixels[..., 0]), lambda pixels: pixels[..., :1]),
        (lambda pixels: Image.fromarray(pixels).convert("RGBA"), lambda pixels: pixels),
    ],
    ids=["array", "gray array", "PIL", "gray PIL", "tensor", "gray tensor", "RGBA"],
)
def test_images_of_every_kind(module, make, expected):
    module.Own.make = staticmethod(make)
    source = open_source("python:own_data:Own:test")
    assert source.name == "python:own_data:Own:test"
    assert source.class_names == ("x", "y", "z")
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
    for index, image in enumerate(all_pixels(source)):
        assert np.array_equal(image, expected(random_image(index, size=(5, 6 + index % 2))))
    assert source.sizes(np.array([0, 1])).tolist() == [[5, 6], [5, 7]]


def test_labels_without_attributes_come_with_the_images():
    source = open_source("python:image_files:Numbered")
    assert source.labels.tolist() == [0, 1, 2] * 10
    assert source.class_names == ("0", "1", "2")


@pytest.mark.parametrize("attribute", ["targets", "labels"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_labels_from_attributes(module, attribute, kind):
    module.Own.targets = None
    setattr(module.Own, attribute, kind([2, 1, 0] * 10))
    assert open_source("python:own_data:Own").labels.tolist() == [2, 1, 0] * 10


@pytest.mark.parametrize(
    "change",
    [
        {"targets": [0, 2, 1] * 10},
        {"classes": ("x", "y", "w")},
        {"make": staticmethod(lambda pixels: pixels // 2)},
        {"make": staticmethod(lambda pixels: pixels[..., :1])},
    ],
)
def test_fingerprint_tells_a_change(module, change):
    before = open_source("python:own_data:Own").fingerprint
    assert open_source("python:own_data:Own").fingerprint == before
    for name, value in change.items():
        setattr(module.Own, name, value)
    assert open_source("python:own_data:Own").fingerprint != before


def test_a_factory_gets_root_and_split(module, tmp_path):
    asked = []
    module.make = lambda root, split: asked.append((root, split)) or Listed()
    all_pixels(open_source("python:own_data:make:my-split", tmp_path))
    assert asked == [(tmp_path, "my-split")]


def _once(pixels, seen=[]):  # noqa: B006
    seen.append(None)
    return pixels ^ np.uint8(len(seen) % 251)


def _one_channel_less(pixels):
    return pixels[..., :1] if pixels.shape[1] == 7 else pixels


def _fail(*_arguments, **_keywords):
    raise ZeroDivisionError("no")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"make": lambda pixels: pixels / 255},
         r"the image of sample 0 is a float64 array of shape \(5, 6, 3\), expected a PIL image, a uint8 "),
        ({"make": lambda pixels: torch.tensor(pixels).float()}, r"is a float32 tensor of shape \(5, 6, 3\)"),
        ({"make": str}, "the image of sample 0 is a str, expected a PIL image"),
        ({"make": _one_channel_less}, "sample 1 has 1 channels, but sample 0 has 3"),
        ({"make": _once}, "returns different pixels each time sample 0 is loaded: remove random"),
        ({"make": _fail}, "sample 0 of source 'python:own_data:Own:train' cannot be read: ZeroDivision"),
        ({"targets": [0.5] * 30}, "the labels of targets are not integers"),
        ({"targets": ["a"] * 30}, "the labels of targets are not integers"),
        ({"targets": [0]}, "has 1 targets for 30 samples"),
        ({"targets": [3] * 30}, "has the label 3, expected 0 to 2"),
        ({"targets": [-1] * 30}, "has the label -1, expected 0 to 2"),
        ({"targets": None, "__getitem__": lambda _, index: index}, "sample 0 is a int, expected a pair"),
        ({"__len__": lambda _: 0}, "has no samples"),
        ({"__init__": _fail}, r"Own\(root=None, split='train'\) failed: ZeroDivisionError: no"),
    ],
)  # fmt: skip
def test_data_sets_that_are_refused(module, changes, text):
    for name, value in changes.items():
        setattr(module.Own, name, staticmethod(value) if name == "make" else value)
    with pytest.raises(SourceError, match=text):
        open_source("python:own_data:Own")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (
            "python:no_such_module:f",
            r"cannot import 'no_such_module': No module named 'no_such_module'\. Modules",
        ),
        ("python:own_data:absent", "module 'own_data' has no 'absent'"),
        ("python:own_data:count", "count returned a int, expected a map-style data set"),
    ],
)
def test_factories_that_are_refused(module, spec, text):
    module.count = lambda **_: 3
    with pytest.raises(RecipeError, match=text):
        open_source(spec)


def test_an_error_of_ours_in_a_factory_stays_as_it_is(module):
    def fail(root, split):
        raise CoursepackError("mine")

    module.fail = fail
    with pytest.raises(CoursepackError, match=r"^mine$"):
        open_source("python:own_data:fail")
