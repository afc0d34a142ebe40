"""Names of files: printable, in natural order, no addresses. Atomic writes: a whole file is replaced, or nothing."""

import contextlib
import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeAlias

from visionattn.errors import DataError, UsageError

AnyPath: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes]"

PART_PREFIX = ".part."
"""Prefix of the name of a temporary file."""

_LONGEST_NAME = 255  # bytes, on every common file system


def printable(name: AnyPath) -> str:
    """Return a file name that a terminal can show: control characters, and bytes that are not valid text, become �."""
    spaced = (" " if unicodedata.category(letter) == "Zs" else letter for letter in os.fsdecode(name))
    return "".join(letter if letter.isprintable() else "�" for letter in spaced)


def local_path(path: AnyPath, option: str = "") -> str:
    """Return a path as text, and refuse an address such as `s3://bucket/out`, which would become a local folder `s3:`.

    Args:
        path: path of a file or folder to read or write; names may contain bytes that are not valid text.
        option: name of the option that holds the path, for the message.

    Raises:
        UsageError: the path starts with `scheme://`.
    """
    name = os.fsdecode(path)
    if re.match(r"[A-Za-z][\w+.:-]+://", name):  # not C://, and also chains such as simplecache::s3://
        raise UsageError(
            f"{option and f'{option}: '}{printable(name)} is an address, and only files on this machine are read and "
            "written; copy the files, and give a local path"
        )
    return name


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Return a sort key that puts img2 before img10. Different names have different keys, also img1 and img01."""
    parts: list[int | str] = []  # text and numbers alternate, so text is never compared with a number
    for place, part in enumerate(re.split("([0-9]+)", name)):
        parts.append(int(part) if place % 2 else part)
    return parts, name


def write_file(path: AnyPath, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: at any moment its name refers to the earlier file or to the complete new file.

    See `Replacement`.

    Args:
        path: path of the file; its folder must exist.
        content: the bytes, or a function that writes them into the open file.

    Raises:
        UsageError: the path is an address, see `local_path`.
        DataError: the file cannot be written. The earlier file is unchanged and the temporary file is removed.
    """
    new = Replacement(path)
    try:
        new.write(content)
        new.commit()
    except BaseException:  # remove the temporary file after Ctrl-C too
        new.discard()
        raise


class Replacement:
    """A file that is written under a temporary name, then renamed to its final name.

    The temporary name is `.part.NAME` in the same folder. `commit` waits until the content is on disk, renames the
    file, and waits until the new name is on disk too. So after a kill, a full disk or a power cut the path holds either
    the earlier file or the new file. If a killed process left a temporary file, the next process that writes the same
    file replaces it.

    Attributes:
        path: the final, absolute path.
        part: the temporary path.

    Args:
        path: the final path; its folder must exist.

    Raises:
        UsageError: the path is an address, see `local_path`.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = os.path.abspath(local_path(path))
        folder, name = os.path.split(self.path)
        if len(os.fsencode(PART_PREFIX + name)) > _LONGEST_NAME:
            digits = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
            name = f"{digits}{os.path.splitext(name)[1]}"
        self.part = os.path.join(folder, PART_PREFIX + name)
        self._inode: int | None = None

    def write(self, content: bytes | Callable[[BinaryIO], object]) -> None:
        """Write the content into the temporary file.

        Args:
            content: the bytes, or a function that writes them into the open file.

        Raises:
            DataError: the file cannot be written.
        """
        with _named(self.path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.part)  # if the name is a link, writing would change the file that it points to
            with open(self.part, "xb") as file:
                self._inode = os.fstat(file.fileno()).st_ino
                if callable(content):
                    content(file)
                else:
                    file.write(content)

    def commit(self) -> None:
        """Wait until the content is on disk, then rename the file. The new file gets the earlier file's permissions.

        Raises:
            DataError: the file cannot be renamed, or another process has begun to write the same file.
        """
        with _named(self.path):
            with open(self.part, "rb+") as file:
                if self._inode not in (None, os.fstat(file.fileno()).st_ino):
                    raise OSError("another process is writing the same file")
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):
                os.chmod(self.part, stat.S_IMODE(os.stat(self.path).st_mode))
            os.replace(self.part, self.path)
        _sync_folder(os.path.dirname(self.path))

    def discard(self) -> None:
        """Remove the temporary file."""
        with contextlib.suppress(OSError):
            os.unlink(self.part)


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Turn an operating system's error into a DataError that names the file."""
    try:
        yield
    except Exception as error:
        reason = _os_error(error)
        if reason is None:
            raise
        raise DataError(f"{printable(path)} cannot be written: {reason.strerror or reason}") from error


def _os_error(error: Exception) -> OSError | None:
    """Return the OSError that caused an error, or None. (torch.save reports a full disk as a RuntimeError.)"""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause


def _sync_folder(folder: str) -> None:
    """Wait until the names in a folder are on disk. Do nothing on systems that cannot open a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
