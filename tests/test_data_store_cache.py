"""Training from buckets through the cache of shards: equal to the local copy, and no bigger than allowed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from builders import CPU, make_recipe
from click.testing import CliRunner
from helpers import RowStore, copy_to, write_rows

from coursepack.data.sources.cache import cache_folder
from coursepack.data.store import StoreReader, read_together
from coursepack.data.store.cache import FOLDER, LIMIT_VARIABLE, open_caches, parse_bytes
from coursepack.data.store.locations import open_location
from coursepack.distill.cli import main as distill
from coursepack.distill.runs.train import train
from coursepack.errors import RecipeError, StoreDamaged, StoreFull

EVERYTHING = np.arange(50)


@pytest.fixture
def folder(own_cache):
    return own_cache / FOLDER


@pytest.fixture
def address(home):
    return f"{home}/rows.zarr"


on_s3 = pytest.mark.parametrize("home", ["s3"], indirect=True)
"""For tests that count requests, which do not differ between services."""


def cached(folder):
    """The cached files, the most recently used last."""
    return sorted(folder.rglob("*.shard"), key=lambda path: path.stat().st_mtime_ns)


def downloads(server):
    """Number of shards of logits that were downloaded."""
    return sum(
        count
        for (method, name), count in server.requests.items()
        if method == "GET" and name.startswith("c.")
    )


def reader_of(address, reading="mapped", **limits):
    plain = StoreReader(address)
    [cache] = open_caches([(plain.location, plain.manifest)], [["logits"]])
    return StoreReader(address, reading, cache)


def check(reader, rows, views):
    for view in views:
        found = reader.components("logits", view, EVERYTHING)["values"]
        assert np.array_equal(found, rows.stored("logits", view))


def test_sizes():
    assert (parse_bytes("5", ""), parse_bytes("200G", ""), parse_bytes("1K", "")) == (5, 200 * 10**9, 1000)
    for text in ("", "G", "1.5G", "-1", "1GB"):
        with pytest.raises(RecipeError, match=f"--cache-bytes is '{text}', expected a number of bytes"):
            parse_bytes(text, "--cache-bytes")


def test_local_stores_have_no_cache(tmp_path, folder):
    write_rows(tmp_path / "s.zarr")
    assert reader_of(tmp_path / "s.zarr").cache is None
    assert not folder.exists()


@on_s3
@pytest.mark.integration
@pytest.mark.parametrize("reading", ["mapped", "resident", "windowed"])
def test_shards_are_downloaded_once(address, folder, s3_server, reading):
    rows = write_rows(address, RowStore(views=2))
    s3_server.requests.clear()
    check(reader_of(address, reading), rows, (0, 1, 0))
    shards = downloads(s3_server)
    assert len(cached(folder)) == shards == 2 * 4
    check(reader_of(address, reading), rows, (0, 1))
    assert downloads(s3_server) == shards
    key = str(cached(folder)[0].relative_to(folder)).partition("/")[2]
    assert key.startswith("logits/values/c.")


@on_s3
@pytest.mark.integration
@pytest.mark.parametrize("reading", ["mapped", "resident", "windowed"])
def test_a_shard_that_is_removed_before_it_is_opened_is_downloaded_again(
    address, folder, s3_server, reading, monkeypatch
):
    """Another process may make room between the download and the opening."""
    rows, removed = write_rows(address, RowStore(views=1)), []
    reader = reader_of(address, reading)
    fetch = type(reader.cache).fetch

    def robbed(*arguments):
        files = fetch(*arguments)
        if not removed:
            removed.append(cached(folder)[0])
            removed[0].unlink()
        return files

    monkeypatch.setattr(type(reader.cache), "fetch", robbed)
    s3_server.requests.clear()
    check(reader, rows, (0,))
    assert downloads(s3_server) == 4 + 1


@on_s3
@pytest.mark.integration
@pytest.mark.parametrize("reading", ["mapped", "resident", "windowed"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_shard_is_downloaded_again(address, folder, s3_server, reading, damage):
    rows = write_rows(address, RowStore(views=1))
    check(reader_of(address, reading), rows, (0,))
    path = cached(folder)[1]
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.unlink()
    if damage != "gone":
        path.write_bytes(content if damage == "changed" else content[:-5])
    s3_server.requests.clear()
    check(reader_of(address, reading), rows, (0,))
    assert downloads(s3_server) == 1


@on_s3
@pytest.mark.integration
def test_a_damaged_shard_is_downloaded_again_for_stores_read_together(address, folder, tmp_path):
    rows = write_rows(address, RowStore(views=1))
    write_rows(tmp_path / "local.zarr", rows)
    local = StoreReader(tmp_path / "local.zarr")
    for damage in (False, True):
        if damage:
            path = cached(folder)[1]
            path.write_bytes(path.read_bytes()[:-5])
        wanted = [(local, "logits"), (reader_of(address), "logits")]
        for found in read_together(wanted, 0, EVERYTHING):
            assert np.array_equal(found.decode().numpy(), rows.stored("logits", 0))


@pytest.mark.integration
def test_a_shard_that_is_damaged_in_the_bucket_is_not_served(address, folder):
    write_rows(address, RowStore(views=1))
    location = open_location(address)
    key = next(f"logits/values/{name}" for name in location.names("logits/values") if name.startswith("c."))
    location.put(key, b"x" + location.get(key, 1 << 20)[1:])
    with pytest.raises(StoreDamaged, match=f"the content of '{address}/{key}' does not match its checksum"):
        reader_of(address).components("logits", 0, EVERYTHING)
    location.delete(key)
    with pytest.raises(StoreDamaged, match=f"'{address}/{key}' is missing"):
        reader_of(address).components("logits", 0, EVERYTHING)
    assert not any(path.name.startswith(Path(key).name) for path in cached(folder))


@pytest.mark.integration
def test_the_least_recently_used_is_removed_and_nothing_else(address, folder, monkeypatch):
    rows = write_rows(address, RowStore(views=4))
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("kept")
    reader = reader_of(address)
    check(reader, rows, (0,))
    view_bytes = sum(path.stat().st_size for path in cached(folder))
    monkeypatch.setenv(LIMIT_VARIABLE, str(2 * view_bytes))
    reader = reader_of(address)
    check(reader, rows, (0, 1, 2, 3))
    left = cached(folder)
    assert sum(path.stat().st_size for path in left) <= 2 * view_bytes
    assert {path.name.split(".")[1] for path in left} == {"2", "3"}
    check(reader, rows, (0, 3, 1))
    assert (folder / "mine.txt").read_text() == "kept"
    monkeypatch.setenv(LIMIT_VARIABLE, str(2 * view_bytes - 1))
    with pytest.raises(StoreFull, match=r"two views of the stores in buckets take .* --cache-bytes"):
        reader_of(address)


@pytest.mark.integration
def test_a_store_that_was_written_again_is_not_mixed_with_the_old(address, folder):
    rows = write_rows(address, RowStore(views=1))
    check(reader_of(address), rows, (0,))
    client = open_location(address)._client()
    client.delete([str(entry["path"]) for entry in client.list().collect()])
    rows = write_rows(address, RowStore(views=1, seed=5))
    check(reader_of(address), rows, (0,))


@pytest.mark.integration
def test_a_full_disk_is_named(address, folder, monkeypatch):
    write_rows(address, RowStore(views=1))

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("coursepack.data.store.cache.write_whole", full)
    with pytest.raises(StoreFull, match=r"the disk of the cache .* is full: set COURSEPACK_CACHE"):
        reader_of(address).components("logits", 0, EVERYTHING)


@pytest.mark.integration
@pytest.mark.parametrize("reading", ["resident", "mapped", "windowed"])
def test_training_equals_training_from_the_local_copy(home, stores, folder, tmp_path, reading):
    addresses = [copy_to(home, store) for store in stores[:2]]
    fields = {"limit": 150, "epochs": 4, "reading": reading}
    train(make_recipe(stores[:2], **fields), tmp_path / "local", device=CPU)
    train(make_recipe(addresses, **fields), tmp_path / "bucket", device=CPU)
    weights = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("local", "bucket")]
    assert weights[0] == weights[1]
    assert cached(folder)


@pytest.mark.integration
def test_the_command_trains_from_an_address_within_a_limit(home, stores, folder, tmp_path):
    address = copy_to(home, stores[0])
    words = ["train", "--student=digits-small", "--epochs=2", "--limit=150", "--store", address]
    result = CliRunner().invoke(distill, [*words, "--cache-bytes=10K", "--out", str(tmp_path / "o")])
    assert result.exit_code == 1
    assert "may hold 10.0 kB" in result.stderr
    assert LIMIT_VARIABLE not in os.environ
    result = CliRunner().invoke(distill, [*words, "--cache-bytes=1G", "--out", str(tmp_path / "o")])
    assert result.exit_code == 0, result.output
    assert address in (tmp_path / "o" / "provenance.json").read_text()
    assert cached(cache_folder() / FOLDER)
