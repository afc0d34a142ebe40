"""What an export does to one image, or to one batch of them."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from visionattn.data.decode import read_image, write_image
from visionattn.data.placement import Placement, Preprocess
from visionattn.errors import DataError, UsageError
from visionattn.maps.base import Maps, scores_of
from visionattn.overlay.render import Style, peak, render
from visionattn.overlay.text import printable

_KEPT_BYTES = 192 << 20  # decoded pictures that wait for their heatmap; beyond it they are read a second time

Explain = Callable[..., Maps]
"""A method of `visionattn.maps`, or anything that is called like one: (model, images_BCHW, target=…) → Maps."""


@dataclass
class Read:
    """An image on its way.

    Attributes:
        stamp: size and time of change of the file.
        tensor: (3, height, width), what the model takes.
        placement: of the source in it.
        picture: (H, W, 3), the source itself; None where there was no room to keep it, and it must be read again.
    """

    path: str
    stamp: tuple[int, int]
    tensor: NDArray[np.float32] | None
    placement: Placement
    picture: NDArray[np.uint8] | None


@dataclass
class Explained:
    """What was found in an image, and what the manifest says of it."""

    heatmap_hw: NDArray[np.float32]
    facts: dict[str, Any]


@dataclass(eq=False)
class Job:
    """What all images have in common; `read` and `write` are called by threads, `explain` by one.

    Attributes:
        folder: where outputs go; absolute.
        names: image → its output, below `folder`, with / between folders.
        recipe: see `recipe.recipe_of`.
        The others are as `export` takes them.
    """

    model: nn.Module
    preprocess: Preprocess
    method: Explain
    target: int | None
    class_names: tuple[str, ...]
    model_name: str
    style: Style
    max_pixels: int
    recipe: str
    folder: str
    names: dict[str, str]

    def __post_init__(self) -> None:
        self._kept = 0
        self._lock = threading.Lock()

    def read(self, path: str) -> Read | dict[str, Any]:
        try:
            stamp = stamp_of(path)
            picture_HWC = read_image(path, max_pixels=self.max_pixels)
            input_CHW, placement = self.preprocess(picture_HWC)
        except Exception as error:  # whatever one file leads to, the others go on
            return self.failure(path, _reason(error, path))
        with self._lock:
            keep = self._kept + picture_HWC.nbytes <= _KEPT_BYTES
            self._kept += picture_HWC.nbytes if keep else 0
        return Read(path, stamp, input_CHW, placement, picture_HWC if keep else None)

    def explain(self, batch: Sequence[Read]) -> list[Explained | dict[str, Any]]:
        """Explain a batch; where that fails for its data, one image at a time, to find whose."""
        images_BCHW = torch.from_numpy(np.stack([image.tensor for image in batch if image.tensor is not None]))
        like = next(self.model.parameters(), None)
        if like is not None:
            images_BCHW = images_BCHW.to(like.device, like.dtype)
        started = time.perf_counter()
        try:
            maps = self.method(self.model, images_BCHW, target=self.target)
            heatmaps_Bhw = maps.heatmaps.detach().float().cpu().numpy()
            predictions = self._predictions(maps.output, len(batch))
        except DataError as error:
            if len(batch) == 1:
                return [self.failure(batch[0].path, _reason(error, batch[0].path))]
            return [result for image in batch for result in self.explain([image])]
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"{len(batch)} images at once do not fit the device's memory; take a smaller batch size"
            ) from error
        seconds = round((time.perf_counter() - started) / len(batch), 6)
        targets = [None] * len(batch) if maps.target is None else maps.target.tolist()
        for image in batch:
            image.tensor = None
        told = {"model": self.model_name, "method": maps.method, "layer": maps.source}
        return [
            Explained(heatmap_hw, {**told, "target": goal, **prediction, "seconds": seconds})
            for heatmap_hw, goal, prediction in zip(heatmaps_Bhw, targets, predictions, strict=True)
        ]

    def write(self, image: Read, explained: Explained) -> dict[str, Any]:
        name = self.names[image.path]
        try:
            picture_HWC = image.picture
            if picture_HWC is None:
                picture_HWC = read_image(image.path, max_pixels=self.max_pixels)
            overlay_HWC = render(picture_HWC, explained.heatmap_hw, image.placement, self.style)
            place = os.path.join(self.folder, *name.split("/"))
            self._make_folder(os.path.dirname(place))
            write_image(place, overlay_HWC)
            hottest = peak(explained.heatmap_hw, image.placement)
        except Exception as error:  # a full disk, a file that was changed meanwhile
            return self.failure(image.path, _reason(error, image.path))
        finally:
            self.let_go(image)
        height, width = image.placement.source_size
        return {
            **self._about(image.path, image.stamp),
            "status": "done",
            "outputs": {"overlay": name},
            "width": width,
            "height": height,
            **explained.facts,
            "peak": hottest and [round(place, 1) for place in hottest],
        }

    def failure(self, path: str, reason: str) -> dict[str, Any]:
        try:
            stamp = stamp_of(path)
        except OSError:
            stamp = 0, 0
        return {**self._about(path, stamp), "status": "failed", "reason": reason}

    def _about(self, path: str, stamp: tuple[int, int]) -> dict[str, Any]:
        return {"source": path, "bytes": stamp[0], "modified": stamp[1], "recipe": self.recipe}

    def let_go(self, image: Read) -> None:
        if image.picture is not None:
            with self._lock:
                self._kept -= image.picture.nbytes
            image.picture = None

    def _make_folder(self, folder: str) -> None:
        real, top = os.path.realpath(folder), os.path.realpath(self.folder)
        if os.path.commonpath([real, top]) != top:
            raise DataError(f"{printable(folder)} is a link that leads out of {printable(self.folder)}")
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise DataError(f"{printable(folder)} cannot be made: {error.strerror or error}") from error

    def _predictions(self, output: Any, count: int) -> list[dict[str, Any]]:
        nothing = {"prediction": None, "class": None, "probability": None}
        if getattr(self.model, "num_classes", None) == 0:  # what a timm model without its head returns are features
            return [nothing] * count
        try:
            scores_BK: Tensor = scores_of(output)
        except UsageError:
            return [nothing] * count
        if self.class_names and len(self.class_names) != scores_BK.shape[1]:
            raise UsageError(
                f"there are {len(self.class_names)} class names, and the model has {scores_BK.shape[1]} outputs"
            )
        if scores_BK.shape[1] < 2:
            return [nothing] * count
        probability_B, index_B = scores_BK.float().softmax(1).max(1)
        return [
            {
                "prediction": index,
                "class": self.class_names[index] if self.class_names else None,
                "probability": round(probability, 6) if np.isfinite(probability) else None,
            }
            for index, probability in zip(index_B.tolist(), probability_B.tolist(), strict=True)
        ]


def stamp_of(path: str) -> tuple[int, int]:
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


def _reason(error: Exception, path: str) -> str:
    """Why, without the name of the file, which stands beside it."""
    if isinstance(error, DataError):
        text = str(error)
        for beginning in (f"{path}: ", f"{path} "):
            text = text.removeprefix(beginning)
        return text
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, MemoryError):
        return "no memory for it"
    return f"{type(error).__name__}: {error}"
