"""A fixture that makes attention in blocks cheap, so that small grids are computed in blocks."""

import pytest

from visionattn.attention.self_attention import block_attention


@pytest.fixture
def blocks(monkeypatch):
    """Set all costs but those of products to 0. With the real costs, small grids would not be split into blocks."""
    for cost in ("_KEY", "_COPY", "_CALL"):
        monkeypatch.setattr(block_attention, cost, 0)
    monkeypatch.setattr(block_attention, "_plans", {})
