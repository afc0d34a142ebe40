"""A fixture that makes blocks short, so that small grids have several blocks."""

import pytest

from visionattn.attention.self_attention import block_attention as local


@pytest.fixture
def blocks(monkeypatch):
    """Choose blocks wherever they save products; the grids of the tests are too small to save time."""
    for cost in ("_KEY", "_COPY", "_CALL"):
        monkeypatch.setattr(local, cost, 0)
    monkeypatch.setattr(local, "_plans", {})
