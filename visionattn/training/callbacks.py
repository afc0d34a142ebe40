"""What Lightning lacks: pictures of where the model looks while it trains, and a report when it is tested."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table

from visionattn.attention import AdaptiveSpan
from visionattn.data import write_image
from visionattn.data.decode import write_bytes
from visionattn.maps import Maps, Method
from visionattn.maps.boxes import BoxMethod
from visionattn.maps.localisation import pointing
from visionattn.overlay.draw import Tile, boxes, heat, sheet
from visionattn.training.pictures import Explained, explain, picture_of


class OverlaySamples(Callback):
    """Write overlays of the same validation images every few epochs, into the run's overlays/ and TensorBoard.

    Args:
        every_n_epochs: 0 writes none.
        num_images: how many; the first of the validation split.
        method: how attention becomes a heatmap, of a whole image or of each box; what fits the model by default.
    """

    def __init__(self, every_n_epochs: int = 1, num_images: int = 8, method: Method | BoxMethod | None = None) -> None:
        if every_n_epochs < 0 or num_images < 1:
            raise ValueError(f"every_n_epochs must be ≥ 0 and num_images ≥ 1, got {every_n_epochs} and {num_images}")
        self.every_n_epochs = every_n_epochs
        self.num_images = num_images
        self.method = method
        self._batch: dict[str, Any] | None = None

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and self._wanted(trainer):
            self._batch = _first(batch, self.num_images)
        if trainer.sanity_checking and self.every_n_epochs:  # a method that does not fit is told before the first epoch
            explain(self.method, pl_module, _first(batch, 1))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = _folder(trainer)
        if self._batch is None or not self._wanted(trainer) or folder is None:
            return
        maps = explain(self.method, pl_module, self._batch)
        picture = picture_of(
            self._batch, maps, pl_module, _dataset(trainer.val_dataloaders), f"epoch {trainer.current_epoch}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_image(folder / f"epoch_{trainer.current_epoch:03d}.jpg", picture)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("overlays", picture, trainer.global_step, dataformats="HWC")

    def _wanted(self, trainer: L.Trainer) -> bool:
        due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return bool(due) and not trainer.sanity_checking and trainer.is_global_zero and trainer.state.fn == "fit"


class TestReport(Callback):
    """At the end of a test, print and write what it found.

    Into the run: `overlays/test.png`, a sheet of images with their heatmaps; `test.csv`, the figures; `confusion.csv`.
    Where the data knows the objects' boxes, the pointing game is played on every image, and its score printed beside
    those of guesses.

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

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if "box" in batch:
            maps = explain(self.method, pl_module, batch)
            assert isinstance(maps, Maps)
            hits = pointing(maps.heatmaps, batch["box"], batch["image"].shape[-2:])
            figures = {"pointing": "pointing", "centre": "pointing_centre_guess", "chance": "pointing_chance"}
            for name, logged in figures.items():
                pl_module.log(
                    f"test/{logged}", hits[name].mean(), batch_size=len(batch["box"]), on_epoch=True, sync_dist=True
                )
        if batch_idx == 0 and trainer.is_global_zero:
            self._batch = _first(batch, self.num_images)
            self._maps = explain(self.method, pl_module, self._batch)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        figures = {
            name.removeprefix("test/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("test/")
        }
        Console().print(_table(figures))
        folder = _folder(trainer)
        if folder is None or self._batch is None or self._maps is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        first = self._maps[0] if isinstance(self._maps, list) else self._maps
        title = f"{first.method}: {first.source}"
        picture = picture_of(self._batch, self._maps, pl_module, _dataset(trainer.test_dataloaders), title)
        write_image(folder / "test.png", picture)
        run = folder.parent
        _write_csv(run / "test.csv", [["figure", "value"], *([name, value] for name, value in figures.items())])
        confusion = getattr(pl_module, "confusion", None)
        if confusion is not None:
            names = getattr(pl_module, "class_names", ()) or range(len(confusion))
            rows = [[name, *counts] for name, counts in zip(names, confusion.tolist(), strict=True)]
            _write_csv(run / "confusion.csv", [["truth \\ prediction", *names], *rows])
        Console(soft_wrap=True).print(f"overlays: {folder / 'test.png'}\nfigures:  {run / 'test.csv'}", highlight=False)


class DrawSpans(Callback):
    """Write `overlays/spans.png` into the run after every validation: how far each head reaches, a row a layer.

    For networks whose heads have adaptive spans; in others it does nothing.
    """

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layers = {name: part for name, part in pl_module.named_modules() if isinstance(part, AdaptiveSpan)}
        folder = _folder(trainer)
        if layers and folder is not None and trainer.is_global_zero and not trainer.sanity_checking:
            folder.mkdir(parents=True, exist_ok=True)
            write_image(folder / "spans.png", _span_sheet(layers, f"spans after epoch {trainer.current_epoch}"))


def _span_sheet(layers: dict[str, AdaptiveSpan], title: str) -> Any:
    tiles = []
    for name, part in layers.items():
        extent = math.ceil(part.max_span + part.ramp)
        for head, reach in enumerate(part.reach(extent).detach().float().cpu().numpy()):
            layer = name.removesuffix(".mechanism").removesuffix(".attn")
            layer = layer.removeprefix("network.").removeprefix("backbone.")
            tiles.append(Tile(heat(reach), [f"{part.spans[head]:.1f} patches", f"{layer}, head {head}"]))
    return sheet(tiles, title=title, columns=max(part.num_heads for part in layers.values()), width=120)


class WritePredictions(BasePredictionWriter):
    """Write what was predicted into the run.

    Of a classifier: the most probable class of every image, into predictions.csv. Of a detector: predictions.json, in
    COCO's form of results, boxes in pixels of the source images, with the files' own numbers of images and classes; and
    pictures of the first images with their boxes, into predictions/.

    Args:
        pictures: how many, at most.
        lowest: score of a box in a picture.
    """

    def __init__(self, pictures: int = 100, lowest: float = 0.3) -> None:
        super().__init__(write_interval="batch")
        self.pictures = pictures
        self.lowest = lowest
        self._drawn = 0
        self._results: list[dict[str, Any]] = []

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        folder = _folder(trainer)
        if folder is None:
            return
        if "detections" in prediction:
            self._collect(trainer, prediction, folder.parent)
        else:
            self._append(trainer, prediction, folder.parent)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = _folder(trainer)
        if folder is not None and hasattr(trainer.datamodule, "category_ids"):  # type: ignore[attr-defined]
            content = json.dumps(self._results).encode()
            write_bytes(folder.parent / f"predictions{_rank(trainer)}.json", content)

    def _append(self, trainer: L.Trainer, prediction: Any, run: Path) -> None:
        names = getattr(trainer.datamodule, "class_names", ())  # type: ignore[attr-defined]
        probabilities, classes = prediction["probability"].float().cpu().max(-1)
        path = run / f"predictions{_rank(trainer)}.csv"
        fresh = not path.exists()
        with open(path, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(["path", "class", "probability"])
            for source, index, probability in zip(
                prediction["path"], classes.tolist(), probabilities.tolist(), strict=True
            ):
                writer.writerow([source, names[index] if names else index, f"{probability:.6f}"])

    def _collect(self, trainer: L.Trainer, prediction: Any, run: Path) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        dataset = _dataset(trainer.predict_dataloaders)
        for path, image_id, found in zip(
            prediction["path"], prediction["image_id"], prediction["detections"], strict=True
        ):
            edges, scores, labels = (found[name].float().cpu() for name in ("boxes", "scores", "labels"))
            for (x1, y1, x2, y2), score, label in zip(edges.tolist(), scores.tolist(), labels.tolist(), strict=True):
                box = [round(edge, 2) for edge in (x1, y1, x2 - x1, y2 - y1)]
                category = data.category_ids[int(label)]
                self._results.append(
                    {"image_id": image_id, "category_id": category, "bbox": box, "score": round(score, 5)}
                )
            if self._drawn < self.pictures:
                self._drawn += 1
                seen = scores >= self.lowest
                names = [
                    f"{data.class_names[int(label)]} {score:.2f}"
                    for label, score in zip(labels[seen].tolist(), scores[seen].tolist(), strict=True)
                ]
                picture = boxes(dataset.read_source(path), edges[seen].numpy(), labels=names)
                (run / "predictions").mkdir(exist_ok=True)
                write_image(run / "predictions" / f"{image_id:06d}_{Path(path).stem}.jpg", picture)


def _rank(trainer: L.Trainer) -> str:
    return f".{trainer.global_rank}" if trainer.world_size > 1 else ""


def _folder(trainer: L.Trainer) -> Path | None:
    """Where a run keeps its overlays; None for runs that leave nothing behind."""
    if trainer.fast_dev_run or trainer.log_dir is None:  # type: ignore[attr-defined]
        return None
    return Path(trainer.log_dir) / "overlays"


def _dataset(loaders: Any) -> Any:
    loader = loaders[0] if isinstance(loaders, (list, tuple)) else loaders
    return loader.dataset


def _first(batch: dict[str, Any], count: int) -> dict[str, Any]:
    return {key: value[:count] for key, value in batch.items()}


def _table(figures: dict[str, float]) -> Table:
    table = Table("test", "")
    table.columns[1].justify = "right"
    for name in sorted(figures, key=lambda name: (name.startswith("pointing"), name)):
        table.add_row(name.replace("_", " "), f"{figures[name]:.4f}")
    return table


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
