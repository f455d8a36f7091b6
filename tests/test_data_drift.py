"""The drift guard: views that this version makes otherwise, and sources that are not what a teacher saw."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torchvision.transforms.v2.functional as F
from builders import CPU, STUDENT, make_recipe, write_teacher
from click.testing import CliRunner
from helpers import make_job, rewrite_manifest
from image_files import random_image
from PIL import Image

from coursepack.data import ViewRecipe, drift, jit_pixels, open_source
from coursepack.data.sources import FirstSamples
from coursepack.data.sources.base import sampled
from coursepack.data.store import StoreReader, load_manifest
from coursepack.data.views import PadCrop, draw, render
from coursepack.data.views.pixel_ops import Solarize
from coursepack.distill import open_teacher_stores
from coursepack.distill.cli import main as distill
from coursepack.distill.runs.folder import PROVENANCE_FILE, load_run
from coursepack.distill.setup.prepare import prepare
from coursepack.errors import StoreMismatch
from coursepack.precompute import run_job
from coursepack.precompute.cli import main as precompute

GOLDEN = Path(__file__).parent / "golden" / "version-1.zarr"
RECIPE = ViewRecipe(ops=(PadCrop(padding=1), Solarize(probability=0.5)), reference_size=8, seed=3)
SAMPLES, BLOCK, VIEWS = 1442, 500, 3
PROBED = {view: drift.probe_samples(SAMPLES, view).tolist() for view in range(VIEWS)}
OTHER_DRAWS = "the installed version draws different view parameters"
OTHER_PIXELS = "the installed version renders different pixels"


@pytest.fixture(scope="module")
def written(tmp_path_factory, teacher):
    """Three views of the digits, three blocks each; tests only read it."""
    path = tmp_path_factory.mktemp("drift") / "s.zarr"
    run_job(make_job(path, teacher, recipe=RECIPE, views=VIEWS, block_rows=BLOCK))
    return path


def command(main, *words):
    return CliRunner().invoke(main, [str(word) for word in words])


def found_in(path, *, every_block=True, views=range(VIEWS)):
    return drift.drift(load_manifest(path), open_source("digits"), RECIPE, views, every_block=every_block)


def move_box(monkeypatch, sample, view):
    """Let this version draw another box for one sample under one view."""
    real = PadCrop.draw

    def other(self, draws, frame):
        real(self, draws, frame)
        if draws.view == view:
            frame.boxes[draws.samples == sample, 0] += 1

    monkeypatch.setattr(PadCrop, "draw", other)


def crc(data: bytes) -> str:
    return f"{google_crc32c.value(data):08x}"


def test_a_store_vouches_for_draws_pixels_and_content(written):
    source, records = open_source("digits"), load_manifest(written).view_records
    assert sorted(records) == ["0", "1", "2"]
    for view in range(VIEWS):
        record, probed = records[str(view)], PROBED[view]
        assert len(record["draws"]) == 3
        assert sorted(map(int, record["probes"])) == probed
        assert 3 <= len(probed) <= drift.PROBES
        for sample in probed:
            one = np.array([sample])
            pixels = render(RECIPE, source, one, draw(RECIPE, source, one, view), 8)
            assert record["probes"][str(sample)] == crc(pixels.tobytes())
    images = np.array([google_crc32c.value(image.tobytes()) for image in source.images], dtype="<u4")
    content = [crc(images[start : start + BLOCK].tobytes()) for start in (0, 500, 1000)]
    assert records["0"]["content"] == content
    assert [view for view, record in records.items() if "content" in record] == ["0"]
    assert len({sample for probed in PROBED.values() for sample in probed}) > 8, "each view has its own"


@pytest.mark.parametrize("every_block", [False, True])
def test_the_same_code_has_no_drift(written, every_block):
    assert found_in(written, every_block=every_block) == ()
    assert drift.changed_content(load_manifest(written), open_source("digits")) == ()


def test_other_draws_are_named_by_view_and_block(written, monkeypatch):
    assert 701 not in PROBED[1]
    move_box(monkeypatch, 701, 1)
    assert found_in(written) == (f"view 1, block 1: {OTHER_DRAWS}",)
    assert found_in(written, every_block=False) == (f"view 1, block 1: {OTHER_DRAWS}",)
    assert found_in(written, views=[0, 2]) == ()
    monkeypatch.undo()
    move_box(monkeypatch, 3, 1)
    assert found_in(written) == (f"view 1, block 0: {OTHER_DRAWS}",)
    assert found_in(written, every_block=False) == (), "before a run one block per view is drawn"


def test_of_many_views_some_are_looked_at_before_a_run(written, monkeypatch):
    monkeypatch.setattr(drift, "MAX_VIEWS", 2)
    real, seen = PadCrop.draw, set()
    monkeypatch.setattr(
        PadCrop, "draw", lambda self, draws, frame: (seen.add(draws.view), real(self, draws, frame))[1]
    )
    assert found_in(written, every_block=False) == ()
    assert seen == {0, 1}
    assert found_in(written) == ()
    assert seen == {0, 1, 2}


def test_other_pixels_of_a_kernel_are_named_by_view_and_sample(written, monkeypatch):
    real, bad = jit_pixels.resample_rows, PROBED[2][1]

    def other(images, samples, *rest):
        real(images, samples, *rest)
        out = rest[-1]
        out[samples == bad, 4, 4] ^= 1

    monkeypatch.setattr(jit_pixels, "resample_rows", other)
    lines = [f"view {view}, sample {bad}: {OTHER_PIXELS}" for view in range(VIEWS) if bad in PROBED[view]]
    assert list(found_in(written)) == list(found_in(written, every_block=False)) == lines
    assert lines


def test_other_pixels_of_torchvision_are_named_by_view_and_sample(written, monkeypatch):
    source = open_source("digits")
    active = [
        f"view {view}, sample {sample}: {OTHER_PIXELS}"
        for view, probed in PROBED.items()
        for sample in probed
        if draw(RECIPE, source, np.array([sample]), view).pixel_ops[0][0, 0]
    ]
    assert 0 < len(active) < sum(map(len, PROBED.values()))
    real = F.solarize
    monkeypatch.setattr(F, "solarize", lambda image, threshold: real(image, threshold) ^ 1)
    assert list(found_in(written)) == active


def test_training_refuses_drift_before_anything_is_made(written, tmp_path, monkeypatch):
    move_box(monkeypatch, 701, 1)
    run, words = tmp_path / "run", ["train", "--student", STUDENT, "--store", written, "--epochs", 1]
    refused = command(distill, *words, "--out", run)
    assert (refused.exit_code, "Traceback" in refused.output) == (1, False)
    for text in (
        f"store '{written}' was written from other views than this version makes:\n"
        f"  view 1, block 1: {OTHER_DRAWS}\nDifferences: 1. It was written with",
        "'torchvision': ",
        "run `precompute run` again into a new store, or train anyway with --allow-drift",
    ):
        assert text in refused.stderr
    assert not run.exists()
    with pytest.raises(StoreMismatch, match="view 1, block 1"):
        prepare(make_recipe([written], online=True), CPU)
    assert prepare(make_recipe([written], views=1), CPU).drift == (), (
        "a view that is not used does not matter"
    )

    allowed = command(distill, *words, "--limit", 50, "--allow-drift", "--out", run)
    assert allowed.exit_code == 0, allowed.output
    facts = json.loads((run / PROVENANCE_FILE).read_text())
    assert facts["drift"] == [f"s: view 1, block 1: {OTHER_DRAWS}"]
    monkeypatch.undo()
    sound = command(distill, *words, "--limit", 50, "--out", tmp_path / "sound")
    assert sound.exit_code == 0, sound.output
    assert json.loads((tmp_path / "sound" / PROVENANCE_FILE).read_text())["drift"] == []


def test_a_refusal_shows_a_few_and_counts_all(written, monkeypatch):
    real = jit_pixels.resample_rows

    def other(images, samples, *rest):
        real(images, samples, *rest)
        out = rest[-1]
        out[:, 4, 4] ^= 1

    monkeypatch.setattr(jit_pixels, "resample_rows", other)
    count = sum(map(len, PROBED.values()))
    with pytest.raises(StoreMismatch) as refused:
        prepare(make_recipe([written]), CPU)
    assert str(refused.value).count(OTHER_PIXELS) == 8
    assert f"\nDifferences: {count}. " in str(refused.value)
    run = prepare(make_recipe([written], allow_drift=True), CPU)
    assert len(run.drift) == count


def test_verify_reports_drift(written, monkeypatch):
    assert command(precompute, "verify", "--store", written).exit_code == 0
    move_box(monkeypatch, 3, 1)
    found = command(precompute, "verify", "--store", written, "--json")
    assert found.exit_code == 1
    assert json.loads(found.stdout)["problems"] == [f"view 1, block 0: {OTHER_DRAWS}"]
    told = command(precompute, "verify", "--store", written)
    assert told.stdout.splitlines()[0] == f"view 1, block 0: {OTHER_DRAWS}"
    assert "1 problems" in told.stdout


# ---- sources of files


FILES = 70
PLAIN = sorted(set(range(FILES)) - set(sampled(FILES).tolist()) - set(drift.probe_samples(FILES, 0).tolist()))
"""Samples whose content neither the fingerprint nor a probe looks at."""


def write_bitmap(path, *key):
    """An image whose byte size depends on its sides alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_image(*key, size=(9, 8 + int(path.stem) % 2))).save(path)


def bitmap(root, sample):
    return root / "train" / f"class{sample // 35}" / f"{sample:02d}.bmp"


@pytest.fixture
def folder_store(tmp_path):
    """A store over a folder of 70 images, and the folder."""
    root = tmp_path / "images"
    for sample in range(FILES):
        write_bitmap(bitmap(root, sample), sample)
    source = open_source("folder", root)
    teacher = write_teacher(tmp_path / "two" / "mlp", "digits-mlp", classes=2)
    job = make_job(
        tmp_path / "f.zarr", teacher, source=source, recipe=RECIPE, views=1, block_rows=16, root=root
    )
    run_job(job)
    return tmp_path / "f.zarr", root


def test_verify_content_names_the_files_that_changed(folder_store):
    store, root = folder_store
    words = ["verify", "--store", store]
    long_ago = (store / "labels/c.0").stat().st_mtime - 1000
    for sample in range(FILES):
        os.utime(bitmap(root, sample), (long_ago, long_ago))
    assert command(precompute, *words, "--content").exit_code == 0
    before = open_source("folder", root).fingerprint
    changed = PLAIN[0], PLAIN[-1]
    for sample in changed:
        size = bitmap(root, sample).stat().st_size
        write_bitmap(bitmap(root, sample), "other", sample)
        assert bitmap(root, sample).stat().st_size == size
    os.utime(bitmap(root, changed[0]), (long_ago + 2000, long_ago + 2000))
    os.utime(bitmap(root, changed[1]), (long_ago + 1, long_ago + 1))
    assert open_source("folder", root).fingerprint == before, "nothing that is cheap to look at tells"
    assert command(precompute, *words).exit_code == 0
    found = command(precompute, *words, "--content", "--json")
    blocks = sorted({sample // 16 for sample in changed})
    assert len(blocks) == 2
    spans = [(16 * block, min(16 * block + 15, 69)) for block in blocks]
    expected = [
        f"source 'folder:train': samples {first} to {last} differ from what the teacher saw: "
        f"{bitmap(root, first)} to {bitmap(root, last)}"
        for first, last in spans
    ]
    expected[0] += f"; modified since the store was created: {bitmap(root, changed[0])}"
    assert (found.exit_code, json.loads(found.stdout)["problems"]) == (1, expected)


def test_a_source_that_is_another_one_is_a_problem(folder_store):
    store, root = folder_store
    write_bitmap(bitmap(root, int(sampled(FILES)[0])), "other")
    found = command(precompute, "verify", "--store", store, "--root", root)
    assert found.exit_code == 1
    assert found.stdout.startswith(
        "source 'folder:train' differs from the one that the store was written from\n"
    )


def test_a_source_that_is_not_at_hand_is_said_and_no_error(folder_store, tmp_path):
    store, root = folder_store
    said = "the views are not checked, because their source cannot be opened: "
    aside = root.rename(tmp_path / "aside")
    for words in ([], ["--root", tmp_path / "gone"]):
        found = command(precompute, "verify", "--store", store, *words)
        assert (found.exit_code, said in found.stderr) == (0, True), found.output
        assert "sound" in found.stdout
        asked = command(precompute, "verify", "--store", store, "--content", *words)
        assert (asked.exit_code, said in asked.stderr, "Traceback" in asked.stderr) == (1, False, False)
        assert "sound" not in asked.stdout
        assert ("if the files have moved, give --root" in asked.stderr) == (words == [])
    assert command(precompute, "verify", "--store", store, "--content", "--root", aside).exit_code == 0


def test_a_store_remembers_where_its_source_is(folder_store, tmp_path, monkeypatch):
    """It is where something was and not what it was: the store is no other one elsewhere."""
    store, root = folder_store
    manifest = load_manifest(store)
    assert manifest.origin["root"] == str(root)
    assert "root" not in str(manifest.identity)
    for words in (["--content"], ["--deep", 20]):
        found = command(precompute, "verify", "--store", store, *words)
        assert (found.exit_code, "not at hand" in found.stderr) == (0, False), found.output
    assert command(precompute, "inspect", store, "--out", tmp_path / "grid.png").exit_code == 0
    train = ["train", "--student", "digits-small", "--store", store, "--epochs", 1, "--device", "cpu"]
    train += ["--set", "evaluation=folder:train", "--set", "student_mean=[0.5]", "--set", "student_std=[0.5]"]
    told = command(distill, *train, "--out", tmp_path / "run")
    assert told.exit_code == 0, told.output
    assert load_run(tmp_path / "run").recipe.root == str(root)
    assert open_teacher_stores([store]).root == str(root)
    monkeypatch.chdir(tmp_path)
    aside = root.rename(tmp_path / "aside")
    gone = command(distill, *train, "--out", tmp_path / "other")
    assert (gone.exit_code, (tmp_path / "other").exists()) == (1, False)
    assert "there is no such folder" in gone.stderr
    assert "if the files have moved, give --root" in gone.stderr
    told = command(distill, *train, "--root", "aside", "--out", tmp_path / "other")
    assert told.exit_code == 0, told.output
    teacher, source = tmp_path / "two" / "mlp", open_source("folder", aside)
    job = make_job(store, teacher, source=source, recipe=RECIPE, views=2, root=aside)
    assert run_job(job).origin == manifest.origin, "what was begun elsewhere goes on"


@pytest.mark.parametrize("root", ["digits", "~nobody-of-that-name", 7, ["/"], {"/": "/"}])
def test_a_root_that_is_no_place_is_not_taken(written, tmp_path, root):
    path = tmp_path / "s.zarr"
    shutil.copytree(written, path)
    rewrite_manifest(path, lambda values: values["origin"].update(root=root))
    assert load_manifest(path).source_root is None
    assert open_teacher_stores([path]).root is None


# ---- stores from before the guard


@pytest.fixture
def old(written, tmp_path):
    """The store as a release without probes and content checksums wrote it."""
    path = tmp_path / "old.zarr"
    shutil.copytree(written, path)

    def strip(values):
        for record in values["view_records"].values():
            record.pop("probes")
            record.pop("content", None)

    rewrite_manifest(path, strip)
    return path


def test_stores_without_probes_are_used_and_still_guarded_by_their_draws(old, monkeypatch):
    assert found_in(old) == ()
    assert prepare(make_recipe([old]), CPU).drift == ()
    verified = command(precompute, "verify", "--store", old, "--content")
    assert verified.exit_code == 0
    assert "has no checksums of its source's content" in verified.stderr, "nothing was compared"
    move_box(monkeypatch, 701, 1)
    assert found_in(old) == (f"view 1, block 1: {OTHER_DRAWS}",)


def test_the_golden_store_still_loads_and_its_views_are_still_drawn():
    manifest, reader = load_manifest(GOLDEN), StoreReader(GOLDEN)
    assert all({"probes", "content"}.isdisjoint(record) for record in manifest.view_records.values())
    assert reader.rows("logits", 0, np.arange(20)).decode().shape == (20, 10)
    source = FirstSamples(open_source("digits"), 20)
    recipe = ViewRecipe.model_validate(manifest.identity["view"]["recipe"])
    assert drift.drift(manifest, source, recipe, reader.views, every_block=True) == ()
    assert drift.changed_content(manifest, source) == ()
    other = recipe.model_copy(update={"seed": 1})
    assert drift.drift(manifest, source, other, [1]) == (f"view 1, block 1: {OTHER_DRAWS}",)
