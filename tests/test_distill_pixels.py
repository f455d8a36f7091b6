"""What pixels a network is given: stated for a student, stated for a teacher, told again, and refused."""

import json
import shlex
import sys

import numpy as np
import pytest
import torch
from builders import CPU, make_recipe, write_store
from click.testing import CliRunner
from helpers import rewrite_manifest
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import VisionTransformer

from coursepack.data import open_source, view_recipe
from coursepack.data.store import StoreReader
from coursepack.data.views import draw, render
from coursepack.distill.cli import main as distill
from coursepack.distill.recipe import load_recipe
from coursepack.distill.runs.folder import load_run
from coursepack.distill.setup.checks import check_student
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.setup.student import probe_student
from coursepack.errors import RecipeError
from coursepack.models import Preprocessing, build_network, load_teacher
from coursepack.models.build import Network
from coursepack.precompute.cli import main as precompute

TEN = tuple("0123456789")
GIVEN = Preprocessing(size=16, mean=(0.5,), std=(0.25,))
FLAGS = ("--size 16", "--mean 0.5", "--std 0.25")


def command(program, line):
    result = CliRunner().invoke(program, shlex.split(line))
    assert result.exit_code == 0, result.output
    return result.stdout


def write(teacher, store, *flags):
    command(
        precompute,
        f"run --teacher {teacher} --source digits --view digits --views 2 --encoding float32 --store {store} "
        + " ".join(flags),
    )
    return store


# ---- the student's


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose student has other pixels than its network's own."""
    folder = tmp_path_factory.mktemp("pixels") / "run"
    flags = " ".join(flag.replace("--", "--student-") for flag in FLAGS)
    line = f"train --student digits-resnet --source digits --view digits --epochs 1 --out {folder} {flags}"
    command(distill, line)
    return folder


def test_a_run_knows_its_students_pixels(run):
    values = load_recipe(run / "recipe.yaml")
    assert (values["student_size"], values["student_mean"], values["student_std"]) == (16, [0.5], [0.25])
    assert load_teacher(f"run:{run}", TEN).preprocessing == GIVEN
    assert build_network("digits-resnet", 10).preprocessing != GIVEN


def test_a_student_is_evaluated_on_the_pixels_that_were_stated(run):
    source = open_source("digits:test")
    samples = np.arange(len(source.labels))
    recipe = view_recipe("none")
    pixels = render(recipe, source, samples, draw(recipe, source, samples, 0), 16)
    images = (pixels[..., 0].astype(np.float64) / 255 - 0.5) / 0.25
    module = build_network("digits-resnet", 10).module.eval()
    module.load_state_dict(load_file(run / "student.safetensors"))
    with torch.inference_mode():
        logits = module(torch.from_numpy(images[:, None]).float())
    accuracy = (logits.argmax(1).numpy() == source.labels).mean()
    nll = nn.functional.cross_entropy(logits, torch.from_numpy(source.labels)).item()
    told = load_run(run).metrics[-1]["evaluation"]
    assert told["accuracy"] == pytest.approx(accuracy)
    assert told["nll"] == pytest.approx(nll, rel=1e-4)
    again = json.loads(command(distill, f"eval {run} --json"))
    assert again["nll"] == pytest.approx(told["nll"], rel=1e-6)


# ---- a teacher's


@pytest.fixture(scope="module")
def told_otherwise(tmp_path_factory, teachers):
    """A store of a run's network at other pixels than the run's."""
    return write(f"run:{teachers[2]}", tmp_path_factory.mktemp("stores") / "resnet.zarr", *FLAGS)


def test_a_store_holds_what_its_teacher_says_of_the_pixels_that_were_stated(told_otherwise, teachers):
    reader = StoreReader(told_otherwise)
    stored = reader.manifest.identity["teacher"]["preprocessing"]
    assert stored == GIVEN.model_dump(mode="json")
    source, recipe, samples = open_source("digits"), view_recipe("digits"), np.arange(20)
    pixels = render(recipe, source, samples, draw(recipe, source, samples, 1), 16)
    module = load_teacher(f"run:{teachers[2]}", TEN).module.eval()
    with torch.inference_mode():
        logits = module(torch.from_numpy((pixels[..., 0][:, None] / 255 - 0.5) / 0.25).float())
    torch.testing.assert_close(reader.rows("logits", 1, samples).decode(), logits, rtol=1e-3, atol=1e-3)
    assert "sound" in command(precompute, f"verify --store {told_otherwise} --deep 20")


def test_a_live_teacher_has_the_pixels_of_its_store(told_otherwise):
    runner = prepare(make_recipe([told_otherwise], online=True), CPU).targets.runners[0]
    assert runner.network.preprocessing == GIVEN


def missing(store):
    """The line that adds the feature which a recipe with hints misses."""
    with pytest.raises(RecipeError) as caught:
        prepare(make_recipe([store], method="amtml-hints", student="digits-cnn"), CPU)
    return str(caught.value).splitlines()[-1].strip()


def test_the_line_that_adds_a_feature_states_the_pixels_again(told_otherwise):
    line = missing(told_otherwise)
    assert [flag for flag in FLAGS if flag in line] == list(FLAGS)
    command(precompute, line.removeprefix("precompute "))
    assert "features/layer1" in StoreReader(told_otherwise).manifest.arrays


@pytest.mark.parametrize("given", [(), FLAGS[1:2], FLAGS], ids=["own", "mean", "all"])
def test_the_line_states_only_what_is_not_the_networks_own(tmp_path, given):
    module = build_network("digits-resnet", 10).module
    save_file(dict(module.state_dict()), tmp_path / "w.safetensors")
    weights = f"digits-resnet --weights {tmp_path / 'w.safetensors'}"
    line = missing(write(weights, tmp_path / "resnet.zarr", *given, "--views 1"))
    assert [flag for flag in ("--size", "--mean", "--std") if f"{flag} " in line] == [
        flag.split()[0] for flag in given
    ]
    command(precompute, line.removeprefix("precompute "))


def test_a_line_imports_no_network_of_ones_own(tmp_path, teachers, monkeypatch):
    (tmp_path / "not_to_be_run.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    store = write_store(tmp_path / "resnet.zarr", teachers[2])

    def change(values):
        values["identity"]["teacher"]["network"] = "python:not_to_be_run:make"
        values["origin"]["weights_file"] = "own"

    rewrite_manifest(store, change)
    line = missing(store)
    assert "--teacher python:not_to_be_run:make --weights own --size 8 --mean 0.3 --std 0.37" in line
    assert line.endswith("--tap LAYER")
    assert "not_to_be_run" not in sys.modules


# ---- sizes that a network is not made for


def test_a_transformer_of_another_size_is_refused():
    module = VisionTransformer(16, 8, 1, 2, 8, 8, num_classes=10)
    network = Network(
        "torchvision:vit_tiny", module, Preprocessing(size=24, mean=(0.5,) * 3, std=(1,) * 3), 10
    )
    text = r"'torchvision:vit_tiny' cannot take views of 24 x 24 pixels: Wrong image height! .*student_size"
    with pytest.raises(RecipeError, match=text):
        check_student(network, open_source("digits"))
    with pytest.raises(RecipeError, match=text):
        probe_student(network, 1, embedding=True)
