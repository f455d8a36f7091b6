"""What does not grow with the views of a store: requests of a start and of a commit, lists in memory."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from helpers import RowStore, write_rows

from coursepack.data.store import StoreReader, StoreWriter, load_manifest, verify
from coursepack.data.store.contents import MAX_KEPT, ViewEntry
from coursepack.data.store.locations.local import LocalLocation

ROWS = RowStore(samples=40, block_rows=8)
FEW, MANY = 2, 24


@pytest.fixture
def requests(monkeypatch):
    """Number of calls of a location, by method."""
    calls = Counter()
    for name in ("get", "get_tagged", "tag", "size", "put", "create", "delete", "names"):
        method = getattr(LocalLocation, name)

        def counted(self, *arguments, name=name, method=method):
            calls[name] += 1
            return method(self, *arguments)

        monkeypatch.setattr(LocalLocation, name, counted)
    return calls


def begun(tmp_path, views):
    """A writer of a store of which one view is finished and a block of another."""
    rows = replace(ROWS, views=views)
    writer = StoreWriter(tmp_path / f"{views}.zarr", rows.plan())
    with writer:
        for block in writer.pending():
            rows.write_block(writer, block)
            writer.commit()
            if block.view == 1:
                break
    return rows, writer


def test_what_is_left_is_found_without_requests_for_every_block(tmp_path, requests):
    counts = []
    for views in (FEW, MANY):
        rows, writer = begun(tmp_path, views)
        requests.clear()
        left = writer.blocks_left()
        assert [(block.view, block.index) for block in left] == [
            (view, index) for view in range(views) for index in range(5) if (view, index) > (1, 0)
        ]
        assert writer.done_rows() == 48
        counts.append(requests.copy())
        again = StoreWriter(tmp_path / f"{views}.zarr", rows.plan())
        assert list(map(vars, again.blocks_left())) == list(map(vars, left))
        with again:
            assert list(again.pending()) == left
    assert counts[0] == counts[1]


def test_a_commit_makes_as_many_requests_on_many_views(tmp_path, requests):
    rows = replace(ROWS, views=MANY)
    counts = []
    with StoreWriter(tmp_path / "s.zarr", rows.plan()) as writer:
        for block in writer.pending():
            rows.write_block(writer, block)
            if writer.is_complete(block.view):
                requests.clear()
                writer.commit()
                counts.append(requests.copy())
    assert len(counts) == MANY
    assert counts[1] == counts[-1]
    assert counts[0]["get"] == 5, "each done-object is read once"


def test_done_objects_of_a_view_in_work_are_not_read_when_another_is_committed(tmp_path, requests):
    with StoreWriter(tmp_path / "s.zarr", ROWS.plan()) as writer:
        for number, block in enumerate(writer.pending(iter([5, 6, 0, 1, 2, 3, 4]))):
            ROWS.write_block(writer, block)
            if number == 6:
                requests.clear()
                writer.commit()
    assert requests["get"] == 5 + 2, "the five of the view, and two to be swept"
    assert load_manifest(tmp_path / "s.zarr").committed_views() == (0,)


def alive():
    gc.collect()
    return sum(type(each) is ViewEntry for each in gc.get_objects())


def test_few_lists_are_in_memory_whatever_the_views(tmp_path):
    before, path = alive(), tmp_path / "s.zarr"
    rows = replace(ROWS, views=MANY)
    with StoreWriter(path, rows.plan()) as writer:
        for block in writer.pending():
            rows.write_block(writer, block)
            if writer.is_complete(block.view):
                writer.commit()
        assert len(writer.manifest.files) == 5 * MANY + 1
        assert alive() - before <= 1 + MAX_KEPT
    del writer
    reader = StoreReader(path)
    for _ in range(2):
        for view in range(MANY):
            found = reader.components("logits", view, np.arange(40))["values"]
            assert np.array_equal(found, rows.stored("logits", view))
    assert alive() - before <= MAX_KEPT
    assert verify(path).problems == ()
    write_rows(path, replace(rows, views=MANY + 1, shapes={"logits": (10,), "features/stem": (3,)}))
    assert verify(path).problems == ()
