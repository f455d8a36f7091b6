"""Page about stores: opens them and their source, and renders all sections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coursepack.data.drift import drift
from coursepack.pages.blocks import Section, Text
from coursepack.pages.problems import Problems
from coursepack.pages.render import render_page
from coursepack.precompute.inspect import describe_store
from coursepack.precompute.page.files import checks_section, gaps_section, identity_section
from coursepack.precompute.page.galleries import disagreement_section, open_images, samples_section
from coursepack.precompute.page.opened import common_views, open_stores
from coursepack.precompute.page.statistics import (
    agreement_section,
    fidelity_section,
    stores_section,
    views_section,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from coursepack.precompute.page.galleries import Images
    from coursepack.precompute.page.opened import OpenedStore

TITLE = "Stores"


def build_page(
    stores: Sequence[str | Path],
    root: Path | None,
    *,
    views: int,
    verify: bool = True,
    trust_code: bool = False,
) -> tuple[str, list[str]]:
    """Return the page as HTML, and the problems that it shows.

    Args:
        stores: folders or addresses of stores of one source and one view recipe.
        root: folder of the source's files. Defaults to the recorded one.
        views: maximum number of views of each sample that is shown.
        verify: check every file against its checksum.
        trust_code: import and run Python code that the stores name for source or views.

    Raises:
        StoreNotFound, StoreMismatch, StoreDamaged: a manifest cannot be read, or the stores were written from
            different pixels.
    """
    problems = Problems()
    opened = open_stores(stores, problems)
    common = common_views(opened)
    if not common and any(store.reader is not None for store in opened):
        problems.add("The stores have no committed view in common: finish them with `precompute run`.")
    images = None
    with problems.instead_of("pictures"):
        images = open_images(opened, root, trust_code=trust_code)
    if images is not None and verify:
        _compare_views(opened, images, problems)
    described = _described(opened, problems)
    builders: dict[str, Callable[[], Section]] = {
        "table of stores": lambda: stores_section(opened, described),
        "samples": lambda: samples_section(opened, common[:views], images),
        "disagreement": lambda: disagreement_section(opened, common, images),
        "agreement": lambda: agreement_section(opened, common),
        "accuracy by view": lambda: views_section(opened, described),
        "fidelity": lambda: fidelity_section(opened),
        "arrays and gaps": lambda: gaps_section(opened),
        "checksums": lambda: checks_section(opened, problems),
        "identity": lambda: identity_section(opened),
    }
    if not verify:
        del builders["checksums"]
    sections = []
    for part, build in builders.items():
        with problems.instead_of(part):
            sections.append(build())
    first = opened[0].manifest
    summary = (
        f"{len(opened)} {'store' if len(opened) == 1 else 'stores'} of {first.samples:,} samples of "
        f"{first.identity['source']['name']}, {len(first.class_names)} classes."
    )
    if not verify:
        summary += " Files were not checked."
    shown = Section("problems", "Problems", tuple(Text(each, is_problem=True) for each in problems.texts))
    labels = {store.index: store.label for store in opened}
    page = render_page(TITLE, summary, (shown, *sections), labels, "precompute inspect --html")
    return page, problems.texts


def _compare_views(opened: Sequence[OpenedStore], images: Images, problems: Problems) -> None:
    """Add a problem for everything in the views that this version draws or renders in another way."""
    for store in opened:
        with problems.instead_of(f"comparison of the views of {store.label}"):
            views = [int(view) for view in store.manifest.view_records]
            for line in drift(store.manifest, images.source, images.recipe, views):
                problems.add(f"{store.address}: {line}")


def _described(opened: Sequence[OpenedStore], problems: Problems) -> dict[int, dict[str, Any]]:
    """Return the statistics of the stores that can be read, by index."""
    described = {}
    for store in opened:
        if store.reader is not None:
            with problems.instead_of(f"statistics of {store.label}"):
                described[store.index] = describe_store(store.reader)
    return described
