"""What a detector found, carried to the source: for overlays and for the page."""

import numpy as np
import torch

from visionattn.data import Preprocess
from visionattn.maps import BoxMaps
from visionattn.overlays.per_box import found_of, has_maps, told_of_boxes

SOURCE = [[10.0, 10, 30, 30], [50, 20, 70, 50], [20, -30, 40, -5]]
"""Boxes in pixels of a picture of 60 × 80; the last one lies in the padding above it."""


def setting():
    _, placement = Preprocess(40, fit="letterbox")(np.zeros((60, 80, 3), np.uint8))
    boxes = torch.from_numpy(placement.boxes_to_input(np.array(SOURCE)))
    scores, labels = torch.tensor([0.9, 0.2, 0.8]), torch.tensor([1, 7, 0])
    return placement, {"boxes": boxes, "scores": scores, "labels": labels}, torch.rand(3, 5, 5)


def test_boxes_that_are_sure_and_in_the_picture_are_shown_in_its_pixels():
    placement, one, _ = setting()
    boxes, labels, maps = found_of(("cat", "dog"), [one], 0, placement)
    np.testing.assert_allclose(boxes, SOURCE[:1], atol=0.06)
    assert labels == ["dog 0.90"]
    assert maps is None
    assert not has_maps([one])


def test_boxes_that_a_method_chose_keep_their_maps_however_low_their_score():
    placement, one, maps = setting()
    boxes, labels, found = found_of(("cat", "dog"), [{**one, "maps": maps}], 0, placement)
    np.testing.assert_allclose(boxes, SOURCE[:2], atol=0.06)
    assert labels == ["dog 0.90", "class 7 0.20"]
    np.testing.assert_array_equal(found, maps[:2].numpy())
    assert has_maps([{**one, "maps": maps}])


def test_the_page_gets_the_same_boxes_with_what_their_maps_show():
    placement, one, maps = setting()
    told = told_of_boxes(BoxMaps(**one, heatmaps=maps, raw=maps, source="score by features", method="odam"), placement)
    np.testing.assert_allclose(told["boxes"], SOURCE[:2], atol=1e-4)
    np.testing.assert_array_equal(told["maps"], maps[:2].numpy())
    assert (told["labels"], told["shows"]) == ([1, 7], "score by features")


def test_what_is_no_detection_shows_no_boxes():
    placement, *_ = setting()
    assert found_of((), [torch.rand(3)], 0, placement) == ([], [], None)
