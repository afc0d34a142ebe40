"""Find images and videos at the paths that a user gives: files, folders, patterns and lists; the sample photographs."""

import glob
import importlib.util
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from visionattn.data.decode import SUFFIXES
from visionattn.data.image_list import LISTS, ImageRequest, read_list
from visionattn.errors import DataError, UsageError, nearest
from visionattn.files import AnyPath, local_path, natural_key, printable

VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv"})
"""Suffixes of video files, in lower case."""


@dataclass
class FoundImages:
    """The images found at the paths that a user gave.

    Attributes:
        images: absolute paths, without duplicates.
        root: the common folder of the inputs; the folder of outputs has the same sub-folders.
        requests: image → the target and boxes that a list gives for it.
        ignored: suffix → number of files found that are not images.
        links: number of links to folders; linked folders are not searched.
        unlisted: (folder, reason) of folders whose content cannot be listed.
    """

    images: list[str] = field(default_factory=list)
    root: str = ""
    requests: dict[str, ImageRequest] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    links: int = 0
    unlisted: list[tuple[str, str]] = field(default_factory=list)


def find(inputs: Sequence[AnyPath], *, out: AnyPath, written: Collection[str] = ()) -> FoundImages:
    """Find the images at the given paths.

    A path is a file, a folder, a pattern (`holiday/**/IMG_*.jpg`) or a list (`image_list.read_list`). For a folder,
    all images in it and its sub-folders are found, in natural order (2 before 10). The search skips hidden files and
    folders, linked folders, files without an image suffix, videos and earlier outputs. A video is found only if its
    path is given, listed or matched by a pattern.

    Args:
        inputs: files, folders, patterns and lists (.csv, .jsonl); names may contain bytes that are not valid text.
        out: the folder of outputs; it is not searched, even if it is inside a folder of `inputs`.
        written: absolute paths of earlier outputs.

    Raises:
        UsageError: there are no inputs; or an input is an address such as s3://bucket, does not exist (the message
            names similar ones), matches nothing, or is neither file nor folder.
        DataError: no input has an image, or a list cannot be read.
    """
    if isinstance(inputs, (str, bytes, os.PathLike)):
        inputs = [inputs]
    paths = [os.path.abspath(local_path(path)) for path in inputs]
    if not paths:
        raise UsageError("there are no inputs; give files or folders of images")
    found, seen, tops = FoundImages(), set[str](), []
    skip = os.path.realpath(os.fsdecode(out))
    real = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in written}}
    outputs = {os.path.join(real[os.path.dirname(path)], os.path.basename(path)) for path in written}

    def below(path: str) -> Iterator[str]:
        """Yield the images of one input, and append to `tops` the folder to which output paths are relative."""
        if glob.has_magic(path) and not os.path.lexists(path):
            matches = sorted(glob.glob(path, recursive=True), key=natural_key)
            if not matches:
                raise UsageError(
                    f"nothing matches {printable(path)}; quote a pattern, so that the shell does not expand it"
                )
            tops.append(_before_magic(path))
            # paths that start with `own` are outputs; "\0" starts no path, so it excludes nothing
            own = os.path.join(skip, "") if not os.path.realpath(tops[-1]).startswith(skip) else "\0"
            for match in matches:
                if os.path.isdir(match):
                    continue  # a pattern with ** also matches the files in the folder
                suffix = os.path.splitext(match)[1].lower()
                resolved = os.path.join(os.path.realpath(os.path.dirname(match)), os.path.basename(match))
                if suffix not in SUFFIXES | VIDEOS:
                    found.ignored[printable(suffix)] += 1
                elif resolved not in outputs and not resolved.startswith(own):
                    yield match
            return
        mode = _mode(path)
        if stat.S_ISDIR(mode):
            tops.append(path)
            yield from _walk(path, found, skip if skip != os.path.realpath(path) else "", outputs)
        elif not stat.S_ISREG(mode):
            raise UsageError(f"{printable(path)} is neither a file nor a folder; give images or folders of them")
        elif os.path.splitext(path)[1].lower() in LISTS:
            for image, request in read_list(path):
                tops.append(os.path.dirname(image))
                if request is not None:
                    try:
                        found.requests[image] = found.requests.get(image, ImageRequest()) + request
                    except ValueError as error:
                        raise DataError(f"{printable(path)}: {printable(image)} {error}") from error
                yield image
        else:
            tops.append(os.path.dirname(path))
            yield path

    for path in paths:
        for image in below(path):
            if image not in seen:
                seen.add(image)
                found.images.append(image)
    if not found.images and not found.unlisted:
        kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in found.ignored.most_common(4))
        places = ", ".join(printable(os.fsdecode(path)) for path in inputs[:3]) + (", …" if len(inputs) > 3 else "")
        raise DataError(
            f"there is no image in {places}" + (f", only {kinds}" if kinds else "; hidden files do not count")
        )
    found.root = _common(set(tops))
    return found


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if isinstance(error, PermissionError):
            raise DataError(f"{printable(path)} cannot be read: {error.strerror}") from error
        parent, name = os.path.split(path)
        while parent and not os.path.isdir(parent) and os.path.dirname(parent) != parent:
            parent, name = os.path.split(parent)
        try:
            near = nearest(printable(name), map(printable, os.listdir(parent)))
        except OSError:
            near = ""
        raise UsageError(f"there is no {printable(os.path.join(parent, name))}.{near}") from error


def _walk(folder: str, found: FoundImages, skip: str, outputs: Container[str]) -> Iterator[str]:
    """Yield the images of a folder, then the images of its sub-folders; `skip` and `outputs` are real paths."""
    stack = [folder]  # a stack instead of recursion, whose depth Python limits
    while stack:
        current = stack.pop()
        try:
            with os.scandir(current) as entries:
                listed = sorted(entries, key=lambda entry: natural_key(entry.name))
        except OSError as error:
            found.unlisted.append((current, f"cannot be listed: {error.strerror or error}"))
            continue
        folders, real = [], os.path.realpath(current)
        for entry in listed:
            if entry.name.startswith("."):
                continue
            if _is(entry, stat.S_ISDIR):
                if entry.is_symlink():
                    found.links += 1
                elif os.path.join(real, entry.name) != skip:
                    folders.append(entry.path)
            elif os.path.join(real, entry.name) not in outputs:
                suffix = os.path.splitext(entry.name)[1].lower()
                # a broken link counts as an image, so that reading it reports the error; pipes and devices are ignored
                if suffix in SUFFIXES and _is(entry, stat.S_ISREG, broken=True):
                    yield entry.path
                else:
                    found.ignored[printable(suffix)] += 1
        stack += reversed(folders)


def _is(entry: "os.DirEntry[str]", kind: Callable[[int], bool], *, broken: bool = False) -> bool:
    """Return whether an entry, or the target of a link, is of a kind; return `broken` for a broken link."""
    if not entry.is_symlink():  # os.scandir has already read the kind, so os.stat is not needed
        return entry.is_dir() if kind is stat.S_ISDIR else entry.is_file()
    try:
        return kind(os.stat(entry.path).st_mode)
    except OSError:
        return broken


def _before_magic(pattern: str) -> str:
    """Return the leading folders of a pattern, up to the first name that contains a wildcard."""
    while glob.has_magic(pattern):
        pattern = os.path.dirname(pattern)
    return pattern


def _common(folders: Collection[str]) -> str:
    try:
        return os.path.commonpath(folders)
    except ValueError:  # on Windows, the folders are on different drives
        return ""


def is_video(path: str) -> bool:
    """Return whether a path has the suffix of a video."""
    return os.path.splitext(path)[1].lower() in VIDEOS


def sample_photographs() -> list[str]:
    """Return the paths of four photographs that are installed: a cat, a cup of coffee, a palace and a flower.

    The first two come with visionattn, the others with scikit-learn. `SOURCES.md` beside the first has the
    photographers and licences.
    """
    package = Path(__file__).parents[1]
    folders = (package / "photographs", package.parent / "data/photographs")  # in an installed package; in a checkout
    own = next(folder for folder in folders if folder.is_dir())
    sklearn = importlib.util.find_spec("sklearn")  # found without its slow import
    assert sklearn is not None
    assert sklearn.origin is not None
    other = Path(sklearn.origin).parent / "datasets/images"
    return [str(path) for path in (own / "chelsea.jpg", own / "coffee.jpg", other / "china.jpg", other / "flower.jpg")]
