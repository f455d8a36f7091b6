"""`precompute import --format fkd`: files written as FKD describes them, read as its trainer reads them."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
import torch
from builders import CPU, make_recipe
from cached import call, random_probs, right_probs, smoothed, softmax_of, top, write_digits
from click.testing import CliRunner
from helpers import rewrite_manifest
from image_files import save_image
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from view_cases import smooth

from coursepack.canonical import fingerprint
from coursepack.config import read_yaml
from coursepack.data import ViewRecipe, open_source, view_fingerprint
from coursepack.data.drift import drift
from coursepack.data.store import StoreReader
from coursepack.data.views import draw, render
from coursepack.distill.cli import main as distill
from coursepack.distill.runs.train import train
from coursepack.errors import RecipeError, StoreDamaged
from coursepack.precompute.cli import main as precompute

VIEWS = 3
SIZES = ((40, 60), (37, 23), (64, 64), (21, 90))


def label_of(probs: np.ndarray, kind: str):
    """The labels of a file from probabilities `(V, C)`."""
    if kind == "ori":
        return probs
    if kind == "hard":
        return probs.argmax(1)
    if kind == "smoothing":
        ids, values = top(probs, 1)
        return np.concatenate([ids, values], axis=1).astype(np.float32)
    ids, values = top(probs, int(kind.rpartition("_k")[2]))
    return np.stack([ids, values], axis=1).astype(np.float32)


def recovered(label: np.ndarray, kind: str) -> np.ndarray:
    """The soft labels `(V, C)` that FKD's trainer makes of a file's labels."""
    if kind == "ori":
        return label
    if kind == "hard":
        return np.eye(10)[label]
    if kind == "smoothing":
        return smoothed(label[:, :1].astype(int), label[:, 1:])
    ids, values = label[:, 0].astype(int), label[:, 1]
    if kind.startswith("marginal_smoothing"):
        return smoothed(ids, values)
    dense = np.zeros((len(label), 10))
    np.put_along_axis(dense, ids, values / values.sum(1, keepdims=True), axis=1)
    return dense


def crops(rng, height: int, width: int, views: int = VIEWS) -> np.ndarray:
    """Relative coordinates of random crops on whole pixels, float32 `(V, 4)`."""
    rows = []
    for _ in range(views):
        h, w = rng.integers(2, height + 1), rng.integers(2, width + 1)
        i, j = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        rows.append((i / height, j / width, h / height, w / width))
    return torch.FloatTensor(rows).numpy()


def write_cache(folder, source, *, kind="marginal_smoothing_k5", half=False, tensors=False, views=VIEWS):
    """One file per image, as FKD's generator writes them; returns their content by sample."""
    rng, written = np.random.default_rng(0), []
    probs = right_probs(np.repeat(source.labels, views)).reshape(-1, views, 10)
    for sample, (height, width) in enumerate(source.sizes(np.arange(len(source.labels))).tolist()):
        image = source.path(sample).split("/")
        label = label_of(probs[sample], kind)
        state = [crops(rng, height, width, views), rng.random(views) < 0.5, label]
        if half:
            state = [np.float16(state[0]), state[1], np.float16(label)]
        if tensors:
            state = [torch.from_numpy(np.asarray(part)) for part in state]
        path = folder.joinpath(*image[-3:-1], image[-1].split(".")[0] + ".tar")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
        written.append([np.asarray(part) for part in state])
    return written


@pytest.fixture(scope="module")
def digits(tmp_path_factory, cache):
    """An image folder of digits."""
    return write_digits(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def labels(tmp_path_factory, digits):
    """FKD's files for it."""
    folder = tmp_path_factory.mktemp("fkd")
    write_cache(folder, open_source("folder", digits))
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory, digits, labels):
    """Their store."""
    store = tmp_path_factory.mktemp("store") / "fkd.zarr"
    shown = call("import", labels, "--format", "fkd", "--source", "folder", "--root", digits, "--out", store)
    assert "with recorded views" in " ".join(shown.split())
    return store


def words(folder, root, store):
    return ("import", folder, "--format", "fkd", "--source", "folder", "--root", root, "--out", store)


KINDS = ("marginal_smoothing_k5", "marginal_smoothing_k7", "marginal_renorm_k5", "smoothing", "hard", "ori")


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_those_of_fkds_reader(digits, tmp_path, kind):
    source = open_source("folder", digits)
    written = write_cache(tmp_path / "fkd", source, kind=kind)
    store = tmp_path / "s.zarr"
    call(*words(tmp_path / "fkd", digits, store), "--label-type", kind, "--encoding", "float32")
    reader = StoreReader(store)
    for view in range(VIEWS):
        expected = np.stack([recovered(label, kind)[view] for *_, label in written])
        assert np.allclose(softmax_of(reader, view), expected, atol=1e-6)


def test_the_default_encoding_keeps_the_probabilities(digits, tmp_path):
    written = write_cache(tmp_path / "fkd", open_source("folder", digits), kind="smoothing")
    call(*words(tmp_path / "fkd", digits, tmp_path / "s.zarr"), "--label-type", "smoothing")
    reader = StoreReader(tmp_path / "s.zarr")
    assert reader.manifest.arrays["logits"].encoding.name == "topk16:2"
    expected = np.stack([recovered(label, "smoothing")[0] for *_, label in written])
    assert np.allclose(softmax_of(reader, 0), expected, atol=2e-3)


def test_sparse_encodings_keep_the_labels(digits, labels, tmp_path):
    store = tmp_path / "s.zarr"
    call(*words(labels, digits, store), "--label-type", "marginal_smoothing_k5", "--encoding", "topk:2")
    assert StoreReader(store).manifest.arrays["logits"].encoding.name == "topk:2"


@pytest.mark.parametrize(("half", "tensors"), [(False, False), (True, False), (False, True)])
def test_views_are_the_crops_of_fkds_trainer(tmp_path, half, tensors):
    for number in range(20):
        height, width = SIZES[number % 4]
        path = tmp_path / "train" / f"c{number % 10}" / f"{number}.png"
        save_image(path, smooth(height, width, seed=number))
    source = open_source("folder", tmp_path)
    written = write_cache(tmp_path / "fkd", source, half=half, tensors=tensors)
    store = tmp_path / "s.zarr"
    call(*words(tmp_path / "fkd", tmp_path, store))
    identity = StoreReader(store).manifest.identity
    recipe = ViewRecipe.model_validate(identity["view"]["recipe"]).located(str(store))
    assert identity["view"]["fingerprint"] == view_fingerprint(recipe, source)
    samples = np.arange(len(source.labels))
    for view in range(VIEWS):
        pixels = render(recipe, source, samples, draw(recipe, source, samples, view), 24)
        for sample, (coords, flips, _) in enumerate(written):
            image = Image.open(source.path(sample)).convert("RGB")
            i, h = (coords[view, axis].item() * image.size[1] for axis in (0, 2))
            j, w = (coords[view, axis].item() * image.size[0] for axis in (1, 3))
            theirs = F.resized_crop(image, i, j, h, w, [24, 24], InterpolationMode.BILINEAR)
            theirs = F.hflip(theirs) if flips[view] else theirs
            assert np.abs(pixels[sample].astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_recorded_views_do_not_depend_on_batches_and_can_be_sent_to_workers(imported, digits):
    source = open_source("folder", digits)
    stored = StoreReader(imported).manifest.identity["view"]["recipe"]
    recipe = ViewRecipe.model_validate(stored).located(str(imported))
    sent = pickle.loads(pickle.dumps(recipe))
    whole = draw(recipe, source, np.arange(40), 1)
    part = draw(sent, source, np.array([31, 2, 2]), 1)
    assert np.array_equal(part.boxes, whole.boxes[[31, 2, 2]])
    assert np.array_equal(part.flips, whole.flips[[31, 2, 2]])
    assert drift(StoreReader(imported).manifest, source, recipe, range(VIEWS), every_block=True) == ()


def test_the_fingerprint_covers_crops_and_flips(digits, labels, imported, tmp_path):
    folder = tmp_path / "fkd"
    shutil.copytree(labels, folder)
    path = next(folder.rglob("*.tar"))
    state = torch.load(path, weights_only=False)
    state[1][2] = not state[1][2]
    torch.save(state, path)
    call(*words(folder, digits, tmp_path / "s.zarr"))
    one, other = (StoreReader(store).manifest for store in (imported, tmp_path / "s.zarr"))
    assert one.view_fingerprint != other.view_fingerprint
    assert one.identity["teacher"] == other.identity["teacher"]
    line = call(*words(folder, digits, imported), status=1)
    assert "was written by another recipe" in line


@pytest.mark.parametrize("views_per_load", [1, 3])
def test_students_learn_from_recorded_views(imported, tmp_path, views_per_load):
    out = tmp_path / "run"
    line = ["train", "--student", "digits-small", "--store", imported, "--epochs", 2, "--out", out]
    line += ["--views-per-load", views_per_load, "--workers", 0]
    result = CliRunner().invoke(distill, list(map(str, line)))
    assert result.exit_code == 0, result.output
    recipe = read_yaml(out / "recipe.yaml")
    assert list(recipe["view"]["ops"][0]) == ["op", "parameters"]
    again = [str(out / "recipe.yaml"), "--out", str(tmp_path / "again"), "--workers", "0"]
    result = CliRunner().invoke(distill, ["train", *again])
    assert result.exit_code == 0, result.output
    weights = [(folder / "student.safetensors").read_bytes() for folder in (out, tmp_path / "again")]
    assert weights[0] == weights[1]


def test_recorded_views_need_their_store(imported, digits, tmp_path):
    view = ViewRecipe.model_validate(StoreReader(imported).manifest.identity["view"]["recipe"])
    fields = {"view": view, "source": "folder:train", "evaluation": "folder:val", "root": str(digits)}
    with pytest.raises(RecipeError, match="give that store with --store"):
        train(make_recipe(method="supervised", **fields), tmp_path / "run", device=CPU, workers=0)
    with pytest.raises(ValueError, match="recorded views must be the only op"):
        ViewRecipe.model_validate({"ops": [*view.model_dump()["ops"], {"op": "grayscale"}]})


def test_damaged_recorded_views_are_refused(imported, tmp_path):
    store = tmp_path / "s.zarr"
    shutil.copytree(imported, store)
    path = next(store.glob("recorded/values/c.1.*"))
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreDamaged):
        train(make_recipe_of(store), tmp_path / "run", device=CPU, workers=0)
    result = CliRunner().invoke(
        distill, ["train", "--student", "digits-small", "--store", str(store), "--out", str(tmp_path / "r")]
    )
    assert result.exit_code == 1
    assert "recorded/values/c.1" in result.stderr


def make_recipe_of(store):
    manifest = StoreReader(store).manifest
    sources = {"source": "folder:train", "evaluation": "folder:val", "root": manifest.source_root}
    return make_recipe([store], **sources)


def test_verify_compares_the_recorded_views_with_the_fingerprint(imported, tmp_path):
    assert "sound" in call("verify", "--store", imported, "--content")
    shutil.copytree(imported, tmp_path / "s.zarr")

    def forge(values):
        values["identity"]["view"]["recipe"]["ops"][0]["parameters"] = "0" * 64
        values["fingerprint"] = fingerprint(values["identity"])

    rewrite_manifest(tmp_path / "s.zarr", forge)
    result = CliRunner().invoke(precompute, ["verify", "--store", str(tmp_path / "s.zarr")])
    assert result.exit_code == 1
    assert "are not those of the fingerprint" in result.stdout


# Wrong files


def change(folder, edit):
    path = sorted(folder.rglob("*.tar"))[5]
    state = [np.asarray(part) for part in torch.load(path, weights_only=False)]
    torch.save(edit(*(part.copy() for part in state)), path)
    return path


def with_value(position, index, value):
    def edit(*state):
        state[position][index] = value
        return list(state)

    return edit


class Evil:
    def __reduce__(self):
        import os

        return os.mkdir, ("evil",)


EDITS = [
    (with_value(2, (1, 1, 0), np.nan), "expected probabilities"),
    (with_value(2, (1, 1, 0), 1.5), "expected probabilities"),
    (with_value(2, (1, 0, 0), 10), "expected ids 0 to 9"),
    (with_value(2, (1, 0, slice(None)), 3), "one of them twice"),
    (with_value(0, (2, 3), np.nan), "view 2 has the crop"),
    (with_value(0, (2, 2), 1.2), "view 2 has the crop"),
    (with_value(0, (2, 2), 0), "the crop of view 2 is empty"),
    (lambda c, f, p: [c[:2], f[:2], p[:2]], "holds 2 views, expected 3"),
    (lambda c, f, p: [c, f[:2], p], "expected coordinates (V, 4)"),
    (lambda c, f, p: [c, f, p[:, :, :4]], "check --label-type"),
    (lambda c, f, _: [c, f], "expected three arrays"),
    (lambda c, f, p: [c, f + 2, p], "expected 0 and 1"),
    (lambda c, f, p: [c, f, {"labels": p}], "expected three arrays"),
    (lambda _, f, p: [Evil(), f, p], "objects other than arrays"),
]


@pytest.mark.parametrize(("edit", "expected"), EDITS)
def test_wrong_files_are_refused(digits, labels, tmp_path, monkeypatch, edit, expected):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(labels, "fkd")
    change(tmp_path / "fkd", edit)
    assert expected in call(*words("fkd", digits, "s.zarr"), status=1)
    assert [path.name for path in tmp_path.iterdir()] == ["fkd"]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_files_are_refused(digits, labels, tmp_path, share):
    shutil.copytree(labels, tmp_path / "fkd")
    path = sorted((tmp_path / "fkd").rglob("*.tar"))[5]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    line = call(*words(tmp_path / "fkd", digits, tmp_path / "s.zarr"), status=1)
    assert f"{str(path)!r} cannot be read as a file of FKD: it is damaged" in line


def test_other_refusals(digits, labels, tmp_path):
    shutil.copytree(labels, tmp_path / "fkd")
    line = call(*words(tmp_path / "fkd", digits, "s.zarr"), "--view", "none", status=1)
    assert "--view is for" in line
    line = call(*words(tmp_path / "fkd", digits, "s.zarr"), "--label-type", "marginal_k5", status=1)
    assert "unknown label type of FKD" in line
    line = call("import", labels, "--format", "fkd", "--source", "digits", "--out", "s.zarr", status=1)
    assert "has no image files" in line
    path = sorted((tmp_path / "fkd").rglob("*.tar"))[5]
    shutil.copytree(path.parent, tmp_path / "fkd" / "again" / path.parent.name)
    assert "not known which file" in call(*words(tmp_path / "fkd", digits, "s.zarr"), status=1)
    shutil.rmtree(tmp_path / "fkd" / "again")
    path.unlink()
    line = call(*words(tmp_path / "fkd", digits, "s.zarr"), status=1)
    assert "has no file for 1 of 40 images of source 'folder:train'" in line
    assert f"such as {path.parent.name}/{path.name}" in line
    assert "there is no folder" in call(*words(tmp_path / "none", digits, "s.zarr"), status=1)


def test_half_precision_ids_are_refused_where_they_are_wrong(tmp_path):
    from coursepack.precompute.caches.base import CacheOptions
    from coursepack.precompute.caches.fkd import FkdCache

    class Many:
        name, labels, class_names = "many", np.zeros(1, np.int64), tuple(map(str, range(2050)))

        def path(self, sample):
            return "train/a/b.png"

        def sizes(self, samples):
            return np.array([[8, 8]], np.int32)

    probs = random_probs(1, classes=2050)
    label = np.float16(label_of(probs, "marginal_smoothing_k5"))
    state = [np.zeros((1, 4), np.float16), np.zeros(1, bool), label]
    (tmp_path / "a").mkdir()
    torch.save(state, tmp_path / "a" / "b.tar")
    with pytest.raises(ValueError, match="write the cache without --use_fp16"):
        FkdCache(CacheOptions(tmp_path, Many()))
