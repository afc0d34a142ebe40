"""The base of the data modules: splits, and loaders that can resume without losing or repeating an image."""

from abc import ABC, abstractmethod
from collections.abc import Sized
from typing import Any, Literal, Protocol, cast, runtime_checkable

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from visionattn.data.loading.order import Order, RankSampler
from visionattn.data.loading.workers import WORKER_TIMEOUT, Loader, Unreadable
from visionattn.data.placement import Preprocess
from visionattn.data.samples import Batch, Sample, collate
from visionattn.errors import DataError, UsageError

Split = Literal["train", "val", "test"]


@runtime_checkable
class _OwnOrder(Protocol):
    """A data set that prescribes the order of its samples."""

    def shuffled(self, seed: int) -> list[int]: ...


class _Processed(Protocol):
    """The type of Lightning's batch counter; its own class is private."""

    processed: int


class ImageData(L.LightningDataModule, ABC):
    """Images in a train, a val and perhaps a test split.

    In training, (seed, epoch) determines the order, and (seed, epoch, index) determines the augmentation. Training that
    is resumed in the middle of an epoch continues with the next image of the order. Evaluation uses every image exactly
    once, for any number of processes.

    Args:
        preprocess: converts an image to the model's input.
        batch_size: images per batch and process.
        num_workers: processes that load images; 0 loads them in the main process.
        seed: random seed of the order, the augmentation and the split.
        unreadable: what to do if an image cannot be read, or the worker that reads it dies or hangs: `stop` or `skip`
            (default: stop).
        worker_timeout: seconds that a worker may take for one image (default: 20).

    Attributes:
        skipped: path → reason of each image that was left out.

    Raises:
        ValueError: an argument is out of its range.
    """

    class_names: tuple[str, ...]
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
        self.skipped: dict[str, str] = {}
        self.datasets: dict[Split, Dataset[Sample] | None] = {}
        self._order: Order | None = None
        self._saved: dict[str, int] = {}

    @abstractmethod
    def dataset(self, split: Split) -> Dataset[Sample] | None:
        """Return the samples of a split, or None where there is no such split; only `train` is augmented.

        Optional methods of the data set: `path_of(index)` returns the file of a sample, for error messages;
        `shuffled(seed)` returns the order of an epoch, for data that cannot be read efficiently in fully random order.
        """

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
        self._order = Order(
            cast(Sized, dataset),
            seed=self.seed,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            start=self._images_done,  # Lightning may ask for the loader before it has read the checkpoint
            shuffled=dataset.shuffled if isinstance(dataset, _OwnOrder) else None,
        )
        return self._loader(dataset, sampler=self._order, fill=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation("test" if self.datasets["test"] is not None else "val")

    def state_dict(self) -> dict[str, int]:
        """Return the numbers that determine the order in an epoch; Lightning itself saves the number of batches."""
        if self._order is None:
            return {}
        together = self.batch_size * self._order.num_replicas
        return {"seed": self.seed, "images": self._order.length, "together": together}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._saved = state_dict

    def _images_done(self) -> int:
        """Return how many images of the epoch were used before training was resumed; 0 if it was not resumed."""
        loop = self.trainer.fit_loop if self.trainer else None
        if loop is None or not loop.restarting:
            return 0
        now = self.state_dict()
        names = {"seed": "seed", "images": "number of training images", "together": "batch of all processes together"}
        for key, name in names.items():
            if key in self._saved and self._saved[key] != now[key]:
                raise UsageError(
                    f"the checkpoint was saved in the middle of an epoch, when the {name} was {self._saved[key]}; "
                    f"now it is {now[key]}. To resume with the next image, set the old value again"
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
