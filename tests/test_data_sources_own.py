"""Sources without image files: .npy arrays and drawn images."""

from __future__ import annotations

import json

import numpy as np
import pytest
from image_files import touch_later, write_arrays

from coursepack.data import open_source
from coursepack.data.sources import fake
from coursepack.errors import RecipeError, SourceError, UnknownName


def all_pixels(source):
    return source.pixels(np.arange(len(source.labels)))


# ---- arrays


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays(tmp_path, channels):
    images = write_arrays(tmp_path / "train", channels=channels)
    test = write_arrays(tmp_path / "test", 5, channels=channels, names=())
    source = open_source("arrays", tmp_path)
    assert source.channels == channels
    assert source.labels.tolist() == [0, 1, 2] * 10
    assert source.class_names == ("a", "b", "c")
    assert np.array_equal(all_pixels(source), images.reshape(30, 6, 7, channels))
    assert isinstance(source.in_memory, np.memmap)
    assert source.sizes(np.array([1])).tolist() == [[6, 7]]
    other = open_source("arrays:test", tmp_path)
    assert other.class_names == ("0", "1", "2")
    assert np.array_equal(all_pixels(other), test.reshape(5, 6, 7, channels))


def test_arrays_without_splits_are_their_own_train(tmp_path):
    images = write_arrays(tmp_path)
    assert np.array_equal(all_pixels(open_source("arrays", tmp_path)), images)
    with pytest.raises(
        SourceError, match=r"there is no folder 'test'; found classes.json, images.npy, labels"
    ):
        open_source("arrays:test", tmp_path)


def _shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


def _zip(path):
    with path.open("wb") as file:
        np.savez(file, np.zeros(3))


def _names(folder, text):
    (folder / "classes.json").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda f: (f / "labels.npy").unlink(),
         "there is no file 'labels.npy' in '.*train'; found classes.json"),
        (lambda f: (f / "images.npy").write_bytes(b"junk"), "images.npy' is damaged or no .npy file: "),
        (lambda f: _shorten(f / "images.npy"), "is damaged or no .npy"),
        (lambda f: _zip(f / "images.npy"), "is damaged or no .npy file"),
        (lambda f: np.save(f / "images.npy", np.zeros((30, 6, 7), np.float32)),
         r"images.npy holds float32 of shape \(30, 6, 7\), expected uint8 \(N, H, W\) or \(N, H, W, "),
        (lambda f: np.save(f / "images.npy", np.zeros((30, 3, 6, 7), np.uint8)),
         r"of shape \(30, 3, 6, 7\)"),
        (lambda f: np.save(f / "labels.npy", np.zeros(29, int)),
         r"labels.npy holds int64 of shape \(29,\) for 30 images, expected one integer for each"),
        (lambda f: np.save(f / "labels.npy", np.zeros(30)), "labels.npy holds float64"),
        (lambda f: np.save(f / "labels.npy", np.full(30, -1)), "holds the label -1, expected 0 to 2"),
        (lambda f: np.save(f / "labels.npy", np.full(30, 3)), "holds the label 3, expected 0 to 2"),
        (lambda f: np.save(f / "labels.npy", np.array([None] * 30)),
         "labels.npy' is damaged or no .npy file"),
        (lambda f: _names(f, '["a"'), "classes.json is not JSON"),
        (lambda f: _names(f, '{"a": 1}'), "classes.json is not a list of names"),
        (lambda f: _names(f, "[1, 2, 3]"), "classes.json is not a list of names"),
    ],
)  # fmt: skip
def test_arrays_that_are_refused(tmp_path, spoil, text):
    write_arrays(tmp_path / "train")
    spoil(tmp_path / "train")
    with pytest.raises(SourceError, match=text):
        open_source("arrays", tmp_path)


def test_fingerprint_of_arrays(tmp_path):
    folder = tmp_path / "train"
    images = write_arrays(folder)

    def now():
        return open_source("arrays", tmp_path).fingerprint

    first = now()
    touch_later(folder / "images.npy")
    write_arrays(tmp_path / "elsewhere" / "train")
    assert now() == open_source("arrays", tmp_path / "elsewhere").fingerprint == first
    prints = {first}
    np.save(folder / "labels.npy", np.array([1, 0, 2] * 10))
    prints.add(now())
    np.save(folder / "images.npy", images ^ np.arange(30, dtype=np.uint8).reshape(-1, 1, 1, 1) // 29)
    prints.add(now())
    (folder / "classes.json").write_text(json.dumps(["a", "b", "d"]))
    prints.add(now())
    assert len(prints) == 4


# ---- fake


def test_fake_has_what_was_asked_for():
    source = open_source("fake,classes=7,size=12,samples=40,channels=1,seed=3:train")
    assert source.name == "fake,classes=7,size=12,samples=40,channels=1,seed=3:train"
    assert source.in_memory.shape == (40, 12, 12, 1)
    assert len(source.class_names) == 7
    assert np.bincount(source.labels).tolist() == [6, 6, 6, 6, 6, 5, 5]
    assert len(open_source("fake,samples=41:test").labels) == 9


def test_options_at_their_defaults_are_not_in_the_name():
    plain = open_source("fake")
    same = open_source("fake,seed=0,samples=10000,classes=10")
    assert (same.name, same.fingerprint) == ("fake:train", plain.fingerprint)
    assert open_source("fake,seed=1,classes=3").name == "fake,classes=3,seed=1:train"


@pytest.mark.parametrize("option", ["seed=1", "classes=9", "size=31", "channels=1", "samples=9999"])
def test_every_option_of_fake_makes_another_source(option):
    assert open_source(f"fake,{option}").fingerprint != open_source("fake").fingerprint


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_nearest_mean_tells_the_fake_classes_apart(split):
    train, test = (open_source(f"fake,samples=3000:{part}") for part in ("train", split))
    flat = train.in_memory.reshape(3000, -1) / 255
    means = np.stack([flat[train.labels == label].mean(0) for label in range(10)])
    other = test.in_memory.reshape(len(test.labels), -1) / 255
    chosen = (other @ means.T - 0.5 * (means**2).sum(1)).argmax(1)
    assert (chosen == test.labels).mean() > 0.9
    assert len(np.unique(train.in_memory.reshape(3000, -1), axis=0)) == 3000


def test_train_and_test_of_fake_share_no_image():
    train, test = (all_pixels(open_source(f"fake,samples=100,size=8:{split}")) for split in ("train", "test"))
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def test_a_fake_image_is_drawn_by_itself(monkeypatch):
    spec = "fake,classes=300,size=11,samples=700"
    whole = open_source(spec).in_memory
    monkeypatch.setattr(fake, "MAX_IN_MEMORY", 1000)
    source = open_source(spec)
    assert source.in_memory is None
    chosen = np.array([699, 3, 256, 255, 3])
    assert np.array_equal(source.pixels(chosen), whole[chosen])
    assert isinstance(source.pixels(chosen), list)


@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_small_fake_images(size):
    whole = open_source(f"fake,size={size},samples=50").in_memory
    assert whole.shape == (50, size, size, 3)
    assert whole.std() > 15


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        (
            "fake,clases=3",
            UnknownName,
            r"unknown option of source 'fake' 'clases'\. Did you mean 'classes'\?",
        ),
        ("fake,size", RecipeError, "option size of source 'fake' is '', expected a whole number"),
        ("fake,size=-1", RecipeError, "option size of source 'fake' is '-1', expected a whole number"),
        ("fake,classes=0", RecipeError, "option classes of source 'fake' is 0, expected at least 1"),
        ("fake,channels=2", RecipeError, "option channels of source 'fake' is 2, expected 1 or 3"),
        ("fake,seed=18446744073709551616", RecipeError, r"expected less than 2\*\*64"),
        ("fake:val", UnknownName, "unknown split of source 'fake' 'val'"),
    ],
)
def test_refused_options(spec, error, text):
    with pytest.raises(error, match=text):
        open_source(spec)


def test_fake_has_no_folder(tmp_path):
    with pytest.raises(RecipeError, match="source 'fake' has no files: leave --root out"):
        open_source("fake", tmp_path)
