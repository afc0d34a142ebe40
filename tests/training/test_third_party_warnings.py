"""Libraries are kept quiet, and nobody else is."""

import logging
import warnings

import pytest

from visionattn.training.third_party_warnings import quieten

LOGGERS = ("lightning.pytorch", "lightning.fabric", "matplotlib.font_manager")


@pytest.fixture
def as_before():
    """Afterwards filters and levels are what they were."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("as_before")
def test_warnings_of_libraries_are_dropped_and_ours_are_shown():
    quieten()
    with warnings.catch_warnings(record=True) as told:
        for module in ("timm.layers", "torch", "lightning.pytorch.trainer", "visionattn.maps.method", "__main__"):
            warnings.warn_explicit("careful", UserWarning, f"{module}.py", 1, module=module)
    assert [one.filename for one in told] == ["visionattn.maps.method.py", "__main__.py"]


@pytest.mark.usefixtures("as_before")
def test_lightnings_lines_about_the_machine_are_dropped_and_its_warnings_are_not():
    quieten()
    for name in LOGGERS[:2]:
        assert not logging.getLogger(name).isEnabledFor(logging.INFO)
        assert logging.getLogger(name).isEnabledFor(logging.WARNING)
