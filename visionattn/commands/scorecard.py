"""What `visionattn score` reads and tells: images of a folder or of a config's data, a bar, a table, a file."""

import contextlib
import csv
import io
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from visionattn._malloc import keep_freed_memory
from visionattn.data.decode import read_image
from visionattn.data.image_files import find
from visionattn.data.loading.workers import Failure
from visionattn.data.placement import Preprocess
from visionattn.data.samples import collate, prepare
from visionattn.errors import DataError, MapWarning, UsageError
from visionattn.evaluation.controls import FIGURES
from visionattn.evaluation.scoring import FEWEST, Scores, score
from visionattn.files import printable, write_file
from visionattn.maps.method import Method

_WON, _LOST = "✓", "✗"
_TITLES = {"iou": "IoU"}
_LEAST = 3  # failures that are told one by one


@dataclass
class Images:
    """Images to score, in batches; iterate once.

    Attributes:
        loader: gives dicts, as `score` takes them.
        count: of all images.
        failures: why some could not be read; filled on the way.
    """

    loader: DataLoader[Any]
    count: int
    failures: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            self.failures += map(str, batch.pop("failures", ()))
            if "image" in batch:
                yield batch


def images_of_files(paths: Sequence[str], preprocess: Preprocess, *, count: int, batch_size: int) -> Images:
    """At most `count` images among files and folders, taken evenly.

    Raises:
        UsageError, DataError: as `overlay.inputs.find`.
    """
    found = find(paths, out=os.devnull)  # nothing is written, so no folder is left out
    if not found.images:
        place, reason = found.unlisted[0]
        raise DataError(f"{printable(place)} {reason}")
    chosen = _Files([found.images[index] for index in evenly(len(found.images), count)], preprocess)
    return Images(DataLoader(chosen, batch_size, collate_fn=_collate_readable), len(chosen))


def images_of_config(config: str, preprocess: Preprocess, *, count: int, batch_size: int) -> Images:
    """At most `count` test images (validation images where there are no others) of a config's data, taken evenly.

    Raises:
        UsageError, DataError: as `training.data_of`; or its samples are no dicts with an image, or images are not
            prepared as the model's `preprocess` does.
    """
    from visionattn.training.data_of import data_of

    data = data_of(config)
    theirs = getattr(data, "preprocess", preprocess)
    if theirs != preprocess:
        raise UsageError(
            f"{config} prepares its images otherwise than this model needs them ({theirs}, and not {preprocess}); "
            "score the images themselves, --data FOLDER, or take the config.yaml of the model's own run"
        )
    data.prepare_data()
    data.setup("predict")  # by which our data modules mean test, else val
    loader = data.predict_dataloader()
    dataset = loader.dataset
    if not len(dataset):
        raise DataError(f"the data of {config} has no images to score")
    first = dataset[0]
    if not isinstance(first, Failure) and not (isinstance(first, dict) and "image" in first):
        raise UsageError(
            f"the samples of {type(data).__name__} are no dicts with an image; see data.ClassificationData"
        )
    chosen = Subset(dataset, evenly(len(dataset), count))
    return Images(
        DataLoader(chosen, batch_size, num_workers=loader.num_workers, collate_fn=loader.collate_fn), len(chosen)
    )


@contextlib.contextmanager
def _told(doubts: list[str]) -> Iterator[None]:
    """Gather what methods warn of, but for heatmaps that show nothing, which score as such."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MapWarning)
        yield
    for warning in caught:
        if not issubclass(warning.category, MapWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif "show nothing" not in str(warning.message):
            doubts.append(str(warning.message))


def evenly(total: int, count: int) -> list[int]:
    """At most `count` of the numbers below `total`, at equal distances, so that no class comes before others."""
    return [index * total // min(total, count) for index in range(min(total, count))]


def scorecard(
    model: nn.Module,
    images: Images,
    methods: Mapping[str, Method] | None,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    out: str | None = None,
    console: Console | None = None,
) -> Scores:
    """Score, show a bar meanwhile and the table at the end, and write the figures into a file.

    Args:
        model, methods, steps, batch_size, seed: as `maps.score` takes them.
        images: what to score.
        out: a .csv with a line a figure, or a .json that has the figures of every image too.
        console: where the bar and the table go.

    Raises:
        UsageError, DataError: as `maps.score`; or `out` has another ending, no folder, or cannot be written.
    """
    keep_freed_memory()
    console = console or Console()
    if out is not None and os.path.splitext(out)[1] not in (".csv", ".json"):
        raise UsageError(f"--out must end in .csv or .json, got {printable(out)}")
    if out is not None and not os.path.isdir(os.path.dirname(out) or "."):
        raise UsageError(f"there is no folder {printable(os.path.dirname(out))} to write {printable(out)} into")
    doubts: list[str] = []
    columns = TextColumn("  scoring"), BarColumn(20), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn()
    try:
        with Progress(*columns, console=console) as progress, _told(doubts):
            task = progress.add_task("", total=images.count)
            scores = score(
                model,
                images,
                methods,
                steps=steps,
                batch_size=batch_size,
                seed=seed,
                advance=lambda done: progress.advance(task, done),
            )
            progress.update(task, completed=scores.images, total=scores.images)  # fractions do not add up exactly
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"{batch_size} images at once do not fit the device's memory; take a smaller batch size"
        ) from error
    finally:
        _print_failures(console, images.failures)
    for name, reason in scores.failed.items():
        console.print(Text(f"  {name} is left out: {reason}", "red"), soft_wrap=True)
    if out is not None:
        write(out, scores)  # first: figures that took hours do not depend on a terminal
    console.print(table(scores))
    for line in _legend(scores):
        console.print(Text(line), soft_wrap=True)
    for line in dict.fromkeys(doubts):
        console.print(Text(f"  {line}", "yellow"), soft_wrap=True)
    if out is not None:
        console.print(Text(f"figures: {printable(out)}"), soft_wrap=True)
    return scores


def table(scores: Scores) -> Table:
    """Methods and controls by rows, figures by columns; 80 letters wide unless names are long."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("", overflow="fold")
    for figure in scores.figures:
        arrow = "↑" if FIGURES[figure] > 0 else "↓"
        table.add_column(f"{_TITLES.get(figure, figure)}\n{arrow}", justify="right", no_wrap=True)
    for name in scores.controls:
        lost = scores.unbeaten(name) if scores.decided else []
        mark = (_LOST if lost else _WON) if scores.decided else " "
        cells = [str(scores.estimate(name, figure)) + (_LOST if figure in lost else " ") for figure in scores.figures]
        table.add_row(Text(f"{mark} {name}"), *cells)
    table.add_section()
    for name in [name for name in scores.values if name not in scores.controls]:
        table.add_row(Text(f"  {name}"), *(f"{scores.estimate(name, figure)} " for figure in scores.figures))
    return table


def write(path: str, scores: Scores) -> None:
    """Write the figures of a .csv or .json so that no half of it ever stands under its name.

    Raises:
        DataError: the file cannot be written.
    """
    rows = [
        {
            "name": row["name"],
            "kind": row["kind"],
            "figure": figure,
            **{bound: None if math.isnan(value) else value for bound, value in row[figure]._asdict().items()},
            "beats_controls": figure not in row["unbeaten"] if row["kind"] == "method" and scores.decided else None,
        }
        for row in scores.table()
        for figure in scores.figures
    ]
    text = io.StringIO(newline="")
    if path.endswith(".csv"):
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    else:
        of_images = {
            name: {figure: scores.of_images(name, figure).tolist() for figure in scores.figures}
            for name in scores.values
        }
        json.dump(
            {
                "images": scores.images,
                "accuracy": scores.accuracy,
                "controls": scores.controls,
                "failed": scores.failed,
                "figures": rows,
                "paths": [printable(path) for path in scores.paths],
                "of_images": of_images,
            },
            text,
            indent=1,
        )
    write_file(path, text.getvalue().encode("utf-8", "surrogateescape"))


class _Files(Dataset[dict[str, Any]]):
    """Image files as samples; of one that cannot be read, why."""

    def __init__(self, paths: Sequence[str], preprocess: Preprocess) -> None:
        self.paths = paths
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        try:
            return {**prepare(read_image(path), self.preprocess), "path": path}
        except DataError as error:
            return {"failure": str(error)}


def _collate_readable(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [sample for sample in samples if "image" in sample]
    failures = [sample["failure"] for sample in samples if "failure" in sample]
    return {**(collate(good) if good else {}), "failures": failures}


def _legend(scores: Scores) -> list[str]:
    right = "" if scores.accuracy is None else f"; the model is right on {scores.accuracy:.3f}"
    if not scores.decided:
        return [
            f"  {scores.images} of {FEWEST} images that an interval takes, so nothing can be said to beat a control"
        ]
    return [
        f"  ± half of the 95 % interval over {scores.images} images{right}",
        f"  {_LOST} does not beat centre, and random and edges on the method's grid; {_WON} beats all",
    ]


def _print_failures(console: Console, failures: Sequence[str]) -> None:
    for reason in failures[:_LEAST]:
        console.print(Text(f"  {printable(reason)}", "red"), soft_wrap=True)
    if len(failures) > _LEAST:
        console.print(Text(f"  and {len(failures) - _LEAST} more that cannot be read", "red"))
