"""Image files: what is unusual in them, damage, decoding, fingerprints."""

from __future__ import annotations

import os
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_files import (
    assert_as_image_folder,
    cut,
    random_image,
    save_image,
    touch_later,
    write_imagenet,
    write_tree,
)
from PIL import Image
from spawned import run

from coursepack.data import open_source
from coursepack.data.sources import scan
from coursepack.data.sources.base import SAMPLED, sampled
from coursepack.errors import SourceError


def all_pixels(source):
    return source.pixels(np.arange(len(source.labels)))


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


def huge_png(path: Path) -> None:
    """A PNG file whose header promises more pixels than Pillow will decode."""
    data = bytearray(path.read_bytes())
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


def as_fifo(path):
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "cut.jpg": (lambda path: cut(path, 0.6), "cannot be decoded: image file is truncated"),
    "cut.png": (lambda path: cut(path, 0.6), "cannot be decoded: "),
    "empty.jpg": (lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
    "fifo.png": (as_fifo, "cannot be decoded: .*It is a FIFO, expected a regular file"),
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
        assert text.startswith("source 'folder:train' has 8 damaged files among 18:\n")
        for name, (_, problem) in DAMAGE.items():
            assert re.search(f"\n  {re.escape(str(folder / name))} {problem}", text), name
        assert f"{folder / 'gone.png'} does not exist" in text
        assert "padded" not in text
        assert source.in_memory is None
    with pytest.raises(SourceError, match="has 8 damaged files"):
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
    with pytest.raises(SourceError, match=r"sample 4 .* it has 7 x 8 pixels, but 48 x 56 when scanned"):
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
    assert run("code", PROBE, tmp_path / "moved").stdout.strip() == expected


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


@pytest.mark.parametrize("padding", [0, 1])
def test_fingerprint_tells_another_length_or_image_size_of_any_file(tmp_path, padding):
    write_tree(tmp_path / "train", ("a", "b"), SAMPLED)
    before = open_source("folder", tmp_path)
    (other, *_) = sorted(set(range(2 * SAMPLED)) - set(sampled(2 * SAMPLED).tolist()))
    path = Path(before.path(other))
    content, size = path.read_bytes(), (8, 8) if padding else (7, 8)
    save_image(path, random_image(0, size=size))
    same = path.read_bytes().ljust(len(content), b"\0") + bytes(padding)
    path.write_bytes(same)
    after = open_source("folder", tmp_path)
    after.check()
    assert len(same) == len(content) + padding
    assert after.fingerprint != before.fingerprint


def test_contents_are_checksums_of_whole_files(tree):
    source = open_source("folder", tree)
    before = source.contents(np.arange(9))
    _replace_content(tree)
    assert (source.contents(np.arange(9)) != before).tolist() == [i == 5 for i in range(9)]
