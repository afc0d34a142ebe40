"""Overlays of the same validation images during training."""

from typing import cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from visionattn.data import Batch, Preprocess, write_image
from visionattn.maps import BoxMethod, Method
from visionattn.training.callbacks.plain_batches import ShownImages, convert, is_plain
from visionattn.training.callbacks.run_files import SourceImages, _dataset, _first, _folder, _show, is_dev_run
from visionattn.training.callbacks.sample_sheet import explain, picture_of


class OverlaySamples(Callback):
    """Write overlays of the same validation images every few epochs, into the run's overlays/, TensorBoard and W&B.

    Works for every LightningModule whose `forward` takes images, in any trainer: if the module has a `network`, the
    network is explained. With another data module than visionattn's, files are written only into the folder of a
    CSVLogger or TensorBoardLogger, which is new for each run. If the network takes glimpses, the sheet also shows their
    locations and boxes, next to the heatmap.

    Args:
        every_n_epochs: write a sheet of overlays after every `every_n_epochs` epochs; 0 for never.
        num_images: number of images, taken from the beginning of the validation split.
        method: heatmap method for whole images or for each box (default: a method that fits the model).
        preprocess: how the images of another data module than visionattn's were normalised, to show them as pictures
            (default: the module's `preprocess`, or else ImageNet's mean and std).

    Raises:
        ValueError: a number is out of range.
        UsageError: the method does not fit the model, or the batches hold no images; raised before the first epoch.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        num_images: int = 8,
        method: Method | BoxMethod | None = None,
        preprocess: Preprocess | None = None,
    ) -> None:
        if every_n_epochs < 0 or num_images < 1:
            raise ValueError(f"every_n_epochs must be ≥ 0 and num_images ≥ 1, got {every_n_epochs} and {num_images}")
        self.every_n_epochs = every_n_epochs
        self.num_images = num_images
        self.method = method
        self.preprocess = preprocess
        self._samples: tuple[Batch, SourceImages] | None = None

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and dataloader_idx == 0 and self._is_due(trainer):
            self._samples = self._first(trainer, pl_module, batch, self.num_images)
        if trainer.sanity_checking and self.every_n_epochs:
            # raise before the first epoch if the method does not fit the model
            explain(self.method, pl_module, self._first(trainer, pl_module, batch, 1)[0])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = _folder(trainer)  # every process must call this, since trainer.log_dir broadcasts between processes
        if self._samples is None or not self._is_due(trainer) or is_dev_run(trainer):
            return
        batch, sources = self._samples
        maps = explain(self.method, pl_module, batch)
        picture = picture_of(batch, maps, pl_module, sources, f"epoch {trainer.current_epoch}")
        if isinstance(sources, ShownImages) and not _has_own_folder(trainer):
            folder = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_image(folder / f"epoch_{trainer.current_epoch:03d}.jpg", picture)
        _show(trainer, "overlays", picture)

    def _first(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, count: int
    ) -> tuple[Batch, SourceImages]:
        """Return the first samples of a batch, and what reads their source images."""
        if is_plain(batch):
            known = getattr(pl_module, "preprocess", None)
            return convert(batch, self.preprocess or (known if isinstance(known, Preprocess) else None), count)
        return _first(cast(Batch, batch), count), _dataset(trainer.val_dataloaders)

    def _is_due(self, trainer: L.Trainer) -> bool:
        due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return bool(due) and not trainer.sanity_checking and trainer.is_global_zero and trainer.state.fn == "fit"


def _has_own_folder(trainer: L.Trainer) -> bool:
    """Return whether the folder of the first logger is new for each run, so that no file of the user is in it."""
    return isinstance(trainer.logger, (CSVLogger, TensorBoardLogger))
