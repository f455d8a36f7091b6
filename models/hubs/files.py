"""Folders and repositories of published networks: `FOLDER` or `ORG/NAME@COMMIT` of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from coursepack.console import inform
from coursepack.errors import RecipeError, first_line
from coursepack.parsing import read_json

CONFIG = "config.json"
PATTERNS = ("*.json", "*.safetensors")
"""Files of a repository that are fetched; nothing that is unpickled or run."""
REPOSITORY = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
COMMIT = re.compile("[0-9a-f]{40}")


class Published(NamedTuple):
    """A folder with the files of a published network."""

    folder: Path
    origin: str
    """Absolute path, or `ORG/NAME@COMMIT`."""


def open_published(name: str, spec: str) -> Published:
    """Return the folder of a published network, fetched from the Hugging Face hub if it is not a folder.

    Args:
        name: folder, or `ORG/NAME`, optionally followed by `@` and a commit, branch or tag.
        spec: spec of the network, for error messages.

    Raises:
        RecipeError: there is no such folder, or the repository cannot be fetched.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        found = Published(folder, str(folder.resolve()))
    else:
        match = REPOSITORY.fullmatch(name)
        if match is None:
            raise RecipeError(
                f"network {spec!r}: there is no folder {name!r}, and it is not ORG/NAME@COMMIT of the "
                "Hugging Face hub"
            )
        found = _fetch(match["id"], match["revision"], spec)
    if not (found.folder / CONFIG).is_file():
        raise RecipeError(
            f"network {spec!r}: {str(found.folder)!r} has no {CONFIG}: give a folder that "
            "save_pretrained wrote"
        )
    _check_safe(found.folder, spec)
    return found


def _check_safe(folder: Path, spec: str) -> None:
    """Check that a folder has weights that can be read without running code."""
    if any(folder.glob("*.safetensors")):
        return
    held = sorted(
        path.name for pattern in ("*.bin", "*.pt*", "*.h5", "*.msgpack") for path in folder.glob(pattern)
    )
    raise RecipeError(
        f"network {spec!r}: {str(folder)!r} has no .safetensors file"
        + (f"; {', '.join(held[:3])} may run code when it is read, so it is not. " if held else ". ")
        + "Convert the weights: model.save_pretrained(FOLDER) writes model.safetensors"
    )


def _fetch(repository: str, revision: str | None, spec: str) -> Published:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise missing_library(spec, "huggingface_hub", error) from error
    try:
        path = snapshot_download(repository, revision=revision, allow_patterns=list(PATTERNS))
    except Exception as error:  # errors of the network have many classes
        files = " ".join(f"'{pattern}'" for pattern in PATTERNS)
        at = "" if revision is None else f" --revision {revision}"
        form = "timm:local-dir:FOLDER" if spec.startswith("timm:") else "hf:FOLDER"
        raise RecipeError(
            f"network {spec!r}: {CONFIG}, preprocessor_config.json and model.safetensors of {repository!r} "
            f"cannot be fetched: {first_line(error)}. Where there is a network, run `hf download "
            f"{repository}{at} --include {files} --local-dir FOLDER`, copy FOLDER here, and give {form}"
        ) from error
    commit = Path(path).name
    if COMMIT.fullmatch(revision or "") is None:
        inform(f"{spec}: {revision or 'main'} is commit {commit} now; give {repository}@{commit} to keep it")
    return Published(Path(path), f"{repository}@{commit}")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's config.json.

    Raises:
        RecipeError: the file cannot be read, or is not a mapping.
    """
    values = read_json(folder / CONFIG, RecipeError)
    if not isinstance(values, dict):
        raise RecipeError(f"{str(folder / CONFIG)!r} holds a {type(values).__name__}, expected a mapping")
    return values


def missing_library(spec: str, library: str, error: ImportError) -> RecipeError:
    """Return the error for a network whose library cannot be imported."""
    return RecipeError(
        f"network {spec!r} needs {library}, which cannot be imported: {error}. "
        "Get it with `pip install 'coursepack[teachers]'`"
    )
