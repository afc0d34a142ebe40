"""A query detector: a few queries start at the best places of a dense head, and each finds one object.

Shapes: B batch, Q queries, C channels, P places, N boxes of an image, K classes; boxes xyxy in pixels, or where it is
said centre, width and height in shares of the image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_convert, generalized_box_iou, generalized_box_iou_loss

from visionattn.models.detectors.decoder import Answer, Decoder
from visionattn.models.detectors.dense import Dense, DenseHead, paired_iou, quality_focal
from visionattn.models.detectors.detector import Detections, Detector, detections, padded
from visionattn.models.detectors.feature_pyramid import FeaturePyramid

CLASS_COST, BOX_COST, OVERLAP_COST = 2.0, 5.0, 2.0  # of Deformable DETR, in matching and as weights of the losses
_DISTINCT = 0.7  # IoU, of 2303.12776
_CANDIDATES = 8  # places a query that are looked at
CLASS_WEIGHT, BOX_WEIGHT, OVERLAP_WEIGHT = 1.0, 5.0, 2.0


class QueryDetector(Detector):
    """DETR with anchor queries, for data small and large.

    - A dense head on the pyramid, trained one-to-many by its own loss, proposes boxes; the best `queries` places give
      the decoder its queries: their feature, and their box as the anchor (query selection, Deformable DETR, Zhu et al.
      2020, 2010.04159, section 4.3; DINO, Zhang et al. 2022, 2203.03605, section 3.4). Deviation: the papers train that
      head one-to-one, as the decoder; one-to-many it learns in a fraction of the time. Several of its places then
      propose the same object, so that of those that overlap by an IoU above .7 the best goes first (dense distinct
      queries, DDQ, Zhang et al. 2023, 2303.12776, section 3.2); the others only fill up what is left. *Measured* on
      `tests/shapes.py`, equal time, one seed: mAP50 .95 with it and .89 without.
    - The `decoder` refines them, and each layer's answers are matched one-to-one with the objects (Hungarian).
    - While it trains, noised true boxes are queries as well, which the decoder must undo, and others noised further,
      which it must reject (denoising, DN-DETR, Li et al. 2022, 2203.01305; contrastive, 2203.03605, section 3.3).

    There is no transformer encoder: the pyramid merges the maps.

        L = dense + Σ_layers (class + 5 |box − truth|₁ + 2 (1 − GIoU)) / objects,     the same for the noised queries

    with the class loss of `DenseHead`: a query that found an object is asked for its IoU with it.

    Args:
        features: the pyramid.
        num_classes: K.
        queries: Q.
        layers: of the decoder.
        heads, points: of its attention.
        hidden: channels of its feed-forward parts.
        depth: convolutions of the dense head's towers.
        noised: noised queries an image, at most about; 0 trains without them.
    """

    def __init__(
        self,
        features: FeaturePyramid,
        num_classes: int,
        *,
        queries: int = 100,
        layers: int = 3,
        heads: int = 8,
        points: int = 4,
        hidden: int = 512,
        depth: int = 2,
        noised: int = 60,
    ) -> None:
        super().__init__()
        channels = features.channels
        self.num_classes = num_classes
        self.queries = queries
        self.noised = noised
        self.features = features
        self.dense = DenseHead(num_classes, features.strides, channels, depth=depth)
        self.start = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels))
        self.label = nn.Embedding(num_classes, channels) if noised else None
        self.decoder = Decoder(
            channels,
            num_classes,
            levels=len(features.strides),
            layers=layers,
            heads=heads,
            points=points,
            hidden=hidden,
        )

    def forward(self, images_BCHW: Tensor) -> list[Detections]:
        maps = self.features(images_BCHW)
        size = images_BCHW.shape[2], images_BCHW.shape[3]
        query_BQC, anchors_BQ4 = self.select(maps, self.dense(maps), size)
        answer = self.decoder(query_BQC, anchors_BQ4, maps, spans_L2=self._spans(maps, size))[-1]
        boxes_BQ4 = box_convert(answer.boxes, "cxcywh", "xyxy") * _scale(size, answer.boxes)
        return detections(answer.logits.sigmoid(), boxes_BQ4, size, iou=None)

    def select(self, maps: Sequence[Tensor], found: Dense, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The best places of the dense head as queries (B, Q, C) with anchors (B, Q, 4) in shares of the image."""
        scores_BP = found.logits.detach().amax(-1)
        score_BM, place_BM = scores_BP.topk(min(_CANDIDATES * self.queries, scores_BP.shape[1]), dim=1)
        boxes_BM4 = found.boxes.detach().gather(1, place_BM[..., None].expand(-1, -1, 4))
        image_BM = torch.arange(len(place_BM), device=place_BM.device)[:, None].expand_as(place_BM)
        later_BM = torch.ones_like(place_BM)
        # below 0 the boxes of one image would reach into what batched_nms sets apart for the one before
        moved_M4 = (boxes_BM4 - boxes_BM4.amin()).flatten(0, 1)
        later_BM.view(-1)[batched_nms(moved_M4, score_BM.flatten(), image_BM.flatten(), _DISTINCT)] = 0
        rank_BQ = later_BM.argsort(dim=1, stable=True)[:, : self.queries]
        boxes_BQ4 = boxes_BM4.gather(1, rank_BQ[..., None].expand(-1, -1, 4))
        tokens_BPC = torch.cat([x.flatten(2) for x in maps], 2).mT
        place_BQ1 = place_BM.gather(1, rank_BQ)[..., None]
        query_BQC = self.start(tokens_BPC.gather(1, place_BQ1.expand(-1, -1, tokens_BPC.shape[2])))
        return query_BQC, _shares(boxes_BQ4, size)

    def _spans(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """(L, 2): width and height of each map in shares of the image, which ends within their last cells."""
        sides = [
            [x.shape[3] * stride / size[1], x.shape[2] * stride / size[0]]
            for x, stride in zip(maps, self.features.strides, strict=True)
        ]
        return torch.tensor(sides, device=maps[0].device)

    def losses(self, images_BCHW: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
        maps = self.features(images_BCHW)
        size = images_BCHW.shape[2], images_BCHW.shape[3]
        found = self.dense(maps)
        terms = {f"dense_{name}": loss for name, loss in self.dense.losses(found, boxes, labels).items()}
        query_BQC, anchors_BQ4 = self.select(maps, found, size)
        truth = [_shares(some, size) for some in boxes]
        noise, hidden_QQ = None, None
        if self.label is not None:
            noise = make_noise(truth, labels, self.noised, self.num_classes)
            query_BQC = query_BQC + 0 * self.label.weight.sum()  # data parallelism wants a gradient of all weights
        if noise is not None and self.label is not None:
            query_BQC = torch.cat([self.label(noise.labels), query_BQC], 1)
            anchors_BQ4 = torch.cat([noise.boxes, anchors_BQ4], 1)
            hidden_QQ = noise.hidden(query_BQC.shape[1])
        answers = self.decoder(query_BQC, anchors_BQ4, maps, hidden_QQ, self._spans(maps, size))
        count = noise.boxes.shape[1] if noise is not None else 0
        for answer in answers:
            if noise is not None:
                part = Answer(answer.logits[:, :count], answer.boxes[:, :count])
                for name, loss in set_losses(part, noise.pairs, truth, labels).items():
                    terms[f"noise_{name}"] = terms.get(f"noise_{name}", 0) + loss
            part = Answer(answer.logits[:, count:], answer.boxes[:, count:])
            for name, loss in set_losses(part, match(part, truth, labels), truth, labels).items():
                terms[name] = terms.get(name, 0) + loss
        return terms


Pairs = list[tuple[Tensor, Tensor]]
"""For each image, queries (n,) and the numbers of the objects (n,) that they are to find."""


@torch.no_grad()
def match(answer: Answer, truth: Sequence[Tensor], labels: Sequence[Tensor]) -> Pairs:
    """Pair queries with objects one-to-one at the least cost (Carion et al. 2020, 2005.12872, eq. 1).

        cost = 2 focal(class) + 5 |box − truth|₁ + 2 (1 − GIoU)         focal as in 2010.04159: positive − negative part

    Args:
        answer: of the queries.
        truth: (N, 4) of each image, in shares of it, centre, width and height.
        labels: (N,) of each image.
    """
    counts = [len(some) for some in labels]
    probability_BQK = answer.logits.sigmoid()
    pairs = []
    for number, (probability_QK, boxes_Q4) in enumerate(zip(probability_BQK, answer.boxes, strict=True)):
        if not counts[number]:
            empty = torch.zeros(0, dtype=torch.long, device=boxes_Q4.device)
            pairs.append((empty, empty))
            continue
        p_QN = probability_QK[:, labels[number]].clamp(1e-6, 1 - 1e-6)
        cost_QN = CLASS_COST * (0.75 * p_QN.square() * (1 - p_QN).log() - 0.25 * (1 - p_QN).square() * p_QN.log())
        cost_QN += BOX_COST * torch.cdist(boxes_Q4, truth[number], p=1)
        corners = [box_convert(some, "cxcywh", "xyxy") for some in (boxes_Q4, truth[number])]
        cost_QN -= OVERLAP_COST * generalized_box_iou(*corners)
        # where the network has come to NaN the loss will say so, with the images' names
        query, item = linear_sum_assignment(cost_QN.nan_to_num(1e6).cpu().numpy())
        pairs.append((torch.as_tensor(query, device=p_QN.device), torch.as_tensor(item, device=p_QN.device)))
    return pairs


def set_losses(answer: Answer, pairs: Pairs, truth: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
    """The terms `class`, `box` and `overlap` of a layer's answers, by the number of pairs."""
    image = torch.cat([torch.full_like(query, number) for number, (query, _) in enumerate(pairs)])
    query = torch.cat([query for query, _ in pairs])
    count = max(1, len(query))
    asked_M4 = torch.cat([some[item] for some, (_, item) in zip(truth, pairs, strict=True)])
    label_M = torch.cat([some[item] for some, (_, item) in zip(labels, pairs, strict=True)])
    boxes_M4 = answer.boxes[image, query]
    found_M4, goal_M4 = (box_convert(some, "cxcywh", "xyxy") for some in (boxes_M4, asked_M4))
    goal_BQK = torch.zeros_like(answer.logits)
    goal_BQK[image, query, label_M] = paired_iou(found_M4.detach(), goal_M4)
    return {
        "class": CLASS_WEIGHT * quality_focal(answer.logits, goal_BQK) / count,
        "box": BOX_WEIGHT * F.l1_loss(boxes_M4, asked_M4, reduction="sum") / count,
        "overlap": OVERLAP_WEIGHT * generalized_box_iou_loss(found_M4, goal_M4, reduction="sum") / count,
    }


class Noise(NamedTuple):
    """Noised objects as queries: G groups, each of 2 N queries, where N is the most objects of an image.

    Attributes:
        labels: (B, G · 2 N).
        boxes: (B, G · 2 N, 4), in shares of the image.
        pairs: which query comes from which object; those of the second half of a group from none.
        group: 2 N.
    """

    labels: Tensor
    boxes: Tensor
    pairs: Pairs
    group: int

    def hidden(self, total: int) -> Tensor:
        """(total, total): the queries of the image do not see the noised ones, nor these the other groups."""
        count = self.boxes.shape[1]
        group = torch.full((total,), -1, device=self.boxes.device)
        group[:count] = torch.arange(count, device=group.device) // self.group
        return (group[:, None] != group[None]) & (group[None] >= 0)


def make_noise(truth: Sequence[Tensor], labels: Sequence[Tensor], most: int, num_classes: int) -> Noise | None:
    """Noise the true boxes and labels of each image (2203.03605, section 3.3).

    The corners of a box are moved by half of its size times u, u in [0, .4] for those that are to be undone, and in
    [.4, .8] for those that are to be rejected; a quarter of the labels are drawn anew.

    Args:
        truth: (N, 4) of each image, in shares of it.
        labels: (N,) of each image.
        most: queries an image, where one group is not more.
        num_classes: K.
    """
    boxes_BN4, labels_BN, there_BN = padded(truth, labels)
    batch, objects = labels_BN.shape
    if not objects:
        return None
    groups = max(1, most // (2 * objects))
    shape = batch, groups, 2, objects
    labels_BGHN = labels_BN[:, None, None].expand(shape)
    drawn = torch.rand(shape, device=labels_BN.device) < 0.25
    labels_BGHN = torch.where(drawn, torch.randint_like(labels_BGHN, num_classes), labels_BGHN)
    corners = box_convert(boxes_BN4, "cxcywh", "xyxy")[:, None, None].expand(*shape, 4)
    half = (boxes_BN4[..., 2:] / 2).repeat(1, 1, 2)[:, None, None]
    far = torch.tensor([0.0, 0.4], device=half.device)[:, None, None]
    amount = far + 0.4 * torch.rand(*shape, 4, device=half.device)
    sign = torch.randint(0, 2, (*shape, 4), device=half.device) * 2 - 1
    noised = box_convert((corners + half * amount * sign).clamp(0, 1), "xyxy", "cxcywh")
    noised = torch.where(there_BN[:, None, None, :, None], noised, 0.5)
    pairs = []
    first = torch.arange(groups, device=half.device)[:, None] * (2 * objects)
    for some in labels:
        item = torch.arange(len(some), device=half.device)
        pairs.append(((first + item).flatten(), item.repeat(groups)))
    return Noise(labels_BGHN.flatten(1), noised.flatten(1, 3), pairs, 2 * objects)


def _shares(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes xyxy in pixels as centre, width and height in shares of the image."""
    return (box_convert(boxes, "xyxy", "cxcywh") / _scale(size, boxes)).clamp(0, 1)


def _scale(size: tuple[int, int], like: Tensor) -> Tensor:
    return torch.tensor([size[1], size[0], size[1], size[0]], device=like.device, dtype=torch.float32)
