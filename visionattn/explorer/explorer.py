"""The explorer: one HTML file that shows a model's attention and heatmaps. The file needs no network and no server.

    explore(model, ["cat.jpg", "dog.jpg"]).save("seen.html")

Shapes: B images, C channels, H × W pixels of a picture, T glimpses, S scales, K classes, N boxes, h × w grid.
"""

import html
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor, nn

from visionattn.data import MAX_PIXELS, Placement, Preprocess, read_image
from visionattn.drawing import shrink
from visionattn.errors import DataError, UsageError
from visionattn.explorer.analysis import Analysis, analyse
from visionattn.explorer.document import GENERATOR, Arrays, PageImage, build_document, data_uri
from visionattn.explorer.encoding import LEVELS
from visionattn.files import AnyPath, printable, write_file
from visionattn.maps import BoxMethod, MaxOverBoxes, Method, default_box_method, methods_that_fit
from visionattn.models import GlimpseNetwork
from visionattn.overlays import assumed_preprocess, describe_model, is_detector, page_detections, trace_glimpses

LIMIT = 15_000_000
STEPS = 8

_SIDE = 512  # longest side of a picture on the page, in pixels
_SAMPLE = 4  # images from which the size of the page is estimated
_MOST_BOXES = 30


@dataclass(frozen=True, repr=False)
class Page:
    """The explorer's page. A notebook shows the page itself; `print` shows its size and what is missing.

    Attributes:
        html: the text of the file, which `save` writes as UTF-8.
        images: number of images on the page.
        levels: number of levels that the weights of each patch's row are rounded to; None if no attention is shown.
        failures: pairs of an image's name and the reason why the page does not show it.
        left_out: method → the reason why it has no heatmap.
    """

    html: str
    images: int
    levels: int | None
    failures: Sequence[tuple[str, str]] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: AnyPath) -> None:
        """Write the page to a file. An earlier page is overwritten.

        Raises:
            UsageError: the file exists and is not a page of the explorer.
            DataError: the file cannot be written.
        """
        refuse_foreign_file(path)
        write_file(path, self.html.encode())

    def to_dict(self) -> dict[str, object]:
        """Return plain data for `json.dumps`: the attributes of the page except `html`, and the size in bytes."""
        return {
            "images": self.images,
            "bytes": len(self.html.encode()),
            "levels": self.levels,
            "failures": [list(failure) for failure in self.failures],
            "left_out": dict(self.left_out),
        }

    def __repr__(self) -> str:
        size = f"{len(self.html.encode()) / 1e6:.1f} MB, {self.images} image{'' if self.images == 1 else 's'}"
        levels = "" if self.levels is None else f", weights of patches in {self.levels} levels"
        lines = [f"Page({size}{levels})"]
        lines += [f"  {image} is not shown: {reason}" for image, reason in self.failures]
        lines += [f"  {method} has no heatmap: {reason}" for method, reason in self.left_out.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Show the page in a notebook."""
        return (
            '<iframe sandbox="allow-scripts" title="visionattn explore" width="100%" height="860" '
            f'style="border: 0" srcdoc="{html.escape(self.html)}"></iframe>'
        )


@dataclass
class _Images:
    """Reads and preprocesses images, and collects the reasons why images could not be read."""

    preprocess: Preprocess | None
    max_pixels: int
    root: str
    failures: list[tuple[str, str]] = field(default_factory=list)

    def prepare(
        self, image: "Tensor | AnyPath | NDArray[np.uint8]", number: int
    ) -> tuple[str, NDArray[np.uint8], Placement, Tensor] | None:
        """Return an image's name, its picture, its position in the model's input, and the model's input (C, H, W).

        Return None if the file cannot be read.
        """
        if isinstance(image, Tensor):
            picture = (self.preprocess or Preprocess()).denormalise(image.detach().float().cpu().numpy())
            size = picture.shape[0], picture.shape[1]
            return f"image {number + 1}", picture, Placement.identity(size), image
        if self.preprocess is None:
            raise UsageError("pictures need a preprocessing; pass preprocess=Preprocess(…)")
        name = f"image {number + 1}"
        if not isinstance(image, np.ndarray):
            name = _below(image, self.root)
            path = os.fsdecode(image)
            try:
                image = read_image(path, max_pixels=self.max_pixels)
            except (DataError, OSError) as error:
                self.failures.append((name, str(error).removeprefix(f"{path}: ")))
                return None
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UsageError(f"a picture must be (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}")
        values, placement = self.preprocess(image)
        return name, image, placement, torch.from_numpy(values)


def explore(
    model: nn.Module | None,
    images: "Tensor | Sequence[AnyPath | NDArray[np.uint8]]",
    *,
    preprocess: Preprocess | None = None,
    methods: Mapping[str, Method | BoxMethod | MaxOverBoxes] | None = None,
    class_names: Sequence[str] = (),
    model_name: str = "",
    steps: int = STEPS,
    batch_size: int = 32,
    limit: int = LIMIT,
    glimpses: Sequence[Arrays] = (),
    detections: Sequence[Arrays] = (),
    max_pixels: int = MAX_PIXELS,
    console: Console | None = None,
) -> Page:
    """Make a page of a model's attention, gates, glimpses and boxes on images, and of every heatmap method that fits.

    The weights of patches are rounded to levels between the bounds of their row. The number of levels is the largest
    that keeps the page below `limit`, from 256 down to 3; the page shows the number. The error of a weight is at most
    1 / (2 (levels − 1)) of the span of its row. The class token's rows, gates and heatmaps always have 256 levels.

        >>> import timm, torch
        >>> vit = timm.create_model("test_vit", img_size=64, num_classes=3)
        >>> page = explore(vit, torch.rand(1, 3, 64, 64), steps=2)  # a notebook shows it
        >>> page.save("seen.html")

    Args:
        model: any vision model on any device, or a task that `visionattn.load` returns; None to show only `glimpses`
            or `detections`.
        images: paths of files, pictures (H, W, 3) uint8 RGB, or a batch (B, C, H, W) normalised for the model.
        preprocess: turns a picture into the model's input (default: that of the timm or torchvision model, of the task
            or of `load_model`; else ImageNet's, with a warning). For a batch, only its mean and std are used, to turn
            the batch into pictures (default: ImageNet's).
        methods: name → method (default: every method that fits the model, except the slow Score-CAM). For a detector,
            the page shows all methods for whole images, but only the first method for boxes.
        class_names: names of the model's outputs (default: the names that the timm model or the task has).
        model_name: name in the title (default: the class of the model).
        steps: steps of deletion and insertion for every heatmap, ≥ 2; 0 for no curves.
        batch_size: perturbed images in one forward pass.
        limit: largest size of the page in bytes.
        glimpses: one dict per image: `locations` (T, 2) xy and `boxes` (T, S, 4) xyxy in pixels of the source,
            `patches` (T, S, h, w, 3) uint8, and `probabilities` (T, K) after each glimpse (default: the glimpses of
            the model if it is a `GlimpseNetwork`).
        detections: one dict per image: `boxes` (N, 4) xyxy in pixels of the source, `labels` and `scores` (N,), `maps`
            (N, h, w) in [0, 1], each spanning the model's input, and optionally `shows`, a description of the maps
            (default: the detections of the model if it is a detector).
        max_pixels: largest number of pixels of an image file; larger files fail.
        console: console for a progress bar (default: no bar).

    Raises:
        UsageError: there are no images, or there is nothing to show; lists have different lengths; or the page is
            larger than `limit` with 3 levels.
        DataError: no image can be read, or the model's output is not finite.
    """
    _check(images, steps, batch_size, limit, glimpses, detections)
    if model is not None:
        model, own, own_names = describe_model(model)
        preprocess, class_names = preprocess or own, tuple(class_names) or own_names
        model_name = model_name or type(model).__name__
        if preprocess is None and not isinstance(images, Tensor):
            preprocess = assumed_preprocess(model, stacklevel=3)
    loaded = _Images(preprocess, max_pixels, _root(images))
    like = next(model.parameters(), torch.zeros(())) if model is not None else torch.zeros(())
    by_box, methods = _apart(model, methods)
    shown: list[PageImage] = []
    columns = (
        TextColumn("  exploring"),
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console or Console(quiet=True)) as progress:
        for number in progress.track(range(len(images)), description=""):
            prepared = loaded.prepare(images[number], number)
            if prepared is None:
                continue  # `loaded.failures` holds the reason
            name, picture, placement, values = prepared
            analysis = Analysis(None, None)
            if model is not None:
                image_1CHW = values[None].to(like.device, like.dtype)
                if methods is None:
                    methods = methods_that_fit(model, image_1CHW)
                try:
                    analysis = analyse(model, image_1CHW, methods, steps=steps, batch_size=batch_size)
                except torch.OutOfMemoryError as error:
                    raise UsageError(
                        f"{batch_size} perturbed images do not fit into the memory of the device; reduce batch_size"
                    ) from error
                if len(class_names) and analysis.scores is not None and len(class_names) != len(analysis.scores):
                    raise UsageError(
                        f"there are {len(class_names)} class names, but the model has {len(analysis.scores)} outputs; "
                        "pass one name per output"
                    )
            gaze = glimpses[number] if glimpses else None
            if gaze is None and isinstance(model, GlimpseNetwork):
                (gaze,) = trace_glimpses(model, image_1CHW, [placement], loaded.preprocess or Preprocess())
            boxes = detections[number] if detections else None
            if boxes is None and by_box is not None and model is not None:
                (found,) = by_box(model, image_1CHW, max_boxes=_MOST_BOXES)
                boxes = page_detections(found, placement)
            small = shrink(picture, _SIDE)
            size = small.shape[1], small.shape[0]
            page_image = PageImage(name, data_uri(small), size, placement, analysis, gaze, boxes)
            _refuse_nothing(page_image, model_name)
            shown.append(page_image)
            _refuse_too_much(shown, len(images), limit)
    if not shown:
        raise DataError(f"none of the {len(images)} images can be read; the first: {loaded.failures[0][1]}")
    levels, text = _fitting(shown, model_name, class_names, limit)
    left_out = {name: reason for image in shown for name, reason in image.analysis.failed.items()}
    return Page(text, len(shown), levels, tuple(loaded.failures), left_out)


def _apart(
    model: nn.Module | None, methods: Mapping[str, Method | BoxMethod | MaxOverBoxes] | None
) -> tuple[BoxMethod | None, dict[str, Method] | None]:
    """Return the method for a detector's boxes (or None), and the methods for whole images (None: all that fit)."""
    whole: dict[str, Method] = {}
    of_boxes: list[BoxMethod] = []
    for name, method in (methods or {}).items():
        method = method.method if isinstance(method, MaxOverBoxes) else method
        if isinstance(method, BoxMethod):
            of_boxes.append(method)
        else:
            whole[name] = method
    if model is None or not is_detector(model):
        if of_boxes:
            raise UsageError(f"{of_boxes[0].name} explains the boxes of a detector, but this model is not a detector")
        return None, None if methods is None else whole
    return of_boxes[0] if of_boxes else default_box_method(model), whole


def _check(
    images: "Tensor | Sequence[AnyPath | NDArray[np.uint8]]",
    steps: int,
    batch_size: int,
    limit: int,
    glimpses: Sequence[Arrays],
    detections: Sequence[Arrays],
) -> None:
    """Raise a UsageError if an argument of `explore` is out of range."""
    if isinstance(images, Tensor) and images.ndim != 4:
        raise UsageError(f"images must be (B, C, H, W), got {tuple(images.shape)}; for a single image pass image[None]")
    if _is_path(images):
        raise UsageError("images must be a list of files; for a single file pass [file]")
    if not len(images):
        raise UsageError("there are no images; pass at least one")
    if steps == 1 or steps < 0 or batch_size < 1 or limit < 1:
        raise UsageError(f"steps must be 0 or ≥ 2, batch_size and limit ≥ 1, got {steps}, {batch_size} and {limit}")
    for name, items in (("glimpses", glimpses), ("detections", detections)):
        if len(items) not in (0, len(images)):
            raise UsageError(f"there are {len(items)} {name} for {len(images)} images; pass one per image, or none")


def _root(images: "Tensor | Sequence[AnyPath | NDArray[np.uint8]]") -> str:
    """Return the common folder of all files. The page shows file names without it."""
    folders = [os.path.dirname(os.path.abspath(os.fsdecode(image))) for image in images if _is_path(image)]
    try:
        return os.path.commonpath(folders) if folders else ""
    except ValueError:  # the files are on different drives
        return ""


def _below(path: AnyPath, root: str) -> str:
    """Return the path relative to the common folder."""
    name = os.path.abspath(os.fsdecode(path))
    return printable(os.path.relpath(name, root) if root else os.path.basename(name)).replace(os.sep, "/")


def _is_path(image: object) -> TypeGuard[AnyPath]:
    return isinstance(image, (str, bytes, os.PathLike))


def _refuse_nothing(image: PageImage, model_name: str) -> None:
    """Raise a UsageError if the page would show nothing for an image."""
    analysis = image.analysis
    if not (analysis.attention or analysis.gates or analysis.heatmaps or image.glimpses or image.detections):
        reason = next(iter(analysis.failed.values()), "no method fits, and the model has no attention")
        raise UsageError(f"there is nothing to show of this {model_name or 'list of images'}: {reason}")


def _refuse_too_much(shown: Sequence[PageImage], images: int, limit: int) -> None:
    """After the first image, raise a UsageError if all images would exceed the limit with half a bit per weight."""
    weights = sum(layer.rows.placed.share.size for layer in shown[0].analysis.attention if layer.rows is not None)
    if len(shown) == 1 and weights * images / 16 * 4 / 3 > limit:
        raise UsageError(
            f"{images} images with {weights / 1e6:.0f} million attention weights each do not fit into "
            f"{limit / 1e6:.0f} MB; explore fewer images, or raise the limit"
        )


def _fitting(
    shown: Sequence[PageImage], model_name: str, class_names: Sequence[str], limit: int
) -> tuple[int | None, str]:
    """Return the largest number of levels for which the page fits into the limit, and the text of that page."""
    if not any(image.analysis.attention for image in shown):
        text = build_document(shown, LEVELS[0], model_name, class_names)
        return None, _checked(text, limit)
    sample = shown[:: -(-len(shown) // _SAMPLE)]
    bare = len(build_document((), LEVELS[0], model_name, class_names))

    def fits(levels: int) -> bool:
        each = (len(build_document(sample, levels, model_name, class_names)) - bare) / len(sample)
        return bare + each * len(shown) <= limit

    first = bisect_left(LEVELS[:-1], True, key=fits)  # pages get smaller with fewer levels
    for levels in LEVELS[first:]:
        text = build_document(shown, levels, model_name, class_names)
        if len(text.encode()) <= limit:
            return levels, text
    return LEVELS[-1], _checked(text, limit)


def _checked(text: str, limit: int) -> str:
    """Return the text of a page; raise a UsageError if it exceeds the limit."""
    if (size := len(text.encode())) > limit:
        raise UsageError(
            f"the page has {size / 1e6:.1f} MB, and the limit is {limit / 1e6:g} MB; explore fewer images, or "
            "raise the limit"
        )
    return text


def refuse_foreign_file(path: AnyPath) -> None:
    """Check that a page may be written to a path.

    Raises:
        UsageError: the path exists and is not a page of the explorer.
    """
    name = os.fsdecode(path)
    if os.path.lexists(name) and not _is_page(name):
        raise UsageError(f"{printable(name)} exists and is not a page of explore; choose another name")


def tell(page: Page, path: AnyPath, *, total: int, console: Console) -> None:
    """Print the size of a page, how many of `total` images it shows, and what is missing.

    Args:
        page: the page.
        path: the file that it was written to.
        total: number of images that were found.
        console: the console to print to.
    """
    name = printable(os.fsdecode(path))
    sample = "" if total == page.images + len(page.failures) else f" of {total}, chosen at equal intervals"
    console.print(Text(f"  {name}   {len(page.html) / 1e6:.1f} MB   {page.images} images{sample}"), soft_wrap=True)
    if page.levels is not None and page.levels < 256:
        off = 50 / (page.levels - 1)
        line = (
            f"  attention weights of patches are rounded to {page.levels} levels, with an error of at most {off:.2g} % "
            "of the range of their row; fewer images give more levels"
        )
        console.print(Text(line), soft_wrap=True)
    for method, reason in page.left_out.items():
        console.print(Text(f"  {method} is left out: {printable(reason)}", "red"), soft_wrap=True)
    for image, reason in page.failures:
        console.print(Text(f"  {printable(image)}: {printable(reason)}", "red"), soft_wrap=True)


def _is_page(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return f'content="{GENERATOR}"'.encode() in file.read(4_000)
    except OSError:
        return False
