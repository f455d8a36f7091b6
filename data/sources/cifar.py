"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their original files.

The originals are pickles. They are read by an unpickler that knows byte strings, lists, dicts and arrays of
bytes, and nothing else: no function that a file names is ever called. torchvision says what the files are
called; its own reader unpickles anything, and refuses a file that is not the official one byte for byte.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

from coursepack.data.sources.base import InMemory
from coursepack.data.sources.roots import Layout, found_in

if TYPE_CHECKING:
    from pathlib import Path

    from coursepack.data.sources.base import Source, Spec

SIDE = 32
HOME = "from its home page, www.cs.toronto.edu/~kriz/cifar.html, and unpack it there."


def cifar10(spec: Spec, root: Path | None) -> Source:
    """CIFAR-10: 50,000 train and 10,000 test images of 32 x 32 in ten classes."""
    from torchvision.datasets import CIFAR10

    layout = Layout(
        "cifar-10-batches-py with data_batch_1 to data_batch_5, test_batch and batches.meta",
        f"Get 'CIFAR-10 python version' (cifar-10-python.tar.gz) {HOME}",
    )
    return _open(spec, root, layout, CIFAR10, "labels")


def cifar100(spec: Spec, root: Path | None) -> Source:
    """CIFAR-100: 50,000 train and 10,000 test images of 32 x 32 in a hundred (fine) classes."""
    from torchvision.datasets import CIFAR100

    layout = Layout(
        "cifar-100-python with train, test and meta",
        f"Get 'CIFAR-100 python version' (cifar-100-python.tar.gz) {HOME}",
    )
    return _open(spec, root, layout, CIFAR100, "fine_labels")


def _open(spec: Spec, root: Path | None, layout: Layout, dataset: Any, label_key: str) -> Source:
    base = layout.root(spec, root)
    if base.name != dataset.base_folder or (base / dataset.base_folder).is_dir():
        base = base / dataset.base_folder
    if not base.is_dir():
        problem = f"there is no folder {dataset.base_folder!r}; {found_in(base.parent)}"
        raise layout.error(spec, base.parent, problem)
    files = [name for name, _ in (dataset.train_list if spec.split == "train" else dataset.test_list)]
    meta = dataset.meta["filename"]
    missing = [name for name in (meta, *files) if not (base / name).is_file()]
    if missing:
        raise layout.error(spec, base, f"there is no file {missing[0]!r}; {found_in(base)}")
    try:
        names = _class_names(read_plain_pickle(base / meta), dataset.meta["key"])
    except _Damaged as error:
        raise layout.error(spec, base, f"file {meta!r} {error}") from error
    images, labels = [], []
    for name in files:
        try:
            part, part_labels = _batch(read_plain_pickle(base / name), label_key, len(names))
        except _Damaged as error:
            raise layout.error(spec, base, f"file {name!r} {error}") from error
        images.append(part)
        labels.append(part_labels)
    return InMemory(str(spec), np.concatenate(images), np.concatenate(labels), names)


def _batch(values: dict[str, Any], label_key: str, classes: int) -> tuple[Any, Any]:
    data, labels = values.get("data"), values.get(label_key)
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3 * SIDE * SIDE:
        shape = getattr(data, "shape", type(data).__name__)
        raise _Damaged(f"has data of shape {shape}, expected (N, {3 * SIDE * SIDE})")
    if not isinstance(labels, list) or len(labels) != len(data):
        count = len(labels) if isinstance(labels, list) else "no"
        raise _Damaged(f"has {count} {label_key} for {len(data)} images")
    wrong = [label for label in labels if not isinstance(label, int) or not 0 <= label < classes]
    if wrong:
        raise _Damaged(f"has the label {wrong[0]!r}, expected 0 to {classes - 1}")
    pixels = data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), np.array(labels, dtype=np.int64)


def _class_names(values: dict[str, Any], key: str) -> tuple[str, ...]:
    names = values.get(key)
    if not isinstance(names, list) or not names:
        raise _Damaged(f"has no {key!r}")
    return tuple(_text(name) for name in names)


class _Damaged(Exception):
    """What is wrong with a file, to follow its name."""


def read_plain_pickle(path: Path) -> dict[str, Any]:
    """A dict from a pickle that holds plain values and arrays of bytes.

    Raises:
        _Damaged: the file is no such pickle.
    """
    try:
        with path.open("rb") as file:
            values = _PlainUnpickler(file, encoding="bytes").load()
    except _Damaged:
        raise
    except Exception as error:
        # A damaged pickle makes the unpickler raise nearly anything.
        raise _Damaged(f"is damaged: {str(error) or type(error).__name__}") from error
    if not isinstance(values, dict):
        raise _Damaged(f"holds a {type(values).__name__}, expected a dict")
    return {
        _text(key): value.pixels if isinstance(value, _ArrayState) else value for key, value in values.items()
    }


class _PlainUnpickler(pickle.Unpickler):
    """Gives stand-ins for the four names that the files hold, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): _new_array,
            ("numpy._core.multiarray", "_reconstruct"): _new_array,
            ("numpy", "ndarray"): "ndarray",
            ("numpy", "dtype"): _DtypeState,
            ("_codecs", "encode"): _encode,  # Python 3 writes bytes so in protocol 2
        }
        if (module, name) not in allowed:
            raise _Damaged(f"asks for {module}.{name}, which no CIFAR file does: it is not read")
        return allowed[module, name]


class _DtypeState:
    """Stands for a numpy dtype while an array is read; its own state does not matter for bytes."""

    def __init__(self, code: Any, *_options: Any) -> None:
        if _text(code) not in ("u1", "|u1"):
            raise _Damaged(f"holds an array of {_text(code)}, expected bytes (u1)")

    def __setstate__(self, _state: Any) -> None:
        pass


class _ArrayState:
    """Stands for a numpy array; gets shape and bytes as its state."""

    pixels: Any = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, _dtype, fortran, data = state
        order: Any = "F" if fortran else "C"
        self.pixels = np.frombuffer(_bytes(data), dtype=np.uint8).reshape(shape, order=order)


def _new_array(*_arguments: Any) -> _ArrayState:
    return _ArrayState()


def _encode(text: str, encoding: Any) -> bytes:
    if _text(encoding) != "latin1":
        raise _Damaged(f"encodes text as {_text(encoding)}, expected latin1")
    return text.encode("latin1")


def _bytes(data: Any) -> bytes:
    return data if isinstance(data, bytes) else str(data).encode("latin1")


def _text(data: Any) -> str:
    return data.decode("utf-8") if isinstance(data, bytes) else str(data)
