"""Data modules for object detection: their base class, and annotated images."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from visionattn.data.annotations.boxes import Annotated, BoxFormat, Problem, count_kinds, refuse, settle
from visionattn.data.annotations.checks import same_content, size_of
from visionattn.data.annotations.reading import read_annotations
from visionattn.data.decode import read_image
from visionattn.data.loading.batches import ImageData, Split
from visionattn.data.loading.workers import WORKER_TIMEOUT, Unreadable
from visionattn.data.placement import Preprocess
from visionattn.data.samples import Sample, Transform, prepare
from visionattn.errors import DataError, UsageError


class DetectionData(ImageData):
    """Images with boxes, in a train, a val and perhaps a test split.

    A batch is a dict (`Batch`): `image` (B, 3, H, W) float32, normalised; `image_id` (B,) int64; and lists with one
    item per image: `boxes` (N, 4) xyxy in pixels of the input, `labels` (N,) int64, `crowd` (N,) bool (see
    `Annotated`), `area` (N,) in pixels of the source, `path` and `placement`.

    Args:
        preprocess: converts an image to the model's input; its `fit` must be `letterbox` or `stretch`, which keep the
            whole image.
        batch_size, num_workers, seed, unreadable, worker_timeout: see `ImageData`.

    Raises:
        UsageError: `preprocess` crops.
    """

    category_ids: tuple[int, ...]
    """Number of each class in the annotation files, written into the COCO .json of predictions."""

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        batch_size: int,
        num_workers: int,
        seed: int,
        unreadable: Unreadable = "stop",
        worker_timeout: float = WORKER_TIMEOUT,
    ) -> None:
        if preprocess.fit == "crop":
            raise UsageError("preprocess with fit: crop would cut objects off; detection needs letterbox or stretch")
        super().__init__(
            preprocess=preprocess,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            unreadable=unreadable,
            worker_timeout=worker_timeout,
        )


class AnnotatedData(DetectionData):
    """Images with boxes in COCO, Pascal VOC or YOLO files; see `read_annotations` for the folders it reads.

    Where the files name no val split, validation images are drawn at random from the training images, determined by
    `seed`.

    Args:
        root: the folder, a COCO .json or a YOLO .yaml.
        preprocess: converts an image to the model's input (default: letterbox to 320 × 320, with ImageNet's mean and
            standard deviation).
        augment: random change of training images, e.g. `visionattn.data.transforms.Augmentation` (default: no change).
        images, class_names, splits, box_format: see `read_annotations`.
        bad_boxes: what to do with boxes and images that cannot be trained on (see `boxes.KINDS`): `drop` leaves them
            out and warns with their counts; `refuse` raises DataError (default: refuse). Boxes that look like another
            format always raise DataError.
        min_visible: a training box is left out if less than this fraction of its area remains after the augmentation,
            or if it becomes less than a pixel wide or high; in [0, 1] (default: 0.3).
        val_fraction: without a val split: fraction of the training images for validation, in (0, 1).
        test_fraction: where the files name no splits at all: fraction of the images for testing; 0 gives no test split.
        batch_size, num_workers, seed, unreadable, worker_timeout: see `ImageData`.

    Attributes:
        problems: all problems found in the annotations.

    Raises:
        DataError: the files cannot be read, boxes look like another format, or there are problems and `bad_boxes` is
            `refuse`.
        ValueError: min_visible, val_fraction or test_fraction is out of its range.
    """

    def __init__(
        self,
        root: str,
        *,
        preprocess: Preprocess | None = None,
        augment: Transform | None = None,
        images: str | None = None,
        class_names: Sequence[str] | None = None,
        splits: Mapping[str, str] | None = None,
        box_format: BoxFormat | None = None,
        bad_boxes: Literal["drop", "refuse"] = "refuse",
        min_visible: float = 0.3,
        val_fraction: float = 0.15,
        test_fraction: float = 0.0,
        batch_size: int = 16,
        num_workers: int = 2,
        seed: int = 0,
        unreadable: Unreadable = "stop",
        worker_timeout: float = WORKER_TIMEOUT,
    ) -> None:
        super().__init__(
            preprocess=preprocess or Preprocess(320, fit="letterbox"),
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            unreadable=unreadable,
            worker_timeout=worker_timeout,
        )
        if not 0 <= min_visible <= 1:
            raise ValueError(f"min_visible must be in [0, 1], got {min_visible}")
        if not (val_fraction > 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
            raise ValueError(
                f"val_fraction must be > 0, test_fraction ≥ 0 and their sum < 1, got {val_fraction} and {test_fraction}"
            )
        self.root = root
        self.augment = augment
        self.min_visible = min_visible
        annotations = read_annotations(
            root, images=images, class_names=class_names, splits=splits, box_format=box_format
        )
        settled = settle(annotations, size_of, doubt=box_format is None)
        self.class_names, self.category_ids = annotations.class_names, annotations.category_ids
        self.problems: list[Problem] = annotations.problems
        doubts = [problem for problem in self.problems if problem.kind == "wrong format"]
        if doubts:
            raise DataError(f"{root}: {doubts[0].detail}")
        if bad_boxes == "refuse":
            refuse(self.problems, root)
        elif self.problems:
            warnings.warn(
                f"{root}: left out {count_kinds(self.problems)}; `visionattn data check {root}` lists them",
                stacklevel=2,
            )
        self._images = _divided(settled, val_fraction, test_fraction, seed)
        if not any(self._images.values()):
            raise DataError(f"{root} has no image that can be used; `visionattn data check {root}` says why")

    def dataset(self, split: Split) -> Dataset[Sample] | None:
        images = self._images.get(split)
        if split == "train":
            if not any(len(image.boxes) for image in images or ()):
                what = "training images without any box" if images else "no training images"
                raise DataError(f"{self.root} has {what}; `visionattn data check {self.root}` says why")
            assert images
            return AnnotatedImages(
                images, preprocess=self.preprocess, augment=self.augment, min_visible=self.min_visible
            )
        return AnnotatedImages(images, preprocess=self.preprocess) if images else None


class AnnotatedImages(Dataset[Sample]):
    """Images with their boxes; the key of a sample is its index, or (index, seed of the augmentation).

    The augmentation and `preprocess` move the boxes together with the pixels.

    Args:
        images: returned by `settle`.
        preprocess: resizes and normalises each image.
        augment: changes each image first (default: no change).
        min_visible: boxes with less than this fraction of their area left, or less than a pixel wide or high, are
            dropped, so that no box is degenerate. None keeps every box, as evaluation requires (default: None).
    """

    def __init__(
        self,
        images: Sequence[Annotated],
        *,
        preprocess: Preprocess,
        augment: Transform | None = None,
        min_visible: float | None = None,
    ) -> None:
        self.images = images
        self.preprocess = preprocess
        self.augment = augment
        self.min_visible = min_visible

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index, seed = key if isinstance(key, tuple) else (key, key)
        source = self.images[index]
        sample = prepare(read_image(source.path), self.preprocess, self.augment, seed, boxes=source.boxes)
        boxes_N4 = sample["boxes"].numpy()
        keep_N = np.ones(len(boxes_N4), bool)
        if self.min_visible is not None:
            sides_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2]
            # an affine map scales every area by its determinant
            scale = abs(np.linalg.det(sample["placement"].matrix[:, :2]))
            whole_N = scale * (source.boxes[:, 2:] - source.boxes[:, :2]).prod(1)
            keep_N = (sides_N2 >= 1).all(1) & (sides_N2.prod(1) >= self.min_visible * whole_N)
        return {
            **sample,
            "boxes": torch.from_numpy(boxes_N4[keep_N]),
            "labels": torch.from_numpy(source.labels[keep_N]),
            "crowd": torch.from_numpy(source.crowd[keep_N]),
            "area": torch.from_numpy(source.area[keep_N]).float(),
            "image_id": source.image_id,
            "path": self.path_of(index),
        }

    def path_of(self, index: int) -> str:
        return str(self.images[index].path)

    def read_source(self, path: str) -> NDArray[np.uint8]:
        """Read the source of a sample by its path: (H, W, 3) uint8 RGB."""
        return read_image(Path(path))


def _divided(
    settled: Mapping[str, list[Annotated]], val_fraction: float, test_fraction: float, seed: int
) -> dict[str, list[Annotated]]:
    """Divide images into the splits that the files name, and draw missing splits at random, determined by `seed`."""
    splits = {split: images for split, images in settled.items() if split and images}
    held_out = {image.path for split in ("val", "test") for image in splits.get(split, ())}
    pool = splits.get("train") or [image for image in settled.get("", ()) if image.path not in held_out]
    if not pool:
        return splits
    if "val" in splits:
        return {**splits, "train": pool}
    fractions = {"val": val_fraction, "test": 0.0 if splits else test_fraction}
    counts = [max(1, round(fraction * len(pool))) if fraction else 0 for fraction in fractions.values()]
    if sum(counts) >= len(pool):
        raise DataError(f"{len(pool)} images are too few to split; add some, or a val split")
    order = np.random.default_rng(seed).permutation(len(pool))
    firsts = np.array(same_content([image.path for image in pool]))
    parts = np.split(order, np.cumsum(counts))
    drawn: dict[str, list[int]] = {name: part.tolist() for name, part in zip(("val", "test"), parts, strict=False)}
    taken = {int(firsts[index]) for part in drawn.values() for index in part}
    # copies of validation and test images are not trained on
    drawn["train"] = [int(index) for index in parts[2] if int(firsts[index]) not in taken]
    splits |= {name: [pool[index] for index in sorted(part)] for name, part in drawn.items() if part}
    return splits
