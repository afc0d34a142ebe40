"""Test windowed attention against dense attention inside each window."""

import pytest
import torch
import torch.nn.functional as F

from visionattn.attention import Windowed


@pytest.mark.parametrize(("window", "shift"), [(2, 0), (3, 1), (4, 3), (9, 0)])
def test_patches_attend_only_to_patches_of_their_window(window, shift):
    torch.manual_seed(0)
    rows, columns = 5, 7
    q, k, v = torch.randn(3, 2, 2, rows * columns, 4)
    out = Windowed(2, window=window, shift=shift)(q, k, v, grid=(rows, columns))
    windows = {}
    for row in range(rows):
        for column in range(columns):
            window_of_patch = (row - shift) // window, (column - shift) // window
            windows.setdefault(window_of_patch, []).append(row * columns + column)
    for tokens in windows.values():
        expected = F.scaled_dot_product_attention(q[:, :, tokens], k[:, :, tokens], v[:, :, tokens])
        torch.testing.assert_close(out[:, :, tokens], expected)


@pytest.mark.parametrize(("window", "shift"), [(0, 0), (3, 3), (3, -1)])
def test_invalid_windows_raise(window, shift):
    with pytest.raises(ValueError, match=r"window must be ≥ 1 and shift in \[0, window\)"):
        Windowed(2, window=window, shift=shift)
