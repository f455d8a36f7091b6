"""Trained networks: weights from files, run folders and hubs, checked against the classes of a source.

A run folder (`run:FOLDER`) is written by `distill train` and holds a network's description and its weights,
and those of earlier epochs that were kept (`run:FOLDER@EPOCH`).
Nothing is unpickled.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from coursepack.config import Config, parse_config, read_yaml
from coursepack.errors import CoursepackError, RecipeError, RunError, TeacherMismatch
from coursepack.imports import check_trusted
from coursepack.models.build import (
    NETWORK_FILE,
    RUN,
    Network,
    build_network,
    finish_network,
    seeded,
)
from coursepack.models.card import read_card
from coursepack.models.class_names import columns_by_name
from coursepack.models.hubs import find_hub, has_weights, trained_loader
from coursepack.models.networks import NETWORKS
from coursepack.models.preprocessing import Preprocessing
from coursepack.models.published import from_published
from coursepack.models.record import read_record
from coursepack.models.run_specs import RunSpec, parse_run_spec
from coursepack.models.weights import (
    SUFFIXES,
    class_count,
    fitting_weights,
    load_weights,
    read_metadata,
    read_weights,
    weights_fingerprint,
    without_prefix,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from coursepack.models.hubs import HubNetwork


class _Description(Config):
    """Content of a run folder's network.yaml, as `Network.describe` returns it."""

    spec: str
    classes: Annotated[int, Field(ge=1)]
    preprocessing: Preprocessing


def load_teacher(
    spec: str,
    class_names: tuple[str, ...],
    *,
    weights: str | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    columns: Sequence[int | None] | None = None,
    trust_code: bool = False,
) -> Network:
    """Load a trained network and check it against the classes of a source.

    Args:
        spec: `run:FOLDER` or `run:FOLDER@EPOCH`, a trained network of a hub such as `hf:FOLDER`, or a
            network's spec together with `weights`.
        class_names: names of the source's classes.
        weights: a .safetensors, .pt or .pth file, or a name that the network's hub knows: `IMAGENET1K_V2` for
            torchvision, `own` for a factory that returns a trained network. A file of `distill export` has
            the size, mean and std of the run.
        size: side in pixels at which views are rendered. Defaults to the network's own.
        mean: means as in `build_network`. Default to the network's own.
        std: standard deviations as in `build_network`. Default to the network's own.
        columns: index of the teacher's class for each class of the source, None for one that it does not
            know. Defaults to the same classes; if the teacher's class names are known and in another order,
            `Network.columns` has that order.
        trust_code: build the network of a run folder even if its files name Python code, or read a file that
            may run code.

    Raises:
        UntrustedCode: the run folder names Python code or the file may run code, and `trust_code` is false.
        TeacherMismatch: the teacher has another number of classes, `columns` names a class that it does not
            have, or the weights do not fit the network.
        RecipeError: no weights are given, or they are neither a file nor known by name.
        RunError: the run folder is missing or unfinished, or did not keep the epoch.
    """
    classes = len(class_names)
    if spec.startswith(f"{RUN}:"):
        if weights is not None:
            raise RecipeError(f"teacher {spec!r} brings its own weights: leave --weights out")
        network = _load_run(parse_run_spec(spec), trust_code=trust_code)
    elif (load := trained_loader(spec)) is not None:
        if weights is not None:
            raise RecipeError(f"teacher {spec!r} brings its own weights: leave --weights out")
        network = finish_network(spec, load(size, trust_code), size, mean, std)
    elif weights is None:
        raise RecipeError(f"teacher {spec!r} has no weights: give --weights {_weights_help(spec)}")
    elif Path(weights).suffix in SUFFIXES:
        network = _load_file(spec, weights, classes, size, mean, std, has_map=columns is not None)
    else:
        with seeded(0):
            built = _load_named(spec, weights, classes)
            network = replace(finish_network(spec, built, size, mean, std), weights_file=weights)
    if columns is None and network.class_names is not None:
        network = replace(network, columns=columns_by_name(spec, network.class_names, class_names))
    _check_classes(spec, network.classes, class_names, columns or network.columns)
    return replace(network, preprocessing=network.preprocessing.changed(size, mean, std))


def _load_file(
    spec: str,
    weights: str,
    classes: int,
    size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    *,
    has_map: bool,
) -> Network:
    """Load a network with weights from a file, for as many classes as the file has if they are mapped."""
    path = Path(weights)
    state = read_weights(path)
    pixels, class_names = read_card(read_metadata(path), repr(weights)) or (None, None)
    if pixels is not None:
        size, mean, std = size or pixels.size, mean or pixels.mean, std or pixels.std
    network = build_network(spec, classes, size=size, mean=mean, std=std)
    state = from_published(without_prefix(state, network.module, weights), network.module, weights)
    if has_map:
        trained_on = class_count(network.module, classes, state)
        network = build_network(spec, trained_on, size=size, mean=mean, std=std)
    load_weights(spec, network.module, network.classes, state, weights)
    return replace(network, weights_file=str(path.resolve()), class_names=class_names)


def _load_named(spec: str, weights: str, classes: int) -> HubNetwork:
    """Load a network with weights that its hub knows by name."""
    hub, name = find_hub(spec)
    built = hub.load(name, weights, classes) if hub is not None and hub.load is not None else None
    if built is None:
        raise RecipeError(
            f"weights {weights!r} are no file and no name of weights of network {spec!r}: "
            f"give --weights {_weights_help(spec)}"
        )
    return built


def _weights_help(spec: str) -> str:
    hub, _ = find_hub(spec)
    return "FILE (.safetensors or .pt)" + ("" if hub is None else hub.weights_help)


def _check_classes(
    spec: str, trained_on: int, class_names: tuple[str, ...], columns: Sequence[int | None] | None
) -> None:
    if columns is None and trained_on != len(class_names):
        raise TeacherMismatch(
            f"teacher {spec!r} has {trained_on} classes, but the source has {len(class_names)} "
            f"({', '.join(class_names[:3])}, ...): use a teacher trained on the source's classes, or map the "
            "source's classes to the teacher's with --classes"
        )
    last = max((column for column in columns or () if column is not None), default=0)
    if columns is not None and last >= trained_on:
        raise TeacherMismatch(
            f"--classes names class {last}, but teacher {spec!r} has classes 0..{trained_on - 1}"
        )


def reload_teacher(
    identity: Mapping[str, Any],
    class_names: tuple[str, ...],
    weights: str | None,
    *,
    holder: str = "the store",
    trust_code: bool = False,
) -> Network:
    """Load the teacher that wrote a store, from the description in the store's manifest.

    Args:
        identity: `identity["teacher"]` of the manifest.
        class_names: names of the source's classes.
        weights: file or name of the teacher's weights, or the spec of a trained network.
        holder: name of the store for error messages: `store 'cnn.zarr'`.
        trust_code: build the network even if the manifest names Python code for it.

    Raises:
        UntrustedCode: the manifest names Python code, and `trust_code` is false.
        TeacherMismatch: the weights are not the ones that wrote the store.
        CoursepackError: any other error of `load_teacher`.
    """
    if "imported" in identity:
        raise RecipeError(
            f"{holder} was imported from a cache of another program: there is no teacher to run, "
            "so it cannot be run live, trained further or used to repair the store. Import the cache "
            "again, or "
            "write a store of the teacher with `precompute run`"
        )
    stored = parse_config(Preprocessing, identity["preprocessing"], f"the preprocessing in {holder}")
    spec = check_trusted(identity["network"], holder, trust_code=trust_code)
    if has_weights(weights):
        spec, weights = str(weights), None
    elif has_weights(spec):
        raise RecipeError(
            f"{holder} does not record where its teacher {spec!r} is: give it as --weights {_form(spec)}"
        )
    network = load_teacher(
        spec,
        class_names,
        weights=weights,
        size=stored.size,
        mean=stored.mean,
        std=stored.std,
        columns=identity.get("columns"),
        trust_code=trust_code,
    )
    found = (weights_fingerprint(network.module), network.settings)
    if found != (identity["weights"], identity.get("settings")):
        raise TeacherMismatch(
            f"the weights in {weights or spec!r} are not the ones that wrote the store: "
            "give the old weights, or write the store again"
        )
    return network


def _form(spec: str) -> str:
    hub, _ = find_hub(spec)
    return spec if hub is None else hub.form


def teacher_class_names(spec: str, weights: str | None) -> tuple[str, ...] | None:
    """Return the names of a teacher's classes, or None if neither its spec nor its weights record them.

    Raises:
        CoursepackError: the hub refuses the network.
    """
    hub, name = find_hub(spec)
    return None if hub is None or hub.class_names is None else hub.class_names(name, weights)


def own_preprocessing(spec: str) -> Preprocessing | None:
    """Return the default preprocessing of a network, or None if only building the network reveals it.

    Raises:
        RunError, RecipeError: `spec` is `run:FOLDER`, and there is no finished run.
    """
    if spec.startswith(f"{RUN}:"):
        return _description(parse_run_spec(spec)).preprocessing
    return NETWORKS[spec].preprocessing if spec in NETWORKS else None


def classes_of_run(spec: str) -> int:
    """Return the number of classes of a network in a run folder.

    Args:
        spec: `run:FOLDER` or `run:FOLDER@EPOCH`.

    Raises:
        RunError: there is no finished run.
    """
    return _description(parse_run_spec(spec)).classes


def _description(run: RunSpec) -> _Description:
    folder = run.folder
    if not folder.is_dir():
        raise RunError(f"there is no run at {str(folder)!r}. Make one with `distill train --out {folder}`.")
    if (folder / "0" / NETWORK_FILE).is_file():
        raise RunError(f"run {str(folder)!r} is of several students: name one of them, as in run:{folder}/0")
    if not (folder / NETWORK_FILE).is_file() or not run.weights.is_file():
        raise RunError(f"run {str(folder)!r} has no trained weights: it is unfinished or not a run")
    return parse_config(_Description, read_yaml(folder / NETWORK_FILE), str(folder / NETWORK_FILE))


def _build_described(description: _Description) -> Network:
    size, mean, std = (getattr(description.preprocessing, name) for name in ("size", "mean", "std"))
    return build_network(description.spec, description.classes, size=size, mean=mean, std=std)


def _check_size(description: _Description, state: Mapping[str, Tensor], weights: Path, folder: Path) -> None:
    """Check a described network against its weights before it takes memory."""
    if not any(description.classes in value.shape for value in state.values()):
        raise TeacherMismatch(
            f"{str(folder / NETWORK_FILE)!r} describes {description.classes} classes, but no tensor of "
            f"{weights.name} has a side of that length"
        )
    try:
        with torch.device("meta"):
            sketch = _build_described(description)
    except CoursepackError:
        raise
    except Exception:  # the constructor computes with the values of its own tensors
        return
    fitting_weights(description.spec, sketch.module, description.classes, state, str(weights))


def _load_run(run: RunSpec, *, trust_code: bool) -> Network:
    description, weights = _description(run), run.weights
    check_trusted(description.spec, f"run {str(run.folder)!r}", trust_code=trust_code)
    state = read_weights(weights)
    _check_size(description, state, weights, run.folder)
    network = _build_described(description)
    load_weights(description.spec, network.module, description.classes, state, str(weights))
    return replace(
        network, weights_file=str(weights.resolve()), record=read_record(run.folder, run.epoch, best=run.best)
    )
