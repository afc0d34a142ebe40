"""A query detector: each query starts from a prediction of a dense head, and finds one object.

Shapes: B batch, Q queries, C channels, P cells, N boxes of an image, K classes. Boxes are xyxy in pixels; boxes in
fractions of the image are centre, width and height.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_convert, generalized_box_iou, generalized_box_iou_loss

from visionattn.models.detector import Detections, Detector, detections, padded
from visionattn.models.detectors.decoder import Answer, Decoder
from visionattn.models.detectors.dense import DenseHead, DensePredictions, paired_iou, quality_focal
from visionattn.models.detectors.feature_pyramid import FeaturePyramid

CLASS_COST, BOX_COST, OVERLAP_COST = 2.0, 5.0, 2.0  # weights of the matching cost, as in Deformable DETR
_DISTINCT = 0.7  # IoU above which two proposals count as the same object, as in 2303.12776
_CANDIDATES = 8  # candidate cells per query
CLASS_WEIGHT, BOX_WEIGHT, OVERLAP_WEIGHT = 1.0, 5.0, 2.0  # weights of the terms of the loss


class QueryDetector(Detector):
    """DETR with anchor queries, which also learns from small data sets.

    - A dense head on the pyramid, trained one-to-many by its own loss, proposes boxes. The features of the best
      `queries` cells become the queries of the decoder, and their boxes become the anchors (query selection, Deformable
      DETR, Zhu et al. 2020, 2010.04159, section 4.3; DINO, Zhang et al. 2022, 2203.03605, section 3.4). Deviation: the
      papers train that head one-to-one, like the decoder. With one-to-many training the head learns in a fraction of
      the time, but several of its cells propose the same object. So the proposals that non-maximum suppression at an
      IoU of .7 keeps are ranked first, and the others fill the remaining queries (dense distinct queries, DDQ, Zhang et
      al. 2023, 2303.12776, section 3.2). *Measured* on `tests/shapes.py`, equal time, one seed: mAP50 .95 with this
      ranking and .89 without.
    - The `decoder` refines the queries. Each layer's predictions are matched one-to-one with the objects (Hungarian).
    - In training, true boxes with noise are additional queries. The decoder must restore the boxes with little noise
      (denoising, DN-DETR, Li et al. 2022, 2203.01305) and reject the boxes with more noise (contrastive denoising,
      2203.03605, section 3.3).

    There is no transformer encoder: the pyramid merges the maps.

        L = dense + Σ_layers (class + 5 |box − truth|₁ + 2 (1 − GIoU)) / objects,     and this sum for noised queries

    with the class loss of `DenseHead`: the target score of a matched query is its IoU with the object.

    Args:
        features: the pyramid.
        num_classes: K.
        queries: Q (default: 100).
        layers: number of decoder layers (default: 3).
        heads, points: heads of the decoder's attention, and points that each head samples in each map (default: 8, 4).
        hidden: hidden channels of the decoder's feed-forward parts (default: 512).
        depth: convolutions in each tower of the dense head (default: 2).
        noised: approximate maximum number of noised queries per image; 0 trains without them (default: 60).
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
        boxes_BQ4 = box_convert(answer.boxes, "cxcywh", "xyxy") * _size_tensor(size, answer.boxes)
        return detections(answer.logits.sigmoid(), boxes_BQ4, size, iou=None)

    def select(self, maps: Sequence[Tensor], found: DensePredictions, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the best cells as queries (B, Q, C) with anchors (B, Q, 4), in fractions of the image."""
        scores_BP = found.logits.detach().amax(-1)
        score_BM, place_BM = scores_BP.topk(min(_CANDIDATES * self.queries, scores_BP.shape[1]), dim=1)
        boxes_BM4 = found.boxes.detach().gather(1, place_BM[..., None].expand(-1, -1, 4))
        image_BM = torch.arange(len(place_BM), device=place_BM.device)[:, None].expand_as(place_BM)
        later_BM = torch.ones_like(place_BM)
        # batched_nms separates images by offsets; this requires coordinates ≥ 0
        moved_M4 = (boxes_BM4 - boxes_BM4.amin()).flatten(0, 1)
        later_BM.view(-1)[batched_nms(moved_M4, score_BM.flatten(), image_BM.flatten(), _DISTINCT)] = 0
        rank_BQ = later_BM.argsort(dim=1, stable=True)[:, : self.queries]
        boxes_BQ4 = boxes_BM4.gather(1, rank_BQ[..., None].expand(-1, -1, 4))
        tokens_BPC = torch.cat([x.flatten(2) for x in maps], 2).mT
        place_BQ1 = place_BM.gather(1, rank_BQ)[..., None]
        query_BQC = self.start(tokens_BPC.gather(1, place_BQ1.expand(-1, -1, tokens_BPC.shape[2])))
        return query_BQC, _to_fractions(boxes_BQ4, size)

    def _spans(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return (L, 2): width and height of each map in fractions of the image; the last cells may reach beyond it."""
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
        truth = [_to_fractions(boxes_N4, size) for boxes_N4 in boxes]
        noise, hidden_QQ = None, None
        if self.label is not None:
            noise = make_noise(truth, labels, self.noised, self.num_classes)
            # data parallelism requires a gradient of every weight
            query_BQC = query_BQC + 0 * self.label.weight.sum()
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
"""For each image, the matched queries (n,) and the numbers of their objects (n,)."""


@torch.no_grad()
def match(answer: Answer, truth: Sequence[Tensor], labels: Sequence[Tensor]) -> Pairs:
    """Match queries with objects one-to-one at the lowest total cost (Carion et al. 2020, 2005.12872, eq. 1).

        cost = 2 focal(class) + 5 |box − truth|₁ + 2 (1 − GIoU)         focal as in 2010.04159: positive − negative part

    Args:
        answer: predictions of the queries.
        truth: (N, 4) of each image, centre, width and height in fractions of the image.
        labels: (N,) of each image.
    """
    counts = [len(labels_N) for labels_N in labels]
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
        corners = [box_convert(boxes, "cxcywh", "xyxy") for boxes in (boxes_Q4, truth[number])]
        cost_QN -= OVERLAP_COST * generalized_box_iou(*corners)
        # the matching cannot handle NaN; the check of the loss reports NaN later, with the names of the images
        query, item = linear_sum_assignment(cost_QN.nan_to_num(1e6).cpu().numpy())
        pairs.append((torch.as_tensor(query, device=p_QN.device), torch.as_tensor(item, device=p_QN.device)))
    return pairs


def set_losses(answer: Answer, pairs: Pairs, truth: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the terms `class`, `box` and `overlap` of a layer's loss, divided by the number of pairs."""
    image = torch.cat([torch.full_like(query, number) for number, (query, _) in enumerate(pairs)])
    query = torch.cat([query for query, _ in pairs])
    count = max(1, len(query))
    truth_M4 = torch.cat([boxes[item] for boxes, (_, item) in zip(truth, pairs, strict=True)])
    label_M = torch.cat([image_labels[item] for image_labels, (_, item) in zip(labels, pairs, strict=True)])
    boxes_M4 = answer.boxes[image, query]
    found_M4, goal_M4 = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (boxes_M4, truth_M4))
    goal_BQK = torch.zeros_like(answer.logits)
    goal_BQK[image, query, label_M] = paired_iou(found_M4.detach(), goal_M4)
    return {
        "class": CLASS_WEIGHT * quality_focal(answer.logits, goal_BQK) / count,
        "box": BOX_WEIGHT * F.l1_loss(boxes_M4, truth_M4, reduction="sum") / count,
        "overlap": OVERLAP_WEIGHT * generalized_box_iou_loss(found_M4, goal_M4, reduction="sum") / count,
    }


class Noise(NamedTuple):
    """Noised objects as queries: G groups of 2 N queries each, where N is the largest number of objects in an image.

    Attributes:
        labels: (B, G · 2 N).
        boxes: (B, G · 2 N, 4), in fractions of the image.
        pairs: the object of each query; queries in the second half of a group have none.
        group: 2 N.
    """

    labels: Tensor
    boxes: Tensor
    pairs: Pairs
    group: int

    def hidden(self, total: int) -> Tensor:
        """Return the (total, total) mask of attention: no query attends to a noised query outside its own group."""
        count = self.boxes.shape[1]
        group = torch.full((total,), -1, device=self.boxes.device)
        group[:count] = torch.arange(count, device=group.device) // self.group
        return (group[:, None] != group[None]) & (group[None] >= 0)


def make_noise(truth: Sequence[Tensor], labels: Sequence[Tensor], most: int, num_classes: int) -> Noise | None:
    """Add noise to the true boxes and labels of each image (2203.03605, section 3.3).

    The corners of a box are moved by half of its size times u. u is in [0, .4] for queries to be restored, and in [.4,
    .8] for queries to be rejected. A quarter of the labels is replaced by random ones.

    Args:
        truth: (N, 4) of each image, in fractions of the image.
        labels: (N,) of each image.
        most: maximum of queries per image, unless a single group has more.
        num_classes: K.

    Returns:
        The noised queries, or None if no image has objects.
    """
    boxes_BN4, labels_BN, there_BN = padded(truth, labels)
    batch, objects = labels_BN.shape
    if not objects:
        return None
    groups = max(1, most // (2 * objects))
    shape = batch, groups, 2, objects
    labels_BGHN = labels_BN[:, None, None].expand(shape)
    replaced = torch.rand(shape, device=labels_BN.device) < 0.25
    labels_BGHN = torch.where(replaced, torch.randint_like(labels_BGHN, num_classes), labels_BGHN)
    corners = box_convert(boxes_BN4, "cxcywh", "xyxy")[:, None, None].expand(*shape, 4)
    half = (boxes_BN4[..., 2:] / 2).repeat(1, 1, 2)[:, None, None]
    least = torch.tensor([0.0, 0.4], device=half.device)[:, None, None]
    amount = least + 0.4 * torch.rand(*shape, 4, device=half.device)
    sign = torch.randint(0, 2, (*shape, 4), device=half.device) * 2 - 1
    noised = box_convert((corners + half * amount * sign).clamp(0, 1), "xyxy", "cxcywh")
    noised = torch.where(there_BN[:, None, None, :, None], noised, 0.5)
    pairs = []
    first = torch.arange(groups, device=half.device)[:, None] * (2 * objects)
    for labels_N in labels:
        item = torch.arange(len(labels_N), device=half.device)
        pairs.append(((first + item).flatten(), item.repeat(groups)))
    return Noise(labels_BGHN.flatten(1), noised.flatten(1, 3), pairs, 2 * objects)


def _to_fractions(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Convert boxes from xyxy in pixels to centre, width and height in fractions of the image."""
    return (box_convert(boxes, "xyxy", "cxcywh") / _size_tensor(size, boxes)).clamp(0, 1)


def _size_tensor(size: tuple[int, int], like: Tensor) -> Tensor:
    return torch.tensor([size[1], size[0], size[1], size[0]], device=like.device, dtype=torch.float32)
