"""Lists of the images in each split, in the folder of a run."""

from pathlib import Path
from typing import get_args

import lightning as L
from lightning.pytorch.callbacks import Callback

from visionattn.data import ImageData, Split
from visionattn.files import write_file
from visionattn.training.callbacks.run_files import datamodule_of


class WriteSplits(Callback):
    """Write the images of each split into `train.txt`, `val.txt` and `test.txt` when a training starts.

    Each line names an image. `data.splits` of `AnnotatedData` reads such lists, so a run can use the splits of another.
    Nothing is written for data that does not list its images, e.g. images that are drawn.

    Args:
        folder: of the lists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = datamodule_of(trainer)
        if not trainer.is_global_zero or not isinstance(data, ImageData):
            return
        for split in get_args(Split):
            if listing := data.listing(split):
                self.folder.mkdir(parents=True, exist_ok=True)
                text = "".join(f"{name}\n" for name in listing)
                write_file(self.folder / f"{split}.txt", text.encode("utf-8", "surrogateescape"))
