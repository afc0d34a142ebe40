"""Test that the placement of an augmentation matches the pixels."""

import albumentations as A
import cv2
import numpy as np
import pytest

from tests.data.spots import spot
from visionattn.data.transforms import Augmentation
from visionattn.errors import UsageError


@pytest.mark.parametrize(
    "transform",
    [
        A.HorizontalFlip(p=1),
        A.Transpose(p=1),
        A.RandomCrop(40, 50, p=1),
        A.RandomResizedCrop((48, 48), scale=(0.6, 0.9), p=1),
        A.Rotate((20, 40), p=1),
        A.Affine(scale=(0.8, 1.2), shear=(-10, 10), translate_percent=(-0.1, 0.1), p=1),
        A.SomeOf([A.VerticalFlip(p=1), A.RandomRotate90(p=1)], n=2, p=1),
        A.ColorJitter(p=1),
    ],
    ids=lambda transform: type(transform).__name__,
)
@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_augmentation_placement_matches_the_pixels(transform, seed):
    augment = Augmentation([transform])
    picture = spot(60, 70, 31.0, 36.0)
    changed, placement = augment(picture, seed)
    weights = changed[..., 0].astype(float) ** 2
    rows, columns = np.mgrid[0 : changed.shape[0], 0 : changed.shape[1]] + 0.5
    centre = [(weights * columns).sum() / weights.sum(), (weights * rows).sum() / weights.sum()]
    np.testing.assert_allclose(placement.to_input([[36.0, 31.0]])[0], centre, atol=0.35)
    again, _ = augment(picture, seed)
    np.testing.assert_array_equal(changed, again)


@pytest.mark.parametrize(
    "transforms",
    [
        [A.PadIfNeeded(256, 256, border_mode=cv2.BORDER_REFLECT_101)],
        [A.HorizontalFlip(p=1), A.PadIfNeeded(256, 256, position="top_left", border_mode=cv2.BORDER_WRAP)],
        [A.Pad(60, border_mode=cv2.BORDER_REFLECT_101), A.RandomCrop(100, 100, p=1)],
        [A.OneOf([A.Affine(scale=0.4, rotate=(-90, 90), border_mode=cv2.BORDER_REFLECT, p=1)], p=1)],
        [A.Affine(translate_percent=(-0.9, 0.9), border_mode=cv2.BORDER_REPLICATE, p=1)],
        [A.Affine(scale=0.5, border_mode=cv2.BORDER_CONSTANT, fill=9, fill_mask=9, p=1)],
    ],
    ids=lambda transforms: type(transforms[-1]).__name__,
)
def test_placement_is_that_of_the_image_and_not_of_copies_at_the_borders(transforms):
    picture = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8), None, 3)
    picture = cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX)
    for seed in range(6):
        changed, placement = Augmentation(transforms)(picture, seed)
        matrix = placement.matrix.copy()
        matrix[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5  # in OpenCV, integer coordinates are pixel centres
        size = changed.shape[1], changed.shape[0]
        inside = cv2.warpAffine(np.ones((60, 70)), matrix, size) > 0.99
        difference = abs(cv2.warpAffine(picture, matrix, size)[inside].astype(int) - changed[inside])
        assert inside.any()
        assert difference.max() <= 8  # of 255


def test_image_that_is_moved_out_of_the_result_has_a_placement_outside():
    for border in (cv2.BORDER_CONSTANT, cv2.BORDER_REFLECT):
        augment = Augmentation([A.Affine(translate_percent=1.5, border_mode=border, p=1)])
        _, placement = augment(spot(60, 70, 30, 30), 0)
        assert not placement.seen().any()
        assert (np.ptp(placement.boxes_to_input([[10, 10, 20, 20]]).reshape(2, 2), axis=0) == 0).all()


@pytest.mark.parametrize("border", [cv2.BORDER_CONSTANT, cv2.BORDER_REFLECT_101])
def test_no_affine_transform_is_refused(border):
    """Neither for an image of a few pixels in the result, most of which are blended with the fill colour."""
    transform = A.Affine(scale=(0.1, 2), translate_percent=(-1, 1), rotate=(-180, 180), border_mode=border, p=1)
    augment = Augmentation([transform])
    for seed in range(60):
        augment(spot(32, 32, 20, 20), seed)


def test_transforms_that_are_not_affine_or_change_the_dtype_raise():
    picture = spot(60, 70, 30, 30)
    with pytest.raises(UsageError, match="not affine, one of ElasticTransform"):
        Augmentation([A.ElasticTransform(alpha=300, sigma=8, p=1)])(picture, 0)
    with pytest.raises(UsageError, match="leave normalisation to preprocess"):
        Augmentation([A.Normalize(p=1)])(picture, 0)
