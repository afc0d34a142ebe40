"""MNIST's digits on a larger canvas. All images of a batch are drawn together.

Shapes: B images in a batch, M pieces of digits, H × W canvas, h × w digit or piece.
"""

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import MNIST, VisionDataset

from visionattn.data.datamodules import ClassificationData, TorchvisionData
from visionattn.data.loading.batches import Split
from visionattn.data.loading.order import scramble
from visionattn.data.placement import Placement, Preprocess
from visionattn.data.samples import Batch, Sample


class _Options(TypedDict):
    canvas: int
    fragments: int
    fragment_size: int


class _Changes(TypedDict):
    distort: float
    shift: float


class DigitsOnCanvas(Dataset[Sample]):
    """A digit on a black canvas among pieces of other digits (Mnih et al. 2014, 1406.6247, section 4.1).

    The position is random. Each pixel of the canvas is the maximum of the digit and the pieces (clutter). The index and
    seed of a sample determine its picture: in training, the seed is new in every epoch; in the other splits, the seed
    is fixed. Deviation: the paper adds the clutter to the image; the maximum does not brighten overlapping strokes.

    Args:
        digits: (n, 28, 28) uint8.
        labels: (n,).
        name: name of the split, used in paths.
        seed: random seed of the pictures; used if the key of a sample is only an index, without a seed.
        canvas: side of the square image, pixels, ≥ the digits' side.
        fragments: number of square pieces of other digits.
        fragment_size: side of a piece, pixels.
        distort: each digit is distorted by the identity matrix plus a random 2 × 2 matrix with entries in
            [−distort, distort]. 0 gives no distortion.
        shift: maximum random shift of a digit within its own 28 × 28 pixels, in pixels.
        preprocess: only its mean and std are used, since the size does not change.
    """

    def __init__(
        self,
        digits: NDArray[np.uint8],
        labels: NDArray[np.int64],
        *,
        name: str,
        seed: int,
        canvas: int,
        fragments: int,
        fragment_size: int,
        distort: float,
        shift: float,
        preprocess: Preprocess,
    ) -> None:
        self.digits = torch.from_numpy(np.array(digits))
        self.labels = torch.from_numpy(np.array(labels))
        self.name = name
        self.seed = seed
        self.canvas = canvas
        self.fragments = fragments
        self.fragment_size = fragment_size
        self.distort = distort
        self.shift = shift
        self.preprocess = preprocess
        size = (canvas, canvas)
        self.placement = Placement(np.array([[1.0, 0, 0], [0, 1.0, 0]]), size, size)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        batch = self.__getitems__([key])
        return {
            "image": batch["image"][0],
            "label": int(batch["label"][0]),
            "path": batch["path"][0],
            "placement": batch["placement"][0],
            "box": batch["box"][0],
        }

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> Batch:
        """Draw a batch; torch's loader calls this method instead of `__getitem__`."""
        index_B, seed_B = self._keys(keys)
        canvas_BHW, box_B4 = self.draw(index_B, seed_B)
        mean, std = self.preprocess.mean[0], self.preprocess.std[0]
        return {
            "image": ((canvas_BHW.float() / 255 - mean) / std)[:, None],
            "label": self.labels[index_B],
            "path": [f"{self.name}/{index}-{seed}.png" for index, seed in zip(index_B.tolist(), seed_B, strict=True)],
            "placement": [self.placement] * len(index_B),
            "box": box_B4,
        }

    def read_source(self, path: str) -> NDArray[np.uint8]:
        """Draw the source of a sample by its path: (H, W, 3) uint8 RGB."""
        index, seed = path.rsplit("/", 1)[-1].removesuffix(".png").split("-")
        canvas_BHW, _ = self.draw(torch.tensor([int(index)]), np.array([int(seed)], np.uint64))
        return canvas_BHW[0, :, :, None].expand(-1, -1, 3).numpy()

    def draw(self, index_B: Tensor, seed_B: NDArray[np.uint64]) -> tuple[Tensor, Tensor]:
        """Draw pictures, (B, canvas, canvas) uint8; also return the boxes of the digits, (B, 4) xyxy in pixels."""
        side, piece, canvas = self.digits.shape[-1], self.fragment_size, self.canvas
        random_BN = torch.from_numpy(_uniform(seed_B, 8 + 5 * self.fragments))
        digit_Bhw = self._distorted(self.digits[index_B], random_BN[:, :6])
        place_B2 = (random_BN[:, 6:8] * (canvas - side + 1)).long()  # row, column
        pictures = torch.zeros(len(index_B), canvas * canvas, dtype=torch.uint8)
        _put(pictures, digit_Bhw[:, None], place_B2[:, None], canvas)
        if self.fragments:
            drawn_BM5 = random_BN[:, 8:].unflatten(1, (self.fragments, 5))
            # each piece is cut from a random image of the split that is not the sample's own digit
            other_BM = (index_B[:, None] + 1 + (drawn_BM5[..., 0] * (len(self) - 1)).long()) % len(self)
            cut_BM2 = (drawn_BM5[..., 1:3] * (side - piece + 1)).long()
            at_BM2 = (drawn_BM5[..., 3:5] * (canvas - piece + 1)).long()
            pixel_BMhw = _window(cut_BM2, piece, side)
            whole_BM = self.digits.flatten(1)[other_BM]
            _put(pictures, whole_BM.gather(2, pixel_BMhw.flatten(2)).view_as(pixel_BMhw), at_BM2, canvas)
        return pictures.view(-1, canvas, canvas), _box(digit_Bhw, place_B2)

    def _distorted(self, digit_Bhw: Tensor, random_B6: Tensor) -> Tensor:
        if not self.distort and not self.shift:
            return digit_Bhw
        draw_B6 = 2 * random_B6.float() - 1
        matrix_B22 = torch.eye(2) + self.distort * draw_B6[:, :4].unflatten(1, (2, 2))
        move_B21 = (2 * self.shift / digit_Bhw.shape[-1]) * draw_B6[:, 4:, None]
        grid = F.affine_grid(torch.cat([matrix_B22, move_B21], 2), [len(digit_Bhw), 1, *digit_Bhw.shape[1:]], False)
        moved = F.grid_sample(digit_Bhw[:, None].float(), grid, align_corners=False)
        return moved[:, 0].round().to(torch.uint8)

    def _keys(self, keys: Sequence[int | tuple[int, int]]) -> tuple[Tensor, NDArray[np.uint64]]:
        if isinstance(keys[0], tuple):
            pairs = np.array(keys, np.uint64)
            return torch.from_numpy(pairs[:, 0].astype(np.int64)), pairs[:, 1]
        index = np.array(keys, np.int64)
        if len(index) and not (index.min() >= 0 and index.max() < len(self)):
            raise IndexError(f"index {index.max()} is out of range: the split has {len(self)} images")
        return torch.from_numpy(index), scramble(
            scramble(np.full(len(index), self.seed, np.uint64)) + index.astype(np.uint64)
        )


class DigitsOnCanvasData(ClassificationData):
    """MNIST's digits on a canvas (see `DigitsOnCanvas`); training images are drawn with new random numbers every epoch.

    Args:
        root: folder of MNIST's files, and of the download.
        dataset: torchvision class of the digits (default: torchvision.datasets.MNIST), or of other small square grey
            pictures, e.g. `torchvision.datasets.FashionMNIST`.
        download: fetch missing files (default: False).
        canvas: side of the images, pixels (default: 60). 28 is the size of the digits themselves.
        fragments: number of pieces of other digits (default: 0); the paper's cluttered images have 4 at 60 pixels and 8
            at 100.
        fragment_size: side of a piece, pixels (default: 8).
        distort, shift: see `DigitsOnCanvas`; only training digits are changed (default: 0).
        val_size: number of training images used for validation; every class gives the same fraction (default: 5,000).
        batch_size, num_workers, seed: see `ImageData`.

    Raises:
        DataError: the files are missing.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        root: str,
        *,
        dataset: Callable[..., VisionDataset] = MNIST,
        download: bool = False,
        canvas: int = 60,
        fragments: int = 0,
        fragment_size: int = 8,
        distort: float = 0.0,
        shift: float = 0.0,
        val_size: int = 5_000,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        self._source = TorchvisionData(dataset, root, download=download, val_size=val_size, seed=seed)
        side = self._source.preprocess.input_size[0]
        if canvas < side or not 1 <= fragment_size <= side:
            raise ValueError(f"canvas must be ≥ {side} and fragment_size in [1, {side}], got {canvas}, {fragment_size}")
        if not 0 <= distort <= 0.5 or shift < 0:
            raise ValueError(f"distort must be in [0, 0.5] and shift ≥ 0, got {distort} and {shift}")
        self.class_names = self._source.class_names
        self._options: _Options = {"canvas": canvas, "fragments": fragments, "fragment_size": fragment_size}
        self._changes: _Changes = {"distort": distort, "shift": shift}
        # black stays 0, which is also the value that a glimpse has outside the image
        preprocess = Preprocess(canvas, fit="stretch", mean=(0.0,), std=(1.0,))
        super().__init__(preprocess=preprocess, batch_size=batch_size, num_workers=num_workers, seed=seed)

    @property
    def class_counts(self) -> NDArray[np.int64]:
        return self._source.class_counts

    def dataset(self, split: Split) -> Dataset[Sample]:
        digits, labels = self._source.arrays(split)
        changes: _Changes = self._changes if split == "train" else {"distort": 0.0, "shift": 0.0}
        seed = 3 * self.seed + ("train", "val", "test").index(split)
        return DigitsOnCanvas(
            digits,
            labels,
            name=f"canvas/{split}",
            seed=seed,
            preprocess=self.preprocess,
            **self._options,
            **changes,
        )


def _put(pictures_BN: Tensor, piece_BMhw: Tensor, place_BM2: Tensor, canvas: int) -> None:
    """Paste square pieces onto flattened canvases; the value of a pixel becomes the maximum of both."""
    pixel_BMhw = _window(place_BM2, piece_BMhw.shape[-1], canvas)
    pictures_BN.scatter_reduce_(1, pixel_BMhw.flatten(1), piece_BMhw.flatten(1), "amax")


def _window(corner_BM2: Tensor, size: int, width: int) -> Tensor:
    """Return the indices (B, M, size, size) of squares in a flattened image, given their top-left corners."""
    steps = torch.arange(size)
    return (corner_BM2[..., 0, None] + steps)[..., None] * width + (corner_BM2[..., 1, None] + steps)[..., None, :]


def _box(digit_Bhw: Tensor, place_B2: Tensor) -> Tensor:
    ink = digit_Bhw > 64
    edges = []
    for axis, along in ((1, 1), (0, 2)):  # first x, from the columns that have ink; then y, from the rows
        has_BN = ink.any(along).long()
        size = has_BN.shape[1]
        edges.append((place_B2[:, axis] + has_BN.argmax(1), place_B2[:, axis] + size - has_BN.flip(1).argmax(1)))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], 1).float()


def _uniform(seed_B: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Return (B, count) pseudo-random numbers in [0, 1); each row depends only on its seed."""
    steps_N = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (scramble(scramble(seed_B)[:, None] + steps_N) >> np.uint64(11)).astype(np.float64) / 2**53
