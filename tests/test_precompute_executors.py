"""Executors: whoever computes the blocks, in whatever order and however often, the store is the same."""

from __future__ import annotations

import json
import pickle
import re
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
from builders import write_teacher
from click.testing import CliRunner
from clusters import MARKS
from helpers import store_files

from coursepack.data import PRESETS
from coursepack.data.store import StoreWriter, verify
from coursepack.errors import RecipeError, WorkerLost, WorkerMismatch
from coursepack.precompute import run_job
from coursepack.precompute.cli import main
from coursepack.precompute.executors import EXECUTORS
from coursepack.precompute.executors.actors import check_report
from coursepack.precompute.executors.worker import Report, Witness, Worker
from coursepack.precompute.spec import PrecomputeSpec
from coursepack.precompute.write import write_blocks
from coursepack.ray_workers import Share, uses_gpus


class Elsewhere:
    """Does what an executor of other machines does: jobs made again, blocks lost and queued, any order."""

    @contextmanager
    def started(self, job):
        yield job.environment()

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


OTHERS = {"elsewhere": Elsewhere, **{name: kind for name, kind in EXECUTORS.items() if name != "local"}}
NEEDS = {"ray": MARKS}
"""Marks of executors that start other programs, which takes seconds: one case each will do."""
CASES = [
    pytest.param(name, together, marks=NEEDS.get(name, []))
    for name in OTHERS
    for together in ((2,) if name in NEEDS else (1, 2))
]


@pytest.mark.parametrize(("name", "together"), CASES)
def test_every_executor_writes_the_same_bytes(tmp_path, spec, name, together, request):
    arguments = {}
    if name == "ray":
        arguments = {"address": request.getfixturevalue("cluster").address, "actors": 1}
    found = []
    for executor in (EXECUTORS["local"](), OTHERS[name](**arguments)):
        path = tmp_path / f"{len(found)}.zarr"
        manifest = run_job(spec(path, views_per_load=together).job(), executor=executor, quiet=True)
        assert manifest.committed_views() == (0, 1)
        assert verify(path).problems == ()
        found.append(store_files(path))
    assert found[0] == found[1]


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


def report_of(job, **changes):
    """What a worker reports that opened the job."""
    facts = {"name": "node7, process 4", "identity": job.plan().identity, "environment": job.environment()}
    return Report(**facts | changes)


def test_a_worker_with_another_teacher_or_other_numerics_does_not_fit(tmp_path, spec):
    job = spec(tmp_path / "s.zarr").job()
    identity, first = job.plan().identity, report_of(job)
    check_report(first, identity, None)
    check_report(report_of(job, name="node8, process 5"), identity, first)
    other = {**identity, "teacher": {**identity["teacher"], "weights": "0" * 64}}
    text = "worker on node7, process 4, would write another store(.|\n)*teacher.weights .*worker: 0000"
    with pytest.raises(WorkerMismatch, match=text):
        check_report(report_of(job, identity=other), identity, None)
    environment = {**job.environment(), "device_name": "z80", "numerics": "0" * 64}
    text = "has other numerics than the first(.|\n)*device_name .*this one: z80"
    with pytest.raises(WorkerMismatch, match=text):
        check_report(report_of(job, environment=environment), identity, first)
    with pytest.raises(WorkerLost, match="node7, process 4, cannot start: no such folder"):
        check_report(report_of(job, error="no such folder"), identity, first)


def test_a_worker_writes_only_to_the_store_of_the_driver(tmp_path, spec, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.chdir(tmp_path)
    chosen = spec(tmp_path / "s.zarr")
    with StoreWriter(tmp_path / "s.zarr", chosen.job().plan()) as writer:
        block = next(writer.pending())
    worker = Worker()
    assert worker.start(chosen, str(tmp_path), 1).error is None
    with pytest.raises(WorkerLost, match=r"is not the store that this command writes.*all nodes share"):
        worker.write([block], Witness("runs/0of1.witness", b"12"))
    assert not list((tmp_path / "s.zarr/blocks").glob("*"))
    writer.location.put("runs/0of1.witness", b"21")
    with pytest.raises(WorkerLost):
        worker.write([block], Witness("runs/0of1.witness", b"12"))
    writer.location.put("runs/0of1.witness", b"12")
    worker.write([block], Witness("runs/0of1.witness", b"12"))
    assert len(list((tmp_path / "s.zarr/blocks").glob("*"))) == 1


def test_a_worker_reports_what_it_cannot_open(tmp_path, spec):
    report = Worker().start(replace(spec(tmp_path / "s.zarr"), teacher="run:nowhere"), "/nowhere", 1)
    assert "nowhere" in report.error


REFUSED = [
    ("--executor ray", 1, "--executor ray needs ray, which cannot be imported: .*coursepack.cluster."),
    ("--actors 2", 2, "--actors does not apply to --executor local: give --executor ray"),
    ("--executor locl", 2, "'locl' is not one of 'local', 'ray'"),
]


@pytest.mark.parametrize(("options", "status", "text"), REFUSED)
def test_wrong_options_of_executors_are_refused(tmp_path, monkeypatch, options, status, text):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = f"run --teacher run:x --source digits --view digits --views 1 --store {tmp_path / 's.zarr'}"
    result = CliRunner().invoke(main, [*words.split(), *options.split()])
    assert result.exit_code == status
    assert re.search(text, result.stderr), result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("device", "per_gpu", "gpus", "expected"),
    [("auto", None, 0, False), ("auto", None, 2, True), ("auto", 2, 0, True), ("cpu", None, 2, False),
     ("cuda", None, 0, True)],
)  # fmt: skip
def test_workers_take_gpus_where_there_are_some(device, per_gpu, gpus, expected):
    assert uses_gpus(device, "--workers-per-gpu", per_gpu, {"GPU": gpus}) == expected


@pytest.mark.parametrize(
    ("device", "per_gpu", "text"),
    [("cuda:1", None, "names one GPU, but Ray assigns them"), ("cpu", 2, "--workers-per-gpu is given with")],
)
def test_devices_that_ray_cannot_give_are_refused(device, per_gpu, text):
    with pytest.raises(RecipeError, match=text):
        uses_gpus(device, "--workers-per-gpu", per_gpu, {"GPU": 2})


@pytest.mark.parametrize(
    ("share", "room"),
    [(Share(), 6), (Share(cpus=4), 1), (Share(gpus=1), 2), (Share(gpus=0.25), 8), (Share(gpus=0.3333), 6),
     (Share(cpus=0.1), 60), (Share(gpus=4), 0)],
)  # fmt: skip
def test_a_node_has_room_for_workers_by_what_they_share(share, room):
    assert share.fits({"CPU": 6.0, "GPU": 2.0}) == room
