"""Importing a package touches no GPU, network or disk, and loads no heavy library before it is needed."""

import json
import subprocess
import sys

import pytest

PROBE = """
import importlib, json, os, sys

import torch  # its own import asks the linker and opens /dev/null

events = []

def watch(event, args):
    if event == "open":
        path, mode, flags = args
        # `mode` is None where a descriptor is opened by os.open.
        if (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or any(c in (mode or "") for c in "wax+"):
            events.append(f"open {path}")
    elif event.partition(".")[0] in ("socket", "subprocess", "urllib", "ftplib", "http"):
        events.append(event)
    elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.system", "os.putenv", "os.exec"):
        events.append(event)

sys.addaudithook(watch)
told = {}
for name in sys.argv[1:]:
    if name == "canary":
        open(os.devnull, "w").close()
        importlib.import_module("socket").socket().close()
    else:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):  # some are imported when they are used
            getattr(module, public)
    told[name] = {"events": events[:], "modules": sorted(sys.modules), "cuda": torch.cuda.is_initialized()}
    events.clear()
print(json.dumps(told))
"""
# In this order: a module that is loaded is the fault of the first package that shows it.
PACKAGES = ["kernels", "data", "models", "pages", "precompute", "distill"]
MODULES = [f"coursepack.{name}" for name in PACKAGES] + [
    *(f"coursepack.precompute.cli.{name}" for name in ("jobs", "stores", "caches", "copy")),
    *(f"coursepack.distill.cli.{name}" for name in ("train", "chain", "runs", "methods", "export")),
]
LATE = (
    "torchvision",
    "sklearn",
    "scipy",
    "numba",
    "llvmlite",
    "matplotlib",
    "timm",
    "transformers",
    "huggingface_hub",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "zarr",
    "PIL",
    "tensorboard",
    "wandb",
    "mlflow",
)


@pytest.fixture(scope="module")
def told():
    command = [sys.executable, "-B", "-W", "error", "-c", PROBE, *MODULES, "canary"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", MODULES)
def test_import_touches_nothing(told, name):
    assert told[name]["events"] == []
    assert told[name]["cuda"] is False


@pytest.mark.parametrize("name", MODULES)
def test_import_loads_no_heavy_library(told, name):
    assert not set(told[name]["modules"]) & set(LATE)


def test_each_package_loads_only_what_stands_below_it(told):
    above = {"kernels": PACKAGES[1:], "data": PACKAGES[2:], "models": PACKAGES[3:], "precompute": ["distill"]}
    for name, others in above.items():
        loaded = set(told[f"coursepack.{name}"]["modules"])
        assert not loaded & {f"coursepack.{other}" for other in others}
    assert "coursepack.distill.cli" not in told["coursepack.distill"]["modules"]


def test_the_watch_sees_what_it_should(told):
    assert "open /dev/null" in told["canary"]["events"]
    assert any(event.startswith("socket") for event in told["canary"]["events"])


WINDOWS = """
import importlib, pkgutil, sys, tempfile
from pathlib import Path

import coursepack.distill, coursepack.precompute

assert "torch" not in sys.modules
for name in [name for name in sys.modules if name.partition(".")[0] == "coursepack"]:
    del sys.modules[name]

# What these libraries do on such systems is theirs.
import multiprocessing.util, psutil, torch

sys.modules["fcntl"] = sys.modules["resource"] = None
import coursepack, coursepack.distill, coursepack.precompute

for package in (coursepack.distill, coursepack.precompute):
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        getattr(package, name)
        assert name in vars(package)
    assert not hasattr(package, "nothing")

names = [module.name for module in pkgutil.walk_packages(coursepack.__path__, "coursepack.")]
for name in names:
    importlib.import_module(name)

from coursepack.data.store.owners import Part, live_runs, owning
from coursepack.distill.targets.reading import free_memory

with tempfile.TemporaryDirectory() as folder, owning(Path(folder), Part()):
    assert live_runs(Path(folder)) == []
assert free_memory() > 0
print(len(names))
"""


@pytest.mark.integration
def test_public_names_come_when_used_and_every_module_without_flock_and_limits_of_processes():
    """Both in one process, since importing torch is what takes longest."""
    command = [sys.executable, "-W", "error::ImportWarning", "-c", WINDOWS]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 100
