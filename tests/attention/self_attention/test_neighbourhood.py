"""Test when neighbourhood attention is computed in blocks instead of one call."""

from visionattn.attention.self_attention import neighbourhood


def test_blocks_are_chosen_only_where_they_save_products():
    assert neighbourhood.blocks((8, 8), 5) is None
    for grid, max_fraction in (((64, 64), 0.25), ((128, 128), 0.06)):
        rows, columns = neighbourhood.blocks(grid, 17)
        products = [sum(run.count * run.block * run.extent for run in runs) for runs in (rows, columns)]
        assert products[0] * products[1] < max_fraction * (grid[0] * grid[1]) ** 2
