"""Reused teacher classifier: loss and logits as published, wrapped students in runs, stores and refusals."""

from __future__ import annotations

import json
import shlex
from collections import OrderedDict

import numpy as np
import pytest
import torch
from builders import CPU, make_recipe, write_store, write_teacher
from click.testing import CliRunner
from helpers import make_job
from reference.maps import averaged, convolved, normalized
from test_distill_published import agree, figures

from coursepack.data import open_source
from coursepack.data.store import StoreReader
from coursepack.distill import Learner, make_objective, make_targets, open_teacher_stores, wrap_student
from coursepack.distill.cli import main as distill
from coursepack.distill.losses.base import FeaturePair, LossInputs
from coursepack.distill.losses.simkd import SimKD
from coursepack.distill.runs.folder import load_run
from coursepack.distill.runs.train import train
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.setup.student import watched
from coursepack.distill.targets.base import Targets
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError, UnknownName, UntrustedCode
from coursepack.models import Network, Preprocessing, TeacherRunner, build_network, load_teacher, parse_tap
from coursepack.models.hubs.projected import PROJECTOR, Projected, Projection, parse
from coursepack.precompute import run_job
from coursepack.precompute.cli import main as precompute

SPEC = "projected:digits-cnn:layer=conv2,map=32x4x4,width=32,features=64"
DIGITS = tuple(str(digit) for digit in range(10))


@pytest.fixture(scope="module")
def store(mapped_store):
    return mapped_store


def recipe_of(store, **fields):
    return make_recipe([store], method="simkd", **{"student": "digits-cnn", "limit": 128, **fields})


def published_module(held):
    """The figure's projector around a network that gives its input as `body`."""
    network = torch.nn.Sequential(OrderedDict(body=torch.nn.Identity()))
    module = Projected(network, Projection("body", (4, 4, 4), 3, 6), 5).double()
    names = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2.0", "7": "2.1"}
    state = module.state_dict()
    for key, value in held.items():
        if key.startswith("w.transfer."):
            _, _, number, kind = key.split(".")
            state[f"projector.{names[number]}.{kind}"].copy_(value)
    state["head.weight"].copy_(held["head_weight"])
    state["head.bias"].copy_(held["head_bias"])
    return module.train()


def loss_of(module, images, target):
    """Loss per sample and logits, as a learner computes them."""
    network = Network("odd", module, Preprocessing(size=8, mean=(0.0,), std=(1.0,)), 5)
    with watched(network, [PROJECTOR], embedding=False) as output:
        student = output(module(images))
    shape = tuple(student.features[PROJECTOR].shape[1:])
    term = SimKD(FeaturePair(0, "tap", PROJECTOR, tuple(target.shape[1:]), shape))
    inputs = LossInputs(student, torch.zeros(len(images)).long(), Targets([], {(0, "tap"): target}, (0,)))
    return term(inputs), student.logits


def test_loss_logits_and_gradient_are_the_published_ones():
    held = figures("simkd")
    student = held["student"].clone().requires_grad_()
    module = published_module(held)
    loss, logits = loss_of(module, student, held["teacher"])
    loss.mean().backward()
    agree(loss.mean(), held["chen_loss"])
    agree(logits, held["chen_logits"])
    agree(student.grad, held["grad_chen"])
    assert all(value.grad is None for value in module.head.parameters()), "the teacher's head is not trained"


def test_a_larger_teacher_is_averaged_to_the_students_size():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(4, 4, 4, 4)), rng.normal(size=(4, 6, 8, 8))
    module = published_module(figures("simkd"))
    weights = {name: value.numpy().copy() for name, value in module.state_dict().items()}

    def reference(maps):
        for number in range(3):
            layer = f"projector.{number}."
            maps = convolved(maps, weights[f"{layer}0.weight"])
            maps = normalized(maps, weights[f"{layer}1.weight"], weights[f"{layer}1.bias"]).clip(0)
        return ((maps - averaged(teacher, 4)) ** 2).mean((1, 2, 3))

    images = torch.from_numpy(student).requires_grad_()
    loss, _ = loss_of(module, images, torch.from_numpy(teacher))
    np.testing.assert_allclose(loss.detach().numpy(), reference(student), rtol=1e-5)
    loss.sum().backward()
    moved = [student.copy(), student.copy()]
    moved[0][1, 2, 3, 0] += 1e-5
    moved[1][1, 2, 3, 0] -= 1e-5
    slope = (reference(moved[0]).sum() - reference(moved[1]).sum()) / 2e-5
    assert images.grad[1, 2, 3, 0].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_the_wrapped_student_classifies_with_the_teachers_head(store, teachers):
    network = make_state(prepare(recipe_of(store, seed=4), CPU)).network
    assert network.spec == SPEC
    head = load_teacher(f"run:{teachers[2]}", DIGITS).module.head
    assert torch.equal(network.module.head.weight, head.weight)
    assert torch.equal(network.module.head.bias, head.bias)
    assert not network.module.head.weight.requires_grad
    plain = build_network("digits-cnn", 10, seed=4).module
    assert isinstance(network.module.student.head, torch.nn.Identity), "nothing would train its own head"
    for name, value in network.module.student.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), "a student begins as it does without a teacher"
    again = make_state(prepare(recipe_of(store, seed=4), CPU)).network.module.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in network.module.state_dict().items())


def test_only_the_projector_and_the_student_below_it_learn(store):
    setup = prepare(recipe_of(store), CPU)
    state = make_state(setup)
    before = {name: value.clone() for name, value in state.network.module.state_dict().items()}
    told = [train_epoch([state], setup.batches(epoch), setup.targets, epoch)[0] for epoch in range(3)]
    assert told[-1]["simkd"] < told[0]["simkd"]
    assert told[0]["loss"] == pytest.approx(told[0]["simkd"])
    after = state.network.module.state_dict()
    moved = {name.split(".")[1] for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {"conv1", "conv2", "0", "1", "2"}, "not the head, and not `hidden`, which comes after"


def test_a_run_is_evaluated_compared_and_teaches(tmp_path, store):
    runner, out = CliRunner(), tmp_path / "o"
    words = ["train", "--student", "digits-cnn", "--store", str(store), "--epochs", "3", "--lr", "0.1"]
    for method, folder in (("simkd", out), ("kd", tmp_path / "kd")):
        result = runner.invoke(distill, [*words, "--method", method, "--out", str(folder)])
        assert result.exit_code == 0, result.output
    evaluated = json.loads(runner.invoke(distill, ["eval", str(out), "--json"]).stdout)
    assert evaluated["accuracy"] == load_run(out).metrics[-1]["evaluation"]["accuracy"]
    compared = runner.invoke(distill, ["compare", str(out), str(tmp_path / "kd")])
    assert "simkd digits-cnn" in compared.stdout, compared.output
    taught = tmp_path / "taught.zarr"
    words = ["run", "--teacher", f"run:{out}", "--source", "digits", "--view", "digits", "--views", "1"]
    result = runner.invoke(precompute, [*words, "--tap", "projector:pooled", "--store", str(taught)])
    assert result.exit_code == 0, result.output
    network = load_teacher(f"run:{out}", DIGITS)
    assert StoreReader(taught).static("head_weight").tolist() == network.module.head.weight.tolist()
    assert StoreReader(taught).manifest.identity["teacher"]["network"] == SPEC
    result = runner.invoke(precompute, ["verify", "--store", str(taught), "--deep", "50"])
    assert result.exit_code == 0, result.output
    recipe = make_recipe([taught], method="kd", online=True, limit=64)
    train(recipe, tmp_path / "live", device=CPU)


def test_a_run_is_the_network_that_was_trained(tmp_path, store):
    recipe = recipe_of(store, epochs=2, optimizer={"ema": 0.5, "weight_decay": 0.01})
    train(recipe, tmp_path / "o", device=CPU)
    loaded = load_teacher(f"run:{tmp_path / 'o'}", DIGITS)
    head = make_state(prepare(recipe, CPU)).network.module.head
    assert torch.equal(loaded.module.head.weight, head.weight), "neither decay nor averages change the head"
    pixels = torch.randint(0, 256, (5, 8, 8, 1), dtype=torch.uint8)
    output = TeacherRunner(loaded, [parse_tap("projector:pooled")]).run(pixels)
    torch.testing.assert_close(head(output.features["projector@pooled"]), output.logits)


def test_the_library_trains_what_the_command_does(store):
    stores = open_teacher_stores([store])
    student = build_network("digits-cnn", 10, seed=0)
    with pytest.raises(RecipeError, match=r"pass the result of wrap_student\(stores, student, 'simkd'\)"):
        make_objective(stores, student, "simkd")
    wrapped = wrap_student(stores, student, "simkd", seed=0)
    learner = Learner(wrapped, make_objective(stores, wrapped, "simkd", seed=0))
    setup = prepare(recipe_of(store), CPU)
    batch = next(setup.batches(0))
    targets = make_targets(stores, learner.objective)
    ours = learner(batch, targets.fetch(batch)).value.loss
    theirs = make_state(setup).learner(batch, setup.targets.fetch(batch)).value.loss
    assert ours.item() == theirs.item()
    plain = build_network("digits-small", 10)
    assert wrap_student(stores, plain, "kd") is plain


def test_a_missing_map_is_refused_with_the_line_that_adds_it(tmp_path, teachers):
    plain = write_store(tmp_path / "s.zarr", teachers[2])
    with pytest.raises(RecipeError, match="'features/layer2'") as caught:
        prepare(recipe_of(plain), CPU)
    line = str(caught.value).splitlines()[-1].strip()
    assert line.endswith("--tap layer2")
    result = CliRunner().invoke(precompute, shlex.split(line)[1:])
    assert result.exit_code == 0, result.output
    make_state(prepare(recipe_of(plain), CPU))


def test_a_missing_head_is_refused_with_the_line_that_adds_it(tmp_path, teachers, monkeypatch):
    path = tmp_path / "s.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(TeacherRunner, "static", lambda _: {})
        run_job(make_job(path, teachers[2], taps=(parse_tap("layer2"),)), quiet=True)
    with pytest.raises(RecipeError, match="has no 'static/head_weight'") as caught:
        prepare(recipe_of(path), CPU)
    line = str(caught.value).splitlines()[1].strip()
    result = CliRunner().invoke(precompute, shlex.split(line)[1:])
    assert result.exit_code == 0, result.output
    make_state(prepare(recipe_of(path), CPU))


def test_several_teachers_are_refused(stores):
    with pytest.raises(RecipeError, match="of one teacher, but there are 3 stores: give one"):
        prepare(make_recipe(stores, method="simkd", student="digits-cnn"), CPU)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"student": "digits-small"}, RecipeError, r"projects a map.*'digits-small' gives hidden \(64,\)"),
        ({"objective": {"layer": "conv7"}}, UnknownName, "unknown layer 'conv7'"),
        ({"objective": {"layer": "hidden"}}, RecipeError, r"'digits-cnn' gives hidden \(64,\): name a layer"),
        ({"student": SPEC}, RecipeError, "is already wrapped"),
    ],
)
def test_students_that_do_not_fit_are_refused(store, fields, error, text):
    terms = {"terms": {"simkd": fields.pop("objective", {})}}
    with pytest.raises(error, match=text):
        make_state(prepare(recipe_of(store, objective=terms, **fields), CPU))


@pytest.mark.parametrize(
    ("teacher", "tap", "text"),
    [
        (1, "conv2", r"whose mean its head reads, \(64, H, W\), but tap 'conv2' gives \(32, 4, 4\)"),
        (2, "layer2.0", r"does not read the mean of tap 'layer2.0': .* expected at most 5%"),
    ],
)
def test_teachers_whose_head_reads_something_else_are_refused(tmp_path, teachers, teacher, tap, text):
    path = tmp_path / "s.zarr"
    run_job(make_job(path, teachers[teacher], taps=(parse_tap(tap),)), quiet=True)
    with pytest.raises(RecipeError, match=text):
        make_state(prepare(recipe_of(path), CPU))


def test_two_wrappers_are_refused(store):
    terms = {"terms": {"simkd": {}, "again": {"term": "simkd"}}}
    with pytest.raises(RecipeError, match="terms 'simkd' and 'again' both wrap the student"):
        make_state(prepare(recipe_of(store, objective=terms), CPU))


def test_compile_is_refused(store):
    with pytest.raises(RecipeError, match="compile is set, but method 'simkd' reads layers of the student"):
        prepare(recipe_of(store, compile=True), CPU)


@pytest.mark.parametrize(
    "name",
    [
        "digits-cnn",
        "digits-cnn:layer=conv2",
        "projected:python:os:abort:layer=a,map=1x1x1,width=1,features=1",
        "digits-cnn:layer=conv2,map=32x4,width=32,features=64",
        "digits-cnn:layer=conv2,map=32x4x0,width=32,features=64",
        "digits-cnn:layer=conv2,map=32x4x4,width=99999999,features=64",
        f"{SPEC}:layer=conv2,map=32x4x4,width=32,features=64",
    ],
)
def test_other_forms_of_the_spec_are_refused(name):
    with pytest.raises(RecipeError, match=r"is not projected:NETWORK:layer=LAYER,map=CxHxW"):
        build_network(f"projected:{name}", 10)


def test_a_spec_is_what_it_is_parsed_to():
    inner, projection = parse("torchvision:resnet18:layer=layer4,map=512x7x7,width=1024,features=2048")
    assert inner == "torchvision:resnet18"
    assert projection.spec(inner).partition(":")[2].endswith("width=1024,features=2048")
    with pytest.raises(RecipeError, match="has no layer 'conv9'"):
        build_network(SPEC.replace("conv2", "conv9"), 10)


def test_code_in_a_wrapped_network_is_not_run_untold(tmp_path):
    folder = write_teacher(tmp_path / "t", "digits-cnn")
    text = (folder / "network.yaml").read_text()
    evil = "projected:python:os:abort:layer=a,map=1x1x1,width=1,features=1"
    (folder / "network.yaml").write_text(text.replace("digits-cnn", evil))
    with pytest.raises(UntrustedCode, match="from module 'os'"):
        load_teacher(f"run:{folder}", open_source("digits").class_names)
