"""Data for object detection, as LightningDataModules."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from visionattn.data.annotations.boxes import Annotated, BoxFormat, Problem, refuse, settle, told
from visionattn.data.annotations.checks import same_content, size_of
from visionattn.data.annotations.reading import read_annotations
from visionattn.data.decode import read_image
from visionattn.data.loading.batches import ImageData, Split
from visionattn.data.loading.workers import PATIENCE, Unreadable
from visionattn.data.placement import Preprocess
from visionattn.data.samples import Transform, prepare
from visionattn.errors import DataError, UsageError


class DetectionData(ImageData):
    """Images with boxes, in a train, a val and perhaps a test split.

    A batch is a dict: `image` (B, 3, H, W) float32, normalised; `image_id` (B,) int64; and lists, an item an image:
    `boxes` (N, 4) xyxy in pixels of the input, `labels` (N,) int64, `crowd` (N,) bool (see `Annotated`), `area` (N,) in
    pixels of the source, `path` and `placement`.

    Args:
        preprocess: to the model's input. All of an image must be seen: `letterbox` or `stretch`.
        batch_size, num_workers, seed, unreadable, patience: as `ImageData`.

    Raises:
        UsageError: `preprocess` crops.
    """

    category_ids: tuple[int, ...]
    """The files' own number of each class, which COCO's json of predictions is written with."""

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        batch_size: int,
        num_workers: int,
        seed: int,
        unreadable: Unreadable = "stop",
        patience: float = PATIENCE,
    ) -> None:
        if preprocess.fit == "crop":
            raise UsageError("preprocess with fit: crop would cut objects off; detection needs letterbox or stretch")
        super().__init__(
            preprocess=preprocess,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            unreadable=unreadable,
            patience=patience,
        )


class AnnotatedData(DetectionData):
    """Images with boxes in COCO's, Pascal VOC's or YOLO's files; see `read_annotations` for where they may lie.

    Where the files name no val split, it is drawn from the training images at random, by `seed`.

    Args:
        root: the folder, or COCO's .json or YOLO's .yaml.
        preprocess: to the model's input; letterboxed to 320 × 320 with ImageNet's mean and deviation, by default.
        augment: changes training images at random, e.g. `visionattn.data.transforms.Augmentation`.
        images, class_names, splits, box_format: as `read_annotations`.
        bad_boxes: of boxes and images that cannot be trained on (see `boxes.KINDS`): `drop` leaves them out, with a
            warning that counts them; `refuse` raises. Boxes in another format than they are read as are refused always.
        min_visible: a training box that the augmentation leaves less of than this share, or less than a pixel wide or
            high, is left out; in [0, 1].
        val_share: where there is no val split: share of the training images for validation.
        test_share: where the files name no splits at all: the same for testing; 0 makes no test split.
        batch_size, num_workers, seed, unreadable, patience: as `ImageData`.

    Attributes:
        problems: all that was found wrong with the annotations.

    Raises:
        DataError: the files cannot be used, or `bad_boxes` says so.
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
        val_share: float = 0.15,
        test_share: float = 0.0,
        batch_size: int = 16,
        num_workers: int = 2,
        seed: int = 0,
        unreadable: Unreadable = "stop",
        patience: float = PATIENCE,
    ) -> None:
        super().__init__(
            preprocess=preprocess or Preprocess(320, fit="letterbox"),
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            unreadable=unreadable,
            patience=patience,
        )
        if not 0 <= min_visible <= 1:
            raise ValueError(f"min_visible must be in [0, 1], got {min_visible}")
        if not (val_share > 0 and test_share >= 0 and val_share + test_share < 1):
            raise ValueError(f"val_share and test_share must leave some to train on, got {val_share} and {test_share}")
        self.root = root
        self.augment = augment
        self.min_visible = min_visible
        found = read_annotations(root, images=images, class_names=class_names, splits=splits, box_format=box_format)
        settled = settle(found, size_of, doubt=box_format is None)
        self.class_names, self.category_ids = found.class_names, found.category_ids
        self.problems: list[Problem] = found.problems
        doubts = [problem for problem in self.problems if problem.kind == "wrong format"]
        if doubts:
            raise DataError(f"{root}: {doubts[0].detail}")
        if bad_boxes == "refuse":
            refuse(self.problems, root)
        elif self.problems:
            warnings.warn(f"{root}: without {told(self.problems)}; `visionattn data check {root}`", stacklevel=2)
        self._images = _divided(settled, val_share, test_share, seed)
        if not any(self._images.values()):
            raise DataError(f"{root} has no image that can be used; `visionattn data check {root}` says why")

    def dataset(self, split: Split) -> Dataset[dict[str, Any]] | None:
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


class AnnotatedImages(Dataset[dict[str, Any]]):
    """Images with their boxes; a sample is asked for by its index, or by (index, seed of the augmentation).

    The boxes go where the augmentation and `preprocess` take the pixels. With a `min_visible` those that are left less
    than that share of, or less than a pixel wide or high, are dropped; so none is degenerate.

    Args:
        images: what `settle` returns.
        preprocess: to the model's input.
        augment: changes each picture first.
        min_visible: see above; None keeps every box, as a test must.
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

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
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
        """The picture, (H, W, 3) uint8 RGB, of a sample's path."""
        return read_image(Path(path))


def _divided(
    settled: Mapping[str, list[Annotated]], val_share: float, test_share: float, seed: int
) -> dict[str, list[Annotated]]:
    """Splits by the files' own names; what they leave open is drawn."""
    splits = {split: images for split, images in settled.items() if split and images}
    held_out = {image.path for split in ("val", "test") for image in splits.get(split, ())}
    pool = splits.get("train") or [image for image in settled.get("", ()) if image.path not in held_out]
    if not pool:
        return splits
    if "val" in splits:
        return {**splits, "train": pool}
    shares = {"val": val_share, "test": 0.0 if splits else test_share}
    counts = [max(1, round(share * len(pool))) if share else 0 for share in shares.values()]
    if sum(counts) >= len(pool):
        raise DataError(f"{len(pool)} images are too few to split; add some, or a val split")
    order = np.random.default_rng(seed).permutation(len(pool))
    firsts = np.array(same_content([image.path for image in pool]))
    parts = np.split(order, np.cumsum(counts))
    drawn: dict[str, list[int]] = {name: part.tolist() for name, part in zip(("val", "test"), parts, strict=False)}
    taken = {int(firsts[index]) for part in drawn.values() for index in part}
    # twins of validation and test images are not trained on
    drawn["train"] = [int(index) for index in parts[2] if int(firsts[index]) not in taken]
    splits |= {name: [pool[index] for index in sorted(part)] for name, part in drawn.items() if part}
    return splits
