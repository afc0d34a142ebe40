"""Errors, suggestions of similar names, and the position of warnings."""

import warnings

import pytest

from visionattn.errors import DataError, MapWarning, UsageError, nearest, warn


def test_nearest_lists_the_most_similar_names_first():
    names = ["rollout", "raw", "gradcam", "gradcam++"]
    assert nearest("rolout", names) == " Nearest: rollout."
    assert nearest("gradcam+", names, 2) == " Nearest: gradcam++, gradcam."
    assert nearest("xyz", names) == ""
    assert nearest("rolout", []) == ""


@pytest.mark.parametrize("kind", [UsageError, DataError])
def test_errors_are_value_errors(kind):
    with pytest.raises(ValueError, match=r"^the message$"):
        raise kind("the message")


def test_a_warning_points_at_the_users_line():
    """`explain` stands for a method that warns, and `call` for the library function that the user calls."""

    def explain():
        warn("the map is constant")

    def call():
        explain()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    (warning,) = caught
    expected = (MapWarning, "the map is constant", __file__)
    assert (warning.category, str(warning.message), warning.filename) == expected
    first_line = test_a_warning_points_at_the_users_line.__code__.co_firstlineno
    with open(__file__) as file:
        lines = file.read().splitlines()
    assert first_line < warning.lineno
    assert lines[warning.lineno - 1] == "        call()"
