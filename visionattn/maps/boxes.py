"""A heatmap for every box that a detector finds.

A detector is any module that returns, for each image, a dict with `boxes` (N, 4) xyxy in pixels of the input, `scores`
(N,) and `labels` (N,), the best first: those of `visionattn.models` and of torchvision.

Shapes: B batch, N boxes of an image, C channels, H × W the input, h × w a map; Q queries, M heads, L maps, K points.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.attention.self_attention.deformable import DeformableAttention
from visionattn.capture.recording import capture, place
from visionattn.capture.reductions import Full
from visionattn.capture.running import undisturbed
from visionattn.errors import DataError, UsageError, nearest
from visionattn.maps.method import Maps, Method, check_images, culprit, detach, stretch
from visionattn.maps.transformers.raw import RawAttention

SURE = 0.3
"""Score from which on a box is shown."""


@dataclass(frozen=True)
class BoxMaps:
    """The boxes of one image, and where the detector looked for each.

    Attributes:
        boxes: (N, 4) xyxy in pixels of the input, the best first.
        scores: (N,).
        labels: (N,) int64.
        heatmaps: (N, h, w) float32 in [0, 1], each spanning the whole input; 0 everywhere where the map is constant.
        raw: (N, h, w) float32, the same before.
        source: what is shown, e.g. `"score by features"`.
        method: name of the method.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    heatmaps: Tensor
    raw: Tensor
    source: str
    method: str


class BoxMethod(ABC):
    """Turns a detector and images into a heatmap for every box.

    Leaves the detector as it was, as `Method` does, and works under `torch.inference_mode` and `torch.no_grad`.
    """

    name: ClassVar[str]

    def __call__(
        self, detector: nn.Module, images_BCHW: Tensor, *, most: int = 10, lowest: float = SURE
    ) -> list[BoxMaps]:
        """Explain the best boxes of each image.

        Args:
            detector: see the top of this file.
            images_BCHW: normalised as the detector wants it.
            most: boxes an image.
            lowest: score of a box that is explained.

        Raises:
            UsageError: it is no detector, or the method does not fit it.
            DataError: the images or the weights hold NaN or infinity.
        """
        check_images(images_BCHW)
        if most < 1:
            raise UsageError(f"most must be at least one box, got {most}")
        with undisturbed(detector) as bare:
            images_BCHW = images_BCHW.clone() if images_BCHW.is_inference() else images_BCHW.detach()
            found, raws, source = self.explain(bare, images_BCHW, most, lowest)
        maps = []
        for some, raw_Nhw in zip(found, raws, strict=True):
            raw_Nhw = raw_Nhw.detach().float()
            if not raw_Nhw.isfinite().all():
                raise DataError(f"a {self.name} heatmap of {source} is not finite; {culprit(bare)}")
            heat_Nhw = stretch(raw_Nhw, self.name, source) if len(raw_Nhw) else raw_Nhw
            some = detach(some)
            maps.append(BoxMaps(some["boxes"], some["scores"], some["labels"], heat_Nhw, raw_Nhw, source, self.name))
        return maps

    @abstractmethod
    def explain(
        self, model: nn.Module, images_BCHW: Tensor, most: int, lowest: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], str]:
        """What was found in each image, its raw maps (N, h, w), and what they show."""


class ODAM(BoxMethod):
    """The gradient of a score times the activation (Zhao & Chan 2023, 2304.06354): relu(Σ_c ∂score/∂A_c · A_c).

    For any detector. Of a pyramid the map of every level is taken, shared out over the cells of the finest, and added;
    where a level ends behind the image, which is no multiple of its stride, the pyramid's `strides` tell it.
    Deviations from the paper: the gradient is not smoothed, and only the class score is explained, not the edges.

    Args:
        layer: name of a module that returns a map (B, C, h, w), or several in a list, tuple or dict, once a forward
            pass; None for the first that returns a list, tuple or dict of them: the pyramid, or the backbone.
    """

    name = "odam"

    def __init__(self, layer: str | None = None) -> None:
        self.layer = layer

    def explain(
        self, model: nn.Module, images_BCHW: Tensor, most: int, lowest: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], str]:
        name = self.layer or _first_with_maps(model, images_BCHW)
        names = dict(model.named_modules())
        if name not in names:
            raise UsageError(f"the detector has no layer {name!r}.{nearest(name, [n for n in names if n])}")
        with torch.enable_grad(), _cut(names[name], name) as leaves:
            found = [_best(some, most, lowest) for some in detect(model, images_BCHW)]
        if not leaves:
            raise UsageError(f"{name!r} did not run; name a layer that does")
        size = max((leaf.shape[2], leaf.shape[3]) for leaf in leaves)
        seen = _cells(names[name], leaves, (images_BCHW.shape[2], images_BCHW.shape[3]))
        raws = [leaves[0].new_zeros(len(some["scores"]), *size, dtype=torch.float32) for some in found]
        for rank in range(max((len(raw) for raw in raws), default=0)):
            with torch.enable_grad():
                score = torch.stack([some["scores"][rank] for some in found if len(some["scores"]) > rank]).sum()
            if not score.requires_grad:
                raise UsageError(f"no gradient of a score reaches {name}; the detector computes without gradients")
            gradients = torch.autograd.grad(score, leaves, retain_graph=True, allow_unused=True)
            for leaf, gradient, cells in zip(leaves, gradients, seen, strict=True):
                if gradient is None:
                    continue
                share = cells[0] * cells[1] / (size[0] * size[1])
                fine_Bhw = _enlarged((gradient * leaf).sum(1).relu().float(), size, cells)
                for raw_Nhw, fine_hw in zip(raws, fine_Bhw, strict=True):
                    if len(raw_Nhw) > rank:
                        raw_Nhw[rank] += share * fine_hw.detach()
        return found, raws, f"score by {name or 'the input'}"


class QuerySampling(BoxMethod):
    """Where the query of a box sampled the image: the weights of its deformable attention at their places.

    For detectors with `DeformableAttention` that tell the `index` of a box's query; layers, heads and maps are added.

    Args:
        layer: one of them, by its place in their order, −1 the last; None for all.
    """

    name = "sampling"

    def __init__(self, layer: int | None = None) -> None:
        self.layer = layer

    def explain(
        self, model: nn.Module, images_BCHW: Tensor, most: int, lowest: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], str]:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, DeformableAttention)}
        if not layers:
            raise UsageError(
                f"sampling needs deformable attention of queries; this {type(model).__name__} has none; odam fits"
            )
        if self.layer is not None:
            names = list(layers)
            name = names[place(self.layer, names)]
            layers = {name: layers[name]}
        seen: list[tuple[Tensor, Tensor]] = []
        sizes: list[tuple[int, int]] = []
        handles = []
        for module in layers.values():
            handles.append(module.register_forward_pre_hook(lambda _, args: sizes.extend(x.shape[2:] for x in args[2])))
            handles.append(module.sampling.register_forward_hook(lambda _, args, out: seen.append(out)))
        try:
            found = [_best(some, most, lowest) for some in detect(model, images_BCHW)]
        finally:
            for handle in handles:
                handle.remove()
        if any("index" not in some for some in found):
            raise UsageError(f"this {type(model).__name__} does not tell which query a box came from")
        size = max(sizes)
        raws = []
        for number, some in enumerate(found):
            query_N = some["index"]
            raw_Nhw = images_BCHW.new_zeros(len(query_N), *size, dtype=torch.float32)
            for places, weights in seen:
                splat(raw_Nhw, places[number, query_N].flatten(1, 3), weights[number, query_N].flatten(1))
            raws.append(raw_Nhw)
        return found, raws, "sampling of the query"


class BoxAttention(BoxMethod):
    """What the tokens inside of a box attend to in the backbone: the mean of their rows, over heads too.

    For detectors on a ViT, or another backbone with self-attention on a grid.

    Args:
        backbone: name of the backbone within the detector.
        layer: of those that attend, by name or place; −1 for the last.
    """

    name = "attention"

    def __init__(self, backbone: str = "features.backbone", layer: int | str = -1) -> None:
        self.backbone = backbone
        self.layer = layer

    def explain(
        self, model: nn.Module, images_BCHW: Tensor, most: int, lowest: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], str]:
        parts = dict(model.named_modules())
        if self.backbone not in parts:
            raise UsageError(f"the detector has no part {self.backbone!r}.{nearest(self.backbone, parts)}")
        found = [_best(some, most, lowest) for some in detect(model, images_BCHW)]
        try:
            with capture(parts[self.backbone], Full(), layers=[self.layer]) as records:
                parts[self.backbone](images_BCHW)
            record, keys, weights = records.kept()
        except UsageError as error:
            raise UsageError(f"{self.name} needs self-attention in {self.backbone}: {error}; odam fits") from error
        queries = record.queries
        if queries is None or record.windowed or queries.grid != keys.grid:
            raise UsageError(f"{record.name} does not attend from the whole grid to the whole grid; odam fits")
        h, w = queries.grid
        size = images_BCHW.shape[2], images_BCHW.shape[3]
        raws = []
        for number, some in enumerate(found):
            rows_QK = weights[number, 0].mean(0)  # over heads
            index_Q = queries.index_WN[0].to(rows_QK.device)
            y_Q, x_Q = (index_Q // w + 0.5) * size[0] / h, (index_Q % w + 0.5) * size[1] / w
            raw = []
            for box in some["boxes"]:
                inside_Q = (index_Q >= 0) & (x_Q >= box[0]) & (x_Q <= box[2]) & (y_Q >= box[1]) & (y_Q <= box[3])
                if not inside_Q.any():  # smaller than a token: the nearest
                    far_Q = (x_Q - (box[0] + box[2]) / 2).square() + (y_Q - (box[1] + box[3]) / 2).square()
                    inside_Q = far_Q == far_Q.masked_fill(index_Q < 0, torch.inf).min()
                raw.append(keys.to_grid(rows_QK[inside_Q].mean(0)[None, None])[0])
            raws.append(torch.stack(raw) if raw else rows_QK.new_zeros(0, h, w))
        return found, raws, f"attention of {record.name}"


class SameForAll(BoxMethod):
    """A method's heatmap of the whole image, for every box: of gates above all, which do not ask for what.

    Args:
        method: e.g. `Gate`.
    """

    name = "whole"

    def __init__(self, method: Method) -> None:
        if isinstance(method, RawAttention) and method.query is None:
            raise UsageError("BoxAttention shows the self-attention of a box's own tokens")
        self.method = method

    def explain(
        self, model: nn.Module, images_BCHW: Tensor, most: int, lowest: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], str]:
        found = [_best(some, most, lowest) for some in detect(model, images_BCHW)]
        maps = self.method(model, images_BCHW)
        raws = [raw_hw.expand(len(some["scores"]), -1, -1) for raw_hw, some in zip(maps.raw, found, strict=True)]
        return found, raws, maps.source


@dataclass(frozen=True)
class AllBoxes:
    """A method for boxes, called as one for whole images: a place is as hot as for the box that it is hottest for.

    The `output` of what it returns is a dict an image: `boxes`, `scores` and `labels` of the boxes that were explained,
    as `BoxMaps`, and their heatmaps as `maps` (N, h, w). A target, (B,) int64, leaves only the boxes of that class.

    Args:
        method: e.g. `ODAM`.
        most, lowest: as `BoxMethod` takes them.
    """

    method: BoxMethod
    most: int = 20
    lowest: float = SURE

    @property
    def name(self) -> str:
        return self.method.name

    def __call__(self, model: nn.Module, images_BCHW: Tensor, *, target: Tensor | None = None) -> Maps:
        found = self.method(model, images_BCHW, most=self.most, lowest=self.lowest)
        output: list[dict[str, Tensor]] = []
        heatmaps: list[Tensor] = []
        raws: list[Tensor] = []
        for number, some in enumerate(found):
            kept_N = torch.ones_like(some.labels, dtype=torch.bool) if target is None else some.labels == target[number]
            output.append(
                {
                    "boxes": some.boxes[kept_N],
                    "scores": some.scores[kept_N],
                    "labels": some.labels[kept_N],
                    "maps": some.heatmaps[kept_N],
                }
            )
            for hottest, maps_Nhw in ((heatmaps, some.heatmaps[kept_N]), (raws, some.raw[kept_N])):
                hottest.append(maps_Nhw.amax(0) if len(maps_Nhw) else maps_Nhw.new_zeros(maps_Nhw.shape[1:]))
        return Maps(torch.stack(heatmaps), torch.stack(raws), output, target, found[0].source, self.method.name)


BOX_METHODS: dict[str, type[BoxMethod]] = {method.name: method for method in (ODAM, QuerySampling, BoxAttention)}
"""Name on the command line → class."""


def default_box_method(detector: nn.Module) -> BoxMethod:
    """The method that says most of a detector: where its queries sampled, or the gradient of a box's score."""
    return QuerySampling() if any(isinstance(part, DeformableAttention) for part in detector.modules()) else ODAM()


def detect(model: nn.Module, images_BCHW: Tensor) -> list[dict[str, Tensor]]:
    """Run a detector.

    Raises:
        UsageError: what it returns is no list of detections.
    """
    takes_list = type(model).__module__.startswith("torchvision.models.detection")
    found: Any = model(list(images_BCHW) if takes_list else images_BCHW)
    keys = {"boxes", "scores", "labels"}
    if not isinstance(found, list) or not all(isinstance(some, dict) and keys <= some.keys() for some in found):
        raise UsageError(
            f"this {type(model).__name__} is no detector: it must return a list of dicts with boxes, scores and labels"
        )
    return found


def splat(raw_Nhw: Tensor, places_NP2: Tensor, weights_NP: Tensor) -> None:
    """Add weights to the four cells around their places, x and y as shares of the map, in place; outside is lost."""
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


def _best(found: dict[str, Tensor], most: int, lowest: float) -> dict[str, Tensor]:
    count = min(most, int((found["scores"].detach() >= lowest).sum()))
    return {name: value[:count] for name, value in found.items()}


@contextlib.contextmanager
def _cut(module: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Make the maps that a module returns leaves of the graph, and yield them."""
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: Any, out: Any) -> Any:
        maps = list(_maps(out))
        if not maps:
            raise UsageError(f"{name!r} returns no maps (B, C, h, w); name a layer that does")
        if leaves:
            raise UsageError(f"{name!r} runs more than once a forward pass; name a layer that runs once")
        leaves.extend(x.detach().requires_grad_() for x in maps)
        after = iter(leaves)
        return _replaced(out, after)

    handle = module.register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


def _cells(module: nn.Module, leaves: Sequence[Tensor], size: tuple[int, int]) -> list[tuple[float, float]]:
    """Rows and columns of each map that the image has."""
    strides = getattr(module, "strides", ())
    if len(strides) != len(leaves):
        return [(leaf.shape[2], leaf.shape[3]) for leaf in leaves]
    return [(size[0] / stride, size[1] / stride) for stride in strides]


def _enlarged(map_Bhw: Tensor, size: tuple[int, int], cells: tuple[float, float]) -> Tensor:
    """The first `cells` rows and columns of a map at another size, bilinear between the centres of cells."""
    ratio_y, ratio_x = cells[0] / map_Bhw.shape[1], cells[1] / map_Bhw.shape[2]
    to_map = map_Bhw.new_tensor([[ratio_x, 0, ratio_x - 1], [0, ratio_y, ratio_y - 1]]).expand(len(map_Bhw), 2, 3)
    grid = F.affine_grid(to_map, [len(map_Bhw), 1, *size], align_corners=False)
    return F.grid_sample(map_Bhw[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


def _maps(out: Any) -> Sequence[Tensor]:
    values = list(out.values()) if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else [out]
    return values if all(isinstance(x, Tensor) and x.ndim == 4 for x in values) else []


def _replaced(out: Any, leaves: Iterator[Tensor]) -> Any:
    # a clone, so that an in-place activation that follows neither fails nor spoils the leaf
    if isinstance(out, dict):
        return type(out)((key, next(leaves).clone()) for key in out)
    return type(out)(x.clone() for x in leaves) if isinstance(out, (list, tuple)) else next(leaves).clone()


def _first_with_maps(model: nn.Module, images_BCHW: Tensor) -> str:
    """Name of the first module, outer ones before inner ones, that returns maps in a list, tuple or dict."""
    several: set[nn.Module] = set()

    def look(module: nn.Module, _: Any, out: Any) -> None:
        if isinstance(out, (list, tuple, dict)) and len(_maps(out)):
            several.add(module)

    handles = [module.register_forward_hook(look) for module in model.modules()]
    try:
        detect(model, images_BCHW[:1])
    finally:
        for handle in handles:
            handle.remove()
    for name, module in model.named_modules():
        if module in several:
            return name
    raise UsageError(f"no part of this {type(model).__name__} returns a list of maps; give the layer to look at")
