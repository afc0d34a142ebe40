"""The report of a test: a table of metrics, CSV files, and overlays of the first images."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torchmetrics import MeanMetric

from visionattn.data import Batch, write_image
from visionattn.evaluation import pointing
from visionattn.files import write_file
from visionattn.maps import BoxMethod, Gaze, Heatmaps, Method
from visionattn.models import GlimpseNetwork
from visionattn.training.callbacks.run_files import (
    _csv,
    _dataset,
    _first,
    _folder,
    _show,
    class_names_of,
    datamodule_of,
)
from visionattn.training.callbacks.sample_sheet import BatchHeatmaps, chosen, explain, picture_of
from visionattn.training.callbacks.scanpath_report import FixationDensity, write_glimpse_animation


class TestReport(Callback):
    """Print and write a report at the end of a test.

    The report consists of `test.csv` with the metrics, `confusion.csv`, and `overlays/test.png`, a sheet of images with
    their heatmaps. If the data has the box of the object in each image, the report includes the pointing game over all
    images, and for comparison the scores of guessing the centre and of chance.

    For heatmaps of glimpses, the sheet shows the scanpaths, and the report includes `overlays/gaze_density.png`: how
    often each pixel was inside the finest patch, over all test images, for the first glimpse and for the later
    glimpses, and how often inside an object's box. For a `GlimpseNetwork`, the report also includes
    `overlays/gaze.webp`, an animation of the glimpses at the first image.

    Args:
        num_images: number of images on the sheet, taken from the beginning of the test split.
        method: heatmap method for whole images or for each box (default: a method that fits the model).

    Raises:
        ValueError: num_images is below 1.
    """

    __test__ = False  # pytest must not collect this class, whose name starts with Test

    def __init__(self, num_images: int = 12, method: Method | BoxMethod | None = None) -> None:
        if num_images < 1:
            raise ValueError(f"num_images must be ≥ 1, got {num_images}")
        self.num_images = num_images
        self.method = method
        self._batch: Batch | None = None
        self._maps: BatchHeatmaps | None = None
        self._folder: Path | None = None
        self._hits: dict[str, MeanMetric] = {}
        self._density = FixationDensity()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._folder = _folder(trainer)  # every process must call this, since trainer.log_dir broadcasts
        self._hits = {}
        self._density = FixationDensity()

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        figures = {"pointing": "pointing", "centre": "pointing_centre_guess", "chance": "pointing_chance"}
        if "box" in batch:
            for name in figures.values():
                self._hits.setdefault(f"test/{name}", MeanMetric().to(pl_module.device))
        if not len(batch["image"]):  # with more processes than images, some processes get an empty batch
            return
        whole = "boxes" not in batch  # a classifier has heatmaps of whole images, a detector has heatmaps of boxes
        method = self.method or (chosen(pl_module, batch) if whole else None)
        if whole and ("box" in batch or isinstance(method, Gaze)):
            maps = explain(method, pl_module, batch)
            assert isinstance(maps, Heatmaps)
            self._density.add(maps, batch)
            if "box" in batch:
                hits = pointing(maps.heatmaps, batch["box"], (batch["image"].shape[-2], batch["image"].shape[-1]))
                for name, logged in figures.items():
                    self._hits[f"test/{logged}"].update(hits[name].to(pl_module.device))
        if batch_idx == 0 and trainer.is_global_zero:
            self._batch = _first(batch, self.num_images)
            self._maps = explain(method, pl_module, self._batch)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, hits in self._hits.items():
            if not hits.update_called:
                hits.update(0.0, weight=0.0)
            pl_module.log(name, hits.compute(), sync_dist=True)  # compute() already combines the processes
        self._density.gather(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        figures = {
            name.removeprefix("test/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("test/")
        }
        Console().print(_table(figures))
        folder = self._folder
        if folder is None or self._batch is None or self._maps is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        first = self._maps[0] if isinstance(self._maps, list) else self._maps
        title = f"{first.method}: {first.source}"
        picture = picture_of(self._batch, self._maps, pl_module, _dataset(trainer.test_dataloaders), title)
        write_image(folder / "test.png", picture)
        _show(trainer, "test/overlays", picture)
        self._density.write(folder / "gaze_density.png")
        preprocess = getattr(datamodule_of(trainer), "preprocess", None)
        if isinstance(pl_module.network, GlimpseNetwork) and preprocess is not None:
            dataset = _dataset(trainer.test_dataloaders)
            write_glimpse_animation(folder / "gaze.webp", pl_module, self._batch, dataset, preprocess)
        run = folder.parent
        _write_csv(run / "test.csv", [["figure", "value"], *([name, value] for name, value in figures.items())])
        confusion = getattr(pl_module, "confusion", None)
        if confusion is not None:
            names = class_names_of(pl_module) or range(len(confusion))
            rows = [[name, *counts] for name, counts in zip(names, confusion.tolist(), strict=True)]
            _write_csv(run / "confusion.csv", [["truth \\ prediction", *names], *rows])
        Console(soft_wrap=True).print(f"overlays: {folder / 'test.png'}\nfigures:  {run / 'test.csv'}", highlight=False)


def _table(figures: dict[str, float]) -> Table:
    table = Table("test", "")
    table.columns[1].justify = "right"
    for name in sorted(figures, key=lambda name: (name.startswith("pointing"), name)):
        table.add_row(name.replace("_", " "), f"{figures[name]:.4f}")
    return table


def _write_csv(path: Path, rows: list[list[object]]) -> None:
    write_file(path, _csv(rows))
