"""Which images and videos a run reads, in which order, and what their outputs are called."""

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from visionattn.data.decode import SUFFIXES
from visionattn.data.image_list import LISTS, Wish, read_list
from visionattn.errors import DataError, UsageError, nearest
from visionattn.files import printable

AnyPath: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes]"

VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv"})
"""What a video's name ends with, in lower case."""


@dataclass
class Found:
    """What stands at the paths a user gave.

    Attributes:
        images: absolute paths, each once.
        root: the folder below which the outputs mirror the images' places.
        ignored: suffix → how many files of folders are no images.
        links: how many linked folders were not entered.
        unlisted: folders that cannot be listed, and why.
        wishes: image → what a list says of it, where it says anything.
    """

    images: list[str] = field(default_factory=list)
    root: str = ""
    wishes: dict[str, Wish] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    links: int = 0
    unlisted: list[tuple[str, str]] = field(default_factory=list)


def find(inputs: Sequence[AnyPath], *, out: AnyPath, written: Collection[str] = ()) -> Found:
    """Find the images at some paths: files as they are, folders with all below them in natural order (2 before 10),
    what matches a pattern (`holiday/**/IMG_*.jpg`), and what a list names (`lists.read_list`).

    In folders, hidden files and folders are passed over, linked folders are not entered, and files with another suffix
    than an image's are left. So are earlier outputs. Videos are taken where they are given, listed or matched, and
    not where they merely lie in a folder.

    Args:
        inputs: files, folders, patterns and lists (.csv, .jsonl); names that are no text are welcome.
        out: where outputs go; it is not searched where it lies inside a folder of `inputs`.
        written: absolute paths of earlier outputs.

    Raises:
        UsageError: there are no inputs, or one does not exist (names what comes near), matches nothing, or is neither
            file nor folder.
        DataError: there is no image in any of them, or a list cannot be read.
    """
    if isinstance(inputs, (str, bytes, os.PathLike)):
        inputs = [inputs]
    paths = [os.path.abspath(os.fsdecode(path)) for path in inputs]
    if not paths:
        raise UsageError("there are no inputs; give files or folders of images")
    found, seen, tops = Found(), set[str](), []
    skip = os.path.realpath(os.fsdecode(out))
    real = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in written}}
    outputs = {os.path.join(real[os.path.dirname(path)], os.path.basename(path)) for path in written}

    def below(path: str) -> Iterator[str]:
        """The images that a path stands for."""
        if glob.has_magic(path) and not os.path.lexists(path):
            matches = sorted(glob.glob(path, recursive=True), key=_natural)
            if not matches:
                raise UsageError(f"nothing matches {printable(path)}; quote a pattern, so that the shell leaves it")
            tops.append(_before_magic(path))
            own = os.path.join(skip, "") if not os.path.realpath(tops[-1]).startswith(skip) else "\0"
            for match in matches:
                if os.path.isdir(match):
                    continue  # what it holds is matched by **
                suffix = os.path.splitext(match)[1].lower()
                here = os.path.join(os.path.realpath(os.path.dirname(match)), os.path.basename(match))
                if suffix not in SUFFIXES | VIDEOS:
                    found.ignored[printable(suffix)] += 1
                elif here not in outputs and not here.startswith(own):
                    yield match
            return
        mode = _mode(path)
        if stat.S_ISDIR(mode):
            tops.append(path)
            yield from _walk(path, found, skip if skip != os.path.realpath(path) else "", outputs)
        elif not stat.S_ISREG(mode):
            raise UsageError(f"{printable(path)} is neither a file nor a folder; give images or folders of them")
        elif os.path.splitext(path)[1].lower() in LISTS:
            for image, wish in read_list(path):
                tops.append(os.path.dirname(image))
                if wish is not None:
                    found.wishes[image] = wish if image not in found.wishes else found.wishes[image] + wish
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


def _walk(folder: str, found: Found, skip: str, outputs: Container[str]) -> Iterator[str]:
    """Yield a folder's images, then those of its folders; without recursion, so that depth does not matter.

    `skip` and `outputs` are real paths: the same folder may be given through a link.
    """
    stack = [folder]
    while stack:
        here = stack.pop()
        try:
            with os.scandir(here) as entries:
                listed = sorted(entries, key=lambda entry: _natural(entry.name))
        except OSError as error:
            found.unlisted.append((here, f"cannot be listed: {error.strerror or error}"))
            continue
        folders, real = [], os.path.realpath(here)
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
                # a link that leads nowhere is an image that fails; a pipe or device of that name is none
                if suffix in SUFFIXES and _is(entry, stat.S_ISREG, broken=True):
                    yield entry.path
                else:
                    found.ignored[printable(suffix)] += 1
        stack += reversed(folders)


def _is(entry: "os.DirEntry[str]", kind: Callable[[int], bool], *, broken: bool = False) -> bool:
    """Whether an entry, or what it links to, is of a kind; `broken` is the answer for links that lead nowhere."""
    if not entry.is_symlink():  # known without asking the file system again
        return entry.is_dir() if kind is stat.S_ISDIR else entry.is_file()
    try:
        return kind(os.stat(entry.path).st_mode)
    except OSError:
        return broken


def _before_magic(pattern: str) -> str:
    """The folder before a pattern's first part with * or ?."""
    while glob.has_magic(pattern):
        pattern = os.path.dirname(pattern)
    return pattern


def _common(folders: Collection[str]) -> str:
    try:
        return os.path.commonpath(folders)
    except ValueError:  # drives of Windows
        return ""


def _natural(name: str) -> tuple[list[int | str], str]:
    """Sorts img2 before img10; texts and numbers alternate, so that each meets its like."""
    parts: list[int | str] = []
    for place, part in enumerate(re.split("([0-9]+)", name)):
        parts.append(int(part) if place % 2 else part)
    return parts, name


def is_video(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in VIDEOS
