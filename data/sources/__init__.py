"""Sources of samples, opened by name."""

from coursepack.data.sources.base import FirstSamples as FirstSamples
from coursepack.data.sources.base import InMemory as InMemory
from coursepack.data.sources.base import Source as Source
from coursepack.data.sources.names import SOURCES as SOURCES
from coursepack.data.sources.names import SourceKind as SourceKind
from coursepack.data.sources.names import evaluation_spec as evaluation_spec
from coursepack.data.sources.names import open_source as open_source
from coursepack.data.sources.names import open_stored as open_stored
from coursepack.data.sources.splits import subset as subset

__all__ = [
    "SOURCES",
    "FirstSamples",
    "InMemory",
    "Source",
    "SourceKind",
    "evaluation_spec",
    "open_source",
    "open_stored",
    "subset",
]
