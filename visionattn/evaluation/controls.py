"""Controls: heatmaps that do not depend on the model. A method must beat them before its heatmaps can be trusted.

A control is called in the same way as a method.

Shapes: B images, C channels, H × W pixels, h × w cells of a heatmap.
"""

import hashlib
from abc import abstractmethod
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from visionattn.capture import run
from visionattn.errors import UsageError
from visionattn.maps import Explanation, Method, Target

METRICS = {
    "deletion": -1,
    "insertion": 1,
    "road": 1,
    "saco": 1,
    "pointing": 1,
    "energy": 1,
    "iou": 1,
    "grid": 1,
    "shuffled": -1,
}
"""Metric → 1 if a higher value is better, −1 if a lower value is better.

- `deletion`, `insertion`: area under the curve that the function of the same name returns.
- `road`, `saco`: the functions of the same names.
- `grid`: `grid_pointing` on grids of 2 × 2 images of the batch.
- `pointing`, `energy`: measured on the object's box, or on the object's mask if there is no box.
- `iou`: overlap with the object's mask, or with its box if there is no mask, at the threshold that is best for the
  method.
- `shuffled`: |rank correlation| between the method's heatmaps of the model and of a copy with shuffled weights,
  averaged over copies. The value is absolute because an inverted map shows the same regions.
"""

Value = TypeVar("Value", float, NDArray[np.floating])


class Control(Method):
    """A heatmap that does not depend on the model. Subclasses compute it in `draw`."""

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        return Explanation(self.draw(images_BCHW), run(model, images_BCHW), None, "no layer")

    @abstractmethod
    def draw(self, images_BCHW: Tensor) -> Tensor:
        """Return the maps, (B, h, w)."""


class RandomMap(Control):
    """Independent uniform random numbers in [0, 1). The same image always gets the same map.

    Compare a method with the random map on the method's own grid. In deletion and insertion, a coarse map changes an
    image patch by patch, and a fine map pixel by pixel; a model reacts differently to the two.

    Args:
        grid: (rows, columns), each ≥ 1.
        seed: seed of the numbers; a different seed gives different maps.

    Raises:
        UsageError: the grid has no cells.
    """

    name = "random"

    def __init__(self, grid: tuple[int, int], *, seed: int = 0) -> None:
        self.grid, self.seed = check_grid(grid), seed

    def draw(self, images_BCHW: Tensor) -> Tensor:
        generator = torch.Generator()
        maps = []
        for image_CHW in images_BCHW.float().cpu():
            digest = hashlib.blake2b(image_CHW.contiguous().numpy().tobytes(), digest_size=7, salt=b"%d" % self.seed)
            maps.append(torch.rand(self.grid, generator=generator.manual_seed(int.from_bytes(digest.digest(), "big"))))
        return torch.stack(maps).to(images_BCHW.device)


class CentreGaussian(Control):
    """A Gaussian at the centre of the image, exp(−(x² + y²) / (2σ²)). Most photographs show their object at the centre.

    Args:
        sigma: σ as a fraction of each side, > 0.

    Raises:
        UsageError: sigma is not positive.
    """

    name = "centre"

    def __init__(self, *, sigma: float = 0.25) -> None:
        if not sigma > 0:
            raise UsageError(f"sigma must be > 0, got {sigma}")
        self.sigma = sigma

    def draw(self, images_BCHW: Tensor) -> Tensor:
        count, _, height, width = images_BCHW.shape
        y_H, x_W = ((torch.arange(side, device=images_BCHW.device) + 0.5) / side - 0.5 for side in (height, width))
        squared_HW = y_H[:, None].square() + x_W.square()
        return torch.exp(-squared_HW / (2 * self.sigma**2)).expand(count, -1, -1)


class Edges(Control):
    """The length of the image gradient, √(gx² + gy²), by Sobel's 3 × 3 filters on the mean over channels.

    Adebayo et al. 2018 (1810.03292) found that the heatmaps of some methods show no more than such edges. Compare a
    method with the edges on the method's own grid. With one cell per pixel, insertion would restore the sharpest single
    pixels first, and no method with a coarse grid can do that.

    Args:
        grid: (rows, columns) of cells, each ≥ 1; a cell is the mean of its pixels (default: one cell per pixel).

    Raises:
        UsageError: the grid has no cells.
    """

    name = "edges"

    def __init__(self, grid: tuple[int, int] | None = None) -> None:
        self.grid = None if grid is None else check_grid(grid)

    def draw(self, images_BCHW: Tensor) -> Tensor:
        grey_B1HW = F.pad(images_BCHW.float().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=images_BCHW.device)
        gradient_B2HW = F.conv2d(grey_B1HW, torch.stack([across, across.T])[:, None])
        length_BHW = gradient_B2HW.square().sum(1).sqrt()
        return length_BHW if self.grid is None else F.adaptive_avg_pool2d(length_BHW, self.grid)


def check_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """Return the grid; raise a UsageError if it has no cells."""
    rows, columns = grid
    if min(rows, columns) < 1:
        raise UsageError(f"grid must be at least 1×1, got {rows}×{columns}")
    return rows, columns


def controls_of(heatmaps_Bhw: Tensor, *, seed: int = 0) -> dict[str, Control]:
    """Return the controls that a method with these heatmaps must beat: name → control.

    The controls are a Gaussian at the centre, and a random map and an edge detector on the method's own grid.

    Args:
        heatmaps_Bhw: the heatmaps of the method; only their grid (h, w) matters.
        seed: seed of the random map.
    """
    rows, columns = heatmaps_Bhw.shape[1:]
    return {
        f"random {rows}×{columns}": RandomMap((rows, columns), seed=seed),
        "centre": CentreGaussian(),
        f"edges {rows}×{columns}": Edges((rows, columns)),
    }


def margin(metric: str, value: Value, control: Value) -> Value:
    """Return how much better a method's value of a metric is than a control's. A positive result favours the method.

    Args:
        metric: a key of `METRICS`.
        value: the method's value, or an array of values.
        control: the control's value, of the same shape.
    """
    return METRICS[metric] * (value - control)
