"""Test windowed attention against attention in one window at a time."""

import pytest
import torch
import torch.nn.functional as F

from visionattn.attention import Windowed


@pytest.mark.parametrize(("window", "shift"), [(2, 0), (3, 1), (4, 3), (9, 0)])
def test_each_window_attends_to_itself_only(window, shift):
    torch.manual_seed(0)
    rows, columns = 5, 7
    q, k, v = torch.randn(3, 2, 2, rows * columns, 4)
    out = Windowed(2, window=window, shift=shift)(q, k, v, grid=(rows, columns))
    windows = {}
    for row in range(rows):
        for column in range(columns):
            place = (row - shift) // window, (column - shift) // window
            windows.setdefault(place, []).append(row * columns + column)
    for tokens in windows.values():
        alone = F.scaled_dot_product_attention(q[:, :, tokens], k[:, :, tokens], v[:, :, tokens])
        torch.testing.assert_close(out[:, :, tokens], alone)


@pytest.mark.parametrize(("window", "shift"), [(0, 0), (3, 3), (3, -1)])
def test_invalid_windows_raise(window, shift):
    with pytest.raises(ValueError, match=r"window must be ≥ 1 and shift in \[0, window\)"):
        Windowed(2, window=window, shift=shift)
