"""Image classifiers of transformers: `hf:FOLDER`, or `hf:ORG/NAME@COMMIT` of the Hugging Face hub.

Weights are read from safetensors in float32, and no code of a repository is run. A network whose weights do
not cover all of its layers is refused, because transformers initializes the others at random.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from coursepack.canonical import fingerprint
from coursepack.errors import RecipeError, TeacherMismatch, first_line
from coursepack.models.hubs.base import HubNetwork
from coursepack.models.hubs.files import missing_library, open_published, read_config
from coursepack.models.hubs.processor import preprocessing_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from coursepack.models.hubs.files import Published

PROCESSOR = "preprocessor_config.json"
NO_ANSWERS = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "auto_map",
              "id2label", "label2id", "label_names", "label_descriptions")  # fmt: skip
"""Members of config.json that do not determine logits: paths, versions, and names of classes."""
SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_trained(name: str, _size: int | None, _trust_code: bool) -> HubNetwork:
    """Load an image classifier with its weights and the preprocessing of its image processor.

    Args:
        name: folder that `save_pretrained` wrote, or `ORG/NAME@COMMIT`.

    Raises:
        RecipeError: transformers is not installed, the files cannot be fetched or read, or the image
            processor cannot be mapped.
        TeacherMismatch: the weights are not those of the network.
    """
    spec = f"hf:{name}"
    transformers = _library(spec)
    published = open_published(name, spec)
    _check_adapter(published, spec)
    config = read_config(published.folder)
    model: Any
    with _quiet(transformers):
        model, info = _load(transformers, published, spec)
        processor = _processor(transformers, published, spec)
    _check_loaded(info, config, spec)
    model.config.return_dict = True
    model.register_forward_hook(_only_logits)
    settings = {key: value for key, value in config.items() if key not in NO_ANSWERS}
    return HubNetwork(
        model,
        preprocessing_of(processor, spec),
        int(model.config.num_labels),
        class_names=_labels(model.config),
        spec=f"hf:{type(model).__name__}",
        settings=fingerprint(settings),
        origin=f"hf:{published.origin}",
        library=f"transformers {transformers.__version__}",
    )


def class_names(name: str, _weights: str | None = None) -> tuple[str, ...] | None:
    """Return the names in a configuration's `id2label`, in the order of the class ids."""
    spec = f"hf:{name}"
    transformers = _library(spec)
    published = open_published(name, spec)
    with _quiet(transformers):
        try:
            return _labels(transformers.AutoConfig.from_pretrained(published.folder, **SAFE))
        except Exception as error:
            raise _unreadable(spec, "its config.json cannot be read", error) from error


def _library(spec: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise missing_library(spec, "transformers", error) from error
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Suppress the library's messages and progress bars; what matters of them is raised as errors."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _check_adapter(published: Published, spec: str) -> None:
    if (published.folder / "adapter_config.json").exists():
        raise RecipeError(
            f"network {spec!r} is an adapter of another network: merge it (merge_and_unload of peft), save "
            "the merged network, and give its folder"
        )


def _load(transformers: Any, published: Published, spec: str) -> tuple[nn.Module, Mapping[str, Any]]:
    try:
        model, info = transformers.AutoModelForImageClassification.from_pretrained(
            published.folder,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # `_check_loaded` refuses them with their names
            output_loading_info=True,
            **SAFE,
        )
    except Exception as error:
        raise _unreadable(spec, "transformers cannot load it as an image classifier", error) from error
    return model, info


def _processor(transformers: Any, published: Published, spec: str) -> Any:
    try:
        return transformers.AutoImageProcessor.from_pretrained(published.folder, **SAFE)
    except Exception as error:
        if not (published.folder / PROCESSOR).is_file():  # the library's own text is about other causes
            raise RecipeError(
                f"network {spec!r}: its image processor ({PROCESSOR}) is missing: write it into "
                f"{str(published.folder)!r} with processor.save_pretrained"
            ) from error
        raise _unreadable(spec, f"its image processor ({PROCESSOR}) cannot be read", error) from error


def _unreadable(spec: str, what: str, error: Exception) -> RecipeError:
    return RecipeError(f"network {spec!r}: {what}: {first_line(error)}")


def _check_loaded(info: Mapping[str, Any], config: Mapping[str, Any], spec: str) -> None:
    """Check that every weight of the network came from the files, and that none was left over."""
    found = {
        kind: sorted(map(str, info.get(f"{kind}_keys", ())))
        for kind in ("missing", "mismatched", "unexpected")
    }
    wrong = {kind: names[:3] for kind, names in found.items() if names}
    if wrong:
        labels = {"id2label", "num_labels", "num_classes", "label_names"}
        advice = (
            ""
            if labels & config.keys()
            else ". Its config.json has no id2label, so the number of classes is unknown"
        )
        raise TeacherMismatch(
            f"the weights of network {spec!r} are not those of an image classifier of its configuration: "
            + ", ".join(f"{kind} {names}" for kind, names in wrong.items())
            + f" (first three of each){advice}. transformers would fill missing layers with random weights: "
            "give a checkpoint that was fine-tuned for classification"
        )


def _only_logits(_module: nn.Module, _images: Any, output: Any) -> Any:
    """Return the logits of a model's output; a forward hook."""
    return output.logits


def _labels(config: Any) -> tuple[str, ...]:
    names = config.id2label
    return tuple(str(names[index]) for index in sorted(names))
