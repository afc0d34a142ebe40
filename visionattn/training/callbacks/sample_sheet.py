"""Sheets of a batch's images with their heatmaps, for the callbacks."""

import dataclasses
import warnings
from collections.abc import Sequence

import lightning as L
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from visionattn.data import Batch, visible
from visionattn.drawing import Style, Tile, blend, boxes_in_source, draw_boxes, draw_scanpath, fit_to_side, sheet
from visionattn.errors import MapWarning, UsageError
from visionattn.maps import (
    BoxHeatmaps,
    BoxMethod,
    Heatmaps,
    Method,
    SameForAllBoxes,
    default_box_method,
    default_method,
    label_threshold,
    probabilities_of,
    scores_of,
)
from visionattn.overlays import labels_above
from visionattn.training.callbacks.run_files import SourceImages, class_names_of, images_of, network_of

BatchHeatmaps = Heatmaps | list[BoxHeatmaps]
"""Heatmaps of a classifier's batch, or the heatmaps of the boxes in each image of a detector's batch."""

_TRUTH = (255, 255, 255)  # colour of the true boxes
_WIDTH = 200  # width of a picture, pixels
_GAZE_SIDE = 240  # longer side of a picture with a scanpath, pixels; large enough to read the numbers of the glimpses
_BOXES_SIDE = 320  # longer side of a picture with boxes, pixels; large enough that labels rarely overlap


def explain(method: Method | BoxMethod | None, pl_module: L.LightningModule, batch: Batch) -> BatchHeatmaps:
    """Return the heatmaps of a batch: for a detector, of its best boxes; for other networks, of whole images.

    Args:
        method: heatmap method; None for a method that fits the network.
        pl_module: the task.
        batch: of the data.

    Raises:
        UsageError: the method does not fit the network.
    """
    images, network = images_of(pl_module, batch), network_of(pl_module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapWarning)  # heatmaps are often constant at the beginning of training
        if "boxes" not in batch:
            if isinstance(method, BoxMethod):
                raise UsageError(f"{method.name} explains the boxes of a detector; use a method for whole images")
            return (method or chosen(pl_module, batch))(network, images)
        of_boxes = SameForAllBoxes(method) if isinstance(method, Method) else method or default_box_method(network)
        return of_boxes(network, images)


def chosen(pl_module: L.LightningModule, batch: Batch) -> Method:
    """Return the default method for whole images."""
    return default_method(network_of(pl_module), images_of(pl_module, batch))


def picture_of(
    batch: Batch, maps: BatchHeatmaps, pl_module: L.LightningModule, dataset: SourceImages, title: str
) -> NDArray[np.uint8]:
    """Draw a sheet of the batch's images, each next to its overlay.

    Args:
        batch: of the data.
        maps: heatmaps of the batch, returned by `explain`.
        pl_module: the task.
        dataset: reads the source images.
        title: of the sheet.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    names = class_names_of(pl_module)
    if isinstance(maps, list):
        tiles = _box_tiles(batch, maps, names, dataset)
        # the sheet does not scale the tiles, since scaling would blur lines and labels
        return sheet(tiles, title=title, columns=4, width=max(tiles[0].picture.shape[:2]))
    tiles, width = _tiles(batch, maps, pl_module, dataset)
    return sheet(tiles, title=title, columns=6 if len(tiles) > 4 else len(tiles), width=width)


def _tiles(batch: Batch, maps: Heatmaps, pl_module: L.LightningModule, dataset: SourceImages) -> tuple[list[Tile], int]:
    """Return the tiles and their width; per image two tiles: with its prediction and scanpath, and with its heatmap."""
    names, network = class_names_of(pl_module), network_of(pl_module)
    probabilities_BK = _probabilities(network, maps.output)
    tiles, width = [], _WIDTH
    for index, heatmap_hw in enumerate(maps.heatmaps.float().cpu().numpy()):
        placement = batch["placement"][index]
        picture = dataset.read_source(batch["path"][index])
        box = None
        if "box" in batch:
            box = placement.boxes_to_source(batch["box"][index].float().cpu().numpy())[0].tolist()
        probability_K = None if probabilities_BK is None else probabilities_BK[index]
        caption, right = _caption(probability_K, label_threshold(network), batch, index, names)
        overlay = blend(picture, placement.carry(heatmap_hw, Style.interpolation), seen_HW=placement.seen())
        tile = Tile(picture, caption, right, box)
        other = dataclasses.replace(tile, picture=overlay, caption=[])
        if maps.boxes is not None:
            drawn = draw_scanpath(picture, boxes_in_source(maps.boxes[index].cpu().numpy(), placement), side=_GAZE_SIDE)
            width = max(drawn.shape[:2]) if index == 0 else width  # no scaling, which would blur the lines
            scale = max(drawn.shape[:2]) / max(picture.shape[:2])
            tile = dataclasses.replace(tile, picture=drawn, box=box and [edge * scale for edge in box])
        tiles += [tile, other]
    return tiles, width


def _probabilities(network: nn.Module, output: object) -> Tensor | None:
    """Return the (B, K) probabilities on the CPU; None if the model is no classifier."""
    try:
        return probabilities_of(network, scores_of(output).float()).cpu()
    except UsageError:
        return None


def _caption(
    probability_K: Tensor | None, threshold: float | None, batch: Batch, index: int, names: Sequence[str]
) -> tuple[list[str], bool | None]:
    """Return the lines below a picture, and whether the answer is right; None if the label or the answer is unknown.

    Args:
        probability_K: the probabilities of the classes; None if the model is no classifier.
        threshold: probability from which a label counts as found; None if an image has exactly one class.
        batch: of the data.
        index: of the image in the batch.
        names: of the classes; empty if they are unknown, and then their numbers are shown.
    """
    lines: list[str] = []
    found: tuple[tuple[str, float], ...] = ()
    if probability_K is not None:
        names = names or [str(number) for number in range(len(probability_K))]
        if threshold is None:
            highest, answer = probability_K.max(0)
            found = ((names[int(answer)], float(highest)),)
        else:
            found = labels_above(threshold, probability_K, names)
        value = f" {found[0][1]:.2f}" if len(found) == 1 else ""  # there is no room for several
        lines.append((", ".join(name for name, _ in found) or "no label") + value)
    if "label" not in batch:
        return lines, None
    label = batch["label"][index].cpu()
    numbers = label.nonzero()[:, 0].tolist() if label.ndim else [int(label)]
    true = [names[number] if names else str(number) for number in numbers]
    lines.append(f"is {', '.join(true)}" if true else "has no label")
    return lines, None if probability_K is None else {name for name, _ in found} == set(true)


def _box_tiles(batch: Batch, maps: Sequence[BoxHeatmaps], names: Sequence[str], dataset: SourceImages) -> list[Tile]:
    """Return two tiles per image: its detected boxes and its true boxes (white), and the maximum of its heatmaps."""
    tiles = []
    for index, found in enumerate(maps):
        placement = batch["placement"][index]
        picture = dataset.read_source(batch["path"][index])
        truth, answers = (
            placement.boxes_to_source(edges.cpu().numpy()) for edges in (batch["boxes"][index], found.boxes)
        )
        kept = visible(answers)  # boxes that lie only in the padding are left out
        drawn, edges = fit_to_side(picture, np.concatenate([truth, answers[kept]]), _BOXES_SIDE)
        drawn = draw_boxes(drawn, edges[: len(truth)], colours=[_TRUTH])
        labels = [
            f"{names[label] if names else label} {score:.2f}"
            for label, score in zip(found.labels.cpu()[kept].tolist(), found.scores.cpu()[kept].tolist(), strict=True)
        ]
        drawn = draw_boxes(drawn, edges[len(truth) :], labels=labels)
        caption = [f"{len(labels)} detected", f"{len(truth)} annotated"]
        tiles.append(Tile(drawn, caption))
        heat_hw = found.heatmaps.cpu()[kept].amax(0).numpy() if len(labels) else np.zeros((1, 1), np.float32)
        tiles.append(Tile(blend(picture, placement.carry(heat_hw, Style.interpolation), seen_HW=placement.seen())))
    return tiles
