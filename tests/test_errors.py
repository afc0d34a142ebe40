"""Messages of errors and warnings."""

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
def test_errors_are_caught_as_the_value_errors_of_python(kind):
    with pytest.raises(ValueError, match=r"^what is wrong$"):
        raise kind("what is wrong")


def test_a_warning_points_at_the_users_line():
    def method():
        warn("doubt it")

    def call():
        method()

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call()
    assert [(one.category, str(one.message), one.filename) for one in told] == [(MapWarning, "doubt it", __file__)]
    line = test_a_warning_points_at_the_users_line.__code__.co_firstlineno
    with open(__file__) as file:
        lines = file.read().splitlines()
    assert line < told[0].lineno
    assert lines[told[0].lineno - 1] == "        call()"
