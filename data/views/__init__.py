"""View recipes: view v of sample i as a pure function of the recipe's seed, i and v.

Drawing and rendering are separate steps. `draw` returns parameters in normalized coordinates on a grid of
2**-16, equal on every platform; `render` turns them into uint8 pixels of any size. A teacher at 224 and a
student at 160 see the same crop. docs/views.md has the details.
"""

from coursepack.data.views.drawing import draw as draw
from coursepack.data.views.geometry import PadCrop as PadCrop
from coursepack.data.views.params import GRID as GRID
from coursepack.data.views.params import ViewParams as ViewParams
from coursepack.data.views.recipe import PRESETS as PRESETS
from coursepack.data.views.recipe import ViewRecipe as ViewRecipe
from coursepack.data.views.recipe import stored_view as stored_view
from coursepack.data.views.recipe import view_fingerprint as view_fingerprint
from coursepack.data.views.recipe import view_recipe as view_recipe
from coursepack.data.views.rendering import render as render
from coursepack.data.views.rendering import render_normalized as render_normalized
from coursepack.data.views.rendering import render_on_device as render_on_device

__all__ = [
    "GRID",
    "PRESETS",
    "PadCrop",
    "ViewParams",
    "ViewRecipe",
    "draw",
    "render",
    "render_normalized",
    "render_on_device",
    "stored_view",
    "view_fingerprint",
    "view_recipe",
]
