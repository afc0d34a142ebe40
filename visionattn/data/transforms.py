"""Augmentation by albumentations; this is the only file that imports albumentations."""

import os
import warnings
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else albumentations looks for a newer version on the network
import albumentations as A

from visionattn.data.placement import Placement, Size
from visionattn.data.samples import Transform
from visionattn.errors import UsageError


class Augmentation(Transform):
    """Albumentations' transforms, one after the other.

    The placement is measured: the transforms are applied to the pixel coordinates of the source as well as to the
    image, and an affine map is fitted to the result. So every affine transform works, without a list of known
    transforms.

    In YAML:

        augment:
          class_path: visionattn.data.transforms.Augmentation
          init_args:
            transforms:
              - {class_path: albumentations.HorizontalFlip, init_args: {p: 0.5}}

    Args:
        transforms: take images (H, W, 3) uint8 RGB. Leave out normalisation, which `Preprocess` does, and conversion to
            tensors, which the data set does.

    Raises:
        UsageError: when called, if a transform bends the image (ElasticTransform, Perspective, …), since heatmaps
            could not be mapped back, or if a transform changes the data type from uint8.
    """

    def __init__(self, transforms: list[A.BasicTransform]) -> None:
        self.transforms = transforms
        self._moves = any(_moves(transform) for transform in transforms)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._compose = A.Compose(transforms, mask_interpolation=cv2.INTER_LINEAR)

    def __call__(self, image_HWC: NDArray[np.uint8], seed: int) -> tuple[NDArray[np.uint8], Placement]:
        self._compose.set_random_seed(seed % 2**32)
        source = image_HWC.shape[0], image_HWC.shape[1]
        if not self._moves:
            return self._checked(self._compose(image=image_HWC)["image"]), Placement.identity(source)
        changed = self._compose(image=image_HWC, mask=_coordinates(source))
        matrix = fit_affine(changed["mask"])
        if matrix is None:
            names = ", ".join(type(transform).__name__ for transform in self.transforms if _moves(transform))
            raise UsageError(
                f"one of {names} bends the picture, so that no heatmap could be carried back; leave it out of augment"
            )
        picture = self._checked(changed["image"])
        return picture, Placement(matrix, source, (picture.shape[0], picture.shape[1]))

    def _checked(self, picture: NDArray[np.generic]) -> NDArray[np.uint8]:
        if picture.dtype != np.uint8:
            raise UsageError(
                f"the transforms turn pictures into {picture.dtype}; leave normalisation to preprocess: mean and std"
            )
        return picture.view(np.uint8)


def fit_affine(coordinates_HW2: NDArray[np.float32]) -> NDArray[np.float64] | None:
    """Fit the affine map from source to result, given the source coordinates of each pixel of the result.

    Args:
        coordinates_HW2: for each pixel of the result, its (x, y) in the source plus 1; 0 marks pixels that were filled.

    Returns:
        (2, 3) source xy → result xy, or None if fewer than half of the sampled pixels, without the filled ones, follow
        one affine map to within a tenth of a pixel.
    """
    height, width = coordinates_HW2.shape[:2]
    rows, columns = np.mgrid[0 : height : max(1, height // 24), 0 : width : max(1, width // 24)]
    values = coordinates_HW2[rows, columns].reshape(-1, 2).astype(np.float64) - 1
    places = np.stack([columns + 0.5, rows + 0.5, np.ones(rows.shape)], -1).reshape(-1, 3)
    filled = (values <= -1).any(1)
    places_N3, values_N2 = places[~filled], values[~filled]
    if len(places_N3) < 3:
        return None
    to_source, close = _least_squares(places_N3, values_N2, np.ones(len(places_N3), bool))
    if not close.all():
        # Reflected borders and pixels blended with the fill colour follow other maps. Find the map that most pixels
        # follow: try the maps through random triples of pixels (RANSAC).
        triples = np.random.default_rng(0).integers(0, len(places_N3), (32, 3))
        triples = triples[abs(np.linalg.det(places_N3[triples])) > 1]
        if not len(triples):
            return None
        maps = np.linalg.solve(places_N3[triples], values_N2[triples])
        follow = (abs(places_N3 @ maps - values_N2) < 0.5).all(2)
        to_source, close = _least_squares(places_N3, values_N2, follow[follow.sum(1).argmax()])
    if close.mean() < 0.5 or abs(np.linalg.det(to_source[:2])) < 1e-9:
        return None
    return np.linalg.inv(np.vstack([to_source.T, [0, 0, 1]]))[:2]


def _least_squares(
    places_N3: NDArray[np.float64], values_N2: NDArray[np.float64], chosen_N: NDArray[np.bool_]
) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """Fit a map to the chosen pixels by least squares; also return which pixels follow it to within 0.1 pixel."""
    to_source, *_ = np.linalg.lstsq(places_N3[chosen_N], values_N2[chosen_N], rcond=None)
    close_N: NDArray[np.bool_] = np.all(abs(places_N3 @ to_source - values_N2) < 0.1, axis=1)
    return to_source, close_N


def _coordinates(size: Size) -> NDArray[np.float32]:
    """(H, W, 2): the (x, y) of each pixel's centre, plus 1 so that 0 marks filled pixels."""
    height, width = size
    field = np.empty((height, width, 2), np.float32)
    field[..., 0] = np.arange(width, dtype=np.float32) + 1.5
    field[..., 1] = np.arange(height, dtype=np.float32)[:, None] + 1.5
    return field


def _moves(transform: A.BasicTransform) -> bool:
    parts: Sequence[A.BasicTransform] = getattr(transform, "transforms", None) or ()
    return any(_moves(part) for part in parts) if parts else isinstance(transform, A.DualTransform)
