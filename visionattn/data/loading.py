"""What the data modules share: splits, loaders, and the order of training."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from visionattn.data.order import Order
from visionattn.data.pipeline import collate
from visionattn.data.placement import Preprocess
from visionattn.errors import DataError

Split = Literal["train", "val", "test"]


class ImageData(L.LightningDataModule, ABC):
    """Images in a train, a val and perhaps a test split.

    The order of training is a function of (seed, epoch), the augmentation of (seed, epoch, index).

    Args:
        preprocess: to the model's input.
        batch_size: images a batch and process.
        num_workers: processes that load images; 0 loads in this one.
        seed: of order, augmentation and split.
    """

    class_names: tuple[str, ...]

    def __init__(self, *, preprocess: Preprocess, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"batch_size must be ≥ 1 and num_workers ≥ 0, got {batch_size} and {num_workers}")
        self.preprocess = preprocess
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.datasets: dict[Split, Dataset[dict[str, Any]] | None] = {}

    @abstractmethod
    def dataset(self, split: Split) -> Dataset[dict[str, Any]] | None:
        """The samples of a split, or None where there is no such split; only `train` is augmented."""

    def setup(self, stage: str) -> None:
        wanted: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        self.datasets |= {split: self.dataset(split) for split in wanted.get(stage, ("test", "val"))}
        if stage == "test" and self.datasets["test"] is None:
            raise DataError(
                f"{type(self).__name__} has no test split; score the validation images with `visionattn validate`"
            )

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        dataset = self._loaded("train")
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        order = Order(dataset, seed=self.seed, rank=rank, world_size=world_size)
        # a last batch of one image would break batch normalisation
        return self._loader(dataset, sampler=order, drop_last=len(order) > self.batch_size)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self._loaded("val"))

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self._loaded("test"))

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self._loaded("test" if self.datasets["test"] is not None else "val"))

    def _loaded(self, split: Split) -> Any:
        return self.datasets[split]

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[dict[str, Any]]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
            **options,
        )
