"""Test the sheet of a detector's samples: boxes are drawn at the right positions of an enlarged picture."""

from types import SimpleNamespace

import numpy as np
import torch

from visionattn.data import Placement
from visionattn.drawing.boxes import draw_boxes
from visionattn.drawing.sheets import Tile
from visionattn.maps import BoxHeatmaps
from visionattn.training.callbacks import sample_sheet as pictures


def test_boxes_are_drawn_in_source_pixels_and_boxes_in_the_padding_are_left_out(monkeypatch):
    picture = np.full((48, 96, 3), 90, np.uint8)
    placement = Placement(np.array([[1, 0, 0], [0, 1, 24]]), (48, 96), (96, 96))  # 24 rows of padding above
    found = BoxHeatmaps(
        boxes=torch.tensor([[10.0, 30, 30, 50], [5, 2, 60, 18]]),  # the second box lies in the padding
        scores=torch.tensor([0.9, 0.8]),
        labels=torch.tensor([1, 0]),
        heatmaps=torch.stack([torch.eye(8), torch.ones(8, 8)]),
        raw=torch.zeros(2, 8, 8),
        source="",
        method="",
    )
    batch = {"placement": [placement], "path": ["a"], "boxes": [torch.tensor([[12.0, 30, 32, 52]])]}
    sheet_arguments = []
    monkeypatch.setattr(pictures, "sheet", lambda tiles, *, width, **_: sheet_arguments.extend([*tiles, width]))
    dataset = SimpleNamespace(read_source=lambda path: picture)
    pictures.picture_of(batch, [found], SimpleNamespace(class_names=("cat", "dog")), dataset, "")
    tile, heat, width = sheet_arguments
    assert width == 288  # three times the picture's width, and also the tile's, so the sheet does not resample the tile
    assert isinstance(tile, Tile)
    assert tile.caption == ["1 detected", "1 annotated"]
    large = picture.repeat(3, 0).repeat(3, 1)
    expected = draw_boxes(large, np.array([[36.0, 18, 96, 84]]), colours=[(255, 255, 255)])
    expected = draw_boxes(expected, np.array([[30.0, 18, 90, 78]]), labels=["dog 0.90"])
    np.testing.assert_array_equal(tile.picture, expected)
    assert heat.picture.shape == (48, 96, 3)
    assert (heat.picture[:10, 80:] == 90).all()  # the heatmap of the box in the padding is left out too
