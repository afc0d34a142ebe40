"""Input and output of `visionattn score`: images from folders or a config's data, progress bar, table and file."""

import contextlib
import csv
import io
import json
import math
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from visionattn.capture import keep_freed_memory
from visionattn.data import Batch, Failure, Preprocess, Sample, collate, find, match_classes, prepare, read_image
from visionattn.errors import BlankMapWarning, DataError, MapWarning, UsageError
from visionattn.evaluation import LEGEND, METRICS, MIN_IMAGES, NOT_MEASURED, FolderMaps, Scores, score
from visionattn.files import printable, write_file
from visionattn.maps import Method
from visionattn.tasks import renumbered

_TITLES = {"iou": "IoU"}
_LINE = 60.0  # seconds between two lines of progress where the output is no terminal
_ANNOUNCED = 10.0  # seconds; scores that are expected to take longer are announced with their time
_MAX_FAILURES = 3  # failures that are printed; the others are only counted


class _Loaded(NamedTuple):
    """A batch and its failures; the batch is None if all its images failed."""

    batch: Batch | None
    failures: list[Failure]


@dataclass
class Images:
    """Batches of images to score. Iterate over them only once.

    Attributes:
        loader: yields batches for `evaluation.score`, or pairs (batch, failures); a batch without images is None.
        count: number of images, including unreadable ones.
        failures: error messages of the images that could not be read; filled while iterating.
        label_numbers: for each class of the data, the number of the model's class; None if they are the same.
    """

    loader: Iterable[Batch | tuple[Batch | None, list[Failure]]]
    count: int
    failures: list[str] = field(default_factory=list)
    label_numbers: list[int] | None = None

    def __iter__(self) -> Iterator[Batch]:
        for loaded in self.loader:
            batch, failures = loaded if isinstance(loaded, tuple) else (loaded, [])
            self.failures += map(str, failures)
            if batch is None:
                continue
            if self.label_numbers is not None and "label" in batch:
                batch["label"] = renumbered(batch["label"], self.label_numbers)
            yield batch


def images_of_files(paths: Sequence[str], preprocess: Preprocess, *, count: int, batch_size: int) -> Images:
    """Read the images at some paths, in batches.

    Args:
        paths: files, folders and patterns; see `data.find`.
        preprocess: the model's preprocessing.
        count: largest number of images; see `evenly`.
        batch_size: images per batch.

    Raises:
        UsageError, DataError: as for `data.find`.
    """
    found = find(paths, out=os.devnull)  # `find` skips the folder `out`; os.devnull makes it skip no folder
    if not found.images:
        place, reason = found.unlisted[0]
        raise DataError(f"{printable(place)} {reason}")
    chosen = _Files([found.images[index] for index in evenly(len(found.images), count)], preprocess)
    return Images(DataLoader(chosen, batch_size, collate_fn=_collate_readable), len(chosen))


def images_of_config(
    config: str, preprocess: Preprocess, class_names: Sequence[str] = (), *, count: int, batch_size: int
) -> Images:
    """Load the test images of a config's data, in batches; the validation images if there is no test split.

    Args:
        config: path of the YAML file.
        preprocess: the model's preprocessing.
        class_names: of the model; labels of data with these classes in another order are changed to the model's order.
        count: largest number of images; see `evenly`.
        batch_size: images per batch.

    Raises:
        UsageError: as for `training.data_from_config`, or the samples are not dicts with an image, or the
            preprocessing of the data differs from the model's.
        DataError: as for `training.data_from_config`, or the split has no images, or the data has other classes than
            the model.
    """
    from visionattn.training import data_from_config

    data = data_from_config(config)
    own = getattr(data, "preprocess", preprocess)
    if own != preprocess:
        raise UsageError(
            f"{config} prepares its images differently from this model ({own}, not {preprocess}); "
            "score the images with --data FOLDER, or pass the config.yaml of the run that trained the model"
        )
    label_numbers = match_classes(class_names, getattr(data, "class_names", ()))
    if label_numbers is not None:
        print("the data has the model's classes in another order; they are matched by name", file=sys.stderr)
    data.prepare_data()
    data.setup("predict")  # loads the test split, or the validation split if there is no test split
    loader = data.predict_dataloader()
    dataset = loader.dataset
    if not len(dataset):
        raise DataError(f"the data of {config} has no images to score")
    first = dataset[0]
    if not isinstance(first, Failure) and not (isinstance(first, dict) and "image" in first):
        raise UsageError(
            f"the samples of {type(data).__name__} are not dicts with the key 'image'; see data.ClassificationData"
        )
    chosen = Subset(dataset, evenly(len(dataset), count))
    return Images(
        DataLoader(chosen, batch_size, num_workers=loader.num_workers, collate_fn=loader.collate_fn),
        len(chosen),
        label_numbers=label_numbers,
    )


@contextlib.contextmanager
def _collect_map_warnings(messages: list[str]) -> Iterator[None]:
    """Append the messages of MapWarnings to `messages`, except for constant heatmaps, which the scores show."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MapWarning)
        yield
    for warning in caught:
        if not issubclass(warning.category, MapWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif not issubclass(warning.category, BlankMapWarning):
            messages.append(str(warning.message))


def evenly(total: int, count: int) -> list[int]:
    """Return at most `count` of the indices 0 … total − 1, equally spaced to cover all classes of a sorted list."""
    return [index * total // min(total, count) for index in range(min(total, count))]


def scorecard(
    model: nn.Module,
    images: Images,
    methods: Mapping[str, Method | FolderMaps] | None,
    *,
    metrics: Sequence[str] | None = None,
    steps: int,
    batch_size: int,
    seed: int,
    out: str | None = None,
    console: Console | None = None,
) -> Scores:
    """Score methods, with a progress bar; print the table and write the figures into a file.

    Args:
        model, methods, metrics, steps, batch_size, seed: see `evaluation.score`.
        images: the images to score.
        out: a .csv with one line per figure, or a .json that also has the figures of every image. Default: no file.
        console: where to print the bar and the table. Default: the terminal.

    Returns:
        The scores of all methods and controls.

    Raises:
        UsageError: as for `evaluation.score`; or `out` has another suffix or lies in a missing folder, or a batch does
            not fit into the memory of the device.
        DataError: as for `evaluation.score`, or `out` cannot be written.
    """
    keep_freed_memory()
    console = console or Console()
    if out is not None and os.path.splitext(out)[1] not in (".csv", ".json"):
        raise UsageError(f"--out must end in .csv or .json, got {printable(out)}")
    if out is not None and not os.path.isdir(os.path.dirname(out) or "."):
        raise UsageError(f"there is no folder {printable(os.path.dirname(out))} to write {printable(out)} into")
    messages: list[str] = []
    columns = TextColumn("  scoring"), BarColumn(20), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn()
    lines = _Lines(console, images.count)

    def advance(done: float) -> None:
        progress.advance(task, done)
        lines.advance(done)

    try:
        with (
            Progress(*columns, console=console, speed_estimate_period=600) as progress,
            _collect_map_warnings(messages),
        ):
            task = progress.add_task("", total=images.count)
            scores = score(
                model,
                images,
                methods,
                metrics=metrics,
                steps=steps,
                batch_size=batch_size,
                seed=seed,
                advance=advance,
                expect=lambda seconds: _print_estimate(console, seconds, images.count),
            )
            # the progress was reported in fractions, whose sum is not exactly the number of images
            progress.update(task, completed=scores.images, total=scores.images)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"a batch of {batch_size} images does not fit into the device's memory; use a smaller batch size"
        ) from error
    finally:
        _print_failures(console, images.failures)
    for name, reason in scores.failed.items():
        console.print(Text(f"  {name} is left out: {reason}", "red"), soft_wrap=True)
    if out is not None:
        write(out, scores)  # before the table, so that an error of the terminal cannot lose the figures
    console.print(table(scores))
    console.print()
    for line in (*scores.verdicts(), *_legend(scores)):
        for part in textwrap.wrap(line, console.width, initial_indent="  ", subsequent_indent="    "):
            console.print(Text(part), soft_wrap=True)
    for line in dict.fromkeys(messages):
        console.print(Text(f"  {line}", "yellow"), soft_wrap=True)
    if out is not None:
        console.print(Text(f"figures: {printable(out)}"), soft_wrap=True)
    return scores


class _Lines:
    """Prints the progress and the remaining time once a minute if the output is no terminal."""

    def __init__(self, console: Console, count: int) -> None:
        self._console, self._count, self._done = console, count, 0.0
        self._started = self._printed = time.monotonic()

    def advance(self, done: float) -> None:
        self._done += done
        now = time.monotonic()
        if self._console.is_terminal or now - self._printed < _LINE:
            return
        self._printed = now
        left = (now - self._started) * (self._count - self._done) / max(self._done, 1e-9)
        line = f"  scoring {self._done:.1f}/{self._count} images, {_duration(left)} left"
        self._console.print(Text(line), soft_wrap=True)


def _print_estimate(console: Console, seconds: Mapping[str, float], count: int) -> None:
    """Print how long the scores will take, if that is more than 10 seconds.

    Args:
        console: where to print.
        seconds: method, or `"controls"` → expected seconds for one image.
        count: number of images.
    """
    total, slowest = count * sum(seconds.values()), max(seconds, key=lambda name: seconds[name])
    if total < _ANNOUNCED:
        return
    line = (
        f"  about {_duration(total)} for {count} images, of which {slowest} takes {_duration(count * seconds[slowest])}"
    )
    console.print(Text(f"{line}; fewer --images take less time"), soft_wrap=True)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def table(scores: Scores) -> Table:
    """Return a table, a row per method and control, a column per metric; 80 characters wide unless names are long."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("", overflow="fold")
    for metric in scores.metrics:
        arrow = "↑" if METRICS[metric] > 0 else "↓"
        table.add_column(f"{_TITLES.get(metric, metric)}\n{arrow}", justify="right", no_wrap=True)
    for name in scores.controls:
        table.add_row(Text(name), *scores.cells(name))
    table.add_section()
    for name in [name for name in scores.values if name not in scores.controls]:
        table.add_row(Text(name), *scores.cells(name))
    return table


def write(path: str, scores: Scores) -> None:
    """Write the figures into a .csv or .json; a failed write leaves an earlier file as it was.

    Args:
        path: ends in .csv or .json.
        scores: the scores of all methods and controls.

    Raises:
        DataError: the file cannot be written.
    """
    rows = [
        {
            "name": name,
            "kind": "method" if name in scores.controls else "control",
            "figure": metric,
            **{bound: None if math.isnan(v) else v for bound, v in scores.estimate(name, metric)._asdict().items()},
            **_outcomes(scores, name, metric),
        }
        for name in (*scores.controls, *(name for name in scores.values if name not in scores.controls))
        for metric in scores.metrics
    ]
    text = io.StringIO(newline="")
    if path.endswith(".csv"):
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    else:
        of_images = {
            name: {m: scores.of_images(name, m).tolist() for m in scores.metrics if scores.measured(name, m)}
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


def _outcomes(scores: Scores, name: str, metric: str) -> dict[str, bool | str | None]:
    """Return the columns that compare a method with its controls, all None for a control or without an interval."""
    found = scores.outcomes(name, metric) if name in scores.controls else {}
    if not any(found.values()):
        return {"beats_controls": None, "ties_with": None, "loses_to": None}
    ties, losses = found["ties with"], found["loses to"]
    return {"beats_controls": not ties + losses, "ties_with": ", ".join(ties), "loses_to": ", ".join(losses)}


class _Files(Dataset[Sample | Failure]):
    """Image files as samples; an unreadable file is a `Failure`."""

    def __init__(self, paths: Sequence[str], preprocess: Preprocess) -> None:
        self.paths = paths
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample | Failure:
        path = self.paths[index]
        try:
            return {**prepare(read_image(path), self.preprocess), "path": path}
        except DataError as error:
            return Failure(path, error)


def _collate_readable(samples: Sequence[Sample | Failure]) -> _Loaded:
    good = [sample for sample in samples if not isinstance(sample, Failure)]
    failures = [sample for sample in samples if isinstance(sample, Failure)]
    return _Loaded(collate(good) if good else None, failures)


def _legend(scores: Scores) -> list[str]:
    accuracy = "" if scores.accuracy is None else f"; the model's accuracy is {scores.accuracy:.3f}"
    if not scores.decided:
        return [
            f"A confidence interval needs at least {MIN_IMAGES} images; got {scores.images}, so no method counts as "
            "better than a control"
        ]
    everything = all(scores.measured(name, metric) for name in scores.controls for metric in scores.metrics)
    unmeasured = [] if everything else [f"– {NOT_MEASURED}"]
    return [
        f"± half of the 95 % interval over {scores.images} images{accuracy}",
        f"{LEGEND}; controls: centre, and random and edges on the method's own grid",
        *unmeasured,
    ]


def _print_failures(console: Console, failures: Sequence[str]) -> None:
    for reason in failures[:_MAX_FAILURES]:
        console.print(Text(f"  {printable(reason)}", "red"), soft_wrap=True)
    if len(failures) > _MAX_FAILURES:
        console.print(Text(f"  and {len(failures) - _MAX_FAILURES} more that cannot be read", "red"))
