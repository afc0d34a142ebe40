"""Data modules for image classification: folders of images and torchvision's data sets."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from torchvision.datasets import VisionDataset

from visionattn.data.annotations.parsing import split_folders
from visionattn.data.classes import warn_of_similar
from visionattn.data.image_folder import ImageFolder, find_classes, sub_folders
from visionattn.data.listing import Item, Listing, hash_of, item_of, name_below
from visionattn.data.loading.batches import ImageData, Split
from visionattn.data.loading.workers import WORKER_TIMEOUT, Unreadable
from visionattn.data.placement import Preprocess
from visionattn.data.samples import Sample, Transform, prepare
from visionattn.data.splits import check_fractions, draw_splits
from visionattn.errors import DataError, UsageError
from visionattn.files import local_path


class ClassificationData(ImageData):
    """Images with labels, in a train, a val and perhaps a test split.

    A batch is a dict (`Batch`): `image` (B, C, H, W) float32, normalised; `label` (B,) int64, or (B, K) float32 of 0
    and 1 if the class's `multi_label` is True; `path` and `placement`, lists. If the data has the position of the
    object, the batch also has `box` (B, 4), xyxy in pixels of the input, and `mask` (B, H, W) bool.

    Args:
        preprocess, batch_size, num_workers, seed, unreadable, worker_timeout: see `ImageData`.
    """

    multi_label = False
    """Whether an image has any number of labels, instead of exactly one."""

    @property
    def class_counts(self) -> NDArray[np.int64] | None:
        """Number of training images of each class, or None if counting them would need reading every image."""
        return None

    @property
    def train_count(self) -> int | None:
        """Number of training images of data with several labels, or None if it is unknown before the training."""
        return None


def check_balance(balance: float) -> None:
    """Raise ValueError if `balance` is out of its range, see `balanced_weights`."""
    if not 0 <= balance <= 1:
        raise ValueError(f"balance must be in [0, 1], got {balance}")


def balanced_weights(
    labels: Sequence[Sequence[int]], class_counts: NDArray[np.int64], balance: float
) -> NDArray[np.float64] | None:
    """Return how often each image is used in training, relative to the others, so that rare classes are favoured.

        weight = 1 / n^balance,    n: number of training images of the rarest class among the image's labels

    With balance 0, every image is used once an epoch. With 1, and one label for each image, every class is used equally
    often. Images without labels count as a class of their own.

    Args:
        labels: numbers of the classes of each training image.
        class_counts: number of training images of each class.
        balance: in [0, 1].

    Returns:
        (N,), or None for balance 0.
    """
    if balance == 0:
        return None
    unlabelled = sum(not numbers for numbers in labels)
    rarest = np.array([class_counts[list(numbers)].min() if len(numbers) else unlabelled for numbers in labels])
    return rarest.astype(np.float64) ** -balance


class ImageFolderData(ClassificationData):
    """Images in folders, with a sub-folder for each class.

    `root` holds either train/ (or training/) and optionally val/ (valid/, validation/) and test/ (testing/), in upper
    or lower case and each with a folder for each class, or the class folders themselves. If there is no val/, about the
    same fraction of every class is drawn from the training images for validation. `seed` and a hash of the file's name
    in its class folder determine the choice, so an image keeps its split when other images are added or removed (see
    `splits.draw_splits`).

    Args:
        root: the folder.
        preprocess: converts an image to the model's input (default: scale the shorter side to 224 and take the central
            224 × 224 pixels, with ImageNet's mean and standard deviation).
        augment: random change of training images, e.g. `visionattn.data.transforms.Augmentation` (default: no change).
        balance: how strongly images of rare classes are favoured, see `balanced_weights`; 0 uses every image once an
            epoch, 1 every class equally often (default: 0).
        val_fraction: approximate fraction of each class for validation, in (0, 1); used if there is no val/.
        test_fraction: approximate fraction of each class for testing; used if `root` holds the class folders
            themselves. 0 gives no test split.
        batch_size, num_workers, unreadable, worker_timeout, changed_ok: see `ImageData`.
        seed: random seed of the order, the augmentation and the split.

    Raises:
        DataError: the folder is missing or has no classes, a class is empty or too small to split, or the splits have
            different classes.
        UsageError: `root` is an address such as s3://bucket.
        ValueError: balance is out of its range, or val_fraction and test_fraction leave nothing to train on.
    """

    def __init__(
        self,
        root: str,
        *,
        preprocess: Preprocess | None = None,
        augment: Transform | None = None,
        balance: float = 0.0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.0,
        batch_size: int = 32,
        num_workers: int = 2,
        seed: int = 0,
        unreadable: Unreadable = "stop",
        worker_timeout: float = WORKER_TIMEOUT,
        changed_ok: bool = False,
    ) -> None:
        super().__init__(
            preprocess=preprocess or Preprocess(),
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            unreadable=unreadable,
            worker_timeout=worker_timeout,
            changed_ok=changed_ok,
        )
        check_fractions(val_fraction, test_fraction)
        check_balance(balance)
        self.root = Path(local_path(root, "--data.root"))
        self.augment = augment
        self.balance = balance
        self.val_fraction = val_fraction
        folders = self._split_folders()
        if "train" in folders:
            self._files = self._from_folders(folders)
        else:
            self._files = self._divided(self.root, find_classes(self.root), test_fraction)
        warn_of_similar(self.class_names, root)

    @property
    def class_counts(self) -> NDArray[np.int64]:
        return np.bincount([label for _, label in self._files["train"]], minlength=len(self.class_names))

    def sampling_weights(self) -> NDArray[np.float64] | None:
        return balanced_weights([(label,) for _, label in self._files["train"]], self.class_counts, self.balance)

    def listing(self, split: Split) -> Listing | None:
        return {
            name_below(path, [self.root]): item_of(path, self.class_names[label].encode("utf-8", "surrogateescape"))
            for path, label in self._files.get(split, ())
        }

    def dataset(self, split: Split) -> Dataset[Sample] | None:
        if split not in self._files:
            return None
        augment = self.augment if split == "train" else None
        return ImageFolder(self._files[split], preprocess=self.preprocess, augment=augment)

    def _split_folders(self) -> dict[str, Path]:
        """Return split → its folder; empty if the sub-folders of the root are classes.

        Raises:
            DataError: a split has two folders, or there are folders of splits but none for training.
        """
        found = split_folders(self.root)
        if not found:
            return {}
        names = ", ".join(f"{folder.name}/" for _, folder in found)
        others = set(sub_folders(self.root)) - {folder for _, folder in found}
        if others and not any(sub_folders(folder) for _, folder in found):
            warnings.warn(
                f"{self.root}: {names} is taken as a class, because it has no class folders; "
                "move the folder away if it is no class",
                stacklevel=1,
            )
            return {}
        folders: dict[str, Path] = {}
        for split, folder in found:
            if split in folders:
                both = f"{folders[split].name}/ and {folder.name}/"
                raise DataError(f"{self.root} has two folders of {split} images, {both}; keep one, or merge them")
            folders[split] = folder
        if "train" not in folders:
            raise DataError(f"{self.root} has {names} but no train/; add train/, or rename the folder if it is a class")
        return folders

    def _from_folders(self, folders: dict[str, Path]) -> dict[str, list[tuple[Path, int]]]:
        classes = {split: find_classes(folder) for split, folder in folders.items()}
        self.class_names = tuple(classes["train"])
        for split, names in classes.items():
            if odd := sorted(set(names) ^ set(self.class_names)):
                only = "only in" if odd[0] in names else "missing from"
                raise DataError(f"the class {odd[0]!r} is {only} {folders[split]}; every split needs the same classes")
        numbers = {name: number for number, name in enumerate(self.class_names)}
        files = {
            split: [(path, numbers[name]) for name, paths in by_name.items() for path in paths]
            for split, by_name in classes.items()
        }
        return files if "val" in files else files | self._divided(folders["train"], classes["train"], 0.0)

    def _divided(
        self, folder: Path, classes: dict[str, list[Path]], test_fraction: float
    ) -> dict[str, list[tuple[Path, int]]]:
        """Draw validation and test images from each class by a hash; the other images are for training."""
        self.class_names = tuple(classes)
        files: dict[str, list[tuple[Path, int]]] = {}
        for label, (name, paths) in enumerate(classes.items()):
            # names in the folder of the class, so that an image that is moved to another class keeps its split
            names = [path.relative_to(folder / name).as_posix() for path in paths]
            where = f"the class {name!r}"
            drawn = draw_splits(names, val=self.val_fraction, test=test_fraction, seed=self.seed, where=where)
            for split, chosen in drawn.items():
                files.setdefault(split, []).extend((paths[index], label) for index in chosen)
        return files


class TorchvisionData(ClassificationData):
    """MNIST, FashionMNIST, CIFAR10 or CIFAR100, read by torchvision.

    Args:
        dataset: a class of torchvision.datasets that takes (root, train, download), e.g. `torchvision.datasets.MNIST`.
        root: folder of the data set's files, and of the download.
        download: fetch missing files (default: False).
        preprocess: converts an image to the model's input (default: keep the size, and scale values to [−1, 1]).
        augment: random change of training images (default: no change).
        balance: how strongly images of rare classes are favoured, see `balanced_weights` (default: 0).
        val_size: number of training images used for validation; every class gives the same fraction.
        batch_size, num_workers, seed, changed_ok: see `ImageData`.

    Raises:
        DataError: the files are missing.
        UsageError: val_size is not between 0 and the number of training images.
    """

    def __init__(
        self,
        dataset: Callable[..., VisionDataset],
        root: str,
        *,
        download: bool = False,
        preprocess: Preprocess | None = None,
        augment: Transform | None = None,
        balance: float = 0.0,
        val_size: int = 5_000,
        batch_size: int = 128,
        num_workers: int = 2,
        seed: int = 0,
        changed_ok: bool = False,
    ) -> None:
        self._make = dataset
        self.root = root
        self.download = download
        self.augment = augment
        check_balance(balance)
        self.balance = balance
        self.val_size = val_size
        self._listings: dict[Split, Listing] = {}
        train = self._open(train=True)
        self.class_names = tuple(str(name) for name in train.classes)
        height, width = np.asarray(train[0][0]).shape[:2]
        default = Preprocess((height, width), fit="stretch", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        super().__init__(
            preprocess=preprocess or default,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            changed_ok=changed_ok,
        )
        self._train = train
        self._labels = np.asarray(train.targets)
        if not 0 < val_size < len(self._labels):
            raise UsageError(f"val_size must be between 0 and {len(self._labels)}, the training images, got {val_size}")

    @property
    def class_counts(self) -> NDArray[np.int64]:
        return np.bincount(self._labels[self._division()[0]], minlength=len(self.class_names))

    def sampling_weights(self) -> NDArray[np.float64] | None:
        labels = [(int(label),) for label in self._labels[self._division()[0]]]
        return balanced_weights(labels, self.class_counts, self.balance)

    def listing(self, split: Split) -> Listing:
        if split in self._listings:  # hashing all pixels takes half a second for 60,000 small images
            return self._listings[split]
        dataset = self.dataset(split)
        images, labels = self.arrays(split)
        names = [self.class_names[label].encode("utf-8", "surrogateescape") for label in labels]
        self._listings[split] = {
            dataset.path_of(index): Item(-1, hash_of(name, np.ascontiguousarray(image).tobytes()))
            for index, (image, name) in enumerate(zip(images, names, strict=True))
        }
        return self._listings[split]

    def arrays(self, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return all images of a split, (n, H, W) or (n, H, W, 3), and their labels (n,)."""
        if split == "test":
            test = self._open(train=False)
            return np.asarray(test.data), np.asarray(test.targets)
        chosen = self._division()[int(split == "val")]
        return np.asarray(self._train.data)[chosen], self._labels[chosen]

    def dataset(self, split: Split) -> "_TorchvisionImages":
        if split == "test":
            test = self._open(train=False)
            return _TorchvisionImages(test, np.arange(len(test)), "test", preprocess=self.preprocess)
        train, val = self._division()
        chosen, augment = (train, self.augment) if split == "train" else (val, None)
        return _TorchvisionImages(self._train, chosen, "train", preprocess=self.preprocess, augment=augment)

    def _division(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        from sklearn.model_selection import train_test_split

        everything = np.arange(len(self._labels))
        train, val = train_test_split(
            everything, test_size=self.val_size, stratify=self._labels, random_state=self.seed
        )
        return np.sort(train), np.sort(val)

    def _open(self, *, train: bool) -> Any:  # torchvision has no type with .classes, .data and .targets
        try:
            return self._make(self.root, train=train, download=self.download)
        except RuntimeError as error:  # raised by torchvision for missing files and failed downloads
            raise DataError(
                f"{self.root} does not hold the files of {getattr(self._make, '__name__', self._make)}; "
                "set download: true, or put the files into this folder"
            ) from error


class _TorchvisionImages(Dataset[Sample]):
    """A subset of a torchvision data set: the images at the indices `chosen`."""

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

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index, seed = key if isinstance(key, tuple) else (key, key)
        number = int(self.chosen[index])
        picture, label = self.source[number]
        sample = prepare(np.array(picture.convert("RGB")), self.preprocess, self.augment, seed)
        sample["label"], sample["path"] = int(label), self.path_of(index)
        return sample

    def path_of(self, index: int) -> str:
        return f"{self.name}/{self.chosen[index]:05d}.png"

    def read_source(self, path: str) -> NDArray[np.uint8]:
        """Read the source of a sample by its path: (H, W, 3) uint8 RGB."""
        picture, _ = self.source[int(path.rsplit("/", 1)[-1].removesuffix(".png"))]
        return np.array(picture.convert("RGB"))
