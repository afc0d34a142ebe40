"""A picture a box: its own heat, its own box."""

import numpy as np

from visionattn.data import Preprocess
from visionattn.overlay.draw import blend
from visionattn.overlay.per_box import overlays_of_boxes


def test_each_picture_has_its_own_heat_and_box():
    source = np.full((60, 80, 3), 90, np.uint8)
    _, placement = Preprocess(40, fit="letterbox")(source)
    boxes = placement.boxes_to_input(np.array([[10.0, 10, 30, 30], [50, 20, 70, 50]]))
    heat = np.zeros((2, 8, 8), np.float32)
    heat[0, 2, 2] = heat[1, 4, 5] = 1
    pictures = overlays_of_boxes(source, placement, boxes, heat, labels=["a", "b"])
    for number, (x1, y1, x2, y2) in enumerate([(10, 10, 30, 30), (50, 20, 70, 50)]):
        plain = blend(source, placement.carry(heat[number]), seen_HW=placement.seen())
        changed = (pictures[number] != plain).any(2)
        assert changed[y2 - 1, x1:x2].all()  # the box's lower edge
        assert changed[y1:y2, x1].all()
        outside = changed.copy()
        outside[max(0, y1 - 16) : y2, max(0, x1 - 2) : x2 + 2] = False  # the box with its label above
        assert not outside.any()
        assert not changed[y1 + 14 : y2 - 3, x1 + 4 : x2 - 4].any()
