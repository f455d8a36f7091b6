"""Executors: whoever computes the blocks, in whatever order and however often, the store is the same."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict

import pytest
from builders import write_teacher
from helpers import store_files

from coursepack.data import PRESETS
from coursepack.data.store import StoreWriter, verify
from coursepack.precompute import run_job
from coursepack.precompute.executors import EXECUTORS
from coursepack.precompute.spec import PrecomputeSpec
from coursepack.precompute.write import write_blocks


class Elsewhere:
    """Does what an executor of other machines does: jobs made again, blocks lost and queued, any order."""

    def run(self, job, writer, groups, meter):
        others = pickle.loads(pickle.dumps(job.spec)).job()
        worker = StoreWriter(others.store, others.plan(), others.part)
        worker.manifest = worker.planned()
        queue = list(groups)
        queue.append(queue[0])
        with others.renderer() as renderer:
            for number, blocks in enumerate(reversed(queue)):
                written = write_blocks(others, worker, renderer, blocks)
                if number == 0:  # lost before its done-object
                    continue
                for files, sums in written:
                    files.finish(sums)
                yield blocks


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    teacher = write_teacher(tmp_path_factory.mktemp("teacher") / "mlp", "digits-mlp")
    facts = {"taps": ("hidden2",), "batch_size": 100, "block_rows": 500, "device": "cpu"}
    view = PRESETS["digits"].model_dump(mode="json")
    return lambda store, **more: PrecomputeSpec(
        f"run:{teacher}", "digits", view, str(store), **facts | {"views": 2} | more
    )


def test_a_spec_is_plain_values_that_make_the_same_job_anywhere(tmp_path, spec):
    first = spec(tmp_path / "s.zarr", part=(1, 3), views_per_load=2)
    again = json.loads(json.dumps(asdict(first)))
    other = PrecomputeSpec(**{name: tuple(v) if isinstance(v, list) else v for name, v in again.items()})
    assert other == first
    one, two = first.job(), other.job()
    assert one.plan().identity == two.plan().identity
    assert (one.part.index, one.part.count, one.views_per_load) == (1, 3, 2)
    assert one.spec == first


@pytest.mark.parametrize("together", [1, 2])
def test_every_executor_writes_the_same_bytes(tmp_path, spec, together):
    found = {}
    for name, executor in {**EXECUTORS, "elsewhere": Elsewhere}.items():
        path = tmp_path / f"{name}.zarr"
        manifest = run_job(spec(path, views_per_load=together).job(), executor=executor(), quiet=True)
        assert manifest.committed_views() == (0, 1)
        assert verify(path).problems == ()
        found[name] = store_files(path)
    assert all(files == found["local"] for files in found.values())


def test_an_executor_that_fails_leaves_what_is_done(tmp_path, spec):
    class Failing(Elsewhere):
        def run(self, job, writer, groups, meter):
            for count, blocks in enumerate(super().run(job, writer, groups, meter)):
                yield blocks
                if count == 1:
                    raise ConnectionError("the last worker is gone")

    with pytest.raises(ConnectionError):
        run_job(spec(tmp_path / "s.zarr").job(), executor=Failing(), quiet=True)
    assert len(list((tmp_path / "s.zarr/blocks").glob("*.json"))) == 2
    run_job(spec(tmp_path / "s.zarr").job(), quiet=True)
    run_job(spec(tmp_path / "once.zarr").job(), quiet=True)
    assert store_files(tmp_path / "s.zarr") == store_files(tmp_path / "once.zarr")
