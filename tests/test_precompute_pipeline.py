"""The pipeline of stage one: parts overlap, few batches wait, bytes and errors stay the same."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import file_identities, make_job, random_source, store_files

from coursepack.data.batches import Batch
from coursepack.data.encodings import parse_encoding
from coursepack.data.store import StoreWriter, load_manifest
from coursepack.data.store import writer as writer_module
from coursepack.data.store.block import BlockFiles
from coursepack.data.views import draw, render
from coursepack.errors import EncodingRange, NonFiniteOutput
from coursepack.models.taps import Tap
from coursepack.models.teacher import TeacherOutput
from coursepack.precompute import pipeline, run_job
from coursepack.precompute.transfer import CudaTransfer, padded

PATIENCE = 60
"""Seconds after which a part that waits for another has waited in vain."""
FIELDS = {"block_rows": 100, "batch_size": 30, "views": 2}


class Runner:
    """A job's runner with another `run`."""

    def __init__(self, runner, run):
        self._runner, self._run = runner, run

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def run(self, pixels):
        return self._run(self._runner.run, pixels)


def job_with(job, run):
    return replace(job, runner=Runner(job.runner, run))


def forward_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("coursepack-forward")]


def write_plainly(job):
    """Write the same data files batch by batch in one thread, without committing."""
    size = job.runner.network.preprocessing.size
    with StoreWriter(job.store, job.plan()) as writer:
        for block in writer.pending():
            files = writer.write(block, {})
            for start in range(0, len(block), job.batch_size):
                samples = block.samples[start : start + job.batch_size]
                params = draw(job.recipe, job.source, samples, block.view)
                pixels = render(job.recipe, job.source, samples, params, size)
                outputs = job.runner.run(torch.from_numpy(pixels)).arrays()
                files.add({name: value.numpy() for name, value in outputs.items()})
            files.flush()


def data_files(path):
    return {key: value for key, value in store_files(path).items() if "/c." in key}


WAYS = [
    pytest.param(encoding, fields, marks=() if not fields or encoding == "int8" else pytest.mark.integration)
    for fields in ({}, {"views_per_load": 2}, {"workers": 1})
    for encoding in ("float32", "int8", "topk:3", "topk16:2")
]


@pytest.mark.parametrize(("encoding", "fields"), WAYS)
def test_bytes_are_those_of_one_thread(tmp_path, teachers, encoding, fields):
    given = {**FIELDS, "encoding": encoding, "taps": (Tap(("conv2",)), Tap(("hidden",)))}
    given["source"] = random_source(230)  # the last block of a view is short, and so is its last batch
    run_job(make_job(tmp_path / "s.zarr", teachers[1], **given, **fields), quiet=True)
    write_plainly(make_job(tmp_path / "plain.zarr", teachers[1], **given))
    assert data_files(tmp_path / "s.zarr") == data_files(tmp_path / "plain.zarr")


def test_the_teacher_runs_on_the_next_block_while_one_is_written(tmp_path, teacher, monkeypatch):
    """The first file of a block is not written before the next block is begun: without overlap, never."""
    job = make_job(tmp_path / "s.zarr", teacher, **FIELDS)
    second_block, batches = threading.Event(), []

    def run(forward, pixels):
        batches.append(len(pixels))
        if len(batches) == 5:
            second_block.set()
        return forward(pixels)

    put = BlockFiles.finish

    def finish(self, statistics):
        assert second_block.wait(PATIENCE), "the teacher waits for the writer"
        put(self, statistics)

    monkeypatch.setattr(BlockFiles, "finish", finish)
    run_job(job_with(job, run), quiet=True)
    assert batches[:4] == [30, 30, 30, 10]


def test_views_are_rendered_while_the_teacher_runs(tmp_path, teacher, monkeypatch):
    job = make_job(tmp_path / "s.zarr", teacher, **FIELDS)
    rendered, third = [], threading.Event()
    render_all = Batch.render_all

    def noting(self, sizes):
        rendered.append(len(self))
        if len(rendered) == 3:
            third.set()
        return render_all(self, sizes)

    def run(forward, pixels):
        assert third.wait(PATIENCE), "the renderer waits for the teacher"
        return forward(pixels)

    monkeypatch.setattr(Batch, "render_all", noting)
    run_job(job_with(job, run), quiet=True)


@pytest.mark.parametrize("waiting_bytes", [0, 5 * 30 * 40, 1 << 30])
def test_a_bounded_number_of_batches_waits_to_be_written(tmp_path, teacher, monkeypatch, waiting_bytes):
    """Float32 logits of ten classes take 40 bytes a row."""
    monkeypatch.setattr(pipeline, "WAITING_BYTES", waiting_bytes)
    limit = {0: 3, 5 * 30 * 40: 5, 1 << 30: 64}[waiting_bytes]
    started, most = threading.Semaphore(0), 0
    counts = {"started": 0, "written": 0}

    def run(forward, pixels):
        nonlocal most
        counts["started"] += 1
        most = max(most, counts["started"] - counts["written"])
        started.release()
        return forward(pixels)

    add = BlockFiles.add

    def slow_add(self, values):
        if counts["written"] == 0:
            for _ in range(limit):
                assert started.acquire(timeout=PATIENCE), "the teacher waits for the writer"
        add(self, values)
        counts["written"] += 1

    monkeypatch.setattr(BlockFiles, "add", slow_add)
    run_job(job_with(make_job(tmp_path / "s.zarr", teacher, **FIELDS), run), quiet=True)
    assert counts["started"] == counts["written"] > 64
    assert most == limit


class Stopped(BaseException):
    """Stands for a KeyboardInterrupt, which pytest would take for its own."""


@pytest.mark.parametrize("batches", [1, 9, 17])
def test_an_interrupt_ends_the_threads_and_leaves_a_store_to_go_on_with(
    tmp_path, teacher, monkeypatch, batches
):
    given = {**FIELDS, "block_rows": 50, "source": random_source(480)}
    job = make_job(tmp_path / "s.zarr", teacher, **given)
    before, add, count = set(threading.enumerate()), BlockFiles.add, 0

    def interrupted(self, values):
        nonlocal count
        count += 1
        if count == batches:
            raise Stopped
        add(self, values)

    with monkeypatch.context() as patch:
        patch.setattr(BlockFiles, "add", interrupted)
        with pytest.raises(Stopped):
            run_job(job, quiet=True)
    assert set(threading.enumerate()) <= before
    kept = file_identities(tmp_path / "s.zarr")
    assert len([key for key in kept if key.startswith("logits/")]) == (batches - 1) // 2
    run_job(job, quiet=True)
    assert kept.items() <= file_identities(tmp_path / "s.zarr").items()
    run_job(make_job(tmp_path / "once.zarr", teacher, **given), quiet=True)
    assert store_files(tmp_path / "s.zarr") == store_files(tmp_path / "once.zarr")


def poison(value, batch):
    """Replace a logit of the given batch."""
    count = 0

    def run(forward, pixels):
        nonlocal count
        count += 1
        output = forward(pixels)
        logits = output.logits.clone()
        if count == batch:
            logits[3, 7] = value
        return TeacherOutput(logits, output.features)

    return run


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (float("nan"), NonFiniteOutput, r"not finite for 1 samples of a batch \(433\)"),
        (1e9, EncodingRange, r"^logits: sample 433 has the value 1e\+09, outside the range of float16"),
    ],
)
def test_what_cannot_be_stored_ends_the_run_after_the_blocks_before_it(tmp_path, teacher, value, error, text):
    job = make_job(tmp_path / "s.zarr", teacher, **FIELDS)
    with pytest.raises(error, match=text):
        run_job(job_with(job, poison(value, 18)), quiet=True)
    assert forward_threads() == []
    written = [key for key in store_files(tmp_path / "s.zarr") if key.startswith("blocks/")]
    assert sorted(written) == [f"blocks/0.{index}.json" for index in range(4)]


@pytest.mark.parametrize("where", ["teacher", "order"])
def test_an_error_of_the_other_thread_is_raised_as_it_is(tmp_path, teacher, where):
    job = make_job(tmp_path / "s.zarr", teacher, **FIELDS)

    def order():
        yield from range(4)
        raise ConnectionError("no more blocks")

    def run(forward, pixels):
        if where == "teacher" and calls.append(1) is None and len(calls) == 18:
            raise ConnectionError("no more batches")
        return forward(pixels)

    calls: list[int] = []
    with pytest.raises(ConnectionError, match=r"^no more \w+$"):
        run_job(job_with(job, run), block_order=order() if where == "order" else None, quiet=True)
    assert forward_threads() == []
    written = [key for key in store_files(tmp_path / "s.zarr") if key.startswith("blocks/")]
    assert len(written) == 4


def test_only_the_teacher_computes_in_several_threads(tmp_path, teacher, monkeypatch):
    found = {}

    def note(what, function):
        def noting(*args, **kwargs):
            result = function(
                *args, **kwargs
            )  # first, since a thread gets its number with its first operation
            name = threading.current_thread().name.removeprefix("coursepack-")
            found.setdefault((what, name), set()).add(torch.get_num_threads())
            return result

        return noting

    job = make_job(tmp_path / "s.zarr", teacher, **FIELDS, source=random_source(60))
    monkeypatch.setattr(BlockFiles, "add", note("write", BlockFiles.add))
    monkeypatch.setattr(pipeline, "block_record", note("record", pipeline.block_record))
    monkeypatch.setattr(Batch, "render_all", note("views", Batch.render_all))
    torch.set_num_threads(3)
    run_job(job_with(job, note("teacher", lambda run, pixels: run(pixels))), quiet=True)
    assert found == {
        ("record", "read_0"): {1},
        ("views", "views"): {1},
        ("teacher", "forward"): {3},
        ("write", "MainThread"): {1},
    }
    assert torch.get_num_threads() == 3


def test_only_the_last_blocks_of_a_view_are_looked_up_when_one_is_finished(tmp_path, teacher, monkeypatch):
    """The number of done-objects that are read grows with the number of blocks, not with its square."""
    reads, read = [], writer_module.read_done

    def counted(location, view, index):
        reads.append(index)
        return read(location, view, index)

    monkeypatch.setattr(writer_module, "read_done", counted)
    job = make_job(tmp_path / "s.zarr", teacher, batch_size=30, views=1, source=random_source(1200))
    run_job(replace(job, block_rows=30), quiet=True)
    assert len(reads) < 8 * 40


@pytest.mark.parametrize(
    "name", ["float32", "float16", "bfloat16", "int8", "int4", "topk:3", "topk16:3", "bits"]
)
def test_encoded_rows_are_copies(name):
    """The memory of a batch's outputs is used again for a later batch."""
    values = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    encoded = parse_encoding(name).encode(values, np.arange(4), np.arange(4))
    assert not any(np.shares_memory(values, part) for part in encoded.values())


def test_padded_batches_keep_their_rows():
    pixels = torch.arange(24, dtype=torch.uint8).reshape(2, 2, 2, 3)
    found = padded(pixels, 5)
    assert found.shape == (5, 2, 2, 3)
    assert torch.equal(found[:2], pixels)
    assert not found[2:].any()
    assert padded(pixels, 2) is pixels


@pytest.mark.gpu
def test_a_gpu_writes_what_it_computes_batch_by_batch(tmp_path, teachers):
    """Every batch has the batch size, so a store is the same whatever the rows of its last batch."""
    given = {**FIELDS, "encoding": "float32", "taps": (Tap(("conv2",)),)}
    plain = make_job(tmp_path / "s.zarr", teachers[1], **given)
    device = torch.device("cuda")
    job = replace(plain, runner=type(plain.runner)(plain.runner.network, plain.runner.taps, device))
    run_job(job, quiet=True)
    size = job.runner.network.preprocessing.size
    samples = np.arange(90, 100)
    params = draw(job.recipe, job.source, samples, 1)
    pixels = torch.from_numpy(render(job.recipe, job.source, samples, params, size))
    transfer = CudaTransfer(job.runner, 30)
    pending = transfer.start(pixels)
    found, finite = pending.fetch()
    expected = job.runner.run(padded(pixels, 30)).arrays()
    for name, value in found.items():
        assert torch.equal(value, expected[name][:10].cpu())
        assert bool(finite[name].all())
    pending.release()
    # No step waits for the device.
    torch.cuda.set_sync_debug_mode("error")
    try:
        more = transfer.start(pixels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    more.fetch()
    assert load_manifest(tmp_path / "s.zarr").committed_views() == (0, 1)
