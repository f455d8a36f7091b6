"""A training step never waits for a GPU: on a device without values here, and on CUDA where there is one."""

import contextlib
import warnings

import pytest
import torch
from builders import CPU, PAIRS, PHASES, few_by_default, make_recipe, write_store
from unwaited import META, Literals, Waits, WaitsForTheDevice, unwaited

from coursepack.data import ViewRecipe
from coursepack.data.loading import Renderer
from coursepack.data.views import PadCrop
from coursepack.data.views.mixing import Mix
from coursepack.distill.losses.base import Step
from coursepack.distill.methods import METHODS
from coursepack.distill.recipe import set_values
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.training import metrics
from coursepack.distill.training.ahead import CopiesAhead, copied_ahead
from coursepack.distill.training.evaluate import evaluate, evaluation_view
from coursepack.distill.training.group import make_group
from coursepack.distill.training.loop import new_metrics, train_steps
from coursepack.distill.training.optimizer import averaged, update_average
from coursepack.distill.training.state import make_state
from coursepack.errors import StoreDamaged

STEPS = 2
WAITING = {"ae-kd": "its weights minimize a norm by a search on the CPU, from the gradients of the step"}
"""Methods whose steps wait for the device, with the reason."""


def recipe_of(name, stores_of, **fields):
    stores = stores_of(name) if METHODS[name].objective.needs().teachers else []
    objective = {"terms": {name: {"pairs": list(PAIRS[name])}}} if name in PAIRS else {}
    if hasattr(METHODS[name].objective.fusion, "iterations"):
        objective["fusion"] = {"iterations": 2}  # of which each does the same
    set_values({"objective": objective}, PHASES.get(name, ()))
    epochs = max(2, METHODS[name].objective.fusion.fewest_epochs(len(stores)))
    fields = {"student": "digits-cnn", "limit": 128, "batch_size": 16, "epochs": epochs, **fields}
    return make_recipe(stores, method=name, objective=objective, **fields)


def steps_of(recipe, device):
    run = prepare(recipe, device)
    group = make_group(run)
    return train_steps([group], run.batches(0), run.targets, [new_metrics(state) for state in group])


def run_unwaited(steps):
    """Run some steps in which waiting for a GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(STEPS):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def watched(monkeypatch):
    """Run some steps on `META` under `Waits`, each with all metrics, after a first one without."""
    monkeypatch.setattr(metrics, "WATCH_EVERY", 1)

    def run(recipe):
        with unwaited(monkeypatch):
            steps = steps_of(recipe, META)
            next(steps)  # tables that stay on the device are copied there
            with Literals(), Waits():
                for _ in range(STEPS):
                    next(steps)

    return run


@pytest.mark.parametrize("name", few_by_default(name for name in METHODS if name not in WAITING))
def test_a_step_reads_nothing_from_the_device(stores_of, watched, name):
    watched(recipe_of(name, stores_of))


@pytest.mark.parametrize("name", WAITING)
def test_methods_that_wait_do_so(stores_of, watched, name):
    with pytest.raises((RuntimeError, NotImplementedError, WaitsForTheDevice)):
        watched(recipe_of(name, stores_of))


MIXED = ViewRecipe(ops=(PadCrop(padding=1),), mix=Mix(cutmix_alpha=1.0, mixup_alpha=1.0), reference_size=8)
CASES = {
    "ema and clipping": {"optimizer": {"ema": 0.9, "clip": 1.0}},
    "adamw": {"optimizer": {"name": "adamw"}},
    "micro-batches": {"accumulate": 2},
    "bfloat16": {"precision": "bfloat16", "channels_last": True},
    "several views": {"views_per_load": 2},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_a_step_of_any_kind_reads_nothing_from_the_device(stores_of, watched, fields):
    watched(recipe_of("kd", stores_of, **fields))


@pytest.mark.parametrize("encoding", ["float16", "int8", "int4", "topk:3"])
def test_encoded_rows_are_read_by_the_loss_on_the_device(teachers, watched, tmp_path, encoding):
    store = write_store(tmp_path / "s.zarr", teachers[0], encoding=encoding)
    for method in ("kd", "dtd-cwsm" if encoding == "topk:3" else "dtd-flsw"):
        watched(make_recipe([store], method=method, limit=64, batch_size=16))


def test_mixed_views_are_rendered_on_the_device(watched):
    watched(make_recipe(view=MIXED, batch_size=16))


def test_waiting_is_noticed():
    values = torch.zeros(3, device=META)
    calls = {
        "item": lambda: values.sum().item(),
        "bool": lambda: bool(values.any()),
        "nonzero": lambda: values.nonzero(),
        "masked_select": lambda: values.masked_select(values > 0),
        "mask": lambda: values[values > 0],
        "copy": lambda: torch.zeros(3).to(META),
        "copy_": lambda: values.copy_(torch.zeros(3)),
        "number": lambda: torch.tensor([1.0], device=META),
        "new_tensor": lambda: values.new_tensor([1.0]),
    }
    for name, call in calls.items():
        with contextlib.suppress(WaitsForTheDevice), Literals(), Waits():
            call()
            pytest.fail(f"{name} is not noticed")
    with Literals(), Waits():
        values.copy_(torch.zeros(3), non_blocking=True)
        torch.zeros(3).to(META, non_blocking=True)
        values[torch.zeros(2, dtype=torch.int64, device=META)]


def test_a_moving_average_is_the_one_of_torch():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    ours, theirs = averaged(module, 0.9), averaged(module, 0.9)
    for seed in range(4):
        module(torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))).sum().backward()
        with torch.no_grad():
            for value in module.parameters():
                value.sub_(0.1 * value.grad)
        update_average(ours, module)
        theirs.update_parameters(module)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


class Recorder:
    """A stream that does its work at once and records in which order."""

    def __init__(self):
        self.seen = []

    @contextlib.contextmanager
    def queue(self):
        self.seen.append("copy")
        yield

    def mark(self):
        return self.seen.count("copy") - 1

    def wait(self, event, tensors):
        self.seen.append((event, len(list(tensors))))


def test_batches_are_copied_one_ahead_with_their_targets(stores):
    run = prepare(make_recipe(stores, limit=50, batch_size=16), CPU)
    fetched, recorder = [], Recorder()

    def fetch(rows, step):
        fetched.append(step.batch)
        return run.targets.fetch(rows)

    ahead = CopiesAhead(recorder, fetch, sizes=[8])
    given = list(run.batches(0))
    for index, batch in enumerate(ahead.batches(given, lambda batch: [batch], first=2)):
        assert batch is given[index]
        step = Step(0, 2 + index)
        targets = ahead.fetch(batch, step)
        assert torch.equal(targets.logits[2].values, run.targets.fetch(batch).logits[2].values)
        assert list(batch.rendered) == [8]
        # Other rows, such as those of a micro-batch, are fetched in the step.
        assert len(ahead.fetch(batch.split(2)[0], step).logits[0].values) == len(batch.split(2)[0])
    assert recorder.seen[:4] == ["copy", "copy", (0, 6), "copy"]
    assert [event for event in recorder.seen if event != "copy"] == [(index, 6) for index in range(4)]
    assert fetched == [2, 3, 2, 4, 3, 5, 4, 5]


def test_an_error_while_copying_ends_the_epoch(stores):
    run = prepare(make_recipe(stores, limit=50, batch_size=16), CPU)

    def fetch(rows, step):
        raise StoreDamaged("damaged")

    batches = CopiesAhead(Recorder(), fetch, sizes=[8]).batches(run.batches(0), lambda batch: [batch])
    with pytest.raises(StoreDamaged):
        next(batches)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in METHODS if name not in WAITING])
def test_a_step_does_not_wait_for_a_gpu(stores_of, name):
    steps = steps_of(recipe_of(name, stores_of), torch.device("cuda"))
    next(steps)
    run_unwaited(steps)


ON_CUDA = {**CASES, "float16": {"precision": "float16", "optimizer": {"clip": 1.0}}}
"""Scaling of gradients, which torch offers for few devices, is tested on CUDA alone."""


@pytest.mark.gpu
@pytest.mark.parametrize("fields", ON_CUDA.values(), ids=ON_CUDA)
def test_a_step_of_any_kind_does_not_wait_for_a_gpu(stores_of, fields):
    steps = steps_of(recipe_of("kd", stores_of, **fields), torch.device("cuda"))
    next(steps)
    run_unwaited(steps)


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", ["float16", "int8", "int4", "topk:3"])
def test_encoded_rows_do_not_wait_for_a_gpu(teachers, tmp_path, encoding):
    store = write_store(tmp_path / "s.zarr", teachers[0], encoding=encoding)
    for method in ("kd", "dtd-cwsm" if encoding == "topk:3" else "dtd-flsw"):
        steps = steps_of(make_recipe([store], method=method, limit=64, batch_size=16), torch.device("cuda"))
        next(steps)
        run_unwaited(steps)


@pytest.mark.gpu
def test_mixed_views_do_not_wait_for_a_gpu():
    steps = steps_of(make_recipe(view=MIXED, batch_size=16), torch.device("cuda"))
    next(steps)
    run_unwaited(steps)


@pytest.mark.gpu
def test_copies_ahead_are_those_of_their_batch_on_a_gpu(stores):
    recipe = make_recipe(stores, limit=800, batch_size=16)
    run, here = prepare(recipe, torch.device("cuda")), prepare(recipe, CPU)
    state, seen = make_state(run), []
    copied, fetch = copied_ahead(
        [state], run.batches(0), run.targets, lambda rows, _: run.targets.fetch(rows), 0, 0, whole=True
    )
    busy = torch.eye(2048, device="cuda")
    for index, batch in enumerate(copied):
        for _ in range(20):  # reads come long after the copies of later batches
            busy = busy @ busy
        logits = fetch(batch, Step(0, index)).logits
        seen.append(
            [batch.pixels(8).clone(), batch.labels.clone(), *(rows.values.clone() for rows in logits)]
        )
    torch.cuda.synchronize()
    for found, batch in zip(seen, here.batches(0), strict=True):
        expected = [
            batch.pixels(8),
            batch.labels,
            *(rows.values for rows in here.targets.fetch(batch).logits),
        ]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.cpu(), other)


@pytest.mark.gpu
def test_an_evaluation_waits_for_a_gpu_at_its_end(stores_of):
    run = prepare(recipe_of("kd", stores_of), torch.device("cuda"))
    network = make_state(run).network
    view = evaluation_view(run.evaluation)
    with Renderer(run.evaluation, view, [8], pin=True, background=True) as renderer:
        evaluate(network, run.evaluation, run.device, renderer=renderer)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                evaluate(network, run.evaluation, run.device, renderer=renderer)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    waits = [each for each in found if "synchronizing CUDA operation" in str(each.message)]
    assert len(waits) <= 2, "the sums and the calibration error are read once"
