"""Updates against a plain loop with torch's optimizers: steps, schedules, clipping, averages, parts."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from builders import CPU, make_recipe
from safetensors.torch import load_file

from coursepack.data import open_source
from coursepack.distill.recipe import OptimizerConfig
from coursepack.distill.runs.folder import load_run
from coursepack.distill.runs.smoke import smoke_recipe
from coursepack.distill.runs.train import train
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.training.evaluate import evaluate
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.optimizer import make_optimizer
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError
from coursepack.models import build_network


def batches_of(run, epochs=3):
    return list(itertools.chain.from_iterable(run.batches(epoch) for epoch in range(epochs)))


def trained(run, epochs=3):
    """A state after some epochs, and what its updates were given."""
    state = make_state(run)
    for epoch in range(epochs):
        train_epoch([state], run.batches(epoch), run.targets, epoch, micro_batches=run.recipe.accumulate)
    return state


def plain_loop(run, make, *, clip=None, each=None):
    """The same training written by hand, with an optimizer of torch's; returns learner and norms."""
    learner = make_state(run).learner
    optimizer = make(learner)
    norms = []
    for step, batch in enumerate(batches_of(run)):
        targets = None if run.targets is None else run.targets.fetch(batch)
        loss = learner(batch, targets).value.loss
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            norms.append(sum(float(p.grad.double().square().sum()) for p in learner.parameters()) ** 0.5)
            for parameter in learner.parameters():
                parameter.grad *= min(1.0, clip / (norms[-1] + 1e-6))
        optimizer.step()
        if each is not None:
            each(step, learner.network.module, optimizer)
    return learner, norms


def nesterov(parameters, lr=0.05):
    """The default."""
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-4, nesterov=True)


def assert_close(got, want, **tolerance):
    got, want = got.state_dict(), want.state_dict()
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name, **tolerance)


@pytest.mark.parametrize(
    ("fields", "make"),
    [
        ({}, nesterov),
        (
            {"nesterov": False, "momentum": 0.5, "weight_decay": 0.01},
            lambda p: torch.optim.SGD(p, 0.05, momentum=0.5, weight_decay=0.01),
        ),
        ({"momentum": 0.0}, lambda p: torch.optim.SGD(p, 0.05, weight_decay=5e-4)),
        (
            {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99)},
            lambda p: torch.optim.AdamW(p, 0.01, betas=(0.8, 0.99), weight_decay=0.1),
        ),
    ],
    ids=["nesterov", "momentum", "plain", "adamw"],
)
def test_updates_are_those_of_a_plain_loop(fields, make):
    run = prepare(make_recipe(limit=300, student="digits-mlp", optimizer=fields), CPU)
    plain, _ = plain_loop(run, lambda learner: make(learner.parameters()))
    assert_close(trained(run).learner, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_fusions_latents_do_not_decay(stores, name):
    optimizer = {"name": name, "lr": 0.01, "weight_decay": 0.5}
    run = prepare(make_recipe(stores, method="amtml", limit=200, optimizer=optimizer), CPU)

    def make(learner):
        latents = [value for key, value in learner.named_parameters() if key.startswith("objective.fusion")]
        rest = [value for key, value in learner.named_parameters() if key.startswith("student")]
        assert (len(latents), len(rest)) == (2, 4)
        groups = [{"params": rest, "weight_decay": 0.5}, {"params": latents, "weight_decay": 0.0}]
        if name == "adamw":
            return torch.optim.AdamW(groups, 0.01)
        return torch.optim.SGD(groups, 0.01, momentum=0.9, nesterov=True)

    plain, _ = plain_loop(run, make)
    assert_close(trained(run).learner, plain, rtol=1e-4, atol=1e-5)


def test_a_schedule_sets_the_rate_of_every_step():
    fields = {"lr": 0.2, "schedule": {"shape": "one_cycle"}}
    run = prepare(make_recipe(limit=300, epochs=3, optimizer=fields), CPU)
    steps = run.steps_per_epoch * 3
    schedule = {}

    def make(learner):
        optimizer = nesterov(learner.parameters(), 0.2)
        schedule["one"] = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.2, total_steps=steps, cycle_momentum=False
        )
        return optimizer

    def step(number, _module, _optimizer):
        if number + 1 < steps:
            schedule["one"].step()

    plain, _ = plain_loop(run, make, each=step)
    assert_close(trained(run).learner, plain, rtol=1e-4, atol=1e-5)


def test_clipping_limits_the_norm_of_all_gradients_together(stores):
    recipe = make_recipe(stores[:2], method="amtml", limit=300, optimizer={"clip": 2.9, "lr": 0.01})
    run = prepare(recipe, CPU)

    def make(learner):
        latents = {id(value) for value in learner.objective.parameters()}
        groups = [
            {"params": [value for value in learner.parameters() if id(value) not in latents]},
            {"params": list(learner.objective.parameters()), "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)

    plain, norms = plain_loop(run, make, clip=2.9)
    assert min(norms) < 2.9 < max(norms), "only some of the steps are to be clipped"
    assert_close(trained(run).learner, plain, rtol=1e-4, atol=1e-5)


def test_the_average_follows_the_formula_and_is_what_is_evaluated_and_kept(tmp_path):
    recipe = make_recipe(limit=300, epochs=3, student="digits-resnet", optimizer={"ema": 0.8})
    run = prepare(recipe, CPU)
    averages = []

    def follow(step, module, _optimizer):
        now = {name: value.clone() for name, value in module.state_dict().items()}
        if step > 0:
            now = {
                name: 0.8 * averages[-1][name] + 0.2 * value if value.is_floating_point() else value
                for name, value in now.items()
            }
        averages.append(now)

    plain, _ = plain_loop(
        run,
        lambda learner: nesterov(learner.parameters()),
        each=follow,
    )
    out = tmp_path / "o"
    metrics = train(recipe, out, device=CPU)
    saved = load_file(out / "student.safetensors")
    floats = [name for name, value in saved.items() if value.is_floating_point()]
    assert any("running_var" in name for name in floats), "buffers are averaged too"
    for name in floats:
        torch.testing.assert_close(saved[name], averages[-1][name], rtol=1e-3, atol=1e-4, msg=name)
    raw = plain.network.module.state_dict()
    assert any((saved[name] - raw[name]).abs().max() > 1e-3 for name in floats)

    lines = load_run(out).metrics
    best = max(range(3), key=lambda epoch: lines[epoch]["evaluation"]["accuracy"])
    kept = load_file(out / "best.safetensors")
    at_best = averages[(best + 1) * run.steps_per_epoch - 1]
    for name in floats:
        torch.testing.assert_close(kept[name], at_best[name], rtol=1e-3, atol=1e-4, msg=name)
    assert metrics["evaluation"] == evaluated(saved)


def evaluated(weights, student="digits-resnet"):
    """What the test split says of weights."""
    network = build_network(student, 10)
    network.module.load_state_dict(weights)
    return evaluate(network, open_source("digits:test"), CPU)


def test_an_average_is_restored():
    run = prepare(make_recipe(limit=100, optimizer={"ema": 0.9}), CPU)
    state = trained(run)
    saved = copy.deepcopy(state.state())
    again = make_state(run)
    again.restore(saved)
    assert_close(again.average, state.average, rtol=0, atol=0)
    for each in (state, again):
        train_epoch([each], run.batches(3), None, 3)
    assert_close(again.average, state.average, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["supervised", "kd", "random", "amtml"])
def test_gradients_of_parts_are_those_of_the_batch(stores, method):
    chosen = () if method == "supervised" else stores
    objective = {"terms": {"angle": None}} if method == "amtml" else {}

    def after(parts):
        recipe = make_recipe(
            chosen, method=method, objective=objective, accumulate=parts, limit=100, batch_size=30
        )
        run = prepare(recipe, CPU)
        state = make_state(run)
        metrics = train_epoch([state], run.batches(0), run.targets, micro_batches=parts)[0]
        return state, metrics

    whole, metrics = after(1)
    for parts in (2, 7, 30):
        state, told = after(parts)
        assert_close(state.learner, whole.learner, rtol=1e-4, atol=1e-6)
        assert told["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
        assert told["accuracy"] == pytest.approx(metrics["accuracy"])


def test_parts_are_refused_where_samples_depend_on_each_other(stores):
    for method, text in (("amtml", "angle"), ("dtd-flsw", "dynamic_temperature")):
        with pytest.raises(RecipeError, match=rf"accumulate is 2, but method '{method}' relates.*{text}"):
            prepare(make_recipe(stores, method=method, accumulate=2), CPU)
    with pytest.raises(RecipeError, match="accumulate is 65, but batch_size is 64: a micro-batch"):
        prepare(make_recipe(accumulate=65), CPU)


def test_a_smoke_run_takes_whatever_an_update_may_be(tmp_path):
    fields = {"accumulate": 32, "patience": 1, "evaluate_every": 5, "precision": "float16"}
    optimizer = {
        "name": "adamw",
        "schedule": {"shape": "step", "milestones": [30]},
        "ema": 0.999,
        "clip": 1.0,
    }
    recipe = make_recipe(**fields, optimizer=optimizer)
    metrics = train(smoke_recipe(recipe, tmp_path), tmp_path / "o", device=CPU)
    assert (metrics["epoch"], "evaluation" in metrics) == (1, True)


def test_a_parameter_that_is_trained_later_joins_with_a_momentum_of_zero():
    """Torch's fused step takes momentum for all parameters or for none."""
    ours, plain = ([torch.ones(3, requires_grad=True) for _ in range(2)] for _ in range(2))
    config = OptimizerConfig(lr=0.1, nesterov=True)
    steps = [
        make_optimizer(SimpleNamespace(parameter_groups=lambda: [{"params": ours}]), config),
        torch.optim.SGD(
            plain, lr=0.1, momentum=config.momentum, nesterov=True, weight_decay=config.weight_decay
        ),
    ]
    for number in range(4):
        for values, optimizer in zip((ours, plain), steps, strict=True):
            optimizer.zero_grad()
            sum((value**2).sum() for value in values[: 1 + number // 2]).backward()
            optimizer.step()
    for value, wanted in zip(ours, plain, strict=True):
        torch.testing.assert_close(value, wanted)
