"""What is kept of image files in the cache folder, and when it holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from image_files import cut, save_image, touch_later, write_tree
from PIL import Image

from coursepack.data import open_source
from coursepack.data.sources import base, files, scan
from coursepack.data.sources.cache import cache_folder


@pytest.fixture
def looks(monkeypatch):
    """Paths whose headers are read, and samples that are decoded."""
    seen = []
    look, decode = scan.inspect_image, files.ImageFiles._decode
    monkeypatch.setattr(scan, "inspect_image", lambda path: seen.append(path) or look(path))
    monkeypatch.setattr(files.ImageFiles, "_decode", lambda self, i: seen.append(i) or decode(self, i))
    return seen


def test_a_second_start_opens_no_file(tree, own_cache, looks):
    first = open_source("folder", tree)
    pixels = np.array(first.in_memory)
    assert len(looks) == 18
    looks.clear()
    again = open_source("folder", tree)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.in_memory, pixels)
    assert isinstance(again.in_memory, np.memmap)
    assert looks == []
    assert np.array_equal(pixels, [np.array(Image.open(first.path(i))) for i in range(9)])


def test_two_trees_have_their_own_places(tree, own_cache, looks, tmp_path):
    write_tree(tmp_path / "other" / "train", ("ant", "bee", "cat", "dog"))
    for folder in (tree, tmp_path / "other"):
        assert open_source("folder", folder).in_memory is not None
    looks.clear()
    for folder in (tree, tmp_path / "other"):
        assert open_source("folder", folder).in_memory is not None
    assert looks == []


def test_a_changed_tree_is_looked_at_again(tree, own_cache, looks, monkeypatch):
    # What a fingerprint does not see, the cache does.
    monkeypatch.setattr(base, "SAMPLED", 1)
    assert base.sampled(9).tolist() != [5]
    fingerprint = open_source("folder", tree).fingerprint
    before = np.array(open_source("folder", tree).in_memory)
    old = list(own_cache.iterdir())
    assert len(old) == 2
    path = tree / "train" / "bee" / "bee_5.png"
    length = path.stat().st_size
    # The same length and another time: only the listing tells.
    pixels = before[5] ^ 1
    save_image(path, pixels)
    with path.open("ab") as file:
        file.truncate(length)
    touch_later(path)
    looks.clear()
    assert open_source("folder", tree).fingerprint == fingerprint
    after = open_source("folder", tree).in_memory
    assert len(looks) == 18
    assert np.array_equal(after[5], pixels)
    assert np.array_equal(np.delete(after, 5, 0), np.delete(before, 5, 0))
    assert len(list(own_cache.iterdir())) == 2


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [lambda path: cut(path, 0.5), lambda path: cut(path, 0), flip])
def test_a_damaged_cache_is_written_again(tree, own_cache, looks, damage):
    expected = np.array(open_source("folder", tree).in_memory)
    fingerprint = open_source("folder", tree).fingerprint
    before = {path.name: path.read_bytes() for path in own_cache.iterdir()}
    for path in own_cache.iterdir():
        damage(path)
    looks.clear()
    again = open_source("folder", tree)
    assert np.array_equal(again.in_memory, expected)
    assert again.fingerprint == fingerprint
    assert len(looks) >= 9
    assert {path.name for path in own_cache.iterdir()} == set(before)
    looks.clear()
    assert np.array_equal(open_source("folder", tree).in_memory, expected)
    assert looks == []


def test_facts_of_another_kind_in_the_cache_are_ignored(tree, own_cache):
    expected = open_source("folder", tree).fingerprint
    (path,) = own_cache.glob("*.npz")
    np.savez(path, listing=np.array("x"))
    assert open_source("folder", tree).fingerprint == expected


def test_a_cache_that_cannot_be_written_is_no_error(tree, tmp_path, monkeypatch, looks):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("COURSEPACK_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        looks.clear()
        assert open_source("folder", tree).in_memory.shape == (9, 8, 8, 3)
        assert len(looks) == 18


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("COURSEPACK_CACHE")
    assert cache_folder() == tmp_path / "coursepack"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("~/.cache/coursepack").expanduser()


def test_damaged_trees_stay_on_disk(tree):
    cut(tree / "train" / "bee" / "bee_5.png", 0.7)
    source = open_source("folder", tree)
    assert source.sizes(np.array([5])).tolist() == [[8, 8]]
    assert source.in_memory is None


def test_large_trees_stay_on_disk(tree, monkeypatch):
    monkeypatch.setattr(files, "MAX_IN_MEMORY", 9 * 8 * 8 * 3 - 1)
    source = open_source("folder", tree)
    assert source.in_memory is None
    assert isinstance(source.pixels(np.arange(9)), list)
    monkeypatch.setattr(files, "MAX_IN_MEMORY", 9 * 8 * 8 * 3)
    assert open_source("folder", tree).in_memory is not None


def test_progress_of_a_long_scan(tree, monkeypatch, capsys, own_cache):
    open_source("folder", tree)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(scan, "MANY", 9)
    shutil.rmtree(own_cache)
    open_source("folder", tree)
    assert "scan folder:train: 9 of 9 files" in capsys.readouterr().err
