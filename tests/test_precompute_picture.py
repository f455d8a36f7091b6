"""`precompute inspect --out`: a picture of samples, their views, and what each teacher says to them."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from builders import write_store, write_teacher
from click.testing import CliRunner
from helpers import make_job, rewrite_manifest
from PIL import Image

from coursepack.data import PRESETS, ViewRecipe, open_source
from coursepack.data.store import StoreReader
from coursepack.data.views.mixing import Mix
from coursepack.precompute import run_job
from coursepack.precompute.cli import main

RIGHT, WRONG = "#1a7f37", "#b42318"


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """A store over drawn colour images under mixed views of 12 pixels' sources."""
    folder = tmp_path_factory.mktemp("colour")
    source = open_source("fake,size=12,samples=40")
    recipe = ViewRecipe(ops=PRESETS["imagenet"].ops, mix=Mix(cutmix_alpha=1.0))
    teacher = write_teacher(folder / "mlp", "digits-mlp")
    run_job(make_job(folder / "colour.zarr", teacher, source=source, recipe=recipe, encoding="float32"))
    return folder / "colour.zarr"


def inspect(*words):
    return CliRunner().invoke(main, ["inspect", *map(str, words)])


def picture(path, *words) -> Image.Image:
    result = inspect(*words, "--out", path)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{path}: ")
    with Image.open(path) as image:
        image.load()
        return image.convert("RGB")


def texts_of(path) -> list[str]:
    """Every text of an .svg: matplotlib draws letters as curves, with the text in a comment before them."""
    return re.findall(r"<!-- (.*?) -->", path.read_text())


def bluish(image) -> int:
    """How many pixels are more blue than anything else: no letter is."""
    red, green, blue = np.asarray(image).astype(int).transpose(2, 0, 1)
    return int(((blue > red + 20) & (blue > green + 20)).sum())


def test_a_picture_grows_with_views_and_shows_them(stores, tmp_path):
    one, three = (picture(tmp_path / f"{views}.png", stores[0], "--views", views) for views in (1, 3))
    assert one.height == three.height
    assert three.width == 2 * one.width, "a column for each view, and one for the sample itself"
    most = picture(tmp_path / "most.png", stores[0])
    assert most.size == three.size, "four are asked for by default, and three are there"


def test_a_picture_of_two_teachers_has_a_line_for_each(stores, tmp_path):
    one, two = (picture(tmp_path / f"{n}.png", *stores[:n], "--views", 2) for n in (1, 2))
    assert one.width == two.width
    assert two.height > one.height


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_overlaps_and_nothing_is_cut_off(stores, tmp_path, monkeypatch, count):
    names = tuple(f"a class whose name is long, number {label}" for label in range(10))
    paths = [tmp_path / f"a-store-of-a-long-name-{place}.zarr" for place in range(count)]
    for path, store in zip(paths, stores, strict=False):
        shutil.copytree(store, path)
        rewrite_manifest(path, lambda values: values.update(class_names=list(names)))
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    assert inspect(*paths, "--out", tmp_path / "grid.png").exit_code == 0
    (figure,) = drawn
    figure.draw_without_rendering()
    texts = [text for axis in figure.axes for text in axis.texts]
    boxes = [each.get_window_extent() for each in (*texts, *figure.axes)]
    assert len(texts) == 6 * (1 + 3 * (1 + count))
    for place, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:place])


@pytest.mark.parametrize("kind", ["gray", "colour"])
def test_what_stands_in_a_picture_is_what_stores_and_source_say(stores, colour, tmp_path, kind):
    chosen = stores[:2] if kind == "gray" else [colour]
    result = inspect(*chosen, "--views", 2, "--out", tmp_path / "grid.svg")
    assert result.exit_code == 0, result.output
    texts = texts_of(tmp_path / "grid.svg")
    readers = [StoreReader(store) for store in chosen]
    source = open_source(readers[0].manifest.identity["source"]["name"])
    samples = [int(text.split(":")[0]) for text in texts if re.fullmatch(r"\d+: \d", text)]
    assert len(samples) == len(set(samples)) > 3
    expected = [f"{sample}: {source.labels[sample]}" for sample in samples]
    expected += ["view 0", "view 1"] * len(samples)
    for reader in readers:
        for view in (0, 1):
            probs = reader.rows("logits", view, np.array(samples)).decode().softmax(1)
            tops = zip(*(values.tolist() for values in probs.max(1)), strict=True)
            expected += [f"{reader.name}: {top} {share:.0%}" for share, top in tops]
    assert sorted(texts) == sorted(expected)


def test_right_answers_are_green_and_wrong_ones_red(stores, teachers, tmp_path):
    source = open_source("digits")
    store = write_store(tmp_path / "s.zarr", teachers[0], source=source, view="none", views=1)
    reader = StoreReader(store)
    right = reader.rows("logits", 0, np.arange(1442)).decode().argmax(1) == torch.from_numpy(source.labels)
    assert inspect(store, "--out", tmp_path / "grid.svg").exit_code == 0
    texts = texts_of(tmp_path / "grid.svg")
    samples = [int(text.split(":")[0]) for text in texts if re.fullmatch(r"\d+: \d", text)]
    drawn = (tmp_path / "grid.svg").read_text()
    hits = int(right[samples].sum())
    assert drawn.count(f"fill: {RIGHT}") == hits
    assert drawn.count(f"fill: {WRONG}") == len(samples) - hits


def test_colours_are_shown_and_gray_is_gray(stores, colour, tmp_path):
    """Of a gray picture only the letters are in colour."""
    several = (picture(tmp_path / "grid.png", store, "--views", 1) for store in (stores[0], colour))
    gray, many = (bluish(image) for image in several)
    assert gray == 0
    assert many > 1000


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_formats(stores, tmp_path, suffix):
    path = tmp_path / f"grid{suffix}"
    assert inspect(stores[0], "--views", 1, "--out", path).exit_code == 0
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["grid.jpg", "grid", "grid.zarr"])
def test_other_formats_are_refused(stores, tmp_path, name):
    result = inspect(stores[0], "--views", 1, "--out", tmp_path / name)
    assert (result.exit_code, "Traceback" in result.output) == (1, False)
    assert "expected one of ('.png', '.svg', '.pdf')" in result.stderr
    assert not (tmp_path / name).exists()


def test_what_cannot_be_drawn_is_said(stores, colour, teachers, tmp_path):
    views = inspect(stores[0], "--views", 2)
    assert (views.exit_code, "--views applies to the picture: give --out grid.png too" in views.stderr) == (
        2,
        True,
    )
    nowhere = inspect(stores[0], "--out", tmp_path / "no" / "grid.png")
    assert nowhere.exit_code == 1
    assert f"cannot write the picture '{tmp_path / 'no' / 'grid.png'}': No such file" in nowhere.stderr
    other = write_store(tmp_path / "other.zarr", teachers[1], view_seed=9, views=1)
    for stranger in (other, colour):
        result = inspect(stores[0], stranger, "--out", tmp_path / "grid.png")
        assert result.exit_code == 1
        assert "the stores were written from different pixels" in result.stderr
    assert not (tmp_path / "grid.png").exists()


def test_only_views_that_all_stores_have_are_shown(stores, teachers, tmp_path):
    partial = write_store(tmp_path / "p.zarr", teachers[1], views=3, block_rows=1442, order=iter([2]))
    assert inspect(stores[0], partial, "--out", tmp_path / "grid.svg").exit_code == 0
    shown = {text for text in texts_of(tmp_path / "grid.svg") if text.startswith("view")}
    assert shown == {"view 2"}
    first = write_store(tmp_path / "q.zarr", teachers[0], views=3, block_rows=1442, order=iter([0]))
    result = inspect(first, partial, "--out", tmp_path / "none.png")
    assert (result.exit_code, "Traceback" in result.output) == (1, False)
    assert "the stores have no committed view in common" in result.stderr
    assert not (tmp_path / "none.png").exists()


def test_a_picture_is_the_same_each_time(stores, tmp_path):
    images = [picture(tmp_path / f"{n}.png", stores[0], "--views", 2) for n in range(2)]
    assert np.array_equal(*map(np.asarray, images))
