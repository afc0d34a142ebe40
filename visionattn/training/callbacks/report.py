"""A report of a test: a table, figures, and overlays of the first images."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torchmetrics import MeanMetric

from visionattn.data import write_image
from visionattn.evaluation.localisation import pointing
from visionattn.files import write_file
from visionattn.maps import Gaze, Maps, Method
from visionattn.maps.boxes import BoxMethod
from visionattn.models import GlimpseNetwork
from visionattn.training.callbacks.run_files import _csv, _dataset, _first, _folder, _show
from visionattn.training.callbacks.sample_sheet import Explained, chosen, explain, picture_of
from visionattn.training.callbacks.scanpath_report import GazeDensity, write_gaze


class TestReport(Callback):
    """At the end of a test, print and write what it found.

    Into the run: `overlays/test.png`, a sheet of images with their heatmaps; `test.csv`, the figures; `confusion.csv`.
    Where the data knows the objects' boxes, the pointing game is played on every image, and its score printed beside
    those of guesses.

    Where the heatmaps are those of glimpses, the sheet shows their paths, and there is more in `overlays/`:
    `gaze_density.png`, how often each pixel was seen sharply in the whole test, the first glimpse and the later ones
    apart, and where the objects were; of a `GlimpseNetwork` `gaze.webp`, the glimpses at the first image one by one.

    Args:
        num_images: images on the sheet, the first of the test split.
        method: how attention becomes a heatmap, of a whole image or of each box; what fits the model by default.
    """

    __test__ = False  # a callback, whatever pytest makes of its name

    def __init__(self, num_images: int = 12, method: Method | BoxMethod | None = None) -> None:
        if num_images < 1:
            raise ValueError(f"num_images must be ≥ 1, got {num_images}")
        self.num_images = num_images
        self.method = method
        self._batch: dict[str, Any] | None = None
        self._maps: Explained | None = None
        self._folder: Path | None = None
        self._hits: dict[str, MeanMetric] = {}
        self._density = GazeDensity()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._folder = _folder(trainer)  # every process must ask
        self._hits = {}
        self._density = GazeDensity()

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        figures = {"pointing": "pointing", "centre": "pointing_centre_guess", "chance": "pointing_chance"}
        if "box" in batch:
            for name in figures.values():
                self._hits.setdefault(f"test/{name}", MeanMetric().to(pl_module.device))
        if not len(batch["image"]):  # as for a process of more than there are images
            return
        whole = "boxes" not in batch  # of images, not of their boxes
        method = chosen(self.method, pl_module, batch) if whole else self.method
        if whole and ("box" in batch or isinstance(method, Gaze)):
            maps = explain(method, pl_module, batch)
            assert isinstance(maps, Maps)
            self._density.add(maps, batch)
            if "box" in batch:
                hits = pointing(maps.heatmaps, batch["box"], batch["image"].shape[-2:])
                for name, logged in figures.items():
                    self._hits[f"test/{logged}"].update(hits[name].to(pl_module.device))
        if batch_idx == 0 and trainer.is_global_zero:
            self._batch = _first(batch, self.num_images)
            self._maps = explain(method, pl_module, self._batch)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, hits in self._hits.items():
            if not hits.update_called:
                hits.update(0.0, weight=0.0)
            pl_module.log(name, hits.compute(), sync_dist=True)  # the same in every process
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
        preprocess = getattr(trainer.datamodule, "preprocess", None)  # type: ignore[attr-defined]
        if isinstance(pl_module.network, GlimpseNetwork) and preprocess is not None:
            dataset = _dataset(trainer.test_dataloaders)
            write_gaze(folder / "gaze.webp", pl_module, self._batch, dataset, preprocess)
        run = folder.parent
        _write_csv(run / "test.csv", [["figure", "value"], *([name, value] for name, value in figures.items())])
        confusion = getattr(pl_module, "confusion", None)
        if confusion is not None:
            names = getattr(pl_module, "class_names", ()) or range(len(confusion))
            rows = [[name, *counts] for name, counts in zip(names, confusion.tolist(), strict=True)]
            _write_csv(run / "confusion.csv", [["truth \\ prediction", *names], *rows])
        Console(soft_wrap=True).print(f"overlays: {folder / 'test.png'}\nfigures:  {run / 'test.csv'}", highlight=False)


def _table(figures: dict[str, float]) -> Table:
    table = Table("test", "")
    table.columns[1].justify = "right"
    for name in sorted(figures, key=lambda name: (name.startswith("pointing"), name)):
        table.add_row(name.replace("_", " "), f"{figures[name]:.4f}")
    return table


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    write_file(path, _csv(rows))
