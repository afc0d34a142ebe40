"""Overlays of whole folders: read, explain, draw and write at the same time, and keep a manifest of it.

Threads read images and write overlays while the model works on the batch between; OpenCV and Pillow let go of the
interpreter's lock for all that takes long.
"""

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

from rich.console import Console
from torch import nn

from visionattn.data.decode import MAX_PIXELS
from visionattn.data.placement import Preprocess
from visionattn.errors import DataError, UsageError
from visionattn.maps.base import MapWarning
from visionattn.overlay.inputs import AnyPath, find, output_names
from visionattn.overlay.job import Explain, Explained, Job, Read, stamp_of
from visionattn.overlay.manifest import Manifest
from visionattn.overlay.recipe import recipe_of
from visionattn.overlay.render import Style
from visionattn.overlay.report import Bar, Summary, print_summary
from visionattn.overlay.text import printable


def export(
    inputs: Sequence[AnyPath],
    out: AnyPath,
    *,
    model: nn.Module,
    preprocess: Preprocess,
    method: Explain | None = None,
    target: int | None = None,
    batch_size: int = 16,
    class_names: Sequence[str] = (),
    model_name: str = "",
    style: Style | None = None,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    console: Console | None = None,
) -> Summary:
    """Write an overlay of every image, and a line about it into `manifest.jsonl`.

    The outputs mirror the places of the images: `a/x.jpg` goes to `a/x.jpg.overlay.jpg`, at the size of the source. An
    image that cannot be read does not stop the run. A second run with the same model, method, target, preparation and
    style makes what is missing or has changed; with others, it makes all again.

    Args:
        inputs: images, and folders of images, which are searched.
        out: folder for the overlays; nothing is written elsewhere.
        model: any vision model, on any device; images follow it there.
        preprocess: brings a picture to the model's input.
        method: how attention becomes a heatmap; what fits the model by default.
        target: the output to explain; every image's highest by default.
        batch_size: images that the model takes at once.
        class_names: of the model's outputs, for the manifest.
        model_name: for the manifest; the class of the model by default.
        style: what the overlays look like.
        max_pixels: larger images fail.
        workers: threads that read and write; as many as there are cores, at most 4, by default.
        console: where the progress and the summary go; `Console(quiet=True)` for none.

    Raises:
        UsageError: an input does not exist, the method does not fit the model, `class_names` does not fit its outputs,
            or an output would overwrite a file that no earlier run has written.
        DataError: there is no image, the manifest cannot be written, or the model's values are not finite.
    """
    if batch_size < 1 or max_pixels < 1 or (workers is not None and workers < 1):
        raise UsageError(
            f"batch_size, max_pixels and workers must be ≥ 1, got {batch_size}, {max_pixels} and {workers}"
        )
    style, console = style or Style(), console or Console()
    started = time.perf_counter()
    folder = os.path.abspath(os.fsdecode(out))
    manifest = Manifest(folder)
    found = find(inputs, out=folder, written={os.path.join(folder, *name.split("/")) for name in manifest.owners})
    if method is None:
        from visionattn.maps.choose import default_method

        method = default_method(model)
    recipe = recipe_of(model, preprocess, method, target, style, class_names)
    kept = {image: done.output for image, done in manifest.done.items()}
    names = output_names(found.images, found.root, f".overlay{style.suffix}", manifest.owners, kept)
    todo = [image for image in found.images if not _is_done(manifest, image, names[image], recipe)]
    _refuse_strangers(manifest, {image: names[image] for image in todo})

    summary = Summary(
        out=os.fsdecode(out), skipped=len(found.images) - len(todo), ignored=found.ignored, links=found.links
    )
    job = Job(
        model=model,
        preprocess=preprocess,
        method=method,
        target=target,
        class_names=tuple(class_names),
        model_name=model_name or type(model).__name__,
        style=style,
        max_pixels=max_pixels,
        recipe=recipe,
        folder=folder,
        names=names,
    )
    try:
        # a manifest is truthful after an error too: what was written by then is noted before it goes on its way
        with warnings.catch_warnings(), Bar(console, summary.out, len(todo)) as bar:
            warnings.simplefilter("ignore", MapWarning)  # a constant heatmap is told by the manifest and the summary

            def note(entry: dict[str, Any]) -> None:
                manifest.add(entry)
                summary.count(entry, os.path.relpath(entry["source"], found.root or None))
                bar.advance(summary)

            for path, reason in found.unlisted:
                note(job.failure(path, reason))
            _run(job, todo, manifest, note, batch_size, workers or min(4, os.cpu_count() or 1))
    finally:
        manifest.close()
    summary.seconds = time.perf_counter() - started
    print_summary(console, summary)
    return summary


def _run(
    job: Job,
    todo: Sequence[str],
    manifest: Manifest,
    note: Callable[[dict[str, Any]], None],
    batch_size: int,
    workers: int,
) -> None:
    """Read ahead by two batches, and write behind by two."""
    written: deque[Future[dict[str, Any]] | dict[str, Any]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="overlay")
    first = True
    try:
        for batch in _batches(_read_ahead(pool, job, todo, 2 * batch_size), batch_size):
            good = [image for image in batch if isinstance(image, Read)]
            results = iter(job.explain(good) if good else [])
            entries = [(image, next(results) if isinstance(image, Read) else image) for image in batch]
            failed = [
                result["reason"] for image, result in entries if isinstance(image, Read) and isinstance(result, dict)
            ]
            if first and failed and len(failed) == len(good):
                raise DataError(failed[0])  # not these images: the model
            first = first and not good
            manifest.promise([(job.names[image.path], image.path) for image in good], job.recipe)
            for image, result in entries:
                if isinstance(image, Read) and isinstance(result, Explained):
                    written.append(pool.submit(job.write, image, result))
                elif isinstance(result, dict):
                    written.append(result)
                    if isinstance(image, Read):
                        job.let_go(image)
            while len(written) > 2 * batch_size:
                note(_result(written.popleft()))
        while written:
            note(_result(written.popleft()))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for left in written:  # after an error or Ctrl-C: what threads had begun is finished and noted
            try:
                note(_result(left))
            except (CancelledError, DataError):
                continue


def _read_ahead(
    pool: ThreadPoolExecutor, job: Job, paths: Sequence[str], count: int
) -> Iterator[Read | dict[str, Any]]:
    waiting: deque[Future[Read | dict[str, Any]]] = deque()
    for path in paths:
        waiting.append(pool.submit(job.read, path))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _batches(read: Iterator[Read | dict[str, Any]], batch_size: int) -> Iterator[list[Read | dict[str, Any]]]:
    """Lists with `batch_size` readable images each, and the failures between."""
    batch: list[Read | dict[str, Any]] = []
    good = 0
    for image in read:
        batch.append(image)
        good += isinstance(image, Read)
        if good == batch_size or len(batch) >= 4 * batch_size:
            yield batch
            batch, good = [], 0
    if batch:
        yield batch


def _result(written: "Future[dict[str, Any]] | dict[str, Any]") -> dict[str, Any]:
    return written.result() if isinstance(written, Future) else written


def _is_done(manifest: Manifest, image: str, name: str, recipe: str) -> bool:
    done = manifest.done.get(image)
    if done is None or done.recipe != recipe or done.output != name:
        return False
    try:
        return done.stamp == stamp_of(image) and os.path.isfile(os.path.join(manifest.out, *name.split("/")))
    except OSError:
        return False


def _refuse_strangers(manifest: Manifest, names: dict[str, str]) -> None:
    for image, name in names.items():
        path = os.path.join(manifest.out, *name.split("/"))
        if manifest.owners.get(name) != image and os.path.lexists(path):
            raise UsageError(
                f"{printable(path)} exists, and {printable(manifest.path)} does not say that visionattn wrote it; "
                "choose another folder for overlays, or move the file away"
            )
