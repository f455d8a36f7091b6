"""Manifests made to harm, with the right checksum: refused, or read correctly; never a crash or a feast."""

from __future__ import annotations

import copy
import json
import resource
import shutil

import numpy as np
import pytest
from encoded_rows import EncodedRows
from helpers import rewrite_manifest, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spawned import run

from coursepack.canonical import canonical_json, fingerprint
from coursepack.data.store import StoreReader, load_manifest, verify
from coursepack.data.store.opening import parse_manifest
from coursepack.errors import StoreDamaged, StoreIncomplete, StoreMismatch

SHAPES = {"logits": (10,), "features/a": (3, 7), "features/b@sign": (9,)}
CODES = {"logits": "topk16:3", "features/a": "int8", "features/b@sign": "bits"}
ROWS = EncodedRows(
    shapes=SHAPES, encodings=CODES, static={"head_weight": np.ones((10, 4), np.float32)}, format_version=1
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "sound.zarr"
    write_rows(path, ROWS)
    return path


def read_everything(path, reading):
    """All that a reader can be asked for."""
    reader = StoreReader(path, reading)
    found = {name: reader.table(name) for name in reader.manifest.tables}
    samples = np.arange(min(reader.manifest.samples, 10_000))
    for name in reader.manifest.arrays:
        for view in reader.manifest.committed.get(name, ()):
            for part, rows in reader.components(name, view, samples).items():
                found[f"{name} {view} {part}"] = rows
    return found


def assert_right(found, names=None):
    """What was read, if anything, is what was written (of fewer samples perhaps)."""
    for place, rows in found.items():
        if " " in place:
            name, view, part = place.rsplit(" ", 2)
            if name not in SHAPES:
                continue
            expected = ROWS.parts(name, int(view))[part]
        elif place == "labels":
            expected = ROWS.labels
        else:
            expected = ROWS.static["head_weight"]
        assert rows.tobytes() == expected[: len(rows)].tobytes(), place


def put(*path, value):
    """A change that sets one place of the JSON tree."""

    def change(values):
        for step in path[:-1]:
            values = values[step]
        values[path[-1]] = value

    return change


def renamed(values, kind, old, new):
    values[kind][new] = values[kind].pop(old)
    for key in [key for key in values["files"] if key.startswith(f"{old}/")]:
        values["files"][new + key.removeprefix(old)] = values["files"].pop(key)
    if old in values["committed"]:
        values["committed"][new] = values["committed"].pop(old)


def huge(values):
    values["samples"] = values["tables"]["labels"]["rows"] = 1 << 40
    values["tables"]["labels"]["layout"].update(shard_rows=1 << 40, chunk_rows=1 << 40)


def huge_and_consistent(values):
    """2**40 samples in one block, with the sizes that follow: only the disk knows better."""
    rows, views = 1 << 40, values["views"]
    huge(values)
    values["block_rows"] = rows
    values["files"] = {"labels/c.0": [rows * 8 + 4 + 20, 0], "static/head_weight/c.0.0": values["files"][
        "static/head_weight/c.0.0"]}  # fmt: skip
    for record in values["view_records"].values():
        del record["draws"][1:]
    for name, array in values["arrays"].items():
        for part, layout in array["components"].items():
            layout.update(shard_rows=rows, chunk_rows=rows)
            width = int(np.dtype(layout["dtype"]).itemsize * np.prod(layout["row_shape"]))
            for view in range(views):
                key = f"{name}/{part}/c.{view}.0" + ".0" * len(layout["row_shape"])
                values["files"][key] = [rows * width + 4 + 20, 0]


LAYOUT = ("arrays", "logits", "components", "ids")
CHANGES = {
    "samples 0": put("samples", value=0),
    "samples negative": put("samples", value=-50),
    "samples huge": put("samples", value=1 << 40),
    "samples enormous": put("samples", value=10**400),
    "samples text": put("samples", value="50"),
    "samples float": put("samples", value=50.0),
    "samples bool": put("samples", value=True),
    "one sample more": put("samples", value=51),
    "huge": huge,
    "huge and consistent": huge_and_consistent,
    "chunk rows 0": put(*LAYOUT, "chunk_rows", value=0),
    "chunk rows negative": put(*LAYOUT, "chunk_rows", value=-4),
    "chunk rows not dividing": put(*LAYOUT, "chunk_rows", value=5),
    "chunk rows small": put(*LAYOUT, "chunk_rows", value=1),
    "shard rows 0": put(*LAYOUT, "shard_rows", value=0),
    "shard rows not dividing": put(*LAYOUT, "shard_rows", value=24),
    "shard rows smaller": put(*LAYOUT, "shard_rows", value=8),
    "block rows 0": put("block_rows", value=0),
    "block rows other": put("block_rows", value=17),
    "block rows doubled": put("block_rows", value=32),
    "row shape empty": put("arrays", "logits", "row_shape", value=[]),
    "row shape wide": put("arrays", "logits", "row_shape", value=[1 << 20]),
    "row shape overflow": put(*LAYOUT, "row_shape", value=[1 << 32, 1 << 32]),
    "row shape zero": put(*LAYOUT, "row_shape", value=[0]),
    "row shape negative": put(*LAYOUT, "row_shape", value=[-3]),
    "dtype object": put(*LAYOUT, "dtype", value="O"),
    "dtype wide": put(*LAYOUT, "dtype", value="V1000000000"),
    "dtype structured": put(*LAYOUT, "dtype", value="i4,f8"),
    "dtype other": put(*LAYOUT, "dtype", value="uint32"),
    "labels float": put("tables", "labels", "layout", "dtype", value="float32"),
    "labels rows": put("tables", "labels", "rows", value=49),
    "table rows": put("tables", "static/head_weight", "rows", value=1 << 30),
    "encoding unknown": put("arrays", "logits", "encoding", value={"name": "zip"}),
    "encoding other": put("arrays", "logits", "encoding", value={"name": "float32"}),
    "encoding none": put("arrays", "logits", "encoding", value=None),
    "encoding exact": put("arrays", "features/a", "encoding", value={"name": "int8", "exact": True}),
    "k huge": put("arrays", "logits", "encoding", "k", value=1 << 60),
    "k text": put("arrays", "logits", "encoding", "k", value="3"),
    "k larger": put("arrays", "logits", "encoding", "k", value=4),
    "committed huge": put("committed", "logits", value=[0, 1 << 40]),
    "committed negative": put("committed", "logits", value=[-1]),
    "committed twice": put("committed", "logits", value=[0, 0]),
    "committed text": put("committed", "logits", value="01"),
    "committed unknown": put("committed", "features/zz", value=[0]),
    "committed more": put("committed", "logits", value=[0, 1, 2]),
    "no logits": lambda values: values["arrays"].pop("logits"),
    "file outside": lambda values: values["files"].update({"../../etc/passwd": [5, 5]}),
    "file absolute": lambda values: values["files"].update({"/etc/passwd": [5, 5]}),
    "file of nothing": lambda values: values["files"].update({"logits/ids/c.9.0.0": [5, 5]}),
    "file unspelled": lambda values: values["files"].update({"logits/ids/c.00.0.0": [5, 5]}),
    "size negative": lambda values: values["files"].update({"labels/c.0": [-1, 5]}),
    "size huge": lambda values: values["files"].update({"labels/c.0": [1 << 45, 5]}),
    "size off by one": lambda values: values["files"]["labels/c.0"].__setitem__(
        0, values["files"]["labels/c.0"][0] + 1
    ),
    "crc huge": lambda values: values["files"]["labels/c.0"].__setitem__(1, 1 << 40),
    "file entry short": lambda values: values["files"].update({"labels/c.0": [5]}),
    "record missing": lambda values: values["view_records"].pop("0"),
    "record of no view": lambda values: values["view_records"].update({"-1": {}}),
    "draws too many": lambda values: values["view_records"]["0"]["draws"].append("00000000"),
    "identity list": put("identity", value=[]),
    "identity without view": put("identity", value={}),
    "arrays list": put("arrays", value=[]),
    "names number": put("class_names", value=10),
}


@pytest.mark.parametrize("reading", ["resident", "mapped", "windowed"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_is_refused(store, change, reading):
    rewrite_manifest(store, CHANGES[change])
    with pytest.raises((StoreDamaged, StoreMismatch)):
        read_everything(store, reading)
    if change == "huge and consistent":
        # Only the files' own sizes tell, at the read; nothing may be drawn or allocated by the number.
        assert load_manifest(store).samples == 1 << 40
        assert len(verify(store).problems) > 10
    else:
        with pytest.raises(StoreDamaged, match="cannot be understood"):
            load_manifest(store)


NAMES = ["../x", "../../etc/passwd", "/etc/passwd", "a/../../b", "a//b", "", ".", "..", "a/", "\n"]
NAMES += ["a\0b", "a\\..\\b", "\ud800", "x" * 300]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", ["under", "bare"])
@pytest.mark.parametrize(("kind", "old"), [("arrays", "features/a"), ("tables", "static/head_weight")])
def test_names_that_lead_elsewhere_are_refused(store, name, kind, old, prefix):
    start = old.partition("/")[0] + "/" if prefix == "under" else ""
    # A file waits where the name leads: it must not be opened.
    (store.parent / "x").mkdir()
    shutil.copytree(store / "features/a", store.parent / "x/a")
    rewrite_manifest(store, lambda values: renamed(values, kind, old, start + name))
    with pytest.raises((StoreDamaged, StoreMismatch)):
        load_manifest(store)


@pytest.mark.parametrize("part", ["../q", "/q", "q/../q", "..", "values"])
def test_names_of_components_are_those_of_the_encoding(store, part):
    def change(values):
        components = values["arrays"]["features/a"]["components"]
        components[part] = components.pop("q")

    rewrite_manifest(store, change)
    with pytest.raises(StoreDamaged, match="cannot be understood"):
        load_manifest(store)


def test_unusual_names_that_are_sound_pass(tmp_path):
    shapes = {"logits": (10,), "features/layer1.0.conv2+layer 2@gram4": (2,), "features/größe": ()}
    rows = write_rows(tmp_path / "s.zarr", EncodedRows(shapes=shapes))
    for name in shapes:
        found = StoreReader(tmp_path / "s.zarr").components(name, 1, np.arange(50))["values"]
        assert np.array_equal(found, rows.stored(name, 1))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"format":' * 50_000, '{"format": 1e999}', "1" * 10_000, "null"]
)
def test_texts_that_break_parsers_are_refused(text):
    with pytest.raises(StoreDamaged):
        parse_manifest(text, "here")


def places(tree, path=()):
    """Every place of a JSON tree."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


ODD = [None, True, False, 0, 1, -1, 2, 3, 49, 51, 1 << 31, 1 << 40, 1 << 63, 10**30, 0.5, 1e308]
ODD += ["", "x", "../x", "\0", "/etc/passwd", "float32", "O", [], [0], [[]], ["a"], [1 << 40]]
ODD += [{}, {"name": "float32"}, {"": 0}]


def mutate(values, data):
    """Set, remove, rename or exchange parts of the JSON tree, a few times."""
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([path for path in places(values) if path]))
        parent = values
        for step in path[:-1]:
            parent = parent[step]
        what = data.draw(st.sampled_from(["set", "remove", "rename", "nudge", "copy"]))
        old = parent[path[-1]]
        if what == "set":
            parent[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
        elif what == "remove":
            del parent[path[-1]]
        elif what == "rename" and isinstance(parent, dict):
            del parent[path[-1]]
            parent[
                data.draw(st.sampled_from(["../x", "/x", "a\0", "features/c", "logits", "labels", "5"]))
            ] = old
        elif what == "nudge" and type(old) is int:
            parent[path[-1]] = old + data.draw(st.sampled_from([-1, 1, 16, -16, old]))
        elif what == "copy":
            other = data.draw(st.sampled_from([path for path in places(values) if path]))
            found = values
            for step in other:
                found = found[step]
            parent[path[-1]] = copy.deepcopy(found)


@pytest.mark.parametrize("examples", [100, pytest.param(400, marks=pytest.mark.integration)])
def test_any_mutation_is_refused_or_read_correctly(written, examples):
    """The store's files are sound: whatever a changed manifest makes of them has to be right or refused."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def mutated(data):
        check_mutation(written, data)

    mutated()


def check_mutation(written, data):
    """Change a manifest somewhere, and read what it makes of the store's files."""
    values = json.loads((written / "manifest.json").read_text())
    del values["checksum"]
    mutate(values, data)
    values["checksum"] = fingerprint(values)
    text = canonical_json(values, indent=1)
    try:
        manifest = parse_manifest(text, "here")
    except (StoreDamaged, StoreMismatch):
        return
    # It stands: then so does everything that is computed from it.
    assert manifest.to_json() == text or parse_manifest(manifest.to_json(), "again") == manifest
    mutated = written.parent / "mutated.zarr"
    if not mutated.exists():
        mutated.mkdir()
        for entry in written.iterdir():
            if entry.name != "manifest.json":
                (mutated / entry.name).symlink_to(entry)
    (mutated / "manifest.json").write_text(text)
    for reading in ("resident", "mapped", "windowed"):
        try:
            found = read_everything(mutated, reading)
        except (StoreDamaged, StoreMismatch, StoreIncomplete):
            continue
        assert_right(found)


GREEDY = """
import resource, sys, json
from pathlib import Path
import numpy as np, torch
from coursepack.data.store import StoreReader, verify
from coursepack.errors import CoursepackError, StoreDamaged, StoreMismatch
import test_data_store_hostile as tests
import coursepack.data.store.jit_gather
base, folder = Path(sys.argv[1]), Path(sys.argv[2])
tests.read_everything(base, "mapped")
verify(base)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
text = (base / "manifest.json").read_text()
refused = 0
for name, change in tests.CHANGES.items():
    (folder / "manifest.json").write_text(text)
    tests.rewrite_manifest(folder, change)
    for reading in ("resident", "mapped", "windowed"):
        try:
            tests.read_everything(folder, reading)
        except (StoreDamaged, StoreMismatch):
            refused += 1
    try:
        verify(folder)
    except (StoreDamaged, StoreMismatch):
        pass
print(refused)
"""


def test_no_hostile_manifest_makes_a_reader_take_much_memory(written, store):
    result = run("code", GREEDY, written, store)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) == 3 * len(CHANGES)
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
