"""Affine maps from the pixels of a source image to the pixels of a model's input, and preprocessing with such a map.

Coordinates are continuous: pixel i covers [i, i + 1), (0, 0) is the outer corner of the top-left pixel, x increases to
the right and y downwards.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Size = tuple[int, int]
"""(height, width)"""

Interpolation: TypeAlias = Literal["nearest", "linear", "smooth"]
"""How `Placement.carry` finds the heat between the centres of a heatmap's cells."""

_PILLOW = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class Placement:
    """Map the pixels of a source image to those of a model's input, by an affine matrix.

    Args:
        matrix: (2, 3); input (x, y) = matrix @ (source x, source y, 1).
        source_size: (height, width) of the source, pixels.
        input_size: (height, width) of the input, pixels.
    """

    # not a dataclass: Lightning refuses frozen dataclasses in a batch, and copies other dataclasses field by field

    def __init__(self, matrix: NDArray[np.floating], source_size: Size, input_size: Size) -> None:
        self.matrix: NDArray[np.float64] = np.asarray(matrix, np.float64)
        self.source_size = source_size
        self.input_size = input_size

    def __repr__(self) -> str:
        return f"Placement({self.matrix.tolist()}, source_size={self.source_size}, input_size={self.input_size})"

    @classmethod
    def identity(cls, size: Size) -> "Placement":
        """Return the placement for an image that is the input without any change."""
        return cls(np.eye(2, 3), size, size)

    @classmethod
    def scaling(cls, source_size: Size, input_size: Size) -> "Placement":
        """Return the placement for a source image that is resized to the input as a whole."""
        (source_h, source_w), (input_h, input_w) = source_size, input_size
        return cls(np.array([[input_w / source_w, 0, 0], [0, input_h / source_h, 0]], float), source_size, input_size)

    def __matmul__(self, inner: "Placement") -> "Placement":
        """Compose two placements: apply `inner` first, then this placement."""
        return Placement(_square(self.matrix)[:2] @ _square(inner.matrix), inner.source_size, self.input_size)

    def to_input(self, points_N2: NDArray[np.floating]) -> NDArray[np.float64]:
        """Map (N, 2) points (x, y) from the source to the input."""
        return np.asarray(points_N2, float) @ self.matrix[:, :2].T + self.matrix[:, 2]

    def to_source(self, points_N2: NDArray[np.floating]) -> NDArray[np.float64]:
        """Map (N, 2) points (x, y) from the input to the source."""
        inverse = np.linalg.inv(_square(self.matrix))
        return np.asarray(points_N2, float) @ inverse[:2, :2].T + inverse[:2, 2]

    def boxes_to_input(self, boxes_N4: NDArray[np.floating]) -> NDArray[np.float64]:
        """Map (N, 4) xyxy boxes from source to input: bounding boxes of the mapped corners, clipped to the input."""
        return _clip(_hull(self.to_input(_corners(boxes_N4))), self.input_size)

    def boxes_to_source(self, boxes_N4: NDArray[np.floating]) -> NDArray[np.float64]:
        """Map (N, 4) xyxy boxes from input to source: bounding boxes of the mapped corners, clipped to the source."""
        return _clip(_hull(self.to_source(_corners(boxes_N4))), self.source_size)

    def seen(self) -> NDArray[np.bool_]:
        """Return the (H, W) mask of the source pixels whose centre is inside the input."""
        (height, width), (input_h, input_w) = self.source_size, self.input_size
        centres = self.to_input(
            np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), -1).reshape(-1, 2)
        )
        inside = (centres >= 0).all(1) & (centres[:, 0] <= input_w) & (centres[:, 1] <= input_h)
        return inside.reshape(height, width)

    def carry(self, heatmap_hw: NDArray[np.floating], interpolation: Interpolation = "linear") -> NDArray[np.float32]:
        """Resample a heatmap from the model's input to the pixels of the source.

        Values that are compared or stored are linear: `overlays.Heatmap.values`, the output `heatmap`, the differences
        in a manifest, and the heatmaps that `evaluation` scores. Pictures are smooth unless a `drawing.Style` says
        otherwise.

        Args:
            heatmap_hw: (h, w), any resolution; the heatmap spans the whole input.
            interpolation: `nearest` gives every pixel the value of its cell. `linear` is bilinear between the centres
                of the cells and constant beyond the outermost centres; its slope jumps at every centre, which shows as
                crosses and frames in a picture. `smooth` is the cubic convolution of Keys (1981, a = −1/2), whose slope
                does not jump. It has the cells' own values at their centres, as `linear` has. The heatmap is mirrored
                at its edges, and values beyond the range of the cells are cut off.

        Returns:
            (H, W) float32 at the source's size. Inside the input the values stay in the range of the
            heatmap; outside they are 0.

        Raises:
            ValueError: there is no such interpolation.
        """
        if interpolation not in get_args(Interpolation):
            raise ValueError(f"interpolation must be nearest, linear or smooth, got {interpolation!r}")
        heatmap_hw = np.ascontiguousarray(heatmap_hw, np.float32)
        to_cells = np.diag([heatmap_hw.shape[1] / self.input_size[1], heatmap_hw.shape[0] / self.input_size[0], 1.0])
        matrix = to_cells @ _square(self.matrix)
        height, width = self.source_size
        if matrix[0, 1] == matrix[1, 0] == 0:  # no rotation or shear: resampling one axis after the other is exact
            columns_W = matrix[0, 0] * (np.arange(width) + 0.5) + matrix[0, 2]
            rows_H = matrix[1, 1] * (np.arange(height) + 0.5) + matrix[1, 2]
            wide_hW = np.ascontiguousarray(_interpolate_rows(heatmap_hw.T, columns_W, interpolation).T)
            carried_HW = _interpolate_rows(wide_hW, rows_H, interpolation)
            if interpolation == "smooth":
                np.clip(carried_HW, heatmap_hw.min(), heatmap_hw.max(), out=carried_HW)
            carried_HW[_outside(rows_H, heatmap_hw.shape[0])] = 0
            carried_HW[:, _outside(columns_W, heatmap_hw.shape[1])] = 0
            return carried_HW
        if interpolation == "smooth" and heatmap_hw.shape != self.input_size:
            # OpenCV's bicubic uses a = −3/4, not −1/2; between pixels of the input, linear is smooth enough
            enlarged_hw = Placement.identity(self.input_size).carry(heatmap_hw, "smooth")
            return self.carry(enlarged_hw, "linear")
        matrix[:2, 2] += matrix[:2, :2] @ (0.5, 0.5) - 0.5  # in OpenCV, integer coordinates are pixel centres
        method = cv2.INTER_NEAREST if interpolation == "nearest" else cv2.INTER_LINEAR
        flags = method | cv2.WARP_INVERSE_MAP
        carried = cv2.warpAffine(heatmap_hw, matrix[:2], (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        return np.where(self.seen(), carried, np.float32(0))


@dataclass(frozen=True)
class Preprocess:
    """Resize an image to a model's input and normalise its values.

    Attributes:
        size: size of the input in pixels: one number for a square, or (height, width) (default: 224).
        fit: `crop` scales the image to cover the frame; `letterbox` scales the image to fit into the frame and pads
            with the mean colour; `stretch` scales each side by its own factor. These are timm's crop modes `center`,
            `border` and `squash` (default: crop).
        crop_fraction: size of the input as a fraction of the frame, > 0; the same as timm's `crop_pct`. The input is
            the centre of the frame; above 1, `crop` and `stretch` pad with black (default: 1).
        interpolation: `area` averages the pixels when the image shrinks, and is bicubic when it grows (OpenCV);
            `nearest`, `box`, `hamming`, `bilinear`, `bicubic` and `lanczos` are Pillow's, which timm's models were
            trained with; the last three take two to four times as long (default: area).
        mean: subtracted from red, green and blue, which are in [0, 1] (default: ImageNet's). With one number, the input
            has one grey channel, 0.299 R + 0.587 G + 0.114 B.
        std: divisor of each channel after the mean is subtracted (default: ImageNet's).
        rounding: where the input begins in the resized image, if half of the difference of their sides ends in .5:
            `even` takes the nearest even pixel, as torchvision and timm do; `down` takes the pixel before, as
            transformers does (default: even).
        channel_order: `rgb`, or `bgr` for networks whose first input channel is blue; mean and std are always given for
            red, green and blue (default: rgb).

    Raises:
        ValueError: an attribute is out of its range.
    """

    size: int | Size = 224
    fit: Literal["crop", "letterbox", "stretch"] = "crop"
    crop_fraction: float = 1.0
    interpolation: Literal["area", "nearest", "box", "hamming", "bilinear", "bicubic", "lanczos"] = "area"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    rounding: Literal["even", "down"] = "even"
    channel_order: Literal["rgb", "bgr"] = "rgb"

    def __post_init__(self) -> None:
        sides = self.size if isinstance(self.size, (tuple, list)) else (self.size, self.size)
        if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
            raise ValueError(
                f"size must be a whole number of pixels, at least 1, or two of them (height, width), got {self.size!r}"
            )
        if self.fit not in ("crop", "letterbox", "stretch"):
            raise ValueError(f"fit must be crop, letterbox or stretch, got {self.fit!r}")
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise ValueError(f"mean and std need three numbers each, or one for grey, got {self.mean} and {self.std}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be > 0, got {self.std}")
        if not 0 < self.crop_fraction < math.inf:
            raise ValueError(f"crop_fraction must be > 0, got {self.crop_fraction}")
        if self.interpolation not in ("area", *_PILLOW):
            raise ValueError(f"interpolation must be area, {', '.join(_PILLOW)}, got {self.interpolation!r}")
        if self.rounding not in ("even", "down"):
            raise ValueError(f"rounding must be even or down, got {self.rounding!r}")
        if self.channel_order not in ("rgb", "bgr"):
            raise ValueError(f"channel_order must be rgb or bgr, got {self.channel_order!r}")

    @property
    def input_size(self) -> Size:
        """(height, width) of the input, pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])

    @property
    def frame(self) -> Size:
        """(height, width) of the frame to which an image is resized before its centre is taken, pixels."""
        height, width = self.input_size
        return max(1, math.floor(height / self.crop_fraction)), max(1, math.floor(width / self.crop_fraction))

    @property
    def channels(self) -> int:
        """Number of input channels: 3, or 1 for grey."""
        return len(self.mean)

    def __call__(self, image_HWC: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Placement]:
        """Resize and normalise one image.

        Args:
            image_HWC: (H, W, 3) uint8 RGB.

        Returns:
            The input, (C, height, width) float32, normalised, and the placement from source to input.
        """
        source = image_HWC.shape[0], image_HWC.shape[1]
        scaled = self._scaled_size(source)
        image = _resize(image_HWC, scaled, self.interpolation)
        if self.channels == 1:
            image = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)[..., None]
        top, left = (_centre(have, want, self.rounding) for have, want in zip(scaled, self.input_size, strict=True))
        height, width = self.input_size
        canvas = image[max(0, top) : max(0, top) + height, max(0, left) : max(0, left) + width]
        normal = cv2.LUT(canvas, self._lookup).reshape(canvas.shape)
        if canvas.shape[:2] != self.input_size:
            colour = 0 if self.fit == "letterbox" else self._lookup[0, 0]  # the mean colour is 0 after normalisation
            padded = np.empty((height, width, self.channels), np.float32)
            padded[:] = colour
            above, before = max(0, -top), max(0, -left)
            padded[above : above + canvas.shape[0], before : before + canvas.shape[1]] = normal
            normal = np.asarray(padded)
        if self.channel_order == "bgr":
            normal = normal[..., ::-1]
        shift = Placement(np.array([[1.0, 0, -left], [0, 1.0, -top]]), scaled, self.input_size)
        return np.ascontiguousarray(normal.transpose(2, 0, 1), np.float32), shift @ Placement.scaling(source, scaled)

    def denormalise(self, image_CHW: NDArray[np.floating]) -> NDArray[np.uint8]:
        """Undo the normalisation: (C, H, W) → (H, W, 3) uint8 RGB."""
        image_CHW = np.asarray(image_CHW)[:: -1 if self.channel_order == "bgr" else 1]
        values = image_CHW.transpose(1, 2, 0) * self._std + self._mean
        return np.clip(np.rint(values * 255), 0, 255).astype(np.uint8).repeat(3 // self.channels, 2)

    def _scaled_size(self, source: Size) -> Size:
        """Return the size to which an image is resized before the centre is taken; rounding is the same as timm's."""
        height, width = source
        frame = self.frame
        if self.fit == "stretch":
            return frame
        if self.fit == "crop" and frame[0] == frame[1]:  # timm calls torchvision, which rounds the longer side down
            short, long = frame[0], int(frame[0] * max(source) / min(source))
            return (short, long) if height <= width else (long, short)
        ratios = height / frame[0], width / frame[1]
        ratio = max(ratios) if self.fit == "letterbox" else min(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    @cached_property
    def _lookup(self) -> NDArray[np.float32]:
        """(1, 256, C): the normalised value for each byte value and channel."""
        values = np.arange(256, dtype=np.float32)[None, :, None] / 255
        return np.ascontiguousarray((values - self._mean) / self._std)

    @property
    def _mean(self) -> NDArray[np.float32]:
        return np.asarray(self.mean, np.float32)

    @property
    def _std(self) -> NDArray[np.float32]:
        return np.asarray(self.std, np.float32)


def _resize(image_HWC: NDArray[np.uint8], size: Size, interpolation: str) -> NDArray[np.uint8]:
    if size == image_HWC.shape[:2]:
        return image_HWC
    if interpolation != "area":
        return np.asarray(Image.fromarray(image_HWC).resize((size[1], size[0]), _PILLOW[interpolation]))
    shrinks = size[0] < image_HWC.shape[0] or size[1] < image_HWC.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image_HWC, (size[1], size[0]), interpolation=method), np.uint8)


def _centre(have: int, want: int, rounding: str) -> int:
    """Return where the centre part of an axis begins; negative if the axis is padded."""
    if have < want:
        return -((want - have) // 2)
    return round((have - want) / 2) if rounding == "even" else (have - want) // 2


def crop_fraction_of(input_side: int, frame_side: int) -> float:
    """Return the `crop_fraction` with which `Preprocess` resizes to a frame before it takes the input.

    Args:
        input_side: side of the input, pixels.
        frame_side: side of the frame, pixels: the shorter side of the resized image for `crop`, each side for
            `stretch`.
    """
    fraction = input_side / frame_side
    while math.floor(input_side / fraction) < frame_side:  # the division was rounded up
        fraction = math.nextafter(fraction, 0)
    return fraction


def _interpolate_rows(
    values_nK: NDArray[np.float32], position_N: NDArray[np.float64], interpolation: Interpolation
) -> NDArray[np.float32]:
    """Interpolate between the centres of rows, at positions in units of rows."""
    # no matrix product, since the threads of NumPy's BLAS occupy the cores while they wait for each other
    (row_N, weight_N), *others = _taps(position_N, len(values_nK), interpolation)
    result_NK = values_nK.take(row_N, axis=0)
    result_NK *= weight_N.astype(np.float32)[:, None]
    for row_N, weight_N in others:
        weighted_NK = values_nK.take(row_N, axis=0)
        weighted_NK *= weight_N.astype(np.float32)[:, None]
        result_NK += weighted_NK
    return result_NK


def _taps(
    position_N: NDArray[np.float64], rows: int, interpolation: Interpolation
) -> list[tuple[NDArray[np.int_], NDArray[np.float64]]]:
    """Return the rows that contribute to each position, each with its weight; the weights of a position sum to 1."""
    if interpolation == "nearest":
        return [(np.clip(np.floor(position_N).astype(int), 0, rows - 1), np.ones(len(position_N)))]
    if interpolation == "linear":
        offset_N = np.clip(position_N - 0.5, 0, rows - 1)
        below_N = np.minimum(offset_N.astype(int), max(0, rows - 2))
        share_N = offset_N - below_N
        return [(below_N, 1 - share_N), (below_N + 1, share_N)][:rows]
    offset_N = np.clip(position_N, 0, rows) - 0.5
    below_N = np.floor(offset_N).astype(int)
    t = offset_N - below_N
    weights_4N = (
        t * (t * (2 - t) - 1) / 2,
        (t * t * (3 * t - 5) + 2) / 2,
        t * (t * (4 - 3 * t) + 1) / 2,
        t * t * (t - 1) / 2,
    )
    return [
        (_mirrored(below_N + shift, rows), weight_N) for shift, weight_N in zip((-1, 0, 1, 2), weights_4N, strict=True)
    ]


def _mirrored(row_N: NDArray[np.int_], rows: int) -> NDArray[np.int_]:
    """Mirror the numbers of rows at the outer edges of the first and the last row."""
    folded_N = row_N % (2 * rows)
    return np.minimum(folded_N, 2 * rows - 1 - folded_N)


def _outside(position_N: NDArray[np.float64], rows: int) -> NDArray[np.bool_]:
    return (position_N < 0) | (position_N > rows)


def _square(matrix_23: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.vstack([matrix_23, [0, 0, 1]])


def _corners(boxes_N4: NDArray[np.floating]) -> NDArray[np.float64]:
    edges_N4 = np.asarray(boxes_N4, np.float64).reshape(-1, 4)
    return edges_N4[:, [[0, 1], [2, 1], [0, 3], [2, 3]]]


def _hull(corners_N42: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([corners_N42.min(1), corners_N42.max(1)], 1)


def _clip(boxes_N4: NDArray[np.float64], size: Size) -> NDArray[np.float64]:
    height, width = size
    return np.clip(boxes_N4, 0, [width, height, width, height])


def image_shape(model: object) -> tuple[int, int, int]:
    """Return (channels, height, width) of a model's input; (3, 224, 224) if the model has no such attribute."""
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224)) if isinstance(config, dict) else (3, 224, 224)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "image_size", None)
    height, width = (size if isinstance(size, (tuple, list)) else (size, size)) if size else (height, width)
    return channels, height, width
