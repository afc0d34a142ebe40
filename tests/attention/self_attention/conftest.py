"""A fixture that makes attention in blocks cheap, so that small grids are computed in blocks."""

import pytest

from visionattn.attention.self_attention import block_attention


@pytest.fixture
def blocks(monkeypatch):
    """Count only products as costs: with all costs, the grids of the tests would be too small for blocks."""
    for cost in ("_KEY", "_COPY", "_CALL"):
        monkeypatch.setattr(block_attention, cost, 0)
    monkeypatch.setattr(block_attention, "_plans", {})
