"""Write the predictions of the verb `predict` into the run's folder."""

import csv
import itertools
import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from visionattn.data import write_image
from visionattn.drawing import draw_boxes
from visionattn.errors import DataError
from visionattn.files import write_file
from visionattn.maps import label_threshold
from visionattn.training.callbacks.run_files import (
    _csv,
    _dataset,
    _folder,
    class_names_of,
    datamodule_of,
    network_of,
)


class WritePredictions(BasePredictionWriter):
    """Write predictions into the run, once for each image and in the order of the data.

    For a classifier, write predictions.csv with the most probable class of every image. If its outputs are independent
    labels, write the labels above the network's `label_threshold`, with | between them, and the probability of every
    label. For a detector, write
    predictions.json in COCO's results format: boxes in pixels of the source images, with the image and category ids of
    the annotation files. Each box also has the `file_name` of its image, because Pascal VOC and YOLO have no image ids.
    The folder predictions/ gets pictures of the first images with their boxes.

    Each process writes a part; the first process joins the parts at the end.

    Args:
        pictures: maximum number of pictures.
        min_score: minimum score of a box in a picture.
    """

    def __init__(self, pictures: int = 100, min_score: float = 0.3) -> None:
        super().__init__(write_interval="batch")
        self.pictures = pictures
        self.min_score = min_score
        self._home: Path | None = None
        self._name = "predictions.csv"
        self._header = ["path", "class", "probability"]
        self._done = 0

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = _folder(trainer)  # every process must call this, since trainer.log_dir broadcasts between processes
        self._home = folder and folder.parent
        detects = hasattr(datamodule_of(trainer), "category_ids")
        self._name = "predictions.json" if detects else "predictions.csv"
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
        data = datamodule_of(trainer)
        names = class_names_of(pl_module) or class_names_of(data)
        if self._name == "predictions.csv":
            threshold = label_threshold(network_of(pl_module))
            names = names or [str(number) for number in range(prediction["probability"].shape[1])]
            self._header = ["path", "class", "probability"] if threshold is None else ["path", "labels", *names]
            content = _classes(prediction, names, threshold)
        else:
            content = _boxes(prediction, _category_ids(data, pl_module))
        try:
            with open(self._part(trainer.global_rank), "ab") as file:
                file.write(content)
        except OSError as error:
            raise DataError(f"{self._home / self._name} cannot be written: {error.strerror}") from error
        if self._name == "predictions.json":
            self._draw(trainer, prediction, names, self._home / "predictions")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier()
        if self._home is None or not trainer.is_global_zero:
            return
        parts = [self._part(rank) for rank in range(trainer.world_size)]
        join = partial(_interleave, self._header) if self._name == "predictions.csv" else _interleave_json
        write_file(self._home / self._name, lambda file: join(parts, file))
        for part in parts:
            part.unlink()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._home:
            self._part(trainer.global_rank).unlink(missing_ok=True)

    def _draw(self, trainer: L.Trainer, prediction: Any, class_names: Sequence[str], folder: Path) -> None:
        dataset = _dataset(trainer.predict_dataloaders)
        for path, image_id, found in zip(
            prediction["path"], prediction["image_id"], prediction["detections"], strict=True
        ):
            place = self._done * trainer.world_size + trainer.global_rank  # index of the image in the data set
            self._done += 1
            if place >= self.pictures:
                return
            edges, scores, labels = (found[name].float().cpu() for name in ("boxes", "scores", "labels"))
            drawn = scores >= self.min_score
            names = [
                f"{class_names[int(label)]} {score:.2f}"
                for label, score in zip(labels[drawn].tolist(), scores[drawn].tolist(), strict=True)
            ]
            folder.mkdir(exist_ok=True)
            picture = draw_boxes(dataset.read_source(path), edges[drawn].numpy(), labels=names)
            write_image(folder / f"{image_id:06d}_{Path(path).stem}.jpg", picture)

    def _part(self, rank: int) -> Path:
        assert self._home is not None
        return self._home / f".predictions.{rank}.part"


def _category_ids(data: Any, pl_module: L.LightningModule) -> Sequence[int]:
    """Return the category ids of the annotation files in the order of the model's classes."""
    numbers = getattr(pl_module, "label_numbers", None)
    ids: Sequence[int] = data.category_ids
    return ids if numbers is None else [ids[numbers.index(label)] for label in range(len(ids))]


def _classes(prediction: Any, names: Sequence[str], threshold: float | None) -> bytes:
    """Return a CSV row per image: path, most probable class and its probability.

    With a threshold, return the path, the labels above the threshold, and the probability of every label.
    """
    if threshold is not None:
        return _csv(
            [
                [
                    source,
                    "|".join(name for name, probability in zip(names, row, strict=True) if probability > threshold),
                    *(f"{probability:.6f}" for probability in row),
                ]
                for source, row in zip(
                    prediction["path"], prediction["probability"].float().cpu().tolist(), strict=True
                )
            ]
        )
    probabilities, classes = prediction["probability"].float().cpu().max(-1)
    return _csv(
        [
            [source, names[index], f"{probability:.6f}"]
            for source, index, probability in zip(
                prediction["path"], classes.tolist(), probabilities.tolist(), strict=True
            )
        ]
    )


def _boxes(prediction: Any, category_ids: Sequence[int]) -> bytes:
    """Return a line per image: a JSON list of its results in COCO's format."""
    lines = []
    for path, image_id, found in zip(prediction["path"], prediction["image_id"], prediction["detections"], strict=True):
        edges, scores, labels = (found[name].float().cpu().tolist() for name in ("boxes", "scores", "labels"))
        results = [
            {
                "image_id": image_id,
                "file_name": Path(path).name,
                "category_id": category_ids[int(label)],
                "bbox": [round(edge, 2) for edge in (x1, y1, x2 - x1, y2 - y1)],
                "score": round(score, 5),
            }
            for (x1, y1, x2, y2), score, label in zip(edges, scores, labels, strict=True)
        ]
        lines.append(json.dumps(results) + "\n")
    return "".join(lines).encode()


def _interleave(header: Sequence[str], parts: Sequence[Path], file: BinaryIO) -> None:
    """Join the rows of n processes below a header; each process predicted every n-th image."""
    file.write(_csv([header]))
    with ExitStack() as stack:
        texts = [
            stack.enter_context(open(part, newline="", encoding="utf-8", errors="surrogateescape")) for part in parts
        ]
        for rows in itertools.zip_longest(*map(csv.reader, texts)):
            file.write(_csv([row for row in rows if row is not None]))


def _interleave_json(parts: Sequence[Path], file: BinaryIO) -> None:
    """Join the JSON lists of n processes into one list; each process predicted every n-th image."""
    with ExitStack() as stack:
        texts = [stack.enter_context(open(part, "rb")) for part in parts]
        lines = (line for group in itertools.zip_longest(*texts) for line in group if line)
        lists = (line.strip()[1:-1] for line in lines)  # without the brackets of each list
        file.write(b"[")
        for number, results in enumerate(results for results in lists if results):
            file.write(b",\n" * bool(number) + results)
        file.write(b"]\n")
