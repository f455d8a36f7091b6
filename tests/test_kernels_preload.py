"""Compiled functions made ready in a thread: once, waited for by their first use, with their errors."""

import importlib
import importlib.util
import os
import sys
import threading

import pytest
import torch
from builders import make_recipe

from coursepack.distill.runs import start
from coursepack.kernels import dispatch, preload

SLOW = "import threading, time\ntime.sleep(0.3)\nmade_by = threading.current_thread().name\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose module `slow` takes a while to import and whose module `broken` cannot be."""
    folder = tmp_path / "own_kernels"
    folder.mkdir()
    for name, text in (("__init__", ""), ("slow", SLOW), ("broken", "raise OSError('no compiler')\n")):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(preload, "PACKAGE", "own_kernels")
    yield
    for name in [name for name in sys.modules if name.startswith("own_kernels")]:
        del sys.modules[name]


def test_the_first_use_waits_for_the_thread(package):
    thread = preload.preload(["slow"])
    assert importlib.import_module("own_kernels.slow").made_by == thread.name == "coursepack-compile"
    thread.join()
    assert preload.preload(["slow"]) is None, "it is ready"


def test_an_error_is_raised_by_the_first_use(package, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: pytest.fail("a traceback is printed"))
    preload.preload(["broken", "slow"]).join()
    assert "own_kernels.slow" in sys.modules, "the others are loaded"
    with pytest.raises(OSError, match="no compiler"):
        importlib.import_module("own_kernels.broken")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_a_fork_waits_for_the_thread(package):
    """A lock that the thread holds would stay locked in the child."""
    preload.preload(["slow"])
    child = os.fork()
    if child == 0:
        os._exit(0 if "made_by" in vars(sys.modules["own_kernels.slow"]) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_without_numba_nothing_is_compiled(package, monkeypatch):
    monkeypatch.setattr(dispatch, "NUMBA_IS_INSTALLED", False)
    assert preload.preload(["slow"]) is None


@pytest.mark.parametrize(
    ("method", "modules"),
    [
        ("supervised", set()),
        ("kd", {*preload.LOSS}),
        ("amtml", {*preload.LOSS, *preload.ANGLES}),
        ("rkd", {*preload.ANGLES}),
        ("fitnets", {*preload.HINTS}),
    ],
)
def test_a_run_prepares_what_its_objective_calls(method, modules):
    recipe = make_recipe(method=method)
    assert set(start.compiled_modules(recipe, torch.device("cpu"))) == modules
    assert not start.compiled_modules(recipe, torch.device("cuda"))
    for name in modules:
        assert importlib.util.find_spec(f"{preload.PACKAGE}.{name}")


def test_a_run_prepares_its_divergence():
    recipe = make_recipe(method="kd")
    other = recipe.model_copy(update={"objective": recipe.objective.model_copy(update={"divergence": "js"})})
    assert start.compiled_modules(other, torch.device("cpu")) == [*preload.DIVERGENCES]


def test_a_run_starts_the_thread(stores, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(start, "preload", lambda modules: seen.append(set(modules)))
    with start_of(make_recipe(stores[:1], method="kd", limit=32), tmp_path / "run"):
        assert seen == [set(preload.LOSS)]


def start_of(recipe, out):
    from coursepack.distill.setup.prepare import prepare

    return start.start_run(
        prepare(recipe, torch.device("cpu")), recipe, out, overwrite=False, resume=False, track=()
    )
