"""Writing a store: plain Zarr on disk, extended without touching what stands, verified to the last byte."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import zarr
from encoded_rows import EVERY_ENCODING, EncodedRows
from helpers import RowStore, file_identities, store_files, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from coursepack.data import PRESETS
from coursepack.data.encodings import FOR_FEATURES
from coursepack.data.store import StoreReader, StoreWriter, load_manifest, verify
from coursepack.data.store import writer as writer_module
from coursepack.data.store.owners import Part, live_runs
from coursepack.errors import EncodingRange, RecipeError, StoreBusy, StoreMismatch

TAPPED = RowStore(shapes={"logits": (10,), "features/layer1.0": (2, 3), "features/layer1": ()})

shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)
row_stores = st.builds(
    lambda logits, feature, one, two, **facts: EncodedRows(
        shapes={"logits": one or (10,) if logits == "float32" else (10,), "features/a.b": two},
        encodings={"logits": logits, "features/a.b": feature},
        **facts,
    ),
    logits=st.sampled_from([name for name in EVERY_ENCODING if name != "bits"]),
    feature=st.sampled_from([name for name in EVERY_ENCODING if name in FOR_FEATURES]),
    one=shapes,
    two=shapes,
    samples=st.integers(1, 70),
    views=st.integers(1, 3),
    block_rows=st.one_of(st.none(), st.integers(1, 80)),
    static=st.dictionaries(st.sampled_from("abc"), shapes.map(lambda one: np.ones((3, *one), np.float32))),
)


@settings(max_examples=25, deadline=None)
@given(row_stores)
def test_any_store_is_plain_zarr_and_reads_the_same_everywhere(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("any") / "any.zarr"
    write_rows(path, rows)
    group, reader = zarr.open_group(path, mode="r"), StoreReader(path)
    assert np.array_equal(group["labels"][:], rows.labels)
    assert np.array_equal(reader.labels(), rows.labels)
    for name, value in rows.static.items():
        assert np.array_equal(group["static"][name][:], value)
        assert np.array_equal(reader.static(name), value)
    everything = np.arange(rows.samples)
    for name in rows.shapes:
        for view in range(rows.views):
            found = reader.components(name, view, everything)
            assert found.keys() == rows.parts(name, view).keys()
            for component, expected in rows.parts(name, view).items():
                array = group[name][component]
                assert array.shape == (rows.views, rows.samples, *expected.shape[1:])
                assert array[view].tobytes() == expected.tobytes()
                assert found[component].tobytes() == expected.tobytes()
    assert verify(path).problems == ()
    shutil.rmtree(path)


def test_small_chunks_and_shards_read_the_same_everywhere(tmp_path, monkeypatch):
    # Limits of a few rows, so that blocks have several shards, shards several chunks, and the last are short.
    monkeypatch.setattr("coursepack.data.store.layout.SHARD_BYTES", 20 * 40)
    monkeypatch.setattr("coursepack.data.store.layout.CHUNK_BYTES", 4 * 40)
    rows = write_rows(tmp_path / "s.zarr", replace(TAPPED, samples=83, block_rows=40))
    layout = load_manifest(tmp_path / "s.zarr").arrays["logits"].components["values"]
    assert (layout.shard_rows, layout.chunk_rows) == (20, 4)
    group, reader = zarr.open_group(tmp_path / "s.zarr", mode="r"), StoreReader(tmp_path / "s.zarr")
    for name in rows.shapes:
        for view in range(rows.views):
            expected = rows.stored(name, view)
            assert np.array_equal(group[name]["values"][view], expected)
            assert np.array_equal(reader.components(name, view, np.arange(83))["values"], expected)
    assert verify(tmp_path / "s.zarr").problems == ()


def test_bytes_do_not_depend_on_order_parts_or_batches(tmp_path):
    write_rows(tmp_path / "one.zarr", TAPPED)
    with StoreWriter(tmp_path / "two.zarr", TAPPED.plan(), Part(1, 2)) as odd:
        with StoreWriter(tmp_path / "two.zarr", TAPPED.plan(), Part(0, 2)) as even:
            for block in even.pending(iter([6, 0, 4, 2])):
                TAPPED.write_block(even, block, batch_size=3)
            even.commit()
        for block in odd.pending(iter([1, 7, 5, 3])):
            TAPPED.write_block(odd, block, batch_size=50)
        odd.commit()
    one, two = store_files(tmp_path / "one.zarr"), store_files(tmp_path / "two.zarr")
    assert one.keys() == two.keys()
    assert one == two


def test_more_views_and_another_tap_write_only_what_is_missing(tmp_path):
    path = tmp_path / "s.zarr"
    full = replace(TAPPED, views=4)
    small = replace(TAPPED, shapes={"logits": (10,)})
    write_rows(path, small)
    opened, before = StoreReader(path), file_identities(path)
    some = np.array([49, 0, 17])
    for step in (replace(small, views=4), full):
        with StoreWriter(path, step.plan()) as writer:
            for number, block in enumerate(writer.pending()):
                assert "logits" not in block.arrays or block.view >= 2
                step.write_block(writer, block)
                if number == 3:
                    # In the middle of it everything that was committed is readable, by old readers and new.
                    for reader in (opened, StoreReader(path)):
                        for view in (0, 1):
                            found = reader.components("logits", view, some)["values"]
                            assert np.array_equal(found, small.stored("logits", view)[some])
            writer.commit()
    after = file_identities(path)
    assert before.items() <= after.items()
    write_rows(tmp_path / "once.zarr", full)
    assert store_files(path) == store_files(tmp_path / "once.zarr")


def test_a_tap_that_is_added_elsewhere_leaves_the_views_records(tmp_path):
    write_rows(tmp_path / "s.zarr", replace(TAPPED, shapes={"logits": (10,)}))
    before = load_manifest(tmp_path / "s.zarr").view_records
    write_rows(tmp_path / "s.zarr", replace(TAPPED, environment={"device": "cuda"}))
    assert load_manifest(tmp_path / "s.zarr").view_records == before


def test_what_is_not_written_yet_is_nan_to_any_zarr_reader(tmp_path):
    rows = replace(TAPPED, encoding="float16")
    with StoreWriter(tmp_path / "s.zarr", rows.plan()) as writer:
        rows.write_block(writer, next(writer.pending()))
    values = zarr.open_group(tmp_path / "s.zarr", mode="r")["logits"]["values"][0]
    assert np.array_equal(values[:16], rows.stored("logits", 0)[:16])
    assert np.isnan(values[16:]).all()


def test_fewer_views_than_stored_change_nothing(tmp_path):
    path = tmp_path / "s.zarr"
    write_rows(path, replace(TAPPED, views=3))
    before, identities = store_files(path), file_identities(path)
    write_rows(path, replace(TAPPED, views=1))
    assert (store_files(path), file_identities(path)) == (before, identities)


@pytest.mark.parametrize("block_rows", [None, 16])
def test_block_rows_may_be_left_out_or_said_again(tmp_path, block_rows):
    write_rows(tmp_path / "s.zarr")
    write_rows(tmp_path / "s.zarr", RowStore(block_rows=block_rows, views=3))
    assert load_manifest(tmp_path / "s.zarr").committed_views() == (0, 1, 2)


def test_block_rows_beyond_the_samples_may_be_said_again(tmp_path):
    write_rows(tmp_path / "s.zarr", RowStore(block_rows=5000))
    write_rows(tmp_path / "s.zarr", RowStore(block_rows=5000))
    with pytest.raises(RecipeError, match=r"block rows are 7, but store .* was made with 50 and keeps them"):
        write_rows(tmp_path / "s.zarr", RowStore(block_rows=7))


def run_records(path):
    return [(file, file.stat().st_mtime_ns) for file in (path / "runs").iterdir()]


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (RowStore(view_recipe=PRESETS["none"]), "view.recipe.reference_size"),
        (RowStore(encoding="float16"), "encoding.name"),
        (RowStore(shapes={"logits": (11,)}), r"row_shape\[0\]"),
    ],
)
def test_another_recipe_is_refused_and_nothing_changes(tmp_path, other, difference):
    write_rows(tmp_path / "s.zarr")
    before, runs = store_files(tmp_path / "s.zarr"), run_records(tmp_path / "s.zarr")
    with pytest.raises(
        StoreMismatch, match=f"(?s)in another form|by another recipe.*{difference}.*store: .*recipe: "
    ):
        write_rows(tmp_path / "s.zarr", other)
    assert store_files(tmp_path / "s.zarr") == before
    assert run_records(tmp_path / "s.zarr") == runs


def test_a_foreign_zarr_group_is_refused_and_nothing_changes(tmp_path):
    zarr.create_group(tmp_path / "foreign.zarr", attributes={"mine": 1})
    before = store_files(tmp_path / "foreign.zarr")
    with pytest.raises(StoreMismatch, match="is no coursepack store"):
        write_rows(tmp_path / "foreign.zarr")
    assert store_files(tmp_path / "foreign.zarr") == before


@pytest.mark.parametrize(
    "left", [(), ("labels/c.0",), ("zarr.json", "labels/c.0", "labels/zarr.json")], ids=len
)
def test_a_store_killed_before_its_manifest_is_begun_again(tmp_path, left):
    write_rows(tmp_path / "once.zarr")
    (tmp_path / "s.zarr/labels").mkdir(parents=True)
    for place in left:
        shutil.copy(tmp_path / "once.zarr" / place, tmp_path / "s.zarr" / place)
    (tmp_path / "s.zarr/manifest.json.7.partial").write_text("half a mani")
    write_rows(tmp_path / "s.zarr")
    assert store_files(tmp_path / "s.zarr") == store_files(tmp_path / "once.zarr")


def test_a_block_that_fails_is_done_again_and_the_others_stay(tmp_path):
    path, rows = tmp_path / "s.zarr", RowStore(encoding="float16")
    logits = rows.values("logits", 0)
    logits[23] = 1e6
    with StoreWriter(path, rows.plan()) as writer:
        blocks = writer.pending()
        rows.write_block(writer, next(blocks))
        files = writer.write(next(blocks), {"draws": "", "environment": {}})
        files.add({"logits": logits[16:20]})
        with pytest.raises(EncodingRange, match="sample 23"):
            files.add({"logits": logits[20:28]})
    first = file_identities(path)
    assert sum("logits" in place for place in first) == 1
    write_rows(path, rows)
    assert first.items() <= file_identities(path).items()
    write_rows(tmp_path / "once.zarr", rows)
    assert store_files(path) == store_files(tmp_path / "once.zarr")


@pytest.mark.parametrize(("array", "flag"), [("logits", "--encoding"), ("features/a", "--feature-encoding")])
def test_a_value_out_of_range_names_the_array_and_the_flag_that_chose_its_encoding(tmp_path, array, flag):
    rows = RowStore(encoding="float16", shapes={"logits": (10,), "features/a": (3,)})
    values = {name: rows.values(name, 0)[:16] for name in rows.shapes}
    values[array][7] = 1e6
    with StoreWriter(tmp_path / "s.zarr", rows.plan()) as writer:
        files = writer.write(next(writer.pending()), {"draws": "", "environment": {}})
        with pytest.raises(EncodingRange) as refusal:
            files.add(values)
    assert str(refusal.value) == (
        f"{array}: sample 7 has the value 1e+06, outside the range of float16 (+-65504): "
        f"use float32 or bfloat16 as {flag}."
    )


def test_partial_files_of_killed_writers_go(tmp_path):
    path = tmp_path / "s.zarr"
    write_rows(path)
    before = store_files(path)
    for folder in ("", "labels", "logits/values"):
        (path / folder / "c.1.0.0.99.partial").write_bytes(b"half")
    assert StoreReader(path).views == (0, 1)
    assert verify(path).problems == ()
    write_rows(path)
    assert store_files(path) == before


def test_partial_metadata_of_killed_writers_goes(tmp_path):
    path, rows = tmp_path / "s.zarr", EncodedRows(static={"head_bias": np.ones(10, np.float32)})
    write_rows(path, rows)
    before = store_files(path)
    keys = [key for key in before if key.endswith("zarr.json")]
    folders = {key.rpartition("/")[0] for key in keys}
    assert {"", "labels", "logits", "static", "static/head_bias"} <= folders
    for key in keys:
        (path / f"{key}.host.7.0a1b2c3d.partial").write_bytes(b"half")
    write_rows(path, rows)
    assert store_files(path) == before


def test_partial_files_of_blocks_that_somebody_may_be_writing_stay(tmp_path):
    path = tmp_path / "s.zarr"
    with StoreWriter(path, RowStore().plan(), Part(0, 2)):
        theirs = path / "logits/values/c.1.0.0.host.7.0a1b2c3d.partial"
        theirs.parent.mkdir(parents=True, exist_ok=True)
        theirs.write_bytes(b"half")
        with StoreWriter(path, RowStore().plan(), Part(1, 2)) as writer:
            writer.commit()
        assert theirs.exists()
    write_rows(path)
    assert not theirs.exists()


def test_another_process_may_commit_and_sweep_at_any_moment(tmp_path):
    path, rows = tmp_path / "s.zarr", RowStore(views=2)
    with StoreWriter(path, rows.plan(), Part(0, 2)) as one, StoreWriter(path, rows.plan(), Part(1, 2)) as two:
        late = one.pending(iter([2, 0, 2, 4]))
        for block in (next(late), next(late)):
            rows.write_block(one, block)
        for block in two.pending(iter([1, 3])):
            rows.write_block(two, block)
        two.commit()
        assert load_manifest(path).committed_views() == (0,)
        # `one` knows nothing of the commit, and the done-objects are gone.
        assert one.is_complete(0) is False
        assert [(block.view, block.index) for block in late] == [(1, 0)]


def test_done_object_that_vanishes_while_it_is_read_is_not_done(tmp_path, monkeypatch):
    rows = RowStore()
    with StoreWriter(tmp_path / "s.zarr", rows.plan()) as writer:
        for block in writer.pending(iter([0])):
            rows.write_block(writer, block)
        monkeypatch.setattr(type(tmp_path), "is_file", lambda _path: True)
        (tmp_path / "s.zarr" / writer_module.BLOCKS / "0.0.json").unlink()
        assert not writer.is_complete(0)


@pytest.mark.parametrize(
    ("part", "other"), [((0, 1), (1, 2)), ((0, 2), (2, 4)), ((3, 6), (0, 3)), ((1, 2), (1, 2))]
)
def test_parts_that_share_blocks_are_refused(tmp_path, part, other):
    rows = RowStore()
    with StoreWriter(tmp_path / "s.zarr", rows.plan(), Part(*part)):
        assert [run["part_count"] for run in live_runs(tmp_path / "s.zarr")] == [part[1]]
        text = rf"process {os.getpid()} on \S+ is writing part {part[0]}/{part[1]} of store"
        with (
            pytest.raises(StoreBusy, match=text),
            StoreWriter(tmp_path / "s.zarr", rows.plan(), Part(*other)),
        ):
            pass
    assert live_runs(tmp_path / "s.zarr") == []
    write_rows(tmp_path / "s.zarr", rows, Part(*other))


def test_looking_at_who_writes_does_not_look_like_writing(tmp_path):
    import fcntl

    write_rows(tmp_path / "s.zarr")
    with next((tmp_path / "s.zarr/runs").iterdir()).open() as record:
        fcntl.flock(record, fcntl.LOCK_SH)
        assert live_runs(tmp_path / "s.zarr") == []


def test_run_record_that_is_not_written_yet_is_no_error(tmp_path):
    import fcntl

    write_rows(tmp_path / "s.zarr")
    with (tmp_path / "s.zarr/runs/new.json").open("w") as record:
        fcntl.flock(record, fcntl.LOCK_EX)
        assert live_runs(tmp_path / "s.zarr") == []


def test_manifest_tells_nothing_of_time_or_place(tmp_path):
    write_rows(tmp_path / "s.zarr")
    records = [json.loads(file.read_text()) for file in (tmp_path / "s.zarr/runs").iterdir()]
    assert [(run["pid"], run["part_index"], run["part_count"]) for run in records] == [(os.getpid(), 0, 1)]
    assert records[0]["ended"] >= records[0]["started"]
    for content in store_files(tmp_path / "s.zarr").values():
        assert records[0]["host"].encode() not in content
