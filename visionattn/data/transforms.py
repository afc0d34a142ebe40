"""Augmentation with albumentations. No other file of the package imports albumentations."""

import copy
import functools
import os
import warnings
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # without this, albumentations asks the network for updates
import albumentations as A

from visionattn.data.placement import Placement, Size
from visionattn.data.samples import Transform
from visionattn.errors import UsageError

_FEW = 12  # pixels
_REPEATING = (cv2.BORDER_REFLECT, cv2.BORDER_REFLECT_101, cv2.BORDER_WRAP)


class Augmentation(Transform):
    """Apply albumentations' transforms, one after the other.

    The placement is measured: the transforms are applied to the image and also to an array of its pixel coordinates,
    and an affine map is fitted to the transformed coordinates. So every affine transform is supported. Borders that
    reflect or repeat the image are filled in the array of coordinates, so that the placement is that of the image
    itself, however much of the result its copies cover.

    In YAML:

        augment:
          class_path: visionattn.data.transforms.Augmentation
          init_args:
            transforms:
              - {class_path: albumentations.HorizontalFlip, init_args: {p: 0.5}}

    Args:
        transforms: transforms of (H, W, 3) uint8 RGB images. Leave out normalisation, which `Preprocess` does, and
            conversion to tensors, which the data set does.

    Raises:
        UsageError: when called, if a transform is not affine (ElasticTransform, Perspective, …), since heatmaps could
            not be mapped back, or if a transform changes the data type from uint8.
    """

    def __init__(self, transforms: list[A.BasicTransform]) -> None:
        self.transforms = transforms
        self._moves = any(_moves(transform) for transform in transforms)
        # transforms whose borders copy the image are applied twice with the same seed, then with filled borders
        filled = copy.deepcopy(transforms)
        self._copies = sum(map(_fill_borders, filled)) > 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._compose = A.Compose(transforms, mask_interpolation=cv2.INTER_LINEAR)
            self._filled = A.Compose(filled, mask_interpolation=cv2.INTER_LINEAR)

    @property
    def repeats_image(self) -> bool:
        """Whether a transform fills its borders with parts of the image, so that objects can occur twice."""
        return any(map(_repeats, self.transforms))

    def __call__(self, image_HWC: NDArray[np.uint8], seed: int) -> tuple[NDArray[np.uint8], Placement]:
        self._compose.set_random_seed(seed % 2**32)
        source = image_HWC.shape[0], image_HWC.shape[1]
        if not self._moves:
            return self._checked(self._compose(image=image_HWC)["image"]), Placement.identity(source)
        changed = self._compose(image=image_HWC, mask=_coordinates(source))
        coordinates_HW2 = changed["mask"]
        if self._copies:
            self._filled.set_random_seed(seed % 2**32)
            coordinates_HW2 = self._filled(image=image_HWC, mask=_coordinates(source))["mask"]
        matrix = fit_affine(coordinates_HW2)
        if matrix is None:
            names = ", ".join(type(transform).__name__ for transform in self.transforms if _moves(transform))
            raise UsageError(
                f"augment has a transform that is not affine, one of {names}; "
                "leave this transform out, since heatmaps could not be mapped back to the image"
            )
        picture = self._checked(changed["image"])
        return picture, Placement(matrix, source, (picture.shape[0], picture.shape[1]))

    def _checked(self, picture: NDArray[np.generic]) -> NDArray[np.uint8]:
        if picture.dtype != np.uint8:
            raise UsageError(
                f"augment changes images from uint8 to {picture.dtype}; "
                "leave normalisation to preprocess, which has mean and std"
            )
        return picture.view(np.uint8)


def fit_affine(coordinates_HW2: NDArray[np.float32]) -> NDArray[np.float64] | None:
    """Fit the affine map from source to result, given the source coordinates of each pixel of the result.

    Args:
        coordinates_HW2: for each pixel of the result, its (x, y) in the source, plus 1. 0 marks fill pixels, which
            have no position in the source.

    Returns:
        The (2, 3) matrix from source (x, y) to result (x, y). If the result has fewer than `_FEW` pixels of the source,
        or only a line of them, a matrix that maps the source to a place outside. None if there is no affine map that at
        least half of the sampled pixels follow to within a tenth of a pixel; fill pixels and their neighbours, which
        may be blended with the fill colour, are not counted.
    """
    height, width = coordinates_HW2.shape[:2]
    places_N3, values_N2 = _sampled(coordinates_HW2, 24)
    if len(places_N3) < 48:
        places_N3, values_N2 = _sampled(coordinates_HW2, max(height, width))
    if len(places_N3) < _FEW or np.linalg.matrix_rank(places_N3) < 3:
        return np.array([[1.0, 0, 2 * width], [0, 1.0, 2 * height]])
    to_source, close = _least_squares(places_N3, values_N2, np.ones(len(places_N3), bool))
    if not close.all():
        # Some pixels do not follow the map, since they are blended with the fill colour. So take the map that most
        # pixels follow, among the maps through random triples of pixels (RANSAC).
        triples = np.random.default_rng(0).integers(0, len(places_N3), (32, 3))
        triples = triples[abs(np.linalg.det(places_N3[triples])) > 1]
        if not len(triples):
            return None
        maps = np.linalg.solve(places_N3[triples], values_N2[triples])
        follow: NDArray[np.bool_] = np.asarray((abs(places_N3 @ maps - values_N2) < 0.5).all(2))
        to_source, close = _least_squares(places_N3, values_N2, follow[follow.sum(1).argmax()])
    if close.mean() < 0.5 or abs(np.linalg.det(to_source[:2])) < 1e-9:
        return None
    return np.linalg.inv(np.vstack([to_source.T, [0, 0, 1]]))[:2]


def _sampled(coordinates_HW2: NDArray[np.float32], count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (x, y, 1) and source (x, y) of pixels in about `count` rows and columns, not next to fill pixels."""
    height, width = coordinates_HW2.shape[:2]
    fill_HW = ((coordinates_HW2[..., 0] <= 0) | (coordinates_HW2[..., 1] <= 0)).view(np.uint8)
    if fill_HW.any():
        fill_HW = np.asarray(cv2.dilate(fill_HW, np.ones((3, 3), np.uint8)), np.uint8)
    rows, columns = np.mgrid[0 : height : max(1, height // count), 0 : width : max(1, width // count)]
    values = coordinates_HW2[rows, columns].reshape(-1, 2).astype(np.float64) - 1
    places = np.stack([columns + 0.5, rows + 0.5, np.ones(rows.shape)], -1).reshape(-1, 3)
    kept_N = fill_HW[rows, columns].reshape(-1) == 0
    return places[kept_N], values[kept_N]


def _least_squares(
    places_N3: NDArray[np.float64], values_N2: NDArray[np.float64], chosen_N: NDArray[np.bool_]
) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """Fit a map to the chosen pixels by least squares; also return which pixels are within 0.1 pixel of the map."""
    to_source, *_ = np.linalg.lstsq(places_N3[chosen_N], values_N2[chosen_N], rcond=None)
    close_N: NDArray[np.bool_] = np.all(abs(places_N3 @ to_source - values_N2) < 0.1, axis=1)
    return to_source, close_N


def _coordinates(size: Size) -> NDArray[np.float32]:
    """Return (H, W, 2): the (x, y) of each pixel's centre, plus 1, so that only fill pixels are 0."""
    return _field(size).copy()  # transforms may change it in place; a copy takes a quarter of the time of making it


@functools.lru_cache(maxsize=4)
def _field(size: Size) -> NDArray[np.float32]:
    height, width = size
    field = np.empty((height, width, 2), np.float32)
    field[..., 0] = np.arange(width, dtype=np.float32) + 1.5
    field[..., 1] = np.arange(height, dtype=np.float32)[:, None] + 1.5
    return field


def _moves(transform: A.BasicTransform) -> bool:
    parts: Sequence[A.BasicTransform] = getattr(transform, "transforms", None) or ()
    return any(_moves(part) for part in parts) if parts else isinstance(transform, A.DualTransform)


def _repeats(transform: A.BasicTransform) -> bool:
    parts: Sequence[A.BasicTransform] = getattr(transform, "transforms", None) or ()
    return any(map(_repeats, parts)) or getattr(transform, "border_mode", None) in _REPEATING


def _fill_borders(transform: A.BasicTransform) -> bool:
    """Set a transform and its parts to fill the borders of masks with 0; return whether any did otherwise."""
    parts: Sequence[A.BasicTransform] = getattr(transform, "transforms", None) or ()
    copies = sum(map(_fill_borders, parts)) > 0
    if hasattr(transform, "border_mode"):
        copies |= transform.border_mode != cv2.BORDER_CONSTANT or bool(np.any(transform.fill_mask))
        transform.border_mode, transform.fill_mask = cv2.BORDER_CONSTANT, 0
    return copies
