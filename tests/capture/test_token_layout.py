"""The tokens of shifted and dilated windows lie at the right cells of the grid."""

import pytest
import timm
import torch
import torchvision

from tests.capture import models
from visionattn.capture import ClassRow, FullAttention, NoWeights, capture

close = torch.testing.assert_close


@pytest.mark.parametrize("fused", [True, False])
def test_tokens_of_shifted_windows_have_the_right_cells(fused):
    model, images = models.swin(), models.pictures(32)
    unfused_weights = []
    for stage in model.layers:
        for block in stage.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(
                lambda module, args, out: unfused_weights.append(args[0].detach())
            )
    with torch.no_grad():
        model(images)
    for stage in model.layers:
        for block in stage.blocks:
            block.attn.fused_attn = fused
    expected = list(unfused_weights)
    with torch.no_grad(), capture(model, FullAttention()) as records, capture(model, ClassRow()) as means:
        model(images)
    assert len(records) == 4
    for index, (size, shift) in enumerate([(8, 0), (8, 2), (4, 0), (4, 0)]):
        record, windows = records[index], models.cells_of_windows(size, 4, shift)
        assert record.grid == (size, size)
        assert record.windowed == (size > 4)
        heads = record.heads
        weights = expected[index].reshape(2, len(windows), heads, 16, 16)
        grid = torch.zeros(2, size * size, size * size)  # attention of each cell to each cell of the image
        found = torch.zeros_like(grid)
        received = torch.zeros(2, size, size)  # mean attention to each cell, over the queries of its window
        for b in range(2):
            for w, cells in enumerate(windows):
                for i, query in enumerate(cells):
                    for j, key in enumerate(cells):
                        value = float(sum(weights[b, w, h, i, j] for h in range(heads))) / heads
                        grid[b, query, key] = value
                        received[b, key // size, key % size] += value / 16
            for w in range(len(windows)):
                queries, keys = record.queries.index_WN[w].tolist(), record.keys.index_WN[w].tolist()
                for i, query in enumerate(queries):
                    for j, key in enumerate(keys):
                        found[b, query, key] = float(record.weights[b, w, :, i, j].mean())
        close(found, grid, atol=1e-5, rtol=0)
        close(record.keys.to_grid(means[index].weights.mean(2)), received, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: timm.create_model("maxvit_tiny_tf_224", depths=(1,), embed_dim=(32,), stem_width=16), 224),
        (lambda: torchvision.models.SwinTransformer([4, 4], 16, [2], [2], [3, 3], stochastic_depth_prob=0.0), 52),
    ],
    ids=["maxvit", "torchvision swin, padded"],
)
def test_windows_and_grids_of_other_models_cover_every_cell_once(make, size):
    model = models.randomised(make())
    with torch.no_grad(), capture(model, FullAttention()) as records:
        model(models.pictures(size))
    assert records.attention
    for record in records.attention:
        cells = record.keys.index_WN[record.keys.index_WN >= 0]
        assert sorted(cells.tolist()) == list(range(record.grid[0] * record.grid[1]))
        close(record.weights.sum(-1), torch.ones(record.weights.shape[:-1]))


def test_maxvit_attends_first_inside_windows_then_across_a_dilated_grid():
    model = models.randomised(timm.create_model("maxvit_tiny_tf_224", depths=(1,), embed_dim=(32,), stem_width=16))
    with torch.no_grad(), capture(model, NoWeights()) as records:
        model(models.pictures(224))
    block, grid = records.attention
    assert block.grid == grid.grid == (56, 56)
    for w, (row, column) in enumerate((i, j) for i in range(8) for j in range(8)):
        near = [(row * 7 + i) * 56 + column * 7 + j for i in range(7) for j in range(7)]
        far = [(row + i * 8) * 56 + column + j * 8 for i in range(7) for j in range(7)]
        assert block.keys.index_WN[w].tolist() == near
        assert grid.keys.index_WN[w].tolist() == far
