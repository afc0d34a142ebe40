"""Detected boxes are returned in pixels of the source, with labels and heatmaps."""

import numpy as np
import torch

from visionattn.data import Preprocess
from visionattn.maps import BoxHeatmaps
from visionattn.overlays.per_box import detected_boxes, page_detections

SOURCE_BOXES = [[10.0, 10, 30, 30], [50, 20, 70, 50], [20, -30, 40, -5]]
"""Boxes in pixels of a picture of 60 × 80; the last one lies in the padding above it."""


def detection():
    """A placement, a detector's output of three boxes for one image, and a heatmap for each box."""
    _, placement = Preprocess(40, fit="letterbox")(np.zeros((60, 80, 3), np.uint8))
    boxes = torch.from_numpy(placement.boxes_to_input(np.array(SOURCE_BOXES)))
    scores, labels = torch.tensor([0.9, 0.2, 0.8]), torch.tensor([1, 7, 0])
    return placement, {"boxes": boxes, "scores": scores, "labels": labels}, torch.rand(3, 5, 5)


def test_confident_boxes_in_the_picture_are_returned_in_its_pixels():
    placement, found, _ = detection()
    boxes, labels, maps = detected_boxes(("cat", "dog"), [found], 0, placement)
    np.testing.assert_allclose(boxes, SOURCE_BOXES[:1], atol=0.06)
    assert labels == ["dog 0.90"]
    assert maps is None


def test_boxes_that_a_method_explains_are_returned_at_any_score_with_their_heatmaps():
    placement, found, maps = detection()
    boxes, labels, box_maps = detected_boxes(("cat", "dog"), [{**found, "maps": maps}], 0, placement)
    np.testing.assert_allclose(boxes, SOURCE_BOXES[:2], atol=0.06)
    assert labels == ["dog 0.90", "class 7 0.20"]
    assert box_maps is not None
    np.testing.assert_array_equal(box_maps, maps[:2].numpy())


def test_page_detections_has_all_boxes_in_the_picture_with_their_heatmaps():
    placement, found, maps = detection()
    page = page_detections(
        BoxHeatmaps(**found, heatmaps=maps, raw=maps, source="score by features", method="odam"), placement
    )
    np.testing.assert_allclose(page["boxes"], SOURCE_BOXES[:2], atol=1e-4)
    np.testing.assert_array_equal(page["maps"], maps[:2].numpy())
    assert (page["labels"], page["shows"]) == ([1, 7], "score by features")


def test_outputs_that_are_not_detections_give_no_boxes():
    placement, *_ = detection()
    assert detected_boxes((), [torch.rand(3)], 0, placement) == ([], [], None)
