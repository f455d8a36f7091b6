"""Runs for tests of the report, and a reader of pages."""

from __future__ import annotations

import json
from html.parser import HTMLParser

from builders import make_recipe
from safetensors.torch import save_file

from coursepack.config import write_yaml
from coursepack.models import build_network
from coursepack.models.build import NETWORK_FILE, WEIGHTS_FILE

TEXTS = ("p", "title", "li", "pre", "summary", "figcaption", "h3", "dt", "dd")
VOID = {"meta", "input", "br", "link", "img", "hr"}


def metrics_line(epoch, accuracy, **more):
    """A line of metrics of a student without teachers."""
    return {
        "epoch": epoch,
        "view": epoch,
        "seconds": 0.5,
        "train": {"loss": 2.0 - 0.1 * epoch, "accuracy": accuracy, "nll": 1.5, "calibration_error": 0.1},
        "evaluation": {"accuracy": accuracy, "nll": 1.25, "calibration_error": 0.05},
        **more,
    }


def taught(epoch, teachers=2):
    """The metrics of teachers and temperature of an epoch."""
    weight = [(index + 1) / (teachers * (teachers + 1) / 2) for index in range(teachers)]
    return {
        "teachers": {
            "weight": weight,
            "weight_by_class": [[each + 0.001 * label for label in range(10)] for each in weight],
            "wrong": [0.125] * teachers,
            "shifted": [0.0] * teachers,
            "agreement": 0.5 + 0.1 * epoch,
            "kl": 0.75,
        },
        "temperature": {"mean": 3.0, "min": 2.0, "max": 4.0, "clamped": 0.0},
    }


def write_run(folder, lines, *, finished=True, stores=(), **fields):
    """A run folder with these metrics, as mappings or as text, and fresh weights; stores need not exist."""
    method = "kd" if stores else "supervised"
    recipe = make_recipe(epochs=len(lines), method=method, **fields).model_copy(
        update={"stores": tuple(stores)}
    )
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(write_yaml(recipe.model_dump(mode="json")))
    texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    (folder / "metrics.jsonl").write_text("".join(texts))
    provenance = {
        "stores": [
            {"path": f"/stores/{store}", "fingerprint": "ab" * 32, "views": [0, 1]} for store in recipe.stores
        ],
        "source_fingerprint": "cd" * 32,
        "view_fingerprint": "ef" * 32,
        "versions": {"coursepack": "0.1.0", "torch": "2.15.0"},
        "device": "cpu",
        "ranks": 1,
        "drift": [],
    }
    (folder / "provenance.json").write_text(json.dumps(provenance))
    network = build_network(recipe.student, 10)
    (folder / NETWORK_FILE).write_text(write_yaml(network.describe()))
    if finished:
        save_file(network.module.state_dict(), folder / WEIGHTS_FILE)
    return folder


class Page(HTMLParser):
    """A parsed page: its sections, tables, texts, identifiers, and elements that load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.sections: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: list[str] = []
        self.identifiers: list[str] = []
        self._rows: list[list[str]] = []
        self._text = ""
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        if "id" in values:
            self.identifiers.append(values["id"])
        if tag == "section":
            self.sections.append(values["id"])
        if tag == "table":
            self._rows, self._caption = [], ""
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th", "caption", *TEXTS):
            self._text = ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data):
        self._text += data

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag
        text = " ".join(self._text.split())
        if tag in ("td", "th"):
            self._rows[-1].append(text)
        elif tag == "caption":
            self._caption = text
        elif tag == "table":
            self.tables.setdefault(self._caption, self._rows)
        if tag in TEXTS:
            self.texts.append(text)
