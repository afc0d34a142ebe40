"""Deletion and insertion equal a slow loop over images, steps and pixels, written from the paper."""

import json
import pickle

import cv2
import numpy as np
import pytest
import torch
from sklearn.metrics import auc

from tests.capture import models
from tests.capture.models import assert_same_state, state_of
from tests.evaluation.scored import Patch, bright_pictures, region
from tests.refusals import refuses
from visionattn.errors import DataError, UsageError
from visionattn.evaluation import Curve, deletion, insertion, road, saco
from visionattn.evaluation.faithfulness import blurred, rank

close = torch.testing.assert_close
SHAPES = [(1, 3, 6, 9), (3, 1, 7, 5), (2, 4, 8, 8)]


def small_network(channels, outputs=4, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv2d(channels, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.Tanh(), torch.nn.Flatten(1),
        torch.nn.LazyLinear(outputs),
    ).eval()  # fmt: skip


def model_images_heatmaps(batch, channels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, channels, height, width, generator=generator)
    model = small_network(channels)
    model(images)  # creates the weights of the lazy layer
    return model, images, torch.rand(batch, height, width, generator=generator)


def curve_by_loop(model, before, after, heatmap, target, steps):
    """Change the pixels of one image one at a time, hottest first, and run the model at each step."""
    height, width = before.shape[1:]
    pixels = sorted(((i, j) for i in range(height) for j in range(width)), key=lambda ij: -float(heatmap[ij]))
    image, scores, fractions = before.clone(), [], []
    changed = 0
    for step in range(steps + 1):
        while changed < height * width * step // steps:
            i, j = pixels[changed]
            image[:, i, j] = after[:, i, j]
            changed += 1
        with torch.no_grad():
            scores.append(float(model(image[None]).softmax(1)[0, target]))
        fractions.append(changed / (height * width))
    return fractions, scores


@pytest.mark.parametrize(("batch", "channels", "height", "width"), SHAPES)
@pytest.mark.parametrize("steps", [1, 4, 11])
def test_deletion_equals_a_loop_over_pixels(batch, channels, height, width, steps):
    model, images, heatmaps = model_images_heatmaps(batch, channels, height, width)
    best = model(images).argmax(1)
    found = deletion(model, images, heatmaps, steps=steps, batch_size=3)
    for b in range(batch):
        grey = images[b].mean((1, 2), keepdim=True).expand(-1, height, width)
        fractions, scores = curve_by_loop(model, images[b], grey, heatmaps[b], best[b], steps)
        close(found.fractions, torch.tensor(fractions))
        close(found.scores[b], torch.tensor(scores))
        assert float(found.auc[b]) == pytest.approx(auc(fractions, scores), abs=1e-6)


@pytest.mark.parametrize(("batch", "channels", "height", "width"), SHAPES)
def test_insertion_equals_a_loop_over_pixels(batch, channels, height, width):
    model, images, heatmaps = model_images_heatmaps(batch, channels, height, width)
    target = torch.arange(batch) % 4
    found = insertion(model, images, heatmaps, steps=5, target=target, blur=0.2)
    for b in range(batch):
        planes = [blur_by_opencv(plane, 0.2 * min(height, width)) for plane in images[b]]
        fractions, scores = curve_by_loop(model, torch.stack(planes), images[b], heatmaps[b], target[b], 5)
        close(found.scores[b], torch.tensor(scores), atol=1e-5, rtol=1e-4)
        assert float(found.auc[b]) == pytest.approx(auc(fractions, scores), abs=1e-5)


def blur_by_opencv(plane, sigma):
    reach = int(np.ceil(3 * sigma))
    size = 2 * reach + 1, 2 * reach + 1
    blurred_plane = cv2.GaussianBlur(plane.numpy(), size, sigmaX=sigma, borderType=cv2.BORDER_REPLICATE)
    return torch.from_numpy(blurred_plane)


@pytest.mark.parametrize("size", [(9, 14), (1, 3)])
def test_blur_equals_opencvs(size):
    images = torch.randn(2, 3, *size)
    for sigma in (0.1, 0.4):
        expected = [[blur_by_opencv(plane, sigma * min(size)) for plane in image] for image in images]
        close(blurred(images, sigma), torch.stack([torch.stack(planes) for planes in expected]), atol=1e-5, rtol=1e-4)


def test_removed_pixels_get_the_given_baseline():
    model, images, heatmaps = model_images_heatmaps(2, 3, 6, 6)
    colour = torch.tensor([1.0, -2, 0.5])[:, None, None]
    for baseline, last in ((colour, colour.expand(2, 3, 6, 6)), (0.0, torch.zeros(2, 3, 6, 6))):
        found = deletion(model, images, heatmaps, target=1, steps=3, baseline=baseline)
        close(found.scores[:, -1], model(last).softmax(1)[:, 1].detach())
        close(found.scores[:, 0], model(images).softmax(1)[:, 1].detach())


def test_rank_orders_pixels_from_hot_to_cold():
    heatmaps = torch.rand(3, 4, 5)
    order = rank(heatmaps, (4, 5))
    for b in range(3):
        in_order = heatmaps[b].flatten()[order[b].flatten().argsort()]
        assert in_order.tolist() == sorted(heatmaps[b].flatten().tolist(), reverse=True)
        assert order[b].flatten().sort().values.tolist() == list(range(20))


@pytest.mark.parametrize("grid", [(2, 3), (7, 7), (20, 9)])
def test_maps_of_any_grid_are_ranked_after_interpolation(grid):
    """OpenCV interpolates the map; in the order of `rank`, its values must not rise."""
    heatmap = torch.rand(1, *grid)
    fine = cv2.resize(heatmap[0].double().numpy(), (24, 14), interpolation=cv2.INTER_LINEAR)
    in_order = fine.flatten()[rank(heatmap, (14, 24)).flatten().argsort().numpy()]
    assert np.diff(in_order).max() < 1e-6


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_pixels_of_equal_heat_get_random_ranks(value):
    """Over 4,000 constant maps, the mean rank of every pixel is the middle rank, 11.5 of 24 pixels."""
    order = rank(torch.full((4000, 3, 3), value), (4, 6)).float()
    variance = (24**2 - 1) / 12  # of a uniform rank in 0 … 23
    close(order.mean(0), torch.full((4, 6), 11.5), atol=5 * (variance / 4000) ** 0.5, rtol=0)
    assert not torch.equal(order, rank(torch.full((4000, 3, 3), value), (4, 6), seed=1).float())
    assert torch.equal(order, rank(torch.full((4000, 3, 3), value), (4, 6)).float())


def test_a_constant_map_scores_like_random_maps():
    place = region()
    images = bright_pictures(place, 1).expand(400, -1, -1, -1)
    random_maps = torch.rand(400, 12, 16, generator=torch.Generator().manual_seed(0))
    constant = deletion(Patch(place), images, torch.ones(400, 6, 8), steps=6).auc
    random = deletion(Patch(place), images, random_maps, steps=6).auc
    tolerance = 4 * float((constant.var() + random.var()) / 400) ** 0.5  # four standard errors
    assert float((constant.mean() - random.mean()).abs()) < tolerance
    for by_position in (
        torch.arange(192.0),
        -torch.arange(192.0),
    ):  # ranking by position would give another area under the curve
        biased = deletion(Patch(place), images[:1], by_position.view(1, 12, 16), steps=6).auc
        assert float((biased - random.mean()).abs()) > tolerance


def test_the_true_map_has_the_best_area():
    place = region()
    model, images = Patch(place), bright_pictures(place, 8)
    true, wrong = place.float().expand(8, -1, -1), (~place).float().expand(8, -1, -1)
    maps = {"true": true, "wrong": wrong, "random": torch.rand(8, 12, 16)}
    deleted = {name: deletion(model, images, heatmaps, target=1).auc.mean() for name, heatmaps in maps.items()}
    inserted = {name: insertion(model, images, heatmaps, target=1).auc.mean() for name, heatmaps in maps.items()}
    assert deleted["true"] < deleted["random"] < deleted["wrong"]
    assert inserted["true"] > inserted["random"] > inserted["wrong"]


def test_the_curve_does_not_depend_on_batch_size():
    model, images, heatmaps = model_images_heatmaps(5, 3, 8, 6)
    together = deletion(model, images, heatmaps, batch_size=1000)
    for batch_size in (1, 7):
        close(deletion(model, images, heatmaps, batch_size=batch_size).scores, together.scores)
    first = deletion(model, images[:1], heatmaps[:1])
    close(first.scores, together.scores[:1])


def test_deletion_leaves_the_model_unchanged():
    model, images = models.vit().train(), models.pictures()
    model.head.weight.requires_grad_(False)
    heatmaps = torch.rand(2, 4, 4)
    before = state_of(model)
    found = deletion(model, images, heatmaps, steps=2)
    with torch.inference_mode():
        second = deletion(model, images, heatmaps, steps=2)
    assert_same_state(before, state_of(model))
    close(found.scores[:, 0], second.scores[:, 0])  # equal, because the model runs in evaluation mode
    assert not found.scores.requires_grad


def test_curve_of_a_target_function_has_the_functions_values():
    model, images, heatmaps = model_images_heatmaps(2, 3, 6, 6)
    found = insertion(model, images, heatmaps, target=lambda out: out[:, 2] * 10, steps=3)
    close(found.scores[:, -1], model(images)[:, 2].detach() * 10)


def test_wrong_inputs_of_deletion_are_errors():
    model, images, heatmaps = model_images_heatmaps(2, 3, 6, 6)
    refuses(UsageError, r"steps must be in \[1, 36\]", deletion, model, images, heatmaps, steps=37)
    refuses(UsageError, r"heatmaps must be \(2, h, w\), got \(1, 6, 6\)", lambda: deletion(model, images, heatmaps[:1]))
    refuses(UsageError, "out of range", deletion, model, images, heatmaps, target=4)
    with pytest.raises(UsageError, match="single output, whose softmax is always 1"):
        deletion(torch.nn.Sequential(model, torch.nn.Linear(4, 1)), images, heatmaps)
    refuses(UsageError, "blur must be > 0", insertion, model, images, heatmaps, blur=0)
    refuses(DataError, "images hold NaN", lambda: deletion(model, images * torch.nan, heatmaps))
    with torch.no_grad():
        model[0].weight[0] = torch.nan
    refuses(DataError, r"output is not finite; 0\.weight holds NaN", deletion, model, images, heatmaps)


def test_a_target_function_must_accept_any_number_of_images():
    model, images = Patch(region(box=(2, 3, 8, 9))), bright_pictures(region(box=(2, 3, 8, 9)), 6)
    labels = torch.ones(6, dtype=torch.long)
    heatmaps = torch.rand(6, 4, 4)
    with pytest.raises(UsageError, match="any number of images in any order; pass a tensor with one index"):
        deletion(model, images, heatmaps, target=lambda out: torch.zeros(6), steps=5, batch_size=5)
    by_index = deletion(model, images, heatmaps, target=labels, steps=5, batch_size=5)
    by_function = deletion(model, images, heatmaps, target=lambda out: out.softmax(1)[:, 1], steps=5, batch_size=5)
    torch.testing.assert_close(by_function.scores, by_index.scores)


def test_repr_to_dict_and_pickle_of_a_curve():
    scores = torch.rand(300, 5, generator=torch.Generator().manual_seed(0))
    curve = Curve(torch.linspace(0, 1, 5), scores[:2])  # the pickle must not hold the other 298 rows
    areas = [float(area) for area in curve.auc]
    assert repr(curve) == (
        f"Curve(mean area {sum(areas) / 2:.3f} over 2 images, 4 steps: {areas[0]:.3f}, {areas[1]:.3f})"
    )
    shown = curve._repr_html_()
    assert shown.count("<polyline") == 1
    assert repr(curve) in shown
    as_dict = json.loads(json.dumps(curve.to_dict()))
    assert as_dict["auc"] == curve.auc.tolist()
    assert as_dict["scores"] == curve.scores.tolist()
    data = pickle.dumps(curve)
    assert len(data) < scores.nbytes
    assert torch.equal(pickle.loads(data).auc, curve.auc)


@pytest.mark.parametrize("metric", [deletion, insertion, road, saco])
def test_heatmaps_that_do_not_fit_the_images_are_errors(metric):
    model, images, heatmaps = model_images_heatmaps(2, 3, 6, 6)
    refuses(UsageError, r"heatmaps must be \(2, h, w\), got \(1, 6, 6\)", lambda: metric(model, images, heatmaps[:1]))
    refuses(UsageError, r"got \(2, 1, 6, 6\)", lambda: metric(model, images, heatmaps[:, None]))
    refuses(UsageError, "batch_size must be ≥ 1, got 0", lambda: metric(model, images, heatmaps, batch_size=0))
