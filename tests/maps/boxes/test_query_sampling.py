"""The map of a query shows the points that it sampled, one by one."""

import math

import pytest
import torch
from torch import nn

from tests.models import transformers_detectors
from tests.models.detectors.small import batch, query
from tests.versions import needs
from visionattn.maps import QuerySampling
from visionattn.models import TransformersDetector

pytestmark = pytest.mark.filterwarnings("ignore:.*heatmaps of:visionattn.errors.MapWarning")


def test_sampling_shows_the_points_that_the_query_of_the_box_sampled():
    torch.manual_seed(0)
    detector = query().eval()
    for layer in detector.decoder.layers:
        nn.init.normal_(layer.look.offsets.weight)
        nn.init.normal_(layer.look.weigh.weight)
    images, *_ = batch(2)
    samples = [[], []]
    for number, layer in enumerate(detector.decoder.layers):
        layer.look.sampling.register_forward_hook(lambda _, args, out, n=number: samples[n].append(out))
    maps = QuerySampling()(detector, images, min_score=0.0, max_boxes=4)
    with torch.no_grad():
        found = detector(images)
    for n in range(2):
        for rank in range(4):
            expected = torch.zeros(8, 8)
            for layer in samples:
                places, weights = (x[n, found[n]["index"][rank]].flatten(0, 2) for x in layer[0])
                for (x, y), weight in zip((places * 8 - 0.5).tolist(), weights.tolist(), strict=True):
                    for row in (math.floor(y), math.floor(y) + 1):
                        for column in (math.floor(x), math.floor(x) + 1):
                            if 0 <= row < 8 and 0 <= column < 8:
                                expected[row, column] += (1 - abs(x - column)) * (1 - abs(y - row)) * weight
            torch.testing.assert_close(maps[n].raw[rank], expected, atol=1e-5, rtol=1e-4)
    assert [explained.heatmaps.shape[0] for explained in QuerySampling()(detector, images, min_score=1.1)] == [0, 0]
    of_layer = [QuerySampling(layer)(detector, images, min_score=0.0, max_boxes=4)[0].raw for layer in (0, -1)]
    torch.testing.assert_close(of_layer[0] + of_layer[1], maps[0].raw)
    assert not torch.allclose(of_layer[0], of_layer[1])


@needs("transformers", "5.24", "a module that receives the sampled positions")
@pytest.mark.parametrize("kind", ["deformable_detr", "rt_detr"])
def test_sampling_of_transformers_shows_the_points_of_the_decoder(kind):
    model, images = transformers_detectors.make(kind), transformers_detectors.pictures()
    detector = TransformersDetector(model, 5)
    calls = []
    for layer in model.model.decoder.layers:
        layer.encoder_attn.attn.register_forward_pre_hook(lambda _, args: calls.append(args))
    maps = QuerySampling()(detector, images, min_score=0.0, max_boxes=2)
    with torch.no_grad():
        found = detector(images)
    sizes, calls = calls[0][2], calls[:2]
    height, width = max(map(tuple, sizes))
    for n in range(2):
        for rank in range(2):
            expected = torch.zeros(height, width)
            for call in calls:
                places, weights = (x[n, found[n]["index"][rank]].detach().flatten(0, 2) for x in call[4:6])
                for (x, y), weight in zip(places.tolist(), weights.tolist(), strict=True):
                    for row in range(height):
                        for column in range(width):
                            near = (1 - abs(x * width - 0.5 - column)) * (1 - abs(y * height - 0.5 - row))
                            if abs(x * width - 0.5 - column) < 1 and abs(y * height - 0.5 - row) < 1:
                                expected[row, column] += near * weight
            torch.testing.assert_close(maps[n].raw[rank], expected, atol=1e-4, rtol=1e-3)
            assert expected.sum() > 0
