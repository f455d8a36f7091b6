"""Networks in ONNX files and of torch.export: equal to onnxruntime and torch, and what is refused."""

from __future__ import annotations

import pickle
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from published import TEN, Trap, change_json, images_of, write_published
from safetensors.torch import load_file, save_file
from torch import nn

from coursepack.config import write_yaml
from coursepack.data import view_recipe
from coursepack.data.sources import InMemory
from coursepack.data.store import StoreReader
from coursepack.distill.recipe import TrainRecipe
from coursepack.distill.setup.build import build_student
from coursepack.distill.setup.requirements import precompute_command
from coursepack.distill.targets.live import live_teachers
from coursepack.errors import RecipeError, TeacherMismatch, UntrustedCode
from coursepack.models import Tap, TeacherRunner, build_network, load_teacher
from coursepack.models.build import NETWORK_FILE, WEIGHTS_FILE, weights_fingerprint
from coursepack.precompute import Job, run_job
from coursepack.precompute.cli import main as precompute

SIDE = 16
PIXELS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}


class Exported(NamedTuple):
    module: nn.Module
    folder: Path


class Tiny(nn.Module):
    """Convolution, batch normalization, mean over positions and a linear layer."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, images):
        return self.head(torch.relu(self.norm(self.conv(images))).mean((2, 3)))


def tiny(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Tiny().eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network of timm in a folder of transformers, and the files that torch exported from it."""
    import timm

    folder = write_published(tmp_path_factory.mktemp("exported") / "hf", "timm")
    pixels = {"input_size": [3, SIDE, SIDE], "mean": PIXELS["mean"], "std": PIXELS["std"]}
    change_json(folder / "config.json", pretrained_cfg=pixels)
    state = load_file(folder / "model.safetensors")
    state = {name.removeprefix("timm_model."): value for name, value in state.items()}
    save_file(state, folder / "timm.safetensors")
    module = timm.create_model("test_resnet", num_classes=10).eval()
    module.load_state_dict(state)
    images, shapes = torch.zeros(2, 3, SIDE, SIDE), ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (images,), dynamic_shapes=shapes)
    torch.export.save(program, folder / "net.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        options = {"dynamo": True, "optimize": False, "external_data": False, "verbose": False}
        torch.onnx.export(program, (images,), folder / "net.onnx", **options)
    return Exported(module, folder)


def test_logits_equal_onnxruntime_and_torch(exported):
    module, file = exported.module, exported.folder / "net.onnx"
    images = torch.from_numpy(images_of(5, size=SIDE))
    network = load_teacher(f"onnx:{file}", TEN, **PIXELS)
    assert (network.spec, network.classes, network.preprocessing.size) == ("onnx", 10, SIDE)
    ours = TeacherRunner(network).run(images).logits
    given = network.preprocessing(images)
    session = onnxruntime.InferenceSession(str(file))
    [theirs] = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    assert np.abs(ours.numpy() - theirs).max() <= 1e-5 * np.abs(theirs).max()
    with torch.inference_mode():
        assert (module(given) - ours).abs().max() <= 1e-5 * ours.abs().max()


def images_source(count=12):
    return InMemory("images", images_of(count, size=SIDE), np.arange(count) % 10, TEN)


@pytest.mark.parametrize("kind", ["onnx", "exported"])
def test_stores_find_their_teacher_again_whatever_the_batch_size(exported, tmp_path, kind):
    file = exported.folder / {"onnx": "net.onnx", "exported": "net.pt2"}[kind]
    network = load_teacher(f"{kind}:{file}", TEN, trust_code=True, **PIXELS)
    source, stored = images_source(), []
    for batch_size in (12, 5):
        path = tmp_path / f"{batch_size}.zarr"
        job = Job(path, source, view_recipe("none"), TeacherRunner(network), 1, encoding="float32")
        run_job(replace(job, batch_size=batch_size), quiet=True)
        stored.append(StoreReader(path).components("logits", 0, np.arange(12))["values"])
    with torch.inference_mode():
        expected = exported.module(network.preprocessing(torch.from_numpy(source.images))).numpy()
    for logits in stored:
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    reader = StoreReader(path)
    teacher, origin = reader.manifest.identity["teacher"], reader.manifest.origin
    assert (teacher["network"], origin["weights_file"]) == (kind, f"{kind}:{file}")
    assert origin["library"].startswith(("onnxruntime ", "torch "))
    [runner] = live_teachers([reader], [["logits"]], torch.device("cpu"), trust_code=True)
    np.testing.assert_array_equal(runner.run(torch.from_numpy(source.images)).logits.numpy(), stored[0])
    assert f"--teacher {kind}:{file} --size {SIDE} --mean 0.4,0.5,0.6" in precompute_command(reader, None)
    if kind == "exported":
        with pytest.raises(UntrustedCode, match="It was not opened"):
            live_teachers([reader], [["logits"]], torch.device("cpu"))
    peer = {"student": f"store:{path}", "member": 1, "objective": {}, "source": "a", "evaluation": "b"}
    with pytest.raises(RecipeError, match="as it was exported, so it cannot be trained: name another peer"):
        build_student(TrainRecipe.model_validate({**peer, "view": {}}), source, trust_code=True)


def write_model(path, *, inputs=None, outputs=None, nodes=None, weights=None):
    """An ONNX file that averages the positions of its images, unless something else is given."""
    inputs = {"images": ["N", 3, SIDE, SIDE]} if inputs is None else inputs
    outputs = {"logits": ["N", 3]} if outputs is None else outputs
    first = next(iter(inputs))
    nodes = nodes or [helper.make_node("ReduceMean", [first, "axes"], [next(iter(outputs))], keepdims=0)]
    weights = weights or [numpy_helper.from_array(np.array([2, 3]), "axes")]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def scaled(location, offset=0):
    """Nodes and weights of a model whose factors are external data."""
    factors = numpy_helper.from_array(np.full(3, 2, np.float32), "factors")
    factors.ClearField("raw_data")
    factors.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": str(offset), "length": "12"}.items():
        factors.external_data.add(key=key, value=value)
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["means"], keepdims=0),
        helper.make_node("Mul", ["means", "factors"], ["logits"]),
    ]
    return {"nodes": nodes, "weights": [numpy_helper.from_array(np.array([2, 3]), "axes"), factors]}


THREE = ("a", "b", "c")
GIVEN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def test_external_data_is_part_of_the_fingerprint(tmp_path):
    file, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    write_model(file, **scaled("m.onnx.data"))
    prints = []
    for factor in (2, 3):
        data.write_bytes(np.full(3, factor, np.float32).tobytes())
        network = load_teacher(f"onnx:{file}", THREE, **GIVEN)
        prints.append(weights_fingerprint(network.module))
        pixels = torch.full((1, SIDE, SIDE, 3), 51, dtype=torch.uint8)
        torch.testing.assert_close(
            TeacherRunner(network).run(pixels).logits, torch.full((1, 3), 0.2 * factor)
        )
    assert prints[0] != prints[1]
    (tmp_path / "moved").mkdir()
    for path in (file, data):
        path.rename(tmp_path / "moved" / path.name)
    network = load_teacher(f"onnx:{tmp_path / 'moved' / 'm.onnx'}", THREE, **GIVEN)
    assert weights_fingerprint(network.module) == prints[1]


def test_images_with_channels_last_and_of_any_size(tmp_path):
    weights = [numpy_helper.from_array(np.array([1, 2]), "axes")]
    file = write_model(tmp_path / "m.onnx", inputs={"pixels": ["N", "H", "W", 3]}, weights=weights)
    with pytest.raises(
        RecipeError, match="does not define the pixels it expects: give --size, --mean, --std"
    ):
        load_teacher(f"onnx:{file}", THREE)
    network = load_teacher(f"onnx:{file}", THREE, size=5, **GIVEN)
    pixels = torch.from_numpy(images_of(4, size=5))
    expected = pixels.float().mean((1, 2)) / 255
    torch.testing.assert_close(TeacherRunner(network).run(pixels).logits, expected)


def _outside(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(12))
    return write_model(tmp_path / "in" / "m.onnx", **scaled("../secret"))


def _linked(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(12))
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    return write_model(tmp_path / "in" / "m.onnx", **scaled("link"))


def _noise(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 40)
    return tmp_path / "m.onnx"


def _model(**parts):
    return lambda tmp_path: write_model(tmp_path / "m.onnx", **parts)


IMAGES = ["N", 3, SIDE, SIDE]
REFUSED = [
    (_outside, r"refers to external data '\.\./secret' outside of its folder .*which is not read"),
    (_linked, "refers to external data 'link' outside of its folder"),
    (_model(**scaled("/etc/passwd")), "refers to external data '/etc/passwd' outside of its folder"),
    (_model(**scaled("lost.data")), "needs its external data 'lost.data', but .* has no such file"),
    (_noise, "cannot be read as ONNX"),
    (_model(inputs={"images": IMAGES, "mask": ["N", 1]}), r"has 2 inputs \('images', 'mask'\), expected one"),
    (_model(inputs={"images": [1, 3, SIDE, SIDE]}), "fixes the batch at 1; expected a free number .*dynamic"),
    (_model(inputs={"images": ["N", 3, 8, 16]}), "but views are square"),
    (_model(inputs={"images": ["N", 4, 8, 8]}), "expected 1 or 3 channels"),
    (_model(outputs={"logits": ["N", 3, 1, 1]}, nodes=[helper.make_node("ReduceMean", ["images", "axes"],
                                                                        ["logits"], keepdims=1)]),
     r"output 'logits' is a tensor\(float\) of shape \['N', 3, 1, 1\], expected tensor\(float\) \(N, C\)"),
    (_model(outputs={"x": ["N", 3], "y": ["N", 3]},
            nodes=[helper.make_node("ReduceMean", ["images", "axes"], [name], keepdims=0) for name in "xy"]),
     r"has 2 outputs \('x', 'y'\), expected one, or one called 'logits'"),
    (_model(nodes=[helper.make_node("ReduceMean", ["images", "axes"], ["means"], keepdims=0),
                   helper.make_node("Softmax", ["means"], ["logits"])]),
     "ends in Softmax, so 'logits' holds probabilities, expected logits"),
    (_model(nodes=[helper.make_node("Foreign", ["images"], ["logits"], domain="custom")]),
     "cannot be run by onnxruntime"),
]  # fmt: skip


@pytest.mark.parametrize(("write", "text"), REFUSED)
def test_files_that_are_refused(tmp_path, write, text):
    (tmp_path / "in").mkdir()
    with pytest.raises(TeacherMismatch, match=text) as refusal:
        load_teacher(f"onnx:{write(tmp_path)}", THREE, **GIVEN)
    assert "\n" not in str(refusal.value)


def test_what_needs_layers_is_refused(tmp_path):
    network = load_teacher(f"onnx:{write_model(tmp_path / 'm.onnx')}", THREE, **GIVEN)
    with pytest.raises(
        RecipeError, match="is run by onnxruntime as it was exported and has no layers to tap"
    ):
        TeacherRunner(network, [Tap(("conv",))])
    with pytest.raises(RecipeError, match="in float32: leave --precision bfloat16 out"):
        TeacherRunner(network, precision="bfloat16")
    with pytest.raises(RecipeError, match="in float32: leave --compile out"):
        TeacherRunner(network, compiled=True)
    with pytest.raises(TeacherMismatch, match=r"cannot take views of 9 x 9 pixels: .*--size"):
        TeacherRunner(load_teacher(f"onnx:{tmp_path / 'm.onnx'}", THREE, size=9, **GIVEN)).row_shapes(3)
    with pytest.raises(RecipeError, match="there is no file"):
        load_teacher("onnx:none.onnx", THREE, **GIVEN)
    with pytest.raises(RecipeError, match="is already trained"):
        build_network("onnx:none.onnx", 3)


def test_without_onnxruntime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RecipeError, match=r"needs onnxruntime and onnx, .*'coursepack\[teachers\]'"):
        load_teacher("onnx:x", TEN)


def doctored(path):
    """A .pt2 file whose weights are a pickle that runs code."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("archive/data/weights/weight_0", "archive/data/sample_inputs/model.pt", "data.pkl"):
            archive.writestr(name, pickle.dumps(Trap()))
        archive.writestr("archive/archive_format", "pt2")
    return path


def test_an_exported_file_is_not_opened_unless_trusted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    doctored(tmp_path / "m.pt2")
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("opened"))
    text = r"reading it can run code.*It was not opened\. Better export the network to ONNX.* onnx:FILE"
    with pytest.raises(UntrustedCode, match=text):
        load_teacher("exported:m.pt2", TEN, **PIXELS)
    line = "--teacher exported:m.pt2 --mean 0,0,0 --std 1,1,1 --size 8 --source digits --view none --views 1"
    result = CliRunner().invoke(precompute, ["run", *line.split(), "--store", "new.zarr"])
    assert (result.exit_code, "It was not opened" in result.stderr) == (1, True)
    assert not Path("trapped").exists()
    assert not Path("new.zarr").exists()


def test_torchscript_is_refused_even_if_trusted(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is going away
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "m.pt")
    with pytest.raises(RecipeError, match="is TorchScript, which is not read: export the network to ONNX"):
        load_teacher(f"exported:{tmp_path / 'm.pt'}", TEN, trust_code=True, **PIXELS)


def test_exported_files_with_a_fixed_batch_are_refused(tmp_path):
    program = torch.export.export(tiny(), (torch.zeros(2, 3, SIDE, SIDE),))
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(TeacherMismatch, match=r"fixes the batch at 2 images; .*export it again with dynamic"):
        load_teacher(f"exported:{tmp_path / 'm.pt2'}", TEN, trust_code=True, **PIXELS)
    (tmp_path / "m.pt2").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(TeacherMismatch, match="cannot be read"):
        load_teacher(f"exported:{tmp_path / 'm.pt2'}", TEN, trust_code=True, **PIXELS)


def write_run(folder, network):
    """A run folder of a network."""
    folder.mkdir()
    (folder / NETWORK_FILE).write_text(write_yaml(network.describe()))
    state = {name: value.clone() for name, value in network.module.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE)


def test_stores_of_one_network_through_all_hubs_agree(exported, tmp_path):
    file = str(exported.folder / "timm.safetensors")
    write_run(tmp_path / "run", load_teacher("timm:test_resnet", TEN, weights=file, size=SIDE, **PIXELS))
    specs = {
        "timm": ("timm:test_resnet", {"weights": file, "size": SIDE, **PIXELS}),
        "run": (f"run:{tmp_path / 'run'}", {}),
        "hf": (f"hf:{exported.folder}", {}),
        "onnx": (f"onnx:{exported.folder / 'net.onnx'}", PIXELS),
    }
    source, found = images_source(), {}
    for name, (spec, pixels) in specs.items():
        runner = TeacherRunner(load_teacher(spec, TEN, **pixels))
        job = Job(tmp_path / f"{name}.zarr", source, view_recipe("none"), runner, 1, encoding="float32")
        run_job(job, quiet=True)
        found[name] = StoreReader(job.store).components("logits", 0, np.arange(12))["values"]
    assert found["timm"].std() > 0.01
    np.testing.assert_array_equal(found["timm"], found["run"])
    for name in ("hf", "onnx"):
        np.testing.assert_allclose(
            found[name], found["timm"], rtol=0, atol=1e-5 * np.abs(found["timm"]).max()
        )
