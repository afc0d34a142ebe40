"""Short blocks, so that small grids have several of them."""

import pytest

from visionattn.attention.self_attention import block_attention as local


@pytest.fixture
def blocks(monkeypatch):
    """Blocks wherever they save products, though the grids here are too small for them to save time."""
    for cost in ("_KEY", "_COPY", "_CALL"):
        monkeypatch.setattr(local, cost, 0)
    monkeypatch.setattr(local, "_plans", {})
