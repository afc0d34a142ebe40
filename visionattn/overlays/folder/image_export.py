"""What an export does to one image, or to one batch of them."""

import contextlib
import hashlib
import io
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visionattn.capture.running import unwrap
from visionattn.data.decode import encode_image, read_image
from visionattn.data.image_files import VIDEOS
from visionattn.data.image_list import Wish
from visionattn.data.placement import Placement
from visionattn.drawing.rendering import Style, peak, unlike
from visionattn.drawing.scanpath import boxes_in_source, centres
from visionattn.errors import DataError, UsageError
from visionattn.files import Replacement, printable
from visionattn.overlays.explainer import View, looks_of, predictions_of
from visionattn.overlays.outputs import KINDS, Look, Made, Scene
from visionattn.overlays.per_box import has_maps

_KEPT_BYTES = 192 << 20  # decoded pictures that wait for their heatmap; beyond it they are read a second time


@dataclass(eq=False)
class Read:
    """An image, or a frame of a video, on its way.

    Attributes:
        stamp: size and time of change of the file.
        prepared: for each view, (3, height, width) and the placement of the source in it; emptied once explained.
        picture: (H, W, 3), the source itself; None where there was no room to keep it, and it must be read again.
        clip: the video it is a frame of.
        at: seconds from its start.
    """

    path: str
    stamp: tuple[int, int]
    prepared: list[tuple[NDArray[np.float32], Placement]]
    picture: NDArray[np.uint8] | None
    clip: Any = None
    at: float = 0.0


@dataclass
class Explained:
    """What was found in an image, and what the manifest says of it."""

    looks: list[Look]
    facts: dict[str, Any]


@dataclass(eq=False)
class Job:
    """What all images have in common; `read`, `draw` and `write` are called by threads, `explain` by one.

    Attributes:
        views: ways to look at each image.
        compared: whether the two views are held against each other.
        kinds: what to make, see `kinds.KINDS`.
        target: the output to explain; every image's highest by default.
        folder: where outputs go; absolute.
        names: image → kind → its output, below `folder`, with / between folders.
        wishes: image → what a list says of it.
        recipe: see `recipe.recipe_of`.
        fps: frames a second that are taken of a video; None for all.
        bf16: whether models run under autocast to bfloat16.
        earlier: image → outputs of the same recipe that stand already.
    """

    views: Sequence[View]
    compared: bool
    kinds: Sequence[str]
    target: int | str | None
    style: Style
    max_pixels: int
    recipe: str
    folder: str
    names: dict[str, dict[str, str]] = field(default_factory=dict)
    wishes: dict[str, Wish] = field(default_factory=dict)
    earlier: dict[str, dict[str, str]] = field(default_factory=dict)
    fps: float | None = None
    bf16: bool = False

    def __post_init__(self) -> None:
        self._kept = 0
        self._lock = threading.Lock()

    def told(self, path: str) -> dict[str, Any]:
        """All that sets one image apart, as plain data."""
        wish = self.wishes.get(path)
        return {
            "path": path,
            "names": self.names[path],
            "earlier": self.earlier.get(path, {}),
            "wish": wish and [wish.target, wish.boxes, wish.labels],
        }

    def take(self, told: Mapping[str, Any]) -> str:
        """Learn of an image what `told` says, in another process perhaps; returns its path."""
        path = str(told["path"])
        self.names[path], self.earlier[path] = told["names"], told["earlier"]
        if told["wish"]:
            target, boxes, labels = told["wish"]
            self.wishes[path] = Wish(target, tuple(map(tuple, boxes)), tuple(labels))
        return path

    def read(self, path: str) -> Read | dict[str, Any]:
        try:
            stamp = stamp_of(path)
            for view in self.views:
                view.target(self.wishes.get(path, Wish()).target)
            return self.prepare(path, stamp, read_image(path, max_pixels=self.max_pixels))
        except Exception as error:  # whatever one file leads to, the others go on
            return self.failure(path, reason_of(error, path))

    def prepare(self, path: str, stamp: tuple[int, int], picture_HWC: NDArray[np.uint8], **frame: Any) -> Read:
        prepared: list[tuple[NDArray[np.float32], Placement]] = []
        for number, view in enumerate(self.views):
            alike = [k for k in range(number) if self.views[k].preprocess == view.preprocess]
            prepared.append(prepared[alike[0]] if alike else view.preprocess(picture_HWC))
        with self._lock:
            keep = bool(frame) or self._kept + picture_HWC.nbytes <= _KEPT_BYTES  # a video is not read twice
            self._kept += picture_HWC.nbytes if keep else 0
        return Read(path, stamp, prepared, picture_HWC if keep else None, **frame)

    def explain(self, batch: Sequence[Read]) -> list[Explained | dict[str, Any]]:
        """Explain a batch; where that fails for its data, or a target of a list, one image at a time, to find whose."""
        if not batch:
            return []
        try:
            views = [self._explain(number, batch) for number in range(len(self.views))]
        except (DataError, UsageError) as error:
            listed = any(self.wishes.get(image.path, Wish()).target is not None for image in batch)
            if isinstance(error, UsageError) and not listed:
                raise
            if len(batch) == 1:
                return [self.failure(batch[0].path, reason_of(error, batch[0].path))]
            return [result for image in batch for result in self.explain([image])]
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"{len(batch)} images at once do not fit the device's memory; take a smaller batch size"
            ) from error
        for image in batch:
            image.prepared = []
        return [self._together(list(of_image)) for of_image in zip(*views, strict=True)]

    def _explain(self, number: int, batch: Sequence[Read]) -> list[tuple[Look, dict[str, Any]]]:
        """What one view shows of a batch; images whose target is given apart from those that take the highest."""
        view = self.views[number]
        wishes = [self.wishes.get(image.path, Wish()).target for image in batch]
        targets = [view.target(self.target if wish is None else wish) for wish in wishes]
        found: dict[int, tuple[Look, dict[str, Any]]] = {}
        for given in (True, False):
            some = [place for place, target in enumerate(targets) if (target is not None) == given]
            if some:
                target = torch.tensor([targets[place] for place in some]) if given else None
                found.update(zip(some, self._look(number, [batch[place] for place in some], target), strict=True))
        return [found[place] for place in range(len(batch))]

    def _look(self, number: int, batch: Sequence[Read], target: Tensor | None) -> list[tuple[Look, dict[str, Any]]]:
        view = self.views[number]
        placements = [image.prepared[number][1] for image in batch]
        images_BCHW = view.batch(torch.from_numpy(np.stack([image.prepared[number][0] for image in batch])))
        started = time.perf_counter()
        with torch.autocast(images_BCHW.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            assert view.method is not None
            maps = view.method(view.model, images_BCHW, target=target)
            films: Sequence[Mapping[str, NDArray[Any]] | None] = [None] * len(batch)
            if "animation" in self.kinds:
                films = _follow(view, images_BCHW, placements)
        if "gaze" in self.kinds and maps.boxes is None:
            raise UsageError(
                f"gaze shows the path of glimpses, and {maps.method} of this {type(view.model).__name__} has none; "
                "save another kind, or take the method gaze with a network that looks through a Retina"
            )
        if "boxes" in self.kinds and not has_maps(maps.output):
            raise UsageError(
                f"boxes shows the heat of each box, and {maps.method} of this {type(view.model).__name__} has none; "
                "save another kind, or take odam, sampling or attention with a detector"
            )
        predictions = predictions_of(view, maps.output, len(batch))
        looks = looks_of(view, maps, placements, predictions, films)
        seconds = round((time.perf_counter() - started) / len(batch), 6)
        targets = [None] * len(batch) if maps.target is None else maps.target.tolist()
        told = {"model": view.model_name or type(view.model).__name__, "method": maps.method, "layer": maps.source}
        found = []
        for look, prediction, goal in zip(looks, predictions, targets, strict=True):
            hottest = peak(look.heatmap_hw, look.placement)
            facts = {"target": goal, **prediction, "peak": _rounded(hottest), "seconds": seconds}
            if look.boxes:
                facts["found"] = [[*box, label] for box, label in zip(look.boxes, look.labels, strict=True)]
            if look.glimpses is not None:
                facts["fixations"] = centres(boxes_in_source(look.glimpses, look.placement)).round(1).tolist()
            found.append((look, {**told, **facts}))
        return found

    def _together(self, found: Sequence[tuple[Look, dict[str, Any]]]) -> Explained:
        looks = [look for look, _ in found]
        facts = dict(found[0][1])
        if len(found) > 1:
            facts["looks"] = [{"name": look.name, **told} for look, told in found]
            facts["seconds"] = round(sum(told["seconds"] for _, told in found), 6)
        if self.compared:
            mean, place = unlike(*((look.heatmap_hw, look.placement) for look in looks))
            facts["difference"] = {"mean": round(mean, 4), "peak": _rounded(place)}
        return Explained(looks, facts)

    def draw(self, image: Read, explained: Explained) -> dict[str, Made]:
        """Make all kinds of one image; its picture is let go."""
        try:
            picture_HWC = image.picture
            if picture_HWC is None:
                picture_HWC = read_image(image.path, max_pixels=self.max_pixels)
            wish = self.wishes.get(image.path, Wish())
            scene = Scene(picture_HWC, explained.looks, self.style, self.compared, wish.boxes, wish.labels)
            return {kind: KINDS[kind].make(scene) for kind in self.kinds}
        finally:
            self.let_go(image)

    def write(self, image: Read, explained: Explained) -> "Written | dict[str, Any]":
        """Make all kinds of one image and write them, each beside its place."""
        height, width = explained.looks[0].placement.source_size
        entry = self.done(image.path, image.stamp, {"width": width, "height": height, **explained.facts})
        written = Written(self, entry)
        try:
            for kind, made in self.draw(image, explained).items():
                name = self.names[image.path][kind]
                written.add(name, encoded(made, os.path.splitext(name)[1]))
        except Exception as error:  # a full disk, a file that was changed meanwhile
            written.drop()
            return self.failure(image.path, reason_of(error, image.path))
        return written

    def done(self, path: str, stamp: tuple[int, int], facts: Mapping[str, Any]) -> dict[str, Any]:
        outputs = {**self.earlier.get(path, {}), **self.names[path]}
        return {**self._about(path, stamp), "status": "done", "outputs": outputs, **facts}

    def failure(self, path: str, reason: str) -> dict[str, Any]:
        try:
            stamp = stamp_of(path)
        except OSError:
            stamp = 0, 0
        return {**self._about(path, stamp), "status": "failed", "reason": reason}

    def _about(self, path: str, stamp: tuple[int, int]) -> dict[str, Any]:
        return {"source": path, "bytes": stamp[0], "modified": stamp[1], "recipe": self.recipe_of(path)}

    def recipe_of(self, path: str) -> str:
        """The recipe of one image, of which a list may say more, or of a video."""
        wish = self.wishes.get(path, Wish())
        fps = self.fps if os.path.splitext(path)[1].lower() in VIDEOS else None
        if wish == Wish() and fps is None:
            return self.recipe
        text = json.dumps([self.recipe, wish.target, wish.boxes, wish.labels, fps])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def place(self, name: str) -> str:
        """Where an output goes; its folder is made.

        Raises:
            DataError: a link leads out of the output folder, or the folder cannot be made.
        """
        place = os.path.join(self.folder, *name.split("/"))
        self._make_folder(os.path.dirname(place))
        return place

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


class Written:
    """The outputs of one image, written to temporary files and renamed into place once they are on disk.

    Attributes:
        entry: of the manifest.
    """

    def __init__(self, job: Job, entry: dict[str, Any]) -> None:
        self._job, self.entry = job, entry
        self._files: list[Replacement] = []

    def beside(self, name: str) -> str:
        """Return the temporary file that will become the output of this name."""
        self._files.append(Replacement(self._job.place(name)))
        return self._files[-1].part

    def add(self, name: str, content: bytes) -> None:
        """Write the content of the output of this name."""
        self.beside(name)
        self._files[-1].write(content)

    def settle(self, secure: Callable[[], None]) -> dict[str, Any]:
        """Wait for the disk, then give the files their names; returns the manifest's entry.

        Waiting takes many times as long as writing and no time of a core, so it is done by threads of its own.

        Args:
            secure: waits until what was promised is on the disk too.
        """
        try:
            secure()
            for file in self._files:
                file.commit()
        except DataError as error:
            self.drop()
            return self._job.failure(self.entry["source"], reason_of(error, self.entry["source"]))
        return self.entry

    def drop(self) -> None:
        for file in self._files:
            file.discard()


def _follow(view: View, images_BCHW: Tensor, placements: Sequence[Placement]) -> Sequence[Mapping[str, NDArray[Any]]]:
    """What a glimpse network saw and believed; it looks a second time, along the same path."""
    from visionattn.overlays.glimpses import GlimpseNetwork, follow_gaze

    network = unwrap(view.model)
    if not isinstance(network, GlimpseNetwork):
        raise UsageError(
            f"animation shows what a GlimpseNetwork saw and believed, and this is a {type(network).__name__}; save "
            "another kind"
        )
    return follow_gaze(network, images_BCHW, placements, view.preprocess)


def encoded(made: Made, suffix: str) -> bytes:
    """The content of a file of this suffix."""
    if isinstance(made, bytes):
        return made
    if isinstance(made, np.ndarray):
        return encode_image(made, suffix)
    file = io.BytesIO()
    np.savez_compressed(file, **{name: np.asarray(value) for name, value in made.items()})  # type: ignore[arg-type]
    return file.getvalue()


def _rounded(place: tuple[float, float] | None) -> list[float] | None:
    return None if place is None else [round(x, 1) for x in place]


def stamp_of(path: str) -> tuple[int, int]:
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


def reason_of(error: Exception, path: str) -> str:
    """Why, without the name of the file, which stands beside it."""
    if isinstance(error, (DataError, UsageError)):
        text = str(error)
        for beginning in (f"{path}: ", f"{path} "):
            text = text.removeprefix(beginning)
        return text
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, MemoryError):
        return "no memory for it"
    return f"{type(error).__name__}: {error}"
