"""Codistillation: losses with stale weights, rows of each student, one process and several."""

import json
import os
import signal
import time
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import CPU, make_recipe
from click.testing import CliRunner
from moments import at_rename, die, stop
from safetensors.torch import load_file, save_file
from spawned import DROPPING, run, running
from stopping import interrupted
from test_distill_peers import kl, run_files, told
from test_distill_published import agree

from coursepack.distill.cli import main
from coursepack.distill.losses.base import Step
from coursepack.distill.runs.folder import load_run
from coursepack.distill.runs.sweep import Student, sweep
from coursepack.distill.runs.train import train
from coursepack.distill.setup.checks import check_ranks
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.training.group import make_group
from coursepack.distill.training.learner import network_input
from coursepack.distill.training.loop import new_metrics, train_steps
from coursepack.distill.training.step import train_step
from coursepack.errors import RecipeError, RunError
from coursepack.models.networks import NETWORKS

NETWORK = ("digits-small", "digits-small", "digits-small")


def group_recipe(*networks, every=3, objective=None, **fields):
    """A group of students of the digits, 33 samples each."""
    student, *peers = networks or NETWORK
    exchange = {"every": every, **(objective or {}).pop("exchange", {})}
    objective = {"exchange": exchange, **(objective or {})}
    fields = {"limit": 100, "batch_size": 16, **fields}
    return make_recipe(student=student, peers=peers, method="codistillation", objective=objective, **fields)


def replica_recipe(index, folder, count=3, **fields):
    """One of several replicas of a student, counted from 0."""
    recipe = group_recipe("digits-small", **fields)
    return recipe.model_copy(update={"member": index, "replicas": count, "group": str(folder)})


def steps_of(setup, group, *, epochs=1, accumulate=1):
    """Train a group step by step; yields before each step and after it, with the objectives' values."""
    for epoch in range(epochs):
        for batch in setup.batches(epoch):
            values = {}

            def log(state, output, _rows, values=values):
                values.setdefault([id(each) for each in group].index(id(state)), []).append(output.value)

            yield batch, values
            step = Step(epoch)
            train_step([group], batch, lambda *_: None, step, micro_batches=accumulate, log=log)
            yield batch, values


def test_students_follow_the_stale_weights_of_the_others():
    """Losses and gradients in float64, of networks with batch normalization and dropout among them."""
    NETWORKS["dropping"] = DROPPING
    try:
        recipe = group_recipe("digits-resnet", "dropping", "digits-cnn", optimizer={"lr": 0.1})
        setup = prepare(recipe, CPU)
        group, held = make_group(setup), []
        steps = steps_of(setup, group, epochs=2)
        for number, (batch, values) in enumerate(steps):
            networks = [state.learner.network for state in group]
            if number % 3 == 0:
                held = [deepcopy(network.module).eval() for network in networks]
            stale, want = [], []
            for index in range(3):
                rows = batch.of_student(index)
                others = [other for other in range(3) if other != index]
                with torch.no_grad():
                    stale.append([held[o](network_input(rows, networks[o].preprocessing)) for o in others])
            before = [deepcopy(network.module) for network in networks]
            next(steps)
            for index, state in enumerate(group):
                rows = batch.of_student(index)
                seed = (rows.device, 0)
                state.steps -= 1
                state.seed_step(*seed)
                state.steps += 1
                module = before[index].train()
                own = module(network_input(rows, networks[index].preprocessing)).double()
                own = own.detach().requires_grad_()
                loss = torch.nn.functional.cross_entropy(own, rows.labels)
                loss = loss + sum(kl(other, own).mean() for other in stale[index]) / 2
                (gradient,) = torch.autograd.grad(loss, own)
                want.append(loss.item())
                agree(networks[index].module.head.bias.grad, gradient.sum(0))
            assert [value.loss.item() for (value,) in values.values()] == pytest.approx(want, rel=1e-5)
        assert number == 5, "two epochs of three steps, or the weights were never refreshed"
    finally:
        del NETWORKS["dropping"]


def test_first_exchange_comes_after_the_burn_in():
    objective = {"exchange": {"burn_in": 2}}
    setup = prepare(group_recipe(objective=objective), CPU)
    group = make_group(setup)
    exchange = group[0].learner.exchange
    refreshed, follows, ages = [], [], []
    for number, (_, values) in enumerate(steps := steps_of(setup, group, epochs=4)):
        before = [deepcopy(state.learner.network.module.state_dict()) for state in group]
        moved, staleness = exchange.record.moved, exchange.record.staleness
        next(steps)
        follows += ["mutual" in value.terms for (value,) in values.values()]
        ages.append((exchange.record.staleness - staleness) // 2)
        if exchange.record.moved > moved:
            refreshed.append(number)
            for weights, module in zip(before, exchange.copies, strict=True):
                held = module.state_dict()
                assert all(torch.equal(held[name], value) for name, value in weights.items())
    assert refreshed == [2, 5, 8, 11]
    assert follows == [False] * 6 + [True] * 30
    assert ages == [0, 0, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    size = sum(value.numel() * 4 for value in before[0].values())
    assert exchange.epoch_metrics() == {
        "peers": pytest.approx(20 / 12),
        "staleness": pytest.approx(0.9),
        "steps_alone": 2,
        "bytes": 4 * 3 * size,
        "missed": 0,
    }
    assert exchange.epoch_metrics()["bytes"] == 0, "every epoch is counted by itself"


@pytest.mark.parametrize("views", [1, 2])
def test_every_student_reads_rows_of_its_own(tmp_path, views):
    """They are disjoint, alike in classes, and in an order that the number of processes does not change."""
    fields = {"views": 4, "views_per_load": views}
    setup = prepare(group_recipe(**fields), CPU)
    shares = []
    assert setup.steps_per_epoch == len(list(setup.batches(0))) == (3 if views == 1 else 5)
    for index in range(3):
        alone = prepare(replica_recipe(index, tmp_path, **fields), CPU)
        together = [batch.of_student(index) for batch in setup.batches(1)]
        assert alone.steps_per_epoch == len(together)
        for mine, own in zip(together, alone.batches(1), strict=True):
            assert np.array_equal(mine.samples, own.samples)
            assert np.array_equal(mine.views, own.views)
        shares.append(np.unique(np.concatenate([each.samples for each in together])))
        assert np.array_equal(shares[-1], alone.samples)
        assert set(np.bincount(setup.source.labels[shares[-1]])) <= {3, 4}
    assert [len(share) for share in shares] == [33, 33, 33]
    assert np.array_equal(np.sort(np.concatenate(shares)), setup.samples)
    assert set(setup.samples) < set(prepare(make_recipe(limit=100), CPU).samples)
    later = [batch.samples for batch in setup.batches(1, first=2)]
    assert np.array_equal(later[0], list(setup.batches(1))[2].samples)


def test_pixels_are_rendered_once_for_all_students():
    batch = next(prepare(group_recipe(), CPU).batches(0))
    whole = batch.pixels(8)
    parts = [batch.of_student(index).pixels(8) for index in range(3)]
    assert torch.equal(torch.cat(parts), whole)
    assert parts[1].data_ptr() == whole[16].data_ptr()


def test_all_students_can_read_all_rows():
    setup = prepare(group_recipe(objective={"exchange": {"rows": "shared"}}), CPU)
    group = make_group(setup)
    assert setup.steps_per_epoch == 7
    assert len(setup.samples) == 100
    for batch, _ in (steps := steps_of(setup, group)):
        assert all(state.learner.rows_for(batch) is batch for state in group)
        next(steps)


def test_micro_batches_hold_rows_of_every_student():
    gradients = []
    for parts in (1, 3):
        setup = prepare(group_recipe(), CPU)
        group = make_group(setup)
        steps = steps_of(setup, group, accumulate=parts)
        batch, values = next(steps)
        next(steps)
        assert [len(each) for each in values.values()] == [parts] * 3
        gradients.append([state.learner.network.module.head.weight.grad.clone() for state in group])
        whole = [set(batch.of_student(index).samples) for index in range(3)]
        for part in batch.split(parts):
            assert all(set(part.of_student(index).samples) <= whole[index] for index in range(3))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("saves", [1, 4, 8])
def test_a_group_goes_on_to_the_last_bit(tmp_path, monkeypatch, saves):
    monkeypatch.setitem(NETWORKS, "dropping", DROPPING)
    objective = {"exchange": {"burn_in": 1}}
    recipe = group_recipe("dropping", "digits-small", every=4, objective=objective, epochs=3)
    train(recipe, tmp_path / "once", device=CPU)
    interrupted(monkeypatch, recipe, tmp_path / "run", saves=saves)
    train(recipe, tmp_path / "run", device=CPU, resume=True)
    assert run_files(tmp_path / "run") == run_files(tmp_path / "once")
    assert told(tmp_path / "run") == told(tmp_path / "once")
    assert not (tmp_path / "run" / "exchange.safetensors").exists(), "copies of the students are no result"


def test_a_sweep_gives_students_their_own_batches(tmp_path):
    """Students that read rows of their own are not trained together with others."""
    alone = make_recipe(limit=100, batch_size=16)
    students = [Student("alone", alone), Student("group", group_recipe())]
    sweep(students, tmp_path / "together", device=CPU, together=2)
    train(students[1].recipe, tmp_path / "group", device=CPU)
    assert run_files(tmp_path / "together" / "group") == run_files(tmp_path / "group")


def test_stores_and_codistillation_together(stores):
    recipe = make_recipe(stores[:2], method="codistillation", peers=["digits-cnn"], limit=100,
                         batch_size=16, objective={"soft_weight": 0.5})  # fmt: skip
    setup = prepare(recipe, CPU)
    group = make_group(setup)
    logs = [new_metrics(state) for state in group]
    for _ in train_steps([group], setup.batches(0), setup.targets, logs):
        pass
    assert all({"soft_target", "mutual"} <= log.means().keys() for log in logs)


# Replicas.


def replica(index, folder, **fields):
    """A replica, counted from 0, and its training step by step."""
    setup = prepare(replica_recipe(index, folder, every=1, **fields), CPU)
    group = make_group(setup)
    return group, steps_of(setup, group, epochs=9)


def one_step(steps):
    """The terms of the next step."""
    _, values = next(steps)
    next(steps)
    return values[0][0].terms


def test_replicas_follow_the_newest_files_of_the_others(tmp_path):
    (first,), steps = replica(0, tmp_path, objective={"hard_weight": 0.5})
    (second,), others = replica(1, tmp_path, objective={"hard_weight": 0.5})
    assert "mutual" not in one_step(steps), "there is no other yet"
    weights = deepcopy(second.learner.network.module)
    assert "mutual" in one_step(others)
    assert load_file(tmp_path / "replica-2.safetensors").keys() == weights.state_dict().keys()
    batch, values = next(steps)
    images = network_input(batch, first.learner.network.preprocessing)
    with torch.no_grad():
        want = kl(weights(images), first.learner.network.module(images)).mean().item()
    next(steps)
    assert values[0][0].terms["mutual"].item() == pytest.approx(want, rel=1e-5)
    record = first.learner.exchange.record
    sizes = [(tmp_path / f"replica-{index}.safetensors").stat().st_size for index in (1, 2)]
    assert record.moved == 2 * sizes[0] + sizes[1]
    assert first.learner.exchange.epoch_metrics() == {
        "peers": 0.5, "staleness": 1.0, "steps_alone": 1, "bytes": record.moved, "missed": 0,
    }  # fmt: skip
    one_step(steps)
    assert record is not first.learner.exchange.record
    assert first.learner.exchange.record.moved == sizes[0], "a file that is the same is not read again"


def test_files_that_cannot_be_used_are_told_and_passed_over(tmp_path, capsys):
    (state,), steps = replica(0, tmp_path)
    good = {name: value + 1 for name, value in state.learner.network.module.state_dict().items()}
    file = tmp_path / "replica-2.safetensors"
    one_step(steps)
    nan = {name: value * float("nan") for name, value in good.items()}
    wide = {**good, "head.bias": torch.zeros(11)}
    less = {name: value for name, value in good.items() if name != "head.bias"}
    cases = [
        (lambda: file.write_bytes(b"\1" * 100), "cannot be read: "),
        (lambda: file.write_bytes(b""), "cannot be read: "),
        (lambda: file.write_bytes(b"\0" * (1 << 22)), "has 4,194,304 bytes, expected at most"),
        (lambda: save_file(good, file), "its number of steps is ''"),
        (lambda: save_file(nan, file, {"steps": "3"}), "has values that are not finite"),
        (lambda: save_file(less, file, {"steps": "3"}), "'head.bias' is in one network only"),
        (lambda: save_file(wide, file, {"steps": "3"}), "'head.bias' is torch.float32 (11,), expected"),
    ]
    for write, text in cases:
        write()
        capsys.readouterr()
        assert "mutual" not in one_step(steps)
        printed = capsys.readouterr().err
        assert f"weights of replica 2 are not used, since '{file}'" in printed
        assert text in printed
    save_file(good, file, {"steps": "3"})
    assert "mutual" in one_step(steps)
    file.write_bytes(b"\1" * 100)
    assert "mutual" in one_step(steps), "the weights that were read before are followed"


def wait_for(path):
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)


def test_no_replica_waits_for_another(tmp_path):
    """One is killed while it writes its weights and one is stopped; the third ends, and so do they later."""
    group, marker = tmp_path / "group", tmp_path / "stopped"
    words = ["--student", "digits-small", "--method", "codistillation", "--source", "digits", "--view"]
    words += ["digits", "--limit", 300, "--batch-size", 32, "--epochs", 3, "--checkpoint-seconds", 0]
    words += ["--set", "objective.exchange.every=2", "--group", group]

    def command(index):
        return ["distill", "train", *words, "--replica", f"{index}/3", "--out", tmp_path / f"r{index}"]

    stops = partial(at_rename, 3, partial(stop, marker), "replica-3.safetensors")
    dies = partial(at_rename, 3, die, "replica-2.safetensors")
    with running(*command(3), before=stops) as (process, finished):
        killed = run(*command(2), before=dies)
        assert killed.returncode == -signal.SIGKILL
        wait_for(marker)
        alone = run(*command(1))
        assert alone.returncode == 0, alone.stderr
        again = run(*command(2), "--resume")
        assert again.returncode == 0, again.stderr
        assert f"resuming {tmp_path / 'r2'} in epoch 0 after 4 batches" in again.stderr
        before = (group / "replica-3.safetensors").read_bytes()
        assert process.is_alive(), "it was stopped all the time"
        os.kill(process.pid, signal.SIGCONT)
        last = finished()
    assert last.returncode == 0, last.stderr
    assert (group / "replica-3.safetensors").read_bytes() != before
    assert sorted(file.name for file in group.iterdir() if file.name != "lock") == [
        "group.json", *(f"replica-{index}.{kind}" for index in (1, 2, 3) for kind in ("json", "safetensors")),
    ]  # fmt: skip
    exchanged = [load_run(tmp_path / f"r{index}").metrics[0]["exchange"] for index in (1, 2, 3)]
    assert exchanged[0]["peers"] == 2.0
    assert exchanged[0]["steps_alone"] == 0
    assert exchanged[0]["staleness"] < 0, "the others were ahead"
    runs = [str(tmp_path / f"r{index}") for index in (1, 2, 3)]
    rows = json.loads(CliRunner().invoke(main, ["compare", *runs, "--json"]).stdout)
    assert [row["label"] for row in rows] == [
        f"codistillation digits-small (replica {index} of 3)" for index in (1, 2, 3)
    ]


def test_a_group_of_another_recipe_is_refused(tmp_path):
    _, steps = replica(0, tmp_path / "g")
    one_step(steps)
    replica(1, tmp_path / "g", seed=7, accumulate=2)
    with pytest.raises(RunError) as error:
        replica(1, tmp_path / "g", batch_size=8, objective={"hard_weight": 0.5})
    assert str(error.value) == (
        f"group {str(tmp_path / 'g')!r} is of other replicas.\n"
        "  recipe.batch_size              group: 16    this run: 8\n"
        "  recipe.objective.hard_weight   group: 1.0   this run: 0.5\n"
        "Train with the values of the group, or give another --group."
    )
    with pytest.raises(RunError, match=r"recipe\.limit +group: 100 +this run: 90"):
        replica(1, tmp_path / "g", limit=90)
    with pytest.raises(RunError, match=r"recipe\.replicas +group: 3 +this run: 4"):
        replica(1, tmp_path / "g", count=4)
    (tmp_path / "g" / "group.json").write_text("{")
    with pytest.raises(RunError, match=r"group\.json' cannot be read \(is not JSON.*: give another --group"):
        replica(1, tmp_path / "g")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be read"):
        replica(1, tmp_path / "file")


def refused(*words, out):
    base = ["train", "--student", "digits-small", "--source", "digits", "--view", "digits", "--limit", "100"]
    result = CliRunner().invoke(main, [*base, *map(str, words), "--out", str(out)])
    assert result.exit_code == 1
    assert not out.exists()
    return result.output


@pytest.mark.parametrize("text", ["4/3", "0/3", "1/1", "1", "a/3", "1/3/3", "-1/3", ""])
def test_a_replica_that_does_not_exist_is_refused(tmp_path, text):
    assert (
        f"--replica is {text!r}, expected I/N with I from 1 to N, and N of at least 2, such as 1/3"
    ) in refused(
        "--method", "codistillation", "--replica", text, "--group", tmp_path / "g", out=tmp_path / "o"
    )


def test_refusals(tmp_path):
    out, method = tmp_path / "o", ["--method", "codistillation"]
    group = ["--group", tmp_path / "g"]
    assert "expected 2 or more of them, got 1" in refused(*method, out=out)
    assert "--replica 2/3 exchanges weights with the others through a folder or bucket: give --group DIR" in (
        refused(*method, "--replica", "2/3", out=out)
    )
    assert "is where replicas exchange weights, but this run is none: give --replica I/N, such as" in refused(
        *method, "--peers", 2, *group, out=out
    )
    assert "--replica 1/3 trains one student, but 2 are given: leave --peers out" in refused(
        *method, "--peers", 2, "--replica", "1/3", *group, out=out
    )
    for other in ("dml", "supervised"):
        assert (
            f"method {other!r} does not: choose --method codistillation, or leave --replica out"
            in refused("--method", other, "--replica", "1/3", *group, out=out)
        )
    assert not (tmp_path / "g").exists()
    recipe = group_recipe(*["digits-small"] * 8, limit=5)
    with pytest.raises(RecipeError, match="5 samples cannot be divided among 8 students: give a larger"):
        prepare(recipe, CPU)
    with pytest.raises(
        RecipeError, match="cannot be trained on 2 ranks, since every student is trained by one"
    ):
        check_ranks(group_recipe(), SimpleNamespace(count=2))
    late = replica_recipe(3, tmp_path)
    with pytest.raises(RecipeError, match="--replica 4/3: there are only 3 replicas"):
        prepare(late, CPU)


def test_a_smoke_run_of_a_replica_leaves_the_group_alone(tmp_path):
    words = ["train", "--student", "digits-small", "--source", "digits", "--view", "digits", "--smoke"]
    words += ["--method", "codistillation", "--replica", "2/2", "--group", str(tmp_path / "g")]
    result = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "o")])
    assert result.exit_code == 0, result.output
    assert load_run(tmp_path / "o").metrics[-1]["exchange"]["peers"] == 0
    assert not (tmp_path / "g").exists()
