"""Files that are changed at random: taken, or refused with one sentence; nothing else may happen."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import sys
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from builders import CPU, make_recipe, write_teacher
from click.testing import CliRunner
from fuzzing import guarded, mutated_bytes, mutated_file, mutated_tree
from helpers import RowStore, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coursepack.canonical import fingerprint
from coursepack.config import write_yaml
from coursepack.data.store import StoreReader, StoreWriter, load_manifest, verify
from coursepack.data.store.contents import digest_of, list_key
from coursepack.distill.recipe import load_recipe
from coursepack.distill.runs.compare import compare, table_rows
from coursepack.distill.runs.folder import load_run, recipe_to_resume
from coursepack.distill.runs.sweep import read_grid
from coursepack.distill.runs.train import train
from coursepack.distill.setup.checks import check_recipe
from coursepack.distill.setup.resolve import resolve_recipe
from coursepack.models import load_teacher
from coursepack.models.classes import load_columns
from coursepack.precompute.cli import main as precompute

FEW, MANY = 30, 1000
NAMES = tuple("0123456789")


class WholeStore(RowStore):
    """Rows with an identity as `precompute run` writes it."""

    def plan(self, **changes):
        recipe = self.view_recipe.model_dump(mode="json")
        pixels = {"size": 8, "mean": [0.5], "std": [0.5]}
        identity = {
            "teacher": {
                "network": "digits-mlp",
                "weights": "0" * 64,
                "preprocessing": pixels,
                "columns": None,
            },
            "view": {"recipe": recipe, "fingerprint": "0" * 64},
            "source": {"name": "digits:train", "fingerprint": "0" * 64},
            "precision": "float32",
        }
        return super().plan(identity=identity, origin={"weights_file": "w.pt"}, **changes)


ROWS = WholeStore(shapes={"logits": (10,), "features/a": (3,)}, encoding="float16")


class Workplace:
    """Valid files of every kind, and what is done with each after it is changed."""

    def __init__(self, folder):
        self.folder, self.numbers = folder, itertools.count()
        self.store, self.begun = folder / "s.zarr", folder / "begun.zarr"
        write_rows(self.store, ROWS)
        self.old = folder / "old.zarr"
        write_rows(self.old, replace(ROWS, format_version=1))
        # What is imported at first use is not opened by a case.
        assert verify(self.store).problems == ()
        StoreReader(self.store).components("logits", 0, np.arange(1))
        with StoreWriter(self.begun, ROWS.plan()) as writer:
            for block in writer.pending():
                ROWS.write_block(writer, block)
        self.teacher = write_teacher(folder / "teacher")
        self.recipe = make_recipe(limit=8, epochs=2, batch_size=4, student="digits-small")
        self.run, self.halted = folder / "run", folder / "halted"
        train(self.recipe, self.run, device=CPU)
        self.halt()
        (folder / "recipe.yaml").write_text(write_yaml(self.recipe.model_dump(mode="json")))
        self.grid = {
            "base": {
                "student": "digits-small",
                "source": "digits",
                "view": "digits",
                "optimizer": {"lr": 0.1},
            },
            "grid": {"method": ["supervised"], "seed": [0, 1], "optimizer.momentum": [0, 0.9]},
        }

    def halt(self):
        """A run that was interrupted after its second step."""

        class Stopped(Exception):
            pass

        saved = []
        with pytest.MonkeyPatch.context() as patch:
            module = sys.modules["coursepack.distill.runs.student"]
            save = module.save_checkpoint

            def stop(*arguments):
                save(*arguments)
                saved.append(1)
                if len(saved) == 2:
                    raise Stopped

            patch.setattr(module, "save_checkpoint", stop)
            with pytest.raises(Stopped):
                train(self.recipe, self.halted, device=CPU, checkpoint_seconds=0)

    def copy(self, original):
        """A copy that a case may change."""
        path = self.folder / f"case-{next(self.numbers)}{original.suffix}"
        shutil.copytree(original, path)
        return path


def dump_json(values):
    return json.dumps(values, indent=1).encode()


def dump_yaml(values):
    return yaml.safe_dump(values, sort_keys=False).encode()


def dump_manifest(values):
    """With the right checksum, where there can be one."""
    if isinstance(values, dict):
        values.pop("checksum", None)
        with suppress(ValueError, RecursionError, UnicodeError):
            values["checksum"] = fingerprint(values)
    return dump_json(values)


def called(*words):
    """Run a command of `precompute` that may fail, but not crash."""
    result = CliRunner().invoke(precompute, [str(word) for word in words])
    if isinstance(result.exception, Exception):
        raise result.exception
    assert len(result.stderr) < 10_000


def manifest(place, draw):
    path = place.copy(draw(st.sampled_from([place.store, place.old])))
    values = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_bytes(mutated_file(draw, values, dump_manifest))
    return look_at(path, draw)


def view_list(place, draw):
    path = place.copy(place.store)
    values = json.loads((path / "manifest.json").read_text())
    view = draw(st.sampled_from(sorted(values["view_lists"])))
    entry = json.loads((path / list_key(int(view), values["view_lists"][view])).read_bytes())
    text = mutated_file(draw, entry, dump_json)
    values["view_lists"][view] = digest_of(text)
    (path / list_key(int(view), digest_of(text))).write_bytes(text)
    (path / "manifest.json").write_bytes(dump_manifest(values))
    return look_at(path, draw)


def look_at(path, draw):
    """Have every command and reader look at a store."""
    with guarded(path):
        called("status", "--store", path)
        called("verify", "--store", path)
        called("inspect", path)
    with guarded(path):
        reader = StoreReader(path, draw(st.sampled_from(["resident", "mapped", "windowed"])))
        for name in reader.manifest.arrays:
            for view in reader.manifest.committed.get(name, ()):
                reader.components(name, view, np.arange(min(reader.manifest.samples, 1000)))
    return path


def zarr_json(place, draw):
    path = place.copy(place.store)
    file = draw(st.sampled_from(sorted(path.rglob("zarr.json"))))
    file.write_bytes(mutated_file(draw, json.loads(file.read_text()), dump_json))
    with guarded(path):
        called("verify", "--store", path)
    (path / "manifest.json").unlink()
    with guarded(path):
        StoreWriter(path, ROWS.plan()).planned()
    return path


def done_object(place, draw):
    path = place.copy(place.begun)
    file = draw(st.sampled_from(sorted((path / "blocks").iterdir())))
    file.write_bytes(mutated_file(draw, json.loads(file.read_text()), dump_json))
    with guarded(path):
        called("status", "--store", path)
    with guarded(path), StoreWriter(path, ROWS.plan()) as writer:
        list(writer.pending())
        writer.commit()
    load_manifest(path)  # whatever was committed, the store can be read
    return path


def recipe(place, draw):
    path = place.folder / "changed.yaml"
    path.write_bytes(
        mutated_file(draw, yaml.safe_load((place.folder / "recipe.yaml").read_text()), dump_yaml)
    )
    with guarded(place.folder):
        check_recipe(resolve_recipe(load_recipe(path), str(path)))


def grid(place, draw):
    path = place.folder / "grid.yaml"
    path.write_bytes(mutated_file(draw, place.grid, dump_yaml))
    with guarded(place.folder):
        for student in read_grid(path):
            check_recipe(student.recipe)


def class_map(place, draw):
    path = place.folder / "classes.yaml"
    values = draw(st.sampled_from([list(range(10)), {name: int(name) for name in NAMES}]))
    path.write_bytes(mutated_file(draw, values, dump_yaml))
    with guarded(place.folder):
        columns = load_columns(path, NAMES)
        load_teacher(f"run:{place.teacher}", NAMES, columns=columns)


def network(place, draw):
    path = place.copy(place.teacher)
    file = path / "network.yaml"
    file.write_bytes(mutated_file(draw, yaml.safe_load(file.read_text()), dump_yaml))
    with guarded(path):
        load_teacher(f"run:{path}", NAMES)
    return path


def checkpoint(place, draw):
    path = place.copy(place.halted)
    file = path / "checkpoint.pt"
    if draw(st.booleans()):
        odd = [torch.zeros(3), torch.tensor(5), None, 1 << 40, -1, 0.5, "x", [], {}, (1, 2), [torch.zeros(1)]]
        content = io.BytesIO()
        torch.save(mutated_tree(draw, torch.load(file, weights_only=True), odd), content)
        file.write_bytes(content.getvalue())
    else:
        file.write_bytes(mutated_bytes(draw, file.read_bytes()))
    with guarded(path):
        train(place.recipe, path, device=CPU, resume=True, workers=0)
    return path


def metrics(place, draw):
    path = place.copy(place.run)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]

    def dump(values):
        return b"".join(json.dumps(line).encode() + b"\n" for line in values if line is not None)

    changed = mutated_file(draw, lines, lambda values: dump(values if isinstance(values, list) else [values]))
    (path / "metrics.jsonl").write_bytes(changed)
    with guarded(path, place.run):
        table_rows(compare([load_run(path)]))
    return path


def provenance(place, draw):
    path = place.copy(place.halted)
    file = path / "provenance.json"
    values = json.loads(file.read_text()) | {"stores": [{"reading": "mapped", "views": [0], "path": "x"}]}
    file.write_bytes(mutated_file(draw, values, dump_json))
    with guarded(path):
        recipe_to_resume(path, place.recipe)
        train(place.recipe, path, device=CPU, resume=True, workers=0)
    return path


KINDS = (
    *(manifest, view_list, zarr_json, done_object, recipe, grid),
    *(class_map, network, checkpoint, metrics, provenance),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("fuzz"))


def fuzz(place, kind, examples):
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def each(data):
        before = set(place.folder.glob("case-*"))
        try:
            kind(place, data.draw)
        finally:
            for path in set(place.folder.glob("case-*")) - before:
                shutil.rmtree(path)

    each()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_changed_files(place, kind):
    fuzz(place, kind, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_many_changed_files(place, kind):
    fuzz(place, kind, MANY)
