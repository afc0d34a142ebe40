"""One page to explore where a model looks: a single HTML file that needs no network and no server.

    explore(model, ["cat.jpg", "dog.jpg"]).save("seen.html")

Shapes: B images, C channels, H × W pixels of a picture, T glimpses, S scales, K classes, N boxes, h × w grid.
"""

import html
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor, nn

from visionattn.data.decode import MAX_PIXELS, read_image
from visionattn.data.image_files import AnyPath
from visionattn.data.placement import Placement, Preprocess
from visionattn.drawing.resizing import shrink
from visionattn.errors import DataError, UsageError
from visionattn.explorer.analysis import Findings, find_out
from visionattn.explorer.document import GENERATOR, Shown, compose, data_uri
from visionattn.explorer.encoding import LEVELS
from visionattn.files import printable, write_file
from visionattn.maps.boxes import AllBoxes, BoxMethod, default_box_method
from visionattn.maps.method import Method
from visionattn.maps.selection import methods_that_fit
from visionattn.models.glimpse_network import GlimpseNetwork
from visionattn.overlays.explainer import detects, known_of
from visionattn.overlays.glimpses import follow_gaze
from visionattn.overlays.per_box import told_of_boxes

LIMIT = 15_000_000
STEPS = 8

_SIDE = 512  # pixels of a shown picture's longer side
_SAMPLE = 4  # images by which the levels are chosen
_MOST_BOXES = 30


@dataclass(frozen=True)
class Page:
    """A page, whole; the last expression of a notebook's cell shows it.

    Attributes:
        html: the file's text, UTF-8 once written.
        images: how many it shows.
        levels: to which the weights of each patch's row are rounded; None where no attention is shown.
        failures: (image, why it is not shown).
        left_out: method → why it has no heatmap.
    """

    html: str = field(repr=False)
    images: int
    levels: int | None
    failures: Sequence[tuple[str, str]] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: AnyPath) -> None:
        """Write the file.

        Raises:
            UsageError: another file than such a page stands there.
            DataError: it cannot be written.
        """
        refuse_stranger(path)
        write_file(path, self.html.encode())

    def _repr_html_(self) -> str:
        return (
            '<iframe sandbox="allow-scripts" title="visionattn explore" width="100%" height="860" '
            f'style="border: 0" srcdoc="{html.escape(self.html)}"></iframe>'
        )


@dataclass
class _Images:
    """Prepares images; keeps why some could not be read."""

    preprocess: Preprocess | None
    max_pixels: int
    root: str
    failures: list[tuple[str, str]] = field(default_factory=list)

    def prepare(self, image: Any, number: int) -> tuple[str, NDArray[np.uint8], Placement, Tensor] | None:
        """Name, picture, where it lies in the model's input, and that input (C, H, W)."""
        if isinstance(image, Tensor):
            picture = (self.preprocess or Preprocess()).denormalise(image.detach().float().cpu().numpy())
            size = picture.shape[0], picture.shape[1]
            return f"image {number + 1}", picture, Placement.identity(size), image
        if self.preprocess is None:
            raise UsageError("explore cannot tell how this model wants its images; pass preprocess=Preprocess(…)")
        name = f"image {number + 1}"
        if not isinstance(image, np.ndarray):
            name = _below(image, self.root)
            path = image
            try:
                image = read_image(path, max_pixels=self.max_pixels)
            except (DataError, OSError) as error:
                self.failures.append((name, str(error).removeprefix(f"{os.fsdecode(path)}: ")))
                return None
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UsageError(f"a picture is (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}")
        values, placement = self.preprocess(image)
        return name, image, placement, torch.from_numpy(values)


def explore(
    model: nn.Module | None,
    images: "Tensor | Sequence[AnyPath | NDArray[np.uint8]]",
    *,
    preprocess: Preprocess | None = None,
    methods: Mapping[str, Method | BoxMethod | AllBoxes] | None = None,
    class_names: Sequence[str] = (),
    model_name: str = "",
    steps: int = STEPS,
    batch_size: int = 32,
    limit: int = LIMIT,
    glimpses: Sequence[Mapping[str, Any]] = (),
    detections: Sequence[Mapping[str, Any]] = (),
    max_pixels: int = MAX_PIXELS,
    console: Console | None = None,
) -> Page:
    """Look at images in every way that fits the model, and make a page of what is found.

    What remains of the numbers: weights of patches are rounded to as many levels between the bounds of their row as
    keep the page below `limit`, 256 at most and 3 at least, so that each is off by at most 1 / 2 (levels − 1) of what
    its row spans; the page says how many. The class token's rows, gates and heatmaps always have 256.

        >>> import timm, torch
        >>> vit = timm.create_model("test_vit", img_size=64, num_classes=3)
        >>> page = explore(vit, torch.rand(1, 3, 64, 64), steps=2)  # a notebook shows it
        >>> page.save("seen.html")

    Args:
        model: any vision model, on any device, or a task that `visionattn.load` returned; None to show only the
            `glimpses` or `detections`.
        images: files, pictures (H, W, 3) uint8 RGB, or a batch (B, C, H, W) as the model takes it.
        preprocess: brings a picture to the model's input; models of timm and torchvision and tasks say their own. Of a
            batch, only its mean and std matter, by which the pictures are shown; ImageNet's by default.
        methods: name → method; by default all that fit the model but Score-CAM, which takes a forward pass a channel.
            Of a detector, the first one for its boxes, and those for whole images that are given.
        class_names: of the model's outputs; timm's models and tasks know theirs.
        model_name: for the title; the class of the model by default.
        steps: of deletion and insertion, which follow every method's and control's heatmap; 0 for none.
        batch_size: changed images in one forward pass.
        limit: bytes of the page.
        glimpses: of each image: `locations` (T, 2) xy and `boxes` (T, S, 4) xyxy in pixels of the source, `patches`
            (T, S, h, w, 3) uint8, `probabilities` (T, K) after each glimpse; those of a `GlimpseNetwork` are found.
        detections: of each image: `boxes` (N, 4) xyxy in pixels of the source, `labels` and `scores` (N,), `maps`
            (N, h, w) in [0, 1], each spanning the model's input, and if you like `shows`, what they show; those of a
            detector are found.
        max_pixels: larger images fail.
        console: where a bar goes; none by default.

    Raises:
        UsageError: no image, no method or no attention to show; lists that do not fit each other; or a page that is
            larger than `limit` with the coarsest numbers.
        DataError: no image can be read, or the model's values are not finite.
    """
    _check(images, steps, batch_size, limit, glimpses, detections)
    if model is not None:
        model, own, own_names = known_of(model)
        preprocess, class_names = preprocess or own, tuple(class_names) or own_names
        model_name = model_name or type(model).__name__
    loaded = _Images(preprocess, max_pixels, _root(images))
    like = next(model.parameters(), torch.zeros(())) if model is not None else torch.zeros(())
    by_box, methods = _apart(model, methods)
    shown: list[Shown] = []
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
                continue  # why is kept
            name, picture, placement, values = prepared
            findings = Findings(None, None)
            if model is not None:
                image_1CHW = values[None].to(like.device, like.dtype)
                if methods is None:
                    methods = methods_that_fit(model, image_1CHW)
                try:
                    findings = find_out(model, image_1CHW, methods, steps=steps, batch_size=batch_size)
                except torch.OutOfMemoryError as error:
                    raise UsageError(
                        f"{batch_size} changed images at once do not fit the device's memory; take a smaller batch size"
                    ) from error
                if len(class_names) and findings.scores is not None and len(class_names) != len(findings.scores):
                    raise UsageError(
                        f"there are {len(class_names)} class names, and the model has {len(findings.scores)} outputs"
                    )
            gaze = glimpses[number] if glimpses else None
            if gaze is None and isinstance(model, GlimpseNetwork):
                (gaze,) = follow_gaze(model, image_1CHW, [placement], loaded.preprocess or Preprocess())
            boxes = detections[number] if detections else None
            if boxes is None and by_box is not None and model is not None:
                (found,) = by_box(model, image_1CHW, most=_MOST_BOXES)
                boxes = told_of_boxes(found, placement)
            small = shrink(picture, _SIDE)
            seen = Shown(name, data_uri(small), (small.shape[1], small.shape[0]), placement, findings, gaze, boxes)
            _refuse_nothing(seen, model_name)
            shown.append(seen)
            _refuse_too_much(shown, len(images), limit)
    if not shown:
        raise DataError(f"none of the {len(images)} images can be read: {loaded.failures[0][1]}")
    levels, text = _fitting(shown, model_name, class_names, limit)
    left_out = {name: why for one in shown for name, why in one.findings.failed.items()}
    return Page(text, len(shown), levels, tuple(loaded.failures), left_out)


def _apart(
    model: nn.Module | None, methods: Mapping[str, Method | BoxMethod | AllBoxes] | None
) -> tuple[BoxMethod | None, dict[str, Method] | None]:
    """The method for a detector's boxes, and those for whole images; None for all that fit."""
    whole: dict[str, Method] = {}
    of_boxes: list[BoxMethod] = []
    for name, method in (methods or {}).items():
        method = method.method if isinstance(method, AllBoxes) else method
        if isinstance(method, BoxMethod):
            of_boxes.append(method)
        else:
            whole[name] = method
    if model is None or not detects(model):
        if of_boxes:
            raise UsageError(f"{of_boxes[0].name} shows the boxes of a detector, and this model is none")
        return None, None if methods is None else whole
    return of_boxes[0] if of_boxes else default_box_method(model), whole


def _check(
    images: Any, steps: int, batch_size: int, limit: int, glimpses: Sequence[Any], detections: Sequence[Any]
) -> None:
    if isinstance(images, Tensor) and images.ndim != 4:
        raise UsageError(f"images must be (B, C, H, W), got {tuple(images.shape)}; for a single image pass image[None]")
    if _is_path(images):
        raise UsageError("images is a list of files; for a single one pass [file]")
    if not len(images):
        raise UsageError("there are no images; pass at least one")
    if steps == 1 or steps < 0 or batch_size < 1 or limit < 1:
        raise UsageError(f"steps must be 0 or ≥ 2, batch_size and limit ≥ 1, got {steps}, {batch_size} and {limit}")
    for name, some in (("glimpses", glimpses), ("detections", detections)):
        if len(some) not in (0, len(images)):
            raise UsageError(f"there are {len(some)} {name} for {len(images)} images; give one an image, or none")


def _root(images: Any) -> str:
    """The folder that all files have in common, which is nobody's business but the user's."""
    folders = [os.path.dirname(os.path.abspath(os.fsdecode(image))) for image in images if _is_path(image)]
    try:
        return os.path.commonpath(folders) if folders else ""
    except ValueError:  # on several drives
        return ""


def _below(path: Any, root: str) -> str:
    name = os.path.abspath(os.fsdecode(path))
    return printable(os.path.relpath(name, root) if root else os.path.basename(name)).replace(os.sep, "/")


def _is_path(image: Any) -> bool:
    return isinstance(image, (str, bytes, os.PathLike))


def _refuse_nothing(seen: Shown, model_name: str) -> None:
    found = seen.findings
    if not (found.attention or found.gates or found.heatmaps or seen.glimpses or seen.detections):
        reason = next(iter(found.failed.values()), "no method fits, and nothing in it attends")
        raise UsageError(f"there is nothing to show of this {model_name or 'list of images'}: {reason}")


def _refuse_too_much(shown: Sequence[Shown], images: int, limit: int) -> None:
    """Stop early where even half a bit a weight, which the coarsest numbers need at least, goes beyond the limit."""
    weights = sum(one.rows.placed.share.size for one in shown[0].findings.attention if one.rows is not None)
    if len(shown) == 1 and weights * images / 16 * 4 / 3 > limit:
        raise UsageError(
            f"{weights / 1e6:.0f} million attention weights an image do not fit {images} times into "
            f"{limit / 1e6:.0f} MB; explore fewer images, or raise the limit"
        )


def _fitting(shown: Sequence[Shown], model_name: str, class_names: Sequence[str], limit: int) -> tuple[int | None, str]:
    """Make the page with the finest numbers that fit."""
    if not any(one.findings.attention for one in shown):
        text = compose(shown, LEVELS[0], model_name, class_names)
        return None, _checked(text, limit)
    sample = shown[:: -(-len(shown) // _SAMPLE)]
    bare = len(compose((), LEVELS[0], model_name, class_names))

    def fits(levels: int) -> bool:
        each = (len(compose(sample, levels, model_name, class_names)) - bare) / len(sample)
        return bare + each * len(shown) <= limit

    first = bisect_left(LEVELS[:-1], True, key=fits)  # pages get smaller from one to the next
    for levels in LEVELS[first:]:
        text = compose(shown, levels, model_name, class_names)
        if len(text.encode()) <= limit:
            return levels, text
    return LEVELS[-1], _checked(text, limit)


def _checked(text: str, limit: int) -> str:
    if (size := len(text.encode())) > limit:
        raise UsageError(
            f"the page has {size / 1e6:.1f} MB, and the limit is {limit / 1e6:g} MB; explore fewer images, or "
            "raise the limit"
        )
    return text


def refuse_stranger(path: AnyPath) -> None:
    """Refuse to write a page over another file.

    Raises:
        UsageError: something else stands there.
    """
    name = os.fsdecode(path)
    if os.path.lexists(name) and not _is_page(name):
        raise UsageError(f"{printable(name)} exists and is no page of explore's; choose another name")


def tell(page: Page, path: AnyPath, *, total: int, console: Console) -> None:
    """Say on a terminal what was made of `total` images."""
    name = printable(os.fsdecode(path))
    some = "" if total == page.images + len(page.failures) else f" of {total}, taken evenly"
    console.print(Text(f"  {name}   {len(page.html) / 1e6:.1f} MB   {page.images} images{some}"), soft_wrap=True)
    if page.levels is not None and page.levels < 256:
        off = 50 / (page.levels - 1)
        line = (
            f"  weights of patches in {page.levels} levels, within {off:.2g} % of their row's span; fewer images: finer"
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
