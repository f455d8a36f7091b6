"""Networks of transformers: equal to the library's own pipeline, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from published import KINDS, SIDE, TEN, Trap, change_json, images_of, write_published
from safetensors.torch import load_file, save_file

from coursepack.data import ViewRecipe, view_recipe
from coursepack.data.sources import InMemory
from coursepack.data.store import StoreReader
from coursepack.data.views import draw, render
from coursepack.distill.cli import main as distill
from coursepack.distill.setup.requirements import precompute_command
from coursepack.distill.targets.live import live_teachers
from coursepack.errors import RecipeError, StoreMismatch, TeacherMismatch
from coursepack.models import Tap, TeacherRunner, build_network, load_teacher
from coursepack.models.build import weights_fingerprint
from coursepack.models.load import reload_teacher
from coursepack.precompute import Job, run_job
from coursepack.precompute.cli import main as precompute


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {kind: write_published(root / kind, kind) for kind in KINDS}


@pytest.fixture
def vit(folders, tmp_path):
    """A copy of a folder, to be changed."""
    return shutil.copytree(folders["vit"], tmp_path / "vit")


def pipeline(folder, images, **settings):
    """Logits of the library's own processor and model."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(**processor(images=list(images), return_tensors="pt", **settings)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_librarys_pipeline(folders, kind):
    network = load_teacher(f"hf:{folders[kind]}", TEN)
    assert (network.preprocessing.size, network.class_names, network.columns) == (SIDE, TEN, None)
    images = images_of(5)
    ours = TeacherRunner(network).run(torch.from_numpy(images)).logits
    # Without the processor's own resizing and crop, which a view takes the place of.
    settings = {} if kind == "timm" else {"do_resize": False, "do_center_crop": False}
    theirs = pipeline(folders[kind], images, **settings)
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def smooth_images(count, size):
    """Images without detail that a resizing filter would treat in its own way."""
    rows = np.linspace(0, 2, size)
    waves = np.stack([np.sin(3 * rows + k)[:, None] * np.cos(2 * rows - k)[None] for k in range(3 * count)])
    return (
        (127.5 + 120 * waves)
        .round()
        .astype(np.uint8)
        .reshape(count, 3, size, size)
        .transpose(0, 2, 3, 1)
        .copy()
    )


SAME_STEPS = {
    "vit": [],
    "resnet": [{"op": "resize", "shorter": 40}, {"op": "center_crop", "size": SIDE}],
    "convnext": [{"op": "resize", "shorter": 36}, {"op": "center_crop", "size": SIDE}],
}
"""View recipes that resize and crop as the processors of `published`."""


@pytest.mark.parametrize("kind", SAME_STEPS)
def test_views_with_the_processors_steps_differ_by_its_filter_only(folders, kind):
    """The processors' filters are bilinear, bilinear and bicubic; their sides are rounded by the last two."""
    images = smooth_images(4, 80)
    source, samples = InMemory("smooth", images, np.zeros(4, np.int64), TEN), np.arange(4)
    recipe = ViewRecipe.model_validate({"ops": SAME_STEPS[kind], "reference_size": SIDE})
    pixels = render(recipe, source, samples, draw(recipe, source, samples, 0), SIDE)
    ours = TeacherRunner(load_teacher(f"hf:{folders[kind]}", TEN)).run(torch.from_numpy(pixels)).logits
    theirs = pipeline(folders[kind], images)
    assert (ours - theirs).abs().max() <= (1e-5 if kind == "vit" else 1e-3) * theirs.abs().max()


def test_a_half_precision_checkpoint_runs_in_float32(vit):
    state = load_file(vit / "model.safetensors")
    save_file(
        {name: value.half() for name, value in state.items()}, vit / "model.safetensors", {"format": "pt"}
    )
    change_json(vit / "config.json", dtype="float16")
    network = load_teacher(f"hf:{vit}", TEN)
    assert {value.dtype for value in network.module.state_dict().values()} == {torch.float32}


def test_taps_are_named_as_in_the_library(folders):
    network = load_teacher(f"hf:{folders['resnet']}", TEN)
    taps = [Tap(("resnet.encoder.stages.1",)), Tap(("resnet.pooler",))]
    runner = TeacherRunner(network, taps)
    output = runner.run(torch.from_numpy(images_of(3)))
    assert [tuple(value.shape) for value in output.features.values()] == [(3, 16, 4, 4), (3, 16, 1, 1)]
    head = runner.static()
    rebuilt = output.features["resnet.pooler"].flatten(1) @ head["head_weight"].T + head["head_bias"]
    torch.testing.assert_close(rebuilt, output.logits, rtol=1e-4, atol=1e-4)


def test_what_determines_logits_is_the_identity_and_paths_are_not(vit, tmp_path):
    def identity(folder):
        network = load_teacher(f"hf:{folder}", TEN)
        return network.spec, network.settings, weights_fingerprint(network.module)

    before = identity(vit)
    assert before[0] == "hf:ViTForImageClassification"
    other = shutil.copytree(vit, tmp_path / "elsewhere")
    change_json(other / "config.json", transformers_version="4.0.0", _name_or_path="/home/x", dtype="float16")
    assert identity(other) == before
    change_json(other / "config.json", hidden_act="relu")
    assert identity(other)[1] != before[1]
    assert identity(other)[::2] == before[::2]
    assert load_teacher(f"hf:{vit}", TEN).weights_file == f"hf:{vit.resolve()}"


def test_a_store_names_the_folder_and_finds_its_teacher_again(vit, tmp_path):
    source = InMemory("images", images_of(12), np.arange(12) % 10, TEN)
    network = load_teacher(f"hf:{vit}", source.class_names)
    for batch_size in (12, 5):
        job = Job(tmp_path / f"{batch_size}.zarr", source, view_recipe("none"), TeacherRunner(network), 1)
        run_job(replace(job, batch_size=batch_size, encoding="float32"), quiet=True)
    stores = [StoreReader(tmp_path / f"{batch_size}.zarr") for batch_size in (12, 5)]
    logits = [store.components("logits", 0, np.arange(12))["values"] for store in stores]
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    manifest = stores[0].manifest
    assert manifest.origin["weights_file"] == f"hf:{vit.resolve()}"
    assert manifest.origin["library"].startswith("transformers ")
    teacher = manifest.identity["teacher"]
    assert str(vit) not in str(teacher)
    again = reload_teacher(teacher, TEN, manifest.origin["weights_file"])
    assert weights_fingerprint(again.module) == teacher["weights"]
    [runner] = live_teachers([stores[0]], [["logits"]], torch.device("cpu"))
    assert runner.network.spec == teacher["network"]
    assert f"--teacher hf:{vit.resolve()} --" in precompute_command(stores[0], None)
    assert "--weights" not in precompute_command(stores[0], None)
    with pytest.raises(
        RecipeError, match="does not record where its teacher 'hf:ViTForImageClassification' is"
    ):
        reload_teacher(teacher, TEN, None)
    change_json(vit / "config.json", hidden_act="relu")
    with pytest.raises(TeacherMismatch, match="are not the ones that wrote the store"):
        reload_teacher(teacher, TEN, manifest.origin["weights_file"])
    moved = TeacherRunner(load_teacher(f"hf:{vit}", TEN))
    with pytest.raises(StoreMismatch, match=r"teacher\.settings +store: "):
        run_job(Job(stores[0].path, source, view_recipe("none"), moved, 2, encoding="float32"), quiet=True)


def _other_head(folder):
    change_json(folder / "config.json", id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})


def _without(part):
    def change(folder):
        state = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in state.items() if part not in name}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})

    return change


def _spare(folder):
    state = load_file(folder / "model.safetensors") | {"spare.weight": torch.zeros(2)}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def _unlabelled(folder):
    values = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in values.items() if name not in ("id2label", "label2id")}
    (folder / "config.json").write_text(json.dumps(kept))


def _pickled(folder):
    torch.save({"classifier.weight": Trap()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _own_code(folder):
    (folder / "mine.py").write_text("import pathlib; pathlib.Path('trapped').touch()")
    names = {"AutoConfig": "mine.C", "AutoModelForImageClassification": "mine.M"}
    change_json(folder / "config.json", model_type="mine", auto_map=names)


def _processor(**values):
    return lambda folder: change_json(folder / "preprocessor_config.json", **values)


REFUSED = [
    (_other_head, r"mismatched \[.*classifier\.bias.*\]"),
    (_without("classifier"), r"missing \['classifier\.bias', 'classifier\.weight'\].*random weights"),
    (_without(".1."), r"missing \['vit\."),
    (_spare, r"unexpected \['spare\.weight'\]"),
    (_unlabelled, r"config\.json has no id2label"),
    (_pickled, r"has no \.safetensors file; pytorch_model\.bin may run code when it is read, so it is not"),
    (_own_code, "transformers cannot load it|config"),
    (lambda folder: (folder / "config.json").unlink(), "has no config.json: give a folder"),
    (lambda folder: (folder / "preprocessor_config.json").unlink(),
     r"image processor \(preprocessor_config\.json\) is missing: write it .*save_pretrained"),
    (lambda folder: (folder / "preprocessor_config.json").write_text("{"),
     r"image processor \(preprocessor_config\.json\) cannot be read"),
    (lambda folder: (folder / "adapter_config.json").write_text("{}"), "is an adapter of another network"),
    (_processor(do_rescale=False), "has do_rescale = False, expected true"),
    (_processor(rescale_factor=1 / 127.5), r"has rescale_factor = 0\.0078.*, expected 1/255"),
    (_processor(size={"height": 32, "width": 48}), "has size = '32 x 48', but views are square"),
    (_processor(size={"shortest_edge": 32, "longest_edge": 64}), "has size = .*expected one side"),
    (_processor(do_resize=False), "has do_resize = False, expected true, with one size"),
    (_processor(do_flip_channel_order=True, image_processor_type="MobileViTImageProcessor"),
     "has do_flip_channel_order = True"),
    (_processor(rescale_offset=True, image_processor_type="EfficientNetImageProcessor"),
     "has rescale_offset = True"),
    (_processor(include_top=True, image_processor_type="EfficientNetImageProcessor"),
     "has include_top = True"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "text"), REFUSED)
def test_folders_that_are_refused(vit, tmp_path, monkeypatch, change, text):
    monkeypatch.chdir(tmp_path)
    change(vit)
    with pytest.raises((RecipeError, TeacherMismatch), match=text) as refusal:
        load_teacher(f"hf:{vit}", TEN)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "trapped").exists()


def test_names_that_are_not_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    text = (
        r"config\.json, preprocessor_config\.json and model\.safetensors of 'some/vit' cannot be fetched: "
        r".*`hf download some/vit --revision main --include .* --local-dir FOLDER`, copy FOLDER here, and "
        "give hf:FOLDER"
    )
    with pytest.raises(RecipeError, match=text):
        load_teacher("hf:some/vit@main", TEN)
    with pytest.raises(RecipeError, match="there is no folder 'nowhere', and it is not ORG/NAME@COMMIT"):
        load_teacher("hf:nowhere", TEN)
    with pytest.raises(RecipeError, match="brings its own weights: leave --weights out"):
        load_teacher("hf:some/vit", TEN, weights="w.pt")
    with pytest.raises(RecipeError, match="network 'hf:some/vit' is already trained"):
        build_network("hf:some/vit", 10)


def test_a_fetched_commit_is_recorded(folders, monkeypatch, tmp_path, capsys):
    commit = "0123456789" * 4
    shutil.copytree(folders["vit"], tmp_path / commit)
    asked = []

    def fetched(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path / commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    network = load_teacher("hf:some/vit", TEN)
    assert asked == [("some/vit", None, ["*.json", "*.safetensors"])]
    assert network.weights_file == f"hf:some/vit@{commit}"
    assert f"main is commit {commit} now; give some/vit@{commit} to keep it" in capsys.readouterr().err
    load_teacher(f"hf:some/vit@{commit}", TEN)
    assert capsys.readouterr().err == ""


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RecipeError, match=r"'hf:x' needs transformers, .*install 'coursepack\[teachers\]'"):
        load_teacher("hf:x", TEN)


def test_a_command_maps_classes_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["extra", *(f"Digit {name}" for name in reversed(TEN))]
    write_published(tmp_path / "vit", names=names)
    (tmp_path / "digits.yaml").write_text("".join(f"'{name}': Digit {name}\n" for name in TEN))
    line = "run --teacher hf:vit --source digits:test --view none --views 1 --store new.zarr"
    result = CliRunner().invoke(precompute, line.split())
    assert result.exit_code == 1
    assert "0 of those are found by name: give --classes FILE" in result.stderr
    result = CliRunner().invoke(precompute, [*line.split(), "--classes", "new.yaml"])
    assert (result.exit_code, (tmp_path / "new.yaml").exists()) == (1, True)
    result = CliRunner().invoke(precompute, [*line.split(), "--classes", "digits.yaml"])
    assert result.exit_code == 0, result.output
    assert StoreReader(tmp_path / "new.zarr").manifest.identity["teacher"]["columns"] == list(
        range(10, 0, -1)
    )
    line = "train --student digits-small --store new.zarr --online --epochs 1 --out run"
    result = CliRunner().invoke(distill, line.split())
    assert result.exit_code == 0, result.output


def test_classes_in_another_order_are_put_in_the_sources(tmp_path, capsys):
    network = load_teacher(f"hf:{write_published(tmp_path / 'a')}", TEN)
    images = torch.from_numpy(images_of(3))
    expected = TeacherRunner(network).run(images).logits
    change_json(tmp_path / "a" / "config.json", id2label={str(i): str(9 - i) for i in range(10)})
    network = load_teacher(f"hf:{tmp_path / 'a'}", TEN)
    assert network.columns == tuple(range(9, -1, -1))
    runner = TeacherRunner(network)
    assert runner.columns == network.columns
    torch.testing.assert_close(runner.run(images).logits, expected.flip(1))
