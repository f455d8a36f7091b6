"""Code in README and docs: Python runs, YAML is valid, and everything else is of a known kind."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from builders import CPU, make_recipe

from coursepack.config import parse_config
from coursepack.data import ViewRecipe
from coursepack.distill.recipe import resolve_objective
from coursepack.precompute.teachers import TeachersFile

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.M | re.S)
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
OTHER_LANGUAGES = {"{toctree}", "{eval-rst}", "bash", "text"}
"""Directives of the site, lines for startup files of shells, and output."""
OWN_TESTS = {
    "extending.md": "test_extending.py",
    "library.md": "test_examples_loops.py",
    "training.md": "test_examples.py",
    "tutorial.md": "test_examples.py",
    "chains.md": "test_examples.py",
}
"""Pages whose blocks other modules run."""
NEEDS = re.compile(r"#.*\bneeds\b")
"""A comment in a block that needs more than this package."""
VALID = {
    "methods.md": lambda values: resolve_objective("kd", values["objective"], "the page", classes=10),
    "views.md": lambda values: parse_config(ViewRecipe, values, "the page"),
    "precompute.md": lambda values: parse_config(TeachersFile, values, "the page"),
}
"""Checks of YAML, by page."""


def blocks(language):
    """Fenced blocks of a language, as `(page, text)`, of pages without a test of their own."""
    return [
        pytest.param(page.name, text, id=f"{page.name}-{number}")
        for page in PAGES
        if page.name not in OWN_TESTS
        for number, (kind, text) in enumerate(FENCE.findall(page.read_text()))
        if kind == language
    ]


def test_languages_of_blocks_are_known():
    for page in PAGES:
        text = page.read_text()
        languages = {language for language, _ in FENCE.findall(text)}
        assert 2 * len(FENCE.findall(text)) == len(re.findall(r"^ *```", text, re.M)), page
        if page.name in OWN_TESTS:
            own = (ROOT / "tests" / OWN_TESTS[page.name]).read_text()
            assert page.stem in own
        else:
            assert languages <= {"python", "yaml"} | OTHER_LANGUAGES, page


def test_pictures_are_described_and_small():
    pictures = [each for page in [*PAGES, ROOT / "README.md"] for each in PICTURE.findall(page.read_text())]
    assert len(pictures) > 5
    for described, file in pictures:
        assert len(described.split()) > 4, file
        assert (ROOT / "docs" / Path(file).name).stat().st_size <= 150_000, file
    shown = {Path(file).name for _, file in pictures}
    assert {path.name for path in (ROOT / "docs").glob("*.png")} <= shown


def test_every_page_is_in_the_contents():
    trees = re.findall(r"^```{toctree}\n(.*?)^```$", (ROOT / "docs" / "index.md").read_text(), re.M | re.S)
    listed = {line for tree in trees for line in tree.splitlines() if line and line[0] != ":"}
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert listed == pages - {"index"} | {"decisions/README"}


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_of_pages_runs(page, text, stores, tmp_path, monkeypatch):
    if NEEDS.search(text):
        compile(text, page, "exec")
        return
    monkeypatch.chdir(tmp_path)
    exec(text, {"recipe": make_recipe(limit=64), "out": tmp_path / "run"})


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_yaml_of_pages_is_valid(page, text):
    VALID[page](yaml.safe_load(text))


def test_python_of_the_readme_runs(stores, tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"^## As a library\n\n((?: {4}.*\n|\n)+)", readme, re.M)[1]
    for name, store in zip(("cnn", "resnet"), stores[1:], strict=True):
        (tmp_path / f"{name}.zarr").symlink_to(store)
    monkeypatch.chdir(tmp_path)
    labels = torch.arange(4)
    names = {"views": 1, "samples": labels.numpy(), "labels": labels, "student_logits": torch.zeros(4, 10)}
    exec(textwrap.dedent(code), names)
    assert names["loss"].device == CPU
    assert names["loss"].isfinite()
