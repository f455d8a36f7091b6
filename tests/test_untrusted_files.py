"""Faults that files can have: one line that names file and fault, from every command that reads them."""

import json
import shutil

import pytest
import torch
from builders import CPU, make_recipe, write_store, write_teacher
from click.testing import CliRunner
from helpers import RowStore, rewrite_manifest, write_rows

from coursepack.data.store import StoreWriter
from coursepack.data.store.owners import live_runs
from coursepack.distill.cli import main as distill
from coursepack.distill.runs.train import train
from coursepack.errors import RunError, StoreDamaged
from coursepack.models.load import _load_run
from coursepack.models.run_specs import RunSpec
from coursepack.precompute.cli import main as precompute

BOMB = "a0: &a0 [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
SINGLE_RANK = "train --student digits-small --source digits --view digits --epochs 1 --out new"
WRITE = "run --teacher run:mlp --source digits --view digits --views 1 --store new.zarr"
TEXTS = {
    "twice.yaml": "student: digits-small\nepochs: 1\nepochs: 2\n",
    "grid.yaml": "base: {student: digits-small}\ngrid: {seed: [1], seed: [2]}\n",
    "many.yaml": "base: {}\ngrid: {" + ", ".join(f"k{i}: {list(range(10))}" for i in range(9)) + "}\n",
    "classes.yaml": "{'0': 1, '1': 2, '0': 3}",
    "view.yaml": "seed: 1\nseed: 2\n",
    "deep.yaml": "[" * 2000,
    "bomb.yaml": BOMB,
    "string.yaml": "cifar",
    "long.yaml": "".join(f"k{i}: 0\n" for i in range(300)),
}
FAULTS = [
    (distill, "train twice.yaml --out new", "Error: 'twice.yaml' gives the key 'epochs' twice\n"),
    (distill, "train deep.yaml --out new", "Error: 'deep.yaml' is nested more than 64 levels deep\n"),
    (distill, "train bomb.yaml --out new", "Error: 'bomb.yaml' repeats more than 10,000 values by aliases\n"),
    (distill, f"{SINGLE_RANK} --view view.yaml", "Error: 'view.yaml' gives the key 'seed' twice\n"),
    (distill, f"{SINGLE_RANK} --view string.yaml",
     "Error: view recipe 'string.yaml' is not valid:\n  it: expected a mapping, got 'cifar'\n"),
    (distill, f"{SINGLE_RANK} --set optimizer={{lr,lr}}",
     "Error: --set 'optimizer={lr,lr}': the value gives the key 'lr' twice\n"),
    (distill, "sweep grid.yaml --out new", "Error: 'grid.yaml' gives the key 'seed' twice\n"),
    (distill, "sweep many.yaml --out new",
     "Error: 'many.yaml' combines to 1,000,000,000 students, expected at most 10,000\n"),
    (precompute, f"{WRITE} --classes classes.yaml", "Error: 'classes.yaml' gives the key '0' twice\n"),
    (precompute, f"{WRITE} --view-seed {1 << 64}",
     "Error: view 'digits' with --view-seed is not valid:\n  seed: expected less than "
     "18446744073709551616, got 18446744073709551616\n"),
]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    teacher = write_teacher(folder / "mlp", seed=1)
    write_store(folder / "s.zarr", teacher, views=1)
    train(make_recipe(limit=8, batch_size=4, epochs=2), folder / "run", device=CPU)
    return folder


def said(command, line):
    result = CliRunner().invoke(command, line.split())
    assert result.exit_code == 1, result.exception
    assert isinstance(result.exception, SystemExit)
    return result.stderr


@pytest.mark.parametrize(("command", "line", "text"), FAULTS, ids=range(len(FAULTS)))
def test_recipes_grids_maps_and_views(workplace, monkeypatch, command, line, text):
    monkeypatch.chdir(workplace)
    assert said(command, line) == text
    assert not (workplace / "new").exists()


def test_a_file_with_many_faults_shows_the_first(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    lines = said(distill, "train long.yaml --out new").splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  and 280 more"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda lines: [lines[0], b"\xff" + lines[1]],
         "line 2 of 'r/metrics.jsonl' is not JSON: it is not text (byte 0 is not UTF-8)"),
        (lambda lines: [lines[0], b"{"], "line 2 of 'r/metrics.jsonl' is not JSON: Expecting property name"),
        (lambda lines: [lines[0], b'{"epoch": 1, "seconds": 1.0}'],
         "line 2 of 'r/metrics.jsonl' is damaged: evaluation: is missing"),
        (lambda lines: [lines[0].replace(b'"epoch":0', b'"epoch":0,"epoch":1'), lines[1]],
         "line 1 of 'r/metrics.jsonl' gives the key 'epoch' twice"),
        (lambda lines: [b"[]", lines[1]],
         "line 1 of 'r/metrics.jsonl' is damaged: it: expected a mapping"),
        (lambda lines: lines[2:], "'r/metrics.jsonl' holds no epoch, but the run is finished"),
    ],
)  # fmt: skip
def test_metrics(workplace, tmp_path, monkeypatch, change, text):
    shutil.copytree(workplace / "run", tmp_path / "r")
    monkeypatch.chdir(tmp_path)
    lines = (tmp_path / "r" / "metrics.jsonl").read_bytes().splitlines()
    (tmp_path / "r" / "metrics.jsonl").write_bytes(b"\n".join(change(lines)))
    assert said(distill, "compare r").startswith(f"Error: {text}")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (
            "classes: 10",
            "classes: 1000000000",
            "describes 1000000000 classes, but no tensor of student.safetensors",
        ),
        ("size: 8", "size: 2147483648", "preprocessing.size: expected at most 4096"),
        ("classes: 10", "classes: 10\nclasses: 7", "gives the key 'classes' twice"),
        ("spec: digits-mlp", "spec: torchvision:vit_h_14", "size"),
    ],
)
def test_networks(workplace, tmp_path, monkeypatch, old, new, text):
    shutil.copytree(workplace / "mlp", tmp_path / "mlp")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mlp" / "network.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert text in said(precompute, WRITE)


def test_a_network_that_is_not_that_of_its_weights_takes_no_memory(workplace, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("coursepack.models.load.load_weights", lambda *arguments: made.append(arguments))
    shutil.copytree(workplace / "mlp", tmp_path / "mlp")
    path = tmp_path / "mlp" / "network.yaml"
    text = path.read_text().replace("digits-mlp", "torchvision:resnet152").replace("size: 8", "size: 32")
    path.write_text(text.replace("- 0.", "- 0.5\n  - 0.5\n  - 0."))
    with pytest.raises((RunError, ValueError)):
        _load_run(RunSpec(tmp_path / "mlp"), trust_code=False)
    assert not made


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda identity: identity["view"]["recipe"].update(seed=-1), "view.recipe.seed"),
        (lambda identity: identity["view"].update(recipe="cifar"), "view.recipe"),
        (lambda identity: identity["teacher"]["preprocessing"].update(size=1 << 31),
         "teacher.preprocessing.size"),
        (lambda identity: identity.pop("teacher"), "does not say what the store's teacher was"),
        (lambda identity: identity["source"].update(name=None), "source.name"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["status", "verify", "train"])
def test_what_a_manifest_says_of_its_teacher(workplace, tmp_path, change, text, command):
    store = shutil.copytree(workplace / "s.zarr", tmp_path / "s.zarr")
    rewrite_manifest(store, lambda values: change(values["identity"]))
    line = f"{command} --store {store}"
    if command == "train":
        error = said(distill, f"{line} --student digits-small --out {tmp_path / 'new'}")
    else:
        error = said(precompute, line)
    assert text in error
    assert str(store) in error
    assert len(error.splitlines()) == 1


DONE = [
    (lambda entry: entry.update(arrays="logits"), "arrays: "),
    (lambda entry: entry["files"].update({"../../x": [5, 5]}), "it gives '../../x' 5 bytes, not None"),
    (lambda entry: entry["files"].clear(), "bytes"),
    (lambda entry: entry["record"].pop("sums"), "record.sums: is missing"),
    (
        lambda entry: entry["record"].update(probes={"50": "0"}),
        "a probe of a sample that is not in the source",
    ),
]


@pytest.mark.parametrize(("change", "fault"), DONE, ids=range(len(DONE)))
def test_done_objects(tmp_path, change, fault):
    path, rows = tmp_path / "s.zarr", RowStore()
    with StoreWriter(path, rows.plan()) as writer:
        for block in writer.pending():
            rows.write_block(writer, block)
    file = path / "blocks" / "0.1.json"
    sound = file.read_bytes()
    entry = json.loads(sound)
    change(entry)
    file.write_text(json.dumps(entry))
    with pytest.raises(StoreDamaged) as caught:
        write_rows(path, rows)
    assert fault in str(caught.value)
    assert str(file) in str(caught.value)
    assert "Remove it and run the same `precompute run` again" in str(caught.value)
    file.unlink()
    write_rows(path, rows)
    assert file.exists() is False
    with StoreWriter(path, rows.plan()) as writer:
        assert list(writer.pending()) == []


def test_records_of_live_runs(tmp_path):
    import fcntl

    (tmp_path / "runs").mkdir()
    with (tmp_path / "runs" / "a.json").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write('{"host": "x", "host": "y"}')
        file.flush()
        with pytest.raises(StoreDamaged, match=r"a\.json', cannot be read: gives the key 'host' twice"):
            live_runs(tmp_path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda state: state["position"].update(epoch=10**9), "it is in epoch 1000000000"),
        (lambda state: state["position"].update(batches="x"), "position"),
        (lambda state: state.pop("metrics"), "it has no metrics"),
        (lambda state: state["state"].pop("learner"), "learner"),
        (lambda state: state["state"]["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(1)),
         "shape (1,)"),
        (lambda state: state["state"]["optimizer"]["state"][0].update(momentum_buffer=None), "shape None"),
        (lambda state: state["metrics"][0].update(counts=(1,)), "values to unpack"),
        (lambda state: state.update(identity=5), "its identity cannot be read"),
    ],
)  # fmt: skip
def test_checkpoints(tmp_path, monkeypatch, change, fault):
    import sys

    module, recipe = (
        sys.modules["coursepack.distill.runs.student"],
        make_recipe(limit=8, batch_size=4, epochs=2),
    )
    save = module.save_checkpoint

    def stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "r", device=CPU, checkpoint_seconds=0)
    state = torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "r" / "checkpoint.pt")
    with pytest.raises(RunError) as caught:
        train(recipe, tmp_path / "r", device=CPU, resume=True)
    assert str(tmp_path / "r" / "checkpoint.pt") in str(caught.value)
    assert fault in str(caught.value)
