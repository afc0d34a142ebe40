"""Overlays of whole folders: find the images, make what is missing, and keep a manifest of it."""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from rich.console import Console

from visionattn._malloc import keep_freed_memory
from visionattn.data.decode import MAX_PIXELS
from visionattn.data.image_files import AnyPath, Found, find, is_video
from visionattn.drawing.rendering import Style
from visionattn.errors import DataError, UsageError
from visionattn.files import printable
from visionattn.overlays.explainer import View
from visionattn.overlays.folder.fingerprint import recipe_of
from visionattn.overlays.folder.image_export import Job, stamp_of
from visionattn.overlays.folder.journal import Journal
from visionattn.overlays.folder.manifest import Manifest, output_names
from visionattn.overlays.folder.pipeline import Entry, OneProcess, Work, run
from visionattn.overlays.folder.progress import Bar, Summary, print_summary
from visionattn.overlays.folder.video import SUFFIX
from visionattn.overlays.outputs import check_kinds, endings

_BATCH_PIXELS = 16 * 224 * 224  # of a batch, where nobody says otherwise


def export(
    inputs: Sequence[AnyPath],
    out: AnyPath,
    views: View | Sequence[View],
    *,
    save: Sequence[str] = ("overlay",),
    compare: bool = False,
    target: int | str | None = None,
    batch_size: int | None = None,
    style: Style | None = None,
    fps: float | None = None,
    bf16: bool = False,
    compile: bool = False,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    console: Console | None = None,
    team: Work | None = None,
) -> Summary:
    """Write overlays of every image, and a line about it into `manifest.jsonl`.

    The outputs mirror the places of the images: `a/x.jpg` goes to `a/x.jpg.overlay.jpg`, at the size of the source. An
    image that cannot be read does not stop the run. A second run with the same models, methods, target, preparation and
    style makes what is missing or has changed; with others, it makes all again. Memory that this process frees stays
    with it from then on, see `_malloc.keep_freed_memory`.

    Args:
        inputs: images, folders, patterns and lists, see `inputs.find`.
        out: folder for the outputs; nothing is written elsewhere.
        views: the model and its method; several are drawn into one sheet.
        save: what to make of each image, see `kinds.KINDS`.
        compare: hold the second of two views against the first.
        target: the output to explain, its number or its class name; every image's highest by default.
        batch_size: images that a model takes at once; by default as many as have the pixels of 16 of 224 × 224.
        style: what the pictures look like.
        fps: frames a second that are taken of a video; all by default.
        compile: compile what is not watched of the models, see `compiled.compiled`; the first batch takes minutes.
        bf16: run the models under autocast to bfloat16.
        max_pixels: larger images fail.
        workers: threads that read and draw; as many as torch takes, at most 8, by default.
        console: where the progress and the summary go; `Console(quiet=True)` for none.
        team: processes that share the work, see `team.gather`; of all but the first the summary is of their own share.

    Raises:
        UsageError: an input does not exist, a method does not fit its model, class names do not fit its outputs, a kind
            does not fit the views, or an output would overwrite a file that no earlier run has written.
        DataError: there is no image, the manifest cannot be written, the model's values are not finite, or a process of
            the team had to stop or was killed, in which case all that the others made is kept.
    """
    views = [views] if isinstance(views, View) else list(views)
    _check(views, save, compare, target, batch_size, max_pixels, workers)
    if fps is not None and not fps > 0:
        raise UsageError(f"fps must be > 0, got {fps}")
    keep_freed_memory()
    views = [view.chosen() for view in views]
    style, team = style or Style(), team or OneProcess()
    console = console or Console(quiet=team.rank > 0)
    folder = os.path.abspath(os.fsdecode(out))
    batch_size = batch_size or _fitting(views)
    workers = workers or min(8, torch.get_num_threads())
    job = Job(
        views=views,
        compared=compare,
        kinds=tuple(dict.fromkeys(save)),
        target=target,
        style=style,
        max_pixels=max_pixels,
        recipe=recipe_of(views, compare=compare, target=target, style=style, bf16=bf16, compile=compile),
        folder=folder,
        fps=fps,
        bf16=bf16,
    )
    with contextlib.ExitStack() as stack:
        for view in views if compile else ():
            stack.enter_context(_compiled(view))
        if team.rank:
            return _help(job, team, batch_size, workers)
        return _lead(job, team, inputs, os.fsdecode(out), batch_size, workers, console)


def _lead(
    job: Job, team: Work, inputs: Sequence[AnyPath], out: str, batch_size: int, workers: int, console: Console
) -> Summary:
    """Find the work, lay it out, take a share of it, and keep the manifest."""
    started = time.perf_counter()
    manifest = Manifest(job.folder)
    try:
        # a manifest is truthful after an error too: what was written by then is noted before it goes on its way
        manifest.take_in()
        found, todo = _plan(job, manifest, inputs)
        team.give([job.told(path) for path in some] for some in _portions(todo, batch_size, team.size))
        summary = Summary(
            out=out,
            noun="overlay" if "overlay" in job.kinds else "image",
            skipped=len(found.images) - len(todo),
            ignored=found.ignored,
            links=found.links,
            images=[image for image in found.images if not is_video(image)],
        )

        def count(entry: Entry) -> None:
            summary.count(entry, os.path.relpath(entry["source"], found.root or None))

        with Bar(console, summary.out, len(todo)) as bar:

            def note(entry: Entry) -> None:
                manifest.add(entry)
                count(entry)

            for path, reason in found.unlisted:
                note(job.failure(path, reason))
            run(job, team, manifest, note, bar.advance, batch_size, workers)
            for sums in team.wait():
                bar.advance(sums)
        for entry in manifest.take_in():
            count(entry)
    finally:
        manifest.close()
    summary.seconds = time.perf_counter() - started
    print_summary(console, summary)
    if team.trouble:
        raise DataError(team.trouble)
    return summary


def _plan(job: Job, manifest: Manifest, inputs: Sequence[AnyPath]) -> tuple[Found, list[str]]:
    """Find the images, name their outputs, and tell which are still to be made."""
    written = {os.path.join(job.folder, *name.split("/")) for name in manifest.owners}
    found = find(inputs, out=job.folder, written=written)
    job.wishes = found.wishes
    job.names = _names(found.images, found.root, manifest, job.kinds, job.style)
    todo = [image for image in found.images if not _is_done(manifest, job, image)]
    job.earlier = {image: _still_good(manifest, job, image) for image in todo if image in manifest.done}
    _refuse_strangers(manifest, job, todo)
    return found, todo


def _help(job: Job, team: Work, batch_size: int, workers: int) -> Summary:
    """Take a share of the work that another process has laid out, and note it in a journal."""
    journal, summary, reason = Journal(job.folder, team.rank), Summary(out=job.folder), ""

    def note(entry: Entry) -> None:
        journal.add(entry)
        summary.count(entry, entry["source"])

    try:
        run(job, team, journal, note, lambda sums: None, batch_size, workers)
    except (UsageError, DataError) as error:
        reason = str(error)  # the first process tells it
    finally:
        journal.close()
    team.finish(reason)
    return summary


def _compiled(view: View) -> contextlib.AbstractContextManager[list[str]]:
    from visionattn.overlays.compiled import compiled

    assert view.method is not None
    like = next(view.model.parameters(), torch.zeros(()))
    example = torch.zeros(2, 3, *view.preprocess.input_size, device=like.device, dtype=like.dtype)
    return compiled(view.model, view.method, example)


def _portions(todo: Sequence[str], batch_size: int, processes: int) -> Iterator[Sequence[str]]:
    """A batch at a time; less where there are few images, so that each process has some."""
    size = max(1, min(batch_size, len(todo) // (4 * processes)))
    for start in range(0, len(todo), size):
        yield todo[start : start + size]


def _check(
    views: Sequence[View],
    save: Sequence[str],
    compare: bool,
    target: int | str | None,
    batch_size: int | None,
    max_pixels: int,
    workers: int | None,
) -> None:
    if min(max_pixels, 1 if batch_size is None else batch_size, 1 if workers is None else workers) < 1:
        raise UsageError(
            f"batch_size, max_pixels and workers must be ≥ 1, got {batch_size}, {max_pixels} and {workers}"
        )
    if compare and len(views) != 2:
        raise UsageError(f"two views can be compared, not {len(views)}")
    names = [view.name for view in views]
    if len(views) != 1 and (not views or len(set(names)) < len(names)):
        raise UsageError(f"each of several views needs a name of its own, got {names}")
    check_kinds(save, looks=len(views), compared=compare)
    for view in views:
        try:
            view.target(target)
        except DataError as error:
            raise UsageError(str(error)) from error


def _fitting(views: Sequence[View]) -> int:
    """How many images make a batch, by the size of the models' inputs."""
    sizes = [getattr(view.preprocess, "input_size", (224, 224)) for view in views]
    return max(1, _BATCH_PIXELS // max(height * width for height, width in sizes))


def _names(
    images: Sequence[str], root: str, manifest: Manifest, save: Sequence[str], style: Style
) -> dict[str, dict[str, str]]:
    """Image → kind → its output."""
    names: dict[str, dict[str, str]] = {image: {} for image in images}
    stills, videos = ([image for image in images if is_video(image) == moving] for moving in (False, True))
    of_videos = {kind: os.path.splitext(ending)[0] for kind, ending in endings(save, SUFFIX).items()}
    of_videos = {kind: f"{stem}{'.npz' if kind == 'array' else SUFFIX}" for kind, stem in of_videos.items()}
    for some, ends in ((stills, endings(save, style.suffix)), (videos, of_videos)):
        for kind, ending in ends.items():
            kept = {image: done.outputs[kind] for image, done in manifest.done.items() if kind in done.outputs}
            for image, name in output_names(some, root, ending, manifest.owners, kept).items():
                names[image][kind] = name
    return names


def _is_done(manifest: Manifest, job: Job, image: str) -> bool:
    return job.names[image].items() <= _still_good(manifest, job, image).items()


def _still_good(manifest: Manifest, job: Job, image: str) -> dict[str, str]:
    """Earlier outputs of an image by the same recipe, kind → name."""
    done = manifest.done.get(image)
    try:
        if done is None or done.recipe != job.recipe_of(image) or done.stamp != stamp_of(image):
            return {}
    except OSError:
        return {}
    there = {kind: os.path.join(manifest.out, *name.split("/")) for kind, name in done.outputs.items()}
    return {kind: done.outputs[kind] for kind, place in there.items() if os.path.isfile(place)}


def _refuse_strangers(manifest: Manifest, job: Job, images: Iterable[str]) -> None:
    for image in images:
        for name in job.names[image].values():
            path = os.path.join(manifest.out, *name.split("/"))
            if manifest.owners.get(name) != image and os.path.lexists(path):
                raise UsageError(
                    f"{printable(path)} exists, and {printable(manifest.path)} does not say that visionattn wrote it; "
                    "choose another folder for overlays, or move the file away"
                )
