"""What the data modules share: splits, and batches in an order that can be taken up again, none lost or repeated."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from visionattn.data.loading.order import Order, Share
from visionattn.data.loading.workers import PATIENCE, Loader, Unreadable
from visionattn.data.placement import Preprocess
from visionattn.data.samples import collate
from visionattn.errors import DataError, UsageError

Split = Literal["train", "val", "test"]


class ImageData(L.LightningDataModule, ABC):
    """Images in a train, a val and perhaps a test split.

    The order of training is a function of (seed, epoch), the augmentation of (seed, epoch, index). A training that is
    continued in the middle of an epoch goes on with the image that comes next. In evaluation every image is seen
    exactly once, by however many processes.

    Args:
        preprocess: to the model's input.
        batch_size: images a batch and process.
        num_workers: processes that load images; 0 loads in this one.
        seed: of order, augmentation and split.
        unreadable: stop at an image that cannot be read, or whose process dies or hangs; or skip it.
        patience: seconds that a process may take for one image.

    Attributes:
        skipped: path → reason of the images that were left out.
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
        patience: float = PATIENCE,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"batch_size must be ≥ 1 and num_workers ≥ 0, got {batch_size} and {num_workers}")
        if patience <= 0:
            raise ValueError(f"patience must be > 0, got {patience}")
        self.preprocess = preprocess
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.unreadable = unreadable
        self.patience = patience
        self.skipped: dict[str, str] = {}
        self.datasets: dict[Split, Dataset[dict[str, Any]] | None] = {}
        self._order: Order | None = None
        self._saved: dict[str, Any] = {}

    @abstractmethod
    def dataset(self, split: Split) -> Dataset[dict[str, Any]] | None:
        """The samples of a split, or None where there is no such split; only `train` is augmented.

        A data set that can fail tells by `path_of(index)` which file a sample comes from, and one whose samples are not
        to be taken from anywhere at any time by `shuffled(seed)` in which order they are.
        """

    def setup(self, stage: str) -> None:
        wanted: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        self.datasets |= {split: self.dataset(split) for split in wanted.get(stage, ("test", "val"))}
        if stage == "test" and self.datasets["test"] is None:
            raise DataError(
                f"{type(self).__name__} has no test split; score the validation images with `visionattn validate`"
            )

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        dataset: Any = self.datasets["train"]
        rank, world_size = self._place()
        self._order = Order(
            dataset,
            seed=self.seed,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            start=self._behind,  # Lightning may ask for the loader before it has read the checkpoint
            shuffled=getattr(dataset, "shuffled", None),
        )
        return self._loader(dataset, sampler=self._order, fill=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._evaluation("test" if self.datasets["test"] is not None else "val")

    def state_dict(self) -> dict[str, Any]:
        """What the order of a checkpoint's epoch depends on; Lightning counts the batches."""
        if self._order is None:
            return {}
        together = self.batch_size * self._order.num_replicas
        return {"seed": self.seed, "images": len(self._order.dataset), "together": together}  # type: ignore[arg-type]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def _behind(self) -> int:
        """How many images of the epoch that begins lie behind: some, where a training is continued in its middle."""
        loop = self.trainer.fit_loop if self.trainer else None
        if loop is None or not loop.restarting:
            return 0
        now = self.state_dict()
        names = {"seed": "seed", "images": "number of training images", "together": "batch of all processes together"}
        for key, name in names.items():
            if key in self._saved and self._saved[key] != now[key]:
                raise UsageError(
                    f"the checkpoint stands in the middle of an epoch, and its {name} was {self._saved[key]} and is "
                    f"{now[key]}; only with the same can it go on with the images that come next"
                )
        done: Any = loop.epoch_loop.batch_progress.current
        return done.processed * now["together"]

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _evaluation(self, split: Split) -> DataLoader[dict[str, Any]]:
        dataset: Any = self.datasets[split]
        rank, world_size = self._place()
        share = Share(dataset, rank=rank, world_size=world_size)
        return self._loader(dataset, sampler=share, starved=share.starved)

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[dict[str, Any]]:
        return Loader(
            dataset,
            collate=collate,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            unreadable=self.unreadable,
            patience=self.patience,
            skipped=self.skipped,
            **options,
        )
