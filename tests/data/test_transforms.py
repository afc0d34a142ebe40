"""Test that the placement of an augmentation matches the pixels."""

import albumentations as A
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


def test_bending_transforms_and_other_dtypes_raise():
    picture = spot(60, 70, 30, 30)
    with pytest.raises(UsageError, match="ElasticTransform bends"):
        Augmentation([A.ElasticTransform(alpha=300, sigma=8, p=1)])(picture, 0)
    with pytest.raises(UsageError, match="leave normalisation to preprocess"):
        Augmentation([A.Normalize(p=1)])(picture, 0)
