"""Networks by name: seeded weights, preprocessing, taps, weights files and what does not fit."""

from __future__ import annotations

import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import write_teacher
from helpers import make_job, random_source
from safetensors.torch import save_file

from coursepack.config import write_yaml
from coursepack.data.store import StoreReader
from coursepack.device import pick_device
from coursepack.errors import NonFiniteOutput, RecipeError, RunError, TeacherMismatch, UnknownName
from coursepack.models import Preprocessing, Tap, TeacherRunner, build_network, load_teacher
from coursepack.models.build import NETWORK_FILE, NETWORKS, WEIGHTS_FILE, weights_fingerprint
from coursepack.models.taps import tapped
from coursepack.models.teacher import TeacherOutput, check_finite, finite_rows
from coursepack.models.weights import without_prefix
from coursepack.precompute import Job, run_job

TEN = tuple("0123456789")
RESNET18 = "torchvision:resnet18"
DIGITS = [name for name in NETWORKS if name.startswith("digits-")]


def pixels_of(count, *, size=8, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8))


def state_of(network):
    return {name: value.clone() for name, value in network.module.state_dict().items()}


@pytest.fixture(scope="module")
def resnet_weights(tmp_path_factory):
    """A weights file of torchvision's resnet18 with ten classes and lively BatchNorm."""
    network = build_network(RESNET18, 10, seed=3)
    state = state_of(network)
    for name, value in state.items():
        if name.endswith("running_mean"):
            value += 0.1
    file = tmp_path_factory.mktemp("resnet") / "resnet18.safetensors"
    save_file(state, file)
    return file


def test_networks_differ_clearly_in_size():
    counts = {name: sum(p.numel() for p in build_network(name, 10).module.parameters()) for name in DIGITS}
    assert counts["digits-small"] == 64 * 64 + 64 + 64 * 10 + 10 == 4810
    assert counts["digits-mlp"] == 64 * 256 + 256 + 256 * 128 + 128 + 1290
    ordered = sorted(counts.values())
    assert all(larger > 1.2 * smaller for smaller, larger in itertools.pairwise(ordered))


LARGE = ("resnet32x4", "resnet110", "wrn-40-2", "vgg8", "vgg11", "vgg13", RESNET18)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, marks=pytest.mark.integration if spec in LARGE else ())
        for spec in (*NETWORKS, RESNET18)
    ],
)
def test_weights_depend_on_the_seed_alone(spec):
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    fingerprints = [weights_fingerprint(build_network(spec, 10, seed=seed).module) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1234)
    fingerprints.append(weights_fingerprint(build_network(spec, 10, seed=0).module))
    assert fingerprints[0] == fingerprints[1] == fingerprints[3] != fingerprints[2]


@pytest.mark.parametrize("spec", DIGITS)
@pytest.mark.parametrize("classes", [2, 10, 37])
def test_networks_give_logits_per_class(spec, classes):
    network = build_network(spec, classes)
    output = TeacherRunner(network).run(pixels_of(5))
    assert output.logits.shape == (5, classes)
    assert output.logits.dtype == torch.float32
    assert not output.logits.requires_grad
    assert network.describe()["classes"] == classes


def test_weights_fingerprint_covers_names_shapes_values_and_buffers():
    def change(index):
        module = build_network("digits-resnet", 10).module
        if index == 1:
            module.head.bias.data[3] += 1e-6
        elif index == 2:
            module.layer1[0].bn1.running_mean[0] = 1
        elif index == 3:
            module.head.weight = torch.nn.Parameter(module.head.weight.data.reshape(64, 10))
        elif index == 4:
            module.tail = module.head
            del module.head
        return weights_fingerprint(module)

    assert len({change(index) for index in range(5)}) == 5


MEAN, STD = (0.3, 0.5, 0.2), (0.4, 0.25, 0.5)


@pytest.mark.parametrize(("given", "wanted"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_preprocessing_equals_the_float64_reference(given, wanted):
    pixels = pixels_of(3, size=5, channels=given)
    kept = pixels.clone()
    images = Preprocessing(size=5, mean=MEAN[:wanted], std=STD[:wanted])(pixels)
    values = pixels.numpy().astype(np.float64) / 255
    if (given, wanted) == (1, 3):
        values = np.repeat(values, 3, axis=3)
    elif (given, wanted) == (3, 1):
        # Luma of ITU-R BT.601.
        values = (0.299 * values[..., 0] + 0.587 * values[..., 1] + 0.114 * values[..., 2])[..., None]
    expected = ((values - np.array(MEAN[:wanted])) / np.array(STD[:wanted])).transpose(0, 3, 1, 2)
    assert images.shape == (3, wanted, 5, 5)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert np.abs(images.numpy() - expected).max() < 1e-6
    assert torch.equal(pixels, kept)


def test_taps_of_every_layer_are_what_the_layer_gave(resnet_weights):
    network = load_teacher(RESNET18, TEN, weights=str(resnet_weights), size=32)
    names = [name for name, _ in network.module.named_modules() if name]
    output = TeacherRunner(network, [Tap((name,)) for name in names]).run(pixels_of(2, size=32))
    module, taps = network.module, output.features
    assert set(taps) == set(names)
    assert torch.equal(taps["fc"], output.logits)
    images = network.preprocessing(pixels_of(2, size=32))
    with torch.inference_mode():
        stem = module.conv1(images)
        normed = F.batch_norm(
            stem, module.bn1.running_mean, module.bn1.running_var, module.bn1.weight, module.bn1.bias
        )
        block = module.layer1[0]
        pooled = F.max_pool2d(F.relu(normed), 3, 2, 1)
        inner = F.relu(block.bn1(block.conv1(pooled)))
        second = block.bn2(block.conv2(inner))
    # torchvision's ReLUs and shortcuts work in place: what a tap holds must not change after its layer.
    assert float(taps["bn1"].min()) < 0
    for name, expected in {"conv1": stem, "bn1": normed, "maxpool": pooled, "layer1.0.bn2": second}.items():
        torch.testing.assert_close(taps[name], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(taps["layer1.0"], F.relu(second + pooled), rtol=1e-5, atol=1e-5)
    assert taps["avgpool"].shape == (2, 512, 1, 1)
    assert all(not layer._forward_hooks for layer in module.modules())


def test_taps_that_cannot_be_had():
    network = build_network("digits-resnet", 10)
    with pytest.raises(
        UnknownName, match=r"unknown layer 'layer1\.0\.conf1'\. Did you mean 'layer1\.0\.conv1'\?"
    ):
        TeacherRunner(network, [Tap(("layer1.0.conf1",))])
    network.module.spare = torch.nn.Linear(2, 2)
    with pytest.raises(TeacherMismatch, match="'digits-resnet' never runs layer 'spare': tap another layer"):
        TeacherRunner(network, [Tap(("spare",))]).run(pixels_of(1))
    attention = torch.nn.Sequential(torch.nn.LSTM(3, 4))
    text = "layer '0' returns a tuple, expected one tensor"
    with tapped(attention, ["0"]), pytest.raises(TeacherMismatch, match=text):
        attention(torch.zeros(2, 3))
    assert not attention[0]._forward_hooks


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
def test_weights_from_files(tmp_path, suffix):
    trained = build_network("digits-cnn", 10, seed=8)
    file = tmp_path / f"cnn.{suffix}"
    if suffix == "safetensors":
        save_file(state_of(trained), file)
    else:
        torch.save(trained.module.state_dict(), file)
    loaded = load_teacher("digits-cnn", TEN, weights=str(file))
    assert weights_fingerprint(loaded.module) == weights_fingerprint(trained.module)
    assert loaded.weights_file == str(file)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('trapped').touch()",))


def write_script(file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is going away, but not the files that it wrote
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)


UNREADABLE = {
    "code.pt": lambda file: torch.save({"head.weight": Trap()}, file),
    "code.pth": lambda file: file.write_bytes(pickle.dumps(Trap(), protocol=2)),
    "empty.pt": lambda file: file.write_bytes(b""),
    "noise.pt": lambda file: file.write_bytes(b"PK\x03\x04 and so on"),
    "noise.safetensors": lambda file: file.write_bytes(b"\0" * 7),
    "list.pt": lambda file: torch.save([torch.zeros(2)], file),
    "nested.pt": lambda file: torch.save({"weights": {"head.weight": torch.zeros(2)}, "epoch": 3}, file),
    "nothing.pt": lambda file: torch.save({"model": {}, "epoch": 3}, file),
    "two.pt": lambda file: torch.save({key: {"a": torch.zeros(2)} for key in ("model", "net")}, file),
    "model.pt": lambda file: torch.save(torch.nn.Linear(2, 2), file),
    "script.pt": write_script,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_weights_files_that_are_not_weights_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    UNREADABLE[name](tmp_path / name)
    with pytest.raises(TeacherMismatch, match=rf"{name}' (cannot be read as weights|holds no state dict)"):
        load_teacher("digits-cnn", TEN, weights=str(tmp_path / name))
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.pt", "it holds torch.nn.modules.linear.Linear, expected only tensors."),
        ("script.pt", "it holds TorchScript code, expected only tensors."),
        (
            "nested.pt",
            "one of the keys state_dict, model_state_dict, model, net; it holds ['weights', 'epoch']",
        ),
        ("two.pt", "it holds 2 of them (model, net)"),
        ("list.pt", "it holds a list"),
    ],
)
def test_what_a_weights_file_holds_instead_is_said(tmp_path, name, text):
    UNREADABLE[name](tmp_path / name)
    with pytest.raises(TeacherMismatch) as refusal:
        load_teacher("digits-cnn", TEN, weights=str(tmp_path / name))
    said = str(refusal.value)
    assert text in said
    assert "weights_only" not in said, "torch's advice to run what the file says"
    assert ("torch.save(model.state_dict(), 'weights.pt')" in said) == (name in ("model.pt", "script.pt"))
    assert "\n" not in said


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_checkpoints_as_people_have_them(tmp_path, capsys, wrapper, prefix):
    trained = build_network("digits-cnn", 10, seed=8)
    state = {prefix + name: value for name, value in state_of(trained).items()}
    file = tmp_path / "cnn.pt"
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3, "best": 0.5}, file)
    loaded = load_teacher("digits-cnn", TEN, weights=str(file))
    assert weights_fingerprint(loaded.module) == weights_fingerprint(trained.module)
    said = capsys.readouterr().err
    assert (f"{file}: using the state dict under {wrapper!r}" in said) == (wrapper is not None)
    for part in ("module.", "_orig_mod."):
        assert (f"{file}: removed the prefix {part!r} from the names of all layers" in said) == (
            part in prefix
        )


def test_a_layer_that_is_called_module_keeps_its_name(tmp_path, capsys):
    trained = torch.nn.ModuleDict({"module": torch.nn.Linear(2, 2)})
    state = trained.state_dict()
    assert without_prefix(state, trained, "f") is state
    assert capsys.readouterr().err == ""
    wrapped = {f"module.{name}": value for name, value in state.items()}
    assert list(without_prefix(wrapped, trained, "f")) == list(state)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file(state_of(build_network("digits-mlp", 10)), file)
    with pytest.raises(TeacherMismatch, match=r"are not of network 'digits-cnn': missing \['conv1\.bias', "):
        load_teacher("digits-cnn", TEN, weights=str(file))
    text = (
        r"head\.(bias|weight) has shape \(10,.*\), expected \(7,.*\)\. "
        r"If the weights are for 10 classes, use --classes MAP to select the source's 7 of them"
    )
    with pytest.raises(TeacherMismatch, match=text):
        load_teacher("digits-mlp", TEN[:7], weights=str(file))
    with pytest.raises(RecipeError, match=r"there are no weights at .*none"):
        load_teacher("digits-mlp", TEN, weights=str(tmp_path / "none.pt"))
    with pytest.raises(
        RecipeError, match=r"teacher 'digits-mlp' has no weights: give --weights FILE \(\.saf"
    ):
        load_teacher("digits-mlp", TEN)
    with pytest.raises(RecipeError, match="weights 'V1' are no file and no name of weights"):
        load_teacher("digits-mlp", TEN, weights="V1")


def test_torchvision_network_at_another_size_makes_a_store(tmp_path, resnet_weights):
    source = random_source(12)
    network = load_teacher(RESNET18, source.class_names, weights=str(resnet_weights), size=32)
    assert (network.preprocessing.size, network.preprocessing.channels) == (32, 3)
    assert network.preprocessing.mean == (0.485, 0.456, 0.406)
    job = make_job(tmp_path / "s.zarr", write_teacher(tmp_path / "any"), source=source, encoding="float32")
    run_job(Job(job.store, source, job.recipe, TeacherRunner(network, [Tap(("avgpool",))]), 1, "float32"))
    reader = StoreReader(tmp_path / "s.zarr")
    stored = reader.components("features/avgpool", 0, np.arange(12))["values"]
    assert stored.shape == (12, 512, 1, 1)
    identity = reader.manifest.identity["teacher"]
    assert (identity["network"], identity["preprocessing"]["size"]) == (RESNET18, 32)
    weight, bias = network.module.fc.weight.numpy(), network.module.fc.bias.numpy()
    logits = reader.components("logits", 0, np.arange(12))["values"]
    assert np.abs(stored[:, :, 0, 0] @ weight.T + bias - logits).max() < 1e-4


def test_torchvision_names():
    with pytest.raises(
        UnknownName, match=r"unknown torchvision network 'resnet81'\. Did you mean 'resnet18'\?"
    ):
        build_network("torchvision:resnet81", 10)
    with pytest.raises(
        UnknownName, match=r"unknown weights of 'torchvision:resnet18' 'IMAGENET1K_V7'\. Did you mean"
    ):
        load_teacher(RESNET18, TEN, weights="IMAGENET1K_V7")
    with pytest.raises(UnknownName, match=r"unknown network 'digits-cmn'\. Did you mean 'digits-cnn'\?"):
        build_network("digits-cmn", 10)
    with pytest.raises(RecipeError, match="network 'run:x' is already trained"):
        build_network("run:x", 10)


def test_run_folders(tmp_path):
    folder = write_teacher(tmp_path / "run", "digits-cnn", seed=4)
    network = load_teacher(f"run:{folder}", TEN)
    assert (network.spec, network.weights_file) == ("digits-cnn", str(folder / WEIGHTS_FILE))
    assert load_teacher(f"run:{folder}", TEN, size=16).preprocessing.size == 16
    with pytest.raises(TeacherMismatch, match=r"has 10 classes, but the source has 3 \(0, 1, 2, \.\.\.\)"):
        load_teacher(f"run:{folder}", TEN[:3])
    with pytest.raises(RecipeError, match="brings its own weights: leave --weights out"):
        load_teacher(f"run:{folder}", TEN, weights="w.pt")
    description = network.describe() | {"preprocessing": {"size": 24, "mean": [0.0], "std": [1.0]}}
    (folder / NETWORK_FILE).write_text(write_yaml(description))
    assert load_teacher(f"run:{folder}", TEN).preprocessing == Preprocessing(size=24, mean=(0,), std=(1,))
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(RunError, match="has no trained weights: it is unfinished or not a run"):
        load_teacher(f"run:{folder}", TEN)
    with pytest.raises(RunError, match=r"there is no run at .*none'\. Make one with `distill train --out"):
        load_teacher(f"run:{tmp_path / 'none'}", TEN)


def test_finiteness_covers_features_and_bounds_its_text():
    features = torch.zeros(20, 2, 3)
    check_finite(TeacherOutput(torch.zeros(20, 4), {"stem": features}), range(20), "t")
    features[5:, 1, 2] = float("inf")
    text = r"teacher 't' gives features/stem .* for 15 samples of a batch \(105, 106, .*, 112, \.\.\.\)"
    with pytest.raises(NonFiniteOutput, match=text):
        check_finite(TeacherOutput(torch.zeros(20, 4), {"stem": features}), range(100, 120), "t")


def test_large_finite_values_are_finite():
    largest = torch.finfo(torch.float32).max
    rows = torch.tensor(
        [[largest] * 3, [1.0, float("nan"), 0.0], [float("inf"), -float("inf"), 0.0], [1.0] * 3]
    )
    assert finite_rows({"logits": rows})["logits"].tolist() == [True, False, False, True]


def test_wrong_shape_of_logits_and_missing_device(monkeypatch):
    network = build_network("digits-small", 10)
    network.module.head = torch.nn.Identity()
    with pytest.raises(
        TeacherMismatch, match=r"returns logits of shape \(3, 64\), expected \(3, 10\) \(N, C\)"
    ):
        TeacherRunner(network).run(pixels_of(3))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(
        RecipeError, match="device is 'cuda', but torch sees no CUDA device: use --device cpu"
    ):
        pick_device("cuda")
