"""The wheel holds the sources under `coursepack`, and nothing at the top that other packages use."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest
import yaml

import coursepack

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "common": "coursepack",
    "kernels": "coursepack/kernels",
    "data": "coursepack/data",
    "models": "coursepack/models",
    "pages": "coursepack/pages",
    "precompute": "coursepack/precompute",
    "distill": "coursepack/distill",
}
LEFT_OUT = shutil.ignore_patterns(
    ".venv", ".git", "build", "dist", "demo", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout without `build/`, which may hold files that are gone."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("wheel") / "checkout", ignore=LEFT_OUT)


def build(checkout, folder, *options):
    """Build a checkout into a folder."""
    command = [sys.executable, "-m", "build", *options, "--no-isolation", "--outdir", str(folder), "checkout"]
    built = subprocess.run(command, cwd=checkout.parent, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr


@pytest.fixture(scope="module")
def wheel(checkout):
    """A wheel built from the copy."""
    build(checkout, checkout.parent, "--wheel")
    (path,) = checkout.parent.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_sources_and_nothing_else(checkout, wheel):
    expected = {}
    for folder, package in FOLDERS.items():
        for path in (checkout / folder).rglob("*.py"):
            expected[f"{package}/{path.relative_to(checkout / folder).as_posix()}"] = path
    for name in ("py.typed", "catalog.json"):
        expected[f"coursepack/{name}"] = checkout / "common" / name
    assert len(expected) > 45
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == set(expected)
    for name, path in expected.items():
        assert wheel.read(name) == path.read_bytes(), name
    assert {name.split("/")[0].partition("-")[0] for name in wheel.namelist()} == {"coursepack"}


def test_metadata_of_the_wheel(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    lines = wheel.read(name).decode().splitlines()
    assert "Name: coursepack" in lines
    assert "Requires-Python: >=3.11" in lines
    assert any(line.startswith("License") and line.endswith(": Apache-2.0") for line in lines)
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())
    for name in ("Summary", "Author", "Keywords", "Description-Content-Type"):
        assert any(line.startswith(f"{name}: ") for line in lines), name
    classifiers = {line.partition(": ")[2] for line in lines if line.startswith("Classifier: ")}
    assert {"Typing :: Typed", "Operating System :: POSIX :: Linux"} < classifiers
    assert "# coursepack" in lines, "the description is the README"
    extras = {line.partition(": ")[2] for line in lines if line.startswith("Provides-Extra: ")}
    assert {"teachers", "export", "tensorboard", "wandb", "mlflow", "s3", "cluster", "dev"} <= extras
    (name,) = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    assert wheel.read(name).decode().split() == [
        "[console_scripts]", "distill", "=", "coursepack.distill.cli:main",
        "precompute", "=", "coursepack.precompute.cli:main",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["distill", "precompute"])
def test_entry_points_are_commands(name):
    (entry,) = entry_points(group="console_scripts", name=name)
    command = entry.load()
    assert isinstance(command, click.Group)
    assert command.commands
    assert (Path(sys.executable).parent / name).is_file()


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license", "abstract"} <= citation.keys()
    assert (citation["version"], citation["type"]) == (coursepack.__version__, "software")


IMPORT = """
import importlib.resources, sys
import coursepack.distill, coursepack.precompute
from coursepack.distill import METHODS, train
assert coursepack.__file__.startswith(sys.prefix), coursepack.__file__
assert (importlib.resources.files("coursepack") / "py.typed").is_file()
print(len(METHODS))
"""


@pytest.mark.integration
def test_an_empty_environment_takes_the_wheel_that_the_sdist_makes(checkout, wheel, tmp_path):
    """Only the dependencies are borrowed from this environment, since torch alone has gigabytes."""
    build(checkout, tmp_path)  # the source distribution, and a wheel from that
    (made,), (source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    found = zipfile.ZipFile(made)
    assert found.namelist() == wheel.namelist()
    for name in wheel.namelist():
        assert name.endswith("/RECORD") or found.read(name) == wheel.read(name), name
    with tarfile.open(source) as archive:
        members = {Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()}
    assert {
        "CITATION.cff",
        "CHANGELOG.md",
        "LICENSE",
        "docs/export.md",
        "recipes",
        "tests/conftest.py",
    } <= members
    assert not [name for name in members if "__pycache__" in name]

    place = tmp_path / "environment"
    venv.create(place)
    python = place / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*words):
        result = subprocess.run(
            [*map(str, words)], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    call(*pip, made)
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (folder,) = (place / "lib").glob("python*/site-packages")
    (folder / "borrowed.pth").write_text("\n".join(libraries))
    assert int(call(python, "-c", IMPORT)) > 30
    assert call(place / "bin" / "distill", "--version") == f"coursepack {coursepack.__version__}\n"
    assert "Commands:" in call(place / "bin" / "precompute", "--help")
    words = ["train", "--student", "digits-small", "--source", "digits", "--view", "digits"]
    assert "accuracy" in call(place / "bin" / "distill", *words, "--epochs", 1, "--limit", 32, "--out", "run")
