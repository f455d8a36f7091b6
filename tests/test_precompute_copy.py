"""Copies of stores and of parts: the same bytes, verified on the way, resumed after a kill, never half."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from builders import CPU, make_recipe
from click.testing import CliRunner
from helpers import RowStore, file_identities, make_job, rewrite_manifest, store_files, write_rows
from moments import at_rename, die
from spawned import run

from coursepack.data.store import StoreReader, StoreWriter, load_manifest, verify
from coursepack.data.store.copying import copy_store
from coursepack.data.store.locations import open_location
from coursepack.data.store.locations.local import LocalLocation
from coursepack.data.store.locations.s3 import BucketLocation
from coursepack.data.store.owners import Part, owning
from coursepack.distill.runs.train import train
from coursepack.errors import StoreBusy, StoreDamaged, StoreFull, StoreIncomplete, StoreMismatch
from coursepack.models import parse_tap
from coursepack.precompute import run_job
from coursepack.precompute.cli import main

GOLDEN = Path(__file__).parent / "golden"
ROWS = RowStore(views=4, shapes={"logits": (10,), "features/stem": (2, 3)})


def copy(*words):
    return CliRunner().invoke(main, ["copy", *map(str, words)])


@pytest.fixture
def store(tmp_path):
    write_rows(tmp_path / "s.zarr", ROWS)
    return tmp_path / "s.zarr"


def assert_copy(path, expected):
    found = store_files(path)
    assert sorted(found) == sorted(expected)
    assert [key for key in found if found[key] != expected[key]] == []
    assert verify(path).problems == ()


@pytest.mark.parametrize("version", [1, 2])
def test_a_copy_has_the_bytes_of_its_source(tmp_path, version):
    write_rows(tmp_path / "s.zarr", replace(ROWS, format_version=version))
    result = copy(tmp_path / "s.zarr", tmp_path / "new/folder/copy.zarr")
    assert result.exit_code == 0, result.output
    assert "4 of 4 views of features/stem, logits" in result.stdout
    assert_copy(tmp_path / "new/folder/copy.zarr", store_files(tmp_path / "s.zarr"))


@pytest.mark.parametrize("version", [1, 2])
def test_a_golden_store_is_copied(tmp_path, version):
    golden = GOLDEN / f"version-{version}.zarr"
    assert copy(golden, tmp_path / "s.zarr").exit_code == 0
    assert verify(tmp_path / "s.zarr").problems == ()
    found, expected = store_files(tmp_path / "s.zarr"), store_files(golden)
    data = [key for key in expected if "/c." in key or key.startswith("views/")]
    assert {key: found[key] for key in data} == {key: expected[key] for key in data}
    assert load_manifest(tmp_path / "s.zarr") == load_manifest(golden)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("arrays", [("logits",), ("logits", "features/stem")])
def test_the_first_views_are_the_store_that_was_written_with_them_alone(tmp_path, version, arrays):
    rows = replace(ROWS, format_version=version)
    write_rows(tmp_path / "s.zarr", rows)
    alone = replace(rows, views=2, shapes={name: rows.shapes[name] for name in arrays})
    write_rows(tmp_path / "alone.zarr", alone)
    result = copy(
        tmp_path / "s.zarr", tmp_path / "part.zarr", "--view-indices=0-1", f"--arrays={','.join(arrays)}"
    )
    assert result.exit_code == 0, result.output
    assert_copy(tmp_path / "part.zarr", store_files(tmp_path / "alone.zarr"))


def test_a_list_of_views_is_a_store_that_the_others_can_be_added_to(tmp_path, store):
    assert copy(store, tmp_path / "part.zarr", "--view-indices=3,0-1").exit_code == 0
    manifest = load_manifest(tmp_path / "part.zarr")
    assert (manifest.views, manifest.committed["logits"]) == (4, (0, 1, 3))
    assert StoreReader(tmp_path / "part.zarr").views == (0, 1, 3)
    assert verify(tmp_path / "part.zarr").problems == ()
    write_rows(tmp_path / "part.zarr", ROWS)
    assert_copy(tmp_path / "part.zarr", store_files(store))


def test_views_and_arrays_are_added_to_an_earlier_copy(tmp_path, store):
    path = tmp_path / "copy.zarr"
    copy_store(store, path, views=[range(1, 3)], arrays=["logits"], quiet=True)
    kept = file_identities(path)
    copied = copy_store(store, path, quiet=True)
    assert copied.files == len(load_manifest(store).files) - len(kept)
    assert {key: file_identities(path)[key] for key in kept} == kept
    assert_copy(path, store_files(store))
    assert copy_store(store, path, quiet=True).files == 0
    assert copy_store(store, path, views=[range(1)], quiet=True).files == 0
    assert_copy(path, store_files(store))


def test_tables_of_a_tap_that_is_left_out_are_left_out(tmp_path, teacher):
    options = {"views": 1, "encoding": "float16", "block_rows": 500}
    run_job(make_job(tmp_path / "alone.zarr", teacher, **options), quiet=True)
    job = make_job(tmp_path / "s.zarr", teacher, taps=[parse_tap("hidden1:sketch:8")], **options)
    run_job(job, quiet=True)
    assert "static/hidden1@sketch8" in load_manifest(tmp_path / "s.zarr").tables
    copy_store(tmp_path / "s.zarr", tmp_path / "part.zarr", arrays=["logits"], quiet=True)
    assert_copy(tmp_path / "part.zarr", store_files(tmp_path / "alone.zarr"))
    # It is extended as any store.
    run_job(replace(job, store=tmp_path / "part.zarr"), quiet=True)
    assert_copy(tmp_path / "part.zarr", store_files(tmp_path / "s.zarr"))


def test_a_student_learns_from_the_views_of_a_part(tmp_path, mapped_store):
    copy_store(mapped_store, tmp_path / "part.zarr", views=[range(1, 2)], arrays=["logits"], quiet=True)
    recipe = make_recipe([tmp_path / "part.zarr"], limit=64)
    assert train(recipe, tmp_path / "run", device=CPU, workers=0)["view"] == 1


def test_a_store_that_is_being_written_gives_its_finished_views(tmp_path, store):
    longer = replace(ROWS, views=6)
    with StoreWriter(store, longer.plan()) as writer:
        longer.write_block(writer, next(writer.pending()))
        assert copy_store(store, tmp_path / "copy.zarr", quiet=True).manifest.views == 6
    assert load_manifest(tmp_path / "copy.zarr").committed_views() == (0, 1, 2, 3)
    write_rows(tmp_path / "copy.zarr", longer)
    write_rows(store, longer)
    assert_copy(tmp_path / "copy.zarr", store_files(store))


# Interruptions


def test_killed_at_any_moment_it_goes_on_and_copies_nothing_twice(tmp_path, store):
    path, kept = tmp_path / "copy.zarr", {}
    for number, name in ((1, "copy.json"), (9, None), (12, None)):
        killed = run("precompute", "copy", store, path, before=partial(at_rename, number, die, name))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        if name is not None:
            continue
        with pytest.raises(
            StoreIncomplete, match=r"is a copy that has not finished. Run the same `precompute copy`"
        ):
            StoreReader(path)
        with pytest.raises(StoreIncomplete, match="has not finished"):
            write_rows(path, ROWS)
        now = file_identities(path)
        now = {key: identity for key, identity in now.items() if not key.endswith(".partial")}
        assert {key: now[key] for key in kept} == kept
        kept = now
    assert 6 < len(kept) < len(load_manifest(store).files)
    result = copy(store, path)
    assert result.exit_code == 0, result.output
    after = file_identities(path)
    assert {key: after[key] for key in kept} == kept
    assert_copy(path, store_files(store))


def interrupted(monkeypatch, number, *arguments, **options):
    """Copy until so many data files are written."""
    put, count = LocalLocation.put, [0]

    def counted(self, key, *pieces):
        count[0] += "/c." in key
        if count[0] > number:
            raise KeyboardInterrupt
        put(self, key, *pieces)

    with monkeypatch.context() as patch:
        patch.setattr(LocalLocation, "put", counted)
        with pytest.raises(KeyboardInterrupt):
            copy_store(*arguments, quiet=True, **options)


def test_while_views_are_added_the_earlier_ones_are_read(tmp_path, store, monkeypatch):
    path = tmp_path / "copy.zarr"
    copy_store(store, path, views=[range(2)], quiet=True)
    before = load_manifest(path)
    interrupted(monkeypatch, 5, store, path)
    assert load_manifest(path) == before
    assert verify(path).problems == ()
    with pytest.raises(StoreIncomplete, match="has not finished"):
        write_rows(path, ROWS)
    copy_store(store, path, quiet=True)
    assert_copy(path, store_files(store))


def test_another_part_may_be_asked_for_after_an_interruption(tmp_path, store, monkeypatch):
    write_rows(tmp_path / "alone.zarr", replace(ROWS, views=1, shapes={"logits": (10,)}))
    interrupted(monkeypatch, 20, store, tmp_path / "copy.zarr")
    copied = copy_store(store, tmp_path / "copy.zarr", views=[range(1)], arrays=["logits"], quiet=True)
    assert copied.files < 5
    assert_copy(tmp_path / "copy.zarr", store_files(tmp_path / "alone.zarr"))


def test_files_of_a_list_that_changed_meanwhile_are_copied_again(tmp_path, store, monkeypatch):
    path = tmp_path / "copy.zarr"
    interrupted(monkeypatch, 15, store, path)
    shutil.rmtree(store)
    write_rows(store, replace(ROWS, environment={"batch_size": 3}))
    assert copy_store(store, path, quiet=True).files == 4 * 8
    assert_copy(path, store_files(store))


def test_blocks_of_a_run_that_was_stopped_are_not_taken_for_copied_ones(tmp_path, store):
    path, other = tmp_path / "copy.zarr", replace(ROWS, views=1)
    write_rows(path, other)
    with StoreWriter(path, ROWS.plan()) as writer:
        ROWS.write_block(writer, next(writer.pending()))
    for file in path.rglob("c.1.*"):
        file.write_bytes(b"junk")
    copy_store(store, path, quiet=True)
    assert list((path / "blocks").iterdir()) == []
    assert_copy(path, store_files(store))


# Wrong input


def refused(*words):
    result = copy(*words)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    return result.stderr


def test_what_cannot_be_copied_is_refused_in_one_line_and_nothing_is_written(tmp_path, store, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other, file = tmp_path / "other.zarr", tmp_path / "file"
    write_rows(other, replace(ROWS, view_recipe=ROWS.view_recipe.model_copy(update={"seed": 7})))
    rewrite_manifest(other, lambda values: values["identity"]["view"].update(fingerprint="1"))
    file.write_text("")
    before = {path: store_files(path) for path in (store, other)}
    for words, text in (
        (["none.zarr", "a"], "there is no store at 'none.zarr'"),
        (["s.zarr", "./s.zarr"], "are the same place: give another target"),
        (["s.zarr", f"file://{store}"], "are the same place"),
        (["s.zarr", "s.zarr/copy"], "lies in"),
        (
            ["s.zarr", "a", "--view-indices=4"],
            "view 4 is out of range: the views of store 's.zarr' are 0 to 3",
        ),
        (["s.zarr", "a", "--view-indices=0-999999999999999"], "out of range"),
        (["s.zarr", "a", "--arrays=logits,feature/stem"], "unknown array of store 's.zarr' 'feature/stem'"),
        (["s.zarr", "a", "--arrays=features/stem"], "every store has logits: add it"),
        (["s.zarr", "file"], "is a file, expected a folder for the store: use another target"),
        (["s.zarr", "other.zarr"], "'other.zarr' is another store than 's.zarr'"),
    ):
        assert text in refused(*words), words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other.zarr", "s.zarr"]
    assert {path: store_files(path) for path in (store, other)} == before
    for views in ("", "a", "3-1", "0..3", "-1", "0,,1"):
        result = copy("s.zarr", "a", f"--view-indices={views}")
        assert (result.exit_code, "is not a list of views, as in 0-9 or 0-3,8" in result.stderr) == (2, True)
    counted = copy("s.zarr", "a", "--views=2")
    assert (counted.exit_code, "list those to copy with --view-indices" in counted.stderr) == (2, True)


def test_views_that_are_not_finished_are_named(tmp_path):
    path = tmp_path / "s.zarr"
    with StoreWriter(path, ROWS.plan()) as writer:
        assert "has finished none of its 4 views" in refused(path, tmp_path / "copy.zarr")
        for block in writer.pending():
            if block.view == 2:
                break
            ROWS.write_block(writer, block)
        writer.commit()
    text = refused(path, tmp_path / "copy.zarr", "--view-indices=1-3")
    assert f"view 2 of 'features/stem' is not finished in store '{path}' (and 1 more" in text
    assert not (tmp_path / "copy.zarr").exists()


def test_a_copy_of_one_store_is_not_continued_with_another(tmp_path, store, monkeypatch):
    write_rows(tmp_path / "other.zarr", ROWS)
    rewrite_manifest(
        tmp_path / "other.zarr", lambda values: values["identity"]["view"].update(fingerprint="1")
    )
    interrupted(monkeypatch, 3, store, tmp_path / "copy.zarr")
    text = refused(tmp_path / "other.zarr", tmp_path / "copy.zarr")
    assert f"is an unfinished copy of another store, '{store}': finish that one" in text
    (tmp_path / "copy.zarr/copy.json").write_text("{")
    assert "cannot be read: is not JSON" in refused(store, tmp_path / "copy.zarr")


def test_rows_of_another_machine_are_not_mixed_in(tmp_path, store):
    other = tmp_path / "other.zarr"
    write_rows(other, replace(ROWS, views=1, seed=1))
    for table in ("labels",):
        shutil.copytree(store / table, other / table, dirs_exist_ok=True)
    labels = load_manifest(store).table_files
    rewrite_manifest(other, lambda values: values["files"].update({k: list(v) for k, v in labels.items()}))
    with pytest.raises(StoreMismatch, match=r"has other rows than .* in view 0"):
        copy_store(store, other, quiet=True)


def test_a_damaged_source_is_named_and_the_copy_can_go_on(tmp_path, store):
    file = store / "logits/values/c.2.1.0"
    sound = file.read_bytes()
    for content, fault in (
        (sound[:-1], "expected"),
        (sound[:-9] + b"x" * 9, "checksum"),
        (None, "is missing"),
    ):
        file.unlink() if content is None else file.write_bytes(content)
        text = refused(store, tmp_path / "copy.zarr")
        assert fault in text
        assert f"precompute verify --store {store} --repair" in text
        assert not (tmp_path / "copy.zarr/manifest.json").exists()
    file.write_bytes(sound)
    assert copy(store, tmp_path / "copy.zarr").exit_code == 0
    assert_copy(tmp_path / "copy.zarr", store_files(store))


def test_no_space_is_refused_before_and_told_in_between(tmp_path, store, monkeypatch):
    need = load_manifest(store).data_bytes
    monkeypatch.setattr(LocalLocation, "free_bytes", lambda _: need - 1)
    with pytest.raises(StoreFull, match=r"needs .* more, but .* are free there"):
        copy_store(store, tmp_path / "copy.zarr", quiet=True)
    assert not (tmp_path / "copy.zarr").exists()
    monkeypatch.setattr(LocalLocation, "free_bytes", lambda _: need)
    put = LocalLocation.put

    def full(self, key, *pieces):
        if key == "logits/values/c.1.0.0":
            raise OSError(errno.ENOSPC, "No space left on device", key)
        put(self, key, *pieces)

    with monkeypatch.context() as patch:
        patch.setattr(LocalLocation, "put", full)
        with pytest.raises(StoreFull, match=r"is full. What is copied is kept: make room and run"):
            copy_store(store, tmp_path / "copy.zarr", quiet=True)
    copied = copy_store(store, tmp_path / "copy.zarr", quiet=True)
    assert 0 < copied.files < len(load_manifest(store).files)
    assert_copy(tmp_path / "copy.zarr", store_files(store))


def test_two_copies_to_one_place_are_not_made_at_once(tmp_path, store):
    with owning(tmp_path / "copy.zarr", Part()), pytest.raises(StoreBusy):
        copy_store(store, tmp_path / "copy.zarr", quiet=True)


def test_damage_under_way_does_not_get_into_the_copy(tmp_path, store, monkeypatch):
    """What is written is what was verified, even if the file changes in between."""
    put = LocalLocation.put

    def spoiled(self, key, *pieces):
        if "/c." in key and self.root != store:
            (store / key).write_bytes(b"spoiled")
        put(self, key, *pieces)

    expected = store_files(store)
    monkeypatch.setattr(LocalLocation, "put", spoiled)
    copy_store(store, tmp_path / "copy.zarr", quiet=True)
    monkeypatch.undo()
    assert_copy(tmp_path / "copy.zarr", expected)
    with pytest.raises(StoreDamaged):
        copy_store(store, tmp_path / "again.zarr", quiet=True)


# Buckets


def objects(address):
    client = open_location(address)._client()
    keys = sorted(str(entry["path"]) for entry in client.list().collect())
    return {key: bytes(client.get(key).bytes()) for key in keys if not key.startswith(("runs/", "lock"))}


@pytest.mark.integration
@pytest.mark.parametrize("version", [1, 2])
def test_a_store_goes_to_a_bucket_and_to_another_and_back(home, bucket, tmp_path, version):
    write_rows(tmp_path / "s.zarr", replace(ROWS, format_version=version))
    first, second = f"{home}/a/s.zarr", f"s3://{bucket}/b/s.zarr"
    for source, target in ((tmp_path / "s.zarr", first), (first, second), (second, tmp_path / "back.zarr")):
        assert copy(source, target).exit_code == 0
    expected = store_files(tmp_path / "s.zarr")
    assert_copy(tmp_path / "back.zarr", expected)
    assert objects(first) == objects(second) == {key: data for key, data in expected.items() if key != "lock"}


@pytest.mark.integration
def test_a_copy_to_a_bucket_goes_on_and_sends_nothing_twice(bucket, tmp_path, store, s3_server, monkeypatch):
    address, put, sent = f"s3://{bucket}/s.zarr", BucketLocation.put, []

    def counted(self, key, *pieces):
        if "/c." in key:
            if len(sent) == 13:
                raise KeyboardInterrupt
            sent.append(key)
        put(self, key, *pieces)

    with monkeypatch.context() as patch:
        patch.setattr(BucketLocation, "put", counted)
        with pytest.raises(KeyboardInterrupt):
            copy_store(store, address, quiet=True)
    with pytest.raises(StoreIncomplete, match="has not finished"):
        StoreReader(address)
    s3_server.requests.clear()
    copied = copy_store(store, address, quiet=True)
    assert copied.files == len(load_manifest(store).files) - 13
    again = [name for (method, name), _ in s3_server.requests.items() if method == "PUT" and name[:2] == "c."]
    assert len(again) <= copied.files
    expected = {key: data for key, data in store_files(store).items() if key != "lock"}
    assert objects(address) == expected


@pytest.mark.integration
def test_a_bucket_that_is_not_there_is_named(home, store):
    address = f"{home.partition(':')[0]}://no-such-bucket"
    assert f" 'no-such-bucket' for the store '{address}/s.zarr': create it" in refused(
        store, f"{address}/s.zarr"
    )


def test_the_mark_is_gone_in_the_end_and_says_where_the_copy_is_from(tmp_path, store, monkeypatch):
    path = tmp_path / "copy.zarr"
    interrupted(monkeypatch, 3, store, path)
    assert json.loads((path / "copy.json").read_text())["source"] == str(store)
    copy_store(store, path, quiet=True)
    assert not (path / "copy.json").exists()
