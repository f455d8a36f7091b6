"""Writes the golden store and the values it holds, once: `PYTHONPATH=tests python tests/golden/write.py`."""

import json
import shutil
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
    path = FOLDER / "version-1.zarr"
    write_rows(path, ROWS)
    shutil.rmtree(path / "runs")
    shutil.rmtree(path / "blocks")
    (path / "lock").unlink()
    values = {"labels": ROWS.labels.tolist(), "static": {"head_bias": STATIC["head_bias"].tolist()}}
    for name in ROWS.shapes:
        values[name] = [
            {part: rows.tolist() for part, rows in ROWS.parts(name, view).items()} for view in (0, 1)
        ]
    values["decoded logits"] = [ROWS.decoded("logits", view).tolist() for view in (0, 1)]
    (FOLDER / "version-1.json").write_text(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
