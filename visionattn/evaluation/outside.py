"""Heatmaps that another program made: a Python function, or a folder of files. `score` takes both beside the methods.

Shapes: B images in a batch, C channels, H × W pixels of the model's input, h × w cells of a heatmap.
"""

import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from visionattn.data import MAX_PIXELS, Placement, read_grey
from visionattn.errors import DataError, UsageError
from visionattn.files import local_path, printable
from visionattn.maps import METHODS, Explanation, Method, Target

MapFunction: TypeAlias = Callable[[nn.Module, Tensor, Any], Tensor | NDArray[np.generic]]
"""A function (model, images (B, C, H, W), target) → heatmaps (B, h, w). `score` passes the target as (B,) int64."""

Frame: TypeAlias = Literal["picture", "input"]

_SUFFIXES = (".npy", ".npz", ".png")


class FunctionMethod(Method):
    """A method whose heatmaps a function computes, for example with another package.

    The function runs with gradients on, the model in evaluation mode and frozen, and images that require a gradient.
    The heatmaps span the model's input.

    Args:
        function: (model, images_BCHW, target) → (B, h, w), a tensor or an array of finite numbers.

    Raises:
        UsageError: the argument is not a function.
    """

    name = "function"
    needs = "any model"
    cost = "a forward and a backward pass"

    def __init__(self, function: MapFunction) -> None:
        if not callable(function) or isinstance(function, type):
            raise UsageError(
                f"a method to score must be a Method, a FolderMaps or a function (model, images, target) → (B, h, w), "
                f"got {function!r}"
            )
        self.function = function
        self.title: str = getattr(function, "__name__", type(function).__name__)

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        with torch.enable_grad():
            try:
                maps = self.function(model, images_BCHW.detach().clone().requires_grad_(), target)
            except (UsageError, DataError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # the function is the user's, and the other methods are still scored
                reason = next(iter(str(error).splitlines()), "")
                raise UsageError(f"{self.title} failed ({type(error).__name__}: {reason})") from error
        if not isinstance(maps, (Tensor, np.ndarray)):
            raise UsageError(f"{self.title} must return (B, h, w) heatmaps, got {type(maps).__name__}")
        raw = torch.as_tensor(maps, device=images_BCHW.device).detach()
        if raw.ndim != 3 or len(raw) != len(images_BCHW) or raw.numel() == 0 or raw.is_complex():
            raise UsageError(
                f"{self.title} must return (B, h, w) heatmaps for B = {len(images_BCHW)} images, got {tuple(raw.shape)}"
            )
        if not raw.isfinite().all():
            raise DataError(f"the heatmaps of {self.title} hold NaN or infinity")
        return Explanation(raw.float(), None, None, self.title)


class FolderMaps:
    """Heatmaps in a folder, one file per image, for `score`.

    The file of `photo.jpg` is `photo.npy`, `photo.npz`, `photo.png`, or one of these with the whole name, as
    `photo.jpg.npy`. Sub-folders of the images are sub-folders here: `cats/photo.jpg` has `cats/photo.npy`. A folder
    without sub-folders also serves, as long as no two images have the same name.

    A file holds one 2-D array of finite numbers of any size. An .npz holds one array, or several of which one is called
    `heatmap`. A .png is grey, with 8 or 16 bits. No file runs code.

    A heatmap spans either the whole source picture, upright, or the model's input. If it has the size of one
    of them, or else the ratio of its sides, it spans that one. If both fit and the model's input is not the whole
    picture (a square picture, a square heatmap, and a model that crops), the sizes do not decide it: set `frame`.
    A heatmap of the picture is carried to the input; parts of the input outside the picture get the lowest value.

    Heatmaps of the input keep their own grid, and are averaged if they have more cells than the input has pixels.
    Heatmaps of the picture get one cell per pixel of the input. The controls have the same grid.

    Args:
        folder: the folder of the files.
        frame: what the heatmaps span, `picture` or `input` (default: see above).

    Raises:
        UsageError: there is no such folder, or `frame` is another word.
    """

    def __init__(self, folder: "str | os.PathLike[str]", *, frame: Frame | None = None) -> None:
        self.folder, self.frame = local_path(folder), frame
        if not os.path.isdir(folder):
            raise UsageError(f"there is no folder of heatmaps {printable(self.folder)}")
        if frame not in (None, "picture", "input"):
            raise UsageError(f"frame must be picture or input, got {frame!r}")
        self._files: dict[PurePath, list[Path]] = {}  # path inside the folder, without suffix → files
        self._images: dict[Path, str] = {}  # file → the image that it belongs to
        for place, _, names in os.walk(folder):
            for name in sorted(names):
                if name.lower().endswith(_SUFFIXES):
                    file = Path(place, name)
                    self._files.setdefault(file.relative_to(folder).with_suffix(""), []).append(file)

    def of_batch(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the heatmaps of a batch's images, (B, h, w) float32.

        Args:
            batch: `image` (B, C, H, W), `path` (B strings), and `placement` (B placements) unless the images are the
                model's input itself.

        Raises:
            UsageError: the batch has no paths, or a heatmap could span the picture or the input: set `frame`.
            DataError: a heatmap is missing, matched twice, unreadable, not finite, not 2-D or of the wrong size.
        """
        if "path" not in batch:
            raise UsageError("heatmaps of a folder are found by the paths of the images, and these images have none")
        size = tuple(batch["image"].shape[2:])
        placements = batch.get("placement") or [Placement.identity(size)] * len(batch["path"])
        maps = [self._of_image(path, placement) for path, placement in zip(batch["path"], placements, strict=True)]
        shapes = dict.fromkeys(tuple(heatmap.shape) for heatmap in maps)
        if len(shapes) > 1:
            raise DataError(different_sizes(*list(shapes)[:2]))
        return torch.stack(maps)

    def _of_image(self, path: str, placement: Placement) -> Tensor:
        file = self._file(path)
        heatmap_hw = read_heatmap(file)
        low = heatmap_hw.min()
        if self._frame(file, heatmap_hw.shape, placement) == "input":
            return _shrunk(heatmap_hw, placement.input_size)
        (height, width), (across, down) = placement.source_size, np.hypot(*placement.matrix[:, :2])
        heatmap = _shrunk(heatmap_hw - low, (max(1, round(height * down)), max(1, round(width * across))))
        return torch.from_numpy(_inverse(placement).carry(heatmap.numpy()) + low)

    def _file(self, path: str) -> Path:
        """Return the file of an image: the one that shares most of the image's folders."""
        image = PurePath(path)
        parts = image.parts
        for start in range(len(parts)):
            inner = PurePath(*parts[start:])
            files = [*self._files.get(inner, ()), *self._files.get(inner.with_suffix(""), ())]
            if len(files) > 1:
                raise DataError(f"{_names(files[:2])} both match {printable(path)}; keep one")
            if files:
                other = self._images.setdefault(files[0], path)
                if other != path:
                    raise DataError(
                        f"{printable(str(files[0]))} matches two images, {printable(other)} and {printable(path)}; "
                        "keep the images' sub-folders, or write photo.jpg.npy for photo.jpg"
                    )
                return files[0]
        raise DataError(f"{printable(self.folder)} has no heatmap of {printable(path)}")

    def _frame(self, file: Path, shape: tuple[int, ...], placement: Placement) -> Frame:
        source, size = placement.source_size, placement.input_size
        if self.frame is not None:
            if not _same_ratio(shape, source if self.frame == "picture" else size):
                raise DataError(
                    f"{printable(str(file))} is {_by(shape)}, which has not the ratio of {self._sides(source, size)}"
                )
            return self.frame
        for same in (tuple.__eq__, _same_exact_ratio, _same_ratio):
            of_picture, of_input = same(shape, source), same(shape, size)
            if of_picture != of_input:
                return "picture" if of_picture else "input"
            if of_picture and not _is_whole(placement):
                raise UsageError(
                    f"{printable(str(file))}, {_by(shape)}, may span the picture or the model's input, which is not "
                    "the whole picture; say which, by --maps-span or frame=, picture or input"
                )
            if of_picture:
                return "input"
        raise DataError(
            f"{printable(str(file))} is {_by(shape)}, which has the ratio neither of the picture ({_by(source)}) "
            f"nor of the model's input ({_by(size)})"
        )

    def _sides(self, source: tuple[int, int], size: tuple[int, int]) -> str:
        return f"the picture ({_by(source)})" if self.frame == "picture" else f"the model's input ({_by(size)})"


def folders_of(pairs: "list[str]", taken: "list[str]", *, frame: Frame | None = None) -> dict[str, FolderMaps]:
    """Make `FolderMaps` from the words NAME=FOLDER of the command line: name → folder.

    Args:
        pairs: the words.
        taken: names of other methods in the table.
        frame: see `FolderMaps`.

    Raises:
        UsageError: a word has another form, a name is taken, or a folder is missing.
    """
    folders: dict[str, FolderMaps] = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise UsageError(f"--maps takes NAME=FOLDER, got {printable(pair)!r}")
        if name in METHODS or name in taken or name in folders:
            raise UsageError(f"--maps: {printable(name)!r} is already the name of a method; choose another name")
        folders[name] = FolderMaps(folder, frame=frame)
    return folders


def read_heatmap(path: Path) -> NDArray[np.float32]:
    """Read one heatmap, (h, w) float32, from a .npy, .npz or grey .png.

    Raises:
        DataError: the file cannot be read, is too large, or holds no 2-D array of finite numbers.
    """
    name = printable(str(path))
    values: NDArray[Any]
    if path.suffix.lower() == ".png":
        values = read_grey(path)
    else:
        try:
            values = _read_array(path)
        except DataError:
            raise
        except Exception as error:  # NumPy and zipfile raise many errors for damaged files
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise DataError(f"{name}: is not an array that can be read ({reason})") from error
    if values.ndim != 2 or values.dtype.kind not in "biuf" or values.size == 0:
        raise DataError(f"{name} holds {values.dtype} of shape {values.shape}; a heatmap is a 2-D array of numbers")
    if values.size > MAX_PIXELS:
        raise DataError(f"{name} has {values.size:,} cells; the limit is {MAX_PIXELS:,}")
    heatmap_hw = np.array(values, np.float32)
    if not np.isfinite(heatmap_hw).all():
        raise DataError(f"{name} holds NaN or infinity")
    return heatmap_hw


def different_sizes(first: tuple[int, ...], second: tuple[int, ...]) -> str:
    """Return an error message: the heatmaps of one method have two sizes, so its controls have no grid."""
    return f"its heatmaps have two sizes, {_by(first)} and {_by(second)}, and the controls need one grid"


def _read_array(path: Path) -> NDArray[Any]:
    if not zipfile.is_zipfile(path):
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))  # reads no more than the file holds
    with zipfile.ZipFile(path) as packed:
        names = packed.namelist()
        name = names[0] if len(names) == 1 else "heatmap.npy"
        if name not in names:
            inside = ", ".join(PurePath(other).stem for other in names[:4]) or "nothing"
            raise DataError(f"{printable(str(path))} holds {inside}; one array must be called heatmap")
        if packed.getinfo(name).file_size > 8 * MAX_PIXELS + 10_000:
            raise DataError(f"{printable(str(path))} is too large for a heatmap; the limit is {MAX_PIXELS:,} cells")
        with packed.open(name) as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _shrunk(heatmap_hw: NDArray[np.float32], size: tuple[int, int]) -> Tensor:
    """Return the heatmap, averaged to at most `size` (rows, columns)."""
    heatmap = torch.from_numpy(heatmap_hw)
    rows, columns = (min(have, limit) for have, limit in zip(heatmap.shape, size, strict=True))
    if (rows, columns) == heatmap.shape:
        return heatmap
    return F.adaptive_avg_pool2d(heatmap[None], (rows, columns))[0]


def _inverse(placement: Placement) -> Placement:
    square = np.vstack([placement.matrix, [0, 0, 1]])
    return Placement(np.linalg.inv(square)[:2], placement.input_size, placement.source_size)


def _is_whole(placement: Placement) -> bool:
    """Return whether the picture's corners are the input's corners, so that both span the same."""
    (height, width), (rows, columns) = placement.source_size, placement.input_size
    corners = placement.to_input(np.array([[0, 0], [width, 0], [0, height], [width, height]]))
    expected = np.array([[0, 0], [columns, 0], [0, rows], [columns, rows]])
    return bool(np.abs(corners - expected).max() <= 0.5)


def _same_exact_ratio(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    return shape[0] * size[1] == shape[1] * size[0]


def _same_ratio(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Return whether two sizes have the same ratio, if each side of `shape` was rounded to a whole number."""
    (rows, columns), (height, width) = shape, size
    return abs(rows * width - columns * height) <= (height + width) / 2


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _names(files: list[Path]) -> str:
    return " and ".join(printable(str(file)) for file in files)
