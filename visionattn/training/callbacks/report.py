"""The report of a test: a table, CSV files, and overlays of the first images."""

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

    The run gets `test.csv` with the metrics, `confusion.csv`, and `overlays/test.png`, a sheet of images with their
    heatmaps. If the data has the objects' boxes, the pointing game is scored on every image, and printed next to the
    scores of a centre guess and of chance.

    For heatmaps of glimpses the sheet shows their paths, and `overlays/` also gets `gaze_density.png`: how often each
    pixel was read at the finest scale in the whole test, for the first glimpse and for the later ones, and where the
    objects were. For a `GlimpseNetwork` it also gets `gaze.webp`, the glimpses at the first image one by one.

    Args:
        num_images: number of images on the sheet, the first of the test split.
        method: heatmap method for whole images or for each box. Default: one that fits the model.

    Raises:
        ValueError: num_images is below 1.
    """

    __test__ = False  # pytest would collect the class because of its name

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
        self._folder = _folder(trainer)  # it reads log_dir, a broadcast, so every process must call it
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
        if not len(batch["image"]):  # there are more processes than images
            return
        whole = "boxes" not in batch  # the heatmaps are of whole images, not of boxes
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
            pl_module.log(name, hits.compute(), sync_dist=True)  # equal in every process
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
