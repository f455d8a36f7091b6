"""How rows are cut into blocks, shards and chunks: divisibility, padding, keys, metadata."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coursepack.data.encodings import Component
from coursepack.data.store.layout import (
    BLOCK_ROWS,
    CHUNK_BYTES,
    SHARD_BYTES,
    ArrayLayout,
    block_count,
    layout_from_dict,
    plan_array,
    plan_block_rows,
    plan_table,
    shard_key,
    table_key,
)
from coursepack.data.store.owners import Part
from coursepack.data.store.shards import checksum_bytes, chunk_offsets, shard_pieces
from coursepack.errors import StoreDamaged

COMPONENTS = [Component("float16", (10,)), Component("float16", (100,)), Component("float16", (1000,))]
COMPONENTS += [Component("float32", (64, 7, 7)), Component("uint8", ()), Component("float32", (21841,))]
components = st.lists(st.sampled_from(COMPONENTS), min_size=1, max_size=3)


def padding(rows, layout):
    """Rows of padding in one view: those of its last chunk."""
    return -rows % layout.chunk_rows


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 2_000_000), components)
def test_chunks_divide_shards_divide_blocks(rows, parts):
    block_rows = plan_block_rows(rows, [part.row_bytes for part in parts])
    # Evenness may round a block up by a chunk's worth of rows, never more.
    assert 1 <= block_rows <= 1.1 * BLOCK_ROWS
    for part in parts:
        layout = plan_array(part, block_rows)
        assert block_rows % layout.shard_rows == 0
        assert layout.shard_rows % layout.chunk_rows == 0
        assert layout.row_bytes == part.row_bytes
        assert layout.shard_count(rows) * layout.shard_rows >= rows
        assert layout.shard_rows * layout.row_bytes <= 1.1 * SHARD_BYTES


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 70_000), st.sampled_from(COMPONENTS))
def test_any_block_rows_can_be_cut(block_rows, part):
    layout = plan_array(part, block_rows)
    assert block_rows % layout.shard_rows == 0
    assert layout.shard_rows % layout.chunk_rows == 0


@pytest.mark.parametrize("classes", [100, 1000])
@pytest.mark.parametrize("rows", [50_000, 1_281_167])
def test_padding_of_the_sizes_we_are_made_for(rows, classes):
    part = Component("float16", (classes,))
    block_rows = plan_block_rows(rows, [part.row_bytes])
    layout = plan_array(part, block_rows)
    assert padding(rows, layout) <= 0.001 * rows
    assert block_rows <= BLOCK_ROWS * 1.001
    assert CHUNK_BYTES / 4 <= layout.chunk_rows * part.row_bytes <= 2 * CHUNK_BYTES
    assert layout.shard_rows * part.row_bytes >= min(8 << 20, rows * part.row_bytes)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("rows", [1442, 355])
def test_digits_are_one_block_without_padding(rows, dtype):
    part = Component(dtype, (10,))
    block_rows = plan_block_rows(rows, [part.row_bytes])
    assert (block_count(rows, block_rows), padding(rows, plan_array(part, block_rows))) == (1, 0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3_000_000))
def test_labels_are_one_shard_with_little_padding(rows):
    layout = plan_table(rows, "int64", ())
    assert layout.shard_count(rows) == 1
    assert layout.shard_rows % layout.chunk_rows == 0
    assert padding(rows, layout) <= 0.001 * rows


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30_000), st.sampled_from([(), (1,), (512,), (21841,)]))
def test_tables_are_one_shard_of_small_chunks(rows, row_shape):
    layout = plan_table(rows, "float32", row_shape)
    assert (layout.dtype, layout.row_shape) == ("float32", row_shape)
    assert layout.shard_count(rows) == 1
    assert layout.shard_rows % layout.chunk_rows == 0
    assert layout.chunk_rows == 1 or layout.chunk_rows * layout.row_bytes <= 2 * CHUNK_BYTES


@pytest.mark.parametrize("layout", [ArrayLayout("float16", (3, 4), 64, 8), ArrayLayout("int64", (), 5, 5)])
def test_layout_survives_its_description(layout):
    assert layout_from_dict(layout.to_dict()) == layout


def test_keys_have_one_place_per_axis():
    layout = ArrayLayout("float16", (3, 4), 64, 8)
    assert shard_key("features/stem/values", 2, 11, layout) == "features/stem/values/c.2.11.0.0"
    assert table_key("static/head_weight", layout) == "static/head_weight/c.0.0.0"
    assert table_key("labels", ArrayLayout("int64", (), 5, 5)) == "labels/c.0"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.data())
def test_offsets_lead_to_the_rows(chunk_rows, chunks, width, data):
    layout = ArrayLayout("float32", (width,), chunk_rows * chunks, chunk_rows)
    count = data.draw(st.integers(1, layout.shard_rows))
    rows = np.arange(count * width, dtype=np.float32).reshape(count, width)
    file = np.frombuffer(b"".join(shard_pieces(rows, layout)), dtype=np.uint8)
    offsets = chunk_offsets(file, count, layout, "c.0.0")
    assert len(offsets) == -(-count // chunk_rows)
    index = file[-16 * chunks - 4 : -4].view("<u8").reshape(chunks, 2)
    assert (index[len(offsets) :] == 2**64 - 1).all()
    found = [file[offset : offset + chunk_rows * layout.row_bytes] for offset in offsets]
    table = np.concatenate(found).view(np.float32).reshape(-1, width)
    assert np.array_equal(table[:count], rows)
    assert np.isnan(table[count:]).all()


def forged(layout, index):
    """A shard of two chunks with a forged index under a right checksum."""
    body = b"".join(shard_pieces(np.zeros((4, 2), np.float32), layout))[: -16 * 2 - 4]
    footer = np.array(index, dtype="<u8").tobytes()
    return np.frombuffer(body + footer + checksum_bytes(footer), dtype=np.uint8)


CHUNK = 2 * 2 * 4 + 4
HOSTILE = {
    "beyond the end": [[0, CHUNK], [2 * CHUNK, CHUNK]],
    "one byte too far": [[0, CHUNK], [CHUNK + 1, CHUNK]],
    "negative": [[0, CHUNK], [2**64 - 4, CHUNK]],
    "absent": [[0, CHUNK], [2**64 - 1, 2**64 - 1]],
    "huge": [[2**63, CHUNK], [0, CHUNK]],
    "too long": [[0, CHUNK], [0, 2 * CHUNK]],
    "too short": [[0, 0], [CHUNK, CHUNK]],
}


@pytest.mark.parametrize("index", HOSTILE.values(), ids=HOSTILE)
def test_hostile_index_is_refused(index):
    layout = ArrayLayout("float32", (2,), 4, 2)
    assert chunk_offsets(forged(layout, [[0, CHUNK], [CHUNK, CHUNK]]), 4, layout, "x").tolist() == [0, CHUNK]
    with pytest.raises(
        StoreDamaged, match=r"the index of 'logits/c\.0\.0' points outside its chunks of 20 bytes"
    ):
        chunk_offsets(forged(layout, index), 4, layout, "logits/c.0.0")


@pytest.mark.parametrize("length", [0, 3, 35])
def test_file_shorter_than_its_index_is_refused(length):
    layout = ArrayLayout("float32", (2,), 4, 2)
    with pytest.raises(StoreDamaged, match="too few for its index of 2 chunks"):
        chunk_offsets(np.zeros(length, np.uint8), 4, layout, "x")


def test_damaged_index_is_refused():
    layout = ArrayLayout("float32", (2,), 4, 2)
    sound = forged(layout, [[0, CHUNK], [CHUNK, CHUNK]])
    for place in range(len(sound) - 36, len(sound)):
        file = sound.copy()
        file[place] ^= 1
        with pytest.raises(StoreDamaged, match="the index of 'x' does not match its checksum"):
            chunk_offsets(file, 4, layout, "x")


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_parts_overlap_exactly_when_some_block_is_of_both(left, right, data):
    one = Part(data.draw(st.integers(0, left - 1)), left)
    two = Part(data.draw(st.integers(0, right - 1)), right)
    shared = any(one.owns(block) and two.owns(block) for block in range(left * right))
    assert one.overlaps(two) == two.overlaps(one) == shared


@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_divide_the_blocks(count):
    owners = [[Part(index, count).owns(block) for index in range(count)] for block in range(30)]
    assert all(sum(owned) == 1 for owned in owners)
