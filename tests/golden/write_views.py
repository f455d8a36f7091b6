"""Writes the golden view parameters, once: `PYTHONPATH=tests python tests/golden/write_views.py`."""

import json
from pathlib import Path

import numpy as np
from view_cases import RECIPES, SIZED, arrays_of

from coursepack.data.views import draw

FILE = Path(__file__).parent / "view-params.json"
SAMPLES = (0, 1, 299, 123456789012)
VIEWS = (0, 7, 2**32 - 1)
MANY = 2000
"""Samples from 0 on whose digest is kept too."""


def entry(recipe):
    views = {}
    for view in VIEWS:
        params = draw(recipe, SIZED, np.array(SAMPLES), view)
        views[str(view)] = {name: values.tolist() for name, values in arrays_of(params).items()}
    digest = draw(recipe, SIZED, np.arange(MANY), 3).digest()
    return {"recipe": recipe.model_dump(mode="json"), "digest": digest, "views": views}


def main() -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(entry(recipe))}" for name, recipe in RECIPES.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
