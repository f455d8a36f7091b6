"""Networks of timm, with the size and normalization of their published weights.

    timm:NAME                      with weights from a file, or published weights by their tag
    timm:hf-hub:ORG/NAME@COMMIT    network and weights of a repository of the Hugging Face hub
    timm:local-dir:FOLDER          the same in a folder

Weights are downloaded only if they are requested by name.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from coursepack.canonical import fingerprint
from coursepack.errors import RecipeError, TeacherMismatch, UnknownName, first_line
from coursepack.models.hubs.base import HubNetwork
from coursepack.models.hubs.files import missing_library, open_published, read_config
from coursepack.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

TRAINED = ("hf-hub:", "local-dir:")
"""Beginnings of the names of networks that have their own weights."""
NOT_BUILT = {"cache_dir", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"}
"""Arguments of `timm.create_model` that name files and are none of the network's."""
MAX_NAMES = 10
"""Number of timm's names that an error message lists."""


def build(name: str, classes: int, size: int | None) -> HubNetwork:
    """Build a network of timm with fresh weights.

    Args:
        name: one of `timm.list_models`, optionally followed by a dot and the tag of published weights. The
            tag selects size and normalization.
        classes: number of classes C.
        size: side of the images in pixels, used by networks that are built for a fixed size. Defaults to the
            size of the published weights.

    Raises:
        UnknownName: timm has no such network, or no such tag for it.
        RecipeError: timm is not installed, or the network expects images that are not square.
    """
    timm = _library(name)
    _check_name(timm, name)
    try:
        published: Any = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        tags = timm.list_pretrained(name.partition(".")[0] + ".*")
        raise UnknownName("timm network", name, tags) from error
    options: dict[str, Any] = {"img_size": size} if published.fixed_input_size and size is not None else {}
    preprocessing = _preprocessing(name, published.to_dict())
    module: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, **options)
    return HubNetwork(module, preprocessing, classes)


def load(name: str, weights: str, _classes: int) -> HubNetwork | None:
    """Load a network of timm with published weights, by their tag: `timm:resnet18` and `a1_in1k`.

    Returns None if the network has no weights of that tag.

    Raises:
        UnknownName: timm has no such network.
        RecipeError: timm is not installed, or the weights cannot be downloaded.
    """
    timm = _library(name)
    architecture, _, tag = name.partition(".")
    _check_name(timm, architecture)
    full = f"{architecture}.{weights}"
    if full not in timm.list_pretrained(f"{architecture}.*") or tag not in ("", weights):
        return None
    published: Any = timm.models.get_pretrained_cfg(full)
    try:
        module: nn.Module = timm.create_model(full, pretrained=True)
    except Exception as error:  # errors of the network have many classes
        place = (
            published.hf_hub_id
            and f"https://huggingface.co/{published.hf_hub_id}/resolve/main/model.safetensors"
        )
        raise RecipeError(
            f"weights {weights!r} of network 'timm:{name}' cannot be fetched: {first_line(error)}. "
            f"Fetch {place or published.url} where there is a "
            "network, and give the file as --weights"
        ) from error
    return HubNetwork(
        module,
        _preprocessing(full, published.to_dict()),
        int(published.num_classes),
        library=f"timm {timm.__version__}",
    )


def load_trained(name: str, size: int | None, _trust_code: bool) -> HubNetwork:
    """Load a network and its weights from a folder that timm's `save_for_hf` wrote, or from the hub.

    Args:
        name: `local-dir:FOLDER` or `hf-hub:ORG/NAME@COMMIT`.
        size: side of the images in pixels, used by networks that are built for a fixed size.

    Raises:
        RecipeError: timm is not installed, or the files cannot be fetched or read.
        UnknownName: timm has no network of the architecture in config.json.
        TeacherMismatch: the weights do not fit the network.
    """
    from coursepack.models.weights import load_weights, read_weights  # which itself imports the hubs

    timm, spec = _library(name), f"timm:{name}"
    published = open_published(name.partition(":")[2], spec)
    config = read_config(published.folder)
    architecture = str(config.get("architecture"))
    _check_name(timm, architecture)
    pixels: dict[str, Any] = dict(config.get("pretrained_cfg") or config)
    arguments = dict(config.get("model_args") or {})
    arguments.pop("num_classes", None)  # the weights have it
    classes = config.get("num_classes", pixels.get("num_classes"))
    if not_built := sorted(NOT_BUILT & arguments.keys()):
        raise RecipeError(
            f"network {spec!r}: its config.json has model_args {not_built}, which are not accepted"
        )
    if not isinstance(classes, int):
        raise RecipeError(f"network {spec!r}: its config.json has num_classes {classes!r}, expected a number")
    options: dict[str, Any] = (
        {"img_size": size} if pixels.get("fixed_input_size") and size is not None else {}
    )
    try:
        module: nn.Module = timm.create_model(
            architecture, pretrained=False, num_classes=classes, **(arguments | options)
        )
        preprocessing = _preprocessing(name, pixels)
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"network {spec!r}: timm cannot build {architecture!r} from its config.json: {error}"
        ) from error
    weights = _weights_file(published.folder, spec)
    load_weights(spec, module, classes, read_weights(weights), str(weights))
    return HubNetwork(
        module,
        preprocessing,
        classes,
        class_names=_labels(config, classes),
        spec=f"timm:{architecture}",
        settings=fingerprint(arguments) if arguments else None,
        origin=f"timm:{'hf-hub' if '@' in published.origin else 'local-dir'}:{published.origin}",
        library=f"timm {timm.__version__}",
    )


def class_names(name: str, weights: str | None) -> tuple[str, ...] | None:
    """Return the names of a network's classes: those of a folder's config.json, or ImageNet's WordNet ids.

    ImageNet's are those of published weights whose tag ends in `in1k`; weights from a file may have others.
    """
    timm = _library(name)
    if name.startswith(TRAINED):
        config = read_config(open_published(name.partition(":")[2], f"timm:{name}").folder)
        return _labels(config, config.get("num_classes"))
    tag = name.partition(".")[2] or weights
    if weights is not None and weights == tag and tag.endswith("in1k"):
        return tuple(timm.data.ImageNetInfo("imagenet-1k").label_names())
    return None


def _library(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise missing_library(f"timm:{name}", "timm", error) from error
    return timm


def _check_name(timm: Any, name: str) -> None:
    # timm would contact a server for a name such as hf-hub:...
    if not timm.is_model(name):
        known = timm.list_models()
        near = difflib.get_close_matches(name, known, n=MAX_NAMES, cutoff=0.4) or known[:MAX_NAMES]
        raise UnknownName("timm network", name, [*near, f"and {len(known) - len(near)} more of timm's"])


def _preprocessing(name: str, published: Mapping[str, Any]) -> Preprocessing:
    height, width = published["input_size"][1:]
    if height != width:
        raise RecipeError(
            f"network 'timm:{name}' reads images of {height} x {width} pixels, but views are square: "
            "use another network"
        )
    return Preprocessing(size=height, mean=tuple(published["mean"]), std=tuple(published["std"]))


def _weights_file(folder: Path, spec: str) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    named = [file for file in files if file.name == "model.safetensors"] or files
    if len(named) != 1:
        raise TeacherMismatch(
            f"network {spec!r}: {str(folder)!r} holds {', '.join(file.name for file in files)}, expected "
            "model.safetensors"
        )
    return named[0]


def _labels(config: Mapping[str, Any], classes: int | None) -> tuple[str, ...] | None:
    names = config.get("label_names")
    if isinstance(names, list) and len(names) == classes:
        return tuple(map(str, names))
    return None
