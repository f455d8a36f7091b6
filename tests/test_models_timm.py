"""Trained networks of timm: from folders, from the hub and by the tag of their weights."""

from __future__ import annotations

import pytest
import torch
from published import SIDE, TEN, Trap, change_json, images_of
from safetensors.torch import save_file

from coursepack.errors import RecipeError, TeacherMismatch, UnknownName
from coursepack.models import Preprocessing, Tap, TeacherRunner, load_teacher
from coursepack.models.build import weights_fingerprint
from coursepack.models.load import teacher_class_names

PIXELS = {"input_size": (3, SIDE, SIDE), "mean": (0.3, 0.4, 0.5), "std": (0.2, 0.3, 0.4), "crop_pct": 1.0}


def lively(name="test_resnet", classes=10, **arguments):
    """A network of timm with random weights that depend on nothing."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        network = timm.create_model(name, num_classes=classes, **arguments)
        for value in network.parameters():
            if value.ndim == 1:  # the last norm of a residual block begins at zero
                torch.nn.init.uniform_(value, 0.5, 1.5)
    return network.eval()


@pytest.fixture
def folder(tmp_path):
    """A folder that timm wrote, with names of classes."""
    from timm.models import save_for_hf

    network = lively()
    config = {"pretrained_cfg": PIXELS, "label_names": list(TEN)}
    save_for_hf(network, tmp_path / "net", model_config=config, safe_serialization=True, data_config=PIXELS)
    return tmp_path / "net"


def test_logits_equal_timms_own_pipeline(folder):
    import timm
    from PIL import Image

    network = load_teacher(f"timm:local-dir:{folder}", TEN)
    assert network.preprocessing == Preprocessing(size=SIDE, mean=PIXELS["mean"], std=PIXELS["std"])
    assert (network.spec, network.class_names) == ("timm:test_resnet", TEN)
    assert network.weights_file == f"timm:local-dir:{folder.resolve()}"
    images = images_of(4)
    output = TeacherRunner(network, [Tap(("layer3",))]).run(torch.from_numpy(images))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=theirs))
    with torch.inference_mode():
        expected = theirs(torch.stack([transform(Image.fromarray(image)) for image in images]))
    assert expected.std() > 0.01
    assert (output.logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert output.features["layer3"].ndim == 4


def test_a_folder_and_its_weights_file_are_the_same_teacher(folder):
    one = load_teacher(f"timm:local-dir:{folder}", TEN)
    other = load_teacher("timm:test_resnet", TEN, weights=str(folder / "model.safetensors"), size=SIDE)
    assert one.spec == other.spec == "timm:test_resnet"
    assert weights_fingerprint(one.module) == weights_fingerprint(other.module)
    change_json(folder / "config.json", model_args={"act_layer": "gelu"})
    assert load_teacher(f"timm:local-dir:{folder}", TEN).settings != one.settings


def _other_weights(folder):
    save_file({"conv.weight": torch.zeros(2)}, folder / "model.safetensors")


def _pickled(folder):
    torch.save({"fc.weight": Trap()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _changed(**values):
    return lambda folder: change_json(folder / "config.json", **values)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (_other_weights, TeacherMismatch, "are not of network .*missing"),
        (_pickled, RecipeError, r"has no \.safetensors file; pytorch_model\.bin may run code"),
        (_changed(architecture="test_resnot"), UnknownName, "unknown timm network 'test_resnot'"),
        (_changed(num_classes="ten"), RecipeError, "has num_classes 'ten', expected a number"),
        (_changed(model_args={"no_such": 1}), RecipeError, "timm cannot build 'test_resnet' from its config"),
        (_changed(model_args={"checkpoint_path": "x"}), RecipeError, r"model_args \['checkpoint_path'\]"),
    ],
)
def test_folders_that_are_refused(folder, tmp_path, monkeypatch, change, kind, text):
    monkeypatch.chdir(tmp_path)
    change(folder)
    with pytest.raises(kind, match=text):
        load_teacher(f"timm:local-dir:{folder}", TEN)
    assert not (tmp_path / "trapped").exists()


def test_published_weights_by_their_tag(monkeypatch, tmp_path):
    asked, published = [], lively(classes=1000)

    def create(name, *, pretrained):
        asked.append((name, pretrained))
        return published

    monkeypatch.setattr("timm.create_model", create)
    columns = tuple(range(10))
    network = load_teacher("timm:test_resnet", TEN, weights="r160_in1k", columns=columns)
    assert asked == [("test_resnet.r160_in1k", True)]
    assert (network.classes, network.preprocessing.size, network.weights_file) == (1000, 160, "r160_in1k")
    names = teacher_class_names("timm:test_resnet", "r160_in1k")
    assert (len(names), names[0]) == (1000, "n01440764")
    with pytest.raises(RecipeError, match=r"or the tag of timm's weights"):
        load_teacher("timm:test_resnet", TEN, weights="r160_in2k")

    def fail(name, *, pretrained):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.create_model", fail)
    text = (
        r"cannot be fetched: OSError: no route to host\. Fetch "
        r"https://huggingface\.co/timm/test_resnet\.r160_in1k/resolve/main/model\.safetensors where"
    )
    with pytest.raises(RecipeError, match=text):
        load_teacher("timm:test_resnet", TEN, weights="r160_in1k", columns=columns)
