"""Reading a store: the rows that were written or a refusal, never a wrong row."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import RowStore, rewrite_manifest, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from coursepack.data.store import StoreReader, StoreWriter, load_manifest, verify
from coursepack.data.store import reader as reader_module
from coursepack.data.store.shards import checksum_bytes, file_checksum
from coursepack.errors import StoreDamaged, StoreIncomplete, StoreNotFound, UnknownName

ROWS = RowStore(views=3, block_rows=16, encoding="float16", shapes={"logits": (10,), "features/stem": (2, 3)})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sound store: tests only read it."""
    path = tmp_path_factory.mktemp("written") / "sound.zarr"
    write_rows(path, ROWS)
    return path


@pytest.fixture(scope="module")
def reader(written):
    return StoreReader(written)


def read_all(reader):
    everything = np.arange(ROWS.samples)
    found = {"labels": reader.labels().tobytes()}
    for name in ROWS.shapes:
        for view in range(ROWS.views):
            found[f"{name} {view}"] = reader.components(name, view, everything)["values"].tobytes()
    return found


@settings(max_examples=50, deadline=None)
@given(st.data(), st.sampled_from(list(ROWS.shapes)), st.lists(st.integers(0, 49), max_size=20))
def test_rows_of_any_samples_and_views(reader, data, name, samples):
    views = data.draw(st.lists(st.integers(0, 2), min_size=len(samples), max_size=len(samples)))
    rows = reader.rows(name, np.array(views, dtype=np.int64), np.array(samples, dtype=np.int64))
    assert rows.shape == (len(samples), *ROWS.shapes[name])
    expected = [ROWS.stored(name, view)[sample] for view, sample in zip(views, samples, strict=True)]
    assert rows.decode().numpy().tolist() == [row.astype(np.float32).tolist() for row in expected]


def test_what_a_batch_gets_is_its_own(reader):
    first = reader.components("logits", 0, np.array([3]))["values"]
    kept = first.copy()
    first += 1
    assert np.array_equal(reader.components("logits", 0, np.array([3]))["values"], kept)


def test_missing_store(tmp_path):
    with pytest.raises(
        StoreNotFound, match=r"no store at .*none\.zarr'\. Make one with `precompute run .* --store"
    ):
        StoreReader(tmp_path / "none.zarr")


def test_store_without_manifest(store):
    (store / "manifest.json").unlink()
    with pytest.raises(
        StoreIncomplete, match=r"has no manifest\.json: .*Run the same `precompute run` again"
    ):
        StoreReader(store)


def test_store_that_has_committed_nothing(tmp_path):
    with StoreWriter(tmp_path / "s.zarr", ROWS.plan()) as writer:
        ROWS.write_block(writer, next(writer.pending()))
    text = "has committed none of its 3 views. Run the same `precompute run` again"
    with pytest.raises(StoreIncomplete, match=text):
        StoreReader(tmp_path / "s.zarr")
    assert verify(tmp_path / "s.zarr").problems == ()


def test_view_that_is_not_committed(tmp_path):
    write_rows(tmp_path / "s.zarr", replace(ROWS, views=2))
    with StoreWriter(tmp_path / "s.zarr", ROWS.plan()) as writer:
        for block in list(writer.pending())[:-1]:
            ROWS.write_block(writer, block)
        writer.commit()
    reader = StoreReader(tmp_path / "s.zarr")
    assert reader.views == (0, 1)
    for view in (2, 3, -1):
        text = rf"view {view} of 'logits' is not committed in store .* \(committed: \[0, 1\]\)"
        with pytest.raises(StoreIncomplete, match=text):
            reader.components("logits", view, np.array([0]))


@pytest.mark.parametrize("samples", [[50], [-1], [0, 7, 50], [2**40]])
def test_samples_outside_the_store(reader, samples):
    with pytest.raises(IndexError, match=rf"sample {samples[-1]} was asked for, expected 0 to 49"):
        reader.components("logits", 0, np.array(samples))


def test_unknown_array_names_the_nearest(reader):
    with pytest.raises(UnknownName, match=r"unknown array of store .* Did you mean 'features/stem'\?"):
        reader.components("features/stam", 0, np.array([0]))


DAMAGE = {
    "first bit flipped": lambda file, _: flip(file, 0),
    "middle bit flipped": lambda file, _: flip(file, file.stat().st_size // 2),
    "last bit flipped": lambda file, _: flip(file, -1),
    "cut short": lambda file, _: file.write_bytes(file.read_bytes()[:-7]),
    "emptied": lambda file, _: file.write_bytes(b""),
    "longer": lambda file, _: file.write_bytes(file.read_bytes() + b"\0"),
    "deleted": lambda file, _: file.unlink(),
    "swapped": lambda file, other: file.write_bytes(other.read_bytes()),
}


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_every_damaged_data_file_is_refused_and_reported(store, damage):
    files = sorted(load_manifest(store).files)
    assert len(files) == 1 + 2 * 3 * 4
    for place, key in enumerate(files):
        file = store / key
        content = file.read_bytes()
        damage(file, store / files[place - 1 if place else place + 1])
        with pytest.raises(StoreDamaged, match=r"precompute verify") as refusal:
            read_all(StoreReader(store))
        assert key in str(refusal.value)
        assert [problem.key for problem in verify(store).problems] == [key]
        file.write_bytes(content)
    assert verify(store).problems == ()
    assert len(read_all(StoreReader(store))) == 7


def test_one_damaged_view_leaves_the_others_readable(store):
    flip(store / "logits/values/c.1.2.0", 5)
    reader = StoreReader(store)
    for view in (0, 2):
        assert np.array_equal(
            reader.components("logits", view, np.arange(50))["values"], ROWS.stored("logits", view)
        )
    for _ in range(2):
        with pytest.raises(StoreDamaged, match=r"content of .*c\.1\.2\.0' does not match its checksum"):
            reader.components("logits", 1, np.array([0]))


def test_a_file_that_the_manifest_does_not_name_is_refused(store):
    rewrite_manifest(store, lambda values: values["files"].pop("logits/values/c.0.3.0"))
    with pytest.raises(StoreDamaged, match=r"does not vouch for 'logits/values/c\.0\.3\.0'"):
        StoreReader(store).components("logits", 0, np.array([0]))


def test_hostile_index_that_the_manifest_vouches_for(store):
    file = store / "logits/values/c.0.0.0"
    footer = np.array([2**64 - 4, 16 * 20 + 4], dtype="<u8").tobytes()
    content = file.read_bytes()[:-20] + footer + checksum_bytes(footer)
    file.write_bytes(content)
    layout = load_manifest(store).arrays["logits"].components["values"]
    made = file_checksum(np.frombuffer(content, np.uint8), layout)
    entry = [len(content), made]
    rewrite_manifest(store, lambda values: values["files"].update({"logits/values/c.0.0.0": entry}))
    assert verify(store).files == 25
    with pytest.raises(StoreDamaged, match=r"index of 'logits/values/c\.0\.0\.0' points outside"):
        StoreReader(store).components("logits", 0, np.array([0]))


def test_pickled_reader_reads_the_same(reader):
    reader.labels()
    again = pickle.loads(pickle.dumps(reader))
    assert again.path == reader.path
    assert read_all(again) == read_all(reader)


# Python 3.12 warns of any fork with threads alive; the reader promises to survive exactly that.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_reader_works_in_a_forked_process(written):
    reader = StoreReader(written)
    expected = read_all(reader)
    for before in (reader, StoreReader(written)):
        child = os.fork()
        if child == 0:
            same = False
            try:
                same = read_all(before) == expected
            finally:
                os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert read_all(reader) == expected


def maps_of(path):
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize(
    ("reading", "kept"),
    [("mapped", 7), ("windowed", 7), ("resident", 7), ("resident", 3), ("resident", 2)],
)
def test_number_of_open_views_is_bounded_however_many_are_read(tmp_path, monkeypatch, reading, kept):
    view_bytes = 50 * 10 * 4
    monkeypatch.setattr(reader_module, "OPEN_VIEWS", 7)
    # Resident views are bounded by their bytes too, but the one in use and the next are always kept.
    room = {7: 1 << 20, 3: 3 * view_bytes + 1, 2: view_bytes}[kept]
    monkeypatch.setattr(reader_module, "RESIDENT_BYTES", room)
    views, shards = 2 * kept + 1, 4
    rows = write_rows(tmp_path / "s.zarr", RowStore(views=views))
    reader = StoreReader(tmp_path / "s.zarr", reading)
    most = 0 if reading == "resident" else kept * shards
    for _ in range(2):
        for view in range(views):
            found = reader.components("logits", view, np.arange(50))["values"]
            assert np.array_equal(found, rows.stored("logits", view))
            assert maps_of(tmp_path) <= most
            assert len(reader._open) <= kept
    assert maps_of(tmp_path) == most
    # The views opened last are open, and those opened first are closed.
    assert sorted(reader._open) == [("logits", view) for view in range(views - kept, views)]
    mixed = np.arange(50) % views
    expected = np.stack([rows.stored("logits", view)[sample] for sample, view in enumerate(mixed)])
    assert np.array_equal(reader.rows("logits", mixed, np.arange(50)).decode().numpy(), expected)
    del reader
    assert maps_of(tmp_path) == 0


def test_the_view_used_least_recently_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_module, "RESIDENT_BYTES", 0)  # two views are kept
    write_rows(tmp_path / "s.zarr", RowStore(views=3))
    reader = StoreReader(tmp_path / "s.zarr", "resident")
    for view in (0, 1, 0):
        reader.open("logits", view)
    reader.prefetch("logits", 2).join(30)
    assert set(reader._open) == {("logits", 0), ("logits", 2)}
