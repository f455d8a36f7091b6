"""Configuration of the docs site, which `make docs` builds (docs/decisions/docs-site.md)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import coursepack

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "coursepack"
release = coursepack.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "coursepack"
html_show_copyright = False
html_copy_source = False
smartquotes = False

# Anchors as on GitHub, so that the same links hold in both.
myst_heading_anchors = 3

napoleon_numpy_docstring = False
autodoc_default_options = {"members": True, "exclude-members": "model_config"}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True


def plain_docstring(*event: Any) -> None:
    """Change a docstring in place from the project's conventions to those of Sphinx.

    Code has single backticks, as in Markdown, and a colon in the docstring of an attribute does not follow
    its type.
    """
    _, kind, _, _, _, lines = event
    lines[:] = [re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line) for line in lines]
    if kind in ("attribute", "property"):
        lines[:0] = ["..", ""]  # an empty comment, which hides the colon from napoleon


def setup(app: Sphinx) -> None:
    """Connect the change of docstrings ahead of napoleon's."""
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)
