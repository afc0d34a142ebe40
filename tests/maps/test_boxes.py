"""Heatmaps of boxes, compared with gradients by hand, with sampled points one by one, and with rows of attention."""

import json
import math
import pickle

import pytest
import timm
import torch
from torch import nn

from tests.models.detectors.small import batch, dense, pyramid, query
from tests.refusals import refuses
from visionattn.attention import CBAM
from visionattn.errors import UsageError
from visionattn.maps import Gate, GradCAM, RawAttention
from visionattn.maps.boxes import ODAM, BoxAttention, BoxHeatmaps, QuerySampling, SameForAllBoxes, default_box_method
from visionattn.models import TorchvisionDetector

pytestmark = pytest.mark.filterwarnings("ignore:.*heatmaps of:visionattn.errors.MapWarning")


class TwoMaps(nn.Module):
    """Maps of strides 1 and 2."""

    def forward(self, images):
        return [images * 2, nn.functional.avg_pool2d(images, 2)]


class ToyDetector(nn.Module):
    """Two boxes per image; the score of the first depends on the fine map only, and of the second on the coarse map."""

    def __init__(self):
        super().__init__()
        self.first = nn.Identity()
        self.features = TwoMaps()

    def forward(self, images):
        fine, coarse = self.features(self.first(images))
        score = [
            (fine[:, 0, 1, 2] + 2 * fine[:, 1, 1, 3]).sigmoid(),
            (coarse[:, 2, 0, 1] - coarse[:, 0, 0, 1]).sigmoid(),
        ]
        boxes = torch.tensor([[2.0, 1, 4, 2], [2, 0, 4, 2]])
        return [
            {"boxes": boxes, "scores": torch.stack([score[0][n], score[1][n]]), "labels": torch.tensor([0, 1])}
            for n in range(len(images))
        ]


def test_odam_is_gradient_times_activation_spread_over_the_finest_map():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 4, 6)
    images[:, 2] += 1  # makes gradient × activation positive for the second box
    maps, maps_of_first = (
        ODAM()(ToyDetector(), images, min_score=0.0),
        ODAM("first")(ToyDetector(), images, min_score=0.0),
    )
    for n in range(2):
        fine, coarse = images[n] * 2, nn.functional.avg_pool2d(images[n], 2)
        s = (fine[0, 1, 2] + 2 * fine[1, 1, 3]).sigmoid()
        first = torch.zeros(4, 6)
        first[1, 2], first[1, 3] = s * (1 - s) * fine[0, 1, 2], s * (1 - s) * 2 * fine[1, 1, 3]
        torch.testing.assert_close(maps[n].raw[0], first)
        torch.testing.assert_close(maps_of_first[n].raw[0], first)  # half the activation, twice the gradient
        s = (coarse[2, 0, 1] - coarse[0, 0, 1]).sigmoid()
        second = torch.zeros(1, 1, 2, 3)
        second[0, 0, 0, 1] = s * (1 - s) * (coarse[2, 0, 1] - coarse[0, 0, 1])
        fine_second = nn.functional.interpolate(second, size=(4, 6), mode="bilinear", align_corners=False)[0, 0] / 4
        torch.testing.assert_close(maps[n].raw[1], fine_second)
    assert maps[0].method == "odam"
    assert maps[0].source == "score by features"


class MapsBeyondTheImage(nn.Module):
    """Two maps of an image of 6 × 10 pixels; the map of stride 4 covers 8 × 12 pixels."""

    strides = (2, 4)

    def forward(self, images):
        return [nn.functional.avg_pool2d(images, stride, ceil_mode=True) for stride in self.strides]


class CornerDetector(nn.Module):
    """One box, whose score is the last cell of the coarse map."""

    def __init__(self):
        super().__init__()
        self.features = MapsBeyondTheImage()

    def forward(self, images):
        _, coarse = self.features(images)
        box = torch.tensor([[2.0, 2, 10, 6]])
        return [{"boxes": box, "scores": x[0, 1, 2][None], "labels": torch.tensor([0])} for x in coarse]


def test_odam_aligns_levels_that_extend_beyond_the_image():
    (maps,) = ODAM()(CornerDetector(), torch.ones(1, 3, 6, 10), min_score=0.0)
    coarse = torch.zeros(2, 3)
    coarse[1, 2] = 1
    expected = torch.zeros(3, 5)  # four of these cells cover one coarse cell
    for row in range(3):
        for column in range(5):
            y, x = (2 * row + 1) / 4 - 0.5, (2 * column + 1) / 4 - 0.5  # in coarse cells, from the first cell's centre
            for r in (math.floor(y), math.floor(y) + 1):
                for c in (math.floor(x), math.floor(x) + 1):
                    weight = (1 - abs(y - r)) * (1 - abs(x - c)) / 4
                    expected[row, column] += weight * coarse[min(max(r, 0), 1), min(max(c, 0), 2)]
    torch.testing.assert_close(maps.raw[0], expected)
    assert maps.raw[0, 2, 4] == maps.raw.max()


def test_boxes_with_a_score_below_min_score_have_no_map():
    explained = ODAM()(ToyDetector(), torch.zeros(1, 3, 4, 6), min_score=0.6)[0]
    assert explained.heatmaps.shape == (0, 4, 6)
    assert len(explained.boxes) == len(explained.scores) == 0
    assert len(ODAM()(ToyDetector(), torch.zeros(1, 3, 4, 6), max_boxes=1)[0].scores) == 1


def test_the_detector_is_unchanged_afterwards():
    detector = dense().train()
    images, *_ = batch(2)
    with torch.inference_mode():
        ODAM()(detector, images, min_score=0.0, max_boxes=2)
    assert detector.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in detector.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in detector.features.modules())
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    ODAM()(detector, images, min_score=0.0, max_boxes=2)
    assert all(torch.equal(value, state[name]) for name, value in detector.state_dict().items())


@pytest.mark.parametrize("kind", ["dense", "one map", "query", "vit", "torchvision", "torchvision's own"])
def test_odam_fits_every_detector(kind):
    torch.manual_seed(0)
    images, *_ = batch(2)
    if kind == "torchvision":
        from functools import partial

        from torchvision.models.detection import FCOS

        detector = TorchvisionDetector(partial(FCOS, score_thresh=0.0), pyramid(), 4)
    elif kind == "torchvision's own":
        from torchvision.models.detection import fcos_resnet50_fpn

        detector = fcos_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=4, score_thresh=0.0, min_size=64, max_size=64
        )
    else:
        detector = {
            "dense": dense,
            "one map": lambda: dense(strides=(8,)),
            "query": query,
            "vit": lambda: dense(backbone="vit_tiny_patch16_224"),
        }[kind]()
    maps = ODAM()(detector, images, min_score=0.0, max_boxes=3)
    assert [len(explained.heatmaps) for explained in maps] == [3, 3]
    for explained in maps:
        assert explained.heatmaps.amax((1, 2)).max() == 1


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


def test_attention_of_a_box_is_the_mean_of_its_tokens_rows():
    torch.manual_seed(0)
    detector = dense(backbone="vit_tiny_patch16_224").eval()
    images, *_ = batch(1)
    (explained,) = BoxAttention()(detector, images, min_score=0.0, max_boxes=5)
    backbone = detector.features.backbone
    attention = backbone.blocks[-1].attn
    attention.fused_attn = False
    rows = []
    attention.attn_drop.register_forward_hook(lambda _, args, out: rows.append(out))
    with torch.no_grad():
        backbone(images)
    for box, raw in zip(explained.boxes.tolist(), explained.raw, strict=True):
        tokens = [
            1 + 4 * row + column
            for row in range(4)
            for column in range(4)
            if box[0] <= 16 * column + 8 <= box[2] and box[1] <= 16 * row + 8 <= box[3]
        ]
        if tokens:
            expected = rows[0][0].mean(0)[tokens].mean(0)[1:].view(4, 4)
            torch.testing.assert_close(raw, expected)
    assert isinstance(backbone, timm.models.VisionTransformer)


def test_same_for_all_boxes_repeats_the_map_of_the_gate():
    detector = dense(attention=CBAM, attention_preserve=False)
    images, *_ = batch(1)
    (explained,) = SameForAllBoxes(Gate())(detector, images, min_score=0.0, max_boxes=3)
    gate = Gate()(detector, images)
    for raw in explained.raw:
        torch.testing.assert_close(raw, gate.raw[0])
    assert explained.source.startswith("gate of features.backbone")


def test_box_methods_that_do_not_fit_the_detector_are_errors():
    images, *_ = batch(1)
    assert isinstance(default_box_method(dense()), ODAM)
    assert isinstance(default_box_method(query()), QuerySampling)
    refuses(UsageError, "this DenseDetector has none; use odam", lambda: QuerySampling()(dense(), images))
    refuses(UsageError, "is not a detector", lambda: ODAM()(nn.Flatten(), images))
    refuses(UsageError, r"no layer 'featuers'\. Nearest: features", lambda: ODAM("featuers")(dense(), images))
    with pytest.raises(
        UsageError, match=r"needs self-attention in features\.backbone: .*has 0 layers of attention; or use odam"
    ):
        BoxAttention()(dense(), images)
    refuses(UsageError, "no scores of the whole image; use odam", lambda: GradCAM()(dense(), images))
    refuses(UsageError, "runs more than once", lambda: ODAM("head.class_tower")(dense(), images))
    refuses(UsageError, "BoxAttention", lambda: SameForAllBoxes(RawAttention()))
    refuses(UsageError, "no part 'backbone'", lambda: BoxAttention("backbone")(dense(), images))


def test_heatmaps_of_boxes_print_each_box_and_are_pickled_at_their_own_size():
    (maps, _) = ODAM()(ToyDetector(), torch.rand(2, 3, 4, 6), min_score=0.0)
    first, *lines = str(maps).splitlines()
    assert first == f"BoxHeatmaps(odam of {maps.source}, 2 boxes)"
    assert lines[0].startswith(
        f"  label 0, score {float(maps.scores[0]):.2f}, box (2, 1, 4, 2): peak at row 1, column "
    )
    assert maps._repr_png_().startswith(b"\x89PNG")
    plain_data = json.loads(json.dumps(maps.to_dict()))
    assert plain_data["boxes"] == maps.boxes.tolist()
    whole = torch.rand(400, 4, 6)
    part = BoxHeatmaps(maps.boxes[:1], maps.scores[:1], maps.labels[:1], whole[:1], whole[:1], "", "")
    data = pickle.dumps(part)
    assert len(data) < whole.nbytes / 4
    assert repr(pickle.loads(data)) == repr(part)
    none = BoxHeatmaps(maps.boxes[:0], maps.scores[:0], maps.labels[:0], whole[:0], whole[:0], "", "")
    assert repr(none) == "BoxHeatmaps( of , 0 boxes)"
    assert none._repr_png_() is None
