"""Scores of box heatmaps equal slow loops, and a map of what the detector uses beats every control."""

import itertools

import pytest
import torch
from torch import nn

from tests.models import transformers_detectors
from tests.models.detectors.small import batch, dense
from tests.refusals import refuses
from visionattn.errors import DataError, UsageError
from visionattn.evaluation import score_boxes
from visionattn.maps import DRISE, ODAM, BoxMethod, detect
from visionattn.models import TransformersDetector

pytestmark = pytest.mark.filterwarnings("ignore:.*heatmaps of:visionattn.errors.MapWarning")


class Patch(nn.Module):
    """A detector whose box has a score proportional to the brightness of one corner of the box."""

    def forward(self, images):
        box = torch.tensor([[4.0, 4, 20, 20]])
        return [
            {"boxes": box, "scores": image[:, 4:8, 4:8].mean()[None].clamp(0, 1), "labels": torch.tensor([1])}
            for image in images
        ]


class Fixed(BoxMethod):
    """A method that gives every box one known map."""

    name = "fixed"

    def __init__(self, map_hw):
        self.map_hw = map_hw

    def explain(self, model, images_BCHW, max_boxes, min_score):
        detections = detect(model, images_BCHW)
        return detections, [self.map_hw.expand(len(found["boxes"]), -1, -1) for found in detections], "known values"


CORNER = torch.zeros(24, 24)
CORNER[4:8, 4:8] = 1


def pictures(count):
    images = torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 0.2
    images[:, :, 4:8, 4:8] += 0.7
    return images


def test_a_map_of_the_pixels_that_the_box_needs_beats_every_control():
    boxes = [torch.tensor([[4.0, 4, 20, 20]])] * 12
    batches = [{"image": pictures(12), "boxes": boxes, "labels": [torch.tensor([1])] * 12}]
    scores = score_boxes(Patch(), batches, {"corner": Fixed(CORNER), "elsewhere": Fixed(CORNER.flip(0, 1))}, steps=9)
    assert scores.controls["corner"] == ("box", "box centre", "random 24×24")
    for metric in ("deletion", "insertion"):
        assert scores.beats("corner", metric)
        assert not scores.beats("elsewhere", metric)
    assert scores.estimate("box", "energy").value == scores.estimate("corner", "energy").value == 1
    assert scores.estimate("elsewhere", "pointing").value == 1  # the opposite corner lies inside the box
    assert scores.estimate("box centre", "pointing").value == 1


def test_deletion_and_insertion_follow_the_score_of_the_same_box():
    (image,) = pictures(1)
    scores = score_boxes(Patch(), [{"image": image[None]}], {"corner": Fixed(CORNER)}, steps=3)
    assert scores.metrics == ["deletion", "insertion"]  # without annotations there is no truth to point at
    mean = image.mean((1, 2))
    order = torch.cat([torch.nonzero(CORNER.flatten() > 0), torch.nonzero(CORNER.flatten() == 0)])[:, 0]
    curve = []
    for count in (0, 192, 384, 576):  # all 16 pixels of the corner are among the first 192
        changed = image.clone().flatten(1)
        changed[:, order[:count]] = mean[:, None]
        curve.append(float(changed.view(3, 24, 24)[:, 4:8, 4:8].mean()))
    expected = sum((a + b) / 2 for a, b in itertools.pairwise(curve)) / 3
    assert scores.estimate("corner", "deletion").value == pytest.approx(expected, abs=1e-5)


def test_only_boxes_that_find_an_annotated_object_are_scored():
    images = pictures(3)
    boxes = [torch.tensor([[4.0, 4, 20, 22]]), torch.tensor([[0.0, 0, 4, 4]]), torch.zeros(0, 4)]
    labels = [torch.tensor([1]), torch.tensor([1]), torch.zeros(0, dtype=torch.long)]
    paths, done = ["a", "b", "c"], []
    batches = [{"image": images, "boxes": boxes, "labels": labels, "path": paths}]
    scores = score_boxes(Patch(), batches, {"corner": Fixed(CORNER)}, steps=2, advance=done.append)
    assert (scores.images, scores.paths, sum(done)) == (1, ("a",), 3)
    batches[0]["labels"] = [torch.tensor([0]), torch.tensor([0]), labels[2]]
    refuses(DataError, "there is no box to score", score_boxes, Patch(), batches, {"corner": Fixed(CORNER)}, steps=2)


def test_own_detectors_and_those_of_transformers_are_scored():
    torch.manual_seed(0)
    for detector, images in (
        (dense().eval(), batch(2)[0]),
        (TransformersDetector(transformers_detectors.make("rt_detr"), 5), transformers_detectors.pictures()),
    ):
        methods = {"odam": ODAM(), "drise": DRISE(4)}
        scores = score_boxes(detector, [{"image": images}], methods, steps=2, max_boxes=2, min_score=0.0)
        assert scores.images == 2
        assert 0 <= scores.estimate("odam", "deletion").value <= 1
        assert "box centre" in str(scores)


def test_wrong_arguments_are_errors():
    batches = [{"image": pictures(1)}]
    refuses(UsageError, "steps must be ≥ 2", score_boxes, Patch(), batches, steps=1)
    refuses(UsageError, "names of controls", score_boxes, Patch(), batches, {"box": Fixed(CORNER)})
    refuses(UsageError, "is not a detector", score_boxes, nn.Flatten(), batches, {"a": Fixed(CORNER)})
