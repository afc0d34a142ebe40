"""Detected boxes in pixels of the source."""

import numpy as np
import torch

from visionattn.data import Preprocess
from visionattn.maps import BoxHeatmaps
from visionattn.overlays.per_box import detected_boxes, page_detections

SOURCE = [[10.0, 10, 30, 30], [50, 20, 70, 50], [20, -30, 40, -5]]
"""Boxes in pixels of a picture of 60 × 80; the last one lies in the padding above it."""


def setting():
    _, placement = Preprocess(40, fit="letterbox")(np.zeros((60, 80, 3), np.uint8))
    boxes = torch.from_numpy(placement.boxes_to_input(np.array(SOURCE)))
    scores, labels = torch.tensor([0.9, 0.2, 0.8]), torch.tensor([1, 7, 0])
    return placement, {"boxes": boxes, "scores": scores, "labels": labels}, torch.rand(3, 5, 5)


def test_confident_boxes_in_the_picture_are_returned_in_its_pixels():
    placement, one, _ = setting()
    boxes, labels, maps = detected_boxes(("cat", "dog"), [one], 0, placement)
    np.testing.assert_allclose(boxes, SOURCE[:1], atol=0.06)
    assert labels == ["dog 0.90"]
    assert maps is None


def test_boxes_that_a_method_chose_keep_their_maps_however_low_their_score():
    placement, one, maps = setting()
    boxes, labels, found = detected_boxes(("cat", "dog"), [{**one, "maps": maps}], 0, placement)
    np.testing.assert_allclose(boxes, SOURCE[:2], atol=0.06)
    assert labels == ["dog 0.90", "class 7 0.20"]
    assert found is not None
    np.testing.assert_array_equal(found, maps[:2].numpy())


def test_the_page_gets_the_same_boxes_with_their_maps():
    placement, one, maps = setting()
    told = page_detections(
        BoxHeatmaps(**one, heatmaps=maps, raw=maps, source="score by features", method="odam"), placement
    )
    np.testing.assert_allclose(told["boxes"], SOURCE[:2], atol=1e-4)
    np.testing.assert_array_equal(told["maps"], maps[:2].numpy())
    assert (told["labels"], told["shows"]) == ([1, 7], "score by features")


def test_other_outputs_than_detections_give_no_boxes():
    placement, *_ = setting()
    assert detected_boxes((), [torch.rand(3)], 0, placement) == ([], [], None)
