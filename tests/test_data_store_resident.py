"""Views in memory: files are read in pieces, and each is verified before the next is read."""

from __future__ import annotations

import numpy as np
import pytest
from encoded_rows import encoded_as
from helpers import write_rows

from coursepack.data.store import StoreReader, shards
from coursepack.data.store.locations import resident
from coursepack.data.store.locations.local import LocalLocation
from coursepack.errors import StoreDamaged

PIECE, SAMPLES = 200, 83
ROWS = encoded_as("float32", samples=SAMPLES, block_rows=40)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(resident, "PIECE_BYTES", PIECE)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store with shards of several pieces, and pieces of more than one chunk."""
    monkeypatch.setattr("coursepack.data.store.layout.SHARD_BYTES", 1600)
    monkeypatch.setattr("coursepack.data.store.layout.CHUNK_BYTES", 80)
    write_rows(tmp_path / "s.zarr", ROWS)
    layout = StoreReader(tmp_path / "s.zarr").manifest.arrays["logits"].components["values"]
    step = layout.chunk_rows * layout.row_bytes + 4
    assert 2 * step <= PIECE < 4 * PIECE < (tmp_path / "s.zarr/logits/values/c.0.0.0").stat().st_size
    return tmp_path / "s.zarr"


class Pieces:
    """A `PieceCheck` that records the pieces with the bytes that they have when they are checked."""

    def __init__(self, step):
        self.step, self.found = step, []

    def check(self, content, start, stop):
        self.found.append((start, bytes(content[start:stop])))


@pytest.mark.parametrize("step", [1, 48, PIECE, 300])
@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 1000, 1003])
def test_pieces_of_a_file_are_checked_once_they_are_read(tmp_path, size, step):
    content = np.random.default_rng(0).bytes(size)
    (tmp_path / "x").write_bytes(content)
    pieces = Pieces(step)
    assert bytes(LocalLocation(tmp_path).map("x", resident=True, check=pieces).content) == content
    assert b"".join(piece for _, piece in pieces.found) == content
    assert step > PIECE or len(pieces.found) >= size // PIECE
    assert all(start % step == 0 for start, _ in pieces.found)


def test_a_file_that_gets_shorter_during_the_read_gives_what_is_left(tmp_path):
    (tmp_path / "x").write_bytes(bytes(1000))
    with (tmp_path / "x").open("rb") as file:
        assert len(resident.read_whole(file, 2000, Pieces(8))) == 1000


def test_every_chunk_is_verified_once(store, monkeypatch):
    verified = []
    checksum_bytes = shards.checksum_bytes

    def recorded(data):
        verified.append(len(data))
        return checksum_bytes(data)

    monkeypatch.setattr(shards, "checksum_bytes", recorded)
    reader = StoreReader(store, "resident")
    layout = reader.manifest.arrays["logits"].components["values"]
    found = reader.components("logits", 0, np.arange(SAMPLES))["values"]
    assert np.array_equal(found, ROWS.stored("logits", 0))
    assert verified.count(layout.chunk_rows * layout.row_bytes) == -(-SAMPLES // layout.chunk_rows)


def test_a_flipped_bit_anywhere_in_a_shard_is_found(store):
    file = store / "logits/values/c.0.0.0"
    content = file.read_bytes()
    for place in range(0, len(content), 23):
        damaged = bytearray(content)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(StoreDamaged, match=r"content of .*c\.0\.0\.0' does not match its checksum"):
            StoreReader(store, "resident").components("logits", 0, np.array([0]))
    file.write_bytes(content)
    StoreReader(store, "resident").components("logits", 0, np.array([0]))
