"""The pointing game against a loop over pixels."""

import pytest
import torch

from visionattn.maps.localisation import energy, hit_share, inside, overlap, pointing, to_pixels

close = torch.testing.assert_close


def share_by_loop(heatmap, box):
    """Of a heatmap at the resolution of the input: how many of the highest pixels have their centre in the box."""
    highest = max(float(value) for value in heatmap.flatten())
    hits = total = 0
    for i in range(heatmap.shape[0]):
        for j in range(heatmap.shape[1]):
            if float(heatmap[i, j]) == highest:
                total += 1
                hits += int(box[0] <= j + 0.5 <= box[2] and box[1] <= i + 0.5 <= box[3])
    return hits / total


@pytest.mark.parametrize("size", [(6, 6), (5, 9)])
def test_the_share_is_counted_pixel_by_pixel(size):
    generator = torch.Generator().manual_seed(0)
    heatmaps = torch.randint(0, 4, (40, *size), generator=generator).float()  # many equal peaks
    corners = torch.rand(40, 2, 2, generator=generator).sort(1).values * torch.tensor([size[1], size[0]])
    boxes = corners.flatten(1)
    expected = [share_by_loop(heatmap, box.tolist()) for heatmap, box in zip(heatmaps, boxes, strict=True)]
    assert len({round(value, 3) for value in expected}) > 5
    close(hit_share(heatmaps, inside(boxes, size)), torch.tensor(expected))


@pytest.mark.parametrize(("cell", "box", "hit"), [((0, 3), [24, 0, 32, 8], 1), ((0, 3), [0, 24, 8, 32], 0)])
def test_a_coarse_peak_hits_the_pixels_that_its_cell_covers(cell, box, hit):
    heatmap = torch.zeros(1, 4, 4)
    heatmap[(0, *cell)] = 1
    assert hit_share(heatmap, inside(torch.tensor([box]), (32, 32))).tolist() == [hit]


def test_a_constant_map_scores_as_a_uniform_guess():
    boxes = torch.tensor([[0.0, 0, 4, 8], [2, 2, 4, 4]])
    found = pointing(torch.zeros(2, 8, 8), boxes, (8, 8))
    close(found["pointing"], torch.tensor([0.5, 4 / 64]))
    close(found["chance"], found["pointing"])


def test_the_centre_and_chance_are_those_of_the_box():
    boxes = torch.tensor([[0.0, 0, 5, 10], [11, 0, 20, 10], [4, 4, 4, 9], [9, 4, 12, 6]])
    found = pointing(torch.rand(4, 3, 3), boxes, (10, 20))
    assert found["centre"].tolist() == [0, 0, 0, 1]
    close(found["chance"], torch.tensor([50 / 200, 90 / 200, 0, 6 / 200]))


def test_boxes_of_whole_numbers_are_taken():
    found = pointing(torch.rand(1, 3, 3), torch.tensor([[0, 0, 6, 6]]), (6, 6))
    assert [float(value) for value in found.values()] == [1, 1, 1]
