"""Heatmaps of no method: what a method must beat before it is believed.

They are called as methods are, and do not look at the model.

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

from visionattn.capture.running import run
from visionattn.errors import UsageError
from visionattn.maps.method import Explanation, Method, Target

FIGURES = {"deletion": -1, "insertion": 1, "pointing": 1, "energy": 1, "iou": 1, "shuffled": -1}
"""Figure → 1 where higher is better, −1 where lower is.

`deletion` and `insertion`: areas under the curves of those functions. `pointing`, `energy`: on the
object's box, or its mask where there is no box. `iou`: with its mask, or its box where there is no mask, at the
threshold that is best for the method. `shuffled`: |rank correlation| with the maps of the model without what it has
learned, the mean over copies; |…|, since a map turned upside down shows the same things.
"""

Value = TypeVar("Value", float, NDArray[np.floating])


class Control(Method):
    """A heatmap that is drawn without a look at the model."""

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        return Explanation(self.draw(images_BCHW), run(model, images_BCHW), None, "no layer")

    @abstractmethod
    def draw(self, images_BCHW: Tensor) -> Tensor:
        """Make the (B, h, w) maps."""


class RandomMap(Control):
    """Independent uniform numbers; the same image has the same map every time.

    A coarse random map changes an image patch by patch, and a fine one dot by dot, which is another change altogether:
    compare a method with the random map of its own grid.

    Args:
        grid: (rows, columns).
        seed: another one gives other maps.
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
    """exp(−(x² + y²) / 2σ²) about the middle of the image: objects stand in the middle of photographs.

    Args:
        sigma: as a share of each side.
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
    """The gradient's length, √(gx² + gy²), by Sobel's 3 × 3 filters, of the mean over channels: where ink and outlines
    are (Adebayo et al. 2018, 1810.03292, found methods that show no more).

    Drawn dot by dot it puts just the sharpest pixels back into a blurred image, which no method on a coarse grid can;
    so compare it on the method's grid, as `RandomMap`.

    Args:
        grid: (rows, columns) of cells, each the mean of its pixels; the image's own pixels by default.
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
    rows, columns = grid
    if min(rows, columns) < 1:
        raise UsageError(f"grid must be at least 1×1, got {rows}×{columns}")
    return rows, columns


def controls_of(heatmaps_Bhw: Tensor, *, seed: int = 0) -> dict[str, Control]:
    """Make the controls that a method with these heatmaps must beat: name → control.

    They are a Gaussian at the centre, and a random map and an edge detector on the method's own grid.
    """
    rows, columns = heatmaps_Bhw.shape[1:]
    return {
        f"random {rows}×{columns}": RandomMap((rows, columns), seed=seed),
        "centre": CentreGaussian(),
        f"edges {rows}×{columns}": Edges((rows, columns)),
    }


def lead(figure: str, value: Value, control: Value) -> Value:
    """Return by how much `value` is better than a control's in a figure of `FIGURES`; a method beats it if > 0."""
    return FIGURES[figure] * (value - control)
