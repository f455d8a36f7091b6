"""Shards of several chunks, as wide rows have them: written, read, damaged, mended and resumed."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from helpers import file_identities, make_job, random_source, store_files

from coursepack.data.sources import SOURCES, SourceKind
from coursepack.data.store import StoreReader, load_manifest, verify
from coursepack.data.store.layout import ArrayLayout
from coursepack.errors import StoreDamaged
from coursepack.models import parse_tap
from coursepack.precompute import run_job
from coursepack.precompute.cli import main

SAMPLES, BLOCK = 150, 64
"""Three blocks, the last of them short, and its last chunk as well."""
LAYOUTS = {
    "logits/q": ArrayLayout("uint8", (10,), 16, 4),
    "logits/affine": ArrayLayout("float16", (2,), 32, 8),
    "features/hidden1/values": ArrayLayout("float16", (256,), 16, 2),
}
"""Shards of two to eight chunks, two to four of them in a block."""
OPTIONS = {"views": 2, "encoding": "int8", "block_rows": BLOCK, "batch_size": 25}


@pytest.fixture(scope="module", autouse=True)
def small_pieces():
    """Cut what is planned as `LAYOUTS` says, and know the source by name."""
    cuts = {(layout.dtype, layout.row_shape): layout for layout in LAYOUTS.values()}

    def cut(component, block_rows):
        assert block_rows == BLOCK
        return cuts[component.dtype, component.row_shape]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coursepack.data.store.planning.plan_array", cut)
        kind = SourceKind(lambda *_: random_source(SAMPLES), splits=("train",), evaluation_split="train")
        patch.setitem(SOURCES, "random", kind)
        yield


def job(path, teacher, **fields):
    options = {"source": random_source(SAMPLES), "taps": [parse_tap("hidden1")], **OPTIONS, **fields}
    return make_job(path, teacher, **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory, teacher):
    """The store, written in one go; tests only read it."""
    path = tmp_path_factory.mktemp("written") / "s.zarr"
    run_job(job(path, teacher))
    return path


@pytest.fixture
def command():
    """Run `precompute verify` in this process."""
    return lambda *words: CliRunner().invoke(main, ["verify", *map(str, words), "--device=cpu"])


def chunk_of(path, array, place, chunk):
    """A shard file, and the first byte of one of its chunks."""
    layout = LAYOUTS[array]
    return path / array / place, chunk * (layout.chunk_rows * layout.row_bytes + 4)


def flip(path, array, place, chunk):
    """Change one bit in the middle of a chunk."""
    file, start = chunk_of(path, array, place, chunk)
    content = bytearray(file.read_bytes())
    content[start + LAYOUTS[array].row_bytes] ^= 4
    file.write_bytes(content)


def test_shards_hold_several_chunks(written):
    manifest = load_manifest(written)
    found = {
        f"{name}/{component}": layout
        for name, array in manifest.arrays.items()
        for component, layout in array.components.items()
    }
    assert found == LAYOUTS
    for array, layout in LAYOUTS.items():
        files = sorted((written / array).glob("c.0.*"))
        assert len(files) == layout.shard_count(SAMPLES) > 3
        full, last = (files[0].stat().st_size, min(file.stat().st_size for file in files))
        chunk = layout.chunk_rows * layout.row_bytes + 4
        index = 16 * (layout.shard_rows // layout.chunk_rows) + 4
        assert full == layout.shard_rows // layout.chunk_rows * chunk + index
        assert last == -(-(SAMPLES % layout.shard_rows) // layout.chunk_rows) * chunk + index


@pytest.mark.parametrize("reading", ["resident", "mapped", "windowed"])
def test_they_read_as_zarr_reads_them(written, reading):
    group, reader = zarr.open_group(written, mode="r"), StoreReader(written, reading)
    order = np.random.default_rng(0).permutation(SAMPLES)
    for name, array in reader.manifest.arrays.items():
        for component in array.components:
            stored = group[name][component]
            assert stored.shape[:2] == (2, SAMPLES)
            for view in (0, 1):
                expected = stored[view][order]
                found = reader.components(name, view, order)[component]
                assert found.tobytes() == expected.tobytes()
                assert len(np.unique(found, axis=0)) > 0.9 * SAMPLES, "rows differ from each other"


@pytest.mark.parametrize(
    ("array", "place", "chunk"),
    [
        ("logits/q", "c.1.2.0", 3),
        ("logits/affine", "c.0.4.0", 2),
        ("features/hidden1/values", "c.1.9.0", 0),
    ],
)
def test_one_damaged_chunk_is_found_and_only_its_file_is_written_again(store, command, array, place, chunk):
    before, kept = store_files(store), file_identities(store)
    flip(store, array, place, chunk)
    key, view = f"{array}/{place}", int(place[2])
    assert [str(problem) for problem in verify(store).problems] == [
        f"{key}: content does not match its checksum"
    ]
    layout, name = LAYOUTS[array], array.rpartition("/")[0]
    first = int(place.split(".")[2]) * layout.shard_rows + chunk * layout.chunk_rows
    inside = np.arange(first, min(first + layout.chunk_rows, SAMPLES))
    outside = np.setdiff1d(np.arange(SAMPLES), inside)
    with pytest.raises(StoreDamaged, match=r"does not match its checksum"):
        StoreReader(store).components(name, view, outside)
    # Chunks that are looked at one by one are served for as long as they are sound.
    windowed = StoreReader(store, "windowed")
    sound = StoreReader(store).components(name, 1 - view, outside)
    assert windowed.components(name, 1 - view, outside).keys() == sound.keys()
    windowed.components(name, view, outside)
    with pytest.raises(StoreDamaged, match=r"chunk \d+ of .* does not match its checksum"):
        windowed.components(name, view, inside[:1])
    result = command("--store", store, "--repair")
    assert result.exit_code == 0, result.output
    assert f"{key}: content does not match its checksum: written again" in result.stderr
    assert store_files(store) == before
    after = file_identities(store)
    assert {place for place in kept if kept[place] != after[place]} == {key}


def test_a_run_that_stopped_goes_on_to_the_same_bytes(tmp_path, teacher, written):
    path = tmp_path / "s.zarr"
    run_job(job(path, teacher), block_order=iter([4, 0]))
    shutil.copytree(path, tmp_path / "before")
    # Of a block that was not finished, some shards are there, whole or not.
    (path / "logits/q/c.0.5.0").write_bytes(b"half")
    shutil.copy(written / "features/hidden1/values/c.0.4.0", path / "features/hidden1/values/c.0.4.0")
    kept = {place: file for place, file in file_identities(path).items() if place.startswith("logits/affine")}
    run_job(job(path, teacher))
    assert store_files(path) == store_files(written)
    assert kept.items() <= file_identities(path).items()
    assert verify(path).problems == ()
