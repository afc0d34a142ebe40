"""The retina: patches of an image around a location, sharp in the middle and coarse around it.

Shapes: B batch, R looks at each image, S scales, C channels, H × W image, h × w patch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.errors import UsageError


class Axis(NamedTuple):
    """How a location becomes the places of a patch's values in the planes, along rows or columns.

    In plane s (S, 1) the k-th value stands at slope · location + offset + reach[s, k]: of an exact retina, rounded down
    before the reach is added, the index there; of one that looks between pixels, the coordinate that grid_sample takes.
    """

    slope: Tensor
    offset: Tensor
    reach: Tensor


class View(NamedTuple):
    """Images as a retina keeps them, a plane a scale, f = factor^s, less the background.

    Of an exact retina planes[s] is (B, C, H + 2F − f + 1, W + 2F − f + 1), F being the largest f: at [y + F, x + F]
    stands the sum of the f × f pixels whose upper left one is (y, x); the outermost rows and columns are nothing but
    background. Of one that looks between pixels it is (B, C, ⌈H/f⌉, ⌈W/f⌉): at [i, j] the mean of the f × f pixels
    whose upper left one is (f·i, f·j). `size` is (H, W).
    """

    planes: tuple[Tensor, ...]
    axes: tuple[Axis, Axis]
    size: tuple[int, int]

    def of(self, which: Tensor) -> "View":
        """The view of some of the images: a mask or indices."""
        return self._replace(planes=tuple(plane[which] for plane in self.planes))


class Retina(nn.Module):
    """Look at places of an image with a foveated patch (Mnih et al. 2014, 1406.6247, section 3.1).

    The patch of scale s = 0 … S − 1 covers (f·h) × (f·w) pixels with f = factor^s, centred on the location, and every
    one of its h × w values is the mean of f × f pixels:

        c = (l + 1) / 2 · (size − 1)                                        the location in pixels, along each axis
        patch_s(i, j) = mean of image[t_y + f·i + (0 … f − 1), t_x + f·j + (0 … f − 1)],   t = c − (f·h − 1) / 2

    What lies outside the image is background. Exact looks round t to whole pixels (halves up). Sub-pixel looks have a
    gradient with respect to the location: they interpolate bilinearly in a pyramid,

        P_s(i, j) = mean of image[f·i + (0 … f − 1), f·j + (0 … f − 1)]
        patch_s(i, j) = P_s(t_y / f + i, t_x / f + j)

    which is the exact patch where t is a multiple of f, and a little smoother elsewhere. For large images and several
    scales it is also the faster of the two. The means are computed once an image, whatever the number of looks.

    Deviations from the paper: none known; it does not say how a scale is reduced, and public code averages, as here.

    Args:
        patch_size: (h, w), or one number for both; odd or even.
        scales: S.
        factor: how much wider each scale sees than the one before, ≥ 2.
        background: value outside the image, as the images are normalised: one number, or one a channel. If it is not
            that of the pictures' own background, their edge gives the place away.
        subpixel: interpolate between pixels.

    Raises:
        ValueError: a size, number or factor is too small.
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
        self.fields = [factor**scale for scale in range(scales)]  # pixels that a value covers, along each axis
        self.subpixel = subpixel
        self.coloured = background not in (0, (0,))
        values = (background,) if isinstance(background, (int, float)) else tuple(background)
        self.register_buffer("background", torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False)

    def extra_repr(self) -> str:
        height, width = self.patch_size
        return f"{height} × {width}, scales={self.scales}, factor={self.factor}, subpixel={self.subpixel}"

    def view(self, image_BCHW: Tensor) -> View:
        """Prepare images for any number of looks."""
        if len(self.background) not in (1, image_BCHW.shape[1]):
            raise UsageError(
                f"background has {len(self.background)} values and the images have {image_BCHW.shape[1]} channels"
            )
        # with the background at 0 the padding needs no value of its own
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
            begin = middle - (field * count - 1) / 2  # pixels, of a patch in the middle
            if self.subpixel:
                unit = 2 / plane.shape[2 + axis]  # of grid_sample: −1 and 1 are the edges of the plane
                slopes.append(middle / field * unit)
                offsets.append((begin / field + 0.5) * unit - 1)
                steps.append(unit)
            else:
                slopes.append(middle)
                offsets.append(begin + self.fields[-1] + 0.5)  # rounded down, halves go up
                steps.append(field)
        options: dict[str, Any] = {"device": image.device, "dtype": torch.promote_types(image.dtype, torch.float32)}
        reaches = [[step * place for place in range(count)] for step in steps]
        return Axis(*(torch.tensor(numbers, **options) for numbers in (slopes, offsets, reaches)))

    def look(self, view: View, location_BR2: Tensor) -> Tensor:
        """See the patches at locations (x, y) in [−1, 1], −1 and 1 being the centres of the outermost pixels.

        Shape: (B, R, 2) → (B, R, S, C, h, w). Locations outside [−1, 1] are allowed.
        """
        seen_BRSChw = (self._between if self.subpixel else self._exact)(view, location_BR2)
        return seen_BRSChw + self.background.to(seen_BRSChw) if self.coloured else seen_BRSChw

    def forward(self, image_BCHW: Tensor, location_BR2: Tensor) -> Tensor:
        return self.look(self.view(image_BCHW), location_BR2)

    def boxes(self, location: Tensor, size: tuple[int, int]) -> Tensor:
        """What each scale covers of an image of `size` (H, W): (…, 2) → (…, S, 4), edges in pixels, xyxy."""
        left_xS, top_xS = (self._begin(location[..., 1 - axis, None], axis, size[axis]) for axis in (1, 0))
        height_S, width_S = (top_xS.new_tensor([field * side for field in self.fields]) for side in self.patch_size)
        return torch.stack([left_xS, top_xS, left_xS + width_S, top_xS + height_S], -1).to(location.dtype)

    def _begin(self, along: Tensor, axis: int, size: int) -> Tensor:
        """Row or column, in pixels, of the first pixel of each scale's patch: (…, 1) → (…, S)."""
        middle, far = (size - 1) / 2, self.fields[-1]
        begins = [middle - (field * self.patch_size[axis] - 1) / 2 for field in self.fields]
        if self.subpixel:
            return along.double() * middle + along.new_tensor(begins, dtype=torch.float64)
        # summed as a look sums it, or the two would round to different pixels where it is a near thing
        dtype = torch.promote_types(along.dtype, torch.float32)
        offset_S = along.new_tensor([begin + far + 0.5 for begin in begins], dtype=dtype)
        return torch.addcmul(offset_S, along.to(dtype), torch.full_like(offset_S, middle)).floor() - far

    def _places(self, location_BR2: Tensor, view: View, axis: int) -> Tensor:
        """Where the patches' values stand along an axis: (B, R, S, h or w)."""
        slope, offset, reach_Sk = view.axes[axis]
        begin_BRS = torch.addcmul(offset, location_BR2[..., 1 - axis, None], slope)
        return (begin_BRS if self.subpixel else begin_BRS.floor())[..., None] + reach_Sk

    def _exact(self, view: View, location_BR2: Tensor) -> Tensor:
        row_BRSh, column_BRSw = (self._places(location_BR2, view, axis) for axis in (0, 1))
        seen = []
        for scale, plane_BCYX in enumerate(view.planes):
            rows, columns = plane_BCYX.shape[-2:]
            # beyond the border all is background, and so is the border
            row_BRh = row_BRSh[:, :, scale].clamp(0, rows - 1).long()
            column_BRw = column_BRSw[:, :, scale].clamp(0, columns - 1).long()
            index_BRhw = (row_BRh * columns)[..., None] + column_BRw[..., None, :]
            index_BCN = index_BRhw.flatten(1)[:, None].expand(-1, plane_BCYX.shape[1], -1)
            total = plane_BCYX.flatten(2).gather(2, index_BCN)
            patch = total / self.fields[scale] ** 2 if scale else total
            seen.append(patch.unflatten(2, index_BRhw.shape[1:]).transpose(1, 2))
        return torch.stack(seen, 2) if len(seen) > 1 else seen[0].unsqueeze(2)

    def _between(self, view: View, location_BR2: Tensor) -> Tensor:
        y_BRSh, x_BRSw = (self._places(location_BR2, view, axis) for axis in (0, 1))
        height, width = self.patch_size
        grid_BRShw2 = torch.stack(
            [x_BRSw[..., None, :].expand(-1, -1, -1, height, -1), y_BRSh[..., None].expand(-1, -1, -1, -1, width)], -1
        ).to(view.planes[0].dtype)
        seen = []
        for scale, plane_BCYX in enumerate(view.planes):
            grid_BNw2 = grid_BRShw2[:, :, scale].flatten(1, 2)
            patch = F.grid_sample(plane_BCYX, grid_BNw2, padding_mode="zeros", align_corners=False)
            seen.append(patch.unflatten(2, (-1, height)).transpose(1, 2))
        return torch.stack(seen, 2)


def _sum_of(plane: Tensor, count: int, step: int) -> Tensor:
    """The sum of count × count values that lie `step` apart, at every place where all of them exist."""
    for axis in (-2, -1):
        length = plane.shape[axis] - (count - 1) * step
        parts = [plane.narrow(axis, place * step, length) for place in range(count)]
        plane = sum(parts[1:], parts[0])
    return plane


def _mean_of_blocks(image: Tensor, count: int) -> Tensor:
    """The mean over blocks of count × count values; the sides are multiples of count."""
    for axis in (-2, -1):
        rows = [image[..., place::count, :] if axis == -2 else image[..., place::count] for place in range(count)]
        image = sum(rows[1:], rows[0])
    return image / count**2
