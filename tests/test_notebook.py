"""The notebook of the digits: stored without outputs, and run from its first cell to its last."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "digits.ipynb"
RUN = """
import json, sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
print(json.dumps([cell.outputs for cell in notebook.cells if cell.cell_type == "code"]))
"""


def test_outputs_are_stripped():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) < 8, "it is short"
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.integration
def test_the_notebook_runs(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "IPYTHONDIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", RUN, NOTEBOOK]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    outputs = json.loads(result.stdout)
    assert any("image/png" in each.get("data", {}) for each in outputs[2]), "the views are drawn"
    text = "".join(each["text"] for each in outputs[-1] if each.get("name") == "stdout")
    alone, distilled = map(float, re.findall(r"(?:supervised|kd): ([\d.]+)%", text))
    assert distilled > alone > 80
