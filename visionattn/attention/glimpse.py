"""The retina: patches of an image around a location, sharp in the middle and coarse around it.

Shapes: B batch, R looks at each image, S scales, C channels, H × W image, h × w patch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.errors import UsageError


class View(NamedTuple):
    """An image as a retina keeps it: `planes[s]` (B, C, H + f + 1, W + f + 1), f = factor^s.

    planes[s][y + f, x + f] is the mean of the f × f pixels whose upper left one is (y, x), for y from −f to H, so that
    the outermost rows and columns are nothing but background.
    """

    planes: tuple[Tensor, ...]
    size: tuple[int, int]


class Retina(nn.Module):
    """Look at places of an image with a foveated patch (Mnih et al. 2014, 1406.6247, section 3.1).

    The patch of scale s = 0 … S − 1 covers (f·h) × (f·w) pixels with f = factor^s, centred on the location, and every
    one of its h × w values is the mean of f × f pixels:

        c = (l + 1) / 2 · (size − 1)                                        the location in pixels, along each axis
        patch_s(i, j) = mean of image[t_y + f·i + (0 … f − 1), t_x + f·j + (0 … f − 1)],   t = c − (f·h − 1) / 2

    What lies outside the image is background. Exact looks round t to whole pixels (halves up). Sub-pixel looks read
    between pixels by bilinear interpolation of those means; they agree with exact ones where t is whole, and have a
    gradient with respect to the location.

    Deviations from the paper: none known; it does not say how a scale is reduced, and public code averages, as here.
    The means are computed once an image, whatever the number of looks.

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
        self.subpixel = subpixel
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
        plane = F.pad(image_BCHW - self.background.to(image_BCHW), (1, 1, 1, 1))
        planes = [plane]
        before = 1
        for _ in range(1, self.scales):
            after = before * self.factor
            far = after - before
            plane = _mean_of(F.pad(plane, (far, far, far, far)), self.factor, before)
            planes.append(plane)
            before = after
        return View(tuple(planes), (image_BCHW.shape[-2], image_BCHW.shape[-1]))

    def look(self, view: View, location_BR2: Tensor) -> Tensor:
        """See the patches at locations (x, y) in [−1, 1], −1 and 1 being the centres of the outermost pixels.

        Shape: (B, R, 2) → (B, R, S, C, h, w). Locations outside [−1, 1] are allowed.
        """
        see = self._between if self.subpixel else self._exact
        return see(view, location_BR2) + self.background.to(view.planes[0])

    def forward(self, image_BCHW: Tensor, location_BR2: Tensor) -> Tensor:
        return self.look(self.view(image_BCHW), location_BR2)

    def boxes(self, location: Tensor, size: tuple[int, int]) -> Tensor:
        """What each scale covers of an image of `size` (H, W): (…, 2) → (…, S, 4), edges in pixels, xyxy."""
        corners = []
        for scale in range(self.scales):
            top, left = self._start(location.double(), size, scale)
            height, width = (self.factor**scale * side for side in self.patch_size)
            corners.append(torch.stack([left, top, left + width, top + height], -1))
        return torch.stack(corners, -2).to(location.dtype)

    def _start(self, location: Tensor, size: tuple[int, int], scale: int) -> tuple[Tensor, Tensor]:
        """Row and column, in pixels, of the upper left pixel of a scale's patch."""
        starts = []
        for axis in (1, 0):
            centre = (location[..., axis] + 1) * ((size[1 - axis] - 1) / 2)
            start = centre - (self.factor**scale * self.patch_size[1 - axis] - 1) / 2
            starts.append(start if self.subpixel else torch.floor(start + 0.5))
        return starts[0], starts[1]

    def _places(self, location_BR2: Tensor, size: tuple[int, int], scale: int) -> tuple[Tensor, Tensor]:
        """Rows (B, R, h) and columns (B, R, w) of a plane that a patch's values stand in, inside its border."""
        step = self.factor**scale
        places = []
        for start_BR, count, side in zip(self._start(location_BR2, size, scale), self.patch_size, size, strict=True):
            steps = step * torch.arange(count, device=location_BR2.device, dtype=location_BR2.dtype)
            # beyond the border all is background, and so is the border
            places.append((start_BR[..., None] + step + steps).clamp(0, side + step))
        return places[0], places[1]

    def _exact(self, view: View, location_BR2: Tensor) -> Tensor:
        height, width = self.patch_size
        seen = []
        for scale, plane_BCYX in enumerate(view.planes):
            row_BRh, column_BRw = self._places(location_BR2, view.size, scale)
            index_BRhw = row_BRh.long()[..., None] * plane_BCYX.shape[-1] + column_BRw.long()[..., None, :]
            channels = plane_BCYX.shape[1]
            index_BCN = index_BRhw.flatten(1)[:, None].expand(-1, channels, -1)
            patch = plane_BCYX.flatten(2).gather(2, index_BCN)
            seen.append(patch.unflatten(2, (-1, height, width)).transpose(1, 2))
        return torch.stack(seen, 2)

    def _between(self, view: View, location_BR2: Tensor) -> Tensor:
        height, width = self.patch_size
        seen = []
        for scale, plane_BCYX in enumerate(view.planes):
            row_BRh, column_BRw = self._places(location_BR2, view.size, scale)
            rows, columns = (side - 1 for side in plane_BCYX.shape[-2:])
            grid_y = (row_BRh * (2 / rows) - 1)[..., None].expand(-1, -1, -1, width)
            grid_x = (column_BRw * (2 / columns) - 1)[..., None, :].expand(-1, -1, height, -1)
            grid_BNw2 = torch.stack([grid_x, grid_y], -1).flatten(1, 2).to(plane_BCYX.dtype)
            patch = F.grid_sample(plane_BCYX, grid_BNw2, padding_mode="border", align_corners=True)
            seen.append(patch.unflatten(2, (-1, height)).transpose(1, 2))
        return torch.stack(seen, 2)


def _mean_of(plane: Tensor, count: int, step: int) -> Tensor:
    """The mean over count × count values that lie `step` apart, at every place where all of them exist."""
    for axis in (-2, -1):
        length = plane.shape[axis] - (count - 1) * step
        total = plane.narrow(axis, 0, length)
        for place in range(1, count):
            total = total + plane.narrow(axis, place * step, length)
        plane = total
    return plane / count**2
