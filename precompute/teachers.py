"""Files of teachers: several teachers of one source and view recipe, for `precompute run FILE`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from coursepack.config import Config, parse_config, read_yaml, start_paths
from coursepack.data import open_source, view_recipe
from coursepack.models.build import RUN
from coursepack.models.classes import load_columns
from coursepack.models.load import teacher_class_names
from coursepack.models.run_specs import parse_run_spec, specs_of_checkpoints
from coursepack.models.teacher_options import TeacherOptions
from coursepack.precompute.spec import PrecomputeSpec

Positive = Annotated[int, Field(ge=1)]


class Teacher(TeacherOptions):
    """One teacher of a file, with the options of `precompute run` that describe it and its store."""

    teacher: str
    """`run:FOLDER`, `run:FOLDER@EPOCH`, `run:FOLDER@all`, a trained network of a hub such as `hf:FOLDER`, or
    a network's name with `weights`."""
    store: str
    """Folder of the store; for `run:FOLDER@all` the folder of all its stores."""


class TeachersFile(Config):
    """Several teachers, and what they have in common."""

    source: str
    """Source of samples: NAME or NAME:SPLIT."""
    view: str
    """View recipe: name of a preset, or a YAML file."""
    views: Positive
    """Number of views of each sample."""
    teachers: Annotated[tuple[Teacher, ...], Field(min_length=1)]
    """The teachers."""
    root: str | None = None
    """Folder of the source's files."""
    view_seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the view recipe. Defaults to the recipe's own."""
    batch_size: Positive = 256
    """Images per forward pass."""
    block_rows: Positive | None = None
    """Rows per block. Defaults to a number chosen by the width of each store's rows."""
    views_per_load: Positive = 1
    """Views rendered per decoded image."""


def teacher_specs(path: Path, **common: Any) -> list[PrecomputeSpec]:
    """Read a file of teachers.

    Args:
        path: YAML file with the fields of `TeachersFile`.
        common: further fields of every specification, such as `device` and `part`.

    Raises:
        RecipeError: the file is not valid; all its errors are shown.
    """
    values = read_yaml(path)
    start_paths(values, path.parent)
    file = parse_config(TeachersFile, values, str(path))
    root = None if file.root is None else Path(file.root)
    recipe = view_recipe(file.view, file.view_seed).model_dump(mode="json")
    shared: dict[str, Any] = {
        "source": file.source,
        "root": file.root,
        "view": recipe,
        "views": file.views,
        "batch_size": file.batch_size,
        "block_rows": file.block_rows,
        "views_per_load": file.views_per_load,
    }
    specs = []
    for teacher in file.teachers:
        own = teacher.model_dump()
        classes = own.pop("classes")
        if classes is not None:
            own["columns"] = load_columns(
                Path(classes),
                open_source(file.source, root).class_names,
                partial(teacher_class_names, teacher.teacher, teacher.weights),
            )
        specs += of_checkpoints(PrecomputeSpec(**own, **shared, **common))
    return specs


def of_checkpoints(spec: PrecomputeSpec) -> list[PrecomputeSpec]:
    """Return a specification for each kept checkpoint of `run:FOLDER@all`, or the given one alone.

    Their stores are `epoch-EPOCH.zarr` in the folder that the specification names as its store.

    Raises:
        RunError: the run is unfinished, or kept no checkpoints.
    """
    run = parse_run_spec(spec.teacher) if spec.teacher.startswith(f"{RUN}:") else None
    if run is None or not run.every:
        return [spec]
    return [
        replace(spec, teacher=teacher, store=f"{spec.store.rstrip('/')}/epoch-{epoch:04d}.zarr")
        for epoch, teacher in specs_of_checkpoints(run).items()
    ]
