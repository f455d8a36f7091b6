"""Tar shards: patterns, the index and when it holds, and the same images as in a folder."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from builders import write_teacher
from click.testing import CliRunner
from helpers import store_files
from image_files import cut, encoded, random_image, touch_later, write_tar
from tar_files import (
    CLASSES,
    PNG,
    assert_same_samples,
    members_of,
    pixels_of,
    rewritten,
    write_images,
    write_in_shards,
)

from coursepack.data import batches, open_source, view_recipe
from coursepack.data.loading import Renderer
from coursepack.data.sources import evaluation_spec, tar_index
from coursepack.data.sources.shards import LocalShards, expand_braces
from coursepack.distill.cli import main as distill
from coursepack.distill.runs.folder import load_run
from coursepack.errors import RecipeError, SourceError, UnknownName
from coursepack.precompute.cli import main as precompute

# ---- the same as a folder


@pytest.mark.parametrize("pattern", ["s-{0..2}.tar", "s-*.tar", "s-?.tar", "{s-0,s-1,s-2}.tar"])
def test_shards_hold_what_a_folder_holds(image_tree, shards, pattern):
    folder, source = open_source("folder", image_tree), open_source(f"tar:{pattern}", shards)
    assert source.class_names == folder.class_names == CLASSES
    assert source.in_memory is None
    source.check()
    assert_same_samples(source, folder)


def test_images_of_one_size_are_decoded_once(tmp_path, own_cache, monkeypatch):
    members = [(f"a/{n}.png", encoded(random_image(n, size=(5, 6)))) for n in range(7)]
    write_in_shards(tmp_path, members)
    source = open_source("tar:*.tar", tmp_path)
    assert np.array_equal(source.in_memory, [random_image(n, size=(5, 6)) for n in range(7)])
    monkeypatch.setattr(LocalShards, "read", None)
    again = open_source("tar:*.tar", tmp_path)
    assert np.array_equal(again.pixels(np.array([6, 0])), source.in_memory[[6, 0]])


def as_classes(members, write):
    """Members without folders, each image with what `write(label)` gives."""
    flat = []
    for number, (name, data) in enumerate(members):
        flat.append((f"{number:04}{Path(name).suffix}", data))
        flat += [(f"{number:04}{ending}", text) for ending, text in write(CLASSES.index(name.split("/")[0]))]
    return flat


@pytest.mark.parametrize(
    ("option", "names", "write"),
    [
        ("", False, lambda label: [(".cls", b" %d\n" % label)]),
        ("", True, lambda label: [(".CLS", CLASSES[label].encode())]),
        ("", True, lambda label: [(".json", b"{broken"), (".cls", b"%d" % label), (".txt", b"a text")]),
        (",json=label", False, lambda label: [(".json", json.dumps({"label": label, "x": 1}).encode())]),
        (",json=name", True, lambda label: [(".json", json.dumps({"name": CLASSES[label]}).encode())]),
    ],
    ids=["integers", "names", "cls beside others", "integers in json", "names in json"],
)
def test_classes_in_members_are_those_of_folders(image_tree, tmp_path, option, names, write):
    write_tar(tmp_path / "shards" / "all.tar", as_classes(members_of(image_tree / "train"), write))
    if names:
        (tmp_path / "shards" / "classes.json").write_text(json.dumps(CLASSES))
    source = open_source(f"tar{option}:all.tar", tmp_path / "shards")
    assert source.class_names == (CLASSES if names else ("0", "1", "2"))
    assert_same_samples(source, open_source("folder", image_tree))


def test_class_names_beside_the_shards_number_folders_too(shards):
    (shards / "classes.json").write_text(json.dumps(["dog", "cat", "bee", "ant"]))
    source = open_source("tar:s-*.tar", shards)
    assert source.class_names == ("dog", "cat", "bee", "ant")
    assert source.labels.tolist() == [3] * 4 + [2] * 4 + [1] * 4


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names(tmp_path, form):
    long = "x" * (90 if form == tarfile.USTAR_FORMAT else 300)
    members = [(f"./größe/{long}{n}.PNG", encoded(random_image(n, size=(4, 5 + n)))) for n in range(3)]
    write_tar(tmp_path / "a.tar", [("README", b"none"), ("größe/._0.png", b"mac"), *members], format=form)
    source = open_source("tar:a.tar", tmp_path)
    assert source.class_names == ("größe",)
    for n, image in enumerate(pixels_of(source)):
        assert np.array_equal(image, random_image(n, size=(4, 5 + n)))


def test_members_of_a_sample_need_not_be_neighbours(tmp_path):
    members = [("b.png", PNG), ("a.png", PNG), ("a.cls", b"1"), ("b.cls", b"0"), ("folder", b"")]
    write_tar(tmp_path / "a.tar", members)
    assert open_source("tar:a.tar", tmp_path).labels.tolist() == [0, 1]


# ---- patterns


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{008..011}", ["008", "009", "010", "011"]),
        ("{0..1}{b,a}", ["0b", "0a", "1b", "1a"]),
        ("{a,}x", ["ax", "x"]),
    ],
)
def test_braces(pattern, names):
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("tar:{3..1}.tar", r"pattern of source 'tar:\{3..1\}.tar' has the range \{3..1\}, expected a first"),
        ("tar:{0..9999999}.tar", "expected at most 1,000,000"),
        ("tar:{000..999}{000..999}{0..9}.tar", "stands for more than 1,000,000 shards"),
        ("tar:{000.099}.tar", r"has braces \{000.099\} that hold neither a range 000..099 nor a list a,b"),
        ("tar", r"source 'tar' names no files: give a pattern, as in --source 'tar:train-\{000..099\}.tar'"),
        ("tar:-0.1", "names no files"),
        ("tar,json=:a.tar", "option json of source 'tar' is empty"),
        ("tar,cls=a:a.tar", r"unknown option of source 'tar' 'cls'.* Known: json"),
        ("tar:s4://bucket/a.tar", r"unknown kind of location 's4://'\. Did you mean 's3://'"),
    ],
)
def test_refused_patterns(spec, text, tmp_path):
    with pytest.raises((RecipeError, UnknownName), match=text):
        open_source(spec, tmp_path)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("t-*.tar", r"there is no shard 't-\*.tar'; found s-0.tar, s-1.tar, s-2.tar"),
        (
            "s-{1..5}.tar",
            "there are no shards for 3 of the 5 names of the pattern: s-3.tar, s-4.tar, s-5.tar;",
        ),
        ("{s-*,s-0}.tar", r"its pattern matches .*/shards/s-0.tar twice"),
        ("deep/{0..1}.tar", r"cannot be read from '.*/shards/deep': .*; the folder is empty"),
    ],
)
def test_patterns_without_shards(shards, pattern, text):
    with pytest.raises(SourceError, match=text):
        open_source(f"tar:{pattern}", shards)


def test_an_absolute_pattern_needs_no_root_and_has_the_same_fingerprint(shards):
    for held in ("", "-0.25"):
        names = (f"tar:{shards}/s-{{0..2}}.tar{held}", f"tar:shards/s-*.tar{held}", f"tar:s-?.tar{held}")
        roots = (None, shards.parent, shards)
        prints = {open_source(*each).fingerprint for each in zip(names, roots, strict=True)}
        assert len(prints) == 1


def test_an_evaluation_source_has_to_be_named():
    assert evaluation_spec("tar:s3://a/b-{0..1}.tar-0.10") == "tar:s3://a/b-{0..1}.tar+0.1"
    with pytest.raises(RecipeError, match=r"name one with --set evaluation=SOURCE, or hold out"):
        evaluation_spec("tar:a.tar")


# ---- the index


@pytest.fixture
def opened(monkeypatch):
    """Names of the shards that are indexed."""
    names, open_shard = [], LocalShards.open
    monkeypatch.setattr(LocalShards, "open", lambda self, name: names.append(name) or open_shard(self, name))
    return names


def test_a_second_start_opens_no_shard(shards, own_cache, opened, monkeypatch):
    first = open_source("tar:s-*.tar", shards)
    assert sorted(opened) == ["s-0.tar", "s-1.tar", "s-2.tar"]
    monkeypatch.setattr(LocalShards, "read", None)
    again = open_source("tar:s-*.tar", shards)
    assert again.fingerprint == first.fingerprint
    assert again.labels.tolist() == first.labels.tolist()
    assert len(opened) == 3


def test_only_a_changed_shard_is_indexed_again_and_it_is_named(shards, own_cache, opened, capsys):
    before = open_source("tar:s-*.tar", shards)
    capsys.readouterr()
    opened.clear()
    rewritten(shards / "s-1.tar", lambda members: members[1:])
    after = open_source("tar:s-*.tar", shards)
    assert opened == ["s-1.tar"]
    assert f"1 shards have changed since they were indexed, and are indexed again: {shards / 's-1.tar'}" in (
        capsys.readouterr().err
    )
    assert after.fingerprint != before.fingerprint
    assert len(after.labels) == len(before.labels) - 1
    opened.clear()
    touch_later(shards / "s-2.tar", 99)
    assert open_source("tar:s-*.tar", shards).fingerprint == after.fingerprint
    assert opened == ["s-2.tar"]


def test_indexing_that_was_interrupted_goes_on(shards, own_cache, opened):
    whole = (shards / "s-2.tar").read_bytes()
    cut(shards / "s-2.tar", 0.5)
    with pytest.raises(SourceError, match=r"s-2\.tar is truncated"):
        open_source("tar:s-*.tar", shards)
    (shards / "s-2.tar").write_bytes(whole)
    opened.clear()
    assert len(open_source("tar:s-*.tar", shards).labels) == 12
    assert opened == ["s-2.tar"]


@pytest.mark.parametrize(
    "change",
    [
        lambda members: [(name.replace("ant", "awl"), data) for name, data in members],
        lambda members: members[::-1],
        lambda members: [(name.replace("0", "x"), data) for name, data in members],
        lambda members: [(name, data + b"more") for name, data in members],
        lambda members: [(name, data[:-1] + b"\0") for name, data in members],
        lambda members: [("readme", b""), *members],
    ],
    ids=["class name", "order", "key", "length", "content", "offset"],
)
def test_fingerprint_tells_a_change(shards, change):
    before = open_source("tar:s-*.tar", shards).fingerprint
    rewritten(shards / "s-0.tar", change)
    assert open_source("tar:s-*.tar", shards).fingerprint != before


def test_fingerprint_is_of_no_folder_or_time(shards, tmp_path):
    before = open_source("tar:s-*.tar", shards).fingerprint
    shutil.copytree(shards, tmp_path / "moved")
    touch_later(tmp_path / "moved" / "s-1.tar")
    assert open_source("tar:s-*.tar", tmp_path / "moved").fingerprint == before
    assert open_source("tar:s-{2,0,1}.tar", shards).fingerprint != before


@pytest.mark.parametrize("change", [lambda members: members[::-1], lambda members: members[:1]])
def test_a_shard_that_changes_while_it_is_read_is_named(shards, change):
    source = open_source("tar:s-*.tar", shards)
    rewritten(shards / "s-1.tar", change)
    with pytest.raises(SourceError, match=r"sample \d of source .*s-1\.tar has changed since it was indexed"):
        pixels_of(source)
    (shards / "s-1.tar").unlink()
    text = rf"sample 4 of .*cannot be read: {shards}/s-1\.tar: No such file or directory"
    with pytest.raises(SourceError, match=text):
        source.contents(np.array([4]))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, lambda path: cut(path, 0.5), Path.unlink])
@pytest.mark.parametrize("kind", ["*.npy", "*.npz"])
def test_a_damaged_cache_is_written_again(shards, own_cache, damage, kind):
    expected = open_source("tar:s-*.tar", shards)
    images, sizes = pixels_of(expected), expected.sizes(np.arange(12)).tolist()
    kept = sorted(path.name for path in own_cache.iterdir())
    for path in own_cache.glob(kind):
        damage(path)
    again = open_source("tar:s-*.tar", shards)
    assert (again.fingerprint, again.sizes(np.arange(12)).tolist()) == (expected.fingerprint, sizes)
    assert all(map(np.array_equal, pixels_of(again), images))
    assert sorted(path.name for path in own_cache.iterdir()) == kept


def test_a_cache_that_cannot_be_written_is_no_error(shards, tmp_path, monkeypatch):
    expected = open_source("tar:s-*.tar", shards)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("COURSEPACK_CACHE", str(tmp_path / "file" / "cache"))
    source = open_source("tar:s-*.tar", shards)
    assert_same_samples(source, expected)
    assert_same_samples(pickle.loads(pickle.dumps(source)), expected)


def test_pickles_and_caches_do_not_grow_with_the_samples(tmp_path, own_cache):
    lengths = []
    for count in (2, 300):
        write_tar(tmp_path / "0.tar", [(f"a/{n}.png", PNG) for n in range(count)])
        touch_later(tmp_path / "0.tar", count)
        lengths.append(len(pickle.dumps(open_source("tar:0.tar", tmp_path))))
        assert len(list(own_cache.glob("*.npy"))) == len(tar_index.COLUMNS)
    assert lengths[1] <= lengths[0] + 100


def test_progress_of_a_long_indexing(shards, monkeypatch, capsys, own_cache):
    open_source("tar:s-*.tar", shards)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(tar_index, "MANY_BYTES", 1000)
    shutil.rmtree(own_cache)
    open_source("tar:s-*.tar", shards)
    assert "index tar:s-*.tar: 3 of 3 shards" in capsys.readouterr().err


# ---- in use


def test_workers_change_nothing(image_tree, shards):
    recipe, order = view_recipe("cifar"), np.array([3, 11, 0, 7, 5, 2, 8])
    found = []
    for source, workers in ((open_source("folder", image_tree), 0), (open_source("tar:s-*.tar", shards), 2)):
        with Renderer(source, recipe, [8], workers=workers) as renderer:
            rendered = renderer.ahead(batches(source, recipe, order, views=[0, 1], batch_size=3))
            found.append([batch.pixels(8).numpy() for batch in rendered])
    assert all(map(np.array_equal, *found))


def run(command, line, status=0):
    result = CliRunner().invoke(command, shlex.split(line))
    assert result.exit_code == status, result.output
    return result


def logits_of(store):
    return {key: data for key, data in store_files(store).items() if "logits/" in key and "/c" in key}


def test_stores_and_students_of_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_teacher(tmp_path / "mlp", seed=1)
    classes = [f"class {label}" for label in range(10)]
    tree = write_images(tmp_path / "tree", classes, 2)
    write_in_shards(tmp_path / "shards", members_of(tree / "train"))
    how = "--view digits --views 2 --teacher run:mlp"
    run(precompute, f"run {how} --source folder --root tree --store folder.zarr")
    run(precompute, f"run {how} --source 'tar:s-{{0..2}}.tar' --root shards --store tar.zarr")
    assert logits_of(tmp_path / "folder.zarr") == logits_of(tmp_path / "tar.zarr")
    assert logits_of(tmp_path / "tar.zarr")
    monkeypatch.chdir("tree")  # the store has recorded where the shards are
    train = "train --student digits-small --store ../tar.zarr --epochs 1"
    refused = run(distill, f"{train} --out none", status=1)
    assert "Error: source 'tar:s-{0..2}.tar' has no split for evaluation: name one with" in refused.stderr
    run(distill, f"{train} --set 'evaluation=tar:s-*.tar' --out new")
    recipe = load_run(tmp_path / "tree" / "new").recipe
    assert (recipe.source, recipe.evaluation) == ("tar:s-{0..2}.tar", "tar:s-*.tar")
    assert "20 samples" in run(distill, "eval new").stdout
    checked = run(precompute, "verify --store ../tar.zarr --content")
    assert "differ" not in checked.output
    moved = (tmp_path / "shards").rename(tmp_path / "moved")
    refused = run(distill, "train --student digits-small --store ../tar.zarr --out none", status=1)
    assert "This folder is recorded in the store: if the files have moved, give --root" in refused.stderr
    run(distill, f"{train} --root {moved} --set 'evaluation=tar:s-*.tar' --out moved")
