"""Three ways of reading, one answer: resident, mapped and windowed, for every encoding."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import zarr
from encoded_rows import EVERY_ENCODING, encoded_as
from helpers import write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from coursepack.data import epoch_order
from coursepack.data.batches import Window
from coursepack.data.store import StoreReader
from coursepack.data.store import reader as reader_module
from coursepack.distill.targets.reading import choose_reading, free_memory
from coursepack.errors import StoreDamaged

READINGS = ("resident", "mapped", "windowed")
ROWS = {name: encoded_as(name, samples=83, block_rows=40) for name in EVERY_ENCODING}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A store per encoding, with shards of a few chunks; tests only read them."""
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coursepack.data.store.layout.SHARD_BYTES", 800)
        patch.setattr("coursepack.data.store.layout.CHUNK_BYTES", 100)
        for name, rows in ROWS.items():
            write_rows(folder / f"{name}.zarr", rows)
    return folder


@pytest.fixture
def store(sound, tmp_path):
    """A float32 store that a test may damage."""
    shutil.copytree(sound / "float32.zarr", tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def layout_of(path):
    return StoreReader(path).manifest.arrays["logits"].components["values"]


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("encoding", EVERY_ENCODING)
def test_every_encoding_and_reading_equals_zarr(sound, encoding, reading):
    path, rows = sound / f"{encoding}.zarr", ROWS[encoding]
    group, reader = zarr.open_group(path, mode="r"), StoreReader(path, reading)
    rng = np.random.default_rng(0)
    for name in rows.shapes:
        for view in range(rows.views):
            for samples in (np.arange(83), rng.integers(0, 83, 300), np.array([82]), np.array([], np.int64)):
                found = reader.components(name, view, samples)
                assert found.keys() == set(group[name]) == rows.parts(name, view).keys()
                for component, expected in rows.parts(name, view).items():
                    array = group[name][component]
                    assert found[component].dtype == array.dtype == expected.dtype
                    foreign = array[view][samples].tobytes()
                    assert found[component].tobytes() == foreign == expected[samples].tobytes()
        mixed, samples = rng.integers(0, rows.views, 90), rng.integers(0, 83, 90)
        decoded = reader.rows(name, mixed, samples).decode().numpy()
        for row in range(0, 90, 11):
            alone = reader.rows(name, int(mixed[row]), samples[row : row + 1]).decode().numpy()
            assert decoded[row].tobytes() == alone[0].tobytes()


def test_shards_of_these_stores_have_several_chunks_and_a_short_end(sound):
    for encoding in EVERY_ENCODING:
        for array in StoreReader(sound / f"{encoding}.zarr").manifest.arrays.values():
            layouts = array.components.values()
            assert any(layout.shard_rows > layout.chunk_rows for layout in layouts), encoding
            assert any(layout.shard_count(83) > 1 for layout in layouts), encoding


def test_windowed_finds_a_flipped_bit_before_it_serves_a_row_of_that_chunk(store):
    layout = layout_of(store)
    step = layout.chunk_rows * layout.row_bytes + 4
    assert min(layout.shard_rows // layout.chunk_rows, layout.chunk_rows) >= 2
    expected = ROWS["float32"].stored("logits", 0)
    # A bit of the second chunk of the first shard, in a row other than the one that is asked for.
    flip(store / "logits/values/c.0.0.0", step)
    bad = np.arange(layout.chunk_rows, 2 * layout.chunk_rows)
    others = np.setdiff1d(np.arange(83), bad)
    reader = StoreReader(store, "windowed")
    assert np.array_equal(reader.components("logits", 0, others)["values"], expected[others])
    for samples in (bad[-1:], np.array([0, bad[-1]]), bad, np.arange(83)):
        for _ in range(2):
            with pytest.raises(StoreDamaged, match=r"chunk 1 of .*c\.0\.0\.0' does not match its checksum"):
                reader.components("logits", 0, samples)
    assert np.array_equal(reader.components("logits", 0, others)["values"], expected[others])
    assert np.array_equal(
        reader.components("logits", 1, np.arange(83))["values"], ROWS["float32"].stored("logits", 1)
    )
    for reading in ("mapped", "resident"):
        with pytest.raises(StoreDamaged, match=r"content of .*c\.0\.0\.0' does not match its checksum"):
            StoreReader(store, reading).components("logits", 0, others)


def test_windowed_finds_damage_of_a_late_chunk_in_a_late_shard(store):
    layout = layout_of(store)
    shard = 80 // layout.shard_rows
    flip(store / f"logits/values/c.1.{shard}.0", 3)
    reader = StoreReader(store, "windowed")
    first = shard * layout.shard_rows
    reader.components("logits", 1, np.arange(first))
    with pytest.raises(StoreDamaged, match=rf"c\.1\.{shard}\.0' does not match"):
        reader.components("logits", 1, np.array([first]))


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("other", ["c.0.1.0", "c.1.0.0"])
def test_a_swapped_shard_is_found_at_open(store, reading, other):
    shutil.copy(store / "logits/values" / other, store / "logits/values/c.0.0.0")
    last = np.array([82])
    with pytest.raises(StoreDamaged, match=r"content of .*c\.0\.0\.0' does not match its checksum"):
        StoreReader(store, reading).components("logits", 0, last)


@pytest.mark.parametrize("reading", READINGS)
def test_prefetch_opens_the_next_view_in_the_background(store, reading):
    reader = StoreReader(store, reading)
    reader.components("logits", 0, np.array([0]))
    thread = reader.prefetch("logits", 1)
    assert thread is not threading.current_thread()
    thread.join(30)
    assert set(reader._open) == {("logits", 0), ("logits", 1)}
    shutil.rmtree(store / "logits")
    found = reader.components("logits", 1, np.arange(83))["values"]
    assert np.array_equal(found, ROWS["float32"].stored("logits", 1))


@pytest.mark.parametrize("reading", READINGS)
def test_a_read_waits_for_the_prefetch_and_opens_nothing_twice(store, monkeypatch, reading):
    opened, may_go_on = [], threading.Event()

    class Slow(reader_module.OpenView):
        def __init__(self, *arguments, **options):
            opened.append(threading.current_thread())
            assert may_go_on.wait(30)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(reader_module, "OpenView", Slow)
    reader = StoreReader(store, reading)
    thread = reader.prefetch("logits", 1)
    while not opened:
        pass
    timer = threading.Timer(0.2, may_go_on.set)
    timer.start()
    found = reader.components("logits", 1, np.arange(83))["values"]
    assert np.array_equal(found, ROWS["float32"].stored("logits", 1))
    thread.join(30)
    timer.join(30)
    assert opened == [thread]


DAMAGE = {
    "missing": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "no file": lambda file: (file.unlink(), file.mkdir()),
    "not named": lambda _: None,
}


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_errors_of_a_prefetch_surface_at_the_read(store, reading, damage):
    reader = StoreReader(store, reading)
    DAMAGE[damage](store / "logits/values/c.1.0.0")
    if damage == "not named":
        del reader.manifest.entries[1].files["logits/values/c.1.0.0"]
    # pytest turns an error that escapes a thread into a failure.
    reader.prefetch("logits", 1).join(30)
    for _ in range(2):
        with pytest.raises(OSError, match=r"c\.1\.0\.0"):
            reader.components("logits", 1, np.array([0]))
    assert np.array_equal(
        reader.components("logits", 0, np.arange(83))["values"], ROWS["float32"].stored("logits", 0)
    )


@pytest.mark.parametrize("reading", READINGS)
def test_will_need_changes_no_answer(sound, reading):
    for encoding, rows in ROWS.items():
        reader = StoreReader(sound / f"{encoding}.zarr", reading)
        for name in rows.shapes:
            for samples in ([], [82], range(82, -1, -1), [5] * 9):
                reader.will_need(name, 1, np.array(samples, dtype=np.int64))
            for component, expected in rows.parts(name, 1).items():
                assert reader.components(name, 1, np.arange(83))[component].tobytes() == expected.tobytes()


def test_will_need_does_not_pass_damaged_chunks(store):
    flip(store / "logits/values/c.0.0.0", 0)
    reader = StoreReader(store, "windowed")
    reader.will_need("logits", 0, np.arange(83))
    with pytest.raises(StoreDamaged, match="chunk 0"):
        reader.components("logits", 0, np.array([0]))


@pytest.mark.parametrize("reading", READINGS)
def test_pickling_keeps_the_reading(store, reading):
    reader = StoreReader(store, reading)
    reader.components("logits", 0, np.arange(83))
    again = pickle.loads(pickle.dumps(reader))
    assert (again.path, again.reading) == (store, reading)
    assert np.array_equal(
        again.components("logits", 1, np.arange(83))["values"], ROWS["float32"].stored("logits", 1)
    )


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("reading", READINGS)
def test_a_forked_child_reads_while_the_parent_prefetches(store, monkeypatch, reading):
    """The child is born while another thread of the parent holds the reader's lock for good."""
    may_go_on, inside = threading.Event(), threading.Event()
    parent = os.getpid()

    class Slow(reader_module.OpenView):
        def __init__(self, *arguments, **options):
            if os.getpid() == parent and threading.current_thread() is not threading.main_thread():
                inside.set()
                may_go_on.wait(30)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(reader_module, "OpenView", Slow)
    reader = StoreReader(store, reading)
    reader.components("logits", 0, np.arange(83))
    thread = reader.prefetch("logits", 1)
    assert inside.wait(30)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            import signal

            signal.alarm(300)
            same = [
                np.array_equal(
                    reader.components("logits", view, np.arange(83))["values"],
                    ROWS["float32"].stored("logits", view),
                )
                for view in (0, 1, 0)
            ]
            status = 0 if all(same) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    may_go_on.set()
    thread.join(30)
    assert np.array_equal(
        reader.components("logits", 1, np.arange(83))["values"], ROWS["float32"].stored("logits", 1)
    )


windows = st.builds(Window, chunk_rows=st.integers(1, 40), chunks=st.integers(1, 9))
sample_sets = st.sets(st.integers(0, 400), max_size=150).map(lambda some: np.array(sorted(some), np.int64))


@settings(max_examples=150, deadline=None)
@given(sample_sets, windows, st.integers(0, 5), st.integers(0, 5))
def test_windowed_order_is_a_permutation_window_by_window(samples, window, seed, epoch):
    order = epoch_order(samples, seed=seed, epoch=epoch, window=window)
    assert np.array_equal(np.sort(order), samples)
    assert np.array_equal(order, epoch_order(samples, seed=seed, epoch=epoch, window=window))
    seen, current = set(), set()
    for chunk in order // window.chunk_rows:
        if chunk not in current:
            if len(current) == window.chunks:
                seen |= current
                current = set()
            # A chunk that was left is never needed again.
            assert chunk not in seen
            current.add(chunk)


def test_windows_are_full_mixed_and_differ_between_epochs():
    samples, window = np.arange(1000), Window(chunk_rows=10, chunks=8)
    assert window.rows == 80
    orders = [epoch_order(samples, seed=1, epoch=epoch, window=window) for epoch in range(3)]
    for order in orders:
        for start in range(0, 960, 80):
            chosen = order[start : start + 80]
            assert len(np.unique(chosen // 10)) == 8
            assert np.count_nonzero(np.diff(chosen // 10)) > 40, "rows of one chunk lie together"
    chunks = [[tuple(np.unique(o[s : s + 80] // 10)) for s in range(0, 960, 80)] for o in orders]
    assert chunks[0] != chunks[1] != chunks[2] != chunks[0]
    assert not set(map(frozenset, chunks[0])) & set(map(frozenset, chunks[1])), "the same chunks meet again"
    other_seed = epoch_order(samples, seed=2, epoch=0, window=window)
    assert not np.array_equal(other_seed, orders[0])
    without = epoch_order(samples, seed=1, epoch=0)
    assert len(np.unique(without[:80] // 10)) > 40, "without a window the whole epoch is mixed"


def test_the_order_is_of_samples_and_not_of_the_samples_around_them():
    # One window that holds everything leaves the order as it is without windows.
    samples = np.arange(0, 400, 3)
    plain = epoch_order(samples, seed=4, epoch=2)
    assert np.array_equal(epoch_order(samples, seed=4, epoch=2, window=Window(400, 1)), plain)
    assert np.array_equal(epoch_order(samples, seed=4, epoch=2, window=Window(7, 100)), plain)


class Sized:
    def __init__(self, size):
        self.size = size

    def view_bytes(self, arrays):
        assert list(arrays) == ["logits"]
        return self.size


@pytest.mark.parametrize(
    ("sizes", "free", "expected"),
    [
        ([100], 400, "resident"),
        ([100], 399, "mapped"),
        ([60, 40], 400, "resident"),
        ([60, 41], 400, "mapped"),
        ([100], 125, "mapped"),
        ([100], 124, "windowed"),
        ([50, 50, 1], 125, "windowed"),
        ([100], 0, "windowed"),
    ],
)
def test_reading_is_chosen_by_size_and_free_memory(sizes, free, expected):
    assert choose_reading([Sized(size) for size in sizes], free) == expected


@pytest.mark.parametrize(
    ("limited", "used"), [(resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")]
)
def test_free_memory_stays_within_the_limits_of_the_process(monkeypatch, limited, used):
    infinite = resource.RLIM_INFINITY
    lines = Path("/proc/self/status").read_text().splitlines()
    held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{used}:"))
    for most, least, highest in ((held + (50 << 20), 10 << 20, 60 << 20), (held // 2, 0, 0)):
        limits = {limited: (most, infinite)}
        monkeypatch.setattr(resource, "getrlimit", lambda kind, of=limits: of.get(kind, (infinite, infinite)))
        assert least <= free_memory() <= highest


def test_free_memory_needs_nothing_that_only_linux_has(monkeypatch):
    """As on macOS: no /proc, no control groups, no separate count of the data segment."""
    read_text = Path.read_text

    def read(path, *args, **more):
        assert not str(path).startswith(("/proc", "/sys")), path
        return read_text(path, *args, **more)

    class Process:
        def memory_info(self):
            return SimpleNamespace(rss=60, vms=1000)

    limits = {resource.RLIMIT_DATA: (160, -1)}
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    monkeypatch.setattr(psutil, "Process", Process)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits.get(kind, unlimited))
    assert free_memory() == 100
    limits.clear()
    assert free_memory() == 5000


def test_size_of_a_view_and_of_its_chunks(sound):
    reader = StoreReader(sound / "topk:3.zarr")
    assert reader.view_bytes(["logits"]) == sum(
        part.nbytes for part in ROWS["topk:3"].parts("logits", 0).values()
    )
    layouts = reader.manifest.arrays["logits"].components.values()
    assert reader.chunk_rows(["logits"]) == max(layout.chunk_rows for layout in layouts)
