"""Skip a test that needs a later release of a package than the oldest that pyproject.toml allows."""

from importlib import metadata

import pytest
from packaging.version import Version


def needs(package, version, what):
    """Return a mark that skips a test with releases of the package before `version`, the first that was tried."""
    found = metadata.version(package)
    reason = f"{package} {found}, which is installed, lacks {what}; pip install '{package}>={version}' runs this test"
    return pytest.mark.skipif(Version(found) < Version(version), reason=reason)


needs_onnx_exporter = needs("torch", "2.14", "an ONNX exporter that works with current releases of onnx-ir")
