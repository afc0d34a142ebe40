"""Heatmaps of detectors: one for every box.

A detector is any module that returns a list with one dict per image: `boxes` (N, 4) xyxy in pixels of the input,
`scores` (N,) and `labels` (N,), in descending order of the scores. The detectors of `visionattn.models` and of
torchvision are such modules.

Shapes: B batch, N boxes of an image, C channels, H × W the input, h × w a map; Q queries, M heads, L maps, K points.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.attention import DeformableAttention
from visionattn.capture import FullAttention, capture, compact_state, place, undisturbed
from visionattn.data import encode_image
from visionattn.drawing import Tile, heat_of_range, sheet
from visionattn.errors import DataError, UsageError, nearest
from visionattn.maps.method import Heatmaps, Method, check_images, describe_map, detach, find_non_finite, normalise
from visionattn.maps.methods.raw import RawAttention

SURE = 0.3
"""Default of `min_score`, the lowest score of a box to explain."""

_SHOWN, _DRAWN = 8, 16  # largest number of boxes to print, and of heatmaps to draw


@dataclass(frozen=True, repr=False)
class BoxHeatmaps:
    """The boxes that a detector finds in one image, and a heatmap of each.

    `print` shows each box with its peak, and a notebook draws the heatmaps.

    Attributes:
        boxes: (N, 4) xyxy in pixels of the input, in descending order of the scores.
        scores: (N,) in [0, 1].
        labels: (N,) int64.
        heatmaps: (N, h, w) float32 in [0, 1], each spanning the whole input; a constant map is 0 everywhere.
        raw: (N, h, w) float32, the map before it was scaled to [0, 1].
        source: what the heatmaps show, e.g. `"score by features"`.
        method: name of the method.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    heatmaps: Tensor
    raw: Tensor
    source: str
    method: str

    def to_dict(self) -> dict[str, object]:
        """Return the result as plain data for `json.dumps`. Arrays are nested lists."""
        return {
            "method": self.method,
            "source": self.source,
            "boxes": self.boxes.tolist(),
            "scores": self.scores.tolist(),
            "labels": self.labels.tolist(),
            "heatmaps": self.heatmaps.tolist(),
            "raw": self.raw.tolist(),
        }

    def __repr__(self) -> str:
        count = len(self.boxes)
        lines = [f"BoxHeatmaps({self.method} of {self.source}, {count} box{'' if count == 1 else 'es'})"]
        for box, score, label, raw_hw in list(zip(self.boxes, self.scores, self.labels, self.raw, strict=True))[
            :_SHOWN
        ]:
            corners = ", ".join(f"{edge:.0f}" for edge in box.tolist())
            lines.append(f"  label {int(label)}, score {float(score):.2f}, box ({corners}): {describe_map(raw_hw)}")
        if count > _SHOWN:
            lines.append(f"  and {count - _SHOWN} more boxes")
        return "\n".join(lines)

    def _repr_png_(self) -> bytes | None:
        """Show the heatmaps of the first boxes in a notebook; None without boxes, so that the text is shown."""
        if not len(self.heatmaps):
            return None
        tiles = [
            Tile(heat_of_range(map_hw.float().cpu().numpy()), [f"label {int(label)}, {float(score):.2f}"])
            for map_hw, label, score in list(zip(self.heatmaps, self.labels, self.scores, strict=True))[:_DRAWN]
        ]
        return encode_image(sheet(tiles, title=f"{self.method} of {self.source}", columns=4, width=180), ".png")

    def __getstate__(self) -> dict[str, object]:
        return compact_state(self)


class BoxMethod(ABC):
    """A heatmap method for detectors: it turns a detector and images into a heatmap of every box.

    Like a `Method`, a call leaves the model unchanged, and works under `torch.inference_mode` and `torch.no_grad`.
    """

    name: ClassVar[str]
    """Name of the method on the command line."""

    def __call__(
        self, detector: nn.Module, images_BCHW: Tensor, *, max_boxes: int = 10, min_score: float = SURE
    ) -> list[BoxHeatmaps]:
        """Explain the boxes with the highest scores in each image.

        Args:
            detector: a detector, as the docstring of this module defines it.
            images_BCHW: images, normalised for the detector.
            max_boxes: largest number of boxes to explain in each image, ≥ 1.
            min_score: lowest score of a box to explain.

        Returns:
            One `BoxHeatmaps` per image.

        Raises:
            UsageError: the model is not a detector, or the method does not fit it.
            DataError: the images or the weights hold NaN or infinity, or the batch is empty.
        """
        check_images(images_BCHW)
        if max_boxes < 1:
            raise UsageError(f"max_boxes must be ≥ 1, got {max_boxes}")
        with undisturbed(detector) as bare:
            images_BCHW = images_BCHW.clone() if images_BCHW.is_inference() else images_BCHW.detach()
            detections, raws, source = self.explain(bare, images_BCHW, max_boxes, min_score)
        maps = []
        for detected, raw_Nhw in zip(detections, raws, strict=True):
            raw_Nhw = raw_Nhw.detach().float()
            if not raw_Nhw.isfinite().all():
                raise DataError(f"a {self.name} heatmap of {source} is not finite; {find_non_finite(bare)}")
            heat_Nhw = normalise(raw_Nhw, self.name, source) if len(raw_Nhw) else raw_Nhw
            boxes, scores, labels = (detach(detected[key]) for key in ("boxes", "scores", "labels"))
            maps.append(BoxHeatmaps(boxes, scores, labels, heat_Nhw, raw_Nhw, source, self.name))
        return maps

    @abstractmethod
    def explain(
        self, model: nn.Module, images_BCHW: Tensor, max_boxes: int, min_score: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], str]:
        """Return the detections of each image, their raw maps (N, h, w), and what the maps show."""


class ODAM(BoxMethod):
    """ODAM, the gradient of a box's score times the activation (Zhao & Chan 2023, 2304.06354).

        relu(Σ_c ∂score/∂A_c · A_c)

    For any detector. The map of each level of a feature pyramid is resampled to the finest level with its sum
    unchanged, and the maps are added. If the image's size is not a multiple of a level's stride, the level extends
    beyond the image; the strides are read from the pyramid's attribute `strides`. Deviations from the paper: the
    gradient is not smoothed, and only the class score is explained, not the box's edges.

    Args:
        layer: name of a module that returns one map (B, C, h, w), or a list, tuple or dict of maps, and runs once in a
            forward pass (default: the first module that returns a list, tuple or dict of maps: the pyramid, or the
            backbone).
    """

    name = "odam"

    def __init__(self, layer: str | None = None) -> None:
        self.layer = layer

    def explain(
        self, model: nn.Module, images_BCHW: Tensor, max_boxes: int, min_score: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], str]:
        name = self.layer or _first_with_maps(model, images_BCHW)
        names = dict(model.named_modules())
        if name not in names:
            raise UsageError(f"the detector has no layer {name!r}.{nearest(name, [n for n in names if n])}")
        with torch.enable_grad(), _cut(names[name], name) as leaves:
            detections = [_best(detected, max_boxes, min_score) for detected in detect(model, images_BCHW)]
        if not leaves:
            raise UsageError(f"the layer {name!r} did not run; name a layer that runs")
        size = max((leaf.shape[2], leaf.shape[3]) for leaf in leaves)
        image_cells = _cells(names[name], leaves, (images_BCHW.shape[2], images_BCHW.shape[3]))
        raws = [leaves[0].new_zeros(len(detected["scores"]), *size, dtype=torch.float32) for detected in detections]
        for rank in range(max((len(raw) for raw in raws), default=0)):
            with torch.enable_grad():
                scores = [detected["scores"][rank] for detected in detections if len(detected["scores"]) > rank]
                score = torch.stack(scores).sum()
            if not score.requires_grad:
                raise UsageError(
                    f"no gradient of a score reaches {name}, since the detector computes without gradients; "
                    "name a later layer"
                )
            gradients = torch.autograd.grad(score, leaves, retain_graph=True, allow_unused=True)
            for leaf, gradient, cells in zip(leaves, gradients, image_cells, strict=True):
                if gradient is None:
                    continue
                share = cells[0] * cells[1] / (size[0] * size[1])
                fine_Bhw = _enlarged((gradient * leaf).sum(1).relu().float(), size, cells)
                for raw_Nhw, fine_hw in zip(raws, fine_Bhw, strict=True):
                    if len(raw_Nhw) > rank:
                        raw_Nhw[rank] += share * fine_hw.detach()
        return detections, raws, f"score by {name or 'the input'}"


class QuerySampling(BoxMethod):
    """Where the query of a box samples the image: its deformable attention weights at the sampled positions.

    For detectors with `DeformableAttention` that also return the `index` (N,) of each box's query. The weights of all
    layers, heads and maps are added.

    Args:
        layer: index of one layer of deformable attention in the detector, −1 for the last (default: all layers).
    """

    name = "sampling"

    def __init__(self, layer: int | None = None) -> None:
        self.layer = layer

    def explain(
        self, model: nn.Module, images_BCHW: Tensor, max_boxes: int, min_score: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], str]:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, DeformableAttention)}
        if not layers:
            raise UsageError(
                f"sampling needs deformable attention of queries; this {type(model).__name__} has none; use odam"
            )
        if self.layer is not None:
            names = list(layers)
            name = names[place(self.layer, names)]
            layers = {name: layers[name]}
        samples: list[tuple[Tensor, Tensor]] = []
        sizes: list[tuple[int, int]] = []
        handles = []
        for module in layers.values():
            handles.append(module.register_forward_pre_hook(lambda _, args: sizes.extend(x.shape[2:] for x in args[2])))
            handles.append(module.sampling.register_forward_hook(lambda _, args, out: samples.append(out)))
        try:
            detections = [_best(detected, max_boxes, min_score) for detected in detect(model, images_BCHW)]
        finally:
            for handle in handles:
                handle.remove()
        if any("index" not in detected for detected in detections):
            raise UsageError(
                f"the detections of this {type(model).__name__} do not hold the index of each box's query; use odam"
            )
        size = max(sizes)
        raws = []
        for number, detected in enumerate(detections):
            query_N = detected["index"]
            raw_Nhw = images_BCHW.new_zeros(len(query_N), *size, dtype=torch.float32)
            for places, weights in samples:
                splat(raw_Nhw, places[number, query_N].flatten(1, 3), weights[number, query_N].flatten(1))
            raws.append(raw_Nhw)
        return detections, raws, "sampling of the query"


class BoxAttention(BoxMethod):
    """The backbone's attention from the tokens inside a box to all tokens, averaged over these tokens and the heads.

    For detectors with a ViT as backbone, or another backbone with self-attention on a grid.

    Args:
        backbone: name of the backbone inside the detector.
        layer: an attention layer of the backbone: its name, or its index among the attention layers, −1 for the last.
    """

    name = "attention"

    def __init__(self, backbone: str = "features.backbone", layer: int | str = -1) -> None:
        self.backbone = backbone
        self.layer = layer

    def explain(
        self, model: nn.Module, images_BCHW: Tensor, max_boxes: int, min_score: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], str]:
        parts = dict(model.named_modules())
        if self.backbone not in parts:
            raise UsageError(f"the detector has no part {self.backbone!r}.{nearest(self.backbone, parts)}")
        detections = [_best(detected, max_boxes, min_score) for detected in detect(model, images_BCHW)]
        try:
            with capture(parts[self.backbone], FullAttention(), layers=[self.layer]) as records:
                parts[self.backbone](images_BCHW)
            record, keys, weights = records.kept()
        except UsageError as error:
            raise UsageError(f"{self.name} needs self-attention in {self.backbone}: {error}; or use odam") from error
        queries = record.queries
        if queries is None or record.windowed or queries.grid != keys.grid:
            raise UsageError(f"{record.name} does not attend from the whole grid to the whole grid; use odam")
        h, w = queries.grid
        size = images_BCHW.shape[2], images_BCHW.shape[3]
        raws = []
        for number, detected in enumerate(detections):
            rows_QK = weights[number, 0].mean(0)  # over heads
            index_Q = queries.index_WN[0].to(rows_QK.device)
            y_Q, x_Q = (index_Q // w + 0.5) * size[0] / h, (index_Q % w + 0.5) * size[1] / w
            raw = []
            for box in detected["boxes"]:
                inside_Q = (index_Q >= 0) & (x_Q >= box[0]) & (x_Q <= box[2]) & (y_Q >= box[1]) & (y_Q <= box[3])
                if not inside_Q.any():  # the box is smaller than a token, so take the nearest token
                    far_Q = (x_Q - (box[0] + box[2]) / 2).square() + (y_Q - (box[1] + box[3]) / 2).square()
                    inside_Q = far_Q == far_Q.masked_fill(index_Q < 0, torch.inf).min()
                raw.append(keys.to_grid(rows_QK[inside_Q].mean(0)[None, None])[0])
            raws.append(torch.stack(raw) if raw else rows_QK.new_zeros(0, h, w))
        return detections, raws, f"attention of {record.name}"


class SameForAllBoxes(BoxMethod):
    """A method's heatmap of the whole image, repeated for every box, e.g. for gates, which explain no single output.

    Args:
        method: a method for whole images, e.g. `Gate`.

    Raises:
        UsageError: the method is `RawAttention` without a query; `BoxAttention` shows the attention of a box's tokens.
    """

    name = "whole"

    def __init__(self, method: Method) -> None:
        if isinstance(method, RawAttention) and method.query is None:
            raise UsageError("raw attention of the whole image is the same for all boxes; use BoxAttention instead")
        self.method = method

    def explain(
        self, model: nn.Module, images_BCHW: Tensor, max_boxes: int, min_score: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], str]:
        detections = [_best(detected, max_boxes, min_score) for detected in detect(model, images_BCHW)]
        maps = self.method(model, images_BCHW)
        raws = [
            raw_hw.expand(len(detected["scores"]), -1, -1)
            for raw_hw, detected in zip(maps.raw, detections, strict=True)
        ]
        return detections, raws, maps.source


@dataclass(frozen=True)
class MaxOverBoxes:
    """Use a method for boxes as a method for whole images. The heatmap is the maximum over the boxes' heatmaps.

    The `output` of the returned `Heatmaps` is a list with one dict per image: `boxes`, `scores` and `labels` of the
    explained boxes, as in `BoxHeatmaps`, and their heatmaps as `maps` (N, h, w). With a target, (B,) int64, only boxes
    of that class are kept.

    Args:
        method: a method for boxes, e.g. `ODAM`.
        max_boxes, min_score: as for `BoxMethod`.
    """

    method: BoxMethod
    max_boxes: int = 20
    min_score: float = SURE

    @property
    def name(self) -> str:
        return self.method.name

    def __call__(self, model: nn.Module, images_BCHW: Tensor, *, target: Tensor | None = None) -> Heatmaps:
        explained = self.method(model, images_BCHW, max_boxes=self.max_boxes, min_score=self.min_score)
        output: list[dict[str, Tensor]] = []
        heatmaps: list[Tensor] = []
        raws: list[Tensor] = []
        for number, image in enumerate(explained):
            keep_N = (
                torch.ones_like(image.labels, dtype=torch.bool) if target is None else image.labels == target[number]
            )
            output.append(
                {
                    "boxes": image.boxes[keep_N],
                    "scores": image.scores[keep_N],
                    "labels": image.labels[keep_N],
                    "maps": image.heatmaps[keep_N],
                }
            )
            for maxima, maps_Nhw in ((heatmaps, image.heatmaps[keep_N]), (raws, image.raw[keep_N])):
                maxima.append(maps_Nhw.amax(0) if len(maps_Nhw) else maps_Nhw.new_zeros(maps_Nhw.shape[1:]))
        return Heatmaps(torch.stack(heatmaps), torch.stack(raws), output, target, explained[0].source, self.method.name)


BOX_METHODS: dict[str, type[BoxMethod]] = {method.name: method for method in (ODAM, QuerySampling, BoxAttention)}
"""Name on the command line → class."""


def default_box_method(detector: nn.Module) -> BoxMethod:
    """Choose the default method of a detector: `QuerySampling` if it has deformable attention, otherwise `ODAM`."""
    return QuerySampling() if any(isinstance(part, DeformableAttention) for part in detector.modules()) else ODAM()


def detect(model: nn.Module, images_BCHW: Tensor) -> list[dict[str, Tensor]]:
    """Run a detector on images, and return its detections: one dict per image (see the docstring of this module).

    Raises:
        UsageError: the model does not return a list of detections.
    """
    takes_list = type(model).__module__.startswith("torchvision.models.detection")
    output = model(list(images_BCHW) if takes_list else images_BCHW)
    keys = {"boxes", "scores", "labels"}
    if not isinstance(output, list) or not all(isinstance(item, dict) and keys <= item.keys() for item in output):
        raise UsageError(
            f"this {type(model).__name__} is not a detector: a detector returns a list of dicts with boxes, scores and "
            "labels"
        )
    return output


def splat(raw_Nhw: Tensor, places_NP2: Tensor, weights_NP: Tensor) -> None:
    """Add each weight to the four cells around its position, in bilinear shares. The maps are changed in place.

    Positions are (x, y) as fractions of the map. Shares that fall outside the map are dropped.
    """
    count, height, width = raw_Nhw.shape
    flat_NS = raw_Nhw.view(count, height * width)
    x_NP, y_NP = places_NP2[..., 0] * width - 0.5, places_NP2[..., 1] * height - 0.5
    for step_x in (0, 1):
        for step_y in (0, 1):
            column, row = x_NP.floor() + step_x, y_NP.floor() + step_y
            share = (1 - (x_NP - column).abs()) * (1 - (y_NP - row).abs())
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = (row * width + column).clamp(0, height * width - 1).long()
            flat_NS.scatter_add_(1, index, torch.where(inside, weights_NP * share, 0).float())


def _best(detected: dict[str, Tensor], max_boxes: int, min_score: float) -> dict[str, Tensor]:
    """Return the detections with a score of at least `min_score`: at most `max_boxes`, the highest scores first."""
    count = min(max_boxes, int((detected["scores"].detach() >= min_score).sum()))
    return {name: value[:count] for name, value in detected.items()}


@contextlib.contextmanager
def _cut(module: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Turn the maps that a module returns into leaves of the graph, and yield the list of leaves."""
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: object, out: object) -> object:
        maps = list(_maps(out))
        if not maps:
            raise UsageError(f"{name!r} returns no maps (B, C, h, w); name a layer that does")
        if leaves:
            raise UsageError(f"{name!r} runs more than once in a forward pass; name a layer that runs once")
        leaves.extend(x.detach().requires_grad_() for x in maps)
        after = iter(leaves)
        return _replaced(out, after)

    handle = module.register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


def _cells(module: nn.Module, leaves: Sequence[Tensor], size: tuple[int, int]) -> list[tuple[float, float]]:
    """Return how many rows and columns of each map the image covers; these may be fractions."""
    strides = getattr(module, "strides", ())
    if len(strides) != len(leaves):
        return [(leaf.shape[2], leaf.shape[3]) for leaf in leaves]
    return [(size[0] / stride, size[1] / stride) for stride in strides]


def _enlarged(map_Bhw: Tensor, size: tuple[int, int], cells: tuple[float, float]) -> Tensor:
    """Resample the first `cells` rows and columns of a map to another size, bilinearly between centres of cells."""
    ratio_y, ratio_x = cells[0] / map_Bhw.shape[1], cells[1] / map_Bhw.shape[2]
    to_map = map_Bhw.new_tensor([[ratio_x, 0, ratio_x - 1], [0, ratio_y, ratio_y - 1]]).expand(len(map_Bhw), 2, 3)
    grid = F.affine_grid(to_map, [len(map_Bhw), 1, *size], align_corners=False)
    return F.grid_sample(map_Bhw[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


def _maps(out: object) -> Sequence[Tensor]:
    """Return the maps (B, C, h, w) in a module's output; an empty list if the output holds anything else."""
    values = list(out.values()) if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else [out]
    maps = [value for value in values if isinstance(value, Tensor) and value.ndim == 4]
    return maps if len(maps) == len(values) else []


def _replaced(out: object, leaves: Iterator[Tensor]) -> object:
    """Return a module's output with a clone of a leaf in place of each map."""
    # clones, since a later in-place activation would fail on a leaf, or change it
    if isinstance(out, dict):
        return type(out)((key, next(leaves).clone()) for key in out)
    return type(out)(x.clone() for x in leaves) if isinstance(out, (list, tuple)) else next(leaves).clone()


def _first_with_maps(model: nn.Module, images_BCHW: Tensor) -> str:
    """Return the name of the first module, from the outermost inwards, that returns a list, tuple or dict of maps."""
    several: set[nn.Module] = set()

    def note(module: nn.Module, _: object, out: object) -> None:
        if isinstance(out, (list, tuple, dict)) and len(_maps(out)):
            several.add(module)

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        detect(model, images_BCHW[:1])
    finally:
        for handle in handles:
            handle.remove()
    for name, module in model.named_modules():
        if module in several:
            return name
    raise UsageError(f"no part of this {type(model).__name__} returns a list of maps; name the layer to explain")
