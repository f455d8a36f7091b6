"""Students that learn from each other: losses, gradients, order of updates, runs, and what is refused."""

import json
import shutil
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from builders import CPU, make_recipe, write_store, write_teacher
from click.testing import CliRunner
from safetensors.torch import load_file
from spawned import DROPPING
from stopping import Stopped
from test_distill_published import agree, figures

from coursepack.data import open_source
from coursepack.data.batches import batches
from coursepack.data.store import StoreReader
from coursepack.distill.cli import main
from coursepack.distill.losses.base import LossInputs, Step, StudentOutput
from coursepack.distill.methods.peers import PEERS
from coursepack.distill.objective import Objective
from coursepack.distill.recipe import TrainRecipe, resolve_objective
from coursepack.distill.runs.folder import load_run, load_runs
from coursepack.distill.runs.sweep import Student, sweep
from coursepack.distill.runs.train import train
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.training.evaluate import evaluation_view
from coursepack.distill.training.group import make_group
from coursepack.distill.training.learner import network_input
from coursepack.distill.training.loop import new_metrics, train_steps
from coursepack.distill.training.step import train_step
from coursepack.errors import RecipeError, RunError
from coursepack.models import load_teacher
from coursepack.models.networks import NETWORKS

STUDENT = sys.modules["coursepack.distill.runs.student"]
SMALL = {"limit": 150, "batch_size": 32, "epochs": 3}


def group_recipe(*networks, method="dml", **fields):
    """A group of students of the digits."""
    first, *peers = networks or ("digits-small", "digits-cnn")
    return make_recipe(
        student=first, peers=peers, method=method, **{"limit": 150, "batch_size": 32, **fields}
    )


def step_once(setup, group, *, parts=1):
    """The values of one step's objectives, and the gradients that it left."""
    batch, told = next(setup.batches(0)), []

    def fetch(rows, _step):
        return None if setup.targets is None else setup.targets.fetch(rows)

    def log(_state, output, _rows):
        told.append(output.value)

    train_step([group], batch, fetch, Step(), micro_batches=parts, log=log)
    return batch, told


def kl(p, q):
    """KL(p || q) of logits per row, float64."""
    p, q = p.double().log_softmax(1), q.double().log_softmax(1)
    return (p.exp() * (p - q)).sum(1)


def test_students_of_one_network_start_from_weights_of_their_own():
    setup = prepare(group_recipe("digits-small", "digits-small", "digits-small"), CPU)
    weights = [state.learner.network.module.hidden.weight for state in make_group(setup)]
    assert not any(torch.equal(one, other) for one, other in pairwise(weights))
    alone = make_group(prepare(make_recipe(limit=150, batch_size=32), CPU))[0]
    assert torch.equal(alone.learner.network.module.hidden.weight, weights[0]), "the first has the run's seed"


def test_each_student_follows_the_others_detached():
    setup = prepare(group_recipe("digits-small", "digits-cnn", "digits-mlp"), CPU)
    group = make_group(setup)
    batch = next(setup.batches(0))
    logits = [state.learner.logits(batch).detach().double() for state in group]
    _, told = step_once(setup, group)
    for index, value in enumerate(told):
        others = [each for other, each in enumerate(logits) if other != index]
        want = sum(kl(other, logits[index]).mean() for other in others) / 2
        assert value.terms["mutual"].item() == pytest.approx(want.item(), rel=1e-5)
        own = logits[index].clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(own, batch.labels)
        loss = loss + sum(kl(other, own).mean() for other in others) / 2
        (gradient,) = torch.autograd.grad(loss, own)
        head = group[index].learner.network.module.head
        agree(head.bias.grad, gradient.sum(0))


@pytest.mark.parametrize(("changes", "kind"), [
    ({}, "chxy95"),
    ({"reduction": "sum"}, "official"),
])  # fmt: skip
def test_published_mutual_learning(changes, kind):
    """The official code has 1e-8 inside of its logarithm, which is below the bound."""
    held = figures("dml")
    config = resolve_objective("dml", {"terms": {"mutual": changes}}, "test", classes=5)
    for index in range(2):
        own = held["logits"][index].clone().requires_grad_()
        inputs = LossInputs(StudentOutput(own), held["labels"], peers=(held["logits"][1 - index],))
        value = Objective(config)(inputs)
        value.loss.backward()
        agree(value.loss, held[f"{kind}_losses"][index])
        agree(own.grad, held[f"grad_{kind}_{index}"])


def test_published_reverse_divergence_of_codistillation():
    held = figures("dml")
    changes = {"hard_weight": 0.0, "terms": {"mutual": {"divergence": "reverse_kl"}}}
    config = resolve_objective("dml", changes, "test", classes=5)
    own = held["logits"][0].clone().requires_grad_()
    value = Objective(config)(LossInputs(StudentOutput(own), held["labels"], peers=(held["logits"][1],)))
    value.loss.backward()
    agree(value.loss, held["codistillation_kl_divergence"])
    agree(own.grad, held["grad_codistillation_kl_divergence"])


def test_a_frozen_peer_is_a_teacher(tmp_path, teachers):
    """Mutual learning with a peer that keeps its weights equals `kd` from the store of that network."""
    store = write_store(tmp_path / "t.zarr", teachers[0])
    same = {"limit": 150, "batch_size": 32, "view": "none", "epochs": 1}
    view = StoreReader(store).manifest.identity["view"]["recipe"]
    numbers = {"soft_weight": 1.0, "hard_weight": 1.0, "temperature": 1.0}
    kd = prepare(make_recipe([store], objective=numbers, **{**same, "view": view}), CPU)
    objective = {"exchange": {"train_peers": False}}
    recipe = make_recipe(method="dml", peers=[f"run:{teachers[0]}"], objective=objective,
                         **{**same, "view": view, "views": 2})  # fmt: skip
    mutual = prepare(recipe, CPU)
    group, alone = make_group(mutual), make_group(kd)
    before = {name: value.clone() for name, value in group[1].learner.state_dict().items()}
    for setup, states in ((mutual, group), (kd, alone)):
        logs = [new_metrics(state) for state in states]
        for _ in train_steps([states], setup.batches(0), setup.targets, logs):
            pass
    for (name, got), want in zip(
        group[0].learner.network.module.state_dict().items(),
        alone[0].learner.network.module.state_dict().values(),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=name)
    after = group[1].learner.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("method", sorted(PEERS))
def test_peers_that_keep_their_weights_are_not_trained(method, tmp_path):
    peers = [f"run:{write_teacher(tmp_path / 'cnn', 'digits-cnn')}"] * (2 if method == "okddip" else 1)
    recipe = group_recipe("digits-cnn", *peers, method=method,
                          objective={"exchange": {"train_peers": False}})  # fmt: skip
    setup = prepare(recipe, CPU)
    group = make_group(setup)
    modules = [state.learner.network.module for state in group]
    before = [{name: value.clone() for name, value in module.named_parameters()} for module in modules]
    step_once(setup, group)
    trained = [
        any(not torch.equal(values[name], value) for name, value in module.named_parameters())
        for module, values in zip(modules, before, strict=True)
    ]
    assert trained == [True, *[False for _ in peers]]


def test_sequential_updates_follow_current_weights():
    order = {"exchange": {"order": "sequential"}}
    setup = prepare(group_recipe(objective=order, optimizer={"lr": 0.5}), CPU)
    group, told = make_group(setup), []
    batch = next(setup.batches(0))
    before = [state.learner.logits(batch).detach() for state in group]
    _, told = step_once(setup, group)
    assert told[0].terms["mutual"].item() == pytest.approx(kl(before[0], before[1]).mean().item(), rel=1e-5)
    with torch.no_grad():
        updated = group[1].learner.logits(batch)
    want = kl(updated, before[0]).mean().item()
    assert told[1].terms["mutual"].item() == pytest.approx(want, rel=1e-5)
    assert abs(want - kl(before[1], before[0]).mean().item()) > 1e-3, "the step changed the peer"


def test_targets_in_eval_mode_leave_running_statistics_alone(monkeypatch):
    monkeypatch.setitem(NETWORKS, "dropping", DROPPING)
    for mode in ("train", "eval"):
        objective = {"exchange": {"mode": mode, "order": "sequential"}}
        setup = prepare(group_recipe("digits-resnet", "digits-resnet", objective=objective), CPU)
        group = make_group(setup)
        step_once(setup, group)
        counts = {
            int(value)
            for state in group
            for name, value in state.learner.network.module.state_dict().items()
            if name.endswith("num_batches_tracked")
        }
        assert counts == {1}, "a student's statistics see each batch once"


def test_accumulation_equals_the_whole_batch():
    gradients = []
    for parts in (1, 4):
        setup = prepare(group_recipe(accumulate=parts), CPU)
        group = make_group(setup)
        step_once(setup, group, parts=parts)
        gradients.append([state.learner.network.module.head.weight.grad.clone() for state in group])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def run_files(folder):
    """All files of a run but those that tell the time."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "metrics.jsonl"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def told(folder):
    return [[{**line, "seconds": None} for line in run.metrics] for run in load_runs(folder)]


def test_a_group_that_was_killed_while_it_finished_is_finished_again(tmp_path, monkeypatch):
    recipe = group_recipe(epochs=2)
    train(recipe, tmp_path / "once", device=CPU)
    finish = STUDENT.StudentRun.finish

    def dies_second(run):
        if run.folder.path.name == "1":
            raise Stopped
        finish(run)

    with monkeypatch.context() as patch:
        patch.setattr(STUDENT.StudentRun, "finish", dies_second)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "run", device=CPU, checkpoint_seconds=0)
    assert (tmp_path / "run" / "0" / "student.safetensors").is_file()
    train(recipe, tmp_path / "run", device=CPU, resume=True)
    assert run_files(tmp_path / "run") == run_files(tmp_path / "once")


def test_every_student_is_a_run_and_the_ensemble_is_a_row(tmp_path):
    folder = tmp_path / "o"
    train(group_recipe(epochs=2), folder, device=CPU)
    for index, network in enumerate(("digits-small", "digits-cnn")):
        run = load_run(folder / str(index))
        assert (run.recipe.student, run.recipe.member) == (network, index)
        loaded = load_teacher(f"run:{folder / str(index)}", tuple("0123456789"))
        assert loaded.spec == network
    weights = load_file(folder / "1" / "student.safetensors")
    assert any(name.startswith("conv1") for name in weights)
    result = CliRunner().invoke(main, ["compare", str(folder), "--json"], catch_exceptions=False)
    rows = json.loads(result.stdout)
    assert [row["label"] for row in rows] == [
        "dml digits-small (student 0 of 2)",
        "dml digits-cnn (student 1 of 2)",
        "dml ensemble of digits-small + digits-cnn",
    ]
    with pytest.raises(RunError, match=r"the run of several students, expected one of them: .*/0, .*/1"):
        load_run(folder)
    with pytest.raises(RunError, match=r"is of several students: name one of them, as in run:.*/0"):
        load_teacher(f"run:{folder}", tuple("0123456789"))


def test_the_ensemble_is_the_mean_of_probabilities(tmp_path):
    folder = tmp_path / "o"
    train(group_recipe(epochs=1), folder, device=CPU)
    source = open_source("digits:test")
    networks = [load_teacher(f"run:{folder / name}", source.class_names) for name in "01"]
    (batch,) = batches(source, evaluation_view(source), np.arange(len(source.labels)), views=[0],
                       batch_size=len(source.labels), device=CPU)  # fmt: skip
    with torch.no_grad():
        probs = [
            each.module.eval()(network_input(batch, each.preprocessing)).double().softmax(1)
            for each in networks
        ]
    mean = torch.stack(probs).mean(0)
    want = load_runs(folder)[-1].metrics[-1]["evaluation"]
    assert want["accuracy"] == pytest.approx((mean.argmax(1) == batch.labels).double().mean().item())
    assert want["nll"] == pytest.approx(
        -mean.log()[torch.arange(len(mean)), batch.labels].mean().item(), rel=1e-5
    )


def test_peers_and_stores_together(stores, tmp_path):
    recipe = make_recipe(stores[:2], method="dml", peers=["digits-cnn"], limit=150,
                         objective={"soft_weight": 0.9, "temperature": 2.0})  # fmt: skip
    setup = prepare(recipe, CPU)
    _, values = step_once(setup, make_group(setup))
    assert all({"soft_target", "mutual"} <= value.terms.keys() for value in values)
    train(recipe, tmp_path / "o", device=CPU)
    assert "teachers" in load_run(tmp_path / "o" / "1").metrics[-1]


def test_a_sweep_trains_groups(tmp_path):
    students = [Student(f"seed={seed}", group_recipe(epochs=1, seed=seed)) for seed in (0, 1)]
    sweep(students, tmp_path / "together", device=CPU, together=2)
    train(students[1].recipe, tmp_path / "alone", device=CPU)
    assert run_files(tmp_path / "together" / "seed=1") == run_files(tmp_path / "alone")
    shutil.rmtree(tmp_path / "together" / "seed=0")
    sweep(students, tmp_path / "together", device=CPU, resume=True)
    assert len(load_runs(tmp_path / "together" / "seed=0")) == 3


def refusal(**fields):
    with pytest.raises(RecipeError) as error:
        prepare(make_recipe(**{"limit": 150, **fields}), CPU)
    return str(error.value)


def test_refusals():
    assert refusal(method="dml", peers=[]) == (
        "method 'dml' trains students that learn from each other (exchange 'outputs'), expected 2 or more of "
        "them, got 1: repeat --student NAME, or give --peers N for N students of one network"
    )
    assert "there are 2 students, but those of method 'supervised' do not learn from each other" in refusal(
        peers=["digits-cnn"]
    )


def test_a_peer_of_other_classes_is_refused(tmp_path):
    five = write_teacher(tmp_path / "five", classes=5)
    setup = prepare(make_recipe(method="dml", peers=[f"run:{five}"], limit=150), CPU)
    with pytest.raises(Exception, match="has 5 classes, but the source has 10"):
        make_group(setup)


def test_students_on_the_command_line(tmp_path):
    words = [
        "train",
        "--source",
        "digits",
        "--view",
        "digits",
        "--method",
        "dml",
        "--epochs",
        "1",
        "--limit",
        "100",
    ]
    out = str(tmp_path / "o")
    result = CliRunner().invoke(main, [*words, "--student", "digits-small", "--peers", "3", "--out", out])
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == [
        f"{out}/0", f"{out}/1", f"{out}/2", f"{out} ensemble",
    ]  # fmt: skip
    several = ["--student", "digits-small", "--student", "digits-cnn"]
    result = CliRunner().invoke(main, [*words, *several, "--peers", "3", "--out", str(tmp_path / "p")])
    assert result.exit_code == 1
    assert "--peers 3 trains 3 students of one network, but several are named" in result.output
    recipe = TrainRecipe.model_validate(load_run(tmp_path / "o" / "2").recipe.model_dump(mode="json"))
    assert recipe.own_seed != recipe.seed == 0
