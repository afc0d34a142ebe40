"""Pictures of what a network sees, for the callbacks."""

import dataclasses
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionattn.data.annotations.boxes import visible
from visionattn.drawing.boxes import draw_boxes, fitted
from visionattn.drawing.overlay import blend
from visionattn.drawing.scanpath import boxes_in_source, draw_gaze
from visionattn.drawing.sheets import Tile, sheet
from visionattn.errors import MapWarning
from visionattn.maps import Maps, Method, default_method
from visionattn.maps.boxes import BoxMaps, BoxMethod, SameForAll, default_box_method

Explained = Maps | list[BoxMaps]
"""Of a classifier, and of a detector."""

_TRUTH = (255, 255, 255)
_WIDTH = 200  # pixels of a picture
_GAZE_SIDE = 240  # pixels of one with a path, whose numbers are to be read
_BOXES_SIDE = 320  # pixels of one with boxes, whose labels must not hide each other


def explain(method: Method | BoxMethod | None, pl_module: Any, batch: dict[str, Any]) -> Explained:
    """Explain a batch: of a detector its best boxes, of other networks the whole images."""
    images, network = batch["image"].float(), pl_module.network
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapWarning)  # maps of a network that has not learned yet are often flat
        if "boxes" not in batch:
            return chosen(method, pl_module, batch)(network, images)
        of_boxes = SameForAll(method) if isinstance(method, Method) else method or default_box_method(network)
        return of_boxes(network, images)


def chosen(method: Any, pl_module: Any, batch: dict[str, Any]) -> Any:
    """The method for whole images, or what fits the network."""
    return method or default_method(pl_module.network, batch["image"].float())


def picture_of(batch: dict[str, Any], found: Explained, pl_module: Any, dataset: Any, title: str) -> NDArray[np.uint8]:
    """A sheet of the batch's images, each beside its overlay."""
    names = getattr(pl_module, "class_names", ())
    if isinstance(found, list):
        tiles = _box_tiles(batch, found, names, dataset)
        # at their own size lines and labels stay sharp
        return sheet(tiles, title=title, columns=4, width=max(tiles[0].picture.shape[:2]))
    tiles, width = _tiles(batch, found, names, dataset)
    return sheet(tiles, title=title, columns=6 if len(tiles) > 4 else len(tiles), width=width)


def _tiles(batch: dict[str, Any], maps: Maps, names: Any, dataset: Any) -> tuple[list[Tile], int]:
    """Each image with its answer, and where glimpses were taken their path; its overlay; and the width they need."""
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
            drawn = draw_gaze(picture, boxes_in_source(maps.boxes[index].cpu().numpy(), placement), side=_GAZE_SIDE)
            width = max(drawn.shape[:2]) if index == 0 else width  # at its own size, its lines stay sharp
            scale = max(drawn.shape[:2]) / max(picture.shape[:2])
            tile = dataclasses.replace(tile, picture=drawn, box=box and [edge * scale for edge in box])
        tiles += [tile, other]
    return tiles, width


def _box_tiles(batch: dict[str, Any], found: list[BoxMaps], names: Any, dataset: Any) -> list[Tile]:
    """The boxes that were found, with their scores, the true ones in white; and the hottest of their heatmaps."""
    tiles = []
    for index, some in enumerate(found):
        placement = batch["placement"][index]
        picture = dataset.read_source(batch["path"][index])
        truth, answers = (
            placement.boxes_to_source(edges.cpu().numpy()) for edges in (batch["boxes"][index], some.boxes)
        )
        seen = visible(answers)  # not those in the padding alone
        drawn, edges = fitted(picture, np.concatenate([truth, answers[seen]]), _BOXES_SIDE)
        drawn = draw_boxes(drawn, edges[: len(truth)], colours=[_TRUTH])
        labels = [
            f"{names[label] if names else label} {score:.2f}"
            for label, score in zip(some.labels.cpu()[seen].tolist(), some.scores.cpu()[seen].tolist(), strict=True)
        ]
        drawn = draw_boxes(drawn, edges[len(truth) :], labels=labels)
        caption = [f"surest {len(labels)}", f"{len(truth)} there"]
        tiles.append(Tile(drawn, caption))
        heat_hw = some.heatmaps.cpu()[seen].amax(0).numpy() if len(labels) else np.zeros((1, 1), np.float32)
        tiles.append(Tile(blend(picture, placement.carry(heat_hw), seen_HW=placement.seen())))
    return tiles
