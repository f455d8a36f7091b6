"""Taps: what they are called, what they catch, what a teacher keeps besides; and class maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import SHARPNESS, write_teacher
from click.testing import CliRunner
from helpers import make_job, random_source
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from coursepack.data import open_source
from coursepack.data.store import StoreReader, load_manifest
from coursepack.data.views import PRESETS, draw, render
from coursepack.errors import RecipeError, TeacherMismatch, UnknownName
from coursepack.models import Tap, TeacherRunner, build_network, load_teacher, parse_tap, reductions
from coursepack.models.classes import load_columns
from coursepack.models.load import reload_teacher
from coursepack.models.taps import KNOWN_REDUCTIONS, tap_from_name
from coursepack.precompute import run_job
from coursepack.precompute.cli import main as precompute
from coursepack.precompute.verify import job_of_store, verify_deep

RESNET18 = "torchvision:resnet18"
TEN = tuple("0123456789")
NETWORK = "digits-resnet"


def pixels_of(count, *, size=8, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, size, size, 1), dtype=np.uint8))


layers = st.from_regex(r"[a-z][a-z0-9_]{0,5}(\.[a-z0-9_]{1,6}){0,3}", fullmatch=True)
sizes, sketches = st.none() | st.integers(1, 512), st.none() | st.integers(1, 4096)
one_layer = layers.map(lambda layer: (layer,))
taps = st.one_of(
    st.builds(Tap, one_layer, st.sampled_from(KNOWN_REDUCTIONS), sizes),
    st.builds(Tap, one_layer, st.sampled_from(("map", "pooled", "attention", "gram")), sizes, sketches),
    st.builds(Tap, st.tuples(layers, layers), st.just("gram"), sizes, sketches),
)


@settings(max_examples=300, deadline=None)
@given(taps)
def test_a_tap_is_known_by_its_flag_and_by_its_name(tap):
    size = [] if tap.size is None else [str(tap.size)]
    sketch = [] if tap.sketch is None else ["sketch", str(tap.sketch)]
    assert parse_tap(":".join(["+".join(tap.layers), tap.reduction, *size, *sketch])) == tap
    assert parse_tap(tap.text) == tap
    assert tap_from_name(tap.name) == tap
    assert not set(tap.name) & set(':/\\*?"<>| ')


@settings(max_examples=100, deadline=None)
@given(st.lists(taps, min_size=2, max_size=2, unique=True))
def test_two_taps_have_two_names(two):
    assert two[0].name != two[1].name


@pytest.mark.parametrize(
    ("text", "tap", "name"),
    [
        ("layer1.0", Tap(("layer1.0",)), "layer1.0"),
        ("layer1.0:map", Tap(("layer1.0",)), "layer1.0"),
        ("a:map:4", Tap(("a",), "map", 4), "a@map4"),
        ("a:attention", Tap(("a",), "attention"), "a@attention"),
        ("a+b:gram", Tap(("a", "b"), "gram"), "a+b@gram"),
        ("a+b:gram:8", Tap(("a", "b"), "gram", 8), "a+b@gram8"),
        ("a:sketch:64", Tap(("a",), sketch=64), "a@sketch64"),
        ("a:map:4:sketch:64", Tap(("a",), "map", 4, 64), "a@map4@sketch64"),
        ("a+b:gram:sketch:8", Tap(("a", "b"), "gram", sketch=8), "a+b@gram@sketch8"),
    ],
)
def test_names_of_taps(text, tap, name):
    assert parse_tap(text) == tap
    assert tap.name == name


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "a:atention",
            UnknownName,
            r"unknown reduction 'atention'\. Did you mean 'attention'\? Known: map, po",
        ),
        ("a:Gram", UnknownName, r"unknown reduction 'Gram'\. Did you mean 'gram'\?"),
        ("a:", UnknownName, "unknown reduction ''"),
        (
            "a:map:",
            RecipeError,
            r"tap 'a:map:' is not LAYER\[:REDUCTION\[:SIZE\]\], as in layer3:attention:8",
        ),
        ("a:map:0", RecipeError, "tap 'a:map:0' is not LAYER"),
        ("a:map:-2", RecipeError, "is not LAYER"),
        ("a:map:four", RecipeError, "is not LAYER"),
        ("a:map:²", RecipeError, "is not LAYER"),
        ("a:map:4:4", RecipeError, "is not LAYER"),
        ("a+b", RecipeError, "tap 'a[+]b' names 2 layers: only `gram` takes two, as in a[+]b:gram"),
        ("a+b:attention", RecipeError, "names 2 layers"),
        ("a+b+c:gram", RecipeError, "names 3 layers"),
        (
            "a:sketch",
            RecipeError,
            r"tap 'a:sketch' is not LAYER\[:REDUCTION\[:SIZE\]\]:sketch:VALUES, as in layer3:sketch:1024",
        ),
        ("a:sketch:0", RecipeError, "tap 'a:sketch:0' is not LAYER"),
        ("a:gram:sketch:8:8", RecipeError, "is not LAYER"),
        ("a:sketch:8:gram", RecipeError, "is not LAYER"),
        ("a+b:sketch:8", RecipeError, "names 2 layers: only `gram` takes two"),
        ("a:skech:8", UnknownName, "unknown reduction 'skech'. Did you mean 'sketch'"),
        (
            "a:sign:sketch:8",
            RecipeError,
            "projects a sign, whose values are compared one by one: leave :sketch",
        ),
        ("a:margin:2:sketch:8", RecipeError, "projects a margin"),
    ],
)
def test_wrong_flags_are_refused(text, error, message):
    with pytest.raises(error, match=message):
        parse_tap(text)


@pytest.mark.parametrize("text", ["", "layer1.0.bn", "layer2+:gram", "layer9:pooled"])
def test_layers_that_are_not_there_are_refused(text):
    with pytest.raises(UnknownName, match=r"unknown layer '.*Known: stem, layer1, layer1\.0, "):
        TeacherRunner(build_network(NETWORK, 10), [parse_tap(text)])


def test_the_nearest_layer_is_named():
    with pytest.raises(
        UnknownName, match=r"unknown layer 'layer1\.0\.bm1'\. Did you mean 'layer1\.0\.bn1'\?"
    ):
        TeacherRunner(build_network(NETWORK, 10), [parse_tap("layer1.0.bm1:sign")])


ALL_TAPS = {
    "stem": lambda out: out["stem"],
    "layer1:pooled": lambda out: out["layer1"].mean((2, 3)),
    "layer2:attention": lambda out: out["layer2"].square().mean(1).flatten(1),
    "layer1:attention:4": lambda out: F.avg_pool2d(out["layer1"], 2).square().mean(1).flatten(1),
    "layer2:gram": lambda out: reductions.gram(out["layer2"]),
    "stem+layer1:gram": lambda out: torch.einsum("nihw,njhw->nij", out["stem"], out["layer1"]) / 64,
    "layer1+layer2:gram:2": lambda out: (
        torch.einsum("nihw,njhw->nij", F.avg_pool2d(out["layer1"], 4), F.avg_pool2d(out["layer2"], 2)) / 4
    ),
    "layer1.0.bn2:sign": lambda out: out["layer1.0.bn2"],
    "layer1.0.bn1:margin": lambda out: torch.maximum(out["layer1.0.bn1"], out["margins"][:, None, None]),
    "layer1:map:2": lambda out: F.avg_pool2d(out["layer1"], 4),
    "layer2:sketch:100": lambda out: reductions.sketch(out["layer2"], 100),
    "layer2:gram:2:sketch:5": lambda out: reductions.sketch(
        reductions.gram(F.avg_pool2d(out["layer2"], 2)), 5
    ),
    "stem+layer1:gram:sketch:9": lambda out: reductions.sketch(
        torch.einsum("nihw,njhw->nij", out["stem"], out["layer1"]) / 64, 9
    ),
}


def test_any_number_of_taps_cost_one_forward_pass():
    network = build_network(NETWORK, 10, seed=3)
    calls, outputs = [], {}
    runner = TeacherRunner(network, [parse_tap(text) for text in ALL_TAPS])
    network.module.register_forward_hook(lambda *_: calls.append(1))
    for name, layer in network.module.named_modules():
        layer.register_forward_hook(lambda _m, _i, out, name=name: outputs.__setitem__(name, out.clone()))
    output = runner.run(pixels_of(6))
    assert calls == [1]
    assert list(output.features) == [parse_tap(text).name for text in ALL_TAPS]
    bn = network.module.layer1[0].bn1
    outputs["margins"] = reductions.margins(bn.bias, bn.weight)
    assert (output.features["layer1.0.bn1@margin"] > outputs["layer1.0.bn1"]).any()
    for text, expected in ALL_TAPS.items():
        found = output.features[parse_tap(text).name]
        torch.testing.assert_close(found, expected(outputs), rtol=1e-5, atol=1e-6)
    shapes = runner.row_shapes(1)
    assert shapes == {name: tuple(value.shape[1:]) for name, value in output.arrays().items()}


def test_a_tap_before_an_activation_in_place_is_of_before():
    network = build_network(RESNET18, 10, seed=3, size=32)
    assert network.module.relu.inplace
    texts = ["bn1", "relu", "bn1:sign", "bn1:margin", "layer1.0.bn1"]
    features = TeacherRunner(network, [parse_tap(text) for text in texts]).run(pixels_of(3, size=32)).features
    before = features["bn1"]
    assert 0.2 < (before < 0).float().mean() < 0.8
    assert (features["layer1.0.bn1"] < 0).any()
    assert torch.equal(before.clamp_min(0), features["relu"])
    assert torch.equal(features["bn1@sign"], before)
    margins = reductions.margins(network.module.bn1.bias, network.module.bn1.weight)
    assert torch.equal(features["bn1@margin"], torch.maximum(before, margins[:, None, None]))
    assert (features["bn1@margin"] < 0).any()


@pytest.mark.parametrize(
    ("layer", "kind"), [("stem", "Conv2d"), ("layer1", "Sequential"), ("layer1.0", "_Residual")]
)
def test_margins_are_those_of_a_batch_normalisation(layer, kind):
    text = (
        rf"tap '{layer}@margin' needs a batch normalization .*, but layer '{layer}' is a {kind}: tap the one"
    )
    with pytest.raises(TeacherMismatch, match=text):
        TeacherRunner(build_network(NETWORK, 10), [parse_tap(f"{layer}:margin")])


def test_margins_need_weight_and_bias():
    network = build_network(NETWORK, 10)
    network.module.layer1[0].bn1 = nn.BatchNorm2d(32, affine=False)
    with pytest.raises(TeacherMismatch, match=r"needs a batch normalization with weight and bias"):
        TeacherRunner(network, [parse_tap("layer1.0.bn1:margin")])


@pytest.mark.parametrize(
    "text", ["head:attention", "head:gram", "head:pooled", "head:map:2", "head+stem:gram"]
)
def test_what_is_no_map_cannot_be_reduced(text):
    runner = TeacherRunner(build_network(NETWORK, 10), [parse_tap(text)])
    name = parse_tap(text).name
    with pytest.raises(TeacherMismatch) as refusal:
        runner.run(pixels_of(2))
    assert str(refusal.value).startswith(f"tap {name!r}: ")
    assert "needs feature maps (N, C, H, W), got (2, 10)" in str(refusal.value)


def test_a_sketch_that_saves_nothing_is_refused():
    runner = TeacherRunner(build_network(NETWORK, 10), [parse_tap("layer2:pooled:sketch:64")])
    text = (
        r"tap 'layer2@pooled@sketch64': a sketch of 64 values needs more values than that, got 64: leave it"
    )
    with pytest.raises(TeacherMismatch, match=text):
        runner.run(pixels_of(2))


def test_shapes_before_sketches_are_kept():
    network = build_network(NETWORK, 10, seed=2)
    texts = ["layer2:sketch:7", "stem+layer1:gram:sketch:9", "layer2:gram:2:sketch:5", "layer2"]
    kept = TeacherRunner(network, [parse_tap(text) for text in texts]).static()
    shapes = {name: value.tolist() for name, value in kept.items() if not name.startswith("head")}
    assert shapes == {
        "layer2@sketch7": [64, 4, 4],
        "stem+layer1@gram@sketch9": [32, 32],
        "layer2@gram2@sketch5": [4, 4],
    }


@pytest.mark.parametrize("spec", ["digits-small", "digits-mlp", "digits-cnn", NETWORK, RESNET18])
def test_the_heads_weights_are_kept(spec):
    network = build_network(spec, 10, seed=2)
    head = network.module.fc if spec == RESNET18 else network.module.head
    kept = TeacherRunner(network).static()
    assert kept.keys() == {"head_weight", "head_bias"}
    assert torch.equal(kept["head_weight"], head.weight)
    assert torch.equal(kept["head_bias"], head.bias)
    assert kept["head_weight"].shape == (10, head.in_features)
    assert not kept["head_weight"].requires_grad
    columns = (3, 0, 9)
    chosen = TeacherRunner(network, columns=columns).static()
    assert torch.equal(chosen["head_weight"], head.weight[list(columns)])
    assert torch.equal(chosen["head_bias"], head.bias[list(columns)])


def test_margins_are_kept_and_heads_that_are_none_are_not():
    network = build_network(NETWORK, 10, seed=2)
    bn = network.module.layer2[0].bn2
    bn.weight.data.uniform_(-2, 2)
    bn.bias.data.uniform_(-2, 2)
    kept = TeacherRunner(network, [parse_tap("layer2.0.bn2:margin"), parse_tap("stem")]).static()
    assert kept.keys() == {"head_weight", "head_bias", "layer2.0.bn2@margin"}
    assert torch.equal(kept["layer2.0.bn2@margin"], reductions.margins(bn.bias.data, bn.weight.data))
    network.module.head = nn.Linear(64, 10, bias=False)
    assert TeacherRunner(network).static().keys() == {"head_weight"}
    network.module.head = nn.Sequential(nn.Flatten(), nn.Conv1d(1, 1, 1))
    assert TeacherRunner(network).static() == {}
    network.module.head = nn.Linear(64, 11)
    assert TeacherRunner(network).static() == {}


NAMES = ("cat", "dog", "7")
MAPS = {
    "list": "[4, 0, 11]",
    "mapping": "{dog: 0, 7: 11, cat: 4}",
}


@pytest.mark.parametrize("text", MAPS.values(), ids=MAPS)
def test_class_maps_are_in_the_sources_order(tmp_path, text):
    (tmp_path / "map.yaml").write_text(text)
    assert load_columns(tmp_path / "map.yaml", NAMES) == (4, 0, 11)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "holds 2 entries, expected 3 class ids"),
        ("[1, 2, 3, 4]", "holds 4 entries, expected 3 class ids"),
        ("cat", "holds a str, expected 3 class ids"),
        ("3", "holds a int, expected 3 class ids"),
        ("", "holds a NoneType, expected 3 class ids"),
        ("{cat: 1, dog: 2}", r"does not name the source's 3 classes: missing \['7'\], unknown \[\] \(first"),
        ("{cat: 1, dog: 2, 7: 3, cow: 4}", r"missing \[\], unknown \['cow'\]"),
        ("[1, 2, -1]", "gives -1 for '7', expected a class id"),
        (
            "[1, two, 3]",
            "gives the name 'two', but the names of the teacher's classes are not known: give its index",
        ),
        ("[1, 2.0, 3]", "gives 2.0 for 'dog', expected a class id"),
        ("[true, 2, 3]", "gives True for 'cat', expected a class id"),
        ("[1, null, 3]", "gives None for 'dog', expected a class id"),
        ("[1, [2], 3]", r"gives \[2\] for 'dog', expected a class id"),
        ("[5, 2, 5]", "gives one of the teacher's classes to two classes"),
        ("[1, 2", "is not YAML"),
    ],
)
def test_wrong_class_maps_are_refused(tmp_path, text, message):
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message) as refusal:
        load_columns(tmp_path / "map.yaml", NAMES)
    assert str(tmp_path / "map.yaml") in str(refusal.value)


def test_a_missing_class_map_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read '.*map\.yaml'"):
        load_columns(tmp_path / "map.yaml", NAMES)


COLUMNS = (11, 3, 2, 1, 0, 7, 6, 5, 8, 10)


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """A weights file of a network with twelve classes, and a class map for the digits."""
    folder = tmp_path_factory.mktemp("twelve")
    network = build_network("digits-cnn", 12, seed=6)
    state = {name: value.clone() for name, value in network.module.state_dict().items()}
    state["head.weight"] *= SHARPNESS
    network.module.load_state_dict(state)
    save_file(state, folder / "twelve.safetensors")
    (folder / "classes.yaml").write_text(str(list(COLUMNS)))
    return folder, network


def command(folder, store, *words):
    """Run `precompute run` with the teacher of twelve classes."""
    line = [
        *("run", "--teacher", "digits-cnn", "--weights", str(folder / "twelve.safetensors")),
        *("--source", "digits", "--view", "digits", "--views", "1", "--encoding", "float32"),
        *("--store", str(store), "--device", "cpu", *words),
    ]
    return CliRunner().invoke(precompute, line)


def test_a_class_map_keeps_exactly_its_columns(tmp_path, twelve):
    folder, network = twelve
    result = command(
        folder, tmp_path / "s.zarr", "--classes", str(folder / "classes.yaml"), "--tap", "hidden"
    )
    assert result.exit_code == 0, result.output
    reader, samples = StoreReader(tmp_path / "s.zarr"), np.arange(1442)
    recipe, source = PRESETS["digits"], open_source("digits")
    pixels = render(recipe, source, samples, draw(recipe, source, samples, 0), 8)
    whole = TeacherRunner(network).run(torch.from_numpy(pixels)).logits
    found = reader.rows("logits", 0, samples).decode()
    assert found.shape == (1442, 10)
    torch.testing.assert_close(found, whole[:, list(COLUMNS)], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, whole[:, :10], rtol=1e-2)
    weight = network.module.head.weight.detach()[list(COLUMNS)].numpy()
    assert np.array_equal(reader.static("head_weight"), weight)
    hidden = reader.rows("features/hidden", 0, samples).decode().clamp_min(0).numpy()
    logits = hidden @ weight.T + reader.static("head_bias")
    assert np.abs(logits - found.numpy()).max() < 0.05
    manifest = load_manifest(tmp_path / "s.zarr")
    identity = manifest.identity["teacher"]
    assert identity["columns"] == list(COLUMNS)
    again = reload_teacher(identity, TEN, str(folder / "twelve.safetensors"))
    assert again.classes == 12
    file = str(folder / "twelve.safetensors")
    job = job_of_store(tmp_path / "s.zarr", manifest, weights=file, root=None, device=torch.device("cpu"))
    assert verify_deep(job, 1442).wrong == ()


def test_without_a_class_map_the_classes_have_to_be_the_same(tmp_path, twelve):
    folder, _ = twelve
    result = command(folder, tmp_path / "s.zarr")
    assert result.exit_code == 1
    assert "has shape (12" in result.output
    assert "If the weights are for 12 classes, use --classes MAP" in result.output
    assert not (tmp_path / "s.zarr").exists()
    teacher = write_teacher(tmp_path / "run", "digits-cnn", classes=12)
    with pytest.raises(TeacherMismatch, match=r"map the source's classes to the teacher's with --classes"):
        load_teacher(f"run:{teacher}", TEN)
    assert load_teacher(f"run:{teacher}", TEN, columns=COLUMNS).classes == 12
    with pytest.raises(
        TeacherMismatch, match=r"--classes names class 12, but teacher .* has classes 0\.\.11"
    ):
        load_teacher(f"run:{teacher}", TEN, columns=(*COLUMNS[:9], 12))


def test_a_store_keeps_what_its_taps_gave(tmp_path):
    source = random_source(20)
    texts = [
        "layer1:attention",
        "layer1.0.bn2:sign",
        "layer1.0.bn1:margin",
        "stem+layer1:gram",
        "layer2:map:2",
        "layer2:sketch:30",
    ]
    teacher = write_teacher(tmp_path / "run", NETWORK, seed=3)
    job = make_job(
        tmp_path / "s.zarr", teacher, source=source, taps=[parse_tap(text) for text in texts],
        feature_encoding="float32", views=1,
    )  # fmt: skip
    run_job(job)
    reader, samples = StoreReader(tmp_path / "s.zarr"), np.arange(20)
    pixels = render(job.recipe, source, samples, draw(job.recipe, source, samples, 0), 8)
    features = job.runner.run(torch.from_numpy(pixels)).features
    for name, value in features.items():
        found = reader.rows(f"features/{name}", 0, samples).decode()
        expected = torch.where(value > 0, 1.0, -1.0) if name.endswith("@sign") else value
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert reader.manifest.arrays["features/layer1.0.bn2@sign"].encoding.name == "bits"
    assert reader.static("layer1.0.bn1@margin").shape == (32,)
    assert reader.static("layer2@sketch30").tolist() == [64, 4, 4]


def test_a_reloaded_teacher_is_the_one_that_wrote(tmp_path):
    teacher = write_teacher(tmp_path / "run", "digits-cnn", seed=3)
    job = make_job(tmp_path / "s.zarr", teacher)
    identity = job.plan().identity["teacher"]
    weights = str(teacher / "student.safetensors")
    again = reload_teacher(identity, TEN, weights)
    pixels = pixels_of(4)
    assert torch.equal(TeacherRunner(again).run(pixels).logits, job.runner.run(pixels).logits)
    assert again.preprocessing == job.runner.network.preprocessing
    other = write_teacher(tmp_path / "other", "digits-cnn", seed=4) / "student.safetensors"
    with pytest.raises(
        TeacherMismatch, match=r"are not the ones that wrote the store: give the old weights, or"
    ):
        reload_teacher(identity, TEN, str(other))
    changed = identity | {"preprocessing": identity["preprocessing"] | {"mean": [0.5]}}
    assert reload_teacher(changed, TEN, weights).preprocessing.mean == (0.5,)
