"""SaCo equals a slow loop from the algorithm of its paper."""

import pytest
import torch

from tests.evaluation.scored import Patch, bright_pictures, region
from tests.refusals import refuses
from visionattn.errors import UsageError
from visionattn.evaluation import saco
from visionattn.evaluation.faithfulness import rank
from visionattn.evaluation.localisation import to_pixels
from visionattn.evaluation.salience_groups import agreement

PLACE = region()


def by_the_algorithm(model, image_CHW, heatmap_hw, groups, target):
    """Follow algorithm 1 of the paper for one image, a pair of groups at a time."""
    size = image_CHW.shape[1:]
    heat, order = to_pixels(heatmap_hw[None], size)[0], rank(heatmap_hw[None], size)[0]
    pixels = order.numel()
    score = model(image_CHW[None]).softmax(1)[0, target]
    salience, influence = [], []
    for group in range(groups):
        inside = (order >= group * pixels / groups) & (order < (group + 1) * pixels / groups)
        changed = torch.where(inside, image_CHW.mean((1, 2), keepdim=True), image_CHW)
        salience.append(heat[inside].sum())
        influence.append(score - model(changed[None]).softmax(1)[0, target])
    coefficient, total = 0.0, 0.0
    for i in range(groups - 1):
        for j in range(i + 1, groups):
            weight = salience[i] - salience[j]
            if influence[i] < influence[j]:
                weight = -weight
            coefficient += float(weight)
            total += abs(float(weight))
    return coefficient / total


@pytest.mark.parametrize("groups", [2, 6, 12])
def test_saco_equals_the_algorithm_of_the_paper(groups):
    model, images = Patch(PLACE), bright_pictures(PLACE, count=5)
    heatmaps = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = [by_the_algorithm(model, *pair, groups, 1) for pair in zip(images, heatmaps, strict=True)]
    found = saco(model, images, heatmaps, target=1, groups=groups, batch_size=7)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(saco(model, images, 3 * heatmaps + 2, groups=groups), found)  # class 1 is predicted


def test_the_true_map_has_the_highest_coefficient_and_a_flat_map_none():
    model, images = Patch(PLACE), bright_pictures(PLACE)
    true, inverse, flat = PLACE.float(), (~PLACE).float(), torch.zeros(12, 16)
    scores = [float(saco(model, images, heat.expand(24, -1, -1)).mean()) for heat in (true, flat, inverse)]
    assert scores[0] > 0.9
    assert scores[1] == 0
    assert scores[2] < -0.9


def test_agreement_is_1_if_hotter_groups_have_more_influence_and_minus_1_if_less():
    salience = torch.tensor([[5.0, 2, 1]]).double()
    assert agreement(salience, torch.tensor([[0.9, 0.5, 0.1]])) == 1
    assert agreement(salience, torch.tensor([[0.1, 0.5, 0.9]])) == -1
    # the pair of the last two groups counts against: (3 + 4 − 1) / (3 + 4 + 1)
    assert agreement(salience, torch.tensor([[0.9, 0.1, 0.5]])) == pytest.approx(6 / 8)


def test_a_wrong_number_of_groups_is_an_error():
    model, images = Patch(PLACE), bright_pictures(PLACE, count=2)
    for groups in (1, 193):
        refuses(
            UsageError,
            rf"groups must be in \[2, 192\], got {groups}",
            lambda groups=groups: saco(model, images, images[:, 0], groups=groups),
        )
