"""Sheets of a batch's images with their heatmaps, for the callbacks."""

import dataclasses
import warnings
from collections.abc import Sequence

import lightning as L
import numpy as np
from numpy.typing import NDArray

from visionattn.data import Batch, visible
from visionattn.drawing import Tile, blend, boxes_in_source, draw_boxes, draw_scanpath, fit_to_side, sheet
from visionattn.errors import MapWarning, UsageError
from visionattn.maps import (
    BoxHeatmaps,
    BoxMethod,
    Heatmaps,
    Method,
    SameForAllBoxes,
    default_box_method,
    default_method,
)
from visionattn.training.callbacks.run_files import SourceImages, class_names_of, network_of

BatchHeatmaps = Heatmaps | list[BoxHeatmaps]
"""Heatmaps of a classifier's batch, or those of each image of a detector's batch."""

_TRUTH = (255, 255, 255)
_WIDTH = 200  # pixels of a picture
_GAZE_SIDE = 240  # pixels of a picture with a path, so that its numbers can be read
_BOXES_SIDE = 320  # pixels of a picture with boxes, so that labels do not hide each other


def explain(method: Method | BoxMethod | None, pl_module: L.LightningModule, batch: Batch) -> BatchHeatmaps:
    """Explain a batch: the best boxes of a detector, or the whole images of another network.

    Args:
        method: heatmap method; None for one that fits the network.
        pl_module: the task.
        batch: of the data.

    Raises:
        UsageError: the method does not fit the network.
    """
    images, network = batch["image"].float(), network_of(pl_module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapWarning)  # early in a training heatmaps are often constant
        if "boxes" not in batch:
            if isinstance(method, BoxMethod):
                raise UsageError(f"{method.name} explains the boxes of a detector; take a method for whole images")
            return (method or chosen(pl_module, batch))(network, images)
        of_boxes = SameForAllBoxes(method) if isinstance(method, Method) else method or default_box_method(network)
        return of_boxes(network, images)


def chosen(pl_module: L.LightningModule, batch: Batch) -> Method:
    """Return the default method for whole images."""
    return default_method(network_of(pl_module), batch["image"].float())


def picture_of(
    batch: Batch, maps: BatchHeatmaps, pl_module: L.LightningModule, dataset: SourceImages, title: str
) -> NDArray[np.uint8]:
    """Draw a sheet of the batch's images, each next to its overlay.

    Args:
        batch: of the data.
        maps: of the batch, by `explain`.
        pl_module: the task.
        dataset: reads the source images.
        title: of the sheet.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    names = class_names_of(pl_module)
    if isinstance(maps, list):
        tiles = _box_tiles(batch, maps, names, dataset)
        # not scaled, so that lines and labels stay sharp
        return sheet(tiles, title=title, columns=4, width=max(tiles[0].picture.shape[:2]))
    tiles, width = _tiles(batch, maps, names, dataset)
    return sheet(tiles, title=title, columns=6 if len(tiles) > 4 else len(tiles), width=width)


def _tiles(batch: Batch, maps: Heatmaps, names: Sequence[str], dataset: SourceImages) -> tuple[list[Tile], int]:
    """Return the tiles and their width: each image with its prediction and glimpses, then its overlay."""
    names = names or [str(index) for index in range(maps.output.shape[-1])]
    probabilities, answers = maps.output.float().softmax(-1).cpu().max(-1)
    tiles, width = [], _WIDTH
    for index, heatmap_hw in enumerate(maps.heatmaps.float().cpu().numpy()):
        placement = batch["placement"][index]
        picture = dataset.read_source(batch["path"][index])
        box = None
        if "box" in batch:
            box = placement.boxes_to_source(batch["box"][index].cpu().numpy())[0].tolist()
        truth, answer = int(batch["label"][index]), int(answers[index])
        caption = [f"{names[answer]} {probabilities[index]:.2f}", f"is {names[truth]}"]
        overlay = blend(picture, placement.carry(heatmap_hw), seen_HW=placement.seen())
        tile = Tile(picture, caption, answer == truth, box)
        other = dataclasses.replace(tile, picture=overlay, caption=[])
        if maps.boxes is not None:
            drawn = draw_scanpath(picture, boxes_in_source(maps.boxes[index].cpu().numpy(), placement), side=_GAZE_SIDE)
            width = max(drawn.shape[:2]) if index == 0 else width  # not scaled, so that lines stay sharp
            scale = max(drawn.shape[:2]) / max(picture.shape[:2])
            tile = dataclasses.replace(tile, picture=drawn, box=box and [edge * scale for edge in box])
        tiles += [tile, other]
    return tiles, width


def _box_tiles(batch: Batch, maps: Sequence[BoxHeatmaps], names: Sequence[str], dataset: SourceImages) -> list[Tile]:
    """Return the tiles: each image with its detected boxes, and its true boxes in white; then the heat of all boxes."""
    tiles = []
    for index, found in enumerate(maps):
        placement = batch["placement"][index]
        picture = dataset.read_source(batch["path"][index])
        truth, answers = (
            placement.boxes_to_source(edges.cpu().numpy()) for edges in (batch["boxes"][index], found.boxes)
        )
        seen = visible(answers)  # without boxes that lie in the padding only
        drawn, edges = fit_to_side(picture, np.concatenate([truth, answers[seen]]), _BOXES_SIDE)
        drawn = draw_boxes(drawn, edges[: len(truth)], colours=[_TRUTH])
        labels = [
            f"{names[label] if names else label} {score:.2f}"
            for label, score in zip(found.labels.cpu()[seen].tolist(), found.scores.cpu()[seen].tolist(), strict=True)
        ]
        drawn = draw_boxes(drawn, edges[len(truth) :], labels=labels)
        caption = [f"surest {len(labels)}", f"{len(truth)} there"]
        tiles.append(Tile(drawn, caption))
        heat_hw = found.heatmaps.cpu()[seen].amax(0).numpy() if len(labels) else np.zeros((1, 1), np.float32)
        tiles.append(Tile(blend(picture, placement.carry(heat_hw), seen_HW=placement.seen())))
    return tiles
