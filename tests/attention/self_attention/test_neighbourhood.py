"""Test the blocks of neighbourhood attention, and that a stride as large as the neighbourhood gives windows."""

import torch

from tests.attention.self_attention.forms import qkv
from visionattn.attention import Neighbourhood, Windowed
from visionattn.attention.self_attention import neighbourhood


def test_blocks_are_chosen_only_where_they_save_products():
    assert neighbourhood.blocks((8, 8), 5) is None
    for grid, max_fraction in (((64, 64), 0.25), ((128, 128), 0.06)):
        rows, columns = neighbourhood.blocks(grid, 17)
        products = [sum(run.count * run.block * run.extent for run in runs) for runs in (rows, columns)]
        assert products[0] * products[1] < max_fraction * (grid[0] * grid[1]) ** 2


def test_a_stride_saves_products():
    products = {}
    for stride in (1, 8, 16):
        rows, columns = neighbourhood.blocks((64, 64), 16, stride)
        sums = [sum(run.count * run.block * run.extent for run in runs) for runs in (rows, columns)]
        products[stride] = sums[0] * sums[1] / 64**4
    assert products[1] > products[8] > products[16] == 1 / 16  # windows of 16 × 16: a sixteenth of all products


def test_a_stride_of_the_size_is_attention_in_windows():
    for size in (3, 4):
        grid = (3 * size, 2 * size)
        inputs = qkv(grid, 1)
        strided, windows = Neighbourhood(2, size=size, stride=size), Windowed(2, window=size)
        outputs = [form(*inputs, grid=grid, num_prefix_tokens=1) for form in (strided, windows)]
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
