"""`verify --deep` and `--repair`: what the teacher says now against what is stored, and mending in place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import write_teacher
from click.testing import CliRunner
from helpers import file_identities, make_job, rewrite_manifest, store_files

from coursepack.data.encodings import FOR_FEATURES
from coursepack.data.store import StoreReader, load_manifest, verify
from coursepack.data.store.layout import shard_key
from coursepack.data.store.shards import shard_checksum, shard_pieces
from coursepack.errors import StoreDamaged, StoreMismatch, TeacherMismatch
from coursepack.models import parse_tap
from coursepack.models.build import WEIGHTS_FILE
from coursepack.precompute import run_job
from coursepack.precompute.cli import main
from coursepack.precompute.verify import job_of_store, verify_deep

CPU = torch.device("cpu")
SAMPLES = 1442
ENCODINGS = ("float32", "float16", "bfloat16", "int8", "int4", "topk:3", "topk16:2")


@pytest.fixture(scope="module")
def written(tmp_path_factory, teacher):
    """A store of logits as int8 and two taps, three blocks per view; tests only read it."""
    path = tmp_path_factory.mktemp("written") / "s.zarr"
    taps = [parse_tap("hidden1"), parse_tap("hidden2:sign")]
    run_job(make_job(path, teacher, taps=taps, encoding="int8", block_rows=500, batch_size=100))
    return path


@pytest.fixture
def command():
    """Run `precompute` in this process."""
    return lambda *words: CliRunner().invoke(main, [str(word) for word in (*words, "--device=cpu")])


def job_of(path, **options):
    options = {"weights": None, "root": None, "device": CPU} | options
    return job_of_store(path, load_manifest(path), **options)


def alter(path, array, component, view, sample, change):
    """Change one stored row and make everything that vouches for it agree."""
    manifest = load_manifest(path)
    layout = manifest.arrays[array].components[component]
    shard = sample // layout.shard_rows
    first = shard * layout.shard_rows
    rows = np.arange(first, min(first + layout.shard_rows, manifest.samples))
    values = StoreReader(path).components(array, view, rows)[component].copy()
    values[sample - first] = change(values[sample - first])
    pieces = shard_pieces(values, layout)
    key = shard_key(f"{array}/{component}", view, shard, layout)
    (path / key).write_bytes(b"".join(map(bytes, pieces)))
    entry = [sum(map(len, pieces)), shard_checksum(pieces)]
    rewrite_manifest(path, lambda values: values["files"].update({key: entry}))
    assert verify(path).problems == ()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_sound_store_agrees_with_its_teacher(tmp_path, teacher, encoding):
    path = tmp_path / "s.zarr"
    feature = encoding if encoding in FOR_FEATURES else "bits"
    run_job(
        make_job(
            path,
            teacher,
            taps=[parse_tap("hidden1")],
            encoding=encoding,
            feature_encoding=feature,
            batch_size=100,
        )
    )
    seen = []
    report = verify_deep(job_of(path), 600, on_rows=seen.append)
    assert (report.rows, report.wrong, sum(seen)) == (600, (), 600)


def test_sound_taps_of_every_kind_agree_whatever_the_batch_size(tmp_path):
    teacher = write_teacher(tmp_path / "resnet", "digits-resnet")
    modules = dict(make_job(tmp_path / "x", teacher).runner.network.module.named_modules())
    norms = [name for name, module in modules.items() if isinstance(module, torch.nn.BatchNorm2d)]
    maps = [name for name in modules if name.count(".") == 0 and name not in ("", "head")]
    texts = [f"{norms[0]}:sign", f"{norms[-1]}:margin", f"{norms[0]}:attention", f"{norms[0]}:pooled"]
    texts += [f"{norms[0]}+{norms[1]}:gram", f"{norms[-1]}:gram", f"{norms[0]}:map:4", maps[0]]
    path = tmp_path / "s.zarr"
    job = make_job(path, teacher, taps=[parse_tap(text) for text in texts], views=1, batch_size=64)
    manifest = run_job(job)
    assert len(manifest.arrays) == 9
    again = job_of(path)
    assert [tap.name for tap in sorted(again.runner.taps, key=lambda tap: tap.name)] == sorted(
        parse_tap(text).name for text in texts
    )
    assert again.batch_size == 64
    assert verify_deep(again, 150).wrong == ()
    assert verify_deep(make_job(path, teacher, taps=job.runner.taps, batch_size=7), 150).wrong == ()


ALTERED = {
    "logits q": ("logits", "q", lambda row: row ^ 8),
    "logits affine": ("logits", "affine", lambda row: row * 1.02),
    "feature": ("features/hidden1", "values", lambda row: row + np.float16(0.02)),
    "signs": ("features/hidden2@sign", "bits", lambda row: row ^ 0x18),
}


@pytest.mark.parametrize(("array", "component", "change"), ALTERED.values(), ids=ALTERED)
def test_one_altered_row_is_found_and_named(store, command, array, component, change):
    alter(store, array, component, 1, 701, change)
    report = verify_deep(job_of(store), 20_000)
    assert set(report.wrong) == {f"{array}: sample 701, view 1"}
    told = command("verify", "--store", store, "--deep", 20_000, "--json")
    assert told.exit_code == 1
    facts = json.loads(told.stdout)
    assert facts["rows"] == 20_000
    assert set(facts["problems"]) == {f"{array}: sample 701, view 1"}
    assert command("verify", "--store", store).exit_code == 0, "files alone are what the manifest says"


def test_a_stored_id_that_is_no_class_is_found_and_never_read(tmp_path, teacher, command):
    """The files are what the manifest vouches for, so only who looks at the rows can tell."""
    path = tmp_path / "s.zarr"
    run_job(make_job(path, teacher, encoding="topk16:2", block_rows=500))

    def no_class(ids):
        ids[0] = 10
        return ids

    alter(path, "logits", "ids", 1, 701, no_class)
    told = command("verify", "--store", path, "--deep", 20_000)
    assert told.exit_code == 1
    assert "logits: sample 701, view 1" in told.stdout
    reader = StoreReader(path)
    assert reader.rows("logits", 1, np.array([700, 702])).shape == (2, 10)
    for views in (1, np.array([0, 1])):
        with pytest.raises(StoreDamaged, match=r"are not topk16:2: ids holds 10, expected class ids 0\.\.9"):
            reader.rows("logits", views, np.array([700, 701]))
    shown = CliRunner().invoke(main, ["inspect", str(path)])
    assert (shown.exit_code, "ids holds 10" in shown.stderr) == (1, True)


def test_the_rows_to_network_input_are_spread_and_always_the_same(store):
    seen = [[], []]
    for found in seen:
        job = job_of(store)
        run = job.runner.run
        job.runner.run = lambda pixels, run=run, found=found: (found.append(pixels.clone()), run(pixels))[1]
        verify_deep(job, 300)
    first, again = (torch.cat(found) for found in seen)
    assert torch.equal(first, again)
    assert len(first) == 300
    assert len(torch.unique(first.flatten(1), dim=0)) > 250


@pytest.mark.parametrize("flag", ["--deep=5", "--repair"])
def test_weights_that_are_gone_or_changed(store, teacher, tmp_path, command, flag):
    moved = tmp_path / "moved.safetensors"
    shutil.copy(teacher / WEIGHTS_FILE, moved)
    (store / "logits/q/c.0.0.0").write_bytes(b"short") if flag == "--repair" else None
    damaged = store_files(store)
    other = write_teacher(tmp_path / "other", "digits-mlp", seed=9) / WEIGHTS_FILE
    for weights, text in (
        (tmp_path / "gone.safetensors", f"there are no weights at '{tmp_path / 'gone.safetensors'}'"),
        (other, "are not the ones that wrote the store: give the old weights, or write the store again"),
    ):
        result = command("verify", "--store", store, flag, "--weights", weights)
        assert (result.exit_code, "Traceback" in result.stderr) == (1, False)
        assert text in result.stderr
        with pytest.raises((TeacherMismatch, OSError, ValueError), match=text[:20]):
            job_of(store, weights=str(weights))
    rewrite_manifest(store, lambda values: values["origin"].update(weights_file=str(tmp_path / "lost.pt")))
    assert "there are no weights" in command("verify", "--store", store, flag).stderr
    rewrite_manifest(store, lambda values: values["origin"].update(weights_file=str(teacher / WEIGHTS_FILE)))
    assert {k: v for k, v in store_files(store).items() if k != "manifest.json"} == {
        k: v for k, v in damaged.items() if k != "manifest.json"
    }
    assert command("verify", "--store", store, flag, "--weights", moved).exit_code == 0


def test_another_source_is_refused(store):
    rewrite_manifest(store, lambda values: values["identity"]["source"].update(fingerprint="0" * 64))
    manifest = load_manifest(store)
    with pytest.raises(
        StoreMismatch, match=r"has fingerprint [0-9a-f]{12}, but the store was written from 000000000000"
    ):
        job_of_store(store, manifest, weights=None, root=None, device=CPU)


def test_deep_without_a_network_input_bad_files(store, command):
    """Bad files are reported as they are; the teacher is not even asked for."""
    (store / "logits/q/c.0.1.0").unlink()
    result = command("verify", "--store", store, "--deep", 5, "--weights", "nowhere.pt")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[0] == "logits/q/c.0.1.0: missing"
    assert "nowhere" not in result.stderr


def all_identities(store):
    """Inode and time of change of every file but the manifest, its lists, and what runs leave."""
    files = [file for file in store.rglob("*") if file.is_file() and not {"runs", "views"} & {*file.parts}]
    found = {file.relative_to(store).as_posix(): file.stat() for file in files}
    return {k: (s.st_ino, s.st_mtime_ns) for k, s in found.items() if k not in ("manifest.json", "lock")}


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 2
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-9])


def everything_bad(store):
    """Ways to damage a store, and the files that each damages."""

    def swap(one, other):
        (store / one).rename(store / "spare")
        (store / other).rename(store / one)
        (store / "spare").rename(store / other)

    logits, affine, tap = "logits/q/c.0.1.0", "logits/affine/c.1.2.0", "features/hidden1/values/c.1.0.0"
    return {
        "flipped": ([logits], lambda: flip(store / logits)),
        "truncated": ([tap], lambda: cut(store / tap)),
        "deleted": ([affine], lambda: (store / affine).unlink()),
        "swapped": (["logits/q/c.1.0.0", logits], lambda: swap("logits/q/c.1.0.0", logits)),
        "labels": (["labels/c.0"], lambda: flip(store / "labels/c.0")),
        "labels gone": (["labels/c.0"], lambda: (store / "labels/c.0").unlink()),
        "static": (["static/head_weight/c.0.0"], lambda: flip(store / "static/head_weight/c.0.0")),
        "metadata": (["logits/q/zarr.json"], lambda: (store / "logits/q/zarr.json").write_text("{}")),
        "metadata gone": (["zarr.json", "static/zarr.json"], lambda: [
            (store / key).unlink() for key in ("zarr.json", "static/zarr.json")]),
        "folder gone": (
            ["features/hidden2@sign/bits/" + key for key in
             ("zarr.json", *(f"c.{view}.{shard}.0" for view in (0, 1) for shard in range(3)))],
            lambda: shutil.rmtree(store / "features/hidden2@sign/bits"),
        ),
        "all at once": (
            [logits, tap, affine, "labels/c.0", "static/head_bias/c.0", "labels/zarr.json"],
            lambda: [flip(store / logits), cut(store / tap), (store / affine).unlink(),
                     flip(store / "labels/c.0"), (store / "static/head_bias/c.0").unlink(),
                     (store / "labels/zarr.json").unlink()],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("damage", everything_bad(None))
def test_repair_writes_bad_files_and_no_others(store, command, damage):
    before, kept = store_files(store), all_identities(store)
    bad, harm = everything_bad(store)[damage]
    harm()
    assert {problem.key for problem in verify(store).problems} == set(bad)
    told = command("verify", "--store", store)
    assert (told.exit_code, f"{len(bad)} problems" in told.stdout) == (1, True)
    result = command("verify", "--store", store, "--repair")
    assert result.exit_code == 0, result.output
    assert sorted(
        line.partition(":")[0] for line in result.stderr.splitlines() if "written again" in line
    ) == (sorted(bad))
    assert "differs by rounding" not in result.stderr
    assert "sound" in result.stdout
    assert store_files(store) == before
    after = all_identities(store)
    others = kept.keys() - set(bad)
    assert {key: after[key] for key in others} == {key: kept[key] for key in others}
    assert all(after[key] != kept[key] for key in kept.keys() & set(bad))
    assert verify_deep(job_of(store), 200).wrong == ()


@contextmanager
def at_most(seconds):
    """End the block by an error rather than hang."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def other_kind(path, kind):
    """Put something that is no regular file in a file's place."""
    path.unlink()
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize("kind", ["a FIFO", "a folder", "a link to nothing"])
def test_what_is_no_regular_file_is_reported_and_replaced(store, command, kind):
    before = store_files(store)
    bad = [
        "features/hidden1/values/c.1.0.0",
        "labels/c.0",
        "logits/q/c.0.1.0",
        "logits/q/zarr.json",
        "zarr.json",
    ]
    for key in bad:
        other_kind(store / key, kind)
    with at_most(300):
        told = command("verify", "--store", store, "--json")
        assert told.exit_code == 1
        problems = dict(line.split(": ", 1) for line in json.loads(told.stdout)["problems"])
        assert sorted(problems) == bad
        if kind != "a link to nothing":
            assert set(problems.values()) == {f"cannot be read: It is {kind}, expected a regular file"}
            with pytest.raises(OSError, match=f"It is {kind}, expected a regular file"):
                StoreReader(store).rows("logits", 0, np.array([700]))
        result = command("verify", "--store", store, "--repair")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("written again") == len(bad)
    assert store_files(store) == before


@pytest.mark.parametrize("place", ["logits/q/c.0.1.0", "logits/q"])
def test_what_may_be_worth_keeping_stays_where_it_is(store, command, place):
    """Nothing is said to be written again that is not."""
    (store / "labels/c.0").unlink()
    (store / place).rename(store.with_name("aside"))
    if place == "logits/q":
        (store / place).write_text("notes")
        text = f"{str(store / place)!r} is not a folder: move that away"
    else:
        (store / place).mkdir()
        (store / place / "notes").write_text("notes")
        text = f"{str(store / place)!r} is a folder that holds something, expected a file: move that away"
    damaged = store_files(store)
    result = command("verify", "--store", store, "--repair")
    assert (result.exit_code, text in result.stderr, "written again" in result.stderr) == (1, True, False)
    assert store_files(store) == damaged


def test_files_that_may_not_be_read_are_reported_with_all_others(written, tmp_path):
    """As another user, whom root becomes for the test."""
    folder = Path(tempfile.mkdtemp())  # tmp_path is closed to others
    shutil.copytree(written, folder / "s.zarr")
    folder.chmod(0o755)
    bad = ["labels/c.0", "logits/q/c.0.1.0", "zarr.json"]
    for key in bad:
        (folder / "s.zarr" / key).chmod(0)
    (folder / "s.zarr/logits/affine/c.1.1.0").unlink()
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        problems = verify(folder / "s.zarr").problems
    finally:
        os.seteuid(user)
        shutil.rmtree(folder)
    expected = dict.fromkeys(bad, "cannot be read: Permission denied")
    assert {problem.key: problem.what for problem in problems} == {
        **expected,
        "logits/affine/c.1.1.0": "missing",
    }


@pytest.mark.parametrize("place", ["lock", "runs/other.json"])
def test_a_fifo_beside_the_data_stops_nothing_for_ever(store, command, place):
    (store / "labels/c.0").unlink()
    (store / place).unlink(missing_ok=True)
    os.mkfifo(store / place)
    with at_most(300):
        assert command("verify", "--store", store).exit_code == 1
        result = command("verify", "--store", store, "--repair")
    if place == "lock":
        assert f"Error: It is a FIFO, expected a regular file: {store / place}" in result.stderr
    else:
        assert result.exit_code == 0, result.output


LOST = {
    "a shard": ["logits/q/c.0.1.0"],
    "all of a view": [f"features/hidden1/values/c.1.{shard}.0" for shard in range(3)],
    "a table": ["labels/c.0", "static/head_bias/c.0"],
    "of each": ["logits/q/c.1.2.0", "logits/affine/c.0.0.0", "static/head_weight/c.0.0"],
}


@pytest.mark.parametrize("gone", [False, True], ids=["files there", "files gone"])
@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
def test_repair_of_a_manifest_that_names_too_few_files(store, command, lost, gone):
    """Its checksum is right, so something wrote it like that: no reader serves those views."""
    before = store_files(store)
    rewrite_manifest(store, lambda values: [values["files"].pop(key) for key in lost])
    for key in lost if gone else ():
        (store / key).unlink()
    told = command("verify", "--store", store, "--json")
    expected = [f"{key}: not vouched for" for key in sorted(lost)]
    assert (told.exit_code, sorted(json.loads(told.stdout)["problems"])) == (1, expected)
    result = command("verify", "--store", store, "--repair")
    assert (result.exit_code, "differs by rounding" in result.stderr) == (0, False), result.output
    assert store_files(store) == before


def test_a_manifest_that_does_not_match_its_checksum_says_what_to_do(store, command, teacher):
    before = store_files(store)
    text = (store / "manifest.json").read_text()
    (store / "manifest.json").write_text(text.replace('"samples":1442', '"samples":1441'))
    told = command("verify", "--store", store, "--repair")
    assert (told.exit_code, "remove it and run the same `precompute run` again" in told.stderr) == (1, True)
    (store / "manifest.json").unlink()
    taps = [parse_tap("hidden1"), parse_tap("hidden2:sign")]
    run_job(make_job(store, teacher, taps=taps, encoding="int8", block_rows=500, batch_size=100))
    assert store_files(store) == before


def test_repair_of_a_sound_store_writes_nothing_and_needs_no_teacher(store, command):
    before, kept = store_files(store), file_identities(store)
    manifest = (store / "manifest.json").stat()
    result = command("verify", "--store", store, "--repair", "--weights", "nowhere.pt", "--json")
    assert (result.exit_code, json.loads(result.stdout)["problems"]) == (0, [])
    assert (store_files(store), file_identities(store)) == (before, kept)
    assert (store / "manifest.json").stat().st_mtime_ns == manifest.st_mtime_ns


def test_json_of_a_repair_and_of_a_deep_check(store, command):
    files = load_manifest(store).files
    size = sum(size for size, _ in files.values())
    facts = json.loads(command("verify", "--store", store, "--json").stdout)
    assert facts == {"files": len(files), "bytes": size, "rows": None, "problems": []}
    (store / "labels/c.0").unlink()
    result = command("verify", "--store", store, "--json")
    assert (result.exit_code, json.loads(result.stdout)["problems"]) == (1, ["labels/c.0: missing"])
    result = command("verify", "--store", store, "--json", "--repair", "--deep", 50)
    assert (result.exit_code, json.loads(result.stdout)) == (0, {**facts, "rows": 50})
    shown = command("verify", "--store", store, "--deep", 50).stdout
    assert "sound" in shown
    assert "50 rows equal to the teacher's outputs" in shown


def test_repair_of_some_views_leaves_a_store_that_can_be_extended(store, command, teacher, written):
    flip(store / "logits/q/c.0.0.0")
    assert command("verify", "--store", store, "--repair").exit_code == 0
    taps = [parse_tap("hidden1"), parse_tap("hidden2:sign")]
    options = {"taps": taps, "encoding": "int8", "batch_size": 100, "views": 3}
    run_job(make_job(store, teacher, **options))
    once = store.with_name("once.zarr")
    run_job(make_job(once, teacher, block_rows=500, **options))
    assert store_files(store) == store_files(once)


def test_repair_of_a_store_that_is_not_finished(tmp_path, teacher, command):
    """Done blocks of views that are not committed stay, and the run goes on afterwards."""
    path = tmp_path / "s.zarr"
    options = {"encoding": "int8", "block_rows": 500, "batch_size": 100}
    run_job(make_job(path, teacher, **options), block_order=iter([0, 1, 2, 4]))
    once = tmp_path / "once.zarr"
    run_job(make_job(once, teacher, **options))
    flip(path / "logits/q/c.0.2.0")
    assert command("verify", "--store", path, "--repair").exit_code == 0
    assert (path / "blocks/1.1.json").is_file()
    run_job(make_job(path, teacher, **options))
    assert store_files(path) == store_files(once)


def test_repair_that_rounds_differently_writes_all_components_of_the_rows(store, command, monkeypatch):
    """Scales of one machine and bytes of another would not fit: what comes out otherwise is written too."""
    flip(store / "logits/q/c.0.0.0")
    kept = all_identities(store)
    encode = type(load_manifest(store).arrays["logits"].encoding).encode

    def other_machine(self, values, samples, labels):
        return encode(self, values * np.float32(1.001), samples, labels)

    monkeypatch.setattr(type(load_manifest(store).arrays["logits"].encoding), "encode", other_machine)
    result = command("verify", "--store", store, "--repair")
    assert result.exit_code == 0, result.output
    assert "logits/affine/c.0.0.0: the new content differs by rounding" in result.stderr
    after = all_identities(store)
    changed = {key for key in kept if kept[key] != after[key]}
    assert changed == {"logits/q/c.0.0.0", "logits/affine/c.0.0.0"}
    assert verify(store).problems == ()
