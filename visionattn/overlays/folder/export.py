"""Export overlays of whole folders: find the images, make the missing outputs, and record them in a manifest."""

import os
import time
from collections.abc import Iterable, Sequence

import torch
from rich.console import Console
from rich.text import Text

from visionattn.capture import keep_freed_memory
from visionattn.data import MAX_PIXELS, FoundImages, find, is_video
from visionattn.drawing import Style
from visionattn.errors import DataError, UsageError
from visionattn.files import AnyPath, FolderLock, local_path, printable
from visionattn.maps import Similarity
from visionattn.overlays.explainer import Explainer, fingerprint_of
from visionattn.overlays.folder.image_export import ExportJob, stamp_of
from visionattn.overlays.folder.journal import Journal
from visionattn.overlays.folder.manifest import Entry, Manifest, output_names
from visionattn.overlays.folder.pipeline import OneProcess, Work, run
from visionattn.overlays.folder.progress import ProgressBar, Summary, print_summary
from visionattn.overlays.folder.video import SUFFIX
from visionattn.overlays.outputs import check_outputs, endings
from visionattn.overlays.targets import targets_by_name

_BATCH_PIXELS = 16 * 224 * 224  # pixels of a batch, unless batch_size is set


def export(
    inputs: Sequence[AnyPath],
    out: AnyPath,
    explainers: Explainer | Sequence[Explainer],
    *,
    save: Sequence[str] = ("overlay",),
    compare: bool = False,
    target: int | str | None = None,
    batch_size: int | None = None,
    style: Style | None = None,
    fps: float | None = None,
    bf16: bool = False,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    console: Console | None = None,
    processes: Work | None = None,
) -> Summary:
    """Write overlays of every image in some folders, and a line about each image into `manifest.jsonl`.

    The outputs mirror the images: `a/x.jpg` goes to `a/x.jpg.overlay.jpg`, at the size of the source. An image that
    cannot be read does not stop the run. A second run with the same models, methods, preprocessing, target, style,
    `compare` and `bf16` makes only outputs that are missing or have a changed source. A run with other
    settings makes all outputs again. From this call on, the process reuses freed memory instead of returning it to the
    operating system, see `capture.keep_freed_memory`.

    Args:
        inputs: images, videos, folders, patterns and lists, see `data.find`.
        out: folder for the outputs; nothing is written elsewhere.
        explainers: an explainer, or several, whose overlays are drawn into one sheet.
        save: kinds of output to make, names in `OUTPUTS`.
        compare: whether to compare the second of two explainers with the first.
        target: the output to explain: its index or class name, or another form of `TARGETS`. Default: the
            highest output of each image.
        batch_size: images per forward pass. Default: 16 at 224 × 224; at other sizes, so many that a batch has
            about the same number of pixels.
        style: style of the pictures. Default: `Style()`.
        fps: frames per second to sample from videos. Default: every frame.
        bf16: whether models run under autocast to bfloat16.
        max_pixels: images with more pixels fail.
        workers: threads that read and draw. Default: torch's number of threads, at most 8.
        console: shows the progress and the summary; `Console(quiet=True)` shows nothing. Default: the terminal.
        processes: the processes that share the work, see `processes.gather`. Default: this process alone.

    Returns:
        Counts and failures. In the first process they cover all images; in another process, the images that it
        exported.

    Raises:
        UsageError: an input does not exist, an input or `out` is an address such as s3://bucket, a method does not fit
            its model, the class names do not fit its outputs, a kind does not fit the explainers, an output would
            overwrite a file that no earlier run has written, or another export is writing into `out`.
        DataError: there is no image, the manifest cannot be written, the model's values are not finite, or another
            process has met an error. All outputs that were finished by then are kept.
    """
    explainers = [explainers] if isinstance(explainers, Explainer) else list(explainers)
    _check(explainers, save, compare, batch_size, max_pixels, workers)
    if fps is not None and not fps > 0:
        raise UsageError(f"fps must be > 0, got {fps}")
    keep_freed_memory()
    explainers = [explainer.chosen() for explainer in explainers]
    try:
        targets = [None] * len(explainers) if target is None else targets_by_name(explainers, target)
    except DataError as error:
        raise UsageError(str(error)) from error
    described: object = target
    if isinstance(target, str) and any(isinstance(each, Similarity) for each in targets):
        described = [target, stamp_of(target.partition(":")[2])]  # the reference image may change
    style, processes = style or Style(), processes or OneProcess()
    console = console or Console(quiet=processes.rank > 0)
    folder = os.path.abspath(local_path(out))
    batch_size = batch_size or _default_batch_size(explainers)
    workers = workers or min(8, torch.get_num_threads())
    job = ExportJob(
        explainers=explainers,
        compared=compare,
        kinds=tuple(dict.fromkeys(save)),
        targets=targets,
        style=style,
        max_pixels=max_pixels,
        fingerprint=fingerprint_of(explainers, compare=compare, target=described, style=style, bf16=bf16),
        folder=folder,
        fps=fps,
        bf16=bf16,
    )
    if processes.rank:
        return _help(job, processes, batch_size, workers)
    with FolderLock(folder):  # held for all processes of this export
        return _lead(job, processes, inputs, os.fsdecode(out), batch_size, workers, console)


def _lead(
    job: ExportJob,
    processes: Work,
    inputs: Sequence[AnyPath],
    out: str,
    batch_size: int,
    workers: int,
    console: Console,
) -> Summary:
    """Run the first process: find the images, divide them, export some of them, and write the manifest."""
    started = time.perf_counter()
    manifest = Manifest(job.folder)
    try:
        # `run` notes every written output even if it raises; then `finally` closes the manifest
        manifest.take_in()
        found, todo = _plan(job, manifest, inputs)
        _lay_out(job, processes, todo, batch_size)
        summary = Summary(
            out=out,
            noun="overlay" if "overlay" in job.kinds else "image",
            skipped=len(found.images) - len(todo),
            ignored=found.ignored,
            links=found.links,
            images=[image for image in found.images if not is_video(image)],
        )

        counted: set[str] = set()

        def count(entry: Entry) -> None:
            summary.count(entry, os.path.relpath(entry.source, found.root or None))
            if processes.size > 1:
                counted.add(entry.source)

        with ProgressBar(console, summary.out, len(todo)) as bar:

            def note(entry: Entry) -> None:
                manifest.add(entry)
                count(entry)

            for path, reason in found.unlisted:
                note(job.failure(path, reason))
            run(job, processes, manifest, note, bar.advance, summary.warn, batch_size, workers)
            for sums in processes.wait():
                bar.advance(sums)
            for entry in manifest.take_in():
                count(entry)
            if processes.lost and not processes.trouble:
                _lay_out(job, processes, [path for path in todo if path not in counted], batch_size)
                run(job, processes, manifest, note, bar.advance, summary.warn, batch_size, workers)
    finally:
        manifest.close()
    summary.seconds = time.perf_counter() - started
    print_summary(console, summary)
    for reason in processes.lost:
        console.print(
            Text(f"  {reason}; the first process exported the images of the lost process", "yellow"), soft_wrap=True
        )
    if processes.trouble:
        raise DataError(processes.trouble)
    return summary


def _plan(job: ExportJob, manifest: Manifest, inputs: Sequence[AnyPath]) -> tuple[FoundImages, list[str]]:
    """Find the images and name their outputs; return the found images, and the paths still to export."""
    written = {os.path.join(job.folder, *name.split("/")) for name in manifest.owners}
    found = find(inputs, out=job.folder, written=written)
    job.requests = found.requests
    job.names = _names(found.images, found.root, manifest, job.kinds, job.style)
    todo = [image for image in found.images if not _is_done(manifest, job, image)]
    job.earlier = {image: _still_good(manifest, job, image) for image in todo if image in manifest.done}
    _refuse_foreign_files(manifest, job, todo)
    return found, todo


def _help(job: ExportJob, processes: Work, batch_size: int, workers: int) -> Summary:
    """Run a process other than the first: export some of the images and write a journal."""
    journal, summary, reason = Journal(job.folder, processes.rank), Summary(out=job.folder), ""

    def note(entry: Entry) -> None:
        journal.add(entry)
        summary.count(entry, entry.source)

    try:
        run(job, processes, journal, note, lambda sums: None, summary.warn, batch_size, workers)
    except (UsageError, DataError) as error:
        reason = str(error)  # the first process raises this error
    finally:
        journal.close()
    processes.finish(reason)
    return summary


def _lay_out(job: ExportJob, processes: Work, todo: Sequence[str], batch_size: int) -> None:
    """Divide the images into portions of a batch. With few images, portions are smaller: four for each process."""
    size = max(1, min(batch_size, len(todo) // (4 * processes.size)))
    portions = (todo[start : start + size] for start in range(0, len(todo), size))
    processes.lay_out([job.task(path) for path in portion] for portion in portions)


def _check(
    explainers: Sequence[Explainer],
    save: Sequence[str],
    compare: bool,
    batch_size: int | None,
    max_pixels: int,
    workers: int | None,
) -> None:
    if min(max_pixels, 1 if batch_size is None else batch_size, 1 if workers is None else workers) < 1:
        raise UsageError(
            f"batch_size, max_pixels and workers must be ≥ 1, got {batch_size}, {max_pixels} and {workers}"
        )
    if compare and len(explainers) != 2:
        raise UsageError(f"compare needs two explainers, got {len(explainers)}")
    if not explainers:
        raise UsageError("there is no explainer; pass at least one")
    names = [explainer.name for explainer in explainers]
    if len(set(names)) < len(names):
        raise UsageError(f"each of several explainers needs a name of its own, got {names}")
    check_outputs(save, explanations=len(explainers), compared=compare)


def _default_batch_size(explainers: Sequence[Explainer]) -> int:
    """Return the number of images, at least 1, with `_BATCH_PIXELS` pixels in the model with the largest input."""
    sizes = [explainer.preprocess.input_size for explainer in explainers]
    return max(1, _BATCH_PIXELS // max(height * width for height, width in sizes))


def _names(
    images: Sequence[str], root: str, manifest: Manifest, save: Sequence[str], style: Style
) -> dict[str, dict[str, str]]:
    """Name every output: image → kind → path below the folder."""
    names: dict[str, dict[str, str]] = {image: {} for image in images}
    stills, videos = ([image for image in images if is_video(image) == moving] for moving in (False, True))
    of_videos = {kind: os.path.splitext(ending)[0] for kind, ending in endings(save, SUFFIX).items()}
    of_videos = {kind: f"{stem}{'.npz' if kind == 'array' else SUFFIX}" for kind, stem in of_videos.items()}
    for group, ends in ((stills, endings(save, style.suffix)), (videos, of_videos)):
        for kind, ending in ends.items():
            kept = {image: done.outputs[kind] for image, done in manifest.done.items() if kind in done.outputs}
            for image, name in output_names(group, root, ending, manifest.owners, kept).items():
                names[image][kind] = name
    return names


def _is_done(manifest: Manifest, job: ExportJob, image: str) -> bool:
    return job.names[image].items() <= _still_good(manifest, job, image).items()


def _still_good(manifest: Manifest, job: ExportJob, image: str) -> dict[str, str]:
    """Return the outputs of an image that exist and have the same fingerprint and source: kind → output."""
    done = manifest.done.get(image)
    try:
        if done is None or done.fingerprint != job.fingerprint_of(image) or done.stamp != stamp_of(image):
            return {}
    except OSError:
        return {}
    paths = {kind: os.path.join(manifest.out, *name.split("/")) for kind, name in done.outputs.items()}
    return {kind: done.outputs[kind] for kind, path in paths.items() if os.path.isfile(path)}


def _refuse_foreign_files(manifest: Manifest, job: ExportJob, images: Iterable[str]) -> None:
    for image in images:
        for name in job.names[image].values():
            path = os.path.join(manifest.out, *name.split("/"))
            if manifest.owners.get(name) != image and os.path.lexists(path):
                raise UsageError(
                    f"{printable(path)} exists, and {printable(manifest.path)} does not list it as an output of "
                    "visionattn; choose another folder for overlays, or move the file away"
                )
