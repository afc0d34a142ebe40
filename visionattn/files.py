"""File names that a terminal can print, and files that are never half written."""

import contextlib
import hashlib
import os
import stat
import unicodedata
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeAlias

from visionattn.errors import DataError

AnyPath: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes]"

_PREFIX = ".part."
_LONGEST_NAME = 255  # bytes, on every common file system


def printable(name: AnyPath) -> str:
    """Return a file name as a terminal can show it: bytes that are no text, and control characters, become �."""
    spaced = (" " if unicodedata.category(letter) == "Zs" else letter for letter in os.fsdecode(name))
    return "".join(letter if letter.isprintable() else "�" for letter in spaced)


def write_file(path: AnyPath, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file so that its name always belongs to a whole one, the earlier or the new; see `Replacement`.

    Args:
        path: in a folder that exists.
        content: the bytes, or a function that writes them into the open file.

    Raises:
        DataError: the file cannot be written; the earlier one is whole, and nothing is left beside it.
    """
    new = Replacement(path)
    try:
        new.write(content)
        new.commit()
    except BaseException:  # Ctrl-C too leaves nothing beside the file
        new.discard()
        raise


class Replacement:
    """A file that is written beside its place and takes its name when it is whole.

    It is called `.part.NAME` until then. `commit` waits until the content is on the disk, renames the file, and waits
    until the new name is on the disk too. So a kill, a full disk or a power cut leaves the earlier file or the new one.
    What a killed process left is replaced by the next one that writes the same file.

    Attributes:
        path: the place of the file.
        part: where it is written.

    Args:
        path: in a folder that exists.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = os.path.abspath(os.fsdecode(path))
        folder, name = os.path.split(self.path)
        if len(os.fsencode(_PREFIX + name)) > _LONGEST_NAME:
            digits = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
            name = f"{digits}{os.path.splitext(name)[1]}"
        self.part = os.path.join(folder, _PREFIX + name)
        self._inode: int | None = None

    def write(self, content: bytes | Callable[[BinaryIO], object]) -> None:
        """Write the content beside the place.

        Raises:
            DataError: it cannot be written.
        """
        with _named(self.path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.part)  # it may be a link that leads elsewhere
            with open(self.part, "xb") as file:
                self._inode = os.fstat(file.fileno()).st_ino
                if callable(content):
                    content(file)
                else:
                    file.write(content)

    def commit(self) -> None:
        """Wait until the content is on the disk, then give the file its name and the earlier file's permissions.

        Raises:
            DataError: this is not possible, or another process has begun to write the same file.
        """
        with _named(self.path):
            with open(self.part, "rb+") as file:
                if self._inode not in (None, os.fstat(file.fileno()).st_ino):
                    raise OSError("another process writes it")
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):
                os.chmod(self.part, stat.S_IMODE(os.stat(self.path).st_mode))
            os.replace(self.part, self.path)
        _sync_folder(os.path.dirname(self.path))

    def discard(self) -> None:
        """Remove what was written beside the place."""
        with contextlib.suppress(OSError):
            os.unlink(self.part)


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Turn an operating system's error into one that names the file."""
    try:
        yield
    except Exception as error:
        reason = _os_error(error)
        if reason is None:
            raise
        raise DataError(f"{printable(path)} cannot be written: {reason.strerror or reason}") from error


def _os_error(error: Exception) -> OSError | None:
    """Find the operating system's error behind another: torch.save reports a full disk as a RuntimeError."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__context__
    return seen


def _sync_folder(folder: str) -> None:
    """Wait until a folder's names are on the disk, on systems that can be asked for that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
