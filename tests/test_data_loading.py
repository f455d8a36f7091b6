"""Batches: the same pixels, labels and samples whoever renders them, when, and beside what."""

from __future__ import annotations

import gc
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import cut, random_image, save_image
from spawned import FORKED

from coursepack.data import PRESETS, Batch, batches, open_source
from coursepack.data.loading import Renderer
from coursepack.data.sources.files import ImageFiles
from coursepack.data.store.owners import Part
from coursepack.data.views import GRID, draw, render
from coursepack.errors import SourceError
from coursepack.kernels import MixedLabels

# The machine may have fewer cores than the three workers that are tried.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
SIZE = 12
VIEWS = (0, 3, 7)
FILES = 14
FAKE = ("fake,classes=5,size=10,samples=40", None)
NAMES = ("digits", "fake", "folder")
ORDER = np.array([11, 3, 7, 0, 13, 5, 2, 12, 9, 1, 6, 10, 4, 8])
"""Every file of the folder, and as many samples of the others."""


@dataclass(frozen=True)
class Row:
    """What a batch has to say of one sample under one view."""

    pixels: np.ndarray
    labels: tuple[int, int, float]
    """First, second, and the share of the first."""


def write_jpegs(root: Path) -> Path:
    """14 images of two classes, no two of one size."""
    for number in range(FILES):
        pixels = random_image(number, size=(20 + 3 * number, 61 - 2 * number))
        save_image(root / "train" / f"class{number % 2}" / f"{number:02d}.jpg", pixels, quality=90)
    return root


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return {
        "digits": open_source("digits"),
        "fake": open_source(*FAKE),
        "folder": open_source("folder", write_jpegs(tmp_path_factory.mktemp("jpegs"))),
    }


@pytest.fixture(scope="module")
def alone(sources):
    """Every row by source, preset, sample and view, each drawn and rendered by itself."""
    kept: dict[tuple[str, str, int, int], Row] = {}

    def row(name: str, preset: str, sample: int, view: int) -> Row:
        key = (name, preset, sample, view)
        if key not in kept:
            source, recipe, one = sources[name], PRESETS[preset], np.array([sample])
            params = draw(recipe, source, one, view)
            label = int(source.labels[sample])
            labels = (label, label, 1.0)
            if params.mixing is not None:
                second = int(source.labels[params.mixing.partners[0]])
                labels = (label, second, float(params.mixing.shares[0]) / GRID)
            kept[key] = Row(render(recipe, source, one, params, SIZE)[0], labels)
        return kept[key]

    return row


def rows_of(batch: Batch) -> list[tuple[int, int]]:
    return list(zip(batch.samples.tolist(), batch.views.tolist(), strict=True))


def pixels_of(batch: Batch) -> torch.Tensor:
    return batch.pixels(SIZE)


def assert_rows(found, expected, row, *, ahead=False) -> None:
    """The batches hold the expected rows (sample, view), in this order, and each is as it is alone."""
    seen = []
    for batch in found:
        if ahead:
            assert SIZE in batch.rendered, "rendered when it was asked for, not ahead"
        pixels, labels = batch.pixels(SIZE), batch.labels
        assert pixels.dtype == torch.uint8
        assert len(pixels) == len(batch) == len(batch.main_labels)
        for place, (sample, view) in enumerate(rows_of(batch)):
            want = row(sample, view)
            assert np.array_equal(pixels[place].numpy(), want.pixels), (sample, view)
            first, second, share = want.labels
            if isinstance(labels, MixedLabels):
                got = labels.first[place], labels.second[place], labels.lam[place]
                assert tuple(map(float, got)) == (first, second, np.float32(share))
            else:
                assert int(labels[place]) == first
            assert int(batch.main_labels[place]) == (first if share >= 0.5 else second)
        seen.append(rows_of(batch))
    assert [pair for batch in seen for pair in batch] == expected


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", NAMES)
def test_batch_sizes_and_orders_change_nothing(sources, alone, name, preset):
    def row(sample, view):
        return alone(name, preset, sample, view)

    source, recipe = sources[name], PRESETS[preset]
    for order, batch_size, view in ((ORDER, 14, 0), (ORDER[::-1], 4, 0), (ORDER[3:9], 1, 3)):
        found = batches(source, recipe, order, views=[view], batch_size=batch_size)
        assert_rows(found, [(sample, view) for sample in order.tolist()], row)
    everything = np.tile(ORDER, 2), np.repeat([0, 3], len(ORDER))
    mixed = np.random.default_rng(0).permutation(2 * len(ORDER))
    samples, views = (values[mixed] for values in everything)
    found = [Batch(source, recipe, samples, views)]
    assert_rows(found, list(zip(samples.tolist(), views.tolist(), strict=True)), row)


@pytest.mark.parametrize(
    ("name", "preset"),
    [*(("folder", preset) for preset in PRESETS), *((name, "imagenet-strong") for name in NAMES[:-1])],
)
def test_workers_and_threads_change_nothing(sources, alone, name, preset):
    """Two epochs of each; without workers a thread renders ahead what changes pixels."""
    source, recipe = sources[name], PRESETS[preset]
    for workers in (0, 2):
        ahead = workers > 0 or bool(recipe.pixel_ops or recipe.mix)
        with Renderer(source, recipe, [SIZE], workers=workers, start_method="fork") as renderer:
            for view in (0, 3):
                found = renderer.ahead(batches(source, recipe, ORDER, views=[view], batch_size=4))
                expected = [(sample, view) for sample in ORDER.tolist()]
                assert_rows(found, expected, lambda *key: alone(name, preset, *key), ahead=ahead)


@pytest.mark.parametrize(
    ("name", "preset", "start_method"),
    [
        ("folder", "imagenet-strong", "forkserver"),
        ("folder", "cifar-strong", "fork"),
        ("digits", "imagenet-strong", "fork"),
    ],
)
def test_start_methods_and_one_worker_change_nothing(sources, alone, name, preset, start_method):
    source, recipe = sources[name], PRESETS[preset]
    with Renderer(source, recipe, [SIZE, 5], workers=1, start_method=start_method) as renderer:
        found = list(renderer.ahead(batches(source, recipe, ORDER, views=VIEWS, batch_size=10)))
    expected = [(sample, view) for at in range(0, 14, 3) for view in VIEWS for sample in ORDER[at : at + 3]]
    assert_rows(found, expected, lambda *key: alone(name, preset, *key), ahead=True)
    for batch in found:
        again = Batch(source, recipe, batch.samples, batch.views).pixels(5)
        assert torch.equal(batch.rendered[5], again)


def test_a_new_process_gives_the_same(sources, tmp_path):
    """Everything there is made anew: the source is opened, numbers are drawn and pixels rendered."""
    folder = write_jpegs(tmp_path)
    asked = {"digits": ("digits", None), "fake": FAKE, "folder": ("folder", folder)}
    with ProcessPoolExecutor(1, mp_context=FORKED) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()
        for name, place in asked.items():
            source = pool.submit(open_source, *place).result()
            for preset in ("cifar", "cifar-strong", "imagenet-strong"):
                recipe = PRESETS[preset]
                params = pool.submit(draw, recipe, source, ORDER, 3).result()
                pixels = pool.submit(render, recipe, source, ORDER, params, SIZE).result()
                here = Batch(sources[name], recipe, ORDER, np.full_like(ORDER, 3))
                assert params.digest() == here.params.digest(), preset
                assert np.array_equal(pixels, here.pixels(SIZE)), preset


@pytest.mark.parametrize("views", [(4,), VIEWS])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_ranks_together_have_the_whole_batch(sources, alone, views, count):
    source, recipe = sources["folder"], PRESETS["cifar-strong"]
    ranks = [
        list(batches(source, recipe, ORDER, views=views, batch_size=4, part=Part(index, count)))
        for index in range(count)
    ]
    whole = list(batches(source, recipe, ORDER, views=views, batch_size=4))
    assert {len(rank) for rank in ranks} == {len(whole)}, "every rank makes every step"
    for step, batch in enumerate(whole):
        shares = [rank[step] for rank in ranks]
        assert [pair for share in shares for pair in rows_of(share)] == rows_of(batch)
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1
        for share in shares:
            assert_rows([share], rows_of(share), lambda *key: alone("folder", "cifar-strong", *key))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_resumed_at_any_step(sources, alone, workers, monkeypatch):
    """Nothing of what is left out is drawn or decoded; one renderer serves all these epochs."""
    source, recipe, views = sources["folder"], PRESETS["imagenet-strong"], [2, 5]
    steps = [rows_of(batch) for batch in batches(source, recipe, ORDER, views=views, batch_size=5)]
    assert len(steps) == 7
    if workers == 0:
        drawn = []
        monkeypatch.setattr(
            sys.modules[Batch.__module__],
            "draw",
            lambda recipe, source, samples, view: (
                drawn.extend((sample, view) for sample in samples.tolist()),
                draw(recipe, source, samples, view),
            )[1],
        )
    with Renderer(source, recipe, [SIZE], workers=workers, start_method="fork") as renderer:
        for first in range(len(steps) + 2):
            left = batches(source, recipe, ORDER, views=views, batch_size=5, first=first)
            expected = [pair for step in steps[first:] for pair in step]
            found = renderer.ahead(left)
            assert_rows(found, expected, lambda *key: alone("folder", "imagenet-strong", *key), ahead=True)
            if workers == 0:
                assert sorted(drawn) == sorted(expected)
                drawn.clear()


@pytest.mark.parametrize(("preset", "partners"), [("imagenet", False), ("imagenet-strong", True)])
def test_an_image_file_is_decoded_once_for_all_its_views(sources, alone, monkeypatch, preset, partners):
    source, recipe = sources["folder"], PRESETS[preset]
    decoded = []
    real = ImageFiles._decode
    monkeypatch.setattr(
        ImageFiles, "_decode", lambda self, sample: (decoded.append(sample), real(self, sample))[1]
    )
    several = list(batches(source, recipe, ORDER, views=VIEWS, batch_size=13))
    assert [len(batch) for batch in several] == [12, 12, 12, 6]
    for batch in several:
        batch.render_all([SIZE, 20])
        needed = set(batch.samples.tolist())
        if partners:
            needed |= set(batch.params.mixing.partners[batch.params.mixing.kinds > 0].tolist())
        assert sorted(decoded) == sorted(needed)
        decoded.clear()
    monkeypatch.undo()
    expected = [(sample, view) for at in range(0, 14, 4) for view in VIEWS for sample in ORDER[at : at + 4]]
    assert_rows(several, expected, lambda *key: alone("folder", preset, *key))


def test_a_batch_too_small_for_its_views_is_refused(sources):
    several = batches(sources["digits"], PRESETS["digits"], ORDER, views=VIEWS, batch_size=2)
    with pytest.raises(ValueError, match=r"batch_size is 2, expected at least one row per view \(3\)"):
        next(several)


def test_labels_of_mixed_batches_are_shares_of_two(sources):
    """Of one batch whose rows are of several views; the label of the larger share is the main one."""
    source, recipe = sources["digits"], PRESETS["imagenet-strong"]
    views = np.tile([1, 0], 7)
    batch = Batch(source, recipe, ORDER, views)
    labels = batch.labels
    assert isinstance(labels, MixedLabels)
    assert labels.first.tolist() == source.labels[ORDER].tolist()
    assert labels.lam.dtype == torch.float32
    for row in range(len(ORDER)):
        mixing = draw(recipe, source, ORDER[row : row + 1], int(views[row])).mixing
        assert int(labels.second[row]) == source.labels[mixing.partners[0]]
        assert float(labels.lam[row]) == mixing.shares[0] / GRID
    larger = torch.where(labels.lam >= 0.5, labels.first, labels.second)
    assert torch.equal(batch.main_labels, larger)
    assert not torch.equal(larger, labels.first)
    assert not torch.equal(larger, labels.second)


@pytest.mark.parametrize(("preset", "workers"), [("imagenet", 0), ("cifar-strong", 0), ("imagenet", 2)])
def test_a_damaged_file_is_the_same_error_wherever_it_is_met(tmp_path, preset, workers):
    source = open_source("folder", write_jpegs(tmp_path))
    damaged = Path(source.path(9))
    cut(damaged, 0.5)
    with pytest.raises(SourceError) as plain:
        source.pixels(np.array([9]))
    assert str(plain.value).startswith(f"sample 9 of source 'folder:train' cannot be read: {damaged}: ")
    healthy = np.array([4, 8, 0, 2])
    recipe = PRESETS[preset].model_copy(update={"mix": None})
    with Renderer(source, recipe, [SIZE], workers=workers, start_method="fork") as renderer:
        several = renderer.ahead(batches(source, recipe, ORDER, views=[0], batch_size=3))
        with pytest.raises(SourceError) as error:
            list(map(pixels_of, several))
        assert type(error.value) is SourceError
        assert str(error.value) == str(plain.value)
        after = list(renderer.ahead(batches(source, recipe, healthy, views=[0], batch_size=3)))
        assert [rows_of(batch) for batch in after] == [[(4, 0), (8, 0), (0, 0)], [(2, 0)]]
        for batch in after:
            want = Batch(source, recipe, batch.samples, batch.views).pixels(SIZE)
            assert torch.equal(batch.pixels(SIZE), want)


def children() -> set[int]:
    """Processes that this one started and that are not gone, zombies among them."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


@pytest.mark.parametrize("preset", ["imagenet", "imagenet-strong"])
def test_workers_stay_for_all_epochs_and_then_go(sources, alone, preset):
    source, recipe = sources["folder"], PRESETS[preset]
    before = children()
    seen = []
    with Renderer(source, recipe, [SIZE], workers=2, start_method="fork") as renderer:
        assert children() == before, "nothing is started before the first batch"
        for epoch in range(3):
            found = renderer.ahead(batches(source, recipe, ORDER, views=[epoch], batch_size=4))
            expected = [(sample, epoch) for sample in ORDER.tolist()]
            assert_rows(found, expected, lambda *key: alone("folder", preset, *key))
            seen.append(children() - before)
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 2
    gc.collect()
    assert children() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_an_abandoned_epoch_ends_cleanly_and_the_next_is_whole(sources, alone, workers):
    source, recipe = sources["folder"], PRESETS["cifar-strong"]
    processes, threads = children(), set(threading.enumerate())
    asked = []

    def watched(view):
        for batch in batches(source, recipe, ORDER, views=[view], batch_size=1):
            asked.append(view)
            yield batch

    with Renderer(source, recipe, [SIZE], workers=workers, start_method="fork") as renderer:
        for view in VIEWS:
            for place, batch in enumerate(renderer.ahead(watched(view))):
                assert_rows(
                    [batch], [(ORDER[place], view)], lambda *key: alone("folder", "cifar-strong", *key)
                )
                if place == 2:
                    break
            assert asked.count(view) < len(ORDER), "only a few batches are asked for ahead"
        found = renderer.ahead(batches(source, recipe, ORDER, views=[0], batch_size=4))
        expected = [(sample, 0) for sample in ORDER.tolist()]
        assert_rows(found, expected, lambda *key: alone("folder", "cifar-strong", *key))
        abandoned = renderer.ahead(watched(3))
        next(abandoned)
    del abandoned, found
    gc.collect()
    assert children() == processes
    assert set(threading.enumerate()) <= threads


def test_two_epochs_of_one_renderer_at_once_are_not_confused(sources):
    """Workers render one epoch at a time: whoever starts another gets no rows of the wrong one."""
    source, recipe = sources["folder"], PRESETS["imagenet"]

    def epoch(view):
        return renderer.ahead(batches(source, recipe, ORDER, views=[view], batch_size=4))

    with Renderer(source, recipe, [SIZE], workers=2, start_method="fork") as renderer:
        first, second = epoch(0), epoch(1)
        next(first)
        next(second)
        with pytest.raises(RuntimeError, match="another epoch of the same renderer has begun"):
            next(first)


@pytest.mark.parametrize("workers", [0, 2])
def test_rendering_leaves_the_global_generators_alone(sources, workers):
    """A student with dropout trains alike with and without workers."""
    source, recipe = sources["folder"], PRESETS["imagenet-strong"]
    torch.manual_seed(5)
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the legacy state is what is watched
    with Renderer(source, recipe, [SIZE], workers=workers, start_method="fork") as renderer:
        for view in (0, 1):
            for batch in renderer.ahead(batches(source, recipe, ORDER, views=[view], batch_size=4)):
                batch.pixels(SIZE)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002 - the legacy state is what is watched


def test_files_get_workers_and_images_in_memory_none(sources):
    cores = min(16, len(os.sched_getaffinity(0)))
    recipe = PRESETS["cifar"]
    found = {name: Renderer(source, recipe, [SIZE]).workers for name, source in sources.items()}
    assert found == {"digits": 0, "fake": 0, "folder": cores}


@pytest.mark.parametrize(
    ("name", "preset", "settings", "thread"),
    [
        ("digits", "digits", {"background": True}, "coursepack-read"),
        ("folder", "cifar-strong", {"workers": 0}, "coursepack-render"),
        ("folder", "cifar", {"workers": 0}, "MainThread"),
        ("folder", "cifar", {"workers": 1, "start_method": "fork"}, "coursepack-read"),
    ],
)
def test_one_thread_at_a_time_uses_a_source_that_loads_samples(sources, name, preset, settings, thread):
    def work():
        return threading.current_thread().name

    with Renderer(sources[name], PRESETS[preset], [SIZE], **settings) as renderer:
        assert renderer.submit(work).result().startswith(thread)
        with pytest.raises(SourceError, match="gone"):
            renderer.submit(lambda: (_ for _ in ()).throw(SourceError("gone"))).result()


def test_images_in_memory_are_rendered_ahead_where_that_is_asked_for(sources, alone):
    with Renderer(sources["digits"], PRESETS["digits"], [SIZE], background=True) as renderer:
        found = renderer.ahead(batches(sources["digits"], PRESETS["digits"], ORDER, views=[3], batch_size=4))
        expected = [(sample, 3) for sample in ORDER.tolist()]
        assert_rows(found, expected, lambda *key: alone("digits", "digits", *key), ahead=True)


@pytest.mark.parametrize(("name", "preset"), [("digits", "digits"), ("folder", "cifar-strong")])
def test_inline_rendering_happens_in_the_thread_that_takes_the_batch(
    sources, alone, monkeypatch, name, preset
):
    threads, render_all = [], Batch.render_all

    def noting(self, sizes):
        threads.append(threading.current_thread())
        return render_all(self, sizes)

    monkeypatch.setattr(Batch, "render_all", noting)
    recipe = PRESETS[preset]
    with Renderer(sources[name], recipe, [SIZE], workers=0, inline=True) as renderer:
        found = renderer.ahead(batches(sources[name], recipe, ORDER, views=[3], batch_size=4))
        expected = [(sample, 3) for sample in ORDER.tolist()]
        assert_rows(found, expected, lambda *key: alone(name, preset, *key), ahead=True)
    assert set(threads) == {threading.main_thread()}
