"""The wheel holds the sources under `coursepack`, and nothing at the top that other packages use."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "common": "coursepack",
    "kernels": "coursepack/kernels",
    "data": "coursepack/data",
    "models": "coursepack/models",
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


@pytest.fixture(scope="module")
def wheel(checkout):
    """A wheel built from the copy."""
    folder = checkout.parent
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        "checkout",
    ]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
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
