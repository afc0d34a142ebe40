"""Pointing game, energy and overlap equal slow loops over pixels."""

import pytest
import torch

from visionattn.evaluation.localisation import energy, hit_share, inside, overlap, pointing, to_pixels

close = torch.testing.assert_close


def hit_share_by_loop(heatmap, box):
    """Return the fraction of the highest pixels whose centre is in the box; the heatmap has one cell per pixel."""
    highest = max(float(value) for value in heatmap.flatten())
    hits = total = 0
    for i in range(heatmap.shape[0]):
        for j in range(heatmap.shape[1]):
            if float(heatmap[i, j]) == highest:
                total += 1
                hits += int(box[0] <= j + 0.5 <= box[2] and box[1] <= i + 0.5 <= box[3])
    return hits / total


@pytest.mark.parametrize("size", [(6, 6), (5, 9)])
def test_hit_share_equals_a_loop_over_pixels(size):
    generator = torch.Generator().manual_seed(0)
    heatmaps = torch.randint(0, 4, (40, *size), generator=generator).float()  # many equal peaks
    corners = torch.rand(40, 2, 2, generator=generator).sort(1).values * torch.tensor([size[1], size[0]])
    boxes = corners.flatten(1)
    expected = [hit_share_by_loop(heatmap, box.tolist()) for heatmap, box in zip(heatmaps, boxes, strict=True)]
    assert len({round(value, 3) for value in expected}) > 5  # the test covers many different fractions
    close(hit_share(heatmaps, inside(boxes, size)), torch.tensor(expected))


@pytest.mark.parametrize(("cell", "box", "hit"), [((0, 3), [24, 0, 32, 8], 1), ((0, 3), [0, 24, 8, 32], 0)])
def test_peak_of_a_coarse_map_lies_where_its_cell_is(cell, box, hit):
    heatmap = torch.zeros(1, 4, 4)
    heatmap[(0, *cell)] = 1
    assert hit_share(heatmap, inside(torch.tensor([box]), (32, 32))).tolist() == [hit]


def test_a_constant_map_scores_like_a_uniform_guess():
    boxes = torch.tensor([[0.0, 0, 4, 8], [2, 2, 4, 4]])
    found = pointing(torch.zeros(2, 8, 8), boxes, (8, 8))
    close(found["pointing"], torch.tensor([0.5, 4 / 64]))
    close(found["chance"], found["pointing"])


def test_centre_and_chance_follow_from_the_box():
    boxes = torch.tensor([[0.0, 0, 5, 10], [11, 0, 20, 10], [4, 4, 4, 9], [9, 4, 12, 6]])
    found = pointing(torch.rand(4, 3, 3), boxes, (10, 20))
    assert found["centre"].tolist() == [0, 0, 0, 1]
    close(found["chance"], torch.tensor([50 / 200, 90 / 200, 0, 6 / 200]))


def test_boxes_may_be_integers():
    found = pointing(torch.rand(1, 3, 3), torch.tensor([[0, 0, 6, 6]]), (6, 6))
    assert [float(value) for value in found.values()] == [1, 1, 1]


def maps_and_objects(size, count=20):
    generator = torch.Generator().manual_seed(1)
    heatmaps = torch.rand(count, *size, generator=generator) ** 3
    heatmaps[0] = 0
    return heatmaps, torch.rand(count, *size, generator=generator) < 0.3


@pytest.mark.parametrize("size", [(6, 6), (5, 9)])
def test_energy_equals_a_loop_over_pixels(size):
    heatmaps, objects = maps_and_objects(size)
    expected = []
    for heatmap, mask in zip(heatmaps.tolist(), objects.tolist(), strict=True):
        pixels = [(heat, on) for row in zip(heatmap, mask, strict=True) for heat, on in zip(*row, strict=True)]
        total = sum(heat for heat, _ in pixels)
        inside_sum, covered = sum(heat for heat, on in pixels if on), sum(on for _, on in pixels) / len(pixels)
        expected.append(inside_sum / total if total else covered)
    close(energy(heatmaps, objects), torch.tensor(expected))


@pytest.mark.parametrize("size", [(6, 6), (5, 9)])
def test_overlap_equals_a_loop_over_pixels(size):
    heatmaps, objects = maps_and_objects(size)
    heatmaps[1], heatmaps[2] = 1, heatmaps[2].mul(8).round() / 8  # include values that equal a threshold
    found = overlap(heatmaps, objects, thresholds=8)
    for b, (heatmap, mask) in enumerate(zip(heatmaps, objects, strict=True)):
        for t in range(8):
            hot = {(i, j) for i in range(size[0]) for j in range(size[1]) if float(heatmap[i, j]) >= t / 8}
            on = {(i, j) for i in range(size[0]) for j in range(size[1]) if bool(mask[i, j])}
            assert float(found[b, t]) == pytest.approx(len(hot & on) / len(hot | on))


def test_a_map_equal_to_the_object_has_energy_and_overlap_1():
    objects = inside(torch.tensor([[1.0, 2, 5, 4], [0, 0, 8, 6]]), (6, 8))
    assert objects.sum((1, 2)).tolist() == [8, 48]
    assert energy(objects.float(), objects).tolist() == [1, 1]
    assert overlap(objects.float(), objects)[:, 1:].min() == 1
    assert overlap(torch.zeros(2, 3, 3), objects)[:, 0].tolist() == pytest.approx([8 / 48, 1])


def test_an_object_without_pixels_scores_0():
    empty = torch.zeros(1, 4, 4, dtype=torch.bool)
    heatmap = torch.rand(1, 2, 2)
    assert energy(heatmap, empty).item() == hit_share(heatmap, empty).item() == overlap(heatmap, empty).max() == 0


def test_a_constant_map_stays_constant_when_interpolated():
    heatmap = torch.full((1, 7, 7), 0.7)
    objects = inside(torch.tensor([[0.0, 0, 32, 64]]), (64, 64))
    assert hit_share(heatmap, objects).item() == 0.5
    assert torch.equal(to_pixels(heatmap, (64, 64)), torch.full((1, 64, 64), 0.7))


def test_constant_maps_of_any_value_stay_constant_when_interpolated():
    values = torch.rand(200, generator=torch.Generator().manual_seed(0))
    fine = to_pixels(values[:, None, None].expand(-1, 7, 7), (64, 48))
    assert torch.equal(fine, values[:, None, None].expand(-1, 64, 48))
