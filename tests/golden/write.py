"""Writes the golden store of a version and the values that all hold, once for each version of the format.

PYTHONPATH=tests python tests/golden/write.py VERSION
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from encoded_rows import EncodedRows
from helpers import write_rows

FOLDER = Path(__file__).parent
STATIC = {"head_bias": np.linspace(-1, 1, 10, dtype=np.float32)}
ROWS = EncodedRows(
    samples=20,
    block_rows=16,
    shapes={"logits": (10,), "features/hidden@sign": (3, 5)},
    encodings={"logits": "int8", "features/hidden@sign": "bits"},
    static=STATIC,
    environment={"device": "cpu", "batch_size": 7},
)


def main() -> None:
    version = int(sys.argv[1])
    path = FOLDER / f"version-{version}.zarr"
    write_rows(path, replace(ROWS, format_version=version))
    shutil.rmtree(path / "runs")
    shutil.rmtree(path / "blocks")
    (path / "lock").unlink()
    if version > 1:
        return
    values = {"labels": ROWS.labels.tolist(), "static": {"head_bias": STATIC["head_bias"].tolist()}}
    for name in ROWS.shapes:
        values[name] = [
            {part: rows.tolist() for part, rows in ROWS.parts(name, view).items()} for view in (0, 1)
        ]
    values["decoded logits"] = [ROWS.decoded("logits", view).tolist() for view in (0, 1)]
    (FOLDER / "version-1.json").write_text(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
