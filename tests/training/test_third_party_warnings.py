"""Warnings of libraries are silenced and all others are shown."""

import logging
import warnings

import pytest

from visionattn.training.third_party_warnings import silence_third_party_warnings

LOGGERS = ("lightning.pytorch", "lightning.fabric", "matplotlib.font_manager")


@pytest.fixture
def as_before():
    """Restore the warning filters and the log levels after a test."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("as_before")
def test_warnings_of_libraries_are_silenced_and_those_of_visionattn_shown():
    silence_third_party_warnings()
    with warnings.catch_warnings(record=True) as told:
        for module in ("timm.layers", "torch", "lightning.pytorch.trainer", "visionattn.maps.method", "__main__"):
            warnings.warn_explicit("careful", UserWarning, f"{module}.py", 1, module=module)
    assert [one.filename for one in told] == ["visionattn.maps.method.py", "__main__.py"]


@pytest.mark.usefixtures("as_before")
def test_lightnings_lines_about_the_machine_are_dropped_and_its_warnings_are_not():
    silence_third_party_warnings()
    for name in LOGGERS[:2]:
        assert not logging.getLogger(name).isEnabledFor(logging.INFO)
        assert logging.getLogger(name).isEnabledFor(logging.WARNING)
