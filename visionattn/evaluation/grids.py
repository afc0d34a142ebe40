"""The grid pointing game: on a grid of images of different classes, does a class's heatmap lie on its image?

Shapes: B images, C channels, H × W pixels, n × n images in a grid.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.capture import run, undisturbed
from visionattn.errors import UsageError
from visionattn.evaluation.localisation import energy
from visionattn.maps import Method

CELLS = 2


class Grids(NamedTuple):
    """Grids of images.

    Attributes:
        images: (B, C, n·H, n·W), or (B, C, H, W) if the model takes no larger images.
        own: (B,) int64, the cell of image b in grid b, counted by rows.
        valid: (B,) bool, false if the batch has too few images of other classes for the grid of an image.
    """

    images: Tensor
    own: Tensor
    valid: Tensor


def image_grids(model: nn.Module, images_BCHW: Tensor, class_B: Tensor, *, cells: int = CELLS, seed: int = 0) -> Grids:
    """Arrange each image of a batch in a grid with n² − 1 images of other classes, in random order.

    Böhle et al. 2021 (2104.00032) and Rao et al. 2022 (2205.10435). Deviations from the papers: the images are those of
    the batch, instead of those with the highest confidence. If the batch has fewer than n² classes, classes other than
    the image's own repeat. If the model takes no images of n·H × n·W pixels, the grid is scaled down to H × W.

    Args:
        model: any vision model.
        images_BCHW: images, normalised for the model.
        class_B: the class of each image, e.g. the model's prediction.
        cells: n, ≥ 2.
        seed: seed of the choice and the order.

    Raises:
        UsageError: cells is less than 2.
    """
    if cells < 2:
        raise UsageError(f"a grid needs at least 2 × 2 cells, got {cells} × {cells}")
    random, classes = np.random.default_rng(seed), class_B.tolist()
    orders, own, valid = [], [], []
    for index, label in enumerate(classes):
        others = _others(classes, label, cells * cells - 1, random)
        order = random.permutation([index, *(others or [index] * (cells * cells - 1))])
        orders.append(order)
        own.append(int(np.flatnonzero(order == index)[0]))
        valid.append(bool(others))
    order_BN = torch.from_numpy(np.stack(orders)).to(images_BCHW.device)
    grid_BnnCHW = images_BCHW[order_BN].unflatten(1, (cells, cells))
    grid_BCHW = grid_BnnCHW.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    if not _takes(model, grid_BCHW[:1]):
        grid_BCHW = F.interpolate(grid_BCHW, size=images_BCHW.shape[2:], mode="area")
    device = images_BCHW.device
    return Grids(grid_BCHW, torch.tensor(own, device=device), torch.tensor(valid, device=device))


def grid_pointing(model: nn.Module, grids: Grids, class_B: Tensor, method: Method, *, cells: int = CELLS) -> Tensor:
    """Return the fraction of each heatmap's sum that lies on the image of the explained class, (B,) in [0, 1].

        GridPG = Σ heat in the image's cell ÷ Σ heat        (1 / n² for a constant heatmap)

    Böhle et al. 2021 (2104.00032). Deviation from the paper: the heat is the heatmap in [0, 1], as in `energy`, instead
    of the positive part of a signed map.

    Args:
        model: any vision model; unchanged afterwards.
        grids: as `image_grids` returns them.
        class_B: the class of each image, which the heatmaps explain.
        method: the heatmap method.
        cells: n, as for `image_grids`.

    Returns:
        NaN for images whose grid is not valid.
    """
    heatmaps_Bhw = method(model, grids.images, target=class_B).heatmaps
    height, width = grids.images.shape[2:]
    row_H, column_W = (torch.arange(side, device=class_B.device) * cells // side for side in (height, width))
    own_BHW = row_H[:, None] * cells + column_W == grids.own[:, None, None]
    return torch.where(grids.valid, energy(heatmaps_Bhw, own_BHW), torch.nan)


def _others(classes: list[int], label: int, count: int, random: np.random.Generator) -> list[int]:
    """Choose images of other classes, of different ones as far as there are; an empty list if there are too few."""
    chosen: list[int] = []
    left = [int(index) for index in random.permutation(len(classes)) if classes[index] != label]
    while len(chosen) < count and left:
        fresh = {classes[index]: index for index in left}  # one image of each class
        chosen += [int(index) for index in random.permutation(list(fresh.values()))[: count - len(chosen)]]
        left = [index for index in left if index not in chosen]
    return chosen if len(chosen) == count else []


def _takes(model: nn.Module, images_BCHW: Tensor) -> bool:
    """Return whether a model takes images of this size."""
    try:
        with undisturbed(model) as bare:
            run(bare, images_BCHW)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # models refuse a size by assertions and errors of many kinds
        return False
    return True
