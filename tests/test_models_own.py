"""Networks from Python, and pixels that are stated in the place of a network's own."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import write_teacher
from helpers import make_job, random_source
from safetensors.torch import save_file
from torch import nn

from coursepack.config import write_yaml
from coursepack.data.store import StoreReader
from coursepack.errors import CoursepackError, RecipeError, TeacherMismatch
from coursepack.models import Preprocessing, TeacherRunner, build_network, load_teacher
from coursepack.models.build import NETWORK_FILE, WEIGHTS_FILE, weights_fingerprint
from coursepack.models.load import reload_teacher
from coursepack.precompute import Job, run_job

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
TEN = tuple("0123456789")
PIXELS = {"size": 8, "mean": [0.25], "std": [0.5]}
SPEC = "python:own_networks:make"


class Own(nn.Module):
    """A linear network, with dropout that only training may see."""

    preprocessing = PIXELS

    def __init__(self, classes):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(64, classes)

    def forward(self, images):
        return self.head(self.drop(images.flatten(1)))


def state_of(network):
    return {name: value.clone() for name, value in network.module.state_dict().items()}


def write_run(folder, network):
    """A run folder with a network's description and weights."""
    folder.mkdir()
    (folder / NETWORK_FILE).write_text(write_yaml(network.describe()))
    save_file(state_of(network), folder / WEIGHTS_FILE)
    return folder


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module `own_networks` with a factory `make`, to be changed."""
    (tmp_path / "own_networks.py").write_text("make = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    import own_networks

    own_networks.make = Own
    yield own_networks
    sys.modules.pop("own_networks")


def test_a_factory_makes_a_network(module):
    network = build_network(SPEC, 7, seed=2)
    assert type(network.module) is Own
    assert network.preprocessing == Preprocessing(size=8, mean=(0.25,), std=(0.5,))
    assert network.describe() == {"spec": SPEC, "classes": 7, "preprocessing": PIXELS}
    assert all(layer.training for layer in network.module.modules())
    fingerprints = [weights_fingerprint(build_network(SPEC, 7, seed=seed).module) for seed in (2, 3)]
    assert fingerprints[0] == weights_fingerprint(network.module) != fingerprints[1]


def test_a_factory_may_have_dots_and_freeze_parts(module):
    def frozen(classes):
        network = Own(classes)
        network.drop.eval()
        return network

    module.family = type("family", (), {"frozen": staticmethod(frozen)})
    network = build_network("python:own_networks:family.frozen", 3)
    assert network.module.training
    assert not network.module.drop.training


def test_pixels_are_stated_by_the_network_or_by_the_caller(module):
    given = {"size": 8, "mean": (0.1,), "std": (0.2,)}
    assert build_network(SPEC, 3, **given).preprocessing == Preprocessing(**given)
    module.make = lambda classes: nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    assert build_network(SPEC, 3, **given).preprocessing == Preprocessing(**given)
    for missing in given:
        rest = {name: value for name, value in given.items() if name != missing}
        with pytest.raises(RecipeError, match=r"does not define the pixels it expects: .*preprocessing = "):
            build_network(SPEC, 3, **rest)
    with pytest.raises(
        RecipeError, match=r"(?s)preprocessing of network 'python:own.*mean has 1 values and std 3"
    ):
        build_network(SPEC, 3, size=8, mean=(0.1,), std=(0.1, 0.1, 0.1))


def test_a_run_and_a_store_of_an_own_network_find_it_again(module, tmp_path):
    folder = write_run(tmp_path / "run", build_network(SPEC, 10, seed=4))
    source = random_source(12)
    network = load_teacher(f"run:{folder}", source.class_names, trust_code=True)
    assert (network.spec, type(network.module)) == (SPEC, Own)
    job = make_job(tmp_path / "s.zarr", write_teacher(tmp_path / "any"), source=source, encoding="float32")
    run_job(Job(job.store, source, job.recipe, TeacherRunner(network), 1, "float32"))
    manifest = StoreReader(tmp_path / "s.zarr").manifest
    again = reload_teacher(
        manifest.identity["teacher"],
        source.class_names,
        manifest.origin.get("weights_file"),
        trust_code=True,
    )
    assert weights_fingerprint(again.module) == weights_fingerprint(network.module)
    assert again.preprocessing == network.preprocessing


def test_weights_from_a_file_or_from_the_factory(module, tmp_path):
    trained = Own(12)
    save_file(
        {name: value.clone() for name, value in trained.state_dict().items()}, tmp_path / "w.safetensors"
    )
    columns = tuple(range(10))
    loaded = load_teacher(SPEC, TEN, weights=str(tmp_path / "w.safetensors"), columns=columns)
    assert weights_fingerprint(loaded.module) == weights_fingerprint(trained)
    with pytest.raises(RecipeError, match=r"has no weights: give --weights FILE .*, or --weights own if"):
        load_teacher(SPEC, TEN)
    module.make = lambda _: trained
    with pytest.raises(RecipeError, match=r"returns logits of shape \(2, 12\), expected \(2, 10\)"):
        load_teacher(SPEC, TEN, weights="own")
    trained.head = nn.Linear(64, 10)
    own = load_teacher(SPEC, TEN, weights="own")
    assert own.module is trained
    identity = {
        "network": SPEC,
        "weights": weights_fingerprint(trained),
        "preprocessing": own.preprocessing.model_dump(mode="json"),
    }
    assert reload_teacher(identity, TEN, own.weights_file, trust_code=True).module is trained
    trained.head.bias.data[0] += 1
    with pytest.raises(TeacherMismatch, match="weights in 'own' are not the ones that wrote the store"):
        reload_teacher(identity, TEN, own.weights_file, trust_code=True)
    with pytest.raises(RecipeError, match="weights 'none' are no file"):
        load_teacher(SPEC, TEN, weights="none")
    with pytest.raises(RecipeError, match="weights 'own' are no file"):
        load_teacher("resnet20", TEN, weights="own")


def _fail(_classes):
    raise ZeroDivisionError("no")


def _with(**attributes):
    return lambda classes: type("Changed", (Own,), attributes)(classes)


def test_looking_at_a_network_leaves_it_as_it_was(module):
    module.make = lambda classes: nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, classes))
    network = build_network(SPEC, 10, size=8, mean=(0.5,), std=(0.5,))
    assert int(network.module[0].num_batches_tracked) == 0
    assert not network.module[0].running_mean.any()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (_fail, r"network 'python:own_networks:make': make\(10\) failed: ZeroDivisionError: no"),
        (lambda classes: classes, "make returned a int, expected a torch.nn.Module"),
        (lambda _: Own(11), r"returns logits of shape \(2, 11\), expected \(2, 10\) \(N, C\)"),
        (_with(forward=lambda _, images: [images]), r"returns a list, expected one tensor of shape \(2"),
        (_with(preprocessing={**PIXELS, "size": 9}),
         r"cannot take images \(2, 1, 9, 9\): RuntimeError: .*mat1 and mat2"),
        (_with(preprocessing={**PIXELS, "sise": 9}), "(?s)preprocessing of network .*sise: unknown key, did"),
        (_with(preprocessing={**PIXELS, "std": [0.0]}), r"(?s)preprocessing of network .*std\.0: .*greater"),
        (_with(preprocessing="imagenet"), "(?s)preprocessing of network .*expected a mapping"),
    ],
)  # fmt: skip
def test_networks_that_are_refused(module, make, text):
    module.make = make
    with pytest.raises(RecipeError, match=text):
        build_network(SPEC, 10)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (
            "python:no_such_module:f",
            r"cannot import 'no_such_module': No module named 'no_such_module'\. Mod",
        ),
        ("python:own_networks:absent", "module 'own_networks' has no 'absent'"),
        ("python:own_networks", "'python:own_networks' is not python:MODULE:FACTORY"),
        ("python::make", "'python::make' is not python:MODULE:FACTORY"),
    ],
)
def test_factories_that_are_refused(module, spec, text):
    with pytest.raises(RecipeError, match=text):
        build_network(spec, 10)


def test_an_error_of_ours_in_a_factory_stays_as_it_is(module):
    def fail(classes):
        raise CoursepackError("mine")

    module.make = fail
    with pytest.raises(CoursepackError, match=r"^mine$"):
        build_network(SPEC, 10)


def test_another_normalisation_and_size(tmp_path):
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    usual = build_network("resnet20", 10)
    assert usual.preprocessing == Preprocessing(
        size=32, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)
    )
    changed = build_network("resnet20", 10, size=40, mean=mean, std=std)
    assert changed.preprocessing == Preprocessing(size=40, mean=mean, std=std)
    assert build_network("resnet20", 10, std=std).preprocessing.mean == usual.preprocessing.mean
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8))
    expected = (pixels.permute(0, 3, 1, 2).double() / 255 - torch.tensor(mean).double()[:, None, None]) / (
        torch.tensor(std).double()[:, None, None]
    )
    torch.testing.assert_close(changed.preprocessing(pixels).double(), expected, rtol=1e-5, atol=1e-6)
    folder = write_run(tmp_path / "run", build_network("resnet20", 10, size=40, mean=mean))
    assert load_teacher(f"run:{folder}", TEN).preprocessing == usual.preprocessing.changed(40, mean)
    assert load_teacher(f"run:{folder}", TEN, std=std).preprocessing == changed.preprocessing
    identity = {
        "network": "resnet20",
        "weights": weights_fingerprint(usual.module),
        "preprocessing": changed.preprocessing.model_dump(mode="json"),
    }
    again = reload_teacher(identity, TEN, str(folder / WEIGHTS_FILE))
    assert again.preprocessing == changed.preprocessing
    with pytest.raises(
        RecipeError, match="reads 3 channels, but mean and std are given for 1: give one value"
    ):
        build_network("resnet20", 10, mean=(0.5,), std=(0.5,))
    with pytest.raises(RecipeError, match="mean has 1 values and std 3, expected 1 or 3 of each"):
        load_teacher(f"run:{folder}", TEN, mean=(0.5,))
    with pytest.raises(RecipeError, match=r"std\.1: expected more than 0, got 0"):
        build_network("resnet20", 10, std=(0.5, 0, 0.5))


def test_the_pages_example_works(tmp_path, monkeypatch):
    text = PAGE.read_text()
    code = textwrap.dedent(
        text[text.index("    # my_networks.py") : text.index("`python:my_networks:make` calls")]
    )
    (tmp_path / "my_networks.py").write_text("import torch\n" + code)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        network = build_network("python:my_networks:make", 10)
    finally:
        sys.modules.pop("my_networks")
    assert network.preprocessing == Preprocessing(size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
