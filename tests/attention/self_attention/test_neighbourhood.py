"""Neighbourhoods are attended in blocks of keys, where that saves anything."""

from visionattn.attention.self_attention import neighbourhood


def test_blocks_are_chosen_where_they_save_and_one_call_where_they_do_not():
    assert neighbourhood.blocks((8, 8), 5) is None
    for grid, most in (((64, 64), 0.25), ((128, 128), 0.06)):
        rows, columns = neighbourhood.blocks(grid, 17)
        products = [sum(run.count * run.block * run.extent for run in runs) for runs in (rows, columns)]
        assert products[0] * products[1] < most * (grid[0] * grid[1]) ** 2
