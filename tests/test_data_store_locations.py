"""Every kind of location keeps what its interface promises, and a store costs the operations it needs."""

from __future__ import annotations

import errno
import os
import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
from helpers import RowStore, store_files, write_rows

from coursepack import files as files_module
from coursepack.data.store import StoreReader, StoreWriter, verify
from coursepack.data.store.locations import LOCATIONS, open_location
from coursepack.data.store.locations.local import LocalLocation
from coursepack.errors import UnknownName

KINDS = {
    "file": lambda fixture: f"file://{fixture('tmp_path')}/s",
    "s3": lambda fixture: f"s3://{fixture('bucket')}/deep/s",
    "gs": lambda fixture: f"gs://{fixture('google_bucket')}/deep/s",
    "az": lambda fixture: f"az://{fixture('container')}/deep/s",
}
"""For each kind of location an address that a test may use."""
PARAMS = [pytest.param(kind, marks=() if kind == "file" else pytest.mark.integration) for kind in KINDS]
MOST = 1 << 20


@pytest.fixture(params=PARAMS)
def address(request):
    return KINDS[request.param](request.getfixturevalue)


@pytest.fixture
def location(address):
    return open_location(address)


def test_every_kind_of_location_is_tested():
    assert KINDS.keys() == LOCATIONS.keys()


def test_addresses(tmp_path):
    assert str(open_location(str(tmp_path / "s.zarr"))) == str(tmp_path / "s.zarr")
    assert open_location(tmp_path / "s.zarr").name == "s.zarr"
    assert open_location(open_location(tmp_path)) is not None
    with pytest.raises(UnknownName, match=r"unknown kind of location 'ftp://'.* Known: file://"):
        open_location("ftp://host/s.zarr")


def test_objects_are_put_whole_read_and_removed(location):
    location.put("a/b/c.0", b"one", np.arange(3, dtype=np.uint8))
    assert location.get("a/b/c.0", MOST) == b"one\0\1\2"
    location.put("a/b/c.0", b"two")
    assert location.get("a/b/c.0", MOST) == b"two"
    assert location.get_range("a/b/c.0", 1, 3) == b"wo"
    assert location.size("a/b/c.0") == 3
    location.put("a/b/d", b"")
    location.put("a/e", b"x")
    assert location.names("a/b") == ["c.0", "d"]
    assert location.names("none") == []
    location.delete("a/b/c.0")
    location.delete("a/b/c.0")
    assert location.names("a/b") == ["d"]
    assert location.free_bytes() > 0
    assert "a/b/d" in location.where("a/b/d")


def test_what_is_missing_or_too_long_is_said_so(location):
    for read in (lambda: location.get("x", MOST), lambda: location.get_tagged("x", MOST),
                 lambda: location.size("x"), lambda: location.map("x"),
                 lambda: location.get_range("x", 0, 1)):  # fmt: skip
        with pytest.raises(FileNotFoundError):
            read()
    assert location.tag("x") is None
    location.put("x", b"12345")
    with pytest.raises(ValueError, match="has 5 bytes, expected at most 4"):
        location.get("x", 4)


@pytest.mark.parametrize("resident", [True, False])
def test_maps_hold_what_was_opened(location, resident):
    location.put("x", b"content")
    location.put("empty")
    opened = location.map("x", resident=resident)
    assert bytes(opened.content) == b"content"
    opened.advise(0, 7)
    assert (opened.size(), opened.is_touched()) == (7, False)
    location.put("x", b"another")
    assert bytes(opened.content) == b"content"
    assert opened.is_touched() is False
    assert len(location.map("empty", resident=resident).content) == 0


def test_one_of_many_creates(address):
    won = []

    def create(number):
        if open_location(address).create("x", b"%d" % number) is not None:
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [b"%d" % number for number in won] == [open_location(address).get("x", MOST)]


def test_no_replacement_is_lost(address):
    first = open_location(address)
    assert first.replace("x", b"1", first.create("other", b"other")) is None
    tag = first.create("x", b"0")
    assert first.create("x", b"1") is None
    assert first.tag("x") == tag == first.get_tagged("x", MOST)[1]

    def count():
        location = open_location(address)
        for _ in range(8):
            while True:
                text, tag = location.get_tagged("x", MOST)
                if location.replace("x", b"%d" % (int(text) + 1), tag) is not None:
                    break

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first.get("x", MOST) == b"32"
    assert first.replace("x", b"0", tag) is None


def test_what_is_held_is_told_and_stays_afterwards(location):
    with location.hold("runs/a.json", b"1") as write:
        assert location.held("runs") == [("runs/a.json", b"1")]
        write(b"22")
        assert location.held("runs") == [("runs/a.json", b"22")]
    assert location.held("runs") == []
    assert location.get("runs/a.json", MOST) == b"22"


def test_a_lock_may_be_taken_again_by_its_holder(location):
    with location.lock(), location.lock():
        location.create("x", b"1")
    with location.lock():
        assert location.get("x", MOST) == b"1"


def test_a_location_survives_pickling(location):
    location.put("x", b"1")
    assert pickle.loads(pickle.dumps(location)).get("x", MOST) == b"1"


def test_names_are_created_without_hard_links_where_there_are_none(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    assert files_module.create_whole(tmp_path / "x", b"1")
    assert not files_module.create_whole(tmp_path / "x", b"2")
    assert (tmp_path / "x").read_bytes() == b"1"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


class Counting(LocalLocation):
    """Counts what is done with objects, by kind."""

    def __init__(self, root):
        super().__init__(root)
        self.counts = {}

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name in ("put", "get", "replace", "tag", "size", "delete", "names", "sweep", "map", "get_tagged"):
            self.counts[name] = self.counts.get(name, 0) + 1
        return found


def test_a_view_more_takes_the_same_operations_however_many_there_are(tmp_path):
    counts = []
    for views in (1, 12):
        path, rows = tmp_path / f"{views}.zarr", RowStore(views=views)
        write_rows(path, rows)
        location = Counting(path)
        write_rows(location, replace(rows, views=views + 2))
        counts.append(location.counts)
        assert verify(path).problems == ()
    assert counts[0] == counts[1]


def test_opening_a_store_reads_the_lists_of_the_views_in_use(tmp_path):
    rows = write_rows(tmp_path / "s.zarr", RowStore(views=6))
    location = Counting(tmp_path / "s.zarr")
    reader = StoreReader(location)
    assert location.counts == {"get_tagged": 1, "get": 1}
    location.counts.clear()
    found = reader.components("logits", 4, np.arange(50))["values"]
    assert np.array_equal(found, rows.stored("logits", 4))
    assert location.counts["get"] == 1


def test_writers_of_one_manifest_lose_nothing_without_locks(tmp_path, monkeypatch):
    """As on an object store, where `lock` keeps nobody out: only tags do."""
    rows, path = RowStore(views=2), tmp_path / "s.zarr"
    with StoreWriter(path, rows.plan()) as first:
        second = StoreWriter(path, rows.plan())
        second.manifest = second.planned()
        for block in first.pending():
            rows.write_block(first, block)
        put = type(first)._put_manifest

        def overtaken(writer, manifest):
            if writer is first and not second.manifest.committed:
                with monkeypatch.context() as patch:
                    patch.setattr(type(first), "_put_manifest", put)
                    patch.setattr(second.location, "lock", first.location.lock)
                    second.commit()
            return put(writer, manifest)

        monkeypatch.setattr(type(first), "_put_manifest", overtaken)
        first.commit()
    assert StoreReader(path).views == (0, 1)
    assert verify(path).problems == ()
    write_rows(tmp_path / "once.zarr", rows)
    assert store_files(path) == store_files(tmp_path / "once.zarr")
