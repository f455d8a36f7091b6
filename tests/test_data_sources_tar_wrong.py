"""Tar shards that are wrong: each is refused in one line that names shard and member."""

from __future__ import annotations

import gzip
import json
import tarfile

import pytest
from image_files import cut, encoded, random_image, write_tar
from tar_files import CLASSES, PNG, pixels_of, write_in_shards

from coursepack.data import open_source
from coursepack.errors import SourceError


def link(path):
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("a/0.png")
        member.type, member.linkname = tarfile.SYMTYPE, "elsewhere.png"
        archive.addfile(member)


def damaged_header(path):
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        start = archive.getmembers()[1].offset
    data[start : start + 100] = b"?" * 100
    path.write_bytes(data)


def joined(path):
    path.write_bytes(path.read_bytes() * 2)


def ends_at_a_member(path):
    with tarfile.open(path) as archive:
        start = archive.getmembers()[1].offset
    path.write_bytes(path.read_bytes()[:start])


@pytest.mark.parametrize(
    ("members", "damage", "text"),
    [
        ([("0.cls", b"1"), ("0.txt", b"")], None, "has no image in the sample '0', only .cls, .txt"),
        (
            [("0.png", PNG), ("0.jpg", PNG)],
            None,
            "has two images in the sample '0', '0.png' and '0.jpg'. A key",
        ),
        ([("0.png", PNG), ("0.png", PNG)], None, "has two images in the sample '0'"),
        ([("0.png", PNG), ("0.cls", b"1"), ("0.cls", b"1")], None, "has the member '0.cls' twice"),
        (
            [("0.png", PNG)],
            None,
            "has no class for the sample '0': there is no member '0.cls', and the image",
        ),
        (
            [("a/0.png", PNG), ("a/0.cls", b"1"), ("a/1.png", PNG)],
            None,
            "has no class for the sample 'a/1': there is no member 'a/1.cls'",
        ),
        (
            [("0.png", PNG), ("0.cls", b"ant")],
            None,
            "has the class of '0.png' as 'ant', expected an integer. Names",
        ),
        ([("0.png", PNG), ("0.cls", b"-1")], None, "has the class of '0.png' as -1, expected 0 to"),
        ([("0.png", PNG), ("0.cls", b"")], None, "has the class of '0.png' as '', expected an integer"),
        ([("0.png", PNG), ("0.cls", b"1.0")], None, "as '1.0', expected an integer"),
        ([("0.png", PNG), ("0.cls", b"\xff")], None, "has the member '0.cls', which is not text"),
        ([("0.png", PNG), ("0.cls", b"1" * 5000)], None, "has the member '0.cls' of 5,000 bytes"),
        ([], None, "no shard has samples"),
        ([("a/0.png", PNG)], lambda path: cut(path, 0.06), "is truncated: its member 'a/0.png' ends at byte"),
        ([("a/0.png", PNG), ("a/1.png", PNG)], ends_at_a_member, "without the end marker of tar files"),
        ([("a/0.png", PNG), ("a/1.png", PNG)], damaged_header, "is damaged at byte|is damaged: at byte"),
        ([("a/0.png", PNG)], joined, "has more content after its end at byte 1,024|has more content after"),
        ([("a/0.png", PNG)], link, "has the member 'a/0.png', which is a link"),
        ([], lambda path: path.write_text("<html>404</html>" * 99), "is not a tar file, or is truncated"),
        ([], lambda path: path.write_bytes(b""), "is not a tar file, or is truncated: empty file"),
        (
            [("a/0.png", PNG)],
            lambda path: path.write_bytes(gzip.compress(path.read_bytes())),
            "is compressed with gzip, so that its samples cannot be read one by one: unpack it to a",
        ),
    ],
)
def test_wrong_shards_are_named(tmp_path, members, damage, text):
    path = write_tar(tmp_path / "0.tar", members)
    if damage is not None:
        damage(path)
    with pytest.raises(SourceError, match=text) as refused:
        open_source("tar:0.tar", tmp_path)
    assert "\n" not in str(refused.value)
    start = "source 'tar:0.tar' cannot be read: "
    assert str(refused.value).startswith(start if not members and damage is None else f"{start}shard {path} ")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"x": 1}, "has no 'label' in the member '0.json': found x"),
        ([1], "has no 'label' in the member '0.json': it is not a mapping"),
        ({"label": 1.5}, "has 1.5 as 'label' in the member '0.json', expected an integer or a class name"),
        ({"label": True}, "has True as 'label'"),
        ({"label": 3}, "has the class of '0.png' as 3, expected 0 to 2"),
        ({"label": "cot"}, "as 'cot', which is not among the 3 names in classes.json. Did you mean 'cat'"),
    ],
)
def test_wrong_classes_in_json_are_named(tmp_path, content, text):
    write_tar(tmp_path / "0.tar", [("0.png", PNG), ("0.json", json.dumps(content).encode())])
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    with pytest.raises(SourceError, match=text):
        open_source("tar,json=label:0.tar", tmp_path)


@pytest.mark.parametrize("names", ["{", "{}", "[]", "[1]", "null"])
def test_a_wrong_list_of_classes_is_refused(shards, names):
    (shards / "classes.json").write_text(names)
    with pytest.raises(SourceError, match=r"classes\.json is not"):
        open_source("tar:s-*.tar", shards)


def test_shards_agree_on_where_classes_are(tmp_path):
    write_tar(tmp_path / "0.tar", [("a/0.png", PNG)])
    write_tar(tmp_path / "1.tar", [("a/1.png", PNG), ("a/1.cls", b"0")])
    with pytest.raises(
        SourceError, match=r"0\.tar has a folder for each class, but 1\.tar has \.cls members"
    ):
        open_source("tar:*.tar", tmp_path)


def test_keys_are_different_in_all_shards(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", [("a/0.png", PNG), (f"a/{shard}-1.png", PNG)])
    text = r"/0.tar and .*/1.tar both have the sample of 'a/0.png', and 2 samples are in more than one shard"
    with pytest.raises(SourceError, match=text):
        open_source("tar:*.tar", tmp_path)


def test_damaged_images_are_named_before_anything_is_decoded(tmp_path):
    jpeg = encoded(random_image(1, size=(64, 64)), "JPEG")
    sound = [(f"a/s{n}.png", PNG) for n in range(3)]
    broken = [("a/empty.png", b""), ("a/text.png", b"<html>"), ("a/cut.jpg", jpeg[: len(jpeg) // 2])]
    write_in_shards(tmp_path, sound + broken, 2)
    for _ in range(2):  # the second time from the cache
        source = open_source("tar:*.tar", tmp_path)
        with pytest.raises(SourceError, match="has 3 damaged files among 6") as caught:
            source.check()
        shard = tmp_path / "s-1.tar"
        for name, problem in (
            ("a/empty.png", "is empty (0 bytes)"),
            ("a/text.png", "has no header of an image format that Pillow reads"),
            ("a/cut.jpg", "cannot be decoded: "),
        ):
            assert f"\n  {shard}, member {name} {problem}" in str(caught.value)
        assert source.in_memory is None


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    data = bytearray(encoded(random_image(1, size=(64, 64))))
    data[200:240] = bytes(40)
    write_tar(tmp_path / "0.tar", [("a/0.png", PNG), ("a/1.png", bytes(data))])
    source = open_source("tar:0.tar", tmp_path)
    source.check()
    with pytest.raises(SourceError) as caught:
        pixels_of(source)
    text = f"sample 1 of source 'tar:0.tar' cannot be read: {tmp_path / '0.tar'}, member a/1.png: "
    assert str(caught.value).startswith(text)
    assert str(caught.value).endswith(". Replace the file")
