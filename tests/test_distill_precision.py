"""Precision, layout, compiling and dropout: how a student is computed, and that it is reproducible."""

import copy

import numpy as np
import pytest
import torch
from builders import CPU, make_recipe
from safetensors.torch import load_file
from spawned import DROPPING
from torch._dynamo.utils import counters

from coursepack.data import open_source
from coursepack.distill.losses.base import Step
from coursepack.distill.runs.folder import load_run
from coursepack.distill.runs.train import train
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.distill.training.step import predict
from coursepack.errors import RecipeError
from coursepack.models import load_teacher
from coursepack.models.networks import NETWORKS


def spy_on_objective(state):
    seen = []
    forward = state.learner.objective.forward

    def spied(inputs):
        seen.append((inputs.student.logits.dtype, inputs.student.embedding))
        return forward(inputs)

    state.learner.objective.forward = spied
    return seen


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_and_gives_the_objective_float32(stores, precision):
    run = prepare(
        make_recipe(stores, method="amtml", limit=400, student="digits-cnn", precision=precision), CPU
    )
    state = make_state(run)
    seen, dtypes = spy_on_objective(state), set()
    state.learner.network.module.conv2.register_forward_hook(lambda _m, _i, out: dtypes.add(out.dtype))
    losses = [train_epoch([state], run.batches(e), run.targets, e)[0]["loss"] for e in range(4)]
    assert losses[-1] < 0.8 * losses[0]
    assert dtypes == {getattr(torch, precision)}
    assert {logits for logits, _ in seen} == {torch.float32}
    assert {embedding.dtype for _, embedding in seen} == {torch.float32}
    assert all(value.dtype == torch.float32 for value in state.learner.parameters())
    assert (state.scaler is None) == (precision == "bfloat16")


def test_float16_skips_steps_that_overflow_and_keeps_its_scale():
    optimizer = {"clip": 1e-3, "weight_decay": 0.0, "momentum": 0.0}
    run = prepare(make_recipe(limit=100, precision="float16", optimizer=optimizer), CPU)
    state = make_state(run)
    train_epoch([state], run.batches(0), None)
    before = copy.deepcopy(state.learner.state_dict())
    scale = state.scaler.get_scale()
    state.begin_step()
    for parameter in state.learner.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    state.scaler.scale(torch.zeros(()))
    state.end_step()
    after = state.learner.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert state.scaler.get_scale() == scale / 2
    again = make_state(run)
    again.restore(copy.deepcopy(state.state()))
    assert again.scaler.state_dict() == state.scaler.state_dict()

    # Scaled gradients are clipped in their true size.
    state.begin_step()
    state.scaled(state.learner(next(run.batches(1)), None, Step(1)).value.loss).backward()
    state.end_step()
    moved = sum(float((after[name] - before[name]).square().sum()) for name in before) ** 0.5
    assert moved == pytest.approx(1e-3 * 0.05, rel=1e-2)


def test_a_step_that_overflows_does_not_move_the_average():
    run = prepare(make_recipe(limit=300, precision="float16", optimizer={"ema": 0.5}), CPU)
    state = make_state(run)
    train_epoch([state], run.batches(0), None)
    before = copy.deepcopy(state.average.state_dict())
    for step, batch in enumerate(run.batches(1)):
        state.begin_step()
        state.scaled(state.learner(batch, None, Step(1, step)).value.loss).backward()
        if step == 1:
            for parameter in state.learner.parameters():
                parameter.grad.fill_(torch.inf)
        state.end_step()
        after = copy.deepcopy(state.average.state_dict())
        stays = all(torch.equal(after[name], value) for name, value in before.items())
        assert stays == (step == 1)
        before = after


def test_channels_last_changes_the_layout_alone(tmp_path):
    def run_with(channels_last):
        out = tmp_path / str(channels_last)
        fields = {"limit": 200, "epochs": 2, "student": "digits-cnn"}
        train(make_recipe(**fields, channels_last=channels_last), out, device=CPU)
        losses = [line["train"]["loss"] for line in load_run(out).metrics]
        return losses, load_file(out / "student.safetensors")

    (plain, weights), (other, same) = run_with(False), run_with(True)
    np.testing.assert_allclose(plain, other, rtol=1e-4)
    state = make_state(prepare(make_recipe(limit=200, student="digits-cnn", channels_last=True), CPU))
    layout = torch.channels_last
    assert state.learner.network.module.conv2.weight.is_contiguous(memory_format=layout)
    assert not state.learner.network.module.conv2.weight.is_contiguous()
    for name, value in weights.items():
        assert same[name].shape == value.shape
        assert same[name].is_contiguous()
        torch.testing.assert_close(same[name], value, rtol=1e-2, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_student_learns_the_same_and_is_kept_alike(tmp_path, stores):
    def run_with(compiled):
        out = tmp_path / str(compiled)
        recipe = make_recipe(stores[:1], limit=128, epochs=2, compile=compiled, optimizer={"ema": 0.5})
        train(recipe, out, device=CPU)
        return [line["train"]["loss"] for line in load_run(out).metrics], out

    (plain, one), graphs = run_with(False), counters["stats"]["unique_graphs"]
    compiled, other = run_with(True)
    assert counters["stats"]["unique_graphs"] > graphs, "nothing was compiled"
    np.testing.assert_allclose(plain, compiled, rtol=1e-4)
    for name in ("student.safetensors", "best.safetensors"):
        weights, same = load_file(one / name), load_file(other / name)
        assert weights.keys() == same.keys()
    network = load_teacher(f"run:{other}", open_source("digits").class_names)
    want = load_teacher(f"run:{one}", open_source("digits").class_names).module.state_dict()
    for name, value in network.module.state_dict().items():
        torch.testing.assert_close(value, want[name], rtol=1e-3, atol=1e-4)


def test_a_student_that_is_looked_into_is_not_compiled(stores):
    text = r"compile is set, but method '{}' reads layers of the student \({}\).*: leave compile out"
    with pytest.raises(RecipeError, match=text.format("amtml", "fusion 'adaptive'")):
        prepare(make_recipe(stores, method="amtml", compile=True), CPU)
    with pytest.raises(RecipeError, match=text.format("amtml-hints", "hints, fusion 'adaptive'")):
        prepare(make_recipe(stores, method="amtml-hints", compile=True), CPU)
    without = {"terms": {"hint": {}}}
    with pytest.raises(RecipeError, match=text.format("kd", "hints")):
        prepare(make_recipe(stores, method="kd", objective=without, compile=True), CPU)
    prepare(make_recipe(stores, method="ca-mkd", compile=True), CPU)


@pytest.fixture
def dropping(monkeypatch):
    monkeypatch.setitem(NETWORKS, "dropping", DROPPING)


def losses_of(epochs=2, **fields):
    run = prepare(make_recipe(limit=200, student="dropping", **fields), CPU)
    state = make_state(run)
    parts = run.recipe.accumulate
    return [
        train_epoch([state], run.batches(e), None, e, micro_batches=parts)[0]["loss"] for e in range(epochs)
    ]


def test_dropout_depends_on_the_seed_alone(dropping):
    torch.manual_seed(1)
    first = losses_of()
    torch.manual_seed(2)
    torch.rand(1000)
    assert losses_of() == first
    assert losses_of(seed=1) != first

    run = prepare(make_recipe(limit=64, student="dropping"), CPU)
    batch = next(run.batches(0))

    def logits(seed, steps=0, part=0):
        state = make_state(run)
        state.seed, state.steps = seed, steps
        state.learner.train()
        return predict([state], batch, Step(0, 0, part))[0].logits

    assert torch.equal(logits(0), logits(0))
    for other in (logits(1), logits(0, steps=1), logits(0, part=1)):
        assert not torch.equal(logits(0), other), "seed, step and part each draw anew"


def test_students_side_by_side_drop_what_they_drop_alone(dropping):
    run = prepare(make_recipe(limit=200, student="dropping"), CPU)
    other = prepare(make_recipe(limit=200, student="dropping", seed=1), CPU)
    together = [make_state(run), make_state(other), make_state(run)]
    metrics = train_epoch(together, run.batches(0), None)
    alone = train_epoch([make_state(run)], run.batches(0), None)[0]
    assert metrics[0] == metrics[2] == alone
    assert metrics[1] != alone
