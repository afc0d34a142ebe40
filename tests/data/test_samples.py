"""Test that the placement of a sample includes augmentation and preprocessing."""

import albumentations as A
import numpy as np

from tests.data.spots import spot
from visionattn.data import Preprocess
from visionattn.data.samples import prepare
from visionattn.data.transforms import Augmentation


def test_placements_of_augmentation_and_preprocessing_compose():
    sample = prepare(spot(60, 70, 20, 50), Preprocess(35, fit="stretch"), Augmentation([A.HorizontalFlip(p=1)]))
    image = sample["image"][0].numpy()
    row, column = np.unravel_index(image.argmax(), image.shape)
    np.testing.assert_allclose(sample["placement"].to_input([[50, 20]])[0], [column + 0.5, row + 0.5], atol=1)
