"""Handwritten digits among clutter: a data set without download, with the box and the mask of each digit."""

from functools import cached_property
from typing import Literal, TypedDict

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from visionattn.data.datamodules import ClassificationData
from visionattn.data.loading.batches import Split
from visionattn.data.placement import Preprocess
from visionattn.data.samples import Sample

SPLITS = ("train", "val", "test")
_FRACTIONS = (0.7, 0.1, 0.2)  # fraction of the handwritten instances in train, val and test
_SMOOTH = 32  # pixels; cubic interpolation enlarges each 8 × 8 instance to this side when it is loaded
REMEMBERED = 16_384  # maximum number of images that a data set keeps, 8 kB each, to draw them only in the first epoch


class _Options(TypedDict):
    canvas: int
    fragments: int
    seed: int


class ClutteredDigits(Dataset[Sample]):
    """A digit of random size and position among fragments of other digits (Mnih et al. 2014, 1406.6247, section 4.1).

    The digits are those of scikit-learn: 1,797 handwritten instances of 8 × 8 pixels by 43 people (UCI optical
    recognition of handwritten digits). Deviations from the paper: these smaller digits replace MNIST's; their size
    varies; and each digit is slightly stretched and sheared, since there are few instances.

    (seed, split, index) determines an image. Each instance is used in one split only, as a digit and in fragments.

    Args:
        split: train, val or test.
        size: number of images.
        seed: random seed of the images (default: 0). The assignment of instances to splits does not depend on it.
        canvas: side of the square image, pixels (default: 64).
        scale: minimum and maximum side of a digit, pixels (default: 22 to 38).
        distort: each digit is distorted by the identity matrix plus a random 2 × 2 matrix with entries in
            [−distort, distort]; in [0, 0.5] (default: 0.15).
        fragments: number of pieces of other digits (default: 4).
        fragment_size: side of a piece, pixels (default: 9).
        preprocess: converts an image to the model's input (default: no resizing, values in [−1, 1]).

    Raises:
        ValueError: an argument is out of its range.
    """

    class_names = tuple("0123456789")

    def __init__(
        self,
        split: Literal["train", "val", "test"],
        *,
        size: int,
        seed: int = 0,
        canvas: int = 64,
        scale: tuple[int, int] = (22, 38),
        distort: float = 0.15,
        fragments: int = 4,
        fragment_size: int = 9,
        preprocess: Preprocess | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if not 8 <= scale[0] <= scale[1] <= canvas:
            raise ValueError(f"scale must be (smallest, largest) within [8, canvas = {canvas}], got {scale}")
        if not 1 <= fragment_size <= scale[0]:
            raise ValueError(
                f"fragment_size must be in [1, {scale[0]}], the smallest digit's side, got {fragment_size}"
            )
        if not 0 <= distort <= 0.5:
            raise ValueError(f"distort must be in [0, 0.5], got {distort}")
        self.split = split
        self.size = size
        self.seed = seed
        self.canvas = canvas
        self.scale = scale
        self.distort = distort
        self.fragments = fragments
        self.fragment_size = fragment_size
        self._drawn: dict[int, tuple[NDArray[np.uint8], int, NDArray[np.bool_]]] = {}
        self.preprocess = preprocess or Preprocess(canvas, fit="stretch", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index = key[0] if isinstance(key, tuple) else key  # key[1], the seed of the augmentation, is not needed
        image_HW, label, ink_HW = self.draw(index)
        image_CHW, placement = self.preprocess(np.repeat(image_HW[..., None], 3, 2))
        mask_HW = ink_HW
        if placement.source_size != placement.input_size:
            height, width = placement.input_size
            mask_HW = (
                cv2.warpAffine(ink_HW.astype(np.uint8), placement.matrix, (width, height), flags=cv2.INTER_NEAREST) > 0
            )
        rows, columns = np.nonzero(ink_HW)
        box = [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
        return {
            "image": torch.from_numpy(image_CHW),
            "label": label,
            "path": self.path_of(index),
            "placement": placement,
            "box": torch.from_numpy(placement.boxes_to_input(np.array(box, float))[0]).float(),
            "mask": torch.from_numpy(mask_HW.copy()),
        }

    def path_of(self, index: int) -> str:
        """Return the name of a sample in the form of a path; the file does not exist."""
        return f"digits/{self.split}/{index:06d}.png"

    def read_source(self, path: str) -> NDArray[np.uint8]:
        """Draw the source image of the sample with this path: (H, W, 3) uint8 RGB."""
        image_HW, _, _ = self.draw(int(path.rsplit("/", 1)[-1].removesuffix(".png")))
        return np.repeat(image_HW[..., None], 3, 2)

    def draw(self, index: int) -> tuple[NDArray[np.uint8], int, NDArray[np.bool_]]:
        """Draw an image, (canvas, canvas) uint8; also return the digit's label and its (canvas, canvas) bool mask."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is out of range: the split has {self.size} images")
        if index not in self._drawn:
            drawn = self._draw(index)
            if len(self._drawn) >= REMEMBERED:
                return drawn
            self._drawn[index] = drawn
        return self._drawn[index]

    def _draw(self, index: int) -> tuple[NDArray[np.uint8], int, NDArray[np.bool_]]:
        random = np.random.Generator(
            np.random.Philox(key=[self.seed, SPLITS.index(self.split)], counter=[0, 0, 0, index])
        )
        images, labels = self.instances
        # one row per piece, and the last row is the digit; columns: instance, side, cut (2), position (2), distort (4)
        draws = random.random((self.fragments + 1, 10))
        instances = (draws[:, 0] * len(images)).astype(int).tolist()
        sides = (self.scale[0] + draws[:, 1] * (self.scale[1] + 1 - self.scale[0])).astype(int)
        pieces = np.where(np.arange(self.fragments + 1) < self.fragments, self.fragment_size, sides)
        cuts = (draws[:, 2:4] * (sides - pieces + 1)[:, None]).astype(int).tolist()
        places = (draws[:, 4:6] * (self.canvas - pieces + 1)[:, None]).astype(int).tolist()

        matrices = np.eye(2) + self.distort * (2 * draws[:, 6:].reshape(-1, 2, 2) - 1)

        canvas_HW = np.zeros((self.canvas, self.canvas), np.uint8)
        for instance, side, matrix, piece, cut, (top, left) in zip(
            instances, sides.tolist(), matrices, pieces.tolist(), cuts, places, strict=True
        ):
            digit_hw = enlarged(images[instance], side, matrix)
            region = canvas_HW[top : top + piece, left : left + piece]
            np.maximum(region, digit_hw[cut[0] : cut[0] + piece, cut[1] : cut[1] + piece], out=region)
        ink_HW = np.zeros((self.canvas, self.canvas), bool)
        ink_HW[top : top + piece, left : left + piece] = digit_hw > 64  # the last piece is the digit
        canvas_HW.flags.writeable = ink_HW.flags.writeable = False  # all callers get the same cached arrays
        return canvas_HW, int(labels[instances[-1]]), ink_HW

    @cached_property
    def instances(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The split's digits, (n, 32, 32) uint8, and their labels (n,)."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        rest, test = train_test_split(
            np.arange(len(digits.target)), test_size=_FRACTIONS[2], stratify=digits.target, random_state=0
        )
        fraction = _FRACTIONS[1] / (_FRACTIONS[0] + _FRACTIONS[1])
        train, val = train_test_split(rest, test_size=fraction, stratify=digits.target[rest], random_state=0)
        chosen = {"train": train, "val": val, "test": test}[self.split]
        images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        smooth = [cv2.resize(image, (_SMOOTH, _SMOOTH), interpolation=cv2.INTER_CUBIC) for image in images]
        return np.stack(smooth), digits.target[chosen]


def enlarged(image_hw: NDArray[np.uint8], side: int, matrix: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Resize a square image to `side` pixels, and distort it about its centre by a (2, 2) matrix."""
    turn = matrix * (side / len(image_hw))
    # in OpenCV, coordinate 0 is the centre of the first pixel
    shift = (side - 1) / 2 - turn @ np.full(2, (len(image_hw) - 1) / 2)
    return np.asarray(cv2.warpAffine(image_hw, np.column_stack([turn, shift]), (side, side)))


class ClutteredDigitsData(ClassificationData):
    """Handwritten digits among clutter (see `ClutteredDigits`); needs no download.

    Args:
        train_size: number of training images (default: 12,000).
        val_size: number of validation images (default: 1,000).
        test_size: number of test images (default: 2,000).
        canvas: side of the images, pixels (default: 64).
        fragments: pieces of other digits in each image (default: 4).
        batch_size, num_workers, seed: see `ImageData`.
    """

    class_names = ClutteredDigits.class_names

    def __init__(
        self,
        *,
        train_size: int = 12_000,
        val_size: int = 1_000,
        test_size: int = 2_000,
        canvas: int = 64,
        fragments: int = 4,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        self._sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        self._options: _Options = {"canvas": canvas, "fragments": fragments, "seed": seed}
        preprocess = ClutteredDigits("train", size=1, canvas=canvas).preprocess
        super().__init__(preprocess=preprocess, batch_size=batch_size, num_workers=num_workers, seed=seed)

    def dataset(self, split: Split) -> Dataset[Sample]:
        return ClutteredDigits(split, size=self._sizes[split], preprocess=self.preprocess, **self._options)
