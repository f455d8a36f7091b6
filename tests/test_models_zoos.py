"""Networks of torchvision and timm: pixels, sizes, auxiliary heads, names, and weights from files."""

from __future__ import annotations

from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.models as zoo
from safetensors.torch import save_file

from coursepack.config import write_yaml
from coursepack.errors import RecipeError, TeacherMismatch, UnknownName
from coursepack.models import Preprocessing, TeacherRunner, build_network, load_teacher
from coursepack.models.build import NETWORK_FILE, WEIGHTS_FILE, weights_fingerprint
from coursepack.models.hubs import HUBS, Hub, HubNetwork
from coursepack.models.weights import load_weights

TEN = tuple("0123456789")
TINY = Preprocessing(size=8, mean=(0.5,), std=(0.5,))
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels_of(count, *, size, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def state_of(network):
    return {name: value.clone() for name, value in network.module.state_dict().items()}


def write_run(folder, network):
    """A run folder with a network's description and weights."""
    folder.mkdir()
    (folder / NETWORK_FILE).write_text(write_yaml(network.describe()))
    save_file(state_of(network), folder / WEIGHTS_FILE)
    return folder


def test_auxiliary_heads_are_left_out(tmp_path):
    network = build_network("torchvision:googlenet", 10, seed=1, size=64)
    images = network.preprocessing(pixels_of(2, size=64))
    assert network.module.train()(images).shape == (2, 10)
    # What torchvision's own trained networks do with what they are given.
    assert network.module.transform_input
    state = state_of(network) | {head: torch.zeros(3, 4) for head in ("aux1.fc2.weight", "aux2.fc2.bias")}
    save_file(state, tmp_path / "w.safetensors")
    weights = str(tmp_path / "w.safetensors")
    loaded = load_teacher("torchvision:googlenet", TEN, weights=weights, size=64)
    assert weights_fingerprint(loaded.module) == weights_fingerprint(network.module)
    with pytest.raises(TeacherMismatch, match=r"not expected \['aux1\.fc2\.weight', 'aux2"):
        load_weights("googlenet", network.module, 10, state, weights)


def test_inception_has_no_auxiliary_head():
    network = build_network("torchvision:inception_v3", 10, size=96)
    assert network.module.train()(network.preprocessing(pixels_of(2, size=96))).shape == (2, 10)
    assert network.module.transform_input


def test_a_vision_transformer_is_built_for_its_size(monkeypatch, tmp_path):
    spec = "torchvision:vit_b_32"

    def smaller(name, *, weights, num_classes, image_size):
        assert (name, weights) == ("vit_b_32", None)
        return zoo.VisionTransformer(image_size, 32, 1, 2, 16, 16, num_classes=num_classes)

    monkeypatch.setattr(zoo, "get_model", smaller)
    assert TeacherRunner(build_network(spec, 10)).row_shapes(3) == {"logits": (10,)}
    network = build_network(spec, 10, size=64)
    assert TeacherRunner(network).row_shapes(3) == {"logits": (10,)}
    folder = write_run(tmp_path / "run", network)
    loaded = load_teacher(f"run:{folder}", TEN)
    assert TeacherRunner(loaded).row_shapes(3) == {"logits": (10,)}
    weights = str(folder / WEIGHTS_FILE)
    loaded = load_teacher(spec, TEN, weights=weights, size=64)
    assert weights_fingerprint(loaded.module) == weights_fingerprint(network.module)
    with pytest.raises(TeacherMismatch, match=r"encoder\.pos_embedding has shape \(1, 5, 16\), expected"):
        load_teacher(spec, TEN, weights=weights)
    loaded = load_teacher(f"run:{folder}", TEN, size=96)
    with pytest.raises(TeacherMismatch, match="cannot take views of 96 x 96 pixels: Wrong image height"):
        TeacherRunner(loaded).row_shapes(3)


def test_named_weights_bring_their_own_size(monkeypatch):
    make = zoo.get_model

    def without_a_download(name, *, weights):
        assert weights.name == "IMAGENET1K_SWAG_E2E_V1"
        return make(name, weights=None, image_size=384)

    monkeypatch.setattr(zoo, "get_model", without_a_download)
    network = load_teacher(
        "torchvision:vit_b_16", TEN, weights="IMAGENET1K_SWAG_E2E_V1", columns=tuple(range(10))
    )
    assert (network.preprocessing.size, network.classes) == (384, 1000)


def test_weights_of_torchvision_without_a_network(monkeypatch):
    def fail(name, *, weights):
        raise URLError("no route to host")

    monkeypatch.setattr(zoo, "get_model", fail)
    text = (
        r"weights 'IMAGENET1K_V1' of network 'torchvision:resnet18' cannot be fetched: .*no route to host.*"
        r"Fetch https://download\.pytorch\.org/models/resnet18-\w+\.pth where there is a network, and give"
    )
    with pytest.raises(RecipeError, match=text):
        load_teacher("torchvision:resnet18", TEN, weights="IMAGENET1K_V1", columns=tuple(range(10)))


def test_what_gives_more_than_logits_is_refused():
    network = build_network("resnet20", 10)
    network.module.forward = lambda images: (images, images)
    with pytest.raises(
        TeacherMismatch, match=r"'resnet20' returns a tuple, expected one tensor of shape \(2, 10\) \(N, C\)"
    ):
        TeacherRunner(network).run(pixels_of(2, size=32))


def test_a_row_makes_a_hub(monkeypatch, tmp_path):
    def build(name, classes, size):
        return HubNetwork(
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(classes)), TINY, classes
        )

    def load(name, weights, classes):
        return build(name, 12, None) if weights == "best" else None

    hub = Hub(
        "tiny:NAME", build, load, weights_help=", or best", unused_weights=("spare.",), check_output=True
    )
    monkeypatch.setitem(HUBS, "tiny", hub)
    before = torch.random.get_rng_state()
    network = build_network("tiny:one", 10, seed=1, size=4)
    assert (network.preprocessing.size, network.module[1].weight.shape) == (4, (10, 16))
    state = {**state_of(network), "spare.weight": torch.zeros(1)}
    save_file(state, tmp_path / "w.safetensors")
    loaded = load_teacher("tiny:one", TEN, weights=str(tmp_path / "w.safetensors"), size=4)
    assert weights_fingerprint(loaded.module) == weights_fingerprint(network.module)
    loaded = load_teacher("tiny:one", TEN, weights="best", columns=tuple(range(10)))
    assert (loaded.classes, loaded.weights_file, loaded.preprocessing) == (12, "best", TINY)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(TeacherMismatch, match="'tiny:one' has 12 classes, but the source has 10"):
        load_teacher("tiny:one", TEN, weights="best")
    with pytest.raises(RecipeError, match=r"no name of weights of network 'tiny:one': .*\.pt\), or best"):
        load_teacher("tiny:one", TEN, weights="worst")
    with pytest.raises(UnknownName, match="tiny:NAME, run:FOLDER"):
        build_network("small:one", 10)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(
        RecipeError,
        match=r"'timm:resnet18' needs timm, which cannot be imported: .*install 'coursepack\[teachers\]'",
    ):
        build_network("timm:resnet18", 10)


def test_timm_networks_expect_their_own_pixels():
    network = build_network("timm:test_vit", 10)
    assert network.preprocessing == Preprocessing(size=160, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    network = build_network("timm:mobilenetv3_small_050", 10)
    assert network.preprocessing == Preprocessing(size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    # The tag of published weights decides.
    means = {
        tag: build_network(f"timm:mobilenetv3_large_100.{tag}", 10).preprocessing.mean
        for tag in ("ra_in1k", "miil_in21k_ft_in1k")
    }
    assert means == {"ra_in1k": IMAGENET_MEAN, "miil_in21k_ft_in1k": (0.0, 0.0, 0.0)}


def test_timm_weights_depend_on_the_seed_alone():
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    found = [weights_fingerprint(build_network("timm:test_vit", 10, seed=seed).module) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found[0] == found[1] != found[2]


def test_timm_weights_from_files_and_runs(tmp_path):
    network = build_network("timm:test_resnet", 12, seed=3)
    save_file(state_of(network), tmp_path / "w.safetensors")
    columns = tuple(range(2, 12))
    weights = str(tmp_path / "w.safetensors")
    loaded = load_teacher("timm:test_resnet", TEN, weights=weights, size=32, columns=columns)
    assert (loaded.classes, loaded.preprocessing.size) == (12, 32)
    assert weights_fingerprint(loaded.module) == weights_fingerprint(network.module)
    pixels = pixels_of(3, size=32)
    with torch.inference_mode():
        expected = network.module.eval()(loaded.preprocessing(pixels))
    torch.testing.assert_close(TeacherRunner(loaded, columns=columns).run(pixels).logits, expected[:, 2:])
    with pytest.raises(TeacherMismatch, match=r"fc\.(bias|weight) has shape \(12,.*expected \(10,"):
        load_teacher("timm:test_resnet", TEN, weights=weights)
    with pytest.raises(RecipeError, match="weights 'a1_in1k' are no file"):
        load_teacher("timm:test_resnet", TEN, weights="a1_in1k")


def test_a_timm_transformer_is_built_for_its_size_again_from_its_run(tmp_path):
    built = build_network("timm:vit_tiny_patch16_224", 10, size=64)
    assert TeacherRunner(built).row_shapes(3) == {"logits": (10,)}
    folder = write_run(tmp_path / "run", built)
    loaded = load_teacher(f"run:{folder}", TEN)
    assert loaded.preprocessing == built.preprocessing
    assert TeacherRunner(loaded).row_shapes(3) == {"logits": (10,)}


def test_timm_names():
    with pytest.raises(
        UnknownName,
        match=r"unknown timm network 'resnet81'\. Did you mean 'resnet18'\? Known: .* more of timm's",
    ) as refusal:
        build_network("timm:resnet81", 10)
    assert len(str(refusal.value)) < 500
    with pytest.raises(UnknownName, match=r"'resnet18\.a1_in2k'\. Did you mean 'resnet18\.a1_in1k'\?"):
        build_network("timm:resnet18.a1_in2k", 10)
    for name in ("hf_hub:x/y", "", "timm/resnet18"):
        with pytest.raises(UnknownName, match="unknown timm network"):
            build_network(f"timm:{name}", 10)
    for name in ("hf-hub:timm/resnet18.a1_in1k", "local-dir:/tmp"):
        with pytest.raises(RecipeError, match=f"network 'timm:{name}' is already trained"):
            build_network(f"timm:{name}", 10)
    with pytest.raises(RecipeError, match="reads images of 1024 x 768 pixels, but views are square"):
        build_network("timm:vit_base_patch16_sapiens2", 10)
