"""What Lightning lacks: pictures of where the model looks while it trains, and a report when it is tested."""

import csv
import io
import itertools
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torchmetrics import MeanMetric

from visionattn.attention import AdaptiveSpan
from visionattn.data import write_image
from visionattn.data.decode import write_bytes
from visionattn.errors import DataError
from visionattn.maps import Gaze, Maps, Method
from visionattn.maps.boxes import BoxMethod
from visionattn.maps.localisation import pointing
from visionattn.models import GlimpseNetwork
from visionattn.overlay.draw import Tile, boxes, heat, sheet
from visionattn.training.durable import replace
from visionattn.training.gaze import GazeDensity, write_gaze
from visionattn.training.pictures import Explained, chosen, explain, picture_of


class OverlaySamples(Callback):
    """Write overlays of the same validation images every few epochs, into the run's overlays/, TensorBoard and
    W&B.

    Of a network that takes glimpses, their path and every scale's box stand beside the heat.

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
        _show(trainer, "overlays", picture)

    def _wanted(self, trainer: L.Trainer) -> bool:
        due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return bool(due) and not trainer.sanity_checking and trainer.is_global_zero and trainer.state.fn == "fit"


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
    """Write what was predicted into the run, each image once, in the data's order.

    Of a classifier: the most probable class of every image, into predictions.csv. Of a detector: predictions.json, in
    COCO's form of results, boxes in pixels of the source images, with the files' own numbers of images and classes, and
    with the image's file_name, since Pascal VOC and YOLO number none; and pictures of the first images with their
    boxes, into predictions/.

    The file appears when it is complete. Each process writes a part of it before.

    Args:
        pictures: how many, at most.
        lowest: score of a box in a picture.
    """

    def __init__(self, pictures: int = 100, lowest: float = 0.3) -> None:
        super().__init__(write_interval="batch")
        self.pictures = pictures
        self.lowest = lowest
        self._home: Path | None = None
        self._name = "predictions.csv"
        self._done = 0

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = _folder(trainer)  # every process must ask
        self._home = folder and folder.parent
        finds = hasattr(trainer.datamodule, "category_ids")  # type: ignore[attr-defined]
        self._name = "predictions.json" if finds else "predictions.csv"
        self._done = 0
        if self._home:
            self._home.mkdir(parents=True, exist_ok=True)
            self._part(trainer.global_rank).write_bytes(b"")

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
        if self._home is None:
            return
        rows = _classes if self._name == "predictions.csv" else _boxes
        content = rows(prediction, trainer.datamodule)  # type: ignore[attr-defined]
        try:
            with open(self._part(trainer.global_rank), "ab") as file:
                file.write(content)
        except OSError as error:
            raise DataError(f"{self._home / self._name} cannot be written: {error.strerror}") from error
        if self._name == "predictions.json":
            self._draw(trainer, prediction, self._home / "predictions")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier()
        if self._home is None or not trainer.is_global_zero:
            return
        parts = [self._part(rank) for rank in range(trainer.world_size)]
        join = _interleave if self._name == "predictions.csv" else _interleave_json
        replace(self._home / self._name, lambda file: join(parts, file))
        for part in parts:
            part.unlink()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._home:
            self._part(trainer.global_rank).unlink(missing_ok=True)

    def _draw(self, trainer: L.Trainer, prediction: Any, folder: Path) -> None:
        dataset = _dataset(trainer.predict_dataloaders)
        class_names = trainer.datamodule.class_names  # type: ignore[attr-defined]
        for path, image_id, found in zip(
            prediction["path"], prediction["image_id"], prediction["detections"], strict=True
        ):
            place = self._done * trainer.world_size + trainer.global_rank  # among the images of all processes
            self._done += 1
            if place >= self.pictures:
                return
            edges, scores, labels = (found[name].float().cpu() for name in ("boxes", "scores", "labels"))
            seen = scores >= self.lowest
            names = [
                f"{class_names[int(label)]} {score:.2f}"
                for label, score in zip(labels[seen].tolist(), scores[seen].tolist(), strict=True)
            ]
            folder.mkdir(exist_ok=True)
            picture = boxes(dataset.read_source(path), edges[seen].numpy(), labels=names)
            write_image(folder / f"{image_id:06d}_{Path(path).stem}.jpg", picture)

    def _part(self, rank: int) -> Path:
        assert self._home is not None
        return self._home / f".predictions.{rank}.part"


def _classes(prediction: Any, data: Any) -> bytes:
    """A row an image: its path, its most probable class, and how probable."""
    names = getattr(data, "class_names", ())
    probabilities, classes = prediction["probability"].float().cpu().max(-1)
    return _csv(
        [
            [source, names[index] if names else index, f"{probability:.6f}"]
            for source, index, probability in zip(
                prediction["path"], classes.tolist(), probabilities.tolist(), strict=True
            )
        ]
    )


def _boxes(prediction: Any, data: Any) -> bytes:
    """A line an image: the list of its results, as COCO's json has them."""
    lines = []
    for path, image_id, found in zip(prediction["path"], prediction["image_id"], prediction["detections"], strict=True):
        edges, scores, labels = (found[name].float().cpu().tolist() for name in ("boxes", "scores", "labels"))
        results = [
            {
                "image_id": image_id,
                "file_name": Path(path).name,
                "category_id": data.category_ids[int(label)],
                "bbox": [round(edge, 2) for edge in (x1, y1, x2 - x1, y2 - y1)],
                "score": round(score, 5),
            }
            for (x1, y1, x2, y2), score, label in zip(edges, scores, labels, strict=True)
        ]
        lines.append(json.dumps(results) + "\n")
    return "".join(lines).encode()


def _interleave(parts: Sequence[Path], file: BinaryIO) -> None:
    """Join the rows of processes of which each took every n-th image."""
    file.write(_csv([["path", "class", "probability"]]))
    with ExitStack() as stack:
        texts = [
            stack.enter_context(open(part, newline="", encoding="utf-8", errors="surrogateescape")) for part in parts
        ]
        for rows in itertools.zip_longest(*map(csv.reader, texts)):
            file.write(_csv([row for row in rows if row is not None]))


def _interleave_json(parts: Sequence[Path], file: BinaryIO) -> None:
    """Join the lists of processes of which each took every n-th image, into one."""
    with ExitStack() as stack:
        texts = [stack.enter_context(open(part, "rb")) for part in parts]
        lines = (line for some in itertools.zip_longest(*texts) for line in some if line)
        lists = (line.strip()[1:-1] for line in lines)  # without their brackets
        file.write(b"[")
        for number, results in enumerate(results for results in lists if results):
            file.write(b",\n" * bool(number) + results)
        file.write(b"]\n")


def _folder(trainer: L.Trainer) -> Path | None:
    """Where a run keeps its overlays; None for runs that leave nothing behind."""
    if trainer.fast_dev_run or trainer.log_dir is None:  # type: ignore[attr-defined]
        return None
    return Path(trainer.log_dir) / "overlays"


def _show(trainer: L.Trainer, name: str, picture_HWC: NDArray[np.uint8]) -> None:
    """Give a picture to the loggers that take any: TensorBoard and W&B."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture_HWC, trainer.global_step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [picture_HWC], step=trainer.global_step)


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
    write_bytes(path, _csv(rows))


def _csv(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
