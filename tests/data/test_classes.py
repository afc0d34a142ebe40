"""Test that classes are found by number or name, and matched by name."""

import pytest

from tests.refusals import refuses
from visionattn.data import match_classes
from visionattn.data.classes import class_index, class_names_in, warn_of_similar
from visionattn.errors import DataError


@pytest.mark.parametrize("trained", [("cat", "dog", "eel"), ()])
def test_equal_or_unknown_names_need_no_change(trained):
    assert match_classes(trained, ["cat", "dog", "eel"]) is None


def test_names_in_another_order_are_matched():
    assert match_classes(("cat", "dog", "eel"), ["eel", "cat", "dog"]) == [2, 0, 1]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (["cat", "zebra"], "the data has no 'dog' and the model has no 'zebra'"),
        (["cat"], "the data has no 'dog'; use data"),
        (["cat", "dog", "eel"], "the model has no 'eel'"),
        (["Cat", "dog"], "the data has no 'cat' and the model has no 'Cat'"),
        (["cat", "cat", "dog"], "a name occurs twice"),
        ([f"c{n}" for n in range(9)], r"has no 'c0', 'c1', 'c2', 'c3', 'c4', … \(9 names\)"),
    ],
)
def test_other_names_are_refused_and_listed(found, message):
    refuses(DataError, message, match_classes, ("cat", "dog"), found)


@pytest.mark.parametrize("other", ["Cat", "cat ", "CAT"])
def test_names_that_are_nearly_equal_are_reported(other):
    with pytest.warns(UserWarning, match=f"the folder has the classes 'cat' and '{other}'"):
        warn_of_similar(("cat", "dog", other), "the folder")


def test_accents_that_are_stored_differently_are_reported():
    with pytest.warns(UserWarning, match="nearly equal"):
        warn_of_similar(("caf\u00e9", "cafe\u0301"), "the folder")
    warn_of_similar(("cat", "cats", "bobcat"), "the folder")


def index(text, names):
    return class_index(text, names, remedy="rename the class")


def test_digits_are_the_number_and_other_text_is_the_name():
    assert [index(text, ["cat", "dog", "1x"]) for text in ("0", "02", "dog", "1x")] == [0, 2, 1, 2]
    assert index("7", []) == 7


def test_digits_that_are_also_a_name_are_refused_unless_both_readings_agree():
    digits = [str(digit) for digit in range(10)]
    assert [index(digit, digits) for digit in digits] == list(range(10))
    assert [index(text, ["10", "20"]) for text in ("10", "20", "0")] == [0, 1, 0]  # there is no class number 10 or 20
    names = ["1", "2", "3", "4", "5"]
    for text in "1234":
        with pytest.raises(
            DataError, match=rf"'{text}' is either class number {text}, which is named '{int(text) + 1}'"
        ):
            index(text, names)
    with pytest.raises(DataError, match="or the name of class number 0; rename the class"):
        index("1", names)


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("dgo", ["cat", "dog"], r"no class 'dgo'\. Nearest: dog"),
        ("wombat", ["cat", "dog"], r"no class 'wombat'\. The 2 classes are numbered from 0: cat, dog\."),
        (
            "wombat",
            [f"c{number}" for number in range(9)],
            r"The 9 classes are numbered from 0: c0, c1, c2, c3, c4, …\.",
        ),
        ("2", ["cat", "dog"], "no class '2'"),
        ("9" * 5000, ["cat", "dog"], "no class '9999"),
        ("cat", [], "the classes have no names; give a number"),
    ],
)
def test_unknown_class_is_refused_with_what_there_is(text, names, message):
    with pytest.raises(DataError, match=message):
        index(text, names)


def test_names_in_a_file_lose_spaces_and_empty_last_lines(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("cat \ndog\n\n")
    assert class_names_in(str(file)) == ["cat", "dog"]
    file.write_text("cat\n\ndog\n")
    refuses(DataError, "names.txt, line 2: there is no class name", class_names_in, str(file))
