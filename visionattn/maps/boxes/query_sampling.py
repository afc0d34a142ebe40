"""Where the query of a box samples the image.

Shapes: B batch, N boxes of an image, H × W the input, h × w a map; Q queries, M heads, L maps, K points.
"""

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from visionattn.attention import DeformableAttention
from visionattn.capture import place
from visionattn.errors import UsageError
from visionattn.maps.boxes.box_method import BoxMethod, best_boxes, detect


class QuerySampling(BoxMethod):
    """Where the query of a box samples the image: its deformable attention weights at the sampled positions.

    For detectors whose decoder has `DeformableAttention`, or transformers' `MultiScaleDeformableAttention` (Deformable
    DETR, RT-DETR, RF-DETR, LW-DETR). Their detections must also hold `index` (N,), the query of each box. The weights
    of all layers, heads and maps are added.

    Args:
        layer: index of one layer of deformable attention in the decoder, −1 for the last (default: all layers).
    """

    name = "sampling"

    def __init__(self, layer: int | None = None) -> None:
        self.layer = layer

    def explain(
        self, model: nn.Module, images_BCHW: Tensor, max_boxes: int, min_score: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], str]:
        layers = {name: module for name, module in model.named_modules() if _samples(name, module)}
        if not layers:
            raise UsageError(
                f"the method sampling needs queries with deformable attention; this {type(model).__name__} has "
                "none; use odam"
            )
        if self.layer is not None:
            names = list(layers)
            name = names[place(self.layer, names)]
            layers = {name: layers[name]}
        found: list[_Samples] = []
        handles = [handle for module in layers.values() for handle in _record(module, found)]
        try:
            detections = [best_boxes(detected, max_boxes, min_score) for detected in detect(model, images_BCHW)]
        finally:
            for handle in handles:
                handle.remove()
        if any("index" not in detected for detected in detections):
            raise UsageError(
                f"the detections of this {type(model).__name__} do not hold the index of each box's query; use odam"
            )
        size = max(size for samples in found for size in samples.sizes)
        raws = []
        for number, detected in enumerate(detections):
            query_N = detected["index"]
            raw_Nhw = images_BCHW.new_zeros(len(query_N), *size, dtype=torch.float32)
            for samples in found:
                places, weights = samples.places_BQMLK2[number, query_N], samples.weights_BQMLK[number, query_N]
                splat(raw_Nhw, places.flatten(1, 3), weights.flatten(1))
            raws.append(raw_Nhw)
        return detections, raws, "sampling of the query"


class _Samples(NamedTuple):
    """The samples of one layer: positions (x, y) in fractions of the image, their weights, and (h, w) of each map."""

    places_BQMLK2: Tensor  # noqa: N815 - a shape suffix
    weights_BQMLK: Tensor  # noqa: N815
    sizes: list[tuple[int, int]]


def _samples(name: str, module: nn.Module) -> bool:
    """Return whether a module is deformable attention of queries; in an encoder, the queries are the pixels."""
    return isinstance(module, DeformableAttention) or (
        type(module).__name__ == "MultiScaleDeformableAttention" and "decoder" in name.split(".")
    )


def _record(module: nn.Module, found: list[_Samples]) -> list[RemovableHandle]:
    """Append the samples of each call of a module to a list, until the handles are removed."""
    if not isinstance(module, DeformableAttention):
        signature = inspect.signature(module.forward)

        def note(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            given = signature.bind(*args, **kwargs).arguments
            sizes = [(int(height), int(width)) for height, width in given["value_spatial_shapes_list"]]
            found.append(_Samples(given["sampling_locations"].detach(), given["attention_weights"].detach(), sizes))

        return [module.register_forward_pre_hook(note, with_kwargs=True)]
    sizes: list[tuple[int, int]] = []

    def keep(_: nn.Module, __: object, out: tuple[Tensor, Tensor]) -> None:
        found.append(_Samples(*out, sizes))

    return [
        module.register_forward_pre_hook(lambda _, args: sizes.extend(x.shape[2:] for x in args[2])),
        module.sampling.register_forward_hook(keep),
    ]


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
