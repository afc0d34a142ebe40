"""Overlays of the same validation images during training."""

import lightning as L
from lightning.pytorch.callbacks import Callback

from visionattn.data import Batch, write_image
from visionattn.maps import BoxMethod, Method
from visionattn.training.callbacks.run_files import _dataset, _first, _folder, _show
from visionattn.training.callbacks.sample_sheet import explain, picture_of


class OverlaySamples(Callback):
    """Write overlays of the same validation images every few epochs, into the run's overlays/, TensorBoard and W&B.

    If the network takes glimpses, the sheet also shows their locations and boxes, next to the heatmap.

    Args:
        every_n_epochs: write a sheet of overlays after every `every_n_epochs` epochs; 0 for never.
        num_images: number of images, taken from the beginning of the validation split.
        method: heatmap method for whole images or for each box (default: a method that fits the model).

    Raises:
        ValueError: a number is out of range.
        UsageError: the method does not fit the model; raised before the first epoch.
    """

    def __init__(self, every_n_epochs: int = 1, num_images: int = 8, method: Method | BoxMethod | None = None) -> None:
        if every_n_epochs < 0 or num_images < 1:
            raise ValueError(f"every_n_epochs must be ≥ 0 and num_images ≥ 1, got {every_n_epochs} and {num_images}")
        self.every_n_epochs = every_n_epochs
        self.num_images = num_images
        self.method = method
        self._batch: Batch | None = None

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and self._is_due(trainer):
            self._batch = _first(batch, self.num_images)
        if trainer.sanity_checking and self.every_n_epochs:
            # raise before the first epoch if the method does not fit the model
            explain(self.method, pl_module, _first(batch, 1))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = _folder(trainer)
        if self._batch is None or not self._is_due(trainer) or folder is None:
            return
        maps = explain(self.method, pl_module, self._batch)
        picture = picture_of(
            self._batch, maps, pl_module, _dataset(trainer.val_dataloaders), f"epoch {trainer.current_epoch}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_image(folder / f"epoch_{trainer.current_epoch:03d}.jpg", picture)
        _show(trainer, "overlays", picture)

    def _is_due(self, trainer: L.Trainer) -> bool:
        due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return bool(due) and not trainer.sanity_checking and trainer.is_global_zero and trainer.state.fn == "fit"
