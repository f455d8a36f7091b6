"""Exported students: logits of the run in onnxruntime and transformers, what files carry, and refusals."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from builders import CPU, make_recipe
from click.testing import CliRunner
from published import images_of
from reported import metrics_line, write_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from coursepack.config import write_yaml
from coursepack.data import open_source
from coursepack.data.store import StoreReader
from coursepack.distill.cli import main as distill
from coursepack.distill.cli.export import EXPORT_FORMATS
from coursepack.distill.runs.export import export_run
from coursepack.distill.runs.train import train
from coursepack.errors import RecipeError, RunError, TeacherMismatch, UntrustedCode
from coursepack.models import TeacherRunner, build_network, load_teacher
from coursepack.models.build import NETWORK_FILE, WEIGHTS_FILE
from coursepack.models.export import FORMATS
from coursepack.precompute.cli import main as precompute

ROOT = Path(__file__).parents[1]
DIGITS = open_source("digits").class_names
TOLERANCE = 1e-5
"""Of the largest logit."""
PIXELS = {"student_size": 10, "student_mean": [0.25], "student_std": [0.4]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose last weights are not its best, with an average, checkpoints and pixels of its own."""
    out = tmp_path_factory.mktemp("runs") / "cnn"
    optimizer = {"lr": 0.05, "ema": 0.5}
    fields = {"limit": 128, "epochs": 3, "keep_checkpoints": 1, "optimizer": optimizer, **PIXELS}
    train(make_recipe(student="digits-cnn", **fields), out, device=CPU)
    best = {name: value * 1.5 for name, value in load_file(out / WEIGHTS_FILE).items()}
    save_file(best, out / "best.safetensors")
    return out


def command(*words, group=distill):
    return CliRunner().invoke(group, [str(word) for word in words])


def pixels_of(size, channels, count=6):
    shape = (count, size, size, channels)
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def logits_of(spec, pixels, names=DIGITS, **fields):
    """Logits of a network of the run or of a teacher."""
    runner = TeacherRunner(load_teacher(spec, names, **fields))
    return runner.run(torch.from_numpy(pixels)).logits.numpy()


def assert_close(found, wanted):
    assert wanted.std() > 0
    assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def in_onnxruntime(file, pixels):
    """Logits of a file that is used with nothing but what it says of itself."""
    session = onnxruntime.InferenceSession(str(file))
    card = session.get_modelmeta().custom_metadata_map
    values = json.loads(card["preprocessing"])
    mean, std = (np.array(values[name], np.float32).reshape(-1, 1, 1) for name in ("mean", "std"))
    assert pixels.shape[1:3] == (values["size"], values["size"])
    images = (pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255 - mean) / std
    [logits] = session.run(["logits"], {"images": images})
    return logits, json.loads(card["class_names"])


# safetensors


def test_weights_carry_their_card(run, tmp_path):
    out = tmp_path / "student.safetensors"
    result = command("export", run, "--format", "safetensors", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"{out}: 10 classes, images of 10 x 10 pixels and 1 channel; logits within 0.0e+00 of the run's "
        "largest\n"
    )
    assert {file.name for file in tmp_path.iterdir()} == {"student.safetensors", "student.json"}
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    wanted = load_file(run / WEIGHTS_FILE)
    held = load_file(out)
    assert held.keys() == wanted.keys()
    assert all(torch.equal(held[name], value) for name, value in wanted.items())
    card = json.loads((tmp_path / "student.json").read_text())
    assert card["preprocessing"] == {"size": 10, "mean": [0.25], "std": [0.4]}
    assert card["class_names"] == list(DIGITS)
    assert card["network"] == metadata["network"] == "digits-cnn"
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert card["trained"] | {"fingerprint": None} == {
        "method": "supervised", "weights": "last epoch", "averaged": True, "fingerprint": None,
        "accuracy": line["evaluation"]["accuracy"], "evaluation": "digits:test",
    }  # fmt: skip
    texts = {
        name: value if isinstance(value, str) else json.loads(metadata[name]) for name, value in card.items()
    }
    assert texts == card
    pixels = pixels_of(10, 1)
    assert np.array_equal(logits_of("digits-cnn", pixels, weights=str(out)), logits_of(f"run:{run}", pixels))
    assert load_teacher("digits-cnn", DIGITS[::-1], weights=str(out)).columns == tuple(range(9, -1, -1))


def test_best_and_kept_weights_leave_too(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"cnn": WEIGHTS_FILE, "cnn-best": "best.safetensors"}
    files["cnn-epoch-0001"] = "checkpoints/epoch-0001.safetensors"
    for name, suffix in zip(files, ("", "@best", "@1"), strict=True):
        result = command("export", f"{run}{suffix}", "--format", "safetensors", "--json")
        assert json.loads(result.stdout)["path"] == f"{name}.safetensors"
        wanted, held = load_file(run / files[name]), load_file(f"{name}.safetensors")
        assert all(torch.equal(held[key], value) for key, value in wanted.items())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line["evaluation"]["accuracy"] for line in lines]
    cards = [json.loads((tmp_path / f"{name}.json").read_text())["trained"] for name in files]
    assert [card["weights"] for card in cards] == ["last epoch", "best accuracy", "epoch 1"]
    assert [card["accuracy"] for card in cards] == [accuracies[-1], max(accuracies), accuracies[0]]
    assert len({card["fingerprint"] for card in cards}) == 3


def test_students_of_a_group_leave_one_by_one(tmp_path, monkeypatch):
    recipe = make_recipe(student="digits-small", peers=["digits-small"], method="dml", limit=32)
    train(recipe, tmp_path / "dml", device=CPU)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"several students, expected one of them: dml/0, dml/1"):
        export_run("dml", "safetensors")
    found = [export_run(f"dml/{index}", "safetensors") for index in (0, 1)]
    assert [str(each.path) for each in found] == ["dml-0.safetensors", "dml-1.safetensors"]
    assert found[0].card.trained["fingerprint"] != found[1].card.trained["fingerprint"]


# ONNX


def test_onnxruntime_gives_the_logits_of_the_run(run, tmp_path, monkeypatch):
    out = tmp_path / "student.onnx"
    result = command("export", f"{run}@best", "--format", "onnx", "--out", out)
    assert result.exit_code == 0, result.output
    assert [file.name for file in tmp_path.iterdir()] == ["student.onnx"]
    pixels = pixels_of(10, 1, count=7)
    wanted = logits_of(f"run:{run}@best", pixels)
    found, names = in_onnxruntime(out, pixels)
    assert names == list(DIGITS)
    assert_close(found, wanted)
    assert_close(in_onnxruntime(out, pixels[:1])[0], wanted[:1])
    # As a teacher, without --size, --mean and --std; class names in another order are mapped.
    assert_close(logits_of(f"onnx:{out}", pixels), wanted)
    network = load_teacher(f"onnx:{out}", DIGITS[::-1])
    assert network.columns == tuple(range(9, -1, -1))
    words = ["run", "--teacher", f"onnx:{out}", "--source", "digits", "--view", "digits", "--views", 1]
    words += ["--store", tmp_path / "s.zarr", "--encoding", "float32"]
    result = command(*words, group=precompute)
    assert result.exit_code == 0, result.output
    assert StoreReader(tmp_path / "s.zarr").manifest.identity["teacher"]["preprocessing"] == {
        "size": 10, "mean": [0.25], "std": [0.4]
    }  # fmt: skip
    assert str(ROOT).encode() not in out.read_bytes(), "paths of this machine"
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(re.search(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.S)[1], names)
    assert names["logits"].shape == (3, 10)


def test_a_damaged_or_foreign_card_is_refused(tmp_path):
    write_run(tmp_path / "run", [metrics_line(0, 0.5)], student="digits-small")
    export_run(str(tmp_path / "run"), "onnx", tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    entries = {entry.key: entry for entry in model.metadata_props}

    def refusal(**changes):
        before = {key: entries[key].value for key in changes}
        for key, value in changes.items():
            entries[key].value = value
        onnx.save(model, tmp_path / "b.onnx")
        for key, value in before.items():
            entries[key].value = value
        with pytest.raises(TeacherMismatch) as caught:
            load_teacher(f"onnx:{tmp_path / 'b.onnx'}", DIGITS)
        return str(caught.value)

    for broken in ("{", "[1]", '{"size": 0, "mean": [0], "std": [1]}'):
        assert "has a damaged card" in refusal(preprocessing=broken)
    for broken in ("[", "[1, 2]", '"abc"', "[" * 100_000):
        assert "has a damaged card" in refusal(class_names=broken)
    other = json.dumps({"size": 9, "mean": [0.5], "std": [0.5]})
    assert "say 1 channels, 9 pixels, 10 classes, but it has 1 channels, 8 pixels, 10 classes" in refusal(
        preprocessing=other
    )
    assert "say 1 channels, 8 pixels, 3 classes" in refusal(class_names=json.dumps(["a", "b", "c"]))


def test_a_student_with_a_teachers_head_leaves_with_it(mapped_store, tmp_path):
    fields = {"student": "digits-cnn", "limit": 32, "method": "simkd"}
    train(make_recipe([mapped_store], **fields), tmp_path / "simkd", device=CPU)
    exported = export_run(str(tmp_path / "simkd"), "onnx", tmp_path / "simkd.onnx")
    assert exported.card.network.startswith("projected:digits-cnn:")
    pixels = pixels_of(8, 1)
    found, _ = in_onnxruntime(exported.path, pixels)
    assert_close(found, logits_of(f"run:{tmp_path / 'simkd'}", pixels))


# transformers


def write_fresh(folder, spec, names=DIGITS, **pixels):
    """A finished run of a network with fresh weights that differ between classes."""
    write_run(folder, [metrics_line(0, 0.5)], student="digits-small")
    network = build_network(spec, len(names), seed=3, **pixels)
    state = {name: value.clone() for name, value in network.module.state_dict().items()}
    for name, value in state.items():
        if name.endswith("running_mean"):
            value.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))
    (folder / NETWORK_FILE).write_text(write_yaml(network.describe()))
    save_file(state, folder / WEIGHTS_FILE)
    return folder


@pytest.mark.parametrize(
    "spec",
    [
        "timm:test_vit",
        *(
            pytest.param(spec, marks=pytest.mark.integration)
            for spec in ("timm:test_resnet", "torchvision:resnet18")
        ),
    ],
)
def test_transformers_gives_the_logits_of_the_run(spec, tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    folder = write_fresh(tmp_path / "run", spec, size=64, mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))
    out = tmp_path / "folder"
    result = command("export", folder, "--format", "hf", "--out", out)
    assert result.exit_code == 0, result.output
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors"}
    pixels = images_of(4, size=64)
    wanted = logits_of(f"run:{folder}", pixels)
    model = AutoModelForImageClassification.from_pretrained(out).eval()
    processor = AutoImageProcessor.from_pretrained(out)
    with torch.inference_mode():
        found = model(**processor(images=list(pixels), return_tensors="pt")).logits.numpy()
    assert_close(found, wanted)
    assert [model.config.id2label[index] for index in range(10)] == list(DIGITS)
    for teacher in (f"hf:{out}", f"timm:local-dir:{out}"):
        network = load_teacher(teacher, DIGITS)
        assert (network.preprocessing.size, network.class_names) == (64, DIGITS)
        assert_close(logits_of(teacher, pixels), wanted)


def test_networks_without_a_class_in_transformers_are_refused(run, tmp_path):
    with pytest.raises(RecipeError, match=r"'digits-cnn' has no class in transformers.*Use --format onnx"):
        export_run(str(run), "hf", tmp_path / "folder")
    write_fresh(tmp_path / "run", "torchvision:mobilenet_v2")
    with pytest.raises(RecipeError, match=r"'torchvision:mobilenet_v2' has no class in transformers"):
        export_run(str(tmp_path / "run"), "hf", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# Refusals


@pytest.mark.parametrize(("kind", "library"), [("onnx", "onnxscript"), ("hf", "timm")])
def test_a_missing_library_is_named_with_its_extra(kind, library, tmp_path, monkeypatch):
    spec = "digits-small" if kind == "onnx" else "torchvision:resnet18"
    folder = write_fresh(tmp_path / "run", spec)
    monkeypatch.setitem(sys.modules, library, None)
    result = command("export", folder, "--format", kind, "--out", tmp_path / f"a{FORMATS[kind].suffix}")
    assert result.exit_code == 1
    assert f"--format {kind} needs" in result.stderr
    assert "pip install 'coursepack[export]'" in result.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"run"}


def test_unfinished_runs_and_other_paths_are_refused(tmp_path):
    write_run(tmp_path / "run", [metrics_line(0, 0.5)], finished=False, student="digits-small")
    for path, text in ((tmp_path / "run", "is unfinished: continue it with --resume"),
                       (tmp_path / "none", "there is no run at")):  # fmt: skip
        result = command("export", path, "--format", "safetensors", "--out", tmp_path / "a.safetensors")
        assert (result.exit_code, text in result.stderr) == (1, True), result.output
    write_run(tmp_path / "b", [metrics_line(0, 0.5)], student="digits-small")
    result = command(
        "export", f"{tmp_path / 'b'}@3", "--format", "safetensors", "--out", tmp_path / "a.safetensors"
    )
    assert "kept no checkpoint after 3 epochs" in result.stderr
    for out, text in {
        "a.bin": "writes a file whose name ends in .safetensors",
        "none/a.safetensors": "since there is no folder",
        "b.safetensors": "is a folder, expected a file",
    }.items():
        (tmp_path / "b.safetensors").mkdir(exist_ok=True)
        result = command("export", tmp_path / "b", "--format", "safetensors", "--out", tmp_path / out)
        assert (result.exit_code, text in result.stderr) == (1, True), result.output


def test_existing_files_are_replaced_only_on_request(tmp_path):
    write_run(tmp_path / "run", [metrics_line(0, 0.5)], student="digits-small")
    out = tmp_path / "a.safetensors"
    (tmp_path / "a.json").write_text("mine")
    words = ["export", tmp_path / "run", "--format", "safetensors", "--out", out]
    result = command(*words)
    assert result.exit_code == 1
    assert f"'{tmp_path / 'a.json'}' exists: choose another --out, or give --overwrite" in result.stderr
    assert (tmp_path / "a.json").read_text() == "mine"
    for _ in range(2):
        assert command(*words, "--overwrite").exit_code == 0
    assert json.loads((tmp_path / "a.json").read_text())["network"] == "digits-small"
    assert load_file(out).keys() == load_file(tmp_path / "run" / WEIGHTS_FILE).keys()
    assert {file.name for file in tmp_path.iterdir()} == {"run", "a.json", "a.safetensors"}


def test_code_that_a_run_names_has_to_be_trusted(tmp_path):
    write_run(tmp_path / "run", [metrics_line(0, 0.5)], student="digits-small")
    description = (tmp_path / "run" / NETWORK_FILE).read_text()
    (tmp_path / "run" / NETWORK_FILE).write_text(description.replace("digits-small", "python:evil:make"))
    with pytest.raises(UntrustedCode, match=r"names Python code.*'python:evil:make'"):
        export_run(str(tmp_path / "run"), "safetensors", tmp_path / "a.safetensors")


def test_a_file_with_other_logits_is_not_kept(run, tmp_path, monkeypatch):
    module = sys.modules["coursepack.distill.runs.export"]
    monkeypatch.setattr(module, "MOST", -1.0)
    with pytest.raises(TeacherMismatch, match=r"gives logits that differ by .*nothing was kept"):
        export_run(str(run), "safetensors", tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_command_knows_all_formats():
    assert list(FORMATS) == list(EXPORT_FORMATS)
