"""Locations of other code, converted to locations of a retina."""

import torch
from torch import Tensor


def location_from_ram(location: Tensor, size: tuple[int, int]) -> Tensor:
    """Convert locations (u, v) of public RAM code, such as kevinzakka/recurrent-visual-attention, to those of `Retina`.

    In that code, along an axis of W pixels, a patch of g pixels begins at pixel n − ⌊g/2⌋, with n = ⌊(u + 1)/2 · W⌋;
    with W = 28 and g = 8, this is ⌊14 u + 14⌋ − 4. The result is the location of pixel n − 1/4:

        x = 2 (n − 1/4) / (W − 1) − 1

    There an exact `Retina` reads the same pixels at every scale, for odd and for even g. (An even patch is centred on
    pixel n − 1/2 and an odd one on pixel n; the retina rounds n − 1/4 to both.) A `subpixel` retina reads between the
    pixels, and so a patch that is a quarter of a pixel away.

    Args:
        location: (…, 2), horizontal and vertical, in [−1, 1], where −1 and 1 are the image's edges.
        size: (H, W) of the images, ≥ 2.

    Raises:
        ValueError: the images have fewer than two rows or columns.

    Shape: (…, 2) → (…, 2)
    """
    if min(size) < 2:
        raise ValueError(f"size must be at least 2 × 2 pixels, got {size[0]} × {size[1]}")
    sides = torch.tensor([size[1], size[0]], device=location.device, dtype=location.dtype)
    pixel = (0.5 * ((location + 1) * sides)).floor() - 0.25
    return 2 * pixel / (sides - 1) - 1
