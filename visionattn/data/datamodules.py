"""Data for image classification, as LightningDataModules."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from torchvision.datasets import VisionDataset

from visionattn.data.image_folder import ImageFolder, find_classes
from visionattn.data.loading.batches import ImageData, Split
from visionattn.data.loading.workers import PATIENCE, Unreadable
from visionattn.data.placement import Preprocess
from visionattn.data.samples import Transform, prepare
from visionattn.errors import DataError, UsageError


class ClassificationData(ImageData):
    """Images with one label each, in a train, a val and perhaps a test split.

    A batch is a dict: `image` (B, 3, H, W) float32, normalised; `label` (B,) int64; `path` and `placement`, lists; and
    where the place of the object is known `box` (B, 4), xyxy in pixels of the input, and `mask` (B, H, W) bool.

    Args:
        preprocess, batch_size, num_workers, seed, unreadable, patience: as `ImageData`.
    """

    @property
    def class_counts(self) -> NDArray[np.int64] | None:
        """Number of training images of each class, where it is known without reading them all."""
        return None


class ImageFolderData(ClassificationData):
    """Images in folders, a sub-folder a class.

    Either `root` holds train/, perhaps val/ (also valid/ or validation/) and test/, with the classes inside each; or it
    holds the classes themselves. Where there is no val/, it is drawn from the training images at random, the same share
    of every class, by `seed`.

    Args:
        root: the folder.
        preprocess: to the model's input; 224 × 224 from the middle, with ImageNet's mean and deviation, by default.
        augment: changes training images at random, e.g. `visionattn.data.transforms.Augmentation`.
        val_share: where there is no val/: share of each class for validation.
        test_share: where root holds the classes themselves: the same for testing; 0 makes no test split.
        batch_size, num_workers, seed, unreadable, patience: as `ImageData`; the seed is that of the split too.

    Raises:
        DataError: the folder is missing, has no classes, one is empty or too small to split, or the splits have
            different classes.
    """

    def __init__(
        self,
        root: str,
        *,
        preprocess: Preprocess | None = None,
        augment: Transform | None = None,
        val_share: float = 0.15,
        test_share: float = 0.0,
        batch_size: int = 32,
        num_workers: int = 2,
        seed: int = 0,
        unreadable: Unreadable = "stop",
        patience: float = PATIENCE,
    ) -> None:
        super().__init__(
            preprocess=preprocess or Preprocess(),
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            unreadable=unreadable,
            patience=patience,
        )
        if not (val_share > 0 and test_share >= 0 and val_share + test_share < 1):
            raise ValueError(f"val_share and test_share must leave some to train on, got {val_share} and {test_share}")
        self.root = Path(root)
        self.augment = augment
        self.val_share = val_share
        folders = {split: self._folder(split) for split in ("train", "val", "test")}
        if folders["train"]:
            self._files = self._from_folders(folders)
        else:
            self._files = self._divided(find_classes(self.root), test_share)

    @property
    def class_counts(self) -> NDArray[np.int64]:
        return np.bincount([label for _, label in self._files["train"]], minlength=len(self.class_names))

    def dataset(self, split: Split) -> Dataset[dict[str, Any]] | None:
        if split not in self._files:
            return None
        augment = self.augment if split == "train" else None
        return ImageFolder(self._files[split], preprocess=self.preprocess, augment=augment)

    def _folder(self, split: str) -> Path | None:
        names = ("val", "valid", "validation") if split == "val" else (split,)
        return next((self.root / name for name in names if (self.root / name).is_dir()), None)

    def _from_folders(self, folders: dict[str, Path | None]) -> dict[str, list[tuple[Path, int]]]:
        classes = {split: find_classes(folder) for split, folder in folders.items() if folder}
        self.class_names = tuple(classes["train"])
        for split, found in classes.items():
            if odd := sorted(set(found) ^ set(self.class_names)):
                only = "only in" if odd[0] in found else "missing from"
                raise DataError(f"the class {odd[0]!r} is {only} {folders[split]}; every split needs the same classes")
        numbers = {name: number for number, name in enumerate(self.class_names)}
        files = {
            split: [(path, numbers[name]) for name, paths in found.items() for path in paths]
            for split, found in classes.items()
        }
        return files if "val" in files else files | self._divided(classes["train"], 0.0)

    def _divided(self, classes: dict[str, list[Path]], test_share: float) -> dict[str, list[tuple[Path, int]]]:
        """Draw validation and test images from a folder of classes; the rest is for training."""
        self.class_names = tuple(classes)
        random = np.random.default_rng(self.seed)
        files: dict[str, list[tuple[Path, int]]] = {"train": [], "val": [], "test": []}
        for label, (name, paths) in enumerate(classes.items()):
            counts = [max(1, round(share * len(paths))) if share else 0 for share in (self.val_share, test_share)]
            if sum(counts) >= len(paths):
                raise DataError(
                    f"the class {name!r} has {len(paths)} images, too few to split; add some, or a val folder"
                )
            order = random.permutation(len(paths))
            for split, chosen in zip(("val", "test", "train"), np.split(order, np.cumsum(counts)), strict=True):
                files[split] += [(paths[index], label) for index in sorted(chosen)]
        return {split: found for split, found in files.items() if found}


class TorchvisionData(ClassificationData):
    """MNIST, FashionMNIST, CIFAR10 or CIFAR100, as torchvision reads them.

    Args:
        dataset: a class of torchvision.datasets that takes (root, train, download), e.g. `torchvision.datasets.MNIST`.
        root: where its files lie, or shall lie.
        download: fetch them where they are missing.
        preprocess: to the model's input; the images as they are, with values in [−1, 1], by default.
        augment: changes training images at random.
        val_size: images of the training split that are kept for validation, the same share of every class.
        batch_size, num_workers, seed: as `ImageData`.

    Raises:
        DataError: the files are missing.
    """

    def __init__(
        self,
        dataset: Callable[..., VisionDataset],
        root: str,
        *,
        download: bool = False,
        preprocess: Preprocess | None = None,
        augment: Transform | None = None,
        val_size: int = 5_000,
        batch_size: int = 128,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        self._make = dataset
        self.root = root
        self.download = download
        self.augment = augment
        self.val_size = val_size
        train = self._open(train=True)
        self.class_names = tuple(str(name) for name in train.classes)
        height, width = np.asarray(train[0][0]).shape[:2]
        default = Preprocess((height, width), fit="stretch", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        super().__init__(preprocess=preprocess or default, batch_size=batch_size, num_workers=num_workers, seed=seed)
        self._train = train
        self._labels = np.asarray(train.targets)
        if not 0 < val_size < len(self._labels):
            raise UsageError(f"val_size must be between 0 and {len(self._labels)}, the training images, got {val_size}")

    @property
    def class_counts(self) -> NDArray[np.int64]:
        return np.bincount(self._labels[self._division()[0]], minlength=len(self.class_names))

    def arrays(self, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """All pictures of a split, (n, H, W) or (n, H, W, 3), and their labels (n,)."""
        if split == "test":
            test = self._open(train=False)
            return np.asarray(test.data), np.asarray(test.targets)
        chosen = self._division()[int(split == "val")]
        return np.asarray(self._train.data)[chosen], self._labels[chosen]

    def dataset(self, split: Split) -> Dataset[dict[str, Any]]:
        if split == "test":
            test = self._open(train=False)
            return _Pictures(test, np.arange(len(test)), "test", preprocess=self.preprocess)
        train, val = self._division()
        chosen, augment = (train, self.augment) if split == "train" else (val, None)
        return _Pictures(self._train, chosen, "train", preprocess=self.preprocess, augment=augment)

    def _division(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        from sklearn.model_selection import train_test_split

        everything = np.arange(len(self._labels))
        train, val = train_test_split(
            everything, test_size=self.val_size, stratify=self._labels, random_state=self.seed
        )
        return np.sort(train), np.sort(val)

    def _open(self, *, train: bool) -> Any:
        try:
            return self._make(self.root, train=train, download=self.download)
        except RuntimeError as error:  # torchvision's "not found" and its failed downloads
            raise DataError(
                f"{self.root} does not hold the files of {getattr(self._make, '__name__', self._make)}; "
                "set download: true, or put them there"
            ) from error


class _Pictures(Dataset[dict[str, Any]]):
    """Some pictures of a torchvision data set."""

    def __init__(
        self,
        source: Any,
        chosen: Sequence[int] | NDArray[np.int64],
        name: str,
        *,
        preprocess: Preprocess,
        augment: Transform | None = None,
    ) -> None:
        self.source = source
        self.chosen = chosen
        self.name = f"{type(source).__name__}/{name}"
        self.preprocess = preprocess
        self.augment = augment

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, seed = key if isinstance(key, tuple) else (key, key)
        number = int(self.chosen[index])
        picture, label = self.source[number]
        sample = prepare(np.array(picture.convert("RGB")), self.preprocess, self.augment, seed)
        return {**sample, "label": int(label), "path": self.path_of(index)}

    def path_of(self, index: int) -> str:
        return f"{self.name}/{self.chosen[index]:05d}.png"

    def read_source(self, path: str) -> NDArray[np.uint8]:
        """The picture, (H, W, 3) uint8 RGB, of a sample's path."""
        picture, _ = self.source[int(path.rsplit("/", 1)[-1].removesuffix(".png"))]
        return np.array(picture.convert("RGB"))
