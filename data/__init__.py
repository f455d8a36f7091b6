"""Code shared by both stages: sources, views, batches, encodings, and the store format in `data.store`."""

from coursepack.data.batches import Batch as Batch
from coursepack.data.batches import batches as batches
from coursepack.data.batches import epoch_order as epoch_order
from coursepack.data.encodings import ENCODINGS as ENCODINGS
from coursepack.data.loading import Renderer as Renderer
from coursepack.data.sources import SOURCES as SOURCES
from coursepack.data.sources import Source as Source
from coursepack.data.sources import open_source as open_source
from coursepack.data.sources import subset as subset
from coursepack.data.views import PRESETS as PRESETS
from coursepack.data.views import ViewRecipe as ViewRecipe
from coursepack.data.views import view_fingerprint as view_fingerprint
from coursepack.data.views import view_recipe as view_recipe

__all__ = [
    "ENCODINGS",
    "PRESETS",
    "SOURCES",
    "Batch",
    "Renderer",
    "Source",
    "ViewRecipe",
    "batches",
    "epoch_order",
    "open_source",
    "subset",
    "view_fingerprint",
    "view_recipe",
]
