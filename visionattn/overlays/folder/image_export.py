"""The export of one image or one batch: read, explain, draw and write it."""

import contextlib
import hashlib
import io
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visionattn.capture import unwrap
from visionattn.data import VIDEOS, ImageRequest, Placement, encode_image, read_image
from visionattn.drawing import Style, boxes_in_source, centres, heatmap_difference, peak
from visionattn.errors import DataError, UsageError
from visionattn.files import Replacement, printable
from visionattn.maps import Target
from visionattn.overlays.explainer import Explainer, explained_images, predictions_of, targets_of
from visionattn.overlays.folder.manifest import Done, Entry, Facts, Failed, Stamp
from visionattn.overlays.outputs import OUTPUTS, ExplainedImage, GlimpseTrace, Needs, Output, OutputScene, check_needs

_KEPT_BYTES = 192 << 20  # limit on decoded pictures kept until they are drawn; pictures beyond it are read again


class Video(Protocol):
    """The methods of `video_export.VideoExport` that the frames of a video use."""

    def add(self, frame: "LoadedImage", explained: "ImageResult", drawing: "Future[dict[str, Output]]") -> None: ...

    def fail(self, reason: str) -> None: ...


@dataclass(frozen=True)
class ImageTask:
    """One image to export, in a form that can be sent to another process.

    Attributes:
        path: absolute path of the image.
        names: kind → output, a path below the folder with / between folders.
        earlier: kind → existing output of an earlier run with the same fingerprint.
        request: target and boxes from the user's list of images; None without a list.
    """

    path: str
    names: dict[str, str] = field(default_factory=dict)
    earlier: dict[str, str] = field(default_factory=dict)
    request: ImageRequest | None = None

    def to_dict(self) -> dict[str, object]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "ImageTask":
        """Restore a task from the plain data of `to_dict`."""
        request = value["request"]
        if request is not None:
            boxes = tuple(map(tuple, request["boxes"]))
            request = ImageRequest(request["target"], boxes, tuple(request["labels"]))
        return cls(value["path"], value["names"], value["earlier"], request)


@dataclass(eq=False)
class LoadedImage:
    """An image, or a frame of a video, that was read and is not yet drawn.

    Attributes:
        path: path of the image or video.
        stamp: size and time of the file.
        prepared: for each explainer, the model's input (C, height, width) and the placement of the source in it. The
            list is emptied once the image is explained.
        picture: (H, W, 3) uint8 RGB, the source. None if memory was short: then `draw` reads the picture again.
        video: the video that a frame belongs to; None for an image.
        at: seconds from the start of the video.
    """

    path: str
    stamp: Stamp
    prepared: list[tuple[NDArray[np.float32], Placement]]
    picture: NDArray[np.uint8] | None
    video: Video | None = None
    at: float = 0.0


@dataclass
class ImageResult:
    """The explanations of an image, one for each explainer, and the facts for its line in the manifest."""

    explanations: list[ExplainedImage]
    facts: Facts


@dataclass(eq=False)
class ExportJob:
    """The settings that all images of an export share, and the steps of one image.

    Several threads call `read`, `draw` and `write`; one thread calls `explain`.

    Attributes:
        explainers: models and methods that explain each image.
        compared: whether the second of two explainers is compared with the first.
        kinds: kinds of output to make, names in `outputs.OUTPUTS`.
        targets: for each explainer the target of images without their own; None means the highest output of each image.
        style: style of the pictures.
        max_pixels: images with more pixels fail.
        fingerprint: hash of these settings, see `explainer.fingerprint_of`.
        folder: absolute path of the output folder.
        names: image → kind → its output, a path below `folder` with / between folders.
        requests: image → its target and boxes from the user's list of images.
        earlier: image → kind → existing output of an earlier run with the same fingerprint.
        fps: frames per second to sample from videos; None means every frame.
        bf16: whether models run under autocast to bfloat16.
    """

    explainers: Sequence[Explainer]
    compared: bool
    kinds: Sequence[str]
    targets: Sequence[Target]
    style: Style
    max_pixels: int
    fingerprint: str
    folder: str
    names: dict[str, dict[str, str]] = field(default_factory=dict)
    requests: dict[str, ImageRequest] = field(default_factory=dict)
    earlier: dict[str, dict[str, str]] = field(default_factory=dict)
    fps: float | None = None
    bf16: bool = False

    def __post_init__(self) -> None:
        self._kept = 0  # bytes of the decoded pictures in memory
        self._lock = threading.Lock()

    def task(self, path: str) -> ImageTask:
        """Return the task of one image."""
        return ImageTask(path, self.names[path], self.earlier.get(path, {}), self.requests.get(path))

    def accept(self, task: ImageTask) -> str:
        """Store a task, which another process may have sent, and return the path of its image."""
        self.names[task.path], self.earlier[task.path] = task.names, task.earlier
        if task.request is not None:
            self.requests[task.path] = task.request
        return task.path

    def read(self, path: str) -> LoadedImage | Failed:
        """Read and prepare one image."""
        try:
            stamp = stamp_of(path)
            targets_of(self.explainers, self._request(path).target)
            return self.prepare(path, stamp, read_image(path, max_pixels=self.max_pixels))
        except Exception as error:  # an error in one file must not stop the others
            return self.failure(path, reason_of(error, path))

    def prepare(
        self,
        path: str,
        stamp: Stamp,
        picture_HWC: NDArray[np.uint8],
        *,
        video: Video | None = None,
        at: float = 0.0,
    ) -> LoadedImage:
        """Prepare one picture for every explainer."""
        prepared: list[tuple[NDArray[np.float32], Placement]] = []
        for number, explainer in enumerate(self.explainers):
            alike = [k for k in range(number) if self.explainers[k].preprocess == explainer.preprocess]
            prepared.append(prepared[alike[0]] if alike else explainer.preprocess(picture_HWC))
        with self._lock:
            keep = video is not None or self._kept + picture_HWC.nbytes <= _KEPT_BYTES  # frames cannot be read again
            self._kept += picture_HWC.nbytes if keep else 0
        return LoadedImage(path, stamp, prepared, picture_HWC if keep else None, video, at)

    def explain(self, batch: Sequence[LoadedImage]) -> list[ImageResult | Failed]:
        """Explain a batch.

        If the images or a target from the user's list cause an error, the images are explained one by one, so that only
        the faulty images fail.

        Raises:
            UsageError: the method does not fit the model, or the batch does not fit into the device's memory.
        """
        if not batch:
            return []
        try:
            by_explainer = [self._explain(number, batch) for number in range(len(self.explainers))]
        except (DataError, UsageError) as error:
            listed = any(self._request(image.path).target is not None for image in batch)
            if isinstance(error, UsageError) and not listed:
                raise
            if len(batch) == 1:
                return [self.failure(batch[0].path, reason_of(error, batch[0].path))]
            return [result for image in batch for result in self.explain([image])]
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"a batch of {len(batch)} images does not fit into the device's memory; use a smaller batch size"
            ) from error
        for image in batch:
            image.prepared = []
        return [self._combined(list(of_image)) for of_image in zip(*by_explainer, strict=True)]

    def _explain(self, number: int, batch: Sequence[LoadedImage]) -> list[tuple[ExplainedImage, Facts]]:
        """Explain a batch with one explainer, in groups: images with an index as target, without one, with others."""
        explainer = self.explainers[number]
        requests = [self._request(image.path).target for image in batch]
        targets = [self.targets[number] if request is None else explainer.target(request) for request in requests]
        explained: dict[int, tuple[ExplainedImage, Facts]] = {}
        groups: dict[object, list[int]] = {}  # indices share a key, and each other target has its own
        for index, target in enumerate(targets):
            groups.setdefault(int if isinstance(target, int) else target, []).append(index)
        for key, group in groups.items():
            target = torch.tensor([targets[index] for index in group]) if key is int else targets[group[0]]
            results = self._explain_group(number, [batch[index] for index in group], target)
            explained.update(zip(group, results, strict=True))
        return [explained[index] for index in range(len(batch))]

    def _explain_group(
        self, number: int, batch: Sequence[LoadedImage], target: Target
    ) -> list[tuple[ExplainedImage, Facts]]:
        explainer = self.explainers[number]
        placements = [image.prepared[number][1] for image in batch]
        images_BCHW = explainer.batch(torch.from_numpy(np.stack([image.prepared[number][0] for image in batch])))
        started = time.perf_counter()
        with torch.autocast(images_BCHW.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            assert explainer.method is not None
            maps = explainer.method(explainer.model, images_BCHW, target=target)
            traces: Sequence[GlimpseTrace | None] = [None] * len(batch)
            if any(OUTPUTS[kind].needs == "a GlimpseNetwork" for kind in self.kinds):
                traces = _trace(explainer, images_BCHW, placements)
        predictions = predictions_of(explainer, maps.output, len(batch))
        explanations = explained_images(explainer, maps, placements, predictions, traces)
        available = _available(explanations[0])
        check_needs(self.kinds, model=type(explainer.model).__name__, method=maps.method, available=available)
        seconds = round((time.perf_counter() - started) / len(batch), 6)
        targets = [None] * len(batch) if maps.target is None else maps.target.tolist()
        results = []
        for explained, prediction, index in zip(explanations, predictions, targets, strict=True):
            facts: Facts = {
                "model": explainer.model_name or type(explainer.model).__name__,
                "method": maps.method,
                "layer": maps.source,
                "target": index,
                "prediction": prediction.index,
                "class": prediction.class_name,
                "probability": prediction.probability,
                "peak": _rounded(peak(explained.heatmap_hw, explained.placement)),
                "seconds": seconds,
            }
            if prediction.labels is not None:
                facts["labels"] = [list(label) for label in prediction.labels]
            if explained.boxes:
                facts["found"] = [[*box, label] for box, label in zip(explained.boxes, explained.labels, strict=True)]
            if explained.glimpses is not None:
                fixations_T2 = centres(boxes_in_source(explained.glimpses, explained.placement))
                facts["fixations"] = fixations_T2.round(1).tolist()
            results.append((explained, facts))
        return results

    def _combined(self, results: Sequence[tuple[ExplainedImage, Facts]]) -> ImageResult:
        """Combine the explanations that all explainers made of one image."""
        explanations = [explained for explained, _ in results]
        facts = results[0][1].copy()
        if len(results) > 1:
            facts["explanations"] = [{"name": explained.name, **own} for explained, own in results]
            facts["seconds"] = round(sum(own["seconds"] for _, own in results), 6)
        if self.compared:
            first, second = ((explained.heatmap_hw, explained.placement) for explained in explanations)
            mean, place = heatmap_difference(first, second)
            facts["difference"] = {"mean": round(mean, 4), "peak": _rounded(place)}
        return ImageResult(explanations, facts)

    def draw(self, image: LoadedImage, explained: ImageResult) -> dict[str, Output]:
        """Make every kind of output of one image, and release its picture.

        Raises:
            DataError: the picture is not in memory, and reading it again fails.
        """
        try:
            picture_HWC = image.picture
            if picture_HWC is None:
                picture_HWC = read_image(image.path, max_pixels=self.max_pixels)
            request = self._request(image.path)
            scene = OutputScene(
                picture_HWC, explained.explanations, self.style, self.compared, request.boxes, request.labels
            )
            return {kind: OUTPUTS[kind].make(scene) for kind in self.kinds}
        finally:
            self.release(image)

    def write(self, image: LoadedImage, explained: ImageResult) -> "OutputFiles | Failed":
        """Make every kind of output of one image and write them into temporary files."""
        height, width = explained.explanations[0].placement.source_size
        entry = self.done(image.path, image.stamp, {"width": width, "height": height, **explained.facts})
        files = OutputFiles(self, entry)
        try:
            for kind, output in self.draw(image, explained).items():
                name = self.names[image.path][kind]
                files.add(name, encoded(output, os.path.splitext(name)[1]))
        except Exception as error:  # e.g. a full disk, or a source that has changed meanwhile
            files.drop()
            return self.failure(image.path, reason_of(error, image.path))
        return files

    def done(self, path: str, stamp: Stamp, facts: Facts) -> Done:
        """Return the manifest's entry of a finished image."""
        outputs = {**self.earlier.get(path, {}), **self.names[path]}
        return Done(path, stamp, self.fingerprint_of(path), outputs, facts)

    def failure(self, path: str, reason: str) -> Failed:
        """Return the manifest's entry of a failed image."""
        try:
            stamp = stamp_of(path)
        except OSError:
            stamp = 0, 0
        return Failed(path, stamp, self.fingerprint_of(path), reason)

    def fingerprint_of(self, path: str) -> str:
        """Return the fingerprint of one image; it covers the image's target and boxes, and a video's sampling rate."""
        request = self._request(path)
        fps = self.fps if os.path.splitext(path)[1].lower() in VIDEOS else None
        if request == ImageRequest() and fps is None:
            return self.fingerprint
        text = json.dumps([self.fingerprint, request.target, request.boxes, request.labels, fps])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def place(self, name: str) -> str:
        """Return the absolute path of an output, and create its folder.

        Raises:
            DataError: a link leads out of the output folder, or the folder cannot be created.
        """
        path = os.path.join(self.folder, *name.split("/"))
        self._make_folder(os.path.dirname(path))
        return path

    def release(self, image: LoadedImage) -> None:
        """Release the memory of an image's picture."""
        if image.picture is not None:
            with self._lock:
                self._kept -= image.picture.nbytes
            image.picture = None

    def _request(self, path: str) -> ImageRequest:
        return self.requests.get(path, ImageRequest())

    def _make_folder(self, folder: str) -> None:
        real, top = os.path.realpath(folder), os.path.realpath(self.folder)
        if os.path.commonpath([real, top]) != top:
            raise DataError(f"{printable(folder)} is a link that leads out of {printable(self.folder)}")
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise DataError(f"{printable(folder)} cannot be made: {error.strerror or error}") from error


class OutputFiles:
    """The outputs of one image, written to temporary files and renamed into place once they are on disk.

    Args:
        job: settings of the export.
        entry: entry for the manifest if all outputs are written.
    """

    def __init__(self, job: ExportJob, entry: Done) -> None:
        self._job, self.entry = job, entry
        self._files: list[Replacement] = []

    def beside(self, name: str) -> str:
        """Return the path of the temporary file that `settle` will rename to an output."""
        self._files.append(Replacement(self._job.place(name)))
        return self._files[-1].part

    def add(self, name: str, content: bytes) -> None:
        """Write the content of an output into its temporary file."""
        self.beside(name)
        self._files[-1].write(content)

    def settle(self, secure: Callable[[], None]) -> Entry:
        """Wait until the files are on disk, rename them, and return the manifest's entry.

        Waiting takes many times as long as writing but no processor time, so separate threads wait.

        Args:
            secure: function that waits until the outputs' promises are on disk, see `Manifest.secure`.
        """
        try:
            secure()
            for file in self._files:
                file.commit()
        except DataError as error:
            self.drop()
            return self._job.failure(self.entry.source, reason_of(error, self.entry.source))
        return self.entry

    def drop(self) -> None:
        """Remove the temporary files."""
        for file in self._files:
            file.discard()


def _trace(explainer: Explainer, images_BCHW: Tensor, placements: Sequence[Placement]) -> Sequence[GlimpseTrace | None]:
    """Run a glimpse network again along the same path and trace its glimpses; None for other models."""
    from visionattn.models import GlimpseNetwork
    from visionattn.overlays.glimpses import trace_glimpses

    network = unwrap(explainer.model)
    if not isinstance(network, GlimpseNetwork):
        return [None] * len(images_BCHW)
    return trace_glimpses(network, images_BCHW, placements, explainer.preprocess)


def _available(explained: ExplainedImage) -> set[Needs]:
    """Return what an explanation holds besides a heatmap."""
    holds: dict[Needs, bool] = {
        "glimpses": explained.glimpses is not None,
        "boxes": explained.maps is not None,
        "a GlimpseNetwork": explained.glimpse_trace is not None,
    }
    return {need for need, present in holds.items() if present}


def encoded(output: Output, suffix: str) -> bytes:
    """Encode an output as the content of a file with the given suffix."""
    if isinstance(output, bytes):
        return output
    if isinstance(output, np.ndarray):
        return encode_image(output, suffix)
    file = io.BytesIO()
    named: dict[str, NDArray[np.generic]] = {name: np.asarray(value) for name, value in output.items()}
    np.savez_compressed(file, **named)  # type: ignore[arg-type]  # for mypy, a name could be a keyword argument
    return file.getvalue()


def _rounded(point: tuple[float, float] | None) -> list[float] | None:
    return None if point is None else [round(x, 1) for x in point]


def stamp_of(path: str) -> Stamp:
    """Return the size of a file in bytes and the time of its last change in ns."""
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


def reason_of(error: Exception, path: str) -> str:
    """Return an error's message without the path, which the manifest already holds as `source`."""
    if isinstance(error, (DataError, UsageError)):
        text = str(error)
        for beginning in (f"{path}: ", f"{path} "):
            text = text.removeprefix(beginning)
        return text
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, MemoryError):
        return "there is not enough memory for the image"
    return f"{type(error).__name__}: {error}"
