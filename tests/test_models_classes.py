"""Classes of a teacher found by name: orders, supersets, spellings, WordNet ids, and the file to edit."""

from __future__ import annotations

import pytest
import yaml

from coursepack.errors import RecipeError, TeacherMismatch
from coursepack.models.class_names import columns_by_name, match_names, nearest_names
from coursepack.models.classes import load_columns

TEACHER = ("tench, Tinca tinca", "golden retriever", "Crane", "crane", "Traffic_Light", "cassette player")


@pytest.mark.parametrize(
    ("names", "trained_on", "columns"),
    [
        (("cat", "dog"), ("dog", "bird", "cat"), [2, 0]),
        (("Cat", "traffic light"), ("traffic-light", "cat"), [1, 0]),
        (("crane", "golden_retriever"), TEACHER, [3, 1]),
        (("CRANE",), TEACHER, [None]),
        (("tench", "Tinca tinca"), TEACHER, [0, None]),
        (("n01440764", "n02979186"), TEACHER, [0, 5]),
        (("tench", "cassette player"), ("n02979186", "n01440764"), [1, 0]),
        (("n99999999",), TEACHER, [None]),
        (("fish", "dog"), ("car", "bus"), [None, None]),
    ],
)
def test_names_are_matched(names, trained_on, columns):
    assert match_names(names, trained_on) == columns


def test_exact_names_give_the_order(capsys):
    assert columns_by_name("hf:x", ("a", "b"), ("a", "b")) is None
    assert capsys.readouterr().err == ""
    assert columns_by_name("hf:x", ("a", "b", "c"), ("c", "a", "b")) == (2, 0, 1)
    assert "hf:x: its classes are in another order" in capsys.readouterr().err
    assert columns_by_name("hf:x", ("LABEL_0", "LABEL_1"), ("cat", "dog")) is None
    assert (
        "its classes have no names (LABEL_0, ...), so they are taken to be the source's 2 in the same order "
        in (capsys.readouterr().err)
    )


@pytest.mark.parametrize("trained_on", [("Cat", "dog", "bird"), ("cat", "hound"), ("cat", "cat")])
def test_other_names_need_a_map(trained_on):
    text = r"classes of teacher 'hf:x' .* are not the source's 2 \(cat, dog, \.\.\.\); .* give --classes FILE"
    with pytest.raises(TeacherMismatch, match=text):
        columns_by_name("hf:x", trained_on, ("cat", "dog"))


def test_a_map_that_does_not_exist_is_written(tmp_path, capsys):
    file = tmp_path / "map.yaml"
    names = ("n01440764", "traffic light", "no")
    assert load_columns(file, names, lambda: (*TEACHER, "no")) == (0, 4, 6)
    assert "written with the teacher's classes for 3 of the source's 3 classes" in capsys.readouterr().err
    assert yaml.safe_load(file.read_text()) == {"n01440764": 0, "traffic light": 4, "no": 6}
    assert "n01440764: 0  # tench, Tinca tinca\n" in file.read_text()
    assert load_columns(file, names) == (0, 4, 6)


def test_a_map_with_gaps_is_written_to_be_edited(tmp_path):
    file, names = tmp_path / "map.yaml", ("tench", "golden retrievers", "zebra")
    text = r"it was written with 1 of the source's 3 .*null for the others \(golden retrievers, zebra\)"
    with pytest.raises(RecipeError, match=text):
        load_columns(file, names, lambda: TEACHER)
    written = file.read_text()
    assert "golden retrievers: null  # nearest: 1 golden retriever\n" in written
    assert "zebra: null  # nearest: none\n" in written
    assert f"# Classes of the teacher: 0 {TEACHER[0]}, 1 {TEACHER[1]}, " in written
    with pytest.raises(RecipeError, match="gives None for 'golden retrievers', expected a class id"):
        load_columns(file, names, lambda: TEACHER)
    file.write_text(written.replace("null", "golden retriever", 1).replace("null", "3"))
    assert load_columns(file, names, lambda: TEACHER) == (0, 1, 3)


def test_names_in_a_map_that_the_teacher_does_not_have(tmp_path):
    file = tmp_path / "map.yaml"
    file.write_text("[golden retreiver, 2]")
    text = r"'golden retreiver', which 0 of the teacher's 6 classes have\. Nearest names: 'golden retriever'"
    with pytest.raises(RecipeError, match=text):
        load_columns(file, ("a", "b"), lambda: TEACHER)
    with pytest.raises(RecipeError, match="the names of the teacher's classes are not known: give its index"):
        load_columns(file, ("a", "b"))
    with pytest.raises(RecipeError, match="cannot read"):
        load_columns(tmp_path / "none.yaml", ("a", "b"), lambda: None)
    assert nearest_names("goldn_Retriever", TEACHER) == ["golden retriever"]
