"""Report of runs: reads them, evaluates the students once, and renders the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.distill.report.agreement import agreement_of_groups
from coursepack.distill.report.history import (
    accuracy_section,
    agreement_section,
    losses_section,
    teachers_section,
    temperature_section,
)
from coursepack.distill.report.origin import cost_section, provenance_section, recipes_section
from coursepack.distill.report.outcome import (
    calibration_section,
    classes_section,
    confusion_section,
    results_section,
)
from coursepack.distill.report.predictions import predict_groups
from coursepack.distill.report.reading import read_groups
from coursepack.pages.blocks import Section, Text
from coursepack.pages.problems import Problems
from coursepack.pages.render import render_page

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

TITLE = "Report of runs"


def build_report(
    paths: Sequence[Path], device: torch.device, *, evaluate: bool = True, trust_code: bool = False
) -> tuple[str, list[str]]:
    """Return the page as HTML, and the problems that it shows.

    Args:
        paths: run folders, and those of groups of students.
        device: device on which students are evaluated.
        evaluate: evaluate the students of finished runs, for what needs their predictions.
        trust_code: run code that a run folder names.

    Raises:
        RunError: no run can be read, two runs have the same recipe and seed, or runs were evaluated on
            different data.
    """
    problems = Problems()
    groups = read_groups(paths, problems)
    found, agreement = {}, {}
    if evaluate:
        found = predict_groups(groups, device, problems, trust_code=trust_code)
        agreement = agreement_of_groups(groups, device, problems, trust_code=trust_code)
    sections = (
        results_section(groups),
        accuracy_section(groups),
        classes_section(groups, found),
        confusion_section(groups, found),
        calibration_section(groups, found),
        teachers_section(groups),
        agreement_section(groups, agreement),
        temperature_section(groups),
        losses_section(groups),
        cost_section(groups),
        recipes_section(groups),
        provenance_section(groups),
    )
    runs = sum(len(group.runs) for group in groups)
    summary = f"{_counted(runs, 'run')} of {_counted(len(groups), 'recipe')}."
    if not evaluate:
        summary += " Students were not evaluated: what needs their predictions is left out."
    shown = Section("problems", "Problems", tuple(Text(text, is_problem=True) for text in problems.texts))
    labels = {group.index: group.label for group in groups}
    page = render_page(TITLE, summary, (shown, *sections), labels, "distill report")
    return page, problems.texts


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
