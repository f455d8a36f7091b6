"""Every method: stores give the losses and gradients of live teachers, and runs read what is claimed."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from builders import CPU, PAIRS, PHASES, few_by_default, make_recipe
from click.testing import CliRunner
from helpers import make_job, rewrite_manifest

from coursepack.data import open_source
from coursepack.data.store import StoreReader
from coursepack.distill.cli import main as distill
from coursepack.distill.losses.base import Step
from coursepack.distill.methods import METHODS
from coursepack.distill.methods.description import needs_of
from coursepack.distill.recipe import set_values
from coursepack.distill.runs.train import train
from coursepack.distill.setup.build import read_arrays
from coursepack.distill.setup.costs import view_costs
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.training.loop import teachers_read
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError
from coursepack.kernels import decode
from coursepack.models import TeacherRunner, build_network, load_teacher
from coursepack.precompute import run_job

NOT_LIVE = {
    "supervised": "it has no teacher",
    "tf-kd": "its teacher is made up from the labels",
}
"""Methods that permit no live teachers, and why."""
CHECKED = {"simkd": {("resnet", "logits"): 40}}
"""Further arrays that a method reads a few rows of before the first step, to check the teacher's head."""
LIVE = [name for name, method in METHODS.items() if method.objective.needs().teachers]
EPOCHS = (0, 41)
"""Epochs that steps are taken from: before and after all warm-ups and changes of phase, one of each view."""
STUDENT, BATCH = "digits-cnn", 32
TOLERANCE = 1e-5


def recipe_of(name, stores, **fields):
    """A recipe of a method, with the pairs that it needs for these stores."""
    objective = {"terms": {name: {"pairs": PAIRS[name]}}} if name in PAIRS else {}
    if name in PHASES and fields["epochs"] < EPOCHS[-1]:
        values = {"objective": objective}
        set_values(values, PHASES[name])
    fields = {"student": STUDENT, "batch_size": BATCH, "optimizer": {"lr": 0.01}, **fields}
    return make_recipe(stores, method=name, objective=objective, **fields)


def gradients(learner, batch, targets, step):
    """The loss, its gradients by the names of the parameters, and the buffers, with memories updated."""
    inputs = learner.inputs(batch, learner.predict(batch), targets, step)
    loss = learner.objective(inputs).loss
    loss.backward()
    learner.objective.after_step(inputs)
    found = {name: value.grad for name, value in learner.named_parameters() if value.grad is not None}
    assert any(name.startswith("student.") for name in found)
    kept = {name: value for name, value in learner.named_buffers() if value.is_floating_point()}
    return loss.item(), found | {f"kept.{name}": value for name, value in kept.items()}


def differences(found, expected):
    """Differences of the loss, of the gradients of the student and of what else learns, and of buffers.

    They are absolute for losses below 1, and otherwise relative: of tensors to the largest value.
    """
    (loss, grads), (true_loss, true_grads) = found, expected
    assert grads.keys() == true_grads.keys()
    apart = [abs(loss - true_loss) / max(1.0, abs(true_loss))]
    for part in ("student.", "objective.", "kept."):
        names = [name for name in grads if name.startswith(part)]
        largest = max((true_grads[name].abs().max().item() for name in names), default=0.0)
        most = max(((grads[name] - true_grads[name]).abs().max().item() for name in names), default=0.0)
        apart.append(most / largest if largest else most)
    return apart


@pytest.fixture
def read(monkeypatch):
    """Bytes per sample of the arrays that are read, by the names of store and array."""
    found, components, rows_of = {}, StoreReader.components, StoreReader._rows_of

    def note(reader, array, parts):
        size = sum(part.nbytes // max(1, len(part)) for part in parts.values())
        found[reader.name, array] = max(found.get((reader.name, array), 0), size)
        return parts

    # The rows of several stores are read together, and go through the second function only.
    monkeypatch.setattr(
        StoreReader,
        "components",
        lambda self, array, *rest: note(self, array, components(self, array, *rest)),
    )
    monkeypatch.setattr(
        StoreReader, "_rows_of", lambda self, array, parts: rows_of(self, array, note(self, array, parts))
    )
    return found


@pytest.mark.parametrize("steps", [4, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LIVE)
def test_stores_and_live_teachers_give_the_same_losses_and_gradients(stores_of, read, name, steps):
    """The student learns from the stores; what live teachers would have taught it is computed on copies."""
    fields = {"limit": steps // len(EPOCHS) * BATCH, "epochs": EPOCHS[-1] + 1}
    recipes = [recipe_of(name, stores_of(name), online=online, **fields) for online in (False, True)]
    cached, live = (prepare(recipe, CPU) for recipe in recipes)
    state = make_state(cached)
    done, other, noticed = 0, None, 0.0
    for epoch in EPOCHS:
        state.learner.train()
        state.learner.begin_epoch(epoch)
        for number, batch in enumerate(cached.batches(epoch)):
            step = Step(epoch, number)
            teachers = teachers_read([state], step)
            read.clear()
            told = live.targets.fetch(batch, teachers)
            assert not read, "live teachers read no rows"
            state.begin_step()
            true, wrong = (
                None if targets is None else gradients(copy.deepcopy(state.learner), batch, targets, step)
                for targets in (told, other)
            )
            found = gradients(state.learner, batch, cached.targets.fetch(batch, teachers), step)
            assert max(differences(found, true)) <= TOLERANCE, (epoch, number)
            noticed = noticed if wrong is None else max(noticed, *differences(wrong, true)[1:])
            other = live.targets.fetch(batch)
            state.end_step()
            done += 1
    assert done == steps
    assert noticed > 100 * TOLERANCE, "targets of other samples change nothing, so equality says little"


@pytest.mark.parametrize("name", few_by_default(METHODS))
def test_runs_read_what_is_claimed(tmp_path, stores_of, read, name):
    stores = stores_of(name) if METHODS[name].objective.needs().teachers else []
    epochs = max(2, METHODS[name].objective.fusion.fewest_epochs(len(stores)))
    recipe = recipe_of(name, stores, limit=8 * BATCH, epochs=epochs)
    train(recipe, tmp_path / "run", device=CPU)
    readers = [StoreReader(store) for store in stores]
    needed = read_arrays(recipe, open_source(recipe.source), readers)
    costs = view_costs(recipe.objective, [reader.manifest for reader in readers], build_network(STUDENT, 10))
    assert [list(cost.arrays) for cost in costs] == needed
    claimed = {
        (reader.name, array): size
        for reader, cost in zip(readers, costs, strict=True)
        for array, size in cost.arrays.items()
    }
    assert read == claimed | CHECKED.get(name, {})
    if stores and name not in PAIRS:
        words = [word for store in stores for word in ("--store", str(store))]
        result = CliRunner().invoke(distill, ["methods", name, *words, "--student", STUDENT, "--json"])
        printed = json.loads(result.stdout)[0]["bytes"]
        assert [told["arrays_per_sample"] for told in printed.values()] == [cost.arrays for cost in costs]


@pytest.mark.parametrize("name", NOT_LIVE)
def test_methods_without_teachers_have_no_live_ones(stores, name):
    assert {"logits", "features", "teacher-head"}.isdisjoint(needs_of(name))
    for given, text in ((stores, "does not use teachers"), ([], "--online runs the teachers of stores live")):
        with pytest.raises(RecipeError, match=text):
            prepare(recipe_of(name, given, online=True), CPU)


def test_live_teachers_run_in_the_precision_of_their_store(tmp_path, teachers):
    """Outputs in bfloat16 differ from those in float32 by far more than the tolerance."""
    network = load_teacher(f"run:{teachers[1]}", open_source("digits").class_names)
    runner = TeacherRunner(network, precision="bfloat16")
    job = make_job(tmp_path / "cnn.zarr", teachers[1], encoding="float32", batch_size=BATCH)
    run_job(replace(job, runner=runner), quiet=True)
    recipes = [recipe_of("kd", [job.store], online=online, limit=BATCH) for online in (False, True)]
    cached, live = (prepare(recipe, CPU) for recipe in recipes)
    (batch,) = cached.batches(0)
    stored, told = (each.targets.fetch(batch).logits[0] for each in (cached, live))
    torch.testing.assert_close(decode(stored), told, rtol=TOLERANCE, atol=TOLERANCE)
    rewrite_manifest(job.store, lambda values: values["identity"].update(precision="tf32"))
    with pytest.raises(
        RecipeError, match=r"written in tf32, which device 'cpu' does not have.* --online out"
    ):
        prepare(recipes[1], CPU)


@pytest.mark.parametrize(
    "settings", [{}, {"channels_last": True}, pytest.param({"compiled": True}, marks=pytest.mark.integration)]
)
def test_live_teachers_have_the_layout_and_the_compiler_of_their_store(tmp_path, teachers, settings):
    network = load_teacher(f"run:{teachers[1]}", open_source("digits").class_names)
    runner = TeacherRunner(network, **settings)
    job = make_job(tmp_path / "cnn.zarr", teachers[1], encoding="float32", batch_size=BATCH, views=1)
    run_job(replace(job, runner=runner), quiet=True)
    cached, live = (
        prepare(recipe_of("kd", [job.store], online=online, limit=BATCH), CPU) for online in (False, True)
    )
    (told,) = live.targets.runners
    assert told.memory_layout == runner.memory_layout
    assert told.compiled == runner.compiled
    (batch,) = cached.batches(0)
    stored, computed = (each.targets.fetch(batch).logits[0] for each in (cached, live))
    torch.testing.assert_close(decode(stored), computed, rtol=TOLERANCE, atol=TOLERANCE)
