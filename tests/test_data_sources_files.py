"""Sources of image files: indices, damage, caches, fingerprints, decoding."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_files import (
    CIFAR10,
    WNIDS,
    random_image,
    save_image,
    touch_later,
    write_cinic10,
    write_imagenet,
    write_tiny_imagenet,
    write_tree,
)
from PIL import Image
from torchvision.datasets import ImageFolder

from coursepack.data import open_source
from coursepack.data.sources import files, scan
from coursepack.data.sources.base import SAMPLED
from coursepack.data.sources.cache import cache_folder
from coursepack.errors import SourceError


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache folder that is empty."""
    monkeypatch.setenv("COURSEPACK_CACHE", str(tmp_path / "cache" / "deep"))
    return tmp_path / "cache" / "deep"


@pytest.fixture
def tree(tmp_path):
    """An ImageFolder tree `train` of 9 PNG files of one size."""
    write_tree(tmp_path / "tree" / "train", ("ant", "bee", "cat"))
    return tmp_path / "tree"


@pytest.fixture
def looks(monkeypatch):
    """Paths whose headers are read, and samples that are decoded."""
    seen = []
    look, decode = scan.look, files.ImageFiles._decode
    monkeypatch.setattr(scan, "look", lambda path: seen.append(path) or look(path))
    monkeypatch.setattr(files.ImageFiles, "_decode", lambda self, i: seen.append(i) or decode(self, i))
    return seen


def all_pixels(source):
    return source.pixels(np.arange(len(source.labels)))


def assert_as_image_folder(source, folder):
    expected = ImageFolder(folder)
    assert source.class_names == tuple(expected.classes)
    assert source.labels.tolist() == expected.targets
    assert [source.path(i) for i in range(len(expected))] == [path for path, _ in expected.samples]
    for ours, (theirs, _) in zip(all_pixels(source), expected, strict=True):
        assert np.array_equal(ours, np.array(theirs))


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
        assert source.whole is None
        assert source.sizes(np.array([1, 3])).tolist() == [[48, 60], [40, 56]]


def test_flat_validation_images_of_imagenet_are_refused(tmp_path):
    write_imagenet(tmp_path)
    shutil.move(tmp_path / "val" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG", tmp_path / "val")
    with pytest.raises(SourceError, match=r"folder 'val' holds images that are in no class folder\. Move"):
        open_source("imagenet:val", tmp_path)


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_another_list_of_classes_than_in_training_is_refused(tmp_path, name):
    write_imagenet(tmp_path)
    (tmp_path / "val" / WNIDS[0]).rename(tmp_path / "val" / "other")
    text = f"classes of 'train' and of 'val' differ: not there: {WNIDS[0]}; unexpected: other"
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
    assert val.whole.shape == (6, 64, 64, 3)
    assert np.array_equal(val.whole[4], np.array(Image.open(val.path(4)).convert("RGB")))


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
            "differ: not there: n1; unexpected: ",
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
        assert source.whole.shape == (20, 32, 32, 3)
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "lion")
    text = (
        f"source 'cinic10:test' cannot be read from --root '{tmp_path}': folder 'test' has other classes: "
        "airplane, automobile, bird, deer, dog, frog, horse, lion and 2 more. Expected there: train, valid "
        "and test, in each the folders airplane to truck with .png files. Get CINIC-10.tar.gz from its home "
        "page, datashare.ed.ac.uk/handle/10283/3192, and unpack it there."
    )
    with pytest.raises(SourceError, match=f"^{re.escape(text)}$"):
        open_source("cinic10:test", tmp_path)


def write_odd_images(folder: Path) -> None:
    """Images that are unusual, and sound."""
    gray, cmyk = random_image(1, channels=1), random_image(2, channels=4)
    save_image(folder / "gray.jpg", gray)
    Image.fromarray(cmyk).convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    save_image(folder / "rotated.jpg", random_image(3, size=(20, 40)), exif=exif)
    save_image(folder / "dot.png", random_image(4, size=(1, 1)))
    save_image(folder / "wide.png", random_image(5, size=(2, 10_000)))
    Image.fromarray(random_image(6)).quantize(16).save(folder / "palette.png")
    save_image(folder / "alpha.png", random_image(7, channels=4))
    Image.fromarray(random_image(8, channels=1).astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(random_image(9, channels=1) > 128).save(folder / "bits.png")
    save_image(folder / "padded.jpg", random_image(10))
    with (folder / "padded.jpg").open("ab") as file:
        file.write(bytes(1000))


def test_odd_images_are_read_as_torchvision_reads_them(tmp_path):
    write_odd_images(tmp_path / "train" / "odd")
    source = open_source("folder", tmp_path)
    source.check()
    assert_as_image_folder(source, tmp_path / "train")
    sizes = {Path(source.path(i)).stem: tuple(size) for i, size in enumerate(source.sizes(np.arange(10)))}
    assert sizes["rotated"] == (20, 40)
    assert sizes["dot"] == (1, 1)
    assert sizes["wide"] == (2, 10_000)


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def huge_png(path: Path) -> None:
    """A PNG file whose header promises more pixels than Pillow will decode."""
    data = bytearray(path.read_bytes())
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


DAMAGE = {
    "cut.jpg": (lambda path: cut(path, 0.6), "cannot be decoded: image file is truncated"),
    "cut.png": (lambda path: cut(path, 0.6), "cannot be decoded: "),
    "empty.jpg": (lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
    "head.png": (lambda path: cut(path, 0.001), "has no header of an image format that Pillow reads"),
    "huge.png": (huge_png, "cannot be decoded: Image size .* exceeds limit"),
    "text.jpg": (lambda path: path.write_text("<html>404</html>"), "has no header of an image format"),
}


def test_damaged_files_are_named_before_anything_is_decoded(tmp_path):
    folder = tmp_path / "train" / "things"
    write_odd_images(folder)
    for name, (damage, _) in DAMAGE.items():
        damage(save_image(folder / name, random_image(11, size=(100, 120))))
    (folder / "gone.png").symlink_to("nowhere")
    for _ in range(2):  # the second time from the cache
        source = open_source("folder", tmp_path)
        with pytest.raises(SourceError) as caught:
            source.check()
        text = str(caught.value)
        assert text.startswith("source 'folder:train' has 7 damaged files among 17:\n")
        for name, (_, problem) in DAMAGE.items():
            assert re.search(f"\n  {re.escape(str(folder / name))} {problem}", text), name
        assert f"{folder / 'gone.png'} is not there" in text
        assert "padded" not in text
        assert source.whole is None
    with pytest.raises(SourceError, match="has 7 damaged files"):
        open_source("folder:train-0.5", tmp_path).check()


def test_only_the_first_damaged_files_are_named(tree):
    for path in (tree / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(SourceError, match=r"9 damaged files among 9:\n(  .*\n){8}  and 1 more\nReplace them"):
        open_source("folder", tree).check()


def test_a_file_that_fails_later_is_named_with_its_sample(tmp_path):
    source = open_source("folder", write_imagenet(tmp_path))
    path = Path(source.path(4))
    cut(path, 0.5)
    text = f"sample 4 of source 'folder:train' cannot be read: {path}: image file is truncated"
    with pytest.raises(SourceError, match=re.escape(text)):
        all_pixels(source)
    save_image(path, random_image(1, size=(7, 8)))
    with pytest.raises(SourceError, match=r"sample 4 .* it is 7 x 8 pixels and was 48 x 56"):
        all_pixels(source)
    path.unlink()
    with pytest.raises(SourceError, match=r"sample 4 .*No such file"):
        source.contents(np.array([4]))


# ---- fingerprints


PROBE = """
import sys
import zlib
from pathlib import Path
from coursepack.data import open_source
print(open_source("folder", Path(sys.argv[1])).fingerprint)
"""


def test_fingerprint_is_of_no_root_time_or_process(tree, tmp_path):
    expected = open_source("folder", tree).fingerprint
    shutil.copytree(tree, tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*.png"):
        touch_later(path)
    assert open_source("folder", tmp_path / "moved").fingerprint == expected
    command = [sys.executable, "-c", PROBE, str(tmp_path / "moved")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == expected


def _replace_content(tree):
    path = tree / "train" / "bee" / "bee_5.png"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    touch_later(path)


def _append(tree):
    path = tree / "train" / "ant" / "ant_0.png"
    path.write_bytes(path.read_bytes() + b"more")


def _swap_labels(tree):
    for old, new in (("ant", "x"), ("bee", "ant"), ("x", "bee")):
        (tree / "train" / old).rename(tree / "train" / new)


@pytest.mark.parametrize(
    "change",
    [
        _replace_content,
        _swap_labels,
        lambda tree: (tree / "train" / "ant" / "ant_0.png").rename(tree / "train" / "ant" / "ant_1.png"),
        lambda tree: (tree / "train" / "cat").rename(tree / "train" / "cow"),
        lambda tree: (tree / "train" / "ant" / "ant_0.png").unlink(),
        _append,
        lambda tree: save_image(tree / "train" / "ant" / "z.png", random_image(1)),
    ],
    ids=["content", "labels", "file name", "class name", "removed", "length", "added"],
)
def test_fingerprint_tells_a_change(tree, change):
    before = open_source("folder", tree).fingerprint
    change(tree)
    assert open_source("folder", tree).fingerprint != before


def test_fingerprint_reads_few_files(tmp_path, monkeypatch, own_cache):
    write_tree(tmp_path / "train", ("a", "b"), SAMPLED, size=(1, 1))
    read = []
    checksum = scan._checksum
    monkeypatch.setattr(scan, "_checksum", lambda path: read.append(path) or checksum(path))
    open_source("folder", tmp_path)
    assert len(set(read)) == len(read) == SAMPLED


def test_contents_are_checksums_of_whole_files(tree):
    source = open_source("folder", tree)
    before = source.contents(np.arange(9))
    _replace_content(tree)
    assert (source.contents(np.arange(9)) != before).tolist() == [i == 5 for i in range(9)]


# ---- the cache folder


def test_a_second_start_opens_no_file(tree, own_cache, looks):
    first = open_source("folder", tree)
    pixels = np.array(first.whole)
    assert len(looks) == 18
    looks.clear()
    again = open_source("folder", tree)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.whole, pixels)
    assert isinstance(again.whole, np.memmap)
    assert looks == []
    assert np.array_equal(pixels, [np.array(Image.open(first.path(i))) for i in range(9)])


def test_a_changed_tree_is_looked_at_again(tree, own_cache, looks):
    before = np.array(open_source("folder", tree).whole)
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
    after = open_source("folder", tree).whole
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
    expected = np.array(open_source("folder", tree).whole)
    fingerprint = open_source("folder", tree).fingerprint
    before = {path.name: path.read_bytes() for path in own_cache.iterdir()}
    for path in own_cache.iterdir():
        damage(path)
    looks.clear()
    again = open_source("folder", tree)
    assert np.array_equal(again.whole, expected)
    assert again.fingerprint == fingerprint
    assert len(looks) >= 9
    assert {path.name for path in own_cache.iterdir()} == set(before)
    looks.clear()
    assert np.array_equal(open_source("folder", tree).whole, expected)
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
        assert open_source("folder", tree).whole.shape == (9, 8, 8, 3)
        assert len(looks) == 18


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("COURSEPACK_CACHE")
    assert cache_folder() == tmp_path / "coursepack"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("~/.cache/coursepack").expanduser()


def test_large_trees_stay_on_disk(tree, monkeypatch):
    monkeypatch.setattr(files, "MOST_IN_MEMORY", 9 * 8 * 8 * 3 - 1)
    source = open_source("folder", tree)
    assert source.whole is None
    assert isinstance(all_pixels(source), list)
    monkeypatch.setattr(files, "MOST_IN_MEMORY", 9 * 8 * 8 * 3)
    assert open_source("folder", tree).whole is not None


def test_progress_of_a_long_scan(tree, monkeypatch, capsys, own_cache):
    open_source("folder", tree)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(scan, "LONG", 9)
    shutil.rmtree(own_cache)
    open_source("folder", tree)
    assert "scan folder:train: 9 of 9 files" in capsys.readouterr().err
