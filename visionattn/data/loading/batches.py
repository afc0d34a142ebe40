"""The base class of the data modules: splits, and loaders that resume without losing or repeating an image."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sized
from functools import partial
from typing import Any, Literal, Protocol, TypedDict, cast, runtime_checkable

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from visionattn.data.listing import Listing, PackedListing, differences, pack, unpack
from visionattn.data.loading.order import Order, RankSampler, weighted_order
from visionattn.data.loading.workers import WORKER_TIMEOUT, Loader, Unreadable
from visionattn.data.placement import Preprocess
from visionattn.data.samples import Batch, Sample, collate
from visionattn.errors import DataError, UsageError

Split = Literal["train", "val", "test"]
_OF_TRAINING: tuple[Split, ...] = ("train", "val")  # the splits that a training uses


@runtime_checkable
class _OwnOrder(Protocol):
    """A data set that prescribes the order of its samples."""

    def shuffled(self, seed: int) -> list[int]: ...


class _Processed(Protocol):
    """The type of Lightning's batch counter, since Lightning's own class is private."""

    processed: int


class _State(TypedDict, total=False):
    """What a checkpoint holds of a data module.

    Keys:
        seed, images, together, balance: see `ImageData.state_dict`.
        splits: the images of the splits `train` and `val`, where their names are known.
    """

    seed: int
    images: int
    together: int
    balance: float
    splits: dict[str, PackedListing]


class ImageData(L.LightningDataModule, ABC):
    """Images in a train, a val and perhaps a test split.

    In training, (seed, epoch) determines the order, and (seed, epoch, index) determines the augmentation. If training
    is resumed in the middle of an epoch, it continues with the next image of the order. Evaluation uses every image
    exactly once, with any number of processes.

    If the data module lists its images (`listing`), a checkpoint holds their names, file sizes, labels and boxes. A
    resume with other images is refused, and a test says how many of its images the checkpoint was trained on.

    Args:
        preprocess: converts an image to the model's input.
        batch_size: images per batch and process.
        num_workers: processes that load images; 0 loads them in the main process.
        seed: random seed of the order, the augmentation and the split.
        unreadable: what to do if an image cannot be read, or if the worker that reads the image dies or hangs: `stop`
            or `skip` (default: stop).
        worker_timeout: seconds that a worker may take for one image (default: 20).
        changed_ok: resume also if images were added, removed or changed since the checkpoint (default: False).

    Attributes:
        skipped: path → reason of each image that was left out.

    Raises:
        ValueError: an argument is out of its range.
        DataError: in `load_state_dict`, if training is resumed with other images and `changed_ok` is False.
    """

    class_names: tuple[str, ...]
    listed = "images"
    """What `listing` names: images, or files of many images."""
    balance: float = 0.0
    """How strongly rare classes are favoured in training, see `sampling_weights`; 0 uses every image once an epoch."""
    allow_zero_length_dataloader_with_multiple_devices = True

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
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"batch_size must be ≥ 1 and num_workers ≥ 0, got {batch_size} and {num_workers}")
        if worker_timeout <= 0:
            raise ValueError(f"worker_timeout must be > 0, got {worker_timeout}")
        self.preprocess = preprocess
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.unreadable = unreadable
        self.worker_timeout = worker_timeout
        self.changed_ok = changed_ok
        self.skipped: dict[str, str] = {}
        self.datasets: dict[Split, Dataset[Sample] | None] = {}
        self._order: Order | None = None
        self._saved: _State = {}
        self._packed: dict[str, PackedListing] = {}

    @abstractmethod
    def dataset(self, split: Split) -> Dataset[Sample] | None:
        """Return the data set of a split, or None if the split does not exist; only `train` is augmented.

        The data set may have two optional methods. `path_of(index)` returns the file of a sample, for error messages.
        `shuffled(seed)` returns the order of an epoch, for data that is slow to read in fully random order.
        """

    def listing(self, split: Split) -> Listing | None:
        """Return the name and item of each image of a split, or None if they are unknown (the default)."""
        return None

    def sampling_weights(self) -> NDArray[np.float64] | None:
        """Return how often each training image is used, (N,), relative to the others; None for once each (default).

        An epoch still uses as many images as the data set has, see `order.weighted_order`.
        """
        return None

    def setup(self, stage: str) -> None:
        by_stage: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        self.datasets |= {split: self.dataset(split) for split in by_stage.get(stage, ("test", "val"))}
        if stage == "test" and self.datasets["test"] is None:
            raise DataError(
                f"{type(self).__name__} has no test split; score the validation images with `visionattn validate`"
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        dataset = self._dataset_of("train")
        rank, world_size = self._rank()
        weights_N = self.sampling_weights()
        shuffled = dataset.shuffled if isinstance(dataset, _OwnOrder) else None
        self._order = Order(
            cast(Sized, dataset),
            seed=self.seed,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            start=self._images_done,  # a function, since Lightning may build the loader before it reads the checkpoint
            shuffled=shuffled if weights_N is None else partial(weighted_order, weights_N),
        )
        return self._loader(dataset, sampler=self._order, fill=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation("test" if self.datasets["test"] is not None else "val")

    def state_dict(self) -> _State:  # type: ignore[override]  # Lightning's type is dict[str, Any]
        """Return the images, and the numbers that determine their order in an epoch.

        Lightning saves the number of finished batches. `together` is the total batch size of all processes.
        """
        if self._order is None:
            return {}
        if not self._packed:
            listings = {split: self.listing(split) for split in _OF_TRAINING}
            self._packed = {split: pack(listing) for split, listing in listings.items() if listing is not None}
        together = self.batch_size * self._order.num_replicas
        return {
            "seed": self.seed,
            "images": self._order.length,
            "together": together,
            "balance": float(self.balance),
            "splits": self._packed,
        }

    def load_state_dict(self, state_dict: _State) -> None:  # type: ignore[override]  # as for state_dict
        self._saved = state_dict
        saved = {split: unpack(packed) for split, packed in state_dict.get("splits", {}).items()}
        stage = self.trainer.state.fn if self.trainer else None
        if stage == "fit":
            self._compare(saved)
        elif stage in ("test", "validate"):
            self._count_trained(saved.get("train"), "test" if stage == "test" else "val")

    def _compare(self, saved: dict[str, Listing]) -> None:
        now: dict[str, Listing] = {split: self.listing(split) or {} for split in _OF_TRAINING if split in saved}
        changes = differences(saved, now)
        if changes and not self.changed_ok:
            raise DataError(
                f"the {self.listed} differ from those of the checkpoint: {changes}; restore them, or set "
                f"data.changed_ok: true to go on with the present {self.listed}"
            )
        if changes:
            self._say(f"the {self.listed} differ from those of the checkpoint: {changes}")

    def _count_trained(self, trained: Listing | None, split: Split) -> None:
        """Say how many images (or files) of a split the checkpoint was trained on: those of equal name and size."""
        listing = self.listing(split)
        if trained is None or listing is None:
            return
        count = sum(name in trained and trained[name].size == item.size for name, item in listing.items())
        name = "validation" if split == "val" else split
        self._say(f"the checkpoint was trained on {count} of the {len(listing)} {name} {self.listed}")

    def _say(self, line: str) -> None:
        if self._rank()[0] == 0:
            print(line, file=sys.stderr)

    def _images_done(self) -> int:
        """Return how many images of the epoch were used before the resume; 0 without a resume."""
        loop = self.trainer.fit_loop if self.trainer else None
        if loop is None or not loop.restarting:
            return 0
        now = cast(dict[str, int], self.state_dict())
        names = {
            "seed": "seed",
            "balance": "balance",
            "images": "number of training images",
            "together": "total batch size of all processes",
        }
        if self.changed_ok:
            del names["images"]
        saved = cast(dict[str, int], self._saved)
        for key, name in names.items():
            if key in saved and saved[key] != now[key]:
                raise UsageError(
                    f"the checkpoint was saved in the middle of an epoch with the {name} {saved[key]}, "
                    f"but this run has {now[key]}; set {saved[key]} again to resume with the next image"
                )
        progress = cast(_Processed, loop.epoch_loop.batch_progress.current)
        return progress.processed * now["together"]

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _dataset_of(self, split: Split) -> Dataset[Sample]:
        dataset = self.datasets[split]
        assert dataset is not None, f"no {split} split"
        return dataset

    def _evaluation(self, split: Split) -> DataLoader[Batch]:
        dataset = self._dataset_of(split)
        rank, world_size = self._rank()
        sampler = RankSampler(cast(Sized, dataset), rank=rank, world_size=world_size)
        return self._loader(dataset, sampler=sampler, starved=sampler.starved)

    def _loader(
        self, dataset: Dataset[Sample], *, sampler: Sampler[Any], fill: bool = False, starved: bool = False
    ) -> DataLoader[Batch]:
        return Loader(
            dataset,
            collate=collate,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            unreadable=self.unreadable,
            worker_timeout=self.worker_timeout,
            skipped=self.skipped,
            sampler=sampler,
            fill=fill,
            starved=starved,
        )
