"""`manifest.jsonl`, the record of a folder of overlays: one line per image, with its outputs or why it failed.

A line is a JSON object. Keys of every image:
    source: absolute path of the image.
    bytes, modified: size of the file, and time of its last change in ns.
    fingerprint: hash of every choice that affects the outputs, see `explainer.fingerprint_of`.
    status: "done" or "failed".
    earlier: outputs of an earlier run that this run did not replace; absent if there are none.
Key of a failed image:
    reason: the error message.
Keys of a finished image:
    outputs: kind → path below the folder, including outputs of an earlier run with the same fingerprint.
    width, height: size of the source in pixels, upright.
    model, method: names of the model and of the heatmap method.
    layer: what the heatmap shows, e.g. "gate of layer4.1".
    target: index of the explained output; null if the method explains no particular output.
    prediction, class, probability: index, name and probability of the most probable class; null if unknown.
    peak: [x, y] of the hottest point, in pixels of the source; null if the heatmap is constant.
    labels: only for models whose outputs are independent labels: [name, probability] of each label above the threshold.
    found: only for detectors: [x0, y0, x1, y1, "class score"] of each confident box.
    fixations: only for glimpses: [x, y] of each glimpse, in pixels of the source.
    seconds: run time of the model and the method for a batch, divided by the number of its images.
    explanations: only with several methods or models: for each of them, `name` and its own values of the keys from
    `model` to `seconds` above. The keys above then hold the values of the first in the list, but seconds holds the sum.
    difference: only for two compared models: `mean` of |second − first|, and `peak`, the point where it is largest.
    fps: only for videos: frames per second of the outputs.
    frames: only for videos: lists with one value per frame: `at` (seconds from the start), `prediction`, `probability`
    and `peak`. The keys above then hold the values of the most confident frame, but seconds holds the sum.

Bytes of file names that are not valid text are written as lone surrogates (`"\\udcff"`); `os.fsencode` restores them.
"""

import contextlib
import glob
import hashlib
import io
import json
import os
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypedDict, cast

from visionattn.errors import DataError, UsageError
from visionattn.files import printable, write_file

NAME = "manifest.jsonl"
_PROMISED = ".manifest.promised"
JOURNAL = ".manifest.journal."

Stamp: TypeAlias = tuple[int, int]
"""Size of a file in bytes, and time of its last change in ns."""


class Difference(TypedDict):
    """How two compared heatmaps differ; see the top of this file."""

    mean: float
    peak: list[float] | None


class Frames(TypedDict):
    """Facts of each frame of a video; see the top of this file."""

    at: list[float]
    prediction: list[int | None]
    probability: list[float | None]
    peak: list[list[float] | None]


Facts = TypedDict(  # not a class, because `class` is a keyword
    "Facts",
    {
        "name": str,
        "width": int,
        "height": int,
        "model": str,
        "method": str,
        "layer": str,
        "target": int | None,
        "prediction": int | None,
        "class": str | None,
        "probability": float | None,
        "peak": list[float] | None,
        "seconds": float,
        "labels": list[list[str | float]],
        "found": list[list[float | str]],
        "fixations": list[list[float]],
        "explanations": "list[Facts]",
        "difference": Difference,
        "fps": float,
        "frames": Frames,
    },
    total=False,
)
"""Facts of a finished image; see the top of this file for the keys."""


@dataclass(frozen=True)
class Done:
    """An image whose outputs were written.

    Attributes:
        source: absolute path.
        stamp: size and time of the file.
        fingerprint: fingerprint of the outputs.
        outputs: kind → path below the folder.
        facts: the other keys of the line.
        earlier: outputs of an earlier run that this run did not replace.
    """

    source: str
    stamp: Stamp
    fingerprint: str
    outputs: Mapping[str, str]
    facts: Facts = field(default_factory=lambda: Facts())
    earlier: Sequence[str] = ()

    def to_dict(self) -> dict[str, object]:
        """Return the JSON object of the image's line."""
        line = {**_identity(self), "status": "done", "outputs": dict(self.outputs), **self.facts}
        return {**line, "earlier": list(self.earlier)} if self.earlier else line

    @classmethod
    def from_dict(cls, line: Mapping[str, object]) -> "Done":
        """Read the JSON object of a finished image.

        Raises:
            LookupError, TypeError, ValueError: a key is missing or holds another type.
        """
        outputs = line["outputs"]
        if not isinstance(outputs, dict):
            raise ValueError("outputs must be an object")
        known = {*_IDENTITY, "status", "outputs", "earlier"}
        facts = cast(Facts, {key: value for key, value in line.items() if key not in known})
        return cls(*_read_identity(line), outputs, facts, _strings(line.get("earlier", [])))


@dataclass(frozen=True)
class Failed:
    """An image that could not be read, explained or written.

    Attributes:
        source: absolute path.
        stamp: size and time of the file; (0, 0) if there is no file.
        fingerprint: fingerprint that the outputs would have had.
        reason: the error message.
        earlier: outputs of an earlier run that still exist.
    """

    source: str
    stamp: Stamp
    fingerprint: str
    reason: str
    earlier: Sequence[str] = ()

    def to_dict(self) -> dict[str, object]:
        """Return the JSON object of the image's line."""
        line = {**_identity(self), "status": "failed", "reason": self.reason}
        return {**line, "earlier": list(self.earlier)} if self.earlier else line

    @classmethod
    def from_dict(cls, line: Mapping[str, object]) -> "Failed":
        """Read the JSON object of a failed image.

        Raises:
            LookupError, TypeError, ValueError: a key is missing or holds another type.
        """
        return cls(*_read_identity(line), str(line["reason"]), _strings(line.get("earlier", [])))


Entry: TypeAlias = Done | Failed
"""The line of one image."""

_IDENTITY = ("source", "bytes", "modified", "fingerprint")


def entry_from_dict(line: object) -> Entry:
    """Read the JSON object of an image's line.

    Raises:
        LookupError, TypeError, ValueError: a key is missing or holds another type.
    """
    if not isinstance(line, dict) or not isinstance(line.get("source"), str) or "status" not in line:
        raise ValueError("source or status is missing")
    return Done.from_dict(line) if line["status"] == "done" else Failed.from_dict(line)


def _identity(entry: Entry) -> dict[str, object]:
    return dict(zip(_IDENTITY, (entry.source, *entry.stamp, entry.fingerprint), strict=True))


def _read_identity(line: Mapping[str, object]) -> tuple[str, Stamp, str]:
    source, size, modified, fingerprint = (line[key] for key in _IDENTITY)
    if not isinstance(size, int) or not isinstance(modified, int):
        raise ValueError("bytes and modified must be integers")
    return str(source), (size, modified), str(fingerprint)


def _strings(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("earlier must be a list of paths")
    return value


class Manifest:
    """The manifest of a folder: read as a whole, written line by line.

    Before an output is written, its path is recorded in a second file, as a promise. If a run is killed before it adds
    an output's line, the next run recognises the output by its promise. Other files are never overwritten.

    One process at a time may use a folder, see `files.FolderLock`. If another process writes into one of the two files
    while this object is in use, this object writes nothing more, and all lines of the other process are kept.

    Attributes:
        out: the folder.
        path: path of the manifest.
        done: image → its finished entry, without facts.
        owners: output → its image, including failed images.

    Args:
        out: the folder; it is created with the first line.

    Raises:
        UsageError: `out` is a file, or its manifest.jsonl was not written by visionattn.
        DataError: the manifest cannot be read.
    """

    def __init__(self, out: str) -> None:
        self.out = out
        self.path = os.path.join(out, NAME)
        self.done: dict[str, Done] = {}
        self.owners: dict[str, str] = {}
        self._promised = os.path.join(out, _PROMISED)
        self._outputs: dict[str, list[str]] = {}  # the reverse of `owners`
        self._open: dict[str, tuple[str, str]] = {}  # promised outputs without a line: output → (image, fingerprint)
        self._failures: dict[str, Failed] = {}
        self._stale = 0  # lines that a later line of the same image replaces
        self._lines = LineFile(self.path)
        self._promises = LineFile(self._promised)
        if os.path.lexists(out) and not os.path.isdir(out):
            raise UsageError(f"{printable(out)} is a file; name a folder for the overlays")
        try:
            self._read()
            for promise in self._promises.read():
                if promise.endswith(b"\n"):  # an incomplete line is from a run that was killed
                    self._recall(*json.loads(promise))
                    self._promises.keep(promise)
        except OSError as error:
            raise DataError(f"{printable(error.filename or out)} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, LookupError) as error:
            raise UsageError(
                f"{printable(self.path)} was not written by visionattn ({error}); choose another folder for overlays"
            ) from error

    def promise(self, outputs: Iterable[tuple[str, str]], fingerprint: str) -> None:
        """Record outputs that are about to be written.

        Args:
            outputs: (output, image) pairs.
            fingerprint: fingerprint of the outputs.

        Raises:
            DataError: the promises cannot be written.
        """
        outputs = list(outputs)
        if not outputs:
            return
        self._promises.append(b"".join(encode([*pair, fingerprint]) for pair in outputs))
        for output, image in outputs:
            self._promise(output, image, fingerprint)

    def secure(self) -> None:
        """Wait until the promises are on disk, so that every output that survives a power cut has a promise."""
        self._promises.sync()

    def add(self, entry: Entry) -> None:
        """Write the line of one image; a failure that is already recorded is not written again.

        Raises:
            DataError: the line cannot be written.
        """
        current = set(entry.outputs.values()) if isinstance(entry, Done) else set()
        earlier = [name for name in self._outputs.get(entry.source, []) if name not in current]
        earlier = [name for name in earlier if os.path.lexists(os.path.join(self.out, name))]
        entry = replace(entry, earlier=earlier or entry.earlier)
        if isinstance(entry, Failed) and _same_failure(self._failures.get(entry.source), entry):
            return
        self._lines.append(encode(entry.to_dict()))
        self._note(entry)

    def take_in(self) -> list[Entry]:
        """Move the entries of all journals into the manifest, including journals of killed processes.

        Returns:
            The entries, in no particular order.

        Raises:
            DataError: a journal cannot be read, or the manifest cannot be written.
        """
        entries: list[Entry] = []
        for path in _journals(self.out):
            promises: dict[str, tuple[str, str]] = {}
            try:
                # a process that was killed may have left an incomplete last line
                values = [json.loads(line) for line in _lines(path) if line.endswith(b"\n")]
                for value in values:
                    if isinstance(value, list):
                        output, image, fingerprint = value
                        promises[output] = image, fingerprint
                    else:
                        entry = entry_from_dict(value)
                        entries.append(entry)
                        for output in entry.outputs.values() if isinstance(entry, Done) else ():
                            promises.pop(output, None)
            except (OSError, ValueError, TypeError, LookupError) as error:
                raise DataError(
                    f"{printable(path)} cannot be read ({error}); delete it to continue without its entries"
                ) from error
            for output, (image, fingerprint) in promises.items():
                self.promise([(output, image)], fingerprint)
                self._recall(output, image, fingerprint)
        for entry in entries:
            self.add(entry)
        for path in _journals(self.out):
            with writing(path):
                os.unlink(path)
        return entries

    def close(self) -> None:
        """Close the files; drop stale lines, and keep only the promises of outputs that exist but have no line.

        Raises:
            DataError: the manifest cannot be written.
        """
        try:
            listed = self._lines.close()
        finally:
            promised = self._promises.close()
        if not listed and not promised:
            return
        with writing(self.path):
            if self._stale:
                self._compact()
            left = [name for name in self._open if os.path.lexists(os.path.join(self.out, name))]
            if left:
                write_file(self._promised, b"".join(encode([name, *self._open[name]]) for name in left))
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._promised)

    def _read(self) -> None:
        lines = self._lines.read()
        for number, line in enumerate(lines):
            try:
                try:
                    entry = entry_from_dict(json.loads(line))
                except ValueError as error:
                    raise ValueError(f"line {number + 1}: {error}") from error
            except ValueError:
                incomplete = number == len(lines) - 1 and not line.endswith(b"\n")
                if incomplete and (number or os.path.exists(self._promised)):
                    return  # the run was killed while it wrote the line
                raise
            self._note(entry)
            self._lines.keep(line)

    def _note(self, entry: Entry) -> None:
        source = entry.source
        self._stale += source in self.done or source in self._failures
        self._failures.pop(source, None)
        self.done.pop(source, None)
        if isinstance(entry, Done):
            self.done[source] = replace(entry, facts={}, earlier=())  # facts of a million images would fill the memory
            for output in entry.outputs.values():
                self._open.pop(output, None)
                self._own(output, source)
        else:
            self._failures[source] = entry
        for output in entry.earlier:
            self._own(output, source)

    def _promise(self, output: str, image: str, fingerprint: str) -> None:
        self._open[output] = image, fingerprint
        self._own(output, image)

    def _recall(self, output: str, image: str, fingerprint: str) -> None:
        """Restore a promise that a killed run made."""
        done = self.done.get(image)
        listed = done is not None and output in done.outputs.values()
        if done is None or not listed or done.fingerprint != fingerprint:
            self._promise(output, image, fingerprint)
            if done is not None and listed:  # the killed run may have replaced the output that the manifest lists
                self.done[image] = replace(done, fingerprint="")

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
                continue  # an incomplete line: a run was killed while it wrote its last line
            last.pop(source, None)
            last[source] = line.rstrip(b"\n") + b"\n"
        write_file(self.path, lambda file: file.writelines(last.values()))


class LineFile:
    """A file of lines to which this process appends. If another process has changed the file, nothing is written.

    Args:
        path: path of the file; the file and its folder are made with the first line.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._size = 0  # bytes of the file that this object knows
        self._end = 0  # byte after the last line to keep
        self._gap = b""  # a line break, if the last line to keep has none
        self._file: io.FileIO | None = None
        self._lock = threading.Lock()  # one thread appends, others call `sync`

    def read(self) -> list[bytes]:
        """Return the lines; the next `append` drops the lines that were not passed to `keep`."""
        lines = _lines(self.path)
        self._size = sum(map(len, lines))
        return lines

    def keep(self, line: bytes) -> None:
        """Keep the next of the lines that `read` returned."""
        self._end += len(line)
        self._gap = b"" if line.endswith(b"\n") else b"\n"

    def append(self, lines: bytes) -> None:
        """Append all lines or, when the disk is full, none of them.

        Raises:
            DataError: the file cannot be written, or another process has written into it or removed it.
        """
        with writing(self.path), self._lock:
            if self._file is None:
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  # closed in `close`
                self._check(self._file)
                self._file.truncate(self._end)
                self._size, lines = self._end, self._gap + lines
            self._check(self._file)
            try:
                content = lines
                while content:
                    content = content[self._file.write(content) :]
            except OSError:
                self._file.truncate(self._size)
                raise
            self._size += len(lines)

    def sync(self) -> None:
        """Wait until the appended lines are on disk.

        Raises:
            DataError: as for `append`.
        """
        if self._file is not None:
            with writing(self.path):
                with self._lock:
                    self._check(self._file)
                os.fsync(self._file.fileno())

    def close(self) -> bool:
        """Close the file and return whether lines were appended.

        Raises:
            DataError: as for `append`.
        """
        if self._file is None:
            return False
        with writing(self.path), self._file:
            self._check(self._file)
        return True

    def _check(self, file: io.FileIO) -> None:
        state = os.fstat(file.fileno())
        if state.st_size != self._size or state.st_nlink == 0:
            raise DataError(
                f"{printable(self.path)} was changed by another process during this run; nothing more is exported, "
                "run the command again"
            )


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn an operating system's error into a DataError that ends the export."""
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


def _same_failure(earlier: Failed | None, entry: Failed) -> bool:
    return earlier is not None and replace(earlier, earlier=()) == replace(entry, earlier=())


def encode(value: object) -> bytes:
    """Return a line of JSON, UTF-8; bytes of a file name that are not valid text become `\\udcXX`."""
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value).encode() + b"\n"


_LONGEST_NAME = 255  # bytes, on every common file system


def output_names(
    images: Sequence[str], root: str, ending: str, taken: Mapping[str, str], kept: Mapping[str, str]
) -> dict[str, str]:
    """Name the output of each image: the image's path below `root`, with its suffix, followed by `ending`.

    For example `a/x.jpg` and `a/x.png` get `a/x.jpg.overlay.jpg` and `a/x.png.overlay.jpg`. If that name belongs to
    another image (ignoring case) or is too long for a file system, eight digits of a hash of the image's path are
    added.

    Args:
        images: absolute paths.
        root: folder that contains all images, "" if there is none; the outputs have the same paths below the output
            folder.
        ending: with its dots, e.g. `.overlay.jpg`.
        taken: output of an earlier run → its image.
        kept: image → its output of an earlier run, whose name is used again.

    Returns:
        image → output: a path below the output folder, with / between folders.
    """
    owners = {_alike(name): image for name, image in taken.items()}
    names = {}
    for image in images:
        if image in kept and kept[image].endswith(ending):
            names[image] = kept[image]
            continue
        # images on different Windows drives have no common root
        place = os.path.relpath(image, root) if root else image.replace(":", "").lstrip("\\/")
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
    """Return a key; names that some file system treats as the same have the same key."""
    return unicodedata.normalize("NFC", name).casefold()


def _join(folder: str, base: str, ending: str) -> str:
    return f"{folder}/{base}{ending}" if folder else f"{base}{ending}"


def _shorten(base: str, room: int) -> str:
    """Return the longest start of a name that fits `room` bytes, cut between letters."""
    while len(os.fsencode(base)) > room:
        base = base[:-1]
    return base
