"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), read from their original files.

The original files are pickles. They are read by an unpickler that accepts byte strings, lists, dicts and
uint8 arrays only, so that no function named in a file is ever called. File names are taken from torchvision;
its own reader is not used, because it unpickles anything and refuses files that are not byte for byte the
official ones.
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
    """Open CIFAR-10: 50,000 train and 10,000 test images of 32 x 32 in ten classes."""
    from torchvision.datasets import CIFAR10

    layout = Layout(
        "cifar-10-batches-py with data_batch_1 to data_batch_5, test_batch and batches.meta",
        f"Get 'CIFAR-10 python version' (cifar-10-python.tar.gz) {HOME}",
    )
    return _open(spec, root, layout, CIFAR10, "labels")


def cifar100(spec: Spec, root: Path | None) -> Source:
    """Open CIFAR-100: 50,000 train and 10,000 test images of 32 x 32 in a hundred (fine) classes."""
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
            batch_images, batch_labels = _batch(read_plain_pickle(base / name), label_key, len(names))
        except _Damaged as error:
            raise layout.error(spec, base, f"file {name!r} {error}") from error
        images.append(batch_images)
        labels.append(batch_labels)
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
    """A file is damaged; the message is to follow the file's name."""


def read_plain_pickle(path: Path) -> dict[str, Any]:
    """Return the dict in a pickle of plain values and uint8 arrays.

    Raises:
        _Damaged: the file is damaged, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            values = _PlainUnpickler(file, encoding="bytes").load()
    except _Damaged:
        raise
    except Exception as error:
        # The unpickler raises exceptions of nearly any type for a damaged pickle.
        raise _Damaged(f"is damaged: {str(error) or type(error).__name__}") from error
    if not isinstance(values, dict):
        raise _Damaged(f"holds a {type(values).__name__}, expected a dict")
    return {
        _text(key): value.pixels if isinstance(value, _ArrayState) else value for key, value in values.items()
    }


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler that maps the names used in CIFAR files to substitutes and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): _new_array,
            ("numpy._core.multiarray", "_reconstruct"): _new_array,
            ("numpy", "ndarray"): "ndarray",
            ("numpy", "dtype"): _DtypeState,
            ("_codecs", "encode"): _encode,  # Python 3's encoding of bytes in protocol 2
        }
        if (module, name) not in allowed:
            raise _Damaged(
                f"refers to {module}.{name}, which no original CIFAR file does; get the original file"
            )
        return allowed[module, name]


class _DtypeState:
    """Substitute for a numpy dtype in a pickle; accepts uint8 only and ignores the dtype's state."""

    def __init__(self, code: Any, *_options: Any) -> None:
        if _text(code) not in ("u1", "|u1"):
            raise _Damaged(f"holds an array of {_text(code)}, expected bytes (u1)")

    def __setstate__(self, _state: Any) -> None:
        pass


class _ArrayState:
    """Substitute for a numpy array in a pickle; its state holds shape and bytes."""

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
