"""Images with several handwritten digits and their boxes: detection data without download."""

from typing import Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from visionattn.data.detection import DetectionData
from visionattn.data.loading.batches import Split
from visionattn.data.placement import Preprocess
from visionattn.data.samples import Sample
from visionattn.data.synthetic.cluttered_digits import REMEMBERED, SPLITS, ClutteredDigits, enlarged

_TRIES = 20  # number of random positions tried for a digit


class _Options(TypedDict):
    canvas: int
    count: tuple[int, int]
    seed: int


class DigitScenes(Dataset[Sample]):
    """Images with several digits at random scales and positions, among fragments of other digits.

    The digits are drawn as in `ClutteredDigits`. (seed, split, index) determines an image. The overlap of two boxes is
    at most a fifth of the smaller box. A digit is left out if its box overlaps too much at 20 random positions. Each
    handwritten instance is used in one split only.

    A sample has `image`, `boxes` (N, 4) xyxy in pixels of the input, `labels` (N,), `crowd` (N,) all False, `area`
    (N,), `image_id`, `path` and `placement`.

    Args:
        split: train, val or test.
        size: number of images.
        seed: seed of the images (default: 0).
        canvas: side of the square image, pixels (default: 96).
        count: minimum and maximum number of digits, ≥ 0 (default: 1 to 5).
        scale: minimum and maximum side of a digit, pixels (default: 18 to 40).
        distort: see `ClutteredDigits` (default: 0.15).
        fragments: number of pieces of other digits (default: 6).
        fragment_size: side of a piece, pixels (default: 9).
        preprocess: converts an image to the model's input (default: no resizing, values in [−1, 1]).

    Raises:
        ValueError: an argument is out of its range.
    """

    class_names = ClutteredDigits.class_names

    def __init__(
        self,
        split: Literal["train", "val", "test"],
        *,
        size: int,
        seed: int = 0,
        canvas: int = 96,
        count: tuple[int, int] = (1, 5),
        scale: tuple[int, int] = (18, 40),
        distort: float = 0.15,
        fragments: int = 6,
        fragment_size: int = 9,
        preprocess: Preprocess | None = None,
    ) -> None:
        if not 0 <= count[0] <= count[1]:
            raise ValueError(f"count must be (smallest, largest), both ≥ 0, got {count}")
        # used for its handwritten instances and for the checks of its arguments
        self._single = ClutteredDigits(
            split, size=size, seed=seed, canvas=canvas, scale=scale, distort=distort, fragment_size=fragment_size
        )
        self.split = split
        self.size = size
        self.count = count
        self.fragments = fragments
        self.preprocess = preprocess or self._single.preprocess
        self._drawn: dict[int, tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index = key[0] if isinstance(key, tuple) else key
        image_HW, boxes_N4, labels_N = self.draw(index)
        image_CHW, placement = self.preprocess(np.repeat(image_HW[..., None], 3, 2))
        boxes = torch.from_numpy(placement.boxes_to_input(boxes_N4)).float()
        return {
            "image": torch.from_numpy(image_CHW),
            "boxes": boxes,
            "labels": torch.from_numpy(labels_N.copy()),
            "crowd": torch.zeros(len(boxes), dtype=torch.bool),
            "area": torch.from_numpy((boxes_N4[:, 2:] - boxes_N4[:, :2]).prod(1)).float(),
            "image_id": index,
            "path": self.path_of(index),
            "placement": placement,
        }

    def path_of(self, index: int) -> str:
        """Return the name of a sample in the form of a path; the file does not exist."""
        return f"digits/{self.split}/{index:06d}.png"

    def read_source(self, path: str) -> NDArray[np.uint8]:
        """Draw the image of the sample with this path, before preprocessing: (H, W, 3) uint8 RGB."""
        image_HW, _, _ = self.draw(int(path.rsplit("/", 1)[-1].removesuffix(".png")))
        return np.repeat(image_HW[..., None], 3, 2)

    def draw(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.int64]]:
        """Draw an image, (canvas, canvas) uint8; also return the (N, 4) boxes of the digits and their (N,) labels."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is out of range: the split has {self.size} images")
        if index not in self._drawn:
            drawn = self._draw(index)
            if len(self._drawn) >= REMEMBERED:
                return drawn
            self._drawn[index] = drawn
        return self._drawn[index]

    def _draw(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.int64]]:
        single = self._single
        random = np.random.Generator(
            np.random.Philox(key=[single.seed, SPLITS.index(self.split)], counter=[0, 0, 1, index])
        )
        images, labels = single.instances
        canvas_HW = np.zeros((single.canvas, single.canvas), np.uint8)
        boxes: list[list[int]] = []
        drawn_labels: list[int] = []

        def piece() -> tuple[int, NDArray[np.uint8]]:
            instance = int(random.integers(len(images)))
            side = int(random.integers(single.scale[0], single.scale[1] + 1))
            matrix = np.eye(2) + single.distort * random.uniform(-1, 1, (2, 2))
            return int(labels[instance]), enlarged(images[instance], side, matrix)

        for _ in range(self.fragments):
            _, digit_hw = piece()
            top, left = random.integers(0, len(digit_hw) - single.fragment_size + 1, 2)
            part_hw = digit_hw[top : top + single.fragment_size, left : left + single.fragment_size]
            _paste(canvas_HW, part_hw, *random.integers(0, single.canvas - single.fragment_size + 1, 2))
        for _ in range(int(random.integers(self.count[0], self.count[1] + 1))):
            label, digit_hw = piece()
            rows, columns = np.nonzero(digit_hw > 64)
            for _ in range(_TRIES):
                top, left = (int(place) for place in random.integers(0, single.canvas - len(digit_hw) + 1, 2))
                box = [left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1]
                if all(_overlap(box, other) <= 0.2 for other in boxes):
                    _paste(canvas_HW, digit_hw, top, left)
                    boxes.append([int(edge) for edge in box])
                    drawn_labels.append(label)
                    break
        canvas_HW.flags.writeable = False  # all callers get the same cached array
        return canvas_HW, np.array(boxes, float).reshape(-1, 4), np.array(drawn_labels, np.int64)


def _paste(canvas_HW: NDArray[np.uint8], part_hw: NDArray[np.uint8], top: int, left: int) -> None:
    region = canvas_HW[top : top + part_hw.shape[0], left : left + part_hw.shape[1]]
    np.maximum(region, part_hw, out=region)


def _overlap(first: list[int], second: list[int]) -> float:
    """Return the intersection of two boxes as a fraction of the smaller one."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return max(0, width) * max(0, height) / min(areas)


class DigitScenesData(DetectionData):
    """Images with several handwritten digits among clutter (see `DigitScenes`); needs no download.

    Args:
        train_size: number of training images (default: 2,000).
        val_size: number of validation images (default: 200).
        test_size: number of test images (default: 500).
        canvas: side of the images, pixels (default: 96).
        count: minimum and maximum number of digits (default: 1 to 5).
        batch_size, num_workers, seed: see `ImageData`.
    """

    class_names = DigitScenes.class_names
    category_ids = tuple(range(10))

    def __init__(
        self,
        *,
        train_size: int = 2_000,
        val_size: int = 200,
        test_size: int = 500,
        canvas: int = 96,
        count: tuple[int, int] = (1, 5),
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        self._sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        self._options: _Options = {"canvas": canvas, "count": count, "seed": seed}
        preprocess = DigitScenes("train", size=1, canvas=canvas).preprocess
        super().__init__(preprocess=preprocess, batch_size=batch_size, num_workers=num_workers, seed=seed)

    def dataset(self, split: Split) -> Dataset[Sample]:
        return DigitScenes(split, size=self._sizes[split], preprocess=self.preprocess, **self._options)
