"""Boxes and labels are drawn on the expected pixels."""

import numpy as np
import pytest

from visionattn import drawing


def test_a_box_lies_on_the_pixels_inside_its_edges():
    image = np.full((40, 50, 3), 7, np.uint8)
    out = drawing.draw_box(image, (10, 5, 30, 25), colour=(255, 0, 9), thickness=2)
    kind = np.zeros((40, 50), int)  # 0: picture, 1: line, 2: rim
    kind[5:25, 10:30] = 1  # the line is two pixels wide
    kind[7:23, 12:28] = 2  # the rim is one pixel wide
    kind[8:22, 13:27] = 0
    np.testing.assert_array_equal(out, np.array([(7, 7, 7), (255, 0, 9), (0, 0, 0)])[kind])


@pytest.mark.parametrize("box", [(-9, -9, 500, 500), (48, 38, 90, 90), (20, 20, 21, 21), (5, 5, 5, 5), (9, 9, 3, 3)])
def test_a_box_beyond_the_picture_or_without_area_changes_only_pixels_inside_the_box(box):
    image = np.zeros((40, 50, 3), np.uint8)
    changed = drawing.draw_box(image, box, colour=(9, 9, 9)).any(2)
    inside = np.zeros((40, 50), bool)
    inside[max(0, box[1]) : max(0, box[3]), max(0, box[0]) : max(0, box[2])] = True
    assert not changed[~inside].any()


def test_a_label_is_above_its_box_or_inside_if_there_is_no_room_above():
    image = np.zeros((200, 300, 3), np.uint8)
    colour = (0, 255, 0)
    label_above = drawing.draw_boxes(image, [(40, 60, 200, 150)], labels=["cat"], colours=[colour])
    assert tuple(label_above[59, 41]) == colour
    assert tuple(label_above[62, 150]) != colour
    label_inside = drawing.draw_boxes(image, [(40, 2, 200, 150)], labels=["cat"], colours=[colour])
    assert tuple(label_inside[6, 41]) == colour
    unlabelled = drawing.draw_boxes(image, [(40, 60, 200, 150)], colours=[colour])
    np.testing.assert_array_equal(unlabelled, drawing.draw_box(image, (40, 60, 200, 150), colour=colour))
    np.testing.assert_array_equal(drawing.draw_boxes(image, []), image)
