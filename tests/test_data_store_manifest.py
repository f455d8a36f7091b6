"""The manifest and the Zarr metadata beside it: damage is refused, tampering is reported."""

from __future__ import annotations

import os
import tracemalloc

import numpy as np
import pytest
from helpers import RowStore, rewrite_manifest, store_files, write_rows

from coursepack.data.store import StoreReader, load_manifest, sampling, verify
from coursepack.errors import StoreDamaged, StoreMismatch

ROWS = RowStore(views=3, shapes={"logits": (10,), "features/stem": (2, 3)})


@pytest.fixture
def store(tmp_path):
    """A store that a test may damage."""
    write_rows(tmp_path / "s.zarr", ROWS)
    return tmp_path / "s.zarr"


def lines(store):
    return [str(problem) for problem in verify(store).problems]


def test_any_flipped_bit_of_the_manifest_is_refused(store):
    manifest = store / "manifest.json"
    content = manifest.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(content), 150):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        if bytes(damaged).split() == content.split():
            continue
        manifest.write_bytes(damaged)
        with pytest.raises((StoreDamaged, StoreMismatch)):
            StoreReader(store)


FOREIGN = {
    "not JSON": (b"{", StoreDamaged, "cannot be understood"),
    "empty": (b"", StoreDamaged, "cannot be understood"),
    "not text": (b"\xff\xfe\xfa", StoreDamaged, "cannot be understood"),
    "a list": (b"[1]", StoreDamaged, "cannot be understood"),
    "another's": (b'{"format": "cookbook"}', StoreDamaged, "is not the manifest of a coursepack store"),
    "next version": (
        b'{"format": "coursepack store", "format_version": 3}',
        StoreMismatch,
        "has format version 3, this release reads 1 and 2. Install a newer coursepack.",
    ),
    "not UTF-8": (
        b'{"a": "\xff"}' + b" " * 100_000,
        StoreDamaged,
        r"byte 7 is not UTF-8\)'\)\. Put a copy of it back",
    ),
    "odd version": (
        b'{"format": "coursepack store", "format_version": "\\u001b[31m"}',
        StoreMismatch,
        r"has format version '\\x1b\[31m', this release",
    ),
    "bare": (b'{"format": "coursepack store", "format_version": 1}', StoreDamaged, "its own checksum"),
}


@pytest.mark.parametrize(("content", "error", "text"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_manifest(store, content, error, text):
    (store / "manifest.json").write_bytes(content)
    with pytest.raises(error, match=text) as refusal:
        StoreReader(store)
    assert len(str(refusal.value)) < 1000


def test_a_manifest_that_is_too_long_is_refused_unread(store):
    os.truncate(store / "manifest.json", 100 << 20)
    tracemalloc.start()
    with pytest.raises(
        StoreDamaged, match=r"has 104,857,600 bytes, expected at most 33,554,432\. Put a copy"
    ):
        StoreReader(store)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


RECORDS = {
    "text": {"rows": 50, "correct": "many"},
    "no rows": {"rows": 0, "correct": 0},
    "list": [1, 2],
    "bool": {"rows": True},
}


@pytest.mark.parametrize("sums", RECORDS.values(), ids=RECORDS)
def test_sums_that_are_none_are_refused(store, sums):
    rewrite_manifest(store, lambda values: values["view_records"]["0"].update(sums=sums))
    reader = StoreReader(store)
    with pytest.raises(StoreDamaged, match=r"the list of a view .* is no (number|object)|has 0 rows"):
        reader.components("logits", 0, np.arange(3))
    assert len(reader.components("logits", 1, np.arange(3))["values"]) == 3


@pytest.mark.parametrize("key", ["samples", "arrays", "committed", "tables", "files"])
def test_manifest_that_lacks_something(store, key):
    rewrite_manifest(store, lambda values: values.pop(key))
    with pytest.raises(StoreDamaged, match=f"cannot be understood: .*{key}"):
        StoreReader(store)


def test_every_tampered_zarr_metadata_is_reported(store):
    keys = sorted(key for key in store_files(store) if key.endswith("zarr.json"))
    assert len(keys) == 7
    for key in keys:
        content = (store / key).read_text()
        for damaged in (
            "{",
            "[" * 100_000,
            content.replace('"zarr_format"', '"format"'),
            content.replace("group", "array"),
        ):
            if damaged != content:
                (store / key).write_text(damaged)
                assert [problem.key for problem in verify(store).problems] == [key]
                assert all(len(line) < 200 for line in lines(store))
        (store / key).unlink()
        assert lines(store) == [f"{key}: missing or not JSON"]
        (store / key).write_text(content)
    assert verify(store).problems == ()


def test_verify_counts_and_notices_other_labels(store):
    sizes = []
    report = verify(store, on_file=sizes.append)
    assert (report.files, report.size) == (25, sum(sizes))
    assert report.size == sum((store / key).stat().st_size for key in load_manifest(store).files)
    labels = (store / "labels/c.0").read_bytes()
    (store / "labels/c.0").write_bytes(b"short")
    assert lines(store) == [f"labels/c.0: 5 bytes, expected {len(labels)}"]
    (store / "labels/c.0").write_bytes(labels)
    assert lines(store) == []


def test_verify_reads_a_chunk_of_every_array_through_zarr(store, monkeypatch):
    read, opened = sampling.read_rows, []

    def note(root, array, view, start, stop):
        rows = read(root, array, view, start, stop)
        opened.append((array, view, start, stop))
        return rows

    monkeypatch.setattr(sampling, "read_rows", note)
    for _ in range(20):
        assert verify(store).problems == ()
    assert {array for array, *_ in opened} == {"labels", "logits/values", "features/stem/values"}
    assert len({view for array, view, *_ in opened if array == "logits/values"}) > 1
    assert len({(start, stop) for array, _, start, stop in opened if array == "logits/values"}) > 1


def test_an_array_that_zarr_reads_otherwise_is_reported(store, monkeypatch):
    read = sampling.read_rows
    monkeypatch.setattr(sampling, "read_rows", lambda *place: read(*place) + 1)
    arrays = ["features/stem/values", "labels", "logits/values"]
    assert sorted(line.partition(":")[0] for line in lines(store)) == [f"{name}/zarr.json" for name in arrays]
    assert "zarr reads other values in rows" in lines(store)[0]

    def refuse(*_):
        raise KeyError("no such codec")

    monkeypatch.setattr(sampling, "read_rows", refuse)
    assert lines(store)[0] == "labels/zarr.json: zarr cannot read the array: KeyError: 'no such codec'"
