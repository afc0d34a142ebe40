"""`manifest.jsonl`, the truth about a folder of overlays: one line an image, what was made of it or why nothing was.

A line is a JSON object. Of every image:
    source, bytes, modified: absolute path, size and time of change (in ns) of the file.
    recipe: a hash of all that decides what the outputs look like; same recipe and same file, same outputs.
    status: "done" or "failed".
    earlier: paths of outputs that an earlier run made of it and this one did not replace; where there are any.
Of one that failed: reason. Of one that is done:
    outputs: kind → path below the folder; those of an earlier run with the same recipe too.
    width, height: of the source, upright.
    model, method, layer, target: what was explained, and how.
    prediction, class, probability: the highest output; null where the model has no classes.
    peak: [x, y] of the hottest place, in pixels of the source; null where the heatmap is constant.
    found: of a detector: [x0, y0, x1, y1, class and score] of each box that it is sure of.
    seconds: its share of the model's and the method's time.
    looks: where several methods or models look: name, model, method and so on of each; above stands the first's.
    difference: of two models: mean, of |second − first|, and peak, where they differ most.
    frames, fps: of a video, and `at`, the seconds from its start of each frame; prediction and peak are lists.

Bytes of file names that are no text stand as lone surrogates (`"\\udcff"`), which `os.fsencode` turns back.
"""

import contextlib
import glob
import hashlib
import io
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from visionattn.errors import DataError, UsageError
from visionattn.files import printable, write_file

NAME = "manifest.jsonl"
_PROMISED = ".manifest.promised"
JOURNAL = ".manifest.journal."


@dataclass(frozen=True)
class Done:
    """What a manifest says of an image that was exported."""

    outputs: dict[str, str]
    recipe: str
    stamp: tuple[int, int]


class Manifest:
    """The manifest of a folder, read at once and written line by line.

    Outputs are promised before they are written. So those of a run that was killed before it could note them are known
    for ours, and nothing else is ever overwritten.

    Attributes:
        done: image → what was made of it.
        owners: output → its image, failed ones too.

    Args:
        out: the folder; it is made with the first line.

    Raises:
        UsageError: `out` is no folder, or its manifest.jsonl is none of ours.
        DataError: it cannot be read.
    """

    def __init__(self, out: str) -> None:
        self.out = out
        self.path = os.path.join(out, NAME)
        self.done: dict[str, Done] = {}
        self.owners: dict[str, str] = {}
        self._promised = os.path.join(out, _PROMISED)
        self._outputs: dict[str, list[str]] = {}  # the reverse of `owners`
        self._open: dict[str, tuple[str, str]] = {}  # promised and not noted yet: output → image, recipe
        self._failures: dict[str, list[Any]] = {}
        self._stale = 0
        self._end = self._promises_end = 0  # of the last whole line
        self._gap = b""
        self._lines: io.FileIO | None = None
        self._promises: io.FileIO | None = None
        if os.path.lexists(out) and not os.path.isdir(out):
            raise UsageError(f"{printable(out)} is a file; name a folder for the overlays")
        try:
            self._read()
            for promise in _lines(self._promised):
                if promise.endswith(b"\n"):  # else half a line, of a run that was killed
                    self._recall(*json.loads(promise))
                    self._promises_end += len(promise)
        except OSError as error:
            raise DataError(f"{printable(error.filename or out)} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, LookupError) as error:
            raise UsageError(
                f"{printable(self.path)} was not written by visionattn ({error}); choose another folder for overlays"
            ) from error

    def promise(self, outputs: Iterable[tuple[str, str]], recipe: str) -> None:
        """Note (output, image) pairs that are about to be written, and by which recipe."""
        outputs = list(outputs)
        if not outputs:
            return
        with self._writing():
            if self._promises is None:
                os.makedirs(self.out, exist_ok=True)
                self._promises = open(self._promised, "ab", buffering=0)  # noqa: SIM115  # closed in `close`
                self._promises.truncate(self._promises_end)
            append(self._promises, b"".join(encode([*pair, recipe]) for pair in outputs))
        for output, image in outputs:
            self._promise(output, image, recipe)

    def secure(self) -> None:
        """Wait until the promises are on the disk, so that a power cut leaves no output that nobody knows of."""
        if self._promises is not None:
            with self._writing():
                os.fsync(self._promises.fileno())

    def add(self, entry: dict[str, Any]) -> None:
        """Write the line of one image; the same failure as before is not written again.

        Raises:
            DataError: it cannot be written.
        """
        source = entry["source"]
        earlier = [name for name in self._outputs.get(source, []) if name not in entry.get("outputs", {}).values()]
        earlier = [name for name in earlier if os.path.lexists(os.path.join(self.out, name))]
        if earlier:
            entry = {**entry, "earlier": earlier}
        if entry["status"] == "failed" and self._failures.get(source) == _failure(entry):
            return
        with self._writing():
            if self._lines is None:
                os.makedirs(self.out, exist_ok=True)
                self._lines = open(self.path, "ab", buffering=0)  # noqa: SIM115  # closed in `close`
                self._lines.truncate(self._end)
                append(self._lines, self._gap)
            append(self._lines, encode(entry))
        self._note(entry)

    def take_in(self) -> list[dict[str, Any]]:
        """Add what other processes have noted in journals, those of a run that was killed too, and remove those.

        Returns:
            The entries, in no particular order.
        """
        entries: list[dict[str, Any]] = []
        for path in _journals(self.out):
            promises: dict[str, tuple[str, str]] = {}
            try:
                noted = [json.loads(line) for line in _lines(path) if line.endswith(b"\n")]  # else it was cut by a kill
            except (OSError, ValueError) as error:
                raise DataError(f"{printable(path)} cannot be read: {error}; remove it to go on without it") from error
            for value in noted:
                if isinstance(value, list):
                    output, image, recipe = value
                    promises[output] = image, recipe
                else:
                    entries.append(value)
                    for output in value.get("outputs", {}).values():
                        promises.pop(output, None)
            for output, (image, recipe) in promises.items():
                self.promise([(output, image)], recipe)
                self._recall(output, image, recipe)
        for entry in entries:
            self.add(entry)
        for path in _journals(self.out):
            with self._writing():
                os.unlink(path)
        return entries

    def close(self) -> None:
        """Keep the last line of every image, and only those promises that were kept and could not be noted."""
        if self._lines is not None:
            self._lines.close()
        if self._promises is not None:
            self._promises.close()
        if self._lines is None and self._promises is None:
            return
        with self._writing():
            if self._stale:
                self._compact()
            left = [name for name in self._open if os.path.lexists(os.path.join(self.out, name))]
            if left:
                write_file(self._promised, b"".join(encode([name, *self._open[name]]) for name in left))
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._promised)

    def _read(self) -> None:
        lines = _lines(self.path)
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict) or not isinstance(entry.get("source"), str) or "status" not in entry:
                    raise ValueError(f"line {number + 1} names no source and status")
            except ValueError:
                cut_short = number == len(lines) - 1 and not line.endswith(b"\n")
                if cut_short and (number or os.path.exists(self._promised)):
                    return  # half a line, of a run that was killed
                raise
            self._note(entry)
            self._end += len(line)
            self._gap = b"" if line.endswith(b"\n") else b"\n"

    def _note(self, entry: dict[str, Any]) -> None:
        source = entry["source"]
        self._stale += source in self.done or source in self._failures
        self._failures.pop(source, None)
        self.done.pop(source, None)
        if entry["status"] == "done":
            self.done[source] = Done(dict(entry["outputs"]), entry["recipe"], (entry["bytes"], entry["modified"]))
            for output in entry["outputs"].values():
                self._open.pop(output, None)
                self._own(output, source)
        else:
            self._failures[source] = _failure(entry)
        for output in entry.get("earlier", []):
            self._own(output, source)

    def _promise(self, output: str, image: str, recipe: str) -> None:
        self._open[output] = image, recipe
        self._own(output, image)

    def _recall(self, output: str, image: str, recipe: str) -> None:
        """Take up the promise of a run that was killed."""
        done = self.done.get(image)
        ours = done is not None and output in done.outputs.values()
        if done is None or not ours or done.recipe != recipe:
            self._promise(output, image, recipe)
            if done is not None and ours:  # it may no longer be what the manifest says
                self.done[image] = replace(done, recipe="")

    def _own(self, output: str, image: str) -> None:
        known = self._outputs.setdefault(image, [])
        if self.owners.setdefault(output, image) == image and output not in known:
            known.append(output)

    def _compact(self) -> None:
        last: dict[str, bytes] = {}
        for line in _lines(self.path):
            try:
                source = json.loads(line)["source"]
            except ValueError:
                continue  # half a line, of a run that was killed, which this one had nothing to add to
            last.pop(source, None)
            last[source] = line.rstrip(b"\n") + b"\n"
        write_file(self.path, lambda file: file.writelines(last.values()))

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(self.path)


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{printable(path)} cannot be written: {reason}; nothing more is exported") from error


def _journals(out: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(out), f"{JOURNAL}*")))


def _lines(path: str) -> list[bytes]:
    try:
        with open(path, "rb") as file:
            return file.readlines()
    except FileNotFoundError:
        return []


def append(file: io.FileIO, content: bytes) -> None:
    """Write all of it or nothing, as on a full disk."""
    end = os.fstat(file.fileno()).st_size
    try:
        while content:
            content = content[file.write(content) :]
    except OSError:
        file.truncate(end)
        raise


def _failure(entry: dict[str, Any]) -> list[Any]:
    return [entry[key] for key in ("reason", "recipe", "bytes", "modified")]


def encode(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a file name that is no text: its bytes as \udcXX
        return json.dumps(value).encode() + b"\n"


_LONGEST_NAME = 255  # bytes, on every common file system


def output_names(
    images: Sequence[str], root: str, ending: str, taken: Mapping[str, str], kept: Mapping[str, str]
) -> dict[str, str]:
    """Name the output of each image: its path below `root`, with its own suffix, and `ending`.

    So `a/x.jpg` and `a/x.png` go to `a/x.jpg.overlay.jpg` and `a/x.png.overlay.jpg`. Where that name, capitals or not,
    belongs to another image, or is too long for a file system, eight digits of a hash of the image's path set it apart.

    Args:
        ending: with its dots, as `.overlay.jpg`.
        taken: outputs of earlier runs → their image.
        kept: images of earlier runs → their output, which stays.

    Returns:
        image → output, with / between folders, below the output folder.
    """
    owners = {_alike(name): image for name, image in taken.items()}
    names = {}
    for image in images:
        if image in kept and kept[image].endswith(ending):
            names[image] = kept[image]
            continue
        place = (
            os.path.relpath(image, root) if root else image.replace(":", "").lstrip("\\/")
        )  # root: none across drives
        folder, base = os.path.split(place)
        folder = folder.replace(os.sep, "/")
        name = _join(folder, base, ending)
        if len(os.fsencode(base + ending)) > _LONGEST_NAME or owners.get(_alike(name), image) != image:
            digits = hashlib.blake2b(os.fsencode(image), digest_size=4).hexdigest()
            room = _LONGEST_NAME - len(ending) - len(digits) - 1
            name = _join(folder, f"{_shorten(base, room)}~{digits}", ending)
        owners[_alike(name)] = image
        names[image] = name
    return names


def _alike(name: str) -> str:
    """Equal for names that some file system takes for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _join(folder: str, base: str, ending: str) -> str:
    return f"{folder}/{base}{ending}" if folder else f"{base}{ending}"


def _shorten(base: str, room: int) -> str:
    """The start of a name in at most `room` bytes, cut between letters."""
    while len(os.fsencode(base)) > room:
        base = base[:-1]
    return base
