"""The retina: patches of an image around a location, sharp in the centre and coarser around it.

Shapes: B batch, R locations in each image, S scales, C channels, H × W image, h × w patch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.errors import UsageError


class Axis(NamedTuple):
    """The numbers that convert a location into coordinates in the planes of a `View`, along rows or along columns.

    Row (or column) k of a patch of scale s is read from plane s at slope[s] · location + offset[s] + reach[s, k].
    Without `subpixel` (an *exact* retina), slope · location + offset is rounded down, so that the sum is an index. With
    `subpixel`, the sum is a coordinate of grid_sample.
    """

    slope: Tensor
    offset: Tensor
    reach: Tensor


class View(NamedTuple):
    """Images prepared by a retina, with the background subtracted: one plane for each scale s, with f = factor^s.

    Attributes:
        planes: in an exact retina, planes[s] is (B, C, H + 2F − f + 1, W + 2F − f + 1), where F is the largest f. The
            value at [y + F, x + F] is the sum of the f × f pixels with top-left pixel (y, x). The outermost rows and
            columns are background. In a sub-pixel retina, planes[s] is (B, C, ⌈H/f⌉, ⌈W/f⌉), and the value at [i, j] is
            the mean of the f × f pixels with top-left pixel (f·i, f·j).
        axes: rows, columns.
        size: (H, W).
    """

    planes: tuple[Tensor, ...]
    axes: tuple[Axis, Axis]
    size: tuple[int, int]

    def of(self, which: Tensor) -> "View":
        """Return the view of some of the images, selected by a mask or by indices."""
        return self._replace(planes=tuple(plane[which] for plane in self.planes))


class Retina(nn.Module):
    """Read foveated patches at locations of an image (Mnih et al. 2014, 1406.6247, section 3.1).

    The patch of scale s = 0 … S − 1 covers (f·h) × (f·w) pixels with f = factor^s, centred on the location; each of its
    h × w values is the mean of f × f pixels:

        c = (l + 1) / 2 · (size − 1)                                        the location in pixels, along each axis
        patch_s(i, j) = mean of image[t_y + f·i + (0 … f − 1), t_x + f·j + (0 … f − 1)],   t = c − (f·h − 1) / 2

    Pixels outside the image are background. An exact retina rounds t to whole pixels (halves up). With `subpixel`, the
    patches have a gradient with respect to the location: they are interpolated bilinearly in a pyramid,

        P_s(i, j) = mean of image[f·i + (0 … f − 1), f·j + (0 … f − 1)]
        patch_s(i, j) = P_s(t_y / f + i, t_x / f + j)

    This equals the exact patch where t is a multiple of f, and is slightly smoother elsewhere. For large images and
    several scales `subpixel` is also faster. The means are computed once per image, for any number of locations.

    Deviations from the paper: none known. The paper does not say how a scale is downsampled; public code averages, as
    this class does.

    Args:
        patch_size: (h, w), or one number for both; odd or even.
        scales: S (default: 1).
        factor: width of the patch of each scale divided by the width at the scale before, ≥ 2 (default: 2).
        background: value of the pixels outside the image, normalised like the images: one number, or one per channel
            (default: 0). Use the value of the images' own background. With another value, patches show the edge of the
            image, and so reveal the location.
        subpixel: interpolate between pixels (default: False).

    Raises:
        ValueError: patch_size, scales or factor is too small.
        UsageError: in `view`, if the number of background values is neither 1 nor the number of channels.
    """

    background: Tensor

    def __init__(
        self,
        patch_size: int | tuple[int, int],
        *,
        scales: int = 1,
        factor: int = 2,
        background: float | Sequence[float] = 0.0,
        subpixel: bool = False,
    ) -> None:
        super().__init__()
        height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        if min(height, width) < 1 or scales < 1 or factor < 2:
            raise ValueError(
                f"a retina needs patch_size ≥ 1, scales ≥ 1 and factor ≥ 2, got {patch_size}, {scales} and {factor}"
            )
        self.patch_size = (height, width)
        self.scales = scales
        self.factor = factor
        # at each scale, a value is the mean over field × field pixels
        self.fields = [factor**scale for scale in range(scales)]
        self.subpixel = subpixel
        self.coloured = background not in (0, (0,))
        values = (background,) if isinstance(background, (int, float)) else tuple(background)
        self.register_buffer("background", torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False)

    def extra_repr(self) -> str:
        height, width = self.patch_size
        return f"{height} × {width}, scales={self.scales}, factor={self.factor}, subpixel={self.subpixel}"

    def view(self, image_BCHW: Tensor) -> View:
        """Prepare images (B, C, H, W) for any number of `look` calls."""
        if len(self.background) not in (1, image_BCHW.shape[1]):
            raise UsageError(
                f"background has {len(self.background)} values and the images have {image_BCHW.shape[1]} channels; "
                "give one value, or one per channel"
            )
        # after this subtraction the background is 0, so zero padding gives background
        image = image_BCHW - self.background.to(image_BCHW) if self.coloured else image_BCHW
        planes = self._pyramid(image) if self.subpixel else self._sums(image)
        axes = (self._axis(image, planes, 0), self._axis(image, planes, 1))
        return View(planes, axes, (image.shape[-2], image.shape[-1]))

    def _sums(self, image: Tensor) -> tuple[Tensor, ...]:
        planes = [F.pad(image, (self.fields[-1],) * 4)]
        for step in self.fields[:-1]:
            planes.append(_sum_of(planes[-1], self.factor, step))
        return tuple(planes)

    def _pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        planes = [image]
        for _ in self.fields[1:]:
            down, right = (-side % self.factor for side in image.shape[-2:])
            image = _mean_of_blocks(F.pad(image, (0, right, 0, down)) if down or right else image, self.factor)
            planes.append(image)
        return tuple(planes)

    def _axis(self, image: Tensor, planes: tuple[Tensor, ...], axis: int) -> Axis:
        count, middle = self.patch_size[axis], (image.shape[2 + axis] - 1) / 2
        slopes, offsets, steps = [], [], []
        for field, plane in zip(self.fields, planes, strict=True):
            begin = middle - (field * count - 1) / 2  # first pixel of a patch at the image's centre
            if self.subpixel:
                unit = 2 / plane.shape[2 + axis]  # grid_sample: −1 and 1 are the plane's edges
                slopes.append(middle / field * unit)
                offsets.append((begin / field + 0.5) * unit - 1)
                steps.append(unit)
            else:
                slopes.append(middle)
                offsets.append(begin + self.fields[-1] + 0.5)  # floor(c + 0.5) rounds halves up
                steps.append(field)
        dtype = torch.promote_types(image.dtype, torch.float32)
        reaches = [[step * place for place in range(count)] for step in steps]
        slope, offset, reach = (
            torch.tensor(numbers, device=image.device, dtype=dtype) for numbers in (slopes, offsets, reaches)
        )
        return Axis(slope, offset, reach)

    def look(self, view: View, location_BR2: Tensor) -> Tensor:
        """Read the patches at locations (x, y); −1 and 1 are the centres of the outermost pixels.

        Shape: (B, R, 2) → (B, R, S, C, h, w). Locations outside [−1, 1] are allowed.
        """
        patch_BRSChw = (self._interpolated if self.subpixel else self._exact)(view, location_BR2)
        return patch_BRSChw + self.background.to(patch_BRSChw) if self.coloured else patch_BRSChw

    def forward(self, image_BCHW: Tensor, location_BR2: Tensor) -> Tensor:
        """Read the patches at locations (B, R, 2) of images (B, C, H, W) → (B, R, S, C, h, w)."""
        return self.look(self.view(image_BCHW), location_BR2)

    def boxes(self, location: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the box that each scale covers in an image of `size` (H, W): (…, 2) → (…, S, 4), xyxy in pixels."""
        left_xS, top_xS = (self._begin(location[..., 1 - axis, None], axis, size[axis]) for axis in (1, 0))
        height_S, width_S = (top_xS.new_tensor([field * side for field in self.fields]) for side in self.patch_size)
        return torch.stack([left_xS, top_xS, left_xS + width_S, top_xS + height_S], -1).to(location.dtype)

    def _begin(self, along: Tensor, axis: int, size: int) -> Tensor:
        """Return the first row or column of each scale's patch, in pixels: (…, 1) → (…, S)."""
        middle, far = (size - 1) / 2, self.fields[-1]
        begins = [middle - (field * self.patch_size[axis] - 1) / 2 for field in self.fields]
        if self.subpixel:
            return along.double() * middle + along.new_tensor(begins, dtype=torch.float64)
        # same operations as in `look`, so that both round to the same pixel
        dtype = torch.promote_types(along.dtype, torch.float32)
        offset_S = along.new_tensor([begin + far + 0.5 for begin in begins], dtype=dtype)
        return torch.addcmul(offset_S, along.to(dtype), torch.full_like(offset_S, middle)).floor() - far

    def _coordinates(self, location_BR2: Tensor, view: View, axis: int) -> Tensor:
        """Return the coordinates of the patches' values along an axis: (B, R, S, h or w)."""
        slope, offset, reach_Sk = view.axes[axis]
        begin_BRS = torch.addcmul(offset, location_BR2[..., 1 - axis, None], slope)
        return (begin_BRS if self.subpixel else begin_BRS.floor())[..., None] + reach_Sk

    def _exact(self, view: View, location_BR2: Tensor) -> Tensor:
        row_BRSh, column_BRSw = (self._coordinates(location_BR2, view, axis) for axis in (0, 1))
        patches = []
        for scale, plane_BCYX in enumerate(view.planes):
            rows, columns = plane_BCYX.shape[-2:]
            # an index outside the plane is clamped to an outermost row or column, which is background
            row_BRh = row_BRSh[:, :, scale].clamp(0, rows - 1).long()
            column_BRw = column_BRSw[:, :, scale].clamp(0, columns - 1).long()
            index_BRhw = (row_BRh * columns)[..., None] + column_BRw[..., None, :]
            index_BCN = index_BRhw.flatten(1)[:, None].expand(-1, plane_BCYX.shape[1], -1)
            total = plane_BCYX.flatten(2).gather(2, index_BCN)
            patch = total / self.fields[scale] ** 2 if scale else total
            patches.append(patch.unflatten(2, index_BRhw.shape[1:]).transpose(1, 2))
        return torch.stack(patches, 2) if len(patches) > 1 else patches[0].unsqueeze(2)

    def _interpolated(self, view: View, location_BR2: Tensor) -> Tensor:
        y_BRSh, x_BRSw = (self._coordinates(location_BR2, view, axis) for axis in (0, 1))
        height, width = self.patch_size
        grid_BRShw2 = torch.stack(
            [x_BRSw[..., None, :].expand(-1, -1, -1, height, -1), y_BRSh[..., None].expand(-1, -1, -1, -1, width)], -1
        ).to(view.planes[0].dtype)
        patches = []
        for scale, plane_BCYX in enumerate(view.planes):
            grid_BNw2 = grid_BRShw2[:, :, scale].flatten(1, 2)
            patch = F.grid_sample(plane_BCYX, grid_BNw2, padding_mode="zeros", align_corners=False)
            patches.append(patch.unflatten(2, (-1, height)).transpose(1, 2))
        return torch.stack(patches, 2)


def _sum_of(plane: Tensor, count: int, step: int) -> Tensor:
    """Sum count × count values that are `step` apart, at every position where all of them exist."""
    for axis in (-2, -1):
        length = plane.shape[axis] - (count - 1) * step
        parts = [plane.narrow(axis, place * step, length) for place in range(count)]
        plane = sum(parts[1:], parts[0])
    return plane


def _mean_of_blocks(image: Tensor, count: int) -> Tensor:
    """Average blocks of count × count values; the sides must be multiples of count."""
    for axis in (-2, -1):
        rows = [image[..., place::count, :] if axis == -2 else image[..., place::count] for place in range(count)]
        image = sum(rows[1:], rows[0])
    return image / count**2
