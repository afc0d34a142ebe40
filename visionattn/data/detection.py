"""Data modules for object detection: the base class, and images with annotation files."""

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
from visionattn.data.classes import warn_of_similar
from visionattn.data.decode import read_image
from visionattn.data.listing import Listing, item_of, name_below
from visionattn.data.loading.batches import ImageData, Split
from visionattn.data.loading.workers import WORKER_TIMEOUT, Unreadable
from visionattn.data.placement import Preprocess
from visionattn.data.samples import Sample, Transform, prepare
from visionattn.data.splits import check_fractions, draw_splits
from visionattn.errors import DataError, UsageError
from visionattn.files import local_path


class DetectionData(ImageData):
    """Images with boxes, in a train, a val and perhaps a test split.

    A batch is a dict (`Batch`): `image` (B, 3, H, W) float32, normalised; `image_id` (B,) int64; and lists with one
    item per image: `boxes` (N, 4) xyxy in pixels of the input, `labels` (N,) int64, `crowd` (N,) bool (see
    `Annotated`), `area` (N,) in pixels of the source, `path` and `placement`.

    Args:
        preprocess: converts an image to the model's input; its `fit` must be `letterbox` or `stretch`, which keep the
            whole image.
        batch_size, num_workers, seed, unreadable, worker_timeout, changed_ok: see `ImageData`.

    Raises:
        UsageError: `preprocess` crops, by its `fit` or its `crop_fraction`.
    """

    category_ids: tuple[int, ...]
    """Number of each class in the annotation files; predictions in COCO's format use these numbers."""

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        batch_size: int,
        num_workers: int,
        seed: int,
        unreadable: Unreadable = "stop",
        worker_timeout: float = WORKER_TIMEOUT,
        changed_ok: bool = False,
    ) -> None:
        if preprocess.fit == "crop":
            raise UsageError("preprocess with fit: crop would cut off objects; detection needs letterbox or stretch")
        if preprocess.crop_fraction < 1:
            raise UsageError(
                "preprocess with crop_fraction < 1 would cut off objects; detection needs crop_fraction: 1"
            )
        super().__init__(
            preprocess=preprocess,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            unreadable=unreadable,
            worker_timeout=worker_timeout,
            changed_ok=changed_ok,
        )


class AnnotatedData(DetectionData):
    """Images with boxes in COCO, Pascal VOC or YOLO files; `read_annotations` describes the folders.

    If the files name no val split, validation images are drawn from the training images. `seed` and a hash of the
    file's name determine the choice, so an image keeps its split when other images are added or removed (see
    `splits.draw_splits`).

    Args:
        root: the folder, a COCO .json or a YOLO .yaml.
        preprocess: converts an image to the model's input (default: letterbox to 320 × 320, with ImageNet's mean and
            standard deviation).
        augment: random change of training images, e.g. `visionattn.data.transforms.Augmentation` (default: no change).
        images, class_names, splits, box_format: see `read_annotations`.
        bad_boxes: what to do if the annotations have problems (see `boxes.KINDS`): `refuse` raises DataError; `drop`
            leaves bad boxes and images out, clips boxes at the edges, and warns with the counts (default: refuse).
            Boxes that look like another format always raise DataError.
        min_visible: a training box is left out if less than this fraction of its area remains after the augmentation,
            or if it becomes less than a pixel wide or high; in [0, 1] (default: 0.3).
        val_fraction: approximate fraction of the training images for validation, in (0, 1); used if there is no val
            split.
        test_fraction: approximate fraction of the images for testing; used if the files name no splits. 0 gives no
            test split.
        batch_size, num_workers, seed, unreadable, worker_timeout, changed_ok: see `ImageData`.

    Attributes:
        problems: all problems found in the annotations.

    Raises:
        UsageError: `root` is an address such as s3://bucket, or `augment` repeats parts of the image at its borders.
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
        changed_ok: bool = False,
    ) -> None:
        super().__init__(
            preprocess=preprocess or Preprocess(320, fit="letterbox"),
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            unreadable=unreadable,
            worker_timeout=worker_timeout,
            changed_ok=changed_ok,
        )
        if getattr(augment, "repeats_image", False):
            raise UsageError(
                "augment has a transform whose border_mode repeats parts of the image, so that copies of objects would "
                "have no boxes; set border_mode: 0, which fills the borders with a colour"
            )
        if not 0 <= min_visible <= 1:
            raise ValueError(f"min_visible must be in [0, 1], got {min_visible}")
        check_fractions(val_fraction, test_fraction)
        self.root = local_path(root, "--data.root")
        self._folders = [Path(root) if Path(root).is_dir() else Path(root).parent, *([Path(images)] if images else [])]
        self.augment = augment
        self.min_visible = min_visible
        annotations = read_annotations(
            root, images=images, class_names=class_names, splits=splits, box_format=box_format
        )
        settled = settle(annotations, size_of, doubt=box_format is None)
        self.class_names, self.category_ids = annotations.class_names, annotations.category_ids
        warn_of_similar(self.class_names, root)
        self.problems: list[Problem] = annotations.problems
        doubts = [problem for problem in self.problems if problem.kind == "wrong format"]
        if doubts:
            raise DataError(f"{root}: {doubts[0].detail}")
        if bad_boxes == "refuse":
            refuse(self.problems, root)
        elif self.problems:
            warnings.warn(
                f"{root}: left out or clipped {count_kinds(self.problems)}; "
                f"`visionattn data check {root}` lists these problems",
                stacklevel=1,  # the caller is jsonargparse, whose warnings the command line silences
            )
        self._images = _divided(settled, val_fraction, test_fraction, seed, root)
        if not any(self._images.values()):
            raise DataError(f"{root} has no image that can be used; `visionattn data check {root}` lists the problems")

    def listing(self, split: Split) -> Listing | None:
        names = np.array([name.encode("utf-8", "surrogateescape") for name in self.class_names])
        return {
            name_below(image.path, self._folders): item_of(
                image.path,
                np.array(image.size).tobytes(),
                b"\0".join(names[image.labels].tolist()),
                *(part.tobytes() for part in (image.boxes, image.crowd, image.area)),
            )
            for image in self._images.get(split, ())
        }

    def dataset(self, split: Split) -> Dataset[Sample] | None:
        images = self._images.get(split)
        if split == "train":
            if not any(len(image.boxes) for image in images or ()):
                what = "training images without any box" if images else "no training images"
                raise DataError(f"{self.root} has {what}; `visionattn data check {self.root}` lists the problems")
            assert images
            return AnnotatedImages(
                images, preprocess=self.preprocess, augment=self.augment, min_visible=self.min_visible
            )
        return AnnotatedImages(images, preprocess=self.preprocess) if images else None


class AnnotatedImages(Dataset[Sample]):
    """Images with their boxes; the key of a sample is its index, or (index, seed of the augmentation).

    The augmentation and `preprocess` are applied to the boxes as well as to the pixels.

    Args:
        images: returned by `settle`.
        preprocess: resizes and normalises each image.
        augment: changes each image before `preprocess` (default: no change).
        min_visible: boxes with less than this fraction of their area left, and boxes less than a pixel wide or high,
            are left out. None keeps every box, as evaluation requires (default: None).
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
            # an affine map multiplies every area by the determinant of its matrix
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
    settled: Mapping[str, list[Annotated]], val_fraction: float, test_fraction: float, seed: int, root: str
) -> dict[str, list[Annotated]]:
    """Return the splits that the files name; draw missing splits from the training images by a hash."""
    splits = {split: images for split, images in settled.items() if split and images}
    held_out = {image.path for split in ("val", "test") for image in splits.get(split, ())}
    pool = splits.get("train") or [image for image in settled.get("", ()) if image.path not in held_out]
    if not pool:
        return splits
    if "val" in splits:
        return {**splits, "train": pool}
    names = [image.path.name for image in pool]
    drawn = draw_splits(names, val=val_fraction, test=0.0 if splits else test_fraction, seed=seed, where=root)
    firsts = same_content([image.path for image in pool])
    taken = {firsts[index] for split, part in drawn.items() if split != "train" for index in part}
    # leave training images out that have the same content as a validation or test image
    twins = [index for index in drawn["train"] if firsts[index] in taken]
    if twins:
        warnings.warn(
            f"{root}: left out {len(twins)} training images that have the same content as validation or test images, "
            f"e.g. {pool[twins[0]].path.name} and {pool[firsts[twins[0]]].path.name}; remove the copies",
            stacklevel=1,
        )
    drawn["train"] = [index for index in drawn["train"] if firsts[index] not in taken]
    return splits | {split: [pool[index] for index in part] for split, part in drawn.items()}
