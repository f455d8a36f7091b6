"""Lists of views, of format version 2: read as needed, replaced whole, refused where damaged, mended."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from builders import write_teacher
from click.testing import CliRunner
from helpers import RowStore, make_job, rewrite_manifest, store_files, write_rows

from coursepack.canonical import canonical_json, fingerprint
from coursepack.data.store import StoreReader, StoreWriter, load_manifest, verify
from coursepack.data.store.contents import digest_of, list_key
from coursepack.errors import StoreDamaged
from coursepack.precompute import run_job
from coursepack.precompute.cli import main

ROWS = RowStore(views=3, shapes={"logits": (10,), "features/stem": (2, 3)})
SOME = np.array([49, 0, 17])


@pytest.fixture
def store(tmp_path):
    write_rows(tmp_path / "s.zarr", ROWS)
    return tmp_path / "s.zarr"


def list_of(store, view):
    return store / list_key(view, load_manifest(store).list_digests[view])


DAMAGE = {
    "gone": lambda file: file.unlink(),
    "changed": lambda file: file.write_bytes(file.read_bytes().replace(b"1", b"2")),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "empty": lambda file: file.write_bytes(b""),
    "another's": lambda file: file.write_bytes(next(file.parent.glob("0.*")).read_bytes()),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_list_is_reported_and_the_other_views_are_read(store, damage):
    file = list_of(store, 1)
    damage(file)
    reader = StoreReader(store)
    for view in (0, 2):
        found = reader.components("logits", view, SOME)["values"]
        assert np.array_equal(found, ROWS.stored("logits", view)[SOME])
    for _ in range(2):
        with pytest.raises(StoreDamaged, match=rf"{file.name}.*precompute verify --store .* --repair"):
            reader.components("logits", 1, SOME)
    (problem,) = verify(store).problems
    assert (problem.key, problem.view) == (f"views/{file.name}", 1)
    assert len(str(problem)) < 300


@pytest.mark.parametrize("damage", [DAMAGE["gone"], DAMAGE["changed"], DAMAGE["a folder"]])
def test_repair_writes_the_view_of_a_damaged_list_again(tmp_path, damage):
    teacher = write_teacher(tmp_path / "mlp")
    path = tmp_path / "s.zarr"
    run_job(make_job(path, teacher, block_rows=500, batch_size=100), quiet=True)
    before = store_files(path)
    damage(list_of(path, 1))
    (path / "logits/values/c.0.1.0").write_bytes(b"short")
    result = CliRunner().invoke(main, ["verify", f"--store={path}", "--repair", "--device=cpu"])
    assert result.exit_code == 0, result.output
    assert result.stderr.count("written again") == 2
    assert store_files(path) == before


def test_a_reader_that_is_open_while_a_tap_is_added_goes_on(tmp_path):
    path, small = tmp_path / "s.zarr", replace(ROWS, shapes={"logits": (10,)})
    write_rows(path, small)
    reader = StoreReader(path)
    reader.components("logits", 0, SOME)
    names = {file.name for file in (path / "views").iterdir()}
    write_rows(path, ROWS)
    assert not names & {file.name for file in (path / "views").iterdir()}
    for view in range(3):
        found = reader.components("logits", view, SOME)["values"]
        assert np.array_equal(found, ROWS.stored("logits", view)[SOME])
    write_rows(tmp_path / "once.zarr", ROWS)
    assert store_files(path) == store_files(tmp_path / "once.zarr")


def test_lists_that_killed_writers_left_go(store):
    before = store_files(store)
    (store / "views/1.0123456789abcdef.json").write_text("{}")
    (store / "views/2.fedcba9876543210.json.host.7.0a1b2c3d.partial").write_text("{")
    assert verify(store).problems == ()
    write_rows(store, ROWS)
    assert store_files(store) == before


def test_a_store_of_version_1_stays_one(tmp_path):
    old = replace(ROWS, format_version=1)
    write_rows(tmp_path / "s.zarr", replace(old, views=1, shapes={"logits": (10,)}))
    write_rows(tmp_path / "s.zarr", replace(ROWS, views=2, shapes={"logits": (10,)}))
    write_rows(tmp_path / "s.zarr", ROWS)
    write_rows(tmp_path / "once.zarr", old)
    assert store_files(tmp_path / "s.zarr") == store_files(tmp_path / "once.zarr")
    assert json.loads((tmp_path / "s.zarr/manifest.json").read_text())["format_version"] == 1
    assert not (tmp_path / "s.zarr/views").exists()
    assert verify(tmp_path / "s.zarr").problems == ()


def test_the_manifest_says_the_same_as_the_lists(store):
    manifest = load_manifest(store)
    records = list(manifest.view_records.values())
    assert manifest.totals == {"rows": sum(record["sums"]["rows"] for record in records), "correct": 0.0}
    assert list(manifest.environments) == records[0]["environments"]
    assert manifest.data_bytes == sum(size for size, _ in manifest.files.values())
    assert sorted(manifest.files) == sorted(key for key in store_files(store) if "/c." in key)
    assert manifest.committed == {"logits": (0, 1, 2), "features/stem": (0, 1, 2)}


def test_views_are_forgotten_and_written_again(store):
    before = store_files(store)
    with StoreWriter(store, ROWS.plan()) as writer:
        writer.forget([1])
        assert StoreReader(store).views == (0, 2)
        assert load_manifest(store).totals["rows"] == 100
        for block in writer.pending():
            assert block.view == 1
            ROWS.write_block(writer, block)
        writer.commit()
    assert store_files(store) == before


def put(*path, value):
    def change(values):
        for step in path[:-1]:
            values = values[step]
        values[path[-1]] = value

    return change


MANIFESTS = {
    "ranges huge": put("committed", "logits", value=[[0, 1 << 40]]),
    "ranges reversed": put("committed", "logits", value=[[2, 0]]),
    "ranges overlapping": put("committed", "logits", value=[[0, 2], [1, 2]]),
    "ranges text": put("committed", "logits", value=["01"]),
    "ranges flat": put("committed", "logits", value=[0, 1]),
    "fewer lists": lambda values: values["view_lists"].pop("1"),
    "more lists": lambda values: values["view_lists"].update({"4": "0" * 64}),
    "a list of no view": lambda values: values["view_lists"].update({"-1": "0" * 64}),
    "digest short": put("view_lists", "0", value="0" * 63),
    "digest with a path": put("view_lists", "0", value="../../../" + "0" * 55),
    "digest a number": put("view_lists", "0", value=0),
    "lists a list": put("view_lists", value=[]),
    "files of views": lambda values: values["files"].update({"logits/values/c.0.0.0": [1, 1]}),
    "totals text": put("totals", "rows", value="many"),
    "totals missing": put("totals", value={}),
    "environments text": put("environments", value=["x"]),
    "batch size text": put("environments", value=[{"batch_size": "x"}]),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_manifests_that_cannot_be_are_refused(store, change):
    values = json.loads((store / "manifest.json").read_text())
    del values["checksum"]
    change(values)
    values["checksum"] = fingerprint(values)
    (store / "manifest.json").write_text(canonical_json(values, indent=1))
    tracemalloc.start()
    with pytest.raises(StoreDamaged, match="cannot be understood"):
        load_manifest(store)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


LISTS = {
    "file outside": lambda entry: entry["files"].update({"../../etc/passwd": [5, 5]}),
    "file of another view": lambda entry: entry["files"].update({"logits/values/c.1.0.0": [660, 5]}),
    "size off by one": lambda entry: entry["files"]["logits/values/c.0.0.0"].__setitem__(0, 661),
    "no record": lambda entry: entry.pop("record"),
    "no files": lambda entry: entry.pop("files"),
    "files a list": put("files", value=[]),
    "draws too many": lambda entry: entry["record"]["draws"].append("0"),
    "deep": put("record", "fidelity", value=[[[[[[]]]]]]),
}


@pytest.mark.parametrize("change", LISTS.values(), ids=LISTS)
def test_lists_that_cannot_be_are_refused(store, change):
    values = json.loads((store / "manifest.json").read_text())
    del values["checksum"]
    entry = json.loads(list_of(store, 0).read_bytes())
    change(entry)
    text = canonical_json(entry).encode()
    values["view_lists"]["0"] = digest_of(text)
    (store / list_key(0, digest_of(text))).write_bytes(text)
    values["checksum"] = fingerprint(values)
    (store / "manifest.json").write_text(canonical_json(values, indent=1))
    with pytest.raises(StoreDamaged, match="the list of a view"):
        StoreReader(store).components("logits", 0, SOME)
    assert [problem.view for problem in verify(store).problems] == [0]


def test_a_list_of_another_store_is_no_list_of_this(tmp_path, store):
    write_rows(tmp_path / "other.zarr", replace(ROWS, seed=1))
    shutil.copytree(tmp_path / "other.zarr/views", store / "views", dirs_exist_ok=True)
    assert verify(store).problems == ()
    rewrite_manifest(store, dict)
    assert verify(store).problems == ()
